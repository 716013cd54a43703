"""What tuning, cross-granularity training and reflection bring a CrossVLLM on long videos: Table 3 of its paper.

    python -m longvideo.evaluation.granularity_table --run runs/tiny_crossvllm --num 100 --seeds 0 1

Questions about held-out long scenes of the corpus (2 to 5 minutes, the answer seen for 10 to 20 seconds) go through
the controller, as any user's do. Rows differ in the adapters and projectors of both modules, taken from three
checkpoints of one training, and in whether the detail module may send a segment back. The second table is the paper's
Table 5: the overview with fewer tokens of more frames, or the other way round, at about equal numbers of tokens.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, ProcessorMixin

from longvideo.evaluation.answer_questions import show_progress, write_json
from longvideo.evaluation.command import run_command
from longvideo.evaluation.corpus.long_scenes import LONG_FPS, LONG_KINDS, long_items, render_long
from longvideo.evaluation.granularity_states import (
    STATES,
    States,
    checkpoint_of,
    load_states,
    other_overview,
    trade_offs,
    use_states,
)
from longvideo.evaluation.metrics import accuracy, bootstrap_interval, temporal_iou, wilson_interval

# State of the coarse module, state of the fine one, reflection.
ROWS: dict[str, tuple[str, str, bool]] = {
    "no tuning": ("base", "base", False),
    "coarse only": ("tuned", "base", False),
    "fine only": ("base", "tuned", False),
    "both": ("tuned", "tuned", False),
    "both + RL": ("final", "final", False),
    "both + reflection": ("tuned", "tuned", True),
    "all": ("final", "final", True),
}
JUDGED = ("all", "both")
# Scenes of one seed begin here; more questions than this are never asked.
SCENES_PER_SEED = 1_000_000
AT_ONCE = 8
MAX_NEW_TOKENS = 16
PAPER = "The paper's rows: its Table 3, on other videos; only the directions can be compared."


@dataclass(frozen=True)
class Asked:
    """One question in one row.

    Attributes:
        run: Folder of the training.
        seed: Of the questions.
        row: Name in ROWS, or of a stride and a number of frames.
        scene: Number of the scene.
        kind: Kind of the question.
        question: The question.
        truth: Right answer.
        answer: What was answered.
        segment: True segment in seconds.
        found: Segment of the answer, None where none could be read.
        iou: Overlap of both.
        rounds: Segments that were looked at.
    """

    run: str
    seed: int
    row: str
    scene: int
    kind: str
    question: str
    truth: str
    answer: str
    segment: tuple[float, float]
    found: tuple[float, float] | None
    iou: float
    rounds: int

    @property
    def correct(self) -> bool:
        """Whether the answer is right."""
        return self.answer.strip(" .").lower() == self.truth.lower()


def ask_rows(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    states: States,
    items: Sequence[Any],
    *,
    run: str,
    seed: int,
    rows: Sequence[str] = tuple(ROWS),
    max_rounds: int = 3,
) -> list[Asked]:
    """Asks questions in every row; a frame is encoded once for all of them.

    Args:
        model: A CrossVLLM.
        processor: Its processor.
        states: From `load_states`.
        items: Scenes with their questions, from `long_items`.
        run: Name of the training.
        seed: Of the questions.
        rows: Names in ROWS.
        max_rounds: Limit R of rows with reflection.

    Returns:
        One result for each question and row.
    """
    from longvideo.cross_granularity.modules import SeenFrames
    from longvideo.modeling.crossvllm.frame_cache_crossvllm import FrameFeatureCache
    from longvideo.pipelines import VideoQuestionAnsweringPipeline

    pipe = VideoQuestionAnsweringPipeline(model=model, processor=processor, device=model.device)
    frames = SeenFrames(pipe, FrameFeatureCache())
    questions = as_questions(items, model.config.vision_config.image_size)
    results = []
    for row in rows:
        coarse, fine, reflection = ROWS[row]
        use_states(model, states, coarse, fine)
        answers = answer(pipe, frames, questions, reflection=reflection, max_rounds=max_rounds)
        results += [
            _record(found, item, run=run, seed=seed, row=row) for found, item in zip(answers, items, strict=True)
        ]
    return results


def ask_trade_offs(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    states: States,
    items: Sequence[Any],
    *,
    run: str,
    seed: int,
) -> list[Asked]:
    """Asks questions with other strides and numbers of frames of the overview, both modules finetuned.

    Args:
        model: A CrossVLLM.
        processor: Its processor.
        states: From `load_states`.
        items: Scenes with their questions, from `long_items`.
        run: Name of the training.
        seed: Of the questions.

    Returns:
        One result for each question and pair of `trade_offs`.

    Differs: The paper trains a coarse module for each stride; here one that learned at its own stride sees others.
    """
    from longvideo.cross_granularity.modules import SeenFrames
    from longvideo.modeling.crossvllm.frame_cache_crossvllm import FrameFeatureCache
    from longvideo.pipelines import VideoQuestionAnsweringPipeline

    pipe = VideoQuestionAnsweringPipeline(model=model, processor=processor, device=model.device)
    questions, results = as_questions(items, model.config.vision_config.image_size), []
    use_states(model, states, "tuned", "tuned")
    for stride, num_frames in trade_offs(model):
        with other_overview(model, processor, stride):
            # What is kept of a frame depends on both strides.
            frames = SeenFrames(pipe, FrameFeatureCache())
            answers = answer(pipe, frames, questions, reflection=False, max_rounds=0, num_frames=num_frames)
        name = f"stride {stride}, {num_frames} frames"
        results += [
            _record(found, item, run=run, seed=seed, row=name) for found, item in zip(answers, items, strict=True)
        ]
    return results


def as_questions(items: Sequence[Any], size: int) -> list[Any]:
    """Draws scenes and writes their questions as the controller takes them.

    Args:
        items: From `long_items`.
        size: Side of the frames in pixels.

    Returns:
        Questions with decoded videos.
    """
    from longvideo.cross_granularity.trace import VideoQuestion

    return [
        VideoQuestion(
            video=render_long(scene, size),
            question=found.question.question,
            duration=float(scene.duration),
            metadata={"fps": float(LONG_FPS)},
        )
        for scene, found in items
    ]


def answer(
    pipe: Any,
    frames: Any,
    questions: Sequence[Any],
    *,
    reflection: bool,
    max_rounds: int,
    num_frames: int | None = None,
) -> list[Any]:
    """Lets the controller answer.

    Args:
        pipe: Pipeline of a CrossVLLM.
        frames: Features that both modules share.
        questions: From `as_questions`.
        reflection: Whether the detail module may send a segment back.
        max_rounds: How often.
        num_frames: Frames of the overview; None for the model's.

    Returns:
        The controller's answers.
    """
    from longvideo.cross_granularity.controller import ControllerRules, CrossGranularityController
    from longvideo.cross_granularity.modules import GranularityModule

    # Fresh ones: a module may keep what its last weights made of a prompt.
    options = {"batch_size": AT_ONCE, "max_new_tokens": MAX_NEW_TOKENS}
    coarse_options = options if num_frames is None else {**options, "num_frames": num_frames}
    modules = (
        GranularityModule(pipe, "coarse", frames, **coarse_options),
        GranularityModule(pipe, "fine", frames, **options),
    )
    rules = ControllerRules(reflection=reflection, max_rounds=max_rounds if reflection else 0)
    return CrossGranularityController(*modules, rules)(questions)


def _record(found: Any, item: Any, *, run: str, seed: int, row: str) -> Asked:
    scene, asked = item
    was_read = any(entry.coarse is not None and entry.coarse.policy.t_start is not None for entry in found.rounds)
    segment = found.segment if was_read else None
    return Asked(
        run=run,
        seed=seed,
        row=row,
        scene=scene.seed,
        kind=asked.question.kind,
        question=asked.question.question,
        truth=asked.question.answer,
        answer=found.answer,
        segment=asked.segment,
        found=segment,
        iou=0.0 if segment is None else temporal_iou(segment, asked.segment),
        rounds=len(found.rounds),
    )


def summarize(results: Sequence[Asked]) -> dict[str, dict[str, Any]]:
    """Overlap and accuracy of each row with 95 % intervals, and of each seed.

    Args:
        results: From `ask_rows` or `ask_trade_offs`.

    Returns:
        Per row `num`, `miou` with `miou_interval_95` (bootstrap), `accuracy` with `accuracy_interval_95` (Wilson),
        `overlap` (share of segments that touch the truth), `rounds` (mean), `by_seed` and `by_kind`.
    """
    summary: dict[str, dict[str, Any]] = {}
    for row in dict.fromkeys(result.row for result in results):
        group = [result for result in results if result.row == row]
        right, ious = [x.correct for x in group], [x.iou for x in group]
        summary[row] = {
            "num": len(group),
            "miou": sum(ious) / len(ious),
            "miou_interval_95": list(bootstrap_interval(ious)),
            "accuracy": accuracy(right),
            "accuracy_interval_95": list(wilson_interval(sum(right), len(right))),
            "overlap": accuracy([iou > 0 for iou in ious]),
            "rounds": sum(x.rounds for x in group) / len(group),
            "by_seed": {
                f"{run} {seed}": _means([x for x in group if (x.run, x.seed) == (run, seed)])
                for run, seed in dict.fromkeys((x.run, x.seed) for x in group)
            },
            "by_kind": {
                kind: _means([x for x in group if x.kind == kind])
                for kind in LONG_KINDS
                if any(x.kind == kind for x in group)
            },
        }
    return summary


def _means(group: Sequence[Asked]) -> dict[str, float]:
    return {"miou": sum(x.iou for x in group) / len(group), "accuracy": accuracy([x.correct for x in group])}


def compare(results: Sequence[Asked], better: str, worse: str) -> dict[str, Any] | None:
    """Differences of two rows on the same questions, with bootstrap intervals.

    Args:
        results: From `ask_rows`.
        better: Name of a row.
        worse: Name of another one.

    Returns:
        `accuracy` and `miou` of the first less those of the second, with `accuracy_interval_95` and
        `miou_interval_95`; None where a row is missing.
    """
    rows = {name: {(x.run, x.seed, x.scene): x for x in results if x.row == name} for name in (better, worse)}
    keys = sorted(rows[better].keys() & rows[worse].keys())
    if not keys:
        return None
    pairs = [(rows[better][key], rows[worse][key]) for key in keys]
    right = [float(first.correct) - float(second.correct) for first, second in pairs]
    ious = [first.iou - second.iou for first, second in pairs]
    return {
        "rows": [better, worse],
        "num": len(keys),
        "accuracy": sum(right) / len(right),
        "accuracy_interval_95": list(bootstrap_interval(right)),
        "miou": sum(ious) / len(ious),
        "miou_interval_95": list(bootstrap_interval(ious)),
    }


def format_table(summary: dict[str, dict[str, Any]], title: str) -> str:
    """The summary as a table, in percent.

    Args:
        summary: From `summarize`.
        title: Head of the first column.

    Returns:
        Lines.
    """
    width = max(len(title), *(len(row) for row in summary)) + 2
    lines = [f"{title:<{width}}{'mIoU':>24}{'accuracy':>24}{'touches':>10}{'rounds':>8}"]
    for row, cell in summary.items():
        texts = []
        for name in ("miou", "accuracy"):
            low, high = (100 * value for value in cell[f"{name}_interval_95"])
            texts.append(f"{100 * cell[name]:5.1f} ({low:4.1f} - {high:5.1f})")
        seen = f"{100 * cell['overlap']:9.1f}{cell['rounds']:8.2f}"
        lines.append(f"{row:<{width}}{texts[0]:>24}{texts[1]:>24} {seen}")
    return "\n".join(lines)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m longvideo.evaluation.granularity_table",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--run", nargs="+", metavar="DIR", help="folders of trainings, one for each seed of training")
    for state in STATES:
        parser.add_argument(f"--{state}", metavar="DIR", help=f"checkpoint of the state {state!r}, in place of --run")
    parser.add_argument("--num", type=int, default=100, help="questions of each seed (default 100)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="sets of scenes (default 0 1 2)")
    parser.add_argument("--rows", nargs="+", choices=tuple(ROWS), default=list(ROWS), help="default all")
    parser.add_argument("--max-rounds", type=int, default=3, help="limit R with reflection (default 3)")
    parser.add_argument("--no-trade-off", action="store_true", help="leave the second table out")
    parser.add_argument("--json", default=None, metavar="FILE", help="write summaries and every answer")
    return parser.parse_args(argv)


def _folders(args: argparse.Namespace) -> dict[str, dict[str, str]]:
    given = {state: getattr(args, state) for state in STATES}
    if (args.run and any(given.values())) or (not args.run and not all(given.values())):
        raise ValueError("give either --run, or all of --base, --tuned and --final")
    if not args.run:
        return {given["final"]: given}
    return {run: {state: checkpoint_of(run, state) for state in STATES} for run in args.run}


def evaluate(args: argparse.Namespace, progress: Callable[[int, int], None]) -> tuple[list[Asked], list[Asked]]:
    """Asks everything.

    Args:
        args: Of the command line.
        progress: Called with the number of finished questions and their total.

    Returns:
        Results of the rows, and of the trade-off.

    Raises:
        ValueError: Checkpoints that do not belong together, or a number below 1.
        FileNotFoundError: A stage is missing.
    """
    if args.num < 1:
        raise ValueError(f"the number of questions is {args.num}, expected at least 1")
    rows, trades, done = [], [], 0
    runs = _folders(args)
    for run, folders in runs.items():
        model, processor, states = load_states(folders)
        for seed in args.seeds:
            items = long_items(args.num, seed=seed * SCENES_PER_SEED)
            for begin in range(0, len(items), AT_ONCE):
                part, place = items[begin : begin + AT_ONCE], {"run": run, "seed": seed}
                rows += ask_rows(model, processor, states, part, **place, rows=args.rows, max_rounds=args.max_rounds)
                if not args.no_trade_off:
                    trades += ask_trade_offs(model, processor, states, part, **place)
                done += len(part)
                progress(done, len(runs) * len(args.seeds) * args.num)
    return rows, trades


def run(args: argparse.Namespace) -> int:
    """Loads, asks, prints both tables; returns the exit code."""
    start = time.perf_counter()
    results, trades = evaluate(args, show_progress)
    seconds = time.perf_counter() - start
    summary, trade_summary = summarize(results), summarize(trades)
    difference = compare(results, *JUDGED)
    print(format_table(summary, "row"))
    if difference is not None:
        low, high = (100 * value for value in difference["accuracy_interval_95"])
        print(f"\n{JUDGED[0]} - {JUDGED[1]}: accuracy {100 * difference['accuracy']:+.1f} ({low:+.1f} to {high:+.1f})")
    if trades:
        print("\n" + format_table(trade_summary, "overview"))
    print(
        f"\n{args.num} held-out questions of each of the seeds {args.seeds}, {len(_folders(args))} trainings; "
        "percent, 95 %\nintervals: bootstrap over questions for mIoU, Wilson for accuracy (the whole answer must be "
        f"right); {math.ceil(seconds)} s"
    )
    print(PAPER)
    if args.json:
        told = {name: getattr(args, name) for name in ("run", *STATES, "num", "seeds", "rows", "max_rounds")}
        values = {
            "settings": told,
            "seconds": seconds,
            "summary": summary,
            "difference": difference,
            "trade_off": trade_summary,
            "answers": [asdict(x) for x in (*results, *trades)],
        }
        write_json(Path(args.json), values)
    return 0


def main(argv: list[str] | None = None) -> int:
    """Runs the command; user errors are one line and exit code 2."""
    args = _parse(argv)
    return run_command("granularity_table", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
