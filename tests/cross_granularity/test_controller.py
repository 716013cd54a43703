"""The controller with scripted modules: every way in which a search can go and end."""

import json
from collections.abc import Sequence

import pytest

from longvideo.cross_granularity.controller import CrossGranularityController
from longvideo.cross_granularity.rules import ControllerRules
from longvideo.cross_granularity.trace import CrossGranularityAnswer, ModuleCall, VideoQuestion, describe_rounds
from tests.malformed_policies import malformed_policies


class Script:
    """A module that says what is written down, question by question, and keeps what it was asked."""

    def __init__(self, **lines: Sequence[str]) -> None:
        self.lines = {question: list(texts) for question, texts in lines.items()}
        self.batches: list[list[ModuleCall]] = []

    def __call__(self, calls: Sequence[ModuleCall]) -> list[str]:
        self.batches.append(list(calls))
        return [self.lines[call.source.question].pop(0) for call in calls]

    @property
    def calls(self) -> list[ModuleCall]:
        return [call for batch in self.batches for call in batch]


def ground(start: object, end: object, answer: str = "") -> str:
    return json.dumps({"t_start": start, "t_end": end, "answer": answer})


def see(answer: str, reflection: str = "") -> str:
    return json.dumps({"reflection": reflection, "answer": answer})


def run(
    coarse: Sequence[str],
    fine: Sequence[str],
    *,
    duration: float = 60.0,
    task: str = "qa",
    question: str = "q",
    **rules,
) -> tuple[CrossGranularityAnswer, Script, Script]:
    """One question; every line that is written down must be said."""
    modules = Script(**{question: coarse}), Script(**{question: fine})
    controller = CrossGranularityController(*modules, ControllerRules(**rules))
    (answer,) = controller([VideoQuestion("v.mp4", question, duration, task)])
    assert [module.lines[question] for module in modules] == [[], []]
    json.dumps(answer.to_dict())
    assert describe_rounds(answer.to_dict())[-1].startswith(f"end: {answer.reason}, ")
    return answer, *modules


def test_a_direct_answer_ends_at_once() -> None:
    answer, coarse, fine = run([ground(None, None, "a lesson")], [])
    assert (answer.answer, answer.segment, answer.reason, answer.num_calls) == ("a lesson", None, "direct", 1)
    assert coarse.calls[0].segment is None and fine.batches == []


def test_a_segment_that_suits_is_accepted() -> None:
    answer, coarse, fine = run([ground(10, 20)], [see("a hat")])
    assert (answer.answer, answer.segment, answer.reason) == ("a hat", (10.0, 20.0), "accepted")
    assert fine.calls[0].segment == (10.0, 20.0)
    assert answer.rounds[0].coarse.text == ground(10, 20) and answer.rounds[0].coarse.prompt == coarse.calls[0].prompt
    assert answer.rounds[0].fine.policy.answer == "a hat" and answer.rounds[0].fine.parse_ok


def test_a_segment_that_does_not_suit_is_looked_for_again() -> None:
    answer, coarse, _ = run([ground(10, 20), ground(30, 40)], [see("?", "a car"), see("a hat")])
    assert (answer.answer, answer.segment, answer.reason, len(answer.rounds)) == ("a hat", (30.0, 40.0), "accepted", 2)
    assert "is not the suitable" not in coarse.calls[0].prompt
    assert "\n10.0 to 20.0 is not the suitable grounding segments because a car\n" in coarse.calls[1].prompt


@pytest.mark.parametrize("limit", [0, 1, 2, 3])
def test_the_limit_ends_with_the_last_answer(limit: int) -> None:
    places = [(10 * k, 10 * k + 5) for k in range(limit + 1)]
    coarse = [ground(*place) for place in places]
    answer, overview, _ = run(coarse, [see(f"guess {k}", "a car") for k in range(limit + 1)], max_rounds=limit)
    assert (answer.answer, answer.reason, answer.num_calls) == (f"guess {limit}", "limit", 2 * (limit + 1))
    assert answer.segment == places[-1]
    assert overview.calls[-1].prompt.count("is not the suitable") == limit


