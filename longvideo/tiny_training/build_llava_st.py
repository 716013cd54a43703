"""The tiny LLaVA-ST: configuration, tokenizer and processor."""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, ProcessorMixin, SiglipVisionConfig

from longvideo.evaluation.corpus import make_groundings, make_scene
from longvideo.modeling.llava_st.configuration_llava_st import LlavaSTConfig
from longvideo.modeling.llava_st.modeling_llava_st import LlavaSTForConditionalGeneration
from longvideo.processing.llava_st.image_processing_llava_st import LlavaSTImageProcessor
from longvideo.processing.llava_st.processing_llava_st import LlavaSTProcessor
from longvideo.processing.llava_st.tokenizer_llava_st import add_coordinate_tokens
from longvideo.processing.llava_st.video_processing_llava_st import LlavaSTVideoProcessor
from longvideo.tiny_training.build_parts import (
    INIT_STD,
    NUM_TOKENIZER_SCENES,
    build_text_config,
    last_connector_layer,
    order_numbers,
    train_tokenizer,
)
from longvideo.tiny_training.grounding_stages import GroundingStage

# As many times as frames, so that every frame has a token, and places finer than patches.
GROUNDING_SIZE = 64
GROUNDING_FRAMES = 20
NUM_SPATIAL_TOKENS = 32


def grounding_corpus_texts() -> Iterator[str]:
    """Yields the wordings of questions about times and places, as often as makes each of their words a token."""
    for seed in range(NUM_TOKENIZER_SCENES // 5):
        for grounding in make_groundings(make_scene(seed, "train")):
            yield re.sub(r"<[^>]*>", "", f"user\n{grounding.question}")
            yield re.sub(r"<[^>]*>", "", f"assistant\n{grounding.answer}")


@torch.no_grad()
def order_coordinates(model: LlavaSTForConditionalGeneration) -> None:
    """Gives the coordinates of each axis embeddings in waves, so that near ones are near from the start.

    The published model learns its tables from far more rows. Each axis has waves in directions of its own, because the
    three are added to one feature; twice as long as words, they are noticed there sooner.

    Args:
        model: its input embedding, which is its head as well, is changed in place.
    """
    table, start = model.get_input_embeddings().weight, model.config.coordinate_token_start
    for size in model.config.coordinate_sizes:
        # The slowest wave passes half a turn over the axis, the quickest one in three tokens.
        frequencies = torch.logspace(math.log10(math.pi / size), math.log10(math.tau / 3), table.shape[1] // 2)
        angles = torch.arange(size)[:, None] * frequencies
        turn, _ = torch.linalg.qr(torch.randn(table.shape[1], table.shape[1]))
        table[start : start + size] = torch.cat([angles.sin(), angles.cos()], dim=1) @ turn * 2 * INIT_STD * 2**0.5
        start += size


def build_llava_st(*, use_lape: bool = True, use_packer: bool = True) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Makes the tiny LLaVA-ST, random, with its processor.

    Args:
        use_lape: False leaves the position embeddings out (ablation).
        use_packer: False takes means in place of the packers (ablation).

    Returns:
        Model and processor.
    """
    tokenizer = train_tokenizer(texts=grounding_corpus_texts(), has_placeholders=False)
    fields = add_coordinate_tokens(tokenizer, GROUNDING_FRAMES, NUM_SPATIAL_TOKENS)
    side = {"height": GROUNDING_SIZE, "width": GROUNDING_SIZE}
    factors = {"spatial_factor": 2, "temporal_factor": 5}
    config = LlavaSTConfig(
        vision_config=SiglipVisionConfig(
            hidden_size=96,
            intermediate_size=288,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=GROUNDING_SIZE,
            patch_size=8,
            vision_use_head=False,
        ),
        text_config=build_text_config(tokenizer),
        **fields,
        **factors,
        num_frames=GROUNDING_FRAMES,
        packer_hidden_size=96,
        packer_num_heads=4,
        use_lape=use_lape,
        use_packer=use_packer,
        initializer_range=INIT_STD,
    )
    processor = LlavaSTProcessor(
        image_processor=LlavaSTImageProcessor(size=side),
        tokenizer=tokenizer,
        video_processor=LlavaSTVideoProcessor(size=side, num_frames=GROUNDING_FRAMES, temporal_factor=5),
        patch_size=8,
        **factors,
    )
    model = LlavaSTForConditionalGeneration(config)
    order_numbers(model, tokenizer)
    order_coordinates(model)
    return model, processor


def begin_llava_st_stage(model: PreTrainedModel, stage: GroundingStage, without: Sequence[str]) -> None:
    """Switches position embeddings on or off, and sets length and order of what the decoder sees.

    Args:
        model: model to train next.
        stage: the stage.
        without: what is left out.
    """
    model.config.use_lape = stage.lape and "lape" not in without
    with torch.no_grad():
        for value in last_connector_layer(model).parameters():
            value.mul_(stage.feature_scale)
        for layer in model.model.packer.children() if model.config.use_packer else ():
            layer.to_out.weight.mul_(stage.packer_scale)
    # Without position embeddings nothing would be left to tell places or times by.
    shuffle_tokens(model, stage.shuffled if model.config.use_lape else 0.0)


def shuffle_tokens(model: LlavaSTForConditionalGeneration, chance: float) -> None:
    """Gives the decoder what it sees in random order in training: patches or packed tokens, each with its embedding.

    Args:
        model: its inner model's `get_image_features` and `get_video_features` are wrapped.
        chance: how often; 0 takes an earlier wrapping away.
    """
    inner = model.model
    for name in ("get_image_features", "get_video_features"):
        inner.__dict__.pop(name, None)
        if chance:
            setattr(inner, name, _in_random_order(inner, getattr(inner, name), chance))


def _in_random_order(inner: nn.Module, encode: Callable[..., Any], chance: float) -> Callable[..., Any]:
    def encode_in_random_order(*args: Any, **kwargs: Any) -> Any:
        output = encode(*args, **kwargs)
        if inner.training and torch.rand(()) < chance:
            output.pooler_output = [x[torch.randperm(len(x), device=x.device)] for x in output.pooler_output]
        return output

    return encode_in_random_order
