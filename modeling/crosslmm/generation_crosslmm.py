"""Generation with CrossLMM: a prompt's visual features are put in place once, before the first step.

The prompt goes to the decoder as embeddings, of which each step takes the part that is not cached yet, together with
the original tokens of all its visuals; the cache knows how far they have come. So beams, chunked prefill, assisted and
uncached generation work alike on every release of transformers.

Shapes: B batch, S sequence, D language width.
"""

import torch
from transformers import GenerationConfig
from transformers.cache_utils import Cache
from transformers.modeling_outputs import ModelOutput

from longvideo.modeling.crosslmm.encoded_video_crosslmm import CrossLMMEncodedVideo
from longvideo.modeling.crosslmm.prompt_crosslmm import CrossLMMPrompt
from longvideo.modeling.layers.cached_prompts import known_length
from longvideo.modeling.layers.feature_files import check_encoded_video, feature_key, hash_tensors, hash_weights
from longvideo.modeling.layers.generation_calls import PlaceholderGenerationMixin

VISUAL_INPUTS = ("pixel_values", "pixel_values_videos", "video_num_frames")
ENCODING_SETTINGS = (
    "tokens_per_frame",
    "merge_mode",
    "vision_feature_layer",
    "projector_norm",
    "projector_hidden_act",
    "kv_source",
)


