"""What the controller asks, what it gets, and the whole course of an answer."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from longvideo.processing.crossvllm.event_lists import Event
from longvideo.processing.crossvllm.policies import CoarsePolicy, FinePolicy
from longvideo.processing.crossvllm.segment_times import Segment

ModuleName = Literal["coarse", "fine"]
Task = Literal["qa", "tvg"]
Reason = Literal["direct", "accepted", "limit", "repeat", "parse_error", "exhaustive"]


@dataclass(frozen=True, eq=False)
class VideoQuestion:
    """One question about one video.

    Attributes:
        video: Path, address, folder of pictures, or decoded frames.
        question: The question; with the task "tvg" what happens.
        duration: Seconds of the video.
        task: "qa" answers in words, "tvg" (temporal video grounding) with a segment.
        metadata: What is known of decoded frames, among it their rate; None for files.
    """

    video: Any
    question: str
    duration: float
    task: Task = "qa"
    metadata: Any = None


@dataclass(frozen=True, eq=False)
class ModuleCall:
    """What one module is asked.

    Attributes:
        module: "coarse" sees the whole video with little detail, "fine" a segment with much.
        source: The question that this is about, with its video.
        prompt: The text behind the video.
        segment: (start, end) in seconds; None for the whole video.
    """

    module: ModuleName
    source: VideoQuestion
    prompt: str
    segment: Segment | None = None


Module = Callable[[Sequence[ModuleCall]], Sequence[str]]


@dataclass(frozen=True)
class ModuleTurn:
    """What one module was asked and wrote.

    Attributes:
        prompt: The text behind the video.
        text: What it wrote, unchanged.
        policy: What was read in it; None where no policy was asked for.
        parse_ok: Whether a policy was found as an object; True where none was asked for.
    """

    prompt: str
    text: str
    policy: CoarsePolicy | FinePolicy | None = None

    @property
    def parse_ok(self) -> bool:
        """Whether the policy was an object, well formed or saved; True where none was asked for."""
        return self.policy is None or self.policy.parse_ok


@dataclass
class Round:
    """One look at the whole video and one at a segment.

    Attributes:
        number: Zero-based; the number of segments that were sent back before.
        segment: (start, end) in seconds that the detail module saw or should see, None for none.
        coarse: Turn of the overview module, None where it was not asked.
        fine: Turn of the detail module, None where it was not asked.
        forced: Turn of the detail module without a policy, None where an answer was there.
    """

    number: int
    segment: Segment | None = None
    coarse: ModuleTurn | None = None
    fine: ModuleTurn | None = None
    forced: ModuleTurn | None = None


@dataclass
class CrossGranularityAnswer:
    """An answer and how it came about.

    Attributes:
        question: The question.
        answer: The answer; with the task "tvg" two times in seconds.
        segment: (start, end) in seconds where the answer was seen, None for the whole video.
        reason: Why it ended: "direct" (the overview module answered), "accepted" (the segment suits), "limit" (no more
            rounds), "repeat" (a segment came again), "parse_error" (no policy could be read), "exhaustive".
        rounds: All rounds.
        duration: Seconds of the video.
        events: What the exhaustive mode found, in order; None in other modes.
    """

    question: str
    answer: str
    segment: Segment | None
    reason: Reason
    rounds: list[Round]
    duration: float
    events: list[Event] | None = field(default=None)

    @property
    def num_calls(self) -> int:
        """Number of calls of both modules."""
        return sum(turn is not None for entry in self.rounds for turn in (entry.coarse, entry.fine, entry.forced))

    def to_dict(self) -> dict[str, Any]:
        """Write everything as plain values for JSON.

        Returns:
            The fields and `num_calls`; turns with `parse_ok`.
        """
        plain = {**dataclasses.asdict(self), "num_calls": self.num_calls}
        for entry, written in zip(self.rounds, plain["rounds"], strict=True):
            for name in ("coarse", "fine", "forced"):
                if written[name] is not None:
                    written[name]["parse_ok"] = getattr(entry, name).parse_ok
        return plain


def describe_rounds(answer: Mapping[str, Any]) -> list[str]:
    """Write the course of an answer for people.

    Args:
        answer: What `CrossGranularityAnswer.to_dict` gives, or the pipeline.

    Returns:
        One line for each turn, and a last one with the reason.
    """
    lines = []
    for entry in answer["rounds"]:
        lines += [f"round {entry['number']}, {line}" for line in _turn_lines(entry)]
    for event in answer.get("events") or ():
        lines.append(f"event {_write((event['start'], event['end']))}: {event['text']}")
    where = "the whole video" if answer["segment"] is None else _write(answer["segment"])
    return [*lines, f"end: {answer['reason']}, {where}, {answer['num_calls']} calls"]


def _turn_lines(entry: Mapping[str, Any]) -> list[str]:
    lines, segment = [], entry["segment"]
    coarse, fine, forced = (entry[name] for name in ("coarse", "fine", "forced"))
    if coarse is not None:
        policy = coarse["policy"]
        verdict = "asked in words" if policy is None else f"policy read as {policy['state']}"
        target = "" if segment is None else f", {_write(segment)}"
        lines.append(f"overview: {verdict}{target}: {_short(coarse['text'])}")
    if fine is not None:
        policy, verdict = fine["policy"], "asked in words"
        if policy is not None:
            verdict = f"policy read as {policy['state']}, {'sent back' if policy['reflection'] else 'accepted'}"
        lines.append(f"detail of {_write(segment)}: {verdict}: {_short(fine['text'])}")
    if forced is not None:
        lines.append(f"detail of {_write(segment)}: asked in words: {_short(forced['text'])}")
    return lines


def _write(segment: Segment) -> str:
    return f"{segment[0]:.1f} to {segment[1]:.1f} s"


def _short(text: str, length: int = 160) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else f"{text[: length - 3]}..."
