"""Batches for supervised finetuning on video rows: flat pixel tensors with per-video counts, and labels.

A row is `{"messages": [{"role": ..., "content": [blocks]}], ...}`; the video blocks take what the processor's
`apply_chat_template` takes (path, URL, array or tensor, frames with metadata, and per-block options such as `fps`,
`nframes`, `video_start`, `video_end`). A block without a source takes the next entry of the row's `videos` (or
`images`) column.

Shape legend: S sequence of one row, F frames of one video.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from longvideo.processing.shared.placeholders import shift_spans
from longvideo.trainers.bad_media import POLICIES, BadMediaError, BadMediaLog, find_bad_media, spare_rows
from longvideo.trainers.batch_checks import BatchCounts, BatchFacts, check_batch
from longvideo.trainers.budgets import RowBudget, limit_frames
from longvideo.trainers.encoded_features import FeatureStore, StoredVideos
from longvideo.trainers.label_rules import IGNORE_INDEX, check_label_settings, delimiter_ids
from longvideo.trainers.message_rows import copy_messages, describe_row, normalize_messages, visual_blocks

__all__ = ["IGNORE_INDEX", "BatchCounts", "VideoSFTCollator", "check_batch", "normalize_messages"]

# What must grow along the sequence axis when rows of different length are put together, and the filling value.
_SEQUENCE_FILL = {
    "attention_mask": 0,
    "mm_token_type_ids": 0,
    "token_type_ids": 0,
    "coordinate_values": 0.0,
    "labels": IGNORE_INDEX,
}
_BLANK_SIDE = 32  # pixels; the processor brings a black square of any size to the towers' sizes
# Reading again with fewer frames settles at once; what stands beside the placeholders may add a few tokens.
_MOST_READS = 6
# Rows that are kept to stand in for others.
_MOST_KEPT = 4


class VideoSFTCollator:
    """Turn rows with `messages` into a training batch: right padding, flat pixels, labels on the answers only.

    Args:
        processor: Processor with a chat template, `apply_chat_template` and a fast tokenizer.
        max_length: Most tokens of a row, visual placeholders included. Of videos in longer rows fewer frames are
            read, evenly spread; text and visual spans are never cut, so a row whose text alone is too long is an
            error, and so is one whose model takes no fewer frames. For a model that puts visual tokens in place of
            one placeholder this counts the text; the model fits the rest into its context. None for no limit.
        max_frames_per_row: Most frames of a row, all its videos together; more are thinned out evenly. None for no
            limit.
        mask: "assistant" supervises the text of every assistant turn and its end token; "all" every token that is
            neither padding nor a visual placeholder.
        label_rule: None, or "videochat_flash" / "longvu" / "llava_st" for the labels of the original training code:
            whole assistant turns with their role header, and newline, `<|im_start|>` and `<|im_end|>` tokens wherever
            they stand ("longvu" with a Llama 3 tokenizer: begin of text, header marks, end of turn and blank line).
        blank_image_position: None, or the token index at which a row without images and videos gets a black image,
            as in the original training of LongVU (91): it is seen, so that every process of a sharded model runs the
            same modules.
        chat_template: Template to use in place of the processor's own.
        processor_kwargs: Passed to the processor for every row, for example `{"max_frames": 64}`.
        pad_to_multiple_of: Round the padded length up to a multiple of this many tokens.
        on_bad_video: "raise", or "skip" to leave out rows with a video or image that cannot be read; they are counted
            and reported, and a batch of such rows alone takes others in their place.
        bad_videos: Counts and reports rows that are left out; None for one without a file.
        spare_rows: Rows to take in place of a batch of which none can be read, as the dataset itself. With None,
            or a stream, the last rows that could be read are taken; an empty list takes none.
        encoded_features: Store of encoded videos (see `FeatureStore`); then batches hold `encoded_videos`, entries
            with features or with the pixels to make them of, in place of pixels. None for pixels.
        with_facts: Whether batches hold `batch_facts` beside their tensors: names of the rows and the number of those
            left out. `VideoSFTTrainer` asks for it.

    Raises:
        ValueError: Unknown `mask`, `label_rule` or `on_bad_video`, a limit below 1, or a tokenizer without the tokens
            that the rule names.

    Source: VideoChat-Flash training code, `preprocess_qwen` (for `label_rule="videochat_flash"`); LongVU training
    code, the same and `preprocess_llama3` (for `label_rule="longvu"`); LLaVA-ST training code, the same as the first
    (for `label_rule="llava_st"`).
    Differs: the originals hard-code 198 for the newline; here the tokenizer is asked, which is 198 for Qwen2. LongVU's
    further embeddings of token 0 behind the visual tokens are not made, and a text shorter than
    `blank_image_position` gets its image behind its last token instead of inside the padding. The originals cut rows
    at their longest sequence.
    """

    def __init__(
        self,
        processor: Any,
        *,
        max_length: int | None = None,
        mask: str = "assistant",
        label_rule: str | None = None,
        chat_template: str | None = None,
        processor_kwargs: Mapping[str, Any] | None = None,
        pad_to_multiple_of: int | None = None,
        blank_image_position: int | None = None,
        max_frames_per_row: int | None = None,
        on_bad_video: str = "raise",
        bad_videos: BadMediaLog | None = None,
        spare_rows: Sequence[Mapping[str, Any]] | None = None,
        encoded_features: FeatureStore | None = None,
        with_facts: bool = False,
    ) -> None:
        check_label_settings(mask, label_rule)
        if on_bad_video not in POLICIES:
            raise ValueError(f"on_bad_video={on_bad_video!r} is unknown; use one of {POLICIES}.")
        self.processor = processor
        self.max_length = max_length
        self.mask = mask
        self.label_rule = label_rule
        self.chat_template = chat_template
        self.processor_kwargs = dict(processor_kwargs or {})
        self.max_frames_per_row = max_frames_per_row
        self.on_bad_video, self.spare_rows, self.with_facts = on_bad_video, spare_rows, with_facts
        self.bad_videos = BadMediaLog() if bad_videos is None else bad_videos
        self._last_read: deque[Mapping[str, Any]] = deque(maxlen=_MOST_KEPT)
        self.encoded_features = encoded_features
        self._budget = RowBudget(
            processor, max_length=max_length, max_frames=max_frames_per_row, call=self.processor_kwargs
        )
        self.pad_to_multiple_of = pad_to_multiple_of
        self.video_token_id = getattr(processor, "video_token_id", None)
        self.image_token_id = getattr(processor, "image_token_id", None)
        # Blocks of some models begin and end with tokens of their own.
        self._visual_ids = {self.video_token_id, self.image_token_id}
        for name in ("image_token_ids", "video_token_ids"):
            self._visual_ids.update(getattr(processor, name, None) or ())
        self._visual_ids.discard(None)
        # A model that takes one number of frames of every video gets them stacked.
        self._has_flat_videos = not getattr(processor, "has_fixed_num_frames", False)
        if blank_image_position is not None and (blank_image_position < 0 or self.image_token_id is None):
            raise ValueError(
                f"blank_image_position={blank_image_position} must be a token index of 0 or more, and the processor "
                "must know images."
            )
        self.blank_image_position = blank_image_position
        self._always_supervised = delimiter_ids(label_rule, processor.tokenizer)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Collate rows.

        Args:
            rows: Rows with a `messages` list, and optional `videos` / `images` columns.

        Returns:
            `input_ids`, `attention_mask`, `labels` (B, S) and, when there are visuals, what the processor makes of
            them, one row after another: `pixel_values_videos` (sum F, 3, height, width) with `video_num_frames`
            (num_videos,), or (num_videos, F, 3, height, width) for a model with a fixed number of frames,
            `pixel_values` (total tiles, 3, height, width), and for some models further pixels, sizes or grids; with
            coordinates in the text `coordinate_values` (B, S).

        Raises:
            BadMediaError: A video or image cannot be read, and `on_bad_video` is "raise".
            ValueError: A row without messages or answer, one that `max_length` has no room for, or no row that can be
                read; the text names the row.
        """
        names, encoded, num_skipped = self._encode_rows(rows)
        batch: dict[str, Any] = self._pad_sequences(encoded)
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
        return batch

    def _encode_rows(self, rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[dict[str, torch.Tensor]], int]:
        """Returns names and contents of the rows that can be read, and how many cannot."""
        kept = [(row, describe_row(row, position)) for position, row in enumerate(rows)]
        encoded, bad = [], []
        for row, where in kept:
            try:
                encoded.append((row, where, self._encode_row(row, where)))
            except BadMediaError as error:
                if self.on_bad_video == "raise":
                    raise
                self.bad_videos.add(error)
                bad.append(error)
        num_skipped = len(bad)
        # A batch must hold something, on every process as often as on the others.
        has_own = self.spare_rows is not None and hasattr(self.spare_rows, "__len__")
        pool = self.spare_rows if has_own else list(self._last_read)
        spares = iter(()) if encoded else spare_rows(pool, "; ".join(where for _, where in kept))
        for number, row in enumerate(spares):
            where = f"{describe_row(row, number)}, in place of rows that cannot be read"
            try:
                encoded.append((row, where, self._encode_row(row, where)))
                break
            except BadMediaError as error:
                bad.append(error)
        if not encoded and has_own and not len(self.spare_rows):
            raise ValueError(
                f"No row of a batch can be read, and in evaluation none takes its place. Leave it out: {bad[-1]}"
            ) from bad[-1]
        if not encoded:
            raise ValueError(
                f"None of {len(bad)} rows one after the other can be read, so this is no matter of single videos; the "
                f"last one: {bad[-1]}"
            ) from bad[-1]
        if self.on_bad_video == "skip" and not has_own:
            self._last_read.extend(row for row, _, _ in encoded)
        if not self._has_flat_videos:
            encoded = self._equal_frames(encoded)
        return [where for _, where, _ in encoded], [output for _, _, output in encoded], num_skipped

    def _equal_frames(self, encoded: list[tuple[Any, str, dict[str, Any]]]) -> list[tuple[Any, str, dict[str, Any]]]:
        """Brings all videos of a batch to the fewest frames that the budget of a row asks for; they are stacked."""
        counts = [frames_per_video(output) for _, _, output in encoded]
        least = min((count for row in counts for count in row), default=0)
        return [
            (row, where, output if set(own) <= {least} else self._encode_row(row, where, num_frames=least))
            for (row, where, output), own in zip(encoded, counts, strict=True)
        ]

    def _encode_row(
        self, row: Mapping[str, Any], where: str, *, num_frames: int | None = None
    ) -> dict[str, torch.Tensor]:
        """Returns what a row is for the model; `num_frames` asks for so many frames of each video."""
        messages = normalize_messages(row, where=where)
        messages, output, stored = self._read_within_budget(messages, where, num_frames)
        offsets_S2 = output.pop("offset_mapping")[0]
        replacements = output.pop("text_replacement_offsets", None) or [[]]
        input_ids_S = output["input_ids"][0]
        supervised_S = self._supervised_positions(messages, input_ids_S, offsets_S2, replacements[0], where)
        visual_S = self._visual_positions(input_ids_S)
        supervised_S &= ~visual_S
        # Nothing comes before the first token, so nothing can predict it.
        supervised_S[0] = False
        output["labels"] = input_ids_S.masked_fill(~supervised_S, IGNORE_INDEX)[None]
        if not supervised_S.any():
            raise ValueError(f"{where} has no supervised token. Add a message with role 'assistant' and some text.")
        output = {key: value for key, value in output.items() if isinstance(value, torch.Tensor)}
        if stored is not None and stored.entries:
            output = {key: value for key, value in output.items() if key not in stored.names}
            output["encoded_videos"] = stored.load_entries()
        if self.blank_image_position is not None and not visual_S.any():
            self._add_blank_image(output)
        return output

    def _read_within_budget(
        self, messages: list[dict[str, Any]], where: str, num_frames: int | None
    ) -> tuple[list[dict[str, Any]], dict[str, Any], StoredVideos | None]:
        """Reads a row, again with fewer frames while it is too large."""
        num_videos = len(list(visual_blocks(messages, "video")))
        if num_frames is not None:
            messages = limit_frames(messages, [num_frames] * num_videos, self.processor, self.processor_kwargs)
        elif self._budget and num_videos:
            num_text = len(self.processor.tokenizer(self._render(messages), add_special_tokens=False)["input_ids"])
            messages = self._budget.plan(messages, num_text - num_videos, where)
        for _ in range(_MOST_READS):
            output, stored = self._read_or_name(messages, where)
            if not self._budget:
                return messages, output, stored
            frames = frames_per_video(output)
            num_text = output["input_ids"].shape[1] - self._budget.count_visual(frames)
            smaller = self._budget.reduce(messages, frames, num_text=num_text, where=where)
            if smaller is None:
                return messages, output, stored
            messages = smaller
        raise ValueError(
            f"{where} has {output['input_ids'].shape[1]} tokens with {frames} frames per video, more than "
            f"max_length={self.max_length} or max_frames_per_row={self.max_frames_per_row} allow, and its videos keep "
            "this number of frames (do_sample_frames=False?). Allow more, or let frames be sampled."
        )

    def _read_or_name(self, messages: list[dict[str, Any]], where: str) -> tuple[dict[str, Any], StoredVideos | None]:
        try:
            return self._read(messages)
        except Exception as error:
            # Which video or image is at fault, if one is, is told by reading them one by one.
            bad = find_bad_media(messages, self._read, where)
            if bad is not None:
                raise bad from bad.__cause__
            if isinstance(error, ValueError):
                raise ValueError(f"{where}: {error}") from error
            raise

    def _read(self, messages: list[dict[str, Any]]) -> tuple[dict[str, Any], StoredVideos | None]:
        """Returns the processor's output for messages, and who stood in for its video processor."""
        processor = self.processor
        if self.encoded_features is not None:
            processor = self.encoded_features.stand_in(processor)
        output = processor.apply_chat_template(
            copy_messages(messages),
            tokenize=True,
            return_dict=True,
            add_generation_prompt=False,
            chat_template=self.chat_template,
            processor_kwargs={
                **self.processor_kwargs,
                "return_tensors": "pt",
                "return_offsets_mapping": True,
                "return_text_replacement_offsets": True,
            },
        )
        return dict(output), None if processor is self.processor else processor.video_processor

    def _add_blank_image(self, output: dict[str, torch.Tensor]) -> None:
        """Put a black image into a row of text, in place."""
        black = np.zeros((_BLANK_SIDE, _BLANK_SIDE, 3), dtype=np.uint8)
        blank = self.processor(images=[black], text=[self.processor.image_token], return_tensors="pt")
        visual_S = self._visual_positions(blank["input_ids"][0])
        place = min(self.blank_image_position, output["input_ids"].shape[1])
        inserted = {"input_ids": blank["input_ids"][:, visual_S]}
        inserted["attention_mask"] = torch.ones_like(inserted["input_ids"])
        inserted["labels"] = torch.full_like(inserted["input_ids"], IGNORE_INDEX)
        for key in ("input_ids", *_SEQUENCE_FILL):
            if key in output:
                new = inserted[key] if key in inserted else blank[key][:, visual_S]
                output[key] = torch.cat([output[key][:, :place], new, output[key][:, place:]], dim=1)
        output.update({key: value for key, value in blank.items() if key not in {"input_ids", *_SEQUENCE_FILL}})

    def _supervised_positions(
        self,
        messages: list[dict[str, Any]],
        input_ids_S: torch.Tensor,
        offsets_S2: torch.Tensor,
        replacements: list[dict[str, Any]],
        where: str,
    ) -> torch.Tensor:
        if self.mask == "all" and self.label_rule is None:
            return torch.ones_like(input_ids_S, dtype=torch.bool)
        supervised_S = torch.zeros_like(input_ids_S, dtype=torch.bool)
        expansions = [(replacement["span"], replacement["new_span"]) for replacement in replacements]
        for start, end in shift_spans(self._answer_spans(messages, where), expansions):
            supervised_S |= (offsets_S2[:, 0] < end) & (offsets_S2[:, 1] > start)
        for token_id in self._always_supervised:
            supervised_S |= input_ids_S == token_id
        return supervised_S

    def _answer_spans(self, messages: list[dict[str, Any]], where: str) -> list[tuple[int, int]]:
        """Character spans of the assistant turns in the rendered, not yet expanded text."""
        spans = []
        full = self._render(messages)
        for turn, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            if turn == 0:
                raise ValueError(f"{where} begins with an assistant message; begin with a 'system' or 'user' message.")
            with_header = self.label_rule is not None
            before = self._render(messages[:turn], add_generation_prompt=not with_header)
            upto = self._render(messages[: turn + 1])
            if not (full.startswith(before) and full.startswith(upto)):
                raise ValueError(
                    f"{where}: the chat template renders message {turn} differently when later messages follow, so "
                    "its answer cannot be found in the text. Use a template that renders every message by itself "
                    "(chat_template=...)."
                )
            # The template writes a line break behind the end token, which belongs to the next turn.
            spans.append((len(before), len(upto) if with_header else len(upto.rstrip())))
        return spans

    def _render(self, messages: list[dict[str, Any]], *, add_generation_prompt: bool = False) -> str:
        return self.processor.apply_chat_template(
            copy_messages(messages, with_media=False),
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            chat_template=self.chat_template,
        )

    def _visual_positions(self, input_ids_S: torch.Tensor) -> torch.Tensor:
        visual_S = torch.zeros_like(input_ids_S, dtype=torch.bool)
        for token_id in self._visual_ids:
            visual_S |= input_ids_S == token_id
        return visual_S

    def _pad_sequences(self, encoded: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        length = max(row["input_ids"].shape[1] for row in encoded)
        if self.pad_to_multiple_of:
            length = -(-length // self.pad_to_multiple_of) * self.pad_to_multiple_of
        tokenizer = self.processor.tokenizer
        pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        batch = {}
        # input_ids come first: the Trainer reads the batch size off the first tensor.
        for key, fill in {"input_ids": pad_id, **_SEQUENCE_FILL}.items():
            if key in encoded[0]:
                rows = [
                    torch.nn.functional.pad(row[key][0], (0, length - row[key].shape[1]), value=fill)
                    for row in encoded
                ]
                batch[key] = torch.stack(rows)
        return batch


def concatenate_visuals(
    encoded: list[dict[str, torch.Tensor]], *, flat_videos: bool = True
) -> dict[str, torch.Tensor]:
    """Put the pixel tensors of the rows one after another.

    Args:
        encoded: Processor output of each row, changed in place.
        flat_videos: Whether videos become (sum F, 3, height, width) with `video_num_frames`, for unequal lengths.

    Returns:
        Every tensor but those of the sequence, along its first axis.
    """
    has_grids = any("image_grids" in row for row in encoded)
    for row in encoded:
        if flat_videos:
            _flatten_videos(row)
        if has_grids and "pixel_values" in row and "image_grids" not in row:
            row["image_grids"] = torch.zeros(row["pixel_values"].shape[0], 2, dtype=torch.int64)
    batch = {}
    no_visuals = {"input_ids", "encoded_videos", *_SEQUENCE_FILL}
    for key in {key: None for row in encoded for key in row if key not in no_visuals}:
        batch[key] = torch.cat([row[key] for row in encoded if key in row])
    return batch


def _flatten_videos(row: dict[str, torch.Tensor]) -> None:
    # Models with two towers bring the frames twice.
    for key in [key for key in row if key.startswith("pixel_values_videos") and row[key].ndim == 5]:
        num_videos, num_frames = row[key].shape[:2]
        row[key] = row[key].flatten(0, 1)  # (sum F, 3, height, width)
        row["video_num_frames"] = torch.full((num_videos,), num_frames, dtype=torch.int64)


def frames_per_video(output: Mapping[str, Any]) -> list[int]:
    """Count the frames of each video of a row.

    Args:
        output: Processor output of the row, with pixels or `encoded_videos`.

    Returns:
        Frames of each video.
    """
    if output.get("encoded_videos"):
        return [entry.num_frames for entry in output["encoded_videos"]]
    if output.get("video_num_frames") is not None:
        return output["video_num_frames"].tolist()
    pixels = output.get("pixel_values_videos")
    return [] if pixels is None else [pixels.shape[1]] * pixels.shape[0]
