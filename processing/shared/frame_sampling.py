"""Which source frames a model looks at: pure functions from counts and rates to zero-based frame indices.

Sources: VideoChat-Flash (arXiv 2501.00574), training code `get_frame_indices` (rules `dynamic_fps1` and `middle`);
LongVU (arXiv 2410.17434), demo, training and evaluation code (strides); LLaVA-ST (arXiv 2501.08282), `load_video`.
Every function returns a sorted int64 array; times in seconds follow from the indices in `video_io` only.
"""

import math
import warnings
from collections.abc import Callable

import numpy as np

# From the number of frames, their rate, `start` and `end`: first frame, number of frames, seconds.
CutRange = Callable[..., tuple[int, int, float]]
# In frames: how far the product of a time and a rate may be off a whole number.
BORDER = 1e-6


def check_rate(video_fps: float | None) -> float:
    """Return the frame rate as a float after checking that it can be used for sampling by time.

    Args:
        video_fps: Source frames per second.

    Returns:
        The same rate as a float.

    Raises:
        ValueError: The rate is missing, zero, negative or not finite, so seconds cannot be turned into frames.
    """
    if video_fps is None or not math.isfinite(video_fps) or video_fps <= 0:
        raise ValueError(
            f"The frame rate of the video is {video_fps}, but sampling by time needs a positive number of frames per "
            "second. Pass the true rate (fps in the video metadata) or ask for a fixed number of frames (num_frames)."
        )
    return float(video_fps)


def check_total(num_frames_total: int) -> int:
    """Return the number of source frames as an int after checking that there is at least one.

    Args:
        num_frames_total: Number of frames of the source video.

    Returns:
        The same count as an int.

    Raises:
        ValueError: There are no frames to choose from.
    """
    if num_frames_total < 1:
        raise ValueError(f"The video has {num_frames_total} frames, but at least one frame is needed.")
    return int(num_frames_total)


