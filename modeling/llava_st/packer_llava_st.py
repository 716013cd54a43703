"""Spatial-Temporal Packer: one point of a region of the video attends to the whole region.

Paper: LLaVA-ST (arXiv 2501.08282), Sec. 3.3, Eqs. 6-8. Original read: appletea233/LLaVA-ST, `token_packer.py`.
Deviations: regions are cut after the narrow maps of keys and values, chunk by chunk, never from the wide features; and
the attention's own projections of keys and values are moved to the query's side, once per region instead of once per
key. A region has one query, so this is the same sum in another order.

Shapes: F frames, P = G * G patches of a frame, N = F / temporal_factor, Q = P / spatial_factor^2 regions per frame,
n = temporal_factor * spatial_factor^2 keys of a region, D width of the language model, E width of the attention,
H heads, C any width.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

NORM_EPS = 1e-5
PACKER_QUERIES = ("center", "average")
# Keys that are mapped at one time. Some hundred MiB of activations in float32 at the released width.
CHUNK_TOKENS = 8192


def _blocks(features_FPC: torch.Tensor, temporal_factor: int, spatial_factor: int) -> torch.Tensor:
    """Views (F, P, C) as (N, temporal_factor, Q rows, spatial_factor, Q columns, spatial_factor, C)."""
    frames, patches, width = features_FPC.shape
    if temporal_factor < 1 or spatial_factor < 1:
        raise ValueError(f"Factors must be at least 1, got temporal {temporal_factor} and spatial {spatial_factor}.")
    if frames % temporal_factor:
        raise ValueError(
            f"{frames} frames cannot be cut into groups of {temporal_factor}. Give a multiple of {temporal_factor} "
            "frames, or one frame for an image."
        )
    if spatial_factor == 1:  # the patches need not form a square
        return features_FPC.reshape(frames // temporal_factor, temporal_factor, 1, 1, patches, 1, width)
    grid = math.isqrt(patches)
    if grid * grid != patches or grid % spatial_factor:
        raise ValueError(
            f"{patches} patches per frame cannot be cut into squares of {spatial_factor} x {spatial_factor}: they "
            f"must form a square grid whose side is a multiple of {spatial_factor}."
        )
    side = grid // spatial_factor
    shape = (frames // temporal_factor, temporal_factor, side, spatial_factor, side, spatial_factor, width)
    return features_FPC.reshape(shape)


def cut_regions(features_FPC: torch.Tensor, *, temporal_factor: int = 1, spatial_factor: int = 1) -> torch.Tensor:
    """Cuts frames into contiguous regions in time and space.

    Args:
        features_FPC: (F, P, C), patches row-major.
        temporal_factor: frames of a region.
        spatial_factor: side of a region in patches.

    Returns:
        (N, Q, n, C), regions row-major, keys ordered by frame, row, column; a view where only time is cut.

    Raises:
        ValueError: a factor below 1, or sizes that it does not divide.

    Source: LLaVA-ST Sec. 3.3; `token_packer.py`.
    """
    blocks = _blocks(features_FPC, temporal_factor, spatial_factor).permute(0, 2, 4, 1, 3, 5, 6)
    return blocks.flatten(3, 5).flatten(1, 2)


def _middle(x: torch.Tensor, dim: int) -> torch.Tensor:
    """Middle entry of an axis, the mean of the two middle ones where their number is even."""
    size = x.shape[dim]
    if size % 2:
        return x.select(dim, size // 2)
    pair = x.narrow(dim, size // 2 - 1, 2)
    return pair.mean(dim, dtype=torch.promote_types(x.dtype, torch.float32)).to(x.dtype)


def pool_regions(
    features_FPC: torch.Tensor, *, temporal_factor: int = 1, spatial_factor: int = 1, query: str = "center"
) -> torch.Tensor:
    """Gives one point for every region.

    Args:
        features_FPC: (F, P, C), patches row-major.
        temporal_factor: frames of a region.
        spatial_factor: side of a region in patches.
        query: "center", the region's middle (with an even factor the mean of the middle two or four), or "average".

    Returns:
        (N, Q, C), computed in float32 at least and given in the type of the features.

    Raises:
        ValueError: another `query`, a factor below 1, or sizes that it does not divide.

    Source: LLaVA-ST Sec. 3.3 for "average"; `token_packer.py` for "center".
    Differs: the paper pools regions by their average; the released code resizes by (bi)linear interpolation without
        antialiasing, which at whole factors selects the middle. Released weights need "center".
    """
    _check_query(query)
    blocks = _blocks(features_FPC, temporal_factor, spatial_factor)
    if query == "average":
        wide = torch.promote_types(blocks.dtype, torch.float32)
        pooled = blocks.mean((1, 3, 5), dtype=wide).to(blocks.dtype)
    else:
        pooled = _middle(_middle(_middle(blocks, 5), 3), 1)
    return pooled.flatten(1, 2)


def _check_query(query: str) -> None:
    if query not in PACKER_QUERIES:
        raise ValueError(f"The query of the packer must be one of {', '.join(PACKER_QUERIES)}, got {query!r}.")


def pool_streams(
    features_FPD: torch.Tensor, *, spatial_factor: int, temporal_factor: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pools both streams by plain averages, for a model without packers.

    Args:
        features_FPD: (F, P, D).
        spatial_factor: the packers' spatial factor.
        temporal_factor: the packers' temporal factor.

    Returns:
        Fast stream (F, P / spatial_factor^4, D) and slow stream (F / temporal_factor, P / spatial_factor^2, D), as
        many tokens as `LlavaSTPacker` gives; one frame keeps its time.

    Raises:
        ValueError: sizes that the factors do not divide.

    Source: LLaVA-ST Table 7, "w/o STP".
    """
    return pool_reduced(
        pool_regions(features_FPD, spatial_factor=spatial_factor, query="average"),
        spatial_factor=spatial_factor,
        temporal_factor=temporal_factor,
    )


