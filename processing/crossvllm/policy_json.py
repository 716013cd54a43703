"""Objects in what a language model wrote: strict JSON where it is, and what can be saved where it is not."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

ParseState = Literal["json", "tolerant", "keys", "prose", "none"]

QUOTES = "\"'"
LITERALS = {"true": "true", "false": "false", "none": "null", "null": "null", "undefined": "null", "nan": "null"}
NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
WORD = re.compile(r"[A-Za-z_][A-Za-z_0-9]*")
FENCE = re.compile(r"```[A-Za-z]*")


def strip_fences(text: str) -> str:
    """Take the marks of code blocks out of a text.

    Args:
        text: What a model wrote.

    Returns:
        The text without them.
    """
    return FENCE.sub("", text).strip()


def find_object(text: str, keys: Sequence[Sequence[str]]) -> tuple[dict[str, Any], ParseState]:
    """Read the first object of a text that has one of some keys.

    Balanced objects are read as JSON, then with single quotes, trailing commas and Python's words allowed; where that
    fails, every key is looked for by itself, which also saves an answer that was cut off.

    Args:
        text: What a model wrote.
        keys: The names of each value, the first one its name in the result; case does not count.

    Returns:
        The values by their first names, and how they were found: "json", "tolerant", "keys", or "none" with no values.
    """
    plain = strip_fences(text)
    # As written first: marks of code blocks may be part of an answer.
    for piece in (piece for form in dict.fromkeys((text, plain)) for piece in balanced_objects(form)):
        value, state = read_json(piece)
        found = pick_keys(value, keys) if isinstance(value, Mapping) else {}
        if found:
            return found, state
    found = {names[0]: value for names in keys for value in [value_of_key(plain, names)] if value is not None}
    return (found, "keys") if found else ({}, "none")


def pick_keys(value: Mapping[str, Any], keys: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Take known values out of an object.

    Args:
        value: The object.
        keys: As for `find_object`.

    Returns:
        The values that it has, by their first names.
    """
    lowered = {str(key).strip().lower(): entry for key, entry in value.items()}
    return {names[0]: lowered[name] for names in keys for name in names[::-1] if name in lowered}


def read_json(text: str) -> tuple[Any, ParseState]:
    """Read a text as JSON, strictly and then with what language models get wrong put right.

    Args:
        text: The text of one value.

    Returns:
        The value and "json" or "tolerant"; None and "none" where it cannot be read.
    """
    for candidate, state in ((lambda: text, "json"), (lambda: repaired(text), "tolerant")):
        try:
            return json.loads(candidate(), strict=False), state
        except (ValueError, RecursionError):
            continue
    return None, "none"


def balanced_objects(text: str, brackets: str = "{}") -> Iterator[str]:
    """List the balanced objects of a text, outermost ones only; brackets inside strings do not count.

    Args:
        text: The text.
        brackets: The opening and the closing bracket.

    Yields:
        Each object with its brackets.
    """
    opening, closing = brackets
    begin, depth, quote, place = 0, 0, "", 0
    while place < len(text):
        char = text[place]
        if quote:
            if char == "\\":
                place += 1
            elif char == quote and (quote == '"' or closes_string(text, place)):
                quote = ""
        elif depth and char in QUOTES and (char == '"' or opens_string(text, place)):
            quote = char
        elif char == opening:
            begin, depth = (place if depth == 0 else begin), depth + 1
        elif char == closing and depth:
            depth -= 1
            if depth == 0:
                yield text[begin : place + 1]
        place += 1


def opens_string(text: str, place: int) -> bool:
    """Say whether a single quote begins a string and is no apostrophe.

    Args:
        text: The text.
        place: Zero-based place of the quote.

    Returns:
        True behind a bracket, a comma or a colon.
    """
    before = place - 1
    while before >= 0 and text[before].isspace():
        before -= 1
    return before >= 0 and text[before] in "{[,:"


def closes_string(text: str, place: int) -> bool:
    """Say whether a single quote ends a string and is no apostrophe.

    Args:
        text: The text.
        place: Zero-based place of the quote.

    Returns:
        True before a bracket, a comma, a colon or the end.
    """
    after = place + 1
    while after < len(text) and text[after].isspace():
        after += 1
    return after == len(text) or text[after] in "}],:"


def repaired(text: str) -> str:
    """Write an object of Python's or JavaScript's habits as JSON.

    Args:
        text: The object.

    Returns:
        The same with double quotes, JSON's words and no trailing commas; not always JSON.
    """
    parts: list[str] = []
    place = 0
    while place < len(text):
        char = text[place]
        word = WORD.match(text, place)
        if char in QUOTES:
            value, place = read_string(text, place)
            parts.append(json.dumps(value))
        elif char == ",":
            place += 1
            rest = text[place:].lstrip()[:1]
            parts.append("" if rest in ("}", "]", "") else ",")
        elif word is not None:
            parts.append(LITERALS.get(word[0].lower(), json.dumps(word[0])))
            place = word.end()
        else:
            parts.append(char)
            place += 1
    return "".join(parts)


def read_string(text: str, place: int) -> tuple[str, int]:
    """Read a quoted string.

    Args:
        text: The text.
        place: Zero-based place of its opening quote.

    Returns:
        Its value, and the place behind its closing quote; the end of the text where it is never closed.
    """
    quote, chars, place = text[place], [], place + 1
    while place < len(text):
        char = text[place]
        if char == "\\" and place + 1 < len(text):
            chars.append({"n": "\n", "t": "\t"}.get(text[place + 1], text[place + 1]))
            place += 2
            continue
        if char == quote and (quote == '"' or closes_string(text, place)):
            return "".join(chars), place + 1
        chars.append(char)
        place += 1
    return "".join(chars), place


def value_of_key(text: str, names: Sequence[str]) -> Any:
    """Look for the value of one key in a text that holds no whole object.

    Args:
        text: The text.
        names: Names of the key; case does not count.

    Returns:
        A text (also of a time or a number), or None where there is no such key or its value is null.
    """
    for name in names:
        # Words of prose ("answer: ...") are keys only where there is something of an object around them.
        quote = "[\"']?" if "{" in text or "_" in name else "[\"']"
        found = re.search(rf"(?<![A-Za-z_0-9]){quote}{re.escape(name)}{quote}\s*[:=]\s*", text, re.IGNORECASE)
        if found is None or found.end() == len(text):
            continue
        if text[found.end()] in QUOTES:
            return read_string(text, found.end())[0]
        bare = re.match(r"[^,}\]\n]*", text[found.end() :])[0].strip()
        if bare and bare.lower() not in ("null", "none"):
            return bare
    return None
