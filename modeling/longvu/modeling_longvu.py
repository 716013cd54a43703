"""LongVU: two towers, frames dropped by DINOv2, resolution chosen by the question, tokens dropped within windows.

Paper: LongVU: Spatiotemporal Adaptive Compression for Long Video-Language Understanding (arXiv 2410.17434).
Original read: Vision-CAIR/LongVU (Apache-2.0), `cambrian_arch.py`, `vision_sampler.py`, `siglip_encoder.py`,
`dino_encoder.py`, `cambrian_qwen.py`, `cambrian_llama.py`.
Deviations: every sample is decided for itself, the context length is never exceeded, frames pass in chunks;
`original_behaviour` undoes the first two; see README.md in this folder.

Shapes: B batch, S sequence in ids, S' sequence with visual tokens, F frames, T kept frames, Q queries of a frame,
V visual tokens, D language width, E width of the connector.
"""

from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast, ModelOutput
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults

from longvideo.modeling.layers.placeholders import InsertedSequence
from longvideo.modeling.longvu.configuration_longvu import LongVUConfig
from longvideo.modeling.longvu.generation_longvu import (
    LongVUGenerationMixin,
    PromptSizes,
    join_mask,
    pending_selections,
    remember_prompt,
    split_mask,
)
from longvideo.modeling.longvu.insertion_longvu import LongVUSelection, reduction_limit
from longvideo.modeling.longvu.prompt_longvu import LongVUPromptMixin, PromptMarks
from longvideo.modeling.longvu.sva_longvu import LongVUSamplerLayer, LongVUVisionTokenSampler
from longvideo.modeling.longvu.vision_longvu import (
    LongVUDinov2Embeddings,
    LongVUProjector,
    LongVUTowerProjector,
    LongVUVisionMixin,
    LongVUVisionOutput,
    VisualInputs,
    check_pixels,
    join_towers,
    read_sizes,
)


@dataclass
class LongVUModelOutput(BaseModelOutputWithPast):
    """Decoder output.

    Args:
        labels: (B, S') labels with -100 on visual tokens, when labels were given.
        attention_mask: (B, cached + S') mask that fits the cache, when visual tokens were inserted.
        video_selections: per image and video, in prompt order, which parts the decoder saw.
    """

    labels: torch.Tensor | None = None
    attention_mask: torch.Tensor | None = None
    video_selections: tuple[LongVUSelection, ...] | None = None


