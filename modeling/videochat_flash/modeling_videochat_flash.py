"""VideoChat-Flash: clips merged to 16 tokens per frame, visual tokens dropped on the way through the decoder.

Paper: VideoChat-Flash: Hierarchical Compression for Long-Context Video Modeling (arXiv 2501.00574).
Original read: OpenGVLab/VideoChat-Flash (Apache-2.0), `llava_qwen_flash.py`, `llava_arch.py`,
`mm_projector_builder.py`.
Deviations: placeholders are expanded by the processor; frames pass the tower in chunks; see README.md in this folder.

Shapes: B batch, S sequence in, S' sequence that is left, V visual tokens, D language width.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast, ModelOutput
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults

from longvideo.modeling.encoders.internvideo2.modeling_internvideo2 import InternVideo2VisionModel
from longvideo.modeling.encoders.umt.modeling_umt import UMTVisionModel
from longvideo.modeling.layers.placeholders import find_placeholders, scatter_features
from longvideo.modeling.videochat_flash.configuration_videochat_flash import VideoChatFlashConfig
from longvideo.modeling.videochat_flash.generation_videochat_flash import VideoChatFlashGenerationMixin
from longvideo.modeling.videochat_flash.vision_videochat_flash import (
    VideoChatFlashProjector,
    VideoChatFlashVisionMixin,
    VideoChatFlashVisionOutput,
)
from longvideo.modeling.videochat_flash.visual_dropout import VisualDropoutPlan, VisualDropoutStage, build_plan
from longvideo.modeling.videochat_flash.visual_dropout_decoder import decode_with_visual_dropout, dropout_memory

TOWERS = {model.config_class.model_type: model for model in (UMTVisionModel, InternVideo2VisionModel)}


@dataclass
class VideoChatFlashModelOutput(BaseModelOutputWithPast):
    """Decoder output.

    Args:
        labels: (B, S') labels of the tokens that are left, when labels were given.
        visual_dropout: one entry per stage of visual dropout that ran.
        image_hidden_states: (V, D) features of all images.
        video_hidden_states: (V, D) features of all videos.
    """

    labels: torch.Tensor | None = None
    visual_dropout: tuple[VisualDropoutStage, ...] | None = None
    image_hidden_states: torch.Tensor | None = None
    video_hidden_states: torch.Tensor | None = None


@dataclass
class VideoChatFlashCausalLMOutput(ModelOutput):
    """Language model output; with visual dropout `logits` and `hidden_states` cover the tokens that are left.

    Args:
        loss: next-token loss when labels were given.
        logits: (B, S', vocabulary).
        past_key_values: cache, layers of different length with visual dropout.
        hidden_states: per layer when asked for.
        attentions: per layer when asked for.
        labels: (B, S') labels of the tokens that are left, when labels were given.
        visual_dropout: one entry per stage of visual dropout that ran.
        image_hidden_states: (V, D) features of all images.
        video_hidden_states: (V, D) features of all videos.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    labels: torch.Tensor | None = None
    visual_dropout: tuple[VisualDropoutStage, ...] | None = None
    image_hidden_states: torch.Tensor | None = None
    video_hidden_states: torch.Tensor | None = None


class VideoChatFlashPreTrainedModel(PreTrainedModel):
    """Base class: configuration, weight names and what the models support."""

    config: VideoChatFlashConfig
    config_class = VideoChatFlashConfig
    base_model_prefix = "model"
    input_modalities = ("video", "image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["Qwen2DecoderLayer", "UMTLayer", "InternVideo2Layer", "SiglipEncoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = False
    # Pixels may lie on any device: they are moved a chunk at a time.
    moves_pixels = True


class VideoChatFlashModel(VideoChatFlashVisionMixin, VideoChatFlashPreTrainedModel):
    """Tower, token merging, projector and decoder, without a language modelling head.

    Args:
        config: model configuration.

    Raises:
        ValueError: the text configuration is not a decoder of the Llama family.
    """

    def __init__(self, config: VideoChatFlashConfig):
        super().__init__(config)
        tower = TOWERS.get(config.vision_config.model_type, AutoModel)
        self.vision_tower = (tower.from_config if tower is AutoModel else tower._from_config)(config.vision_config)
        if config.vision_config.model_type == "siglip_vision_model":
            # The features are those before the last norm.
            self.vision_tower.post_layernorm = nn.Identity()
        self.multi_modal_projector = VideoChatFlashProjector(config)
        self.language_model = AutoModel.from_config(config.text_config)
        missing = [name for name in ("layers", "norm", "rotary_emb") if not hasattr(self.language_model, name)]
        if missing:
            raise ValueError(
                f"A text model of type {config.text_config.model_type!r} has no {', '.join(missing)}. VideoChat-Flash "
                "needs a decoder of the Llama family (llama, qwen2, qwen3, mistral, ...)."
            )
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    # ------------------------------------------------------------------ text and vision together

    def _embed(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        features: dict[str, torch.Tensor | None],
        *,
        is_prefill: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the embeddings with visual features in place, (B, S, D), and where they are, (B, S) bool."""
        embedding = self.get_input_embeddings()
        token_ids = {"image": self.config.image_token_id, "video": self.config.video_token_id}
        masks = {
            kind: find_placeholders(token_id, input_ids=input_ids, inputs_embeds=inputs_embeds, embedding=embedding)
            for kind, token_id in token_ids.items()
        }
        if inputs_embeds is None:
            # Placeholder ids may lie beyond the table.
            beyond = (masks["image"] | masks["video"]) & (input_ids >= embedding.weight.shape[0])
            inputs_embeds = embedding(input_ids.masked_fill(beyond, 0))
        visual = torch.zeros_like(masks["image"])
        for kind, mask in masks.items():
            if features[kind] is not None:
                inputs_embeds = scatter_features(inputs_embeds, mask, features[kind], kind=kind)
                visual = visual | mask
            elif is_prefill and input_ids is not None and mask.any():
                raise ValueError(
                    f"The prompt holds {int(mask.sum())} {kind} placeholder tokens but no {kind} was given. Pass the "
                    f"{kind} to the processor together with the text and all its outputs to the model."
                )
        return inputs_embeds, visual

    def _collect_features(
        self,
        pixel_values: torch.Tensor | None,
        image_grids: torch.Tensor | None,
        pixel_values_videos: torch.Tensor | None,
        video_num_frames: torch.Tensor | None,
        mm_encoder_outputs: dict[str, ModelOutput] | None,
    ) -> dict[str, torch.Tensor | None]:
        """Returns the features of all images and of all videos, (V, D) each, encoding what is not encoded yet."""
        outputs = dict(mm_encoder_outputs or {})
        for kind, pixels in (("image", pixel_values), ("video", pixel_values_videos)):
            if pixels is not None and outputs.get(kind) is not None:
                raise ValueError(f"Both pixels and encoded features were given for the {kind}s; pass one of them.")
        if pixel_values is not None:
            outputs["image"] = self.get_image_features(pixel_values, image_grids, return_dict=True)
        if pixel_values_videos is not None:
            outputs["video"] = self.get_video_features(pixel_values_videos, video_num_frames, return_dict=True)
        features = {}
        for kind in ("image", "video"):
            found = None if outputs.get(kind) is None else outputs[kind].pooler_output
            if found is not None:
                found = found.flatten(0, -2) if isinstance(found, torch.Tensor) else torch.cat(list(found))
            features[kind] = found
        return features

    @merge_with_config_defaults
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        pixel_values_videos: torch.FloatTensor | None = None,
        video_num_frames: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        image_grids: torch.LongTensor | None = None,
        mm_encoder_outputs: dict[str, ModelOutput] | None = None,
        visual_dropout: bool | dict | VisualDropoutPlan | None = None,
        visual_dropout_labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> VideoChatFlashModelOutput:
        """Runs text and visual features through the decoder.

        Args:
            input_ids: (B, S) with one placeholder per visual token.
            attention_mask: (B, cached + S), 1 for real tokens.
            position_ids: (B, S).
            past_key_values: cache.
            inputs_embeds: (B, S, D) in place of `input_ids`.
            pixel_values_videos: see `get_video_features`.
            video_num_frames: see `get_video_features`.
            pixel_values: see `get_image_features`.
            image_grids: see `get_image_features`.
            mm_encoder_outputs: features encoded before, `{"video": ..., "image": ...}`.
            visual_dropout: None (as configured), bool, or dict with `type`, `layers`, `ratios`.
            visual_dropout_labels: (B, S) labels, gathered along when tokens are dropped.
            use_cache: whether a cache is returned.
            **kwargs: passed to the decoder.

        Returns:
            Decoder output; with visual dropout only for the tokens that are left.

        Raises:
            ValueError: placeholders and features do not agree.
        """
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("Pass exactly one of input_ids and inputs_embeds.")
        is_prefill = past_key_values is None or past_key_values.get_seq_length() == 0
        features = self._collect_features(
            pixel_values, image_grids, pixel_values_videos, video_num_frames, mm_encoder_outputs
        )
        inputs_embeds, visual = self._embed(input_ids, inputs_embeds, features, is_prefill=is_prefill)
        found = any(x is not None for x in features.values())
        plan = build_plan(self.config, visual_dropout) if is_prefill and found else None
        if use_cache is None:
            use_cache = getattr(self.language_model.config, "use_cache", True)
        if self.training and getattr(self.language_model, "gradient_checkpointing", False):
            use_cache = False
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.language_model.config)

        common = {"attention_mask": attention_mask, "position_ids": position_ids, "past_key_values": past_key_values}
        shown = {"image_hidden_states": features["image"], "video_hidden_states": features["video"]}
        if plan is None and dropout_memory(past_key_values) is None:
            outputs = self.language_model(inputs_embeds=inputs_embeds, use_cache=use_cache, **common, **kwargs)
            return VideoChatFlashModelOutput(**outputs, labels=visual_dropout_labels, **shown)
        kwargs.pop("return_dict", None)
        dropped = decode_with_visual_dropout(
            self.language_model,
            inputs_embeds,
            **common,
            use_cache=bool(use_cache),
            visual_BS=visual,
            labels=visual_dropout_labels,
            plan=plan,
            **kwargs,
        )
        return VideoChatFlashModelOutput(
            last_hidden_state=dropped.last_hidden_state,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=dropped.hidden_states,
            labels=dropped.labels if dropped.stages else visual_dropout_labels,
            visual_dropout=dropped.stages or None,
            **shown,
        )


class VideoChatFlashForConditionalGeneration(VideoChatFlashPreTrainedModel, VideoChatFlashGenerationMixin):
    """VideoChat-Flash with a language modelling head: answers questions about videos and images.

    Args:
        config: model configuration.
    """

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: VideoChatFlashConfig):
        super().__init__(config)
        self.model = VideoChatFlashModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.lm_head = value

    def get_video_features(
        self, pixel_values_videos: torch.Tensor, video_num_frames: torch.Tensor | None = None, **kwargs
    ) -> VideoChatFlashVisionOutput:
        """Encodes videos, see `VideoChatFlashModel.get_video_features`."""
        return self.model.get_video_features(pixel_values_videos, video_num_frames, **kwargs)

    def get_image_features(
        self, pixel_values: torch.Tensor, image_grids: torch.Tensor | None = None, **kwargs
    ) -> VideoChatFlashVisionOutput:
        """Encodes images, see `VideoChatFlashModel.get_image_features`."""
        return self.model.get_image_features(pixel_values, image_grids, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        pixel_values_videos: torch.FloatTensor | None = None,
        video_num_frames: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        image_grids: torch.LongTensor | None = None,
        mm_encoder_outputs: dict[str, ModelOutput] | None = None,
        visual_dropout: bool | dict | VisualDropoutPlan | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> VideoChatFlashCausalLMOutput:
        """Runs the model and, with labels, its loss.

        Args:
            labels: (B, S) next-token labels, -100 ignored; gathered along when visual tokens are dropped.
            logits_to_keep: last positions (or their indices) to compute logits for, 0 for all.

        The other arguments are those of `VideoChatFlashModel.forward`.

        Returns:
            Loss, logits and cache; with visual dropout for the tokens that are left, left padded.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            pixel_values_videos=pixel_values_videos,
            video_num_frames=video_num_frames,
            pixel_values=pixel_values,
            image_grids=image_grids,
            mm_encoder_outputs=mm_encoder_outputs,
            visual_dropout=visual_dropout,
            visual_dropout_labels=labels,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        wanted = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, wanted, :])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=outputs.labels, vocab_size=self.config.text_config.vocab_size, **kwargs
            )
        return VideoChatFlashCausalLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            labels=outputs.labels,
            visual_dropout=outputs.visual_dropout,
            image_hidden_states=outputs.image_hidden_states,
            video_hidden_states=outputs.video_hidden_states,
        )


AutoModel.register(VideoChatFlashConfig, VideoChatFlashModel, exist_ok=True)
AutoModelForImageTextToText.register(VideoChatFlashConfig, VideoChatFlashForConditionalGeneration, exist_ok=True)
AutoModelForMultimodalLM.register(VideoChatFlashConfig, VideoChatFlashForConditionalGeneration, exist_ok=True)

__all__ = ["VideoChatFlashForConditionalGeneration", "VideoChatFlashModel", "VideoChatFlashPreTrainedModel"]
