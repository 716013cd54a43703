"""The small models that are trained on the corpus: tokenizer, processor and configuration of each architecture."""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from torch.utils.data import Dataset
from transformers import (
    Dinov2Config,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2Config,
    SiglipVisionConfig,
)

from longvideo.evaluation.corpus import all_questions, describe, make_groundings, make_scene
from longvideo.modeling.encoders.umt.configuration_umt import UMTVisionConfig
from longvideo.modeling.llava_st.configuration_llava_st import LlavaSTConfig
from longvideo.modeling.llava_st.modeling_llava_st import LlavaSTForConditionalGeneration
from longvideo.modeling.longvu.configuration_longvu import LongVUConfig
from longvideo.modeling.longvu.modeling_longvu import LongVUForConditionalGeneration
from longvideo.modeling.videochat_flash.configuration_videochat_flash import VideoChatFlashConfig
from longvideo.modeling.videochat_flash.modeling_videochat_flash import VideoChatFlashForConditionalGeneration
from longvideo.processing.llava_st.image_processing_llava_st import LlavaSTImageProcessor
from longvideo.processing.llava_st.processing_llava_st import LlavaSTProcessor
from longvideo.processing.llava_st.tokenizer_llava_st import add_coordinate_tokens
from longvideo.processing.llava_st.video_processing_llava_st import LlavaSTVideoProcessor
from longvideo.processing.longvu.image_processing_longvu import LongVUImageProcessor
from longvideo.processing.longvu.processing_longvu import LongVUProcessor
from longvideo.processing.longvu.video_processing_longvu import LongVUVideoProcessor
from longvideo.processing.shared.timestamps import TIME_MESSAGE
from longvideo.processing.videochat_flash.image_processing_videochat_flash import VideoChatFlashImageProcessor
from longvideo.processing.videochat_flash.processing_videochat_flash import VideoChatFlashProcessor
from longvideo.processing.videochat_flash.video_processing_videochat_flash import VideoChatFlashVideoProcessor
from longvideo.tiny_training.connector import LongVUConnector
from longvideo.tiny_training.grounding_stages import GROUNDING_STAGES, GroundingConversations, GroundingStage
from longvideo.tiny_training.tower import CLIPS, IMAGES, TowerLessons

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|image_pad|>", "<|video_pad|>"]
NUM_TOKENIZER_SCENES = 1500
NUM_FRAMES = 16
FRAME_SIZE = 48
# Of LLaVA-ST: as many times as frames, so that every frame has a token, and places finer than patches.
GROUNDING_SIZE = 64
GROUNDING_FRAMES = 20
NUM_SPATIAL_TOKENS = 32
# About one over the root of the width: with the usual 0.02 models this narrow hardly begin to look at the frames.
INIT_STD = 0.06


@dataclass(frozen=True)
class TinyModel:
    """How a tiny model is made.

    Args:
        build: returns a fresh model and its processor.
        lessons: how its towers are taught before anything else.
        frame_size: side of the frames in pixels.
        num_frames: frames per video.
        decoder: tiny model of the package whose trained decoder it begins with; none for a fresh one.
        stages: its own stages in place of the common ones.
        make_rows: makes the rows of such a stage, as `CorpusConversations` does of a common one.
        begin_stage: called with model, stage and what is left out before a stage begins.
        connector: gives the last layer of what joins towers and decoder, whose output is brought to the length of the
            words' embeddings before the first stage, and which then learns more slowly than the decoder.
        ablations: what can be left out; `build` takes `use_NAME=False` for each.
    """

    build: Callable[..., tuple[PreTrainedModel, ProcessorMixin]]
    lessons: tuple[TowerLessons, ...]
    frame_size: int
    num_frames: int
    decoder: str = ""
    stages: tuple[Any, ...] = ()
    make_rows: Callable[..., Dataset] | None = None
    begin_stage: Callable[[PreTrainedModel, Any, Sequence[str]], None] | None = None
    connector: Callable[[PreTrainedModel], nn.Linear] | None = None
    ablations: tuple[str, ...] = ()


