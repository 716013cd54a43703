"""Conversion of checkpoints between an original layout and the Transformers layout, for any architecture.

A conversion is planned from the files' headers alone (every hole is known before anything is written), then streamed
tensor by tensor into a temporary folder beside the destination, which is renamed at the end.
What belongs to one architecture is in a subclass of `ArchitectureConversion` (`architecture.py`;
`convert_<architecture>.py`).
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from longvideo.conversion.architecture import (
    CONVERSIONS,
    NO_OPTIONS,
    NO_PARTS,
    ArchitectureConversion,
    choose_options,
    find_conversion,
    native_shapes,
    register_conversion,
)
from longvideo.conversion.checkpoint_io import (
    SAFETENSORS_DTYPES,
    TensorInfo,
    alignment_order,
    read_json,
    split_shards,
    write_index,
    write_safetensors,
)
from longvideo.conversion.destination import (
    DTYPES,
    check_folders,
    move_into_place,
    partial_folder,
    require_space,
)
from longvideo.conversion.joins import CutCheckpoint, Join, JoinedCheckpoint, cut_shapes
from longvideo.conversion.key_map import KeyMap, collapse_numbers
from longvideo.conversion.native_settings import build_native_config, carry_settings, changed_settings, list_settings
from longvideo.conversion.originals import (
    ORIGINAL_FOLDER,
    keep_originals,
    kept_parts,
    original_shards,
    restore_dropped,
    restore_originals,
    stored_names,
    write_dropped,
)
from longvideo.conversion.parts import (
    SourceCheckpoint,
    check_part_folders,
    find_parts,
    read_part_configs,
    split_parts,
)
from longvideo.conversion.planning import plan_rows, settle_tied_weights
from longvideo.conversion.report import REPORT_NAME, ConversionReport

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = [
    "CONVERSIONS",
    "NO_PARTS",
    "ArchitectureConversion",
    "KeyMap",
    "collapse_numbers",
    "convert_checkpoint",
    "find_conversion",
    "register_conversion",
    "reverse_checkpoint",
]

MAX_SHARD_BYTES = 5_000_000_000
NAN_CHECK_VALUES = 1 << 20

Decorate = Callable[[Path, dict[str, Any]], None]


def convert_checkpoint(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    dtype: str = "keep",
    model_type: str = "auto",
    parts: Mapping[str, str | os.PathLike[str] | None] = NO_PARTS,
    options: Mapping[str, Any] = NO_OPTIONS,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    sha256: bool = False,
    progress: bool = False,
    decorate: Decorate | None = None,
) -> ConversionReport:
    """Convert an original checkpoint folder into a Transformers folder.

    Args:
        source: Folder in the original layout.
        destination: Folder to create.
        dtype: "keep", "bf16", "fp16" or "fp32" for floating-point weights.
        model_type: "auto" or the native model_type to insist on.
        parts: Folders of checkpoints that the original reads beside its own, by option ("vision_tower"). Without an
            entry a part is looked for in its sub-folder of the source.
        options: Further choices of the architecture; None counts as not given.
        overwrite: Replace an existing destination (at the end, in one step).
        max_shard_bytes: Largest size of a weight file in bytes.
        sha256: Also record the SHA-256 of the source's weight files.
        progress: Show a progress bar.
        decorate: Called with the unfinished folder and the report's content before the rename (model card).

    Returns:
        The report, which is also stored as `conversion_report.json`.

    Raises:
        ValueError: if the source is of another architecture, has holes, damaged files or values that are not finite.
        FileNotFoundError: if the source, a shard or a part is missing.
        FileExistsError: if the destination exists and is not empty.
        OSError: if the disk is full; the destination is untouched then.
    """
    source, destination = check_folders(source, destination, dtype=dtype, overwrite=overwrite)
    original = read_json(source / "config.json")
    conversion = find_conversion(original, model_type)
    chosen = choose_options(conversion, options)
    conversion.check_config(original)
    part_folders = find_parts(conversion.parts, source, parts, conversion.name)
    check_part_folders(part_folders, destination)
    part_configs = read_part_configs(part_folders)
    with (
        conversion.open_source(source, part_folders, chosen) as stored,
        partial_folder(destination) as folder,
    ):
        original = conversion.complete_config(original, stored.infos, options=chosen, source=source)
        conversion.check_parts(original, part_configs, stored.infos)
        config = build_native_config(conversion, original, part_configs)
        checkpoint = JoinedCheckpoint(stored, conversion.joins(config))
        report = ConversionReport("forward", conversion.name, source.name, DTYPES.get(dtype, "keep"))
        report.notes += checkpoint.notes
        report.joined = checkpoint.pieces
        rename = conversion.key_map(original, checkpoint.infos.keys()).rename
        plan_rows(report, checkpoint, rename, native_shapes(conversion, config))
        settle_tied_weights(report, checkpoint, config)
        report.require_complete()
        shards = split_shards([row.target_info for row in report.kept], max_shard_bytes)
        require_space(destination.parent, sum(row.target_info.nbytes for row in report.rows))
        folder.mkdir()
        keep_originals(report, source, folder / ORIGINAL_FOLDER, checkpoint, part_folders)
        conversion.complete_originals(original, folder / ORIGINAL_FOLDER, chosen)
        write_shards(report, checkpoint, shards, folder, progress=progress)
        write_dropped(report, checkpoint, folder / ORIGINAL_FOLDER)
        config.dtype = SAFETENSORS_DTYPES[report.main_dtype]
        report.notes += conversion.write_companions(config, source, folder)
        config.save_pretrained(folder)
        finish(report, checkpoint, folder, sha256=sha256, decorate=decorate)
        move_into_place(folder, destination)
    return report


def reverse_checkpoint(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    dtype: str = "keep",
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    sha256: bool = False,
    progress: bool = False,
) -> ConversionReport:
    """Write a Transformers folder back in the original layout.

    For a folder made by `convert_checkpoint` with dtype "keep" the result equals the source: the same names, dtypes,
    values and config, and shards divided as they were.

    Args:
        source: Folder in the Transformers layout.
        destination: Folder to create.
        dtype: "keep", "bf16", "fp16" or "fp32" for floating-point weights.
        overwrite: Replace an existing destination (at the end, in one step).
        max_shard_bytes: Largest size of a weight file in bytes, where the original division is unknown.
        sha256: Also record the SHA-256 of the source's weight files.
        progress: Show a progress bar.

    Returns:
        The report, which is also stored as `conversion_report.json`.

    Raises:
        ValueError: if the source is not a converted folder, has holes, damaged files or values that are not finite.
        FileNotFoundError: if the source or a shard is missing.
        FileExistsError: if the destination exists and is not empty.
        OSError: if the disk is full; the destination is untouched then.
    """
    source, destination = check_folders(source, destination, dtype=dtype, overwrite=overwrite)
    given = read_json(source / "config.json").get("model_type")
    if given not in CONVERSIONS:
        raise ValueError(
            f"--reverse needs a folder in the Transformers layout with model_type one of {sorted(CONVERSIONS)}; "
            f"{source} has model_type {given!r}."
        )
    conversion = CONVERSIONS[given]
    config = conversion.load_config(source)
    original, part_configs = restored_configs(conversion, config, source)
    key_map = conversion.key_map(original, stored_names(source))
    rename = key_map.inverse().rename
    joins = conversion.joins(config)
    with SourceCheckpoint(source) as stored, partial_folder(destination) as folder:
        checkpoint = cut_checkpoint(stored, joins, key_map, config)
        report = ConversionReport("reverse", conversion.name, source.name, DTYPES.get(dtype, "keep"))
        report.joined = checkpoint.pieces
        shapes = native_shapes(conversion, config)
        completed = completed_config(conversion, config, original, checkpoint.infos, rename)
        if (source / ORIGINAL_FOLDER / "config.json").is_file():
            report.notes += check_kept_config(conversion, config, shapes, source, completed, part_configs)
        else:
            original, notes = carry_settings(conversion, config, original, completed, part_configs)
            report.notes += notes
        expected = cut_shapes({rename(name): shape for name, shape in shapes.items()}, joins)
        plan_rows(report, checkpoint, rename, expected)
        settle_tied_weights(report, checkpoint, config, rename)
        report.require_complete()
        restored = restore_dropped(report, source / ORIGINAL_FOLDER)
        divided = split_parts([row.target_info for row in report.kept], conversion.parts)
        require_space(destination.parent, sum(row.target_info.nbytes for row in report.rows))
        folder.mkdir()
        restore_originals(report, source, folder, original, part_configs)
        for part, infos in divided.items():
            shards = original_shards(source / ORIGINAL_FOLDER / part, infos, max_shard_bytes)
            write_shards(report, checkpoint, shards, folder, part=part, progress=progress, extra=restored)
        finish(report, checkpoint, folder, sha256=sha256, decorate=None)
        move_into_place(folder, destination)
    return report


def write_shards(
    report: ConversionReport,
    checkpoint: SourceCheckpoint,
    shards: dict[str, list[TensorInfo]],
    folder: Path,
    *,
    part: str = "",
    progress: bool,
    extra: dict[str, torch.Tensor] | None = None,
) -> None:
    """Stream every kept tensor into its file and write the index; `extra` holds tensors that have no source row.

    With `part`, files go into that sub-folder and the tensors of `shards` are those of that part.
    """
    from tqdm import tqdm

    sources = {row.target: row.source for row in report.kept}
    total = sum(info.nbytes for part in shards.values() for info in part)
    with tqdm(total=total, unit="B", unit_scale=True, desc="converting", disable=None if progress else True) as bar:

        def stream(infos: list[TensorInfo]) -> Iterator[torch.Tensor]:
            for info in infos:
                name = f"{part}/{info.name}" if part else info.name
                if extra and name in extra:
                    yield extra[name]
                else:
                    yield checked_tensor(checkpoint, sources[name], info)
                bar.update(info.nbytes)

        for file, infos in shards.items():
            ordered = alignment_order(infos)
            write_safetensors(folder / part / file, ordered, stream(ordered))
    write_index(folder / part, shards)


def checked_tensor(checkpoint: SourceCheckpoint, source: TensorInfo, target: TensorInfo) -> torch.Tensor:
    """Read one tensor, refuse NaN and infinity by name, and cast it."""
    tensor = checkpoint.read(source.name)
    for info, values in checkpoint.stored_parts(source.name, tensor):
        require_finite(values, f"{info.name} in {checkpoint.files[info.file]}")
    if target.dtype == source.dtype:
        return tensor
    cast = tensor.to(SAFETENSORS_DTYPES[target.dtype])
    require_finite(cast, f"{source.name}, after the cast from {source.dtype} to {target.dtype},")
    return cast


def require_finite(tensor: torch.Tensor, what: str) -> None:
    """Raise ValueError naming the tensor if any value is NaN or infinite (in slices, so that masks stay small)."""
    if not tensor.is_floating_point():
        return
    flat = tensor.reshape(-1)
    for start in range(0, flat.numel(), NAN_CHECK_VALUES):
        part = flat[start : start + NAN_CHECK_VALUES]
        if part.dtype.itemsize == 1:
            part = part.float()
        finite = torch.isfinite(part)
        if not finite.all():
            bad = int((~finite).sum())
            raise ValueError(
                f"{what} holds {bad} values that are not finite (first at flat index "
                f"{start + int((~finite).nonzero()[0])} of {flat.numel()}). The weights are damaged; fetch them again "
                "(after a cast: use bf16 or fp32)."
            )


def restored_configs(
    conversion: ArchitectureConversion, config: "PreTrainedConfig", source: Path
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Return the original config and those of its parts: kept at conversion, or written from the native config."""
    kept = source / ORIGINAL_FOLDER
    if not (kept / "config.json").is_file():
        return conversion.original_config(config), conversion.original_parts(config)
    return read_json(kept / "config.json"), kept_parts(kept, [part.name for part in conversion.parts])


