"""What a file on the command line is."""

from pathlib import Path


def visual_kind(source: str) -> str:
    """Tell by its ending whether a file is a picture; anything else is a video."""
    from longvideo.pipelines.inputs import IMAGE_SUFFIXES

    return "image" if Path(source).suffix.lower() in IMAGE_SUFFIXES - {".gif"} else "video"
