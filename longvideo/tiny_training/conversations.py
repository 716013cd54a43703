"""Conversations about corpus scenes: what is asked together, and messages with decoded frames."""

import random
from collections.abc import Sequence
from typing import Any

from longvideo.evaluation.corpus import Question, Scene, describe_frame, render_frames

CAPTION_REQUEST = "Describe the video ."
PICTURE_REQUEST = "Describe the picture ."
EVENTS_REQUEST = "List the events ."
NOTHING = "nothing ."
SHAPE_FIRST = " Name shapes before colours ."
MAX_TURNS = 5
# Neither answer says anything about the answer to another question, so they may join a conversation of any kind.
HARMLESS_KINDS = ("count", "needle")


def choose_questions(questions: list[Question], kinds: tuple[str, ...], rng: random.Random) -> list[Question]:
    """Chooses the questions of one conversation so that no answer can be read off an earlier turn.

    Args:
        questions: all that a scene allows.
        kinds: kinds to draw from, with repetitions as weights.
        rng: source of chance.

    Returns:
        Up to MAX_TURNS questions of one kind, among them those of HARMLESS_KINDS; none where
        the scene allows none.
    """
    allowed = {question.kind for question in questions}
    possible = [kind for kind in kinds if kind in allowed]
    kind = rng.choice(possible) if possible else None
    pool = [question for question in questions if question.kind == kind]
    rng.shuffle(pool)
    if kind == "when":
        # Shapes mostly come early and leave late: each span of the video once, else that would be learned instead.
        pool = list({question.bucket.split()[1]: question for question in pool}.values())
    pool = pool[:MAX_TURNS]
    for question in questions:
        if question.kind in HARMLESS_KINDS and (not pool or rng.random() < 0.5):
            pool.insert(rng.randint(0, len(pool)), question)
    return pool[:MAX_TURNS]


def tidy(text: str) -> str:
    """Writes punctuation as people do, without a space before it."""
    return text.replace(" ?", "?").replace(" ,", ",").replace(" .", ".")


def conversation(
    frames: Any, duration: float, turns: list[tuple[str, str]], *, times: Sequence[float] | None = None
) -> list[dict[str, Any]]:
    """Puts a decoded video and question-answer turns into messages.

    Args:
        frames: (F, height, width, 3) uint8.
        duration: seconds.
        turns: questions and answers.
        times: seconds of the frames; None for the midpoints of F equal parts.

    Returns:
        Messages; the first user turn holds the video with its metadata.
    """
    if times is None:
        times = [duration * (2 * i + 1) / (2 * len(frames)) for i in range(len(frames))]
    video = {"type": "video", "video": frames, "timestamps": list(times), "duration": duration}
    return _turns(video, turns)


def picture_questions(frame: Any, turns: list[tuple[str, str]]) -> list[dict[str, Any]]:
    """Puts a picture and question-answer turns into messages.

    Args:
        frame: (height, width, 3) uint8.
        turns: questions and answers.

    Returns:
        Messages; the first user turn holds the picture.
    """
    return _turns({"type": "image", "image": frame}, turns)


def _turns(visual: dict[str, Any], turns: list[tuple[str, str]]) -> list[dict[str, Any]]:
    messages = []
    for question, answer in turns:
        blocks = [{"type": "text", "text": question}]
        messages.append({"role": "user", "content": blocks if messages else [visual, *blocks]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return messages


def picture_conversation(scene: Scene, size: int, shape_first: float) -> list[dict[str, Any]]:
    """Takes a frame at a random time and has it described.

    Args:
        scene: what the video shows.
        size: side of the frame in pixels.
        shape_first: chance that shapes are named before their colours.

    Returns:
        Messages of one turn with an image.
    """
    rng = random.Random(f"picture {scene.seed}")
    named_first = rng.random() < shape_first
    # Half of all frames are empty; most pictures should show something.
    for _ in range(3):
        time = rng.random() * scene.duration
        if describe_frame(scene, time) != NOTHING:
            break
    request = PICTURE_REQUEST + (SHAPE_FIRST if named_first else "")
    answer = describe_frame(scene, time, shape_first=named_first)
    return picture_questions(render_frames(scene, [time], size)[0], [(request, answer)])
