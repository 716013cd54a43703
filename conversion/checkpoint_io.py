"""Reading and writing checkpoint files one tensor at a time.

The safetensors layout (8 bytes header length, JSON header, raw data) is read and written here directly: the library's
`save_file` needs every tensor of a file in memory at once and its reader keeps the pages of the whole file mapped,
while a converter should hold one tensor.
"""

import json
import math
import os
import pickle
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

SAFETENSORS_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_CODES: dict[torch.dtype, str] = {dtype: code for code, dtype in SAFETENSORS_DTYPES.items()}
MAX_HEADER_BYTES = 100_000_000
WEIGHT_LAYOUTS = (
    ("model.safetensors.index.json", "model.safetensors", r"model-(\d{5})-of-(\d{5})\.safetensors"),
    ("pytorch_model.bin.index.json", "pytorch_model.bin", r"pytorch_model-(\d{5})-of-(\d{5})\.bin"),
)


@dataclass(frozen=True)
class TensorInfo:
    """What the header says about one stored tensor (`dtype` is the safetensors code, such as BF16)."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: str

    @property
    def numel(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes."""
        return self.numel * SAFETENSORS_DTYPES[self.dtype].itemsize


class TensorFile(Protocol):
    """One weight file: its tensors' headers, and each tensor on request."""

    infos: dict[str, TensorInfo]

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor."""

    def close(self) -> None:
        """Free the file."""


class SafetensorsFile:
    """A safetensors file whose tensors are read one by one into fresh memory.

    Args:
        path: The file.

    Raises:
        ValueError: if the file is not safetensors, is cut short, or has a damaged header.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.infos: dict[str, TensorInfo] = {}
        self.offsets: dict[str, int] = {}
        self.handle = open(path, "rb")  # noqa: SIM115 (closed by close)
        try:
            self.read_header()
        except ValueError:
            self.handle.close()
            raise

    def read_header(self) -> None:
        """Fill `infos` and `offsets` and check them against the size of the file."""
        size = os.path.getsize(self.path)
        length = int.from_bytes(self.handle.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise ValueError(
                f"{self.path} is not a safetensors file ({size} bytes; its header would be {length} bytes). "
                "Expected a file written by safetensors; a Git LFS pointer or a cut download looks like this: "
                "fetch the file again."
            )
        try:
            header = json.loads(self.handle.read(length))
            header.pop("__metadata__", None)
            entries = {name: (e["dtype"], tuple(e["shape"]), *e["data_offsets"]) for name, e in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{self.path} is not a safetensors file: its header is not readable ({error}). Fetch the file again."
            ) from error
        for name, (dtype, shape, start, end) in entries.items():
            if dtype not in SAFETENSORS_DTYPES:
                raise ValueError(f"{self.path}: tensor {name} has dtype {dtype}, which this converter cannot read.")
            info = TensorInfo(name, shape, dtype, self.path.name)
            if end - start != info.nbytes or start < 0:
                raise ValueError(f"{self.path}: damaged header, {name} {list(shape)} {dtype} has {end - start} bytes.")
            if 8 + length + end > size:
                raise ValueError(
                    f"{self.path} is cut short: {name} ends at byte {8 + length + end} of a file of {size} bytes. "
                    "Fetch the file again."
                )
            self.infos[name] = info
            self.offsets[name] = 8 + length + start

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor in memory of its own.

        Args:
            name: A key of `infos`.

        Returns:
            The tensor, contiguous, on the CPU.
        """
        info = self.infos[name]
        buffer = torch.empty(info.nbytes, dtype=torch.uint8)
        self.handle.seek(self.offsets[name])
        if self.handle.readinto(memoryview(buffer.numpy())) != info.nbytes:
            raise ValueError(f"{self.path} is cut short while reading {name}.")
        return buffer.view(SAFETENSORS_DTYPES[info.dtype]).reshape(info.shape)

    def close(self) -> None:
        """Close the file."""
        self.handle.close()


def unpickle(path: Path) -> Any:
    """Read a torch file with weights only, mapped where the file format allows it.

    Args:
        path: The file.

    Returns:
        What it holds.

    Raises:
        ValueError: if the pickle asks to run code, or the file is no torch file.
    """
    try:
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap can only be used" not in str(error):
                raise
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds more than tensors (the pickle asks to run code or to build other objects) and was "
            "not loaded. Expected a plain state dict; get the safetensors version, or re-save only the tensors "
            "on a machine where you trust the file."
        ) from error
    except (RuntimeError, EOFError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} is not a readable torch file ({reason}). Fetch the file again.") from error


def require_state_dict(state: Any, path: Path) -> dict[str, torch.Tensor]:
    """Return a state dict after checking that it is one.

    Args:
        state: What a torch file holds.
        path: The file, for the message.

    Returns:
        The same object.

    Raises:
        ValueError: if it is anything but names to tensors.
    """
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError(
            f"{path} is not a state dict (names to tensors); training states and wrapped checkpoints are not "
            "read. Give the folder with the model's own weight files."
        )
    return state


class BinFile:
    """A torch `.bin` state dict, memory mapped and unpickled with weights only (code in the pickle is refused).

    Args:
        path: The file.

    Raises:
        ValueError: if the file holds anything but tensors, or is no torch file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.state = self.load()
        self.infos = {
            name: TensorInfo(name, tuple(tensor.shape), DTYPE_CODES[tensor.dtype], path.name)
            for name, tensor in self.state.items()
        }

    def load(self) -> dict[str, torch.Tensor]:
        """Return the state dict, mapped where the file format allows it."""
        return require_state_dict(unpickle(self.path), self.path)

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor.

        Args:
            name: A key of `infos`.

        Returns:
            The tensor, contiguous, on the CPU.
        """
        return self.state[name].detach().contiguous()

    def close(self) -> None:
        """Drop the mapping."""
        self.state = {}


class Checkpoint:
    """The weight files of a folder as one mapping from tensor name to header; one file is open at a time.

    Args:
        folder: A folder with `model.safetensors`, `pytorch_model.bin`, or shards of either with their index.

    Raises:
        FileNotFoundError: if there are no weights or a shard is missing.
        ValueError: if a file is damaged, a tensor is stored twice, or index and files disagree.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files, indexed = find_weight_files(folder)
        self.current: tuple[str, TensorFile] | None = None
        self.infos: dict[str, TensorInfo] = {}
        for file in self.files:
            for name, info in self.open(file).infos.items():
                if name in self.infos:
                    raise ValueError(f"{folder}: tensor {name} is stored in both {self.infos[name].file} and {file}.")
                self.infos[name] = info
        absent = sorted(set(indexed) - set(self.infos))
        if absent:
            raise ValueError(
                f"{folder}: the index names {len(absent)} tensors that are not in the files it gives: "
                f"{', '.join(absent[:5])}{' ...' if len(absent) > 5 else ''}. Fetch the shards again."
            )

    def open(self, file: str) -> TensorFile:
        """Make `file` the open file.

        Args:
            file: A name from `files`.

        Returns:
            The open file.
        """
        if self.current is None or self.current[0] != file:
            self.close()
            path = self.folder / file
            self.current = (file, SafetensorsFile(path) if file.endswith(".safetensors") else BinFile(path))
        return self.current[1]

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor.

        Args:
            name: A key of `infos`.

        Returns:
            The tensor on the CPU.
        """
        return self.open(self.infos[name].file).read(name)

    def close(self) -> None:
        """Close the open file."""
        if self.current is not None:
            self.current[1].close()
            self.current = None

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def find_weight_files(folder: Path) -> tuple[list[str], list[str]]:
    """Find the weight files of a folder, safetensors before `.bin`.

    Args:
        folder: The folder.

    Returns:
        The file names, and the tensor names of the index (empty without an index).

    Raises:
        FileNotFoundError: if there are no weights, or shards are missing.
    """
    for index_name, single, pattern in WEIGHT_LAYOUTS:
        if (folder / index_name).is_file():
            weight_map = read_json(folder / index_name).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise ValueError(
                    f"{folder / index_name} has no weight_map; expected the index of a sharded checkpoint."
                )
            files = sorted(set(weight_map.values()))
            require_shards(folder, files)
            return files, list(weight_map)
        if (folder / single).is_file():
            return [single], []
        matches = [m for m in (re.fullmatch(pattern, path.name) for path in sorted(folder.iterdir())) if m]
        if matches:
            template, total = matches[0].group(0), matches[0].group(2)
            start = matches[0].start(1)
            files = [template[:start] + f"{i:05d}" + template[start + 5 :] for i in range(1, int(total) + 1)]
            require_shards(folder, files)
            return files, []
    if (folder / "adapter_config.json").is_file():
        raise FileNotFoundError(
            f"{folder} holds a LoRA adapter, no model weights. Merge it into its base model with peft "
            "(merge_and_unload) and save that first. (A stage of LLaVA-ST: convert the stage-1 model, and give this "
            "folder with --lora-stages.)"
        )
    raise FileNotFoundError(
        f"{folder} has no weights: expected model.safetensors, pytorch_model.bin or shards of either with their index."
    )


def require_shards(folder: Path, files: list[str]) -> None:
    """Raise FileNotFoundError naming every file that is not in the folder.

    Args:
        folder: The folder.
        files: File names; each must be a plain name.
    """
    for file in files:
        if Path(file).name != file:
            raise ValueError(f"{folder}: the index names {file!r}; expected file names inside the folder only.")
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{folder}: {len(missing)} of {len(files)} weight files are missing: {', '.join(missing)}. "
            "Fetch them into the folder and convert again."
        )


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Args:
        path: The file.

    Returns:
        The object.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not a JSON object.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} has no {path.name}; expected a checkpoint folder as published.")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}; expected a JSON object.")
    return value


def write_safetensors(path: Path, infos: list[TensorInfo], tensors: Iterator[torch.Tensor]) -> None:
    """Write a safetensors file tensor by tensor; only the header is known in advance.

    Args:
        path: The file to write.
        infos: Name, shape and dtype of every tensor, in writing order. Wider dtypes must come first, which keeps
            every tensor aligned (see `alignment_order`).
        tensors: The tensors in the same order.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for info in infos:
        header[info.name] = {
            "dtype": info.dtype,
            "shape": list(info.shape),
            "data_offsets": [offset, offset + info.nbytes],
        }
        offset += info.nbytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with open(path, "wb") as handle:
        handle.write(len(encoded).to_bytes(8, "little") + encoded)
        for info in infos:
            tensor = next(tensors)
            assert tuple(tensor.shape) == info.shape and DTYPE_CODES[tensor.dtype] == info.dtype
            handle.write(memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy()))
            # Otherwise this tensor would still be in memory while the next one is read.
            del tensor
        handle.flush()
        os.fsync(handle.fileno())


