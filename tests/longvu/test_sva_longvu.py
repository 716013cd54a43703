"""Spatial vision aggregation and the grid rules of LongVU against naive loops and recorded tensors."""

from pathlib import Path

import pytest
import torch

from longvideo.modeling.longvu.sva_longvu import (
    LongVUVisionTokenSampler,
    add_newlines,
    block_mask,
    crop_grid,
    grid_padding_mask,
    low_grid_size,
    padding_of_grid,
    resize_grid,
    token_grid_index,
)
from tests.reference.longvu_recorded import find_recorded, load_recorded
from tests.reference.longvu_sva import naive_grid_tokens, naive_padding, naive_resize, naive_sampler
from tests.tiny_longvu import tiny_longvu_config

# Square, landscape, portrait, odd ratios, and frames so flat or narrow that whole rows of blocks hold only padding or
# that nothing is left.
SIZES = [(10, 10), (16, 9), (9, 16), (13, 7), (7, 11), (100, 30), (30, 100), (1000, 1), (1, 1000)]


def make_sampler(side: int, grid: int, **kwargs) -> LongVUVisionTokenSampler:
    """A random sampler in double precision, so that only mistakes are left to see."""
    torch.manual_seed(42)
    config = tiny_longvu_config(image_token_len=side**2, vision_grid_size=grid, lowres_token=1, **kwargs)
    sampler = LongVUVisionTokenSampler(config).double()
    for name, parameter in sampler.named_parameters():
        torch.nn.init.normal_(parameter, std=0.3, mean=float(name.endswith(("norm.weight", ".0.weight"))))
    return sampler


