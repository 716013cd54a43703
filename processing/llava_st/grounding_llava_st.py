"""Answers of LLaVA-ST as spans in seconds and boxes in pixels, and the way back into text.

The model writes times and places as discrete tokens, `{<TEMP-010><TEMP-065>}` for a span, `[<WIDTH-000><HEIGHT-050>
<WIDTH-099><HEIGHT-098>]` for a box, `<TEMP-010>:[...]` for a box at a time. Token n of M stands for n/(M-1) of the
clip or of the frame. The canonical form `<TEMP-OUTPUT0.300>`, the shorthand `<t0.3>` and the numbers of the released
conversion (`{0.10101,0.65657}`, `0.10101,:[...]`) are read as well. Nothing that a model may write raises: what cannot
be read is kept with the reason.

Paper: LLaVA-ST, the answers of its tasks. Source: inference/src/utils.py of the repository appletea233/LLaVA-ST for
the forms. `Differs:` the released parsers keep the first match only and drop the rest silently.
"""

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from longvideo.processing.llava_st.answer_reader_llava_st import Found, read_answer

TASKS = ("tvg", "tr", "rec", "reg", "dgc", "stvg", "svg", "elc", "dvc")
# Tasks whose answer is about one thing, so that all its boxes with times make one tube.
_ONE_TUBE = ("stvg", "svg", "elc")
_CHAT_MARK = re.compile(r"<\|[^<>|\s]*\|>")
_LABEL = re.compile(r"[\s.,;:]*\bObject bounding box(?:es)?\s*:?\s*$", re.IGNORECASE)
_BOX_AXES = ("WIDTH", "HEIGHT", "WIDTH", "HEIGHT")


@dataclass(frozen=True)
class Span:
    """Part of a video: `start` and `end` in seconds of the source video."""

    start: float
    end: float


@dataclass(frozen=True)
class Box:
    """Part of a frame: left, top, right and bottom in pixels of the source frame."""

    x1: float
    y1: float
    x2: float
    y2: float


@dataclass(frozen=True)
class Tube:
    """One thing through time: `times` in seconds of the source video, ascending, and the box at each."""

    times: tuple[float, ...]
    boxes: tuple[Box, ...]


@dataclass(frozen=True)
class Caption:
    """Words of an answer with the part of the video or frame that they describe."""

    text: str
    span: Span | None = None
    box: Box | None = None
    tube: Tube | None = None


@dataclass(frozen=True)
class Malformed:
    """A piece of an answer that could not be read, and the reason."""

    text: str
    reason: str


@dataclass(frozen=True)
class GroundingResult:
    """An answer and everything that was read from it, each in the order of the text."""

    text: str
    spans: tuple[Span, ...] = ()
    boxes: tuple[Box, ...] = ()
    tubes: tuple[Tube, ...] = ()
    captions: tuple[Caption, ...] = ()
    malformed: tuple[Malformed, ...] = ()


