"""Metrics of parsed answers: pure functions of plain numbers."""

import math
from collections.abc import Sequence
from statistics import NormalDist


def accuracy(correct: Sequence[bool]) -> float:
    """Part of the answers that are right.

    Args:
        correct: one truth value for each answer.

    Returns:
        Number in 0 to 1.

    Raises:
        ValueError: no answers.
    """
    if not len(correct):
        raise ValueError("accuracy of no answers is not defined: pass at least one")
    return sum(bool(value) for value in correct) / len(correct)


def wilson_interval(num_correct: int, num_total: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """Score interval of a proportion, which stays inside 0 to 1 and is not degenerate at 0 or all right.

    Args:
        num_correct: successes.
        num_total: trials, at least 1.
        confidence: two-sided coverage, between 0 and 1.

    Returns:
        Lower and upper end.

    Raises:
        ValueError: no trials, successes outside 0 to num_total, or a confidence outside (0, 1).

    Source: E. B. Wilson, Probable inference, the law of succession, and statistical inference, JASA 22 (1927).
    """
    if num_total < 1 or not 0 <= num_correct <= num_total:
        raise ValueError(f"{num_correct} right of {num_total}: expected 0 <= right <= total and total >= 1")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}, expected a number between 0 and 1")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share = num_correct / num_total
    scale = 1 + z**2 / num_total
    centre = (share + z**2 / (2 * num_total)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / num_total + z**2 / (4 * num_total**2))
    return max(centre - half, 0.0), min(centre + half, 1.0)
