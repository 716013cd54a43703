"""Questions about when and where, with exact truth: events in time, shapes in a frame, and shapes through time.

Answers and questions hold coordinates as text: a template token of LLaVA-ST with its value, `<TEMP-OUTPUT0.300>`,
which its processor reads. Times are seconds from the first frame, and the length that a fraction is of is the time of
the last frame, so that frame k of n stands at k/(n-1) (LLaVA-ST's rule for frames and annotations).
"""

import random
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from longvideo.evaluation.corpus.scenes import Actor, Scene
from longvideo.processing.llava_st.coordinate_text_llava_st import format_coordinate
from longvideo.processing.llava_st.grounding_llava_st import (
    Box,
    Caption,
    Span,
    Tube,
    format_box,
    format_span,
    format_tube,
)
from longvideo.processing.llava_st.tasks_llava_st import TASKS, task_question
from longvideo.processing.shared.frame_sampling import spread_indices

GROUNDING_TASKS: tuple[str, ...] = ("rec", "reg", "tvg", "tr", "stvg", "svg", "elc")
# Everything in a picture or a video described with its place or time; asked when named, for long answers take long.
DENSE_TASKS: tuple[str, ...] = ("dgc", "dvc")
ALL_TASKS: tuple[str, ...] = (*GROUNDING_TASKS, *DENSE_TASKS)
IMAGE_TASKS: tuple[str, ...] = ("rec", "reg", "dgc")
EVENT_SORTS: tuple[str, ...] = ("seen", "moves", "coloured", "letter")
NUM_FRAMES = 20
# An event that fills nearly the whole video asks for nothing.
LONGEST = 0.9
# Two events that overlap so much cannot be told apart by their times.
ALIKE = 0.6
# Reach of a shape's edges from its centre, in radii: left, top, right, bottom.
_EXTENTS: dict[str, tuple[float, float, float, float]] = {
    "circle": (0.92, 0.92, 0.92, 0.92),
    "square": (0.8, 0.8, 0.8, 0.8),
    "triangle": (0.98, 0.95, 0.98, 0.75),
    "cross": (0.95, 0.95, 0.95, 0.95),
    "ring": (0.94, 0.94, 0.94, 0.94),
}


@dataclass(frozen=True)
class Event:
    """Something that happens in a part of a video.

    Args:
        sort: one of EVENT_SORTS.
        caption: sentence without full stop, "red circle moves left".
        span: seconds, within the time of the last frame.
        actor: the shape it happens to; None for a letter.
    """

    sort: str
    caption: str
    span: Span
    actor: Actor | None


@dataclass(frozen=True)
class Grounding:
    """One question with its exact answer.

    Args:
        task: one of ALL_TASKS.
        question: text with coordinates as `<TEMP-INPUT0.300>`.
        answer: text with coordinates as `<TEMP-OUTPUT0.300>`.
        bucket: what a corpus balances inside a task.
        subject: the shape it is about, or "letter", or "all"; a scene has each shape once.
        time: seconds of the frame, for tasks about one frame.
        caption: the words of the truth, for "reg", "tr" and "elc".
        span: seconds of the event.
        box: pixels of the shape in the frame (for "elc" in the first frame of the event).
        tube: seconds and pixels at the sampled frames that show the shape.
        parts: for DENSE_TASKS the words of the truth, each with its box or its span.
    """

    task: str
    question: str
    answer: str
    bucket: str
    subject: str
    time: float | None = None
    caption: str | None = None
    span: Span | None = None
    box: Box | None = None
    tube: Tube | None = None
    parts: tuple[Caption, ...] = ()


@lru_cache(maxsize=4096)
def _frame_numbers(total: int, num_frames: int) -> tuple[int, ...]:
    return tuple(spread_indices(0, total - 1, num_frames).tolist())