def parse_grounding(
    text: str,
    *,
    size: tuple[float, float] | Mapping[str, float] | None,
    duration: float | None,
    start: float = 0.0,
    timeline: tuple[Sequence[float], Sequence[float]] | None = None,
    task: str | None = None,
    event_start: float | None = None,
    num_temporal: int = 100,
    num_spatial: int = 100,
) -> GroundingResult:
    """Read an answer; whatever the model wrote, this returns.

    Args:
        text: The answer, decoded with `skip_special_tokens=False`, because coordinates are special tokens.
        size: (width, height) of the source frames in pixels, or {"width": ..., "height": ...}; None for a question
            about time only: boxes are then reported as malformed.
        duration: Seconds from the first to the last frame of what the model saw; None for an image: times are then
            reported as malformed.
        start: Second of the source video at which the first frame lies.
        timeline: Ascending fractions of the clip, and the seconds of the source video that they stand for, where
            frames do not follow each other evenly (`seen_timeline`); None for the same share of `duration`.
        task: One of TASKS. It says what captions the answer has, and that all boxes with times are one tube; without
            it both are told from the answer's form.
        event_start: Start in seconds of the event that the question of "elc" named. An answer "Ends in ..." gives the
            end only; without this its start is the first time of its tube.
        num_temporal: Temporal tokens of the model.
        num_spatial: Spatial tokens of the model on each axis.

    Returns:
        Spans and tubes in seconds of the source video, boxes in pixels, captions, and what could not be read. A span
        may have no length, since a short event lies within one token; a box of no area is malformed.

    Raises:
        ValueError: a size, duration, task or number of tokens that cannot be; never for the text.
    """
    width, height = _checked_size(size)
    if duration is not None and not (math.isfinite(duration) and duration >= 0):
        raise ValueError(f"duration is {duration}, expected seconds, 0 or more, or None for an image")
    if task is not None and task not in TASKS:
        raise ValueError(f"task is {task!r}, expected one of {', '.join(TASKS)} or None")
    if num_temporal < 2 or num_spatial < 2:
        raise ValueError(f"num_temporal is {num_temporal} and num_spatial {num_spatial}, expected 2 or more each")
    # Chat marks become blanks, so that places in the text stay.
    body = _CHAT_MARK.sub(lambda match: " " * len(match[0]), text)
    found = read_answer(body, num_temporal=num_temporal, num_spatial=num_spatial)
    items = [_scaled(item, width, height, start, duration, timeline) for item in found]
    task = task or _likely_task(body, items)
    items, tubes = _with_tubes(body, items, one_tube=task in _ONE_TUBE)
    items = _with_event(items, tubes, event_start)
    return GroundingResult(
        text=text,
        spans=tuple(item.value for item in items if item.kind == "span"),
        boxes=tuple(item.value for item in items if item.kind == "box"),
        tubes=tubes,
        captions=tuple(_captions(body, items, tubes, task)),
        malformed=tuple(Malformed(body[item.start : item.end], item.value) for item in items if item.kind == "bad"),
    )


def format_span(
    span: Span, *, duration: float, start: float = 0.0, role: str = "output", num_temporal: int = 100
) -> str:
    """Write a span as `{<TEMP-OUTPUT0.300><TEMP-OUTPUT0.512>}`.

    Args:
        span: Seconds of the source video.
        duration: Length of the clip in seconds.
        start: Where the clip begins in the source video, in seconds.
        role: "output" for an answer, "input" for a question, "discrete" for `{<TEMP-030><TEMP-051>}` as generated.
        num_temporal: Temporal tokens of the model, for "discrete".

    Returns:
        The text, with three digits of the fraction.

    Raises:
        ValueError: a span that is reversed or outside the clip, or an unknown role.
    """
    if span.start > span.end:
        raise ValueError(f"the span starts at {span.start} s, after its end at {span.end} s: swap them")
    return "{" + "".join(_time(t, duration, start, role, num_temporal) for t in (span.start, span.end)) + "}"


def format_box(box: Box, *, size: tuple[float, float], role: str = "output", num_spatial: int = 100) -> str:
    """Write a box as `[<WIDTH-OUTPUT0.100><HEIGHT-OUTPUT0.200><WIDTH-OUTPUT0.300><HEIGHT-OUTPUT0.400>]`.

    Args:
        box: Pixels of the source frame.
        size: (width, height) of the source frame in pixels.
        role: "output" for an answer, "input" for a question, "discrete" for tokens as generated.
        num_spatial: Spatial tokens of the model on each axis, for "discrete".

    Returns:
        The text, with three digits of the fraction.

    Raises:
        ValueError: a box of no area or outside the frame, or an unknown role.
    """
    width, height = _checked_size(size)
    if width is None or height is None:
        raise ValueError("size is None, expected (width, height) in pixels")
    if box.x1 >= box.x2 or box.y1 >= box.y2:
        raise ValueError(f"{box} has no area: expected x1 < x2 and y1 < y2")
    ends = (box.x1 / width, box.y1 / height, box.x2 / width, box.y2 / height)
    for name, value, limit in zip(("x1", "y1", "x2", "y2"), ends, (width, height) * 2, strict=True):
        if not -1e-6 <= value <= 1 + 1e-6:
            raise ValueError(f"{name} of {box} is outside the frame, expected 0 to {limit} pixels")
    tokens = (_token(axis, value, role, num_spatial) for axis, value in zip(_BOX_AXES, ends, strict=True))
    return "[" + "".join(tokens) + "]"


