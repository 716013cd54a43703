"""What happens to visual tokens between tower and decoder in VideoChat-Flash: projector, image layout, outputs.

Paper: VideoChat-Flash (arXiv 2501.00574), Sec. 3.1.
Original read: OpenGVLab/VideoChat-Flash, `llava_arch.py`, `mm_projector_builder.py`.

Shapes: K clips (or image tiles), T frames of a clip, L patches of a frame, M tokens of a clip after merging,
V visual tokens, D language width, E vision width.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_outputs import BaseModelOutputWithPooling

from longvideo.modeling.videochat_flash.configuration_videochat_flash import VideoChatFlashConfig


@dataclass
class VideoChatFlashVisionOutput(BaseModelOutputWithPooling):
    """Visual features.

    Args:
        pooler_output: per video or image (V, D), what the decoder gets.
        last_hidden_state: (K, T * L, E) tower output, only when asked for: it grows with the video.
        merged_tokens: (K, M, E) after merging, before the projector, only when asked for.
        merged_sizes: (K, M) patches behind each merged token, only when asked for.
        merge_groups: per video or image (K, T * L) int64, the merged token of every patch, within its clip.
    """

    merged_tokens: torch.Tensor | None = None
    merged_sizes: torch.Tensor | None = None
    merge_groups: list[torch.Tensor] | None = None


class VideoChatFlashProjector(nn.Module):
    """Two linear layers that bring merged tokens to the width of the decoder."""

    def __init__(self, config: VideoChatFlashConfig):
        super().__init__()
        self.linear_1 = nn.Linear(config.vision_config.hidden_size, config.text_config.hidden_size)
        self.act = ACT2FN[config.projector_hidden_act]
        self.linear_2 = nn.Linear(config.text_config.hidden_size, config.text_config.hidden_size)

    def forward(self, merged: torch.Tensor) -> torch.Tensor:
        return self.linear_2(self.act(self.linear_1(merged)))


def arrange_image_tiles(features_KMD: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Joins the tokens of an image: first the whole picture's, then the grid's, line by line over all tiles.

    Args:
        features_KMD: (1 + rows * columns, M, D) tokens per tile, tile 0 the whole picture, M a square number.
        rows: tiles from top to bottom.
        columns: tiles from left to right.

    Returns:
        ((1 + rows * columns) * M, D).

    Source: VideoChat-Flash, `llava_arch.py`, the `spatial_nopad` branch of `prepare_inputs_labels_for_multimodal`.
    """
    if rows * columns == 0:
        return features_KMD.flatten(0, 1)
    side = int(features_KMD.shape[1] ** 0.5)
    if side * side != features_KMD.shape[1]:
        raise ValueError(
            f"Image tiles of {features_KMD.shape[1]} tokens cannot be laid out as squares. Choose tokens_per_frame "
            "and mm_local_num_frames whose product is a square number, or use images of one tile."
        )
    grid = features_KMD[1:].view(rows, columns, side, side, -1).transpose(1, 2)  # (rows, side, columns, side, D)
    return torch.cat([features_KMD[0], grid.flatten(0, 3)])
