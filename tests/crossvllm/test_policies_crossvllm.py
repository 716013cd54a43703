"""Prompts, policies and times of CrossVLLM: pure functions of texts."""

import itertools
import json

import pytest

from longvideo.processing.crossvllm import event_lists, policies, segment_times
from longvideo.processing.crossvllm.policies import CoarsePolicy, FinePolicy, Rejected
from tests.malformed_policies import malformed_policies


def test_the_overview_is_asked_as_specified() -> None:
    text = policies.coarse_prompt("What does he put on?", 120.04)
    lines = text.splitlines()
    assert lines[0].endswith("The length of the original video is 120.0 seconds.")
    assert lines[1] == "Choose one policy for the question below."
    assert [line.split(":")[0] for line in lines[2:4]] == ["- Temporal grounding", "- Direct output"]
    assert lines[-1] == "Question: What does he put on?"
    examples = [json.loads(line.split(": ", 1)[1]) for line in lines if line.startswith("Example")]
    assert examples == [
        {"t_start": 41.0, "t_end": 58.5, "answer": ""},
        {"t_start": None, "t_end": None, "answer": "A cooking lesson."},
    ]


def test_training_offers_no_direct_answer() -> None:
    text = policies.coarse_prompt("Why?", 30.0, grounding_only=True)
    assert "Choose one policy" not in text and "irect output" not in text
    assert "\nGive the part of the video that a detail module should examine.\n" in text
    assert text.count("Example of") == 1


def test_feedback_is_told_oldest_first() -> None:
    rejected = [Rejected((0.0, 12.26), "only a\nkitchen {empty}"), Rejected((30.0, 40.0), "a car")]
    lines = policies.coarse_prompt("Why?", 60.0, rejected=rejected).splitlines()
    place = lines.index("0.0 to 12.3 is not the suitable grounding segments because only a kitchen {empty}")
    assert lines[place + 1 : place + 3] == [
        "30.0 to 40.0 is not the suitable grounding segments because a car",
        "Choose a part of the video that differs from the segments above.",
    ]
    assert lines[place + 3].startswith("Reply with a single JSON object")


def test_the_detail_module_is_asked_as_specified() -> None:
    text = policies.fine_prompt("Why?")
    assert "sampled from" not in text and text.endswith("\nQuestion: Why?")
    grounding = policies.fine_prompt(policies.grounding_question("a dog barks"), grounding=(3.0, 9.5))
    head = grounding.splitlines()[0]
    assert "The short video is sampled from 3.0 to 9.5 of the original video." in head
    assert 'for example "12.0 to 18.5".' in head
    assert grounding.endswith('Question: When does this happen: "a dog barks"?')
    assert policies.plain_prompt("Why?") == "Why?"


