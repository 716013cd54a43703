"""CrossLMM: few merged tokens per frame in the decoder, which look up the original ones by dual cross-attention.

Paper: CrossLMM: Decoupling Long Video Sequences from LMMs via Dual Cross-Attention Mechanisms (arXiv 2505.17020).
Original code: none is public. README.md in this folder lists what the paper leaves open and what was decided.

Shapes: B batch, S sequence, V visual tokens, D language width.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast, ModelOutput
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, logging
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults

from longvideo.modeling.crosslmm.building_crosslmm import build_from_parts, enter_stage_2
from longvideo.modeling.crosslmm.configuration_crosslmm import CrossLMMConfig
from longvideo.modeling.crosslmm.decoder_patch import init_cross_attention, patch_decoder, patched_layers
from longvideo.modeling.crosslmm.encoded_video_crosslmm import CrossLMMEncodedVideo
from longvideo.modeling.crosslmm.generation_crosslmm import CrossLMMGenerationMixin
from longvideo.modeling.crosslmm.prompt_crosslmm import KINDS, CrossLMMPrompt, gather_visuals, stack_features
from longvideo.modeling.crosslmm.visibility import VisualInputs
from longvideo.modeling.crosslmm.vision_crosslmm import (
    CrossLMMProjector,
    CrossLMMVisionMixin,
    CrossLMMVisionOutput,
    build_tower,
)
from longvideo.modeling.crosslmm.visual_cache import prepare_visual_memory
from longvideo.modeling.layers.placeholders import find_placeholders, scatter_features

logger = logging.get_logger(__name__)


@dataclass
class CrossLMMModelOutput(BaseModelOutputWithPast):
    """Decoder output.

    Args:
        image_hidden_states: (V, D) merged tokens of all images.
        video_hidden_states: (V, D) merged tokens of all videos.
    """

    image_hidden_states: torch.Tensor | None = None
    video_hidden_states: torch.Tensor | None = None


@dataclass
class CrossLMMCausalLMOutput(ModelOutput):
    """Language model output.

    Args:
        loss: next-token loss when labels were given.
        logits: (B, S, vocabulary).
        past_key_values: cache; behind the decoder's layers it holds those of visual keys.
        hidden_states: per layer when asked for.
        attentions: per layer when asked for; those of cross-attention are not among them.
        image_hidden_states: (V, D) merged tokens of all images.
        video_hidden_states: (V, D) merged tokens of all videos.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    image_hidden_states: torch.Tensor | None = None
    video_hidden_states: torch.Tensor | None = None


