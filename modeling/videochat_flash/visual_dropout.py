"""Progressive visual dropout: after which decoder layers how many visual tokens go on, and which ones.

The loop over the layers that follows such a plan stands in `visual_dropout_decoder.py`.

Paper: VideoChat-Flash (arXiv 2501.00574), Sec. 3.1, Eq. 2, video-level compression.
Original read: OpenGVLab/VideoChat-Flash, `modeling_qwen2_flash.py`.

Shapes: B batch, S sequence, Q queries, D language width, H heads, V visual tokens of a sample.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb

from longvideo.modeling.videochat_flash.configuration_videochat_flash import COMPRESS_TYPES, VideoChatFlashConfig

# Decoders whose layers, run one by one, were compared with the whole decoder. Others scale embeddings or residuals
# outside their layers, or build their layers from other parts.
UNIFORM_DECODERS = (
    "cohere",
    "gemma",
    "gemma2",
    "helium",
    "llama",
    "mistral",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "smollm3",
    "starcoder2",
)
# Those of them whose attention `query_row_attention` gives; others turn, cap or leave out positions in their own way.
ATTENTION_DECODERS = ("gemma", "llama", "mistral", "qwen2", "qwen2_moe", "qwen3", "starcoder2")
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
        ValueError: unknown keys or type, lists that do not fit each other or the depth of the decoder, or a decoder
            that dropout does not work with.
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
    if not plan.layers:
        return None
    _check_decoder(plan, config.text_config)
    return plan


def layer_kind(text_config: PreTrainedConfig, layer_idx: int) -> str:
    """Says what a decoder layer sees: "full_attention", "sliding_attention" or another kind of its own."""
    kinds = getattr(text_config, "layer_types", None)
    if kinds:
        return kinds[layer_idx]
    # Without a list every layer has the window of the configuration.
    return "full_attention" if getattr(text_config, "sliding_window", None) is None else "sliding_attention"


def _check_decoder(plan: VisualDropoutPlan, text_config: PreTrainedConfig) -> None:
    scored = [layer for stage, layer in enumerate(plan.layers) if plan.stage_kind(stage) == "attention"]
    allowed = ATTENTION_DECODERS if scored else UNIFORM_DECODERS
    if text_config.model_type not in allowed:
        raise ValueError(
            f"Visual dropout of type {plan.kind!r} does not work with a decoder of type {text_config.model_type!r}, "
            f"only with {', '.join(allowed)}. Pass visual_dropout=False"
            + (", or type 'uniform'." if text_config.model_type in UNIFORM_DECODERS else ".")
        )
    for layer in scored:
        if layer_kind(text_config, layer) != "full_attention":
            raise ValueError(
                f"Visual dropout by attention after {layer} layers looks at the next layer, which has "
                f"{layer_kind(text_config, layer)}: it does not see the whole video. Choose a layer with full "
                "attention, or type 'uniform'."
            )


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
