"""How often a short needle in a long video is found, stage by stage of LongVU's compression, in a fixed context.

    python -m longvideo.evaluation.needle_table --model longvu

For a moment a letter replaces the picture of a procedural video of 64, 256 or 1,024 frames, one frame per second; the
question asks for the letter, four options each. Every setting answers the same questions about the same frames in the
same context; what differs is how the frames are fitted into it, by fields of the configuration:

    none             full grids of as many evenly spaced frames as fit
    DINOv2           full grids of the frames that temporal reduction keeps, evenly thinned to as many as fit
    + query          those frames, thinned to as many as fit at the low grid; the question raises some to the full grid
    + query + STC    as configured: all those frames; what is still too long goes through spatial token compression

Source: LongVU (arXiv 2410.17434), Tables 3 and 4, Fig. 5.
Differs: the paper's rows without query take 64 or 144 tokens per frame as the row says; here always the full grid. No
setting cuts a sequence: every one fits the context, counted with all its tokens.
"""

import argparse
import contextlib
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, ProcessorMixin

from longvideo.evaluation.answer_questions import (
    answer_ids,
    encode_first_video,
    load_checkpoint,
    read_prompt,
    score_answers,
    show_progress,
    write_json,
)
from longvideo.evaluation.command import run_command
from longvideo.evaluation.corpus import Difficulty, Item, balanced_items, render_frames
from longvideo.evaluation.corpus.questions import NUM_OPTIONS
from longvideo.evaluation.corpus.rows import FORMS
from longvideo.evaluation.corpus.scenes import Needle
from longvideo.evaluation.metrics import accuracy, wilson_interval
from longvideo.modeling.longvu.configuration_longvu import LongVUConfig
from longvideo.modeling.longvu.insertion_longvu import grid_tokens
from longvideo.modeling.longvu.temporal_reduction import WINDOWS

FRAMES = (64, 256, 1024)
SETTINGS = ("none", "DINOv2", "+ query", "+ query + STC")
FRAMES_AT_ONCE = 64
# A cosine is never that large: no frame is dropped for being like others.
NO_FRAME_IS_ALIKE = 2.0
PAPER = "paper, Table 4, needle questions of MLVU: DINOv2 68.2 %, + query 78.9 %, + query + STC 76.3 %"


@dataclass(frozen=True)
class Found:
    """One scored question under one setting.

    Attributes:
        setting: one of SETTINGS.
        num_frames: frames of the video.
        seed: its scene.
        truth: place of the right option.
        chosen: place of the option with the highest score.
        needle_frame: first frame of the needle, zero-based.
        needle_tokens: visual tokens of its frames that the decoder saw.
        kept_frames: frames that the decoder saw.
        full_frames: those of them at the full grid.
        visual_tokens: tokens that the decoder saw.
        mode: "full", "low", "mix" or "stc".
    """

    setting: str
    num_frames: int
    seed: int
    truth: int
    chosen: int
    needle_frame: int
    needle_tokens: int
    kept_frames: int
    full_frames: int
    visual_tokens: int
    mode: str


def needle_items(
    num: int, num_frames: int, *, needle_frames: int = 1, split: str = "held_out", seed: int = 0
) -> list[Item]:
    """Makes scenes of one frame per second in which a letter is shown for a moment, anywhere.

    Args:
        num: number of scenes, one question each.
        num_frames: frames, and so seconds, of a scene.
        needle_frames: frames that show the letter.
        split: "held_out" or "train".
        seed: first scene.

    Returns:
        Scenes with their question; letters and places of the truth are even.

    Raises:
        ValueError: a needle that does not fit the video, or as `balanced_items` says.
    """
    if not 1 <= needle_frames < num_frames:
        raise ValueError(f"A needle of {needle_frames} frames does not fit into a video of {num_frames}.")
    knobs = Difficulty(needle=1.0, durations=(num_frames, num_frames))
    items = []
    for item in balanced_items(num, split=split, seed=seed, kinds=("needle",), difficulty=knobs, max_per_scene=1):
        rng = random.Random(f"{split} {item.scene.seed} {num_frames} moment")
        first = rng.randrange(num_frames - needle_frames + 1)
        needle = Needle(item.scene.needle.letter, first - 0.5, first + needle_frames - 0.5)
        items.append(Item(replace(item.scene, needle=needle), item.questions))
    return items


