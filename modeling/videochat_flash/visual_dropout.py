"""Progressive visual dropout: after chosen decoder layers only a share of the visual tokens goes on.

Paper: VideoChat-Flash (arXiv 2501.00574), Sec. 3.1, Eq. 2, video-level compression.
Original read: OpenGVLab/VideoChat-Flash, `modeling_qwen2_flash.py`.
Deviations: works for batches, left padding, several visual items per prompt, beams and every attention implementation;
what decoding needs to know of the prefill travels with the key/value cache, not with the module.

Shapes: B batch, S sequence, Q queries, D language width, H heads, V visual tokens of a sample.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb

from longvideo.modeling.videochat_flash.configuration_videochat_flash import COMPRESS_TYPES, VideoChatFlashConfig

UNIFORM_STAGES = {"uniform": None, "attention": 0, "uniform0_attention": 1, "uniform1_attention": 2}


@dataclass(frozen=True)
class VisualDropoutPlan:
    """Where tokens are dropped and how many stay.

    Args:
        kind: one of `COMPRESS_TYPES`.
        layers: numbers of executed layers after which a stage runs, rising.
        ratios: kept shares of the original visual tokens, `len(layers) + 1` of them, the first 1.0.
    """

    kind: str
    layers: tuple[int, ...]
    ratios: tuple[float, ...]

    def stage_kind(self, stage: int) -> str:
        """Says whether stage `stage` (from 0) picks tokens evenly ("uniform") or by attention ("attention")."""
        num_uniform = UNIFORM_STAGES[self.kind]
        return "uniform" if num_uniform is None or stage < num_uniform else "attention"


def build_plan(
    config: VideoChatFlashConfig, visual_dropout: bool | dict | VisualDropoutPlan | None = None
) -> VisualDropoutPlan | None:
    """Settles what a call does: its own wish first, then the configuration.

    Args:
        config: model configuration.
        visual_dropout: None follows `config.mm_llm_compress`, False is off, True takes the configuration's lists, a
            dict with any of `type`, `layers`, `ratios` replaces those.

    Returns:
        The plan, or None when nothing is dropped.

    Raises:
        ValueError: unknown keys or type, lists that do not fit each other or the depth of the decoder.
    """
    if visual_dropout is None:
        visual_dropout = config.mm_llm_compress
    if visual_dropout is False:
        return None
    if isinstance(visual_dropout, VisualDropoutPlan):
        plan = visual_dropout
    else:
        wish = {} if visual_dropout is True else dict(visual_dropout)
        unknown = set(wish) - {"type", "layers", "ratios"}
        if unknown:
            raise ValueError(f"visual_dropout takes the keys type, layers and ratios, got {sorted(unknown)} as well.")
        plan = VisualDropoutPlan(
            kind=wish.get("type", config.llm_compress_type),
            layers=tuple(int(n) for n in wish.get("layers", config.llm_compress_layer_list)),
            ratios=tuple(float(r) for r in wish.get("ratios", config.llm_image_token_ratio_list)),
        )
    _check_plan(plan, config.text_config.num_hidden_layers)
    return plan if plan.layers else None


def _check_plan(plan: VisualDropoutPlan, num_layers: int) -> None:
    if plan.kind not in COMPRESS_TYPES:
        raise ValueError(f"Visual dropout type is {plan.kind!r}; choose one of {COMPRESS_TYPES}.")
    if len(plan.ratios) != len(plan.layers) + 1 and plan.layers:
        raise ValueError(
            f"Visual dropout has {len(plan.layers)} layers {list(plan.layers)} and needs one ratio more, the first "
            f"being 1.0; got {len(plan.ratios)}: {list(plan.ratios)}."
        )
    if any(b <= a for a, b in zip(plan.layers, plan.layers[1:], strict=False)):
        raise ValueError(f"Visual dropout layers must rise, got {list(plan.layers)}.")
    for stage, layer in enumerate(plan.layers):
        last = num_layers if plan.stage_kind(stage) == "uniform" else num_layers - 1
        if not 1 <= layer <= last:
            raise ValueError(
                f"Visual dropout after {layer} layers ({plan.stage_kind(stage)}) does not fit a decoder of "
                f"{num_layers} layers; choose 1 to {last}."
            )
    falling = all(a >= b >= 0 for a, b in zip(plan.ratios, plan.ratios[1:], strict=False))
    if plan.layers and (plan.ratios[0] != 1.0 or not falling):
        raise ValueError(f"Visual dropout ratios must start at 1.0 and not rise, got {list(plan.ratios)}.")


@dataclass
class VisualDropoutStage:
    """What one stage kept; lists have one entry per sample.

    Args:
        layer: executed layers before the stage.
        kind: "uniform" or "attention".
        kept_visual_indices: indices into the sample's original visual tokens, rising.
        kept_sequence_indices: indices into the sample's row of the input sequence, padding left out, rising.
        position_ids: positions that the later layers use for the kept tokens.
        scores: attention of the query rows on the visual tokens present before the stage; None for uniform stages and
            for samples that were not reduced.
        labels: labels of the kept tokens when labels were given, else None.
    """

    layer: int
    kind: str
    kept_visual_indices: list[torch.Tensor]
    kept_sequence_indices: list[torch.Tensor]
    position_ids: list[torch.Tensor]
    scores: list[torch.Tensor | None]
    labels: list[torch.Tensor] | None = None


@dataclass
class VisualDropoutMemory:
    """What decoding has to know of the prefill; lives on the cache.

    Args:
        plan: plan of the prefill.
        prefill_length: columns of the prefill before any drop, padding included.
        masks: per stage the (B, S') mask of real tokens after it.
        removed: per stage the (B,) numbers of tokens removed up to it.
    """

    plan: VisualDropoutPlan
    prefill_length: int
    masks: list[torch.Tensor] = field(default_factory=list)
    removed: list[torch.Tensor] = field(default_factory=list)


@dataclass
class DroppedDecoding:
    """Result of `decode_with_visual_dropout`.

    Args:
        last_hidden_state: (B, S', D) after the final norm, left padded.
        hidden_states: per layer when asked for, of shrinking length.
        labels: (B, S') labels of the kept tokens, or None.
        stages: what every stage kept; empty when only tokens after the prefill were run.
    """

    last_hidden_state: torch.Tensor
    hidden_states: tuple[torch.Tensor, ...] | None
    labels: torch.Tensor | None
    stages: tuple[VisualDropoutStage, ...]


def uniform_indices(num_before: int, num_keep: int) -> torch.Tensor:
    """Picks tokens evenly, both ends included.

    Args:
        num_before: visual tokens present.
        num_keep: visual tokens wanted.

    Returns:
        (num_keep,) int64, rising.

    Source: VideoChat-Flash, `modeling_qwen2_flash.py`; equals the original's integer linspace (float64, truncated).
    """
    return torch.linspace(0, num_before - 1, num_keep, dtype=torch.float64).long()


def top_indices(scores_V: torch.Tensor, num_keep: int) -> torch.Tensor:
    """Picks the tokens with the highest scores.

    Args:
        scores_V: (V,) scores.
        num_keep: tokens wanted.

    Returns:
        (num_keep,) int64 in sequence order; among equal scores the earlier token wins.
    """
    return scores_V.argsort(descending=True, stable=True)[:num_keep].sort().values


@torch.no_grad()
def query_row_attention(
    layer: nn.Module,
    hidden_states: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    valid_BS: torch.Tensor,
    query_BS: torch.Tensor,
) -> torch.Tensor:
    """Measures how much chosen rows attend to every token in a layer that has not run yet.

    Only the chosen rows are computed, never the full map.

    Args:
        layer: decoder layer whose input norm and projections are used.
        hidden_states: (B, S, D) input of that layer.
        position_embeddings: rotary cosines and sines, (B, S, head width) each.
        valid_BS: (B, S) bool, False at padding.
        query_BS: (B, S) bool, the rows to measure.

    Returns:
        (B, S) float32, mean over heads and over the rows of a sample; zero for samples without rows.

    Source: VideoChat-Flash Sec. 3.1, text-guided selection; `modeling_qwen2_flash.py`.
    """
    attention = layer.self_attn
    normed = layer.input_layernorm(hidden_states)
    rows = [row.nonzero()[:, 0] for row in query_BS]
    num_queries = max(len(row) for row in rows)
    query_index = torch.stack([nn.functional.pad(row, (0, num_queries - len(row))) for row in rows])  # (B, Q)
    counts = torch.tensor([len(row) for row in rows], device=normed.device)
    is_row = torch.arange(num_queries, device=normed.device) < counts[:, None]  # (B, Q)

    def project(name: str, x: torch.Tensor) -> torch.Tensor:
        heads = getattr(attention, f"{name}_proj")(x).unflatten(-1, (-1, attention.head_dim))
        norm = getattr(attention, f"{name}_norm", None)
        return (heads if norm is None else norm(heads)).transpose(1, 2)  # (B, H, S or Q, head width)

    def take(x: torch.Tensor) -> torch.Tensor:
        return x.expand(len(rows), -1, -1).gather(1, query_index[..., None].expand(-1, -1, x.shape[-1]))

    cos, sin = position_embeddings
    key = project("k", normed)
    query = project("q", take(normed))
    key = apply_rotary_pos_emb(key, key, cos, sin)[0]
    query = apply_rotary_pos_emb(query, query, take(cos), take(sin))[0]
    query = query.unflatten(1, (key.shape[1], -1))  # (B, key heads, group, Q, head width)
    scores = (query @ key[:, :, None].transpose(-1, -2)).float() * attention.scaling
    columns = torch.arange(hidden_states.shape[1], device=normed.device)
    visible = (columns <= query_index[..., None]) & valid_BS[:, None]  # (B, Q, S)
    # Padded rows may see nothing at all; the finite floor keeps them free of NaN.
    scores = scores.masked_fill(~visible[:, None, None], torch.finfo(torch.float32).min).softmax(-1)
    mean_BQS = scores.flatten(1, 2).mean(1) * is_row[..., None]
    return mean_BQS.sum(1) / counts.clamp(min=1)[:, None]


def find_query_rows(valid_BS: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
    """Marks the rows whose attention selects visual tokens.

    Args:
        valid_BS: (B, S) bool, False at padding.
        labels: (B, S) labels, -100 ignored, or None.

    Returns:
        (B, S) bool: without labels the last real token; with labels the last ignored token before each answer.

    Source: VideoChat-Flash, `modeling_qwen2_flash.py`.
    Differs: the original asks for training mode, here the presence of labels decides, so that evaluation losses are
    measured as training losses are.
    """
    if labels is None:
        columns = torch.arange(valid_BS.shape[1], device=valid_BS.device)
        last = (columns * valid_BS).argmax(1)
        return (columns == last[:, None]) & valid_BS
    answered = labels != -100
    starts = answered[:, 1:] & ~answered[:, :-1]
    return torch.cat([starts, torch.zeros_like(starts[:, :1])], dim=1) & valid_BS


def _gather_left_padded(keep_BS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Orders kept columns to the right of a rectangle; returns source columns (B, S') and which are real (B, S')."""
    width = int(keep_BS.sum(1).max())
    order = keep_BS.int().argsort(dim=1, stable=True)[:, -width:]
    return order, keep_BS.gather(1, order)


class _Decoder:
    """Runs the layers of one call and carries the sequence that shrinks on the way."""

    def __init__(
        self,
        language_model: nn.Module,
        hidden_states: torch.Tensor,
        mask_BS: torch.Tensor,
        position_ids: torch.Tensor,
        past_key_values: Cache | None,
    ):
        self.language_model = language_model
        self.config = language_model.config
        self.hidden_states = hidden_states
        self.past_key_values = past_key_values
        self.set_sequence(mask_BS, position_ids)

    def set_sequence(self, mask_BS: torch.Tensor, position_ids: torch.Tensor) -> None:
        """Takes the mask over all cached and new tokens and the positions of the new ones; (B, cached + S), (B, S)."""
        self.mask_BS = mask_BS
        self.position_ids = position_ids
        self.position_embeddings = self.language_model.rotary_emb(self.hidden_states, position_ids)
        self._masks = {}

    def _attention_mask(self, layer_idx: int) -> torch.Tensor | None:
        types = getattr(self.config, "layer_types", None)
        kind = types[layer_idx] if types else "full_attention"
        if kind not in self._masks:
            create = create_sliding_window_causal_mask if kind == "sliding_attention" else create_causal_mask
            self._masks[kind] = create(
                config=self.config,
                inputs_embeds=self.hidden_states,
                attention_mask=self.mask_BS,
                past_key_values=self.past_key_values,
                position_ids=self.position_ids,
                layer_idx=layer_idx,
            )
        return self._masks[kind]

    def run_layer(self, layer_idx: int, use_cache: bool, **kwargs) -> None:
        output = self.language_model.layers[layer_idx](
            self.hidden_states,
            attention_mask=self._attention_mask(layer_idx),
            position_embeddings=self.position_embeddings,
            position_ids=self.position_ids,
            past_key_values=self.past_key_values,
            use_cache=use_cache,
            **kwargs,
        )
        self.hidden_states = output[0] if isinstance(output, tuple) else output


class _Prefill(_Decoder):
    """A prefill: also knows which tokens are visual and where each kept token came from."""

    def __init__(self, *args, visual_BS: torch.Tensor, labels: torch.Tensor | None, plan: VisualDropoutPlan):
        super().__init__(*args)
        self.plan = plan
        self.labels = labels
        self.visual_BS = visual_BS & self.mask_BS.bool()
        self.num_visual_B = self.visual_BS.sum(1).tolist()
        self.source_BS = torch.arange(visual_BS.shape[1], device=visual_BS.device).expand_as(visual_BS)
        # Index of every column among the sample's visual tokens; only meaningful at visual columns.
        self.visual_rank_BS = self.visual_BS.long().cumsum(1) - 1

    def _choose(self, stage: int) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
        """Decides per sample which columns stay; returns (B, S) bool and the scores per sample."""
        kind = self.plan.stage_kind(stage)
        valid = self.mask_BS.bool()
        keep, scores = valid.clone(), [None] * len(valid)
        rows = attention = None
        if kind == "attention":
            rows = find_query_rows(valid, self.labels)
            if rows.any():
                layer = self.language_model.layers[self.plan.layers[stage]]
                attention = query_row_attention(layer, self.hidden_states, self.position_embeddings, valid, rows)
        for i, num_visual in enumerate(self.num_visual_B):
            columns = self.visual_BS[i].nonzero()[:, 0]
            num_keep = min(int(num_visual * self.plan.ratios[stage + 1]), len(columns))
            if kind == "uniform":
                kept = uniform_indices(len(columns), num_keep).to(columns.device)
            elif rows[i].any():
                scores[i] = attention[i, columns]
                kept = top_indices(scores[i], num_keep)
            else:  # no answer to look from: the sample stays as it is
                continue
            keep[i, columns] = False
            keep[i, columns[kept]] = True
        return keep, scores

    @torch.no_grad()
    def _shrink(self, keep_BS: torch.Tensor) -> torch.Tensor:
        """Takes bookkeeping tensors to the kept columns; returns the gather order (B, S')."""
        order, valid = _gather_left_padded(keep_BS)
        self.visual_BS = self.visual_BS.gather(1, order) & valid
        self.source_BS = self.source_BS.gather(1, order)
        self.visual_rank_BS = self.visual_rank_BS.gather(1, order)
        if self.labels is not None:
            self.labels = self.labels.gather(1, order).masked_fill(~valid, -100)
        self.mask_BS = valid.to(self.mask_BS.dtype)
        return order

    def drop(self, stage: int) -> VisualDropoutStage:
        """Runs one stage."""
        keep, scores = self._choose(stage)
        order = self._shrink(keep)
        self.hidden_states = self.hidden_states.gather(
            1, order[..., None].expand(-1, -1, self.hidden_states.shape[-1])
        )
        self.set_sequence(self.mask_BS, (self.mask_BS.long().cumsum(1) - 1).clamp(min=0))
        valid = self.mask_BS.bool()

        def per_sample(x: torch.Tensor, where: torch.Tensor) -> list[torch.Tensor]:
            return [row[chosen] for row, chosen in zip(x, where, strict=True)]

        return VisualDropoutStage(
            layer=self.plan.layers[stage],
            kind=self.plan.stage_kind(stage),
            kept_visual_indices=per_sample(self.visual_rank_BS, self.visual_BS),
            kept_sequence_indices=per_sample(self.source_BS, valid),
            position_ids=per_sample(self.position_ids, valid),
            scores=scores,
            labels=None if self.labels is None else per_sample(self.labels, valid),
        )


def dropout_memory(past_key_values: Cache | None) -> VisualDropoutMemory | None:
    """Returns what a prefill with visual dropout left on its cache, or None."""
    return getattr(past_key_values, "visual_dropout_memory", None)


def _check_call(attention_mask: torch.Tensor | dict | None, past_key_values: Cache | None, kwargs: dict) -> None:
    if isinstance(attention_mask, dict) or (past_key_values is not None and past_key_values.is_compileable):
        raise ValueError(
            "Visual dropout gives each layer its own cache length, which a static cache cannot hold. Use the default "
            "dynamic cache (leave cache_implementation unset) or pass visual_dropout=False."
        )
    if attention_mask is not None and attention_mask.ndim != 2:
        raise ValueError(
            f"Visual dropout takes a 2-D attention mask, got {attention_mask.ndim} dimensions. Pass the tokenizer's "
            "mask or visual_dropout=False."
        )
    if kwargs.get("output_attentions"):
        raise ValueError("Attention maps are not collected while visual dropout is on; pass visual_dropout=False.")


def decode_with_visual_dropout(
    language_model: nn.Module,
    inputs_embeds: torch.Tensor,
    *,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    past_key_values: Cache | None,
    use_cache: bool,
    visual_BS: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    plan: VisualDropoutPlan | None = None,
    output_hidden_states: bool = False,
    **kwargs,
) -> DroppedDecoding:
    """Runs a decoder of the Llama family and drops visual tokens on the way.

    With an empty cache (or none) this is a prefill: the stages of `plan` run. Otherwise no token is dropped and the
    layers continue on the lengths that the prefill left them.

    Args:
        language_model: decoder with `layers`, `norm`, `rotary_emb`.
        inputs_embeds: (B, S, D).
        attention_mask: (B, cached + S), 1 for real tokens; None means all.
        position_ids: (B, S) positions before any drop; None derives them from the mask.
        past_key_values: cache; a prefill stores its `VisualDropoutMemory` on it.
        use_cache: whether keys and values are kept.
        visual_BS: (B, S) bool, needed in a prefill.
        labels: (B, S), gathered along.
        plan: needed in a prefill.
        output_hidden_states: whether the input of every layer is returned.
        **kwargs: passed to the layers.

    Returns:
        Output of the final norm and what was kept.

    Raises:
        ValueError: a static cache, a prepared mask, or attention maps asked for.

    Source: VideoChat-Flash Sec. 3.1, Eq. 2; `modeling_qwen2_flash.py`, `Qwen2Model_Flash.forward`.
    """
    _check_call(attention_mask, past_key_values, kwargs)
    kwargs.pop("output_attentions", None)
    memory = dropout_memory(past_key_values)
    batch, num_new = inputs_embeds.shape[:2]
    seen = memory.prefill_length if memory is not None else 0
    if memory is not None:
        seen = past_key_values.get_seq_length(0)
    if attention_mask is None:
        attention_mask = torch.ones(batch, seen + num_new, dtype=torch.long, device=inputs_embeds.device)
    if position_ids is None:
        position_ids = (attention_mask.long().cumsum(1) - 1).clamp(min=0)[:, -num_new:]
    position_ids = position_ids.expand(batch, -1)

    advance: Callable[[_Decoder, int], VisualDropoutStage | None]
    if memory is None:
        run = _Prefill(
            language_model,
            inputs_embeds,
            attention_mask,
            position_ids,
            past_key_values,
            visual_BS=visual_BS,
            labels=labels,
            plan=plan,
        )
        memory = VisualDropoutMemory(plan=plan, prefill_length=num_new)
        num_real = attention_mask.long().sum(1)

        def advance(decoder: _Prefill, stage: int) -> VisualDropoutStage:
            result = decoder.drop(stage)
            memory.masks.append(decoder.mask_BS)
            memory.removed.append(num_real - decoder.mask_BS.long().sum(1))
            return result

    else:
        run = _Decoder(language_model, inputs_embeds, attention_mask, position_ids, past_key_values)
        tail = attention_mask[:, memory.prefill_length :]

        def advance(decoder: _Decoder, stage: int) -> None:
            mask = torch.cat([memory.masks[stage].to(tail), tail], dim=1)
            decoder.set_sequence(mask, position_ids - memory.removed[stage][:, None])

    stages, all_hidden = [], []
    for layer_idx in range(len(language_model.layers)):
        if output_hidden_states:
            all_hidden.append(run.hidden_states)
        run.run_layer(layer_idx, use_cache, **kwargs)
        if layer_idx + 1 in memory.plan.layers:
            stages.append(advance(run, memory.plan.layers.index(layer_idx + 1)))
    if past_key_values is not None and isinstance(run, _Prefill):
        past_key_values.visual_dropout_memory = memory

    last_hidden_state = language_model.norm(run.hidden_states)
    if output_hidden_states:
        all_hidden.append(last_hidden_state)
    return DroppedDecoding(
        last_hidden_state=last_hidden_state,
        hidden_states=tuple(all_hidden) if output_hidden_states else None,
        labels=run.labels if isinstance(run, _Prefill) else None,
        stages=tuple(stages) if isinstance(run, _Prefill) else (),
    )
