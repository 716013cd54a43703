"""Rows of cross-granularity training: questions, targets of both supervised stages, and the order of the steps."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from longvideo.processing.crossvllm.policies import coarse_prompt, grounding_question, plain_prompt, policy_text
from longvideo.processing.crossvllm.source_frames import video_duration
from longvideo.trainers.message_rows import normalize_messages, source_of, visual_blocks

Segment = tuple[float, float]
EXPECTED = (
    'Expected {"video": ..., "question": "...", "answer": "..." or a list of answers that are all right}, and where '
    'they are known "segment": [start, end] in seconds and, for decoded frames, "video_metadata": {"fps": ...}.'
)


@dataclass(frozen=True, eq=False)
class VideoQuestion:
    """A question about a video.

    Attributes:
        video: Path, folder of pictures, list of picture files, or decoded frames.
        question: The question.
        answers: Right answers, at least one; the best of them counts.
        segment: Where the answer is seen, (start, end) in seconds, None where nobody knows.
        metadata: What is known of decoded frames.
        name: How errors name the row.
    """

    video: Any
    question: str
    answers: tuple[str, ...]
    segment: Segment | None = None
    metadata: Any = None
    name: str = "The row"


@dataclass(frozen=True, eq=False)
class QuestionBatch:
    """Questions of a batch; what moves tensors to a device leaves them alone."""

    questions: tuple[VideoQuestion, ...]

    def __len__(self) -> int:
        return len(self.questions)

    def __iter__(self) -> Iterator[VideoQuestion]:
        return iter(self.questions)


class QuestionCollator:
    """Turns rows into `{"questions": QuestionBatch}`; videos are read by the trainer, which alone knows segments."""

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Collate rows.

        Args:
            rows: See `as_question`.

        Returns:
            `questions`, and `row_count` (B,) int64, by which batches are counted.

        Raises:
            ValueError: A row that holds no question.
        """
        questions = tuple(as_question(row, name=_name(row, i)) for i, row in enumerate(rows))
        return {"row_count": torch.ones(len(questions), dtype=torch.int64), "questions": QuestionBatch(questions)}


