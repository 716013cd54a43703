"""How many frames a row may bring: fewer ones, evenly spread, until it fits, and never a cut through text or video.

Shape legend: F frames of one video.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers.video_utils import VideoMetadata

from longvideo.processing.shared.frame_sampling import num_frames_indices
from longvideo.processing.shared.messages import BLOCK_OPTIONS
from longvideo.processing.shared.video_io import describe_video
from longvideo.processing.shared.video_options import keeps_every_frame
from longvideo.processing.shared.video_sources import is_remote
from longvideo.trainers.message_rows import source_of, visual_blocks

# Options of a video block that decide how many frames are read.
_SAMPLING = {"fps", "num_frames", "min_frames", "max_frames"}
_LARGEST_UNIT = 64


def frame_unit(processor: Any) -> int:
    """Find how many frames belong together: every video has a multiple of them.

    Args:
        processor: Processor of a model.

    Returns:
        Frames of a clip, or frames that become one; 1 for a model without either.
    """
    count = getattr(processor, "get_num_video_tokens", None)
    for num_frames in range(1, _LARGEST_UNIT + 1) if count is not None else ():
        try:
            count(num_frames)
        except ValueError:
            continue
        return num_frames
    return 1


def planned_frames(block: Mapping[str, Any], processor: Any, call: Mapping[str, Any]) -> int | None:
    """Foretell how many frames of a video will be read, without decoding it.

    Args:
        block: Video block of a message.
        processor: Processor of a model.
        call: Options of the call, as `processor_kwargs`.

    Returns:
        Number of frames F; None where only reading tells: addresses, and files that cannot be described.
    """
    source = source_of(block)[1]
    rule_of, choose = (getattr(processor.video_processor, name, None) for name in ("sampling_rule", "choose_frames"))
    if source is None or rule_of is None or choose is None or is_remote(source):
        return None
    own = {target: block[key] for key, target in BLOCK_OPTIONS.items() if block.get(key) is not None}
    unit = frame_unit(processor)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            rule = rule_of(own, call)
            if not isinstance(source, str) and not hasattr(source, "__fspath__"):
                count = _frames_in_memory(source, own, rule, call, processor)
            else:
                facts = describe_video(source, start=own.get("start"), end=own.get("end"))
                keeps_all = keeps_every_frame(source, call.get("do_sample_frames"))
                count = facts.total_num_frames if keeps_all else len(choose(facts, rule))
    except (OSError, ValueError):
        return None
    return None if count is None else -(-count // unit) * unit


def _frames_in_memory(
    source: Any, own: Mapping[str, Any], rule: Mapping[str, Any], call: Mapping[str, Any], processor: Any
) -> int | None:
    """Foretells how many of the frames of an array or a list are kept; None where a cut decides."""
    if own.get("start") is not None or own.get("end") is not None:
        return None
    facts = dict(own.get("metadata") or {})
    is_sampled = own.get("timestamps") is not None or facts.get("frames_indices") is not None
    is_sampled = is_sampled or not (rule.get("asked") or facts.get("fps") or call.get("do_sample_frames"))
    is_sampled = is_sampled or call.get("do_sample_frames") is False or isinstance(source[0], str)
    if is_sampled and not getattr(processor, "has_fixed_num_frames", False):
        return len(source)
    known = VideoMetadata(total_num_frames=len(source), fps=facts.get("fps"))
    return len(processor.video_processor.choose_frames(known, rule))


def share_frames(
    num_frames: Sequence[int], room: int, *, size_of: Callable[[int], int] = int, unit: int = 1
) -> list[int] | None:
    """Take frames away from the videos of a row in equal shares until they fit.

    Args:
        num_frames: Frames of each video now.
        room: Most that all videos together may take, in what `size_of` counts.
        size_of: Size of a video by its number of frames: tokens, or the frames themselves.
        unit: Every video keeps a multiple of so many frames, and at least as many.

    Returns:
        Frames of each video, none above what it has now; None when even `unit` frames of each are too many.
    """

    def shares(part: int) -> list[int]:
        return [max(count * part // (most * unit) * unit, min(unit, count)) for count in num_frames]

    def fits(part: int) -> bool:
        return sum(map(size_of, shares(part))) <= room

    most = max(num_frames)
    if sum(map(size_of, num_frames)) <= room:
        return list(num_frames)
    low, high = 0, most
    if not fits(low):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return shares(low)


def limit_frames(
    messages: list[dict[str, Any]], counts: Sequence[int | None], processor: Any, call: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Ask for fewer frames of the videos of messages, evenly spread.

    Args:
        messages: Messages of `normalize_messages`; not changed.
        counts: Frames that each video shall have, in order; None leaves a video as it is.
        processor: Processor of a model.
        call: Options of the call, as `processor_kwargs`.

    Returns:
        New messages.
    """
    targets = iter(counts)
    resampled = getattr(processor, "has_fixed_num_frames", False)
    limited = []
    for message in messages:
        blocks = []
        for block in message["content"]:
            count = next(targets) if block.get("type") == "video" else None
            blocks.append(block if count is None else _limit_block(block, count, resampled=resampled, call=call))
        limited.append({**message, "content": blocks})
    return limited


