"""Corpora of questions about when and where: balanced choices, rows in the `messages` form, files."""

import json
import os
import random
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from longvideo.evaluation.corpus.grounding import (
    ALL_TASKS,
    GROUNDING_TASKS,
    IMAGE_TASKS,
    NUM_FRAMES,
    Grounding,
    make_groundings,
    seen_seconds,
)
from longvideo.evaluation.corpus.render import render_frames, write_video
from longvideo.evaluation.corpus.scenes import Difficulty, Scene, make_scene
from longvideo.processing.llava_st.grounding_llava_st import Box, Span


@dataclass(frozen=True)
class GroundingItem:
    """A scene together with the questions about times and places that a corpus asks about it."""

    scene: Scene
    groundings: tuple[Grounding, ...]


def grounding_items(
    num: int,
    *,
    tasks: Iterable[str] | None = None,
    split: str = "held_out",
    seed: int = 0,
    size: tuple[int, int] = (256, 256),
    num_frames: int = NUM_FRAMES,
    difficulty: str | Difficulty = "full",
    max_per_scene: int = 4,
) -> list[GroundingItem]:
    """Chooses questions over as many scenes as it takes, each task as often and in it each sort of event or shape.

    Args:
        num: number of questions.
        tasks: tasks to ask; default all of GROUNDING_TASKS.
        split: "train" or "held_out".
        seed: first scene; the following ones count up from it.
        size: (width, height) of the frames in pixels.
        num_frames: frames that the model sees.
        difficulty: name of a preset or a Difficulty.
        max_per_scene: most questions about one video, each of another task.

    Returns:
        Scenes with their questions, `num` in all.

    Raises:
        ValueError: num below 1, an unknown task, or a difficulty whose scenes do not allow a task.
    """
    if num < 1:
        raise ValueError(f"the number of questions is {num}, expected at least 1")
    named = GROUNDING_TASKS if tasks is None else tuple(tasks)
    wanted, unknown = [task for task in ALL_TASKS if task in named], sorted(set(named) - set(ALL_TASKS))
    if unknown or not wanted:
        raise ValueError(f"unknown grounding tasks {unknown}: use {', '.join(ALL_TASKS)}")
    quota = {task: num // len(wanted) + (place < num % len(wanted)) for place, task in enumerate(wanted)}
    taken: Counter[str] = Counter()
    filled: Counter[tuple[str, str]] = Counter()
    items: list[GroundingItem] = []
    for number in range(seed, seed + 100 * num + 1000):
        scene = make_scene(number, split, difficulty=difficulty)
        pool = make_groundings(scene, wanted, size=size, num_frames=num_frames)
        rng = random.Random(f"{split} {number} grounding items")
        chosen = _choose(pool, quota, taken, filled, max_per_scene, rng)
        if chosen:
            items.append(GroundingItem(scene, tuple(chosen)))
        if sum(taken.values()) == num:
            return items
    missing = [task for task in wanted if taken[task] < quota[task]]
    raise ValueError(f"difficulty {difficulty!r} allows too few questions of task {', '.join(missing)}")


def _choose(
    pool: list[Grounding],
    quota: dict[str, int],
    taken: Counter[str],
    filled: Counter[tuple[str, str]],
    limit: int,
    rng: random.Random,
) -> list[Grounding]:
    """Takes from one scene what the corpus still lacks, tasks furthest behind first; updates the counts."""
    chosen: list[Grounding] = []
    for task in sorted(quota, key=lambda task: (taken[task] / max(quota[task], 1), ALL_TASKS.index(task))):
        fitting = [item for item in pool if item.task == task]
        if len(chosen) == limit or taken[task] >= quota[task] or not fitting:
            continue
        least = min(filled[task, item.bucket] for item in fitting)
        # A scene without the rarest sort is passed over, unless it is hardly behind.
        rarest = min((count for (name, _), count in filled.items() if name == task), default=0)
        if least > rarest + 2 + quota[task] // 8:
            continue
        item = rng.choice([item for item in fitting if filled[task, item.bucket] == least])
        filled[task, item.bucket] += 1
        taken[task] += 1
        chosen.append(item)
    return chosen


def grounding_row(
    scene: Scene, grounding: Grounding, path: str, *, size: tuple[int, int], number: int = 0
) -> dict[str, Any]:
    """One row in the `messages` form, with its truth as plain numbers.

    Args:
        scene: what the video shows.
        grounding: the question.
        path: path of the video, or of the picture for tasks about one frame, as it shall stand in the row.
        size: (width, height) of the video in pixels.
        number: tells rows about one scene and task apart.

    Returns:
        Dict with `messages`, `task`, `question`, `answer`, `size` in pixels, `duration` (seconds from the first to the
        last frame, None for a picture) and, where the task has it, `caption`, `span` [start, end] in seconds, `box`
        [x1, y1, x2, y2] in pixels, `tube` {"times": seconds, "boxes": pixels} and `parts`, a list of {"caption",
        "span", "box"}.
    """
    is_image = grounding.task in IMAGE_TASKS
    visual = {"type": "image" if is_image else "video", "path": path}
    span, box, tube = grounding.span, grounding.box, grounding.tube
    return {
        "id": f"{scene.split}-{scene.seed}-{grounding.task}-{number}",
        "messages": [
            {"role": "user", "content": [visual, {"type": "text", "text": grounding.question}]},
            {"role": "assistant", "content": [{"type": "text", "text": grounding.answer}]},
        ],
        "task": grounding.task,
        "question": grounding.question,
        "answer": grounding.answer,
        "size": list(size),
        "duration": None if is_image else seen_seconds(scene),
        "fps": None if is_image else scene.fps,
        "caption": grounding.caption,
        "span": _ends(span),
        "box": _edges(box),
        "tube": None if tube is None else {"times": list(tube.times), "boxes": [_edges(each) for each in tube.boxes]},
        "parts": [
            {"caption": part.text, "span": _ends(part.span), "box": _edges(part.box)} for part in grounding.parts
        ]
        or None,
    }


def _ends(span: Span | None) -> list[float] | None:
    return None if span is None else [span.start, span.end]


def _edges(box: Box | None) -> list[float] | None:
    return None if box is None else [box.x1, box.y1, box.x2, box.y2]


def write_picture(frame: np.ndarray, path: Path) -> None:
    """Writes (height, width, 3) uint8 as PNG, under a temporary name first.

    Args:
        frame: the picture.
        path: file; its folder is made if absent.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        Image.fromarray(frame).save(partial, format="PNG")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_item(item: GroundingItem, out: Path, *, size: tuple[int, int]) -> list[dict[str, Any]]:
    """Writes the video and the pictures that the questions of one scene need.

    Args:
        item: scene and questions.
        out: folder for `videos/` and `images/`.
        size: (width, height) of the frames in pixels, even.

    Returns:
        Rows, whose paths are relative to the folder.
    """
    scene, rows = item.scene, []
    name = f"{scene.split}_{scene.seed:06d}"
    if any(grounding.task not in IMAGE_TASKS for grounding in item.groundings):
        write_video(scene, out / f"videos/{name}.mp4", size=size)
    for number, grounding in enumerate(item.groundings):
        path = f"videos/{name}.mp4"
        if grounding.task in IMAGE_TASKS:
            path = f"images/{name}.png"
            # Both tasks about one frame take the frame at the same time.
            write_picture(render_frames(scene, [grounding.time or 0.0], size)[0], out / path)
        rows.append(grounding_row(scene, grounding, path, size=size, number=number))
    return rows


def write_grounding_corpus(
    out: str | os.PathLike[str],
    num: int,
    *,
    tasks: Iterable[str] | None = None,
    split: str = "held_out",
    seed: int = 0,
    size: int = 256,
    num_frames: int = NUM_FRAMES,
    difficulty: str | Difficulty = "full",
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Writes videos, pictures and `rows.jsonl`; rows name their files relative to the folder of the file.

    Args:
        out: folder; made if absent, files of equal name are replaced.
        num: number of questions.
        tasks: tasks to ask; default all of GROUNDING_TASKS.
        split: "train" or "held_out".
        seed: first scene.
        size: side of the videos in pixels, even.
        num_frames: frames that the model sees; tubes have boxes at these.
        difficulty: name of a preset or a Difficulty.
        progress: called with the number of written scenes and their total.

    Returns:
        Path of rows.jsonl.

    Raises:
        ValueError: an unknown task, split or difficulty, or an odd size.
    """
    out, sides = Path(out), (size, size)
    items = grounding_items(
        num, tasks=tasks, split=split, seed=seed, size=sides, num_frames=num_frames, difficulty=difficulty
    )
    rows: list[dict[str, Any]] = []
    for done, item in enumerate(items, start=1):
        rows += write_item(item, out, size=sides)
        if progress is not None:
            progress(done, len(items))
    path = out / "rows.jsonl"
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_text(path: Path, text: str) -> None:
    """Writes a text file under a temporary name first, and makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
