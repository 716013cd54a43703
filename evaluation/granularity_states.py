"""The states of a CrossVLLM's modules that the rows of the granularity table are made of, and other overviews."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import PreTrainedModel, ProcessorMixin

from longvideo.evaluation.answer_questions import load_checkpoint

MODULES = ("coarse", "fine")
STATES = ("base", "tuned", "final")
# Folders of a training, one for each state.
STAGE_FOLDERS = {"base": "2g-all", "tuned": "4-fine", "final": "5-both"}

States = dict[str, dict[str, dict[str, torch.Tensor]]]


def checkpoint_of(run: str | Path, state: str) -> str:
    """Finds a state's checkpoint in the folder of a training.

    Args:
        run: Folder of `longvideo.tiny_training.train_crossvllm`.
        state: One of STATES.

    Returns:
        Path of the newest checkpoint of its stage.

    Raises:
        FileNotFoundError: The stage is not there or not complete.
    """
    from longvideo.trainers.sft_trainer import find_last_checkpoint

    folder = Path(run, STAGE_FOLDERS[state])
    found = find_last_checkpoint(str(folder))
    if found is None or not (folder / "done").exists():
        raise FileNotFoundError(
            f"{folder} holds no finished stage. Train it to its end: python -m "
            f"longvideo.tiny_training.train_crossvllm --out {run}"
        )
    return found


def load_states(folders: dict[str, str]) -> tuple[PreTrainedModel, ProcessorMixin, States]:
    """Loads a model and what its modules were in earlier stages.

    Args:
        folders: Checkpoint of each state; that of "base" may have no adapters yet.

    Returns:
        The model of the last state, its processor, and per state and module the weights of adapter and projector.

    Raises:
        ValueError: The checkpoints are none of a CrossVLLM with adapters, or differ in tower or decoder.
    """
    model, processor = load_checkpoint(folders["final"])
    if not getattr(model, "has_adapters", False):
        raise ValueError(f"{folders['final']} has no adapters of two granularities; give a trained CrossVLLM.")
    states: States = {"final": module_weights(model)}
    for name in (state for state in STATES if state != "final"):
        earlier, _ = load_checkpoint(folders[name])
        check_same_base(model, earlier, folders[name])
        states[name] = module_weights(earlier, like=states["final"])
    return model, processor, states


def module_weights(
    model: PreTrainedModel, like: dict[str, dict[str, torch.Tensor]] | None = None
) -> dict[str, dict[str, torch.Tensor]]:
    """Copies adapter and projector of both modules.

    Args:
        model: A CrossVLLM.
        like: Weights of the same model with adapters, for one without: its adapters change nothing.

    Returns:
        Weights by module and name.
    """
    found = {name: {key: x.detach().clone() for key, x in model.granularity_parameters(name)} for name in MODULES}
    for name, weights in (like or {}).items():
        for key, value in weights.items():
            if ".lora_" in key and key not in found[name]:
                found[name][key] = torch.zeros_like(value)
    return found


def check_same_base(model: PreTrainedModel, other: PreTrainedModel, where: str) -> None:
    """Check that two checkpoints share tower and decoder.

    Args:
        model: One.
        other: The other one.
        where: Its folder.

    Raises:
        ValueError: They do not.
    """

    def shared(one: PreTrainedModel) -> dict[str, torch.Tensor]:
        weights = one.state_dict()
        return {
            key.replace(".base_layer.", "."): x
            for key, x in weights.items()
            if ".lora_" not in key and "projectors." not in key
        }

    ours, theirs = shared(model), shared(other)
    differing = [key for key in ours if key not in theirs or not torch.equal(ours[key], theirs[key])]
    if differing or ours.keys() != theirs.keys():
        raise ValueError(
            f"{where} belongs to another training: {len(differing)} weights of tower or decoder differ, the first is "
            f"{differing[:1]}. Give stages of one run."
        )


@torch.no_grad()
def use_states(model: PreTrainedModel, states: States, coarse: str, fine: str) -> None:
    """Gives each module the weights of a state.

    Args:
        model: Changed in place.
        states: From `load_states`.
        coarse: State of the coarse module.
        fine: State of the fine module.
    """
    for name, state in (("coarse", coarse), ("fine", fine)):
        for key, parameter in model.granularity_parameters(name):
            parameter.copy_(states[state][name][key])


@contextmanager
def other_overview(model: PreTrainedModel, processor: ProcessorMixin, stride: int) -> Iterator[None]:
    """Lets the overview pool by another stride inside the block."""
    before = model.config.coarse_stride
    model.config.coarse_stride = processor.coarse_stride = stride
    try:
        model.config.tokens_per_side("coarse")
        yield
    finally:
        model.config.coarse_stride = processor.coarse_stride = before


def trade_offs(model: PreTrainedModel, num_tokens: int | None = None) -> list[tuple[int, int]]:
    """Lists strides of the overview with as many frames as make about the same number of tokens.

    Args:
        model: A CrossVLLM.
        num_tokens: Tokens of the overview; None for its own.

    Returns:
        (stride, frames), the largest stride first.

    Source: CrossVLLM Table 5: 4, 16 and 64 tokens of 1152, 288 and 72 frames.
    """
    config = model.config
    budget = num_tokens or config.tokens_per_frame("coarse") * config.coarse_num_frames
    strides = [n for n in range(config.grid_size, 0, -1) if config.grid_size % n == 0]
    pairs = [(stride, budget // (config.grid_size // stride) ** 2) for stride in strides]
    return [(stride, frames) for stride, frames in pairs if frames > 1]
