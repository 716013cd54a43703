"""Tiny random CrossLMM models for the tests."""

import torch
from transformers import Gemma2Config, LlamaConfig, MistralConfig, Qwen3Config

from longvideo.modeling.crosslmm.configuration_crosslmm import CrossLMMConfig
from tests.tiny import tiny_text_config

DECODERS = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen3": Qwen3Config, "gemma2": Gemma2Config}
SHARED = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")


def tiny_decoder_config(text: str = "qwen2", num_hidden_layers: int = 4, **kwargs):
    """A decoder of width 32 with four query and two key heads: qwen2, qwen3, llama, mistral or gemma2."""
    if text == "qwen2":
        return tiny_text_config(num_hidden_layers, **kwargs)
    base = tiny_text_config(num_hidden_layers)
    names = (*SHARED, "max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
    shared = {name: getattr(base, name) for name in names}
    shared |= {"num_hidden_layers": num_hidden_layers, "head_dim": 8}
    return DECODERS[text](**{**shared, **kwargs})


def tiny_crosslmm_config(
    num_hidden_layers: int = 4,
    text: str = "qwen2",
    text_kwargs: dict | None = None,
    vision_kwargs: dict | None = None,
    **kwargs,
) -> CrossLMMConfig:
    """Frames of 32 pixels, 4 x 4 tokens of width 24, of which 4 merged ones; cross-attention in layers 0 and 2."""
    return CrossLMMConfig(
        **{
            "vision_config": {
                "model_type": "siglip_vision_model",
                "hidden_size": 24,
                "intermediate_size": 40,
                "num_hidden_layers": 3,
                "num_attention_heads": 2,
                "image_size": 32,
                "patch_size": 8,
                **(vision_kwargs or {}),
            },
            "text_config": tiny_decoder_config(text, num_hidden_layers, **(text_kwargs or {})),
            "image_token_id": 3,
            "video_token_id": 4,
            "tokens_per_frame": 4,
            "cross_attention_interval": 2,
            "cross_attention_chunk_size": 5,
            "vision_chunk_size": 2,
            **kwargs,
        }
    )


def tiny_crosslmm_model(seed: int = 0, gates: float | None = 0.7, **kwargs):
    """A random model in evaluation mode; weights wide enough that answers differ from token to token.

    Args:
        seed: of the weights.
        gates: value of every gate, so that cross-attention shows; None leaves a fresh model's.
        **kwargs: see `tiny_crosslmm_config`.
    """
    from longvideo.modeling.crosslmm.modeling_crosslmm import CrossLMMForConditionalGeneration

    torch.manual_seed(seed)
    config = tiny_crosslmm_config(**kwargs)
    for part in (config, config.text_config, config.vision_config):
        part.initializer_range = 0.2
    model = CrossLMMForConditionalGeneration(config).eval()
    if gates is not None:
        open_gates(model, gates)
    return model


@torch.no_grad()
def open_gates(model: torch.nn.Module, value: float = 0.7) -> None:
    """Sets every gate, and gives output projections that start at zero random weights."""
    for name, parameter in model.named_parameters():
        if name.endswith(("v2v_gate", "t2v_gate")):
            parameter.fill_(value)
        elif "dual_cross_attention" in name and name.endswith("o_proj.weight") and not parameter.any():
            parameter.normal_(std=0.2)