def render_item(item: Item, side: int) -> np.ndarray:
    """Draws a scene at one frame per second, (F, side, side, 3) uint8."""
    times = [float(second) for second in range(item.scene.duration)]
    pieces = [
        render_frames(item.scene, times[start : start + FRAMES_AT_ONCE], side)
        for start in range(0, len(times), FRAMES_AT_ONCE)
    ]
    return np.concatenate(pieces)


def stage_fields(config: LongVUConfig, num_text: int, size: tuple[int, int]) -> dict[str, dict[str, Any]]:
    """Says which fields of the configuration make each setting.

    Args:
        config: the model's own configuration.
        num_text: tokens of the question's prompt without the placeholder.
        size: (width, height) of the frames as the model reads it.

    Returns:
        Per setting the fields that differ from `config`.

    Raises:
        ValueError: a model with one grid only, or a context that holds no frame beside the text.
    """
    if not config.highres:
        raise ValueError(
            "This model has one grid (highres is off, an image checkpoint): nothing can be raised by query."
        )
    room = config.context_length - num_text - config.inference_max_length
    fitting = {full: room // len(grid_tokens(config, size, full=full)) for full in (True, False)}
    if fitting[True] < 1:
        raise ValueError(
            f"A context of {config.context_length} positions leaves {room} beside the question, not enough for one "
            "frame. Use a larger context_length."
        )
    full, low = (min(fitting[which], config.max_kept_frames) for which in (True, False))
    exact = {"original_behaviour": False}
    return {
        "none": {**exact, "highres": False, "dino_threshold": NO_FRAME_IS_ALIKE, "max_kept_frames": fitting[True]},
        "DINOv2": {**exact, "highres": False, "max_kept_frames": full},
        "+ query": {**exact, "max_kept_frames": low},
        "+ query + STC": exact,
    }


@contextlib.contextmanager
def changed_fields(config: LongVUConfig, fields: dict[str, Any]) -> Iterator[None]:
    """Changes fields of a configuration inside the block."""
    before = {name: getattr(config, name) for name in fields}
    for name, value in fields.items():
        setattr(config, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)


@torch.no_grad()
def answer_settings(
    model: PreTrainedModel, processor: ProcessorMixin, item: Item, *, form: str = "open", size: int | None = None
) -> list[Found]:
    """Answers the question about one scene under every setting.

    Args:
        model: LongVU in evaluation mode.
        processor: its processor.
        item: from `needle_items`.
        form: "open" or "letter".
        size: side of the frames in pixels; None for that of the processor.

    Returns:
        One result per setting.
    """
    question, num_frames = item.questions[0], item.scene.duration
    frames = render_item(item, size or processor.video_processor.size["height"])
    video = {"type": "video", "video": frames, "timestamps": [float(second) for second in range(num_frames)]}
    text = question.multiple_choice if form == "letter" else question.question
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": [video, {"type": "text", "text": text}]}],
        tokenize=True,
        return_dict=True,
        add_generation_prompt=True,
        processor_kwargs={"return_tensors": "pt", "do_sample_frames": False},
    )
    prompt = inputs["input_ids"][0].tolist()
    answers = answer_ids(processor.tokenizer, question, form)
    seen_size = tuple(inputs["video_sizes"][0].tolist())
    results = []
    for setting, fields in stage_fields(model.config, len(prompt) - 1, seen_size).items():
        with changed_fields(model.config, fields):
            read = read_prompt(model, encode_first_video(model, inputs), prompt)
            scores = score_answers(model, read, len(prompt), answers)
        chosen = max(range(NUM_OPTIONS), key=scores.__getitem__)
        results.append(_record(setting, item, chosen, read.video_selections[0]))
    return results


