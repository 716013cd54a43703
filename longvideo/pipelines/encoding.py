"""Videos encoded before `generate`: once for several questions, or window by window so that few pixels are in memory.

Nothing here knows an architecture. What is used: `encode_video` of the model, `model_input_names` and the option
`window_size` of the video processor, `iterate_windows` of the processor.

Shapes: F frames of a video, n frames of a window, h x w pixels of a small frame.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.data import get_worker_info

WINDOW_FRAMES = 16
THUMB_PIXELS = 120  # longest side of a frame that is kept for a picture


class SharedVideo:
    """One encoded video for all rows that ask about it; rows of one call hold the same object.

    Attributes:
        encoded: what `encode_video` of the model gave; None before the first row.
        thumbs: (F, h, w, 3) uint8 small frames, when they were asked for with the first row.
    """

    def __init__(self) -> None:
        self.encoded: Any = None
        self.thumbs: torch.Tensor | None = None


class TimedWindows:
    """Iterator over the windows of a video that measures the time of decoding.

    Args:
        windows: iterator over dicts of pixels, with `num_frames`, `video_size`, `again` and `close`.
        to_uint8: turns (n, 3, H, W) pixels into (n, H, W, 3) uint8; None keeps no small frames.

    Attributes:
        waits: seconds of decoding before each window so far.
    """

    def __init__(self, windows: Any, to_uint8: Any = None) -> None:
        self.windows, self.to_uint8 = windows, to_uint8
        self.waits: list[float] = []
        self._thumbs: list[torch.Tensor] = []

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        while True:
            begin = time.perf_counter()
            window = next(self.windows, None)
            self.waits.append(time.perf_counter() - begin)
            if window is None:
                return
            if self.to_uint8 is not None:
                self._thumbs.append(shrink(self.to_uint8(window["pixel_values_videos"])))
            yield window

    def again(self) -> Iterator[dict[str, torch.Tensor]]:
        """Read the windows another time; the time is measured, small frames are not made again."""
        with self.windows.again() as windows:
            second = TimedWindows(windows)
            second.waits = self.waits
            yield from second

    def thumbs(self) -> torch.Tensor | None:
        """Return the small frames of all windows, (F, h, w, 3) uint8."""
        return torch.cat(self._thumbs) if self._thumbs else None


def shrink(frames_FHWC: torch.Tensor) -> torch.Tensor:
    """Return frames whose longer side has at most `THUMB_PIXELS` pixels.

    Args:
        frames_FHWC: (F, H, W, 3) uint8.

    Returns:
        (F, h, w, 3) uint8, the input itself where it is small enough.
    """
    scale = THUMB_PIXELS / max(frames_FHWC.shape[1:3])
    if scale >= 1:
        return frames_FHWC
    size = tuple(max(1, round(side * scale)) for side in frames_FHWC.shape[1:3])
    small = torch.nn.functional.interpolate(frames_FHWC.permute(0, 3, 1, 2).float(), size=size, mode="area")
    return small.round().to(torch.uint8).permute(0, 2, 3, 1)


def window_options(processor: Any, messages: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Return the options with which a processor gives windows in place of pixels.

    Args:
        processor: of the model.
        messages: one chat.

    Returns:
        `window_size`, or nothing: a processor that reads whole videos only, a chat without a video or with several, or
        a loader's worker process, which cannot hand an open file to the process of the model.
    """
    if not hasattr(processor, "iterate_windows") or get_worker_info() is not None:
        return {}
    contents = [message["content"] for message in messages if not isinstance(message["content"], str)]
    videos = [block for content in contents for block in content or [] if block.get("type") == "video"]
    return {"window_size": WINDOW_FRAMES} if len(videos) == 1 else {}


@contextmanager
def closing_windows(about: Mapping[str, Any]) -> Iterator[None]:
    """Close the video file of a sample when the block is left, read to its end or not.

    Args:
        about: what `preprocess` noted about the sample.
    """
    try:
        yield
    finally:
        if about["windows"] is not None:
            about["windows"].close()


def encode_sample(
    model: Any, tensors: dict[str, torch.Tensor], windows: TimedWindows | None, *, names: Sequence[str]
) -> Any:
    """Encode the videos of one sample.

    Args:
        model: with `encode_video`.
        tensors: processor output.
        windows: pixels of the sample's only video, or None where `tensors` holds them.
        names: outputs of the video processor.

    Returns:
        What `generate(encoded_video=...)` takes, or None for a sample without a video.
    """
    if windows is not None:
        size = tuple(int(side) for side in windows.windows.video_size)
        return model.encode_video(windows=windows, num_frames=windows.windows.num_frames, video_size=size)
    if "pixel_values_videos" not in tensors:
        return None
    return model.encode_video(**{name: tensors[name] for name in names if name in tensors})
