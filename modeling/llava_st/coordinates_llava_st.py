"""Coordinates as tokens: the six tables, position embeddings from them, and continuous coordinates.

Paper: LLaVA-ST (arXiv 2501.08282), Sec. 3.2, Eqs. 2, 4 and 5. Original read: appletea233/LLaVA-ST, `llava_arch.py` and
`llava_qwen.py`. Neighbour propagation and continuous coordinates are in the released code only.
Deviations: other numbers of frames than temporal rows can be interpolated.

An axis (temporal, height, width, in this order everywhere) has one table of input and one of output rows. Whether they
lie in the vocabulary's matrices or beside them is not known here: all functions take tables, embeddings and logits.

Shapes: B samples, S positions, M rows of one table, D width of the language model, V columns of the logits, F frames,
P = G * G patches of a frame, K marked positions.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.nn import functional as F
from transformers.utils.generic import maybe_autocast

COORDINATE_AXES = ("temporal", "height", "width")


class Bins(NamedTuple):
    """The two rows between which a coordinate lies.

    Args:
        low: (K,) int64 row below or at the coordinate.
        high: (K,) int64 row above or at it, equal to `low` where the coordinate is a row's.
        fraction: (K,) share of `high` in [0, 1).
    """

    low: torch.Tensor
    high: torch.Tensor
    fraction: torch.Tensor


def find_bins(values: torch.Tensor, num_rows: int | torch.Tensor) -> Bins:
    """Finds the two rows of a table that hold a coordinate.

    Args:
        values: (K,) coordinates; what lies outside of [0, 1] is moved to its edge.
        num_rows: rows M of the table, or (K,) of every coordinate's table.

    Returns:
        Rows and share, so that the coordinate is `(1 - fraction) * low + fraction * high` over M - 1.

    Raises:
        ValueError: a coordinate that is not a number.

    Source: `llava_arch.py`, rows at p * (M - 1).
    """
    if values.isnan().any():
        raise ValueError(
            "A coordinate is not a number. Coordinates are fractions of the video's length or size, 0 to 1."
        )
    place = values.float().clamp(0, 1) * (num_rows - 1)
    low = place.floor()
    return Bins(low.long(), place.ceil().long(), place - low)


def propagate(table_MD: torch.Tensor) -> torch.Tensor:
    """Neighbouring token propagation: lets the gradient of a coordinate's row reach the rows beside it.

    Args:
        table_MD: (M, D) rows of one axis in order.

    Returns:
        (M, D) equal to the table. Its gradient G arrives at the table as (I + R) G with R[i, j] = 2^-|i - j|.

    Source: `llava_arch.py`; not in the paper.
    Differs: the original adds R W and subtracts it again, which rounds the value, visibly in half precision. Here the
        difference is taken first, so the value is exact in every type.
    """
    if not (torch.is_grad_enabled() and table_MD.requires_grad):
        return table_MD
    wide = _at_least_float32(table_MD)
    rows = torch.arange(len(wide), device=wide.device)
    near_MM = torch.exp2(-(rows[:, None] - rows).abs().to(wide.dtype))
    # Under autocast the product would take gradients in half precision.
    with maybe_autocast(device_type=wide.device.type, enabled=False):
        spread = near_MM @ wide
    return table_MD + (spread - spread.detach()).to(table_MD.dtype)


def _at_least_float32(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _mix_rows(table_MD: torch.Tensor, bins: Bins) -> torch.Tensor:
    low, high = (_at_least_float32(table_MD[index]) for index in (bins.low, bins.high))
    return torch.lerp(low, high, bins.fraction[:, None].to(low.dtype)).to(table_MD.dtype)


def average_tables(input_MD: torch.Tensor, output_MD: torch.Tensor) -> torch.Tensor:
    """Averages the input and the output rows of one axis.

    Args:
        input_MD: (M, D) rows by which tokens are read.
        output_MD: (M, D) rows by which tokens are predicted.

    Returns:
        (M, D).

    Source: LLaVA-ST Eq. 5, one of its three terms.
    """
    return (input_MD + output_MD) / 2


def interpolate_table(table_MD: torch.Tensor, size: int) -> torch.Tensor:
    """Resamples a table along its rows, linearly between neighbours.

    Args:
        table_MD: (M, D).
        size: wanted rows, at least 1.

    Returns:
        (size, D); the table itself where the size is equal. Row i reads place (i + 0.5) * M / size - 0.5, moved into
        the table at its ends; rows between are skipped, not averaged.

    Raises:
        ValueError: `size` below 1.

    Source: LLaVA-ST Sec. 3.2 after Eq. 5; `llava_arch.py`, which resizes `linear` with align_corners=False.
    """
    if size < 1:
        raise ValueError(f"A table cannot be resampled to {size} rows; at least 1 is needed.")
    num_rows = len(table_MD)
    if size == num_rows:
        return table_MD
    place = (torch.arange(size, dtype=torch.float64) + 0.5) * num_rows / size - 0.5
    place = place.clamp(0, num_rows - 1)
    low = place.floor()
    bins = Bins(low.long(), place.ceil().long(), place - low)
    return _mix_rows(table_MD, Bins(*(x.to(table_MD.device) for x in bins)))


class LapeParts(NamedTuple):
    """Position embeddings of a video, as the two summands that every chunk of frames needs.

    Args:
        temporal_FD: (F, D) of each frame.
        spatial_PD: (P, D) of each patch, row-major.
    """

    temporal_FD: torch.Tensor
    spatial_PD: torch.Tensor


def lape_parts(
    temporal_MD: torch.Tensor,
    height_MD: torch.Tensor,
    width_MD: torch.Tensor,
    *,
    num_frames: int,
    grid: int,
    image_row: int | None = None,
    interpolate_frames: bool = True,
) -> LapeParts:
    """Makes the language-aligned position embeddings of a video or an image.

    Args:
        temporal_MD: (Mt, D) averages of input and output rows.
        height_MD: (Mh, D) likewise.
        width_MD: (Mw, D) likewise.
        num_frames: F.
        grid: G, patches on a side.
        image_row: temporal row that an image takes (0 in the release), because it has no time; None for a video.
        interpolate_frames: whether a number of frames other than Mt is resampled; else it is refused.

    Returns:
        Temporal and spatial part; `add_lape` adds them.

    Raises:
        ValueError: another number of frames than temporal rows without `interpolate_frames`, or no frame or patch.

    Source: LLaVA-ST Eqs. 2 and 5; `llava_arch.py`.
    Differs: the paper resamples all three axes; the released code resamples height and width, adds temporal row t to
        frame t and fails for other numbers of frames (interpolate_frames=False).
    """
    if image_row is not None:
        temporal_FD = temporal_MD[image_row][None].expand(num_frames, -1)
    elif not interpolate_frames and num_frames != len(temporal_MD):
        raise ValueError(
            f"Got {num_frames} frames for {len(temporal_MD)} temporal rows. Sample {len(temporal_MD)} frames, or set "
            "lape_interpolate_frames=True."
        )
    else:
        temporal_FD = interpolate_table(temporal_MD, num_frames)
    rows, columns = interpolate_table(height_MD, grid), interpolate_table(width_MD, grid)
    return LapeParts(temporal_FD, (rows[:, None] + columns).flatten(0, 1))


def add_lape(features_FPD: torch.Tensor, parts: LapeParts, *, first_frame: int = 0) -> torch.Tensor:
    """Adds position embeddings to some consecutive frames.

    Args:
        features_FPD: (f, P, D) projected features.
        parts: of the whole video.
        first_frame: place of the first of these frames among the video's F frames.

    Returns:
        (f, P, D) in the type of the features.

    Raises:
        ValueError: frames or patches for which there are no embeddings.

    Source: LLaVA-ST Eq. 2.
    """
    frames, patches = features_FPD.shape[:2]
    temporal_FD = parts.temporal_FD[first_frame : first_frame + frames]
    if len(temporal_FD) != frames or len(parts.spatial_PD) != patches:
        raise ValueError(
            f"Got {frames} frames from frame {first_frame} with {patches} patches, but position embeddings of "
            f"{len(parts.temporal_FD)} frames with {len(parts.spatial_PD)} patches."
        )
    position = parts.spatial_PD + temporal_FD[:, None]
    return features_FPD + position.to(features_FPD.device, features_FPD.dtype)


def lape_addition(
    temporal_MD: torch.Tensor,
    height_MD: torch.Tensor,
    width_MD: torch.Tensor,
    num_frames: int,
    grid: int,
    *,
    image_row: int | None = None,
    interpolate_frames: bool = True,
) -> torch.Tensor:
    """Gives the position embeddings of all patches at once; models add `lape_parts` chunk by chunk.

    Args:
        temporal_MD: (Mt, D) averages of input and output rows.
        height_MD: (Mh, D) likewise.
        width_MD: (Mw, D) likewise.
        num_frames: F.
        grid: G, patches on a side.
        image_row: see `lape_parts`.
        interpolate_frames: see `lape_parts`.

    Returns:
        (F, G, G, D).

    Raises:
        ValueError: as `lape_parts`.

    Source: LLaVA-ST Eq. 5.
    """
    parts = lape_parts(
        temporal_MD,
        height_MD,
        width_MD,
        num_frames=num_frames,
        grid=grid,
        image_row=image_row,
        interpolate_frames=interpolate_frames,
    )
    return parts.temporal_FD[:, None, None] + parts.spatial_PD.unflatten(0, (grid, grid))


def interpolate_rows(table_MD: torch.Tensor, values_K: torch.Tensor) -> torch.Tensor:
    """Embeds continuous coordinates of one axis.

    Args:
        table_MD: (M, D) input rows, propagated in training.
        values_K: (K,) coordinates in [0, 1]; others are moved to the edge.

    Returns:
        (K, D) mixtures of the two rows around each coordinate, p = 0 the first row and p = 1 the last.

    Raises:
        ValueError: a coordinate that is not a number.

    Source: `llava_arch.py`. Differs: the paper takes the nearest row.
    """
    return _mix_rows(table_MD, find_bins(values_K, len(table_MD)))


def place_coordinate_rows(
    inputs_embeds: torch.Tensor, input_ids: torch.Tensor, tables: Sequence[torch.Tensor], start: int
) -> torch.Tensor:
    """Gives discrete coordinate tokens the rows of the input tables.

    Args:
        inputs_embeds: (B, S, D); what stands at coordinate tokens does not matter.
        input_ids: (B, S).
        tables: per axis (M, D) input rows, propagated in training.
        start: id of the first temporal token; the ids of all axes follow each other.

    Returns:
        (B, S, D).
    """
    num_rows = sum(len(table) for table in tables)
    mask_BS = (input_ids >= start) & (input_ids < start + num_rows)
    rows_KD = torch.cat(tuple(tables))[input_ids[mask_BS] - start]
    return _fill(inputs_embeds, mask_BS, rows_KD)


def _fill(inputs_embeds: torch.Tensor, mask_BS: torch.Tensor, rows_KD: torch.Tensor) -> torch.Tensor:
    rows_KD = rows_KD.to(inputs_embeds.device, inputs_embeds.dtype)
    return inputs_embeds.masked_scatter(mask_BS[..., None].to(inputs_embeds.device), rows_KD)


def inject_coordinates(
    inputs_embeds: torch.Tensor,
    input_ids: torch.Tensor,
    coordinate_values: torch.Tensor | None,
    *,
    tables: Sequence[torch.Tensor],
    input_ids_of_axes: Sequence[int],
    output_ids_of_axes: Sequence[int],
    inject_width_inputs: bool = True,
) -> torch.Tensor:
    """Gives template tokens the embeddings of the coordinates that they stand for.

    Args:
        inputs_embeds: (B, S, D).
        input_ids: (B, S).
        coordinate_values: (B, S) coordinate in [0, 1] at every template token; None leaves all embeddings alone.
        tables: per axis (M, D) input rows, propagated in training. They serve output templates, too: the model reads
            the true coordinates of its answer.
        input_ids_of_axes: per axis the id of the template in prompts.
        output_ids_of_axes: per axis the id of the template in answers.
        inject_width_inputs: whether width templates of prompts take part.

    Returns:
        (B, S, D).

    Raises:
        ValueError: values of another shape than the ids, or a coordinate that is not a number.

    Source: `llava_arch.py`.
    Differs: the released code reads the values of width templates in prompts and does not write them; its weights need
        inject_width_inputs=False.
    """
    if coordinate_values is None:
        return inputs_embeds
    check_values(coordinate_values, input_ids)
    # One table, one mixture and one copy for all axes. Row -1 marks tokens that are no template.
    first_BS = torch.full_like(input_ids, -1)
    size_BS = torch.ones_like(input_ids)
    first = 0
    for axis, table in enumerate(tables):
        mask_BS = input_ids == output_ids_of_axes[axis]
        if COORDINATE_AXES[axis] != "width" or inject_width_inputs:
            mask_BS = mask_BS | (input_ids == input_ids_of_axes[axis])
        first_BS, size_BS = first_BS.masked_fill(mask_BS, first), size_BS.masked_fill(mask_BS, len(table))
        first += len(table)
    mask_BS = first_BS >= 0
    offset_K = first_BS[mask_BS]
    bins = find_bins(coordinate_values.to(input_ids.device)[mask_BS], size_BS[mask_BS])
    bins = Bins(bins.low + offset_K, bins.high + offset_K, bins.fraction)
    return _fill(inputs_embeds, mask_BS, _mix_rows(torch.cat(tuple(tables)), bins))


def check_values(coordinate_values: torch.Tensor, ids: torch.Tensor) -> None:
    """Refuses coordinates that are not given one per token.

    Args:
        coordinate_values: (B, S) wanted.
        ids: (B, S) ids or labels.

    Raises:
        ValueError: the shapes differ.
    """
    if coordinate_values.shape != ids.shape:
        raise ValueError(
            f"coordinate_values must have one number for every token, {tuple(ids.shape)}, got "
            f"{tuple(coordinate_values.shape)}."
        )


def join_coordinate_logits(
    logits: torch.Tensor, hidden_states: torch.Tensor, tables: Sequence[torch.Tensor], start: int
) -> torch.Tensor:
    """Writes the logits of coordinate tokens from the output tables.

    Args:
        logits: (..., V) of the head, with columns for coordinate tokens or ending before them.
        hidden_states: (..., D) that the head read.
        tables: per axis (M, D) output rows, propagated in training.
        start: column of the first temporal token.

    Returns:
        (..., V) with one column per token; columns behind the coordinates are kept.

    Raises:
        ValueError: logits that end before `start`.

    Source: LLaVA-ST Eq. 4; `llava_qwen.py`.
    """
    if logits.shape[-1] < start:
        raise ValueError(
            f"The head gives {logits.shape[-1]} columns, but the coordinate tokens begin at column {start}. The head "
            "does not fit the tokenizer: convert the checkpoint again, or resize the embeddings."
        )
    table_MD = torch.cat(tuple(tables))
    # Weights and states may differ in type under autocast; linear follows the states' there.
    columns = F.linear(hidden_states, table_MD.to(hidden_states.device))
    end = start + len(table_MD)
    return torch.cat([logits[..., :start], columns.to(logits.dtype), logits[..., end:]], dim=-1)
