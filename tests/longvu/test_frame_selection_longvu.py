"""Choice of resolutions of LongVU against loops and recorded decisions."""

from pathlib import Path

import pytest
import torch

from longvideo.modeling.longvu.frame_selection import (
    FrameLimits,
    choose_full_resolution,
    choose_grid,
    count_full_resolution,
    limits,
    query_scores,
)
from longvideo.modeling.longvu.sva_longvu import add_newlines, crop_grid, low_grid_size, token_grid_index
from tests.reference.longvu_recorded import find_recorded, load_recorded
from tests.reference.longvu_reduction import naive_scores

ORIGINAL = {"strict_limit": True, "full_beyond_limit": True}


def test_limits_of_the_release() -> None:
    found = limits(8192, 61, reserve=16, full_tokens=144, low_tokens=64)
    assert found == FrameLimits(budget=8115, full=56, low=126)
    assert limits(100, 200, reserve=16, full_tokens=144, low_tokens=64) == FrameLimits(budget=-116, full=1, low=1)
    with pytest.raises(ValueError, match=r"0 \(full\) and 64"):
        limits(100, 2, reserve=1, full_tokens=0, low_tokens=64)


def test_grid_by_the_rule_of_the_original() -> None:
    found = FrameLimits(budget=0, full=56, low=126)
    grids = {frames: choose_grid(frames, found, **ORIGINAL) for frames in (1, 55, 56, 126, 127, 400)}
    assert grids == {1: "full", 55: "full", 56: "low", 126: "low", 127: "full", 400: "full"}
    assert choose_grid(100, found, highres=False, **ORIGINAL) == "full"
    # A negative budget makes both limits 1, and one frame is then neither below nor above them.
    assert choose_grid(1, FrameLimits(-5, 1, 1), **ORIGINAL) == "low"
    assert choose_grid(2, FrameLimits(-5, 1, 1), **ORIGINAL) == "full"


def test_grid_by_our_rule() -> None:
    found = FrameLimits(budget=0, full=56, low=126)
    grids = {frames: choose_grid(frames, found) for frames in (1, 56, 57, 126, 127, 400)}
    assert grids == {1: "full", 56: "full", 57: "low", 126: "low", 127: "low", 400: "low"}
    assert choose_grid(400, found, highres=False) == "full"


@pytest.mark.parametrize(("full", "low"), [(156, 72), (84, 40), (26, 72), (10, 10), (2, 1)])
@pytest.mark.parametrize("num_frames", [1, 3, 63])
def test_as_many_full_frames_as_fit(num_frames: int, full: int, low: int) -> None:
    for budget in range(-5, num_frames * full + 10, 7):
        number = count_full_resolution(num_frames, budget, full_tokens=full, low_tokens=low)
        fitting = [n for n in range(1, num_frames + 1) if n * full + (num_frames - n) * low <= budget]
        # Where the full grid is not larger there is nothing to gain.
        assert number == (max(fitting, default=0) if full > low and budget > num_frames * low else 0)


@pytest.mark.parametrize(("num_frames", "num_tokens", "num_text"), [(1, 1, 1), (7, 12, 5), (4, 3, 1)])
def test_scores_equal_loops(num_frames: int, num_tokens: int, num_text: int) -> None:
    torch.manual_seed(42)
    low, text = torch.randn(num_frames, num_tokens, 16), torch.randn(num_text, 16)
    scores = query_scores(low, text)
    # float32 means of some hundred products.
    torch.testing.assert_close(scores, torch.tensor(naive_scores(low, text)), rtol=0, atol=1e-5, check_dtype=False)
    half = query_scores(low.bfloat16(), text.bfloat16())
    assert half.dtype == torch.float32
    assert torch.equal(half, query_scores(low.bfloat16().float(), text.bfloat16().float()))


def test_scores_without_text_are_equal() -> None:
    assert query_scores(torch.randn(3, 4, 8), torch.zeros(0, 8)).tolist() == [0.0] * 3


def test_the_best_frames_are_chosen_and_ties_go_to_the_earlier() -> None:
    scores = torch.tensor([0.5, 2.0, 0.5, -1.0, 2.0])
    wanted = {0: [], 1: [1], 2: [1, 4], 3: [0, 1, 4], 4: [0, 1, 2, 4], 5: [0, 1, 2, 3, 4], 9: [0, 1, 2, 3, 4], -2: []}
    for number, frames in wanted.items():
        assert choose_full_resolution(scores, number).nonzero()[:, 0].tolist() == frames
    assert choose_full_resolution(torch.zeros(40), 3).nonzero()[:, 0].tolist() == [0, 1, 2]


@pytest.mark.golden
@pytest.mark.parametrize(
    "folder", find_recorded("query_frame_scores", "query_selected_frames"), ids=lambda folder: folder.name
)
def test_selection_equals_the_original(folder: Path) -> None:
    case = load_recorded(folder)
    expected, config = case.expected, case.config
    low_side, num_frames = config["lowres_token"], len(expected["kept_frame_indices"])
    found = limits(
        config["tokenizer_model_max_length"],
        case.num_text + 1,
        reserve=config.get("inference_max_length", 16),
        full_tokens=config["image_token_len"],
        low_tokens=low_side**2,
    )
    assert choose_grid(num_frames, found, highres=config["highres"], **ORIGINAL) == "low"
    low_size = low_grid_size(*case.size, full_side=case.side, low_side=low_side)
    number = count_full_resolution(
        num_frames,
        case.budget,
        full_tokens=len(token_grid_index(*case.size, case.side)),
        low_tokens=len(token_grid_index(*low_size, low_side)),
    )
    chosen = choose_full_resolution(expected["query_frame_scores"], number).nonzero()[:, 0]
    assert chosen.tolist() == expected["query_selected_frames"].sort().values.tolist()

    ids = case.inputs["input_ids"][0]
    text = case.weights["embed_tokens.weight"][ids[int((ids < 0).nonzero()[-1]) + 1 :]]
    grids = expected["projected_low"].unflatten(1, (low_side, low_side))
    tokens = add_newlines(crop_grid(grids, *low_size), case.weights["image_newline"])
    recorded = expected["query_frame_scores"][: len(tokens)]
    torch.testing.assert_close(query_scores(tokens, text), recorded, rtol=0, atol=1e-4)  # sums in another order
