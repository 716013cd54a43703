"""What the tiny models are taught about videos: the stages of the common curriculum, and those of single models."""

from dataclasses import dataclass, replace
from typing import Any

from longvideo.evaluation.corpus import Difficulty

BATCH_SIZE = 8
# A kind stands as often as it is to be asked where a scene allows it. Few scenes allow a question about a direction,
# and times are learned slowly.
ALL_KINDS = ("colour",) * 5 + ("shape",) + ("direction",) * 5 + ("order",) * 3 + ("at_time",) * 3 + ("when",) * 4
# Letters last for two frames, and few shapes move for long.
DRILL_KINDS = ("colour",) * 2 + ("shape",) + ("direction",) * 5 + ("order", "at_time") + ("when",) * 2
DRILL = Difficulty(shapes=(1, 2, 2, 3), needle=0.8, move=0.8)
# Where nearly all that is seen moves, what tells a direction stands out.
MOVING_KINDS = ("direction",) * 6 + ("colour", "order", "at_time", "when")
MOVING = Difficulty(shapes=(1, 1, 2), move=1.0)
ONE_MOVES = Difficulty(shapes=(1,), timed=False, move=1.0, change=0.0, needle=0.0, durations=(5, 8))
TWO_MOVE = replace(ONE_MOVES, shapes=(1, 2, 2))
TWO_COME_AND_GO = replace(TWO_MOVE, timed=True, durations=(5, 20))


@dataclass(frozen=True)
class Stage:
    """One stage of the curriculum.

    Args:
        name: folder of its checkpoints.
        num_videos: training videos, each seen once.
        learning_rate: peak rate of all parts.
        schedule: "constant_with_warmup" or "linear" (down to zero).
        warmup_steps: steps with a rising rate.
        difficulty: what the scenes contain.
        captions: chance that a batch asks for descriptions of the whole video and nothing else.
        events: chance that a batch asks for lists of all events and nothing else.
        shape_first: chance that those descriptions and lists name a shape before its colour: a model that always
            writes the colour first never learns to find something by its shape.
        letters: chance that a question is asked with four options and answered by a letter.
        kinds: the kind of a conversation is drawn from these, as far as the scene allows it.
        trainable_parts: what learns; see `VideoSFTConfig`.
        prepare_model: method of the model that is called before the stage; see `VideoSFTConfig`.
        pictures: whether rows are single frames with a description instead of videos.
        num_frames: frames per video; None for those of the model.
        connector_rate: rate of the connector, as a part of the decoder's.
        tower_rate: rate of the tower, likewise.
        mixed: what batches take in place of `difficulty` and `num_frames`, one of these at random; empty for neither.
    """

    name: str
    num_videos: int
    learning_rate: float
    schedule: str
    warmup_steps: int
    difficulty: str | Difficulty
    captions: float
    events: float
    shape_first: float
    letters: float
    kinds: tuple[str, ...] = ALL_KINDS
    trainable_parts: tuple[str, ...] = ("connector", "language_model")
    prepare_model: str | None = None
    pictures: bool = False
    num_frames: int | None = None
    connector_rate: float = 0.05
    tower_rate: float = 0.02
    mixed: tuple[tuple[str | Difficulty, int | None], ...] = ()


# Descriptions and lists of events first: a video then gives some fifty words to learn from instead of a few answers.
# The tower is left as its own lessons made it.
STAGES = (
    Stage("1-single", 1_200, 1e-3, "constant_with_warmup", 50, "single", 0.4, 0.0, 0.5, 0.0),
    Stage("2-easy", 3_200, 1e-3, "constant_with_warmup", 20, "easy", 0.4, 0.2, 0.5, 0.0),
    Stage("3-full", 8_000, 7e-4, "constant_with_warmup", 20, "full", 0.25, 0.25, 0.5, 0.0),
    Stage("4-drill", 3_200, 1e-3, "constant_with_warmup", 20, DRILL, 0.1, 0.1, 0.5, 0.0, kinds=DRILL_KINDS),
    Stage("5-questions", 8_000, 7e-4, "linear", 20, "full", 0.05, 0.1, 0.5, 0.02),
    Stage("6-moving", 2_400, 7e-4, "constant_with_warmup", 20, MOVING, 0.0, 0.0, 0.0, 0.0, kinds=MOVING_KINDS),
    Stage("7-finish", 4_000, 5e-4, "linear", 20, "full", 0.0, 0.05, 0.5, 0.0),
)

