"""`python -m longvideo.evaluation.bench ARCHITECTURE`: seconds, peak memory and FLOPs of every step, with targets.

The model is random and of middle size. Every step runs in a process of its own, so that its peak of resident memory
(or of GPU memory) is its own; several rounds are run and the fastest counts, so that other work on the machine
disturbs as little as possible. What is measured stands in the module that `ARCHITECTURES` names. Such a module offers
`FRAMES`, `check(args)`, `measure(args, in_process, tell)`, `run_step(words)`, `judge(result, frames)` and
`tables(result)`.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from longvideo.evaluation.bench_steps import CLIP

ARCHITECTURES = {
    "videochat_flash": "longvideo.evaluation.bench_videochat_flash",
    "longvu": "longvideo.evaluation.bench_longvu",
    "llava_st": "longvideo.evaluation.bench_llava_st",
    "crosslmm": "longvideo.evaluation.bench_crosslmm",
    "crossvllm": "longvideo.evaluation.bench_crossvllm",
    "training": "longvideo.evaluation.bench_training",
}


def load_architecture(name: str) -> ModuleType:
    """Return the module that measures an architecture, one of `ARCHITECTURES`."""
    return import_module(ARCHITECTURES[name])


def package_environment() -> dict[str, str]:
    """Return an environment in which other processes import the package of this one.

    Returns:
        A copy of the environment.
    """
    environment = dict(os.environ)
    root = str(Path(sys.modules["longvideo"].__file__ or "").resolve().parent.parent)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, environment.get("PYTHONPATH", "")]))
    return environment


def in_process(model: str, words: Sequence[str], *, threads: int | None) -> dict[str, Any]:
    """Run one step in a fresh process.

    Args:
        model: Architecture.
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
    command = [sys.executable, "-m", "longvideo.evaluation.bench", model, "--step", *map(str, words)]
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
        What the architecture measured, `imports`, `machine`, `targets`.
    """

    def tell(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    architecture = load_architecture(args.model)

    def in_own_process(words: Sequence[str]) -> dict[str, Any]:
        return in_process(args.model, words, threads=args.threads)

    result = architecture.measure(args, in_own_process, tell)
    tell("imports")
    result["imports"] = [import_seconds() for _ in range(max(args.rounds, 3))]
    result["machine"] = describe_machine(args)
    result["targets"] = architecture.judge(result, args.frames)
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
    words = [f"python -m longvideo.evaluation.bench {args.model}", f"--rounds {args.rounds}"]
    if args.threads is not None:
        words.append(f"--threads {args.threads}")
    if args.device != "cpu":
        words.append(f"--device {args.device}")
    return {
        "architecture": args.model,
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


def format_tables(result: dict[str, Any], *, markdown: bool) -> str:
    """Lay the measurements out.

    Args:
        result: What `measure` returned.
        markdown: Whether to write tables for a document.

    Returns:
        Lines of text.
    """
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
    blocks = [lay(heads, rows) for heads, rows in load_architecture(machine["architecture"]).tables(result)]
    command = f"`{machine['command']}`" if markdown else machine["command"]
    return "\n\n".join(
        [*blocks, lay(["target", "measured", "limit", "", "how"], targets), about, f"Command: {command}"]
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
    parser.add_argument("model", nargs="?", choices=list(ARCHITECTURES), help="architecture, or training")
    parser.add_argument("--frames", type=int, nargs="+", help="frame counts (default: those of the architecture)")
    parser.add_argument("--rounds", type=int, default=3, help="timed runs per step (default: 3)")
    parser.add_argument("--threads", type=int, help="threads of torch (default: its own choice)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where the model runs")
    parser.add_argument("--minutes", type=float, default=CLIP["minutes"], help="length of the clip (default: 10)")
    parser.add_argument(
        "--memory-frames", type=int, nargs="+", help="lengths for peak memory (default: 256 1024 3600)"
    )
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
    if args.model is None:
        parser.error(f"name an architecture: {', '.join(ARCHITECTURES)}")
    architecture = load_architecture(args.model)
    if args.step:
        print(json.dumps(architecture.run_step(args.step)))
        return 0
    args.frames = args.frames or list(architecture.FRAMES)
    wrong = "--rounds must be at least 1" if args.rounds < 1 else architecture.check(args)
    if wrong:
        parser.error(wrong)
    result = measure(args)
    print(format_tables(result, markdown=args.markdown))
    if args.json:
        partial = Path(f"{args.json}.partial")
        partial.write_text(json.dumps(result, indent=2))
        partial.replace(args.json)
    return 0 if all(entry["met"] for entry in result["targets"]) else 1


if __name__ == "__main__":
    sys.exit(main())
