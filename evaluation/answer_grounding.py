"""Accuracy of a model's times and boxes on held-out questions about procedural videos.

    python -m longvideo.evaluation.answer_grounding --model llava_st --num 500
    python -m longvideo.evaluation.answer_grounding --model DIR --tasks tvg stvg --json scores.json

Videos and pictures are written as files and go through the processor and the model as any user's do; answers are
generated greedily and read as the pipeline reads them. Whatever is missing or cannot be read counts as zero. The
column "blind" scores one fixed span and one fixed box, the means of the training split, as answer to every question.
The words of "reg", "tr" and "elc" count as right when they are those of the truth; with pycocoevalcap and Java METEOR,
CIDEr and the like are printed as well, and without them what is missing.

With `--json` the answers are kept while the evaluation runs; the same command goes on where it was stopped.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, ProcessorMixin

from longvideo.evaluation.answer_questions import load_checkpoint, write_json
from longvideo.evaluation.command import run_command
from longvideo.evaluation.corpus import ALL_TASKS, DENSE_TASKS, GROUNDING_TASKS, GroundingItem, grounding_items
from longvideo.evaluation.corpus.grounding_rows import write_item
from longvideo.evaluation.metrics import (
    bootstrap_interval,
    box_iou,
    caption_scores,
    mean_score,
    temporal_iou,
    tube_iou,
    wilson_interval,
)
from longvideo.processing.llava_st.grounding_llava_st import Box, GroundingResult, Span, Tube, parse_grounding

# Names of the printed scores; those with a threshold are parts of the samples, the others means.
SCORES: dict[str, tuple[str, ...]] = {
    "rec": ("mIoU", "P@0.5"),
    "reg": ("match",),
    "tvg": ("mIoU", "R@0.5"),
    "tr": ("match",),
    "stvg": ("m_tIoU", "m_sIoU", "m_stIoU"),
    "svg": ("m_sIoU", "m_stIoU"),
    "elc": ("m_tIoU", "m_sIoU", "match"),
    "dgc": ("mIoU", "match"),
    "dvc": ("m_tIoU", "match"),
}
SHARES = ("P@0.5", "R@0.5", "match")
ROWS_AT_ONCE = 8
NUM_BLIND = 200


def score_answer(row: Mapping[str, Any], found: GroundingResult, num_frames: int) -> dict[str, float]:
    """Scores one answer.

    Args:
        row: question with its truth, from `grounding_row`.
        found: what was read from the answer.
        num_frames: frames that the model saw; boxes of a tube are compared frame by frame.

    Returns:
        Each of the task's SCORES, 0 to 1; the strict rules of `evaluation.metrics`.
    """
    scores: dict[str, float] = {}
    task = row["task"]
    if task == "rec":
        iou = box_iou(_edges(found.boxes[0]), row["box"]) if found.boxes else 0.0
        scores = {"mIoU": iou, "P@0.5": float(iou >= 0.5)}
    if row["caption"] is not None:
        scores["match"] = float(_words(found) == row["caption"])
    if task in ("tvg", "stvg", "elc"):
        span = found.spans[0] if found.spans else None
        iou = temporal_iou((span.start, span.end), row["span"]) if span is not None else 0.0
        scores |= {"mIoU": iou, "R@0.5": float(iou > 0.5), "m_tIoU": iou}
    if row["tube"] is not None:
        tube = found.tubes[0] if found.tubes else Tube((), ())
        place = (num_frames - 1) / row["duration"]
        said_boxes = {round(t * place): _edges(box) for t, box in zip(tube.times, tube.boxes, strict=True)}
        true_boxes = {round(t * place): box for t, box in zip(row["tube"]["times"], row["tube"]["boxes"], strict=True)}
        scores["m_sIoU"], scores["m_stIoU"] = tube_iou(said_boxes, true_boxes)
    if task in DENSE_TASKS:
        scores = _score_parts(row["parts"], found)
    return {name: scores[name] for name in SCORES[task]}


def _score_parts(truths: Sequence[Mapping[str, Any]], found: GroundingResult) -> dict[str, float]:
    """Boxes or spans of the same words; what is left out and what is made up count as zero."""
    said = {caption.text.rstrip(" ."): caption for caption in found.captions}
    overlaps = []
    for truth in truths:
        caption = said.get(truth["caption"])
        if caption is not None and truth["box"] is not None and caption.box is not None:
            overlaps.append(box_iou(_edges(caption.box), truth["box"]))
        elif caption is not None and truth["span"] is not None and caption.span is not None:
            overlaps.append(temporal_iou((caption.span.start, caption.span.end), truth["span"]))
    words = {truth["caption"] for truth in truths}
    score = sum(overlaps) / len(words | said.keys())
    return {"mIoU": score, "m_tIoU": score, "match": float(words == said.keys())}


def _words(found: GroundingResult) -> str:
    return found.captions[0].text.rstrip(" .") if found.captions else ""


def _edges(box: Box) -> tuple[float, float, float, float]:
    return box.x1, box.y1, box.x2, box.y2


@lru_cache(maxsize=1)
def blind_answer() -> tuple[tuple[float, float], tuple[float, float, float, float]]:
    """The mean span and the mean box of the training split, in fractions: the best that can be said unseen."""
    spans, boxes = [], []
    for item in grounding_items(NUM_BLIND, tasks=("rec", "tvg"), split="train", size=(1000, 1000)):
        length = item.scene.duration - 1 / item.scene.fps
        for grounding in item.groundings:
            if grounding.span is not None:
                spans.append((grounding.span.start / length, grounding.span.end / length))
            if grounding.box is not None:
                boxes.append([edge / 1000 for edge in _edges(grounding.box)])
    start, end = (mean_score(column) for column in zip(*spans, strict=True))
    left, top, right, bottom = (mean_score(column) for column in zip(*boxes, strict=True))
    return (start, end), (left, top, right, bottom)


def blind_result(row: Mapping[str, Any], num_frames: int) -> GroundingResult:
    """The blind answer to a question, as if it had been read.

    Args:
        row: question.
        num_frames: frames of the video; inside the span each has the box.

    Returns:
        Span, box and tube; no words. Spans and starts that the question tells are used.
    """
    (start, end), fractions = blind_answer()
    box = Box(*(part * side for part, side in zip(fractions, row["size"] * 2, strict=True)))
    if row["duration"] is None:
        return GroundingResult("", boxes=(box,))
    if row["task"] == "svg":
        start, end = (second / row["duration"] for second in row["span"])
    elif row["task"] == "elc":
        told = row["span"][0] / row["duration"]
        start, end = told, min(told + end - start, 1.0)
    span = Span(start * row["duration"], end * row["duration"])
    times = (row["duration"] * place / (num_frames - 1) for place in range(num_frames))
    inside = tuple(time for time in times if span.start <= time <= span.end)
    return GroundingResult("", spans=(span,), boxes=(box,), tubes=(Tube(inside, (box,) * len(inside)),))


@torch.no_grad()
def generate_answers(
    model: PreTrainedModel, processor: ProcessorMixin, rows: Sequence[Mapping[str, Any]], folder: Path
) -> list[str]:
    """Generates greedily, all rows together.

    Args:
        model: model in evaluation mode.
        processor: its processor.
        rows: questions, all about pictures or all about videos.
        folder: folder that their paths are relative to.

    Returns:
        Answers with their coordinate tokens, without the end mark.
    """
    messages = []
    for row in rows:
        visual, text = row["messages"][0]["content"]
        visual = {**visual, "path": str(folder / visual["path"])}
        messages.append([{"role": "user", "content": [visual, text]}])
    inputs = processor.apply_chat_template(
        messages,
        tokenize=True,
        return_dict=True,
        add_generation_prompt=True,
        processor_kwargs={"return_tensors": "pt", "padding": True, "padding_side": "left"},
    )
    inputs = inputs.to(model.device)
    for name in ("pixel_values", "pixel_values_videos"):
        if name in inputs:
            inputs[name] = inputs[name].to(model.dtype)
    # A box at every frame takes ten tokens each; spans and words some fifty more.
    most = 10 * model.config.num_frames + 60
    ids = model.generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=most)
    answers = []
    for answer in ids[:, inputs["input_ids"].shape[1] :].tolist():
        end = processor.tokenizer.eos_token_id
        kept = answer[: answer.index(end)] if end in answer else answer
        answers.append(processor.tokenizer.decode(kept, skip_special_tokens=False))
    return answers


def record_answer(row: Mapping[str, Any], text: str, processor: ProcessorMixin, num_frames: int) -> dict[str, Any]:
    """Reads and scores one answer.

    Args:
        row: question with its truth.
        text: the answer.
        processor: says how many coordinate tokens there are.
        num_frames: frames that the model saw.

    Returns:
        `id`, `task`, `question`, `answer`, `truth`, `malformed` (reasons), `scores` and `blind` scores; for tasks
        whose answer is words also these, `said`, and the `caption` of the truth.
    """
    found = parse_grounding(
        text,
        size=tuple(row["size"]),
        duration=row["duration"],
        task=row["task"],
        event_start=row["span"][0] if row["task"] == "elc" else None,
        num_temporal=processor.num_temporal_tokens,
        num_spatial=processor.num_spatial_tokens,
    )
    return {
        "id": row["id"],
        "task": row["task"],
        "question": row["question"],
        "answer": text,
        "truth": row["answer"],
        "malformed": [piece.reason for piece in found.malformed],
        "scores": score_answer(row, found, num_frames),
        "blind": score_answer(row, blind_result(row, num_frames), num_frames),
        **({} if row["caption"] is None else {"said": _words(found), "caption": row["caption"]}),
    }


def evaluate(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    num: int = 500,
    *,
    tasks: Iterable[str] | None = None,
    split: str = "held_out",
    seed: int = 0,
    size: int = 128,
    known: Iterable[Mapping[str, Any]] = (),
    keep: Callable[[list[dict[str, Any]]], None] | None = None,
) -> list[dict[str, Any]]:
    """Writes videos and pictures to a temporary folder, asks about them, and scores the answers.

    Args:
        model: model that answers with coordinates.
        processor: its processor.
        num: number of questions, spread evenly over the tasks.
        tasks: tasks to ask; default all of GROUNDING_TASKS.
        split: "held_out" or "train".
        seed: first scene.
        size: side of the videos in pixels.
        known: records of an evaluation with the same arguments, which are not asked again.
        keep: called with all records after every batch.

    Returns:
        One record for each question, see `record_answer`; the same arguments give the same questions in the same
        order.

    Raises:
        ValueError: a model without coordinates, unknown task or split, or num below 1.
    """
    if not getattr(processor, "num_temporal_tokens", 0):
        raise ValueError(
            f"{type(processor).__name__} has no coordinate tokens, so its model answers without times and boxes. Use "
            "a LLaVA-ST checkpoint of stage 2 or later."
        )
    num_frames, sides = model.config.num_frames, (size, size)
    items = grounding_items(num, tasks=tasks, split=split, seed=seed, size=sides, num_frames=num_frames)
    records = {record["id"]: dict(record) for record in known}
    order: list[str] = []
    waiting: dict[str, list[dict[str, Any]]] = {"image": [], "video": []}
    model.eval()
    with tempfile.TemporaryDirectory(prefix="longvideo-grounding-") as name:
        folder = Path(name)

        def ask(kind: str) -> None:
            rows, waiting[kind] = waiting[kind], []
            for row, text in zip(rows, generate_answers(model, processor, rows, folder), strict=True):
                records[row["id"]] = record_answer(row, text, processor, num_frames)
            if keep is not None:
                keep([records[entry] for entry in order if entry in records])

        for item in items:
            for row in _new_rows(item, folder, sides, records, order):
                kind = row["messages"][0]["content"][0]["type"]
                waiting[kind].append(row)
            for kind, rows in waiting.items():
                if len(rows) >= ROWS_AT_ONCE:
                    ask(kind)
        for kind, rows in waiting.items():
            if rows:
                ask(kind)
    return [records[entry] for entry in order]


def _new_rows(
    item: GroundingItem, folder: Path, size: tuple[int, int], records: Mapping[str, Any], order: list[str]
) -> list[dict[str, Any]]:
    """Writes the files of the questions that have no record yet; every question gets its place in `order`."""
    scene = item.scene
    names = [f"{scene.split}-{scene.seed}-{one.task}-{number}" for number, one in enumerate(item.groundings)]
    order += names
    if all(name in records for name in names):
        return []
    return [row for row in write_item(item, folder, size=size) if row["id"] not in records]


def summarize(records: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Scores of each task with their 95 % intervals, in the order of ALL_TASKS.

    Args:
        records: from `evaluate`.

    Returns:
        For each task `num`, `malformed` (answers with a part that could not be read) and for each of its SCORES
        {"value", "interval_95", "blind"}; intervals of parts are Wilson's, those of means are bootstrapped.
    """
    records = list(records)
    summary: dict[str, dict[str, Any]] = {}
    for task in ALL_TASKS:
        own = [record for record in records if record["task"] == task]
        if not own:
            continue
        summary[task] = {"num": len(own), "malformed": sum(bool(record["malformed"]) for record in own)}
        for name in SCORES[task]:
            values = [record["scores"][name] for record in own]
            interval = (
                wilson_interval(round(sum(values)), len(values)) if name in SHARES else bootstrap_interval(values)
            )
            blind = mean_score([record["blind"][name] for record in own])
            summary[task][name] = {"value": mean_score(values), "interval_95": list(interval), "blind": blind}
    return summary


