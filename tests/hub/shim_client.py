"""Loads a checkpoint with the thin file in a process that does not import the package: `shim_client.py FOLDER AGAIN`.

Prints one JSON object: the errors without trust and without the package, the classes that were loaded, and the files
that saving model and processor again into AGAIN left there.
"""

import importlib.abc
import json
import os
import sys


class HidePackage(importlib.abc.MetaPathFinder):
    """Makes `longvideo` look as if it were not installed."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        """Raises what an import of a missing package raises."""
        if name.split(".")[0] == "longvideo":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def main(folder: str, again: str) -> dict[str, object]:
    """Tries to load without trust, without the package, and with both."""
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, AutoVideoProcessor

    results: dict[str, object] = {}
    hidden = HidePackage()
    for name, finders, trust in (("no_trust", [], False), ("no_package", [hidden], True)):
        sys.meta_path[:0] = finders
        try:
            AutoConfig.from_pretrained(folder, trust_remote_code=trust)
        except (ValueError, ImportError) as error:
            results[name] = f"{type(error).__name__}: {error}"
    sys.meta_path.remove(hidden)
    loaded = {
        auto_class.__name__: auto_class.from_pretrained(folder, trust_remote_code=True)
        for auto_class in (AutoConfig, AutoModelForImageTextToText, AutoProcessor, AutoVideoProcessor)
    }
    loaded["AutoModelForImageTextToText"].save_pretrained(again)
    loaded["AutoProcessor"].save_pretrained(again)
    results["classes"] = {name: f"{type(value).__module__}.{type(value).__name__}" for name, value in loaded.items()}
    results["saved"] = sorted(os.listdir(again))
    return results


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
