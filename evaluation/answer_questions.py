"""Accuracy of a model on held-out questions about procedural videos, four options each.

    python -m longvideo.evaluation.answer_questions --model DIR --num 500
    python -m longvideo.evaluation.answer_questions --model longvu

The videos are written as mp4 files and go through the processor and the model as any user's video does. An option's
score is the sum of the log-probabilities of its tokens and of the end token, given video and question; the option with
the highest score is the answer. In the form "open" the options are short texts that the question does not show, in the
form "letter" the question lists them and the scored texts are the letters A to D.
"""

import argparse
import contextlib
import copy
import inspect
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, ProcessorMixin
from transformers.modeling_outputs import ModelOutput

from longvideo.evaluation.command import run_command
from longvideo.evaluation.corpus import KINDS, Item, Question, balanced_items, write_video
from longvideo.evaluation.corpus.questions import NUM_OPTIONS, OPTION_LETTERS
from longvideo.evaluation.corpus.rows import FORMS
from longvideo.evaluation.metrics import accuracy, wilson_interval

NUM_FRAMES = 16


@dataclass(frozen=True)
class Answered:
    """One scored question: `chosen` and `truth` are places among `options`, `scores` sums of log-probabilities."""

    video: str
    kind: str
    question: str
    options: tuple[str, ...]
    truth: int
    chosen: int
    scores: tuple[float, ...]

    @property
    def correct(self) -> bool:
        """Whether the truth was chosen."""
        return self.chosen == self.truth


def prompt_ids(
    processor: ProcessorMixin, path: Path, texts: list[str], num_frames: int
) -> tuple[Any, list[list[int]]]:
    """Runs the processor on one video with several questions.

    Args:
        processor: processor of the model.
        path: video file.
        texts: questions, one prompt each.
        num_frames: frames to sample.

    Returns:
        Processor output (each question with its own copy of the video), and the token ids of each prompt up to the
        place where the answer begins, without padding.
    """
    messages = [
        [{"role": "user", "content": [{"type": "video", "path": str(path)}, {"type": "text", "text": text}]}]
        for text in texts
    ]
    inputs = processor.apply_chat_template(
        messages,
        tokenize=True,
        return_dict=True,
        add_generation_prompt=True,
        processor_kwargs={"return_tensors": "pt", "padding": True, "num_frames": num_frames},
    )
    rows = zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
    return inputs, [ids[mask.bool()].tolist() for ids, mask in rows]


def encode_first_video(model: PreTrainedModel, inputs: Any) -> ModelOutput:
    """Encodes the first video of a batch once, for all questions about it.

    Args:
        model: model with `get_video_features`.
        inputs: processor output; every `pixel_values_videos*` and `video_*` tensor belongs to the videos.

    Returns:
        What `forward` takes as `mm_encoder_outputs={"video": ...}`.
    """
    counts = inputs.get("video_num_frames")
    first = {}
    for name, value in inputs.items():
        if name.startswith("pixel_values_videos"):
            is_flat = counts is not None and value.dim() == 4
            first[name] = value[: int(counts[0]) if is_flat else 1].to(model.device, model.dtype)
        elif name.startswith("video_") and isinstance(value, torch.Tensor):
            first[name] = value[:1].to(model.device)
    return model.get_video_features(**first, return_dict=True)


def read_prompt(
    model: PreTrainedModel, encoded: ModelOutput, prompt: list[int], *, visual_dropout: bool | None = None
) -> ModelOutput:
    """Runs the model on video and question, as generation does before the first new token.

    Args:
        model: model that takes `mm_encoder_outputs`.
        encoded: video, from `encode_first_video`.
        prompt: token ids up to the answer.
        visual_dropout: passed to the model; None leaves it as configured.

    Returns:
        The model's output: `logits` of the last position, `past_key_values`, and what the model tells of its choices.
    """
    return model(
        input_ids=torch.tensor([prompt], device=model.device),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long, device=model.device),
        mm_encoder_outputs={"video": encoded},
        use_cache=True,
        logits_to_keep=1,
        **({} if visual_dropout is None else {"visual_dropout": visual_dropout}),
    )


def score_answers(model: PreTrainedModel, read: ModelOutput, num_ids: int, answers: list[list[int]]) -> list[float]:
    """Scores answers to a prompt that the model has read.

    Args:
        model: the model.
        read: from `read_prompt`; it is left as it is.
        num_ids: token ids of the prompt.
        answers: token ids of each answer, with the end token.

    Returns:
        For each answer the sum of the log-probabilities of its tokens.
    """
    # A model that puts visual tokens in place of a single placeholder returns the mask that fits its cache.
    seen = read.get("attention_mask")
    seen = torch.ones(1, num_ids, dtype=torch.long, device=model.device) if seen is None else seen
    first = read.logits[0, -1:].float()
    scores = []
    for answer in answers:
        logits = first
        if len(answer) > 1:
            output = model(
                input_ids=torch.tensor([answer[:-1]], device=model.device),
                attention_mask=torch.cat([seen, seen.new_ones(1, len(answer) - 1)], dim=1),
                # Answers are read one by one behind copies of the prompt's cache: what a model notes there about its
                # prompt is for one row, and an answer in the prompt itself could decide about what is seen.
                past_key_values=copy.deepcopy(read.past_key_values),
                use_cache=True,
            )
            logits = torch.cat([first, output.logits[0].float()])
        picked = logits.log_softmax(-1).gather(-1, torch.tensor(answer, device=logits.device)[:, None])
        scores.append(float(picked.sum()))
    return scores


