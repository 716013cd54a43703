"""Whole files: checked row by row, or turned from one format into another."""

import itertools
import json
import os
from collections.abc import Callable, Iterator
from os import PathLike
from pathlib import Path
from typing import Any

from longvideo.trainers.data.files import JSON_LINES, Record, Source, list_sources
from longvideo.trainers.data.formats import FORMATS, check_format, possible_formats, unread_columns, write_row
from longvideo.trainers.data.loading import PROBED_ROWS, RowReader
from longvideo.trainers.data.media import map_paths
from longvideo.trainers.data.report import DataReport


def check_file(
    path: str | PathLike[str],
    *,
    format: str | None = None,
    media_root: str | PathLike[str] | None = None,
    media: str = "exists",
) -> tuple[DataReport, dict[str, int]]:
    """Read a data file to its end and say what is in it.

    Args:
        path: The file, as for `load_video_rows`.
        format: Its format; None finds it.
        media_root: Folder of relative paths; None as for `load_video_rows`.
        media: "none", "exists", or "decodes" (videos are opened, their cut must lie inside, pictures are read).

    Returns:
        The report, and what the usable rows hold: `rows with one answer`, `preference rows`, `videos`, `images`,
        `media on the network, not checked`.

    Raises:
        FileNotFoundError: No such file.
        ValueError: No rows, or no known format.
    """
    reader = RowReader(format=format, media_root=media_root, media=media)
    contents = {"rows with one answer": 0, "preference rows": 0, "videos": 0, "images": 0}
    for source in list_sources(path):
        for _, row in reader.rows(source):
            contents["rows with one answer" if "messages" in row else "preference rows"] += 1
            for messages in (row.get(name) or [] for name in ("messages", "prompt")):
                blocks = [block["type"] for entry in messages for block in entry["content"]]
                contents["videos"] += blocks.count("video")
                contents["images"] += blocks.count("image")
    return reader.report, {**contents, "media on the network, not checked": reader.num_remote}


def convert_file(
    source_path: str | PathLike[str],
    target_path: str | PathLike[str],
    *,
    to: str,
    format: str | None = None,
    media_root: str | PathLike[str] | None = None,
    on_error: str = "skip",
) -> DataReport:
    """Turn a data file into another format.

    Args:
        source_path: The file, as for `load_video_rows`.
        target_path: File to write, .json (a list) or .jsonl (one row on each line); it appears under its name when it
            is complete. Relative paths are written relative to its folder.
        to: Format to write.
        format: Format of the source; None finds it.
        media_root: Folder of the source's relative paths; None as for `load_video_rows`.
        on_error: "skip" leaves out and reports rows that cannot be read or expressed; "raise" stops at the first one
            and writes nothing.

    Returns:
        The report; `lost` names what was left out of rows that are right without it.

    Raises:
        FileNotFoundError: No such file, or no folder for the target.
        ValueError: An unknown format or ending, source and target are one file, or no row could be written.
        BadRowError: A bad row, with `on_error="raise"`.
    """
    name, target, source = check_format(to), Path(target_path).expanduser(), Path(source_path).expanduser()
    if target.suffix.lower() not in (".json", *JSON_LINES):
        raise ValueError(f"The file {target} has an unknown ending; expected .json, {', '.join(JSON_LINES)}.")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"No such folder: {target.parent}. Make it first.")
    if target.exists() and source.exists() and target.samefile(source):
        raise ValueError(f"{source} would be written over itself; name another file.")
    reader = RowReader(format=format, media_root=media_root, on_error=on_error, media="none")
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            write_rows(file.write, _converted(list_sources(source), reader, name, target.parent), target.suffix)
        if not reader.report.num_out:
            raise ValueError(f"No row could be written as {name}: {reader.report.summary()}")
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    return reader.report


def format_of_target(path: str | PathLike[str]) -> str:
    """Find the format of a file that is about to be written anew.

    Args:
        path: The file.

    Returns:
        The only format that all of its first rows can be of.

    Raises:
        ValueError: There is no such file yet, or its rows do not decide; endings never do.
    """
    file = Path(path).expanduser()
    found = set(FORMATS)
    if file.is_file():
        for source in list_sources(file):
            for record in itertools.islice(source.records(), PROBED_ROWS):
                found &= set(possible_formats(record.row, suffix=source.suffix))
    if len(found) != 1:
        why = ", ".join(sorted(found)) or "rows of none" if file.is_file() else "it does not exist yet"
        raise ValueError(f"The format to write {file} in is not clear ({why}); name it with --to.")
    return found.pop()


def _converted(sources: list[Source], reader: RowReader, name: str, folder: Path) -> Iterator[dict[str, Any]]:
    for source in sources:
        for record, row in reader.rows(source):
            try:
                written, lost = write_row(map_paths(row, _relative_to(folder, _given_texts(record))), name)
            except ValueError as error:
                # The row was counted as usable when it was read.
                reader.report.counts[source.name] -= 1
                reader.reject(source, record.line, f"it cannot be written as {name}: {error}", error)
                continue
            reader.report.lost.update(lost)
            unread = unread_columns(record.row, reader.format_of(source), settings=source.settings)
            reader.report.lost.update(f"column {column!r}" for column in unread)
            yield written


def _given_texts(record: Record) -> set[str]:
    """List the texts of a row: a path that stands there absolute stays absolute."""
    texts: set[str] = set()

    def walk(value: Any) -> None:
        if isinstance(value, str):
            texts.add(value)
        elif isinstance(value, dict):
            for entry in value.values():
                walk(entry)
        elif isinstance(value, list | tuple):
            for entry in value:
                walk(entry)

    walk(record.row)
    return texts


def _relative_to(folder: Path, given: set[str]) -> Callable[[str], str]:
    def find(path: str) -> str:
        if path.lower().startswith("file://") or (path in given and Path(path).is_absolute()):
            return path
        return Path(os.path.relpath(Path(path).absolute(), folder.absolute())).as_posix()

    return find


def write_rows(write: Callable[[str], Any], rows: Iterator[dict[str, Any]], suffix: str) -> None:
    """Write rows as JSON.

    Args:
        write: Takes text.
        rows: The rows.
        suffix: ".json" for a list, otherwise one row on each line.
    """
    is_list = suffix.lower() == ".json"
    separator = "[\n" if is_list else ""
    for row in rows:
        write(separator + json.dumps(row, ensure_ascii=False))
        separator = ",\n" if is_list else "\n"
    write("\n]\n" if is_list and separator != "[\n" else "[]\n" if is_list else "\n")