def whole_clips(num_frames: int, local_num_frames: int, *, name: str = "num_frames") -> int:
    """Round a frame count down to whole clips, never below one clip, and warn when that changes it.

    Args:
        num_frames: Wanted number of frames.
        local_num_frames: Frames per clip.
        name: Name of the setting for the warning.

    Returns:
        The largest multiple of `local_num_frames` that is not above `num_frames`, or one clip.

    Raises:
        ValueError: `num_frames` or `local_num_frames` is below one.
    """
    if num_frames < 1 or local_num_frames < 1:
        raise ValueError(f"{name}={num_frames} with clips of {local_num_frames} frames: both must be at least 1.")
    rounded = max(num_frames // local_num_frames, 1) * local_num_frames
    if rounded != num_frames:
        warnings.warn(
            f"{name}={num_frames} is not a multiple of the {local_num_frames} frames of a clip; using {rounded}.",
            stacklevel=3,
        )
    return rounded


def middle_indices(num_frames_total: int, num_frames: int) -> np.ndarray:
    """Choose the midpoints of `num_frames` equal segments; a shorter video repeats its last midpoint.

    Args:
        num_frames_total: Number of frames of the source video.
        num_frames: Number of indices to return.

    Returns:
        (num_frames,) int64 zero-based source frame indices, ascending.

    Raises:
        ValueError: A count is below one.

    Source: VideoChat-Flash `get_frame_indices`, sample "middle".
    """
    total = check_total(num_frames_total)
    if num_frames < 1:
        raise ValueError(f"num_frames={num_frames}, expected at least 1.")
    distinct = min(num_frames, total)
    edges = np.linspace(0, total, distinct + 1).astype(np.int64)
    indices = (edges[:-1] + edges[1:] - 1) // 2
    if distinct < num_frames:
        warnings.warn(
            f"{num_frames} frames were asked for, but the video has only {total}; the last one is repeated.",
            stacklevel=2,
        )
        indices = np.concatenate([indices, np.full(num_frames - distinct, indices[-1], dtype=np.int64)])
    return indices


def dynamic_fps1_indices(
    num_frames_total: int,
    video_fps: float,
    *,
    min_frames: int,
    max_frames: int,
    local_num_frames: int = 4,
) -> np.ndarray:
    """Choose about one frame per second in whole clips, between a least and a largest number of frames.

    Args:
        num_frames_total: Number of frames of the source video.
        video_fps: Source frames per second.
        min_frames: Least number of frames; lowered to whole clips of a shorter video.
        max_frames: Largest number of frames; 0 means no limit. A value that is not a multiple of
            `local_num_frames` is followed literally, as in the original; see `whole_clips`.
        local_num_frames: Frames per clip.

    Returns:
        (F,) int64 zero-based source frame indices, ascending; the last one is repeated when F is above the total.

    Raises:
        ValueError: No frames, a frame rate that is not positive, or a limit below zero.

    Source: VideoChat-Flash `get_frame_indices`, sample "dynamic_fps1".
    """
    total, rate = check_total(num_frames_total), check_rate(video_fps)
    if min_frames < 0 or max_frames < 0 or local_num_frames < 1:
        raise ValueError(
            f"min_frames={min_frames}, max_frames={max_frames}, local_num_frames={local_num_frames}: "
            "expected limits of at least 0 and clips of at least one frame."
        )
    if min_frames > total:
        min_frames = total // local_num_frames * local_num_frames
    num_clips = int(total / rate // local_num_frames)
    num_frames = local_num_frames * max(num_clips, 1)
    if max_frames > 0:
        num_frames = min(num_frames, max_frames)
    return middle_indices(total, max(min_frames, num_frames))


def num_frames_indices(num_frames_total: int, num_frames: int, *, local_num_frames: int = 1) -> np.ndarray:
    """Choose a fixed number of evenly spread frames, clamped to what exists and to whole clips.

    Args:
        num_frames_total: Number of frames of the source video.
        num_frames: Wanted number of frames.
        local_num_frames: Frames per clip; 1 for models without clips.

    Returns:
        (F,) int64 zero-based source frame indices; F is a multiple of `local_num_frames`. Only a video that is
        shorter than one clip repeats its last frame.

    Raises:
        ValueError: A count is below one.
    """
    total = check_total(num_frames_total)
    num_frames = whole_clips(num_frames, local_num_frames)
    available = max(total // local_num_frames, 1) * local_num_frames
    if num_frames > available:
        warnings.warn(
            f"num_frames={num_frames} is more than the {total} frames of the video; using {available}.", stacklevel=2
        )
        num_frames = available
    return middle_indices(total, num_frames)


def fps_indices(
    num_frames_total: int,
    video_fps: float,
    *,
    fps: float,
    min_frames: int = 0,
    max_frames: int = 0,
    local_num_frames: int = 1,
) -> np.ndarray:
    """Choose frames at a given rate, in whole clips, between a least and a largest number of frames.

    Args:
        num_frames_total: Number of frames of the source video.
        video_fps: Source frames per second.
        fps: Wanted frames per second of source time.
        min_frames: Least number of frames, 0 for none.
        max_frames: Largest number of frames, 0 for no limit.
        local_num_frames: Frames per clip; 1 for models without clips.

    Returns:
        (F,) int64 zero-based source frame indices at segment midpoints; F is a multiple of `local_num_frames`.

    Raises:
        ValueError: No frames, or a rate that is not positive.
    """
    total, rate = check_total(num_frames_total), check_rate(video_fps)
    if not math.isfinite(fps) or fps <= 0:
        raise ValueError(f"fps={fps}, expected a positive number of frames per second.")
    available = max(total // local_num_frames, 1) * local_num_frames
    wanted = int(total / rate * fps)
    if fps > rate:
        warnings.warn(
            f"fps={fps:g} is above the {rate:g} frames per second of the video; every frame is used once.",
            stacklevel=2,
        )
    if max_frames > 0:
        wanted = min(wanted, max_frames)
    wanted = min(max(wanted, min_frames), available)
    return middle_indices(total, max(wanted // local_num_frames, 1) * local_num_frames)


def stride_indices(
    num_frames_total: int, video_fps: float, *, fps: float = 1.0, round_rate: bool = False
) -> np.ndarray:
    """Choose every n-th frame from the first on, n being the whole number of frames nearest to the wanted distance.

    Args:
        num_frames_total: Number of frames of the source video.
        video_fps: Source frames per second.
        fps: Wanted frames per second of source time.
        round_rate: Whether the rate of the source is rounded to a whole number first.

    Returns:
        (F,) int64 zero-based source frame indices 0, n, 2 n, ...

    Raises:
        ValueError: No frames, or a rate that is not positive.

    Source: LongVU, `round(fps)` in the demo, `round(fps / video_fps)` in training, `round(round(fps) / 0.5)` in
    evaluation.
    """
    total, rate = check_total(num_frames_total), check_rate(video_fps)
    if not math.isfinite(fps) or fps <= 0:
        raise ValueError(f"fps={fps}, expected a positive number of frames per second.")
    step = round((round(rate) if round_rate else rate) / fps)
    return np.arange(0, total, max(step, 1), dtype=np.int64)


def thin_evenly(indices: np.ndarray, max_frames: int) -> np.ndarray:
    """Keep at most so many of some indices, evenly spread.

    Args:
        indices: (F,) ascending frame indices.
        max_frames: Largest number to keep, 0 for no limit.

    Returns:
        The indices at the places floor(k * F / max_frames), or all of them when there are not more.
    """
    if max_frames <= 0 or len(indices) <= max_frames:
        return indices
    return indices[np.arange(max_frames) * len(indices) // max_frames]


def spread_indices(first: int, last: int, num_frames: int) -> np.ndarray:
    """Choose so many frames evenly from the first to the last one, both included; a shorter range repeats frames.

    Args:
        first: Zero-based index of the first frame.
        last: Zero-based index of the last frame.
        num_frames: Number of indices to return.

    Returns:
        (num_frames,) int64 zero-based source frame indices first + round(i / (num_frames - 1) * (last - first)),
        halves rounded to even numbers; the first frame when only one is wanted.

    Raises:
        ValueError: The range runs backwards or below 0, or no frame is wanted.

    Source: LLaVA-ST `load_video`.
    """
    if not 0 <= first <= last:
        raise ValueError(f"Frames {first} to {last} are no range; expected 0 <= first <= last.")
    if num_frames < 1:
        raise ValueError(f"num_frames={num_frames}, expected at least 1.")
    steps = max(num_frames - 1, 1)
    return np.array([first + round(i / steps * (last - first)) for i in range(num_frames)], dtype=np.int64)


def clip_range(
    num_frames_total: int, video_fps: float, *, start: float | None, end: float | None
) -> tuple[int, int, float]:
    """Turn a time window into a range of frames of a video with a constant frame rate.

    Args:
        num_frames_total: Number of frames of the source video.
        video_fps: Source frames per second.
        start: Begin of the window in seconds, None for the begin of the video.
        end: End of the window in seconds, None for the end of the video; cut to 0.1 s before the end of the video.

    Returns:
        First frame index, number of frames (at least one), duration of the window in seconds.

    Raises:
        ValueError: The window is empty or begins outside the video.

    Source: VideoChat-Flash video reading with `clip=(start, end)`.
    """
    total, rate = check_total(num_frames_total), check_rate(video_fps)
    duration = total / rate
    check_window(duration, start=start, end=end)
    if start is None and end is None:
        return 0, total, duration
    begin = 0.0 if start is None else float(start)
    # A window of one frame or less keeps its frame: the original's margin would leave nothing.
    stop = duration if end is None else min(float(end), max(duration - 0.1, begin + 1 / rate))
    first = min(int(begin * rate), total - 1)
    count = max(min(int((stop - begin) * rate), total - first), 1)
    return first, count, stop - begin


def covering_range(
    num_frames_total: int, video_fps: float, *, start: float | None, end: float | None
) -> tuple[int, int, float]:
    """Turn a time window into the range of all frames that are shown in it, be it for a part of their time.

    Args:
        num_frames_total: Number of frames of the source video.
        video_fps: Source frames per second.
        start: Begin of the window in seconds, None for the begin of the video.
        end: End of the window in seconds, None for the end of the video; cut to the end of the video.

    Returns:
        First frame index floor(start * fps), number of frames up to ceil(end * fps) (at least one), duration of the
        window in seconds.

    Raises:
        ValueError: The window is empty or begins outside the video.

    Source: CrossVLLM Sec. 3.1, the segment between two times.
    Differs: The paper does not say how times between two frames are rounded.
    """
    total, rate = check_total(num_frames_total), check_rate(video_fps)
    duration = total / rate
    check_window(duration, start=start, end=end)
    begin = 0.0 if start is None else float(start)
    stop = duration if end is None else min(float(end), duration)
    # Products of decimal times and rates miss whole numbers by rounding.
    first = min(math.floor(begin * rate + BORDER), total - 1)
    count = max(min(math.ceil(stop * rate - BORDER), total) - first, 1)
    return first, count, stop - begin


def check_window(duration: float, *, start: float | None, end: float | None) -> None:
    """Check a time window against the duration of a video.

    Args:
        duration: Duration of the video in seconds.
        start: Begin of the window in seconds or None.
        end: End of the window in seconds or None.

    Raises:
        ValueError: `start` is negative, not before `end`, or not before the end of the video.
    """
    begin = 0.0 if start is None else float(start)
    if not math.isfinite(begin) or begin < 0:
        raise ValueError(f"start={start}, expected seconds from the begin of the video (0 or more).")
    if end is not None and not (math.isfinite(end) and end > begin):
        raise ValueError(f"The window from {begin:g} s to {end:g} s is empty; end must be above start.")
    if begin >= duration:
        raise ValueError(f"start={begin:g} s lies beyond the end of the video, which lasts {duration:.2f} s.")
    if end is not None and end > duration + 0.5:
        warnings.warn(
            f"end={end:g} s lies beyond the end of the video; using its duration, {duration:.2f} s.", stacklevel=3
        )
