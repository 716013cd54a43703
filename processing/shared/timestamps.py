"""Sentences and durations that tell a language model how its frames lie in time."""

from collections.abc import Sequence
from itertools import pairwise

TIME_MESSAGE = "The video lasts for {duration:.2f} seconds, and {num_frames} frames are uniformly sampled from it."
TIME_MESSAGE_WITH_TIMES = (
    "The video lasts for {duration:.2f} seconds, and {num_frames} frames are uniformly sampled at {times} seconds."
)


def format_time_message(
    template: str, *, duration: float, num_frames: int, times: Sequence[float] | None = None
) -> str:
    """Fill the sentence about duration and number of frames.

    Args:
        template: Format string with any of `{duration}`, `{num_frames}` and `{times}`.
        duration: Length of the source clip in seconds.
        num_frames: Number of frames that the model receives, repeated frames included.
        times: Presentation time of each frame in seconds; written with one decimal.

    Returns:
        The sentence; the empty string for an empty template.

    Raises:
        ValueError: The template has another field, or asks for times that are not known.

    Source: VideoChat-Flash inference code, `time_msg` "short" and the longer variant.
    """
    if "{times" in template and times is None:
        raise ValueError(
            f"The time message {template!r} lists frame times, but the times of the frames are not known."
        )
    written = ", ".join(f"{time:.1f}" for time in times) if times is not None else ""
    try:
        return template.format(duration=duration, num_frames=num_frames, times=written)
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError(
            f"The time message {template!r} cannot be filled in ({error!r}); "
            "the fields are {duration} (seconds), {num_frames} and {times}."
        ) from error


def duration_of_times(times: Sequence[float]) -> float:
    """Estimate the length of a clip of which only the times of some evenly spread frames are known.

    Args:
        times: (F,) presentation times in seconds, ascending.

    Returns:
        Seconds from the first frame to the end of the last frame's interval; 0 for a single frame.

    Raises:
        ValueError: No times, or times that run backwards.
    """
    if len(times) == 0:
        raise ValueError("Expected the time of at least one frame in seconds, got an empty list.")
    if any(later < earlier for earlier, later in pairwise(times)):
        raise ValueError(f"Frame times must not run backwards, got {list(times)}.")
    if len(times) == 1:
        return 0.0
    # F frames at the centres of equal intervals cover one interval more than the span between first and last.
    return float(times[-1] - times[0]) * len(times) / (len(times) - 1)
