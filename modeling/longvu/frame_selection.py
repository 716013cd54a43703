"""Selection of resolutions: which frames keep the full grid when not all of them fit.

Paper: LongVU (arXiv 2410.17434), Sec. 3.2, Eq. 1.
Original read: Vision-CAIR/LongVU, `cambrian_arch.py`, `prepare_inputs_labels_for_multimodal`.

Shapes: F kept frames, V tokens of a frame, L text tokens, D width of the language model.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class FrameLimits:
    """What a sample has room for.

    Args:
        budget: positions for visual tokens; negative when the text alone is too long.
        full: frames that fit at the full grid, at least 1.
        low: frames that fit at the low-resolution grid, at least 1.
    """

    budget: int
    full: int
    low: int


def limits(context_length: int, num_text: int, *, reserve: int, full_tokens: int, low_tokens: int) -> FrameLimits:
    """Counts the frames that fit beside the text.

    Args:
        context_length: positions of the whole sequence, paper: L_max.
        num_text: positions of the text (the original counts the placeholder as one, paper: L_q).
        reserve: positions kept free for new tokens.
        full_tokens: tokens of a frame at the full grid.
        low_tokens: tokens of a frame at the low-resolution grid.

    Returns:
        Budget and limits.

    Raises:
        ValueError: a frame without tokens.

    Source: `select_frame` and `prepare_inputs_labels_for_multimodal`.
    Differs: the original always counts the uncropped grid without newline tokens; pass such numbers for its limits,
    and the real ones where nothing may exceed the budget.
    """
    if full_tokens < 1 or low_tokens < 1:
        raise ValueError(f"A frame has at least 1 token, got {full_tokens} (full) and {low_tokens} (low).")
    budget = context_length - num_text - reserve
    return FrameLimits(budget, max(1, budget // full_tokens), max(1, budget // low_tokens))


def choose_grid(
    num_frames: int,
    frame_limits: FrameLimits,
    *,
    highres: bool = True,
    strict_limit: bool = False,
    full_beyond_limit: bool = False,
) -> str:
    """Decides at which grid a video starts.

    Args:
        num_frames: F kept frames.
        frame_limits: from `limits`.
        highres: whether the checkpoint has two resolutions.
        strict_limit: as many frames as fit exactly count as too many, the original's rule.
        full_beyond_limit: a video that does not fit at low resolution either starts at the full grid, the original's
            rule; otherwise it starts at the low one.

    Returns:
        "full": all frames at the full grid. "low": all at the low grid, of which some may be raised by
        `choose_full_resolution`. What then exceeds the budget goes through spatial token compression.

    Source: LongVU Sec. 3.2; `prepare_inputs_labels_for_multimodal`.
    """
    if not highres or num_frames < frame_limits.full or (num_frames == frame_limits.full and not strict_limit):
        return "full"
    return "full" if full_beyond_limit and num_frames > frame_limits.low else "low"


def count_full_resolution(num_frames: int, budget: int, *, full_tokens: int, low_tokens: int) -> int:
    """Counts the frames that can be raised to the full grid, paper: N_h.

    Args:
        num_frames: F kept frames, all at the low grid.
        budget: positions for visual tokens.
        full_tokens: tokens of a frame at the full grid, newline tokens included.
        low_tokens: tokens of a frame at the low grid, newline tokens included.

    Returns:
        0 to F; 0 also where the full grid is not larger than the low one (frames so flat that the crop empties one).

    Source: LongVU Eq. 1.
    Differs: the paper counts grid tokens and omits the system prompt; the original counts newline tokens and the whole
    text, as here.
    """
    room = budget - num_frames * low_tokens
    if room <= 0 or full_tokens <= low_tokens:
        return 0
    return min(num_frames, room // (full_tokens - low_tokens))


@torch.no_grad()
def query_scores(low_FVD: torch.Tensor, text_LD: torch.Tensor) -> torch.Tensor:
    """Scores each frame by how well its tokens fit the question, in float32.

    Args:
        low_FVD: (F, V, D) tokens of the low-resolution grids in the language model's space, newline tokens included.
        text_LD: (L, D) input embeddings of the text after the placeholder.

    Returns:
        (F,) float32 mean of the dot products of all tokens with all text tokens; zeros without text.

    Source: LongVU Eq. 1.
    Differs: the paper scores full-grid tokens, the original low-grid tokens with newlines, as here. The mean of
    products is taken as the product of means.
    """
    if not len(text_LD):
        return torch.zeros(len(low_FVD), device=low_FVD.device)
    return low_FVD.mean(1, dtype=torch.float32) @ text_LD.mean(0, dtype=torch.float32).to(low_FVD.device)


def choose_full_resolution(scores_F: torch.Tensor, num_full: int) -> torch.Tensor:
    """Marks the frames with the highest scores.

    Args:
        scores_F: (F,) from `query_scores`.
        num_full: frames to raise to the full grid; numbers outside 0 to F are cut.

    Returns:
        (F,) bool. Of equal scores the earlier frame is chosen.
    """
    order = scores_F.argsort(descending=True, stable=True)
    chosen_F = torch.zeros(len(scores_F), dtype=torch.bool, device=scores_F.device)
    chosen_F[order[: max(num_full, 0)]] = True
    return chosen_F
