"""Settings of a native config that an original config has no words for: they travel in an entry of their own."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from longvideo.conversion.architecture import ArchitectureConversion

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

ENTRY = "longvideo_settings"
# What conversion settles by itself (placeholders from the tokenizer, types from the weights) and what names a file.
SETTLED = {
    "_name_or_path",
    "architectures",
    "dtype",
    "image_token_id",
    "torch_dtype",
    "transformers_version",
    "video_token_id",
}


def build_native_config(
    conversion: ArchitectureConversion, original: Mapping[str, Any], parts: Mapping[str, dict[str, Any]]
) -> "PreTrainedConfig":
    """Return the native config for an original one, with the settings that its entry carries.

    Args:
        conversion: The architecture.
        original: The original config.json.
        parts: The configs of its parts.

    Returns:
        The config.

    Raises:
        ValueError: if the entry holds something else than settings of this architecture.
    """
    from huggingface_hub.errors import StrictDataclassError

    config = conversion.build_config(dict(original), parts)
    carried = original.get(ENTRY)
    if carried is None:
        return config
    if not isinstance(carried, Mapping):
        raise ValueError(f"config.json has {ENTRY} {carried!r}; expected an object with settings of a native config.")
    try:
        return type(config).from_dict(_replace(config.to_dict(), carried))
    except (TypeError, KeyError, StrictDataclassError) as error:
        raise ValueError(f"config.json has {ENTRY} that do not fit {conversion.name}: {error}") from error


def _replace(fields: dict[str, Any], carried: Mapping[str, Any]) -> dict[str, Any]:
    nested = {
        name: _replace(fields[name], value)
        for name, value in carried.items()
        if _is_config(fields.get(name)) and isinstance(value, Mapping)
    }
    return {**fields, **carried, **nested}


def _is_config(value: Any) -> bool:
    return isinstance(value, Mapping) and "model_type" in value


def changed_settings(given: Mapping[str, Any], back: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of a config differs from another one.

    Args:
        given: Content of a native config.
        back: Content of the one to compare with.

    Returns:
        Values of `given`, nested as there; None for what only `back` has.
    """
    changed: dict[str, Any] = {}
    for name in sorted((given.keys() | back.keys()) - SETTLED):
        ours, theirs = _plain(given.get(name)), _plain(back.get(name))
        if ours == theirs:
            continue
        if _is_config(ours) and _is_config(theirs) and ours["model_type"] == theirs["model_type"]:
            if inner := changed_settings(ours, theirs):
                changed[name] = inner
        else:
            changed[name] = ours
    return changed


def _plain(value: Any) -> Any:
    """Return a value as a JSON file gives it back."""
    if isinstance(value, Mapping):
        return {str(name): _plain(inner) for name, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def list_settings(changed: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return settings as "name=value", those of inner configs with the name of the config before a dot."""
    lines = []
    for name, value in changed.items():
        inner = isinstance(value, Mapping) and name.endswith("_config")
        lines += list_settings(value, f"{prefix}{name}.") if inner else [f"{prefix}{name}={value!r}"]
    return lines


def carry_settings(
    conversion: ArchitectureConversion,
    config: "PreTrainedConfig",
    original: dict[str, Any],
    completed: dict[str, Any],
    parts: Mapping[str, dict[str, Any]],
) -> tuple[dict[str, Any], list[str]]:
    """Give an original config that was written anew the settings that it has no words for.

    Args:
        conversion: The architecture.
        config: The native config.
        original: The original config made of it.
        completed: The same with what conversion adds from other files.
        parts: The configs of its parts.

    Returns:
        The original config, with an entry where one is needed, and notes for the report.

    Raises:
        ValueError: if a setting would come back otherwise all the same.
    """
    given = config.to_dict()
    changed = changed_settings(given, conversion.build_config(completed, parts).to_dict())
    if not changed:
        return original, []
    back = build_native_config(conversion, {**completed, ENTRY: changed}, parts)
    lost = changed_settings(given, back.to_dict())
    if lost:
        raise ValueError(
            f"config.json has settings that the original layout cannot hold: {', '.join(list_settings(lost))}. "
            "Set them back to their defaults to write that layout."
        )
    note = (
        f"the original layout has no words for {', '.join(list_settings(changed))}: config.json carries them under "
        f"{ENTRY}, which conversion reads and the original code does not."
    )
    return {**original, ENTRY: changed}, [note]
