"""LLaVA-ST: coordinates as tokens, their tables as positions of visual features, two packed streams of a video.

Paper: LLaVA-ST: A Multimodal Large Language Model for Fine-Grained Spatial-Temporal Understanding (arXiv 2501.08282).
Original read: appletea233/LLaVA-ST (Apache-2.0), `llava_arch.py`, `llava_qwen.py`, `token_packer.py`.
Deviations: blocks are expanded by the processor; frames pass tower and spatial packer in chunks; see README.md in this
folder.

Shapes: B batch, S sequence, F frames, C rows of coordinates (all axes), V visual tokens, D language width.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, ModelOutput
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults

from longvideo.modeling.llava_st.configuration_llava_st import LlavaSTConfig
from longvideo.modeling.llava_st.coordinate_loss_llava_st import (
    coordinate_cross_entropy,
    coordinate_log_probs,
    coordinate_targets,
)
from longvideo.modeling.llava_st.coordinates_llava_st import inject_coordinates, join_coordinate_logits
from longvideo.modeling.llava_st.encoded_video_llava_st import LlavaSTEncodedVideo
from longvideo.modeling.llava_st.generation_llava_st import LlavaSTGenerationMixin
from longvideo.modeling.llava_st.layout_llava_st import (
    LlavaSTCoordinates,
    LlavaSTLayoutMixin,
    LlavaSTVocabularyMixin,
    read_weight,
)
from longvideo.modeling.llava_st.packer_llava_st import LlavaSTPacker, LlavaSTPackerLayer, init_packer_weights
from longvideo.modeling.llava_st.splicing_llava_st import place_features, recover_ids
from longvideo.modeling.llava_st.vision_llava_st import LlavaSTProjector, LlavaSTVisionMixin, LlavaSTVisionOutput


@dataclass
class LlavaSTModelOutput(BaseModelOutputWithPast):
    """Decoder output.

    Args:
        image_hidden_states: (V, D) features of all images.
        video_hidden_states: (V, D) features of all videos.
    """

    image_hidden_states: torch.Tensor | None = None
    video_hidden_states: torch.Tensor | None = None


@dataclass
class LlavaSTCausalLMOutput(ModelOutput):
    """Language model output.

    Args:
        loss: next-token loss when labels were given.
        logits: (B, S, tokens), one column per token, coordinates included.
        past_key_values: cache.
        hidden_states: per layer when asked for.
        attentions: per layer when asked for.
        image_hidden_states: (V, D) features of all images.
        video_hidden_states: (V, D) features of all videos.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    image_hidden_states: torch.Tensor | None = None
    video_hidden_states: torch.Tensor | None = None


