"""Spatial token compression of LongVU against loops, its budgets, and recorded masks."""

from pathlib import Path

import pytest
import torch

from longvideo.modeling.longvu.spatial_compression import ANCHORS, anchor_similarity, compress, remove_by_force
from longvideo.modeling.longvu.sva_longvu import add_newlines, crop_grid
from tests.reference.longvu_recorded import find_recorded, load_recorded
from tests.reference.longvu_reduction import naive_anchor, naive_compress, naive_forced_removal


def make_tokens(num_frames: int, num_tokens: int = 6, seed: int = 42) -> torch.Tensor:
    """(F, V, 8) tokens: a still picture with noise; the last token of each frame is a newline."""
    torch.manual_seed(seed)
    tokens = torch.randn(1, num_tokens, 8) + 0.6 * torch.randn(num_frames, num_tokens, 8)
    tokens[:, -1] = torch.linspace(-1, 1, 8)
    return tokens


@pytest.mark.parametrize("anchor", ANCHORS)
@pytest.mark.parametrize("num_frames", [1, 2, 8, 9, 23])
@pytest.mark.parametrize("window", [1, 3, 8])
def test_compression_equals_loops(num_frames: int, window: int, anchor: str) -> None:
    tokens = make_tokens(num_frames)
    wanted = naive_compress(tokens, 0.8, window, anchor)
    assert compress(tokens, 0.8, window=window, anchor=anchor).tolist() == wanted
    similarity, is_anchor = anchor_similarity(tokens, window, anchor=anchor)
    positions = [s + naive_anchor(tokens[s : s + window], anchor) for s in range(0, num_frames, window)]
    assert is_anchor.nonzero()[:, 0].tolist() == positions
    assert similarity.dtype == torch.float32
    # Newline tokens repeat, so that they stay in anchor frames only.
    assert torch.equal(compress(tokens, 0.8, window=window, anchor=anchor)[:, -1], is_anchor)


def test_half_types_are_compared_in_float32() -> None:
    tokens = make_tokens(9).bfloat16()
    assert torch.equal(anchor_similarity(tokens, 4)[0], anchor_similarity(tokens.float(), 4)[0])


def test_equal_and_different_frames() -> None:
    equal = make_tokens(1).expand(20, -1, -1)
    for anchor in ANCHORS:
        assert int(compress(equal, 0.8, anchor=anchor).sum()) == 3 * 6  # windows of 8, 8 and 4
        different = torch.eye(20)[:, None].expand(-1, 6, -1)
        assert compress(different, 0.8, anchor=anchor).all()
    assert anchor_similarity(equal, 8, anchor="most_changed")[1].nonzero()[:, 0].tolist() == [0, 8, 16]
    assert compress(torch.zeros(0, 6, 8), 0.8).shape == (0, 6)
    assert compress(torch.zeros(0, 6, 8), 0.8, budget=-3, forced_removal=True).shape == (0, 6)


def test_the_frame_that_changes_is_the_anchor() -> None:
    tokens = make_tokens(1).repeat(8, 1, 1)
    tokens[5] = -tokens[5]
    assert anchor_similarity(tokens, 8, anchor="most_changed")[1].nonzero()[:, 0].tolist() == [5]


@pytest.mark.parametrize("window", [1, 4, 8])
@pytest.mark.parametrize("num_frames", [1, 5, 19])
def test_forced_removal_equals_loops(num_frames: int, window: int) -> None:
    tokens = make_tokens(num_frames)
    rows = naive_compress(tokens, 0.9, window, "first")
    for budget in range(-9, num_frames * 6 + 3, 4):
        kept = compress(tokens, 0.9, window=window, budget=budget, forced_removal=True)
        assert kept.tolist() == naive_forced_removal(rows, budget, window)
        # Below zero the original drops tokens from the end until windows are empty, which the budget cannot promise.
        assert budget < 0 or int(kept.sum()) <= budget


