"""A tiny model, its processor and a row for each architecture, for tests that say the same of all of them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from longvideo.trainers import VideoSFTCollator
from tests.tiny import tiny_videochat_flash_model, tiny_videochat_flash_processor
from tests.tiny_crosslmm import tiny_crosslmm_model
from tests.tiny_crosslmm_processor import tiny_crosslmm_processor
from tests.tiny_crossvllm import tiny_crossvllm_model
from tests.tiny_crossvllm_processor import tiny_crossvllm_processor
from tests.tiny_llava_st import tiny_llava_st_model
from tests.tiny_llava_st_processor import tiny_llava_st_processor
from tests.tiny_longvu import tiny_longvu_model
from tests.tiny_longvu_processor import tiny_longvu_processor
from tests.trainers.toy_rows import colour_row

DROPOUT = {
    "mm_llm_compress": True,
    "llm_compress_type": "uniform0_attention",
    "llm_compress_layer_list": [1, 3],
    "llm_image_token_ratio_list": [1.0, 0.5, 0.25],
}


class Kind(NamedTuple):
    """How one variant of an architecture is made.

    Args:
        model: maker of its tiny model.
        processor: maker of its processor.
        settings: given to the maker of the model.
    """

    model: Callable[..., Any]
    processor: Callable[[], Any]
    settings: dict[str, Any]


KINDS = {
    "videochat_flash": Kind(tiny_videochat_flash_model, tiny_videochat_flash_processor, {}),
    "longvu": Kind(tiny_longvu_model, tiny_longvu_processor, {}),
    "llava_st": Kind(tiny_llava_st_model, tiny_llava_st_processor, {}),
    "crosslmm": Kind(tiny_crosslmm_model, tiny_crosslmm_processor, {}),
    # Without the adapters of its granularities, which have tests of their own; as deep as the others.
    "crossvllm": Kind(tiny_crossvllm_model, tiny_crossvllm_processor, {"adapters": False, "num_hidden_layers": 4}),
}
VARIANTS = {
    **KINDS,
    "videochat_flash-dropout": KINDS["videochat_flash"]._replace(settings=DROPOUT),
    "llava_st-split": KINDS["llava_st"]._replace(settings={"coordinate_layout": "split"}),
    "llava_st-tied": KINDS["llava_st"]._replace(settings={"tie_word_embeddings": True}),
    "crosslmm-closed": KINDS["crosslmm"]._replace(settings={"gates": 0.0}),
}


def make_model(name: str, **kwargs: Any) -> Any:
    """The tiny model of a variant, in evaluation mode."""
    kind = VARIANTS[name]
    return kind.model(**{**kind.settings, **kwargs})


def rows_of(name: str) -> list[dict[str, Any]]:
    """Four rows: clips of one or two lengths, answers of unequal length, coordinates where there are any."""
    if name.startswith("llava_st"):
        answers = ["{<t0.25><t0.8>}.", "<t0.4>:[<w0><h0><w0.3><h1>]", "Yes.", "No, it is not."]
        names = ("red", "blue", "green", "white")
        return [colour_row(x, num_frames=6, answer=y) for x, y in zip(names, answers, strict=True)]
    colours = {"red": (4, "red"), "blue": (8, "It is blue."), "green": (4, "green, yes"), "white": (8, "white")}
    return [colour_row(name, num_frames=frames, answer=answer) for name, (frames, answer) in colours.items()]


def make_batch(name: str, num_rows: int = 2) -> dict[str, torch.Tensor]:
    """A batch of the first rows."""
    return VideoSFTCollator(VARIANTS[name].processor())(rows_of(name)[:num_rows])
