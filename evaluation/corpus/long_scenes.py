"""Long scenes: minutes of an empty ground on which a shape or a letter is seen for some seconds now and then.

They are made beside `make_scene`, with random numbers of their own. Events come one after another, each begins and
ends at a multiple of ten seconds, of five in short scenes, and every question can be answered from one of them alone:
its segment.
"""

import random
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from longvideo.evaluation.corpus.questions import NUM_OPTIONS, Question
from longvideo.evaluation.corpus.render import render_frames
from longvideo.evaluation.corpus.scenes import (
    BACKGROUNDS,
    COLOURS,
    DIRECTIONS,
    FPS,
    LETTERS,
    MAX_SEED,
    SHAPES,
    SPLITS,
    Actor,
    Motion,
    Needle,
    Scene,
    _draw_background,
)

LONG_KINDS: tuple[str, ...] = ("colour", "shape", "direction", "needle")
TIME_STEP = 5
# Frames per second of a decoded long video: a segment of ten seconds has twenty.
LONG_FPS = 2
_WORDINGS: dict[str, tuple[str, ...]] = {
    "colour": ("What colour is the {shape} ?", "Which colour does the {shape} have ?"),
    "shape": ("Which shape is {colour} ?", "What is the shape of the {colour} thing ?"),
    "direction": ("Which way does the {shape} move ?", "Which way does the {colour} shape move ?"),
    "needle": ("Which letter is shown ?", "What letter appears in the video ?"),
}
_ANSWERS = {
    "colour": tuple(COLOURS),
    "shape": tuple(SHAPES),
    "direction": tuple(DIRECTIONS),
    "needle": tuple(LETTERS),
}


@dataclass(frozen=True)
class LongDifficulty:
    """Knobs of long scenes.

    Attributes:
        durations: lengths of videos in seconds, multiples of `step`.
        shapes: numbers of shapes to draw from.
        stays: seconds that a shape or a letter is seen, multiples of `step`.
        letter: chance of a letter.
        move: chance that a shape moves, all the time that it is seen.
        backgrounds: kinds to draw from.
        step: seconds; events begin and end at multiples of it, with a pause of at least one between them.
    """

    durations: tuple[int, ...] = (120, 180, 240, 300)
    shapes: tuple[int, ...] = (2, 3)
    stays: tuple[int, ...] = (10, 20)
    letter: float = 0.6
    move: float = 0.5
    backgrounds: tuple[str, ...] = BACKGROUNDS
    step: int = 2 * TIME_STEP


LONG_DIFFICULTIES: dict[str, LongDifficulty] = {
    "long": LongDifficulty(),
    "short": LongDifficulty(durations=(40, 50, 60), shapes=(1, 2), stays=(5, 10), letter=0.4, step=TIME_STEP),
}


@dataclass(frozen=True)
class LongQuestion:
    """A question about a long scene and where its answer is seen.

    Attributes:
        question: the question, with four options.
        segment: (start, end) in seconds of the event that it asks about.
    """

    question: Question
    segment: tuple[float, float]


