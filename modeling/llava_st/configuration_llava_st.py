"""Configuration of LLaVA-ST (arXiv 2501.08282)."""

from huggingface_hub.dataclasses import strict
from transformers import CONFIG_MAPPING, AutoConfig
from transformers.configuration_utils import PreTrainedConfig

SIGLIP_DEFAULTS = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 26,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
}
TEXT_DEFAULTS = {
    "model_type": "qwen2",
    "vocab_size": 151960,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
}
CHOICES = {
    "coordinate_layout": ("folded", "split"),
    "packer_query": ("center", "average"),
    "sample_loss": ("token_mean", "sample_sum"),
}
COUNTS = ("num_frames", "packer_hidden_size", "packer_num_heads", "spatial_factor", "temporal_factor")
AXES = ("temporal", "height", "width")


def _build_sub_config(value: dict | PreTrainedConfig | None, defaults: dict) -> PreTrainedConfig:
    if isinstance(value, PreTrainedConfig):
        return value
    value = dict(value or defaults)
    return CONFIG_MAPPING[value.pop("model_type", defaults["model_type"])](**value)


@strict
class LlavaSTConfig(PreTrainedConfig):
    """Configuration of a LLaVA-ST model; defaults are the Qwen2-7B model with its coordinate tables folded.

    Args:
        vision_config: tower, SigLIP; it has the layers that are used (all but the last of the published tower), and
            the output of its last layer before any norm is used.
        text_config: decoder, Qwen2 in the release.
        image_start_token_id: first position of an image's block.
        image_end_token_id: last position of an image's block.
        image_token_id: positions between; `<im_patch>`.
        video_start_token_id: first position of a video's fast block.
        video_end_token_id: last position of a video's fast block.
        video_token_id: positions between, in the fast and in the slow block; `<vid_patch>`.
        slow_video_start_token_id: first position of a video's slow block, right after the fast one.
        slow_video_end_token_id: last position of a video's slow block.
        temporal_input_token_id: template of a time in a question; its value comes as `coordinate_values`.
        temporal_output_token_id: template of a time in an answer that is taught.
        height_input_token_id: template of a height in a question.
        height_output_token_id: template of a height in an answer.
        width_input_token_id: template of a width in a question.
        width_output_token_id: template of a width in an answer.
        coordinate_token_start: id of the first time token; times, heights and widths follow each other from there.
        coordinate_layout: "folded", rows of coordinates are ordinary rows of embedding and head, or "split", as in the
            release: embedding and head end before `coordinate_token_start`, and six tables lie beside them.
        num_temporal_tokens: times in the vocabulary; 0, together with `num_spatial_tokens`, for a model without
            coordinates (stage 1).
        num_spatial_tokens: heights, and as many widths, in the vocabulary.
        num_frames: frames of every video, a multiple of `temporal_factor`.
        packer_hidden_size: width of attention in the packers.
        packer_num_heads: heads of attention in the packers.
        spatial_factor: side of the square of patches that becomes one token, in the spatial and in the fast packer.
        temporal_factor: frames that become one in the slow packer.
        packer_query: "center" (the middle element, as released) or "average" (the mean, as in the paper).
        use_packer: False (ablation) takes means of regions in place of the packers.
        use_lape: whether coordinate tables are added to visual features (language-aligned positional embedding).
        lape_interpolate_frames: whether the time table is resized where it has other than `num_frames` entries;
            False, as released, raises.
        image_lape_frame: entry of the time table that images get.
        use_ntp: whether gradients of a coordinate's row reach its neighbours (neighbouring token propagation).
        splice_fast_stream: whether the decoder sees the fast stream. False, as released: the positions of the fast
            block keep their token embeddings. Converted weights need False, for their fast packer is untrained.
        inject_width_inputs: whether widths in questions are injected; False, as released: they keep the template's
            row.
        use_downsample_image: whether images pass the spatial and the slow packer too.
        soft_coordinate_targets: whether a label at an output template becomes a target over the two nearest tokens;
            False: the nearest token.
        sample_loss: "token_mean" over all taught tokens of the batch, or "sample_sum", as released: a mean per sample,
            summed over samples.
        vision_chunk_size: frames per tower call; bounds memory, does not change results.
        projector_hidden_act: activation of the projector.
        tie_word_embeddings: whether the output head is the input embedding, coordinates included.
        initializer_range: standard deviation of new weights.

    Raises:
        ValueError: settings that do not fit each other.

    Source: LLaVA-ST, Sec. 3; `llava_arch.py`, `token_packer.py` and the training scripts of appletea233/LLaVA-ST.
    """

    model_type = "llava_st"
    sub_configs = {"text_config": AutoConfig, "vision_config": AutoConfig}
    attribute_map = {"image_token_index": "image_token_id", "video_token_index": "video_token_id"}
    keys_to_ignore_at_inference = ["past_key_values"]

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    image_start_token_id: int = 151646
    image_end_token_id: int = 151647
    image_token_id: int = 151648
    video_start_token_id: int = 151649
    video_end_token_id: int = 151650
    video_token_id: int = 151651
    slow_video_start_token_id: int = 151652
    slow_video_end_token_id: int = 151653
    temporal_input_token_id: int = 151654
    temporal_output_token_id: int = 151655
    height_input_token_id: int = 151656
    height_output_token_id: int = 151657
    width_input_token_id: int = 151658
    width_output_token_id: int = 151659
    coordinate_token_start: int = 151660
    coordinate_layout: str = "folded"
    num_temporal_tokens: int = 100
    num_spatial_tokens: int = 100
    num_frames: int = 100
    packer_hidden_size: int = 1024
    packer_num_heads: int = 8
    spatial_factor: int = 3
    temporal_factor: int = 5
    packer_query: str = "center"
    use_packer: bool = True
    use_lape: bool = True
    lape_interpolate_frames: bool = True
    image_lape_frame: int = 0
    use_ntp: bool = True
    splice_fast_stream: bool = True
    inject_width_inputs: bool = True
    use_downsample_image: bool = False
    soft_coordinate_targets: bool = True
    sample_loss: str = "token_mean"
    vision_chunk_size: int = 32
    projector_hidden_act: str = "gelu"
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        self.vision_config = _build_sub_config(self.vision_config, SIGLIP_DEFAULTS)
        self.text_config = _build_sub_config(self.text_config, TEXT_DEFAULTS)
        # Weights that no forward pass uses are not built.
        self.vision_config.vision_use_head = False
        # Only the top-level flag decides about tying.
        if getattr(self.text_config, "tie_word_embeddings", False):
            self.tie_word_embeddings = True
        self._check()
        self.check_tables()
        super().__post_init__(**kwargs)

    def _check(self) -> None:
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; choose one of {allowed}.")
        for name in (*COUNTS, "vision_chunk_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.num_frames % self.temporal_factor:
            raise ValueError(
                f"num_frames {self.num_frames} is not a multiple of temporal_factor {self.temporal_factor}, the "
                "frames that become one."
            )
        if self.grid_size % self.spatial_factor**2:
            raise ValueError(
                f"The tower's grid of {self.grid_size} x {self.grid_size} patches cannot be divided twice by "
                f"spatial_factor {self.spatial_factor}. Choose image_size, patch_size and spatial_factor that fit."
            )
        for name in ("num_image_positions", "num_fast_positions", "num_slow_positions"):
            if getattr(self, name) < 2:
                raise ValueError(f"{name} is {getattr(self, name)}; a block has a start and an end, so at least 2.")
        if self.packer_hidden_size % self.packer_num_heads:
            raise ValueError(
                f"packer_hidden_size {self.packer_hidden_size} is not a multiple of packer_num_heads "
                f"{self.packer_num_heads}."
            )

    def check_tables(self) -> None:
        """Checks that coordinates and vocabulary fit each other.

        Raises:
            ValueError: they do not.
        """
        counts = (self.num_temporal_tokens, self.num_spatial_tokens)
        if min(counts) < 0 or (min(counts) == 0) != (max(counts) == 0):
            raise ValueError(
                f"num_temporal_tokens and num_spatial_tokens are {counts}; both must be positive, or both 0 for a "
                "model without coordinates."
            )
        if not self.num_coordinate_tokens:
            return
        vocab_size, end = self.text_config.vocab_size, self.coordinate_token_start + self.num_coordinate_tokens
        if self.coordinate_layout == "split" and vocab_size != self.coordinate_token_start:
            raise ValueError(
                f"In the split layout the embedding ends where coordinates begin, but text_config.vocab_size is "
                f"{vocab_size} and coordinate_token_start {self.coordinate_token_start}. Use the tokenizer that the "
                'weights were made with, or coordinate_layout="folded".'
            )
        if self.coordinate_layout == "folded" and vocab_size < end:
            raise ValueError(
                f"The coordinates take the ids {self.coordinate_token_start} to {end - 1}, but text_config.vocab_size "
                f"is {vocab_size}. In the folded layout it must be at least {end}."
            )
        if not 0 <= self.image_lape_frame < self.num_temporal_tokens:
            raise ValueError(
                f"image_lape_frame {self.image_lape_frame} is no entry of the {self.num_temporal_tokens} times."
            )
        if self.use_lape and not self.lape_interpolate_frames and self.num_frames != self.num_temporal_tokens:
            raise ValueError(
                f"num_frames {self.num_frames} differs from num_temporal_tokens {self.num_temporal_tokens}. Set "
                "lape_interpolate_frames=True, or use as many frames as there are times."
            )

    @property
    def grid_size(self) -> int:
        """Patches along a side of a frame."""
        return self.vision_config.image_size // self.vision_config.patch_size

    @property
    def num_coordinate_tokens(self) -> int:
        """Ids of all coordinates together."""
        return self.num_temporal_tokens + 2 * self.num_spatial_tokens

    @property
    def coordinate_sizes(self) -> tuple[int, int, int]:
        """Entries of each axis, in the order of their ids."""
        return (self.num_temporal_tokens, self.num_spatial_tokens, self.num_spatial_tokens)

    @property
    def input_template_ids(self) -> tuple[int, ...]:
        """Ids of the templates in questions, per axis."""
        return tuple(getattr(self, f"{axis}_input_token_id") for axis in AXES)

    @property
    def output_template_ids(self) -> tuple[int, ...]:
        """Ids of the templates in answers, per axis."""
        return tuple(getattr(self, f"{axis}_output_token_id") for axis in AXES)

    @property
    def coordinate_starts(self) -> tuple[int, ...]:
        """First id, and column of the logits, of each axis."""
        start, size = self.coordinate_token_start, self.num_temporal_tokens
        return (start, start + size, start + size + self.num_spatial_tokens)

    @property
    def num_logits(self) -> int:
        """Columns of the logits: one per token, coordinates included."""
        if self.coordinate_layout == "split" and self.num_coordinate_tokens:
            return self.coordinate_token_start + self.num_coordinate_tokens
        return self.text_config.vocab_size

    @property
    def num_image_positions(self) -> int:
        """Positions of an image in the decoder."""
        side = self.grid_size // self.spatial_factor if self.use_downsample_image else self.grid_size
        return side**2

    @property
    def num_fast_positions(self) -> int:
        """Positions of a video's fast block."""
        return self.num_frames * (self.grid_size // self.spatial_factor**2) ** 2

    @property
    def num_slow_positions(self) -> int:
        """Positions of a video's slow block."""
        return self.num_frames // self.temporal_factor * (self.grid_size // self.spatial_factor) ** 2


AutoConfig.register("llava_st", LlavaSTConfig, exist_ok=True)

__all__ = ["LlavaSTConfig"]
