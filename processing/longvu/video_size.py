"""Which of height and width comes first in what LongVU is told about a video."""

from pathlib import PurePath
from typing import Any
from urllib.parse import urlparse

import torch
from transformers.video_utils import VideoMetadata

SIZE_ORDERS = ("original", "height_width", "width_height")


def size_pair(source: Any, metadata: VideoMetadata, order: str) -> torch.Tensor:
    """Say what the model reads as width and height of a video.

    Args:
        source: Path, address, list of picture paths, or array.
        metadata: What reading it told, with `width` and `height` in pixels.
        order: One of `SIZE_ORDERS`.

    Returns:
        (2,) int64.

    Raises:
        ValueError: Unknown order.

    Source: LongVU passes `array.shape[:2]` of decoded videos, and PIL's size of gifs and frame pictures.
    """
    if order not in SIZE_ORDERS:
        raise ValueError(f"Unknown video_size_order {order!r}, expected one of {', '.join(SIZE_ORDERS)}.")
    if order == "original":
        order = "width_height" if comes_from_pictures(source, metadata) else "height_width"
    width, height = metadata.width, metadata.height
    return torch.tensor((width, height) if order == "width_height" else (height, width), dtype=torch.int64)


def comes_from_pictures(source: Any, metadata: VideoMetadata) -> bool:
    """Say whether the original reads a source with PIL, which tells (width, height).

    Args:
        source: Path, address, list of picture paths, or array.
        metadata: What reading it told.

    Returns:
        True for gifs, folders and lists of pictures.
    """
    if isinstance(source, str):
        path = urlparse(source).path if "://" in source else source
        return metadata.video_backend == "pictures" or PurePath(path).suffix.lower() == ".gif"
    return isinstance(source, list | tuple)
