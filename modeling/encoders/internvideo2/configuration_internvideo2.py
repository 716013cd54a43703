"""Configuration of the InternVideo2 video encoder."""

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig


@strict
class InternVideo2VisionConfig(PreTrainedConfig):
    """Configuration of an InternVideo2 vision transformer; defaults are the 1B model at 224 pixels.

    Args:
        hidden_size: token width.
        intermediate_size: width of the MLP, int(hidden_size * 48 / 11) in the release.
        num_hidden_layers: blocks that are built (39 of a nominal 40, see `UMTVisionConfig.num_hidden_layers`).
        num_attention_heads: heads.
        num_channels: colour channels.
        image_size: side of a frame in pixels.
        patch_size: side of a patch in pixels.
        num_frames: frames that attend to each other (a clip); the learned table has this many.
        hidden_act: activation of the MLP.
        rms_norm_eps: epsilon of all norms.
        layer_scale_init_value: start value of the layer scales.
        drop_path_rate: stochastic depth of the last block in training; it grows linearly from 0.
        attention_dropout: dropout on attention weights in training.
        initializer_range: standard deviation of new weights.

    Source: VideoChat-Flash, `internvideo2_encoder.py`.
    """

    model_type = "internvideo2_vision_model"
    base_config_key = "vision_config"

    hidden_size: int = 1408
    intermediate_size: int = 6144
    num_hidden_layers: int = 39
    num_attention_heads: int = 16
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 14
    num_frames: int = 4
    hidden_act: str = "gelu"
    rms_norm_eps: float = 1e-6
    layer_scale_init_value: float = 1e-5
    drop_path_rate: float | int = 0.25
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


AutoConfig.register(InternVideo2VisionConfig.model_type, InternVideo2VisionConfig, exist_ok=True)

__all__ = ["InternVideo2VisionConfig"]
