"""Sizes of the published checkpoints, for estimates and for tests that need no download.

Source: model repositories of OpenGVLab (VideoChat-Flash), Vision-CAIR (LongVU) and appletea2333 (LLaVA-ST); tensors
and values as counted in the original classes. LongVU's files hold no towers. CrossLMM and CrossVLLM are not published:
their sizes are those of the papers' parts, tensors and values those of the classes here.
"""

from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedConfig

from longvideo.modeling.crosslmm.configuration_crosslmm import CrossLMMConfig
from longvideo.modeling.crossvllm.configuration_crossvllm import VICUNA_DEFAULTS, CrossVLLMConfig
from longvideo.modeling.llava_st.configuration_llava_st import LlavaSTConfig
from longvideo.modeling.longvu.configuration_longvu import LongVUConfig
from longvideo.modeling.videochat_flash.configuration_videochat_flash import VideoChatFlashConfig

QWEN2_7B: dict[str, Any] = {
    "model_type": "qwen2",
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}
QWEN2_5_1_5B = {
    **QWEN2_7B,
    "vocab_size": 151936,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LLAMA3_2_3B: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 28,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_parameters": LLAMA3_ROPE,
}
LLAMA3_2_1B = {
    **LLAMA3_2_3B,
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "head_dim": 64,
}
# What the releases do, with every behaviour of the original code.
LONGVU_VIDEO = {"original_behaviour": True}
TIED = {"tie_word_embeddings": True}  # as in the base models
LONGVU_IMAGE = {**LONGVU_VIDEO, "image_token_len": 576, "highres": False}
# As released: coordinates in tables of their own, a fast stream and widths in questions that the decoder never sees.
LLAVA_ST = {
    "coordinate_layout": "split",
    "splice_fast_stream": False,
    "inject_width_inputs": False,
    "lape_interpolate_frames": False,
    "sample_loss": "sample_sum",
}
UMT_224 = {"model_type": "umt_vision_model", "image_size": 224}
UMT_448 = {"model_type": "umt_vision_model", "image_size": 448}
INTERNVIDEO2 = {"model_type": "internvideo2_vision_model"}
# SigLIP2 giant, sizes of timm's vit_giantopt_patch16_siglip_384: a grid of 24 x 24 has 16 equal regions.
SIGLIP2_GIANT = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1536,
    "intermediate_size": 6144,
    "num_hidden_layers": 40,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 16,
}


@dataclass(frozen=True)
class Preset:
    """One published size.

    Attributes:
        repositories: Hub repositories of this size, none where it is not published.
        vision: Arguments of the tower's configuration; None for the default of the architecture.
        text: Arguments of the decoder's configuration.
        num_tensors: Tensors of the original checkpoint, or of ours where there is none.
        num_values: Values of the same.
        config_class: Class of the model configuration.
        settings: Further arguments of it.
    """

    repositories: tuple[str, ...]
    vision: dict[str, Any] | None
    text: dict[str, Any]
    num_tensors: int
    num_values: int
    config_class: type[PreTrainedConfig] = VideoChatFlashConfig
    settings: dict[str, Any] = field(default_factory=dict)

    def config(self, **kwargs: Any) -> PreTrainedConfig:
        """Build the model configuration.

        Args:
            **kwargs: Further arguments of the configuration.

        Returns:
            The configuration of this size.
        """
        vision = None if self.vision is None else dict(self.vision)
        return self.config_class(vision_config=vision, text_config=dict(self.text), **{**self.settings, **kwargs})


