"""A tiny LLaVA-ST processor for the tests, and what transformers' common processor tests need of it."""

from typing import Any

from longvideo.processing.llava_st.image_processing_llava_st import LlavaSTImageProcessor
from longvideo.processing.llava_st.processing_llava_st import LlavaSTProcessor
from longvideo.processing.llava_st.tokenizer_llava_st import add_coordinate_tokens
from longvideo.processing.llava_st.video_processing_llava_st import LlavaSTVideoProcessor
from tests.tiny import tiny_tokenizer

SIDE = 32


def tiny_llava_st_tokenizer(num_temporal: int = 6, num_spatial: int = 5):
    """The byte tokenizer with the tokens of LLaVA-ST behind, as `tests.tiny_llava_st.tiny_llava_st_ids` counts."""
    tokenizer = tiny_tokenizer()
    add_coordinate_tokens(tokenizer, num_temporal, num_spatial)
    return tokenizer


def tiny_llava_st_processor(
    num_temporal: int = 6,
    num_spatial: int = 5,
    num_frames: int = 6,
    temporal_factor: int = 3,
    side: int = SIDE,
    patch_size: int = 8,
    spatial_factor: int = 2,
    tokenizer: Any = None,
    **kwargs: Any,
) -> LlavaSTProcessor:
    """A processor for `tests.tiny_llava_st.tiny_llava_st_config`; `kwargs` go to the video processor."""
    size = {"height": side, "width": side}
    return LlavaSTProcessor(
        image_processor=LlavaSTImageProcessor(size=size),
        tokenizer=tokenizer or tiny_llava_st_tokenizer(num_temporal, num_spatial),
        video_processor=LlavaSTVideoProcessor(
            size=size, num_frames=num_frames, temporal_factor=temporal_factor, **kwargs
        ),
        patch_size=patch_size,
        spatial_factor=spatial_factor,
    )


def llava_st_suite() -> dict[str, Any]:
    """The entries of a factory in `tests/hf_factories.py` that concern the processor."""
    return {
        "processor": lambda: tiny_llava_st_processor(temporal_factor=1),
        "needs_torchcodec": False,
        # Any number of frames, and a start without a fixed one: the suite counts with 3, 6, 8 and 11.
        "video_processor_dict": {"temporal_factor": 1},
        "skip": {
            "test_video_processor_from_dict_with_kwargs": "a number as size is a square, as the tower needs; the "
            "suite takes it for the shortest edge",
            "test_call_sample_frames": "the suite wants an error for more frames than there are; here they repeat, as "
            "in the release (tests/llava_st/test_processing_llava_st.py has the rest of it)",
        },
        "overrides": {"video_sampling_expectations": property(lambda self: spread_expectations())},
    }


def spread_expectations() -> list[dict[str, Any]]:
    """Frames taken of the suite's film, 11 at 30 per second: as many as asked for, six by default."""
    return [
        {"num_frames": 3, "fps": None, "expected_dim": 1, "output_length": 3},
        {"num_frames": None, "fps": 10, "expected_dim": 1, "output_length": 4},
        {"do_sample_frames": False, "fps": 10, "expected_dim": 1, "output_length": 11},
        {"do_sample_frames": False, "expected_dim": 1, "output_length": 11},
        {"expected_dim": 1, "output_length": 6},
    ]
