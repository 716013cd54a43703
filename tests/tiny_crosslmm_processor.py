"""A tiny CrossLMM processor for the tests, and what transformers' common processor tests need of it."""

from typing import Any

from longvideo.processing.crosslmm.image_processing_crosslmm import CrossLMMImageProcessor
from longvideo.processing.crosslmm.processing_crosslmm import CrossLMMProcessor
from longvideo.processing.crosslmm.video_processing_crosslmm import CrossLMMVideoProcessor
from tests.tiny import tiny_tokenizer

SIDE = 32


def tiny_crosslmm_processor(
    tokens_per_frame: int = 4, side: int = SIDE, time_message: str = "", tokenizer: Any = None, **kwargs: Any
) -> CrossLMMProcessor:
    """A processor for `tests.tiny_crosslmm.tiny_crosslmm_config`; `kwargs` go to the video processor."""
    size = {"height": side, "width": side}
    return CrossLMMProcessor(
        image_processor=CrossLMMImageProcessor(size=size),
        tokenizer=tokenizer or tiny_tokenizer(),
        video_processor=CrossLMMVideoProcessor(size=size, **{"min_frames": 3, "max_frames": 16, **kwargs}),
        tokens_per_frame=tokens_per_frame,
        time_message=time_message,
    )


def crosslmm_suite() -> dict[str, Any]:
    """The entries of a factory in `tests/hf_factories.py` that concern the processor."""
    return {
        "processor": tiny_crosslmm_processor,
        "needs_torchcodec": False,
        "skip": {
            "test_video_processor_from_dict_with_kwargs": "a number as size is a square, as the tower needs; the "
            "suite takes it for the shortest edge",
        },
        "overrides": {"video_sampling_expectations": property(lambda self: sampling_expectations())},
    }


def sampling_expectations() -> list[dict[str, Any]]:
    """Frames taken of the suite's film, 11 at 30 per second: as many as asked for, three by default."""
    return [
        {"num_frames": 3, "fps": None, "expected_dim": 1, "output_length": 3},
        {"num_frames": None, "fps": 10, "expected_dim": 1, "output_length": 3},
        {"do_sample_frames": False, "fps": 10, "expected_dim": 1, "output_length": 11},
        {"do_sample_frames": False, "expected_dim": 1, "output_length": 11},
        {"expected_dim": 1, "output_length": 3},
    ]
