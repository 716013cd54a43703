"""InternVideo2-1B video encoder: class token, learned positions, RMS norms, normed queries and keys, layer scale.

Paper: InternVideo2 (arXiv 2403.15377), as used by VideoChat-Flash (arXiv 2501.00574).
Original read: OpenGVLab/VideoChat-Flash, `internvideo2_encoder.py`.

Shapes: N clips, T frames of a clip, L patches of a frame, P = 1 + T * L with the class token, E width, H heads.
"""

import torch
from torch import nn
from transformers import AutoModel, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from longvideo.modeling.encoders.internvideo2.configuration_internvideo2 import InternVideo2VisionConfig
from longvideo.modeling.encoders.vit_parts import TubeletEmbedding, VisionMLP, attend, check_clip


def _half_split_sincos(positions: torch.Tensor, width: int) -> torch.Tensor:
    """Sines in the first half of the channels, cosines in the second; (P,) -> (P, width)."""
    omega = torch.arange(width // 2, dtype=torch.float64, device="cpu") / (width / 2.0)
    angle = positions.double()[:, None] * (1.0 / 10000**omega)
    return torch.cat([angle.sin(), angle.cos()], dim=1)


def internvideo2_position_table(hidden_size: int, grid_size: int, num_frames: int) -> torch.Tensor:
    """Builds the start value of the learned positions: a quarter of the width for time, the rest for space.

    Args:
        hidden_size: token width E, a multiple of 16.
        grid_size: patches along one side of a frame.
        num_frames: frames of a clip, 1 for images.

    Returns:
        (1, 1 + num_frames * grid_size ** 2, E) float32; the class token's row is zero.

    Source: VideoChat-Flash, `internvideo2_encoder.py`, `get_3d_sincos_pos_embed`.
    """
    time_width = hidden_size // 4
    side_width = (hidden_size - time_width) // 2
    steps = torch.arange(grid_size, device="cpu")
    rows, columns = torch.meshgrid(steps, steps, indexing="ij")
    space = torch.cat(
        [_half_split_sincos(columns.flatten(), side_width), _half_split_sincos(rows.flatten(), side_width)], dim=1
    )
    time = _half_split_sincos(torch.arange(num_frames, device="cpu"), time_width)
    table = torch.cat([time.repeat_interleave(grid_size**2, dim=0), space.repeat(num_frames, 1)], dim=1)  # (T * L, E)
    return torch.cat([torch.zeros(1, hidden_size, dtype=torch.float64, device="cpu"), table])[None].float()


class InternVideo2RMSNorm(nn.Module):
    """RMS norm with float32 statistics; the weight is applied after the cast back."""

    def __init__(self, hidden_size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        normed = hidden_states.float()
        normed = normed * torch.rsqrt(normed.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * normed.to(hidden_states.dtype)


class InternVideo2LayerScale(nn.Module):
    """One learned factor per channel, applied in float32."""

    def __init__(self, hidden_size: int, init_value: float):
        super().__init__()
        self.init_value = init_value
        self.weight = nn.Parameter(init_value * torch.ones(hidden_size))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return (hidden_states.float() * self.weight.float()).to(hidden_states.dtype)


class InternVideo2Attention(nn.Module):
    """Full self-attention; queries and keys are normed over the whole width before the heads are split."""

    is_causal = False

    def __init__(self, config: InternVideo2VisionConfig):
        super().__init__()
        self.config = config
        self.num_heads = config.num_attention_heads
        self.scaling = (config.hidden_size // config.num_attention_heads) ** -0.5
        self.attention_dropout = config.attention_dropout
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.q_norm = InternVideo2RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.k_norm = InternVideo2RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> tuple[torch.Tensor, torch.Tensor | None]:
        query, key, value = self.qkv(hidden_states).chunk(3, dim=-1)  # (N, P, E) each
        query, key = self.q_norm(query), self.k_norm(key)
        heads = [x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (query, key, value)]
        output, weights = attend(self, *heads, **kwargs)
        return self.proj(output), weights


class InternVideo2Layer(GradientCheckpointingLayer):
    """Pre-norm block with layer scale on both branches and stochastic depth in training."""

    def __init__(self, config: InternVideo2VisionConfig, layer_idx: int):
        super().__init__()
        self.norm1 = InternVideo2RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attn = InternVideo2Attention(config)
        self.ls1 = InternVideo2LayerScale(config.hidden_size, config.layer_scale_init_value)
        self.norm2 = InternVideo2RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = VisionMLP(config.hidden_size, config.intermediate_size, config.hidden_act)
        self.ls2 = InternVideo2LayerScale(config.hidden_size, config.layer_scale_init_value)
        # The rate reaches its full value at the nominal last layer, which is not built.
        self.drop_path_rate = config.drop_path_rate * layer_idx / config.num_hidden_layers

    def _drop_path(self, branch: torch.Tensor) -> torch.Tensor:
        if not self.training or self.drop_path_rate == 0:
            return branch
        keep = 1 - self.drop_path_rate
        kept = branch.new_empty(branch.shape[0], 1, 1).bernoulli_(keep)
        return branch * kept / keep

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        attended = self.attn(self.norm1(hidden_states), **kwargs)[0]
        hidden_states = hidden_states + self._drop_path(self.ls1(attended))
        return hidden_states + self._drop_path(self.ls2(self.mlp(self.norm2(hidden_states))))


class InternVideo2VisionModel(PreTrainedModel):
    """InternVideo2 video encoder; returns the patch tokens of the last block, without class token and final norm.

    Args:
        config: sizes of the tower.

    Differs: the original runs only with FlashAttention in 16 bit; here every attention implementation works.
    """

    config: InternVideo2VisionConfig
    config_class = InternVideo2VisionConfig
    main_input_name = "pixel_values"
    input_modalities = ("video", "image")
    supports_gradient_checkpointing = True
    _no_split_modules = ["InternVideo2Layer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": InternVideo2Layer, "attentions": InternVideo2Attention}

    def __init__(self, config: InternVideo2VisionConfig):
        super().__init__(config)
        num_patches = (config.image_size // config.patch_size) ** 2
        self.patch_embed = TubeletEmbedding(config.num_channels, config.hidden_size, config.patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + config.num_frames * num_patches, config.hidden_size))
        self.img_pos_embed = nn.Parameter(torch.zeros(1, 1 + num_patches, config.hidden_size))
        self.blocks = nn.ModuleList([InternVideo2Layer(config, i) for i in range(config.num_hidden_layers)])
        self.gradient_checkpointing = False
        self.post_init()

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        # Upstream looks for the attention interface in the source of this file; it is called in vit_parts.
        return True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, InternVideo2LayerScale):
            init.constant_(module.weight, module.init_value)
        elif isinstance(module, InternVideo2VisionModel):
            config = module.config
            grid = config.image_size // config.patch_size
            init.normal_(module.cls_token, std=config.initializer_range)
            init.copy_(module.pos_embed, internvideo2_position_table(config.hidden_size, grid, config.num_frames))
            init.copy_(module.img_pos_embed, internvideo2_position_table(config.hidden_size, grid, 1))

    def get_input_embeddings(self) -> nn.Module:
        return self.patch_embed

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(self, pixel_values: torch.Tensor, **kwargs) -> BaseModelOutput:
        """Encodes clips or images.

        Args:
            pixel_values: (N, T, C, image_size, image_size) normalised frames, T the frames of a clip or 1.

        Returns:
            `last_hidden_state` (N, T * L, E) without the class token, frame by frame, patches row by row.

        Raises:
            ValueError: frame count or size differ from the configuration.
        """
        check_clip(self, pixel_values)
        patches = self.patch_embed(pixel_values.to(self.patch_embed.proj.weight.dtype))
        hidden_states = torch.cat([self.cls_token.expand(patches.shape[0], -1, -1), patches], dim=1)
        hidden_states = hidden_states + (self.img_pos_embed if pixel_values.shape[1] == 1 else self.pos_embed)
        for block in self.blocks:
            hidden_states = block(hidden_states, **kwargs)
        return BaseModelOutput(last_hidden_state=hidden_states[:, 1:])


AutoModel.register(InternVideo2VisionConfig, InternVideo2VisionModel, exist_ok=True)

__all__ = ["InternVideo2VisionModel"]
