"""Videos that a frozen encoder encodes once: features on disk in place of decoding and encoding in every epoch.

A folder of the store holds one folder for every state of the encoder, named by its settings and weights, and in it one
folder per video and way of reading it, with what `encode_video(...).save` writes and `sample.json`: what the video
processor said of the video beside its pixels. Folders are written under a temporary name and renamed.
"""

import copy
import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import torch
from torch import nn
from transformers.feature_extraction_utils import BatchFeature
from transformers.utils import logging

from longvideo.modeling.layers.feature_files import TENSORS, hash_tensors
from longvideo.processing.shared.video_io import SourceVideoMetadata
from longvideo.processing.shared.video_options import list_sources
from longvideo.processing.shared.video_sources import is_remote, local_path
from longvideo.trainers.freezing import part_of

logger = logging.get_logger(__name__)
SAMPLE = "sample.json"
# Modules whose weights an encoded video depends on, where they are not exactly tower and connector: LongVU's features
# are kept in front of its last projector, those of CrossVLLM in front of both of its, and those of LLaVA-ST hold
# position embeddings made of rows of its tables.
ENCODER_MODULES: dict[str, tuple[str, ...]] = {
    "longvu": ("vision_tower", "dino_tower", "vision_projectors", "vision_sampler", "vision_query"),
    "llava_st": ("vision_tower", "multi_modal_projector", "packer", "coordinates", "embed_tokens", "lm_head"),
    "crossvllm": ("vision_tower",),
}
# What changes how a video is shown or how fast it is read, but not its pixels.
_NO_PIXELS = ("return_tensors", "return_metadata", "progress", "num_threads", "device")
# Options of a call with one entry per video.
_PER_VIDEO = ("split",)


def encoder_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """List the parameters that encoded videos depend on.

    Args:
        model: Model with `encode_video`, or a wrapper whose parameter names end in the model's.

    Returns:
        Parameters by name.
    """
    modules = ENCODER_MODULES.get(getattr(model.config, "model_type", ""))
    if modules is None:
        return {n: p for n, p in model.named_parameters() if part_of(n) in ("vision_tower", "connector")}
    return {n: p for n, p in model.named_parameters() if not set(modules).isdisjoint(n.split("."))}


def check_frozen_encoder(model: nn.Module) -> None:
    """Check that encoded videos stay right while the model learns.

    Args:
        model: Model, after what does not learn was frozen.

    Raises:
        ValueError: It cannot encode videos apart, or a weight that they depend on learns.
    """
    if not hasattr(model, "encode_video"):
        raise ValueError(
            f"encoded_features_dir needs a model with encode_video, and {type(model).__name__} has none. Leave it out."
        )
    learning = [name for name, parameter in encoder_parameters(model).items() if parameter.requires_grad]
    if learning:
        raise ValueError(
            f"encoded_features_dir keeps what the model makes of videos, but {len(learning)} parameters on the way "
            f"learn, first {learning[0]!r}: stored features would be those of old weights and pass no gradient on. "
            "Freeze tower and connector (trainable_parts=['language_model'], or an adapter of the language model), or "
            "leave encoded_features_dir out."
        )


class FeatureStore:
    """Folder with encoded videos of one state of a model's encoder.

    Args:
        folder: The folder that the user named; made when absent.
        model: Model whose encoder is frozen.

    Raises:
        ValueError: See `check_frozen_encoder`.
    """

    def __init__(self, folder: str | os.PathLike, model: nn.Module) -> None:
        check_frozen_encoder(model)
        self.encoded_class = get_type_hints(type(model).encode_video)["return"]
        self.model_key = model.encoding_key()
        state = hashlib.sha256(f"{type(model).__name__} {self.model_key}".encode()).hexdigest()
        self.folder = Path(folder) / state[:16]
        self.folder.mkdir(parents=True, exist_ok=True)

    def find(self, name: str, stamp: str) -> dict[str, Any] | None:
        """Look up what the processor said of a video.

        Args:
            name: Name of the video and the way it is read, see `video_name`.
            stamp: State of its file, see `source_stamp`.

        Returns:
            The contents of `sample.json`; None when there is no entry, or one of an older or damaged state.
        """
        file = self.folder / name / SAMPLE
        try:
            sample = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError:
            logger.warning(f"{file} is damaged; its video is encoded again.")
            return None
        features = self.folder / name / TENSORS
        if not features.is_file() or features.stat().st_size != sample.get("num_bytes"):
            logger.warning(f"{features} is not as it was written; its video is encoded again.")
            return None
        if sample.get("stamp") != stamp:
            logger.warning(f"The video of {file} has changed since it was encoded; it is encoded again.")
            return None
        return sample

    def load(self, name: str) -> Any:
        """Read an encoded video.

        Args:
            name: Name of an entry that `find` found.

        Returns:
            The architecture's encoded video, on the CPU.

        Raises:
            ValueError: Damaged files, or another model's.
        """
        return self.encoded_class.load(self.folder / name, key={"model": self.model_key})

    def save(self, name: str, encoded: Any, sample: Mapping[str, Any]) -> None:
        """Write an encoded video as a whole.

        Args:
            name: Name of the entry.
            encoded: What `encode_video` returned.
            sample: Contents of `sample.json`.
        """
        scratch = Path(tempfile.mkdtemp(prefix=".", dir=self.folder))
        try:
            encoded.save(scratch)
            sample = {**sample, "num_bytes": (scratch / TENSORS).stat().st_size}
            (scratch / SAMPLE).write_text(json.dumps(sample) + "\n", encoding="utf-8")
            final = self.folder / name
            if final.exists():
                old = Path(tempfile.mkdtemp(prefix=".", dir=self.folder))
                os.replace(final, old / name)
                shutil.rmtree(old, ignore_errors=True)
            os.replace(scratch, final)
        except OSError:
            # Another process may have been faster; then its entry stands.
            if self.find(name, sample["stamp"]) is None:
                raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def stand_in(self, processor: Any) -> Any:
        """Copy a processor, with a video processor that reads no video whose features are stored.

        Args:
            processor: Processor of the model; not changed.

        Returns:
            The copy; `video_processor.entries` lists the videos of its last call.
        """
        other = copy.copy(processor)
        other.video_processor = StoredVideos(processor.video_processor, self)
        return other


