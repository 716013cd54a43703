"""Benchmark of VideoChat-Flash: tower, merging, prefill and decoding with and without dropout, and decoding of a clip.

Every count of FLOPs by torch must equal the formulas of `evaluation.cost_videochat_flash`.
"""

import argparse
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longvideo.evaluation.bench_steps import (
    PeakMemory,
    fastest,
    judged,
    judged_clock,
    make_clip,
    measure_steps,
    run_bare_pass,
    run_reading,
    time_and_memory,
)

if TYPE_CHECKING:
    from longvideo.modeling.videochat_flash.configuration_videochat_flash import VideoChatFlashConfig
    from longvideo.modeling.videochat_flash.modeling_videochat_flash import VideoChatFlashForConditionalGeneration

FRAMES = (64, 256)
NUM_TEXT = 64
DECODE_STEPS = 16
DROPOUT = {"type": "uniform0_attention", "ratios": [1.0, 0.75, 0.25]}
STEPS = ("tower", "merge", "prefill", "prefill_dropout", "decode", "decode_dropout")
HEADS = [
    "step",
    "frames",
    "visual tokens",
    "seconds",
    "processor s",
    "peak MB",
    "GFLOPs, formula",
    "GFLOPs, counted",
]


def bench_config(*, layers: int = 8) -> "VideoChatFlashConfig":
    """Build the random configuration of middle size: decoder 512 wide, tower 384 wide with 6 layers at 224 pixels.

    Args:
        layers: Decoder layers.

    Returns:
        A `VideoChatFlashConfig`.
    """
    from longvideo.modeling.videochat_flash.configuration_videochat_flash import VideoChatFlashConfig

    return VideoChatFlashConfig(
        vision_config={
            "model_type": "umt_vision_model",
            "hidden_size": 384,
            "intermediate_size": 1536,
            "num_hidden_layers": 6,
            "num_attention_heads": 6,
            "image_size": 224,
        },
        text_config={
            "model_type": "qwen2",
            "vocab_size": 32000,
            "hidden_size": 512,
            "intermediate_size": 1536,
            "num_hidden_layers": layers,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "max_position_embeddings": 32768,
        },
        image_token_id=31998,
        video_token_id=31999,
    )


def bench_dropout(config: "VideoChatFlashConfig") -> dict[str, Any]:
    """Place the stages of the published efficiency setting (after 4 and 18 of 28 layers) in another depth.

    Args:
        config: Model configuration.

    Returns:
        Dropout to 0.75 after a seventh and to 0.25 after five eighths of the layers.
    """
    depth = config.text_config.num_hidden_layers
    return {**DROPOUT, "layers": [max(1, round(depth / 7)), round(depth * 5 / 8)]}


def run_model_step(step: str, num_frames: int, rounds: int, device: str) -> dict[str, Any]:
    """Measure one step of the model on random input.

    Args:
        step: One of `STEPS`.
        num_frames: Frames of the video.
        rounds: Timed runs.
        device: "cpu" or "cuda".

    Returns:
        `seconds`, `cpu_seconds`, `peak_bytes` above model and input, FLOPs as counted and by formula.
    """
    import torch

    from longvideo.evaluation import cost_videochat_flash as cost
    from longvideo.modeling.videochat_flash.modeling_videochat_flash import VideoChatFlashForConditionalGeneration

    torch.manual_seed(42)
    config = bench_config()
    model = VideoChatFlashForConditionalGeneration(config).eval().to(device)
    clips = cost.count_clips(config, num_frames)
    num_visual = clips * config.tokens_per_clip
    dropout = bench_dropout(config) if step.endswith("dropout") else False
    function, formula = prepare_step(model, step, num_frames, dropout)
    with torch.no_grad():
        memory = PeakMemory(device)
        function()
        peak = memory.rise()
        seconds, cpu_seconds = fastest(function, rounds, device)
    runs = DECODE_STEPS if step.startswith("decode") else 1
    return {
        "seconds": seconds / runs,
        "cpu_seconds": cpu_seconds / runs,
        "peak_bytes": peak,
        "flops_counted": count_flops(step, num_frames),
        "flops_formula": formula,
        "visual_tokens": num_visual,
    }


