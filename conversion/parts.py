"""Checkpoints that an original reads beside its own, such as vision towers from repositories of their own.

A part's tensors go by the part's name, a slash and their own name, so that one key map covers everything.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from longvideo.conversion.checkpoint_io import Checkpoint, TensorInfo, read_json


@dataclass(frozen=True)
class Part:
    """A checkpoint beside the main one.

    Args:
        name: Sub-folder of the main checkpoint in which it is looked for and to which the way back writes it.
        option: Name of the argument that gives another folder.
        title: What it is, for messages.
        repository: Where it is published.
        inside: How names begin in the main checkpoint when that holds the part itself.
    """

    name: str
    option: str
    title: str
    repository: str
    inside: str

    @property
    def flag(self) -> str:
        """The argument on the command line."""
        return "--" + self.option.replace("_", "-")


def find_parts(known: tuple[Part, ...], source: Path, given: Mapping[str, Any], what: str) -> dict[str, Path]:
    """Find the folders of the parts.

    Args:
        known: The parts that the architecture can have.
        source: The main checkpoint.
        given: Folders by option; None counts as not given.
        what: The architecture, for messages.

    Returns:
        Part name to folder, for every part that was given or lies in the source.

    Raises:
        ValueError: if an option does not belong to the architecture or a path is not a folder.
        FileNotFoundError: if a given folder does not exist.
    """
    options = {part.option for part in known}
    for option, path in given.items():
        if path is not None and option not in options:
            flag = "--" + option.replace("_", "-")
            raise ValueError(f"{flag} was given, but a {what} checkpoint holds all its weights itself; leave it out.")
    found = {}
    for part in known:
        path = given.get(part.option)
        if path is None:
            if (source / part.name).is_dir():
                found[part.name] = source / part.name
            continue
        folder = Path(path).resolve()
        if not folder.exists():
            raise FileNotFoundError(
                f"{part.flag}: {path} does not exist. Expected the folder of the {part.title}; fetch it with "
                f"`hf download {part.repository} --local-dir FOLDER`."
            )
        if not folder.is_dir():
            raise ValueError(f"{part.flag}: {path} is a file; give the folder with config.json and the weights.")
        found[part.name] = folder
    return found


def check_part_folders(parts: Mapping[str, Path], destination: Path) -> None:
    """Raise ValueError if writing the destination would touch the folder of a part."""
    for name, folder in parts.items():
        if destination == folder or folder in destination.parents or destination in folder.parents:
            raise ValueError(
                f"the destination {destination} and the folder {folder} ({name}) lie in one another; choose another "
                "destination."
            )


def read_part_configs(parts: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    """Return the config.json of every part.

    Args:
        parts: Part name to folder.

    Returns:
        Part name to config.
    """
    return {name: read_json(folder / "config.json") for name, folder in parts.items()}


class SourceCheckpoint:
    """A checkpoint and its parts as one mapping from tensor name to header.

    Args:
        folder: The main checkpoint.
        known: The parts that the architecture can have.
        parts: Part name to folder.

    Raises:
        FileNotFoundError: if weights are missing, or a part is neither given nor in the main checkpoint.
        ValueError: if a file is damaged.
    """

    def __init__(self, folder: Path, known: tuple[Part, ...] = (), parts: Mapping[str, Path] | None = None) -> None:
        self.folder = folder
        self.checkpoints = {"": Checkpoint(folder)}
        self.infos: dict[str, TensorInfo] = dict(self.checkpoints[""].infos)
        self.notes: list[str] = []
        try:
            for part in known:
                self.add(part, (parts or {}).get(part.name))
        except (OSError, ValueError):
            self.close()
            raise

    def add(self, part: Part, folder: Path | None) -> None:
        """Take in the tensors of a part, unless the main checkpoint holds them."""
        if any(name.startswith(part.inside) for name in self.checkpoints[""].infos):
            self.notes.append(f"the weights of the {part.title} are those in the checkpoint itself.")
            return
        if folder is None:
            raise FileNotFoundError(
                f"{self.folder} does not hold the {part.title}, which the original loads from a repository of its "
                f"own. Fetch it (`hf download {part.repository} --local-dir FOLDER`) and give {part.flag} FOLDER, or "
                f"put it at {self.folder / part.name}."
            )
        checkpoint = Checkpoint(folder)
        self.checkpoints[part.name] = checkpoint
        for name, info in checkpoint.infos.items():
            full = f"{part.name}/{name}"
            self.infos[full] = TensorInfo(full, info.shape, info.dtype, f"{part.name}/{info.file}")

    @property
    def files(self) -> dict[str, Path]:
        """Every weight file, by the name that rows give it."""
        return {
            f"{name}/{file}" if name else file: checkpoint.folder / file
            for name, checkpoint in self.checkpoints.items()
            for file in checkpoint.files
        }

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor.

        Args:
            name: A key of `infos`.

        Returns:
            The tensor on the CPU.
        """
        for part, checkpoint in self.checkpoints.items():
            if part and name.startswith(f"{part}/"):
                return checkpoint.read(name[len(part) + 1 :])
        return self.checkpoints[""].read(name)

    def stored_parts(self, name: str, tensor: torch.Tensor) -> list[tuple[TensorInfo, torch.Tensor]]:
        """Return what a tensor consists of.

        Args:
            name: A key of `infos`.
            tensor: What `read` returned for it.

        Returns:
            Header and values of every stored tensor; one, but for tensors that are joined while reading.
        """
        return [(self.infos[name], tensor)]

    def close(self) -> None:
        """Close every open file."""
        for checkpoint in self.checkpoints.values():
            checkpoint.close()

    def __enter__(self) -> "SourceCheckpoint":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def split_parts(infos: list[TensorInfo], known: tuple[Part, ...]) -> dict[str, list[TensorInfo]]:
    """Divide tensors by part, for writing.

    Args:
        infos: Tensors under their names with the part.
        known: The parts that the architecture can have.

    Returns:
        Part name ("" for the main checkpoint) to tensors under their own names; parts without any are left out.
    """
    divided: dict[str, list[TensorInfo]] = {"": []}
    for info in infos:
        name = next((part.name for part in known if info.name.startswith(f"{part.name}/")), "")
        own = info.name[len(name) + 1 :] if name else info.name
        divided.setdefault(name, []).append(TensorInfo(own, info.shape, info.dtype, info.file))
    return divided
