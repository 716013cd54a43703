"""Questions of LLaVA-ST's tasks: seconds and pixels become coordinates, and what cannot be is refused."""

import pytest

from longvideo.processing.llava_st.answer_sources_llava_st import answer_sources, seen_period, seen_timeline
from longvideo.processing.llava_st.coordinate_text_llava_st import find_coordinates
from longvideo.processing.llava_st.grounding_llava_st import TASKS as ANSWER_TASKS
from longvideo.processing.llava_st.grounding_llava_st import Span, parse_grounding
from longvideo.processing.llava_st.tasks_llava_st import (
    TASKS,
    box_fractions,
    span_fractions,
    task_messages,
    task_question,
    time_fraction,
)
from longvideo.processing.shared.video_io import SourceVideoMetadata
from tests.tiny_llava_st_processor import tiny_llava_st_processor

VIDEO = {"duration": 20.0}
FRAME = {"size": (200, 100)}
SPAN, BOX = (4.0, 8.0), (20, 10, 100, 60)
WRITTEN_SPAN = "{<TEMP-INPUT0.200>,<TEMP-INPUT0.400>}"
WRITTEN_BOX = "[<WIDTH-INPUT0.100>,<HEIGHT-INPUT0.100>,<WIDTH-INPUT0.500>,<HEIGHT-INPUT0.600>]"
NEEDED = {
    "tvg": {"query": "a man runs"},
    "tr": {"span_seconds": SPAN, **VIDEO},
    "rec": {"query": "the red car"},
    "reg": {"box": BOX, **FRAME},
    "dgc": {},
    "stvg": {"query": "a child holds a bat"},
    "svg": {"query": "the red car", "span_seconds": SPAN, **VIDEO},
    "elc": {"time_seconds": 4.0, "box": BOX, **VIDEO, **FRAME},
    "dvc": {},
}


def test_all_tasks_that_answers_are_read_for_are_here():
    assert set(TASKS) == set(ANSWER_TASKS) == set(NEEDED)


@pytest.mark.parametrize("task", NEEDED)
def test_every_pattern_holds_what_was_given(task):
    needed = NEEDED[task]
    for pattern in range(len(TASKS[task].patterns)):
        text = task_question(task, pattern=pattern, **needed)
        assert needed.get("query", "") in text
        assert (WRITTEN_SPAN in text) == ("span_seconds" in needed)
        assert (WRITTEN_BOX in text) == ("box" in needed)
        assert "{query}" not in text and "{span}" not in text


def test_questions_of_the_release():
    assert task_question("tvg", **NEEDED["tvg"]) == (
        "Give you a textual query: 'a man runs'. When does the described content occur in the video? Please return "
        "the start and end timestamps."
    )
    assert task_question("stvg", **NEEDED["stvg"]) == (
        "At which time interval in the video can we see a child holds a bat occurring? Please describe the location "
        "of the corresponding subject/object in this video.Please firstly give the timestamps, and then give the "
        "spatial bounding box corresponding to each timestamp in the time period."
    )
    assert task_question("elc", **NEEDED["elc"]).startswith(
        "Starts in <TEMP-INPUT0.200>, what happened about the subject/object within the specified region "
        f"{WRITTEN_BOX}?"
    )
    assert task_question("tr", benchmark_style=True, **NEEDED["tr"]) == (
        "Describe what took place during the period  {<TEMP-INPUT0.200><TEMP-INPUT0.400>}  in the video."
    )


def test_braces_in_a_query_stay():
    assert "'{span} {0}'" in task_question("tvg", query="{span} {0}")


def test_start_of_the_part_is_subtracted():
    text = task_question("tr", span_seconds=(14, 18), duration=20, start=10)
    assert WRITTEN_SPAN in text
    # The start of a span will do where a begin is needed.
    elc = task_question("elc", span_seconds=(4.0, 9.0), box=BOX, **VIDEO, size={"width": 200, "height": 100})
    assert elc == task_question("elc", **NEEDED["elc"])


def test_times_of_frames_that_do_not_follow_each_other_evenly():
    facts = SourceVideoMetadata(total_num_frames=5, fps=1.0, width=200, height=100, duration=20.0)
    facts.frame_times = [10.0, 11.0, 12.0, 13.0, 20.0]
    text = task_question("tr", span_seconds=(11.5, 16.5), metadata=facts)
    assert "{<TEMP-INPUT0.375>,<TEMP-INPUT0.875>}" in text, "places 1.5 and 3.5 of 4"
    fractions, seconds = seen_timeline(facts)
    assert fractions.tolist() == [0, 0.25, 0.5, 0.75, 1] and seconds.tolist() == facts.frame_times
    assert parse_grounding("{0.375,0.875}", **answer_sources(1, metadata=facts)[0]).spans == (Span(11.5, 16.5),)
    clipped = task_question("tr", span_seconds=(3.0, 16.5), metadata=facts, clip=True)
    assert "{<TEMP-INPUT0.000>,<TEMP-INPUT0.875>}" in clipped
    elc = task_question("elc", time_seconds=13.0, box=(20, 10, 100, 60), metadata=facts)
    assert "<TEMP-INPUT0.750>" in elc and "<WIDTH-INPUT0.100>" in elc
    # Frames that repeat have the middle of their places; what was chosen unevenly before counts by its place.
    facts.frames_indices, facts.frame_times = [0, 0, 7, 9, 9, 30], [1.0, 1.0, 3.0, 5.0, 5.0, 9.0]
    fractions, seconds = seen_timeline(facts)
    assert fractions.tolist() == pytest.approx([0, 0.4, 0.7, 1]) and seconds.tolist() == [1.0, 3.0, 5.0, 9.0]
    # Even ones need none, also where the part begins behind its first frame.
    facts.frames_indices, facts.frame_times, facts.start = [0, 1, 1, 2, 2, 3], [1.0, 3.0, 3.0, 5.0, 5.0, 7.001], 1.5
    assert seen_timeline(facts) is None and seen_period(facts) == (1.5, 5.501)


