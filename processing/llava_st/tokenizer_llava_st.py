"""The tokens that LLaVA-ST adds to its tokenizer: marks of visual blocks, templates of coordinates, coordinates."""

import re
from collections.abc import Sequence
from typing import Any

from longvideo.processing.shared.processor_calls import knows_token

# Field of the configuration and token, in the order in which the release adds them.
VISUAL_TOKENS = {
    "image_start_token_id": "<im_start>",
    "image_end_token_id": "<im_end>",
    "image_token_id": "<im_patch>",
    "video_start_token_id": "<vid_start>",
    "video_end_token_id": "<vid_end>",
    "video_token_id": "<vid_patch>",
    "slow_video_start_token_id": "<slow_vid_start>",
    "slow_video_end_token_id": "<slow_vid_end>",
}
TEMPLATE_TOKENS = {
    "temporal_input_token_id": "<TEMP-INPUT>",
    "temporal_output_token_id": "<TEMP-OUTPUT>",
    "height_input_token_id": "<HEIGHT-INPUT>",
    "height_output_token_id": "<HEIGHT-OUTPUT>",
    "width_input_token_id": "<WIDTH-INPUT>",
    "width_output_token_id": "<WIDTH-OUTPUT>",
}
AXES = ("TEMP", "HEIGHT", "WIDTH")
_COORDINATE = re.compile(r"<(TEMP|HEIGHT|WIDTH)-\d{3,}>")


def coordinate_tokens(num_temporal: int, num_spatial: int) -> list[str]:
    """List the discrete coordinates in the order of their ids.

    Args:
        num_temporal: Number of times.
        num_spatial: Number of heights, and of widths.

    Returns:
        `<TEMP-000>` and following, then heights, then widths.
    """
    sizes = zip(AXES, (num_temporal, num_spatial, num_spatial), strict=True)
    return [f"<{axis}-{index:03d}>" for axis, size in sizes for index in range(size)]


def add_coordinate_tokens(tokenizer: Any, num_temporal: int = 100, num_spatial: int = 100) -> dict[str, int]:
    """Add what the model needs to a tokenizer; tokens that it has already keep their ids.

    Args:
        tokenizer: Tokenizer of the decoder; changed in place. Resize the embeddings of the model afterwards.
        num_temporal: Number of times; 0, together with `num_spatial`, adds the marks of visual blocks only (stage 1).
        num_spatial: Number of heights, and of widths.

    Returns:
        Fields of `LlavaSTConfig`: ids by name, `coordinate_token_start`, `num_temporal_tokens`, `num_spatial_tokens`.

    Raises:
        ValueError: Numbers that are negative or of which only one is 0, or ids that do not follow each other because
            the tokenizer had some of the tokens in another place.

    Source: `initialize_vision_tokenizer` and `initialize_spatial_temporal_tokens` of appletea233/LLaVA-ST.
    """
    if min(num_temporal, num_spatial) < 0 or (num_temporal == 0) != (num_spatial == 0):
        raise ValueError(
            f"num_temporal={num_temporal} and num_spatial={num_spatial} must both be positive, or both 0 for a "
            "tokenizer without coordinates."
        )
    wanted = list(VISUAL_TOKENS.values())
    if num_temporal:
        wanted += [*TEMPLATE_TOKENS.values(), *coordinate_tokens(num_temporal, num_spatial)]
    tokenizer.add_tokens([token for token in wanted if not knows_token(tokenizer, token)], special_tokens=True)
    return coordinate_token_fields(tokenizer, num_temporal, num_spatial)


def coordinate_token_fields(
    tokenizer: Any, num_temporal: int | None = None, num_spatial: int | None = None
) -> dict[str, int]:
    """Look up the ids of the added tokens after checking that they fit the tables of the model.

    Args:
        tokenizer: The tokenizer.
        num_temporal: Number of times that it must have, None for as many as it has.
        num_spatial: Number of heights, and of widths, None for as many as it has.

    Returns:
        As `add_coordinate_tokens`; without coordinates the fields of templates and coordinates are left out.

    Raises:
        ValueError: A token is missing, the coordinates differ in number from what was asked for, or their ids do not
            follow each other.
    """
    sizes = count_coordinates(tokenizer)
    if sizes[1] != sizes[2]:
        raise ValueError(f"The tokenizer has {sizes[1]} heights and {sizes[2]} widths; both must be equally many.")
    wanted = (sizes[0] if num_temporal is None else num_temporal, sizes[1] if num_spatial is None else num_spatial)
    has_coordinates = max(wanted) > 0
    tokens = {**VISUAL_TOKENS, **(TEMPLATE_TOKENS if has_coordinates else {})}
    missing = [token for token in tokens.values() if not knows_token(tokenizer, token)]
    if missing or (has_coordinates and max(sizes) == 0):
        missing = missing or ["<TEMP-000>", "<HEIGHT-000>", "<WIDTH-000>"]
        raise ValueError(
            f"The tokenizer does not know {', '.join(missing)}. Use the tokenizer that came with the weights, or add "
            "the tokens (longvideo.processing.llava_st.tokenizer_llava_st.add_coordinate_tokens) and resize the "
            "embeddings."
        )
    if wanted != sizes[:2]:
        raise ValueError(
            f"The tokenizer has {sizes[0]} times and {sizes[1]} heights and widths, but {wanted[0]} and {wanted[1]} "
            "are needed (num_temporal_tokens, num_spatial_tokens). Use the tokenizer that came with the weights."
        )
    fields = {name: tokenizer.convert_tokens_to_ids(token) for name, token in tokens.items()}
    if has_coordinates:
        fields["coordinate_token_start"] = first_id(tokenizer, coordinate_tokens(*wanted))
    return {**fields, "num_temporal_tokens": wanted[0], "num_spatial_tokens": wanted[1]}


def count_coordinates(tokenizer: Any) -> tuple[int, int, int]:
    """Count the discrete coordinates of a tokenizer.

    Args:
        tokenizer: The tokenizer.

    Returns:
        Numbers of times, heights and widths.
    """
    found = [match[1] for match in map(_COORDINATE.fullmatch, tokenizer.get_added_vocab()) if match]
    return found.count("TEMP"), found.count("HEIGHT"), found.count("WIDTH")


def first_id(tokenizer: Any, tokens: Sequence[str]) -> int:
    """Return the id of the first of some tokens after checking that the others follow it.

    Args:
        tokenizer: The tokenizer.
        tokens: Tokens in the order of the model's tables.

    Returns:
        Id of the first one.

    Raises:
        ValueError: The ids do not follow each other.
    """
    ids = tokenizer.convert_tokens_to_ids(list(tokens))
    for place, (token, token_id) in enumerate(zip(tokens, ids, strict=True)):
        if token_id is None or token_id != ids[0] + place:
            raise ValueError(
                f"{token} has the id {token_id} and {tokens[0]} {ids[0]}: times, heights and widths must follow each "
                "other in this order as the tables of the model do. Add them to a tokenizer that has none of them."
            )
    return ids[0]
