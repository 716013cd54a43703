"""Rows of our own form: messages made of blocks, their media, and the tags that stand for media in other formats.

A row is `{"messages": [...]}` or, with a preferred and a refused answer, `{"prompt": [...], "chosen": [...],
"rejected": [...]}`; `id` is optional, `meta` holds sizes that only some formats write, `ref_chosen_logps` and
`ref_rejected_logps` go with a preference row. A message is `{"role":
"system" | "user" | "assistant", "content": [blocks]}`. A block is `{"type": "text", "text"}`, or a video or an image
with one source: `path` (file or folder of frame pictures), `url` (http(s) address or data URI), `video` (list of frame
pictures), `image` (a loaded picture). A video may have `start` and `end` in seconds, or `split`, its first and last
frame.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike, fspath
from typing import Any

from longvideo.processing.shared.video_sources import PICTURE_SUFFIXES

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
SOURCES = {"video": ("path", "url", "video"), "image": ("path", "url", "image")}
# What a video block may carry beside its source, and the words for it in reports.
CUTS = ("start", "end", "split")
READING_OPTIONS = (
    "fps",
    "nframes",
    "num_frames",
    "min_frames",
    "max_frames",
    "timestamps",
    "duration",
    "video_metadata",
)
# Other names for keys of our blocks.
SAME_KEYS = {"video_start": "start", "video_end": "end"}
TAGS = {"<video>": "video", "<image>": "image"}
_TAG = re.compile(r"<(?:video|image)>")
MESSAGE_LISTS = ("messages", "prompt", "chosen", "rejected")
# What a preference row may carry of the reference model, see `trainers.dpo_collator`.
REFERENCE_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")


def media_block(kind: str, source: Any) -> dict[str, Any]:
    """Make the block of a video or an image.

    Args:
        kind: "video" or "image".
        source: Path, address, data URI, list of frame pictures (videos), or a mapping with one of our sources and
            options, or with `path` and `bytes` as tables have it; a loaded picture (images).

    Returns:
        The block.

    Raises:
        ValueError: Something else.
    """
    if isinstance(source, PathLike):
        source = fspath(source)
    if isinstance(source, str) and source:
        lowered = source.lower()
        if lowered.startswith("file://") and kind == "image":
            return {"type": kind, "path": source[7:]}
        return {"type": kind, "url" if lowered.startswith(("http://", "https://", "data:")) else "path": source}
    is_list = isinstance(source, list | tuple) and bool(source) and kind == "video"
    if is_list and all(isinstance(frame, str | PathLike) for frame in source):
        return {"type": kind, "video": [fspath(frame) for frame in source]}
    if isinstance(source, Mapping):
        if source.get("bytes") is not None and kind == "image":
            return {"type": kind, "image": {"path": source.get("path"), "bytes": source["bytes"]}}
        if source.get("bytes") is not None:
            raise ValueError("a video is given as bytes; write it to a file and give its path")
        return media_from_block({**source, "type": kind})
    if kind == "image" and source is not None and hasattr(source, "convert"):
        return {"type": kind, "image": source}
    expected = "a path, an address" + (" or a list of frame pictures" if kind == "video" else " or a picture")
    raise ValueError(f"a {kind} is {source!r:.100}; expected {expected}")


def media_from_block(block: Mapping[str, Any]) -> dict[str, Any]:
    """Bring a video or image block of a message into our form.

    Args:
        block: Block with the keys that the processors know.

    Returns:
        The block; without a source where it had none.

    Raises:
        ValueError: Unknown keys, several sources, or a cut that is none.
    """
    kind = block["type"]
    given = {SAME_KEYS.get(key, key): value for key, value in block.items() if value is not None}
    given.pop("type")
    names = [key for key in dict.fromkeys(("video", *SOURCES[kind], "base64", kind)) if key in given]
    if (kind == "video" and "base64" in names) or (kind == "image" and "video" in names):
        raise ValueError(f"a {kind} block has the key {'base64' if kind == 'video' else 'video'!r}")
    if len(names) > 1:
        raise ValueError(f"a {kind} block has several sources: {names}; write one block for each")
    complete: dict[str, Any] = {"type": kind}
    if names:
        source = given.pop(names[0])
        if names[0] == "base64" and not str(source).startswith("data:"):
            source = f"data:image/png;base64,{source}"
        complete = media_block(kind, source)
    known = (*CUTS, *READING_OPTIONS) if kind == "video" else ()
    counted = [key for key in ("nframes", "num_frames") if key in given]
    if counted and "fps" in given:
        raise ValueError(f"a video block has both fps and {counted[0]}; give one of them")
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ValueError(f"a {kind} block has the unknown keys {unknown}; expected a source and some of {known}")
    return add_cut({**complete, **given})


def add_cut(block: dict[str, Any], *, start: Any = None, end: Any = None, split: Any = None) -> dict[str, Any]:
    """Give a video block its cut and check it.

    Args:
        block: Video block, changed in place.
        start: Begin in seconds, or None to leave it.
        end: End in seconds, or None to leave it.
        split: (first, last) frame, or None to leave it.

    Returns:
        The block.

    Raises:
        ValueError: Not numbers, an empty window, or seconds beside frames.
    """
    for name, value in (("start", start), ("end", end), ("split", split)):
        if value is not None:
            block[name] = value
    for name in ("start", "end"):
        if name in block:
            if isinstance(block[name], bool) or not isinstance(block[name], int | float):
                raise ValueError(f"{name}={block[name]!r} of a video is no number of seconds")
            block[name] = float(block[name])
    first = block.get("start", 0.0)
    if not first >= 0 or ("end" in block and not block["end"] > first):
        raise ValueError(f"a video runs from {first:g} s to {block.get('end')} s; expected 0 <= start < end")
    if "split" in block:
        pair = block["split"]
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(float(at).is_integer() for at in pair):
            raise ValueError(f"split={pair!r}, expected the first and the last frame of the part that is looked at")
        block["split"] = [int(at) for at in pair]
        if "start" in block or "end" in block:
            raise ValueError("a video has both split (frames) and start or end (seconds); give one of them")
    return block


def text_block(text: str) -> dict[str, Any]:
    """Make a block of text."""
    return {"type": "text", "text": text}


def message(role: str, blocks: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Make a message, with neighbouring texts as one block and no empty ones.

    Args:
        role: Role in any of the formats.
        blocks: Blocks in our form.

    Returns:
        The message.

    Raises:
        ValueError: Unknown role, or no blocks that say anything.
    """
    if role not in ROLES:
        raise ValueError(f"the role {role!r} is unknown; expected one of {sorted(ROLES)}")
    merged: list[dict[str, Any]] = []
    for block in blocks:
        if block["type"] != "text":
            merged.append(dict(block))
        elif merged and merged[-1]["type"] == "text":
            merged[-1]["text"] += block["text"]
        elif block["text"]:
            merged.append(dict(block))
    if not merged:
        raise ValueError(f"a message of the role {ROLES[role]!r} is empty")
    return {"role": ROLES[role], "content": merged}


