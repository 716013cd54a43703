"""Questions of LLaVA-ST's tasks, with seconds and pixels turned into coordinates.

Source: the paper's tasks, `inference/src` and the demo of appletea233/LLaVA-ST. The release has no question for dense
captioning ("dvc") and none for the words behind the time range of "svg"; those here are our own.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from longvideo.processing.llava_st.answer_sources_llava_st import seen_period, seen_timeline
from longvideo.processing.llava_st.coordinate_text_llava_st import format_coordinate

TUBE_REQUEST = "give the spatial bounding box corresponding to each timestamp in the time period."
PHRASES = (
    "In the time range",
    "During the span of",
    "During the period",
    "Within the time frame of",
    "In the time period",
    "During",
    "Between",
    "At",
)


class Task(NamedTuple):
    """A task.

    Attributes:
        visual: "video" or "image".
        needs: What a question needs: some of "query", "span_seconds", "time_seconds", "box".
        patterns: Its questions, with `{query}`, `{span}`, `{time}`, `{box}`.
        query: What `query` says where it is not given.
    """

    visual: str
    needs: tuple[str, ...]
    patterns: tuple[str, ...]
    query: str | None = None


TASKS = {
    "tvg": Task(
        "video",
        ("query",),
        (
            "Give you a textual query: '{query}'. When does the described content occur in the video? Please return "
            "the start and end timestamps.",
        ),
    ),
    "tr": Task(
        "video",
        ("span_seconds",),
        (
            "Describe what took place during the period {span} in the video.",
            "What was going on within the time frame of {span} in the video?",
        ),
    ),
    "rec": Task(
        "image",
        ("query",),
        (
            "Where can I find {query} in this image?",
            "What part of this image contains {query}?",
            "Where does {query} appear in this image?",
            "Where is {query} situated within this image?",
            "Please describe the location of {query} in this image.",
        ),
    ),
    "reg": Task(
        "image",
        ("box",),
        (
            "What object can be observed within the region {box} in the image?",
            "What is the primary object within the region {box}?",
        ),
    ),
    "dgc": Task(
        "image",
        (),
        (
            "{query} Please output with interleaved bounding boxes for the corresponding phrases.",
            "{query} Please respond with interleaved bounding boxes for the corresponding phrases.",
        ),
        query="Please describe this image.",
    ),
    "stvg": Task(
        "video",
        ("query",),
        (
            "At which time interval in the video can we see {query} occurring? Please describe the location of the "
            "corresponding subject/object in this video.Please firstly give the timestamps, and then " + TUBE_REQUEST,
        ),
    ),
    "svg": Task(
        "video",
        ("query", "span_seconds"),
        tuple(phrase + " {span}, where is {query} located in the video?Please " + TUBE_REQUEST for phrase in PHRASES),
    ),
    "elc": Task(
        "video",
        ("time_seconds", "box"),
        (
            "Starts in {time}, what happened about the subject/object within the specified region {box}? Where is the "
            "corresponding subject/object located?Please firstly give the end timestamp, then give the event "
            "associated with the object/subject, finally " + TUBE_REQUEST,
        ),
    ),
    "dvc": Task(
        "video",
        (),
        (
            "Please describe the events of the video one after another. Give the start and end timestamps of each "
            "event, followed by what happens.",
        ),
    ),
}


def task_question(
    task: str,
    *,
    query: str | None = None,
    span_seconds: Sequence[float] | None = None,
    time_seconds: float | None = None,
    box: Sequence[float] | None = None,
    duration: float | None = None,
    size: Sequence[float] | Mapping[str, float] | None = None,
    start: float = 0.0,
    metadata: Any = None,
    pattern: int = 0,
    benchmark_style: bool = False,
    clip: bool = False,
) -> str:
    """Write the question of a task.

    Args:
        task: Name of one of `TASKS`.
        query: What is looked for: an event ("tvg", "stvg"), a thing ("rec", "svg"), or the request ("dgc").
        span_seconds: (start, end) in seconds of the source video.
        time_seconds: Begin of an event in seconds of the source video ("elc"); the start of `span_seconds` when None.
        box: (left, top, right, bottom) in pixels of the source.
        duration: Seconds from the first to the last frame of what the model sees; needed for times.
        size: (width, height) of the source in pixels, or a mapping with both; needed for boxes.
        start: Second of the source at which the first frame lies.
        metadata: What `describe_video` says of the video, or an entry of `video_metadata`, in place of `duration` and
            `start`, and of `size` where that is None. Only this way seconds are right where the frame rate varies.
        pattern: Index into the questions of the task.
        benchmark_style: Whether spans and boxes are written without commas and with blanks around them, as the
            release's benchmark scripts do, and not as its demo does.
        clip: Whether times and boxes that leave the video or the frame are clipped, as in the benchmark scripts.

    Returns:
        The question, with coordinates such as `<TEMP-INPUT0.300>`.

    Raises:
        ValueError: Unknown task or pattern, something that it needs is missing, something else was given, a reversed
            span, a box without area, or coordinates outside of the video or the frame.
    """
    known = find_task(task)
    if time_seconds is None and span_seconds is not None and "time_seconds" in known.needs:
        time_seconds, span_seconds = span_seconds[0], None
    given = {"query": query, "span_seconds": span_seconds, "time_seconds": time_seconds, "box": box}
    allowed = {*known.needs, *(["query"] if known.query else [])}
    for name, value in given.items():
        if value is None and name in known.needs:
            raise ValueError(f"Task {task!r} needs {name}=...; it needs {', '.join(known.needs)}.")
        if value is not None and name not in allowed:
            raise ValueError(
                f"Task {task!r} takes no {name}; it takes {', '.join(sorted(allowed)) or 'nothing but the video'}."
            )
    if not 0 <= pattern < len(known.patterns):
        raise ValueError(f"pattern={pattern}, but task {task!r} has the patterns 0 to {len(known.patterns) - 1}.")
    if query is not None and not query.strip():
        raise ValueError(f"The query of task {task!r} is empty; write what shall be found.")
    fields = {"query": query if query is not None else known.query}
    whole = {"start": start, "duration": duration, "clip": clip}
    if metadata is not None:
        whole.update(zip(("start", "duration"), seen_period(metadata), strict=True), timeline=seen_timeline(metadata))
        size = (metadata.width, metadata.height) if size is None and metadata.width and metadata.height else size
    if span_seconds is not None:
        fields["span"] = write_span(span_fractions(span_seconds, **whole), benchmark_style=benchmark_style)
    if time_seconds is not None:
        fields["time"] = format_coordinate("TEMP", time_fraction(time_seconds, **whole))
    if box is not None:
        fields["box"] = write_box(box_fractions(box, size, clip=clip), benchmark_style=benchmark_style)
    return known.patterns[pattern].format(**fields)


def task_messages(task: str, *, video: Any = None, image: Any = None, **kwargs: Any) -> list[dict[str, Any]]:
    """Write the messages of a task.

    Args:
        task: Name of one of `TASKS`.
        video: Path, array, or a whole video block (a mapping), for tasks about videos; None for a block that the
            caller fills in.
        image: The same for tasks about images.
        **kwargs: As for `task_question`.

    Returns:
        One user message with the visual and the question; without a visual the question alone.

    Raises:
        ValueError: As `task_question` says, or the visual is of the wrong kind.
    """
    question, kind = task_question(task, **kwargs), find_task(task).visual
    source, other = (video, image) if kind == "video" else (image, video)
    if other is not None:
        raise ValueError(f"Task {task!r} is about {kind}s; pass {kind}=... in place of the other kind.")
    blocks: list[dict[str, Any]] = [{"type": "text", "text": question}]
    if source is not None:
        blocks.insert(0, {**source, "type": kind} if isinstance(source, Mapping) else {"type": kind, kind: source})
    return [{"role": "user", "content": blocks}]


def find_task(task: str) -> Task:
    """Look a task up.

    Args:
        task: Its name.

    Returns:
        The task.

    Raises:
        ValueError: There is none of that name.
    """
    if task not in TASKS:
        raise ValueError(f"There is no task {task!r}; expected one of {', '.join(TASKS)}.")
    return TASKS[task]


def time_fraction(
    seconds: float,
    *,
    duration: float | None,
    start: float = 0.0,
    clip: bool = False,
    timeline: tuple[Sequence[float], Sequence[float]] | None = None,
) -> float:
    """Turn a second of the source into a fraction of what the model sees.

    Args:
        seconds: Second of the source.
        duration: Seconds from the first to the last frame of what the model sees.
        start: Second of the source at which the first frame lies.
        clip: Whether times outside of it are clipped.
        timeline: Ascending fractions, and the seconds of the source that they stand for, where frames do not follow
            each other evenly (`seen_timeline`); None for the same share of `duration`.

    Returns:
        Between 0 and 1.

    Raises:
        ValueError: The duration is missing or not positive, or the time lies outside.
    """
    if duration is None or not math.isfinite(duration) or duration <= 0:
        raise ValueError(
            f"duration={duration}: to turn seconds into coordinates, pass the positive number of seconds of the video "
            "(or of its part) that the model sees."
        )
    fraction = (float(seconds) - start) / duration
    if clip and not math.isnan(fraction):
        seconds = start + min(max(fraction, 0.0), 1.0) * duration
        fraction = min(max(fraction, 0.0), 1.0)
    # One part in a million: seconds that were computed from frames may lie a rounding error beyond the end.
    if not -1e-6 <= fraction <= 1 + 1e-6:
        raise ValueError(
            f"The time {seconds:g} s lies outside of the video, which runs from {start:g} s to {start + duration:g} s."
        )
    if timeline is not None:
        fraction = float(np.interp(seconds, *reversed(timeline)))
    return min(max(fraction, 0.0), 1.0)


def span_fractions(
    span_seconds: Sequence[float],
    *,
    duration: float | None,
    start: float = 0.0,
    clip: bool = False,
    timeline: tuple[Sequence[float], Sequence[float]] | None = None,
) -> tuple[float, float]:
    """Turn a span of the source into fractions of what the model sees.

    Args:
        span_seconds: (start, end) in seconds of the source.
        duration: As for `time_fraction`.
        start: As for `time_fraction`.
        clip: As for `time_fraction`.
        timeline: As for `time_fraction`.

    Returns:
        Start and end between 0 and 1.

    Raises:
        ValueError: It is no pair, is reversed or empty, or lies outside.
    """
    if len(span_seconds) != 2:
        raise ValueError(f"span_seconds={span_seconds!r}, expected (start, end) in seconds.")
    begin, end = (float(second) for second in span_seconds)
    if not begin < end:
        raise ValueError(
            f"The span from {begin:g} s to {end:g} s is reversed or empty; its end must lie after its start."
        )
    whole = {"duration": duration, "start": start, "clip": clip, "timeline": timeline}
    first, last = (time_fraction(second, **whole) for second in (begin, end))
    if first >= last:
        raise ValueError(f"The span from {begin:g} s to {end:g} s lies outside of the video altogether.")
    return first, last


def box_fractions(
    box: Sequence[float], size: Sequence[float] | Mapping[str, float] | None, *, clip: bool = False
) -> tuple[float, float, float, float]:
    """Turn a box in source pixels into fractions of width and height.

    Args:
        box: (left, top, right, bottom) in pixels.
        size: (width, height) in pixels, or a mapping with both.
        clip: Whether a box that leaves the frame is clipped.

    Returns:
        Left, top, right, bottom between 0 and 1.

    Raises:
        ValueError: No size, no four numbers, a box without area or reversed, or one that leaves the frame.
    """
    if size is None:
        raise ValueError(
            "To turn a box in pixels into coordinates, pass size=(width, height) of the source in pixels."
        )
    width, height = (size["width"], size["height"]) if isinstance(size, Mapping) else size
    if not (width > 0 and height > 0):
        raise ValueError(f"size=({width}, {height}), expected a positive width and height in pixels.")
    if len(box) != 4:
        raise ValueError(f"box={box!r}, expected (left, top, right, bottom) in pixels.")
    left, top, right, bottom = (float(edge) for edge in box)
    if clip:
        left, right = (min(max(edge, 0.0), width) for edge in (left, right))
        top, bottom = (min(max(edge, 0.0), height) for edge in (top, bottom))
    written = f"The box ({left:g}, {top:g}, {right:g}, {bottom:g})"
    if not (left < right and top < bottom):
        raise ValueError(f"{written} has no area; expected left < right and top < bottom in pixels.")
    if not (left >= 0 and top >= 0 and right <= width and bottom <= height):
        raise ValueError(f"{written} leaves the frame of {width:g} x {height:g} pixels; clip it, or pass clip=True.")
    return left / width, top / height, right / width, bottom / height


def write_span(span: Sequence[float], *, benchmark_style: bool = False) -> str:
    """Write a span of a question.

    Args:
        span: Start and end between 0 and 1.
        benchmark_style: As for `task_question`.

    Returns:
        For instance `{<TEMP-INPUT0.200>,<TEMP-INPUT0.400>}`.
    """
    entries = [format_coordinate("TEMP", value) for value in span]
    return f" {{{''.join(entries)}}} " if benchmark_style else f"{{{','.join(entries)}}}"


def write_box(box: Sequence[float], *, benchmark_style: bool = False) -> str:
    """Write a box of a question.

    Args:
        box: Left, top, right, bottom between 0 and 1.
        benchmark_style: As for `task_question`.

    Returns:
        For instance `[<WIDTH-INPUT0.100>,<HEIGHT-INPUT0.200>,<WIDTH-INPUT0.300>,<HEIGHT-INPUT0.400>]`.
    """
    entries = [format_coordinate(axis, value) for axis, value in zip(("WIDTH", "HEIGHT") * 2, box, strict=True)]
    return f" [{''.join(entries)}]" if benchmark_style else f"[{','.join(entries)}]"
