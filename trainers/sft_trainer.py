"""Supervised finetuning of video models: learning rates and freezing by part, throughput, guarded batches."""

import json
import os
import re
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import Trainer
from transformers.utils import is_peft_available

from longvideo.trainers.collators import VideoSFTCollator, check_batch
from longvideo.trainers.sft_config import PART_MODULES, VideoSFTConfig, part_of, sub_part_of

# Outputs without one entry per row, which evaluation could not gather; logits and the labels that fit them are left.
_IGNORED_OUTPUTS = [
    "past_key_values",
    "hidden_states",
    "attentions",
    "attention_mask",
    "visual_dropout",
    "video_selections",
    "image_hidden_states",
    "video_hidden_states",
]


def set_trainable_parts(model: nn.Module, parts: list[str]) -> None:
    """Freeze every parameter outside of `parts`, and let the others learn.

    Args:
        model: A model whose parameters lie in modules named in `PART_MODULES`. A PEFT model keeps its own choice
            inside `parts`; only the rest is frozen.
        parts: Names out of `PART_MODULES`, or out of `SUB_PARTS` for less than a part.

    Raises:
        ValueError: A part without parameters in this model, or a parameter that belongs to no part.

    Source: VideoChat-Flash training code, option `mm_tunable_parts`.
    """
    named = {name: {part_of(name), sub_part_of(name)} - {None} for name, _ in model.named_parameters()}
    homeless = [name for name, found in named.items() if found.isdisjoint(PART_MODULES)]
    if homeless:
        raise ValueError(
            f"trainable_parts={parts} cannot say whether {homeless[0]!r} learns: it lies in none of {PART_MODULES}. "
            "Set requires_grad yourself and leave trainable_parts=None."
        )
    present = set().union(*named.values())
    absent = sorted(set(parts) - present)
    if absent:
        raise ValueError(f"{type(model).__name__} has no parameters in {absent}; its parts are {sorted(present)}.")
    keeps_choice = _is_peft_model(model)
    for name, parameter in model.named_parameters():
        if named[name].isdisjoint(parts):
            parameter.requires_grad_(False)
        elif not keeps_choice and parameter.is_floating_point():
            parameter.requires_grad_(True)


def prepare_model(model: nn.Module, method: str) -> None:
    """Let a model make itself ready for a stage of training.

    Args:
        model: A model, or a PEFT model around one.
        method: Name of its public method without arguments.

    Raises:
        ValueError: The model has no such method.
    """
    inner = model.get_base_model() if _is_peft_model(model) else model
    call = None if method.startswith("_") else getattr(inner, method, None)
    if not callable(call):
        raise ValueError(
            f"prepare_model={method!r} is no method of {type(inner).__name__}. Name one that takes no arguments, or "
            "leave prepare_model=None."
        )
    call()


def find_last_checkpoint(output_dir: str) -> str | None:
    """Find the newest checkpoint that was written to its end.

    Args:
        output_dir: Folder with `checkpoint-<step>` folders.

    Returns:
        Its path, or None. A folder whose writing was interrupted (no readable trainer_state.json, which the Trainer
        writes last) is passed over.
    """
    if not os.path.isdir(output_dir):
        return None
    steps = [int(match[1]) for name in os.listdir(output_dir) if (match := re.fullmatch(r"checkpoint-(\d+)", name))]
    for step in sorted(steps, reverse=True):
        folder = os.path.join(output_dir, f"checkpoint-{step}")
        try:
            with open(os.path.join(folder, "trainer_state.json"), encoding="utf-8") as file:
                json.load(file)
        except (OSError, ValueError):
            continue
        return folder
    return None


