"""What the tiny LLaVA-ST is taught: the paper's three stages, on pictures and videos of the corpus.

First captions and plain answers, without coordinates and without their position embeddings; then places in pictures,
of one shape alone before there are several, and times in videos; then everything, with shapes followed through time.
"""

import random
import re
from dataclasses import dataclass
from typing import Any

from torch.utils.data import Dataset

from longvideo.evaluation.corpus import (
    Difficulty,
    Grounding,
    Scene,
    all_questions,
    describe,
    end_to_end_times,
    list_events,
    make_groundings,
    make_scene,
    render_frames,
)
from longvideo.evaluation.corpus.grounding import GROUNDING_TASKS, IMAGE_TASKS
from longvideo.tiny_training.conversations import (
    CAPTION_REQUEST,
    EVENTS_REQUEST,
    choose_questions,
    conversation,
    picture_conversation,
    picture_questions,
)

BATCH_SIZE = 8
# Long answers: one or two to a conversation, so that little of a batch is padding.
TURNS = {"stvg": 2, "svg": 2, "elc": 2}
MOST_TURNS = 4
# Questions about seconds are left out: nothing tells this model how long a video is.
PLAIN_KINDS = ("colour",) * 2 + ("shape",) + ("direction",) * 3 + ("order",) * 2
# Where scenes do not allow what is asked, the next try is so many scenes away: no other row begins there.
NEXT_TRY = 1 << 32
# One shape alone is found, and its place read off, within two hundred batches; among several that takes far longer.
ALONE = Difficulty(shapes=(1,), timed=False, move=0.4, change=0.3, needle=0.0)
ALONE_FOR_A_WHILE = Difficulty(shapes=(1,), move=0.5, change=0.5, needle=0.2)
# Two at most, so that the one that is asked for is soon found among them.
A_FEW = Difficulty(shapes=(1, 2, 2), needle=0.2, backgrounds=("plain", "gradient"))
# A picture takes a fourth of the time of a video: which of several shapes is meant is learned here first.
SEVERAL = Difficulty(shapes=(1, 2, 2, 3), timed=False, move=0.4, change=0.3, needle=0.0)
# In most frames of other scenes there is one shape; here every frame has several to ask for.
CROWDED = Difficulty(shapes=(1, 2, 3, 4), timed=False, move=0.4, change=0.3, needle=0.0)
# Videos with more movement and change than most, for what happens in a part of them.
LIVELY = Difficulty(shapes=(1, 2, 2, 3), move=0.7, change=0.6, needle=0.3)


@dataclass(frozen=True)
class GroundingStage:
    """One stage.

    Args:
        name: folder of its checkpoints.
        num_videos: training rows, each seen once.
        learning_rate: peak rate of all parts.
        schedule: "constant_with_warmup" or "linear" (down to zero).
        warmup_steps: steps with a rising rate.
        shares: how often a batch asks what: "picture" and "caption" (describe it), "events" (list them), "questions"
            (short answers), or a task of the corpus.
        first_third: what the scenes of the first third contain.
        difficulty: what the others contain.
        pictures: what the scenes contain whose pictures are asked about places.
        lape: whether position embeddings are added; the paper's first stage has none (rho = 0).
        trainable_parts: what learns; see `VideoSFTConfig`.
        prepare_model: method of the model that is called before the stage; see `VideoSFTConfig`.
        connector_rate: rate of the connector, as a part of the decoder's.
        feature_scale: factor of the projector's output before the stage begins.
        packer_scale: factor of what each packer adds to the pooled points before the stage begins.
        shuffled: chance that the patches of a picture, or the tokens of a video, stand in random order, each with its
            position embedding.
        repeats: chance that a place is asked for a second time.
    """

    name: str
    num_videos: int
    learning_rate: float
    schedule: str
    warmup_steps: int
    shares: tuple[tuple[str, float], ...]
    first_third: str | Difficulty = "full"
    difficulty: str | Difficulty = "full"
    pictures: str | Difficulty = CROWDED
    lape: bool = True
    trainable_parts: tuple[str, ...] = ("connector", "language_model")
    prepare_model: str | None = None
    connector_rate: float = 0.3
    feature_scale: float = 1.0
    packer_scale: float = 1.0
    shuffled: float = 0.0
    repeats: float = 0.0


