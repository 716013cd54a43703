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
    SizeDict,
)
from transformers.processing_utils import VideosKwargs
from transformers.video_processing_utils import BaseVideoProcessor
from transformers.video_utils import VideoMetadata

from longvideo.processing.shared.frame_sampling import (
    check_rate,
    clip_range,
    dynamic_fps1_indices,
    fps_indices,
    num_frames_indices,
    whole_clips,
)
from longvideo.processing.shared.messages import BLOCK_OPTIONS
from longvideo.processing.shared.pixels import resize_exact
from longvideo.processing.shared.video_inputs import (
    channels_first,
    complete_clip,
    describe_array,
    flatten_metadata,
    flatten_videos,
    to_metadata,
)
from longvideo.processing.shared.video_io import SourceVideoMetadata, read_video

SAMPLING_OPTIONS = ("num_frames", "fps", "min_frames", "max_frames")


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


class VideoChatFlashVideoProcessor(BaseVideoProcessor):
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
        sources = flatten_videos(videos)
        if not sources:
            raise ValueError("No video was given; expected at least one path, address, array or list of frames.")
        metadata = flatten_metadata(kwargs.pop("video_metadata", None), len(sources))
        options = list(kwargs.pop("video_options", None) or [{}] * len(sources))
        if len(options) != len(sources):
            raise ValueError(
                f"video_options has {len(options)} entries for {len(sources)} videos; give one per video."
            )
        read = [
            self.read_source(source, metadata=given, options=dict(own), call=kwargs)
            for source, given, own in zip(sources, metadata, options, strict=True)
        ]
        kwargs.pop("input_data_format", None)
        kwargs.update(do_sample_frames=False, input_data_format=ChannelDimension.FIRST)
        return super().preprocess(
            [frames for frames, _ in read], video_metadata=[facts for _, facts in read], **kwargs
        )

    def option(self, name: str, call: Mapping[str, Any]) -> Any:
        """Look up an option, first among those given at call time.

        Args:
            name: Name of the option.
            call: Options given at call time.

        Returns:
            Its value, or None.
        """
        return call[name] if call.get(name) is not None else getattr(self, name, None)

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
        rule: dict[str, Any] = {"num_frames": None, "fps": None}
        for level in (options, call, vars(self)):
            if level.get("num_frames") is not None and level.get("fps") is not None:
                raise ValueError(
                    f"num_frames={level['num_frames']} and fps={level['fps']} exclude each other; give one of them."
                )
            if level.get("num_frames") is not None or level.get("fps") is not None:
                rule.update(num_frames=level.get("num_frames"), fps=level.get("fps"))
                break
        for name in ("min_frames", "max_frames"):
            rule[name] = next((level[name] for level in (options, call) if level.get(name) is not None), None)
        rule["mm_local_num_frames"] = self.option("mm_local_num_frames", call)
        rule["asked"] = any(level.get(name) is not None for level in (options, call) for name in SAMPLING_OPTIONS)
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
        total = metadata.total_num_frames
        if num_frames is not None and num_frames > total:
            raise ValueError(
                f"num_frames={num_frames} frames were asked for, but the video has {total}. Ask for {total} or fewer."
            )
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
        unknown = sorted(set(options) - set(BLOCK_OPTIONS.values()))
        if unknown:
            raise ValueError(f"Unknown video options {unknown}, expected some of {sorted(BLOCK_OPTIONS.values())}.")
        rule = self.sampling_rule(options, call)
        do_sample = self.option("do_sample_frames", call)
        given = options.get("metadata")
        metadata = metadata if given is None else to_metadata(given)
        if isinstance(source, np.ndarray | torch.Tensor):
            frames, facts = self.read_array(source, metadata, options, rule, do_sample, call)
        else:
            frames, facts = self.read_file(source, options, rule, do_sample, call)
        return complete_clip(frames, facts, rule["mm_local_num_frames"])

    def read_file(
        self,
        source: Any,
        options: Mapping[str, Any],
        rule: Mapping[str, Any],
        do_sample: bool | None,
        call: Mapping[str, Any],
    ) -> tuple[torch.Tensor, SourceVideoMetadata]:
        is_pictures = isinstance(source, list | tuple)
        if is_pictures and do_sample:
            raise ValueError(
                "Sampling frames from a list of images is not supported! Set `do_sample_frames=False`, "
                "or pass the folder of the frames."
            )
        keep_all = do_sample is False or is_pictures
        size, resample = self.option("size", call), self.option("resample", call)
        height, width = (
            (size.get("height"), size.get("width")) if isinstance(size, Mapping | SizeDict) else (None, None)
        )
        is_exact = self.option("do_resize", call) and height and width and resample == PILImageResampling.BICUBIC
        frames, facts = read_video(
            source,
            sample_indices_fn=(
                (lambda known: np.arange(known.total_num_frames))
                if keep_all
                else (lambda known: self.choose_frames(known, rule))
            ),
            size=(height, width) if is_exact else None,
            start=options.get("start"),
            end=options.get("end"),
            backend=self.option("video_backend", call),
            num_threads=self.option("num_threads", call),
            progress=self.option("progress", call),
        )
        frames_FCHW = torch.from_numpy(frames).permute(0, 3, 1, 2)
        return frames_FCHW, facts

    def read_array(
        self,
        source: np.ndarray | torch.Tensor,
        metadata: VideoMetadata | None,
        options: Mapping[str, Any],
        rule: Mapping[str, Any],
        do_sample: bool | None,
        call: Mapping[str, Any],
    ) -> tuple[torch.Tensor, SourceVideoMetadata]:
        frames_FCHW = channels_first(source, call.get("input_data_format"))
        count = len(frames_FCHW)
        times = options.get("timestamps")
        if times is not None and len(times) != count:
            raise ValueError(f"{len(times)} timestamps were given for {count} frames; give one time in seconds each.")
        is_sampled = times is not None or (metadata is not None and metadata.frames_indices is not None)
        rate = metadata.fps if metadata is not None else None
        facts = describe_array(frames_FCHW, metadata, times=times, duration=options.get("duration"))
        cut = options.get("start") is not None or options.get("end") is not None
        if is_sampled or (do_sample is None and not rule["asked"] and rate is None) or do_sample is False:
            if cut:
                raise ValueError(
                    "video_start and video_end need a file, or frames with a known rate that were not sampled before."
                )
            return frames_FCHW, facts
        # Indices are counted in the array; a total from elsewhere would point past its end.
        facts.total_num_frames, facts.fps = count, rate
        first = 0
        if cut:
            first, facts.total_num_frames, facts.duration = clip_range(
                count, check_rate(rate), start=options.get("start"), end=options.get("end")
            )
        if rule["num_frames"] is not None and rule["num_frames"] > facts.total_num_frames:
            raise ValueError(
                f"num_frames={rule['num_frames']} frames were asked for, but the video has {facts.total_num_frames}. "
                f"Ask for {facts.total_num_frames} or fewer."
            )
        indices = self.choose_frames(facts, rule) + first
        facts.frames_indices = indices
        facts.frame_times = [float(index) / rate for index in indices] if rate else None
        return frames_FCHW[torch.from_numpy(indices)], facts

    def _preprocess(
        self,
        videos: list[torch.Tensor],
        do_resize: bool,
        size: SizeDict,
        resample: Any,
        do_center_crop: bool,
        crop_size: SizeDict,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: Any,
        image_std: Any,
        return_tensors: Any = None,
        do_convert_rgb: bool | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        processed = []
        for frames_FCHW in videos:
            if do_convert_rgb and frames_FCHW.shape[1] != 3:
                frames_FCHW = self.convert_to_rgb(frames_FCHW)
            if do_resize and size.height and size.width:
                frames_FCHW = resize_exact(frames_FCHW, size.height, size.width, resample=pil_filter(resample))
            elif do_resize:
                frames_FCHW = self.resize(frames_FCHW, size=size, resample=resample)
            if do_center_crop:
                frames_FCHW = self.center_crop(frames_FCHW, crop_size)
            processed.append(
                self.rescale_and_normalize(
                    frames_FCHW, do_rescale, rescale_factor, do_normalize, image_mean, image_std
                )
            )
        if len({video.shape for video in processed}) == 1:
            return BatchFeature({"pixel_values_videos": processed}, tensor_type=return_tensors)
        if len({video.shape[1:] for video in processed}) > 1:
            raise ValueError(
                "The frames of all videos of a batch must have one size, got "
                f"{[tuple(video.shape[1:]) for video in processed]}; switch do_resize on."
            )
        counts = torch.tensor([len(video) for video in processed], dtype=torch.int64)
        data = {"pixel_values_videos": torch.cat(processed), "video_num_frames": counts}
        return BatchFeature(data, tensor_type=return_tensors)


def check_limits(least: int, largest: int) -> None:
    """Check that two limits of the number of frames do not contradict each other.

    Args:
        least: Least number of frames.
        largest: Largest number of frames, 0 for no limit.

    Raises:
        ValueError: They do.
    """
    if least > largest > 0:
        raise ValueError(f"min_frames={least} is above max_frames={largest}; lower the first or raise the second.")


def pil_filter(resample: Any) -> int:
    """Turn any way to name a filter into PIL's number.

    Args:
        resample: PIL filter, number, torchvision mode or None.

    Returns:
        PIL's number of the filter; bicubic for None.
    """
    if resample is None:
        return int(PILImageResampling.BICUBIC)
    name = getattr(resample, "value", resample)
    return int(PILImageResampling[name.upper()]) if isinstance(name, str) else int(name)