def test_ends_and_rounding_errors_of_the_last_frame():
    assert span_fractions((0.0, 20.0), duration=20.0) == (0.0, 1.0)
    assert time_fraction(20.0 + 1e-9, duration=20.0) == 1.0
    assert box_fractions((0, 0, 200, 100), (200, 100)) == (0.0, 0.0, 1.0, 1.0)


def test_clipping():
    assert span_fractions((-3, 30), duration=20, clip=True) == (0.0, 1.0)
    assert box_fractions((-5, 20, 300, 90), (200, 100), clip=True) == (0.0, 0.2, 1.0, 0.9)
    with pytest.raises(ValueError, match="outside of the video altogether"):
        span_fractions((21, 30), duration=20, clip=True)
    with pytest.raises(ValueError, match="has no area"):
        box_fractions((-50, 0, -5, 90), (200, 100), clip=True)


@pytest.mark.parametrize(
    ("task", "wrong", "message"),
    [
        ("vqa", {}, "There is no task 'vqa'; expected one of tvg, tr"),
        ("tvg", {"query": None}, r"Task 'tvg' needs query=\.\.\."),
        ("tvg", {"query": "  "}, "query of task 'tvg' is empty"),
        ("tvg", {"box": BOX}, "Task 'tvg' takes no box; it takes query"),
        ("tr", {"span_seconds": (8.0, 4.0)}, "from 8 s to 4 s is reversed or empty"),
        ("tr", {"span_seconds": (4.0, 4.0)}, "is reversed or empty"),
        ("tr", {"span_seconds": (4.0, 24.0)}, "24 s lies outside of the video, which runs from 0 s to 20 s"),
        ("tr", {"span_seconds": (-1.0, 4.0)}, "-1 s lies outside"),
        ("tr", {"span_seconds": (float("nan"), 4.0)}, "reversed or empty"),
        ("tr", {"span_seconds": (4.0,)}, r"expected \(start, end\)"),
        ("tr", {"duration": None}, "duration=None: to turn seconds into coordinates"),
        ("tr", {"duration": 0}, "duration=0"),
        ("tr", {"pattern": 2}, "has the patterns 0 to 1"),
        ("reg", {"box": (20, 10, 20, 60)}, r"The box \(20, 10, 20, 60\) has no area"),
        ("reg", {"box": (100, 10, 20, 60)}, "has no area; expected left < right"),
        ("reg", {"box": (20, 10, 201, 60)}, "leaves the frame of 200 x 100 pixels"),
        ("reg", {"box": (-1, 10, 20, 60)}, "leaves the frame"),
        ("reg", {"box": (20, float("nan"), 30, 60)}, "has no area"),
        ("reg", {"box": (20, 10, 60)}, r"expected \(left, top, right, bottom\)"),
        ("reg", {"size": None}, r"pass size=\(width, height\)"),
        ("reg", {"size": (0, 100)}, "expected a positive width and height"),
    ],
)
def test_what_cannot_be_is_refused(task, wrong, message):
    with pytest.raises(ValueError, match=message):
        task_question(task, **{**NEEDED.get(task, {}), **wrong})


def test_messages_of_a_task():
    messages = task_messages("tr", video="clip.mp4", **NEEDED["tr"])
    text = {"type": "text", "text": task_question("tr", **NEEDED["tr"])}
    assert messages == [{"role": "user", "content": [{"type": "video", "video": "clip.mp4"}, text]}]
    block = task_messages("tr", video={"path": "clip.mp4", "split": (3, 17)}, **NEEDED["tr"])[0]["content"][0]
    assert block == {"type": "video", "path": "clip.mp4", "split": (3, 17)}
    assert [block["type"] for block in task_messages("rec", image="a.png", query="x")[0]["content"]] == [
        "image",
        "text",
    ]
    assert len(task_messages("tvg", query="x")[0]["content"]) == 1
    with pytest.raises(ValueError, match="Task 'rec' is about images; pass image="):
        task_messages("rec", video="clip.mp4", query="x")


def test_processor_reads_what_it_writes():
    processor = tiny_llava_st_processor()
    messages = processor.apply_task("elc", **NEEDED["elc"])
    text = processor.apply_chat_template(messages)
    assert [entry.value for entry in find_coordinates(text)] == [0.2, 0.1, 0.1, 0.5, 0.6]
    values = processor(text=text, return_tensors="pt")["coordinate_values"]
    assert values[values != 0].tolist() == pytest.approx([0.2, 0.1, 0.1, 0.5, 0.6])
