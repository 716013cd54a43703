"""Temporal reduction: drops frames that are much like the other frames around them, by their DINOv2 features.

Paper: LongVU (arXiv 2410.17434), Sec. 3.1. Original read: Vision-CAIR/LongVU, `cambrian_arch.py`, `select_frame`.

Two rules. "original": windows of 16 frames, the mean similarity includes the frame itself, the middle frame of a
window always stays, and only videos of at least `limit` frames are reduced. "paper": windows of 8 frames, the mean
runs over the other frames, every video is reduced; the frame least like the others stays where the threshold would
empty a window.

Shapes: F frames, N values of a frame's features, m frames of a window, T kept frames.
"""

from dataclasses import dataclass

import torch
from torch.nn import functional as F

RULES = ("original", "paper")
WINDOWS = {"original": 16, "paper": 8}


def _check_rule(rule: str, window: int) -> None:
    if rule not in RULES:
        raise ValueError(f"Temporal reduction knows the rules {RULES}, got {rule!r}.")
    if window < 1:
        raise ValueError(f"The window of temporal reduction must hold at least 1 frame, got {window}.")


@torch.no_grad()
def window_similarity(features_FN: torch.Tensor, window: int, *, rule: str = "original") -> torch.Tensor:
    """Measures how much each frame is like the frames of its window, in float32.

    Args:
        features_FN: (F, N), or (F, P, E) to be flattened: features of consecutive frames from the start of a window.
        window: frames per window; the last one may be shorter.
        rule: "original" (mean over all frames of the window) or "paper" (mean over the others; 0 for a lone frame).

    Returns:
        (F,) float32 mean cosine similarity.

    Raises:
        ValueError: an unknown rule or a window below 1.

    Source: LongVU Sec. 3.1; `select_frame`.
    Differs: the original multiplies all pairs in the model's type; the mean of products is taken here as the product
    with the mean, in float32.
    """
    _check_rule(rule, window)
    if not len(features_FN):
        return torch.zeros(0, device=features_FN.device)
    similarity = []
    for frames in features_FN.flatten(1).split(window):
        unit_mN = F.normalize(frames.float(), dim=-1)
        total_m = unit_mN @ unit_mN.sum(0)
        if rule == "original":
            similarity.append(total_m / len(frames))
        else:
            similarity.append((total_m - unit_mN.square().sum(-1)) / max(len(frames) - 1, 1))
    return torch.cat(similarity)


