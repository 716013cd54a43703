"""Benchmark of CrossLMM against the same decoder fed with all projected tokens, at a middle size.

Three models are compared on the same frames: CrossLMM with 9 tokens per frame; the same tower, projector and decoder
without cross-attention on 196 tokens per frame, as in LLaVA-OneVision (`all_` steps); and without cross-attention on 9
(`plain_` steps). The decoder has half the widths of the 2B model and 8 of its layers; frames have the released 27 x 27
tokens, from a smaller tower. Every step gets made-up input of the right shape, so that each can be measured by itself.
"""

import argparse
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from longvideo.evaluation.bench_steps import PeakMemory, fastest, judged, judged_clock, measure_steps, time_and_memory

if TYPE_CHECKING:
    import torch
    from transformers import DynamicCache

    from longvideo.modeling.crosslmm.configuration_crosslmm import CrossLMMConfig
    from longvideo.modeling.crosslmm.modeling_crosslmm import CrossLMMForConditionalGeneration

FRAMES = (32, 64, 128, 256)
NUM_TEXT = 64
DECODE_STEPS = 16
STEPS = ("encode", "prefill", "decode", "all_encode", "all_prefill", "all_decode", "plain_prefill", "plain_decode")
SIDES = {
    "all_": {"cross_attention_interval": None, "tokens_per_frame": 196, "merge_mode": "bilinear"},
    "plain_": {"cross_attention_interval": None},
    "": {},
}
DECODE_FRAMES = 64
# The paper's 87.5 % less memory and 67.7 % less FLOPs at 256 frames.
MAX_MEMORY, MAX_FLOPS, MAX_DECODE = 0.125, 0.323, 1.5


def split_name(name: str) -> tuple[str, str]:
    """Split the name of a step into its side, one of `SIDES`, and encode, prefill or decode."""
    side = next(side for side in SIDES if name.startswith(side))
    return side, name.removeprefix(side)


def bench_config(side: str = "") -> "CrossLMMConfig":
    """Build the configuration of middle size.

    Decoder 768 wide with 8 layers, cross-attention in two of them; tower 384 wide with 6 layers of which 5 run, at 384
    pixels.

    Args:
        side: One of `SIDES`.

    Returns:
        A `CrossLMMConfig`.
    """
    from longvideo.modeling.crosslmm.configuration_crosslmm import CrossLMMConfig

    return CrossLMMConfig(
        vision_config={"model_type": "siglip_vision_model", "hidden_size": 384, "intermediate_size": 1536,
                       "num_hidden_layers": 6, "num_attention_heads": 6, "image_size": 384, "patch_size": 14},
        text_config={"model_type": "qwen2", "vocab_size": 32000, "hidden_size": 768, "intermediate_size": 4480,
                     "num_hidden_layers": 8, "num_attention_heads": 12, "num_key_value_heads": 2,
                     "max_position_embeddings": 131072},
        image_token_id=31998,
        video_token_id=31999,
        **SIDES[side],
    )  # fmt: skip


def make_model(side: str, device: str) -> "CrossLMMForConditionalGeneration":
    """Build a random model.

    Args:
        side: One of `SIDES`.
        device: "cpu" (in float32) or "cuda" (in bfloat16, for which there are fused kernels).

    Returns:
        The model in evaluation mode.
    """
    import torch

    from longvideo.modeling.crosslmm.modeling_crosslmm import CrossLMMForConditionalGeneration

    torch.manual_seed(42)
    model = CrossLMMForConditionalGeneration(bench_config(side)).eval()
    return model.to(device, torch.float32 if device == "cpu" else torch.bfloat16)


def prepare_step(
    model: "CrossLMMForConditionalGeneration", step: str, num_frames: int
) -> tuple[Callable[[], Any], list["torch.Tensor"]]:
    """Make the input of a step.

    Args:
        model: The random model of one side.
        step: "encode", "prefill" or "decode".
        num_frames: Frames of the video.

    Returns:
        A function that runs the step, and the tensors of its input.
    """
    import torch
    from transformers import DynamicCache

    config, device = model.config, model.device
    if step == "encode":
        size = config.vision_config.image_size
        pixels = torch.randn(1, num_frames, 3, size, size, device=device)
        return lambda: model.get_video_features(pixels), [pixels]
    length = num_frames * config.tokens_per_frame + NUM_TEXT
    ids = torch.randint(10, config.text_config.vocab_size - 10, (1, length), device=device)
    if step == "decode":
        return prepare_decode(model, num_frames, ids[:, :1]), []
    # The text stands behind the video, where all of it attends to the video.
    ids[:, :-NUM_TEXT] = config.video_token_id
    features, inputs = make_features(model, num_frames)

    def prefill() -> Any:
        cache = DynamicCache(config=config.text_config)
        return model(
            input_ids=ids, mm_encoder_outputs=features, past_key_values=cache, use_cache=True, logits_to_keep=1
        )

    return prefill, inputs


