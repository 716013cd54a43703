"""`python -m longvideo.evaluation.demo`: a trained model answers questions about a real video file.

A model that answers with times and boxes is asked for both, and its answer is drawn.
"""

import argparse
import sys
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longvideo.evaluation.command import run_command
from longvideo.evaluation.corpus import (
    Grounding,
    Question,
    Scene,
    list_grounded_events,
    make_groundings,
    make_questions,
    make_scene,
    write_video,
)
from longvideo.processing.llava_st.grounding_llava_st import GroundingResult

KINDS = ("colour", "direction", "needle", "order", "shape", "count", "at_time", "when")
NUM_QUESTIONS = 3
MAX_NEW_TOKENS = 32
DEFAULT_QUESTION = "What happens in the video?"
WIDTH = 78
SIZE = (256, 256)  # pixels of the rendered video


@dataclass
class Asked:
    """One question with its answer.

    Args:
        question: text that was asked.
        answer: text that was generated.
        truth: right answer, None where nobody knows it.
        kind: kind of the question, empty for a question of the user.
        seconds: time for everything, decoding included.
        token_counts: of the pipeline.
    """

    question: str
    answer: str
    truth: str | None
    kind: str
    seconds: float
    token_counts: dict[str, Any]


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the command."""
    parser = argparse.ArgumentParser(prog="python -m longvideo.evaluation.demo", description=__doc__)
    parser.add_argument("--video", metavar="PATH", help="ask about this file instead of a rendered one")
    parser.add_argument(
        "--question",
        metavar="TEXT",
        help=f'what to ask about --video (default "{DEFAULT_QUESTION}"), or what shall be found',
    )
    parser.add_argument("--model", metavar="PATH_OR_ID", help="checkpoint (default: the tiny one in the package)")
    parser.add_argument("--seed", type=int, default=7, help="which held-out scene is rendered (default 7)")
    parser.add_argument(
        "--out", default="outputs/demo", metavar="DIR", help="where the files go (default outputs/demo)"
    )
    return parser


def pick_scene(seed: int) -> tuple[Scene, list[Question]]:
    """Find the first held-out scene from a seed on that allows three kinds of questions.

    Args:
        seed: number of the scene to begin with.

    Returns:
        The scene and three questions of different kinds.
    """
    for number in range(seed, seed + 100):
        scene = make_scene(number, "held_out")
        found = {question.kind: question for question in make_questions(scene)}
        kinds = [kind for kind in KINDS if kind in found]
        # Scenes differ in what they allow; starting elsewhere each time shows every kind sooner or later.
        kinds = kinds[number % len(kinds) :] + kinds[: number % len(kinds)] if kinds else kinds
        if len(kinds) >= NUM_QUESTIONS:
            return scene, [found[kind] for kind in kinds[:NUM_QUESTIONS]]
    raise ValueError(f"No scene with {NUM_QUESTIONS} kinds of questions from seed {seed} on; choose another seed.")


def pick_event(seed: int, num_frames: int) -> tuple[Scene, str, Grounding]:
    """Find the first held-out scene from a seed on in which a shape moves.

    Args:
        seed: number of the scene to begin with.
        num_frames: frames that the model sees.

    Returns:
        The scene, the words for the movement, and when and where it is.
    """
    for number in range(seed, seed + 100):
        scene = make_scene(number, "held_out")
        events = [event.caption for event in list_grounded_events(scene, num_frames)]
        for truth in make_groundings(scene, ["stvg"], size=SIZE, num_frames=num_frames):
            if truth.bucket == "moves":
                return scene, next(words for words in events if words in truth.question), truth
    raise ValueError(f"No scene with a movement from seed {seed} on; choose another seed.")


def spread_dropout(num_layers: int) -> dict[str, Any]:
    """Scale the dropout setting of the VideoChat-Flash card to a decoder's depth.

    Args:
        num_layers: layers of the language model.

    Returns:
        `visual_dropout` with 0.75 of the tokens after 1/7 and 0.25 after 5/8 of the layers.

    Source: VideoChat-Flash, table 7 (uniform 0.75 at layer 4, attention 0.25 at layer 18 of 28).
    """
    first = max(1, round(num_layers / 7))
    second = min(max(first + 1, round(num_layers * 18 / 28)), num_layers - 1)
    if second <= first:
        return {"type": "uniform", "layers": [first], "ratios": [1.0, 0.5]}
    return {"type": "uniform0_attention", "layers": [first, second], "ratios": [1.0, 0.75, 0.25]}


def ask(pipe: Any, video: Path, question: str, *, truth: str | None = None, kind: str = "", **call: Any) -> Asked:
    """Ask one question and take the time.

    Args:
        pipe: video question answering pipeline.
        video: file.
        question: text.
        truth: right answer, if known.
        kind: kind of the question.
        **call: more arguments of the pipeline.

    Returns:
        Question, answer and what it took; the pipeline's `kept_tokens` stay in `token_counts["kept"]` when asked for.
    """
    begin = time.perf_counter()
    result = pipe(str(video), question, max_new_tokens=MAX_NEW_TOKENS, return_token_counts=True, **call)
    counts = dict(result["token_counts"])
    if "kept_tokens" in result:
        counts["kept"] = result["kept_tokens"]
    return Asked(question, result["answer"], truth, kind, time.perf_counter() - begin, counts)


def format_tokens(counts: dict[str, Any]) -> str:
    """Write the numbers of tokens from the patches of the frames to the last stage."""
    from longvideo.pipelines.accounting import token_steps

    return f"{' -> '.join(token_steps(counts))} ({counts['frames']} frames)"


def wrap(lines: list[tuple[str, str]]) -> list[str]:
    """Break texts into lines of WIDTH characters, each text behind its label."""
    wrapped = []
    for label, text in lines:
        parts = textwrap.wrap(text, WIDTH - 11) or [""]
        wrapped += [f"{label:<10} {parts[0]}", *(f"{'':<10} {part}" for part in parts[1:])]
    return wrapped


def format_asked(rows: list[Asked]) -> str:
    """Lay questions and answers out as a plain table of label and text."""
    blocks = []
    for row in rows:
        lines = [("Question", row.question + (f"  [{row.kind}]" if row.kind else "")), ("Answer", row.answer)]
        if row.truth is not None:
            right = row.answer.strip().rstrip(".").lower() == row.truth.strip().rstrip(".").lower()
            lines.append(("Truth", f"{row.truth}  ({'right' if right else 'wrong'})"))
        lines += [("Time", f"{row.seconds:.2f} s"), ("Tokens", format_tokens(row.token_counts))]
        blocks.append("\n".join(wrap(lines)))
    return f"\n{'-' * WIDTH}\n".join(blocks)


def run(args: argparse.Namespace) -> int:
    """Load the model, ask it what it can answer, print, draw."""
    import longvideo
    from longvideo.pipelines import load_pipeline
    from longvideo.pipelines.grounding import answers_with_places
    from longvideo.pipelines.inputs import check_source

    if args.question is not None and args.video is None:
        raise ValueError("--question needs --video: the rendered video comes with its own questions.")
    if args.video is not None:
        check_source(args.video)
    out = Path(args.out)
    model = args.model or str(longvideo.tiny_checkpoint("videochat_flash"))
    pipe = load_pipeline(model)
    out.mkdir(parents=True, exist_ok=True)
    print(f"Model      {'tiny VideoChat-Flash of the package' if args.model is None else model}")
    return (show_places if answers_with_places(pipe.processor) else show_answers)(pipe, args, out)


def show_answers(pipe: Any, args: argparse.Namespace, out: Path) -> int:
    """Ask a model of words three questions, and draw what it kept of the video for the last one.

    Args:
        pipe: video question answering pipeline.
        args: of the command.
        out: folder for the files.

    Returns:
        The exit code.
    """
    from longvideo.show_kept import draw_kept

    if args.video is not None:
        video = Path(args.video)
        asked: list[tuple[str, str | None, str]] = [(args.question or DEFAULT_QUESTION, None, "")]
    else:
        scene, questions = pick_scene(args.seed)
        video = write_video(scene, out / f"scene_{scene.seed}.mp4", size=SIZE)
        asked = [(question.question, question.answer, question.kind) for question in questions]
    print(f"Video      {video}\n{'=' * WIDTH}")
    rows = [ask(pipe, video, text, truth=truth, kind=kind) for text, truth, kind in asked]
    print(format_asked(rows))

    text, truth, kind = asked[-1]
    call, words = {}, ""
    if pipe.supports_dropout():
        call["visual_dropout"] = spread_dropout(pipe.model.config.get_text_config().num_hidden_layers)
        words = ", with visual dropout inside the language model"
    again = ask(pipe, video, text, truth=truth, kind=kind, return_kept_tokens=True, **call)
    picture = draw_kept(again.token_counts["kept"], out / "kept_tokens.png")
    print(f"{'=' * WIDTH}\nThe last question again{words}:")
    print(format_asked([again]))
    print(f"{'=' * WIDTH}\nPicture of the kept tokens: {picture}")
    return 0


def show_places(pipe: Any, args: argparse.Namespace, out: Path) -> int:
    """Ask a model of times and boxes when and where something happens, and draw its answer on the video.

    Args:
        pipe: video question answering pipeline.
        args: of the command; its question names what is looked for, and without one all events are asked for.
        out: folder for the files.

    Returns:
        The exit code, 0 as well where the answer holds nothing that could be drawn.
    """
    from longvideo.cli.ask import describe_places
    from longvideo.draw_grounding import draw_grounding

    truth = None
    if args.video is not None:
        video, words, task = Path(args.video), args.question, "stvg" if args.question else "dvc"
    else:
        scene, words, truth = pick_event(args.seed, pipe.model.config.num_frames)
        video, task = write_video(scene, out / f"scene_{scene.seed}.mp4", size=SIZE), "stvg"
    print(f"Video      {video}\n{'=' * WIDTH}")
    begin = time.perf_counter()
    # A box at every frame takes ten tokens each; spans and words some fifty more.
    most = 10 * pipe.model.config.num_frames + 60
    result = pipe(str(video), words, grounding_task=task, max_new_tokens=most, return_token_counts=True)
    found = result["grounding"]
    lines = [("Question", f"{'When and where: ' + words if words else 'All events.'}  [{task}]")]
    lines += [("Answer", result["answer"]), *(("Found", line) for line in describe_places(found))]
    if truth is not None:
        known = GroundingResult("", spans=(truth.span,), tubes=(truth.tube,))
        lines += [("Truth", line) for line in describe_places(known)]
    lines.append(("Time", f"{time.perf_counter() - begin:.2f} s"))
    lines.append(("Tokens", format_tokens(result["token_counts"])))
    print("\n".join(wrap(lines)))
    try:
        picture = f": {draw_grounding(found, out / 'grounding.png', video=str(video), title=words or '')}"
    except ValueError as error:
        picture = f" not drawn: {error}"
    print(f"{'=' * WIDTH}\nPicture of the times and boxes{picture}")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the command; a fault of the input is one line on stderr and exit code 2."""
    args = build_parser().parse_args(argv)
    return run_command("demo", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
