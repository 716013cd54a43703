"""Trains the tiny CrossVLLM on long videos of the procedural corpus, with our own trainers.

    python -m longvideo.tiny_training.train_crossvllm --out runs/tiny_crossvllm

Stages are folders of `--out`: the tower, alignment of the projectors, a base that answers plain questions and then
reads the time of one thing, of a letter among others, and of what a bare name or a question asks for (told where to
look in the last of these stages, see `guided_attention`), the coarse and the fine module by supervised finetuning, and
both by cross-granularity training. A run that was stopped goes on from the newest complete checkpoint when the command
is given again. After each stage a few held-out questions are answered; what came of it stands in the log.

Differs from the paper: its base is a language model that follows any prompt, so that only P_c is trained; here the
base learns the forms of the policies too, and both modules see them again beside what the paper trains.
"""

import argparse
import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel, ProcessorMixin, set_seed

from longvideo.evaluation.command import run_command
from longvideo.evaluation.corpus import Difficulty
from longvideo.evaluation.corpus.long_scenes import LongDifficulty
from longvideo.modeling.crossvllm.modeling_crossvllm import CrossVLLMForConditionalGeneration
from longvideo.tiny_training.build_crossvllm import (
    begin_as_answers,
    build_crossvllm,
    order_times,
    take_projectors,
    take_tower,
)
from longvideo.tiny_training.build_parts import encode_frames
from longvideo.tiny_training.crossvllm_checks import check_modules
from longvideo.tiny_training.crossvllm_rows import BATCH_SIZE, CrossLessons, CrossStage, LessonCollator, LongQuestions
from longvideo.tiny_training.decoder import TINY_FOLDER, take_decoder
from longvideo.tiny_training.guided_attention import GuidedAttention
from longvideo.tiny_training.precision import BF16_HELP, fast_attention, precision_arguments
from longvideo.tiny_training.tower import IMAGES, TowerLessons, pretrain_tower
from longvideo.tiny_training.train import LossLog, StopAtTime, export
from longvideo.trainers.cross_granularity_config import CrossGranularityConfig
from longvideo.trainers.cross_granularity_state import load_state, save_state
from longvideo.trainers.cross_granularity_trainer import CrossGranularityTrainer
from longvideo.trainers.sft_config import VideoSFTConfig
from longvideo.trainers.sft_trainer import VideoSFTTrainer, find_last_checkpoint

