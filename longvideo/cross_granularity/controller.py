"""The controller of CrossVLLM: an overview module proposes segments, a detail module answers or sends them back.

The modules are any two callables that take a list of `ModuleCall` and give as many texts; `modules` makes them from
models. Every question has its own state machine, a generator; the calls that all machines wait for are made together.
"""

from collections.abc import Sequence

from longvideo.cross_granularity.exhaustive import ask_everywhere
from longvideo.cross_granularity.rules import Asking, ControllerRules
from longvideo.cross_granularity.trace import (
    CrossGranularityAnswer,
    Module,
    ModuleCall,
    ModuleName,
    ModuleTurn,
    Reason,
    Round,
    VideoQuestion,
)
from longvideo.evaluation.metrics import temporal_iou
from longvideo.processing.crossvllm import policies
from longvideo.processing.crossvllm.segment_times import (
    Segment,
    format_time,
    locate_in_segment,
    normalize_segment,
    times_in_text,
)

TASKS = ("qa", "tvg")


class CrossGranularityController:
    """Answers questions about videos with an overview and a detail module.

    Args:
        coarse: Overview module; sees whole videos.
        fine: Detail module; sees segments.
        rules: How it goes on and when it stops.

    Source: CrossVLLM Sec. 3.3, inference.
    """

    def __init__(self, coarse: Module, fine: Module, rules: ControllerRules | None = None) -> None:
        self.modules: dict[ModuleName, Module] = {"coarse": coarse, "fine": fine}
        self.rules = rules or ControllerRules()

    def __call__(self, questions: Sequence[VideoQuestion]) -> list[CrossGranularityAnswer]:
        """Answer questions; what one module is asked about all of them at a time is one call.

        Args:
            questions: The questions.

        Returns:
            One answer each, in order.

        Raises:
            ValueError: There is no question, one is blank, a duration is not positive, or a task is unknown.
        """
        if not questions:
            raise ValueError("The list of questions is empty; give at least one VideoQuestion.")
        for sample in questions:
            check_sample(sample, self.rules)
        asking = {index: self.start(sample) for index, sample in enumerate(questions)}
        waiting = {index: next(machine) for index, machine in asking.items()}
        answers: dict[int, CrossGranularityAnswer] = {}
        while waiting:
            for name in ("coarse", "fine"):
                # The texts of the overview bring some questions on to the detail module, which then go with the rest.
                chosen = [index for index, calls in waiting.items() if calls[0].module == name]
                texts = self.ask(name, [call for index in chosen for call in waiting[index]])
                for index in chosen:
                    own, texts = texts[: len(waiting[index])], texts[len(waiting[index]) :]
                    try:
                        waiting[index] = asking[index].send(own)
                    except StopIteration as end:
                        answers[index] = end.value
                        del waiting[index]
        return [answers[index] for index in range(len(questions))]

    def start(self, sample: VideoQuestion) -> Asking:
        """Begin the state machine of one question.

        Args:
            sample: The question.

        Returns:
            A generator that yields lists of calls of one module, takes their texts and returns the answer.
        """
        return (ask_everywhere if self.rules.examines_everything(sample) else ask_in_rounds)(sample, self.rules)

    def ask(self, name: ModuleName, calls: list[ModuleCall]) -> list[str]:
        """Hand calls to a module.

        Args:
            name: Which module.
            calls: What it is asked; it is not called for nothing.

        Returns:
            One text each.

        Raises:
            ValueError: It gave another number of texts, or something else than texts.
        """
        texts = list(self.modules[name](calls)) if calls else []
        if len(texts) != len(calls) or not all(isinstance(text, str) for text in texts):
            kinds = sorted({type(text).__name__ for text in texts})
            raise ValueError(
                f"The {name} module was asked {len(calls)} times and gave {len(texts)} values ({', '.join(kinds)}); "
                "it must return one text for each call."
            )
        return texts


def check_sample(sample: VideoQuestion, rules: ControllerRules) -> None:
    """Check a question before anything is computed.

    Args:
        sample: The question.
        rules: The rules.

    Raises:
        ValueError: It is blank, the duration is not positive, or the task is unknown or does not fit.
    """
    if not isinstance(sample.question, str) or not sample.question.strip():
        raise ValueError(f"The question is empty ({sample.question!r}); write what shall be answered.")
    if not 0 < sample.duration < float("inf"):
        raise ValueError(
            f"duration={sample.duration!r}, expected the seconds of the video, above 0. Frames in memory need their "
            "rate: video_metadata={'fps': ...}."
        )
    if sample.task not in TASKS:
        raise ValueError(f"Unknown task {sample.task!r}, expected one of {', '.join(TASKS)}.")
    if sample.task == "tvg" and rules.exhaustive is True:
        raise ValueError("The exhaustive mode answers in words; leave it out with the task 'tvg'.")


