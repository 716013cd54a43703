"""From pixels to what the decoder sees in LLaVA-ST: tower, projector, position embeddings, packers, in chunks.

Paper: LLaVA-ST (arXiv 2501.08282), Sec. 3.2 and 3.3.
Original read: appletea233/LLaVA-ST, `llava_arch.py`, `siglip_encoder.py`, `fast_slow_resampler.py`.

Shapes: F frames, P = G * G patches of a frame, P1 after spatial packing, V visual tokens, D language width, E vision
width.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils.generic import can_return_tuple

from longvideo.modeling.layers.chunked import iterate_chunks
from longvideo.modeling.llava_st.configuration_llava_st import LlavaSTConfig
from longvideo.modeling.llava_st.coordinates_llava_st import LapeParts, add_lape, average_tables, lape_parts
from longvideo.modeling.llava_st.packer_llava_st import pool_reduced, pool_regions


@dataclass
class LlavaSTVisionOutput(BaseModelOutputWithPooling):
    """Visual features.

    Args:
        pooler_output: per video or image (V, D), what the decoder gets: a video's fast stream, where it is spliced,
            then its slow stream, each frame after frame and row after row.
        last_hidden_state: (F, P, E) tower output of all frames, only when asked for: it grows with the video.
        projected: (F, P, D) after the projector, only when asked for.
        positioned: (F, P, D) with position embeddings added, only when asked for.
        reduced: (F, P1, D) after the spatial packer, only when asked for.
        fast: per video (F, P2, D), only when asked for.
        slow: per video or reduced image (F / temporal_factor, P1, D), only when asked for.
    """

    projected: torch.Tensor | None = None
    positioned: torch.Tensor | None = None
    reduced: torch.Tensor | None = None
    fast: list[torch.Tensor] | None = None
    slow: list[torch.Tensor] | None = None


class LlavaSTProjector(nn.Module):
    """Two linear layers that bring the tower's patches to the width of the decoder."""

    def __init__(self, config: LlavaSTConfig):
        super().__init__()
        self.linear_1 = nn.Linear(config.vision_config.hidden_size, config.text_config.hidden_size)
        self.act = ACT2FN[config.projector_hidden_act]
        self.linear_2 = nn.Linear(config.text_config.hidden_size, config.text_config.hidden_size)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.linear_2(self.act(self.linear_1(features)))


