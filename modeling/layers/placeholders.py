"""Puts visual features at the places that placeholder tokens hold in a prompt.

Two contracts. Where the number of features follows from shapes, the processor repeats a placeholder once per feature
and `scatter_features` fills them. Where it depends on content, there is one placeholder per image or video and
`insert_features` puts any number of features in its place.
Shapes: B batch, S sequence, S' sequence with features, D language width, V visual tokens.
"""

from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence


def find_placeholders(
    token_id: int,
    *,
    input_ids: torch.Tensor | None = None,
    inputs_embeds: torch.Tensor | None = None,
    embedding: torch.nn.Module | None = None,
) -> torch.Tensor:
    """Marks the positions of one kind of placeholder.

    Args:
        token_id: id of the placeholder.
        input_ids: (B, S) ids, when the caller has them.
        inputs_embeds: (B, S, D) embeddings, used when there are no ids: a position counts when it equals the
            placeholder's embedding.
        embedding: the model's input embedding, needed with `inputs_embeds`.

    Returns:
        (B, S) bool.
    """
    if input_ids is not None:
        return input_ids == token_id
    if token_id >= embedding.weight.shape[0]:
        return torch.zeros(inputs_embeds.shape[:2], dtype=torch.bool, device=inputs_embeds.device)
    reference = embedding(torch.tensor(token_id, device=inputs_embeds.device))
    return (inputs_embeds == reference).all(-1)


def scatter_features(
    inputs_embeds: torch.Tensor, mask_BS: torch.Tensor, features_VD: torch.Tensor, *, kind: str
) -> torch.Tensor:
    """Replaces the marked embeddings by visual features, in order.

    Args:
        inputs_embeds: (B, S, D).
        mask_BS: (B, S) bool, True at placeholders.
        features_VD: (V, D) features of all items of the batch, in prompt order.
        kind: "image" or "video", for the message.

    Returns:
        (B, S, D).

    Raises:
        ValueError: the numbers of placeholders and features differ; going on would shift features between items.
    """
    num_placeholders, num_features = int(mask_BS.sum()), features_VD.shape[0]
    if num_placeholders != num_features:
        raise ValueError(
            f"The prompt holds {num_placeholders} {kind} placeholder tokens but the {kind} inputs give {num_features} "
            f"features. Prepare text and {kind}s in one processor call, and do not cut the input ids afterwards."
        )
    features = features_VD.to(inputs_embeds.device, inputs_embeds.dtype)
    return inputs_embeds.masked_scatter(mask_BS[..., None].expand_as(inputs_embeds), features)


@dataclass
class InsertedSequence:
    """A batch with features in place of single placeholders, padded anew.

    Args:
        inputs_embeds: (B, S', D).
        attention_mask: (B, S') int64, 1 for text and features.
        position_ids: (B, S') int64, 0, 1, ... over text and features of a row; 0 on padding.
        labels: (B, S') with -100 on features and padding, when labels were given.
        source: (B, S') int64: the position in the given sequence that a text token comes from, -1 for features and
            padding.
    """

    inputs_embeds: torch.Tensor
    attention_mask: torch.Tensor
    position_ids: torch.Tensor
    labels: torch.Tensor | None
    source: torch.Tensor


def _pad(rows: list[torch.Tensor], value: int, side: str) -> torch.Tensor:
    if side == "right":
        return pad_sequence(rows, batch_first=True, padding_value=value)
    return pad_sequence([row.flip(0) for row in rows], batch_first=True, padding_value=value).flip(1)


def insert_features(
    inputs_embeds: torch.Tensor,
    mask_BS: torch.Tensor,
    features: list[torch.Tensor],
    *,
    attention_mask: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    padding_side: str = "left",
    max_length: int | None = None,
) -> InsertedSequence:
    """Replaces each placeholder by the features of its image or video and rebuilds what goes along.

    Args:
        inputs_embeds: (B, S, D); the values at placeholders are not read.
        mask_BS: (B, S) bool, True at placeholders, each of which stands for one entry of `features`.
        features: (V_i, D) each, in prompt order over all rows; an entry may be empty.
        attention_mask: (B, S), 0 on padding, which is dropped; None for no padding. Placeholders always stay.
        labels: (B, S).
        padding_side: "left" or "right", where rows shorter than the longest are padded.
        max_length: rows are cut to that many positions from the end; None cuts nothing.

    Returns:
        The batch with features in place.

    Raises:
        ValueError: an unknown padding side, or numbers of placeholders and entries that differ; going on would shift
            features between items.
    """
    if padding_side not in ("left", "right"):
        raise ValueError(f"padding_side is {padding_side!r}; choose 'left' or 'right'.")
    if int(mask_BS.sum()) != len(features):
        raise ValueError(
            f"The prompts hold {int(mask_BS.sum())} visual placeholders but there are features of {len(features)} "
            "images and videos; each placeholder stands for one. Prepare text and visual inputs in one processor "
            "call, and do not cut the input ids afterwards."
        )
    keep_BS = torch.ones_like(mask_BS) if attention_mask is None else mask_BS | attention_mask.bool()
    remaining = iter(features)
    embeds, sources = [], []
    for row_SD, is_visual_S, keep_S in zip(inputs_embeds, mask_BS, keep_BS, strict=True):
        parts, source, start = [], [], 0
        positions = torch.arange(len(row_SD), device=row_SD.device)
        for end in [*is_visual_S.nonzero()[:, 0].tolist(), len(row_SD)]:
            text = positions[start:end][keep_S[start:end]]
            parts.append(row_SD[text])
            source.append(text)
            if end < len(row_SD):
                feature = next(remaining).to(row_SD.device, row_SD.dtype)
                parts.append(feature)
                source.append(text.new_full((len(feature),), -1))
            start = end + 1
        embeds.append(torch.cat(parts)[:max_length])
        sources.append(torch.cat(source)[:max_length])
    lengths = [row.new_ones(len(row)) for row in sources]
    source_BS = _pad(sources, -1, padding_side)
    new_labels = None
    if labels is not None:
        new_labels = labels.gather(1, source_BS.clamp(min=0).to(labels.device)).masked_fill(source_BS < 0, -100)
    return InsertedSequence(
        inputs_embeds=_pad(embeds, 0, padding_side),
        attention_mask=_pad(lengths, 0, padding_side),
        position_ids=_pad([row.cumsum(0) - 1 for row in lengths], 0, padding_side),
        labels=new_labels,
        source=source_BS,
    )
