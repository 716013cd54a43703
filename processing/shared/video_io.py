"""Reads only the frames that are wanted from a video, with their true presentation times.

Works on files, addresses, folders and lists of frame pictures; `video_probe` finds times and keyframes,
`video_decoding` decodes what is wanted.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from transformers.video_utils import VideoMetadata

from longvideo.processing.shared.frame_sampling import CutRange, check_rate, check_window, clip_range
from longvideo.processing.shared.video_decoding import decode_each, decode_wanted
from longvideo.processing.shared.video_probe import VideoInfo, probe_video
from longvideo.processing.shared.video_sources import (
    VideoSource,
    downloaded,
    is_remote,
    list_pictures,
    local_path,
    read_picture,
    resize_rgb,
)

__all__ = ["SourceVideoMetadata", "VideoInfo", "describe_video", "opened_video", "probe_video", "read_video"]

BACKENDS = ("auto", "pyav", "torchcodec")
SampleIndices = Callable[[VideoMetadata], Sequence[int] | np.ndarray]


@dataclass
class SourceVideoMetadata(VideoMetadata):
    """`VideoMetadata` of a (cut) video that also carries exact times and the uncut source.

    As a mapping it shows the fields of `VideoMetadata` only, so that it can be passed on wherever one is expected.
    `total_num_frames` and `duration` (seconds) describe the cut video, `frames_indices` count in the uncut source.

    Attributes:
        frame_times: Seconds from the first frame of the uncut source, one per kept frame.
        source_num_frames: Number of frames of the uncut source.
        source_duration: Seconds of the uncut source.
        start: Begin of the cut in seconds, None when not cut.
        end: End of the cut in seconds, None when not cut.
        is_variable_frame_rate: Whether the distances between source frames differ by more than rounding.
        last_frame_time: Seconds of the last frame of the cut, None for what did not come from a file.
    """

    frame_times: list[float] | None = None
    source_num_frames: int | None = None
    source_duration: float | None = None
    start: float | None = None
    end: float | None = None
    is_variable_frame_rate: bool = False
    last_frame_time: float | None = None

    def __iter__(self) -> Iterator[str]:
        return (entry.name for entry in fields(VideoMetadata))

    def __len__(self) -> int:
        return len(fields(VideoMetadata))

    @property
    def timestamps(self) -> list[float]:
        """Seconds of the kept frames, from the stream where it has them."""
        return list(self.frame_times) if self.frame_times is not None else super().timestamps


def read_video(
    source: VideoSource,
    *,
    sample_indices_fn: SampleIndices,
    size: tuple[int, int] | None = None,
    start: float | None = None,
    end: float | None = None,
    backend: str = "auto",
    num_threads: int = 0,
    progress: bool | None = None,
    fps: float | None = None,
    cut_range: CutRange = clip_range,
) -> tuple[np.ndarray, SourceVideoMetadata]:
    """Read the wanted frames of a video.

    Args:
        source: Path, file:// or http(s) address of a video or gif, folder of frame pictures, or list of pictures.
        sample_indices_fn: Maps the metadata of the (cut) video to zero-based frame indices in it; they may repeat.
        size: (height, width) in pixels that each kept frame is resized to at once (PIL bicubic), None to keep.
        start: Begin of the cut in seconds.
        end: End of the cut in seconds.
        backend: "pyav", "torchcodec", or "auto": torchcodec where it can be imported, otherwise PyAV.
        num_threads: Decoder threads, 0 for as many as there are cores.
        progress: Whether to show a progress bar; None shows one for long videos on a terminal.
        fps: Frames per second of pictures and gifs, which state none (default 1); not for video files.
        cut_range: Which frames lie between `start` and `end` where the rate is constant.

    Returns:
        (F, height, width, 3) uint8 RGB frames in the order of the indices, and their metadata with
        `frames_indices` (in the uncut source), `fps`, `duration` (seconds), and `frame_times` (seconds).

    Raises:
        FileNotFoundError: No such file.
        OSError: A download failed.
        ValueError: The source cannot be read as a video, or the window or an index is outside of it.
        ImportError: torchcodec was asked for and cannot be imported.
    """
    if backend not in BACKENDS:
        raise ValueError(f"Unknown video backend {backend!r}, expected one of {', '.join(BACKENDS)}.")
    if size is not None and (len(size) != 2 or min(size) < 1):
        raise ValueError(f"size={size}, expected (height, width) in pixels.")
    if is_remote(source):
        with downloaded(source) as file:
            return read_video(
                file,
                sample_indices_fn=sample_indices_fn,
                size=size,
                start=start,
                end=end,
                backend=backend,
                num_threads=num_threads,
                progress=progress,
                fps=fps,
                cut_range=cut_range,
            )
    pictures = frame_pictures(source)
    if pictures is not None:
        cut = {"start": start, "end": end, "fps": picture_rate(pictures, fps), "cut_range": cut_range}
        return read_pictures(pictures, sample_indices_fn=sample_indices_fn, size=size, **cut)
    info = file_info(source, fps)
    metadata, first = cut_metadata(info, start=start, end=end, cut_range=cut_range)
    wanted = checked_indices(sample_indices_fn(metadata), metadata.total_num_frames) + first
    unique, inverse = np.unique(wanted, return_inverse=True)
    frames, used = decode_wanted(info, unique, size=size, backend=backend, num_threads=num_threads, progress=progress)
    metadata.video_backend = used
    metadata.frames_indices = wanted.tolist()
    metadata.frame_times = info.frame_times[wanted].tolist()
    if len(unique) != len(wanted) or np.any(inverse != np.arange(len(wanted))):
        frames = frames[inverse]
    return frames, metadata


@contextlib.contextmanager
def opened_video(
    source: VideoSource,
    *,
    sample_indices_fn: SampleIndices,
    start: float | None = None,
    end: float | None = None,
    backend: str = "auto",
    num_threads: int = 0,
    progress: bool | None = None,
    fps: float | None = None,
    cut_range: CutRange = clip_range,
) -> Iterator[tuple[SourceVideoMetadata, Iterator[np.ndarray]]]:
    """Open a video whose wanted frames are given one after another, at the size of the source.

    Args:
        source: As in `read_video`.
        sample_indices_fn: As in `read_video`; the indices must ascend, repeated ones are allowed.
        start: As in `read_video`.
        end: As in `read_video`.
        backend: As in `read_video`.
        num_threads: As in `read_video`.
        progress: As in `read_video`.
        fps: As in `read_video`.
        cut_range: As in `read_video`.

    Yields:
        The metadata that `read_video` gives, and an iterator over the (H, W, 3) uint8 RGB frames, decoded on the way.

    Raises:
        FileNotFoundError: No such file.
        OSError: A download failed.
        ValueError: As in `read_video`, or indices that run backwards.
        ImportError: torchcodec was asked for and cannot be imported.
    """
    if backend not in BACKENDS:
        raise ValueError(f"Unknown video backend {backend!r}, expected one of {', '.join(BACKENDS)}.")
    with contextlib.ExitStack() as stack:
        local = stack.enter_context(downloaded(source)) if is_remote(source) else source
        pictures = frame_pictures(local)
        info = file_info(local, fps) if pictures is None else pictures_info(pictures, picture_rate(pictures, fps))
        metadata, first = cut_metadata(info, start=start, end=end, cut_range=cut_range)
        wanted = checked_indices(sample_indices_fn(metadata), metadata.total_num_frames) + first
        if np.any(np.diff(wanted) < 0):
            raise ValueError(f"Frames are given in the order of the video, but the indices {wanted} run backwards.")
        metadata.frames_indices = wanted.tolist()
        metadata.frame_times = info.frame_times[wanted].tolist()
        unique, counts = np.unique(wanted, return_counts=True)
        if pictures is None:
            decoded, metadata.video_backend = decode_each(
                info, unique, backend=backend, num_threads=num_threads, progress=progress
            )
            stack.callback(decoded.close)
            size = (info.height, info.width)
            # A stream may change its size on the way; all frames get the size of the first.
            frames = (resize_rgb(frame, size) for _, frame in decoded)
        else:
            metadata.video_backend = "pictures"
            frames = same_size(read_picture(pictures[index], None) for index in unique)
        yield metadata, (frame for frame, count in zip(frames, counts, strict=True) for _ in range(count))


def same_size(frames: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Pass frames on that all have one size.

    Args:
        frames: (H, W, 3) frames.

    Yields:
        The same frames.

    Raises:
        ValueError: A frame has another size than the first.
    """
    shape = None
    for frame in frames:
        shape = shape or frame.shape[:2]
        if frame.shape[:2] != shape:
            raise ValueError(
                f"The frame pictures differ in size (height, width): {shape} and {frame.shape[:2]}. Bring them to one "
                "size first."
            )
        yield frame


