"""Questions to a model that sees videos in two granularities: rows of the pipeline go through the controller."""

import dataclasses
import itertools
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from transformers.utils.chat_template_utils import Chat

from longvideo.cross_granularity.controller import CrossGranularityController
from longvideo.cross_granularity.modules import BATCH_SIZE, granularity_modules, has_granularities
from longvideo.cross_granularity.rules import ControllerRules
from longvideo.cross_granularity.trace import CrossGranularityAnswer, VideoQuestion
from longvideo.pipelines import inputs
from longvideo.processing.crossvllm.source_frames import local_copy, video_duration

RULE_KEYS = tuple(entry.name for entry in dataclasses.fields(ControllerRules))
OPTION_KEYS = ("coarse_options", "fine_options")
# What speaks of the frames or the tokens of one look.
ONE_LOOK_KEYS = (
    "num_frames", "fps", "min_frames", "max_frames", "start", "end", "processor_kwargs", "visual_dropout", "streamer",
    "return_token_counts", "return_video_metadata", "return_kept_tokens",
)  # fmt: skip
# Questions whose videos' features are in memory at a time.
GROUP = 16


def applies(pipe: Any, rows: Any, *, stream: bool, granularity: str | None) -> bool:
    """Say whether rows go through the controller.

    Args:
        pipe: The pipeline.
        rows: What `inputs.gather_inputs` gave.
        stream: Whether the answer is wanted piece by piece.
        granularity: The one that was asked for, None for both.

    Returns:
        False for models without granularities, for one look in a granularity, for chats and for pictures.

    Raises:
        ValueError: A granularity was asked for that the model does not have, or a stream of both.
    """
    if not has_granularities(pipe):
        if granularity is not None:
            raise ValueError(f"A {pipe.model.config.model_type} model has no granularities; leave granularity out.")
        return False
    if granularity is not None or is_plain(rows):
        return False
    if stream:
        raise ValueError(
            "An answer that two modules find cannot be streamed. Give granularity='coarse' or 'fine' for one look."
        )
    return True


def is_plain(rows: Any) -> bool:
    """Say whether rows are chats or pictures, which need no second look.

    Args:
        rows: What `inputs.gather_inputs` gave; of a list the first row counts.

    Returns:
        False for a question about a video, and for datasets and iterators.
    """
    row = rows[0] if isinstance(rows, list) and rows else rows
    is_chat = isinstance(row, Chat) or inputs.is_message(row) or (isinstance(row, list) and bool(row))
    return is_chat or (isinstance(row, Mapping) and ("messages" in row or row.get("image") is not None))


def of_one_look(pipe: Any, granularity: str | None) -> dict[str, str]:
    """Say in which granularity processor and model work on a single look.

    Args:
        pipe: The pipeline.
        granularity: What was asked for, or None for the model's.

    Returns:
        An argument of both; nothing for models without granularities.
    """
    return {"granularity": granularity or pipe.model.granularity} if has_granularities(pipe) else {}


def answer_rows(pipe: Any, rows: Any, kwargs: Mapping[str, Any]) -> Any:
    """Answer questions about videos with both granularities.

    Args:
        pipe: Pipeline of the model.
        rows: One row, a list of rows, a dataset or an iterator.
        kwargs: Fields of `ControllerRules`, `coarse_options` and `fine_options` (arguments of the modules),
            `grounding_task` (None or "tvg"), `batch_size`, `return_timings`, settings of `generate`.

    Returns:
        A dict for a row, a list for a list, an iterator for anything else.

    Raises:
        ValueError: The list is empty, a row is no question about a video, or an argument speaks of one look.
    """
    given = {key: value for key, value in kwargs.items() if value is not None}
    call = Call(pipe, given)
    if isinstance(rows, Mapping):
        return call.answer_group([rows])[0]
    if isinstance(rows, list):
        if not rows:
            raise ValueError("The list of questions is empty; give at least one.")
        return [answer for group in in_groups(rows, GROUP) for answer in call.answer_group(group)]
    entries = (rows[index] for index in range(len(rows))) if hasattr(rows, "__getitem__") else rows
    return (answer for group in in_groups(entries, call.batch_size) for answer in call.answer_group(group))


