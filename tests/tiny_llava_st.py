"""Tiny random LLaVA-ST models for the tests."""

import torch

from longvideo.modeling.llava_st.configuration_llava_st import LlavaSTConfig
from tests.tiny import SPECIAL_TOKENS, tiny_text_config

FIRST_ID = len(SPECIAL_TOKENS) + 256  # behind the bytes of `tests.tiny.tiny_tokenizer`
TOKEN_NAMES = (
    "image_start",
    "image_end",
    "image",
    "video_start",
    "video_end",
    "video",
    "slow_video_start",
    "slow_video_end",
    "temporal_input",
    "temporal_output",
    "height_input",
    "height_output",
    "width_input",
    "width_output",
)


def tiny_llava_st_ids(first_id: int = FIRST_ID) -> dict[str, int]:
    """Ids of the visual and template tokens from `first_id` on, in the order of the release."""
    return {f"{name}_token_id": first_id + i for i, name in enumerate(TOKEN_NAMES)}


def tiny_llava_st_config(
    num_hidden_layers: int = 2, text_kwargs: dict | None = None, first_id: int = FIRST_ID, **kwargs
) -> LlavaSTConfig:
    """4 x 4 patches of 8 pixels, 6 frames, squares of 2 x 2 patches, 3 frames to one.

    16 positions of an image; 6 of a video's fast block and 8 of its slow one. 6 times and 5 heights and widths.
    """
    sizes = {"num_temporal_tokens": 6, "num_spatial_tokens": 5, "coordinate_layout": "folded", **kwargs}
    start = kwargs.get("coordinate_token_start", first_id + len(TOKEN_NAMES))
    vocab_size = start
    if sizes["coordinate_layout"] == "folded":
        vocab_size += sizes["num_temporal_tokens"] + 2 * sizes["num_spatial_tokens"]
    return LlavaSTConfig(
        **{
            "vision_config": {
                "model_type": "siglip_vision_model",
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": 32,
                "patch_size": 8,
            },
            "text_config": tiny_text_config(num_hidden_layers, **{"vocab_size": vocab_size, **(text_kwargs or {})}),
            **tiny_llava_st_ids(first_id),
            "coordinate_token_start": start,
            "num_frames": 6,
            "packer_hidden_size": 16,
            "packer_num_heads": 2,
            "spatial_factor": 2,
            "temporal_factor": 3,
            "vision_chunk_size": 4,
            **sizes,
        }
    )


def tiny_llava_st_model(seed: int = 0, **kwargs):
    """A random model in evaluation mode; weights wide enough that answers differ from token to token."""
    from longvideo.modeling.llava_st.modeling_llava_st import LlavaSTForConditionalGeneration

    torch.manual_seed(seed)
    config = tiny_llava_st_config(**kwargs)
    for part in (config, config.text_config, config.vision_config):
        part.initializer_range = 0.2
    return LlavaSTForConditionalGeneration(config).eval()
