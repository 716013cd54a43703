"""Questions about a scene, each with a short answer and four options, and a caption of what is seen over time.

A question is only asked when sixteen uniformly sampled frames show what it needs: a needle in one of them, anything
else in two. Nothing about the answer can be read off the question or the options alone: options of one question are
of one sort, the truth is at a random place, and the times of `when` are evenly spaced with the truth at any rank.
"""

import math
import random
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from longvideo.evaluation.corpus.scenes import COLOURS, DIRECTIONS, LETTERS, SHAPES, UNITS, Actor, Scene, sample_times

KINDS: tuple[str, ...] = ("colour", "shape", "count", "direction", "order", "at_time", "when", "needle")
OPTION_LETTERS = "ABCD"
NUM_OPTIONS = len(OPTION_LETTERS)
# Two moments are told apart when they are this many sixteenths of the video from each other.
CLEAR_GAP = 2.0
# Least distance between two options of `when`, as a part of the video.
SMALLEST_GAP = 0.185

_TEMPLATES: dict[str, tuple[str, ...]] = {
    "colour": ("What colour is the {name} ?", "Which colour does the {name} have ?"),
    "colour_first": ("What colour is the {name} when it appears ?", "Which colour does the {name} have first ?"),
    "colour_last": ("What colour is the {name} at the end ?", "Which colour does the {name} turn ?"),
    "shape": ("Which shape is {name} ?", "What is the shape of the {name} thing ?"),
    "count": ("How many shapes appear in the video ?", "How many different shapes are seen ?"),
    "direction": ("Which way does the {name} move ?", "In which direction does the {name} go ?"),
    "order_first": ("Which {sort} is seen first ?", "Which {sort} comes before all the others ?"),
    "order_last": ("Which {sort} is the last to appear ?", "Which {sort} comes after all the others ?"),
    "at_time_shape": ("Which shape is seen at about {time} ?", "At about {time} , which shape is there ?"),
    "at_time_colour": ("What colour is the {name} at about {time} ?", "At about {time} , what colour is the {name} ?"),
    "at_time_event": ("What happens at about {time} ?", "At about {time} , what happens ?"),
    "when_appears": ("When does the {name} appear ?", "After how many seconds does the {name} appear ?"),
    "when_leaves": ("When does the {name} leave ?", "After how many seconds does the {name} leave ?"),
    "when_turns": ("When does the {name} change colour ?", "After how many seconds does the {name} turn {colour} ?"),
    "when_letter": ("When is a letter shown ?", "After how many seconds is a letter shown ?"),
    "needle": ("Which letter is shown ?", "What letter appears in the video ?"),
}
LETTER_INSTRUCTION = "Answer with the letter of the option ."


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        kind: one of KINDS.
        question: open question.
        answer: its short answer, one of `options`.
        options: four different answers.
        answer_index: place of the truth among the options.
        variant: which wording family of the kind.
        bucket: what a corpus has to balance inside the kind: the answer or, for times, event, rank and finer place.
    """

    kind: str
    question: str
    answer: str
    options: tuple[str, ...]
    answer_index: int
    variant: str
    bucket: str

    @property
    def letter(self) -> str:
        """Letter of the right option."""
        return OPTION_LETTERS[self.answer_index]

    @property
    def multiple_choice(self) -> str:
        """Question, one line for each option, and the instruction to answer with a letter."""
        lines = [f"({letter}) {option}" for letter, option in zip(OPTION_LETTERS, self.options, strict=True)]
        return "\n".join([self.question, *lines, LETTER_INSTRUCTION])

    def with_answer_index(self, index: int) -> "Question":
        """The same question with the right option moved to place `index`."""
        others = [option for option in self.options if option != self.answer]
        others.insert(index, self.answer)
        return replace(self, options=tuple(others), answer_index=index)


def format_seconds(seconds: int) -> str:
    """A time as it is written in questions and answers."""
    return "1 second" if seconds == 1 else f"{seconds} seconds"


def nearest_second(seconds: float) -> int:
    return math.floor(seconds + 0.5)


class View:
    """What sixteen frames show of a scene: those at exact midpoints, and those that are read from the written file."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self.unit = scene.duration / UNITS
        exact = [(index + 0.5) * self.unit for index in range(UNITS)]
        self.clocks = (exact, sample_times(scene.duration, fps=scene.fps))
        self.clear = tuple([time for time in clock if not self.covered(time)] for clock in self.clocks)

    def covered(self, time: float) -> bool:
        """Whether the needle hides everything else."""
        return self.scene.needle is not None and self.scene.needle.visible(time)

    def count(self, actor: Actor, start: float = 0.0, end: float = math.inf) -> int:
        """Sampled frames in [start, end) that show the shape, under the worse of the two samplings."""
        first, last = max(start, actor.enter), min(end, actor.leave)
        return min(sum(first <= time < last for time in clock) for clock in self.clear)

    def needle_count(self) -> int:
        """Sampled frames that show the needle, under the worse of the two samplings."""
        return UNITS - max(len(clock) for clock in self.clear)

    def events(self) -> list[tuple[float, str, Actor | None]]:
        """Times in seconds, sorts (appears, leaves, turns, letter) and shapes of everything that happens."""
        found: list[tuple[float, str, Actor | None]] = []
        for actor in self.scene.actors:
            if actor.enter > 0:
                found.append((actor.enter, "appears", actor))
            if actor.leave < self.scene.duration:
                found.append((actor.leave, "leaves", actor))
            if actor.change is not None:
                found.append((actor.change, "turns", actor))
        if self.scene.needle is not None:
            found.append((self.scene.needle.start, "letter", None))
        return found


