"""Teaches a tiny tower what a corpus frame shows, patch by patch, before a decoder learns to read its features.

The published models start from towers that were trained on images and videos; this is the same step in small. Linear
heads, thrown away afterwards, predict for every patch the shape, its colour, the way it moves and the letter that is
shown. For clips another head tells where the shape is now, in the frame before and in the frame after: what moves can
only be told by a tower that finds the same shape again.
"""

import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import ProcessorMixin

from longvideo.evaluation.corpus import Difficulty, make_scene, render_frames, sample_times
from longvideo.evaluation.corpus.scenes import COLOURS, DIRECTIONS, LETTERS, SHAPES, UNITS, Scene

TARGETS = {"shape": tuple(SHAPES), "colour": tuple(COLOURS), "direction": tuple(DIRECTIONS), "letter": tuple(LETTERS)}


@dataclass(frozen=True)
class Phase:
    """One part of the lessons.

    Args:
        name: as it stands in the log.
        num_frames: frames per sample: 1 for a frame at any moment, else one clip of so many of the sampled frames.
        difficulty: what the scenes contain.
        batch_size: samples per step.
        num_steps: steps.
        learning_rate: peak rate; it falls to a twentieth.
        warmup_steps: steps with a rising rate.
        targets: what is asked.
        centre_weight: weight of the mean distance between told and true centres.
    """

    name: str
    num_frames: int
    difficulty: str | Difficulty
    batch_size: int
    num_steps: int
    learning_rate: float
    warmup_steps: int
    targets: tuple[str, ...]
    centre_weight: float = 4.0


# Single frames first: a step then sees over a hundred different pictures instead of a few videos. For the same reason
# a clip lesson sees one clip of a scene, of scenes in which most shapes move.
MOVING = Difficulty(shapes=(1, 2, 2, 3), move=1.0, needle=0.1)
IMAGES = Phase("images", 1, "full", 128, 1200, 1.5e-3, 50, ("shape", "colour", "letter"))
CLIPS = Phase("clips", 4, MOVING, 32, 2500, 1e-3, 50, ("shape", "colour", "letter", "direction"))
# A patch belongs to a shape when its middle is this part of a patch or less outside of the shape's radius.
MARGIN = 0.3


def patch_targets(scene: Scene, times: list[float], grid: int) -> tuple[np.ndarray, np.ndarray]:
    """Labels every patch of every frame.

    Args:
        scene: what is shown.
        times: seconds of the frames.
        grid: patches along one side of a frame.

    Returns:
        (F, grid * grid, 4) int64, for each of `TARGETS` 0 for none, else 1 + its index.
        (F, grid * grid, 6) float32, x and y of the patch's shape, as fractions of the frame, in the frame before, in
        this one and in the one after; NaN where there is none.
    """
    middles = (np.arange(grid) + 0.5) / grid
    labels = np.zeros((len(times), grid, grid, len(TARGETS)), dtype=np.int64)
    centres = np.full((len(times), grid, grid, 6), np.nan, dtype=np.float32)
    for frame, moment in enumerate(times):
        if scene.needle is not None and scene.needle.visible(moment):
            labels[frame, ..., 3] = 1 + TARGETS["letter"].index(scene.needle.letter)
            continue
        for actor in scene.actors:
            if not actor.visible(moment):
                continue
            x, y = actor.position(moment)
            inside = np.hypot(middles[None, :] - x, middles[:, None] - y) < actor.radius + MARGIN / grid
            moves = actor.motion is not None and actor.motion.start <= moment < actor.motion.end
            labels[frame, inside, 0] = 1 + TARGETS["shape"].index(actor.shape)
            labels[frame, inside, 1] = 1 + TARGETS["colour"].index(actor.colour_at(moment))
            labels[frame, inside, 2] = 1 + TARGETS["direction"].index(actor.motion.direction) if moves else 0
            for place, other in enumerate((frame - 1, frame, frame + 1)):
                if 0 <= other < len(times) and actor.visible(times[other]):
                    centres[frame, inside, 2 * place : 2 * place + 2] = actor.position(times[other])
    return labels.reshape(len(times), grid * grid, len(TARGETS)), centres.reshape(len(times), grid * grid, 6)


