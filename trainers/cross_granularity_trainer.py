"""Cross-granularity training: the coarse module learns which segments help the fine one, which learns from them.

Shape legend: B questions, K policies of a question.
"""

import os
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, has_length

from longvideo.evaluation.metrics import temporal_iou
from longvideo.trainers.batch_checks import check_loss
from longvideo.trainers.cross_granularity_config import CrossGranularityConfig
from longvideo.trainers.cross_granularity_loss import Choice, choose_policies, preference_loss, supervised_loss
from longvideo.trainers.cross_granularity_modules import (
    ModuleTexts,
    Policy,
    SeenVideos,
    Target,
    answer_logits,
    answering,
    generate,
    without_dropout,
)
from longvideo.trainers.cross_granularity_rows import PairedSteps, QuestionCollator, Segment, VideoQuestion
from longvideo.trainers.cross_granularity_state import check_even_step, load_state, save_state
from longvideo.trainers.dpo_loss import answer_log_probs
from longvideo.trainers.scale import is_sharded
from longvideo.trainers.sft_trainer import VideoSFTTrainer

MODULES = ("coarse", "fine")
REFERENCE = "coarse_ref"
# Order matters: processes add their sums up position by position.
METRICS = (
    "coarse/loss",
    "coarse/rewards/accuracies",
    "coarse/rewards/margins",
    "coarse/rewards/chosen",
    "coarse/rewards/rejected",
    "coarse/pairs",
    "coarse/well_formed",
    "coarse/score_winner",
    "coarse/score_mean",
    "reward/winner_overlap",
    "reward/winner_iou",
    "reward/policy_overlap",
    "fine/loss",
    "fine/segment_overlap",
    "segment_iou",
    "answer_accuracy",
)


class Round(NamedTuple):
    """What came of sampling for one question: prompt and features of the coarse module, policies, the choice."""

    prompt_ids: list[int]
    features: torch.Tensor
    policies: list[Policy]
    choice: Choice

    def targets(self) -> list[Target]:
        """Returns winner and losers as targets of the coarse module, the winner first."""
        begin = len(self.prompt_ids)
        chosen = [self.policies[j] for j in (self.choice.winner, *self.choice.losers)]
        return [Target([*self.prompt_ids, *policy.ids], begin, self.features) for policy in chosen]