def make_features(
    model: "CrossLMMForConditionalGeneration", num_frames: int
) -> tuple[dict[str, Any], list["torch.Tensor"]]:
    """Make what encoding a video gives.

    Args:
        model: The random model of one side.
        num_frames: Frames of the video.

    Returns:
        `mm_encoder_outputs`, and the tensors in them.
    """
    import torch

    from longvideo.modeling.crosslmm.vision_crosslmm import CrossLMMVisionOutput

    config = model.config
    options = {"device": model.device, "dtype": model.dtype}
    width, tokens = config.text_config.hidden_size, num_frames * config.tokens_per_frame
    merged = [torch.randn(tokens, width, **options)]
    memory = None
    if config.cross_attention_layers:
        memory = [torch.randn(num_frames * config.grid_size**2, width, **options)]
    given = CrossLMMVisionOutput(pooler_output=merged, memory=memory, num_frames=[num_frames])
    return {"video": given}, merged + (memory or [])


def prepare_decode(
    model: "CrossLMMForConditionalGeneration", num_frames: int, new: "torch.Tensor"
) -> Callable[[], None]:
    """Fill the cache and decode; see `prepare_step`.

    Args:
        model: The random model of one side.
        num_frames: Frames of the video.
        new: (1, 1) answer token.

    Returns:
        A function that decodes `DECODE_STEPS` tokens.
    """
    import torch

    cache = None
    if model.config.cross_attention_layers:
        with torch.no_grad():
            cache = prepare_step(model, "prefill", num_frames)[0]().past_key_values
    else:
        # Without cross-attention what is cached does not matter, only how much; 196 tokens per frame take minutes.
        cache = random_cache(model, num_frames * model.config.tokens_per_frame + NUM_TEXT)

    def decode() -> None:
        for _ in range(DECODE_STEPS):
            model(input_ids=new, past_key_values=cache, use_cache=True)

    return decode


def random_cache(model: "CrossLMMForConditionalGeneration", length: int) -> "DynamicCache":
    """Make a cache of random keys and values of all decoder layers, `length` positions long."""
    import torch
    from transformers import DynamicCache

    from longvideo.evaluation.cost import head_sizes

    text = model.config.text_config
    width = head_sizes(model.config)[1] // text.num_key_value_heads
    cache = DynamicCache(config=text)
    for layer in range(text.num_hidden_layers):
        shape = (1, text.num_key_value_heads, length, width)
        pair = (torch.randn(shape, device=model.device, dtype=model.dtype) for _ in range(2))
        cache.update(*pair, layer)
    return cache


def formula_flops(config: "CrossLMMConfig", step: str, num_frames: int) -> int:
    """Count the FLOPs of a step.

    Args:
        config: Configuration of one side.
        step: "encode", "prefill" or "decode".
        num_frames: Frames of the video.

    Returns:
        FLOPs; attention of the decoder over the visible half.
    """
    from longvideo.evaluation.cost_crosslmm import estimate

    flops = estimate(config, num_frames, num_text=NUM_TEXT).flops
    if step == "decode":
        return flops["decode_per_token"]
    encode = flops["tower"] + flops["projector"]
    return encode if step == "encode" else flops["total"] - encode


def run_step(words: Sequence[str]) -> dict[str, Any]:
    """Run one step in this process.

    Args:
        words: Name of the step, frames, timed runs, device.

    Returns:
        `seconds`, `cpu_seconds`, `peak_bytes` above model and input, `input_bytes`, `visual_tokens`, `flops`.
    """
    import torch

    side, step = split_name(words[0])
    num_frames, rounds, device = int(words[1]), int(words[2]), words[3]
    model = make_model(side, device)
    function, inputs = prepare_step(model, step, num_frames)
    with torch.no_grad():
        if num_frames <= 64:
            function()  # warms up; longer runs hide it
        memory = PeakMemory(device)
        seconds, cpu_seconds = fastest(function, rounds, device)
        peak = memory.rise()
    runs = DECODE_STEPS if step == "decode" else 1
    return {
        "seconds": seconds / runs,
        "cpu_seconds": cpu_seconds / runs,
        "peak_bytes": peak,
        "input_bytes": sum(tensor.numel() * tensor.element_size() for tensor in inputs),
        "visual_tokens": num_frames * model.config.tokens_per_frame,
        "flops": formula_flops(model.config, step, num_frames),
    }


