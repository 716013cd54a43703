"""Spatial vision aggregation: one learned query per cell of a frame's grid gathers the features of both towers.

Paper: LongVU (arXiv 2410.17434), Sec. 3.1; the aggregator is that of Cambrian-1 (arXiv 2406.16860), Sec. 3.1.
Original read: Vision-CAIR/LongVU, `vision_sampler.py` and `cambrian_arch.py` (Apache-2.0).
Deviations: all frames in one batch; keys and values are projected on the grid, before it is cut into blocks, and the
context once per frame. Values and gradients are those of one query at a time.

Shapes: F frames, G side of the towers' common grid, n side of the query grid, r = G / n, Q = n * n queries,
E width of the connector, H heads, D width of the language model, V visual tokens of a frame.
"""

import torch
from torch import nn
from torch.nn import functional as F

from longvideo.modeling.longvu.configuration_longvu import LongVUConfig

NUM_TOWERS = 2
NORM_EPS = 1e-5
# Some CUDA attention kernels refuse more than 65,535 rows; a frame has 144 or 576 here.
MAX_ATTENTION_ROWS = 32768


def padding_of_grid(width: int, height: int, side: int) -> tuple[int, int]:
    """Gives how many rows and columns at each edge of a square grid show only the padding of a frame.

    Args:
        width: width of the frame before it was padded to a square, any unit.
        height: height of the frame, same unit.
        side: rows (and columns) of the grid.

    Returns:
        Rows at the top and again at the bottom, columns at the left and again at the right; one of them is 0.

    Raises:
        ValueError: a size that is not positive.

    Source: `cambrian_arch.py`, `unpad_image` and `unmask_attention_mask`.
    Differs: not from the original, whose rounding is kept: the short side is cut down to whole cells, in floating
    point (23.999... gives 23), and an odd rest stays in the grid.
    """
    if width < 1 or height < 1:
        raise ValueError(f"The size of a frame must be positive, got width {width} and height {height}.")
    if width / height > 1:
        return (side - int(height * (side / width))) // 2, 0
    return 0, (side - int(width * (side / height))) // 2


def grid_padding_mask(width: int, height: int, grid: int) -> torch.Tensor:
    """Marks the cells of the towers' grid that show a part of the frame.

    Args:
        width: width of the frame before padding.
        height: height of the frame, same unit.
        grid: side G of the grid.

    Returns:
        (G, G) bool, False on padding; all False for a frame so flat that it fills no row.

    Raises:
        ValueError: a size that is not positive.
    """
    rows, columns = padding_of_grid(width, height, grid)
    mask_GG = torch.zeros(grid, grid, dtype=torch.bool)
    mask_GG[rows : grid - rows, columns : grid - columns] = True
    return mask_GG


def block_mask(mask_FGG: torch.Tensor, side: int) -> torch.Tensor:
    """Cuts a mask on the towers' grid into the blocks that the queries see.

    Args:
        mask_FGG: (F, G, G) bool, True where a key may be attended.
        side: side n of the query grid.

    Returns:
        (F, Q, r * r) bool, row-major in and over the blocks. A block that holds nothing but padding is all True,
        because a query without keys has no answer.

    Source: `cambrian_arch.py`, `rearrange_vision_tower_features_inference`.
    """
    frames, grid = mask_FGG.shape[:2]
    cut = grid // side
    blocks = mask_FGG.view(frames, side, cut, side, cut).transpose(2, 3).reshape(frames, side * side, cut * cut)
    return blocks | ~blocks.any(-1, keepdim=True)


def crop_slices(width: int, height: int, side: int) -> tuple[slice, slice]:
    """Gives the rows and columns of a frame's grid that are left without padding.

    Args:
        width: width of the frame before padding.
        height: height of the frame, same unit.
        side: side n of the grid.

    Returns:
        Rows and columns; the whole grid where nothing would be left.

    Raises:
        ValueError: a size that is not positive.
    """
    rows, columns = padding_of_grid(width, height, side)
    if 2 * rows >= side or 2 * columns >= side:
        rows = columns = 0
    return slice(rows, side - rows), slice(columns, side - columns)


def low_grid_size(width: int, height: int, *, full_side: int, low_side: int) -> tuple[int, int]:
    """Gives the frame size by which the low-resolution grid is cropped.

    Args:
        width: width of the frame before padding.
        height: height of the frame, same unit.
        full_side: side of the full grid.
        low_side: side of the low-resolution grid.

    Returns:
        Width and height, shrunk as the grid is and cut to whole numbers, at least 1.

    Source: `cambrian_arch.py`, `prepare_inputs_labels_for_multimodal`.
    """
    shrink = full_side / low_side
    return max(int(width / shrink), 1), max(int(height / shrink), 1)


def crop_grid(tokens_FnnD: torch.Tensor, width: int, height: int) -> torch.Tensor:
    """Cuts the padding off the grids of frames of one size.

    Args:
        tokens_FnnD: (F, n, n, D).
        width: width of the frames before padding.
        height: height of the frames, same unit.

    Returns:
        (F, rows, columns, D), a view.

    Raises:
        ValueError: a size that is not positive.
    """
    rows, columns = crop_slices(width, height, tokens_FnnD.shape[1])
    return tokens_FnnD[:, rows, columns]


