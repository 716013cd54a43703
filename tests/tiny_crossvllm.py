"""Tiny random CrossVLLM models for the tests."""

import torch
from transformers import LlamaConfig

from longvideo.modeling.crossvllm.configuration_crossvllm import CrossVLLMConfig


def tiny_crossvllm_config(
    num_hidden_layers: int = 2, text_kwargs: dict | None = None, vision_kwargs: dict | None = None, **kwargs
) -> CrossVLLMConfig:
    """Frames of 48 pixels, 12 x 12 patches: 4 coarse tokens and 36 fine tokens per frame, 144 of an image."""
    text = {
        "vocab_size": 264,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": num_hidden_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        **(text_kwargs or {}),
    }
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 48,
        "patch_size": 4,
        "projection_dim": 16,
        **(vision_kwargs or {}),
    }
    frames = {"coarse_num_frames": 12, "fine_num_frames": 4, "coarse_training_frames": 6, "fine_training_frames": 2}
    settings = {"image_token_id": 3, "video_token_id": 4, "vision_chunk_size": 2, **frames, **kwargs}
    return CrossVLLMConfig(vision_config=vision, text_config=LlamaConfig(**text), **settings)


def tiny_crossvllm_model(seed: int = 0, adapters: bool = True, random_adapters: bool = True, **kwargs):
    """A random model in evaluation mode; weights wide enough that answers differ from token to token.

    Args:
        seed: of the weights.
        adapters: whether it has LoRA adapters (needs peft).
        random_adapters: whether the adapters' second matrices are random, so that they show; fresh ones are zero.
        **kwargs: see `tiny_crossvllm_config`.
    """
    from longvideo.modeling.crossvllm.modeling_crossvllm import CrossVLLMForConditionalGeneration

    torch.manual_seed(seed)
    config = tiny_crossvllm_config(**kwargs)
    for part in (config, config.text_config, config.vision_config):
        part.initializer_range = 0.2
    model = CrossVLLMForConditionalGeneration(config).eval()
    if adapters:
        model.add_adapters()
        if random_adapters:
            fill_adapters(model)
    return model


@torch.no_grad()
def fill_adapters(model: torch.nn.Module, std: float = 0.2) -> None:
    """Gives the second matrices of LoRA, which start at zero, random weights."""
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            parameter.normal_(std=std)
