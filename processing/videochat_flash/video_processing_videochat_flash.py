"""Videos of VideoChat-Flash: which frames are read, and their pixels."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    ChannelDimension,
    PILImageResampling,
)
from transformers.processing_utils import VideosKwargs
from transformers.video_processing_utils import BaseVideoProcessor
from transformers.video_utils import VideoMetadata

from longvideo.processing.shared.frame_sampling import (
    check_rate,
    dynamic_fps1_indices,
    fps_indices,
    num_frames_indices,
    whole_clips,
)
from longvideo.processing.shared.stretched_videos import StretchedVideos
from longvideo.processing.shared.video_inputs import complete_clip
from longvideo.processing.shared.video_io import SourceVideoMetadata
from longvideo.processing.shared.video_options import (
    check_available,
    check_limits,
    keeps_every_frame,
    list_sources,
    read_array,
    sampling_wishes,
)


class VideoChatFlashVideoProcessorKwargs(VideosKwargs, total=False):
    """Options of the video processor beside the usual ones.

    Attributes:
        min_frames: Least number of frames.
        max_frames: Largest number of frames.
        mm_local_num_frames: Frames per clip; every video gets a multiple of it.
        video_backend: "auto", "pyav" or "torchcodec".
        num_threads: Decoder threads, 0 for as many as there are cores.
        progress: Whether to show a progress bar; None shows one for long videos on a terminal.
        video_options: One mapping per video with its own `fps`, `num_frames`, `min_frames`, `max_frames`, `start`,
            `end`, `timestamps`, `duration`, `metadata`.
    """

    min_frames: int | None
    max_frames: int | None
    mm_local_num_frames: int | None
    video_backend: str | None
    num_threads: int | None
    progress: bool | None
    video_options: list | None


class VideoChatFlashVideoProcessor(StretchedVideos, BaseVideoProcessor):
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

    def preprocess(self, videos: Any, **kwargs: Any) -> BatchFeature:
        """Turn videos into normalised frames.

        Args:
            videos: One video or nested lists of them: path, address, folder or list of frame pictures, list of PIL
                pictures, array or tensor (F, H, W, C) or (F, C, H, W).
            **kwargs: Options of the class by name, `video_metadata`, `return_metadata`, `return_tensors`.

        Returns:
            `pixel_values_videos` and, when the videos differ in length, `video_num_frames`.

        Raises:
            FileNotFoundError: No such file.
            ValueError: A video cannot be read, or the options do not fit it.
        """
        sources = list_sources(
            videos, metadata=kwargs.pop("video_metadata", None), options=kwargs.pop("video_options", None)
        )
        read = [self.read_source(source, metadata=given, options=own, call=kwargs) for source, given, own in sources]
        kwargs.pop("input_data_format", None)
        kwargs.update(do_sample_frames=False, input_data_format=ChannelDimension.FIRST)
        return super().preprocess(
            [frames for frames, _ in read], video_metadata=[facts for _, facts in read], **kwargs
        )

    def sampling_rule(self, options: Mapping[str, Any], call: Mapping[str, Any]) -> dict[str, Any]:
        """Join the sampling wishes of a video block, of the call and of the processor; the nearest one wins.

        Args:
            options: Wishes of this video.
            call: Wishes of the call.

        Returns:
            `num_frames` or `fps` or neither, `min_frames` and `max_frames` as asked for (None when not),
            `mm_local_num_frames`, and `asked`: whether the video or the call had a wish.

        Raises:
            ValueError: `num_frames` and `fps` exclude each other.
        """
        rule = sampling_wishes(options, call, vars(self))
        rule["mm_local_num_frames"] = self.option("mm_local_num_frames", call)
        return rule

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
        rule["mm_local_num_frames"] = mm_local_num_frames
        return self.choose_frames(metadata, rule)

    def choose_frames(self, metadata: VideoMetadata, rule: Mapping[str, Any]) -> np.ndarray:
        """Choose the frames of a video; wishes for more than there are are cut down with a warning.

        Args:
            metadata: As for `sample_frames`.
            rule: Values of `sampling_rule`.

        Returns:
            (F,) int64 zero-based indices.
        """
        total, local = metadata.total_num_frames, rule["mm_local_num_frames"] or self.mm_local_num_frames
        if rule["num_frames"] is not None:
            return num_frames_indices(total, rule["num_frames"], local_num_frames=local)
        if rule["fps"] is not None:
            # The default limits belong to the rule of one frame per second: who asks for a rate gets that rate.
            least, largest = rule["min_frames"] or 0, rule["max_frames"] or 0
            check_limits(least, largest)
            return fps_indices(
                total,
                check_rate(metadata.fps),
                fps=rule["fps"],
                min_frames=least,
                max_frames=largest,
                local_num_frames=local,
            )
        least, largest = self.limits(rule["min_frames"], rule["max_frames"])
        return dynamic_fps1_indices(
            total,
            check_rate(metadata.fps),
            min_frames=whole_clips(least, local, name="min_frames") if least > local else least,
            max_frames=whole_clips(largest, local, name="max_frames") if largest > 0 else 0,
            local_num_frames=local,
        )

    def limits(self, least: int | None, largest: int | None) -> tuple[int, int]:
        """Complete the wished limits; a default gives way to a wish that contradicts it.

        Args:
            least: Wished least number of frames or None.
            largest: Wished largest number of frames, 0 for no limit, or None.

        Returns:
            Least and largest number of frames.

        Raises:
            ValueError: Both are wishes and contradict each other.
        """
        if least is not None and largest is not None:
            check_limits(least, largest)
            return least, largest
        if least is not None:
            # The rule of one frame per second lets the least number win over the largest.
            return least, self.max_frames
        largest = self.max_frames if largest is None else largest
        return min(self.min_frames, largest) if largest > 0 else self.min_frames, largest

    def read_source(
        self, source: Any, *, metadata: VideoMetadata | None, options: dict[str, Any], call: Mapping[str, Any]
    ) -> tuple[torch.Tensor, SourceVideoMetadata]:
        """Read one video and choose its frames.

        Args:
            source: Path, address, list of frame pictures, or (F, ...) array or tensor.
            metadata: What the caller knows about an array, or None.
            options: Wishes of this video.
            call: Wishes of the call.

        Returns:
            (F, C, H, W) frames, F a multiple of the clip length, and where they come from.
        """
        rule = self.sampling_rule(options, call)
        do_sample = self.option("do_sample_frames", call)
        if isinstance(source, np.ndarray | torch.Tensor):
            frames, facts = read_array(
                source,
                metadata=metadata,
                options=options,
                rule=rule,
                do_sample=do_sample,
                data_format=call.get("input_data_format"),
                choose=lambda known: self.choose_frames(known, rule),
            )
        else:
            keep_all = keeps_every_frame(source, do_sample)
            frames, facts = self.read_file(
                source,
                lambda known: np.arange(known.total_num_frames) if keep_all else self.choose_frames(known, rule),
                options=options,
                call=call,
            )
        return complete_clip(frames, facts, rule["mm_local_num_frames"])

    def join_videos(self, videos: list[torch.Tensor]) -> dict[str, Any]:
        """Lay out the videos of a batch.

        Args:
            videos: (F, C, S, S) pixels of each.

        Returns:
            Stacked where all have one number of frames, otherwise joined and with `video_num_frames`.

        Raises:
            ValueError: Frames of several sizes.
        """
        if len({video.shape for video in videos}) == 1:
            return {"pixel_values_videos": videos}
        if len({video.shape[1:] for video in videos}) > 1:
            raise ValueError(
                "The frames of all videos of a batch must have one size, got "
                f"{[tuple(video.shape[1:]) for video in videos]}; switch do_resize on."
            )
        counts = torch.tensor([len(video) for video in videos], dtype=torch.int64)
        return {"pixel_values_videos": torch.cat(videos), "video_num_frames": counts}
