"""Scores of spans, boxes, tubes and captions, and of whole result files, against values worked out by hand."""

import builtins
import shutil
import sys
import types
from typing import Any

import pytest

from longvideo.evaluation.grounding_records import original_table, score_records
from longvideo.evaluation.metrics import (
    box_iou,
    caption_scores,
    mean_score,
    recall_at,
    score_boxes,
    score_spans,
    score_tubes,
    temporal_iou,
    tube_iou,
)

# Sums and quotients of a few doubles.
EXACT = 1e-12
HALF = (0, 0, 2, 1)
WHOLE = (0, 0, 2, 2)
FAR = (5, 5, 6, 6)


@pytest.mark.parametrize(
    ("first", "second", "strict", "original"),
    [
        ((0.1, 0.5), (0.2, 0.6), 0.6, 0.6),
        ((0, 1), (0, 1), 1, 1),
        ((0, 1), (3, 4), 0, 0),
        ((0, 0), (0, 4), 0, 0),
        # A reversed span: the hull of the scripts is 4 - 1, strictly it is no answer.
        ((3, 2), (1, 4), 0, 0),
        ((2, 2), (2, 2), 0, None),
    ],
)
def test_temporal_iou(first: tuple, second: tuple, strict: float, original: float | None) -> None:
    assert temporal_iou(first, second) == pytest.approx(strict, abs=EXACT)
    assert temporal_iou(second, first) == pytest.approx(strict, abs=EXACT)
    if original is None:
        with pytest.raises(ValueError, match="have no length"):
            temporal_iou(first, second, mode="original")
    else:
        assert temporal_iou(first, second, mode="original") == pytest.approx(original, abs=EXACT)


def test_box_iou() -> None:
    assert box_iou(HALF, WHOLE) == box_iou(HALF, WHOLE, mode="original") == 0.5
    assert box_iou(FAR, WHOLE) == 0 and box_iou((1, 1, 1, 1), (1, 1, 1, 1)) == 0
    # One side reversed: the areas 4 and -4 make no union, which the script calls 0 as well.
    assert box_iou((0, 0, 2, 2), (2, 0, 0, 2)) == 0 == box_iou((0, 0, 2, 2), (2, 0, 0, 2), mode="original")
    with pytest.raises(ValueError, match="3 numbers, expected 4"):
        box_iou((1, 2, 3), WHOLE)
    with pytest.raises(ValueError, match="mode is 'loose'"):
        box_iou(WHOLE, WHOLE, mode="loose")


def test_tube_iou_strictly_and_as_released() -> None:
    truth = {1: WHOLE, 2: WHOLE, 3: WHOLE, 4: WHOLE}
    said = {2: WHOLE, 3: HALF, 9: WHOLE}
    # Overlaps 1 and 0.5; four true times, two common ones, five together.
    assert tube_iou(said, truth) == pytest.approx((1.5 / 4, 1.5 / 5), abs=EXACT)
    assert tube_iou(said, truth, mode="original") == pytest.approx((1.5 / 2, 1.5 / 5), abs=EXACT)
    assert tube_iou({2: WHOLE}, truth, mode="original")[0] == 1, "one good frame is enough for the scripts"
    assert tube_iou({}, truth) == (0, 0) and tube_iou({}, {}, mode="original") == (0, 0)
    with pytest.raises(ValueError, match="true tube is empty"):
        tube_iou(said, {})


def test_recall_counts_the_threshold_or_not() -> None:
    scores = [0.5, 0.7, 0.1, 0.0]
    assert recall_at(scores, 0.5) == 0.25 and recall_at(scores, 0.5, inclusive=True) == 0.5
    assert mean_score(scores) == pytest.approx(0.325, abs=EXACT)
    with pytest.raises(ValueError, match="no scores"):
        recall_at([], 0.5)


def test_spans_without_an_answer_count_as_zero() -> None:
    scores = score_spans([(0, 10), None, (5, 10)], [(0, 10), (0, 10), (0, 10)])
    assert scores == pytest.approx({"miou": 0.5, "r1@0.3": 2 / 3, "r1@0.5": 1 / 3, "r1@0.7": 1 / 3}, abs=EXACT)
    assert score_spans([[0, 0]], [(0, 0)], mode="original")["miou"] == 0
    with pytest.raises(ValueError, match="1 predictions for 2 truths"):
        score_spans([None], [(0, 1), (0, 1)])
    with pytest.raises(ValueError, match="no samples"):
        score_spans([], [])