def frame_pictures(source: VideoSource) -> list[Path] | None:
    """Return the pictures that stand for frames, or None when the source is a video file.

    Args:
        source: Local path, folder or list of paths.

    Returns:
        Picture paths or None.

    Raises:
        FileNotFoundError: Nothing is there.
        ValueError: An empty list or a folder without pictures.
        TypeError: The source is neither a path nor a list of paths.
    """
    if isinstance(source, (str, Path)) or hasattr(source, "__fspath__"):
        path = local_path(source)
        return list_pictures(path) if path.is_dir() else None
    if not isinstance(source, (list, tuple)) or not all(isinstance(x, (str, Path)) for x in source):
        raise TypeError(
            "A video must be a path, an address, a folder or a list of picture paths, but got "
            f"{type(source).__name__}."
        )
    if not source:
        raise ValueError("The list of frame pictures is empty; at least one picture is needed.")
    return [Path(entry) for entry in source]


def read_pictures(
    pictures: list[Path],
    *,
    sample_indices_fn: SampleIndices,
    size: tuple[int, int] | None,
    start: float | None,
    end: float | None,
    fps: float,
    cut_range: CutRange = clip_range,
) -> tuple[np.ndarray, SourceVideoMetadata]:
    """Read the wanted ones of the pictures that stand for frames.

    Args:
        pictures: Picture paths in order of time.
        sample_indices_fn: As in `read_video`.
        size: As in `read_video`; needed when the pictures differ in size.
        start: As in `read_video`.
        end: As in `read_video`.
        fps: Frames per second of source time.
        cut_range: As in `read_video`.

    Returns:
        As `read_video`.

    Raises:
        ValueError: Pictures of different sizes without `size`, or wrong indices.
    """
    info = pictures_info(pictures, fps)
    metadata, first = cut_metadata(info, start=start, end=end, cut_range=cut_range)
    wanted = checked_indices(sample_indices_fn(metadata), metadata.total_num_frames) + first
    unique, inverse = np.unique(wanted, return_inverse=True)
    kept = [read_picture(pictures[index], size) for index in unique]
    shapes = {frame.shape[:2] for frame in kept}
    if len(shapes) > 1:
        raise ValueError(f"The frame pictures differ in size (height, width): {sorted(shapes)}. Pass size=.")
    metadata.video_backend = "pictures"
    metadata.frames_indices = wanted.tolist()
    metadata.frame_times = info.frame_times[wanted].tolist()
    return np.stack(kept)[inverse], metadata


