"""Token merging against the naive loop: values, order, groups and gradients."""

import pytest
import torch

from longvideo.modeling.layers.chunked import iterate_chunks, map_chunks
from longvideo.modeling.layers.token_merging import merge_schedule, merge_tokens
from tests.reference.token_merging import naive_merge_tokens


@pytest.mark.parametrize(
    ("num_tokens", "num_target", "expected"),
    [
        (784, 64, [392, 196, 98, 34]),
        (3136, 64, [1568, 784, 392, 196, 98, 34]),
        (1024, 64, [512, 256, 128, 64]),
        (196, 64, [98, 34]),
        (1296, 64, [648, 324, 162, 81, 17]),
    ],
)
def test_schedule_of_the_published_sizes(num_tokens, num_target, expected):
    assert merge_schedule(num_tokens, num_target) == expected


@pytest.mark.parametrize("num_tokens", [64, 63, 0])
def test_schedule_refuses_a_target_that_is_not_smaller(num_tokens):
    with pytest.raises(ValueError, match=rf"{num_tokens} tokens and a target of 64"):
        merge_schedule(num_tokens, 64)


@pytest.mark.parametrize(("num_tokens", "num_target"), [(7, 3), (63, 5), (64, 9), (65, 64), (2, 1), (100, 16)])
@pytest.mark.parametrize("num_clips", [1, 3])
def test_equals_naive_loop_with_gradients(num_tokens, num_target, num_clips):
    x = torch.randn(num_clips, num_tokens, 12, dtype=torch.float32, requires_grad=True)
    merge = merge_tokens(x, num_target, num_heads=3)
    weight = torch.randn_like(merge.merged_BME)
    (gradient,) = torch.autograd.grad((merge.merged_BME * weight).sum(), x)

    y = x.detach().clone().requires_grad_()
    naive = [naive_merge_tokens(clip, num_target, 3) for clip in y]
    (naive_gradient,) = torch.autograd.grad(sum((m * w).sum() for (m, _, _), w in zip(naive, weight, strict=True)), y)
    assert merge.groups_BN.tolist() == [groups for _, _, groups in naive]
    assert merge.sizes_BM.tolist() == [sizes for _, sizes, _ in naive]
    # Sums in another order: fp32 rounding only.
    torch.testing.assert_close(merge.merged_BME, torch.stack([m for m, _, _ in naive]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradient, naive_gradient, atol=1e-5, rtol=1e-5)


def test_ties_are_resolved_by_position():
    x = torch.ones(1, 12, 4)
    x[0, 6:] = torch.tensor([1.0, -1.0, 1.0, -1.0])
    merge = merge_tokens(x, 5, num_heads=1)
    _, sizes, groups = naive_merge_tokens(x[0], 5, 1)
    assert merge.groups_BN[0].tolist() == groups
    assert merge.sizes_BM[0].tolist() == sizes


def test_zero_tokens_stay_finite():
    merge = merge_tokens(torch.zeros(1, 16, 8), 4, num_heads=2)
    assert torch.isfinite(merge.merged_BME).all()
    assert merge.sizes_BM.sum() == 16


def test_merged_tokens_are_means_of_their_groups():
    x = torch.randn(2, 50, 6)
    merge = merge_tokens(x, 11, num_heads=2)
    for clip in range(2):
        for group in range(11):
            members = x[clip][merge.groups_BN[clip] == group]
            # fp32 rounding of a mean over at most 40 values.
            torch.testing.assert_close(merge.merged_BME[clip, group], members.mean(0), atol=1e-5, rtol=1e-5)


def test_width_must_divide_by_heads():
    with pytest.raises(ValueError, match="width 7 is not a multiple of the tower's 2 heads"):
        merge_tokens(torch.randn(1, 8, 7), 4, num_heads=2)


def test_chunks_cover_everything_once():
    x = torch.randn(7, 3)
    assert [len(piece) for piece in iterate_chunks(x, 3)] == [3, 3, 1]
    assert torch.equal(map_chunks(lambda piece: piece * 2, x, 3), x * 2)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        list(iterate_chunks(x, 0))
