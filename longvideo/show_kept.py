"""A picture of which frames and visual tokens survive compression, drawn with Pillow alone.

`draw` is for models that merge tokens and drop them inside the decoder, `draw_selection` for models that choose
frames, grids and tokens before it.

Shapes: F frames, T kept frames, K clips, P patches of a frame, M tokens of a clip after merging, V visual tokens.
"""

import colorsys
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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
FRAME_OF_FULL = (0, 140, 60)  # border of a frame at full resolution
BORDER = 3


@dataclass
class Section:
    """One heading with frames under it.

    Attributes:
        heading: what is shown.
        frames: indices of the frames that are drawn.
        keep: per frame its (side, side) bool grid, False for dropped parts; empty for no dimming.
        groups: per frame its (side, side) grid of token numbers, drawn as colours.
        mosaic: per frame the side of the grid whose cells it is drawn in.
        bordered: frames with a border.
        labels: per frame a text under it.
    """

    heading: str
    frames: list[int]
    keep: dict[int, np.ndarray] = field(default_factory=dict)
    groups: dict[int, np.ndarray] = field(default_factory=dict)
    mosaic: dict[int, int] = field(default_factory=dict)
    bordered: set[int] = field(default_factory=set)
    labels: dict[int, str] = field(default_factory=dict)


def draw_kept(kept: Mapping[str, Any], path: str | os.PathLike) -> Path:
    """Draw the `kept_tokens` of a pipeline's result.

    Args:
        kept: `frames` and `times`, with the arguments of `draw` or of `draw_selection`.
        path: picture to write; its ending names the format.

    Returns:
        The path that was written.

    Raises:
        ValueError: the shapes do not belong together, or the ending names no picture format.
    """
    return draw_selection(**kept, path=path) if "selection" in kept else draw(**kept, path=path)


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
    path = _check_ending(path)
    num_frames = frames_FHWC.shape[0]
    per_clip = num_frames // groups.shape[0]
    tokens_per_clip = int(groups.max()) + 1
    # (F, P): index of each patch's token among the tokens of the whole video
    clip_start = np.arange(groups.shape[0])[:, None] * tokens_per_clip
    tokens_FP = (groups + clip_start).reshape(num_frames, side * side)
    shown = _spread_evenly(num_frames)
    grids = {i: groups.reshape(num_frames, side, side)[i] for i in shown}

    total = groups.shape[0] * tokens_per_clip
    sections = [
        Section(f"{num_frames} sampled frames, {side}x{side} patches each", shown, labels=_labels(shown, times)),
        Section(
            f"after merging: {tokens_per_clip} tokens per clip of {per_clip}, {total} in all (one colour, one token)",
            shown,
            groups=grids,
        ),
    ]
    for stage in stages:
        kept = np.asarray(_as_array(stage.kept_visual_indices[sample])) - first_token
        kept = kept[(kept >= 0) & (kept < total)]
        share = len(kept) / total
        text = f"after layer {int(stage.layer)}: {len(kept)} of {total} tokens ({share:.0%}) kept, {stage.kind}"
        keep_FP = np.isin(tokens_FP, kept)
        sections.append(Section(text, shown, keep={i: keep_FP[i].reshape(side, side) for i in shown}))
    caption = f"{len(shown)} of {num_frames} frames drawn, evenly spaced" if len(shown) < num_frames else ""
    size = max(1, round(THUMB_PIXELS / side)) * side  # whole pixels for every patch
    return _write(_draw_page(frames_FHWC, sections, size=size, caption=caption), path)


def draw_selection(
    frames: np.ndarray | torch.Tensor,
    selection: Any,
    path: str | os.PathLike,
    *,
    grid_sides: tuple[int, int],
    times: Sequence[float] | None = None,
) -> Path:
    """Draw which frames of one video were kept, at which resolution, and which of their tokens the decoder saw.

    Args:
        frames: (F, H, W, 3) uint8 sampled frames, padded to squares as the model saw them.
        selection: object with `kept_frames` (T,), `full_resolution` (T,) bool, `mode`, `token_frame` (V,) positions
            among the kept frames, `token_grid_index` (V,) row-major place in the frame's grid, -1 for newline tokens.
        path: picture to write; its ending names the format.
        grid_sides: sides of the full and of the low grid.
        times: (F,) seconds, written under the frames.

    Returns:
        The path that was written.

    Raises:
        ValueError: the shapes do not belong together, or the ending names no picture format.
    """
    frames_FHWC, kept_T = _as_array(frames), _as_array(selection.kept_frames)
    _check_frames(frames_FHWC)
    num_frames, num_kept = len(frames_FHWC), len(kept_T)
    if not num_kept or kept_T.max() >= num_frames:
        raise ValueError(
            f"{num_frames} frames do not belong to a selection that keeps {num_kept} frames up to number "
            f"{kept_T.max(initial=-1)}."
        )
    path = _check_ending(path)
    full_T = _as_array(selection.full_resolution)
    sides_T = np.where(full_T, *grid_sides)
    keep = _token_grids(selection, sides_T)
    shown, positions = _spread_evenly(num_frames), _spread_evenly(num_kept)
    shown_kept = [int(kept_T[t]) for t in positions]
    is_kept = np.isin(np.arange(num_frames), kept_T)
    num_full, num_tokens = int(full_T.sum()), len(_as_array(selection.token_frame))
    resolutions = [
        f"{n} at {side}x{side}" for n, side in zip((num_full, num_kept - num_full), grid_sides, strict=True)
    ]
    sections = [
        Section(
            f"{num_frames} sampled frames, {num_kept} kept by their difference (the others are grey)",
            shown,
            keep={i: is_kept[i].reshape(1, 1) for i in shown},
            labels=_labels(shown, times),
        ),
        Section(
            f"kept frames: {', '.join(resolutions)} (full resolution has a border)",
            shown_kept,
            mosaic={int(kept_T[t]): int(sides_T[t]) for t in positions},
            bordered={int(kept_T[t]) for t in positions if full_T[t]},
            labels=_labels(shown_kept, times),
        ),
        Section(
            f"their tokens in the prompt: {num_tokens}, line ends included, chosen by '{selection.mode}'",
            shown_kept,
            keep={int(kept_T[t]): keep[t] for t in positions},
        ),
    ]
    counts = [(len(shown), num_frames, "sampled"), (len(shown_kept), num_kept, "kept")]
    parts = [f"{few} of {many} {what}" for few, many, what in counts if few < many]
    caption = f"{' and '.join(parts)} frames drawn, evenly spaced" if parts else ""
    return _write(_draw_page(frames_FHWC, sections, size=THUMB_PIXELS, caption=caption), path)


