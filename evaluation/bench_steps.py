"""What the benchmarks of all architectures measure and report with: time, peak memory, targets; a clip to decode."""

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

CLIP = {"minutes": 10, "width": 640, "height": 360, "fps": 25, "gop": 250}


class PeakMemory:
    """Measures how far memory rises above what it is now."""

    def __init__(self, device: str):
        self.device = device
        if device == "cpu":
            # Writing 5 lets the kernel forget the peak of building the model; not every system allows it.
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")
            self.start = resident_bytes("VmRSS")
        else:
            import torch

            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.start = torch.cuda.memory_allocated()

    def rise(self) -> int:
        """Return the bytes between the start and the highest point since."""
        if self.device == "cpu":
            return max(resident_bytes("VmHWM") - self.start, 0)
        import torch

        return torch.cuda.max_memory_allocated() - self.start


def resident_bytes(field: str) -> int:
    """Read the resident memory of this process.

    Args:
        field: "VmRSS" for now, "VmHWM" for the highest value so far.

    Returns:
        Bytes.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
    except (OSError, StopIteration):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def fastest(function: Callable[[], Any], rounds: int, device: str) -> tuple[float, float]:
    """Run a function several times.

    Args:
        function: Takes nothing.
        rounds: Number of runs.
        device: "cpu" or "cuda".

    Returns:
        Seconds of the fastest run by the clock on the wall, and by the processor's (all threads).
    """
    import torch

    wall, processor = [], []
    for _ in range(rounds):
        begin, begin_processor = time.perf_counter(), time.process_time()
        function()
        if device != "cpu":
            torch.cuda.synchronize()
        wall.append(time.perf_counter() - begin)
        processor.append(time.process_time() - begin_processor)
    return min(wall), min(processor)


def run_bare_pass(path: str) -> dict[str, Any]:
    """Decode every frame with PyAV and keep none.

    Args:
        path: Video file.

    Returns:
        `seconds` of the wall clock and `cpu_seconds` of all threads.
    """
    import av

    begin, begin_cpu, count = time.perf_counter(), time.process_time(), 0
    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        for _ in container.decode(stream):
            count += 1
    return {
        "seconds": time.perf_counter() - begin,
        "cpu_seconds": time.process_time() - begin_cpu,
        "frames": count,
    }


def run_reading(path: str, num_frames: int) -> dict[str, Any]:
    """Read evenly spread frames at 224 pixels.

    Args:
        path: Video file.
        num_frames: Frames to keep.

    Returns:
        `seconds`, `cpu_seconds`, `peak_bytes` above the start, the result included, and the `backend`.
    """
    from longvideo.processing.shared.frame_sampling import middle_indices
    from longvideo.processing.shared.video_io import read_video

    memory, begin, begin_cpu = PeakMemory("cpu"), time.perf_counter(), time.process_time()
    frames, metadata = read_video(
        path,
        sample_indices_fn=lambda metadata: middle_indices(metadata.total_num_frames, num_frames),
        size=(224, 224),
        backend="pyav",
        progress=False,
    )
    return {
        "seconds": time.perf_counter() - begin,
        "cpu_seconds": time.process_time() - begin_cpu,
        "peak_bytes": memory.rise(),
        "kept": len(frames),
        "backend": metadata.video_backend,
    }


def make_clip(path: Path, minutes: float) -> None:
    """Write an H.264 clip of moving coloured noise, 360 lines, 25 frames per second, a keyframe every 10 seconds.

    Args:
        path: File to write.
        minutes: Length.
    """
    import av
    import numpy as np

    width, height = CLIP["width"], CLIP["height"]
    picture = np.random.default_rng(42).integers(0, 255, (height // 8, width // 8, 3), dtype=np.uint8)
    picture = picture.repeat(8, 0).repeat(8, 1)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=CLIP["fps"])
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.gop_size = CLIP["gop"]
        stream.options = {"preset": "veryfast", "crf": "26", "sc_threshold": "0"}
        stream.thread_type = "AUTO"
        for index in range(int(minutes * 60 * CLIP["fps"])):
            moved = np.roll(picture, (index // 2 % height, 2 * index % width), (0, 1))
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(moved), format="rgb24")
            frame.pts = index
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


# ---------------------------------------------------------------------- what a benchmark reports


def measure_steps(
    args: argparse.Namespace,
    names: Sequence[str],
    in_process: Callable[[list], dict[str, Any]],
    tell: Callable[[str], None],
    *,
    rounds: Callable[[str], int] | None = None,
) -> dict[str, dict[str, Any]]:
    """Run steps for every number of frames, each in a process of its own.

    Args:
        args: The parsed arguments.
        names: Steps.
        in_process: Runs the step of some words in a process of its own.
        tell: Says what is being done.
        rounds: Gives how often a step is run; `args.rounds` times when None.

    Returns:
        What each step measured, by its name and the number of frames, "tower/64".
    """
    steps = {}
    for num_frames in args.frames:
        for name in names:
            tell(f"{name}, {num_frames} frames")
            count = args.rounds if rounds is None else rounds(name)
            steps[f"{name}/{num_frames}"] = in_process([name, num_frames, count, args.device])
    return steps


def judged_clock(device: str) -> tuple[str, str]:
    """Say which clock targets are judged by: other work stretches the one on the wall, not the processor's.

    Args:
        device: "cpu" or "cuda".

    Returns:
        Its name in what was measured, and for people.
    """
    return ("cpu_seconds", "processor time") if device == "cpu" else ("seconds", "seconds")


def judged(rows: Sequence[tuple[str, float, float, str]]) -> list[dict[str, Any]]:
    """Compare what was measured with the targets.

    Args:
        rows: Name, measured value, limit, and how it was computed.

    Returns:
        One entry per target: name, measured value, limit, whether it is met, and how it was computed.
    """
    return [
        {"name": name, "measured": measured, "limit": round(limit, 4), "met": measured <= limit, "how": how}
        for name, measured, limit, how in rows
    ]


def time_and_memory(step: dict[str, Any]) -> list[str]:
    """Write the cells of a table that every step has: seconds, processor seconds and MB at the peak."""
    return [f"{step['seconds']:.4f}", f"{step['cpu_seconds']:.4f}", f"{step['peak_bytes'] / 1e6:.1f}"]