def end_to_end_times(scene: Scene, num_frames: int = NUM_FRAMES) -> list[float]:
    """Times of the frames that LLaVA-ST samples from the written video, the first and the last among them.

    Args:
        scene: what the video shows.
        num_frames: number of frames.

    Returns:
        Seconds, rising.

    Raises:
        ValueError: num_frames is below 1.

    Source: LLaVA-ST's inference scripts, `load_video`.
    """
    return [number / scene.fps for number in _frame_numbers(scene.duration * scene.fps, num_frames)]


def seen_seconds(scene: Scene) -> float:
    """Time of the last frame of the written video: the length that coordinates are fractions of."""
    return scene.duration - 1 / scene.fps


def actor_box(actor: Actor, time: float, size: tuple[int, int]) -> Box:
    """The smallest box around a shape.

    Args:
        actor: the shape.
        time: seconds.
        size: (width, height) of the frame in pixels.

    Returns:
        Pixels; shapes never leave the frame.
    """
    x, y = actor.position(time)
    left, top, right, bottom = (reach * actor.radius for reach in _EXTENTS[actor.shape])
    width, height = size
    return Box((x - left) * width, (y - top) * height, (x + right) * width, (y + bottom) * height)


def full_name(actor: Actor, time: float) -> str:
    """Colour and shape at a time, "red circle"."""
    return f"{actor.colour_at(time)} {actor.shape}"


def _shown(scene: Scene, actor: Actor, time: float) -> bool:
    return actor.visible(time) and not (scene.needle is not None and scene.needle.visible(time))


def _event_tube(scene: Scene, event: Event, times: list[float], size: tuple[int, int]) -> Tube:
    """The shape's boxes at the sampled frames inside the event."""
    actor = event.actor
    if actor is None:
        return Tube((), ())
    inside = [t for t in times if event.span.start <= t <= event.span.end and _shown(scene, actor, t)]
    return Tube(tuple(inside), tuple(actor_box(actor, t, size) for t in inside))


def list_grounded_events(scene: Scene, num_frames: int = NUM_FRAMES) -> list[Event]:
    """Everything that happens in a part of the video and that the sampled frames show.

    Args:
        scene: what the video shows.
        num_frames: number of sampled frames.

    Returns:
        Events in order of time; at least two sampled frames show each of them (one a letter), and none fills more than
        nine tenths of the video.
    """
    found: list[Event] = []

    def add(sort: str, caption: str, start: float, end: float, actor: Actor | None) -> None:
        span = Span(start, min(end, seen_seconds(scene)))
        shown = [t for t in times if span.start <= t <= span.end and (actor is None or _shown(scene, actor, t))]
        short = span.end - span.start <= LONGEST * seen_seconds(scene)
        if short and len(shown) >= (1 if actor is None else 2):
            found.append(Event(sort, caption, span, actor))

    times = end_to_end_times(scene, num_frames)
    for actor in scene.actors:
        # A shape that changes its colour is named by its shape alone: either colour would be wrong for a while.
        name = actor.shape if actor.change is not None else f"{actor.colour} {actor.shape}"
        add("seen", f"{name} is seen", actor.enter, actor.leave, actor)
        if actor.motion is not None:
            add("moves", f"{name} moves {actor.motion.direction}", actor.motion.start, actor.motion.end, actor)
        if actor.change is not None:
            add("coloured", f"{actor.shape} is {actor.colour}", actor.enter, actor.change, actor)
            add("coloured", f"{actor.shape} is {actor.new_colour}", actor.change, actor.leave, actor)
    if scene.needle is not None:
        add("letter", f"letter {scene.needle.letter} is shown", scene.needle.start, scene.needle.end, None)
    return sorted(found, key=lambda event: (event.span.start, event.caption))


def _overlap(first: Span, second: Span) -> float:
    common = min(first.end, second.end) - max(first.start, second.start)
    hull = max(first.end, second.end) - min(first.start, second.start)
    return max(common, 0.0) / hull