def _limit_block(block: Mapping[str, Any], count: int, *, resampled: bool, call: Mapping[str, Any]) -> dict[str, Any]:
    key, source = source_of(block)
    kept = {name: value for name, value in block.items() if BLOCK_OPTIONS.get(name) not in _SAMPLING}
    is_list = isinstance(source, list | tuple)
    in_memory = is_list or isinstance(source, np.ndarray | torch.Tensor)
    metadata = block.get("video_metadata")
    facts = dict(metadata) if metadata is not None else {}
    is_sampled = block.get("timestamps") is not None or facts.get("frames_indices") is not None
    is_sampled = is_sampled or call.get("do_sample_frames") is False or (is_list and isinstance(source[0], str))
    if resampled or not in_memory or not is_sampled:
        return {**kept, "num_frames": count}
    # The processors take such frames as they come, so they are thinned out here.
    places = num_frames_indices(len(source), min(count, len(source)))
    kept[key] = [source[place] for place in places] if is_list else source[places]
    if block.get("timestamps") is not None:
        kept["timestamps"] = [block["timestamps"][place] for place in places]
    if facts.get("frames_indices") is not None:
        kept["video_metadata"] = {**facts, "frames_indices": [facts["frames_indices"][place] for place in places]}
    return kept


class RowBudget:
    """Most tokens and frames of a row, held by reading fewer frames.

    Args:
        processor: Processor of a model. One whose model puts visual tokens in place of one placeholder has no
            `get_num_video_tokens`: there the model itself fits videos into its context, and `max_length` counts text.
        max_length: Most tokens of a row, visual placeholders included; None for no limit.
        max_frames: Most frames of a row, all its videos together; None for no limit.
        call: Options of the call, as `processor_kwargs`.

    Raises:
        ValueError: A limit below 1.
    """

    def __init__(
        self, processor: Any, *, max_length: int | None, max_frames: int | None, call: Mapping[str, Any]
    ) -> None:
        for name, value, unit in (("max_length", max_length, "token"), ("max_frames_per_row", max_frames, "frame")):
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1 {unit}, or None for no limit.")
        self.processor, self.max_length, self.max_frames, self.call = processor, max_length, max_frames, dict(call)
        self.unit = frame_unit(processor)
        self._tokens_of = getattr(processor, "get_num_video_tokens", None)

    def __bool__(self) -> bool:
        return self.max_length is not None or self.max_frames is not None

    def count_visual(self, frames: Sequence[int]) -> int:
        """Count the placeholders of videos.

        Args:
            frames: Frames of each video.

        Returns:
            Tokens; 0 for a model that inserts visual tokens itself.
        """
        return 0 if self._tokens_of is None else sum(map(self._tokens_of, frames))

    def plan(self, messages: list[dict[str, Any]], num_text: int, where: str) -> list[dict[str, Any]]:
        """Ask for fewer frames before anything is decoded, where files tell how many they would give.

        Args:
            messages: Messages of `normalize_messages`.
            num_text: Tokens of the text, roughly.
            where: How errors name the row.

        Returns:
            The messages, new ones where frames were taken away.
        """
        blocks = list(visual_blocks(messages, "video"))
        frames = [planned_frames(block, self.processor, self.call) for block in blocks]
        if not frames or None in frames:
            return messages
        return self.reduce(messages, frames, num_text=num_text, where=where) or messages

    def reduce(
        self, messages: list[dict[str, Any]], frames: Sequence[int], *, num_text: int, where: str
    ) -> list[dict[str, Any]] | None:
        """Ask for fewer frames, if the row is too large.

        Args:
            messages: Messages of `normalize_messages`.
            frames: Frames of each video now.
            num_text: Tokens of everything but videos.
            where: How errors name the row.

        Returns:
            New messages, or None when the row fits.

        Raises:
            ValueError: The row is too large with the fewest frames, or with the only number that the model takes.
        """
        counts: list[int] | None = list(frames)
        if self.max_frames is not None and frames:
            counts = share_frames(counts, self.max_frames, unit=self.unit)
            if counts is None:
                raise ValueError(
                    f"{where} has {len(frames)} videos, which need at least {self.unit} frames each, and "
                    f"max_frames_per_row={self.max_frames}. Allow at least {self.unit * len(frames)}."
                )
        if self.max_length is not None:
            counts = self._fit_tokens(counts, num_text, where)
        if counts == list(frames):
            return None
        if getattr(self.processor, "has_fixed_num_frames", False):
            raise ValueError(
                f"{where} is too large for max_length={self.max_length} or max_frames_per_row={self.max_frames} with "
                f"{list(frames)} frames per video, and this model takes no fewer. Allow more, or leave the row out."
            )
        return limit_frames(messages, counts, self.processor, self.call)

    def _fit_tokens(self, counts: list[int], num_text: int, where: str) -> list[int]:
        room = self.max_length - num_text
        if not counts or self._tokens_of is None:
            if room < 0:
                raise ValueError(
                    f"{where} has {num_text} tokens of text and images, more than max_length={self.max_length}. "
                    f"Text is never cut: shorten the row, leave it out, or use max_length={num_text} or more."
                )
            return counts
        fitting = share_frames(counts, room, size_of=self._tokens_of, unit=self.unit)
        if fitting is None:
            least = sum(self._tokens_of(min(self.unit, count)) for count in counts)
            raise ValueError(
                f"{where} has {num_text} tokens of text and images, and {len(counts)} videos with the fewest frames "
                f"({self.unit} each) take {least} more, together over max_length={self.max_length}. Text is never "
                f"cut: shorten the row, leave it out, or use max_length={num_text + least} or more."
            )
        return fitting
