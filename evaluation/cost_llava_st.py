"""Counts tokens, parameters, memory and FLOPs of LLaVA-ST from its configuration.

Every video gives as many frames and as many positions as any other, so nothing here depends on the video.

Source: LLaVA-ST (arXiv 2501.08282), Sec. 3; the counts follow the modules of this package.

Legend: F frames, P patches of a frame, Q regions of a frame, V visual positions, D language width, E width of the
packers' attention, H its heads.
"""

import warnings
from dataclasses import dataclass
from typing import Any

from longvideo.evaluation.cost import (
    Counts,
    beyond_positions,
    cache_bytes_per_layer,
    compute_rows,
    count_language_parameters,
    count_siglip_parameters,
    decode_flops,
    decoder_layer_flops,
    decoder_values_per_token,
    gigabytes,
    memory_rows,
    patches_of,
    teraflops,
    tower_call_flops,
    tower_values_per_token,
    value_bytes,
)
from longvideo.modeling.llava_st.configuration_llava_st import LlavaSTConfig
from longvideo.modeling.llava_st.packer_llava_st import CHUNK_TOKENS

PACKERS = ("spatial", "temporal", "fast")


@dataclass(frozen=True)
class Estimate(Counts):
    """What a question about one video costs.

    Attributes:
        num_frames: Frames that the tower sees.
        patch_tokens: Patches of all frames.
        fast_tokens: Positions of the fast block, all frames at a coarse grid.
        slow_tokens: Positions of the slow block, fewer frames at a finer grid.
        visual_tokens: Positions of both.
        text_tokens: Text tokens of the prompt.
        parameters: Number of weights of `vision`, `projector`, `packer`, `language` (with the output head and the
            coordinates), and their `total`.
        weight_bytes: Bytes of all weights.
        cache_bytes: Bytes of keys and values after the prefill.
        activation_bytes: Bytes that `pixels`, `tower`, `projector`, `packer`, `prefill` need for a while, and their
            `peak`; a model of the largest tensors alive at a time, good to about a factor of 1.5.
        flops: FLOPs of `tower`, `projector`, `spatial`, `temporal`, `fast` (the packers), `prefill`,
            `decode_per_token`, and `total` before the first answer token.
    """

    num_frames: int
    patch_tokens: int
    fast_tokens: int
    slow_tokens: int
    visual_tokens: int
    text_tokens: int
    parameters: dict[str, int]
    weight_bytes: int
    cache_bytes: int
    activation_bytes: dict[str, int]
    flops: dict[str, int]


# ---------------------------------------------------------------------- weights


def count_packer_parameters(config: LlavaSTConfig) -> int:
    """Count the weights of one packer.

    Args:
        config: Model configuration.

    Returns:
        Number of values of its three MLPs, three norms, attention and output.
    """
    width, inner = config.text_config.hidden_size, config.packer_hidden_size
    mlp = width * inner + inner + inner * inner + inner
    return 3 * (mlp + 2 * inner) + 4 * (inner * inner + inner) + inner * width


def count_parameters(config: LlavaSTConfig) -> dict[str, int]:
    """Count the weights of every part.

    Args:
        config: Model configuration.

    Returns:
        Number of values of `vision` (without the last norm, which the release stores and does not use), `projector`,
        `packer` (all three), `language` (with the output head and the coordinates), and `total`.
    """
    width = config.text_config.hidden_size
    beside = config.num_coordinate_tokens * width if config.coordinate_layout == "split" else 0
    counts = {
        "vision": count_siglip_parameters(config.vision_config),
        "projector": config.vision_config.hidden_size * width + width + width * width + width,
        "packer": len(PACKERS) * count_packer_parameters(config) if config.use_packer else 0,
        "language": count_language_parameters(config) + beside * (1 if config.tie_word_embeddings else 2),
    }
    return {**counts, "total": sum(counts.values())}


# ---------------------------------------------------------------------- FLOPs


def tower_flops(config: LlavaSTConfig, num_frames: int) -> int:
    """Count the FLOPs of the tower.

    Args:
        config: Model configuration.
        num_frames: Frames.

    Returns:
        FLOPs.
    """
    vision, patches = config.vision_config, patches_of(config.vision_config)
    return num_frames * tower_call_flops(vision, patches, patches, 2 * vision.hidden_size * vision.intermediate_size)


