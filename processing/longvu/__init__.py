"""Processor classes of LongVU, imported at first use, and their registration with the Auto classes."""

from importlib import import_module
from typing import Any

_CLASSES = {
    "LongVUImageProcessor": "image_processing_longvu",
    "LongVUVideoProcessor": "video_processing_longvu",
    "LongVUProcessor": "processing_longvu",
}

__all__ = [*_CLASSES, "register"]


def __getattr__(name: str) -> Any:
    if name in _CLASSES:
        return getattr(import_module(f"{__name__}.{_CLASSES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def register() -> None:
    """Make the Auto classes find the processors of LongVU; may be called any number of times."""
    from longvideo.processing.shared.registration import register_processors

    register_processors(
        import_module("longvideo.modeling.longvu.configuration_longvu").LongVUConfig,
        image=__getattr__("LongVUImageProcessor"),
        video=__getattr__("LongVUVideoProcessor"),
        processor=__getattr__("LongVUProcessor"),
    )
