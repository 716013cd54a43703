"""Rows as they stand in files: json, jsonl, lists of files in a yaml, tables, and rows that are in memory."""

import json
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from os import PathLike, fspath
from pathlib import Path
from typing import Any, NamedTuple

JSON_LINES = (".jsonl", ".ndjson")
SUFFIXES = (".json", *JSON_LINES, ".yaml", ".yml", ".parquet", ".arrow")
# Names that the lists of files of the original repositories use.
_FOLDER_KEYS = ("data_root", "data_folder", "media_root", "video_folder", "image_folder")


class Record(NamedTuple):
    """A row of a file, or the reason why it cannot be read; `line` counts from 1."""

    line: int
    row: Any
    error: str | None = None


@dataclass
class Source:
    """A file with rows.

    Attributes:
        name: How reports name it.
        records: Function that reads it from the begin.
        folder: Folder that its relative paths may belong to.
        media_root: Folder that a list of files gives for its media.
        suffix: Ending of the file.
        format: Format that a description beside the file gives, or None.
        settings: What that description says about columns and tags.
    """

    name: str
    records: Callable[[], Iterator[Record]]
    folder: Path | None = None
    media_root: Path | None = None
    suffix: str = ""
    format: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)


def list_sources(paths: Any) -> list[Source]:
    """List the files of a call.

    Args:
        paths: Path of a file, dataset of the datasets library, list of rows, or a list of those.

    Returns:
        One source per file; lists of files are followed.

    Raises:
        FileNotFoundError: No such file.
        ValueError: Something else, or a list of files that cannot be read.
    """
    sources = _list(paths)
    # Two entries may name one file, and counts are kept by name.
    for place, source in enumerate(sources):
        if source.name in {other.name for other in sources[:place]}:
            source.name = f"{source.name} ({place + 1})"
    return sources


def _list(paths: Any) -> list[Source]:
    if isinstance(paths, str | PathLike):
        return _sources_of_path(Path(fspath(paths)).expanduser())
    if hasattr(paths, "features") and hasattr(paths, "map"):
        return [Source("dataset", partial(_table_records, paths))]
    if isinstance(paths, Sequence) and paths and all(isinstance(entry, Mapping) for entry in paths):
        return [Source("rows", lambda: (Record(place, row) for place, row in enumerate(paths, 1)))]
    if isinstance(paths, Sequence) and paths:
        return [source for entry in paths for source in _list(entry)]
    raise ValueError(
        f"Expected a file ({', '.join(SUFFIXES)}), a dataset, rows, or a list of those, got {paths!r:.200}."
    )


def _sources_of_path(path: Path) -> list[Source]:
    if not path.exists():
        raise FileNotFoundError(f"No such data file: {path}. Check the path and the working directory.")
    if path.is_dir():
        return [Source(str(path), partial(_folder_records, path), path)]
    suffix = path.suffix.lower()
    if suffix in (".yaml", ".yml"):
        return _sources_of_yaml(path)
    if suffix not in SUFFIXES:
        raise ValueError(f"The file {path} has an unknown ending; expected one of {', '.join(SUFFIXES)}.")
    if path.name == "dataset_info.json":
        return _sources_of_info(path)
    source = Source(str(path), _reader(path), path.parent, suffix=suffix)
    describe(source, _info_entry(path))
    return [source]


def _reader(path: Path) -> Callable[[], Iterator[Record]]:
    if path.suffix.lower() in (".parquet", ".arrow"):
        return partial(_file_table_records, path)
    return partial(read_json_lines if path.suffix.lower() in JSON_LINES else read_json, path)


def read_json_lines(path: Path) -> Iterator[Record]:
    """Read a file with one JSON object on each line; empty lines are left out.

    Args:
        path: The file.

    Yields:
        One record per line.
    """
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if text:
                    yield Record(number, json.loads(text))
            except (ValueError, RecursionError) as error:
                yield Record(number, None, f"it is no JSON: {error}")


def read_json(path: Path) -> Iterator[Record]:
    """Read a file with a JSON list, or with JSON objects one after another.

    Args:
        path: The file.

    Yields:
        One record per entry, with the line where it begins. Behind a mistake in a list nothing can be read any more.
    """
    decoder = json.JSONDecoder()
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        yield Record(1, None, f"the file is not UTF-8 text: {error}")
        return
    at, line, is_list = 0, 1, text.lstrip()[:1] == "["
    counted = 0

    def skip(at: int, extra: str) -> int:
        while at < len(text) and (text[at].isspace() or text[at] in extra):
            at += 1
        return at

    at = skip(0, "[" if is_list else "")
    while at < len(text) and not (is_list and text[at] == "]"):
        line, counted = line + text.count("\n", counted, at), at
        try:
            row, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            yield Record(line, None, f"it is no JSON, and what follows was not read: {error}")
            return
        yield Record(line, row)
        at = skip(at, "," if is_list else "")
    if is_list and at >= len(text):
        line += text.count("\n", counted)
        yield Record(line, None, "the list does not end with ]: the file was cut short")


def _table_records(table: Any) -> Iterator[Record]:
    datasets = import_datasets()
    for name, feature in (table.features or {}).items():
        inner = feature[0] if isinstance(feature, list) else getattr(feature, "feature", feature)
        kind = type(inner).__name__
        if kind in ("Video", "Image"):
            # Decoding is the processors' work, frame by frame and at the size of the tower.
            raw = getattr(datasets, kind)(decode=False)
            table = table.cast_column(name, raw if inner is feature else [raw])
    for number, row in enumerate(table, 1):
        yield Record(number, row)


