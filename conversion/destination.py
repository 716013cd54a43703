"""The destination of a conversion: checked first, written under a temporary name, moved into place at the end."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

DTYPES = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}


def check_folders(
    source: str | os.PathLike[str], destination: str | os.PathLike[str], *, dtype: str, overwrite: bool
) -> tuple[Path, Path]:
    """Check source, destination and dtype before any work and return absolute paths."""
    given, source, destination = source, Path(source).resolve(), Path(destination).resolve()
    if dtype != "keep" and dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is unknown; expected keep, {', '.join(DTYPES)}.")
    if not source.exists():
        raise FileNotFoundError(
            f"{given} does not exist. Expected a checkpoint folder on this disk; fetch one from the Hub with "
            f"`hf download NAME/REPO --local-dir FOLDER`."
        )
    if not source.is_dir():
        raise ValueError(f"{given} is a file; give the folder with config.json and the weights.")
    if destination == source or source in destination.parents:
        raise ValueError(f"the destination {destination} is inside the source {source}; choose another folder.")
    if destination in source.parents:
        raise ValueError(f"the destination {destination} contains the source {source}; choose another folder.")
    if destination.exists() and not destination.is_dir():
        raise FileExistsError(f"the destination {destination} is a file; give a folder to create.")
    if destination.is_dir() and any(destination.iterdir()) and not overwrite:
        raise FileExistsError(
            f"the destination {destination} exists and is not empty; choose another folder, or pass --overwrite to "
            "replace it when the conversion has succeeded."
        )
    if not destination.parent.is_dir():
        raise FileNotFoundError(f"{destination.parent}, in which to create {destination.name}, does not exist.")
    return source, destination


@contextmanager
def partial_folder(destination: Path) -> Iterator[Path]:
    """Yield a free name beside the destination; whatever is left under it is removed on the way out."""
    for stale in destination.parent.glob(f".{destination.name}.partial-*"):
        owner = stale.name.rpartition("-")[2]
        if not owner.isdigit() or int(owner) == os.getpid() or not process_lives(int(owner)):
            shutil.rmtree(stale, ignore_errors=True)
    folder = destination.parent / f".{destination.name}.partial-{os.getpid()}"
    try:
        yield folder
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OSError(
                error.errno, f"no space left while writing beside {destination}, which is untouched; free some space"
            ) from error
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def process_lives(pid: int) -> bool:
    """Return whether a process with this number exists on this machine."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def move_into_place(folder: Path, destination: Path) -> None:
    """Rename the finished folder; an existing destination is set aside first and removed last."""
    # Not a .partial name: should this process die between the renames, the next run must not remove the old content.
    old = destination.parent / f".{destination.name}.replaced-{os.getpid()}"
    if destination.exists():
        os.rename(destination, old)
    try:
        os.rename(folder, destination)
    except OSError:
        if old.exists():
            os.rename(old, destination)
        raise
    shutil.rmtree(old, ignore_errors=True)


def require_space(parent: Path, num_bytes: int) -> None:
    """Raise OSError if the disk cannot hold the output."""
    free = shutil.disk_usage(parent).free
    if free < num_bytes:
        raise OSError(
            f"the output needs {num_bytes / 1e9:.2f} GB and {parent} has {free / 1e9:.2f} GB free; free some space or "
            "give another destination."
        )
