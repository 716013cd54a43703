"""Questions about when and where: the truth is what the pixels show, texts are read back, files round trip."""

import json
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from longvideo.evaluation.corpus import (
    ALL_TASKS,
    DENSE_TASKS,
    GROUNDING_TASKS,
    corpus_vocabulary,
    end_to_end_times,
    grounding_items,
    list_grounded_events,
    make_groundings,
    make_scene,
    read_rows,
    read_st_align,
    render_frames,
    write_grounding_corpus,
    write_st_align,
)
from longvideo.evaluation.corpus.__main__ import main
from longvideo.evaluation.corpus.grounding import actor_box, grounding_texts, seen_seconds
from longvideo.evaluation.corpus.grounding_rows import grounding_row
from longvideo.evaluation.corpus.scenes import SHAPES, Actor, Background, Difficulty, Motion, Needle, Scene
from longvideo.evaluation.corpus.st_align import from_st_align, to_st_align
from longvideo.processing.llava_st.grounding_llava_st import Box, Span, parse_grounding
from longvideo.processing.llava_st.tasks_llava_st import PHRASES

GREY = Background("plain", (90, 90, 90), (110, 110, 110))
SIZE = (320, 240)


def still(shape: str = "circle", colour: str = "red", **changes: object) -> Actor:
    return replace(Actor(shape, colour, radius=0.2, x=0.5, y=0.5, enter=0.0, leave=16.0), **changes)


def scene_of(*actors: Actor, needle: Needle | None = None) -> Scene:
    return Scene(0, "train", 16, 8, GREY, actors, needle)


def numbers(box: Box) -> list[float]:
    return [box.x1, box.y1, box.x2, box.y2]


@pytest.mark.parametrize("shape", SHAPES)
def test_boxes_are_those_of_the_pixels(shape: str) -> None:
    actor = still(shape, x=0.4, y=0.55)
    frame = render_frames(scene_of(actor), [1.0], SIZE)[0].astype(int)
    changed = np.abs(frame - 90).sum(-1) > 60
    rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
    seen = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
    # Edges are blended over a pixel; an apex is thinner than one for up to three more.
    assert numbers(actor_box(actor, 1.0, SIZE)) == pytest.approx(seen, abs=4)


def test_boxes_follow_a_movement() -> None:
    actor = still(x=0.3, motion=Motion("right", 4.0, 8.0, 0.4))
    before, during, after = (actor_box(actor, time, (100, 100)) for time in (1.0, 6.0, 9.0))
    assert numbers(before) == pytest.approx([11.6, 31.6, 48.4, 68.4])
    assert during.x1 == pytest.approx(before.x1 + 20) and after.x2 == pytest.approx(before.x2 + 40)


def test_frames_lie_from_end_to_end() -> None:
    scene = scene_of(still())
    times = end_to_end_times(scene, 20)
    # 128 frames at 8 per second: round(i * 127 / 19).
    assert [round(time * 8) for time in times[:4]] == [0, 7, 13, 20] and times[-1] == 127 / 8 == seen_seconds(scene)
    assert end_to_end_times(scene, 1) == [0.0]
    with pytest.raises(ValueError, match="num_frames=0"):
        end_to_end_times(scene, 0)


def test_events_of_a_scene() -> None:
    moving = still(x=0.3, enter=2.0, leave=14.0, motion=Motion("right", 4.0, 8.0, 0.4))
    turning = still("ring", "blue", enter=0.0, leave=6.0, change=3.0, new_colour="green")
    staying = still("cross", "white")
    events = list_grounded_events(scene_of(moving, turning, staying, needle=Needle("T", 9.0, 10.5)))
    assert [(event.caption, event.span) for event in events] == [
        ("ring is blue", Span(0.0, 3.0)),
        ("ring is seen", Span(0.0, 6.0)),
        ("red circle is seen", Span(2.0, 14.0)),
        ("ring is green", Span(3.0, 6.0)),
        ("red circle moves right", Span(4.0, 8.0)),
        ("letter T is shown", Span(9.0, 10.5)),
    ]


def test_tubes_hold_what_the_sampled_frames_show() -> None:
    moving = still(x=0.3, enter=2.0, leave=14.0, motion=Motion("right", 4.0, 8.0, 0.4))
    scene = scene_of(moving, needle=Needle("T", 9.0, 10.5))
    seen = next(g for g in make_groundings(scene, ["stvg"], size=SIZE) if "is seen" in g.question)
    times = [time for time in end_to_end_times(scene) if 2 <= time <= 14 and not 9 <= time < 10.5]
    assert list(seen.tube.times) == times and len(times) == 12
    assert seen.tube.boxes == tuple(actor_box(moving, time, SIZE) for time in times)


