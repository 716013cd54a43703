"""Videos of LLaVA-ST: a fixed number of frames from the first to the last, stretched to the size of the tower."""

import math
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_utils import (
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
    ChannelDimension,
    PILImageResampling,
)
from transformers.video_processing_utils import BaseVideoProcessor
from transformers.video_utils import VideoMetadata

from longvideo.processing.llava_st.visual_blocks_llava_st import check_frame_count
from longvideo.processing.shared.frame_sampling import check_rate, check_total, clip_range, spread_indices
from longvideo.processing.shared.stretched_videos import StretchedVideos
from longvideo.processing.shared.video_inputs import channels_first, describe_array
from longvideo.processing.shared.video_io import SourceVideoMetadata
from longvideo.processing.shared.video_options import (
    ReadingKwargs,
    check_limits,
    keeps_every_frame,
    list_sources,
    sampling_wishes,
)


class LlavaSTVideoProcessorKwargs(ReadingKwargs, total=False):
    """Options of the video processor beside those of every one.

    Attributes:
        num_frames: Frames of every video; shorter videos repeat frames.
        temporal_factor: Frames that the model makes one of; the number of frames must be a multiple of it.
        min_frames: Least number of frames, when `fps` is asked for.
        max_frames: Largest number of frames.
        split: (first, last) zero-based frame indices of the part that is looked at, both included; one pair for all
            videos, or a list with one pair or None per video.
    """

    temporal_factor: int | None
    split: list | tuple | None


