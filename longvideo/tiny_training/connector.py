"""Prepares what joins towers and decoder, before the decoder learns to read it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
)

from longvideo.modeling.crosslmm.modeling_crosslmm import CrossLMMForConditionalGeneration
from longvideo.modeling.crosslmm.vision_crosslmm import merge_grid
from longvideo.modeling.longvu.modeling_longvu import LongVUForConditionalGeneration


@dataclass(frozen=True)
class GridConfig:
    """What a lesson must know of a module that gives one feature for every cell of a grid.

    Args:
        hidden_size: width of the features.
        image_size: side of the frames in pixels.
        patch_size: side of a cell in pixels.
    """

    hidden_size: int
    image_size: int
    patch_size: int


class LongVUConnector(nn.Module):
    """The part of LongVU between its frozen towers and its decoder, as a module that can be taught like a tower.

    Args:
        model: model that holds the parts; they are shared, not copied.
    """

    def __init__(self, model: LongVUForConditionalGeneration):
        super().__init__()
        inner, config = model.model, model.config
        self.projectors, self.sampler, self.projector = (
            inner.vision_projectors,
            inner.vision_sampler,
            inner.multi_modal_projector,
        )
        self.query = inner.vision_query
        size = config.vision_config.image_size
        self.config = GridConfig(config.text_config.hidden_size, size, size // round(config.image_token_len**0.5))
        # In a tuple, so that the towers' weights are none of its own.
        self._owner = (inner,)

    def encode(self, clips: torch.Tensor) -> torch.Tensor:
        """Encodes clips frame by frame.

        Args:
            clips: (B, F, 3, height, width) frames, normalised for SigLIP.

        Returns:
            (B, F * Q, D) features of the cells.
        """
        (inner,) = self._owner
        with torch.no_grad():
            siglip, _ = inner._siglip_grid(clips.flatten(0, 1))
            dino = inner._dino_grid(dino_pixels(clips.flatten(0, 1)))
        sizes = [clips.shape[:-3:-1]] * len(siglip)
        cells = self.projector(inner._aggregate(siglip, dino, sizes))  # (B * F, Q, D)
        return cells.unflatten(0, clips.shape[:2]).flatten(1, 2)


class CrossLMMConnector(nn.Module):
    """The projector of CrossLMM behind its frozen tower, as a module that can be taught like a tower.

    Args:
        model: model that holds the parts; they are shared, not copied.
    """

    def __init__(self, model: CrossLMMForConditionalGeneration):
        super().__init__()
        self.projector = model.model.multi_modal_projector
        config = model.config
        size, self.side, self.mode = config.vision_config.image_size, config.merged_grid_size, config.merge_mode
        self.config = GridConfig(config.text_config.hidden_size, size, size // self.side)
        # In a tuple, so that the tower's weights are none of its own.
        self._tower = (model.model.vision_tower,)

    def encode(self, clips: torch.Tensor) -> torch.Tensor:
        """Encodes clips frame by frame.

        Args:
            clips: (B, F, 3, height, width) normalised frames, or (F, 3, height, width) those of one clip.

        Returns:
            (B, F * R, D) features of the cells; of one clip with B = 1.
        """
        if clips.ndim == 4:
            clips = clips[None]
        (tower,) = self._tower
        with torch.no_grad():
            tokens = tower(clips.flatten(0, 1)).last_hidden_state
        cells = self.projector(merge_grid(tokens, self.side, self.mode))  # (B * F, R, D)
        return cells.unflatten(0, clips.shape[:2]).flatten(1, 2)


def dino_pixels(frames: torch.Tensor) -> torch.Tensor:
    """Normalises for DINOv2 what was normalised for SigLIP; both (n, 3, height, width)."""
    mean, std, dino_mean, dino_std = (
        torch.tensor(values).view(3, 1, 1)
        for values in (IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    )
    return (frames * std + mean - dino_mean) / dino_std


@torch.no_grad()
def calibrate(layer: nn.Linear, run: Callable[[], object], *, length: float, floor: float = 0.03) -> None:
    """Makes what a linear layer gives vary around zero, by as much as asked and about equally in all directions.

    A decoder finds a thing by what it looks for only where that makes up a good part of a feature. Straight from the
    lessons whole frames of letters differ most, then colours; shapes hardly show, and would be found last or never.

    Args:
        layer: last layer of the connector, with a bias; changed in place.
        run: runs the model on some inputs.
        length: root of the mean square distance of a feature from the mean, afterwards.
        floor: variance, as a part of the mean one, below which a direction is not enlarged: it holds noise.
    """
    seen: list[torch.Tensor] = []
    handle = layer.register_forward_hook(lambda module, inputs, output: seen.append(output.flatten(0, -2).double()))
    try:
        run()
    finally:
        handle.remove()
    features = torch.cat(seen)
    mean = features.mean(0)
    distances = features - mean
    variances, directions = torch.linalg.eigh(distances.T @ distances / len(features))
    shrunk = (variances.clamp_min(0) + floor * variances.mean()).rsqrt()
    # Turned back into the old directions, so that little else changes.
    change = directions * shrunk @ directions.T
    change *= length / (distances @ change).norm(dim=1).pow(2).mean().sqrt()
    layer.weight.copy_(change @ layer.weight.double())
    layer.bias.copy_(change @ (layer.bias.double() - mean))
