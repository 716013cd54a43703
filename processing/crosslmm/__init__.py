"""Processor classes of CrossLMM, imported at first use, and their registration with the Auto classes."""

from importlib import import_module
from typing import Any

_CLASSES = {
    "CrossLMMImageProcessor": "image_processing_crosslmm",
    "CrossLMMVideoProcessor": "video_processing_crosslmm",
    "CrossLMMProcessor": "processing_crosslmm",
}

__all__ = [*_CLASSES, "register"]


def __getattr__(name: str) -> Any:
    if name in _CLASSES:
        return getattr(import_module(f"{__name__}.{_CLASSES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def register() -> None:
    """Make the Auto classes find the processors of CrossLMM; may be called any number of times."""
    from longvideo.processing.shared.registration import register_processors

    register_processors(
        import_module("longvideo.modeling.crosslmm.configuration_crosslmm").CrossLMMConfig,
        image=__getattr__("CrossLMMImageProcessor"),
        video=__getattr__("CrossLMMVideoProcessor"),
        processor=__getattr__("CrossLMMProcessor"),
    )
