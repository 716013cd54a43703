"""Videos of CrossVLLM: how many frames a granularity sees of a whole video or a segment, and their pixels."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, PILImageResampling, SizeDict
from transformers.video_processing_utils import BaseVideoProcessor
from transformers.video_utils import VideoMetadata

from longvideo.processing.shared.frame_sampling import check_total, covering_range, middle_indices
from longvideo.processing.shared.pixels import resize_exact
from longvideo.processing.shared.sampled_videos import SampledVideos
from longvideo.processing.shared.video_inputs import channels_first
from longvideo.processing.shared.video_io import SourceVideoMetadata, opened_video
from longvideo.processing.shared.video_options import ReadingKwargs, check_available, check_limits, pil_filter

GRANULARITIES = ("coarse", "fine")


class CrossVLLMVideoProcessorKwargs(ReadingKwargs, total=False):
    """Options of the video processor beside those of every one.

    Attributes:
        granularity: "coarse" or "fine": how many frames are sampled, and how many tokens each one gets.
        spatial_pool_stride: Patches along a side of a frame that become one token; the granularity's when None.
        training: Whether frames are sampled as in training, fewer of them.
        coarse_num_frames: Most frames of a video in the coarse granularity.
        fine_num_frames: Most frames of a video or a segment in the fine granularity.
        coarse_training_frames: The same in training.
        fine_training_frames: The same in training.
    """

    granularity: str | None
    spatial_pool_stride: int | None
    training: bool | None
    coarse_num_frames: int | None
    fine_num_frames: int | None
    coarse_training_frames: int | None
    fine_training_frames: int | None


class CrossVLLMVideoProcessor(SampledVideos, BaseVideoProcessor):
    """Reads, samples, resizes and normalises whole videos and segments of them.

    Files and addresses are always sampled; arrays, tensors and lists of frames count as already sampled unless
    sampling is asked for (`num_frames`, `fps`, `min_frames`, `max_frames`, `do_sample_frames=True`) or their metadata
    gives the frame rate without `frames_indices`. `do_sample_frames=False` keeps every frame of any source.
    Without other wishes the frames of the granularity are spread evenly over the video, or over the segment between
    `video_start` and `video_end` of its block, which is read from the source; never more than there are. Every frame
    that is shown for a part of the segment belongs to it.

    Output: `pixel_values_videos` (videos, F, C, S, S) when all videos have F frames, otherwise (sum of F, C, S, S)
    together with `video_num_frames` (videos,) int64; `video_metadata` on request.

    Source: CrossVLLM Table 4 and Sec. 5.1 (frames); sizes and crop of LLaVA-NeXT-Video.
    Differs: The paper says "uniform". Each frame is taken from the middle of its share of the video, not from its
        begin.
    """

    resample = PILImageResampling.BICUBIC
    image_mean = OPENAI_CLIP_MEAN
    image_std = OPENAI_CLIP_STD
    size = {"shortest_edge": 336}
    default_to_square = False
    crop_size = {"height": 336, "width": 336}
    do_resize = True
    do_center_crop = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True
    do_sample_frames = None
    granularity = "coarse"
    spatial_pool_stride = None
    training = False
    coarse_num_frames = 288
    fine_num_frames = 32
    coarse_training_frames = 144
    fine_training_frames = 16
    min_frames = None
    max_frames = None
    video_backend = "auto"
    num_threads = 0
    progress = None
    video_options = None
    model_input_names = ["pixel_values_videos"]
    cut_range = staticmethod(covering_range)
    valid_kwargs = CrossVLLMVideoProcessorKwargs

    def frame_budget(self, call: Mapping[str, Any]) -> int:
        """Say how many frames a video gets where nothing else is asked for.

        Args:
            call: Wishes of the call.

        Returns:
            N of the paper in the coarse, N' in the fine granularity.

        Raises:
            ValueError: Another granularity, or a number below 1.
        """
        granularity = self.option("granularity", call)
        if granularity not in GRANULARITIES:
            raise ValueError(f"granularity={granularity!r}, expected one of {', '.join(GRANULARITIES)}.")
        name = f"{granularity}_{'training' if self.option('training', call) else 'num'}_frames"
        budget = self.option(name, call)
        if budget is None or budget < 1:
            raise ValueError(f"{name}={budget}, expected at least 1.")
        return budget

    def sampling_rule(self, options: Mapping[str, Any], call: Mapping[str, Any]) -> dict[str, Any]:
        """Join the sampling wishes of a video block, of the call and of the processor; the nearest one wins.

        Args:
            options: Wishes of this video.
            call: Wishes of the call.

        Returns:
            As in `SampledVideos`, and `budget`: frames where nothing else is asked for.

        Raises:
            ValueError: `num_frames` and `fps` exclude each other, or another granularity.
        """
        return {**super().sampling_rule(options, call), "budget": self.frame_budget(call)}

    def choose_frames(self, metadata: VideoMetadata, rule: Mapping[str, Any]) -> np.ndarray:
        """Choose the frames of a video or a segment; wishes for more than there are are cut down with a warning.

        Args:
            metadata: Needs `total_num_frames`, and `fps` where `fps` is asked for.
            rule: Values of `sampling_rule`.

        Returns:
            (F,) int64 zero-based indices, ascending.
        """
        if rule["num_frames"] is not None or rule["fps"] is not None:
            return super().choose_frames(metadata, rule)
        least = rule["min_frames"] or self.min_frames or 0
        largest = rule["max_frames"] or self.max_frames or 0
        check_limits(least, largest)
        wanted = max(rule["budget"], least)
        return spread_over(metadata.total_num_frames, min(wanted, largest) if largest else wanted)

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
            metadata: Needs `total_num_frames`, and `fps` where `fps` is given.
            num_frames: Wanted number of frames, evenly spread.
            fps: Wanted frames per second.
            min_frames: Least number of frames.
            max_frames: Largest number of frames.
            **kwargs: `granularity` and `training`, whose number of frames is taken where nothing else is asked for.

        Returns:
            (F,) int64 zero-based indices, ascending, each in the middle of its share.

        Raises:
            ValueError: More frames are asked for than there are, or the frame rate is needed and not known.
        """
        check_available(num_frames, metadata.total_num_frames)
        rule = {"num_frames": num_frames, "fps": fps, "min_frames": min_frames, "max_frames": max_frames}
        return self.choose_frames(metadata, {**rule, "local_num_frames": 1, "budget": self.frame_budget(kwargs)})

    def read_file(
        self,
        source: Any,
        choose: Callable[[VideoMetadata], np.ndarray],
        *,
        options: Mapping[str, Any],
        call: Mapping[str, Any],
    ) -> tuple[torch.Tensor, SourceVideoMetadata]:
        """Read the chosen frames of a file, an address or a list of frame pictures.

        Args:
            source: What to read.
            choose: Gives the zero-based indices of the wanted frames of what is known of a video.
            options: Wishes of this video, among them `start` and `end` in seconds.
            call: Wishes of the call.

        Returns:
            (F, C, H, W) uint8 frames and where they come from. Frames are brought to their final size one by one:
            hundreds of large ones would fill the memory.

        Raises:
            FileNotFoundError: No such file.
            ValueError: A video cannot be read.
        """
        size, crop = (_size_dict(self.option(name, call)) for name in ("size", "crop_size"))
        if not (self.option("do_resize", call) and self.option("do_center_crop", call) and size.shortest_edge):
            return super().read_file(source, choose, options=options, call=call)
        opened = opened_video(
            source,
            sample_indices_fn=choose,
            start=options.get("start"),
            end=options.get("end"),
            backend=self.option("video_backend", call),
            num_threads=self.option("num_threads", call),
            progress=self.option("progress", call),
            cut_range=self.cut_range,
        )
        resample = self.option("resample", call)
        with opened as (facts, frames):
            small = [
                self.center_crop(self.resize(channels_first(frame[None], "channels_last"), size, resample), crop)
                for frame in frames
            ]
        return torch.cat(small), facts

    def resize(self, image: torch.Tensor, size: SizeDict, resample: Any = None, **kwargs: Any) -> torch.Tensor:
        """Resize frames with PIL where the values are bytes, whether they come from a file or from memory.

        Args:
            image: (F, C, H, W) frames.
            size: With `shortest_edge`, or anything that Transformers knows.
            resample: Filter.
            **kwargs: As in Transformers.

        Returns:
            Resized frames.
        """
        if not size.shortest_edge or size.longest_edge:
            return super().resize(image, size, resample=resample, **kwargs)
        height, width = image.shape[-2:]
        short, edge = min(height, width), size.shortest_edge
        return resize_exact(image, edge * height // short, edge * width // short, resample=pil_filter(resample))


def spread_over(total: int, wanted: int) -> np.ndarray:
    """Choose frames evenly, as many as there are where that is fewer.

    Args:
        total: Number of frames.
        wanted: Wanted number.

    Returns:
        (F,) int64 zero-based indices, ascending, each in the middle of its share.

    Source: CrossVLLM Sec. 3.1, min(N', T') frames.
    """
    return middle_indices(total, min(wanted, check_total(total)))


def _size_dict(value: Any) -> SizeDict:
    return value if isinstance(value, SizeDict) else SizeDict(**dict(value or {}))
