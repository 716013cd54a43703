"""Puts visual features at the places that placeholder tokens hold in a prompt.

The processor repeats a placeholder once per feature, so that the count is known before the model runs.
Shapes: B batch, S sequence, D language width, V visual tokens.
"""

import torch


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