# Rows are told from the order of the patches, columns are not: in a feature ten times as long as its position
# embedding the decoder never reads the column. Shorter features let it be noticed, and patches in random order leave
# no other way to tell a place; a place asked for twice teaches to pass on a coordinate that is there.
# It is the same with times behind the packers: what they add was thirty times as long as the embedding of a time.
PLACES = {"connector_rate": 0.05, "shuffled": 1.0, "repeats": 0.5}

GROUNDING_STAGES = (
    GroundingStage(
        "0-align",
        3_200,
        3e-3,
        "linear",
        20,
        (("caption", 0.5), ("events", 0.5)),
        lape=False,
        trainable_parts=("connector",),
    ),
    GroundingStage(
        "1-captions",
        4_000,
        1e-3,
        "constant_with_warmup",
        50,
        (("picture", 0.4), ("caption", 0.25), ("events", 0.2), ("questions", 0.15)),
        first_third="easy",
        lape=False,
    ),
    GroundingStage(
        "2a-shorter-features",
        1_600,
        1e-3,
        "constant_with_warmup",
        50,
        (("picture", 0.3), ("caption", 0.15), ("events", 0.1), ("questions", 0.05), ("rec", 0.4)),
        pictures=SEVERAL,
        connector_rate=0.05,
        feature_scale=0.2,
        packer_scale=0.1,
    ),
    GroundingStage(
        "2b-one-shape",
        4_000,
        1e-3,
        "constant_with_warmup",
        20,
        (("rec", 0.9), ("picture", 0.1)),
        pictures=ALONE,
        **PLACES,
    ),
    GroundingStage(
        "2c-several-shapes",
        8_000,
        1e-3,
        "constant_with_warmup",
        20,
        (("rec", 0.8), ("reg", 0.1), ("picture", 0.1)),
        pictures=SEVERAL,
        **PLACES,
    ),
    GroundingStage(
        "2d-times-of-one",
        5_600,
        1e-3,
        "constant_with_warmup",
        20,
        (("rec", 0.1), ("tvg", 0.7), ("tr", 0.1), ("events", 0.1)),
        difficulty=ALONE_FOR_A_WHILE,
        first_third=ALONE_FOR_A_WHILE,
        connector_rate=0.05,
        shuffled=1.0,
    ),
    GroundingStage(
        "2e-times-of-several",
        5_600,
        1e-3,
        "constant_with_warmup",
        20,
        (("rec", 0.1), ("reg", 0.05), ("tvg", 0.7), ("tr", 0.08), ("events", 0.07)),
        first_third=A_FEW,
        difficulty="medium",
        connector_rate=0.05,
        shuffled=0.7,
    ),
    # What is meant is found by then, times only roughly: mIoU 0.41 before this stage and 0.58 behind it.
    GroundingStage(
        "2f-times-in-all",
        12_800,
        1e-3,
        "constant_with_warmup",
        20,
        (("rec", 0.08), ("reg", 0.04), ("tvg", 0.7), ("tr", 0.06), ("stvg", 0.12)),
        first_third=A_FEW,
        difficulty=LIVELY,
        connector_rate=0.05,
        shuffled=0.5,
    ),
    GroundingStage(
        "3-everything",
        9_600,
        8e-4,
        "linear",
        20,
        (
            ("rec", 0.15),
            ("reg", 0.05),
            ("tvg", 0.4),
            ("tr", 0.06),
            ("stvg", 0.18),
            ("svg", 0.06),
            ("elc", 0.04),
            ("questions", 0.06),
        ),
        first_third=LIVELY,
        connector_rate=0.05,
        shuffled=0.3,
    ),
)


