"""Metrics of parsed answers: pure functions of plain numbers and strings.

A span is (start, end), a box (x1, y1, x2, y2), a tube a mapping from time to box; prediction and truth of a sample are
in the same units. All scores are numbers in 0 to 1. Where a function has a `mode`, "strict" counts every failure as
zero and divides by the true union, and "original" is the arithmetic of the scripts released with LLaVA-ST
(inference/src/{utils,metrics}.py of the repository appletea233/LLaVA-ST), so that its tables can be compared.
"""

import contextlib
import io
import math
import shutil
from collections.abc import Hashable, Mapping, Sequence
from statistics import NormalDist

import numpy as np

SpanLike = Sequence[float]
BoxLike = Sequence[float]
TubeLike = Mapping[Hashable, BoxLike]
MODES = ("strict", "original")
THRESHOLDS = (0.3, 0.5, 0.7)


def accuracy(correct: Sequence[bool]) -> float:
    """Part of the answers that are right.

    Args:
        correct: one truth value for each answer.

    Returns:
        Number in 0 to 1.

    Raises:
        ValueError: no answers.
    """
    if not len(correct):
        raise ValueError("accuracy of no answers is not defined: pass at least one")
    return sum(bool(value) for value in correct) / len(correct)


def wilson_interval(num_correct: int, num_total: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """Score interval of a proportion, which stays inside 0 to 1 and is not degenerate at 0 or all right.

    Args:
        num_correct: successes.
        num_total: trials, at least 1.
        confidence: two-sided coverage, between 0 and 1.

    Returns:
        Lower and upper end.

    Raises:
        ValueError: no trials, successes outside 0 to num_total, or a confidence outside (0, 1).

    Source: E. B. Wilson, Probable inference, the law of succession, and statistical inference, JASA 22 (1927).
    """
    if num_total < 1 or not 0 <= num_correct <= num_total:
        raise ValueError(f"{num_correct} right of {num_total}: expected 0 <= right <= total and total >= 1")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}, expected a number between 0 and 1")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share = num_correct / num_total
    scale = 1 + z**2 / num_total
    centre = (share + z**2 / (2 * num_total)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / num_total + z**2 / (4 * num_total**2))
    return max(centre - half, 0.0), min(centre + half, 1.0)


