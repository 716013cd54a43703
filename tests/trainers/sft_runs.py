"""What the tests of `VideoSFTTrainer` share: short runs, their losses and gradients, a row with an image."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from longvideo.trainers import (
    IGNORE_INDEX,
    VideoSFTCollator,
    VideoSFTConfig,
    VideoSFTTrainer,
    part_of,
    set_trainable_parts,
)


def short_run(
    folder: Path, model: Any, processor: Any, rows: list[dict[str, Any]], *, collator: Any = None, **args: Any
) -> VideoSFTTrainer:
    """A trainer of one step on the CPU that saves nothing.

    Args:
        folder: parent of its output folder, `run`.
        model: model to train.
        processor: its processor.
        rows: training rows; the first three are also those of evaluation.
        collator: in place of the trainer's own.
        **args: settings in place of these.

    Returns:
        The trainer.
    """
    settings = {
        "output_dir": str(folder / "run"),
        "max_steps": 1,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return VideoSFTTrainer(
        model,
        VideoSFTConfig(**{**settings, **args}),
        data_collator=collator,
        train_dataset=rows,
        eval_dataset=rows[:3],
        processing_class=processor,
    )


def image_row(question: str, answer: str) -> dict[str, Any]:
    """A question about a grey picture of 80 x 48 pixels."""
    picture = np.full((48, 80, 3), 90, dtype=np.uint8)
    user = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
    return {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]}


def losses(trainer: VideoSFTTrainer) -> list[float]:
    """The losses that a run logged."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def gradients(model: Any, batches: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Gradients of the summed loss over the supervised tokens of all batches, divided by their number."""
    count = sum(int((batch["labels"] != IGNORE_INDEX).sum()) for batch in batches)
    model.zero_grad()
    for batch in batches:
        model(**batch, use_cache=False, num_items_in_batch=count).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(
    one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], *, tolerance: float = 1e-4
) -> None:
    """Two ways to one sum in float32; the tolerance is relative to a tensor's largest entry, not to each entry."""
    assert one.keys() == other.keys() and one
    for name, gradient in one.items():
        atol = tolerance * float(gradient.abs().max()) + 1e-7
        torch.testing.assert_close(other[name], gradient, rtol=0, atol=atol, msg=lambda text, n=name: f"{n}: {text}")


def assert_batch_equals_rows(model: Any, processor: Any, rows: list[dict[str, Any]], parts: list[str]) -> None:
    """Rows of one batch, padded on the right, give the gradients that they give alone, in the parts that learn."""
    set_trainable_parts(model, parts)
    collator = VideoSFTCollator(processor)
    whole = gradients(model, [collator(rows)])
    assert {part_of(name) for name in whole} == set(parts)
    assert_same_gradients(whole, gradients(model, [collator([row]) for row in rows]))


def snapshot(model: Any) -> dict[str, torch.Tensor]:
    """Copies of all parameters."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def changed_names(model: Any, before: dict[str, torch.Tensor]) -> set[str]:
    """Names of the parameters that are no longer as in a snapshot."""
    return {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
