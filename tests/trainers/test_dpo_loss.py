"""The loss of preference optimisation against its formula, written out with plain numbers."""

import math

import pytest
import torch

from longvideo.trainers.dpo_loss import answer_log_probs, dpo_loss

PAIRS = [
    (-3.5, -7.25, -4.0, -6.5),
    (-10.0, -2.0, -9.5, -2.5),
    (-1.0, -1.0, -1.0, -1.0),
    (-300.0, -20.0, -100.0, -90.0),
]


def columns() -> list[torch.Tensor]:
    return [torch.tensor(column) for column in zip(*PAIRS, strict=True)]


@pytest.mark.parametrize(("beta", "smoothing"), [(0.1, 0.0), (0.5, 0.2), (2.0, 0.0)])
def test_sigmoid_loss_is_the_formula_of_trl(beta, smoothing):
    """-(1 - e) log s(b d) - e log s(-b d), d = (log p(c) - log p(r)) - (log q(c) - log q(r))."""
    wanted = []
    for chosen, rejected, ref_chosen, ref_rejected in PAIRS:
        delta = beta * ((chosen - rejected) - (ref_chosen - ref_rejected))

        def log_sigmoid(x: float) -> float:
            return min(x, 0.0) - math.log1p(math.exp(-abs(x)))

        wanted.append(-(1 - smoothing) * log_sigmoid(delta) - smoothing * log_sigmoid(-delta))
    found = dpo_loss(*columns(), beta=beta, label_smoothing=smoothing)
    # float32 against double.
    torch.testing.assert_close(found.losses, torch.tensor(wanted), rtol=1e-5, atol=1e-6)
    rewards = [(beta * (row[0] - row[2]), beta * (row[1] - row[3])) for row in PAIRS]
    both = torch.stack([found.chosen_rewards, found.rejected_rewards], dim=1)
    torch.testing.assert_close(both, torch.tensor(rewards), rtol=1e-5, atol=1e-6)


def test_ipo_loss_is_its_formula():
    wanted = [((row[0] - row[1]) - (row[2] - row[3]) - 1 / (2 * 0.25)) ** 2 for row in PAIRS]
    found = dpo_loss(*columns(), beta=0.25, loss_type="ipo").losses
    # float32 against double.
    torch.testing.assert_close(found, torch.tensor(wanted), rtol=1e-5, atol=1e-6)


def test_equal_ratios_give_ln_2_and_rewards_no_gradient():
    chosen = torch.tensor([-2.0, -5.0], requires_grad=True)
    found = dpo_loss(chosen, chosen.detach(), chosen.detach(), chosen.detach(), beta=0.3)
    assert found.losses.tolist() == pytest.approx([math.log(2)] * 2, abs=1e-7)  # float32
    assert not found.chosen_rewards.requires_grad and not found.rejected_rewards.requires_grad
    found.losses.sum().backward()
    # -beta times s(0).
    assert chosen.grad.tolist() == pytest.approx([-0.15, -0.15])


def test_unknown_loss_type():
    with pytest.raises(ValueError, match=r"loss_type='hinge' is unknown; use one of .*sigmoid.*ipo"):
        dpo_loss(*columns(), loss_type="hinge")


def test_answers_are_summed_token_by_token():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 7, 11, generator=generator)
    labels = torch.randint(0, 11, (3, 7), generator=generator)
    labels[0, :4] = labels[1, 2:5] = labels[2, 1:] = -100
    sums, counts = answer_log_probs(logits, labels)
    wanted, num = [], []
    for row, answer in zip(logits.double(), labels.tolist(), strict=True):
        found = [float(row[i - 1].log_softmax(-1)[answer[i]]) for i in range(1, 7) if answer[i] != -100]
        wanted.append(sum(found))
        num.append(len(found))
    # float32 against double.
    assert sums.tolist() == pytest.approx(wanted, rel=1e-5) and counts.tolist() == num == [3, 3, 0]


def test_models_may_read_labels_in_their_own_way():
    logits, labels = torch.zeros(2, 3, 5), torch.tensor([[-100, 4, 3], [-100, -100, 2]])
    values = torch.tensor([[0.0, 0.5, 0.25], [9.0, 9.0, 1.0]])
    sums, _ = answer_log_probs(logits, labels, values=values, token_log_probs=lambda x, ids, own: ids + own)
    assert sums.tolist() == [4.5 + 3.25, 3.0]


def test_labels_of_another_length_are_refused():
    with pytest.raises(ValueError, match=r"\(1, 4, 5\) and labels of shape \(1, 6\) do not fit"):
        answer_log_probs(torch.zeros(1, 4, 5), torch.zeros(1, 6, dtype=torch.int64))
