"""What the processes of the tests of scale run: short trainings, whose losses and weights they write down.

Run with `python -m torch.distributed.run --nproc_per_node 2 scale_worker.py FOLDER WORD...`, or with python alone. A
word is the kind of a model, behind it `-lora` for an adapter and `-dpo` for preferences, then `-save` for checkpoints
every two steps, or `-resume` to go on from the first checkpoint of the word with `-save`. The word `long` is a run to
be killed.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from transformers import TrainerCallback

from longvideo.trainers import VideoDPOConfig, VideoDPOTrainer, VideoSFTConfig, VideoSFTTrainer, lora_config
from tests.trainers.dpo_runs import pairs_of
from tests.trainers.zoo import VARIANTS, make_model, rows_of

LEARNS = ["connector", "language_model"]


class WriteLosses(TrainerCallback):
    """Appends every logged loss to a file, at once: a killed process has written its own.

    Args:
        path: The file, a line of JSON per step.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and "loss" in (logs or {}):
            with self.path.open("a", encoding="utf-8") as file:
                values = [logs.get(name) for name in ("loss", "grad_norm", "rewards/margins", "logps/rejected")]
                file.write(json.dumps([state.global_step, *values]) + "\n")


def make_trainer(
    folder: Path, name: str, *, model_kwargs: dict[str, Any] | None = None, **args: Any
) -> VideoSFTTrainer:
    """A trainer of four steps with a global batch of two rows, whatever the number of processes.

    Args:
        folder: Where checkpoints and the file `losses.jsonl` go.
        name: Key of `VARIANTS`, with `-lora` where the model gets an adapter, and `-dpo` where it learns preferences:
            with the adapter switched off as the reference, or with one computed before.
        model_kwargs: Given to the maker of the model.
        **args: Settings in place of these.

    Returns:
        The trainer.
    """
    folder.mkdir(parents=True, exist_ok=True)
    plain = name.removesuffix("-dpo")
    kind = plain.removesuffix("-lora")
    dpo, lora = plain != name, kind != plain
    model = make_model(kind, **(model_kwargs or {}))
    if lora:
        import peft

        model = peft.get_peft_model(model, lora_config(model, r=2))
    num_processes = int(os.environ.get("WORLD_SIZE", 1))
    settings = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 2 // num_processes,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "ddp_backend": "gloo" if num_processes > 1 else None,
        "disable_tqdm": True,
        # Black pictures would do for rows without video; these have all one.
        "trainable_parts": None if lora else LEARNS,
    }
    if dpo:
        settings |= {"beta": 0.5, "precompute_reference": not lora}
    trainer_class, config_class = (VideoDPOTrainer, VideoDPOConfig) if dpo else (VideoSFTTrainer, VideoSFTConfig)
    config = config_class(**{**settings, **args})
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        # accelerate shards on every device but a CPU, where torch could do it as well.
        config.distributed_state.distributed_type = DistributedType.MULTI_GPU
    return trainer_class(
        model,
        config,
        train_dataset=pairs_of(kind) if dpo else rows_of(kind),
        processing_class=VARIANTS[kind].processor(),
        callbacks=[WriteLosses(folder / "losses.jsonl")],
    )


def facts(trainer: VideoSFTTrainer) -> dict[str, Any]:
    """How a run was distributed, and which share of the weights this process held."""
    weights = list(trainer.model_wrapped.parameters())
    held = sum((x.to_local() if hasattr(x, "to_local") else x).numel() for x in weights)
    return {
        "type": trainer.accelerator.distributed_type.value,
        "processes": trainer.args.world_size,
        "share": held / sum(x.numel() for x in weights),
    }


def make_long_trainer(folder: Path) -> VideoSFTTrainer:
    """A trainer of ten steps with random numbers in its model, and a checkpoint after every step."""
    dropout = {"text_kwargs": {"attention_dropout": 0.2}}
    saves = {"max_steps": 10, "save_strategy": "steps", "save_steps": 1}
    return make_trainer(folder, "videochat_flash", model_kwargs=dropout, **saves)


def run(root: Path, word: str) -> None:
    """Does what a word says."""
    folder = root / word
    if word == "long":
        make_long_trainer(folder).train()
        return
    name = word.removesuffix("-save").removesuffix("-resume")
    saves = {"save_strategy": "steps", "save_steps": 2} if word != name else {}
    trainer = make_trainer(folder, name, **saves)
    start = str(root / f"{name}-save" / "checkpoint-2") if word.endswith("-resume") else None
    trainer.train(resume_from_checkpoint=start)
    trainer.save_model(str(folder / "final"))
    if trainer.is_world_process_zero():
        (folder / "facts.json").write_text(json.dumps(facts(trainer)), encoding="utf-8")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for given in sys.argv[2:]:
        run(Path(sys.argv[1]), given)
    if torch.distributed.is_initialized():
        # Threads of a group that is left standing may abort the process while it ends.
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