def test_texts_are_read_back_as_the_truth() -> None:
    counts: Counter[str] = Counter()
    for seed in range(50):
        scene = make_scene(seed, "held_out")
        for item in make_groundings(scene, size=SIZE):
            counts[item.task] += 1
            read = parse_grounding(
                item.answer,
                size=SIZE,
                duration=seen_seconds(scene),
                task=item.task,
                event_start=item.span and item.span.start,
            )
            asked = parse_grounding(item.question, size=SIZE, duration=seen_seconds(scene))
            assert not read.malformed, item
            # Three digits of a fraction: half a thousandth of the video and of the frame's sides.
            close = {"abs": 0.0005 * 320 + 1e-9}
            if item.task in ("tvg", "stvg", "elc"):
                span = (read.spans[0].start, read.spans[0].end)
                assert span == pytest.approx((item.span.start, item.span.end), abs=0.0005 * scene.duration)
            if item.task in ("tr", "svg"):
                assert asked.spans[0].start == pytest.approx(item.span.start, abs=0.0005 * scene.duration)
            if item.task == "rec":
                assert numbers(read.boxes[0]) == pytest.approx(numbers(item.box), **close)
            if item.task in ("reg", "elc"):
                box = asked.boxes[0]
                assert numbers(box) == pytest.approx(numbers(item.box), **close)
            if item.tube is not None:
                assert len(read.tubes) == 1 and len(read.tubes[0].times) == len(item.tube.times) >= 2
                for one, other in zip(read.tubes[0].boxes, item.tube.boxes, strict=True):
                    assert numbers(one) == pytest.approx(numbers(other), **close)
            if item.caption is not None:
                assert read.captions[0].text.rstrip(".") == item.caption
    assert min(counts[task] for task in GROUNDING_TASKS) >= 25


def test_descriptions_name_everything_with_its_place_or_time() -> None:
    moving = still(x=0.3, enter=2.0, leave=14.0, motion=Motion("right", 4.0, 8.0, 0.4))
    scene = scene_of(moving, still("ring", "blue", x=0.7, y=0.2))
    picture, video = make_groundings(scene, DENSE_TASKS, size=SIZE)
    named = {item.caption: item.box for item in make_groundings(scene, ["reg"], size=SIZE)}
    assert picture.task == "dgc" and {part.text: part.box for part in picture.parts} == named
    assert "with interleaved bounding boxes" in picture.question and picture.time is not None
    read = parse_grounding(picture.answer, size=SIZE, duration=None, task="dgc")
    assert not read.malformed and [part.text for part in read.captions] == [part.text for part in picture.parts]
    assert video.task == "dvc" and [(part.text, part.span) for part in video.parts] == [
        ("red circle is seen", Span(2.0, 14.0)),
        ("red circle moves right", Span(4.0, 8.0)),
    ]
    read = parse_grounding(video.answer, size=SIZE, duration=seen_seconds(scene), task="dvc")
    assert not read.malformed and [part.text for part in read.captions] == [part.text for part in video.parts]
    assert read.captions[0].span.start == pytest.approx(2.0, abs=0.0005 * 16)


def test_a_description_of_a_time_names_one_event() -> None:
    """Where two events nearly share their times, neither is asked for by them."""
    one, other = still(enter=2.0, leave=6.0), still("ring", "blue", enter=2.2, leave=6.1, x=0.2)
    third = still("cross", "white", enter=9.0, leave=13.0)
    found = make_groundings(scene_of(one, other, third), ["tr", "tvg"])
    assert [item.caption for item in found if item.task == "tr"] == ["white cross is seen"]
    assert sum(item.task == "tvg" for item in found) == 3


def test_questions_repeat_and_tasks_do_not_change_each_other() -> None:
    scene = make_scene(11)
    everything = make_groundings(scene)
    assert everything == make_groundings(scene) and not {item.task for item in everything} & set(DENSE_TASKS)
    named = make_groundings(scene, ALL_TASKS)
    assert named[: len(everything)] == everything and {item.task for item in named} >= set(DENSE_TASKS)
    assert make_groundings(scene, ["svg"]) == [item for item in everything if item.task == "svg"]
    with pytest.raises(ValueError, match="unknown grounding tasks \\['dense'\\]: use rec, reg"):
        make_groundings(scene, ["dense"])


