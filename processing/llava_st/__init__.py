"""Processor classes of LLaVA-ST, imported at first use, and their registration with the Auto classes."""

from importlib import import_module
from typing import Any

_CLASSES = {
    "LlavaSTImageProcessor": "image_processing_llava_st",
    "LlavaSTVideoProcessor": "video_processing_llava_st",
    "LlavaSTProcessor": "processing_llava_st",
}

__all__ = [*_CLASSES, "register"]


def __getattr__(name: str) -> Any:
    if name in _CLASSES:
        return getattr(import_module(f"{__name__}.{_CLASSES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def register() -> None:
    """Make the Auto classes find the processors of LLaVA-ST; may be called any number of times."""
    from longvideo.processing.shared.registration import register_processors

    register_processors(
        import_module("longvideo.modeling.llava_st.configuration_llava_st").LlavaSTConfig,
        image=__getattr__("LlavaSTImageProcessor"),
        video=__getattr__("LlavaSTVideoProcessor"),
        processor=__getattr__("LlavaSTProcessor"),
    )