def test_a_repeated_segment_ends_the_search() -> None:
    answer, _, fine = run([ground(10, 20), ground(10.1, 20)], [see("a hat", "a car")])
    assert (answer.answer, answer.segment, answer.reason) == ("a hat", (10.0, 20.0), "repeat")
    assert len(answer.rounds) == 2 and answer.rounds[1].fine is None and len(fine.calls) == 1


def test_a_repeated_segment_may_be_allowed() -> None:
    answer, *_ = run([ground(10, 20)] * 2, [see("a hat", "a car"), see("a coat")], stop_on_repeat=False)
    assert (answer.answer, answer.reason) == ("a coat", "accepted")


def test_prose_in_the_first_round_shows_the_whole_video() -> None:
    answer, _, fine = run(["A man is in a kitchen."], [see("a hat")])
    assert (answer.answer, answer.segment, answer.reason) == ("a hat", (0.0, 60.0), "accepted")
    assert not answer.rounds[0].coarse.parse_ok and fine.calls[0].segment == (0.0, 60.0)


def test_prose_in_a_later_round_ends_with_the_last_answer() -> None:
    answer, *_ = run([ground(10, 20), "It is a hat."], [see("a coat", "too dark")])
    assert (answer.answer, answer.segment, answer.reason) == ("a coat", (10.0, 20.0), "parse_error")


def test_prose_of_the_detail_module_is_its_answer() -> None:
    answer, *_ = run([ground(10, 20)], ["He puts on a hat."])
    assert (answer.answer, answer.reason) == ("He puts on a hat.", "accepted")
    assert not answer.rounds[0].fine.parse_ok


@pytest.mark.parametrize(
    ("policy", "segment"),
    [
        ("```json\n{'t_start': 10, 't_end': 20, 'answer': ''}\n```", (10.0, 20.0)),
        ('{"t_start": "0:10", "t_end": "00:20"}', (10.0, 20.0)),
        ('{"t_start": NaN, "t_end": 20}', (0.0, 60.0)),
        ('{"answer": "", "note": "a } in it", "t_start": 10, "t_end": 20}', (10.0, 20.0)),
        (ground(20, 10), (10.0, 20.0)),
        (ground(-10, 500), (0.0, 60.0)),
        (ground(61, 70), (0.0, 60.0)),
        (ground(15, 15.2), (14.6, 15.6)),
        ("from 10 to 20 s", (10.0, 20.0)),
    ],
)
def test_segments_as_they_are_written(policy: str, segment: tuple[float, float]) -> None:
    answer, *_ = run([policy], [see("a hat")])
    # 1e-9: differences of decimal fractions are not exact.
    assert answer.segment == pytest.approx(segment, abs=1e-9)


def test_times_after_the_end_leave_a_direct_answer() -> None:
    assert run([ground(61, 70, "a hat")], [])[0].reason == "direct"


def test_a_video_shorter_than_a_second_is_seen_whole() -> None:
    answer, *_ = run([ground(0.1, 0.2)], [see("a hat")], duration=0.4)
    assert answer.segment == (0.0, 0.4)


def test_an_empty_answer_falls_back_to_earlier_ones() -> None:
    lines = [ground(10, 20), ground(30, 40)]
    answer, *_ = run(lines, [see("a hat", "a car"), see("")])
    assert (answer.answer, answer.segment, answer.reason) == ("a hat", (10.0, 20.0), "accepted")
    answer, *_ = run([ground(10, 20, "a lesson"), ground(30, 40)], [see("", "a car"), see("")])
    assert (answer.answer, answer.reason) == ("a lesson", "accepted")


