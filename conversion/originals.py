"""The folder `original/` of a converted checkpoint: what only the way back needs.

It holds the small files of the source (and, in sub-folders, those of its parts) verbatim, and the tensors that have no
place in the native model.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from longvideo.conversion.checkpoint_io import (
    SafetensorsFile,
    TensorInfo,
    alignment_order,
    read_json,
    split_shards,
    write_safetensors,
)
from longvideo.conversion.parts import SourceCheckpoint
from longvideo.conversion.report import REPORT_NAME, ConversionReport, TensorRow

ORIGINAL_FOLDER = "original"
DROPPED_FILE = "dropped.safetensors"
SMALL_FILE_SUFFIXES = {".json", ".txt", ".jinja", ".md", ".model", ".tiktoken"}
MAX_SMALL_FILE_BYTES = 64_000_000
LARGE_DROPPED_BYTES = 100_000_000


def keep_originals(
    report: ConversionReport, source: Path, folder: Path, checkpoint: SourceCheckpoint, parts: dict[str, Path]
) -> None:
    """Copy config, tokenizer and other small files verbatim, so that --reverse can give them back."""
    below = {path.relative_to(source).parts[0] for path in parts.values() if source in path.parents}
    keep_small_files(report, source, folder, set(checkpoint.checkpoints[""].files) | below)
    for name, path in parts.items():
        weights = checkpoint.checkpoints[name].files if name in checkpoint.checkpoints else []
        keep_small_files(report, path, folder / name, set(weights), f"{name}/")


def keep_small_files(report: ConversionReport, source: Path, folder: Path, known: set[str], prefix: str = "") -> None:
    """Copy the small files of one folder and note which others are left; `known` ones are dealt with elsewhere."""
    folder.mkdir(parents=True)
    for path in sorted(source.iterdir()):
        small = path.is_file() and path.stat().st_size <= MAX_SMALL_FILE_BYTES
        if small and (path.suffix in SMALL_FILE_SUFFIXES or path.name.startswith(("LICENSE", "NOTICE"))):
            if path.name != REPORT_NAME:
                shutil.copyfile(path, folder / path.name)
        elif path.name not in known and not path.name.startswith("."):
            report.files_left.append(prefix + path.name)


def write_dropped(report: ConversionReport, checkpoint: SourceCheckpoint, folder: Path) -> None:
    """Keep the tensors that the key map drops in a side file, so that --reverse can give them back."""
    infos = alignment_order([row.source for row in report.dropped])
    if infos:
        write_safetensors(folder / DROPPED_FILE, infos, (checkpoint.read(info.name) for info in infos))
    size = sum(info.nbytes for info in infos)
    if size > LARGE_DROPPED_BYTES:
        report.notes.append(
            f"{folder.name}/{DROPPED_FILE} ({size / 1e9:.1f} GB) holds tensors that the model does not have; only "
            "--reverse reads it, so it may be deleted where the source itself is at hand."
        )


def restore_dropped(report: ConversionReport, folder: Path) -> dict[str, torch.Tensor]:
    """Add the tensors kept in the side file to the report and return them."""
    if not (folder / DROPPED_FILE).is_file():
        return {}
    file = SafetensorsFile(folder / DROPPED_FILE)
    tensors = {name: file.read(name) for name in file.infos}
    report.rows += [TensorRow(info, name, "keep") for name, info in file.infos.items()]
    file.close()
    return tensors


def original_shards(folder: Path, infos: list[TensorInfo], max_bytes: int) -> dict[str, list[TensorInfo]]:
    """Divide the tensors as the kept index of the original does, or by size when there is none that fits."""
    by_name = {info.name: info for info in infos}
    for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        if (folder / index).is_file():
            weight_map: dict[str, str] = read_json(folder / index).get("weight_map", {})
            if weight_map.keys() != by_name.keys():
                continue
            shards: dict[str, list[TensorInfo]] = {}
            for name, file in weight_map.items():
                file = file.replace("pytorch_model", "model").replace(".bin", ".safetensors")
                shards.setdefault(Path(file).name, []).append(by_name[name])
            return dict(sorted(shards.items()))
    return split_shards(infos, max_bytes)


def restore_originals(
    report: ConversionReport,
    source: Path,
    folder: Path,
    original: dict[str, Any],
    parts: dict[str, dict[str, Any]],
) -> None:
    """Copy the kept files back; `original` and `parts` are the configs to write when no verbatim ones were kept."""
    kept = source / ORIGINAL_FOLDER
    verbatim = (kept / "config.json").is_file()
    skipped = {DROPPED_FILE, REPORT_NAME, "model.safetensors.index.json", "pytorch_model.bin.index.json"}
    if not verbatim:
        skipped |= {"config.json", "README.md"}
        (folder / "config.json").write_text(json.dumps(original, indent=2) + "\n", encoding="utf-8")
        report.notes.append(
            "the folder holds no copy of the original config, so one was written from config.json; tokenizer files "
            "are those of the converted model."
        )
    copy_small_files(kept if verbatim else source, folder, skipped)
    for name, config in parts.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        if (kept / name / "config.json").is_file():
            copy_small_files(kept / name, folder / name, skipped)
        else:
            (folder / name / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def copy_small_files(source: Path, folder: Path, skipped: set[str]) -> None:
    """Copy config, tokenizer and other small files of one folder."""
    for path in sorted(source.iterdir()):
        known = path.suffix in SMALL_FILE_SUFFIXES or path.name.startswith(("LICENSE", "NOTICE"))
        if path.is_file() and known and path.name not in skipped:
            shutil.copyfile(path, folder / path.name)


def kept_parts(folder: Path, names: list[str]) -> dict[str, dict[str, Any]]:
    """Return the configs of the parts that were kept.

    Args:
        folder: The kept folder.
        names: Names of the parts that the architecture can have.

    Returns:
        Part name to config.
    """
    return {name: read_json(folder / name / "config.json") for name in names if (folder / name).is_dir()}


def stored_names(folder: Path) -> list[str]:
    """Return the names that the source's tensors had, from the report of a converted folder (empty without one)."""
    if not (folder / REPORT_NAME).is_file():
        return []
    try:
        return [str(row["source"]) for row in read_json(folder / REPORT_NAME).get("tensors", [])]
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{folder / REPORT_NAME} is not a conversion report ({error}); remove it to go back without it."
        ) from error
