"""CrossVLLM: a coarse module for the whole video and a fine one for a segment, as two adapters of one backbone.

Paper: Cross-granularity video LLM for long video understanding (anonymous submission). Original code: none is public.
README.md in this folder lists what the paper leaves open and what was decided.

Shapes: B batch, S sequence, V visual tokens, D language width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, ModelOutput
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults

from longvideo.modeling.crossvllm.building_crossvllm import build_from_backbone
from longvideo.modeling.crossvllm.checkpoint_crossvllm import CrossVLLMPreTrainedModel
from longvideo.modeling.crossvllm.configuration_crossvllm import GRANULARITIES, CrossVLLMConfig
from longvideo.modeling.crossvllm.encoded_video_crossvllm import CrossVLLMEncodedVideo
from longvideo.modeling.crossvllm.generation_crossvllm import CrossVLLMGenerationMixin
from longvideo.modeling.crossvllm.vision_crossvllm import (
    CrossVLLMVisionMixin,
    CrossVLLMVisionOutput,
    build_projectors,
    build_tower,
)
from longvideo.modeling.layers.placeholders import find_placeholders, scatter_features

KINDS = ("image", "video")


@dataclass
class CrossVLLMModelOutput(BaseModelOutputWithPast):
    """Decoder output.

    Args:
        image_hidden_states: (V, D) features of all images.
        video_hidden_states: (V, D) features of all videos.
    """

    image_hidden_states: torch.Tensor | None = None
    video_hidden_states: torch.Tensor | None = None


@dataclass
class CrossVLLMCausalLMOutput(ModelOutput):
    """Language model output.

    Args:
        loss: next-token loss when labels were given.
        logits: (B, S, vocabulary).
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