@dataclasses.dataclass
class VideoEntry:
    """A video of a batch: its features, or the pixels to make them of.

    Args:
        name: Name of the entry in the store.
        sample: Contents of `sample.json`.
        encoded: The architecture's encoded video, or None.
        pixels: What `encode_video` takes, or None.
    """

    name: str
    sample: dict[str, Any]
    encoded: Any = None
    pixels: dict[str, torch.Tensor] | None = None

    @property
    def num_frames(self) -> int:
        """Frames of the video."""
        return self.sample["num_frames"]

    def to(self, device: torch.device | str | None = None) -> "VideoEntry":
        """Returns a copy on another device."""
        pixels = self.pixels and {name: value.to(device) for name, value in self.pixels.items()}
        encoded = None if self.encoded is None else self.encoded.to(device)
        return VideoEntry(self.name, self.sample, encoded, pixels)


class StoredVideos:
    """Takes the place of a video processor; it says of stored videos what was said when they were encoded.

    Args:
        video_processor: The video processor whose place is taken.
        store: Where encoded videos are.
    """

    def __init__(self, video_processor: Any, store: FeatureStore) -> None:
        self.video_processor, self.store = video_processor, store
        self.entries: list[VideoEntry] = []
        self.names: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        # Asked for before __init__ ran, as copies do, there is nothing to ask.
        if name in ("video_processor", "store", "entries", "names"):
            raise AttributeError(name)
        return getattr(self.video_processor, name)

    def __call__(self, videos: Any, **kwargs: Any) -> BatchFeature:
        """Answer as the video processor does, with pixels that take no memory in place of those of stored videos.

        Args:
            videos: One video or nested lists of them.
            **kwargs: Options of the video processor.

        Returns:
            Its output; pixels have their shapes and no meaning.
        """
        sources = list_sources(
            videos, metadata=kwargs.pop("video_metadata", None), options=kwargs.pop("video_options", None)
        )
        self.entries = []
        for index, (source, facts, own) in enumerate(sources):
            call = {name: _of_video(value, index, len(sources), name) for name, value in kwargs.items()}
            self.entries.append(self._entry(source, facts, own, call))
        outputs = [_shown(entry.sample) for entry in self.entries]
        joined = _joined(outputs)
        self.names = set(joined) - {"video_metadata"}
        return BatchFeature(joined)

    def load_entries(self) -> list[VideoEntry]:
        """Returns the videos of the last call, with features where the store has them."""
        return [
            entry if entry.pixels is not None else dataclasses.replace(entry, encoded=self.store.load(entry.name))
            for entry in self.entries
        ]

    def _entry(self, source: Any, facts: Any, own: dict[str, Any], call: dict[str, Any]) -> VideoEntry:
        name, stamp = video_name(source, facts, own, call, self.video_processor), source_stamp(source)
        sample = self.store.find(name, stamp)
        if sample is not None:
            return VideoEntry(name, sample)
        outputs = self.video_processor(
            [[source]],
            video_metadata=None if facts is None else [facts],
            video_options=[own],
            **{**call, "return_metadata": True, "return_tensors": "pt"},
        )
        metadata = outputs.pop("video_metadata")[0]
        sample = {
            "stamp": stamp,
            "outputs": {key: _described(key, value) for key, value in outputs.items()},
            "num_frames": len(metadata.frames_indices),
            "metadata": _plain(metadata),
        }
        return VideoEntry(name, sample, pixels=dict(outputs))


