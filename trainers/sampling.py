"""Rows of like length in one batch: lengths of rows without decoding their videos, and the order made of them."""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from transformers.trainer_pt_utils import LengthGroupedSampler

from longvideo.trainers.budgets import planned_frames, share_frames
from longvideo.trainers.message_rows import describe_row, normalize_messages, visual_blocks

# A model that inserts visual tokens itself does not say how many; the order needs like numbers, not exact ones.
_TOKENS_OF_A_FRAME = 64
_THREADS = 8


def row_length(
    row: Mapping[str, Any],
    processor: Any,
    *,
    position: int = 0,
    call: Mapping[str, Any] | None = None,
    max_length: int | None = None,
    max_frames: int | None = None,
) -> int:
    """Estimate how many tokens a row takes, visual ones included, without decoding its videos.

    Args:
        row: Row with `messages`.
        processor: Processor of the model.
        position: Zero-based index of the row, for errors.
        call: Options of the call, as `processor_kwargs`.
        max_length: Most tokens of a row, see `RowBudget`.
        max_frames: Most frames of a row, see `RowBudget`.

    Returns:
        Tokens. Videos whose number of frames only reading tells count as the processor's least number.
    """
    messages = normalize_messages(row, where=describe_row(row, position))
    text = " ".join(block.get("text") or "" for message in messages for block in message["content"])
    num_text = len(processor.tokenizer(text, add_special_tokens=False)["input_ids"])
    tokens_of = getattr(processor, "get_num_video_tokens", None)
    unit_of = tokens_of or (lambda frames: frames * _TOKENS_OF_A_FRAME)
    least = getattr(processor.video_processor, "min_frames", None) or 1
    planned = [planned_frames(block, processor, call or {}) for block in visual_blocks(messages, "video")]
    frames = [least if count is None else count for count in planned]
    if frames and max_frames is not None:
        frames = share_frames(frames, max_frames) or frames
    try:
        visual = sum(map(unit_of, frames))
    except ValueError:  # an unfinished clip, which the processor completes
        visual = sum(frames) * _TOKENS_OF_A_FRAME
    images = sum(_TOKENS_OF_A_FRAME for _ in visual_blocks(messages, "image"))
    length = num_text + visual + images
    return length if max_length is None or tokens_of is None else min(length, max_length)


def row_lengths(rows: Sequence[Mapping[str, Any]], processor: Any, **settings: Any) -> list[int]:
    """Estimate the lengths of rows; files are looked at in several threads.

    Args:
        rows: Rows with `messages`.
        processor: Processor of the model.
        **settings: See `row_length`.

    Returns:
        Tokens of each row.
    """

    def one(position: int) -> int:
        return row_length(rows[position], processor, position=position, **settings)

    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(one, range(len(rows))))


class GroupedRows(LengthGroupedSampler):
    """`LengthGroupedSampler` whose order follows a seed, so that a resumed run sees the same batches.

    Args:
        batch_size: Rows that shall be of like length: those of an optimizer step.
        lengths: Tokens of each row.
        seed: Seed of the order; every epoch has its own.
    """

    def __init__(self, batch_size: int, *, lengths: Sequence[int], seed: int) -> None:
        super().__init__(batch_size, lengths=list(lengths), generator=torch.Generator())
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.generator.manual_seed(self.seed + self.epoch)
        return super().__iter__()