def picture_list(source: Any) -> bool:
    """Say whether a value is a list of frame pictures, as opposed to a list of videos."""
    return (
        isinstance(source, list | tuple)
        and bool(source)
        and all(isinstance(entry, str | PathLike) for entry in source)
        and all(fspath(entry).lower().endswith(tuple(PICTURE_SUFFIXES)) for entry in source)
    )


def list_media(kind: str, value: Any) -> list[dict[str, Any]]:
    """List the blocks of a column of media.

    Args:
        kind: "video" or "image".
        value: None, one source, or a list of sources; a flat list of pictures is one video.

    Returns:
        One block per medium.

    Raises:
        ValueError: A source that is none.
    """
    if value is None or value == "" or value == []:
        return []
    if kind == "video" and picture_list(value):
        value = [value]
    entries = value if isinstance(value, list | tuple) else [value]
    return [media_block(kind, entry) for entry in entries]


def cut_media(media: Mapping[str, list[dict[str, Any]]], row: Mapping[str, Any]) -> None:
    """Give videos the `start` and `end` of their row, in place.

    Args:
        media: Blocks by kind.
        row: `start` and `end` in seconds, one for the only video, or a list with one for each.

    Raises:
        ValueError: One cut for several videos or none.
    """
    videos = media["video"]
    for name in ("start", "end"):
        value = row.get(name)
        if value is None:
            continue
        values = value if isinstance(value, list | tuple) else [value]
        if len(values) != len(videos):
            raise ValueError(f"{name}={value!r} is given for {len(videos)} videos; give one number for each video")
        for block, own in zip(videos, values, strict=True):
            add_cut(block, **{name: own})


