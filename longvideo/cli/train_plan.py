"""Settings of `longvideo train`: the recipe's, what the user sets in their place, what the machine asks for."""

import argparse
import dataclasses
import difflib
import json
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from longvideo.trainers import VideoSFTConfig

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
SUPERVISED, CROSS_GRANULARITY = TRAINERS = ("supervised", "cross_granularity")


@dataclass
class Plan:
    """What is going to be trained.

    Args:
        name: Recipe and stage, for people.
        entry: The stage as the recipe has it.
        args: Settings of the trainer.
        model_fields: Fields of the model's configuration that the stage needs; those of a part as
            `vision_config.image_size`.
        lora: Fields of `peft.LoraConfig`; None without an adapter.
        num_processes: Processes that train together.
        is_half: Whether the forward pass computes in bf16 or fp16; a dry run says so on machines that cannot, too.
        notes: What differs from the recipe, and why.
    """

    name: str
    entry: dict[str, Any]
    args: "VideoSFTConfig"
    model_fields: dict[str, Any]
    lora: dict[str, Any] | None
    num_processes: int = 1
    is_half: bool = False
    notes: list[str] = field(default_factory=list)

    @property
    def is_cross_granularity(self) -> bool:
        """Whether the stage trains both modules of a CrossVLLM in turn."""
        return trainer_of(self.entry) == CROSS_GRANULARITY

    @property
    def rows_per_step(self) -> int:
        """Rows of all processes between two updates."""
        per_process = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps
        return per_process * self.num_processes


def make_plan(args: argparse.Namespace) -> Plan:
    """Read the recipe and put the user's settings over it.

    Args:
        args: The parsed arguments.

    Returns:
        The plan.

    Raises:
        FileNotFoundError: No such recipe.
        ValueError: No such stage, or a setting that does not exist or does not fit.
    """
    from longvideo.trainers import find_stage

    stage, entry = find_stage(args.recipe, args.stage)
    _check_trainer(args, entry)
    chosen = parse_settings(args.set)
    groups = {prefix: {} for prefix in ("", "model", "lora")}
    for key, value in chosen.items():
        prefix, dot, rest = key.partition(".")
        prefix, rest = (prefix, rest) if dot else ("", key)
        if prefix not in groups or not rest or (prefix != "model" and "." in rest):
            raise ValueError(f"--set {key}=...: expected KEY, model.KEY or lora.KEY.")
        groups[prefix][rest] = value
    recipe_lora = entry.get("lora")
    if groups["lora"] and recipe_lora is None and not args.lora:
        raise ValueError(f"--set lora.{next(iter(groups['lora']))} needs --lora: the recipe trains no adapter.")
    has_adapter = args.lora or recipe_lora is not None
    if args.merged and not has_adapter:
        raise ValueError("--merged merges an adapter, and this stage trains none; leave it out, or add --lora.")
    notes: list[str] = []
    wish = {**entry["args"], **groups[""]}
    config = _build_config(args, entry, groups[""], output=args.output or f"outputs/{stage}", notes=notes)
    name = args.recipe if args.recipe.endswith((".yaml", ".yml")) else f"{args.recipe.split('/')[0]}/{stage}"
    return Plan(
        name=name,
        entry=entry,
        args=config,
        model_fields={**entry.get("model", {}), **groups["model"]},
        lora={**(recipe_lora or {}), **groups["lora"]} if has_adapter else None,
        num_processes=_num_processes(),
        is_half=bool(
            (wish.get("bf16") or wish.get("fp16"))
            if args.dry_run and args.device != "cpu"
            else config.bf16 or config.fp16
        ),
        notes=notes,
    )


def trainer_of(entry: dict[str, Any]) -> str:
    """Name the trainer of a stage: "supervised" (or preferences, with --dpo), or "cross_granularity".

    Args:
        entry: The stage as the recipe has it.

    Returns:
        What stands there as `trainer`; "supervised" where nothing does.

    Raises:
        ValueError: Another name.
    """
    name = entry.get("trainer", SUPERVISED)
    if name not in TRAINERS:
        raise ValueError(f"The recipe has trainer: {name!r}; expected one of {TRAINERS}.")
    return name


def _check_trainer(args: argparse.Namespace, entry: dict[str, Any]) -> None:
    if trainer_of(entry) != CROSS_GRANULARITY:
        return
    for name in ("dpo", "lora", "merged", "merge_adapter"):
        if getattr(args, name):
            raise ValueError(
                f"--{name.replace('_', '-')} does not fit this stage, which trains both adapters that the model has "
                "from rewards of its own; leave it out."
            )


