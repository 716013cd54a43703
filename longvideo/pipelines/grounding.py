"""Questions for times and places, and answers that hold them, for processors that know both.

Nothing here knows an architecture. What is used: `apply_task` of the processor, which writes the question of a task,
`post_process_grounding`, which reads times and boxes out of an answer, `num_temporal_tokens`, 0 where answers hold
none, and `seen_period`, which says what part of the source their times are fractions of.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import TextIteratorStreamer

TASK_KEYS = ("grounding_task", "span", "box", "pattern")


@dataclass(frozen=True)
class Source:
    """What an answer speaks about.

    Attributes:
        task: task that was asked, or None.
        size: (width, height) of the source in pixels, or None.
        duration: seconds that the times of questions and answers are fractions of, None for a picture.
        start: second of the source at which these begin.
        event_start: second at which the event that was asked for begins, where the question said it.
        end: second at which the video, or its cut, is over; its last frame is shown until then.
        metadata: of the video, which tells more than duration and start where its frame rate varies; None for a
            picture.
    """

    task: str | None = None
    size: tuple[float, float] | None = None
    duration: float | None = None
    start: float = 0.0
    event_start: float | None = None
    end: float | None = None
    metadata: Any = None


def answers_with_places(processor: Any) -> bool:
    """Tell whether times and boxes can be read out of the answers of a processor's model."""
    # A checkpoint of an early stage has the method, and no tokens for coordinates yet.
    return hasattr(processor, "post_process_grounding") and processor.num_temporal_tokens > 0


def hidden_ids(processor: Any, generation_config: Any) -> frozenset[int] | None:
    """Return the tokens that are no part of an answer, for models whose coordinates are special tokens.

    Args:
        processor: of the model.
        generation_config: of the model.

    Returns:
        Ids of ends, padding and chat marks; None where all special tokens are left out.
    """
    if not answers_with_places(processor):
        return None
    ends = generation_config.eos_token_id
    return frozenset([*processor.tokenizer.all_special_ids, *(ends if isinstance(ends, list) else [ends])])


def decode_answer(processor: Any, ids: torch.Tensor, hidden: frozenset[int] | None) -> str:
    """Decode the tokens of an answer.

    Args:
        processor: of the model.
        ids: (S,) ids without the prompt.
        hidden: of `hidden_ids`.

    Returns:
        The text, with coordinates where the model writes them.
    """
    if hidden is None:
        return processor.decode(ids, skip_special_tokens=True).strip()
    kept = [token for token in ids.tolist() if token not in hidden]
    return processor.decode(kept, skip_special_tokens=False).strip()


class AnswerStreamer(TextIteratorStreamer):
    """Streams an answer as `decode_answer` decodes it.

    Args:
        tokenizer: decodes the pieces.
        hidden: of `hidden_ids`.
    """

    def __init__(self, tokenizer: Any, hidden: frozenset[int] | None) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=hidden is None)
        self.hidden = hidden or frozenset()

    def put(self, value: torch.Tensor) -> None:
        is_prompt = self.skip_prompt and self.next_tokens_are_prompt
        if not is_prompt and self.hidden:
            value = value.flatten()
            value = value[[token not in self.hidden for token in value.tolist()]]
            if not len(value):
                return
        super().put(value)


def check_task(processor: Any, given: Mapping[str, Any]) -> None:
    """Refuse arguments of a task that lead nowhere.

    Args:
        processor: of the model.
        given: values of `TASK_KEYS`.

    Raises:
        ValueError: the model has no tasks, or a span or box came without one.
    """
    named = [name for name in TASK_KEYS if given.get(name) is not None]
    if not named:
        return
    if not (hasattr(processor, "apply_task") and answers_with_places(processor)):
        raise ValueError(
            f"{' and '.join(named)} cannot be used: {type(processor).__name__} has no tasks for times and places. "
            "Ask a question in words, or use a LLaVA-ST checkpoint with coordinates."
        )
    if given.get("grounding_task") is None:
        raise ValueError(f"{' and '.join(named)} came without grounding_task=..., whose question would hold it.")


def task_messages(
    processor: Any, kind: str, block: Mapping[str, Any], query: str | None, given: Mapping[str, Any]
) -> tuple[list[dict[str, Any]], float | None]:
    """Write the question of a task about one visual.

    Args:
        processor: with `apply_task`.
        kind: "video" or "image".
        block: of the visual, with `video_start` and `video_end` (seconds) where a video is cut.
        query: what is looked for, or None.
        given: `grounding_task`; `span`, (start, end) in seconds of the source, or its start alone; `box`, (left, top,
            right, bottom) in pixels of the source; `pattern`, which wording; `video_metadata` of an array.

    Returns:
        Messages, and the second at which the event begins that is asked for, None where the question does not say.

    Raises:
        ValueError: what `apply_task` raises, or a span and a box in a source whose length or size is not known.
    """
    span, box = given.get("span"), given.get("box")
    options: dict[str, Any] = {} if given.get("pattern") is None else {"pattern": given["pattern"]}
    begin = None
    if span is not None and not isinstance(span, Sequence | np.ndarray):
        options["time_seconds"] = begin = float(span)
    elif span is not None:
        options["span_seconds"] = tuple(float(second) for second in span)
        begin = options["span_seconds"][0] if len(span) else None
    if box is not None:
        options["box"] = tuple(float(pixel) for pixel in box)
    if options.keys() - {"pattern"}:
        facts = find_facts(processor, kind, block, given.get("video_metadata"))
        if span is not None and kind == "video" and facts.duration is None:
            raise ValueError(
                "A span in seconds needs to know how long the video is, which an array does not say: pass "
                "video_metadata={'fps': ...}."
            )
        options.update(size=facts.size, duration=facts.duration, start=facts.start, metadata=facts.metadata)
        if len(options.get("span_seconds", ())) == 2:
            options["span_seconds"] = _to_last_frame(options["span_seconds"], facts)
    messages = processor.apply_task(given["grounding_task"], **{kind: block}, query=query, **options)
    return messages, begin


