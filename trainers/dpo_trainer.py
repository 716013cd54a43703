"""Direct preference optimisation of video models: every video once, for both answers, policy and reference."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.trainer_utils import has_length

from longvideo.trainers.bad_media import BadMediaLog
from longvideo.trainers.batch_checks import BatchFacts, check_batch, check_loss
from longvideo.trainers.dpo_collator import REFERENCE_COLUMNS, VideoDPOCollator, as_conversation
from longvideo.trainers.dpo_config import VideoDPOConfig
from longvideo.trainers.dpo_loss import PreferenceLoss, answer_log_probs, dpo_loss, label_log_probs
from longvideo.trainers.dpo_visuals import (
    TowerMemory,
    bare_model,
    encode_pairs,
    has_frozen_towers,
    have_same_towers,
)
from longvideo.trainers.freezing import is_peft_model
from longvideo.trainers.sft_trainer import VideoSFTTrainer, num_inserted_tokens

# Entries of a batch that are not for the model.
_OWN_KEYS = ("labels", "prompt_mask", "answer_room", *REFERENCE_COLUMNS)
_NO_REFERENCE = (
    "There is no reference: the model has no adapter to switch off, and neither ref_model, precompute_reference nor "
    f"the columns {' and '.join(REFERENCE_COLUMNS)} are there. Train an adapter (peft.get_peft_model), give "
    "ref_model=<a frozen copy of the model>, or set precompute_reference=True."
)


class AnswerScores(NamedTuple):
    """Log-likelihoods of P pairs of answers, summed or averaged over tokens, (P,) float32, and (P,) token counts."""

    chosen: torch.Tensor
    rejected: torch.Tensor
    num_chosen: torch.Tensor
    num_rejected: torch.Tensor

    def averaged(self) -> "AnswerScores":
        """Returns means over tokens in place of sums."""
        return self._replace(chosen=self.chosen / self.num_chosen, rejected=self.rejected / self.num_rejected)


class VideoDPOTrainer(VideoSFTTrainer):
    """`VideoSFTTrainer` for rows with a prompt, a chosen and a rejected answer.

    Videos of a prompt pass tower and connector once for both answers, and a frozen tower once for policy and
    reference. The reference is, the first that is there: columns `ref_chosen_logps` and `ref_rejected_logps` of the
    rows; `ref_model`; the adapter `args.reference_adapter`; the model with its adapter switched off. The loss is the
    mean over all pairs of the accumulated batch. Logs and evaluations carry `rewards/chosen`, `rewards/rejected`,
    `rewards/accuracies`, `rewards/margins`, `logps/chosen` and `logps/rejected`.

    Args:
        model: As for `VideoSFTTrainer`.
        args: `VideoDPOConfig`.
        ref_model: A model of the same architecture that stays as it is; every process holds it whole.
        data_collator: Default: a `VideoDPOCollator` over `processing_class` with the settings of `args`.
        processing_class: The processor; it is saved with every checkpoint.
        **kwargs: Everything else that `VideoSFTTrainer` takes.

    Raises:
        ValueError: No reference, one that is none, or settings that cannot train a video model.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        args: VideoDPOConfig | None = None,
        *,
        ref_model: nn.Module | None = None,
        data_collator: Callable[[list[Any]], dict[str, Any]] | None = None,
        processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(args, VideoDPOConfig):
            raise ValueError(f"args must be a VideoDPOConfig, got {type(args).__name__}.")
        if data_collator is None:
            data_collator = _default_collator(processing_class, args)
        super().__init__(model, args, data_collator=data_collator, processing_class=processing_class, **kwargs)
        self.ref_model = self._place_reference(ref_model)
        self._sums: dict[str, dict[str, torch.Tensor]] = {"train": {}, "eval": {}}
        self._check_reference()
        if args.precompute_reference:
            self.train_dataset = self._precomputed(self.train_dataset)
            self.eval_dataset = self._precomputed(self.eval_dataset)

    # ------------------------------------------------------------------ reference

    def _place_reference(self, ref_model: nn.Module | None) -> nn.Module | None:
        self._shares_towers = ref_model is None or have_same_towers(bare_model(self.model), bare_model(ref_model))
        if ref_model is None:
            return None
        if ref_model is self.model:
            raise ValueError("ref_model is the model that learns itself. Give a copy (copy.deepcopy) or an adapter.")
        types = [bare_model(x).config.model_type for x in (self.model, ref_model)]
        if types[0] != types[1]:
            raise ValueError(f"ref_model is a {types[1]!r} model, the model that learns a {types[0]!r}.")
        if self.args.reference_adapter is not None:
            raise ValueError("Both ref_model and reference_adapter were given; the reference is one of them.")
        if self.is_deepspeed_enabled and self.accelerator.state.deepspeed_plugin.zero_stage == 3:
            raise ValueError(
                "With DeepSpeed ZeRO-3 a ref_model is not sharded here. Train an adapter, or compute the reference "
                "before (compute_reference in a run on one process)."
            )
        return ref_model.requires_grad_(False).eval().to(self.args.device)

    def _check_reference(self) -> None:
        name = self.args.reference_adapter
        if name is not None:
            adapters = list(self.model.peft_config) if is_peft_model(self.model) else []
            active = self.model.active_adapters if adapters else []
            if name not in adapters or name in active:
                raise ValueError(
                    f"reference_adapter={name!r} must be an adapter of the model beside the one that learns; it has "
                    f"{adapters}, of which {active} learn."
                )
        elif self.ref_model is None and is_peft_model(self.model):
            learning = [
                name for name, p in self.model.named_parameters() if p.requires_grad and not self._is_adapter(name)
            ]
            if learning:
                raise ValueError(
                    f"{len(learning)} parameters outside of the adapter learn, first {learning[0]!r}, so the model "
                    "without its adapter is no reference. Freeze them (put modules that shall learn into the "
                    "adapter's modules_to_save), or give ref_model."
                )
        elif not self._has_reference and not self.args.precompute_reference:
            rows = self.train_dataset
            # A stream shows what it has when it is read.
            first = rows[0] if rows is not None and hasattr(rows, "__getitem__") and has_length(rows) else None
            if first is not None and any(first.get(name) is None for name in REFERENCE_COLUMNS):
                raise ValueError(_NO_REFERENCE)

    def _is_adapter(self, name: str) -> bool:
        marks = (getattr(self.model.base_model, "prefix", "lora_"), "modules_to_save", "trainable_tokens_")
        return any(mark in name for mark in marks) or name.startswith("prompt_encoder")

    @property
    def _has_reference(self) -> bool:
        return self.ref_model is not None or is_peft_model(self.model)

    @contextmanager
    def _as_reference(self, model: nn.Module) -> Iterator[nn.Module]:
        """Gives the reference, without gradients and dropout; afterwards the model is as it was."""
        if self.ref_model is not None:
            with torch.no_grad(), self.accelerator.autocast():
                yield self.ref_model
            return
        bare = self.accelerator.unwrap_model(model)
        learns = [(parameter, parameter.requires_grad) for parameter in bare.parameters()]
        training = [module for module in bare.modules() if module.training]
        bare.eval()
        try:
            with torch.no_grad(), self._other_adapter(bare):
                yield model
        finally:
            # Adapters that are switched off and on again would learn from now on, whatever the stage said.
            for parameter, learned in learns:
                parameter.requires_grad_(learned)
            for module in training:
                module.training = True

    @contextmanager
    def _other_adapter(self, model: nn.Module) -> Iterator[None]:
        name = self.args.reference_adapter
        if name is None:
            with model.disable_adapter() if is_peft_model(model) else nullcontext():
                yield
            return
        active = model.active_adapter
        model.set_adapter(name)
        try:
            yield
        finally:
            model.set_adapter(active)

    def compute_reference(self, dataset: Any) -> Any:
        """Compute the log-likelihoods of the reference for all rows, so that training needs no reference.

        They hold for the same processor settings (frames, size) and the same answers.

        Args:
            dataset: `datasets.Dataset`, or a list of rows; not a stream.

        Returns:
            The same kind of dataset with the columns `ref_chosen_logps` and `ref_rejected_logps`, sums over the
            tokens of an answer. The reference is that of training; a model without any is its own, as it is now.

        Raises:
            ValueError: A dataset without length, or rows that cannot be read.
        """
        if not has_length(dataset):
            raise ValueError(
                f"The reference of a {type(dataset).__name__} cannot be computed before training: it has no length. "
                "Give a datasets.Dataset or a list of rows, or leave precompute_reference False."
            )
        columns: tuple[list[float], list[float]] = ([], [])
        for inputs in self.get_test_dataloader(dataset):
            inputs = self._prepare_inputs(inputs)
            facts = inputs.pop("batch_facts", None)
            if facts is not None and facts.num_skipped:
                raise ValueError(
                    f"{facts.num_skipped} of the rows beside {'; '.join(facts.rows)} cannot be read, so they get no "
                    "reference. Take them out of the dataset; `longvideo data check` lists them."
                )
            self._use_encoded(inputs)
            scores = self._reference_scores(self.model, inputs)
            gathered = self.accelerator.gather_for_metrics((scores.chosen, scores.rejected))
            for column, values in zip(columns, gathered, strict=True):
                column.extend(values.tolist())
        if hasattr(dataset, "add_column"):
            present = [name for name in REFERENCE_COLUMNS if name in dataset.column_names]
            dataset = dataset.remove_columns(present)
            for name, column in zip(REFERENCE_COLUMNS, columns, strict=True):
                dataset = dataset.add_column(name, column)
            return dataset
        names = REFERENCE_COLUMNS
        return [
            {**row, **dict(zip(names, pair, strict=True))}
            for row, pair in zip(dataset, zip(*columns, strict=True), strict=True)
        ]

    def _precomputed(self, dataset: Any) -> Any:
        if isinstance(dataset, dict):
            return {name: self._precomputed(part) for name, part in dataset.items()}
        return None if dataset is None else self.compute_reference(dataset)

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler | None:
        rows = self.train_dataset if train_dataset is None else train_dataset
        is_grouped = self.args.train_sampling_strategy == "group_by_length" and has_length(rows)
        has_lengths = self.args.length_column_name in (getattr(rows, "column_names", None) or ())
        # Lengths are estimated of rows with messages.
        return super()._get_train_sampler(_Conversations(rows) if is_grouped and not has_lengths else rows)

    # ------------------------------------------------------------------ scores and loss

    def _score(self, model: nn.Module, inputs: Mapping[str, Any]) -> AnswerScores:
        """Sums the log-likelihoods of all answers of a batch."""
        bare = bare_model(self.accelerator.unwrap_model(model))
        given = {name: value for name, value in inputs.items() if name not in _OWN_KEYS}
        with encode_pairs(bare, inputs):
            outputs = model(**given, use_cache=False)
        # A model that changes the length of its sequence returns labels that fit it. Left-padded answers end together.
        labels = outputs.get("labels")
        labels = inputs["labels"] if labels is None else labels
        length, values = outputs.logits.shape[1], inputs.get("coordinate_values")
        sums, counts = answer_log_probs(
            outputs.logits,
            labels[:, -length:],
            values=None if values is None else values[:, -length:],
            token_log_probs=getattr(bare, "label_log_probs", label_log_probs),
        )
        self._num_inserted = num_inserted_tokens(inputs, outputs)
        return AnswerScores(*sums.chunk(2), *counts.chunk(2))

    def _reference_scores(self, model: nn.Module, inputs: Mapping[str, Any]) -> AnswerScores:
        with self.compute_loss_context_manager(), self._as_reference(model) as reference:
            return self._score(reference, inputs)

    def _score_both(self, model: nn.Module, inputs: Mapping[str, Any]) -> tuple[AnswerScores, AnswerScores]:
        """Scores of policy and reference."""
        if all(name in inputs for name in REFERENCE_COLUMNS):
            policy = self._score(model, inputs)
            given = (inputs[name].to(policy.chosen) for name in REFERENCE_COLUMNS)
            return policy, AnswerScores(*given, policy.num_chosen, policy.num_rejected)
        if not self._has_reference:
            raise ValueError(_NO_REFERENCE)
        memory = TowerMemory() if self._shares_towers and has_frozen_towers(model) else None
        # The reference first: the activations of the policy wait for their backward, the reference's do not.
        teacher = model if self.ref_model is None else self.ref_model
        with nullcontext() if memory is None else memory.attached(teacher):
            reference = self._reference_scores(model, inputs)
        with nullcontext() if memory is None else memory.attached(model):
            return self._score(model, inputs), reference

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, PreferenceLoss]:
        """Compare how policy and reference score both answers.

        Args:
            model: The (possibly wrapped) model.
            inputs: Batch of the collator.
            return_outputs: Also return losses and rewards of all pairs.
            num_items_in_batch: Number of pairs of all batches of this optimizer step.

        Returns:
            The loss, or the loss and what it is made of.

        Raises:
            FloatingPointError: The loss of a batch of training is no number.
            ValueError: See `check_batch`, or no reference.
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
        policy, reference = self._score_both(model, inputs)
        if self.args.averages_tokens:
            policy, reference = policy.averaged(), reference.averaged()
        result = dpo_loss(
            policy.chosen,
            policy.rejected,
            reference.chosen,
            reference.rejected,
            beta=self.args.beta,
            label_smoothing=self.args.label_smoothing,
            loss_type=self.args.loss_type,
        )
        self._remember("train" if self.model.training else "eval", policy, result)
        if num_items_in_batch is None:
            loss = result.losses.mean()
        else:
            loss = result.losses.sum() / num_items_in_batch
            if self.args.average_tokens_across_devices:
                loss = loss * self.accelerator.num_processes
        if self.model.training:
            check_loss(loss, step=self.state.global_step + 1, rows=facts.rows)
            self._gradient_guard.rows += facts.rows
            self._num_skipped += facts.num_skipped
            self._window_frames += counts.frames + num_frames
            self._window_visual_tokens += counts.placeholders + self._num_inserted
        return (loss, result) if return_outputs else loss

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor | None:
        """Counts pairs, where the class above counts supervised tokens."""
        if not batch_samples:
            return None
        count = torch.tensor(sum(len(batch["input_ids"]) // 2 for batch in batch_samples), device=device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            count = self.accelerator.gather(count).sum()
        return count

    # ------------------------------------------------------------------ evaluation and logs

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Evaluate one batch; predictions are the rewards (P, 2) of chosen and rejected answers, labels are 0."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, result = self.compute_loss(model, inputs, return_outputs=True)
        if prediction_loss_only:
            return loss.detach(), None, None
        rewards = torch.stack([result.chosen_rewards, result.rejected_rewards], dim=1)
        return loss.detach(), rewards, torch.zeros(len(rewards), dtype=torch.int64, device=rewards.device)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """Evaluate; rewards and accuracies stand among the metrics."""
        self._sums["eval"] = {}
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        means = self._take_means("eval")
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in means.items()})
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the rewards of all pairs since the last log."""
        if "loss" in logs:
            logs.update(self._take_means("train"))
        super().log(logs, start_time)

    def _remember(self, split: str, policy: AnswerScores, result: PreferenceLoss) -> None:
        chosen, rejected = result.chosen_rewards, result.rejected_rewards
        values = {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/accuracies": (chosen > rejected).float(),
            "rewards/margins": chosen - rejected,
            "logps/chosen": policy.chosen.detach(),
            "logps/rejected": policy.rejected.detach(),
            "pairs": torch.ones_like(chosen),
        }
        sums = self._sums[split]
        for name, value in values.items():
            # Added up where they are: a number would have to be waited for in every step.
            sums[name] = value.sum() + sums.get(name, 0)

    def _take_means(self, split: str) -> dict[str, float]:
        sums, self._sums[split] = self._sums[split], {}
        if not sums:
            return {}
        names = [name for name in sums if name != "pairs"]
        totals = self.accelerator.reduce(torch.stack([sums[name] for name in [*names, "pairs"]]), reduction="sum")
        *values, pairs = totals.tolist()
        return {name: value / pairs for name, value in zip(names, values, strict=True)}


def _default_collator(processor: Any, args: VideoDPOConfig) -> VideoDPOCollator:
    if processor is None:
        raise ValueError("Give processing_class=<processor> (it makes the batches), or your own data_collator.")
    return VideoDPOCollator(
        processor,
        max_length=args.max_length,
        padding_side=args.padding_side,
        processor_kwargs=args.processor_kwargs,
        max_frames_per_row=args.max_frames_per_row,
        on_bad_video=args.on_bad_video,
        bad_videos=BadMediaLog(args.output_dir),
        with_facts=True,
    )


class _Conversations:
    """Rows of pairs as rows of messages, made when asked for."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: int) -> dict[str, Any]:
        return as_conversation(self.rows[position], position)
