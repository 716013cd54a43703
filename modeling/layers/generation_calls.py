"""What calls of `generate` ask for, and logits processors for prompts whose placeholders lie beyond the table."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional as F
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList
from transformers.generation.logits_process import (
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    LogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
)

# Arguments of upstream's `generate` behind `inputs` and `generation_config`, which may be given by position.
FURTHER_ARGUMENTS = tuple(inspect.signature(GenerationMixin.generate).parameters)[3:]
# What makes upstream decode with candidates that something else than the model proposes.
ASSISTANTS = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp")
# Processors that take the columns of the ids of the prompt.
COLUMN_READERS = (
    RepetitionPenaltyLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    EncoderNoRepeatNGramLogitsProcessor,
)


def name_arguments(args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments of a call of `generate`, those behind `generation_config` by name."""
    return {**dict(zip(FURTHER_ARGUMENTS, args, strict=False)), **kwargs}


def asked_assistant(kwargs: Mapping[str, Any], *configs: GenerationConfig | None) -> str | None:
    """Says whether a call asks for assisted decoding.

    Args:
        kwargs: arguments of `generate` by name.
        *configs: generation configurations of the call and of the model.

    Returns:
        What asks for it, by name; None where nothing does.
    """
    for name in ASSISTANTS:
        values = [kwargs.get(name), *(getattr(config, name, None) for config in configs)]
        value = next((x for x in values if x is not None), None)
        if value is not None and value is not False:
            return name
    return None


class WidenedScores(LogitsProcessor):
    """Lets a processor see scores with a column for every id that a prompt can hold.

    Args:
        inner: processor.
        num_columns: columns; those beyond the model's own have the score minus infinity.
    """

    def __init__(self, inner: LogitsProcessor, num_columns: int):
        self.inner = inner
        self.num_columns = num_columns

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        num_own = scores.shape[-1]
        wide = F.pad(scores, (0, max(0, self.num_columns - num_own)), value=-float("inf"))
        return self.inner(input_ids, wide)[..., :num_own]


class PlaceholderGenerationMixin(GenerationMixin):
    """`GenerationMixin` for a model whose `image_token_id` and `video_token_id` may lie beyond the embedding table."""

    def _get_logits_processor(self, *args, **kwargs) -> LogitsProcessorList:
        """Lets penalties on ids of the prompt pass over placeholders that have no score."""
        processors = super()._get_logits_processor(*args, **kwargs)
        num_columns = 1 + max(self.config.image_token_id, self.config.video_token_id)
        if num_columns <= self.config.get_text_config().vocab_size:
            return processors
        return LogitsProcessorList(
            WidenedScores(x, num_columns) if isinstance(x, COLUMN_READERS) else x for x in processors
        )
