"""Which rows of the decoder see which visual keys.

Paper: CrossLMM (arXiv 2505.17020), Sec. 3.2 and 3.3, which speak of one video; the rules for several visuals and for
padding are this code's. A visual is a video or an image (a video of one frame).

What a caller does: `assign_visuals` says which visuals each row of the batch holds, `VisualInputs` carries their
original tokens, and `visual_cache.prepare_visual_memory` calls `build_plan` once per forward pass.

Rules. A visual row (a placeholder) sees its own visual, or its own frame of it. A text row sees every visual whose
first placeholder stands at or before it. Padding rows see nothing. Keys of a batch row lie in prompt order, so that
what a text row sees is a prefix of them, and no mask is needed: queries are grouped by what they see.

Shapes: B batch, S positions, P original tokens of all visuals, E width of memory tokens, G groups of Q queries each.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch

_COUNTER = itertools.count()


@dataclass
class VisualInputs:
    """Original tokens of the visuals of a batch; the same object may be given with every chunk of a prefill.

    Args:
        tokens: (P, E) tokens that keys and values are made of, visual after visual, frame after frame, row-major.
        num_frames: frames of each visual.
        row_visuals: per batch row the indices of its visuals, in prompt order. Rows may share visuals (beams).
        rows_per_frame: placeholders r of one frame in the prompt.
        key: identity; taken anew for each object.
    """

    tokens: torch.Tensor
    num_frames: list[int]
    row_visuals: list[list[int]]
    rows_per_frame: int
    key: int = field(default_factory=lambda: next(_COUNTER))

    def __post_init__(self):
        frames = sum(self.num_frames)
        if (
            min(self.num_frames, default=1) < 1
            or len(self.tokens) % max(frames, 1)
            or (len(self.tokens) and not frames)
        ):
            raise ValueError(
                f"{len(self.tokens)} original tokens do not divide evenly over visuals of {self.num_frames} frames; "
                "every visual needs a frame at least, and every frame the same number of tokens."
            )
        beyond = [i for row in self.row_visuals for i in row if not 0 <= i < len(self.num_frames)]
        if beyond:
            raise ValueError(f"row_visuals names the visuals {beyond}, but there are {len(self.num_frames)}.")

    @property
    def keys_per_frame(self) -> int:
        """Original tokens N of one frame."""
        return len(self.tokens) // max(sum(self.num_frames), 1)


@dataclass(frozen=True)
class RowVisual:
    """One visual in one row of the batch, as far as the forward passes so far have come.

    Args:
        identity: equal for equal visuals.
        num_frames: frames.
        num_rows: placeholders.
        num_keys: original tokens.
        first_key: place of its first key among the keys of the row.
        seen: placeholders that have passed.
    """

    identity: tuple[int, int]
    num_frames: int
    num_rows: int
    num_keys: int
    first_key: int
    seen: int = 0

    @property
    def end_key(self) -> int:
        """Place behind its last key."""
        return self.first_key + self.num_keys


@dataclass
class AttentionGroup:
    """Queries that see equally many keys, for one call of attention without a mask.

    Args:
        rows: (G, Q) int64 places of the queries in the flattened (B * S) positions; None for all of them in order.
        first_row: first batch row.
        num_rows: batch rows, one behind the other.
        first_key: place of the first visible key in each of these rows.
        num_keys: keys that a query sees.
        folds: stretches of `num_keys` keys in each batch row, one for each entry of G in that row.
        frames: (G, Q) int64 frame of each query, for visual rows.
        key_mask: (B, keys) bool, only for single queries in rows with different numbers of keys.
        live: (B,) bool, with `key_mask`: rows that see a key at all.
    """

    rows: torch.Tensor | None
    first_row: int
    num_rows: int
    first_key: int
    num_keys: int
    folds: int = 1
    frames: torch.Tensor | None = None
    key_mask: torch.Tensor | None = None
    live: torch.Tensor | None = None


@dataclass
class VisibilityPlan:
    """What the cross-attention of one forward pass does, the same in every layer.

    Args:
        v2v: groups of visual rows.
        t2v: groups of text rows.
        segments: per batch row the (start, length) stretches of `VisualInputs.tokens` that join its keys.
        t2v_counts: keys of each row before.
        v2v_counts: V2V keys of each row before; they are fewer once finished visuals were dropped.
        token_frames: (P,) int64 frame of each new token within its visual; None without new tokens.
        keep_v2v: whether V2V keys are needed after this forward pass.
    """

    v2v: list[AttentionGroup]
    t2v: list[AttentionGroup]
    segments: list[list[tuple[int, int]]]
    t2v_counts: list[int]
    v2v_counts: list[int]
    token_frames: torch.Tensor | None = None
    keep_v2v: bool = False

    def to(self, device: torch.device) -> "VisibilityPlan":
        """Moves the plan; returns itself where it is there already."""
        tensors = [group.rows for group in self.v2v + self.t2v] + [self.token_frames]
        tensors += [group.key_mask for group in self.t2v]
        if all(x is None or x.device == device for x in tensors):
            return self

        def move(group: AttentionGroup) -> AttentionGroup:
            names = ("rows", "frames", "key_mask", "live")
            moved = {name: getattr(group, name).to(device) for name in names if getattr(group, name) is not None}
            return replace(group, **moved)

        frames = None if self.token_frames is None else self.token_frames.to(device)
        return replace(self, v2v=[*map(move, self.v2v)], t2v=[*map(move, self.t2v)], token_frames=frames)


@dataclass
class VisualMemory:
    """What the decoder's layers get as `visual_memory`.

    Args:
        tokens: (P, E) original tokens that come new in this forward pass, None without any.
        plan: who sees what.
    """

    tokens: torch.Tensor | None
    plan: VisibilityPlan


def assign_visuals(masks: dict[str, torch.Tensor], num_rows: dict[str, Sequence[int]]) -> list[list[tuple[str, int]]]:
    """Says which visuals each row of a batch holds.

    Args:
        masks: per kind ("video", "image") (B, S) bool, True at its placeholders.
        num_rows: per kind the placeholders of each visual, over the batch in prompt order.

    Returns:
        Per batch row (kind, index within the kind), in prompt order.

    Raises:
        ValueError: placeholders and visuals do not agree, or those of a visual lie in two rows.
    """
    batch_size = len(next(iter(masks.values())))
    found: list[list[tuple[int, str, int]]] = [[] for _ in range(batch_size)]
    for kind, mask_BS in masks.items():
        places = mask_BS.nonzero().tolist()
        counts = [int(n) for n in num_rows.get(kind, ())]
        if sum(counts) != len(places):
            raise ValueError(
                f"The prompt holds {len(places)} {kind} placeholder tokens but the {kind} inputs give {sum(counts)} "
                f"features. Prepare text and {kind}s in one processor call, and do not cut the input ids afterwards."
            )
        start = 0
        for index, count in enumerate(counts):
            rows = {row for row, _ in places[start : start + count]}
            if len(rows) != 1:
                raise ValueError(
                    f"The {count} placeholders of {kind} {index} lie in {len(rows)} rows of the batch, not in one. "
                    f"Give the {kind}s in the order of the prompts."
                )
            row, position = places[start]
            found[row].append((position, kind, index))
            start += count
    return [[(kind, index) for _, kind, index in sorted(row)] for row in found]


def add_visuals(
    rows: list[list[RowVisual]], visuals: VisualInputs | None
) -> tuple[list[list[RowVisual]], list[list[tuple[int, int]]]]:
    """Appends new visuals to what each row holds.

    Args:
        rows: visuals of each row so far.
        visuals: new ones, or None.

    Returns:
        The visuals of each row, and per row the (start, length) stretches of the new tokens.

    Raises:
        ValueError: another number of rows.
    """
    if visuals is None:
        return rows, [[] for _ in rows]
    if len(visuals.row_visuals) != len(rows):
        raise ValueError(
            f"The visual inputs are for {len(visuals.row_visuals)} rows, but the batch has {len(rows)}. Repeat or "
            "select `row_visuals` together with the input ids."
        )
    starts = [0, *itertools.accumulate(n * visuals.keys_per_frame for n in visuals.num_frames)]
    extended, segments = [], []
    for row, indices in zip(rows, visuals.row_visuals, strict=True):
        row = list(row)
        for i in indices:
            frames = visuals.num_frames[i]
            num_keys = starts[i + 1] - starts[i]
            num_rows = frames * visuals.rows_per_frame
            first_key = row[-1].end_key if row else 0
            row.append(RowVisual((visuals.key, i), frames, num_rows, num_keys, first_key))
        extended.append(row)
        segments.append([(starts[i], starts[i + 1] - starts[i]) for i in indices])
    return extended, segments


def advance_row(
    visuals: list[RowVisual], places: torch.Tensor
) -> tuple[list[RowVisual], list[tuple[RowVisual, torch.Tensor]]]:
    """Gives the placeholders of a row, in order, to the visuals that still wait for some.

    Args:
        visuals: visuals of the row.
        places: (n,) int64 places of the placeholders of this forward pass, rising.

    Returns:
        The visuals afterwards, and each visual (as before) that got placeholders, with their places.

    Raises:
        ValueError: more placeholders than the visuals have.
    """
    after, met, start = [], [], 0
    for visual in visuals:
        taken = min(visual.num_rows - visual.seen, len(places) - start)
        if taken:
            met.append((visual, places[start : start + taken]))
            start += taken
        after.append(replace(visual, seen=visual.seen + taken))
    if start < len(places):
        raise ValueError(
            f"A row holds {len(places)} visual placeholders, but its visuals have {start} left. Pass the pixels of "
            "all its videos and images, as the processor gave them."
        )
    return after, met


def visible_keys(visuals: list[RowVisual]) -> int:
    """Returns how many keys of a row have come into sight, those of all visuals that have begun."""
    return max((visual.end_key for visual in visuals if visual.seen), default=0)


class _Groups:
    """Collects groups row by row and joins those of neighbouring rows that have the same form."""

    def __init__(self):
        self.groups: list[AttentionGroup] = []
        self.parts: list[list[torch.Tensor]] = []
        self.frames: list[list[torch.Tensor]] = []
        self.last: dict[tuple, int] = {}

    def add(
        self, row: int, places_GQ: torch.Tensor, first_key: int, num_keys: int, frames_GQ: torch.Tensor | None = None
    ) -> None:
        """Adds queries of one batch row, G stretches of `num_keys` keys each with Q of them."""
        if not places_GQ.numel() or not num_keys:
            return
        form = (*places_GQ.shape, first_key, num_keys)
        i = self.last.get(form)
        if i is not None and self.groups[i].first_row + self.groups[i].num_rows == row:
            self.groups[i].num_rows += 1
        else:
            i = self.last[form] = len(self.groups)
            self.groups.append(AttentionGroup(None, row, 1, first_key, num_keys, folds=len(places_GQ)))
            self.parts.append([])
            self.frames.append([])
        self.parts[i].append(places_GQ)
        if frames_GQ is not None:
            self.frames[i].append(frames_GQ)

    def finish(self) -> list[AttentionGroup]:
        """Returns the groups."""
        for group, parts, frames in zip(self.groups, self.parts, self.frames, strict=True):
            group.rows = torch.cat(parts)
            group.frames = torch.cat(frames) if frames else None
        return self.groups


def _add_visual_rows(
    groups: _Groups, row: int, visual: RowVisual, places: torch.Tensor, base: int, scope: str
) -> None:
    """Groups the placeholders of one visual: all of them, or frame by frame where they see their own frame only."""
    per_frame = visual.num_rows // visual.num_frames
    keys_per_frame = visual.num_keys // visual.num_frames
    frames = (torch.arange(len(places)) + visual.seen) // per_frame
    first_key = visual.first_key - base
    if scope == "video":
        groups.add(row, places[None], first_key, visual.num_keys, frames[None])
        return
    # A chunk may begin and end inside a frame; the whole frames between go into one call.
    head = min(-visual.seen % per_frame, len(places))
    body = (len(places) - head) // per_frame * per_frame
    for start, count in ((0, head), (head, body), (head + body, len(places) - head - body)):
        if count:
            width = per_frame if start == head and body else count
            shape = (count // width, width)
            part = slice(start, start + count)
            key = first_key + int(frames[start]) * keys_per_frame
            groups.add(row, places[part].view(shape), key, keys_per_frame, frames[part].view(shape))


def _add_text_rows(
    groups: _Groups, row: int, text: torch.Tensor, before: int, met: list[tuple[RowVisual, torch.Tensor]]
) -> None:
    """Groups the text rows of one batch row by the visuals that have begun."""
    starts = [(int(places[0]), visual.end_key) for visual, places in met if not visual.seen]
    cuts = torch.searchsorted(text, torch.tensor([place for place, _ in starts], dtype=text.dtype)).tolist()
    limits = zip([0, *cuts], [*cuts, len(text)], [before, *(end for _, end in starts)], strict=True)
    for start, end, num_keys in limits:
        groups.add(row, text[start:end][None], 0, num_keys)


def build_plan(
    rows: list[list[RowVisual]],
    segments: list[list[tuple[int, int]]],
    visual_BS: torch.Tensor,
    *,
    real_BS: torch.Tensor | None = None,
    v2v_bases: list[int] | None = None,
    v2v_scope: str = "video",
    use_v2v: bool = True,
    use_t2v: bool = True,
) -> tuple[VisibilityPlan, list[list[RowVisual]]]:
    """Plans a forward pass with visual rows.

    Args:
        rows: visuals of each row, those that come new included.
        segments: per row the stretches of new tokens, of `add_visuals`.
        visual_BS: (B, S) bool, True at placeholders, on the CPU.
        real_BS: (B, S) bool, False on padding, on the CPU; None for no padding.
        v2v_bases: per row the key at which stored V2V keys begin; zeros when None.
        v2v_scope: "video" or "frame".
        use_v2v: whether visual rows see keys.
        use_t2v: whether text rows see keys.

    Returns:
        The plan and the visuals of each row afterwards.

    Raises:
        ValueError: more placeholders than the visuals have.
    """
    bases = v2v_bases or [0] * len(rows)
    length = visual_BS.shape[1]
    v2v, t2v, after = _Groups(), _Groups(), []
    for b, visuals in enumerate(rows):
        places = visual_BS[b].nonzero()[:, 0]
        row_after, met = advance_row(visuals, places)
        after.append(row_after)
        for visual, visual_places in met if use_v2v else ():
            _add_visual_rows(v2v, b, visual, visual_places + b * length, bases[b], v2v_scope)
        if use_t2v:
            is_text = ~visual_BS[b] if real_BS is None else ~visual_BS[b] & real_BS[b]
            shifted = [(visual, visual_places + b * length) for visual, visual_places in met]
            _add_text_rows(t2v, b, is_text.nonzero()[:, 0] + b * length, visible_keys(visuals), shifted)
    new = [sum(count for _, count in row) for row in segments]
    totals = [(row[-1].end_key if row else 0) - n for row, n in zip(rows, new, strict=True)]
    plan = VisibilityPlan(
        v2v=v2v.finish(),
        t2v=t2v.finish(),
        segments=segments,
        t2v_counts=totals,
        v2v_counts=[total - base for total, base in zip(totals, bases, strict=True)],
        keep_v2v=use_v2v and any(visual.seen < visual.num_rows for row in after for visual in row),
    )
    return plan, after


def build_text_plan(
    rows: list[list[RowVisual]],
    length: int,
    *,
    v2v_counts: list[int],
    keep_v2v: bool = False,
    key_mask: Callable[[], torch.Tensor] | None = None,
) -> VisibilityPlan:
    """Plans a forward pass without visual rows and without new keys, as decoding is; reads no tensor.

    Args:
        rows: visuals of each row.
        length: positions S of the forward pass.
        v2v_counts: V2V keys that are stored, see `VisibilityPlan`.
        keep_v2v: whether they go on being needed.
        key_mask: function without arguments that returns (B, longest) bool, True at visible keys; called where rows
            with one query each see different numbers of keys.

    Returns:
        The plan. Padding rows among the queries attend like text; nothing reads what they become.
    """
    counts = [visible_keys(row) for row in rows]
    groups = []
    if len(set(counts)) == 1:
        if counts[0]:
            groups = [AttentionGroup(None, 0, len(rows), 0, counts[0])]
    elif length == 1:
        mask = key_mask()
        live = mask.any(1)
        # A row that sees nothing looks at its first place and is left as it was; a softmax over nothing is NaN.
        first = torch.arange(mask.shape[1], device=mask.device) == 0
        mask = mask | (first & ~live[:, None])
        groups = [AttentionGroup(None, 0, len(rows), 0, max(counts), key_mask=mask, live=live)]
    else:
        for b, count in enumerate(counts):
            if count:
                places = torch.arange(b * length, (b + 1) * length)
                groups.append(AttentionGroup(places[None], b, 1, 0, count))
    totals = [row[-1].end_key if row else 0 for row in rows]
    return VisibilityPlan([], groups, [[] for _ in rows], totals, v2v_counts, keep_v2v=keep_v2v)