class VideoSFTTrainer(Trainer):
    """`transformers.Trainer` for models of this library and rows with `messages`.

    The loss is the model's own: a model may change the length of its sequences inside (visual dropout, visual tokens
    in place of one placeholder), so logits and labels of other lengths never meet here. It is the sum over the
    supervised tokens divided by their number in the whole accumulated batch, hence independent of how a batch is
    split; every answer token is kept, so the number counted before the forward stays right. Logs carry
    `frames_per_second` and `visual_tokens_per_second`.

    Args:
        model: Model whose forward returns a loss and takes `num_items_in_batch` through its `**kwargs`.
        args: `VideoSFTConfig`.
        data_collator: Default: a `VideoSFTCollator` over `processing_class` with the settings of `args`.
        processing_class: The processor; it is saved with every checkpoint.
        **kwargs: Everything else that `transformers.Trainer` takes.

    Raises:
        ValueError: Settings that cannot train a video model; the text says what to change.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        args: VideoSFTConfig | None = None,
        *,
        data_collator: Callable[[list[Any]], dict[str, Any]] | None = None,
        processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(args, VideoSFTConfig):
            raise ValueError(f"args must be a VideoSFTConfig, got {type(args).__name__}.")
        if args.n_gpu > 1:
            raise ValueError(
                f"{args.n_gpu} GPUs in one process would be fed by nn.DataParallel, which splits flat frames as if "
                "they were rows. Start one process per GPU (torchrun or accelerate launch), or show one GPU "
                "(CUDA_VISIBLE_DEVICES=0)."
            )
        if kwargs.get("compute_loss_func") is not None:
            raise ValueError(
                "compute_loss_func gets logits of a sequence whose length the model may have changed; the labels no "
                "longer fit. Use the model's own loss."
            )
        if data_collator is None:
            data_collator = _default_collator(processing_class, args)
        if model is not None:
            _prepare(model, args)
        super().__init__(model, args, data_collator=data_collator, processing_class=processing_class, **kwargs)
        if not self.model_accepts_loss_kwargs:
            raise ValueError(
                f"{type(self.model).__name__}.forward takes no **kwargs, so its loss cannot be divided by the number "
                "of supervised tokens of the accumulated batch (num_items_in_batch). Let it pass **kwargs to its loss."
            )
        self._start_throughput_window()

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """Build the model with `model_init`, prepare it and freeze what does not learn."""
        model = super().call_model_init(trial)
        _prepare(model, self.args)
        return model

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Train, or continue a run as if it had never stopped: same rows, same random numbers, same losses.

        Args:
            resume_from_checkpoint: A checkpoint folder, or True for the newest complete one of `output_dir`.
            **kwargs: Everything else that `Trainer.train` takes.

        Returns:
            The Trainer's output.

        Raises:
            FileNotFoundError: True was given and `output_dir` holds no complete checkpoint.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = find_last_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise FileNotFoundError(
                    f"No complete checkpoint in {self.args.output_dir!r} to resume from. Start without "
                    "resume_from_checkpoint, or name a checkpoint folder."
                )
        self._start_throughput_window()
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Names of the parameters with weight decay: all but biases and those of normalisation layers."""
        norms = {
            f"{name}.{parameter}"
            for name, module in model.named_modules()
            if re.search(r"norm(\dd)?$", type(module).__name__.lower())
            for parameter, _ in module.named_parameters(recurse=False)
        }
        return [name for name in super().get_decay_parameter_names(model) if name not in norms]

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Make the optimizer, with one learning rate for each part and no decay on biases and norms."""
        if self.optimizer is not None:
            return super().create_optimizer(model)
        opt_model = self.model if model is None else model
        if not any(parameter.requires_grad for parameter in opt_model.parameters()):
            raise ValueError("No parameter requires a gradient. Name the parts that learn with trainable_parts=[...].")
        optimizer = super().create_optimizer(model)
        # Regrouping afterwards keeps all of the library's optimizers usable; no state exists yet.
        optimizer.param_groups = self._split_groups(optimizer.param_groups, opt_model)
        return optimizer

    def _split_groups(self, groups: list[dict[str, Any]], model: nn.Module) -> list[dict[str, Any]]:
        rates = self.args.part_learning_rates
        part_by_parameter = {
            parameter: sub if (sub := sub_part_of(name)) in rates else part_of(name)
            for name, parameter in model.named_parameters()
        }
        split = []
        # The language model comes first: the Trainer logs the rate of the first group.
        for part in rates:
            for group in groups:
                # A parameter outside of all parts (an own head, say) learns like the language model.
                members = [p for p in group["params"] if (part_by_parameter.get(p) or "language_model") == part]
                if members:
                    split.append({**group, "params": members, "lr": rates[part], "part": part})
        return split

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """Check the batch and return the loss that the model computes on the sequence it really ran.

        Args:
            model: The (possibly wrapped) model.
            inputs: Batch of the collator.
            return_outputs: Also return the model's output.
            num_items_in_batch: Number of supervised tokens over all batches of this optimizer step.

        Returns:
            The loss, or the loss and the output.

        Raises:
            ValueError: See `check_batch`.
        """
        config = self.model.config
        counts = check_batch(
            inputs,
            video_token_id=getattr(config, "video_token_id", None),
            image_token_id=getattr(config, "image_token_id", None),
        )
        inputs = {**inputs, "use_cache": False}
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        if self.model.training:
            self._window_frames += counts.frames
            self._window_visual_tokens += counts.placeholders + _num_inserted(inputs, outputs)
        return (loss, outputs) if return_outputs else loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor | None, Any, Any]:
        """Evaluate one batch; logits and labels are those of the sequence that the model really ran."""
        ignore_keys = _IGNORED_OUTPUTS if ignore_keys is None else ignore_keys
        loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys=ignore_keys)
        # A model that may change the length of its sequence returns the labels that fit beside the logits.
        return (loss, *logits) if isinstance(logits, tuple) and len(logits) == 2 else (loss, logits, labels)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with throughput over all processes since the last log and the learning rate of every part."""
        if "loss" in logs:
            logs.update(self._throughput())
        if "learning_rate" in logs:
            logs.update(self._part_rates(logs["learning_rate"]))
        super().log(logs, start_time)
        # Time spent in evaluation, which ends with a log of its own, must not count as training.
        self._start_throughput_window()

    def _start_throughput_window(self) -> None:
        self._window_start = time.perf_counter()
        self._window_frames = 0
        self._window_visual_tokens = 0

    def _throughput(self) -> Mapping[str, float]:
        counts = torch.stack(
            [torch.as_tensor(n, device=self.args.device) for n in (self._window_frames, self._window_visual_tokens)]
        )
        frames, visual_tokens = self.accelerator.reduce(counts, reduction="sum").tolist()
        seconds = time.perf_counter() - self._window_start
        return {
            "frames_per_second": round(frames / seconds, 3),
            "visual_tokens_per_second": round(visual_tokens / seconds, 1),
        }

    def _part_rates(self, logged: float) -> dict[str, float]:
        groups = self.optimizer.param_groups
        peaks = {group["part"]: group["initial_lr"] for group in groups if "part" in group}
        if len(set(peaks.values())) < 2:
            return {}
        first = groups[0]["initial_lr"]
        return {f"learning_rate_{part}": logged * peak / first for part, peak in peaks.items()}


def _prepare(model: nn.Module, args: VideoSFTConfig) -> None:
    if args.prepare_model is not None:
        prepare_model(model, args.prepare_model)
    if args.trainable_parts is not None:
        set_trainable_parts(model, args.trainable_parts)


def _default_collator(processor: Any, args: VideoSFTConfig) -> VideoSFTCollator:
    if processor is None:
        raise ValueError("Give processing_class=<processor> (it makes the batches), or your own data_collator.")
    return VideoSFTCollator(
        processor,
        max_length=args.max_length,
        mask=args.mask,
        label_rule=args.label_rule,
        blank_image_position=args.blank_image_position,
        processor_kwargs=args.processor_kwargs,
    )


def _num_inserted(inputs: Mapping[str, Any], outputs: Any) -> torch.Tensor | int:
    """Visual tokens that the model put in place of placeholders, without these; no number is fetched from a device."""
    expanded = outputs.get("attention_mask") if isinstance(outputs, Mapping) else None
    if expanded is None or inputs.get("attention_mask") is None:
        return 0
    return expanded.sum() - inputs["attention_mask"].sum()


def _is_peft_model(model: nn.Module) -> bool:
    if not is_peft_available():
        return False
    from peft import PeftModel

    return isinstance(model, PeftModel)
