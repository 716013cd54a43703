"""What `tests/run_hf_suite.py` runs transformers' common tests on: one factory per architecture.

A factory takes no argument and returns a dict with
    config              a tiny configuration, at most two layers per tower (the suite's own limit)
    model_classes       the generative class first
    inputs_dict         tensors for forward: input_ids, attention_mask and pixels
    processor           a callable that returns a fresh processor
    needs_torchcodec    False where the video processor decodes files without torchcodec
    video_processor_dict  settings for the video processor's tests; size has height and width
    max_lengths         length attributes of the processor tests, where ours need other ones
    skip                {test name or pattern: reason}, for tests that do not apply
    overrides           attributes or methods of every test class
"""

import torch

import longvideo  # noqa: F401 (registers the architectures)
from longvideo.modeling.videochat_flash.modeling_videochat_flash import (
    VideoChatFlashForConditionalGeneration,
    VideoChatFlashModel,
)
from tests.tiny import tiny_videochat_flash_config, tiny_videochat_flash_processor

FACTORIES = ("videochat_flash",)


def videochat_flash() -> dict:
    """VideoChat-Flash with visual dropout off: one image and one video of one clip in every prompt."""
    # Suite tests fill up batches smaller than 7 with ids below 5, and clamp ids to a vocabulary that is 15 smaller: neither
    # may make or lose a placeholder, because placeholders that do not fit the pixels are an error here.
    config = tiny_videochat_flash_config(num_hidden_layers=2, image_token_id=5, video_token_id=6)
    batch_size = 7
    side = config.vision_config.image_size
    tokens_per_clip = config.tokens_per_frame * config.mm_local_num_frames
    torch.manual_seed(0)
    input_ids = torch.randint(10, 200, (batch_size, 2 * tokens_per_clip + 10))
    input_ids[:, 2 : 2 + tokens_per_clip] = config.image_token_id
    input_ids[:, 5 + tokens_per_clip : 5 + 2 * tokens_per_clip] = config.video_token_id
    return {
        "config": config,
        "model_classes": (VideoChatFlashForConditionalGeneration, VideoChatFlashModel),
        "inputs_dict": {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "pixel_values_videos": torch.rand(batch_size, config.mm_local_num_frames, 3, side, side),
            "pixel_values": torch.rand(batch_size, 3, side, side),
        },
        "overrides": {"additional_model_inputs": ["pixel_values_videos", "pixel_values"]},
        "processor": tiny_videochat_flash_processor,
        "needs_torchcodec": False,
        "video_processor_dict": {
            "do_resize": True,
            "size": {"height": 20, "width": 20},
            "do_normalize": True,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
            "do_convert_rgb": True,
        },
    }
