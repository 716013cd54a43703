"""What both towers of LongVU want to see of a picture: its square in their own mean colour, at their own size."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers.image_utils import SizeDict

from longvideo.processing.shared.pixels import pad_to_square, resize_exact

# Options of each tower: the first is SigLIP and has the usual names, the second DINOv2.
TOWER_OPTIONS = (
    {"size": "size", "image_mean": "image_mean", "image_std": "image_std"},
    {"size": "dino_size", "image_mean": "dino_image_mean", "image_std": "dino_image_std"},
)


def tower_settings(option: Callable[[str], Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Look up size, mean and deviation of both towers under the usual names.

    Args:
        option: Maps the name of an option to its value.

    Returns:
        `size`, `image_mean`, `image_std` of SigLIP and of DINOv2.
    """
    values = [{name: option(own) for name, own in names.items()} for names in TOWER_OPTIONS]
    for own in values:
        if isinstance(own["size"], SizeDict):
            own["size"] = dict(own["size"])
    return values[0], values[1]


def exact_size(size: Any) -> tuple[int, int] | None:
    """Read a size that says height and width.

    Args:
        size: Mapping or `SizeDict`, or a number for a square.

    Returns:
        (height, width) in pixels, None when the size says something else.
    """
    if isinstance(size, int):
        return size, size
    if isinstance(size, Mapping | SizeDict) and size.get("height") and size.get("width"):
        return int(size.get("height")), int(size.get("width"))
    return None


def pad_color(image_mean: float | Sequence[float], num_channels: int, *, is_bytes: bool) -> list[float]:
    """Work out the colour of the bars that make a picture square.

    Args:
        image_mean: Mean of each channel between 0 and 1, or one number for all.
        num_channels: Number of channels of the picture.
        is_bytes: Whether the picture has values from 0 to 255 rather than 0 to 1.

    Returns:
        One value per channel in the range of the picture, cut to a whole number for bytes.

    Source: LongVU `process_images`, `int(x * 255)` of the processor's mean.
    """
    mean = [image_mean] * num_channels if isinstance(image_mean, int | float) else list(image_mean)
    mean = (mean + [mean[-1]] * num_channels)[:num_channels]
    return [int(value * 255) for value in mean] if is_bytes else mean


def square_pixels(
    frames_FCHW: torch.Tensor,
    *,
    image_mean: float | Sequence[float],
    size: tuple[int, int] | None,
    resample: int,
    do_pad: bool | None,
    is_bytes: bool,
) -> torch.Tensor:
    """Pad frames to squares and resize them as the original does, frame by frame.

    Args:
        frames_FCHW: (F, C, H, W) frames; uint8 for values equal to the original's.
        image_mean: Mean of the tower between 0 and 1.
        size: (height, width) in pixels, None to leave the squares at their size.
        resample: PIL's number of the filter.
        do_pad: Whether to pad; otherwise the frames are stretched.
        is_bytes: Whether the values run from 0 to 255.

    Returns:
        (F, C, height, width) frames of the same type.

    Source: LongVU `process_images` and `expand2square`, then PIL's resize.
    """
    if do_pad:
        color = pad_color(image_mean, frames_FCHW.shape[1], is_bytes=is_bytes or frames_FCHW.dtype == torch.uint8)
        frames_FCHW = pad_to_square(frames_FCHW, color)
    return frames_FCHW if size is None else resize_exact(frames_FCHW, *size, resample=resample)
