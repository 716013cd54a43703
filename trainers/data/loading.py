"""Rows of any of the five formats as a dataset that the trainers take."""

import itertools
from collections.abc import Callable, Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from transformers.utils import logging

from longvideo.trainers.data.blocks import MESSAGE_LISTS, REFERENCE_COLUMNS
from longvideo.trainers.data.coordinates import as_numbers
from longvideo.trainers.data.files import Record, Source, import_datasets, list_sources
from longvideo.trainers.data.formats import FORMATS, check_format, detect_format, read_row
from longvideo.trainers.data.media import check_media as check_row_media
from longvideo.trainers.data.media import map_paths, media_blocks, root_of
from longvideo.trainers.data.report import BadRowError, DataReport, Problem

logger = logging.get_logger(__name__)

ON_ERROR = ("skip", "raise")
COORDINATES = ("tokens", "numbers")
# Rows that are looked at to find the format of a file.
PROBED_ROWS = 100
_CHUNK = 1000


class RowReader:
    """Reads files, keeps the counts, and leaves out or raises what cannot be used.

    Args:
        format: Format of all files; None finds it file by file.
        media_root: Folder of relative paths; None takes that of a list of files, then the folder of the file, then
            the working directory, whichever has the medium first.
        on_error: "skip" or "raise".
        media: "none", "exists" or "decodes".
        coordinates: "tokens" or "numbers".
        num_frames: Frames that the model looks at of a video with `split`; None for what the rows say.
        report: Where counts and problems go.

    Raises:
        ValueError: An unknown option.
    """

    def __init__(
        self,
        *,
        format: str | None = None,
        media_root: str | PathLike[str] | None = None,
        on_error: str = "skip",
        media: str = "exists",
        coordinates: str = "tokens",
        num_frames: int | None = None,
        report: DataReport | None = None,
    ) -> None:
        for name, value, known in (("on_error", on_error, ON_ERROR), ("coordinates", coordinates, COORDINATES)):
            if value not in known:
                raise ValueError(f"{name}={value!r} is unknown; use one of {known}.")
        if num_frames is not None and num_frames < 1:
            raise ValueError(f"num_frames={num_frames} must be at least 1, or None for what the rows say.")
        check_row_media({}, media)
        self.format = None if format is None else check_format(format)
        self.media_root = None if media_root is None else Path(media_root).expanduser()
        if self.media_root is not None and not self.media_root.is_dir():
            raise FileNotFoundError(f"No such folder: media_root={self.media_root}.")
        self.on_error, self.media, self.coordinates = on_error, media, coordinates
        self.num_frames = num_frames
        self.report = DataReport() if report is None else report
        self.kind: str | None = None
        self.num_remote = 0

    def format_of(self, source: Source) -> str:
        """Find the format of a file.

        Args:
            source: The file.

        Returns:
            Its name.

        Raises:
            ValueError: It holds no rows, or none of a known format.
        """
        if source.name not in self.report.formats:
            found = self.format or source.format
            first = list(itertools.islice(source.records(), PROBED_ROWS))
            if not first:
                raise ValueError(f"{source.name} holds no rows.")
            if found is None:
                found = detect_format([record.row for record in first], suffix=source.suffix)
            if found is None:
                shown = next((sorted(record.row) for record in first if isinstance(record.row, Mapping)), None)
                what = f"rows with the keys {shown}" if shown else f"{first[0].error or 'no JSON objects'}"
                raise ValueError(
                    f"{source.name} is of no known format ({', '.join(FORMATS)}): {what}. Name the format, or bring "
                    "the rows into one of them."
                )
            self.report.formats[source.name] = found
        return self.report.formats[source.name]

    def finder(self, source: Source) -> Callable[[str], str]:
        """Make the function that finds the relative paths of a file."""
        if self.media_root is not None:
            return root_of(self.media_root)
        return root_of(source.media_root, source.folder, Path())

    def rows(self, source: Source) -> Iterator[tuple[Record, dict[str, Any]]]:
        """Read the usable rows of a file.

        Args:
            source: The file.

        Yields:
            The record and the row in our form, paths found, in the order of the file.

        Raises:
            BadRowError: A bad row, with `on_error="raise"`.
        """
        name, find = self.format_of(source), self.finder(source)
        settings = {**source.settings, "root": find, "num_frames": self.num_frames, "lost": self.report.lost.update}
        self.report.begin(source.name)
        for record in source.records():
            try:
                row = self._read(record, name, settings, source.suffix)
                self.num_remote += check_row_media(map_paths(row, find), self.media)
                self._check_kind(row)
                if self.coordinates == "numbers":
                    without_coordinates(row)
            except ValueError as error:
                self.reject(source, record.line, str(error), error)
                continue
            self.report.counts[source.name] += 1
            yield record, row

    def _read(self, record: Record, name: str, settings: Mapping[str, Any], suffix: str) -> dict[str, Any]:
        if record.error is not None:
            raise ValueError(record.error)
        return read_row(record.row, name, settings=settings, suffix=suffix)

    def reject(self, source: Source, line: int, reason: str, error: Exception | None = None) -> None:
        """Note a row that cannot be used, or raise.

        Args:
            source: Its file.
            line: Its line.
            reason: What is wrong.
            error: Where that comes from.

        Raises:
            BadRowError: With `on_error="raise"`.
        """
        problem = Problem(source.name, line, " ".join(reason.split()))
        self.report.problems.append(problem)
        if self.on_error == "raise":
            raise BadRowError(problem) from error

    def _check_kind(self, row: Mapping[str, Any]) -> None:
        kind = "messages" if "messages" in row else "pairs"
        self.kind = self.kind or kind
        if kind != self.kind:
            words = {"messages": "a row with one answer", "pairs": "a row with a chosen and a rejected answer"}
            raise ValueError(f"it is {words[kind]}, and the rows before had the other kind; load them separately")


