"""Which parameters learn: parts of a model, and names within them."""

import re
from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel, TrainerCallback
from transformers.utils import is_peft_available

# Public module names of every model here: first name on the way to a parameter that is listed decides its part.
PART_MODULES: dict[str, tuple[str, ...]] = {
    "language_model": ("language_model", "lm_head", "coordinates"),
    "connector": (
        "multi_modal_projector",
        "projectors",
        "vision_projectors",
        "vision_query",
        "vision_sampler",
        "image_newline",
        "packer",
    ),
    "vision_tower": ("vision_tower", "dino_tower"),
}
# Modules inside a part that may learn without the rest of it. Of several on the way the first listed one decides.
SUB_PARTS: dict[str, tuple[str, ...]] = {
    "packer": ("packer",),
    "embeddings": ("embed_tokens", "coordinates"),
    "t2v": ("t2v", "t2v_gate"),
    "v2v": ("v2v", "v2v_gate", "query_norm"),
}


def sub_part_of(parameter_name: str) -> str | None:
    """Name the sub-part of the model that a parameter belongs to.

    Args:
        parameter_name: Dotted name as `named_parameters()` gives it, with or without wrappers' prefixes.

    Returns:
        "packer", "embeddings" (the input embedding of text and the coordinate tables beside it), "v2v" (inside the
        language model: cross-attention of visual rows, its gate, and the norm of all queries), "t2v" (the same of
        text rows, and its gate), or None.

    Source: LLaVA-ST training code, whose groups match "vision_resampler", "embed_tokens" and the names of six tables.
    """
    components = parameter_name.split(".")
    for name, modules in SUB_PARTS.items():
        if not set(modules).isdisjoint(components):
            return name
    return None


def part_of(parameter_name: str) -> str | None:
    """Name the part of the model that a parameter belongs to.

    Args:
        parameter_name: Dotted name as `named_parameters()` gives it, with or without wrappers' prefixes.

    Returns:
        "language_model", "connector", "vision_tower", or None for a parameter outside of them.

    Source: VideoChat-Flash training code, which matches "vision_tower" and "mm_projector" and calls the rest the LLM.
    """
    for component in parameter_name.split("."):
        for part, modules in PART_MODULES.items():
            if component in modules:
                return part
    return None


def check_patterns(*groups: Sequence[str] | None) -> None:
    """Check that patterns of names can be read.

    Args:
        *groups: Lists of regular expressions, or None.

    Raises:
        ValueError: A pattern is no regular expression, or a list is empty or no list.
    """
    for patterns in groups:
        if patterns is None:
            continue
        if isinstance(patterns, str) or not patterns:
            raise ValueError(f"Names of parameters must be a list of regular expressions, or None, got {patterns!r}.")
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"The pattern {pattern!r} is no regular expression: {error}.") from error


def set_trainable(
    model: nn.Module,
    *,
    parts: Sequence[str] | None = None,
    names: Sequence[str] | None = None,
    frozen: Sequence[str] | None = None,
) -> None:
    """Let parameters learn by part and by name, and freeze all others.

    Args:
        model: A model; see `set_trainable_parts` where there are parts. A PEFT model keeps its own choice inside of
            parts and names; only the rest is frozen.
        parts: Parts that learn; None for none, or, without `names` too, what learns already.
        names: Regular expressions; parameters whose dotted name one of them finds learn too.
        frozen: Regular expressions; parameters whose dotted name one of them finds do not learn.

    Raises:
        ValueError: A pattern that finds nothing, nothing that learns, or see `set_trainable_parts`.
    """
    known = [name for name, _ in model.named_parameters()]
    check_patterns(names, frozen)
    wanted = {name for pattern in names or () for name in _found(pattern, known, model)}
    unwanted = {name for pattern in frozen or () for name in _found(pattern, known, model)}
    learns = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if parts is not None:
        set_trainable_parts(model, list(parts))
    keeps_choice = is_peft_model(model)
    for name, parameter in model.named_parameters():
        if names is not None and name in wanted:
            parameter.requires_grad_(name in learns if keeps_choice else parameter.is_floating_point())
        elif names is not None and parts is None:
            parameter.requires_grad_(False)
        if name in unwanted:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            f"Nothing learns with trainable_parts={parts}, trainable_names={names}, frozen_names={frozen}. Take "
            "something out of frozen_names, or name more."
        )


def _found(pattern: str, names: Sequence[str], model: nn.Module) -> list[str]:
    found = [name for name in names if re.search(pattern, name)]
    if not found:
        modules = sorted({".".join(name.split(".")[:2]) for name in names})
        raise ValueError(
            f"The pattern {pattern!r} finds none of the {len(names)} parameters of {type(model).__name__}. Their "
            f"names look like {names[0]!r} and begin with {modules}."
        )
    return found


def set_trainable_parts(model: nn.Module, parts: list[str]) -> None:
    """Freeze every parameter outside of `parts`, and let the others learn.

    Args:
        model: A model whose parameters lie in modules named in `PART_MODULES`. A PEFT model keeps its own choice
            inside `parts`; only the rest is frozen.
        parts: Names out of `PART_MODULES`, or out of `SUB_PARTS` for less than a part.

    Raises:
        ValueError: A part without parameters in this model, or a parameter that belongs to no part.

    Source: VideoChat-Flash training code, option `mm_tunable_parts`.
    """
    named = {name: {part_of(name), sub_part_of(name)} - {None} for name, _ in model.named_parameters()}
    homeless = [name for name, found in named.items() if found.isdisjoint(PART_MODULES)]
    if homeless:
        raise ValueError(
            f"trainable_parts={parts} cannot say whether {homeless[0]!r} learns: it lies in none of {PART_MODULES}. "
            "Set requires_grad yourself and leave trainable_parts=None."
        )
    present = set().union(*named.values())
    absent = sorted(set(parts) - present)
    if absent:
        raise ValueError(f"{type(model).__name__} has no parameters in {absent}; its parts are {sorted(present)}.")
    keeps_choice = is_peft_model(model)
    for name, parameter in model.named_parameters():
        if named[name].isdisjoint(parts):
            parameter.requires_grad_(False)
        elif not keeps_choice and parameter.is_floating_point():
            parameter.requires_grad_(True)


def is_peft_model(model: nn.Module) -> bool:
    """Say whether a model is one of PEFT around another.

    Args:
        model: A model.

    Returns:
        False too where peft is not installed.
    """
    if not is_peft_available():
        return False
    from peft import PeftModel

    return isinstance(model, PeftModel)


def release_frozen_inputs(model: nn.Module) -> None:
    """Let no gradient begin inside models that do not learn, such as a frozen tower.

    Gradient checkpointing makes the output of every input embedding require a gradient, the tower's too. A tower that
    does not learn would then be kept in memory, run again and differentiated, for nothing.

    Args:
        model: A model whose gradient checkpointing is on, or any other; wrapped or not.
    """
    modules = list(model.modules())
    handles = {handle.id: handle for module in modules for handle in vars(module).get("_require_grads_hooks") or []}
    for module in modules:
        if isinstance(module, PreTrainedModel) and not any(p.requires_grad for p in module.parameters()):
            for inner in module.modules():
                for key in [key for key in inner._forward_hooks if key in handles]:
                    handles[key].remove()


class ReleaseFrozenInputs(TrainerCallback):
    """Calls `release_frozen_inputs` when training begins: the trainer turns on checkpointing right before."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """See the class."""
        if kwargs.get("model") is not None:
            release_frozen_inputs(kwargs["model"])
