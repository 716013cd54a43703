"""Visual features of videos, kept for any number of questions, in memory or on disk.

Shapes: V visual tokens of a video, D language width, K clips, P patches of a clip.
"""

import os
from dataclasses import dataclass, field

import torch

from longvideo.modeling.layers.feature_files import hash_tensors, load_features, save_features, video_source_key
from longvideo.modeling.videochat_flash.vision_videochat_flash import VideoChatFlashVisionOutput

FORMAT = "longvideo.encoded_video.v1"

__all__ = ["EncodedVideo", "hash_tensors", "video_source_key"]


@dataclass
class EncodedVideo:
    """Features of one or more videos as `generate` and `forward` take them.

    Args:
        features: per video (V, D), what the decoder gets.
        merge_groups: per video (K, P) int64, merged token of every patch.
        num_frames: frames per video.
        key: what the features belong to: `pixels` (hash of the pixel values, so of content and processing), `model`
            (hash of the encoding weights and settings) and, when the caller gave one, `source`.
    """

    features: list[torch.Tensor]
    merge_groups: list[torch.Tensor]
    num_frames: list[int]
    key: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.features)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "EncodedVideo":
        """Returns a copy on another device or in another type."""
        return EncodedVideo(
            [x.to(device=device, dtype=dtype) for x in self.features],
            [x.to(device=device) for x in self.merge_groups],
            list(self.num_frames),
            dict(self.key),
        )

    def as_output(self) -> VideoChatFlashVisionOutput:
        """Returns the features as `mm_encoder_outputs["video"]` holds them."""
        return VideoChatFlashVisionOutput(pooler_output=list(self.features), merge_groups=list(self.merge_groups))

    def save(self, folder: str | os.PathLike) -> None:
        """Writes `features.safetensors` and `encoded_video.json` into a folder, each under a temporary name first.

        Args:
            folder: made when absent; files of an earlier encoding are replaced.
        """
        tensors = {f"features.{i}": x for i, x in enumerate(self.features)}
        tensors |= {f"merge_groups.{i}": x for i, x in enumerate(self.merge_groups)}
        header = {"format": FORMAT, "key": self.key, "num_frames": self.num_frames, "num_videos": len(self)}
        save_features(folder, tensors, header)

    @classmethod
    def load(cls, folder: str | os.PathLike, key: dict[str, str] | None = None) -> "EncodedVideo":
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
        return cls(
            [tensors[f"features.{i}"] for i in range(count)],
            [tensors[f"merge_groups.{i}"] for i in range(count)],
            list(header["num_frames"]),
            dict(header["key"]),
        )
