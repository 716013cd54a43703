"""Streams of videos, kept for any number of questions, in memory or on disk.

Shapes: V visual tokens of a video, D language width.
"""

import os
from dataclasses import dataclass, field

import torch

from longvideo.modeling.layers.feature_files import hash_tensors, load_features, save_features, video_source_key
from longvideo.modeling.llava_st.vision_llava_st import LlavaSTVisionOutput

FORMAT = "longvideo.encoded_video_llava_st.v1"

__all__ = ["LlavaSTEncodedVideo", "hash_tensors", "video_source_key"]


@dataclass
class LlavaSTEncodedVideo:
    """Features of one or more videos as `generate` and `forward` take them.

    Args:
        features: per video (V, D), what the decoder gets: the fast stream, where it is spliced, then the slow one.
        num_frames: frames per video.
        key: what the features belong to: `pixels` (hash of the pixel values, so of content and processing), `model`
            (hash of the encoding weights and settings) and, when the caller gave one, `source`.
    """

    features: list[torch.Tensor]
    num_frames: list[int]
    key: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.features)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "LlavaSTEncodedVideo":
        """Returns a copy on another device or in another type."""
        moved = [x.to(device=device, dtype=dtype) for x in self.features]
        return LlavaSTEncodedVideo(moved, list(self.num_frames), dict(self.key))

    def as_output(self) -> LlavaSTVisionOutput:
        """Returns the features as `mm_encoder_outputs["video"]` holds them."""
        return LlavaSTVisionOutput(pooler_output=list(self.features))

    def save(self, folder: str | os.PathLike) -> None:
        """Writes `features.safetensors` and `encoded_video.json` into a folder, each under a temporary name first.

        Args:
            folder: made when absent; files of an earlier encoding are replaced.
        """
        tensors = {f"features.{i}": x for i, x in enumerate(self.features)}
        header = {"format": FORMAT, "key": self.key, "num_frames": self.num_frames, "num_videos": len(self)}
        save_features(folder, tensors, header)

    @classmethod
    def load(cls, folder: str | os.PathLike, key: dict[str, str] | None = None) -> "LlavaSTEncodedVideo":
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
        features = [tensors[f"features.{i}"] for i in range(header["num_videos"])]
        return cls(features, list(header["num_frames"]), dict(header["key"]))
