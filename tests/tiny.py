"""Tiny random models, tokenizers and processors for the tests."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config

from longvideo.modeling.videochat_flash.configuration_videochat_flash import VideoChatFlashConfig
from longvideo.modeling.videochat_flash.modeling_videochat_flash import VideoChatFlashForConditionalGeneration

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|image_pad|>", "<|video_pad|>")


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte tokenizer with the special tokens in front: 5 + 256 ids."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate((*SPECIAL_TOKENS, *alphabet))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        padding_side="left",
        extra_special_tokens={"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"},
    )
    fast.add_tokens(["<|im_start|>"], special_tokens=True)
    return fast


def tiny_text_config(num_hidden_layers: int = 4, **kwargs) -> Qwen2Config:
    """A Qwen2 decoder of width 32 for `tiny_tokenizer`."""
    return Qwen2Config(
        **{
            "vocab_size": 264,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": num_hidden_layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 2048,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            **kwargs,
        }
    )


def tiny_tower_config(model_type: str = "umt_vision_model", **kwargs) -> dict:
    """A tower of two layers for 32-pixel frames, 8 x 8 patches."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    return {"model_type": model_type, **sizes, "image_size": 32, "patch_size": 4, **kwargs}


def tiny_videochat_flash_config(
    tower: str = "umt_vision_model", num_hidden_layers: int = 4, text_kwargs: dict | None = None, **kwargs
) -> VideoChatFlashConfig:
    """4 visual tokens per frame, so 16 per clip of 4 frames and per image tile."""
    vision = tiny_tower_config(tower)
    if tower == "siglip_vision_model":
        vision["vision_use_head"] = False
    return VideoChatFlashConfig(
        **{
            "vision_config": vision,
            "text_config": tiny_text_config(num_hidden_layers, **(text_kwargs or {})),
            "image_token_id": 3,
            "video_token_id": 4,
            "tokens_per_frame": 4,
            "vision_chunk_size": 2,
            **kwargs,
        }
    )


def tiny_videochat_flash_model(seed: int = 0, **kwargs) -> VideoChatFlashForConditionalGeneration:
    """A random model in evaluation mode; weights wide enough that answers differ from token to token."""
    torch.manual_seed(seed)
    config = tiny_videochat_flash_config(**kwargs)
    config.initializer_range = config.text_config.initializer_range = 0.2
    config.vision_config.initializer_range = 0.2
    return VideoChatFlashForConditionalGeneration(config).eval()


def tiny_videochat_flash_processor():
    """A processor for the tiny model."""
    from longvideo.processing.videochat_flash.image_processing_videochat_flash import VideoChatFlashImageProcessor
    from longvideo.processing.videochat_flash.processing_videochat_flash import VideoChatFlashProcessor
    from longvideo.processing.videochat_flash.video_processing_videochat_flash import VideoChatFlashVideoProcessor

    side = {"height": 32, "width": 32}
    grids = [[32 * i, 32 * j] for i in range(1, 4) for j in range(1, 4)]
    return VideoChatFlashProcessor(
        image_processor=VideoChatFlashImageProcessor(size=side, image_grid_pinpoints=grids),
        tokenizer=tiny_tokenizer(),
        video_processor=VideoChatFlashVideoProcessor(size=side, min_frames=4, max_frames=16),
        tokens_per_frame=4,
        mm_local_num_frames=4,
    )
