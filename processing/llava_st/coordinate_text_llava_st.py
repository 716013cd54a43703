"""Coordinates written in a text: what they look like, their values, and their places among the token ids.

A coordinate is a template token with its value, `<TEMP-INPUT0.300>` or `<WIDTH-OUTPUT0.512>`, or its short form
`<t0.3>`, `<w0.5>`, `<h1.0>`. INPUT is for questions, OUTPUT for answers that are taught. The model reads the template
token and, beside it, the value. `<TEMP-030>` is an entry of the vocabulary and stays as it is, and so do the headings
`<h1>` to `<h6>` of HTML; `<h1>` is a height only at the end of a box or point, as in `[<w0.5>,<h1>]`.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from longvideo.processing.shared.processor_calls import UNMARKED

SHORT_AXES = {"t": "TEMP", "h": "HEIGHT", "w": "WIDTH"}
NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_TEMPLATE = "<(?P<axis>TEMP|HEIGHT|WIDTH)-(?P<way>INPUT|OUTPUT)(?P<value>[^<>]*)>"
# Headings of HTML are none, except where `<h1>` closes what a width began.
_NO_HEADING = r"(?:(?!<h[1-6]>)|(?=<h1> ?\])(?:(?<=[\d.]>)|(?<=[\d.]>,)|(?<=[\d.]> )|(?<=[\d.]>, )))"
_SHORT_FORM = f"{_NO_HEADING}<(?P<short>[twh])(?P<number>{NUMBER})>"
COORDINATE = re.compile(f"{UNMARKED}(?:{_TEMPLATE}|{_SHORT_FORM})")
# The demo of the release rounds what users type to so many digits.
DIGITS = 3
# Names of the value lists in the release's data.
LISTS = {"TEMP": "temporal", "HEIGHT": "spatial_height", "WIDTH": "spatial_width"}


class Coordinate(NamedTuple):
    """A coordinate in a text.

    Attributes:
        token: Its template token.
        value: Between 0 and 1, None for a template token without a value.
        start: First character in the text.
        end: Character behind the last one.
    """

    token: str
    value: float | None
    start: int
    end: int

    @property
    def is_input(self) -> bool:
        """Whether it belongs to a question."""
        return self.token.endswith("-INPUT>")

    @property
    def list_name(self) -> str:
        """Name of the list that holds its value in the release's data."""
        axis, way = self.token.strip("<>").split("-")
        return f"{LISTS[axis]}_{way.lower()}_locations"


def format_coordinate(axis: str, value: float, way: str = "INPUT") -> str:
    """Write a coordinate with its value.

    Args:
        axis: "TEMP", "HEIGHT" or "WIDTH".
        value: Between 0 and 1.
        way: "INPUT" or "OUTPUT".

    Returns:
        For instance `<TEMP-INPUT0.300>`.
    """
    return f"<{axis}-{way}{value:.{DIGITS}f}>"


def find_coordinates(text: str, *, clip: bool = False) -> list[Coordinate]:
    """List the coordinates of a text; short forms count as INPUT.

    Args:
        text: The text.
        clip: Whether values outside of 0 to 1 are clipped, as in the benchmark scripts of the release.

    Returns:
        They, in order.

    Raises:
        ValueError: What stands behind a template is no number, or a value lies outside of 0 to 1.
    """
    return [read_coordinate(match, clip=clip) for match in COORDINATE.finditer(text)]


def read_coordinate(match: re.Match, *, clip: bool = False) -> Coordinate:
    """Read what `COORDINATE` found.

    Args:
        match: Its match.
        clip: As in `find_coordinates`.

    Returns:
        The coordinate.

    Raises:
        ValueError: As in `find_coordinates`.

    Differs: the release evaluates the text behind a template as Python; here it is a number or an error.
    """
    axis, way = match["axis"] or SHORT_AXES[match["short"]], match["way"] or "INPUT"
    written = match["value"] if match["number"] is None else match["number"]
    token = f"<{axis}-{way}>"
    if not written:
        return Coordinate(token, None, *match.span())
    if re.fullmatch(NUMBER, written.strip()) is None:
        raise ValueError(
            f"{match[0]} has no number behind {token[:-1]}; write a value from 0 to 1, like {token[:-1]}0.5>."
        )
    value = float(written)
    if match["number"] is not None:
        value = round(value, DIGITS)
    return Coordinate(token, checked_value(value, match[0], clip=clip), *match.span())


def checked_value(value: float, where: str, *, clip: bool = False) -> float:
    """Check that a value lies between 0 and 1.

    Args:
        value: The value.
        where: What it belongs to, for the message.
        clip: Whether it is clipped.

    Returns:
        The value.

    Raises:
        ValueError: It is not finite, or outside and not clipped.
    """
    value = float(value)
    if clip and not math.isnan(value):
        return min(max(value, 0.0), 1.0)
    if not 0 <= value <= 1:
        raise ValueError(
            f"{where} has the value {value:g}, which lies outside of 0 to 1. Coordinates are fractions: seconds "
            "divided by the duration of the clip, pixels divided by width or height (apply_task does that), or pass "
            "clip_coordinates=True."
        )
    return value


def write_short_forms(text: str, way: str) -> str:
    """Turn the short forms of a text into template tokens with values.

    Args:
        text: The text.
        way: "INPUT" for a question, "OUTPUT" for an answer.

    Returns:
        The text; everything else in it stays.
    """

    def write(match: re.Match) -> str:
        if match["number"] is None:
            return match[0]
        return f"<{SHORT_AXES[match['short']]}-{way}{round(float(match['number']), DIGITS)}>"

    return COORDINATE.sub(write, text)


