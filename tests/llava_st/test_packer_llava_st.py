"""Spatial-Temporal Packer of LLaVA-ST against unfolded regions and torch's multi-head attention."""

from collections.abc import Sequence

import pytest
import torch
from torch import nn

from longvideo.modeling.llava_st.packer_llava_st import (
    LlavaSTPacker,
    LlavaSTPackerLayer,
    cut_regions,
    init_packer_weights,
    pool_reduced,
    pool_regions,
    pool_streams,
)
from tests.reference.llava_st_packer import naive_pack_space, naive_pack_time, naive_packer

WIDTH, HIDDEN, HEADS = 7, 12, 3


def make_random(module: nn.Module) -> nn.Module:
    """Parameters far from their initial values, in double precision, so that only mistakes are left to see."""
    torch.manual_seed(42)
    for name, parameter in module.double().named_parameters():
        nn.init.normal_(parameter, std=0.5, mean=float("ln_" in name and name.endswith("weight")))
    return module


def assert_same_values_and_gradients(
    actual: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor], inputs: list[torch.Tensor]
) -> None:
    directions = [torch.randn_like(x) for x in wanted]
    for x, y in zip(actual, wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-10)  # sums in another order, in double precision
    grads = [
        torch.autograd.grad(sum((x * d).sum() for x, d in zip(outputs, directions, strict=True)), inputs)
        for outputs in (actual, wanted)
    ]
    for x, y in zip(*grads, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-8, atol=1e-8)  # as above, sums over all regions


