"""The tiny CrossVLLM: configuration, tokenizer and processor, and the trained tower that it begins with."""

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import (
    AutoModelForImageTextToText,
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlavaNextVideoConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
)

from longvideo.evaluation.corpus.long_scenes import TIME_STEP, long_questions, make_long_scene
from longvideo.modeling.crossvllm.configuration_crossvllm import CrossVLLMConfig
from longvideo.modeling.crossvllm.modeling_crossvllm import CrossVLLMForConditionalGeneration
from longvideo.modeling.videochat_flash.modeling_videochat_flash import VideoChatFlashForConditionalGeneration
from longvideo.processing.crossvllm import policies
from longvideo.processing.crossvllm.processing_crossvllm import CrossVLLMProcessor
from longvideo.processing.crossvllm.video_processing_crossvllm import CrossVLLMVideoProcessor
from longvideo.processing.videochat_flash.video_processing_videochat_flash import VideoChatFlashVideoProcessor
from longvideo.tiny_training.build_parts import FRAME_SIZE, INIT_STD, build_text_config, train_tokenizer

COARSE_FRAMES = 60
FINE_FRAMES = 8
PATCH = 8
LONGEST = 300
NOT_SEEN = "it is not seen here ."
NUM_TOKENIZER_SCENES = 200
ANSWERS = " ASSISTANT:"
BEFORE_START = ' {"t_start": '


def prompt_phrases() -> list[str]:
    """Lists the fixed parts of all prompts and policies.

    Each becomes one token: the prompts are the same in every call, and a model of this size would spend two thirds of
    its positions on reading them.

    Returns:
        Phrases, none of them the beginning of a text that varies.
    """
    opening, closing = policies.OVERVIEW.split("{duration}")
    feedback = policies.REJECTED.split("{start}")[1].replace("{reflection}", "").split("{end}")
    prompts = [
        opening,
        f".0{closing}",
        policies.CHOOSE,
        policies.GROUND,
        policies.GROUNDING_ITEM,
        policies.DIRECT_ITEM,
        policies.COARSE_REPLY,
        policies.GROUNDING_EXAMPLE,
        policies.DIRECT_EXAMPLE,
        policies.DIFFERS,
        policies.DETAIL,
        *policies.FINE_RULES,
        policies.FINE_REPLY,
        policies.FITS_EXAMPLE,
        policies.WRONG_EXAMPLE,
        f".0{feedback[0]}",
        f".0{feedback[1]}",
        "Question: ",
        "USER: ",
        ANSWERS,
    ]
    written = [BEFORE_START, '.0, "t_end": ', '.0, "answer": ""}', ' {"reflection": "', '", "answer": "', '"}']
    return [*prompts, *written, NOT_SEEN]


