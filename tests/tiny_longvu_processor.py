"""A tiny LongVU processor for the tests."""

from tests.tiny import tiny_tokenizer

SIDE = 28


def tiny_longvu_processor(side: int = SIDE, dino_side: int | None = None, **kwargs):
    """A processor for the tiny model: frames of 28 pixels for both towers; `kwargs` go to the video processor."""
    from longvideo.processing.longvu import LongVUImageProcessor, LongVUProcessor, LongVUVideoProcessor

    sizes = {
        "size": {"height": side, "width": side},
        "dino_size": {"height": dino_side or side, "width": dino_side or side},
    }
    return LongVUProcessor(
        image_processor=LongVUImageProcessor(**sizes),
        tokenizer=tiny_tokenizer(),
        video_processor=LongVUVideoProcessor(**sizes, **kwargs),
    )
