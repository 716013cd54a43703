"""Times and places in texts: how the formats write them, and the one form that LLaVA-ST reads.

A coordinate is a template token with its value, `<TEMP-INPUT0.300>` in a question and `<WIDTH-OUTPUT0.512>` in an
answer. LLaVA lists keep the values in `variables`, ST-Align has names and frames or pixels, ms-swift `<bbox>`.
Short forms (`<t0.3>`) are for questions that people type: in rows they are text like any other.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from longvideo.processing.llava_st.coordinate_text_llava_st import (
    COORDINATE,
    LISTS,
    find_coordinates,
    format_coordinate,
    read_coordinate,
)
from longvideo.processing.llava_st.tasks_llava_st import PHRASES

WAYS = {"user": "INPUT", "system": "INPUT", "assistant": "OUTPUT"}
VARIABLES = tuple(f"{axis}_{way}_locations" for axis in LISTS.values() for way in ("input", "output"))
# Frames that the original looks at, evenly from the first to the last of a split; tubes are taught at these. An entry
# made for a model that looks at others says so in `meta.num_frames`.
SAMPLED_FRAMES = 100
_BOX_AXES = ("WIDTH", "HEIGHT", "WIDTH", "HEIGHT")
_SPAN_NAMES = "From <s> to <e>"
_TIME = r"<TEMP-(?:INPUT|OUTPUT)[0-9.]+>"
_BOX = r"\[(?:<(?:WIDTH|HEIGHT)-(?:INPUT|OUTPUT)[0-9.]+>,?\s?){4}\]"
_SPAN = re.compile(rf"(?:{'|'.join(PHRASES)}) \{{({_TIME}),?\s?({_TIME})\}}")
_TUBE = re.compile(rf"{_TIME}:{_BOX}(?: {_TIME}:{_BOX})+|{_TIME}:{_BOX}")


def inline_variables(turns: Sequence[tuple[str, str]], variables: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Write the values of `variables` into the template tokens of the texts.

    Args:
        turns: Role and text of each message.
        variables: Up to six lists, as in the training lists of LLaVA-ST.

    Returns:
        The turns with values in their tokens.

    Raises:
        ValueError: An unknown list, or numbers of values and tokens that differ.
    """
    unknown = sorted(set(variables) - set(VARIABLES))
    if unknown:
        raise ValueError(f"variables has the unknown lists {unknown}; expected some of {list(VARIABLES)}")
    left = {name: list(values or []) for name, values in variables.items()}

    def write(match: re.Match) -> str:
        found = read_coordinate(match) if match["axis"] else None
        if found is None or found.value is not None:
            return match[0]
        if not left.get(found.list_name):
            raise ValueError(f"the texts have more {found.token} than variables['{found.list_name}'] has values")
        value = float(left[found.list_name].pop(0))
        written = f"{value:.3f}" if round(value, 3) == value else repr(value)
        return f"{found.token[:-1]}{written}>"

    filled = [(role, COORDINATE.sub(write, text)) for role, text in turns]
    spare = {name: len(values) for name, values in left.items() if values}
    if spare:
        raise ValueError(f"variables has values without a token in the texts: {spare} (list: values left over)")
    return filled


def extract_variables(turns: Sequence[tuple[str, str]]) -> tuple[list[tuple[str, str]], dict[str, list[float]] | None]:
    """Take the values of coordinates out of the texts; `inline_variables` turns them back.

    Args:
        turns: Role and text of each message.

    Returns:
        The turns with bare template tokens, and the six lists; None where there is no coordinate.
    """
    variables: dict[str, list[float]] = {name: [] for name in VARIABLES}
    is_empty = True

    def take(match: re.Match) -> str:
        nonlocal is_empty
        if not match["axis"]:
            return match[0]
        is_empty = False
        found = read_coordinate(match)
        if found.value is None:
            raise ValueError(f"the text has {found.token} without a value")
        variables[found.list_name].append(found.value)
        return found.token

    bare = [(role, COORDINATE.sub(take, text)) for role, text in turns]
    return (list(turns), None) if is_empty else (bare, variables)


def as_numbers(text: str) -> str:
    """Write coordinates as plain fractions, for models without coordinate tokens; neighbours get a comma between."""
    pieces, last = [], 0
    for match in COORDINATE.finditer(text):
        if match["axis"]:
            pieces += [", " if last and last == match.start() else text[last : match.start()]]
            pieces += [match["value"] or match[0]]
            last = match.end()
    return "".join([*pieces, text[last:]])


