"""The decoder loop of progressive visual dropout: layers run, visual tokens leave on the way, the cache remembers it.

Which tokens leave where is decided by `visual_dropout.py`.

Paper: VideoChat-Flash (arXiv 2501.00574), Sec. 3.1, Eq. 2, video-level compression.
Original read: OpenGVLab/VideoChat-Flash, `modeling_qwen2_flash.py`.
Deviations: works for batches, left padding, several visual items per prompt, beams and every attention implementation;
what decoding needs to know of the prefill travels with the key/value cache, not with the module.

Shapes: B batch, S sequence in, S' sequence that is left, D language width.
"""

from dataclasses import dataclass, field

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from longvideo.modeling.videochat_flash.visual_dropout import (
    VisualDropoutPlan,
    VisualDropoutStage,
    find_query_rows,
    layer_kind,
    query_row_attention,
    top_indices,
    uniform_indices,
)


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


def dropout_memory(past_key_values: Cache | None) -> VisualDropoutMemory | None:
    """Returns what a prefill with visual dropout left on its cache, or None."""
    return getattr(past_key_values, "visual_dropout_memory", None)


def _gather_left_padded(keep_BS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Orders kept columns to the right of a rectangle; returns source columns (B, S') and which are real (B, S')."""
    width = int(keep_BS.sum(1).max())
    order = keep_BS.int().argsort(dim=1, stable=True)[:, -width:]
    return order, keep_BS.gather(1, order)


class _Decoder:
    """Runs the layers of one call and carries the sequence that shrinks on the way.

    `memory` is set by the subclasses: `_Prefill` makes it, `_Continuation` reads it.
    """

    memory: VisualDropoutMemory
    labels: torch.Tensor | None = None

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
        kind = layer_kind(self.config, layer_idx)
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

    def advance(self, stage: int) -> VisualDropoutStage | None:
        """Goes over to the sequence behind a stage; returns what was kept if the stage runs here."""
        raise NotImplementedError

    def run(
        self, use_cache: bool, *, record: bool, **kwargs
    ) -> tuple[list[torch.Tensor], tuple[VisualDropoutStage, ...]]:
        """Runs all layers and stages; returns each layer's input, if recorded, and what was kept."""
        plan = self.memory.plan
        inputs, stages = [], []
        for layer_idx in range(len(self.language_model.layers)):
            if record:
                inputs.append(self.hidden_states)
            self.run_layer(layer_idx, use_cache, **kwargs)
            if layer_idx + 1 in plan.layers:
                stages.append(self.advance(plan.layers.index(layer_idx + 1)))
        return inputs, tuple(stage for stage in stages if stage is not None)


class _Prefill(_Decoder):
    """A prefill: also knows which tokens are visual and where each kept token came from."""

    def __init__(self, *args, visual_BS: torch.Tensor, labels: torch.Tensor | None, plan: VisualDropoutPlan):
        super().__init__(*args)
        self.plan = plan
        self.memory = VisualDropoutMemory(plan=plan, prefill_length=self.hidden_states.shape[1])
        self.num_real_B = self.mask_BS.long().sum(1)
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

    def advance(self, stage: int) -> VisualDropoutStage:
        """Runs one stage and notes in the memory what is left."""
        result = self.drop(stage)
        self.memory.masks.append(self.mask_BS)
        self.memory.removed.append(self.num_real_B - self.mask_BS.long().sum(1))
        return result


class _Continuation(_Decoder):
    """Tokens after the prefill: none is dropped, and every layer goes on from the length that the prefill left it."""

    def __init__(self, *args, memory: VisualDropoutMemory):
        super().__init__(*args)
        self.memory = memory
        self.tail_BS = self.mask_BS[:, memory.prefill_length :]
        self.first_position_ids = self.position_ids

    def advance(self, stage: int) -> None:
        """Goes over to what the stage left of the prefill."""
        mask_BS = torch.cat([self.memory.masks[stage].to(self.tail_BS), self.tail_BS], dim=1)
        self.set_sequence(mask_BS, self.first_position_ids - self.memory.removed[stage][:, None])


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


def _complete_mask_and_positions(
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    num_cached: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the mask over cached and new tokens, (B, cached + S), and the positions of the new ones, (B, S)."""
    batch, num_new = inputs_embeds.shape[:2]
    if attention_mask is None:
        attention_mask = torch.ones(batch, num_cached + num_new, dtype=torch.long, device=inputs_embeds.device)
    if position_ids is None:
        position_ids = (attention_mask.long().cumsum(1) - 1).clamp(min=0)[:, -num_new:]
    return attention_mask, position_ids.expand(batch, -1)


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
    num_cached = 0 if memory is None else past_key_values.get_seq_length(0)
    attention_mask, position_ids = _complete_mask_and_positions(
        inputs_embeds, attention_mask, position_ids, num_cached
    )
    sequence = (language_model, inputs_embeds, attention_mask, position_ids, past_key_values)
    if memory is None:
        decoder = _Prefill(*sequence, visual_BS=visual_BS, labels=labels, plan=plan)
    else:
        decoder = _Continuation(*sequence, memory=memory)
    hidden_states, stages = decoder.run(use_cache, record=output_hidden_states, **kwargs)
    if memory is None and past_key_values is not None:
        past_key_values.visual_dropout_memory = decoder.memory
    last_hidden_state = language_model.norm(decoder.hidden_states)
    return DroppedDecoding(
        last_hidden_state=last_hidden_state,
        hidden_states=(*hidden_states, last_hidden_state) if output_hidden_states else None,
        labels=decoder.labels,
        stages=stages,
    )