class LlavaSTVisionMixin:
    """The vision half of `LlavaSTModel`, which has tower, projector, packer and `coordinate_tables`."""

    def _check_frames(self, pixels: torch.Tensor, name: str, ndim: int) -> None:
        side = self.config.vision_config.image_size
        wanted = (3, side, side)
        if pixels.ndim != ndim or tuple(pixels.shape[-3:]) != wanted:
            lead = "videos, frames" if ndim == 5 else "images"
            raise ValueError(
                f"{name} has the shape {tuple(pixels.shape)}; the tower takes ({lead}, 3, {side}, {side}). Pass what "
                "this model's processor makes."
            )
        frames = pixels.shape[1] if ndim == 5 else None
        if frames is not None and frames != self.config.num_frames:
            raise ValueError(
                f"Videos of {frames} frames were given, but this model takes {self.config.num_frames} frames of every "
                "video. The processor samples them; for another number set num_frames, a multiple of "
                f"{self.config.temporal_factor}, in the model's configuration and in the processor."
            )

    def _position_parts(
        self, num_frames: int, output_rows: torch.Tensor | None, *, is_image: bool = False
    ) -> LapeParts | None:
        config = self.config
        if not config.use_lape or not config.num_coordinate_tokens:
            return None
        inputs, outputs = self.coordinate_tables(output_rows)
        averages = [average_tables(x, y.to(x)) for x, y in zip(inputs, outputs, strict=True)]
        return lape_parts(
            *averages,
            num_frames=num_frames,
            grid=config.grid_size,
            image_row=config.image_lape_frame if is_image else None,
            interpolate_frames=config.lape_interpolate_frames,
        )

    def _reduce(self, features_FPD: torch.Tensor) -> torch.Tensor:
        if self.config.use_packer:
            return self.packer.spatial(features_FPD)
        return pool_regions(features_FPD, spatial_factor=self.config.spatial_factor, query="average")

    def _streams(self, reduced_FPD: torch.Tensor, with_fast: bool) -> tuple[torch.Tensor | None, torch.Tensor]:
        config = self.config
        if config.use_packer:
            return self.packer.streams(reduced_FPD, with_fast=with_fast)
        factors = {"spatial_factor": config.spatial_factor, "temporal_factor": config.temporal_factor}
        return pool_reduced(reduced_FPD, **factors)

    def _tie_in_idle(
        self, pooled: list[torch.Tensor], features_FPD: torch.Tensor, *, fast_only: bool
    ) -> list[torch.Tensor]:
        """Lets packers that add nothing to a batch get gradients of zero; values stay.

        Processes that share gradients wait for those of every parameter, and for every layer to be run.

        Args:
            pooled: (V, D) of each video or image.
            features_FPD: what the idle packers would get, of which one frame is enough: (F, P1, D) with `fast_only`,
                otherwise (F, P, D).
            fast_only: whether the other two packers have run.

        Returns:
            The same, tied to the idle packers.

        Source: `llava_arch.py`, which adds the packers' results times zero.
        """
        if not (pooled and self.training and torch.is_grad_enabled() and self.config.use_packer):
            return pooled
        layers = [self.packer.fast] if fast_only else [self.packer.spatial, self.packer.temporal, self.packer.fast]
        if not any(p.requires_grad for layer in layers for p in layer.parameters()):
            return pooled
        frame = features_FPD[:1].detach()
        if not fast_only:
            frame = self.packer.spatial(frame)
        results = [layer(frame).mean() for layer in layers if layer is not self.packer.spatial]
        return [pooled[0] + 0.0 * sum(results).to(pooled[0]), *pooled[1:]]

    def _encode_frames(
        self, frames: torch.Tensor, parts: LapeParts | None, *, reduce: bool, keep: bool, **kwargs
    ) -> tuple[torch.Tensor, LlavaSTVisionOutput]:
        """Takes frames through tower, projector and spatial packing, a few at a time.

        Args:
            frames: (F, 3, S, S) of all videos or images; frame i is number i % (frames of `parts`) of its video.
            parts: position embeddings of one video or image, or None.
            reduce: whether the spatial packer runs.
            keep: whether what lies between is returned.
            **kwargs: passed to the tower.

        Returns:
            (F, P1, D), or (F, P, D) where nothing is reduced, and an output with what was kept.
        """
        # Recorded states of all layers are joined over one call only, so that call has to take all frames.
        records = any(
            kwargs.get(flag, getattr(self.config.vision_config, flag, False))
            for flag in ("output_hidden_states", "output_attentions")
        )
        size = max(len(frames), 1) if records else self.config.vision_chunk_size
        kept: dict[str, list[torch.Tensor]] = {"last_hidden_state": [], "projected": [], "positioned": []}
        results, start, tower = [], 0, None
        for piece in iterate_chunks(frames, size):
            tower = self.vision_tower(piece.to(self.vision_tower.dtype), **kwargs)
            projected = self.multi_modal_projector(tower.last_hidden_state)
            positioned = projected
            if parts is not None:
                numbers = torch.arange(start, start + len(piece)) % len(parts.temporal_FD)
                own = LapeParts(parts.temporal_FD[numbers.to(parts.temporal_FD.device)], parts.spatial_PD)
                positioned = add_lape(projected, own)
            if keep:
                shown = (tower.last_hidden_state, projected, positioned)
                for entries, x in zip(kept.values(), shown, strict=True):
                    entries.append(x)
            results.append(self._reduce(positioned) if reduce else positioned)
            start += len(piece)
        output = LlavaSTVisionOutput(**{name: torch.cat(x) if keep else None for name, x in kept.items()})
        if records:
            output.hidden_states, output.attentions = tower.hidden_states, tower.attentions
        return torch.cat(results), output

    @can_return_tuple
    def get_video_features(
        self,
        pixel_values_videos: torch.Tensor,
        output_rows: torch.Tensor | None = None,
        output_tower_features: bool = False,
        **kwargs,
    ) -> LlavaSTVisionOutput:
        """Encodes videos, frames in chunks of bounded memory.

        Args:
            pixel_values_videos: (videos, F, 3, S, S), F as configured.
            output_rows: (C, D) rows of coordinates in the head, all axes; needed in the folded layout, where the head
                holds them. The model with a head fills it in.
            output_tower_features: whether tower output, both streams and what lies between are returned as well.
            **kwargs: passed to the tower, e.g. `output_hidden_states`.

        Returns:
            `pooler_output`: per video (V, D).

        Raises:
            ValueError: another number of frames or another size than configured.

        Source: LLaVA-ST Eqs. 2 and 5-8; `llava_arch.py`.
        """
        self._check_frames(pixel_values_videos, "pixel_values_videos", 5)
        num_frames = pixel_values_videos.shape[1]
        parts = self._position_parts(num_frames, output_rows)
        reduced, output = self._encode_frames(
            pixel_values_videos.flatten(0, 1), parts, reduce=True, keep=output_tower_features, **kwargs
        )
        with_fast = self.config.splice_fast_stream
        streams = [self._streams(x, with_fast or output_tower_features) for x in reduced.split(num_frames)]
        output.pooler_output = [
            torch.cat([fast.flatten(0, 1), slow.flatten(0, 1)]) if with_fast else slow.flatten(0, 1)
            for fast, slow in streams
        ]
        if not with_fast:
            output.pooler_output = self._tie_in_idle(output.pooler_output, reduced, fast_only=True)
        if output_tower_features:
            output.reduced = reduced
            output.fast, output.slow = [fast for fast, _ in streams], [slow for _, slow in streams]
        return output

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        output_rows: torch.Tensor | None = None,
        output_tower_features: bool = False,
        **kwargs,
    ) -> LlavaSTVisionOutput:
        """Encodes images.

        Args:
            pixel_values: (images, 3, S, S).
            output_rows: see `get_video_features`.
            output_tower_features: whether tower output and what lies between are returned as well.
            **kwargs: passed to the tower.

        Returns:
            `pooler_output`: per image (V, D), all its patches, or with `use_downsample_image` the slow stream of one
            frame.

        Raises:
            ValueError: another size than configured.

        Source: LLaVA-ST Sec. 3.3; `llava_arch.py`.
        """
        self._check_frames(pixel_values, "pixel_values", 4)
        small = self.config.use_downsample_image
        parts = self._position_parts(1, output_rows, is_image=True)
        features, output = self._encode_frames(pixel_values, parts, reduce=small, keep=output_tower_features, **kwargs)
        if small:
            slow = [self._streams(x[None], False)[1] for x in features]
            if output_tower_features:
                output.reduced, output.slow = features, slow
            reduced, features = features, torch.cat(slow)
        output.pooler_output = self._tie_in_idle(list(features), reduced if small else features, fast_only=small)
        return output
