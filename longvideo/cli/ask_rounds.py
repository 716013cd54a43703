"""The part of `longvideo ask` for models that look at a video in two granularities."""

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

from longvideo.cli.sources import visual_kind

if TYPE_CHECKING:
    from longvideo.pipelines import VideoQuestionAnsweringPipeline


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of these models."""
    rounds = parser.add_argument_group("rounds (CrossVLLM; --task tvg and --draw too)")
    rounds.add_argument("--trace", action="store_true", help="print what both modules were asked and wrote")
    rounds.add_argument(
        "--max-rounds",
        type=int,
        metavar="N",
        help="look again at most N times where a segment does not suit (default 3)",
    )
    rounds.add_argument(
        "--exhaustive",
        choices=("on", "off", "auto"),
        help="examine the whole video part by part, to count or to order",
    )
    rounds.add_argument("--granularity", choices=("coarse", "fine"), help="look once, at the whole video")


def speaks_of_rounds(args: argparse.Namespace) -> bool:
    """Tell whether an argument is given that only these models know."""
    return bool(args.trace or arguments(args))


def arguments(args: argparse.Namespace) -> dict[str, Any]:
    """Return what the pipeline is told about rounds, where it is given."""
    exhaustive = {"on": True, "off": False, "auto": "auto", None: None}[args.exhaustive]
    values = {"max_rounds": args.max_rounds, "exhaustive": exhaustive, "granularity": args.granularity}
    return {name: value for name, value in values.items() if value is not None}


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse what cannot work before a model is loaded.

    Raises:
        ValueError: with the argument and what it should be.
    """
    if args.max_rounds is not None and args.max_rounds < 0:
        raise ValueError(f"--max-rounds must be 0 or more, got {args.max_rounds}.")
    given = {"--trace": args.trace, "--max-rounds": args.max_rounds, "--exhaustive": args.exhaustive}
    names = [name for name, value in given.items() if value not in (None, False)]
    if names and args.granularity is not None:
        raise ValueError(f"--granularity looks once; it does not go with {', '.join(names)}.")
    if names and (args.stream or args.options is not None or args.show_kept):
        raise ValueError(f"{', '.join(names)} does not go with --stream, --options or --show-kept.")


def check_model(pipe: "VideoQuestionAnsweringPipeline", args: argparse.Namespace) -> bool:
    """Tell whether a question goes through both granularities of a model.

    Raises:
        ValueError: an argument is given that the model does not know.
    """
    from longvideo.cross_granularity.modules import has_granularities

    is_video = visual_kind(args.video) == "video"
    if not (has_granularities(pipe) and is_video) and speaks_of_rounds(args):
        what = f"a {pipe.model.config.model_type} model" if is_video else "a picture"
        raise ValueError(
            f"--trace, --max-rounds, --exhaustive and --granularity need a video and a crossvllm model; got {what}."
        )
    return has_granularities(pipe) and is_video and args.granularity is None


def answer(
    pipe: "VideoQuestionAnsweringPipeline", args: argparse.Namespace, call: dict[str, Any], report: dict[str, Any]
) -> int:
    """Ask, draw and print."""
    from longvideo.cross_granularity.drawing import drawn_rounds
    from longvideo.cross_granularity.trace import describe_rounds

    if args.show_kept:
        raise ValueError(
            "--show-kept needs a model that drops or merges tokens; CrossVLLM keeps as many of every frame."
        )
    result = pipe(video=args.video, question=args.question, return_timings=True, stream=args.stream, **call)
    if args.draw:
        from longvideo.draw_grounding import draw_grounding

        draw_grounding(drawn_rounds(result), args.draw, video=args.video, title=args.question)
    if args.json:
        names = ("answer", "segment", "reason", "num_calls", "duration", "timings")
        extra = {name: result[name] for name in ("events", *(["rounds"] if args.trace else [])) if name in result}
        drawing = {"drawing": args.draw} if args.draw else {}
        print(json.dumps({**report, **{name: result[name] for name in names}, **extra, **drawing}, indent=2))
        return 0
    print(result["answer"])
    lines = describe_rounds(result)
    for line in lines if args.trace else lines[-1:]:
        print(line, file=sys.stderr)
    print(f"{result['timings']['total']:.2f} s", file=sys.stderr)
    if args.draw:
        print(f"answer drawn in {args.draw}", file=sys.stderr)
    return 0
