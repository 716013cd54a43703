"""Temporal reduction, frame selection, spatial compression and frame positions of LongVU with loops."""

import math

import torch


def _cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    norms = float(a.double().norm() * b.double().norm())
    return float(a.double() @ b.double()) / norms if norms else 0.0


def naive_similarity(features_FN: torch.Tensor, window: int, rule: str) -> list[float]:
    """Mean cosine similarity of each frame with its window, pair by pair.

    Args:
        features_FN: (F, N).
        window: frames per window.
        rule: "original" or "paper".

    Returns:
        One number per frame.
    """
    result = []
    for i, frame in enumerate(features_FN):
        start = i // window * window
        members = [j for j in range(start, min(start + window, len(features_FN))) if rule == "original" or j != i]
        result.append(sum(_cosine(frame, features_FN[j]) for j in members) / max(len(members), 1))
    return result


def naive_select(similarity: list[float], window: int, threshold: float, max_frames: int, rule: str) -> list[int]:
    """Kept frames, window by window.

    Args:
        similarity: one number per frame.
        window: frames per window.
        threshold: kept below.
        max_frames: the cap.
        rule: "original" or "paper".

    Returns:
        Frame indices.
    """
    kept = []
    for start in range(0, len(similarity), window):
        members = list(range(start, min(start + window, len(similarity))))
        survivors = [i for i in members if similarity[i] < threshold]
        if rule == "original":
            survivors = sorted({*survivors, members[len(members) // 2]})
        elif not survivors:
            survivors = [min(members, key=lambda i: (similarity[i], i))]
        kept += survivors
    if len(kept) > max_frames and not (rule == "original" and len(similarity) < window):
        kept = [kept[int(k * (len(kept) / max_frames))] for k in range(max_frames)]
    return kept


def naive_scores(low_FVD: torch.Tensor, text_LD: torch.Tensor) -> list[float]:
    """Mean dot product of all tokens of a frame with all text tokens.

    Args:
        low_FVD: (F, V, D).
        text_LD: (L, D).

    Returns:
        One number per frame.
    """
    scores = []
    for frame in low_FVD.double():
        products = [float(token @ word) for token in frame for word in text_LD.double()]
        scores.append(sum(products) / len(products))
    return scores


def naive_anchor(tokens_mVD: torch.Tensor, anchor: str) -> int:
    """Position of a window's anchor frame.

    Args:
        tokens_mVD: (m, V, D).
        anchor: "first", "middle" or "most_changed".

    Returns:
        0 to m - 1.
    """
    num_frames = len(tokens_mVD)
    if anchor == "first":
        return 0
    if anchor == "middle":
        return num_frames // 2
    changes = []
    for i in range(num_frames):
        neighbours = [j for j in (i - 1, i + 1) if 0 <= j < num_frames]
        per_neighbour = []
        for j in neighbours:
            pairs = list(zip(tokens_mVD[i], tokens_mVD[j], strict=True))
            per_neighbour.append(sum(1 - _cosine(a, b) for a, b in pairs) / len(pairs))
        changes.append(sum(per_neighbour) / max(len(per_neighbour), 1))
    return max(range(num_frames), key=lambda i: (changes[i], -i))


def naive_compress(tokens_FVD: torch.Tensor, threshold: float, window: int, anchor: str) -> list[list[bool]]:
    """Kept tokens before any budget.

    Args:
        tokens_FVD: (F, V, D).
        threshold: kept below.
        window: frames per window.
        anchor: "first", "middle" or "most_changed".

    Returns:
        Per frame one bool per token.
    """
    rows = []
    for start in range(0, len(tokens_FVD), window):
        chunk = tokens_FVD[start : start + window]
        position = naive_anchor(chunk, anchor)
        for i, frame in enumerate(chunk):
            tokens = zip(frame, chunk[position], strict=True)
            rows.append([i == position or _cosine(token, other) < threshold for token, other in tokens])
    return rows


def naive_forced_removal(rows: list[list[bool]], budget: int, window: int) -> list[list[bool]]:
    """The original's removal, with lists of kept tokens.

    Args:
        rows: per frame one bool per token.
        budget: tokens wanted, may be negative.
        window: frames per window.

    Returns:
        Per frame one bool per token.
    """
    chunks = []
    for start in range(0, len(rows), window):
        chunk = rows[start : start + window]
        chunks.append([(start + i, p) for i, row in enumerate(chunk) for p, kept in enumerate(row) if kept])
    total = sum(len(chunk) for chunk in chunks)
    if total > budget:
        force = math.ceil((total - budget) / len(chunks))
        chunks = [chunk[:-force] for chunk in chunks]
    kept = set([token for chunk in chunks for token in chunk][:budget])
    return [[(i, p) in kept for p in range(len(row))] for i, row in enumerate(rows)]


def naive_frame_position(index: int, width: int, rule: str) -> list[float]:
    """Encoding of one frame, column by column.

    Args:
        index: frame index.
        width: number of columns.
        rule: "original" or "paper".

    Returns:
        `width` numbers.
    """
    row = []
    for column in range(width):
        angle = index * 10000 ** (-2 * (column // 2) / width)
        if column % 2 == 0:
            row.append(math.sin(angle))
        else:
            row.append(math.cos(math.sin(angle)) if rule == "original" else math.cos(angle))
    return row
