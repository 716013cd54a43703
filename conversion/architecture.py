"""What a conversion must know about one architecture, and the register of all of them."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch

from longvideo.conversion.checkpoint_io import TensorInfo
from longvideo.conversion.joins import Join
from longvideo.conversion.key_map import KeyMap
from longvideo.conversion.parts import Part, SourceCheckpoint

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

NO_PARTS: Mapping[str, Any] = MappingProxyType({})
NO_OPTIONS: Mapping[str, Any] = MappingProxyType({})
CONVERSIONS: dict[str, "ArchitectureConversion"] = {}


class ArchitectureConversion(ABC):
    """What a conversion must know about one architecture.

    Attributes:
        name: The native `model_type`.
        original_model_types: The `model_type` values of original checkpoints.
        parts: Checkpoints that the original reads beside its own.
        options: Further choices of a conversion, with their defaults.
    """

    parts: tuple[Part, ...] = ()
    options: Mapping[str, Any] = NO_OPTIONS
    name: str
    original_model_types: tuple[str, ...]

    @abstractmethod
    def check_config(self, config: dict[str, Any]) -> None:
        """Raise ValueError if the original config is not of this architecture or of a kind that is not supported."""

    @abstractmethod
    def key_map(self, config: dict[str, Any], names: Collection[str] = ()) -> KeyMap:
        """Return the table for this original config; `names` are the source's tensors where layouts differ in them."""

    @abstractmethod
    def build_config(
        self, config: dict[str, Any], parts: Mapping[str, dict[str, Any]] = NO_PARTS
    ) -> "PreTrainedConfig":
        """Return the native config for an original one and those of its parts."""

    @abstractmethod
    def original_config(self, config: "PreTrainedConfig") -> dict[str, Any]:
        """Return an original config for a native one (used when no verbatim copy was kept)."""

    @abstractmethod
    def load_config(self, folder: Path) -> "PreTrainedConfig":
        """Read the native config of a converted folder."""

    @abstractmethod
    def build_model(self, config: "PreTrainedConfig") -> "PreTrainedModel":
        """Return the native model (called on the meta device)."""

    @abstractmethod
    def write_companions(self, config: "PreTrainedConfig", source: Path, folder: Path) -> list[str]:
        """Write generation config and processor into `folder`, complete `config` with token ids, return notes."""

    def check_parts(  # noqa: B027 (most architectures have no parts)
        self, config: dict[str, Any], parts: Mapping[str, dict[str, Any]], infos: Mapping[str, TensorInfo]
    ) -> None:
        """Raise ValueError if the parts do not fit the checkpoint, whose headers are `infos`."""

    def open_source(self, source: Path, parts: Mapping[str, Path], options: Mapping[str, Any]) -> SourceCheckpoint:
        """Open the source.

        Args:
            source: The original folder.
            parts: Folders of the parts.
            options: The choices.

        Returns:
            Its tensors.
        """
        return SourceCheckpoint(source, self.parts, parts)

    def complete_config(
        self,
        config: dict[str, Any],
        infos: Mapping[str, TensorInfo],
        *,
        options: Mapping[str, Any],
        source: Path | None = None,
    ) -> dict[str, Any]:
        """Return the original config with what only headers, other files and options say.

        Args:
            config: The original config.json.
            infos: Headers of all tensors under original names.
            options: The choices.
            source: The original folder; None on the way back.

        Returns:
            What `build_config` takes.
        """
        return config

    def options_of(self, config: "PreTrainedConfig") -> dict[str, Any]:
        """Return the choices that a native config was made with."""
        return dict(self.options)

    def joins(self, config: "PreTrainedConfig") -> tuple[Join, ...]:
        """Return which tensors of the original are one tensor of the native model."""
        return ()

    def complete_originals(  # noqa: B027 (most sources are kept as they are)
        self, config: dict[str, Any], folder: Path, options: Mapping[str, Any]
    ) -> None:
        """Change what was kept of the source in `folder` where it does not describe what was read."""

    def original_parts(self, config: "PreTrainedConfig") -> dict[str, dict[str, Any]]:
        """Return the parts' original configs for a native one (used when no verbatim copies were kept)."""
        return {}

    def expected_shapes(self, config: "PreTrainedConfig") -> dict[str, tuple[int, ...]]:
        """Return name and shape of every native tensor, without allocating any.

        Args:
            config: The native config.

        Returns:
            Native name to shape.
        """
        from transformers.core_model_loading import revert_weight_conversion

        with torch.device("meta"):
            model = self.build_model(config)
        # Files have the names that save_pretrained gives, which differ from a module's own where versions of
        # Transformers renamed parts of their models.
        stored = revert_weight_conversion(model, model.state_dict())
        return {name: tuple(tensor.shape) for name, tensor in stored.items()}


def register_conversion(conversion: ArchitectureConversion) -> None:
    """Make an architecture known to the converter; several may share an original model_type.

    Args:
        conversion: The architecture.

    Raises:
        ValueError: if another one has its name.
    """
    known = CONVERSIONS.get(conversion.name)
    if known is not None and type(known) is not type(conversion):
        raise ValueError(f"a conversion named {conversion.name!r} is registered already: {type(known).__name__}.")
    CONVERSIONS[conversion.name] = conversion


def find_conversion(config: dict[str, Any], model_type: str = "auto") -> ArchitectureConversion:
    """Choose the architecture for an original config: of those with its model_type the one that accepts it.

    Args:
        config: The original config.json.
        model_type: "auto" to go by the config, or a native model_type to insist on.

    Returns:
        The architecture.

    Raises:
        ValueError: if no architecture fits.
    """
    if model_type != "auto":
        if model_type not in CONVERSIONS:
            raise ValueError(f"model type {model_type!r} is unknown; expected auto or one of {sorted(CONVERSIONS)}.")
        return CONVERSIONS[model_type]
    given = config.get("model_type")
    if given in CONVERSIONS:
        raise ValueError(
            f"this folder is in the Transformers layout already (model_type {given!r}); load it as it is, or use "
            "--reverse to get the original layout back."
        )
    fitting = [conversion for conversion in CONVERSIONS.values() if given in conversion.original_model_types]
    if len(fitting) == 1:
        return fitting[0]
    reasons = []
    for conversion in fitting:
        try:
            conversion.check_config(config)
            return conversion
        except ValueError as error:
            reasons.append(f"not {conversion.name}: {error}")
    if reasons:
        raise ValueError(
            f"model_type {given!r} is that of several architectures, and this is none of them.\n" + "\n".join(reasons)
        )
    known = ", ".join(f"{kind} ({c.name})" for c in CONVERSIONS.values() for kind in c.original_model_types)
    raise ValueError(
        f"config.json has model_type {given!r}; originals that can be converted: {known}. If the file is one of these "
        f"under another name, insist with --model-type ({', '.join(sorted(CONVERSIONS))})."
    )


def choose_options(conversion: ArchitectureConversion, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the choices with defaults filled in, and refuse those that the architecture does not have."""
    chosen = {name: value for name, value in given.items() if value is not None and value != ()}
    for name in chosen:
        if name not in conversion.options:
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{flag} was given, but {conversion.name} has no such choice; leave it out.")
    return {**conversion.options, **chosen}


def native_shapes(conversion: ArchitectureConversion, config: "PreTrainedConfig") -> dict[str, tuple[int, ...]]:
    """Return the shapes the native model expects, with impossible configs as a ValueError."""
    try:
        return conversion.expected_shapes(config)
    except (TypeError, KeyError, RuntimeError, ZeroDivisionError) as error:
        raise ValueError(f"config.json does not describe a {conversion.name} that can be built: {error}") from error
