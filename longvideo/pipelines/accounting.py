"""Counting around a call: token budget, tokens per stage, seconds, and a guard against non-finite numbers.

Shapes: B batch, F frames, P patches of a frame, V visual tokens, S sequence.
"""

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList


def context_length(config: Any) -> int | None:
    """Return the number of positions the language model was made for, long-context scaling included.

    Args:
        config: configuration of the whole model or of its text part.

    Returns:
        The limit in tokens, or None where the configuration does not say.
    """
    text_config = config.get_text_config()
    limit = getattr(text_config, "max_position_embeddings", None)
    rope = getattr(text_config, "rope_parameters", None) or {}
    factor, original = rope.get("factor"), rope.get("original_max_position_embeddings")
    if limit is not None and factor and original and rope.get("rope_type") not in (None, "default"):
        limit = max(limit, int(factor * original))
    return limit


def shared_length(config: Any) -> int | None:
    """Return the positions into which a model fits its visual tokens by itself, beside text and answer.

    Args:
        config: configuration of the whole model.

    Returns:
        `context_length` of the configuration; None for models whose visual tokens are counted beforehand.
    """
    return getattr(config, "context_length", None)


def count_frames(inputs: dict[str, Any]) -> int:
    """Return how many video frames the processor kept, over all videos of the sample."""
    counts = inputs.get("video_num_frames")
    if counts is not None:
        return int(torch.as_tensor(counts).sum())
    pixels = inputs.get("pixel_values_videos")
    if pixels is None:
        return 0
    return int(pixels.shape[0] * pixels.shape[1]) if pixels.ndim == 5 else int(pixels.shape[0])


def visual_ids(config: Any, kind: str) -> list[int]:
    """Return the ids whose positions hold features of a kind of visual.

    Args:
        config: configuration of the whole model.
        kind: "video" or "image".

    Returns:
        Ids of the placeholder, and of the ends of a visual's blocks where features take their places as well.
    """
    names = [f"{kind}_token_id"] + [
        f"{block}{kind}_{end}_token_id" for block in ("", "slow_") for end in ("start", "end")
    ]
    found = (getattr(config, name, None) for name in names)
    return [token for token in found if token is not None]


def count_prompt(inputs: dict[str, Any], config: Any) -> dict[str, int]:
    """Count the prompt's tokens by kind.

    Args:
        inputs: processor output for one sample, `input_ids` (1, S).
        config: configuration, see `visual_ids`.

    Returns:
        `frames`, `video_tokens`, `image_tokens`, `text_tokens`, `prompt_tokens`.
    """
    ids = inputs["input_ids"]
    video, image = (
        int(torch.isin(ids, torch.tensor(visual_ids(config, kind), device=ids.device)).sum())
        for kind in ("video", "image")
    )
    return {
        "frames": count_frames(inputs),
        "video_tokens": video,
        "image_tokens": image,
        "text_tokens": ids.numel() - video - image,
        "prompt_tokens": ids.numel(),
    }


def check_budget(inputs: dict[str, Any], config: Any, max_new_tokens: int) -> None:
    """Refuse a prompt that does not fit the model, before the model runs.

    Args:
        inputs: processor output for one sample.
        config: configuration of the model.
        max_new_tokens: tokens that may be generated.

    Raises:
        ValueError: with the counts, the limit and how many frames fit; past its limit a model writes nonsense.
    """
    limits = [limit for limit in (context_length(config), shared_length(config)) if limit is not None]
    limit = min(limits, default=None)
    counts = count_prompt(inputs, config)
    need = counts["prompt_tokens"] + max_new_tokens
    if limit is None or need <= limit:
        return
    if shared_length(config) is not None:
        raise ValueError(
            f"The prompt has {counts['text_tokens']} tokens of text and max_new_tokens is {max_new_tokens}, which "
            f"leaves nothing of the model's {limit} positions for what is to be seen. Shorten the text or lower "
            "max_new_tokens; the number of frames makes no difference."
        )
    text = (
        f"The prompt has {counts['prompt_tokens']} tokens ({counts['video_tokens'] + counts['image_tokens']} visual, "
        f"{counts['text_tokens']} text) and max_new_tokens is {max_new_tokens}: together {need}, "
        f"but the model takes at most {limit}."
    )
    raise ValueError(f"{text} {_budget_remedy(counts, config, limit, max_new_tokens)}")


