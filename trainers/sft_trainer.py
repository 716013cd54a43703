"""Supervised finetuning of video models: learning rates and freezing by part, throughput, guarded batches."""

import os
import re
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, Trainer
from transformers.utils import is_datasets_available, logging

from longvideo.trainers.adapters import check_adapter
from longvideo.trainers.bad_media import BadMediaLog, without_spares
from longvideo.trainers.batch_checks import BatchFacts, GradientGuard, check_batch, check_loss
from longvideo.trainers.checkpoints import (
    check_adapter_weights,
    check_names,
    find_last_checkpoint,
    has_own_names,
    restore_weights,
)
from longvideo.trainers.collators import VideoSFTCollator
from longvideo.trainers.encoded_features import FeatureStore, VideoEntry, encode_entry, join_encoded
from longvideo.trainers.freezing import (
    ReleaseFrozenInputs,
    is_peft_model,
    part_of,
    set_trainable,
    set_trainable_parts,
    sub_part_of,
)
from longvideo.trainers.head_in_loss import supervised_logits, without_logits
from longvideo.trainers.liger import has_fused_loss, liger_in_training
from longvideo.trainers.sampling import GroupedRows, row_lengths
from longvideo.trainers.scale import check_parallelism, is_sharded
from longvideo.trainers.sft_config import VideoSFTConfig

__all__ = ["VideoSFTTrainer", "find_last_checkpoint", "prepare_model", "set_trainable_parts"]

logger = logging.get_logger(__name__)

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


def prepare_model(model: nn.Module, method: str) -> None:
    """Let a model make itself ready for a stage of training.

    Args:
        model: A model, or a PEFT model around one.
        method: Name of its public method without arguments.

    Raises:
        ValueError: The model has no such method.
    """
    inner = model.get_base_model() if is_peft_model(model) else model
    call = None if method.startswith("_") else getattr(inner, method, None)
    if not callable(call):
        raise ValueError(
            f"prepare_model={method!r} is no method of {type(inner).__name__}. Name one that takes no arguments, or "
            "leave prepare_model=None."
        )
    call()


