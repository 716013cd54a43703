"""Lessons of the tiny CrossVLLM before any text: its tower patch by patch, then its projectors token by token."""

import json
import random
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, ProcessorMixin

from longvideo.evaluation.corpus import Difficulty, Scene
from longvideo.evaluation.corpus.long_scenes import LONG_FPS, make_long_scene
from longvideo.modeling.crossvllm.configuration_crossvllm import GRANULARITIES
from longvideo.tiny_training.build_parts import encode_frames
from longvideo.tiny_training.connector import calibrate
from longvideo.tiny_training.crossvllm_rows import SceneEncoder
from longvideo.tiny_training.tower import IMAGES, TARGETS, TowerLessons, _head_loss, patch_targets

# Something is seen in every frame; in a tenth of them it is a letter.
SHOWN = Difficulty(shapes=(1, 1, 2), timed=False, needle=1.0)
TOWER = TowerLessons(
    "clip",
    tower=lambda model: model.model.vision_tower,
    encode=encode_frames,
    statistics=lambda processor: (processor.video_processor.image_mean, processor.video_processor.image_std),
    phases=(replace(IMAGES, difficulty=SHOWN, batch_size=64, num_steps=200, learning_rate=5e-4, warmup_steps=20),),
)
PROJECTOR_STEPS = 200
FRAMES_PER_SCENE, SCENES = 4, 16
# Of a shape that moves all the time the way cannot be seen in one frame.
SEEN_IN_A_FRAME = ("shape", "colour", "letter")


def _token_labels(scene: Scene, indices: list[int], side: int) -> torch.Tensor:
    """Labels (F, side * side, 3) of tokens: with one token per frame, what the frame shows anywhere."""
    times = [(index + 0.5) / LONG_FPS for index in indices]
    labels, _ = patch_targets(scene, times, side if side > 1 else 6)
    found = torch.from_numpy(labels)[..., [list(TARGETS).index(name) for name in SEEN_IN_A_FRAME]]
    return found if side > 1 else found.amax(dim=1, keepdim=True)


def teach_projectors(
    model: PreTrainedModel, processor: ProcessorMixin, *, first_seed: int, log: Path, num_steps: int = PROJECTOR_STEPS
) -> None:
    """Trains both projectors to keep what a token shows, by linear heads that are thrown away; then evens them out.

    Args:
        model: model with a taught tower; its projectors are changed in place.
        processor: of the model.
        first_seed: number of the first scene.
        log: file that gets one JSON object per line.
        num_steps: steps.
    """
    encoder, core = SceneEncoder(model, processor), model.model
    heads = nn.ModuleDict()
    for name in GRANULARITIES:
        for target in SEEN_IN_A_FRAME:
            heads[f"{name}_{target}"] = nn.Linear(model.config.text_config.hidden_size, 1 + len(TARGETS[target]))
    core.projectors.requires_grad_(True)
    parameters = [*core.projectors.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, 2e-3, weight_decay=0.01)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - 0.95 * step / num_steps)
    start = time.monotonic()
    for step in range(1, num_steps + 1):
        seeds = range(first_seed + (step - 1) * SCENES, first_seed + step * SCENES)
        views = [_lively_view(seed) for seed in seeds]
        patches = torch.cat(encoder(views))
        losses, accuracy = [], {}
        for name in GRANULARITIES:
            with model.use_granularity(name):
                tokens = core.project_patches(patches)
            labels = torch.cat([_token_labels(*view, model.config.tokens_per_side(name)) for view in views])
            for place, target in enumerate(SEEN_IN_A_FRAME):
                logits = heads[f"{name}_{target}"](tokens).flatten(0, 1)
                loss, right = _head_loss(logits, labels[..., place].flatten())
                losses.append(loss)
                accuracy[f"{name}_{target}"] = round(right, 3)
        total = torch.stack(losses).sum()
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        rate.step()
        if step % 20 == 0:
            line = {"stage": "0-projectors", "step": step, "loss": round(total.item(), 4), **accuracy}
            with log.open("a", encoding="utf-8") as file:
                file.write(json.dumps({**line, "run_seconds": round(time.monotonic() - start)}) + "\n")
    even_out(model, encoder, first_seed=first_seed + num_steps * SCENES)


def _lively_view(seed: int) -> tuple[Scene, list[int]]:
    """A long scene and some of its frames, three of four at moments at which something is seen."""
    scene, rng = make_long_scene(seed), random.Random(f"lively {seed}")
    spans = [(actor.enter, actor.leave) for actor in scene.actors]
    spans += [(scene.needle.start, scene.needle.end)] if scene.needle is not None else []
    times = [rng.uniform(*rng.choice(spans)) for _ in range(FRAMES_PER_SCENE - 1)] + [rng.random() * scene.duration]
    return scene, [min(int(moment * LONG_FPS), scene.duration * LONG_FPS - 1) for moment in times]


def even_out(model: PreTrainedModel, encoder: SceneEncoder, *, first_seed: int, num_scenes: int = 64) -> None:
    """Brings both projectors' tokens to the length of the words' embeddings; see `calibrate`.

    Args:
        model: its projectors are changed in place.
        encoder: of the model.
        first_seed: number of the first scene.
        num_scenes: scenes whose tokens are measured.
    """
    patches = torch.cat(encoder([_lively_view(seed) for seed in range(first_seed, first_seed + num_scenes)]))
    length = model.get_input_embeddings().weight.norm(dim=1).mean().item()
    for name in GRANULARITIES:
        with model.use_granularity(name):
            calibrate(
                model.model.projectors[name].linear_2, lambda: model.model.project_patches(patches), length=length
            )
