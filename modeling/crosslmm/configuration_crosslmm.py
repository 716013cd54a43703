"""Configuration of CrossLMM (arXiv 2505.17020), which has no public code or weights."""

import math
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import CONFIG_MAPPING, AutoConfig
from transformers.configuration_utils import PreTrainedConfig

SIGLIP_DEFAULTS = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
}
TEXT_DEFAULTS = {
    "model_type": "qwen2",
    "vocab_size": 151936,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "tie_word_embeddings": True,
}
CHOICES = {
    "merge_mode": ("average", "bilinear", "bilinear_antialias"),
    "projector_norm": ("pre", "none"),
    "gate_mode": ("attn", "residual"),
    "kv_source": ("projected", "encoder"),
    "v2v_scope": ("video", "frame"),
}


def _build_sub_config(value: dict | PreTrainedConfig | None, defaults: dict) -> PreTrainedConfig:
    if isinstance(value, PreTrainedConfig):
        return value
    value = dict(value or defaults)
    return CONFIG_MAPPING[value.pop("model_type", defaults["model_type"])](**value)


@strict
class CrossLMMConfig(PreTrainedConfig):
    """Configuration of a CrossLMM model; defaults are the 2B model: SigLIP2 so400m at 384 pixels, Qwen2.5-1.5B.

    Args:
        vision_config: tower, SigLIP (fixed-resolution SigLIP2 checkpoints have this class too). Layers behind
            `vision_feature_layer` are not built.
        text_config: decoder of the Llama family (qwen2, qwen3, llama, mistral, ...).
        image_token_id: placeholder of images. It may lie beyond the embedding table: placeholders are never looked up.
        video_token_id: placeholder of videos.
        tokens_per_frame: merged tokens of a frame or an image that the decoder gets, a square number (1, 9, 16).
        merge_mode: "average" (mean of each region), "bilinear" (resizing without antialias, which reads few source
            tokens or a single one) or "bilinear_antialias".
        vision_feature_layer: index into the tower's hidden states, embeddings first: -2 leaves out the last layer.
        projector_norm: "pre" (LayerNorm before the first linear layer) or "none".
        projector_hidden_act: activation of the projector.
        cross_attention_interval: K of the paper: layers i with i % K == 0 get cross-attention; None for no layers.
        cross_attention_layers: zero-based decoder layers with cross-attention; derived from the interval where not
            given, and empty where neither V2V nor T2V is used.
        use_v2v: whether visual rows attend to the original tokens of their own video.
        use_t2v: whether text rows attend to the original tokens of the visuals before them (absent in stage 1).
        gate_mode: "attn" (h + tanh(alpha) * attention, alpha starts at 0) or "residual" (attention + gamma * h, gamma
            starts at 1 and the output projection at 0).
        kv_source: what keys and values come from: "projected" original tokens, or "encoder" (tower output).
        share_kv: whether V2V and T2V of a layer have one key and one value projection.
        v2v_scope: "video" (a visual row sees all frames of its video) or "frame" (only its own).
        init_from_self_attn: whether new cross-attention starts as a copy of the layer's self-attention; needs
            `kv_source="projected"`.
        init_t2v_from_v2v: whether a T2V that is added to a stage-1 model starts as a copy of V2V.
        cross_attention_frame_rope: whether keys are turned by the number of their frame (beyond the paper).
        cross_attention_chunk_size: queries per call of cross-attention; bounds memory, does not change results.
        vision_chunk_size: frames per tower call; bounds memory, does not change results.
        tie_word_embeddings: whether the output head is the input embedding.
        initializer_range: standard deviation of new weights.

    Raises:
        ValueError: settings that do not fit each other.

    Source: CrossLMM, Sec. 3 and 6, Table 2.
    Differs: the paper leaves open most of what the choices are about; README.md of this folder lists it.
    """

    model_type = "crosslmm"
    sub_configs = {"text_config": AutoConfig, "vision_config": AutoConfig}
    attribute_map = {"image_token_index": "image_token_id", "video_token_index": "video_token_id"}
    keys_to_ignore_at_inference = ["past_key_values"]

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    image_token_id: int = 151655
    video_token_id: int = 151656
    tokens_per_frame: int = 9
    merge_mode: str = "average"
    vision_feature_layer: int = -2
    projector_norm: str = "pre"
    projector_hidden_act: str = "gelu"
    cross_attention_interval: int | None = 4
    cross_attention_layers: list[int] | None = None
    use_v2v: bool = True
    use_t2v: bool = True
    gate_mode: str = "attn"
    kv_source: str = "projected"
    share_kv: bool = False
    v2v_scope: str = "video"
    init_from_self_attn: bool = False
    init_t2v_from_v2v: bool = False
    cross_attention_frame_rope: bool = False
    cross_attention_chunk_size: int = 1024
    vision_chunk_size: int = 8
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        self.vision_config = _build_sub_config(self.vision_config, SIGLIP_DEFAULTS)
        self.text_config = _build_sub_config(self.text_config, TEXT_DEFAULTS)
        self._check_tower()
        # Weights that no forward pass uses are not built.
        self.vision_config.vision_use_head = False
        # Only the top-level flag decides about tying.
        if getattr(self.text_config, "tie_word_embeddings", False):
            self.tie_word_embeddings = True
        self._check()
        if self.cross_attention_layers is None:
            self.cross_attention_layers = self._derive_layers()
        self._check_layers()
        super().__post_init__(**kwargs)

    def _check_tower(self) -> None:
        if self.vision_config.model_type != "siglip_vision_model":
            raise ValueError(
                f"vision_config has the model_type {self.vision_config.model_type!r}; CrossLMM takes "
                "'siglip_vision_model'. Fixed-resolution SigLIP2 checkpoints have it; of a whole SigLIP configuration "
                "pass its vision_config."
            )
        depth = self.vision_config.num_hidden_layers
        if not 1 <= self.num_vision_layers <= depth:
            raise ValueError(
                f"vision_feature_layer {self.vision_feature_layer} is no output of a tower with {depth} layers; "
                f"choose 1 to {depth}, or {-depth} to -1, where -1 is the last layer's output."
            )

    def _check(self) -> None:
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; choose one of {allowed}.")
        for name in ("tokens_per_frame", "cross_attention_chunk_size", "vision_chunk_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        side, grid = self.merged_grid_size, self.grid_size
        if side**2 != self.tokens_per_frame or side > grid:
            raise ValueError(
                f"tokens_per_frame is {self.tokens_per_frame}; it must be the square of a side from 1 to {grid}, "
                f"because the tower gives {grid} x {grid} tokens per frame. Choose 1, 4, 9, 16, ... up to {grid**2}, "
                "or a tower with more patches."
            )
        if self.init_from_self_attn and self.kv_source != "projected":
            raise ValueError(
                'init_from_self_attn copies projections of the decoder\'s width and needs kv_source="projected", got '
                f"{self.kv_source!r}."
            )

    def _derive_layers(self) -> list[int]:
        """Returns the layers that the interval asks for."""
        interval, depth = self.cross_attention_interval, self.text_config.num_hidden_layers
        if interval is None:
            return []
        if not 1 <= interval <= depth:
            raise ValueError(
                f"cross_attention_interval is {interval}, but the decoder has {depth} layers. Choose 1 to {depth}, or "
                "None for no cross-attention."
            )
        return list(range(0, depth, interval)) if self.use_v2v or self.use_t2v else []

    def _check_layers(self) -> None:
        layers, depth = self.cross_attention_layers, self.text_config.num_hidden_layers
        if sorted(set(layers)) != layers or any(not 0 <= layer < depth for layer in layers):
            raise ValueError(
                f"cross_attention_layers is {layers}; list layers from 0 to {depth - 1} in rising order, each once."
            )
        if layers and not (self.use_v2v or self.use_t2v):
            raise ValueError(
                f"cross_attention_layers is {layers}, but use_v2v and use_t2v are both False. Switch one of them on, "
                "or leave cross_attention_layers out."
            )

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs) -> "CrossLMMConfig":
        """Builds a configuration; settings among `kwargs` are checked, and layers derived from them.

        Args:
            config_dict: fields by name.
            **kwargs: fields that replace those of `config_dict`, and what upstream takes.

        Returns:
            The configuration, with unused `kwargs` where upstream returns them.

        Raises:
            ValueError: settings that do not fit each other.
        """
        names = set(cls.__annotations__) - set(cls.sub_configs)
        own = {name: kwargs.pop(name) for name in sorted(names & set(kwargs))}
        return super().from_dict({**config_dict, **own}, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields; layers that the interval gives anyway are left out, so that it can be overridden."""
        fields = super().to_dict()
        try:
            derived = self._derive_layers()
        except ValueError:
            derived = None
        if fields.get("cross_attention_layers") == derived:
            fields["cross_attention_layers"] = None
        return fields

    @property
    def num_vision_layers(self) -> int:
        """Layers of the tower that run."""
        layer = self.vision_feature_layer
        return layer if layer >= 0 else self.vision_config.num_hidden_layers + 1 + layer

    @property
    def grid_size(self) -> int:
        """Tokens along a side of a frame in the tower."""
        return self.vision_config.image_size // self.vision_config.patch_size

    @property
    def merged_grid_size(self) -> int:
        """Tokens along a side of a frame in the decoder."""
        return math.isqrt(self.tokens_per_frame)


AutoConfig.register("crosslmm", CrossLMMConfig, exist_ok=True)

__all__ = ["CrossLMMConfig"]
