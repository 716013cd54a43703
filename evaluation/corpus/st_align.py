"""Annotations in the format of the ST-Align benchmark: whole frames, pixel boxes as corner and size, names in texts.

A file (`stvg.json`, `svg.json`, `elc.json`) is a list of entries `{video_path, meta: {width, height, split: [first,
last], spatial_token: {name: [x, y, w, h] or {frame: [x, y, w, h]}}, time_token: {name: frame}}, conversations: [{from:
"human", value}, {from: "gpt", value}]}`. The texts hold the names; reading puts coordinates in their place.

Source: the ST-Align data set and inference/src/dataset of the repository appletea233/LLaVA-ST. `Differs:` the released
code rewords "From <s> to <e>" at random; here it becomes "In the time range" in a question and "During the span of"
in an answer.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from longvideo.evaluation.corpus.grounding import NUM_FRAMES
from longvideo.evaluation.corpus.grounding_rows import write_text
from longvideo.processing.llava_st.coordinate_text_llava_st import format_coordinate
from longvideo.processing.llava_st.grounding_llava_st import Box, Span, Tube, format_box, format_span, format_tube
from longvideo.processing.llava_st.tasks_llava_st import PHRASES, box_fractions, span_fractions, write_box, write_span

ST_ALIGN_TASKS: tuple[str, ...] = ("stvg", "svg", "elc")
_COORDINATE = r"<TEMP-(?:INPUT|OUTPUT)[0-9.]+>"
_SPAN = re.compile(rf"(?:{'|'.join(PHRASES)}) \{{{_COORDINATE},?{_COORDINATE}\}}")
_TIME = re.compile(r"(Starts in|Ends in) " + _COORDINATE)
_REGION = re.compile(r"\[<WIDTH-INPUT[^\]]*\]")
_TUBE = re.compile(_COORDINATE + r":\[.*\]$")
_SPEAKERS = ("human", "gpt")


def to_st_align(row: Mapping[str, Any]) -> dict[str, Any]:
    """Turns a row of the corpus into an entry.

    Args:
        row: from `grounding_row`, of a task in ST_ALIGN_TASKS.

    Returns:
        The entry; times are rounded to whole frames, boxes to hundredths of a pixel.

    Raises:
        ValueError: a row of another task.
    """
    if row["task"] not in ST_ALIGN_TASKS:
        raise ValueError(f"task {row['task']!r} has no ST-Align file: expected one of {', '.join(ST_ALIGN_TASKS)}")
    fps = row["fps"]
    frames = [round(time * fps) for time in row["tube"]["times"]]
    names: dict[str, Any] = {
        "<bboxes>": dict(zip(map(str, frames), map(_corner_and_size, row["tube"]["boxes"]), strict=True))
    }
    if row["box"] is not None:
        names["<region>"] = _corner_and_size(row["box"])
    start, end = (round(time * fps) for time in row["span"])
    question, answer = (_TUBE.sub("<bboxes>", _with_names(row[key])) for key in ("question", "answer"))
    return {
        "video_path": row["messages"][0]["content"][0]["path"],
        "meta": {
            "width": row["size"][0],
            "height": row["size"][1],
            "split": [0, round(row["duration"] * fps)],
            "fps": fps,
            "spatial_token": names,
            "time_token": {"<s>": start, "<e>": end},
        },
        "conversations": [{"from": "human", "value": f"<video>\n{question}"}, {"from": "gpt", "value": answer}],
    }


def _corner_and_size(box: Iterable[float]) -> list[float]:
    x1, y1, x2, y2 = box
    return [round(value, 2) for value in (x1, y1, x2 - x1, y2 - y1)]


def _with_names(text: str) -> str:
    text = _REGION.sub("<region>", _SPAN.sub("From <s> to <e>", text))
    return _TIME.sub(lambda match: f"{match[1]} {'<s>' if match[1] == 'Starts in' else '<e>'}", text)


def from_st_align(
    entry: Mapping[str, Any],
    task: str,
    *,
    num_frames: int = NUM_FRAMES,
    folder: str | os.PathLike[str] = ".",
    benchmark_style: bool = False,
) -> dict[str, Any]:
    """Turns an entry into a row as `grounding_row` makes it.

    Args:
        entry: of a benchmark file.
        task: one of ST_ALIGN_TASKS.
        num_frames: frames that the model samples from the split; the tube is reduced to these.
        folder: folder that video paths are relative to.
        benchmark_style: whether questions write spans and boxes as the release's benchmark scripts do; see
            `task_question`.

    Returns:
        The row. Without a rate in the entry, as in the benchmark, one frame is taken for one second.

    Raises:
        ValueError: an unknown task, or an entry that lacks a field, a box at the sampled frames, or a name that its
            texts use.
    """
    if task not in ST_ALIGN_TASKS:
        raise ValueError(f"unknown ST-Align task {task!r}: use {', '.join(ST_ALIGN_TASKS)}")
    try:
        meta, turns = entry["meta"], {turn["from"]: turn["value"] for turn in entry["conversations"]}
        size, (first, last) = (meta["width"], meta["height"]), meta["split"]
        names, moments = meta["spatial_token"], meta["time_token"]
        texts = {who: turns[who].replace("<video>\n", "").replace("<video>", "") for who in _SPEAKERS}
        path = os.path.join(folder, entry["video_path"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"this is no ST-Align entry, it lacks {error}: {str(entry)[:200]}") from error
    fps = float(meta.get("fps") or 1.0)
    sampled = {first + round(place / max(num_frames - 1, 1) * (last - first)) for place in range(num_frames)}
    tubes = {name: _read_tube(boxes, sampled, first, fps) for name, boxes in names.items() if isinstance(boxes, dict)}
    boxes = {name: _box(value) for name, value in names.items() if not isinstance(value, dict)}
    if not any(tube.times for tube in tubes.values()):
        raise ValueError(f"{path}: no box lies at one of the {num_frames} sampled frames of {[first, last]}")
    clip = _Clip(size, (last - first) / fps, benchmark_style)
    times = {name: (frame - first) / fps for name, frame in moments.items()}
    written = {who: clip.fill(text, who, times, boxes, tubes) for who, text in texts.items()}
    region, tube = next(iter(boxes.values()), None), next(iter(tubes.values()))
    caption = re.search(r"Ends in .*?, (.*?)\.(?: Object bounding box|$)", written["gpt"])
    # Times are fractions of the split, so the model has to see that part and no more.
    visual: dict[str, Any] = {"type": "video", "path": path, "split": [first, last]}
    return {
        "id": f"{task}-{entry['video_path']}",
        "messages": [
            {"role": "user", "content": [visual, {"type": "text", "text": written["human"]}]},
            {"role": "assistant", "content": [{"type": "text", "text": written["gpt"]}]},
        ],
        "task": task,
        "question": written["human"],
        "answer": written["gpt"],
        "size": list(size),
        "split": [first, last],
        "duration": clip.duration,
        "fps": fps,
        "caption": caption[1] if caption else None,
        "span": [times[name] for name in ("<s>", "<e>")] if {"<s>", "<e>"} <= times.keys() else None,
        "box": None if region is None else [region.x1, region.y1, region.x2, region.y2],
        "tube": {"times": list(tube.times), "boxes": [[b.x1, b.y1, b.x2, b.y2] for b in tube.boxes]},
    }


def _box(corner_and_size: Iterable[float]) -> Box:
    x, y, width, height = corner_and_size
    return Box(x, y, x + width, y + height)


def _read_tube(boxes: Mapping[str, Any], sampled: set[int], first: int, fps: float) -> Tube:
    frames = sorted(frame for frame in map(int, boxes) if frame in sampled)
    return Tube(tuple((frame - first) / fps for frame in frames), tuple(_box(boxes[str(frame)]) for frame in frames))


class _Clip:
    """Puts coordinates in the place of names, for one video."""

    def __init__(self, size: tuple[int, int], duration: float, benchmark_style: bool) -> None:
        self.size, self.duration, self.benchmark_style = size, duration, benchmark_style

    def fill(
        self, text: str, who: str, times: Mapping[str, float], boxes: Mapping[str, Box], tubes: Mapping[str, Tube]
    ) -> str:
        asks = who == "human"
        if "From <s> to <e>" in text:
            text = text.replace("From <s> to <e>", self._span(times["<s>"], times["<e>"], asks))
        for name, time in times.items():
            text = text.replace(
                name, format_coordinate("TEMP", self._fraction(time), way="INPUT" if asks else "OUTPUT")
            )
        for name, box in boxes.items():
            text = text.replace(name, self._box(box, asks))
        for name, tube in tubes.items():
            inside = Tube(tube.times, tuple(map(self._inside, tube.boxes)))
            text = text.replace(name, format_tube(inside, size=self.size, duration=self.duration))
        left = re.search(r"<[a-z_]+\d*>", text)
        if left:
            raise ValueError(f"the name {left[0]} is in neither spatial_token nor time_token: {text!r}")
        return text

    def _fraction(self, time: float) -> float:
        return min(max(time / self.duration, 0.0), 1.0) if self.duration else 0.0

    def _span(self, start: float, end: float, asks: bool) -> str:
        if not asks:
            return f"During the span of {format_span(Span(start, end), duration=self.duration)}"
        fractions = span_fractions((start, end), duration=self.duration)
        return f"{PHRASES[0]} {write_span(fractions, benchmark_style=self.benchmark_style).strip()}"

    def _box(self, box: Box, asks: bool) -> str:
        inside = self._inside(box)
        if not asks:
            return format_box(inside, size=self.size)
        edges = (inside.x1, inside.y1, inside.x2, inside.y2)
        return write_box(box_fractions(edges, self.size), benchmark_style=self.benchmark_style).strip()

    def _inside(self, box: Box) -> Box:
        """Annotations may reach beyond the frame; coordinates cannot."""
        width, height = self.size
        return Box(max(box.x1, 0), max(box.y1, 0), min(box.x2, width), min(box.y2, height))


def write_st_align(out: str | os.PathLike[str], rows: Iterable[Mapping[str, Any]]) -> list[Path]:
    """Writes one annotation file for each task.

    Args:
        out: folder; rows name their videos relative to it.
        rows: rows of the corpus; those of tasks without a file are left out.

    Returns:
        The files.
    """
    entries: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["task"] in ST_ALIGN_TASKS:
            entries.setdefault(row["task"], []).append(to_st_align(row))
    paths = []
    for task, found in entries.items():
        paths.append(Path(out) / f"{task}.json")
        write_text(paths[-1], json.dumps(found, indent=1) + "\n")
    return paths


def read_st_align(
    path: str | os.PathLike[str],
    task: str | None = None,
    *,
    num_frames: int = NUM_FRAMES,
    video_folder: str | os.PathLike[str] | None = None,
    benchmark_style: bool = False,
) -> Iterator[dict[str, Any]]:
    """Rows of an annotation file.

    Args:
        path: the file.
        task: one of ST_ALIGN_TASKS; None takes the name of the file.
        num_frames: frames that the model samples.
        video_folder: folder of the videos; None takes that of the file.
        benchmark_style: see `from_st_align`.

    Returns:
        Rows as of `from_st_align`, one by one.

    Raises:
        ValueError: an unknown task, or an entry that cannot be read.
        FileNotFoundError: no such file.
    """
    path = Path(path)
    task = path.stem if task is None else task
    folder = path.parent.resolve() if video_folder is None else Path(video_folder)
    for entry in json.loads(path.read_text(encoding="utf-8")):
        yield from_st_align(entry, task, num_frames=num_frames, folder=folder, benchmark_style=benchmark_style)