class LlavaSTPreTrainedModel(PreTrainedModel):
    """Base class: configuration, weight names and what the models support."""

    config: LlavaSTConfig
    config_class = LlavaSTConfig
    base_model_prefix = "model"
    input_modalities = ("video", "image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["Qwen2DecoderLayer", "SiglipEncoderLayer", "LlavaSTPackerLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = False

    def initialize_weights(self) -> None:
        for part in self.modules():
            # Below a class that is not its own, upstream passes over modules without own parameters: its towers have
            # some, and so have packer layers.
            if part is not self and isinstance(part, PreTrainedModel) and not part.is_custom_code():
                part.initialize_weights()
            elif isinstance(part, LlavaSTPackerLayer) and not getattr(part, "_is_hf_initialized", False):
                with torch.no_grad():
                    init_packer_weights(part, std=self.config.initializer_range)
                for child in part.modules():
                    child._is_hf_initialized = True
        super().initialize_weights()


class LlavaSTModel(LlavaSTVisionMixin, LlavaSTVocabularyMixin, LlavaSTPreTrainedModel):
    """Tower, projector, packers and decoder, without a language modelling head.

    In the folded layout the head holds the output rows of coordinates, of which position embeddings need the average
    with the input rows: pass them as `output_rows`, as the class with a head does.

    Args:
        config: model configuration.
    """

    def __init__(self, config: LlavaSTConfig):
        super().__init__(config)
        config.check_tables()
        width = config.text_config.hidden_size
        self.vision_tower = AutoModel.from_config(config.vision_config)
        # The features are those before the last norm.
        self.vision_tower.post_layernorm = nn.Identity()
        self.multi_modal_projector = LlavaSTProjector(config)
        self.packer = None
        if config.use_packer:
            self.packer = LlavaSTPacker(
                width,
                config.packer_hidden_size,
                config.packer_num_heads,
                spatial_factor=config.spatial_factor,
                temporal_factor=config.temporal_factor,
                query=config.packer_query,
            )
        self.language_model = AutoModel.from_config(config.text_config)
        self.coordinates = None
        if config.coordinate_layout == "split" and config.num_coordinate_tokens:
            self.coordinates = LlavaSTCoordinates(config)
        self.set_tied_tables()
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    # ------------------------------------------------------------------ text and vision together

    def collect_features(
        self,
        *,
        pixel_values: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, ModelOutput] | None = None,
        output_rows: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor | None]:
        """Returns the features of all images and of all videos, (V, D) each, encoding what is not encoded yet.

        Args:
            pixel_values: see `get_image_features`.
            pixel_values_videos: see `get_video_features`.
            mm_encoder_outputs: features encoded before, `{"video": ..., "image": ...}`.
            output_rows: see `get_video_features`.

        Returns:
            `{"image": ..., "video": ...}`, None for what was not given.

        Raises:
            ValueError: pixels and encoded features of the same kind.
        """
        outputs = dict(mm_encoder_outputs or {})
        encoders = {
            "image": (pixel_values, self.get_image_features),
            "video": (pixel_values_videos, self.get_video_features),
        }
        features = {}
        for kind, (pixels, encode) in encoders.items():
            if pixels is not None:
                if outputs.get(kind) is not None:
                    raise ValueError(f"Both pixels and encoded features were given for the {kind}s; pass one of them.")
                outputs[kind] = encode(pixels, output_rows, return_dict=True)
            found = None if outputs.get(kind) is None else outputs[kind].pooler_output
            if found is not None:
                found = found.flatten(0, -2) if isinstance(found, torch.Tensor) else torch.cat(list(found))
            features[kind] = found
        return features

    def embed_prompt(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None = None,
        *,
        coordinate_values: torch.Tensor | None = None,
        features: dict[str, torch.Tensor | None] | None = None,
        required: bool = True,
    ) -> torch.Tensor:
        """Returns embeddings with visual features and continuous coordinates in place.

        Args:
            input_ids: (B, S), or None with `inputs_embeds`.
            inputs_embeds: (B, S, D); visual and template tokens are found by their embeddings, and by their place in
                whole blocks where several have the same one.
            coordinate_values: (B, S) value in [0, 1] at every template token; without, templates keep their own rows.
            features: what `collect_features` returns.
            required: whether visual positions without features are an error, where there are ids.

        Returns:
            (B, S, D).

        Raises:
            ValueError: positions, features and values that do not agree, or embeddings that fit several tokens.
        """
        config, features = self.config, features or {"image": None, "video": None}
        ids = input_ids
        if inputs_embeds is None:
            inputs_embeds = self.embed_ids(input_ids)
        elif coordinate_values is None and all(x is None for x in features.values()):
            return inputs_embeds
        else:
            kinds = [kind for kind, found in features.items() if found is not None]
            ids = recover_ids(
                inputs_embeds,
                self.get_input_embeddings(),
                config,
                kinds=kinds,
                with_values=coordinate_values is not None,
            )
            required = False
        inputs_embeds = place_features(inputs_embeds, ids, features, config, required=required)
        if coordinate_values is None or not config.num_coordinate_tokens:
            return inputs_embeds
        return inject_coordinates(
            inputs_embeds,
            ids,
            coordinate_values,
            tables=self.split_axes(self.input_rows()),
            input_ids_of_axes=config.input_template_ids,
            output_ids_of_axes=config.output_template_ids,
            inject_width_inputs=config.inject_width_inputs,
        )

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
        pixel_values: torch.FloatTensor | None = None,
        coordinate_values: torch.FloatTensor | None = None,
        mm_encoder_outputs: dict[str, ModelOutput] | None = None,
        output_rows: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> LlavaSTModelOutput:
        """Runs text and visual features through the decoder.

        Args:
            input_ids: (B, S) with the blocks of images and videos.
            attention_mask: (B, cached + S), 1 for real tokens.
            position_ids: (B, S).
            past_key_values: cache.
            inputs_embeds: (B, S, D) in place of `input_ids`.
            pixel_values_videos: see `get_video_features`.
            pixel_values: see `get_image_features`.
            coordinate_values: (B, S) value in [0, 1] at every template token of `input_ids`, whatever elsewhere; None
                leaves the templates their own rows.
            mm_encoder_outputs: features encoded before, `{"video": ..., "image": ...}`.
            output_rows: see `get_video_features`.
            use_cache: whether a cache is returned.
            **kwargs: passed to the decoder.

        Returns:
            Decoder output.

        Raises:
            ValueError: positions, features and values that do not agree.
        """
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("Pass exactly one of input_ids and inputs_embeds.")
        is_prefill = past_key_values is None or past_key_values.get_seq_length() == 0
        features = self.collect_features(
            pixel_values=pixel_values,
            pixel_values_videos=pixel_values_videos,
            mm_encoder_outputs=mm_encoder_outputs,
            output_rows=output_rows,
        )
        inputs_embeds = self.embed_prompt(
            input_ids, inputs_embeds, coordinate_values=coordinate_values, features=features, required=bool(is_prefill)
        )
        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )
        shown = {f"{kind}_hidden_states": found for kind, found in features.items()}
        return LlavaSTModelOutput(**outputs, **shown)