def count_flops(step: str, num_frames: int) -> int | None:
    """Let torch count the FLOPs of a step.

    Args:
        step: One of `STEPS`.
        num_frames: Frames of the video.

    Returns:
        FLOPs, None for the decoder at lengths where it would take too long: it looks at values (placeholders, scores)
        and cannot run on shapes alone as the tower does.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from longvideo.modeling.videochat_flash.modeling_videochat_flash import VideoChatFlashForConditionalGeneration

    config = bench_config()
    needs_values = step not in ("tower", "merge")
    if needs_values and num_frames > 64:
        return None
    with torch.device("cpu" if needs_values else "meta"):
        model = VideoChatFlashForConditionalGeneration(config).eval()
    # Plain attention, so that torch sees every product: fused kernels hide theirs on the CPU.
    model.set_attn_implementation("eager")
    dropout = bench_dropout(config) if step.endswith("dropout") else False
    function, _ = prepare_step(model, step, num_frames, dropout, decode_steps=1)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        function()
    return counter.get_total_flops()


def prepare_step(
    model: "VideoChatFlashForConditionalGeneration",
    step: str,
    num_frames: int,
    dropout: bool | dict[str, Any],
    *,
    decode_steps: int = DECODE_STEPS,
) -> tuple[Callable[[], Any], int]:
    """Make the input of a step.

    Args:
        model: The random model.
        step: One of `STEPS`.
        num_frames: Frames of the video.
        dropout: Dropout of prefill and decoding.
        decode_steps: Answer tokens per run.

    Returns:
        A function that runs the step, and its FLOPs by formula.
    """
    if step == "tower":
        return prepare_tower(model, num_frames)
    if step == "merge":
        return prepare_merge(model, num_frames)
    return prepare_decoder(model, step, num_frames, dropout, decode_steps=decode_steps)


def prepare_tower(model: "VideoChatFlashForConditionalGeneration", num_frames: int) -> tuple[Callable[[], Any], int]:
    """Make frames for the whole route from pixels to features, chunk by chunk; see `prepare_step`.

    Merging is part of the route, is timed by itself and taken off later.
    """
    import torch

    from longvideo.evaluation import cost_videochat_flash as cost

    config, side = model.config, model.config.vision_config.image_size
    clips = cost.count_clips(config, num_frames)
    pixels = torch.randn(num_frames, 3, side, side, device=model.device)
    counts = torch.tensor([num_frames])
    flops = cost.tower_flops(config, num_frames) + cost.merge_flops(config, clips)
    flops += cost.projector_flops(config, clips * config.tokens_per_clip)
    return lambda: model.get_video_features(pixels, counts), flops


def prepare_merge(model: "VideoChatFlashForConditionalGeneration", num_frames: int) -> tuple[Callable[[], Any], int]:
    """Make the tower's output of all clips, merged chunk by chunk; see `prepare_step`."""
    import torch

    from longvideo.evaluation import cost_videochat_flash as cost
    from longvideo.modeling.layers.token_merging import merge_tokens

    config, vision = model.config, model.config.vision_config
    clips = cost.count_clips(config, num_frames)
    patches = config.mm_local_num_frames * cost.patches_per_frame(config)
    x_BNE = torch.randn(clips, patches, vision.hidden_size, device=model.device)

    def merge() -> None:
        for piece in x_BNE.split(config.vision_chunk_size):
            merge_tokens(piece, config.tokens_per_clip, num_heads=vision.num_attention_heads)

    return merge, cost.merge_flops(config, clips)


def prepare_decoder(
    model: "VideoChatFlashForConditionalGeneration",
    step: str,
    num_frames: int,
    dropout: bool | dict[str, Any],
    *,
    decode_steps: int,
) -> tuple[Callable[[], Any], int]:
    """Make a prompt of text and features, or a cache that holds it; see `prepare_step`."""
    import torch
    from transformers import DynamicCache
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    from longvideo.evaluation import cost_videochat_flash as cost

    config, device = model.config, model.device
    num_visual = cost.count_clips(config, num_frames) * config.tokens_per_clip
    ids = torch.randint(10, 30000, (1, num_visual + NUM_TEXT), device=device)
    ids[:, 16 : 16 + num_visual] = config.video_token_id
    features = torch.randn(num_visual, config.text_config.hidden_size, device=device)
    given = {"video": BaseModelOutputWithPooling(pooler_output=[features])}

    def prefill() -> Any:
        return model(
            input_ids=ids,
            mm_encoder_outputs=given,
            visual_dropout=dropout,
            past_key_values=DynamicCache(config=config.text_config),
            use_cache=True,
            logits_to_keep=1,
        )

    if step.startswith("prefill"):
        return prefill, cost.prefill_flops(config, num_visual, NUM_TEXT, dropout, causal=False)
    with torch.no_grad():
        cache = prefill().past_key_values
    new = torch.randint(10, 30000, (1, 1), device=device)

    def decode() -> None:
        for _ in range(decode_steps):
            model(input_ids=new, past_key_values=cache, use_cache=True)

    return decode, cost.decode_flops(config, cost.layer_lengths(config, num_visual, NUM_TEXT, dropout))


def run_step(words: Sequence[str]) -> dict[str, Any]:
    """Run one step in this process.

    Args:
        words: Name of the step and its arguments.

    Returns:
        What it measured.
    """
    name, *rest = words
    if name == "bare":
        return run_bare_pass(rest[0])
    if name == "read":
        return run_reading(rest[0], int(rest[1]))
    return run_model_step(name, int(rest[0]), int(rest[1]), rest[2])


