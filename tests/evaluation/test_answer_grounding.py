"""The grounding evaluation: scores of right, wrong and missing answers, intervals, going on after a stop, command."""

import json

import numpy as np
import pytest

from longvideo.evaluation import answer_grounding
from longvideo.evaluation.answer_grounding import (
    SCORES,
    blind_answer,
    blind_result,
    evaluate,
    format_captions,
    format_table,
    generate_answers,
    main,
    record_answer,
    score_answer,
    summarize,
    summarize_captions,
)
from longvideo.evaluation.corpus import DENSE_TASKS, GROUNDING_TASKS, grounding_items, grounding_row
from longvideo.evaluation.corpus.grounding_rows import write_item
from longvideo.evaluation.metrics import bootstrap_interval, wilson_interval
from longvideo.processing.llava_st.grounding_llava_st import Box, Caption, GroundingResult, Span, Tube
from tests.tiny import tiny_videochat_flash_model, tiny_videochat_flash_processor
from tests.tiny_llava_st import tiny_llava_st_model
from tests.tiny_llava_st_processor import tiny_llava_st_processor

SIZE = (64, 48)
NUM_FRAMES = 6


@pytest.fixture(scope="module")
def model():
    return tiny_llava_st_model()


@pytest.fixture(scope="module")
def processor():
    return tiny_llava_st_processor()


@pytest.fixture(scope="module")
def rows():
    """Two rows of every task."""
    items = grounding_items(2 * len(GROUNDING_TASKS), size=SIZE, num_frames=NUM_FRAMES)
    return [grounding_row(item.scene, one, "a.mp4", size=SIZE) for item in items for one in item.groundings]


def test_true_answers_score_one(rows, processor) -> None:
    assert {row["task"] for row in rows} == set(GROUNDING_TASKS)
    for row in rows:
        record = record_answer(row, row["answer"], processor, NUM_FRAMES)
        assert record["malformed"] == [] and list(record["scores"]) == list(SCORES[row["task"]])
        # Coordinates are written with three digits; the smallest boxes are a fifth of the frame.
        assert min(record["scores"].values()) > 0.98, record
        assert all(0 <= score <= 1 for score in record["blind"].values())


def test_missing_and_broken_answers_score_zero(rows, processor) -> None:
    for row in rows:
        for text in ("", "I do not know.", "{<TEMP-004><TEMP-001>} [<WIDTH-003>", "<TEMP-000>:[<WIDTH-900>]"):
            record = record_answer(row, text, processor, NUM_FRAMES)
            assert set(record["scores"].values()) == {0.0}
    assert record["malformed"]


def test_scores_by_hand() -> None:
    row = {"task": "stvg", "size": [100, 100], "duration": 10.0, "caption": None, "box": None, "span": [2.0, 6.0]}
    row["tube"] = {"times": [2.0, 4.0, 6.0], "boxes": [[0, 0, 10, 10], [20, 20, 30, 30], [0, 0, 10, 10]]}
    half = Box(0, 0, 5, 10)
    # The first time is none of the sampled ones and counts for the nearest; the last one lies outside of the truth.
    found = GroundingResult("", spans=(Span(4.0, 8.0),), tubes=(Tube((2.9, 6.0, 8.0), (half,) * 3),))
    scores = score_answer(row, found, 6)
    assert scores == pytest.approx({"m_tIoU": 2 / 6, "m_sIoU": (0.5 + 0.5) / 3, "m_stIoU": 1.0 / 4})
    rec = {"task": "rec", "caption": None, "tube": None, "box": [0, 0, 10, 10]}
    assert score_answer(rec, GroundingResult("", boxes=(half,)), 6) == {"mIoU": 0.5, "P@0.5": 1.0}
    tvg = {"task": "tvg", "caption": None, "tube": None, "span": [0.0, 4.0]}
    assert score_answer(tvg, GroundingResult("", spans=(Span(0.0, 2.0),)), 6) == {"mIoU": 0.5, "R@0.5": 0.0}