def values_of_text(
    text: str, variables: Mapping[str, Sequence[float]] | None = None, *, clip: bool = False
) -> list[float]:
    """List the values of a text's coordinates.

    Args:
        text: The text.
        variables: Values of its template tokens that have none, as in the release's data: up to six lists
            `temporal_input_locations`, `spatial_height_output_locations` and so on, in order of appearance.
        clip: As in `find_coordinates`.

    Returns:
        One value per coordinate, in order.

    Raises:
        ValueError: A template token without value, a value without template token, a list with an unknown name, a
            value outside of 0 to 1, or a question with a reversed span or a box without area.
    """
    found = find_coordinates(text, clip=clip)
    names = [f"{axis}_{way}_locations" for axis in LISTS.values() for way in ("input", "output")]
    unknown = sorted(set(variables or {}) - set(names))
    if unknown:
        raise ValueError(f"variables has the unknown lists {unknown}, expected some of {names}.")
    given = {name: list((variables or {}).get(name) or []) for name in names}
    complete = []
    for entry in found:
        if entry.value is None:
            if not given[entry.list_name]:
                raise ValueError(
                    f"The text has {entry.token} without a value. Write {entry.token[:-1]}0.5> with a value from 0 to "
                    f"1, or pass its value in variables['{entry.list_name}']."
                )
            value = checked_value(given[entry.list_name].pop(0), f"variables['{entry.list_name}']", clip=clip)
            entry = entry._replace(value=value)
        complete.append(entry)
    left = {name: len(values) for name, values in given.items() if values}
    if left:
        raise ValueError(
            f"variables has values without a template token in the text: {left} (list: values left over)."
        )
    check_spans_and_boxes(text, complete)
    return [entry.value for entry in complete]


def check_spans_and_boxes(text: str, coordinates: Sequence[Coordinate]) -> None:
    """Check what a question writes as `{time, time}` and as `[width, height, width, height]`.

    Args:
        text: The question.
        coordinates: Its coordinates with values.

    Raises:
        ValueError: A span that does not end after it starts, or a box without area.
    """
    for group, kind in bracketed_groups(text, coordinates):
        values = [entry.value for entry in group]
        written = text[group[0].start - 1 : group[-1].end + 1]
        if kind == "span" and values[0] >= values[1]:
            raise ValueError(
                f"The span {written} runs from {values[0]:g} to {values[1]:g}; its end must lie after its start."
            )
        if kind == "box" and (values[0] >= values[2] or values[1] >= values[3]):
            raise ValueError(
                f"The box {written} has no area: x from {values[0]:g} to {values[2]:g}, y from {values[1]:g} to "
                f"{values[3]:g}. Write [left, top, right, bottom]."
            )


def bracketed_groups(text: str, coordinates: Sequence[Coordinate]) -> Iterable[tuple[Sequence[Coordinate], str]]:
    """Find spans and boxes among the coordinates of a question.

    Args:
        text: The question.
        coordinates: Its coordinates.

    Yields:
        The two or four coordinates of each, and "span" or "box".
    """
    shapes = {"span": ("{", "}", ["TEMP"] * 2), "box": ("[", "]", ["WIDTH", "HEIGHT"] * 2)}
    for place in range(len(coordinates)):
        for kind, (before, after, axes) in shapes.items():
            group = coordinates[place : place + len(axes)]
            if [entry.token for entry in group] != [f"<{axis}-INPUT>" for axis in axes]:
                continue
            gaps = [text[one.end : two.start] for one, two in pairwise(group)]
            is_closed = text[: group[0].start].endswith(before) and text[group[-1].end :].startswith(after)
            if is_closed and all(not gap.strip(" ,") for gap in gaps):
                yield group, kind


def align_values(
    rows: Sequence[Sequence[int]],
    values: Sequence[Sequence[float]],
    template_ids: set[int],
    *,
    from_left: bool = False,
) -> list[list[float]]:
    """Put values beside the template tokens that they belong to.

    Args:
        rows: Token ids of each prompt, padded on either side or not at all.
        values: Values of each prompt, in order.
        template_ids: Ids of the template tokens.
        from_left: Whether truncation cut the beginning of prompts off.

    Returns:
        For each row the value at every template token, and 0 elsewhere.

    Raises:
        ValueError: A row has more template tokens than values, or rows and prompts differ in number.
    """
    if len(rows) != len(values):
        raise ValueError(
            f"{len(values)} prompts became {len(rows)} rows; coordinates cannot be followed through "
            "return_overflowing_tokens, leave it out."
        )
    aligned = []
    for number, (row, own) in enumerate(zip(rows, values, strict=True)):
        places = [place for place, token_id in enumerate(row) if token_id in template_ids]
        if len(places) > len(own):
            raise ValueError(f"Prompt {number} has {len(places)} coordinates among its ids, but {len(own)} values.")
        kept = own[len(own) - len(places) :] if from_left else own[: len(places)]
        beside = [0.0] * len(row)
        for place, value in zip(places, kept, strict=True):
            beside[place] = value
        aligned.append(beside)
    return aligned


def variables_of_prompts(variables: Any, count: int) -> list[Mapping[str, Sequence[float]] | None]:
    """List the value lists of the prompts of a call.

    Args:
        variables: None, one mapping for one prompt, or a list with one mapping (or None) per prompt.
        count: Number of prompts.

    Returns:
        One entry per prompt.

    Raises:
        ValueError: The numbers differ.
    """
    if variables is None:
        return [None] * count
    entries = [variables] if isinstance(variables, Mapping) else list(variables)
    if len(entries) != count:
        raise ValueError(f"variables has {len(entries)} entries for {count} prompts; give one mapping per prompt.")
    return entries
