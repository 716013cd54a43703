"""Cross-attention keys in the decoder's own cache.

Paper: CrossLMM (arXiv 2505.17020); caching is this code's.

What a caller does: before the decoder runs, `memory = prepare_visual_memory(...)` with the cache it gives to the
decoder (or None), then `language_model(..., past_key_values=cache, visual_memory=memory)`. Nothing else: layers are
appended to the cache when the first visual comes, chunks of a prefill go on where the last one stopped, later turns
add visuals.

Behind the decoder's layers lie one `VisualLedgerLayer`, which knows the visuals of each row, and for each
cross-attention layer two `VisualKeysLayer`: T2V keys, which stay, and V2V keys, which stay only while placeholders of
a video are still to come. `crop` takes away text only. `get_seq_length` of the cache reads layer 0, as before.

Shapes: B batch, S positions, H key heads, L keys of the longest row, C width of a head.
"""

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, StaticLayer

from longvideo.modeling.crosslmm.configuration_crosslmm import CrossLMMConfig
from longvideo.modeling.crosslmm.visibility import (
    RowVisual,
    VisualInputs,
    VisualMemory,
    add_visuals,
    build_plan,
    build_text_plan,
    visible_keys,
)


class _AppendedLayer(CacheLayerMixin):
    """A cache layer without sequence positions."""

    is_sliding = False
    is_croppable = True
    supports_early_init = False

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Notes type and device."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs) -> None:
        """Refuses; the decoder never writes here."""
        raise ValueError(f"{type(self).__name__} holds visual keys and is written by cross-attention layers only.")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Returns the number of keys and no offset."""
        return self.get_seq_length(), 0

    def get_seq_length(self) -> int:
        """Returns the keys of the longest row."""
        return self.keys.shape[-2] if self.is_initialized else 0

    def get_max_length(self) -> int:
        """Returns -1, for no limit."""
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Keeps everything: visual keys belong to no position of the sequence."""