class VideoSFTTrainer(Trainer):
    """`transformers.Trainer` for models of this library and rows with `messages`.

    The loss is the model's own: a model may change the length of its sequences inside (visual dropout, visual tokens
    in place of one placeholder), so logits and labels of other lengths never meet here. It is the sum over the
    supervised tokens divided by their number in the whole accumulated batch, hence independent of how a batch is
    split; every answer token is kept, so the number counted before the forward stays right. Logs carry
    `frames_per_second` and `visual_tokens_per_second` (frames of encoded videos are counted as if they were read), and
    `skipped_rows` where rows were left out. A loss or a gradient that is no number stops the run before it reaches the
    weights, and names step and rows.

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
        self._own_collator = data_collator
        if model is not None:
            _prepare(model, args)
            self._open_store(model, args, data_collator)
        super().__init__(model, args, data_collator=data_collator, processing_class=processing_class, **kwargs)
        if not self.model_accepts_loss_kwargs:
            raise ValueError(
                f"{type(self.model).__name__}.forward takes no **kwargs, so its loss cannot be divided by the number "
                "of supervised tokens of the accumulated batch (num_items_in_batch). Let it pass **kwargs to its loss."
            )
        if args.on_bad_video == "skip" and getattr(data_collator, "spare_rows", False) is None:
            data_collator.spare_rows = self.train_dataset
        self._gradient_guard = GradientGuard()
        self.add_callback(self._gradient_guard)
        self.add_callback(ReleaseFrozenInputs())
        self._num_skipped = 0
        self._start_throughput_window()

    def _open_store(self, model: nn.Module, args: VideoSFTConfig, data_collator: Any) -> None:
        self._store = None
        if args.encoded_features_dir is None:
            return
        if not hasattr(data_collator, "encoded_features"):
            raise ValueError(
                f"encoded_features_dir needs a collator that reads encoded videos, and {type(data_collator).__name__} "
                "does not. Leave data_collator out, or leave encoded_features_dir out."
            )
        self._store = FeatureStore(args.encoded_features_dir, _base_model(model))
        data_collator.encoded_features = self._store

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """Build the model with `model_init`, prepare it and freeze what does not learn."""
        model = super().call_model_init(trial)
        _prepare(model, self.args)
        # The base class builds a first model before it knows its collator.
        self._open_store(model, self.args, getattr(self, "data_collator", self._own_collator))
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
        check_parallelism(self.accelerator, self.model.config)
        with liger_in_training(self):
            return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def encode_videos(self, dataset: Any = None) -> int:
        """Encode the videos of a dataset ahead of training, so that its first epoch reads features too.

        Args:
            dataset: Rows; None for those of training.

        Returns:
            Number of videos that were encoded; those that are stored already are not.

        Raises:
            ValueError: `encoded_features_dir` is not set, or see `VideoSFTCollator`.
        """
        if self._store is None:
            raise ValueError("Set encoded_features_dir=<folder> in VideoSFTConfig, where encoded videos shall go.")
        count = 0
        rows = self.train_dataset if dataset is None else dataset
        for number, row in enumerate(rows):
            if number % self.args.world_size != self.args.process_index:
                continue
            entries = self.data_collator([row]).get("encoded_videos", ())
            for entry in entries:
                if entry.pixels is not None:
                    with self.compute_loss_context_manager():
                        encode_entry(_base_model(self.model), entry, self._store)
                    count += 1
        self.accelerator.wait_for_everyone()
        return count

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler | None:
        rows = self.train_dataset if train_dataset is None else train_dataset
        is_grouped = self.args.train_sampling_strategy == "group_by_length"
        if not is_grouped or not hasattr(rows, "__len__"):
            return super()._get_train_sampler(train_dataset)
        lengths = _length_column(rows, self.args.length_column_name)
        if lengths is None:
            lengths = row_lengths(
                rows,
                self.processing_class,
                call=self.args.processor_kwargs,
                max_length=self.args.max_length,
                max_frames=self.args.max_frames_per_row,
            )
        size = self.args.train_batch_size * self.args.gradient_accumulation_steps
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return GroupedRows(size, lengths=lengths, seed=seed)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> torch.utils.data.DataLoader:
        """Make the loader of evaluation, in which no row stands in for one that cannot be read."""
        with without_spares(self):
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> torch.utils.data.DataLoader:
        """Make the loader of prediction, in which no row stands in for one that cannot be read."""
        with without_spares(self):
            return super().get_test_dataloader(test_dataset)

    def _prepare_input(self, data: Any) -> Any:
        """Brings a batch to the device; DeepSpeed's rounding of floats to 16 bits spares the values of coordinates."""
        ready = super()._prepare_input(data)
        if isinstance(data, Mapping) and "coordinate_values" in data:
            ready["coordinate_values"] = data["coordinate_values"].to(self.args.device)
        return ready

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder, is_peft = resume_from_checkpoint, is_peft_model(self.model)
        if is_peft and os.path.isfile(os.path.join(folder, "adapter_config.json")):
            check_adapter(self.model, folder)
        # The engines of shards have names and checks of their own.
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            if is_peft:
                check_adapter_weights(self.model, folder)
            elif isinstance(self.model, PreTrainedModel) and not has_own_names(self.model, folder):
                restore_weights(self.model, folder)
                return
        self._loaded_folder = folder
        super()._load_from_checkpoint(folder, model)

    def _load_best_model(self) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_best_model()
        else:
            self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Makes an error of what the base class warns of: weights that were not found do not come back."""
        check_names(
            self.model,
            getattr(self, "_loaded_folder", "the checkpoint"),
            missing=load_result.missing_keys,
            unexpected=load_result.unexpected_keys,
        )

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
            FloatingPointError: The loss of a batch of training is no number.
            ValueError: See `check_batch`.
        """
        config = self.model.config
        inputs = dict(inputs)
        facts = inputs.pop("batch_facts", None) or BatchFacts(())
        num_frames = self._use_encoded(inputs)
        counts = check_batch(
            inputs,
            video_token_id=getattr(config, "video_token_id", None),
            image_token_id=getattr(config, "image_token_id", None),
        )
        inputs["use_cache"] = False
        with supervised_logits(_base_model(self.model), wanted=self._may_leave_logits_out()) as are_left_out:
            loss, outputs = super().compute_loss(
                model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch
            )
        if are_left_out:
            outputs = without_logits(outputs)
        if self.model.training:
            check_loss(loss, step=self.state.global_step + 1, rows=facts.rows)
            self._gradient_guard.rows += facts.rows
            self._num_skipped += facts.num_skipped
            self._window_frames += counts.frames + num_frames
            self._window_visual_tokens += counts.placeholders + num_inserted_tokens(inputs, outputs)
        return (loss, outputs) if return_outputs else loss

    def _may_leave_logits_out(self) -> bool:
        # Engines gather a sharded head in its own forward, liger has its own way, and compiled code keeps one path.
        return (
            self.args.supervised_logits_only
            and not is_sharded(self)
            and not has_fused_loss(_base_model(self.model))
            and not self.args.torch_compile
        )

    def _use_encoded(self, inputs: dict[str, Any]) -> int:
        """Puts features in place of the encoded videos of a batch, after encoding those that are not stored yet.

        Returns:
            Frames of these videos.
        """
        entries: list[VideoEntry] = inputs.pop("encoded_videos", None) or []
        if not entries:
            return 0
        model = _base_model(self.model)
        if any(entry.pixels is not None for entry in entries) and is_sharded(self):
            raise ValueError(
                "A video is not in encoded_features_dir yet, and a sharded model cannot encode it apart. Encode all "
                "of them first, in a run of one process per GPU without sharding: trainer.encode_videos()."
            )
        encoded = [entry.encoded or encode_entry(model, entry, self._store) for entry in entries]
        device = inputs["input_ids"].device
        joined = join_encoded([one.to(device) for one in encoded])
        # Features that still have to pass a connector, which may learn, go through the model's forward.
        if hasattr(joined, "as_output"):
            inputs["mm_encoder_outputs"] = {"video": joined.as_output()}
        else:
            inputs["encoded_video"] = joined
        return sum(entry.num_frames for entry in entries)

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
        mine = (self._window_frames, self._window_visual_tokens, self._num_skipped)
        counts = torch.stack([torch.as_tensor(n, device=self.args.device) for n in mine])
        frames, visual_tokens, skipped = self.accelerator.reduce(counts, reduction="sum").tolist()
        seconds = time.perf_counter() - self._window_start
        rates = {
            "frames_per_second": round(frames / seconds, 3),
            "visual_tokens_per_second": round(visual_tokens / seconds, 1),
        }
        return {**rates, "skipped_rows": skipped} if skipped else rates

    def _part_rates(self, logged: float) -> dict[str, float]:
        groups = self.optimizer.param_groups
        if "initial_lr" not in groups[0]:
            # reduce_lr_on_plateau knows no peaks; it lowers the rates where they stand.
            rates = {group["part"]: group["lr"] for group in groups if "part" in group}
            named = {f"learning_rate_{part}": rate for part, rate in rates.items()}
            return named if len(set(rates.values())) > 1 else {}
        peaks = {group["part"]: group["initial_lr"] for group in groups if "part" in group}
        if len(set(peaks.values())) < 2:
            return {}
        first = groups[0]["initial_lr"]
        return {f"learning_rate_{part}": logged * peak / first for part, peak in peaks.items()}


