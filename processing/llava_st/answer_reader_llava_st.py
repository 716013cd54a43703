"""The grammar of LLaVA-ST's answers: a text becomes a list of spans, boxes and timed boxes in fractions.

Every character belongs to a structure that was read, to one that is reported as "bad" with the reason, or to prose.
`grounding_llava_st.parse_grounding` turns fractions into seconds and pixels.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

_LEXEME = re.compile(
    r"<(?P<axis>TEMP|WIDTH|HEIGHT)-(?P<role>INPUT|OUTPUT|)(?P<value>[^<>\s]*)>"
    r"|<(?P<broken>TEMP|WIDTH|HEIGHT)\b[^\s<>{}\[\],:]*"
    r"|<(?P<short>[twh])(?P<short_value>[0-9.]+)>"
    r"|(?P<number>[0-9]++(?:\.[0-9]++)?+)(?!\w)"
    r"|(?P<mark>[{}\[\],:])"
    r"|(?P<word>[^\s<{}\[\],:]+|<)"
)
_AXIS_OF = {"t": "TEMP", "w": "WIDTH", "h": "HEIGHT"}
_SPAN_AXES = ("TEMP", "TEMP")
_BOX_AXES = ("WIDTH", "HEIGHT", "WIDTH", "HEIGHT")
_ENCLOSED = {"{": ("}", "span", _SPAN_AXES), "[": ("]", "box", _BOX_AXES)}
_COORDINATES = ("TEMP", "WIDTH", "HEIGHT")
_MARKS = ("{", "}", "[", "]")


@dataclass(frozen=True)
class Found:
    """One structure of an answer.

    `kind` is "span" (start, end), "box" (x1, y1, x2, y2), "entry" (time, box), "begin" or "end" (a time after "Starts
    in" or "Ends in"), all in fractions, or "bad" (the reason). `start` and `end` are its place in the text.
    """

    kind: str
    value: Any
    start: int
    end: int


@dataclass(frozen=True)
class _Atom:
    """One coordinate, number, mark or word; `value` is a fraction, `problem` says why there is none."""

    kind: str
    text: str
    start: int
    end: int
    value: float | None = None
    problem: str | None = None


def read_answer(text: str, *, num_temporal: int, num_spatial: int) -> list[Found]:
    """Find every structure of an answer.

    Args:
        text: The answer with its coordinate tokens.
        num_temporal: Temporal tokens of the model.
        num_spatial: Spatial tokens of the model on each axis.

    Returns:
        The structures in the order of the text; none overlap.
    """
    atoms = list(_atoms(text, num_temporal, num_spatial))
    found, i = [], 0
    while i < len(atoms):
        item, i = _structure(atoms, i)
        if item is not None:
            found.append(item)
    return found


def _atoms(text: str, num_temporal: int, num_spatial: int) -> Iterator[_Atom]:
    for match in _LEXEME.finditer(text):
        place = (match[0], match.start(), match.end())
        if match["mark"] or match["word"]:
            yield _Atom(match["mark"] or "word", *place)
        elif match["broken"]:
            yield _Atom(match["broken"], *place, None, f"{match[0][:24]!r} is cut off")
        elif match["number"]:
            yield _Atom("number", *place, *_fraction(match["number"]))
        elif match["axis"] and not match["role"]:
            yield _Atom(match["axis"], *place, *_discrete(match["value"], match["axis"], num_temporal, num_spatial))
        elif match["axis"]:
            yield _Atom(match["axis"], *place, *_fraction(match["value"]))
        else:
            yield _Atom(_AXIS_OF[match["short"]], *place, *_fraction(match["short_value"]))


def _discrete(written: str, axis: str, num_temporal: int, num_spatial: int) -> tuple[float | None, str | None]:
    num_tokens = num_temporal if axis == "TEMP" else num_spatial
    # Nine digits are far beyond any table; Python refuses to read thousands of them.
    if not re.fullmatch(r"[0-9]{1,9}", written):
        return None, f"{written[:12]!r} is not the number of a coordinate token"
    if int(written) >= num_tokens:
        return None, f"<{axis}-{written}> is beyond the last token <{axis}-{num_tokens - 1:03d}>"
    return int(written) / (num_tokens - 1), None


def _fraction(written: str) -> tuple[float | None, str | None]:
    if not written:
        return None, "a coordinate has no value"
    if not re.fullmatch(r"[0-9]+(\.[0-9]+)?", written) or float(written) > 1:
        return None, f"{written[:12]!r} is not a number between 0 and 1"
    return float(written), None


def _structure(atoms: Sequence[_Atom], i: int) -> tuple[Found | None, int]:
    """The structure that begins at an atom, or None for prose; and where reading goes on."""
    atom = atoms[i]
    if atom.kind in _ENCLOSED:
        return _enclosed(atoms, i)
    if atom.kind in ("}", "]"):
        return _bad(atoms, i, i + 1, f"{atom.kind!r} closes nothing")
    colon = _colon_after(atoms, i)
    # A number in front of a colon is a clock or a ratio in prose, unless a box follows.
    if colon is not None and (atom.kind == "TEMP" or (atom.kind == "number" and _kind(atoms, colon + 1) == "[")):
        return _entry(atoms, i, colon + 1)
    if atom.kind in _COORDINATES:
        stop = i + 1
        while _kind(atoms, stop) in _COORDINATES and _colon_after(atoms, stop) is None:
            stop += 1
        problems = [each.problem for each in atoms[i:stop] if each.problem]
        return _bad(atoms, i, stop, problems[0] if problems else "coordinates outside braces and brackets")
    return _phrase(atoms, i)


def _phrase(atoms: Sequence[_Atom], i: int) -> tuple[Found | None, int]:
    """ "Starts in T" and "Ends in T", else prose."""
    name = {"starts": "begin", "ends": "end"}.get(atoms[i].text.lower())
    if name is None or i + 2 >= len(atoms) or atoms[i + 1].text.lower() != "in":
        return None, i + 1
    time = atoms[i + 2]
    # A whole number is prose ("ends in 5 minutes"): the released conversion always writes a fraction.
    is_time = time.kind == "TEMP" or (time.kind == "number" and "." in time.text)
    if not is_time or _colon_after(atoms, i + 2) is not None:
        return None, i + 1
    if time.problem:
        return _bad(atoms, i, i + 3, time.problem)
    return Found(name, time.value, atoms[i].start, time.end), i + 3


def _enclosed(atoms: Sequence[_Atom], i: int) -> tuple[Found, int]:
    """A span in braces or a box in brackets."""
    closing, name, axes = _ENCLOSED[atoms[i].kind]
    close = i + 1
    while close < len(atoms) and atoms[close].kind not in _MARKS:
        close += 1
    if _kind(atoms, close) != closing:
        stop = i + 1
        # What follows the last coordinate that fits is not part of it: prose, or the next entry's time.
        while _kind(atoms, stop) in (*axes, "number", ",") and _colon_after(atoms, stop) is None:
            stop += 1
        return _bad(atoms, i, stop, f"the {name} is not closed with {closing!r}")
    inner = [atom for atom in atoms[i + 1 : close] if atom.kind != ","]
    problem = _problem(inner, name, axes)
    if problem:
        return _bad(atoms, i, close + 1, problem)
    values = tuple(atom.value for atom in inner)
    return Found(name, values, atoms[i].start, atoms[close].end), close + 1


def _problem(inner: Sequence[_Atom], name: str, axes: Sequence[str]) -> str | None:
    for atom in inner:
        if atom.kind not in (*_COORDINATES, "number"):
            return f"{atom.text[:24]!r} is not a coordinate"
        if atom.problem:
            return atom.problem
    if len(inner) != len(axes):
        return f"the {name} has {len(inner)} coordinates, expected {len(axes)}"
    if any(atom.kind not in (axis, "number") for atom, axis in zip(inner, axes, strict=True)):
        return f"the {name} mixes up its axes, expected {', '.join(axes)}"
    values = [atom.value or 0.0 for atom in inner]
    if name == "span":
        return "the span is reversed: it starts after its end" if values[0] > values[1] else None
    if values[0] >= values[2] or values[1] >= values[3]:
        return "the box has no area: expected x1 < x2 and y1 < y2"
    return None


def _entry(atoms: Sequence[_Atom], i: int, opening: int) -> tuple[Found, int]:
    """A time, a colon and a box; `opening` is the atom behind the colon."""
    time = atoms[i]
    if _kind(atoms, opening) != "[":
        return _bad(atoms, i, opening, "a time without its box")
    box, stop = _enclosed(atoms, opening)
    if time.kind == "number" and "." not in time.text:
        reason = f"{time.text[:12]!r} is a plain frame number, expected a time token such as <TEMP-012>"
        return _bad(atoms, i, stop, reason)
    if time.problem or box.kind == "bad":
        return _bad(atoms, i, stop, time.problem or box.value)
    return Found("entry", (time.value, box.value), time.start, box.end), stop


def _bad(atoms: Sequence[_Atom], i: int, stop: int, reason: str) -> tuple[Found, int]:
    return Found("bad", reason, atoms[i].start, atoms[stop - 1].end), stop


def _kind(atoms: Sequence[_Atom], i: int) -> str | None:
    return atoms[i].kind if i < len(atoms) else None


def _colon_after(atoms: Sequence[_Atom], i: int) -> int | None:
    """Place of the colon behind an atom; the released conversion writes a comma in front of it."""
    j = i + 2 if _kind(atoms, i + 1) == "," else i + 1
    return j if _kind(atoms, j) == ":" else None
