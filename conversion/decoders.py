"""What conversions share about the decoder: its tensor names, its tokenizer and its generation settings."""

import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from longvideo.conversion.checkpoint_io import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

# Qwen2 and Llama; only Qwen2 has biases.
DECODER_KEYS: dict[str, str | None] = {
    "model.embed_tokens.weight": "model.language_model.embed_tokens.weight",
    "model.layers.{}.self_attn.q_proj.weight": "model.language_model.layers.{}.self_attn.q_proj.weight",
    "model.layers.{}.self_attn.q_proj.bias": "model.language_model.layers.{}.self_attn.q_proj.bias",
    "model.layers.{}.self_attn.k_proj.weight": "model.language_model.layers.{}.self_attn.k_proj.weight",
    "model.layers.{}.self_attn.k_proj.bias": "model.language_model.layers.{}.self_attn.k_proj.bias",
    "model.layers.{}.self_attn.v_proj.weight": "model.language_model.layers.{}.self_attn.v_proj.weight",
    "model.layers.{}.self_attn.v_proj.bias": "model.language_model.layers.{}.self_attn.v_proj.bias",
    "model.layers.{}.self_attn.o_proj.weight": "model.language_model.layers.{}.self_attn.o_proj.weight",
    "model.layers.{}.mlp.gate_proj.weight": "model.language_model.layers.{}.mlp.gate_proj.weight",
    "model.layers.{}.mlp.up_proj.weight": "model.language_model.layers.{}.mlp.up_proj.weight",
    "model.layers.{}.mlp.down_proj.weight": "model.language_model.layers.{}.mlp.down_proj.weight",
    "model.layers.{}.input_layernorm.weight": "model.language_model.layers.{}.input_layernorm.weight",
    "model.layers.{}.post_attention_layernorm.weight": "model.language_model.layers.{}.post_attention_layernorm.weight",  # noqa: E501
    "model.norm.weight": "model.language_model.norm.weight",
    "lm_head.weight": "lm_head.weight",
    # Old versions of Transformers stored the rotary frequencies, which follow from the config.
    "model.layers.{}.self_attn.rotary_emb.inv_freq": None,
}
# Fields of an original config.json that Qwen2 takes as they are; rotary parameters come in other forms.
QWEN2_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "tie_word_embeddings",
    "use_sliding_window",
    "sliding_window",
    "max_window_layers",
    "attention_dropout",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
IMAGE_TOKEN = "<|image_pad|>"
VIDEO_TOKEN = "<|video_pad|>"


def load_tokenizer(source: Path, *, unnamed: str) -> "PreTrainedTokenizerBase | None":
    """Return the tokenizer of an original folder, None if there is none.

    Only the tokenizer's files are shown to the Auto class, which would otherwise ask for the remote code that the
    original config.json names.

    Args:
        source: The original folder.
        unnamed: Class of Transformers to take where the files name none.

    Returns:
        The tokenizer.

    Raises:
        ValueError: if the files cannot be read.
    """
    if not any((source / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        return None
    import transformers

    with tempfile.TemporaryDirectory() as folder:
        for name in TOKENIZER_FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, Path(folder) / name)
        named = (source / "tokenizer_config.json").is_file() and read_json(source / "tokenizer_config.json").get(
            "tokenizer_class"
        )
        try:
            kind = transformers.AutoTokenizer if named else getattr(transformers, unnamed)
            return kind.from_pretrained(folder)
        except Exception as error:
            raise ValueError(
                f"the tokenizer files of {source} cannot be read ({type(error).__name__}: {error}). Expected the "
                f"files of a {unnamed}, or of the class that tokenizer_config.json names; fetch them again, or take "
                "them all away to convert without a processor."
            ) from error


def add_placeholders(tokenizer: "PreTrainedTokenizerBase", config: "PreTrainedConfig") -> list[str]:
    """Give the tokenizer the visual placeholders, set their ids in the config, and say what was done."""
    from transformers import AddedToken

    known = tokenizer.get_vocab()
    added = [token for token in (IMAGE_TOKEN, VIDEO_TOKEN) if token not in known]
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in added], special_tokens=True)
    config.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    config.video_token_id = tokenizer.convert_tokens_to_ids(VIDEO_TOKEN)
    if not added:
        return []
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in added}
    notes = [f"added to the tokenizer: {', '.join(f'{token} ({number})' for token, number in ids.items())}."]
    rows = config.text_config.vocab_size
    if max(ids.values()) >= rows:
        notes.append(
            f"the embedding table has {rows} rows and none is spare; ids beyond it work, because placeholders are "
            "replaced before the look-up, but other programs may want a larger table."
        )
    return notes


def write_generation_config(
    config: "PreTrainedConfig",
    source: Path,
    folder: Path,
    tokenizer: "PreTrainedTokenizerBase | None",
    *,
    end_of_turn: str,
) -> list[str]:
    """Write generation_config.json: the original's, with the ids that end an answer; return notes.

    Args:
        config: The native config.
        source: The original folder.
        folder: The folder that is being written.
        tokenizer: The tokenizer, if there is one.
        end_of_turn: The token that ends an answer.

    Returns:
        Notes for the report.
    """
    from transformers import GenerationConfig

    given = read_json(source / "generation_config.json") if (source / "generation_config.json").is_file() else {}
    given.pop("transformers_version", None)
    text = config.text_config
    stops = given.get("eos_token_id", text.eos_token_id)
    stops = list(stops) if isinstance(stops, list) else [stops] if stops is not None else []
    if tokenizer is not None and end_of_turn in tokenizer.get_vocab():
        end = tokenizer.convert_tokens_to_ids(end_of_turn)
        stops = [end, *(stop for stop in stops if stop != end)]
    pad = given.get("pad_token_id", text.pad_token_id)
    if pad is None and tokenizer is not None:
        pad = tokenizer.pad_token_id
    given["eos_token_id"] = stops[0] if len(stops) == 1 else stops or None
    given["bos_token_id"] = given.get("bos_token_id", text.bos_token_id)
    given["pad_token_id"] = stops[0] if pad is None and stops else pad
    try:
        GenerationConfig(**given).save_pretrained(folder)
    except ValueError:
        # Old files keep sampling settings beside do_sample false, which Transformers 5 refuses to store.
        ids = {name: given[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        GenerationConfig(**ids).save_pretrained(folder)
        left = sorted(set(given) - set(ids))
        return [f"generation_config.json has settings that Transformers does not accept; left out: {', '.join(left)}."]
    return []