def make_long_scene(seed: int, split: str = "train", *, difficulty: str | LongDifficulty = "long") -> Scene:
    """Draws the long scene of a seed; the same arguments always give the same scene.

    Args:
        seed: number of the scene inside its split, 0 <= seed < 2**40.
        split: "train" or "held_out"; no seed of one gives the random numbers of the other.
        difficulty: name in LONG_DIFFICULTIES, or a LongDifficulty.

    Returns:
        Scene in which one thing is seen at a time, no two shapes of one form or one colour.

    Raises:
        ValueError: unknown split or difficulty, a seed outside the range of a split, or events that do not fit.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: use one of {', '.join(SPLITS)}")
    if not 0 <= seed < MAX_SEED:
        raise ValueError(f"seed is {seed}, expected 0 <= seed < {MAX_SEED}")
    knobs = resolve_long_difficulty(difficulty)
    rng = random.Random(f"{split} long scene {seed}")
    duration = rng.choice(knobs.durations)
    background = _draw_background(rng, knobs.backgrounds)
    count = rng.choice(knobs.shapes)
    has_letter = rng.random() < knobs.letter
    spans = _draw_spans(rng, duration, count + has_letter, knobs)
    rng.shuffle(spans)
    needle = Needle(rng.choice(LETTERS), *spans.pop()) if has_letter else None
    forms, colours = rng.sample(SHAPES, count), rng.sample(tuple(COLOURS), count)
    actors = [
        _draw_long_actor(rng, *drawn, move=knobs.move) for drawn in zip(forms, colours, sorted(spans), strict=True)
    ]
    return Scene(seed, split, duration, FPS, background, tuple(actors), needle)


def resolve_long_difficulty(difficulty: str | LongDifficulty) -> LongDifficulty:
    """Turns the name of a preset into its knobs.

    Raises:
        ValueError: the name is not one of LONG_DIFFICULTIES.
    """
    if isinstance(difficulty, LongDifficulty):
        return difficulty
    if difficulty not in LONG_DIFFICULTIES:
        raise ValueError(f"unknown difficulty {difficulty!r}: use one of {', '.join(LONG_DIFFICULTIES)}")
    return LONG_DIFFICULTIES[difficulty]


def _draw_spans(rng: random.Random, duration: int, count: int, knobs: LongDifficulty) -> list[tuple[float, float]]:
    """Spans one after another with pauses of at least one step; all times are multiples of the step."""
    lengths = [rng.choice(knobs.stays) for _ in range(count)]
    free = (duration - sum(lengths)) // knobs.step - (count - 1)
    if free < 0:
        raise ValueError(
            f"{count} events of {lengths} s do not fit into {duration} s: use longer videos or less events"
        )
    # The free steps are dealt to the pauses, before the first and behind the last event too.
    borders = sorted(rng.randint(0, free) for _ in range(count))
    spans, used = [], 0
    for index, (border, length) in enumerate(zip(borders, lengths, strict=True)):
        start = (border + index) * knobs.step + used
        spans.append((float(start), float(start + length)))
        used += length
    return spans


def _draw_long_actor(rng: random.Random, shape: str, colour: str, span: tuple[float, float], *, move: float) -> Actor:
    radius = rng.uniform(0.16, 0.22)
    margin = radius + 0.02
    x, y = rng.uniform(margin, 1 - margin), rng.uniform(margin, 1 - margin)
    if rng.random() >= move:
        return Actor(shape, colour, radius, x, y, *span)
    direction = rng.choice(tuple(DIRECTIONS))
    distance = rng.uniform(0.4, 1 - 2 * margin)
    origin = rng.uniform(margin, 1 - margin - distance)
    if direction in ("left", "up"):
        origin += distance
    x, y = (origin, y) if direction in ("left", "right") else (x, origin)
    return Actor(shape, colour, radius, x, y, *span, motion=Motion(direction, *span, distance))


def long_questions(scene: Scene, kinds: tuple[str, ...] = LONG_KINDS) -> list[LongQuestion]:
    """Every question that a long scene allows, in the order of LONG_KINDS.

    Args:
        scene: from `make_long_scene`.
        kinds: kinds to ask.

    Returns:
        Questions with the segments of their events.

    Raises:
        ValueError: a kind that is not in LONG_KINDS.
    """
    unknown = sorted(set(kinds) - set(LONG_KINDS))
    if unknown:
        raise ValueError(f"unknown question kinds {unknown}: use {', '.join(LONG_KINDS)}")
    found = []
    for kind in (kind for kind in LONG_KINDS if kind in kinds):
        # One generator a kind: asking for fewer kinds gives the same questions of the others.
        rng = random.Random(f"{scene.split} {scene.seed} long {kind}")
        if kind == "needle":
            if scene.needle is not None:
                found.append(_build(rng, kind, scene.needle.letter, (scene.needle.start, scene.needle.end)))
            continue
        for actor in scene.actors:
            answer = {"colour": actor.colour, "shape": actor.shape}.get(kind)
            if kind == "direction" and actor.motion is not None:
                answer = actor.motion.direction
            if answer is not None:
                names = {"shape": actor.shape, "colour": actor.colour}
                found.append(_build(rng, kind, answer, (actor.enter, actor.leave), **names))
    return found


def _build(rng: random.Random, kind: str, answer: str, segment: tuple[float, float], **names: str) -> LongQuestion:
    others = [other for other in _ANSWERS[kind] if other != answer]
    options = [answer, *rng.sample(others, NUM_OPTIONS - 1)]
    text = rng.choice(_WORDINGS[kind]).format(**names)
    question = Question(kind, text, answer, tuple(options), 0, kind, answer)
    return LongQuestion(question.with_answer_index(rng.randrange(NUM_OPTIONS)), segment)


def long_items(
    num: int, *, split: str = "held_out", seed: int = 0, difficulty: str | LongDifficulty = "long"
) -> list[tuple[Scene, LongQuestion]]:
    """Chooses questions, one per scene, the kinds in turn and every answer of a kind equally often, up to one.

    Args:
        num: number of questions.
        split: "train" or "held_out".
        seed: first scene; the following ones count up from it.
        difficulty: name in LONG_DIFFICULTIES, or a LongDifficulty.

    Returns:
        Scenes with their question.

    Raises:
        ValueError: num below 1.
    """
    if num < 1:
        raise ValueError(f"the number of questions is {num}, expected at least 1")
    items: list[tuple[Scene, LongQuestion]] = []
    taken: dict[tuple[str, str], int] = {(kind, answer): 0 for kind in LONG_KINDS for answer in _ANSWERS[kind]}
    while len(items) < num:
        scene = make_long_scene(seed, split, difficulty=difficulty)
        kind = LONG_KINDS[len(items) % len(LONG_KINDS)]
        least = min(count for (name, _), count in taken.items() if name == kind)
        pool = long_questions(scene, (kind,))
        pool = [found for found in pool if taken[kind, found.question.answer] == least]
        if pool:
            chosen = random.Random(f"{split} {seed} long item").choice(pool)
            taken[kind, chosen.question.answer] += 1
            items.append(
                (scene, replace(chosen, question=chosen.question.with_answer_index(len(items) % NUM_OPTIONS)))
            )
        seed += 1
    return items


def render_long(scene: Scene, size: int = 64, *, fps: int = LONG_FPS) -> np.ndarray:
    """Draws a whole long scene as a decoded video; frame k is seen at the middle of its share of a second.

    Args:
        scene: what to draw.
        size: side of the frames in pixels.
        fps: frames per second.

    Returns:
        (F, size, size, 3) uint8.
    """
    times = [(index + 0.5) / fps for index in range(scene.duration * fps)]
    return render_frames(scene, times, size)


def long_row(scene: Scene, found: LongQuestion, video: Any, *, fps: int = LONG_FPS) -> dict[str, Any]:
    """Writes a question as a row of cross-granularity training.

    Args:
        scene: what the video shows.
        found: the question.
        video: decoded frames from `render_long`, or a path.
        fps: frames per second of decoded frames.

    Returns:
        Dict with `video`, `video_metadata`, `question`, `answer`, `segment` in seconds, `duration`, `kind` and `id`.
    """
    return {
        "id": f"{scene.split}-{scene.seed}-{found.question.kind}",
        "video": video,
        "video_metadata": {"fps": fps},
        "question": found.question.question,
        "answer": found.question.answer,
        "segment": list(found.segment),
        "duration": scene.duration,
        "kind": found.question.kind,
    }
