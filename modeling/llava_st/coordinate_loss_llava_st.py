"""Loss of LLaVA-ST: cross entropy that spreads a coordinate over the two tokens around it.

Original read: appletea233/LLaVA-ST, `llava_qwen.py`. The paper (arXiv 2501.08282, Sec. 3.2) has the nearest token.
Deviations: nothing of the size of the vocabulary is built for a target; the mean over tokens is the default.

Shapes: B samples, S positions, V columns of the logits, L labelled positions.
"""

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from longvideo.modeling.llava_st.coordinates_llava_st import Bins, check_values, find_bins

LOSS_REDUCTIONS = ("token_mean", "sample_sum")
IGNORE_INDEX = -100


def coordinate_targets(
    labels_L: torch.Tensor,
    values_L: torch.Tensor | None,
    *,
    output_ids_of_axes: Sequence[int],
    num_rows: Sequence[int],
    column_starts: Sequence[int],
    soft: bool = True,
) -> Bins:
    """Turns labels into at most two columns each.

    Args:
        labels_L: (L,) token ids, none of them masked.
        values_L: (L,) coordinate of every output template among them.
        output_ids_of_axes: per axis the id of the template in answers.
        num_rows: per axis the number M of coordinate tokens.
        column_starts: per axis the column of its first coordinate token.
        soft: whether a coordinate between two tokens has both as targets; else the nearer one, the upper at a tie.

    Returns:
        Columns and share, (L,) each. An ordinary label is both columns, with share 0.

    Raises:
        ValueError: output templates without values, or a coordinate that is not a number.

    Source: `llava_qwen.py`; soft=False is the paper's "closest" anchor, Sec. 3.2.
    """
    low, high = labels_L, labels_L
    fraction = torch.zeros(labels_L.shape, dtype=torch.float32, device=labels_L.device)
    for template, size, start in zip(output_ids_of_axes, num_rows, column_starts, strict=True):
        mask = labels_L == template
        if values_L is None:
            if mask.any():
                raise ValueError(
                    f"The labels hold the output template of id {template}, but there are no coordinate_values. Give "
                    "the processor's coordinate_values together with its labels."
                )
            continue
        bins = find_bins(values_L.masked_fill(~mask, 0), size)
        if not soft:
            nearest = bins.low + (bins.fraction >= 0.5).long()
            bins = Bins(nearest, nearest, torch.zeros_like(bins.fraction))
        low = torch.where(mask, bins.low + start, low)
        high = torch.where(mask, bins.high + start, high)
        fraction = torch.where(mask, bins.fraction, fraction)
    return Bins(low, high, fraction)


def coordinate_log_probs(logits_LV: torch.Tensor, target: Bins) -> torch.Tensor:
    """Log-likelihoods of targets of at most two columns each.

    Args:
        logits_LV: (L, V) rows of labelled positions, one column per token.
        target: what `coordinate_targets` gives, (L,) each.

    Returns:
        (L,) float32.
    """
    logits_LV = logits_LV.float()
    # (1 - f) log p_low + f log p_high = log p_low - f (z_low - z_high).
    difference = logits_LV.gather(1, target.low[:, None]) - logits_LV.gather(1, target.high[:, None])
    return -F.cross_entropy(logits_LV, target.low, reduction="none") - target.fraction * difference[:, 0]


def coordinate_cross_entropy(
    logits_BSV: torch.Tensor,
    labels_BS: torch.Tensor,
    coordinate_values_BS: torch.Tensor | None,
    *,
    output_ids_of_axes: Sequence[int],
    num_rows: Sequence[int],
    column_starts: Sequence[int],
    soft: bool = True,
    reduction: str = "token_mean",
    num_items_in_batch: int | torch.Tensor | None = None,
    shift: bool = True,
    ignore_index: int = IGNORE_INDEX,
) -> torch.Tensor:
    """Cross entropy whose targets at output templates are the two coordinate tokens around the true coordinate.

    Args:
        logits_BSV: (B, S, V), one column per token.
        labels_BS: (B, S) token ids.
        coordinate_values_BS: (B, S) coordinate in [0, 1] at every template; None is enough without output templates.
        output_ids_of_axes: per axis the id of the template in answers.
        num_rows: per axis the number M of coordinate tokens.
        column_starts: per axis the column of its first coordinate token.
        soft: whether a coordinate between two tokens has both as targets, see `coordinate_targets`.
        reduction: "token_mean", the mean over all labelled tokens; "sample_sum", the mean over those of each sample,
            summed over samples, as released.
        num_items_in_batch: labelled tokens of all steps that one update gathers, by which "token_mean" divides;
            "sample_sum" has no use for it.
        shift: whether position s predicts label s + 1; False for labels that are shifted already.
        ignore_index: label of positions without a target.

    Returns:
        The loss, a float32 scalar; 0 where nothing is labelled.

    Raises:
        ValueError: another reduction, shapes that differ, or output templates without values.

    Source: `llava_qwen.py`.
    Differs: the released code writes targets as wide as the vocabulary and sums over samples, so that its loss grows
        with the batch; only "sample_sum" does here. Only rows of labelled positions are widened to float32.
    """
    if reduction not in LOSS_REDUCTIONS:
        raise ValueError(f"The loss is reduced by one of {', '.join(LOSS_REDUCTIONS)}, got {reduction!r}.")
    if logits_BSV.shape[:2] != labels_BS.shape:
        raise ValueError(
            f"Labels of shape {tuple(labels_BS.shape)} do not fit logits of shape {tuple(logits_BSV.shape)}: every "
            "position needs one label. Leave logits_to_keep at 0 when there are labels."
        )
    values_BS = coordinate_values_BS
    if values_BS is not None:
        check_values(values_BS, labels_BS)
    if shift:
        logits_BSV, labels_BS = logits_BSV[:, :-1], labels_BS[:, 1:]
        values_BS = None if values_BS is None else values_BS[:, 1:]
    labels_BS = labels_BS.to(logits_BSV.device)
    mask_BS = labels_BS != ignore_index
    values_L = None if values_BS is None else values_BS.to(logits_BSV.device)[mask_BS]
    target = coordinate_targets(
        labels_BS[mask_BS],
        values_L,
        output_ids_of_axes=output_ids_of_axes,
        num_rows=num_rows,
        column_starts=column_starts,
        soft=soft,
    )
    loss_L = -coordinate_log_probs(logits_BSV[mask_BS], target)
    if reduction == "token_mean":
        count = max(len(loss_L), 1) if num_items_in_batch is None else num_items_in_batch
        return loss_L.sum() / (count.to(loss_L.device) if isinstance(count, torch.Tensor) else count)
    counts_B = mask_BS.sum(1).clamp_min(1)
    share_L = (1 / counts_B.float())[:, None].expand_as(mask_BS)[mask_BS]
    return (loss_L * share_L).sum()
