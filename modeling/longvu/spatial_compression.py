"""Spatial token compression: within a window of frames, drops tokens that repeat those of an anchor frame.

Paper: LongVU (arXiv 2410.17434), Sec. 3.3, Eq. 2; anchors: Table 5.
Original read: Vision-CAIR/LongVU, `cambrian_arch.py`, `prepare_inputs_labels_for_multimodal`.

Shapes: F kept frames, V tokens of a frame (as many in all frames), D width of the language model, m frames of a
window.
"""

import math

import torch
from torch.nn import functional as F

ANCHORS = ("first", "middle", "most_changed")


def _find_anchor(tokens_mVD: torch.Tensor, anchor: str) -> int:
    """Gives the position in a window of the frame that keeps all its tokens."""
    num_frames = len(tokens_mVD)
    if anchor == "first" or num_frames == 1:
        return 0
    if anchor == "middle":
        return num_frames // 2
    neighbour = F.cosine_similarity(tokens_mVD[:-1], tokens_mVD[1:], dim=-1).mean(-1)  # (m - 1,)
    to_previous = torch.cat([neighbour[:1], neighbour])
    to_next = torch.cat([neighbour, neighbour[-1:]])
    return int((to_previous + to_next).argmin())


@torch.no_grad()
def anchor_similarity(
    tokens_FVD: torch.Tensor, window: int, *, anchor: str = "first"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compares every token with the token at its place in the anchor frame of its window, in float32.

    Args:
        tokens_FVD: (F, V, D).
        window: frames per window, the last one may be shorter; paper: K.
        anchor: "first", "middle" (m // 2) or "most_changed": the frame least like its neighbours in the window, by the
            mean cosine over all places; the first frame of a window counts its one neighbour twice, so does the last.

    Returns:
        (F, V) float32 cosine similarity and (F,) bool, True for anchor frames.

    Raises:
        ValueError: an unknown anchor or a window below 1.

    Source: LongVU Sec. 3.3 and Table 5; the original has only the first frame.
    """
    if anchor not in ANCHORS:
        raise ValueError(f"Spatial token compression knows the anchors {ANCHORS}, got {anchor!r}.")
    if window < 1:
        raise ValueError(f"The window of spatial token compression must hold at least 1 frame, got {window}.")
    is_anchor_F = torch.zeros(len(tokens_FVD), dtype=torch.bool, device=tokens_FVD.device)
    similarity_FV = torch.ones(tokens_FVD.shape[:2], device=tokens_FVD.device)
    for start in range(0, len(tokens_FVD), window):
        tokens_mVD = tokens_FVD[start : start + window].float()
        position = _find_anchor(tokens_mVD, anchor)
        is_anchor_F[start + position] = True
        similarity_FV[start : start + window] = F.cosine_similarity(tokens_mVD[position], tokens_mVD, dim=-1)
    return similarity_FV, is_anchor_F


def remove_by_force(keep_FV: torch.Tensor, budget: int, *, window: int) -> torch.Tensor:
    """Cuts the same number of tokens off the end of each window, then the rest off the end of the video.

    Args:
        keep_FV: (F, V) bool, tokens kept so far.
        budget: tokens wanted at most. A negative budget drops that many more tokens from the end.
        window: frames per window.

    Returns:
        (F, V) bool.

    Source: `prepare_inputs_labels_for_multimodal`, `force_remove`.
    Differs: nothing, and so the last frames of every window are lost first.
    """
    keep_FV = keep_FV.clone()
    num_windows = math.ceil(len(keep_FV) / window)
    excess = int(keep_FV.sum()) - budget
    if excess > 0 and num_windows:
        per_window = math.ceil(excess / num_windows)
        for start in range(0, len(keep_FV), window):
            chunk = keep_FV[start : start + window].view(-1)
            chunk[chunk.nonzero()[-per_window:, 0]] = False
    kept = keep_FV.view(-1).nonzero()[:, 0]
    keep_FV.view(-1)[kept[budget:]] = False
    return keep_FV


def _fit(similarity_FV: torch.Tensor, is_anchor_F: torch.Tensor, threshold: float, budget: int) -> torch.Tensor:
    """Lowers the threshold, token by token, until the tokens fit beside those of the anchors."""
    keep_FV = (similarity_FV < threshold) | is_anchor_F[:, None]
    if int(keep_FV.sum()) <= budget:
        return keep_FV
    room = budget - int(is_anchor_F.sum()) * similarity_FV.shape[1]
    # Stable, so that of equal tokens the earlier ones stay.
    order = similarity_FV.masked_fill(is_anchor_F[:, None], float("inf")).view(-1).argsort(stable=True)
    keep_FV = is_anchor_F[:, None].expand_as(similarity_FV).clone()
    keep_FV.view(-1)[order[:room]] = True
    return keep_FV


def compress(
    tokens_FVD: torch.Tensor,
    threshold: float,
    *,
    window: int = 8,
    anchor: str = "first",
    budget: int | None = None,
    forced_removal: bool = False,
) -> torch.Tensor:
    """Marks the tokens of a video that stay.

    A token of an anchor frame stays; any other stays when its cosine with the anchor's token at the same place is
    below the threshold. Where that exceeds the budget, two rules:

    - `forced_removal`: the original's, see `remove_by_force`.
    - otherwise compression is raised until it fits and never beyond: windows are doubled while the anchor frames alone
      are too many, then the threshold is lowered to the value at which the tokens fit (of all tokens that are no
      anchor's, those least like their anchor stay). Where even one anchor frame is too much, its tokens are
      thinned out at even steps.

    Args:
        tokens_FVD: (F, V, D) tokens in the language model's space, newline tokens included.
        threshold: paper: theta.
        window: frames per window; paper: K.
        anchor: "first", "middle" or "most_changed".
        budget: tokens wanted at most; None for no limit.
        forced_removal: the rule for what exceeds the budget.

    Returns:
        (F, V) bool; the order of the tokens stays frame by frame, row by row.

    Raises:
        ValueError: an unknown anchor, a window below 1, or a budget below 1 without `forced_removal`.

    Source: LongVU Eq. 2; `prepare_inputs_labels_for_multimodal`.
    Differs: the paper keeps a token at exactly the threshold, the original drops it, as here.
    """
    if budget is not None and budget < 1 and not forced_removal:
        raise ValueError(
            f"No room for visual tokens: the budget is {budget}. Shorten the text or raise the context length."
        )
    similarity_FV, is_anchor_F = anchor_similarity(tokens_FVD, window, anchor=anchor)
    if budget is None or forced_removal:
        keep_FV = (similarity_FV < threshold) | is_anchor_F[:, None]
        return keep_FV if budget is None else remove_by_force(keep_FV, budget, window=window)
    num_tokens = tokens_FVD.shape[1]
    while int(is_anchor_F.sum()) > 1 and int(is_anchor_F.sum()) * num_tokens > budget:
        window *= 2
        similarity_FV, is_anchor_F = anchor_similarity(tokens_FVD, window, anchor=anchor)
    if len(tokens_FVD) and num_tokens > budget:
        keep_FV = torch.zeros_like(similarity_FV, dtype=torch.bool)
        even = torch.arange(budget, device=keep_FV.device) * num_tokens // budget
        keep_FV[is_anchor_F.nonzero()[0, 0], even] = True
        return keep_FV
    return _fit(similarity_FV, is_anchor_F, threshold, budget)
