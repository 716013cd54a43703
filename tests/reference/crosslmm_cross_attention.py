"""Dual cross-attention of CrossLMM one row, head and key at a time, from Eqs. 2-10."""

import functools
import math

import torch

TEXT, PADDING = -1, -2


def _linear(weights: dict[str, torch.Tensor], name: str, x: torch.Tensor) -> torch.Tensor:
    y = weights[f"{name}.weight"] @ x
    return y + weights[f"{name}.bias"] if f"{name}.bias" in weights else y


def _rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return weight * x / torch.sqrt(sum(value * value for value in x) / len(x) + eps)


def _layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    mean = sum(x) / len(x)
    variance = sum((value - mean) ** 2 for value in x) / len(x)
    return (x - mean) / torch.sqrt(variance + 1e-6) * weight + bias


def _rotate(x: torch.Tensor, frame: int) -> torch.Tensor:
    half = len(x) // 2
    turned = list(x)
    for i in range(half):
        angle = frame / 10000 ** (i / half)
        turned[i] = x[i] * math.cos(angle) - x[i + half] * math.sin(angle)
        turned[i + half] = x[i + half] * math.cos(angle) + x[i] * math.sin(angle)
    return torch.stack(turned)


def _keys_and_values(
    weights: dict[str, torch.Tensor], name: str, token: torch.Tensor, head_dim: int, frame: int | None
) -> tuple[list[torch.Tensor], tuple[torch.Tensor, ...]]:
    """Key and value of one token for each key head (Eqs. 6, 9)."""
    if f"{name}.kv_norm.weight" in weights:
        token = _layer_norm(token, weights[f"{name}.kv_norm.weight"], weights[f"{name}.kv_norm.bias"])
    keys = _linear(weights, f"{name}.k_proj", token).split(head_dim)
    values = _linear(weights, f"{name}.v_proj", token).split(head_dim)
    return [key if frame is None else _rotate(key, frame) for key in keys], values


def _attend(
    weights: dict[str, torch.Tensor], name: str, x: torch.Tensor, pairs: list, head_dim: int, frame: int | None
) -> torch.Tensor:
    """(D,) what one normalised row gets from keys and values (Eqs. 2, 3, 5, 8)."""
    query = _linear(weights, f"{name}.q_proj", x).split(head_dim)
    shared = len(query) // len(pairs[0][0])
    heads = []
    for h, q in enumerate(query):
        q = q if frame is None else _rotate(q, frame)
        scores = [(q @ keys[h // shared] / math.sqrt(head_dim)).exp() for keys, _ in pairs]
        total = sum(scores)
        heads.append(
            sum(score / total * values[h // shared] for score, (_, values) in zip(scores, pairs, strict=True))
        )
    return _linear(weights, f"{name}.o_proj", torch.cat(heads))


def _seen_frames(
    kind: int, begun: list[int], visuals: list[torch.Tensor], only_frame: int | None
) -> list[tuple[int, int]]:
    """Visual and frame of all that a position sees."""
    if kind >= 0 and only_frame is not None:
        return [(kind, only_frame)]
    seen = [kind] if kind >= 0 else begun if kind == TEXT else []
    return [(v, f) for v in seen for f in range(len(visuals[v]))]


def naive_dual_cross_attention(
    weights: dict[str, torch.Tensor],
    hidden_BSD: torch.Tensor,
    kinds: list[list[int]],
    visuals: list[list[torch.Tensor]],
    *,
    head_dim: int,
    rows_per_frame: int,
    norm_eps: float,
    gate_mode: str = "attn",
    v2v_scope: str = "video",
    share_kv: bool = False,
    frame_rope: bool = False,
) -> torch.Tensor:
    """Runs dual cross-attention with loops.

    Args:
        weights: parameters of a `CrossLMMDualCrossAttention` by name; a branch without parameters is absent.
        hidden_BSD: (B, S, D) after self-attention and its residual, I' of Eq. 4.
        kinds: per row what each position is: the number of its visual within the row, `TEXT` or `PADDING`.
        visuals: per row (T, N, E) tokens of each visual.
        head_dim: width of a head.
        rows_per_frame: placeholders of a frame.
        norm_eps: of the query norm.
        gate_mode: "attn" or "residual" (Eqs. 7 and 10).
        v2v_scope: "video" or "frame".
        share_kv: whether T2V takes the keys of V2V.
        frame_rope: whether keys and visual queries are turned by their frame.

    Returns:
        (B, S, D).
    """
    batch = []
    for hidden_SD, row_kinds, row_visuals in zip(hidden_BSD, kinds, visuals, strict=True):
        rows, passed, begun = [], [0] * len(row_visuals), []

        @functools.cache
        def made(name: str, v: int, f: int, row_visuals=tuple(row_visuals)) -> list:
            frame = f if frame_rope else None
            return [_keys_and_values(weights, name, token, head_dim, frame) for token in row_visuals[v][f]]

        for h, kind in zip(hidden_SD, row_kinds, strict=True):
            if kind >= 0 and kind not in begun:
                begun.append(kind)
            name = "v2v" if kind >= 0 else "t2v"
            query_frame = None
            if kind >= 0:
                query_frame = passed[kind] // rows_per_frame
                passed[kind] += 1
            seen = _seen_frames(kind, begun, row_visuals, query_frame if v2v_scope == "frame" else None)
            if not seen or f"{name}_gate" not in weights:
                rows.append(h)
                continue
            key_name = "v2v" if share_kv and "v2v_gate" in weights else name
            pairs = [pair for v, f in seen for pair in made(key_name, v, f)]
            x = _rms_norm(h, weights["query_norm.weight"], norm_eps)
            attended = _attend(weights, name, x, pairs, head_dim, query_frame if frame_rope else None)
            gate = weights[f"{name}_gate"][0]
            if gate_mode == "attn":
                rows.append(h + torch.tanh(gate) * attended)
            else:
                rows.append(attended + max(min(gate, 1), -1) * h)
        batch.append(torch.stack(rows))
    return torch.stack(batch)
