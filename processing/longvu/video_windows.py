"""Windows of consecutive frames of one video that is decoded on the way."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import islice
from types import TracebackType

import torch

from longvideo.processing.shared.video_io import SourceVideoMetadata


class VideoWindows:
    """Iterator over the pixels of one video, window by window; what was given is not held.

    May be used once, `again` gives another one from the first frame on; and as a context manager that closes the file
    when the caller stops early.

    Args:
        frames: (C, H, W) frames in order.
        to_pixels: Maps a list of frames to model inputs.
        window_size: Frames per window; the last one may be shorter.
        metadata: Where the frames come from, with `frames_indices`, `fps` and `timestamps` (seconds).
        video_size: The pair of `video_sizes`.
        resources: What is closed at the end.
        reopen: Reads the same frames of the same video another time.

    Attributes:
        num_frames: Number of frames of all windows.
        video_size: (2,) int64, as in `video_sizes`.
        metadata: Where the frames come from.
    """

    def __init__(
        self,
        frames: Iterator[torch.Tensor],
        to_pixels: Callable[[list[torch.Tensor]], dict[str, torch.Tensor]],
        *,
        window_size: int,
        metadata: SourceVideoMetadata,
        video_size: torch.Tensor,
        resources: ExitStack,
        reopen: Callable[[], "VideoWindows"],
    ) -> None:
        self.num_frames = len(metadata.frames_indices)
        self.video_size, self.metadata = video_size, metadata
        self._frames, self._to_pixels, self._window_size, self._resources = frames, to_pixels, window_size, resources
        self._reopen = reopen

    def __iter__(self) -> "VideoWindows":
        return self

    def __next__(self) -> dict[str, torch.Tensor]:
        window = list(islice(self._frames, self._window_size))
        if not window:
            self.close()
            raise StopIteration
        return self._to_pixels(window)

    def __len__(self) -> int:
        return -(-self.num_frames // self._window_size)

    def __enter__(self) -> "VideoWindows":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def again(self) -> "VideoWindows":
        """Open the video another time, from the first frame on."""
        return self._reopen()

    def close(self) -> None:
        """Close the file; nothing more is given afterwards."""
        self._frames = iter(())
        self._resources.close()
