"""Batches of pairs of answers to prompts with videos: every video once, both answers behind the same prompt.

A row is `{"prompt": messages, "chosen": messages, "rejected": messages}`; an answer may also be a string. Without
`prompt` it is what `chosen` and `rejected` begin with alike. `ref_chosen_logps` and `ref_rejected_logps` (floats) may
hold the log-likelihoods of a reference.

Shape legend: P pairs, S sequence.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch

from longvideo.trainers.batch_checks import BatchFacts, check_batch
from longvideo.trainers.collators import IGNORE_INDEX, VideoSFTCollator, concatenate_visuals, frames_per_video
from longvideo.trainers.dpo_config import PADDING_SIDES
from longvideo.trainers.message_rows import describe_row, normalize_messages, visual_blocks

REFERENCE_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")
_SIDES = ("chosen", "rejected")
# Marks the messages of a prompt, whose assistant turns are no answers to compare.
_CONTEXT = "is_context"


class VideoDPOCollator(VideoSFTCollator):
    """Turn rows with two answers into a batch: first all chosen, then all rejected, the visuals of each prompt once.

    Both answers of a row get the same frames, as few as the longer one leaves room for.

    Args:
        processor: Processor with a chat template, `apply_chat_template` and a fast tokenizer.
        padding_side: "left" lets the answers end together, so that a model computes logits of few positions; "right"
            as in supervised finetuning.
        **kwargs: What `VideoSFTCollator` takes, but for `mask`, `label_rule` and `blank_image_position`.

    Raises:
        ValueError: An unknown padding side, or as `VideoSFTCollator` says.
    """

    def __init__(self, processor: Any, *, padding_side: str = "left", **kwargs: Any) -> None:
        unfit = {"mask", "label_rule", "blank_image_position"} & set(kwargs)
        if unfit:
            raise ValueError(f"{sorted(unfit)} are settings of supervised finetuning; leave them out for preferences.")
        super().__init__(processor, **kwargs)
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
            BadMediaError: A video or image cannot be read, and `on_bad_video` is "raise".
            ValueError: A row without pair, with an empty answer, media in an answer, or references in some rows only.
        """
        names, encoded, num_skipped = self._encode_rows(rows)
        rejected = [row.pop("rejected") for row in encoded]
        references = [row.pop("references") for row in encoded]
        batch = self._pad_answers([*encoded, *rejected])
        batch.update(concatenate_visuals(encoded, flat_videos=self._has_flat_videos))
        entries = [entry for row in encoded for entry in row.get("encoded_videos", ())]
        if entries:
            batch["encoded_videos"] = entries
        facts = BatchFacts(tuple(names), num_skipped)
        check_batch(
            {**batch, "batch_facts": facts}, video_token_id=self.video_token_id, image_token_id=self.image_token_id
        )
        if self.with_facts:
            batch["batch_facts"] = facts
        batch.update(_join_references(references, names))
        return batch

    def _pad_answers(self, encoded: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self._pad_sequences(encoded)
        if self.padding_side == "left":
            lengths = [row["input_ids"].shape[1] for row in encoded]
            batch = {key: _move_right(rows, lengths) for key, rows in batch.items()}
        labelled_BS = batch["labels"] != IGNORE_INDEX
        batch["prompt_mask"] = (labelled_BS.cumsum(1) == 0) & batch["attention_mask"].bool()
        answers_B = batch["attention_mask"].sum(1) - batch["prompt_mask"].sum(1)
        batch["answer_room"] = answers_B.view(2, -1).amax(0).repeat(2)
        if self.padding_side == "left":
            # The position before the first label predicts it.
            first = int(labelled_BS.any(0).int().argmax())
            batch["logits_to_keep"] = labelled_BS.shape[1] - first + 1
        return batch

    def _encode_row(self, row: Mapping[str, Any], where: str, *, num_frames: int | None = None) -> dict[str, Any]:
        """Returns what the chosen answer is for the model, with `rejected` and `references` beside."""
        prompt, answers = split_pair(row, where=where)
        media = {key: row[key] for key in ("videos", "images") if key in row}
        context = [
            {**message, _CONTEXT: True} for message in normalize_messages({**media, "messages": prompt}, where=where)
        ]
        conversations = []
        for side, answer in zip(_SIDES, answers, strict=True):
            here = f"{where}, {side} answer"
            conversations.append(
                ({"messages": [*context, *normalize_messages({"messages": answer}, where=here)]}, here)
            )

        # The second answer gets the visuals that were read for the first one. Stored features are read fast as it is.
        with visuals_read_once(self.processor) if self.encoded_features is None else nullcontext():
            encode = super()._encode_row
            encoded = [encode(*conversation, num_frames=num_frames) for conversation in conversations]
            frames = [frames_per_video(output) for output in encoded]
            if frames[0] != frames[1]:
                least = min(min(frames[0]), min(frames[1]))
                encoded = [encode(*conversation, num_frames=least) for conversation in conversations]
        chosen, rejected = encoded
        return {**chosen, "rejected": rejected, "references": _read_references(row, where)}

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
        blocks = [message["content"] for message in answer if isinstance(message.get("content"), list)]
        if any(visual_blocks([{"content": content} for content in blocks])):
            raise ValueError(f"{where}: `{side}` holds a video or an image. Visuals belong into the prompt.")
    return prompt, (chosen, rejected)


@contextmanager
def visuals_read_once(processor: Any) -> Iterator[None]:
    """Let a processor read and resize visuals once for several calls with the same visuals in the same order.

    Args:
        processor: Processor with the usual hooks for images and videos; another one reads them every time.
    """
    known: dict[tuple[str, str, str], Any] = {}

    def remember(name: str, read: Callable[..., Any]) -> Callable[..., Any]:
        def once(visuals: Any, **kwargs: Any) -> Any:
            # Keyed by the very objects: only the other answer to the same prompt brings them again.
            key = (name, _fingerprint(visuals), repr(kwargs))
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


def _read_references(row: Mapping[str, Any], where: str) -> tuple[float, ...] | None:
    given = [row.get(name) for name in REFERENCE_COLUMNS]
    if all(value is None for value in given):
        return None
    if any(value is None or not math.isfinite(float(value)) for value in given):
        raise ValueError(
            f"{where}: {' and '.join(REFERENCE_COLUMNS)} are {given}, not two finite numbers. Compute them again for "
            "the whole dataset (VideoDPOTrainer.compute_reference) or take the columns out."
        )
    return tuple(float(value) for value in given)


def _join_references(references: list[tuple[float, ...] | None], names: list[str]) -> dict[str, torch.Tensor]:
    present = [reference is not None for reference in references]
    if not any(present):
        return {}
    if not all(present):
        raise ValueError(
            f"{names[present.index(False)]} has no {' and '.join(REFERENCE_COLUMNS)}, other rows have them. Compute "
            "them for the whole dataset (VideoDPOTrainer.compute_reference) or take the columns out."
        )
    return {
        name: torch.tensor(column)
        for name, column in zip(REFERENCE_COLUMNS, zip(*references, strict=True), strict=True)
    }


def as_conversation(row: Mapping[str, Any], position: int = 0) -> dict[str, Any]:
    """Join a prompt and the longer answer, for whatever estimates the length of a row.

    Args:
        row: Row with a pair of answers.
        position: Zero-based index of the row, for errors.

    Returns:
        Row with `messages`, and the media of the prompt.
    """
    prompt, answers = split_pair(row, where=describe_row(row, position))
    kept = {key: value for key, value in row.items() if key not in ("prompt", *_SIDES)}
    return {**kept, "messages": [*prompt, *max(answers, key=_num_characters)]}


def _num_characters(messages: list[dict[str, Any]]) -> int:
    contents = [message.get("content") or "" for message in messages]
    return sum(
        len(content) if isinstance(content, str) else sum(len(block.get("text") or "") for block in content)
        for content in contents
    )
