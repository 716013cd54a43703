"""The loss of direct preference optimisation as functions of tensors.

Shape legend: B answers, P pairs, S positions of a sequence, V columns of the logits, L labelled positions.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn import functional as F

IGNORE_INDEX = -100
LOSS_TYPES = ("sigmoid", "ipo")


class PreferenceLoss(NamedTuple):
    """Losses and rewards of P pairs, (P,) float32 each; the rewards carry no gradient."""

    losses: torch.Tensor
    chosen_rewards: torch.Tensor
    rejected_rewards: torch.Tensor


def label_log_probs(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Log-likelihoods of labels.

    Args:
        logits: (L, V) at the positions that predict the labels.
        labels: (L,) token ids, none of them masked.

    Returns:
        (L,) float32.
    """
    return -F.cross_entropy(logits.float(), labels, reduction="none")


def answer_log_probs(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    values: torch.Tensor | None = None,
    token_log_probs: Callable[..., torch.Tensor] = label_log_probs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum the log-likelihoods of the labelled tokens of every sequence.

    Args:
        logits: (B, S, V); position s predicts the label of position s + 1.
        labels: (B, S) token ids, -100 where nothing is counted.
        values: (B, S) numbers beside the labels, for a model whose tokens have some, or None.
        token_log_probs: How a model reads `logits` (L, V), `labels` (L,) and, with `values`, these (L,).

    Returns:
        Sums, (B,) float32, and numbers of tokens, (B,) int64.

    Raises:
        ValueError: Logits and labels of different shapes.
    """
    if logits.shape[:2] != labels.shape:
        raise ValueError(
            f"Logits of shape {tuple(logits.shape)} and labels of shape {tuple(labels.shape)} do not fit. A model "
            "that changes the length of its sequence must return the labels that fit its logits."
        )
    labels = labels[:, 1:].to(logits.device)
    mask_BS = labels != IGNORE_INDEX
    # Only rows of labelled positions are widened to float32: a prompt of thousands of visual tokens has none.
    extra = () if values is None else (values[:, 1:].to(logits.device)[mask_BS],)
    found_L = token_log_probs(logits[:, :-1][mask_BS], labels[mask_BS], *extra)
    sums_B = found_L.new_zeros(len(labels)).index_add(0, mask_BS.nonzero()[:, 0], found_L)
    return sums_B, mask_BS.sum(1)


def dpo_loss(
    policy_chosen: torch.Tensor,
    policy_rejected: torch.Tensor,
    reference_chosen: torch.Tensor,
    reference_rejected: torch.Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    loss_type: str = "sigmoid",
) -> PreferenceLoss:
    """Losses of pairs of answers, each with its log-likelihood under policy and reference.

    Args:
        policy_chosen: (P,) log-likelihoods of the better answers under the model that learns.
        policy_rejected: (P,) those of the worse answers.
        reference_chosen: (P,) log-likelihoods of the better answers under the reference.
        reference_rejected: (P,) those of the worse answers.
        beta: How strongly the model is held to the reference; for "ipo" the inverse of twice the wanted margin.
        label_smoothing: Share of pairs whose order is taken to be wrong, 0 to below 0.5; "sigmoid" only.
        loss_type: "sigmoid" or "ipo".

    Returns:
        Losses and rewards.

    Raises:
        ValueError: An unknown loss type.

    Source: Rafailov et al., Direct Preference Optimization (arXiv 2305.18290), Eq. 7; label smoothing: conservative
    DPO (Mitchell 2023); "ipo": Azar et al. (arXiv 2310.12036), Eq. 17.
    """
    if loss_type not in LOSS_TYPES:
        raise ValueError(f"loss_type={loss_type!r} is unknown; use one of {LOSS_TYPES}.")
    chosen_P, rejected_P = policy_chosen - reference_chosen, policy_rejected - reference_rejected
    margin_P = chosen_P - rejected_P
    if loss_type == "ipo":
        losses_P = (margin_P - 1 / (2 * beta)) ** 2
    else:
        losses_P = -(1 - label_smoothing) * F.logsigmoid(beta * margin_P) - label_smoothing * F.logsigmoid(
            -beta * margin_P
        )
    return PreferenceLoss(losses_P, beta * chosen_P.detach(), beta * rejected_P.detach())
