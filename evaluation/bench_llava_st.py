"""Benchmark of LLaVA-ST: tower, position embeddings, packers, prefill and decoding at a middle size.

Grid, packers and numbers of frames and tokens are the released ones; tower and decoder are smaller. The packers are
measured against `unfold` and `nn.MultiheadAttention` over the whole video. Every step gets made-up input of the right
shape, so that each can be measured by itself.
"""

import argparse
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from longvideo.evaluation.bench_steps import PeakMemory, fastest, judged, judged_clock, measure_steps, time_and_memory

if TYPE_CHECKING:
    from longvideo.modeling.llava_st.configuration_llava_st import LlavaSTConfig
    from longvideo.modeling.llava_st.modeling_llava_st import LlavaSTForConditionalGeneration

FRAMES = (100,)
NUM_TEXT = 64
DECODE_STEPS = 16
PACKERS = ("spatial", "temporal", "fast")
STEPS = ("tower", "projector", "lape", *PACKERS, "prefill", "decode")
VOCABULARY = 32000
MAX_TIME, MAX_MEMORY = 1 / 2, 1.0


def bench_config(num_frames: int) -> "LlavaSTConfig":
    """Build the random configuration of middle size.

    Decoder 512 wide with 8 layers; tower 384 wide with 6 layers at 384 pixels; packers 1024 wide, as released.

    Args:
        num_frames: Frames of every video, a multiple of 5.

    Returns:
        A `LlavaSTConfig`.
    """
    from longvideo.modeling.llava_st.configuration_llava_st import AXES, LlavaSTConfig

    visual = ("image_start", "image_end", "image", "video_start", "video_end", "video", "slow_video_start",
              "slow_video_end")  # fmt: skip
    names = [*visual, *(f"{axis}_{role}" for axis in AXES for role in ("input", "output"))]
    start = VOCABULARY - 300
    return LlavaSTConfig(
        vision_config={"model_type": "siglip_vision_model", "hidden_size": 384, "intermediate_size": 1536,
                       "num_hidden_layers": 6, "num_attention_heads": 6, "image_size": 384, "patch_size": 14},
        text_config={"model_type": "qwen2", "vocab_size": VOCABULARY, "hidden_size": 512, "intermediate_size": 1536,
                     "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 2},
        coordinate_token_start=start,
        num_frames=num_frames,
        **{f"{name}_token_id": start - len(names) + i for i, name in enumerate(names)},
    )  # fmt: skip


def make_model(device: str, num_frames: int) -> "LlavaSTForConditionalGeneration":
    """Build the random model.

    Args:
        device: "cpu" or "cuda".
        num_frames: Frames of every video.

    Returns:
        The model in evaluation mode.
    """
    import torch

    from longvideo.modeling.llava_st.modeling_llava_st import LlavaSTForConditionalGeneration

    torch.manual_seed(42)
    return LlavaSTForConditionalGeneration(bench_config(num_frames)).eval().to(device)


def prepare_step(
    model: "LlavaSTForConditionalGeneration", step: str, *, naive: bool = False
) -> tuple[Callable[[], Any], int]:
    """Make the input of a step.

    Args:
        model: The random model.
        step: One of `STEPS`.
        naive: Whether a packer is the naive one.

    Returns:
        A function that runs the step, and the visual tokens it gives or reads (0 before there are any).
    """
    import torch

    config, device = model.config, model.device
    frames, width = config.num_frames, config.text_config.hidden_size
    vision, patches = config.vision_config, config.grid_size**2
    if step == "tower":
        pixels = torch.randn(frames, vision.num_channels, vision.image_size, vision.image_size, device=device)
        return lambda: [model.model.vision_tower(piece) for piece in pixels.split(config.vision_chunk_size)], 0
    if step == "projector":
        towers = torch.randn(frames, patches, vision.hidden_size, device=device)
        return lambda: [
            model.model.multi_modal_projector(piece) for piece in towers.split(config.vision_chunk_size)
        ], 0
    if step == "lape":
        return prepare_lape(model), 0
    if step in PACKERS:
        patches = patches if step == "spatial" else patches // config.spatial_factor**2
        features = torch.randn(frames, patches, width, device=device)
        return prepare_packer(getattr(model.model.packer, step), features, naive=naive)
    return prepare_decoder(model, step)


def prepare_packer(layer: Any, features: Any, *, naive: bool = False) -> tuple[Callable[[], Any], int]:
    """Choose a packer or its naive twin; see `prepare_step`.

    Args:
        layer: `LlavaSTPackerLayer`.
        features: (F, P, D).
        naive: Whether the naive one runs.

    Returns:
        As `prepare_step`.
    """
    from longvideo.evaluation.bench_naive_llava_st import NaivePacker

    frames, patches, _ = features.shape
    num_tokens = frames * patches // layer.temporal_factor // layer.spatial_factor**2
    packer = NaivePacker(layer).eval() if naive else layer
    return lambda: packer(features), num_tokens


def prepare_lape(model: "LlavaSTForConditionalGeneration") -> Callable[[], Any]:
    """Make tables and the features of one chunk, to which positions are added chunk by chunk; see `prepare_step`."""
    import torch

    from longvideo.modeling.llava_st.coordinates_llava_st import add_lape, average_tables, lape_parts

    config, width = model.config, model.config.text_config.hidden_size
    sizes = config.coordinate_sizes
    tables = [[torch.randn(size, width, device=model.device) for size in sizes] for _ in ("input", "output")]
    chunk = torch.randn(config.vision_chunk_size, config.grid_size**2, width, device=model.device)

    def add() -> None:
        averages = [average_tables(*pair) for pair in zip(*tables, strict=True)]
        parts = lape_parts(*averages, num_frames=config.num_frames, grid=config.grid_size)
        for first in range(0, config.num_frames, len(chunk)):
            add_lape(chunk[: config.num_frames - first], parts, first_frame=first)

    return add


def prepare_decoder(model: "LlavaSTForConditionalGeneration", step: str) -> tuple[Callable[[], Any], int]:
    """Make a prompt of text and visual tokens; see `prepare_step`."""
    import torch
    from transformers import DynamicCache

    config, device = model.config, model.device
    num_visual = config.num_fast_positions + config.num_slow_positions
    prompt = torch.randn(1, NUM_TEXT + num_visual, config.text_config.hidden_size, device=device)

    def prefill() -> Any:
        cache = DynamicCache(config=config.text_config)
        return model(inputs_embeds=prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)

    if step == "prefill":
        return prefill, num_visual
    with torch.no_grad():
        cache = prefill().past_key_values
    # A coordinate, whose row is looked up as in an answer with times and boxes.
    new = torch.full((1, 1), config.coordinate_token_start, device=device)

    def decode() -> None:
        for _ in range(DECODE_STEPS):
            model(input_ids=new, past_key_values=cache, use_cache=True)

    return decode, num_visual


def run_model_step(step: str, num_frames: int, rounds: int, device: str, *, naive: bool = False) -> dict[str, Any]:
    """Measure one step of the model on made-up input.

    Args:
        step: One of `STEPS`.
        num_frames: Frames of the video.
        rounds: Timed runs.
        device: "cpu" or "cuda".
        naive: Whether a packer is the naive one.

    Returns:
        `seconds`, `cpu_seconds`, `peak_bytes` above model and input, `visual_tokens`.
    """
    import torch

    function, num_visual = prepare_step(make_model(device, num_frames), step, naive=naive)
    with torch.no_grad():
        memory = PeakMemory(device)
        function()  # warms up
        seconds, cpu_seconds = fastest(function, rounds, device)
        peak = memory.rise()
    runs = DECODE_STEPS if step == "decode" else 1
    times = {"seconds": seconds / runs, "cpu_seconds": cpu_seconds / runs}
    return {**times, "peak_bytes": peak, "visual_tokens": num_visual}


def run_step(words: Sequence[str]) -> dict[str, Any]:
    """Run one step in this process.

    Args:
        words: Name of the step and its arguments.

    Returns:
        What it measured.
    """
    name, num_frames, rounds, device = words
    step = name.removeprefix("naive_")
    return run_model_step(step, int(num_frames), int(rounds), device, naive=step != name)


def check(args: argparse.Namespace) -> str | None:
    """Say what is wrong with the arguments, if anything."""
    if min(args.frames) < 5 or any(num_frames % 5 for num_frames in args.frames):
        return "--frames must be multiples of 5, the frames that the slow stream joins"
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
        `steps`.
    """
    names = (*STEPS, *(f"naive_{packer}" for packer in PACKERS))
    return {"steps": measure_steps(args, names, in_process, tell)}


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
        ours, naive = ([steps[f"{prefix}{packer}/{num_frames}"] for packer in PACKERS] for prefix in ("", "naive_"))
        fast, slow = (sum(step[clock] for step in side) for side in (ours, naive))
        wall = sum(step["seconds"] for step in ours) / sum(step["seconds"] for step in naive)
        how = f"{unit}, {fast:.2f} of {slow:.2f} s; wall clock {wall:.3f}"
        rows.append(
            (f"packers over unfold and nn.MultiheadAttention, {num_frames} frames", fast / slow, MAX_TIME, how)
        )
        small, large = (max(step["peak_bytes"] for step in side) for side in (ours, naive))
        how = f"largest of the three, {small / 1e6:.0f} of {large / 1e6:.0f} MB above model and input"
        rows.append((f"their peak memory over the same, {num_frames} frames", small / max(large, 1), MAX_MEMORY, how))
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
        plain = label.removeprefix("naive_")
        kind = " packer" if plain in PACKERS else " (per token)" if plain == "decode" else ""
        words = f"{plain}{kind}{', unfold and nn.MultiheadAttention' if plain != label else ''}"
        tokens = f"{step['visual_tokens']:,}" if step["visual_tokens"] else "-"
        rows.append([words, num_frames, tokens, *time_and_memory(step)])
    return [(["step", "frames", "visual tokens", "seconds", "processor s", "peak MB"], rows)]
