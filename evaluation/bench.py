"""`python -m longvideo.evaluation.bench videochat_flash`: seconds, peak memory and FLOPs of every step, with targets.

The model is random and of middle size. Every step runs in a process of its own, so that its peak of resident memory
(or of GPU memory) is its own; several rounds are run and the fastest counts, so that other work on the machine
disturbs as little as possible. FLOPs are counted by torch and must equal the formulas of `evaluation.cost`.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from longvideo.evaluation.bench_steps import CLIP, STEPS, make_clip, run_step

FRAMES = (64, 256)


def package_environment() -> dict[str, str]:
    """Return an environment in which other processes import the package of this one.

    Returns:
        A copy of the environment.
    """
    environment = dict(os.environ)
    root = str(Path(sys.modules["longvideo"].__file__ or "").resolve().parent.parent)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, environment.get("PYTHONPATH", "")]))
    return environment


def in_process(words: Sequence[str], *, threads: int | None) -> dict[str, Any]:
    """Run one step in a fresh process.

    Args:
        words: Arguments behind `--step`.
        threads: Threads of torch, None for its default.

    Returns:
        What the step measured.

    Raises:
        RuntimeError: The step failed; the text holds the end of its errors.
    """
    environment = package_environment()
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    command = [sys.executable, "-m", "longvideo.evaluation.bench", "--step", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(f"The step {' '.join(map(str, words))} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def import_seconds() -> dict[str, float]:
    """Measure imports in a fresh process, one after the other.

    Returns:
        Seconds of `transformers`, and of `longvideo` after it.
    """
    code = (
        "import json, time; a = time.perf_counter(); import transformers; b = time.perf_counter(); import longvideo; "
        "print(json.dumps({'transformers': b - a, 'longvideo': time.perf_counter() - b}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=package_environment(), check=True
    )
    return json.loads(done.stdout.strip().splitlines()[-1])


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Run everything.

    Args:
        args: The parsed arguments.

    Returns:
        `machine`, `steps`, `decoding`, `imports`, `targets`.
    """

    def tell(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    steps: dict[str, dict[str, Any]] = {}
    for num_frames in args.frames:
        for step in STEPS:
            tell(f"{step}, {num_frames} frames")
            words = [step, num_frames, args.rounds, args.device]
            steps[f"{step}/{num_frames}"] = in_process(words, threads=args.threads)
    tell("decoding: writing the clip")
    decoding: dict[str, Any] = {"bare": [], "read": [], "ratios": []}
    with tempfile.TemporaryDirectory(prefix="longvideo_bench_") as folder:
        clip = Path(args.clip) if args.clip else Path(folder) / "clip.mp4"
        if not args.clip:
            make_clip(clip, args.minutes)
        kept = int(args.minutes * 60)
        for index in range(args.rounds):
            tell(f"decoding: round {index + 1} of {args.rounds}")
            decoding["bare"].append(in_process(["bare", clip], threads=args.threads))
            decoding["read"].append(in_process(["read", clip, kept], threads=args.threads))
    tell("imports")
    imports = [import_seconds() for _ in range(max(args.rounds, 3))]
    result = {"machine": describe_machine(args), "steps": steps, "decoding": decoding, "imports": imports}
    result["targets"] = judge(result, args.frames)
    return result


def describe_machine(args: argparse.Namespace) -> dict[str, Any]:
    """Name what the figures were measured on.

    Args:
        args: The parsed arguments.

    Returns:
        Processor, cores, load, device, versions, command.
    """
    import av
    import torch
    import transformers

    processor = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    words = ["python -m longvideo.evaluation.bench videochat_flash", f"--rounds {args.rounds}"]
    if args.threads is not None:
        words.append(f"--threads {args.threads}")
    if args.device != "cpu":
        words.append(f"--device {args.device}")
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "device": torch.cuda.get_device_name() if args.device != "cpu" else "cpu",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "av": av.__version__,
        "command": " ".join(words),
    }


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
    # Other work on the machine stretches the clock on the wall, not the processor's.
    clock = "cpu_seconds" if result["machine"]["device"] == "cpu" else "seconds"
    unit = "processor time" if clock == "cpu_seconds" else "seconds"
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
    return [
        {"name": name, "measured": measured, "limit": limit, "met": measured <= limit, "how": how}
        for name, measured, limit, how in rows
    ]


