"""Scores of LLaVA-ST's result files: one record for each answer, as its inference scripts write them.

A record of "rec" has `gt_bbox` and one of "tvg" has `gt`, both in fractions; those of "stvg", "svg" and "elc" have
`split` (first and last frame), `width`, `height` and `gt` {`tvg`: [first, last frame], `svg`: {frame: pixel box},
`caption`}. All have `outputs` (as generated) or `converted_outputs` or both.

The mode "original" gives the tables of the released scripts with their parsers and quirks; "strict" reads the answers
with `parse_grounding`, counts what is missing or wrong as zero, and divides by the true union.

Source: inference/src/metrics.py of the repository appletea233/LLaVA-ST. `Differs:` where the scripts end with an
AssertionError, a ZeroDivisionError or an UnboundLocalError, the original mode raises a ValueError with the reason.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from longvideo.evaluation.metrics import MODES, caption_scores, score_boxes, score_spans, score_tubes
from longvideo.processing.llava_st.grounding_llava_st import GroundingResult, parse_grounding
from longvideo.processing.llava_st.original_answers_llava_st import (
    original_box,
    original_caption,
    original_convert,
    original_pairs,
    original_span,
)

TASKS = ("rec", "tvg", "stvg", "svg", "elc")
Record = Mapping[str, Any]
# The scripts divide spatial tokens by 99 whatever the number of frames.
_LAST_SPATIAL = 99


def score_records(
    records: Sequence[Record],
    task: str,
    *,
    mode: str = "original",
    num_frames: int = 100,
    num_temporal: int | None = None,
    num_spatial: int = 100,
    captions: bool = True,
) -> dict[str, Any]:
    """Score the records of a result file.

    Args:
        records: Records of one task.
        task: One of TASKS.
        mode: "original" or "strict".
        num_frames: Frames that were sampled from each split.
        num_temporal: Temporal tokens of the model, `num_frames` by default; used by the strict mode.
        num_spatial: Spatial tokens of the model on each axis; used by the strict mode.
        captions: Whether the captions of "elc" are scored; needs pycocoevalcap and Java.

    Returns:
        Scores in 0 to 1. "rec": `miou`, `precision@0.5`; "tvg": `miou`, `r1@x`; others: `m_tiou`, `m_siou`, `m_stiou`
        and each `@x` (no temporal ones for "svg" in the strict mode, zeros in the original one), and for "elc"
        `captions`.

    Raises:
        ValueError: an unknown task or mode, or what the scores raise; in the original mode also a box at a frame that
            was not sampled, and a split of one frame.
        KeyError: a record lacks a field.
        ImportError: captions are asked for and pycocoevalcap is not installed.
    """
    if task not in TASKS:
        raise ValueError(f"task is {task!r}, expected one of {', '.join(TASKS)}")
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}, expected one of {', '.join(MODES)}")
    num_temporal = num_frames if num_temporal is None else num_temporal
    if task in ("rec", "tvg"):
        truths = [record["gt_bbox" if task == "rec" else "gt"] for record in records]
        read = _first_original if mode == "original" else _first_strict
        found = [read(record, task, num_temporal, num_spatial) for record in records]
        return (score_boxes if task == "rec" else score_spans)(found, truths, mode=mode)
    if mode == "original":
        return _original_tubes(records, task, num_frames, captions)
    return _strict_tubes(records, task, num_frames, (num_temporal, num_spatial), captions)


def original_table(scores: Mapping[str, Any], task: str) -> Any:
    """Scores under the names, in the order and in percent as the released functions return them.

    Args:
        scores: What `score_records` returned.
        task: The task that was scored.

    Returns:
        "rec": (miou, accuracy); "tvg": (miou, R@0.3, R@0.5, R@0.7); others: a dict.

    Source: inference/src/metrics.py: eval_rec, eval_tvg, eval_stvg.
    """
    if task == "rec":
        return scores["miou"], scores["precision@0.5"] * 100
    if task == "tvg":
        return (scores["miou"], *(scores[f"r1@{at}"] * 100 for at in (0.3, 0.5, 0.7)))
    table: dict[str, Any] = {}
    for name, printed in (("tiou", "tiou"), ("siou", "siou"), ("stiou", "viou")):
        table[f"m{name}"] = scores.get(f"m_{name}", 0.0)
        table |= {f"{printed}@{at}": scores.get(f"{name}@{at}", 0.0) * 100 for at in (0.3, 0.5, 0.7)}
    said = {name: round(value, 3) for name, value in scores.get("captions", {}).items()}
    bleu = [said[f"Bleu_{n}"] for n in range(1, 5) if f"Bleu_{n}" in said]
    table["caption_score"] = {
        name: bleu[: int(name[-1])] if name.startswith("Bleu") else value for name, value in said.items()
    }
    return table


def _first_original(record: Record, task: str, num_temporal: int, num_spatial: int) -> Sequence[float] | None:
    text = record["converted_outputs"]
    return original_box(text) if task == "rec" else original_span(text)


def _first_strict(record: Record, task: str, num_temporal: int, num_spatial: int) -> Sequence[float] | None:
    found = _parsed(record, task, (1, 1), 1.0, (num_temporal, num_spatial))
    if task == "rec":
        return (found.boxes[0].x1, found.boxes[0].y1, found.boxes[0].x2, found.boxes[0].y2) if found.boxes else None
    return (found.spans[0].start, found.spans[0].end) if found.spans else None


def _parsed(
    record: Record,
    task: str,
    size: tuple[float, float],
    duration: float,
    num_tokens: tuple[int, int],
    event_start: float | None = None,
) -> GroundingResult:
    text = record["outputs"] if "outputs" in record else record["converted_outputs"]
    num_temporal, num_spatial = num_tokens
    return parse_grounding(
        text,
        size=size,
        duration=duration,
        task=task,
        event_start=event_start,
        num_temporal=num_temporal,
        num_spatial=num_spatial,
    )


def _original_tubes(records: Sequence[Record], task: str, num_frames: int, captions: bool) -> dict[str, Any]:
    spans, true_spans, tubes, truths = [], [], [], []
    for i, record in enumerate(records):
        first, last = record["split"]
        length = last - first
        if task != "svg":
            if length == 0:
                raise ValueError(f"record {i}: its split is one frame, in which no span can be placed")
            spans.append(original_span(record["converted_outputs"]))
            true_spans.append([round((frame - first) / length, 3) for frame in record["gt"]["tvg"]])
        sampled = {first + round(n / (num_frames - 1) * length) for n in range(num_frames)}
        truth = record["gt"]["svg"]
        pairs = original_pairs(original_convert(record["outputs"], return_token=True))
        # The check rounds before the start of the split is added and the key afterwards, as in the script.
        asked = [*(int(frame) for frame in truth), *(first + round(n / (num_frames - 1) * length) for n in pairs)]
        strays = sorted(set(asked) - sampled)
        if strays:
            raise ValueError(
                f"record {i}: frame {strays[0]} is not among the {num_frames} sampled ones of {[first, last]}"
            )
        tubes.append(
            {str(round(first + n / (num_frames - 1) * length)): _pixels(box, record) for n, box in pairs.items()}
        )
        truths.append(truth)
    scores: dict[str, Any]
    if task == "svg":
        # The scripts print a temporal score of zero.
        scores = score_tubes(tubes, truths, mode="original")
    else:
        scores = score_tubes(tubes, truths, spans=spans, true_spans=true_spans, mode="original")
    if task == "elc" and captions:
        said = [original_caption(record["outputs"]) for record in records]
        scores["captions"] = caption_scores(said, [record["gt"].get("caption", "") for record in records])
    return scores


def _pixels(box: Sequence[float], record: Record) -> list[int]:
    sides = (record["width"], record["height"]) * 2
    return [round(value / _LAST_SPATIAL * side) for value, side in zip(box, sides, strict=True)]


def _strict_tubes(
    records: Sequence[Record], task: str, num_frames: int, num_tokens: tuple[int, int], captions: bool
) -> dict[str, Any]:
    spans, true_spans, tubes, truths, said = [], [], [], [], []
    for record in records:
        first, last = record["split"]
        true_span = [frame - first for frame in record["gt"]["tvg"]] if "tvg" in record["gt"] else None
        found = _parsed(
            record,
            task,
            (record["width"], record["height"]),
            last - first,
            num_tokens,
            # The question of "elc" tells the start.
            true_span[0] if task == "elc" and true_span else None,
        )
        if task != "svg":
            spans.append((found.spans[0].start, found.spans[0].end) if found.spans else None)
            true_spans.append(true_span)
        tube = found.tubes[0] if found.tubes else None
        boxes = {} if tube is None else dict(zip(tube.times, tube.boxes, strict=True))
        tubes.append({first + round(time): (box.x1, box.y1, box.x2, box.y2) for time, box in boxes.items()})
        truths.append({int(frame): box for frame, box in record["gt"]["svg"].items()})
        said.append(found.captions[0].text if found.captions else "")
    scores: dict[str, Any] = (
        score_tubes(tubes, truths) if task == "svg" else score_tubes(tubes, truths, spans=spans, true_spans=true_spans)
    )
    if task == "elc" and captions:
        scores["captions"] = caption_scores(said, [record["gt"].get("caption", "") for record in records])
    return scores