def test_questions_may_hold_the_names_of_slots() -> None:
    assert policies.coarse_prompt("{duration} {feedback}?", 5.0).endswith("Question: {duration} {feedback}?")
    assert event_lists.window_prompt("{length}?", (0.0, 9.0)).endswith("Question: {length}?")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"t_start": 3, "t_end": 9.5, "answer": ""}', CoarsePolicy(3.0, 9.5, "", "json")),
        ('{"t_start": null, "t_end": null, "answer": "Two"}', CoarsePolicy(None, None, "Two", "json")),
        ('Sure!\n```json\n{"t_start": "3", "t_end": "9.5s"}\n```', CoarsePolicy(3.0, 9.5, "", "json")),
        ("{'t_start': 3, 't_end': 9, 'answer': None,}", CoarsePolicy(3.0, 9.0, "", "tolerant")),
        ("{'t_start': 3, 't_end': 9, 'answer': 'it's his hat'}", CoarsePolicy(3.0, 9.0, "it's his hat", "tolerant")),
        ('{t_start: 3, t_end: 9, answer: ""}', CoarsePolicy(3.0, 9.0, "", "tolerant")),
        ('{"start": "00:41", "end": "01:02:03"}', CoarsePolicy(41.0, 3723.0, "", "json")),
        ('{"t_start": NaN, "t_end": 9, "answer": ""}', CoarsePolicy(None, 9.0, "", "json")),
        ('{"t_start": 1e999, "t_end": -Infinity}', CoarsePolicy(None, None, "", "json")),
        ('{"t_start": true, "t_end": [4], "answer": 3}', CoarsePolicy(None, None, "3", "json")),
        (
            '{"answer": "a } and a { in it", "t_start": 1, "t_end": 2}',
            CoarsePolicy(1.0, 2.0, "a } and a { in it", "json"),
        ),
        ('{thinking} {"t_start": 5, "t_end": 6}', CoarsePolicy(5.0, 6.0, "", "json")),
        ('{"t_start": 5, "t_end": 6} {"t_start": 7, "t_end": 8}', CoarsePolicy(5.0, 6.0, "", "json")),
        ('{"t_start": 12.5, "t_end": 20, "answer": "He pu', CoarsePolicy(12.5, 20.0, "He pu", "keys")),
        ("t_start = 4, t_end = 8", CoarsePolicy(4.0, 8.0, "", "keys")),
        ('{"policy": {"t_start": 4, "t_end": 8}}', CoarsePolicy(4.0, 8.0, "", "keys")),
        ("It happens from 12.5s to 20 s.", CoarsePolicy(12.5, 20.0, "", "prose")),
        ("Somewhere in 0:12 - 0:45", CoarsePolicy(12.0, 45.0, "", "prose")),
        ("A man cooks in a kitchen.", CoarsePolicy()),
        ("", CoarsePolicy()),
    ],
)
def test_policies_of_the_overview(text: str, expected: CoarsePolicy) -> None:
    assert policies.parse_coarse(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"reflection": "", "answer": "a hat"}', FinePolicy("", "a hat", "json")),
        ('{"reflection": "only a car", "answer": "unknown"}', FinePolicy("only a car", "unknown", "json")),
        ('{"reflection": "None.", "answer": ["a", "b"]}', FinePolicy("", "a, b", "json")),
        ('{"Reflection": "N/A", "Answer": 4}', FinePolicy("", "4", "json")),
        ("{'reflection': no, 'answer': 'x'}", FinePolicy("", "x", "tolerant")),
        ('{"reflection": false, "answer": "x"}', FinePolicy("", "x", "json")),
        ('{"reflection": {}, "answer": "x"}', FinePolicy("", "x", "json")),
        ("{'reflection': False, 'answer': 'x'}", FinePolicy("", "x", "tolerant")),
        ('{"reflection": false, "answer": "x', FinePolicy("", "x", "keys")),
        ('{"reflection": "", "answer": "type ```ls -l```"}', FinePolicy("", "type ```ls -l```", "json")),
        ('```json\n{"reflection": "", "answer": "```py"}\n```', FinePolicy("", "```py", "json")),
        ('```json\n{"reflection": "",\n```\n"answer": "x"}', FinePolicy("", "x", "json")),
        ("The answer: a red hat, then a coat.", FinePolicy("", "The answer: a red hat, then a coat.", "prose")),
        ("```\na hat\n```", FinePolicy("", "a hat", "prose")),
        (" ", FinePolicy()),
    ],
)
def test_policies_of_the_detail_module(text: str, expected: FinePolicy) -> None:
    assert policies.parse_fine(text) == expected


def test_two_hundred_malformed_policies_raise_nothing() -> None:
    texts = malformed_policies(200)
    assert len(texts) == 200
    readable = 0
    for text in texts:
        coarse, fine = policies.parse_coarse(text), policies.parse_fine(text)
        segment = segment_times.normalize_segment(coarse.t_start, coarse.t_end, 60.0)
        assert segment is None or 0 <= segment[0] < segment[1] <= 60.0
        assert isinstance(coarse.answer, str) and isinstance(fine.answer + fine.reflection, str)
        for event in event_lists.parse_events(text, (60.0, 124.0), 1):
            assert 60.0 <= event.start <= event.end <= 124.0
        assert event_lists.parse_ranking(text, 9, 3) == sorted(set(event_lists.parse_ranking(text, 9, 3)))
        found = segment_times.locate_in_segment(segment_times.times_in_text(text, anywhere=True), (4.0, 9.0))
        assert found is None or 4.0 <= found[0] < found[1] <= 9.0
        readable += coarse.parse_ok
    # Most lost a mark or a few: a parser that gives up on everything would also raise nothing.
    assert readable > 100


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (3, 3.0), (2.5, 2.5), ("12.5", 12.5), ("12.5s", 12.5), ("12 seconds", 12.0), ("01:30", 90.0),
        ("1:02:03.5", 3723.5),
        ("-4", -4.0), (None, None), ("", None), ("null", None), (True, None), (float("nan"), None), ("inf", None),
        ([1], None), ({}, None), (10**400, None), ("3/4", None), ("about 5", None),
    ],
)  # fmt: skip
def test_times(value: object, expected: float | None) -> None:
    assert segment_times.parse_time(value) == expected