def add_newlines(tokens_FrcD: torch.Tensor, newline_D: torch.Tensor | None) -> torch.Tensor:
    """Ends every row with the newline token and flattens the grids row by row.

    Args:
        tokens_FrcD: (F, rows, columns, D).
        newline_D: (D,) the learned token; None adds none.

    Returns:
        (F, V, D) with V = rows * (columns + 1), or rows * columns without newlines.
    """
    if newline_D is not None:
        newlines = newline_D.to(tokens_FrcD).expand(*tokens_FrcD.shape[:2], 1, -1)
        tokens_FrcD = torch.cat([tokens_FrcD, newlines], dim=2)
    return tokens_FrcD.flatten(1, 2)


def token_grid_index(width: int, height: int, side: int, *, newline: bool = True) -> torch.Tensor:
    """Says where each token of a frame that was cropped and given newlines lies in the uncropped grid.

    Args:
        width: width of the frame before padding (for the low grid: of `low_grid_size`).
        height: height of the frame, same unit.
        side: side n of the grid.
        newline: whether rows end with a newline token.

    Returns:
        (V,) int64, row-major position in the n x n grid, -1 for newline tokens. Its length is the number of tokens
        that the frame takes.

    Raises:
        ValueError: a size that is not positive.
    """
    positions = torch.arange(side * side).view(1, side, side, 1)
    return add_newlines(crop_grid(positions, width, height), torch.tensor([-1]) if newline else None)[0, :, 0]


def resize_grid(tokens_FQE: torch.Tensor, side: int) -> torch.Tensor:
    """Resamples square grids bilinearly, in float32, without smoothing before.

    Args:
        tokens_FQE: (F, Q, E) row-major tokens of a square grid.
        side: wanted side.

    Returns:
        (F, side * side, E) in the type of the input; the input itself where it has that side.

    Raises:
        ValueError: Q is not a square number.
    """
    old = round(tokens_FQE.shape[1] ** 0.5)
    if old * old != tokens_FQE.shape[1]:
        raise ValueError(f"A square grid was expected, got {tokens_FQE.shape[1]} tokens per frame.")
    if old == side:
        return tokens_FQE
    grid = tokens_FQE.transpose(1, 2).unflatten(2, (old, old)).float()
    grid = F.interpolate(grid, size=(side, side), mode="bilinear", align_corners=False)
    return grid.flatten(2).transpose(1, 2).to(tokens_FQE.dtype)


class LongVUSamplerAttention(nn.Module):
    """Lets each query attend to its own block of every tower's grid.

    Args:
        config: LongVU configuration.
    """

    def __init__(self, config: LongVUConfig):
        super().__init__()
        width = config.vision_hidden_size
        self.num_heads = config.connector_num_heads
        self.side = config.grid_size
        self.cut = config.vision_grid_size // config.grid_size
        for name in ("q_proj", *(f"{kind}_proj_{t}" for t in range(NUM_TOWERS) for kind in "kv")):
            projection = nn.Sequential(nn.LayerNorm(width, eps=NORM_EPS), nn.Linear(width, width, bias=False))
            setattr(self, name, projection)
        self.o_proj = nn.Linear(width, width, bias=False)

    def _cut_blocks(self, tokens: torch.Tensor) -> torch.Tensor:
        frames, side, cut = tokens.shape[0], self.side, self.cut
        blocks = tokens.view(frames, side, cut, side, cut, self.num_heads, -1).permute(0, 1, 3, 5, 2, 4, 6)
        return blocks.reshape(frames * side * side, self.num_heads, cut * cut, -1)  # (F * Q, H, r * r, E / H)

    def forward(self, query: torch.Tensor, keys: list[torch.Tensor], mask: torch.Tensor | None) -> torch.Tensor:
        """Attends.

        Args:
            query: (F, Q, E), or (F, 1, E) where all queries of a frame are equal.
            keys: per tower (F, G * G, E) features with their positions, on the grid.
            mask: (F or 1, Q, r * r) bool, the same for every tower; None attends to everything.

        Returns:
            (F, Q, E).
        """
        frames, num_queries = query.shape[0], self.side**2
        q = self.q_proj(query).expand(-1, num_queries, -1)
        q = q.unflatten(-1, (self.num_heads, -1)).flatten(0, 1)[:, :, None]  # (F * Q, H, 1, E / H)
        k = torch.cat([self._cut_blocks(getattr(self, f"k_proj_{t}")(key)) for t, key in enumerate(keys)], dim=2)
        v = torch.cat([self._cut_blocks(getattr(self, f"v_proj_{t}")(key)) for t, key in enumerate(keys)], dim=2)
        if mask is None:
            masks = [None] * len(q)
        else:
            mask = mask.repeat(1, 1, len(keys)).expand(frames, -1, -1).flatten(0, 1)[:, None, None]
            masks = mask.split(MAX_ATTENTION_ROWS)
        pieces = zip(*(x.split(MAX_ATTENTION_ROWS) for x in (q, k, v)), masks, strict=False)
        attended = torch.cat([F.scaled_dot_product_attention(*piece) for piece in pieces])
        return self.o_proj(attended.reshape(frames, num_queries, -1))