def ask_in_rounds(sample: VideoQuestion, rules: ControllerRules) -> Asking:
    """Ground, look closely, and ground again while the segment does not suit.

    Args:
        sample: The question.
        rules: The rules.

    Yields:
        Lists of one call.

    Returns:
        The answer.

    Source: CrossVLLM Sec. 3.3.
    Differs: The paper leaves open what happens to policies that cannot be read; in the first round the whole video
        becomes the segment, later the last answer of the detail module counts.
    """
    course = Course(sample, rules)
    for number in range(rules.max_rounds + 1):
        entry = Round(number)
        course.rounds.append(entry)
        prompt = course.coarse_prompt()
        (text,) = yield [ModuleCall("coarse", sample, prompt)]
        policy = policies.parse_coarse(text)
        entry.coarse = ModuleTurn(prompt, text, policy)
        found = normalize_segment(policy.t_start, policy.t_end, sample.duration, min_segment=rules.min_segment)
        if found is None and policy.answer and sample.task == "qa":
            return course.result(policy.answer, None, "direct")
        if found is None and number:
            return (yield from course.stop("parse_error"))
        entry.segment = found or (0.0, sample.duration)
        if rules.stop_on_repeat and course.was_sent_back(entry.segment):
            return (yield from course.stop("repeat"))
        prompt = course.fine_prompt(entry.segment)
        (text,) = yield [ModuleCall("fine", sample, prompt, entry.segment)]
        seen = policies.parse_fine(text) if rules.reflection else policies.FinePolicy(answer=text.strip())
        entry.fine = ModuleTurn(prompt, text, seen if rules.reflection else None)
        course.found.append((entry.segment, seen.answer))
        if not seen.reflection:
            return (yield from course.stop("accepted"))
        course.rejected.append(policies.Rejected(entry.segment, seen.reflection))
    return (yield from course.stop("limit"))


class Course:
    """What one question has been through so far.

    Args:
        sample: The question.
        rules: The rules.

    Attributes:
        rounds: All rounds.
        rejected: Segments that were sent back.
        found: Segment and answer of every turn of the detail module.
    """

    def __init__(self, sample: VideoQuestion, rules: ControllerRules) -> None:
        self.sample, self.rules = sample, rules
        self.rounds: list[Round] = []
        self.rejected: list[policies.Rejected] = []
        self.found: list[tuple[Segment, str]] = []

    @property
    def question(self) -> str:
        """The question as the modules are asked it."""
        sample = self.sample
        return policies.grounding_question(sample.question) if sample.task == "tvg" else sample.question

    def coarse_prompt(self) -> str:
        """Write what the overview module is asked next.

        Returns:
            The prompt with all feedback.
        """
        # A direct answer is of no use in grounding, so it is not on offer.
        is_grounding = self.sample.task == "tvg"
        return policies.coarse_prompt(
            self.question, self.sample.duration, rejected=self.rejected, grounding_only=is_grounding
        )

    def fine_prompt(self, segment: Segment, *, plain: bool = False) -> str:
        """Write what the detail module is asked about a segment.

        Args:
            segment: (start, end) in seconds.
            plain: Whether it is asked the question alone, whatever the rules.

        Returns:
            The prompt.
        """
        write = policies.fine_prompt if self.rules.reflection and not plain else policies.plain_prompt
        return write(self.question, grounding=segment if self.sample.task == "tvg" else None)

    def was_sent_back(self, segment: Segment) -> bool:
        """Say whether a segment is one of those that did not suit.

        Args:
            segment: (start, end) in seconds.

        Returns:
            True where it overlaps one of them nearly whole.
        """
        return any(temporal_iou(segment, entry.segment) >= self.rules.repeat_iou for entry in self.rejected)

    def stop(self, reason: Reason) -> Asking:
        """End with the best answer that there is.

        Args:
            reason: Why it ends.

        Yields:
            At most one call, of the detail module without a policy.

        Returns:
            The answer: that of the last turn of the detail module, its last one that is not empty, the last one of the
            overview module that is not empty, or what the detail module says to the question alone.
        """
        segment, answer = self.found[-1]
        if self.sample.task == "tvg":
            times = locate_in_segment(times_in_text(answer, anywhere=True), segment) or segment
            return self.result(" to ".join(map(format_time, times)), times, reason)
        for seen, text in reversed(self.found):
            if text:
                return self.result(text, seen, reason)
        for entry in reversed(self.rounds):
            if entry.coarse.policy.answer:
                return self.result(entry.coarse.policy.answer, segment, reason)
        if self.rules.force_answer and self.rules.reflection:
            prompt = self.fine_prompt(segment, plain=True)
            (text,) = yield [ModuleCall("fine", self.sample, prompt, segment)]
            last = next(entry for entry in reversed(self.rounds) if entry.fine is not None)
            last.forced, answer = ModuleTurn(prompt, text), text.strip()
        return self.result(answer, segment, reason)

    def result(self, answer: str, segment: Segment | None, reason: Reason) -> CrossGranularityAnswer:
        """Put the answer and its course together.

        Args:
            answer: The answer.
            segment: Where it was seen, None for the whole video.
            reason: Why it ended.

        Returns:
            Both.
        """
        return CrossGranularityAnswer(self.sample.question, answer, segment, reason, self.rounds, self.sample.duration)
