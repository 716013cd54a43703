"""What a process of the test of two processes runs: two pairs of steps over scripted policies.

Run with `python -m torch.distributed.run --nproc_per_node 2 cross_granularity_worker.py FOLDER`, or call `train`.
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from longvideo.processing.crossvllm.policies import policy_text
from tests.trainers.cross_granularity_runs import model_and_processor, question_row, scripted, short_run

GOOD = [policy_text(2.0, 8.0), policy_text(14.0, 20.0), policy_text(0.0, 4.0)]


def policies(num_samples: int | None, prompt: str) -> list[str]:
    """Different segments, or one for questions that say so: then one process has nothing to compare."""
    if num_samples is None:
        return GOOD[:1]
    return GOOD[:1] * 3 if "one policy" in prompt else GOOD


def train(folder: Path) -> Any:
    """Trains with a global batch of two rows, whatever the number of processes; returns the trainer."""
    model, processor = model_and_processor()
    rows = [question_row(i) for i in range(4)]
    rows[1]["question"] = rows[2]["question"] = "Which colour? one policy"
    num_processes = int(os.environ.get("WORLD_SIZE", 1))
    trainer = short_run(
        folder,
        model,
        processor,
        rows,
        max_steps=4,
        per_device_train_batch_size=2 // num_processes,
        gradient_accumulation_steps=1,
        ddp_backend="gloo" if num_processes > 1 else None,
    )
    with scripted(policies, processor.tokenizer):
        trainer.train()
    return trainer


def weights_of(trainer: Any) -> dict[str, torch.Tensor]:
    """Projectors and adapters of both modules."""
    found = [pair for name in ("coarse", "fine") for pair in trainer.bare.granularity_parameters(name)]
    return {name: parameter.detach().clone() for name, parameter in found}


if __name__ == "__main__":
    torch.set_num_threads(1)
    done = train(Path(sys.argv[1]))
    if done.is_world_process_zero():
        done.state.save_to_json(str(Path(sys.argv[1], "state.json")))
        save_file(weights_of(done), Path(sys.argv[1], "weights.safetensors"))
