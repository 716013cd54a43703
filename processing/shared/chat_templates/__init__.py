"""Jinja chat templates that several architectures share, and the function that reads them."""

from importlib.resources import files


def load_chat_template(name: str) -> str:
    """Read one of the packaged chat templates.

    Args:
        name: File name without `.jinja`; a name that ends in `_training` marks what an assistant says.

    Returns:
        The template text.

    Raises:
        ValueError: There is no such template.
    """
    folder = files(__package__)
    entry = folder / f"{name}.jinja"
    if not entry.is_file():
        known = sorted(item.name.removesuffix(".jinja") for item in folder.iterdir() if item.name.endswith(".jinja"))
        raise ValueError(f"There is no chat template {name!r}; the package has {known}.")
    return entry.read_text(encoding="utf-8")
