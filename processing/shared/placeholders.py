"""Placeholder tokens of visual items in a text: counting, expansion and what truncation must not cut."""

import bisect
from collections.abc import Sequence


def check_placeholder_count(*, kind: str, token: str, num_placeholders: int, num_items: int) -> None:
    """Check that a text has one placeholder for each visual item.

    Args:
        kind: "image" or "video", for the message.
        token: The placeholder token.
        num_placeholders: Placeholders in all texts of the call.
        num_items: Visual items given.

    Raises:
        ValueError: The numbers differ.
    """
    if num_placeholders != num_items:
        raise ValueError(
            f"The total number of {token} tokens in the prompts should be the same as the number of {kind}s passed. "
            f"Found {num_placeholders} {token} tokens and {num_items} {kind}s. Write one {token} per {kind}, "
            f"or use apply_chat_template, which writes them; a question must not contain {token} itself."
        )


def check_not_truncated(*, kind: str, expected: Sequence[int], kept: Sequence[int], max_length: int) -> None:
    """Check that tokenizing kept every visual token of every sample.

    Args:
        kind: "image" or "video", for the message.
        expected: Visual tokens in each expanded text.
        kept: Visual tokens in each row of ids.
        max_length: Number of ids in the longest row.

    Raises:
        ValueError: A row lost visual tokens.
    """
    for row, (before, after) in enumerate(zip(expected, kept, strict=True)):
        if before != after:
            raise ValueError(
                f"Truncation to {max_length} tokens cuts into a {kind}: sample {row} has {before} {kind} tokens, of "
                f"which {after} are left. Give a larger max_length, use fewer frames (num_frames, max_frames) or "
                "images, or switch truncation off."
            )


def check_token_budget(*, num_tokens: int, num_visual_tokens: int, max_tokens: int | None) -> None:
    """Check a sequence against the largest length that the model was made for.

    Args:
        num_tokens: Tokens of the longest sample, visual tokens included.
        num_visual_tokens: Visual tokens of that sample.
        max_tokens: Largest length, None when it is not known.

    Raises:
        ValueError: The sequence is too long.
    """
    if max_tokens is not None and num_tokens > max_tokens:
        raise ValueError(
            f"The prompt has {num_tokens} tokens ({num_visual_tokens} of them visual), but the model's limit is "
            f"{max_tokens} (tokenizer.model_max_length). Use fewer frames (num_frames, max_frames), or raise "
            "tokenizer.model_max_length if the model was extended to longer sequences."
        )


def shift_spans(
    spans: Sequence[tuple[int, int]], replacements: Sequence[tuple[tuple[int, int], tuple[int, int]]]
) -> list[tuple[int, int]]:
    """Move character spans of a text to where they lie after placeholders were replaced by longer strings.

    Args:
        spans: (start, end) character offsets in the text with placeholders.
        replacements: For each placeholder, in order, its (start, end) before and after the replacement.

    Returns:
        The spans in the expanded text.
    """
    ends = [before[1] for before, _ in replacements]
    gained = [0] + [after[1] - before[1] for before, after in replacements]
    return [
        (start + gained[bisect.bisect_right(ends, start)], end + gained[bisect.bisect_right(ends, end)])
        for start, end in spans
    ]


def mask_of_spans(spans: Sequence[tuple[int, int]], token_offsets: Sequence[tuple[int, int]]) -> list[int]:
    """Mark the tokens that overlap any of some character spans.

    Args:
        spans: (start, end) character offsets.
        token_offsets: (start, end) character offsets of each token; empty for padding and added tokens.

    Returns:
        One 0 or 1 per token.
    """
    mask = [0] * len(token_offsets)
    for start, end in spans:
        for position, (token_start, token_end) in enumerate(token_offsets):
            if token_start < end and token_end > start:
                mask[position] = 1
    return mask
