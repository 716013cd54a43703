"""Benchmark of training: steps of finetuning and of preferences at a middle size, and what saves time or memory.

The model is VideoChat-Flash of `bench_videochat_flash` with random weights; tower and connector are frozen. Rows name
files, so decoding is part of a step unless features were stored. A step is two rows: two answers to one video each in
finetuning, one video with a better and a worse answer in preferences, or, under "both answers", the same two answers
as rows of finetuning, with which preferences are compared. Options are joined by "+": `checkpointing`, `lora`, and
`stored` for features that were encoded before. Peaks of memory are above the model.
"""

import argparse
import shutil
import tempfile
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longvideo.evaluation.bench_steps import (
    CLIP,
    PeakMemory,
    judged,
    judged_clock,
    make_clip,
    measure_steps,
    time_and_memory,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

    from longvideo.trainers import VideoSFTTrainer

FRAMES = (64,)
STEPS = (
    "sft",
    "sft+checkpointing",
    "sft+lora",
    "sft+lora+checkpointing",
    "sft+stored",
    "both answers+lora",
    "dpo+lora",
    "dpo+lora+checkpointing",
    "dpo+lora+stored",
)
OPTIONS = ("checkpointing", "lora", "stored")
ROWS = 2
# A quarter of a minute holds more frames than are sampled.
CLIP_MINUTES = 0.25
ANSWERS = ("The ring moves to the left , and the square leaves . " * 6, "Nothing happens in this video at all . " * 8)


def make_model(device: str, *, config: Any = None) -> "tuple[PreTrainedModel, ProcessorMixin]":
    """Build the random model of middle size and a processor for it.

    Args:
        device: "cpu" or "cuda".
        config: Configuration of VideoChat-Flash; None for that of the benchmark.

    Returns:
        Model and processor.
    """
    import torch
    from transformers import AutoProcessor

    import longvideo
    from longvideo.evaluation.bench_videochat_flash import bench_config
    from longvideo.modeling.videochat_flash.modeling_videochat_flash import VideoChatFlashForConditionalGeneration

    torch.manual_seed(42)
    processor = AutoProcessor.from_pretrained(longvideo.tiny_checkpoint("videochat_flash"))
    config = bench_config() if config is None else config
    # The words of the small checkpoint, in a vocabulary of the size of the benchmark.
    config.video_token_id = processor.tokenizer.convert_tokens_to_ids("<|video_pad|>")
    config.image_token_id = processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    side = {"height": config.vision_config.image_size, "width": config.vision_config.image_size}
    processor.video_processor.size = processor.image_processor.size = side
    processor.tokens_per_frame = config.tokens_per_frame
    return VideoChatFlashForConditionalGeneration(config).to(device), processor


def make_rows(kind: str, clips: Sequence[str]) -> list[dict[str, Any]]:
    """Make the rows of a step.

    Args:
        kind: "sft" (each row a video of its own), "both answers" (both of one video) or "dpo" (one pair).
        clips: Two video files.

    Returns:
        Rows for the trainer.
    """
    question = {"type": "text", "text": "What happens in the video ?"}
    prompts = [[{"role": "user", "content": [{"type": "video", "path": clip}, question]}] for clip in clips]
    answers = [[{"role": "assistant", "content": [{"type": "text", "text": text}]}] for text in ANSWERS]
    if kind == "dpo":
        return [{"prompt": prompts[0], "chosen": answers[0], "rejected": answers[1]}]
    if kind == "both answers":
        return [{"messages": prompts[0] + answer} for answer in answers]
    return [{"messages": prompt + answers[0]} for prompt in prompts]


def make_trainer(
    step: str, num_frames: int, rounds: int, device: str, *, folder: Path, clip: str, config: Any = None
) -> "VideoSFTTrainer":
    """Build the trainer of a step.

    Args:
        step: One of `STEPS`, or another kind with options.
        num_frames: Frames of each video.
        rounds: Timed steps; one more comes before them.
        device: "cpu" or "cuda".
        folder: Scratch folder.
        clip: Video file.
        config: See `make_model`.

    Returns:
        The trainer.

    Raises:
        ValueError: Unknown option.
    """
    from longvideo.trainers import VideoSFTConfig, VideoSFTTrainer

    kind, *options = step.split("+")
    if not set(options) <= set(OPTIONS):
        raise ValueError(f"unknown options in {step!r}: use {', '.join(OPTIONS)}")
    model, processor = make_model(device, config=config)
    if "lora" in options:
        import peft

        from longvideo.trainers.adapters import lora_config

        model = peft.get_peft_model(model, lora_config(model))
    # Two files, as two rows of a data set are.
    clips = [str(shutil.copy(clip, folder / f"{number}.mp4")) for number in range(ROWS)]
    settings = {
        "output_dir": str(folder / "run"),
        "max_steps": rounds + 1,
        "per_device_train_batch_size": 1 if kind == "dpo" else ROWS,
        "trainable_parts": None if "lora" in options else ["language_model"],
        "gradient_checkpointing": "checkpointing" in options,
        "encoded_features_dir": str(folder / "features") if "stored" in options else None,
        "processor_kwargs": {"num_frames": num_frames},
        "save_strategy": "no",
        "logging_steps": 1000,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": device == "cpu",
        "bf16": device != "cpu",
    }
    trainer_class, config_class = VideoSFTTrainer, VideoSFTConfig
    if kind == "dpo":
        from longvideo.trainers.dpo_config import VideoDPOConfig
        from longvideo.trainers.dpo_trainer import VideoDPOTrainer

        trainer_class, config_class = VideoDPOTrainer, VideoDPOConfig
    rows = make_rows(kind, clips)
    return trainer_class(model, config_class(**settings), train_dataset=rows, processing_class=processor)


def time_steps(trainer: "VideoSFTTrainer", device: str) -> list[tuple[float, float]]:
    """Train, and measure each step from the end of the one before it, loading of its rows included.

    Args:
        trainer: The trainer.
        device: "cpu" or "cuda".

    Returns:
        Seconds of each step after the first by the clock on the wall, and by the processor's.
    """
    import time

    import torch
    from transformers import TrainerCallback

    clocks: list[tuple[float, float]] = []

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if device != "cpu":
                torch.cuda.synchronize()
            clocks.append((time.perf_counter(), time.process_time()))

    trainer.add_callback(Watch())
    trainer.train()
    return [(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(clocks)]


def run_training_step(
    step: str, num_frames: int, rounds: int, device: str, clip: str, *, config: Any = None
) -> dict[str, Any]:
    """Measure one kind of step.

    Args:
        step: One of `STEPS`.
        num_frames: Frames of each video.
        rounds: Timed steps.
        device: "cpu" or "cuda".
        clip: Video file.
        config: See `make_model`.

    Returns:
        `seconds` and `cpu_seconds` of the fastest step, `peak_bytes` above the model, `rows` of a step.
    """
    with tempfile.TemporaryDirectory(prefix="longvideo-bench-") as folder:
        trainer = make_trainer(step, num_frames, rounds, device, folder=Path(folder), clip=clip, config=config)
        memory = PeakMemory(device)
        steps = time_steps(trainer, device)
        peak = memory.rise()
        num_rows = len(trainer.train_dataset)
    return {
        "seconds": min(wall for wall, _ in steps),
        "cpu_seconds": min(processor for _, processor in steps),
        "peak_bytes": peak,
        "rows": num_rows,
    }


def run_step(words: Sequence[str]) -> dict[str, Any]:
    """Run one step in this process.

    Args:
        words: Name of the step, frames, timed steps, device and clip.

    Returns:
        What it measured.
    """
    name, num_frames, rounds, device, clip = words
    return run_training_step(name, int(num_frames), int(rounds), device, clip)


def check(args: argparse.Namespace) -> str | None:
    """Say what is wrong with the arguments, if anything."""
    return "--frames must be at least 4" if min(args.frames) < 4 else None


def measure(
    args: argparse.Namespace, in_process: Callable[[list], dict[str, Any]], tell: Callable[[str], None]
) -> dict[str, Any]:
    """Run everything.

    Args:
        args: The parsed arguments.
        in_process: Runs the step of some words in a process of its own.
        tell: Says what is being done.

    Returns:
        `steps`.
    """
    with tempfile.TemporaryDirectory(prefix="longvideo-bench-") as folder:
        clip = args.clip
        if clip is None:
            tell(f"clip of {CLIP_MINUTES * 60:.0f} s, {CLIP['width']} x {CLIP['height']}")
            clip = str(Path(folder, "clip.mp4"))
            make_clip(Path(clip), CLIP_MINUTES)
        return {"steps": measure_steps(args, STEPS, lambda words: in_process([*words, clip]), tell)}


def judge(result: dict[str, Any], frames: Sequence[int]) -> list[dict[str, Any]]:
    """Compare the measurements with the targets.

    Args:
        result: `steps`, `machine`.
        frames: Measured frame counts.

    Returns:
        One entry per target: name, measured value, limit, whether it is met, and how it was computed.
    """
    steps = result["steps"]
    clock, unit = judged_clock(result["machine"]["device"])
    rows = []
    for num_frames in sorted(frames):
        for name, one, other, limit in (
            ("preferences over finetuning on both answers", "dpo+lora", "both answers+lora", 1.6),
            ("stored features over decoding and encoding", "sft+stored", "sft", 0.5),
        ):
            a, b = steps[f"{one}/{num_frames}"], steps[f"{other}/{num_frames}"]
            wall = a["seconds"] / b["seconds"]
            how = f"{unit}, {a[clock]:.2f} of {b[clock]:.2f} s; wall clock {wall:.3f}"
            rows.append((f"{name}, {num_frames} frames", a[clock] / b[clock], limit, how))
        for kind in ("sft", "dpo+lora"):
            a, b = (steps[f"{kind}{option}/{num_frames}"]["peak_bytes"] for option in ("+checkpointing", ""))
            how = f"{a / 1e6:.0f} of {b / 1e6:.0f} MB above the model"
            rows.append((f"memory with gradient checkpointing, {kind}, {num_frames} frames", a / max(b, 1), 0.95, how))
    return judged(rows)


def tables(result: dict[str, Any]) -> list[tuple[list[str], list[list[str]]]]:
    """Lay the measurements out.

    Args:
        result: What was measured.

    Returns:
        Tables of heads and rows.
    """
    rows = []
    for name, step in result["steps"].items():
        label, num_frames = name.split("/")
        pair = "1 pair" if label.startswith("dpo") else f"{step['rows']} rows"
        rate = step["rows"] / step["seconds"]
        rows.append([label.replace("+", ", "), num_frames, pair, f"{rate:.3f}", *time_and_memory(step)])
    return [(["step", "frames", "of", "samples/s", "seconds", "processor s", "peak MB"], rows)]
