"""What a run of cross-granularity training continues from: both modules and the reference, exactly."""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

STATE_FILE = "granularities.safetensors"


def save_state(model: nn.Module, folder: str | os.PathLike, granularities: Sequence[str]) -> None:
    """Write projectors and adapters of granularities, references among them, to `granularities.safetensors`.

    Args:
        model: The model, without wrappers.
        folder: Made when absent.
        granularities: Their names.
    """
    path = Path(folder, STATE_FILE)
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = {name: parameter.detach().cpu().contiguous() for name, parameter in _weights(model, granularities)}
    save_file(weights, f"{path}.part")
    os.replace(f"{path}.part", path)


@torch.no_grad()
def load_state(model: nn.Module, folder: str | os.PathLike, granularities: Sequence[str]) -> None:
    """Read what `save_state` wrote.

    Args:
        model: The model, without wrappers.
        folder: Checkpoint folder.
        granularities: Their names.

    Raises:
        FileNotFoundError: The folder has no such file.
        ValueError: It belongs to another model.
    """
    path = Path(folder, STATE_FILE)
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} has no {STATE_FILE}, so it is no checkpoint of cross-granularity training. To begin with the "
            "weights of another stage, load them with from_pretrained and pass the model."
        )
    stored, own = load_file(path), dict(_weights(model, granularities))
    shapes = [{name: tuple(x.shape) for name, x in weights.items()} for weights in (stored, own)]
    if shapes[0] != shapes[1]:
        differing = sorted(name for name in {*stored, *own} if shapes[0].get(name) != shapes[1].get(name))
        raise ValueError(
            f"{path} does not fit the model: {len(differing)} weights are missing, too many or of another shape, "
            f"first {differing[0]}. Build the model as it was when the run began."
        )
    for name, parameter in own.items():
        parameter.copy_(stored[name])


def check_even_step(folder: str | os.PathLike) -> None:
    """Check that a checkpoint lies behind a pair of steps.

    Args:
        folder: Checkpoint folder.

    Raises:
        ValueError: It lies between a coarse step and its fine step.
    """
    path = Path(folder, "trainer_state.json")
    step = json.loads(path.read_text(encoding="utf-8"))["global_step"] if path.is_file() else 0
    if step % 2:
        raise ValueError(
            f"{folder} lies behind step {step}, between a coarse step and the fine step on the same rows. Continue "
            "from a checkpoint at an even step."
        )


def _weights(model: nn.Module, granularities: Sequence[str]) -> Iterator[tuple[str, nn.Parameter]]:
    for name in granularities:
        yield from model.granularity_parameters(name)
