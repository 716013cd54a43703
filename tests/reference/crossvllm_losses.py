"""Equations 9 and 10 of CrossVLLM and the choice of Algorithm 1, token by token with plain numbers."""

import math
from collections.abc import Sequence


def log_probability(scores: Sequence[float], token: int) -> float:
    """Log-probability of a token under unnormalised scores."""
    highest = max(scores)
    return scores[token] - highest - math.log(sum(math.exp(score - highest) for score in scores))


def sequence_log_probability(logits: Sequence[Sequence[float]], ids: Sequence[int], begin: int) -> float:
    """Log-probability of ids from `begin` on, each given all before it; logits[s] predicts ids[s + 1]."""
    return sum(log_probability(logits[position - 1], ids[position]) for position in range(begin, len(ids)))


def equation_9(logits: Sequence[Sequence[float]], ids: Sequence[int], begin: int) -> float:
    """Mean cross-entropy of the answer, the ids from `begin` on."""
    return -sequence_log_probability(logits, ids, begin) / (len(ids) - begin)


def equation_10(policy: Sequence[float], reference: Sequence[float], winner: int, losers: Sequence[int], beta: float):
    """Mean over losers of -log sigmoid of beta times the difference of the gains of winner and loser."""
    losses = []
    for loser in losers:
        gain = (policy[winner] - reference[winner]) - (policy[loser] - reference[loser])
        losses.append(math.log(1 + math.exp(-beta * gain)))
    return sum(losses) / len(losses)


def algorithm_1_choice(scores: Sequence[float], segments: Sequence[tuple], readable: Sequence[bool]):
    """Winner and losers: the least loss among readable policies, against every other meaning once."""
    winner = None
    for j, score in enumerate(scores):
        if any(readable) and not readable[j]:
            continue
        if winner is None or score < scores[winner]:
            winner = j
    losers, met = [], [(segments[winner], readable[winner])]
    for j, segment in enumerate(segments):
        if (segment, readable[j]) not in met:
            met.append((segment, readable[j]))
            losers.append(j)
    return winner, losers
