"""`longvideo export-shim DIR`: makes a checkpoint loadable with `trust_remote_code=True` in place of the import.

Nothing else in the package writes such files. The thin file only imports the classes of the installed package, so no
code is copied.
"""

import argparse
import json
import os
from collections.abc import Iterator
from pathlib import Path

HELP = "write the thin file that lets a checkpoint load with trust_remote_code=True"
SHIM_NAME = "longvideo_shim"

SHIM_HEADER = '''"""Imports the classes of the installed package `longvideo` (pip install longvideo)."""

'''
# The loader marks the classes it finds through this file; a marked class copies its source file beside every later
# checkpoint.
SHIM_FOOTER = """

for _class in ({classes}):
    _class.register_for_auto_class = classmethod(lambda cls, auto_class=None: None)
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument(
        "folder", metavar="DIR", help="folder of a saved or converted checkpoint; its json files are changed"
    )


def run(args: argparse.Namespace) -> int:
    """Writes the thin file and the `auto_map` entries.

    Raises:
        FileNotFoundError: the folder has no `config.json`.
        ValueError: its model type is none of the package's.
    """
    folder = Path(args.folder)
    for path in export_shim(folder):
        print(path)
    return 0


def export_shim(folder: Path) -> list[Path]:
    """Writes the thin file and the `auto_map` entries of a checkpoint folder.

    Args:
        folder: Folder with `config.json` and, where there is a processor, `processor_config.json`.

    Returns:
        The files written.

    Raises:
        FileNotFoundError: the folder has no `config.json`.
        ValueError: its model type is none of the package's.
    """
    config_path, processor_path = folder / "config.json", folder / "processor_config.json"
    if not config_path.is_file():
        raise FileNotFoundError(
            f"{folder} has no config.json; expected the folder of a saved or converted checkpoint."
        )
    config = json.loads(config_path.read_text(encoding="utf-8"))
    classes = dict(registered_classes(config.get("model_type")))
    references = {auto_name: f"{SHIM_NAME}.{cls.__name__}" for auto_name, cls in classes.items()}
    contents = {folder / f"{SHIM_NAME}.py": render_shim(list(classes.values()))}
    config["auto_map"] = references
    contents[config_path] = json.dumps(config, indent=2) + "\n"
    if processor_path.is_file():
        processor = json.loads(processor_path.read_text(encoding="utf-8"))
        for part, auto_name in processor_parts(processor):
            if auto_name in references:
                part["auto_map"] = {auto_name: references[auto_name]}
        contents[processor_path] = json.dumps(processor, indent=2) + "\n"
    for path, text in contents.items():
        partial = path.with_name(f"{path.name}.partial")
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    return list(contents)


def processor_parts(processor: dict) -> Iterator[tuple[dict, str]]:
    """Yields the parts of a processor's settings that name a class, with the auto class each is loaded by."""
    yield processor, "AutoProcessor"
    for key, auto_name in (("video_processor", "AutoVideoProcessor"), ("image_processor", "AutoImageProcessor")):
        if key in processor:
            yield processor[key], auto_name


def registered_classes(model_type: str | None) -> Iterator[tuple[str, type]]:
    """Yields the package's classes for a model type by the auto class that finds each.

    Raises:
        ValueError: the package registers no such model type.
    """
    from transformers import (
        CONFIG_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        MODEL_FOR_MULTIMODAL_LM_MAPPING,
        MODEL_MAPPING,
        PROCESSOR_MAPPING,
        VIDEO_PROCESSOR_MAPPING,
    )
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING

    import longvideo  # noqa: F401 (registers the architectures)

    # The mapping's get looks into an empty dict: only [] knows registered and lazily imported classes.
    config_class = CONFIG_MAPPING[model_type] if model_type in CONFIG_MAPPING else None  # noqa: SIM401
    if config_class is None or not config_class.__module__.startswith("longvideo."):
        raise ValueError(
            f"the model type {model_type!r} is not one of this package; a thin file would have nothing to import."
        )
    yield "AutoConfig", config_class
    mappings = {
        "AutoModel": MODEL_MAPPING,
        "AutoModelForImageTextToText": MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        "AutoModelForMultimodalLM": MODEL_FOR_MULTIMODAL_LM_MAPPING,
        "AutoProcessor": PROCESSOR_MAPPING,
        "AutoVideoProcessor": VIDEO_PROCESSOR_MAPPING,
        "AutoImageProcessor": IMAGE_PROCESSOR_MAPPING,
    }
    for auto_name, mapping in mappings.items():
        found = mapping.get(config_class, None)
        candidates = found.values() if isinstance(found, dict) else found if isinstance(found, tuple) else (found,)
        for cls in candidates:
            if cls is not None and cls.__module__.startswith("longvideo."):
                yield auto_name, cls
                break


def render_shim(classes: list[type]) -> str:
    """Returns the source of the thin file: one absolute import per class."""
    unique = sorted({(cls.__module__, cls.__name__) for cls in classes})
    imports = "".join(f"from {module} import {name}\n" for module, name in unique)
    return SHIM_HEADER + imports + SHIM_FOOTER.format(classes=", ".join(name for _, name in unique))
