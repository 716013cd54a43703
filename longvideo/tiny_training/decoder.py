"""Lets a tiny model begin with the decoder of another one, as published models begin with a trained language model."""

from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from longvideo.modeling.videochat_flash.modeling_videochat_flash import VideoChatFlashForConditionalGeneration

TINY_FOLDER = Path(__file__).parents[1] / "tiny"
# What a patched layer of CrossLMM has beside the parts of its own class.
ADDED_MODULE = "dual_cross_attention"


def _grow(body: dict[str, torch.Tensor], num_layers: int) -> dict[str, torch.Tensor]:
    """Puts layers that add nothing at first behind each of a decoder's, where that gives the wanted number."""
    present = 1 + max(int(name.split(".")[1]) for name in body if name.startswith("layers."))
    factor, rest = divmod(num_layers, present)
    if rest or factor <= 1:
        return body
    grown = {}
    for name, value in body.items():
        if not name.startswith("layers."):
            grown[name] = value
            continue
        _, index, inner = name.split(".", 2)
        for step in range(factor):
            silent = step and inner in ("self_attn.o_proj.weight", "mlp.down_proj.weight")
            grown[f"layers.{int(index) * factor + step}.{inner}"] = torch.zeros_like(value) if silent else value
    return grown


@torch.no_grad()
def take_decoder(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> int:
    """Copies the decoder of a trained tiny model, and the embeddings of all tokens that both tokenizers have.

    Cross-attention in the model's layers keeps its own weights; the norm of its queries is copied from the layer's. A
    decoder with twice as many layers, or more, gets a copy of each behind it whose two outputs are zero.

    Args:
        model: fresh model with a decoder of the same shape, or deeper by a whole factor; changed in place.
        tokenizer: of that model.
        folder: trained model with its tokenizer.

    Returns:
        How many embeddings were copied; the other tokens keep theirs.

    Raises:
        RuntimeError: the decoders have different shapes.
    """
    source = VideoChatFlashForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    body = source.model.language_model.state_dict()
    table = body.pop("embed_tokens.weight")
    body = _grow(body, model.config.text_config.num_hidden_layers)
    missing, unexpected = model.model.language_model.load_state_dict(body, strict=False)
    added = {name for name in missing if "embed_tokens" in name or ADDED_MODULE in name}
    others = sorted({*missing, *unexpected} - added)
    if others:
        raise RuntimeError(f"the decoder in {folder} does not fit: {others[:4]} stand in one of the two only")
    own = model.model.language_model.state_dict()
    for name in added:
        if name.endswith(f"{ADDED_MODULE}.query_norm.weight"):
            # As in a layer that is patched after its weights are loaded.
            own[name].copy_(body[name.replace(f"{ADDED_MODULE}.query_norm", "post_attention_layernorm")])
    rows, known = tokenizer.get_vocab(), AutoTokenizer.from_pretrained(folder).get_vocab()
    shared = sorted(rows.keys() & known.keys())
    embeddings = model.get_input_embeddings().weight
    embeddings[[rows[token] for token in shared]] = table[[known[token] for token in shared]]
    return len(shared)
