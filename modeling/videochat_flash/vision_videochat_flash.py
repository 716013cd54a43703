"""From pixels to features in VideoChat-Flash: tower, merging and projector clip by clip, image layout, outputs.

Paper: VideoChat-Flash (arXiv 2501.00574), Sec. 3.1.
Original read: OpenGVLab/VideoChat-Flash, `llava_arch.py`, `mm_projector_builder.py`.

Shapes: F frames of a video, K clips (or image tiles), T frames of a clip, L patches of a frame, M tokens of a clip
after merging, V visual tokens, D language width, E vision width.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils.generic import can_return_tuple

from longvideo.modeling.layers.chunked import iterate_chunks
from longvideo.modeling.layers.token_merging import merge_tokens
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


class VideoChatFlashVisionMixin:
    """Encoding of clips and images for a model that holds `vision_tower` and `multi_modal_projector`."""

    def _run_tower(self, clips: torch.Tensor, **kwargs) -> BaseModelOutputWithPooling:
        """Encodes (K, T, C, H, W) to `last_hidden_state` (K, T * L, E), jointly or frame by frame."""
        num_clips, num_frames = clips.shape[:2]
        if self.config.vision_config.model_type == "siglip_vision_model":
            output = self.vision_tower(clips.flatten(0, 1).to(self.vision_tower.dtype), **kwargs)
        elif self.config.vision_encode_type == "image_video":
            output = self.vision_tower(clips.flatten(0, 1)[:, None], **kwargs)
        else:
            return self.vision_tower(clips, **kwargs)
        joined = output.last_hidden_state.unflatten(0, (num_clips, num_frames)).flatten(1, 2)
        output.last_hidden_state = joined
        return output

    def _encode_clips(self, clips: torch.Tensor, output_tower_features: bool, **kwargs) -> VideoChatFlashVisionOutput:
        """Takes (K, T, C, H, W) through tower, merging and projector, a few clips at a time.

        Returns:
            `pooler_output` (K, M, D), `merge_groups` (K, T * L), and what was asked for besides.
        """
        projected, groups, towers, merges, sizes = [], [], [], [], []
        tower = None
        keep = output_tower_features
        # Recorded states of all layers are joined over one call only, so that call has to take all clips.
        records = any(
            kwargs.get(flag, getattr(self.config.vision_config, flag, False))
            for flag in ("output_hidden_states", "output_attentions")
        )
        chunk_size = len(clips) if records else self.config.vision_chunk_size
        for piece in iterate_chunks(clips, max(chunk_size, 1)):
            # Pixels may wait on the CPU: only a piece of them is moved at a time.
            tower = self._run_tower(piece.to(self.device), **kwargs)
            merge = merge_tokens(
                tower.last_hidden_state,
                self.config.tokens_per_clip,
                num_heads=self.config.vision_config.num_attention_heads,
            )
            projected.append(self.multi_modal_projector(merge.merged_BME))
            groups.append(merge.groups_BN)
            if keep:
                towers.append(tower.last_hidden_state)
                merges.append(merge.merged_BME)
                sizes.append(merge.sizes_BM)
        return VideoChatFlashVisionOutput(
            last_hidden_state=torch.cat(towers) if keep else None,
            pooler_output=torch.cat(projected),
            hidden_states=tower.hidden_states if records else None,
            attentions=tower.attentions if records else None,
            merged_tokens=torch.cat(merges) if keep else None,
            merged_sizes=torch.cat(sizes) if keep else None,
            merge_groups=torch.cat(groups),
        )

    def _video_clip_counts(
        self, pixel_values_videos: torch.Tensor, video_num_frames: torch.Tensor | None
    ) -> list[int]:
        """Clips per video; checks that frames and counts agree and fill whole clips."""
        if pixel_values_videos.ndim == 5:
            counts = [pixel_values_videos.shape[1]] * pixel_values_videos.shape[0]
        elif video_num_frames is None:
            raise ValueError(
                f"pixel_values_videos of shape {tuple(pixel_values_videos.shape)} is a flat list of frames and needs "
                "video_num_frames, the number of frames of each video."
            )
        else:
            counts = [int(n) for n in video_num_frames]
            if sum(counts) != pixel_values_videos.shape[0]:
                raise ValueError(
                    f"video_num_frames {counts} add up to {sum(counts)} frames, but pixel_values_videos has "
                    f"{pixel_values_videos.shape[0]}."
                )
        local = self.config.mm_local_num_frames
        for count in counts:
            if count < local or count % local:
                raise ValueError(
                    f"A video of {count} frames does not fill clips of {local} frames. Sample a multiple of {local} "
                    "frames; the processor does so."
                )
        return [count // local for count in counts]

    @can_return_tuple
    def get_video_features(
        self,
        pixel_values_videos: torch.Tensor,
        video_num_frames: torch.Tensor | None = None,
        output_tower_features: bool = False,
        **kwargs,
    ) -> VideoChatFlashVisionOutput:
        """Encodes videos clip by clip, in chunks of bounded memory.

        Args:
            pixel_values_videos: (videos, F, C, height, width), or (frames of all videos, C, height, width) together
                with `video_num_frames`.
            video_num_frames: (videos,) int64 frames per video, each a multiple of `mm_local_num_frames`.
            output_tower_features: whether tower output and merged tokens are returned as well.
            **kwargs: passed to the tower, e.g. `output_hidden_states`.

        Returns:
            `pooler_output`: per video (V, D), clip after clip.

        Raises:
            ValueError: frames that do not fill clips or do not agree with the counts.

        Source: VideoChat-Flash Sec. 3.1, Eq. 1; clip after clip, `llava_arch.py`.
        """
        clip_counts = self._video_clip_counts(pixel_values_videos, video_num_frames)
        frames = pixel_values_videos.flatten(0, 1) if pixel_values_videos.ndim == 5 else pixel_values_videos
        clips = frames.unflatten(0, (-1, self.config.mm_local_num_frames))
        output = self._encode_clips(clips, output_tower_features, **kwargs)
        output.pooler_output = [x.flatten(0, 1) for x in output.pooler_output.split(clip_counts)]
        output.merge_groups = list(output.merge_groups.split(clip_counts))
        return output

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        image_grids: torch.Tensor | None = None,
        output_tower_features: bool = False,
        **kwargs,
    ) -> VideoChatFlashVisionOutput:
        """Encodes images tile by tile.

        Args:
            pixel_values: (tiles of all images, C, height, width); the first tile of an image is the whole picture.
            image_grids: (images, 2) int64 rows and columns of further tiles, (0, 0) for none; absent means that every
                tile is an image.
            output_tower_features: whether tower output and merged tokens are returned as well.
            **kwargs: passed to the tower.

        Returns:
            `pooler_output`: per image (V, D).

        Raises:
            ValueError: tiles and grids do not agree.
        """
        grids = [(0, 0)] * len(pixel_values) if image_grids is None else [(int(r), int(c)) for r, c in image_grids]
        counts = [1 + rows * columns for rows, columns in grids]
        if sum(counts) != len(pixel_values):
            raise ValueError(
                f"image_grids {grids} ask for {sum(counts)} tiles, but pixel_values has {len(pixel_values)}."
            )
        output = self._encode_clips(pixel_values[:, None], output_tower_features, **kwargs)
        output.pooler_output = [
            arrange_image_tiles(tiles, rows, columns)
            for tiles, (rows, columns) in zip(output.pooler_output.split(counts), grids, strict=True)
        ]
        output.merge_groups = list(output.merge_groups.split(counts))
        return output
