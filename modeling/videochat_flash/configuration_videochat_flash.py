"""Configuration of VideoChat-Flash (arXiv 2501.00574)."""

from huggingface_hub.dataclasses import strict
from transformers import CONFIG_MAPPING, AutoConfig
from transformers.configuration_utils import PreTrainedConfig

from longvideo.modeling.encoders.internvideo2.configuration_internvideo2 import InternVideo2VisionConfig
from longvideo.modeling.encoders.umt.configuration_umt import UMTVisionConfig

TOWER_CONFIGS = {config.model_type: config for config in (UMTVisionConfig, InternVideo2VisionConfig)}
COMPRESS_TYPES = ("uniform", "attention", "uniform0_attention", "uniform1_attention")
VISION_ENCODE_TYPES = ("video_image", "image_video")


def _build_sub_config(value: dict | PreTrainedConfig | None, default_type: str) -> PreTrainedConfig:
    if isinstance(value, PreTrainedConfig):
        return value
    value = dict(value or {})
    model_type = value.pop("model_type", default_type)
    if model_type in TOWER_CONFIGS:
        return TOWER_CONFIGS[model_type](**value)
    return CONFIG_MAPPING[model_type](**value)


@strict
class VideoChatFlashConfig(PreTrainedConfig):
    """Configuration of a VideoChat-Flash model; defaults are the 7B model at 224 pixels.

    Args:
        vision_config: video tower: `umt_vision_model`, `internvideo2_vision_model` or `siglip_vision_model`.
        text_config: decoder of the Llama family, Qwen2 in the releases; `rope_parameters` (YaRN too) belong to it.
        image_token_id: placeholder of images. It may lie beyond the embedding table: placeholders are never looked up.
        video_token_id: placeholder of videos.
        mm_local_num_frames: frames of a clip, which the tower sees and merging joins together.
        tokens_per_frame: visual tokens per frame after merging; a clip, and an image tile, give
            `tokens_per_frame * mm_local_num_frames` tokens.
        vision_encode_type: "video_image" lets the frames of a clip attend to each other in the tower, "image_video"
            encodes frame by frame and merges over the clip afterwards.
        vision_chunk_size: clips (or image tiles) per tower call; bounds memory, does not change results.
        projector_hidden_act: activation of the projector.
        mm_llm_compress: whether visual tokens are dropped inside the decoder when a call does not say.
        llm_compress_type: "uniform", "attention", "uniform0_attention" (first stage uniform, then attention) or
            "uniform1_attention" (first two stages uniform).
        llm_compress_layer_list: numbers of executed layers after which tokens are dropped (1-based counts).
        llm_image_token_ratio_list: kept shares of the original visual tokens; the first is the share before the first
            stage, always 1, so that it has one entry more than the layer list.
        tie_word_embeddings: whether the output head is the input embedding.
        initializer_range: standard deviation of new weights.

    Raises:
        ValueError: an unknown compression or encoding type, or lists that do not fit each other.

    Source: VideoChat-Flash, Sec. 3.1 and 3.2; `config.json` of the releases.
    """

    model_type = "videochat_flash"
    sub_configs = {"text_config": AutoConfig, "vision_config": AutoConfig}
    attribute_map = {"image_token_index": "image_token_id", "video_token_index": "video_token_id"}
    keys_to_ignore_at_inference = ["past_key_values"]

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    image_token_id: int = 151646
    video_token_id: int = 151647
    mm_local_num_frames: int = 4
    tokens_per_frame: int = 16
    vision_encode_type: str = "video_image"
    vision_chunk_size: int = 8
    projector_hidden_act: str = "gelu"
    mm_llm_compress: bool = False
    llm_compress_type: str = "attention"
    llm_compress_layer_list: list[int] | None = None
    llm_image_token_ratio_list: list[int | float] | None = None
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        self.vision_config = _build_sub_config(self.vision_config, "umt_vision_model")
        self.text_config = _build_sub_config(self.text_config, "qwen2")
        if self.llm_compress_layer_list is None:
            self.llm_compress_layer_list = [8, 16, 24]
        if self.llm_image_token_ratio_list is None:
            self.llm_image_token_ratio_list = [1.0, 0.5, 0.25, 0.125]
        # Only the top-level flag decides about tying.
        if getattr(self.text_config, "tie_word_embeddings", False):
            self.tie_word_embeddings = True
        self._check()
        super().__post_init__(**kwargs)

    def _check(self) -> None:
        if self.llm_compress_type not in COMPRESS_TYPES:
            raise ValueError(f"llm_compress_type is {self.llm_compress_type!r}; choose one of {COMPRESS_TYPES}.")
        if self.vision_encode_type not in VISION_ENCODE_TYPES:
            raise ValueError(
                f"vision_encode_type is {self.vision_encode_type!r}; choose one of {VISION_ENCODE_TYPES}."
            )
        for name in ("mm_local_num_frames", "tokens_per_frame", "vision_chunk_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")

    @property
    def tokens_per_clip(self) -> int:
        """Visual tokens that a clip or an image tile gives to the decoder."""
        return self.tokens_per_frame * self.mm_local_num_frames


AutoConfig.register("videochat_flash", VideoChatFlashConfig, exist_ok=True)

__all__ = ["VideoChatFlashConfig"]
