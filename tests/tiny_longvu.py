"""Tiny random LongVU models for the tests."""

import torch
from transformers import LlamaConfig

from longvideo.modeling.longvu.configuration_longvu import LongVUConfig
from tests.tiny import tiny_text_config


def tiny_longvu_config(
    num_hidden_layers: int = 2, text: str = "qwen2", text_kwargs: dict | None = None, **kwargs
) -> LongVUConfig:
    """Towers with 7 x 7 patches of 4 pixels, a common grid of 6, full frames of 3 x 3 tokens, low ones of 2 x 2.

    Frames have 28 pixels for both towers; DINOv2's table is made for 10 x 10 patches. A square frame gives 12 tokens
    with its newlines, or 6 at low resolution; 120 positions hold text and video.
    """
    decoder = tiny_text_config(num_hidden_layers, **(text_kwargs or {}))
    if text == "llama":
        names = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
        shared = {name: getattr(decoder, name) for name in (*names, "max_position_embeddings", "pad_token_id")}
        ids = {"bos_token_id": 1, "eos_token_id": 2}
        decoder = LlamaConfig(**{**shared, **ids, "num_hidden_layers": num_hidden_layers, **(text_kwargs or {})})
    tower = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 4}
    return LongVUConfig(
        **{
            "vision_config": {
                "model_type": "siglip_vision_model",
                **tower,
                "intermediate_size": 48,
                "image_size": 28,
            },
            "dino_config": {"model_type": "dinov2", **tower, "mlp_ratio": 2, "image_size": 40, "use_swiglu_ffn": True},
            "text_config": decoder,
            "image_token_id": 3,
            "video_token_id": 4,
            "vision_hidden_size": 32,
            "vision_grid_size": 6,
            "image_token_len": 9,
            "connector_depth": 2,
            "connector_num_heads": 4,
            "lowres_token": 2,
            "vision_chunk_size": 4,
            "context_length": 120,
            "inference_max_length": 8,
            **kwargs,
        }
    )


def tiny_longvu_model(seed: int = 0, **kwargs):
    """A random model in evaluation mode; weights wide enough that answers differ from token to token."""
    from longvideo.modeling.longvu.modeling_longvu import LongVUForConditionalGeneration

    torch.manual_seed(seed)
    config = tiny_longvu_config(**kwargs)
    for part in (config, config.text_config, config.vision_config, config.dino_config):
        part.initializer_range = 0.2
    return LongVUForConditionalGeneration(config).eval()
