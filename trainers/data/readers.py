"""One row of each of the five formats, brought into our form (see `blocks`)."""

from collections.abc import Mapping, Sequence
from typing import Any

from longvideo.trainers.data.blocks import (
    REFERENCE_COLUMNS,
    ROLES,
    add_cut,
    cut_media,
    list_media,
    media_block,
    media_from_block,
    message,
    place_media,
    text_block,
)
from longvideo.trainers.data.coordinates import (
    fill_names,
    fill_objects,
    has_unseen_boxes,
    inline_variables,
    num_sampled_frames,
)
from longvideo.trainers.data.media import picture_size

# LLaMA-Factory's own defaults, which a dataset_info.json replaces.
SHAREGPT_COLUMNS = {
    "messages": "conversations",
    "videos": "videos",
    "images": "images",
    "chosen": "chosen",
    "rejected": "rejected",
    "system": "system",
    "tools": "tools",
    "audios": "audios",
    "kto_tag": "kto_tag",
}
SHAREGPT_TAGS = {
    "role_tag": "from",
    "content_tag": "value",
    "user_tag": "human",
    "assistant_tag": "gpt",
    "system_tag": "system",
    "observation_tag": "observation",
    "function_tag": "function_call",
}


def read_llava(row: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Read a row of a LLaVA list: `{id, video | image, conversations: [{from, value}], start, end}`.

    Args:
        row: The row; `variables` and `meta.split` of LLaVA-ST's training lists are known too.
        settings: Not used.

    Returns:
        The row in our form.

    Raises:
        ValueError: It cannot be read.
    """
    turns = _turns(row.get("conversations"), "conversations", "from", "value")
    if row.get("system"):
        turns.insert(0, ("system", row["system"]))
    media = {kind: list_media(kind, row.get(kind)) for kind in ("video", "image")}
    cut_media(media, row)
    meta = dict(row.get("meta") or {})
    split = meta.pop("split", None)
    if split is not None:
        if len(media["video"]) != 1:
            raise ValueError(f"meta.split is given for {len(media['video'])} videos; it belongs to a row with one")
        add_cut(media["video"][0], split=split)
    if row.get("variables"):
        turns = inline_variables(turns, row["variables"])
    messages = place_media(turns, media, image_is_video=True)
    return _complete(row, {"messages": messages}, meta=meta)


def read_st_align(row: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Read an entry of ST-Align: `{video_path, conversations, meta: {width, height, split, ...}}`.

    Args:
        row: The row.
        settings: `num_frames`: frames that the model looks at, evenly from the first to the last of a split, in place
            of `meta.num_frames`, of which 100 is the default; tubes are taught at these. `lost`: takes words for what
            is left out.

    Returns:
        The row in our form, its names replaced by coordinates.

    Raises:
        ValueError: It cannot be read.
    """
    turns = _turns(row.get("conversations"), "conversations", "from", "value")
    meta = row.get("meta")
    if not isinstance(meta, Mapping) or meta.get("split") is None:
        raise ValueError("it has no meta.split [first, last frame], which its times are counted in")
    video = add_cut(media_block("video", row.get("video_path")), split=meta["split"])
    if settings.get("num_frames"):
        meta = {**meta, "num_frames": settings["num_frames"]}
    turns = [(role, fill_names(ROLES.get(role, "user"), text, meta)) for role, text in turns]
    if has_unseen_boxes(meta) and settings.get("lost"):
        settings["lost"]([f"boxes of tubes between the {num_sampled_frames(meta)} frames that are looked at"])
    messages = place_media(turns, {"video": [video], "image": []}, image_is_video=True)
    kept = {key: meta[key] for key in ("width", "height", "fps", "num_frames") if meta.get(key) is not None}
    return _complete(row, {"messages": messages}, meta=kept)


def read_trl(row: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Read a row of TRL: `messages`, `prompt` + `completion`, or `prompt` + `chosen` + `rejected`, and our own rows.

    Args:
        row: The row; `image` / `images`, and here also `video` / `videos`, hold what blocks without a source take, or
            what stands in front of the first user message; `system` stands in front of all messages.
        settings: Not used.

    Returns:
        The row in our form.

    Raises:
        ValueError: It cannot be read, or it is an answer that was judged bad (`label` false).
    """
    _check_label(row)
    media = {
        kind: [*list_media(kind, row.get(kind)), *list_media(kind, row.get(f"{kind}s"))] for kind in ("video", "image")
    }
    cut_media(media, row)
    if row.get("messages") is not None:
        messages = _read_messages(_with_system(row["messages"], row), media)
        return _complete(row, {"messages": messages}, meta=row.get("meta"))
    lists = {}
    for name in ("prompt", "completion", "chosen", "rejected"):
        role = "user" if name == "prompt" else "assistant"
        value = row.get(name)
        if value is not None:
            lists[name] = [{"role": role, "content": value}] if isinstance(value, str) else list(value)
    if "prompt" in lists and "completion" in lists:
        both = _with_system(lists["prompt"] + lists["completion"], row)
        return _complete(row, {"messages": _read_messages(both, media)})
    if not {"chosen", "rejected"} <= lists.keys():
        raise ValueError(
            f"it has {sorted(lists) or 'no messages'}; expected messages, prompt + completion, or chosen + rejected"
        )
    if "prompt" not in lists:
        # TRL's implicit prompt: what both conversations begin with.
        both = list(zip(lists["chosen"], lists["rejected"], strict=False))
        common = next((place for place, (one, other) in enumerate(both) if one != other), max(len(both) - 1, 0))
        lists["prompt"] = lists["chosen"][:common]
        lists = {"prompt": lists["prompt"], **{name: lists[name][common:] for name in ("chosen", "rejected")}}
    answers = {name: _read_messages(lists[name], {"video": [], "image": []}) for name in ("chosen", "rejected")}
    return _complete(row, {"prompt": _read_messages(_with_system(lists["prompt"], row), media), **answers})


def read_ms_swift(row: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Read a row of ms-swift: `{messages, videos, images, objects, rejected_response | rejected_messages, label}`.

    Args:
        row: The row; `video` and `image` are other names for `videos` and `images`, and `system` stands in front of
            all messages.
        settings: `root`: function from a path of the row to where it lies.

    Returns:
        The row in our form.

    Raises:
        ValueError: It cannot be read, or it is an answer that was judged bad (`label` false).
    """
    _refuse(row, ("audios", "audio", "tools"))
    _check_label(row)
    media = {
        kind: [*list_media(kind, row.get(kind)), *list_media(kind, row.get(f"{kind}s"))] for kind in ("video", "image")
    }
    cut_media(media, row)
    turns = _with_system(row.get("messages"), row)
    if row.get("objects"):
        visuals = [*media["image"], *media["video"]]

        def size_of(index: int) -> tuple[int, int]:
            if not 0 <= index < len(visuals):
                raise ValueError(f"objects name the medium {index}, and the row has {len(visuals)}")
            return picture_size(visuals[index], settings.get("root"))

        turns = [
            {"role": role, "content": text}
            for role, text in fill_objects(_turns(turns, "messages", "role", "content"), row["objects"], size_of)
        ]
    sources = {kind: [dict(block) for block in blocks] for kind, blocks in media.items()}
    messages = _read_messages(turns, media)
    if row.get("rejected_response") is None and row.get("rejected_messages") is None:
        return _complete(row, {"messages": messages})
    prompt, chosen = _split_answer(messages)
    if row.get("rejected_response") is not None:
        refused = row["rejected_response"]
        if not isinstance(refused, str):
            raise ValueError(f"rejected_response is {refused!r:.100}, expected text")
        return _complete(
            row, {"prompt": prompt, "chosen": chosen, "rejected": [message("assistant", [text_block(refused)])]}
        )
    for kind in ("video", "image"):
        own = list_media(kind, row.get(f"rejected_{kind}s"))
        if own and own != sources[kind]:
            raise ValueError(f"rejected_{kind}s differ from {kind}s; both answers must be about the same {kind}s")
    other, rejected = _split_answer(_read_messages(_with_system(row["rejected_messages"], row), sources))
    if other != prompt:
        raise ValueError("rejected_messages begin with another question than messages; both must share it")
    return _complete(row, {"prompt": prompt, "chosen": chosen, "rejected": rejected})


def read_sharegpt(row: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Read a row of LLaMA-Factory's sharegpt: `messages` or `conversations`, `videos`, `images`, `chosen`, `rejected`.

    Args:
        row: The row.
        settings: `columns` and `tags` of its entry in dataset_info.json, if there is one.

    Returns:
        The row in our form.

    Raises:
        ValueError: It cannot be read.
    """
    columns = {**SHAREGPT_COLUMNS, **(settings.get("columns") or {})}
    tags = {**SHAREGPT_TAGS, **(settings.get("tags") or {})}
    if not settings.get("columns") and row.get("messages") is not None:
        columns["messages"] = "messages"
    _refuse(row, (columns["audios"], columns["tools"]))
    if row.get(columns["kto_tag"]) is False:
        raise ValueError(f"its {columns['kto_tag']} is false: the answer was judged bad; leave the row out")
    roles = {tags["user_tag"]: "user", tags["assistant_tag"]: "assistant", tags["system_tag"]: "system"}

    def read(entries: Any, name: str) -> list[tuple[str, str]]:
        keys = (tags["role_tag"], tags["content_tag"])
        # Messages in OpenAI's words need no entry in dataset_info.json to be understood.
        if not settings.get("tags") and isinstance(entries, list) and entries and "role" in dict(entries[0]):
            keys = ("role", "content")
        return [(roles.get(role, role), text) for role, text in _turns(entries, name, *keys)]

    turns = read(row.get(columns["messages"]), columns["messages"])
    if row.get(columns["system"]):
        turns = [("system", row[columns["system"]]), *[turn for turn in turns if turn[0] != "system"]]
    media = {kind: list_media(kind, row.get(columns[f"{kind}s"])) for kind in ("video", "image")}
    cut_media(media, row)
    messages = place_media(turns, media, untagged_first=False)
    chosen, rejected = (row.get(columns[name]) for name in ("chosen", "rejected"))
    if (chosen is None) != (rejected is None):
        raise ValueError("it has one of chosen and rejected; a preference row needs both")
    if chosen is None:
        return _complete(row, {"messages": messages})
    answers = {}
    for name, value in (("chosen", chosen), ("rejected", rejected)):
        own = [("assistant", value)] if isinstance(value, str) else read([value], name)
        answers[name] = place_media(own, {"video": [], "image": []})
    return _complete(row, {"prompt": messages, **answers})


def _check_label(row: Mapping[str, Any]) -> None:
    if row.get("label") is False:
        raise ValueError("its label is false: the answer was judged bad and cannot be taught; leave the row out")
    if row.get("label") not in (None, True):
        raise ValueError(f"its label is {row['label']!r}, for classification or regression, which is not taught here")


def _with_system(entries: Any, row: Mapping[str, Any]) -> Any:
    """Put the column `system` in front of messages, and refuse what they say of single turns that cannot be heeded."""
    if not isinstance(entries, list | tuple):
        return entries
    for place, entry in enumerate(entries):
        if isinstance(entry, Mapping) and entry.get("role") == "assistant" and entry.get("loss") in (False, 0):
            raise ValueError(
                f"message {place} has loss false, and all answers of a row are taught here; end the row before it, or "
                "leave the row out"
            )
    if not row.get("system"):
        return entries
    front = {"role": "system", "content": row["system"]}
    present = [entry for entry in entries if isinstance(entry, Mapping) and entry.get("role") == "system"]
    if present and present != [front]:
        raise ValueError("it has the column `system` and another system message; give one of them")
    return list(entries) if present else [front, *entries]


def _turns(entries: Any, name: str, role_key: str, text_key: str) -> list[tuple[str, str]]:
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"it has no `{name}`: expected a list of {{{role_key!r}: ..., {text_key!r}: ...}}")
    turns = []
    for place, entry in enumerate(entries):
        if not isinstance(entry, Mapping) or not isinstance(entry.get(text_key), str) or not entry.get(role_key):
            raise ValueError(f"{name}[{place}] is {entry!r:.100}; expected {{{role_key!r}: ..., {text_key!r}: text}}")
        turns.append((entry[role_key], entry[text_key]))
    return turns


def _read_messages(entries: Any, media: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Read messages whose content is text or blocks; media without a place take the row's columns."""
    if not isinstance(entries, list | tuple) or not entries:
        raise ValueError("it has no messages: expected a list of {'role': ..., 'content': text or blocks}")
    for place, entry in enumerate(entries):
        if not isinstance(entry, Mapping) or entry.get("role") is None or entry.get("content") is None:
            raise ValueError(f"message {place} is {entry!r:.100}; expected {{'role': ..., 'content': ...}}")
    if all(isinstance(entry["content"], str) for entry in entries):
        return place_media([(entry["role"], entry["content"]) for entry in entries], media)
    left = {kind: list(blocks) for kind, blocks in media.items()}
    messages = []
    for entry in entries:
        content = entry["content"]
        blocks = [text_block(content)] if isinstance(content, str) else [_read_block(block, left) for block in content]
        messages.append(message(entry["role"], blocks))
    front = [block for kind in ("video", "image") for block in left[kind]]
    if front and any(block["type"] != "text" for entry in messages for block in entry["content"]):
        raise ValueError(f"it has {len(front)} videos or images that no block takes; write one block for each")
    for entry in messages:
        if front and entry["role"] == "user":
            entry["content"], front = [*front, *entry["content"]], []
    if front:
        raise ValueError("it has videos or images and no user message to put them into")
    return messages


def _read_block(block: Any, left: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    if isinstance(block, str):
        return text_block(block)
    kind = block.get("type") if isinstance(block, Mapping) else None
    if kind == "text" and isinstance(block.get("text"), str):
        return text_block(block["text"])
    if kind in ("image_url", "video_url") and isinstance(block.get(kind), Mapping):
        block, kind = {"type": kind[:5], "url": block[kind].get("url")}, kind[:5]
    if kind not in left:
        raise ValueError(f"a block is {block!r:.100}; expected the type 'text', 'video' or 'image'")
    complete = media_from_block(block)
    if any(key in complete for key in ("path", "url", "video", "image")):
        return complete
    if not left[kind]:
        raise ValueError(f"a {kind} block has no source, and the row has no further entry in `{kind}s` for it")
    return {**left[kind].pop(0), **complete}


def _split_answer(messages: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise ValueError("a preference row must end with what the assistant says, behind a question")
    return list(messages[:-1]), [messages[-1]]


def _refuse(row: Mapping[str, Any], names: Sequence[str]) -> None:
    for name in names:
        if row.get(name):
            raise ValueError(f"it has `{name}`, which no model here can use; leave the row out")


def _complete(
    row: Mapping[str, Any], lists: dict[str, list[dict[str, Any]]], *, meta: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Check the messages and put the row together."""
    if "messages" in lists and not any(entry["role"] == "assistant" for entry in lists["messages"]):
        raise ValueError("it has no answer: one message must be the assistant's")
    for name in ("messages", "prompt"):
        if lists.get(name) and lists[name][0]["role"] == "assistant":
            raise ValueError("it begins with what the assistant says; a question (or a system message) comes first")
    for name in ("chosen", "rejected"):
        for entry in lists.get(name, ()):
            if entry["role"] != "assistant" and entry is lists[name][-1]:
                raise ValueError(f"{name} must end with what the assistant says, not the {entry['role']}")
            if any(block["type"] != "text" for block in entry["content"]):
                raise ValueError(f"{name} has a video or an image; these belong into the question")
        if lists.get(name) == []:
            raise ValueError(f"{name} is empty")
    if "prompt" in lists and not any(entry["role"] == "user" for entry in lists["prompt"]):
        raise ValueError("a preference row has no question that both answers share")
    if "prompt" in lists and lists["prompt"][-1]["role"] == "assistant":
        raise ValueError("its prompt ends with what the assistant says; both answers must follow a question")
    identity = {} if row.get("id") is None else {"id": str(row["id"])}
    if "prompt" in lists:
        identity |= {name: float(row[name]) for name in REFERENCE_COLUMNS if row.get(name) is not None}
    return {**identity, **lists, **({"meta": dict(meta)} if isinstance(meta, Mapping) and meta else {})}
