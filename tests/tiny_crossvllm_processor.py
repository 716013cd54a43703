"""A tiny CrossVLLM processor for the tests, and what transformers' common processor tests need of it."""

from functools import partial
from typing import Any

from transformers import CLIPImageProcessor

from longvideo.processing.crossvllm.processing_crossvllm import CrossVLLMProcessor
from longvideo.processing.crossvllm.video_processing_crossvllm import CrossVLLMVideoProcessor
from tests.tiny import tiny_tokenizer

SIDE = 48
PATCH = 4


def tiny_crossvllm_processor(
    side: int = SIDE,
    tokenizer: Any = None,
    coarse_stride: int = 6,
    fine_stride: int = 2,
    **kwargs: Any,
) -> CrossVLLMProcessor:
    """A processor for `tests.tiny_crossvllm.tiny_crossvllm_config`; `kwargs` go to the video processor.

    A frame has 12 x 12 patches: 4 coarse and 36 fine tokens; a video 12 coarse frames and a segment 4 fine ones.
    """
    sizes = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    frames = {"coarse_num_frames": 12, "fine_num_frames": 4, "coarse_training_frames": 6, "fine_training_frames": 2}
    return CrossVLLMProcessor(
        image_processor=CLIPImageProcessor(**sizes),
        tokenizer=tokenizer or tiny_tokenizer(),
        video_processor=CrossVLLMVideoProcessor(**sizes, **{**frames, **kwargs}),
        patch_size=PATCH,
        coarse_stride=coarse_stride,
        fine_stride=fine_stride,
    )


def crossvllm_suite() -> dict[str, Any]:
    """The entries of a factory in `tests/hf_factories.py` that concern the processor."""
    # The suite pads to 76 tokens and more; an image of 48 pixels alone has 144.
    return {
        "processor": partial(tiny_crossvllm_processor, side=24),
        "needs_torchcodec": False,
        "skip": {},
        "overrides": {"video_sampling_expectations": property(lambda self: sampling_expectations())},
    }


def sampling_expectations() -> list[dict[str, Any]]:
    """Frames taken of the suite's film, 11 at 30 per second: as many as asked for, all by default."""
    return [
        {"num_frames": 3, "fps": None, "expected_dim": 1, "output_length": 3},
        {"num_frames": None, "fps": 10, "expected_dim": 1, "output_length": 3},
        {"do_sample_frames": False, "fps": 10, "expected_dim": 1, "output_length": 11},
        {"do_sample_frames": False, "expected_dim": 1, "output_length": 11},
        {"expected_dim": 1, "output_length": 11},
    ]
