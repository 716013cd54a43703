"""UMT-L video encoder: all patches of a four-frame clip attend to each other.

Paper: Unmasked Teacher (arXiv 2303.16058), as used by VideoChat-Flash (arXiv 2501.00574, Sec. 3.1).
Original read: OpenGVLab/VideoChat-Flash, `umt_encoder.py`.
Deviation: the position tables are buffers that are rebuilt after loading; the original keeps a plain tensor.

Shapes: N clips, T frames of a clip, L patches of a frame, P = T * L, E width, H heads.
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModel, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from longvideo.modeling.encoders.umt.configuration_umt import UMTVisionConfig
from longvideo.modeling.encoders.vit_parts import TubeletEmbedding, VisionMLP, attend, check_clip


def interleaved_sincos_table(num_positions: int, width: int) -> torch.Tensor:
    """Builds the fixed table of a one-dimensional position: sines at even channels, cosines at odd ones.

    Args:
        num_positions: rows.
        width: channels.

    Returns:
        (num_positions, width) float32, computed in float64.

    Source: VideoChat-Flash, `umt_encoder.py`, `get_sinusoid_encoding_table`.
    """
    channel = torch.arange(width, dtype=torch.float64, device="cpu")
    rate = torch.pow(10000.0, 2 * torch.div(channel, 2, rounding_mode="floor") / width)
    angle = torch.arange(num_positions, dtype=torch.float64, device="cpu")[:, None] / rate
    angle[:, 0::2] = angle[:, 0::2].sin()
    angle[:, 1::2] = angle[:, 1::2].cos()
    return angle.float()


def umt_position_table(config: UMTVisionConfig, num_frames: int) -> torch.Tensor:
    """Builds the position table for clips of `num_frames` frames (or for images, with 1).

    Args:
        config: tower configuration; grids other than `position_grid_size` are reached by bicubic resizing.
        num_frames: 1 for images, else the frames of a clip.

    Returns:
        (num_frames * L, E) float32.

    Source: VideoChat-Flash, `umt_encoder.py`, `get_sinusoid_encoding_table2` and the `image_size != 224` branch.
    """
    base_frames = 1 if num_frames == 1 else config.position_num_frames
    base, grid = config.position_grid_size, config.image_size // config.patch_size
    table = interleaved_sincos_table(base_frames * base * base, config.hidden_size)
    table = table.view(base_frames, base, base, -1).permute(0, 3, 1, 2)  # (T, E, side, side)
    if grid != base:
        table = F.interpolate(table, size=(grid, grid), mode="bicubic", align_corners=False)
    table = table.permute(0, 2, 3, 1).flatten(1, 2)  # (T, L, E)
    if num_frames != base_frames:
        per_patch = table.permute(1, 2, 0)  # (L, E, T)
        table = F.interpolate(per_patch, size=num_frames, mode="linear", align_corners=False).permute(2, 0, 1)
    return table.reshape(-1, config.hidden_size).contiguous()


class UMTAttention(nn.Module):
    """Full self-attention with one fused projection; queries and values have a bias, keys none."""

    is_causal = False

    def __init__(self, config: UMTVisionConfig):
        super().__init__()
        self.config = config
        self.num_heads = config.num_attention_heads
        self.scaling = (config.hidden_size // config.num_attention_heads) ** -0.5
        self.attention_dropout = config.attention_dropout
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(config.hidden_size))
        self.v_bias = nn.Parameter(torch.zeros(config.hidden_size))
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> tuple[torch.Tensor, torch.Tensor | None]:
        query, key, value = self.qkv(hidden_states).chunk(3, dim=-1)  # (N, P, E) each
        query, value = query + self.q_bias, value + self.v_bias
        heads = [x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (query, key, value)]
        output, weights = attend(self, *heads, **kwargs)
        return self.proj(output), weights


class UMTLayer(GradientCheckpointingLayer):
    """Pre-norm transformer block."""

    def __init__(self, config: UMTVisionConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attn = UMTAttention(config)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = VisionMLP(config.hidden_size, config.intermediate_size, config.hidden_act)

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        hidden_states = hidden_states + self.attn(self.norm1(hidden_states), **kwargs)[0]
        return hidden_states + self.mlp(self.norm2(hidden_states))


class UMTVisionModel(PreTrainedModel):
    """UMT video encoder without class token; the last block's output passes the teacher's final norm.

    Args:
        config: sizes of the tower.
    """

    config: UMTVisionConfig
    config_class = UMTVisionConfig
    main_input_name = "pixel_values"
    input_modalities = ("video", "image")
    supports_gradient_checkpointing = True
    _no_split_modules = ["UMTLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": UMTLayer, "attentions": UMTAttention}

    def __init__(self, config: UMTVisionConfig):
        super().__init__(config)
        self.patch_embed = TubeletEmbedding(config.num_channels, config.hidden_size, config.patch_size)
        self.register_buffer("video_positions", umt_position_table(config, config.num_frames), persistent=False)
        self.register_buffer("image_positions", umt_position_table(config, 1), persistent=False)
        self.blocks = nn.ModuleList([UMTLayer(config) for _ in range(config.num_hidden_layers)])
        self.vision_layernorm = nn.LayerNorm(config.hidden_size, eps=config.final_layer_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        # Upstream looks for the attention interface in the source of this file; it is called in vit_parts.
        return True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, UMTAttention):
            init.zeros_(module.q_bias)
            init.zeros_(module.v_bias)
        elif isinstance(module, UMTVisionModel):
            # Loading builds the model without data: what is not in a checkpoint has to be written here.
            init.copy_(module.video_positions, umt_position_table(module.config, module.config.num_frames))
            init.copy_(module.image_positions, umt_position_table(module.config, 1))

    def get_input_embeddings(self) -> nn.Module:
        return self.patch_embed

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(self, pixel_values: torch.Tensor, **kwargs) -> BaseModelOutput:
        """Encodes clips or images.

        Args:
            pixel_values: (N, T, C, image_size, image_size) normalised frames, T the frames of a clip or 1.

        Returns:
            `last_hidden_state` (N, T * L, E), frame by frame, patches row by row.

        Raises:
            ValueError: frame count or size differ from the configuration.
        """
        check_clip(self, pixel_values)
        hidden_states = self.patch_embed(pixel_values.to(self.patch_embed.proj.weight.dtype))
        positions = self.image_positions if pixel_values.shape[1] == 1 else self.video_positions
        hidden_states = hidden_states + positions.to(hidden_states)
        for block in self.blocks:
            hidden_states = block(hidden_states, **kwargs)
        return BaseModelOutput(last_hidden_state=self.vision_layernorm(hidden_states))


AutoModel.register(UMTVisionConfig, UMTVisionModel, exist_ok=True)

__all__ = ["UMTVisionModel"]
