"""Frame position encoding: a sinusoid of a frame's index in the video, added to all its tokens; off in the releases.

Paper: LongVU (arXiv 2410.17434), Appendix B, Eq. 3.
Original read: Vision-CAIR/LongVU, `cambrian_arch.py`, `get_frame_pos`.

Shapes: T kept frames, V tokens of a frame, D width of the language model.
"""

import torch

RULES = ("original", "paper")
BASE = 10000.0


def frame_position(indices_T: torch.Tensor, width: int, *, rule: str = "original") -> torch.Tensor:
    """Encodes the places of frames in their video.

    Args:
        indices_T: (T,) zero-based frame indices before temporal reduction.
        width: D.
        rule: "original" or "paper".

    Returns:
        (T, D) float32.

    Raises:
        ValueError: an unknown rule.

    Source: LongVU Eq. 3; `get_frame_pos`.
    Differs: with angle a the paper has sin(a) in even and cos(a) in odd columns. The original takes the cosine of
    columns it has overwritten with the sine, cos(sin(a)); "original" does the same, for weights trained so.
    """
    if rule not in RULES:
        raise ValueError(f"The frame position encoding knows the rules {RULES}, got {rule!r}.")
    pairs = torch.arange((width + 1) // 2, device=indices_T.device, dtype=torch.float64)
    frequencies = (BASE ** (-2 * pairs / width)).float()
    angles = indices_T.float()[:, None] * frequencies
    even = angles.sin()
    odd = even.cos() if rule == "original" else angles.cos()
    return torch.stack([even, odd], dim=-1).flatten(1)[:, :width]


def add_frame_position(tokens_TVD: torch.Tensor, indices_T: torch.Tensor, *, rule: str = "original") -> torch.Tensor:
    """Adds the encoding of each frame to all its tokens, newline tokens too.

    Args:
        tokens_TVD: (T, V, D).
        indices_T: (T,) zero-based frame indices before temporal reduction.
        rule: "original" or "paper".

    Returns:
        (T, V, D) in the type of the tokens.

    Raises:
        ValueError: an unknown rule.
    """
    encoding = frame_position(indices_T.to(tokens_TVD.device), tokens_TVD.shape[-1], rule=rule)
    return tokens_TVD + encoding.to(tokens_TVD.dtype)[:, None]
