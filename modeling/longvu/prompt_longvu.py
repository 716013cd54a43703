"""Puts visual tokens into the prompt of LongVU: who gets which video, how long the texts are, what fits beside them.

Shapes: B batch, S sequence in ids, S' sequence with visual tokens, L text tokens of a question, D language width.
"""

from dataclasses import dataclass

import torch

from longvideo.modeling.layers.placeholders import InsertedSequence, find_placeholders, insert_features
from longvideo.modeling.longvu.insertion_longvu import (
    PAD_IDS,
    FrameRenderer,
    LongVUSelection,
    RowVisuals,
    TextRow,
    reduction_limits,
    render_rows,
    row_budget,
)
from longvideo.modeling.longvu.vision_longvu import VisualInputs, check_pixels, read_sizes

IGNORE_INDEX = -100


@dataclass
class PromptMarks:
    """Where the prompts of a batch lie, so that answers behind them choose nothing of what is seen.

    Args:
        mask: (B, S) bool, True for tokens of the prompt.
        room: (B,) int64 positions that are kept free for the answer, at least those that it has; None for these alone.
            Answers to one prompt that shall see the same need the same room.
    """

    mask: torch.Tensor
    room: torch.Tensor | None = None


class LongVUPromptMixin:
    """Insertion of images and videos for a model that encodes them (`LongVUVisionMixin`)."""

    def _renderer(self) -> FrameRenderer:
        return FrameRenderer(self.config, self.multi_modal_projector, self.image_newline)

    def _split_videos(self, inputs: VisualInputs) -> list[tuple[torch.Tensor, torch.Tensor, tuple[int, int]]]:
        """Returns per video its frames for both towers and its size."""
        pixels, pixels_dino = inputs.pixel_values_videos, inputs.pixel_values_videos_dino
        if pixels.ndim == 5:
            counts = [pixels.shape[1]] * pixels.shape[0]
            pixels = pixels.flatten(0, 1)
            pixels_dino = pixels_dino if pixels_dino is None else pixels_dino.flatten(0, 1)
        elif inputs.video_num_frames is None:
            raise ValueError(
                f"pixel_values_videos of shape {tuple(pixels.shape)} is a flat list of frames and needs "
                "video_num_frames, the number of frames of each video."
            )
        else:
            counts = [int(n) for n in inputs.video_num_frames]
        check_pixels(self.config, pixels, pixels_dino)
        if min(counts, default=1) < 1 or sum(counts) != len(pixels):
            raise ValueError(
                f"video_num_frames {counts} must be at least 1 each and add up to the {len(pixels)} frames of "
                f"pixel_values_videos, got {sum(counts)}."
            )
        sizes = read_sizes(inputs.video_sizes, len(counts), "video")
        return list(zip(pixels.split(counts), pixels_dino.split(counts), sizes, strict=True))

    def _embed(
        self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None, keep_BS: torch.Tensor | None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Returns embeddings (B, S, D), without meaning at placeholders and padding, and where placeholders are."""
        embedding = self.get_input_embeddings()
        ids = {"image": self.config.image_token_id, "video": self.config.video_token_id}
        masks = {
            kind: find_placeholders(token_id, input_ids=input_ids, inputs_embeds=inputs_embeds, embedding=embedding)
            for kind, token_id in ids.items()
        }
        if inputs_embeds is None:
            # Ids of placeholders and padding may lie beyond the table.
            unread = masks["image"] | masks["video"]
            unread = unread if keep_BS is None else unread | ~keep_BS
            inputs_embeds = embedding(input_ids.masked_fill(unread & (input_ids >= embedding.weight.shape[0]), 0))
        return inputs_embeds, masks

    def _match_visuals(
        self, masks: dict[str, torch.Tensor], inputs: VisualInputs
    ) -> tuple[list[RowVisuals], list[tuple]]:
        """Deals images and videos out to the samples; videos given as pixels wait to be encoded.

        Returns:
            The visuals of each sample, and for each video in prompt order its pixels (empty if all are encoded).
        """
        images, videos, waiting = inputs.encoded("image"), inputs.encoded("video"), []
        if inputs.pixel_values is not None:
            images = self.get_image_features(
                inputs.pixel_values, inputs.pixel_values_dino, inputs.image_sizes, return_dict=True
            ).visuals
        if inputs.pixel_values_videos is not None:
            waiting = self._split_videos(inputs)
        found = {
            "image": [(x, x.num_frames, x.size) for x in images or []],
            "video": [(x, x.num_frames, x.size) for x in videos or []] or [(None, len(x[0]), x[2]) for x in waiting],
        }
        for kind, mask in masks.items():
            if int(mask.sum()) != len(found[kind]):
                raise ValueError(
                    f"The prompt holds {int(mask.sum())} {kind} placeholder tokens but {len(found[kind])} {kind}s "
                    f"were given; each {kind} needs exactly one. Prepare text and {kind}s in one processor call and "
                    "pass all its outputs to the model."
                )
        remaining = {kind: iter(items) for kind, items in found.items()}
        rows = []
        for image_S, video_S in zip(masks["image"], masks["video"], strict=True):
            kinds = ["video" if video_S[i] else "image" for i in (image_S | video_S).nonzero()[:, 0].tolist()]
            dealt = [next(remaining[kind]) for kind in kinds]
            rows.append(RowVisuals(kinds, [x[0] for x in dealt], [x[1] for x in dealt], [x[2] for x in dealt]))
        return rows, waiting

    def _read_texts(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor,
        visual_BS: torch.Tensor,
        keep_BS: torch.Tensor | None,
        cached_B: list[int],
        reserve: int,
        labels: torch.Tensor | None = None,
        prompts: PromptMarks | None = None,
    ) -> list[TextRow]:
        """Counts and embeds the text of each sample, or of its prompt alone where that is marked."""
        texts = []
        keep_BS = torch.ones_like(visual_BS) if keep_BS is None else keep_BS
        for row, (visual_S, keep_S) in enumerate(zip(visual_BS, keep_BS, strict=True)):
            text_S = keep_S & ~visual_S
            free = reserve
            if prompts is not None:
                prompt_S = prompts.mask[row].bool()
                num_answer = int((text_S & ~prompt_S).sum())
                free = max(reserve, num_answer if prompts.room is None else int(prompts.room[row]), num_answer)
                text_S, keep_S = text_S & prompt_S, keep_S & prompt_S
            num_text = cached_B[row] + int(text_S.sum())
            counted = num_text
            if self.config.behaves("count_to_pad_id") and input_ids is not None:
                # Left padding is ours: the original pads on the right.
                ids = input_ids[row][int((keep_S | visual_S).int().argmax()) :]
                if prompts is not None:
                    ids = ids[: int((keep_S | visual_S).sum())]
                pad_id = PAD_IDS["llama" if "llama" in self.config.text_config.model_type else "qwen2"]
                ends = (ids == pad_id).nonzero()[:, 0]
                counted = cached_B[row] + (int(ends[0]) if len(ends) else len(ids))
            elif self.config.behaves("budget_without_newlines"):
                counted = num_text + int(visual_S.sum())
            after = text_S.clone()
            if visual_S.any():
                after[: int(visual_S.nonzero()[-1, 0])] = False
            if self.config.query_without_answer and labels is not None:
                after = after & (labels[row] == IGNORE_INDEX)
            query = inputs_embeds[row][after if after.any() else text_S].detach()
            texts.append(TextRow(num_text, counted, query, free, row))
        return texts

    def insert_visuals(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        inputs: VisualInputs,
        *,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        prompts: PromptMarks | None = None,
        num_cached: int = 0,
        cached_mask: torch.Tensor | None = None,
        num_new_tokens: int | None = None,
        padding_side: str | None = None,
    ) -> tuple[InsertedSequence, tuple[LongVUSelection, ...]]:
        """Chooses what each question sees of its images and videos and puts it in place of the placeholders.

        Args:
            input_ids: (B, S) with one placeholder per image and video.
            inputs_embeds: (B, S, D) in place of `input_ids`.
            inputs: pixels or features.
            attention_mask: (B, S), 0 on padding.
            labels: (B, S).
            prompts: where the prompts lie, if they alone decide what is seen.
            num_cached: positions in the cache before these ids.
            cached_mask: (B, num_cached) their mask; None for no padding among them.
            num_new_tokens: positions to leave free; None, and always with `fixed_reserve`, the configured
                `inference_max_length`.
            padding_side: of the result; None for right where the mask pads on the right, else left.

        Returns:
            The sequence, and per image and video what was chosen.

        Raises:
            ValueError: placeholders that do not fit the inputs, or a text that leaves no room.
        """
        config = self.config
        if attention_mask is not None and attention_mask.ndim != 2:
            raise ValueError(
                f"With images or videos attention_mask must be (batch, sequence), got {tuple(attention_mask.shape)}."
            )
        keep_BS = None if attention_mask is None else attention_mask.bool()
        inputs_embeds, masks = self._embed(input_ids, inputs_embeds, keep_BS)
        visual_BS = masks["image"] | masks["video"]
        batch = len(inputs_embeds)
        cached_B = [num_cached] * batch if cached_mask is None else cached_mask.sum(1).tolist()
        reserve = config.inference_max_length
        if num_new_tokens is not None and not config.behaves("fixed_reserve"):
            reserve = num_new_tokens
        rows, waiting = self._match_visuals(masks, inputs)
        texts = self._read_texts(input_ids, inputs_embeds, visual_BS, keep_BS, cached_B, reserve, labels, prompts)
        self._encode_waiting(rows, texts, waiting)
        features, selections = render_rows(self._renderer(), rows, texts)
        if padding_side is None:
            padding_side = "right" if keep_BS is not None and not keep_BS[:, -1].all() else "left"
        inserted = insert_features(
            inputs_embeds,
            visual_BS,
            features,
            attention_mask=attention_mask,
            labels=labels,
            padding_side=padding_side,
            max_length=max(config.context_length - max(cached_B), 0)
            if config.behaves("truncate_on_overflow")
            else None,
        )
        return inserted, selections

    def _encode_waiting(self, rows: list[RowVisuals], texts: list[TextRow], waiting: list[tuple]) -> None:
        """Encodes videos given as pixels, knowing how long their texts are."""
        for row, text in zip(rows, texts, strict=True):
            row_budget(self.config, row, text)
        remaining = iter(waiting)
        for row, text in zip(rows, texts, strict=True):
            limits = reduction_limits(self.config, row, text)
            for i in row.videos if waiting else ():
                pixels, pixels_dino, size = next(remaining)
                visual = self._encode_video(pixels, pixels_dino, size, limits[i])
                visual.reduced = True
                row.visuals[i] = visual
