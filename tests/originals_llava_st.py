"""Makers of small LLaVA-ST checkpoints in the layout of the original repository: the merged model, and its stages."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from longvideo.conversion import CONVERSIONS
from longvideo.conversion.llava_st_config import EMBEDDING, HEAD, TABLES, VISION
from tests.originals_longvu import write_part
from tests.tiny_llava_st import tiny_llava_st_model
from tests.tiny_llava_st_processor import tiny_llava_st_tokenizer

State = dict[str, torch.Tensor]
PREFIX = "base_model.model."
NUM_TEMPLATES = 6
LORA_TARGETS = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj")


def original_llava_st(**kwargs: Any) -> tuple[State, dict[str, Any]]:
    """Weights and config of a tiny LLaVA-ST under the original's names, with the norm that nothing uses."""
    model = tiny_llava_st_model(coordinate_layout="split", **kwargs)
    conversion = CONVERSIONS["llava_st"]
    config = conversion.original_config(model.config)
    rename = conversion.key_map(config).inverse().rename
    shapes = conversion.expected_shapes(model.config)
    state = {rename(name): tensor.detach().clone() for name, tensor in model.state_dict().items() if name in shapes}
    assert len(state) == len(shapes)
    width = model.config.vision_config.hidden_size
    return state | {f"{VISION}post_layernorm.{kind}": torch.randn(width) for kind in ("weight", "bias")}, config


def write_llava_st_original(
    folder: Path,
    *,
    state: State | None = None,
    config: dict[str, Any] | None = None,
    tokenizer: tuple[int, int] | None = None,
    num_shards: int = 1,
    kind: str = "safetensors",
    **kwargs: Any,
) -> State:
    """Write such a checkpoint.

    Args:
        folder: Folder to create.
        state: Weights in place of random ones.
        config: Entries that replace those of the config; None takes an entry out.
        tokenizer: Numbers of times and of heights of a tiny tokenizer that is written too.
        num_shards: Number of weight files.
        kind: "safetensors" or "bin".
        **kwargs: Settings of the tiny model.

    Returns:
        The weights as written.
    """
    made, made_config = original_llava_st(**kwargs)
    state = made if state is None else state
    changed = {**made_config, **(config or {})}
    changed = {name: value for name, value in changed.items() if value is not None or name not in (config or {})}
    write_part(folder, state, changed, num_shards=num_shards, kind=kind)
    if tokenizer is not None:
        tiny_llava_st_tokenizer(*tokenizer).save_pretrained(folder)
    return state


def stage_one(state: State, config: dict[str, Any]) -> tuple[State, dict[str, Any]]:
    """The full model before coordinates are added: no templates, no tables."""
    rows = config["vocab_size"] - NUM_TEMPLATES
    first = {name: tensor for name, tensor in state.items() if name not in TABLES}
    first |= {name: state[name][:rows].clone() for name in (EMBEDDING, HEAD)}
    left_out = ("num_spatial_tokens", "num_temporal_tokens")
    return first, {**{k: v for k, v in config.items() if k not in left_out}, "vocab_size": rows}


def write_stage(
    folder: Path,
    state: State,
    *,
    seed: int,
    rank: int = 2,
    alpha: int = 6,
    change: dict[str, Any] | None = None,
) -> tuple[State, State]:
    """Write a later stage: an adapter for two matrices, and embedding, packers and tables trained themselves.

    Args:
        folder: Folder to create; one named checkpoint-N gets the layout of a training state.
        state: A full model, whose shapes the trained tensors have.
        seed: Of the random values.
        rank: Of the adapter.
        alpha: Of the adapter.
        change: Entries of adapter_config.json.

    Returns:
        The adapter and the trained tensors, under the names of the model.
    """
    generator = torch.Generator().manual_seed(seed)

    def values(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    trained = {
        name: values(*tensor.shape)
        for name, tensor in state.items()
        if name == EMBEDDING or name in TABLES or "vision_resampler" in name
    }
    adapter = {}
    for target in LORA_TARGETS:
        out_features, in_features = state[f"{target}.weight"].shape
        adapter |= {f"{target}.lora_A": values(rank, in_features), f"{target}.lora_B": values(out_features, rank)}
    folder.mkdir()
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "bias": "none", "modules_to_save": None}
    (folder / "adapter_config.json").write_text(json.dumps({**settings, **(change or {})}))
    extra = {f"{PREFIX}{name}": tensor for name, tensor in trained.items()}
    if folder.name.startswith("checkpoint-"):
        step = folder / f"global_step{folder.name.removeprefix('checkpoint-')}"
        step.mkdir()
        inside = {f"{PREFIX}{name}.default.weight": tensor for name, tensor in adapter.items()}
        torch.save({"module": extra | inside, "ds_version": "0.14"}, step / "mp_rank_00_model_states.pt")
    else:
        torch.save(extra, folder / "non_lora_trainables.bin")
        named = {f"{PREFIX}{name}.weight": tensor for name, tensor in adapter.items()}
        save_file(named, folder / "adapter_model.safetensors")
    return adapter, trained
