"""Configuration of the UMT video encoder."""

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig


@strict
class UMTVisionConfig(PreTrainedConfig):
    """Configuration of a UMT (unmasked teacher) vision transformer; defaults are UMT-L at 224 pixels.

    Args:
        hidden_size: token width.
        intermediate_size: width of the MLP.
        num_hidden_layers: blocks that are built. The release takes the features of the last but one of 24 layers and
            has no weights for the 24th, hence 23.
        num_attention_heads: heads.
        num_channels: colour channels.
        image_size: side of a frame in pixels.
        patch_size: side of a patch in pixels.
        num_frames: frames that attend to each other (a clip).
        position_grid_size: side of the patch grid for which the sine-cosine table is defined; other grids
            are reached by bicubic resizing.
        position_num_frames: frames for which the table is defined; other counts are reached by linear interpolation.
        hidden_act: activation of the MLP.
        layer_norm_eps: epsilon of the norms in the blocks.
        final_layer_norm_eps: epsilon of the norm after the last block.
        attention_dropout: dropout on attention weights in training.
        initializer_range: standard deviation of new weights.

    Source: VideoChat-Flash, `umt_encoder.py`.
    """

    model_type = "umt_vision_model"
    base_config_key = "vision_config"

    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 23
    num_attention_heads: int = 16
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 16
    num_frames: int = 4
    position_grid_size: int = 14
    position_num_frames: int = 4
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6
    final_layer_norm_eps: float = 1e-12
    attention_dropout: float | int = 0.0
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}."
            )
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}.")
        super().__post_init__(**kwargs)


AutoConfig.register(UMTVisionConfig.model_type, UMTVisionConfig, exist_ok=True)

__all__ = ["UMTVisionConfig"]
