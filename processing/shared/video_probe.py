"""What a video file holds: frame count, true times, keyframes, rotation, found without decoding it.

One pass over the packets is enough; only the first frame is decoded.
"""

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import av
import numpy as np

from longvideo.processing.shared.video_sources import local_path

# Formats of libavformat that accept any text.
TEXT_FORMATS = frozenset({"tty", "bin", "idf", "xbin", "adf"})


@dataclass
class VideoInfo:
    """What the packets and the first frame of a video file tell, without decoding the rest.

    Attributes:
        path: The file.
        num_frames: Number of frames that will be shown.
        fps: Frames per second, on average.
        duration: Seconds, from the first frame to the end of the last.
        width: Pixels, after rotation.
        height: Pixels, after rotation.
        rotation: Degrees anticlockwise by which decoded frames are turned for display, a multiple of 90.
        codec: Name of the codec.
        pix_fmt: Pixel format of the stream.
        is_variable_frame_rate: Whether the distances between frames differ by more than rounding.
        pts: (num_frames,) int64 presentation times in units of `time_base`, ascending; None when the file has none.
        time_base: Seconds per unit of `pts`.
        keyframes: int64 zero-based indices of frames at which decoding can begin, ascending.
    """

    path: str
    num_frames: int
    fps: float
    duration: float
    width: int
    height: int
    rotation: int
    codec: str
    pix_fmt: str
    is_variable_frame_rate: bool
    pts: np.ndarray | None = field(repr=False)
    time_base: float
    keyframes: np.ndarray = field(repr=False)

    @cached_property
    def frame_times(self) -> np.ndarray:
        """(num_frames,) float64 seconds at which each frame is shown, counted from the first frame."""
        if self.pts is None:
            return np.arange(self.num_frames, dtype=np.float64) / self.fps
        return (self.pts - self.pts[0]) * self.time_base

    @property
    def group_of_pictures(self) -> float:
        """Average number of frames between keyframes."""
        return self.num_frames / max(len(self.keyframes), 1)