@dataclass
class LongVUCausalLMOutput(ModelOutput):
    """Language model output; `logits` and `hidden_states` cover text and visual tokens.

    Args:
        loss: next-token loss when labels were given.
        logits: (B, S', vocabulary).
        past_key_values: cache.
        hidden_states: per layer when asked for.
        attentions: per layer when asked for.
        labels: (B, S') labels with -100 on visual tokens, when labels were given.
        attention_mask: (B, cached + S') mask that fits the cache, when visual tokens were inserted. The next call on
            the cache takes it with the new tokens' ones behind.
        video_selections: per image and video, in prompt order, which parts the decoder saw.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    labels: torch.Tensor | None = None
    attention_mask: torch.Tensor | None = None
    video_selections: tuple[LongVUSelection, ...] | None = None


class LongVUPreTrainedModel(PreTrainedModel):
    """Base class: configuration, weight names and what the models support."""

    config: LongVUConfig
    config_class = LongVUConfig
    base_model_prefix = "model"
    input_modalities = ("video", "image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = [
        "Qwen2DecoderLayer",
        "LlamaDecoderLayer",
        "SiglipEncoderLayer",
        "Dinov2Layer",
        "LongVUDinov2Embeddings",
        "LongVUSamplerLayer",
    ]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = False

    def initialize_weights(self) -> None:
        # Below a class that is not its own, upstream passes over modules without own parameters; its towers have some.
        for part in self.modules():
            if part is not self and isinstance(part, PreTrainedModel) and not part.is_custom_code():
                part.initialize_weights()
        super().initialize_weights()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, LongVUSamplerLayer):
            for name, parameter in module.named_parameters(recurse=False):
                if name.startswith("pos_embed"):
                    init.normal_(parameter)
        elif isinstance(module, LongVUModel):
            init.normal_(module.vision_query, std=self.config.vision_hidden_size**-0.5)
            if module.image_newline is not None:
                init.normal_(module.image_newline, std=self.config.text_config.hidden_size**-0.5)


class LongVUModel(LongVUVisionMixin, LongVUPromptMixin, LongVUPreTrainedModel):
    """Towers, sampler, projectors and decoder, without a language modelling head.

    Args:
        config: model configuration.
    """

    def __init__(self, config: LongVUConfig):
        super().__init__(config)
        self.vision_tower = AutoModel.from_config(config.vision_config)
        # The features are those before the last norm.
        self.vision_tower.post_layernorm = nn.Identity()
        self.dino_tower = AutoModel.from_config(config.dino_config)
        if config.dino_position_interpolation == "scale_factor":
            self.dino_tower.embeddings = LongVUDinov2Embeddings(config.dino_config)
        widths = (config.vision_config.hidden_size, config.dino_config.hidden_size)
        self.vision_projectors = nn.ModuleList(LongVUTowerProjector(x, config.vision_hidden_size) for x in widths)
        self.vision_query = nn.Parameter(torch.empty(config.num_query_group, config.vision_hidden_size))
        self.vision_sampler = LongVUVisionTokenSampler(config)
        self.multi_modal_projector = LongVUProjector(config)
        self.image_newline = (
            nn.Parameter(torch.empty(config.text_config.hidden_size)) if config.image_newline else None
        )
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    # ------------------------------------------------------------------ vision

    def widest_limit(self, size: tuple[int, int]) -> int:
        """Returns the frames from which on a video is reduced whatever the question."""
        return reduction_limit(self.config, self.config.context_length, size)

    @can_return_tuple
    def get_video_features(
        self,
        pixel_values_videos: torch.Tensor,
        pixel_values_videos_dino: torch.Tensor | None = None,
        video_num_frames: torch.Tensor | None = None,
        video_sizes: torch.Tensor | None = None,
        **kwargs,
    ) -> LongVUVisionOutput:
        """Encodes videos in chunks of bounded memory: DINOv2 sees all frames, SigLIP those that are kept.

        Args:
            pixel_values_videos: (frames of all videos, 3, S, S) for SigLIP with `video_num_frames`, or (videos, F, 3,
                S, S).
            pixel_values_videos_dino: the same frames for DINOv2.
            video_num_frames: (videos,) int64 frames per video.
            video_sizes: (videos, 2) int64 what the model reads as width and height; None for square frames.
            **kwargs: passed to SigLIP, e.g. `output_hidden_states`.

        Returns:
            `visuals`: per video its kept frames, aggregated; `pooler_output`: the same at the full grid, (V, D).

        Raises:
            ValueError: frames, counts or sizes that do not agree.

        Source: LongVU Sec. 3.1; `prepare_inputs_labels_for_multimodal`.
        """
        inputs = VisualInputs(pixel_values_videos, pixel_values_videos_dino, video_num_frames, video_sizes)
        towers: list = []
        visuals = [
            self._encode_video(pixels, dino, size, self.widest_limit(size), towers, **kwargs)
            for pixels, dino, size in self._split_videos(inputs)
        ]
        renderer = self._renderer()
        pooled = [renderer.tokens(visual, full=True).flatten(0, 1) for visual in visuals]
        return join_towers(towers, pooled, visuals)

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        pixel_values_dino: torch.Tensor | None = None,
        image_sizes: torch.Tensor | None = None,
        **kwargs,
    ) -> LongVUVisionOutput:
        """Encodes images.

        Args:
            pixel_values: (images, 3, S, S) for SigLIP.
            pixel_values_dino: the same images for DINOv2.
            image_sizes: (images, 2) int64 width and height; None for square images.
            **kwargs: passed to SigLIP.

        Returns:
            `visuals`: per image the aggregated frame; `pooler_output`: its tokens, (V, D).

        Raises:
            ValueError: pixels or sizes that do not agree.
        """
        check_pixels(self.config, pixel_values, pixel_values_dino)
        sizes = read_sizes(image_sizes, len(pixel_values), "image")
        towers: list = []
        visuals = self._encode_images(pixel_values, pixel_values_dino, sizes, towers, **kwargs)
        renderer = self._renderer()
        return join_towers(towers, [renderer.image(visual)[0] for visual in visuals], visuals)

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
        pixel_values_videos_dino: torch.FloatTensor | None = None,
        video_num_frames: torch.LongTensor | None = None,
        video_sizes: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        pixel_values_dino: torch.FloatTensor | None = None,
        image_sizes: torch.LongTensor | None = None,
        mm_encoder_outputs: dict[str, ModelOutput] | None = None,
        carried_labels: torch.LongTensor | None = None,
        prompt_mask: torch.Tensor | None = None,
        answer_room: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> LongVUModelOutput:
        """Runs text and visual tokens through the decoder.

        Args:
            input_ids: (B, S) with one placeholder per image and video.
            attention_mask: (B, cached + S), 1 for real tokens.
            position_ids: (B, S); counted anew where visual tokens are inserted.
            past_key_values: cache.
            inputs_embeds: (B, S, D) in place of `input_ids`.
            pixel_values_videos: see `get_video_features`.
            pixel_values_videos_dino: see `get_video_features`.
            video_num_frames: see `get_video_features`.
            video_sizes: see `get_video_features`.
            pixel_values: see `get_image_features`.
            pixel_values_dino: see `get_image_features`.
            image_sizes: see `get_image_features`.
            mm_encoder_outputs: features encoded before, `{"video": ..., "image": ...}`.
            carried_labels: (B, S), returned as `labels` with -100 on visual tokens.
            prompt_mask: (B, S), 1 for tokens of the prompt, which then alone decides what is seen of the visuals, as
                in generation; None lets all text decide, answers included, as the original does in training.
            answer_room: (B,) positions kept free behind the prompt, at least the answer's; None for these.
            use_cache: whether a cache is returned.
            **kwargs: passed to the decoder.

        Returns:
            Decoder output over text and visual tokens.

        Raises:
            ValueError: placeholders and visual inputs that do not agree, or a text that leaves no room for them.
        """
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("Pass exactly one of input_ids and inputs_embeds.")
        use_cache, past_key_values = self._settle_cache(use_cache, past_key_values)
        num_cached = 0 if past_key_values is None else past_key_values.get_seq_length()
        inputs = VisualInputs(
            pixel_values_videos,
            pixel_values_videos_dino,
            video_num_frames,
            video_sizes,
            pixel_values,
            pixel_values_dino,
            image_sizes,
            mm_encoder_outputs,
        )
        prompts = None if prompt_mask is None else PromptMarks(prompt_mask, answer_room)
        mask, selections = None, pending_selections(past_key_values, num_cached)
        if inputs or (num_cached == 0 and self._has_placeholders(input_ids)):
            inserted, selections = self._insert_behind_cache(
                input_ids, inputs_embeds, inputs, past_key_values, attention_mask, carried_labels, prompts
            )
            inputs_embeds, carried_labels = inserted.inputs_embeds, inserted.labels
            mask = attention_mask = inserted.attention_mask
            position_ids = (mask.cumsum(1) - 1).clamp(min=0)[:, num_cached:]
        elif inputs_embeds is None:
            inputs_embeds, _ = self._embed(input_ids, None, None)

        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )
        return LongVUModelOutput(**outputs, labels=carried_labels, attention_mask=mask, video_selections=selections)

    def _settle_cache(self, use_cache: bool | None, cache: Cache | None) -> tuple[bool, Cache | None]:
        """Returns whether a cache is used, and the cache, a new one where none was given."""
        if use_cache is None:
            use_cache = getattr(self.language_model.config, "use_cache", True)
        if self.training and getattr(self.language_model, "gradient_checkpointing", False):
            use_cache = False
        if use_cache and cache is None:
            cache = DynamicCache(config=self.language_model.config)
        return use_cache, cache

    def _insert_behind_cache(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        inputs: VisualInputs,
        cache: Cache | None,
        attention_mask: torch.Tensor | None,
        labels: torch.Tensor | None,
        prompts: PromptMarks | None = None,
    ) -> tuple[InsertedSequence, tuple[LongVUSelection, ...]]:
        """Puts visual tokens into the prompt and notes its sizes on the cache.

        Returns:
            The sequence, with the mask over cache and sequence (B, cached + S'), and what was chosen.
        """
        num_cached = 0 if cache is None else cache.get_seq_length()
        num_ids = (input_ids if inputs_embeds is None else inputs_embeds).shape[1]
        cached_mask, mask = split_mask(attention_mask, num_cached, num_ids)
        inserted, selections = self.insert_visuals(
            input_ids,
            inputs_embeds,
            inputs,
            attention_mask=mask,
            labels=labels,
            prompts=prompts,
            num_cached=num_cached,
            cached_mask=cached_mask,
        )
        joined = join_mask(cached_mask, inserted.attention_mask, num_cached)
        sizes = PromptSizes(num_ids, inserted.inputs_embeds.shape[1], selections)
        remember_prompt(cache, sizes, num_cached, joined)
        return replace(inserted, attention_mask=joined), selections

    def _has_placeholders(self, input_ids: torch.Tensor | None) -> bool:
        if input_ids is None:
            return False
        return bool(((input_ids == self.config.image_token_id) | (input_ids == self.config.video_token_id)).any())


class LongVUForConditionalGeneration(LongVUPreTrainedModel, LongVUGenerationMixin):
    """LongVU with a language modelling head: answers questions about videos and images.

    Args:
        config: model configuration.
    """

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: LongVUConfig):
        super().__init__(config)
        self.model = LongVUModel(config)
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

    def get_video_features(self, pixel_values_videos: torch.Tensor, *args, **kwargs) -> LongVUVisionOutput:
        """Encodes videos, see `LongVUModel.get_video_features`."""
        return self.model.get_video_features(pixel_values_videos, *args, **kwargs)

    def get_image_features(self, pixel_values: torch.Tensor, *args, **kwargs) -> LongVUVisionOutput:
        """Encodes images, see `LongVUModel.get_image_features`."""
        return self.model.get_image_features(pixel_values, *args, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        pixel_values_videos: torch.FloatTensor | None = None,
        pixel_values_videos_dino: torch.FloatTensor | None = None,
        video_num_frames: torch.LongTensor | None = None,
        video_sizes: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        pixel_values_dino: torch.FloatTensor | None = None,
        image_sizes: torch.LongTensor | None = None,
        mm_encoder_outputs: dict[str, ModelOutput] | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> LongVUCausalLMOutput:
        """Runs the model and, with labels, its loss.

        Args:
            labels: (B, S) next-token labels, -100 ignored; visual tokens get -100.
            logits_to_keep: last positions (or their indices, among text and visual tokens) to compute logits for, 0
                for all.

        The other arguments are those of `LongVUModel.forward`.

        Returns:
            Loss, logits and cache over text and visual tokens.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            pixel_values_videos=pixel_values_videos,
            pixel_values_videos_dino=pixel_values_videos_dino,
            video_num_frames=video_num_frames,
            video_sizes=video_sizes,
            pixel_values=pixel_values,
            pixel_values_dino=pixel_values_dino,
            image_sizes=image_sizes,
            mm_encoder_outputs=mm_encoder_outputs,
            carried_labels=labels,
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
        return LongVUCausalLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            labels=outputs.labels,
            attention_mask=outputs.attention_mask,
            video_selections=outputs.video_selections,
        )


AutoModel.register(LongVUConfig, LongVUModel, exist_ok=True)
AutoModelForImageTextToText.register(LongVUConfig, LongVUForConditionalGeneration, exist_ok=True)
AutoModelForMultimodalLM.register(LongVUConfig, LongVUForConditionalGeneration, exist_ok=True)

__all__ = ["LongVUForConditionalGeneration", "LongVUModel", "LongVUPreTrainedModel"]
