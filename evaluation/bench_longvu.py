"""Benchmark of LongVU: every stage at a middle size, stages behind the towers against plain loops, and peak memory.

Stages get made-up input of the right shape, so that each can be measured by itself: every second frame of a video is
kept, and both selection by the question and spatial compression run, although a video only meets one of them. Memory
is measured on the way that long videos take, window by window, with towers so small that what is kept shows, and
frames that are all different.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from longvideo.evaluation.bench_steps import PeakMemory, fastest, judged, judged_clock, measure_steps, time_and_memory

if TYPE_CHECKING:
    import torch

    from longvideo.modeling.longvu.configuration_longvu import LongVUConfig
    from longvideo.modeling.longvu.modeling_longvu import LongVUForConditionalGeneration

FRAMES = (64, 256)
NUM_TEXT = 64
DECODE_STEPS = 16
STAGES = ("reduction", "sampler", "selection", "compression", "insertion")
STEPS = ("dino", "siglip", *STAGES, "prefill", "decode")
MEMORY_FRAMES = (256, 1024, 3600)
WINDOW = 16


def bench_config(*, tiny_towers: bool = False) -> "LongVUConfig":
    """Build the random configuration of middle size.

    Decoder 512 wide with 8 layers; towers 384 wide with 6 layers at 224 pixels; sampler 512 wide with 3 layers.

    Args:
        tiny_towers: Whether towers are 32 wide with 2 layers at 56 pixels instead, and the sampler has 1 layer.

    Returns:
        A `LongVUConfig`.
    """
    from longvideo.modeling.longvu.configuration_longvu import LongVUConfig

    width, layers, heads, side = (32, 2, 2, 56) if tiny_towers else (384, 6, 6, 224)
    tower = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads, "image_size": side}
    text = {"model_type": "qwen2", "vocab_size": 32000, "hidden_size": 512, "intermediate_size": 1536,
            "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 2}  # fmt: skip
    return LongVUConfig(
        vision_config={"model_type": "siglip_vision_model", **tower, "patch_size": 14, "intermediate_size": 4 * width},
        dino_config={"model_type": "dinov2", **tower, "patch_size": 14, "use_swiglu_ffn": True},
        text_config=text,
        image_token_id=31998,
        video_token_id=31999,
        vision_hidden_size=512,
        connector_depth=1 if tiny_towers else 3,
        vision_chunk_size=WINDOW,
        # With tiny towers memory is measured: every frame survives, the worst case.
        dino_threshold=2.0 if tiny_towers else 0.83,
    )


def make_model(device: str, *, tiny_towers: bool = False) -> "LongVUForConditionalGeneration":
    """Build the random model.

    Args:
        device: "cpu" or "cuda".
        tiny_towers: See `bench_config`.

    Returns:
        The model in evaluation mode.
    """
    import torch

    from longvideo.modeling.longvu.modeling_longvu import LongVUForConditionalGeneration

    torch.manual_seed(42)
    return LongVUForConditionalGeneration(bench_config(tiny_towers=tiny_towers)).eval().to(device)


def prepare_step(
    model: "LongVUForConditionalGeneration", step: str, num_frames: int, *, naive: bool = False
) -> tuple[Callable[[], Any], int]:
    """Make the input of a step.

    Args:
        model: The random model.
        step: One of `STEPS`.
        num_frames: Sampled frames; half of them are kept.
        naive: Whether the stage runs as a plain loop.

    Returns:
        A function that runs the step, and its visual tokens (0 before there are any).
    """
    import torch

    core, config, device = model.model, model.config, model.device
    kept = max(num_frames // 2, 1)
    if step in ("dino", "siglip"):
        side, grid = config.vision_config.image_size, core._dino_grid if step == "dino" else core._siglip_grid
        pixels = torch.randn(num_frames if step == "dino" else kept, 3, side, side, device=device)
        return lambda: [grid(piece) for piece in pixels.split(config.vision_chunk_size)], 0
    if step == "reduction":
        return prepare_reduction(model, num_frames, naive=naive), 0
    if step == "sampler":
        return prepare_sampler(model, kept, naive=naive), 0
    if step in ("selection", "compression"):
        return prepare_choice(model, kept, step, naive=naive)
    return prepare_decoder(model, kept, step, naive=naive)


def prepare_reduction(
    model: "LongVUForConditionalGeneration", num_frames: int, *, naive: bool = False
) -> Callable[[], list[int]]:
    """Make features of which every second frame is much like the others; see `prepare_step`."""
    import torch

    from longvideo.evaluation import bench_naive_longvu as loops
    from longvideo.modeling.longvu.temporal_reduction import TemporalReducer

    config = model.config
    cells, width = config.vision_grid_size**2, config.dino_config.hidden_size
    features = torch.randn(1, cells, width).repeat(num_frames, 1, 1) + 0.1 * torch.randn(num_frames, cells, width)
    features[1::2] = torch.randn(num_frames // 2, cells, width)
    features, settings = features.to(model.device), {"threshold": 0.4, "window": WINDOW}
    if naive:
        return lambda: loops.reduce_frames(features.flatten(1), **settings)

    def reduce() -> list[int]:
        reducer = TemporalReducer(num_frames, max_frames=num_frames, **settings)
        for piece in features.split(config.vision_chunk_size):
            reducer.add(piece)
        reducer.finish()
        return reducer.kept().tolist()

    return reduce


def prepare_sampler(
    model: "LongVUForConditionalGeneration", num_kept: int, *, naive: bool = False
) -> Callable[[], "torch.Tensor"]:
    """Make the grids of both towers, projected on the way; see `prepare_step`."""
    import torch

    from longvideo.evaluation import bench_naive_longvu as loops

    core, config = model.model, model.config
    towers = (config.vision_config.hidden_size, config.dino_config.hidden_size)
    grids = [torch.randn(num_kept, config.vision_grid_size**2, width, device=model.device) for width in towers]

    def sample_naive() -> "torch.Tensor":
        frames = []
        for pair in zip(*grids, strict=True):
            features = [project(grid[None]) for project, grid in zip(core.vision_projectors, pair, strict=True)]
            frames.append(loops.sample_frames(core.vision_sampler, core.vision_query[0], features))
        return torch.cat(frames)

    def sample() -> "torch.Tensor":
        pieces = zip(*(grid.split(config.vision_chunk_size) for grid in grids), strict=True)
        return torch.cat([core._aggregate(*piece, [(1, 1)]) for piece in pieces])

    return sample_naive if naive else sample


def prepare_choice(
    model: "LongVUForConditionalGeneration", num_kept: int, step: str, *, naive: bool = False
) -> tuple[Callable[[], "torch.Tensor"], int]:
    """Make aggregated frames: low grids with a quarter raised, or full grids, compressed; see `prepare_step`."""
    import torch

    from longvideo.evaluation import bench_naive_longvu as loops
    from longvideo.modeling.longvu.spatial_compression import compress
    from longvideo.modeling.longvu.vision_longvu import LongVUVisual

    core, config, device = model.model, model.config, model.device
    frames = torch.randn(1, config.image_token_len, config.vision_hidden_size).repeat(num_kept, 1, 1)
    frames = (frames + 0.3 * torch.randn_like(frames)).to(device)
    text = torch.randn(NUM_TEXT, config.text_config.hidden_size, device=device)
    sides = (config.grid_size, config.lowres_token)
    full, low = (side * (side + 1) for side in sides)
    render = core.multi_modal_projector, core.image_newline
    visual = LongVUVisual(frames, torch.arange(num_kept), torch.zeros(num_kept), num_kept, (1, 1), True)
    renderer = core._renderer()
    if step == "selection":
        budget = num_kept * low + num_kept // 4 * (full - low)
        if naive:
            return lambda: loops.select_grids(*render, frames, text, sides=sides, budget=budget), budget
        return lambda: renderer.video(visual, "low", budget, text)[0], budget
    settings = {"window": config.stc_window, "threshold": config.drop_threshold}

    def compress_naive() -> "torch.Tensor":
        tokens = torch.stack([loops.render_frame(*render, frame, sides[0]) for frame in frames])
        return tokens[loops.compress_tokens(tokens, **settings)]

    def compress_all() -> "torch.Tensor":
        tokens = renderer.tokens(visual, full=True)
        return tokens[compress(tokens, **settings)]

    with torch.no_grad():
        num_tokens = len(compress_all())
    return compress_naive if naive else compress_all, num_tokens


def prepare_decoder(
    model: "LongVUForConditionalGeneration", num_kept: int, step: str, *, naive: bool = False
) -> tuple[Callable[[], Any], int]:
    """Make a prompt and visual tokens, as many as fit; see `prepare_step`."""
    import torch
    from transformers import DynamicCache

    from longvideo.evaluation import bench_naive_longvu as loops
    from longvideo.modeling.layers.placeholders import insert_features

    config, device = model.config, model.device
    room = config.context_length - NUM_TEXT - DECODE_STEPS
    num_visual = min(num_kept * config.grid_size * (config.grid_size + 1), room)
    embeds = torch.randn(1, NUM_TEXT + 1, config.text_config.hidden_size, device=device)
    visual = torch.randn(num_visual, config.text_config.hidden_size, device=device)
    place = torch.zeros(1, NUM_TEXT + 1, dtype=torch.bool, device=device)
    place[0, 16] = True
    if step == "insertion":
        if naive:
            return lambda: loops.insert_tokens(embeds[0], 16, visual), num_visual
        return lambda: insert_features(embeds, place, [visual]).inputs_embeds[0], num_visual
    prompt = insert_features(embeds, place, [visual]).inputs_embeds

    def prefill() -> Any:
        cache = DynamicCache(config=config.text_config)
        return model(inputs_embeds=prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)

    if step == "prefill":
        return prefill, num_visual
    with torch.no_grad():
        cache = prefill().past_key_values
    new = torch.randint(10, 30000, (1, 1), device=device)

    def decode() -> None:
        for _ in range(DECODE_STEPS):
            model(input_ids=new, past_key_values=cache, use_cache=True)

    return decode, num_visual


def run_model_step(step: str, num_frames: int, rounds: int, device: str, *, naive: bool = False) -> dict[str, Any]:
    """Measure one step of the model on made-up input.

    Args:
        step: One of `STEPS`.
        num_frames: Sampled frames.
        rounds: Timed runs.
        device: "cpu" or "cuda".
        naive: Whether the stage runs as a plain loop.

    Returns:
        `seconds`, `cpu_seconds`, `peak_bytes` above model and input, `visual_tokens`.
    """
    import torch

    model = make_model(device)
    function, num_visual = prepare_step(model, step, num_frames, naive=naive)
    with torch.no_grad():
        memory = PeakMemory(device)
        if not naive:
            function()  # the first run warms up; a loop takes minutes and gains nothing
        seconds, cpu_seconds = fastest(function, rounds, device)
        peak = memory.rise()
    runs = DECODE_STEPS if step == "decode" else 1
    times = {"seconds": seconds / runs, "cpu_seconds": cpu_seconds / runs}
    return {**times, "peak_bytes": peak, "visual_tokens": num_visual}


class MadeUpWindows:
    """Noise for both towers, window by window and the same in every pass, as a decoder gives a file.

    Args:
        num_frames: Frames of the video.
        side: Their side in pixels.
        device: Where they lie.
    """

    def __init__(self, num_frames: int, side: int, device: str) -> None:
        self.num_frames, self.side, self.device = num_frames, side, device

    def __iter__(self) -> Iterator[dict[str, "torch.Tensor"]]:
        import torch

        for start in range(0, self.num_frames, WINDOW):
            noise = torch.Generator().manual_seed(start)
            count = min(WINDOW, self.num_frames - start)
            pixels = torch.randn(count, 3, self.side, self.side, generator=noise).to(self.device)
            yield {"pixel_values_videos": pixels, "pixel_values_videos_dino": pixels}

    def again(self) -> "MadeUpWindows":
        """Start from the first frame."""
        return self


def run_memory(num_frames: int, device: str) -> dict[str, Any]:
    """Ask about a video that is read window by window.

    Args:
        num_frames: Frames of the video.
        device: "cpu" or "cuda".

    Returns:
        `peak_bytes` above the model, `encoding_bytes` (the same before the answer), `kept_frames`, `visual_tokens`,
        `logits_positions` (most positions that one call of the output head got), and `prompt_positions`.
    """
    import torch

    model = make_model(device, tiny_towers=True)
    chosen, positions = [], []
    model.lm_head.register_forward_pre_hook(lambda _, given: positions.append(given[0].shape[1]))
    model.register_forward_hook(lambda _, __, output: chosen.append(output.video_selections))
    ids = torch.randint(10, 30000, (1, NUM_TEXT), device=model.device)
    ids[0, 16] = model.config.video_token_id
    side = model.config.vision_config.image_size
    with torch.no_grad():
        model.generate(input_ids=ids[:, :16], max_new_tokens=2, do_sample=False)  # loads what a first call loads
        chosen.clear()
        memory = PeakMemory(device)
        encoded = model.encode_video(windows=MadeUpWindows(num_frames, side, device), num_frames=num_frames)
        encoding = memory.rise()
        model.generate(input_ids=ids, encoded_video=encoded, max_new_tokens=2, do_sample=False)
        peak = memory.rise()
    num_visual = len(chosen[0][0].token_frame)
    return {
        "encoding_bytes": encoding,
        "peak_bytes": peak,
        "kept_frames": len(encoded.visuals[0].kept_frames),
        "visual_tokens": num_visual,
        "logits_positions": max(positions),
        "prompt_positions": NUM_TEXT - 1 + num_visual,
    }


def run_step(words: Sequence[str]) -> dict[str, Any]:
    """Run one step in this process.

    Args:
        words: Name of the step and its arguments.

    Returns:
        What it measured.
    """
    name, num_frames, *rest = words
    if name == "memory":
        return run_memory(int(num_frames), rest[0])
    naive = name.startswith("naive_")
    return run_model_step(name.removeprefix("naive_"), int(num_frames), int(rest[0]), rest[1], naive=naive)


def check(args: argparse.Namespace) -> str | None:
    """Say what is wrong with the arguments, if anything."""
    if min(args.frames) < 4 or min(args.memory_frames or MEMORY_FRAMES) < 1:
        return "--frames must be at least 4 and --memory-frames at least 1"
    return None


def measure(
    args: argparse.Namespace, in_process: Callable[[list], dict[str, Any]], tell: Callable[[str], None]
) -> dict[str, Any]:
    """Run everything.

    Args:
        args: The parsed arguments.
        in_process: Runs the step of some words in a process of its own.
        tell: Says what is being done.

    Returns:
        `steps` and `memory`.
    """
    names = (*STEPS, *(f"naive_{stage}" for stage in STAGES))
    steps = measure_steps(
        args, names, in_process, tell, rounds=lambda name: 1 if name.startswith("naive_") else args.rounds
    )
    memory = {}
    for num_frames in args.memory_frames or MEMORY_FRAMES:
        tell(f"memory, {num_frames} frames")
        memory[str(num_frames)] = in_process(["memory", num_frames, args.device])
    return {"steps": steps, "memory": memory}


def judge(result: dict[str, Any], frames: Sequence[int]) -> list[dict[str, Any]]:
    """Compare the measurements with the targets.

    Args:
        result: `steps`, `memory`, `machine`.
        frames: Measured frame counts.

    Returns:
        One entry per target: name, measured value, limit, whether it is met, and how it was computed.
    """
    steps, memory = result["steps"], result["memory"]
    clock, unit = judged_clock(result["machine"]["device"])
    rows = []
    for num_frames in sorted(frames):
        fast, naive = (
            {key: sum(steps[f"{prefix}{stage}/{num_frames}"][key] for stage in STAGES) for key in (clock, "seconds")}
            for prefix in ("", "naive_")
        )
        how = f"{unit}, {fast[clock]:.2f} of {naive[clock]:.2f} s; wall clock {fast['seconds'] / naive['seconds']:.3f}"
        rows.append(
            (f"stages behind the towers over plain loops, {num_frames} frames", fast[clock] / naive[clock], 1 / 3, how)
        )
    *_, middle, longest = sorted(memory, key=int) if len(memory) > 1 else [*memory] * 2
    kept = f"{memory[longest]['kept_frames']} and {memory[middle]['kept_frames']} frames kept"
    for key, what in (("encoding_bytes", "encoding"), ("peak_bytes", "encoding and answer")):
        growth = memory[longest][key] / max(memory[middle][key], 1)
        rows.append(
            (f"memory of {what}, {longest} over {middle} frames", growth, 1.3, f"peak above the model; {kept}")
        )
    most = max(run["logits_positions"] for run in memory.values())
    whole = max(run["prompt_positions"] for run in memory.values())
    rows.append(("positions with logits in one call", most, 1, f"of prompts of up to {whole:,} positions"))
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
        label = f"{label.removeprefix('naive_')}, plain loop" if label.startswith("naive_") else label
        label += " (per token)" if label == "decode" else ""
        tokens = f"{step['visual_tokens']:,}" if step["visual_tokens"] else "-"
        rows.append([label, num_frames, tokens, *time_and_memory(step)])
    memory = [
        [num_frames, str(run["kept_frames"]), f"{run['visual_tokens']:,}", f"{run['encoding_bytes'] / 1e6:.1f}",
         f"{run['peak_bytes'] / 1e6:.1f}",
         str(run["logits_positions"])]
        for num_frames, run in result["memory"].items()
    ]  # fmt: skip
    return [
        (["step", "frames", "visual tokens", "seconds", "processor s", "peak MB"], rows),
        (
            [
                "frames, read in windows",
                "kept",
                "visual tokens",
                "peak MB of encoding",
                "with the answer",
                "positions with logits",
            ],
            memory,
        ),
    ]