def pool_reduced(
    reduced_FPD: torch.Tensor, *, spatial_factor: int, temporal_factor: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Second step of `pool_streams`, for frames whose grid was averaged before, chunk by chunk.

    Args:
        reduced_FPD: (F, P / spatial_factor^2, D).
        spatial_factor: the packers' spatial factor.
        temporal_factor: the packers' temporal factor.

    Returns:
        Fast and slow stream as of `pool_streams`.

    Raises:
        ValueError: sizes that the factors do not divide.
    """
    group = 1 if reduced_FPD.shape[0] == 1 else temporal_factor
    fast = pool_regions(reduced_FPD, spatial_factor=spatial_factor, query="average")
    return fast, pool_regions(reduced_FPD, temporal_factor=group, query="average")


class LlavaSTPackerAttention(nn.Module):
    """Multi-head attention of one query per region.

    The parameters are those of `nn.MultiheadAttention`. With q, W and b of one head, the score of a key x is
    `q @ (W x + b) = (W.T q) @ x + const`, and the constant falls out of the softmax; the output is
    `sum a (W x + b) = W (sum a x) + b`. So the maps act on one query instead of n keys, and the heads of a query
    become H queries over shared keys.

    Args:
        width: E.
        num_heads: H.

    Raises:
        ValueError: the heads do not divide the width.
    """

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        if num_heads < 1 or width % num_heads:
            raise ValueError(f"The packer's width of {width} cannot be cut into {num_heads} heads.")
        self.num_heads = num_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Attends.

        Args:
            query: (N, Q, E).
            key: (N, Q, n, E) keys of each query's region.
            value: (N, Q, n, E).

        Returns:
            (N, Q, E).
        """
        weight_q, weight_k, weight_v = self.in_proj_weight.chunk(3)
        bias_q, _, bias_v = self.in_proj_bias.chunk(3)
        heads = (self.num_heads, -1)
        q = F.linear(query, weight_q, bias_q).unflatten(-1, heads)
        scale = q.shape[-1] ** -0.5
        q = torch.einsum("nqhd,hde->nqhe", q, weight_k.unflatten(0, heads))  # (N, Q, H, E)
        mixed = F.scaled_dot_product_attention(q, key, value, scale=scale)  # (N, Q, H, E)
        attended = torch.einsum("nqhe,hde->nqhd", mixed, weight_v.unflatten(0, heads)).flatten(-2)
        return self.out_proj(attended + bias_v)


def _mlp(width: int, hidden_size: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, hidden_size), nn.GELU(), nn.Linear(hidden_size, hidden_size))