@pytest.mark.parametrize(
    ("start", "end", "duration", "expected"),
    [
        (3.0, 9.0, 60.0, (3.0, 9.0)),
        (9.0, 3.0, 60.0, (3.0, 9.0)),
        (-5.0, 90.0, 60.0, (0.0, 60.0)),
        (60.0, 70.0, 60.0, None),
        (70.0, 20.0, 60.0, (20.0, 60.0)),
        (None, 9.0, 60.0, None),
        (3.0, None, 60.0, None),
        (float("nan"), 9.0, 60.0, None),
        (10.0, 10.0, 60.0, (9.5, 10.5)),
        (0.2, 0.4, 60.0, (0.0, 1.0)),
        (59.9, 60.0, 60.0, (59.0, 60.0)),
        (-9.0, -4.0, 60.0, (0.0, 1.0)),
        (0.1, 0.2, 0.4, (0.0, 0.4)),
        (0.5, 0.6, 0.4, None),
    ],
)
def test_segments_come_into_the_video(
    start: float | None, end: float | None, duration: float, expected: tuple[float, float] | None
) -> None:
    found = segment_times.normalize_segment(start, end, duration)
    # 1e-9: differences of decimal fractions are not exact.
    assert found == (None if expected is None else pytest.approx(expected, abs=1e-9))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("12.0 to 18.5", (12.0, 18.5)),
        ("18.5 - 12.0", (12.0, 18.5)),
        ("9.2 to 14", (10.0, 14.0)),
        ("2 to 5", (12.0, 15.0)),
        ("0:12, 0:15", (12.0, 15.0)),
        ("2 to 40", None),
        ("12 to 12", None),
        ("at the end", None),
    ],
)
def test_times_of_the_detail_module(text: str, expected: tuple[float, float] | None) -> None:
    times = segment_times.times_in_text(text, anywhere=True)
    assert segment_times.locate_in_segment(times, (10.0, 20.0)) == expected


def test_targets_of_training_are_read_back() -> None:
    text = policies.policy_text(12.04, 20.0)
    assert text == '{"t_start": 12.0, "t_end": 20.0, "answer": ""}'
    assert policies.parse_coarse(text) == CoarsePolicy(12.0, 20.0, "", "json")
    assert policies.parse_coarse(policies.policy_text(None, None, 'a "b"')).answer == 'a "b"'


@pytest.mark.parametrize("duration", [0.5, 64.0, 64.5, 124.0, 300.0])
def test_windows_cover_the_video(duration: float) -> None:
    windows = segment_times.cut_windows(duration)
    assert windows[0][0] == 0 and windows[-1][1] == duration
    assert len(windows) <= -(-duration // 60) and all(start < end <= start + 64 for start, end in windows)
    assert all(before[1] - after[0] == 4 for before, after in itertools.pairwise(windows))


def test_windows_must_get_on() -> None:
    with pytest.raises(ValueError, match="overlap from 0"):
        segment_times.cut_windows(10.0, length=4.0, overlap=4.0)


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("How many tricks are shown?", True),
        ("Count the cars.", True),
        ("In what order do they arrive?", True),
        ("What does he do first, and what then?", True),
        ("Who meets the countess?", False),
        ("What is then first?", False),
    ],
)
def test_questions_that_need_every_part(question: str, expected: bool) -> None:
    assert event_lists.asks_everywhere(question) is expected


def test_events_are_read_with_the_offset_of_their_window() -> None:
    text = (
        '[{"t_start": 3, "t_end": 7.5, "event": "a"}, {"t_start": 70, "t_end": 80, "event": "b"}, {"event": "c"}, {}]'
    )
    found = event_lists.parse_events(text, (60.0, 124.0), 1)
    times = [(event.text, event.start, event.end) for event in found]
    # Only 64 s are in the window: 70 to 80 s must be times of the original video.
    assert times == [("c", 60.0, 124.0), ("a", 63.0, 67.5), ("b", 70.0, 80.0)]


def test_events_that_cross_a_border_count_once() -> None:
    found = [
        event_lists.Event(61.0, 64.0, "A trick.", 0),
        event_lists.Event(5.0, 9.0, "a trick", 0),
        event_lists.Event(60.5, 66.0, "a trick", 1),
        event_lists.Event(67.0, 69.0, "a trick", 1),
        event_lists.Event(61.0, 63.0, "a bow", 1),
    ]
    merged = event_lists.merge_events(found, overlap=4.0)
    assert [(event.start, event.end, event.text) for event in merged] == [
        (5.0, 9.0, "a trick"),
        (60.5, 66.0, "A trick."),
        (61.0, 63.0, "a bow"),
        (67.0, 69.0, "a trick"),
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("[3, 1]", [0, 2]), ("nothing", [2, 7]), ("12, 99, 4", [3, 5]), ("[5, 5, 5]", [4, 5]), ("2.5 of 7", [4, 6])],
)
def test_the_overview_chooses_windows(text: str, expected: list[int]) -> None:
    assert event_lists.parse_ranking(text, 10, 2) == expected
