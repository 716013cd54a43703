"""Checkpoints of a run: the newest complete one, and its weights back in the model that trains."""

import json
import os
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from longvideo.trainers.adapters import STORED_PREFIX, WEIGHTS_FILE


def find_last_checkpoint(output_dir: str) -> str | None:
    """Find the newest checkpoint that was written to its end.

    Args:
        output_dir: Folder with `checkpoint-<step>` folders.

    Returns:
        Its path, or None. A folder whose writing was interrupted (no readable trainer_state.json, which the Trainer
        writes last) is passed over.
    """
    if not os.path.isdir(output_dir):
        return None
    steps = [int(match[1]) for name in os.listdir(output_dir) if (match := re.fullmatch(r"checkpoint-(\d+)", name))]
    for step in sorted(steps, reverse=True):
        folder = os.path.join(output_dir, f"checkpoint-{step}")
        try:
            with open(os.path.join(folder, "trainer_state.json"), encoding="utf-8") as file:
                json.load(file)
        except (OSError, ValueError):
            continue
        return folder
    return None


def has_own_names(model: PreTrainedModel, folder: str | os.PathLike) -> bool:
    """Say whether the files of a checkpoint call all weights of a model as the model does.

    Args:
        model: The model, without wrappers.
        folder: The checkpoint.

    Returns:
        Whether `load_state_dict` finds all of them. True where there are no safetensors to look into.
    """
    from safetensors import safe_open

    index, file = Path(folder, "model.safetensors.index.json"), Path(folder, "model.safetensors")
    if file.is_file():
        with safe_open(file, framework="pt") as opened:
            stored = set(opened.keys())
    elif index.is_file():
        stored = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    else:
        return True
    own = model.state_dict()
    return stored <= own.keys() and not _without_twins(own, own.keys() - stored)


@torch.no_grad()
def restore_weights(model: PreTrainedModel, folder: str | os.PathLike) -> None:
    """Copy the weights of a checkpoint into a model, whose parameters stay the objects that an optimizer knows.

    The checkpoint is read by the `from_pretrained` of the model's class: files may call weights other than the model
    does, as transformers keeps the published names of DINOv2, or lie in several folders, as adapters of CrossVLLM do.

    Args:
        model: The model, without wrappers.
        folder: What its `save_pretrained` wrote.

    Raises:
        OSError: A file is missing.
        ValueError: Weights that are missing, too many or of another shape; the model is left as it was.
    """
    # The widest type of the model holds the values of all others exactly.
    widest = max((p.dtype for p in model.parameters() if p.is_floating_point()), key=lambda x: torch.finfo(x).bits)
    loaded, report = type(model).from_pretrained(
        os.fspath(folder), dtype=widest, local_files_only=True, output_loading_info=True
    )
    stored, own = loaded.state_dict(), model.state_dict()
    check_names(
        model,
        folder,
        missing={*report["missing_keys"], *(own.keys() - stored.keys())},
        unexpected={*report["unexpected_keys"], *(stored.keys() - own.keys())},
        reshaped={name for name in own.keys() & stored.keys() if own[name].shape != stored[name].shape},
    )
    for name, tensor in own.items():
        tensor.copy_(stored[name])


def check_names(
    model: nn.Module,
    folder: str | os.PathLike,
    *,
    missing: Iterable[str] = (),
    unexpected: Iterable[str] = (),
    reshaped: Iterable[str] = (),
) -> None:
    """Raise an error when weights of a checkpoint are not those of a model.

    Args:
        model: The model, without wrappers.
        folder: The checkpoint, for the text.
        missing: Names of the model that the checkpoint lacks; of tensors with several names one is enough.
        unexpected: Names of the checkpoint that the model lacks.
        reshaped: Names of both with another shape.

    Raises:
        ValueError: There are any.
    """
    lacking = set(missing)
    wrong = {
        "missing": _without_twins(model.state_dict(), lacking) if lacking else lacking,
        "too many": set(unexpected),
        "of another shape": set(reshaped),
    }
    told = [f"{len(names)} are {what} (first {min(names)!r})" for what, names in wrong.items() if names]
    if told:
        raise ValueError(
            f"The weights in {folder} are not those of this {type(model).__name__}: {', '.join(told)}. Build the "
            "model as it was when the run began (the same sizes, adapters and prepare_model), or begin a new run."
        )


def check_adapter_weights(model: Any, folder: str | os.PathLike) -> None:
    """Raise an error when a checkpoint does not hold the adapters of a model whole; peft only warns of that.

    Args:
        model: A PEFT model.
        folder: The checkpoint, with an adapter called "default" in it and others in folders of their names.

    Raises:
        ValueError: Weights that are missing, too many or of another shape.
    """
    from peft import get_peft_model_state_dict
    from safetensors import safe_open

    base = {name.replace(".base_layer.", ".") for name in model.get_base_model().state_dict()}
    for name in model.peft_config:
        path = Path(folder, WEIGHTS_FILE) if name == "default" else Path(folder, name, WEIGHTS_FILE)
        if not path.is_file():
            continue
        own = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
        with safe_open(path, framework="pt") as file:
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        check_names(
            model,
            path.parent,
            missing=own.keys() - shapes.keys(),
            # Embeddings that were resized are saved with an adapter by peft itself.
            unexpected={key for key in shapes.keys() - own.keys() if key.removeprefix(STORED_PREFIX) not in base},
            reshaped=_reshaped(own, shapes),
        )


def _without_twins(state: Mapping[str, torch.Tensor], lacking: Collection[str]) -> set[str]:
    """Returns the names whose tensor has no other name that is there."""
    filled = {tensor.data_ptr() for name, tensor in state.items() if name not in lacking}
    return {name for name in lacking if name not in state or state[name].data_ptr() not in filled}


def _reshaped(own: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[int, ...]]) -> set[str]:
    return {name for name in own.keys() & shapes.keys() if tuple(own[name].shape) != shapes[name]}
