"""Videos of VideoChat-Flash: which frames are read, and their pixels."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    PILImageResampling,
)
from transformers.video_processing_utils import BaseVideoProcessor
from transformers.video_utils import VideoMetadata

from longvideo.processing.shared.sampled_videos import SampledVideos
from longvideo.processing.shared.video_options import ReadingKwargs, check_available


class VideoChatFlashVideoProcessorKwargs(ReadingKwargs, total=False):
    """Options of the video processor beside those of every one.

    Attributes:
        mm_local_num_frames: Frames per clip; every video gets a multiple of it.
    """

    mm_local_num_frames: int | None


class VideoChatFlashVideoProcessor(SampledVideos, BaseVideoProcessor):
    """Reads, samples, resizes and normalises videos.

    Files and addresses are always sampled; arrays, tensors and lists of frames count as already sampled unless
    sampling is asked for (`num_frames`, `fps`, `min_frames`, `max_frames`, `do_sample_frames=True`) or their metadata
    gives the frame rate without `frames_indices`. `do_sample_frames=False` keeps every frame of any source.
    Without other wishes there is about one frame per second, at least `min_frames` and at most `max_frames`.
    Frames without known rate count as one per second, with a warning; a rule that needs the rate is then an error.

    Output: `pixel_values_videos` (videos, F, C, S, S) when all videos have F frames, otherwise (sum of F, C, S, S)
    together with `video_num_frames` (videos,) int64; `video_metadata` on request.

    Source: VideoChat-Flash `get_frame_indices` (dynamic_fps1) and its image processor (PIL bicubic to S x S).
    """

    resample = PILImageResampling.BICUBIC
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    size = {"height": 224, "width": 224}
    do_resize = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True
    do_sample_frames = None
    min_frames = 64
    max_frames = 512
    mm_local_num_frames = 4
    video_backend = "auto"
    num_threads = 0
    progress = None
    video_options = None
    model_input_names = ["pixel_values_videos"]
    valid_kwargs = VideoChatFlashVideoProcessorKwargs

    def clip_length(self, call: Mapping[str, Any]) -> int:
        """Say how many frames make one clip.

        Args:
            call: Wishes of the call.

        Returns:
            Frames per clip.
        """
        return self.option("mm_local_num_frames", call)

    def sample_frames(
        self,
        metadata: VideoMetadata,
        num_frames: int | None = None,
        fps: float | None = None,
        min_frames: int | None = None,
        max_frames: int | None = None,
        mm_local_num_frames: int | None = None,
        **kwargs: Any,
    ) -> np.ndarray:
        """Choose the frames of a video.

        Args:
            metadata: Needs `total_num_frames`, and `fps` unless `num_frames` is given.
            num_frames: Wanted number of frames, evenly spread.
            fps: Wanted frames per second.
            min_frames: Least number of frames.
            max_frames: Largest number of frames.
            mm_local_num_frames: Frames per clip.

        Returns:
            (F,) int64 zero-based indices, F a multiple of the clip length.

        Raises:
            ValueError: More frames are asked for than there are, or the frame rate is needed and not known.

        Source: VideoChat-Flash `get_frame_indices`, rule dynamic_fps1, when neither `num_frames` nor `fps` is given.
        """
        check_available(num_frames, metadata.total_num_frames)
        rule = {"num_frames": num_frames, "fps": fps, "min_frames": min_frames, "max_frames": max_frames}
        rule["local_num_frames"] = mm_local_num_frames or self.mm_local_num_frames
        return self.choose_frames(metadata, rule)
