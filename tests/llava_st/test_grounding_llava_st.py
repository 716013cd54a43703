"""Answers of LLaVA-ST: every task's form, the way into text and back, and that nothing a model writes raises."""

import itertools
import random
import re
from typing import Any

import pytest

from longvideo.processing.llava_st.answer_reader_llava_st import read_answer
from longvideo.processing.llava_st.grounding_llava_st import (
    TASKS,
    Box,
    Caption,
    GroundingResult,
    Span,
    Tube,
    format_box,
    format_span,
    format_tube,
    parse_grounding,
)
from longvideo.processing.llava_st.original_answers_llava_st import original_convert, original_separate

# 99 tokens apart: token n is n seconds, 10 n pixels across and 5 n pixels down.
CLIP: dict[str, Any] = {"size": (990, 495), "duration": 99.0}
BOX = "[<WIDTH-010><HEIGHT-020><WIDTH-030><HEIGHT-040>]"
PIXELS = (100, 100, 300, 200)
TUBE = f"<TEMP-010>:{BOX} <TEMP-011>:{BOX} <TEMP-012>:{BOX}"
ANSWERS = {
    "tvg": "The described content occurs during {<TEMP-010><TEMP-065>}.",
    "tr": "A man opens the door, then leaves.",
    "rec": BOX,
    "reg": "the dog on the left",
    "dgc": f"A man {BOX} and two dogs {BOX}{BOX} are playing.",
    "stvg": f"During the span of {{<TEMP-010><TEMP-012>}}. Object bounding box: {TUBE}",
    "svg": f"Object bounding box: {TUBE}",
    "elc": f"Ends in <TEMP-080>, a child, in red, rides. Object bounding box: {TUBE}",
    "dvc": "{<TEMP-000><TEMP-010>}, a man, old, walks. {<TEMP-010><TEMP-050>}, he stops.",
}
# Times and pixels go through one division and one multiplication in double precision.
EXACT = 1e-9


def _spans(result: GroundingResult) -> list[tuple[float, float]]:
    return [(span.start, span.end) for span in result.spans]


def _corners(box: Box) -> tuple[float, float, float, float]:
    return box.x1, box.y1, box.x2, box.y2


def _numbers(result: GroundingResult) -> list[float]:
    """Every number of a result, to compare two of them."""
    found = [value for span in result.spans for value in (span.start, span.end)]
    found += [value for box in result.boxes for value in _corners(box)]
    for tube in result.tubes:
        found += [*tube.times, *(value for box in tube.boxes for value in _corners(box))]
    return found


def _canonical(text: str) -> str:
    return re.sub(r"<(TEMP|WIDTH|HEIGHT)-(\d+)>", lambda m: f"<{m[1]}-OUTPUT{int(m[2]) / 99:.5f}>", text)


def _short(text: str) -> str:
    return re.sub(r"<(TEMP|WIDTH|HEIGHT)-(\d+)>", lambda m: f"<{m[1][0].lower()}{int(m[2]) / 99:.5f}>", text)


@pytest.mark.parametrize("task", TASKS)
def test_answers_of_every_task(task: str) -> None:
    result = parse_grounding(ANSWERS[task], task=task, **CLIP)
    assert result.malformed == () and result.text == ANSWERS[task]
    spans = {"tvg": [(10, 65)], "stvg": [(10, 12)], "elc": [(10, 80)], "dvc": [(0, 10), (10, 50)]}.get(task, [])
    assert _spans(result) == [pytest.approx(span, abs=EXACT) for span in spans]
    assert len(result.boxes) == {"rec": 1, "dgc": 3}.get(task, 0)
    assert all(_corners(box) == pytest.approx(PIXELS, abs=EXACT) for box in result.boxes)
    assert len(result.tubes) == (task in ("stvg", "svg", "elc"))
    for tube in result.tubes:
        assert tube.times == pytest.approx((10, 11, 12), abs=EXACT)
        assert all(_corners(box) == pytest.approx(PIXELS, abs=EXACT) for box in tube.boxes)


