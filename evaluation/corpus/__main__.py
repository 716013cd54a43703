"""`python -m longvideo.evaluation.corpus --out DIR`: writes mp4 files and rows.jsonl.

With `--grounding` the questions are about times and places; `--st-align` adds annotation files of that benchmark.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

from longvideo.evaluation.command import run_command
from longvideo.evaluation.corpus.grounding import ALL_TASKS, DENSE_TASKS, NUM_FRAMES
from longvideo.evaluation.corpus.grounding_rows import write_grounding_corpus
from longvideo.evaluation.corpus.questions import KINDS
from longvideo.evaluation.corpus.rows import FORMS, write_corpus
from longvideo.evaluation.corpus.scenes import DIFFICULTIES, SPLITS
from longvideo.evaluation.corpus.st_align import write_st_align


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m longvideo.evaluation.corpus",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", required=True, help="folder for videos/ and rows.jsonl")
    parser.add_argument("--num", type=int, default=100, help="number of questions (default 100)")
    parser.add_argument("--split", choices=SPLITS, default="held_out")
    parser.add_argument("--size", type=int, default=256, help="side of the videos in pixels (default 256)")
    parser.add_argument("--seed", type=int, default=0, help="first scene (default 0)")
    parser.add_argument("--form", choices=(*FORMS, "both"), default="both", help="open answers, letters, or in turns")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=None, help="kinds of questions (default all)")
    parser.add_argument("--difficulty", choices=tuple(DIFFICULTIES), default="full")
    parser.add_argument(
        "--grounding",
        nargs="*",
        choices=ALL_TASKS,
        default=None,
        metavar="TASK",
        help=f"ask about times and places: {', '.join(ALL_TASKS)} (default all but {', '.join(DENSE_TASKS)})",
    )
    parser.add_argument(
        "--num-frames", type=int, default=NUM_FRAMES, help=f"frames that tubes have boxes at (default {NUM_FRAMES})"
    )
    parser.add_argument("--st-align", action="store_true", help="write stvg.json, svg.json and elc.json, too")
    return parser.parse_args(argv)


def _write(args: argparse.Namespace, show: Callable[[int, int], None]) -> Path:
    common = {"split": args.split, "seed": args.seed, "size": args.size, "difficulty": args.difficulty}
    if args.grounding is None:
        if args.st_align:
            raise ValueError("--st-align writes rows of --grounding: give that, too")
        return write_corpus(args.out, args.num, form=args.form, kinds=args.kinds, **common, progress=show)
    tasks = args.grounding or None
    path = write_grounding_corpus(args.out, args.num, tasks=tasks, num_frames=args.num_frames, **common, progress=show)
    if args.st_align:
        write_st_align(args.out, map(json.loads, path.read_text(encoding="utf-8").splitlines()))
    return path


def main(argv: list[str] | None = None) -> int:
    """Writes a corpus; returns the exit code."""
    args = _parse(argv)

    def show(done: int, total: int) -> None:
        if sys.stderr.isatty() or done == total:
            print(f"\r{done}/{total} videos", end="\n" if done == total else "", file=sys.stderr, flush=True)

    def work() -> int:
        print(_write(args, show))
        return 0

    return run_command("corpus", work)


if __name__ == "__main__":
    sys.exit(main())
