"""`longvideo ask VIDEO QUESTION`."""

import argparse
import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longvideo.cli import ask_rounds
from longvideo.cli.sources import visual_kind

if TYPE_CHECKING:
    from longvideo.pipelines import VideoQuestionAnsweringPipeline

HELP = (
    "Ask a question about a video file and print the answer. Without --model the tiny checkpoint inside the package "
    "answers; it knows coloured shapes only."
)
TINY = "videochat_flash"
TINY_WITH_PLACES = "llava_st"
TINY_WITH_ROUNDS = "crossvllm"
TITLES = {TINY: "VideoChat-Flash", TINY_WITH_PLACES: "LLaVA-ST", TINY_WITH_ROUNDS: "CrossVLLM"}
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("video", metavar="VIDEO", help="video file, URL or folder of pictures")
    parser.add_argument(
        "question",
        metavar="QUESTION",
        nargs="?",
        help="what to ask; with --task what is looked for, where it needs that",
    )
    parser.add_argument("--model", metavar="PATH_OR_ID", help="checkpoint folder or Hub id (default: the tiny one)")
    parser.add_argument("--json", action="store_true", help="print one JSON object with timings and token counts")
    parser.add_argument("--stream", action="store_true", help="print the answer while it is being written")
    parser.add_argument("--show-kept", metavar="PNG", help="draw the frames with the tokens that survive compression")
    places = parser.add_argument_group("times and places (LLaVA-ST)")
    places.add_argument(
        "--task",
        metavar="NAME",
        help="ask in the words of a task: tvg, tr, stvg, svg, elc, dvc (rec, reg, dgc: pictures)",
    )
    places.add_argument(
        "--span", metavar="FROM[,TO]", help="the period of --task svg or tr, the start of elc, in seconds"
    )
    places.add_argument(
        "--box", metavar="X1,Y1,X2,Y2", help="the region of --task elc or reg, in pixels of the source"
    )
    places.add_argument("--draw", metavar="MP4_OR_PNG", help="draw the answer: spans on a time line, boxes on frames")
    ask_rounds.configure(parser)
    frames = parser.add_argument_group("frames")
    frames.add_argument("--num-frames", type=int, metavar="N", help="sample exactly N frames")
    frames.add_argument("--fps", type=float, metavar="X", help="sample X frames per second")
    frames.add_argument("--min-frames", type=int, metavar="N", help="at least N frames")
    frames.add_argument("--max-frames", type=int, metavar="N", help="at most N frames")
    frames.add_argument("--start", type=float, metavar="SECONDS", help="leave out what comes before")
    frames.add_argument("--end", type=float, metavar="SECONDS", help="leave out what comes after")
    model = parser.add_argument_group("model")
    model.add_argument(
        "--visual-dropout",
        metavar="on|off|TYPE:LAYERS:RATIOS",
        help="dropping of visual tokens inside the language model, for example uniform0_attention:4,18:1,0.75,0.25",
    )
    model.add_argument("--max-new-tokens", type=int, metavar="N", help="longest answer in tokens (default 256)")
    model.add_argument("--device", help="cpu, cuda:0 ... (default: the first accelerator, else the CPU)")
    model.add_argument("--dtype", default="auto", help="auto, bf16, fp16 or fp32 (default: as saved)")
    model.add_argument(
        "--options", nargs="+", metavar="TEXT", help="compare these answers by their likelihood instead"
    )


def parse_visual_dropout(text: str | None) -> bool | dict[str, Any] | None:
    """Read `on`, `off` or TYPE:LAYERS:RATIOS.

    Args:
        text: the command-line value; None means that the checkpoint decides.

    Returns:
        What `generate(visual_dropout=...)` takes.

    Raises:
        ValueError: another form, or counts of layers and ratios that do not belong together.
    """
    if text is None or text in ("on", "off"):
        return None if text is None else text == "on"
    parts = text.split(":")
    try:
        kind, layers_text, ratios_text = parts
        layers = [int(value) for value in layers_text.split(",") if value]
        ratios = [float(value) for value in ratios_text.split(",") if value]
    except ValueError as error:
        raise ValueError(
            f"--visual-dropout takes on, off or TYPE:LAYERS:RATIOS such as uniform0_attention:4,18:1,0.75,0.25; "
            f"got {text!r}."
        ) from error
    if len(ratios) != len(layers) + 1:
        raise ValueError(
            f"--visual-dropout needs one ratio more than layers (the first is the share before any drop); "
            f"got {len(layers)} layers and {len(ratios)} ratios in {text!r}."
        )
    return {"type": kind, "layers": layers, "ratios": ratios}


