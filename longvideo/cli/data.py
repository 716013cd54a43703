"""`longvideo data check FILE` and `longvideo data convert A B [--to FORMAT]`: training rows of five formats."""

import argparse
import json
from typing import Any

HELP = "Check rows for training, or turn them from one format into another; the format is found by itself."
FORMATS = ("llava", "st_align", "trl", "ms_swift", "sharegpt")


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments.

    Args:
        parser: The command's parser.
    """
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    check = actions.add_parser("check", help="say what a file holds and what is wrong with it")
    check.add_argument("file", metavar="FILE", help="json, jsonl, yaml with a list of files, or parquet")
    check.add_argument(
        "--media",
        choices=["none", "exists", "decodes"],
        default="exists",
        help="what is asked of videos and images: nothing, that they are there, or that they can be opened (default: "
        "exists; addresses are not asked)",
    )
    check.add_argument("--json", action="store_true", help="print one JSON object")
    convert = actions.add_parser("convert", help="write the rows of a file in another format")
    convert.add_argument("file", metavar="A", help="file to read")
    convert.add_argument("target", metavar="B", help="file to write, .json or .jsonl")
    convert.add_argument("--to", choices=FORMATS, help="format of B (default: that of the rows that B holds already, "
                         "where they can be of one alone)")  # fmt: skip
    convert.add_argument(
        "--on-error", choices=["skip", "raise"], default="skip", help="leave bad rows out, or write nothing"
    )
    for action in (check, convert):
        action.add_argument("--format", choices=FORMATS, help="format of the file that is read (default: found)")
        action.add_argument("--media-root", metavar="FOLDER", help="folder of relative paths (default: the file's)")
        action.add_argument("--most", type=int, default=20, metavar="N", help="name N problems (default: 20)")


def run(args: argparse.Namespace) -> int:
    """Check or convert, and print counts and problems.

    Args:
        args: The parsed arguments.

    Returns:
        0, or 1 when some row has a problem.

    Raises:
        ValueError: The file cannot be read or written at all.
        OSError: No such file.
    """
    return check(args) if args.action == "check" else convert(args)


def check(args: argparse.Namespace) -> int:
    """Check a file; see `run`."""
    from longvideo.trainers.data import check_file

    report, contents = check_file(args.file, format=args.format, media_root=args.media_root, media=args.media)
    if args.json:
        print(json.dumps({**_as_dict(report), **contents}, indent=2))
        return 1 if report.problems else 0
    for file, name in report.formats.items():
        print(f"{file}: {name}")
    for words, count in contents.items():
        if count:
            print(f"  {count:,} {words}")
    print(report.summary(most=args.most))
    return 1 if report.problems else 0


def convert(args: argparse.Namespace) -> int:
    """Convert a file; see `run`."""
    from longvideo.trainers.data import convert_file
    from longvideo.trainers.data.conversion import format_of_target

    to = args.to or format_of_target(args.target)
    report = convert_file(
        args.file,
        args.target,
        to=to,
        format=args.format,
        media_root=args.media_root,
        on_error=args.on_error,
    )
    print(f"{args.target}: {to}, from {', '.join(sorted(set(report.formats.values())))}")
    print(report.summary(most=args.most))
    for what, count in sorted(report.lost.items()):
        print(f"  left out: {what} ({count} rows)")
    return 1 if report.problems else 0


def _as_dict(report: Any) -> dict[str, Any]:
    return {
        "formats": report.formats,
        "rows_in": report.num_in,
        "rows_out": report.num_out,
        "problems": [problem._asdict() for problem in report.problems],
    }