def long_corpus_texts() -> Iterator[str]:
    """Yields the wordings of questions about long scenes, and all numbers of seconds."""
    for seconds in range(0, LONGEST + 1, TIME_STEP):
        # More often than merges are made of, so that each becomes one token.
        for _ in range(20):
            yield f"\n{seconds}"
    for seed in range(NUM_TOKENIZER_SCENES):
        for found in long_questions(make_long_scene(seed)):
            yield f"USER: {found.question.question}"
            yield f"ASSISTANT: {found.question.answer}"
            yield f"\n{found.question.answer}"


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Trains the tokenizer: that of the other tiny models, with times in steps and the phrases of the prompts."""
    tokenizer = train_tokenizer(texts=long_corpus_texts())
    known = tokenizer.get_vocab()
    numbers = [str(seconds) for seconds in range(0, LONGEST + 1, TIME_STEP)]
    tokenizer.add_tokens([number for number in numbers if number not in known])
    tokenizer.add_tokens(prompt_phrases())
    return tokenizer


@torch.no_grad()
def order_times(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """Gives times in steps embeddings in waves, so that near ones are near from the start; see `order_numbers`.

    Args:
        model: its input embedding, which is its head as well, is changed in place.
        tokenizer: of the model.
    """
    table = model.get_input_embeddings().weight
    width = table.shape[1] // 2
    length = table.norm(dim=1).mean()
    # The slowest wave passes half a turn over all times, the quickest one in four steps.
    slowest, quickest = math.pi / LONGEST, math.tau / (4 * TIME_STEP)
    frequencies = torch.logspace(math.log10(slowest), math.log10(quickest), width)
    turn, _ = torch.linalg.qr(torch.randn(2 * width, 2 * width))
    for seconds in range(0, LONGEST + 1, TIME_STEP):
        wave = torch.cat([(seconds * frequencies).sin(), (seconds * frequencies).cos()]) @ turn
        table[tokenizer.convert_tokens_to_ids(str(seconds))] = wave * length / width**0.5


@torch.no_grad()
def take_tower(model: CrossVLLMForConditionalGeneration, folder: str | Path) -> None:
    """Lets the CLIP tower begin with the tower of the tiny VideoChat-Flash, block by block.

    Differs: CLIP has a class token and a norm in front of its blocks, which start as the mean patch and as nearly no
    change; so it still has to learn, but from a tower that tells shapes, colours and letters.

    Args:
        model: model with a fresh tower of the same sizes; changed in place.
        folder: the tiny VideoChat-Flash.
    """
    source = VideoChatFlashForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).model.vision_tower
    tower = model.model.vision_tower
    embeddings = tower.embeddings
    positions = source.image_positions + source.patch_embed.proj.bias
    embeddings.patch_embedding.weight.copy_(source.patch_embed.proj.weight.squeeze(2))
    embeddings.position_embedding.weight[1:] = positions
    embeddings.position_embedding.weight[0] = 0
    embeddings.class_embedding.copy_(positions.mean(0))
    # A uniform grey frame stands for the usual brightness.
    tower.pre_layrnorm.weight.fill_(positions.std(dim=1).mean())
    tower.pre_layrnorm.bias.zero_()
    for own, theirs in zip(tower.encoder.layers, source.blocks, strict=True):
        query, key, value = theirs.attn.qkv.weight.chunk(3)
        attention = own.self_attn
        for layer, weight, bias in (
            (attention.q_proj, query, theirs.attn.q_bias),
            (attention.k_proj, key, torch.zeros_like(theirs.attn.q_bias)),
            (attention.v_proj, value, theirs.attn.v_bias),
            (attention.out_proj, theirs.attn.proj.weight, theirs.attn.proj.bias),
            (own.mlp.fc1, theirs.mlp.fc1.weight, theirs.mlp.fc1.bias),
            (own.mlp.fc2, theirs.mlp.fc2.weight, theirs.mlp.fc2.bias),
            (own.layer_norm1, theirs.norm1.weight, theirs.norm1.bias),
            (own.layer_norm2, theirs.norm2.weight, theirs.norm2.bias),
        ):
            layer.weight.copy_(weight)
            layer.bias.copy_(bias)


@torch.no_grad()
def take_projectors(model: CrossVLLMForConditionalGeneration, folder: str | Path) -> None:
    """Lets both projectors begin as the connector of the tiny VideoChat-Flash.

    The decoder comes from there too, and what it knows about finding what a question names stays of use.

    Args:
        model: model with fresh projectors of the same sizes; changed in place.
        folder: the tiny VideoChat-Flash.
    """
    source = VideoChatFlashForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).model
    for projector in model.model.projectors.values():
        projector.load_state_dict(source.multi_modal_projector.state_dict())


@torch.no_grad()
def begin_as_answers(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """Lets the token in front of a policy's first time begin as the one in front of a plain answer.

    A decoder that answers plain questions looks there for what the question names, and only has to read its time.

    Args:
        model: its input embedding, which is its head as well, is changed in place.
        tokenizer: of the model.
    """
    table = model.get_input_embeddings().weight
    plain, policy = (tokenizer.convert_tokens_to_ids(phrase) for phrase in (ANSWERS, BEFORE_START))
    table[policy] = table[plain]


def build_crossvllm() -> tuple[PreTrainedModel, ProcessorMixin]:
    """Makes the tiny CrossVLLM without adapters, random, with its processor.

    The backbone is transformers' LLaVA-NeXT-Video, built through the Auto class with the decoder of the other tiny
    models. A frame has 6 x 6 patches: one token at the paper's coarse stride of six, nine at the fine one of two.

    Returns:
        Model and processor.
    """
    tokenizer = build_tokenizer()
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=FRAME_SIZE,
        patch_size=PATCH,
        projection_dim=64,
        hidden_act="gelu",
        initializer_range=INIT_STD,
    )
    backbone_config = LlavaNextVideoConfig(
        vision_config=vision,
        text_config=build_text_config(tokenizer),
        image_token_index=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        vision_feature_layer=-1,
        image_grid_pinpoints=[[FRAME_SIZE, FRAME_SIZE]],
        tie_word_embeddings=True,
    )
    frames = {"coarse": COARSE_FRAMES, "fine": FINE_FRAMES}
    counts = {f"{name}_{what}": frames[name] for name in frames for what in ("num_frames", "training_frames")}
    config = CrossVLLMConfig.from_backbone_config(
        backbone_config,
        **counts,
        rope_factor=1,
        vision_chunk_size=64,
        lora_r=32,
        lora_dropout=0.0,
        initializer_range=INIT_STD,
    )
    backbone = AutoModelForImageTextToText.from_config(backbone_config)
    model = CrossVLLMForConditionalGeneration(config)
    model.model.language_model = backbone.model.language_model
    model.lm_head = backbone.lm_head
    model.tie_weights()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    sizes = {"size": {"shortest_edge": FRAME_SIZE}, "crop_size": {"height": FRAME_SIZE, "width": FRAME_SIZE}}
    statistics = {name: getattr(VideoChatFlashVideoProcessor(), name) for name in ("image_mean", "image_std")}
    processor = CrossVLLMProcessor(
        image_processor=CLIPImageProcessor(**sizes, **statistics),
        tokenizer=tokenizer,
        video_processor=CrossVLLMVideoProcessor(**sizes, **statistics, **counts),
        patch_size=PATCH,
        coarse_stride=config.coarse_stride,
        fine_stride=config.fine_stride,
    )
    order_times(model, tokenizer)
    return model, processor
