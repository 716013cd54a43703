"""Corpora: balanced choices of questions over many scenes, rows in the `messages` format, samples for training."""

import json
import os
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from longvideo.evaluation.corpus.questions import (
    KINDS,
    NUM_OPTIONS,
    Question,
    all_questions,
)
from longvideo.evaluation.corpus.render import write_video
from longvideo.evaluation.corpus.scenes import Difficulty, Scene, make_scene

FORMS: tuple[str, ...] = ("open", "letter")


@dataclass(frozen=True)
class Item:
    """A scene together with the questions that a corpus asks about it."""

    scene: Scene
    questions: tuple[Question, ...]


def balanced_items(
    num: int,
    *,
    split: str = "held_out",
    seed: int = 0,
    kinds: Iterable[str] | None = None,
    difficulty: str | Difficulty = "full",
    max_per_scene: int = 4,
) -> list[Item]:
    """Chooses questions over as many scenes as it takes, so that no kind, answer, rank or place is favoured.

    Inside a kind every bucket (answer; or event, rank and finer place of a time) gets the same number, up to one; the
    place of the truth among the options goes round evenly.

    Args:
        num: number of questions.
        split: "train" or "held_out".
        seed: first scene; the following ones count up from it.
        kinds: kinds to ask; default all.
        difficulty: name of a preset or a Difficulty.
        max_per_scene: most questions about one video, each of another kind.

    Returns:
        Scenes with their questions, `num` in all.

    Raises:
        ValueError: num below 1, an unknown kind, or a difficulty whose scenes do not allow a kind.
    """
    if num < 1:
        raise ValueError(f"the number of questions is {num}, expected at least 1")
    wanted = [kind for kind in KINDS if kinds is None or kind in tuple(kinds)]
    unknown = sorted(set(kinds or ()) - set(KINDS))
    if unknown or not wanted:
        raise ValueError(f"unknown question kinds {unknown}: use {', '.join(KINDS)}")
    quota = {kind: num // len(wanted) + (place < num % len(wanted)) for place, kind in enumerate(wanted)}
    buckets = _find_buckets(tuple(wanted), split, seed, difficulty)
    filled: Counter[tuple[str, str]] = Counter()
    taken: Counter[str] = Counter()
    items: list[Item] = []
    number = seed
    while sum(taken.values()) < num:
        if number - seed > 200 * num + 2000:
            missing = [kind for kind in wanted if taken[kind] < quota[kind]]
            raise ValueError(f"difficulty {difficulty!r} allows too few questions of kind {', '.join(missing)}")
        scene = make_scene(number, split, difficulty=difficulty)
        number += 1
        rng = random.Random(f"{split} {scene.seed} items")
        chosen = _choose(rng, all_questions(scene, wanted), quota, taken, filled, buckets, max_per_scene)
        if chosen:
            items.append(Item(scene, tuple(chosen)))
    return items


@lru_cache(maxsize=16)
def _find_buckets(kinds: tuple[str, ...], split: str, seed: int, difficulty: str | Difficulty) -> dict[str, int]:
    """Number of buckets of each kind, seen in the first scenes."""
    found: dict[str, set[str]] = {kind: set() for kind in kinds}
    for number in range(seed, seed + 1000):
        for question in all_questions(make_scene(number, split, difficulty=difficulty), kinds):
            found[question.kind].add(question.bucket)
    return {kind: max(len(names), 1) for kind, names in found.items()}


def _choose(
    rng: random.Random,
    pool: list[Question],
    quota: dict[str, int],
    taken: Counter[str],
    filled: Counter[tuple[str, str]],
    buckets: dict[str, int],
    limit: int,
) -> list[Question]:
    """Takes from one scene the questions that the corpus still lacks, kinds furthest behind first; updates counts."""
    chosen: list[Question] = []
    for kind in sorted(quota, key=lambda kind: (taken[kind] / max(quota[kind], 1), KINDS.index(kind))):
        if len(chosen) == limit or taken[kind] >= quota[kind]:
            continue
        # A bucket may be one ahead of the even share only once every bucket has its share.
        share, rest = divmod(quota[kind], buckets[kind])
        ahead = sum(1 for (name, _), count in filled.items() if name == kind and count > share)
        room = share + 1 if ahead < rest else share
        fitting = [question for question in pool if question.kind == kind and filled[kind, question.bucket] < room]
        if not fitting:
            continue
        least = min(filled[kind, question.bucket] for question in fitting)
        question = rng.choice([question for question in fitting if filled[kind, question.bucket] == least])
        filled[kind, question.bucket] += 1
        chosen.append(question.with_answer_index(_next_place(taken[kind])))
        taken[kind] += 1
    return chosen


def _next_place(count: int) -> int:
    """Places of the truth in an order that is even over every four and not the same four again."""
    block, place = divmod(count, NUM_OPTIONS)
    return (place * (1, 3)[block % 2] + block // 2) % NUM_OPTIONS


def make_row(scene: Scene, question: Question, video_path: str, *, form: str = "open") -> dict[str, Any]:
    """One row in the `messages` format.

    Args:
        scene: what the video shows.
        question: the question.
        video_path: path of the mp4 file as it shall stand in the row.
        form: "open" (short text answer) or "letter" (four options, the answer is a letter).

    Returns:
        Dict with `messages` (video block with `path`, text block, assistant answer) and the question's fields.

    Raises:
        ValueError: unknown form.
    """
    if form not in FORMS:
        raise ValueError(f"unknown form {form!r}: use {' or '.join(FORMS)}")
    text, answer = question.question, question.answer
    if form == "letter":
        text, answer = question.multiple_choice, question.letter
    user = [{"type": "video", "path": video_path}, {"type": "text", "text": text}]
    return {
        "id": f"{scene.split}-{scene.seed}-{question.kind}-{form}",
        "messages": [
            {"role": "user", "content": user},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ],
        "kind": question.kind,
        "form": form,
        "question": question.question,
        "answer": question.answer,
        "options": list(question.options),
        "answer_index": question.answer_index,
        "duration": scene.duration,
    }


def write_corpus(
    out: str | os.PathLike[str],
    num: int,
    *,
    split: str = "held_out",
    seed: int = 0,
    size: int = 256,
    form: str = "both",
    kinds: Iterable[str] | None = None,
    difficulty: str | Difficulty = "full",
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Writes videos and `rows.jsonl`; rows name the videos relative to the folder of the file.

    Args:
        out: folder; made if absent, files of equal name are replaced.
        num: number of questions.
        split: "train" or "held_out".
        seed: first scene.
        size: side of the videos in pixels, even.
        form: "open", "letter", or "both" in turns.
        kinds: kinds to ask; default all.
        difficulty: name of a preset or a Difficulty.
        progress: called with the number of written videos and their total.

    Returns:
        Path of rows.jsonl.

    Raises:
        ValueError: an unknown form, kind, split or difficulty, or an odd size.
    """
    if form not in (*FORMS, "both"):
        raise ValueError(f"unknown form {form!r}: use {', '.join(FORMS)} or both")
    out = Path(out)
    items = balanced_items(num, split=split, seed=seed, kinds=kinds, difficulty=difficulty)
    rows: list[dict[str, Any]] = []
    for done, item in enumerate(items, start=1):
        name = f"videos/{item.scene.split}_{item.scene.seed:06d}.mp4"
        write_video(item.scene, out / name, size=(size, size))
        for question in item.questions:
            row_form = FORMS[len(rows) % 2] if form == "both" else form
            rows.append(make_row(item.scene, question, name, form=row_form))
        if progress is not None:
            progress(done, len(items))
    path = out / "rows.jsonl"
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def read_rows(path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """Rows of a rows.jsonl with the paths of their videos and pictures made absolute."""
    path = Path(path)
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            for message in row["messages"]:
                for block in message["content"]:
                    if block["type"] in ("video", "image"):
                        block["path"] = str((path.parent / block["path"]).resolve())
            yield row
