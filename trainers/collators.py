"""Batches for supervised finetuning on video rows: flat pixel tensors with per-video counts, and labels.

A row is `{"messages": [{"role": ..., "content": [blocks]}], ...}`; the video blocks take what the processor's
`apply_chat_template` takes (path, URL, array or tensor, frames with metadata, and per-block options such as `fps`,
`nframes`, `video_start`, `video_end`). A block without a source takes the next entry of the row's `videos` (or
`images`) column.

Shape legend: S sequence of one row, F frames of one video.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from longvideo.processing.shared.placeholders import shift_spans

IGNORE_INDEX = -100
_VISUAL_SOURCES = {"video": ("video", "url", "path"), "image": ("image", "url", "path", "base64")}
# What must grow along the sequence axis when rows of different length are put together, and the filling value.
_SEQUENCE_FILL = {
    "attention_mask": 0,
    "mm_token_type_ids": 0,
    "token_type_ids": 0,
    "coordinate_values": 0.0,
    "labels": IGNORE_INDEX,
}
_MASKS = ("assistant", "all")
_BLANK_SIDE = 32  # pixels; the processor brings a black square of any size to the towers' sizes
# Tokens that the original rules supervise wherever they stand, by the conversation format that a tokenizer knows.
_CHATML_DELIMITERS = ("\n", "<|im_start|>", "<|im_end|>")
_LLAMA3_DELIMITERS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "\n\n")
_LABEL_RULES = {
    "videochat_flash": (_CHATML_DELIMITERS,),
    "longvu": (_CHATML_DELIMITERS, _LLAMA3_DELIMITERS),
    "llava_st": (_CHATML_DELIMITERS,),
}


class BatchCounts(NamedTuple):
    """What a batch holds: `frames` of all videos, `placeholders` of visuals and `supervised_tokens`."""

    frames: int
    placeholders: int
    supervised_tokens: int


def check_batch(
    batch: Mapping[str, Any], *, video_token_id: int | None, image_token_id: int | None = None
) -> BatchCounts:
    """Refuse a batch that would train on nothing, or on text whose pixels are missing, and count its contents.

    Args:
        batch: `input_ids` (B, S), `labels` (B, S), and the pixel tensors, if any.
        video_token_id: Id of the video placeholder token; None for a model without videos.
        image_token_id: Id of the image placeholder token; None for a model without images.

    Returns:
        The counts of the batch.

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
            "is undefined. Give every row an assistant answer, and a max_length that does not cut the answers off."
        )
    if batch.get("mm_encoder_outputs") is None:
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