def _record(setting: str, item: Item, chosen: int, selection: Any) -> Found:
    times = selection.kept_frames.cpu()
    in_needle = torch.tensor([item.scene.needle.visible(float(second)) for second in times], dtype=torch.bool)
    return Found(
        setting=setting,
        num_frames=item.scene.duration,
        seed=item.scene.seed,
        truth=item.questions[0].answer_index,
        chosen=chosen,
        needle_frame=round(item.scene.needle.start + 0.5),
        needle_tokens=int(in_needle[selection.token_frame.cpu()].sum()),
        kept_frames=len(selection.token_frame.unique()),
        full_frames=int(selection.full_resolution.sum()),
        visual_tokens=len(selection.token_frame),
        mode=selection.mode,
    )


def evaluate(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    num: int = 100,
    *,
    frames: Sequence[int] = FRAMES,
    needle_frames: int = 1,
    form: str = "open",
    split: str = "held_out",
    seed: int = 0,
    size: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Found]:
    """Answers needle questions about videos of several lengths under every setting.

    Args:
        model: LongVU.
        processor: its processor.
        num: videos of each length.
        frames: lengths in frames.
        needle_frames: frames that show the letter.
        form: "open" or "letter".
        split: "held_out" or "train".
        seed: first scene.
        size: side of the frames in pixels; None for that of the processor.
        progress: called with the number of finished videos and their total.

    Returns:
        One result per video and setting; the same arguments give the same videos.

    Raises:
        ValueError: a model without these stages, a video shorter than a window of temporal reduction, an unknown form
            or split, or num below 1.
    """
    if model.config.model_type != LongVUConfig.model_type:
        raise ValueError(f"The settings are those of LongVU; {model.config.model_type!r} has no such stages.")
    if form not in FORMS:
        raise ValueError(f"unknown form {form!r}: use {' or '.join(FORMS)}")
    window = model.config.temporal_window or WINDOWS[model.config.temporal_reduction]
    if min(frames) < window:
        raise ValueError(f"Videos of {min(frames)} frames are shorter than a window of {window}; use longer ones.")
    model.eval()
    results: list[Found] = []
    for position, num_frames in enumerate(frames):
        items = needle_items(num, num_frames, needle_frames=needle_frames, split=split, seed=seed)
        for done, item in enumerate(items, start=1):
            results += answer_settings(model, processor, item, form=form, size=size)
            if progress is not None:
                progress(position * num + done, num * len(frames))
    return results


def summarize(results: Sequence[Found]) -> dict[str, dict[int, dict[str, Any]]]:
    """Accuracy with its 95 % interval per setting and length, and means of what the decoder saw.

    Args:
        results: from `evaluate`.

    Returns:
        Per setting and number of frames: `num`, `num_correct`, `accuracy`, `interval_95`, `needle_seen` (share of the
        videos of whose needle a token was seen), `kept_frames`, `full_frames`, `visual_tokens` (means), `modes`.
    """
    summary: dict[str, dict[int, dict[str, Any]]] = {}
    for setting in SETTINGS:
        for num_frames in sorted({found.num_frames for found in results}):
            group = [x for x in results if (x.setting, x.num_frames) == (setting, num_frames)]
            correct = [x.chosen == x.truth for x in group]
            summary.setdefault(setting, {})[num_frames] = {
                "num": len(group),
                "num_correct": sum(correct),
                "accuracy": accuracy(correct),
                "interval_95": list(wilson_interval(sum(correct), len(correct))),
                "needle_seen": accuracy([x.needle_tokens > 0 for x in group]),
                **{
                    name: sum(getattr(x, name) for x in group) / len(group)
                    for name in ("kept_frames", "full_frames", "visual_tokens")
                },
                "modes": dict(sorted(Counter(x.mode for x in group).items())),
            }
    return summary


