"""Two granularities, any two models: an overview module finds segments, a detail module answers or sends them back."""

from importlib import import_module
from typing import Any

_EXPORTS = {
    "ControllerRules": "controller",
    "CrossGranularityController": "controller",
    "make_controller": "modules",
    "video_duration": "sources",
    "CrossGranularityAnswer": "trace",
    "ModuleCall": "trace",
    "VideoQuestion": "trace",
    "describe_rounds": "trace",
}

__all__ = [*_EXPORTS]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