def _token_grids(selection: Any, sides_T: np.ndarray) -> list[np.ndarray]:
    """Return per kept frame its (side, side) bool grid, True where the decoder got the token."""
    grids = [np.zeros((side, side), bool) for side in sides_T]
    pairs = zip(_as_array(selection.token_frame), _as_array(selection.token_grid_index), strict=True)
    for position, place in pairs:
        if place >= 0:
            grids[position].flat[place] = True
    return grids


def _spread_evenly(count: int) -> list[int]:
    return [int(i) for i in np.unique(np.linspace(0, count - 1, min(MAX_FRAMES, count)).round())]


def _labels(frames: Sequence[int], times: Sequence[float] | None) -> dict[int, str]:
    return {i: f"{i}" if times is None else f"{i}: {times[i]:.1f} s" for i in frames}


def _check_ending(path: str | os.PathLike) -> Path:
    path = Path(path)
    if path.suffix.lower() not in Image.registered_extensions():
        raise ValueError(f"'{path}' has no ending of a picture format; use .png.")
    return path


def _as_array(value: np.ndarray | torch.Tensor) -> np.ndarray:
    return value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)


def _check_frames(frames_FHWC: np.ndarray) -> None:
    if frames_FHWC.ndim != 4 or frames_FHWC.shape[-1] != 3 or frames_FHWC.dtype != np.uint8:
        raise ValueError(f"frames must be (F, H, W, 3) uint8, got {frames_FHWC.shape} {frames_FHWC.dtype}.")


def _check_shapes(frames_FHWC: np.ndarray, groups: np.ndarray) -> int:
    _check_frames(frames_FHWC)
    num_frames, num_clips = frames_FHWC.shape[0], groups.shape[0]
    side = round((groups.size / max(num_frames, 1)) ** 0.5)
    if groups.ndim != 2 or not num_clips or num_frames % num_clips or num_frames * side * side != groups.size:
        raise ValueError(
            f"{num_frames} frames do not belong to merge groups of shape {groups.shape}: expected "
            "(clips, frames of a clip * patches) with a square number of patches."
        )
    return side


def _draw_page(frames_FHWC: np.ndarray, sections: list[Section], *, size: int, caption: str) -> Image.Image:
    columns = min(8, max(len(section.frames) for section in sections))
    width = max(2 * MARGIN + columns * (size + GAP) - GAP, 560)
    pitches = [size + GAP + (LINE if section.labels else 0) for section in sections]
    heights = [
        LINE + -(-len(section.frames) // columns) * pitch + GAP
        for section, pitch in zip(sections, pitches, strict=True)
    ]
    page = Image.new("RGB", (width, 2 * MARGIN + sum(heights) + (LINE if caption else 0)), PAPER)
    pen, font, small = ImageDraw.Draw(page), ImageFont.load_default(size=15), ImageFont.load_default(size=11)
    top = MARGIN
    for section, pitch, height in zip(sections, pitches, heights, strict=True):
        pen.text((MARGIN, top), section.heading, fill=INK, font=font)
        for cell, index in enumerate(section.frames):
            x = MARGIN + cell % columns * (size + GAP)
            y = top + LINE + cell // columns * pitch
            page.paste(Image.fromarray(_render(frames_FHWC[index], section, index, size)), (x, y))
            if index in section.labels:
                pen.text((x, y + size + 2), section.labels[index], fill=GREY, font=small)
        top += height
    if caption:
        pen.text((MARGIN, top), caption, fill=GREY, font=font)
    return page


def _render(frame_HWC: np.ndarray, section: Section, index: int, size: int) -> np.ndarray:
    """Return one frame as its section shows it, (size, size, 3)."""
    picture = Image.fromarray(frame_HWC)
    if index in section.mosaic:
        side = section.mosaic[index]
        picture = picture.resize((side, side), Image.Resampling.BOX).resize((size, size), Image.Resampling.NEAREST)
    pixels = np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC))
    if index in section.keep:
        pixels = _dim(pixels, section.keep[index])
    if index in section.groups:
        pixels = _colour(pixels, section.groups[index])
    if index in section.bordered:
        pixels = pixels.copy()
        for edge in (np.s_[:BORDER], np.s_[-BORDER:], np.s_[:, :BORDER], np.s_[:, -BORDER:]):
            pixels[edge] = FRAME_OF_FULL
    return pixels


def _spread(grid: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    rows, columns = (np.arange(n) * side // n for n, side in zip(pixels.shape[:2], grid.shape, strict=True))
    return grid[rows[:, None], columns]


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
