"""Where the media of rows lie, and whether they can be read."""

from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from longvideo.processing.shared.video_io import describe_video
from longvideo.processing.shared.video_sources import list_pictures, local_path, read_picture
from longvideo.trainers.data.blocks import MESSAGE_LISTS

CHECKS = ("none", "exists", "decodes")


def media_blocks(row: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """List the video and image blocks of a row in our form, in order.

    Args:
        row: The row.

    Yields:
        The blocks themselves.
    """
    for name in MESSAGE_LISTS:
        for entry in row.get(name) or ():
            for block in entry["content"]:
                if block["type"] != "text":
                    yield block


def root_of(*folders: Path | None) -> Callable[[str], str]:
    """Make the function that finds relative paths.

    Args:
        *folders: Folders that paths may be relative to; None is left out.

    Returns:
        Function from a path to where it lies: an absolute path or file address as it is, otherwise in the first
        folder that has it, and where none has it, in the first folder.
    """
    known = [folder for folder in folders if folder is not None]

    def find(path: str) -> str:
        if not known or path.lower().startswith("file://") or Path(path).expanduser().is_absolute():
            return path
        found = next((folder for folder in known if (folder / path).exists()), known[0])
        return str((found / path).absolute())

    return find


def map_paths(row: dict[str, Any], find: Callable[[str], str]) -> dict[str, Any]:
    """Replace the paths of a row, in place.

    Args:
        row: Row in our form.
        find: From a path to its replacement.

    Returns:
        The row.
    """
    for block in media_blocks(row):
        if block.get("path") is not None:
            block["path"] = find(block["path"])
        if block.get("video") is not None:
            block["video"] = [find(frame) for frame in block["video"]]
    return row


def check_media(row: Mapping[str, Any], how: str) -> int:
    """Check the media of a row.

    Args:
        row: Row in our form whose paths were found already.
        how: "none", "exists" (files and folders are there, folders hold pictures), or "decodes" (videos can be opened
            and their cut lies inside; pictures can be read).

    Returns:
        Number of media that were not checked, since they lie on the network.

    Raises:
        ValueError: A medium is missing or broken.
    """
    if how not in CHECKS:
        raise ValueError(f"the media check {how!r} is unknown; expected one of {CHECKS}")
    skipped = 0
    for block in media_blocks(row):
        if how == "none" or "image" in block:
            continue
        if "url" in block and not block["url"].startswith("data:"):
            skipped += 1
            continue
        if "url" not in block:
            sources = block["video"] if "video" in block else [block["path"]]
            for source in sources:
                problem = _missing(source, block["type"])
                if problem:
                    raise ValueError(problem)
        if how == "decodes":
            _decode(block)
    return skipped


@lru_cache(maxsize=4096)
def _missing(source: str, kind: str) -> str | None:
    try:
        path = local_path(source)
        if path.is_dir() and kind == "video":
            list_pictures(path)
        elif path.is_dir() or path.stat().st_size == 0:
            return f"the {kind} {source} is {'a folder' if path.is_dir() else 'empty'}"
    except (FileNotFoundError, ValueError) as error:
        return f"the {kind} is missing: {error}"
    return None


def _decode(block: Mapping[str, Any]) -> None:
    source = block.get("video") or block.get("path") or block.get("url")
    try:
        if block["type"] == "image":
            _open_picture(source)
            return
        facts = describe_video(source, start=block.get("start"), end=block.get("end"))
        pictures = source if isinstance(source, list) else None
        if pictures is None and not source.startswith("data:") and local_path(source).is_dir():
            pictures = list_pictures(local_path(source))
        for picture in pictures or ():
            read_picture(Path(picture), None)
    except (OSError, ValueError, TypeError) as error:
        shown = source if isinstance(source, str) else source[0]
        raise ValueError(f"the {block['type']} {shown:.200} cannot be read: {error}") from error
    if "split" in block and not 0 <= block["split"][0] <= block["split"][1] < facts.total_num_frames:
        raise ValueError(
            f"split={block['split']} leaves the video {source}, which has {facts.total_num_frames} frames"
        )


def _open_picture(source: str) -> tuple[int, int]:
    from transformers.image_utils import load_image

    if source.startswith("data:"):
        return load_image(source).size
    try:
        with Image.open(local_path(source)) as picture:
            picture.load()
            return picture.size
    except UnidentifiedImageError as error:
        raise ValueError(f"it is no picture ({error})") from error


def picture_size(block: Mapping[str, Any], find: Callable[[str], str] | None) -> tuple[int, int]:
    """Find the size of a medium.

    Args:
        block: Video or image block.
        find: From a path of the row to where it lies, or None.

    Returns:
        (width, height) in pixels.

    Raises:
        ValueError: The medium cannot be read.
    """
    if "image" in block and hasattr(block["image"], "size"):
        return block["image"].size
    if "path" not in block and "video" not in block:
        raise ValueError("its boxes are in pixels, but the size of the medium is unknown; use bbox_type 'norm1'")
    place = dict(block)
    map_paths({"messages": [{"content": [place]}]}, find or str)
    try:
        if block["type"] == "image":
            return _open_picture(place["path"])
        facts = describe_video(place.get("video") or place["path"])
    except (OSError, ValueError) as error:
        raise ValueError(f"its boxes are in pixels, but the medium cannot be read: {error}") from error
    return facts.width, facts.height
