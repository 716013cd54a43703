"""Benchmark of CrossVLLM: seconds of a question with 0, 1 and 3 re-groundings, against a run that shares nothing.

Both sides run the same controller and the same random model of middle size over the same clip: it is decoded, encoded
and read, and every policy is written in full. What a module wrote is then replaced by the next policy of a fixed
course, in which the detail module sends every segment back, so that a run with R re-groundings has 2 (R + 1) calls.
The package decodes and encodes a frame once and goes on from the overview's last prompt; the naive side (`naive_`
steps) does everything again in every call.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longvideo.evaluation.bench_steps import PeakMemory, fastest, judged, judged_clock, make_clip, time_and_memory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from longvideo.cross_granularity.trace import ModuleCall
    from longvideo.modeling.crossvllm.configuration_crossvllm import CrossVLLMConfig
    from longvideo.pipelines import VideoQuestionAnsweringPipeline

FRAMES = (288,)
ROUNDS = (0, 1, 3)
JUDGED_ROUNDS, MAX_RATIO = 1, 0.6
STEPS = tuple(f"{side}r{number}" for number in ROUNDS for side in ("", "naive_"))
# 288 coarse frames go with 32 fine ones.
FRAMES_PER_FINE_FRAME = 9
NEW_TOKENS = 40
QUESTION = "What does the man in the red coat take out of the box, and who is watching him?"
REFLECTION = "Only an empty room is visible, nobody enters, and there is no box that could be opened."
MARKS = ("<pad>", "</s>", "<image>", "<video>")


def make_tokenizer() -> "PreTrainedTokenizerFast":
    """Train a tokenizer on the controller's own prompts, so that they have about as many tokens as published ones.

    Returns:
        A byte-level BPE tokenizer with the placeholders.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from longvideo.processing.crossvllm.policies import Rejected, coarse_prompt, fine_prompt

    rejected = [Rejected((start, start + 75.0), REFLECTION) for start in (75.0, 225.0)]
    texts = [coarse_prompt(QUESTION, 600.0, rejected=rejected), fine_prompt(QUESTION)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=1024, special_tokens=list(MARKS), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts * 2, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        padding_side="left",
        extra_special_tokens={"image_token": "<image>", "video_token": "<video>"},
    )


