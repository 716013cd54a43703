"""Bounds on the frames and visual tokens of LongVU, whatever a video shows; the rules are those of its modules.

Source: LongVU (arXiv 2410.17434), Sec. 3; Vision-CAIR/LongVU, `cambrian_arch.py`.
"""

from dataclasses import dataclass

from longvideo.modeling.longvu.configuration_longvu import LongVUConfig
from longvideo.modeling.longvu.frame_selection import choose_grid, count_full_resolution
from longvideo.modeling.longvu.insertion_longvu import frame_limits, grid_tokens, reduction_limit
from longvideo.modeling.longvu.temporal_reduction import WINDOWS

Bounds = tuple[int, int]
SQUARE = (1, 1)


@dataclass(frozen=True)
class Room:
    """What text and answer leave.

    Attributes:
        budget: Positions for visual tokens.
        counted: The same as the limits on frames count it.
        size: (width, height) of the frames as the model reads it.
    """

    budget: int
    counted: int
    size: tuple[int, int]


def measure_room(config: LongVUConfig, num_text: int, new_tokens: int, size: tuple[int, int] = SQUARE) -> Room:
    """Count the positions for visual tokens.

    Args:
        config: Model configuration.
        num_text: Text tokens of the prompt.
        new_tokens: Tokens of the answer.
        size: (width, height) of the frames as the model reads it.

    Returns:
        The room.

    Raises:
        ValueError: Text and answer leave nothing.
    """
    reserve = config.inference_max_length if config.behaves("fixed_reserve") else new_tokens
    budget = config.context_length - num_text - reserve
    if budget < 1:
        raise ValueError(
            f"{num_text} tokens of text and {reserve} for the answer leave nothing of the {config.context_length} "
            "positions; shorten the text or the answer."
        )
    with_placeholder = config.behaves("budget_without_newlines") or config.behaves("count_to_pad_id")
    return Room(budget, budget - int(with_placeholder), size)


def kept_bounds(config: LongVUConfig, num_frames: int, room: Room) -> Bounds:
    """Bound the frames that temporal reduction keeps.

    Args:
        config: Model configuration.
        num_frames: Sampled frames.
        room: From `measure_room`.

    Returns:
        Least and most. At least one frame of every window stays, and never more than `max_kept_frames` of a video that
        is reduced.
    """
    rule = config.temporal_reduction
    if rule == "original" and num_frames < reduction_limit(config, room.counted, room.size):
        return num_frames, num_frames
    window = config.temporal_window or WINDOWS[rule]
    # The original has no maximum below one window.
    cap = num_frames if rule == "original" and num_frames < window else config.max_kept_frames
    return min(-(-num_frames // window), cap), min(num_frames, cap)


def token_bounds(config: LongVUConfig, num_kept: int, room: Room) -> tuple[Bounds, int, str]:
    """Bound the visual tokens of a video of which so many frames are kept.

    Args:
        config: Model configuration.
        num_kept: Kept frames.
        room: From `measure_room`.

    Returns:
        Least and most tokens, frames at the full grid, and the way: "full", "low", "mix" or "stc".
    """
    grid = choose_grid(
        num_kept,
        frame_limits(config, room.counted, room.size),
        highres=config.highres,
        strict_limit=config.behaves("budget_without_newlines"),
        full_beyond_limit=config.behaves("full_grid_beyond_limit"),
    )
    full_tokens = len(grid_tokens(config, room.size, full=True))
    tokens = full_tokens if grid == "full" else len(grid_tokens(config, room.size, full=False))
    num_full = num_kept if grid == "full" else 0
    if num_kept * tokens > room.budget:
        return (_least_compressed(config, num_kept, tokens, room.budget), room.budget), num_full, "stc"
    if grid == "full":
        return (num_kept * tokens, num_kept * tokens), num_full, "full"
    num_full = count_full_resolution(num_kept, room.budget, full_tokens=full_tokens, low_tokens=tokens)
    total = num_kept * tokens + num_full * (full_tokens - tokens)
    return (total, total), num_full, "mix" if num_full else "low"


def _least_compressed(config: LongVUConfig, num_kept: int, tokens: int, budget: int) -> int:
    """Count what is left when every frame repeats its anchor: the anchors' tokens."""
    window = config.stc_window
    if config.behaves("forced_removal"):
        num_windows = -(-num_kept // window)
        # Cutting takes as many of each window, so up to one token per window too many.
        return max(min(num_windows * tokens, budget - num_windows + 1), 0)
    while -(-num_kept // window) > 1 and -(-num_kept // window) * tokens > budget:
        window *= 2
    return min(-(-num_kept // window) * tokens, budget)
