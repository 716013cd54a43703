"""Dual cross-attention: visual rows (V2V) and text rows (T2V) of a decoder layer attend to the original visual tokens.

Paper: CrossLMM (arXiv 2505.17020), Eqs. 2-10; no code is published, README.md in this folder lists what was decided.

What a caller does: nothing; `decoder_patch.patch_decoder` puts one `CrossLMMDualCrossAttention` into each patched
layer, and its forward gets the plan of `visual_cache.prepare_visual_memory`.

Shapes: B batch, S positions, P original tokens, D language width, E width of memory tokens, H key heads, C head width,
G groups of Q queries each, L keys.
"""

from collections.abc import Iterator

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from longvideo.modeling.crosslmm.configuration_crosslmm import CrossLMMConfig
from longvideo.modeling.crosslmm.visibility import AttentionGroup, VisibilityPlan
from longvideo.modeling.crosslmm.visual_cache import VisualKeysLayer, append_keys, keys_layers

KV_NORM_EPS = 1e-6
FRAME_ROPE_THETA = 10000.0


def eager_cross_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attends with explicit scores, in the form of transformers' attention functions.

    Args:
        module: says whether it trains.
        query: (G, H, Q, C).
        key: (G, H, L, C).
        value: (G, H, L, C).
        attention_mask: added to the scores, (G, 1, Q or 1, L); None for none.
        scaling: factor of the scores.
        dropout: share of weights dropped.
        **kwargs: not used.

    Returns:
        (G, Q, H, C) and the weights (G, H, Q, L).

    Source: Eq. 2.
    """
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def rotate_by_frame(x: torch.Tensor, frames: torch.Tensor) -> torch.Tensor:
    """Turns vectors by the number of their frame, as rotary position embeddings do by position.

    Args:
        x: (..., heads, C).
        frames: (...) int64.

    Returns:
        The shape of `x`.

    Differs: beyond the paper. Text queries are not turned, so they see a frame by its number in the video.
    """
    half = x.shape[-1] // 2
    steps = torch.arange(half, device=x.device, dtype=torch.float32) / half
    angles = frames[..., None, None].float() * FRAME_ROPE_THETA**-steps
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class CrossLMMCrossAttention(nn.Module):
    """Grouped-query attention from rows of the decoder to original visual tokens.

    Args:
        text_config: configuration of the decoder: head numbers and sizes, attention implementation.
        key_width: E, width of the memory tokens.
        norm_keys: whether a LayerNorm stands before keys and values (`kv_source="encoder"`).
        has_keys: False where another module's keys and values are used (`share_kv`).

    Source: Eqs. 2, 3, 5, 6, 8, 9.
    Differs: the equations have no output projection; the published number of trainable parameters needs one.
    """

    def __init__(
        self, text_config: PreTrainedConfig, key_width: int, *, norm_keys: bool = False, has_keys: bool = True
    ):
        super().__init__()
        self.config = text_config
        heads, width = text_config.num_attention_heads, text_config.hidden_size
        key_heads = getattr(text_config, "num_key_value_heads", None) or heads
        self.head_dim = getattr(text_config, "head_dim", None) or width // heads
        # What attention functions shall repeat keys by: the heads are folded before them.
        self.num_key_value_groups = 1
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = getattr(text_config, "attention_dropout", 0.0)
        self.is_causal = False
        self.q_proj = nn.Linear(width, heads * self.head_dim, bias=True)
        if has_keys:
            if norm_keys:
                self.kv_norm = nn.LayerNorm(key_width, eps=KV_NORM_EPS)
            self.k_proj = nn.Linear(key_width, key_heads * self.head_dim, bias=True)
            self.v_proj = nn.Linear(key_width, key_heads * self.head_dim, bias=True)
        self.o_proj = nn.Linear(heads * self.head_dim, width, bias=False)

    def project_keys(
        self, tokens_PE: torch.Tensor, frames_P: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Makes keys and values of original tokens.

        Args:
            tokens_PE: (P, E).
            frames_P: (P,) int64 frame numbers to turn the keys by; None turns nothing.

        Returns:
            Keys and values, (P, H, C) each.

        Source: Eqs. 6, 9.
        """
        tokens = self.kv_norm(tokens_PE) if hasattr(self, "kv_norm") else tokens_PE
        keys = self.k_proj(tokens).unflatten(-1, (-1, self.head_dim))
        values = self.v_proj(tokens).unflatten(-1, (-1, self.head_dim))
        return (keys if frames_P is None else rotate_by_frame(keys, frames_P)), values

    def forward(
        self,
        queries_GQD: torch.Tensor,
        keys_GHLC: torch.Tensor,
        values_GHLC: torch.Tensor,
        *,
        key_mask: torch.Tensor | None = None,
        frames_GQ: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attends to all keys of each group.

        Args:
            queries_GQD: (G, Q, D) normalised rows of the decoder.
            keys_GHLC: (G, H, L, C).
            values_GHLC: (G, H, L, C).
            key_mask: (G, L) bool, False on keys that are not seen, only with Q = 1.
            frames_GQ: (G, Q) int64 frame numbers to turn the queries by.

        Returns:
            (G, Q, D).

        Source: Eqs. 2, 3, 5, 8.
        """
        query = self.q_proj(queries_GQD).unflatten(-1, (-1, self.head_dim))
        if frames_GQ is not None:
            query = rotate_by_frame(query, frames_GQ)
        implementation = self.config._attn_implementation
        mask = key_mask
        if mask is not None and "flash" not in (implementation or ""):
            lowest = torch.finfo(query.dtype).min
            mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, lowest)[:, None, None]
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_cross_attention)
        dropout = self.attention_dropout if self.training else 0.0
        query = query.transpose(1, 2)
        # Query heads of one key head attend as more queries of it, so that keys are read once. Flash attention does so
        # by itself, and with a mask it must see how many queries there really are.
        folded = mask is None or "flash" not in (implementation or "")
        if folded:
            query = query.unflatten(1, (keys_GHLC.shape[1], -1)).flatten(2, 3)
        output, _ = attend(self, query, keys_GHLC, values_GHLC, mask, dropout=dropout, scaling=self.scaling)
        if folded:
            output = output.transpose(1, 2).unflatten(2, (-1, queries_GQD.shape[1])).flatten(1, 2).transpose(1, 2)
        return self.o_proj(output.flatten(2))


class CrossLMMDualCrossAttention(nn.Module):
    """V2V and T2V of one decoder layer with their gates, between self-attention and MLP.

    Args:
        text_config: configuration of the decoder.
        config: CrossLMM configuration.
        query_norm: normalisation of the rows that attend, a copy of the layer's post-attention norm.
        slot: number of this layer among those with cross-attention, from zero.

    Source: Sec. 3.1 to 3.3; Eqs. 7 and 10 for the gates.
    Differs: the two texts of the paper gate different terms. `gate_mode="attn"` is h + tanh(alpha) * attention with
    alpha starting at 0, "residual" attention + gamma * h with gamma in [-1, 1] starting at 1 and the output projection
    at 0. Rows that see no key stay as they are in both.
    """

    def __init__(self, text_config: PreTrainedConfig, config: CrossLMMConfig, query_norm: nn.Module, *, slot: int):
        super().__init__()
        self.slot = slot
        self.text_config = text_config
        self.gate_mode = config.gate_mode
        self.share_kv = config.share_kv
        self.chunk_size = config.cross_attention_chunk_size
        self.frame_rope = config.cross_attention_frame_rope
        from_encoder = config.kv_source == "encoder"
        self.key_width = config.vision_config.hidden_size if from_encoder else text_config.hidden_size
        self.norm_keys = from_encoder
        self.query_norm = query_norm
        self.v2v = self.t2v = None
        if config.use_v2v:
            self.add_branch("v2v")
        if config.use_t2v:
            self.add_branch("t2v")

    def add_branch(self, name: str) -> None:
        """Creates one of the two modules with its gate, on the CPU and with torch's own random weights.

        Args:
            name: "v2v" or "t2v".
        """
        has_keys = name == "v2v" or not self.share_kv or self.v2v is None
        module = CrossLMMCrossAttention(
            self.text_config, self.key_width, norm_keys=self.norm_keys and has_keys, has_keys=has_keys
        )
        setattr(self, name, module)
        start = 0.0 if self.gate_mode == "attn" else 1.0
        # One element, not none: sharded training refuses parameters without a dimension.
        setattr(self, f"{name}_gate", nn.Parameter(torch.full((1,), start)))

    def _is_shared(self) -> bool:
        return self.share_kv and self.v2v is not None and self.t2v is not None

    def _update(
        self,
        module: CrossLMMCrossAttention,
        tokens_PE: torch.Tensor | None,
        plan: VisibilityPlan,
        counts: list[int],
        layer: VisualKeysLayer | None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Returns keys and values (B, H, L, C) of all rows, stored ones first, and stores them."""
        keys = values = None
        if layer is not None and layer.is_initialized:
            layer.prefetch()
            keys, values = layer.keys, layer.values
        if tokens_PE is not None:
            new_keys, new_values = module.project_keys(tokens_PE, plan.token_frames)
            keys = append_keys(keys, counts, new_keys, plan.segments)
            values = append_keys(values, counts, new_values, plan.segments)
            if layer is not None:
                layer.store(keys, values)
        return keys, values

    def _gate(self, name: str, hidden: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        gate = getattr(self, f"{name}_gate").float()
        if self.gate_mode == "attn":
            return hidden + (gate.tanh() * attended).to(hidden.dtype)
        return (attended + gate.clamp(-1, 1) * hidden).to(hidden.dtype)

    def _attend_group(
        self, name: str, hidden_RD: torch.Tensor, group: AttentionGroup, keys: torch.Tensor, values: torch.Tensor
    ) -> Iterator[tuple[torch.Tensor | None, torch.Tensor]]:
        """Yields places of rows and what they become, a chunk of queries at a time; None for all rows in order."""
        module = getattr(self, name)
        rows_GQ = group.rows
        if rows_GQ is None:
            rows_GQ = torch.arange(len(hidden_RD), device=hidden_RD.device).view(group.num_rows, -1)

        def cut(stored: torch.Tensor) -> torch.Tensor:
            own = stored[group.first_row : group.first_row + group.num_rows]
            own = own[:, :, group.first_key : group.first_key + group.folds * group.num_keys]
            return own.unflatten(2, (group.folds, group.num_keys)).transpose(1, 2).flatten(0, 1)

        keys, values = cut(keys), cut(values)
        width = min(rows_GQ.shape[1], self.chunk_size)
        height = max(self.chunk_size // width, 1)
        for start in range(0, rows_GQ.shape[0], height):
            for left in range(0, rows_GQ.shape[1], width):
                part = (slice(start, start + height), slice(left, left + width))
                rows = rows_GQ[part]
                everything = group.rows is None and rows.numel() == len(hidden_RD)
                hidden = hidden_RD.view(*rows.shape, -1) if everything else hidden_RD[rows]
                attended = module(
                    self.query_norm(hidden),
                    keys[part[0]],
                    values[part[0]],
                    key_mask=None if group.key_mask is None else group.key_mask[part[0]],
                    frames_GQ=group.frames[part] if self.frame_rope and group.frames is not None else None,
                )
                new = self._gate(name, hidden, attended)
                if group.live is not None:
                    new = torch.where(group.live[part[0], None, None], new, hidden)
                yield None if everything else rows.flatten(), new.flatten(0, 1)

    def forward(
        self,
        hidden_states: torch.Tensor,
        tokens_PE: torch.Tensor | None,
        plan: VisibilityPlan,
        cache: Cache | None = None,
    ) -> torch.Tensor:
        """Adds what the rows see.

        Args:
            hidden_states: (B, S, D) after self-attention and its residual.
            tokens_PE: (P, E) original tokens that come new, None without any.
            plan: who sees what.
            cache: the decoder's cache, in which keys and values are kept; None without one.

        Returns:
            (B, S, D).
        """
        plan = plan.to(hidden_states.device)
        if tokens_PE is not None:
            tokens_PE = tokens_PE.to(hidden_states.device, hidden_states.dtype)
        if cache is None and any(plan.t2v_counts):
            raise ValueError(
                "Visual keys lie in a cache that the decoder was not given. Pass it, with use_cache=True."
            )
        t2v_layer, v2v_layer = (None, None) if cache is None else keys_layers(cache, self.slot)
        hidden_RD = hidden_states.flatten(0, 1)
        places, rows, stored = [], [], None
        if self.t2v is not None:
            owner = self.v2v if self._is_shared() else self.t2v
            stored = self._update(owner, tokens_PE, plan, plan.t2v_counts, t2v_layer)
        for name in ("v2v", "t2v"):
            if getattr(self, name) is None:
                continue
            if name == "v2v" and not self._is_shared():
                keys, values = self._update(self.v2v, tokens_PE, plan, plan.v2v_counts, v2v_layer)
            else:
                keys, values = stored
            for group in getattr(plan, name):
                for some_places, some_rows in self._attend_group(name, hidden_RD, group, keys, values):
                    places.append(some_places)
                    rows.append(some_rows)
        self._leave(cache, (t2v_layer, v2v_layer), plan)
        if not places:
            return hidden_states
        if places[0] is None:
            return rows[0].view_as(hidden_states)
        changed = hidden_RD.index_copy(0, torch.cat(places), torch.cat(rows))
        return changed.view_as(hidden_states)

    def _leave(self, cache: Cache | None, layers: tuple[VisualKeysLayer | None, ...], plan: VisibilityPlan) -> None:
        """Drops V2V keys that nothing will ask for, and moves an offloaded cache's keys away."""
        if cache is None:
            return
        if not plan.keep_v2v:
            layers[1].reset()
        if getattr(cache, "offloading", False):
            for layer in layers:
                layer.offload()