def test_descriptions_with_boxes_and_times(processor) -> None:
    """What is left out and what is made up count as zero."""
    items = grounding_items(8, tasks=DENSE_TASKS, size=SIZE, num_frames=NUM_FRAMES)
    dense = [grounding_row(item.scene, one, "a.mp4", size=SIZE) for item in items for one in item.groundings]
    assert sorted(row["task"] for row in dense) == ["dgc"] * 4 + ["dvc"] * 4
    for row in dense:
        record = record_answer(row, row["answer"], processor, NUM_FRAMES)
        assert record["malformed"] == [] and list(record["scores"]) == list(SCORES[row["task"]])
        # Three digits of a fraction; a movement of a sixth of the video is the shortest event.
        assert min(record["scores"].values()) > 0.98, record
        assert set(record_answer(row, "I do not know.", processor, NUM_FRAMES)["scores"].values()) == {0.0}
        assert set(record["blind"].values()) == {0.0}, "no words, no pairs"
    parts = [{"caption": words, "span": [0.0, 4.0], "box": None} for words in ("a", "b")]
    row = {"task": "dvc", "caption": None, "tube": None, "parts": parts}
    said = (Caption("a.", span=Span(0.0, 2.0)), Caption("c", span=Span(0.0, 4.0)))
    assert score_answer(row, GroundingResult("", captions=said), 6) == {"m_tIoU": 0.5 / 3, "match": 0.0}
    assert score_answer(row, GroundingResult("", captions=(*said[:1], Caption("b", span=Span(0, 4)))), 6) == {
        "m_tIoU": 0.75,
        "match": 1.0,
    }


def test_blind_answers_use_what_the_question_tells(rows) -> None:
    (start, end), box = blind_answer()
    assert 0.1 < start < 0.5 < end < 0.9 and 0.2 < box[0] < 0.45 and 0.55 < box[2] < 0.8
    for row in rows:
        found = blind_result(row, NUM_FRAMES)
        if row["task"] in ("rec", "reg"):
            assert found.spans == () and found.boxes[0].x2 == pytest.approx(box[2] * 64)
            continue
        told = {"svg": row["span"], "elc": [row["span"][0]]}.get(row["task"], [start * row["duration"]])
        assert [found.spans[0].start, found.spans[0].end][: len(told)] == pytest.approx(told)
        assert all(found.spans[0].start <= time <= found.spans[0].end for time in found.tubes[0].times)


def test_bootstrap_interval() -> None:
    scores = np.random.default_rng(1).random(400)
    low, high = bootstrap_interval(scores)
    # The normal interval of a mean: 1.96 standard errors; the bootstrap agrees within a tenth of that.
    half = 1.96 * scores.std() / 20
    assert (low, high) == pytest.approx((scores.mean() - half, scores.mean() + half), abs=0.1 * half)
    assert bootstrap_interval(scores) == (low, high)
    assert bootstrap_interval([0.25] * 5) == (0.25, 0.25)
    with pytest.raises(ValueError, match="no scores"):
        bootstrap_interval([])
    with pytest.raises(ValueError, match="confidence is 1"):
        bootstrap_interval([0.5], confidence=1)


def record(task: str, value: float, *, malformed: bool = False) -> dict:
    scores = dict.fromkeys(SCORES[task], value)
    return {"task": task, "malformed": ["reason"] * malformed, "scores": scores, "blind": dict.fromkeys(scores, 0.25)}


def test_summary_and_table() -> None:
    records = [record("rec", 1.0)] * 3 + [record("rec", 0.0, malformed=True)] + [record("tvg", 0.5)] * 2
    summary = summarize(records)
    assert list(summary) == ["rec", "tvg"] and summary["rec"]["num"] == 4 and summary["rec"]["malformed"] == 1
    assert summary["rec"]["P@0.5"]["interval_95"] == list(wilson_interval(3, 4))
    assert summary["rec"]["mIoU"]["interval_95"] == list(bootstrap_interval([1.0, 1.0, 1.0, 0.0]))
    assert summary["tvg"]["mIoU"] == {"value": 0.5, "interval_95": [0.5, 0.5], "blind": 0.25}
    lines = format_table(summary).splitlines()
    assert lines[1].split()[:4] == ["rec", "4", "mIoU", "0.750"] and lines[1].split()[-2:] == ["0.250", "1"]
    assert len(lines) == 5


