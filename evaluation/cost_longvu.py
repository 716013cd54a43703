"""Counts tokens, parameters, memory and FLOPs of LongVU from its configuration.

How many frames and tokens stay depends on what is to be seen, so most counts are bounds: the least and the most that
any video of that many frames can take.

Source: LongVU (arXiv 2410.17434), Sec. 3; Vision-CAIR/LongVU, `cambrian_arch.py`.

Legend: F frames, T kept frames, G side of the towers' common grid, Q queries of a frame, V visual tokens, D language
width, E width of the connector, C width of a tower.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from longvideo.evaluation.cost import (
    Counts,
    cache_bytes_per_layer,
    count_language_parameters,
    count_siglip_parameters,
    decode_flops,
    decoder_layer_flops,
    decoder_values_per_token,
    gigabytes,
    patches_of,
    teraflops,
    tower_call_flops,
    tower_values_per_token,
    value_bytes,
)
from longvideo.evaluation.cost_bounds_longvu import SQUARE, Bounds, kept_bounds, measure_room, token_bounds
from longvideo.modeling.longvu.configuration_longvu import LongVUConfig
from longvideo.modeling.longvu.temporal_reduction import WINDOWS


@dataclass(frozen=True)
class Estimate(Counts):
    """What a question about one video costs; pairs are the least and the most.

    Attributes:
        num_frames: Sampled frames; DINOv2 sees all of them.
        patch_tokens: Patches of all sampled frames in one tower.
        kept_frames: Frames that temporal reduction keeps.
        full_resolution_frames: Frames at the full grid.
        modes: Ways in which frames can be brought into the room: "full", "low", "mix", "stc".
        visual_tokens: Visual tokens that enter the decoder.
        budget: Positions that text and answer leave for them.
        text_tokens: Text tokens of the prompt.
        parameters: Number of weights of `vision` (both towers), `connector`, `language`, and their `total`.
        weight_bytes: Bytes of all weights.
        cache_bytes: Bytes of keys and values after the prefill.
        activation_bytes: Most bytes that `pixels`, `tower`, `sampler`, `features`, `prefill` need for a while, and
            their `peak`, when the video is read window by window; good to about a factor of 1.5.
        flops: FLOPs of `dino`, `siglip`, `sampler`, `projector`, `prefill`, `decode_per_token`, and `total` before the
            first answer token.
    """

    num_frames: int
    patch_tokens: int
    kept_frames: Bounds
    full_resolution_frames: Bounds
    modes: list[str]
    visual_tokens: Bounds
    budget: int
    text_tokens: int
    parameters: dict[str, int]
    weight_bytes: int
    cache_bytes: Bounds
    activation_bytes: dict[str, int]
    flops: dict[str, Bounds]


# ---------------------------------------------------------------------- weights


def dino_mlp_sizes(config: LongVUConfig) -> tuple[int, int]:
    """Give the sizes of DINOv2's MLP.

    Args:
        config: Model configuration.

    Returns:
        Weights and biases of a layer's MLP.
    """
    dino, width = config.dino_config, config.dino_config.hidden_size
    inner = int(width * dino.mlp_ratio)
    if not dino.use_swiglu_ffn:
        return 2 * width * inner, inner + width
    inner = (int(inner * 2 / 3) + 7) // 8 * 8
    return 3 * width * inner, 2 * inner + width


def count_parameters(config: LongVUConfig) -> dict[str, int]:
    """Count the weights of every part.

    Args:
        config: Model configuration.

    Returns:
        Number of values of `vision` (both towers), `connector` (projectors, sampler, queries, newline), `language`
        (with the output head), and `total`. The published files hold no towers.
    """
    dino, width, text = config.dino_config, config.vision_hidden_size, config.text_config.hidden_size
    dino_width = dino.hidden_size
    layer = sum(dino_mlp_sizes(config)) + 4 * dino_width**2 + (4 if dino.qkv_bias else 1) * dino_width
    dino_values = dino_width * (dino.num_channels * dino.patch_size**2 + 1 + 1 + 1 + patches_of(dino) + 2)
    dino_values += dino.num_hidden_layers * (layer + 6 * dino_width)
    towers = (config.vision_config.hidden_size, dino_width)
    projectors = sum(tower * width + width + width * width + width + 2 * width for tower in towers)
    cut = config.vision_grid_size // config.grid_size
    attention = 5 * (width**2 + 2 * width) + width**2
    sampler_layer = attention + 5 * width**2 + 2 * width + (2 * cut * cut * width if cut > 1 else 0)
    connector = projectors + config.connector_depth * sampler_layer + config.num_query_group * width
    connector += width * text + text + text * text + text + (text if config.image_newline else 0)
    counts = {
        "vision": count_siglip_parameters(config.vision_config) + dino_values,
        "connector": connector,
        "language": count_language_parameters(config),
    }
    return {**counts, "total": sum(counts.values())}


# ---------------------------------------------------------------------- FLOPs


def dino_flops(config: LongVUConfig, num_frames: int) -> int:
    """Count the FLOPs of DINOv2.

    Args:
        config: Model configuration.
        num_frames: Frames; of a size that gives as many patches as SigLIP has.

    Returns:
        FLOPs.
    """
    patches = patches_of(config.vision_config)
    weights, _ = dino_mlp_sizes(config)
    return num_frames * tower_call_flops(config.dino_config, patches, patches + 1, weights)


def siglip_flops(config: LongVUConfig, num_frames: int) -> int:
    """Count the FLOPs of SigLIP.

    Args:
        config: Model configuration.
        num_frames: Frames.

    Returns:
        FLOPs, without the pooling head, which is not run.
    """
    vision, patches = config.vision_config, patches_of(config.vision_config)
    weights = 2 * vision.hidden_size * vision.intermediate_size
    return num_frames * tower_call_flops(vision, patches, patches, weights)


def sampler_flops(config: LongVUConfig, num_frames: int) -> int:
    """Count the FLOPs from the towers' grids to aggregated frames.

    Args:
        config: Model configuration.
        num_frames: Kept frames.

    Returns:
        FLOPs of the towers' projectors and of the sampler. In its first layer all queries are one.
    """
    width, cells, queries = config.vision_hidden_size, config.vision_grid_size**2, config.image_token_len
    towers = (config.vision_config.hidden_size, config.dino_config.hidden_size)
    flops = sum(2 * cells * (tower * width + width * width) for tower in towers)
    keys = len(towers) * cells // queries
    for layer in range(config.connector_depth):
        asking = queries if layer else 1
        linear = 1 + 2 * asking + asking + 2 * len(towers) * cells + queries + 2 * queries
        flops += 2 * linear * width * width + 4 * queries * keys * width
    return num_frames * flops


def projector_flops(config: LongVUConfig, num_full: int, num_low: int) -> int:
    """Count the FLOPs of the projector to the width of the decoder.

    Args:
        config: Model configuration.
        num_full: Frames projected at the full grid, uncropped.
        num_low: Frames projected at the low grid.

    Returns:
        FLOPs.
    """
    width, text = config.vision_hidden_size, config.text_config.hidden_size
    tokens = num_full * config.grid_size**2 + num_low * config.lowres_token**2
    return 2 * tokens * (width * text + text * text)


def prefill_flops(config: LongVUConfig, num_visual: int, num_text: int, *, causal: bool = True) -> int:
    """Count the FLOPs of the decoder on the whole prompt, with logits of its last token only.

    Args:
        config: Model configuration.
        num_visual: Visual tokens.
        num_text: Text tokens.
        causal: See `cost.decoder_layer_flops`.

    Returns:
        FLOPs of layers and output head.
    """
    text = config.text_config
    layers = text.num_hidden_layers * decoder_layer_flops(config, num_visual + num_text, causal=causal)
    return layers + 2 * text.hidden_size * text.vocab_size


# ---------------------------------------------------------------------- memory in use for a while


def activation_bytes(
    config: LongVUConfig, num_frames: int, num_survivors: int, sequence_length: int, *, bytes_per_value: int = 2
) -> dict[str, int]:
    """Estimate the bytes that each step holds besides weights and cache.

    Args:
        config: Model configuration.
        num_frames: Sampled frames.
        num_survivors: Frames that survive in their windows.
        sequence_length: Tokens of the prompt, text and visual.
        bytes_per_value: 2 for bf16 and fp16, 4 for fp32.

    Returns:
        Bytes of `pixels` (float32, one chunk for both towers), `tower` and `sampler` (one chunk), `features` (of
        survivors, and DINOv2's of one window), `prefill`, and the `peak`: pixels and features with the largest step.
    """
    vision, dino, width = config.vision_config, config.dino_config, config.vision_hidden_size
    chunk, patches, cells = min(config.vision_chunk_size, num_frames), patches_of(vision), config.vision_grid_size**2
    weights, _ = dino_mlp_sizes(config)
    inner = weights // dino.hidden_size // 2
    per_patch = max(tower_values_per_token(vision, vision.intermediate_size), tower_values_per_token(dino, inner))
    # Keys and values of both towers, before and after they are cut into blocks, beside the towers' grids.
    per_cell = 2 * (vision.hidden_size + dino.hidden_size) + 10 * width
    window = config.temporal_window or WINDOWS[config.temporal_reduction]
    features = num_survivors * config.image_token_len * width
    features += (chunk + window) * cells * dino.hidden_size
    dino_side = int(patches**0.5) * dino.patch_size
    pixels = 4 * chunk * (vision.num_channels * vision.image_size**2 + dino.num_channels * dino_side**2)
    steps = {
        "tower": chunk * patches * per_patch * bytes_per_value,
        "sampler": chunk * cells * per_cell * bytes_per_value,
        "prefill": sequence_length * decoder_values_per_token(config) * bytes_per_value,
    }
    held = {"pixels": pixels, "features": features * bytes_per_value}
    return {**held, **steps, "peak": sum(held.values()) + max(steps.values())}


def estimate(
    config: LongVUConfig,
    num_frames: int,
    *,
    num_text: int = 64,
    new_tokens: int = 256,
    visual_dropout: bool | dict | None = None,
    dtype: str = "bf16",
    causal: bool = True,
    size: tuple[int, int] = SQUARE,
) -> Estimate:
    """Bound everything about a question on one video.

    Args:
        config: Model configuration.
        num_frames: Sampled frames.
        num_text: Text tokens of the prompt.
        new_tokens: Tokens of the answer, for which positions are kept free.
        visual_dropout: None or False; the decoder drops nothing.
        dtype: "bf16", "fp16" or "fp32", of weights, cache and activations.
        causal: See `cost.decoder_layer_flops`.
        size: (width, height) of the frames as the model reads it; a square takes most tokens.

    Returns:
        The counts.

    Raises:
        ValueError: No frames, an unknown dtype, text and answer that leave no room, or dropout.
    """
    if num_frames < 1:
        raise ValueError(f"{num_frames} frames cannot be counted; expected at least 1.")
    if visual_dropout:
        raise ValueError("LongVU does not drop visual tokens inside its decoder; leave the dropout out.")
    width = value_bytes(dtype)
    room = measure_room(config, num_text, new_tokens, size)
    kept = kept_bounds(config, num_frames, room)
    found = [token_bounds(config, count, room) for count in range(kept[0], kept[1] + 1)]
    visual = _span(bound for bounds, _, _ in found for bound in bounds)
    # Windows are encoded as they come, before it is known how many frames are too many.
    encoded = (kept[0], num_frames)
    grids = [
        (full, 0 if mode == "full" or (mode == "stc" and full) else count)
        for count, (_, full, mode) in enumerate(found, kept[0])
    ]
    lengths = [[num_text + count] * config.text_config.num_hidden_layers for count in visual]
    flops = {
        "dino": (dino_flops(config, num_frames),) * 2,
        "siglip": _span(siglip_flops(config, count) for count in encoded),
        "sampler": _span(sampler_flops(config, count) for count in encoded),
        "projector": _span(projector_flops(config, *frames) for frames in grids),
        "prefill": _span(prefill_flops(config, count, num_text, causal=causal) for count in visual),
    }
    total = tuple(sum(bounds[end] for bounds in flops.values()) for end in (0, 1))
    parameters = count_parameters(config)
    return Estimate(
        num_frames=num_frames,
        patch_tokens=num_frames * patches_of(config.vision_config),
        kept_frames=kept,
        full_resolution_frames=_span(full for _, full, _ in found),
        modes=sorted({mode for _, _, mode in found}),
        visual_tokens=visual,
        budget=room.budget,
        text_tokens=num_text,
        parameters=parameters,
        weight_bytes=parameters["total"] * width,
        cache_bytes=_span(sum(cache_bytes_per_layer(config, x, bytes_per_value=width)) for x in lengths),
        activation_bytes=activation_bytes(config, num_frames, num_frames, visual[1] + num_text, bytes_per_value=width),
        flops={**flops, "total": total, "decode_per_token": _span(decode_flops(config, x) for x in lengths)},
    )


def _span(values: Iterable[int]) -> Bounds:
    values = list(values)
    return min(values), max(values)


# ---------------------------------------------------------------------- for the command line


def usable_frames(config: LongVUConfig, num_frames: int) -> int:
    """Take any number of frames."""
    return num_frames


def processor_options(config: LongVUConfig) -> dict[str, Any]:
    """Say what the video processor is told when it chooses frames: nothing of the model's."""
    return {}


def video_options(processor: Any, source: str, metadata: Any) -> dict[str, Any]:
    """Say what else of a video counts.

    Args:
        processor: `LongVUVideoProcessor`.
        source: Path or address of the video.
        metadata: Its facts, with `width` and `height`.

    Returns:
        `size`, (width, height) as the model reads it.
    """
    from longvideo.processing.longvu.video_size import size_pair

    return {"size": tuple(size_pair(source, metadata, processor.video_size_order).tolist())}


def warn(config: LongVUConfig, counts: Estimate, new_tokens: int) -> str | None:
    """Say what a long video loses for certain.

    Args:
        config: Model configuration.
        counts: The counts.
        new_tokens: Tokens of the answer.

    Returns:
        A sentence, or None.
    """
    if counts.kept_frames[1] == counts.num_frames:
        return None
    return (
        f"of {counts.num_frames:,} frames at most {counts.kept_frames[1]:,} are kept (max_kept_frames); more frames "
        "per second do not show more."
    )


def describe(config: LongVUConfig, counts: Estimate) -> list[tuple[str, str]]:
    """Lay the counts out for people.

    Args:
        config: Model configuration.
        counts: The counts.

    Returns:
        Pairs of name and text.
    """
    memory, flops, size = counts.activation_bytes, counts.flops, config.vision_config.image_size
    peak = tuple(counts.weight_bytes + cache + memory["peak"] for cache in counts.cache_bytes)
    return [
        ("frames", f"{counts.num_frames:,} of {size}x{size} pixels, all seen by DINOv2"),
        ("  kept", f"{_text(counts.kept_frames)} by temporal reduction"),
        ("  full grid", f"{_text(counts.full_resolution_frames)} of {config.grid_size}x{config.grid_size} tokens"),
        ("patch tokens", f"{counts.patch_tokens:,} in each tower, were nothing left out"),
        ("visual tokens", f"{_text(counts.visual_tokens)} ({' or '.join(counts.modes)}), and {counts.text_tokens} of "
                          f"text; there is room for {counts.budget:,}"),
        ("memory", f"{_text(peak, gigabytes)} at the peak, made of"),
        ("  weights", gigabytes(counts.weight_bytes)),
        ("  cache", f"{_text(counts.cache_bytes, gigabytes)} after the prefill"),
        ("  activations", f"{gigabytes(memory['peak'])} (estimate, read in windows; pixels "
                          f"{gigabytes(memory['pixels'])}, features {gigabytes(memory['features'])}, tower "
                          f"{gigabytes(memory['tower'])} and sampler {gigabytes(memory['sampler'])} for "
                          f"{config.vision_chunk_size} frames at a time, prefill {gigabytes(memory['prefill'])})"),
        ("compute", f"{_text(flops['total'], teraflops)} before the first answer token, made of"),
        ("  DINOv2", _text(flops["dino"], teraflops)),
        ("  SigLIP", _text(flops["siglip"], teraflops)),
        ("  sampler", _text((flops["sampler"][0] + flops["projector"][0], flops["sampler"][1] + flops["projector"][1]),
                            teraflops)),
        ("  prefill", _text(flops["prefill"], teraflops)),
        ("  answer", f"{_text(flops['decode_per_token'], teraflops)} per token"),
    ]  # fmt: skip


def _text(bounds: Bounds, write: Any = "{:,}".format) -> str:
    low, high = map(write, bounds)
    return low if low == high else f"{low} to {high}"
