"""Coordinate tables, position embeddings and loss of LLaVA-ST with loops over rows, frames, patches and tokens."""

import math

import torch


def naive_propagate(table: torch.Tensor) -> torch.Tensor:
    """Adds and takes away the sum of all rows, weighted by distance; only the added one has a gradient.

    Args:
        table: (M, D).

    Returns:
        (M, D).
    """
    rows = []
    for i in range(len(table)):
        near = sum(2.0 ** -abs(i - j) * table[j] for j in range(len(table)))
        rows.append(table[i] + near - near.detach())
    return torch.stack(rows)


def naive_resample(table: torch.Tensor, size: int) -> torch.Tensor:
    """Linear resampling of rows with half-pixel centres, row by row.

    Args:
        table: (M, D).
        size: wanted rows.

    Returns:
        (size, D).
    """
    rows = []
    for i in range(size):
        place = min(max((i + 0.5) * len(table) / size - 0.5, 0.0), len(table) - 1.0)
        low, high = math.floor(place), math.ceil(place)
        rows.append(table[low] * (1 - (place - low)) + table[high] * (place - low))
    return torch.stack(rows)


def naive_lape(
    features: torch.Tensor, inputs: list[torch.Tensor], outputs: list[torch.Tensor], image: bool = False
) -> torch.Tensor:
    """Equations 2 and 5, patch by patch.

    Args:
        features: (F, G, G, D).
        inputs: input rows of time, height and width.
        outputs: output rows likewise.
        image: whether every frame takes the first temporal row.

    Returns:
        (F, G, G, D).
    """
    frames, grid = features.shape[:2]
    averages = []
    for table, other in zip(inputs, outputs, strict=True):
        averages.append(torch.stack([(p + q) / 2 for p, q in zip(table, other, strict=True)]))
    times, rows, columns = averages
    times = [times[0]] * frames if image else naive_resample(times, frames)
    rows, columns = naive_resample(rows, grid), naive_resample(columns, grid)
    result = []
    for f in range(frames):
        for r in range(grid):
            for c in range(grid):
                result.append(features[f, r, c] + columns[c] + rows[r] + times[f])
    return torch.stack(result).view(features.shape)


def naive_embedding(table: torch.Tensor, value: float) -> torch.Tensor:
    """Embedding of one coordinate.

    Args:
        table: (M, D) input rows.
        value: coordinate.

    Returns:
        (D,).
    """
    place = min(max(value, 0.0), 1.0) * (len(table) - 1)
    low, high = math.floor(place), math.ceil(place)
    share = place - low
    return (1 - share) * table[low] + share * table[high]


def naive_inject(
    embeds: torch.Tensor,
    ids: list[list[int]],
    values: list[list[float]],
    tables: list[torch.Tensor],
    templates: dict[int, int],
) -> torch.Tensor:
    """Replaces the embeddings of template tokens, token by token.

    Args:
        embeds: (B, S, D).
        ids: ids per sample.
        values: coordinates per sample, one for each token.
        tables: input rows per axis.
        templates: axis of every template that takes part, by id.

    Returns:
        (B, S, D).
    """
    rows = []
    for b, sample in enumerate(ids):
        for s, token in enumerate(sample):
            axis = templates.get(token)
            rows.append(embeds[b, s] if axis is None else naive_embedding(tables[axis], values[b][s]))
    return torch.stack(rows).view(embeds.shape)


def naive_targets(label: int, value: float, templates: dict[int, tuple[int, int]], columns: int) -> torch.Tensor:
    """Dense target of one position.

    Args:
        label: token id.
        value: its coordinate.
        templates: number of tokens and first column of every output template, by id.
        columns: V.

    Returns:
        (V,) shares that sum to 1.
    """
    target = torch.zeros(columns, dtype=torch.float64)
    if label not in templates:
        target[label] = 1
        return target
    size, start = templates[label]
    place = min(max(value, 0.0), 1.0) * (size - 1)
    share = place - math.floor(place)
    target[start + math.floor(place)] += 1 - share
    target[start + math.ceil(place)] += share
    return target


def naive_loss(
    logits: torch.Tensor,
    labels: list[list[int]],
    values: list[list[float]],
    templates: dict[int, tuple[int, int]],
    reduction: str,
) -> torch.Tensor:
    """Shifted cross entropy with dense targets, position by position.

    Args:
        logits: (B, S, V).
        labels: labels per sample, -100 for none.
        values: coordinates per sample, one for each token.
        templates: number of tokens and first column of every output template, by id.
        reduction: "token_mean" or "sample_sum".

    Returns:
        The loss.
    """
    samples = []
    for b, row in enumerate(labels):
        terms = []
        for s in range(1, len(row)):
            if row[s] != -100:
                target = naive_targets(row[s], values[b][s], templates, logits.shape[-1])
                terms.append(-(target * logits[b, s - 1].log_softmax(-1)).sum())
        samples.append(terms)
    if reduction == "sample_sum":
        return sum(sum(terms) / len(terms) for terms in samples if terms)
    terms = [term for sample in samples for term in sample]
    return sum(terms) / len(terms)
