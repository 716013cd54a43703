"""Loading, counting and training of `longvideo train`."""

import argparse
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longvideo.cli.train_coordinates import needs_tokens, prepare_coordinates, split_fields
from longvideo.cli.train_modules import add_modules, count_questions, describe_steps, module_groups, read_questions
from longvideo.cli.train_plan import DTYPES, Plan

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# The side of the frames that the tower sees, which the processor must bring them to.
IMAGE_SIZE = "vision_config.image_size"
# So many rows are read to count their tokens.
NUM_COUNTED_ROWS = 4
# A folder with one of these in it can be loaded, so they are put in place last.
LAST_FILES = ("config.json", "adapter_config.json")


def find_folder(name: str) -> str:
    """Return the folder or Hub id of a model; an architecture's name stands for its tiny checkpoint.

    Args:
        name: What the user gave.

    Returns:
        What `from_pretrained` takes.
    """
    import longvideo

    if not os.path.isdir(name) and "/" not in name:
        try:
            return longvideo.tiny_checkpoint(name)
        except ValueError:
            pass
    return name


def change_config(config: "PreTrainedConfig", fields: dict[str, Any], notes: list[str]) -> "PreTrainedConfig":
    """Put the fields that a stage needs into a configuration.

    Args:
        config: Configuration of the checkpoint.
        fields: Fields and values.
        notes: What changes is added.

    Returns:
        A new configuration, checked as a whole.

    Raises:
        ValueError: A field that this architecture does not have, or values that do not fit.
    """
    present = {name: _find_field(config, name) for name in fields}
    unknown = [name for name, (found, _) in present.items() if not found]
    if unknown:
        raise ValueError(
            f"{type(config).__name__} has no field {unknown[0]!r}; the recipe is for another architecture than the "
            f"model ({config.model_type}), or --set model.{unknown[0]} is misspelt."
        )
    changed = {name: value for name, value in fields.items() if present[name][1] != value}
    whole = config.to_dict()
    for name, value in changed.items():
        notes.append(f"model: {name} {present[name][1]} -> {value}")
        *outer, last = name.split(".")
        part = whole
        for key in outer:
            part = part[key]
        part[last] = value
    return type(config).from_dict(whole) if changed else config


def _find_field(config: Any, name: str) -> tuple[bool, Any]:
    """Whether there is a field, and its value; parts of its name are parts of the configuration."""
    for key in name.split("."):
        if not hasattr(config, key):
            return False, None
        config = getattr(config, key)
    return True, config


