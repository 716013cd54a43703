"""From pixels to what decoder and cross-attention see in CrossLMM: tower, token merge, projector, in chunks.

Paper: CrossLMM (arXiv 2505.17020), Sec. 3.1 and 3.2. Original code: none is public.

Shapes: F frames of all videos or images, G tokens along a side of a frame, N = G * G tokens of a frame before merging,
R after it, T frames of one video, D language width, E vision width.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModel, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils.generic import can_return_tuple

from longvideo.modeling.crosslmm.configuration_crosslmm import CrossLMMConfig
from longvideo.modeling.layers.chunked import iterate_chunks


@dataclass
class CrossLMMVisionOutput(BaseModelOutputWithPooling):
    """Visual features.

    Args:
        pooler_output: per video or image (T * R, D), what the decoder gets, frame after frame and row after row.
        memory: per video or image (T * N, D or E), the original tokens that cross-attention reads, projected or as the
            tower gives them; None for a model without cross-attention.
        num_frames: frames of each video, 1 for an image.
        last_hidden_state: (F, N, E) tower output, only when asked for: it grows with the video.
        merged_tokens: (F, R, E) after merging, before the projector, only when asked for.
    """

    memory: list[torch.Tensor] | None = None
    num_frames: list[int] | None = None
    merged_tokens: torch.Tensor | None = None


class CrossLMMProjector(nn.Module):
    """Two linear layers that bring tokens of the tower to the width of the decoder, behind a norm.

    Source: CrossLMM, Sec. 3.1.
    Differs: neither the norm's place nor the inner width is given; see `projector_norm`, and the inner width is D.
    """

    def __init__(self, config: CrossLMMConfig):
        super().__init__()
        vision, width = config.vision_config, config.text_config.hidden_size
        self.norm = nn.Identity()
        if config.projector_norm == "pre":
            self.norm = nn.LayerNorm(vision.hidden_size, eps=vision.layer_norm_eps)
        self.linear_1 = nn.Linear(vision.hidden_size, width)
        self.act = ACT2FN[config.projector_hidden_act]
        self.linear_2 = nn.Linear(width, width)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.linear_2(self.act(self.linear_1(self.norm(tokens))))


def build_tower(config: CrossLMMConfig) -> PreTrainedModel:
    """Returns a new tower without what is not used: layers behind the feature layer, last norm, pooling head."""
    return trim_tower(AutoModel.from_config(config.vision_config), config)


def trim_tower(tower: PreTrainedModel, config: CrossLMMConfig) -> PreTrainedModel:
    """Takes out of a SigLIP tower, in place, what is not used.

    Args:
        tower: SigLIP vision model with all its layers.
        config: says how many of them run.

    Returns:
        The same tower; its last hidden state is the output of the last layer that is left.
    """
    tower.encoder.layers = tower.encoder.layers[: config.num_vision_layers]
    tower.post_layernorm = nn.Identity()
    if getattr(tower, "use_head", False):
        tower.use_head = False
        del tower.head
    return tower


def merge_grid(tokens_FNE: torch.Tensor, side: int, mode: str = "average") -> torch.Tensor:
    """Brings the square grid of each frame to fewer tokens, without parameters.

    Args:
        tokens_FNE: (F, N, E) tokens row after row, N a square number.
        side: tokens along a side afterwards.
        mode: "average" (mean over adjacent regions; uneven ones where the grid cannot be divided), "bilinear" (samples
            at the centre of each region: a single token or the middle four) or "bilinear_antialias" (weighs the whole
            region and its surroundings).

    Returns:
        (F, side * side, E).

    Source: CrossLMM, Sec. 3.1.
    Differs: the paper speaks of bilinear pooling that fuses patches; bilinear resizing without antialias drops them.
    So our default is averaging.
    """
    grid = round(tokens_FNE.shape[1] ** 0.5)
    grid_FEGG = tokens_FNE.transpose(1, 2).unflatten(2, (grid, grid))
    if mode != "average":
        # Half precision has no kernel with antialias on a CPU.
        merged = F.interpolate(
            grid_FEGG.float(),
            size=(side, side),
            mode="bilinear",
            align_corners=False,
            antialias=mode == "bilinear_antialias",
        ).to(grid_FEGG.dtype)
    elif grid % side == 0:
        # Other than adaptive pooling it has a deterministic gradient on a GPU.
        merged = F.avg_pool2d(grid_FEGG, grid // side)
    else:
        merged = F.adaptive_avg_pool2d(grid_FEGG, side)
    return merged.flatten(2).transpose(1, 2)


class CrossLMMVisionMixin:
    """The vision half of `CrossLMMModel`, which has tower and projector."""

    def _check_pixels(self, pixels: torch.Tensor, name: str, ndims: tuple[int, ...], lead: str) -> None:
        side = self.config.vision_config.image_size
        if pixels.ndim not in ndims or tuple(pixels.shape[-3:]) != (3, side, side):
            raise ValueError(
                f"{name} has the shape {tuple(pixels.shape)}; the tower takes ({lead}, 3, {side}, {side}). Pass what "
                "this model's processor makes."
            )

    def _flat_frames(
        self, pixel_values_videos: torch.Tensor, video_num_frames: torch.Tensor | None
    ) -> tuple[torch.Tensor, list[int]]:
        """Returns the frames of all videos, (F, 3, S, S), without padding, and the number of each video's."""
        shape = tuple(pixel_values_videos.shape)
        self._check_pixels(pixel_values_videos, "pixel_values_videos", (4, 5), "videos, frames")
        counts = None if video_num_frames is None else [int(n) for n in video_num_frames]
        if counts is not None and min(counts, default=1) < 1:
            raise ValueError(f"video_num_frames is {counts}; every video has at least one frame.")
        if pixel_values_videos.ndim == 4:
            if counts is None:
                raise ValueError(
                    f"pixel_values_videos of shape {shape} is a flat list of frames and needs video_num_frames, the "
                    "number of frames of each video."
                )
            if sum(counts) != shape[0]:
                raise ValueError(
                    f"video_num_frames {counts} add up to {sum(counts)} frames, but pixel_values_videos has "
                    f"{shape[0]}."
                )
            return pixel_values_videos, counts
        if counts is None:
            return pixel_values_videos.flatten(0, 1), [shape[1]] * shape[0]
        if len(counts) != shape[0] or max(counts, default=0) > shape[1]:
            raise ValueError(
                f"video_num_frames {counts} does not fit pixel_values_videos of shape {shape}: it needs one number "
                f"per video, {shape[0]}, each at most {shape[1]}."
            )
        return torch.cat([frames[:n] for frames, n in zip(pixel_values_videos, counts, strict=True)]), counts

    def _encode_frames(
        self, frames: torch.Tensor, counts: list[int], output_tower_features: bool, **kwargs
    ) -> CrossLMMVisionOutput:
        """Takes (F, 3, S, S) through tower, merge and projector, a few frames at a time."""
        config = self.config
        # Recorded states of all layers are joined over one call only, so that call has to take all frames.
        records = any(
            kwargs.get(flag, getattr(config.vision_config, flag, False))
            for flag in ("output_hidden_states", "output_attentions")
        )
        size = max(len(frames), 1) if records else config.vision_chunk_size
        pooled, memory, towers, merges, tower = [], [], [], [], None
        for piece in iterate_chunks(frames, size):
            tower = self.vision_tower(piece.to(self.vision_tower.dtype), **kwargs)
            tokens_FNE = tower.last_hidden_state
            merged_FRE = merge_grid(tokens_FNE, config.merged_grid_size, config.merge_mode)
            pooled.append(self.multi_modal_projector(merged_FRE))
            if config.cross_attention_layers:
                projected = config.kv_source == "projected"
                memory.append(self.multi_modal_projector(tokens_FNE) if projected else tokens_FNE)
            if output_tower_features:
                towers.append(tokens_FNE)
                merges.append(merged_FRE)
        return CrossLMMVisionOutput(
            last_hidden_state=torch.cat(towers) if towers else None,
            pooler_output=[x.flatten(0, 1) for x in torch.cat(pooled).split(counts)],
            hidden_states=tower.hidden_states if records else None,
            attentions=tower.attentions if records else None,
            memory=[x.flatten(0, 1) for x in torch.cat(memory).split(counts)] if memory else None,
            num_frames=list(counts),
            merged_tokens=torch.cat(merges) if merges else None,
        )

    @can_return_tuple
    def get_video_features(
        self,
        pixel_values_videos: torch.Tensor,
        video_num_frames: torch.Tensor | None = None,
        output_tower_features: bool = False,
        **kwargs,
    ) -> CrossLMMVisionOutput:
        """Encodes videos, frames in chunks of bounded memory.

        Args:
            pixel_values_videos: (videos, T, 3, S, S), or (frames of all videos, 3, S, S) with `video_num_frames`.
            video_num_frames: (videos,) int64 frames of each video; beside five axes, frames behind them are padding.
            output_tower_features: whether tower output and merged tokens are returned as well.
            **kwargs: passed to the tower, e.g. `output_hidden_states`.

        Returns:
            `pooler_output` per video (T * R, D), `memory` per video (T * N, D or E).

        Raises:
            ValueError: another shape, or counts that do not fit the frames.

        Source: CrossLMM, Sec. 3.1 and Eq. 6.
        """
        frames, counts = self._flat_frames(pixel_values_videos, video_num_frames)
        return self._encode_frames(frames, counts, output_tower_features, **kwargs)

    @can_return_tuple
    def get_image_features(
        self, pixel_values: torch.Tensor, output_tower_features: bool = False, **kwargs
    ) -> CrossLMMVisionOutput:
        """Encodes images, each as a video of one frame.

        Args:
            pixel_values: (images, 3, S, S).
            output_tower_features: whether tower output and merged tokens are returned as well.
            **kwargs: passed to the tower.

        Returns:
            `pooler_output` per image (R, D), `memory` per image (N, D or E).

        Raises:
            ValueError: another shape.
        """
        self._check_pixels(pixel_values, "pixel_values", (4,), "images")
        return self._encode_frames(pixel_values, [1] * len(pixel_values), output_tower_features, **kwargs)