class CrossLMMPreTrainedModel(PreTrainedModel):
    """Base class: configuration, weight names and what the models support."""

    config: CrossLMMConfig
    config_class = CrossLMMConfig
    base_model_prefix = "model"
    input_modalities = ("video", "image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["Qwen2DecoderLayer", "SiglipEncoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = False
    _supports_attention_backend = True
    _can_compile_fullgraph = False

    def initialize_weights(self) -> None:
        for part in self.modules():
            # Below a class that is not its own, upstream passes over modules without own parameters: towers have some.
            if part is not self and isinstance(part, PreTrainedModel) and not part.is_custom_code():
                part.initialize_weights()
        super().initialize_weights()
        with torch.no_grad():
            for layer in patched_layers(self):
                init.copy_(layer.dual_cross_attention.query_norm.weight, layer.post_attention_layernorm.weight)
        init_cross_attention(self, self.config)

    def _adjust_missing_and_unexpected_keys(self, loading_info) -> None:
        # A stage-1 checkpoint has no T2V; that all of it starts anew, with closed gates, is no reason for a warning.
        super()._adjust_missing_and_unexpected_keys(loading_info)
        new = {name for name in self.state_dict() if "dual_cross_attention.t2v" in name}
        if new and new == set(loading_info.missing_keys):
            loading_info.missing_keys = set()
            logger.info("The checkpoint has no T2V cross-attention (stage 1); it starts anew with closed gates.")


class CrossLMMModel(CrossLMMVisionMixin, CrossLMMPreTrainedModel):
    """Tower, token merge, projector and patched decoder, without a language modelling head.

    Args:
        config: model configuration.

    Raises:
        ValueError: the decoder's layers do not have the parts that cross-attention is put between.
    """

    def __init__(self, config: CrossLMMConfig):
        super().__init__(config)
        self.vision_tower = build_tower(config)
        self.multi_modal_projector = CrossLMMProjector(config)
        self.language_model = patch_decoder(AutoModel.from_config(config.text_config), config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    # ------------------------------------------------------------------ text and vision together

    def _encode(
        self,
        pixel_values: torch.Tensor | None,
        pixel_values_videos: torch.Tensor | None,
        video_num_frames: torch.Tensor | None,
        mm_encoder_outputs: dict[str, ModelOutput] | None,
    ) -> dict[str, ModelOutput | None]:
        """Returns what the encoder gave for images and videos, encoding what is not encoded yet."""
        outputs = {kind: (mm_encoder_outputs or {}).get(kind) for kind in KINDS}
        for kind, pixels in (("image", pixel_values), ("video", pixel_values_videos)):
            if pixels is not None and outputs[kind] is not None:
                raise ValueError(f"Both pixels and encoded features were given for the {kind}s; pass one of them.")
        if pixel_values is not None:
            outputs["image"] = self.get_image_features(pixel_values, return_dict=True)
        if pixel_values_videos is not None:
            outputs["video"] = self.get_video_features(pixel_values_videos, video_num_frames, return_dict=True)
        return outputs

    def embed_prompt(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None = None,
        *,
        pixel_values: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        video_num_frames: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, ModelOutput] | None = None,
        required: bool = True,
    ) -> CrossLMMPrompt:
        """Returns embeddings with visual features in place, and what cross-attention reads.

        Args:
            input_ids: (B, S) with one placeholder per merged token, or None with `inputs_embeds`.
            inputs_embeds: (B, S, D); placeholders are found by their embeddings.
            pixel_values: see `get_image_features`.
            pixel_values_videos: see `get_video_features`.
            video_num_frames: see `get_video_features`.
            mm_encoder_outputs: features encoded before, `{"video": ..., "image": ...}`.
            required: whether placeholders without features are an error, where there are ids.

        Returns:
            The prompt.

        Raises:
            ValueError: placeholders and features do not agree.
        """
        outputs = self._encode(pixel_values, pixel_values_videos, video_num_frames, mm_encoder_outputs)
        found = any(output is not None for output in outputs.values())
        if inputs_embeds is not None and not found:
            return CrossLMMPrompt(inputs_embeds)
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
        features = {kind: stack_features(output) for kind, output in outputs.items()}
        for kind, mask in masks.items():
            if features[kind] is not None:
                inputs_embeds = scatter_features(inputs_embeds, mask, torch.cat(features[kind]), kind=kind)
                visual = visual | mask
            elif required and input_ids is not None and mask.any():
                raise ValueError(
                    f"The prompt holds {int(mask.sum())} {kind} placeholder tokens but no {kind} was given. Pass the "
                    f"{kind} to the processor together with the text and all its outputs to the model."
                )
        if not found:
            return CrossLMMPrompt(inputs_embeds)
        return CrossLMMPrompt(inputs_embeds, visual, gather_visuals(outputs, masks, self.config), features)

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
        mm_encoder_outputs: dict[str, ModelOutput] | None = None,
        visual_mask: torch.BoolTensor | None = None,
        visual_inputs: VisualInputs | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CrossLMMModelOutput:
        """Runs text and visual features through the decoder.

        A prompt can be given in pieces: `embed_prompt` once, then slices of its `embeds` and `visual_mask` with all of
        its `visuals`, and the cache of the piece before. `generate(prefill_chunk_size=...)` does so.

        Args:
            input_ids: (B, S) with one placeholder per merged token.
            attention_mask: (B, cached + S), 1 for real tokens.
            position_ids: (B, S).
            past_key_values: cache.
            inputs_embeds: (B, S, D) in place of `input_ids`.
            pixel_values_videos: see `get_video_features`.
            video_num_frames: see `get_video_features`.
            pixel_values: see `get_image_features`.
            mm_encoder_outputs: features encoded before, `{"video": ..., "image": ...}`.
            visual_mask: (B, S) bool, where `inputs_embeds` holds visual features already.
            visual_inputs: original tokens of the visuals that begin here or later, in place of pixels and features.
            use_cache: whether a cache is returned.
            **kwargs: passed to the decoder.

        Returns:
            Decoder output.

        Raises:
            ValueError: placeholders and features do not agree, or a static cache with visual inputs.

        Source: CrossLMM, Sec. 3.
        """
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("Pass exactly one of input_ids and inputs_embeds.")
        is_prefill = past_key_values is None or past_key_values.get_seq_length() == 0
        prompt = CrossLMMPrompt(inputs_embeds, visual_mask, visual_inputs)
        if visual_mask is None:
            prompt = self.embed_prompt(
                input_ids,
                inputs_embeds,
                pixel_values=pixel_values,
                pixel_values_videos=pixel_values_videos,
                video_num_frames=video_num_frames,
                mm_encoder_outputs=mm_encoder_outputs,
                required=bool(is_prefill),
            )
        elif inputs_embeds is None:
            raise ValueError("visual_mask belongs to inputs_embeds with features in place; see embed_prompt.")
        if use_cache is None:
            use_cache = getattr(self.language_model.config, "use_cache", True)
        if self.training and getattr(self.language_model, "gradient_checkpointing", False):
            use_cache = False
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.language_model.config)
        memory = prepare_visual_memory(
            *prompt.embeds.shape[:2],
            config=self.config,
            visuals=prompt.visuals,
            visual_BS=prompt.visual_mask,
            attention_mask=attention_mask,
            cache=past_key_values,
            device=prompt.embeds.device,
        )
        if memory is not None:
            kwargs["visual_memory"] = memory
        outputs = self.language_model(
            inputs_embeds=prompt.embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )
        features = prompt.features or {}
        shown = {f"{kind}_hidden_states": torch.cat(x) for kind, x in features.items() if x is not None}
        return CrossLMMModelOutput(**outputs, **shown)


