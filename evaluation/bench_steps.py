"""The single measurements of `bench`: each runs in a process of its own and returns plain numbers."""

import contextlib
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from longvideo.modeling.videochat_flash.configuration_videochat_flash import VideoChatFlashConfig
    from longvideo.modeling.videochat_flash.modeling_videochat_flash import VideoChatFlashForConditionalGeneration

NUM_TEXT = 64
DECODE_STEPS = 16
DROPOUT = {"type": "uniform0_attention", "ratios": [1.0, 0.75, 0.25]}
STEPS = ("tower", "merge", "prefill", "prefill_dropout", "decode", "decode_dropout")
CLIP = {"minutes": 10, "width": 640, "height": 360, "fps": 25, "gop": 250}


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

    from longvideo.evaluation import cost
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
    import torch
    from transformers import DynamicCache
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    from longvideo.evaluation import cost
    from longvideo.modeling.layers.token_merging import merge_tokens

    config, vision, device = model.config, model.config.vision_config, model.device
    clips = cost.count_clips(config, num_frames)
    num_visual = clips * config.tokens_per_clip
    if step == "tower":
        # The whole route from pixels to features, chunk by chunk; merging is timed by itself and taken off later.
        pixels = torch.randn(num_frames, 3, vision.image_size, vision.image_size, device=device)
        counts = torch.tensor([num_frames])
        flops = cost.tower_flops(config, num_frames) + cost.merge_flops(config, clips)
        flops += cost.projector_flops(config, num_visual)
        return lambda: model.get_video_features(pixels, counts), flops
    if step == "merge":
        patches = config.mm_local_num_frames * cost.patches_per_frame(config)
        x_BNE = torch.randn(clips, patches, vision.hidden_size, device=device)

        def merge() -> None:
            for piece in x_BNE.split(config.vision_chunk_size):
                merge_tokens(piece, config.tokens_per_clip, num_heads=vision.num_attention_heads)

        return merge, cost.merge_flops(config, clips)

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


def run_step(words: list[str]) -> dict[str, Any]:
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
