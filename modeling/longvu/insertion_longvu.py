"""What a question gets to see in LongVU: temporal reduction, grids and compression fitted to the room beside the text.

Paper: LongVU (arXiv 2410.17434), Sec. 3.1 to 3.3.
Original read: Vision-CAIR/LongVU, `cambrian_arch.py`, `prepare_inputs_labels_for_multimodal` and `select_frame`.
Deviations: every sample is decided for itself and nothing exceeds the context length, unless the configuration asks
for the original's behaviour.

Shapes: F frames of a video, T kept frames, Q queries of a frame, E width of the connector, V visual tokens, L text
tokens, D width of the language model.
"""

from dataclasses import dataclass, field

import torch

from longvideo.modeling.longvu.configuration_longvu import LongVUConfig
from longvideo.modeling.longvu.frame_position import add_frame_position
from longvideo.modeling.longvu.frame_selection import (
    FrameLimits,
    choose_full_resolution,
    choose_grid,
    count_full_resolution,
    limits,
    query_scores,
)
from longvideo.modeling.longvu.spatial_compression import compress
from longvideo.modeling.longvu.sva_longvu import add_newlines, crop_grid, low_grid_size, resize_grid, token_grid_index
from longvideo.modeling.longvu.temporal_reduction import WINDOWS, select_frames
from longvideo.modeling.longvu.vision_longvu import LongVUVisual

PAD_IDS = {"qwen2": 151643, "llama": 128002}


@dataclass
class LongVUSelection:
    """Which parts of an image or a video the decoder sees.

    Args:
        kept_frames: (T,) int64 zero-based frames that temporal reduction kept.
        dino_similarity: (F,) float32 mean similarity of each frame within its window.
        mode: "full" (every frame at the full grid), "low" (every frame at the low grid), "mix" (some frames raised to
            the full grid by the question) or "stc" (spatial token compression).
        full_resolution: (T,) bool, True for frames at the full grid.
        query_scores: (T,) float32 in mode "mix".
        token_frame: (V,) int64, position of each token's frame in `kept_frames`.
        token_grid_index: (V,) int64, row-major place in the uncropped grid, -1 for newline tokens.
        token_is_full: (V,) bool, True for tokens of full grids.
    """

    kept_frames: torch.Tensor
    dino_similarity: torch.Tensor
    mode: str
    full_resolution: torch.Tensor
    query_scores: torch.Tensor | None
    token_frame: torch.Tensor
    token_grid_index: torch.Tensor
    token_is_full: torch.Tensor


@dataclass
class TextRow:
    """The text of one sample.

    Args:
        num_text: tokens without placeholders, and whatever the cache holds.
        num_counted: tokens that the limits on frames count with (`count_to_pad_id`), placeholders as the original
            counts them.
        query: (L, D) embeddings of the text after the last placeholder.
        reserve: positions for new tokens.
        sample: position of the sample in the batch, for messages.
    """

    num_text: int
    num_counted: int
    query: torch.Tensor
    reserve: int
    sample: int = 0


@dataclass
class RowVisuals:
    """The images and videos of one sample, in prompt order.

    Args:
        kinds: "image" or "video" each.
        visuals: encoded, or None while a video waits to be encoded.
        num_frames: frames each.
        sizes: (width, height) each.
    """

    kinds: list[str]
    visuals: list[LongVUVisual | None]
    num_frames: list[int]
    sizes: list[tuple[int, int]]
    videos: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.videos = [i for i, kind in enumerate(self.kinds) if kind == "video"]


def grid_tokens(config: LongVUConfig, size: tuple[int, int], *, full: bool) -> torch.Tensor:
    """Gives the places in the uncropped grid of a frame's tokens, (V,) int64, -1 for newline tokens."""
    side = config.grid_size if full else config.lowres_token
    if not full:
        size = low_grid_size(*size, full_side=config.grid_size, low_side=config.lowres_token)
    return token_grid_index(*size, side, newline=config.image_newline)


def image_is_full(config: LongVUConfig) -> bool:
    """Says whether images come at the full grid."""
    return not (config.highres and config.low_grid_images)


def has_low_grid(config: LongVUConfig, size: tuple[int, int]) -> bool:
    """Says whether frames of a size can be shown at a lower resolution; very flat ones would not become smaller."""
    if not config.highres or config.behaves("budget_without_newlines"):
        return config.highres
    return len(grid_tokens(config, size, full=False)) < len(grid_tokens(config, size, full=True))


def frame_limits(config: LongVUConfig, budget: int, size: tuple[int, int]) -> FrameLimits:
    """Counts how many frames of a size fit into a budget, as the configured rule counts.

    Args:
        config: LongVU configuration.
        budget: positions for the video; may be negative.
        size: (width, height) of its frames.

    Returns:
        Limits at both grids.
    """
    if config.behaves("budget_without_newlines"):
        full, low = config.image_token_len, config.lowres_token**2
    else:
        full, low = (len(grid_tokens(config, size, full=x)) for x in (True, False))
    return limits(budget, 0, reserve=0, full_tokens=full, low_tokens=low if has_low_grid(config, size) else full)


