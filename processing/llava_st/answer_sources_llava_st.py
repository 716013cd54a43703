"""Answers of a batch with the sizes and durations of the sources that they speak about."""

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from longvideo.processing.shared.frame_sampling import spread_indices

# Containers round the times of frames to milliseconds.
ROUNDING_SECONDS = 2e-3
AXIS_MARKS = ("<TEMP-", "<HEIGHT-", "<WIDTH-")


def answer_texts(
    tokenizer: Any, outputs: Any, *, hidden: Collection[int] = (), keep_blanks: bool = False, **kwargs: Any
) -> tuple[list[str], bool]:
    """Decode answers with their coordinates.

    Args:
        tokenizer: The tokenizer.
        outputs: Text, texts, token ids, or a (B, S) tensor of them.
        hidden: Ids that are left out beside those that end and fill rows.
        keep_blanks: Whether blanks around the texts stay.
        **kwargs: Passed to `decode`.

    Returns:
        The texts, and whether there was one answer, not a list.
    """
    if isinstance(outputs, str):
        return [outputs], True
    rows = outputs.tolist() if hasattr(outputs, "tolist") else list(outputs)
    rows = [row.tolist() if hasattr(row, "tolist") else row for row in rows]
    is_single = bool(rows) and all(isinstance(row, int) for row in rows)
    left_out = {tokenizer.pad_token_id, tokenizer.eos_token_id, *hidden}

    def decode(row: Any) -> str:
        if isinstance(row, str):
            return row
        # Coordinates are special tokens, so only what ends and fills rows is left out.
        kept = [entry for entry in row if entry not in left_out]
        text = tokenizer.decode(kept, skip_special_tokens=False, **kwargs)
        return text if keep_blanks else text.strip()

    return [decode(row) for row in ([rows] if is_single else rows)], is_single


def marks_of(tokenizer: Any) -> set[int]:
    """List the special tokens that are no coordinates: ends, chat marks, positions of visuals.

    Args:
        tokenizer: The tokenizer.

    Returns:
        Their ids.
    """
    added = tokenizer.added_tokens_decoder.items()
    marks = {token for token, entry in added if entry.special and not entry.content.startswith(AXIS_MARKS)}
    return marks | set(tokenizer.all_special_ids)


def answer_sources(
    count: int, *, sizes: Any = None, durations: Any = None, starts: Any = None, metadata: Any = None
) -> list[dict[str, Any]]:
    """List size, duration and start of the source of each answer.

    Args:
        count: Number of answers.
        sizes: (width, height) in pixels or a mapping with both, one for all answers or one per answer.
        durations: Seconds, one number for all answers or one per answer.
        starts: Seconds, likewise; 0 when None.
        metadata: Video metadata, one for all answers or one per answer, for what is None of the above.

    Returns:
        `size`, `duration`, `start` and `timeline` of each; from metadata the last three are those of `seen_period` and
        `seen_timeline`, the timeline only where duration and start are not given.

    Raises:
        ValueError: Numbers of entries and answers differ.
    """
    sizes, durations, starts = (
        value.tolist() if hasattr(value, "tolist") else value for value in (sizes, durations, starts)
    )
    facts = one_per_answer(metadata, count, "metadata")
    listed = []
    for size, duration, start, known in zip(
        one_per_answer(sizes, count, "sizes", is_pair=True),
        one_per_answer(durations, count, "durations"),
        one_per_answer(starts, count, "starts"),
        facts,
        strict=True,
    ):
        timeline = None
        if known is not None:
            timeline = seen_timeline(known) if duration is None and start is None else None
            size = (known.width, known.height) if size is None else size
            begin, seconds = seen_period(known)
            duration, start = seconds if duration is None else duration, begin if start is None else start
        if isinstance(size, list | tuple) and None in size:
            size = None
        listed.append({"size": size, "duration": duration, "start": float(start or 0.0), "timeline": timeline})
    return listed


