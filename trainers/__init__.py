"""Training on video: `VideoSFTTrainer`, its arguments and its collator."""

from longvideo.trainers.adapters import check_adapter, load_adapter, lora_config
from longvideo.trainers.collators import IGNORE_INDEX, VideoSFTCollator, check_batch, normalize_messages
from longvideo.trainers.liger import apply_liger
from longvideo.trainers.recipe import find_stage, load_recipe, recipe_names
from longvideo.trainers.scale import accelerate_config, consolidate_checkpoint
from longvideo.trainers.sft_config import VideoSFTConfig, part_of
from longvideo.trainers.sft_trainer import VideoSFTTrainer, find_last_checkpoint, set_trainable_parts

__all__ = [
    "IGNORE_INDEX",
    "VideoSFTCollator",
    "VideoSFTConfig",
    "VideoSFTTrainer",
    "accelerate_config",
    "apply_liger",
    "check_adapter",
    "check_batch",
    "consolidate_checkpoint",
    "find_last_checkpoint",
    "find_stage",
    "load_adapter",
    "load_recipe",
    "lora_config",
    "normalize_messages",
    "part_of",
    "recipe_names",
    "set_trainable_parts",
]