def format_table(summary: dict[str, dict[int, dict[str, Any]]]) -> str:
    """The summary as two tables: accuracies with intervals, and what the decoder saw."""
    lengths = list(next(iter(summary.values())))
    head = "".join(f"{f'{length:,} frames':>25}" for length in lengths)
    lines = [f"{'accuracy':<14}{head}"]
    for setting, cells in summary.items():
        texts = []
        for cell in cells.values():
            low, high = (100 * value for value in cell["interval_95"])
            texts.append(f"{100 * cell['accuracy']:5.1f} % ({low:4.1f} - {high:5.1f})")
        lines.append(f"{setting:<14}" + "".join(f"{text:>25}" for text in texts))
    lines += ["", f"{'seen':<14}{head}"]
    for setting, cells in summary.items():
        texts = [
            f"{100 * c['needle_seen']:3.0f} % {c['kept_frames']:6.1f} {c['visual_tokens']:6.1f}"
            for c in cells.values()
        ]
        lines.append(f"{setting:<14}" + "".join(f"{text:>25}" for text in texts))
    lines.append("(share of needles of which any token was seen, mean frames and mean visual tokens in the context)")
    return "\n".join(lines)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m longvideo.evaluation.needle_table",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--model", default="longvu", help="folder, id, or architecture with a tiny checkpoint (default longvu)"
    )
    parser.add_argument("--num", type=int, default=100, help="videos of each length (default 100)")
    parser.add_argument("--frames", type=int, nargs="+", default=list(FRAMES), help="lengths (default 64 256 1024)")
    parser.add_argument("--needle-frames", type=int, default=1, help="frames that show the letter (default 1)")
    parser.add_argument("--context-length", type=int, default=None, help="positions (default: the model's)")
    parser.add_argument("--form", choices=FORMS, default="open", help="scored texts: the options, or their letters")
    parser.add_argument("--split", choices=("held_out", "train"), default="held_out")
    parser.add_argument("--seed", type=int, default=0, help="first scene (default 0)")
    parser.add_argument("--size", type=int, default=None, help="side of the frames (default: the processor's)")
    parser.add_argument("--dtype", default="float32", help="float32 (default), bfloat16, float16 or auto")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, ...")
    parser.add_argument("--json", default=None, metavar="FILE", help="write the summary and every answer")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> int:
    """Loads the model, answers, prints the table; returns the exit code."""
    model, processor = load_checkpoint(args.model, dtype=args.dtype, device=args.device)
    if args.context_length is not None:
        model.config.context_length = args.context_length
    frames = sorted(set(args.frames))
    settings = {"frames": frames, "needle_frames": args.needle_frames, "form": args.form, "split": args.split}
    settings |= {"seed": args.seed, "size": args.size}
    start = time.perf_counter()
    results = evaluate(model, processor, args.num, **settings, progress=show_progress)
    seconds = time.perf_counter() - start
    summary = summarize(results)
    context = model.config.context_length
    print(format_table(summary))
    print()
    videos = f"{args.num} {args.split} videos of each length"
    print(f"a letter for {args.needle_frames} of the frames, one frame per second; {videos}; chance 25.0 %;")
    print(f"95 % intervals of Wilson; context of {context:,} positions with question and answer; {seconds:.0f} s")
    print(PAPER)
    if args.json:
        told = {**settings, "num": args.num, "context_length": context, "chance": 1 / NUM_OPTIONS}
        values = {"settings": told, "seconds": seconds, "summary": summary, "answers": [asdict(x) for x in results]}
        write_json(Path(args.json), values)
    return 0


def main(argv: list[str] | None = None) -> int:
    """Runs the command; user errors are one line and exit code 2."""
    args = _parse(argv)
    return run_command("needle_table", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