class VideoSFTCollator:
    """Turn rows with `messages` into a training batch: right padding, flat pixels, labels on the answers only.

    Args:
        processor: Processor with a chat template, `apply_chat_template` and a fast tokenizer.
        max_length: Most tokens of a row, visual placeholders included; longer rows are cut on the right, which is
            an error when the cut would hit a visual span or leave no supervised token. None never cuts.
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

    Raises:
        ValueError: Unknown `mask` or `label_rule`, or a tokenizer without the tokens that the rule names.

    Source: VideoChat-Flash training code, `preprocess_qwen` (for `label_rule="videochat_flash"`); LongVU training
    code, the same and `preprocess_llama3` (for `label_rule="longvu"`); LLaVA-ST training code, the same as the first
    (for `label_rule="llava_st"`).
    Differs: the originals hard-code 198 for the newline; here the tokenizer is asked, which is 198 for Qwen2. LongVU's
    further embeddings of token 0 behind the visual tokens are not made, and a text shorter than
    `blank_image_position` gets its image behind its last token instead of inside the padding.
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
    ) -> None:
        if mask not in _MASKS:
            raise ValueError(f"mask={mask!r} is unknown; use one of {_MASKS}.")
        if label_rule is not None and label_rule not in _LABEL_RULES:
            raise ValueError(f"label_rule={label_rule!r} is unknown; use None or one of {tuple(_LABEL_RULES)}.")
        if max_length is not None and max_length < 1:
            raise ValueError(f"max_length={max_length} must be at least 1 token, or None for no limit.")
        self.processor = processor
        self.max_length = max_length
        self.mask = mask
        self.label_rule = label_rule
        self.chat_template = chat_template
        self.processor_kwargs = dict(processor_kwargs or {})
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
        self._always_supervised = [] if label_rule is None else self._delimiter_ids(_LABEL_RULES[label_rule])

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
            ValueError: A row without messages or answer, or one that `max_length` would cut wrongly; the text names
                the row.
        """
        encoded = [self._encode_row(row, _describe_row(row, position)) for position, row in enumerate(rows)]
        batch = self._pad_sequences(encoded)
        batch.update(_concatenate_visuals(encoded, flat_videos=self._has_flat_videos))
        check_batch(batch, video_token_id=self.video_token_id, image_token_id=self.image_token_id)
        return batch

    def _encode_row(self, row: Mapping[str, Any], where: str) -> dict[str, torch.Tensor]:
        messages = normalize_messages(row, where=where)
        output = dict(
            self.processor.apply_chat_template(
                _copy_messages(messages),
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
        )
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
        if self.max_length is not None and input_ids_S.numel() > self.max_length:
            self._truncate(output, visual_S, where)
        if self.blank_image_position is not None and not visual_S.any():
            self._add_blank_image(output)
        return output

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
            _copy_messages(messages, with_media=False),
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            chat_template=self.chat_template,
        )

    def _visual_positions(self, input_ids_S: torch.Tensor) -> torch.Tensor:
        visual_S = torch.zeros_like(input_ids_S, dtype=torch.bool)
        for token_id in self._visual_ids:
            visual_S |= input_ids_S == token_id
        return visual_S

    def _truncate(self, output: dict[str, torch.Tensor], visual_S: torch.Tensor, where: str) -> None:
        """Cut the sequence tensors of a row to `max_length`, in place."""
        length, limit = visual_S.numel(), self.max_length
        num_visual = int(visual_S.sum())
        if visual_S[limit:].any():
            first, last = (int(visual_S.nonzero()[index]) for index in (0, -1))
            raise ValueError(
                f"{where} has {length} tokens, {num_visual} of them visual (positions {first} to {last}), and "
                f"max_length={limit} would cut inside the visual span. Use a smaller max_frames (or fps), a shorter "
                f"cut of the video, or max_length of at least {length}."
            )
        if not (output["labels"][0, :limit] != IGNORE_INDEX).any():
            raise ValueError(
                f"{where} has {length} tokens, {num_visual} of them visual, and max_length={limit} would cut its "
                f"whole answer. Use a smaller max_frames (or fps), a shorter question, or max_length={length} or more."
            )
        for key in ("input_ids", *_SEQUENCE_FILL):
            if key in output:
                output[key] = output[key][:, :limit]

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

    def _delimiter_ids(self, formats: Sequence[tuple[str, ...]]) -> list[int]:
        """Ids of the delimiters of the first format that the tokenizer knows."""
        tokenizer = self.processor.tokenizer
        broken = []
        for texts in formats:
            encoded = {text: tokenizer.encode(text, add_special_tokens=False) for text in texts}
            split = {text: len(token_ids) for text, token_ids in encoded.items() if len(token_ids) != 1}
            if not split:
                return [token_ids[0] for token_ids in encoded.values()]
            broken.append(next(iter(split.items())))
        text, num_tokens = broken[0]
        names = " or ".join(("ChatML tokenizer (Qwen2)", "Llama 3 tokenizer")[: len(formats)])
        raise ValueError(
            f"label_rule={self.label_rule!r} needs {text!r} to be one token, but this tokenizer makes {num_tokens} of "
            f"it. Use a {names}, or label_rule=None."
        )