def check(args: argparse.Namespace) -> str | None:
    """Say what is wrong with the arguments, if anything."""
    return "--frames must be multiples of 4" if any(count < 4 or count % 4 for count in args.frames) else None


def measure(
    args: argparse.Namespace, in_process: Callable[..., dict[str, Any]], tell: Callable[[str], None]
) -> dict[str, Any]:
    """Run everything.

    Args:
        args: The parsed arguments.
        in_process: Runs the step of some words in a process of its own.
        tell: Says what is being done.

    Returns:
        `steps` and `decoding`.
    """
    steps = measure_steps(args, STEPS, in_process, tell)
    tell("decoding: writing the clip")
    decoding: dict[str, Any] = {"bare": [], "read": [], "ratios": []}
    with tempfile.TemporaryDirectory(prefix="longvideo_bench_") as folder:
        clip = Path(args.clip) if args.clip else Path(folder) / "clip.mp4"
        if not args.clip:
            make_clip(clip, args.minutes)
        kept = int(args.minutes * 60)
        for index in range(args.rounds):
            tell(f"decoding: round {index + 1} of {args.rounds}")
            decoding["bare"].append(in_process(["bare", clip]))
            decoding["read"].append(in_process(["read", clip, kept]))
    return {"steps": steps, "decoding": decoding}


def judge(result: dict[str, Any], frames: Sequence[int]) -> list[dict[str, Any]]:
    """Compare the measurements with the targets.

    Args:
        result: `steps`, `decoding`, `imports`.
        frames: Measured frame counts, ascending.

    Returns:
        One entry per target: name, measured value, limit, whether it is met, and how it was computed.
    """
    steps, low, high = result["steps"], min(frames), max(frames)
    bare, read = result["decoding"]["bare"], result["decoding"]["read"]
    wall, cpu = (min(run[key] for run in read) / min(run[key] for run in bare) for key in ("seconds", "cpu_seconds"))
    clock, unit = judged_clock(result["machine"]["device"])
    added = min(run["longvideo"] for run in result["imports"])
    before = min(run["transformers"] for run in result["imports"])
    merge, tower = (steps[f"{name}/{high}"] for name in ("merge", "tower"))
    growth = tower["peak_bytes"] / max(steps[f"tower/{low}"]["peak_bytes"], 1)
    merging, merging_wall = (merge[key] / (tower[key] - merge[key]) for key in (clock, "seconds"))
    dropped, whole = steps[f"prefill_dropout/{high}"], steps[f"prefill/{high}"]
    prefill, prefill_wall = (dropped[key] / whole[key] for key in (clock, "seconds"))
    flops = dropped["flops_formula"] / whole["flops_formula"]
    rows = [
        (f"memory of chunked encoding, {high} over {low} frames", growth, 1.2, "peak above model and pixels"),
        (f"merging over tower, {high} frames", merging, 0.05, f"{unit}; wall clock {merging_wall:.3f}"),
        (f"prefill with over without dropout, {high} frames", prefill, 0.65,
         f"{unit}; wall clock {prefill_wall:.3f}, FLOPs {flops:.3f}"),
        ("reading a clip at 1 fps over a bare PyAV pass", wall, 1.3, f"wall clock; processor time {cpu:.2f}"),
        ("reading a clip at 1 fps, MB over baseline", max(run["peak_bytes"] for run in read) / 1e6, 300,
         f"{read[0]['kept'] * 224 * 224 * 3 / 1e6:.0f} MB of it are the frames"),
        ("import longvideo after import transformers, seconds", added, 0.3, f"on top of {before:.2f} s"),
    ]  # fmt: skip
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
        label += " (per token)" if label.startswith("decode") else " + merging" if label == "tower" else ""
        counted = "-" if step["flops_counted"] is None else f"{step['flops_counted'] / 1e9:.3f}"
        rows.append(
            [label, num_frames, f"{step['visual_tokens']:,}", *time_and_memory(step),
             f"{step['flops_formula'] / 1e9:.3f}", counted]
        )  # fmt: skip
    for label, key in (("bare PyAV pass", "bare"), ("reading a clip at 1 fps", "read")):
        best = min(result["decoding"][key], key=lambda run: run["seconds"])
        peak = f"{best['peak_bytes'] / 1e6:.1f}" if "peak_bytes" in best else "-"
        rows.append(
            [
                label,
                str(best.get("kept", best.get("frames"))),
                "-",
                f"{best['seconds']:.2f}",
                f"{best['cpu_seconds']:.2f}",
                peak,
                "-",
                "-",
            ]
        )
    return [(HEADS, rows)]
