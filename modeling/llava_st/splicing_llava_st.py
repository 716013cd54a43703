"""Where the blocks of images and videos lie in a prompt, and features in their places.

Shapes: B batch, S sequence, D language width, V visual tokens, N positions of one block.
"""

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


def recover_ids(inputs_embeds: torch.Tensor, embedding: torch.nn.Module, config: LlavaSTConfig) -> torch.Tensor:
    """Finds visual and template tokens among embeddings, where there are no ids.

    Args:
        inputs_embeds: (B, S, D).
        embedding: the input embedding.
        config: model configuration.

    Returns:
        (B, S) int64 ids, -1 for all other tokens.
    """
    ids = torch.full(inputs_embeds.shape[:2], -1, dtype=torch.long, device=inputs_embeds.device)
    names = [*VISUAL_NAMES["image"], *VISUAL_NAMES["video"]]
    if config.num_coordinate_tokens:
        names += TEMPLATE_NAMES
    for name in names:
        wanted = token_id(config, name)
        ids[find_placeholders(wanted, inputs_embeds=inputs_embeds, embedding=embedding)] = wanted
    return ids


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
