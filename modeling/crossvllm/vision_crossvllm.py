"""From pixels to what the decoder of CrossVLLM sees: tower, pooling, the projector of a granularity, in chunks.

Paper: Cross-granularity video LLM for long video understanding, Sec. 3. Original code: none is public.

Shapes: F frames of all videos, T frames of one video, G patches along a side of a frame, P patches of a frame as they
are kept (pooled up to the stride that both granularities share), M tokens of a frame in the decoder, D language width,
E vision width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModel, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava_next_video.modeling_llava_next_video import LlavaNextVideoMultiModalProjector
from transformers.utils.generic import can_return_tuple

from longvideo.modeling.crossvllm.configuration_crossvllm import GRANULARITIES, CrossVLLMConfig
from longvideo.modeling.crossvllm.frame_cache_crossvllm import FrameFeatureCache
from longvideo.modeling.layers.chunked import iterate_chunks
from longvideo.modeling.layers.feature_files import hash_weights


@dataclass
class CrossVLLMVisionOutput(BaseModelOutputWithPooling):
    """Visual features of one granularity.

    Args:
        pooler_output: per video (T * M, D), per image (G * G, D): frame after frame, row after row.
        num_frames: frames of each video, 1 for an image.
        granularity: whose projector and stride made them.
        last_hidden_state: (F, 1 + G * G, E) tower output, only when asked for: it grows with the video.
    """

    num_frames: list[int] | None = None
    granularity: str | None = None


def build_projectors(config: CrossVLLMConfig) -> nn.ModuleDict:
    """Returns new projectors f ("coarse") and f' ("fine").

    Source: CrossVLLM, Eqs. 2 and 5; the layers are those of LLaVA-NeXT-Video.
    """
    return nn.ModuleDict({name: LlavaNextVideoMultiModalProjector(config) for name in GRANULARITIES})


def build_tower(config: CrossVLLMConfig) -> PreTrainedModel:
    """Returns a new frozen tower without the layers behind the feature layer and without the last norm."""
    return trim_tower(AutoModel.from_config(config.vision_config), config)


def trim_tower(tower: PreTrainedModel, config: CrossVLLMConfig) -> PreTrainedModel:
    """Takes out of a CLIP tower, in place, what is not used, and freezes it.

    Args:
        tower: CLIP vision model with all its layers.
        config: says how many of them run.

    Returns:
        The same tower; its last hidden state is the output of the last layer that is left.
    """
    tower.encoder.layers = tower.encoder.layers[: config.num_vision_layers]
    tower.post_layernorm = nn.Identity()
    return tower.requires_grad_(False)


def pool_patches(patches_FPE: torch.Tensor, stride: int, mode: str = "average") -> torch.Tensor:
    """Joins squares of patches, without parameters.

    Args:
        patches_FPE: (F, P, E) row after row, P a square number.
        stride: patches along a side of a square; it divides those along a side of a frame.
        mode: "average" or "max".

    Returns:
        (F, P / stride^2, E).

    Source: CrossVLLM, App. A.1, Tables 4 and 5; LLaVA-NeXT-Video in transformers.
    Differs: Eqs. 2 and 5 project the class feature of a frame, the token counts of the tables are those of patches.
    """
    if stride == 1:
        return patches_FPE
    grid = round(patches_FPE.shape[1] ** 0.5)
    grid_FEGG = patches_FPE.transpose(1, 2).unflatten(2, (grid, grid))
    pool = F.avg_pool2d if mode == "average" else F.max_pool2d
    return pool(grid_FEGG, stride).flatten(2).transpose(1, 2)


class CrossVLLMVisionMixin:
    """The vision half of `CrossVLLMModel`, which has `vision_tower`, `projectors` and a granularity."""

    def vision_key(self) -> str:
        """Returns a hash of what turns pixels into kept patches: settings and all weights of the tower."""
        config = self.config
        settings = f"{config.vision_feature_layer} {config.spatial_pool_mode} {config.shared_stride} "
        settings += config.vision_config.to_json_string(use_diff=False)
        return hash_weights(settings, self.vision_tower)

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
            if counts is None or sum(counts) != shape[0]:
                raise ValueError(
                    f"pixel_values_videos of shape {shape} is a flat list of frames and needs video_num_frames, the "
                    f"number of frames of each video, adding up to {shape[0]}; got {counts}."
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

    def _run_tower(
        self, frames: torch.Tensor, stride: int, output_tower_features: bool = False, **kwargs
    ) -> tuple[torch.Tensor, dict]:
        """Takes (F, 3, S, S) through the tower, a few frames at a time.

        Returns:
            Patches (F, P, E) pooled by `stride`, and tower outputs that were asked for, by name.
        """
        config = self.config
        # Recorded states of all layers are joined over one call only, so that call has to take all frames.
        records = any(
            kwargs.get(flag, getattr(config.vision_config, flag, False))
            for flag in ("output_hidden_states", "output_attentions")
        )
        size = max(len(frames), 1) if records else config.vision_chunk_size
        learns = torch.is_grad_enabled() and any(x.requires_grad for x in self.vision_tower.parameters())
        patches, towers, tower = [], [], None
        # Inputs may require gradients (checkpointing asks for it), which a frozen tower has no use for.
        with torch.set_grad_enabled(learns):
            for piece in iterate_chunks(frames, size):
                tower = self.vision_tower(piece.to(self.vision_tower.dtype), **kwargs)
                patches.append(pool_patches(tower.last_hidden_state[:, 1:], stride, config.spatial_pool_mode))
                if output_tower_features:
                    towers.append(tower.last_hidden_state)
        extra = {"last_hidden_state": torch.cat(towers) if towers else None}
        if records:
            extra |= {"hidden_states": tower.hidden_states, "attentions": tower.attentions}
        return torch.cat(patches), extra

    def get_vision_features(
        self,
        pixel_values_videos: torch.Tensor,
        video_num_frames: torch.Tensor | None = None,
        *,
        cache: FrameFeatureCache | None = None,
        sources: Sequence[str] | None = None,
        frame_indices: Sequence[Sequence[int]] | None = None,
    ) -> list[torch.Tensor]:
        """Gives the tower's patches of every frame, which both granularities pool and project.

        Args:
            pixel_values_videos: (videos, T, 3, S, S), or (frames of all videos, 3, S, S) with `video_num_frames`.
            video_num_frames: (videos,) int64 frames of each video; beside five axes, frames behind them are padding.
            cache: patches of frames that were seen before; new ones are put there. Needs `sources` and
                `frame_indices`.
            sources: name of each video, equal for parts of the same one.
            frame_indices: per video the zero-based indices of its frames in the source.

        Returns:
            Per video (T, P, E), pooled up to the stride that both granularities share (2 for 6 and 2).

        Raises:
            ValueError: another shape, counts that do not fit the frames, or a cache of another tower.

        Source: CrossVLLM, Eqs. 1 and 5, first lines.
        Differs: whether both modules share a tower is not said; here they do, and it is frozen.
        """
        frames, counts = self._flat_frames(pixel_values_videos, video_num_frames)
        stride = self.config.shared_stride
        if cache is None:
            return list(self._run_tower(frames, stride)[0].split(counts))
        keys = _frame_keys(counts, sources, frame_indices)
        cache.claim(self.vision_key())
        new = cache.select_new(keys)
        if new:
            patches, _ = self._run_tower(frames[new], stride)
        found = dict(zip([keys[i] for i in new], patches.unbind() if new else (), strict=True))
        # Joined before they are stored: a small cache may lose some of them at once.
        joined = torch.stack([found[key] if key in found else cache.get(key).to(frames.device) for key in keys])
        for key, patches_PE in found.items():
            cache.put(key, patches_PE)
        return list(joined.split(counts))

    def project_patches(self, patches_FPE: torch.Tensor) -> torch.Tensor:
        """Pools kept patches, (F, P, E), as the active granularity does, and projects them: (F, M, D)."""
        config, projector = self.config, self.projectors[self.granularity]
        stride = config.stride(self.granularity_kind) // config.shared_stride
        pooled = pool_patches(patches_FPE, stride, config.spatial_pool_mode)
        return projector(pooled.to(projector.linear_1.weight.device, projector.linear_1.weight.dtype))

    @can_return_tuple
    def get_video_features(
        self,
        pixel_values_videos: torch.Tensor | None = None,
        video_num_frames: torch.Tensor | None = None,
        *,
        vision_features: Sequence[torch.Tensor] | None = None,
        granularity: str | None = None,
        output_tower_features: bool = False,
        **kwargs,
    ) -> CrossVLLMVisionOutput:
        """Encodes videos in a granularity, frames in chunks of bounded memory.

        Args:
            pixel_values_videos: see `get_vision_features`.
            video_num_frames: see `get_vision_features`.
            vision_features: what `get_vision_features` gave, in place of pixels.
            granularity: "coarse" or "fine"; None for the active one.
            output_tower_features: whether the tower's output is returned as well.
            **kwargs: passed to the tower, e.g. `output_hidden_states`.

        Returns:
            `pooler_output` per video (T * M, D).

        Raises:
            ValueError: another shape, counts that do not fit the frames, or none or both of pixels and features.

        Source: CrossVLLM, Eqs. 2 and 5.
        """
        if (pixel_values_videos is None) == (vision_features is None):
            raise ValueError("Pass either pixel_values_videos or vision_features of the videos.")
        extra = {}
        if vision_features is None:
            frames, counts = self._flat_frames(pixel_values_videos, video_num_frames)
            patches, extra = self._run_tower(frames, self.config.shared_stride, output_tower_features, **kwargs)
        else:
            counts = self._check_features(vision_features)
            patches = torch.cat([x.to(self.vision_tower.device) for x in vision_features])
        with self.use_granularity(granularity):
            tokens = torch.cat(
                [self.project_patches(x) for x in iterate_chunks(patches, self.config.vision_chunk_size)]
            )
            return CrossVLLMVisionOutput(
                pooler_output=[x.flatten(0, 1) for x in tokens.split(counts)],
                num_frames=list(counts),
                granularity=self.granularity,
                **extra,
            )

    def _check_features(self, vision_features: Sequence[torch.Tensor]) -> list[int]:
        """Returns the number of frames of each video; features of another shape are an error."""
        wanted = ((self.config.grid_size // self.config.shared_stride) ** 2, self.config.vision_config.hidden_size)
        for patches in vision_features:
            if patches.ndim != 3 or tuple(patches.shape[1:]) != wanted:
                raise ValueError(
                    f"vision_features of a video have the shape {tuple(patches.shape)}; expected (frames, "
                    f"{wanted[0]}, {wanted[1]}). Pass what this model's get_vision_features gives."
                )
        return [len(patches) for patches in vision_features]

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        *,
        granularity: str | None = None,
        output_tower_features: bool = False,
        **kwargs,
    ) -> CrossVLLMVisionOutput:
        """Encodes images without pooling, with the projector of a granularity.

        Args:
            pixel_values: (images, 3, S, S).
            granularity: "coarse" or "fine"; None for the active one.
            output_tower_features: whether the tower's output is returned as well.
            **kwargs: passed to the tower.

        Returns:
            `pooler_output` per image (G * G, D).

        Raises:
            ValueError: another shape.

        Differs: LLaVA-NeXT-Video cuts images into tiles; the paper speaks of videos only, here an image is one view.
        """
        self._check_pixels(pixel_values, "pixel_values", (4,), "images")
        patches, extra = self._run_tower(pixel_values, 1, output_tower_features, **kwargs)
        with self.use_granularity(granularity):
            tokens = self.projectors[self.granularity](patches)
            return CrossVLLMVisionOutput(
                pooler_output=list(tokens.unbind()),
                num_frames=[1] * len(tokens),
                granularity=self.granularity,
                **extra,
            )


def _frame_keys(
    counts: list[int], sources: Sequence[str] | None, frame_indices: Sequence[Sequence[int]] | None
) -> list[tuple[str, int]]:
    """Returns (source, frame index) of every frame."""
    if sources is None or frame_indices is None:
        raise ValueError("A cache of frames needs sources, a name per video, and frame_indices, a list per video.")
    given = [len(indices) for indices in frame_indices]
    if len(sources) != len(counts) or given != counts:
        raise ValueError(
            f"{len(sources)} sources and frame_indices of {given} frames were given for videos of {counts} frames."
        )
    pairs = zip(sources, frame_indices, strict=True)
    return [(source, int(index)) for source, indices in pairs for index in indices]
