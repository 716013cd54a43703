"""Tiny checkpoints of the architectures behind the first one, for tests that do the same with each."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from tests.tiny_crosslmm import tiny_crosslmm_model
from tests.tiny_crosslmm_processor import tiny_crosslmm_processor
from tests.tiny_crossvllm import tiny_crossvllm_model
from tests.tiny_crossvllm_processor import tiny_crossvllm_processor
from tests.tiny_llava_st import tiny_llava_st_model
from tests.tiny_llava_st_processor import tiny_llava_st_processor
from tests.tiny_longvu import tiny_longvu_model
from tests.tiny_longvu_processor import tiny_longvu_processor


class Tiny(NamedTuple):
    """How to make a tiny checkpoint: `prefix` of its class names, makers of `model` and `processor`."""

    prefix: str
    model: Callable[..., Any]
    processor: Callable[..., Any]


TINY = {
    "longvu": Tiny("LongVU", partial(tiny_longvu_model, context_length=400), tiny_longvu_processor),
    "llava_st": Tiny("LlavaST", tiny_llava_st_model, tiny_llava_st_processor),
    "crosslmm": Tiny("CrossLMM", tiny_crosslmm_model, tiny_crosslmm_processor),
    "crossvllm": Tiny("CrossVLLM", tiny_crossvllm_model, tiny_crossvllm_processor),
}


def save_tiny(model_type: str, folder: Path) -> Path:
    """Saves model and processor.

    Args:
        model_type: key of `TINY`.
        folder: where to.

    Returns:
        The folder.
    """
    TINY[model_type].model().save_pretrained(folder)
    TINY[model_type].processor().save_pretrained(folder)
    return folder