def format_tube(
    tube: Tube,
    *,
    size: tuple[float, float],
    duration: float,
    start: float = 0.0,
    role: str = "output",
    num_temporal: int = 100,
    num_spatial: int = 100,
) -> str:
    """Write a tube as `<TEMP-OUTPUT0.300>:[...] <TEMP-OUTPUT0.310>:[...]`.

    Args:
        tube: Seconds of the source video and pixels of its frames.
        size: (width, height) of the source frames in pixels.
        duration: Length of the clip in seconds.
        start: Where the clip begins in the source video, in seconds.
        role: "output" for an answer, "input" for a question, "discrete" for tokens as generated.
        num_temporal: Temporal tokens of the model, for "discrete".
        num_spatial: Spatial tokens of the model on each axis, for "discrete".

    Returns:
        One entry for each time, with blanks between.

    Raises:
        ValueError: not as many times as boxes, times that do not ascend, or what `format_box` raises.
    """
    if len(tube.times) != len(tube.boxes):
        raise ValueError(f"the tube has {len(tube.times)} times and {len(tube.boxes)} boxes: expected one box a time")
    for before, after in itertools.pairwise(tube.times):
        if before >= after:
            raise ValueError(f"the tube's times go from {before} s to {after} s: sort them, each once")
    return " ".join(
        _time(time, duration, start, role, num_temporal)
        + ":"
        + format_box(box, size=size, role=role, num_spatial=num_spatial)
        for time, box in zip(tube.times, tube.boxes, strict=True)
    )


def _time(time: float, duration: float, start: float, role: str, num_temporal: int) -> str:
    # A clip of one frame has no length, and every time in it is its start.
    value = (time - start) / duration if duration > 0 else (time - start)
    if not -1e-6 <= value <= 1 + 1e-6:
        raise ValueError(f"{time} s is outside the clip, expected {start} to {start + duration} s")
    return _token("TEMP", value, role, num_temporal)


def _token(axis: str, value: float, role: str, num_tokens: int) -> str:
    value = min(max(value, 0.0), 1.0)
    if role == "discrete":
        return f"<{axis}-{round(value * (num_tokens - 1)):03d}>"
    if role not in ("input", "output"):
        raise ValueError(f"role is {role!r}, expected 'input', 'output' or 'discrete'")
    return f"<{axis}-{role.upper()}{value:.3f}>"


def _checked_size(size: Any) -> tuple[float, float] | tuple[None, None]:
    if size is None:
        return None, None
    pair = (size["width"], size["height"]) if isinstance(size, Mapping) else tuple(size)
    if len(pair) != 2 or not all(math.isfinite(side) and side > 0 for side in pair):
        raise ValueError(f"size is {size}, expected (width, height) in pixels, both above 0")
    return float(pair[0]), float(pair[1])


def _scaled(
    item: Found,
    width: float | None,
    height: float | None,
    start: float,
    duration: float | None,
    timeline: tuple[Sequence[float], Sequence[float]] | None,
) -> Found:
    """A structure in seconds and pixels; bad where the length of the clip or the size of the frame is not known."""
    if item.kind == "bad":
        return item
    if item.kind != "box" and duration is None:
        return replace(item, kind="bad", value="no duration was given to turn times into seconds")
    if item.kind in ("box", "entry") and (width is None or height is None):
        return replace(item, kind="bad", value="no size was given to turn boxes into pixels")

    def seconds(value: float) -> float:
        return start + value * (duration or 0.0) if timeline is None else float(np.interp(value, *timeline))

    if item.kind == "span":
        return replace(item, value=Span(*map(seconds, item.value)))
    if item.kind in ("begin", "end"):
        return replace(item, value=seconds(item.value))
    time, box = item.value if item.kind == "entry" else (0.0, item.value)
    pixels = Box(*(value * side for value, side in zip(box, (width, height) * 2, strict=True)))
    return replace(item, value=pixels if item.kind == "box" else (seconds(time), pixels))