DECODER = "videochat_flash"
MODULES = ("coarse", "fine")
# Something is seen in every frame; in a tenth of them it is a letter.
SHOWN = Difficulty(shapes=(1, 1, 2), timed=False, needle=1.0)
TOWER = TowerLessons(
    "clip",
    tower=lambda model: model.model.vision_tower,
    encode=encode_frames,
    statistics=lambda processor: (processor.video_processor.image_mean, processor.video_processor.image_std),
    phases=(replace(IMAGES, difficulty=SHOWN, batch_size=64, num_steps=200, learning_rate=5e-4, warmup_steps=20),),
)
# One thing in a video: when is it seen? And what moves, for the detail module alone.
ONE = LongDifficulty(shapes=(1,), letter=0.0)
MOVING = LongDifficulty(move=1.0, letter=0.1)
ONE_TO_THREE = LongDifficulty(shapes=(1, 2, 3))
# What is looked for is one letter among shapes: a place has to be read whatever stands around it.
LETTERED = LongDifficulty(shapes=(1, 2, 3), letter=1.0)
ONE_AND_LETTER = LongDifficulty(shapes=(1,), letter=1.0)
STAGES = (
    CrossStage(
        "1-align",
        100,
        7e-4,
        (("plain_coarse", 0.8, ONE_TO_THREE), ("plain_fine", 0.2, ONE_TO_THREE)),
        "projectors",
        "constant_with_warmup",
    ),
    CrossStage(
        "2a-answers",
        300,
        7e-4,
        (("plain_coarse", 0.6, ONE_TO_THREE), ("plain_fine", 0.2, ONE_TO_THREE), ("judge", 0.2, ONE_TO_THREE)),
        "base",
        "constant_with_warmup",
    ),
    CrossStage("2b-moves", 800, 1e-3, (("cut", 0.8, MOVING), ("plain_coarse", 0.2, "long")), "base"),
    CrossStage(
        "2c-one", 2000, 1e-3, (("policy", 0.9, ONE), ("plain_coarse", 0.05, "long"), ("judge", 0.05, "long")), "base"
    ),
    CrossStage(
        "2d-letter",
        1000,
        1e-3,
        (("policy_letter", 0.8, LETTERED), ("policy", 0.12, ONE), ("plain_coarse", 0.08, "long")),
        "base",
    ),
    CrossStage(
        "2e-which",
        2000,
        1e-3,
        (
            ("policy", 0.35, ONE_AND_LETTER),
            ("policy_letter", 0.15, LETTERED),
            ("policy", 0.2, ONE_TO_THREE),
            ("policy", 0.12, ONE),
            ("plain_coarse", 0.08, "long"),
            ("cut", 0.1, MOVING),
        ),
        "base",
        looks=True,
    ),
    CrossStage(
        "2f-named",
        2000,
        1e-3,
        (
            ("policy_named", 0.55, ONE_TO_THREE),
            ("policy", 0.12, "long"),
            ("policy", 0.05, ONE),
            ("policy_letter", 0.08, LETTERED),
            ("plain_coarse", 0.12, "long"),
            ("cut", 0.08, MOVING),
        ),
        "base",
    ),
    CrossStage(
        "2g-all",
        800,
        1e-3,
        (
            ("policy_named", 0.3, ONE_TO_THREE),
            ("policy", 0.4, "long"),
            ("policy_letter", 0.06, LETTERED),
            ("plain_coarse", 0.06, "long"),
            ("cut", 0.08, MOVING),
            ("judge", 0.1, "long"),
        ),
        "base",
        guided=0.5,
    ),
    CrossStage("3-coarse", 600, 1e-3, (("policy", 1.0, "long"),), "coarse"),
    CrossStage(
        "4-fine",
        800,
        1e-3,
        (("cut", 0.2, "long"), ("missed", 0.2, "long"), ("judge", 0.32, MOVING), ("judge", 0.28, "long")),
        "fine",
    ),
)
RL_NAME = "5-both"
# Thirteen times through few questions: one visit teaches little, and as many new questions in their place left the
# share of right segments where it was.
RL_ROWS = 192
RL_PAIRS = 160
RL_QUESTIONS = 16


class FeatureTrainer(VideoSFTTrainer):
    """Supervised finetuning on batches of `LessonCollator`, in the granularity of each batch.

    Args:
        args, kwargs: of `VideoSFTTrainer`.
        guided: weight of the loss that tells policies where to look.
    """

    def __init__(self, *args: Any, guided: float = 0.0, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.guided, self.attention = guided, GuidedAttention(self.model.model.language_model)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        """Projects the tower's features in the batch's granularity and runs the rest as its base class does."""
        inputs = dict(inputs)
        guides = inputs.pop("guides")
        granularity, features = inputs.pop("granularity"), inputs.pop("vision_features")
        # For good: layers that are computed again in the backward pass keep to it.
        self.model.set_granularity(granularity)
        video = self.model.get_video_features(vision_features=features, granularity=granularity, return_dict=True)
        inputs["mm_encoder_outputs"] = {"video": video}
        with self.attention.watching():
            found = super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)
            if not guides:
                return found
            guidance = self.guided * self.attention.loss(guides, inputs["attention_mask"])
        return (found[0] + guidance, *found[1:]) if return_outputs else found + guidance

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self.model.has_adapters:
            # Before the Trainer's files: its last one marks a checkpoint as complete.
            save_state(self.model, Path(self.args.output_dir, f"checkpoint-{self.state.global_step}"), MODULES)
        super()._save_checkpoint(model, trial)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.model.has_adapters:
            load_state(self.model, resume_from_checkpoint, MODULES)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)


def prepare(model: PreTrainedModel, stage: CrossStage) -> None:
    """Lets what a stage trains learn, and nothing else.

    Args:
        model: changed in place; a module's stage adds both adapters where there are none.
        stage: the stage.
    """
    if stage.learns in MODULES:
        if not model.has_adapters:
            # The base saw both granularities: each projector goes on as it is.
            model.add_adapters()
        model.set_granularity(stage.learns)
        model.set_trainable(stage.learns)
        return
    model.requires_grad_(False)
    model.model.projectors.requires_grad_(True)
    if stage.learns == "base":
        model.model.language_model.requires_grad_(True)


