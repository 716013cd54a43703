"""What a batch must hold before it is trained on, and what a loss and gradients must be after it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers import TrainerCallback

from longvideo.trainers.label_rules import IGNORE_INDEX


class BatchCounts(NamedTuple):
    """What a batch holds: `frames` of all videos, `placeholders` of visuals and `supervised_tokens`."""

    frames: int
    placeholders: int
    supervised_tokens: int


@dataclass(frozen=True)
class BatchFacts:
    """What the trainer is told of a batch beside its tensors.

    Args:
        rows: Name of every row, for errors.
        num_skipped: Rows that were left out because a video or image of theirs cannot be read.
    """

    rows: tuple[str, ...]
    num_skipped: int = 0


def check_batch(
    batch: Mapping[str, Any], *, video_token_id: int | None, image_token_id: int | None = None
) -> BatchCounts:
    """Refuse a batch that would train on nothing, or on text whose pixels are missing, and count its contents.

    Args:
        batch: `input_ids` (B, S), `labels` (B, S), and the pixel tensors, if any.
        video_token_id: Id of the video placeholder token; None for a model without videos.
        image_token_id: Id of the image placeholder token; None for a model without images.

    Returns:
        The counts of the batch; frames of encoded videos are not among them.

    Raises:
        ValueError: All labels are -100 (the loss would be undefined), placeholders came without pixels (the model
            would learn from placeholder embeddings), or pixels came without placeholders (they would be ignored).
    """
    input_ids = batch["input_ids"]
    video_id, image_id = (-1 if token_id is None else token_id for token_id in (video_token_id, image_token_id))
    # One transfer for all counts: every separate .item() would wait for the device.
    num_video, num_image, num_supervised = torch.stack(
        [(input_ids == video_id).sum(), (input_ids == image_id).sum(), (batch["labels"] != IGNORE_INDEX).sum()]
    ).tolist()
    if num_supervised == 0:
        raise ValueError(
            f"The batch has no supervised token: all {batch['labels'].numel()} labels are {IGNORE_INDEX}, so its loss "
            f"is undefined{_of_rows(batch.get('batch_facts'))}. Give every row an assistant answer."
        )
    if all(batch.get(name) is None for name in ("mm_encoder_outputs", "encoded_video", "encoded_videos")):
        for kind, key, count, token_id in (
            ("video", "pixel_values_videos", num_video, video_token_id),
            ("image", "pixel_values", num_image, image_token_id),
        ):
            _check_placeholders(kind, key, pixels=batch.get(key), num_placeholders=count, token_id=token_id)
    pixels = batch.get("pixel_values_videos")
    num_frames = 0 if pixels is None else pixels.shape[:-3].numel()
    return BatchCounts(frames=num_frames, placeholders=num_video + num_image, supervised_tokens=num_supervised)


def _check_placeholders(
    kind: str, key: str, *, pixels: torch.Tensor | None, num_placeholders: int, token_id: int | None
) -> None:
    if num_placeholders and pixels is None:
        raise ValueError(
            f"The batch has {num_placeholders} {kind} placeholder tokens (id {token_id}) in input_ids but no `{key}`. "
            f"Put the {kind} into the {kind} block of the message (a path, or frames), and keep `{key}` in the batch: "
            "a collator that tokenizes the text alone loses it."
        )
    if pixels is not None and not num_placeholders:
        raise ValueError(
            f"The batch brings `{key}` of shape {tuple(pixels.shape)} but input_ids hold no {kind} placeholder token "
            f"(id {token_id}). Give the {kind} as a block of a message, so that the chat template writes its "
            "placeholder, and do not truncate it away."
        )


def check_loss(loss: torch.Tensor, *, step: int, rows: Sequence[str]) -> None:
    """Refuse a loss that is no number before it reaches the weights.

    Args:
        loss: Loss of a batch.
        step: Optimizer step, counted from 1.
        rows: Names of the rows of the batch.

    Raises:
        FloatingPointError: It is NaN or infinite; the text names step and rows.
    """
    value = float(loss.detach())
    if value - value != 0:  # NaN for infinities too
        raise FloatingPointError(
            f"The loss of step {step} is {value}{_of_rows(BatchFacts(tuple(rows)))}. Nothing was learned from it, and "
            "the last checkpoint stays as it is. Look at these rows; lower the learning rate, train in bf16 in place "
            "of fp16, or leave the rows out, and continue with resume_from_checkpoint=True."
        )


class GradientGuard(TrainerCallback):
    """Stops before an optimizer step whose gradients are no numbers, so that no checkpoint gets such weights.

    `rows` holds the names of the rows since the last step; the trainer adds to it. With fp16 the scaler skips such
    steps itself.
    """

    def __init__(self) -> None:
        self.rows: list[str] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Check all gradients and forget the rows."""
        rows, self.rows = self.rows, []
        if args.fp16 or model is None:
            return
        gradients = [_local(parameter.grad) for parameter in model.parameters() if parameter.grad is not None]
        if not gradients or all_finite(gradients):
            return
        broken = [
            name
            for name, parameter in model.named_parameters()
            if parameter.grad is not None and not _local(parameter.grad).isfinite().all()
        ]
        raise FloatingPointError(
            f"{len(broken)} gradients of step {state.global_step + 1} are not finite, first that of {broken[0]!r}"
            f"{_of_rows(BatchFacts(tuple(rows)))}. The step was not taken, and the last checkpoint stays as it is. "
            "Look at these rows, lower the learning rate, or leave the rows out, and continue with "
            "resume_from_checkpoint=True."
        )


def all_finite(tensors: list[torch.Tensor]) -> bool:
    """Say whether tensors hold numbers only, fetching one value from each device.

    Args:
        tensors: Tensors of any shapes.

    Returns:
        False when one has a NaN or an infinity.
    """
    finite: dict[torch.device, torch.Tensor] = {}
    # A process may hold no piece of a small sharded tensor.
    present = [tensor for tensor in tensors if tensor.numel()]
    for norm in torch._foreach_norm(present, float("inf")) if present else ():
        known = finite.get(norm.device)
        finite[norm.device] = norm.isfinite() if known is None else known & norm.isfinite()
    return all(bool(value) for value in finite.values())


def _local(gradient: torch.Tensor) -> torch.Tensor:
    # Sharded gradients are looked at shard by shard.
    return gradient.to_local() if hasattr(gradient, "to_local") else gradient


def _of_rows(facts: BatchFacts | None) -> str:
    return f" ({'; '.join(facts.rows)})" if facts is not None and facts.rows else ""
