"""What a tiny model gains when it is fine-tuned on a kind of question that it was never asked.

    python -m longvideo.evaluation.finetune_gain --model videochat_flash --steps 100

The curriculum of the small checkpoints asks for colours, shapes, numbers, directions, orders, times and letters.
Further kinds are made here of the same scenes: "others" asks how many shapes there are beside one of them (the model
counts all and was never asked to leave one out), "absent" which shape is not there, and "place" where one is. Videos
and a rows file of the train split are written as a user would have them, `VideoSFTTrainer` trains on them, and
questions about videos of the held-out split are answered before and after, as are some of the kinds that the model
knows. No answer is favoured, neither in training nor among the options.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, ProcessorMixin

from longvideo.evaluation.answer_questions import Answered, answer_item, evaluate, load_checkpoint, write_json
from longvideo.evaluation.command import run_command
from longvideo.evaluation.corpus import Item, Question, Scene, make_scene, write_video
from longvideo.evaluation.corpus.captions import place_name
from longvideo.evaluation.corpus.questions import NUM_OPTIONS, View
from longvideo.evaluation.corpus.rows import make_row
from longvideo.evaluation.corpus.scenes import SHAPES
from longvideo.evaluation.metrics import accuracy, wilson_interval

PLACES = tuple(
    f"{row} {column}".strip() or "middle" for row in ("top", "", "bottom") for column in ("left", "", "right")
)
# Places change at these parts of the frame; nearer to them than that nobody could tell.
BORDERS, CLEAR = (0.4, 0.6), 0.05
NUMBERS = tuple(str(number) for number in range(NUM_OPTIONS))
SIZE = 64


def place_questions(scene: Scene, rng: random.Random) -> list[Question]:
    """Ask where each shape is that neither moves nor changes.

    Args:
        scene: What the video shows.
        rng: Source of chance.

    Returns:
        Questions whose answers and options are names of places.
    """
    view, found = View(scene), []
    for actor in scene.actors:
        near = any(abs(value - border) <= CLEAR for value in (actor.x, actor.y) for border in BORDERS)
        if actor.motion is None and actor.change is None and not near and view.count(actor) >= 2:
            answer = place_name(actor.x, actor.y)
            wrong = rng.sample([place for place in PLACES if place != answer], NUM_OPTIONS - 1)
            text = rng.choice(("Where is the {} ?", "In which place is the {} ?")).format(actor.shape)
            found.append(Question("place", text, answer, (answer, *wrong), 0, "place", answer))
    return found


def others_questions(scene: Scene, rng: random.Random) -> list[Question]:
    """Ask how many shapes there are beside one of them, where all are seen well.

    Args:
        scene: What the video shows.
        rng: Source of chance.

    Returns:
        At most one question; options are all numbers that can be.
    """
    view, number = View(scene), len(scene.actors)
    if not 1 <= number <= NUM_OPTIONS or any(view.count(actor) < 2 for actor in scene.actors):
        return []
    name = rng.choice(scene.actors).shape
    text = rng.choice(("How many other shapes are there , without the {} ?", "Without the {} , how many are seen ?"))
    answer = NUMBERS[number - 1]
    wrong = [other for other in NUMBERS if other != answer]
    rng.shuffle(wrong)
    return [Question("others", text.format(name), answer, (answer, *wrong), 0, "others", answer)]


def absent_questions(scene: Scene, rng: random.Random) -> list[Question]:
    """Ask which shape a video of at least three shapes does not show.

    Args:
        scene: What the video shows.
        rng: Source of chance.

    Returns:
        At most one question; its wrong options are shapes that are seen.
    """
    view = View(scene)
    seen = [actor.shape for actor in scene.actors]
    if len(seen) < NUM_OPTIONS - 1 or any(view.count(actor) < 2 for actor in scene.actors):
        return []
    answer = rng.choice([shape for shape in SHAPES if shape not in seen])
    wrong = rng.sample(seen, NUM_OPTIONS - 1)
    text = rng.choice(("Which shape is not seen in the video ?", "What shape is there at no time ?"))
    return [Question("absent", text, answer, (answer, *wrong), 0, "absent", answer)]


NEW_KINDS: dict[str, tuple[Callable[[Scene, random.Random], list[Question]], tuple[str, ...]]] = {
    "others": (others_questions, NUMBERS),
    "place": (place_questions, PLACES),
    "absent": (absent_questions, SHAPES),
}


def choose_items(kind: str, num: int, *, split: str, seed: int = 0) -> list[Item]:
    """Choose questions of a new kind, one per scene, with every answer equally often, up to one.

    Args:
        kind: One of `NEW_KINDS`.
        num: Number of questions.
        split: "train" or "held_out".
        seed: First scene; the following ones count up from it.

    Returns:
        Scenes with one question each; the place of the truth among the options goes round.

    Raises:
        ValueError: Unknown kind, or a number below 1.
    """
    if kind not in NEW_KINDS:
        raise ValueError(f"unknown new kind {kind!r}: use {' or '.join(NEW_KINDS)}")
    if num < 1:
        raise ValueError(f"the number of questions is {num}, expected at least 1")
    make, answers = NEW_KINDS[kind]
    share, rest = divmod(num, len(answers))
    taken: Counter[str] = Counter()
    items: list[Item] = []
    while len(items) < num:
        scene = make_scene(seed, split)
        rng = random.Random(f"{split} {seed} {kind}")
        seed += 1
        ahead = sum(count > share for count in taken.values())
        room = share + 1 if ahead < rest else share
        fitting = [question for question in make(scene, rng) if taken[question.answer] < room]
        if fitting:
            question = rng.choice(fitting)
            taken[question.answer] += 1
            items.append(Item(scene, (question.with_answer_index(len(items) % NUM_OPTIONS),)))
    return items


def write_rows(items: Iterable[Item], folder: Path) -> Path:
    """Write videos and a file of rows in the `messages` format.

    Args:
        items: Scenes with their questions.
        folder: Where to; made if absent.

    Returns:
        Path of rows.jsonl, which names the videos relative to its folder.
    """
    rows = []
    for item in items:
        name = f"videos/{item.scene.split}_{item.scene.seed:06d}.mp4"
        write_video(item.scene, folder / name, size=(SIZE, SIZE))
        rows += [make_row(item.scene, question, name) for question in item.questions]
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@torch.no_grad()
def answer_items(model: PreTrainedModel, processor: ProcessorMixin, items: Iterable[Item]) -> list[Answered]:
    """Answer questions about videos that are written for that.

    Args:
        model: The model.
        processor: Its processor.
        items: Scenes with their questions.

    Returns:
        One result per question.
    """
    model.eval()
    results: list[Answered] = []
    with tempfile.TemporaryDirectory(prefix="longvideo-gain-") as folder:
        for item in items:
            path = Path(folder, "video.mp4")
            write_video(item.scene, path, size=(SIZE, SIZE))
            results += answer_item(model, processor, item, path)
    return results


def score(results: list[Answered]) -> dict[str, Any]:
    """Accuracy with its 95 % interval."""
    correct = [result.correct for result in results]
    low, high = wilson_interval(sum(correct), len(correct))
    return {
        "num": len(correct),
        "num_correct": sum(correct),
        "accuracy": accuracy(correct),
        "interval_95": [low, high],
    }


def finetune(
    model: PreTrainedModel, processor: ProcessorMixin, rows: Path, args: argparse.Namespace
) -> PreTrainedModel:
    """Train a model on a file of rows, as a user would.

    Args:
        model: The model; changed in place.
        processor: Its processor.
        rows: File of rows.
        args: `steps`, `batch_size`, `learning_rate`, `lora`, `seed`.

    Returns:
        The trained model; with `lora`, with the adapter merged into it.
    """
    from longvideo.trainers import VideoSFTConfig, VideoSFTTrainer
    from longvideo.trainers.data.loading import load_video_rows

    if args.lora:
        import peft

        from longvideo.trainers.adapters import lora_config

        model = peft.get_peft_model(model, lora_config(model))
    with tempfile.TemporaryDirectory(prefix="longvideo-gain-") as folder:
        config = VideoSFTConfig(
            output_dir=folder,
            max_steps=args.steps,
            per_device_train_batch_size=args.batch_size,
            learning_rate=args.learning_rate,
            lr_scheduler_type="linear",
            warmup_steps=0.05,
            trainable_parts=None if args.lora else ["language_model"],
            # What the frozen tower and connector make of a video is computed once.
            encoded_features_dir=str(Path(folder, "features")),
            save_strategy="no",
            logging_steps=max(args.steps // 10, 1),
            report_to=[],
            seed=args.seed,
            disable_tqdm=True,
            use_cpu=model.device.type == "cpu",
        )
        data, _ = load_video_rows(str(rows), on_error="raise")
        VideoSFTTrainer(model, config, train_dataset=data, processing_class=processor).train()
    return model.merge_and_unload() if args.lora else model


def measure(args: argparse.Namespace, tell: Callable[[str], None]) -> dict[str, Any]:
    """Answer, fine-tune, answer again.

    Args:
        args: The parsed arguments.
        tell: Says what is being done.

    Returns:
        `settings`, `before` and `after` of the new kind, `known_before` and `known_after` of the kinds that the model
        was taught (None without), `seconds` of the training, and whether the intervals lie apart (`gained`).
    """
    model, processor = load_checkpoint(args.model, device=args.device)
    held_out = choose_items(args.kind, args.num, split="held_out", seed=args.seed)

    def answer_all(when: str) -> tuple[dict[str, Any], dict[str, Any] | None]:
        tell(f"{when}: {args.num} questions of kind {args.kind!r}, {args.known} of known kinds")
        new = score(answer_items(model, processor, held_out))
        known = score(evaluate(model, processor, args.known, size=SIZE, seed=args.seed)) if args.known else None
        return new, known

    before, known_before = answer_all("before")
    with tempfile.TemporaryDirectory(prefix="longvideo-gain-") as folder:
        tell(f"writing {args.num_train} videos of the train split")
        rows = write_rows(choose_items(args.kind, args.num_train, split="train", seed=args.seed), Path(folder))
        tell(f"{args.steps} steps of {args.batch_size} rows")
        start = time.perf_counter()
        model = finetune(model, processor, rows, args)
        seconds = time.perf_counter() - start
    after, known_after = answer_all("after")
    if args.output:
        model.save_pretrained(args.output)
        processor.save_pretrained(args.output)
    names = ("model", "kind", "steps", "batch_size", "num_train", "num", "known", "learning_rate", "lora", "seed")
    return {
        "settings": {name: getattr(args, name) for name in names},
        "before": before,
        "after": after,
        "known_before": known_before,
        "known_after": known_after,
        "seconds": seconds,
        "gained": after["interval_95"][0] > before["interval_95"][1],
    }


def format_result(result: dict[str, Any]) -> str:
    """Lay the result out as a table in Markdown.

    Args:
        result: What `measure` returned.

    Returns:
        Lines of text.
    """
    settings = result["settings"]
    lines = ["| questions | when | right | accuracy | 95 % interval |", "|---|---|---|---|---|"]
    rows = [(f"{settings['kind']} (new)", "before"), (f"{settings['kind']} (new)", "after")]
    keys = ["before", "after"]
    if result["known_before"]:
        rows += [("known kinds", "before"), ("known kinds", "after")]
        keys += ["known_before", "known_after"]
    for (name, when), key in zip(rows, keys, strict=True):
        entry = result[key]
        low, high = (100 * bound for bound in entry["interval_95"])
        share = f"{100 * entry['accuracy']:.1f} %"
        lines.append(
            f"| {name} | {when} | {entry['num_correct']} of {entry['num']} | {share} | {low:.1f} to {high:.1f} % |"
        )
    return "\n".join(lines)


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the command."""
    parser = argparse.ArgumentParser(
        prog="python -m longvideo.evaluation.finetune_gain",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default="videochat_flash", help="folder, or architecture with a tiny checkpoint")
    parser.add_argument("--kind", choices=list(NEW_KINDS), default="others", help="what is asked (default: others)")
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps (default: 100)")
    parser.add_argument("--batch-size", type=int, default=8, help="rows per step (default: 8)")
    parser.add_argument("--num-train", type=int, default=200, help="videos of the train split (default: 200)")
    parser.add_argument("--num", type=int, default=100, help="held-out questions of the new kind (default: 100)")
    parser.add_argument("--known", type=int, default=48, help="held-out questions of known kinds, or 0 (default: 48)")
    parser.add_argument("--learning-rate", type=float, default=5e-4, help="peak rate (default: 5e-4)")
    parser.add_argument("--lora", action="store_true", help="train an adapter in place of the whole decoder")
    parser.add_argument("--seed", type=int, default=0, help="first scene, and order of the rows (default: 0)")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, ...")
    parser.add_argument("--output", metavar="DIR", help="keep the fine-tuned model")
    parser.add_argument("--json", metavar="FILE", help="write everything measured")
    return parser


def run(args: argparse.Namespace) -> int:
    """Measures, prints and writes the result; returns the exit code."""
    for name in ("steps", "batch_size", "num_train", "num"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(args, name)}, expected at least 1")
    result = measure(args, lambda text: print(text, file=sys.stderr, flush=True))
    print(format_result(result))
    print(
        f"\nchance {100 / NUM_OPTIONS:.0f} %; {result['seconds']:.0f} s of training; four options, scored as answers"
    )
    if args.json:
        write_json(Path(args.json), result)
    return 0 if result["gained"] else 1


def main(argv: list[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Words after the program's name; None takes those of the process.

    Returns:
        0 when the interval after training lies above the one before, 1 when not, 2 for wrong input.
    """
    args = build_parser().parse_args(argv)
    return run_command("finetune_gain", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