def test_captions_belong_to_what_they_describe() -> None:
    def captions(task: str | None, answer: str) -> tuple[Caption, ...]:
        return parse_grounding(answer, task=task, **CLIP).captions

    assert captions("tr", ANSWERS["tr"]) == (Caption(ANSWERS["tr"]),)
    assert captions("reg", "the dog<|im_end|>") == (Caption("the dog"),)
    for task in ("dgc", None):
        said = captions(task, ANSWERS["dgc"])
        assert [caption.text for caption in said] == ["A man", "and two dogs", "and two dogs"]
        assert all(caption.box is not None for caption in said)
    for task in ("dvc", None):
        said = captions(task, ANSWERS["dvc"])
        assert [caption.text for caption in said] == ["a man, old, walks", "he stops"]
        assert [caption.span.end for caption in said if caption.span] == pytest.approx([10, 50], abs=EXACT)
    for task in ("elc", None):
        (one,) = captions(task, ANSWERS["elc"])
        assert one.text == "a child, in red, rides" and one.span is not None and one.tube is not None
    for task in ("tvg", "stvg", "svg", "rec"):
        assert captions(task, ANSWERS[task]) == ()


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("write", [_canonical, _short, original_convert])
def test_all_forms_mean_the_same(task: str, write: Any) -> None:
    expected = parse_grounding(ANSWERS[task], task=task, **CLIP)
    result = parse_grounding(write(ANSWERS[task]), task=task, **CLIP)
    assert result.malformed == ()
    # Five digits of a fraction: 5e-6 of 990 pixels.
    assert _numbers(result) == pytest.approx(_numbers(expected), abs=5e-3)
    assert [caption.text for caption in result.captions] == [caption.text for caption in expected.captions]


@pytest.mark.parametrize(
    ("text", "piece", "reason"),
    [
        (f"12:{BOX}", f"12:{BOX}", "plain frame number"),
        ("3:[10,20,30,40] 4:[10,20,30,40]", "4:[10,20,30,40]", "plain frame number"),
        ("{<TEMP-030><TEMP-010>}", "{<TEMP-030><TEMP-010>}", "reversed"),
        ("{<TEMP-010><TEMP-150>}", "{<TEMP-010><TEMP-150>}", "beyond the last token <TEMP-099>"),
        ("at <TEMP-150>", "<TEMP-150>", "beyond the last token"),
        (f"<TEMP-150>:{BOX}", f"<TEMP-150>:{BOX}", "beyond the last token"),
        ("{<TEMP-010>}", "{<TEMP-010>}", "1 coordinates, expected 2"),
        ("{<TEMP-010><TEMP-012> and", "{<TEMP-010><TEMP-012>", "not closed"),
        ("[<WIDTH-010><HEIGHT-020><WIDTH-030>", "[<WIDTH-010><HEIGHT-020><WIDTH-030>", "not closed"),
        (
            "[<WIDTH-010><HEIGHT-020><WIDTH-010><HEIGHT-040>]",
            "[<WIDTH-010><HEIGHT-020><WIDTH-010><HEIGHT-040>]",
            "area",
        ),
        ("[<HEIGHT-010><WIDTH-020><WIDTH-30><HEIGHT-040>]", "[<HEIGHT-010><WIDTH-020>", "axes"),
        ("<TEMP-010>: nothing", "<TEMP-010>:", "without its box"),
        ("from <TEMP-010><TEMP-020> on", "<TEMP-010><TEMP-020>", "outside braces"),
        ("{3,7}", "{3,7}", "between 0 and 1"),
        ("{-0.1,0.4}", "{-0.1,0.4}", "not a coordinate"),
        ("{<TEMP-OUTPUT><TEMP-OUTPUT0.5>}", "{<TEMP-OUTPUT>", "has no value"),
        ("{<TEMP-OUTPUT1+1><TEMP-OUTPUT0.5>}", "{<TEMP-OUTPUT1+1>", "not a number"),
        ("{<TEMP-" + "9" * 5000 + "><TEMP-001>}", "{<TEMP-9", "number of a coordinate token"),
        ("so ]", "]", "closes nothing"),
        (f"<TEMP-010>:{BOX}<TEMP-010>:{BOX}", f"<TEMP-010>:{BOX}", "later box"),
        ("Ends in <TEMP-080>, it stops.", "Ends in <TEMP-080>", "event_start"),
    ],
)
def test_what_cannot_be_read_is_kept_with_the_reason(text: str, piece: str, reason: str) -> None:
    result = parse_grounding(text, **CLIP)
    assert any(bad.text.startswith(piece) and reason in bad.reason for bad in result.malformed), result.malformed
    assert result.spans == () and result.boxes == ()