class _Writer:
    """Texts of one scene: questions and answers with coordinates."""

    def __init__(self, scene: Scene, size: tuple[int, int], rng: random.Random) -> None:
        self.size, self.duration, self.rng = size, seen_seconds(scene), rng

    def ask(self, task: str, *, span: Span | None = None, box: Box | None = None, **needs: Any) -> str:
        """One of the task's questions at random."""
        pattern = self.rng.randrange(len(TASKS[task].patterns))
        if span is not None:
            needs["span_seconds"] = (span.start, span.end)
        if box is not None:
            needs["box"] = (box.x1, box.y1, box.x2, box.y2)
        return task_question(task, **needs, duration=self.duration, size=self.size, pattern=pattern)

    def span(self, span: Span) -> str:
        return format_span(span, duration=self.duration)

    def time(self, time: float) -> str:
        return format_coordinate("TEMP", time / self.duration, way="OUTPUT")

    def box(self, box: Box) -> str:
        return format_box(box, size=self.size)

    def tube(self, tube: Tube) -> str:
        return format_tube(tube, size=self.size, duration=self.duration)


# As in the annotations of the ST-Align data set.
_SPAN_ANSWER = "During the span of {span}."
_TUBE_ANSWER = "Object bounding box: {tube}"
_END_ANSWER = "Ends in {time}, {event}. Object bounding box: {tube}"


def grounding_texts() -> list[str]:
    """Every wording that questions and answers use, without their names and coordinates, for training a tokenizer."""
    patterns = [pattern for task in GROUNDING_TASKS for pattern in TASKS[task].patterns]
    return [re.sub(r"\{\w+\}", "", text) for text in (*patterns, _SPAN_ANSWER, _END_ANSWER)]


def _picture_groundings(scene: Scene, writer: _Writer) -> list[Grounding]:
    """Questions about one frame at a random time that shows something."""
    rng = writer.rng
    for _ in range(20):
        time = rng.random() * seen_seconds(scene)
        seen = [actor for actor in scene.actors if _shown(scene, actor, time)]
        if seen:
            break
    else:
        return []
    found = []
    for actor in seen:
        box, colour = actor_box(actor, time, writer.size), actor.colour_at(time)
        name = rng.choice((f"the {colour} {actor.shape}", f"the {actor.shape}", f"the {colour} shape"))
        crowd = "alone" if len(seen) == 1 else "crowd"
        where = f"{crowd} {actor.shape}"
        question = writer.ask("rec", query=name)
        found.append(Grounding("rec", question, writer.box(box), where, actor.shape, time=time, box=box))
        question, words = writer.ask("reg", box=box), full_name(actor, time)
        found.append(Grounding("reg", question, f"{words}.", where, actor.shape, time=time, caption=words, box=box))
    return found


def _event_groundings(event: Event, events: list[Event], writer: _Writer) -> list[Grounding]:
    """Questions about the time of an event, and about what happens in that time."""
    span, words = event.span, event.caption
    about = (event.sort, "letter" if event.actor is None else event.actor.shape)
    answer = _SPAN_ANSWER.format(span=writer.span(span))
    found = [Grounding("tvg", writer.ask("tvg", query=words), answer, *about, span=span)]
    if all(other is event or _overlap(other.span, span) < ALIKE for other in events):
        question = writer.ask("tr", span=span)
        found.append(Grounding("tr", question, f"{words}.", *about, caption=words, span=span))
    return found


