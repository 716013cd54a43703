"""Frame sampling against the values of the original and against hand-counted cases."""

import json
import os
import warnings
from pathlib import Path

import numpy as np
import pytest

from longvideo.processing.shared.frame_sampling import (
    clip_range,
    covering_range,
    dynamic_fps1_indices,
    fps_indices,
    middle_indices,
    num_frames_indices,
    whole_clips,
)

GOLDEN = Path(os.environ.get("LONGVIDEO_GOLDEN", Path(__file__).parents[2] / ".." / "shared" / "golden"))


def golden_files() -> list[Path]:
    """Find every golden file that holds frame indices of VideoChat-Flash."""
    found = sorted((GOLDEN / "videochat_flash").glob("**/expected.json")) if GOLDEN.is_dir() else []
    return [path for path in found if "frame_indices" in json.loads(path.read_text())]


@pytest.mark.golden
@pytest.mark.parametrize("path", golden_files() or [None], ids=lambda path: path.parent.name if path else "absent")
def test_indices_equal_the_original(path: Path | None) -> None:
    if path is None:
        pytest.skip(f"no golden frame indices below {GOLDEN}; set LONGVIDEO_GOLDEN to the folder that holds them")
    for case in json.loads(path.read_text())["frame_indices"]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            if case["sample"] == "middle":
                indices = middle_indices(case["total_frames"], case["max_num_frames"])
            else:
                indices = dynamic_fps1_indices(
                    case["total_frames"],
                    case["fps"],
                    min_frames=case["min_num_frames"],
                    max_frames=case["max_num_frames"],
                    local_num_frames=case["local_num_frames"],
                )
        assert indices.dtype == np.int64
        assert len(indices) == case["n"], case
        if "indices" in case:
            assert indices.tolist() == case["indices"], case
        else:
            first, last = case["first"], case["last"]
            assert indices[: len(first)].tolist() == first, case
            assert indices[-len(last) :].tolist() == last, case
            assert int(indices.sum()) == case["sum"], case


def test_middle_takes_midpoints() -> None:
    assert middle_indices(10, 5).tolist() == [0, 2, 4, 6, 8]
    assert middle_indices(9, 3).tolist() == [1, 4, 7]


def test_middle_repeats_the_last_index_with_a_warning() -> None:
    with pytest.warns(UserWarning, match="only 2"):
        assert middle_indices(2, 4).tolist() == [0, 1, 1, 1]


def test_dynamic_counts_whole_clips_of_seconds() -> None:
    assert len(dynamic_fps1_indices(30 * 23, 30.0, min_frames=1, max_frames=512)) == 20
    assert len(dynamic_fps1_indices(30 * 2, 30.0, min_frames=1, max_frames=512)) == 4
    assert len(dynamic_fps1_indices(30 * 5000, 30.0, min_frames=64, max_frames=512)) == 512
    assert len(dynamic_fps1_indices(50, 25.0, min_frames=64, max_frames=512)) == 48


@pytest.mark.parametrize("rate", [0, None, -3, float("nan"), float("inf")])
def test_a_rate_that_is_no_rate_is_an_error(rate: float | None) -> None:
    with pytest.raises(ValueError, match="frame rate"):
        dynamic_fps1_indices(100, rate, min_frames=1, max_frames=8)
    with pytest.raises(ValueError, match="frame rate"):
        fps_indices(100, rate, fps=1)


def test_num_frames_is_clamped_to_the_video_and_to_whole_clips() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(num_frames_indices(100, 8, local_num_frames=4)) == 8
    with pytest.warns(UserWarning, match=r"num_frames=64 .* 30 frames of the video; using 28"):
        indices = num_frames_indices(30, 64, local_num_frames=4)
    assert len(indices) == 28 and len(set(indices.tolist())) == 28
    with pytest.warns(UserWarning, match="multiple of the 4 frames"):
        assert len(num_frames_indices(30, 10, local_num_frames=4)) == 8
    with pytest.warns(UserWarning, match="last one is repeated"):
        assert num_frames_indices(3, 4, local_num_frames=4).tolist() == [0, 1, 2, 2]


