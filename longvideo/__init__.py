"""Long-video language models as ordinary Transformers models.

`import longvideo` registers the architectures with the Auto classes and the pipelines of transformers.
"""

import importlib
import os as _os
from typing import Any

_ROOT = _os.path.dirname(_os.path.dirname(_os.path.abspath(__file__)))
if _os.path.isfile(_os.path.join(_ROOT, "pyproject.toml")) and _os.path.isdir(_os.path.join(_ROOT, "modeling")):
    __path__.append(_ROOT)  # a checkout: the sub-packages lie beside this folder

from longvideo._registration import register as _register  # noqa: E402 - needs the path above

__version__ = "0.1.0"

_EXPORTS = {
    "UMTVisionConfig": "longvideo.modeling.encoders.umt.configuration_umt",
    "UMTVisionModel": "longvideo.modeling.encoders.umt.modeling_umt",
    "InternVideo2VisionConfig": "longvideo.modeling.encoders.internvideo2.configuration_internvideo2",
    "InternVideo2VisionModel": "longvideo.modeling.encoders.internvideo2.modeling_internvideo2",
    "VideoChatFlashConfig": "longvideo.modeling.videochat_flash.configuration_videochat_flash",
    "VideoChatFlashModel": "longvideo.modeling.videochat_flash.modeling_videochat_flash",
    "VideoChatFlashForConditionalGeneration": "longvideo.modeling.videochat_flash.modeling_videochat_flash",
    "EncodedVideo": "longvideo.modeling.videochat_flash.encoded_video",
    "VideoChatFlashProcessor": "longvideo.processing.videochat_flash.processing_videochat_flash",
    "VideoChatFlashVideoProcessor": "longvideo.processing.videochat_flash.video_processing_videochat_flash",
    "VideoChatFlashImageProcessor": "longvideo.processing.videochat_flash.image_processing_videochat_flash",
    "LongVUConfig": "longvideo.modeling.longvu.configuration_longvu",
    "LongVUModel": "longvideo.modeling.longvu.modeling_longvu",
    "LongVUForConditionalGeneration": "longvideo.modeling.longvu.modeling_longvu",
    "LongVUEncodedVideo": "longvideo.modeling.longvu.encoded_video_longvu",
    "LongVUProcessor": "longvideo.processing.longvu.processing_longvu",
    "LongVUVideoProcessor": "longvideo.processing.longvu.video_processing_longvu",
    "LongVUImageProcessor": "longvideo.processing.longvu.image_processing_longvu",
    "LlavaSTConfig": "longvideo.modeling.llava_st.configuration_llava_st",
    "LlavaSTModel": "longvideo.modeling.llava_st.modeling_llava_st",
    "LlavaSTForConditionalGeneration": "longvideo.modeling.llava_st.modeling_llava_st",
    "LlavaSTEncodedVideo": "longvideo.modeling.llava_st.encoded_video_llava_st",
    "LlavaSTProcessor": "longvideo.processing.llava_st.processing_llava_st",
    "LlavaSTVideoProcessor": "longvideo.processing.llava_st.video_processing_llava_st",
    "LlavaSTImageProcessor": "longvideo.processing.llava_st.image_processing_llava_st",
    "CrossLMMConfig": "longvideo.modeling.crosslmm.configuration_crosslmm",
    "CrossLMMModel": "longvideo.modeling.crosslmm.modeling_crosslmm",
    "CrossLMMForConditionalGeneration": "longvideo.modeling.crosslmm.modeling_crosslmm",
    "CrossLMMEncodedVideo": "longvideo.modeling.crosslmm.encoded_video_crosslmm",
    "CrossLMMProcessor": "longvideo.processing.crosslmm.processing_crosslmm",
    "CrossLMMVideoProcessor": "longvideo.processing.crosslmm.video_processing_crosslmm",
    "CrossLMMImageProcessor": "longvideo.processing.crosslmm.image_processing_crosslmm",
    "CrossVLLMConfig": "longvideo.modeling.crossvllm.configuration_crossvllm",
    "CrossVLLMModel": "longvideo.modeling.crossvllm.modeling_crossvllm",
    "CrossVLLMForConditionalGeneration": "longvideo.modeling.crossvllm.modeling_crossvllm",
    "CrossVLLMEncodedVideo": "longvideo.modeling.crossvllm.encoded_video_crossvllm",
    "FrameFeatureCache": "longvideo.modeling.crossvllm.frame_cache_crossvllm",
    "CrossVLLMProcessor": "longvideo.processing.crossvllm.processing_crossvllm",
    "CrossVLLMVideoProcessor": "longvideo.processing.crossvllm.video_processing_crossvllm",
    "VideoQuestionAnsweringPipeline": "longvideo.pipelines",
    "CrossGranularityConfig": "longvideo.trainers.cross_granularity_config",
    "CrossGranularityTrainer": "longvideo.trainers.cross_granularity_trainer",
    "VideoDPOConfig": "longvideo.trainers.dpo_config",
    "VideoDPOTrainer": "longvideo.trainers.dpo_trainer",
    "VideoSFTCollator": "longvideo.trainers.collators",
    "VideoSFTConfig": "longvideo.trainers.sft_config",
    "VideoSFTTrainer": "longvideo.trainers.sft_trainer",
    "load_video_rows": "longvideo.trainers.data.loading",
}

__all__ = ["__version__", "tiny_checkpoint", *_EXPORTS]


def tiny_checkpoint(model_type: str) -> str:
    """Returns the folder of the small trained checkpoint that comes with the package.

    Args:
        model_type: architecture, e.g. "videochat_flash".

    Returns:
        A path for `from_pretrained`.

    Raises:
        ValueError: there is none for that architecture.
    """
    home = _os.path.join(_os.path.dirname(_os.path.abspath(__file__)), "tiny")
    folder = _os.path.join(home, model_type)
    if not _os.path.isfile(_os.path.join(folder, "config.json")):
        known = sorted(_os.listdir(home)) if _os.path.isdir(home) else []
        raise ValueError(f"No tiny checkpoint for {model_type!r}; there is one for: {', '.join(known) or 'none'}.")
    return folder


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'longvideo' has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))


_register()