class CrossVLLMModel(CrossVLLMVisionMixin, CrossVLLMPreTrainedModel):
    """Frozen tower, a projector per granularity and the decoder, without a language modelling head.

    Args:
        config: model configuration.
    """

    def __init__(self, config: CrossVLLMConfig):
        super().__init__(config)
        self._granularity = config.default_granularity
        self._references = {}
        self.vision_tower = build_tower(config)
        self.projectors = build_projectors(config)
        self.language_model = AutoModel.from_config(config.text_config)
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
        vision_features: Sequence[torch.Tensor] | None,
        mm_encoder_outputs: dict[str, ModelOutput] | None,
    ) -> dict[str, ModelOutput | None]:
        """Returns what the encoder gave for images and videos, encoding what is not encoded yet."""
        outputs = {kind: (mm_encoder_outputs or {}).get(kind) for kind in KINDS}
        given = {"image": (pixel_values,), "video": (pixel_values_videos, vision_features)}
        for kind, inputs in given.items():
            if sum(x is not None for x in (outputs[kind], *inputs)) > 1:
                raise ValueError(f"Both pixels and encoded features were given for the {kind}s; pass one of them.")
            made_for = getattr(outputs[kind], "granularity", None)
            if made_for not in (None, self.granularity):
                raise ValueError(
                    f"The encoded {kind}s have the granularity {made_for!r}, but {self.granularity!r} is active. Pass "
                    "vision_features, which serve both, or switch with set_granularity."
                )
        if pixel_values is not None:
            outputs["image"] = self.get_image_features(pixel_values, return_dict=True)
        if pixel_values_videos is not None or vision_features is not None:
            outputs["video"] = self.get_video_features(
                pixel_values_videos, video_num_frames, vision_features=vision_features, return_dict=True
            )
        return outputs

    def _check_count(self, mask_BS: torch.Tensor, output: ModelOutput) -> None:
        """Raises an error that names the other granularity when the placeholders are its."""
        num_frames, count = getattr(output, "num_frames", None), int(mask_BS.sum())
        if num_frames is None or count == sum(len(x) for x in output.pooler_output):
            return
        for name in GRANULARITIES:
            if name != self.granularity_kind and count == sum(num_frames) * self.config.tokens_per_frame(name):
                raise ValueError(
                    f"The prompt holds {count} video placeholder tokens for {sum(num_frames)} frames, those of the "
                    f"granularity {name!r}, but {self.granularity!r} is active. Pass granularity={name!r} to the "
                    "model, or prepare the prompt again."
                )

    def embed_prompt(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None = None,
        *,
        pixel_values: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        video_num_frames: torch.Tensor | None = None,
        vision_features: Sequence[torch.Tensor] | None = None,
        mm_encoder_outputs: dict[str, ModelOutput] | None = None,
        required: bool = True,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor | None]]:
        """Puts the visual features of the active granularity into a prompt.

        Args:
            input_ids: (B, S) with one placeholder per visual token, or None with `inputs_embeds`.
            inputs_embeds: (B, S, D); placeholders are found by their embeddings.
            pixel_values: see `get_image_features`.
            pixel_values_videos: see `get_vision_features`.
            video_num_frames: see `get_vision_features`.
            vision_features: see `get_video_features`.
            mm_encoder_outputs: features encoded and projected before, `{"video": ..., "image": ...}`.
            required: whether placeholders without features are an error, where there are ids.

        Returns:
            Embeddings (B, S, D), and per kind the features (V, D) or None.

        Raises:
            ValueError: placeholders and features do not agree.

        Source: CrossVLLM, Eq. 3: visual tokens stand before the text.
        """
        outputs = self._encode(
            pixel_values, pixel_values_videos, video_num_frames, vision_features, mm_encoder_outputs
        )
        if inputs_embeds is not None and not any(output is not None for output in outputs.values()):
            return inputs_embeds, dict.fromkeys(KINDS)
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
        features = dict.fromkeys(KINDS)
        for kind, mask in masks.items():
            if outputs[kind] is not None:
                if kind == "video":
                    self._check_count(mask, outputs[kind])
                features[kind] = torch.cat(list(outputs[kind].pooler_output))
                inputs_embeds = scatter_features(inputs_embeds, mask, features[kind], kind=kind)
            elif required and input_ids is not None and mask.any():
                raise ValueError(
                    f"The prompt holds {int(mask.sum())} {kind} placeholder tokens but no {kind} was given. Pass the "
                    f"{kind} to the processor together with the text and all its outputs to the model."
                )
        return inputs_embeds, features

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
        vision_features: Sequence[torch.Tensor] | None = None,
        mm_encoder_outputs: dict[str, ModelOutput] | None = None,
        granularity: str | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CrossVLLMModelOutput:
        """Runs text and visual features through the decoder.

        Args:
            input_ids: (B, S) with one placeholder per visual token of the granularity.
            attention_mask: (B, cached + S), 1 for real tokens.
            position_ids: (B, S).
            past_key_values: cache.
            inputs_embeds: (B, S, D) in place of `input_ids`.
            pixel_values_videos: see `get_vision_features`.
            video_num_frames: see `get_vision_features`.
            pixel_values: see `get_image_features`.
            vision_features: what `get_vision_features` gave, in place of `pixel_values_videos`.
            mm_encoder_outputs: features encoded and projected before, `{"video": ..., "image": ...}`.
            granularity: "coarse" or "fine" for this call; None for the active one.
            use_cache: whether a cache is returned.
            **kwargs: passed to the decoder.

        Returns:
            Decoder output.

        Raises:
            ValueError: placeholders and features do not agree, or an unknown granularity.

        Source: CrossVLLM, Sec. 3, Eqs. 3 and 4.
        """
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("Pass exactly one of input_ids and inputs_embeds.")
        is_prefill = past_key_values is None or past_key_values.get_seq_length() == 0
        with self.use_granularity(granularity):
            embeds_BSD, features = self.embed_prompt(
                input_ids,
                inputs_embeds,
                pixel_values=pixel_values,
                pixel_values_videos=pixel_values_videos,
                video_num_frames=video_num_frames,
                vision_features=vision_features,
                mm_encoder_outputs=mm_encoder_outputs,
                required=bool(is_prefill),
            )
            outputs = self.language_model(
                inputs_embeds=embeds_BSD,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **kwargs,
            )
        shown = {f"{kind}_hidden_states": features[kind] for kind in KINDS}
        return CrossVLLMModelOutput(**outputs, **shown)


