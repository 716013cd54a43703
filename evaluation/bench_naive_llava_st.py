"""A packer of LLaVA-ST as one would write it first: `unfold` cuts the whole video, `nn.MultiheadAttention` attends.

The benchmark measures the package's packers against this; a test compares their results.

Source: LLaVA-ST (arXiv 2501.08282), Sec. 3.3, Eqs. 6-8; `token_packer.py` of appletea233/LLaVA-ST.

Shapes: F frames, P = G * G patches of a frame, Q regions of a frame, n keys of a region, D width of the language
model, E width of the attention, C any width.
"""

import torch
from torch import nn
from torch.nn import functional as F


class NaivePacker(nn.Module):
    """Does what a `LlavaSTPackerLayer` does, with its weights.

    Args:
        layer: the packer.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        width = layer.attn.out_proj.in_features
        self.attn = nn.MultiheadAttention(width, layer.attn.num_heads, batch_first=True)
        self.attn.load_state_dict(layer.attn.state_dict())
        self.attn.to(layer.to_out.weight.device)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Packs.

        Args:
            features: (F, P, D), patches row-major.

        Returns:
            (F, Q, D) of a spatial packer, (F / temporal_factor, P, D) of a temporal one.
        """
        layer = self.layer
        cut, resize = (cut_time, resize_time) if layer.temporal_factor > 1 else (cut_squares, resize_grid)
        factor = max(layer.temporal_factor, layer.spatial_factor)
        point = resize(features, factor)
        query = layer.ln_q(layer.to_q(point)).flatten(0, 1)[:, None]  # (regions, 1, E)
        key = cut(layer.ln_k(layer.to_k(features)), factor)
        value = cut(layer.ln_v(layer.to_v(features)), factor)
        attended, _ = self.attn(query, key, value)
        return point + layer.to_out(attended[:, 0]).unflatten(0, point.shape[:2])


def _as_grid(features_FPC: torch.Tensor) -> torch.Tensor:
    side = round(features_FPC.shape[1] ** 0.5)
    return features_FPC.transpose(1, 2).unflatten(2, (side, side))  # (F, C, G, G)


def resize_grid(features_FPC: torch.Tensor, factor: int) -> torch.Tensor:
    """Resize the grid of every frame, bilinearly: (F, P, C) to (F, Q, C)."""
    grid = _as_grid(features_FPC).float()
    small = F.interpolate(grid, size=grid.shape[-1] // factor, mode="bilinear", align_corners=False)
    return small.flatten(2).transpose(1, 2).to(features_FPC.dtype)


def resize_time(features_FPC: torch.Tensor, factor: int) -> torch.Tensor:
    """Resize the frames of every patch, linearly: (F, P, C) to (F / factor, P, C)."""
    frames = features_FPC.permute(1, 2, 0).float()
    few = F.interpolate(frames, size=frames.shape[-1] // factor, mode="linear", align_corners=False)
    return few.permute(2, 0, 1).to(features_FPC.dtype)


def cut_squares(features_FPC: torch.Tensor, factor: int) -> torch.Tensor:
    """Unfold every frame into squares: (F, P, C) to (F * Q, n, C)."""
    columns = F.unfold(_as_grid(features_FPC), factor, stride=factor)  # (F, C * n, Q)
    regions = columns.unflatten(1, (features_FPC.shape[-1], factor * factor))
    return regions.permute(0, 3, 2, 1).flatten(0, 1)


def cut_time(features_FPC: torch.Tensor, factor: int) -> torch.Tensor:
    """Unfold every patch into groups of frames: (F, P, C) to (F / factor * P, n, C)."""
    groups = features_FPC.unfold(0, factor, factor)  # (F / factor, P, C, n)
    return groups.transpose(2, 3).flatten(0, 1)
