"""Literal tables from original to native tensor names."""

import re


class KeyMap:
    """A literal table from original to native tensor names, readable in both directions.

    Args:
        table: Original name to native name. `{}` stands for a number (of a layer) and occurs equally often on both
            sides; the value None names a tensor that is dropped on purpose.

    Raises:
        ValueError: if two entries have the same target or the numbers of `{}` differ.
    """

    def __init__(self, table: dict[str, str | None]) -> None:
        self.table = dict(table)
        kept = {source: target for source, target in table.items() if target is not None}
        if len(set(kept.values())) != len(kept):
            doubled = sorted({target for target in kept.values() if list(kept.values()).count(target) > 1})
            raise ValueError(f"key map fills {doubled} twice; every target must have one source.")
        for source, target in kept.items():
            if source.count("{}") != target.count("{}"):
                raise ValueError(f"key map: {source!r} and {target!r} do not have equally many {{}}.")
        self.patterns = [(compile_template(source), target) for source, target in table.items()]

    def rename(self, key: str) -> str | None:
        """Translate one name.

        Args:
            key: An original tensor name.

        Returns:
            The native name, or None for a tensor that is dropped on purpose.

        Raises:
            KeyError: if no entry covers the name.
        """
        if key in self.table and "{}" not in key:
            return self.table[key]
        for pattern, target in self.patterns:
            match = pattern.fullmatch(key)
            if match:
                return None if target is None else target.format(*match.groups())
        raise KeyError(key)

    def inverse(self) -> "KeyMap":
        """Return the table from native to original names (dropped entries have no inverse).

        Returns:
            The inverse table.
        """
        return KeyMap({target: source for source, target in self.table.items() if target is not None})


def compile_template(template: str) -> re.Pattern[str]:
    """Return the pattern of a name with `{}` for numbers.

    Args:
        template: A name of the table.

    Returns:
        A pattern to be matched against the whole name, one group for each `{}`.
    """
    return re.compile(r"(\d+)".join(re.escape(part) for part in template.split("{}")))


def collapse_numbers(key: str) -> str:
    """Return the name with every number between dots replaced by `{}`, to group layers.

    Args:
        key: A tensor name.

    Returns:
        The grouped name.
    """
    return re.sub(r"(?<=\.)\d+(?=\.)", "{}", key)