def cut_checkpoint(
    stored: SourceCheckpoint, joins: tuple[Join, ...], key_map: KeyMap, config: "PreTrainedConfig"
) -> CutCheckpoint:
    """Return a native checkpoint with whole matrices as the pieces that the original stores, under native names."""
    native = tuple(
        Join(str(key_map.rename(join.name)), tuple((str(key_map.rename(name)), rows) for name, rows in join.pieces))
        for join in joins
    )
    embedding = next((name for name in stored.infos if name.endswith("embed_tokens.weight")), "")
    tied = {"lm_head.weight": embedding} if config.tie_word_embeddings else {}
    return CutCheckpoint(stored, native, tied)


def completed_config(
    conversion: ArchitectureConversion,
    config: "PreTrainedConfig",
    original: dict[str, Any],
    infos: Mapping[str, TensorInfo],
    rename: Callable[[str], str | None],
) -> dict[str, Any]:
    """Return an original config as conversion would complete it by the headers that are about to be written."""
    renamed = {}
    for name, info in infos.items():
        with suppress(KeyError):
            renamed[str(rename(name))] = info
    return conversion.complete_config(original, renamed, options=conversion.options_of(config))


def check_kept_config(
    conversion: ArchitectureConversion,
    config: "PreTrainedConfig",
    now: dict[str, tuple[int, ...]],
    source: Path,
    original: dict[str, Any],
    parts: Mapping[str, dict[str, Any]],
) -> list[str]:
    """Raise ValueError if the original config that was kept describes a model of other sizes than the native one.

    Returns notes on settings that were changed since: the config that was kept is given back as it is.
    """
    kept = source / ORIGINAL_FOLDER
    back = build_native_config(conversion, original, parts)
    was = native_shapes(conversion, back)
    changed = sorted(name for name in was.keys() | now.keys() if was.get(name) != now.get(name))
    if changed:
        raise ValueError(
            f"{kept / 'config.json'} describes a model of other sizes than {source / 'config.json'} ({changed[0]}: "
            f"{was.get(changed[0])} against {now.get(changed[0])}). Remove the folder {ORIGINAL_FOLDER} to have the "
            "original config written anew."
        )
    settings = list_settings(changed_settings(config.to_dict(), back.to_dict()))
    if not settings:
        return []
    return [
        f"the original config is given back as it was kept and does not hold what config.json says now: "
        f"{', '.join(settings)}. Remove the folder {ORIGINAL_FOLDER} to have it written anew."
    ]


def finish(
    report: ConversionReport,
    checkpoint: SourceCheckpoint,
    folder: Path,
    *,
    sha256: bool,
    decorate: Decorate | None,
) -> None:
    """Complete and store the report and let the caller add to the folder."""
    if sha256:
        report.hash_sources(checkpoint.files)
    if report.dtype != "keep" and any(row.source.dtype != row.target_info.dtype for row in report.kept):
        report.notes.append(
            f"weights were cast to {report.dtype}; the way back gives {report.dtype}, not the source's values."
        )
    report.write(folder / REPORT_NAME)
    if decorate is not None:
        decorate(folder, report.as_dict())
