"""Configuration of LongVU (arXiv 2410.17434)."""

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
DINO_DEFAULTS = {
    "model_type": "dinov2",
    "hidden_size": 1536,
    "num_hidden_layers": 40,
    "num_attention_heads": 24,
    "image_size": 518,
    "patch_size": 14,
    "use_swiglu_ffn": True,
}
TEXT_DEFAULTS = {
    "model_type": "qwen2",
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
}

CHOICES = {
    "dino_position_interpolation": ("scale_factor", "size"),
    "temporal_reduction": ("original", "paper"),
    "stc_anchor": ("first", "middle", "most_changed"),
    "frame_pos_rule": ("original", "paper"),
}
ORIGINAL_BEHAVIOURS = (
    "batch_decision_from_first",
    "forced_removal",
    "truncate_on_overflow",
    "budget_without_newlines",
    "full_grid_beyond_limit",
    "fixed_reserve",
    "count_to_pad_id",
)


def _build_sub_config(value: dict | PreTrainedConfig | None, defaults: dict) -> PreTrainedConfig:
    if isinstance(value, PreTrainedConfig):
        return value
    value = dict(value or defaults)
    return CONFIG_MAPPING[value.pop("model_type", defaults["model_type"])](**value)


def _is_square(number: int) -> bool:
    return number > 0 and round(number**0.5) ** 2 == number


