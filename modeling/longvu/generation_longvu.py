"""Generation with LongVU: visual tokens are put into the prompt once, then ordinary generation runs on embeddings.

The ids keep one placeholder per image and video, so that what `generate` returns starts with the ids it was given. A
cache therefore holds more positions than there are ids; what is needed to go on from it is kept on the cache.

Shapes: B batch, S sequence in ids, S' sequence with visual tokens, C cached positions, D language width.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from transformers import GenerationConfig
from transformers.cache_utils import Cache
from transformers.modeling_outputs import ModelOutput

from longvideo.modeling.layers.feature_files import check_encoded_video, feature_key, hash_weights
from longvideo.modeling.layers.generation_calls import PlaceholderGenerationMixin, asked_assistant, name_arguments
from longvideo.modeling.longvu.encoded_video_longvu import LongVUEncodedVideo
from longvideo.modeling.longvu.vision_longvu import FrameDigest, VisualInputs

VISUAL_INPUTS = (
    "pixel_values_videos",
    "pixel_values_videos_dino",
    "video_num_frames",
    "video_sizes",
    "pixel_values",
    "pixel_values_dino",
    "image_sizes",
)
# What decides which features a video has before any question.
ENCODING_SETTINGS = (
    "vision_grid_size",
    "image_token_len",
    "dino_position_interpolation",
    "temporal_reduction",
    "temporal_window",
    "dino_threshold",
    "max_kept_frames",
    "highres",
    "lowres_token",
    "context_length",
    "image_newline",
)
DEFAULT_NEW_TOKENS = 20  # transformers' own, when nothing is asked for


@dataclass
class PromptSizes:
    """How long a prompt is in ids and in positions.

    Args:
        num_ids: ids, S.
        num_positions: positions with visual tokens, S'.
        selections: per image and video, which parts the decoder sees.
    """

    num_ids: int
    num_positions: int
    selections: tuple | None = None


@dataclass
class CachedPrompt:
    """What a cache holds up to the end of its last prompt with visual tokens.

    Args:
        num_ids: ids from the start.
        num_positions: positions from the start.
        mask: (B, num_positions), or None where nothing is padding.
        selections: per image and video of that prompt, which parts the decoder saw.
    """

    num_ids: int
    num_positions: int
    mask: torch.Tensor | None
    selections: tuple | None

    def ids_in(self, num_cached: int) -> int:
        """Returns how many ids stand behind that many cached positions."""
        return num_cached - (self.num_positions - self.num_ids)


def cached_prompt(cache: Cache | None) -> CachedPrompt | None:
    """Returns what `remember_prompt` stored on a cache."""
    return getattr(cache, "longvu_prompt", None)


def remember_prompt(cache: Cache | None, sizes: PromptSizes, num_cached: int, mask: torch.Tensor | None) -> None:
    """Stores on a cache how ids and positions relate after this prompt.

    Args:
        cache: where to store it; nothing happens without one.
        sizes: of the prompt that is being added.
        num_cached: positions in the cache before it.
        mask: (B, num_cached + S') or None.
    """
    if cache is None:
        return
    before = cached_prompt(cache)
    num_ids = sizes.num_ids + (num_cached if before is None else before.ids_in(num_cached))
    cache.longvu_prompt = CachedPrompt(num_ids, num_cached + sizes.num_positions, mask, sizes.selections)


def pending_selections(cache: Cache | None, num_cached: int) -> tuple | None:
    """Returns what was chosen for a prompt that `remember_prompt` announced and the decoder has not read yet.

    Args:
        cache: cache of the call.
        num_cached: positions in it before the call.
    """
    prompt = cached_prompt(cache)
    return None if prompt is None or num_cached >= prompt.num_positions else prompt.selections


def split_mask(
    attention_mask: torch.Tensor | None, num_cached: int, num_new: int
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Splits a mask over cache and new tokens.

    Args:
        attention_mask: (B, num_cached + num_new) or None.
        num_cached: cached positions.
        num_new: new ids.

    Returns:
        (B, num_cached) and (B, num_new), or None twice.

    Raises:
        ValueError: a mask of another length.
    """
    if attention_mask is None:
        return None, None
    if attention_mask.ndim != 2 or attention_mask.shape[1] != num_cached + num_new:
        raise ValueError(
            f"attention_mask has the shape {tuple(attention_mask.shape)}, but {num_cached} cached positions and "
            f"{num_new} new ids need (batch, {num_cached + num_new}). A cache that holds visual tokens is longer than "
            "its ids: pass the attention_mask that forward returned, with ones for the new ids behind."
        )
    return attention_mask[:, :num_cached], attention_mask[:, num_cached:]


def join_mask(cached_mask: torch.Tensor | None, mask: torch.Tensor, num_cached: int) -> torch.Tensor:
    """Puts the mask of the cache, all ones where it is None, before that of new positions."""
    if cached_mask is None:
        cached_mask = mask.new_ones(len(mask), num_cached)
    return torch.cat([cached_mask.to(mask), mask], dim=1)


class LongVUGenerationMixin(PlaceholderGenerationMixin):
    """`GenerationMixin` for a model whose prompt grows by visual tokens."""

    # ------------------------------------------------------------------ encoding once

    def encoding_key(self) -> str:
        """Returns a hash of what turns pixels into features: settings and all weights of towers and connector."""
        config, model = self.config, self.model
        settings = " ".join(f"{name}={getattr(config, name)}" for name in ENCODING_SETTINGS)
        settings += f" {config.behaves('budget_without_newlines')}"
        settings += "".join(x.to_json_string(use_diff=False) for x in (config.vision_config, config.dino_config))
        connector = (model.vision_projectors, model.vision_sampler, model.vision_query)
        return hash_weights(settings, model.vision_tower, model.dino_tower, *connector)

    @torch.no_grad()
    def encode_video(
        self,
        pixel_values_videos: torch.Tensor | None = None,
        pixel_values_videos_dino: torch.Tensor | None = None,
        video_num_frames: torch.Tensor | None = None,
        video_sizes: torch.Tensor | None = None,
        *,
        windows: Iterable[dict[str, torch.Tensor]] | None = None,
        num_frames: int | None = None,
        video_size: tuple[int, int] | None = None,
        source_key: str | None = None,
    ) -> LongVUEncodedVideo:
        """Encodes videos once for many questions, from all their pixels or window by window.

        Args:
            pixel_values_videos: see `get_video_features`.
            pixel_values_videos_dino: see `get_video_features`.
            video_num_frames: see `get_video_features`.
            video_sizes: see `get_video_features`.
            windows: in place of pixels, consecutive pieces of one video, of any lengths: dicts with
                `pixel_values_videos` and `pixel_values_videos_dino`. Only features of frames that survive stay; of
                windows with a method `again`, which starts them anew, never more than `max_kept_frames` of them.
            num_frames: frames of all windows together, needed with them.
            video_size: with windows, what the model reads as (width, height); None for square frames.
            source_key: name of the source and its settings, see `video_source_key`; stored with the features.

        Returns:
            Features that `generate(encoded_video=...)` takes in place of pixels. Grids and compression are chosen per
            question; so is temporal reduction for videos that fit beside short texts only.

        Raises:
            ValueError: neither or both of pixels and windows, or frames that do not agree with what was announced.
        """
        if (windows is None) == (pixel_values_videos is None):
            raise ValueError("Pass exactly one of pixel_values_videos and windows.")
        digest = FrameDigest()
        if windows is None:
            output = self.model.get_video_features(
                pixel_values_videos, pixel_values_videos_dino, video_num_frames, video_sizes, return_dict=True
            )
            visuals = output.visuals
            digest.add(*(x.reshape(-1, *x.shape[-3:]) for x in (pixel_values_videos, pixel_values_videos_dino)))
        else:
            if num_frames is None or num_frames < 1:
                raise ValueError(f"With windows num_frames must be the frames of the whole video, got {num_frames}.")
            size = (1, 1) if video_size is None else (int(video_size[0]), int(video_size[1]))
            limit = self.model.widest_limit(size)
            visuals = [self.model._encode_stream(windows, num_frames, size, limit, digest)]
        key = feature_key(digest.hexdigest(), self.encoding_key(), source_key)
        return LongVUEncodedVideo(visuals, key)

    # ------------------------------------------------------------------ generation

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *args,
        encoded_video: LongVUEncodedVideo | None = None,
        **kwargs,
    ) -> ModelOutput | torch.LongTensor:
        """Generates as `GenerationMixin.generate` does.

        Args:
            inputs: input ids, as upstream.
            generation_config: as upstream.
            *args: as upstream.
            encoded_video: features from `encode_video`, in place of pixels.
            **kwargs: as upstream; besides the visual inputs of `forward`.

        Returns:
            As upstream: the ids that were given (placeholders not repeated), then the new tokens.

        Raises:
            ValueError: an encoded video of another model, a text that leaves no room, or, with images or videos,
                `prefill_chunk_size` or assisted decoding.
        """
        kwargs = name_arguments(args, kwargs)
        features = dict(kwargs.pop("mm_encoder_outputs", None) or {})
        if encoded_video is not None:
            check_encoded_video(
                encoded_video.key,
                self.encoding_key,
                pixels=kwargs.get("pixel_values_videos"),
                features=features.get("video"),
            )
            features["video"] = encoded_video.as_output()
            kwargs.pop("video_num_frames", None)
            kwargs.pop("video_sizes", None)
        visual = {name: kwargs.pop(name, None) for name in VISUAL_INPUTS}
        visual = {name: value for name, value in visual.items() if value is not None}
        if features:
            visual["mm_encoder_outputs"] = features
        given = kwargs.get("past_key_values")
        if not visual and cached_prompt(given) is None:
            return super().generate(inputs, generation_config, **kwargs)
        if inputs is not None:
            kwargs["input_ids"] = inputs
        kwargs = self._prepare_prompt(kwargs, visual, generation_config)
        return super().generate(None, generation_config, **kwargs)

    def _prepare_prompt(self, kwargs: dict, visual: dict, generation_config: GenerationConfig | None) -> dict:
        """Returns the arguments of `generate` with the prompt as embeddings."""
        given = generation_config or self.generation_config
        if kwargs.get("prefill_chunk_size") or getattr(given, "prefill_chunk_size", None):
            raise ValueError(
                "prefill_chunk_size cannot be used with images or videos: their tokens are put in place over the "
                "whole prompt. Leave it unset."
            )
        assistant = asked_assistant(kwargs, given, self.generation_config)
        if assistant is not None:
            raise ValueError(
                f"{assistant} cannot be used with images or videos: their tokens take positions that have no ids, "
                "which assisted decoding goes by. Leave it unset."
            )
        kwargs = {**kwargs, "position_ids": None}
        input_ids, inputs_embeds = kwargs.get("input_ids"), kwargs.pop("inputs_embeds", None)
        if input_ids is not None and inputs_embeds is not None:
            raise ValueError("Pass exactly one of input_ids and inputs_embeds together with images or videos.")
        mask, cache = kwargs.get("attention_mask"), kwargs.get("past_key_values")
        if mask is None and input_ids is not None:
            mask = self._mask_of_padding(input_ids, given)
        num_cached = 0 if cache is None else cache.get_seq_length()
        cached_mask = None
        if num_cached:
            if input_ids is None:
                raise ValueError("A cache with visual tokens needs the input_ids of the whole conversation.")
            cached_mask, mask, num_known = self._split_conversation(input_ids, mask, cache, num_cached)
            input_ids = input_ids[:, num_known:]
        asked = self._asked_new_tokens(kwargs, given)
        inserted, selections = self.model.insert_visuals(
            None if input_ids is None else input_ids.to(self.device),
            inputs_embeds,
            VisualInputs(**visual),
            attention_mask=None if mask is None else mask.to(self.device),
            num_cached=num_cached,
            cached_mask=cached_mask,
            num_new_tokens=asked,
            padding_side="left",
        )
        embeds = inserted.inputs_embeds
        num_ids = embeds.shape[1] if input_ids is None else input_ids.shape[1]
        kwargs["prompt_sizes"] = PromptSizes(num_ids, embeds.shape[1], selections)
        if num_cached:
            # Upstream takes embeddings of the whole sequence and cuts off what is cached.
            embeds = torch.cat([embeds.new_zeros(len(embeds), num_cached, embeds.shape[2]), embeds], dim=1)
        kwargs["inputs_embeds"] = embeds
        kwargs["attention_mask"] = join_mask(cached_mask, inserted.attention_mask, num_cached)
        if asked is None:
            self._turn_length_into_new_tokens(kwargs, given, embeds.shape[1])
        return kwargs

    def _mask_of_padding(self, input_ids: torch.Tensor, given: GenerationConfig) -> torch.Tensor | None:
        """Guesses padding from ids as upstream does when no mask is given."""
        pad = given.pad_token_id if given.pad_token_id is not None else self.generation_config.pad_token_id
        eos = given.eos_token_id if given.eos_token_id is not None else self.generation_config.eos_token_id
        if pad is None or pad in (eos if isinstance(eos, list) else [eos]) or not (input_ids == pad).any():
            return None
        return (input_ids != pad).long()

    def _split_conversation(
        self, input_ids: torch.Tensor, mask: torch.Tensor | None, cache: Cache, num_cached: int
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, int]:
        """Finds where the ids of a whole conversation leave the cache.

        Returns:
            The mask of the cached positions, the mask of the new ids, and the number of ids in the cache.
        """
        prompt = cached_prompt(cache) or CachedPrompt(num_cached, num_cached, None, None)
        num_known = prompt.ids_in(num_cached)
        if num_cached < prompt.num_positions or input_ids.shape[1] <= num_known:
            raise ValueError(
                f"The cache holds {num_cached} positions for {num_known} ids (visual tokens included), but input_ids "
                f"has {input_ids.shape[1]}. Pass the ids of the whole conversation: what generate returned, then the "
                "new turn."
            )
        if mask is None and prompt.mask is None:
            return None, None, num_known
        mask = torch.ones_like(input_ids) if mask is None else mask
        start = prompt.mask
        if start is None:
            start = mask.new_ones(len(mask), prompt.num_positions)
            if prompt.num_ids == prompt.num_positions:
                start = mask[:, : prompt.num_ids]
        return torch.cat([start.to(mask), mask[:, prompt.num_ids : num_known]], dim=1), mask[:, num_known:], num_known

    def _asked_new_tokens(self, kwargs: dict, given: GenerationConfig) -> int | None:
        """Returns how many new tokens there may be; None where only a total length was given."""
        for source in (kwargs.get("max_new_tokens"), given.max_new_tokens, self.generation_config.max_new_tokens):
            if source is not None:
                return source
        if self._asked_length(kwargs, given) is not None:
            return None
        return DEFAULT_NEW_TOKENS

    def _asked_length(self, kwargs: dict, given: GenerationConfig) -> int | None:
        lengths = (kwargs.get("max_length"), given.max_length, self.generation_config.max_length)
        return next((x for x in lengths if x is not None), None)

    def _turn_length_into_new_tokens(self, kwargs: dict, given: GenerationConfig, num_positions: int) -> None:
        length = self._asked_length(kwargs, given)
        if length <= num_positions:
            raise ValueError(
                f"max_length is {length}, but text and visual tokens already take {num_positions} positions. Pass "
                "max_new_tokens instead."
            )
        kwargs.pop("max_length", None)
        kwargs["max_new_tokens"] = length - num_positions

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        next_sequence_length: int | None = None,
        past_key_values: Cache | None = None,
        attention_mask: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        is_first_iteration: bool | None = False,
        prompt_sizes: PromptSizes | None = None,
        **kwargs,
    ) -> dict:
        """Leaves visual inputs out of every step but the first, and notes on the cache how long the prompt is."""
        if prompt_sizes is not None and is_first_iteration and past_key_values is not None:
            num_cached = past_key_values.get_seq_length()
            mask = attention_mask if attention_mask is not None and attention_mask.ndim == 2 else None
            remember_prompt(past_key_values, prompt_sizes, num_cached, mask)
        inputs = super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        if not is_first_iteration and kwargs.get("use_cache", True):
            for name in (*VISUAL_INPUTS, "mm_encoder_outputs"):
                inputs.pop(name, None)
        return inputs