class LlavaSTForConditionalGeneration(LlavaSTLayoutMixin, LlavaSTPreTrainedModel, LlavaSTGenerationMixin):
    """LLaVA-ST with a language modelling head: answers with text, times and boxes.

    Args:
        config: model configuration.
    """

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: LlavaSTConfig):
        super().__init__(config)
        self.model = LlavaSTModel(config)
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

    def output_rows(self) -> torch.Tensor | None:
        """Returns the rows of coordinates in the head, (C, D), or None where tables beside it hold them."""
        config = self.config
        if self.model.coordinates is not None or not config.num_coordinate_tokens:
            return None
        return read_weight(self.lm_head, config.coordinate_token_start, config.num_coordinate_tokens)

    def get_video_features(self, pixel_values_videos: torch.Tensor, **kwargs) -> LlavaSTVisionOutput:
        """Encodes videos, see `LlavaSTModel.get_video_features`."""
        return self.model.get_video_features(pixel_values_videos, self.output_rows(), **kwargs)

    def get_image_features(self, pixel_values: torch.Tensor, **kwargs) -> LlavaSTVisionOutput:
        """Encodes images, see `LlavaSTModel.get_image_features`."""
        return self.model.get_image_features(pixel_values, self.output_rows(), **kwargs)

    def _compute_logits(self, hidden_states: torch.Tensor, output_rows: torch.Tensor | None) -> torch.Tensor:
        """Returns one column per token, (B, S, tokens)."""
        config, logits = self.config, self.lm_head(hidden_states)
        if self.model.coordinates is not None:
            tables = self.model.split_axes(self.model.coordinates.rows("output"))
            return join_coordinate_logits(logits, hidden_states, tables, config.coordinate_token_start)
        if output_rows is None or not (config.use_ntp and torch.is_grad_enabled() and output_rows.requires_grad):
            return logits
        # The head has its columns, whatever wraps it; what propagation adds is 0 in value and only carries gradients.
        addition = torch.cat(self.model.split_axes(output_rows)) - output_rows
        start = config.coordinate_token_start
        columns = torch.arange(start, start + len(addition), device=logits.device)
        added = F.linear(hidden_states, addition.to(hidden_states.device))
        return logits.index_add(-1, columns, added.to(logits.dtype))

    def label_log_probs(
        self, logits: torch.Tensor, labels: torch.Tensor, coordinate_values: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Returns log-likelihoods of labels; coordinates spread over the two nearest tokens, as in the loss.

        Args:
            logits: (L, tokens) at the positions that predict the labels.
            labels: (L,) token ids, none of them masked.
            coordinate_values: (L,) value of every output template among the labels.

        Returns:
            (L,) float32.

        Raises:
            ValueError: output templates without values.
        """
        config = self.config
        axes = {"output_ids_of_axes": (), "num_rows": (), "column_starts": ()}
        if config.num_coordinate_tokens:
            axes = {
                "output_ids_of_axes": config.output_template_ids,
                "num_rows": config.coordinate_sizes,
                "column_starts": config.coordinate_starts,
            }
        soft = config.soft_coordinate_targets
        return coordinate_log_probs(logits, coordinate_targets(labels, coordinate_values, **axes, soft=soft))

    def _compute_loss(
        self, logits: torch.Tensor, labels: torch.Tensor, coordinate_values: torch.Tensor | None, **kwargs
    ) -> torch.Tensor:
        config = self.config
        if not config.num_coordinate_tokens:
            return self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **kwargs)
        return coordinate_cross_entropy(
            logits,
            labels,
            coordinate_values,
            output_ids_of_axes=config.output_template_ids,
            num_rows=config.coordinate_sizes,
            column_starts=config.coordinate_starts,
            soft=config.soft_coordinate_targets,
            reduction=config.sample_loss,
            num_items_in_batch=kwargs.get("num_items_in_batch"),
        )

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        pixel_values_videos: torch.FloatTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        coordinate_values: torch.FloatTensor | None = None,
        mm_encoder_outputs: dict[str, ModelOutput] | None = None,
        encoded_video: LlavaSTEncodedVideo | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> LlavaSTCausalLMOutput:
        """Runs the model and, with labels, its loss.

        Args:
            encoded_video: features from `encode_video`, in place of `pixel_values_videos`.
            labels: (B, S) next-token labels, -100 ignored; output templates with `coordinate_values` become targets
                over the two nearest coordinate tokens.
            logits_to_keep: last positions (or their indices) to compute logits for, 0 for all.

        The other arguments are those of `LlavaSTModel.forward`.

        Returns:
            Loss, logits and cache.
        """
        # Not at every step of decoding: an adapter may have to merge its rows for it.
        has_pixels = pixel_values is not None or pixel_values_videos is not None
        output_rows = self.output_rows() if has_pixels or torch.is_grad_enabled() else None
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            pixel_values_videos=pixel_values_videos,
            pixel_values=pixel_values,
            coordinate_values=coordinate_values,
            mm_encoder_outputs=self.use_encoded_video(encoded_video, mm_encoder_outputs, pixel_values_videos),
            output_rows=output_rows,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        wanted = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self._compute_logits(outputs.last_hidden_state[:, wanted, :], output_rows)
        loss = None if labels is None else self._compute_loss(logits, labels, coordinate_values, **kwargs)
        return LlavaSTCausalLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
            video_hidden_states=outputs.video_hidden_states,
        )


AutoModel.register(LlavaSTConfig, LlavaSTModel, exist_ok=True)
AutoModelForImageTextToText.register(LlavaSTConfig, LlavaSTForConditionalGeneration, exist_ok=True)
AutoModelForMultimodalLM.register(LlavaSTConfig, LlavaSTForConditionalGeneration, exist_ok=True)

__all__ = ["LlavaSTForConditionalGeneration", "LlavaSTModel", "LlavaSTPreTrainedModel"]
