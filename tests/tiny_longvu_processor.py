"""A tiny LongVU processor for the tests, and what transformers' common processor tests need of it."""

import unittest
from typing import Any

from transformers import ProcessorMixin
from transformers.feature_extraction_utils import BatchFeature

from longvideo.processing.longvu import LongVUImageProcessor, processing_longvu, video_processing_longvu
from longvideo.processing.longvu.video_processing_longvu import LongVUVideoProcessorKwargs
from tests.tiny import tiny_tokenizer

SIDE = 28


def tiny_longvu_processor(side: int = SIDE, dino_side: int | None = None, **kwargs: Any) -> ProcessorMixin:
    """A processor for the tiny model: frames of 28 pixels for both towers; `kwargs` go to the video processor."""
    sizes = {
        "size": {"height": side, "width": side},
        "dino_size": {"height": dino_side or side, "width": dino_side or side},
    }
    return processing_longvu.LongVUProcessor(
        image_processor=LongVUImageProcessor(**sizes),
        tokenizer=tiny_tokenizer(),
        video_processor=video_processing_longvu.LongVUVideoProcessor(**sizes, **kwargs),
    )


class LongVUVideoProcessor(video_processing_longvu.LongVUVideoProcessor):
    """Gives pixels of equally long videos as (videos, F, C, S, S): the common tests count videos on the first axis.

    It is saved and loaded under the name of its base.
    """

    def preprocess(self, videos: Any, **kwargs: Any) -> BatchFeature:
        """As the base, with the frames of each video apart."""
        outputs = super().preprocess(videos, **kwargs)
        counts = [int(count) for count in outputs["video_num_frames"]]
        if len(set(counts)) == 1:
            for name in ("pixel_values_videos", "pixel_values_videos_dino"):
                outputs[name] = outputs[name].reshape(len(counts), counts[0], *outputs[name].shape[1:])
        return outputs


class LongVUProcessor(processing_longvu.LongVUProcessor):
    """Has a video processor of the kind above, whichever was loaded."""

    def __init__(
        self, image_processor=None, tokenizer=None, video_processor=None, chat_template=None, **kwargs
    ) -> None:
        super().__init__(image_processor, tokenizer, put_apart(video_processor), chat_template, **kwargs)


def put_apart(video_processor: video_processing_longvu.LongVUVideoProcessor) -> LongVUVideoProcessor:
    """Make a video processor of the kind above with the same settings."""
    settings = video_processor.to_dict()
    return LongVUVideoProcessor(
        **{name: settings[name] for name in LongVUVideoProcessorKwargs.__annotations__ if name in settings}
    )


def suite_component(self: unittest.TestCase, attribute: str, **kwargs: Any) -> Any:
    """As `get_component` of the common processor tests, with a video processor of the kind above."""
    component = super(type(self), self).get_component(attribute, **kwargs)
    return put_apart(component) if attribute == "video_processor" else component


def longvu_suite() -> dict[str, Any]:
    """The entries of a factory in `tests/hf_factories.py` that concern the processor."""
    return {
        "processor": longvu_suite_processor,
        "needs_torchcodec": False,
        # The suite asks for 3 of 4 frames per second; by the original's rule every frame would be the nearest.
        "video_processor_dict": {"fps_rule": "even"},
        "skip": {
            "test_video_processor_from_dict_with_kwargs": "a number as size is a square, as the tower needs; the "
            "suite takes it for the shortest edge",
        },
        "overrides": {
            "fast_video_processing_class": LongVUVideoProcessor,
            "get_component": suite_component,
            "video_sampling_expectations": property(lambda self: stride_expectations()),
        },
    }


def longvu_suite_processor() -> ProcessorMixin:
    """The tiny processor with pixels apart for each video."""
    parts = tiny_longvu_processor()
    return LongVUProcessor(parts.image_processor, parts.tokenizer, parts.video_processor)


def stride_expectations() -> list[dict[str, Any]]:
    """Frames taken of the suite's film, 11 at 30 per second: every third one, or one per second by default."""
    return [
        {"num_frames": 3, "fps": None, "expected_dim": 1, "output_length": 3},
        {"num_frames": None, "fps": 10, "expected_dim": 1, "output_length": 4},
        {"do_sample_frames": False, "fps": 10, "expected_dim": 1, "output_length": 11},
        {"do_sample_frames": False, "expected_dim": 1, "output_length": 11},
        {"expected_dim": 1, "output_length": 1},
    ]
