"""Counts tokens, parameters, memory and FLOPs of a question from a configuration, before anything is loaded.

What is common to decoders and towers stands here; each architecture's own counts are in the module that `COUNTERS`
names. Such a module offers

- `estimate(config, num_frames, *, num_text, new_tokens, visual_dropout, dtype, causal)`, an object with `to_dict()`,
- `usable_frames(config, num_frames)`, the frames that the model takes of so many,
- `processor_options(config)`, what the video processor is told when frames are chosen,
- `video_options(processor, source, metadata)`, further arguments of `estimate` that a video decides,
- `describe(config, counts)`, pairs of name and text for people, and `warn(config, counts, new_tokens)`, text or None.

A multiply-add counts as two FLOPs; norms, activations and softmax are left out, as `torch.utils.flop_counter` does.

Legend: F frames, P patches of a frame, V visual tokens, S sequence, D language width, E vision width, H heads.
"""

from collections.abc import Sequence
from dataclasses import asdict
from importlib import import_module
from types import ModuleType
from typing import Any

from transformers import PreTrainedConfig

COUNTERS = {
    "videochat_flash": "longvideo.evaluation.cost_videochat_flash",
    "longvu": "longvideo.evaluation.cost_longvu",
    "llava_st": "longvideo.evaluation.cost_llava_st",
    "crosslmm": "longvideo.evaluation.cost_crosslmm",
    "crossvllm": "longvideo.evaluation.cost_crossvllm",
}
BYTES_OF_DTYPE = {"fp32": 4, "bf16": 2, "fp16": 2, "float32": 4, "bfloat16": 2, "float16": 2}
# Decoders of the Llama family whose query, key and value projections have a bias whatever the configuration says.
TYPES_WITH_QKV_BIAS = ("qwen2",)
TYPES_WITH_QK_NORM = ("qwen3",)


class Counts:
    """What a question about one video costs; every architecture has a dataclass of its own over it."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers, lists and dicts."""
        return asdict(self)


def counter_of(config: PreTrainedConfig) -> ModuleType:
    """Find the module that counts for an architecture.

    Args:
        config: Configuration of one of the package's models.

    Returns:
        The module.

    Raises:
        ValueError: No module counts for this architecture.
    """
    name = COUNTERS.get(config.model_type)
    if name is None:
        raise ValueError(f"A {config.model_type} model cannot be estimated; expected one of {', '.join(COUNTERS)}.")
    return import_module(name)


def estimate(config: PreTrainedConfig, num_frames: int, **kwargs: Any) -> Any:
    """Count everything about a question on one video.

    Args:
        config: Configuration of one of the package's models.
        num_frames: Sampled frames.
        **kwargs: As for the `estimate` of the architecture: `num_text`, `new_tokens`, `visual_dropout`, `dtype`.

    Returns:
        The counts, with `to_dict()`.

    Raises:
        ValueError: The architecture cannot be counted, or arguments that do not fit it.
    """
    return counter_of(config).estimate(config, num_frames, **kwargs)


def value_bytes(dtype: str) -> int:
    """Return the bytes of a value.

    Args:
        dtype: "bf16", "fp16" or "fp32".

    Raises:
        ValueError: Unknown type.
    """
    if dtype not in BYTES_OF_DTYPE:
        raise ValueError(f"Unknown dtype {dtype!r}, expected one of bf16, fp16, fp32.")
    return BYTES_OF_DTYPE[dtype]


# ---------------------------------------------------------------------- decoder


def head_sizes(config: PreTrainedConfig) -> tuple[int, int]:
    """Return the widths of all query heads and of all key heads of the decoder.

    Args:
        config: Model configuration.

    Returns:
        Query width and key (or value) width.
    """
    text = config.text_config
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    num_key_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    return text.num_attention_heads * head_dim, num_key_heads * head_dim


def cache_bytes_per_layer(config: PreTrainedConfig, lengths: Sequence[int], *, bytes_per_value: int = 2) -> list[int]:
    """Count the bytes of keys and values of each decoder layer.

    Args:
        config: Model configuration.
        lengths: Tokens per layer, see `layer_lengths`.
        bytes_per_value: 2 for bf16 and fp16, 4 for fp32.

    Returns:
        Bytes per layer for one sample.
    """
    _, key_width = head_sizes(config)
    return [2 * length * key_width * bytes_per_value for length in lengths]