def _build(
    rng: random.Random,
    kind: str,
    variant: str,
    answer: str,
    wrong: Iterable[str],
    *,
    bucket: str | None = None,
    **words: str,
) -> Question:
    # In a fixed order the wrong options would betray the truth as the one out of line.
    others = sorted(wrong)
    rng.shuffle(others)
    options = [answer, *others]
    if len(set(options)) != NUM_OPTIONS:
        raise AssertionError(f"a question needs {NUM_OPTIONS} different options, got {options}")
    text = rng.choice(_TEMPLATES[variant]).format(**words)
    built = Question(kind, text, answer, tuple(options), 0, variant, bucket or answer)
    return built.with_answer_index(rng.randrange(NUM_OPTIONS))


def _distractors(rng: random.Random, answer: str, present: Iterable[str], closed_set: Iterable[str]) -> list[str]:
    """Three wrong answers: those that the scene shows first, then others of the set."""
    near = sorted({name for name in present if name != answer})
    far = sorted(set(closed_set) - set(near) - {answer})
    rng.shuffle(near)
    rng.shuffle(far)
    return (near + far)[: NUM_OPTIONS - 1]


def _scene_colours(scene: Scene) -> list[str]:
    return [name for actor in scene.actors for name in (actor.colour, actor.new_colour) if name is not None]


def _name(rng: random.Random, actor: Actor, *, by_shape: bool = False) -> str:
    """A name that fits one shape only: its form, or its colour where that stays."""
    if by_shape or actor.change is not None or rng.random() < 0.5:
        return actor.shape
    return f"{actor.colour} {actor.shape}" if rng.random() < 0.5 else f"{actor.colour} shape"


def _colour_questions(rng: random.Random, view: View) -> list[Question]:
    found = []
    for actor in view.scene.actors:
        if actor.change is None or actor.new_colour is None:
            cases = [("colour", actor.colour, 0.0, math.inf)]
        else:
            cases = [
                ("colour_first", actor.colour, 0.0, actor.change),
                ("colour_last", actor.new_colour, actor.change, math.inf),
            ]
        for variant, answer, start, end in cases:
            if view.count(actor, start, end) >= 2:
                wrong = _distractors(rng, answer, _scene_colours(view.scene), COLOURS)
                found.append(_build(rng, "colour", variant, answer, wrong, name=actor.shape))
    return found


def _shape_questions(rng: random.Random, view: View) -> list[Question]:
    found = []
    for actor in view.scene.actors:
        if actor.change is None and view.count(actor) >= 2:
            wrong = _distractors(rng, actor.shape, [other.shape for other in view.scene.actors], SHAPES)
            found.append(_build(rng, "shape", "shape", actor.shape, wrong, name=actor.colour))
    return found


def _count_questions(rng: random.Random, view: View) -> list[Question]:
    number = len(view.scene.actors)
    if not 1 <= number <= NUM_OPTIONS or any(view.count(actor) < 2 for actor in view.scene.actors):
        return []
    wrong = [str(value) for value in range(1, NUM_OPTIONS + 1) if value != number]
    return [_build(rng, "count", "count", str(number), wrong)]


