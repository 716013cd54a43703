"""Prompts of the overview and the detail module, and the policies read from what they write.

The original prompts can only be guessed from their description; these are fresh texts that keep its requirements.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from longvideo.processing.crossvllm.policy_json import ParseState, find_object, strip_fences
from longvideo.processing.crossvllm.segment_times import format_time, parse_time, times_in_text

COARSE_KEYS = (("t_start", "start"), ("t_end", "end"), ("answer",))
FINE_KEYS = (("reflection",), ("answer",))
NO_REFLECTION = frozenset({"", "none", "null", "n/a", "no", "false"})

OVERVIEW = (
    "You are the overview module of a video assistant. You watch the complete video with little detail per frame, so "
    "you can tell when things happen, but small objects, text and fast motion may be lost. The length of the original "
    "video is {duration} seconds."
)
CHOOSE = "Choose one policy for the question below."
GROUND = "Give the part of the video that a detail module should examine."
GROUNDING_ITEM = (
    "- Temporal grounding: the answer needs a closer look. Give the start and end, in seconds, of the one part of the "
    'video that a detail module should examine, and leave "answer" empty.'
)
DIRECT_ITEM = (
    "- Direct output: you are already certain, for example because the video is short or the question is about the "
    "video as a whole. Set both times to null and write the answer."
)
COARSE_REPLY = 'Reply with a single JSON object with the keys "t_start", "t_end" and "answer", and nothing else.'
GROUNDING_EXAMPLE = 'Example of temporal grounding: {"t_start": 41.0, "t_end": 58.5, "answer": ""}'
DIRECT_EXAMPLE = 'Example of direct output: {"t_start": null, "t_end": null, "answer": "A cooking lesson."}'
REJECTED = "{start} to {end} is not the suitable grounding segments because {reflection}"
DIFFERS = "Choose a part of the video that differs from the segments above."

DETAIL = (
    "You are the detail module of a video assistant. The overview module has cut one segment out of a longer video "
    "for the question below, and you see it with many details per frame."
)
SAMPLED = "The short video is sampled from {start} to {end} of the original video."
TWO_TIMES = 'Write the answer as two times of the original video in seconds, for example "12.0 to 18.5".'
FINE_RULES = (
    "First judge whether this segment contains what the question asks about. Then fill two fields.",
    '- "reflection": leave it empty if the segment fits. If it does not, state briefly what the segment shows and why '
    "it cannot answer the question; the overview module reads this before it searches again.",
    '- "answer": your answer to the question from what you see. Write your best guess even if the segment does not '
    "fit.",
)
FINE_REPLY = 'Reply with a single JSON object with the keys "reflection" and "answer", and nothing else.'
FITS_EXAMPLE = 'Example of a fitting segment: {"reflection": "", "answer": "He puts on a red hat."}'
WRONG_EXAMPLE = (
    'Example of a wrong segment: {"reflection": "Only an empty kitchen is visible and nobody enters.", '
    '"answer": "unknown"}'
)


@dataclass(frozen=True)
class Rejected:
    """A segment that the detail module sent back.

    Attributes:
        segment: (start, end) in seconds.
        reflection: Why it does not suit.
    """

    segment: tuple[float, float]
    reflection: str


@dataclass(frozen=True)
class CoarsePolicy:
    """What the overview module wants.

    Attributes:
        t_start: Begin of the segment in seconds as written, None where there is none.
        t_end: End of the segment in seconds as written, None where there is none.
        answer: Its own answer, empty where it leaves that to the detail module.
        state: How it was read: "json", "tolerant", "keys", "prose" (two times in a sentence) or "none".
    """

    t_start: float | None = None
    t_end: float | None = None
    answer: str = ""
    state: ParseState = "none"

    @property
    def parse_ok(self) -> bool:
        """Whether it was an object, well formed or saved."""
        return self.state in ("json", "tolerant", "keys")


@dataclass(frozen=True)
class FinePolicy:
    """What the detail module says of its segment.

    Attributes:
        reflection: Why the segment does not suit; empty where it does.
        answer: Its answer.
        state: How it was read: "json", "tolerant", "keys", "prose" (the whole text is the answer) or "none".
    """

    reflection: str = ""
    answer: str = ""
    state: ParseState = "none"

    @property
    def parse_ok(self) -> bool:
        """Whether it was an object, well formed or saved."""
        return self.state in ("json", "tolerant", "keys")


def coarse_prompt(
    question: str, duration: float, *, rejected: Sequence[Rejected] = (), grounding_only: bool = False
) -> str:
    """Write the prompt P_c of the overview module.

    Args:
        question: The question.
        duration: Seconds of the original video.
        rejected: Segments that were sent back, oldest first.
        grounding_only: Whether a direct answer is not on offer, as in training and in temporal grounding.

    Returns:
        The text that stands behind the video.

    Source: CrossVLLM Sec. 3 and appendix (P_c), its requirements.
    Differs: Fresh text; the original prompt is not readable.
    """
    lines = [OVERVIEW.replace("{duration}", format_time(duration)), GROUND if grounding_only else CHOOSE]
    lines.append(GROUNDING_ITEM)
    if not grounding_only:
        lines.append(DIRECT_ITEM)
    lines += feedback_lines(rejected)
    lines += [COARSE_REPLY, GROUNDING_EXAMPLE]
    if not grounding_only:
        lines.append(DIRECT_EXAMPLE)
    return "\n".join([*lines, f"Question: {question}"])


def feedback_lines(rejected: Sequence[Rejected]) -> list[str]:
    """Write what the overview module is told about segments that were sent back.

    Args:
        rejected: The segments, oldest first.

    Returns:
        One line each and a last one that asks for another segment; nothing where there are none.

    Source: CrossVLLM, feedback of re-grounding, in the paper's words.
    """
    lines = []
    for entry in rejected:
        start, end = map(format_time, entry.segment)
        reason = " ".join(entry.reflection.split())
        lines.append(REJECTED.replace("{start}", start).replace("{end}", end).replace("{reflection}", reason))
    return [*lines, DIFFERS] if lines else []


def fine_prompt(question: str, *, grounding: tuple[float, float] | None = None) -> str:
    """Write the prompt P_f of the detail module.

    Args:
        question: The question; in temporal grounding that of `grounding_question`.
        grounding: In temporal grounding the segment in seconds, so that times of the original video can be told.

    Returns:
        The text that stands behind the segment.

    Source: CrossVLLM Sec. 3 and appendix (P_f, and the line of temporal grounding), their requirements.
    Differs: Fresh text. A best guess is asked for even where the segment does not suit, because the answer of the last
        round counts at the limit.
    """
    head = [DETAIL] if grounding is None else [DETAIL, *grounding_lines(grounding)]
    return "\n".join([" ".join(head), *FINE_RULES, FINE_REPLY, FITS_EXAMPLE, WRONG_EXAMPLE, f"Question: {question}"])


def plain_prompt(question: str, *, grounding: tuple[float, float] | None = None) -> str:
    """Write the prompt of the detail module without reflection: the question alone.

    Args:
        question: The question.
        grounding: In temporal grounding the segment in seconds.

    Returns:
        The text that stands behind the segment.

    Source: CrossVLLM Eq. 6.
    """
    return question if grounding is None else "\n".join([" ".join(grounding_lines(grounding)), question])


def grounding_lines(segment: tuple[float, float]) -> list[str]:
    """Write what the detail module is told about its segment in temporal grounding.

    Args:
        segment: (start, end) in seconds.

    Returns:
        Where the segment lies, and how times are written.

    Source: CrossVLLM, temporal grounding, in the paper's words.
    """
    start, end = map(format_time, segment)
    return [SAMPLED.replace("{start}", start).replace("{end}", end), TWO_TIMES]


def grounding_question(query: str) -> str:
    """Write the question of temporal grounding.

    Args:
        query: What happens.

    Returns:
        The question.
    """
    return f'When does this happen: "{query}"?'


def policy_text(t_start: float | None, t_end: float | None, answer: str = "") -> str:
    """Write the policy of the overview module as it should be answered, for targets of training.

    Args:
        t_start: Begin in seconds, None for a direct answer.
        t_end: End in seconds, None for a direct answer.
        answer: The direct answer.

    Returns:
        One JSON object; the times with one decimal.
    """
    times = ["null" if time is None else format_time(time) for time in (t_start, t_end)]
    answer_json = json.dumps(answer, ensure_ascii=False)
    return f'{{"t_start": {times[0]}, "t_end": {times[1]}, "answer": {answer_json}}}'


def parse_coarse(text: str) -> CoarsePolicy:
    """Read the policy of the overview module.

    Args:
        text: What it wrote.

    Returns:
        The policy. Prose gives times where it says "a to b" or "a - b", and never an answer: a ramble must not end the
        search.
    """
    found, state = find_object(text, COARSE_KEYS)
    start, end = parse_time(found.get("t_start")), parse_time(found.get("t_end"))
    if state == "none":
        times = times_in_text(text)
        return CoarsePolicy(*times, state="prose") if times is not None else CoarsePolicy()
    return CoarsePolicy(start, end, as_text(found.get("answer")), state)


def parse_fine(text: str) -> FinePolicy:
    """Read what the detail module says.

    Args:
        text: What it wrote.

    Returns:
        Reflection and answer; prose is the answer of a segment that suits.
    """
    found, state = find_object(text, FINE_KEYS)
    if state == "none":
        plain = strip_fences(text)
        return FinePolicy(answer=plain, state="prose" if plain else "none")
    reflection = as_text(found.get("reflection") or "")
    is_empty = reflection.lower().rstrip(".! ") in NO_REFLECTION
    return FinePolicy("" if is_empty else reflection, as_text(found.get("answer")), state)


def as_text(value: Any) -> str:
    """Write a value of a policy as text.

    Args:
        value: Anything that JSON can hold.

    Returns:
        A text without spaces around it, empty for null; the entries of a list with commas between them.
    """
    if value is None:
        return ""
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, list):
        return ", ".join(as_text(entry) for entry in value)
    return json.dumps(value, ensure_ascii=False)
