"""Counts tokens, parameters, memory and FLOPs of CrossLMM from its configuration.

FLOPs are counted in `cost_flops_crosslmm`.

Source: CrossLMM (arXiv 2505.17020), Sec. 3 and 4; the counts follow the modules of this package.
"""

from dataclasses import dataclass
from typing import Any

from longvideo.evaluation.cost import (
    Counts,
    cache_bytes_per_layer,
    compute_rows,
    count_language_parameters,
    count_siglip_parameters,
    decoder_values_per_token,
    gigabytes,
    head_sizes,
    memory_rows,
    patches_of,
    teraflops,
    tower_values_per_token,
    value_bytes,
    warn_of_positions,
)
from longvideo.evaluation.cost_flops_crosslmm import (
    attention_flops,
    built_tower,
    count_key_value_sets,
    count_projected_tokens,
    key_value_flops,
    memory_width,
    paper_macs,
    prefill_flops,
    projector_flops,
    query_flops,
    token_flops,
    tower_flops,
)
from longvideo.modeling.crosslmm.configuration_crosslmm import CrossLMMConfig


@dataclass(frozen=True)
class Estimate(Counts):
    """What a question about one video costs.

    Attributes:
        num_frames: Sampled frames.
        patch_tokens: Tokens of all frames before merging, which cross-attention reads.
        visual_tokens: Merged tokens, which enter the decoder.
        text_tokens: Text tokens of the prompt, all of them behind the video.
        parameters: Number of weights of `vision`, `projector`, `cross_attention`, `language`, and their `total`.
        weight_bytes: Bytes of all weights.
        cache_bytes: Bytes of the decoder's own keys and values after the prefill.
        visual_cache_bytes: Bytes of the keys and values that text reads by cross-attention, kept besides.
        activation_bytes: Bytes that `pixels`, `tower`, `projector`, `memory` (the tokens before merging),
            `cross_attention`, `prefill` need for a while, and their `peak`; a model of the largest tensors alive at a
            time, good to about a factor of 1.5.
        flops: FLOPs of `tower`, `projector`, `cross_projections`, `cross_attention` (queries times keys), `prefill`
            (of the decoder as it was), `decode_per_token`, and `total` before the first answer token.
        paper_macs: Multiply-adds before the first answer token as the paper counts them, see `paper_macs`.
    """

    num_frames: int
    patch_tokens: int
    visual_tokens: int
    text_tokens: int
    parameters: dict[str, int]
    weight_bytes: int
    cache_bytes: int
    visual_cache_bytes: int
    activation_bytes: dict[str, int]
    flops: dict[str, int]
    paper_macs: dict[str, int]


# ---------------------------------------------------------------------- weights


def count_cross_attention_parameters(config: CrossLMMConfig) -> dict[str, int]:
    """Count the weights that cross-attention adds to one decoder layer.

    Args:
        config: Model configuration.

    Returns:
        Number of values of `queries` (query and output projections of both kinds), `keys` (key and value projections),
        `norms`, `gates`, and `total`.
    """
    width, kinds, sets = config.text_config.hidden_size, config.use_v2v + config.use_t2v, count_key_value_sets(config)
    query_width, key_width = head_sizes(config)
    source = memory_width(config)
    counts = {
        "queries": kinds * (2 * width * query_width + query_width),
        "keys": sets * 2 * (source * key_width + key_width),
        "norms": width + (2 * source * sets if config.kv_source == "encoder" else 0),
        "gates": kinds,
    }
    return {**counts, "total": sum(counts.values())}


def count_projector_parameters(config: CrossLMMConfig) -> int:
    """Count the weights of the projector.

    Args:
        config: Model configuration.

    Returns:
        Number of values of both layers, and of the norm before them where there is one.
    """
    width, vision_width = config.text_config.hidden_size, config.vision_config.hidden_size
    norm = 2 * vision_width if config.projector_norm == "pre" else 0
    return norm + vision_width * width + width + width * width + width


