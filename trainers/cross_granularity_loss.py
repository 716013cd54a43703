"""What cross-granularity training minimises, as functions of tensors.

Shape legend: B answers, K policies of a question, S positions of a sequence, V columns of the logits.
"""

import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch

from longvideo.trainers.dpo_loss import PreferenceLoss, answer_log_probs, dpo_loss


class Choice(NamedTuple):
    """The best of a question's policies and those that it is compared with, by their positions."""

    winner: int
    losers: tuple[int, ...]


def supervised_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of answers.

    Args:
        logits: (B, S, V); position s predicts the label of position s + 1.
        labels: (B, S) token ids, -100 where nothing is counted; every row has a counted token behind its first.

    Returns:
        (B,) float32, the mean over the tokens of each answer.

    Source: CrossVLLM Eq. 9, and the score L_j of Algorithm 1.
    Differs: The paper does not say whether tokens are summed or averaged; averaged, so that long answers count alike.
    """
    sums_B, counts_B = answer_log_probs(logits, labels)
    return -sums_B / counts_B


def preference_loss(
    policy: torch.Tensor, reference: torch.Tensor, choice: Choice, *, beta: float = 0.1
) -> PreferenceLoss:
    """Losses of the best policy of a question against each of the others.

    Args:
        policy: (K,) log-likelihoods of the policies, summed over their tokens, under the coarse module.
        reference: (K,) the same under the reference.
        choice: Winner and losers among the K, at least one loser.
        beta: How strongly the coarse module is held to the reference.

    Returns:
        Losses and rewards, one per loser; the loss of the question is their mean.

    Source: CrossVLLM Eq. 10 and Algorithm 1.
    Differs: The mean over losers, where Eq. 10 adds up, so that the scale does not follow the number of policies.
    """
    losers = torch.tensor(choice.losers, device=policy.device)
    winners = torch.full_like(losers, choice.winner)
    return dpo_loss(policy[winners], policy[losers], reference[winners], reference[losers], beta=beta)


def choose_policies(
    scores: Sequence[float], *, well_formed: Sequence[bool], keys: Sequence[Hashable] | None = None
) -> Choice:
    """Pick the policy whose segment the fine module answers best from.

    Args:
        scores: Loss of the fine module for each policy, lower is better; what is no number is worst.
        well_formed: Whether each policy could be read; one that could not wins only where none could.
        keys: What makes policies the same, for instance their segments; None where all differ.

    Returns:
        The winner, the first of equal ones, and every other policy once, in order. No loser where all are the same.

    Raises:
        ValueError: No policy, or lists of different lengths.

    Source: CrossVLLM Algorithm 1, lines of w and losers.
    """
    keys = range(len(scores)) if keys is None else keys
    if not len(scores) or not len(scores) == len(well_formed) == len(keys):
        raise ValueError(f"{len(scores)} scores, {len(well_formed)} states and {len(keys)} keys were given.")
    allowed = [j for j, fine in enumerate(well_formed) if fine] or list(range(len(scores)))
    # No number compares as less than NaN, so that the first one would stay.
    winner = min(allowed, key=lambda j: math.inf if math.isnan(scores[j]) else scores[j])
    first = {key: j for j, key in reversed(list(enumerate(keys)))}
    losers = tuple(sorted(j for key, j in first.items() if key != keys[winner]))
    return Choice(winner, losers)