def _likely_task(body: str, items: Sequence[Found]) -> str | None:
    """The task whose captions the form of an answer shows."""
    kinds = [item.kind for item in items]
    if "end" in kinds:
        return "elc"
    if "entry" in kinds:
        return None
    if any(item.kind == "span" and re.match(r"\s*,\s*\w", body[item.end :]) for item in items):
        return "dvc"
    return "dgc" if "span" not in kinds and kinds.count("box") > 1 else None


def _with_tubes(body: str, items: Sequence[Found], *, one_tube: bool) -> tuple[list[Found], tuple[Tube, ...]]:
    """Timed boxes gathered to tubes; one that is given again for the same time becomes bad."""
    kept = list(items)
    groups: list[dict[float, int]] = []
    before = 0
    for i, item in enumerate(items):
        if item.kind == "entry":
            time = item.value[0]
            words = re.search(r"\w", body[before : item.start])
            if not groups or not (one_tube or (not words and time >= max(groups[-1]))):
                groups.append({})
            if time in groups[-1]:
                again = groups[-1][time]
                kept[again] = replace(
                    items[again], kind="bad", value="a later box for the same time replaces this one"
                )
            groups[-1][time] = i
        before = item.end
    tubes = []
    for group in groups:
        times = sorted(group)
        tubes.append(Tube(tuple(times), tuple(items[group[time]].value[1] for time in times)))
    return kept, tuple(tubes)


def _with_event(items: Sequence[Found], tubes: Sequence[Tube], event_start: float | None) -> list[Found]:
    """ "Ends in T" as a span, with the start that is said, or asked for, or that of the tube."""
    result, begin = [], event_start
    for item in items:
        if item.kind == "begin":
            begin = item.value
        elif item.kind != "end":
            result.append(item)
        else:
            first = begin if begin is not None else (tubes[0].times[0] if tubes else None)
            if first is None:
                result.append(
                    replace(
                        item, kind="bad", value=f"an end at {item.value:.6g} s without its start: pass event_start"
                    )
                )
            elif first > item.value:
                result.append(replace(item, kind="bad", value=f"the event ends before its start at {first:.6g} s"))
            else:
                result.append(replace(item, kind="span", value=Span(first, item.value)))
    return result


def _captions(body: str, items: Sequence[Found], tubes: Sequence[Tube], task: str | None) -> Iterator[Caption]:
    starts = [item.start for item in items] + [len(body)]
    if task in ("tr", "reg"):
        if body.strip():
            yield Caption(body.strip())
    elif task == "dvc":
        for i, item in enumerate(items):
            words = _words(body[item.end : starts[i + 1]])
            if item.kind == "span" and words:
                yield Caption(words, span=item.value)
    elif task == "dgc":
        before, words = 0, ""
        for item in items:
            # Several boxes in a row belong to one phrase.
            words = _words(body[before : item.start]) or words
            before = item.end
            if item.kind == "box" and words:
                yield Caption(words, box=item.value)
    elif task == "elc":
        spans = [i for i, item in enumerate(items) if item.kind == "span"]
        span = items[spans[0]].value if spans else None
        # Without a span the sentence still stands somewhere between the structures.
        ends = [items[spans[0]].end] if spans else [0, *(item.end for item in items)]
        gaps = [_words(body[end : min(start for start in starts if start >= end)]) for end in ends]
        words = next((gap for gap in gaps if gap), None)
        if words:
            yield Caption(words, span=span, tube=tubes[0] if tubes else None)


def _words(text: str) -> str:
    """The sentence in a piece of an answer, without the label of what follows and the marks around it."""
    return _LABEL.sub("", text).strip(" \t\r\n,.;:")