def test_boxes_without_an_answer_count_as_zero_or_are_left_out() -> None:
    said, truths = [HALF, None, FAR], [WHOLE, WHOLE, WHOLE]
    assert score_boxes(said, truths) == pytest.approx({"miou": 0.5 / 3, "precision@0.5": 1 / 3}, abs=EXACT)
    released = score_boxes(said, truths, mode="original")
    assert released == pytest.approx({"miou": 0.25, "precision@0.5": 0.5}, abs=EXACT)
    assert score_boxes([None], [WHOLE], mode="original") == score_boxes([], [], mode="original")
    with pytest.raises(ValueError, match="no samples"):
        score_boxes([], [])


def test_tubes_of_many_samples() -> None:
    truths = [{1: WHOLE, 2: WHOLE}] * 2
    scores = score_tubes([{1: WHOLE}, {}], truths, spans=[(0, 3), None], true_spans=[(0, 10), (0, 10)])
    assert (scores["m_tiou"], scores["m_siou"], scores["m_stiou"]) == pytest.approx((0.15, 0.25, 0.25), abs=EXACT)
    # 0.3 and 0.5 are reached exactly, which counts.
    assert (scores["tiou@0.3"], scores["siou@0.5"], scores["stiou@0.7"]) == (0.5, 0.5, 0)
    assert "m_tiou" not in score_tubes([{}, {}], truths)
    with pytest.raises(ValueError, match="belong together"):
        score_tubes([{}, {}], truths, spans=[None, None])


def _stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """A library of the same shape, whose scores are lengths of what it was given."""

    class Tokenizer:
        def tokenize(self, captions: dict) -> dict:
            return {key: [row["caption"].lower() for row in rows] for key, rows in captions.items()}

    class Scorer:
        def __init__(self, count: int = 0) -> None:
            self.count = count

        def compute_score(self, truths: dict, said: dict) -> tuple[Any, list]:
            print("a table that nobody asked for")
            score = sum(truths[key] == said[key] for key in truths) / len(truths)
            return ([score / n for n in range(1, self.count + 1)] if self.count else score), []

    for path, name, made in (
        ("bleu.bleu", "Bleu", Scorer),
        ("cider.cider", "Cider", Scorer),
        ("meteor.meteor", "Meteor", Scorer),
        ("rouge.rouge", "Rouge", Scorer),
        ("tokenizer.ptbtokenizer", "PTBTokenizer", Tokenizer),
    ):
        module = types.ModuleType(f"pycocoevalcap.{path}")
        setattr(module, name, made)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        for parent in ("pycocoevalcap", f"pycocoevalcap.{path.split('.')[0]}"):
            monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")


def test_captions_through_the_library(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    _stand_in(monkeypatch)
    scores = caption_scores(["A dog", "a cat"], ["a dog", "a bird"])
    assert scores["Bleu_1"] == scores["METEOR"] == scores["ROUGE_L"] == scores["CIDEr"] == 0.5
    assert scores["Bleu_4"] == 0.125 and capsys.readouterr().out == ""
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match="need Java"):
        caption_scores(["a"], ["a"])
    with pytest.raises(ValueError, match="1 predictions for 2 truths"):
        caption_scores(["a"], ["a", "b"])


def test_a_missing_caption_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    load = builtins.__import__

    def absent(name: str, *rest: Any) -> Any:
        if name.startswith("pycocoevalcap"):
            raise ModuleNotFoundError(f"No module named {name!r}")
        return load(name, *rest)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(ImportError, match=r"longvideo\[captions\]"):
        caption_scores(["a"], ["a"])


def test_captions_of_the_real_library() -> None:
    pytest.importorskip("pycocoevalcap", reason="caption metrics need pycocoevalcap (extra 'captions')")
    if shutil.which("java") is None:
        pytest.skip("caption metrics need Java")
    scores = caption_scores(["a red ball rolls to the left", "it stops"], ["a red ball rolls to the left", "it stops"])
    # The library adds 1e-9 and the like to its counts.
    assert scores["Bleu_1"] == pytest.approx(1, abs=1e-6) and scores["ROUGE_L"] == pytest.approx(1, abs=1e-6)


BOX = "[<WIDTH-000><HEIGHT-000><WIDTH-050><HEIGHT-050>]"
ST = {"split": [100, 199], "width": 99, "height": 99}


