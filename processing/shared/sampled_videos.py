"""Video processors that take about one frame per second, between a least and a largest number."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_utils import ChannelDimension
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
    check_limits,
    keeps_every_frame,
    list_sources,
    read_array,
    sampling_wishes,
)


class SampledVideos(StretchedVideos):
    """Samples and stretches videos of any length; to be named before `BaseVideoProcessor`.

    A video processor has its options as attributes, among them `min_frames` and `max_frames`, and says with
    `clip_length` whether its frames come in clips.
    """

    def clip_length(self, call: Mapping[str, Any]) -> int:
        """Say how many frames of a video belong together.

        Args:
            call: Wishes of the call.

        Returns:
            Frames per clip; every video gets a multiple of it.
        """
        return 1

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
            `local_num_frames` (frames per clip), and `asked`: whether the video or the call had a wish.

        Raises:
            ValueError: `num_frames` and `fps` exclude each other.
        """
        return {**sampling_wishes(options, call, vars(self)), "local_num_frames": self.clip_length(call)}

    def choose_frames(self, metadata: VideoMetadata, rule: Mapping[str, Any]) -> np.ndarray:
        """Choose the frames of a video; wishes for more than there are are cut down with a warning.

        Args:
            metadata: Needs `total_num_frames`, and `fps` unless `num_frames` is asked for.
            rule: Values of `sampling_rule`.

        Returns:
            (F,) int64 zero-based indices, F a multiple of the clip length.
        """
        total, local = metadata.total_num_frames, rule["local_num_frames"]
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
                cut_range=self.cut_range,
            )
        else:
            keep_all = keeps_every_frame(source, do_sample)
            frames, facts = self.read_file(
                source,
                lambda known: np.arange(known.total_num_frames) if keep_all else self.choose_frames(known, rule),
                options=options,
                call=call,
            )
        return complete_clip(frames, facts, rule["local_num_frames"])

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
