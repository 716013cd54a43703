"""Your own data: rows of five formats, checked, converted and loaded for the trainers."""

from longvideo.trainers.data.conversion import check_file, convert_file
from longvideo.trainers.data.formats import FORMATS, detect_format, read_row, write_row
from longvideo.trainers.data.loading import load_video_rows
from longvideo.trainers.data.report import BadRowError, DataReport, Problem

__all__ = [
    "FORMATS",
    "BadRowError",
    "DataReport",
    "Problem",
    "check_file",
    "convert_file",
    "detect_format",
    "load_video_rows",
    "read_row",
    "write_row",
]
