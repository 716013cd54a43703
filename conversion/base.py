"""Conversion of checkpoints between an original layout and the Transformers layout, for any architecture.

A conversion is planned from the files' headers alone (every hole is known before anything is written), then streamed
tensor by tensor into a temporary folder beside the destination, which is renamed at the end.
What belongs to one architecture is in a subclass of `ArchitectureConversion` (`convert_<architecture>.py`).
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch

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
from longvideo.conversion.key_map import KeyMap, collapse_numbers
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
    Part,
    SourceCheckpoint,
    check_part_folders,
    find_parts,
    read_part_configs,
    split_parts,
)
from longvideo.conversion.report import REPORT_NAME, ConversionReport, TensorRow

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = [
    "CONVERSIONS",
    "ArchitectureConversion",
    "KeyMap",
    "collapse_numbers",
    "convert_checkpoint",
    "register_conversion",
    "reverse_checkpoint",
]

MAX_SHARD_BYTES = 5_000_000_000
NAN_CHECK_VALUES = 1 << 20
NO_PARTS: Mapping[str, Any] = MappingProxyType({})
CONVERSIONS: dict[str, "ArchitectureConversion"] = {}

Decorate = Callable[[Path, dict[str, Any]], None]


class ArchitectureConversion(ABC):
    """What a conversion must know about one architecture.

    Attributes:
        name: The native `model_type`.
        original_model_types: The `model_type` values of original checkpoints.
        parts: Checkpoints that the original reads beside its own.
    """

    parts: tuple[Part, ...] = ()
    name: str
    original_model_types: tuple[str, ...]

    @abstractmethod
    def check_config(self, config: dict[str, Any]) -> None:
        """Raise ValueError if the original config is not of this architecture or of a kind that is not supported."""

    @abstractmethod
    def key_map(self, config: dict[str, Any], names: Collection[str] = ()) -> KeyMap:
        """Return the table for this original config; `names` are the source's tensors where layouts differ in them."""

    @abstractmethod
    def build_config(
        self, config: dict[str, Any], parts: Mapping[str, dict[str, Any]] = NO_PARTS
    ) -> "PreTrainedConfig":
        """Return the native config for an original one and those of its parts."""

    @abstractmethod
    def original_config(self, config: "PreTrainedConfig") -> dict[str, Any]:
        """Return an original config for a native one (used when no verbatim copy was kept)."""

    @abstractmethod
    def load_config(self, folder: Path) -> "PreTrainedConfig":
        """Read the native config of a converted folder."""

    @abstractmethod
    def build_model(self, config: "PreTrainedConfig") -> "PreTrainedModel":
        """Return the native model (called on the meta device)."""

    @abstractmethod
    def write_companions(self, config: "PreTrainedConfig", source: Path, folder: Path) -> list[str]:
        """Write generation config and processor into `folder`, complete `config` with token ids, return notes."""

    def check_parts(  # noqa: B027 (most architectures have no parts)
        self, config: dict[str, Any], parts: Mapping[str, dict[str, Any]], infos: Mapping[str, TensorInfo]
    ) -> None:
        """Raise ValueError if the parts do not fit the checkpoint, whose headers are `infos`."""

    def original_parts(self, config: "PreTrainedConfig") -> dict[str, dict[str, Any]]:
        """Return the parts' original configs for a native one (used when no verbatim copies were kept)."""
        return {}

    def expected_shapes(self, config: "PreTrainedConfig") -> dict[str, tuple[int, ...]]:
        """Return name and shape of every native tensor, without allocating any.

        Args:
            config: The native config.

        Returns:
            Native name to shape.
        """
        from transformers.core_model_loading import revert_weight_conversion

        with torch.device("meta"):
            model = self.build_model(config)
        # Files have the names that save_pretrained gives, which differ from a module's own where versions of
        # Transformers renamed parts of their models.
        stored = revert_weight_conversion(model, model.state_dict())
        return {name: tuple(tensor.shape) for name, tensor in stored.items()}


def register_conversion(conversion: ArchitectureConversion) -> None:
    """Make an architecture known to the converter.

    Args:
        conversion: The architecture.

    Raises:
        ValueError: if an original model_type is taken already.
    """
    taken = {kind: other.name for other in CONVERSIONS.values() for kind in other.original_model_types}
    doubled = [kind for kind in conversion.original_model_types if taken.get(kind, conversion.name) != conversion.name]
    if doubled:
        raise ValueError(f"original model types {doubled} are registered already: {taken}.")
    CONVERSIONS[conversion.name] = conversion


def find_conversion(config: dict[str, Any], model_type: str = "auto") -> ArchitectureConversion:
    """Choose the architecture for an original config.

    Args:
        config: The original config.json.
        model_type: "auto" to go by the config's model_type, or a native model_type to insist on.

    Returns:
        The architecture.

    Raises:
        ValueError: if no architecture fits.
    """
    known = ", ".join(f"{kind} ({c.name})" for c in CONVERSIONS.values() for kind in c.original_model_types)
    if model_type != "auto":
        if model_type not in CONVERSIONS:
            raise ValueError(f"model type {model_type!r} is unknown; expected auto or one of {sorted(CONVERSIONS)}.")
        return CONVERSIONS[model_type]
    given = config.get("model_type")
    if given in CONVERSIONS:
        raise ValueError(
            f"this folder is in the Transformers layout already (model_type {given!r}); load it as it is, or use "
            "--reverse to get the original layout back."
        )
    for conversion in CONVERSIONS.values():
        if given in conversion.original_model_types:
            return conversion
    raise ValueError(
        f"config.json has model_type {given!r}; originals that can be converted: {known}. If the file is one of these "
        f"under another name, insist with --model-type ({', '.join(sorted(CONVERSIONS))})."
    )