def normalize_messages(row: Mapping[str, Any], *, where: str = "The row") -> list[dict[str, Any]]:
    """Bring the messages of a row to one form: lists of blocks, no None entries, every visual block with its source.

    Args:
        row: Row with a `messages` list; `videos` and `images` columns fill the blocks that have no source, in order.
        where: How errors name the row.

    Returns:
        New message dicts; the media objects themselves are shared with the row.

    Raises:
        ValueError: No messages, a message without role or content, or a number of media that does not match.
    """
    messages = row.get("messages")
    if not messages:
        raise ValueError(
            f"{where} has no `messages` (its keys: {sorted(row)}). Expected "
            '{"messages": [{"role": "user", "content": [{"type": "video", "path": ...}, {"type": "text", ...}]}, '
            '{"role": "assistant", "content": [...]}]}.'
        )
    media = {kind: list(row.get(f"{kind}s") or []) for kind in _VISUAL_SOURCES}
    normalized = []
    for position, message in enumerate(messages):
        if not isinstance(message, Mapping) or message.get("role") is None or message.get("content") is None:
            raise ValueError(
                f"{where}: message {position} must be a dict with `role` and `content`, got {message!r:.200}."
            )
        content = message["content"]
        blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
        normalized.append(
            {
                **{key: value for key, value in message.items() if value is not None},
                "content": [_complete_block(block, media, f"{where}: message {position}") for block in blocks],
            }
        )
    for kind, left in media.items():
        if left:
            raise ValueError(
                f"{where} has {len(left)} entries in `{kind}s` that no block takes. Write one "
                f'{{"type": "{kind}"}} block for each of them into the messages.'
            )
    return normalized


def _complete_block(block: Mapping[str, Any], media: dict[str, list[Any]], where: str) -> dict[str, Any]:
    # Arrow tables give every block the keys of all blocks, with None where a block had none.
    complete = {key: value for key, value in block.items() if value is not None}
    kind = complete.get("type")
    if kind in media and not any(key in complete for key in _VISUAL_SOURCES[kind]):
        if not media[kind]:
            raise ValueError(
                f"{where} has a {kind} block without a source. Give it one of the keys {_VISUAL_SOURCES[kind]}, "
                f"or an entry in the row's `{kind}s`."
            )
        complete[kind] = media[kind].pop(0)
    return complete


def _copy_messages(messages: list[dict[str, Any]], *, with_media: bool = True) -> list[dict[str, Any]]:
    # Templates and processors may change the dicts; the row must stay as the dataset gave it. Text alone needs no
    # pixels, which a processor might copy each time.
    return [
        {**message, "content": [_copy_block(block, with_media=with_media) for block in message["content"]]}
        for message in messages
    ]


def _copy_block(block: dict[str, Any], *, with_media: bool) -> dict[str, Any]:
    sources = () if with_media else _VISUAL_SOURCES.get(block.get("type"), ())
    return {key: "-" if key in sources else value for key, value in block.items()}


def _describe_row(row: Mapping[str, Any], position: int) -> str:
    name = row.get("id") if isinstance(row, Mapping) else None
    return f"Row {position} of the batch" + (f" (id {name!r})" if name is not None else "")


def _concatenate_visuals(
    encoded: list[dict[str, torch.Tensor]], *, flat_videos: bool = True
) -> dict[str, torch.Tensor]:
    """Put the pixel tensors of the rows one after another; flat videos become frames with counts."""
    has_grids = any("image_grids" in row for row in encoded)
    for row in encoded:
        if flat_videos:
            _flatten_videos(row)
        if has_grids and "pixel_values" in row and "image_grids" not in row:
            row["image_grids"] = torch.zeros(row["pixel_values"].shape[0], 2, dtype=torch.int64)
    batch = {}
    for key in {key: None for row in encoded for key in row if key not in {"input_ids", *_SEQUENCE_FILL}}:
        batch[key] = torch.cat([row[key] for row in encoded if key in row])
    return batch


def _flatten_videos(row: dict[str, torch.Tensor]) -> None:
    # Models with two towers bring the frames twice.
    for key in [key for key in row if key.startswith("pixel_values_videos") and row[key].ndim == 5]:
        num_videos, num_frames = row[key].shape[:2]
        row[key] = row[key].flatten(0, 1)  # (sum F, 3, height, width)
        row["video_num_frames"] = torch.full((num_videos,), num_frames, dtype=torch.int64)
