"""Configuration of CrossVLLM, which has no public code or weights; its backbone is LLaVA-NeXT-Video."""

import copy
import math

from huggingface_hub.dataclasses import strict
from transformers import CONFIG_MAPPING, AutoConfig, LlavaNextVideoConfig
from transformers.configuration_utils import PreTrainedConfig

GRANULARITIES = ("coarse", "fine")
CLIP_DEFAULTS = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
VICUNA_DEFAULTS = {
    "model_type": "llama",
    "vocab_size": 32064,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# What a LLaVA-NeXT-Video configuration says under the same name.
BACKBONE_FIELDS = (
    "image_token_id",
    "video_token_id",
    "projector_hidden_act",
    "multimodal_projector_bias",
    "vision_feature_layer",
    "spatial_pool_mode",
)


def _build_sub_config(value: dict | PreTrainedConfig | None, defaults: dict) -> PreTrainedConfig:
    if isinstance(value, PreTrainedConfig):
        return value
    value = dict(value or defaults)
    return CONFIG_MAPPING[value.pop("model_type", defaults["model_type"])](**value)


def stretch_rope(text_config: PreTrainedConfig, factor: float) -> PreTrainedConfig:
    """Gives a decoder's configuration linear RoPE scaling, and as many more positions.

    Args:
        text_config: decoder whose positions are not scaled yet; one that scales them is returned as it is.
        factor: positions are divided by it.

    Returns:
        A copy, or the same configuration where nothing is to be done.

    Raises:
        ValueError: the decoder has several kinds of positions.

    Source: CrossVLLM, App. A.1 and Table 4 (linear scale factor 2).
    """
    rope = getattr(text_config, "rope_parameters", None)
    if factor == 1 or (isinstance(rope, dict) and rope.get("rope_type", "default") != "default"):
        return text_config
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise ValueError(
            f"rope_factor is {factor}, but the decoder {text_config.model_type!r} has no single kind of rotary "
            "positions to scale. Pass rope_factor=1, or a decoder of the Llama family."
        )
    stretched = copy.deepcopy(text_config)
    stretched.rope_parameters = {**rope, "rope_type": "linear", "factor": float(factor)}
    stretched.max_position_embeddings = int(text_config.max_position_embeddings * factor)
    return stretched


@strict
class CrossVLLMConfig(PreTrainedConfig):
    """Configuration of a CrossVLLM model; defaults are LLaVA-NeXT-Video-7B: CLIP ViT-L/14 336, Vicuna-7B v1.5.

    Args:
        vision_config: tower, CLIP. Layers behind `vision_feature_layer` are not built.
        text_config: decoder of the Llama family.
        image_token_id: placeholder of images. It may lie beyond the embedding table: placeholders are never looked up.
        video_token_id: placeholder of videos.
        projector_hidden_act: activation of the projectors.
        multimodal_projector_bias: whether the projectors' linear layers have biases.
        vision_feature_layer: index into the tower's hidden states, embeddings first: -2 leaves out the last layer.
        spatial_pool_mode: "average" or "max": how patches of a frame are pooled.
        coarse_stride: patches along a side that become one coarse token; on 24 x 24 patches 6 gives 16 tokens.
        fine_stride: the same for fine tokens; on 24 x 24 patches 2 gives 144 tokens.
        coarse_num_frames: N of the paper, frames of the whole video at inference.
        fine_num_frames: N' of the paper, frames of a segment at inference.
        coarse_training_frames: N in training.
        fine_training_frames: N' in training.
        default_granularity: granularity of a model that was told none, "coarse" or "fine".
        rope_factor: linear scaling of positions, for a decoder that has no scaling yet; 1 for none.
        adapters: whether the checkpoint has a LoRA adapter per granularity, `adapters/coarse` and `adapters/fine`.
        lora_r: rank of new adapters.
        lora_alpha: alpha of new adapters.
        lora_dropout: share of inputs that new adapters drop in training.
        base_model_name_or_path: folder or Hub id of the backbone (or of a CrossVLLM) that holds the base weights, for
            a checkpoint of adapters and projectors only; None where the checkpoint holds all weights.
        vision_chunk_size: frames per tower call; bounds memory, does not change results.
        tie_word_embeddings: whether the output head is the input embedding.
        initializer_range: standard deviation of new weights.

    Raises:
        ValueError: settings that do not fit each other.

    Source: CrossVLLM, Sec. 3.1, App. A.1, Tables 4 and 5.
    Differs: rank, alpha and targets of LoRA are not given in the paper; README.md of this folder lists such decisions.
    """

    model_type = "crossvllm"
    sub_configs = {"text_config": AutoConfig, "vision_config": AutoConfig}
    attribute_map = {"image_token_index": "image_token_id", "video_token_index": "video_token_id"}
    keys_to_ignore_at_inference = ["past_key_values"]

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    image_token_id: int = 32001
    video_token_id: int = 32000
    projector_hidden_act: str = "gelu"
    multimodal_projector_bias: bool = True
    vision_feature_layer: int = -2
    spatial_pool_mode: str = "average"
    coarse_stride: int = 6
    fine_stride: int = 2
    coarse_num_frames: int = 288
    fine_num_frames: int = 32
    coarse_training_frames: int = 144
    fine_training_frames: int = 16
    default_granularity: str = "coarse"
    rope_factor: float | int = 2.0
    adapters: bool = False
    lora_r: int = 8
    lora_alpha: int = 32
    lora_dropout: float = 0.05
    base_model_name_or_path: str | None = None
    vision_chunk_size: int = 8
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        self.vision_config = _build_sub_config(self.vision_config, CLIP_DEFAULTS)
        self.text_config = _build_sub_config(self.text_config, VICUNA_DEFAULTS)
        self._check_tower()
        self._check()
        self.text_config = stretch_rope(self.text_config, self.rope_factor)
        # Only the top-level flag decides about tying.
        if getattr(self.text_config, "tie_word_embeddings", False):
            self.tie_word_embeddings = True
        super().__post_init__(**kwargs)

    def _check_tower(self) -> None:
        if self.vision_config.model_type != "clip_vision_model":
            raise ValueError(
                f"vision_config has the model_type {self.vision_config.model_type!r}; CrossVLLM takes "
                "'clip_vision_model'. Of a whole CLIP configuration pass its vision_config."
            )
        depth = self.vision_config.num_hidden_layers
        if not 1 <= self.num_vision_layers <= depth:
            raise ValueError(
                f"vision_feature_layer {self.vision_feature_layer} is no output of a tower with {depth} layers; "
                f"choose 1 to {depth}, or {-depth} to -1, where -1 is the last layer's output."
            )

    def _check(self) -> None:
        if self.spatial_pool_mode not in ("average", "max"):
            raise ValueError(
                f"spatial_pool_mode is {self.spatial_pool_mode!r}; choose 'average' or 'max'. A pooling with weights "
                "('conv') belongs to one stride and cannot be switched."
            )
        for granularity in GRANULARITIES:
            self.tokens_per_side(granularity)
        self.check_granularity(self.default_granularity)
        positive = [f"{name}_{what}" for name in GRANULARITIES for what in ("num_frames", "training_frames")]
        for name in (*positive, "lora_r", "vision_chunk_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.rope_factor < 1:
            raise ValueError(f"rope_factor is {self.rope_factor}; choose at least 1, where 1 leaves positions alone.")

    @classmethod
    def from_backbone_config(cls, backbone_config: LlavaNextVideoConfig, **kwargs) -> "CrossVLLMConfig":
        """Builds a configuration around that of a LLaVA-NeXT-Video model.

        Args:
            backbone_config: configuration with the model_type "llava_next_video".
            **kwargs: fields of this class, which win.

        Returns:
            The configuration.

        Raises:
            ValueError: another model_type, or settings that CrossVLLM does not have.
        """
        if backbone_config.model_type != "llava_next_video":
            raise ValueError(
                f"The backbone has the model_type {backbone_config.model_type!r}; CrossVLLM takes 'llava_next_video'."
            )
        if backbone_config.vision_feature_select_strategy != "default":
            raise ValueError(
                f"The backbone keeps the class token (vision_feature_select_strategy="
                f"{backbone_config.vision_feature_select_strategy!r}); pooling takes patches only: 'default'."
            )
        fields = {name: getattr(backbone_config, name) for name in BACKBONE_FIELDS}
        for name in ("vision_config", "text_config", "tie_word_embeddings"):
            fields[name] = copy.deepcopy(getattr(backbone_config, name))
        return cls(**{**fields, **kwargs})

    def check_granularity(self, granularity: str) -> str:
        """Returns the name of a granularity; another name is a `ValueError`."""
        if granularity not in GRANULARITIES:
            raise ValueError(f"granularity is {granularity!r}; choose one of {GRANULARITIES}.")
        return granularity

    def stride(self, granularity: str) -> int:
        """Returns how many patches along a side become one token."""
        return getattr(self, f"{self.check_granularity(granularity)}_stride")

    def tokens_per_side(self, granularity: str) -> int:
        """Returns the tokens along a side of a frame; a stride that does not divide the patches is a `ValueError`."""
        stride, grid = self.stride(granularity), self.grid_size
        if stride < 1 or grid % stride:
            allowed = [n for n in range(1, grid + 1) if grid % n == 0]
            raise ValueError(
                f"{granularity}_stride is {stride}, but a frame has {grid} x {grid} patches, of which it would lose "
                f"some. Choose one of {allowed}."
            )
        return grid // stride

    def tokens_per_frame(self, granularity: str) -> int:
        """Returns the visual tokens of a frame in the decoder, which is its number of placeholders."""
        return self.tokens_per_side(granularity) ** 2

    def num_frames(self, granularity: str, *, training: bool = False) -> int:
        """Returns the most frames that are sampled of a video or a segment (N and N' of the paper)."""
        return getattr(self, f"{self.check_granularity(granularity)}_{'training' if training else 'num'}_frames")

    @property
    def num_vision_layers(self) -> int:
        """Layers of the tower that run."""
        layer = self.vision_feature_layer
        return layer if layer >= 0 else self.vision_config.num_hidden_layers + 1 + layer

    @property
    def grid_size(self) -> int:
        """Patches along a side of a frame."""
        return self.vision_config.image_size // self.vision_config.patch_size

    @property
    def tokens_per_image(self) -> int:
        """Visual tokens of an image in the decoder: images are not pooled."""
        return self.grid_size**2

    @property
    def shared_stride(self) -> int:
        """Stride up to which both granularities pool alike; features are kept pooled so far."""
        return math.gcd(self.coarse_stride, self.fine_stride)


AutoConfig.register("crossvllm", CrossVLLMConfig, exist_ok=True)

__all__ = ["GRANULARITIES", "CrossVLLMConfig"]