def convert_checkpoint(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    dtype: str = "keep",
    model_type: str = "auto",
    parts: Mapping[str, str | os.PathLike[str] | None] = NO_PARTS,
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
    conversion.check_config(original)
    part_folders = find_parts(conversion.parts, source, parts, conversion.name)
    check_part_folders(part_folders, destination)
    part_configs = read_part_configs(part_folders)
    with SourceCheckpoint(source, conversion.parts, part_folders) as checkpoint, partial_folder(destination) as folder:
        conversion.check_parts(original, part_configs, checkpoint.infos)
        config = conversion.build_config(original, part_configs)
        report = ConversionReport("forward", conversion.name, source.name, DTYPES.get(dtype, "keep"))
        report.notes += checkpoint.notes
        rename = conversion.key_map(original, checkpoint.infos.keys()).rename
        plan_rows(report, checkpoint, rename, native_shapes(conversion, config))
        settle_tied_weights(report, checkpoint, config)
        report.require_complete()
        shards = split_shards([row.target_info for row in report.kept], max_shard_bytes)
        require_space(destination.parent, sum(row.target_info.nbytes for row in report.rows))
        folder.mkdir()
        keep_originals(report, source, folder / ORIGINAL_FOLDER, checkpoint, part_folders)
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
    rename = conversion.key_map(original, stored_names(source)).inverse().rename
    with SourceCheckpoint(source) as checkpoint, partial_folder(destination) as folder:
        report = ConversionReport("reverse", conversion.name, source.name, DTYPES.get(dtype, "keep"))
        expected = {rename(name): shape for name, shape in native_shapes(conversion, config).items()}
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


def native_shapes(conversion: ArchitectureConversion, config: "PreTrainedConfig") -> dict[str, tuple[int, ...]]:
    """Return the shapes the native model expects, with impossible configs as a ValueError."""
    try:
        return conversion.expected_shapes(config)
    except (TypeError, KeyError, RuntimeError, ZeroDivisionError) as error:
        raise ValueError(f"config.json does not describe a {conversion.name} that can be built: {error}") from error


def plan_rows(
    report: ConversionReport,
    checkpoint: SourceCheckpoint,
    rename: Callable[[str], str | None],
    expected: dict[str, tuple[int, ...]],
) -> None:
    """Fill the report with one row per source tensor, and with every hole, from the headers alone."""
    for info in checkpoint.infos.values():
        try:
            target = rename(info.name)
        except KeyError:
            report.unused.append(f"{info.name} {list(info.shape)}")
            continue
        if target is not None and target not in expected:
            report.unused.append(f"{info.name} {list(info.shape)} (the config has no {target})")
            continue
        if target is not None and expected[target] != info.shape:
            report.misshapen.append(
                f"{info.name}: the file has {list(info.shape)}, config.json asks for {list(expected[target])}"
            )
        report.rows.append(TensorRow(info, target, report.dtype))
    filled = {row.target for row in report.rows}
    report.missing += [f"{name} {list(shape)}" for name, shape in expected.items() if name not in filled]


def settle_tied_weights(
    report: ConversionReport,
    checkpoint: SourceCheckpoint,
    config: "PreTrainedConfig",
    rename: Callable[[str], str | None] = lambda name: name,
) -> None:
    """Accept an absent `lm_head.weight` when the embeddings are tied, and untie when two differing ones are stored."""
    if not config.get_text_config().tie_word_embeddings:
        return
    head = rename("lm_head.weight")
    absent = [name for name in report.missing if name.startswith(f"{head} ")]
    if absent:
        report.missing.remove(absent[0])
        report.notes.append(f"{head} is not stored: the config ties it to the input embeddings.")
        return
    rows = {row.target: row.source for row in report.kept}
    embedding = next((name for name in rows if name and name.endswith("embed_tokens.weight")), None)
    if report.direction == "reverse" or embedding is None or head not in rows:
        return
    if not torch.equal(checkpoint.read(rows[head].name), checkpoint.read(rows[embedding].name)):
        config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
        report.notes.append(
            "the config ties the output to the input embeddings but the files hold two different matrices; both are "
            "kept and tie_word_embeddings is set to false."
        )


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
    require_finite(tensor, f"{source.name} in {checkpoint.files[source.file]}")
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
    original = read_json(kept / "config.json")
    parts = kept_parts(kept, [part.name for part in conversion.parts])
    was = native_shapes(conversion, conversion.build_config(original, parts))
    now = native_shapes(conversion, config)
    changed = sorted(name for name in was.keys() | now.keys() if was.get(name) != now.get(name))
    if changed:
        raise ValueError(
            f"{kept / 'config.json'} describes a model of other sizes than {source / 'config.json'} ({changed[0]}: "
            f"{was.get(changed[0])} against {now.get(changed[0])}). Remove the folder {ORIGINAL_FOLDER} to have the "
            "original config written anew."
        )
    return original, parts


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
