"""Rows in our form (see `blocks`), written as rows of the five formats.

A writer gives the row and the names of what it had to leave out without making the row wrong; what would make it wrong
(a cut, a refused answer, a picture in memory) is an error.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from longvideo.trainers.data.blocks import READING_OPTIONS, REFERENCE_COLUMNS, bare_source, picture_list, write_tags
from longvideo.trainers.data.coordinates import extract_variables, take_names
from longvideo.trainers.data.media import media_blocks

Written = tuple[dict[str, Any], list[str]]
_SPEAKERS = {"user": "human", "assistant": "gpt", "system": "system"}


def write_llava(row: Mapping[str, Any]) -> Written:
    """Write a row of a LLaVA list.

    Args:
        row: Row in our form.

    Returns:
        The row, and what was left out.

    Raises:
        ValueError: It cannot be expressed.
    """
    _refuse_pairs(row, "LLaVA lists")
    turns, media = write_tags(row["messages"], line_break=True)
    turns, variables = extract_variables(turns)
    written: dict[str, Any] = {**_identity(row)}
    meta = dict(row.get("meta") or {})
    for kind, blocks in media.items():
        if blocks:
            sources = [bare_source(block) for block in blocks]
            is_single = len(sources) == 1 and (isinstance(sources[0], str) or picture_list(sources[0]))
            written[kind] = sources[0] if is_single else sources
    cuts = [block for block in media["video"] if _cut_of(block)]
    if cuts and len(media["video"]) > 1:
        raise ValueError("several videos have a cut, and LLaVA rows have one start and end; use the format trl")
    for block in cuts:
        written.update({key: value for key, value in _cut_of(block).items() if key != "split"})
        meta.update({key: value for key, value in _cut_of(block).items() if key == "split"})
    written["conversations"] = [{"from": _SPEAKERS[role], "value": text} for role, text in turns]
    if variables is not None:
        written["variables"] = variables
    if meta:
        written["meta"] = meta
    return written, _left_out(row, meta=False)


def write_st_align(row: Mapping[str, Any]) -> Written:
    """Write an entry of ST-Align.

    Args:
        row: Row in our form, about one video file with a `split`.

    Returns:
        The entry, and what was left out.

    Raises:
        ValueError: It cannot be expressed.
    """
    _refuse_pairs(row, "ST-Align")
    turns, media = write_tags(row["messages"], line_break=True)
    videos = media["video"]
    if len(videos) != 1 or media["image"] or not isinstance(bare_source(videos[0]), str):
        raise ValueError("ST-Align rows are about one video file; this row has other media")
    if "start" in videos[0] or "end" in videos[0]:
        raise ValueError("ST-Align counts in frames (meta.split), and this video is cut in seconds")
    if "split" not in videos[0]:
        raise ValueError("ST-Align needs the first and last frame (meta.split), which this row does not know")
    if turns[0][0] == "system":
        raise ValueError("ST-Align rows have no system message")
    meta = {**(row.get("meta") or {}), "split": videos[0]["split"]}
    turns = take_names(turns, meta)
    written = {
        **_identity(row),
        "video_path": bare_source(videos[0]),
        "meta": meta,
        "conversations": [{"from": _SPEAKERS[role], "value": text} for role, text in turns],
    }
    return written, _left_out(row, meta=False)


def write_trl(row: Mapping[str, Any]) -> Written:
    """Write a row of TRL, which is our own form; images alone go into the column that TRL reads.

    Args:
        row: Row in our form.

    Returns:
        The row, and what was left out.

    Raises:
        ValueError: It cannot be expressed.
    """
    lists = {name: row[name] for name in ("messages", "prompt", "chosen", "rejected") if name in row}
    images = []
    written: dict[str, Any] = {**_identity(row)}
    for name, messages in lists.items():
        written[name] = []
        for entry in messages:
            content = []
            for block in entry["content"]:
                if block["type"] == "image":
                    images.append(bare_source(block))
                    block = {"type": "image"}
                content.append(dict(block))
            written[name].append({"role": entry["role"], "content": content})
    if images:
        written["images"] = images
    if row.get("meta"):
        written["meta"] = row["meta"]
    written |= {name: row[name] for name in REFERENCE_COLUMNS if name in row}
    return written, []


def write_ms_swift(row: Mapping[str, Any]) -> Written:
    """Write a row of ms-swift.

    Args:
        row: Row in our form.

    Returns:
        The row, and what was left out.

    Raises:
        ValueError: It cannot be expressed.
    """
    _refuse_cuts(row, "ms-swift")
    if "messages" in row:
        turns, media = write_tags(row["messages"], line_break=False)
        return {**_identity(row), **_tagged(turns, media)}, _left_out(row)
    if not len(row["chosen"]) == len(row["rejected"]) == 1:
        raise ValueError("its answers have several messages; ms-swift pairs differ in the last one only; use trl")
    turns, media = write_tags([*row["prompt"], *row["chosen"]], line_break=False)
    refused = _text_of(row["rejected"][0])
    return {**_identity(row), **_tagged(turns, media), "rejected_response": refused}, _left_out(row)


def write_sharegpt(row: Mapping[str, Any]) -> Written:
    """Write a row of LLaMA-Factory's sharegpt.

    Args:
        row: Row in our form.

    Returns:
        The row, and what was left out.

    Raises:
        ValueError: It cannot be expressed.
    """
    _refuse_cuts(row, "LLaMA-Factory's sharegpt")
    turns, media = write_tags(row.get("messages") or row["prompt"], line_break=False)
    written = {**_identity(row), **_tagged(turns, media)}
    if "messages" not in row:
        for name in ("chosen", "rejected"):
            if len(row[name]) != 1:
                raise ValueError(f"{name} has {len(row[name])} messages; LLaMA-Factory's sharegpt has one")
            written[name] = {"role": "assistant", "content": _text_of(row[name][0])}
    return written, _left_out(row)


def _identity(row: Mapping[str, Any]) -> dict[str, Any]:
    return {} if row.get("id") is None else {"id": row["id"]}


def _tagged(turns: Sequence[tuple[str, str]], media: Mapping[str, Sequence[dict[str, Any]]]) -> dict[str, Any]:
    columns = {f"{kind}s": [bare_source(block) for block in blocks] for kind, blocks in media.items() if blocks}
    return {"messages": [{"role": role, "content": text} for role, text in turns], **columns}


def _text_of(entry: Mapping[str, Any]) -> str:
    (turn,), _ = write_tags([entry], line_break=False)
    return turn[1]


def _cut_of(block: Mapping[str, Any]) -> dict[str, Any]:
    return {key: block[key] for key in ("start", "end", "split") if key in block}


def _refuse_pairs(row: Mapping[str, Any], where: str) -> None:
    if "messages" not in row:
        raise ValueError(f"{where} have no place for a refused answer; use trl, ms_swift or sharegpt")


def _refuse_cuts(row: Mapping[str, Any], where: str) -> None:
    for block in media_blocks(row):
        if _cut_of(block):
            raise ValueError(f"{where} has no place for the cut {_cut_of(block)} of a video; use trl or llava")


def _left_out(row: Mapping[str, Any], *, meta: bool = True) -> list[str]:
    options = {key for block in media_blocks(row) for key in READING_OPTIONS if key in block}
    columns = [f"column {name!r}" for name in REFERENCE_COLUMNS if name in row]
    return [f"{key} of a video" for key in sorted(options)] + (["meta"] if meta and row.get("meta") else []) + columns