class LlavaSTPackerLayer(nn.Module):
    """Packs every region of a video into one token by point-to-region attention.

    Args:
        width: D, in and out.
        hidden_size: E, width of the attention.
        num_heads: H, heads of the attention.
        temporal_factor: frames of a region; one frame alone is never cut in time.
        spatial_factor: side of a region in patches.
        query: "center" as released or "average" as in the paper, see `pool_regions`.
        chunk_tokens: keys that are mapped at one time, one frame or group of frames at least; bounds memory where
            nothing is kept for gradients.

    Raises:
        ValueError: an unknown query, heads that do not divide the width, or a chunk below 1.

    Source: LLaVA-ST Sec. 3.3; `token_packer.py`. The residual is the pooled point before its map.
    """

    def __init__(
        self,
        width: int,
        hidden_size: int,
        num_heads: int,
        *,
        temporal_factor: int = 1,
        spatial_factor: int = 1,
        query: str = "center",
        chunk_tokens: int = CHUNK_TOKENS,
    ):
        super().__init__()
        _check_query(query)
        if chunk_tokens < 1:
            raise ValueError(f"chunk_tokens must be at least 1, got {chunk_tokens}.")
        self.temporal_factor = temporal_factor
        self.spatial_factor = spatial_factor
        self.query = query
        self.chunk_tokens = chunk_tokens
        self.to_q, self.to_k, self.to_v = (_mlp(width, hidden_size) for _ in range(3))
        self.ln_q, self.ln_k, self.ln_v = (nn.LayerNorm(hidden_size, eps=NORM_EPS) for _ in range(3))
        self.attn = LlavaSTPackerAttention(hidden_size, num_heads)
        self.to_out = nn.Linear(hidden_size, width, bias=False)

    def _pack(self, features: torch.Tensor, factors: dict[str, int]) -> torch.Tensor:
        point = pool_regions(features, **factors, query=self.query)
        key = cut_regions(self.ln_k(self.to_k(features)), **factors)
        value = cut_regions(self.ln_v(self.to_v(features)), **factors)
        return point + self.to_out(self.attn(self.ln_q(self.to_q(point)), key, value))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Packs.

        Args:
            features: (F, P, D), patches row-major.

        Returns:
            (N, Q, D); N = 1 for one frame.

        Raises:
            ValueError: sizes that the factors do not divide.
        """
        frames, patches = features.shape[:2]
        group = 1 if frames == 1 else self.temporal_factor
        factors = {"temporal_factor": group, "spatial_factor": self.spatial_factor}
        _blocks(features, **factors)  # an error names all frames, not those of a chunk
        size = max(self.chunk_tokens // (group * patches), 1) * group
        return torch.cat([self._pack(piece, factors) for piece in features.split(size)])


class LlavaSTPacker(nn.Module):
    """Compresses a video into a fast stream of all frames and a slow stream of a finer grid.

    Frames can be reduced in chunks by `spatial`, right after the projector, and joined for `streams`, so that the
    whole grid of all frames is never held.

    Args:
        width: D, width of the language model.
        hidden_size: E, width of the attention.
        num_heads: H, heads of the attention.
        spatial_factor: by how much each spatial step divides the side of the grid.
        temporal_factor: frames that become one in the slow stream.
        query: "center" or "average", see `pool_regions`.
        chunk_tokens: keys that are mapped at one time.

    Raises:
        ValueError: an unknown query, heads that do not divide the width, or a chunk below 1.

    Source: LLaVA-ST Eqs. 6 (`spatial`), 7 (`fast`) and 8 (`temporal`); the original names them
        `token_packer`, `token_packer_fast` and `token_packer_slow`.
    """

    def __init__(
        self,
        width: int,
        hidden_size: int,
        num_heads: int,
        *,
        spatial_factor: int,
        temporal_factor: int,
        query: str = "center",
        chunk_tokens: int = CHUNK_TOKENS,
    ):
        super().__init__()
        sizes, common = (width, hidden_size, num_heads), {"query": query, "chunk_tokens": chunk_tokens}
        self.spatial = LlavaSTPackerLayer(*sizes, spatial_factor=spatial_factor, **common)
        self.temporal = LlavaSTPackerLayer(*sizes, temporal_factor=temporal_factor, **common)
        self.fast = LlavaSTPackerLayer(*sizes, spatial_factor=spatial_factor, **common)

    def streams(self, reduced: torch.Tensor, *, with_fast: bool = True) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Packs frames that `spatial` has reduced.

        Args:
            reduced: (F, P1, D).
            with_fast: whether to compute the fast stream; the released weights never use it.

        Returns:
            Fast stream (F, P2, D) or None, and slow stream (F / temporal_factor, P1, D); one frame, an image, gives a
            slow stream of one frame.

        Raises:
            ValueError: sizes that the factors do not divide.
        """
        return self.fast(reduced) if with_fast else None, self.temporal(reduced)

    def forward(self, features: torch.Tensor, *, with_fast: bool = True) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Packs a video.

        Args:
            features: (F, G * G, D), patches row-major.
            with_fast: whether to compute the fast stream.

        Returns:
            Fast stream (F, P2, D) or None, and slow stream (F / temporal_factor, P1, D), with
            P1 = G^2 / spatial_factor^2 and P2 = P1 / spatial_factor^2.

        Raises:
            ValueError: sizes that the factors do not divide.
        """
        return self.streams(self.spatial(features), with_fast=with_fast)


def init_packer_weights(module: nn.Module, *, std: float = 0.02) -> None:
    """Initialises a packer's layer; any other module is left alone, so that `_init_weights` can pass all of them.

    Args:
        module: called with a `LlavaSTPackerLayer`, whose children are initialised with it.
        std: standard deviation of the linear maps.

    Source: `token_packer.py`: truncated normal for linear maps, zero biases; the packed input projection keeps the
        uniform Xavier of `nn.MultiheadAttention`.
    """
    if not isinstance(module, LlavaSTPackerLayer):
        return
    for child in module.modules():
        if isinstance(child, nn.Linear):
            init.trunc_normal_(child.weight, std=std)
            if child.bias is not None:
                init.zeros_(child.bias)
        elif isinstance(child, nn.LayerNorm):
            init.ones_(child.weight)
            init.zeros_(child.bias)
        elif isinstance(child, LlavaSTPackerAttention):
            init.xavier_uniform_(child.in_proj_weight)
            init.zeros_(child.in_proj_bias)