def probe_video(path: str | Path) -> VideoInfo:
    """Read counts, times and keyframes of a local video file without decoding more than its first frame.

    Args:
        path: Video file, or file:// address.

    Returns:
        The facts of the video.

    Raises:
        FileNotFoundError: No such file.
        ValueError: The file is empty, truncated, not a video, or has sound only.
    """
    file = local_path(path)
    if file.is_dir():
        raise ValueError(f"{file} is a folder, expected a video file.")
    with open_video(file) as (container, stream):
        num_read, packets = 0, []
        for packet in readable_packets(container, stream):
            if packet.size and not packet.is_corrupt:
                num_read += 1
                if not packet.is_discard and is_shown(packet, stream):
                    packets.append((packet.pts if packet.pts is not None else packet.dts, packet.is_keyframe))
        promised, rate, time_base = stream.frames, stream.average_rate, float(stream.time_base)
        tail = stream.duration
        is_gif = container.format.name == "gif"
        # AVI stores decoding times only, and those of reordered H.264 or HEVC frames do not tell when they are shown.
        lacks_times = container.format.name == "avi" and stream.codec_context.has_b_frames
        lacks_times = lacks_times and stream.codec_context.name in ("h264", "hevc")
        start = stream.start_time
    frame, rotation, stated_format = first_frame(file)
    if frame is None or not packets:
        raise ValueError(f"No frame of {file} can be decoded: the file is damaged or truncated.")
    # A header may be off by a frame or two; a file whose copy was cut short lacks many.
    if promised - num_read > max(2, promised // 50):
        raise ValueError(
            f"{file} is truncated: its header promises {promised} frames, but only {num_read} are there. Fetch or "
            "copy the file again, or re-encode what is left of it."
        )
    pts, keyframes = order_packets(packets)
    if lacks_times:
        pts, keyframes = None, np.zeros(1, dtype=np.int64)
    if is_gif:
        # Frames of a gif change the one before; only the first stands alone.
        pts, keyframes, rate = None, np.zeros(1, dtype=np.int64), 1
    fps, duration, variable = frame_rate(file, len(packets), pts, rate, time_base, start, tail)
    width, height = (frame.height, frame.width) if rotation % 180 else (frame.width, frame.height)
    return VideoInfo(
        path=str(file),
        num_frames=len(packets),
        fps=fps,
        duration=duration,
        width=width,
        height=height,
        rotation=rotation,
        codec=stated_format[0],
        pix_fmt=stated_format[1],
        is_variable_frame_rate=variable,
        pts=pts,
        time_base=time_base,
        keyframes=keyframes,
    )


@contextlib.contextmanager
def open_video(path: Path, *, num_threads: int = 0) -> Iterator[tuple]:
    """Open a file with PyAV and find its video stream, with errors that a user understands.

    Args:
        path: Existing file.
        num_threads: Decoder threads, 0 for as many as there are cores.

    Yields:
        The container and its video stream.

    Raises:
        ValueError: The file is empty, truncated, not a video, or has sound only.
    """
    if path.stat().st_size == 0:
        raise ValueError(f"The video file {path} is empty (0 bytes).")
    try:
        container = av.open(str(path), metadata_errors="ignore")
    except (av.error.FFmpegError, OSError) as error:
        raise ValueError(
            f"{path} cannot be opened as a video ({error.strerror or error}): it is not a video file, or it is "
            "truncated (an mp4 whose recording or copy was not finished has no index). Check it or re-encode it."
        ) from error
    with container:
        name = container.format.name
        if name in TEXT_FORMATS:
            raise ValueError(f"{path} is not a video file: it was recognised as text.")
        # Sound files carry their cover as a video stream with one attached picture.
        streams = [stream for stream in container.streams.video if not is_attached_picture(stream)]
        if not streams:
            kinds = sorted({stream.type for stream in container.streams}) or ["nothing"]
            raise ValueError(f"{path} has no video stream (found: {', '.join(kinds)}). Pass a file with pictures.")
        if name.endswith("_pipe") or name == "image2":
            raise ValueError(f"{path} is a picture, not a video. Pass it as an image, or a list of frame pictures.")
        stream = streams[0]
        stream.thread_type = "AUTO"
        stream.codec_context.thread_count = num_threads
        yield container, stream


def is_attached_picture(stream: "av.video.stream.VideoStream") -> bool:
    """Say whether a video stream is only the cover picture of a sound file.

    Args:
        stream: Video stream of an open container.

    Returns:
        True for attached pictures.
    """
    disposition = getattr(stream, "disposition", None)
    return disposition is not None and bool(disposition & type(disposition).attached_pic)


def readable_packets(container: "av.container.InputContainer", stream: "av.video.stream.VideoStream") -> Iterator:
    """Iterate over the packets of a stream up to its end or to the first place that cannot be read.

    Args:
        container: Open container.
        stream: Its video stream.

    Yields:
        Packets; the last one is empty and flushes the decoder.
    """
    try:
        yield from container.demux(stream)
    except av.error.FFmpegError as error:
        warnings.warn(f"{container.name} cannot be read to its end ({error.strerror}).", stacklevel=2)


def is_shown(packet: "av.Packet", stream: "av.video.stream.VideoStream") -> bool:
    """Say whether a packet gives a picture; VP8 keeps hidden reference pictures in packets of their own.

    Args:
        packet: Packet with content.
        stream: Stream of the packet.

    Returns:
        False for hidden VP8 frames (bit 4 of the first byte, RFC 6386 section 9.1, is show_frame).
    """
    if stream.codec_context.name not in ("vp8", "libvpx"):
        return True
    return bool(memoryview(packet)[0] >> 4 & 1)


def first_frame(path: Path) -> tuple["av.VideoFrame | None", int, tuple[str, str]]:
    """Decode the first frame that can be decoded.

    Args:
        path: Video file.

    Returns:
        The frame or None, its rotation in degrees anticlockwise (a multiple of 90), and (codec, pixel format).
    """
    with open_video(path, num_threads=1) as (container, stream):
        for frame in decode_frames(container, stream):
            degrees = round(getattr(frame, "rotation", 0) / 90) * 90 % 360
            return frame, degrees, (stream.codec_context.name, frame.format.name)
    return None, 0, ("", "")


def decode_frames(
    container: "av.container.InputContainer",
    stream: "av.video.stream.VideoStream",
    needed: frozenset[int] | None = None,
) -> Iterator:
    """Decode frame by frame in display order, leaving out packets that the decoder refuses.

    Args:
        container: Open container, placed where decoding shall begin.
        stream: Its video stream.
        needed: Presentation times (in units of the stream) of the frames that must be given. Others are left out where
            no later frame refers to them. None gives every frame.

    Yields:
        `av.VideoFrame` objects.
    """
    context, skipping = stream.codec_context, None
    for packet in readable_packets(container, stream):
        skip = needed is not None and packet.pts is not None and packet.pts not in needed
        if skip != skipping:
            context.skip_frame = "NONREF" if skip else "DEFAULT"
            skipping = skip
        try:
            yield from packet.decode()
        except av.error.EOFError:
            return
        except av.error.FFmpegError:
            continue


def order_packets(packets: list[tuple[int | None, bool]]) -> tuple[np.ndarray | None, np.ndarray]:
    """Sort presentation times and find the places of the keyframes in display order.

    Args:
        packets: (presentation time or None, is keyframe) in file order.

    Returns:
        Ascending times or None when they are missing or all alike, and zero-based indices of the keyframes.
    """
    stamps = [stamp for stamp, _ in packets]
    if any(stamp is None for stamp in stamps) or (len(stamps) > 1 and min(stamps) == max(stamps)):
        return None, np.zeros(1, dtype=np.int64)
    pts = np.asarray(stamps, dtype=np.int64)
    order = np.argsort(pts, kind="stable")
    keyframes = np.flatnonzero(np.asarray([is_key for _, is_key in packets])[order])
    return pts[order], keyframes if len(keyframes) else np.zeros(1, dtype=np.int64)


def frame_rate(
    path: Path,
    num_frames: int,
    pts: np.ndarray | None,
    rate: float | None,
    time_base: float,
    start: int | None,
    length: int | None,
) -> tuple[float, float, bool]:
    """Work out frames per second and duration so that one is the frame count over the other.

    Args:
        path: File, for messages.
        num_frames: Number of frames.
        pts: Ascending presentation times in `time_base` units or None.
        rate: Average rate stated by the file, None or 0 when it states none.
        time_base: Seconds per unit.
        start: Stated start of the stream in units or None.
        length: Stated length of the stream in units or None.

    Returns:
        Frames per second, duration in seconds, whether the rate varies.
    """
    stated = float(rate) if rate else 0.0
    if pts is None or num_frames == 1:
        if stated <= 0:
            stated = 1.0
            warnings.warn(f"{path} states no frame rate; 1 frame per second is assumed.", stacklevel=3)
        return stated, num_frames / stated, False
    steps = np.diff(pts) * time_base
    typical = float(steps.mean())
    variable = bool(np.abs(steps - typical).max() > max(2.5 * time_base, 0.1 * typical))
    last_step = float(np.median(steps))
    if length is not None and start is not None and not (length + start - pts[-1]) * time_base > 4 * typical:
        last_step = max((length + start - int(pts[-1])) * time_base, 0.0) or last_step
    duration = float((pts[-1] - pts[0]) * time_base) + last_step
    if stated > 0 and abs(num_frames / stated - duration) <= max(1.5 * typical, 0.005 * duration) and not variable:
        return stated, num_frames / stated, variable
    return num_frames / duration, duration, variable
