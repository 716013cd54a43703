"""Conversion of original checkpoints; importing this package registers every architecture."""

from longvideo.conversion import convert_llava_st, convert_longvu, convert_videochat_flash
from longvideo.conversion.base import CONVERSIONS, KeyMap, convert_checkpoint, reverse_checkpoint
from longvideo.conversion.report import ConversionReport

__all__ = [
    "CONVERSIONS",
    "ConversionReport",
    "KeyMap",
    "convert_checkpoint",
    "convert_llava_st",
    "convert_longvu",
    "convert_videochat_flash",
    "reverse_checkpoint",
]