def parse_settings(words: list[str]) -> dict[str, Any]:
    """Read KEY=VALUE words; values are JSON, lists and mappings may be yaml, anything else is text.

    Args:
        words: What stood behind each `--set`.

    Returns:
        Values by key.

    Raises:
        ValueError: A word without "=".
    """
    found = {}
    for word in words:
        key, mark, text = word.partition("=")
        if not mark or not key.strip():
            raise ValueError(f"--set {word!r}: expected KEY=VALUE, for example max_steps=100.")
        found[key.strip()] = _read_value(text.strip())
    return found


def _read_value(text: str) -> Any:
    import yaml

    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return json.loads(text)
    except ValueError:
        pass
    # Of plain words yaml would take "no" (save_strategy=no) for false, and 1e-4 for text.
    if not text.startswith(("{", "[")):
        return text
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"--set: {text} is neither JSON nor yaml ({error}).") from error


def _num_processes() -> int:
    return max(int(os.environ.get("WORLD_SIZE", "1")), 1)


def _build_config(
    args: argparse.Namespace, entry: dict[str, Any], settings: dict[str, Any], *, output: str, notes: list[str]
) -> "VideoSFTConfig":
    from longvideo.trainers import VideoSFTConfig

    config_class: type = VideoSFTConfig
    values = {**entry["args"], **settings}
    if trainer_of(entry) == CROSS_GRANULARITY:
        from longvideo.trainers import CrossGranularityConfig

        config_class = CrossGranularityConfig
    if args.dpo:
        from longvideo.trainers.dpo_config import SFT_ONLY, VideoDPOConfig

        config_class = VideoDPOConfig
        values = {**entry["args"], **SFT_ONLY, "precompute_reference": not args.lora and "lora" not in entry}
        for name in [name for name in values if name.endswith("learning_rate")]:
            del values[name]
        notes.append("preferences: the recipe's learning rates and label rules are for answers and are left out")
        values |= settings
    _check_names(values, config_class, source=f"recipe {args.recipe}" if set(values) - set(settings) else "--set")
    _keep_global_batch(values, entry, settings, notes)
    if args.device == "cpu":
        values["use_cpu"] = True
    _fit_to_machine(values, settings, notes, quiet=args.dry_run and args.device != "cpu")
    if args.lora and "lora" not in entry and "trainable_parts" not in settings:
        # The adapter alone decides what learns; lora.connector=full adds what joins it to the towers.
        values["trainable_parts"] = None
    values.setdefault("report_to", [])
    return config_class(**{"output_dir": output, **values})


def _check_names(values: dict[str, Any], config_class: type, *, source: str) -> None:
    known = [entry.name for entry in dataclasses.fields(config_class) if entry.init]
    for name in values:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"{source} has {name!r}, which is no setting of {config_class.__name__}.{hint}")


def _keep_global_batch(
    values: dict[str, Any], entry: dict[str, Any], settings: dict[str, Any], notes: list[str]
) -> None:
    """Accumulate as often as keeps the recipe's rows per step on the processes that there are."""
    wanted, processes = entry.get("global_batch_size"), _num_processes()
    if not wanted or "gradient_accumulation_steps" in settings:
        return
    rows = values.get("per_device_train_batch_size", 8) * processes
    steps = max(round(wanted / rows), 1)
    if steps != values.get("gradient_accumulation_steps", 1):
        told = f"{processes} process{'es' if processes > 1 else ''} instead of {entry.get('gpus', '?')} GPUs"
        notes.append(
            f"gradient_accumulation_steps {values.get('gradient_accumulation_steps', 1)} -> {steps}: {told}, "
            f"{steps * rows} rows per step (the recipe has {wanted})"
        )
        values["gradient_accumulation_steps"] = steps


def _fit_to_machine(values: dict[str, Any], settings: dict[str, Any], notes: list[str], *, quiet: bool) -> None:
    import torch

    on_gpu = torch.cuda.is_available() and not values.get("use_cpu")
    if values.get("bf16") and (quiet or "bf16" not in settings) and not (on_gpu and torch.cuda.is_bf16_supported()):
        values["bf16"] = False
        if not quiet:
            notes.append("bf16 off: no device here computes in it (--set bf16=true insists)")