@pytest.mark.parametrize("anchor", ANCHORS)
@pytest.mark.parametrize("num_frames", [1, 2, 23])
def test_the_budget_is_never_exceeded(num_frames: int, anchor: str) -> None:
    tokens = make_tokens(num_frames)
    free = compress(tokens, 0.9, window=4, anchor=anchor)
    for budget in range(1, num_frames * 6 + 3, 1 + num_frames // 8):
        kept = compress(tokens, 0.9, window=4, anchor=anchor, budget=budget)
        assert 1 <= int(kept.sum()) <= budget
        if budget >= int(free.sum()):
            assert torch.equal(kept, free)
        # While all anchors of the first windows fit the budget is used up, and no token comes in that was dropped.
        elif budget >= int(anchor_similarity(tokens, 4, anchor=anchor)[1].sum()) * 6:
            assert int(kept.sum()) == budget
            assert not (kept & ~free).any()


def test_tokens_most_like_their_anchor_go_first() -> None:
    tokens = make_tokens(8)
    similarity, is_anchor = anchor_similarity(tokens, 8)
    kept = compress(tokens, 2.0, budget=20)
    assert kept[0].all() and int(kept.sum()) == 20
    others = ~is_anchor[:, None].expand_as(kept)
    assert similarity[kept & others].max() <= similarity[~kept].min()


def test_windows_are_doubled_while_anchors_alone_are_too_many() -> None:
    tokens = make_tokens(1).expand(32, -1, -1)  # nothing but the anchors' 6 tokens stays
    for budget, frames in ((48, range(0, 32, 4)), (47, range(0, 32, 8)), (23, (0, 16)), (11, (0,)), (6, (0,))):
        kept = compress(tokens, 0.9, window=4, budget=budget)
        assert kept.any(1).nonzero()[:, 0].tolist() == list(frames)
        assert int(kept.sum()) == 6 * len(frames)
    assert compress(tokens, 0.9, window=4, budget=3)[0].tolist() == [True, False, True, False, True, False]
    assert int(compress(tokens, 0.9, window=4, budget=1).sum()) == 1


def test_errors() -> None:
    tokens = make_tokens(3)
    for budget in (0, -4):
        with pytest.raises(ValueError, match=f"budget is {budget}"):
            compress(tokens, 0.8, budget=budget)
    with pytest.raises(ValueError, match="'last'"):
        compress(tokens, 0.8, anchor="last")
    with pytest.raises(ValueError, match="got 0"):
        compress(tokens, 0.8, window=0)


@pytest.mark.golden
@pytest.mark.parametrize(
    "folder",
    find_recorded("stc_cosine_0", "stc_keep_mask_similarity_0", "stc_keep_mask_final_0"),
    ids=lambda folder: folder.name,
)
def test_masks_equal_the_original(folder: Path) -> None:
    case = load_recorded(folder)
    expected, window = case.expected, 8
    cosine = expected["stc_cosine_0"]
    is_anchor = torch.arange(len(cosine)) % window == 0
    similar = (cosine < case.config["drop_threshold"]) | is_anchor[:, None]
    assert torch.equal(similar, expected["stc_keep_mask_similarity_0"].bool())
    final = remove_by_force(similar, case.budget, window=window)
    assert torch.equal(final, expected["stc_keep_mask_final_0"].bool())

    side, size = case.side, case.size
    tokens = crop_grid(expected["projected_high"].unflatten(1, (side, side)), *size)
    tokens = add_newlines(tokens, case.weights["image_newline"])
    if tokens.shape[1] != cosine.shape[1] or case.config.get("frame_pos"):
        pytest.skip("The compressed tokens of this case are not those recorded at the full grid.")
    similarity, _ = anchor_similarity(tokens, window)
    recorded = cosine[: len(tokens)].nan_to_num(1.0)
    torch.testing.assert_close(similarity, recorded, rtol=0, atol=1e-5)  # float32, sums in another order
    kept = compress(tokens, case.config["drop_threshold"], window=window)
    assert torch.equal(kept, expected["stc_keep_mask_similarity_0"][: len(tokens)].bool())
