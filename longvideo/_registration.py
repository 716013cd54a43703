"""Registers our classes with transformers when transformers' own Auto modules are loaded, not before.

Registering at once would load torch and all of transformers' modeling code on `import longvideo`. So a finder waits
for the Auto modules; whoever touches `AutoModel` or `pipeline` gets the registration with it. Modules of ours register
their classes at their end; what happens here is only that they are imported, and never while one of them, or a module
of transformers that they need, is half imported.
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

AUTO = "transformers.models.auto."
ARCHITECTURES = ("videochat_flash", "longvu", "llava_st", "crosslmm", "crossvllm")


def _register_configurations() -> None:
    for arch in ARCHITECTURES:
        importlib.import_module(f"longvideo.modeling.{arch}.configuration_{arch}")


def _register_models() -> None:
    for arch in ARCHITECTURES:
        importlib.import_module(f"longvideo.modeling.{arch}.modeling_{arch}")


def _register_processors() -> None:
    for arch in ARCHITECTURES:
        importlib.import_module(f"longvideo.processing.{arch}").register()


def _register_pipelines() -> None:
    importlib.import_module("longvideo.pipelines").register()


ACTIONS: dict[str, Callable[[], None]] = {
    AUTO + "configuration_auto": _register_configurations,
    AUTO + "modeling_auto": _register_models,
    AUTO + "processing_auto": _register_processors,
    AUTO + "video_processing_auto": _register_processors,
    AUTO + "image_processing_auto": _register_processors,
    "transformers.pipelines": _register_pipelines,
}


class _Finder(importlib.abc.MetaPathFinder):
    """Finds modules of transformers and ours through the other finders and wraps their loaders.

    Actions wait in `pending` until none of them is half imported.
    """

    def __init__(self) -> None:
        self.searching: set[str] = set()
        self.depth = 0
        self.pending: list[Callable[[], None]] = []

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        # All of transformers: any of its modules may load an Auto module on its way, and ours may need just that.
        watched = name.startswith(("longvideo.", "transformers."))
        if not watched or name in self.searching:
            return None
        self.searching.add(name)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.searching.discard(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self)
        return spec

    def run_pending(self) -> None:
        while self.pending and self.depth == 0:
            self.pending.pop(0)()


class _Loader(importlib.abc.Loader):
    """Loads a module as usual and lets the actions that wait for it run afterwards."""

    def __init__(self, loader: importlib.abc.Loader, finder: _Finder):
        self.loader, self.finder = loader, finder

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)  # get_code and the like, for `python -m` and importlib.resources

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # The module shows its own loader, as without us.
        module.__loader__ = module.__spec__.loader = self.loader
        self.finder.depth += 1
        try:
            self.loader.exec_module(module)
            if module.__name__ in ACTIONS:
                self.finder.pending.append(ACTIONS[module.__name__])
        finally:
            self.finder.depth -= 1
        self.finder.run_pending()


def register() -> None:
    """Registers everything now where transformers' Auto modules are loaded, and later where they are not."""
    finder = next((finder for finder in sys.meta_path if isinstance(finder, _Finder)), None)
    if finder is None:
        finder = _Finder()
        sys.meta_path.insert(0, finder)
        finder.pending.extend(action for name, action in ACTIONS.items() if name in sys.modules)
    finder.run_pending()
