"""Chat messages of LLaVA-ST before a template renders them: coordinates by role, placeholders, frame ranges."""

from collections.abc import Mapping
from typing import Any

from longvideo.processing.llava_st.coordinate_text_llava_st import write_short_forms

# What stands for a visual in the data of the release, and the token that stands for it here.
ALIASES = {"image": ("<image>", "<im_patch>"), "video": ("<video>", "<vid_patch>")}


def write_placeholders(text: str) -> str:
    """Replace the placeholders of the release by ours.

    Args:
        text: Prompt.

    Returns:
        The prompt with `<im_patch>` for `<image>` and `<vid_patch>` for `<video>`.
    """
    for alias, token in ALIASES.values():
        text = text.replace(alias, token)
    return text


def prepare_messages(conversation: Any, *, with_aliases: bool = True) -> tuple[Any, list[Any]]:
    """Copy messages with their short coordinates written out, and take the frame ranges of their videos out.

    Args:
        conversation: Messages, or a list of conversations; not changed. Anything else is given back as it is.
        with_aliases: Whether `<image>` and `<video>` in a text stand for visuals. Where the message has a block for
            the visual already, the alias is left out, since the template writes the visual in front.

    Returns:
        The copy, and the `split` (or None) of every video block in order.
    """
    splits: list[Any] = []

    def copy_message(message: Any) -> Any:
        if not isinstance(message, Mapping):
            return message
        way = "OUTPUT" if message.get("role") == "assistant" else "INPUT"
        content = message.get("content")
        if isinstance(content, str):
            return {**message, "content": copy_text(content, way, ())}
        if not isinstance(content, list | tuple):
            return dict(message)
        kinds = [block.get("type") for block in content if isinstance(block, Mapping)]
        return {**message, "content": [copy_block(block, way, kinds) for block in content]}

    def copy_block(block: Any, way: str, kinds: list[str]) -> Any:
        if isinstance(block, str):
            return {"type": "text", "text": copy_text(block, way, kinds)}
        if not isinstance(block, Mapping):
            return block
        if block.get("type") == "video":
            splits.append(block.get("split"))
        if block.get("type") == "text" and isinstance(block.get("text"), str):
            return {**block, "text": copy_text(block["text"], way, kinds)}
        return {key: value for key, value in block.items() if key != "split"}

    def copy_text(text: str, way: str, kinds: Any) -> str:
        text = write_short_forms(text, way)
        if not with_aliases:
            return text
        for kind, (alias, _) in ALIASES.items():
            if kind in kinds:
                text = text.replace(f"{alias}\n", "").replace(alias, "")
        return write_placeholders(text)

    if not isinstance(conversation, list | tuple) or not conversation:
        return conversation, splits
    if isinstance(conversation[0], list | tuple):
        return [[copy_message(message) for message in part] for part in conversation], splits
    return [copy_message(message) for message in conversation], splits
