"""Weights of a checkpoint come back into the model that trains, whatever its files call them, or an error says why."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from longvideo.trainers import VideoSFTTrainer, coarse_grounding_row, lora_config
from longvideo.trainers.checkpoints import restore_weights
from tests.tiny import tiny_videochat_flash_model, tiny_videochat_flash_processor
from tests.tiny_longvu import tiny_longvu_model
from tests.tiny_longvu_processor import tiny_longvu_processor
from tests.trainers.cross_granularity_runs import model_and_processor, question_row
from tests.trainers.dpo_runs import dpo_run, model_of, pairs_of
from tests.trainers.sft_runs import changed_names, losses, short_run, snapshot
from tests.trainers.toy_rows import colour_row

EVERYTHING = ["vision_tower", "connector", "language_model"]
# Constant: a cosine over the steps of the first run would end with it.
SAVES = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "constant"}
COARSE = {"granularity": "coarse", "training": True}
DINO = "model.dino_tower.encoder.layer.0.attention."
PREFIX, ONE = "model.dino_tower.layernorm.", torch.ones(1)


def rows() -> list[dict[str, Any]]:
    return [colour_row("red", num_frames=3), colour_row("blue", num_frames=4, answer="It is blue.")]


def train_longvu(folder: Path, **args: Any) -> VideoSFTTrainer:
    settings = {**SAVES, "learning_rate": 1e-2, "trainable_parts": EVERYTHING, **args}
    return short_run(folder, tiny_longvu_model(), tiny_longvu_processor(), rows(), **settings)


def prefer_longvu(folder: Path, **args: Any) -> VideoSFTTrainer:
    settings = {**SAVES, "learning_rate": 1e-2, "trainable_parts": EVERYTHING, "precompute_reference": True, **args}
    return dpo_run(folder, "longvu", model_of("longvu"), pairs_of("longvu")[:2], **settings)


def ground_crossvllm(folder: Path, **args: Any) -> VideoSFTTrainer:
    pytest.importorskip("peft")
    model, processor = model_and_processor(adapters=False)
    settings = {**SAVES, "learning_rate": 1e-2, "prepare_model": "begin_coarse", "processor_kwargs": COARSE, **args}
    given = [coarse_grounding_row(question_row(i)) for i in range(2)]
    return short_run(folder, model, processor, given, **settings)


RUNS = {"longvu": (train_longvu, DINO), "longvu-dpo": (prefer_longvu, DINO), "crossvllm": (ground_crossvllm, "lora_B")}


@pytest.mark.parametrize("name", RUNS)
def test_an_interrupted_run_goes_on_with_every_weight(tmp_path, name):
    make, part = RUNS[name]
    whole = make(tmp_path)
    before = snapshot(whole.model)
    whole.train()
    assert any(part in x for x in changed_names(whole.model, before))
    shutil.rmtree(tmp_path / "run" / "checkpoint-3")
    resumed = make(tmp_path)
    own = dict(resumed.model.named_parameters())
    resumed.train(resume_from_checkpoint=True)
    # Bit for bit: the same operations on the same numbers.
    assert losses(resumed)[2:] == losses(whole)[2:]
    assert not changed_names(resumed.model, snapshot(whole.model))
    assert all(own[key] is parameter for key, parameter in resumed.model.named_parameters())


@pytest.mark.parametrize("name", RUNS)
def test_the_best_weights_come_back_at_the_end(tmp_path, name):
    make, _ = RUNS[name]
    # The first checkpoint is the best one, where more is better and everything learns.
    best = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "greater_is_better": True}
    trainer = make(tmp_path, **best, metric_for_best_model="eval_loss")
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-1")
    once = make(tmp_path / "once", max_steps=1, save_strategy="no")
    once.train()
    assert not changed_names(trainer.model, snapshot(once.model))


def test_a_model_with_more_than_its_class_knows_comes_back_by_its_names(tmp_path):
    """A head that somebody put onto a model is in no configuration, but has the same name in file and model."""
    models = [tiny_videochat_flash_model(seed=seed) for seed in (0, 1)]
    for model in models:
        model.counter = torch.nn.Linear(2, 2)
    models[0].save_pretrained(tmp_path)
    short_run(tmp_path, models[1], tiny_videochat_flash_processor(), rows())._load_from_checkpoint(str(tmp_path))
    assert not changed_names(models[1], snapshot(models[0]))


# ------------------------------------------------------------------ what does not fit


def rewrite(file: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def test_weights_that_are_not_the_model_s_are_an_error(tmp_path):
    model = tiny_longvu_model()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    other = tiny_longvu_model(seed=1)
    restore_weights(other, tmp_path)
    assert not changed_names(other, snapshot(model))
    for file in tmp_path.glob("model*"):
        file.unlink()
    model.save_pretrained(tmp_path)
    file, other = tmp_path / "model.safetensors", tiny_longvu_model(seed=1)
    before = snapshot(other)
    rewrite(file, lambda stored: {key: x for key, x in stored.items() if "dino_tower.layernorm" not in key})
    with pytest.raises(ValueError, match=r"of this LongVUFor.*: 2 are missing \(first 'model.dino_tower.lay"):
        restore_weights(other, tmp_path)
    rewrite(file, lambda stored: {**stored, **model.model.dino_tower.layernorm.state_dict(prefix=PREFIX), "x": ONE})
    with pytest.raises(ValueError, match=r": 1 are too many \(first 'x'\)\. Build the model as it was when the run"):
        restore_weights(other, tmp_path)
    with pytest.raises(ValueError, match=r"weights in .* are not those of this LongVU.* are missing"):
        restore_weights(tiny_longvu_model(num_hidden_layers=5), tmp_path)
    assert not changed_names(other, before)


def test_an_adapter_that_lacks_weights_is_an_error(tmp_path):
    """What peft itself only warns of."""
    peft = pytest.importorskip("peft")
    base = tiny_longvu_model()
    model = peft.get_peft_model(base, lora_config(base, r=2))
    trainer = short_run(tmp_path, model, tiny_longvu_processor(), rows())
    model.save_pretrained(tmp_path)
    trainer._load_from_checkpoint(str(tmp_path))
    file = tmp_path / "adapter_model.safetensors"
    whole = load_file(file)
    for wrong, told in (
        (
            {key: x for key, x in whole.items() if key != min(whole)},
            r"are not those of this PeftModel: 1 are missing \(first '",
        ),
        ({**whole, "base_model.model.x": ONE}, r"has weights for 'x', which this LongVU\w+ does not have"),
    ):
        save_file(wrong, file, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=told):
            trainer._load_from_checkpoint(str(tmp_path))


class Foreign(torch.nn.Module):
    """A model of somebody else's, which knows nothing of checkpoints."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.inner = tiny_longvu_model(seed=seed)
        self.config = self.inner.config

    def forward(self, **kwargs: Any) -> Any:
        return self.inner(**kwargs)


def test_a_model_without_from_pretrained_is_held_to_the_names_too(tmp_path):
    stored = Foreign(seed=1).state_dict()
    trainer = short_run(tmp_path, Foreign(), tiny_longvu_processor(), rows())
    file = tmp_path / "model.safetensors"
    save_file(stored, file)
    trainer._load_from_checkpoint(str(tmp_path))
    assert not changed_names(trainer.model, stored)
    rewrite(file, lambda stored: {key: x for key, x in stored.items() if "image_newline" not in key})
    with pytest.raises(ValueError, match=r"weights in .* are not those of this Foreign: 1 are missing \(first 'inner"):
        trainer._load_from_checkpoint(str(tmp_path))
