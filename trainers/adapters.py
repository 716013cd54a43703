"""LoRA adapters: which modules they sit on, which rows and modules are saved beside them, and checked loading."""

import json
import os
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from longvideo.trainers.sft_config import PART_MODULES, part_of

if TYPE_CHECKING:
    import peft

logger = logging.get_logger(__name__)

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
STORED_PREFIX = "base_model.model."
# Levels that PEFT puts into the names of a model's modules.
_PEFT_LEVELS = re.compile(r"\.(?:base_layer|original_module|token_adapter|modules_to_save\.\w+)(?=\.)")
CONNECTOR_CHOICES = (False, True, "lora", "full")
# Left out: through a matrix of low rank every token's row would change.
HEAD = "lm_head"


def lora_config(
    model: PreTrainedModel,
    *,
    r: int = 16,
    alpha: int | None = None,
    dropout: float = 0.0,
    connector: bool | str = False,
    new_tokens: Sequence[int] = (),
    coordinates: bool = True,
    modules_to_save: Sequence[str] = (),
    **kwargs: Any,
) -> "peft.LoraConfig":
    """Describe the adapter of a model: LoRA on all linear layers of its decoder, never on its towers.

    Use: `peft.get_peft_model(model, lora_config(model, r=16))`. Linear layers are looked up in the model, so layers
    that an architecture adds to its decoder (cross-attention) count, and quantized ones do. A cross-attention whose
    gate is closed passes no gradient to an adapter inside; it is trained and saved whole, with its gates.

    The two adapters that a CrossVLLM has itself are none of these: `model.add_adapters` makes them, its checkpoints
    hold them, and stages train one or both. On a CrossVLLM without them this adapter serves both granularities.

    Args:
        model: Model of this library, without adapters.
        r: Rank.
        alpha: LoRA's alpha; None for 2 r.
        dropout: Share of inputs dropped before LoRA's first matrix.
        connector: Whether what joins towers and decoder learns: False, True or "lora" (LoRA on its linear layers), or
            "full" (its modules are trained and saved whole; single tensors beside them, as LongVU's query, are not).
        new_tokens: Ids of tokens whose rows of embedding and head are trained and saved; no other row changes. Resize
            the embeddings before, and before loading the adapter.
        coordinates: Whether coordinate tokens, in a model that has some, are trained and saved with the adapter: their
            rows, or the tables that hold them.
        modules_to_save: More modules to train and save whole, by (the end of) their names.
        **kwargs: Everything else that `peft.LoraConfig` takes, in place of what is chosen here.

    Returns:
        The configuration. Saved with an adapter it names the model's class, which `load_adapter` compares.

    Raises:
        ImportError: peft is not installed.
        ValueError: A model without decoder, with adapters already, or settings that do not fit it.
    """
    peft = _import_peft()
    _check_settings(model, r, connector, new_tokens)
    whole = [*modules_to_save, *_closed_cross_attention(model)]
    if connector == "full":
        whole += _connector_modules(model)
    rows, tables = _coordinate_rows(model) if coordinates else ([], [])
    whole += [name for name in tables if name not in whole]
    rows = sorted({*rows, *new_tokens})
    parts = ("language_model", "connector") if connector in (True, "lora") else ("language_model",)
    names = [name for name, part in _linear_layers(model) if part in parts and not _lies_in(name, whole)]
    if not names:
        raise ValueError(f"{type(model).__name__} has no linear layers in {parts}; its adapter would be empty.")
    settings = {
        "r": r,
        "lora_alpha": 2 * r if alpha is None else alpha,
        "lora_dropout": dropout,
        "target_modules": _as_pattern(names, model),
        "modules_to_save": whole or None,
        "trainable_token_indices": _token_indices(model, rows, whole) if rows else None,
        # Without a task PEFT notes the model's class in what it saves.
        "task_type": None,
    }
    return peft.LoraConfig(**{**settings, **kwargs})


def load_adapter(
    model: PreTrainedModel, folder: str | os.PathLike, *, is_trainable: bool = False, **kwargs: Any
) -> "peft.PeftModel":
    """Put a saved adapter on its base model, after looking whether it belongs there.

    `peft.PeftModel.from_pretrained` does the same without looking: names that do not fit are a warning there, or
    nothing at all.

    Args:
        model: The base model, as `from_pretrained` gives it.
        folder: Folder with `adapter_config.json`, as a trainer's checkpoint is.
        is_trainable: Whether the adapter goes on learning.
        **kwargs: Everything else that `PeftModel.from_pretrained` takes.

    Returns:
        The model with its adapter.

    Raises:
        ImportError: peft is not installed.
        FileNotFoundError: No adapter in the folder.
        ValueError: An adapter of another architecture, or of another size of this one; the model is left as it was.
    """
    peft = _import_peft()
    check_adapter(model, folder)
    return peft.PeftModel.from_pretrained(model, os.fspath(folder), is_trainable=is_trainable, **kwargs)


