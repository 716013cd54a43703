"""The five formats: how to tell them, and one row of each to and from our form (see `blocks`).

| name | rows |
|---|---|
| llava | `{id, video or image, conversations: [{from, value}], start, end}`, also lists of files in a yaml |
| st_align | `{video_path, conversations, meta: {width, height, split, spatial_token, time_token}}` |
| trl | `messages`, `prompt` + `completion`, or `prompt` + `chosen` + `rejected`; also our own rows |
| ms_swift | `{messages, videos, images, objects, rejected_response or rejected_messages, label}` |
| sharegpt | LLaMA-Factory: `{messages or conversations, videos, images, chosen, rejected}` |
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from longvideo.trainers.data.blocks import REFERENCE_COLUMNS, without_nones
from longvideo.trainers.data.readers import (
    SHAREGPT_COLUMNS,
    read_llava,
    read_ms_swift,
    read_sharegpt,
    read_st_align,
    read_trl,
)
from longvideo.trainers.data.writers import write_llava, write_ms_swift, write_sharegpt, write_st_align, write_trl


class Format(NamedTuple):
    """How to read and write the rows of a format, and the ending that its files usually have."""

    read: Callable[[Mapping[str, Any], Mapping[str, Any]], dict[str, Any]]
    write: Callable[[Mapping[str, Any]], tuple[dict[str, Any], list[str]]]
    suffix: str


FORMATS = {
    "llava": Format(read_llava, write_llava, ".json"),
    "st_align": Format(read_st_align, write_st_align, ".json"),
    "trl": Format(read_trl, write_trl, ".jsonl"),
    "ms_swift": Format(read_ms_swift, write_ms_swift, ".jsonl"),
    "sharegpt": Format(read_sharegpt, write_sharegpt, ".json"),
}
_MEDIA = {"video", "videos", "image", "images", "start", "end"}
# Columns that the readers know, by format.
_KNOWN = {
    "llava": {"id", "conversations", "video", "image", "start", "end", "system", "variables", "meta"},
    "st_align": {"id", "conversations", "video_path", "meta"},
    "trl": _MEDIA
    | {"id", "messages", "prompt", "completion", "chosen", "rejected", "system", "label", "meta", *REFERENCE_COLUMNS},
    "ms_swift": _MEDIA
    | {"id", "messages", "objects", "system", "label"}
    | {"rejected_response", "rejected_messages", "rejected_videos", "rejected_images"},
    "sharegpt": {"id", "messages", "start", "end", *SHAREGPT_COLUMNS.values()},
}
_SWIFT_MARKS = ("rejected_response", "rejected_messages", "rejected_videos", "rejected_images", "objects", "label")


def check_format(name: str) -> str:
    """Check the name of a format.

    Args:
        name: "llava", "st_align", "trl", "ms_swift" or "sharegpt", also written with "-".

    Returns:
        The name with underscores.

    Raises:
        ValueError: Another name.
    """
    known = name.lower().replace("-", "_")
    if known not in FORMATS:
        raise ValueError(f"The format {name!r} is unknown; expected one of {', '.join(FORMATS)}.")
    return known


def possible_formats(row: Any, *, suffix: str = "") -> list[str]:
    """List the formats that a row may be of, the likeliest first.

    Args:
        row: A row as it stands in a file.
        suffix: Ending of the file; rows with `<video>` in messages are LLaMA-Factory's in .json and ms-swift's
            elsewhere, and mean the same in both.

    Returns:
        Names of formats; none for a row that looks like no format.
    """
    if not isinstance(row, Mapping):
        return []
    keys = {key for key, value in row.items() if value is not None}
    has_pair = {"chosen", "rejected"} <= keys
    if "conversations" in keys:
        meta = row.get("meta")
        if "video_path" in keys or (isinstance(meta, Mapping) and {"spatial_token", "time_token"} & set(meta)):
            return ["st_align"]
        if has_pair or {"videos", "images", "kto_tag"} & keys:
            return ["sharegpt"]
        return ["llava"] if {"video", "image", "variables"} & keys else ["llava", "sharegpt"]
    if "messages" in keys:
        if keys & set(_SWIFT_MARKS):
            return ["ms_swift"]
        if has_pair or "kto_tag" in keys:
            return ["sharegpt"]
        return _formats_of_messages(row, keys, suffix)
    if has_pair or {"prompt", "completion"} <= keys:
        return ["trl"]
    return []


def _formats_of_messages(row: Mapping[str, Any], keys: set[str], suffix: str) -> list[str]:
    messages = row["messages"] if isinstance(row["messages"], list | tuple) else []
    contents = [entry.get("content") for entry in messages if isinstance(entry, Mapping)]
    if any(content is not None and not isinstance(content, str) for content in contents):
        return ["trl", "ms_swift"]
    tagged = any("<video>" in content or "<image>" in content for content in contents if content)
    plural = {"videos", "images"} & keys
    if tagged and plural:
        return ["sharegpt", "ms_swift", "trl"] if suffix == ".json" else ["ms_swift", "sharegpt", "trl"]
    if tagged or "video" in keys:
        return ["ms_swift", "trl"]
    return ["trl", "ms_swift"] if plural or "image" in keys else ["trl", "ms_swift", "sharegpt"]


def detect_format(rows: Iterable[Any], *, suffix: str = "") -> str | None:
    """Find the format that most rows of a file can be of.

    Args:
        rows: The first rows of the file.
        suffix: Ending of the file.

    Returns:
        Its name; None where no row looks like any format.
    """
    fits, likeliest = Counter(), Counter()
    for row in rows:
        names = possible_formats(row, suffix=suffix)
        fits.update(names)
        likeliest.update(names[:1])
    return max(fits, key=lambda name: (fits[name], likeliest[name]), default=None)


def read_row(row: Any, name: str, *, settings: Mapping[str, Any] | None = None, suffix: str = "") -> dict[str, Any]:
    """Bring a row of a format into our form.

    Args:
        row: The row.
        name: Its format.
        settings: What the file says about its rows: `columns` and `tags` (sharegpt), and `root`, the function that
            finds relative paths (boxes in pixels need the size of their medium), `num_frames` and `lost` (st_align).
        suffix: Ending of the file.

    Returns:
        `{"messages"}` or `{"prompt", "chosen", "rejected"}`, with `id` and `meta` where the row has them.

    Raises:
        ValueError: The row is of another format, or something in it is missing or wrong.
    """
    settings = settings or {}
    if not isinstance(row, Mapping):
        raise ValueError(f"it is {row!r:.100}, expected a JSON object")
    row = {key: without_nones(value) for key, value in row.items() if value is not None}
    if not settings.get("columns"):
        names = possible_formats(row, suffix=suffix)
        if not names:
            raise ValueError(f"it looks like no known format (its keys: {sorted(row)})")
        if name not in names:
            raise ValueError(f"it is a row of {names[0]} in a file of {name}; put the formats into separate files")
    try:
        return FORMATS[name].read(row, settings)
    except (TypeError, KeyError, AttributeError, IndexError, OverflowError) as error:
        raise ValueError(f"it is no proper row of {name}: {type(error).__name__}: {error}") from error


def write_row(row: Mapping[str, Any], name: str) -> tuple[dict[str, Any], list[str]]:
    """Write a row in our form as a row of a format.

    Args:
        row: The row.
        name: The format.

    Returns:
        The row of the format, and the names of what it could not express without becoming wrong.

    Raises:
        ValueError: The format cannot express the row.
    """
    return FORMATS[name].write(row)


def unread_columns(row: Mapping[str, Any], name: str, *, settings: Mapping[str, Any] | None = None) -> list[str]:
    """List the columns of a row that the reader of its format leaves alone.

    Args:
        row: The row as it stands in a file.
        name: Its format.
        settings: What the file says about its rows, as for `read_row`.

    Returns:
        Their names.
    """
    known = _KNOWN[name] | set(((settings or {}).get("columns") or {}).values())
    return sorted(key for key, value in row.items() if key not in known and value is not None)
