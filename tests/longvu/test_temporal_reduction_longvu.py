"""Temporal reduction of LongVU against loops, in pieces, and against recorded decisions."""

from pathlib import Path

import pytest
import torch

from longvideo.modeling.longvu.temporal_reduction import (
    RULES,
    WINDOWS,
    TemporalReducer,
    select_frames,
    survivors,
    thin_evenly,
    window_similarity,
)
from tests.reference.longvu_recorded import find_recorded, load_recorded
from tests.reference.longvu_reduction import naive_select, naive_similarity

# float32 sums of a few hundred products of size 1 / N.
SIMILARITY_ATOL = 1e-6


def make_video(num_frames: int, seed: int = 42) -> torch.Tensor:
    """(F, 3, 5) features: scenes of some frames with a little noise."""
    torch.manual_seed(seed)
    scenes = torch.randn(num_frames // 3 + 1, 1, 3, 5).expand(-1, 3, -1, -1).flatten(0, 1)[:num_frames]
    return scenes + 0.3 * torch.randn(num_frames, 3, 5)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("num_frames", [1, 2, 7, 15, 16, 17, 33, 63])
@pytest.mark.parametrize("window", [1, 4, 8, 16])
def test_selection_equals_loops(num_frames: int, window: int, rule: str) -> None:
    features = make_video(num_frames)
    similarity = window_similarity(features, window, rule=rule)
    wanted = naive_similarity(features.flatten(1), window, rule)
    torch.testing.assert_close(similarity.double(), torch.tensor(wanted).double(), rtol=0, atol=SIMILARITY_ATOL)
    for threshold, max_frames in ((0.3, 400), (0.3, 5), (-2.0, 3), (2.0, 7)):
        kept = select_frames(similarity, window=window, threshold=threshold, max_frames=max_frames, rule=rule)
        assert kept.tolist() == naive_select(similarity.tolist(), window, threshold, max_frames, rule)
        assert kept.dtype == torch.int64


def test_equal_frames_leave_one_per_window() -> None:
    features = torch.randn(1, 4, 5).expand(37, -1, -1)
    original = window_similarity(features, 16)
    torch.testing.assert_close(original, torch.ones(37), rtol=0, atol=SIMILARITY_ATOL)
    kept = select_frames(original, window=16, threshold=0.83, max_frames=400)
    assert kept.tolist() == [8, 24, 34]  # the middle of 16, 16 and 5 frames
    paper = window_similarity(features, 8, rule="paper")
    kept = select_frames(torch.ones(37), window=8, threshold=0.83, max_frames=400, rule="paper")
    assert kept.tolist() == [0, 8, 16, 24, 32]
    assert len(select_frames(paper, window=8, threshold=0.83, max_frames=400, rule="paper")) == 5
    assert select_frames(torch.zeros(0), window=8, threshold=0.83, max_frames=4).tolist() == []


def test_different_frames_all_stay() -> None:
    features = torch.eye(40)
    for rule, own in (("original", 1 / 16), ("paper", 0.0)):
        similarity = window_similarity(features, 16, rule=rule)
        torch.testing.assert_close(similarity[:32], torch.full((32,), own), rtol=0, atol=SIMILARITY_ATOL)
        kept = select_frames(similarity, window=16, threshold=0.83, max_frames=400, rule=rule)
        assert kept.tolist() == list(range(40))
    assert window_similarity(features[:1], 16).tolist() == [1.0]
    assert window_similarity(features[:1], 16, rule="paper").tolist() == [0.0]


def test_frames_of_zeros_are_like_nothing() -> None:
    features = torch.zeros(4, 6)
    assert window_similarity(features, 4).tolist() == [0.0] * 4  # the original would divide by 0


def test_similarity_is_float32_whatever_the_features_are() -> None:
    features = make_video(16).bfloat16()
    similarity = window_similarity(features, 8)
    assert similarity.dtype == torch.float32
    assert torch.equal(similarity, window_similarity(features.float(), 8))


def test_the_middle_frame_stays_for_any_threshold() -> None:
    similarity = torch.tensor([0.9, 0.8, 0.9, 0.9, 0.95])
    assert survivors(similarity, window=3, threshold=0.0).tolist() == [False, True, False, False, True]
    assert survivors(similarity, window=3, threshold=0.85).tolist() == [False, True, False, False, True]
    assert survivors(similarity, window=3, threshold=0.9, rule="paper").tolist() == [False, True, False, True, False]
    # A similarity at the threshold is not below it.
    assert survivors(similarity, window=5, threshold=0.8).tolist() == [False, False, True, False, False]


def test_cap() -> None:
    assert thin_evenly(5, 7).tolist() == [0, 1, 2, 3, 4]
    assert thin_evenly(7, 5).tolist() == [0, 1, 2, 4, 5]
    picked = thin_evenly(3600, 400)
    assert picked.tolist() == list(range(0, 3600, 9))
    low = torch.zeros(20)
    assert len(select_frames(low, window=16, threshold=0.5, max_frames=6)) == 6
    # Below one window the original has no maximum.
    assert len(select_frames(low[:15], window=16, threshold=0.5, max_frames=6)) == 15
    assert len(select_frames(low[:15], window=16, threshold=0.5, max_frames=6, rule="paper")) == 6
    with pytest.raises(ValueError, match="maximum of 0"):
        thin_evenly(3, 0)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("num_frames", [1, 9, 32, 45])
@pytest.mark.parametrize("piece", [1, 5, 16, 100])
def test_pieces_equal_the_whole(num_frames: int, piece: int, rule: str) -> None:
    features = make_video(num_frames)
    pixels = torch.arange(num_frames)[:, None].expand(-1, 2)
    reducer = TemporalReducer(num_frames, threshold=0.35, max_frames=11, rule=rule)
    assert reducer.window == WINDOWS[rule]
    steps = [reducer.add(f, p) for f, p in zip(features.split(piece), pixels.split(piece), strict=True)]
    last = reducer.finish()
    steps += [last] if last else []
    assert (last is None) == (num_frames % reducer.window == 0)
    similarity = window_similarity(features, reducer.window, rule=rule)
    assert torch.equal(reducer.similarity, similarity)
    indices = torch.cat([step.indices for step in steps])
    alive = survivors(similarity, window=reducer.window, threshold=0.35, rule=rule)
    assert indices.tolist() == alive.nonzero()[:, 0].tolist()
    assert torch.equal(torch.cat([step.features for step in steps]), features[indices])
    assert torch.equal(torch.cat([step.others[0] for step in steps]), pixels[indices])
    wanted = select_frames(similarity, window=reducer.window, threshold=0.35, max_frames=11, rule=rule)
    assert reducer.kept().tolist() == wanted.tolist()
    assert indices[reducer.final_positions()].tolist() == wanted.tolist()


def test_short_videos_keep_all_frames() -> None:
    features = torch.ones(20, 6)
    for limit, expected in ((21, list(range(20))), (20, [8, 18]), (None, [8, 18])):
        reducer = TemporalReducer(20, threshold=0.83, max_frames=5, limit=limit)
        reducer.add(features)
        reducer.finish()
        assert reducer.kept().tolist() == expected
        torch.testing.assert_close(reducer.similarity, torch.ones(20), rtol=0, atol=SIMILARITY_ATOL)


def test_reducer_holds_less_than_a_window() -> None:
    reducer = TemporalReducer(1000, threshold=0.83, max_frames=400)
    held = []
    for _ in range(100):
        reducer.add(torch.randn(10, 3))
        pending = reducer._pending
        held.append(len(pending[0]) if pending else 0)
        # No view that would keep the whole piece.
        assert pending is None or pending[0].untyped_storage().nbytes() == pending[0].numel() * 4
    assert max(held) < 16


def test_errors() -> None:
    with pytest.raises(ValueError, match="'first'"):
        window_similarity(torch.zeros(2, 3), 4, rule="first")
    with pytest.raises(ValueError, match="got 0"):
        window_similarity(torch.zeros(2, 3), 0)
    with pytest.raises(ValueError, match="video of 0 frames"):
        TemporalReducer(0, threshold=0.8, max_frames=4)
    reducer = TemporalReducer(4, threshold=0.8, max_frames=4)
    with pytest.raises(ValueError, match="2 frames of features"):
        reducer.add(torch.zeros(2, 3), torch.zeros(3, 1))
    reducer.add(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="announced with 4 frames, got 5"):
        reducer.add(torch.zeros(3, 3))
    with pytest.raises(ValueError, match="announced with 4 frames, got 2"):
        reducer.finish()


@pytest.mark.golden
@pytest.mark.parametrize(
    "folder",
    find_recorded("dino_window_mean_similarity", "kept_frame_indices", single=False),
    ids=lambda folder: folder.name,
)
def test_decisions_equal_the_original(folder: Path) -> None:
    case = load_recorded(folder)
    expected, config = case.expected, case.config
    similarity = expected["dino_window_mean_similarity"]
    if len(expected["kept_frame_counts"]) > 1:
        pytest.skip("How many frames each sample had is not recorded apart.")
    # The placeholder counts as one id, padding (there is none in one sample) would not.
    room = case.budget - 1
    per_frame = config["lowres_token"] ** 2 if config.get("highres") else config["image_token_len"]
    limit = max(1, room // per_frame)
    if len(similarity) < limit:
        kept = torch.arange(len(similarity))
    else:
        kept = select_frames(similarity, window=16, threshold=config["dino_threshold"], max_frames=400)
    assert kept.tolist() == expected["kept_frame_indices"].tolist()
    if len(expected["dino_features"]) == len(similarity):
        actual = window_similarity(expected["dino_features"], 16)
        torch.testing.assert_close(actual, similarity, rtol=0, atol=1e-5)  # float32, sums in another order
