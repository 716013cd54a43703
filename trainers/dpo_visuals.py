"""Visuals of a pair of answers: encoded once for both, and by a frozen tower once for policy and reference."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import ModelOutput
from transformers.utils import is_peft_available

from longvideo.trainers.freezing import PART_MODULES, is_peft_model

# Method that encodes, and what it encodes, by kind of visual: pixels, or what a tower made of them.
_ENCODERS = {
    "video": ("get_video_features", ("pixel_values_videos", "vision_features")),
    "image": ("get_image_features", ("pixel_values",)),
}
# How models name labels that travel with a sequence whose length changes inside.
_CARRIED_LABELS = ("visual_dropout_labels", "carried_labels")
# Settings that change nothing of what towers are shown; a trainer sets some of them.
_NOT_SEEN = {"_name_or_path", "transformers_version", "dtype", "architectures", "text_config", "use_cache"} | {
    f"{name}_token_id" for name in ("pad", "bos", "eos")
}
# What only says how the towers came to the features; it grows with the video.
_NOT_REPEATED = ("last_hidden_state", "hidden_states", "attentions")


def bare_model(model: nn.Module) -> nn.Module:
    """Find the model of this library inside of a PEFT model; any other one is returned as it is."""
    return model.get_base_model() if is_peft_model(model) else model


def repeat_outputs(outputs: ModelOutput, times: int = 2) -> ModelOutput:
    """Repeat encoded visuals, all of them after one another, as the rows of a batch of pairs want them.

    Args:
        outputs: What `get_video_features` or `get_image_features` gave.
        times: How often.

    Returns:
        Output with the same tensors, without what the towers gave on the way.
    """
    repeated = {}
    for name, value in outputs.items():
        if name in _NOT_REPEATED:
            continue
        if isinstance(value, torch.Tensor):
            repeated[name] = torch.cat([value] * times)
        else:
            # Lists have an entry per visual; a name says something of all of them.
            repeated[name] = value if isinstance(value, str) else value * times
    return type(outputs)(**repeated)


@contextmanager
def encode_pairs(model: nn.Module, batch: Mapping[str, Any]) -> Iterator[None]:
    """Let a model encode the visuals of P prompts and run them with 2 P answers, in one call of its forward.

    What is encoded is encoded inside of the forward, so that wrappers of the model (DDP, FSDP) see nothing new. Labels
    travel along, without a loss, and a model whose visual tokens depend on the text is told where prompts end.

    Args:
        model: Model of this library, not wrapped.
        batch: Batch of `VideoDPOCollator`.
    """
    inner = getattr(model, model.base_model_prefix)
    known = inspect.signature(inner.forward).parameters
    told = {name: batch["labels"] for name in _CARRIED_LABELS if name in known}
    told |= {name: batch[name] for name in ("prompt_mask", "answer_room") if name in known}

    def prepare(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        kwargs = {**kwargs, **told}
        features = {kind: x for kind, x in (kwargs.get("mm_encoder_outputs") or {}).items() if x is not None}
        for kind, (method, sources) in _ENCODERS.items():
            if all(kwargs.get(name) is None for name in sources):
                continue
            encode = getattr(module, method)
            names = inspect.signature(encode).parameters
            given = {name: kwargs[name] for name in names if kwargs.get(name) is not None}
            features[kind] = encode(**given, return_dict=True)
            # What the model made itself for the call stays, as rows of its head.
            kwargs = {n: x for n, x in kwargs.items() if n not in sources and not (n in given and n in batch)}
        if features:
            kwargs["mm_encoder_outputs"] = {kind: repeat_outputs(x) for kind, x in features.items()}
        return args, kwargs

    handle = inner.register_forward_pre_hook(prepare, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


class TowerMemory:
    """What frozen towers gave in a first pass over a batch, for later passes over the same batch.

    Passes call each tower with the same inputs in the same order. Nothing is kept beyond the batch.
    """

    def __init__(self) -> None:
        self._outputs: dict[str, list[tuple[torch.Size, Any]]] = {}

    @contextmanager
    def attached(self, model: nn.Module) -> Iterator[None]:
        """Record what the towers of a model give, or give it again.

        Args:
            model: Model, or a wrapper of it, whose towers have the same weights as those of the first pass.
        """
        replaced = []
        try:
            for name, tower in towers_of(model).items():
                before = tower.__dict__.get("forward")
                tower.forward = self._remembering(name, tower.forward)
                replaced.append((tower, before))
            yield
        finally:
            for tower, before in replaced:
                if before is None:
                    del tower.forward
                else:
                    tower.forward = before

    def _remembering(self, name: str, forward: Any) -> Any:
        stored, calls = self._outputs.setdefault(name, []), iter(range(1_000_000_000))

        def run(*args: Any, **kwargs: Any) -> Any:
            number = next(calls)
            pixels = args[0] if args else next(iter(kwargs.values()))
            if number < len(stored) and stored[number][0] == pixels.shape:
                return _copy_output(stored[number][1])
            outputs = forward(*args, **kwargs)
            if number == len(stored):
                stored.append((pixels.shape, _copy_output(outputs)))
            return outputs

        return run


def _copy_output(outputs: Any) -> Any:
    # Callers may exchange what an output holds.
    return type(outputs)(**outputs) if isinstance(outputs, ModelOutput) else outputs


def towers_of(model: nn.Module) -> dict[str, nn.Module]:
    """Find the vision towers of a model, wrapped or not, by their names."""
    last = ((name.rsplit(".", 1)[-1], module) for name, module in model.named_modules())
    return {name: module for name, module in last if name in PART_MODULES["vision_tower"]}


def has_frozen_towers(model: nn.Module) -> bool:
    """Say whether no tower of a model learns or has an adapter, so that policy and reference share what it gives."""
    towers = towers_of(model).values()
    if any(parameter.requires_grad for tower in towers for parameter in tower.parameters()):
        return False
    if not is_peft_available():
        return True
    from peft.tuners.tuners_utils import BaseTunerLayer

    return not any(isinstance(module, BaseTunerLayer) for tower in towers for module in tower.modules())


def have_same_towers(one: nn.Module, other: nn.Module) -> bool:
    """Say whether two models see videos alike: the same configuration, and towers with the same weights.

    Args:
        one: A model of this library.
        other: Another one.

    Returns:
        Whether what the towers of one give may stand for what those of the other would give.
    """
    configs = [model.config.to_dict() for model in (one, other)]
    compared = configs[0].keys() & configs[1].keys() - _NOT_SEEN
    towers = [towers_of(model) for model in (one, other)]
    if towers[0].keys() != towers[1].keys() or any(configs[0][name] != configs[1][name] for name in compared):
        return False
    for name, tower in towers[0].items():
        states = tower.state_dict(), towers[1][name].state_dict()
        if states[0].keys() != states[1].keys():
            return False
        for key, value in states[0].items():
            twin = states[1][key]
            if value.dtype != twin.dtype or not torch.equal(value, twin.to(value.device)):
                return False
    return True
