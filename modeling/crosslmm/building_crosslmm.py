"""A new CrossLMM out of a published tower and a published decoder."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel, SiglipVisionModel

from longvideo.modeling.crosslmm.configuration_crosslmm import CrossLMMConfig
from longvideo.modeling.crosslmm.decoder_patch import add_t2v, patch_decoder, patched_layers
from longvideo.modeling.crosslmm.vision_crosslmm import CrossLMMProjector, trim_tower


def _load_tower(vision: str, dtype: torch.dtype | str | None) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(vision)
    config = getattr(config, "vision_config", config)
    if config.model_type != "siglip_vision_model":
        raise ValueError(
            f"{vision} holds a tower of type {config.model_type!r}; CrossLMM takes SigLIP towers "
            "('siglip_vision_model'), which fixed-resolution SigLIP2 checkpoints have too."
        )
    return SiglipVisionModel.from_pretrained(vision, config=config, dtype=dtype or "auto")


def build_from_parts(
    model_class: type[PreTrainedModel],
    vision: str,
    text: str,
    *,
    dtype: torch.dtype | str | None = None,
    **config_kwargs: Any,
) -> PreTrainedModel:
    """Builds a new CrossLMM; see `CrossLMMForConditionalGeneration.from_vision_text_pretrained`.

    Args:
        model_class: class with `model` and `lm_head`.
        vision: tower.
        text: decoder with head.
        dtype: type of all weights; None as the parts are stored.
        **config_kwargs: fields of `CrossLMMConfig`.

    Returns:
        The model in evaluation mode.

    Raises:
        ValueError: parts or settings that do not fit.
    """
    tower = _load_tower(vision, dtype)
    decoder = AutoModelForCausalLM.from_pretrained(text, dtype=dtype or "auto")
    config = CrossLMMConfig(vision_config=tower.config, text_config=decoder.config, **config_kwargs)
    language_model = patch_decoder(decoder.get_decoder(), config)
    # On the meta device: the random decoder and tower would be thrown away.
    with torch.device("meta"):
        model = model_class(config)
    projector = CrossLMMProjector(config)
    projector.apply(model._init_weights)
    model.model.vision_tower = trim_tower(tower, config)
    model.model.multi_modal_projector = projector.to(decoder.dtype)
    model.model.language_model = language_model
    model.lm_head = decoder.get_output_embeddings()
    model.tie_weights()
    config.dtype = decoder.dtype
    model.generation_config = GenerationConfig.from_dict(decoder.generation_config.to_dict())
    return model.eval()


def enter_stage_2(model: PreTrainedModel) -> None:
    """Gives a model of stage 1 its T2V; see `CrossLMMForConditionalGeneration.add_t2v`.

    Args:
        model: model with `model.language_model`; changed in place, with its configuration.

    Raises:
        ValueError: the configuration names no layers for cross-attention.
    """
    config, decoder = model.config, model.model.language_model
    if config.use_t2v and patched_layers(decoder):
        return
    if patched_layers(decoder):
        add_t2v(decoder, config)
        return
    config.use_t2v = True
    config.cross_attention_layers = config._derive_layers()
    if not config.cross_attention_layers:
        config.use_t2v = False
        raise ValueError(
            "T2V stands in layers with cross-attention, but cross_attention_interval is None. Build the model with an "
            "interval, for example 4."
        )
    patch_decoder(decoder, config)
