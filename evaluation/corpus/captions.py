"""Captions of scenes: what is seen over time, in one frame, and what happens, in the vocabulary of the questions."""

from longvideo.evaluation.corpus.questions import View, format_seconds, nearest_second
from longvideo.evaluation.corpus.scenes import UNITS, Actor, Scene, sample_times


def place_name(x: float, y: float) -> str:
    """Name of a place in the frame, from fractions of its width and height: "top left", "middle", ..."""
    column = "left" if x < 0.4 else "right" if x > 0.6 else ""
    row = "top" if y < 0.4 else "bottom" if y > 0.6 else ""
    return f"{row} {column}".strip() or "middle"


def _full_name(actor: Actor, time: float, shape_first: bool) -> list[str]:
    words = [actor.colour_at(time), actor.shape]
    return words[::-1] if shape_first else words


def _describe_actor(
    scene: Scene, actor: Actor, seen: list[float], *, start: float, end: float, shape_first: bool
) -> str:
    words = [*_full_name(actor, seen[0], shape_first), place_name(*actor.position(seen[0]))]
    if start <= actor.enter < end and actor.enter > 0:
        words.append("appears")
    if actor.motion is not None:
        shared = min(actor.motion.end, end) - max(actor.motion.start, start)
        if shared >= scene.duration / UNITS:
            words.append(f"moves {actor.motion.direction}")
    if actor.change is not None and seen[0] < actor.change < end:
        words.append(f"turns {actor.new_colour}")
    if start < actor.leave <= end and actor.leave < scene.duration:
        words.append("leaves")
    return " ".join(words)


def describe(scene: Scene, *, num_parts: int = 4, shape_first: bool = False) -> str:
    """A dense caption of what is seen over time, in the vocabulary of the questions.

    Args:
        scene: what the video shows.
        num_parts: number of equal parts; each gets its starting time and one clause for each shape seen in it.
        shape_first: whether a clause names the shape before its colour.

    Returns:
        For example "0 seconds : red circle left ; 4 seconds : red circle left moves right , letter X ; ...".
    """
    times = sample_times(scene.duration, max(UNITS, num_parts))
    parts = []
    for part in range(num_parts):
        start, end = part * scene.duration / num_parts, (part + 1) * scene.duration / num_parts
        inside = [time for time in times if start <= time < end]
        clear = [time for time in inside if scene.needle is None or not scene.needle.visible(time)]
        clauses = []
        for actor in sorted(scene.actors, key=lambda actor: actor.enter):
            seen = [time for time in clear if actor.visible(time)]
            if seen:
                clauses.append(_describe_actor(scene, actor, seen, start=start, end=end, shape_first=shape_first))
        if scene.needle is not None and len(clear) < len(inside):
            clauses.append(f"letter {scene.needle.letter}")
        parts.append(f"{format_seconds(nearest_second(start))} : {' , '.join(clauses) or 'nothing'}")
    return " ; ".join(parts) + " ."


def describe_frame(scene: Scene, time: float, *, shape_first: bool = False) -> str:
    """What a single frame shows, in the vocabulary of the questions.

    Args:
        scene: what the video shows.
        time: of the frame, in seconds.
        shape_first: whether the shape is named before its colour.

    Returns:
        For example "red circle left , blue ring top right ." or "letter X ."
    """
    if scene.needle is not None and scene.needle.visible(time):
        return f"letter {scene.needle.letter} ."
    clauses = [
        " ".join([*_full_name(actor, time, shape_first), place_name(*actor.position(time))])
        for actor in sorted(scene.actors, key=lambda actor: actor.enter)
        if actor.visible(time)
    ]
    return (" , ".join(clauses) or "nothing") + " ."


def list_events(scene: Scene, *, shape_first: bool = False) -> str:
    """Everything that happens, in order of time, in the vocabulary of the questions.

    Args:
        scene: what the video shows.
        shape_first: whether the shape is named before its colour.

    Returns:
        For example "4 seconds : red circle appears ; 9 seconds : red circle moves left ; 12 seconds : letter X .";
        what no sampled frame shows is left out.
    """
    view = View(scene)
    found = []
    for time, sort, actor in view.events():
        if actor is None:
            if view.needle_count() >= 1:
                found.append((time, f"letter {scene.needle.letter}"))
        elif view.count(actor) >= 2:
            what = f"turns {actor.new_colour}" if sort == "turns" else sort
            found.append((time, " ".join([*_full_name(actor, time - view.unit, shape_first), what])))
    for actor in scene.actors:
        motion = actor.motion
        if motion is not None and view.count(actor, motion.start, motion.end) >= 3:
            name = _full_name(actor, motion.start, shape_first)
            found.append((motion.start, " ".join([*name, "moves", motion.direction])))
    clauses = [f"{format_seconds(nearest_second(time))} : {what}" for time, what in sorted(found)]
    return (" ; ".join(clauses) or "nothing") + " ."
