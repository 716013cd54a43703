"""A picture of which visual tokens survive merging and every dropout stage, drawn with Pillow alone.

Shapes: F frames, K clips, P patches of a frame, M tokens of a clip after merging.
"""

import colorsys
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

MAX_FRAMES = 32  # more do not fit on a page that can be read
THUMB_PIXELS = 112
GAP = 6
MARGIN = 16
LINE = 22
DIMMED = 0.2  # share of its brightness that a dropped patch keeps
WASH, HATCH, HATCH_STEP = 95, 60, 6  # level of grey of a dropped patch, of the lines over it, pixels between them
INK, PAPER, GREY = (20, 20, 20), (255, 255, 255), (110, 110, 110)


def draw(
    frames: np.ndarray | torch.Tensor,
    merge_groups: np.ndarray | torch.Tensor,
    stages: Sequence[Any],
    path: str | os.PathLike,
    *,
    first_token: int = 0,
    sample: int = 0,
    times: Sequence[float] | None = None,
) -> Path:
    """Draw the frames of one video, coloured by merged token, then once per dropout stage with dropped patches dimmed.

    Args:
        frames: (F, H, W, 3) uint8, the frames as the model saw them.
        merge_groups: (K, F/K * P) merged-token index inside its clip for every patch, frame-major, then row-major.
        stages: the model's `visual_dropout` output: objects with `layer`, `kind` and `kept_visual_indices`, a list of
            index tensors into the sample's visual tokens.
        path: picture to write; its ending names the format.
        first_token: position of this video's first token among the sample's visual tokens.
        sample: which sample of the batch the stages are read for.
        times: (F,) seconds, written under the frames.

    Returns:
        The path that was written.

    Raises:
        ValueError: the shapes do not belong together, or the ending names no picture format.
    """
    frames_FHWC = _as_array(frames)
    groups = _as_array(merge_groups)
    side = _check_shapes(frames_FHWC, groups)
    path = Path(path)
    if path.suffix.lower() not in Image.registered_extensions():
        raise ValueError(f"'{path}' has no ending of a picture format; use .png.")
    num_frames = frames_FHWC.shape[0]
    per_clip = num_frames // groups.shape[0]
    tokens_per_clip = int(groups.max()) + 1
    # (F, P): index of each patch's token among the tokens of the whole video
    clip_start = np.arange(groups.shape[0])[:, None] * tokens_per_clip
    tokens_FP = (groups + clip_start).reshape(num_frames, side * side)
    shown = np.unique(np.linspace(0, num_frames - 1, min(MAX_FRAMES, num_frames)).round().astype(int))

    total = groups.shape[0] * tokens_per_clip
    sections = [(f"{num_frames} sampled frames, {side}x{side} patches each", None, None)]
    heading = f"after merging: {tokens_per_clip} tokens per clip of {per_clip}, {total} in all (one colour, one token)"
    sections.append((heading, None, groups.reshape(num_frames, side * side)))
    for stage in stages:
        kept = np.asarray(_as_array(stage.kept_visual_indices[sample])) - first_token
        kept = kept[(kept >= 0) & (kept < total)]
        share = len(kept) / total
        text = f"after layer {int(stage.layer)}: {len(kept)} of {total} tokens ({share:.0%}) kept, {stage.kind}"
        sections.append((text, np.isin(tokens_FP, kept), None))
    caption = f"{len(shown)} of {num_frames} frames drawn, evenly spaced" if len(shown) < num_frames else ""
    page = _draw_page(frames_FHWC, shown, sections, side=side, caption=caption, times=times)
    return _write(page, path)


def _as_array(value: np.ndarray | torch.Tensor) -> np.ndarray:
    return value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)