def score_options(
    model: PreTrainedModel,
    encoded: ModelOutput,
    prompt: list[int],
    answers: list[list[int]],
    *,
    visual_dropout: bool | None = None,
) -> list[float]:
    """Scores answers to one prompt; what the model sees of the video is chosen by the prompt alone.

    Args:
        model: model that takes `mm_encoder_outputs`.
        encoded: video, from `encode_first_video`.
        prompt: token ids up to the answer.
        answers: token ids of each answer, with the end token.
        visual_dropout: passed to the model; None leaves it as configured.

    Returns:
        For each answer the sum of the log-probabilities of its tokens.
    """
    read = read_prompt(model, encoded, prompt, visual_dropout=visual_dropout)
    return score_answers(model, read, len(prompt), answers)


def answer_ids(tokenizer: Any, question: Question, form: str) -> list[list[int]]:
    """Token ids of the four scored texts of a question, each with the end token."""
    texts = list(OPTION_LETTERS) if form == "letter" else list(question.options)
    return [[*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id] for text in texts]


def answer_item(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    item: Item,
    path: Path,
    *,
    form: str = "open",
    num_frames: int | None = None,
    visual_dropout: bool | None = None,
) -> list[Answered]:
    """Answers the questions about one video.

    Args:
        model: model in evaluation mode.
        processor: its processor.
        item: scene and questions.
        path: the scene as a video file.
        form: "open" or "letter".
        num_frames: frames to sample; None takes those of `default_frames`.
        visual_dropout: passed to the model; None leaves it as configured.

    Returns:
        One result per question.
    """
    texts = [q.multiple_choice if form == "letter" else q.question for q in item.questions]
    num_frames = default_frames(model, processor) if num_frames is None else num_frames
    inputs, prompts = prompt_ids(processor, path, texts, num_frames)
    encoded = encode_first_video(model, inputs)
    results = []
    for question, prompt in zip(item.questions, prompts, strict=True):
        answers = answer_ids(processor.tokenizer, question, form)
        scores = score_options(model, encoded, prompt, answers, visual_dropout=visual_dropout)
        chosen = max(range(NUM_OPTIONS), key=scores.__getitem__)
        rounded = tuple(round(score, 4) for score in scores)
        results.append(_record(path.name, question, chosen, rounded))
    return results


def _record(video: str, question: Question, chosen: int, scores: tuple[float, ...]) -> Answered:
    return Answered(
        video, question.kind, question.question, question.options, question.answer_index, chosen, tuple(scores)
    )


def summarize(results: Iterable[Answered]) -> dict[str, dict[str, Any]]:
    """Accuracy with its 95 % interval per kind, in the order of KINDS, and under "all"."""
    results = list(results)
    groups = {kind: [r.correct for r in results if r.kind == kind] for kind in KINDS}
    groups = {kind: correct for kind, correct in groups.items() if correct} | {"all": [r.correct for r in results]}
    summary = {}
    for kind, correct in groups.items():
        low, high = wilson_interval(sum(correct), len(correct))
        summary[kind] = {"num": len(correct), "num_correct": sum(correct), "accuracy": accuracy(correct)}
        summary[kind]["interval_95"] = [low, high]
    return summary


def format_table(summary: dict[str, dict[str, Any]]) -> str:
    """The summary as a table with one line per kind."""
    lines = [f"{'kind':<10} {'n':>4} {'right':>5}  accuracy  95 % interval"]
    for kind, row in summary.items():
        low, high = row["interval_95"]
        share = f"{100 * row['accuracy']:5.1f} %"
        lines.append(
            f"{kind:<10} {row['num']:>4} {row['num_correct']:>5}  {share:>8}  {100 * low:.1f} - {100 * high:.1f} %"
        )
    return "\n".join(lines)


