"""Generation with VideoChat-Flash: visual inputs are encoded once before the first step, or come already encoded.

Works alike on releases of transformers with and without their own hook for encoder outputs.
"""

import torch
from transformers import GenerationMixin
from transformers.modeling_outputs import ModelOutput

from longvideo.modeling.layers.feature_files import check_encoded_video, feature_key, hash_tensors, hash_weights
from longvideo.modeling.videochat_flash.encoded_video import EncodedVideo
from longvideo.modeling.videochat_flash.vision_videochat_flash import VideoChatFlashVisionOutput
from longvideo.modeling.videochat_flash.visual_dropout import build_plan

VISUAL_INPUTS = ("pixel_values", "image_grids", "pixel_values_videos", "video_num_frames")


class VideoChatFlashGenerationMixin(GenerationMixin):
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
        output = self.model.get_video_features(
            pixel_values_videos.to(self.device),
            None if video_num_frames is None else video_num_frames,
            return_dict=True,
        )
        num_frames = [len(groups) * self.config.mm_local_num_frames for groups in output.merge_groups]
        key = feature_key(hash_tensors(pixel_values_videos), self.encoding_key(), source_key)
        return EncodedVideo(output.pooler_output, output.merge_groups, num_frames, key)

    @torch.no_grad()
    def generate(self, *args, encoded_video: EncodedVideo | None = None, **kwargs) -> ModelOutput | torch.LongTensor:
        """Generates as `GenerationMixin.generate` does.

        Args:
            *args: as upstream.
            encoded_video: features from `encode_video`, in place of `pixel_values_videos`.
            **kwargs: as upstream; besides `visual_dropout` and the visual inputs of `forward`.

        Returns:
            As upstream.

        Raises:
            ValueError: an encoded video of another model, or chunked prefill together with visual dropout.
        """
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
        inputs = {name: kwargs.pop(name) for name in VISUAL_INPUTS if kwargs.get(name) is not None}
        if "pixel_values_videos" in inputs:
            features["video"] = self.model.get_video_features(
                inputs["pixel_values_videos"].to(self.device), inputs.get("video_num_frames"), return_dict=True
            )
        if "pixel_values" in inputs:
            features["image"] = self.model.get_image_features(
                inputs["pixel_values"].to(self.device), inputs.get("image_grids"), return_dict=True
            )
        if features:
            kwargs["mm_encoder_outputs"] = features
            self._refuse_chunked_dropout(args, kwargs)
        return super().generate(*args, **kwargs)

    def _refuse_chunked_dropout(self, args: tuple, kwargs: dict) -> None:
        given = kwargs.get("generation_config") or (args[1] if len(args) > 1 else None) or self.generation_config
        chunk = kwargs.get("prefill_chunk_size") or getattr(given, "prefill_chunk_size", None)
        if chunk and build_plan(self.config, kwargs.get("visual_dropout")) is not None:
            raise ValueError(
                f"prefill_chunk_size={chunk} cannot be combined with visual dropout: which tokens stay is decided "
                "over the whole prompt. Leave prefill_chunk_size unset or pass visual_dropout=False."
            )

    def prepare_inputs_for_generation(self, *args, is_first_iteration: bool | None = False, **kwargs) -> dict:
        """Leaves visual inputs out of every step but the first."""
        inputs = super().prepare_inputs_for_generation(*args, is_first_iteration=is_first_iteration, **kwargs)
        if not is_first_iteration and kwargs.get("use_cache", True):
            for name in (*VISUAL_INPUTS, "mm_encoder_outputs"):
                inputs.pop(name, None)
        return inputs

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
            features = {kind: self._expand_features(kind, x, input_ids, expand_size) for kind, x in features.items()}
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        if features:
            model_kwargs["mm_encoder_outputs"] = features
        return input_ids, model_kwargs

    def _expand_features(
        self, kind: str, output: ModelOutput, input_ids: torch.LongTensor, expand_size: int
    ) -> VideoChatFlashVisionOutput:
        token_id = self.config.image_token_id if kind == "image" else self.config.video_token_id
        flat = torch.cat(list(output.pooler_output))
        per_row = flat.split((input_ids == token_id).sum(1).tolist())
        return VideoChatFlashVisionOutput(pooler_output=[row for row in per_row for _ in range(expand_size)])