def pictures_info(pictures: list[Path], fps: float) -> VideoInfo:
    """Describe pictures that stand for frames as a video.

    Args:
        pictures: Picture paths in order of time; the first is read.
        fps: Frames per second of source time.

    Returns:
        The facts of the video.

    Raises:
        ValueError: The rate is not positive.
    """
    rate = check_rate(fps)
    opening = read_picture(pictures[0], None)
    count = len(pictures)
    return VideoInfo(
        path=str(pictures[0].parent),
        num_frames=count,
        fps=rate,
        duration=count / rate,
        width=opening.shape[1],
        height=opening.shape[0],
        rotation=0,
        codec="pictures",
        pix_fmt="rgb24",
        is_variable_frame_rate=False,
        pts=None,
        time_base=1.0,
        keyframes=np.arange(count),
    )


def describe_video(
    source: VideoSource, *, start: float | None = None, end: float | None = None, fps: float | None = None
) -> SourceVideoMetadata:
    """Describe a video as `read_video` would, without decoding it.

    Args:
        source: As in `read_video`.
        start: As in `read_video`.
        end: As in `read_video`.
        fps: As in `read_video`.

    Returns:
        Metadata without frame indices; where the frame rate varies, with the times of all frames.

    Raises:
        FileNotFoundError: No such file.
        OSError: A download failed.
        ValueError: The source cannot be read as a video, or the window is outside of it.
    """
    if is_remote(source):
        with downloaded(source) as file:
            return describe_video(file, start=start, end=end, fps=fps)
    pictures = frame_pictures(source)
    info = file_info(source, fps) if pictures is None else pictures_info(pictures, picture_rate(pictures, fps))
    metadata, first = cut_metadata(info, start=start, end=end)
    if info.is_variable_frame_rate:
        metadata.frame_times = info.frame_times[first : first + metadata.total_num_frames].tolist()
    return metadata


