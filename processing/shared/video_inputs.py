"""Videos that come as arrays, frames or nested lists, and what is known about them."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from os import PathLike, fspath
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.image_utils import ChannelDimension, infer_channel_dimension_format
from transformers.utils import logging
from transformers.video_utils import VideoMetadata

from longvideo.processing.shared.frame_sampling import check_rate
from longvideo.processing.shared.timestamps import duration_of_times
from longvideo.processing.shared.video_io import SourceVideoMetadata
from longvideo.processing.shared.video_sources import PICTURE_SUFFIXES

logger = logging.get_logger(__name__)


def flatten_videos(videos: Any, depth: int = 0) -> list[Any]:
    """List the videos of a call one by one, whatever their nesting.

    Args:
        videos: One video, a list, or a list of lists.
        depth: Number of lists around.

    Returns:
        Paths, lists of picture paths, and (F, ...) arrays or tensors; a list of frames becomes one array.

    Raises:
        ValueError: Something that is not a video.
    """
    if isinstance(videos, str | PathLike):
        return [fspath(videos)]
    if isinstance(videos, Image.Image):
        return [stack_frames([videos])]
    if isinstance(videos, np.ndarray | torch.Tensor):
        if videos.ndim not in (3, 4, 5):
            raise ValueError(
                f"A video must have 4 dimensions (frames, height, width, channels), got shape {tuple(videos.shape)}."
            )
        return list(videos) if videos.ndim == 5 else [videos if videos.ndim == 4 else videos[None]]
    if not isinstance(videos, list | tuple):
        raise ValueError(
            f"Expected a video as path, address, array, tensor or list of frames, got {type(videos).__name__}."
        )
    if videos and all(is_frame(entry) for entry in videos):
        return [stack_frames(videos)]
    if videos and depth >= 1 and all(isinstance(entry, str | PathLike) for entry in videos):
        paths = [fspath(entry) for entry in videos]
        # By the conventions of chat messages two lists are batch and sample; only a third one holds frames.
        if depth >= 2 or all(any(path.lower().endswith(end) for end in PICTURE_SUFFIXES) for path in paths):
            return [paths]
        return paths
    return [video for entry in videos for video in flatten_videos(entry, depth + 1)]


def is_frame(value: Any) -> bool:
    """Say whether a value is one frame.

    Args:
        value: Anything.

    Returns:
        True for PIL pictures and arrays or tensors with three dimensions.
    """
    return isinstance(value, Image.Image) or (isinstance(value, np.ndarray | torch.Tensor) and value.ndim == 3)


def stack_frames(frames: Sequence[Any]) -> np.ndarray | torch.Tensor:
    """Join frames into one array.

    Args:
        frames: PIL pictures (of any mode), arrays or tensors, of one size.

    Returns:
        (F, ...) array or tensor.

    Raises:
        ValueError: The frames differ in size or number of channels.
    """
    if isinstance(frames[0], Image.Image):
        frames = [np.asarray(frame.convert("RGB")) for frame in frames]
    shapes = sorted({tuple(frame.shape) for frame in frames})
    if len(shapes) > 1:
        raise ValueError(f"All frames of a video must have one size, got {shapes}; resize them to one size first.")
    return torch.stack(list(frames)) if isinstance(frames[0], torch.Tensor) else np.stack(frames)


def channels_first(video: np.ndarray | torch.Tensor, data_format: Any = None) -> torch.Tensor:
    """Bring an array of frames into the form (F, C, H, W).

    Args:
        video: (F, H, W, C) or (F, C, H, W) array or tensor.
        data_format: "channels_first" or "channels_last"; guessed when None.

    Returns:
        (F, C, H, W) tensor.

    Raises:
        ValueError: There are no frames.
    """
    if len(video) == 0:
        raise ValueError(f"The video has no frames (shape {tuple(video.shape)}); at least one frame is needed.")
    # A copy where torch would warn about arrays that must not be written to.
    frames = video if isinstance(video, torch.Tensor) else torch.from_numpy(np.require(video, requirements=["C", "W"]))
    if data_format is None:
        data_format = infer_channel_dimension_format(frames, num_channels=(1, 3, 4))
    if ChannelDimension(data_format) == ChannelDimension.LAST:
        frames = frames.permute(0, 3, 1, 2)
    return frames


def to_metadata(value: Any) -> VideoMetadata:
    """Read what a caller knows about a video.

    Args:
        value: `VideoMetadata` or a mapping with some of its fields.

    Returns:
        The metadata.

    Raises:
        ValueError: A field is unknown.
    """
    if isinstance(value, VideoMetadata):
        return value
    known = {entry.name for entry in fields(VideoMetadata)}
    if not isinstance(value, Mapping) or set(value) - known:
        raise ValueError(f"Video metadata must be a mapping with some of {sorted(known)}, got {value!r}.")
    return VideoMetadata(**{"total_num_frames": None, **value})


def flatten_metadata(metadata: Any, count: int) -> list[VideoMetadata | None]:
    """List the metadata of the videos of a call one by one.

    Args:
        metadata: None, one mapping or `VideoMetadata`, or nested lists of them.
        count: Number of videos.

    Returns:
        One entry per video, None where nothing is known.

    Raises:
        ValueError: The numbers differ.
    """
    if metadata is None:
        return [None] * count

    def walk(value: Any) -> list[VideoMetadata | None]:
        if isinstance(value, list | tuple):
            return [entry for part in value for entry in walk(part)]
        return [None if value is None else to_metadata(value)]

    entries = walk(metadata)
    if len(entries) != count:
        raise ValueError(f"video_metadata has {len(entries)} entries for {count} videos; give one per video.")
    return entries


def describe_array(
    frames_FCHW: torch.Tensor, metadata: VideoMetadata | None, *, times: Sequence[float] | None, duration: float | None
) -> SourceVideoMetadata:
    """Fill in what is known about frames that came without a file.

    Args:
        frames_FCHW: The frames.
        metadata: What the caller knows, or None.
        times: Seconds of each frame, or None.
        duration: Seconds of the source, or None.

    Returns:
        Metadata with a duration; frames without rate count as one per second.
    """
    count, _, height, width = frames_FCHW.shape
    known = dict(metadata) if metadata is not None else {}
    facts = SourceVideoMetadata(
        total_num_frames=known.get("total_num_frames") or count,
        fps=known.get("fps"),
        width=known.get("width") or width,
        height=known.get("height") or height,
        duration=duration if duration is not None else known.get("duration"),
        video_backend=known.get("video_backend"),
        frames_indices=known.get("frames_indices") if known.get("frames_indices") is not None else list(range(count)),
        frame_times=[float(time) for time in times] if times is not None else getattr(metadata, "frame_times", None),
    )
    if len(facts.frames_indices) != count:
        raise ValueError(
            f"frames_indices of the video metadata has {len(facts.frames_indices)} entries for {count} frames."
        )
    if facts.fps is not None:
        check_rate(facts.fps)
    if facts.duration is None and facts.frame_times is not None:
        facts.duration = duration_of_times(facts.frame_times)
    if facts.duration is None:
        if facts.fps is None:
            logger.warning_once(
                "Frames without a known rate are taken as one per second. Pass video_metadata=[{'fps': ...}] or the "
                "timestamps of the frames, so that the model is told the true duration."
            )
            facts.fps = 1.0
        facts.duration = facts.total_num_frames / facts.fps
    return facts


def complete_clip(
    frames_FCHW: torch.Tensor, facts: SourceVideoMetadata, local_num_frames: int
) -> tuple[torch.Tensor, SourceVideoMetadata]:
    """Repeat the last frame until the clips are whole.

    Args:
        frames_FCHW: Frames.
        facts: Their metadata.
        local_num_frames: Frames per clip.

    Returns:
        Frames and metadata of a multiple of `local_num_frames` frames.
    """
    missing = -len(frames_FCHW) % local_num_frames
    if not missing:
        return frames_FCHW, facts
    logger.warning_once(
        f"{len(frames_FCHW)} frames are not a multiple of the {local_num_frames} frames of a clip; the last one is "
        f"repeated {missing} times."
    )
    last = frames_FCHW[-1:].expand(missing, -1, -1, -1)
    facts.frames_indices = [*facts.frames_indices, *[facts.frames_indices[-1]] * missing]
    if facts.frame_times is not None:
        facts.frame_times = [*facts.frame_times, *[facts.frame_times[-1]] * missing]
    return torch.cat([frames_FCHW, last]), facts