def parse_numbers(name: str, text: str | None, counts: tuple[int, ...]) -> list[float] | None:
    """Read numbers with commas between them.

    Args:
        name: the option, for the message.
        text: the command-line value or None.
        counts: how many there may be.

    Returns:
        The numbers, or None.

    Raises:
        ValueError: something else.
    """
    if text is None:
        return None
    wanted = " or ".join(map(str, counts))
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) not in counts or not all(map(math.isfinite, numbers)):
        raise ValueError(f"{name} takes {wanted} numbers with commas between them, got {text!r}.")
    return numbers


def task_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """Return what the pipeline is told about a task: its name, span and box, where they are given."""
    span = parse_numbers("--span", args.span, (1, 2))
    values = {
        "grounding_task": args.task,
        "span": span[0] if span is not None and len(span) == 1 else span,
        "box": parse_numbers("--box", args.box, (4,)),
    }
    return {name: value for name, value in values.items() if value is not None}


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse what cannot work before a model is loaded.

    Raises:
        ValueError: with the argument and what it should be.
        OSError: the video does not exist, or the picture's folder.
    """
    from longvideo.pipelines.inputs import check_question, check_source

    ask_rounds.check_arguments(args)
    check_source(args.video, visual_kind(args.video))
    if args.task is None or args.question is not None:
        check_question(args.question)
    if args.task is None and (args.span or args.box):
        raise ValueError("--span and --box say what a --task is about; give a --task too.")
    task_arguments(args)
    for name in ("num_frames", "fps", "min_frames", "max_frames", "max_new_tokens"):
        value = getattr(args, name)
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise ValueError(f"--{name.replace('_', '-')} must be greater than 0, got {value}.")
    if args.num_frames is not None and args.fps is not None:
        raise ValueError("--num-frames and --fps exclude each other; give one.")
    if args.min_frames is not None and args.max_frames is not None and args.min_frames > args.max_frames:
        raise ValueError(f"--min-frames {args.min_frames} is more than --max-frames {args.max_frames}.")
    if args.start is not None and args.end is not None and args.start >= args.end:
        raise ValueError(f"--start {args.start:g} s must come before --end {args.end:g} s.")
    if args.options is not None and (args.stream or args.show_kept or args.draw):
        raise ValueError("--options only compares likelihoods; it does not go with --stream, --show-kept or --draw.")
    if args.stream and args.json:
        raise ValueError("--stream and --json exclude each other; give one.")
    if args.show_kept:
        check_picture_path(Path(args.show_kept))
    if args.draw:
        from longvideo.draw_grounding import check_target

        check_target(args.draw, is_video=visual_kind(args.video) == "video")


def check_picture_path(path: Path) -> None:
    """Refuse a picture that could not be written, before minutes of work.

    Raises:
        ValueError: the ending names no picture format.
        OSError: there is no such folder, or the path is a folder.
    """
    if path.suffix.lower() not in PICTURE_SUFFIXES:
        raise ValueError(f"--show-kept writes {', '.join(PICTURE_SUFFIXES)}; got '{path}'.")
    if path.is_dir():
        raise IsADirectoryError(f"--show-kept '{path}' is a folder; give a file name.")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"The folder of --show-kept '{path}' does not exist; make it first.")


def run(args: argparse.Namespace) -> int:
    """Load the model, ask, print."""
    check_arguments(args)
    dropout = parse_visual_dropout(args.visual_dropout)
    from transformers.utils import logging

    import longvideo
    from longvideo.pipelines import load_pipeline
    from longvideo.pipelines.grounding import answers_with_places

    model = args.model
    if model is None:
        with_rounds = ask_rounds.speaks_of_rounds(args)
        name = TINY_WITH_ROUNDS if with_rounds else TINY_WITH_PLACES if args.task or args.draw else TINY
        try:
            model = str(longvideo.tiny_checkpoint(name))
        except ValueError as error:
            raise ValueError(f"{error} Name a {TITLES.get(name, name)} checkpoint with --model.") from error
        print(
            f"No --model given: the tiny embedded {TITLES[name]} answers. It was trained on coloured shapes only.",
            file=sys.stderr,
        )
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    pipe = load_pipeline(model, device=args.device, dtype=args.dtype)
    names = ("num_frames", "fps", "min_frames", "max_frames", "start", "end")
    call = {name: getattr(args, name) for name in names if getattr(args, name) is not None} | task_arguments(args)
    call |= ask_rounds.arguments(args)
    in_rounds = ask_rounds.check_model(pipe, args)
    if args.draw and not in_rounds and not answers_with_places(pipe.processor):
        kind = pipe.model.config.model_type
        raise ValueError(f"--draw needs a model that answers with times and boxes; '{model}' is a {kind} model.")
    if dropout is not None:
        call["visual_dropout"] = dropout
    report: dict[str, Any] = {"video": args.video, "question": args.question, "model": model}
    if args.options is not None:
        return _compare(pipe, args, call, report)
    if args.max_new_tokens is not None:
        call["max_new_tokens"] = args.max_new_tokens
    if in_rounds and args.options is None:
        return ask_rounds.answer(pipe, args, call, report)
    return _answer(pipe, args, call, report)


def _compare(
    pipe: "VideoQuestionAnsweringPipeline", args: argparse.Namespace, call: dict[str, Any], report: dict[str, Any]
) -> int:
    scores = pipe.score_options(args.video, args.question, args.options, **call)
    best = args.options[scores.index(max(scores))]
    if args.json:
        options = [{"text": text, "score": score} for text, score in zip(args.options, scores, strict=True)]
        print(json.dumps({**report, "answer": best, "options": options}, indent=2))
        return 0
    total = sum(math.exp(score) for score in scores)
    for text, score in sorted(zip(args.options, scores, strict=True), key=lambda pair: -pair[1]):
        print(f"{math.exp(score) / total:7.1%}  {score:8.3f}  {text}")
    print("(share among the options, mean log-probability per token, option)", file=sys.stderr)
    return 0


def _answer(
    pipe: "VideoQuestionAnsweringPipeline", args: argparse.Namespace, call: dict[str, Any], report: dict[str, Any]
) -> int:
    call.update(return_timings=True, return_token_counts=True, return_kept_tokens=bool(args.show_kept) or None)
    call[visual_kind(args.video)] = args.video
    if args.stream:
        stream = pipe(question=args.question, stream=True, **call)
        for piece in stream:
            print(piece, end="", flush=True)
        print()
        result = stream.result
    else:
        result = pipe(question=args.question, **call)
    kept = result.pop("kept_tokens", None)
    if kept is not None:
        from longvideo.show_kept import draw_kept

        draw_kept(kept, args.show_kept)
    problem = _draw(result["grounding"], args) if args.draw else None
    if args.json:
        extra = {"kept_picture": args.show_kept} if kept is not None else {}
        if "grounding" in result:
            extra["grounding"] = dataclasses.asdict(result["grounding"])
        if args.draw:
            extra["drawing"] = None if problem else args.draw
        chosen = {key: result[key] for key in ("answer", "timings", "token_counts")}
        print(json.dumps({**report, **chosen, **extra}, indent=2))
    else:
        pictures = {"kept tokens": args.show_kept if kept is not None else None}
        pictures["answer"] = args.draw if problem is None else None
        _print_answer(result, pictures, with_text=not args.stream)
    if problem is not None:
        raise problem
    return 0


def _print_answer(result: dict[str, Any], pictures: dict[str, str | None], *, with_text: bool) -> None:
    if with_text:
        print(result["answer"])
    for line in describe_places(result.get("grounding")):
        print(line, file=sys.stderr)
    print(describe(result), file=sys.stderr)
    for what, path in pictures.items():
        if path:
            print(f"{what} drawn in {path}", file=sys.stderr)


def _draw(found: Any, args: argparse.Namespace) -> ValueError | None:
    """Draw an answer; return the reason where there is nothing to draw, so that the answer is shown first."""
    from longvideo.draw_grounding import draw_grounding

    title = " ".join(filter(None, [args.task and f"[{args.task}]", args.question]))
    cut = {"start": args.start, "end": args.end} if visual_kind(args.video) == "video" else {}
    try:
        draw_grounding(found, args.draw, **{visual_kind(args.video): args.video}, **cut, title=title)
    except ValueError as error:
        return error
    return None


def describe_places(found: Any) -> list[str]:
    """Write the times and boxes of an answer, one line each.

    Args:
        found: what the pipeline read in the answer, or None.

    Returns:
        Lines such as "span 1.20 to 3.60 s", and what could not be read, with the reason.
    """
    if found is None:
        return []

    def write(box: Any) -> str:
        return f"({box.x1:.0f}, {box.y1:.0f}, {box.x2:.0f}, {box.y2:.0f})"

    lines = [f"span {span.start:.2f} to {span.end:.2f} s" for span in found.spans]
    lines += [f"box {write(box)} pixels" for box in found.boxes]
    for tube in found.tubes:
        ends = " to ".join(f"{write(tube.boxes[i])} at {tube.times[i]:.2f} s" for i in (0, -1))
        lines.append(f"tube of {len(tube.times)} boxes, {ends}")
    return lines + [f"not read: {part.text!r}, {part.reason}" for part in found.malformed]


def describe(result: dict[str, Any]) -> str:
    """Return one line about frames, tokens and seconds of an answer."""
    from longvideo.pipelines.accounting import token_steps

    counts, seconds = result["token_counts"], result["timings"]
    times = ", ".join(f"{name} {value:.2f} s" for name, value in seconds.items())
    steps = " -> ".join(token_steps(counts))
    return f"{counts['frames']} frames: {steps}; {counts['text_tokens']} text tokens; {times}"
