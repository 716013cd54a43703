"""A whole prompt as the decoder takes it: embeddings, where visual features lie in them, and what they may look up.

Shapes: B batch, S sequence, D language width.
"""

from dataclasses import dataclass, replace

import torch
from transformers.modeling_outputs import ModelOutput

from longvideo.modeling.crosslmm.configuration_crosslmm import CrossLMMConfig
from longvideo.modeling.crosslmm.visibility import VisualInputs, assign_visuals

KINDS = ("image", "video")


@dataclass
class CrossLMMPrompt:
    """Embeddings of a prompt with visual features in place.

    Args:
        embeds: (B, S, D).
        visual_mask: (B, S) bool, True at visual features; None without any.
        visuals: original tokens for cross-attention; None without visuals or without cross-attention.
        features: per kind the list of (V, D) features, or None.
    """

    embeds: torch.Tensor
    visual_mask: torch.Tensor | None = None
    visuals: VisualInputs | None = None
    features: dict[str, list[torch.Tensor] | None] | None = None

    @property
    def length(self) -> int:
        """Positions S."""
        return self.embeds.shape[1]

    def expand(self, times: int) -> "CrossLMMPrompt":
        """Returns the prompt with every row repeated, for beams; rows share the original tokens of their visuals."""
        visuals = self.visuals
        if visuals is not None:
            rows = [row for row in visuals.row_visuals for _ in range(times)]
            visuals = replace(visuals, row_visuals=rows)
        mask = None if self.visual_mask is None else self.visual_mask.repeat_interleave(times, dim=0)
        return CrossLMMPrompt(self.embeds.repeat_interleave(times, dim=0), mask, visuals)

    def behind(self, num_cached: int) -> "CrossLMMPrompt":
        """Returns the prompt with as many empty positions in front, for a cache that holds these."""
        if not num_cached:
            return self
        embeds = torch.nn.functional.pad(self.embeds, (0, 0, num_cached, 0))
        mask = None if self.visual_mask is None else torch.nn.functional.pad(self.visual_mask, (num_cached, 0))
        return replace(self, embeds=embeds, visual_mask=mask)


def stack_features(output: ModelOutput | None) -> list[torch.Tensor] | None:
    """Returns the features of each visual, (V, D), of an encoder's output."""
    return None if output is None else list(output.pooler_output)


def gather_visuals(
    outputs: dict[str, ModelOutput | None], masks: dict[str, torch.Tensor], config: CrossLMMConfig
) -> VisualInputs | None:
    """Joins the original tokens of all visuals in the order of the prompts.

    Args:
        outputs: per kind what `get_image_features` and `get_video_features` gave, or None.
        masks: per kind (B, S) bool, True at placeholders.
        config: model configuration.

    Returns:
        What cross-attention reads, or None for a model without cross-attention.

    Raises:
        ValueError: placeholders and features do not agree, or features without original tokens.
    """
    given = {kind: output for kind, output in outputs.items() if output is not None}
    num_rows = {kind: [len(x) for x in output.pooler_output] for kind, output in given.items()}
    rows = assign_visuals({kind: masks[kind] for kind in given}, num_rows)
    if not config.cross_attention_layers:
        return None
    for kind, output in given.items():
        if getattr(output, "memory", None) is None:
            raise ValueError(
                f"The encoded {kind}s hold no original tokens (`memory`), which cross-attention reads. Pass what this "
                f"model's get_{kind}_features or encode_video gives."
            )
    order = [visual for row in rows for visual in row]
    numbers = iter(range(len(order)))
    return VisualInputs(
        tokens=torch.cat([given[kind].memory[i] for kind, i in order]),
        num_frames=[len(given[kind].pooler_output[i]) // config.tokens_per_frame for kind, i in order],
        row_visuals=[[next(numbers) for _ in row] for row in rows],
        rows_per_frame=config.tokens_per_frame,
    )