def corpus_texts() -> Iterator[str]:
    """Yields texts with every word that the corpus uses, as they stand in conversations."""
    yield "system\nYou are a helpful assistant."
    yield "user\nassistant\nDescribe the video .\nDescribe the picture ."
    for seconds in range(61):
        yield f"\nThe video lasts for {seconds}.00 seconds, and {NUM_FRAMES} frames are uniformly sampled from it. "
        yield f"assistant\n{seconds} seconds"
    for seed in range(NUM_TOKENIZER_SCENES):
        scene = make_scene(seed, "train")
        yield "assistant\n" + describe(scene)
        for question in all_questions(scene):
            yield f"user\n{question.multiple_choice}"
            yield f"assistant\n{question.answer}"


def train_tokenizer(
    vocab_size: int = 1024, *, texts: Iterable[str] = (), has_placeholders: bool = True
) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer on the corpus; any other text falls apart into bytes.

    Args:
        vocab_size: largest number of tokens.
        texts: read in addition.
        has_placeholders: whether it has the common visual placeholders.

    Returns:
        A ChatML tokenizer.
    """
    marks = SPECIAL_TOKENS if has_placeholders else SPECIAL_TOKENS[:3]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        chain(corpus_texts(), texts),
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=marks,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        padding_side="left",
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
        **(
            {"extra_special_tokens": {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}}
            if has_placeholders
            else {}
        ),
    )


def build_text_config(tokenizer: PreTrainedTokenizerFast) -> Qwen2Config:
    """Makes the configuration of the decoder that all tiny models have."""
    return Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=3,
        num_key_value_heads=3,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        initializer_range=INIT_STD,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


@torch.no_grad()
def order_numbers(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """Gives the numbers that the corpus uses embeddings in waves, so that near numbers are near from the start.

    A decoder that was trained on text knows as much; from random embeddings every sum would be learned by heart.

    Args:
        model: its input embedding is changed in place.
        tokenizer: of the model.
    """
    table = model.get_input_embeddings().weight
    width = table.shape[1] // 2
    frequencies = torch.logspace(math.log10(math.tau / 200), math.log10(math.tau / 4), width)
    for number in range(61):
        wave = torch.cat([(number * frequencies).sin(), (number * frequencies).cos()])
        for text in (str(number), f" {number}"):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            if len(ids) == 1:
                table[ids[0]] = wave * INIT_STD * 2**0.5


def build_videochat_flash() -> tuple[PreTrainedModel, ProcessorMixin]:
    """Makes the tiny VideoChat-Flash, random, with its processor."""
    tokenizer = train_tokenizer()
    side = {"height": FRAME_SIZE, "width": FRAME_SIZE}
    config = VideoChatFlashConfig(
        vision_config=UMTVisionConfig(
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=FRAME_SIZE,
            patch_size=8,
            # Tables of just this size: interpolated ones blur the quick waves, and with them what moves.
            position_grid_size=FRAME_SIZE // 8,
            position_num_frames=4,
            initializer_range=INIT_STD,
        ),
        text_config=build_text_config(tokenizer),
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        tokens_per_frame=8,
        llm_compress_type="uniform0_attention",
        llm_compress_layer_list=[1, 3],
        llm_image_token_ratio_list=[1.0, 0.75, 0.25],
        initializer_range=INIT_STD,
    )
    processor = VideoChatFlashProcessor(
        image_processor=VideoChatFlashImageProcessor(
            size=side, image_grid_pinpoints=[[FRAME_SIZE * i, FRAME_SIZE * j] for i in (1, 2) for j in (1, 2)]
        ),
        tokenizer=tokenizer,
        video_processor=VideoChatFlashVideoProcessor(size=side, min_frames=NUM_FRAMES, max_frames=NUM_FRAMES),
        tokens_per_frame=config.tokens_per_frame,
        mm_local_num_frames=config.mm_local_num_frames,
    )
    model = VideoChatFlashForConditionalGeneration(config)
    order_numbers(model, tokenizer)
    return model, processor


def build_longvu() -> tuple[PreTrainedModel, ProcessorMixin]:
    """Makes the tiny LongVU, random, with its processor."""
    tokenizer = train_tokenizer()
    side = {"height": FRAME_SIZE, "width": FRAME_SIZE}
    tower = {"hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "patch_size": 8}
    config = LongVUConfig(
        vision_config=SiglipVisionConfig(**tower, intermediate_size=288, image_size=FRAME_SIZE, vision_use_head=False),
        dino_config=Dinov2Config(**tower, mlp_ratio=3, image_size=FRAME_SIZE, initializer_range=INIT_STD),
        text_config=build_text_config(tokenizer),
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        vision_hidden_size=96,
        vision_grid_size=FRAME_SIZE // 8,
        image_token_len=9,
        connector_depth=2,
        connector_num_heads=4,
        lowres_token=2,
        context_length=512,
        initializer_range=INIT_STD,
    )
    processor = LongVUProcessor(
        image_processor=LongVUImageProcessor(size=side, dino_size=side),
        tokenizer=tokenizer,
        video_processor=LongVUVideoProcessor(size=side, dino_size=side),
        time_message=TIME_MESSAGE,
    )
    model = LongVUForConditionalGeneration(config)
    order_numbers(model, tokenizer)
    return model, processor


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
    """Switches position embeddings on or off, as the stage and the ablation have it.

    Args:
        model: model to train next.
        stage: the stage.
        without: what is left out.
    """
    model.config.use_lape = stage.lape and "lape" not in without


def encode_frames(tower: PreTrainedModel, clips: torch.Tensor) -> torch.Tensor:
    """Encodes clips frame by frame with an image tower.

    Args:
        tower: tower of images, with or without a class token in front.
        clips: (B, F, 3, height, width) normalised frames.

    Returns:
        (B, F * L, E) features of the patches.
    """
    features = tower(clips.flatten(0, 1)).last_hidden_state  # (B * F, [1 +] L, E)
    num_patches = (tower.config.image_size // tower.config.patch_size) ** 2
    return features[:, -num_patches:].unflatten(0, clips.shape[:2]).flatten(1, 2)


def last_connector_layer(model: PreTrainedModel) -> nn.Linear:
    """Gives the last layer of the projector."""
    return model.model.multi_modal_projector.linear_2


TINY_MODELS = {
    "videochat_flash": TinyModel(
        build_videochat_flash,
        (
            TowerLessons(
                "tower",
                tower=lambda model: model.model.vision_tower,
                encode=lambda tower, clips: tower(clips).last_hidden_state,
                statistics=lambda processor: (
                    processor.video_processor.image_mean,
                    processor.video_processor.image_std,
                ),
                phases=(IMAGES, CLIPS),
            ),
        ),
        FRAME_SIZE,
        NUM_FRAMES,
    ),
    "longvu": TinyModel(
        build_longvu,
        (
            TowerLessons(
                "siglip",
                tower=lambda model: model.model.vision_tower,
                encode=encode_frames,
                statistics=lambda processor: (
                    processor.video_processor.image_mean,
                    processor.video_processor.image_std,
                ),
                phases=(IMAGES,),
            ),
            TowerLessons(
                "dino",
                tower=lambda model: model.model.dino_tower,
                encode=encode_frames,
                statistics=lambda processor: (
                    processor.video_processor.dino_image_mean,
                    processor.video_processor.dino_image_std,
                ),
                # What it is for is told apart early: whether frames show the same.
                phases=(replace(IMAGES, num_steps=500),),
            ),
            TowerLessons(
                "connector",
                tower=LongVUConnector,
                encode=LongVUConnector.encode,
                statistics=lambda processor: (
                    processor.video_processor.image_mean,
                    processor.video_processor.image_std,
                ),
                phases=(replace(IMAGES, batch_size=64, num_steps=1000, learning_rate=2e-3, centre_weight=20.0),),
            ),
        ),
        FRAME_SIZE,
        NUM_FRAMES,
        decoder="videochat_flash",
        connector=last_connector_layer,
    ),
    "llava_st": TinyModel(
        build_llava_st,
        (
            TowerLessons(
                "siglip",
                tower=lambda model: model.model.vision_tower,
                encode=encode_frames,
                statistics=lambda processor: (
                    processor.video_processor.image_mean,
                    processor.video_processor.image_std,
                ),
                # A picture of this size takes twice the time of the others.
                phases=(replace(IMAGES, batch_size=64, num_steps=1000),),
            ),
        ),
        GROUNDING_SIZE,
        GROUNDING_FRAMES,
        decoder="videochat_flash",
        stages=GROUNDING_STAGES,
        make_rows=GroundingConversations,
        begin_stage=begin_llava_st_stage,
        connector=last_connector_layer,
        ablations=("lape", "packer"),
    ),
}