def fill_names(role: str, text: str, meta: Mapping[str, Any]) -> str:
    """Put coordinates in the place of the names of an ST-Align text.

    Args:
        role: Who says it.
        text: Text with names such as `<s>`, `<e>`, `<bboxes>`.
        meta: `split`, `width` and `height` in pixels, `spatial_token`, `time_token`, and `num_frames` where the model
            does not look at 100.

    Returns:
        The text with template tokens and values.

    Raises:
        ValueError: A box without area, a tube without a box at the sampled frames, or a missing field.

    Source: ST-Align data and inference/src/dataset of appletea233/LLaVA-ST.
    Differs: the release rewords "From <s> to <e>" at random; here it is "In the time range" in a question and "During
    the span of" in an answer.
    """
    way, asks = WAYS[role], role != "assistant"
    first, last = meta["split"]
    times = {name: _fraction(frame, first, last) for name, frame in (meta.get("time_token") or {}).items()}
    if _SPAN_NAMES in text and {"<s>", "<e>"} <= times.keys():
        pair = ("," if asks else "").join(format_coordinate("TEMP", times[name], way) for name in ("<s>", "<e>"))
        text = text.replace(_SPAN_NAMES, f"{PHRASES[0] if asks else PHRASES[1]} {{{pair}}}")
    for name, value in times.items():
        text = text.replace(name, format_coordinate("TEMP", value, way))
    for name, boxes in (meta.get("spatial_token") or {}).items():
        if name not in text:
            continue
        if not meta.get("width") or not meta.get("height"):
            raise ValueError("meta lacks width and height in pixels, which its boxes need")
        written = _write_tube(boxes, meta, way) if isinstance(boxes, Mapping) else _write_box(boxes, meta, way)
        text = text.replace(name, written)
    return text


def _fraction(frame: float, first: int, last: int) -> float:
    return min(max((float(frame) - first) / (last - first), 0.0), 1.0) if last > first else 0.0


def num_sampled_frames(meta: Mapping[str, Any]) -> int:
    """Say how many frames of an ST-Align entry the model looks at."""
    return int(meta.get("num_frames") or SAMPLED_FRAMES)


def has_unseen_boxes(meta: Mapping[str, Any]) -> bool:
    """Say whether a tube of an ST-Align entry has boxes at frames that the model does not look at."""
    sampled = _sampled_frames(meta)
    tubes = [boxes for boxes in (meta.get("spatial_token") or {}).values() if isinstance(boxes, Mapping)]
    return any(boxes[frame] is not None and int(frame) not in sampled for boxes in tubes for frame in boxes)


def _sampled_frames(meta: Mapping[str, Any]) -> set[int]:
    (first, last), count = meta["split"], num_sampled_frames(meta)
    return {first + round(at / max(count - 1, 1) * (last - first)) for at in range(count)}


def _write_tube(boxes: Mapping[str, Any], meta: Mapping[str, Any], way: str) -> str:
    first, last = meta["split"]
    sampled = _sampled_frames(meta)
    frames = sorted(int(frame) for frame in boxes if boxes[frame] is not None and int(frame) in sampled)
    if not frames:
        raise ValueError(
            f"no box of its tube lies at one of the {num_sampled_frames(meta)} sampled frames of {[first, last]}"
        )
    return " ".join(
        f"{format_coordinate('TEMP', _fraction(frame, first, last), way)}:{_write_box(boxes[str(frame)], meta, way)}"
        for frame in frames
    )


def _write_box(box: Sequence[float], meta: Mapping[str, Any], way: str) -> str:
    x, y, width, height = (float(value) for value in box)
    return write_fractions(
        [x / meta["width"], y / meta["height"], (x + width) / meta["width"], (y + height) / meta["height"]], way
    )


def write_fractions(box: Sequence[float], way: str) -> str:
    """Write a box or a point given as fractions.

    Args:
        box: Left, top, right, bottom (or left, top), divided by width and height.
        way: "INPUT" or "OUTPUT".

    Returns:
        For instance `[<WIDTH-OUTPUT0.100><HEIGHT-OUTPUT0.200>...]`, with commas in a question; what lies outside of
        the frame is clipped, since annotations may reach beyond it.

    Raises:
        ValueError: Not two or four numbers, or a box without area.
    """
    if len(box) not in (2, 4):
        raise ValueError(f"a box has {len(box)} numbers, expected 4 (or 2 for a point)")
    inside = [min(max(float(value), 0.0), 1.0) for value in box]
    if len(inside) == 4 and not (inside[0] < inside[2] and inside[1] < inside[3]):
        raise ValueError(f"the box {[round(value, 4) for value in inside]} (fractions) has no area")
    entries = [format_coordinate(axis, value, way) for axis, value in zip(_BOX_AXES, inside, strict=False)]
    return f"[{(',' if way == 'INPUT' else '').join(entries)}]"


