"""Calls of a processor: placeholders of prompts."""

from transformers import processing_utils

from longvideo.processing.shared.processor_calls import VIDEO_TOKEN, count_token


def test_placeholders_that_a_user_typed_are_not_counted() -> None:
    mark = getattr(processing_utils, "_CONTROL_TOKEN_START", "")
    assert count_token(f"{VIDEO_TOKEN} and {VIDEO_TOKEN * 2}?", VIDEO_TOKEN) == 3
    assert count_token("Why?", VIDEO_TOKEN) == 0
    # Transformers without marks counts everything.
    assert count_token(f"{VIDEO_TOKEN} and {mark}{VIDEO_TOKEN}?", VIDEO_TOKEN) == (1 if mark else 2)