def reduction_limit(config: LongVUConfig, budget: int, size: tuple[int, int]) -> int:
    """Gives the number of frames from which on a video is reduced by the "original" rule.

    Args:
        config: LongVU configuration.
        budget: positions for the video.
        size: (width, height) of its frames.

    Returns:
        The original reduces a video that fits exactly; where tokens are counted exactly it is left alone.
    """
    return frame_limits(config, budget, size).low + (0 if config.behaves("budget_without_newlines") else 1)


def share(budget: int, weights: list[int]) -> list[int]:
    """Divides a budget among the videos of a sample by their frames; one video gets all of it."""
    spare, total = budget - len(weights), sum(weights)
    return [1 + spare * weight // total for weight in weights]


def _image_tokens(config: LongVUConfig, row: RowVisuals) -> int:
    full = image_is_full(config)
    images = [size for kind, size in zip(row.kinds, row.sizes, strict=True) if kind == "image"]
    return sum(len(grid_tokens(config, size, full=full)) for size in images)


def row_budget(config: LongVUConfig, row: RowVisuals, text: TextRow) -> int:
    """Counts the positions that text, images and new tokens leave for the videos of a sample.

    Args:
        config: LongVU configuration.
        row: images and videos of the sample.
        text: its text.

    Returns:
        Positions; negative only where the original's behaviour is asked for.

    Raises:
        ValueError: nothing is left; the question is never cut.
    """
    images = _image_tokens(config, row)
    budget = config.context_length - text.num_text - text.reserve - images
    if config.behaves("truncate_on_overflow") and config.behaves("forced_removal"):
        return budget
    if budget < len(row.videos):
        pictures = f", its images {images}" if images else ""
        needed = f"its {len(row.videos)} video(s) need at least {len(row.videos)} more" if row.videos else "that"
        raise ValueError(
            f"The text of sample {text.sample} (with what is cached) takes {text.num_text} positions{pictures} and "
            f"{text.reserve} are reserved for new tokens; {needed} is more than the context_length of "
            f"{config.context_length}. Shorten the text or lower max_new_tokens."
        )
    return budget


def reduction_limits(config: LongVUConfig, row: RowVisuals, text: TextRow) -> list[int | None]:
    """Gives for each visual of a sample the number of frames from which on it is reduced; None for images."""
    counted = config.context_length - text.num_counted - text.reserve - _image_tokens(config, row)
    found: list[int | None] = [None] * len(row.kinds)
    for i, part in zip(row.videos, share(counted, [row.num_frames[i] for i in row.videos]), strict=True):
        found[i] = reduction_limit(config, part, row.sizes[i])
    return found


def settle_reduction(config: LongVUConfig, row: RowVisuals, text: TextRow) -> None:
    """Reduces videos that were encoded before their question was known and are too long beside it."""
    for i, limit in enumerate(reduction_limits(config, row, text)):
        visual = row.visuals[i]
        if visual.reduced or visual.num_frames < limit:
            continue
        window = config.temporal_window or WINDOWS[config.temporal_reduction]
        kept_T = select_frames(
            visual.dino_similarity,
            window=window,
            threshold=config.dino_threshold,
            max_frames=config.max_kept_frames,
            rule=config.temporal_reduction,
        )
        row.visuals[i] = visual.keep(kept_T)


@dataclass
class FrameRenderer:
    """Turns aggregated frames into tokens of the decoder.

    Args:
        config: LongVU configuration.
        project: maps (..., E) to (..., D).
        newline: (D,) learned token, or None.
    """

    config: LongVUConfig
    project: torch.nn.Module
    newline: torch.Tensor | None

    def tokens(self, visual: LongVUVisual, *, full: bool, only: torch.Tensor | None = None) -> torch.Tensor:
        """Renders frames at one grid.

        Args:
            visual: image or video.
            full: which grid.
            only: (n,) int64 positions among the kept frames; None for all.

        Returns:
            (T or n, V, D), padding cut off, rows ended by newline tokens, frame positions added where configured.
        """
        config, features, kept = self.config, visual.features, visual.kept_frames
        if only is not None:
            features, kept = features[only.to(features.device)], kept[only.to(kept.device)]
        side, size = config.grid_size, visual.size
        if not full:
            side = config.lowres_token
            size = low_grid_size(*size, full_side=config.grid_size, low_side=side)
            features = resize_grid(features, side)
        grid = self.project(features).unflatten(1, (side, side))
        tokens = add_newlines(crop_grid(grid, *size), self.newline)
        return add_frame_position(tokens, kept, rule=config.frame_pos_rule) if config.frame_pos else tokens

    def image(self, visual: LongVUVisual) -> tuple[torch.Tensor, LongVUSelection]:
        """Renders an image, (V, D)."""
        full = image_is_full(self.config)
        tokens = self.tokens(visual, full=full)
        return self._select(visual, tokens, full, None, "full" if full else "low")

    def video(
        self, visual: LongVUVisual, grid: str, budget: int, query: torch.Tensor
    ) -> tuple[torch.Tensor, LongVUSelection]:
        """Renders a video within a budget.

        Args:
            visual: video, temporally reduced.
            grid: "full" or "low", the grid it starts from.
            budget: positions it may take.
            query: (L, D) embeddings of the question.

        Returns:
            (V, D) tokens and what was chosen.

        Source: LongVU Eq. 1 and 2. Selection and compression exclude each other, as in the original.
        """
        full = grid == "full"
        tokens = self.tokens(visual, full=full)
        num_frames, num_tokens = tokens.shape[:2]
        if num_frames * num_tokens > budget:
            keep_TV = compress(
                tokens,
                self.config.drop_threshold,
                window=self.config.stc_window,
                anchor=self.config.stc_anchor,
                budget=budget,
                forced_removal=self.config.behaves("forced_removal"),
            )
            return self._select(visual, tokens, full, keep_TV, "stc")
        if full:
            return self._select(visual, tokens, full, None, "full")
        num_full_tokens = len(grid_tokens(self.config, visual.size, full=True))
        num_full = count_full_resolution(num_frames, budget, full_tokens=num_full_tokens, low_tokens=num_tokens)
        if not num_full:
            return self._select(visual, tokens, full, None, "low")
        return self._mix(visual, tokens, num_full, query)

    def _select(
        self,
        visual: LongVUVisual,
        tokens: torch.Tensor,
        full: bool,
        keep_TV: torch.Tensor | None,
        mode: str,
    ) -> tuple[torch.Tensor, LongVUSelection]:
        num_frames, num_tokens = tokens.shape[:2]
        if keep_TV is None:
            keep_TV = torch.ones(num_frames, num_tokens, dtype=torch.bool, device=tokens.device)
        places = grid_tokens(self.config, visual.size, full=full).expand(num_frames, -1)
        frame_V, position_V = keep_TV.cpu().nonzero().unbind(1)
        selection = LongVUSelection(
            kept_frames=visual.kept_frames,
            dino_similarity=visual.dino_similarity,
            mode=mode,
            full_resolution=torch.full((num_frames,), full),
            query_scores=None,
            token_frame=frame_V,
            token_grid_index=places[frame_V, position_V],
            token_is_full=torch.full((len(frame_V),), full),
        )
        return tokens[keep_TV], selection

    def _mix(
        self, visual: LongVUVisual, low: torch.Tensor, num_full: int, query: torch.Tensor
    ) -> tuple[torch.Tensor, LongVUSelection]:
        """Raises the frames that fit the question best to the full grid, at their places."""
        scores_T = query_scores(low, query)
        chosen_T = choose_full_resolution(scores_T, num_full)
        raised = iter(self.tokens(visual, full=True, only=chosen_T.nonzero()[:, 0]))
        tokens = torch.cat([next(raised) if chosen else frame for chosen, frame in zip(chosen_T, low, strict=True)])
        chosen_T = chosen_T.cpu()
        places = [grid_tokens(self.config, visual.size, full=full) for full in (False, True)]
        lengths = torch.tensor([len(places[int(chosen)]) for chosen in chosen_T])
        frame_V = torch.arange(len(lengths)).repeat_interleave(lengths)
        selection = LongVUSelection(
            kept_frames=visual.kept_frames,
            dino_similarity=visual.dino_similarity,
            mode="mix",
            full_resolution=chosen_T,
            query_scores=scores_T.cpu(),
            token_frame=frame_V,
            token_grid_index=torch.cat([places[int(chosen)] for chosen in chosen_T]),
            token_is_full=chosen_T[frame_V],
        )
        return tokens, selection


def render_rows(
    renderer: FrameRenderer, rows: list[RowVisuals], texts: list[TextRow]
) -> tuple[list[torch.Tensor], tuple[LongVUSelection, ...]]:
    """Fits the visuals of every sample into the room beside its text.

    Args:
        renderer: projector and configuration.
        rows: per sample its images and videos, encoded.
        texts: per sample its text.

    Returns:
        Per image and video, in prompt order over all samples, its tokens (V, D) and what was chosen.

    Raises:
        ValueError: a text that leaves no room.
    """
    config = renderer.config
    features, selections, first_grid = [], [], None
    for row, text in zip(rows, texts, strict=True):
        budget = row_budget(config, row, text)
        settle_reduction(config, row, text)
        frames = [len(row.visuals[i].kept_frames) for i in row.videos]
        counted = budget - (text.num_counted - text.num_text)
        shares = dict(zip(row.videos, zip(share(budget, frames), share(counted, frames), strict=True), strict=True))
        for i, visual in enumerate(row.visuals):
            if row.kinds[i] == "image":
                tokens, selection = renderer.image(visual)
            else:
                room, counted_room = shares[i]
                grid = choose_grid(
                    len(visual.kept_frames),
                    frame_limits(config, counted_room, visual.size),
                    highres=has_low_grid(config, visual.size),
                    strict_limit=config.behaves("budget_without_newlines"),
                    full_beyond_limit=config.behaves("full_grid_beyond_limit"),
                )
                if config.behaves("batch_decision_from_first"):
                    grid = first_grid = first_grid or grid
                tokens, selection = renderer.video(visual, grid, room, text.query)
            features.append(tokens)
            selections.append(selection)
    return features, tuple(selections)
