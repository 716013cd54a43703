"""Load a checkpoint as a pipeline, with messages that a user can act on."""

import json
import os
from pathlib import Path
from typing import Any

import torch


def registered_model_types() -> list[str]:
    """Return the `model_type` names of the architectures in this package."""
    from longvideo._registration import ARCHITECTURES

    return sorted(ARCHITECTURES)


def check_checkpoint(folder: str | os.PathLike) -> None:
    """Check a local checkpoint folder before anything is loaded.

    Args:
        folder: with config.json, safetensors file(s) and the processor's files.

    Raises:
        FileNotFoundError: config, processor, weights or a shard is missing.
        ValueError: the configuration is of another architecture, or a weight file is not safetensors.
    """
    folder = Path(folder)
    config = _read_json(folder / "config.json", f"'{folder}' is no checkpoint: it has no config.json.")
    model_type = config.get("model_type")
    known = registered_model_types()
    if model_type not in known:
        raise ValueError(
            f"'{folder}' holds a model of type {model_type!r}, but this package has {', '.join(known)}. "
            "An original checkpoint must be converted first: longvideo convert SRC DST."
        )
    if not any((folder / name).is_file() for name in ("processor_config.json", "preprocessor_config.json")):
        raise FileNotFoundError(
            f"'{folder}' has no processor_config.json, so no video can be prepared. "
            "Save the processor into the same folder, or convert the checkpoint again."
        )
    for name in _weight_files(folder):
        _check_safetensors(folder / name)


def _read_json(path: Path, missing: str) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{missing} Give a folder written by save_pretrained or by longvideo convert.")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"'{path}' is not valid JSON ({error}); copy or download the file again.") from error
    if not isinstance(value, dict):
        raise ValueError(f"'{path}' must hold a JSON object, got a {type(value).__name__}.")
    return value


def _weight_files(folder: Path) -> list[str]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(_read_json(index, "").get("weight_map", {}).values()))
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise FileNotFoundError(
                f"'{folder}' lacks {len(missing)} of {len(names)} weight files named in its index: "
                f"{', '.join(missing[:5])}. Copy or download them again."
            )
        return names
    if (folder / "model.safetensors").is_file():
        return ["model.safetensors"]
    raise FileNotFoundError(
        f"'{folder}' has no weights: neither model.safetensors nor model.safetensors.index.json was found."
    )


def _check_safetensors(path: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            file.keys()
    except SafetensorError as error:
        raise ValueError(
            f"'{path}' is not a readable safetensors file ({error}). "
            "It may be cut off, a Git LFS pointer or another format; copy or download it again."
        ) from error


def parse_dtype(name: str | torch.dtype) -> str | torch.dtype:
    """Turn a name such as `bf16` or `float32` into a torch type; `auto` stays.

    Raises:
        ValueError: unknown name.
    """
    names = {
        "bf16": torch.bfloat16, "bfloat16": torch.bfloat16, "fp16": torch.float16, "float16": torch.float16,
        "fp32": torch.float32, "float32": torch.float32,
    }  # fmt: skip
    if not isinstance(name, str) or name == "auto":
        return name
    if name not in names:
        raise ValueError(f"Unknown arithmetic type {name!r}; expected auto, {', '.join(names)}.")
    return names[name]


def pick_device(name: str | None) -> torch.device:
    """Return the device of that name, or the first accelerator, or the CPU.

    Raises:
        ValueError: no such device on this machine.
    """
    if name is None or name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"The device {name!r} cannot be used here ({str(error).splitlines()[0]}).") from error
    return device


def load_pipeline(
    model: str | os.PathLike, *, device: str | None = None, dtype: str | torch.dtype = "auto", **kwargs: Any
) -> Any:
    """Load model and processor and return the video question answering pipeline.

    Args:
        model: folder, or id of a repository on the Hub.
        device: `cpu`, `cuda:0` ...; None takes the first accelerator or the CPU.
        dtype: arithmetic type of the weights; `auto` takes the checkpoint's.
        **kwargs: `revision`, `cache_dir` and the like for `from_pretrained`.

    Returns:
        A `VideoQuestionAnsweringPipeline`.

    Raises:
        OSError: no such folder or repository, or files of it are missing.
        ValueError: another architecture, damaged weights, or weights that do not fit the configuration.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    from longvideo.pipelines.video_question_answering import VideoQuestionAnsweringPipeline

    source = str(model)
    if Path(source).is_dir():
        check_checkpoint(source)
    elif Path(source).exists():
        raise NotADirectoryError(f"'{source}' is a file; a model is a folder with config.json and weights.")
    elif source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise FileNotFoundError(f"No such model folder: '{source}'.")
    known = registered_model_types()
    place, arithmetic = pick_device(device), parse_dtype(dtype)
    config = _from_hub(AutoConfig, source, kwargs)
    if config.model_type not in known:
        raise ValueError(f"'{source}' is a {config.model_type!r} model, but this package has {', '.join(known)}.")
    processor = _from_hub(AutoProcessor, source, kwargs)
    loaded, report = _load_weights(AutoModelForImageTextToText, source, arithmetic, kwargs)
    _check_report(source, report)
    return VideoQuestionAnsweringPipeline(model=loaded.eval(), processor=processor, device=place)


def _from_hub(auto_class: Any, source: str, kwargs: dict[str, Any]) -> Any:
    try:
        return auto_class.from_pretrained(source, **kwargs)
    except OSError as error:
        raise OSError(
            f"The model '{source}' cannot be found or read: it is neither a folder here nor a reachable repository "
            f"on the Hub. ({_first_line(error)})"
        ) from error


def _load_weights(auto_class: Any, source: str, dtype: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    from transformers.utils import logging

    # The library prints a table about weights that do not fit; the same is raised below in one sentence.
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        return auto_class.from_pretrained(
            source, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
    finally:
        logging.set_verbosity(verbosity)


def _check_report(source: str, report: dict[str, Any]) -> None:
    missing = sorted(report.get("missing_keys") or ())
    shapes = [
        f"{name} is {tuple(found)} instead of {tuple(wanted)}"
        for name, found, wanted in sorted(report.get("mismatched_keys") or ())
    ]
    for names, what in ((missing, "missing"), (shapes, "of another shape")):
        if names:
            raise ValueError(
                f"The weights of '{source}' do not fit its config.json: {len(names)} {what}, for example "
                f"{', '.join(names[:3])}. The model would answer from random numbers; convert or download the "
                "checkpoint again."
            )


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
