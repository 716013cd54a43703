"""Chat messages with videos: what their blocks may say, and how they are handed to Transformers."""

from collections.abc import Mapping, Sequence
from os import PathLike, fspath
from typing import Any

from longvideo.processing.shared.video_inputs import is_frame, stack_frames

# Names that a video block of a chat message may use, and the option that each one sets.
BLOCK_OPTIONS = {
    "fps": "fps",
    "nframes": "num_frames",
    "num_frames": "num_frames",
    "min_frames": "min_frames",
    "max_frames": "max_frames",
    "video_start": "start",
    "video_end": "end",
    "start": "start",
    "end": "end",
    "timestamps": "timestamps",
    "duration": "duration",
    "video_metadata": "metadata",
}


def prepare_conversation(conversation: Any) -> tuple[Any, list[dict[str, Any]]]:
    """Copy messages, bring their videos into the forms that Transformers passes on, and take out their own wishes.

    Args:
        conversation: Messages, or a list of conversations; not changed.

    Returns:
        The copy, and one mapping of options per video in order.

    Raises:
        ValueError: The conversation is empty, or a video block names no video or several, or a range of frames.
    """
    if not isinstance(conversation, list | tuple) or not conversation:
        raise ValueError(
            f"Expected a list of messages like {{'role': 'user', 'content': [...]}}, got {conversation!r}."
        )
    options: list[dict[str, Any]] = []

    def copy_message(message: Any) -> Any:
        content = message.get("content") if isinstance(message, Mapping) else None
        if not isinstance(content, list | tuple):
            return dict(message) if isinstance(message, Mapping) else message
        return {**message, "content": [copy_block(block) for block in content]}

    def copy_block(block: Any) -> Any:
        if isinstance(block, str):
            return {"type": "text", "text": block}
        if block.get("type") != "video":
            return {key: fspath(value) if isinstance(value, PathLike) else value for key, value in block.items()}
        keys = [key for key in ("video", "url", "path") if block.get(key) is not None]
        if len(keys) != 1:
            raise ValueError(
                f"A video block needs exactly one of 'video', 'url' and 'path', got {keys or 'none of them'}. "
                "Write one block per video."
            )
        # LLaVA-ST takes the frame ranges out before; for the others they would be lost without a word.
        if block.get("split") is not None:
            raise ValueError(
                f"A video block has split={block['split']!r} (frames), which this model does not read. Give start and "
                "end in seconds."
            )
        options.append({target: block[key] for key, target in BLOCK_OPTIONS.items() if block.get(key) is not None})
        return {"type": "video", keys[0]: plain_video(block[keys[0]])}

    if isinstance(conversation[0], list | tuple):
        return [[copy_message(message) for message in part] for part in conversation], options
    return [copy_message(message) for message in conversation], options


def plain_video(video: Any) -> Any:
    """Bring one video of a message into a form that keeps it one video.

    Args:
        video: Path, address, array, tensor, list of frames or of picture paths.

    Returns:
        Text, array, tensor or list of texts.
    """
    if isinstance(video, PathLike):
        return fspath(video)
    if isinstance(video, list | tuple) and video:
        if all(is_frame(entry) for entry in video):
            return stack_frames(video)
        return [fspath(entry) if isinstance(entry, PathLike) else entry for entry in video]
    return video


def check_question(conversation: Sequence) -> None:
    """Check that the last thing a user says is not blank.

    Args:
        conversation: Messages, or a list of conversations.

    Raises:
        ValueError: The last user message has text, all of it blank.
    """
    batch = conversation if isinstance(conversation[0], list | tuple) else [conversation]
    for messages in batch:
        asked = [message for message in messages if isinstance(message, Mapping) and message.get("role") == "user"]
        content = asked[-1].get("content") if asked else None
        texts = (
            [content]
            if isinstance(content, str)
            else [block.get("text") or "" for block in content or [] if block.get("type") == "text"]
        )
        if texts and not any(text.strip() for text in texts):
            raise ValueError("The question is empty; write what the model shall answer into the last user message.")