def without_coordinates(row: dict[str, Any]) -> dict[str, Any]:
    """Rewrite a row for models without coordinate tokens and frame ranges, in place.

    Args:
        row: Row in our form, paths found.

    Returns:
        The row: coordinates as plain fractions, `split` as `start` and `end` in seconds.

    Raises:
        ValueError: A video with `split` cannot be opened to learn its rate.
    """
    for name in MESSAGE_LISTS:
        for entry in row.get(name) or ():
            for block in entry["content"]:
                if block["type"] == "text":
                    block["text"] = as_numbers(block["text"])
    for block in media_blocks(row):
        if "split" in block:
            from longvideo.processing.shared.video_io import describe_video

            first, last = block.pop("split")
            try:
                rate = describe_video(block.get("video") or block.get("path") or block["url"]).fps
            except (OSError, ValueError) as error:
                raise ValueError(f"its split needs the rate of the video, which cannot be read: {error}") from error
            block["start"], block["end"] = first / rate, (last + 1) / rate
    return row


def features_of(kind: str, *, has_references: bool = False) -> Any:
    """List the columns of the datasets.

    Args:
        kind: "messages" or "pairs".
        has_references: Whether pairs come with what the reference model makes of them.

    Returns:
        `datasets.Features`: `id`, the message lists and `REFERENCE_COLUMNS`; keys that a block does not have are None.
    """
    datasets = import_datasets()
    value = datasets.Value
    block = {
        **{key: value("string") for key in ("type", "text", "path", "url")},
        "video": [value("string")],
        "image": datasets.Image(),
        **{key: value("float64") for key in ("start", "end", "fps", "duration")},
        **{key: value("int64") for key in ("nframes", "num_frames", "min_frames", "max_frames")},
        "split": [value("int64")],
        "timestamps": [value("float64")],
        "video_metadata": {"fps": value("float64"), "total_num_frames": value("int64"), "duration": value("float64")},
    }
    messages = [{"role": value("string"), "content": [block]}]
    names = ("messages",) if kind == "messages" else ("prompt", "chosen", "rejected")
    references = dict.fromkeys(REFERENCE_COLUMNS if has_references else (), value("float64"))
    return datasets.Features({"id": value("string"), **dict.fromkeys(names, messages), **references})


