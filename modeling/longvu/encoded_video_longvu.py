"""Aggregated frames of videos, kept for any number of questions, in memory or on disk.

What depends on the question (grids, compression, and temporal reduction of videos that fit beside short texts only) is
chosen when a question is asked.

Shapes: F frames of a video, T frames that are kept, Q queries of a frame, E width of the connector.
"""

import os
from dataclasses import dataclass, field, replace

import torch

from longvideo.modeling.layers.feature_files import load_features, save_features
from longvideo.modeling.longvu.vision_longvu import LongVUVisionOutput, LongVUVisual

FORMAT = "longvideo.longvu.encoded_video.v1"
PARTS = ("features", "kept_frames", "dino_similarity")


@dataclass
class LongVUEncodedVideo:
    """One or more videos as `generate` and `forward` take them.

    Args:
        visuals: per video its aggregated frames (T, Q, E), which frames they are, and what temporal reduction saw.
        key: what the features belong to: `pixels` (hash of the pixel values, so of content and processing), `model`
            (hash of the encoding weights and settings) and, when the caller gave one, `source`.
    """

    visuals: list[LongVUVisual]
    key: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.visuals)

    @property
    def num_frames(self) -> list[int]:
        """Frames per video, before temporal reduction."""
        return [visual.num_frames for visual in self.visuals]

    @property
    def features(self) -> list[torch.Tensor]:
        """Per video (T, Q, E)."""
        return [visual.features for visual in self.visuals]

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "LongVUEncodedVideo":
        """Returns a copy with features on another device or in another type."""
        moved = [replace(visual, features=visual.features.to(device=device, dtype=dtype)) for visual in self.visuals]
        return LongVUEncodedVideo(moved, dict(self.key))

    def as_output(self) -> LongVUVisionOutput:
        """Returns what `forward` takes in `mm_encoder_outputs`."""
        return LongVUVisionOutput.of(self.visuals)

    def save(self, folder: str | os.PathLike) -> None:
        """Writes `features.safetensors` and `encoded_video.json` into a folder, each under a temporary name first.

        Args:
            folder: made when absent; files of an earlier encoding are replaced.
        """
        tensors = {f"{part}.{i}": getattr(x, part) for part in PARTS for i, x in enumerate(self.visuals)}
        videos = [
            {"num_frames": x.num_frames, "width": x.size[0], "height": x.size[1], "reduced": x.reduced}
            for x in self.visuals
        ]
        save_features(folder, tensors, {"format": FORMAT, "key": self.key, "videos": videos})

    @classmethod
    def load(cls, folder: str | os.PathLike, key: dict[str, str] | None = None) -> "LongVUEncodedVideo":
        """Reads what `save` wrote.

        Args:
            folder: folder of `save`.
            key: entries that must agree with the stored key, for instance `{"source": video_source_key(...)}` or
                `{"model": model.encoding_key()}`.

        Returns:
            The features on the CPU.

        Raises:
            FileNotFoundError: no encoding in that folder.
            ValueError: another format, damaged files, or a key that does not agree; the features would belong to
                another video, other settings or another model.
        """
        tensors, header = load_features(folder, FORMAT, key=key)
        visuals = [
            LongVUVisual(
                **{part: tensors[f"{part}.{i}"] for part in PARTS},
                num_frames=video["num_frames"],
                size=(video["width"], video["height"]),
                reduced=video["reduced"],
            )
            for i, video in enumerate(header["videos"])
        ]
        return cls(visuals, dict(header["key"]))