def fill_objects(turns: Sequence[tuple[str, str]], objects: Mapping[str, Any], sizes: Any) -> list[tuple[str, str]]:
    """Put names and boxes in the place of `<ref-object>` and `<bbox>` of an ms-swift row.

    Args:
        turns: Role and text of each message.
        objects: `ref`, `bbox` ([x, y] or [x1, y1, x2, y2]), `bbox_type` ("real" pixels, the default, or "norm1"),
            `image_id` (which medium each box belongs to).
        sizes: Function from the index of a medium to its (width, height) in pixels; called for "real" only.

    Returns:
        The turns with names and template tokens.

    Raises:
        ValueError: Numbers of tags and entries that differ, or an unknown type.
    """
    refs, boxes = list(objects.get("ref") or []), list(objects.get("bbox") or [])
    kind, owners = objects.get("bbox_type") or "real", list(objects.get("image_id") or [])
    if kind not in ("real", "norm1"):
        raise ValueError(f"objects.bbox_type={kind!r} is unknown; expected 'real' or 'norm1'")
    if "bbox" in objects and owners and len(owners) != len(boxes):
        raise ValueError(f"objects has {len(owners)} image_id for {len(boxes)} bbox; give one for each")
    whole = "".join(text for _, text in turns)
    for tag, entries in (("<ref-object>", refs), ("<bbox>", boxes)):
        if whole.count(tag) != len(entries):
            raise ValueError(f"the texts have {whole.count(tag)} {tag} and objects has {len(entries)} entries for it")
    place = 0
    filled = []
    for role, text in turns:
        for ref in refs[: text.count("<ref-object>")]:
            text = text.replace("<ref-object>", str(ref), 1)
            refs = refs[1:]
        for _ in range(text.count("<bbox>")):
            width, height = (1, 1) if kind == "norm1" else sizes(owners[place] if owners else 0)
            fractions = [value / (height if at % 2 else width) for at, value in enumerate(boxes[place])]
            text = text.replace("<bbox>", write_fractions(fractions, WAYS.get(role, "INPUT")), 1)
            place += 1
        filled.append((role, text))
    return filled


def take_names(turns: Sequence[tuple[str, str]], meta: dict[str, Any]) -> list[tuple[str, str]]:
    """Put ST-Align names in the place of coordinates; `fill_names` turns them back.

    Args:
        turns: Role and text of each message, coordinates as template tokens with values.
        meta: `split`, and for boxes `width` and `height`; `spatial_token` and `time_token` are added in place.

    Returns:
        The turns with names.

    Raises:
        ValueError: Boxes without a size, or a coordinate that no frame or pixel gives back.
    """
    meta["spatial_token"], meta["time_token"] = {}, {}
    namer = _Namer(meta)
    named = []
    for role, text in turns:
        phrase = f"{PHRASES[0] if role != 'assistant' else PHRASES[1]} "
        taken = _TUBE.sub(namer.tube, text) if role == "assistant" else text
        taken = re.sub(_BOX, namer.box, taken)
        taken = _SPAN.sub(lambda match, phrase=phrase: namer.span(match, phrase), taken)
        named.append((role, re.sub(_TIME, namer.time, taken)))
    for (role, text), (_, original) in zip(named, turns, strict=True):
        if fill_names(role, text, meta) != original:
            raise ValueError(
                "its coordinates come back otherwise from frames and pixels, so ST-Align would shift them"
            )
    return named


class _Namer:
    """Gives names to the coordinates of a row."""

    def __init__(self, meta: dict[str, Any]) -> None:
        self.meta = meta
        self.first, self.last = meta["split"]

    def _values(self, text: str) -> list[float]:
        return [entry.value for entry in find_coordinates(text)]

    def _frame(self, value: float) -> int:
        return self.first + round(value * (self.last - self.first))

    def _corner(self, values: Iterable[float]) -> list[float]:
        if not self.meta.get("width") or not self.meta.get("height"):
            raise ValueError("its boxes need the width and height of the video in pixels, which the row lacks")
        x1, y1, x2, y2 = values
        width, height = self.meta["width"], self.meta["height"]
        ends = (x1 * width, y1 * height, (x2 - x1) * width, (y2 - y1) * height)
        return [round(value, 4) for value in ends]

    def _add(self, kind: str, stem: str, value: Any) -> str:
        known = self.meta[kind]
        for name, old in known.items():
            if old == value:
                return name
        names = {"bboxes": "<bboxes>", "s": "<s>", "e": "<e>"}
        name = names.get(stem, f"<{stem}_{len(known)}>")
        name = f"<{stem}_{len(known)}>" if name in known else name
        known[name] = value
        return name

    def tube(self, match: re.Match) -> str:
        boxes = {}
        for entry in re.finditer(f"({_TIME}):({_BOX})", match[0]):
            boxes[str(self._frame(self._values(entry[1])[0]))] = self._corner(self._values(entry[2]))
        return self._add("spatial_token", "bboxes", boxes)

    def box(self, match: re.Match) -> str:
        return self._add("spatial_token", "region", self._corner(self._values(match[0])))

    def span(self, match: re.Match, phrase: str) -> str:
        # The name of a span stands for one pair of times; another pair keeps its words.
        pair = {"<s>": self._frame(self._values(match[1])[0]), "<e>": self._frame(self._values(match[2])[0])}
        known = self.meta["time_token"]
        if not match[0].startswith(phrase + "{") or any(
            known.get(name, value) != value for name, value in pair.items()
        ):
            return match[0]
        known.update(pair)
        return _SPAN_NAMES

    def time(self, match: re.Match) -> str:
        stem = "time" if {"<s>", "<e>"} <= self.meta["time_token"].keys() else "s"
        stem = "e" if stem == "s" and "<s>" in self.meta["time_token"] else stem
        return self._add("time_token", stem, self._frame(self._values(match[0])[0]))
