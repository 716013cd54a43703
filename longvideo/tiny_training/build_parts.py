"""What the small models have in common: tokenizer, decoder, and how their towers see frames."""

import math
from collections.abc import Iterable, Iterator
from itertools import chain

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Qwen2Config

from longvideo.evaluation.corpus import all_questions, describe, make_scene

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|image_pad|>", "<|video_pad|>"]
NUM_TOKENIZER_SCENES = 1500
NUM_FRAMES = 16
FRAME_SIZE = 48
# About one over the root of the width: with the usual 0.02 models this narrow hardly begin to look at the frames.
INIT_STD = 0.06


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


def build_text_config(tokenizer: PreTrainedTokenizerFast, *, num_layers: int = 4) -> Qwen2Config:
    """Makes the configuration of the decoder that all tiny models have.

    Args:
        tokenizer: of the model.
        num_layers: other than four in ablations.

    Returns:
        The configuration.
    """
    return Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=num_layers,
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