def load_config(args: argparse.Namespace, plan: Plan) -> "PreTrainedConfig":
    """Read the configuration of the model, with the fields of the stage.

    Args:
        args: The parsed arguments.
        plan: The plan; notes are added.

    Returns:
        The configuration.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    from longvideo.cli.estimate import load_config as find_config

    folder = find_folder(args.model)
    if os.path.isfile(os.path.join(folder, "config.json")) and _model_type(folder) in CONFIG_MAPPING:
        config = AutoConfig.from_pretrained(folder)
    else:
        config, _ = find_config(folder)
    plain, _ = split_fields(config, plan.model_fields)
    return change_config(config, plain, plan.notes)


def _model_type(folder: str) -> str:
    try:
        return json.loads(Path(folder, "config.json").read_text(encoding="utf-8")).get("model_type", "")
    except (ValueError, AttributeError):
        return ""


def make_empty_model(args: argparse.Namespace, plan: Plan, processor: Any = None) -> "PreTrainedModel":
    """Build the model without weights, frozen and adapted as in training.

    Args:
        args: The parsed arguments.
        plan: The plan; notes are added.
        processor: Its processor, whose tokenizer gets the tokens that the model gets; None reads it where needed.

    Returns:
        A model on the meta device.
    """
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    config = load_config(args, plan)
    fields = split_fields(config, plan.model_fields)[1]
    if processor is None and needs_tokens(config, fields):
        processor = AutoProcessor.from_pretrained(find_folder(args.model))
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, dtype=choose_dtype(args, plan))
        done = prepare_coordinates(model, processor, fields)
        plan.notes += [f"model: {done}"] if done else []
        if plan.is_cross_granularity:
            return add_modules(model)
        return adapt(model, plan)


def choose_dtype(args: argparse.Namespace, plan: Plan) -> str:
    """Name the type of the weights: as asked for, else float32, or bfloat16 under an adapter that learns in bf16."""
    if args.dtype:
        return DTYPES[args.dtype]
    return "bfloat16" if plan.lora is not None and plan.is_half else "float32"


def adapt(model: Any, plan: Plan) -> Any:
    """Make the model ready for the stage, put the adapter on it and freeze what does not learn.

    Args:
        model: The model.
        plan: The plan.

    Returns:
        The model, or the PEFT model around it.
    """
    from longvideo.trainers.freezing import set_trainable
    from longvideo.trainers.sft_trainer import prepare_model

    settings = plan.args
    if settings.prepare_model is not None:
        prepare_model(model, settings.prepare_model)
    if plan.lora is not None:
        model = add_adapter(model, plan)
    if any(wish is not None for wish in (settings.trainable_parts, settings.trainable_names, settings.frozen_names)):
        set_trainable(
            model, parts=settings.trainable_parts, names=settings.trainable_names, frozen=settings.frozen_names
        )
    return model


def add_adapter(model: Any, plan: Plan) -> Any:
    """Put a fresh adapter on a model.

    Args:
        model: The model.
        plan: The plan; the recipe's own adapter, or that of the architecture.

    Returns:
        The PEFT model.

    Raises:
        ImportError: peft is not installed.
        ValueError: A setting that adapters do not have.
    """
    try:
        import peft
    except ImportError as error:
        raise ImportError("Adapters need peft: pip install 'longvideo[train]'.") from error
    from longvideo.trainers.adapters import lora_config

    try:
        settings = peft.LoraConfig(**plan.lora) if "lora" in plan.entry else lora_config(model, **plan.lora)
    except TypeError as error:
        raise ValueError(f"Settings of the adapter {plan.lora}: {error}.") from error
    return peft.get_peft_model(model, settings)


def describe(plan: Plan, args: argparse.Namespace) -> list[tuple[str, str]]:
    """Count what the stage takes.

    Args:
        plan: The plan.
        args: The parsed arguments.

    Returns:
        Pairs of name and text.
    """
    from longvideo.evaluation import cost_training as cost

    processor = read_processor(args, plan) if args.data and not plan.is_cross_granularity else None
    model = make_empty_model(args, plan, processor)
    config = model.config
    row, num_rows = (
        count_questions(plan, args, config) if plan.is_cross_granularity else count_rows(plan, args, config, processor)
    )
    settings, step = plan.args, plan.rows_per_step
    value = 2 if plan.is_half else 4
    memory = cost.memory_of_training(
        model,
        config,
        row,
        rows=settings.per_device_train_batch_size,
        value=value,
        checkpointing=settings.gradient_checkpointing,
    )
    rows_of_step = f"{settings.per_device_train_batch_size} x {settings.gradient_accumulation_steps} accumulated"
    computing = f"weights {choose_dtype(args, plan)}, computing in {'16 bit' if plan.is_half else 'float32'}"
    lines = [
        ("recipe", plan.name),
        ("model", f"{args.model}, {computing}"),
        *cost.describe_groups(
            module_groups(model, settings.module_learning_rates)
            if plan.is_cross_granularity
            else cost.parameter_groups(model, settings.part_learning_rates)
        ),
        ("rows per step", f"{step:,}: {rows_of_step} x {plan.num_processes} processes"),
    ]
    if plan.is_cross_granularity:
        lines += describe_steps(plan, config, row, num_rows)
    elif num_rows is None:
        lines.append(("tokens per step", f"{step * row.tokens:,.0f} at most ({row.tokens:,.0f} per row: max_length)"))
    else:
        about = f"{row.tokens:,.0f} per row, {row.visual:,.0f} of them visual, {row.supervised:,.0f} supervised"
        lines.append(("tokens per step", f"{step * row.tokens:,.0f} ({about}; {row.frames:,.0f} frames)"))
        steps = settings.max_steps if settings.max_steps > 0 else -(-num_rows // step) * settings.num_train_epochs
        lines.append(("steps", f"{steps:,.0f} ({num_rows:,} rows)"))
    device_bytes = None if settings.use_cpu else cost.find_device_bytes()
    lines += cost.describe_memory(memory, device_bytes=device_bytes)
    return lines + [("note", text) for text in plan.notes]


def read_processor(args: argparse.Namespace, plan: Plan) -> Any:
    """Read the processor of the model.

    Args:
        args: The parsed arguments.
        plan: The plan; a tower that sees frames of another size than before gets them.

    Returns:
        The processor.

    Raises:
        ValueError: It does not bring frames to squares.
    """
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(find_folder(args.model))
    side = plan.model_fields.get(IMAGE_SIZE)
    for name in ("video_processor", "image_processor"):
        part = getattr(processor, name, None)
        if side is None or part is None:
            continue
        if set(dict(part.size)) != {"height", "width"}:
            raise ValueError(f"{type(part).__name__} has the size {dict(part.size)}; leave model.{IMAGE_SIZE} out.")
        part.size = type(part.size)(height=side, width=side)
    return processor


def count_rows(
    plan: Plan, args: argparse.Namespace, config: "PreTrainedConfig", processor: Any
) -> tuple[Any, int | None]:
    """Count the tokens of the first rows, or take the longest that the stage allows.

    Args:
        plan: The plan.
        args: The parsed arguments.
        config: Configuration of the model.
        processor: Its processor; not needed without data.

    Returns:
        An average row, and the number of rows, None without data.
    """
    from longvideo.evaluation.cost_training import RowCounts, count_row, mean_counts
    from longvideo.trainers import VideoSFTCollator

    if not args.data:
        tokens = plan.args.max_length or config.text_config.max_position_embeddings
        wishes = plan.args.processor_kwargs or {}
        frames = wishes.get("num_frames") or wishes.get("max_frames") or 1
        return RowCounts(tokens, 0, frames, 0), None
    rows = load_rows(args, config, plan)
    collator = VideoSFTCollator(
        processor,
        max_length=plan.args.max_length,
        processor_kwargs=plan.args.processor_kwargs,
    )
    first = [_as_answers(rows[index]) for index in range(min(NUM_COUNTED_ROWS, len(rows)))]
    counts = [count_row(collator([row]), config) for pair in first for row in pair]
    return mean_counts(counts), len(rows) * len(first[0])


def _as_answers(row: dict[str, Any]) -> list[dict[str, Any]]:
    """A row as it is, or a pair of answers as two rows."""
    if "chosen" not in row:
        return [row]
    return [{"messages": [*(row.get("prompt") or []), *row[answer]]} for answer in ("chosen", "rejected")]


def load_rows(args: argparse.Namespace, config: "PreTrainedConfig", plan: Plan) -> Any:
    """Read all files of rows.

    Args:
        args: The parsed arguments.
        config: Configuration of the model.
        plan: The plan: a model that has coordinate tokens, or gets them in this stage, reads times and places in them.

    Returns:
        A dataset.

    Raises:
        ValueError: Rows that cannot be used, or none at all, or rows of the other kind.
    """
    from longvideo.trainers.data.loading import load_video_rows

    has_tokens = getattr(config, "num_temporal_tokens", 0) or needs_tokens(config, plan.model_fields)
    coordinates = "tokens" if has_tokens else "numbers"
    rows, report = load_video_rows(
        args.data,
        format=args.format,
        media_root=args.media_root,
        on_error=args.on_error,
        coordinates=coordinates,
        num_frames=getattr(config, "num_frames", None) if has_tokens else None,
    )
    if report.problems:
        print(report.summary())
    has_pairs = "chosen" in rows.column_names
    if has_pairs != args.dpo:
        kind = ("prompt, chosen and rejected", "add --dpo") if has_pairs else ("messages", "leave --dpo out")
        raise ValueError(f"{args.data[0]} holds rows with {kind[0]}; {kind[1]}, or give other rows.")
    return rows


def train(plan: Plan, args: argparse.Namespace) -> str:
    """Load, train and save.

    Args:
        plan: The plan.
        args: The parsed arguments.

    Returns:
        The folder with the trained model (or adapter) and its processor.

    Raises:
        ValueError: Rows, model and recipe that do not fit, or a folder with checkpoints of another run.
    """
    from transformers import AutoModelForImageTextToText, set_seed

    from longvideo.trainers import VideoSFTTrainer, find_last_checkpoint

    output = plan.args.output_dir
    last = find_last_checkpoint(output)
    if last is not None and not args.resume:
        raise ValueError(f"{output} holds {Path(last).name} already; go on with --resume, or choose another --output.")
    if args.resume and last is None:
        raise ValueError(f"{output} holds no complete checkpoint to go on from; leave --resume out.")
    folder = find_folder(args.model)
    config = load_config(args, plan)
    rows = read_questions(args) if plan.is_cross_granularity else load_rows(args, config, plan)
    processor = read_processor(args, plan)
    model = AutoModelForImageTextToText.from_pretrained(folder, config=config, dtype=choose_dtype(args, plan))
    # The trainer seeds as well, but new tokens and adapters are drawn before it.
    set_seed(plan.args.seed)
    done = prepare_coordinates(model, processor, split_fields(config, plan.model_fields)[1])
    plan.notes += [f"model: {done}"] if done else []
    model = merge_adapters(model, args.merge_adapter)
    if plan.lora is not None and not args.merged and (done or args.merge_adapter):
        base = save_base(model, processor, plan.args, args.resume)
        plan.notes.append(f"the model as the adapter found it is saved in {base}")
    for note in plan.notes:
        print(f"note: {note}")
    trainer_class: type = VideoSFTTrainer
    if args.dpo:
        from longvideo.trainers.dpo_trainer import VideoDPOTrainer

        trainer_class = VideoDPOTrainer
    if plan.is_cross_granularity:
        from longvideo.trainers import CrossGranularityTrainer

        trainer_class = CrossGranularityTrainer
    model = adapt(model, plan)
    trainer = trainer_class(model, plan.args, train_dataset=rows, processing_class=processor)
    trainer.train(resume_from_checkpoint=args.resume or None)
    save(trainer, output, merged=args.merged)
    return output


def save_base(model: "PreTrainedModel", processor: Any, settings: Any, resumes: bool) -> str:
    """Save a model that was changed before its adapter learns; without it the adapter could not be loaded.

    Args:
        model: The model; its name becomes the folder, which the adapter notes.
        processor: Its processor.
        settings: Settings of the trainer.
        resumes: Whether a run goes on, which has saved it already.

    Returns:
        The folder, `base` in the output folder.
    """
    folder, partial = Path(settings.output_dir, "base").resolve(), Path(settings.output_dir, ".base").resolve()
    if settings.should_save and not (resumes and folder.is_dir()):
        shutil.rmtree(partial, ignore_errors=True)
        model.save_pretrained(partial)
        processor.save_pretrained(partial)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)
    model.name_or_path = str(folder)
    return str(folder)


def merge_adapters(model: "PreTrainedModel", folders: list[str]) -> "PreTrainedModel":
    """Merge the adapters of earlier stages into a model, in their order."""
    if folders:
        from longvideo.trainers.adapters import load_adapter

    for folder in folders:
        model = load_adapter(model, folder).merge_and_unload()
    return model


def save(trainer: Any, output: str, *, merged: bool = False) -> None:
    """Save the trained model under temporary names first; the file that makes it loadable comes last.

    Args:
        trainer: The trainer.
        output: Folder of the run.
        merged: Whether the adapter is merged into the model, which is then saved whole.
    """
    os.makedirs(output, exist_ok=True)
    partial = Path(output, ".saving")
    if trainer.args.should_save:
        shutil.rmtree(partial, ignore_errors=True)
    if merged:
        whole = trainer.accelerator.unwrap_model(trainer.model).merge_and_unload()
        if trainer.args.should_save:
            whole.save_pretrained(partial)
            trainer.processing_class.save_pretrained(partial)
    else:
        trainer.save_model(str(partial))
    if trainer.args.should_save:
        for file in sorted(partial.iterdir(), key=lambda file: file.name in LAST_FILES):
            target = Path(output, file.name)
            if target.is_dir():
                # Adapters of a model that has two; a folder replaces none that holds something.
                shutil.rmtree(target)
            os.replace(file, target)
        shutil.rmtree(partial)
    trainer.accelerator.wait_for_everyone()
