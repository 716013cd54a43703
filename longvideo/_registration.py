"""Registers our classes with transformers when transformers' own Auto modules are loaded, not before.

Registering at once would load torch and all of transformers' modeling code on `import longvideo`. So a finder waits for
the Auto modules; whoever touches `AutoModel` or `pipeline` gets the registration with it.
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType

AUTO = "transformers.models.auto."
ARCHITECTURES = ("videochat_flash",)


def _import_once(name: str) -> None:
    """Imports a module that registers itself; one that is being imported right now will do so at its end."""
    if name not in sys.modules:
        importlib.import_module(name)


def _register_configurations() -> None:
    for arch in ARCHITECTURES:
        _import_once(f"longvideo.modeling.{arch}.configuration_{arch}")


def _register_models() -> None:
    for arch in ARCHITECTURES:
        _import_once(f"longvideo.modeling.{arch}.modeling_{arch}")


def _register_processors() -> None:
    auto = sys.modules.get(AUTO + "processing_auto")
    if auto is not None and not hasattr(auto, "AutoProcessor"):
        return  # it is being imported right now, has pulled in one of the others, and registers at its own end
    for arch in ARCHITECTURES:
        _import_once(f"longvideo.processing.{arch}.processing_{arch}")


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


class _RegisteringLoader(importlib.abc.Loader):
    """Loads a module as usual and runs an action afterwards."""

    def __init__(self, loader: importlib.abc.Loader, action: Callable[[], None]):
        self.loader, self.action = loader, action

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # The module shows its own loader, as without us.
        module.__loader__ = module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        self.action()


class _RegisteringFinder(importlib.abc.MetaPathFinder):
    """Finds the modules of `ACTIONS` through the other finders and wraps their loaders."""

    def __init__(self) -> None:
        self.active: set[str] = set()

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in ACTIONS or name in self.active:
            return None
        self.active.add(name)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.active.discard(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisteringLoader(spec.loader, ACTIONS[name])
        return spec


def register() -> None:
    """Registers everything now where transformers' Auto modules are loaded, and later where they are not."""
    if not any(isinstance(finder, _RegisteringFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegisteringFinder())
    for name, action in ACTIONS.items():
        if name in sys.modules:
            action()