class CrossGranularityTrainer(VideoSFTTrainer):
    """Trains both modules of a CrossVLLM in turn, by Algorithm 1 of the paper.

    Even optimizer steps train the coarse module: it writes n policies for each question, the fine module's loss on
    the answer scores their segments, and the best is preferred over all others. Odd steps train the fine module on the
    same rows, with the segment that the coarse module finds now. The loss is the mean over the questions of the
    accumulated batch; a question whose policies all mean the same segment counts 0.

    Logs carry, beside the losses of both modules, how often the winner overlaps the true segment, where rows have one
    (`reward/winner_overlap`, `reward/winner_iou`), the same of all samples (`reward/policy_overlap`) and of the
    segment of the fine step (`fine/segment_overlap`), the rewards of winners and losers, and how many losers and
    readable policies there were. Evaluation runs both modules once, without reflection, and reports `segment_iou`,
    `answer_accuracy` (the text of a right answer) and the fine module's loss.

    Every process holds the whole model. Checkpoints hold both adapters and, for continuing, the reference.

    Args:
        model: A CrossVLLM with adapters, both supervised stages behind it.
        args: `CrossGranularityConfig`.
        data_collator: Default: `QuestionCollator`.
        processing_class: Its processor.
        **kwargs: Everything else that `VideoSFTTrainer` takes; rows are those of `as_question`.

    Raises:
        ValueError: A model without granularities or adapters, no processor, or a sharded model.

    Source: CrossVLLM Sec. 4.2, Algorithm 1, Eqs. 9 and 10.
    Differs: See `CrossGranularityConfig` for the reference. Where line 22 prints Q for the generator of the fine
        module's segment, the coarse module writes it, most likely text first.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        args: CrossGranularityConfig | None = None,
        *,
        data_collator: Any = None,
        processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        _check_given(model, args, processing_class)
        data_collator = QuestionCollator() if data_collator is None else data_collator
        model.requires_grad_(False)
        model.set_trainable(*MODULES)
        if REFERENCE not in model.granularities:
            model.add_reference("coarse", REFERENCE)
        model.sync_reference(REFERENCE)
        wishes = {
            "coarse": {"training": True, **(args.coarse_processor_kwargs or {}), "granularity": "coarse"},
            "fine": {"training": True, **(args.fine_processor_kwargs or {}), "granularity": "fine"},
        }
        self.seen = SeenVideos(processing_class, wishes, keep_frames=args.keep_frames)
        self.texts = ModuleTexts(processing_class, wishes)
        self.phase = "coarse"
        self._sums = {split: torch.zeros(2, len(METRICS), dtype=torch.float64) for split in ("train", "eval")}
        super().__init__(model, args, data_collator=data_collator, processing_class=processing_class, **kwargs)
        if is_sharded(self):
            raise ValueError(
                "Policies are sampled from the whole model, which FSDP and ZeRO-3 cut up. Use DDP: base and adapters "
                "fit one device, and only adapters learn."
            )
        self.add_callback(_Phases(self))

    # ------------------------------------------------------------------ steps

    @property
    def bare(self) -> nn.Module:
        """The model without wrappers."""
        return self.accelerator.unwrap_model(self.model)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Train, or continue a run behind a pair of steps as if it had never stopped.

        Args:
            resume_from_checkpoint: See `VideoSFTTrainer.train`.
            **kwargs: Everything else that `Trainer.train` takes.

        Returns:
            The Trainer's output.

        Raises:
            FileNotFoundError: See `VideoSFTTrainer.train`, or a checkpoint of another trainer.
            ValueError: A checkpoint between the steps of a pair.
        """
        # Wrappers and the optimizer take what learns when they are made.
        self.bare.set_trainable(*MODULES)
        active = self.bare.granularity
        try:
            with without_dropout(self.bare) if self.args.disable_dropout else nullcontext():
                return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        finally:
            self.bare.set_granularity(active)
            self.bare.set_trainable(*MODULES)

    def begin_step(self, step: int) -> None:
        """Let the module of an optimizer step learn, and refresh the reference where that is due.

        Args:
            step: Zero-based number of the step.
        """
        self.phase = MODULES[step % 2]
        if self.phase == "coarse":
            self.seen.begin_pair()
            if self.args.ref_sync_steps and (step // 2) % self.args.ref_sync_steps == 0:
                self.bare.sync_reference(REFERENCE)
        self.bare.set_granularity(self.phase)
        self.bare.set_trainable(self.phase)

    def set_initial_training_values(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Let a part of an epoch end behind a pair of steps."""
        *values, steps = super().set_initial_training_values(*args, **kwargs)
        return *values, steps + steps % 2

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler | None:
        rows = self.train_dataset if train_dataset is None else train_dataset
        if not has_length(rows):
            raise ValueError(
                "The rows of every step come twice, so they must have a length. Give a list or a Dataset."
            )
        per_step = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return PairedSteps(len(rows), rows_per_step=per_step, seed=seed)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Make one optimizer for both modules, with a learning rate for each."""
        if self.optimizer is None:
            self.bare.set_trainable(*MODULES)
        return super().create_optimizer(model)

    def _split_groups(self, groups: list[dict[str, Any]], model: nn.Module) -> list[dict[str, Any]]:
        bare, rates = self.accelerator.unwrap_model(model), self.args.module_learning_rates
        owners = {parameter: name for name in MODULES for _, parameter in bare.granularity_parameters(name)}
        split = []
        for name in MODULES:
            for group in groups:
                members = [parameter for parameter in group["params"] if owners.get(parameter) == name]
                if members:
                    split.append({**group, "params": members, "lr": rates[name], "part": name})
        return split

    # ------------------------------------------------------------------ loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Sample, score and compare in a coarse step; answer from the found segment in a fine one.

        Args:
            model: The (possibly wrapped) model.
            inputs: Batch of the collator.
            return_outputs: Also return the losses of the questions.
            num_items_in_batch: Questions of all batches of this optimizer step.

        Returns:
            The loss, or the loss and those of the questions, (B,).

        Raises:
            FloatingPointError: The loss is no number.
            ValueError: A video that cannot be read.
        """
        questions = inputs["questions"]
        before = self.seen.num_read
        losses_B = (
            self._coarse_losses(model, questions) if self.phase == "coarse" else self._fine_losses(model, questions)
        )
        loss = losses_B.mean() if num_items_in_batch is None else losses_B.sum() / num_items_in_batch
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes
        names = tuple(question.name for question in questions)
        check_loss(loss, step=self.state.global_step + 1, rows=names)
        self._gradient_guard.rows += names
        self._window_frames += self.seen.num_read - before
        return (loss, losses_B) if return_outputs else loss

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor | None:
        """Counts questions, where the class above counts supervised tokens."""
        if not batch_samples:
            return None
        count = torch.tensor(sum(len(batch["questions"]) for batch in batch_samples), device=device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            count = self.accelerator.gather(count).sum()
        return count

    def _coarse_losses(self, model: nn.Module, questions: Sequence[VideoQuestion]) -> torch.Tensor:
        rounds = [self._play(question) for question in questions]
        compared = [played for played in rounds if played.choice.losers]
        targets = [target for played in compared for target in played.targets()]
        device = self.args.device
        if not targets and self.args.world_size == 1:
            # Nothing to compare: no gradient, but what the Trainer calls backward on.
            return sum(p.sum() * 0 for p in self.bare.parameters() if p.requires_grad).expand(len(rounds))
        # Processes wait for each other's gradients, so that a forward takes place on each of them.
        if not targets:
            return (self._log_probs(model, rounds[0].targets(), "coarse").sum() * 0).expand(len(rounds))
        # The reference first: the activations of the policy wait for their backward, the reference's do not.
        with answering(self.bare):
            reference = self._log_probs(self.bare, targets, REFERENCE)
        policy = self._log_probs(model, targets, "coarse")
        losses, begin = [], 0
        for played in rounds:
            size = 1 + len(played.choice.losers)
            if size == 1:
                losses.append(torch.zeros((), device=device))
                continue
            part = slice(begin, begin + size)
            choice = Choice(0, tuple(range(1, size)))
            found = preference_loss(policy[part], reference[part], choice, beta=self.args.beta)
            losses.append(found.losses.mean())
            begin += size
            self._add("coarse/loss", losses[-1])
            self._add("coarse/rewards/accuracies", (found.chosen_rewards > found.rejected_rewards).float().mean())
            self._add("coarse/rewards/margins", (found.chosen_rewards - found.rejected_rewards).mean())
            self._add("coarse/rewards/chosen", found.chosen_rewards.mean())
            self._add("coarse/rewards/rejected", found.rejected_rewards.mean())
        return torch.stack(losses)

    def _log_probs(self, model: nn.Module, targets: Sequence[Target], granularity: str) -> torch.Tensor:
        return answer_log_probs(*self._logits(model, targets, granularity))[0]

    def _logits(
        self, model: nn.Module, targets: Sequence[Target], granularity: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if torch.is_grad_enabled():
            token = self.bare.config.video_token_id
            self._window_visual_tokens += sum(target.ids.count(token) for target in targets)
        return answer_logits(model, targets, granularity=granularity, device=self.args.device)

    def _play(self, question: VideoQuestion) -> Round:
        """Samples policies for a question and lets the fine module score them."""
        prompt_ids, features = self._coarse_view(question)
        policies = self._write_policies(question, prompt_ids, features, num_samples=self.args.num_policies)
        scores = {segment: self._score(question, segment) for segment in dict.fromkeys(p.segment for p in policies)}
        each = [scores[policy.segment] for policy in policies]
        choice = choose_policies(
            each,
            well_formed=[policy.is_well_formed for policy in policies],
            keys=[(policy.is_well_formed, policy.segment) for policy in policies],
        )
        self._add("coarse/pairs", float(len(choice.losers)))
        self._add("coarse/well_formed", sum(policy.is_well_formed for policy in policies) / len(policies))
        self._add("coarse/score_winner", each[choice.winner])
        self._add("coarse/score_mean", sum(each) / len(each))
        if question.segment is not None:
            ious = [_found_iou(policy, question.segment) for policy in policies]
            self._add("reward/winner_overlap", float(ious[choice.winner] > 0))
            self._add("reward/winner_iou", ious[choice.winner])
            self._add("reward/policy_overlap", sum(iou > 0 for iou in ious) / len(ious))
        return Round(prompt_ids, features, policies, choice)

    def _coarse_view(self, question: VideoQuestion) -> tuple[list[int], torch.Tensor]:
        features = self.seen.look(self.bare, question, "coarse")
        duration = self.seen.source(question).duration
        prompt = self.texts.prompt(question, "coarse", len(features), duration)
        return self.texts.prompt_ids(prompt), features

    def _write_policies(
        self, question: VideoQuestion, prompt_ids: list[int], features: torch.Tensor, *, num_samples: int | None
    ) -> list[Policy]:
        """Samples policies of the coarse module as it is now, or takes its most likely one."""
        sampling = {} if num_samples is None else {"temperature": self.args.temperature}
        ends = self.texts.end_ids(self.bare)
        settings = {"max_new_tokens": self.args.max_policy_tokens, **self._ends(ends), **sampling}
        written = generate(self.bare, prompt_ids, features, granularity="coarse", num_samples=num_samples, **settings)
        duration = self.seen.source(question).duration
        return [self.texts.policy(ids, ends, duration, self.args.min_segment) for ids in written]

    def _ends(self, ends: list[int]) -> dict[str, Any]:
        pad = self.processing_class.tokenizer.pad_token_id
        return {"eos_token_id": ends, "pad_token_id": ends[0] if pad is None else pad}

    def _score(self, question: VideoQuestion, segment: Segment) -> float:
        """Loss of the fine module on the best of the right answers, from a segment."""
        with answering(self.bare):
            return float(self._answer_losses(self.bare, [(question, segment)])[0])

    def _answer_losses(self, model: nn.Module, cut: Sequence[tuple[VideoQuestion, Segment]]) -> torch.Tensor:
        """Returns the cross-entropy of the best right answer of each question from its segment, (B,)."""
        targets, counts = [], []
        for question, segment in cut:
            features = self.seen.look(self.bare, question, "fine", segment)
            prompt = self.texts.prompt(question, "fine", len(features), self.seen.source(question).duration)
            targets += [Target(*self.texts.answered(question, prompt, text), features) for text in question.answers]
            counts.append(len(question.answers))
        losses = supervised_loss(*self._logits(model, targets, "fine"))
        return torch.stack([some.min() for some in losses.split(counts)])

    def _ground(self, question: VideoQuestion) -> Policy:
        prompt_ids, features = self._coarse_view(question)
        return self._write_policies(question, prompt_ids, features, num_samples=None)[0]

    def _fine_losses(self, model: nn.Module, questions: Sequence[VideoQuestion]) -> torch.Tensor:
        policies = [self._ground(question) for question in questions]
        cut = [(question, policy.segment) for question, policy in zip(questions, policies, strict=True)]
        losses_B = self._answer_losses(model, cut)
        for question, policy, loss in zip(questions, policies, losses_B, strict=True):
            self._add("fine/loss", loss)
            if question.segment is not None:
                self._add("fine/segment_overlap", float(_found_iou(policy, question.segment) > 0))
        return losses_B

    # ------------------------------------------------------------------ evaluation and logs

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor, None, None]:
        """Ground and answer the questions of a batch; the metrics are added up for `evaluation_loop`."""
        losses = []
        self.seen.begin_pair()
        with self.compute_loss_context_manager(), answering(self.bare):
            for question in inputs["questions"]:
                policy = self._ground(question)
                losses.append(self._answer_losses(self.bare, [(question, policy.segment)])[0])
                said, right = self._answer(question, policy.segment), map(_plain, question.answers)
                self._add("answer_accuracy", float(_plain(said) in right), split="eval")
                self._add("fine/loss", losses[-1], split="eval")
                self._add("coarse/well_formed", float(policy.is_well_formed), split="eval")
                if question.segment is not None:
                    self._add("segment_iou", _found_iou(policy, question.segment), split="eval")
        return torch.stack(losses).mean(), None, None

    def _answer(self, question: VideoQuestion, segment: Segment) -> str:
        features = self.seen.look(self.bare, question, "fine", segment)
        prompt = self.texts.prompt(question, "fine", len(features), self.seen.source(question).duration)
        ends = self.texts.end_ids(self.bare)
        settings = {"max_new_tokens": self.args.max_answer_tokens, **self._ends(ends)}
        ids = generate(self.bare, self.texts.prompt_ids(prompt), features, granularity="fine", **settings)[0]
        return self.processing_class.tokenizer.decode(ids, skip_special_tokens=True)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """Evaluate; overlaps and accuracy stand among the metrics."""
        self._sums["eval"].zero_()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        self.seen.begin_pair()
        means = self._take_means("eval")
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in means.items()})
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the means over all questions since the last log."""
        if "loss" in logs:
            logs.update(self._take_means("train"))
        super().log(logs, start_time)

    def _add(self, name: str, value: float | torch.Tensor, *, split: str = "train") -> None:
        sums = self._sums[split][:, METRICS.index(name)]
        number = float(value.detach() if isinstance(value, torch.Tensor) else value)
        sums += torch.tensor([number, 1.0], dtype=torch.float64)

    def _take_means(self, split: str) -> dict[str, float]:
        sums, self._sums[split] = self._sums[split], torch.zeros_like(self._sums[split])
        # Not every device knows float64.
        totals, counts = self.accelerator.reduce(sums.float().to(self.args.device), reduction="sum").tolist()
        return {name: x / n for name, x, n in zip(METRICS, totals, counts, strict=True) if n}

    # ------------------------------------------------------------------ checkpoints

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        base = self.args.base_model_name
        if base is None or not self.args.should_save:
            super()._save(output_dir, state_dict)
            return
        folder = self.args.output_dir if output_dir is None else output_dir
        self.bare.save_pretrained(folder, state_dict=state_dict, base_model=base)
        self.processing_class.save_pretrained(folder)
        torch.save(self.args, os.path.join(folder, "training_args.bin"))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        # Before the Trainer's files: its last one marks a checkpoint as complete.
        if self.args.should_save:
            name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            save_state(self.bare, Path(self._get_output_dir(trial=trial), name), (*MODULES, REFERENCE))
        super()._save_checkpoint(model, trial)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        check_even_step(resume_from_checkpoint)
        load_state(self.bare, resume_from_checkpoint, (*MODULES, REFERENCE))

    def _load_best_model(self) -> None:
        load_state(self.bare, self.state.best_model_checkpoint, (*MODULES, REFERENCE))


class _Phases(TrainerCallback):
    """Tells the trainer when an optimizer step begins."""

    def __init__(self, trainer: CrossGranularityTrainer) -> None:
        self.trainer = trainer

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Choose the module that learns, by the parity of the step."""
        self.trainer.begin_step(state.global_step)


def _check_given(model: Any, args: Any, processor: Any) -> None:
    if not isinstance(args, CrossGranularityConfig):
        raise ValueError(f"args must be a CrossGranularityConfig, got {type(args).__name__}.")
    if not getattr(model, "has_adapters", False) or not hasattr(model, "granularity_parameters"):
        raise ValueError(
            f"{type(model).__name__} has no two adapters to train in turn. Pass a CrossVLLM with adapters "
            "(model.add_adapters())."
        )
    if not hasattr(processor, "prompt_of"):
        raise ValueError("Give processing_class=<processor of the model>; it writes the prompts.")


def _found_iou(policy: Policy, truth: Segment) -> float:
    """Returns the overlap of a policy with the truth; what cannot be read has found nothing."""
    return temporal_iou(policy.segment, truth) if policy.is_well_formed else 0.0


def _plain(text: str) -> str:
    return " ".join(text.lower().split()).strip(" .!?\"'")