def test_fps_gives_frames_at_the_rate() -> None:
    indices = fps_indices(240, 24.0, fps=2, local_num_frames=4)
    assert len(indices) == 20
    assert set(np.diff(indices).tolist()) == {12}
    assert len(fps_indices(240, 24.0, fps=2, max_frames=10, local_num_frames=4)) == 8
    assert len(fps_indices(240, 24.0, fps=0.1, min_frames=6)) == 6
    with pytest.warns(UserWarning, match="above the 24 frames per second"):
        assert len(fps_indices(240, 24.0, fps=48)) == 240
    with pytest.raises(ValueError, match="fps=0"):
        fps_indices(240, 24.0, fps=0)


def test_no_frames_is_an_error() -> None:
    for call in (
        lambda: middle_indices(0, 4),
        lambda: dynamic_fps1_indices(0, 25.0, min_frames=1, max_frames=8),
        lambda: num_frames_indices(0, 4),
        lambda: fps_indices(0, 25.0, fps=1),
    ):
        with pytest.raises(ValueError, match="0 frames"):
            call()
    with pytest.raises(ValueError, match="at least 1"):
        whole_clips(0, 4)


def test_clip_range_follows_the_original() -> None:
    assert clip_range(250, 25.0, start=None, end=None) == (0, 250, 10.0)
    assert clip_range(250, 25.0, start=2, end=4) == (50, 50, 2.0)
    # The end is cut to 0.1 s before the end of the video: 9.9 - 2 = 7.9 s are 197 frames.
    first, count, duration = clip_range(250, 25.0, start=2, end=10)
    assert (first, count) == (50, 197) and duration == pytest.approx(7.9, abs=1e-9)


@pytest.mark.parametrize(
    ("rate", "total", "start", "end", "first", "last"),
    [
        (1.0, 20, 2.1, 4.1, 2, 4),
        (1.0, 20, 17.0, 19.95, 17, 19),
        (1.0, 20, 2.9, 3.9, 2, 3),
        (2.0, 20, 5.7, 6.8, 11, 13),
        (25.0, 500, 8.3, 9.3, 207, 232),
        (25.0, 500, 18.0, 20.0, 450, 499),
        (8.0, 80, 4.0, 4.01, 32, 32),
        (8.0, 80, 9.99, None, 79, 79),
        (8.0, 80, None, 0.25, 0, 1),
        (8.0, 80, None, None, 0, 79),
    ],
)
def test_a_covering_range_holds_every_frame_that_is_shown_in_it(rate, total, start, end, first, last) -> None:
    found, count, duration = covering_range(total, rate, start=start, end=end)
    assert (found, found + count - 1) == (first, last)
    assert duration == pytest.approx((total / rate if end is None else end) - (start or 0.0), abs=1e-9)


def test_times_of_borders_between_frames_are_not_rounded_to_the_next_frame() -> None:
    # 30000 / 1001 is the rate of most files; decimal times miss whole numbers of frames by some 1e-14.
    for rate in (10.0, 24.0, 30000 / 1001):
        for index in range(1, 290):
            assert covering_range(300, rate, start=index / rate, end=(index + 3) / rate)[:2] == (index, 3)
    assert covering_range(300, 10.0, start=0.7, end=2.3)[:2] == (7, 16)


@pytest.mark.parametrize(("cut", "count"), [(clip_range, 22), (covering_range, 25)])
def test_windows_outside_the_video_are_errors(cut, count) -> None:
    with pytest.raises(ValueError, match="empty"):
        cut(250, 25.0, start=4, end=4)
    with pytest.raises(ValueError, match=r"beyond the end of the video, which lasts 10\.00 s"):
        cut(250, 25.0, start=10, end=12)
    with pytest.raises(ValueError, match="start=-1"):
        cut(250, 25.0, start=-1, end=None)
    with pytest.warns(UserWarning, match="end=20 s lies beyond"):
        assert cut(250, 25.0, start=9, end=20)[:2] == (225, count)