def count_language_parameters(config: PreTrainedConfig) -> int:
    """Count the weights of the decoder.

    Args:
        config: Model configuration.

    Returns:
        Number of values, token table and output head included.
    """
    text, width = config.text_config, config.text_config.hidden_size
    query_width, key_width = head_sizes(config)
    layer = 2 * width * query_width + 2 * width * key_width + 3 * width * text.intermediate_size + 2 * width
    if text.model_type in TYPES_WITH_QKV_BIAS or getattr(text, "attention_bias", False):
        layer += query_width + 2 * key_width
    if text.model_type in TYPES_WITH_QK_NORM:
        layer += 2 * query_width // text.num_attention_heads
    tables = text.vocab_size * width * (1 if config.tie_word_embeddings else 2)
    return text.num_hidden_layers * layer + width + tables


def decoder_linear_flops(config: PreTrainedConfig, num_tokens: int) -> int:
    """Count the FLOPs of projections and MLP of one decoder layer.

    Args:
        config: Model configuration.
        num_tokens: Tokens that pass the layer.

    Returns:
        FLOPs without those of attention.
    """
    query_width, key_width = head_sizes(config)
    width, inner = config.text_config.hidden_size, config.text_config.intermediate_size
    return 2 * num_tokens * (2 * width * query_width + 2 * width * key_width + 3 * width * inner)


def decoder_layer_flops(config: PreTrainedConfig, num_new: int, num_cached: int = 0, *, causal: bool = True) -> int:
    """Count the FLOPs of one decoder layer.

    Args:
        config: Model configuration.
        num_new: Tokens that pass the layer.
        num_cached: Tokens that its cache held before.
        causal: Whether attention is counted over the visible half only, as fused kernels compute it; False counts
            the full square, as plain matrix products compute it.

    Returns:
        FLOPs.
    """
    pairs = num_new * (num_new + 1) // 2 if causal else num_new * num_new
    return decoder_linear_flops(config, num_new) + 4 * (pairs + num_new * num_cached) * head_sizes(config)[0]


def decode_flops(config: PreTrainedConfig, lengths: Sequence[int]) -> int:
    """Count the FLOPs of one answer token.

    Args:
        config: Model configuration.
        lengths: Tokens in the cache of each layer.

    Returns:
        FLOPs of layers and output head.
    """
    layers = sum(decoder_layer_flops(config, 1, length) for length in lengths)
    return layers + 2 * config.text_config.hidden_size * config.text_config.vocab_size


def decoder_values_per_token(config: PreTrainedConfig) -> int:
    """Count the values that a token of the prompt holds for a while in the decoder.

    Args:
        config: Model configuration.

    Returns:
        Residual and normed input, and in turn gate and halves of the MLP, or the parts of attention.
    """
    query_width, key_width = head_sizes(config)
    text = config.text_config
    return 2 * text.hidden_size + max(3 * text.intermediate_size, 3 * query_width + 4 * key_width)


# ---------------------------------------------------------------------- towers