def test_words_are_scored_as_captions(rows, processor, monkeypatch) -> None:
    given = {}

    def score(said: list[str], truths: list[str]) -> dict[str, float]:
        given[truths[0]] = (said, truths)
        return {"METEOR": 0.25, "CIDEr": 1.5}

    monkeypatch.setattr(answer_grounding, "caption_scores", score)
    answers = [row["answer"] if row["task"] != "tr" else "A dog." for row in rows]
    records = [record_answer(row, text, processor, NUM_FRAMES) for row, text in zip(rows, answers, strict=True)]
    captions = summarize_captions(records)
    assert list(captions) == ["reg", "tr", "elc"]
    for task in captions:
        truths = [row["caption"] for row in rows if row["task"] == task]
        assert given[truths[0]] == (["A dog"] * 2 if task == "tr" else truths, truths)
    assert format_captions(captions).splitlines()[2] == "elc   captions: METEOR 0.250, CIDEr 1.500"
    assert summarize_captions(record for record in records if record["task"] == "rec") == {}
    assert format_captions({}) == ""


def test_missing_caption_library_is_said(rows, processor, monkeypatch) -> None:
    def score(said: list[str], truths: list[str]) -> dict[str, float]:
        raise ImportError("caption metrics need pycocoevalcap")

    monkeypatch.setattr(answer_grounding, "caption_scores", score)
    records = [record_answer(row, row["answer"], processor, NUM_FRAMES) for row in rows if row["task"] == "elc"]
    captions = summarize_captions(records)
    assert captions == {"missing": "caption metrics need pycocoevalcap"}
    assert format_captions(captions) == "captions: exact matches only, caption metrics need pycocoevalcap"


def test_answers_of_a_batch_are_those_alone(model, processor, tmp_path) -> None:
    items = grounding_items(6, tasks=("tvg", "stvg"), size=SIZE, num_frames=NUM_FRAMES)
    rows = [row for item in items for row in write_item(item, tmp_path, size=SIZE)][:3]
    assert len({len(row["question"]) for row in rows}) > 1
    together = generate_answers(model, processor, rows, tmp_path)
    assert together == [generate_answers(model, processor, [row], tmp_path)[0] for row in rows]
    assert all(together)


def test_evaluation_is_complete_and_goes_on(model, processor, monkeypatch) -> None:
    asked = []

    def answer(model, processor, rows, folder):
        asked.extend(row["id"] for row in rows)
        assert all((folder / row["messages"][0]["content"][0]["path"]).exists() for row in rows)
        assert len({row["messages"][0]["content"][0]["type"] for row in rows}) == 1
        return [row["answer"] for row in rows]

    monkeypatch.setattr(answer_grounding, "generate_answers", answer)
    kept: list[list] = []
    records = evaluate(model, processor, 14, size=32, keep=lambda found: kept.append(list(found)))
    assert len(records) == len({one["id"] for one in records}) == 14
    assert sorted(asked) == sorted(one["id"] for one in records)
    assert kept[-1] == records and [len(found) for found in kept] == sorted(len(found) for found in kept)
    assert {one["task"] for one in records} == set(GROUNDING_TASKS)
    first = kept[0]
    asked.clear()
    assert evaluate(model, processor, 14, size=32, known=first) == records
    assert sorted(asked) == sorted({one["id"] for one in records} - {one["id"] for one in first})


def test_models_without_coordinates_are_refused() -> None:
    with pytest.raises(ValueError, match="VideoChatFlashProcessor has no coordinate tokens"):
        evaluate(tiny_videochat_flash_model(), tiny_videochat_flash_processor(), 1)


def test_command(model, processor, tmp_path, capsys) -> None:
    for part in (model, processor):
        part.save_pretrained(tmp_path / "model")
    out = tmp_path / "reports" / "scores.json"
    arguments = ["--model", str(tmp_path / "model"), "--num", "2", "--tasks", "rec", "tvg", "--size", "32"]
    assert main([*arguments, "--json", str(out)]) == 0
    table = capsys.readouterr().out
    written = json.loads(out.read_text())
    assert [line.split()[0] for line in table.splitlines()[1:5]] == ["rec", "rec", "tvg", "tvg"]
    assert written["summary"]["rec"]["num"] == 1 and len(written["answers"]) == 2 and written["captions"] == {}
    assert [path.name for path in out.parent.iterdir()] == ["scores.json"]
    assert main([*arguments, "--json", str(out)]) == 0
    assert capsys.readouterr().out.splitlines()[:6] == table.splitlines()[:6]
    assert main([*arguments[:-1], "64", "--json", str(out)]) == 2
    assert "holds no answers with these settings" in capsys.readouterr().err
    assert main(["--model", str(tmp_path / "absent")]) == 2
    assert "error:" in capsys.readouterr().err
