"""Arguments of cross-granularity training."""

from dataclasses import dataclass, field
from typing import Any

from longvideo.trainers.sft_config import VideoSFTConfig

# Settings of supervised finetuning that have no meaning here, with the only value that fits.
_SFT_ONLY = {
    "trainable_parts": None,
    "trainable_names": None,
    "frozen_names": None,
    "vision_tower_learning_rate": None,
    "connector_learning_rate": None,
    "embeddings_learning_rate": None,
    "max_length": None,
    "max_frames_per_row": None,
    "mask": "assistant",
    "label_rule": None,
    "blank_image_position": None,
    "processor_kwargs": None,
    "on_bad_video": "raise",
    "encoded_features_dir": None,
    "train_sampling_strategy": "random",
}


@dataclass
class CrossGranularityConfig(VideoSFTConfig):
    """`VideoSFTConfig` with the settings of Algorithm 1.

    Optimizer steps alternate: even ones train the coarse module, odd ones the fine module on the same rows. So
    `max_steps` counts both, and checkpoints fall on even steps.

    Args:
        learning_rate: Peak learning rate of both modules.
        coarse_learning_rate: Peak learning rate of the coarse module; None takes `learning_rate`.
        fine_learning_rate: Peak learning rate of the fine module; None takes `learning_rate`.
        num_policies: Policies n that are sampled for each question.
        beta: How strongly the coarse module is held to the reference.
        temperature: Of sampling; 1 samples from the module as it is.
        ref_sync_steps: 0 keeps the reference as the coarse module is before training. n makes it equal to the coarse
            module again before every n-th coarse step; 1 is the printed algorithm, whose loss is ln 2 at every step.
        max_policy_tokens: Most tokens of a policy.
        max_answer_tokens: Most tokens of an answer in evaluation.
        min_segment: Shortest segment in seconds that is cut.
        coarse_processor_kwargs: Options of the processor for whole videos, for example `{"num_frames": 72}`; without
            them the frames of training of the coarse granularity.
        fine_processor_kwargs: The same for segments.
        keep_frames: Features of so many frames may be kept beyond the pair of steps that needs them, for later
            epochs; 0 keeps none.
        disable_dropout: Whether dropout is off in training, so that policy and reference are compared alike.
        base_model_name: Folder or Hub id of the base, which checkpoints then name and do not hold; None writes it
            into each.

    Raises:
        ValueError: A setting outside of its range, an odd number of steps, or a setting of supervised finetuning.

    Source: CrossVLLM Table 4 and Algorithm 1.
    Differs: beta, temperature and the scheduler are not printed, and the algorithm refreshes the reference while
        Sec. 4.2 calls it frozen; frozen is the default.
    """

    _VALID_DICT_FIELDS = [*VideoSFTConfig._VALID_DICT_FIELDS, "coarse_processor_kwargs", "fine_processor_kwargs"]

    learning_rate: float = field(default=2e-5, metadata={"help": "Peak learning rate of both modules."})
    coarse_learning_rate: float | None = field(default=None, metadata={"help": "Learning rate of the coarse module."})
    fine_learning_rate: float | None = field(default=None, metadata={"help": "Learning rate of the fine module."})
    num_policies: int = field(default=4, metadata={"help": "Policies sampled per question."})
    beta: float = field(default=0.1, metadata={"help": "How strongly the coarse module is held to the reference."})
    temperature: float = field(default=1.0, metadata={"help": "Temperature of sampling."})
    ref_sync_steps: int = field(
        default=0, metadata={"help": "0: frozen reference; n: refreshed every n coarse steps."}
    )
    max_policy_tokens: int = field(default=64, metadata={"help": "Most tokens of a policy."})
    max_answer_tokens: int = field(default=64, metadata={"help": "Most tokens of an answer in evaluation."})
    min_segment: float = field(default=1.0, metadata={"help": "Shortest segment in seconds."})
    coarse_processor_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Options of the processor for whole videos, as JSON."}
    )
    fine_processor_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Options of the processor for segments, as JSON."}
    )
    keep_frames: int = field(default=0, metadata={"help": "Frames whose features may be kept for later epochs."})
    disable_dropout: bool = field(default=True, metadata={"help": "Train without dropout."})
    base_model_name: str | None = field(default=None, metadata={"help": "Base that checkpoints name and do not hold."})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in _SFT_ONLY.items():
            if getattr(self, name) != value:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is a setting of supervised finetuning; here adapters and "
                    f"projectors of both granularities learn from whole rows. Leave it {value!r}."
                )
        self._check_ranges()
        self._check_even()
        # The adapter that does not learn in a step has no gradient.
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = True

    def _check_ranges(self) -> None:
        if self.num_policies < 2:
            raise ValueError(f"num_policies={self.num_policies} must be at least 2: policies are compared.")
        for name in ("beta", "temperature", "min_segment", "coarse_learning_rate", "fine_learning_rate"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name}={value} must be positive.")
        for name, least in (
            ("ref_sync_steps", 0),
            ("keep_frames", 0),
            ("max_policy_tokens", 1),
            ("max_answer_tokens", 1),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}.")

    def _check_even(self) -> None:
        by_steps = {"max_steps": self.max_steps if self.max_steps > 0 else None}
        if self.save_strategy == "steps":
            by_steps["save_steps"] = self.save_steps
        elif self.save_strategy == "best":
            by_steps["eval_steps"] = self.eval_steps
        for name, steps in by_steps.items():
            if steps is not None and (steps != int(steps) or steps % 2):
                raise ValueError(
                    f"{name}={steps} must be an even number: a coarse step and the fine step on the same rows belong "
                    "together, and a run continues behind such a pair."
                )

    @property
    def module_learning_rates(self) -> dict[str, float]:
        """Peak learning rate of each module."""
        chosen = {"coarse": self.coarse_learning_rate, "fine": self.fine_learning_rate}
        return {name: self.learning_rate if rate is None else float(rate) for name, rate in chosen.items()}
