"""Spatial-Temporal Packer of LLaVA-ST with unfolded regions and torch's own multi-head attention."""

import math

import torch
from torch import nn
from torch.nn import functional as F


def _mlp(state: dict[str, torch.Tensor], name: str, x: torch.Tensor) -> torch.Tensor:
    """Linear, exact GELU, linear, layer norm."""
    x = F.linear(x, state[f"to_{name}.0.weight"], state[f"to_{name}.0.bias"])
    x = F.linear(F.gelu(x), state[f"to_{name}.2.weight"], state[f"to_{name}.2.bias"])
    return F.layer_norm(x, x.shape[-1:], state[f"ln_{name}.weight"], state[f"ln_{name}.bias"], 1e-5)


def _attend(state: dict[str, torch.Tensor], point: torch.Tensor, region: torch.Tensor, heads: int) -> torch.Tensor:
    """Packs regions (R, n, D) around points (R, D)."""
    weights = {name.removeprefix("attn."): x for name, x in state.items() if name.startswith("attn.")}
    width = weights["out_proj.bias"].shape[0]
    attention = nn.MultiheadAttention(width, heads, batch_first=True, dtype=point.dtype)
    inputs = (_mlp(state, "q", point[:, None]), _mlp(state, "k", region), _mlp(state, "v", region))
    attended = torch.func.functional_call(attention, weights, inputs)[0][:, 0]
    return point + attended @ state["to_out.weight"].T


def naive_pack_space(
    state: dict[str, torch.Tensor], x: torch.Tensor, factor: int, heads: int, query: str = "center"
) -> torch.Tensor:
    """Equations 6 and 7, frame by frame.

    Args:
        state: parameters of a layer by name.
        x: (F, P, D).
        factor: side of a region.
        heads: attention heads.
        query: "center" (bilinear resize) or "average".

    Returns:
        (F, Q, D).
    """
    grid = math.isqrt(x.shape[1])
    frames = []
    for frame in x:
        image = frame.T.view(1, -1, grid, grid)
        unfolded = F.unfold(image, factor, stride=factor)[0]  # (D * n, Q)
        region = unfolded.view(x.shape[2], factor * factor, -1).permute(2, 1, 0)
        if query == "average":
            point = region.mean(1)
        else:
            point = F.interpolate(image, size=(grid // factor,) * 2, mode="bilinear", align_corners=False)
            point = point[0].flatten(1).T
        frames.append(_attend(state, point, region, heads))
    return torch.stack(frames)


def naive_pack_time(
    state: dict[str, torch.Tensor], x: torch.Tensor, factor: int, heads: int, query: str = "center"
) -> torch.Tensor:
    """Equation 8, patch by patch.

    Args:
        state: parameters of a layer by name.
        x: (F, P, D).
        factor: frames of a region.
        heads: attention heads.
        query: "center" (linear resize) or "average".

    Returns:
        (F / factor, P, D).
    """
    patches = []
    for p in range(x.shape[1]):
        series = x[:, p]
        region = torch.stack([series[i : i + factor] for i in range(0, len(series), factor)])
        if query == "average":
            point = region.mean(1)
        else:
            point = F.interpolate(series.T[None], size=len(region), mode="linear", align_corners=False)[0].T
        patches.append(_attend(state, point, region, heads))
    return torch.stack(patches, dim=1)


def naive_packer(
    state: dict[str, torch.Tensor],
    x: torch.Tensor,
    *,
    spatial_factor: int,
    temporal_factor: int,
    heads: int,
    query: str = "center",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both streams.

    Args:
        state: parameters of a packer by name.
        x: (F, P, D).
        spatial_factor: side of a spatial region.
        temporal_factor: frames of a temporal region.
        heads: attention heads.
        query: "center" or "average".

    Returns:
        Fast and slow stream.
    """
    parts = {}
    for name, value in state.items():
        part, key = name.split(".", 1)
        parts.setdefault(part, {})[key] = value
    reduced = naive_pack_space(parts["spatial"], x, spatial_factor, heads, query)
    fast = naive_pack_space(parts["fast"], reduced, spatial_factor, heads, query)
    return fast, naive_pack_time(parts["temporal"], reduced, temporal_factor, heads, query)
