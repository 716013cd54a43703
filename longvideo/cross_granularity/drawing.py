"""The course of an answer as something that `draw_grounding` draws: every segment on a time line."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class DrawnSpan:
    """Part of a video.

    Attributes:
        start: Seconds.
        end: Seconds.
    """

    start: float
    end: float


@dataclass(frozen=True)
class DrawnCaption:
    """A span with its label.

    Attributes:
        text: Label.
        span: Where it lies.
        box: Always None: nothing has a place in the picture.
        tube: Always None.
    """

    text: str
    span: DrawnSpan
    box: None = None
    tube: None = None


@dataclass(frozen=True)
class DrawnRounds:
    """Segments of an answer.

    Attributes:
        text: The answer.
        captions: Labelled segments, in order.
        spans: The segments.
        boxes: Empty.
        tubes: Empty.
        malformed: Empty.
    """

    text: str
    captions: tuple[DrawnCaption, ...]
    spans: tuple[DrawnSpan, ...]
    boxes: tuple[Any, ...] = field(default=())
    tubes: tuple[Any, ...] = field(default=())
    malformed: tuple[Any, ...] = field(default=())


def drawn_rounds(answer: Mapping[str, Any]) -> DrawnRounds:
    """Collect what can be drawn of an answer.

    Args:
        answer: What the pipeline gives for a model with two granularities.

    Returns:
        Every segment that the detail module saw with its verdict, the events of the exhaustive mode, and the answer
        on its segment, or on the whole video where it has none.
    """
    marks = []
    for entry in answer["rounds"]:
        if entry["segment"] is None or answer.get("events") is not None:
            continue
        policy = (entry["fine"] or {}).get("policy")
        verdict = "asked in words" if entry["fine"] is not None else "not looked at again"
        if policy is not None:
            verdict = f"sent back: {policy['reflection']}" if policy["reflection"] else "accepted"
        marks.append((f"round {entry['number']}, {verdict}", entry["segment"]))
    marks += [(event["text"], (event["start"], event["end"])) for event in answer.get("events") or ()]
    marks.append((f"answer: {answer['answer']}", answer["segment"] or (0.0, answer["duration"])))
    captions = tuple(DrawnCaption(" ".join(text.split()), DrawnSpan(*map(float, span))) for text, span in marks)
    return DrawnRounds(answer["answer"], captions, tuple(caption.span for caption in captions))
