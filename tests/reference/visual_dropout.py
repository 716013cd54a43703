"""Visual dropout for one sample without padding and without a cache, with full attention maps."""

import torch


def naive_uniform_indices(num_before: int, num_keep: int) -> list[int]:
    """Even steps from the first to the last token, each cut to an integer."""
    if num_keep == 1:
        return [0]
    step = (num_before - 1) / (num_keep - 1)
    return [num_before - 1 if i == num_keep - 1 else int(i * step + 1e-9) for i in range(num_keep)]


def _rotate(x: torch.Tensor, positions: torch.Tensor, theta: float) -> torch.Tensor:
    width = x.shape[-1]
    frequency = theta ** (-torch.arange(0, width, 2, dtype=torch.float32) / width)
    angle = positions.float()[:, None] * frequency
    cos, sin = torch.cat([angle, angle], -1).cos(), torch.cat([angle, angle], -1).sin()
    half = torch.cat([-x[..., width // 2 :], x[..., : width // 2]], -1)
    return x * cos + half * sin


def naive_attention_map(layer: torch.nn.Module, hidden_SD: torch.Tensor, theta: float) -> torch.Tensor:
    """The whole causal attention map of a layer, (H, S, S), at positions 0..S-1."""
    attention = layer.self_attn
    normed = layer.input_layernorm(hidden_SD)
    width = attention.head_dim
    positions = torch.arange(len(hidden_SD))
    queries = attention.q_proj(normed).view(len(hidden_SD), -1, width)
    keys = attention.k_proj(normed).view(len(hidden_SD), -1, width)
    group = queries.shape[1] // keys.shape[1]
    maps = []
    for head in range(queries.shape[1]):
        q = _rotate(queries[:, head], positions, theta)
        k = _rotate(keys[:, head // group], positions, theta)
        scores = q @ k.T / width**0.5
        scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), float("-inf"))
        maps.append(scores.softmax(-1))
    return torch.stack(maps)


class NaiveDropout:
    """Runs a decoder on growing token lists; what was dropped in the prefill stays dropped.

    Args:
        language_model: Qwen2 decoder.
        layers: executed layers after which tokens are dropped.
        kinds: "uniform" or "attention" per stage.
        ratios: kept shares, the first 1.0.
    """

    def __init__(self, language_model: torch.nn.Module, layers: list[int], kinds: list[str], ratios: list[float]):
        self.model, self.layers, self.kinds, self.ratios = language_model, layers, kinds, ratios
        self.dropped: list[set[int]] | None = None

    def __call__(
        self, embeds_SD: torch.Tensor, visual: list[int], query_rows: list[int]
    ) -> tuple[torch.Tensor, list[list[int]]]:
        """Output of the final norm, (S', D), and the sequence indices that each stage left."""
        theta = self.model.config.rope_parameters["rope_theta"]
        alive, hidden, history = list(range(len(embeds_SD))), embeds_SD, []
        first = self.dropped is None
        dropped = [] if first else self.dropped
        for number, layer in enumerate(self.model.layers):
            positions = torch.arange(len(alive))[None]
            length = len(alive)
            mask = torch.full((length, length), float("-inf")).triu(1)[None, None]
            hidden = layer(
                hidden[None],
                attention_mask=mask,
                position_embeddings=self.model.rotary_emb(hidden[None], positions),
                position_ids=positions,
            )[0]
            if number + 1 not in self.layers:
                continue
            stage = self.layers.index(number + 1)
            if first:
                present = [i for i in alive if i in set(visual)]
                keep = int(len(visual) * self.ratios[stage + 1])
                if self.kinds[stage] == "uniform":
                    kept = {present[i] for i in naive_uniform_indices(len(present), keep)}
                else:
                    maps = naive_attention_map(self.model.layers[number + 1], hidden, theta)
                    rows = [alive.index(row) for row in query_rows]
                    score = {i: float(maps[:, rows, alive.index(i)].mean()) for i in present}
                    kept = set(sorted(present, key=lambda i: -score[i])[:keep])
                dropped.append(set(present) - kept)
            gone = dropped[stage]
            stay = [n for n, i in enumerate(alive) if i not in gone]
            alive, hidden = [alive[n] for n in stay], hidden[stay]
            history.append(alive)
        self.dropped = dropped
        return self.model.norm(hidden), history