def format_table(result: dict[str, Any], *, markdown: bool) -> str:
    """Lay the measurements out.

    Args:
        result: What `measure` returned.
        markdown: Whether to write tables for a document.

    Returns:
        Lines of text.
    """
    rows = []
    for name, step in result["steps"].items():
        label, num_frames = name.split("/")
        label += " (per token)" if label.startswith("decode") else " + merging" if label == "tower" else ""
        counted = "-" if step["flops_counted"] is None else f"{step['flops_counted'] / 1e9:.3f}"
        rows.append(
            [label, num_frames, f"{step['visual_tokens']:,}", f"{step['seconds']:.4f}", f"{step['cpu_seconds']:.4f}",
             f"{step['peak_bytes'] / 1e6:.1f}", f"{step['flops_formula'] / 1e9:.3f}", counted]
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
    heads = [
        "step",
        "frames",
        "visual tokens",
        "seconds",
        "processor s",
        "peak MB",
        "GFLOPs, formula",
        "GFLOPs, counted",
    ]
    targets = [
        [entry["name"], f"{entry['measured']:.3f}", f"<= {entry['limit']}", "met" if entry["met"] else "NOT MET",
         entry["how"]]
        for entry in result["targets"]
    ]  # fmt: skip
    machine = result["machine"]
    about = (
        f"{machine['processor']}, {machine['cores']} cores, load {machine['load_average']}, device "
        f"{machine['device']}; python {machine['python']}, torch {machine['torch']}, "
        f"transformers {machine['transformers']}, av {machine['av']}."
    )
    lay = markdown_table if markdown else plain_table
    command = f"`{machine['command']}`" if markdown else machine["command"]
    return "\n\n".join(
        [lay(heads, rows), lay(["target", "measured", "limit", "", "how"], targets), about, f"Command: {command}"]
    )


def markdown_table(heads: list[str], rows: list[list[str]]) -> str:
    """Write a table in Markdown."""
    lines = ["| " + " | ".join(row) + " |" for row in [heads, ["---"] * len(heads), *rows]]
    return "\n".join(lines)


def plain_table(heads: list[str], rows: list[list[str]]) -> str:
    """Write a table in columns."""
    widths = [max(len(row[column]) for row in [heads, *rows]) for column in range(len(heads))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [heads, *rows]]
    return "\n".join(line.rstrip() for line in lines)


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the command.

    Returns:
        The parser.
    """
    parser = argparse.ArgumentParser(prog="python -m longvideo.evaluation.bench", description=__doc__)
    parser.add_argument("model", nargs="?", choices=["videochat_flash"], help="architecture")
    parser.add_argument("--frames", type=int, nargs="+", default=list(FRAMES), help="frame counts (default: 64 256)")
    parser.add_argument("--rounds", type=int, default=3, help="timed runs per step (default: 3)")
    parser.add_argument("--threads", type=int, help="threads of torch (default: its own choice)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where the model runs")
    parser.add_argument("--minutes", type=float, default=CLIP["minutes"], help="length of the clip (default: 10)")
    parser.add_argument("--clip", help="clip to decode in place of a rendered one; --minutes is its length")
    parser.add_argument("--json", metavar="FILE", help="write everything measured to a file as well")
    parser.add_argument("--markdown", action="store_true", help="print tables for a document")
    parser.add_argument("--step", nargs="+", help=argparse.SUPPRESS)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print.

    Args:
        argv: Words after the program's name; None takes those of the process.

    Returns:
        0 when every target is met, 1 otherwise.
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.step:
        print(json.dumps(run_step(args.step)))
        return 0
    if args.model is None:
        parser.error("name an architecture: videochat_flash")
    if args.rounds < 1 or any(count < 4 or count % 4 for count in args.frames):
        parser.error("--rounds must be at least 1 and --frames multiples of 4")
    result = measure(args)
    print(format_table(result, markdown=args.markdown))
    if args.json:
        partial = Path(f"{args.json}.partial")
        partial.write_text(json.dumps(result, indent=2))
        partial.replace(args.json)
    return 0 if all(entry["met"] for entry in result["targets"]) else 1


if __name__ == "__main__":
    sys.exit(main())
