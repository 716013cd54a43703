"""Procedural scenes: coloured shapes in timed events, deterministic by seed, before any pixel is drawn.

Times are seconds from the start of the video. Positions and radii are fractions of the frame (x to the right, y down).
The rules of a layout are written in sixteenths of the video ("units"), because questions are only asked about what
sixteen uniformly sampled frames show.
"""

import dataclasses
import hashlib
import json
import random
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from longvideo.processing.shared.frame_sampling import middle_indices

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (225, 40, 40),
    "green": (40, 185, 60),
    "blue": (50, 90, 245),
    "yellow": (245, 220, 50),
    "purple": (195, 60, 220),
    "white": (245, 245, 245),
}
SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "cross", "ring")
LETTERS: tuple[str, ...] = ("H", "L", "T", "V", "X", "Z")
DIRECTIONS: dict[str, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
BACKGROUNDS: tuple[str, ...] = ("plain", "gradient", "checker", "noise")
SPLITS: tuple[str, ...] = ("train", "held_out")
MAX_SEED = 1 << 40
UNITS = 16
FPS = 8
# In units: a shape there from the start leaves at EARLIEST or later, one that stays to the end enters by LATEST, any
# other stays for SHORTEST, so that at least two of sixteen frames show it.
EARLIEST = 1.65
LATEST = UNITS - EARLIEST
SHORTEST = 2.6


@dataclass(frozen=True)
class Motion:
    """A straight movement at constant speed from `start` to `end` seconds over `distance` (fraction of the frame)."""

    direction: str
    start: float
    end: float
    distance: float


@dataclass(frozen=True)
class Actor:
    """One shape: seen in [enter, leave) seconds, at (x, y) before it moves, with one optional change of colour."""

    shape: str
    colour: str
    radius: float
    x: float
    y: float
    enter: float
    leave: float
    motion: Motion | None = None
    new_colour: str | None = None
    change: float | None = None

    def visible(self, time: float) -> bool:
        """Whether the shape is in the frame at `time` seconds (the needle not considered)."""
        return self.enter <= time < self.leave

    def position(self, time: float) -> tuple[float, float]:
        """Centre of the shape at `time` seconds."""
        if self.motion is None:
            return self.x, self.y
        span = self.motion.end - self.motion.start
        done = min(max((time - self.motion.start) / span, 0.0), 1.0) * self.motion.distance
        step_x, step_y = DIRECTIONS[self.motion.direction]
        return self.x + step_x * done, self.y + step_y * done

    def colour_at(self, time: float) -> str:
        """Name of the colour at `time` seconds."""
        if self.change is not None and self.new_colour is not None and time >= self.change:
            return self.new_colour
        return self.colour


@dataclass(frozen=True)
class Needle:
    """A white letter on a black frame that replaces the picture in [start, end) seconds."""

    letter: str
    start: float
    end: float

    def visible(self, time: float) -> bool:
        """Whether the letter is shown at `time` seconds."""
        return self.start <= time < self.end


@dataclass(frozen=True)
class Background:
    """A muted, static background: `kind` of BACKGROUNDS, two colours, cells a side, and the seed of its noise."""

    kind: str
    first: tuple[int, int, int]
    second: tuple[int, int, int]
    cells: int = 4
    vertical: bool = False
    seed: int = 0


@dataclass(frozen=True)
class Scene:
    """Everything that a video shows; `seed` and `split` name it, `duration` is in whole seconds."""

    seed: int
    split: str
    duration: int
    fps: int
    background: Background
    actors: tuple[Actor, ...]
    needle: Needle | None = None

    def to_dict(self) -> dict[str, Any]:
        """The scene as plain dicts, lists and numbers."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Scene":
        """The scene that `to_dict` wrote, also after a trip through JSON."""
        actors = []
        for item in values["actors"]:
            motion = Motion(**item["motion"]) if item["motion"] else None
            actors.append(Actor(**{**item, "motion": motion}))
        ground = values["background"]
        background = Background(**{**ground, "first": tuple(ground["first"]), "second": tuple(ground["second"])})
        needle = Needle(**values["needle"]) if values["needle"] else None
        return cls(**{**values, "background": background, "actors": tuple(actors), "needle": needle})

    def fingerprint(self) -> str:
        """Hash of what is seen, without seed and split: equal for equal videos."""
        values = self.to_dict()
        del values["seed"], values["split"]
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Difficulty:
    """Knobs of a curriculum.

    Attributes:
        shapes: numbers of shapes to draw from (repeat a number to make it likelier).
        timed: shapes enter and leave during the video; otherwise each is there from start to end.
        move: chance that a shape moves.
        change: chance that a shape that does not move changes its colour.
        needle: chance of a needle.
        backgrounds: kinds to draw from.
        durations: shortest and longest video in seconds.
    """

    shapes: tuple[int, ...] = (1, 2, 3, 4)
    timed: bool = True
    move: float = 0.5
    change: float = 0.5
    needle: float = 0.4
    backgrounds: tuple[str, ...] = field(default=BACKGROUNDS)
    durations: tuple[int, int] = (5, 60)


DIFFICULTIES: dict[str, Difficulty] = {
    "single": Difficulty(shapes=(1,), timed=False, change=0.0, needle=0.0, backgrounds=("plain",)),
    "easy": Difficulty(shapes=(1, 2), change=0.3, needle=0.25, backgrounds=("plain",)),
    "medium": Difficulty(shapes=(1, 2, 2, 3), backgrounds=("plain", "gradient")),
    "full": Difficulty(),
}


def resolve_difficulty(difficulty: str | Difficulty) -> Difficulty:
    """Turns the name of a preset into its knobs.

    Raises:
        ValueError: the name is not one of DIFFICULTIES.
    """
    if isinstance(difficulty, Difficulty):
        return difficulty
    if difficulty not in DIFFICULTIES:
        raise ValueError(f"unknown difficulty {difficulty!r}: use one of {', '.join(DIFFICULTIES)} or a Difficulty")
    return DIFFICULTIES[difficulty]


def _draw_background(rng: random.Random, kinds: tuple[str, ...]) -> Background:
    base = rng.randint(70, 115)
    first = tuple(base + rng.randint(-16, 16) for _ in range(3))
    shift = rng.choice((-1, 1)) * rng.randint(14, 26)
    second = tuple(min(max(value + shift + rng.randint(-6, 6), 45), 140) for value in first)
    return Background(
        kind=rng.choice(kinds),
        first=first,
        second=second,
        cells=rng.choice((4, 8)),
        vertical=rng.random() < 0.5,
        seed=rng.randrange(1 << 30),
    )


def _draw_intervals(rng: random.Random, count: int, timed: bool) -> list[tuple[float, float]]:
    """Times in units during which each of `count` shapes is there: one after another, or together."""
    if not timed:
        return [(0.0, float(UNITS))] * count
    if count > 1 and rng.random() < (0.75 if count == 4 else 0.5):
        return _draw_sequence(rng, count)
    intervals = []
    for _ in range(count):
        enter = 0.0 if rng.random() < 0.3 else rng.uniform(0.8, LATEST)
        stays = rng.random() < 0.4 or enter + SHORTEST > UNITS - 0.8
        earliest = EARLIEST if enter == 0.0 else enter + SHORTEST
        intervals.append((enter, float(UNITS) if stays else rng.uniform(earliest, UNITS - 0.8)))
    return intervals


def _draw_sequence(rng: random.Random, count: int) -> list[tuple[float, float]]:
    """Intervals one after another with pauses; the first may begin and the last may end with the video."""
    weights = [rng.uniform(0.3, 1.7) for _ in range(2 * count + 1)]
    for index in range(0, 2 * count + 1, 2):
        weights[index] *= rng.choice((0.0, 0.6, 1.0))
    first_at_start, last_to_end = weights[0] == 0.0, weights[-1] == 0.0
    shortest = [SHORTEST] * count
    if first_at_start:
        shortest[0] = EARLIEST
    if last_to_end:
        shortest[-1] = UNITS - LATEST
    pause = 0.3 if count == 4 else 0.8
    edge = 0.8
    free = UNITS - sum(shortest) - (count - 1) * pause - edge * ((not first_at_start) + (not last_to_end))
    share = free / sum(weights)
    time, intervals = 0.0 if first_at_start else edge, []
    for index in range(count):
        enter = time + weights[2 * index] * share + (pause if index else 0.0)
        time = enter + shortest[index] + weights[2 * index + 1] * share
        intervals.append((enter, time))
    if last_to_end:
        intervals[-1] = (intervals[-1][0], float(UNITS))
    return intervals


def _draw_actor(
    rng: random.Random, knobs: Difficulty, shape: str, colours: list[str], interval: tuple[float, float], crowd: int
) -> Actor:
    """One shape with times in units, smaller in a crowd; takes its colours from the end of `colours`."""
    enter, leave = interval
    smallest, largest = {1: (0.16, 0.22), 2: (0.14, 0.19)}.get(crowd, (0.125, 0.155))
    radius = rng.uniform(smallest, largest)
    margin = radius + 0.02
    life = leave - enter
    motion, change, new_colour = None, None, None
    x, y = rng.uniform(margin, 1 - margin), rng.uniform(margin, 1 - margin)
    if life >= 4.2 and rng.random() < knobs.move:
        length = rng.uniform(3.8, min(life, 9.0)) if life > 3.8 else life
        start = enter + rng.uniform(0.0, life - length)
        direction = rng.choice(tuple(DIRECTIONS))
        distance = rng.uniform(0.35, min(0.65, 1 - 2 * margin))
        origin = rng.uniform(margin, 1 - margin - distance)
        if direction in ("left", "up"):
            origin += distance
        x, y = (origin, y) if direction in ("left", "right") else (x, origin)
        motion = Motion(direction, start, start + length, distance)
    elif life >= 4.8 and len(colours) > 1 and rng.random() < knobs.change:
        change = rng.uniform(enter + 2.2 if enter else EARLIEST, leave - 2.2 if leave < UNITS else LATEST)
        new_colour = colours.pop()
    return Actor(shape, colours.pop(), radius, x, y, enter, leave, motion, new_colour, change)


def _clear_of(actor: Actor, others: list[Actor]) -> bool:
    """Whether the shape never touches another one."""
    for other in others:
        first, last = max(actor.enter, other.enter), min(actor.leave, other.leave)
        if last <= first:
            continue
        reach = actor.radius + other.radius + 0.02
        for step in range(17):
            time = first + (last - first) * step / 16
            here, there = actor.position(time), other.position(time)
            if (here[0] - there[0]) ** 2 + (here[1] - there[1]) ** 2 < reach**2:
                return False
    return True


def _draw_actors(rng: random.Random, knobs: Difficulty, count: int) -> list[Actor] | None:
    intervals = _draw_intervals(rng, count, knobs.timed)
    shapes = rng.sample(SHAPES, count)
    colours = rng.sample(tuple(COLOURS), len(COLOURS))
    actors: list[Actor] = []
    for index in range(count):
        # Every shape still to come needs a colour of its own.
        spare = len(colours) - (count - index - 1)
        enter, leave = intervals[index]
        crowd = sum(other[0] < leave and enter < other[1] for other in intervals)
        for _ in range(12):
            palette = colours[:spare]
            actor = _draw_actor(rng, knobs, shapes[index], palette, intervals[index], crowd)
            if _clear_of(actor, actors):
                break
        else:
            return None
        used = {actor.colour, actor.new_colour}
        colours = [name for name in colours if name not in used]
        actors.append(actor)
    return actors


def _draw_needle(rng: random.Random, actors: list[Actor]) -> Needle | None:
    """A needle of one to two units that hides no event."""
    moments = [time for actor in actors for time in (actor.enter, actor.leave, actor.change) if time is not None]
    for _ in range(20):
        length = rng.uniform(1.0, 2.0)
        start = rng.uniform(0.3, UNITS - 0.3 - length)
        if all(time < start - 0.7 or time > start + length + 0.7 for time in moments if 0 < time < UNITS):
            return Needle(rng.choice(LETTERS), start, start + length)
    return None


def _to_seconds(actor: Actor, unit: float) -> Actor:
    motion = actor.motion
    if motion is not None:
        motion = dataclasses.replace(motion, start=motion.start * unit, end=motion.end * unit)
    change = None if actor.change is None else actor.change * unit
    return dataclasses.replace(actor, enter=actor.enter * unit, leave=actor.leave * unit, motion=motion, change=change)


def make_scene(seed: int, split: str = "train", *, difficulty: str | Difficulty = "full") -> Scene:
    """Draws the scene of a seed; the same arguments always give the same scene.

    Args:
        seed: number of the scene inside its split, 0 <= seed < 2**40.
        split: "train" or "held_out"; no seed of one gives the random numbers of the other.
        difficulty: name in DIFFICULTIES, or a Difficulty.

    Returns:
        Scene of 5 to 60 whole seconds with 1 to 4 shapes, no two of one shape or one colour.

    Raises:
        ValueError: unknown split or difficulty, or a seed outside the range of a split.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: use one of {', '.join(SPLITS)}")
    if not 0 <= seed < MAX_SEED:
        raise ValueError(f"seed is {seed}, expected 0 <= seed < {MAX_SEED}")
    knobs = resolve_difficulty(difficulty)
    # A hashed text: Random(257) and Random(257 + 2**40) are equal, so that offsets would not keep the splits apart.
    rng = random.Random(f"{split} scene {seed}")
    duration = rng.randint(*knobs.durations)
    background = _draw_background(rng, knobs.backgrounds)
    count = rng.choice(knobs.shapes)
    actors = _draw_actors(rng, knobs, count)
    while actors is None:
        actors = _draw_actors(rng, knobs, count)
    needle = _draw_needle(rng, actors) if rng.random() < knobs.needle else None
    unit = duration / UNITS
    if needle is not None:
        needle = Needle(needle.letter, needle.start * unit, needle.end * unit)
    return Scene(
        seed=seed,
        split=split,
        duration=duration,
        fps=FPS,
        background=background,
        actors=tuple(_to_seconds(actor, unit) for actor in actors),
        needle=needle,
    )


@lru_cache(maxsize=4096)
def _sample_times(duration: int, num_frames: int, fps: int) -> tuple[float, ...]:
    return tuple(index / fps for index in middle_indices(duration * fps, num_frames).tolist())


def sample_times(duration: int, num_frames: int = UNITS, *, fps: int = FPS) -> list[float]:
    """Times of the frames that uniform sampling takes from the written video.

    Args:
        duration: length of the video in seconds.
        num_frames: number of frames.
        fps: frames per second of the written video.

    Returns:
        Seconds, rising: the middle frame of each of `num_frames` equal parts, as `frame_sampling.middle_indices`.

    Raises:
        ValueError: num_frames is below 1.
    """
    return list(_sample_times(duration, num_frames, fps))