def video_name(
    source: Any, facts: Any, options: Mapping[str, Any], call: Mapping[str, Any], video_processor: Any
) -> str:
    """Name a video and the way it is read.

    Args:
        source: Path, address, list of paths, or array of frames.
        facts: Metadata that came with it, or None.
        options: Wishes of this video.
        call: Wishes of the call.
        video_processor: The video processor.

    Returns:
        32 hexadecimal digits; arrays are named by their contents, files by their paths.
    """
    settings = {
        "source": _plain_source(source),
        "facts": _plain(facts),
        "options": dict(options),
        "call": {key: value for key, value in call.items() if key not in _NO_PIXELS},
        "processor": {k: v for k, v in video_processor.to_dict().items() if k not in _NO_PIXELS},
    }
    text = json.dumps(settings, sort_keys=True, default=_plain)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def source_stamp(source: Any) -> str:
    """Describe the state of a video's files, so that a changed one is noticed.

    Args:
        source: Path, address, list of paths, or array of frames.

    Returns:
        Sizes and times of change; "" for addresses, arrays and files that are not there.
    """
    paths = list(source) if isinstance(source, list | tuple) else [source]
    stamps = []
    for path in paths:
        if not isinstance(path, str | os.PathLike) or is_remote(path):
            continue
        file = _file_of(path)
        if file is not None and file.is_dir():
            stamps += [_stamp_of(entry) for entry in sorted(file.iterdir())]
        elif file is not None:
            stamps.append(_stamp_of(file))
    return hashlib.sha256(" ".join(stamps).encode()).hexdigest() if stamps else ""


def _file_of(source: str | os.PathLike) -> Path | None:
    """The file as the reader of videos finds it, None where there is none."""
    try:
        return local_path(source)
    except FileNotFoundError:
        return None


def _stamp_of(file: Path) -> str:
    facts = file.stat()
    return f"{file.name} {facts.st_size} {facts.st_mtime_ns}"


def _plain_source(source: Any) -> Any:
    if isinstance(source, np.ndarray | torch.Tensor):
        return hash_tensors(torch.as_tensor(source))
    if isinstance(source, list | tuple):
        return [_plain_source(entry) for entry in source]
    return source if is_remote(source) else os.path.abspath(_file_of(source) or str(source))


def _plain(value: Any) -> Any:
    """Turn a value into what JSON knows."""
    if isinstance(value, np.ndarray | torch.Tensor | np.generic):
        return value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, str | int | float | bool | type(None)):
        return value
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return {str(k): _plain(v) for k, v in value.items()} if isinstance(value, Mapping) else str(value)


def _of_video(value: Any, index: int, count: int, name: str) -> Any:
    if name in _PER_VIDEO and isinstance(value, list) and len(value) == count:
        return [value[index]]
    return value


def _described(key: str, value: torch.Tensor) -> dict[str, Any]:
    described = {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
    return described if key.startswith("pixel_values") else {**described, "data": value.tolist()}


def _shown(sample: Mapping[str, Any]) -> dict[str, Any]:
    shown: dict[str, Any] = {}
    for key, described in sample["outputs"].items():
        dtype = getattr(torch, described["dtype"])
        data = described.get("data")
        shown[key] = (
            torch.zeros(1, dtype=dtype).expand(described["shape"])
            if data is None
            else torch.tensor(data, dtype=dtype).reshape(described["shape"])
        )
    shown["video_metadata"] = [SourceVideoMetadata(**sample["metadata"])]
    return shown


def _joined(outputs: list[dict[str, Any]]) -> dict[str, Any]:
    """Lay out what was said of each video as the video processors lay out the videos of a call."""
    joined: dict[str, Any] = {"video_metadata": [facts for output in outputs for facts in output["video_metadata"]]}
    pixels = [output["pixel_values_videos"] for output in outputs]
    if pixels[0].ndim == 5 and len({tuple(video.shape) for video in pixels}) > 1:
        # (1, F, C, H, W) of unequal lengths become flat frames with counts.
        counts = [video.shape[1] for video in pixels]
        outputs = [{**output, "pixel_values_videos": output["pixel_values_videos"][0]} for output in outputs]
        joined["video_num_frames"] = torch.tensor(counts, dtype=torch.int64)
    for key in outputs[0]:
        if key != "video_metadata":
            values = [output[key] for output in outputs]
            if key.startswith("pixel_values"):
                length = sum(value.shape[0] for value in values)
                joined[key] = values[0][:1].expand(length, *values[0].shape[1:])
            else:
                joined[key] = torch.cat(values)
    return joined


def join_encoded(encoded: list[Any]) -> Any:
    """Put the encoded videos of a batch one after another.

    Args:
        encoded: Encoded videos of one architecture, in the order of their placeholders.

    Returns:
        One encoded video of that architecture with all of them.
    """
    first = encoded[0]
    values = {}
    for field in dataclasses.fields(first):
        parts = [getattr(one, field.name) for one in encoded]
        values[field.name] = [entry for part in parts for entry in part] if isinstance(parts[0], list) else parts[0]
    return type(first)(**values)


def encode_entry(model: nn.Module, entry: VideoEntry, store: FeatureStore) -> Any:
    """Encode a video and keep its features.

    Args:
        model: Model with `encode_video`.
        entry: Video with pixels.
        store: Where the features go.

    Returns:
        The architecture's encoded video.
    """
    was_training = model.training
    model.eval()
    try:
        pixels = {name: value.to(model.device) for name, value in entry.pixels.items()}
        encoded = model.encode_video(**pixels)
    finally:
        model.train(was_training)
    store.save(entry.name, encoded, entry.sample)
    return encoded