def picture_rate(pictures: list[Path], fps: float | None) -> float:
    """Settle the rate of pictures that stand for frames.

    Args:
        pictures: Picture paths.
        fps: The caller's wish or None.

    Returns:
        Frames per second: the wish, otherwise 1, or 3 for the TVQA frames that benchmarks ship as pictures.

    Source: VideoChat-Flash frame folders.
    """
    if fps is not None:
        return fps
    return 3.0 if "tvqa" in str(pictures[0]) else 1.0


def file_info(source: str | Path, fps: float | None) -> VideoInfo:
    """Probe a video file and settle its rate.

    Args:
        source: Local file.
        fps: The caller's wish for a gif, or None.

    Returns:
        The facts of the video.

    Raises:
        ValueError: A rate was given for a file that states its own times.
    """
    info = probe_video(source)
    if fps is not None:
        if not info.path.lower().endswith(".gif"):
            raise ValueError(f"fps={fps} was given for {info.path}, which states its own times; leave fps out.")
        info.fps, info.duration = check_rate(fps), info.num_frames / check_rate(fps)
    return info


def cut_metadata(
    info: VideoInfo, *, start: float | None, end: float | None, cut_range: CutRange = clip_range
) -> tuple[SourceVideoMetadata, int]:
    """Describe the part of a video between two times.

    Args:
        info: Facts of the uncut video.
        start: Begin in seconds or None.
        end: End in seconds or None.
        cut_range: Which frames lie between both where the rate is constant.

    Returns:
        Metadata of the part, and the index of its first frame in the source.

    Raises:
        ValueError: The window is empty or outside of the video.
    """
    if info.is_variable_frame_rate and not (start is None and end is None):
        check_window(info.duration, start=start, end=end)
        begin = 0.0 if start is None else float(start)
        stop = info.duration if end is None else min(float(end), info.duration)
        # The frame on the screen at `begin` is the last one shown at or before it.
        first = int(np.searchsorted(info.frame_times, begin + 1e-6, side="right")) - 1
        count = max(int(np.searchsorted(info.frame_times, stop - 1e-6)) - first, 1)
        duration = stop - begin
    else:
        first, count, duration = cut_range(info.num_frames, info.fps, start=start, end=end)
    metadata = SourceVideoMetadata(
        total_num_frames=count,
        fps=info.fps,
        width=info.width,
        height=info.height,
        duration=duration,
        source_num_frames=info.num_frames,
        source_duration=info.duration,
        start=start,
        end=end,
        is_variable_frame_rate=info.is_variable_frame_rate,
        last_frame_time=float(info.frame_times[first + count - 1]),
    )
    return metadata, first


def checked_indices(indices: Sequence[int] | np.ndarray, total: int) -> np.ndarray:
    """Check what a sampler returned.

    Args:
        indices: Zero-based frame indices in any order.
        total: Number of frames they may point to.

    Returns:
        The same as a one-dimensional int64 array.

    Raises:
        ValueError: No index, or one outside of the video.
    """
    array = np.asarray(indices)
    if array.ndim != 1 or array.size == 0 or not np.all(array == np.floor(array)):
        raise ValueError(f"Frame indices must be a non-empty list of whole numbers, got shape {array.shape}.")
    array = array.astype(np.int64)
    if array.min() < 0 or array.max() >= total:
        wrong = array[(array < 0) | (array >= total)][0]
        raise ValueError(
            f"Frame index {wrong} is outside of the video, which has the {total} frames 0 to {total - 1}."
        )
    return array
