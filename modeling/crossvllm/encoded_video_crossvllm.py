"""Patches of videos, kept for any number of questions in both granularities, in memory or on disk.

Shapes: T frames of a video, P patches of a frame as they are kept, E vision width.
"""

import os
from dataclasses import dataclass, field

import torch

from longvideo.modeling.layers.feature_files import hash_tensors, load_features, save_features, video_source_key

FORMAT = "longvideo.encoded_video_crossvllm.v1"

__all__ = ["CrossVLLMEncodedVideo", "hash_tensors", "video_source_key"]


@dataclass
class CrossVLLMEncodedVideo:
    """What the tower saw in one or more videos, as `generate` and `forward` take it in either granularity.

    Args:
        features: per video (T, P, E), before the pooling and the projector of a granularity.
        num_frames: frames per video.
        key: what the features belong to: `pixels` (hash of the pixel values, so of content and processing), `model`
            (hash of the tower's weights and settings) and, when the caller gave one, `source`.
    """

    features: list[torch.Tensor]
    num_frames: list[int]
    key: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.features)

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> "CrossVLLMEncodedVideo":
        """Returns a copy on another device or in another type."""
        features = [x.to(device=device, dtype=dtype) for x in self.features]
        return CrossVLLMEncodedVideo(features, list(self.num_frames), dict(self.key))

    def save(self, folder: str | os.PathLike) -> None:
        """Writes `features.safetensors` and `encoded_video.json` into a folder, each under a temporary name first.

        Args:
            folder: made when absent; files of an earlier encoding are replaced.
        """
        tensors = {f"features.{i}": x for i, x in enumerate(self.features)}
        save_features(folder, tensors, {"format": FORMAT, "key": self.key, "num_frames": self.num_frames})

    @classmethod
    def load(cls, folder: str | os.PathLike, key: dict[str, str] | None = None) -> "CrossVLLMEncodedVideo":
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
        num_frames = list(header["num_frames"])
        return cls([tensors[f"features.{i}"] for i in range(len(num_frames))], num_frames, dict(header["key"]))