def in_groups(rows: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Cut rows into lists, without reading ahead.

    Args:
        rows: The rows.
        size: Rows of a list.

    Yields:
        The lists.
    """
    rows = iter(rows)
    while group := list(itertools.islice(rows, size)):
        yield group


class Call:
    """The arguments of one call of the pipeline, and the modules that they make.

    Args:
        pipe: The pipeline.
        given: Its arguments; see `answer_rows`.

    Raises:
        ValueError: An argument speaks of one look.
        TypeError: An argument is unknown.
    """

    def __init__(self, pipe: Any, given: dict[str, Any]) -> None:
        wrong = sorted(set(given) & set(ONE_LOOK_KEYS))
        if wrong:
            raise ValueError(
                f"A {pipe.model.config.model_type} model looks at a video several times, but {', '.join(wrong)} "
                "belong(s) to a single look. Give what is about frames in coarse_options= or fine_options=, or "
                "granularity='coarse' or 'fine' for a single look."
            )
        self.pipe = pipe
        self.rules = ControllerRules(**{key: given.pop(key) for key in RULE_KEYS if key in given})
        self.task = given.pop("grounding_task", None)
        self.with_timings = given.pop("return_timings", False)
        self.batch_size = given.pop("batch_size", BATCH_SIZE)
        given.pop("return_full_text", None)
        options = {name: {"batch_size": self.batch_size, **given.pop(name, {})} for name in OPTION_KEYS}
        modules = granularity_modules(pipe, **{name: {**given, **own} for name, own in options.items()})
        self.frames = modules[0].frames
        self.controller = CrossGranularityController(*modules, self.rules)

    def answer_group(self, rows: Sequence[Any]) -> list[dict[str, Any]]:
        """Answer rows together.

        Args:
            rows: Rows with `video` and `question`.

        Returns:
            One dict each.
        """
        begin = time.perf_counter()
        for row in rows:
            check_row(row)
        with ExitStack() as stack:
            local = {}
            for row in rows:
                video = row["video"]
                if isinstance(video, str) and video not in local:
                    local[video] = stack.enter_context(local_copy(video))
            samples = [self._sample(row, local) for row in rows]
            self.frames.forget(samples)
            answers = self.controller(samples)
        seconds = (time.perf_counter() - begin) / len(rows)
        timings = {"timings": {"total": seconds}} if self.with_timings else {}
        return [{**to_result(answer), **timings} for answer in answers]

    def _sample(self, row: Mapping[str, Any], local: Mapping[str, Any]) -> VideoQuestion:
        video = local[row["video"]] if isinstance(row["video"], str) else row["video"]
        facts = row.get("video_metadata")
        facts = facts[0] if isinstance(facts, list) else facts
        task = row.get("grounding_task") or self.task or "qa"
        return VideoQuestion(video, row["question"], video_duration(video, facts), task, facts)


def check_row(row: Any) -> None:
    """Refuse what is no question about a video.

    Args:
        row: A row of the call.

    Raises:
        ValueError: It has messages, a picture or no question.
        OSError: The video cannot be opened.
    """
    if not isinstance(row, Mapping):
        raise ValueError(f"A {type(row).__name__} came without a question: pass question=..., or dicts with both.")
    if "messages" in row or row.get("image") is not None:
        raise ValueError(
            f"Each row needs 'video' and 'question', got {sorted(map(str, row))}. Give granularity='coarse' or 'fine' "
            "to ask about chats and pictures among other rows."
        )
    inputs.row_to_block(row, start=None, end=None)
    inputs.check_question(row.get("question"))


def to_result(answer: CrossGranularityAnswer) -> dict[str, Any]:
    """Write an answer as the pipeline gives it.

    Args:
        answer: Of the controller.

    Returns:
        `answer`, `generated_text`, `segment`, `reason`, `rounds`, `num_calls`, `duration` and, in the exhaustive mode,
        `events`.
    """
    plain = answer.to_dict()
    result = {"answer": answer.answer, "generated_text": answer.answer}
    result |= {name: plain[name] for name in ("segment", "reason", "rounds", "num_calls", "duration")}
    return result | ({} if answer.events is None else {"events": plain["events"]})