def survivors(similarity_F: torch.Tensor, *, window: int, threshold: float, rule: str = "original") -> torch.Tensor:
    """Marks the frames that are different enough from their window.

    Args:
        similarity_F: (F,) from `window_similarity`.
        window: frames per window.
        threshold: frames whose similarity is not below it are dropped.
        rule: "original" or "paper".

    Returns:
        (F,) bool. At least one frame of each window stays.

    Raises:
        ValueError: an unknown rule or a window below 1.

    Source: LongVU Sec. 3.1; `select_frame`.
    Differs: the original forces the middle frame's similarity to 0, so that with a threshold of 0 or below it can lose
    a whole window; here the middle frame stays for any threshold.
    """
    _check_rule(rule, window)
    keep_F = similarity_F < threshold
    for start in range(0, len(similarity_F), window):
        frames = similarity_F[start : start + window]
        if rule == "original":
            keep_F[start + len(frames) // 2] = True
        elif not keep_F[start : start + window].any():
            keep_F[start + int(frames.argmin())] = True
    return keep_F


def thin_evenly(num_frames: int, max_frames: int) -> torch.Tensor:
    """Picks frames at even steps when there are too many.

    Args:
        num_frames: frames there are.
        max_frames: frames wanted at most.

    Returns:
        int64 positions, rising; all of them where they are few enough.

    Raises:
        ValueError: `max_frames` is below 1.

    Source: `select_frame`, the cap of 400 frames.
    """
    if max_frames < 1:
        raise ValueError(f"At least 1 frame must be kept, got a maximum of {max_frames}.")
    if num_frames <= max_frames:
        return torch.arange(num_frames)
    step = num_frames / max_frames
    return torch.tensor([int(step * k) for k in range(max_frames)])


def select_frames(
    similarity_F: torch.Tensor, *, window: int, threshold: float, max_frames: int, rule: str = "original"
) -> torch.Tensor:
    """Chooses the frames of a whole video that stay.

    Args:
        similarity_F: (F,) from `window_similarity`.
        window: frames per window.
        threshold: frames whose similarity is not below it are dropped.
        max_frames: frames kept at most; more are thinned out at even steps.
        rule: "original" or "paper".

    Returns:
        (T,) int64 indices, rising.

    Raises:
        ValueError: an unknown rule, a window or a maximum below 1.

    Differs: the original has no maximum for videos shorter than one window; neither has "original" here.
    """
    kept_T = survivors(similarity_F, window=window, threshold=threshold, rule=rule).nonzero()[:, 0]
    return kept_T[_cap(len(similarity_F), len(kept_T), window, max_frames, rule).to(kept_T.device)]


def _cap(num_frames: int, num_kept: int, window: int, max_frames: int, rule: str) -> torch.Tensor:
    if rule == "original" and num_frames < window:
        return torch.arange(num_kept)
    return thin_evenly(num_kept, max_frames)


@dataclass
class ReducedFrames:
    """Frames that survived the threshold, of the windows that one step settled.

    Args:
        indices: (n,) int64 zero-based frame indices in the video, rising.
        features: (n, ...) their DINOv2 features.
        others: what was given along with the features, (n, ...) each.
    """

    indices: torch.Tensor
    features: torch.Tensor
    others: tuple[torch.Tensor, ...]


class TemporalReducer:
    """Reduces a video that comes in pieces, and holds at most one window of it.

    `add` and `finish` hand out survivors as their windows are complete; when the video ends `final_positions` says
    which of all survivors stay under the maximum. The result is that of `select_frames` on the whole video.

    Args:
        num_frames: frames the video has; the original reduces only long ones, which must be known at the start.
        threshold: frames whose similarity is not below it are dropped.
        max_frames: frames kept at most.
        window: frames per window; None for the rule's own (16 or 8).
        rule: "original" or "paper".
        limit: shorter videos keep all frames, whatever their similarity; None reduces every video.

    Raises:
        ValueError: an unknown rule, or a number below 1.
    """

    def __init__(
        self,
        num_frames: int,
        *,
        threshold: float,
        max_frames: int,
        window: int | None = None,
        rule: str = "original",
        limit: int | None = None,
    ):
        _check_rule(rule, 1 if window is None else window)
        if num_frames < 1 or max_frames < 1:
            raise ValueError(f"Got a video of {num_frames} frames and a maximum of {max_frames}; both must be >= 1.")
        self.num_frames, self.threshold, self.max_frames, self.rule = num_frames, threshold, max_frames, rule
        self.window = WINDOWS[rule] if window is None else window
        self.reduces = limit is None or num_frames >= limit
        self._similarity: list[torch.Tensor] = []
        self._indices: list[torch.Tensor] = []
        self._pending: tuple[torch.Tensor, ...] | None = None
        self._num_settled = 0

    @property
    def similarity(self) -> torch.Tensor:
        """(frames settled so far,) float32 mean similarity, of reduced and of short videos."""
        return torch.cat(self._similarity) if self._similarity else torch.zeros(0)

    def add(self, features: torch.Tensor, *others: torch.Tensor) -> ReducedFrames:
        """Takes the next frames, any number of them.

        Args:
            features: (n, ...) DINOv2 features.
            others: (n, ...) tensors of the same frames, to be handed back for the survivors (pixels, for example).

        Returns:
            Survivors of all windows that are now complete.

        Raises:
            ValueError: tensors of different lengths, or more frames than the video has.
        """
        if any(len(other) != len(features) for other in others):
            raise ValueError(f"Got {len(features)} frames of features and {[len(o) for o in others]} of the rest.")
        frames = (features, *others)
        if self._pending is not None:
            frames = tuple(torch.cat(pair) for pair in zip(self._pending, frames, strict=True))
        self._check_count(self._num_settled + len(frames[0]) <= self.num_frames, len(frames[0]))
        ready = len(frames[0]) // self.window * self.window
        # A clone, or the view would keep the memory of the whole piece.
        rest = len(frames[0]) > ready
        self._pending = tuple(x[ready:].clone() for x in frames) if rest else None
        return self._settle(tuple(x[:ready] for x in frames))

    def finish(self) -> ReducedFrames | None:
        """Settles the last window where it is a partial one.

        Returns:
            Its survivors; None where the last window was complete.

        Raises:
            ValueError: the frames added are not as many as announced.
        """
        pending, self._pending = self._pending, None
        num_left = len(pending[0]) if pending else 0
        self._check_count(self._num_settled + num_left == self.num_frames, num_left)
        return self._settle(pending) if pending else None

    def final_positions(self) -> torch.Tensor:
        """Says which survivors stay under the maximum.

        Returns:
            (T,) int64 positions in the sequence of all survivors handed out.
        """
        num_kept = sum(len(indices) for indices in self._indices)
        if not self.reduces:
            return torch.arange(num_kept)
        return _cap(self.num_frames, num_kept, self.window, self.max_frames, self.rule)

    def kept(self) -> torch.Tensor:
        """(T,) int64 frame indices that stay in the end; call it after `finish`."""
        return torch.cat(self._indices)[self.final_positions()]

    def _check_count(self, fits: bool, num_new: int) -> None:
        if not fits:
            raise ValueError(
                f"The video was announced with {self.num_frames} frames, got {self._num_settled + num_new}; pass the "
                "number of frames that the windows really hold."
            )

    def _settle(self, frames: tuple[torch.Tensor, ...]) -> ReducedFrames:
        features = frames[0]
        similarity = window_similarity(features, self.window, rule=self.rule).cpu()
        if self.reduces:
            keep = survivors(similarity, window=self.window, threshold=self.threshold, rule=self.rule)
        else:
            keep = torch.ones(len(features), dtype=torch.bool)
        local = keep.nonzero()[:, 0]
        indices = local + self._num_settled
        self._num_settled += len(features)
        self._similarity.append(similarity)
        self._indices.append(indices)
        return ReducedFrames(
            indices=indices,
            features=features[local.to(features.device)],
            others=tuple(x[local.to(x.device)] for x in frames[1:]),
        )
