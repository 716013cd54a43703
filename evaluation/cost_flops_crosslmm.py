"""Counts FLOPs of CrossLMM from its configuration, term by term, and as its paper counts them.

The paper counts multiply-adds without the attention of the decoder and without that of the cross-attention;
`paper_macs` does so too, everything else here counts FLOPs as for the other architectures, attention included.

Source: CrossLMM (arXiv 2505.17020), Sec. 3, Table 6 and Fig. 4; the counts follow the modules of this package.
"""

from transformers import PreTrainedConfig

from longvideo.evaluation.cost import (
    decode_flops,
    decoder_layer_flops,
    decoder_linear_flops,
    head_sizes,
    patches_of,
    tower_call_flops,
)
from longvideo.modeling.crosslmm.configuration_crosslmm import CrossLMMConfig

PAPER_TEXT_TOKENS = 63  # what the intercepts of Table 6 and Fig. 4 amount to


def built_tower(config: CrossLMMConfig) -> PreTrainedConfig:
    """Describe the tower as it is built, without the layers behind the features.

    Args:
        config: Model configuration.

    Returns:
        Configuration of the tower, a changed copy.
    """
    fields = {**config.vision_config.to_dict(), "num_hidden_layers": config.num_vision_layers}
    return type(config.vision_config)(**fields)


def memory_width(config: CrossLMMConfig) -> int:
    """Return the width of the tokens that keys and values are made from."""
    projected = config.kv_source == "projected"
    return config.text_config.hidden_size if projected else config.vision_config.hidden_size


def count_key_value_sets(config: CrossLMMConfig) -> int:
    """Count the pairs of key and value projections of a layer with cross-attention: 1 or 2."""
    return 1 if config.share_kv else config.use_v2v + config.use_t2v


# ---------------------------------------------------------------------- FLOPs


def tower_flops(config: CrossLMMConfig, num_frames: int) -> int:
    """Count the FLOPs of the layers of the tower that run.

    Args:
        config: Model configuration.
        num_frames: Frames.

    Returns:
        FLOPs.
    """
    vision = built_tower(config)
    patches = patches_of(vision)
    return num_frames * tower_call_flops(vision, patches, patches, 2 * vision.hidden_size * vision.intermediate_size)


def projector_flops(config: CrossLMMConfig, num_tokens: int) -> int:
    """Count the FLOPs of the projector.

    Args:
        config: Model configuration.
        num_tokens: Tokens that go through it.

    Returns:
        FLOPs.
    """
    width = config.text_config.hidden_size
    return 2 * num_tokens * (config.vision_config.hidden_size * width + width * width)


def count_projected_tokens(config: CrossLMMConfig, num_frames: int) -> int:
    """Count the tokens that go through the projector.

    Args:
        config: Model configuration.
        num_frames: Frames.

    Returns:
        The merged ones, and the original ones where keys and values are made from them.
    """
    original = config.cross_attention_layers and config.kv_source == "projected"
    return num_frames * (config.tokens_per_frame + (patches_of(config.vision_config) if original else 0))


def query_flops(config: CrossLMMConfig, num_visual: int, num_text: int) -> int:
    """Count the FLOPs of query and output projections of one layer with cross-attention.

    Args:
        config: Model configuration.
        num_visual: Visual rows.
        num_text: Text rows.

    Returns:
        FLOPs; a row goes through the projections of its own kind only.
    """
    rows = num_visual * config.use_v2v + num_text * config.use_t2v
    return 2 * rows * 2 * config.text_config.hidden_size * head_sizes(config)[0]


def key_value_flops(config: CrossLMMConfig, num_keys: int) -> int:
    """Count the FLOPs of key and value projections of one layer with cross-attention.

    Args:
        config: Model configuration.
        num_keys: Tokens before merging.

    Returns:
        FLOPs.
    """
    return 2 * count_key_value_sets(config) * num_keys * 2 * memory_width(config) * head_sizes(config)[1]


def attention_flops(config: CrossLMMConfig, num_frames: int, num_text: int) -> int:
    """Count the FLOPs of queries times keys and weights times values of one layer with cross-attention.

    Args:
        config: Model configuration.
        num_frames: Frames.
        num_text: Text rows behind the video.

    Returns:
        FLOPs. A visual row sees the tokens of its video, or of its frame; a text row sees all of them.
    """
    patches = patches_of(config.vision_config)
    seen = patches * (num_frames if config.v2v_scope == "video" else 1)
    pairs = num_frames * config.tokens_per_frame * seen * config.use_v2v
    pairs += num_text * num_frames * patches * config.use_t2v
    return 4 * pairs * head_sizes(config)[0]


