"""Lets a tiny model begin with the decoder of another one, as published models begin with a trained language model."""

from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from longvideo.modeling.videochat_flash.modeling_videochat_flash import VideoChatFlashForConditionalGeneration

TINY_FOLDER = Path(__file__).parents[1] / "tiny"


@torch.no_grad()
def take_decoder(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> int:
    """Copies the decoder of a trained tiny model, and the embeddings of all tokens that both tokenizers have.

    Args:
        model: fresh model with a decoder of the same shape; changed in place.
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
    missing, unexpected = model.model.language_model.load_state_dict(body, strict=False)
    others = sorted({*missing, *unexpected} - {name for name in missing if name.endswith("embed_tokens.weight")})
    if others:
        raise RuntimeError(f"the decoder in {folder} does not fit: {others[:4]} stand in one of the two only")
    rows, known = tokenizer.get_vocab(), AutoTokenizer.from_pretrained(folder).get_vocab()
    shared = sorted(rows.keys() & known.keys())
    embeddings = model.get_input_embeddings().weight
    embeddings[[rows[token] for token in shared]] = table[[known[token] for token in shared]]
    return len(shared)