@pytest.mark.parametrize("shared_query", [True, False])
@pytest.mark.parametrize(
    ("side", "grid", "sizes"),
    [
        (3, 6, [(16, 9), (9, 16)]),  # partly and wholly masked blocks
        (2, 6, [(1000, 1), (10, 10)]),  # r = 3; nothing is left of the first frame
        (4, 4, [(13, 7), (1, 1000)]),  # image checkpoints: one key per tower, no positions
        (1, 4, [(100, 30)]),
    ],
)
def test_sampler_equals_loops(side: int, grid: int, sizes: list[tuple[int, int]], shared_query: bool) -> None:
    sampler = make_sampler(side, grid)
    features = [torch.randn(len(sizes), grid**2, 32, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    query = torch.randn(*([] if shared_query else [side**2]), 32, dtype=torch.float64, requires_grad=True)
    masks = [naive_padding(*size, grid) for size in sizes]
    weights, heads = dict(sampler.named_parameters()), sampler.layers[0].cross_attn.num_heads
    wanted = naive_sampler(weights, query.expand(side**2, -1), features, masks, heads)
    actual = sampler(query, features, torch.stack([grid_padding_mask(*size, grid) for size in sizes]))
    # Sums in another order, in double precision.
    torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-10)

    inputs = [query, *features, *sampler.parameters()]
    direction = torch.randn_like(wanted)
    wanted_grads = torch.autograd.grad((wanted * direction).sum(), inputs)
    actual_grads = torch.autograd.grad((actual * direction).sum(), inputs)
    for wanted_grad, actual_grad in zip(wanted_grads, actual_grads, strict=True):
        torch.testing.assert_close(actual_grad, wanted_grad, rtol=1e-8, atol=1e-8)  # as above, sums of some thousand


def test_sampler_without_mask_and_one_mask_for_all() -> None:
    sampler = make_sampler(3, 6)
    features = [torch.randn(3, 36, 32, dtype=torch.float64) for _ in range(2)]
    query = torch.randn(1, 32, dtype=torch.float64)
    ones = torch.ones(3, 6, 6, dtype=torch.bool)
    assert torch.equal(sampler(query, features), sampler(query, features, ones))
    mask = grid_padding_mask(16, 9, 6)[None]
    assert torch.equal(sampler(query, features, mask), sampler(query, features, mask.expand(3, -1, -1)))
    assert not torch.allclose(sampler(query, features, mask), sampler(query, features))


def test_sampler_frames_are_independent(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = make_sampler(3, 6)
    features = [torch.randn(5, 36, 32, dtype=torch.float64) for _ in range(2)]
    query = torch.randn(32, dtype=torch.float64)
    mask = torch.stack([grid_padding_mask(*size, 6) for size in SIZES[:5]])
    whole = sampler(query, features, mask)
    for i in range(5):
        one = sampler(query, [tower[i : i + 1] for tower in features], mask[i : i + 1])
        # Matrix products of other sizes sum in another order.
        torch.testing.assert_close(one[0], whole[i], rtol=0, atol=1e-12)
    # The pieces of attention do not change anything either; 5 * 9 rows in pieces of 7.
    monkeypatch.setattr("longvideo.modeling.longvu.sva_longvu.MAX_ATTENTION_ROWS", 7)
    torch.testing.assert_close(sampler(query, features, mask), whole, rtol=0, atol=1e-12)
    torch.testing.assert_close(sampler(query, features), sampler(query, features, mask | True), rtol=0, atol=1e-12)


def test_masked_keys_have_no_influence() -> None:
    sampler = make_sampler(3, 6)
    mask = grid_padding_mask(16, 9, 6)  # one row at the top and at the bottom: halves of blocks
    assert not mask[0].any() and mask[1].all()
    features = [torch.randn(1, 36, 32, dtype=torch.float64) for _ in range(2)]
    query = torch.randn(32, dtype=torch.float64)
    changed = [tower.clone() for tower in features]
    changed[1][0, :6] += 3.0  # DINOv2 keys do not enter the context
    assert torch.equal(sampler(query, features, mask[None]), sampler(query, changed, mask[None]))
    assert not torch.equal(sampler(query, features), sampler(query, changed))


def test_sampler_has_the_names_of_the_original() -> None:
    names = set(make_sampler(3, 6, connector_depth=1).state_dict())
    attention = {f"{kind}_proj_{t}" for kind in "kv" for t in range(2)} | {"q_proj"}
    expected = {"pos_embed_0", "pos_embed_1", "proj_context.weight", "proj_in.weight", "norm.weight", "norm.bias"}
    expected |= {"proj_out.linear_1.weight", "proj_out.linear_2.weight", "cross_attn.o_proj.weight"}
    expected |= {f"cross_attn.{name}.{part}" for name in attention for part in ("0.weight", "0.bias", "1.weight")}
    assert names == {f"layers.0.{name}" for name in expected}
    assert not [name for name in make_sampler(3, 3).state_dict() if "pos_embed" in name]


def test_sampler_errors() -> None:
    sampler = make_sampler(3, 6).float()
    features = [torch.randn(2, 36, 32) for _ in range(2)]
    with pytest.raises(ValueError, match="1 or 9 queries, got 4"):
        sampler(torch.randn(4, 32), features)
    with pytest.raises(ValueError, match=r"\(2, 25, 32\)"):
        sampler(torch.randn(32), [features[0], torch.randn(2, 25, 32)])
    with pytest.raises(ValueError, match=r"\(2, 36, 32\) each, got .*grid of side 6"):
        sampler(torch.randn(32), [torch.randn(2, 25, 32), torch.randn(2, 25, 32)])
    with pytest.raises(ValueError, match="2 towers"):
        sampler(torch.randn(32), features[:1])
    with pytest.raises(ValueError, match="mask"):
        sampler(torch.randn(32), features, torch.ones(3, 6, 6, dtype=torch.bool))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("side", [1, 2, 3, 8, 12, 24])
def test_padding_and_crop_equal_loops(size: tuple[int, int], side: int) -> None:
    assert grid_padding_mask(*size, side).tolist() == naive_padding(*size, side)
    for newline in (True, False):
        assert token_grid_index(*size, side, newline=newline).tolist() == naive_grid_tokens(*size, side, newline)


def test_padding_rounds_like_the_original() -> None:
    # 220 of 352 is 15 of 24 rows exactly; in floating point it is a hair less, which makes 14 and 5 rows of padding.
    assert 220 * 24 / 352 == 15
    assert padding_of_grid(352, 220, 24) == (5, 0)
    assert padding_of_grid(220, 352, 24) == (0, 5)
    assert padding_of_grid(588, 49, 12) == (6, 0)  # 1 of 12 rows becomes none, so that the crop leaves all
    assert len(token_grid_index(588, 49, 12)) == 156
    assert padding_of_grid(16, 9, 24) == (5, 0)  # 13.5 rows are cut to 13, the odd row stays
    assert padding_of_grid(7, 7, 24) == (0, 0)
    with pytest.raises(ValueError, match="width 0 and height 5"):
        padding_of_grid(0, 5, 24)


@pytest.mark.parametrize(
    ("size", "full", "low", "image"),
    [
        ((384, 384), 156, 72, 600),
        ((720, 1280), 84, 40, None),  # landscape given as (height, width), as the original's video scripts do
        ((1280, 720), 78, None, 350),
        ((480, 640), 132, 56, None),
        ((640, 480), 130, None, 450),
        ((1280, 720)[::-1], 84, 40, 360),
    ],
)
def test_tokens_per_frame(size: tuple[int, int], full: int, low: int | None, image: int | None) -> None:
    assert len(token_grid_index(*size, 12)) == full
    if low is not None:
        assert len(token_grid_index(*low_grid_size(*size, full_side=12, low_side=8), 8)) == low
    if image is not None:
        assert len(token_grid_index(*size, 24)) == image


def test_crop_and_newlines_keep_the_order() -> None:
    tokens = torch.arange(2 * 16, dtype=torch.float32).view(2, 4, 4, 1).expand(-1, -1, -1, 3)
    newline = torch.full((3,), -7.0)
    for size in SIZES:
        index = token_grid_index(*size, 4)
        flat = add_newlines(crop_grid(tokens, *size), newline)
        for frame in range(2):
            wanted = torch.where(index < 0, -7.0, index + 16.0 * frame)
            assert torch.equal(flat[frame], wanted[:, None].expand(-1, 3))
    assert add_newlines(crop_grid(tokens, 16, 9), None).shape == (2, 8, 3)
    assert add_newlines(tokens.half(), newline).dtype == torch.float16
    assert low_grid_size(1, 1, full_side=12, low_side=8) == (1, 1)
    assert low_grid_size(1280, 720, full_side=12, low_side=8) == (853, 480)


@pytest.mark.parametrize(("old", "side"), [(12, 8), (3, 2), (6, 4), (27, 24), (1, 2), (5, 5), (3, 1)])
def test_resize_grid_equals_loops(old: int, side: int) -> None:
    torch.manual_seed(42)
    tokens = torch.randn(2, old**2, 5)
    actual = resize_grid(tokens, side)
    wanted = torch.stack([naive_resize(frame, side) for frame in tokens])
    torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-5)  # float32 weights of the interpolation
    half = resize_grid(tokens.half(), side)
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.float(), wanted, rtol=0, atol=4e-3)  # half rounds the input and the result
    with pytest.raises(ValueError, match="got 7 tokens"):
        resize_grid(torch.randn(1, 7, 3), 2)


