"""The picture of frames, resolutions and tokens that LongVU keeps."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from longvideo import show_kept

SIZE, LINE, GAP, MARGIN = show_kept.THUMB_PIXELS, show_kept.LINE, show_kept.GAP, show_kept.MARGIN


def make_selection(kept=(0, 2, 5), full=(True, False, False), tokens=((0, 0), (0, 3), (1, 3), (1, -1), (2, 0))):
    """Frames 0 at a 4x4 grid, 2 and 5 at a 2x2 grid, and the given (kept frame, place) tokens."""
    frames, places = zip(*tokens, strict=True)
    return SimpleNamespace(
        kept_frames=torch.tensor(kept),
        full_resolution=torch.tensor(full),
        mode="stc",
        token_frame=torch.tensor(frames),
        token_grid_index=torch.tensor(places),
    )


def draw(tmp_path, frames=None, **kwargs):
    frames = np.full((6, 32, 32, 3), 200, np.uint8) if frames is None else frames
    kept = {"frames": frames, "selection": make_selection(**kwargs), "grid_sides": (4, 2), "times": None}
    return np.asarray(Image.open(show_kept.draw_kept(kept, tmp_path / "kept.png")))


def cell(page, section, column):
    """Pixels of one frame: the first two sections have labels, each section one row."""
    top = MARGIN + section * (LINE + SIZE + GAP + LINE + GAP) + LINE
    left = MARGIN + column * (SIZE + GAP)
    return page[top : top + SIZE, left : left + SIZE]


def test_dropped_frames_are_dimmed(tmp_path):
    page = draw(tmp_path)
    kept = [bool((cell(page, 0, column) == 200).all()) for column in range(6)]
    assert kept == [True, False, True, False, False, True]
    assert cell(page, 0, 1).max() < 150


def test_full_resolution_has_a_border(tmp_path):
    page = draw(tmp_path)
    assert tuple(cell(page, 1, 0)[0, 0]) == show_kept.FRAME_OF_FULL
    assert tuple(cell(page, 1, 1)[0, 0]) == (200, 200, 200)


def test_frames_are_drawn_in_the_cells_of_their_grid(tmp_path):
    frames = np.random.default_rng(0).integers(0, 255, (6, 32, 32, 3), dtype=np.uint8)
    page = draw(tmp_path, frames)
    quarter, half = cell(page, 1, 0)[8:20, 8:20], cell(page, 1, 1)[4:52, 4:52]
    assert len(np.unique(quarter.reshape(-1, 3), axis=0)) == 1 and len(np.unique(half.reshape(-1, 3), axis=0)) == 1
    assert len(np.unique(cell(page, 1, 0)[4:-4, 4:-4].reshape(-1, 3), axis=0)) == 16


def test_dropped_tokens_are_dimmed_in_their_frame(tmp_path):
    page = draw(tmp_path)
    full, low = cell(page, 2, 0), cell(page, 2, 1)
    corners = [full[:28, 28 * i : 28 * i + 28] for i in range(4)]
    assert [bool((corner == 200).all()) for corner in corners] == [True, False, False, True]
    # Token 3 of a 2x2 grid is the lower right one; the newline token is nowhere.
    assert bool((low[56:, 56:] == 200).all()) and low[:56].max() < 150


def test_an_hour_fits_a_page(tmp_path):
    kept = np.arange(0, 3600, 9)
    tokens = [(position, position % 4) for position in range(400)]
    page = draw(tmp_path, np.zeros((3600, 8, 8, 3), np.uint8), kept=kept, full=np.arange(400) % 2 == 0, tokens=tokens)
    assert page.shape[1] == 2 * MARGIN + 8 * (SIZE + GAP) - GAP and page.shape[0] < 3 * 4 * (SIZE + GAP + LINE) + 300


def test_a_selection_of_another_video_is_named(tmp_path):
    with pytest.raises(ValueError, match="4 frames do not belong to a selection that keeps 3 frames up to number 5"):
        draw(tmp_path, np.zeros((4, 8, 8, 3), np.uint8))
    with pytest.raises(ValueError, match="uint8"):
        draw(tmp_path, np.zeros((6, 8, 8, 3), np.float32))
    with pytest.raises(ValueError, match="ending of a picture format"):
        show_kept.draw_selection(np.zeros((6, 8, 8, 3), np.uint8), make_selection(), "kept.xyz", grid_sides=(4, 2))
