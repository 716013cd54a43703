"""Arguments of supervised finetuning on video."""

from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from longvideo.trainers.bad_media import POLICIES
from longvideo.trainers.freezing import PART_MODULES, SUB_PARTS, check_patterns, part_of, sub_part_of
from longvideo.trainers.recipe import find_stage

__all__ = ["PART_MODULES", "SUB_PARTS", "VideoSFTConfig", "part_of", "sub_part_of"]


@dataclass
class VideoSFTConfig(TrainingArguments):
    """`TrainingArguments` with the settings of staged video finetuning.

    Args:
        trainable_parts: Parts that learn, out of "vision_tower", "connector", "language_model" (with `lm_head`), or
            of their sub-parts "packer" (of the connector), "embeddings" (of the language model: the input embedding,
            and coordinate tables), "v2v" and "t2v" (of the language model: cross-attention in its layers); all other
            parameters are frozen. None leaves `requires_grad` as the model has it.
        prepare_model: Method of the model that is called, without arguments, before anything is frozen: what makes a
            checkpoint of the last stage a model of this one, as "add_t2v" of CrossLMM does. It must do nothing to a
            model that is prepared already. None calls nothing.
        vision_tower_learning_rate: Peak learning rate of the vision towers; None takes `learning_rate`.
        connector_learning_rate: Peak learning rate of what joins towers and language model; None takes
            `learning_rate`.
        embeddings_learning_rate: Peak learning rate of the sub-part "embeddings"; None takes `learning_rate`.
        trainable_names: Regular expressions; parameters whose dotted name one of them finds (`re.search`) learn too.
            Without `trainable_parts` they alone learn.
        frozen_names: Regular expressions; parameters whose dotted name one of them finds do not learn, whatever the
            other two say.
        max_length: Most tokens of a row, visual placeholders included: fewer frames are read of videos in longer rows
            (see `VideoSFTCollator`).
        max_frames_per_row: Most frames of a row, all its videos together (see `VideoSFTCollator`).
        mask: Which tokens are supervised, "assistant" or "all" (see `VideoSFTCollator`).
        label_rule: None, or "videochat_flash" / "longvu" / "llava_st" for the originals' labels (see
            `VideoSFTCollator`).
        blank_image_position: None, or where rows of text get a black image (see `VideoSFTCollator`).
        processor_kwargs: Given to the processor for every row, for example `{"min_frames": 64, "max_frames": 512}`.
        on_bad_video: "raise", or "skip" to go on without rows whose videos or images cannot be read. These are logged
            (`skipped_rows`) and listed in `bad_videos.jsonl` of `output_dir`. In a batch of such rows alone others of
            training stand in; evaluation stops at one.
        encoded_features_dir: Folder for encoded videos; they are read from there from the second epoch on, and by
            other runs with the same frozen encoder and the same settings. Tower and connector must be frozen. None
            decodes and encodes videos each time.
        supervised_logits_only: Whether a step of training makes logits of supervised positions alone, which saves
            most of their memory and of the head's time; the loss is the same. The output that `compute_loss` returns
            in training then has no logits; False is for code that reads them. Evaluation always has all of them, and
            so have LLaVA-ST with coordinates, adapters on the head, FSDP, ZeRO-3 and `torch_compile`.

    `train_sampling_strategy="group_by_length"` puts rows of like length into one batch, frames of their videos
    counted; a column `length` (`length_column_name`) is taken as it is.

    Raises:
        ValueError: An unknown part, a pattern that is no regular expression, a non-positive learning rate, or a
            setting that breaks batches of flat pixels.
    """

    # The lists and dicts that the command line may give as JSON text.
    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "processor_kwargs"]

    # The columns of a dataset are messages, never arguments of the model's forward.
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must stay False: rows hold messages."})
    trainable_parts: list[str] | None = field(
        default=None,
        metadata={
            "help": "Parts that learn: vision_tower, connector, language_model, packer, embeddings, v2v, t2v. "
            "Default: as is."
        },
    )
    prepare_model: str | None = field(
        default=None, metadata={"help": "Method of the model to call before training, as add_t2v. Default: none."}
    )
    vision_tower_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the vision towers. Default: learning_rate."}
    )
    connector_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the connector. Default: learning_rate."}
    )
    embeddings_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of embedding and coordinate tables. Default: learning_rate."}
    )
    trainable_names: list[str] | None = field(
        default=None, metadata={"help": "Regular expressions of names of parameters that learn too."}
    )
    frozen_names: list[str] | None = field(
        default=None, metadata={"help": "Regular expressions of names of parameters that do not learn."}
    )
    max_length: int | None = field(default=None, metadata={"help": "Most tokens of a row; None for no limit."})
    max_frames_per_row: int | None = field(default=None, metadata={"help": "Most frames of a row; None for no limit."})
    mask: str = field(default="assistant", metadata={"help": "Supervised tokens: assistant or all."})
    label_rule: str | None = field(default=None, metadata={"help": "None, videochat_flash, longvu or llava_st."})
    blank_image_position: int | None = field(
        default=None, metadata={"help": "Token index at which rows of text get a black image. Default: none."}
    )
    processor_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Options of the processor for every row, as JSON."}
    )
    on_bad_video: str = field(
        default="raise", metadata={"help": "Rows whose video cannot be read: raise, or skip and report them."}
    )
    encoded_features_dir: str | None = field(
        default=None, metadata={"help": "Folder for videos that the frozen encoder encodes once. Default: none."}
    )
    supervised_logits_only: bool = field(
        default=True, metadata={"help": "Make logits of supervised positions alone in training."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.remove_unused_columns:
            raise ValueError(
                "remove_unused_columns=True would drop the `messages` column that the collator reads. Leave it False."
            )
        if self.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor={self.label_smoothing_factor} needs logits as long as the labels, but a "
                "model may shorten the sequence and computes its own loss. Set it to 0."
            )
        known = [*sorted(PART_MODULES), *sorted(SUB_PARTS)]
        if self.trainable_parts == [] or not set(self.trainable_parts or ()) <= set(known):
            raise ValueError(f"trainable_parts={self.trainable_parts} must name one or more of {known}, or be None.")
        check_patterns(self.trainable_names, self.frozen_names)
        if self.on_bad_video not in POLICIES:
            raise ValueError(f"on_bad_video={self.on_bad_video!r} is unknown; use one of {POLICIES}.")
        for name in ("vision_tower_learning_rate", "connector_learning_rate", "embeddings_learning_rate"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(
                    f"{name}={value} must be positive; to freeze the part, leave it out of trainable_parts."
                )
        # Slicing a batch along dim 0 on the main process would cut through flat frames of one video.
        if self.accelerator_config.dispatch_batches is None:
            self.accelerator_config.dispatch_batches = False
        elif self.accelerator_config.dispatch_batches:
            raise ValueError(
                "accelerator_config.dispatch_batches=True slices batches along their first axis, which for videos is "
                "frames, not rows. Leave it unset."
            )

    @property
    def part_learning_rates(self) -> dict[str, float]:
        """Peak learning rate of every part, and of "embeddings" where it has its own.

        Parameters outside of the parts take that of the language model.
        """
        chosen = {"connector": self.connector_learning_rate, "vision_tower": self.vision_tower_learning_rate}
        rates = {
            part: self.learning_rate if chosen.get(part) is None else float(chosen[part]) for part in PART_MODULES
        }
        if self.embeddings_learning_rate is not None:
            rates["embeddings"] = float(self.embeddings_learning_rate)
        return rates

    @classmethod
    def from_recipe(cls, recipe: str, stage: str | int, *, output_dir: str, **overrides: Any) -> "VideoSFTConfig":
        """Build the arguments of one stage of a recipe file.

        Args:
            recipe: Architecture, as a folder of `trainers/recipes` is named, or a path (see `load_recipe`).
            stage: Name of the stage, or its 1-based number.
            output_dir: Where checkpoints go.
            **overrides: Arguments that replace the recipe's.

        Returns:
            The arguments.

        Raises:
            FileNotFoundError: No such recipe.
            ValueError: No such stage.
        """
        _, entry = find_stage(recipe, stage)
        return cls(**{"output_dir": output_dir, **entry["args"], **overrides})