def test_where_nobody_answers_the_question_alone_is_asked() -> None:
    answer, _, fine = run([ground(10, 20), ground(30, 40)], [see("", "a car"), see("", "x"), " a hat "], max_rounds=1)
    assert (answer.answer, answer.segment, answer.reason, answer.num_calls) == ("a hat", (30.0, 40.0), "limit", 5)
    assert fine.calls[-1].prompt == "q" and answer.rounds[-1].forced.text == " a hat "
    assert run([ground(10, 20)], [see("")], force_answer=False)[0].answer == ""


def test_a_forced_answer_belongs_to_the_round_that_was_seen() -> None:
    answer, *_ = run([ground(10, 20), "?"], [see("", "a car"), "a hat"])
    assert (answer.answer, answer.reason) == ("a hat", "parse_error")
    assert answer.rounds[0].forced is not None and answer.rounds[1].forced is None


def test_without_reflection_the_question_alone_is_asked() -> None:
    answer, _, fine = run([ground(10, 20)], [see("a hat", "a car")], reflection=False)
    assert fine.calls[0].prompt == "q"
    assert (answer.answer, answer.reason) == (see("a hat", "a car"), "accepted")


def test_grounding_answers_with_times() -> None:
    answer, coarse, fine = run([ground(10, 30)], [see("12.0 to 18.5")], task="tvg")
    assert (answer.answer, answer.segment, answer.reason) == ("12.0 to 18.5", (12.0, 18.5), "accepted")
    assert "irect output" not in coarse.calls[0].prompt
    assert coarse.calls[0].prompt.endswith('Question: When does this happen: "q"?')
    assert "is sampled from 10.0 to 30.0 of the original video" in fine.calls[0].prompt


@pytest.mark.parametrize(
    ("text", "expected"), [(see("2 to 5"), (12.0, 15.0)), (see("soon"), (10.0, 30.0)), ("14-16", (14.0, 16.0))]
)
def test_grounding_reads_what_it_can(text: str, expected: tuple[float, float]) -> None:
    assert run([ground(10, 30)], [text], task="tvg")[0].segment == expected


def test_grounding_takes_no_direct_answer() -> None:
    answer, *_ = run([ground(None, None, "soon")], [see("12 to 18")], task="tvg")
    assert (answer.segment, answer.reason) == ((12.0, 18.0), "accepted")
    answer, *_ = run([ground(10, 30), ground(None, None, "x")], [see("12 to 18", "dark")], task="tvg")
    assert (answer.segment, answer.reason) == ((12.0, 18.0), "parse_error")


def test_grounding_without_reflection_still_tells_the_segment() -> None:
    answer, _, fine = run([ground(10, 30)], ["12 to 18"], task="tvg", reflection=False)
    assert answer.segment == (12.0, 18.0) and "sampled from 10.0 to 30.0" in fine.calls[0].prompt


def test_calls_of_one_kind_go_together() -> None:
    coarse = Script(a=[ground(1, 5)], b=[ground(1, 5), ground(20, 30)], c=[ground(None, None, "C")], d=["?"])
    fine = Script(a=[see("A")], b=[see("?", "no hat"), see("B")], c=[], d=[see("D")])
    samples = [VideoQuestion(f"{name}.mp4", name, 60.0) for name in "abcd"]
    answers = CrossGranularityController(coarse, fine)(samples)
    assert [answer.answer for answer in answers] == ["A", "B", "C", "D"]
    assert [answer.reason for answer in answers] == ["accepted", "accepted", "direct", "accepted"]
    assert [[call.source.question for call in batch] for batch in coarse.batches] == [list("abcd"), ["b"]]
    assert [[call.source.question for call in batch] for batch in fine.batches] == [list("abd"), ["b"]]


