"""Trains a tiny checkpoint as those that come with the package, on the procedural corpus, with our own trainer.

    python -m longvideo.tiny_training.train videochat_flash --out runs/tiny

Stages are folders of `--out`; a run that was stopped goes on from the newest complete checkpoint when the command is
given again. Each video is asked several questions of one kind in turns of one conversation, so that it is encoded once
for all of them and no answer betrays another; the evaluation asks one question at a time.
"""

import argparse
import json
import os
import random
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import Dataset
from transformers import PreTrainedModel, ProcessorMixin, TrainerCallback, set_seed

from longvideo.evaluation.command import run_command
from longvideo.evaluation.corpus import (
    all_questions,
    describe,
    list_events,
    make_scene,
    render_frames,
    sample_times,
)
from longvideo.tiny_training.connector import calibrate
from longvideo.tiny_training.conversations import (
    CAPTION_REQUEST,
    EVENTS_REQUEST,
    SHAPE_FIRST,
    choose_questions,
    conversation,
    picture_conversation,
    tidy,
)
from longvideo.tiny_training.decoder import TINY_FOLDER, take_decoder
from longvideo.tiny_training.models import TINY_MODELS, TinyModel
from longvideo.tiny_training.precision import BF16_HELP, fast_attention, precision_arguments
from longvideo.tiny_training.stages import ALIGN, BATCH_SIZE, CLIPS, FULL, PICTURES, STAGES, Stage, scale_stage
from longvideo.tiny_training.tower import pretrain_tower
from longvideo.trainers.collators import VideoSFTCollator
from longvideo.trainers.sft_config import VideoSFTConfig
from longvideo.trainers.sft_trainer import VideoSFTTrainer, find_last_checkpoint

NUM_CALIBRATION_ROWS = 256


def stages_of(spec: TinyModel) -> tuple[Any, ...]:
    """Lists the stages of a model: its own, or ours, which are others where its decoder was trained before."""
    if spec.stages or not spec.decoder:
        return spec.stages or STAGES
    pictures = [PICTURES] if spec.pictures_first else []
    return (ALIGN, *pictures, FULL, STAGES[-3], *CLIPS)


class CorpusConversations(Dataset):
    """Rows of a stage, made when they are asked for; the same index always gives the same row.

    Args:
        stage: what to draw.
        size: side of the frames in pixels.
        num_frames: frames per video.
        first_seed: number of the first scene of the training split.
    """

    def __init__(self, stage: Stage, *, size: int, num_frames: int, first_seed: int):
        self.stage, self.size, self.num_frames, self.first_seed = stage, size, num_frames, first_seed

    def __len__(self) -> int:
        return self.stage.num_videos

    def __getitem__(self, index: int) -> dict[str, Any]:
        seed = self.first_seed + index
        # Descriptions are long: a batch has them in all rows or in none, so that little is padded; so with frames.
        batch_rng = random.Random(f"batch {seed // BATCH_SIZE}")
        form, shape_first = batch_rng.random(), batch_rng.random() < self.stage.shape_first
        difficulty, num_frames = batch_rng.choice(self.stage.mixed or [(self.stage.difficulty, self.stage.num_frames)])
        scene = make_scene(seed, "train", difficulty=difficulty)
        if self.stage.pictures:
            return {"messages": picture_conversation(scene, self.size, self.stage.shape_first)}
        times = sample_times(scene.duration, num_frames or self.num_frames)
        frames = render_frames(scene, times, self.size)
        rng = random.Random(f"conversation {seed}")
        addition = SHAPE_FIRST if shape_first else ""
        if form < self.stage.captions:
            turn = (CAPTION_REQUEST + addition, describe(scene, shape_first=shape_first))
            return {"messages": conversation(frames, scene.duration, [turn])}
        if form < self.stage.captions + self.stage.events:
            turn = (EVENTS_REQUEST + addition, list_events(scene, shape_first=shape_first))
            return {"messages": conversation(frames, scene.duration, [turn])}
        chosen = choose_questions(all_questions(scene), self.stage.kinds, rng)
        turns = [
            (q.multiple_choice, q.letter) if rng.random() < self.stage.letters else (q.question, q.answer)
            for q in chosen
        ] or [(EVENTS_REQUEST, list_events(scene))]
        # People write no space before a question mark; the corpus does.
        turns = [(tidy(text), answer) if rng.random() < 0.5 else (text, answer) for text, answer in turns]
        return {"messages": conversation(frames, scene.duration, turns)}


class StopAtTime(TrainerCallback):
    """Saves and stops when the time of this run is used up.

    Args:
        deadline: value of `time.monotonic()` at which to stop.
    """

    def __init__(self, deadline: float):
        self.deadline = deadline
        self.stopped = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if time.monotonic() > self.deadline:
            self.stopped = True
            control.should_save = control.should_training_stop = True


