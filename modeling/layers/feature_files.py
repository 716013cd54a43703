"""Features of a video in a folder: written whole or not at all, read only when they are what the caller expects.

A folder holds `features.safetensors` and `encoded_video.json`, the header: format, what the features belong to (`key`)
and whatever the architecture adds.
"""

import functools
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

TENSORS = "features.safetensors"
HEADER = "encoded_video.json"
# 32-bit words whose sum is taken at once; another number gives other fingerprints.
PIECE = 1 << 18


def hash_tensors(*tensors: torch.Tensor) -> str:
    """Returns the SHA-256 of shapes, types and values of tensors."""
    digest = hashlib.sha256()
    for tensor in tensors:
        plain = tensor.detach().cpu().contiguous()
        digest.update(f"{tuple(plain.shape)} {plain.dtype} ".encode())
        digest.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@functools.lru_cache(maxsize=4)
def place_factors(device: torch.device) -> torch.Tensor:
    """Returns an odd number without a pattern for every place of a piece, (PIECE,) int64, by multiplying twice."""
    places = torch.arange(1, PIECE + 1, dtype=torch.int64, device=device) * -7046029254386353131
    return ((places ^ (places >> 29)) * -4658895280553007687) | 1


def fingerprint(tensor: torch.Tensor) -> list[int]:
    """Sums up a tensor's bits where it lies, so that weights on a GPU stay there.

    Args:
        tensor: any shape and type.

    Returns:
        For every `PIECE` of 32-bit words the sum of word times an odd number that belongs to its place, modulo 2**64:
        the same on every device, and another one when any single word changes.
    """
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    words = F.pad(data, (0, -len(data) % 4)).view(torch.int32)
    factors = place_factors(words.device)
    # int64 wraps around on every device.
    return torch.stack([(part.long() * factors[: len(part)]).sum() for part in words.split(PIECE)]).tolist()


def encoding_tensors(*parts: nn.Module | torch.Tensor | None) -> Iterator[torch.Tensor]:
    """Yields parameters and stored buffers of modules, adapters included, and the tensors among the parts."""
    for part in parts:
        if isinstance(part, nn.Module):
            yield from part.state_dict().values()
        elif part is not None:
            yield part


def hash_weights(settings: str, *parts: nn.Module | torch.Tensor | None) -> str:
    """Hashes settings and all weights of what encodes.

    Args:
        settings: what decides about features beside weights.
        *parts: modules and tensors, in a fixed order; None is passed over.

    Returns:
        SHA-256 over the settings, the state of adapters (which are on, and how strongly) and every weight's shape,
        type and values, the same on every device; of offloaded weights, on the meta device, no values. Files written
        when only the first weights of a tower counted carry another hash; their videos have to be encoded again.
    """
    digest = hashlib.sha256(settings.encode())
    for module in (m for part in parts if isinstance(part, nn.Module) for m in part.modules()):
        # Layers of PEFT; a model of transformers has methods of these names.
        if isinstance(getattr(module, "disable_adapters", None), bool):
            scaling = sorted(dict(getattr(module, "scaling", None) or {}).items())
            digest.update(f"{module.disable_adapters} {list(module.active_adapters)} {scaling}".encode())
    for tensor in encoding_tensors(*parts):
        # Weights that accelerate keeps elsewhere until their layer runs have no values here.
        values = "elsewhere" if tensor.is_meta else fingerprint(tensor)
        digest.update(f"{tuple(tensor.shape)} {tensor.dtype} {values}".encode())
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


def feature_key(pixels: str, model: str, source: str | None = None) -> dict[str, str]:
    """Names what the features of videos belong to.

    Args:
        pixels: hash of the pixels.
        model: hash of the settings and weights that make features of them.
        source: name of the source and its settings, see `video_source_key`.

    Returns:
        The hashes by name; `source` only where there is one.
    """
    key = {"pixels": pixels, "model": model}
    return key if source is None else {**key, "source": source}


def check_encoded_video(
    key: Mapping[str, str],
    model_key: Callable[[], str],
    *,
    pixels: torch.Tensor | None = None,
    features: object | None = None,
) -> None:
    """Checks that an encoded video is this model's, and the only video input.

    Args:
        key: what its features belong to, see `feature_key`.
        model_key: gives the hash of this model's settings and weights; called only where one is stored.
        pixels: pixels of videos that were given beside it.
        features: other features of videos that were given beside it.

    Raises:
        ValueError: other video inputs were given, or another model encoded the video.
    """
    if pixels is not None or features is not None:
        raise ValueError("Both encoded_video and other video inputs were given; pass one of them.")
    stored = key.get("model")
    if stored is not None and stored != model_key():
        raise ValueError(
            "The encoded video was made by a model with other weights or settings than this one. Encode the video "
            "again with this model's encode_video."
        )


def save_features(folder: str | os.PathLike, tensors: dict[str, torch.Tensor], header: dict) -> None:
    """Writes tensors and header into a folder, each under a temporary name first.

    Args:
        folder: made when absent; files of an earlier encoding are replaced.
        tensors: by name, in the order in which they are hashed.
        header: JSON values; `format`, `key`, and what else `load_features` shall give back.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        save_file(tensors, Path(scratch, TENSORS))
        header = {**header, "names": list(tensors), "tensors": hash_tensors(*tensors.values())}
        Path(scratch, HEADER).write_text(json.dumps(header, indent=1) + "\n")
        for name in (TENSORS, HEADER):
            os.replace(Path(scratch, name), folder / name)


def load_features(
    folder: str | os.PathLike, data_format: str, *, key: dict[str, str] | None = None
) -> tuple[dict[str, torch.Tensor], dict]:
    """Reads what `save_features` wrote.

    Args:
        folder: folder of `save_features`.
        data_format: format that the header must name.
        key: entries that must agree with the stored key.

    Returns:
        Tensors on the CPU and the header.

    Raises:
        FileNotFoundError: no encoding in that folder.
        ValueError: another format, damaged files, or a key that does not agree; the features would belong to another
            video, other settings or another model.
    """
    folder = Path(folder)
    if not (folder / HEADER).is_file():
        raise FileNotFoundError(f"No encoded video in {folder}: {HEADER} is missing.")
    try:
        header = json.loads((folder / HEADER).read_text())
        if header.get("format") != data_format:
            raise ValueError(f"format {header.get('format')!r} instead of {data_format!r}")
        tensors = load_file(folder / TENSORS)
        if hash_tensors(*(tensors[name] for name in header["names"])) != header["tensors"]:
            raise ValueError("the tensors are not those that the header describes")
        stored_key = dict(header["key"])
    except (ValueError, KeyError, OSError, SafetensorError) as error:
        raise ValueError(f"The encoded video in {folder} cannot be read: {error}. Encode the video again.") from error
    for name, wanted in (key or {}).items():
        if stored_key.get(name) != wanted:
            raise ValueError(
                f"The encoded video in {folder} belongs to another {name}: stored {stored_key.get(name)}, expected "
                f"{wanted}. Encode the video again with the settings and the model of now."
            )
    return tensors, header
