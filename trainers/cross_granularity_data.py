"""Files with questions for cross-granularity training: rows of its own form, or conversations of one question."""

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from longvideo.processing.shared.video_sources import is_remote
from longvideo.trainers.cross_granularity_rows import as_question
from longvideo.trainers.data.files import Source, list_sources
from longvideo.trainers.data.loading import RowReader
from longvideo.trainers.data.report import DataReport

FORMAT = "questions"


def load_questions(
    paths: Any,
    *,
    format: str | None = None,
    media_root: str | os.PathLike[str] | None = None,
    on_error: str = "skip",
) -> tuple[list[dict[str, Any]], DataReport]:
    """Load rows for `CrossGranularityTrainer`.

    Args:
        paths: As for `load_video_rows`. Rows are `{"video", "question", "answer", "segment"}`, see `as_question`, or
            of one of the five formats, with one video, one question and one answer; a `segment` beside these is kept.
        format: "questions", or as for `load_video_rows`; None finds it file by file.
        media_root: As for `load_video_rows`.
        on_error: "skip" leaves bad rows out and reports them; "raise" stops at the first one.

    Returns:
        The rows and the report. A row without an id is called by its file and line.

    Raises:
        FileNotFoundError: No such file.
        ValueError: An unknown option or format, or no row that can be used.
        BadRowError: A bad row, with `on_error="raise"`.
    """
    given = None if format == FORMAT else format
    reader = RowReader(format=given, media_root=media_root, on_error=on_error, coordinates="numbers")
    rows = []
    for source in list_sources(paths):
        is_plain = format == FORMAT or (format is None and _holds_questions(source))
        rows += _plain_rows(source, reader) if is_plain else _conversations(source, reader)
    if not rows:
        raise ValueError(f"No row can be used: {reader.report.summary()}")
    return rows, reader.report


def _holds_questions(source: Source) -> bool:
    first = next(iter(source.records()), None)
    # Conversations may hold the question beside them.
    return first is not None and isinstance(first.row, Mapping) and {"video", "question"} <= first.row.keys()


def _plain_rows(source: Source, reader: RowReader) -> Iterator[dict[str, Any]]:
    find, report = reader.finder(source), reader.report
    report.formats[source.name] = FORMAT
    report.begin(source.name)
    for record in source.records():
        try:
            if record.error is not None or not isinstance(record.row, Mapping):
                raise ValueError(record.error or f"expected a JSON object, got {type(record.row).__name__}")
            row = {"id": _name(source, record.line), **record.row}
            row["video"] = _find_video(row.get("video"), find)
            as_question(row, name="it")
        except ValueError as error:
            reader.reject(source, record.line, str(error), error)
            continue
        report.counts[source.name] += 1
        yield row


def _conversations(source: Source, reader: RowReader) -> Iterator[dict[str, Any]]:
    for record, row in reader.rows(source):
        row = {"id": _name(source, record.line), **row}
        if isinstance(record.row, Mapping) and record.row.get("segment") is not None:
            row["segment"] = record.row["segment"]
        try:
            as_question(row, name="it")
        except ValueError as error:
            reader.report.counts[source.name] -= 1
            reader.reject(source, record.line, str(error), error)
            continue
        yield row


def _find_video(video: Any, find: Callable[[str], str]) -> Any:
    """Returns the video with its paths found; as for the trainer, it must lie on this machine."""
    paths = video if isinstance(video, list) else [video]
    if not paths or not all(isinstance(path, str) and path for path in paths):
        raise ValueError(f"its video is {video!r:.200}, expected a path or a list of paths of pictures")
    if any(is_remote(path) for path in paths):
        raise ValueError(f"its video {paths[0]} is an address; segments are read again and again, so download it")
    found = [find(path) for path in paths]
    missing = [path for path in found if not os.path.exists(path.removeprefix("file://"))]
    if missing:
        raise ValueError(f"no such video: {missing[0]}")
    return found if isinstance(video, list) else found[0]


def _name(source: Source, line: int) -> str:
    return f"{Path(source.name).name}:{line}"