def projector_flops(config: LlavaSTConfig, num_frames: int) -> int:
    """Count the FLOPs of the projector, through which all patches go.

    Args:
        config: Model configuration.
        num_frames: Frames.

    Returns:
        FLOPs.
    """
    width = config.text_config.hidden_size
    return 2 * num_frames * patches_of(config.vision_config) * (config.vision_config.hidden_size * width + width**2)


def packer_flops(config: LlavaSTConfig, num_keys: int, num_queries: int) -> int:
    """Count the FLOPs of one packer.

    Args:
        config: Model configuration.
        num_keys: Tokens that go in, each in one region.
        num_queries: Regions.

    Returns:
        FLOPs of the MLPs, of attention and of the output. The maps of keys and values inside attention act once per
        region, each head over the whole width.
    """
    width, inner = config.text_config.hidden_size, config.packer_hidden_size
    mlp = width * inner + inner * inner
    per_query = mlp + 4 * inner * inner + inner * width
    return 2 * (2 * num_keys * mlp + num_queries * per_query + 2 * num_keys * config.packer_num_heads * inner)


def all_packer_flops(config: LlavaSTConfig, num_frames: int) -> dict[str, int]:
    """Count the FLOPs of the three packers on one video.

    Args:
        config: Model configuration.
        num_frames: Frames.

    Returns:
        FLOPs of `spatial`, `temporal` and `fast`; 0 for what is not run.
    """
    if not config.use_packer:
        return dict.fromkeys(PACKERS, 0)
    area, patches = config.spatial_factor**2, num_frames * patches_of(config.vision_config)
    reduced = patches // area
    return {
        "spatial": packer_flops(config, patches, reduced),
        "temporal": packer_flops(config, reduced, reduced // config.temporal_factor),
        "fast": packer_flops(config, reduced, reduced // area) if config.splice_fast_stream else 0,
    }


def prefill_flops(config: LlavaSTConfig, sequence_length: int, *, causal: bool = True) -> int:
    """Count the FLOPs of the decoder on the whole prompt, with logits of its last token only.

    Args:
        config: Model configuration.
        sequence_length: Tokens of the prompt, text and visual.
        causal: See `cost.decoder_layer_flops`.

    Returns:
        FLOPs of layers and output head.
    """
    text = config.text_config
    layers = text.num_hidden_layers * decoder_layer_flops(config, sequence_length, causal=causal)
    return layers + 2 * text.hidden_size * config.num_logits


# ---------------------------------------------------------------------- memory in use for a while


def activation_bytes(config: LlavaSTConfig, sequence_length: int, *, bytes_per_value: int = 2) -> dict[str, int]:
    """Estimate the bytes that each step holds besides weights and cache.

    Args:
        config: Model configuration.
        sequence_length: Tokens of the prompt, text and visual.
        bytes_per_value: 2 for bf16 and fp16, 4 for fp32.

    Returns:
        Bytes of `pixels` (float32, all frames), `tower` and `projector` (one chunk of frames), `packer` (one chunk of
        keys), `prefill`, and the `peak`: pixels and reduced features together with the largest step.
    """
    vision, width = config.vision_config, config.text_config.hidden_size
    patches, chunk = patches_of(vision), min(config.vision_chunk_size, config.num_frames)
    chunk_patches = chunk * patches
    inner = config.packer_hidden_size
    projected = chunk_patches * width * bytes_per_value
    reduced = config.num_frames * patches // config.spatial_factor**2 * width * bytes_per_value
    keys = min(CHUNK_TOKENS, config.num_frames * patches)
    steps = {
        "tower": chunk_patches * tower_values_per_token(vision, vision.intermediate_size) * bytes_per_value,
        # Tower features, the layer between, the output and coordinates added to it.
        "projector": chunk_patches * (vision.hidden_size + 3 * width) * bytes_per_value,
        # Keys and values, and the layers on their way.
        "packer": projected + keys * 5 * inner * bytes_per_value if config.use_packer else projected,
        "prefill": sequence_length * decoder_values_per_token(config) * bytes_per_value,
    }
    pixels = 4 * config.num_frames * vision.num_channels * vision.image_size**2
    return {"pixels": pixels, **steps, "peak": pixels + reduced + max(steps.values())}


def estimate(
    config: LlavaSTConfig,
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
        num_frames: Frames, `config.num_frames`: a shorter video repeats frames, of a longer one as many are taken.
        num_text: Text tokens of the prompt.
        new_tokens: Tokens of the answer; they do not change the counts.
        visual_dropout: None or False; the decoder drops nothing.
        dtype: "bf16", "fp16" or "fp32", of weights, cache and activations.
        causal: See `cost.decoder_layer_flops`.

    Returns:
        The counts.

    Raises:
        ValueError: Another number of frames, an unknown dtype, or dropout.
    """
    if num_frames != config.num_frames:
        raise ValueError(
            f"This model sees {config.num_frames} frames of every video, got {num_frames}; to count for another "
            "number set num_frames in its configuration."
        )
    if visual_dropout:
        raise ValueError("LLaVA-ST does not drop visual tokens inside its decoder; leave the dropout out.")
    size, parameters = value_bytes(dtype), count_parameters(config)
    num_visual = config.num_fast_positions + config.num_slow_positions
    lengths = [num_text + num_visual] * config.text_config.num_hidden_layers
    flops = {
        "tower": tower_flops(config, num_frames),
        "projector": projector_flops(config, num_frames),
        **all_packer_flops(config, num_frames),
        "prefill": prefill_flops(config, num_text + num_visual, causal=causal),
    }
    beside = 2 * config.text_config.hidden_size * (config.num_logits - config.text_config.vocab_size)
    return Estimate(
        num_frames=num_frames,
        patch_tokens=num_frames * patches_of(config.vision_config),
        fast_tokens=config.num_fast_positions,
        slow_tokens=config.num_slow_positions,
        visual_tokens=num_visual,
        text_tokens=num_text,
        parameters=parameters,
        weight_bytes=parameters["total"] * size,
        cache_bytes=sum(cache_bytes_per_layer(config, lengths, bytes_per_value=size)),
        activation_bytes=activation_bytes(config, num_text + num_visual, bytes_per_value=size),
        flops={**flops, "total": sum(flops.values()), "decode_per_token": decode_flops(config, lengths) + beside},
    )


# ---------------------------------------------------------------------- for the command line


def usable_frames(config: LlavaSTConfig, num_frames: int) -> int:
    """Return the frames of every video, with a warning where another number was wanted."""
    if num_frames != config.num_frames:
        warnings.warn(
            f"--frames {num_frames}: this model sees {config.num_frames} frames of every video, whatever its length; "
            f"using {config.num_frames}.",
            stacklevel=2,
        )
    return config.num_frames


def processor_options(config: LlavaSTConfig) -> dict[str, Any]:
    """Say what the video processor is told when it chooses frames."""
    return {"num_frames": config.num_frames, "temporal_factor": config.temporal_factor}


def video_options(processor: Any, source: str, metadata: Any) -> dict[str, Any]:
    """Say what else of a video counts: nothing, frames have one size and one number."""
    return {}


def warn(config: LlavaSTConfig, counts: Estimate, new_tokens: int) -> str | None:
    """Say that prompt and answer are longer than the decoder, where they are.

    Args:
        config: Model configuration.
        counts: The counts.
        new_tokens: Tokens of the answer.

    Returns:
        A sentence, or None.
    """
    _, sentence = beyond_positions(config, counts, new_tokens)
    return None if sentence is None else f"{sentence}: shorten the text or the answer."


def describe(config: LlavaSTConfig, counts: Estimate) -> list[tuple[str, str]]:
    """Lay the counts out for people.

    Args:
        config: Model configuration.
        counts: The counts.

    Returns:
        Pairs of name and text.
    """
    memory, flops, size = counts.activation_bytes, counts.flops, config.vision_config.image_size
    unused = "" if config.splice_fast_stream else " (token embeddings only, as released)"
    return [
        ("frames", f"{counts.num_frames:,} of {size}x{size} pixels, of every video"),
        ("patch tokens", f"{counts.patch_tokens:,}"),
        ("visual tokens", f"{counts.visual_tokens:,}, and {counts.text_tokens} of text"),
        ("  fast stream", f"{counts.fast_tokens:,}{unused}"),
        ("  slow stream", f"{counts.slow_tokens:,}"),
        *memory_rows(
            counts,
            f"pixels {gigabytes(memory['pixels'])}, tower {gigabytes(memory['tower'])} and projector "
            f"{gigabytes(memory['projector'])} for {config.vision_chunk_size} frames at a time, packer "
            f"{gigabytes(memory['packer'])}, prefill {gigabytes(memory['prefill'])}",
        ),
        *compute_rows(
            flops,
            [
                ("  projector", teraflops(flops["projector"])),
                ("  packers", teraflops(sum(flops[name] for name in PACKERS))),
            ],
        ),
    ]
