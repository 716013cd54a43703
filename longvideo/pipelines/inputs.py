"""What may be handed to the pipeline, brought to one form: rows with `messages`, or with a visual and a question."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from longvideo.pipelines.encoding import SharedVideo

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff"}


class MappedRows(Dataset):
    """A map-style dataset whose rows pass through a function when they are read.

    Args:
        rows: anything with a length and integer indexing.
        to_row: function from one element to one pipeline input.
    """

    def __init__(self, rows: Any, to_row: Callable[[Any], Any]) -> None:
        self.rows = rows
        self.to_row = to_row

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.to_row(self.rows[index])


def is_message(value: Any) -> bool:
    """Tell whether a value is one chat message, a dict with `role` and `content`."""
    return isinstance(value, Mapping) and "role" in value and "content" in value


def _is_frame(value: Any) -> bool:
    if isinstance(value, (np.ndarray, torch.Tensor)):
        return value.ndim == 3
    if isinstance(value, (str, os.PathLike)):
        return Path(value).suffix.lower() in IMAGE_SUFFIXES
    return hasattr(value, "getbands")  # a PIL image


def is_frame_list(value: Any) -> bool:
    """Tell whether a value is one video given as a list of frames (arrays, PIL images or picture files)."""
    return isinstance(value, (list, tuple)) and len(value) > 0 and all(_is_frame(frame) for frame in value)


def is_one_visual(value: Any) -> bool:
    """Tell whether a value is one video or picture, not a collection of them."""
    if isinstance(value, (str, os.PathLike)) or hasattr(value, "getbands"):
        return True
    if isinstance(value, (np.ndarray, torch.Tensor)):
        return value.ndim <= 4
    return is_frame_list(value)


def _has_items(value: Any) -> bool:
    return hasattr(value, "__len__") and hasattr(value, "__getitem__")


def _zip_questions(visuals: Sequence[Any], question: Any, kind: str) -> list[dict[str, Any]]:
    questions = list(question) if isinstance(question, (list, tuple)) else [question] * len(visuals)
    if len(questions) != len(visuals):
        raise ValueError(
            f"{len(visuals)} {kind}s were given with {len(questions)} questions. Give one question, "
            f"or as many questions as {kind}s."
        )
    return [{kind: visual, "question": text} for visual, text in zip(visuals, questions, strict=True)]


def gather_inputs(video: Any, question: Any, image: Any, video_metadata: Any) -> Any:
    """Turn the arguments of a pipeline call into one row, a list of rows, a dataset or an iterator of rows.

    Args:
        video: path, URL, array or tensor (F, H, W, C) or (F, C, H, W), list of frames, list of videos, row dict(s),
            chat message list(s), a dataset or an iterator of any of these.
        question: one question, or a list as long as the list of videos.
        image: like `video`, for a still picture.
        video_metadata: fps and frame count of a video given as an array.

    Returns:
        What `Pipeline.__call__` of Transformers takes: a dict, a list, a torch dataset or a generator.

    Raises:
        ValueError: when nothing was given, both kinds were given, or the counts differ.
    """
    if video is not None and image is not None:
        raise ValueError("Both video= and image= were given; put several items into one chat message list instead.")
    if video is None and image is None:
        raise ValueError("Nothing to ask about: give video=..., image=... or a list of chat messages.")
    kind, visual = ("video", video) if image is None else ("image", image)
    if is_one_visual(visual):
        extra = {} if video_metadata is None else {"video_metadata": video_metadata}
        if isinstance(question, (list, tuple)):
            if kind == "video":
                extra["shared"] = SharedVideo()
            return [{kind: visual, "question": text, **extra} for text in question]
        return {kind: visual, "question": question, **extra}
    if isinstance(visual, Mapping):
        return dict(visual) if question is None else {**visual, "question": question}
    return _gather_collection(kind, visual, question)


def _gather_collection(kind: str, visual: Any, question: Any) -> Any:
    def to_row(value: Any) -> Any:
        if question is None or isinstance(value, Mapping):
            return value if question is None else {**value, "question": question}
        return {kind: value, "question": question}

    if isinstance(visual, (list, tuple)):
        if not visual:
            raise ValueError(f"An empty list of {kind}s was given.")
        chats = is_message(visual[0]) or (isinstance(visual[0], (list, tuple)) and is_message(_first(visual[0])))
        if chats or isinstance(visual[0], Mapping):
            return list(visual) if question is None or chats else [to_row(value) for value in visual]
        return _zip_questions(visual, question, kind)
    if isinstance(question, (list, tuple)):
        raise ValueError(
            "A dataset or an iterator takes one question for all rows; put other questions into the rows."
        )
    if _has_items(visual):
        return MappedRows(visual, to_row)
    if isinstance(visual, Iterable):
        return _generate(visual, to_row)
    raise ValueError(
        f"A {type(visual).__name__} cannot be used as {kind}. Expected a path, a URL, an array, a list of frames, "
        "a dict, a list of these, a dataset or chat messages."
    )


def _first(values: Sequence[Any]) -> Any:
    return values[0] if len(values) else None


def _generate(values: Iterable[Any], to_row: Callable[[Any], Any]) -> Iterator[Any]:
    for value in values:
        yield to_row(value)


def check_source(source: Any, kind: str = "video") -> None:
    """Refuse a local file that cannot be opened, before anything is loaded or decoded.

    Args:
        source: a path or URL is checked; arrays and frame lists pass.
        kind: word for the message, `video` or `image`.

    Raises:
        FileNotFoundError: no such file.
        IsADirectoryError: a folder was given.
        ValueError: the file is empty.
    """
    if isinstance(source, (list, tuple)):
        for frame in source:
            check_source(frame, "picture")
        return
    if not isinstance(source, (str, os.PathLike)):
        return
    text = str(source)
    if text.lower().startswith(("http://", "https://", "file://", "data:")) or (kind == "image" and len(text) > 1024):
        return  # an address, or a picture as base64 text
    path = Path(source).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"No such {kind} file: '{source}'. Give the path of an existing file or a URL.")
    if path.is_dir() and kind != "video":  # a folder of pictures is a video; the reader looks into it
        raise IsADirectoryError(f"'{source}' is a folder, but a {kind} file was expected.")
    if path.is_file() and path.stat().st_size == 0:
        raise ValueError(f"The {kind} file '{source}' is empty (0 bytes); copy or download it again.")


def row_to_messages(row: Mapping[str, Any], *, start: float | None, end: float | None) -> list[dict[str, Any]]:
    """Write one row as chat messages.

    Args:
        row: with `messages`, or with `question` and `video` or `image`.
        start: seconds; the video is cut there.
        end: seconds; the video ends there.

    Returns:
        A list of messages with content blocks.

    Raises:
        ValueError: keys are missing or unknown, or the question is empty.
    """
    if "messages" in row:
        return list(row["messages"])
    _, block = row_to_block(row, start=start, end=end)
    check_question(row.get("question"))
    return [{"role": "user", "content": [block, {"type": "text", "text": row["question"]}]}]


def row_to_block(row: Mapping[str, Any], *, start: float | None, end: float | None) -> tuple[str, dict[str, Any]]:
    """Write the visual of a row as a content block.

    Args:
        row: with `video` or `image`.
        start: seconds; the video is cut there.
        end: seconds; the video ends there.

    Returns:
        Its kind, "video" or "image", and the block.

    Raises:
        ValueError: no visual or both.
        OSError: a named file cannot be opened.
    """
    kinds = [kind for kind in ("video", "image") if row.get(kind) is not None]
    if len(kinds) != 1:
        raise ValueError(
            f"A row needs exactly one of the keys 'video', 'image', 'messages'; got {sorted(map(str, row))}."
        )
    kind = kinds[0]
    check_source(row[kind], kind)
    source = str(row[kind]) if isinstance(row[kind], os.PathLike) else row[kind]
    block: dict[str, Any] = {"type": kind, kind: source}
    if kind == "video":
        block.update({key: value for key, value in (("video_start", start), ("video_end", end)) if value is not None})
    return kind, block


def check_question(question: Any) -> None:
    """Refuse a missing, empty or non-text question.

    Raises:
        ValueError: with what was given.
    """
    if not isinstance(question, str):
        given = "no question was given" if question is None else f"got {type(question).__name__}"
        raise ValueError(f"A question must be a text: {given}.")
    if not question.strip():
        raise ValueError("The question is empty. Write what you want to know about the video.")


def check_messages(messages: Sequence[Any]) -> None:
    """Refuse a chat without text or with files that cannot be opened.

    Raises:
        ValueError: a message is malformed or the chat holds no text.
        OSError: a named file cannot be opened.
    """
    texts: list[str] = []
    for message in messages:
        if not is_message(message):
            raise ValueError("Each chat message must be a dict with the keys 'role' and 'content'.")
        content = message["content"]
        for block in [{"type": "text", "text": content}] if isinstance(content, str) else content or []:
            kind = block.get("type")
            if kind == "text":
                texts.append(block.get("text") or "")
            elif kind in ("video", "image"):
                for key in (kind, "path"):
                    check_source(block.get(key), kind)
    if not any(text.strip() for text in texts):
        raise ValueError("The chat holds no text. Add a question as {'type': 'text', 'text': ...}.")


def has_video(messages: Sequence[Mapping[str, Any]]) -> bool:
    """Tell whether a chat holds a video block."""
    blocks = [message["content"] for message in messages if not isinstance(message["content"], str)]
    return any(block.get("type") == "video" for content in blocks for block in content or [])


def describe_video(metadata: Any) -> dict[str, Any]:
    """Return the facts of one video: source fps, seconds, and the sampled frames' numbers and times in the source."""
    indices = [] if metadata.frames_indices is None else [int(index) for index in metadata.frames_indices]
    times = getattr(metadata, "frame_times", None)
    if times is None and metadata.fps:
        times = [index / metadata.fps for index in indices]
    return {
        "fps": metadata.fps,
        "duration": metadata.duration,
        "total_num_frames": metadata.total_num_frames,
        "frames_indices": indices,
        "frame_times": None if times is None else [float(time) for time in times],
    }
