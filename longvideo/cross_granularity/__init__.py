"""Two granularities, any two models: an overview module finds segments, a detail module answers or sends them back."""

from importlib import import_module
from typing import Any

_EXPORTS = {
    "ControllerRules": "longvideo.cross_granularity.rules",
    "CrossGranularityController": "longvideo.cross_granularity.controller",
    "make_controller": "longvideo.cross_granularity.joining",
    "video_duration": "longvideo.processing.crossvllm.source_frames",
    "CrossGranularityAnswer": "longvideo.cross_granularity.trace",
    "ModuleCall": "longvideo.cross_granularity.trace",
    "VideoQuestion": "longvideo.cross_granularity.trace",
    "describe_rounds": "longvideo.cross_granularity.trace",
}

__all__ = [*_EXPORTS]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