class GroundingConversations(Dataset):
    """Rows of a stage, made when they are asked for; the same index always gives the same row.

    Args:
        stage: what to draw.
        size: side of the frames in pixels.
        num_frames: frames per video.
        first_seed: number of the first scene of the training split.
    """

    def __init__(self, stage: GroundingStage, *, size: int, num_frames: int, first_seed: int):
        self.stage, self.size, self.num_frames, self.first_seed = stage, size, num_frames, first_seed

    def __len__(self) -> int:
        return self.stage.num_videos

    def __getitem__(self, index: int) -> dict[str, Any]:
        stage, seed = self.stage, self.first_seed + index
        # Rows of a batch are of one form: so little is padded, and batches of pictures are quick.
        names, weights = zip(*stage.shares, strict=True)
        form = random.Random(f"grounding batch {seed // BATCH_SIZE}").choices(names, weights)[0]
        difficulty = stage.first_third if index < len(self) // 3 else stage.difficulty
        if form in IMAGE_TASKS:
            difficulty = stage.pictures
        while True:
            messages = self._messages(make_scene(seed, "train", difficulty=difficulty), form)
            if messages:
                return {"messages": messages}
            seed += NEXT_TRY

    def _messages(self, scene: Scene, form: str) -> list[dict[str, Any]]:
        rng = random.Random(f"grounding conversation {scene.seed}")
        if form == "picture":
            return picture_conversation(scene, self.size, 0.5)
        if form in GROUNDING_TASKS:
            return self._grounded(scene, form, rng)
        if form == "caption":
            turns = [(CAPTION_REQUEST, without_seconds(describe(scene)))]
        elif form == "events":
            turns = [(EVENTS_REQUEST, without_seconds(list_events(scene)))]
        else:
            turns = [(q.question, q.answer) for q in choose_questions(all_questions(scene), PLAIN_KINDS, rng)]
        return self._video(scene, turns)

    def _grounded(self, scene: Scene, task: str, rng: random.Random) -> list[dict[str, Any]]:
        pool = make_groundings(scene, [task], size=(self.size, self.size), num_frames=self.num_frames)
        chosen = choose_groundings(pool, TURNS.get(task, MOST_TURNS), rng)
        turns = [(item.question, item.answer) for item in chosen]
        if task == "rec" and chosen and rng.random() < self.stage.repeats:
            turns.append(rng.choice(turns))
        if task in IMAGE_TASKS and chosen:
            return picture_questions(render_frames(scene, [chosen[0].time or 0.0], self.size)[0], turns)
        return self._video(scene, turns)

    def _video(self, scene: Scene, turns: list[tuple[str, str]]) -> list[dict[str, Any]]:
        if not turns:
            return []
        times = end_to_end_times(scene, self.num_frames)
        frames = render_frames(scene, times, self.size)
        return conversation(frames, scene.duration, turns, times=times)


def choose_groundings(pool: list[Grounding], most: int, rng: random.Random) -> list[Grounding]:
    """Chooses the questions of one conversation so that no answer can be read off an earlier turn.

    Args:
        pool: questions of one task about one scene.
        most: largest number of them.
        rng: source of chance.

    Returns:
        Questions about different shapes, in random order; of each shape a sort of event at random.
    """
    subjects = sorted({item.subject for item in pool})
    rng.shuffle(subjects)
    chosen = []
    for subject in subjects[:most]:
        own = [item for item in pool if item.subject == subject]
        bucket = rng.choice(sorted({item.bucket for item in own}))
        chosen.append(rng.choice([item for item in own if item.bucket == bucket]))
    return chosen


def without_seconds(text: str) -> str:
    """A caption or list of events without the times in front of its clauses."""
    return re.sub(r"\d+ seconds? : ", "", text)