PRESETS = {
    "videochat_flash-7b-448": Preset(
        ("OpenGVLab/VideoChat-Flash-Qwen2-7B_res448",), UMT_448, QWEN2_7B, 646, 7_922_617_856
    ),
    "videochat_flash-7b-224": Preset(
        ("OpenGVLab/VideoChat-Flash-Qwen2-7B_res224", "OpenGVLab/VideoChat-Flash-Qwen2_5-7B-1M_res224"),
        UMT_224,
        QWEN2_7B,
        646,
        7_922_617_856,
    ),
    "videochat_flash-2b-448": Preset(
        ("OpenGVLab/VideoChat-Flash-Qwen2_5-2B_res448",), UMT_448, QWEN2_5_1_5B, 646, 2_071_502_336
    ),
    "videochat_flash-internvideo2": Preset(
        ("OpenGVLab/VideoChat-Flash-Qwen2_5-7B_InternVideo2-1B",), INTERNVIDEO2, QWEN2_7B, 855, 8_620_852_736
    ),
    "longvu-7b": Preset(
        ("Vision-CAIR/LongVU_Qwen2_7B",), None, QWEN2_7B, 429, 7_671_665_664, LongVUConfig, LONGVU_VIDEO
    ),
    "longvu-7b-img": Preset(
        ("Vision-CAIR/LongVU_Qwen2_7B_img",), None, QWEN2_7B, 423, 7_671_641_088, LongVUConfig, LONGVU_IMAGE
    ),
    "longvu-3b": Preset(
        ("Vision-CAIR/LongVU_Llama3_2_3B",),
        None,
        LLAMA3_2_3B,
        345,
        3_658_867_712,
        LongVUConfig,
        {**LONGVU_VIDEO, **TIED},
    ),
    "longvu-3b-img": Preset(
        ("Vision-CAIR/LongVU_Llama3_2_3B_img",),
        None,
        LLAMA3_2_3B,
        339,
        3_658_843_136,
        LongVUConfig,
        {**LONGVU_IMAGE, **TIED},
    ),
    "longvu-1b": Preset(
        ("Vision-CAIR/LongVU_Llama3_2_1B",),
        None,
        LLAMA3_2_1B,
        237,
        1_544_303_616,
        LongVUConfig,
        {**LONGVU_VIDEO, **TIED},
    ),
    "longvu-1b-img": Preset(
        ("Vision-CAIR/LongVU_Llama3_2_1B_img",),
        None,
        LLAMA3_2_1B,
        231,
        1_544_279_040,
        LongVUConfig,
        {**LONGVU_IMAGE, **TIED},
    ),
    "llava_st-7b": Preset(
        ("appletea2333/LLaVA-ST-Qwen2-7B",),
        None,
        {**QWEN2_7B, "vocab_size": 151660},
        839,
        8_095_709_216,
        LlavaSTConfig,
        LLAVA_ST,
    ),
    "crosslmm-2b": Preset((), None, QWEN2_5_1_5B, 882, 2_022_703_662, CrossLMMConfig, TIED),
    "crosslmm-7b": Preset((), None, QWEN2_7B, 883, 8_441_476_654, CrossLMMConfig),
    "crosslmm-7b-16": Preset(
        (), SIGLIP2_GIANT, QWEN2_7B, 1091, 9_152_103_438, CrossLMMConfig, {"tokens_per_frame": 16}
    ),
    # With the adapters of both granularities; the base alone has 7,071,808,512 values in 672 tensors.
    "crossvllm-7b": Preset((), None, VICUNA_DEFAULTS, 1568, 7_111_785_472, CrossVLLMConfig, {"adapters": True}),
}


def find_preset(name: str) -> Preset | None:
    """Look a size up by its short name or by the name of its repository.

    Args:
        name: Short name, or Hub id of a published checkpoint.

    Returns:
        The preset, or None.
    """
    if name in PRESETS:
        return PRESETS[name]
    return next((preset for preset in PRESETS.values() if name in preset.repositories), None)


@dataclass(frozen=True)
class BenchmarkPreset:
    """How the authors of a model sample frames of a benchmark, and what they set on the model for it.

    Attributes:
        processor_kwargs: Options of the video processor.
        config: Settings of the model's configuration.
        instruction: Text behind question and options.
        max_new_tokens: Length of an answer in tokens, decoded greedily.
    """

    processor_kwargs: dict[str, Any]
    config: dict[str, float]
    instruction: str
    max_new_tokens: int = 5

    def apply(self, config: Any) -> None:
        """Set the thresholds on a configuration.

        Args:
            config: Configuration of the model; changed.

        Raises:
            ValueError: The configuration has no such setting, because it is of another architecture.
        """
        missing = sorted(name for name in self.config if not hasattr(config, name))
        if missing:
            raise ValueError(f"{type(config).__name__} has no {missing}; the preset is for another architecture.")
        for name, value in self.config.items():
            setattr(config, name, value)


LETTER_OF_FOUR = "Respond with only the letter (A, B, C{} or D) of the correct option."
HALF_FPS = {"fps": 0.5, "fps_rule": "rounded_stride"}
# LongVU, evaluation scripts. Thresholds that a script leaves alone are those of the published configurations.
BENCHMARK_PRESETS = {
    "longvu-egoschema": BenchmarkPreset(
        {**HALF_FPS, "thin_above": 1000},
        {"dino_threshold": 0.83, "drop_threshold": 0.8},
        "Respond with only the letter (A, B, C, D or E) of the correct option.",
    ),
    "longvu-mvbench": BenchmarkPreset(
        {"fps": 2.0, "fps_rule": "stride"},
        {"dino_threshold": 0.83, "drop_threshold": 0.8},
        "Answer with the option's letter from the given choices directly and only give the best option.",
    ),
    "longvu-mlvu": BenchmarkPreset(
        {**HALF_FPS, "thin_above": 1000}, {"dino_threshold": 0.82, "drop_threshold": 0.77}, LETTER_OF_FOUR.format("")
    ),
    "longvu-videomme": BenchmarkPreset(
        dict(HALF_FPS), {"dino_threshold": 0.83, "drop_threshold": 0.65}, LETTER_OF_FOUR.format(",")
    ),
}