class CrossVLLMForConditionalGeneration(CrossVLLMPreTrainedModel, CrossVLLMGenerationMixin):
    """CrossVLLM with a language modelling head: answers in a granularity, or as both modules of the paper in turn.

    Args:
        config: model configuration.
    """

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: CrossVLLMConfig):
        super().__init__(config)
        self.model = CrossVLLMModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def from_backbone_pretrained(
        cls,
        backbone: str,
        *,
        adapters: bool = True,
        dtype: torch.dtype | str | None = None,
        attn_implementation: str | None = None,
        **config_kwargs,
    ) -> "CrossVLLMForConditionalGeneration":
        """Builds a new CrossVLLM around a published LLaVA-NeXT-Video; both projectors start as the backbone's.

        Args:
            backbone: folder or Hub id of a LLaVA-NeXT-Video.
            adapters: whether each granularity gets a fresh LoRA adapter (needs peft); without, the granularities share
                the whole decoder.
            dtype: type of all weights; None as the backbone is stored.
            attn_implementation: as upstream.
            **config_kwargs: fields of `CrossVLLMConfig`: `coarse_stride`, `rope_factor`, `lora_r`, and so on.

        Returns:
            The model in evaluation mode.

        Raises:
            ValueError: another architecture, or settings that do not fit the backbone.
        """
        options = {"dtype": dtype, "attn_implementation": attn_implementation}
        model = build_from_backbone(cls, backbone, **options, **config_kwargs)
        if adapters:
            model.add_adapters()
        return model

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.lm_head = value

    def get_vision_features(
        self, pixel_values_videos: torch.Tensor, video_num_frames: torch.Tensor | None = None, **kwargs
    ) -> list[torch.Tensor]:
        """Gives the tower's patches of every frame, see `CrossVLLMModel.get_vision_features`."""
        return self.model.get_vision_features(pixel_values_videos, video_num_frames, **kwargs)

    def get_video_features(
        self,
        pixel_values_videos: torch.Tensor | None = None,
        video_num_frames: torch.Tensor | None = None,
        **kwargs,
    ) -> CrossVLLMVisionOutput:
        """Encodes videos in a granularity, see `CrossVLLMModel.get_video_features`."""
        return self.model.get_video_features(pixel_values_videos, video_num_frames, **kwargs)

    def get_image_features(self, pixel_values: torch.Tensor, **kwargs) -> CrossVLLMVisionOutput:
        """Encodes images, see `CrossVLLMModel.get_image_features`."""
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
        vision_features: Sequence[torch.Tensor] | None = None,
        mm_encoder_outputs: dict[str, ModelOutput] | None = None,
        encoded_video: CrossVLLMEncodedVideo | None = None,
        granularity: str | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CrossVLLMCausalLMOutput:
        """Runs the model and, with labels, its loss.

        Args:
            encoded_video: features from `encode_video`, in place of `pixel_values_videos`.
            labels: (B, S) next-token labels, -100 ignored.
            logits_to_keep: last positions (or their indices) to compute logits for, 0 for all.

        The other arguments are those of `CrossVLLMModel.forward`.

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
            vision_features=self.use_encoded_video(encoded_video, vision_features, pixel_values_videos),
            mm_encoder_outputs=mm_encoder_outputs,
            granularity=granularity,
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
        return CrossVLLMCausalLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
            video_hidden_states=outputs.video_hidden_states,
        )


AutoModel.register(CrossVLLMConfig, CrossVLLMModel, exist_ok=True)
AutoModelForImageTextToText.register(CrossVLLMConfig, CrossVLLMForConditionalGeneration, exist_ok=True)
AutoModelForMultimodalLM.register(CrossVLLMConfig, CrossVLLMForConditionalGeneration, exist_ok=True)

__all__ = ["CrossVLLMForConditionalGeneration", "CrossVLLMModel", "CrossVLLMPreTrainedModel"]