# A decoder that was trained before gets to know its connector first; then pictures or videos are for both. Connectors
# learn slowly: what they were taught of places is lost at ten times these rates, and no decoder can bring it back.
ALIGN = Stage("0-align", 3_200, 3e-4, "linear", 20, "full", 0.35, 0.35, 0.5, 0.0, trainable_parts=("connector",))
PICTURES = Stage("1-pictures", 3_200, 7e-4, "constant_with_warmup", 20, "full", 0.0, 0.0, 0.5, 0.0, pictures=True)
FULL = Stage("2-full", 4_800, 7e-4, "constant_with_warmup", 20, "full", 0.2, 0.2, 0.5, 0.0)
# Towers that see single frames tell no direction: it has to be read off places, and is learned from few frames with
# nothing else in them. Whole videos come all along: without them letters, shapes and orders fade for good.
AMONG_CLIPS = ((ONE_MOVES, 4), (ONE_MOVES, 4), (TWO_MOVE, 4), ("full", None), ("full", None))
TOWARDS_VIDEOS = (
    (TWO_MOVE, 4),
    (TWO_MOVE, None),
    (TWO_COME_AND_GO, None),
    (MOVING, None),
    ("full", None),
    ("full", None),
)
# What was read off four frames has to be found in sixteen: by way of eight, and one shape alone again.
LONGER = (
    (ONE_MOVES, 4),
    (ONE_MOVES, 8),
    (ONE_MOVES, None),
    (TWO_MOVE, 8),
    (TWO_MOVE, None),
    (MOVING, None),
    ("full", None),
    ("full", None),
)
FINISH = ((MOVING, None), (TWO_MOVE, None), *(("full", None),) * 4)
LAST = ((MOVING, None), (TWO_MOVE, None), *(("full", None),) * 6)
CLIP_KINDS = ALL_KINDS + ("direction",) * 10
# What is nearly always right by then is seldom asked.
WEAK_KINDS = ("colour",) * 2 + ("direction",) * 8 + ("order",) * 3 + ("at_time",) * 6 + ("when",) * 4
LATE_KINDS = ("colour",) * 2 + ("shape",) + ("direction",) * 8 + ("order",) * 2 + ("at_time",) * 11 + ("when",)
CLIPS = (
    Stage(
        "6a-clips",
        24_000,
        7e-4,
        "constant_with_warmup",
        20,
        "full",
        0.08,
        0.08,
        0.5,
        0.0,
        CLIP_KINDS,
        mixed=AMONG_CLIPS,
    ),
    Stage("6b-videos", 8_800, 7e-4, "constant_with_warmup", 20, "full", 0.04, 0.08, 0.5, 0.0, mixed=TOWARDS_VIDEOS),
    Stage(
        "6c-longer", 4_800, 7e-4, "constant_with_warmup", 20, "full", 0.02, 0.06, 0.5, 0.0, CLIP_KINDS, mixed=LONGER
    ),
    replace(STAGES[6], name="7-finish", num_videos=4_800, mixed=FINISH),
    Stage("8-drill", 8_000, 7e-4, "linear", 20, "full", 0.0, 0.05, 0.5, 0.0, WEAK_KINDS, mixed=(*LAST, LAST[0])),
    Stage("9-at-times", 9_600, 6e-4, "linear", 20, "full", 0.0, 0.03, 0.5, 0.0, LATE_KINDS, mixed=LAST),
)

# CrossLMM's two: projector and V2V beside a frozen decoder, without T2V; then everything with T2V, the tower slowly.
EVERYTHING = ("connector", "language_model", "vision_tower")
WITH_T2V = {"trainable_parts": EVERYTHING, "prepare_model": "add_t2v"}
CROSSLMM_STAGES = (
    replace(ALIGN, name="1-align", num_videos=2_400, trainable_parts=("connector", "v2v")),
    replace(FULL, name="2a-full", **WITH_T2V),
    replace(CLIPS[0], name="2b-clips", num_videos=12_000, **WITH_T2V),
    replace(CLIPS[1], name="2c-videos", num_videos=8_000, **WITH_T2V),
    replace(CLIPS[2], name="2d-longer", **WITH_T2V),
    replace(CLIPS[4], name="2e-drill", num_videos=9_600, **WITH_T2V),
    replace(CLIPS[5], name="2f-at-times", **WITH_T2V),
)


def scale_stage(stage: Any, scale: float) -> Any:
    """Shortens a stage, or makes it longer.

    Args:
        stage: one of `stages_of`.
        scale: factor of its videos, and of its warm-up where that becomes shorter.

    Returns:
        The stage with a whole number of batches, at least one.
    """
    batches = max(round(stage.num_videos * scale / BATCH_SIZE), 1)
    warmup = min(stage.warmup_steps, max(round(stage.warmup_steps * scale), 1))
    return replace(stage, num_videos=batches * BATCH_SIZE, warmup_steps=warmup)
