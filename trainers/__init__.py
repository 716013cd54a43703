"""Training on video: `VideoSFTTrainer`, `VideoDPOTrainer`, `CrossGranularityTrainer`, and what they need."""

from longvideo.trainers.adapters import check_adapter, load_adapter, lora_config
from longvideo.trainers.checkpoints import find_last_checkpoint
from longvideo.trainers.collators import IGNORE_INDEX, VideoSFTCollator, check_batch, normalize_messages
from longvideo.trainers.cross_granularity_config import CrossGranularityConfig
from longvideo.trainers.cross_granularity_rows import coarse_grounding_row, fine_answer_row
from longvideo.trainers.cross_granularity_trainer import CrossGranularityTrainer
from longvideo.trainers.data import DataReport, load_video_rows
from longvideo.trainers.dpo_collator import VideoDPOCollator
from longvideo.trainers.dpo_config import VideoDPOConfig
from longvideo.trainers.dpo_loss import dpo_loss
from longvideo.trainers.dpo_trainer import VideoDPOTrainer
from longvideo.trainers.liger import apply_liger
from longvideo.trainers.recipe import find_stage, load_recipe, recipe_names
from longvideo.trainers.scale import accelerate_config, consolidate_checkpoint
from longvideo.trainers.sft_config import VideoSFTConfig, part_of
from longvideo.trainers.sft_trainer import VideoSFTTrainer, set_trainable_parts

__all__ = [
    "IGNORE_INDEX",
    "CrossGranularityConfig",
    "CrossGranularityTrainer",
    "DataReport",
    "VideoDPOCollator",
    "VideoDPOConfig",
    "VideoDPOTrainer",
    "VideoSFTCollator",
    "VideoSFTConfig",
    "VideoSFTTrainer",
    "accelerate_config",
    "apply_liger",
    "check_adapter",
    "check_batch",
    "coarse_grounding_row",
    "consolidate_checkpoint",
    "dpo_loss",
    "find_last_checkpoint",
    "find_stage",
    "fine_answer_row",
    "load_adapter",
    "load_recipe",
    "load_video_rows",
    "lora_config",
    "normalize_messages",
    "part_of",
    "recipe_names",
    "set_trainable_parts",
]