class LossLog(TrainerCallback):
    """Appends every log record to a file, one JSON object a line.

    Args:
        path: file.
        stage: name of the stage.
    """

    def __init__(self, path: Path, stage: str):
        self.path, self.stage, self.start = path, stage, time.monotonic()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        record = {"stage": self.stage, "step": state.global_step, "run_seconds": round(time.monotonic() - self.start)}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**record, **(logs or {})}) + "\n")


def run_stage(
    stage: Any,
    model: PreTrainedModel,
    processor: ProcessorMixin,
    out: Path,
    *,
    spec: TinyModel,
    seed: int,
    deadline: float,
    first_seed: int,
    bf16: bool = False,
) -> bool:
    """Trains one stage, from its newest checkpoint if there is one.

    Args:
        stage: what to train on.
        model: model to train in place.
        processor: its processor.
        out: folder of all stages.
        spec: frames per video and their size.
        seed: random seed of the run.
        deadline: value of `time.monotonic()` at which to stop.
        first_seed: number of its first scene.
        bf16: whether to compute in bfloat16; weights stay in float32.

    Returns:
        Whether the stage is complete.
    """
    folder = out / stage.name
    make_rows = spec.make_rows or CorpusConversations
    slow_connector = spec.connector is not None and "language_model" in stage.trainable_parts
    slow_tower = "vision_tower" in stage.trainable_parts
    args = VideoSFTConfig(
        output_dir=str(folder),
        per_device_train_batch_size=BATCH_SIZE,
        max_steps=stage.num_videos // BATCH_SIZE,
        learning_rate=stage.learning_rate,
        lr_scheduler_type=stage.schedule,
        warmup_steps=stage.warmup_steps,
        trainable_parts=list(stage.trainable_parts),
        prepare_model=stage.prepare_model,
        connector_learning_rate=stage.learning_rate * stage.connector_rate if slow_connector else None,
        vision_tower_learning_rate=stage.learning_rate * stage.tower_rate if slow_tower else None,
        **precision_arguments(bf16),
        weight_decay=0.01,
        adam_beta2=0.98,
        train_sampling_strategy="sequential",
        dataloader_num_workers=1,
        dataloader_prefetch_factor=4,
        logging_steps=20,
        save_steps=100,
        save_total_limit=2,
        report_to="none",
        disable_tqdm=True,
        seed=seed,
    )
    stop = StopAtTime(deadline)
    trainer = VideoSFTTrainer(
        model,
        args,
        train_dataset=make_rows(stage, size=spec.frame_size, num_frames=spec.num_frames, first_seed=first_seed),
        processing_class=processor,
        callbacks=[stop, LossLog(out / "log.jsonl", stage.name)],
    )
    with fast_attention(bf16):
        trainer.train(resume_from_checkpoint=find_last_checkpoint(str(folder)))
    return not stop.stopped


def export(model: PreTrainedModel, processor: ProcessorMixin, folder: Path, *, log: Path) -> None:
    """Writes model, processor and training log for use, in bfloat16, under a temporary name first.

    Args:
        model: trained model.
        processor: its processor.
        folder: where they go; an older export is replaced.
        log: file of log records.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(partial)
    processor.save_pretrained(partial)
    shutil.copy(log, partial / "training_log.jsonl")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def _teach_towers(
    spec: TinyModel, model: PreTrainedModel, processor: ProcessorMixin, folder: Path, *, seed: int, log: Path
) -> None:
    """Trains every tower by itself, or loads it, and saves it under a temporary name first."""
    folder.mkdir(exist_ok=True)
    for number, lessons in enumerate(spec.lessons):
        path = folder / f"{lessons.name}.safetensors"
        if path.exists():
            lessons.tower(model).load_state_dict(load_file(path))
            continue
        first_seed = seed * 10_000_000 + 5_000_000 + number * 1_000_000
        pretrain_tower(lessons, model, processor, first_seed=first_seed, log=log)
        save_file(lessons.tower(model).state_dict(), path.with_suffix(".partial"))
        path.with_suffix(".partial").rename(path)


def _calibrate_connector(spec: TinyModel, model: PreTrainedModel, processor: ProcessorMixin, *, seed: int) -> None:
    """Brings visual features, as rows of the first stage have them, to the length of the words' embeddings."""
    rows = (spec.make_rows or CorpusConversations)(
        stages_of(spec)[0], size=spec.frame_size, num_frames=spec.num_frames, first_seed=seed * 10_000_000 + 9_000_000
    )
    collate = VideoSFTCollator(processor)
    encode = spec.encode or (lambda model, batch: model(**batch, use_cache=False))
    model.eval()

    def run() -> None:
        for start in range(0, NUM_CALIBRATION_ROWS, BATCH_SIZE):
            encode(model, collate([rows[index] for index in range(start, start + BATCH_SIZE)]))

    length = model.get_input_embeddings().weight.norm(dim=1).mean().item()
    calibrate(spec.connector(model), run, length=length)


