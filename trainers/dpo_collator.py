"""Batches of pairs of answers to prompts with videos: every video once, both answers behind the same prompt.

A row is `{"prompt": messages, "chosen": messages, "rejected": messages}`; an answer may also be a string. Without
`prompt` it is what `chosen` and `rejected` begin with alike. `ref_chosen_logps` and `ref_rejected_logps` (floats) may
hold the log-likelihoods of a reference.

Shape legend: P pairs, S sequence.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from longvideo.trainers.collators import (
    IGNORE_INDEX,
    VideoSFTCollator,
    _concatenate_visuals,
    check_batch,
    normalize_messages,
)
from longvideo.trainers.dpo_config import PADDING_SIDES

REFERENCE_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")
_SIDES = ("chosen", "rejected")
# Marks the messages of a prompt, whose assistant turns are no answers to compare.
_CONTEXT = "is_context"


class VideoDPOCollator(VideoSFTCollator):
    """Turn rows with two answers into a batch: first all chosen, then all rejected, the visuals of each prompt once.

    Args:
        processor: Processor with a chat template, `apply_chat_template` and a fast tokenizer.
        max_length: Most tokens of a prompt with an answer (see `VideoSFTCollator`).
        padding_side: "left" lets the answers end together, so that a model computes logits of few positions; "right"
            as in supervised finetuning.
        chat_template: Template to use in place of the processor's own.
        processor_kwargs: Passed to the processor for every row, for example `{"max_frames": 64}`.
        pad_to_multiple_of: Round the padded length up to a multiple of this many tokens.

    Raises:
        ValueError: An unknown padding side.
    """

    def __init__(
        self,
        processor: Any,
        *,
        max_length: int | None = None,
        padding_side: str = "left",
        chat_template: str | None = None,
        processor_kwargs: Mapping[str, Any] | None = None,
        pad_to_multiple_of: int | None = None,
    ) -> None:
        super().__init__(
            processor,
            max_length=max_length,
            chat_template=chat_template,
            processor_kwargs=processor_kwargs,
            pad_to_multiple_of=pad_to_multiple_of,
        )
        if padding_side not in PADDING_SIDES:
            raise ValueError(f"padding_side={padding_side!r} is unknown; use one of {PADDING_SIDES}.")
        self.padding_side = padding_side

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Collate rows.

        Args:
            rows: Rows with `prompt`, `chosen` and `rejected`.

        Returns:
            `input_ids`, `attention_mask`, `labels` (2 P, S), all chosen answers before all rejected ones, labels on
            the answers; `prompt_mask` (2 P, S) bool and `answer_room` (2 P,), the tokens of the longer answer of a
            pair; the pixels of P prompts (see `VideoSFTCollator`); with left padding `logits_to_keep`, the number of
            last positions whose logits are needed; `ref_chosen_logps` and `ref_rejected_logps` (P,) where rows have
            them.

        Raises:
            ValueError: A row without pair, with an empty answer, media in an answer, or references in some rows only.
        """
        pairs = [self._encode_pair(row, _describe_pair(row, position)) for position, row in enumerate(rows)]
        encoded = [pair[side] for side in range(2) for pair in pairs]
        batch = self._pad_sequences(encoded)
        if self.padding_side == "left":
            lengths = [row["input_ids"].shape[1] for row in encoded]
            batch = {key: _move_right(rows, lengths) for key, rows in batch.items()}
        labelled_BS = batch["labels"] != IGNORE_INDEX
        batch["prompt_mask"] = (labelled_BS.cumsum(1) == 0) & batch["attention_mask"].bool()
        answers_B = batch["attention_mask"].sum(1) - batch["prompt_mask"].sum(1)
        batch["answer_room"] = answers_B.view(2, -1).amax(0).repeat(2)
        batch.update(self._collect_visuals([chosen for chosen, _ in pairs]))
        check_batch(batch, video_token_id=self.video_token_id, image_token_id=self.image_token_id)
        if self.padding_side == "left":
            # The position before the first label predicts it.
            first = int(labelled_BS.any(0).int().argmax())
            batch["logits_to_keep"] = labelled_BS.shape[1] - first + 1
        batch.update(_collect_references(rows))
        return batch

    def _collect_visuals(self, encoded: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:

        return _concatenate_visuals(encoded, flat_videos=self._has_flat_videos)

    def _encode_pair(self, row: Mapping[str, Any], where: str) -> tuple[dict[str, torch.Tensor], ...]:
        prompt, answers = split_pair(row, where=where)
        context = [{**message, _CONTEXT: True} for message in normalize_messages({**row, "messages": prompt})]
        encoded = []
        # The second answer gets the visuals that were read for the first one.
        with visuals_read_once(self.processor):
            for side, answer in zip(_SIDES, answers, strict=True):
                here = f"{where}, {side} answer,"
                messages = [*context, *normalize_messages({"messages": answer}, where=here)]
                encoded.append(self._encode_row({"messages": messages}, here))
        return tuple(encoded)

    def _answer_spans(self, messages: list[dict[str, Any]], where: str) -> list[tuple[int, int]]:
        spans = super()._answer_spans(messages, where)
        turns = [message for message in messages if message["role"] == "assistant"]
        return [span for span, turn in zip(spans, turns, strict=True) if not turn.get(_CONTEXT)]


def split_pair(
    row: Mapping[str, Any], *, where: str = "The row"
) -> tuple[list[dict[str, Any]], tuple[list[dict[str, Any]], list[dict[str, Any]]]]:
    """Bring a row to a prompt and two answers.

    Args:
        row: Row with `chosen`, `rejected` and maybe `prompt`; messages, or strings for plain text.
        where: How errors name the row.

    Returns:
        Messages of the prompt, and of the chosen and of the rejected answer.

    Raises:
        ValueError: Something is missing, the prompt ends with an answer, or an answer has media.

    Source: the conversational preference format of TRL, with explicit and with implicit prompts.
    """
    if not isinstance(row, Mapping) or any(not row.get(side) for side in _SIDES):
        keys = sorted(row) if isinstance(row, Mapping) else type(row).__name__
        hint = " Rows with `messages` are for VideoSFTTrainer." if "messages" in keys else ""
        raise ValueError(
            f"{where} needs `chosen` and `rejected` answers (it has: {keys}). Expected "
            '{"prompt": [{"role": "user", "content": [{"type": "video", "path": ...}, {"type": "text", ...}]}], '
            f'"chosen": [{{"role": "assistant", ...}}], "rejected": [{{"role": "assistant", ...}}]}}.{hint}'
        )
    chosen, rejected = (_as_messages(row[side], "assistant") for side in _SIDES)
    prompt = _as_messages(row["prompt"], "user") if row.get("prompt") else []
    if not prompt:
        shared = 0
        while shared < min(len(chosen), len(rejected)) and _is_same(chosen[shared], rejected[shared]):
            shared += 1
        # Of two identical conversations the last turn is the answer.
        while shared and (shared == min(len(chosen), len(rejected)) or chosen[shared - 1].get("role") == "assistant"):
            shared -= 1
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
        if not prompt:
            raise ValueError(
                f"{where} has no `prompt`, and `chosen` and `rejected` do not begin with the same messages. Put the "
                "question with its video into `prompt`."
            )
    if prompt[-1].get("role") == "assistant":
        raise ValueError(f"{where}: the prompt ends with an assistant message. End it with the question.")
    for side, answer in zip(_SIDES, (chosen, rejected), strict=True):
        if answer[0].get("role") != "assistant":
            raise ValueError(
                f"{where}: `{side}` begins with a message of {answer[0].get('role')!r}. Give the answer alone there "
                "(role 'assistant') and everything before it as `prompt`."
            )
        for message in answer:
            content = message.get("content")
            kinds = [block.get("type") for block in content] if isinstance(content, list) else []
            if {"video", "image"} & set(kinds):
                raise ValueError(f"{where}: `{side}` holds a video or an image. Visuals belong into the prompt.")
    return prompt, (chosen, rejected)


@contextmanager
def visuals_read_once(processor: Any) -> Iterator[None]:
    """Let a processor read and resize visuals once for several calls with the same visuals in the same order.

    Args:
        processor: Processor with the usual hooks for images and videos; another one reads them every time.
    """
    known: dict[tuple[str, str], Any] = {}

    def remember(name: str, read: Callable[..., Any]) -> Callable[..., Any]:
        def once(visuals: Any, **kwargs: Any) -> Any:
            # Keyed by the very objects: only the second answer of the same prompt brings them again.
            key = (name, _fingerprint(visuals))
            if key not in known:
                known[key] = (read(visuals, **kwargs), visuals)
            processed, texts = known[key][0]
            # A call takes out of the outputs what was not asked for.
            return type(processed)(dict(processed)), list(texts)

        return once

    names = [name for name in ("_process_videos", "_process_images") if hasattr(processor, name)]
    for name in names:
        processor.__dict__[name] = remember(name, getattr(processor, name))
    try:
        yield
    finally:
        for name in names:
            del processor.__dict__[name]


def _fingerprint(visuals: Any) -> str:
    if isinstance(visuals, list | tuple):
        return f"[{','.join(_fingerprint(visual) for visual in visuals)}]"
    return visuals if isinstance(visuals, str) else f"{type(visuals).__name__}@{id(visuals)}"


def _as_messages(given: Any, role: str) -> list[dict[str, Any]]:
    return [{"role": role, "content": given}] if isinstance(given, str) else list(given)


def _is_same(one: Any, other: Any) -> bool:
    """Compare messages; decoded frames are the same where their values are."""
    if one is other:
        return True
    if isinstance(one, np.ndarray | torch.Tensor) or isinstance(other, np.ndarray | torch.Tensor):
        return type(one) is type(other) and one.shape == other.shape and bool((one == other).all())
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        keys = {key for item in (one, other) for key, value in item.items() if value is not None}
        return all(_is_same(one.get(key), other.get(key)) for key in keys)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(_is_same(x, y) for x, y in zip(one, other, strict=True))
    return bool(one == other)


def _move_right(rows: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """Turn right padding (B, S) into left padding."""
    return torch.stack([row.roll(len(row) - length) for row, length in zip(rows, lengths, strict=True)])


def _collect_references(rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    present = [position for position, row in enumerate(rows) if all(row.get(x) is not None for x in REFERENCE_COLUMNS)]
    if not present:
        return {}
    if len(present) < len(rows):
        lacking = next(position for position in range(len(rows)) if position not in present)
        raise ValueError(
            f"{_describe_pair(rows[lacking], lacking)} has no {' and '.join(REFERENCE_COLUMNS)}, other rows have "
            "them. Compute them for the whole dataset (VideoDPOTrainer.compute_reference) or take the columns out."
        )
    for position, row in enumerate(rows):
        if not all(math.isfinite(float(row[name])) for name in REFERENCE_COLUMNS):
            raise ValueError(
                f"{_describe_pair(row, position)}: {REFERENCE_COLUMNS} are {[row[x] for x in REFERENCE_COLUMNS]}, not "
                "finite numbers. Compute them again."
            )
    return {name: torch.tensor([float(row[name]) for row in rows]) for name in REFERENCE_COLUMNS}


def _describe_pair(row: Any, position: int) -> str:
    name = row.get("id") if isinstance(row, Mapping) else None
    return f"Row {position} of the batch" + (f" (id {name!r})" if name is not None else "")