class CrossLMMGenerationMixin(PlaceholderGenerationMixin):
    """`GenerationMixin` for a model whose prompts hold visual features that look up their original tokens."""

    # ------------------------------------------------------------------ encoding once

    def encoding_key(self) -> str:
        """Returns a hash of what turns pixels into features: settings and all weights of tower and projector."""
        config, model = self.config, self.model
        settings = " ".join(f"{name}={getattr(config, name)}" for name in ENCODING_SETTINGS)
        settings += f" memory={bool(config.cross_attention_layers)} "
        settings += config.vision_config.to_json_string(use_diff=False)
        return hash_weights(settings, model.vision_tower, model.multi_modal_projector)

    @torch.no_grad()
    def encode_video(
        self,
        pixel_values_videos: torch.Tensor,
        video_num_frames: torch.Tensor | None = None,
        source_key: str | None = None,
    ) -> CrossLMMEncodedVideo:
        """Encodes videos once for many questions.

        Args:
            pixel_values_videos: see `get_video_features`.
            video_num_frames: see `get_video_features`.
            source_key: name of the source and its settings, see `video_source_key`; stored with the features.

        Returns:
            Features that `generate(encoded_video=...)` takes in place of pixels.

        Raises:
            ValueError: see `get_video_features`.
        """
        output = self.get_video_features(pixel_values_videos.to(self.device), video_num_frames, return_dict=True)
        key = feature_key(hash_tensors(pixel_values_videos), self.encoding_key(), source_key)
        return CrossLMMEncodedVideo(output.pooler_output, output.memory, output.num_frames, key)

    def use_encoded_video(
        self,
        encoded_video: CrossLMMEncodedVideo | None,
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
        encoded_video: CrossLMMEncodedVideo | None = None,
        **kwargs,
    ) -> ModelOutput | torch.LongTensor:
        """Generates as `GenerationMixin.generate` does.

        Args:
            inputs: input ids, as upstream.
            generation_config: as upstream.
            *args: as upstream.
            encoded_video: features from `encode_video`, in place of `pixel_values_videos`.
            **kwargs: as upstream; besides the visual inputs of `forward`.

        Returns:
            As upstream: the ids that were given, then the new tokens.

        Raises:
            ValueError: an encoded video of another model, placeholders and features that do not agree, or a static
                cache together with visual inputs.
        """
        if inputs is not None:
            kwargs["input_ids"] = inputs
        visual = {name: kwargs.pop(name, None) for name in VISUAL_INPUTS}
        visual = {name: x.to(self.device) for name, x in visual.items() if x is not None}
        visual["mm_encoder_outputs"] = self.use_encoded_video(
            encoded_video, kwargs.pop("mm_encoder_outputs", None), visual.get("pixel_values_videos")
        )
        if len(visual) > 1 or visual["mm_encoder_outputs"]:
            kwargs = self._prepare_prompt(kwargs, visual)
        return super().generate(None, generation_config, *args, **kwargs)

    def _prepare_prompt(self, kwargs: dict, visual: dict) -> dict:
        """Returns the arguments of `generate` with the prompt in place of visual inputs."""
        ids, embeds = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
        given = embeds if embeds is not None else ids
        if given is None:
            raise ValueError("Images and videos need input_ids or inputs_embeds with their placeholders.")
        mask, cache = kwargs.get("attention_mask"), kwargs.get("past_key_values")
        num_cached = 0 if cache is None else int(cache.get_seq_length())
        num_known = known_length(num_cached, given.shape[1], None if mask is None else mask.shape[1])
        prompt = self.model.embed_prompt(
            None if embeds is not None else ids[:, num_known:].to(self.device),
            None if embeds is None else embeds[:, num_known:],
            required=num_cached == 0,
            **visual,
        ).behind(num_cached)
        if embeds is not None:
            shown = prompt.embeds if num_known or not num_cached else prompt.embeds[:, num_cached:]
            kwargs = {**kwargs, "inputs_embeds": shown}
        return {**kwargs, "prompt": prompt}

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        next_sequence_length: int | None = None,
        past_key_values: Cache | None = None,
        attention_mask: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        is_first_iteration: bool | None = False,
        prompt: CrossLMMPrompt | None = None,
        **kwargs,
    ) -> dict:
        """Takes embeddings of the prompt, and its visuals, where it is not cached yet."""
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
        if prompt is None and ids is not None and kwargs.get("use_cache") is False and not is_first_iteration:
            # What was written is read again in every step; a placeholder in it stands for nothing.
            inputs["inputs_embeds"], inputs["input_ids"] = self.get_input_embeddings()(ids), None
        if prompt is None or num_cached >= prompt.length:
            return inputs
        length = (inputs["inputs_embeds"] if ids is None else ids).shape[1]
        part = prompt.embeds[:, num_cached : num_cached + length]
        if ids is not None:
            rest = self.get_input_embeddings()(ids[:, part.shape[1] :])
            inputs["inputs_embeds"] = torch.cat([part, rest.to(part)], dim=1)
            inputs["input_ids"] = None
        if prompt.visual_mask is not None:
            mask = prompt.visual_mask[:, num_cached : num_cached + length]
            inputs["visual_mask"] = torch.nn.functional.pad(mask, (0, length - mask.shape[1]))
            inputs["visual_inputs"] = prompt.visuals
        return inputs

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.LongTensor | None = None,
        **model_kwargs,
    ) -> tuple[torch.LongTensor, dict]:
        """Repeats each prompt, for beams and several return sequences."""
        prompt = model_kwargs.pop("prompt", None)
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        if prompt is not None:
            model_kwargs["prompt"] = prompt if expand_size == 1 else prompt.expand(expand_size)
        return input_ids, model_kwargs

    def _get_candidate_generator(self, *args, model_kwargs: dict, assistant_model=None, **kwargs):
        """Gives an assistant the prompt where it can take it; another model reads placeholders as text."""
        given = dict(model_kwargs)
        if assistant_model is not None and given.get("prompt") is not None:
            width = given["prompt"].embeds.shape[-1]
            if not isinstance(assistant_model, CrossLMMGenerationMixin):
                for name in ("prompt", "mm_encoder_outputs"):
                    given.pop(name, None)
            elif assistant_model.config.text_config.hidden_size != width:
                raise ValueError(
                    f"The assistant's decoder has the width {assistant_model.config.text_config.hidden_size}, this "
                    f"model's {width}; an assistant gets this model's visual features. Pass a CrossLMM of the same "
                    "width, or its decoder alone."
                )
        return super()._get_candidate_generator(*args, model_kwargs=given, assistant_model=assistant_model, **kwargs)