class LlavaSTVideoProcessor(StretchedVideos, BaseVideoProcessor):
    """Reads, samples, stretches and normalises videos; every video becomes the same number of frames.

    The frames lie evenly from the first to the last one, both included, in the whole video or in its `split`. Where
    there are fewer, frames repeat. Times of an answer map linearly all the same: a time token of value 0 stands for
    the first frame, one of value 1 for the last (`LlavaSTProcessor.seen_period`), whatever frames were repeated.
    This holds for arrays and lists of frames too; only `do_sample_frames=False` keeps every frame of any source.
    Other numbers of frames (`num_frames`, `fps`, `max_frames`) are for models whose time table is interpolated; what
    follows from a rate or a limit is rounded to a multiple of `temporal_factor`.

    Output: `pixel_values_videos` (videos, F, C, S, S); `video_metadata` on request, with source size in pixels, frames
    per second, `frames_indices` in the source, `start` and `duration` in seconds.

    Source: `load_video` and `SigLipImageProcessor` of appletea233/LLaVA-ST.
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
    num_frames = 100
    temporal_factor = 5
    min_frames = None
    max_frames = None
    split = None
    video_backend = "auto"
    num_threads = 0
    progress = None
    video_options = None
    model_input_names = ["pixel_values_videos"]
    valid_kwargs = LlavaSTVideoProcessorKwargs

    def preprocess(self, videos: Any, **kwargs: Any) -> BatchFeature:
        """Turn videos into normalised frames.

        Args:
            videos: One video or nested lists of them: path, address, folder or list of frame pictures, list of PIL
                pictures, array or tensor (F, H, W, C) or (F, C, H, W).
            **kwargs: Options of the class by name, `video_metadata`, `return_metadata`, `return_tensors`.

        Returns:
            `pixel_values_videos`.

        Raises:
            FileNotFoundError: No such file.
            ValueError: A video cannot be read, or the options do not fit it.
        """
        sources = list_sources(
            videos, metadata=kwargs.pop("video_metadata", None), options=kwargs.pop("video_options", None)
        )
        splits = splits_of_videos(kwargs.pop("split", None), len(sources))
        read = [
            self.read_source(source, metadata=known, options=own, split=split, call=kwargs)
            for (source, known, own), split in zip(sources, splits, strict=True)
        ]
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
            `num_frames` or `fps`, `min_frames`, `max_frames`, `temporal_factor`.

        Raises:
            ValueError: `num_frames` and `fps` exclude each other.
        """
        rule = sampling_wishes(options, call, vars(self))
        return {**rule, "temporal_factor": self.option("temporal_factor", call)}

    def sample_frames(
        self,
        metadata: VideoMetadata,
        num_frames: int | None = None,
        fps: float | None = None,
        min_frames: int | None = None,
        max_frames: int | None = None,
        split: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> np.ndarray:
        """Choose the frames of a video.

        Args:
            metadata: Needs `total_num_frames`, and `fps` where `fps` is asked for.
            num_frames: Wanted number of frames, the processor's when neither this nor `fps` is given.
            fps: Wanted frames per second.
            min_frames: Least number of frames.
            max_frames: Largest number of frames.
            split: (first, last) frame indices of the part that is looked at.

        Returns:
            (F,) int64 zero-based indices, ascending; they may repeat.

        Raises:
            ValueError: The split lies outside of the video, or the frame rate is needed and not known.
        """
        wishes = {"num_frames": num_frames, "fps": fps, "min_frames": min_frames, "max_frames": max_frames}
        return self.choose_frames(metadata, self.sampling_rule(wishes, {}), split)

    def choose_frames(
        self, metadata: VideoMetadata, rule: Mapping[str, Any], split: Sequence[int] | None = None
    ) -> np.ndarray:
        """Choose the frames of a video by a joined rule.

        Args:
            metadata: As for `sample_frames`.
            rule: Values of `sampling_rule`.
            split: As for `sample_frames`.

        Returns:
            (F,) int64 zero-based indices.
        """
        first, last = check_split(split, check_total(metadata.total_num_frames))
        return spread_indices(first, last, count_frames(rule, last - first + 1, metadata.fps))

    def read_source(
        self,
        source: Any,
        *,
        metadata: VideoMetadata | None,
        options: Mapping[str, Any],
        split: Sequence[int] | None,
        call: Mapping[str, Any],
    ) -> tuple[torch.Tensor, SourceVideoMetadata]:
        """Read one video and choose its frames.

        Args:
            source: Path, address, list of frame pictures, or (F, ...) array or tensor.
            metadata: What the caller knows about an array, or None.
            options: Wishes of this video.
            split: As for `sample_frames`.
            call: Wishes of the call.

        Returns:
            (F, C, H, W) frames and where they come from.

        Raises:
            ValueError: The wishes do not fit each other or the video.
        """
        if split is not None and (options.get("start") is not None or options.get("end") is not None):
            raise ValueError(
                f"split={tuple(split)} (frames) and video_start/video_end (seconds) exclude each other; give one."
            )
        rule = self.sampling_rule(options, call)
        do_sample = self.option("do_sample_frames", call)
        if isinstance(source, np.ndarray | torch.Tensor):
            data_format = call.get("input_data_format")
            frames, facts = self._read_array(source, metadata, options, split, rule, do_sample, data_format)
        else:
            frames, facts = self._read_file(source, options, split, rule, do_sample, call)
        check_frame_count(len(frames), rule["temporal_factor"])
        return frames, facts

    def _read_array(
        self,
        source: np.ndarray | torch.Tensor,
        metadata: VideoMetadata | None,
        options: Mapping[str, Any],
        split: Sequence[int] | None,
        rule: Mapping[str, Any],
        do_sample: bool | None,
        data_format: Any,
    ) -> tuple[torch.Tensor, SourceVideoMetadata]:
        # Frames that were sampled before are brought to the fixed number too.
        frames_FCHW = channels_first(source, data_format)
        count, times = len(frames_FCHW), options.get("timestamps")
        if times is not None and len(times) != count:
            raise ValueError(f"{len(times)} timestamps were given for {count} frames; give one time in seconds each.")
        facts = describe_array(frames_FCHW, metadata, times=times, duration=options.get("duration"))
        is_cut = split is not None or options.get("start") is not None or options.get("end") is not None
        if do_sample is False:
            if is_cut:
                raise ValueError("split, video_start and video_end choose frames, but do_sample_frames is False.")
            return frames_FCHW, facts
        is_sampled = times is not None or (metadata is not None and metadata.frames_indices is not None)
        if is_cut and is_sampled:
            raise ValueError(
                "split, video_start and video_end need a file, or frames that were not sampled before (no timestamps, "
                "no frames_indices)."
            )
        rate = facts.duration and count / facts.duration if is_sampled else facts.fps
        if is_cut and split is None:
            first, length, _ = clip_range(count, check_rate(rate), start=options.get("start"), end=options.get("end"))
            split = (first, first + length - 1)
        local = self.choose_frames(VideoMetadata(total_num_frames=count, fps=rate), rule, split)
        known = facts.frames_indices
        facts.frames_indices = [int(known[index]) for index in local]
        if facts.frame_times is not None:
            facts.frame_times = [facts.frame_times[index] for index in local]
        elif facts.fps:
            facts.frame_times = [index / facts.fps for index in facts.frames_indices]
        if split is not None:
            facts.source_num_frames, facts.source_duration = count, facts.duration
            describe_split(facts, split, start=options.get("start"), end=options.get("end"))
        return frames_FCHW[torch.from_numpy(local)], facts

    def _read_file(
        self,
        source: Any,
        options: Mapping[str, Any],
        split: Sequence[int] | None,
        rule: Mapping[str, Any],
        do_sample: bool | None,
        call: Mapping[str, Any],
    ) -> tuple[torch.Tensor, SourceVideoMetadata]:
        # Frame pictures are told from videos for the error about sampling them, and then sampled all the same.
        keeps_every_frame(source, do_sample)

        def choose(known: VideoMetadata) -> np.ndarray:
            if do_sample is False:
                return np.arange(known.total_num_frames)
            return self.choose_frames(known, rule, split)

        frames, facts = self.read_file(source, choose, options=options, call=call)
        if split is not None:
            describe_split(facts, split)
        return frames, facts

    def join_videos(self, videos: list[torch.Tensor]) -> dict[str, Any]:
        """Lay out the videos of a batch.

        Args:
            videos: (F, C, S, S) pixels of each.

        Returns:
            The videos, stacked.

        Raises:
            ValueError: Videos of several numbers or sizes of frames.
        """
        shapes = sorted({tuple(video.shape) for video in videos})
        if len(shapes) > 1:
            raise ValueError(
                f"All videos of a batch must have one number and one size of frames, got (F, C, H, W) {shapes}; ask "
                "for the same num_frames, and leave do_sample_frames and do_resize on."
            )
        return {"pixel_values_videos": videos}


def count_frames(rule: Mapping[str, Any], available: int, rate: float | None) -> int:
    """Settle how many frames a video becomes.

    Args:
        rule: Values of `LlavaSTVideoProcessor.sampling_rule`.
        available: Frames of the part of the source that is looked at.
        rate: Frames per second of the source, needed where the rule has `fps`.

    Returns:
        Number of frames; as asked for, or, from a rate or limits, rounded to a multiple of `temporal_factor`.

    Raises:
        ValueError: The wishes contradict each other, or the rate of the source is needed and not known.
    """
    least, largest, factor = rule["min_frames"] or 0, rule["max_frames"] or 0, rule["temporal_factor"]
    check_limits(least, largest)
    wanted = rule["num_frames"]
    if rule["fps"] is not None:
        if not math.isfinite(rule["fps"]) or rule["fps"] <= 0:
            raise ValueError(f"fps={rule['fps']}, expected a positive number of frames per second.")
        wanted = math.ceil(available / check_rate(rate) * rule["fps"])
    elif not (least or largest):
        check_frame_count(wanted, factor)
        return wanted
    wanted = -(-max(wanted, least) // factor) * factor
    return max(min(wanted, largest // factor * factor), factor) if largest else wanted


def check_split(split: Sequence[int] | None, total: int) -> tuple[int, int]:
    """Check a range of frames.

    Args:
        split: (first, last) zero-based indices, both included, or None for the whole video.
        total: Frames of the source.

    Returns:
        First and last index.

    Raises:
        ValueError: It is no pair of whole numbers, runs backwards, or leaves the video.
    """
    if split is None:
        return 0, total - 1
    if len(split) != 2 or not all(isinstance(entry, Integral) for entry in split):
        raise ValueError(
            f"split={split!r}, expected (first, last) frame indices; for seconds use video_start and video_end."
        )
    first, last = int(split[0]), int(split[1])
    if not 0 <= first <= last:
        raise ValueError(f"split=({first}, {last}) is no range of frames: expected 0 <= first <= last.")
    if last >= total:
        raise ValueError(
            f"split=({first}, {last}) leaves the video, which has the {total} frames 0 to {total - 1}; the last frame "
            "is included."
        )
    return first, last


def splits_of_videos(split: Any, count: int) -> list[Sequence[int] | None]:
    """List the frame ranges of the videos of a call.

    Args:
        split: None, one (first, last) pair for all, or a list with one pair or None per video.
        count: Number of videos.

    Returns:
        One entry per video.

    Raises:
        ValueError: The numbers differ.
    """
    if split is None:
        return [None] * count
    if len(split) == 2 and all(isinstance(entry, Real) for entry in split):
        return [split] * count
    if len(split) != count:
        raise ValueError(f"split has {len(split)} entries for {count} videos; give one (first, last) pair per video.")
    return list(split)


def describe_split(
    facts: SourceVideoMetadata, split: Sequence[int], *, start: float | None = None, end: float | None = None
) -> None:
    """Note where a range of frames lies in its source, in place.

    Args:
        facts: Metadata of the kept frames.
        split: (first, last) zero-based frame indices, both included.
        start: Begin in seconds where it was given in seconds.
        end: End in seconds where it was given in seconds.
    """
    first, last = split
    count, step = last - first + 1, 1 / facts.fps if facts.fps else 0.0
    if facts.source_num_frames is None:
        facts.source_num_frames, facts.source_duration = facts.total_num_frames, facts.duration
    begin = facts.frame_times[0] if facts.frame_times else first * step
    # The last frame of the range stays on the screen until the next one.
    stop = facts.frame_times[-1] + step if facts.frame_times and len(facts.frame_times) > 1 else begin + count * step
    facts.total_num_frames, facts.last_frame_time = count, None
    facts.start = begin if start is None else float(start)
    facts.end = stop if end is None else min(float(end), facts.source_duration)
    facts.duration = facts.end - facts.start