def load_video_rows(
    paths: Any,
    *,
    format: str | None = None,
    media_root: str | PathLike[str] | None = None,
    on_error: str = "skip",
    streaming: bool = False,
    check_media: bool = True,
    coordinates: str = "tokens",
    num_frames: int | None = None,
) -> tuple[Any, DataReport]:
    """Load rows of LLaVA, ST-Align, TRL, ms-swift or LLaMA-Factory (sharegpt) for the trainers.

    Args:
        paths: File (json, jsonl, yaml with a list of files, LLaMA-Factory's dataset_info.json, parquet, arrow), folder
            of `save_to_disk`, dataset of the datasets library, list of rows, or a list of those.
        format: "llava", "st_align", "trl", "ms_swift" or "sharegpt" for all files; None finds it file by file.
        media_root: Folder of relative paths; None takes the one that a list of files names, then the folder of the
            file, then the working directory, whichever has the medium first.
        on_error: "skip" leaves bad rows out and reports them; "raise" stops at the first one.
        streaming: Whether rows are read when they are asked for; the report then grows while they are, and says no
            more than this process has read.
        check_media: Whether files and folders of media must exist (they are not opened; addresses are not asked).
        coordinates: "tokens" keeps times and places as LLaVA-ST reads them (`<TEMP-INPUT0.300>`); "numbers" writes
            plain fractions and turns `split` (frames) into `start` and `end` (seconds), for all other models.
        num_frames: Frames that the model looks at of the videos of ST-Align; tubes are taught at these. None for what
            the entries say (`meta.num_frames`), else 100. Boxes at other frames are left out and stand in
            `report.lost`.

    Returns:
        `datasets.Dataset` (or `IterableDataset`) with `id` and `messages`, or `prompt`, `chosen` and `rejected` (and
        `ref_chosen_logps` and `ref_rejected_logps`, when the first row has them); and the report. A row without an id
        is called by its file and line.

    Raises:
        FileNotFoundError: No such file.
        ValueError: An unknown option or format, rows with one answer beside rows with two in the first place, or no
            row that can be used.
        BadRowError: A bad row, with `on_error="raise"`.
        ImportError: The datasets library is missing.
    """
    datasets = import_datasets()
    reader = RowReader(
        format=format,
        media_root=media_root,
        on_error=on_error,
        media="exists" if check_media else "none",
        coordinates=coordinates,
        num_frames=num_frames,
    )
    sources = list_sources(paths)
    if streaming:
        return _stream(datasets, sources, reader), reader.report
    tables = []
    rows, has_references = _named_rows(sources, reader), False
    while chunk := list(itertools.islice(rows, _CHUNK)):
        has_references = has_references if tables else has_reference(chunk[0])
        features = features_of(reader.kind, has_references=has_references)
        tables.append(datasets.Dataset.from_list([_fitted(row, features) for row in chunk], features=features))
    if not tables:
        raise ValueError(f"No row can be used: {reader.report.summary()}")
    if reader.report.problems:
        logger.warning(reader.report.summary())
    for what, count in sorted(reader.report.lost.items()):
        logger.warning(f"Left out of {count} rows: {what}.")
    return datasets.concatenate_datasets(tables), reader.report


def _stream(datasets: Any, sources: list[Source], reader: RowReader) -> Any:
    # The columns depend on the kind of the first usable row.
    first = next(_named_rows(sources, reader), None)
    if first is None:
        raise ValueError(f"No row can be used: {reader.report.summary()}")
    reader.report.counts.clear()
    reader.report.problems.clear()
    reader.report.lost.clear()
    features = features_of(reader.kind, has_references=has_reference(first))

    def generate(places: list[int]) -> Iterator[dict[str, Any]]:
        yield from (_fitted(row, features) for row in _named_rows([sources[place] for place in places], reader))

    # One shard for each file, so that the workers of a loader can share them.
    return datasets.IterableDataset.from_generator(
        generate, features=features, gen_kwargs={"places": list(range(len(sources)))}
    )


def has_reference(row: Mapping[str, Any]) -> bool:
    """Say whether a row in our form has what a reference model makes of its answers."""
    return all(name in row for name in REFERENCE_COLUMNS)


def _fitted(row: dict[str, Any], features: Any) -> dict[str, Any]:
    # Columns that are announced must be there, others must not.
    return {name: row.get(name) for name in features}


def _named_rows(sources: list[Source], reader: RowReader) -> Iterator[dict[str, Any]]:
    for source in sources:
        for record, row in reader.rows(source):
            row.pop("meta", None)
            yield {"id": f"{Path(source.name).name}:{record.line}", **row}