def _file_table_records(path: Path) -> Iterator[Record]:
    datasets = import_datasets()
    kind = path.suffix.lower()[1:]
    yield from _table_records(datasets.load_dataset(kind, data_files=str(path), split="train", streaming=True))


def _folder_records(path: Path) -> Iterator[Record]:
    datasets = import_datasets()
    try:
        table = datasets.load_from_disk(str(path))
    except FileNotFoundError as error:
        raise ValueError(
            f"{path} is a folder, but no dataset that was saved with save_to_disk; give the file with the rows."
        ) from error
    if not hasattr(table, "features") or isinstance(table, dict):
        raise ValueError(f"{path} holds several splits; give the folder of one of them.")
    yield from _table_records(table)


def import_datasets() -> Any:
    """Import the datasets library, or say how to get it."""
    try:
        import datasets
    except ImportError as error:
        raise ImportError('Training rows need the datasets library: pip install "longvideo[train]".') from error
    return datasets


def _sources_of_yaml(path: Path) -> list[Source]:
    try:
        import yaml
    except ImportError as error:
        raise ImportError(f"Reading {path} needs the package pyyaml: pip install pyyaml.") from error
    try:
        contents = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no yaml: {error}") from error
    entries = contents.get("datasets") if isinstance(contents, Mapping) else None
    if not isinstance(entries, list) or not entries:
        raise ValueError(
            f"{path} has no list `datasets` with entries like {{json_path: ..., sampling_strategy: all}}."
        )
    sources = []
    for number, entry in enumerate(entries, 1):
        if not isinstance(entry, Mapping) or not isinstance(entry.get("json_path"), str):
            raise ValueError(f"{path}, entry {number}: expected a mapping with json_path, got {entry!r:.100}.")
        found = _beside(entry["json_path"], path.parent)
        if not found.is_file():
            raise FileNotFoundError(f"{path}, entry {number}: no such file {found}.")
        root = next((entry[key] for key in _FOLDER_KEYS if entry.get(key)), None)
        strategy = str(entry.get("sampling_strategy") or "all")
        check_strategy(strategy, where=f"{path}, entry {number}")
        for source in _sources_of_path(found):
            source.media_root = _beside(root, path.parent) if root else source.media_root
            source.records = partial(sampled, source.records, strategy)
            sources.append(source)
    return sources


def _beside(path: str, folder: Path) -> Path:
    given = Path(path).expanduser()
    beside = folder / given
    return given if given.is_absolute() or (not beside.exists() and given.exists()) else beside


def check_strategy(strategy: str, *, where: str) -> tuple[str, float | None, bool]:
    """Read a sampling strategy: all, first:N, end:N or random:N, where N may be a percentage.

    Args:
        strategy: The text.
        where: What it belongs to, for the message.

    Returns:
        Its name, its number, and whether that is a percentage.

    Raises:
        ValueError: Another text.
    """
    name, _, amount = strategy.partition(":")
    if strategy == "all":
        return "all", None, False
    is_percentage, digits = amount.endswith("%"), amount.removesuffix("%")
    if name not in ("first", "end", "random") or not digits.isdecimal():
        raise ValueError(f"{where}: sampling_strategy={strategy!r}, expected all, first:N, end:N or random:N (or N%).")
    return name, float(digits), is_percentage


def sampled(records: Callable[[], Iterator[Record]], strategy: str) -> Iterator[Record]:
    """Choose the rows of a file as its entry in a list of files says; the others count as not given.

    Args:
        records: Reads the file.
        strategy: See `check_strategy`; `random` draws the same rows every time.

    Yields:
        The chosen records in the order of the file.
    """
    name, amount, is_percentage = check_strategy(strategy, where="the list of files")
    if name == "all":
        yield from records()
        return
    if name == "first" and not is_percentage:
        yield from islice(records(), int(amount))
        return
    total = sum(1 for _ in records())
    count = min(math.ceil(total * amount / 100) if is_percentage else int(amount), total)
    chosen: Iterable[int] = range(count) if name == "first" else range(total - count, total)
    if name == "random":
        chosen = set(random.Random(0).sample(range(total), count))
    yield from (record for place, record in enumerate(records()) if place in chosen)


def describe(source: Source, entry: Mapping[str, Any] | None) -> None:
    """Note what an entry of LLaMA-Factory's dataset_info.json says about a file, in place.

    Args:
        source: The file.
        entry: The entry, or None.
    """
    if entry is not None and entry.get("formatting") == "sharegpt":
        source.format = "sharegpt"
        source.settings = {"columns": dict(entry.get("columns") or {}), "tags": dict(entry.get("tags") or {})}
        # An entry without columns says nothing that reading by the keys would not find.
        source.settings = {key: value for key, value in source.settings.items() if value}


def _read_info(path: Path) -> dict[str, Any]:
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(contents, dict):
        return {}
    return {name: entry for name, entry in contents.items() if isinstance(entry, dict) and entry.get("file_name")}


def _info_entry(path: Path) -> dict[str, Any] | None:
    for entry in _read_info(path.parent / "dataset_info.json").values():
        if (path.parent / str(entry["file_name"])).resolve() == path.resolve():
            return entry
    return None


def _sources_of_info(path: Path) -> list[Source]:
    sources = []
    for name, entry in _read_info(path).items():
        if entry.get("formatting") != "sharegpt":
            raise ValueError(
                f"{path}: {name} has the formatting {entry.get('formatting', 'alpaca')!r}; only sharegpt can be read."
            )
        file = path.parent / str(entry["file_name"])
        if not file.is_file():
            raise FileNotFoundError(f"{path}: no such file {file} of {name}.")
        sources += _sources_of_path(file)
    if not sources:
        raise ValueError(f"{path} names no files: expected entries with file_name and formatting: sharegpt.")
    return sources
