"""The stages of LongVU behind the towers as one would write them first: one frame, one cell, one token at a time.

The benchmark measures the package's stages against these loops; a test compares their results.

Source: LongVU (arXiv 2410.17434), Sec. 3.1 to 3.3, Eq. 1 and 2.

Shapes: F frames, N values of a frame's features, T kept frames, G side of the towers' grid, Q queries, E width of the
connector, V tokens of a frame, L text tokens, D width of the language model, S positions.
"""

import torch
from torch import nn
from torch.nn import functional as F


def reduce_frames(features_FN: torch.Tensor, *, window: int, threshold: float) -> list[int]:
    """Keep frames whose mean cosine with the frames of their window is below a threshold, and each middle frame.

    Args:
        features_FN: (F, N) features.
        window: Frames per window.
        threshold: Kept below.

    Returns:
        Indices of the kept frames.
    """
    kept = []
    for start in range(0, len(features_FN), window):
        frames = features_FN[start : start + window].float()
        for i, frame in enumerate(frames):
            total = sum(float(F.cosine_similarity(frame, other, dim=0)) for other in frames)
            if total / len(frames) < threshold or i == len(frames) // 2:
                kept.append(start + i)
    return kept


def sample_frames(sampler: nn.Module, query_E: torch.Tensor, features: list[torch.Tensor]) -> torch.Tensor:
    """Aggregate both towers' grids, cell by cell; keys and context are projected for each query.

    Args:
        sampler: `LongVUVisionTokenSampler`.
        query_E: The learned query.
        features: Per tower (T, G * G, E) projected features.

    Returns:
        (T, Q, E).
    """
    side, cut = sampler.side, sampler.grid // sampler.side
    frames = []
    for grids in zip(*(tower.unflatten(1, (sampler.grid, sampler.grid)) for tower in features), strict=True):
        context = grids[0].flatten(0, 1).mean(0)
        cells = []
        for i in range(side):
            for j in range(side):
                area = slice(i * cut, (i + 1) * cut), slice(j * cut, (j + 1) * cut)
                blocks = [grid[area].flatten(0, 1) for grid in grids]  # (r * r, E) each
                query = query_E
                for layer in sampler.layers:
                    query = _sample_cell(layer, query, context, blocks)
                cells.append(query)
        frames.append(torch.stack(cells))
    return torch.stack(frames)


def _sample_cell(
    layer: nn.Module, query_E: torch.Tensor, context_E: torch.Tensor, blocks: list[torch.Tensor]
) -> torch.Tensor:
    attention = layer.cross_attn
    hidden = layer.proj_in(torch.cat([query_E, layer.proj_context(context_E)]))
    if layer.cut > 1:
        blocks = [block + getattr(layer, f"pos_embed_{t}") for t, block in enumerate(blocks)]
    keys = torch.cat([getattr(attention, f"k_proj_{t}")(block) for t, block in enumerate(blocks)])
    values = torch.cat([getattr(attention, f"v_proj_{t}")(block) for t, block in enumerate(blocks)])
    heads = [x.unflatten(-1, (attention.num_heads, -1)).transpose(0, 1) for x in (keys, values)]
    asked = attention.q_proj(hidden).unflatten(-1, (attention.num_heads, -1))[:, None]  # (H, 1, E / H)
    weights = (asked @ heads[0].transpose(1, 2) / asked.shape[-1] ** 0.5).softmax(-1)
    hidden = layer.norm(hidden + attention.o_proj((weights @ heads[1]).flatten()))
    return layer.proj_out(hidden) + query_E


def render_frame(project: nn.Module, newline_D: torch.Tensor, frame_QE: torch.Tensor, side: int) -> torch.Tensor:
    """Bring one square frame to a grid and end its rows, row by row.

    Args:
        project: Projector to the language model's width.
        newline_D: Token that ends a row.
        frame_QE: (Q, E) one aggregated frame.
        side: Side of the wanted grid.

    Returns:
        (V, D).
    """
    old = round(len(frame_QE) ** 0.5)
    grid = frame_QE.T.unflatten(1, (old, old))[None].float()
    if side != old:
        grid = F.interpolate(grid, size=(side, side), mode="bilinear", align_corners=False)
    rows = project(grid[0].to(frame_QE.dtype).permute(1, 2, 0))
    return torch.cat([torch.cat([row, newline_D[None]]) for row in rows])


def select_grids(
    project: nn.Module,
    newline_D: torch.Tensor,
    frames_TQE: torch.Tensor,
    text_LD: torch.Tensor,
    *,
    sides: tuple[int, int],
    budget: int,
) -> torch.Tensor:
    """Render all frames at the low grid and raise those that fit the question best as long as there is room.

    Args:
        project: Projector to the language model's width.
        newline_D: Token that ends a row.
        frames_TQE: (T, Q, E) aggregated frames.
        text_LD: (L, D) embeddings of the question.
        sides: Sides of the full and of the low grid.
        budget: Positions for visual tokens.

    Returns:
        (V, D) tokens of all frames.
    """
    low = [render_frame(project, newline_D, frame, sides[1]) for frame in frames_TQE]
    scores = [float(torch.stack([(token * text_LD).sum(-1).mean() for token in frame]).mean()) for frame in low]
    sizes = [side * (side + 1) for side in sides]
    num_full = min(len(low), (budget - len(low) * sizes[1]) // (sizes[0] - sizes[1]))
    best = sorted(range(len(low)), key=lambda i: -scores[i])[:num_full]
    raised = {i: render_frame(project, newline_D, frames_TQE[i], sides[0]) for i in best}
    return torch.cat([raised.get(i, frame) for i, frame in enumerate(low)])


def compress_tokens(tokens_TVD: torch.Tensor, *, window: int, threshold: float) -> torch.Tensor:
    """Drop tokens that are much like the token at their place in the first frame of their window.

    Args:
        tokens_TVD: (T, V, D).
        window: Frames per window.
        threshold: Kept below.

    Returns:
        (T, V) bool, True for kept tokens.
    """
    keep = torch.ones(tokens_TVD.shape[:2], dtype=torch.bool)
    for i, frame in enumerate(tokens_TVD):
        anchor = tokens_TVD[i // window * window]
        if i % window:
            for place, token in enumerate(frame):
                keep[i, place] = bool(F.cosine_similarity(token, anchor[place], dim=0) < threshold)
    return keep


def insert_tokens(embeds_SD: torch.Tensor, place: int, tokens_VD: torch.Tensor) -> torch.Tensor:
    """Put visual tokens in place of a placeholder, position by position.

    Args:
        embeds_SD: (S, D) embedded prompt.
        place: Position of the placeholder.
        tokens_VD: (V, D).

    Returns:
        (S - 1 + V, D).
    """
    row = [embeds_SD[i] for i in range(place)]
    row += [token for token in tokens_VD]  # noqa: C416 - one after the other
    row += [embeds_SD[i] for i in range(place + 1, len(embeds_SD))]
    return torch.stack(row)