def train(
    name: str,
    out: Path,
    *,
    minutes: float,
    seed: int,
    scale: float = 1.0,
    without: Sequence[str] = (),
    bf16: bool = False,
) -> Path | None:
    """Trains a tiny model through all stages, or as far as the time allows.

    Args:
        name: architecture.
        out: folder of checkpoints and logs.
        minutes: time of this run.
        seed: random seed.
        scale: factor of the length of every stage; the towers' own lessons stay as they are.
        without: what is left out, of the model's `ablations`.
        bf16: whether to compute in bfloat16; weights stay in float32, and so do the towers' own lessons.

    Returns:
        Folder of the finished model, or None when stages are left for a later run.

    Raises:
        ValueError: something to leave out that the model has no switch for, or a scale that is not positive.
    """
    spec = TINY_MODELS[name]
    unknown = sorted(set(without) - set(spec.ablations))
    if unknown:
        raise ValueError(f"{name} cannot be trained without {unknown}; it has {list(spec.ablations) or 'no switches'}")
    if scale <= 0:
        raise ValueError(f"scale is {scale}, expected a positive factor of the length of the stages")
    spec = replace(spec, build=partial(spec.build, **{f"use_{part}": False for part in without}))
    return train_model(spec, out, minutes=minutes, seed=seed, scale=scale, without=without, bf16=bf16)


def train_model(
    spec: TinyModel,
    out: Path,
    *,
    minutes: float,
    seed: int,
    scale: float = 1.0,
    without: Sequence[str] = (),
    bf16: bool = False,
) -> Path | None:
    """Trains what a description of a tiny model says; the rest is as in `train`.

    Args:
        spec: how the model is made and taught.
        out: folder of checkpoints and logs.
        minutes: time of this run.
        seed: random seed.
        scale: factor of the length of every stage.
        without: given to `spec.begin_stage`.
        bf16: as in `train`.

    Returns:
        Folder of the finished model, or None when stages are left for a later run.
    """
    set_seed(seed)
    deadline = time.monotonic() + 60 * minutes
    out.mkdir(parents=True, exist_ok=True)
    model, processor = spec.build()
    if spec.decoder:
        take_decoder(model, processor.tokenizer, TINY_FOLDER / spec.decoder)
    _teach_towers(spec, model, processor, out / "0-tower", seed=seed, log=out / "log.jsonl")
    if spec.connector is not None:
        _calibrate_connector(spec, model, processor, seed=seed)
    first_seed = seed * 10_000_000
    for stage in stages_of(spec):
        if scale != 1:
            stage = scale_stage(stage, scale)
        done = out / stage.name / "done"
        start, first_seed = first_seed, first_seed + stage.num_videos
        if done.exists():
            checkpoint = find_last_checkpoint(str(done.parent))
            model = type(model).from_pretrained(checkpoint)
            continue
        if spec.begin_stage is not None:
            spec.begin_stage(model, stage, without)
        place = {"seed": seed, "deadline": deadline, "first_seed": start, "bf16": bf16}
        if not run_stage(stage, model, processor, out, spec=spec, **place):
            return None
        done.touch()
    export(model, processor, out / "model", log=out / "log.jsonl")
    return out / "model"


def main(argv: list[str] | None = None) -> int:
    """Command line of the module."""
    parser = argparse.ArgumentParser(prog="longvideo.tiny_training.train", description=__doc__.split("\n")[0])
    parser.add_argument("model", choices=sorted(TINY_MODELS))
    parser.add_argument("--out", default=None, help="folder of checkpoints and logs (default: runs/tiny_MODEL)")
    parser.add_argument(
        "--minutes", type=float, default=100.0, help="time of this run; give the command again to go on"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="factor of the length of all stages (default 1)")
    parser.add_argument(
        "--without", nargs="+", default=(), metavar="PART", help="ablation: leave a part out (llava_st: lape, packer)"
    )
    parser.add_argument("--bf16", action="store_true", help=BF16_HELP)
    parser.add_argument("--threads", type=int, default=None, help="CPU threads of the training process")
    args = parser.parse_args(argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if args.threads:
        torch.set_num_threads(args.threads)
    out = Path(args.out or "_without_".join([f"runs/tiny_{args.model}", *args.without]))

    def work() -> int:
        folder = train(
            args.model,
            out,
            minutes=args.minutes,
            seed=args.seed,
            scale=args.scale,
            without=tuple(args.without),
            bf16=args.bf16,
        )
        print(f"finished: {folder}" if folder else f"stopped at the time limit; give the same command again ({out})")
        return 0

    return run_command("train", work)


if __name__ == "__main__":
    sys.exit(main())
