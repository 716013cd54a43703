"""Decodes chosen frames of a video in one forward pass, jumping to keyframes where that skips work.

Kept frames are turned into RGB one by one and resized at once, so that memory holds the result and a handful of
frames in flight, whatever the length of the video.
"""

import contextlib
import functools
import importlib
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np

from longvideo.processing.shared.video_probe import VideoInfo, decode_frames, open_video
from longvideo.processing.shared.video_sources import resize_rgb

# Fewer skipped frames than this are cheaper to decode than a jump, which empties the decoder's threads.
MIN_JUMP_FRAMES = 32
# A progress bar appears by itself when at least this many source frames are passed over.
LONG_VIDEO_FRAMES = 3000
# Keyframes to step back when jumps land too late, before the file is decoded from its begin.
MAX_STEPS_BACK = 2
# Codecs whose decoder may leave out frames that no other frame refers to, without changing the rest.
CODECS_WITH_SPARE_FRAMES = frozenset({"h264", "mpeg4"})
TORCHCODEC_BATCH = 16


def decode_wanted(
    info: VideoInfo,
    wanted: np.ndarray,
    *,
    size: tuple[int, int] | None,
    backend: str,
    num_threads: int,
    progress: bool | None,
) -> tuple[np.ndarray, str]:
    """Decode distinct frames with the chosen backend.

    Args:
        info: Facts of the video.
        wanted: (F,) int64 ascending distinct frame indices in the source.
        size: (height, width) to resize to or None.
        backend: "auto", "pyav" or "torchcodec".
        num_threads: Decoder threads, 0 for as many as there are cores.
        progress: As in `read_video`.

    Returns:
        (F, height, width, 3) uint8 RGB, and the name of the backend that was used.

    Raises:
        ImportError: torchcodec was asked for and cannot be imported.
        ValueError: Nothing can be decoded.
    """
    height, width = size if size is not None else (info.height, info.width)
    frames = np.empty((len(wanted), height, width, 3), dtype=np.uint8)
    decoded, used = decode_each(info, wanted, backend=backend, num_threads=num_threads, progress=progress)
    for place, frame in decoded:
        # Resized one by one and at once: a second thread for this gave unequal frames.
        frames[place] = resize_rgb(frame, (height, width))
    return frames, used


def decode_each(
    info: VideoInfo, wanted: np.ndarray, *, backend: str, num_threads: int, progress: bool | None
) -> tuple[Iterator[tuple[int, np.ndarray]], str]:
    """Decode distinct frames one after another, so that the caller decides how many of them are held.

    Args:
        info: Facts of the video.
        wanted: (F,) int64 ascending distinct frame indices in the source.
        backend: "auto", "pyav" or "torchcodec".
        num_threads: Decoder threads, 0 for as many as there are cores.
        progress: As in `read_video`.

    Returns:
        Iterator over (place in `wanted`, (H, W, 3) uint8 RGB) in ascending order, and the name of the backend. The
        file stays open until the iterator ends or is closed.

    Raises:
        ImportError: torchcodec was asked for and cannot be imported.
        ValueError: Nothing can be decoded (while iterating).
    """
    if backend != "pyav":
        decoder = open_torchcodec(info, num_threads=num_threads, required=backend == "torchcodec")
        if decoder is not None:
            return frames_from_torchcodec(decoder, wanted), "torchcodec"
    span = int(wanted[-1] - wanted[0]) + 1
    shown = progress if progress is not None else span >= LONG_VIDEO_FRAMES and sys.stderr.isatty()
    return frames_from_pyav(info, wanted, num_threads=num_threads, shown=shown), "pyav"


@contextlib.contextmanager
def progress_bar(total: int, *, shown: bool) -> Iterator:
    """Show how many of the wanted frames have been read.

    Args:
        total: Number of wanted frames.
        shown: Whether to show anything.

    Yields:
        Object with `update(count)`.
    """
    from tqdm.auto import tqdm

    with tqdm(total=total, desc="Reading frames", unit="frame", disable=not shown, file=sys.stderr) as bar:
        yield bar


def frames_from_pyav(
    info: VideoInfo, wanted: np.ndarray, *, num_threads: int, shown: bool
) -> Iterator[tuple[int, np.ndarray]]:
    """Decode distinct frames with PyAV.

    Args:
        info: Facts of the video.
        wanted: (F,) int64 ascending distinct frame indices in the source.
        num_threads: Decoder threads, 0 for as many as there are cores.
        shown: Whether to show a progress bar.

    Yields:
        Place in `wanted` and (H, W, 3) uint8 RGB, H and W those of `info` after rotation.

    Raises:
        ValueError: Nothing can be decoded.
    """
    quarter_turns = info.rotation // 90
    done, may_skip = 0, info.pts is not None
    with progress_bar(len(wanted), shown=shown) as bar:
        while done < len(wanted):
            with open_video(Path(info.path), num_threads=num_threads) as (container, stream):
                for place, frame in walk(container, stream, info, wanted, done, may_skip=may_skip):
                    rgb = frame.to_ndarray(format="rgb24")
                    if quarter_turns:
                        rgb = np.ascontiguousarray(np.rot90(rgb, quarter_turns))
                    yield place, rgb
                    done = place + 1
                    bar.update(1)
            # Ends early only where skipping went wrong; the second attempt decodes every frame from the begin.
            may_skip = False