def test_malformed_policies_never_raise() -> None:
    texts = malformed_policies(200)
    samples = [VideoQuestion("v.mp4", f"q{index}", 60.0, "tvg" if index % 3 == 0 else "qa") for index in range(200)]

    def say(calls: Sequence[ModuleCall]) -> list[str]:
        return [texts[(7 * int(call.source.question[1:]) + len(call.prompt)) % 200] for call in calls]

    answers = CrossGranularityController(say, say, ControllerRules(exhaustive="auto"))(samples)
    assert len(answers) == 200 and {answer.reason for answer in answers} >= {"accepted", "direct", "parse_error"}
    for answer in answers:
        json.dumps(answer.to_dict())
        describe_rounds(answer.to_dict())


def event(start: float, end: float, text: str) -> dict:
    return {"t_start": start, "t_end": end, "event": text}


def test_counting_examines_every_part() -> None:
    first, second = (
        [event(5, 9, "a trick"), event(61, 64, "A trick.")],
        [event(0, 5, "a trick"), event(30, 31, "a bow")],
    )
    answer, coarse, fine = run(
        ["Two tricks."], [json.dumps(first), json.dumps(second), "nothing"], duration=150.0, exhaustive=True
    )
    assert [call.segment for call in fine.batches[0]] == [(0.0, 64.0), (60.0, 124.0), (120.0, 150.0)]
    assert (answer.answer, answer.segment, answer.reason, len(answer.rounds)) == ("Two tricks.", None, "exhaustive", 4)
    assert [(found.start, found.end) for found in answer.events] == [(5.0, 9.0), (60.0, 65.0), (90.0, 91.0)]
    assert "these 3 events" in coarse.calls[0].prompt and "\n2. 60.0 to 65.0: A trick.\n" in coarse.calls[0].prompt


def test_the_overview_chooses_where_there_are_too_many_parts() -> None:
    answer, coarse, fine = run(
        ["[3, 1]", '{"answer": ""}'], ["[]"] * 2, duration=600.0, exhaustive=True, max_windows=2
    )
    assert "\n10: 540.0 to 600.0\n" in coarse.calls[0].prompt
    assert [call.segment[0] for call in fine.calls] == [0.0, 120.0]
    assert (answer.answer, answer.num_calls) == ("0", 4)


def test_counting_may_be_told_from_the_question() -> None:
    assert run(["3"], ["[]"], question="How many tricks?", exhaustive="auto")[0].reason == "exhaustive"
    assert run([ground(1, 9)], [see("x")], question="Which tricks?", exhaustive="auto")[0].reason == "accepted"
    assert run([ground(1, 9)], [see("x")], question="How many tricks?")[0].reason == "accepted"


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"max_rounds": -1}, "whole number from 0"),
        ({"max_rounds": 1.5}, "whole number from 0"),
        ({"exhaustive": "yes"}, "'auto'"),
        ({"max_windows": 0}, "at least 1"),
        ({"window_overlap": 64.0}, "overlap from 0"),
        ({"repeat_iou": 0.0}, "above 0"),
        ({"min_segment": 0.0}, "above 0"),
    ],
)
def test_rules_are_checked(rules: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ControllerRules(**rules)


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([], "list of questions is empty"),
        ([VideoQuestion("v.mp4", " ", 9.0)], "question is empty"),
        ([VideoQuestion("v.mp4", "q", 0.0)], "seconds of the video, above 0"),
        ([VideoQuestion("v.mp4", "q", float("nan"))], "seconds of the video, above 0"),
        ([VideoQuestion("v.mp4", "q", 9.0, "stvg")], "Unknown task"),
    ],
)
def test_questions_are_checked(samples: list[VideoQuestion], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CrossGranularityController(Script(), Script())(samples)


def test_grounding_is_not_exhaustive() -> None:
    with pytest.raises(ValueError, match="answers in words"):
        run([], [], task="tvg", exhaustive=True)


@pytest.mark.parametrize("texts", [[], ["a", "b"], [None]])
def test_a_module_must_answer_every_call(texts: list) -> None:
    with pytest.raises(ValueError, match="coarse module was asked 1 times"):
        CrossGranularityController(lambda calls: texts, Script())([VideoQuestion("v.mp4", "q", 9.0)])
