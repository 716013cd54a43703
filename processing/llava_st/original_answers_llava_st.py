"""The text converters and parsers of the released scripts, so that their result files and tables can be compared.

They take the first match, call a missing span [0, 0] and a missing box None, and lose what they do not understand. For
answers in a program use `grounding_llava_st.parse_grounding`, which keeps everything.

Paper: LLaVA-ST (see the architecture's README). Source: inference/src/utils.py, demo/utils.py and llava_arch.py of the
repository appletea233/LLaVA-ST. `Differs:` the scripts evaluate the value of `<TEMP-INPUT...>` as Python and end with
whatever exception comes up; here it is read as a number, and every failure is a ValueError.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

_NUMBER = r"(\d+(?:\.\d+)?)"
_SPAN = re.compile(rf"{{\s*{_NUMBER},\s*{_NUMBER}\s*}}")
# The parsers of boxes remove blanks (and only those) from the text first.
_BOX = re.compile(rf"\[{_NUMBER},\s*{_NUMBER},\s*{_NUMBER},\s*{_NUMBER}\]")
_LOOSE_BOX = re.compile(rf"\[\s*{_NUMBER},\s*{_NUMBER},\s*{_NUMBER},\s*{_NUMBER}\s*\]")
_PAIR = re.compile(rf"{_NUMBER},:\s*\[{_NUMBER},\s*{_NUMBER},\s*{_NUMBER},\s*{_NUMBER}\]")
_DISCRETE = re.compile(r"<(?:WIDTH|HEIGHT|TEMP)-(\d+)>")
_SHORTHAND = re.compile(rf"<([twh]){_NUMBER}>")
_AXIS_OF = {"t": "TEMP", "w": "WIDTH", "h": "HEIGHT"}
# Template token -> the released name of the list that holds its values.
VARIABLES = {
    f"{token}-{role}": f"{name}_{role.lower()}_locations"
    for token, name in (("TEMP", "temporal"), ("HEIGHT", "spatial_height"), ("WIDTH", "spatial_width"))
    for role in ("INPUT", "OUTPUT")
}


def original_convert(text: str, *, return_token: bool = False, num_tokens: int = 100) -> str:
    """Discrete coordinates as numbers with a comma behind each, which is dropped in front of "]" and "}".

    Args:
        text: Answer with `<TEMP-012>` and so on, any number of digits.
        return_token: Write the index in place of the fraction with five digits.
        num_tokens: Tokens of an axis; the last one stands for 1.

    Returns:
        The converted text: `<TEMP-010>:[...` becomes `0.10101,:[...`.

    Source: inference/src/utils.py, replace_and_normalize.
    """

    def number(match: re.Match[str]) -> str:
        index = int(match[1])
        return f"{index}," if return_token else f"{index / (num_tokens - 1):.5f},"

    return _DISCRETE.sub(number, text).replace(",]", "]").replace(",}", "}")


def original_span(text: str) -> list[float]:
    """First `{a,b}` of a converted text, [0, 0] without one.

    Source: inference/src/utils.py, parse_span_from_text.
    """
    match = _SPAN.search(text)
    return [float(match[1]), float(match[2])] if match else [0, 0]


def original_box(text: str) -> list[float] | None:
    """First `[a,b,c,d]` of a converted text, None without one.

    Source: inference/src/utils.py, parse_box_from_text.
    """
    match = _BOX.search(text.replace(" ", ""))
    return [float(value) for value in match.groups()] if match else None


def original_pairs(text: str) -> dict[float, list[float]]:
    """Every `t,:[a,b,c,d]` of a converted text as time -> box; of equal times the last stays.

    Source: inference/src/utils.py, parse_stpair_from_text.
    """
    found = _PAIR.findall(text.replace(" ", ""))
    return {float(time): [float(value) for value in box] for time, *box in found}


def original_float(text: str, *, before: str = "Ends in", after: str = "") -> float:
    """First number behind a phrase, 0 without one.

    Args:
        text: Converted text.
        before: Regular expression in front of the number.
        after: Regular expression behind it.

    Source: inference/src/utils.py, parse_float_from_text.
    """
    match = re.search(rf"{before}\s*{_NUMBER}{after}", text)
    return float(match[1]) if match else 0


def original_results(text: str, task: str) -> Any:
    """What the demo shows of a converted answer.

    Args:
        text: Converted text.
        task: "rec", "reg", "tvg", "tr", "stvg", "svg", "elc", "dgc" or "dvc".

    Returns:
        Box, span, time -> box, list of boxes, or list of {timestamp, sentence}, by the task.

    Raises:
        ValueError: another task.

    Source: demo/utils.py, parse_results.
    """
    task = task.lower()
    if task in ("rec", "reg"):
        return original_box(text)
    if task in ("tvg", "tr"):
        return original_span(text)
    if task in ("stvg", "svg", "elc"):
        return original_pairs(text)
    if task == "dgc":
        boxes = [original_box(piece + "]") for piece in text.split("]")]
        return [box for box in boxes if box is not None]
    if task != "dvc":
        raise ValueError(f"task is {task!r}, expected one of rec, reg, tvg, tr, stvg, svg, elc, dgc, dvc")
    events = []
    for piece in text.split("{"):
        span = original_span("{" + piece)
        if span != [0, 0]:
            sentence = ("{" + piece).split(",")[-1].split(".")[0]
            events.append({"timestamp": span, "sentence": sentence})
    return events


def original_caption(outputs: str) -> str:
    """Caption of an answer to event localisation and captioning: up to the first dot, behind its last comma.

    Args:
        outputs: The answer as generated, not converted.

    Source: inference/src/metrics.py, eval_stvg.
    """
    return outputs.split(".")[0].split(",")[-1]


def original_format_box(
    text: str, *, in_out: str, pad_proc: bool = False, h: float | None = None, w: float | None = None
) -> str:
    """Numeric boxes of a text as template tokens with values, clipped to 0 to 1 and rounded to three digits.

    Args:
        text: Text with `[a,b,c,d]`.
        in_out: "INPUT" or "OUTPUT".
        pad_proc: Whether the boxes refer to a picture that was padded to a square.
        h: Height of the picture in pixels, with `pad_proc`.
        w: Width of the picture in pixels, with `pad_proc`.

    Raises:
        ValueError: `pad_proc` without `h` and `w`.

    Source: inference/src/utils.py, format_box_in_text.
    """

    def tokens(match: re.Match[str]) -> str:
        box: Sequence[float] = [float(value) for value in match.groups()]
        if pad_proc:
            if not h or not w:
                raise ValueError(f"h is {h} and w is {w}: a padded picture needs both in pixels")
            box = original_unpad_box(box, h, w)
        # The ends become whole numbers, as in the released text.
        x1, y1, x2, y2 = (round(value if 0 <= value <= 1 else int(value > 1), 3) for value in box)
        corner = "<WIDTH-{0}{1}><HEIGHT-{0}{2}>"
        return f" [{corner.format(in_out, x1, y1)}{corner.format(in_out, x2, y2)}]"

    return _LOOSE_BOX.sub(tokens, text)


def original_format_span(text: str, *, in_out: str) -> str:
    """Numeric spans of a text as template tokens with values; one that does not go forward becomes `{<error>}`.

    Source: inference/src/utils.py, format_span_in_text.
    """

    def tokens(match: re.Match[str]) -> str:
        start, end = float(match[1]), float(match[2])
        if start >= end:
            return "{<error>}"
        return f" {{<TEMP-{in_out}{round(start, 3)}><TEMP-{in_out}{round(end, 3)}>}} "

    return _SPAN.sub(tokens, text)


def original_format_float(text: str, *, in_out: str) -> str:
    """ "Starts in 0.59" with the number as a template token with its value.

    Source: inference/src/utils.py, format_float_in_text.
    """
    return re.sub(
        rf"Starts in {_NUMBER}", lambda match: f" Starts in <TEMP-{in_out}{round(float(match[1]), 3)}> ", text
    )


def original_unpad_box(box: Sequence[float], height: float, width: float) -> list[float]:
    """A box in fractions of the square that a picture was padded to, as fractions of the picture.

    Args:
        box: x1, y1, x2, y2 in fractions of the square.
        height: Height of the picture in pixels.
        width: Width of the picture in pixels.

    Returns:
        x1, y1, x2, y2; outside 0 to 1 where the box reaches into the padding.

    Source: inference/src/utils.py, bbox_post_refine.
    """
    side = max(height, width)
    pad_x, pad_y = (side - width) // 2, (side - height) // 2
    x1, y1, x2, y2 = (value * side for value in box)
    return [(x1 - pad_x) / width, (y1 - pad_y) / height, (x2 - pad_x) / width, (y2 - pad_y) / height]


def original_separate(text: str, token: str) -> tuple[str, list[float]]:
    """Values taken out of the template tokens of one kind.

    Args:
        text: Text with `<TEMP-INPUT0.1>` and so on.
        token: "TEMP-INPUT" and so on.

    Returns:
        The text with bare template tokens, and the values in order.

    Raises:
        ValueError: what stands in a token is not a number.

    Source: inference/src/utils.py, seperate_token_number.
    """
    pattern = re.compile(rf"<{re.escape(token)}(.*?)>")
    values = []
    for match in pattern.finditer(text):
        try:
            values.append(float(match[1]))
        except ValueError:
            raise ValueError(f"{match[0]!r} has {match[1]!r} where a number between 0 and 1 was expected") from None
    return pattern.sub(f"<{token}>", text), values


def original_variables(
    conversations: Sequence[Mapping[str, Any]],
) -> tuple[list[dict[str, Any]], dict[str, list[float]]]:
    """Values of a conversation's template tokens as the six released lists, in order of appearance.

    Args:
        conversations: Turns {from, value}; a value None is an open turn.

    Returns:
        The turns with bare template tokens, and list name -> values.

    Raises:
        ValueError: what stands in a token is not a number.

    Source: inference/src/utils.py, get_variables.
    """
    turns = [dict(turn) for turn in conversations]
    variables: dict[str, list[float]] = {name: [] for name in VARIABLES.values()}
    for turn in turns:
        if turn["value"] is None:
            continue
        for token, name in VARIABLES.items():
            turn["value"], values = original_separate(turn["value"], token)
            variables[name] += values
    return turns, variables


def original_shorthand(text: str, role: str | None = None) -> str:
    """The demo's `<t0.5>`, `<w0.5>`, `<h0.5>`, rounded to three digits.

    Args:
        text: Text with shorthand coordinates.
        role: "INPUT" or "OUTPUT" for template tokens with values, None for bare numbers.

    Source: demo/utils.py, parse_inputs and format_text.
    """

    def written(match: re.Match[str]) -> str:
        value = str(round(float(match[2]), 3))
        return value if role is None else f"<{_AXIS_OF[match[1]]}-{role}{value}>"

    return _SHORTHAND.sub(written, text)


def original_conversations(
    conversations: Sequence[Mapping[str, Any]],
) -> tuple[list[dict[str, Any]], dict[str, list[float]]]:
    """Shorthand coordinates of a conversation as the six lists; INPUT in the human's turns, else OUTPUT.

    Source: demo/utils.py, format_conversations.
    """
    turns = [dict(turn) for turn in conversations]
    for turn in turns:
        if turn["value"] is not None:
            turn["value"] = original_shorthand(turn["value"], "INPUT" if turn["from"] == "human" else "OUTPUT")
    return original_variables(turns)


def original_position(value: float, num_tokens: int) -> tuple[int, int, float]:
    """The two bins of a coordinate and the share of the upper one.

    Args:
        value: Coordinate, clipped to 0 to 1.
        num_tokens: Tokens of the axis.

    Returns:
        Lower bin, upper bin, share of the upper bin.

    Source: llava_arch.py, position_transfer.
    """
    position = min(max(value, 0), 1) * (num_tokens - 1)
    return math.floor(position), math.ceil(position), position - math.floor(position)


def original_filter_tube(tube: Any, frames: Sequence[int]) -> Any:
    """The entries of a tube whose frame is among the sampled ones; anything but a mapping is given back as it is.

    Source: inference/src/utils.py, filter_svg_bboxes_according_to_frame_id.
    """
    if not isinstance(tube, Mapping):
        return tube
    sampled = set(frames)
    return {frame: box for frame, box in tube.items() if int(frame) in sampled}