class PatchLabels(Dataset):
    """Frames, patch labels and centres of shapes of training scenes.

    Args:
        phase: how many frames of how many scenes.
        size: side of the frames in pixels.
        grid: patches along one side.
        first_seed: number of the first scene.
    """

    def __init__(self, phase: Phase, *, size: int, grid: int, first_seed: int):
        self.phase, self.size, self.grid, self.first_seed = phase, size, grid, first_seed

    def __len__(self) -> int:
        return self.phase.batch_size * self.phase.num_steps

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        seed = self.first_seed + index
        scene = make_scene(seed, "train", difficulty=self.phase.difficulty)
        times = sample_times(scene.duration, UNITS)
        first = random.Random(seed).randrange(0, UNITS, self.phase.num_frames)
        times = times[first : first + self.phase.num_frames]
        if self.phase.num_frames == 1:
            times = [random.Random(seed).random() * scene.duration]
        return render_frames(scene, times, self.size), *patch_targets(scene, times, self.grid)


def _normalise(frames: torch.Tensor, mean: list[float], std: list[float]) -> torch.Tensor:
    """Turns (B, F, height, width, 3) uint8 into (B, F, 3, height, width) as the processor does."""
    pixels = frames.permute(0, 1, 4, 2, 3).float() / 255
    return (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def _head_loss(logits: torch.Tensor, wanted: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Loss over all patches plus the same over those that show something; and the accuracy on the latter."""
    shown = wanted > 0
    loss = nn.functional.cross_entropy(logits, wanted)
    if shown.any():
        loss = loss + nn.functional.cross_entropy(logits[shown], wanted[shown])
    return loss, (logits[shown].argmax(-1) == wanted[shown]).float().mean().item()


@dataclass(frozen=True)
class TowerLessons:
    """How one tower of a tiny model is taught.

    Args:
        name: of its file and in the log.
        tower: takes a model and gives its tower.
        encode: takes the tower and (B, F, 3, height, width) normalised frames, and gives (B, F * L, E) features.
        statistics: takes a processor and gives mean and standard deviation of the tower's pixels.
        phases: what is taught, in order.
    """

    name: str
    tower: Callable[[nn.Module], nn.Module]
    encode: Callable[[nn.Module, torch.Tensor], torch.Tensor]
    statistics: Callable[[ProcessorMixin], tuple[list[float], list[float]]]
    phases: tuple[Phase, ...]


def pretrain_tower(
    lessons: TowerLessons, model: nn.Module, processor: ProcessorMixin, *, first_seed: int, log: Path
) -> None:
    """Trains a tower in place, through all phases.

    Args:
        lessons: which tower, and how.
        model: model that holds it.
        processor: of the model.
        first_seed: number of the first scene.
        log: file that gets one JSON object per line.
    """
    tower = lessons.tower(model)
    heads = nn.ModuleDict({name: nn.Linear(tower.config.hidden_size, 1 + len(TARGETS[name])) for name in TARGETS})
    heads["centres"] = nn.Linear(tower.config.hidden_size, 6)
    tower.train()
    for phase in lessons.phases:
        _run_phase(
            phase, lessons, tower, heads, statistics=lessons.statistics(processor), first_seed=first_seed, log=log
        )
        first_seed += phase.batch_size * phase.num_steps


def _run_phase(
    phase: Phase,
    lessons: TowerLessons,
    tower: nn.Module,
    heads: nn.ModuleDict,
    *,
    statistics: tuple[list[float], list[float]],
    first_seed: int,
    log: Path,
) -> None:
    config = tower.config
    data = PatchLabels(
        phase, size=config.image_size, grid=config.image_size // config.patch_size, first_seed=first_seed
    )
    parameters = [*tower.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, phase.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / phase.warmup_steps, 1 - 0.95 * step / phase.num_steps)
    )
    start = time.monotonic()
    batches = DataLoader(data, phase.batch_size, num_workers=1, prefetch_factor=4)
    for step, (frames, labels, centres) in enumerate(batches, start=1):
        features = lessons.encode(tower, _normalise(frames, *statistics))  # (B, F * L, E)
        wanted = labels.view(*features.shape[:2], -1)
        losses, accuracy = [], {}
        for name in phase.targets:
            logits = heads[name](features).flatten(0, 1)
            loss, correct = _head_loss(logits, wanted[..., list(TARGETS).index(name)].flatten())
            losses.append(loss)
            accuracy[name] = round(correct, 3)
        known = ~centres.isnan()
        errors = (heads["centres"](features).flatten() - centres.flatten()).abs()[known.flatten()]
        losses.append(phase.centre_weight * errors.mean())
        accuracy["centre_error"] = round(errors.mean().item(), 3)
        total = torch.stack(losses).sum()
        optimizer.zero_grad()
        total.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        rate.step()
        if step % 50 == 0:
            seconds = round(time.monotonic() - start)
            line = {
                "stage": f"0-{lessons.name}-{phase.name}",
                "step": step,
                "loss": round(total.item(), 4),
                "run_seconds": seconds,
                **accuracy,
            }
            with log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