def _direction_questions(rng: random.Random, view: View) -> list[Question]:
    found = []
    for actor in view.scene.actors:
        motion = actor.motion
        if motion is not None and view.count(actor, motion.start, motion.end) >= 3:
            wrong = [name for name in DIRECTIONS if name != motion.direction]
            found.append(_build(rng, "direction", "direction", motion.direction, wrong, name=_name(rng, actor)))
    return found


def _order_questions(rng: random.Random, view: View) -> list[Question]:
    actors = sorted(view.scene.actors, key=lambda actor: actor.enter)
    if len(actors) < 2 or any(view.count(actor) < 2 for actor in actors):
        return []
    found = []
    for variant, extreme, next_one in (("order_first", actors[0], actors[1]), ("order_last", actors[-1], actors[-2])):
        if abs(extreme.enter - next_one.enter) < CLEAR_GAP * view.unit:
            continue
        wrong = _distractors(rng, extreme.shape, [actor.shape for actor in actors], SHAPES)
        found.append(_build(rng, "order", variant, extreme.shape, wrong, sort="shape"))
        if all(actor.change is None for actor in actors):
            wrong = _distractors(rng, extreme.colour, [actor.colour for actor in actors], COLOURS)
            found.append(_build(rng, "order", variant, extreme.colour, wrong, sort="colour"))
    return found


def _at_time_questions(rng: random.Random, view: View) -> list[Question]:
    return [*_state_questions(rng, view), *_event_questions(rng, view)]


def _state_questions(rng: random.Random, view: View) -> list[Question]:
    """Which shape, or which colour of a shape, is seen at a time at which nothing happens nearby."""
    scene, found = view.scene, []
    moments = [time for time, _, _ in view.events()]
    seconds = [
        second
        for second in range(1, scene.duration)
        if all(abs(second - time) >= view.unit for time in moments) and not view.covered(second)
    ]
    for actor in scene.actors:
        alone = [second for second in seconds if [other for other in scene.actors if other.visible(second)] == [actor]]
        if alone and len(scene.actors) > 1:
            wrong = _distractors(rng, actor.shape, [other.shape for other in scene.actors], SHAPES)
            time = format_seconds(rng.choice(alone))
            found.append(_build(rng, "at_time", "at_time_shape", actor.shape, wrong, time=time))
        if actor.change is not None:
            second = rng.choice([second for second in seconds if actor.visible(second)] or [0])
            if second:
                answer = actor.colour_at(second)
                wrong = _distractors(rng, answer, _scene_colours(scene), COLOURS)
                time = format_seconds(second)
                found.append(_build(rng, "at_time", "at_time_colour", answer, wrong, name=actor.shape, time=time))
    return found


def _event_questions(rng: random.Random, view: View) -> list[Question]:
    """What happens at a time; the options name the same event of other shapes."""
    found, events = [], view.events()
    for time, sort, actor in events:
        if actor is None or sort == "turns" or len(view.scene.actors) < 2:
            continue
        second = nearest_second(time)
        rivals = [other for other in events if other[1:] != (sort, actor)]
        if abs(second - time) > view.unit or not 0 < second < view.scene.duration:
            continue
        if any(abs(other[0] - second) < CLEAR_GAP * view.unit for other in rivals):
            continue
        shapes = _distractors(rng, actor.shape, [other.shape for other in view.scene.actors], SHAPES)
        wrong = [f"{shape} {sort}" for shape in shapes]
        words = {"time": format_seconds(second)}
        found.append(_build(rng, "at_time", "at_time_event", f"{actor.shape} {sort}", wrong, **words))
    return found


def time_options(duration: int, time: float) -> tuple[list[int], int, int] | None:
    """Four evenly spaced times that fit into a video, one of them the truth.

    The middle four fifths of the video are cut into four equal spans; the truth's span is its rank, and the other
    options lie at the same place of their spans. So for an evenly distributed truth the options tell nothing of it.

    Args:
        duration: length of the video in seconds.
        time: the true time in seconds.

    Returns:
        Times in whole seconds in rising order, the truth's rank, and the quarter of its span; None when whole seconds
        allow no spans of about a fifth of the video, or when the truth is outside of all.
    """
    gap = duration // 5
    if gap < SMALLEST_GAP * duration:
        return None
    place = (time - (duration - NUM_OPTIONS * gap) / 2) / gap
    rank = math.floor(place)
    if not 0 <= rank < NUM_OPTIONS:
        return None
    times = [nearest_second(time) + (other - rank) * gap for other in range(NUM_OPTIONS)]
    return times, rank, int((place - rank) * 4)


