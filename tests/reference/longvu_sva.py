"""Spatial vision aggregation of LongVU one frame, query, head and key at a time."""

import math

import torch
from torch.nn import functional as F


def naive_padding(width: int, height: int, side: int) -> list[list[bool]]:
    """Marks the cells that show a part of the frame, cell by cell.

    Args:
        width: width of the frame.
        height: height of the frame.
        side: side of the grid.

    Returns:
        Rows of bools.
    """
    wide = width / height > 1
    scale = side / width if wide else side / height
    length = int((height if wide else width) * scale)
    edge = (side - length) // 2
    cells = []
    for y in range(side):
        across = [y if wide else x for x in range(side)]
        cells.append([edge <= place < side - edge for place in across])
    return cells


def _block(grid: torch.Tensor, i: int, j: int, cut: int) -> torch.Tensor:
    """(r * r, E) tokens of the block that query (i, j) sees."""
    return torch.stack([grid[i * cut + a, j * cut + b] for a in range(cut) for b in range(cut)])


def _map(weights: dict[str, torch.Tensor], name: str, x: torch.Tensor) -> torch.Tensor:
    """Layer norm, then a linear map."""
    normed = F.layer_norm(x, x.shape[-1:], weights[f"{name}.0.weight"], weights[f"{name}.0.bias"], 1e-5)
    return normed @ weights[f"{name}.1.weight"].T


def _attend(
    weights: dict[str, torch.Tensor], query: torch.Tensor, blocks: list[torch.Tensor], seen: list[bool], heads: int
) -> torch.Tensor:
    q = _map(weights, "cross_attn.q_proj", query)
    keys = torch.cat([_map(weights, f"cross_attn.k_proj_{t}", block) for t, block in enumerate(blocks)])
    values = torch.cat([_map(weights, f"cross_attn.v_proj_{t}", block) for t, block in enumerate(blocks)])
    size = len(q) // heads
    parts = []
    for h in range(heads):
        own = slice(h * size, (h + 1) * size)
        scores = [q[own] @ key[own] / math.sqrt(size) for key in keys]
        exponentials = [score.exp() if visible else score * 0 for score, visible in zip(scores, seen, strict=True)]
        total = sum(exponentials)
        parts.append(sum(e / total * value[own] for e, value in zip(exponentials, values, strict=True)))
    return torch.cat(parts) @ weights["cross_attn.o_proj.weight"].T


def naive_sampler(
    state: dict[str, torch.Tensor],
    queries: torch.Tensor,
    features: list[torch.Tensor],
    masks: list[list[list[bool]]],
    heads: int,
) -> torch.Tensor:
    """Aggregates with loops.

    Args:
        state: parameters of a `LongVUVisionTokenSampler` by name.
        queries: (Q, E), one query for each cell.
        features: per tower (F, G * G, E).
        masks: per frame G rows of G bools.
        heads: attention heads.

    Returns:
        (F, Q, E).
    """
    depth = 1 + max(int(name.split(".")[1]) for name in state)
    side, grid = math.isqrt(len(queries)), math.isqrt(features[0].shape[1])
    cut = grid // side
    frames = []
    for f, mask in enumerate(masks):
        context = sum(features[0][f]) / grid**2
        outputs = []
        for i in range(side):
            for j in range(side):
                seen = [mask[i * cut + a][j * cut + b] for a in range(cut) for b in range(cut)]
                seen = (seen if any(seen) else [True] * len(seen)) * len(features)
                state_of_query = queries[i * side + j]
                for n in range(depth):
                    start = f"layers.{n}."
                    weights = {k.removeprefix(start): v for k, v in state.items() if k.startswith(start)}
                    blocks = [_block(tower[f].view(grid, grid, -1), i, j, cut) for tower in features]
                    if cut > 1:
                        blocks = [block + weights[f"pos_embed_{t}"] for t, block in enumerate(blocks)]
                    joined = torch.cat([state_of_query, context @ weights["proj_context.weight"].T])
                    x = joined @ weights["proj_in.weight"].T
                    x = x + _attend(weights, x, blocks, seen, heads)
                    x = F.layer_norm(x, x.shape, weights["norm.weight"], weights["norm.bias"], 1e-5)
                    x = F.gelu(x @ weights["proj_out.linear_1.weight"].T) @ weights["proj_out.linear_2.weight"].T
                    state_of_query = x + state_of_query
                outputs.append(state_of_query)
        frames.append(torch.stack(outputs))
    return torch.stack(frames)


def naive_grid_tokens(width: int, height: int, side: int, newline: bool = True) -> list[int]:
    """Positions of a frame's tokens in its uncropped grid, -1 for newlines, in sequence order.

    Args:
        width: width of the frame.
        height: height of the frame.
        side: side of the grid.
        newline: whether rows end with a newline.

    Returns:
        One number per token.
    """
    cells = naive_padding(width, height, side)
    if not any(any(row) for row in cells):
        cells = [[True] * side for _ in range(side)]
    tokens = []
    for y, row in enumerate(cells):
        if any(row):
            tokens += [y * side + x for x, inside in enumerate(row) if inside] + [-1] * newline
    return tokens


def naive_resize(tokens_QE: torch.Tensor, side: int) -> torch.Tensor:
    """Bilinear resampling of one square grid, pixel by pixel.

    Args:
        tokens_QE: (Q, E) row-major.
        side: wanted side.

    Returns:
        (side * side, E).
    """
    old = math.isqrt(len(tokens_QE))
    grid = tokens_QE.view(old, old, -1)

    def places(target: int) -> tuple[int, int, float]:
        x = max((target + 0.5) * old / side - 0.5, 0.0)
        low = min(int(x), old - 1)
        return low, min(low + 1, old - 1), x - low

    result = []
    for y in range(side):
        y0, y1, dy = places(y)
        for x in range(side):
            x0, x1, dx = places(x)
            top = grid[y0, x0] * (1 - dx) + grid[y0, x1] * dx
            bottom = grid[y1, x0] * (1 - dx) + grid[y1, x1] * dx
            result.append(top * (1 - dy) + bottom * dy)
    return torch.stack(result)