def prefill_flops(config: CrossLMMConfig, sequence_length: int, *, causal: bool = True) -> int:
    """Count the FLOPs of the decoder without cross-attention, with logits of its last token only.

    Args:
        config: Model configuration.
        sequence_length: Tokens of the prompt, text and visual.
        causal: See `cost.decoder_layer_flops`.

    Returns:
        FLOPs of layers and output head.
    """
    text = config.text_config
    layers = text.num_hidden_layers * decoder_layer_flops(config, sequence_length, causal=causal)
    return layers + 2 * text.hidden_size * text.vocab_size


def token_flops(config: CrossLMMConfig, num_frames: int, num_text: int) -> int:
    """Count the FLOPs of one answer token.

    Args:
        config: Model configuration.
        num_frames: Frames of the video.
        num_text: Text tokens of the prompt.

    Returns:
        FLOPs of layers, cross-attention on the cached keys, and output head.
    """
    lengths = [num_text + num_frames * config.tokens_per_frame] * config.text_config.num_hidden_layers
    attend = 4 * num_frames * patches_of(config.vision_config) * head_sizes(config)[0]
    cross = (query_flops(config, 0, 1) + attend) * config.use_t2v
    return decode_flops(config, lengths) + len(config.cross_attention_layers) * cross


# ---------------------------------------------------------------------- as in the paper


def paper_macs(config: CrossLMMConfig, num_frames: int, *, num_text: int = PAPER_TEXT_TOKENS) -> dict[str, int]:
    """Count multiply-adds as Table 6 and Fig. 4 of the paper do.

    Args:
        config: Model configuration.
        num_frames: Frames.
        num_text: Text tokens of the prompt.

    Returns:
        Multiply-adds of `tower`, `projector`, `language`, `query_output`, `key_value`, and `total`.

    Source: CrossLMM, Table 6 and Fig. 4, which print them as TFLOPs.
    Differs: attention of decoder and cross-attention and the output head are left out, as the strictly linear growth
        of the printed values shows; the projector is counted on the original tokens only, whatever keys and values
        are made from. Here merged tokens go through it as well (1.2 % of it), and the original ones only where keys
        and values need them.
    """
    layers, num_keys = len(config.cross_attention_layers), num_frames * patches_of(config.vision_config)
    num_visual = num_frames * config.tokens_per_frame
    flops = {
        "tower": tower_flops(config, num_frames),
        "projector": projector_flops(config, num_keys),
        "language": config.text_config.num_hidden_layers * decoder_linear_flops(config, num_visual + num_text),
        "query_output": layers * query_flops(config, num_visual, num_text),
        "key_value": layers * key_value_flops(config, num_keys),
    }
    macs = {name: value // 2 for name, value in flops.items()}
    return {**macs, "total": sum(macs.values())}


def all_tokens_macs(
    config: CrossLMMConfig,
    num_frames: int,
    *,
    tokens_per_frame: float = 196,
    num_text: int = PAPER_TEXT_TOKENS,
    max_length: int = 32768,
) -> int:
    """Count multiply-adds of the same decoder fed with all projected tokens, as LLaVA-OneVision does.

    Args:
        config: Model configuration.
        num_frames: Frames.
        tokens_per_frame: Tokens of a frame in the decoder, with what else the prompt says per frame.
        num_text: Text tokens of the prompt.
        max_length: Tokens after which the prompt is cut off.

    Returns:
        Multiply-adds without the decoder's attention, with the output head on every token.

    Source: CrossLMM, Fig. 4b. Its value at 256 frames is that of a prompt cut off at 32,768 tokens.
    """
    text, num_keys = config.text_config, num_frames * patches_of(config.vision_config)
    length = min(round(num_frames * tokens_per_frame) + num_text, max_length)
    flops = tower_flops(config, num_frames) + projector_flops(config, num_keys)
    flops += text.num_hidden_layers * decoder_linear_flops(config, length)
    return flops // 2 + length * text.hidden_size * text.vocab_size
