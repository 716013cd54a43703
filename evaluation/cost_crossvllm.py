"""Counts tokens, parameters, memory and FLOPs of CrossVLLM from its configuration, in both granularities.

A question costs at least one round: a coarse look at the whole video and a fine one at a segment. Further rounds look
at the whole video again, of which frames and prompt are known by then, and at another segment.

Source: CrossVLLM, Sec. 3, Tables 4, 5 and 8; the counts follow the modules of this package.

Legend: F frames, P patches of a frame, M visual tokens of a frame, S sequence, D language width, E vision width.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from longvideo.evaluation.cost import (
    Counts,
    cache_bytes_per_layer,
    count_language_parameters,
    decoder_layer_flops,
    decoder_values_per_token,
    gigabytes,
    head_sizes,
    memory_rows,
    patches_of,
    teraflops,
    tower_call_flops,
    tower_values_per_token,
    value_bytes,
    warn_of_positions,
)
from longvideo.modeling.crossvllm.configuration_crossvllm import GRANULARITIES, CrossVLLMConfig
from longvideo.processing.crossvllm.source_frames import READ_FRAMES

# Re-groundings that are shown: the limits of Table 7.
ROUNDS = (0, 1, 3)
# Tokens of a policy, {"t_start": 41.0, "t_end": 58.5, "answer": ""}, and of a line that sends a segment back.
POLICY_TOKENS = 40
FEEDBACK_TOKENS = 60


@dataclass(frozen=True)
class Estimate(Counts):
    """What a question about one video costs.

    Attributes:
        num_frames: Frames of the coarse look at the whole video.
        fine_frames: Frames of the fine look at a segment.
        visual_tokens: Visual tokens of the longer prompt of both.
        text_tokens: Text tokens of a prompt.
        looks: By granularity: `num_frames`, `stride`, `tokens_per_frame`, `visual_tokens`, `cache_bytes`,
            `prefill_bytes` (activations of the decoder) and `flops` (`tower`, `projector`, `prefill`,
            `decode_per_token`, and `total` before the first answer token).
        parameters: Number of weights of `vision`, `projector` (both), `adapters` (both), `language`, and their
            `total`.
        weight_bytes: Bytes of all weights.
        cache_bytes: Bytes of keys and values of both looks: those of the whole video are kept for the next round.
        activation_bytes: Bytes that `pixels` (a part of the frames), `features` (kept patches of all frames), `tower`,
            `projector`, `prefill` need for a while, and their `peak`; a model of the largest tensors alive at a time,
            good to about a factor of 1.5.
        flops: FLOPs of both looks: `tower`, `projector`, `prefill`, `decode_per_token` (of the longer prompt), and
            `total` before the first answer token of each.
        rounds: By the number of re-groundings: `flops` with all policies written, `tower_frames`, and the same of a
            run that encodes and reads everything again in each call, `naive_flops` and `naive_tower_frames`; their
            quotient is `ratio`.
    """

    num_frames: int
    fine_frames: int
    visual_tokens: int
    text_tokens: int
    looks: dict[str, dict[str, Any]]
    parameters: dict[str, int]
    weight_bytes: int
    cache_bytes: int
    activation_bytes: dict[str, int]
    flops: dict[str, int]
    rounds: dict[str, dict[str, float]]


# ---------------------------------------------------------------------- weights


def built_tower(config: CrossVLLMConfig) -> PreTrainedConfig:
    """Describe the tower as it is built, without the layers behind the features.

    Args:
        config: Model configuration.

    Returns:
        Configuration of the tower, a changed copy.
    """
    fields = {**config.vision_config.to_dict(), "num_hidden_layers": config.num_vision_layers}
    return type(config.vision_config)(**fields)


def count_clip_parameters(vision: PreTrainedConfig) -> int:
    """Count the weights of a CLIP tower.

    Args:
        vision: Configuration of the tower.

    Returns:
        Number of values, without the last norm.
    """
    width, inner = vision.hidden_size, vision.intermediate_size
    embed = width + width * vision.num_channels * vision.patch_size**2 + (patches_of(vision) + 1) * width
    layer = 4 * (width**2 + width) + 2 * width * inner + inner + width + 4 * width
    return embed + 2 * width + vision.num_hidden_layers * layer


def adapter_values(config: CrossVLLMConfig) -> int:
    """Count what an adapter adds to one decoder layer.

    Args:
        config: Model configuration.

    Returns:
        Number of values of the matrices of its seven linear layers; as many multiply-adds per token. 0 without
        adapters.
    """
    if not config.adapters:
        return 0
    width, inner = config.text_config.hidden_size, config.text_config.intermediate_size
    query_width, key_width = head_sizes(config)
    ends = 2 * (width + query_width) + 2 * (width + key_width) + 3 * (width + inner)
    return config.lora_r * ends


def count_parameters(config: CrossVLLMConfig) -> dict[str, int]:
    """Count the weights of every part.

    Args:
        config: Model configuration.

    Returns:
        Number of values of `vision` (layers that run, without the last norm), `projector` and `adapters` (of both
        granularities), `language` (with the output head), and `total`.
    """
    width, vision_width = config.text_config.hidden_size, config.vision_config.hidden_size
    biases = 2 * width if config.multimodal_projector_bias else 0
    counts = {
        "vision": count_clip_parameters(built_tower(config)),
        "projector": len(GRANULARITIES) * (vision_width * width + width * width + biases),
        "adapters": len(GRANULARITIES) * config.text_config.num_hidden_layers * adapter_values(config),
        "language": count_language_parameters(config),
    }
    return {**counts, "total": sum(counts.values())}


# ---------------------------------------------------------------------- FLOPs


def tower_flops(config: CrossVLLMConfig, num_frames: int) -> int:
    """Count the FLOPs of the tower.

    Args:
        config: Model configuration.
        num_frames: Frames.

    Returns:
        FLOPs of the layers that run, class token included.
    """
    vision = built_tower(config)
    patches, mlp = patches_of(vision), 2 * vision.hidden_size * vision.intermediate_size
    return num_frames * tower_call_flops(vision, patches, patches + 1, mlp)


def projector_flops(config: CrossVLLMConfig, num_tokens: int) -> int:
    """Count the FLOPs of a projector, through which pooled patches go.

    Args:
        config: Model configuration.
        num_tokens: Visual tokens.

    Returns:
        FLOPs.
    """
    width = config.text_config.hidden_size
    return 2 * num_tokens * (config.vision_config.hidden_size * width + width**2)


def decoder_flops(config: CrossVLLMConfig, num_new: int, num_cached: int = 0, *, causal: bool = True) -> int:
    """Count the FLOPs of the decoder with the adapter of a granularity, and of the head on one token.

    Args:
        config: Model configuration.
        num_new: Tokens that pass.
        num_cached: Tokens that the cache held before.
        causal: See `cost.decoder_layer_flops`.

    Returns:
        FLOPs.
    """
    text = config.text_config
    layer = decoder_layer_flops(config, num_new, num_cached, causal=causal) + 2 * num_new * adapter_values(config)
    return text.num_hidden_layers * layer + 2 * text.hidden_size * text.vocab_size


def answer_flops(config: CrossVLLMConfig, length: int, new_tokens: int) -> int:
    """Count the FLOPs of the answer tokens behind the first, which comes with the prompt.

    Args:
        config: Model configuration.
        length: Tokens of the prompt.
        new_tokens: Tokens of the answer.

    Returns:
        FLOPs.
    """
    return sum(decoder_flops(config, 1, length + step) for step in range(max(new_tokens - 1, 0)))


def course_flops(
    config: CrossVLLMConfig,
    num_rounds: int,
    *,
    coarse_frames: int,
    fine_frames: int,
    num_text: int = 300,
    new_tokens: int = POLICY_TOKENS,
    naive: bool = False,
) -> dict[str, int]:
    """Count what a question costs in which every segment but the last is sent back.

    Args:
        config: Model configuration.
        num_rounds: Re-groundings R; there are R + 1 coarse and as many fine looks.
        coarse_frames: Frames of a coarse look.
        fine_frames: Frames of a fine look, none of which a coarse one has.
        num_text: Text tokens of a first prompt; what is sent back comes on top of later ones.
        new_tokens: Tokens that a module writes at a time.
        naive: Whether every call encodes its frames and reads its prompt from the beginning.

    Returns:
        `tower_frames`, and FLOPs of `tower`, `projector`, `prefill`, `answers` and their `total`.
    """
    tokens = {name: config.tokens_per_frame(name) for name in GRANULARITIES}
    coarse, fine = coarse_frames * tokens["coarse"], fine_frames * tokens["fine"]
    num_coarse = num_rounds + 1 if naive else 1
    frames = num_coarse * coarse_frames + (num_rounds + 1) * fine_frames
    projected = num_coarse * coarse + (num_rounds + 1) * fine
    prefill = (num_rounds + 1) * decoder_flops(config, fine + num_text)
    answers = (num_rounds + 1) * answer_flops(config, fine + num_text, new_tokens)
    for number in range(num_rounds + 1):
        length = coarse + num_text + number * FEEDBACK_TOKENS
        # The question stands behind what was sent back, so it is read again: about a third of the text.
        known = 0 if naive or not number else length - FEEDBACK_TOKENS - num_text // 3
        prefill += decoder_flops(config, length - known, known)
        answers += answer_flops(config, length, new_tokens)
    flops = {
        "tower": tower_flops(config, frames),
        "projector": projector_flops(config, projected),
        "prefill": prefill,
        "answers": answers,
    }
    return {"tower_frames": frames, **flops, "total": sum(flops.values())}


def compare_courses(config: CrossVLLMConfig, num_rounds: int, **course: Any) -> dict[str, float]:
    """Count a question beside a run that shares nothing; see `course_flops`.

    Args:
        config: Model configuration.
        num_rounds: Re-groundings R.
        **course: As `course_flops`.

    Returns:
        `flops`, `tower_frames`, `naive_flops`, `naive_tower_frames`, `ratio`.
    """
    ours, naive = (course_flops(config, num_rounds, naive=flag, **course) for flag in (False, True))
    return {
        "flops": ours["total"],
        "tower_frames": ours["tower_frames"],
        "naive_flops": naive["total"],
        "naive_tower_frames": naive["tower_frames"],
        "ratio": ours["total"] / naive["total"],
    }


# ---------------------------------------------------------------------- estimates


def count_look(
    config: CrossVLLMConfig, granularity: str, num_frames: int, *, num_text: int, bytes_per_value: int, causal: bool
) -> dict[str, Any]:
    """Count one look in a granularity.

    Args:
        config: Model configuration.
        granularity: "coarse" or "fine".
        num_frames: Frames.
        num_text: Text tokens of the prompt.
        bytes_per_value: 2 for bf16 and fp16, 4 for fp32.
        causal: See `cost.decoder_layer_flops`.

    Returns:
        See `Estimate.looks`.
    """
    tokens = config.tokens_per_frame(granularity)
    num_visual = num_frames * tokens
    length = num_visual + num_text
    flops = {
        "tower": tower_flops(config, num_frames),
        "projector": projector_flops(config, num_visual),
        "prefill": decoder_flops(config, length, causal=causal),
    }
    caches = cache_bytes_per_layer(
        config, [length] * config.text_config.num_hidden_layers, bytes_per_value=bytes_per_value
    )
    return {
        "num_frames": num_frames,
        "stride": config.stride(granularity),
        "tokens_per_frame": tokens,
        "visual_tokens": num_visual,
        "cache_bytes": sum(caches),
        "prefill_bytes": length * decoder_values_per_token(config) * bytes_per_value,
        "flops": {**flops, "total": sum(flops.values()), "decode_per_token": decoder_flops(config, 1, length)},
    }


def activation_bytes(
    config: CrossVLLMConfig, looks: Mapping[str, Mapping[str, Any]], *, bytes_per_value: int = 2
) -> dict[str, int]:
    """Estimate the bytes that each step holds besides weights and caches.

    Args:
        config: Model configuration.
        looks: See `Estimate.looks`.
        bytes_per_value: 2 for bf16 and fp16, 4 for fp32.

    Returns:
        Bytes of `pixels` (float32, frames that are read at a time), `features` (patches of both looks, pooled as far
        as both share), `tower` and `projector` (one chunk of frames), `prefill`, and the `peak`.
    """
    vision, width = config.vision_config, config.text_config.hidden_size
    patches, frames = patches_of(vision), [look["num_frames"] for look in looks.values()]
    chunk, read = min(config.vision_chunk_size, max(frames)), min(READ_FRAMES, max(frames))
    most = max(look["tokens_per_frame"] for look in looks.values())
    kept = patches // config.shared_stride**2
    steps = {
        "pixels": 4 * read * vision.num_channels * vision.image_size**2,
        "tower": chunk * (patches + 1) * tower_values_per_token(vision, vision.intermediate_size) * bytes_per_value,
        "projector": chunk * most * (vision.hidden_size + 3 * width) * bytes_per_value,
        "prefill": max(look["prefill_bytes"] for look in looks.values()),
    }
    features = sum(frames) * kept * vision.hidden_size * bytes_per_value
    tokens = max(look["visual_tokens"] for look in looks.values()) * width * bytes_per_value
    # Pixels are gone when the decoder begins.
    largest = max(steps["pixels"] + steps["tower"], tokens + max(steps["projector"], steps["prefill"]))
    return {"features": features, **steps, "peak": features + largest}


def estimate(
    config: CrossVLLMConfig,
    num_frames: int,
    *,
    num_text: int = 64,
    new_tokens: int = 256,
    visual_dropout: bool | dict | None = None,
    dtype: str = "bf16",
    causal: bool = True,
    available_frames: int | None = None,
) -> Estimate:
    """Count everything about a question on one video.

    Args:
        config: Model configuration.
        num_frames: Frames of the coarse look at the whole video.
        num_text: Text tokens of a prompt.
        new_tokens: Tokens of the answer; they do not change the counts.
        visual_dropout: None or False; the decoder drops nothing.
        dtype: "bf16", "fp16" or "fp32", of weights, cache and activations.
        causal: See `cost.decoder_layer_flops`.
        available_frames: Frames that the video has, so that a segment may have fewer than the fine look takes; None
            for enough.

    Returns:
        The counts.

    Raises:
        ValueError: No frames, an unknown dtype, or dropout.
    """
    fine_frames = min(config.fine_num_frames, available_frames or config.fine_num_frames)
    if num_frames < 1:
        raise ValueError(f"A video has at least 1 frame, got {num_frames}.")
    if visual_dropout:
        raise ValueError("CrossVLLM does not drop visual tokens inside its decoder; leave the dropout out.")
    size, parameters = value_bytes(dtype), count_parameters(config)
    looks = {
        name: count_look(config, name, count, num_text=num_text, bytes_per_value=size, causal=causal)
        for name, count in zip(GRANULARITIES, (num_frames, fine_frames), strict=True)
    }
    parts = ("tower", "projector", "prefill", "total")
    flops = {part: sum(look["flops"][part] for look in looks.values()) for part in parts}
    course = {"coarse_frames": num_frames, "fine_frames": fine_frames, "num_text": num_text}
    return Estimate(
        num_frames=num_frames,
        fine_frames=fine_frames,
        visual_tokens=max(look["visual_tokens"] for look in looks.values()),
        text_tokens=num_text,
        looks=looks,
        parameters=parameters,
        weight_bytes=parameters["total"] * size,
        cache_bytes=sum(look["cache_bytes"] for look in looks.values()),
        activation_bytes=activation_bytes(config, looks, bytes_per_value=size),
        flops={**flops, "decode_per_token": max(look["flops"]["decode_per_token"] for look in looks.values())},
        rounds={str(number): compare_courses(config, number, **course) for number in ROUNDS},
    )


# ---------------------------------------------------------------------- for the command line


def usable_frames(config: CrossVLLMConfig, num_frames: int) -> int:
    """Return the number of frames: any is fine."""
    return num_frames


def processor_options(config: CrossVLLMConfig) -> dict[str, Any]:
    """Say what the video processor is told when it chooses the frames of the coarse look."""
    return {"granularity": "coarse", "coarse_num_frames": config.coarse_num_frames}


def video_options(processor: Any, source: str, metadata: Any) -> dict[str, Any]:
    """Say what else of a video counts: a segment has no more frames than the video."""
    return {"available_frames": metadata.total_num_frames}


def warn(config: CrossVLLMConfig, counts: Estimate, new_tokens: int) -> str | None:
    """Say how many frames fit when prompt and answer are longer than the decoder.

    Args:
        config: Model configuration.
        counts: The counts.
        new_tokens: Tokens of the answer.

    Returns:
        A sentence, or None.
    """
    longer = max(counts.looks, key=lambda name: counts.looks[name]["visual_tokens"])
    sentence = warn_of_positions(config, counts, new_tokens, tokens=config.tokens_per_frame(longer))
    return None if sentence is None else f"{longer} look: {sentence}"


def describe(config: CrossVLLMConfig, counts: Estimate) -> list[tuple[str, str]]:
    """Lay the counts out for people.

    Args:
        config: Model configuration.
        counts: The counts.

    Returns:
        Pairs of name and text.
    """
    memory, size, rows = counts.activation_bytes, config.vision_config.image_size, []
    seen = {"coarse": "of the whole video", "fine": "of a segment"}
    for name, look in counts.looks.items():
        side, flops = config.tokens_per_side(name), look["flops"]
        rows += [
            (f"{name} look", f"{look['num_frames']:,} frames of {size}x{size} pixels {seen[name]}"),
            ("  visual tokens", f"{look['visual_tokens']:,}, {side}x{side} a frame, and {counts.text_tokens} of text"),
            ("  cache", f"{gigabytes(look['cache_bytes'])} after the prefill"),
            (
                "  compute",
                f"{teraflops(flops['total'])} before its first token: tower {teraflops(flops['tower'])}, projector "
                f"{teraflops(flops['projector'])}, prefill {teraflops(flops['prefill'])}",
            ),
            ("  answer", f"{teraflops(flops['decode_per_token'])} per token"),
        ]
    rows += memory_rows(
        counts,
        f"kept features {gigabytes(memory['features'])}, pixels {gigabytes(memory['pixels'])} for "
        f"{READ_FRAMES} frames at a time, tower {gigabytes(memory['tower'])} and projector "
        f"{gigabytes(memory['projector'])} for {config.vision_chunk_size}, prefill {gigabytes(memory['prefill'])}",
    )
    for number, course in counts.rounds.items():
        text = f"{teraflops(course['flops'])}, {course['tower_frames']:,} frames through the tower"
        if number != "0":
            text += f"; sharing nothing {teraflops(course['naive_flops'])} and {course['naive_tower_frames']:,}"
        rows.append((f"R = {number}", text))
    return rows