def _when_questions(rng: random.Random, view: View) -> list[Question]:
    found = []
    for time, sort, actor in view.events():
        options = time_options(view.scene.duration, time)
        if options is None or (actor is None and view.needle_count() < 1):
            continue
        if actor is not None and view.count(actor) < 2:
            continue
        times, rank, quarter = options
        texts = [format_seconds(value) for value in times]
        words = {}
        if actor is not None:
            words = {"name": _name(rng, actor), "colour": str(actor.new_colour)}
        wrong = [text for place, text in enumerate(texts) if place != rank]
        bucket = f"{sort} {rank} {quarter}"
        found.append(_build(rng, "when", f"when_{sort}", texts[rank], wrong, bucket=bucket, **words))
    return found


def _needle_questions(rng: random.Random, view: View) -> list[Question]:
    if view.scene.needle is None or view.needle_count() < 1:
        return []
    letter = view.scene.needle.letter
    return [_build(rng, "needle", "needle", letter, _distractors(rng, letter, [], LETTERS))]


_MAKERS = {
    "colour": _colour_questions,
    "shape": _shape_questions,
    "count": _count_questions,
    "direction": _direction_questions,
    "order": _order_questions,
    "at_time": _at_time_questions,
    "when": _when_questions,
    "needle": _needle_questions,
}


def all_questions(scene: Scene, kinds: Iterable[str] | None = None) -> list[Question]:
    """Every question that the scene allows, in the order of KINDS.

    Raises:
        ValueError: a kind that is not in KINDS.
    """
    wanted = KINDS if kinds is None else tuple(kinds)
    for kind in wanted:
        if kind not in _MAKERS:
            raise ValueError(f"unknown question kind {kind!r}: use {', '.join(KINDS)}")
    view = View(scene)
    found: list[Question] = []
    for kind in KINDS:
        if kind in wanted:
            # One generator a kind: asking for fewer kinds gives the same questions of the others.
            rng = random.Random(f"{scene.split} {scene.seed} {kind}")
            found.extend(_MAKERS[kind](rng, view))
    return found


def make_questions(scene: Scene, kinds: Iterable[str] | None = None) -> list[Question]:
    """At most one question of each kind, so that scenes with many shapes do not weigh more.

    Args:
        scene: what the video shows.
        kinds: kinds to ask; default all of KINDS.

    Returns:
        Questions in the order of KINDS; a kind that the scene does not allow is left out.

    Raises:
        ValueError: a kind that is not in KINDS.
    """
    chosen: list[Question] = []
    rng = random.Random(f"{scene.split} {scene.seed} choice")
    pool = all_questions(scene, kinds)
    for kind in KINDS:
        same_kind = [question for question in pool if question.kind == kind]
        if kind == "when" and same_kind:
            # Shapes mostly come early and leave late: drawing the rank first keeps times from being guessable.
            rank = str(rng.randrange(NUM_OPTIONS))
            same_kind = [question for question in same_kind if question.bucket.split()[1] == rank] or same_kind
        if same_kind:
            chosen.append(rng.choice(same_kind))
    return chosen


def split_words(text: str) -> list[str]:
    """Words, numbers and signs of a text, as a word-level tokenizer should see them."""
    return re.findall(r"[A-Za-z]+|\d+|[^\sA-Za-z\d]", text)


def corpus_vocabulary() -> list[str]:
    """Every word, number and sign that questions, options, answers and captions can hold, sorted."""
    words = {"appears", "leaves", "moves", "turns", "letter", "nothing", "top", "bottom", "middle", ":", ";", ".", ","}
    words |= {"second", "seconds", "shape", "colour", "(", ")", "?"}
    words |= set(OPTION_LETTERS) | set(LETTERS) | set(COLOURS) | set(SHAPES) | set(DIRECTIONS)
    words |= {str(number) for number in range(61)}
    for template in (*(text for texts in _TEMPLATES.values() for text in texts), LETTER_INSTRUCTION):
        words.update(split_words(re.sub(r"\{\w+\}", " ", template)))
    return sorted(words)