def common_arguments(folder: Path, *, seed: int, save_steps: int, logging_steps: int, bf16: bool) -> dict[str, Any]:
    """Arguments that all trainers share."""
    return {
        **precision_arguments(bf16),
        "output_dir": str(folder),
        "weight_decay": 0.01,
        "adam_beta2": 0.98,
        "logging_steps": logging_steps,
        "save_steps": save_steps,
        "save_total_limit": 2,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_num_workers": 0,
        "seed": seed,
    }


def run_stage(
    stage: CrossStage,
    model: PreTrainedModel,
    processor: ProcessorMixin,
    out: Path,
    *,
    seed: int,
    first_seed: int,
    deadline: float,
    bf16: bool = False,
) -> bool:
    """Trains a supervised stage, from its newest checkpoint if there is one.

    Args:
        stage: what to train.
        model: model to train in place.
        processor: its processor.
        out: folder of all stages.
        seed: random seed of the run.
        first_seed: number of the stage's first scene.
        deadline: value of `time.monotonic()` at which to stop.
        bf16: whether to compute in bfloat16; weights stay in float32.

    Returns:
        Whether the stage is complete.
    """
    prepare(model, stage)
    folder = out / stage.name
    checkpoint = find_last_checkpoint(str(folder))
    if stage.looks and checkpoint is None:
        begin_as_answers(model, processor.tokenizer)
    args = VideoSFTConfig(
        per_device_train_batch_size=BATCH_SIZE,
        max_steps=stage.num_steps,
        learning_rate=stage.learning_rate,
        lr_scheduler_type=stage.schedule,
        warmup_steps=min(20, stage.num_steps),
        train_sampling_strategy="sequential",
        **common_arguments(folder, seed=seed, save_steps=50, logging_steps=10, bf16=bf16),
    )
    stop = StopAtTime(deadline)
    trainer = FeatureTrainer(
        model,
        args,
        data_collator=LessonCollator(model, processor, bf16=bf16, guided=stage.guided > 0),
        train_dataset=CrossLessons(stage, first_seed=first_seed),
        processing_class=processor,
        callbacks=[stop, LossLog(out / "log.jsonl", stage.name)],
        guided=stage.guided,
    )
    with fast_attention(bf16):
        trainer.train(resume_from_checkpoint=checkpoint)
    return not stop.stopped


def run_both(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    out: Path,
    *,
    seed: int,
    first_seed: int,
    deadline: float,
    num_pairs: int = RL_PAIRS,
    bf16: bool = False,
) -> bool:
    """Trains both modules in turn by cross-granularity training, on questions without segments to learn from.

    Segments stand in the rows for the log alone: how often the best policy overlaps the truth.

    Args:
        model: model with both modules finetuned.
        processor: its processor.
        out: folder of all stages.
        seed: random seed of the run.
        first_seed: number of the first scene.
        deadline: value of `time.monotonic()` at which to stop.
        num_pairs: pairs of a coarse and a fine step.
        bf16: whether to compute in bfloat16; weights stay in float32.

    Returns:
        Whether the stage is complete.
    """
    folder = out / RL_NAME
    args = CrossGranularityConfig(
        per_device_train_batch_size=RL_QUESTIONS,
        max_steps=2 * num_pairs,
        num_policies=4,
        coarse_learning_rate=3e-4,
        fine_learning_rate=5e-5,
        warmup_steps=min(10, num_pairs),
        lr_scheduler_type="cosine",
        max_policy_tokens=10,
        max_answer_tokens=4,
        keep_frames=16384,
        **common_arguments(folder, seed=seed, save_steps=10, logging_steps=10, bf16=bf16),
    )
    stop = StopAfterPair(deadline)
    trainer = CrossGranularityTrainer(
        model,
        args,
        train_dataset=LongQuestions(RL_ROWS, first_seed=first_seed, size=model.config.vision_config.image_size),
        processing_class=processor,
        callbacks=[stop, LossLog(out / "log.jsonl", RL_NAME)],
    )
    with fast_attention(bf16):
        trainer.train(resume_from_checkpoint=find_last_checkpoint(str(folder)))
    return not stop.stopped