class LongVUSamplerMLP(nn.Module):
    """Two bias-free linear maps with an exact GELU between.

    Args:
        width: E, in and out.
    """

    def __init__(self, width: int):
        super().__init__()
        self.linear_1 = nn.Linear(width, width, bias=False)
        self.linear_2 = nn.Linear(width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps (..., E) to (..., E)."""
        return self.linear_2(F.gelu(self.linear_1(x)))


class LongVUSamplerLayer(nn.Module):
    """One round of aggregation.

    Args:
        config: LongVU configuration.

    Source: `vision_sampler.py`, `VisionCrossAttentionLayer`. The residual is the layer's input, not the projected
    query that attends.
    """

    def __init__(self, config: LongVUConfig):
        super().__init__()
        width = config.vision_hidden_size
        self.side = config.grid_size
        cut = config.vision_grid_size // config.grid_size
        self.proj_context = nn.Linear(width, width, bias=False)
        self.proj_in = nn.Linear(2 * width, width, bias=False)
        self.proj_out = LongVUSamplerMLP(width)
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.cross_attn = LongVUSamplerAttention(config)
        for t in range(NUM_TOWERS if cut > 1 else 0):
            setattr(self, f"pos_embed_{t}", nn.Parameter(torch.randn(cut * cut, width)))
        self.cut = cut

    def _add_positions(self, features: torch.Tensor, t: int) -> torch.Tensor:
        if self.cut == 1:
            return features
        position = getattr(self, f"pos_embed_{t}").unflatten(0, (self.cut, self.cut))
        return features + position.repeat(self.side, self.side, 1).flatten(0, 1)

    def forward(
        self, query: torch.Tensor, context: torch.Tensor, features: list[torch.Tensor], mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Runs the layer.

        Args:
            query: (F or 1, Q or 1, E).
            context: (F, 1, E) mean feature of each frame.
            features: per tower (F, G * G, E).
            mask: (F or 1, Q, r * r) bool or None.

        Returns:
            (F, Q, E).
        """
        context = self.proj_context(context)
        shape = (context.shape[0], query.shape[1], -1)
        hidden = self.proj_in(torch.cat([query.expand(shape), context.expand(shape)], dim=-1))
        keys = [self._add_positions(tower, t) for t, tower in enumerate(features)]
        hidden = self.norm(hidden + self.cross_attn(hidden, keys, mask))
        return self.proj_out(hidden) + query


class LongVUVisionTokenSampler(nn.Module):
    """Spatial vision aggregator: turns the features of both towers into one token per cell of the query grid.

    Args:
        config: LongVU configuration.

    Source: LongVU Sec. 3.1; `vision_sampler.py`, `VisionTokenSampler` with joint aggregation.
    """

    def __init__(self, config: LongVUConfig):
        super().__init__()
        self.num_queries = config.image_token_len
        self.grid = config.vision_grid_size
        self.side = config.grid_size
        self.layers = nn.ModuleList(LongVUSamplerLayer(config) for _ in range(config.connector_depth))

    def forward(
        self, query: torch.Tensor, features: list[torch.Tensor], mask_FGG: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Aggregates the frames.

        Args:
            query: (E,) or (1, E) learned query that all cells share, or (Q, E) with one for each cell.
            features: projected features of SigLIP and DINOv2, each (F, G * G, E), row-major on the grid.
            mask_FGG: (F, G, G), or (1, G, G) for frames of one size: bool, False on padding; None masks nothing.

        Returns:
            (F, Q, E).

        Raises:
            ValueError: shapes that do not fit the configuration or each other.
        """
        query = query.view(1, -1, query.shape[-1])
        self._check(query, features, mask_FGG)
        context = features[0].mean(1, keepdim=True)
        mask = None if mask_FGG is None else block_mask(mask_FGG.bool(), self.side)
        for layer in self.layers:
            query = layer(query, context, features, mask)
        return query

    def _check(self, query: torch.Tensor, features: list[torch.Tensor], mask_FGG: torch.Tensor | None) -> None:
        if query.shape[1] not in (1, self.num_queries):
            raise ValueError(f"Expected 1 or {self.num_queries} queries, got {query.shape[1]}.")
        wanted = (features[0].shape[0], self.grid**2, query.shape[-1])
        if len(features) != NUM_TOWERS or any(tower.shape != wanted for tower in features):
            raise ValueError(
                f"The features of {NUM_TOWERS} towers must have the shape {wanted} each, got "
                f"{[tuple(tower.shape) for tower in features]}. Resample them to the grid of side {self.grid} first."
            )
        if mask_FGG is not None and (
            mask_FGG.shape[0] not in (1, wanted[0]) or mask_FGG.shape[1:] != (self.grid, self.grid)
        ):
            raise ValueError(
                f"The mask must have the shape {(wanted[0], self.grid, self.grid)}, got {tuple(mask_FGG.shape)}."
            )
