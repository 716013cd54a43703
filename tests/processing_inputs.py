"""What the tests of every processor give it: frames, messages with one video, and the call on a conversation."""

import numpy as np
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import ProcessorMixin


def frames_of(count: int, height: int = 24, width: int = 40) -> np.ndarray:
    """Draws random frames, the same at every call.

    Args:
        count: number of frames, which is also the seed.
        height: in pixels.
        width: in pixels.

    Returns:
        (count, height, width, 3) uint8.
    """
    return np.random.default_rng(count).integers(0, 255, (count, height, width, 3), dtype=np.uint8)


def messages(question: str = "What happens?", **block) -> list[dict]:
    """Writes a conversation of one user message with one video.

    Args:
        question: text behind the video.
        **block: entries of the video's block: its source and its own wishes.

    Returns:
        The conversation.
    """
    return [{"role": "user", "content": [{"type": "video", **block}, {"type": "text", "text": question}]}]


def ask(processor: ProcessorMixin, conversation: list, **processor_kwargs) -> BatchFeature:
    """Turns a conversation, or several, into padded inputs with the metadata of their videos.

    Args:
        processor: the processor under test.
        conversation: messages, or a list of conversations.
        **processor_kwargs: passed on; they win over padding and metadata.

    Returns:
        What the model gets, and `video_metadata`.
    """
    return processor.apply_chat_template(
        conversation,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"return_metadata": True, "padding": True, **processor_kwargs},
    )
