"""Where the blocks of images and videos lie in a prompt, and features in their places.

Shapes: B batch, S sequence, D language width, V visual tokens, N positions of one block.
"""

from collections.abc import Sequence

import torch

from longvideo.modeling.layers.placeholders import find_placeholders, scatter_features
from longvideo.modeling.llava_st.configuration_llava_st import AXES, LlavaSTConfig

VISUAL_NAMES = {
    "image": ("image_start", "image", "image_end"),
    "video": ("video_start", "video", "video_end", "slow_video_start", "slow_video_end"),
}
TEMPLATE_NAMES = tuple(f"{axis}_{side}" for axis in AXES for side in ("input", "output"))


def token_id(config: LlavaSTConfig, name: str) -> int:
    """Returns the id of a visual or template token by its short name."""
    return getattr(config, f"{name}_token_id")


def block_ids(config: LlavaSTConfig, kind: str) -> list[int]:
    """Returns the ids of one whole block of an "image" or a "video", in order.

    Source: `conversation` preparation of the original: start, patches, end; the slow block follows the fast one.
    """

    def block(start: str, patch: str, end: str, size: int) -> list[int]:
        inner = [token_id(config, patch)] * (size - 2)
        return [token_id(config, start), *inner, token_id(config, end)]

    if kind == "image":
        return block("image_start", "image", "image_end", config.num_image_positions)
    fast = block("video_start", "video", "video_end", config.num_fast_positions)
    return fast + block("slow_video_start", "video", "slow_video_end", config.num_slow_positions)


def count_features(config: LlavaSTConfig, kind: str) -> int:
    """Returns how many features one image or video gives to the decoder."""
    if kind == "image":
        return config.num_image_positions
    return config.num_slow_positions + (config.num_fast_positions if config.splice_fast_stream else 0)


def recover_ids(
    inputs_embeds: torch.Tensor,
    embedding: torch.nn.Module,
    config: LlavaSTConfig,
    *,
    kinds: Sequence[str] = ("image", "video"),
    with_values: bool = True,
) -> torch.Tensor:
    """Finds visual and template tokens among embeddings, where there are no ids.

    Tokens that no training has touched have equal rows: in the released weights those of images and of the slow block.
    They are told apart by their places in whole blocks.

    Args:
        inputs_embeds: (B, S, D).
        embedding: the input embedding.
        config: model configuration.
        kinds: kinds of visuals that features were given for, of "image" and "video".
        with_values: whether template tokens are wanted.

    Returns:
        (B, S) int64 ids, -1 for all other tokens.

    Raises:
        ValueError: embeddings that fit several tokens also by their place.
    """
    ids = torch.full(inputs_embeds.shape[:2], -1, dtype=torch.long, device=inputs_embeds.device)
    templates = [token_id(config, name) for name in TEMPLATE_NAMES] if config.num_coordinate_tokens else []
    visuals = [token_id(config, name) for names in VISUAL_NAMES.values() for name in names]
    shared: dict[int, list[int]] = {}  # the first token with a row: all tokens with it
    for wanted in [*visuals, *templates]:
        mask = find_placeholders(wanted, inputs_embeds=inputs_embeds, embedding=embedding)
        first = int(ids[mask][0]) if mask.any() else -1
        if first >= 0:
            shared.setdefault(first, [first]).append(wanted)
        else:
            ids[mask] = wanted
    return _tell_by_place(ids, shared, config, kinds, templates if with_values else []) if shared else ids


