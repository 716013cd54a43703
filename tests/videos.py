"""Makers of small video files for tests; every frame shows its own number, so that a test can tell frames apart."""

import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

BITS = 10


def numbered_frame(index: int, size: tuple[int, int] = (64, 48)) -> np.ndarray:
    """Paint a frame that carries its number as a row of black and white stripes.

    Args:
        index: Number below 1024.
        size: (width, height) in pixels, at least 20 wide.

    Returns:
        (height, width, 3) uint8 RGB; the stripe of bit i is bright when that bit is set, the lower half is a colour
        that changes with the number, and a red square marks the top left corner.
    """
    width, height = size
    frame = np.zeros((height, width, 3), dtype=np.uint8)
    edges = np.linspace(0, width, BITS + 1).astype(int)
    for bit in range(BITS):
        frame[: height // 2, edges[bit] : edges[bit + 1]] = 235 if index >> bit & 1 else 20
    frame[height // 2 :] = (40 + index * 37 % 160, 40 + index * 59 % 160, 40 + index * 83 % 160)
    frame[height * 3 // 4 :, : width // 4] = (220, 20, 20)
    return frame


def frame_number(frame: np.ndarray) -> int:
    """Read the number back from a decoded (and perhaps resized) frame of `numbered_frame`.

    Args:
        frame: (height, width, 3) uint8 RGB.

    Returns:
        The number.
    """
    height, width = frame.shape[:2]
    edges = np.linspace(0, width, BITS + 1)
    rows = frame[height // 8 : max(height * 3 // 8, height // 8 + 1)]
    number = 0
    for bit in range(BITS):
        middle = int((edges[bit] + edges[bit + 1]) / 2)
        number |= int(rows[:, middle].mean() > 127) << bit
    return number


def make_video(
    path: str | Path,
    num_frames: int = 48,
    fps: float = 8,
    size: tuple[int, int] = (64, 48),
    codec: str = "mpeg4",
    *,
    pix_fmt: str = "yuv420p",
    gop: int = 12,
    b_frames: int = 0,
    times: Sequence[float] | None = None,
    rotation: int = 0,
    container_options: dict[str, str] | None = None,
    frames: Sequence[np.ndarray] | None = None,
) -> Path:
    """Write a video whose frames show their numbers.

    Args:
        path: File to write; the suffix decides the container.
        num_frames: Number of frames, below 1024.
        fps: Frames per second.
        size: (width, height) in pixels.
        codec: Name of an encoder of PyAV, for example "mpeg4", "libx264", "libvpx-vp9", "ffv1".
        pix_fmt: Pixel format of the encoder.
        gop: Largest distance of keyframes.
        b_frames: Frames in a row that may refer to later ones.
        times: Seconds of every frame for a variable frame rate (milliseconds are kept), None for a constant one.
        rotation: Degrees clockwise that a player shall turn the picture (mp4 and mov only).
        container_options: Options of the container, for example {"movflags": "faststart"}.
        frames: (height, width, 3) uint8 RGB frames to write instead of numbered ones.

    Returns:
        The path.
    """
    path = Path(path)
    rate = Fraction(fps).limit_denominator(1001)
    with av.open(str(path), "w", options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = *size, pix_fmt
        stream.codec_context.gop_size = gop
        stream.codec_context.max_b_frames = b_frames
        if codec == "libx264":
            stream.options = {"crf": "10", "preset": "veryfast", "sc_threshold": "0", "bf": str(b_frames)}
        elif codec.startswith("libvpx"):
            stream.options = {"crf": "10", "b": "1M", "deadline": "realtime", "cpu-used": "8"}
        else:
            stream.bit_rate = 4_000_000
        if times is not None:
            stream.codec_context.time_base = stream.time_base = Fraction(1, 1000)
        for index in range(num_frames if frames is None else len(frames)):
            picture = numbered_frame(index, size) if frames is None else frames[index]
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = index if times is None else round(times[index] * 1000)
            frame.time_base = 1 / rate if times is None else Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    if rotation:
        set_rotation(path, rotation)
    return path


def set_rotation(path: Path, degrees: int) -> None:
    """Write a rotation into the track header of an mp4 or mov file.

    Args:
        path: File to change.
        degrees: Degrees clockwise that a player shall turn the picture, a multiple of 90.
    """
    content = bytearray(path.read_bytes())
    header = content.index(b"tkhd") + 4
    matrix = header + (40 if content[header] == 0 else 52)
    cosine, sine = {0: (1, 0), 90: (0, 1), 180: (-1, 0), 270: (0, -1)}[degrees % 360]
    one = 1 << 16
    values = (cosine * one, sine * one, 0, -sine * one, cosine * one, 0, 0, 0, 1 << 30)
    content[matrix : matrix + 36] = struct.pack(">9i", *values)
    path.write_bytes(content)


def make_sound(path: str | Path, seconds: float = 1.0, *, codec: str = "aac") -> Path:
    """Write a file with sound and no pictures.

    Args:
        path: File to write.
        seconds: Length.
        codec: Name of a sound encoder.

    Returns:
        The path.
    """
    path = Path(path)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=16000)
        count = int(16000 * seconds)
        tone = np.sin(np.arange(count) / 10).astype(np.float32)[None] * 0.1
        for begin in range(0, count, 1024):
            part = tone[:, begin : begin + 1024]
            frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(part), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 16000, begin
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def make_gif(path: str | Path, num_frames: int = 6, size: tuple[int, int] = (64, 48)) -> Path:
    """Write an animated gif.

    Args:
        path: File to write.
        num_frames: Number of frames.
        size: (width, height) in pixels.

    Returns:
        The path.
    """
    pictures = [Image.fromarray(numbered_frame(index, size)) for index in range(num_frames)]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=100, loop=0)
    return Path(path)


def make_frame_folder(
    path: str | Path, num_frames: int = 8, size: tuple[int, int] = (64, 48), *, suffix: str = ".png"
) -> Path:
    """Write a folder with one picture per frame, numbered without leading zeros.

    Args:
        path: Folder to make.
        num_frames: Number of frames.
        size: (width, height) in pixels.
        suffix: Kind of picture.

    Returns:
        The folder.
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(num_frames):
        Image.fromarray(numbered_frame(index, size)).save(folder / f"frame_{index + 1}{suffix}")
    return folder
