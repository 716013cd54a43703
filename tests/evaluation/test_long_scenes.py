"""Long scenes of the corpus: deterministic, sparse, with segments that show the answers; others stay the same."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from longvideo.evaluation.corpus import Scene, make_scene, render_frames
from longvideo.evaluation.corpus.long_scenes import (
    LONG_FPS,
    LONG_KINDS,
    TIME_STEP,
    LongDifficulty,
    long_items,
    long_questions,
    long_row,
    make_long_scene,
    render_long,
)

SCENES = [make_long_scene(seed) for seed in range(200)]


def spans(scene: Scene) -> list[tuple[float, float]]:
    found = [(actor.enter, actor.leave) for actor in scene.actors]
    return sorted([*found, *([(scene.needle.start, scene.needle.end)] if scene.needle else [])])


@pytest.mark.parametrize(
    ("seed", "split", "difficulty", "fingerprint"),
    [
        (0, "train", "full", "32364eee00ae6a26"),
        (7, "held_out", "full", "90b82c7de9582287"),
        (12345, "train", "easy", "3e085c9120a65e59"),
        (3, "held_out", "medium", "633b75899ba7b28a"),
        (1, "train", "single", "8c56b3777d8c730b"),
    ],
)
def test_older_scenes_are_the_same_as_before(seed: int, split: str, difficulty: str, fingerprint: str) -> None:
    # Shipped checkpoints were trained and measured on these.
    assert make_scene(seed, split, difficulty=difficulty).fingerprint()[:16] == fingerprint


@pytest.mark.parametrize(
    ("seed", "split", "difficulty", "fingerprint"),
    [
        (0, "train", "long", "55db40b12877fe8b"),
        (5, "held_out", "long", "6059034aa02318d2"),
        (2, "train", "short", "c79a473a7e596e44"),
    ],
)
def test_long_scenes_stay_the_same(seed: int, split: str, difficulty: str, fingerprint: str) -> None:
    assert make_long_scene(seed, split, difficulty=difficulty).fingerprint()[:16] == fingerprint


def test_events_are_short_sparse_and_apart() -> None:
    for scene in SCENES:
        found = spans(scene)
        assert 120 <= scene.duration <= 300 and 2 <= len(found) <= 4
        assert all(time % 10 == 0 for span in found for time in span)
        assert all(10 <= end - start <= 20 for start, end in found) and found[-1][1] <= scene.duration
        assert all(later[0] - earlier[1] >= 10 for earlier, later in pairwise(found))
        assert len({actor.shape for actor in scene.actors}) == len({actor.colour for actor in scene.actors})
    # Short ones have a raster of their own.
    short = [time for seed in range(50) for span in spans(make_long_scene(seed, difficulty="short")) for time in span]
    assert all(time % TIME_STEP == 0 for time in short) and any(time % 10 for time in short)
    shown = sum(end - start for scene in SCENES for start, end in spans(scene))
    assert shown / sum(scene.duration for scene in SCENES) < 0.35
    # Anywhere in the video, its begin and its end too.
    places = Counter(int(4 * start / scene.duration) for scene in SCENES for start, _ in spans(scene))
    assert min(places.values()) > 0.15 * sum(places.values())


def test_splits_and_scenes_differ() -> None:
    prints = {scene.fingerprint() for scene in SCENES}
    held_out = {make_long_scene(seed, "held_out").fingerprint() for seed in range(200)}
    assert len(prints) == len(held_out) == 200 and not prints & held_out


def test_the_segment_shows_what_is_asked_and_nothing_else_does() -> None:
    for scene in SCENES[:40]:
        ground = (
            render_frames(scene, [spans(scene)[-1][1] + 0.5], 32)[0] if spans(scene)[-1][1] < scene.duration else None
        )
        for found in long_questions(scene):
            start, end = found.segment
            first, last = render_frames(scene, [start + 0.1, end - 0.1], 32)
            outside = [moment for moment in (start - 0.1, end + 0.1) if 0 < moment < scene.duration]
            for frame in render_frames(scene, outside, 32):
                assert (frame != first).any() and (ground is None or np.array_equal(frame, ground))
            if found.question.kind == "direction":
                assert (first != last).any()
            assert found.question.options[found.question.answer_index] == found.question.answer
            assert len(set(found.question.options)) == 4


def test_asking_fewer_kinds_gives_the_same_questions() -> None:
    scene = SCENES[0]
    every = long_questions(scene)
    for kind in LONG_KINDS:
        assert long_questions(scene, (kind,)) == [found for found in every if found.question.kind == kind]


def test_items_are_even() -> None:
    items = long_items(80)
    kinds = Counter(found.question.kind for _, found in items)
    assert set(kinds.values()) == {20}
    for kind in LONG_KINDS:
        answers = Counter(found.question.answer for _, found in items if found.question.kind == kind)
        assert max(answers.values()) - min(answers.values()) <= 1
    assert Counter(found.question.answer_index for _, found in items) == {0: 20, 1: 20, 2: 20, 3: 20}
    assert items == long_items(80) and len({scene.seed for scene, _ in items}) == 80


def test_a_decoded_video_and_its_row() -> None:
    scene, found = long_items(1)[0]
    video = render_long(scene, 16)
    assert video.shape == (scene.duration * LONG_FPS, 16, 16, 3) and video.dtype == np.uint8
    first = int(found.segment[0] * LONG_FPS)
    assert (video[first] != video[first - 1]).any()
    row = long_row(scene, found, video)
    assert row["video"] is video and row["segment"] == list(found.segment) and row["duration"] == scene.duration


def test_errors_say_what_to_do() -> None:
    with pytest.raises(ValueError, match="unknown split 'test'"):
        make_long_scene(0, "test")
    with pytest.raises(ValueError, match="0 <= seed"):
        make_long_scene(-1)
    with pytest.raises(ValueError, match="unknown difficulty 'huge'"):
        make_long_scene(0, difficulty="huge")
    with pytest.raises(ValueError, match="do not fit into 30 s"):
        make_long_scene(0, difficulty=LongDifficulty(durations=(30,), shapes=(5,)))
    with pytest.raises(ValueError, match="unknown question kinds"):
        long_questions(SCENES[0], ("when",))
    with pytest.raises(ValueError, match="at least 1"):
        long_items(0)
