"""Visual features of videos, kept for any number of questions, in memory or on disk.

Shapes: V visual tokens of a video, D language width, K clips, P patches of a clip.
"""

import hashlib
import json
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

FORMAT = "longvideo.encoded_video.v1"


def hash_tensors(*tensors: torch.Tensor) -> str:
    """Returns the SHA-256 of shapes, types and values of tensors."""
    digest = hashlib.sha256()
    for tensor in tensors:
        plain = tensor.detach().cpu().contiguous()
        digest.update(f"{tuple(plain.shape)} {plain.dtype} ".encode())
        digest.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def video_source_key(path: str | os.PathLike, **settings: object) -> str:
    """Names a video file and the settings it is processed with, before anything is decoded.

    Args:
        path: video file.
        **settings: what decides the pixels: fps, num_frames, start and end in seconds, and so on; JSON values.

    Returns:
        SHA-256 over the file's bytes and the settings.

    Raises:
        FileNotFoundError: no such file.
    """
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


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

    def save(self, folder: str | os.PathLike) -> None:
        """Writes `features.safetensors` and `encoded_video.json` into a folder, each under a temporary name first.

        Args:
            folder: made when absent; files of an earlier encoding are replaced.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"features.{i}": x.contiguous() for i, x in enumerate(self.features)}
        tensors |= {f"merge_groups.{i}": x.contiguous() for i, x in enumerate(self.merge_groups)}
        header = {"format": FORMAT, "key": self.key, "num_frames": self.num_frames, "num_videos": len(self)}
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            save_file(tensors, Path(scratch, "features.safetensors"))
            header["tensors"] = hash_tensors(*tensors.values())
            Path(scratch, "encoded_video.json").write_text(json.dumps(header, indent=1) + "\n")
            for name in ("features.safetensors", "encoded_video.json"):
                os.replace(Path(scratch, name), folder / name)

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
        folder = Path(folder)
        header_path = folder / "encoded_video.json"
        if not header_path.is_file():
            raise FileNotFoundError(f"No encoded video in {folder}: encoded_video.json is missing.")
        try:
            header = json.loads(header_path.read_text())
            if header.get("format") != FORMAT:
                raise ValueError(f"format {header.get('format')!r} instead of {FORMAT!r}")
            tensors = load_file(folder / "features.safetensors")
            count = header["num_videos"]
            names = [f"{part}.{i}" for part in ("features", "merge_groups") for i in range(count)]
            if hash_tensors(*(tensors[name] for name in names)) != header["tensors"]:
                raise ValueError("the tensors are not those that the header describes")
        except (ValueError, KeyError, OSError, SafetensorError) as error:
            raise ValueError(
                f"The encoded video in {folder} cannot be read: {error}. Encode the video again."
            ) from error
        for name, wanted in (key or {}).items():
            if header["key"].get(name) != wanted:
                raise ValueError(
                    f"The encoded video in {folder} belongs to another {name}: stored {header['key'].get(name)}, "
                    f"expected {wanted}. Encode the video again with the settings and the model of now."
                )
        return cls(
            [tensors[f"features.{i}"] for i in range(count)],
            [tensors[f"merge_groups.{i}"] for i in range(count)],
            list(header["num_frames"]),
            dict(header["key"]),
        )
