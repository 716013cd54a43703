"""Rows of messages: one form for all of them, their videos and images, and how errors name them."""

from collections.abc import Iterator, Mapping
from typing import Any

VISUAL_SOURCES = {"video": ("video", "url", "path"), "image": ("image", "url", "path", "base64")}


def normalize_messages(row: Mapping[str, Any], *, where: str = "The row") -> list[dict[str, Any]]:
    """Bring the messages of a row to one form: lists of blocks, no None entries, every visual block with its source.

    Args:
        row: Row with a `messages` list; `videos` and `images` columns fill the blocks that have no source, in order.
        where: How errors name the row.

    Returns:
        New message dicts; the media objects themselves are shared with the row.

    Raises:
        ValueError: No messages, a message without role or content, or a number of media that does not match.
    """
    messages = row.get("messages")
    if not messages:
        raise ValueError(
            f"{where} has no `messages` (its keys: {sorted(row)}). Expected "
            '{"messages": [{"role": "user", "content": [{"type": "video", "path": ...}, {"type": "text", ...}]}, '
            '{"role": "assistant", "content": [...]}]}.'
        )
    media = {kind: list(row.get(f"{kind}s") or []) for kind in VISUAL_SOURCES}
    normalized = []
    for position, message in enumerate(messages):
        if not isinstance(message, Mapping) or message.get("role") is None or message.get("content") is None:
            raise ValueError(
                f"{where}: message {position} must be a dict with `role` and `content`, got {message!r:.200}."
            )
        content = message["content"]
        blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
        normalized.append(
            {
                **{key: value for key, value in message.items() if value is not None},
                "content": [_complete_block(block, media, f"{where}: message {position}") for block in blocks],
            }
        )
    for kind, left in media.items():
        if left:
            raise ValueError(
                f"{where} has {len(left)} entries in `{kind}s` that no block takes. Write one "
                f'{{"type": "{kind}"}} block for each of them into the messages.'
            )
    return normalized


def _complete_block(block: Mapping[str, Any], media: dict[str, list[Any]], where: str) -> dict[str, Any]:
    # Arrow tables give every block the keys of all blocks, with None where a block had none.
    complete = {key: value for key, value in block.items() if value is not None}
    kind = complete.get("type")
    if kind in media and not any(key in complete for key in VISUAL_SOURCES[kind]):
        if not media[kind]:
            raise ValueError(
                f"{where} has a {kind} block without a source. Give it one of the keys {VISUAL_SOURCES[kind]}, "
                f"or an entry in the row's `{kind}s`."
            )
        complete[kind] = media[kind].pop(0)
    return complete


def copy_messages(messages: list[dict[str, Any]], *, with_media: bool = True) -> list[dict[str, Any]]:
    """Copy messages, because templates and processors may change them and the row must stay as it came.

    Args:
        messages: Messages of `normalize_messages`.
        with_media: Whether the copy keeps its videos and images; text alone needs no pixels, which a processor might
            copy each time.

    Returns:
        New messages with new blocks; the media objects themselves are shared.
    """
    return [
        {**message, "content": [_copy_block(block, with_media=with_media) for block in message["content"]]}
        for message in messages
    ]


def _copy_block(block: dict[str, Any], *, with_media: bool) -> dict[str, Any]:
    sources = () if with_media else VISUAL_SOURCES.get(block.get("type"), ())
    return {key: "-" if key in sources else value for key, value in block.items()}


def visual_blocks(messages: list[dict[str, Any]], kind: str | None = None) -> Iterator[dict[str, Any]]:
    """Go through the videos and images of messages in order.

    Args:
        messages: Messages of `normalize_messages`.
        kind: "video" or "image" alone, None for both.

    Returns:
        Iterator over the blocks, not copied.
    """
    kinds = VISUAL_SOURCES if kind is None else (kind,)
    return (block for message in messages for block in message["content"] if block.get("type") in kinds)


def source_of(block: Mapping[str, Any]) -> tuple[str | None, Any]:
    """Find what a visual block shows.

    Args:
        block: Block of type "video" or "image".

    Returns:
        Its key ("video", "url", "path", "image", "base64") and the source; (None, None) where there is none.
    """
    for key in VISUAL_SOURCES[block["type"]]:
        if block.get(key) is not None:
            return key, block[key]
    return None, None


def describe_source(block: Mapping[str, Any]) -> str:
    """Name what a visual block shows, in few words.

    Args:
        block: Block of type "video" or "image".

    Returns:
        Path or address, or what kind of object it is.
    """
    source = source_of(block)[1]
    if isinstance(source, list | tuple) and source and isinstance(source[0], str):
        return f"{source[0]!r} and {len(source) - 1} more pictures"
    if hasattr(source, "shape"):
        return f"{type(source).__name__} of shape {tuple(source.shape)}"
    return repr(source)[:200] if isinstance(source, str) or hasattr(source, "__fspath__") else type(source).__name__


def describe_row(row: Mapping[str, Any], position: int) -> str:
    """Name a row for errors and reports.

    Args:
        row: The row.
        position: Its zero-based place in the batch.

    Returns:
        "Row 2 of the batch (id 'a7')"; without an id the row's first video or image that has a path.
    """
    name = f"Row {position} of the batch"
    if not isinstance(row, Mapping):
        return name
    if row.get("id") is not None:
        return f"{name} (id {row['id']!r})"
    path = next(_paths_of(row), None)
    return name if path is None else f"{name} ({path!r})"


def _paths_of(row: Mapping[str, Any]) -> Iterator[str]:
    for message in row.get("messages") or []:
        content = message.get("content") if isinstance(message, Mapping) else None
        for block in content if isinstance(content, list | tuple) else []:
            if isinstance(block, Mapping) and block.get("type") in VISUAL_SOURCES:
                source = source_of(block)[1]
                if isinstance(source, str) and len(source) <= 500:
                    yield source
    for kind in VISUAL_SOURCES:
        yield from (entry for entry in row.get(f"{kind}s") or [] if isinstance(entry, str))