def seen_period(metadata: Any) -> tuple[float, float | None]:
    """Tell which seconds of the source the first and the last time token stand for.

    Frames are taken evenly from the first to the last one, and the k-th of them goes with the k-th time token. What
    lies between both ends is the same share of both, or `seen_timeline`.

    Args:
        metadata: Of a video, with or without the frames that were taken.

    Returns:
        Second of the first frame, and the seconds from there to the last frame; where there is one frame alone, the
        time for which it is shown, and None where no duration is known.

    Source: annotations of ST-Align and inference/src/metrics.py of appletea233/LLaVA-ST, `(frame - first) / (last -
    first)`. `Differs:` the demo of the release multiplies by the duration, which ends one frame later.
    """
    start, duration = getattr(metadata, "start", None), metadata.duration
    times, last = getattr(metadata, "frame_times", None), getattr(metadata, "last_frame_time", None)
    if times is None and metadata.fps and metadata.frames_indices is not None:
        times = [index / metadata.fps for index in metadata.frames_indices]
    first = float(start or 0.0)
    if times is not None and len(times) > 1:
        # A cut may begin while its first frame is on the screen already.
        first, last = times[0] if start is None else max(times[0], start), times[-1]
    elif last is None and duration is not None and metadata.total_num_frames:
        last = first + duration * (metadata.total_num_frames - 1) / metadata.total_num_frames
    return first, float(last - first) if last is not None and last > first else duration


def seen_timeline(metadata: Any) -> tuple[np.ndarray, np.ndarray] | None:
    """Tell which seconds lie between both ends of `seen_period`, where frames do not follow each other evenly.

    Frames are taken evenly by their index, so only the times of frames say which second a fraction stands for.

    Args:
        metadata: As for `seen_period`.

    Returns:
        (n,) fractions from 0 to 1 and (n,) seconds of the source, both ascending, with straight lines between; None
        where one line from end to end does, or the times of frames are not known.
    """
    times, indices = getattr(metadata, "frame_times", None), metadata.frames_indices
    first, length = seen_period(metadata)
    if times is None or len(times) < 3 or not length or np.any(np.diff(times) < 0):
        return None
    places = np.arange(len(times))
    is_range = indices is not None and len(indices) == len(times) and 0 <= indices[0] <= indices[-1]
    # Of frames that were chosen unevenly before, the model's k-th one still goes with the k-th time token.
    if is_range and np.array_equal(indices, spread_indices(int(indices[0]), int(indices[-1]), len(times))):
        places = np.asarray(indices)
    if places[0] == places[-1]:
        return None
    fractions = (places - places[0]) / (places[-1] - places[0])
    # Frames that repeat have one time: the middle of their places.
    seconds, owner = np.unique(times, return_inverse=True)
    fractions = np.bincount(owner, fractions) / np.bincount(owner)
    fractions[0], fractions[-1] = 0.0, 1.0
    is_even = np.abs(np.interp(fractions, (0, 1), seconds[[0, -1]]) - seconds).max() <= ROUNDING_SECONDS
    return None if is_even else (fractions, np.maximum(seconds, first))


def one_per_answer(value: Any, count: int, name: str, *, is_pair: bool = False) -> list[Any]:
    """List one value per answer.

    Args:
        value: None, a value for all answers, or a list with one per answer.
        count: Number of answers.
        name: Name for the message.
        is_pair: Whether a single value is a pair of numbers.

    Returns:
        The values.

    Raises:
        ValueError: The numbers differ.
    """
    is_list = isinstance(value, list | tuple) and not isinstance(value, Mapping)
    if is_list and is_pair:
        is_list = not (len(value) == 2 and all(isinstance(entry, int | float) for entry in value))
    if not is_list:
        return [value] * count
    if len(value) != count:
        raise ValueError(f"{name} has {len(value)} entries for {count} answers; give one per answer.")
    return list(value)