def summarize_captions(records: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Caption scores of the tasks whose answer is words, over all answers of a task.

    Args:
        records: from `evaluate`.

    Returns:
        For each task the scores of `metrics.caption_scores`; `missing`, the reason, in place of all where the optional
        library or Java is not there.
    """
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        if "said" in record:
            groups.setdefault(record["task"], []).append(record)
    try:
        return {
            task: caption_scores([one["said"] for one in groups[task]], [one["caption"] for one in groups[task]])
            for task in GROUNDING_TASKS
            if task in groups
        }
    except (ImportError, RuntimeError) as error:
        return {"missing": str(error)}


def format_captions(captions: Mapping[str, Any]) -> str:
    """The caption scores as lines, or the line that says why there are none; empty without tasks of words."""
    if "missing" in captions:
        return f"captions: exact matches only, {captions['missing']}"
    return "\n".join(
        f"{task:<5} captions: {', '.join(f'{name} {value:.3f}' for name, value in scores.items())}"
        for task, scores in captions.items()
    )


def format_table(summary: Mapping[str, Mapping[str, Any]]) -> str:
    """The summary as a table with one line for each score."""
    lines = [f"{'task':<5} {'n':>4} {'score':<8} value  95 % interval  blind  malformed"]
    for task, entry in summary.items():
        for name in SCORES[task]:
            score = entry[name]
            low, high = score["interval_95"]
            lines.append(
                f"{task:<5} {entry['num']:>4} {name:<8} {score['value']:.3f}  {low:.3f} - {high:.3f}  "
                f"{score['blind']:.3f}  {entry['malformed']}"
            )
    return "\n".join(lines)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m longvideo.evaluation.answer_grounding",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--model",
        default="llava_st",
        help="folder, id, or architecture whose tiny checkpoint comes with the package (default llava_st)",
    )
    parser.add_argument("--num", type=int, default=500, help="number of questions (default 500)")
    default = f"tasks (default all but {', '.join(DENSE_TASKS)})"
    parser.add_argument("--tasks", nargs="+", choices=ALL_TASKS, default=None, help=default)
    parser.add_argument("--split", choices=("held_out", "train"), default="held_out")
    parser.add_argument("--seed", type=int, default=0, help="first scene (default 0)")
    parser.add_argument("--size", type=int, default=128, help="side of the videos in pixels (default 128)")
    parser.add_argument("--dtype", default="float32", help="float32 (default), bfloat16, float16 or auto")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, ...")
    parser.add_argument("--json", default=None, metavar="FILE", help="write scores and answers; go on from that file")
    return parser.parse_args(argv)


def _known_records(path: Path, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Records of a file that was written with the same settings."""
    if not path.exists():
        return []
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["settings"] == settings:
            return values["answers"]
    except (ValueError, KeyError, TypeError):
        pass
    raise ValueError(
        f"{path} is there already and holds no answers with these settings; name another file, or remove it."
    )


def run(args: argparse.Namespace) -> int:
    """Loads the model, asks, prints the table; returns the exit code."""
    settings = {"model": args.model, "num": args.num, "tasks": args.tasks, "split": args.split, "seed": args.seed}
    settings |= {"size": args.size, "dtype": args.dtype}
    path = Path(args.json) if args.json else None
    known = [] if path is None else _known_records(path, settings)
    model, processor = load_checkpoint(args.model, dtype=args.dtype, device=args.device)
    start = time.perf_counter()

    def keep(records: list[dict[str, Any]]) -> None:
        if path is not None:
            write_json(path, {"settings": settings, "summary": summarize(records), "answers": records})
        if sys.stderr.isatty() or len(records) == args.num:
            end = "\n" if len(records) == args.num else ""
            print(f"\r{len(records)}/{args.num} questions", end=end, file=sys.stderr, flush=True)

    records = evaluate(
        model,
        processor,
        args.num,
        tasks=args.tasks,
        split=args.split,
        seed=args.seed,
        size=args.size,
        known=known,
        keep=keep,
    )
    summary, captions = summarize(records), summarize_captions(records)
    if path is not None:
        values = {"settings": settings, "summary": summary, "captions": captions, "answers": records}
        write_json(path, values)
    print("\n".join(filter(None, (format_table(summary), format_captions(captions)))))
    print(f"{args.split} questions, greedy; strict scores: what is missing counts as zero; blind: one fixed answer")
    print(f"{time.perf_counter() - start:.0f} s")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Runs the command; user errors are one line and exit code 2."""
    args = _parse(argv)
    return run_command("answer_grounding", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
