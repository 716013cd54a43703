"""LoRA adapters of the granularities by peft: making, switching, and a folder for each in a checkpoint.

A checkpoint holds `adapters/coarse` and `adapters/fine`, each as peft writes it (`adapter_config.json`,
`adapter_model.safetensors`) beside `projector.safetensors`, the projector of that granularity.
"""

import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import cached_file

from longvideo.modeling.crossvllm.configuration_crossvllm import GRANULARITIES

if TYPE_CHECKING:
    import peft

FOLDER = "adapters"
CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PROJECTOR_FILE = "projector.safetensors"
# Names in the files are those of the class with a head, behind what peft puts in front.
PEFT_PREFIX = "base_model.model."
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")


def import_peft() -> "peft":
    """Returns the package peft, or says what to install."""
    try:
        import peft
    except ImportError as error:
        raise ImportError(
            'LoRA adapters of CrossVLLM need the package peft: pip install "longvideo[train]", or pip install peft. '
            "The base alone loads with from_pretrained(..., adapters=False)."
        ) from error
    return peft


def new_lora_config(model: PreTrainedModel, **lora: object) -> "peft.LoraConfig":
    """Describes a new adapter: LoRA on all linear layers of the decoder, never on tower, projectors or head.

    Args:
        model: with or without head; its configuration gives rank, alpha and dropout.
        **lora: fields of `peft.LoraConfig` that win.
    """
    decoder, config = model.base_model.language_model, model.config
    linear = sorted({name.rsplit(".", 1)[-1] for name, part in decoder.named_modules() if isinstance(part, nn.Linear)})
    settings = {
        "r": config.lora_r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "target_modules": rf"(?:.*\.)?language_model\..*\.(?:{'|'.join(linear)})",
    }
    return import_peft().LoraConfig(**{**settings, **lora})


@contextmanager
def keep_requires_grad(module: nn.Module) -> Iterator[None]:
    """Lets the parameters that are there learn, or not, as before the block: peft decides about that by itself."""
    before = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    try:
        yield
    finally:
        for parameter, flag in before:
            parameter.requires_grad_(flag)


def inject_adapter(model: PreTrainedModel, lora_config: "peft.LoraConfig", name: str) -> None:
    """Puts a fresh adapter into a model with or without head; which one is active stays open."""
    peft = import_peft()
    with warnings.catch_warnings():
        # Several adapters are what we want.
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        peft.inject_adapter_in_model(lora_config, model, name)
    model._hf_peft_config_loaded = True
    # New layers drop inputs until they are told that the model does not learn.
    model.train(model.training)


def activate_adapter(decoder: nn.Module, name: str) -> None:
    """Makes an adapter the active one without changing which weights learn, as peft's own switch does."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for layer in decoder.modules():
        if isinstance(layer, BaseTunerLayer) and layer.active_adapters != [name]:
            with keep_requires_grad(layer):
                layer.set_adapter(name)


def adapter_weights(
    model: PreTrainedModel, name: str, state_dict: dict[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """Returns the weights of an adapter, without its name in theirs."""
    from peft import get_peft_model_state_dict

    # "auto" would look on the Hub whether the vocabulary has grown.
    return get_peft_model_state_dict(model, state_dict=state_dict, adapter_name=name, save_embedding_layers=False)


def copy_adapter(model: PreTrainedModel, source: str, target: str) -> None:
    """Overwrites an adapter's weights by those of another one."""
    from peft import set_peft_model_state_dict

    with torch.no_grad():
        set_peft_model_state_dict(model, adapter_weights(model, source), adapter_name=target)


