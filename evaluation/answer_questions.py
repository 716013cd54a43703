"""Accuracy of a model on held-out questions about procedural videos, four options each.

    python -m longvideo.evaluation.answer_questions --model DIR --num 500

The videos are written as mp4 files and go through the processor and the model as any user's video does. An option's
score is the sum of the log-probabilities of its tokens and of the end token, given video and question; the option with
the highest score is the answer. In the form "open" the options are short texts that the question does not show, in the
form "letter" the question lists them and the scored texts are the letters A to D.
"""

import argparse
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
from transformers.modeling_outputs import BaseModelOutputWithPooling

from longvideo.evaluation.corpus import KINDS, Item, Question, balanced_items, write_video
from longvideo.evaluation.corpus.questions import NUM_OPTIONS, OPTION_LETTERS
from longvideo.evaluation.corpus.rows import FORMS
from longvideo.evaluation.metrics import accuracy, wilson_interval

IGNORED = -100
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


def encode_first_video(model: PreTrainedModel, inputs: Any) -> torch.Tensor:
    """Encodes the first video of a batch once, for all questions about it; (V, D)."""
    counts = inputs.get("video_num_frames")
    pixels = inputs["pixel_values_videos"]
    if counts is not None and pixels.dim() == 4:
        pixels = pixels[: int(counts[0])]
    else:
        pixels = pixels[:1]
    counts = None if counts is None else counts[:1].to(model.device)
    pixels = pixels.to(model.device, model.dtype)
    return model.get_video_features(pixels, counts, return_dict=True).pooler_output[0]


def score_options(
    model: PreTrainedModel,
    features: torch.Tensor,
    prompt: list[int],
    answers: list[list[int]],
    *,
    visual_dropout: bool | None = None,
) -> list[float]:
    """Scores answers to one prompt in one forward pass.

    The labels make the model choose the tokens that its visual dropout keeps from the last token of the prompt, as in
    generation, so that no answer decides about what is seen.

    Args:
        model: model that takes `mm_encoder_outputs` and `labels`, and returns `logits` with the `labels` that belong
            to them.
        features: (V, D) features of the video.
        prompt: token ids up to the answer.
        answers: token ids of each answer, with the end token.
        visual_dropout: passed to the model; None leaves it as configured.

    Returns:
        For each answer the sum of the log-probabilities of its tokens.
    """
    width = len(prompt) + max(len(answer) for answer in answers)
    ids = torch.zeros(len(answers), width, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    for row, answer in enumerate(answers):
        end = len(prompt) + len(answer)
        ids[row, :end] = torch.tensor(prompt + answer)
        ids[row, end:] = answer[-1]
        mask[row, :end] = 1
        labels[row, len(prompt) : end] = torch.tensor(answer)
    device = features.device
    encoded = BaseModelOutputWithPooling(pooler_output=[features] * len(answers))
    output = model(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        labels=labels.to(device),
        mm_encoder_outputs={"video": encoded},
        use_cache=False,
        **({} if visual_dropout is None else {"visual_dropout": visual_dropout}),
    )
    # With visual dropout the sequences are shorter than what went in; the model returns the labels that fit.
    fitting = output.get("labels")
    targets = (labels.to(device) if fitting is None else fitting)[:, 1:]
    wanted = targets != IGNORED
    logs = output.logits[:, :-1].float().log_softmax(-1)
    picked = logs.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return (picked * wanted).sum(1).tolist()


def answer_item(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    item: Item,
    path: Path,
    *,
    form: str = "open",
    num_frames: int = NUM_FRAMES,
    visual_dropout: bool | None = None,
) -> list[Answered]:
    """Answers the questions about one video.

    Args:
        model: model in evaluation mode.
        processor: its processor.
        item: scene and questions.
        path: the scene as a video file.
        form: "open" or "letter".
        num_frames: frames to sample.
        visual_dropout: passed to the model; None leaves it as configured.

    Returns:
        One result per question.
    """
    tokenizer = processor.tokenizer
    texts = [q.multiple_choice if form == "letter" else q.question for q in item.questions]
    inputs, prompts = prompt_ids(processor, path, texts, num_frames)
    features = encode_first_video(model, inputs)
    results = []
    for question, prompt in zip(item.questions, prompts, strict=True):
        candidates = list(OPTION_LETTERS) if form == "letter" else list(question.options)
        answers = [
            [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id] for text in candidates
        ]
        scores = score_options(model, features, prompt, answers, visual_dropout=visual_dropout)
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
    num_frames: int = NUM_FRAMES,
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
        num_frames: frames to sample.
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
    parser.add_argument("--model", default=None, help="folder or id (default: the tiny checkpoint of the package)")
    parser.add_argument("--num", type=int, default=500, help="number of questions (default 500)")
    parser.add_argument("--form", choices=FORMS, default="open", help="scored texts: the options, or their letters")
    parser.add_argument("--split", choices=("held_out", "train"), default="held_out")
    parser.add_argument("--seed", type=int, default=0, help="first scene (default 0)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=None, help="kinds of questions (default all)")
    parser.add_argument("--size", type=int, default=128, help="side of the videos in pixels (default 128)")
    parser.add_argument("--num-frames", type=int, default=NUM_FRAMES, help=f"sampled frames (default {NUM_FRAMES})")
    parser.add_argument("--visual-dropout", choices=("config", "on", "off"), default="config")
    parser.add_argument("--dtype", default="float32", help="float32 (default), bfloat16, float16 or auto")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, ...")
    parser.add_argument("--json", default=None, metavar="FILE", help="write the summary and every answer")
    return parser.parse_args(argv)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _show_progress(done: int, total: int) -> None:
    if sys.stderr.isatty() or done == total:
        print(f"\r{done}/{total} questions", end="\n" if done == total else "", file=sys.stderr, flush=True)


def run(args: argparse.Namespace) -> int:
    """Loads the model, answers, prints the table; returns the exit code."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    import longvideo

    folder = args.model or longvideo.tiny_checkpoint("videochat_flash")
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=args.dtype).to(args.device)
    settings = {"form": args.form, "split": args.split, "seed": args.seed, "size": args.size}
    settings |= {"num_frames": args.num_frames, "kinds": args.kinds}
    dropout = {"config": None, "on": True, "off": False}[args.visual_dropout]
    start = time.perf_counter()
    results = evaluate(model, processor, args.num, **settings, visual_dropout=dropout, progress=_show_progress)
    seconds = time.perf_counter() - start
    summary = summarize(results)
    print(format_table(summary))
    print(f"chance 25.0 %; {args.split} questions with four options; form: {args.form}; score: sum of the")
    print(
        f"log-probabilities of answer and end token; {args.num_frames} frames; visual dropout: {args.visual_dropout};"
    )
    print(f"{len({result.video for result in results})} videos, {seconds:.0f} s")
    if args.json:
        told = {**settings, "visual_dropout": args.visual_dropout, "num": args.num, "chance": 1 / NUM_OPTIONS}
        values = {"settings": told, "seconds": seconds, "summary": summary, "answers": [asdict(r) for r in results]}
        _write_json(Path(args.json), values)
    return 0


def main(argv: list[str] | None = None) -> int:
    """Runs the command; user errors are one line and exit code 2."""
    args = _parse(argv)
    try:
        return run(args)
    except (ValueError, OSError) as error:
        print(f"answer_questions: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
