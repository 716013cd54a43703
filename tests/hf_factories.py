"""What `tests/run_hf_suite.py` runs transformers' common tests on: one factory per architecture.

A factory takes no argument and returns a dict with
    config              a tiny configuration, at most two layers per tower (the suite's own limit)
    model_classes       the generative class first
    inputs_dict         tensors for forward: input_ids, attention_mask and pixels
    num_positions       length of hidden states for these inputs, where it is not that of input_ids
    processor           a callable that returns a fresh processor
    needs_torchcodec    False where the video processor decodes files without torchcodec
    video_processor_dict  settings of the video processor in its tests, beside resizing, cropping and normalizing
    max_lengths         length attributes of the processor tests, where ours need other ones
    skip                {test name or pattern: reason}, for tests that do not apply
    overrides           attributes or methods of every test class
"""

import torch
from transformers import ProcessorMixin

import longvideo  # noqa: F401 (registers the architectures)
from longvideo.modeling.crosslmm.modeling_crosslmm import CrossLMMForConditionalGeneration, CrossLMMModel
from longvideo.modeling.crossvllm.modeling_crossvllm import CrossVLLMForConditionalGeneration, CrossVLLMModel
from longvideo.modeling.llava_st.modeling_llava_st import LlavaSTForConditionalGeneration, LlavaSTModel
from longvideo.modeling.llava_st.splicing_llava_st import block_ids
from longvideo.modeling.longvu.modeling_longvu import LongVUForConditionalGeneration, LongVUModel
from longvideo.modeling.videochat_flash.modeling_videochat_flash import (
    VideoChatFlashForConditionalGeneration,
    VideoChatFlashModel,
)
from tests.tiny import tiny_videochat_flash_config, tiny_videochat_flash_processor
from tests.tiny_crosslmm import tiny_crosslmm_config
from tests.tiny_crosslmm_processor import crosslmm_suite
from tests.tiny_crossvllm import tiny_crossvllm_config
from tests.tiny_crossvllm_processor import crossvllm_suite
from tests.tiny_llava_st import tiny_llava_st_config
from tests.tiny_llava_st_processor import llava_st_suite
from tests.tiny_longvu import tiny_longvu_config
from tests.tiny_longvu_processor import longvu_suite

FACTORIES = ("videochat_flash", "longvu", "llava_st", "crosslmm", "crossvllm")


def videochat_flash() -> dict:
    """VideoChat-Flash with visual dropout off: one image and one video of one clip in every prompt."""
    # Suite tests fill up batches smaller than 7 with ids below 5, and clamp ids to a vocabulary that is 15 smaller:
    # neither may make or lose a placeholder, because placeholders that do not fit the pixels are an error here.
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
        "processor": videochat_flash_processor,
        "needs_torchcodec": False,
        # Clips of one frame: the suite counts with 3 and 6 frames.
        "video_processor_dict": {"mm_local_num_frames": 1},
        "skip": {
            "test_video_processor_from_dict_with_kwargs": "a number as size is a square, as the tower needs; the "
            "suite takes it for the shortest edge",
        },
        "overrides": {
            "additional_model_inputs": ["pixel_values_videos", "pixel_values"],
            "video_sampling_expectations": property(lambda self: whole_clip_expectations()),
        },
    }


def videochat_flash_processor() -> ProcessorMixin:
    """The tiny processor with one tile per image, because the suite expects one row of pixels per image."""
    processor = tiny_videochat_flash_processor()
    processor.image_processor.image_aspect_ratio = "square"
    processor.image_processor.multi_image_aspect_ratio = "square"
    return processor


def whole_clip_expectations() -> list[dict]:
    """Frames taken of the suite's film, 11 at 30 per second: whole clips of four, and sampling is on by default."""
    return [
        {"num_frames": 3, "fps": None, "expected_dim": 1, "output_length": 4},
        {"num_frames": None, "fps": 10, "expected_dim": 1, "output_length": 4},
        {"do_sample_frames": False, "fps": 10, "expected_dim": 1, "output_length": 12},
        {"do_sample_frames": False, "expected_dim": 1, "output_length": 12},
        {"expected_dim": 1, "output_length": 4},
    ]


def longvu() -> dict:
    """LongVU with one image and one video of two frames in every prompt, each at a single placeholder."""
    # Ids as above: the suite fills up small batches with ids below 5 and clamps ids.
    config = tiny_longvu_config(image_token_id=5, video_token_id=6)
    batch_size, num_frames, side = 7, 2, config.vision_config.image_size
    torch.manual_seed(0)
    input_ids = torch.randint(10, 200, (batch_size, 12))
    input_ids[:, 2] = config.image_token_id
    input_ids[:, 4] = config.video_token_id
    parts = longvu_suite()
    pixels = ("pixel_values_videos", "pixel_values_videos_dino", "pixel_values", "pixel_values_dino")
    return {
        **parts,
        "config": config,
        "model_classes": (LongVUForConditionalGeneration, LongVUModel),
        "inputs_dict": {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "pixel_values_videos": torch.rand(batch_size, num_frames, 3, side, side),
            "pixel_values_videos_dino": torch.rand(batch_size, num_frames, 3, side, side),
            "pixel_values": torch.rand(batch_size, 3, side, side),
            "pixel_values_dino": torch.rand(batch_size, 3, side, side),
        },
        # 10 of text, 6 of the image, 12 of each frame.
        "num_positions": 40,
        "overrides": {**parts["overrides"], "additional_model_inputs": list(pixels)},
    }


