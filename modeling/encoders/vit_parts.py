"""Parts that the video vision transformers of this folder have in common.

Shapes: N clips, T frames of a clip, L patches of a frame, P = T * L, E width, H heads.
"""

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.models.siglip.modeling_siglip import eager_attention_forward


class TubeletEmbedding(nn.Module):
    """Cuts every frame into patches and projects them; frames are not mixed (temporal kernel 1)."""

    def __init__(self, num_channels: int, hidden_size: int, patch_size: int):
        super().__init__()
        self.proj = nn.Conv3d(
            num_channels, hidden_size, kernel_size=(1, patch_size, patch_size), stride=(1, patch_size, patch_size)
        )

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Maps (N, T, C, height, width) to (N, T * L, E), frame by frame, patches row by row."""
        return self.proj(pixel_values.transpose(1, 2)).flatten(2).transpose(1, 2)


class VisionMLP(nn.Module):
    """Two linear layers with an activation between."""

    def __init__(self, hidden_size: int, intermediate_size: int, hidden_act: str):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, intermediate_size)
        self.act = ACT2FN[hidden_act]
        self.fc2 = nn.Linear(intermediate_size, hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.act(self.fc1(hidden_states)))


def attend(
    module: nn.Module, query_NHPd: torch.Tensor, key_NHPd: torch.Tensor, value_NHPd: torch.Tensor, **kwargs
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Runs full attention with the implementation chosen in the module's configuration.

    Args:
        module: attention module with `config`, `scaling`, `attention_dropout`, `is_causal = False`.
        query_NHPd: (N, H, P, head width); keys and values likewise.

    Returns:
        (N, P, E) output before the projection, and the weights (N, H, P, P) or None.
    """
    attention = ALL_ATTENTION_FUNCTIONS.get_interface(module.config._attn_implementation, eager_attention_forward)
    output, weights = attention(
        module,
        query_NHPd,
        key_NHPd,
        value_NHPd,
        None,
        is_causal=False,
        scaling=module.scaling,
        dropout=module.attention_dropout if module.training else 0.0,
        **kwargs,
    )
    return output.flatten(2), weights


def check_clip(model: PreTrainedModel, pixel_values: torch.Tensor) -> None:
    """Raises `ValueError` when a batch of clips does not have the frames and the size that a tower was built for."""
    config = model.config
    expected = (config.num_channels, config.image_size, config.image_size)
    if pixel_values.ndim != 5 or tuple(pixel_values.shape[2:]) != expected:
        raise ValueError(
            f"{type(model).__name__} got pixels of shape {tuple(pixel_values.shape)} and expects "
            f"(clips, frames, {expected[0]}, {expected[1]}, {expected[2]}). Let the processor resize the frames."
        )
    if pixel_values.shape[1] not in (1, config.num_frames):
        raise ValueError(
            f"{type(model).__name__} got clips of {pixel_values.shape[1]} frames and takes clips of "
            f"{config.num_frames} frames or single images. Sample a multiple of {config.num_frames} frames."
        )