def check(args: argparse.Namespace) -> str | None:
    """Say what is wrong with the arguments, if anything."""
    return "--frames must be at least 1" if min(args.frames) < 1 else None


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
    return {"steps": measure_steps(args, STEPS, in_process, tell)}


def judge(result: dict[str, Any], frames: Sequence[int]) -> list[dict[str, Any]]:
    """Compare the measurements with the targets.

    Args:
        result: `steps`, `machine`.
        frames: Measured frame counts.

    Returns:
        One entry per target: name, measured value, limit, whether it is met, and how it was computed.
    """
    from longvideo.evaluation.cost_crosslmm import visual_cache_bytes
    from longvideo.evaluation.cost_flops_crosslmm import all_tokens_macs, paper_macs
    from longvideo.evaluation.presets import PRESETS

    steps, most = result["steps"], max(frames)
    few = DECODE_FRAMES if DECODE_FRAMES in frames else min(frames)

    def ratio(key: Callable[[str], float], ours: str, theirs: str) -> float:
        return key(ours) / max(key(theirs), 1e-9)

    def held(name: str) -> int:
        return steps[f"{name}/{most}"]["input_bytes"] + steps[f"{name}/{most}"]["peak_bytes"]

    def prefill(name: str) -> int:
        return steps[f"{name}/{most}"]["flops"]

    def whole(side: str) -> int:
        return prefill(f"{side}encode") + prefill(f"{side}prefill")

    clock, unit = judged_clock(result["machine"]["device"])

    def decode(name: str) -> float:
        return steps[f"{name}/{few}"][clock]

    config = PRESETS["crosslmm-7b"].config()
    cut, full = (all_tokens_macs(config, most, max_length=length) for length in (32768, most * 1000))
    paper = paper_macs(config, most)["total"]
    size = 4 if result["machine"]["device"] == "cpu" else 2
    cache = visual_cache_bytes(bench_config(), most, bytes_per_value=size)
    rows = [
        (f"peak memory of prefill over that with all tokens, {most} frames", ratio(held, "prefill", "all_prefill"),
         MAX_MEMORY, f"{held('prefill') / 1e6:.0f} of {held('all_prefill') / 1e6:.0f} MB above the model, visual "
         f"features included; {steps[f'prefill/{most}']['input_bytes'] / 1e6:.0f} MB are features, {cache / 1e6:.0f} "
         "MB cached keys and values of the video"),
        (f"FLOPs before the first answer token over those with all tokens, {most} frames", ratio(whole, "", "all_"),
         MAX_FLOPS, f"formula, attention included; prefill alone {ratio(prefill, 'prefill', 'all_prefill'):.3f}; 7B "
         f"as the paper counts {paper / full:.3f}, and {paper / cut:.3f} of a prompt cut off at 32,768 tokens"),
        (f"decoding over decoding without cross-attention, {few} frames", ratio(decode, "decode", "plain_decode"),
         MAX_DECODE, f"{unit}, {1e3 * decode('decode'):.1f} of {1e3 * decode('plain_decode'):.1f} ms per token; over "
         f"decoding with all tokens {ratio(decode, 'decode', 'all_decode'):.3f}"),
    ]  # fmt: skip
    return judged(rows)


def tables(result: dict[str, Any]) -> list[tuple[list[str], list[list[str]]]]:
    """Lay the measurements out.

    Args:
        result: What was measured.

    Returns:
        Tables of heads and rows.
    """
    sides = {"": "", "all_": ", all tokens", "plain_": ", no cross-attention"}
    rows = []
    for name, step in result["steps"].items():
        label, num_frames = name.split("/")
        side, plain = split_name(label)
        words = f"{plain}{' (per token)' if plain == 'decode' else ''}{sides[side]}"
        rows.append([words, num_frames, f"{step['visual_tokens']:,}", *time_and_memory(step),
                     f"{step['input_bytes'] / 1e6:.1f}", f"{step['flops'] / 1e9:,.2f}"])  # fmt: skip
    heads = ["step", "frames", "visual tokens", "seconds", "processor s", "peak MB", "input MB", "GFLOPs, formula"]
    return [(heads, rows)]
