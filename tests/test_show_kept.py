"""The picture of kept tokens: layout, dimming and wrong shapes."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from longvideo import show_kept


def make_stage(layer, kept, kind="uniform"):
    return SimpleNamespace(layer=layer, kind=kind, kept_visual_indices=[torch.tensor(kept)])


def make_video(num_frames=8, side=4, per_clip=4, tokens=16):
    frames = np.full((num_frames, 32, 32, 3), 200, np.uint8)
    patches = per_clip * side * side
    groups = np.arange(patches) * tokens // patches  # neighbours share a token
    return frames, np.tile(groups, (num_frames // per_clip, 1))


def section_top(number, size, rows):
    first = show_kept.MARGIN + show_kept.LINE
    block = show_kept.LINE + rows * (size + show_kept.GAP) + show_kept.GAP
    return first + number * block + (show_kept.LINE * rows if number else 0)


def test_dropped_patches_are_dimmed_and_kept_ones_are_not(tmp_path):
    frames, groups = make_video()
    # Token 17 is the second of clip 1, that is, the second row of 4 patches in frame 4.
    out = show_kept.draw(frames, groups, [make_stage(4, [17])], tmp_path / "kept.png")
    page = np.asarray(Image.open(out))
    size, top = 112, section_top(2, 112, 1)
    x = show_kept.MARGIN + 4 * (size + show_kept.GAP)
    patch = size // 4
    cells = [page[top + row * patch : top + (row + 1) * patch, x : x + patch] for row in range(4)]
    assert [bool((cell == 200).all()) for cell in cells] == [False, True, False, False]
    assert all(cell.max() < 150 for cell in (cells[0], cells[2], cells[3]))
    other = page[top + patch : top + 2 * patch, show_kept.MARGIN : show_kept.MARGIN + patch]
    assert other.max() < 150, "frame 0 has the same group number, but in clip 0"


def test_first_token_shifts_the_video(tmp_path):
    frames, groups = make_video()
    plain = Image.open(show_kept.draw(frames, groups, [make_stage(4, [3, 20])], tmp_path / "a.png"))
    shifted = [make_stage(4, [0, 67, 84])]  # token 0 belongs to a picture in front of the video
    moved = Image.open(show_kept.draw(frames, groups, shifted, tmp_path / "b.png", first_token=64))
    # The headings differ in nothing: both keep 2 of 32 tokens.
    assert np.array_equal(np.asarray(plain), np.asarray(moved))


def test_merge_row_colours_patches_by_token(tmp_path):
    frames, groups = make_video()
    page = np.asarray(Image.open(show_kept.draw(frames, groups, [], tmp_path / "kept.png")))
    top, patch = section_top(1, 112, 1), 28
    column = show_kept.MARGIN + patch // 2
    colours = {tuple(page[top + row * patch + patch // 2, column]) for row in range(4)}
    assert len(colours) == 4
    same = page[top + patch // 2, show_kept.MARGIN + 3 * patch + patch // 2]
    assert tuple(same) in colours


def test_many_frames_are_thinned_to_a_page(tmp_path):
    frames, groups = make_video(num_frames=128)
    out = show_kept.draw(frames, groups, [make_stage(2, range(10)), make_stage(4, [1])], tmp_path / "kept.png")
    width, height = Image.open(out).size
    assert width == 2 * show_kept.MARGIN + 8 * (112 + show_kept.GAP) - show_kept.GAP
    assert height < 4 * 4 * (112 + show_kept.GAP) + 400


def test_image_tiles_count_as_clips_of_one_frame(tmp_path):
    tiles, groups = make_video(num_frames=3, per_clip=1, tokens=4)
    assert show_kept.draw(tiles, torch.tensor(groups), [], tmp_path / "kept.png").is_file()


def test_wrong_shapes_and_endings_are_named(tmp_path):
    frames, groups = make_video()
    with pytest.raises(ValueError, match=r"7 frames do not belong to merge groups of shape \(2, 64\)"):
        show_kept.draw(frames[:7], groups, [], tmp_path / "kept.png")
    with pytest.raises(ValueError, match="uint8"):
        show_kept.draw(frames.astype(np.float32), groups, [], tmp_path / "kept.png")
    with pytest.raises(ValueError, match="ending of a picture format"):
        show_kept.draw(frames, groups, [], tmp_path / "kept.xyz")


def test_failed_writing_leaves_nothing_behind(tmp_path, monkeypatch):
    frames, groups = make_video()

    def fail(self, target, *_, **__):
        target.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        show_kept.draw(frames, groups, [], tmp_path / "kept.png")
    assert list(tmp_path.iterdir()) == []
