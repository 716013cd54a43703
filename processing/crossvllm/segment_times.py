"""Times of segments: read from text, brought into the video, and cut into windows."""

import math
import re
from typing import Any

Segment = tuple[float, float]

MIN_SEGMENT = 1.0
TOLERANCE = 1.0

CLOCK = r"\d+(?::\d{1,2}){1,2}(?:\.\d+)?"
TIME = rf"(?:{CLOCK}|[-+]?\d+(?:\.\d+)?)"
UNIT = r"\s*(?:seconds?|secs?|s)?\b"
TIME_TEXT = re.compile(rf"({TIME}){UNIT}\.?", re.IGNORECASE)
PHRASE = re.compile(
    rf"(?<![\w.:-])({TIME}){UNIT}\s*(?:to|until|till|-{{1,2}}|\u2013|\u2014)\s*({TIME}){UNIT}", re.IGNORECASE
)
ANY_TIME = re.compile(rf"(?<![\w.:])({TIME})", re.IGNORECASE)


def format_time(seconds: float) -> str:
    """Write a time as all prompts do.

    Args:
        seconds: Seconds of the original video.

    Returns:
        The seconds with one decimal.

    Source: CrossVLLM; the paper does not say how many decimals.
    """
    return f"{seconds:.1f}"


def parse_time(value: Any) -> float | None:
    """Read one time.

    Args:
        value: Number, or a text such as "12.5", "12.5s", "mm:ss" or "hh:mm:ss"; anything else is no time.

    Returns:
        Seconds, or None where there is none.
    """
    if isinstance(value, bool) or value is None:
        return None
    if isinstance(value, str):
        found = TIME_TEXT.fullmatch(value.strip())
        if found is None:
            return None
        value = found[1]
        if ":" in value:
            return clock_seconds(value)
    try:
        seconds = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return seconds if math.isfinite(seconds) else None


def clock_seconds(text: str) -> float | None:
    """Read a time of the clock.

    Args:
        text: "mm:ss" or "hh:mm:ss", the seconds with decimals or without.

    Returns:
        Seconds, or None for a number that is too large.
    """
    total = 0.0
    for part in text.split(":"):
        total = total * 60 + float(part)
    return total if math.isfinite(total) else None


def times_in_text(text: str, *, anywhere: bool = False) -> Segment | None:
    """Find two times in prose.

    Args:
        text: The text.
        anywhere: Whether the first two numbers will do where no "a to b" or "a - b" stands.

    Returns:
        The two in the order of the text, in seconds, or None.
    """
    found = PHRASE.search(text)
    values = list(found.groups()) if found is not None else []
    if not values and anywhere:
        values = ANY_TIME.findall(text)[:2]
    times = [parse_time(value) for value in values]
    return (times[0], times[1]) if len(times) == 2 and None not in times else None


def normalize_segment(
    start: float | None, end: float | None, duration: float, *, min_segment: float = MIN_SEGMENT
) -> Segment | None:
    """Bring the times of a policy into the video.

    Args:
        start: Seconds, or None where the policy gave none.
        end: Seconds, or None where the policy gave none.
        duration: Seconds of the video, above 0.
        min_segment: Shortest segment in seconds; a shorter one grows to both sides and then moves into the video.

    Returns:
        (start, end) in seconds with 0 <= start < end <= duration, or None where the times are of no use: one is
        missing, one is not finite, or they begin at or after the end of the video.

    Differs: The paper says nothing of wrong times. Fractions and milliseconds are not guessed at.
    """
    if start is None or end is None or not (math.isfinite(start) and math.isfinite(end)):
        return None
    start, end = max(min(start, end), 0.0), max(start, end)
    if start >= duration:
        return None
    end = min(max(end, 0.0), duration)
    if duration <= min_segment:
        return 0.0, duration
    if end - start < min_segment:
        middle = (start + end) / 2
        start = min(max(middle - min_segment / 2, 0.0), duration - min_segment)
        end = start + min_segment
    return start, min(end, duration)


def locate_in_segment(times: Segment | None, segment: Segment, *, tolerance: float = TOLERANCE) -> Segment | None:
    """Read the times that the detail module found inside its segment.

    Args:
        times: Two times in seconds, of the original video or counted from the begin of the segment.
        segment: The segment in seconds of the original video.
        tolerance: Seconds by which times of the original video may lie outside of the segment.

    Returns:
        (start, end) in seconds of the original video within the segment, or None where the times do not fit.

    Differs: The paper does not say how these times count. The prompt asks for those of the original video; times that
        can only count from the begin of the segment are taken so.
    """
    if times is None:
        return None
    (start, end), (first, last) = sorted(times), segment
    if start < first - tolerance or end > last + tolerance:
        if start < 0 or end > last - first:
            return None
        start, end = start + first, end + first
    start, end = max(start, first), min(end, last)
    return (start, end) if end > start else None


def cut_windows(duration: float, *, length: float = 64.0, overlap: float = 4.0) -> list[Segment]:
    """Cut a video into windows that overlap.

    Args:
        duration: Seconds of the video.
        length: Seconds of a window; 64 make 32 frames one every two seconds.
        overlap: Seconds that two neighbours share.

    Returns:
        (start, end) of each in seconds; the last one may be shorter.

    Raises:
        ValueError: The windows do not get on.
    """
    if not 0 <= overlap < length:
        raise ValueError(
            f"Windows of {length:g} s cannot overlap by {overlap:g} s; give an overlap from 0 to below it."
        )
    step = length - overlap
    count = max(math.ceil((duration - overlap) / step), 1)
    return [(index * step, min(index * step + length, duration)) for index in range(count)]
