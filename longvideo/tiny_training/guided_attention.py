"""Tells a small decoder where to look: the words that name what is asked for, and the frames that show it.

A decoder of four layers that answers plain questions fetches a colour or a shape in its first layer, where frames do
not know their places yet, and the token that begins a policy never learns by answers alone which of several things is
asked for. A loss on two attention maps teaches it both halves of that; no parameter is added and nothing stays of it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb

# The second layer is the first whose names know what their frames look like; the last one knows best when they are.
NAMING_LAYER, NAMING_HEAD = 1, -1
LOOKING_LAYER = -1
LEAST_SHARE = 1e-4


@dataclass(frozen=True)
class Guide:
    """Where one token of a row should look.

    Args:
        row: zero-based row of the batch.
        place: zero-based position of the token.
        names: zero-based positions of the words that name what is asked for; at least one.
        frames: zero-based positions of the visual tokens that show it; at least one.
    """

    row: int
    place: int
    names: tuple[int, ...]
    frames: tuple[int, ...]


class GuidedAttention:
    """Computes a loss of where tokens look from what two layers were given in the newest forward pass.

    Args:
        language_model: a decoder of the Qwen2 family.
    """

    def __init__(self, language_model: nn.Module):
        self.naming, self.looking = (language_model.layers[n].self_attn for n in (NAMING_LAYER, LOOKING_LAYER))
        self._seen: dict[nn.Module, tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Keeps what the two layers are given while it lasts."""

        def keep(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            self._seen[module] = (kwargs["hidden_states"], kwargs["position_embeddings"])

        handles = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in (self.naming, self.looking)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._seen.clear()

    def loss(self, guides: Sequence[Guide], attention_mask: torch.Tensor) -> torch.Tensor:
        """Says how much of the attention goes elsewhere; one head is to look at names, every head at frames.

        Args:
            guides: where tokens should look; at least one.
            attention_mask: (B, S), 1 for tokens that are not padding.

        Returns:
            Scalar, the mean negative logarithm of both shares of attention.
        """
        shares_NHS = self.maps(self.naming, guides, attention_mask)
        names_N = (shares_NHS[:, NAMING_HEAD] * _chosen([guide.names for guide in guides], shares_NHS)).sum(-1)
        shares_NHS = self.maps(self.looking, guides, attention_mask)
        frames_NH = (shares_NHS * _chosen([guide.frames for guide in guides], shares_NHS)[:, None]).sum(-1)
        return -(names_N + LEAST_SHARE).log().mean() - (frames_NH + LEAST_SHARE).log().mean()

    def maps(self, layer: nn.Module, guides: Sequence[Guide], attention_mask: torch.Tensor) -> torch.Tensor:
        """Computes the attention of the guided tokens alone.

        Args:
            layer: the attention of one of the two layers.
            guides: whose places ask.
            attention_mask: (B, S), 1 for tokens that are not padding.

        Returns:
            (N, H, S) attention in float32, one row for each guide.
        """
        hidden_BSE, (cos, sin) = self._seen[layer]
        shape = (*hidden_BSE.shape[:2], -1, layer.head_dim)
        query_BHSD, key_BHSD = (part(hidden_BSE).view(shape).transpose(1, 2) for part in (layer.q_proj, layer.k_proj))
        query_BHSD, key_BHSD = apply_rotary_pos_emb(query_BHSD, key_BHSD, cos, sin)
        rows = torch.tensor([guide.row for guide in guides], device=hidden_BSE.device)
        places = torch.tensor([guide.place for guide in guides], device=hidden_BSE.device)
        query_NHD = query_BHSD[rows, :, places].float()
        key_NHSD = key_BHSD.repeat_interleave(query_BHSD.shape[1] // key_BHSD.shape[1], dim=1)[rows].float()
        scores_NHS = torch.einsum("nhd,nhsd->nhs", query_NHD, key_NHSD) * layer.scaling
        seen_NS = torch.arange(hidden_BSE.shape[1], device=places.device) <= places[:, None]
        seen_NS = seen_NS & attention_mask[rows].bool()
        return scores_NHS.masked_fill(~seen_NS[:, None], -torch.inf).softmax(-1)


def _chosen(places: Sequence[Sequence[int]], like: torch.Tensor) -> torch.Tensor:
    """(N, S) ones at the places of each row, zeros elsewhere."""
    chosen_NS = like.new_zeros(len(places), like.shape[-1])
    for row, some in zip(chosen_NS, places, strict=True):
        row[list(some)] = 1
    return chosen_NS