def walk(
    container: "av.container.InputContainer",
    stream: "av.video.stream.VideoStream",
    info: VideoInfo,
    wanted: np.ndarray,
    done: int,
    *,
    may_skip: bool,
) -> Iterator[tuple[int, "av.VideoFrame"]]:
    """Go through an open video once and give the wanted frames.

    Args:
        container: Freshly opened container.
        stream: Its video stream.
        info: Facts of the video.
        wanted: (F,) int64 ascending distinct frame indices in the source.
        done: Number of wanted frames that were given already.
        may_skip: Whether to jump to keyframes and to leave out frames that no other frame needs.

    Yields:
        Place in `wanted` and decoded frame; ends before the last place only when skipping lost a wanted frame.

    Raises:
        ValueError: Nothing can be decoded.
    """
    targets = wanted if info.pts is None else info.pts[wanted]
    needed = frozenset(targets[done:].tolist()) if may_skip and info.codec in CODECS_WITH_SPARE_FRAMES else None
    position, count, last, earlier = 0, 0, None, 0
    while done < len(wanted):
        key = keyframe_before(info, wanted[done])
        jumped = may_skip and key - position >= MIN_JUMP_FRAMES
        if jumped:
            for _ in range(earlier):
                key = keyframe_before(info, key - 1)
            container.seek(int(info.pts[key]), stream=stream, backward=True)
        for frame in decode_frames(container, stream, needed):
            stamp = frame.pts if info.pts is not None and frame.pts is not None else count
            count += 1
            if jumped and stamp > targets[done]:
                # Containers without an index (mpegts) may land one keyframe late.
                earlier += 1
                break
            jumped, last, before = False, frame, done
            while done < len(wanted) and stamp >= targets[done]:
                if needed is not None and stamp != targets[done]:
                    return
                yield done, frame
                done += 1
            if done == len(wanted):
                return
            if done > before:
                position = int(wanted[done - 1]) + 1
                if may_skip and keyframe_before(info, wanted[done]) - position >= MIN_JUMP_FRAMES:
                    break
        else:
            if not jumped:
                yield from repeat_last(info, wanted, done, last)
                return
            earlier += 1
        if earlier > MAX_STEPS_BACK:
            return


def repeat_last(
    info: VideoInfo, wanted: np.ndarray, done: int, last: "av.VideoFrame | None"
) -> Iterator[tuple[int, "av.VideoFrame"]]:
    """Stand in for frames at the end that the decoder did not give.

    Args:
        info: Facts of the video.
        wanted: (F,) int64 ascending distinct frame indices in the source.
        done: Number of wanted frames that were given already.
        last: The last decoded frame, None when there is none.

    Yields:
        Place in `wanted` and the last frame, for every place that is left.

    Raises:
        ValueError: There is no decoded frame.
    """
    if last is None:
        raise ValueError(f"No frame of {info.path} can be decoded near frame {wanted[done]}: the file is damaged.")
    warnings.warn(
        f"{len(wanted) - done} of the wanted frames of {info.path} cannot be decoded (from frame {wanted[done]} on); "
        "the last good frame stands in for them.",
        stacklevel=2,
    )
    for place in range(done, len(wanted)):
        yield place, last


def keyframe_before(info: VideoInfo, index: int) -> int:
    """Find where decoding must begin to reach a frame.

    Args:
        info: Facts of the video.
        index: Zero-based frame index.

    Returns:
        Index of the last keyframe at or before it, 0 when there is none.
    """
    place = int(np.searchsorted(info.keyframes, index, side="right")) - 1
    return int(info.keyframes[place]) if place >= 0 else 0


@functools.cache
def torchcodec_decoders() -> object:
    """Import torchcodec once.

    Returns:
        The module `torchcodec.decoders`, or the text of the error that its import raised.
    """
    try:
        return importlib.import_module("torchcodec.decoders")
    # The wheel raises RuntimeError or OSError when it finds no FFmpeg or another torch than its own.
    except (ImportError, OSError, RuntimeError) as error:
        return str(error).strip().split("\n")[0]


def open_torchcodec(info: VideoInfo, *, num_threads: int, required: bool) -> object | None:
    """Open a video with torchcodec where it is usable and counts the same frames.

    Args:
        info: Facts of the video.
        num_threads: Decoder threads, 0 for as many as there are cores.
        required: Whether the caller asked for torchcodec by name.

    Returns:
        A `torchcodec.decoders.VideoDecoder`, or None when PyAV shall be used.

    Raises:
        ImportError: It was asked for and cannot be imported.
    """
    module = torchcodec_decoders()
    if isinstance(module, str):
        if required:
            raise ImportError(
                f"video_backend='torchcodec' cannot be used here ({module}). Install torchcodec and FFmpeg, or use "
                "video_backend='pyav', which needs nothing else."
            )
        return None
    reason = "it is rotated or has no time stamps" if info.rotation or info.pts is None else None
    decoder = None
    if reason is None:
        try:
            decoder = module.VideoDecoder(info.path, dimension_order="NHWC", num_ffmpeg_threads=num_threads)
            if len(decoder) != info.num_frames:
                reason = f"torchcodec counts {len(decoder)} frames and the packets are {info.num_frames}"
        except (RuntimeError, ValueError) as error:
            reason = f"torchcodec refuses it ({str(error).strip()[:200]})"
    if reason is None:
        return decoder
    if required:
        warnings.warn(f"{info.path} is read with PyAV: {reason}.", stacklevel=2)
    return None


def frames_from_torchcodec(decoder: object, wanted: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Decode distinct frames with torchcodec, a few at a time.

    Args:
        decoder: Object of `open_torchcodec`.
        wanted: (F,) int64 ascending distinct frame indices in the source.

    Yields:
        Place in `wanted` and (H, W, 3) uint8 RGB.
    """
    for begin in range(0, len(wanted), TORCHCODEC_BATCH):
        chunk = wanted[begin : begin + TORCHCODEC_BATCH].tolist()
        yield from enumerate(decoder.get_frames_at(indices=chunk).data.numpy(), start=begin)
