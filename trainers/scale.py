"""Scale on existing engines: the shipped settings of accelerate, what cannot work, and checkpoints out of shards."""

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from longvideo.trainers.freezing import is_peft_model

CONFIGS_DIR = Path(__file__).parent / "accelerate_configs"
# Where accelerate puts the shards of the weights inside a checkpoint.
SHARDS = "pytorch_model_fsdp_0"
SHARDS_METADATA = ".metadata"


def accelerate_config(name: str) -> str:
    """Find one of the shipped settings for `accelerate launch --config_file`.

    Args:
        name: "single_gpu", "ddp", "fsdp2", "zero2" or "zero3".

    Returns:
        Path of its file.

    Raises:
        FileNotFoundError: No such settings; the text lists those that exist.
    """
    path = CONFIGS_DIR / f"{name}.yaml"
    if not path.is_file():
        known = sorted(file.stem for file in CONFIGS_DIR.glob("*.yaml"))
        raise FileNotFoundError(f"No accelerate settings {name!r}; there are {known}.")
    return str(path)


def check_parallelism(accelerator: Any, config: Any = None) -> None:
    """Raise an error where an engine splits what a video model cannot have split.

    Args:
        accelerator: `accelerate.Accelerator` of a trainer.
        config: Configuration of the model.

    Raises:
        ValueError: Context or sequence parallelism, or sharded weights of which single rows are read.
    """
    plugin = getattr(getattr(accelerator, "state", None), "fsdp_plugin", None)
    reads_rows = getattr(config, "num_coordinate_tokens", 0) and config.coordinate_layout == "folded"
    if plugin is not None and reads_rows:
        raise ValueError(
            "FSDP keeps the head in pieces while the model reads the rows of its coordinate tokens there. Call "
            "model.unfold_coordinates() before training: tables of their own are whole while the model runs. "
            "model.fold_coordinates() undoes it."
        )
    wanted = getattr(accelerator, "parallelism_config", None)
    for kind, size in (("context", getattr(wanted, "cp_size", 1)), ("sequence", getattr(wanted, "sp_size", 1))):
        if size > 1:
            raise ValueError(
                f"{kind} parallelism over {size} processes cuts token ids into pieces before the model runs, but the "
                "visual tokens of a video belong to the whole sequence, whose length the model may change. Use fsdp2 "
                "or zero3 with gradient_checkpointing=True, and fewer frames per row (processor_kwargs)."
            )


def consolidate_checkpoint(
    checkpoint: str | os.PathLike, output: str | os.PathLike, *, model: PreTrainedModel
) -> PreTrainedModel:
    """Turn the shards of an FSDP checkpoint into a folder that `from_pretrained` loads anywhere.

    One process, on a CPU, whatever the number of processes that saved. Full checkpoints need none of this.

    Args:
        checkpoint: Folder `checkpoint-N` saved with `fsdp_state_dict_type: SHARDED_STATE_DICT`, or the folder of
            shards inside.
        output: Folder to write, which must not exist: configuration, safetensors, and processor files that the
            checkpoint holds. An adapter's checkpoint gives an adapter's folder.
        model: A model of the same sizes, with the adapter where one was trained; its weights are replaced.

    Returns:
        `model` with the weights of the checkpoint.

    Raises:
        FileNotFoundError: No shards there.
        FileExistsError: `output` is there already.
        ValueError: Shards of another model.
    """
    from torch.distributed.checkpoint import FileSystemReader, load

    checkpoint, output = Path(checkpoint), Path(output)
    shards = checkpoint / SHARDS if (checkpoint / SHARDS).is_dir() else checkpoint
    if not (shards / SHARDS_METADATA).is_file():
        raise FileNotFoundError(
            f"{checkpoint} holds no sharded weights ({SHARDS}/{SHARDS_METADATA} is missing). Full checkpoints load "
            "with from_pretrained as they are."
        )
    if output.exists():
        raise FileExistsError(f"{output} is there already. Name a folder that is not, or remove it.")
    reader = FileSystemReader(str(shards))
    stored = {name.removeprefix("model."): name for name in reader.read_metadata().state_dict_metadata}
    state = _own_state(model)
    # Of tied tensors one name is enough.
    filled = {tensor.data_ptr() for name, tensor in state.items() if name in stored}
    missing = sorted(name for name in set(state) - set(stored) if state[name].data_ptr() not in filled)
    if missing:
        raise ValueError(
            f"{checkpoint} holds no {missing[0]!r} for this {type(model).__name__}, and misses {len(missing) - 1} "
            "more: it was saved from another model. Build the one that was trained, with its adapter if it had one."
        )
    wanted = {stored[name]: tensor for name, tensor in state.items() if name in stored}
    load(wanted, storage_reader=reader, no_dist=True)
    if is_peft_model(model):
        from peft import set_peft_model_state_dict

        set_peft_model_state_dict(model, state)
    temporary = output.with_name(output.name + ".part")
    model.save_pretrained(temporary)
    for file in checkpoint.iterdir():
        wanted_file = file.suffix in (".json", ".jinja", ".txt", ".model") and file.name != "trainer_state.json"
        if wanted_file and not (temporary / file.name).exists():
            shutil.copy2(file, temporary / file.name)
    os.replace(temporary, output)
    return model


def _own_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Returns what a checkpoint of a model holds: of a PEFT model the adapter alone."""
    if not is_peft_model(model):
        return model.state_dict()
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(model, save_embedding_layers=False)


def is_sharded(trainer: Any) -> bool:
    """Whether every process holds only a part of each weight.

    Args:
        trainer: A `transformers.Trainer`.

    Returns:
        True under FSDP and ZeRO stage 3.
    """
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    return bool(trainer.is_fsdp_enabled) or (plugin is not None and plugin.zero_stage == 3)