def bench_config(num_frames: int, **settings: Any) -> "CrossVLLMConfig":
    """Build the configuration of middle size.

    Decoder 512 wide with 8 layers; tower 384 wide with 6 layers of which 5 run, at 336 pixels.

    Args:
        num_frames: Frames of a look at the whole video.
        **settings: Fields of the configuration that win.

    Returns:
        A `CrossVLLMConfig`.
    """
    from longvideo.modeling.crossvllm.configuration_crossvllm import CrossVLLMConfig

    fields = {
        "vision_config": {"model_type": "clip_vision_model", "hidden_size": 384, "intermediate_size": 1536,
                          "num_hidden_layers": 6, "num_attention_heads": 6, "image_size": 336, "patch_size": 14},
        "text_config": {"model_type": "llama", "vocab_size": 1024, "hidden_size": 512, "intermediate_size": 1376,
                        "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 8,
                        "max_position_embeddings": 8192, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0},
        "image_token_id": 2,
        "video_token_id": 3,
        "coarse_num_frames": num_frames,
        "fine_num_frames": max(num_frames // FRAMES_PER_FINE_FRAME, 1),
    }  # fmt: skip
    return CrossVLLMConfig(**{**fields, **settings})


def make_pipe(config: "CrossVLLMConfig", device: str) -> "VideoQuestionAnsweringPipeline":
    """Build a random model with its processor.

    Args:
        config: Configuration of the model.
        device: "cpu" (in float32) or "cuda" (in bfloat16, for which there are fused kernels).

    Returns:
        Its pipeline.
    """
    import torch
    from transformers import CLIPImageProcessor

    from longvideo.modeling.crossvllm.modeling_crossvllm import CrossVLLMForConditionalGeneration
    from longvideo.pipelines import VideoQuestionAnsweringPipeline
    from longvideo.processing.crossvllm.processing_crossvllm import CrossVLLMProcessor
    from longvideo.processing.crossvllm.video_processing_crossvllm import CrossVLLMVideoProcessor

    torch.manual_seed(42)
    model = CrossVLLMForConditionalGeneration(config).eval()
    model = model.to(device, torch.float32 if device == "cpu" else torch.bfloat16)
    side = config.vision_config.image_size
    sizes = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    frames = {name: getattr(config, name) for name in ("coarse_num_frames", "fine_num_frames")}
    processor = CrossVLLMProcessor(
        image_processor=CLIPImageProcessor(**sizes),
        tokenizer=make_tokenizer(),
        video_processor=CrossVLLMVideoProcessor(**sizes, **frames),
        patch_size=config.vision_config.patch_size,
        coarse_stride=config.coarse_stride,
        fine_stride=config.fine_stride,
    )
    return VideoQuestionAnsweringPipeline(model=model, processor=processor, device=device)


class Scripted:
    """Lets a module write, and goes on with the policy of a fixed course.

    Args:
        module: The module.

    Attributes:
        texts: What the module wrote.
    """

    def __init__(self, module: Callable[[Sequence["ModuleCall"]], list[str]]) -> None:
        self.module, self.texts = module, []

    def __call__(self, calls: Sequence["ModuleCall"]) -> list[str]:
        """Ask the module.

        Args:
            calls: What it is asked.

        Returns:
            A policy each: the next of four segments that do not touch, or that this one does not suit.
        """
        from longvideo.processing.crossvllm.policies import policy_text

        self.texts += self.module(calls)
        policies = []
        for call in calls:
            if call.module == "fine":
                policies.append(json.dumps({"reflection": REFLECTION, "answer": "a letter"}))
                continue
            number = call.prompt.count("is not the suitable grounding segments because")
            part = call.source.duration / 8
            policies.append(policy_text((2 * number + 1) * part, (2 * number + 2) * part))
        return policies


class Course:
    """One question with a number of re-groundings, from the file to the answer.

    Args:
        pipe: Pipeline of the model.
        video: The clip.
        num_rounds: Re-groundings R.
        naive: Whether nothing is shared between calls.

    Attributes:
        tower_frames: Frames that went through the tower, of all runs.
        positions: Positions that went through the decoder, of all runs.
        texts: What the modules wrote in the last run, coarse ones first.
    """

    def __init__(
        self, pipe: "VideoQuestionAnsweringPipeline", video: str, num_rounds: int, *, naive: bool = False
    ) -> None:
        self.pipe, self.video, self.num_rounds, self.naive = pipe, video, num_rounds, naive
        self.tower_frames = self.positions = self.num_runs = 0
        self.texts: list[str] = []

    def make_modules(self) -> tuple[Any, Any]:
        """Make fresh modules, which know no frame yet.

        Returns:
            Overview and detail module.
        """
        from longvideo.cross_granularity.modules import granularity_modules
        from longvideo.evaluation.bench_naive_crossvllm import NaiveModule

        length = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
        if self.naive:
            return tuple(NaiveModule(self.pipe, name, **length) for name in ("coarse", "fine"))
        return granularity_modules(self.pipe, coarse_options=length, fine_options=length)

    def __call__(self) -> Any:
        """Ask the question.

        Returns:
            The controller's answer.

        Raises:
            RuntimeError: The course had another number of rounds.
        """
        from longvideo.cross_granularity.controller import ControllerRules, CrossGranularityController
        from longvideo.cross_granularity.trace import VideoQuestion
        from longvideo.processing.crossvllm.source_frames import video_duration

        modules = [Scripted(module) for module in self.make_modules()]
        controller = CrossGranularityController(*modules, ControllerRules(max_rounds=self.num_rounds))
        core = self.pipe.model.model
        hooks = [
            core.vision_tower.register_forward_pre_hook(self._count_frames),
            core.language_model.register_forward_pre_hook(self._count_positions, with_kwargs=True),
        ]
        try:
            (answer,) = controller([VideoQuestion(self.video, QUESTION, video_duration(self.video))])
        finally:
            for hook in hooks:
                hook.remove()
        if (len(answer.rounds), answer.reason) != (self.num_rounds + 1, "limit"):
            raise RuntimeError(
                f"The course ended after {len(answer.rounds)} rounds ({answer.reason}), expected "
                f"{self.num_rounds + 1}; take a clip of more than 10 seconds."
            )
        self.num_runs += 1
        self.texts = [text for module in modules for text in module.texts]
        return answer

    def _count_frames(self, module: Any, args: tuple) -> None:
        self.tower_frames += len(args[0])

    def _count_positions(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        self.positions += kwargs["inputs_embeds"].shape[1]


def run_step(words: Sequence[str]) -> dict[str, Any]:
    """Run one step in this process.

    Args:
        words: Name of the step, frames, timed runs, device, clip.

    Returns:
        `seconds` and `cpu_seconds` per question, `peak_bytes` above the model, `tower_frames` and `positions` (through
        the decoder) of a question.
    """
    name, num_frames, rounds, device, video = words[0], int(words[1]), int(words[2]), words[3], words[4]
    pipe = make_pipe(bench_config(num_frames), device)
    course = Course(pipe, video, int(name.rsplit("r", 1)[1]), naive=name.startswith("naive_"))
    memory = PeakMemory(device)
    seconds, cpu_seconds = fastest(course, int(rounds), device)
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "peak_bytes": memory.rise(),
        "tower_frames": course.tower_frames // course.num_runs,
        "positions": course.positions // course.num_runs,
    }


def check(args: argparse.Namespace) -> str | None:
    """Say what is wrong with the arguments, if anything."""
    if min(args.frames) < 1:
        return "--frames must be at least 1"
    if args.minutes < 0.2:
        return "--minutes must be at least 0.2: four segments of more than a second have to fit"
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
        `steps`, by name and frames of a look at the whole video, "naive_r1/288".
    """
    steps = {}
    with tempfile.TemporaryDirectory() as folder:
        clip = args.clip
        if clip is None:
            clip = Path(folder) / "clip.mp4"
            tell(f"writing a clip of {args.minutes:g} minutes")
            make_clip(clip, args.minutes)
        for num_frames in args.frames:
            for name in STEPS:
                tell(f"{name}, {num_frames} frames")
                steps[f"{name}/{num_frames}"] = in_process([name, num_frames, args.rounds, args.device, clip])
    return {"steps": steps}


def judge(result: dict[str, Any], frames: Sequence[int]) -> list[dict[str, Any]]:
    """Compare the measurements with the target.

    Args:
        result: `steps`, `machine`.
        frames: Measured frame counts.

    Returns:
        One entry per frame count: name, measured value, limit, whether it is met, and how it was computed.
    """
    from longvideo.evaluation.cost_crossvllm import compare_courses
    from longvideo.evaluation.presets import PRESETS

    clock, unit = judged_clock(result["machine"]["device"])
    published, rows = PRESETS["crossvllm-7b"].config(), []
    for num_frames in sorted(frames):
        ours, naive = (result["steps"][f"{side}r{JUDGED_ROUNDS}/{num_frames}"] for side in ("", "naive_"))
        looks = {"coarse_frames": num_frames, "fine_frames": bench_config(num_frames).fine_num_frames}
        middle, full = (
            compare_courses(config, JUDGED_ROUNDS, new_tokens=NEW_TOKENS, **looks)["ratio"]
            for config in (bench_config(num_frames), published)
        )
        how = (
            f"{unit}, {ours[clock]:.1f} of {naive[clock]:.1f} s; wall clock {ours['seconds'] / naive['seconds']:.3f}; "
            f"frames through the tower {ours['tower_frames']} of {naive['tower_frames']}, positions through the "
            f"decoder {ours['positions']:,} of {naive['positions']:,}; FLOPs by formula {middle:.3f}, 7B {full:.3f}, "
            "without decoding the file"
        )
        name = f"a question with {JUDGED_ROUNDS} re-grounding over sharing nothing, {num_frames} frames"
        rows.append((name, ours[clock] / max(naive[clock], 1e-9), MAX_RATIO, how))
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
        number = label.removeprefix("naive_")
        side = "shared" if number == label else "sharing nothing"
        naive = result["steps"][f"naive_{number}/{num_frames}"]
        saved = 1 - step["tower_frames"] / naive["tower_frames"]
        rows.append([f"R = {number[1:]}, {side}", num_frames, f"{step['tower_frames']:,}", f"{100 * saved:.1f} %",
                     f"{step['positions']:,}", *time_and_memory(step)])  # fmt: skip
    heads = ["a question", "frames", "frames through the tower", "saved", "positions through the decoder", "seconds",
             "processor s", "peak MB"]  # fmt: skip
    return [(heads, rows)]
