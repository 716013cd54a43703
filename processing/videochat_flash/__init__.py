"""Processor classes of VideoChat-Flash, imported at first use, and their registration with the Auto classes."""

from importlib import import_module
from typing import Any

_CLASSES = {
    "VideoChatFlashImageProcessor": "image_processing_videochat_flash",
    "VideoChatFlashVideoProcessor": "video_processing_videochat_flash",
    "VideoChatFlashProcessor": "processing_videochat_flash",
}

__all__ = [*_CLASSES, "register"]


def __getattr__(name: str) -> Any:
    if name in _CLASSES:
        return getattr(import_module(f"{__name__}.{_CLASSES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def register() -> None:
    """Make the Auto classes find the processors of VideoChat-Flash; may be called any number of times."""
    from longvideo.processing.shared.registration import register_processors

    register_processors(
        import_module("longvideo.modeling.videochat_flash.configuration_videochat_flash").VideoChatFlashConfig,
        image=__getattr__("VideoChatFlashImageProcessor"),
        video=__getattr__("VideoChatFlashVideoProcessor"),
        processor=__getattr__("VideoChatFlashProcessor"),
    )
