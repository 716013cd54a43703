"""From pixels to aggregated frames in LongVU: two towers, the common grid, projectors, temporal reduction, sampler.

Paper: LongVU (arXiv 2410.17434), Sec. 3.1.
Original read: Vision-CAIR/LongVU, `cambrian_arch.py`, `siglip_encoder.py`, `dino_encoder.py`.

Shapes: F frames of a video, T frames that are kept, n frames of a chunk, G side of the towers' common grid, Q queries,
E width of the connector, V visual tokens, D language width.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling, ModelOutput
from transformers.models.dinov2.modeling_dinov2 import Dinov2Embeddings

from longvideo.modeling.layers.chunked import iterate_chunks
from longvideo.modeling.layers.feature_files import hash_tensors
from longvideo.modeling.longvu.configuration_longvu import LongVUConfig
from longvideo.modeling.longvu.sva_longvu import grid_padding_mask, resize_grid
from longvideo.modeling.longvu.temporal_reduction import ReducedFrames, TemporalReducer


@dataclass
class LongVUVisual:
    """An image or a video after both towers and the sampler, before any question.

    Args:
        features: (T, Q, E) aggregated frames.
        kept_frames: (T,) int64 zero-based frame indices.
        dino_similarity: (F,) float32 mean similarity of each frame within its window; for an image (1,).
        num_frames: F.
        size: (width, height) as the model reads it.
        reduced: whether temporal reduction is settled; otherwise all frames are there and a long text may still ask
            for it.
    """

    features: torch.Tensor
    kept_frames: torch.Tensor
    dino_similarity: torch.Tensor
    num_frames: int
    size: tuple[int, int]
    reduced: bool

    def keep(self, kept_T: torch.Tensor) -> "LongVUVisual":
        """Returns the visual with the frames (T,) of all frames, temporal reduction settled."""
        features = self.features[kept_T.to(self.features.device)]
        return LongVUVisual(features, kept_T, self.dino_similarity, self.num_frames, self.size, True)


@dataclass
class LongVUVisionOutput(BaseModelOutputWithPooling):
    """Visual features.

    Args:
        pooler_output: per video or image (V, D): every kept frame at its full grid (images of video checkpoints: at
            the grid they get), before anything is left out for a question.
        last_hidden_state: (frames, patches, width) SigLIP's output for kept frames, only when asked for.
        hidden_states: SigLIP's hidden states, only when asked for.
        attentions: SigLIP's attention maps, only when asked for.
        frame_features: per video or image (T, Q, E) aggregated frames.
        kept_frames: per video or image (T,) int64 zero-based frame indices.
        dino_similarity: per video or image (F,) float32.
        facts: (videos or images, 4) int64: F, width, height, and 1 where temporal reduction is settled.
    """

    frame_features: list[torch.Tensor] | None = None
    kept_frames: list[torch.Tensor] | None = None
    dino_similarity: list[torch.Tensor] | None = None
    facts: torch.Tensor | None = None

    @classmethod
    def of(cls, visuals: list[LongVUVisual], **outputs: object) -> "LongVUVisionOutput":
        """Makes an output of videos or images; `outputs` are the other fields."""
        return cls(
            frame_features=[x.features for x in visuals],
            kept_frames=[x.kept_frames for x in visuals],
            dino_similarity=[x.dino_similarity for x in visuals],
            facts=torch.tensor([(x.num_frames, *x.size, int(x.reduced)) for x in visuals]).view(-1, 4),
            **outputs,
        )

    @property
    def visuals(self) -> list[LongVUVisual]:
        """Per video or image what `forward` and `generate` choose from."""
        parts = zip(self.frame_features, self.kept_frames, self.dino_similarity, self.facts.tolist(), strict=True)
        return [
            LongVUVisual(features, kept, similarity, num_frames, (width, height), bool(reduced))
            for features, kept, similarity, (num_frames, width, height, reduced) in parts
        ]


class LongVUDinov2Embeddings(Dinov2Embeddings):
    """DINOv2's embeddings with the position table resized by a factor instead of to a size.

    The transformers that the releases were trained with gave the resampler (side + 0.1) / stored side, and the
    resampler then steps by that factor. The source coordinates differ by up to 0.13 cells.

    Source: transformers 4.44, `modeling_dinov2.py`, `interpolate_pos_encoding`.
    Differs: today's transformers give the size; `dino_position_interpolation="size"` follows them.
    """

    def interpolate_pos_encoding(self, embeddings: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """Returns the (1, 1 + patches, width) table for frames of that many pixels."""
        num_positions = self.position_embeddings.shape[1] - 1
        if embeddings.shape[1] - 1 == num_positions and height == width:
            return self.position_embeddings
        side = round(num_positions**0.5)
        patch_height, patch_width = self.patch_embeddings.patch_size
        rows, columns = height // patch_height, width // patch_width
        grid = self.position_embeddings[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
        grid = nn.functional.interpolate(
            grid.float(),
            scale_factor=((rows + 0.1) / side, (columns + 0.1) / side),
            mode="bicubic",
            align_corners=False,
        )
        if grid.shape[-2:] != (rows, columns):
            raise ValueError(
                f"Resizing DINOv2's {side} x {side} positions by a factor gave {tuple(grid.shape[-2:])} instead of "
                f"{(rows, columns)}. Use frames of another size or dino_position_interpolation='size'."
            )
        grid = grid.to(self.position_embeddings.dtype).flatten(2).transpose(1, 2)
        return torch.cat([self.position_embeddings[:, :1], grid], dim=1)


class LongVUTowerProjector(nn.Module):
    """Brings the features of one tower to the width of the connector."""

    def __init__(self, tower_width: int, width: int):
        super().__init__()
        self.linear_1 = nn.Linear(tower_width, width)
        self.linear_2 = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=1e-5)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.norm(self.linear_2(nn.functional.gelu(self.linear_1(features))))


class LongVUProjector(nn.Module):
    """Brings aggregated frames to the width of the decoder."""

    def __init__(self, config: LongVUConfig):
        super().__init__()
        self.linear_1 = nn.Linear(config.vision_hidden_size, config.text_config.hidden_size)
        self.linear_2 = nn.Linear(config.text_config.hidden_size, config.text_config.hidden_size)

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        return self.linear_2(nn.functional.gelu(self.linear_1(frames)))


@dataclass
class VisualInputs:
    """Visual inputs of one call.

    Args:
        pixel_values_videos: (frames of all videos, 3, S, S) for SigLIP, or (videos, F, 3, S, S).
        pixel_values_videos_dino: the same frames for DINOv2.
        video_num_frames: (videos,) frames of each video; needed with a flat list of frames.
        video_sizes: (videos, 2) what the model reads as width and height; None for square frames.
        pixel_values: (images, 3, S, S) for SigLIP.
        pixel_values_dino: the same images for DINOv2.
        image_sizes: (images, 2) width and height; None for square images.
        mm_encoder_outputs: features encoded before, `{"video": ..., "image": ...}`.
    """

    pixel_values_videos: torch.Tensor | None = None
    pixel_values_videos_dino: torch.Tensor | None = None
    video_num_frames: torch.Tensor | None = None
    video_sizes: torch.Tensor | None = None
    pixel_values: torch.Tensor | None = None
    pixel_values_dino: torch.Tensor | None = None
    image_sizes: torch.Tensor | None = None
    mm_encoder_outputs: dict[str, ModelOutput] | None = None

    def encoded(self, kind: str) -> list[LongVUVisual] | None:
        """Returns features that were encoded before; None where there are none."""
        output = (self.mm_encoder_outputs or {}).get(kind)
        pixels = self.pixel_values if kind == "image" else self.pixel_values_videos
        if output is not None and pixels is not None:
            raise ValueError(f"Both pixels and encoded features were given for the {kind}s; pass one of them.")
        return None if output is None else output.visuals

    def __bool__(self) -> bool:
        outputs = any(output is not None for output in (self.mm_encoder_outputs or {}).values())
        return outputs or self.pixel_values is not None or self.pixel_values_videos is not None


def read_sizes(sizes: torch.Tensor | None, count: int, kind: str) -> list[tuple[int, int]]:
    """Reads (width, height) per image or video; squares where nothing was given.

    Raises:
        ValueError: not one pair of positive numbers for each.
    """
    if sizes is None:
        return [(1, 1)] * count
    pairs = [tuple(int(x) for x in pair) for pair in sizes]
    if len(pairs) != count or any(len(pair) != 2 or min(pair) < 1 for pair in pairs):
        raise ValueError(
            f"{kind}_sizes must hold a positive width and height for each of {count} {kind}s, got {pairs}."
        )
    return pairs


def join_towers(
    towers: list[BaseModelOutputWithPooling], pooled: list[torch.Tensor], visuals: list[LongVUVisual]
) -> LongVUVisionOutput:
    """Joins what SigLIP gave in several calls with what became of it."""

    def join(name: str) -> tuple[torch.Tensor, ...] | None:
        layers = [getattr(tower, name) for tower in towers]
        return None if layers[0] is None else tuple(torch.cat(parts) for parts in zip(*layers, strict=True))

    return LongVUVisionOutput.of(
        visuals,
        last_hidden_state=torch.cat([tower.last_hidden_state for tower in towers]),
        pooler_output=pooled,
        hidden_states=join("hidden_states"),
        attentions=join("attentions"),
    )


def check_pixels(config: LongVUConfig, pixels: torch.Tensor, pixels_dino: torch.Tensor | None) -> None:
    """Refuses frames that the towers cannot read.

    Args:
        config: LongVU configuration.
        pixels: (frames, 3, height, width) for SigLIP.
        pixels_dino: the same frames for DINOv2.

    Raises:
        ValueError: one tower's frames missing, different numbers of frames, or sizes that do not fit the towers.
    """
    if pixels_dino is None:
        raise ValueError(
            "Pixels for SigLIP were given without those for DINOv2. Pass all outputs of the processor to the model: "
            "pixel_values and pixel_values_dino, pixel_values_videos and pixel_values_videos_dino."
        )
    if len(pixels) != len(pixels_dino):
        raise ValueError(f"SigLIP gets {len(pixels)} frames but DINOv2 {len(pixels_dino)}; both must see the same.")
    side, patch = config.vision_config.image_size, config.dino_config.patch_size
    if pixels.shape[1:] != (3, side, side):
        raise ValueError(f"SigLIP expects frames of (3, {side}, {side}), got {tuple(pixels.shape[1:])}.")
    height, width = pixels_dino.shape[-2:]
    if pixels_dino.shape[1] != 3 or height != width or height % patch:
        raise ValueError(
            f"DINOv2 expects square frames of 3 colours whose side is a multiple of {patch}, got "
            f"{tuple(pixels_dino.shape[1:])}."
        )


class LongVUVisionMixin:
    """Encoding of frames for a model that holds the towers, projectors and the sampler."""

    def _siglip_grid(self, pixels: torch.Tensor, **kwargs) -> tuple[torch.Tensor, BaseModelOutputWithPooling]:
        """Encodes (n, 3, S, S) to (n, G * G, tower width); the tower's own output comes along."""
        output = self.vision_tower(pixels.to(self.device, self.vision_tower.dtype), **kwargs)
        return resize_grid(output.last_hidden_state, self.config.vision_grid_size), output

    def _dino_grid(self, pixels: torch.Tensor) -> torch.Tensor:
        """Encodes (n, 3, S, S) to (n, G * G, tower width), without the class token."""
        hidden = self.dino_tower(pixels.to(self.device, self.dino_tower.dtype)).last_hidden_state
        return resize_grid(hidden[:, 1:], self.config.vision_grid_size)

    def _aggregate(self, siglip: torch.Tensor, dino: torch.Tensor, sizes: list[tuple[int, int]]) -> torch.Tensor:
        """Joins both towers' grids, (n, G * G, tower width) each, to (n, Q, E); one size, or one for each frame."""
        masks = torch.stack([grid_padding_mask(*size, self.config.vision_grid_size) for size in sizes])
        mask = None if masks.all() else masks.to(siglip.device)
        features = [project(x) for project, x in zip(self.vision_projectors, (siglip, dino), strict=True)]
        return self.vision_sampler(self.vision_query, features, mask)

    def _make_reducer(self, num_frames: int, limit: int | None) -> TemporalReducer:
        config = self.config
        return TemporalReducer(
            num_frames,
            threshold=config.dino_threshold,
            max_frames=config.max_kept_frames,
            window=config.temporal_window,
            rule=config.temporal_reduction,
            limit=limit if config.temporal_reduction == "original" else None,
        )

    def _encode_video(
        self,
        pixels: torch.Tensor,
        pixels_dino: torch.Tensor,
        size: tuple[int, int],
        limit: int | None,
        towers: list[BaseModelOutputWithPooling] | None = None,
        **kwargs,
    ) -> LongVUVisual:
        """Encodes one video, (F, 3, S, S) for each tower: DINOv2 sees all frames, SigLIP those that are kept."""
        reducer = self._make_reducer(len(pixels), limit)
        room = self.config.max_kept_frames if reducer.reduces else len(pixels)
        stored, num_survivors = [], 0
        for settled in reduce_stream(reducer, ((self._dino_grid(x),) for x in self._chunks(pixels_dino))):
            num_survivors += len(settled.indices)
            stored.append(settled.features)
            if num_survivors > room:
                stored = [x[:0] for x in stored[:1]]  # thinned out below; encoding few frames again needs less memory
        kept_T = reducer.kept()
        grids = torch.cat(stored).split(self.config.vision_chunk_size) if num_survivors <= room else None
        frames = []
        for i, indices in enumerate(kept_T.split(self.config.vision_chunk_size)):
            here = indices.to(pixels.device)
            dino = self._dino_grid(pixels_dino[here]) if grids is None else grids[i]
            siglip, tower = self._siglip_grid(pixels[here], **kwargs)
            frames.append(self._aggregate(siglip, dino, [size]))
            if towers is not None:
                towers.append(tower)
        return LongVUVisual(torch.cat(frames), kept_T, reducer.similarity, len(pixels), size, reducer.reduces)

    def _encode_stream(
        self,
        windows: Iterable[dict[str, torch.Tensor]],
        num_frames: int,
        size: tuple[int, int],
        limit: int | None,
        digest: "FrameDigest",
    ) -> LongVUVisual:
        """Encodes one video that comes in pieces; only aggregated frames outlive their window.

        Which survivors stay is known at the end. Where they are more than may stay, windows that can be read `again`
        are, for SigLIP to see no others; of windows that cannot, the features of all survivors are held.
        """
        reducer = self._make_reducer(num_frames, limit)
        again = getattr(windows, "again", None)
        room = self.config.max_kept_frames if again is not None and reducer.reduces else num_frames
        frames, num_survivors = [], 0
        for settled in reduce_stream(reducer, self._encode_pieces(windows, digest)):
            num_survivors += len(settled.indices)
            if num_survivors > room:
                frames = []
            elif len(settled.indices):
                siglip, _ = self._siglip_grid(settled.others[0])
                frames.append(self._aggregate(siglip, settled.features, [size]).cpu())
        if num_survivors > room:
            features = torch.cat(list(self._encode_chosen(again(), reducer.kept(), size)))
        else:
            features = torch.cat(frames)[reducer.final_positions()]
        return LongVUVisual(features, reducer.kept(), reducer.similarity, num_frames, size, reducer.reduces)

    def _encode_chosen(
        self, windows: Iterable[dict[str, torch.Tensor]], kept_T: torch.Tensor, size: tuple[int, int]
    ) -> Iterator[torch.Tensor]:
        """Encodes the frames (T,) of a video that comes in pieces; yields aggregated frames on the CPU."""
        start = 0
        for window in windows:
            pixels, pixels_dino = window["pixel_values_videos"], window["pixel_values_videos_dino"]
            here = kept_T[(kept_T >= start) & (kept_T < start + len(pixels))] - start
            start += len(pixels)
            for indices in here.split(self.config.vision_chunk_size) if len(here) else ():
                siglip, _ = self._siglip_grid(pixels[indices.to(pixels.device)])
                dino = self._dino_grid(pixels_dino[indices.to(pixels_dino.device)])
                yield self._aggregate(siglip, dino, [size]).cpu()

    def _encode_pieces(
        self, windows: Iterable[dict[str, torch.Tensor]], digest: "FrameDigest"
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for window in windows:
            pixels, pixels_dino = window.get("pixel_values_videos"), window.get("pixel_values_videos_dino")
            if pixels is None:
                raise ValueError(
                    f"A window holds {sorted(window)}; pixel_values_videos and pixel_values_videos_dino were expected."
                )
            check_pixels(self.config, pixels, pixels_dino)
            digest.add(pixels, pixels_dino)
            for piece, piece_dino in zip(self._chunks(pixels), self._chunks(pixels_dino), strict=True):
                yield self._dino_grid(piece_dino), piece

    def _chunks(self, frames: torch.Tensor) -> Iterator[torch.Tensor]:
        return iterate_chunks(frames, self.config.vision_chunk_size)

    def _encode_images(
        self,
        pixels: torch.Tensor,
        pixels_dino: torch.Tensor,
        sizes: list[tuple[int, int]],
        towers: list[BaseModelOutputWithPooling] | None = None,
        **kwargs,
    ) -> list[LongVUVisual]:
        """Encodes images, (images, 3, S, S) for each tower."""
        visuals, chunk = [], self.config.vision_chunk_size
        for start in range(0, len(pixels), chunk):
            here = slice(start, start + chunk)
            siglip, tower = self._siglip_grid(pixels[here], **kwargs)
            frames = self._aggregate(siglip, self._dino_grid(pixels_dino[here]), sizes[here])
            if towers is not None:
                towers.append(tower)
            first, one = torch.zeros(1, dtype=torch.long), torch.ones(1)
            visuals += [
                LongVUVisual(frame[None], first, one, 1, size, True)
                for frame, size in zip(frames, sizes[here], strict=True)
            ]
        return visuals


def reduce_stream(reducer: TemporalReducer, pieces: Iterable[tuple[torch.Tensor, ...]]) -> Iterator[ReducedFrames]:
    """Runs pieces of a video, DINOv2 features first, through a reducer; yields the survivors as windows complete."""
    for piece in pieces:
        yield reducer.add(*piece)
    last = reducer.finish()
    if last is not None:
        yield last


class FrameDigest:
    """Hash of the pixels of a video, the same for any cut of the video into pieces."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def add(self, pixels: torch.Tensor, pixels_dino: torch.Tensor) -> None:
        """Takes the next frames, (n, 3, S, S) for each tower."""
        for frame in zip(pixels, pixels_dino, strict=True):
            self._digest.update(hash_tensors(*frame).encode())

    def hexdigest(self) -> str:
        """Returns the hash of all frames so far."""
        return self._digest.hexdigest()