class VisualLedgerLayer(_AppendedLayer):
    """Knows which visuals each row holds and how far their placeholders have come.

    Args:
        decoder_layers: the cache layers of the decoder.
    """

    def __init__(self, decoder_layers: list[CacheLayerMixin]):
        super().__init__()
        self.decoder_layers = decoder_layers
        self.reset()

    def reset(self) -> None:
        """Forgets all visuals."""
        self.rows: list[list[RowVisual]] = []
        self.v2v_bases: list[int] = []
        self.known: set[int] = set()
        self.text_since_visual = 0
        self.moved = True
        self._mask: torch.Tensor | None = None

    def prefetch(self) -> None:
        """Passes on to the decoder's first layer: an offloaded cache goes round the layers and ends up here."""
        for layer in (
            self.decoder_layers[:1] + [x for x in self.decoder_layers if not getattr(x, "is_sliding", False)][:1]
        ):
            layer.prefetch()

    def crop(self, tokens_to_remove: int) -> None:
        """Notes that text was taken away.

        Args:
            tokens_to_remove: negative number of positions.

        Raises:
            ValueError: visual rows would be cut.
        """
        if tokens_to_remove >= 0 or not any(self.rows):
            return
        if self.text_since_visual + tokens_to_remove < 0:
            raise ValueError(
                f"Cropping {-tokens_to_remove} positions would cut into a video: only {self.text_since_visual} "
                "positions of text follow the last visual one. Begin with a new cache."
            )
        self.text_since_visual += tokens_to_remove

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Reorders the rows; `moved` says whether any row holds other visuals than before."""
        source = beam_idx.tolist()
        before = [[visual.identity for visual in row] for row in self.rows]
        self.moved = bool(self.rows) and (
            len(source) != len(before) or any(before[i] != row for i, row in zip(source, before, strict=True))
        )
        self._take(source)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row."""
        self._take([i for i in range(len(self.rows)) for _ in range(repeats)])

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps the rows of an index or a bool mask."""
        if self.rows:
            self._take(torch.arange(len(self.rows))[indices.cpu()].tolist())

    def _take(self, source: list[int]) -> None:
        if self.rows:
            self.rows = [self.rows[i] for i in source]
            self.v2v_bases = [self.v2v_bases[i] for i in source]
        self._mask = None

    def set_rows(self, rows: list[list[RowVisual]]) -> None:
        """Takes over the rows after a forward pass."""
        if [visible_keys(row) for row in rows] != [visible_keys(row) for row in self.rows]:
            self._mask = None
        self.rows = rows

    def key_mask(self, device: torch.device) -> torch.Tensor:
        """Returns (B, L) bool, True at the keys that have come into sight."""
        if self._mask is None or self._mask.device != device:
            counts = torch.tensor([visible_keys(row) for row in self.rows])
            self._mask = (torch.arange(int(counts.max())) < counts[:, None]).to(device)
        return self._mask


class VisualKeysLayer(_AppendedLayer):
    """Keys and values of one cross-attention module, (B, H, L, C), rows padded at the end.

    Args:
        ledger: the cache's ledger, which comes before this layer.
    """

    def __init__(self, ledger: VisualLedgerLayer):
        super().__init__()
        self.ledger = ledger

    def store(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Replaces what is stored."""
        self.keys, self.values = keys, values
        self.lazy_initialization(keys, values)

    def reset(self) -> None:
        """Drops keys and values."""
        self.keys = self.values = None
        self.is_initialized = False

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Reorders the rows; beams of one prompt share their visuals, and nothing is copied for them."""
        if self.ledger.moved:
            super().reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row."""
        if self.is_initialized:
            self.store(self.keys.repeat_interleave(repeats, dim=0), self.values.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps the rows of an index or a bool mask."""
        if self.is_initialized:
            indices = indices.to(self.keys.device)
            self.store(self.keys[indices], self.values[indices])


def find_ledger(cache: Cache | None) -> VisualLedgerLayer | None:
    """Returns the ledger of a cache that has seen visuals, else None."""
    for layer in reversed(getattr(cache, "layers", ())):
        if isinstance(layer, VisualLedgerLayer):
            return layer
    return None


def knows_visuals(cache: Cache | None, visuals: VisualInputs) -> bool:
    """Says whether a cache has taken over these visual inputs in an earlier forward pass."""
    ledger = find_ledger(cache)
    return ledger is not None and visuals.key in ledger.known


def _append_layers(cache: Cache, num_decoder_layers: int, num_cross_layers: int) -> VisualLedgerLayer:
    layers = getattr(cache, "layers", None)
    if layers is None or any(isinstance(layer, StaticLayer) for layer in layers):
        raise ValueError(
            f"CrossLMM cannot keep visual keys in a {type(cache).__name__}, because their number is not known in "
            'advance. Use a DynamicCache: leave `cache_implementation` unset, or set it to "dynamic" or "offloaded".'
        )
    while len(layers) < num_decoder_layers:
        layers.append(cache.layer_class_to_replicate())
    ledger = VisualLedgerLayer(layers[:num_decoder_layers])
    layers.append(ledger)
    layers.extend(VisualKeysLayer(ledger) for _ in range(2 * num_cross_layers))
    return ledger


def keys_layers(cache: Cache, slot: int) -> tuple[VisualKeysLayer, VisualKeysLayer]:
    """Returns the T2V and the V2V layer of a cross-attention layer.

    Args:
        cache: cache with a ledger.
        slot: number of the cross-attention layer, from zero.

    Raises:
        ValueError: no ledger in the cache.
    """
    for i, layer in enumerate(getattr(cache, "layers", ())):
        if isinstance(layer, VisualLedgerLayer):
            return cache.layers[i + 1 + 2 * slot], cache.layers[i + 2 + 2 * slot]
    raise ValueError(
        "The decoder's cache is not the one that prepare_visual_memory was given. Make a DynamicCache first and "
        "give it to both, or pass use_cache=False."
    )


def append_keys(
    stored: torch.Tensor | None, counts: list[int], packed_PHC: torch.Tensor, segments: list[list[tuple[int, int]]]
) -> torch.Tensor:
    """Appends to each row its stretches of packed keys.

    Args:
        stored: (B, H, L, C) keys so far, None for none.
        counts: keys of each row in `stored`.
        packed_PHC: (P, H, C) new keys of all visuals.
        segments: per row the (start, length) stretches of `packed_PHC`.

    Returns:
        (B, H, L', C), zeros behind a row's last key. Rows of equal numbers that lie one behind the other are a view.
    """
    lengths = [sum(n for _, n in row) for row in segments]
    flat = [segment for row in segments for segment in row]
    ends = [start + n for start, n in flat]
    in_order = all(start == end for (start, _), end in zip(flat[1:], ends, strict=False))
    even = len(set(lengths)) == 1 and len(set(counts)) == 1
    if even and in_order and lengths[0]:
        new = packed_PHC[flat[0][0] : ends[-1]].unflatten(0, (len(segments), lengths[0])).transpose(1, 2)
        return torch.cat([stored, new], dim=2) if counts[0] else new
    longest = max(n + count for n, count in zip(lengths, counts, strict=True))
    rows = []
    for b, (row, count) in enumerate(zip(segments, counts, strict=True)):
        parts = [packed_PHC[start : start + n].transpose(0, 1) for start, n in row]
        if count:
            parts.insert(0, stored[b, :, :count])
        used = count + lengths[b]
        parts.append(packed_PHC.new_zeros(packed_PHC.shape[1], longest - used, packed_PHC.shape[2]))
        rows.append(torch.cat(parts, dim=1))
    return torch.stack(rows)


def _token_frames(visuals: VisualInputs) -> torch.Tensor:
    frames = torch.cat([torch.arange(n) for n in visuals.num_frames])
    return frames.repeat_interleave(visuals.keys_per_frame).to(visuals.tokens.device)


def prepare_visual_memory(
    batch_size: int,
    length: int,
    *,
    config: CrossLMMConfig,
    visuals: VisualInputs | None = None,
    visual_BS: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    cache: Cache | None = None,
    device: torch.device | str = "cpu",
) -> VisualMemory | None:
    """Plans a forward pass and notes in the cache how far it comes; call it once for each forward pass.

    Args:
        batch_size: rows of the batch.
        length: positions S of this forward pass, without those in the cache.
        config: CrossLMM configuration.
        visuals: original tokens of visuals whose first placeholder comes in this forward pass or later ones. What the
            cache knows already is not added again, so every chunk of a prefill may bring the same object.
        visual_BS: (B, S) bool, True at placeholders that hold visual features; None for text only.
        attention_mask: (B, cached + S), 0 on padding; other forms and None count as no padding.
        cache: the decoder's cache; None without one.
        device: where the decoder's hidden states are.

    Returns:
        The `visual_memory` of the decoder, or None where no row has a visual.

    Raises:
        ValueError: placeholders and visuals do not agree, another number of rows than before, or a static cache.
    """
    layers = config.cross_attention_layers
    ledger = find_ledger(cache)
    if not layers or (visuals is None and (ledger is None or not ledger.rows)):
        return None
    if ledger is None and cache is not None:
        ledger = _append_layers(cache, config.text_config.num_hidden_layers, len(layers))
    rows = ledger.rows if ledger is not None and ledger.rows else [[] for _ in range(batch_size)]
    if len(rows) != batch_size:
        raise ValueError(f"The cache holds visuals of {len(rows)} rows, but the batch has {batch_size}.")
    if visuals is not None and ledger is not None and visuals.key in ledger.known:
        visuals = None
    bases = list(ledger.v2v_bases) if ledger is not None and ledger.v2v_bases else [0] * batch_size
    if config.share_kv and config.use_t2v:
        bases = [0] * batch_size
    if visuals is None and visual_BS is None:
        return _prepare_text(ledger, bases, length, config, torch.device(device))
    if visual_BS is None:
        visual_BS = torch.zeros(batch_size, length, dtype=torch.bool)
    real_BS = None
    if attention_mask is not None and getattr(attention_mask, "ndim", 0) == 2:
        real_BS = attention_mask[:, -length:].bool().cpu()
    given = (visuals, visual_BS.cpu(), real_BS)
    return _prepare_visual(ledger, rows, bases, given, config, torch.device(device))


def _prepare_text(
    ledger: VisualLedgerLayer, bases: list[int], length: int, config: CrossLMMConfig, device: torch.device
) -> VisualMemory:
    rows = ledger.rows
    totals = [row[-1].end_key if row else 0 for row in rows]
    counts = [total - base for total, base in zip(totals, bases, strict=True)]
    waiting = config.use_v2v and any(visual.seen < visual.num_rows for row in rows for visual in row)
    plan = build_text_plan(rows, length, v2v_counts=counts, keep_v2v=waiting, key_mask=lambda: ledger.key_mask(device))
    if not config.use_t2v:
        plan.t2v = []
    ledger.text_since_visual += length
    return VisualMemory(None, plan.to(device))


def _prepare_visual(
    ledger: VisualLedgerLayer | None,
    rows: list[list[RowVisual]],
    bases: list[int],
    given: tuple[VisualInputs | None, torch.Tensor, torch.Tensor | None],
    config: CrossLMMConfig,
    device: torch.device,
) -> VisualMemory:
    visuals, visual_BS, real_BS = given
    length = visual_BS.shape[1]
    rows, segments = add_visuals(rows, visuals)
    plan, after = build_plan(
        rows,
        segments,
        visual_BS,
        real_BS=real_BS,
        v2v_bases=bases,
        v2v_scope=config.v2v_scope,
        use_v2v=config.use_v2v,
        use_t2v=config.use_t2v,
    )
    missing = sum(visual.num_rows - visual.seen for row in after for visual in row)
    if ledger is None:
        if missing:
            raise ValueError(
                f"{missing} placeholders of the visual inputs are missing in the prompt. Prepare text and visual "
                "inputs in one processor call, and do not cut the input ids afterwards."
            )
        plan.keep_v2v = False
    else:
        ledger.set_rows(after)
        if visuals is not None:
            ledger.known.add(visuals.key)
        ledger.v2v_bases = bases if plan.keep_v2v else [row[-1].end_key if row else 0 for row in after]
        places = visual_BS.any(0).nonzero()
        ledger.text_since_visual = length - 1 - int(places[-1]) if len(places) else ledger.text_since_visual + length
    if visuals is None:
        return VisualMemory(None, plan.to(device))
    plan.token_frames = _token_frames(visuals) if config.cross_attention_frame_rope else None
    return VisualMemory(visuals.tokens, plan.to(device))
