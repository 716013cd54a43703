"""What a training run needs, counted before weights are loaded: what learns, tokens of a step, memory.

Weights, gradients and optimizer states are exact for AdamW. Activations are an estimate of what the backward pass
keeps: of each decoder layer its input with gradient checkpointing, else everything that its operations save; the
logits with their copies in float32; and the same of towers that learn. Sharding over processes is not counted.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from longvideo.evaluation.cost import counter_of, gigabytes, head_sizes, patches_of, tower_values_per_token
from longvideo.trainers.sft_config import PART_MODULES, part_of, sub_part_of


@dataclass(frozen=True)
class Group:
    """Parameters that share a learning rate: those that learn, all of them, and their peak rate."""

    name: str
    trainable: int
    total: int
    learning_rate: float


@dataclass(frozen=True)
class RowCounts:
    """An average row: `tokens` that the decoder reads, `visual` of them visual, `frames`, and `supervised` tokens."""

    tokens: float
    visual: float
    frames: float
    supervised: float


def parameter_groups(model: nn.Module, rates: Mapping[str, float]) -> list[Group]:
    """Count the parameters of each part, as the trainer groups them.

    Args:
        model: Model whose parameters are frozen as in training; it may lie on the meta device.
        rates: Peak learning rate by part, as `VideoSFTConfig.part_learning_rates`.

    Returns:
        One group per part that has parameters, towers first.
    """
    trainable, total = dict.fromkeys(rates, 0), dict.fromkeys(rates, 0)
    for name, parameter in model.named_parameters():
        # PEFT keeps the frozen first state of a module beside the one that learns; it takes memory, and that is all.
        if "original_module" in name:
            continue
        sub = sub_part_of(name)
        part = sub if sub in rates else part_of(name) or "language_model"
        total[part] += parameter.numel()
        trainable[part] += parameter.numel() if parameter.requires_grad else 0
    order = [name for name in (*reversed(PART_MODULES), *rates) if total.get(name)]
    return [Group(name, trainable[name], total[name], rates[name]) for name in dict.fromkeys(order)]


def count_row(batch: Mapping[str, Any], config: PreTrainedConfig) -> RowCounts:
    """Count the tokens of a collated row as the decoder will see them.

    Args:
        batch: Batch of one row, as the collator makes it.
        config: Configuration of the model.

    Returns:
        The counts. Where the model puts visual tokens in place of a single placeholder, they are estimated from the
        number of frames, at most as many as there may be; a picture counts as one frame.
    """
    ids, labels = batch["input_ids"], batch["labels"]
    marks = [getattr(config, f"{kind}_token_id", None) for kind in ("video", "image")]
    placeholders = sum(int((ids == mark).sum()) for mark in marks if mark is not None)
    frames = [int(count) for count in batch["video_num_frames"]] if "video_num_frames" in batch else []
    pixels = batch.get("pixel_values_videos")
    if not frames and pixels is not None:
        frames = [pixels.shape[1] if pixels.dim() == 5 else len(pixels)]
    images = len(batch["pixel_values"]) if "pixel_values" in batch else 0
    text = int(batch["attention_mask"].sum()) - placeholders
    visual = placeholders
    if placeholders <= len(frames) + images and placeholders:
        estimate = counter_of(config).estimate
        usable = counter_of(config).usable_frames
        counts = [
            estimate(config, usable(config, count), num_text=text, new_tokens=0) for count in (*frames, *[1] * images)
        ]
        # Bounds where content decides: the upper one.
        visual = sum(max(n) if isinstance(n := count.visual_tokens, tuple) else n for count in counts)
    return RowCounts(text + visual, visual, sum(frames) + images, int((labels >= 0).sum()))


def mean_counts(counts: list[RowCounts]) -> RowCounts:
    """Average over rows."""
    names = ("tokens", "visual", "frames", "supervised")
    return RowCounts(*(sum(getattr(count, name) for count in counts) / len(counts) for name in names))


def decoder_saved_values(config: PreTrainedConfig) -> int:
    """Estimate what a decoder layer keeps for the backward pass.

    Args:
        config: Model configuration.

    Returns:
        Values per token: two norms with their copies, projections before and after the rotation, keys and values
        repeated for all heads, the output of attention, and the four halves of the MLP.
    """
    query_width, key_width = head_sizes(config)
    text = config.text_config
    return 8 * text.hidden_size + 5 * query_width + 2 * key_width + 4 * text.intermediate_size


def activation_bytes(
    model: nn.Module, config: PreTrainedConfig, row: RowCounts, *, rows: int, value: int, checkpointing: bool
) -> int:
    """Estimate what the backward pass of one batch keeps.

    Args:
        model: Model whose parameters are frozen as in training; it may lie on the meta device.
        config: Its configuration.
        row: An average row.
        rows: Rows of a batch on one device.
        value: Bytes of a value, 2 under bf16 or fp16.
        checkpointing: Whether only the inputs of layers are kept.

    Returns:
        Bytes.
    """
    text, tokens = config.text_config, rows * row.tokens
    saved = decoder_saved_values(config)
    layers = text.num_hidden_layers
    kept = layers * text.hidden_size + saved if checkpointing else layers * saved
    # Beside the logits their copy in float32 and its gradient.
    logits = getattr(config, "num_logits", text.vocab_size) * (value + 8)
    total = tokens * (kept * value + logits)
    tower_learns = any(p.requires_grad for name, p in model.named_parameters() if part_of(name) == "vision_tower")
    for name in ("vision_config", "dino_config"):
        vision = getattr(config, name, None)
        if vision is None:
            continue
        inner = getattr(vision, "intermediate_size", None) or vision.hidden_size * getattr(vision, "mlp_ratio", 4)
        held = tower_values_per_token(vision, int(inner))
        frames, layers = rows * row.frames, vision.num_hidden_layers
        if tower_learns:
            held = layers * vision.hidden_size + held if checkpointing else layers * 2 * held
        else:
            frames = min(frames, getattr(config, "vision_chunk_size", None) or frames)
        total += frames * patches_of(vision) * held * value
    return int(total)


def memory_of_training(
    model: nn.Module, config: PreTrainedConfig, row: RowCounts, *, rows: int, value: int, checkpointing: bool
) -> dict[str, int]:
    """Count the memory of a training step with AdamW.

    Args:
        model: Model whose parameters are frozen as in training; it may lie on the meta device.
        config: Its configuration.
        row: An average row.
        rows: Rows of a batch on one device.
        value: Bytes of a value in the forward pass, 2 under bf16 or fp16.
        checkpointing: Whether gradient checkpointing is on.

    Returns:
        Bytes of `weights`, `gradients`, `optimizer` and `activations`, and their `total`.
    """
    sizes = [(p.numel() * p.element_size(), p.requires_grad) for p in model.parameters()]
    weights = sum(size for size, _ in sizes) + sum(b.numel() * b.element_size() for b in model.buffers())
    learning = sum(size for size, learns in sizes if learns)
    parts = {
        "weights": weights,
        "gradients": learning,
        "optimizer": 2 * learning,
        "activations": activation_bytes(model, config, row, rows=rows, value=value, checkpointing=checkpointing),
    }
    return {**parts, "total": sum(parts.values())}


def describe_groups(groups: list[Group]) -> list[tuple[str, str]]:
    """Lay parameter groups out for people.

    Args:
        groups: From `parameter_groups`.

    Returns:
        Pairs of name and text.
    """
    learning, whole = sum(group.trainable for group in groups), sum(group.total for group in groups)
    rows = [("learns", f"{learning:,} of {whole:,} parameters, made of")]
    for group in groups:
        rate = f"rate {group.learning_rate:g}" if group.trainable else "frozen"
        rows.append((f"  {group.name}", f"{group.trainable:,} of {group.total:,}, {rate}"))
    return rows


def describe_memory(memory: Mapping[str, int], *, device_bytes: int | None = None) -> list[tuple[str, str]]:
    """Lay memory out for people.

    Args:
        memory: From `memory_of_training`.
        device_bytes: Memory of the device, None where it is not known.

    Returns:
        Pairs of name and text.
    """
    room = "" if device_bytes is None else f" of {gigabytes(device_bytes)} that the device has"
    rows = [("memory", f"{gigabytes(memory['total'])}{room}, on every device, nothing sharded; made of")]
    notes = {"optimizer": " (two states of AdamW)", "activations": " (estimate)"}
    rows += [(f"  {name}", gigabytes(memory[name]) + notes.get(name, "")) for name in memory if name != "total"]
    return rows


def find_device_bytes() -> int | None:
    """Return the memory of the first CUDA device, or None without one."""
    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None