def bootstrap_interval(
    scores: Sequence[float], *, confidence: float = 0.95, num_resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of a mean, from means of samples drawn with repetition.

    Args:
        scores: one for each independent sample.
        confidence: two-sided coverage, between 0 and 1.
        num_resamples: how often to draw.
        seed: of the draws; the same scores give the same interval.

    Returns:
        Lower and upper end.

    Raises:
        ValueError: no scores, or a confidence outside (0, 1).

    Source: B. Efron, Bootstrap methods: another look at the jackknife, Ann. Statist. 7 (1979).
    """
    if not len(scores):
        raise ValueError("the interval of no scores is not defined: pass at least one")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}, expected a number between 0 and 1")
    values = np.asarray(scores, dtype=np.float64)
    draws = np.random.default_rng(seed).integers(len(values), size=(num_resamples, len(values)))
    low, high = np.quantile(values[draws].mean(axis=1), [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def temporal_iou(first: SpanLike, second: SpanLike, *, mode: str = "strict") -> float:
    """Overlap of two spans.

    Args:
        first: (start, end).
        second: (start, end), in the same unit.
        mode: "strict" divides by the union, and a span that is reversed or has no length overlaps nothing; "original"
            divides by the hull, whatever the order of the ends.

    Returns:
        Number in 0 to 1.

    Raises:
        ValueError: an unknown mode, not two numbers each, or in the original mode a hull without length.

    Source: inference/src/utils.py, temporal_iou.
    Differs: the script raises ZeroDivisionError for a hull without length.
    """
    _check_mode(mode)
    (start, end), (other_start, other_end) = _numbers(first, 2), _numbers(second, 2)
    common = max(min(end, other_end) - max(start, other_start), 0)
    if mode == "original":
        hull = max(end, other_end) - min(start, other_start)
        if hull == 0:
            raise ValueError(
                f"spans {first} and {second} have no length: their overlap is not defined, use mode='strict'"
            )
        return max(0, common / hull)
    if end <= start or other_end <= other_start:
        return 0.0
    return common / (end - start + other_end - other_start - common)


def box_iou(first: BoxLike, second: BoxLike, *, mode: str = "strict") -> float:
    """Overlap of two boxes.

    Args:
        first: (x1, y1, x2, y2).
        second: (x1, y1, x2, y2), in the same unit.
        mode: "strict" gives 0 for a box that is reversed or has no area; "original" uses its signed area.

    Returns:
        Number in 0 to 1; in the original mode reversed boxes can lead outside.

    Raises:
        ValueError: an unknown mode, or not four numbers each.

    Source: inference/src/utils.py, iou.
    """
    _check_mode(mode)
    a, b = _numbers(first, 4), _numbers(second, 4)
    if mode == "strict" and (a[2] <= a[0] or a[3] <= a[1] or b[2] <= b[0] or b[3] <= b[1]):
        return 0.0
    common = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - common
    return common / union if union != 0 else 0.0


def tube_iou(prediction: TubeLike, truth: TubeLike, *, mode: str = "strict") -> tuple[float, float]:
    """Spatial and spatio-temporal overlap of two tubes over the times they are sampled at.

    Args:
        prediction: Time -> box. Times are compared for equality: use frame numbers, or times rounded alike.
        truth: Time -> box.
        mode: "strict" divides the spatial sum by the times of the truth, so that a time that is left out counts as
            zero; "original" by the times that both have, so that one good frame gives a high score.

    Returns:
        sIoU, and stIoU (the scripts print it as viou): the same sum over the times that either has.

    Raises:
        ValueError: an unknown mode, a box that is not four numbers, or in the strict mode an empty truth.

    Source: inference/src/metrics.py, eval_stvg.
    """
    _check_mode(mode)
    if mode == "strict" and not truth:
        raise ValueError("the true tube is empty: pass at least one time with its box")
    common = [time for time in truth if time in prediction]
    total = math.fsum(box_iou(truth[time], prediction[time], mode=mode) for time in common)
    spatial = len(truth) if mode == "strict" else max(len(common), 1)
    return total / spatial, total / max(len(truth) + len(prediction) - len(common), 1)


def mean_score(scores: Sequence[float]) -> float:
    """Mean of the samples' scores: mIoU, m_tIoU, m_sIoU or m_stIoU, by what they are.

    Raises:
        ValueError: no scores.
    """
    if not len(scores):
        raise ValueError("the mean of no scores is not defined: pass at least one")
    return math.fsum(scores) / len(scores)


def recall_at(scores: Sequence[float], threshold: float, *, inclusive: bool = False) -> float:
    """Part of the samples whose overlap reaches a threshold: R@1, precision at 0.5, tIoU@x.

    Args:
        scores: one overlap for each sample, 0 for a sample without an answer.
        threshold: overlap to reach, in 0 to 1.
        inclusive: whether a score equal to the threshold counts (">=" instead of ">").

    Returns:
        Number in 0 to 1.

    Raises:
        ValueError: no scores.
    """
    return mean_score([score >= threshold if inclusive else score > threshold for score in scores])


def score_spans(
    predictions: Sequence[SpanLike | None], truths: Sequence[SpanLike], *, mode: str = "strict"
) -> dict[str, float]:
    """Temporal grounding of many samples.

    Args:
        predictions: (start, end) or None where the answer had none; in the original mode (0, 0) means none too.
        truths: (start, end) of the same samples.
        mode: see `temporal_iou`.

    Returns:
        `miou` and `r1@0.3`, `r1@0.5`, `r1@0.7` (strictly above the threshold), over all samples.

    Raises:
        ValueError: no samples, or not as many predictions as truths.

    Source: inference/src/metrics.py, eval_tvg.
    """
    _check_pairs(predictions, truths)
    scores = [
        0.0 if span is None or (mode == "original" and list(span) == [0, 0]) else temporal_iou(span, truth, mode=mode)
        for span, truth in zip(predictions, truths, strict=True)
    ]
    return {"miou": mean_score(scores), **{f"r1@{at}": recall_at(scores, at) for at in THRESHOLDS}}


def score_boxes(
    predictions: Sequence[BoxLike | None], truths: Sequence[BoxLike], *, mode: str = "strict"
) -> dict[str, float]:
    """Referring expression comprehension of many samples.

    Args:
        predictions: (x1, y1, x2, y2) or None where the answer had none.
        truths: (x1, y1, x2, y2) of the same samples.
        mode: "strict" divides by all samples; "original" leaves those without a box out, which flatters, and gives 0
            where none is left.

    Returns:
        `miou` and `precision@0.5` (0.5 itself counts).

    Raises:
        ValueError: not as many predictions as truths, or in the strict mode no samples.

    Source: inference/src/metrics.py, eval_rec.
    """
    _check_mode(mode)
    if len(predictions) or mode == "strict":
        _check_pairs(predictions, truths)
    scores = [
        0.0 if box is None else box_iou(truth, box, mode=mode)
        for box, truth in zip(predictions, truths, strict=True)
        if box is not None or mode == "strict"
    ]
    scores = scores or [0.0]
    return {"miou": mean_score(scores), "precision@0.5": recall_at(scores, 0.5, inclusive=True)}


def score_tubes(
    predictions: Sequence[TubeLike],
    truths: Sequence[TubeLike],
    *,
    spans: Sequence[SpanLike | None] | None = None,
    true_spans: Sequence[SpanLike] | None = None,
    mode: str = "strict",
) -> dict[str, float]:
    """Spatio-temporal grounding of many samples.

    Args:
        predictions: Time -> box of each sample, empty where the answer had none.
        truths: Time -> box of the same samples.
        spans: (start, end) or None of each sample; without spans the temporal scores are left out.
        true_spans: (start, end) of the same samples.
        mode: see `temporal_iou` and `tube_iou`.

    Returns:
        `m_tiou`, `m_siou`, `m_stiou` and each of `tiou`, `siou`, `stiou` at 0.3, 0.5 and 0.7 as `tiou@0.3` (a score
        equal to the threshold counts).

    Raises:
        ValueError: no samples, not as many predictions as truths, spans without true spans, or what `tube_iou` and
            `temporal_iou` raise.

    Source: inference/src/metrics.py, eval_stvg; the paper's m_tIoU, m_sIoU and their @ columns.
    """
    _check_pairs(predictions, truths)
    if (spans is None) != (true_spans is None):
        raise ValueError("spans and true_spans belong together: pass both or neither")
    scores: dict[str, list[float]] = {}
    if spans is not None and true_spans is not None:
        _check_pairs(spans, true_spans)
        _check_pairs(spans, truths)
        # The scripts take a missing span for (0, 0) and go on.
        missing = (0.0, 0.0)
        scores["tiou"] = [
            temporal_iou(true, missing if span is None else span, mode=mode)
            for span, true in zip(spans, true_spans, strict=True)
        ]
    both = [tube_iou(tube, truth, mode=mode) for tube, truth in zip(predictions, truths, strict=True)]
    scores |= {"siou": [spatial for spatial, _ in both], "stiou": [volume for _, volume in both]}
    result = {f"m_{name}": mean_score(values) for name, values in scores.items()}
    for name, values in scores.items():
        result |= {f"{name}@{at}": recall_at(values, at, inclusive=True) for at in THRESHOLDS}
    return result


def caption_scores(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Caption metrics of the COCO caption evaluation, one reference for each caption.

    Args:
        predictions: Captions, "" where the answer had none.
        references: True captions of the same samples.

    Returns:
        `Bleu_1` to `Bleu_4`, `METEOR`, `ROUGE_L` and `CIDEr` over all samples; CIDEr needs several samples to be other
        than 0.

    Raises:
        ValueError: no samples, or not as many predictions as references.
        ImportError: pycocoevalcap is not installed.
        RuntimeError: Java, which its tokenizer and METEOR run on, is not installed.

    Source: pycocoevalcap 1.2, the library of inference/src/metrics.py.
    """
    _check_pairs(predictions, references)
    try:
        from pycocoevalcap.bleu.bleu import Bleu
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.meteor.meteor import Meteor
        from pycocoevalcap.rouge.rouge import Rouge
        from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer
    except ImportError as error:
        raise ImportError(
            "caption metrics need pycocoevalcap, which is not installed: pip install 'longvideo[captions]'"
        ) from error
    if shutil.which("java") is None:
        raise RuntimeError("caption metrics need Java on the PATH (pycocoevalcap's tokenizer and METEOR run on it)")
    # The scorers print their counts.
    with contextlib.redirect_stdout(io.StringIO()):
        tokenizer = PTBTokenizer()
        true = tokenizer.tokenize({i: [{"caption": text}] for i, text in enumerate(references)})
        said = tokenizer.tokenize({i: [{"caption": text}] for i, text in enumerate(predictions)})
        bleu, _ = Bleu(4).compute_score(true, said)
        scorers = {"METEOR": Meteor(), "ROUGE_L": Rouge(), "CIDEr": Cider()}
        others = {name: float(scorer.compute_score(true, said)[0]) for name, scorer in scorers.items()}
    return {**{f"Bleu_{n}": float(value) for n, value in enumerate(bleu, start=1)}, **others}


def _check_mode(mode: str) -> None:
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}, expected one of {', '.join(MODES)}")


def _check_pairs(predictions: Sequence[object], truths: Sequence[object]) -> None:
    if len(predictions) != len(truths):
        raise ValueError(f"{len(predictions)} predictions for {len(truths)} truths: pass one for each sample")
    if not len(truths):
        raise ValueError("scores of no samples are not defined: pass at least one")


def _numbers(values: Sequence[float], count: int) -> Sequence[float]:
    if len(values) != count:
        raise ValueError(f"{list(values)} has {len(values)} numbers, expected {count}")
    return values