def test_records_of_boxes_and_spans() -> None:
    boxes = [
        {"gt_bbox": [0, 0, 50 / 99, 50 / 99], "outputs": BOX, "converted_outputs": "[0.0,0.0,0.50505,0.50505]"},
        {"gt_bbox": [0, 0, 1, 1], "outputs": "sorry", "converted_outputs": "sorry"},
    ]
    assert score_records(boxes, "rec")["miou"] == pytest.approx(1, abs=1e-4)  # five digits in the converted text
    assert score_records(boxes, "rec", mode="strict") == pytest.approx({"miou": 0.5, "precision@0.5": 0.5}, abs=EXACT)
    assert original_table(score_records(boxes, "rec"), "rec")[1] == 100
    spans = [
        {"gt": [0.1, 0.5], "converted_outputs": "from {0.1,0.5}"},
        {"gt": [0, 1], "converted_outputs": "{0.9,0.1}"},
    ]
    assert score_records(spans, "tvg", mode="strict")["miou"] == pytest.approx(0.5, abs=EXACT)
    assert original_table(score_records(spans, "tvg"), "tvg") == pytest.approx((0.5, 50, 50, 50), abs=EXACT)


def test_records_of_tubes() -> None:
    tube = f"<TEMP-010>:{BOX} <TEMP-011>:{BOX}"
    truth = {"tvg": [110, 114], "svg": {str(frame): [0, 0, 50, 50] for frame in range(110, 114)}}
    good = {**ST, "gt": truth, "outputs": f"{{<TEMP-010><TEMP-014>}} {tube}", "converted_outputs": "{0.10101,0.14141}"}
    released, strict = score_records([good], "stvg"), score_records([good], "stvg", mode="strict")
    assert released["m_siou"] == 1 and strict["m_siou"] == pytest.approx(0.5, abs=EXACT)
    assert strict["m_tiou"] == pytest.approx(1, abs=EXACT) and strict["m_stiou"] == released["m_stiou"]
    assert "m_tiou" not in score_records([good], "svg", mode="strict")
    assert original_table(score_records([good], "svg"), "svg")["mtiou"] == 0
    # The end alone: a failure for the scripts, an answer to the question that named the start.
    late = f"<TEMP-012>:{BOX}"
    ends = {**good, "outputs": f"Ends in <TEMP-014>, it rolls. {late}", "converted_outputs": "Ends in 0.14141,, it"}
    assert score_records([ends], "elc", captions=False)["m_tiou"] == 0
    assert score_records([ends], "elc", mode="strict", captions=False)["m_tiou"] == pytest.approx(1, abs=EXACT)


def test_the_scripts_round_halves_to_even_frames_of_the_video() -> None:
    # Frame 1 + 0.5: the sum rounds to 2, while 1 + round(0.5) would be 1.
    row = {**ST, "split": [1, 2], "gt": {"svg": {"2": [0, 0, 50, 50]}}, "outputs": f"<TEMP-001>:{BOX}"}
    assert score_records([{**row, "converted_outputs": ""}], "svg", num_frames=3)["m_siou"] == 1


def test_what_ends_the_scripts_is_named() -> None:
    stray = {**ST, "gt": {"tvg": [100, 110], "svg": {}}, "outputs": f"<TEMP-150>:{BOX}", "converted_outputs": ""}
    with pytest.raises(ValueError, match="record 0: frame 250 is not among the 100 sampled"):
        score_records([stray], "stvg")
    still = {**stray, "split": [100, 100], "outputs": ""}
    with pytest.raises(ValueError, match="its split is one frame"):
        score_records([still], "elc")
    # Strictly, the stray box is a failure like any other.
    found = {**stray, "gt": {"tvg": [100, 110], "svg": {"100": [0, 0, 5, 5]}}}
    assert score_records([found], "stvg", mode="strict")["m_stiou"] == 0
    with pytest.raises(ValueError, match="task is 'bad', expected one of rec"):
        score_records([stray], "bad")
    with pytest.raises(ValueError, match="mode is 'loose'"):
        score_records([stray], "svg", mode="loose")


def test_captions_of_records(monkeypatch: pytest.MonkeyPatch) -> None:
    _stand_in(monkeypatch)
    row = {**ST, "gt": {"tvg": [100, 110], "svg": {"100": [0, 0, 5, 5]}, "caption": "a child, in red, rides"}}
    row |= {"outputs": "Ends in <TEMP-010>, a child, in red, rides. Boxes", "converted_outputs": ""}
    # The scripts keep what is behind the last comma.
    assert score_records([row], "elc")["captions"]["METEOR"] == 0
    table = original_table(score_records([{**row, "gt": {**row["gt"], "caption": " rides"}}], "elc"), "elc")
    assert table["caption_score"]["Bleu_2"] == [1, 0.5] and table["caption_score"]["CIDEr"] == 1
    strict = score_records([{**row, "outputs": row["outputs"].replace(". Boxes", ".")}], "elc", mode="strict")
    assert strict["captions"]["METEOR"] == 1
