"""The conversion report: what became of every tensor, and every hole."""

import hashlib
import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from longvideo.conversion.checkpoint_io import TensorInfo
from longvideo.conversion.key_map import collapse_numbers

REPORT_NAME = "conversion_report.json"
MAX_LISTED = 100
CASTABLE = {"F64", "F32", "F16", "BF16"}


@dataclass
class TensorRow:
    """One source tensor and where it goes.

    Args:
        source: The stored tensor.
        target: Its new name, None when it is dropped on purpose.
        dtype: "keep", or the safetensors code to cast floating-point values to.
    """

    source: TensorInfo
    target: str | None
    dtype: str

    @property
    def target_info(self) -> TensorInfo:
        """The tensor as it will be stored (a dropped one keeps its name and dtype)."""
        cast = self.dtype != "keep" and self.target is not None and self.source.dtype in CASTABLE
        return TensorInfo(
            self.target or self.source.name, self.source.shape, self.dtype if cast else self.source.dtype, ""
        )

    @property
    def grouped_names(self) -> tuple[str, str]:
        """Both names with layer numbers as `{}`; names whose numbers have no counterpart stay as they are."""
        source, target = collapse_numbers(self.source.name), collapse_numbers(self.target or self.source.name)
        if source.count("{}") != target.count("{}"):
            source, target = self.source.name, self.target or self.source.name
        return source, "(dropped)" if self.target is None else target


@dataclass
class ConversionReport:
    """What a conversion read, wrote and left out.

    Args:
        direction: "forward" (original to native) or "reverse".
        architecture: The native model_type.
        source: Name of the source folder.
        dtype: "keep" or the safetensors code that floating-point weights are cast to.
        joined: Names of the pieces by the name of a matrix that is stored whole in the native layout.
    """

    direction: str
    architecture: str
    source: str
    dtype: str
    rows: list[TensorRow] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    misshapen: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    files_left: list[str] = field(default_factory=list)
    source_sha256: dict[str, str] = field(default_factory=dict)
    joined: dict[str, list[str]] = field(default_factory=dict)

    @property
    def num_stored(self) -> tuple[int, int]:
        """Numbers of tensors in the files that were read and in those that are written."""
        more = sum(len(pieces) - 1 for pieces in self.joined.values())
        read, written = len(self.rows), len(self.kept)
        return (read + more, written) if self.direction == "forward" else (read - more, written)

    @property
    def kept(self) -> list[TensorRow]:
        """Rows that are written."""
        return [row for row in self.rows if row.target is not None]

    @property
    def dropped(self) -> list[TensorRow]:
        """Rows that are dropped on purpose."""
        return [row for row in self.rows if row.target is None]

    @property
    def main_dtype(self) -> str:
        """The dtype that most written values have."""
        counts: Counter[str] = Counter()
        for row in self.kept:
            counts[row.target_info.dtype] += row.target_info.numel
        return counts.most_common(1)[0][0]

    def holes(self) -> str:
        """Return a text with every hole, empty if there is none.

        Returns:
            One line per hole.
        """
        parts = [
            (self.missing, "not filled by any tensor of the files"),
            (self.unused, "in the files but not in the architecture"),
            (self.misshapen, "of the wrong shape"),
        ]
        lines = []
        for names, what in parts:
            if names:
                lines.append(f"{len(names)} tensors {what}:")
                lines += [f"  {name}" for name in names[:MAX_LISTED]]
            if len(names) > MAX_LISTED:
                lines.append(f"  ... and {len(names) - MAX_LISTED} more")
        return "\n".join(lines)

    def require_complete(self) -> None:
        """Raise ValueError listing every hole, if there is one."""
        holes = self.holes()
        if holes:
            raise ValueError(
                f"{self.source} does not fit a {self.architecture} model, nothing was written.\n{holes}\n"
                "Expected every tensor to be used and every place to be filled: check that config.json belongs to "
                "these weights and that the checkpoint is complete."
            )

    def hash_sources(self, files: dict[str, Path]) -> None:
        """Record the SHA-256 of the source's weight files.

        Args:
            files: Its weight files by the name to record.
        """
        for file, path in files.items():
            with open(path, "rb") as handle:
                self.source_sha256[file] = hashlib.file_digest(handle, "sha256").hexdigest()

    def as_dict(self) -> dict[str, Any]:
        """Return the content of `conversion_report.json`.

        Returns:
            Plain JSON values.
        """
        from longvideo import __version__

        return {
            "longvideo_version": __version__,
            "direction": self.direction,
            "architecture": self.architecture,
            "source": self.source,
            "source_sha256": self.source_sha256,
            "dtype": self.dtype,
            "num_source_tensors": self.num_stored[0],
            "num_target_tensors": self.num_stored[1],
            "num_values": sum(row.source.numel for row in self.kept),
            "num_bytes": sum(row.target_info.nbytes for row in self.kept),
            "complete": not self.holes(),
            "missing": self.missing,
            "unused": self.unused,
            "misshapen": self.misshapen,
            "joined": self.joined,
            "dropped": [row.source.name for row in self.dropped],
            "files_left": self.files_left,
            "notes": self.notes,
            "tensors": [
                {
                    "source": row.source.name,
                    "source_file": row.source.file,
                    "source_dtype": row.source.dtype,
                    "target": row.target,
                    "target_dtype": row.target_info.dtype,
                    "shape": list(row.source.shape),
                }
                for row in self.rows
            ],
        }

    def write(self, path: Path) -> None:
        """Store the report.

        Args:
            path: File to write.
        """
        path.write_text(json.dumps(self.as_dict(), indent=1) + "\n", encoding="utf-8")

    def summary(self) -> str:
        """Return a readable table, one line for each name with layer numbers collapsed.

        Returns:
            Several lines.
        """
        groups: dict[tuple[str, str, tuple[int, ...], str], int] = {}
        for row in self.rows:
            dtype, new = row.source.dtype, row.target_info.dtype
            key = (*row.grouped_names, row.source.shape, dtype if new == dtype else f"{dtype}->{new}")
            groups[key] = groups.get(key, 0) + 1
        lines = [
            f"{count:4d} x {source} -> {target} {list(shape)} {dtype}"
            for (source, target, shape, dtype), count in groups.items()
        ]
        lines.append(self.result())
        lines += [f"{name} = rows of {', '.join(pieces)}" for name, pieces in self.joined.items()]
        lines += [f"note: {note}" for note in self.notes]
        if self.files_left:
            lines.append(f"files not carried over: {', '.join(self.files_left)}")
        return "\n".join(lines)

    def result(self) -> str:
        """Return the counts.

        Returns:
            One line.
        """
        values = sum(row.source.numel for row in self.kept)
        size = sum(row.target_info.nbytes for row in self.kept)
        return (
            f"{self.num_stored[0]} source tensors: {self.num_stored[0] - len(self.dropped)} used, "
            f"{len(self.dropped)} dropped by name; "
            f"{len(self.kept)} target tensors filled, {len(self.missing)} missing; {values} values, {size} bytes"
        )
