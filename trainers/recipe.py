"""Recipes: the settings of one training stage each, as yaml files, by name or by path."""

from pathlib import Path
from typing import Any

RECIPES_DIR = Path(__file__).parent / "recipes"
ENDINGS = (".yaml", ".yml")


def recipe_names() -> dict[str, list[str]]:
    """List the recipes of the package.

    Returns:
        For each architecture the names of its stages in order.
    """
    folders = sorted(folder for folder in RECIPES_DIR.iterdir() if folder.is_dir())
    found = {folder.name: sorted(file.stem for file in folder.glob("*.yaml")) for folder in folders}
    return {name: stages for name, stages in found.items() if stages}


def load_recipe(recipe: str) -> dict[str, Any]:
    """Read all stages of a recipe.

    Args:
        recipe: Architecture, as a folder of `trainers/recipes` is named; or a path to a folder of yaml files with one
            stage each, to such a file, or to a yaml file with `stages`.

    Returns:
        `stages`, a dict in the order of the stages whose entries have `args` (fields of `VideoSFTConfig`) and notes:
        `data`, `gpus` and `global_batch_size`, and where the stage needs them `model` (fields of the model's
        configuration), `lora` (fields of `peft.LoraConfig`) and `trainer` (`cross_granularity`, whose `args` are
        fields of `CrossGranularityConfig`).

    Raises:
        FileNotFoundError: No such recipe; the text lists those that exist.
        ValueError: A file without `stages` and without `args`.
    """
    path = _path_of(recipe)
    files = sorted(path.glob("*.yaml")) if recipe and path.is_dir() else []
    if files:
        return {"stages": {file.stem: _read_stage(file) for file in files}}
    if path.is_file():
        contents = _read(path)
        if isinstance(contents.get("stages"), dict) and contents["stages"]:
            return contents
        return {"stages": {path.stem: _read_stage(path)}}
    reason = "holds no .yaml file" if path.is_dir() else "does not exist"
    raise FileNotFoundError(
        f"No recipe {recipe!r}: {path.name} {reason}. Known: {list(recipe_names())}, or give a .yaml path."
    )


def find_stage(recipe: str, stage: str | int | None = None) -> tuple[str, dict[str, Any]]:
    """Read one stage of a recipe.

    Args:
        recipe: As for `load_recipe`, or architecture and stage as "longvu/stage2_video" or "longvu/2".
        stage: Name of the stage, or its 1-based number; None where `recipe` names it or has no other.

    Returns:
        Name and entry of the stage.

    Raises:
        FileNotFoundError: No such recipe.
        ValueError: No such stage, none chosen out of several, or two that contradict each other.
    """
    name = recipe
    first, _, inside = recipe.partition("/")
    if inside and not recipe.endswith(ENDINGS) and (first in recipe_names() or not Path(recipe).expanduser().is_dir()):
        if stage is not None:
            raise ValueError(f"Recipe {recipe!r} names a stage already; leave stage {stage!r} out, or give {first!r}.")
        name, stage = first, inside
    stages = load_recipe(name)["stages"]
    names = list(stages)
    if stage is None and len(names) == 1:
        stage = names[0]
    if stage is None:
        raise ValueError(f"Recipe {recipe!r} has several stages: choose one of {names} (or 1 to {len(names)}).")
    number = int(stage) if str(stage).isdecimal() else None
    found = names[number - 1] if number is not None and 1 <= number <= len(names) else stage
    if found not in stages:
        raise ValueError(f"Recipe {recipe!r} has no stage {stage!r}; it has {names} (or numbers 1 to {len(names)}).")
    return str(found), stages[found]


def _path_of(recipe: str) -> Path:
    # The package's own names come first: a folder that happens to be called so must not stand in their way.
    path = Path(recipe).expanduser()
    if recipe and recipe not in recipe_names() and (recipe.endswith(ENDINGS) or path.is_dir()):
        return path
    return RECIPES_DIR / recipe


def _read_stage(path: Path) -> dict[str, Any]:
    contents = _read(path)
    if not isinstance(contents.get("args"), dict):
        raise ValueError(
            f"{path.name} is no recipe: expected a mapping with `stages` (several) or `args` (one stage: fields of "
            "VideoSFTConfig)."
        )
    return contents


def _read(path: Path) -> dict[str, Any]:
    try:
        import yaml
    except ImportError as error:
        raise ImportError("Recipes are yaml files: pip install pyyaml.") from error
    try:
        contents = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path.name} is not yaml: {error}.") from error
    return contents if isinstance(contents, dict) else {}
