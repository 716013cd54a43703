"""Wishes of a video, of a call and of a processor brought together, and frames that are already in memory."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers.image_utils import PILImageResampling
from transformers.processing_utils import VideosKwargs
from transformers.video_utils import VideoMetadata

from longvideo.processing.shared.frame_sampling import CutRange, check_rate, clip_range
from longvideo.processing.shared.messages import BLOCK_OPTIONS
from longvideo.processing.shared.video_inputs import (
    channels_first,
    describe_array,
    flatten_metadata,
    flatten_videos,
    to_metadata,
)
from longvideo.processing.shared.video_io import SourceVideoMetadata

SAMPLING_OPTIONS = ("num_frames", "fps", "min_frames", "max_frames")


class ReadingKwargs(VideosKwargs, total=False):
    """Options that every video processor has beside the usual ones.

    Attributes:
        min_frames: Least number of frames.
        max_frames: Largest number of frames.
        video_backend: "auto", "pyav" or "torchcodec".
        num_threads: Decoder threads, 0 for as many as there are cores.
        progress: Whether to show a progress bar; None shows one for long videos on a terminal.
        video_options: One mapping per video with its own `fps`, `num_frames`, `min_frames`, `max_frames`, `start`,
            `end` (seconds), `timestamps`, `duration` (seconds), `metadata`.
    """

    min_frames: int | None
    max_frames: int | None
    video_backend: str | None
    num_threads: int | None
    progress: bool | None
    video_options: list | None


def list_sources(
    videos: Any, *, metadata: Any = None, options: Sequence[Mapping[str, Any]] | None = None
) -> list[tuple[Any, VideoMetadata | None, dict[str, Any]]]:
    """List the videos of a call with what is known about each and what is wished for each.

    Args:
        videos: One video or nested lists of them.
        metadata: None, one mapping or `VideoMetadata`, or nested lists of them.
        options: One mapping per video with names of `BLOCK_OPTIONS`' values, or None.

    Returns:
        (source, metadata or None, options without the metadata) of each video.

    Raises:
        ValueError: There is no video, the numbers differ, or an option is unknown.
    """
    sources = flatten_videos(videos)
    if not sources:
        raise ValueError("No video was given; expected at least one path, address, array or list of frames.")
    known = flatten_metadata(metadata, len(sources))
    wishes = [dict(entry) for entry in options or [{}] * len(sources)]
    if len(wishes) != len(sources):
        raise ValueError(f"video_options has {len(wishes)} entries for {len(sources)} videos; give one per video.")
    listed = []
    for source, facts, own in zip(sources, known, wishes, strict=True):
        unknown = sorted(set(own) - set(BLOCK_OPTIONS.values()))
        if unknown:
            raise ValueError(f"Unknown video options {unknown}, expected some of {sorted(BLOCK_OPTIONS.values())}.")
        given = own.pop("metadata", None)
        listed.append((source, facts if given is None else to_metadata(given), own))
    return listed


def sampling_wishes(*levels: Mapping[str, Any]) -> dict[str, Any]:
    """Join the sampling wishes of a video, of the call and of the processor; the nearest one wins.

    Args:
        *levels: Mappings from the nearest to the farthest, the last one with the processor's own settings.

    Returns:
        `num_frames` or `fps` or neither; `min_frames` and `max_frames` as asked for (None when only the processor has
        them); `asked`: whether another level than the processor's had a wish.

    Raises:
        ValueError: `num_frames` and `fps` exclude each other.
    """
    rule: dict[str, Any] = {"num_frames": None, "fps": None}
    for level in levels:
        if level.get("num_frames") is not None and level.get("fps") is not None:
            raise ValueError(
                f"num_frames={level['num_frames']} and fps={level['fps']} exclude each other; give one of them."
            )
        if level.get("num_frames") is not None or level.get("fps") is not None:
            rule.update(num_frames=level.get("num_frames"), fps=level.get("fps"))
            break
    for name in ("min_frames", "max_frames"):
        rule[name] = next((level[name] for level in levels[:-1] if level.get(name) is not None), None)
    rule["asked"] = any(level.get(name) is not None for level in levels[:-1] for name in SAMPLING_OPTIONS)
    return rule


def check_limits(least: int, largest: int) -> None:
    """Check that two limits of the number of frames do not contradict each other.

    Args:
        least: Least number of frames.
        largest: Largest number of frames, 0 for no limit.

    Raises:
        ValueError: They do.
    """
    if least > largest > 0:
        raise ValueError(f"min_frames={least} is above max_frames={largest}; lower the first or raise the second.")


def check_available(num_frames: int | None, total: int) -> None:
    """Check that a video has as many frames as were asked for.

    Args:
        num_frames: Wanted number of frames or None.
        total: Number of frames that there are.

    Raises:
        ValueError: There are fewer.
    """
    if num_frames is not None and num_frames > total:
        raise ValueError(
            f"num_frames={num_frames} frames were asked for, but the video has {total}. Ask for {total} or fewer."
        )


def keeps_every_frame(source: Any, do_sample: bool | None) -> bool:
    """Say whether all frames of a file or a list of frame pictures are read.

    Args:
        source: Path, address, or list of picture paths.
        do_sample: The wish, None for the default: files are sampled, lists are not.

    Returns:
        True when nothing is sampled.

    Raises:
        ValueError: A list of pictures shall be sampled.
    """
    is_list = isinstance(source, list | tuple)
    if is_list and do_sample:
        raise ValueError(
            "Sampling frames from a list of images is not supported! Set `do_sample_frames=False`, "
            "or pass the folder of the frames."
        )
    return do_sample is False or is_list


def read_array(
    source: np.ndarray | torch.Tensor,
    *,
    metadata: VideoMetadata | None,
    options: Mapping[str, Any],
    rule: Mapping[str, Any],
    do_sample: bool | None,
    data_format: Any,
    choose: Callable[[VideoMetadata], np.ndarray],
    cut_range: CutRange = clip_range,
) -> tuple[torch.Tensor, SourceVideoMetadata]:
    """Sample frames that are in memory, where their facts or a wish say that they were not sampled before.

    Args:
        source: (F, H, W, C) or (F, C, H, W) frames.
        metadata: What the caller knows, or None.
        options: Wishes of this video: `timestamps` (seconds), `duration` (seconds), `start`, `end` (seconds).
        rule: Values of `sampling_wishes`.
        do_sample: The wish, None for the default.
        data_format: "channels_first" or "channels_last"; guessed when None.
        choose: Maps metadata to zero-based frame indices in the (cut) array.
        cut_range: Which frames lie between `start` and `end`.

    Returns:
        (F', C, H, W) frames and where they come from.

    Raises:
        ValueError: Times, metadata or wishes do not fit the frames.
    """
    frames_FCHW = channels_first(source, data_format)
    count = len(frames_FCHW)
    times = options.get("timestamps")
    if times is not None and len(times) != count:
        raise ValueError(f"{len(times)} timestamps were given for {count} frames; give one time in seconds each.")
    is_sampled = times is not None or (metadata is not None and metadata.frames_indices is not None)
    rate = metadata.fps if metadata is not None else None
    facts = describe_array(frames_FCHW, metadata, times=times, duration=options.get("duration"))
    cut = options.get("start") is not None or options.get("end") is not None
    if is_sampled or (do_sample is None and not rule["asked"] and rate is None) or do_sample is False:
        if cut:
            raise ValueError(
                "video_start and video_end need a file, or frames with a known rate that were not sampled before."
            )
        return frames_FCHW, facts
    # Indices are counted in the array; a total from elsewhere would point past its end.
    facts.total_num_frames, facts.fps = count, rate
    first = 0
    if cut:
        first, facts.total_num_frames, facts.duration = cut_range(
            count, check_rate(rate), start=options.get("start"), end=options.get("end")
        )
    check_available(rule["num_frames"], facts.total_num_frames)
    indices = choose(facts) + first
    facts.frames_indices = indices
    facts.frame_times = [float(index) / rate for index in indices] if rate else None
    return frames_FCHW[torch.from_numpy(indices)], facts


def pil_filter(resample: Any) -> int:
    """Turn any way to name a filter into PIL's number.

    Args:
        resample: PIL filter, number, torchvision mode or None.

    Returns:
        PIL's number of the filter; bicubic for None.
    """
    if resample is None:
        return int(PILImageResampling.BICUBIC)
    name = getattr(resample, "value", resample)
    return int(PILImageResampling[name.upper()]) if isinstance(name, str) else int(name)
