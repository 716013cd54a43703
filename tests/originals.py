"""Makers of small checkpoints in the layouts of the original repositories."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from longvideo.conversion import CONVERSIONS
from tests.tiny import tiny_tokenizer, tiny_videochat_flash_model


def original_state(tower: str = "umt_vision_model", **kwargs: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Weights and config of a tiny VideoChat-Flash under the original's names."""
    model = tiny_videochat_flash_model(tower=tower, **kwargs)
    conversion = CONVERSIONS["videochat_flash"]
    config = {**conversion.original_config(model.config), "model_type": "llava_qwen_flash", "torch_dtype": "float32"}
    rename = conversion.key_map(config).inverse().rename
    return {rename(name): tensor.detach().clone() for name, tensor in model.state_dict().items()}, config


def write_original(
    folder: Path,
    *,
    tower: str = "umt_vision_model",
    num_shards: int = 1,
    kind: str = "safetensors",
    tokenizer: bool = False,
    state: dict[str, torch.Tensor] | None = None,
    config: dict[str, Any] | None = None,
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Write such a checkpoint.

    Args:
        folder: Folder to create.
        tower: The tower's model_type.
        num_shards: Number of weight files; more than one gets an index.
        kind: "safetensors" or "bin".
        tokenizer: Whether the tiny tokenizer is written too.
        state: Weights in place of the random ones.
        config: Entries that replace those of the config.

    Returns:
        Weights and config as written.
    """
    made, made_config = original_state(tower)
    state, config = made if state is None else state, {**made_config, **(config or {})}
    folder.mkdir(parents=True)
    if tokenizer:
        tiny_tokenizer().save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    stem, suffix = ("model", "safetensors") if kind == "safetensors" else ("pytorch_model", "bin")
    names = list(state)
    files = {}
    for i in range(num_shards):
        part = {name: state[name].contiguous() for name in names[i::num_shards]}
        file = f"{stem}.{suffix}" if num_shards == 1 else f"{stem}-{i + 1:05d}-of-{num_shards:05d}.{suffix}"
        save_file(part, folder / file) if kind == "safetensors" else torch.save(part, folder / file)
        files |= dict.fromkeys(part, file)
    if num_shards > 1:
        index = {"metadata": {"total_size": sum(t.nbytes for t in state.values())}, "weight_map": files}
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    return state, config


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """All safetensors weights of a folder."""
    from safetensors.torch import load_file

    state: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        state |= load_file(path)
    return state


def assert_same_bits(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    """Same names, dtypes, shapes and bits (so that NaN and -0.0 count as they are)."""
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        other = second[name]
        assert tensor.dtype == other.dtype and tensor.shape == other.shape, name
        one, two = (x.contiguous().reshape(-1).view(torch.uint8) for x in (tensor, other))
        assert torch.equal(one, two), name


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its content."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