class PairedSteps(torch.utils.data.Sampler):
    """Order in which the rows of each optimizer step come twice in a row, for the coarse and for the fine module.

    Args:
        num_rows: Rows of the dataset.
        rows_per_step: Rows of an optimizer step, of all processes together.
        seed: Seed of the order; every epoch has its own.

    Raises:
        ValueError: Fewer rows than a step takes.

    Source: CrossVLLM Algorithm 1, whose cache the repetition is.
    Differs: Rows that do not fill a step are left out, others in each epoch; the paper goes on with the first row.
    """

    def __init__(self, num_rows: int, *, rows_per_step: int, seed: int) -> None:
        if num_rows < rows_per_step:
            raise ValueError(
                f"{num_rows} rows do not fill an optimizer step of {rows_per_step} (batch size x accumulation x "
                "processes). Give more rows, or lower gradient_accumulation_steps."
            )
        self.num_rows, self.rows_per_step, self.seed, self.epoch = num_rows, rows_per_step, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next."""
        self.epoch = epoch

    def __len__(self) -> int:
        return 2 * (self.num_rows // self.rows_per_step) * self.rows_per_step

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(self.num_rows, generator=generator).tolist()
        for begin in range(0, len(self) // 2, self.rows_per_step):
            step = order[begin : begin + self.rows_per_step]
            yield from step
            yield from step


def as_question(row: Mapping[str, Any], *, name: str = "The row") -> VideoQuestion:
    """Read a row.

    Args:
        row: `video`, `question` and `answer`, or `messages` with one video, one question and one answer; besides
            `segment` and `video_metadata`.
        name: How errors name the row.

    Returns:
        The question.

    Raises:
        ValueError: Something is missing; the text says what.
    """
    found = dict(row)
    if row.get("messages"):
        found.update(_from_messages(row, name))
    question, answer = found.get("question"), found.get("answer")
    answers = (answer,) if isinstance(answer, str) else tuple(answer or ())
    if found.get("video") is None or not isinstance(question, str) or not question.strip():
        raise ValueError(f"{name} has no video or no question (its keys: {sorted(row)}). {EXPECTED}")
    if not answers or not all(isinstance(x, str) and x.strip() for x in answers):
        raise ValueError(f"{name} has the answer {answer!r:.200}, expected a text or a list of texts. {EXPECTED}")
    return VideoQuestion(
        found["video"],
        question,
        answers,
        segment=_segment_of(found, name, required=False),
        metadata=found.get("video_metadata"),
        name=name,
    )


def coarse_grounding_row(row: Mapping[str, Any], *, name: str = "The row") -> dict[str, Any]:
    """Write a row of temporal grounding as supervised finetuning of the coarse module takes it.

    Args:
        row: `video`, `segment` (or `t_start` and `t_end`) in seconds, and `query` (what happens) or `question`;
            besides `duration` in seconds, which is otherwise read from the video, and `video_metadata`.
        name: How errors name the row.

    Returns:
        A row with `messages`: the video under the prompt P_c of training, and the policy with the true times.

    Raises:
        ValueError: Something is missing, or the segment does not lie in the video.

    Source: CrossVLLM Sec. 4.1 and Eq. 9 (coarse).
    Differs: The paper does not print targets; the policy has an empty answer.
    """
    query, question = row.get("query"), row.get("question")
    if row.get("video") is None or not (query or question):
        raise ValueError(f"{name} needs `video` and `query` or `question`, it has {sorted(row)}.")
    duration = row.get("duration")
    duration = video_duration(row["video"], row.get("video_metadata")) if duration is None else float(duration)
    start, end = _segment_of(row, name, required=True)
    # Annotations round the end up.
    if start >= duration or end > duration + 1:
        raise ValueError(
            f"{name} has the segment {start:g} to {end:g} s in a video of {duration:g} s. Times are seconds of the "
            "whole video."
        )
    text = coarse_prompt(grounding_question(query) if query else question, duration, grounding_only=True)
    return _messages_row(row, text, policy_text(start, min(end, duration)))


def fine_answer_row(row: Mapping[str, Any], *, name: str = "The row") -> dict[str, Any]:
    """Write a question with its answer as supervised finetuning of the fine module takes it.

    Args:
        row: See `as_question`; where it has a `segment`, that is what the module sees.
        name: How errors name the row.

    Returns:
        A row with `messages`: the video or its segment, the plain question, and the first answer.

    Raises:
        ValueError: See `as_question`.

    Source: CrossVLLM Eq. 6 and Eq. 9 (fine).
    """
    asked = as_question(row, name=name)
    cut = {} if asked.segment is None else dict(zip(("video_start", "video_end"), asked.segment, strict=True))
    found = {"video": asked.video, "video_metadata": asked.metadata}
    return _messages_row({**row, **found}, plain_prompt(asked.question), asked.answers[0], **cut)


def _messages_row(row: Mapping[str, Any], text: str, answer: str, **options: Any) -> dict[str, Any]:
    block = {"type": "video", "video": row["video"], **options}
    if row.get("video_metadata") is not None:
        block["video_metadata"] = row["video_metadata"]
    user = {"role": "user", "content": [block, {"type": "text", "text": text}]}
    kept = {"id": row["id"]} if row.get("id") is not None else {}
    return {**kept, "messages": [user, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]}


def _from_messages(row: Mapping[str, Any], name: str) -> dict[str, Any]:
    messages = normalize_messages(row, where=name)
    blocks = list(visual_blocks(messages))
    if [message["role"] for message in messages] != ["user", "assistant"] or len(blocks) != 1:
        raise ValueError(f"{name} must have one question about one video and one answer. {EXPECTED}")
    texts = ["".join(block.get("text", "") for block in message["content"]) for message in messages]
    video = source_of(blocks[0])[1] if blocks[0]["type"] == "video" else None
    found = {"video": video, "question": texts[0], "answer": texts[1]}
    metadata = blocks[0].get("video_metadata") or row.get("video_metadata")
    return {**found, "video_metadata": metadata}


def _segment_of(row: Mapping[str, Any], name: str, *, required: bool) -> Segment | None:
    segment = row.get("segment")
    if segment is None and row.get("t_start") is not None and row.get("t_end") is not None:
        segment = (row["t_start"], row["t_end"])
    if segment is None and not required:
        return None
    try:
        start, end = (float(time) for time in segment)
    except (TypeError, ValueError):
        start, end = 0.0, 0.0
    if not 0 <= start < end:
        raise ValueError(f"{name} has the segment {segment!r}, expected [start, end] in seconds with start < end.")
    return start, end


def _name(row: Mapping[str, Any], position: int) -> str:
    label = row.get("id") if isinstance(row, Mapping) else None
    return f"Row {label!r}" if label is not None else f"Row {position} of the batch"