def count_parameters(config: CrossLMMConfig) -> dict[str, int]:
    """Count the weights of every part.

    Args:
        config: Model configuration.

    Returns:
        Number of values of `vision` (layers that run, without the last norm), `projector`, `cross_attention` (all
        layers), `language` (with the output head), and `total`.
    """
    layers = len(config.cross_attention_layers)
    counts = {
        "vision": count_siglip_parameters(built_tower(config)),
        "projector": count_projector_parameters(config),
        "cross_attention": layers * count_cross_attention_parameters(config)["total"] if layers else 0,
        "language": count_language_parameters(config),
    }
    return {**counts, "total": sum(counts.values())}


# ---------------------------------------------------------------------- memory


def visual_cache_bytes(config: CrossLMMConfig, num_frames: int, *, bytes_per_value: int = 2) -> int:
    """Count the bytes of the keys and values that text reads by cross-attention.

    Args:
        config: Model configuration.
        num_frames: Frames.
        bytes_per_value: 2 for bf16 and fp16, 4 for fp32.

    Returns:
        Bytes of all layers; those that visual rows read are not kept.
    """
    if not config.use_t2v:
        return 0
    num_keys = num_frames * patches_of(config.vision_config)
    return sum(cache_bytes_per_layer(config, [num_keys] * len(config.cross_attention_layers),
                                     bytes_per_value=bytes_per_value))  # fmt: skip


def activation_bytes(
    config: CrossLMMConfig, num_frames: int, sequence_length: int, *, bytes_per_value: int = 2
) -> dict[str, int]:
    """Estimate the bytes that each step holds besides weights and caches.

    Args:
        config: Model configuration.
        num_frames: Frames.
        sequence_length: Tokens of the prompt, text and visual.
        bytes_per_value: 2 for bf16 and fp16, 4 for fp32.

    Returns:
        Bytes of `pixels` (float32, all frames), `tower` and `projector` (one chunk of frames), `memory` (tokens before
        merging), `cross_attention` (keys and values of visual rows in one layer), `prefill`, and the `peak`: pixels,
        memory and merged features together with the largest step.
    """
    vision, width = config.vision_config, config.text_config.hidden_size
    patches = patches_of(vision)
    chunk, num_keys = min(config.vision_chunk_size, num_frames) * patches, num_frames * patches
    crossing, layers = 0, bool(config.cross_attention_layers)
    if layers and config.use_v2v:
        crossing = cache_bytes_per_layer(config, [num_keys], bytes_per_value=bytes_per_value)[0]
    steps = {
        "tower": chunk * tower_values_per_token(vision, vision.intermediate_size) * bytes_per_value,
        # Tower features, the layer between, and the output.
        "projector": chunk * (vision.hidden_size + 3 * width) * bytes_per_value,
        "prefill": sequence_length * decoder_values_per_token(config) * bytes_per_value,
    }
    held = {
        "pixels": 4 * num_frames * vision.num_channels * vision.image_size**2,
        "memory": num_keys * memory_width(config) * bytes_per_value if layers else 0,
    }
    features = num_frames * config.tokens_per_frame * width * bytes_per_value
    # The MLP follows cross-attention in a layer, so that their tensors are not alive together.
    largest = max(*steps.values(), crossing)
    return {**held, **steps, "cross_attention": crossing, "peak": sum(held.values()) + features + largest}


