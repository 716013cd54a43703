"""Generation with CrossVLLM: in one granularity, with the prompt's visual features put in place once.

The prompt goes to the decoder as embeddings, of which each step takes the part that is not cached yet. So beams,
chunked prefill, assisted and uncached generation work alike on every release of transformers.

Shapes: B batch, S sequence, D language width.
"""

from collections.abc import Sequence

import torch
from torch.nn import functional as F
from transformers import GenerationConfig
from transformers.cache_utils import Cache
from transformers.modeling_outputs import ModelOutput

from longvideo.modeling.crossvllm.encoded_video_crossvllm import CrossVLLMEncodedVideo
from longvideo.modeling.crossvllm.frame_cache_crossvllm import FrameFeatureCache
from longvideo.modeling.layers.cached_prompts import known_length
from longvideo.modeling.layers.feature_files import check_encoded_video, feature_key, hash_tensors
from longvideo.modeling.layers.generation_calls import PlaceholderGenerationMixin

VISUAL_INPUTS = ("pixel_values", "pixel_values_videos", "video_num_frames", "vision_features", "mm_encoder_outputs")


class CrossVLLMGenerationMixin(PlaceholderGenerationMixin):
    """`GenerationMixin` for a model with granularities."""

    # ------------------------------------------------------------------ encoding once

    def encoding_key(self) -> str:
        """Returns a hash of what turns pixels into an encoded video: the tower's settings and weights."""
        return self.model.vision_key()

    @torch.no_grad()
    def encode_video(
        self,
        pixel_values_videos: torch.Tensor,
        video_num_frames: torch.Tensor | None = None,
        source_key: str | None = None,
        *,
        cache: FrameFeatureCache | None = None,
        sources: Sequence[str] | None = None,
        frame_indices: Sequence[Sequence[int]] | None = None,
    ) -> CrossVLLMEncodedVideo:
        """Encodes videos once for many questions in both granularities.

        Args:
            pixel_values_videos: see `get_vision_features`.
            video_num_frames: see `get_vision_features`.
            source_key: name of the source and its settings, see `video_source_key`; stored with the features.
            cache: see `get_vision_features`.
            sources: see `get_vision_features`.
            frame_indices: see `get_vision_features`.

        Returns:
            Features that `generate(encoded_video=...)` takes in place of pixels.

        Raises:
            ValueError: see `get_vision_features`.
        """
        features = self.get_vision_features(
            pixel_values_videos.to(self.device),
            video_num_frames,
            cache=cache,
            sources=sources,
            frame_indices=frame_indices,
        )
        key = feature_key(hash_tensors(pixel_values_videos), self.encoding_key(), source_key)
        return CrossVLLMEncodedVideo(features, [len(x) for x in features], key)

    def use_encoded_video(
        self,
        encoded_video: CrossVLLMEncodedVideo | None,
        vision_features: Sequence[torch.Tensor] | None,
        pixel_values_videos: torch.Tensor | None,
    ) -> Sequence[torch.Tensor] | None:
        """Returns the features of videos; checks that an encoded one is this model's and the only input."""
        if encoded_video is None:
            return vision_features
        check_encoded_video(encoded_video.key, self.encoding_key, pixels=pixel_values_videos, features=vision_features)
        return encoded_video.to(self.device).features

    # ------------------------------------------------------------------ generation

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *args,
        granularity: str | None = None,
        encoded_video: CrossVLLMEncodedVideo | None = None,
        **kwargs,
    ) -> ModelOutput | torch.LongTensor:
        """Generates as `GenerationMixin.generate` does.

        Args:
            inputs: input ids, as upstream.
            generation_config: as upstream.
            *args: as upstream.
            granularity: "coarse" or "fine" for this call; None for the active one. The placeholders of the prompt
                have to be those of the same granularity.
            encoded_video: features from `encode_video`, in place of `pixel_values_videos`.
            **kwargs: as upstream; besides the visual inputs of `forward`.

        Returns:
            As upstream: the ids that were given, then the new tokens.

        Raises:
            ValueError: an unknown granularity, an encoded video of another model, or placeholders and features that
                do not agree.
        """
        if inputs is not None:
            kwargs["input_ids"] = inputs
        visual = {name: kwargs.pop(name, None) for name in VISUAL_INPUTS}
        # An assistant gets an empty one: the prompt's embeddings hold the features already.
        visual["mm_encoder_outputs"] = visual["mm_encoder_outputs"] or None
        visual["vision_features"] = self.use_encoded_video(
            encoded_video, visual["vision_features"], visual["pixel_values_videos"]
        )
        visual = {name: x for name, x in visual.items() if x is not None}
        with self.use_granularity(granularity):
            if visual:
                kwargs = self._prepare_prompt(kwargs, visual)
            return super().generate(None, generation_config, *args, **kwargs)

    def _prepare_prompt(self, kwargs: dict, visual: dict) -> dict:
        """Returns the arguments of `generate` with the prompt's embeddings in place of visual inputs."""
        ids, embeds = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
        given = embeds if embeds is not None else ids
        if given is None:
            raise ValueError("Images and videos need input_ids or inputs_embeds with their placeholders.")
        visual = {name: x.to(self.device) if isinstance(x, torch.Tensor) else x for name, x in visual.items()}
        mask, cache = kwargs.get("attention_mask"), kwargs.get("past_key_values")
        num_cached = 0 if cache is None else int(cache.get_seq_length())
        num_known = known_length(num_cached, given.shape[1], None if mask is None else mask.shape[1])
        new_BSD, _ = self.model.embed_prompt(
            None if embeds is not None else ids[:, num_known:].to(self.device),
            None if embeds is None else embeds[:, num_known:],
            required=num_cached == 0,
            **visual,
        )
        # Empty positions stand for what the cache holds.
        prompt_BSD = F.pad(new_BSD, (0, 0, num_cached, 0))
        if embeds is not None:
            kwargs = {**kwargs, "inputs_embeds": prompt_BSD if num_known or not num_cached else new_BSD}
        return {**kwargs, "prompt_embeds": prompt_BSD}

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        next_sequence_length: int | None = None,
        past_key_values: Cache | None = None,
        attention_mask: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        is_first_iteration: bool | None = False,
        prompt_embeds: torch.FloatTensor | None = None,
        **kwargs,
    ) -> dict:
        """Takes embeddings of the prompt where it is not cached yet."""
        inputs = super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        num_cached = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        ids = inputs.get("input_ids")
        if prompt_embeds is None and ids is not None and kwargs.get("use_cache") is False and not is_first_iteration:
            # What was written is read again in every step; a placeholder in it stands for nothing.
            inputs["inputs_embeds"], inputs["input_ids"] = self.get_input_embeddings()(ids), None
        if prompt_embeds is None or num_cached >= prompt_embeds.shape[1] or ids is None:
            return inputs
        part = prompt_embeds[:, num_cached : num_cached + ids.shape[1]]
        rest = self.get_input_embeddings()(ids[:, part.shape[1] :])
        inputs["inputs_embeds"] = torch.cat([part, rest.to(part)], dim=1)
        inputs["input_ids"] = None
        return inputs

    def _get_candidate_generator(self, *args, model_kwargs: dict, assistant_model=None, **kwargs):
        """Gives an assistant the prompt where it can take it; another model reads placeholders as text."""
        given = dict(model_kwargs)
        if assistant_model is not None and given.get("prompt_embeds") is not None:
            width = given["prompt_embeds"].shape[-1]
            if not isinstance(assistant_model, CrossVLLMGenerationMixin):
                given.pop("prompt_embeds")
            elif assistant_model.config.text_config.hidden_size != width:
                raise ValueError(
                    f"The assistant's decoder has the width {assistant_model.config.text_config.hidden_size}, this "
                    f"model's {width}; an assistant gets this model's visual features. Pass a CrossVLLM of the same "
                    "width, or its decoder alone."
                )
        return super()._get_candidate_generator(*args, model_kwargs=given, assistant_model=assistant_model, **kwargs)
