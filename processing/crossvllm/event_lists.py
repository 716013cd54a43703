"""Questions about many places of a video: windows, lists of events, and what is counted or ordered in them.

Source: CrossVLLM names counting and ordering as its failure, and segment by segment as the cure; the rest is ours.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from longvideo.processing.crossvllm.policies import as_text
from longvideo.processing.crossvllm.policy_json import balanced_objects, pick_keys, read_json, strip_fences
from longvideo.processing.crossvllm.segment_times import (
    TOLERANCE,
    Segment,
    format_time,
    locate_in_segment,
    parse_time,
)

EVENT_KEYS = (("t_start", "start"), ("t_end", "end"), ("event", "description"))
EVERYWHERE = re.compile(
    r"\bhow many\b|\bnumber of times\b|\bcount\b|\bin (?:what|which) order\b|\bfirst\b.*\bthen\b", re.I | re.S
)
WINDOW_LINES = (
    "You are the detail module of a video assistant. You see one part of a longer video, with many details per frame. "
    "It lasts {length} seconds.",
    "List every event in this part that the question below asks about, in the order in which they happen. Give times "
    "in seconds from the start of this part. Describe equal events with the same words.",
    'Reply with a JSON list of objects with the keys "t_start", "t_end" and "event", and nothing else; reply with [] '
    "if nothing fits.",
    'Example: [{"t_start": 3.0, "t_end": 7.5, "event": "a man opens a door"}]',
)
RANK_LINES = (
    "You are the overview module of a video assistant. The length of the original video is {duration} seconds.",
    "The video has been cut into numbered parts:",
    "{windows}",
    "A detail module can examine {count} of them. Reply with a JSON list of the numbers of the {count} parts that "
    "show most of what the question asks about, the best one first, and nothing else.",
)
SUM_UP_LINES = (
    "You are the overview module of a video assistant. The length of the original video is {duration} seconds.",
    "A detail module has examined the video part by part and found these {count} events, in order:",
    "{events}",
    "Answer the question from this list, briefly and without further remarks.",
)


@dataclass(frozen=True)
class Event:
    """Something that a question asks about.

    Attributes:
        start: Begin in seconds of the original video.
        end: End in seconds of the original video.
        text: What happens.
        window: Zero-based number of the window in which it was found; the last one for an event across a border.
    """

    start: float
    end: float
    text: str
    window: int


def asks_everywhere(question: str) -> bool:
    """Say whether a question counts or orders, so that one segment cannot answer it.

    Args:
        question: The question.

    Returns:
        True for "how many", "number of times", "count", "in what order" and "first ... then".
    """
    return EVERYWHERE.search(question) is not None


def window_prompt(question: str, segment: Segment) -> str:
    """Write the prompt of the detail module for one window.

    Args:
        question: The question.
        segment: (start, end) of the window in seconds.

    Returns:
        The text that stands behind the window.
    """
    lines = "\n".join(WINDOW_LINES).replace("{length}", format_time(segment[1] - segment[0]))
    return f"{lines}\nQuestion: {question}"


def rank_prompt(question: str, duration: float, windows: Sequence[Segment], count: int) -> str:
    """Write the prompt with which the overview module chooses windows.

    Args:
        question: The question.
        duration: Seconds of the video.
        windows: (start, end) of each in seconds.
        count: How many may be examined.

    Returns:
        The text that stands behind the video.
    """
    listed = "\n".join(
        f"{number}: {format_time(start)} to {format_time(end)}" for number, (start, end) in enumerate(windows, 1)
    )
    text = "\n".join(RANK_LINES).replace("{duration}", format_time(duration)).replace("{count}", str(count))
    return f"{text.replace('{windows}', listed)}\nQuestion: {question}"


def sum_up_prompt(question: str, duration: float, events: Sequence[Event]) -> str:
    """Write the prompt with which the overview module answers from a list of events.

    Args:
        question: The question.
        duration: Seconds of the video.
        events: The events in order.

    Returns:
        The text that stands behind the video.
    """
    text = "\n".join(SUM_UP_LINES).replace("{duration}", format_time(duration)).replace("{count}", str(len(events)))
    return f"{text.replace('{events}', list_events(events) or '(none)')}\nQuestion: {question}"


def list_events(events: Sequence[Event]) -> str:
    """Write events one to a line.

    Args:
        events: The events.

    Returns:
        Lines such as "1. 3.0 to 7.5: a man opens a door".
    """
    return "\n".join(
        f"{number}. {format_time(event.start)} to {format_time(event.end)}: {event.text}"
        for number, event in enumerate(events, 1)
    )


def parse_ranking(text: str, num_windows: int, count: int) -> list[int]:
    """Read which windows shall be examined.

    Args:
        text: What the overview module wrote.
        num_windows: Number of windows.
        count: How many are wanted, at most `num_windows`.

    Returns:
        Ascending zero-based numbers; where too few were named, others are added evenly over the video.
    """
    named = [int(number) - 1 for number in re.findall(r"(?<![\d.])\d{1,6}(?![\d.]*\d)", text)]
    chosen = list(dict.fromkeys(number for number in named if 0 <= number < num_windows))[:count]
    free = [number for number in range(num_windows) if number not in chosen]
    missing = count - len(chosen)
    chosen += [free[(2 * index + 1) * len(free) // (2 * missing)] for index in range(missing)]
    return sorted(chosen)


def parse_events(text: str, segment: Segment, window: int) -> list[Event]:
    """Read the events of one window.

    Args:
        text: What the detail module wrote.
        segment: (start, end) of the window in seconds.
        window: Its zero-based number.

    Returns:
        The events in order of their begin; one without usable times spans the window.
    """
    events = []
    for piece in balanced_objects(strip_fences(text)):
        value, _ = read_json(piece)
        found = pick_keys(value, EVENT_KEYS) if isinstance(value, Mapping) else {}
        description = as_text(found.get("event"))
        if description:
            start, end = event_times(parse_time(found.get("t_start")), parse_time(found.get("t_end")), segment)
            events.append(Event(start, end, description, window))
    return sorted(events, key=lambda event: (event.start, event.end))


def event_times(start: float | None, end: float | None, segment: Segment) -> Segment:
    """Turn the times of an event into those of the original video.

    Args:
        start: Seconds from the begin of the window, or None.
        end: Seconds from the begin of the window, or None.
        segment: (start, end) of the window in seconds.

    Returns:
        (start, end) in seconds, within the window; times that can only be those of the original video count so.
    """
    if start is None or end is None:
        return segment
    first, last = segment
    start, end = min(start, end), max(start, end)
    if start >= 0 and end <= last - first + TOLERANCE:
        return min(first + start, last), min(first + end, last)
    return locate_in_segment((start, end), segment) or segment


def merge_events(events: Sequence[Event], *, overlap: float) -> list[Event]:
    """Join events that go on across the border of two windows.

    Args:
        events: Events of all windows.
        overlap: Seconds that neighbouring windows share.

    Returns:
        Events by their begin; two of neighbouring windows are one where they have the same description and at most
        `overlap` seconds between them.
    """
    merged: list[Event] = []
    for event in sorted(events, key=lambda event: (event.window, event.start, event.end)):
        words = same_words(event.text)
        for place, other in enumerate(merged):
            touches = max(event.start, other.start) - min(event.end, other.end) <= overlap
            if other.window == event.window - 1 and touches and same_words(other.text) == words:
                joined = Event(min(event.start, other.start), max(event.end, other.end), other.text, event.window)
                merged[place] = joined
                break
        else:
            merged.append(event)
    return sorted(merged, key=lambda event: (event.start, event.end))


def same_words(text: str) -> str:
    """Bring descriptions that differ in case or marks only to one form.

    Args:
        text: A description.

    Returns:
        Its words in small letters.
    """
    return " ".join(re.findall(r"\w+", text.casefold()))