@pytest.mark.parametrize("query", ["center", "average"])
@pytest.mark.parametrize(
    ("frames", "grid", "factor"), [(3, 9, 3), (1, 3, 3), (2, 4, 2), (1, 1, 1), (2, 10, 5), (1, 4, 4)]
)
def test_spatial_layer_equals_unfolded_regions(frames: int, grid: int, factor: int, query: str) -> None:
    layer = make_random(LlavaSTPackerLayer(WIDTH, HIDDEN, HEADS, spatial_factor=factor, query=query))
    x = torch.randn(frames, grid**2, WIDTH, dtype=torch.float64, requires_grad=True)
    parameters = dict(layer.named_parameters())
    wanted = naive_pack_space(parameters, x, factor, HEADS, query)
    assert wanted.shape == (frames, (grid // factor) ** 2, WIDTH)
    assert_same_values_and_gradients([layer(x)], [wanted], [x, *parameters.values()])


@pytest.mark.parametrize("query", ["center", "average"])
@pytest.mark.parametrize(("frames", "patches", "factor"), [(10, 4, 5), (5, 1, 5), (4, 3, 2), (3, 9, 1), (8, 7, 4)])
def test_temporal_layer_equals_regions_of_each_patch(frames: int, patches: int, factor: int, query: str) -> None:
    layer = make_random(LlavaSTPackerLayer(WIDTH, HIDDEN, HEADS, temporal_factor=factor, query=query))
    x = torch.randn(frames, patches, WIDTH, dtype=torch.float64, requires_grad=True)
    parameters = dict(layer.named_parameters())
    wanted = naive_pack_time(parameters, x, factor, HEADS, query)
    assert wanted.shape == (frames // factor, patches, WIDTH)
    assert_same_values_and_gradients([layer(x)], [wanted], [x, *parameters.values()])


@pytest.mark.parametrize(("spatial", "temporal", "frames", "grid"), [(3, 5, 10, 9), (2, 2, 4, 8), (1, 3, 3, 2)])
@pytest.mark.parametrize("query", ["center", "average"])
def test_packer_equals_reference(spatial: int, temporal: int, frames: int, grid: int, query: str) -> None:
    factors = {"spatial_factor": spatial, "temporal_factor": temporal}
    packer = make_random(LlavaSTPacker(WIDTH, HIDDEN, HEADS, **factors, query=query))
    x = torch.randn(frames, grid**2, WIDTH, dtype=torch.float64, requires_grad=True)
    parameters = dict(packer.named_parameters())
    wanted = naive_packer(parameters, x, **factors, heads=HEADS, query=query)
    assert [y.shape[:2] for y in wanted] == [
        (frames, (grid // spatial**2) ** 2),
        (frames // temporal, (grid // spatial) ** 2),
    ]
    assert_same_values_and_gradients(packer(x), wanted, [x, *parameters.values()])


def test_image_keeps_its_one_frame() -> None:
    packer = make_random(LlavaSTPacker(WIDTH, HIDDEN, HEADS, spatial_factor=3, temporal_factor=5))
    x = torch.randn(1, 81, WIDTH, dtype=torch.float64)
    wanted = naive_packer(dict(packer.named_parameters()), x, spatial_factor=3, temporal_factor=1, heads=HEADS)
    for actual, expected in zip(packer(x), wanted, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)  # as above
    assert [len(y) for y in pool_streams(x, spatial_factor=3, temporal_factor=5)] == [1, 1]


def test_equal_keys_share_their_weight() -> None:
    layer = make_random(LlavaSTPackerLayer(WIDTH, HIDDEN, HEADS, spatial_factor=3))
    x = torch.randn(1, 1, WIDTH, dtype=torch.float64).expand(2, 9, WIDTH)
    alone = make_random(LlavaSTPackerLayer(WIDTH, HIDDEN, HEADS))
    # Nine equal keys weigh what one does.
    torch.testing.assert_close(layer(x), alone(x[:, :1]), rtol=0, atol=1e-12)


def test_center_of_released_factors_is_an_element() -> None:
    x = torch.arange(10 * 81).view(10, 81, 1)
    middle = pool_regions(x, spatial_factor=3)[0, :, 0]
    assert middle.tolist() == [9 * r + c for r in (1, 4, 7) for c in (1, 4, 7)]
    assert pool_regions(x, temporal_factor=5)[:, 0, 0].tolist() == [2 * 81, 7 * 81]
    half = torch.randn(4, 16, 3).half()
    for query in ("center", "average"):
        pooled = pool_regions(half, temporal_factor=2, spatial_factor=2, query=query)
        wanted = half.double().view(2, 2, 2, 2, 2, 2, 3).mean((1, 3, 5)).flatten(1, 2)
        assert pooled.dtype == torch.float16
        # A mean is rounded once, one of means three times; half has 11 bits.
        torch.testing.assert_close(pooled.double(), wanted, rtol=0, atol=4e-3)


def test_regions_are_contiguous_blocks() -> None:
    x = torch.arange(4 * 36).view(4, 36, 1)
    regions = cut_regions(x, temporal_factor=2, spatial_factor=3)[..., 0]
    assert regions.shape == (2, 4, 18)
    wanted = [36 * (2 + t) + 6 * (3 + a) + b for t in range(2) for a in range(3) for b in range(3)]
    assert regions[1, 2].tolist() == wanted
    time = cut_regions(x, temporal_factor=4)
    assert time.shape == (1, 36, 4, 1)
    assert time.data_ptr() == x.data_ptr()  # cutting only time copies nothing


@pytest.mark.parametrize("chunk_tokens", [1, 81, 200, 10**9])
def test_chunks_do_not_change_results(chunk_tokens: int) -> None:
    sizes = {"spatial_factor": 3, "temporal_factor": 5}
    packer = make_random(LlavaSTPacker(WIDTH, HIDDEN, HEADS, **sizes))
    chunked = LlavaSTPacker(WIDTH, HIDDEN, HEADS, **sizes, chunk_tokens=chunk_tokens).double()
    chunked.load_state_dict(packer.state_dict())
    x = torch.randn(10, 81, WIDTH, dtype=torch.float64)
    for actual, wanted in zip(chunked(x), packer(x), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-12)  # matrix products of other sizes
    # Frames that a caller reduces piece by piece give the same streams.
    pieces = torch.cat([packer.spatial(piece) for piece in x.split(3)])
    fast, slow = packer.streams(pieces, with_fast=False)
    assert fast is None
    torch.testing.assert_close(slow, packer(x)[1], rtol=0, atol=1e-12)


def test_chunks_bound_the_keys_of_one_call() -> None:
    layer = LlavaSTPackerLayer(WIDTH, HIDDEN, HEADS, temporal_factor=2, chunk_tokens=9)
    seen = []
    layer.to_k.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[:2].numel()))
    layer(torch.randn(8, 4, WIDTH))
    assert seen == [8, 8, 8, 8]
    seen.clear()
    layer(torch.randn(8, 2, WIDTH))
    assert seen == [8, 8]  # two whole groups of two frames


def test_pooled_streams_have_the_packers_lengths() -> None:
    x = torch.randn(10, 81, WIDTH, dtype=torch.float64)
    sizes = {"spatial_factor": 3, "temporal_factor": 5}
    fast, slow = pool_streams(x, **sizes)
    packed = LlavaSTPacker(WIDTH, HIDDEN, HEADS, **sizes).double()(x)
    assert [fast.shape, slow.shape] == [y.shape for y in packed]
    grid = x.view(2, 5, 3, 3, 3, 3, WIDTH)
    # Means of means, in double precision.
    torch.testing.assert_close(slow, grid.mean((1, 3, 5)).flatten(1, 2), rtol=0, atol=1e-12)
    torch.testing.assert_close(fast, x.mean(1, keepdim=True), rtol=0, atol=1e-12)
    reduced = torch.cat([pool_regions(piece, spatial_factor=3, query="average") for piece in x.split(4)])
    for actual, wanted in zip(pool_reduced(reduced, **sizes), (fast, slow), strict=True):
        assert torch.equal(actual, wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_close(dtype: torch.dtype) -> None:
    packer = make_random(LlavaSTPacker(16, 16, 4, spatial_factor=3, temporal_factor=5))
    for parameter in packer.parameters():
        parameter.data.mul_(0.5)
    x = torch.randn(5, 81, 16, dtype=torch.float64)
    wanted = packer(x)
    for actual, expected in zip(packer.to(dtype)(x.to(dtype)), wanted, strict=True):
        assert actual.dtype == dtype
        # Some dozen roundings to 11 or 8 bits of values of size 1 to 4.
        tolerance = 0.02 if dtype == torch.float16 else 0.15
        torch.testing.assert_close(actual.double(), expected, rtol=0, atol=tolerance)


def test_autocast_is_close() -> None:
    packer = make_random(LlavaSTPacker(16, 16, 4, spatial_factor=3, temporal_factor=5)).float()
    for parameter in packer.parameters():
        parameter.data.mul_(0.5)
    x = torch.randn(5, 81, 16)
    wanted = packer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = packer(x)
    for y, expected in zip(actual, wanted, strict=True):
        torch.testing.assert_close(y.float(), expected, rtol=0, atol=0.15)  # some dozen roundings to 8 bits


def test_key_bias_cannot_matter() -> None:
    layer = make_random(LlavaSTPackerLayer(WIDTH, HIDDEN, HEADS, spatial_factor=3))
    x = torch.randn(1, 9, WIDTH, dtype=torch.float64)
    gradient = torch.autograd.grad(layer(x).square().sum(), layer.attn.in_proj_bias)[0]
    query, key, value = gradient.chunk(3)
    assert query.abs().min() > 0 and value.abs().min() > 0
    assert not key.any()


def test_layer_has_the_names_of_the_original() -> None:
    layer = LlavaSTPackerLayer(WIDTH, HIDDEN, HEADS)
    names = {f"to_{x}.{i}.{part}" for x in "qkv" for i in (0, 2) for part in ("weight", "bias")}
    names |= {f"ln_{x}.{part}" for x in "qkv" for part in ("weight", "bias")}
    names |= {"attn.in_proj_weight", "attn.in_proj_bias", "attn.out_proj.weight", "attn.out_proj.bias"}
    names |= {"to_out.weight"}
    state = layer.state_dict()
    assert set(state) == names and len(names) == 23
    assert state["attn.in_proj_weight"].shape == (3 * HIDDEN, HIDDEN)
    packer = LlavaSTPacker(WIDTH, HIDDEN, HEADS, spatial_factor=3, temporal_factor=5)
    assert {name.split(".")[0] for name in packer.state_dict()} == {"spatial", "temporal", "fast"}
    with torch.device("meta"):
        released = LlavaSTPacker(3584, 1024, 8, spatial_factor=3, temporal_factor=5)
    # The table of tensors of the published 7B checkpoint: 3 packers of 23 tensors, 66.1 M values.
    assert len(released.state_dict()) == 69
    assert sum(p.numel() for p in released.parameters()) == 66_109_440


def test_initial_weights() -> None:
    layer = make_random(LlavaSTPackerLayer(32, 64, 4)).float()
    init_packer_weights(nn.Linear(2, 2))  # any other module may be passed
    before = layer.to_q[0].weight.clone()
    init_packer_weights(layer.to_q[0])
    assert torch.equal(layer.to_q[0].weight, before)
    init_packer_weights(layer)
    for name, parameter in layer.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif name.startswith("ln_"):
            assert (parameter == 1).all(), name
        elif name == "attn.in_proj_weight":
            limit = (6 / (4 * 64)) ** 0.5
            assert 0.9 * limit < parameter.abs().max() <= limit, name
        else:
            assert 0.017 < parameter.std() < 0.023, name  # 2048 values or more: 2 % either way is one sigma and more


def test_packer_errors() -> None:
    packer = LlavaSTPacker(WIDTH, HIDDEN, HEADS, spatial_factor=3, temporal_factor=5)
    with pytest.raises(ValueError, match=r"7 frames .* groups of 5.*multiple of 5"):
        packer(torch.randn(7, 81, WIDTH))
    with pytest.raises(ValueError, match=r"36 patches .* 4 x 4.*multiple of 4"):
        cut_regions(torch.randn(5, 36, WIDTH), spatial_factor=4)
    with pytest.raises(ValueError, match=r"8 patches .*square"):
        packer(torch.randn(5, 8, WIDTH))
    with pytest.raises(ValueError, match="at least 1"):
        cut_regions(torch.randn(1, 9, 1), spatial_factor=0)
    with pytest.raises(ValueError, match="center, average, got 'mean'"):
        LlavaSTPackerLayer(WIDTH, HIDDEN, HEADS, query="mean")
    with pytest.raises(ValueError, match="center, average"):
        pool_regions(torch.randn(1, 9, 1), spatial_factor=3, query="max")
    with pytest.raises(ValueError, match="12 cannot be cut into 5 heads"):
        LlavaSTPackerLayer(WIDTH, HIDDEN, 5)
    with pytest.raises(ValueError, match="chunk_tokens"):
        LlavaSTPackerLayer(WIDTH, HIDDEN, HEADS, chunk_tokens=0)