def _tube_groundings(
    event: Event, events: list[Event], tube: Tube, num_frames: int, writer: _Writer
) -> list[Grounding]:
    """Questions about a shape through time."""
    span, words, boxes = event.span, event.caption, _TUBE_ANSWER.format(tube=writer.tube(tube))
    question, answer = writer.ask("stvg", query=words), f"{_SPAN_ANSWER.format(span=writer.span(span))} {boxes}"
    first, last, actor = tube.times[0], tube.times[-1], event.actor
    shown, about = Span(first, last), (event.sort, actor.shape)
    found = [Grounding("stvg", question, answer, *about, span=span, tube=tube)]
    name = actor.shape if actor.change is not None else full_name(actor, first)
    question = writer.ask("svg", query=f"the {name}", span=shown)
    found.append(Grounding("svg", question, boxes, *about, span=shown, tube=tube))
    # Two events of one shape that start together could both be meant.
    gap = 1.5 * writer.duration / max(num_frames - 1, 1)
    rivals = [other for other in events if other.actor is actor and other is not event]
    if all(abs(other.span.start - span.start) > gap for other in rivals):
        region = tube.boxes[0]
        question = writer.ask("elc", time_seconds=span.start, box=region)
        answer = _END_ANSWER.format(time=writer.time(span.end), event=words, tube=writer.tube(tube))
        found.append(Grounding("elc", question, answer, *about, caption=words, span=span, box=region, tube=tube))
    return found


def _dense_picture(pictures: list[Grounding], writer: _Writer) -> list[Grounding]:
    """All shapes of the frame that the other questions are about, each with its box."""
    parts = tuple(Caption(item.caption or "", box=item.box) for item in pictures if item.task == "reg")
    if not parts:
        return []
    answer = ", ".join(f"{part.text} {writer.box(part.box)}" for part in parts)
    crowd = "alone" if len(parts) == 1 else "crowd"
    return [Grounding("dgc", writer.ask("dgc"), f"{answer}.", crowd, "all", time=pictures[0].time, parts=parts)]


def _dense_events(events: list[Event], writer: _Writer) -> list[Grounding]:
    """All events of the video, each with its span."""
    parts = tuple(Caption(event.caption, span=event.span) for event in events)
    if not parts:
        return []
    answer = " ".join(f"{writer.span(part.span)}, {part.text}." for part in parts)
    return [Grounding("dvc", writer.ask("dvc"), answer, "few" if len(parts) < 4 else "many", "all", parts=parts)]


def make_groundings(
    scene: Scene,
    tasks: Iterable[str] | None = None,
    *,
    size: tuple[int, int] = (256, 256),
    num_frames: int = NUM_FRAMES,
) -> list[Grounding]:
    """Every question about times and places that the scene allows.

    Args:
        scene: what the video shows.
        tasks: tasks to ask; default all of GROUNDING_TASKS.
        size: (width, height) of the frames in pixels.
        num_frames: frames that the model sees; tubes have boxes at these.

    Returns:
        Questions in the order of ALL_TASKS; the same arguments give the same questions.

    Raises:
        ValueError: an unknown task.
    """
    wanted = GROUNDING_TASKS if tasks is None else tuple(tasks)
    unknown = sorted(set(wanted) - set(ALL_TASKS))
    if unknown or not wanted:
        raise ValueError(f"unknown grounding tasks {unknown}: use {', '.join(ALL_TASKS)}")
    # The frame is the same whatever else is asked.
    picture_writer = _Writer(scene, size, random.Random(f"{scene.split} {scene.seed} picture"))
    found = _picture_groundings(scene, picture_writer)
    writer = _Writer(scene, size, random.Random(f"{scene.split} {scene.seed} grounding"))
    events, times = list_grounded_events(scene, num_frames), end_to_end_times(scene, num_frames)
    for event in events:
        found += _event_groundings(event, events, writer)
        tube = _event_tube(scene, event, times, size)
        if len(tube.times) > 1:
            found += _tube_groundings(event, events, tube, num_frames, writer)
    # Chance of their own: the questions of the other tasks are the same with them and without.
    writer = _Writer(scene, size, random.Random(f"{scene.split} {scene.seed} dense"))
    found += _dense_picture(found, writer) + _dense_events(events, writer)
    return [item for task in ALL_TASKS if task in wanted for item in found if item.task == task]