def test_a_bad_entry_leaves_the_others() -> None:
    answer = f"<TEMP-010>:{BOX} 11:{BOX} <TEMP-012>:{BOX[:-14]}, <TEMP-013>:{BOX}"
    for task in ("stvg", None):
        result = parse_grounding(answer, task=task, **CLIP)
        (tube,) = result.tubes
        assert tube.times == pytest.approx((10, 13), abs=EXACT)
        assert ["frame number" in bad.reason for bad in result.malformed] == [True, False]


def test_what_is_not_closed_ends_before_the_next_entry() -> None:
    for opened in ("{<TEMP-001>", "[<WIDTH-001>"):
        result = parse_grounding(f"{opened} <TEMP-010>:{BOX}", task="stvg", **CLIP)
        assert [bad.text for bad in result.malformed] == [opened]
        assert result.tubes[0].times == pytest.approx((10,), abs=EXACT)


def test_several_things_are_several_tubes() -> None:
    answer = f"The man: <TEMP-001>:{BOX} <TEMP-002>:{BOX}. The dog: <TEMP-002>:{BOX} <TEMP-003>:{BOX}"
    apart = parse_grounding(answer, **CLIP)
    assert [tube.times for tube in apart.tubes] == [pytest.approx((1, 2), abs=EXACT), pytest.approx((2, 3), abs=EXACT)]
    # A task about one thing has one tube, in which the last box of a time stays.
    (together,) = parse_grounding(answer, task="stvg", **CLIP).tubes
    assert together.times == pytest.approx((1, 2, 3), abs=EXACT)
    late = f"<TEMP-003>:{BOX}<TEMP-001>:{BOX}"
    assert parse_grounding(late, task="svg", **CLIP).tubes[0].times == pytest.approx((1, 3), abs=EXACT)


def test_prose_with_numbers_is_left_alone() -> None:
    result = parse_grounding("At 10:30 it ends in 5 minutes; the ratio is 1:2, and 0.5 is less than 1.", **CLIP)
    assert result == GroundingResult(text=result.text)


def test_end_of_an_event() -> None:
    said = "Ends in <TEMP-080>, a child rides."
    for more, start in (({"event_start": 3.0}, 3.0), ({"event_start": None}, None), ({"event_start": 90.0}, None)):
        result = parse_grounding(said, task="elc", **more, **CLIP)
        assert _spans(result) == ([] if start is None else [pytest.approx((start, 80), abs=EXACT)])
        assert len(result.malformed) == (start is None)
        assert [caption.text for caption in result.captions] == ["a child rides"]
    both = parse_grounding("Starts in <TEMP-020>. Ends in <TEMP-080>, a child rides.", task="elc", **CLIP)
    assert _spans(both) == [pytest.approx((20, 80), abs=EXACT)]


