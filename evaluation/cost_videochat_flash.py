"""Counts tokens, parameters, memory and FLOPs of VideoChat-Flash from its configuration.

Source: VideoChat-Flash (arXiv 2501.00574), Sec. 3.1 and 3.2; the counts follow the modules of this package.

Legend: F frames, K clips, P patches of a clip, M tokens after merging, V visual tokens, S sequence, D language width,
E vision width, H heads.
"""

from dataclasses import dataclass
from typing import Any

from longvideo.evaluation.cost import (
    Counts,
    cache_bytes_per_layer,
    compute_rows,
    count_language_parameters,
    count_siglip_parameters,
    decode_flops,
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
from longvideo.modeling.layers.token_merging import merge_schedule
from longvideo.modeling.videochat_flash.configuration_videochat_flash import VideoChatFlashConfig
from longvideo.modeling.videochat_flash.visual_dropout import build_plan


@dataclass(frozen=True)
class StageTokens:
    """Visual tokens that one stage of the dropout lets pass.

    Attributes:
        layer: Executed decoder layers before the stage.
        kind: "uniform" or "attention".
        visual_tokens: Visual tokens after the stage.
    """

    layer: int
    kind: str
    visual_tokens: int


@dataclass(frozen=True)
class Estimate(Counts):
    """What a question about one video costs.

    Attributes:
        num_frames: Sampled frames.
        num_clips: Clips that the tower sees.
        patch_tokens: Tokens of all clips before merging.
        visual_tokens: Visual tokens that enter the decoder.
        text_tokens: Text tokens of the prompt.
        stages: Visual tokens after each stage of the dropout.
        layer_lengths: Tokens that each decoder layer sees, and that its cache holds after the prefill.
        parameters: Number of weights of `vision`, `projector`, `language`, and their `total`.
        weight_bytes: Bytes of all weights.
        cache_bytes: Bytes of keys and values after the prefill.
        cache_bytes_per_layer: The same for each layer.
        activation_bytes: Bytes that `pixels`, `tower`, `merge`, `prefill` need for a while, and their `peak`; a model
            of the largest tensors alive at a time, good to about a factor of 1.5.
        flops: FLOPs of `tower`, `merge`, `projector`, `prefill`, `decode_per_token`, and `total` before the first
            answer token.
    """

    num_frames: int
    num_clips: int
    patch_tokens: int
    visual_tokens: int
    text_tokens: int
    stages: list[StageTokens]
    layer_lengths: list[int]
    parameters: dict[str, int]
    weight_bytes: int
    cache_bytes: int
    cache_bytes_per_layer: list[int]
    activation_bytes: dict[str, int]
    flops: dict[str, int]


def patches_per_frame(config: VideoChatFlashConfig) -> int:
    """Count the patches of a frame.

    Args:
        config: Model configuration.

    Returns:
        Patches of the square grid, without a class token.
    """
    return patches_of(config.vision_config)


def frames_per_tower_call(config: VideoChatFlashConfig) -> int:
    """Say how many frames attend to each other in the tower.

    Args:
        config: Model configuration.

    Returns:
        The frames of a clip, or 1 for towers that see single frames.
    """
    single = config.vision_config.model_type == "siglip_vision_model" or config.vision_encode_type == "image_video"
    return 1 if single else config.mm_local_num_frames


def count_clips(config: VideoChatFlashConfig, num_frames: int) -> int:
    """Turn a number of frames into a number of clips.

    Args:
        config: Model configuration.
        num_frames: Sampled frames, a multiple of the clip length.

    Returns:
        Clips.

    Raises:
        ValueError: The frames do not fill clips.
    """
    local = config.mm_local_num_frames
    if num_frames < 0 or num_frames % local:
        raise ValueError(f"{num_frames} frames do not fill clips of {local} frames; expected a multiple of {local}.")
    return num_frames // local


# ---------------------------------------------------------------------- tokens


def stage_tokens(
    config: VideoChatFlashConfig, num_visual: int, visual_dropout: bool | dict | None = None
) -> list[StageTokens]:
    """Count the visual tokens after each stage of the dropout.

    Args:
        config: Model configuration.
        num_visual: Visual tokens that enter the decoder.
        visual_dropout: As in the model's forward: None (as configured), bool, or dict.

    Returns:
        One entry per stage, none when nothing is dropped.

    Source: VideoChat-Flash Sec. 3.2; `modeling_qwen2_flash.py` (shares of the original count, truncated).
    """
    plan = build_plan(config, visual_dropout) if num_visual else None
    if plan is None:
        return []
    return [
        StageTokens(layer, plan.stage_kind(stage), int(num_visual * plan.ratios[stage + 1]))
        for stage, layer in enumerate(plan.layers)
    ]


def layer_lengths(
    config: VideoChatFlashConfig, num_visual: int, num_text: int, visual_dropout: bool | dict | None = None
) -> list[int]:
    """Count the tokens that each decoder layer sees in the prefill; its cache holds as many.

    Args:
        config: Model configuration.
        num_visual: Visual tokens that enter the decoder.
        num_text: Text tokens of the prompt.
        visual_dropout: As in the model's forward.

    Returns:
        One length per decoder layer.
    """
    stages = stage_tokens(config, num_visual, visual_dropout)
    lengths = []
    for index in range(config.text_config.num_hidden_layers):
        passed = [stage.visual_tokens for stage in stages if stage.layer <= index]
        lengths.append(num_text + (passed[-1] if passed else num_visual))
    return lengths


# ---------------------------------------------------------------------- weights


def count_tower_parameters(config: VideoChatFlashConfig) -> int:
    """Count the weights of the video tower.

    Args:
        config: Model configuration.

    Returns:
        Number of values.

    Raises:
        ValueError: An unknown kind of tower.
    """
    vision, patches = config.vision_config, patches_per_frame(config)
    width, inner, layers = vision.hidden_size, vision.intermediate_size, vision.num_hidden_layers
    embed = width * vision.num_channels * vision.patch_size**2 + width
    mlp = 2 * width * inner + inner + width
    attention = 4 * width**2 + width
    if vision.model_type == "umt_vision_model":
        return embed + layers * (attention + mlp + 6 * width) + 2 * width
    if vision.model_type == "internvideo2_vision_model":
        tables = width * (1 + (1 + vision.num_frames * patches) + (1 + patches))
        return embed + tables + layers * (attention + mlp + 6 * width)
    if vision.model_type == "siglip_vision_model":
        return count_siglip_parameters(vision)
    raise ValueError(f"The weights of a tower of type {vision.model_type!r} cannot be counted.")


def count_parameters(config: VideoChatFlashConfig) -> dict[str, int]:
    """Count the weights of every part.

    Args:
        config: Model configuration.

    Returns:
        Number of values of `vision`, `projector`, `language` (with the output head), and `total`.
    """
    width = config.text_config.hidden_size
    counts = {
        "vision": count_tower_parameters(config),
        "projector": config.vision_config.hidden_size * width + width + width * width + width,
        "language": count_language_parameters(config),
    }
    return {**counts, "total": sum(counts.values())}


# ---------------------------------------------------------------------- FLOPs


def tower_flops(config: VideoChatFlashConfig, num_frames: int) -> int:
    """Count the FLOPs of the video tower.

    Args:
        config: Model configuration.
        num_frames: Sampled frames, a multiple of the clip length.

    Returns:
        FLOPs of patch embedding, projections, attention and MLP of all clips.
    """
    vision, width = config.vision_config, config.vision_config.hidden_size
    together = frames_per_tower_call(config)
    calls = count_clips(config, num_frames) * config.mm_local_num_frames // together
    patches = together * patches_per_frame(config)
    tokens = patches + (1 if vision.model_type == "internvideo2_vision_model" else 0)
    return calls * tower_call_flops(vision, patches, tokens, 2 * width * vision.intermediate_size)


def merge_flops(config: VideoChatFlashConfig, num_clips: int) -> int:
    """Count the FLOPs of the similarities that token merging computes.

    Args:
        config: Model configuration.
        num_clips: Clips.

    Returns:
        FLOPs of all rounds: even tokens times odd tokens times the width of a head.
    """
    vision = config.vision_config
    head_width = vision.hidden_size // vision.num_attention_heads
    num_tokens, flops = config.mm_local_num_frames * patches_per_frame(config), 0
    for num_merges in merge_schedule(num_tokens, config.tokens_per_clip):
        flops += 2 * ((num_tokens + 1) // 2) * (num_tokens // 2) * head_width
        num_tokens -= num_merges
    return num_clips * flops


def projector_flops(config: VideoChatFlashConfig, num_visual: int) -> int:
    """Count the FLOPs of the two layers behind token merging.

    Args:
        config: Model configuration.
        num_visual: Merged tokens.

    Returns:
        FLOPs.
    """
    width = config.text_config.hidden_size
    return 2 * num_visual * (config.vision_config.hidden_size * width + width * width)


def selection_flops(config: VideoChatFlashConfig, num_tokens: int) -> int:
    """Count the FLOPs of choosing tokens by the attention of the last prompt token.

    Args:
        config: Model configuration.
        num_tokens: Tokens before the stage.

    Returns:
        FLOPs of the key projection, one query row and its scores.
    """
    query_width, key_width = head_sizes(config)
    width = config.text_config.hidden_size
    return 2 * num_tokens * width * key_width + 2 * width * query_width + 2 * num_tokens * query_width


def prefill_flops(
    config: VideoChatFlashConfig,
    num_visual: int,
    num_text: int,
    visual_dropout: bool | dict | None = None,
    *,
    causal: bool = True,
) -> int:
    """Count the FLOPs of the decoder on the whole prompt, with logits of its last token only.

    Args:
        config: Model configuration.
        num_visual: Visual tokens that enter the decoder.
        num_text: Text tokens of the prompt.
        visual_dropout: As in the model's forward.
        causal: See `decoder_layer_flops`.

    Returns:
        FLOPs of layers, dropout stages and output head.
    """
    lengths = layer_lengths(config, num_visual, num_text, visual_dropout)
    flops = sum(decoder_layer_flops(config, length, causal=causal) for length in lengths)
    for stage in stage_tokens(config, num_visual, visual_dropout):
        if stage.kind == "attention":
            flops += selection_flops(config, lengths[stage.layer - 1])
    return flops + 2 * config.text_config.hidden_size * config.text_config.vocab_size


# ---------------------------------------------------------------------- memory in use for a while


def activation_bytes(
    config: VideoChatFlashConfig, num_frames: int, sequence_length: int, *, bytes_per_value: int = 2
) -> dict[str, int]:
    """Estimate the bytes that each step holds besides weights and cache.

    Args:
        config: Model configuration.
        num_frames: Sampled frames.
        sequence_length: Tokens of the prompt, text and visual.
        bytes_per_value: 2 for bf16 and fp16, 4 for fp32.

    Returns:
        Bytes of `pixels` (float32), `tower` and `merge` (one chunk of clips each), `prefill`, and the `peak`:
        pixels and visual features together with the largest step.
    """
    vision, text = config.vision_config, config.text_config
    clips = count_clips(config, num_frames)
    chunk = min(config.vision_chunk_size, clips)
    patches = config.mm_local_num_frames * patches_per_frame(config)
    per_patch = tower_values_per_token(vision, vision.intermediate_size)
    per_token = decoder_values_per_token(config)
    num_pixels = vision.num_channels * vision.image_size**2
    features = clips * config.tokens_per_clip * text.hidden_size * bytes_per_value
    steps = {
        "tower": chunk * patches * per_patch * bytes_per_value,
        # Float32 copies of the tokens and the similarities of the first round.
        "merge": chunk * 4 * (3 * patches * (vision.hidden_size + 1) + patches**2 // 4),
        "prefill": sequence_length * per_token * bytes_per_value,
    }
    pixels = 4 * chunk * config.mm_local_num_frames * num_pixels
    return {"pixels": pixels, **steps, "peak": pixels + features + max(steps.values())}


def estimate(
    config: VideoChatFlashConfig,
    num_frames: int,
    *,
    num_text: int = 64,
    new_tokens: int = 256,
    visual_dropout: bool | dict | None = None,
    dtype: str = "bf16",
    causal: bool = True,
) -> Estimate:
    """Count everything about a question on one video.

    Args:
        config: Model configuration.
        num_frames: Sampled frames, a multiple of the clip length.
        num_text: Text tokens of the prompt.
        new_tokens: Tokens of the answer; they do not change the counts.
        visual_dropout: As in the model's forward: None (as configured), bool, or dict.
        dtype: "bf16", "fp16" or "fp32", of weights, cache and activations.
        causal: See `decoder_layer_flops`.

    Returns:
        The counts.

    Raises:
        ValueError: Frames that do not fill clips, an unknown dtype, or a dropout that does not fit the model.
    """
    size, clips = value_bytes(dtype), count_clips(config, num_frames)
    num_visual = clips * config.tokens_per_clip
    lengths = layer_lengths(config, num_visual, num_text, visual_dropout)
    cache = cache_bytes_per_layer(config, lengths, bytes_per_value=size)
    flops = {
        "tower": tower_flops(config, num_frames),
        "merge": merge_flops(config, clips),
        "projector": projector_flops(config, num_visual),
        "prefill": prefill_flops(config, num_visual, num_text, visual_dropout, causal=causal),
    }
    parameters = count_parameters(config)
    return Estimate(
        num_frames=num_frames,
        num_clips=clips,
        patch_tokens=num_frames * patches_per_frame(config),
        visual_tokens=num_visual,
        text_tokens=num_text,
        stages=stage_tokens(config, num_visual, visual_dropout),
        layer_lengths=lengths,
        parameters=parameters,
        weight_bytes=parameters["total"] * size,
        cache_bytes=sum(cache),
        cache_bytes_per_layer=cache,
        activation_bytes=activation_bytes(config, num_frames, num_visual + num_text, bytes_per_value=size),
        flops={**flops, "total": sum(flops.values()), "decode_per_token": decode_flops(config, lengths)},
    )


# ---------------------------------------------------------------------- for the command line


def usable_frames(config: VideoChatFlashConfig, num_frames: int) -> int:
    """Cut a number of frames to whole clips, with a warning.

    Args:
        config: Model configuration.
        num_frames: Wanted frames.

    Returns:
        Frames.
    """
    from longvideo.processing.shared.frame_sampling import whole_clips

    return whole_clips(num_frames, config.mm_local_num_frames, name="--frames")


def processor_options(config: VideoChatFlashConfig) -> dict[str, Any]:
    """Say what the video processor is told when it chooses frames."""
    return {"mm_local_num_frames": config.mm_local_num_frames}


def video_options(processor: Any, source: str, metadata: Any) -> dict[str, Any]:
    """Say what else of a video counts: nothing, frames have one size."""
    return {}


def warn(config: VideoChatFlashConfig, counts: Estimate, new_tokens: int) -> str | None:
    """Say how many frames fit when prompt and answer are longer than the decoder.

    Args:
        config: Model configuration.
        counts: The counts.
        new_tokens: Tokens of the answer.

    Returns:
        A sentence, or None.
    """
    return warn_of_positions(
        config, counts, new_tokens, tokens=config.tokens_per_clip, frames=config.mm_local_num_frames
    )


def describe(config: VideoChatFlashConfig, counts: Estimate) -> list[tuple[str, str]]:
    """Lay the counts out for people.

    Args:
        config: Model configuration.
        counts: The counts.

    Returns:
        Pairs of name and text.
    """
    memory, flops = counts.activation_bytes, counts.flops
    size = config.vision_config.image_size
    rows = [
        ("frames", f"{counts.num_frames:,} of {size}x{size} pixels in {counts.num_clips:,} clips"),
        ("patch tokens", f"{counts.patch_tokens:,}"),
        ("visual tokens", f"{counts.visual_tokens:,} after merging, and {counts.text_tokens} of text"),
    ]
    rows += [(f"  after layer {stage.layer}", f"{stage.visual_tokens:,} ({stage.kind})") for stage in counts.stages]
    activations = (
        f"pixels {gigabytes(memory['pixels'])}, tower {gigabytes(memory['tower'])} for {config.vision_chunk_size} "
        f"clips at a time, merging {gigabytes(memory['merge'])}, prefill {gigabytes(memory['prefill'])}"
    )
    merging = ("  merging", teraflops(flops["merge"] + flops["projector"]))
    return [*rows, *memory_rows(counts, activations), *compute_rows(flops, [merging])]
