"""Videos that are looked at several times: what is known of them, which frames a segment has, and their pixels."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from os import PathLike, fspath
from typing import Any

import numpy as np
import torch

from longvideo.processing.shared import video_io
from longvideo.processing.shared.video_inputs import channels_first, describe_array, flatten_videos, to_metadata
from longvideo.processing.shared.video_sources import downloaded, is_remote, local_path

READ_FRAMES = 32


@contextmanager
def local_copy(video: Any) -> Iterator[Any]:
    """Download an address once for all rounds; anything else stays where it is.

    Args:
        video: Any form of a video.

    Yields:
        What can be read again and again.
    """
    if is_remote(video):
        with downloaded(video) as path:
            yield fspath(path)
    else:
        yield video


def in_memory(video: Any) -> bool:
    """Say whether a video came as frames that are decoded already.

    Args:
        video: Any form of a video.

    Returns:
        False for paths, addresses, folders and lists of picture files.
    """
    is_list = isinstance(video, list | tuple) and all(isinstance(entry, str | PathLike) for entry in video)
    return not (isinstance(video, str | PathLike) or is_list)


def video_duration(video: Any, metadata: Any = None) -> float:
    """Find out how long a video is.

    Args:
        video: Path, address, folder of pictures, list of picture files, or decoded frames.
        metadata: `VideoMetadata` or a mapping with some of its fields, for decoded frames.

    Returns:
        Seconds.

    Raises:
        FileNotFoundError: No such file.
        ValueError: The source cannot be read as a video, or frames came without their rate or duration.
    """
    return SourceFrames(video, metadata).duration


class SourceFrames:
    """One video, described once.

    Args:
        video: Path, folder of pictures, list of picture files, or decoded frames.
        metadata: What is known of decoded frames: `fps`, or `duration`.

    Attributes:
        video: The video.
        key: Name of the video and its state, equal for equal sources.
        duration: Seconds.

    Raises:
        FileNotFoundError: No such file.
        ValueError: The source cannot be read as a video, or frames came without their rate or duration.
    """

    def __init__(self, video: Any, metadata: Any = None) -> None:
        self.video, self.frames_FCHW, self.info = video, None, None
        self.key = source_key(video, metadata)
        if in_memory(video):
            self.frames_FCHW = channels_first(flatten_videos([video])[0])
            known = None if metadata is None else to_metadata(metadata)
            if known is None or not (known.fps or known.duration):
                raise ValueError(
                    f"{len(self.frames_FCHW)} frames came without their rate, so that nothing can be said in seconds. "
                    "Give video_metadata={'fps': ...}, or pass a file."
                )
            facts = describe_array(self.frames_FCHW, known, times=None, duration=None)
            self.duration = float(facts.duration)
            self.rate = len(self.frames_FCHW) / self.duration
            return
        if is_remote(video):
            facts = video_io.describe_video(video)
            self.duration = float(facts.duration)
            return
        pictures = video_io.frame_pictures(video)
        if pictures is None:
            self.info = video_io.file_info(video, None)
        else:
            self.info = video_io.pictures_info(pictures, video_io.picture_rate(pictures, None))
        self.duration = float(self.info.duration)

    def choose(self, processor: Any, segment: tuple[float, float] | None, **call: Any) -> list[int]:
        """Say which frames a video processor would take, without decoding any.

        Args:
            processor: Video processor with `sampling_rule`, `choose_frames` and `cut_range`.
            segment: (start, end) in seconds; None for the whole video.
            **call: Wishes of the call.

        Returns:
            Zero-based indices in the source, ascending.
        """
        start, end = cut_of(segment, self.duration)
        if self.info is not None:
            cut_range = processor.cut_range
            metadata, first = video_io.cut_metadata(self.info, start=start, end=end, cut_range=cut_range)
        else:
            count = len(self.frames_FCHW)
            first, count, length = processor.cut_range(count, self.rate, start=start, end=end)
            metadata = video_io.SourceVideoMetadata(total_num_frames=count, fps=self.rate, duration=length)
        chosen = processor.choose_frames(metadata, processor.sampling_rule({}, call))
        return (np.asarray(chosen) + first).tolist()

    def read(self, processor: Any, indices: Sequence[int]) -> torch.Tensor:
        """Read frames and bring them to the form that the model takes.

        Args:
            processor: Video processor with `read_file`.
            indices: Zero-based indices in the source, ascending.

        Returns:
            (F, C, S, S) pixels.
        """
        return torch.cat(list(self.read_parts(processor, indices)))

    def read_parts(self, processor: Any, indices: Sequence[int]) -> Iterator[torch.Tensor]:
        """Read frames and bring them to the form that the model takes, a part of them at a time.

        Args:
            processor: Video processor with `read_file`.
            indices: Zero-based indices in the source, ascending.

        Yields:
            (F, C, S, S) pixels of the next frames, at most `READ_FRAMES`: as numbers they take four times the room.
                The file is opened once.
        """
        if not len(indices):
            return
        if self.frames_FCHW is None:
            frames, _ = processor.read_file(self.video, lambda _: np.asarray(indices), options={}, call={})
        else:
            frames = self.frames_FCHW[torch.as_tensor(indices)]
        for part in frames.split(READ_FRAMES):
            # The rate is of no use to single frames; without one there would be a warning.
            facts = {"fps": 1.0, "total_num_frames": len(part)}
            read = processor(part, do_sample_frames=False, video_metadata=[facts], return_tensors="pt")
            yield read["pixel_values_videos"][0]


def source_key(video: Any, metadata: Any = None) -> str:
    """Name a video as it is now.

    Args:
        video: Any form of a video.
        metadata: What is known of decoded frames.

    Returns:
        Its path with the state of its files, which changes when they are written again, or its address; for frames in
        memory a name that holds while the object lives, with their rate and duration.
    """
    if in_memory(video):
        known = None if metadata is None else to_metadata(metadata)
        return f"memory:{id(video)}:{known and known.fps}:{known and known.duration}"
    if is_remote(video):
        return fspath(video)
    entries = [video] if isinstance(video, str | PathLike) else video
    return "\n".join(f"{fspath(entry)}:{file_state(entry)}" for entry in entries)


def file_state(source: str | PathLike) -> str:
    """Say in which state a file is, without reading it.

    Args:
        source: File or folder, or its file:// address.

    Returns:
        Bytes and time of the last change; of a folder those of what is in it too. Empty where there is nothing.
    """
    try:
        path = local_path(source)
        facts = path.stat()
        inside = sorted(path.iterdir()) if path.is_dir() else []
    except OSError:
        return ""
    own = f"{facts.st_size}:{facts.st_mtime_ns}"
    return "|".join([own, *(f"{entry.name}:{file_state(entry)}" for entry in inside if entry.is_file())])


def cut_of(segment: tuple[float, float] | None, duration: float) -> tuple[float | None, float | None]:
    """Turn a segment into a cut; a border at an end of the video cuts nothing.

    Args:
        segment: (start, end) in seconds or None.
        duration: Seconds of the video.

    Returns:
        Begin and end of the cut in seconds, None where there is none.
    """
    if segment is None:
        return None, None
    start, end = segment
    return (start if start > 0 else None), (end if end < duration else None)