def test_time_and_place_of_the_source() -> None:
    part = parse_grounding(ANSWERS["stvg"], size={"width": 99, "height": 198}, duration=9.9, start=100.0)
    assert _spans(part) == [pytest.approx((101.0, 101.2), abs=EXACT)]
    assert _corners(part.tubes[0].boxes[0]) == pytest.approx((10, 40, 30, 80), abs=EXACT)
    short = parse_grounding("{<TEMP-00><TEMP-04>} [<WIDTH-0><HEIGHT-1><WIDTH-2><HEIGHT-2>]", **CLIP | NUMBERS)
    assert _spans(short) == [pytest.approx((0, 99), abs=EXACT)]
    assert _corners(short.boxes[0]) == pytest.approx((0, 247.5, 990, 495), abs=EXACT)


NUMBERS = {"num_temporal": 5, "num_spatial": 3}


def test_images_have_no_times_and_time_needs_no_size() -> None:
    image = parse_grounding(f"{BOX} {{<TEMP-001><TEMP-002>}}", size=(990, 495), duration=None)
    assert len(image.boxes) == 1 and "duration" in image.malformed[0].reason
    video = parse_grounding(f"{BOX} {{<TEMP-001><TEMP-002>}}", size=None, duration=9.0)
    assert len(video.spans) == 1 and "size" in video.malformed[0].reason


