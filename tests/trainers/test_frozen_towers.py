"""What does not learn is run once and never differentiated, with gradient checkpointing too."""

from typing import Any

import pytest
import torch
from torch import nn

from longvideo.trainers.freezing import PART_MODULES, release_frozen_inputs
from tests.trainers.sft_runs import short_run
from tests.trainers.zoo import KINDS, VARIANTS, make_model, rows_of


def towers_of(model: nn.Module) -> list[nn.Module]:
    """The towers, by the names that stages know them by."""
    names = PART_MODULES["vision_tower"]
    return [module for name, module in model.named_modules() if name.rsplit(".", 1)[-1] in names]


def watch(module: nn.Module, seen: list[bool]) -> None:
    """Notes at every call whether a gradient could pass through what comes out."""

    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        state = output[0] if isinstance(output, tuple) else getattr(output, "last_hidden_state", output)
        seen.append(state.requires_grad)

    module.register_forward_hook(note)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("parts", [("language_model",), ("connector", "vision_tower")])
def test_gradients_reach_towers_that_learn_and_no_others(name, parts, tmp_path) -> None:
    model = make_model(name)
    trainer = short_run(
        tmp_path,
        model,
        VARIANTS[name].processor(),
        rows_of(name),
        trainable_parts=list(parts),
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )
    seen: list[bool] = []
    assert towers_of(model)
    for tower in towers_of(model):
        watch(tower, seen)
    trainer.train()
    assert seen and set(seen) == {"vision_tower" in parts}


def test_what_learns_keeps_its_inputs() -> None:
    model = make_model("videochat_flash")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for tower in towers_of(model):
        tower.requires_grad_(False)
    release_frozen_inputs(model)
    ids = torch.zeros(1, 2, dtype=torch.long)
    assert model.get_input_embeddings()(ids).requires_grad
    # A second time there is nothing left to take away.
    release_frozen_inputs(model)
    assert model.get_input_embeddings()(ids).requires_grad