def alignment_order(infos: list[TensorInfo]) -> list[TensorInfo]:
    """Return the tensors with wider dtypes first, otherwise in the given order.

    Args:
        infos: Tensors of one file.

    Returns:
        The same tensors in writing order.
    """
    return sorted(infos, key=lambda info: -SAFETENSORS_DTYPES[info.dtype].itemsize)


def split_shards(infos: list[TensorInfo], max_bytes: int, stem: str = "model") -> dict[str, list[TensorInfo]]:
    """Split tensors into files of at most `max_bytes` (a larger tensor gets a file of its own).

    Args:
        infos: All tensors, in order.
        max_bytes: Largest size of a file's data in bytes.
        stem: First part of the file names.

    Returns:
        File name to tensors, named as Transformers names shards.
    """
    shards: list[list[TensorInfo]] = [[]]
    filled = 0
    for info in infos:
        if shards[-1] and filled + info.nbytes > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(info)
        filled += info.nbytes
    if len(shards) == 1:
        return {f"{stem}.safetensors": shards[0]}
    return {f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors": part for i, part in enumerate(shards, 1)}


def write_index(folder: Path, shards: dict[str, list[TensorInfo]]) -> None:
    """Write `model.safetensors.index.json` when there is more than one file.

    Args:
        folder: Where the files are.
        shards: File name to tensors.
    """
    if len(shards) == 1 and "model.safetensors" in shards:
        return
    weight_map = {info.name: file for file, infos in shards.items() for info in infos}
    infos = [info for part in shards.values() for info in part]
    index = {
        "metadata": {"total_size": sum(i.nbytes for i in infos), "total_parameters": sum(i.numel for i in infos)},
        "weight_map": dict(sorted(weight_map.items())),
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
