"""Generation with VideoChat-Flash: visual inputs are encoded once before the first step, or come already encoded.

Works alike on releases of transformers with and without their own hook for encoder outputs.
"""

import torch
from transformers import GenerationConfig
from transformers.cache_utils import Cache
from transformers.modeling_outputs import ModelOutput

from longvideo.modeling.layers.feature_files import check_encoded_video, feature_key, hash_tensors, hash_weights
from longvideo.modeling.layers.generation_calls import PlaceholderGenerationMixin, asked_assistant, name_arguments
from longvideo.modeling.layers.placeholders import find_placeholders
from longvideo.modeling.videochat_flash.encoded_video import EncodedVideo
from longvideo.modeling.videochat_flash.vision_videochat_flash import VideoChatFlashVisionOutput
from longvideo.modeling.videochat_flash.visual_dropout import build_plan

VISUAL_INPUTS = ("pixel_values", "image_grids", "pixel_values_videos", "video_num_frames")


class VideoChatFlashGenerationMixin(PlaceholderGenerationMixin):
    """`GenerationMixin` for a model with `get_video_features` and `get_image_features`."""

    def encoding_key(self) -> str:
        """Returns a hash of what turns pixels into features: settings and all weights of tower and projector."""
        config = self.config
        settings = f"{config.vision_config.to_json_string(use_diff=False)} {config.tokens_per_frame} "
        settings += f"{config.mm_local_num_frames} {config.vision_encode_type}"
        return hash_weights(settings, self.model.vision_tower, self.model.multi_modal_projector)

    @torch.no_grad()
    def encode_video(
        self,
        pixel_values_videos: torch.Tensor,
        video_num_frames: torch.Tensor | None = None,
        source_key: str | None = None,
    ) -> EncodedVideo:
        """Encodes videos once for many questions.

        Args:
            pixel_values_videos: see `get_video_features`.
            video_num_frames: see `get_video_features`.
            source_key: name of the source and its settings, see `video_source_key`; stored with the features.

        Returns:
            Features that `generate(encoded_video=...)` takes in place of pixels.
        """
        output = self.model.get_video_features(pixel_values_videos, video_num_frames, return_dict=True)
        num_frames = [len(groups) * self.config.mm_local_num_frames for groups in output.merge_groups]
        key = feature_key(hash_tensors(pixel_values_videos), self.encoding_key(), source_key)
        return EncodedVideo(output.pooler_output, output.merge_groups, num_frames, key)

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *args,
        encoded_video: EncodedVideo | None = None,
        **kwargs,
    ) -> ModelOutput | torch.LongTensor:
        """Generates as `GenerationMixin.generate` does.

        Args:
            inputs: input ids, as upstream.
            generation_config: as upstream.
            *args: as upstream.
            encoded_video: features from `encode_video`, in place of `pixel_values_videos`.
            **kwargs: as upstream; besides `visual_dropout` and the visual inputs of `forward`.

        Returns:
            As upstream.

        Raises:
            ValueError: an encoded video of another model, or visual dropout together with chunked prefill or assisted
                decoding.
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
            pooled = [x.to(self.device) for x in encoded_video.features]
            features["video"] = VideoChatFlashVisionOutput(pooler_output=pooled)
            kwargs.pop("video_num_frames", None)
        visual = {name: kwargs.pop(name) for name in VISUAL_INPUTS if kwargs.get(name) is not None}
        if features or visual:
            self._refuse_with_dropout(generation_config, kwargs)
        if "pixel_values_videos" in visual:
            features["video"] = self.model.get_video_features(
                visual["pixel_values_videos"], visual.get("video_num_frames"), return_dict=True
            )
        if "pixel_values" in visual:
            features["image"] = self.model.get_image_features(
                visual["pixel_values"], visual.get("image_grids"), return_dict=True
            )
        if features:
            kwargs["mm_encoder_outputs"] = features
        return super().generate(inputs, generation_config, **kwargs)

    def _refuse_with_dropout(self, generation_config: GenerationConfig | None, kwargs: dict) -> None:
        if build_plan(self.config, kwargs.get("visual_dropout")) is None:
            return
        given = generation_config or self.generation_config
        chunk = kwargs.get("prefill_chunk_size") or getattr(given, "prefill_chunk_size", None)
        if chunk:
            raise ValueError(
                f"prefill_chunk_size={chunk} cannot be combined with visual dropout: which tokens stay is decided "
                "over the whole prompt. Leave prefill_chunk_size unset or pass visual_dropout=False."
            )
        assistant = asked_assistant(kwargs, given, self.generation_config)
        if assistant is not None:
            raise ValueError(
                f"{assistant} cannot be combined with visual dropout: proposed tokens would be read together with the "
                "prompt, whose last token decides which visual tokens stay. Leave it unset or pass "
                "visual_dropout=False."
            )

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        next_sequence_length: int | None = None,
        past_key_values: Cache | None = None,
        attention_mask: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs,
    ) -> dict:
        """Leaves visual inputs out of every step but the first."""
        inputs = super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        features = kwargs.get("mm_encoder_outputs")
        # An assistant's first step is not announced as one; its cache is empty.
        is_cached = past_key_values is not None and past_key_values.get_seq_length() > 0
        if not is_first_iteration and is_cached and kwargs.get("use_cache", True):
            for name in (*VISUAL_INPUTS, "mm_encoder_outputs"):
                inputs.pop(name, None)
        elif features:
            inputs["mm_encoder_outputs"] = features
            if inputs.get("input_ids") is not None:
                inputs["input_ids"] = self._without_proposed(inputs["input_ids"], features)
        return inputs

    def _without_proposed(self, input_ids: torch.LongTensor, features: dict[str, ModelOutput]) -> torch.LongTensor:
        """Makes text of placeholders behind those of the prompt: prompt lookup proposes what the prompt holds."""
        for kind, output in features.items():
            mask = input_ids == self._placeholder_id(kind)
            num_features = sum(x.shape[:-1].numel() for x in output.pooler_output)
            if len(input_ids) == 1 and int(mask.sum()) > num_features:
                input_ids = input_ids.masked_fill(mask & (mask.cumsum(1) > num_features), 0)
        return input_ids

    def _placeholder_id(self, kind: str) -> int:
        return self.config.image_token_id if kind == "image" else self.config.video_token_id

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.LongTensor | None = None,
        **model_kwargs,
    ) -> tuple[torch.LongTensor, dict]:
        """Repeats each prompt with its own visual features, for beams and several return sequences."""
        features = model_kwargs.pop("mm_encoder_outputs", None)
        if features and expand_size > 1:
            embeds = model_kwargs.get("inputs_embeds")
            features = {
                kind: self._expand_features(kind, x, input_ids, embeds, expand_size) for kind, x in features.items()
            }
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        if features:
            model_kwargs["mm_encoder_outputs"] = features
        return input_ids, model_kwargs

    def _expand_features(
        self,
        kind: str,
        output: ModelOutput,
        input_ids: torch.LongTensor | None,
        inputs_embeds: torch.FloatTensor | None,
        expand_size: int,
    ) -> VideoChatFlashVisionOutput:
        mask = find_placeholders(
            self._placeholder_id(kind),
            input_ids=input_ids if inputs_embeds is None else None,
            inputs_embeds=inputs_embeds,
            embedding=self.get_input_embeddings(),
        )
        per_row = torch.cat(list(output.pooler_output)).split(mask.sum(1).tolist())
        return VideoChatFlashVisionOutput(pooler_output=[row for row in per_row for _ in range(expand_size)])

    def _get_candidate_generator(self, *args, model_kwargs: dict, assistant_model=None, **kwargs):
        """Gives an assistant the visual features where it can take them; another model reads placeholders as text."""
        given = dict(model_kwargs)
        if isinstance(assistant_model, VideoChatFlashGenerationMixin):
            ours, theirs = (x.config.text_config.hidden_size for x in (self, assistant_model))
            if given.get("mm_encoder_outputs") and ours != theirs:
                raise ValueError(
                    f"The assistant's decoder has the width {theirs}, this model's {ours}; an assistant gets this "
                    "model's visual features. Pass a VideoChat-Flash of the same width, or its decoder alone."
                )
        elif assistant_model is not None:
            for name in ("mm_encoder_outputs", "visual_dropout"):
                given.pop(name, None)
        return super()._get_candidate_generator(*args, model_kwargs=given, assistant_model=assistant_model, **kwargs)