def _budget_remedy(counts: dict[str, int], config: Any, limit: int, max_new_tokens: int) -> str:
    if counts["frames"] == 0 or counts["video_tokens"] == 0:
        return "Shorten the text, use fewer pictures or lower max_new_tokens."
    if getattr(config, "num_frames", None) is not None:
        return "The number of frames is fixed: shorten the text or lower max_new_tokens."
    per_frame = counts["video_tokens"] / counts["frames"]
    clip = getattr(config, "mm_local_num_frames", 1)
    room = limit - max_new_tokens - counts["text_tokens"] - counts["image_tokens"]
    fit = int(room / per_frame) // clip * clip
    if fit < clip and clip == 1:
        return "Not even one frame fits: shorten the text or lower max_new_tokens."
    if fit < clip:
        return f"Not even one clip of {clip} frames fits: shorten the text or lower max_new_tokens."
    return f"Of the {counts['frames']} sampled frames {fit} fit: pass num_frames={fit} (or max_frames={fit}) or less."


def find_non_finite(model: nn.Module) -> list[str]:
    """Return the names of the parameters and buffers that hold NaN or infinite values."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return [name for name, value in named if value.is_floating_point() and not bool(torch.isfinite(value).all())]


def raise_non_finite(model: nn.Module) -> None:
    """Explain non-finite logits.

    Raises:
        ValueError: always; it names the broken weights, or the arithmetic type when the weights are sound.
    """
    broken = find_non_finite(model)
    if broken:
        more = f" and {len(broken) - 5} more" if len(broken) > 5 else ""
        raise ValueError(
            f"The model's weights hold NaN or infinite values in: {', '.join(broken[:5])}{more}. "
            "The checkpoint is damaged or was badly converted; convert or download it again."
        )
    dtype = getattr(model, "dtype", None)
    raise ValueError(
        f"The model computed NaN or infinite logits although all its weights are finite (arithmetic type {dtype}). "
        "Load it in bfloat16 or float32 (dtype=...)."
    )


class CallTrace:
    """What one `generate` call did: seconds of encoding, kept visual tokens, all in this object, none on the model.

    Attributes:
        stages: stages of dropping inside the decoder, the output `visual_dropout` of the prefill.
        selections: per image and video what the decoder got to see, the output `video_selections` of the prefill.
        positions: positions of the prompt, visual tokens included; None before the prefill.
    """

    def __init__(self) -> None:
        self.encode_start: float | None = None
        self.encode_end: float | None = None
        self.start = 0.0
        self.end = 0.0
        self.stages: tuple[Any, ...] = ()
        self.selections: tuple[Any, ...] = ()
        self.positions: int | None = None
        self.prefilled = False

    def timings(self, decode: float, waits: Sequence[float] = ()) -> dict[str, float]:
        """Split the seconds of a call.

        Args:
            decode: seconds of decoding before the call.
            waits: seconds of decoding during the call, before each window of frames.

        Returns:
            Seconds of `decode`, `encode` (start of the first tower to end of the projector) and `generate` (the rest).
        """
        encode = 0.0
        if self.encode_start is not None and self.encode_end is not None:
            # The first window is waited for before the tower starts.
            encode = self.encode_end - self.encode_start - sum(waits[1:])
        rest = self.end - self.start - sum(waits) - encode
        return {"decode": decode + sum(waits), "encode": encode, "generate": rest}


def _now(device: torch.device) -> float:
    # Kernels run behind the host: without waiting, the encoder's time would be charged to the decoder.
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@contextmanager
def trace_call(model: nn.Module) -> Iterator[CallTrace]:
    """Watch the model's forward passes made by this thread inside the block.

    Args:
        model: a conditional generation model with the usual names inside: towers end in `_tower`, the last modules
            before the decoder are `multi_modal_projector`, one of `projectors`, or the children of a `packer` behind.

    Yields:
        The trace, complete when the block is left.

    Raises:
        ValueError: the prefill logits are not finite.
    """
    trace, thread, device = CallTrace(), threading.get_ident(), model.device

    def tower_starts(*_: Any) -> None:
        if threading.get_ident() == thread and trace.encode_start is None and not trace.prefilled:
            trace.encode_start = _now(device)

    def projector_ends(*_: Any) -> None:
        if threading.get_ident() == thread and not trace.prefilled:
            trace.encode_end = _now(device)

    def model_ends(_: nn.Module, __: Any, given: dict[str, Any], output: Any) -> None:
        if threading.get_ident() != thread or trace.prefilled:
            return
        trace.prefilled = True
        trace.stages = tuple(getattr(output, "visual_dropout", None) or ())
        trace.selections = tuple(getattr(output, "video_selections", None) or ())
        prompt = given.get("inputs_embeds") if given.get("inputs_embeds") is not None else given.get("input_ids")
        trace.positions = None if prompt is None else int(prompt.shape[1])
        logits = getattr(output, "logits", None)
        if logits is not None and not bool(torch.isfinite(logits[:, -1]).all()):
            raise_non_finite(model)

    modules = dict(model.named_modules())
    handles = [model.register_forward_hook(model_ends, with_kwargs=True)]
    for name, module in modules.items():
        if name.endswith("_tower"):
            handles.append(module.register_forward_pre_hook(tower_starts))
        elif name.split(".")[-1] == "multi_modal_projector" or name.split(".")[-2:-1] in (["packer"], ["projectors"]):
            handles.append(module.register_forward_hook(projector_ends))
    trace.start = _now(device)
    try:
        yield trace
    finally:
        trace.end = _now(device)
        for handle in handles:
            handle.remove()


def count_tokens(inputs: dict[str, Any], config: Any, trace: CallTrace, num_generated: int) -> dict[str, Any]:
    """Count tokens before and after every compression of one call.

    Args:
        inputs: processor output for one sample.
        config: configuration of the model.
        trace: of the finished call.
        num_generated: tokens of the answer.

    Returns:
        `frames`, `patch_tokens` (what the tower would make of all frames and pictures), `visual_tokens` (in the
        decoder's prompt), `after_stages` (one dict with `layer`, `kind`, `visual_tokens` per dropout stage inside the
        decoder), `selections` (one dict as of `count_selection` per video and image, for models that choose what the
        decoder sees), `text_tokens`, `prompt_tokens`, `generated_tokens`.
    """
    counts = count_prompt(inputs, config)
    stages = [
        {
            "layer": int(stage.layer),
            "kind": str(stage.kind),
            "visual_tokens": sum(int(kept.numel()) for kept in stage.kept_visual_indices),
        }
        for stage in trace.stages
    ]
    prompt_tokens = counts["prompt_tokens"] if trace.positions is None else trace.positions
    return {
        "frames": counts["frames"],
        "patch_tokens": (counts["frames"] + _count_tiles(inputs)) * patches_per_frame(config),
        "visual_tokens": prompt_tokens - counts["text_tokens"],
        "after_stages": stages,
        "selections": [count_selection(selection) for selection in trace.selections],
        "text_tokens": counts["text_tokens"],
        "prompt_tokens": prompt_tokens,
        "generated_tokens": num_generated,
    }


def count_selection(selection: Any) -> dict[str, Any]:
    """Count what is left of one video or image.

    Args:
        selection: with `dino_similarity` (F,), `kept_frames` (T,), `full_resolution` (T,), `mode`, `token_frame` (V,).

    Returns:
        `frames`, `kept_frames`, `full_resolution_frames`, `mode` and `visual_tokens`.
    """
    return {
        "frames": int(selection.dino_similarity.numel()),
        "kept_frames": int(selection.kept_frames.numel()),
        "full_resolution_frames": int(selection.full_resolution.sum()),
        "mode": str(selection.mode),
        "visual_tokens": int(selection.token_frame.numel()),
    }


def token_steps(counts: dict[str, Any]) -> list[str]:
    """Write the numbers of tokens from the patches of the frames to the last stage, one text per step.

    Args:
        counts: of `count_tokens`.

    Returns:
        Texts such as "512 patches".
    """
    steps = [f"{counts['patch_tokens']} patches"]
    videos = [selection for selection in counts.get("selections", ()) if selection["frames"] > 1]
    if videos:
        kept, full = (sum(video[name] for video in videos) for name in ("kept_frames", "full_resolution_frames"))
        steps.append(f"{kept} frames kept, {full} at full resolution ({'/'.join(video['mode'] for video in videos)})")
    steps.append(f"{counts['visual_tokens']} visual tokens")
    return steps + [f"{stage['visual_tokens']} after layer {stage['layer']}" for stage in counts["after_stages"]]


def _count_tiles(inputs: dict[str, Any]) -> int:
    pixels = inputs.get("pixel_values")
    return 0 if pixels is None else int(pixels.shape[0])


def patches_per_frame(config: Any) -> int:
    """Return the number of patch tokens the vision tower makes of one frame, 0 where the configuration is silent."""
    vision = getattr(config, "vision_config", None)
    size, patch = getattr(vision, "image_size", None), getattr(vision, "patch_size", None)
    if not isinstance(size, int) or not isinstance(patch, int):
        return 0
    return (size // patch) ** 2


class _ForcedTokens(LogitsProcessor):
    """Let `generate` write given tokens and sum up the log-probability the model gave them."""

    def __init__(self, token_ids: list[int], prompt_tokens: int) -> None:
        self.token_ids = token_ids
        self.prompt_tokens = prompt_tokens
        self.total = 0.0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        token = self.token_ids[input_ids.shape[1] - self.prompt_tokens]
        self.total += float(torch.log_softmax(scores.float(), dim=-1)[0, token])
        forced = torch.full_like(scores, float("-inf"))
        forced[:, token] = 0.0
        return forced


class _StopAt(StoppingCriteria):
    """End at a number of ids, whatever number of new tokens was announced."""

    def __init__(self, num_ids: int) -> None:
        self.num_ids = num_ids

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.num_ids, device=input_ids.device)


def forced_log_likelihood(
    model: Any,
    inputs: dict[str, torch.Tensor],
    token_ids: list[int],
    generate_kwargs: dict[str, Any],
    *,
    max_new_tokens: int | None = None,
) -> float:
    """Return the mean log-probability per token of a given answer.

    It runs through `generate`, so that dropped visual tokens and caches are treated as in a free answer.

    Args:
        model: a model with `generate`.
        inputs: processor output for one prompt, `input_ids` (1, S).
        token_ids: the answer's tokens, without the end mark.
        generate_kwargs: more arguments of `generate`.
        max_new_tokens: tokens to announce, the same for answers that are compared: a model may fit what it shows of a
            video to the room that is left; None for the answer's own.

    Returns:
        Mean natural logarithm of the probabilities.
    """
    num_prompt = inputs["input_ids"].shape[1]
    forced = _ForcedTokens(token_ids, num_prompt)
    with trace_call(model):
        model.generate(
            **inputs,
            **generate_kwargs,
            do_sample=False,
            num_beams=1,
            min_new_tokens=0,
            max_new_tokens=max_new_tokens or len(token_ids),
            logits_processor=LogitsProcessorList([forced]),
            stopping_criteria=StoppingCriteriaList([_StopAt(num_prompt + len(token_ids))]),
        )
    return forced.total / len(token_ids)