def test_blocks_of_padding_see_everything() -> None:
    blocks = block_mask(torch.stack([grid_padding_mask(100, 30, 6), grid_padding_mask(1000, 1, 6)]), 3)
    assert blocks.shape == (2, 9, 4)
    assert blocks[0].tolist() == [[True] * 4] * 9  # rows 2 and 3 show the frame; the other blocks are all padding
    assert blocks[1].all()
    half = block_mask(grid_padding_mask(16, 9, 6)[None], 3)[0]  # rows 1 to 4
    assert half.tolist() == [[False, False, True, True]] * 3 + [[True] * 4] * 3 + [[True, True, False, False]] * 3


@pytest.mark.golden
@pytest.mark.parametrize(
    "folder", find_recorded("sva_output", "siglip_features", "dino_features"), ids=lambda p: p.name
)
def test_sampler_equals_the_original(folder: Path) -> None:
    case = load_recorded(folder)
    expected, config = case.expected, case.config
    kept = expected.get("kept_frame_indices", torch.arange(1)).tolist()
    # Recorded are the first frames of the video for DINOv2 and the first kept frames for SigLIP.
    pairs = [(k, f) for k, f in enumerate(kept[: len(expected["sva_output"])]) if f < len(expected["dino_features"])]
    if not pairs:
        pytest.skip("None of the recorded DINOv2 features belongs to a recorded kept frame.")
    rows, frames = (list(x) for x in zip(*pairs, strict=True))
    features = [
        case.project("mm_projector_aux_0", expected["siglip_features"][rows]),
        case.project("mm_projector_aux_1", expected["dino_features"][frames]),
    ]
    sampler = LongVUVisionTokenSampler(
        tiny_longvu_config(
            vision_hidden_size=config["vision_hidden_size"],
            vision_grid_size=round(config["mm_vision_tower_aux_token_len_list"][0] ** 0.5),
            image_token_len=config["query_num_list"][0],
            connector_depth=config["connector_depth"],
            connector_num_heads=16,  # a constant of the original
            lowres_token=config["lowres_token"],
        )
    )
    start = "vision_sampler_0."
    sampler.load_state_dict({k.removeprefix(start): v for k, v in case.weights.items() if k.startswith(start)})
    mask = grid_padding_mask(*case.size, sampler.grid)[None]
    for name in ("sva_mask_siglip_frame0", "sva_mask_dino_frame0"):
        assert torch.equal(block_mask(mask, sampler.side)[0], expected[name].bool()), name
    with torch.no_grad():
        actual = sampler(case.weights["vision_query"][0], features, mask)
    # float32 on both sides, sums in another order.
    torch.testing.assert_close(actual, expected["sva_output"][rows], rtol=0, atol=1e-4)


@pytest.mark.golden
@pytest.mark.parametrize("folder", find_recorded("sva_output", "visual_token_grid_index"), ids=lambda p: p.name)
def test_grids_equal_the_original(folder: Path) -> None:
    case = load_recorded(folder)
    expected, low_side = case.expected, case.config["lowres_token"]
    low_size = low_grid_size(*case.size, full_side=case.side, low_side=low_side)
    of_full, of_low = token_grid_index(*case.size, case.side), token_grid_index(*low_size, low_side)
    if "projected_low" in expected:
        low = case.project("mm_projector", resize_grid(expected["sva_output"], low_side))
        torch.testing.assert_close(low, expected["projected_low"], rtol=0, atol=1e-4)  # sums in another order
    if "stc_keep_mask_final_0" in expected:
        assert expected["stc_keep_mask_final_0"].shape[1] in (len(of_full), len(of_low))
        return
    frames, is_full = expected["visual_token_frame"], expected["visual_token_is_full_grid"].bool()
    for frame in frames.unique().tolist():
        own = frames == frame
        wanted = of_full if is_full[own][0] else of_low
        assert expected["visual_token_grid_index"][own].tolist() == wanted.tolist()
