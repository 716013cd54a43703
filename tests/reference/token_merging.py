"""Token merging one token at a time."""

import torch


def naive_merge_tokens(
    tokens_NE: torch.Tensor, num_target: int, num_heads: int
) -> tuple[torch.Tensor, list[int], list[int]]:
    """Merges the tokens of one clip with lists and loops.

    Args:
        tokens_NE: (N, E).
        num_target: tokens wanted.
        num_heads: heads over whose mean the similarity is taken.

    Returns:
        (M, E) merged tokens, size of each group, and the group of every original token.
    """
    # Each entry: (sum of original tokens, indices of the original tokens).
    groups = [(token, [i]) for i, token in enumerate(tokens_NE)]
    while len(groups) != num_target:
        half = len(groups) // 2
        merges = min(len(groups) - num_target, half)
        means = [total / len(members) for total, members in groups]
        metric = []
        for mean in means:
            per_head = mean.view(num_heads, -1)
            direction = sum(per_head) / num_heads
            metric.append((direction / direction.norm()).detach())
        even, odd = list(range(0, len(groups), 2)), list(range(1, len(groups), 2))
        best = []
        for a in even:
            scores = [float(metric[a] @ metric[b]) for b in odd]
            partner = max(range(len(odd)), key=lambda b: (scores[b], -b))
            best.append((scores[partner], partner))
        order = sorted(range(len(even)), key=lambda a: -best[a][0])  # stable: earlier tokens first among equals
        merged = {b: groups[odd[b]] for b in range(len(odd))}
        for a in order[:merges]:
            partner = best[a][1]
            total, members = merged[partner]
            extra, more = groups[even[a]]
            merged[partner] = (total + extra, members + more)
        groups = [groups[even[a]] for a in order[merges:]] + [merged[b] for b in range(len(odd))]
    group_of = [0] * len(tokens_NE)
    for number, (_, members) in enumerate(groups):
        for member in members:
            group_of[member] = number
    merged = torch.stack([total / len(members) for total, members in groups])
    return merged, [len(members) for _, members in groups], group_of