def _prepare(model: nn.Module, args: VideoSFTConfig) -> None:
    if args.prepare_model is not None:
        prepare_model(model, args.prepare_model)
    if any(wish is not None for wish in (args.trainable_parts, args.trainable_names, args.frozen_names)):
        set_trainable(model, parts=args.trainable_parts, names=args.trainable_names, frozen=args.frozen_names)


def _base_model(model: nn.Module) -> nn.Module:
    return model.get_base_model() if is_peft_model(model) else model


def _length_column(rows: Any, name: str) -> list[int] | None:
    if is_datasets_available():
        import datasets

        if isinstance(rows, datasets.Dataset) and name in rows.column_names:
            return list(rows[name])
    return None


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
        max_frames_per_row=args.max_frames_per_row,
        on_bad_video=args.on_bad_video,
        bad_videos=BadMediaLog(args.output_dir),
        with_facts=True,
    )


def num_inserted_tokens(inputs: Mapping[str, Any], outputs: Any) -> torch.Tensor | int:
    """Count visual tokens put in place of placeholders, without these, and fetch no number from a device.

    Args:
        inputs: What the model was given.
        outputs: What it returned.

    Returns:
        A scalar tensor, or 0 where the length did not change.
    """
    expanded = outputs.get("attention_mask") if isinstance(outputs, Mapping) else None
    if expanded is None or inputs.get("attention_mask") is None:
        return 0
    return expanded.sum() - inputs["attention_mask"].sum()