def _tell_by_place(
    ids: torch.Tensor, shared: dict[int, list[int]], config: LlavaSTConfig, kinds: Sequence[str], templates: list[int]
) -> torch.Tensor:
    """Writes the ids of whole blocks, and of single templates, where tokens share a row and so have one id."""
    first_of = {token: first for first, tokens in shared.items() for token in tokens}
    blocks = [block_ids(config, kind) for kind in kinds]
    looks = [[first_of.get(token, token) for token in block] for block in blocks]
    advice = "Their embeddings are equal in these weights; pass input_ids in place of inputs_embeds."
    told = []
    for row in ids.tolist():
        place = 0
        while place < len(row):
            fitting = [
                block
                for block, look in zip(blocks, looks, strict=True)
                if row[place] == look[0] and row[place : place + len(look)] == look
            ]
            if len(fitting) > 1:
                raise ValueError(f"Position {place} may begin an image or a video. {advice}")
            if fitting:
                row[place : place + len(fitting[0])] = fitting[0]
                place += len(fitting[0])
                continue
            if row[place] in shared:
                found = [token for token in shared[row[place]] if token in templates]
                if len(found) > 1:
                    raise ValueError(f"Position {place} may hold {len(found)} kinds of coordinates. {advice}")
                row[place] = found[0] if found else -1
            place += 1
        told.append(row)
    return torch.tensor(told, dtype=ids.dtype, device=ids.device)


def mark_blocks(input_ids: torch.Tensor, config: LlavaSTConfig, kind: str) -> torch.Tensor:
    """Marks all positions of images or of videos; (B, S) bool."""
    mask = torch.zeros_like(input_ids, dtype=torch.bool)
    for name in VISUAL_NAMES[kind]:
        mask |= input_ids == token_id(config, name)
    return mask


def _check_blocks(input_ids: torch.Tensor, mask_BS: torch.Tensor, config: LlavaSTConfig, kind: str, num: int) -> None:
    """Raises where the marked positions are not `num` whole blocks."""
    pattern = torch.tensor(block_ids(config, kind), device=input_ids.device)
    size, found = len(pattern), int(mask_BS.sum())
    advice = f"Prepare text and {kind}s in one processor call, and do not cut the input ids afterwards."
    if found != num * size:
        extra = f" of {config.num_frames} frames" if kind == "video" else ""
        raise ValueError(
            f"The prompt holds {found} {kind} positions, but {num} {kind}s{extra} need {num} x {size} = {num * size}. "
            f"{advice}"
        )
    places = mask_BS.flatten().nonzero()[:, 0].view(num, size)
    # The end of a row and the start of the next one are neighbours here, but a block never begins in the middle.
    whole = (input_ids.flatten()[places] == pattern).all() and bool((places[:, -1] - places[:, 0] == size - 1).all())
    if not whole:
        raise ValueError(
            f"A block of {size} {kind} positions is torn or in another order than start, patches, end. {advice}"
        )


def place_features(
    inputs_embeds: torch.Tensor,
    input_ids: torch.Tensor,
    features: dict[str, torch.Tensor | None],
    config: LlavaSTConfig,
    *,
    required: bool,
) -> torch.Tensor:
    """Overwrites the positions of images and videos, starts and ends too, by their features.

    Args:
        inputs_embeds: (B, S, D).
        input_ids: (B, S).
        features: per kind, "image" and "video", (V, D) of all items in prompt order, or None.
        config: model configuration.
        required: whether positions without any features are an error.

    Returns:
        (B, S, D).

    Raises:
        ValueError: positions and features do not agree; going on would shift features between items.

    Source: LLaVA-ST Sec. 3.3; `llava_arch.py`.
    Differs: the released code puts the slow stream into the prompt as it was before the fast one, so that the decoder
        never sees the fast stream; `splice_fast_stream` False does the same.
    """
    for kind, found in features.items():
        mask = mark_blocks(input_ids, config, kind)
        if found is None:
            if required and mask.any():
                raise ValueError(
                    f"The prompt holds {int(mask.sum())} {kind} positions but no {kind} was given. Pass the {kind} to "
                    "the processor together with the text and all its outputs to the model."
                )
            continue
        size = count_features(config, kind)
        if len(found) % size:
            raise ValueError(
                f"{len(found)} {kind} features were given; every {kind} gives {size}. They were made with other "
                "settings: encode again with this model."
            )
        _check_blocks(input_ids, mask, config, kind, len(found) // size)
        if kind == "video" and not config.splice_fast_stream:
            block = config.num_fast_positions + config.num_slow_positions
            rank = mask.flatten().cumsum(0).view_as(input_ids) - 1
            mask = mask & (rank % block >= config.num_fast_positions)
        inputs_embeds = scatter_features(inputs_embeds, mask, found, kind=kind)
    return inputs_embeds