def check_adapter(model: nn.Module, folder: str | os.PathLike) -> None:
    """Raise an error when a saved adapter does not belong to a model; nothing is loaded.

    Args:
        model: The base model, or a PEFT model around it.
        folder: Folder with `adapter_config.json`.

    Raises:
        ImportError: peft is not installed.
        FileNotFoundError: No adapter in the folder.
        ValueError: An adapter of another architecture, or of another size of this one.
    """
    peft = _import_peft()
    folder = os.fspath(folder)
    path = os.path.join(folder, CONFIG_FILE)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{folder} holds no adapter: {CONFIG_FILE} is missing. Give the folder that it is in.")
    with open(path, encoding="utf-8") as file:
        settings = json.load(file)
    if isinstance(model, peft.PeftModel):
        model = model.get_base_model()
    trained_on = (settings.get("auto_mapping") or {}).get("base_model_class")
    base = settings.get("base_model_name_or_path")
    hint = f"Load the model that it was trained on{f' ({base})' if base else ''}."
    if trained_on not in (None, type(model).__name__):
        raise ValueError(
            f"The adapter in {folder} was trained on a {trained_on}, but this model is a {type(model).__name__}. "
            f"{hint}"
        )
    weights = os.path.join(folder, WEIGHTS_FILE)
    if os.path.isfile(weights):
        _check_weights(model, folder, weights, settings, hint)


def _check_weights(model: nn.Module, folder: str, weights: str, settings: dict[str, Any], hint: str) -> None:
    from safetensors import safe_open

    with safe_open(weights, framework="pt") as file:
        names = list(file.keys())
        stored = {name.removeprefix(STORED_PREFIX): tuple(file.get_slice(name).get_shape()) for name in names}
    modules = {name.replace(".base_layer", ""): module for name, module in model.named_modules()}
    adapted = set()
    for name, shape in stored.items():
        match = re.fullmatch(r"(.+)\.lora_(A|B)(?:\.\w+)?", name)
        if match is None:
            continue
        module = modules.get(match[1])
        if module is None:
            raise ValueError(
                f"The adapter in {folder} has weights for {match[1]!r}, which {type(model).__name__} does not have: "
                f"it belongs to another architecture or to a deeper model. {hint}"
            )
        adapted.add(match[1])
        # Embeddings keep theirs under other names, convolutions have more axes: neither is looked at.
        if len(shape) != 2 or not hasattr(module, "in_features"):
            continue
        found, expected = (shape[1], module.in_features) if match[2] == "A" else (shape[0], module.out_features)
        if found != expected:
            raise ValueError(
                f"The adapter in {folder} has a matrix of {found} features for {match[1]!r}, which has {expected} in "
                f"this {type(model).__name__}: it belongs to a model of another size. {hint}"
            )
    _check_whole_weights(model, folder, stored, settings, hint)
    targets = settings.get("target_modules")
    if isinstance(targets, str):
        absent = [
            name
            for name, module in modules.items()
            if name not in adapted and hasattr(module, "in_features") and re.fullmatch(targets, name)
        ]
        if absent:
            raise ValueError(
                f"The adapter in {folder} has no weights for {absent[0]!r} and {len(absent) - 1} more of its targets "
                f"in this {type(model).__name__}: it belongs to a shallower model. {hint}"
            )


def _check_whole_weights(
    model: nn.Module, folder: str, stored: dict[str, tuple[int, ...]], settings: dict[str, Any], hint: str
) -> None:
    """Look at what is stored beside LoRA's matrices: modules that learnt as a whole, and rows of tokens."""
    own = {}
    for tensors in (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)):
        # A sharded parameter keeps its shape apart, and that of a quantized one says nothing.
        own |= {
            _PEFT_LEVELS.sub("", name): tuple(getattr(x, "ds_shape", x.shape)) if x.is_floating_point() else None
            for name, x in tensors
        }
    indices = settings.get("trainable_token_indices") or []
    for name, shape in stored.items():
        if ".lora_" in name:
            continue
        match = re.fullmatch(r"(.+?)(?:\.token_adapter)?\.trainable_tokens_delta(?:\.\w+)?", name)
        plain = f"{match[1]}.weight" if match else _PEFT_LEVELS.sub("", name)
        if plain not in own:
            raise ValueError(
                f"The adapter in {folder} has weights for {plain!r}, which this {type(model).__name__} does not have: "
                f"modules or tokens were added to the model that it was trained on. {hint}"
            )
        found = own[plain]
        if match:
            rows = indices if isinstance(indices, list) else [row for one in indices.values() for row in one]
            fits = found is None or (found[1] == shape[1] and max(rows, default=0) < found[0])
        else:
            fits = found is None or found == shape
        if not fits:
            raise ValueError(
                f"The adapter in {folder} has {'rows' if match else 'a tensor'} of the shape {list(shape)} for "
                f"{plain!r}, which has {list(found)} in this {type(model).__name__}: another vocabulary or another "
                f"size. {hint}"
            )


