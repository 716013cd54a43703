"""`python -m longvideo.evaluation.corpus --out DIR`: writes mp4 files and rows.jsonl."""

import argparse
import sys

from longvideo.evaluation.corpus.questions import KINDS
from longvideo.evaluation.corpus.rows import FORMS, write_corpus
from longvideo.evaluation.corpus.scenes import DIFFICULTIES, SPLITS


def main(argv: list[str] | None = None) -> int:
    """Writes a corpus; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m longvideo.evaluation.corpus", description=__doc__)
    parser.add_argument("--out", required=True, help="folder for videos/ and rows.jsonl")
    parser.add_argument("--num", type=int, default=100, help="number of questions (default 100)")
    parser.add_argument("--split", choices=SPLITS, default="held_out")
    parser.add_argument("--size", type=int, default=256, help="side of the videos in pixels (default 256)")
    parser.add_argument("--seed", type=int, default=0, help="first scene (default 0)")
    parser.add_argument("--form", choices=(*FORMS, "both"), default="both", help="open answers, letters, or in turns")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=None, help="kinds of questions (default all)")
    parser.add_argument("--difficulty", choices=tuple(DIFFICULTIES), default="full")
    args = parser.parse_args(argv)

    def show(done: int, total: int) -> None:
        if sys.stderr.isatty() or done == total:
            print(f"\r{done}/{total} videos", end="\n" if done == total else "", file=sys.stderr, flush=True)

    try:
        path = write_corpus(
            args.out,
            args.num,
            split=args.split,
            seed=args.seed,
            size=args.size,
            form=args.form,
            kinds=args.kinds,
            difficulty=args.difficulty,
            progress=show,
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
