"""Arguments of direct preference optimisation on video."""

from dataclasses import dataclass, field
from typing import Any

from longvideo.trainers.dpo_loss import LOSS_TYPES
from longvideo.trainers.sft_config import VideoSFTConfig

PADDING_SIDES = ("left", "right")
# Settings of supervised finetuning that say nothing about pairs of answers, with the only value that fits here.
SFT_ONLY = {"mask": "assistant", "label_rule": None, "blank_image_position": None}


@dataclass
class VideoDPOConfig(VideoSFTConfig):
    """`VideoSFTConfig` with the settings of preference optimisation.

    Args:
        learning_rate: Peak learning rate; 1e-6 suits a whole model, an adapter wants more.
        beta: How strongly the model is held to the reference.
        label_smoothing: Share of pairs whose order is taken to be wrong, 0 to below 0.5.
        loss_type: "sigmoid", or "ipo", which is always length-normalised.
        length_normalized: Whether the log-likelihood of an answer is divided by its number of tokens, under policy
            and reference alike.
        reference_adapter: Name of the adapter of a PEFT model that is the reference; None takes the model without its
            adapter, or whatever else `VideoDPOTrainer` is given.
        precompute_reference: Whether the log-likelihoods of the reference are computed once for all rows before
            training, as `VideoDPOTrainer.compute_reference` does; a model without adapter and without a reference of
            its own is then its own reference, as it is before training.
        padding_side: "left" computes logits of the answers alone; "right" gives the same losses and is slower.

    Raises:
        ValueError: A setting outside of its range, or one of supervised finetuning that pairs have no use for.
    """

    learning_rate: float = field(default=1e-6, metadata={"help": "Peak learning rate."})
    beta: float = field(default=0.1, metadata={"help": "How strongly the model is held to the reference."})
    label_smoothing: float = field(default=0.0, metadata={"help": "Share of pairs taken to be in the wrong order."})
    loss_type: str = field(default="sigmoid", metadata={"help": "sigmoid or ipo."})
    length_normalized: bool = field(
        default=False, metadata={"help": "Divide the log-likelihood of an answer by its number of tokens."}
    )
    reference_adapter: str | None = field(
        default=None, metadata={"help": "Adapter that is the reference. Default: the model without adapter."}
    )
    precompute_reference: bool = field(
        default=False, metadata={"help": "Compute the reference's log-likelihoods of all rows before training."}
    )
    padding_side: str = field(default="left", metadata={"help": "left or right."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta <= 0:
            raise ValueError(f"beta={self.beta} must be positive; 0.1 is usual, smaller values let the model go.")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing={self.label_smoothing} must be at least 0 and below 0.5.")
        if self.loss_type not in LOSS_TYPES:
            raise ValueError(f"loss_type={self.loss_type!r} is unknown; use one of {LOSS_TYPES}.")
        if self.loss_type == "ipo" and self.label_smoothing:
            raise ValueError("label_smoothing has no meaning for loss_type='ipo'; set it to 0.")
        if self.padding_side not in PADDING_SIDES:
            raise ValueError(f"padding_side={self.padding_side!r} is unknown; use one of {PADDING_SIDES}.")
        for name, value in SFT_ONLY.items():
            if getattr(self, name) != value:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is a setting of supervised finetuning; preferences compare the "
                    f"answers alone. Leave it {value!r}."
                )

    @property
    def averages_tokens(self) -> bool:
        """Whether log-likelihoods are means over an answer's tokens and not sums."""
        return self.length_normalized or self.loss_type == "ipo"

    @classmethod
    def from_recipe(cls, recipe: str, stage: str | int, *, output_dir: str, **overrides: Any) -> "VideoDPOConfig":
        """Build the arguments of one stage of a recipe file; its rules for labels are left out.

        Args:
            recipe: As for `VideoSFTConfig.from_recipe`.
            stage: Key or 1-based number of the stage.
            output_dir: Where checkpoints go.
            **overrides: Arguments that replace the recipe's.

        Returns:
            The arguments.

        Raises:
            FileNotFoundError: No such recipe.
            ValueError: No such stage.
        """
        return super().from_recipe(recipe, stage, output_dir=output_dir, **{**SFT_ONLY, **overrides})
