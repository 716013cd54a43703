"""Annotations in the format of the ST-Align benchmark: whole frames, pixel boxes as corner and size, names in texts.

A file (`stvg.json`, `svg.json`, `elc.json`) is a list of entries `{video_path, meta: {width, height, split: [first,
last], spatial_token: {name: [x, y, w, h] or {frame: [x, y, w, h]}}, time_token: {name: frame}}, conversations: [{from:
"human", value}, {from: "gpt", value}]}`. The texts hold the names; reading puts coordinates in their place.

Source: the ST-Align data set and inference/src/dataset of the repository appletea233/LLaVA-ST. `Differs:` the released
code rewords "From <s> to <e>" at random; here it always becomes "During the span of {...}".
"""

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from longvideo.evaluation.corpus.grounding import NUM_FRAMES
from longvideo.evaluation.corpus.grounding_rows import write_text
from longvideo.processing.llava_st.grounding_llava_st import Box, Span, Tube, format_box, format_span, format_tube

ST_ALIGN_TASKS: tuple[str, ...] = ("stvg", "svg", "elc")
_COORDINATE = r"<TEMP-(?:INPUT|OUTPUT)[0-9.]+>"
_SPAN = re.compile(r"(?:During the span of|In the time range) \{" + _COORDINATE * 2 + r"\}")
_TIME = re.compile(r"(Starts in|Ends in) " + _COORDINATE)
_REGION = re.compile(r"\[<WIDTH-INPUT[^\]]*\]")
_TUBE = re.compile(_COORDINATE + r":\[.*\]$")
_PHRASES = {"human": "In the time range", "gpt": "During the span of"}
_ROLES = {"human": ("user", "input"), "gpt": ("assistant", "output")}


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
    entry: Mapping[str, Any], task: str, *, num_frames: int = NUM_FRAMES, folder: str | os.PathLike[str] = "."
) -> dict[str, Any]:
    """Turns an entry into a row as `grounding_row` makes it.

    Args:
        entry: of a benchmark file.
        task: one of ST_ALIGN_TASKS.
        num_frames: frames that the model samples from the split; the tube is reduced to these.
        folder: folder that video paths are relative to.

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
        texts = {who: turns[who].replace("<video>\n", "").replace("<video>", "") for who in _ROLES}
        path = os.path.join(folder, entry["video_path"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"this is no ST-Align entry, it lacks {error}: {str(entry)[:200]}") from error
    fps = float(meta.get("fps") or 1.0)
    sampled = {first + round(place / max(num_frames - 1, 1) * (last - first)) for place in range(num_frames)}
    tubes = {name: _read_tube(boxes, sampled, first, fps) for name, boxes in names.items() if isinstance(boxes, dict)}
    boxes = {name: _box(value) for name, value in names.items() if not isinstance(value, dict)}
    if not any(tube.times for tube in tubes.values()):
        raise ValueError(f"{path}: no box lies at one of the {num_frames} sampled frames of {[first, last]}")
    clip = _Clip(size, (last - first) / fps)
    times = {name: (frame - first) / fps for name, frame in moments.items()}
    written = {who: clip.fill(text, who, times, boxes, tubes) for who, text in texts.items()}
    region, tube = next(iter(boxes.values()), None), next(iter(tubes.values()))
    caption = re.search(r"Ends in .*?, (.*?)\.(?: Object bounding box|$)", written["gpt"])
    visual: dict[str, Any] = {"type": "video", "path": path}
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

    def __init__(self, size: tuple[int, int], duration: float) -> None:
        self.size, self.duration = size, duration

    def fill(
        self, text: str, who: str, times: Mapping[str, float], boxes: Mapping[str, Box], tubes: Mapping[str, Tube]
    ) -> str:
        role = _ROLES[who][1]
        if "From <s> to <e>" in text:
            span = format_span(Span(times["<s>"], times["<e>"]), duration=self.duration, role=role)
            text = text.replace("From <s> to <e>", f"{_PHRASES[who]} {span}")
        for name, time in times.items():
            # One of two equal coordinates between braces.
            pair = format_span(Span(time, time), duration=self.duration, role=role)
            text = text.replace(name, pair[1 : len(pair) // 2])
        for name, box in boxes.items():
            text = text.replace(name, format_box(self._inside(box), size=self.size, role=role))
        for name, tube in tubes.items():
            inside = Tube(tube.times, tuple(map(self._inside, tube.boxes)))
            text = text.replace(name, format_tube(inside, size=self.size, duration=self.duration, role=role))
        left = re.search(r"<[a-z_]+\d*>", text)
        if left:
            raise ValueError(
                f"the text uses the name {left[0]}, which is in neither spatial_token nor time_token: {text!r}"
            )
        return text

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
) -> Iterator[dict[str, Any]]:
    """Rows of an annotation file.

    Args:
        path: the file.
        task: one of ST_ALIGN_TASKS; None takes the name of the file.
        num_frames: frames that the model samples.
        video_folder: folder of the videos; None takes that of the file.

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
        yield from_st_align(entry, task, num_frames=num_frames, folder=folder)