def _check_shapes(frames_FHWC: np.ndarray, groups: np.ndarray) -> int:
    if frames_FHWC.ndim != 4 or frames_FHWC.shape[-1] != 3 or frames_FHWC.dtype != np.uint8:
        raise ValueError(f"frames must be (F, H, W, 3) uint8, got {frames_FHWC.shape} {frames_FHWC.dtype}.")
    num_frames, num_clips = frames_FHWC.shape[0], groups.shape[0]
    side = round((groups.size / max(num_frames, 1)) ** 0.5)
    if groups.ndim != 2 or not num_clips or num_frames % num_clips or num_frames * side * side != groups.size:
        raise ValueError(
            f"{num_frames} frames do not belong to merge groups of shape {groups.shape}: expected "
            "(clips, frames of a clip * patches) with a square number of patches."
        )
    return side


def _draw_page(
    frames_FHWC: np.ndarray,
    shown: np.ndarray,
    sections: list[tuple[str, np.ndarray | None, np.ndarray | None]],
    *,
    side: int,
    caption: str,
    times: Sequence[float] | None,
) -> Image.Image:
    size = max(1, round(THUMB_PIXELS / side)) * side  # whole pixels for every patch
    columns = min(8, len(shown))
    rows = -(-len(shown) // columns)
    width = max(2 * MARGIN + columns * (size + GAP) - GAP, 560)
    block = LINE + rows * (size + GAP) + GAP
    label = LINE * rows  # under the first section only: frame numbers and times
    page = Image.new("RGB", (width, 2 * MARGIN + len(sections) * block + label + (LINE if caption else 0)), PAPER)
    pen, font, small = ImageDraw.Draw(page), ImageFont.load_default(size=15), ImageFont.load_default(size=11)
    thumbs = {
        i: np.asarray(Image.fromarray(frames_FHWC[i]).resize((size, size), Image.Resampling.BICUBIC)) for i in shown
    }
    top = MARGIN
    for number, (heading, keep_FP, groups_FP) in enumerate(sections):
        pen.text((MARGIN, top), heading, fill=INK, font=font)
        pitch = size + GAP + (LINE if number == 0 else 0)
        for cell, index in enumerate(shown):
            x = MARGIN + cell % columns * (size + GAP)
            y = top + LINE + cell // columns * pitch
            pixels = thumbs[index]
            if keep_FP is not None:
                pixels = _dim(pixels, keep_FP[index].reshape(side, side))
            if groups_FP is not None:
                pixels = _colour(pixels, groups_FP[index].reshape(side, side))
            page.paste(Image.fromarray(pixels), (x, y))
            if number == 0:
                text = f"{index}" if times is None else f"{index}: {times[index]:.1f} s"
                pen.text((x, y + size + 2), text, fill=GREY, font=small)
        top += block + (label if number == 0 else 0)
    if caption:
        pen.text((MARGIN, top), caption, fill=GREY, font=font)
    return page


def _spread(grid: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    scale = pixels.shape[0] // grid.shape[0]
    return grid.repeat(scale, axis=0).repeat(scale, axis=1)


def _dim(pixels: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """Wash dropped patches out to hatched grey, so that dark and bright ones alike differ from kept ones."""
    grey = pixels.mean(axis=-1, keepdims=True).repeat(3, axis=-1) * DIMMED + WASH * (1 - DIMMED)
    rows, columns = np.indices(pixels.shape[:2])
    grey[(rows + columns) % HATCH_STEP == 0] = HATCH
    return np.where(_spread(keep, pixels)[..., None], pixels, grey).astype(np.uint8)


def _colour(pixels: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Tint every patch with the colour of its merged token."""
    palette = _palette(int(groups.max()) + 1)
    tint = palette[_spread(groups, pixels)]
    return (0.45 * pixels + 0.55 * tint).astype(np.uint8)


def _palette(count: int) -> np.ndarray:
    # Steps of the golden ratio keep neighbouring numbers far apart on the colour circle.
    colours = [
        colorsys.hsv_to_rgb(i * 0.618034 % 1.0, (0.55, 0.95)[i % 2], (1.0, 0.8)[i // 2 % 2]) for i in range(count)
    ]
    return np.array(colours) * 255


def _write(page: Image.Image, path: Path) -> Path:
    temporary = path.with_name(f".{path.stem}.part{path.suffix}")
    try:
        page.save(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