class CrossLMMForConditionalGeneration(CrossLMMPreTrainedModel, CrossLMMGenerationMixin):
    """CrossLMM with a language modelling head.

    Args:
        config: model configuration.
    """

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: CrossLMMConfig):
        super().__init__(config)
        self.model = CrossLMMModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def from_vision_text_pretrained(
        cls, vision: str, text: str, *, dtype: torch.dtype | str | None = None, **config_kwargs
    ) -> "CrossLMMForConditionalGeneration":
        """Builds a new CrossLMM out of published parts; projector and cross-attention start untrained.

        Args:
            vision: folder or Hub id of a SigLIP tower, alone or with its text half; fixed-resolution SigLIP2 too.
            text: folder or Hub id of a decoder with head: Qwen2.5, Qwen3, Llama, Mistral and the like.
            dtype: type of all weights; None as the parts are stored.
            **config_kwargs: fields of `CrossLMMConfig`: `tokens_per_frame`, `use_t2v`, placeholder ids, and so on.

        Returns:
            The model in evaluation mode. For text alone it gives what the decoder gives, bit for bit.

        Raises:
            ValueError: parts that do not fit CrossLMM, or settings that do not fit the parts.
        """
        return build_from_parts(cls, vision, text, dtype=dtype, **config_kwargs)

    def add_t2v(self) -> None:
        """Enters stage 2: adds T2V with closed gates, so that no output changes; nothing where it is there already.

        Raises:
            ValueError: the configuration names no layers for cross-attention.

        Source: CrossLMM, Table 2c and supplement.
        """
        enter_stage_2(self)

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
    ) -> CrossLMMVisionOutput:
        """Encodes videos, see `CrossLMMModel.get_video_features`."""
        return self.model.get_video_features(pixel_values_videos, video_num_frames, **kwargs)

    def get_image_features(self, pixel_values: torch.Tensor, **kwargs) -> CrossLMMVisionOutput:
        """Encodes images, see `CrossLMMModel.get_image_features`."""
        return self.model.get_image_features(pixel_values, **kwargs)

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
        mm_encoder_outputs: dict[str, ModelOutput] | None = None,
        encoded_video: CrossLMMEncodedVideo | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CrossLMMCausalLMOutput:
        """Runs the model and, with labels, its loss.

        Args:
            encoded_video: features from `encode_video`, in place of `pixel_values_videos`.
            labels: (B, S) next-token labels, -100 ignored.
            logits_to_keep: last positions (or their indices) to compute logits for, 0 for all.

        The other arguments are those of `CrossLMMModel.forward`.

        Returns:
            Loss, logits and cache.
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
            mm_encoder_outputs=self.use_encoded_video(encoded_video, mm_encoder_outputs, pixel_values_videos),
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        wanted = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, wanted, :])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size, **kwargs
            )
        return CrossLMMCausalLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
            video_hidden_states=outputs.video_hidden_states,
        )


AutoModel.register(CrossLMMConfig, CrossLMMModel, exist_ok=True)
AutoModelForImageTextToText.register(CrossLMMConfig, CrossLMMForConditionalGeneration, exist_ok=True)
AutoModelForMultimodalLM.register(CrossLMMConfig, CrossLMMForConditionalGeneration, exist_ok=True)

__all__ = ["CrossLMMForConditionalGeneration", "CrossLMMModel", "CrossLMMPreTrainedModel"]
