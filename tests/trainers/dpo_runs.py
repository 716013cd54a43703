"""What the tests of preference optimisation share: pairs of answers, short runs, models with adapters, tower calls."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from longvideo.trainers import VideoSFTCollator
from longvideo.trainers.dpo_config import VideoDPOConfig
from longvideo.trainers.dpo_trainer import VideoDPOTrainer
from longvideo.trainers.dpo_visuals import towers_of
from tests.trainers.zoo import VARIANTS, make_model, rows_of

LN_2 = math.log(2)
# Room for the texts of the tests beside a few frames, so that frames are raised to the full grid and compared.
LONGVU = {"context_length": 160}


def pair_of(row: dict[str, Any], rejected: str) -> dict[str, Any]:
    """A pair of answers to the question of a row with one answer."""
    *prompt, answer = row["messages"]
    kept = {key: value for key, value in row.items() if key != "messages"}
    return {
        **kept,
        "prompt": prompt,
        "chosen": [answer],
        "rejected": [{"role": "assistant", "content": rejected}],
    }


def pairs_of(name: str) -> list[dict[str, Any]]:
    """Four pairs with answers of unequal length, the longer one chosen or rejected."""
    rejected = ["I do not know that.", "no", "It is pink", "x"]
    if name.startswith("llava_st"):
        rejected[1] = "<t0.1>:[<w0.2><h0><w0.3><h0.5>] and more"
    return [pair_of(row, text) for row, text in zip(rows_of(name), rejected, strict=True)]


def model_of(name: str, **kwargs: Any) -> Any:
    """The tiny model of a variant; LongVU's with room for the texts."""
    return make_model(name, **{**(LONGVU if name == "longvu" else {}), **kwargs})


def adapted(name: str, *, seed: int | None = None, **kwargs: Any) -> Any:
    """The model of a variant with LoRA on its decoder; with a seed the adapter is random and changes answers."""
    import peft

    model = peft.get_peft_model(
        model_of(name, **kwargs), peft.LoraConfig(r=4, target_modules=r".*language_model.*\.(q|v)_proj")
    )
    if seed is not None:
        randomize(model, seed)
    return model


def randomize(model: Any, seed: int, adapter: str = "default") -> None:
    """Fills the second matrices of an adapter, which start at zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f"lora_B.{adapter}" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def dpo_run(folder: Path, name: str, model: Any, rows: Any, **args: Any) -> VideoDPOTrainer:
    """A trainer of one step on the CPU that saves nothing; `ref_model` and `data_collator` go to the trainer."""
    parts = {key: args.pop(key) for key in ("ref_model", "data_collator") if key in args}
    settings = {
        "output_dir": str(folder / "run"),
        "max_steps": 1,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "train_sampling_strategy": "sequential",
    }
    return VideoDPOTrainer(
        model,
        VideoDPOConfig(**{**settings, **args}),
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=VARIANTS[name].processor(),
        **parts,
    )


def logged(trainer: VideoDPOTrainer, key: str = "loss") -> list[float]:
    """What a run logged under a name."""
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def single_scores(name: str, model: Any, rows: list[dict[str, Any]]) -> torch.Tensor:
    """Log-likelihoods (P, 2) of both answers, each from a batch of its own of supervised finetuning and its loss."""
    collator = VideoSFTCollator(VARIANTS[name].processor())
    scores = []
    for row in rows:
        for side in ("chosen", "rejected"):
            kept = {key: value for key, value in row.items() if key not in ("prompt", "chosen", "rejected")}
            batch = collator([{**kept, "messages": [*row["prompt"], *row[side]]}])
            with torch.no_grad():
                loss = model(**batch, use_cache=False, num_items_in_batch=1).loss
            scores.append(-float(loss))
    return torch.tensor(scores, dtype=torch.float64).view(-1, 2)


def trainer_scores(trainer: VideoDPOTrainer, rows: list[dict[str, Any]]) -> torch.Tensor:
    """Log-likelihoods (P, 2) that a trainer finds for its model in one batch."""
    trainer.model.eval()
    inputs = {k: v for k, v in trainer.data_collator(rows).items() if k != "batch_facts"}
    with torch.no_grad():
        scores = trainer._score(trainer.model, inputs)
    return torch.stack([scores.chosen, scores.rejected], dim=1).double()


@contextmanager
def counted_frames(model: Any) -> Iterator[dict[str, int]]:
    """Counts the frames that really pass every tower of a model, at its first layer with weights."""
    counts: dict[str, int] = {}
    hooks = []
    for name, tower in towers_of(model).items():
        first = next(module for module in tower.modules() if isinstance(module, torch.nn.Conv2d | torch.nn.Conv3d))

        def count(module: Any, args: Any, output: torch.Tensor, name: str = name) -> None:
            is_clip = output.ndim == 5  # (clips, E, frames, height, width)
            counts[name] = counts.get(name, 0) + output.shape[0] * (output.shape[2] if is_clip else 1)

        hooks.append(first.register_forward_hook(count))
    try:
        yield counts
    finally:
        for hook in hooks:
            hook.remove()