def test_items_are_balanced() -> None:
    items = grounding_items(70)
    tasks = Counter(item.task for one in items for item in one.groundings)
    assert tasks == dict.fromkeys(GROUNDING_TASKS, 10)
    sorts = Counter(item.bucket for one in items for item in one.groundings if item.task == "tvg")
    assert set(sorts) == {"seen", "moves", "coloured", "letter"} and min(sorts.values()) >= 1
    assert all(one.scene.split == "held_out" and len(one.groundings) <= 4 for one in items)
    assert grounding_items(7) == grounding_items(7)
    with pytest.raises(ValueError, match="number of questions is 0"):
        grounding_items(0)
    with pytest.raises(ValueError, match="unknown grounding tasks"):
        grounding_items(3, tasks=["dense"])
    still_life = Difficulty(timed=False, move=0.0, change=0.0, needle=0.0)
    with pytest.raises(ValueError, match="too few questions of task stvg"):
        grounding_items(3, tasks=["stvg"], difficulty=still_life)


def test_files_of_a_corpus(tmp_path) -> None:
    path = write_grounding_corpus(tmp_path, 7, size=64)
    rows = list(read_rows(path))
    assert sorted(row["task"] for row in rows) == sorted(GROUNDING_TASKS)
    assert len({row["id"] for row in rows}) == 7
    for row in rows:
        visual, text = row["messages"][0]["content"]
        assert text["text"] == row["question"] and row["messages"][1]["content"][0]["text"] == row["answer"]
        is_image = row["task"] in ("rec", "reg")
        assert visual["type"] == ("image" if is_image else "video") and (row["duration"] is None) == is_image
        if is_image:
            assert Image.open(visual["path"]).size == (64, 64)
        assert visual["path"].startswith(str(tmp_path.resolve()))
    assert not [file for file in tmp_path.rglob("*") if "partial" in file.name]


def test_st_align_round_trip(tmp_path) -> None:
    rows = []
    for item in grounding_items(9, tasks=["stvg", "svg", "elc"], size=SIZE):
        rows += [grounding_row(item.scene, one, "videos/a.mp4", size=SIZE) for one in item.groundings]
    paths = write_st_align(tmp_path, rows)
    assert sorted(path.name for path in paths) == ["elc.json", "stvg.json", "svg.json"]
    for path in paths:
        before = [row for row in rows if row["task"] == path.stem]
        after = list(read_st_align(path))
        assert len(after) == len(before) == 3
        for one, other in zip(before, after, strict=True):
            assert other["messages"][0]["content"][0]["path"] == str(tmp_path / "videos/a.mp4")
            # Scenes have eight frames per second; the part ends with the last of them.
            assert other["messages"][0]["content"][0]["split"] == [0, round(one["duration"] * 8)] == other["split"]
            assert other["caption"] == (one["caption"] if path.stem == "elc" else None)
            # Entries hold whole frames, an eighth of a second apart, and hundredths of a pixel.
            assert other["span"] == pytest.approx(one["span"], abs=0.0626)
            assert other["tube"]["times"] == pytest.approx(one["tube"]["times"], abs=1e-9)
            for box, wanted in zip(other["tube"]["boxes"], one["tube"]["boxes"], strict=True):
                assert box == pytest.approx(wanted, abs=0.011)
            for key in ("question", "answer"):
                assert shape_of(other[key]) == shape_of(one[key])


def shape_of(text: str) -> str:
    """A text without the digits of its coordinates, and with one phrase in front of spans."""
    for phrase in PHRASES:
        text = text.replace(f"{phrase} {{", "In {")
    return "".join("0" if character.isdigit() else character for character in text)


