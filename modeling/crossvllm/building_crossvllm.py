"""A new CrossVLLM out of a published LLaVA-NeXT-Video, and checkpoints that only refer to their base."""

import copy
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, GenerationConfig, PreTrainedModel

from longvideo.modeling.crossvllm.configuration_crossvllm import CrossVLLMConfig, stretch_rope
from longvideo.modeling.crossvllm.vision_crossvllm import trim_tower


def build_from_backbone(
    model_class: type[PreTrainedModel],
    backbone: str,
    *,
    config: CrossVLLMConfig | None = None,
    dtype: torch.dtype | str | None = None,
    attn_implementation: str | None = None,
    **config_kwargs: Any,
) -> PreTrainedModel:
    """Builds a CrossVLLM around a LLaVA-NeXT-Video; see `from_backbone_pretrained` of the model class.

    Args:
        model_class: class with `model` and `lm_head`.
        backbone: folder or Hub id.
        config: configuration of the new model; None derives it from the backbone's.
        dtype: type of all weights; None as the backbone is stored.
        attn_implementation: as upstream.
        **config_kwargs: fields of `CrossVLLMConfig`, where there is no `config`.

    Returns:
        The model in evaluation mode, without adapters; both projectors start as the backbone's.

    Raises:
        ValueError: another architecture than LLaVA-NeXT-Video, or settings that do not fit it.
    """
    backbone_config = AutoConfig.from_pretrained(backbone)
    if config is None:
        config = CrossVLLMConfig.from_backbone_config(backbone_config, **config_kwargs)
    # The decoder is built with stretched positions.
    backbone_config.text_config = stretch_rope(backbone_config.text_config, config.rope_factor)
    parts = AutoModelForImageTextToText.from_pretrained(
        backbone, config=backbone_config, dtype=dtype or "auto", attn_implementation=attn_implementation
    )
    # On the meta device: random weights would be thrown away.
    with torch.device("meta"):
        model = model_class(config)
    projector = parts.model.multi_modal_projector
    model.model.vision_tower = trim_tower(parts.model.vision_tower, config)
    model.model.projectors["coarse"] = projector
    model.model.projectors["fine"] = copy.deepcopy(projector)
    model.model.language_model = parts.model.language_model
    model.lm_head = parts.lm_head
    model.tie_weights()
    config.vision_config, config.text_config = parts.config.vision_config, parts.config.text_config
    config.dtype = parts.dtype
    model.generation_config = GenerationConfig.from_dict(parts.generation_config.to_dict())
    return model.eval()


def load_base(model_class: type[PreTrainedModel], config: CrossVLLMConfig, **kwargs: Any) -> PreTrainedModel:
    """Loads the base that a checkpoint of adapters refers to.

    Args:
        model_class: class with `model` and `lm_head`.
        config: the checkpoint's, with `base_model_name_or_path`.
        **kwargs: what `from_pretrained` got; of these `dtype` and `attn_implementation` are used for a backbone.

    Returns:
        The model without adapters.

    Raises:
        ValueError: a base of another architecture, or options that a backbone cannot be loaded with.
    """
    base, config.base_model_name_or_path = config.base_model_name_or_path, None
    model_type = AutoConfig.from_pretrained(base).model_type
    if model_type == "crossvllm":
        has_adapters = config.adapters
        model = model_class.from_pretrained(base, config=config, adapters=False, **kwargs)
        model.config.adapters = has_adapters
        return model
    allowed = {name: kwargs.pop(name, None) for name in ("dtype", "attn_implementation")}
    # The Auto classes pass options on that were not given, and some that matter to a download only.
    idle = ("adapter_kwargs", "trust_remote_code")
    kwargs = {name: value for name, value in kwargs.items() if value and name not in idle and name[0] != "_"}
    if kwargs:
        raise ValueError(
            f"A checkpoint that refers to the backbone {base} cannot be loaded with {sorted(kwargs)}. Load it without "
            "and save it whole with save_pretrained, or leave these options out."
        )
    return build_from_backbone(model_class, base, config=config, **allowed)