# ------------------------------------------------------------------ what the configuration consists of


def _import_peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ImportError("Adapters need peft: pip install 'longvideo[train]'.") from error
    return peft


def _check_settings(model: Any, r: int, connector: bool | str, new_tokens: Sequence[int]) -> None:
    peft = _import_peft()
    if getattr(model, "has_adapters", False):
        raise ValueError(
            f"{type(model).__name__} has adapters of its own, for {' and '.join(model.granularities)}. Train these "
            "(prepare_model='begin_coarse' or 'begin_fine', or model.set_trainable), without another one. For one "
            "adapter that all granularities share, load the base alone: from_pretrained(..., adapters=False)."
        )
    if isinstance(model, peft.PeftModel) or getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(
            "The model has adapters already. Ask for the configuration with the base model, or merge first "
            "(merge_and_unload)."
        )
    if r < 1:
        raise ValueError(f"r={r} must be at least 1.")
    if connector not in CONNECTOR_CHOICES:
        raise ValueError(f"connector={connector!r} must be one of {CONNECTOR_CHOICES}.")
    num_rows = model.get_input_embeddings().weight.shape[0] if new_tokens else 0
    beyond = [token for token in new_tokens if not 0 <= token < num_rows]
    if beyond:
        raise ValueError(
            f"new_tokens has {beyond[0]}, but the embedding has {num_rows} rows. Call "
            "model.resize_token_embeddings(len(tokenizer)) before, and before loading the adapter."
        )


def _linear_layers(model: nn.Module) -> Iterator[tuple[str, str | None]]:
    """Yields names of linear layers and their parts; the head is left out."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] != HEAD:
            yield name, part_of(name)


def _lies_in(name: str, modules: Sequence[str]) -> bool:
    return any(re.search(rf"(^|\.){re.escape(module)}(\.|$)", name) for module in modules)


def _as_pattern(names: Sequence[str], model: nn.Module) -> str:
    """One expression for many names; it is matched whole, so layers of the same end in a tower stay out.

    Numbers are left open where every module counts that differs in them alone, so that an adapter of a deeper or of a
    shallower model is noticed.
    """
    numbers: dict[str, list[str]] = {}
    for name in names:
        numbers.setdefault(re.sub(r"\.\d+(?=\.|$)", ".#", name), []).append(name)
    present = [name for name, _ in model.named_modules()]
    patterns = []
    for shape, members in numbers.items():
        pattern = re.escape(shape).replace(r"\#", r"\d+")
        complete = len(members) == sum(bool(re.fullmatch(pattern, name)) for name in present)
        patterns += [pattern] if complete else [re.escape(name) for name in members]
    return "|".join(patterns)


def _closed_cross_attention(model: nn.Module) -> list[str]:
    """Names of the modules that hold a gate of 0."""
    closed = []
    for name, parameter in model.named_parameters():
        owner, _, own = name.rpartition(".")
        is_gate = own.endswith("_gate") and part_of(name) == "language_model" and not parameter.is_meta
        if is_gate and owner not in closed and not parameter.detach().any():
            closed.append(owner)
    if closed:
        logger.warning_once(
            f"{len(closed)} cross-attention modules have a closed gate, through which no gradient reaches an adapter; "
            "they are trained and saved whole."
        )
    return closed


def _connector_modules(model: nn.Module) -> list[str]:
    """Names of the outermost modules of the connector; lists and tables of modules count by their members."""
    found: list[str] = []
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in PART_MODULES["connector"] and not _lies_in(name, found):
            is_many = isinstance(module, nn.ModuleList | nn.ModuleDict)
            inside = [f"{name}.{key}" for key, _ in module.named_children()] if is_many else [name]
            found += [x for x in inside if any(True for _ in model.get_submodule(x).parameters())]
    return found


def _coordinate_rows(model: nn.Module) -> tuple[list[int], list[str]]:
    """Ids of coordinate tokens in the embedding, and names of tables beside it."""
    count = getattr(model.config, "num_coordinate_tokens", 0)
    tables = [name for name, _ in model.named_modules() if name.rpartition(".")[2] == "coordinates"]
    if not count or tables:
        return [], tables
    start = model.config.coordinate_token_start
    return list(range(start, start + count)), []


def _token_indices(model: PreTrainedModel, rows: list[int], whole: Sequence[str]) -> dict[str, list[int]]:
    """Rows by module: embedding and head, less what is saved whole; the rows of a tied head follow by themselves."""
    modules = {"input": model.get_input_embeddings(), "output": model.get_output_embeddings()}
    names = {name: side for name, module in model.named_modules() for side, x in modules.items() if module is x}
    if model.config.tie_word_embeddings:
        names = {name: side for name, side in names.items() if side == "input"}
    heights = {name: model.get_submodule(name).weight.shape[0] for name in names}
    return {name: [row for row in rows if row < heights[name]] for name in names if not _lies_in(name, whole)}
