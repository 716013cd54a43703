"""The small models that are trained on the corpus: tokenizer, processor and configuration of each architecture."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Dinov2Config,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2Config,
    SiglipVisionConfig,
)

from longvideo.evaluation.corpus import all_questions, describe, make_scene
from longvideo.modeling.encoders.umt.configuration_umt import UMTVisionConfig
from longvideo.modeling.longvu.configuration_longvu import LongVUConfig
from longvideo.modeling.longvu.modeling_longvu import LongVUForConditionalGeneration
from longvideo.modeling.videochat_flash.configuration_videochat_flash import VideoChatFlashConfig
from longvideo.modeling.videochat_flash.modeling_videochat_flash import VideoChatFlashForConditionalGeneration
from longvideo.processing.longvu.image_processing_longvu import LongVUImageProcessor
from longvideo.processing.longvu.processing_longvu import LongVUProcessor
from longvideo.processing.longvu.video_processing_longvu import LongVUVideoProcessor
from longvideo.processing.shared.timestamps import TIME_MESSAGE
from longvideo.processing.videochat_flash.image_processing_videochat_flash import VideoChatFlashImageProcessor
from longvideo.processing.videochat_flash.processing_videochat_flash import VideoChatFlashProcessor
from longvideo.processing.videochat_flash.video_processing_videochat_flash import VideoChatFlashVideoProcessor
from longvideo.tiny_training.tower import CLIPS, IMAGES, TowerLessons

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|image_pad|>", "<|video_pad|>"]
NUM_TOKENIZER_SCENES = 1500
NUM_FRAMES = 16
FRAME_SIZE = 48
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
        pictures_first: whether single pictures are described before any video, as its published recipe does.
    """

    build: Callable[[], tuple[PreTrainedModel, ProcessorMixin]]
    lessons: tuple[TowerLessons, ...]
    frame_size: int
    num_frames: int
    pictures_first: bool = False


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


def train_tokenizer(vocab_size: int = 1024) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer on the corpus; any other text falls apart into bytes.

    Args:
        vocab_size: largest number of tokens.

    Returns:
        A ChatML tokenizer with visual placeholders.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        corpus_texts(),
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=SPECIAL_TOKENS,
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
        extra_special_tokens={"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"},
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
        ),
        FRAME_SIZE,
        NUM_FRAMES,
        pictures_first=True,
    ),
}