@strict
class LongVUConfig(PreTrainedConfig):
    """Configuration of a LongVU model; defaults are the Qwen2-7B video model.

    Args:
        vision_config: first tower, SigLIP; its features before the last norm are used.
        dino_config: second tower, DINOv2; it also decides which frames are kept.
        text_config: decoder, Qwen2 or Llama in the releases.
        image_token_id: placeholder of an image, one per image. It may lie beyond the embedding table: placeholders
            are never looked up.
        video_token_id: placeholder of a video, one per video.
        vision_hidden_size: width of the connector.
        vision_grid_size: side of the grid to which the features of both towers are resampled.
        num_query_group: groups of queries; 1 in every release and the only number that is supported.
        image_token_len: queries per frame, a square number; 144 for video, 576 for image checkpoints.
        connector_depth: layers of the vision token sampler.
        connector_num_heads: attention heads of the vision token sampler.
        dino_position_interpolation: how DINOv2's position table is resized: "scale_factor", by (side + 0.1) / stored
            side as in the transformers that the releases were trained with, or "size", to the exact side.
        vision_chunk_size: frames per tower call; bounds memory, does not change results.
        temporal_reduction: "original" (windows of 16, own frame in the mean, middle frame kept, only where a video
            does not fit) or "paper" (windows of 8, the other frames only, always).
        temporal_window: frames per window of temporal reduction; None for the rule's own.
        dino_threshold: a frame is kept when its mean similarity within its window is below.
        max_kept_frames: frames that temporal reduction keeps at most; more are thinned out evenly.
        highres: whether frames may come at two resolutions (video checkpoints) or not (image checkpoints).
        lowres_token: side of the low-resolution grid.
        drop_threshold: spatial token compression drops tokens whose cosine to the anchor frame's is not below.
        stc_window: frames per window of spatial token compression.
        stc_anchor: frame of a window that keeps all its tokens: "first", "middle" or "most_changed".
        frame_pos: whether a frame position encoding is added to visual tokens.
        frame_pos_rule: "original" (odd columns hold the cosine of the sine) or "paper" (the cosine).
        context_length: positions that visual, text and new tokens may take together.
        inference_max_length: positions reserved for new tokens when nothing else is said.
        query_without_answer: whether labelled tokens are left out of the query that chooses frames; otherwise a query
            of training holds the answer, as in the original.
        image_newline: whether a learned token ends each row of a grid.
        low_grid_images: whether images come at low resolution where `highres` is set, as in the releases.
        original_behaviour: turns on every behaviour of the original code below that is None. Together they reproduce
            its outputs; without them every sample is decided for itself and the context length is never exceeded.
        batch_decision_from_first: the first sample's frames and text choose the grids of the whole batch.
        forced_removal: windows that are still too long after compression lose their last tokens; otherwise the
            tokens most similar to the anchor frame's go first.
        truncate_on_overflow: a sequence is cut to `context_length` from the end, the question too; otherwise an error
            tells when the text alone is too long.
        budget_without_newlines: limits on frames count uncropped grid tokens only, without newline tokens.
        full_grid_beyond_limit: videos that do not even fit at low resolution are compressed from the full grid;
            otherwise from the low grid.
        fixed_reserve: `inference_max_length` positions are reserved, whatever number of new tokens is asked for.
        count_to_pad_id: the length of the text that temporal reduction counts with ends at the first padding token of
            the releases (151643 for Qwen2, 128002 for Llama), and right padding by other ids counts.
        tie_word_embeddings: whether the output head is the input embedding.
        initializer_range: standard deviation of new weights.

    Raises:
        ValueError: settings that do not fit each other.

    Source: LongVU, Sec. 3; `cambrian_arch.py` and the training scripts of Vision-CAIR/LongVU.
    """

    model_type = "longvu"
    sub_configs = {"text_config": AutoConfig, "vision_config": AutoConfig, "dino_config": AutoConfig}
    attribute_map = {"image_token_index": "image_token_id", "video_token_index": "video_token_id"}
    keys_to_ignore_at_inference = ["past_key_values", "attention_mask", "labels", "video_selections"]

    vision_config: dict | PreTrainedConfig | None = None
    dino_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    image_token_id: int = 151646
    video_token_id: int = 151647
    vision_hidden_size: int = 1024
    vision_grid_size: int = 24
    num_query_group: int = 1
    image_token_len: int = 144
    connector_depth: int = 3
    connector_num_heads: int = 16
    dino_position_interpolation: str = "scale_factor"
    vision_chunk_size: int = 64
    temporal_reduction: str = "original"
    temporal_window: int | None = None
    dino_threshold: float | int = 0.83
    max_kept_frames: int = 400
    highres: bool = True
    lowres_token: int = 8
    drop_threshold: float | int = 0.8
    stc_window: int = 8
    stc_anchor: str = "first"
    frame_pos: bool = False
    frame_pos_rule: str = "original"
    context_length: int = 8192
    inference_max_length: int = 16
    query_without_answer: bool = False
    image_newline: bool = True
    low_grid_images: bool = True
    original_behaviour: bool = False
    batch_decision_from_first: bool | None = None
    forced_removal: bool | None = None
    truncate_on_overflow: bool | None = None
    budget_without_newlines: bool | None = None
    full_grid_beyond_limit: bool | None = None
    fixed_reserve: bool | None = None
    count_to_pad_id: bool | None = None
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        self.vision_config = _build_sub_config(self.vision_config, SIGLIP_DEFAULTS)
        self.dino_config = _build_sub_config(self.dino_config, DINO_DEFAULTS)
        self.text_config = _build_sub_config(self.text_config, TEXT_DEFAULTS)
        # Weights that no forward pass uses are not built.
        self.vision_config.vision_use_head = False
        self.dino_config.use_mask_token = False
        # Only the top-level flag decides about tying.
        if getattr(self.text_config, "tie_word_embeddings", False):
            self.tie_word_embeddings = True
        self._check()
        super().__post_init__(**kwargs)

    def _check(self) -> None:
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; choose one of {allowed}.")
        counts = ("vision_grid_size", "connector_depth", "vision_chunk_size", "max_kept_frames", "lowres_token")
        for name in (*counts, "stc_window", "context_length", "temporal_window"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if not 0 <= self.inference_max_length < self.context_length:
            raise ValueError(
                f"inference_max_length must lie between 0 and context_length {self.context_length}, got "
                f"{self.inference_max_length}."
            )
        if self.num_query_group != 1:
            raise ValueError(f"num_query_group is {self.num_query_group}; LongVU has one group of queries.")
        if not _is_square(self.image_token_len) or self.vision_grid_size % self.grid_size:
            raise ValueError(
                f"image_token_len must be the square of a side that divides vision_grid_size "
                f"{self.vision_grid_size}, got {self.image_token_len}. Video checkpoints have 144, image checkpoints "
                "576 on a grid of 24."
            )
        if self.highres and self.lowres_token > self.grid_size:
            raise ValueError(
                f"lowres_token {self.lowres_token} is larger than the side {self.grid_size} of the full grid."
            )
        if self.vision_hidden_size % self.connector_num_heads:
            raise ValueError(
                f"vision_hidden_size {self.vision_hidden_size} is not a multiple of connector_num_heads "
                f"{self.connector_num_heads}."
            )

    @property
    def grid_size(self) -> int:
        """Side of a frame's full grid in the decoder."""
        return round(self.image_token_len**0.5)

    def behaves(self, name: str) -> bool:
        """Says whether a behaviour of the original code is on, by itself or by `original_behaviour`.

        Args:
            name: one of `ORIGINAL_BEHAVIOURS`.

        Returns:
            The field of that name, or `original_behaviour` where it is None.
        """
        own = getattr(self, name)
        return self.original_behaviour if own is None else own


AutoConfig.register("longvu", LongVUConfig, exist_ok=True)

__all__ = ["LongVUConfig"]