def estimate(
    config: CrossLMMConfig,
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
        num_frames: Frames, any number.
        num_text: Text tokens of the prompt, counted as if all stood behind the video.
        new_tokens: Tokens of the answer; they do not change the counts.
        visual_dropout: None or False; the decoder drops nothing.
        dtype: "bf16", "fp16" or "fp32", of weights, cache and activations.
        causal: See `cost.decoder_layer_flops`.

    Returns:
        The counts.

    Raises:
        ValueError: No frames, an unknown dtype, or dropout.
    """
    if num_frames < 1:
        raise ValueError(f"A video has at least 1 frame, got {num_frames}.")
    if visual_dropout:
        raise ValueError("CrossLMM does not drop visual tokens inside its decoder; leave the dropout out.")
    size, parameters, layers = value_bytes(dtype), count_parameters(config), len(config.cross_attention_layers)
    num_visual, patches = num_frames * config.tokens_per_frame, num_frames * patches_of(config.vision_config)
    length = num_text + num_visual
    projections = query_flops(config, num_visual, num_text) + key_value_flops(config, patches)
    flops = {
        "tower": tower_flops(config, num_frames),
        "projector": projector_flops(config, count_projected_tokens(config, num_frames)),
        "cross_projections": layers * projections,
        "cross_attention": layers * attention_flops(config, num_frames, num_text),
        "prefill": prefill_flops(config, length, causal=causal),
    }
    cache = cache_bytes_per_layer(config, [length] * config.text_config.num_hidden_layers, bytes_per_value=size)
    decode = token_flops(config, num_frames, num_text)
    return Estimate(
        num_frames=num_frames,
        patch_tokens=patches,
        visual_tokens=num_visual,
        text_tokens=num_text,
        parameters=parameters,
        weight_bytes=parameters["total"] * size,
        cache_bytes=sum(cache),
        visual_cache_bytes=visual_cache_bytes(config, num_frames, bytes_per_value=size),
        activation_bytes=activation_bytes(config, num_frames, length, bytes_per_value=size),
        flops={**flops, "total": sum(flops.values()), "decode_per_token": decode},
        paper_macs=paper_macs(config, num_frames, num_text=num_text),
    )


# ---------------------------------------------------------------------- for the command line


def usable_frames(config: CrossLMMConfig, num_frames: int) -> int:
    """Return the number of frames: any is fine."""
    return num_frames


def processor_options(config: CrossLMMConfig) -> dict[str, Any]:
    """Say what the video processor is told when it chooses frames: nothing beyond the user's wishes."""
    return {}


def video_options(processor: Any, source: str, metadata: Any) -> dict[str, Any]:
    """Say what else of a video counts: nothing, frames have one size."""
    return {}


def warn(config: CrossLMMConfig, counts: Estimate, new_tokens: int) -> str | None:
    """Say how many frames fit when prompt and answer are longer than the decoder.

    Args:
        config: Model configuration.
        counts: The counts.
        new_tokens: Tokens of the answer.

    Returns:
        A sentence, or None.
    """
    return warn_of_positions(config, counts, new_tokens, tokens=config.tokens_per_frame)


def describe(config: CrossLMMConfig, counts: Estimate) -> list[tuple[str, str]]:
    """Lay the counts out for people.

    Args:
        config: Model configuration.
        counts: The counts.

    Returns:
        Pairs of name and text.
    """
    memory, flops, size = counts.activation_bytes, counts.flops, config.vision_config.image_size
    num_layers, depth = len(config.cross_attention_layers), config.text_config.num_hidden_layers
    return [
        ("frames", f"{counts.num_frames:,} of {size}x{size} pixels"),
        ("patch tokens", f"{counts.patch_tokens:,}, read by cross-attention in {num_layers} of {depth} layers"),
        ("visual tokens", f"{counts.visual_tokens:,} after merging, and {counts.text_tokens} of text"),
        *memory_rows(
            counts,
            f"pixels {gigabytes(memory['pixels'])}, patch tokens {gigabytes(memory['memory'])}, tower "
            f"{gigabytes(memory['tower'])} and projector {gigabytes(memory['projector'])} for "
            f"{config.vision_chunk_size} frames at a time, cross-attention {gigabytes(memory['cross_attention'])}, "
            f"prefill {gigabytes(memory['prefill'])}",
            visual_cache=counts.visual_cache_bytes,
        ),
        *compute_rows(
            flops,
            [
                ("  projector", teraflops(flops["projector"])),
                (
                    "  cross-attention",
                    f"{teraflops(flops['cross_projections'] + flops['cross_attention'])}, of it queries times keys "
                    f"{teraflops(flops['cross_attention'])}",
                ),
            ],
        ),
        (
            "as in the paper",
            f"{counts.paper_macs['total'] / 1e12:,.2f} tera multiply-adds, printed there as TFLOPs; without attention "
            "behind the tower and without the output head",
        ),
    ]