class StopAfterPair(StopAtTime):
    """Saves and stops behind a pair of steps when the time is used up."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % 2 == 0:
            super().on_step_end(args, state, control, **kwargs)


def build(out: Path, *, seed: int, tower_steps: int) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Makes the model with a taught tower, or loads that where it is there already.

    Args:
        out: folder of all stages.
        seed: random seed of the run.
        tower_steps: steps of the tower's lessons.

    Returns:
        Model and processor.
    """
    model, processor = build_crossvllm()
    take_decoder(model, processor.tokenizer, TINY_FOLDER / DECODER)
    take_projectors(model, TINY_FOLDER / DECODER)
    order_times(model, processor.tokenizer)
    tower, path = model.model.vision_tower, out / "0-tower" / "clip.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        tower.load_state_dict(load_file(path))
    else:
        take_tower(model, TINY_FOLDER / DECODER)
        tower.requires_grad_(True)
        lessons = replace(TOWER, phases=tuple(replace(phase, num_steps=tower_steps) for phase in TOWER.phases))
        pretrain_tower(lessons, model, processor, first_seed=seed * 10_000_000 + 5_000_000, log=out / "log.jsonl")
        save_file(tower.state_dict(), path.with_suffix(".partial"))
        path.with_suffix(".partial").rename(path)
    tower.eval().requires_grad_(False)
    return model, processor


def train(
    out: Path, *, minutes: float, seed: int = 0, scale: float = 1.0, num_checks: int = 50, bf16: bool = False
) -> Path | None:
    """Trains the tiny CrossVLLM through all stages, or as far as the time allows.

    Args:
        out: folder of checkpoints and logs.
        minutes: time of this run.
        seed: random seed.
        scale: factor of the length of every stage.
        num_checks: held-out questions that are answered after each stage; 0 for none.
        bf16: whether to compute in bfloat16; weights stay in float32, and so do the lessons of tower and projectors.

    Returns:
        Folder of the finished model, or None when stages are left for a later run.

    Raises:
        ValueError: a scale that is not positive.
    """
    if scale <= 0:
        raise ValueError(f"scale is {scale}, expected a positive factor of the length of the stages")
    set_seed(seed)
    deadline = time.monotonic() + 60 * minutes
    out.mkdir(parents=True, exist_ok=True)

    def steps(number: int) -> int:
        return max(round(number * scale), 1)

    model, processor = build(out, seed=seed, tower_steps=steps(TOWER.phases[0].num_steps))
    first_seed = seed * 10_000_000
    for stage in (*STAGES, None):
        name = RL_NAME if stage is None else stage.name
        done, start = out / name / "done", first_seed
        first_seed += 1_000_000
        if done.exists():
            model = CrossVLLMForConditionalGeneration.from_pretrained(find_last_checkpoint(str(done.parent)))
            continue
        place = {"seed": seed, "first_seed": start, "deadline": deadline, "bf16": bf16}
        if stage is None:
            complete = run_both(model, processor, out, **place, num_pairs=steps(RL_PAIRS))
        else:
            complete = run_stage(replace(stage, num_steps=steps(stage.num_steps)), model, processor, out, **place)
        if not complete:
            return None
        if num_checks:
            found = check_modules(model.eval(), processor, num_checks)
            with (out / "log.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps({"stage": f"check after {name}", **found}) + "\n")
        done.touch()
    export(model, processor, out / "model", log=out / "log.jsonl")
    return out / "model"


def main(argv: list[str] | None = None) -> int:
    """Command line of the module."""
    parser = argparse.ArgumentParser(
        prog="longvideo.tiny_training.train_crossvllm", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--out", default="runs/tiny_crossvllm", help="folder of checkpoints and logs")
    parser.add_argument(
        "--minutes", type=float, default=100.0, help="time of this run; give the command again to go on"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="factor of the length of all stages (default 1)")
    parser.add_argument("--checks", type=int, default=50, help="held-out questions after each stage (default 50)")
    parser.add_argument("--bf16", action="store_true", help=BF16_HELP)
    parser.add_argument("--threads", type=int, default=None, help="CPU threads")
    args = parser.parse_args(argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if args.threads:
        torch.set_num_threads(args.threads)

    def work() -> int:
        folder = train(
            Path(args.out),
            minutes=args.minutes,
            seed=args.seed,
            scale=args.scale,
            num_checks=args.checks,
            bf16=args.bf16,
        )
        print(
            f"finished: {folder}" if folder else f"stopped at the time limit; give the same command again ({args.out})"
        )
        return 0

    return run_command("train_crossvllm", work)


if __name__ == "__main__":
    sys.exit(main())
