"""What `longvideo train` counts and reads for the stage that trains both modules of a CrossVLLM in turn."""

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from longvideo.cli.train_plan import Plan
    from longvideo.evaluation.cost_training import Group, RowCounts


def add_modules(model: "PreTrainedModel") -> "PreTrainedModel":
    """Give a model without weights the adapters that its checkpoint has; they alone learn, with both projectors.

    Args:
        model: A model on the meta device.

    Returns:
        The model.

    Raises:
        ValueError: A model without granularities.
    """
    if not hasattr(model, "granularity_parameters"):
        raise ValueError(
            f"The stage trains a coarse and a fine module in turn, and {type(model).__name__} has none. Take a "
            "CrossVLLM."
        )
    if not model.has_adapters:
        model.add_adapters()
    return model


def module_groups(model: "PreTrainedModel", rates: Mapping[str, float]) -> list["Group"]:
    """Count the parameters of each module and those of the base.

    Args:
        model: A CrossVLLM with adapters.
        rates: Peak learning rate by module.

    Returns:
        A group per module, and "base".
    """
    from longvideo.evaluation.cost_training import Group

    groups = []
    for name, rate in rates.items():
        own = [parameter for _, parameter in model.granularity_parameters(name)]
        learning = sum(p.numel() for p in own if p.requires_grad)
        groups.append(Group(name, learning, sum(p.numel() for p in own), rate))
    rest = sum(p.numel() for p in model.parameters()) - sum(group.total for group in groups)
    return [*groups, Group("base", 0, rest, 0.0)]


def read_questions(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Read all files of rows.

    Args:
        args: The parsed arguments.

    Returns:
        The rows.

    Raises:
        ValueError: Rows that cannot be used, or none at all.
    """
    from longvideo.trainers.cross_granularity_data import load_questions

    rows, report = load_questions(args.data, format=args.format, media_root=args.media_root, on_error=args.on_error)
    if report.problems:
        print(report.summary())
    return rows


def count_questions(
    plan: "Plan", args: argparse.Namespace, config: "PreTrainedConfig"
) -> tuple["RowCounts", int | None]:
    """Count what a coarse step keeps of one question for the backward pass: all its policies, with the frames' tokens.

    Args:
        plan: The plan.
        args: The parsed arguments.
        config: Configuration of the model.

    Returns:
        Counts without the words of the prompt, and the number of rows, None without data.
    """
    from longvideo.evaluation.cost_training import RowCounts

    settings = plan.args
    frames = (settings.coarse_processor_kwargs or {}).get("num_frames") or config.coarse_training_frames
    policies = settings.num_policies
    visual = policies * frames * config.tokens_per_frame("coarse")
    written = policies * settings.max_policy_tokens
    num_rows = len(read_questions(args)) if args.data else None
    return RowCounts(visual + written, visual, frames, written), num_rows


def describe_steps(
    plan: "Plan", config: "PreTrainedConfig", row: "RowCounts", num_rows: int | None
) -> list[tuple[str, str]]:
    """Say how many tokens coarse and fine steps have, and how many steps there are.

    Args:
        plan: The plan.
        config: Configuration of the model.
        row: What `count_questions` gave.
        num_rows: Rows of the data, None without.

    Returns:
        Pairs of name and text.
    """
    settings, step = plan.args, plan.rows_per_step
    frames = (settings.fine_processor_kwargs or {}).get("num_frames") or config.fine_training_frames
    fine = frames * config.tokens_per_frame("fine")
    coarse = (
        f"{settings.num_policies} policies of {row.tokens / settings.num_policies:,.0f} per row, {row.frames} frames"
    )
    lines = [
        ("tokens per step", f"coarse {step * row.tokens:,.0f} at most ({coarse}; prompts not counted)"),
        ("", f"fine {step * fine:,.0f} ({frames} frames; question and answer not counted)"),
    ]
    if settings.max_steps > 0:
        return [*lines, ("steps", f"{settings.max_steps:,}, of the coarse and of the fine module in turn")]
    if num_rows is None:
        return lines
    steps = 2 * (num_rows // step) * settings.num_train_epochs
    return [*lines, ("steps", f"{steps:,.0f}, of the coarse and of the fine module in turn ({num_rows:,} rows)")]