def llava_st() -> dict:
    """LLaVA-ST with one image, one video and a time to inject in every prompt."""
    # Ids as above; besides, the suite makes the vocabulary smaller by 15, which may not cut off coordinates.
    config = tiny_llava_st_config(first_id=5, text_kwargs={"vocab_size": 264})
    batch_size, side = 7, config.vision_config.image_size
    torch.manual_seed(0)
    visuals = [*block_ids(config, "image"), 100, *block_ids(config, "video")]
    input_ids = torch.randint(40, 200, (batch_size, len(visuals) + 8))
    input_ids[:, 2 : 2 + len(visuals)] = torch.tensor(visuals)
    input_ids[:, -4] = config.temporal_input_token_id
    return {
        **llava_st_suite(),
        "config": config,
        "model_classes": (LlavaSTForConditionalGeneration, LlavaSTModel),
        "inputs_dict": {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "pixel_values_videos": torch.rand(batch_size, config.num_frames, 3, side, side),
            "pixel_values": torch.rand(batch_size, 3, side, side),
            "coordinate_values": torch.full(input_ids.shape, 0.3),
        },
        "overrides": {
            **llava_st_suite()["overrides"],
            "additional_model_inputs": ["pixel_values_videos", "pixel_values", "coordinate_values"],
        },
    }


def crosslmm() -> dict:
    """CrossLMM with cross-attention in both layers, one image and one video of two frames in every prompt."""
    # Ids as above. The feature layer is the last, because the suite counts hidden states of all the tower's layers.
    config = tiny_crosslmm_config(
        num_hidden_layers=2,
        vision_kwargs={"num_hidden_layers": 2},
        vision_feature_layer=-1,
        cross_attention_interval=1,
        image_token_id=5,
        video_token_id=6,
    )
    batch_size, num_frames, side = 7, 2, config.vision_config.image_size
    per_image, per_video = config.tokens_per_frame, num_frames * config.tokens_per_frame
    torch.manual_seed(0)
    input_ids = torch.randint(10, 200, (batch_size, per_image + per_video + 10))
    input_ids[:, 2 : 2 + per_image] = config.image_token_id
    input_ids[:, 5 + per_image : 5 + per_image + per_video] = config.video_token_id
    parts = crosslmm_suite()
    return {
        **parts,
        "config": config,
        "model_classes": (CrossLMMForConditionalGeneration, CrossLMMModel),
        "inputs_dict": {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "pixel_values_videos": torch.rand(batch_size, num_frames, 3, side, side),
            "pixel_values": torch.rand(batch_size, 3, side, side),
        },
        "overrides": {**parts["overrides"], "additional_model_inputs": ["pixel_values_videos", "pixel_values"]},
    }


def crossvllm() -> dict:
    """CrossVLLM without adapters, coarse, with one image and one video of two frames in every prompt."""
    # Ids as above. The feature layer is the last, because the suite counts hidden states of all the tower's layers.
    # Few patches keep an image short, which is not pooled.
    config = tiny_crossvllm_config(
        vision_kwargs={"num_hidden_layers": 2, "image_size": 24},
        vision_feature_layer=-1,
        coarse_stride=3,
        image_token_id=5,
        video_token_id=6,
    )
    batch_size, num_frames, side = 7, 2, config.vision_config.image_size
    per_image, per_video = config.tokens_per_image, num_frames * config.tokens_per_frame("coarse")
    torch.manual_seed(0)
    input_ids = torch.randint(10, 200, (batch_size, per_image + per_video + 10))
    input_ids[:, 2 : 2 + per_image] = config.image_token_id
    input_ids[:, 5 + per_image : 5 + per_image + per_video] = config.video_token_id
    parts = crossvllm_suite()
    return {
        **parts,
        "config": config,
        "model_classes": (CrossVLLMForConditionalGeneration, CrossVLLMModel),
        "inputs_dict": {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "pixel_values_videos": torch.rand(batch_size, num_frames, 3, side, side),
            "pixel_values": torch.rand(batch_size, 3, side, side),
        },
        "skip": {
            **parts["skip"],
            "test_training_gradient_checkpointing*": "every parameter would need a gradient, but a granularity's "
            "projector gets none in the other one; tests/crossvllm/test_granularity_crossvllm.py tests both",
        },
        "overrides": {**parts["overrides"], "additional_model_inputs": ["pixel_values_videos", "pixel_values"]},
    }
