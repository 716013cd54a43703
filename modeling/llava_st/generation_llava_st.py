"""Generation with LLaVA-ST: a prompt's visual features and coordinates are put in place once, before the first step.

The prompt goes to the decoder as embeddings, of which each step takes the part that is not cached yet. So beams,
chunked prefill, assisted and uncached generation need nothing of their own, on every release of transformers.

Shapes: B batch, S sequence, D language width.
"""

import torch
from transformers import GenerationConfig, GenerationMixin
from transformers.cache_utils import Cache
from transformers.modeling_outputs import ModelOutput

from longvideo.modeling.layers.cached_prompts import known_length
from longvideo.modeling.layers.feature_files import check_encoded_video, feature_key, hash_tensors, hash_weights
from longvideo.modeling.llava_st.encoded_video_llava_st import LlavaSTEncodedVideo

VISUAL_INPUTS = ("pixel_values", "pixel_values_videos")
ENCODING_SETTINGS = (
    "num_frames",
    "packer_num_heads",
    "spatial_factor",
    "temporal_factor",
    "packer_query",
    "use_packer",
    "use_lape",
    "lape_interpolate_frames",
    "splice_fast_stream",
    "projector_hidden_act",
)


class LlavaSTGenerationMixin(GenerationMixin):
    """`GenerationMixin` for a model whose prompts hold blocks of visual features and continuous coordinates."""

    # ------------------------------------------------------------------ encoding once

    def encoding_key(self) -> str:
        """Returns a hash of what turns pixels into features: settings and all weights that do so."""
        config, model = self.config, self.model
        settings = " ".join(f"{name}={getattr(config, name)}" for name in ENCODING_SETTINGS)
        settings += config.vision_config.to_json_string(use_diff=False)
        rows = ()
        if config.use_lape and config.num_coordinate_tokens:
            rows = (model.input_rows(), model.output_rows(self.output_rows()))
        return hash_weights(settings, model.vision_tower, model.multi_modal_projector, model.packer, *rows)

    @torch.no_grad()
    def encode_video(self, pixel_values_videos: torch.Tensor, source_key: str | None = None) -> LlavaSTEncodedVideo:
        """Encodes videos once for many questions.

        Args:
            pixel_values_videos: see `get_video_features`.
            source_key: name of the source and its settings, see `video_source_key`; stored with the features.

        Returns:
            Features that `generate(encoded_video=...)` takes in place of pixels.

        Raises:
            ValueError: see `get_video_features`.
        """
        output = self.get_video_features(pixel_values_videos.to(self.device), return_dict=True)
        key = feature_key(hash_tensors(pixel_values_videos), self.encoding_key(), source_key)
        frames = [pixel_values_videos.shape[1]] * len(output.pooler_output)
        return LlavaSTEncodedVideo(output.pooler_output, frames, key)

    def use_encoded_video(
        self,
        encoded_video: LlavaSTEncodedVideo | None,
        mm_encoder_outputs: dict[str, ModelOutput] | None,
        pixel_values_videos: torch.Tensor | None,
    ) -> dict[str, ModelOutput]:
        """Returns encoder outputs with an encoded video in them; checks that it is this model's and the only one."""
        features = dict(mm_encoder_outputs or {})
        if encoded_video is not None:
            check_encoded_video(
                encoded_video.key, self.encoding_key, pixels=pixel_values_videos, features=features.get("video")
            )
            features["video"] = encoded_video.to(self.device).as_output()
        return features

    # ------------------------------------------------------------------ generation

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *args,
        encoded_video: LlavaSTEncodedVideo | None = None,
        **kwargs,
    ) -> ModelOutput | torch.LongTensor:
        """Generates as `GenerationMixin.generate` does.

        Args:
            inputs: input ids, as upstream.
            generation_config: as upstream.
            *args: as upstream.
            encoded_video: features from `encode_video`, in place of `pixel_values_videos`.
            **kwargs: as upstream; besides the visual inputs and `coordinate_values` of `forward`.

        Returns:
            As upstream: the ids that were given, then the new tokens.

        Raises:
            ValueError: an encoded video of another model, or positions, features and values that do not agree.
        """
        if inputs is not None:
            kwargs["input_ids"] = inputs
        features = self.use_encoded_video(
            encoded_video, kwargs.pop("mm_encoder_outputs", None), kwargs.get("pixel_values_videos")
        )
        pixels = {name: kwargs.pop(name, None) for name in VISUAL_INPUTS}
        pixels = {name: x.to(self.device) for name, x in pixels.items() if x is not None}
        values = kwargs.pop("coordinate_values", None)
        if features or pixels or values is not None:
            kwargs = self._prepare_prompt(kwargs, values, mm_encoder_outputs=features, **pixels)
        with self.all_tokens_counted():
            return super().generate(None, generation_config, *args, **kwargs)

    def compute_transition_scores(self, *args, **kwargs) -> torch.Tensor:
        """Computes scores of generated tokens as upstream does, over all columns of the logits."""
        with self.all_tokens_counted():
            return super().compute_transition_scores(*args, **kwargs)

    def _prepare_prompt(self, kwargs: dict, values: torch.Tensor | None, **visual) -> dict:
        """Returns the arguments of `generate` with the embeddings of the prompt beside its ids."""
        ids, embeds = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
        given = embeds if embeds is not None else ids
        if given is None:
            raise ValueError(
                "Images, videos and coordinate_values need input_ids or inputs_embeds that they belong to."
            )
        mask, cache = kwargs.get("attention_mask"), kwargs.get("past_key_values")
        num_cached = 0 if cache is None else int(cache.get_seq_length())
        num_known = known_length(num_cached, given.shape[1], None if mask is None else mask.shape[1])
        prompt = self.model.embed_prompt(
            None if embeds is not None else ids[:, num_known:].to(self.device),
            None if embeds is None else embeds[:, num_known:],
            coordinate_values=None if values is None else values[:, num_known:].to(self.device),
            features=self.model.collect_features(output_rows=self.output_rows(), **visual),
            required=num_cached == 0,
        )
        if num_cached:
            prompt = torch.cat([prompt.new_zeros(len(prompt), num_cached, prompt.shape[2]), prompt], dim=1)
        if embeds is not None:
            return {**kwargs, "inputs_embeds": prompt if num_known or not num_cached else prompt[:, num_cached:]}
        return {**kwargs, "prompt_embeds": prompt}

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
        ids = inputs.get("input_ids")
        num_cached = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        if prompt_embeds is None or ids is None or num_cached >= prompt_embeds.shape[1]:
            return inputs
        part = prompt_embeds[:, num_cached : num_cached + ids.shape[1]]
        rest = self.model.embed_ids(ids[:, part.shape[1] :])
        inputs["inputs_embeds"] = torch.cat([part, rest.to(part)], dim=1)
        inputs["input_ids"] = None
        return inputs