def test_st_align_entries_as_published() -> None:
    boxes = {"10": [1, 2, 3, 4], "12": [2, 2, 3, 4], "110": [-5, 0, 900, 50]}
    entry = {
        "video_path": "a/b.mp4",
        "meta": {
            "width": 640,
            "height": 360,
            "split": [10, 110],
            "spatial_token": {"<bboxes>": boxes, "<bbox_1>": [64, 36, 64, 36]},
            "time_token": {"<s>": 20, "<e>": 60},
        },
        "conversations": [
            {"from": "human", "value": "<video>\nStarts in <s>, what about <bbox_1>?"},
            {"from": "gpt", "value": "Ends in <e>, a child runs. Object bounding box: <bboxes>"},
        ],
    }
    row = from_st_align(entry, "elc", num_frames=11, folder="/videos")
    assert row["messages"][0]["content"][0] == {"type": "video", "path": "/videos/a/b.mp4", "split": [10, 110]}
    region = "[<WIDTH-INPUT0.100>,<HEIGHT-INPUT0.100>,<WIDTH-INPUT0.200>,<HEIGHT-INPUT0.200>]"
    assert row["question"] == f"Starts in <TEMP-INPUT0.100>, what about {region}?"
    # Frame 12 is not sampled, and a box beyond the frame ends at its edge.
    assert row["answer"] == (
        "Ends in <TEMP-OUTPUT0.500>, a child runs. Object bounding box: "
        "<TEMP-OUTPUT0.000>:[<WIDTH-OUTPUT0.002><HEIGHT-OUTPUT0.006><WIDTH-OUTPUT0.006><HEIGHT-OUTPUT0.017>] "
        "<TEMP-OUTPUT1.000>:[<WIDTH-OUTPUT0.000><HEIGHT-OUTPUT0.000><WIDTH-OUTPUT1.000><HEIGHT-OUTPUT0.139>]"
    )
    assert (row["caption"], row["span"], row["duration"]) == ("a child runs", [10.0, 50.0], 100.0)
    phrase = {
        **entry,
        "conversations": [entry["conversations"][0], {"from": "gpt", "value": "From <s> to <e>. <bboxes>"}],
    }
    assert from_st_align(phrase, "stvg", num_frames=11)["answer"].startswith(
        "During the span of {<TEMP-OUTPUT0.100><TEMP-OUTPUT0.500>}. <TEMP-OUTPUT0.000>:["
    )


def test_st_align_errors(tmp_path) -> None:
    row = grounding_row(make_scene(3), make_groundings(make_scene(3), ["tvg"])[0], "a.mp4", size=SIZE)
    with pytest.raises(ValueError, match="task 'tvg' has no ST-Align file"):
        to_st_align(row)
    with pytest.raises(ValueError, match="unknown ST-Align task 'rec'"):
        from_st_align({}, "rec")
    with pytest.raises(ValueError, match="no ST-Align entry, it lacks 'meta'"):
        from_st_align({"video_path": "a"}, "svg")
    item = next(g for g in make_groundings(make_scene(3), ["stvg"], size=SIZE))
    entry = to_st_align(grounding_row(make_scene(3), item, "a.mp4", size=SIZE))
    with pytest.raises(ValueError, match="the name <other> is in neither"):
        broken = [*entry["conversations"][:1], {"from": "gpt", "value": "<other>"}]
        from_st_align({**entry, "conversations": broken}, "stvg")
    entry["meta"]["spatial_token"]["<bboxes>"] = {"1": [0, 0, 1, 1]}
    with pytest.raises(ValueError, match="no box lies at one of the 20 sampled frames"):
        from_st_align(entry, "stvg")
    with pytest.raises(FileNotFoundError):
        list(read_st_align(tmp_path / "stvg.json"))


def test_command(tmp_path, capsys) -> None:
    arguments = ["--out", str(tmp_path), "--num", "3", "--size", "32"]
    assert main([*arguments, "--grounding", "stvg", "rec", "--st-align", "--num-frames", "8"]) == 0
    rows = list(read_rows(capsys.readouterr().out.strip()))
    assert Counter(row["task"] for row in rows) == {"rec": 2, "stvg": 1}
    assert all(len(row["tube"]["times"]) <= 8 for row in rows if row["tube"])
    assert len(json.loads((tmp_path / "stvg.json").read_text())) == 1
    assert main([*arguments, "--st-align"]) == 2
    assert "--st-align writes rows of --grounding" in capsys.readouterr().err


def test_wordings_are_listed_for_tokenizers() -> None:
    words = {word for text in grounding_texts() for word in re.findall(r"\w+", text)}
    names = set(corpus_vocabulary()) | {"is", "seen", "shown", "the"}
    for seed in range(20):
        for item in make_groundings(make_scene(seed)):
            text = re.sub(r"<[^>]*>", " ", f"{item.question} {item.answer}")
            assert set(re.findall(r"\w+", text)) <= words | names
