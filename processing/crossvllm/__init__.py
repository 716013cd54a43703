"""Processor classes of CrossVLLM, imported at first use, and their registration with the Auto classes."""

from importlib import import_module
from typing import Any

_CLASSES = {
    "CrossVLLMVideoProcessor": "video_processing_crossvllm",
    "CrossVLLMProcessor": "processing_crossvllm",
}

__all__ = [*_CLASSES, "register"]


def __getattr__(name: str) -> Any:
    if name in _CLASSES:
        return getattr(import_module(f"{__name__}.{_CLASSES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def register() -> None:
    """Make the Auto classes find the processors of CrossVLLM; may be called any number of times."""
    from transformers import CLIPImageProcessor

    from longvideo.processing.shared.registration import register_processors

    register_processors(
        import_module("longvideo.modeling.crossvllm.configuration_crossvllm").CrossVLLMConfig,
        image=CLIPImageProcessor,
        video=__getattr__("CrossVLLMVideoProcessor"),
        processor=__getattr__("CrossVLLMProcessor"),
    )
