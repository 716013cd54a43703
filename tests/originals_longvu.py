"""Makers of small LongVU checkpoints in the layout of the original repository, with their towers beside them."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers.core_model_loading import revert_weight_conversion

from longvideo.conversion import CONVERSIONS
from tests.tiny import tiny_tokenizer
from tests.tiny_longvu import tiny_longvu_model

SIGLIP, DINO = "towers/siglip", "towers/dinov2"
State = dict[str, torch.Tensor]


def unused_end(width: int, inner: int) -> State:
    """What SigLIP has behind its encoder and the native model has not: the last norm and the pooling head."""
    shapes = {
        "probe": (1, 1, width),
        "attention.in_proj_weight": (3 * width, width),
        "attention.in_proj_bias": (3 * width,),
        "attention.out_proj.weight": (width, width),
        "attention.out_proj.bias": (width,),
        "layernorm.weight": (width,),
        "layernorm.bias": (width,),
        "mlp.fc1.weight": (inner, width),
        "mlp.fc1.bias": (inner,),
        "mlp.fc2.weight": (width, inner),
        "mlp.fc2.bias": (width,),
    }
    head = {f"vision_model.head.{name}": torch.randn(shape) for name, shape in shapes.items()}
    return {**head, **{f"vision_model.post_layernorm.{name}": torch.randn(width) for name in ("weight", "bias")}}


def text_half(width: int = 8) -> State:
    """Some of what the public SigLIP repository holds besides the vision half."""
    return {
        "logit_scale": torch.randn(1),
        "logit_bias": torch.randn(1),
        "text_model.embeddings.token_embedding.weight": torch.randn(20, width),
        "text_model.embeddings.position_embedding.weight": torch.randn(4, width),
        "text_model.encoder.layers.0.self_attn.q_proj.weight": torch.randn(width, width),
        "text_model.encoder.layers.0.mlp.fc2.bias": torch.randn(width),
        "text_model.final_layer_norm.weight": torch.randn(width),
        "text_model.head.weight": torch.randn(width, width),
    }


def original_longvu(**kwargs: Any) -> tuple[dict[str, State], dict[str, dict[str, Any]]]:
    """Weights and configs of a tiny LongVU under the original's names: the checkpoint ("") and both towers."""
    model = tiny_longvu_model(**kwargs)
    conversion = CONVERSIONS["longvu"]
    configs = {"": conversion.original_config(model.config), **conversion.original_parts(model.config)}
    rename = conversion.key_map(configs[""]).inverse().rename
    states: dict[str, State] = {"": {}, SIGLIP: {}, DINO: {}}
    for name, tensor in revert_weight_conversion(model, model.state_dict()).items():
        original = rename(name)
        part = next((part for part in (SIGLIP, DINO) if original.startswith(f"{part}/")), "")
        states[part][original[len(part) + 1 if part else 0 :]] = tensor.detach().clone()
    if model.config.tie_word_embeddings:
        del states[""]["lm_head.weight"]
    vision = model.config.vision_config
    states[SIGLIP] |= unused_end(vision.hidden_size, vision.intermediate_size)
    states[DINO]["embeddings.mask_token"] = torch.randn(1, model.config.dino_config.hidden_size)
    return states, configs


def with_towers_inside(states: dict[str, State]) -> State:
    """The checkpoint of a run that trained the towers."""
    inside = dict(states[""])
    for number, part in enumerate((SIGLIP, DINO)):
        inside |= {f"model.vision_tower_aux_list.{number}.vision_tower.{name}": t for name, t in states[part].items()}
    return inside


def write_part(
    folder: Path, state: State, config: dict[str, Any], *, num_shards: int = 1, kind: str = "safetensors"
) -> None:
    """Write one checkpoint folder; more than one shard gets an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    stem, suffix = ("model", "safetensors") if kind == "safetensors" else ("pytorch_model", "bin")
    files = {}
    for i in range(num_shards):
        part = {name: state[name].contiguous() for name in list(state)[i::num_shards]}
        file = f"{stem}.{suffix}" if num_shards == 1 else f"{stem}-{i + 1:05d}-of-{num_shards:05d}.{suffix}"
        save_file(part, folder / file) if kind == "safetensors" else torch.save(part, folder / file)
        files |= dict.fromkeys(part, file)
    if num_shards > 1:
        index = {"metadata": {"total_size": sum(t.nbytes for t in state.values())}, "weight_map": files}
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))


def write_longvu_original(
    folder: Path,
    *,
    states: dict[str, State] | None = None,
    configs: dict[str, dict[str, Any]] | None = None,
    config: dict[str, Any] | None = None,
    towers: bool = True,
    tokenizer: bool = False,
    num_shards: int = 1,
    kind: str = "safetensors",
    **kwargs: Any,
) -> dict[str, State]:
    """Write such a checkpoint.

    Args:
        folder: Folder to create.
        states: Weights in place of random ones, by part.
        configs: Configs that belong to them.
        config: Entries that replace those of the checkpoint's config; None takes an entry out.
        towers: Whether the towers are written into the folder.
        tokenizer: Whether the tiny tokenizer is written too.
        num_shards: Number of weight files of every part.
        kind: "safetensors" or "bin".
        **kwargs: Settings of the tiny model.

    Returns:
        The weights as written.
    """
    if states is None or configs is None:
        made = original_longvu(**kwargs)
        states, configs = states or made[0], configs or made[1]
    changed = {**configs[""], **(config or {})}
    changed = {name: value for name, value in changed.items() if value is not None}
    write_part(folder, states[""], changed, num_shards=num_shards, kind=kind)
    if tokenizer:
        tiny_tokenizer().save_pretrained(folder)
    for part in (SIGLIP, DINO) if towers else ():
        write_part(folder / part, states[part], configs[part], num_shards=num_shards, kind=kind)
    return states