def place_media(
    turns: Sequence[tuple[str, str]],
    media: Mapping[str, Sequence[dict[str, Any]]],
    *,
    image_is_video: bool = False,
    untagged_first: bool = True,
) -> list[dict[str, Any]]:
    """Turn texts with `<video>` and `<image>` into messages with blocks.

    Args:
        turns: Role and text of each message.
        media: Blocks by kind, in the order of their tags.
        image_is_video: Whether `<image>` stands for a video where a row has videos and no images.
        untagged_first: Whether media without any tag stand in front of the first user message.

    Returns:
        The messages. One line break behind a tag at the begin of a text belongs to the tag.

    Raises:
        ValueError: Numbers of tags and media differ, or a text is none.
    """
    for role, text in turns:
        if not isinstance(text, str):
            raise ValueError(f"what {role!r} says is {text!r:.100}, expected text")
        if "<audio>" in text:
            raise ValueError("the row has sound (<audio>), which no model here hears; leave it out")
    as_videos = image_is_video and media["video"] and not media["image"]
    found = {"video": 0, "image": 0}
    for _, text in turns:
        for tag in _TAG.findall(text):
            found["video" if as_videos else TAGS[tag]] += 1
    left = {kind: list(blocks) for kind, blocks in media.items()}
    front: list[dict[str, Any]] = []
    for kind, count in found.items():
        if count == 0 and untagged_first:
            front += left[kind]
            left[kind] = []
        elif count != len(left[kind]):
            raise ValueError(
                f"the texts have {count} <{kind}> and the row has {len(left[kind])} {kind}s; write one <{kind}> for "
                "each, at its place"
            )
    messages = []
    for role, text in turns:
        blocks = _split_text(text, left, bool(as_videos))
        if front and ROLES.get(role) == "user":
            blocks, front = [*front, *blocks], []
        messages.append(message(role, blocks))
    if front:
        raise ValueError(f"the row has {len(front)} videos or images and no user message to put them into")
    return messages


def _split_text(text: str, left: dict[str, list[dict[str, Any]]], as_videos: bool) -> list[dict[str, Any]]:
    blocks: list[dict[str, Any]] = []
    at, leading = 0, True
    for match in _TAG.finditer(text):
        leading = leading and match.start() == at
        if match.start() > at:
            blocks.append(text_block(text[at : match.start()]))
        blocks.append(left["video" if as_videos else TAGS[match[0]]].pop(0))
        at = match.end()
        if leading and text[at : at + 1] == "\n":
            at += 1
    return [*blocks, text_block(text[at:])]


def write_tags(messages: Sequence[Mapping[str, Any]], *, line_break: bool) -> tuple[list[tuple[str, str]], dict]:
    """Turn messages with blocks into texts with tags; `place_media` turns them back.

    Args:
        messages: Messages in our form.
        line_break: Whether a line break follows the tags at the begin of a text.

    Returns:
        Role and text of each message, and the blocks of the media by kind.

    Raises:
        ValueError: A text holds a tag that stands for nothing.
    """
    media: dict[str, list[dict[str, Any]]] = {"video": [], "image": []}
    turns = []
    for entry in messages:
        text, leading = "", True
        for place, block in enumerate(entry["content"]):
            if block["type"] == "text":
                if _TAG.search(block["text"]):
                    raise ValueError("a text says <video> or <image> literally, which would stand for a medium")
                # Reading takes one line break behind a leading tag away.
                if leading and place and block["text"].startswith("\n") and not line_break:
                    text += "\n"
                text, leading = text + block["text"], False
            else:
                media[block["type"]].append(block)
                text += f"<{block['type']}>" + ("\n" if leading and line_break else "")
        turns.append((entry["role"], text))
    return turns, media


def bare_source(block: Mapping[str, Any]) -> str | list[str]:
    """Give the source of a medium as the formats with tags write it.

    Args:
        block: Video or image block.

    Returns:
        Path, address, or list of frame pictures.

    Raises:
        ValueError: A loaded picture.
    """
    for key in ("path", "url", "video"):
        if block.get(key) is not None:
            return block[key]
    raise ValueError("a picture is in memory; write it to a file and give its path")


def without_nones(value: Any) -> Any:
    """Drop keys whose value is None, as tables fill them in, at every depth."""
    if isinstance(value, Mapping):
        return {key: without_nones(entry) for key, entry in value.items() if entry is not None}
    if isinstance(value, list | tuple):
        return [without_nones(entry) for entry in value]
    return value