def test_wrong_arguments_are_named() -> None:
    for wrong, message in (
        ({"size": (0, 5)}, "above 0"),
        ({"size": (5, 5, 3)}, "expected \\(width, height\\)"),
        ({"duration": -1.0}, "duration is -1.0"),
        ({"duration": float("nan")}, "duration is nan"),
        ({"task": "vqa"}, "expected one of tvg"),
        ({"num_temporal": 1}, "2 or more"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_grounding("", **CLIP | wrong)


def _mutated(text: str, chance: random.Random) -> str:
    """The text cut off, with something put in, taken out or doubled, up to four times."""
    pieces = [
        *"{}[]<>:,. \n",
        "<TEMP-",
        "<TEMP-100>",
        "<WIDTH-x>",
        "12:[",
        "Ends in ",
        BOX,
        "<|im_end|>",
        "0.5",
        "\u0663",
    ]
    for _ in range(chance.randint(1, 4)):
        i, j = sorted(chance.randint(0, len(text)) for _ in range(2))
        kind = chance.randrange(4)
        if kind == 0:
            text = text[:j]
        elif kind == 1:
            text = text[:i] + chance.choice(pieces) + text[i:]
        elif kind == 2:
            text = text[:i] + text[min(j, i + 12) :]
        else:
            text = text[:j] + text[i:]
    return text


def _assert_sound(result: GroundingResult, text: str) -> None:
    for span in [*result.spans, *(caption.span for caption in result.captions if caption.span)]:
        assert -EXACT <= span.start <= span.end <= 99 + EXACT
    for box in [*result.boxes, *(box for tube in result.tubes for box in tube.boxes)]:
        assert -EXACT <= box.x1 < box.x2 <= 990 + EXACT and -EXACT <= box.y1 < box.y2 <= 495 + EXACT
    for tube in result.tubes:
        assert len(tube.times) == len(tube.boxes) > 0 and list(tube.times) == sorted(set(tube.times))
    assert all(bad.text and bad.reason for bad in result.malformed)
    assert result.text == text


@pytest.mark.parametrize("task", TASKS)
def test_nothing_a_model_writes_raises_or_gets_lost(task: str) -> None:
    chance = random.Random(42)
    forms = [ANSWERS[task], _canonical(ANSWERS[task]), original_convert(ANSWERS[task])]
    for round_number in range(150):
        text = _mutated(forms[round_number % 3], chance)
        for asked in (task, None):
            _assert_sound(parse_grounding(text, task=asked, **CLIP), text)
        found = read_answer(text, num_temporal=100, num_spatial=100)
        assert all(a.end <= b.start for a, b in itertools.pairwise(found)), text
        for token in re.finditer(r"<(TEMP|WIDTH|HEIGHT)-(OUTPUT)?[0-9.]+>", text):
            assert any(item.start <= token.start() and token.end() <= item.end for item in found), (text, token)


@pytest.mark.parametrize("task", TASKS)
def test_every_truncation(task: str) -> None:
    for length in range(len(ANSWERS[task])):
        text = ANSWERS[task][:length]
        _assert_sound(parse_grounding(text, task=task, **CLIP), text)


TRACK = Tube((20.0, 20.5, 25.0), (Box(1, 2, 30, 40), Box(0, 0, 640, 360), Box(320.5, 100, 400, 180.25)))


# Three digits of a fraction, or half of one of 99 steps, with room for the rounding of a product.
@pytest.mark.parametrize(("role", "error"), [("output", 5.1e-4), ("input", 5.1e-4), ("discrete", 0.5051 / 99 * 1.01)])
def test_what_is_written_is_read(role: str, error: float) -> None:
    clip: dict[str, Any] = {"duration": 10.0, "start": 20.0}
    text = format_span(Span(21.3, 27.77), role=role, **clip) + format_tube(TRACK, size=(640, 360), role=role, **clip)
    result = parse_grounding(text, size=(640, 360), task="stvg", **clip)
    assert result.malformed == ()
    assert _spans(result) == [pytest.approx((21.3, 27.77), abs=10 * error)]
    assert result.tubes[0].times == pytest.approx(TRACK.times, abs=10 * error)
    for box, true in zip(result.tubes[0].boxes, TRACK.boxes, strict=True):
        assert _corners(box) == pytest.approx(_corners(true), abs=640 * error)


def test_written_form() -> None:
    assert format_span(Span(3, 5.12), duration=10) == "{<TEMP-OUTPUT0.300><TEMP-OUTPUT0.512>}"
    assert format_span(Span(0, 10), duration=10, role="discrete", num_temporal=25) == "{<TEMP-000><TEMP-024>}"
    box = format_box(Box(10, 20, 30, 40), size=(100, 100), role="input")
    assert box == "[<WIDTH-INPUT0.100><HEIGHT-INPUT0.200><WIDTH-INPUT0.300><HEIGHT-INPUT0.400>]"
    tube = format_tube(
        Tube((0.0, 1.0), (Box(0, 0, 9, 9),) * 2), size=(9, 9), duration=1, role="discrete", num_spatial=10
    )
    whole = "[<WIDTH-000><HEIGHT-000><WIDTH-009><HEIGHT-009>]"
    assert tube == f"<TEMP-000>:{whole} <TEMP-099>:{whole}"
    assert format_span(Span(2, 2), duration=0, start=2, role="discrete") == "{<TEMP-000><TEMP-000>}"


def test_what_cannot_be_written_is_refused() -> None:
    with pytest.raises(ValueError, match="after its end"):
        format_span(Span(5, 3), duration=10)
    with pytest.raises(ValueError, match=r"11 s is outside the clip, expected 0.0 to 10.0 s"):
        format_span(Span(5, 11), duration=10.0)
    with pytest.raises(ValueError, match="role is 'both'"):
        format_span(Span(5, 7), duration=10, role="both")
    with pytest.raises(ValueError, match="has no area"):
        format_box(Box(5, 5, 5, 9), size=(10, 10))
    with pytest.raises(ValueError, match=r"x2 of .* is outside the frame, expected 0 to 10"):
        format_box(Box(5, 5, 15, 9), size=(10, 10))
    with pytest.raises(ValueError, match="size is None"):
        format_box(Box(5, 5, 9, 9), size=None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="2 times and 1 boxes"):
        format_tube(Tube((0.0, 1.0), (Box(0, 0, 1, 1),)), size=(9, 9), duration=1)
    with pytest.raises(ValueError, match="sort them"):
        format_tube(Tube((1.0, 0.0), (Box(0, 0, 1, 1),) * 2), size=(9, 9), duration=1)


def test_values_are_read_and_never_evaluated() -> None:
    with pytest.raises(ValueError, match="number between 0 and 1"):
        original_separate("<TEMP-INPUT__import__('os').getpid()>", "TEMP-INPUT")
