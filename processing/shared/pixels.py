"""Pixels as the original processors make them: PIL resizing with uint8 rounding, square padding, picture tiles."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as tvF


def resize_exact(frames_NCHW: torch.Tensor, height: int, width: int, *, resample: int = 3) -> torch.Tensor:
    """Resize frames with PIL where the values are bytes, so that rounding agrees with the original processors.

    Args:
        frames_NCHW: (N, C, H, W) frames; uint8 with 1 or 3 channels takes the exact way, anything else torchvision's.
        height: New height in pixels.
        width: New width in pixels.
        resample: PIL filter number, 3 is bicubic.

    Returns:
        (N, C, height, width) frames of the same type; the input itself when it already has that size.
    """
    if tuple(frames_NCHW.shape[-2:]) == (height, width):
        return frames_NCHW
    num_channels = frames_NCHW.shape[1]
    if frames_NCHW.dtype != torch.uint8 or num_channels not in (1, 3):
        mode = {0: tvF.InterpolationMode.NEAREST, 2: tvF.InterpolationMode.BILINEAR}.get(
            int(resample), tvF.InterpolationMode.BICUBIC
        )
        return tvF.resize(frames_NCHW, [height, width], interpolation=mode, antialias=True)
    resized = torch.empty((len(frames_NCHW), num_channels, height, width), dtype=torch.uint8)
    for index, frame_CHW in enumerate(frames_NCHW.cpu()):
        pixels = frame_CHW.permute(1, 2, 0).numpy() if num_channels == 3 else frame_CHW[0].numpy()
        picture = Image.fromarray(np.ascontiguousarray(pixels)).resize((width, height), Image.Resampling(resample))
        resized[index] = torch.from_numpy(np.array(picture).reshape(height, width, num_channels)).permute(2, 0, 1)
    return resized.to(frames_NCHW.device)


def pad_to_square(image_CHW: torch.Tensor, color: Sequence[float]) -> torch.Tensor:
    """Put a picture, or each of several frames, into the middle of a square of one colour.

    Args:
        image_CHW: (C, H, W) picture or (F, C, H, W) frames.
        color: Value of each channel, in the picture's own range.

    Returns:
        (C, S, S) picture or (F, C, S, S) frames, S the longer side.

    Source: LLaVA `expand2square`; used by LongVU, and by VideoChat-Flash for samples with several images.
    """
    *lead, height, width = image_CHW.shape
    if height == width:
        return image_CHW
    side = max(height, width)
    column = torch.as_tensor(color, dtype=image_CHW.dtype, device=image_CHW.device).view(lead[-1], 1, 1)
    square_CSS = column.expand(*lead, side, side).clone()
    top, left = (side - height) // 2, (side - width) // 2
    square_CSS[..., top : top + height, left : left + width] = image_CHW
    return square_CSS


def best_resolution(width: int, height: int, pinpoints: Sequence[Sequence[int]]) -> tuple[int, int]:
    """Choose the candidate size that keeps most of a picture's pixels and, among those, wastes least.

    Args:
        width: Width of the picture in pixels.
        height: Height of the picture in pixels.
        pinpoints: Candidate (width, height) pairs in pixels.

    Returns:
        The chosen (width, height); the first of equals.

    Raises:
        ValueError: There are no candidates.

    Source: VideoChat-Flash `select_best_resolution`.
    """
    if not pinpoints:
        raise ValueError("image_grid_pinpoints is empty; expected (width, height) pairs in pixels.")
    best, best_fit = None, (-1, 0)
    for candidate_width, candidate_height in pinpoints:
        scale = min(candidate_width / width, candidate_height / height)
        effective = min(int(width * scale) * int(height * scale), width * height)
        fit = (effective, -(candidate_width * candidate_height - effective))
        if fit > best_fit:
            best, best_fit = (int(candidate_width), int(candidate_height)), fit
    return best


def cut_tiles(image_CHW: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Cut a picture into tiles, row by row.

    Args:
        image_CHW: (C, rows * height, cols * width) picture.
        height: Height of a tile in pixels.
        width: Width of a tile in pixels.

    Returns:
        (rows * cols, C, height, width) tiles.

    Raises:
        ValueError: The picture is not a whole number of tiles.
    """
    num_channels, full_height, full_width = image_CHW.shape
    if full_height % height or full_width % width:
        raise ValueError(
            f"A picture of {full_width}x{full_height} pixels is not made of whole {width}x{height} tiles; "
            "image_grid_pinpoints must be multiples of the tile size."
        )
    rows, cols = full_height // height, full_width // width
    tiles = image_CHW.reshape(num_channels, rows, height, cols, width).permute(1, 3, 0, 2, 4)
    return tiles.reshape(rows * cols, num_channels, height, width)