@torch.no_grad()
def evaluate(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    num: int = 500,
    *,
    form: str = "open",
    split: str = "held_out",
    seed: int = 0,
    kinds: Iterable[str] | None = None,
    size: int = 128,
    num_frames: int | None = None,
    visual_dropout: bool | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Answered]:
    """Writes videos to a temporary folder and answers questions about them.

    Args:
        model: model with `get_video_features`.
        processor: its processor.
        num: number of questions, spread evenly over the kinds.
        form: "open" or "letter".
        split: "held_out" or "train".
        seed: first scene.
        kinds: kinds to ask; default all.
        size: side of the videos in pixels.
        num_frames: frames to sample; None takes those of `default_frames`.
        visual_dropout: passed to the model; None leaves it as configured.
        progress: called with the number of answered questions and their total.

    Returns:
        One result per question; the same arguments give the same questions in the same order.

    Raises:
        ValueError: unknown form, split or kind, or num below 1.
    """
    if form not in FORMS:
        raise ValueError(f"unknown form {form!r}: use {' or '.join(FORMS)}")
    items = balanced_items(num, split=split, seed=seed, kinds=kinds)
    model.eval()
    results: list[Answered] = []
    with tempfile.TemporaryDirectory(prefix="longvideo-questions-") as folder:
        for item in items:
            path = Path(folder, f"{split}_{item.scene.seed:06d}.mp4")
            write_video(item.scene, path, size=(size, size))
            results += answer_item(
                model, processor, item, path, form=form, num_frames=num_frames, visual_dropout=visual_dropout
            )
            path.unlink()
            if progress is not None:
                progress(len(results), num)
    return results


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m longvideo.evaluation.answer_questions",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--model",
        default="videochat_flash",
        help="folder, id, or architecture whose tiny checkpoint comes with the package (default videochat_flash)",
    )
    parser.add_argument("--num", type=int, default=500, help="number of questions (default 500)")
    parser.add_argument("--form", choices=FORMS, default="open", help="scored texts: the options, or their letters")
    parser.add_argument("--split", choices=("held_out", "train"), default="held_out")
    parser.add_argument("--seed", type=int, default=0, help="first scene (default 0)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=None, help="kinds of questions (default all)")
    parser.add_argument("--size", type=int, default=128, help="side of the videos in pixels (default 128)")
    parser.add_argument(
        "--num-frames",
        type=int,
        default=None,
        help=f"sampled frames (default {NUM_FRAMES}, or the number that the model takes of every video)",
    )
    parser.add_argument("--visual-dropout", choices=("config", "on", "off"), default="config")
    parser.add_argument("--dtype", default="float32", help="float32 (default), bfloat16, float16 or auto")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, ...")
    parser.add_argument("--json", default=None, metavar="FILE", help="write the summary and every answer")
    return parser.parse_args(argv)


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Writes values to a file under a temporary name first, and makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def show_progress(done: int, total: int) -> None:
    """Tells on standard error how far an evaluation is: a running line on a terminal, otherwise the end only."""
    if sys.stderr.isatty() or done == total:
        print(f"\r{done}/{total} questions", end="\n" if done == total else "", file=sys.stderr, flush=True)


def load_checkpoint(
    name: str, *, dtype: str = "float32", device: str = "cpu"
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Loads a model with its processor.

    Args:
        name: folder, id on the Hub, or an architecture whose tiny checkpoint comes with the package.
        dtype: type of the weights.
        device: where to put the model.

    Returns:
        The model in evaluation mode, and the processor.

    Raises:
        OSError: nothing is found under that name.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    import longvideo

    folder = name
    if not os.path.isdir(name):
        with contextlib.suppress(ValueError):
            folder = longvideo.tiny_checkpoint(name)
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype).to(device)
    return model.eval(), processor


def default_frames(model: PreTrainedModel, processor: ProcessorMixin) -> int:
    """Number of frames to sample: that of the model, where it takes the same of every video, otherwise NUM_FRAMES."""
    return model.config.num_frames if getattr(processor, "has_fixed_num_frames", False) else NUM_FRAMES


def run(args: argparse.Namespace) -> int:
    """Loads the model, answers, prints the table; returns the exit code."""
    model, processor = load_checkpoint(args.model, dtype=args.dtype, device=args.device)
    if args.visual_dropout != "config" and "visual_dropout" not in inspect.signature(model.forward).parameters:
        raise ValueError(f"{type(model).__name__} has no visual dropout; leave --visual-dropout out.")
    num_frames = default_frames(model, processor) if args.num_frames is None else args.num_frames
    settings = {"form": args.form, "split": args.split, "seed": args.seed, "size": args.size}
    settings |= {"num_frames": num_frames, "kinds": args.kinds}
    dropout = {"config": None, "on": True, "off": False}[args.visual_dropout]
    start = time.perf_counter()
    results = evaluate(model, processor, args.num, **settings, visual_dropout=dropout, progress=show_progress)
    seconds = time.perf_counter() - start
    summary = summarize(results)
    print(format_table(summary))
    print(f"chance 25.0 %; {args.split} questions with four options; form: {args.form}; score: sum of the")
    print(f"log-probabilities of answer and end token; {num_frames} frames; visual dropout: {args.visual_dropout};")
    print(f"{len({result.video for result in results})} videos, {seconds:.0f} s")
    if args.json:
        told = {**settings, "visual_dropout": args.visual_dropout, "num": args.num, "chance": 1 / NUM_OPTIONS}
        values = {"settings": told, "seconds": seconds, "summary": summary, "answers": [asdict(r) for r in results]}
        write_json(Path(args.json), values)
    return 0


def main(argv: list[str] | None = None) -> int:
    """Runs the command; user errors are one line and exit code 2."""
    args = _parse(argv)
    return run_command("answer_questions", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