def split_state_dict(
    model: PreTrainedModel, state_dict: dict[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Splits a state dict with adapters.

    Args:
        model: with or without head.
        state_dict: its weights.

    Returns:
        The weights of the base, under the names of a model without adapters, and those of the adapters. Adapters and
        projectors of references are in neither.
    """
    references = tuple(f"projectors.{name}." for name in model.base_model._references)
    base, lora = {}, {}
    for key, value in state_dict.items():
        if any(part.startswith("lora_") for part in key.split(".")):
            lora[key] = value
        elif not any(prefix in key for prefix in references):
            base[key.replace(".base_layer.", ".")] = value
    return base, lora


def _head_prefix(model: PreTrainedModel) -> str:
    """What stands before a bare model's names in the class with a head."""
    return f"{model.base_model_prefix}." if model.base_model is model else ""


def save_adapters(
    model: PreTrainedModel, folder: str | os.PathLike, state_dict: dict[str, torch.Tensor] | None = None
) -> None:
    """Writes the adapter and the projector of each granularity, every file under a temporary name first.

    Args:
        model: with or without head, with adapters.
        folder: of the checkpoint; gets `adapters/coarse` and `adapters/fine`.
        state_dict: weights to write in place of the model's own.
    """
    state_dict = model.state_dict() if state_dict is None else state_dict
    _, lora = split_state_dict(model, state_dict)
    core = "" if model.base_model is model else f"{model.base_model_prefix}."
    for name in GRANULARITIES:
        target = Path(folder, FOLDER, name)
        target.mkdir(parents=True, exist_ok=True)
        prefix = PEFT_PREFIX + _head_prefix(model)
        weights = {prefix + key: x.contiguous() for key, x in adapter_weights(model, name, lora).items()}
        start = f"{core}projectors.{name}."
        projector = {key[len(start) :]: x.contiguous() for key, x in state_dict.items() if key.startswith(start)}
        settings = model.peft_config[name]
        # Where this model happened to be loaded from says nothing to others.
        settings.base_model_name_or_path = model.config.base_model_name_or_path
        with tempfile.TemporaryDirectory(dir=target) as scratch:
            settings.save_pretrained(scratch)
            save_file(weights, Path(scratch, WEIGHTS_FILE), metadata={"format": "pt"})
            save_file(projector, Path(scratch, PROJECTOR_FILE), metadata={"format": "pt"})
            for file in (CONFIG_FILE, WEIGHTS_FILE, PROJECTOR_FILE):
                os.replace(Path(scratch, file), target / file)


def load_adapters(model: PreTrainedModel, checkpoint: str | os.PathLike, **hub: object) -> None:
    """Puts the saved adapters and projectors of a checkpoint into a model without adapters.

    Args:
        model: with or without head.
        checkpoint: folder or Hub id.
        **hub: what `from_pretrained` takes of these: cache_dir, force_download, local_files_only, token, revision,
            subfolder.

    Raises:
        ImportError: peft is not installed.
        OSError: a file is missing.
        ValueError: adapters that do not fit this model; it is left with what was loaded so far.
    """
    peft = import_peft()
    hub = {name: hub[name] for name in HUB_OPTIONS if hub.get(name) is not None}
    for name in GRANULARITIES:
        paths = [
            cached_file(checkpoint, f"{FOLDER}/{name}/{file}", **hub)
            for file in (CONFIG_FILE, WEIGHTS_FILE, PROJECTOR_FILE)
        ]
        inject_adapter(model, peft.LoraConfig.from_pretrained(os.path.dirname(paths[0])), name)
        _fill_adapter(model, name, load_file(paths[1]), f"{checkpoint}/{FOLDER}/{name}")
        _fill_projector(model, name, load_file(paths[2]), f"{checkpoint}/{FOLDER}/{name}")
    model._finish_adapters()


def _fill_adapter(model: PreTrainedModel, name: str, stored: dict[str, torch.Tensor], where: str) -> None:
    from peft import set_peft_model_state_dict

    prefix = PEFT_PREFIX + _head_prefix(model)
    weights = {key.removeprefix(prefix): x for key, x in stored.items()}
    wanted = {key: tuple(x.shape) for key, x in adapter_weights(model, name).items()}
    given = {key: tuple(x.shape) for key, x in weights.items()}
    if wanted != given:
        differing = sorted(key for key in {*wanted, *given} if wanted.get(key) != given.get(key))
        raise ValueError(
            f"The adapter in {where} does not fit this model: {len(differing)} weights are missing, too many or of "
            f"another shape, the first is {differing[0]} (stored {given.get(differing[0])}, expected "
            f"{wanted.get(differing[0])}). Load it with the base that it was trained on."
        )
    with torch.no_grad():
        set_peft_model_state_dict(model, weights, adapter_name=name)


def _fill_projector(model: PreTrainedModel, name: str, stored: dict[str, torch.Tensor], where: str) -> None:
    try:
        model.base_model.projectors[name].load_state_dict(stored)
    except RuntimeError as error:
        raise ValueError(f"The projector in {where} does not fit this model: {error}") from error
