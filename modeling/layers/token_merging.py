"""Bipartite token merging: joins the most alike tokens of a clip until a wanted number is left.

Source: VideoChat-Flash (arXiv 2501.00574), Sec. 3.1, clip-level compression, Eq. 1; the method is ToMe (arXiv
2210.09461), applied here once after the encoder, without proportional attention.

Shapes: B clips, N tokens before, M tokens after, E width, H heads.
"""

from dataclasses import dataclass

import torch
from torch.nn import functional as F


@dataclass
class TokenMerge:
    """What `merge_tokens` returns.

    Args:
        merged_BME: (B, M, E) size-weighted mean of the tokens of each group.
        sizes_BM: (B, M) number of original tokens in each group, float32.
        groups_BN: (B, N) int64, index of the group (0 to M - 1) that each original token went to.
    """

    merged_BME: torch.Tensor
    sizes_BM: torch.Tensor
    groups_BN: torch.Tensor


def merge_schedule(num_tokens: int, num_target: int) -> list[int]:
    """Gives how many tokens each round merges away, at most half of those present.

    Args:
        num_tokens: tokens before merging.
        num_target: tokens wanted, smaller than `num_tokens`.

    Returns:
        Merges per round; they add up to `num_tokens - num_target`.

    Raises:
        ValueError: the target is not below the token count, so that nothing could be merged.

    Source: VideoChat-Flash, `mm_projector_builder.py`, `ToMe16_mlp_hd64.merge_tokens`.
    """
    if not 0 < num_target < num_tokens:
        raise ValueError(
            f"Token merging got {num_tokens} tokens and a target of {num_target}; the target must lie between 1 and "
            f"{num_tokens - 1}. Use larger frames, smaller patches or fewer tokens per frame."
        )
    merges = []
    while num_tokens != num_target:
        merges.append(min(num_tokens - num_target, num_tokens // 2))
        num_tokens -= merges[-1]
    return merges


def _merge_round(
    x_BNE: torch.Tensor, sizes_BN: torch.Tensor, num_merges: int, num_heads: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Merges the `num_merges` even-position tokens that have the closest odd-position partner.

    Returns:
        Tokens and sizes after the round, and for each token before the round its index after it, (B, N).
    """
    num_tokens = x_BNE.shape[1]
    with torch.no_grad():
        metric = F.normalize(x_BNE.float().unflatten(-1, (num_heads, -1)).mean(2), dim=-1)
        scores = metric[:, ::2] @ metric[:, 1::2].transpose(1, 2)
        best_score, best_partner = scores.max(dim=-1)
        # A stable sort makes ties reproducible; equal frames and black frames produce many.
        order = best_score.argsort(dim=-1, descending=True, stable=True)
        source, unmerged = order[:, :num_merges], order[:, num_merges:]
        partner = best_partner.gather(1, source)

    weighted = x_BNE.float() * sizes_BN[..., None]
    packed = torch.cat([weighted, sizes_BN[..., None]], dim=-1)  # sizes travel with the sums
    even, odd = packed[:, ::2], packed[:, 1::2]
    width = packed.shape[-1]
    summed = odd.scatter_add(1, partner[..., None].expand(-1, -1, width), _take(even, source))
    packed = torch.cat([_take(even, unmerged), summed], dim=1)
    sizes = packed[..., -1].detach()
    merged = (packed[..., :-1] / sizes[..., None]).to(x_BNE.dtype)

    num_unmerged = unmerged.shape[1]
    moved = torch.empty(x_BNE.shape[0], num_tokens, dtype=torch.int64, device=x_BNE.device)
    ranks = torch.arange(num_unmerged, device=x_BNE.device).expand_as(unmerged)
    even_to = torch.empty_like(order).scatter(1, unmerged, ranks).scatter(1, source, partner + num_unmerged)
    moved[:, ::2] = even_to
    moved[:, 1::2] = torch.arange(odd.shape[1], device=x_BNE.device) + num_unmerged
    return merged, sizes, moved


def _take(x_BNE: torch.Tensor, index_BM: torch.Tensor) -> torch.Tensor:
    return x_BNE.gather(1, index_BM[..., None].expand(-1, -1, x_BNE.shape[-1]))


def merge_tokens(x_BNE: torch.Tensor, num_target: int, *, num_heads: int) -> TokenMerge:
    """Merges the tokens of each clip until `num_target` are left.

    Args:
        x_BNE: (B, N, E) tower output, all frames of a clip in one row.
        num_target: tokens to keep per clip.
        num_heads: heads of the tower; the similarity is measured on the mean over heads.

    Returns:
        Merged tokens, their sizes and the group of every original token. The order of the merged tokens has no
        spatial meaning: in each round the unmerged ones, best match first, then the partners in their old order.

    Raises:
        ValueError: `num_target` is not below N, or E is not a multiple of `num_heads`.

    Source: VideoChat-Flash Sec. 3.1; `mm_projector_builder.py`, `bipartite_soft_matching` and `merge_wavg`.
    Differs: the original computes similarities and sums in the model's type; here both are float32, the same in fp32.
    """
    if x_BNE.shape[-1] % num_heads:
        raise ValueError(f"Token width {x_BNE.shape[-1]} is not a multiple of the tower's {num_heads} heads.")
    sizes = torch.ones(x_BNE.shape[:2], dtype=torch.float32, device=x_BNE.device)
    groups = torch.arange(x_BNE.shape[1], device=x_BNE.device).repeat(x_BNE.shape[0], 1)
    for num_merges in merge_schedule(x_BNE.shape[1], num_target):
        x_BNE, sizes, moved = _merge_round(x_BNE, sizes, num_merges, num_heads)
        groups = moved.gather(1, groups)
    return TokenMerge(merged_BME=x_BNE, sizes_BM=sizes, groups_BN=groups)
