"""Videos of CrossLMM: which frames are read, and their pixels."""

from typing import Any

import numpy as np
from transformers.image_utils import IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD, PILImageResampling
from transformers.video_processing_utils import BaseVideoProcessor
from transformers.video_utils import VideoMetadata

from longvideo.processing.shared.sampled_videos import SampledVideos
from longvideo.processing.shared.video_options import ReadingKwargs, check_available


class CrossLMMVideoProcessorKwargs(ReadingKwargs, total=False):
    """Options of the video processor: those of every one."""


class CrossLMMVideoProcessor(SampledVideos, BaseVideoProcessor):
    """Reads, samples, stretches and normalises videos; any number of frames will do.

    Files and addresses are always sampled; arrays, tensors and lists of frames count as already sampled unless
    sampling is asked for (`num_frames`, `fps`, `min_frames`, `max_frames`, `do_sample_frames=True`) or their metadata
    gives the frame rate without `frames_indices`. `do_sample_frames=False` keeps every frame of any source.
    Without other wishes there is about one frame per second, at least `min_frames` and at most `max_frames`, and never
    more than the video has. Frames without known rate count as one per second, with a warning; a rule that needs the
    rate is then an error.

    Output: `pixel_values_videos` (videos, F, C, S, S) when all videos have F frames, otherwise (sum of F, C, S, S)
    together with `video_num_frames` (videos,) int64; `video_metadata` on request.

    Source: CrossLMM Table 3, stage 2 (384 pixels, 64 to 512 frames).
    Differs: The paper does not say which frames are taken. One frame per second within its limits is our choice.
    """

    resample = PILImageResampling.BICUBIC
    image_mean = IMAGENET_STANDARD_MEAN
    image_std = IMAGENET_STANDARD_STD
    size = {"height": 384, "width": 384}
    do_resize = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True
    do_sample_frames = None
    min_frames = 64
    max_frames = 512
    video_backend = "auto"
    num_threads = 0
    progress = None
    video_options = None
    model_input_names = ["pixel_values_videos"]
    valid_kwargs = CrossLMMVideoProcessorKwargs

    def sample_frames(
        self,
        metadata: VideoMetadata,
        num_frames: int | None = None,
        fps: float | None = None,
        min_frames: int | None = None,
        max_frames: int | None = None,
        **kwargs: Any,
    ) -> np.ndarray:
        """Choose the frames of a video.

        Args:
            metadata: Needs `total_num_frames`, and `fps` unless `num_frames` is given.
            num_frames: Wanted number of frames, evenly spread.
            fps: Wanted frames per second.
            min_frames: Least number of frames.
            max_frames: Largest number of frames.

        Returns:
            (F,) int64 zero-based indices, ascending, each in the middle of its segment.

        Raises:
            ValueError: More frames are asked for than there are, or the frame rate is needed and not known.
        """
        check_available(num_frames, metadata.total_num_frames)
        rule = {"num_frames": num_frames, "fps": fps, "min_frames": min_frames, "max_frames": max_frames}
        return self.choose_frames(metadata, {**rule, "local_num_frames": 1})
