"""Draws scenes with numpy: signed distances with analytic antialiasing, so that every frame size shows the same."""

import os
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

import numpy as np

from longvideo.evaluation.corpus.scenes import COLOURS, Actor, Background, Scene

FRAMES_AT_ONCE = 32
_LETTER_STROKES: dict[str, tuple[tuple[float, float, float, float], ...]] = {
    "H": ((-0.7, -1, -0.7, 1), (0.7, -1, 0.7, 1), (-0.7, 0, 0.7, 0)),
    "L": ((-0.6, -1, -0.6, 1), (-0.6, 1, 0.7, 1)),
    "T": ((-0.8, -1, 0.8, -1), (0, -1, 0, 1)),
    "V": ((-0.8, -1, 0, 1), (0, 1, 0.8, -1)),
    "X": ((-0.8, -1, 0.8, 1), (-0.8, 1, 0.8, -1)),
    "Z": ((-0.7, -1, 0.7, -1), (0.7, -1, -0.7, 1), (-0.7, 1, 0.7, 1)),
}


def _circle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.hypot(x, y) - 0.92


def _square(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(np.abs(x), np.abs(y)) - 0.8


def _triangle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    # Apex (0, -0.95), base corners (+-0.98, 0.75).
    return np.maximum(y - 0.75, np.abs(x) * 0.8664 - (y + 0.95) * 0.4994)


def _cross(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    wide, tall = np.abs(x), np.abs(y)
    return np.maximum(np.maximum(wide, tall) - 0.95, np.minimum(wide, tall) - 0.3)


def _ring(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.abs(np.hypot(x, y) - 0.7) - 0.24


# Signed distance, in radii, of points given in radii from the centre (y down).
_DISTANCES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "cross": _cross,
    "ring": _ring,
}


def _frame_size(size: int | tuple[int, int]) -> tuple[int, int]:
    width, height = (size, size) if isinstance(size, int) else size
    if width < 8 or height < 8:
        raise ValueError(f"frame size is {width} x {height}, expected at least 8 x 8")
    return width, height


def _grid(width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
    x = (np.arange(width, dtype=np.float32) + 0.5) / width
    y = (np.arange(height, dtype=np.float32) + 0.5) / height
    return x, y


def _noise(seed: int, cells: int, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Smooth noise in 0 to 1: a random lattice, interpolated linearly."""
    lattice = np.random.RandomState(seed % (1 << 31)).random_sample((2 * cells + 1, 2 * cells + 1)).astype(np.float32)
    column, row = x * 2 * cells, y * 2 * cells
    left, top = column.astype(int), row.astype(int)
    part_x, part_y = column - left, (row - top)[:, None]
    upper = lattice[top][:, left] * (1 - part_x) + lattice[top][:, left + 1] * part_x
    lower = lattice[top + 1][:, left] * (1 - part_x) + lattice[top + 1][:, left + 1] * part_x
    return upper * (1 - part_y) + lower * part_y


def draw_background(background: Background, size: int | tuple[int, int]) -> np.ndarray:
    """The background alone.

    Args:
        background: what to draw.
        size: side, or (width, height), in pixels.

    Returns:
        (height, width, 3) uint8.
    """
    width, height = _frame_size(size)
    x, y = _grid(width, height)
    if background.kind == "plain":
        weight = np.zeros((height, width), dtype=np.float32)
    elif background.kind == "gradient":
        weight = np.broadcast_to(y[:, None] if background.vertical else x[None, :], (height, width))
    elif background.kind == "checker":
        cells = background.cells
        weight = (((x * cells).astype(int)[None, :] + (y * cells).astype(int)[:, None]) % 2).astype(np.float32)
    else:
        weight = _noise(background.seed, background.cells, x, y)
    first, second = np.float32(background.first), np.float32(background.second)
    return (first + weight[..., None] * (second - first) + 0.5).astype(np.uint8)


@lru_cache(maxsize=32)
def draw_letter(letter: str, size: tuple[int, int]) -> np.ndarray:
    """A white letter on black, (height, width, 3) uint8, for `size` = (width, height) in pixels."""
    width, height = size
    x, y = _grid(width, height)
    scale = 0.3
    points_x, points_y = (x[None, :] - 0.5) / scale, (y[:, None] - 0.5) / scale
    distance = np.full((height, width), np.inf, dtype=np.float32)
    for x0, y0, x1, y1 in _LETTER_STROKES[letter]:
        step_x, step_y = x1 - x0, y1 - y0
        along = ((points_x - x0) * step_x + (points_y - y0) * step_y) / (step_x**2 + step_y**2)
        along = np.clip(along, 0, 1)
        distance = np.minimum(distance, np.hypot(points_x - x0 - along * step_x, points_y - y0 - along * step_y))
    cover = np.clip(0.5 - (distance - 0.24) * scale * min(width, height), 0, 1)
    frame = np.repeat((cover * 255 + 0.5).astype(np.uint8)[..., None], 3, axis=2)
    frame.setflags(write=False)
    return frame


def _draw_actor(frames: np.ndarray, actor: Actor, times: Sequence[float], chosen: list[int]) -> None:
    """Blends one shape into the frames `chosen` (indices), touching only the box around the shape."""
    height, width = frames.shape[1:3]
    centres = np.array([actor.position(times[index]) for index in chosen], dtype=np.float32)
    colours = np.array([COLOURS[actor.colour_at(times[index])] for index in chosen], dtype=np.float32)
    reach_x, reach_y = int(actor.radius * width) + 2, int(actor.radius * height) + 2
    columns = (centres[:, :1] * width).astype(int) + np.arange(-reach_x, reach_x + 1)
    rows = (centres[:, 1:] * height).astype(int) + np.arange(-reach_y, reach_y + 1)
    points_x = ((columns + np.float32(0.5)) / np.float32(width) - centres[:, :1]) / actor.radius
    points_y = ((rows + np.float32(0.5)) / np.float32(height) - centres[:, 1:]) / actor.radius
    distance = _DISTANCES[actor.shape](points_x[:, None, :], points_y[:, :, None])
    cover = np.clip(0.5 - distance * (actor.radius * min(width, height)), 0, 1)[..., None]
    # The box may stick out by its safety margin, where the cover is zero: those pixels are drawn nowhere.
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None, :]
    frame, row, column = np.nonzero(inside & (cover[..., 0] > 0))
    target = (np.asarray(chosen)[frame], rows[frame, row], columns[frame, column])
    weight = cover[frame, row, column]
    below = frames[target].astype(np.float32)
    frames[target] = (below + weight * (colours[frame] - below) + 0.5).astype(np.uint8)


def render_frames(scene: Scene, times_seconds: Sequence[float], size: int | tuple[int, int] = 64) -> np.ndarray:
    """Draws the scene at given times.

    Args:
        scene: what to draw.
        times_seconds: seconds from the start of the video, in any order.
        size: side, or (width, height), in pixels; every size shows the same picture.

    Returns:
        (F, height, width, 3) uint8, RGB.

    Raises:
        ValueError: the frame is smaller than 8 x 8 pixels.
    """
    width, height = _frame_size(size)
    times = [float(time) for time in times_seconds]
    frames = np.empty((len(times), height, width, 3), dtype=np.uint8)
    frames[:] = draw_background(scene.background, (width, height))
    hidden = [scene.needle is not None and scene.needle.visible(time) for time in times]
    for actor in scene.actors:
        chosen = [index for index, time in enumerate(times) if not hidden[index] and actor.visible(time)]
        if chosen:
            _draw_actor(frames, actor, times, chosen)
    if scene.needle is not None and any(hidden):
        frames[np.array(hidden)] = draw_letter(scene.needle.letter, (width, height))
    return frames


def iterate_video(scene: Scene, size: int | tuple[int, int], *, fps: int | None = None) -> Iterator[np.ndarray]:
    """Frames of the whole video, (height, width, 3) uint8 each, frame k at k / fps seconds."""
    rate = fps or scene.fps
    times = [index / rate for index in range(scene.duration * rate)]
    for start in range(0, len(times), FRAMES_AT_ONCE):
        yield from render_frames(scene, times[start : start + FRAMES_AT_ONCE], size)


def write_video(
    scene: Scene, path: str | os.PathLike[str], *, size: tuple[int, int] = (256, 256), fps: int | None = None
) -> Path:
    """Writes the scene as mp4: H.264 where PyAV can encode it, else MPEG-4.

    Args:
        scene: what to draw.
        path: file to write; written under a temporary name first and then renamed.
        size: (width, height) in pixels, both even.
        fps: frames per second; default the scene's.

    Returns:
        The path.

    Raises:
        ValueError: an odd size, which 4:2:0 video cannot hold, or a rate below 1.
    """
    import av

    width, height = _frame_size(size)
    rate = scene.fps if fps is None else fps
    if width % 2 or height % 2:
        raise ValueError(f"video size is {width} x {height}: width and height must be even")
    if rate < 1:
        raise ValueError(f"fps is {rate}, expected at least 1")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    try:
        with av.open(str(partial), "w", format="mp4") as container:
            stream = container.add_stream(codec, rate=Fraction(rate))
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            # One thread and no wall-clock data, so that nearly always the same scene gives the same bytes; x264 was
            # seen to choose otherwise in one writing of twenty, on equal frames.
            stream.thread_count = 1
            if codec == "libx264":
                stream.options = {"crf": "18", "preset": "veryfast"}
            else:
                stream.bit_rate = 4_000_000
            for frame in iterate_video(scene, (width, height), fps=rate):
                for packet in stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")):
                    container.mux(packet)
            for packet in stream.encode():
                container.mux(packet)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path
