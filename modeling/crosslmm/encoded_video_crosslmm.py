"""Features of videos, kept for any number of questions, in memory or on disk.

Shapes: V visual tokens of a video, T frames of it, N original tokens of a frame, D language width, E vision width.
"""

import os
from dataclasses import dataclass, field

import torch

from longvideo.modeling.crosslmm.vision_crosslmm import CrossLMMVisionOutput
from longvideo.modeling.layers.feature_files import hash_tensors, load_features, save_features, video_source_key

FORMAT = "longvideo.encoded_video_crosslmm.v1"

__all__ = ["CrossLMMEncodedVideo", "hash_tensors", "video_source_key"]


@dataclass
class CrossLMMEncodedVideo:
    """Features of one or more videos as `generate` and `forward` take them.

    Args:
        features: per video (V, D), the merged tokens that the decoder gets.
        memory: per video (T * N, D or E), the original tokens that cross-attention reads; None for a model without
            cross-attention. It is by far the larger part.
        num_frames: frames per video.
        key: what the features belong to: `pixels` (hash of the pixel values, so of content and processing), `model`
            (hash of the encoding weights and settings) and, when the caller gave one, `source`.
    """

    features: list[torch.Tensor]
    memory: list[torch.Tensor] | None
    num_frames: list[int]
    key: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.features)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "CrossLMMEncodedVideo":
        """Returns a copy on another device or in another type."""
        features = [x.to(device=device, dtype=dtype) for x in self.features]
        memory = None if self.memory is None else [x.to(device=device, dtype=dtype) for x in self.memory]
        return CrossLMMEncodedVideo(features, memory, list(self.num_frames), dict(self.key))

    def as_output(self) -> CrossLMMVisionOutput:
        """Returns the features as `mm_encoder_outputs["video"]` holds them."""
        memory = None if self.memory is None else list(self.memory)
        return CrossLMMVisionOutput(pooler_output=list(self.features), memory=memory, num_frames=list(self.num_frames))

    def save(self, folder: str | os.PathLike) -> None:
        """Writes `features.safetensors` and `encoded_video.json` into a folder, each under a temporary name first.

        Args:
            folder: made when absent; files of an earlier encoding are replaced.
        """
        tensors = {f"features.{i}": x for i, x in enumerate(self.features)}
        tensors |= {f"memory.{i}": x for i, x in enumerate(self.memory or [])}
        header = {"format": FORMAT, "key": self.key, "num_frames": self.num_frames, "num_videos": len(self)}
        save_features(folder, tensors, {**header, "has_memory": self.memory is not None})

    @classmethod
    def load(cls, folder: str | os.PathLike, key: dict[str, str] | None = None) -> "CrossLMMEncodedVideo":
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
        count = header["num_videos"]
        memory = [tensors[f"memory.{i}"] for i in range(count)] if header["has_memory"] else None
        features = [tensors[f"features.{i}"] for i in range(count)]
        return cls(features, memory, list(header["num_frames"]), dict(header["key"]))