def patches_of(vision: PreTrainedConfig) -> int:
    """Count the patches of a frame in a tower.

    Args:
        vision: Configuration of the tower.

    Returns:
        Patches of the square grid, without a class token.
    """
    return (vision.image_size // vision.patch_size) ** 2


def count_siglip_parameters(vision: PreTrainedConfig) -> int:
    """Count the weights of a SigLIP tower.

    Args:
        vision: Configuration of the tower.

    Returns:
        Number of values without the last norm, whose place another module takes; with the pooling head where the
        configuration has one.
    """
    width, inner = vision.hidden_size, vision.intermediate_size
    attention, mlp = 4 * width**2 + width, 2 * width * inner + inner + width
    head = 0
    if getattr(vision, "vision_use_head", True):
        head = width + 4 * width**2 + 4 * width + 2 * width + mlp
    embed = width * vision.num_channels * vision.patch_size**2 + width + patches_of(vision) * width
    return embed + vision.num_hidden_layers * (attention + 3 * width + mlp + 4 * width) + head


def tower_call_flops(vision: PreTrainedConfig, patches: int, tokens: int, mlp_values: int) -> int:
    """Count the FLOPs of one call of a tower on tokens that all attend to each other.

    Args:
        vision: Configuration of the tower.
        patches: Patches that are embedded.
        tokens: Tokens in the layers, a class token included.
        mlp_values: Weights of the MLP of a layer, without biases.

    Returns:
        FLOPs of patch embedding, projections, attention and MLP.
    """
    width = vision.hidden_size
    embed = 2 * patches * vision.num_channels * vision.patch_size**2 * width
    linear = 2 * tokens * (4 * width * width + mlp_values)
    return embed + vision.num_hidden_layers * (linear + 4 * tokens * tokens * width)


def tower_values_per_token(vision: PreTrainedConfig, inner: int) -> int:
    """Count the values that a token holds for a while in a tower.

    Args:
        vision: Configuration of the tower.
        inner: Width of the MLP.

    Returns:
        Residual, normed input, and in turn the projections with their parts, or the MLP before and after activation.
    """
    return max(7 * vision.hidden_size, 2 * vision.hidden_size + 2 * inner)


# ---------------------------------------------------------------------- text for people


def beyond_positions(config: PreTrainedConfig, counts: Any, new_tokens: int) -> tuple[int, str | None]:
    """Say that prompt and answer are longer than the decoder, where they are.

    Args:
        config: Model configuration.
        counts: The counts, with `visual_tokens` and `text_tokens`.
        new_tokens: Tokens of the answer.

    Returns:
        Positions of the decoder, and the beginning of a sentence, or None where all fits.
    """
    limit = getattr(config.text_config, "max_position_embeddings", None)
    needed = counts.visual_tokens + counts.text_tokens + new_tokens
    if limit is None or needed <= limit:
        return limit or needed, None
    return limit, f"prompt and answer need {needed:,} positions, the model has {limit:,}"


def warn_of_positions(
    config: PreTrainedConfig, counts: Any, new_tokens: int, *, tokens: int, frames: int = 1
) -> str | None:
    """Say how many frames fit when prompt and answer are longer than the decoder.

    Args:
        config: Model configuration.
        counts: The counts, with `visual_tokens` and `text_tokens`.
        new_tokens: Tokens of the answer.
        tokens: Visual tokens of so many frames as belong together.
        frames: How many those are.

    Returns:
        A sentence, or None.
    """
    limit, sentence = beyond_positions(config, counts, new_tokens)
    if sentence is None:
        return None
    most = max((limit - counts.text_tokens - new_tokens) // tokens, 0)
    return f"{sentence}: take at most {most * frames:,} frames, or extend it with YaRN (rope_parameters)."


def memory_rows(counts: Any, activations: str, *, visual_cache: int | None = None) -> list[tuple[str, str]]:
    """Lay memory out for people.

    Args:
        counts: The counts, with `weight_bytes`, `cache_bytes` and the `peak` of `activation_bytes`.
        activations: What the activations are made of.
        visual_cache: Bytes of keys and values that are kept of patch tokens besides, None where none are.

    Returns:
        Pairs of name and text.
    """
    peak = counts.activation_bytes["peak"]
    total = counts.weight_bytes + counts.cache_bytes + (visual_cache or 0) + peak
    rows = [
        ("memory", f"{gigabytes(total)} at the peak, made of"),
        ("  weights", gigabytes(counts.weight_bytes)),
        ("  cache", f"{gigabytes(counts.cache_bytes)} after the prefill"),
    ]
    if visual_cache is not None:
        rows.append(("  visual cache", f"{gigabytes(visual_cache)}, keys and values of all patch tokens"))
    return [*rows, ("  activations", f"{gigabytes(peak)} (estimate; {activations})")]


def compute_rows(flops: dict[str, int], parts: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Lay compute out for people.

    Args:
        flops: FLOPs of `tower`, `prefill`, `decode_per_token`, and `total` before the first answer token.
        parts: Rows between tower and prefill.

    Returns:
        Pairs of name and text.
    """
    return [
        ("compute", f"{teraflops(flops['total'])} before the first answer token, made of"),
        ("  tower", teraflops(flops["tower"])),
        *parts,
        ("  prefill", teraflops(flops["prefill"])),
        ("  answer", f"{teraflops(flops['decode_per_token'])} per token"),
    ]


def gigabytes(count: int) -> str:
    """Write bytes as GB or MB (powers of ten)."""
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def teraflops(count: int) -> str:
    """Write FLOPs as T or G."""
    return f"{count / 1e12:,.1f} TFLOPs" if count >= 1e11 else f"{count / 1e9:,.2f} GFLOPs"
