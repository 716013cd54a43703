"""Equations 9 and 10 against naive loops, and which policy wins over which."""

import math
import random

import pytest
import torch

from longvideo.trainers.cross_granularity_loss import Choice, choose_policies, preference_loss, supervised_loss
from tests.reference.crossvllm_losses import algorithm_1_choice, equation_9, equation_10

# float32 sums of a few dozen terms against double precision
TOLERANCE = 1e-5


def test_equation_9_is_the_mean_over_the_answer_of_each_row():
    torch.manual_seed(0)
    logits = torch.randn(3, 9, 11)
    ids = torch.randint(0, 11, (3, 9))
    labels = ids.clone()
    begins, ends = (2, 5, 8), (9, 7, 9)
    for row, (begin, end) in enumerate(zip(begins, ends, strict=True)):
        labels[row, :begin] = -100
        labels[row, end:] = -100
    expected = [
        equation_9(logits[row].tolist(), ids[row, :end].tolist(), begin)
        for row, (begin, end) in enumerate(zip(begins, ends, strict=True))
    ]
    assert supervised_loss(logits, labels).tolist() == pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_equation_10_is_the_mean_over_losers(beta):
    policy, reference = torch.tensor([-3.0, -9.0, -4.5, -7.0]), torch.tensor([-4.0, -8.0, -4.5, -9.5])
    found = preference_loss(policy, reference, Choice(2, (0, 1, 3)), beta=beta)
    expected = equation_10(policy.tolist(), reference.tolist(), 2, [0, 1, 3], beta)
    assert found.losses.shape == (3,)
    assert float(found.losses.mean()) == pytest.approx(expected, abs=TOLERANCE)


def test_a_fresh_reference_gives_ln_2_and_a_gradient_that_beta_scales():
    gradients = []
    for beta in (0.1, 0.2):
        policy = torch.tensor([-3.0, -9.0, -4.5], requires_grad=True)
        loss = preference_loss(policy, policy.detach(), Choice(1, (0, 2)), beta=beta).losses.mean()
        assert float(loss.detach()) == pytest.approx(math.log(2), abs=1e-7)
        gradients.append(torch.autograd.grad(loss, policy)[0])
    # half of beta for the winner, shared by the losers
    torch.testing.assert_close(gradients[0], torch.tensor([0.025, -0.05, 0.025]))
    torch.testing.assert_close(gradients[1], 2 * gradients[0])


@pytest.mark.parametrize(
    ("scores", "keys", "readable", "expected"),
    [
        ([3.0, 1.0, 2.0], "abc", [True] * 3, (1, (0, 2))),
        ([1.0, 1.0, 2.0], "abc", [True] * 3, (0, (1, 2))),  # a tie: the first
        ([0.5, 1.0, 2.0], "abc", [False, True, True], (1, (0, 2))),  # what cannot be read does not win
        ([0.5, 1.0], "ab", [False, False], (0, (1,))),  # unless nothing can
        ([3.0, 1.0, 1.0, 3.0], "abba", [True] * 4, (1, (0,))),  # the same segment counts once
        ([1.0, 1.0, 1.0], "aaa", [True] * 3, (0, ())),
        ([2.0], "a", [True], (0, ())),
    ],
)
def test_winner_and_losers(scores, keys, readable, expected):
    assert choose_policies(scores, well_formed=readable, keys=list(keys)) == expected
    assert algorithm_1_choice(scores, list(keys), readable) == (expected[0], list(expected[1]))


@pytest.mark.parametrize("scores", [[math.nan, 1.0, 0.5], [1.0, math.nan, 0.5], [1.0, math.inf, 0.5]])
def test_what_is_no_number_does_not_win(scores):
    assert choose_policies(scores, well_formed=[True] * 3) == (2, (0, 1))


def test_the_choice_is_that_of_the_algorithm():
    dice = random.Random(0)
    for _ in range(200):
        count = dice.randint(1, 5)
        readable = [dice.random() < 0.7 for _ in range(count)]
        segments = [(dice.randint(0, 2), 9) if fine else (0, 9) for fine in readable]
        per_segment = {segment: dice.randint(0, 2) for segment in segments}
        scores = [per_segment[segment] for segment in segments]
        winner, losers = algorithm_1_choice(scores, segments, readable)
        found = choose_policies(scores, well_formed=readable, keys=list(zip(segments, readable, strict=True)))
        assert found == (winner, tuple(losers))


def test_lists_that_do_not_fit():
    with pytest.raises(ValueError, match="2 scores, 1 states and 2 keys"):
        choose_policies([1.0, 2.0], well_formed=[True])
    with pytest.raises(ValueError, match="0 scores"):
        choose_policies([], well_formed=[])