def _to_last_frame(span: tuple[float, float], facts: Source) -> tuple[float, float]:
    """Let a span that reaches to the end of the video end with its last frame."""
    begin, end = span
    last = facts.start + (facts.duration or 0.0)
    return begin, last if facts.end is not None and begin < last < end <= facts.end + 1e-6 else end


def find_facts(processor: Any, kind: str, block: Mapping[str, Any], video_metadata: Any = None) -> Source:
    """Find size, length and start of a visual before it is decoded.

    Args:
        processor: of the model; its `seen_period` says what times are fractions of.
        kind: "video" or "image".
        block: of the visual.
        video_metadata: `fps` and the like of a video given as an array.

    Returns:
        What is known of it.
    """
    source = block[kind]
    start, end = block.get("video_start"), block.get("video_end")
    if kind == "image":
        return Source(size=_picture_size(source))
    if isinstance(source, str):
        from longvideo.processing.shared.video_io import describe_video

        facts = describe_video(source, start=start, end=end)
    else:
        facts = _describe_array(source, video_metadata, start=start, end=end)
        if facts is None:
            return Source(size=_frame_size(source), start=start or 0.0)
    begin, seconds = processor.seen_period(facts)
    over = None if facts.duration is None else (start or 0.0) + facts.duration
    return Source(size=(facts.width, facts.height), duration=seconds, start=begin, end=over, metadata=facts)


def _picture_size(image: Any) -> tuple[float, float]:
    if isinstance(image, np.ndarray | torch.Tensor):
        return _frame_size(image[None])
    from transformers.image_utils import load_image

    return load_image(image).size


def _frame_size(frames: Any) -> tuple[float, float]:
    """(width, height) of an array of frames, channels first or last, or of a list of pictures."""
    if not isinstance(frames, np.ndarray | torch.Tensor):
        return _picture_size(frames[0])
    channels_first = frames.shape[-3] in (1, 3) and frames.shape[-1] not in (1, 3)
    height, width = frames.shape[-2:] if channels_first else frames.shape[-3:-1]
    return width, height


def _describe_array(frames: Any, metadata: Any, *, start: float | None, end: float | None) -> Any:
    """Describe frames as the video processor will, cut or not; None where nothing says how long they are."""
    from longvideo.processing.shared.frame_sampling import check_rate, clip_range
    from longvideo.processing.shared.video_inputs import describe_array, to_metadata

    known = None if metadata is None else to_metadata(metadata)
    if known is None or (known.duration is None and not known.fps):
        return None
    width, height = _frame_size(frames)
    # Only the shape is looked at.
    facts = describe_array(torch.empty(len(frames), 0, int(height), int(width)), known, times=None, duration=None)
    if start is not None or end is not None:
        rate = check_rate(facts.fps)
        first, count, facts.duration = clip_range(len(frames), rate, start=start, end=end)
        facts.start, facts.frame_times = start, [index / rate for index in range(first, first + count)]
    return facts


def describe_source(processor: Any, encoded: Mapping[str, Any], task: str | None, event_start: float | None) -> Source:
    """Say what an answer speaks about: the first video of a sample, or its first picture.

    Args:
        processor: of the model; its `seen_period` says what times are fractions of.
        encoded: output of the processor with `video_metadata` and `image_sizes`.
        task: task that was asked, or None.
        event_start: second at which the event begins that was asked for, or None.

    Returns:
        The source.
    """
    for facts in encoded.get("video_metadata") or ():
        size = (facts.width, facts.height) if facts.width and facts.height else None
        start, seconds = processor.seen_period(facts)
        return Source(task, size, seconds, start, event_start, metadata=facts)
    for size in encoded.get("image_sizes", ()):
        return Source(task, tuple(int(side) for side in size))
    return Source(task)


def read_answer(processor: Any, answer: str, source: Source) -> Any:
    """Read times and boxes out of an answer.

    Args:
        processor: with `post_process_grounding`.
        answer: text with coordinates.
        source: what it speaks about.

    Returns:
        What the processor gives: spans in seconds and boxes in pixels of the source.
    """
    extra = {} if source.event_start is None else {"event_start": source.event_start}
    return processor.post_process_grounding(
        answer, sizes=source.size, metadata=source.metadata, task=source.task, **extra
    )
