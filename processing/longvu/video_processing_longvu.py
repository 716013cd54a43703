"""Videos of LongVU: which frames are read, and their pixels for both towers."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
    ChannelDimension,
    PILImageResampling,
    SizeDict,
)
from transformers.video_processing_utils import BaseVideoProcessor
from transformers.video_utils import VideoMetadata

from longvideo.processing.longvu.tower_pixels import exact_size, square_pixels, tower_settings
from longvideo.processing.longvu.video_size import size_pair
from longvideo.processing.longvu.video_windows import VideoWindows
from longvideo.processing.shared.frame_sampling import (
    check_rate,
    fps_indices,
    num_frames_indices,
    stride_indices,
    thin_evenly,
)
from longvideo.processing.shared.stretched_videos import CallOptions
from longvideo.processing.shared.video_io import SourceVideoMetadata, opened_video
from longvideo.processing.shared.video_options import (
    ReadingKwargs,
    check_available,
    check_limits,
    keeps_every_frame,
    list_sources,
    pil_filter,
    read_array,
    sampling_wishes,
)

FPS_RULES = ("stride", "rounded_stride", "even")


class LongVUVideoProcessorKwargs(ReadingKwargs, total=False):
    """Options of the video processor beside those of every one; sizes, means and deviations are those of SigLIP.

    Attributes:
        dino_size: Height and width of DINOv2's frames in pixels.
        dino_image_mean: Mean of DINOv2's pixels, also the colour of its bars.
        dino_image_std: Standard deviation of DINOv2's pixels.
        fps_rule: "stride" (every round(rate / fps)-th frame from the first), "rounded_stride" (the rate is rounded
            first) or "even" (rate times seconds frames, at the middle of equal parts).
        thin_above: When more frames than this were chosen, only every (count // thin_above)-th of them stays.
        min_frames: Least number of frames.
        max_frames: Largest number of frames, thinned out evenly; 0 or None for no limit.
        video_size_order: What `video_sizes` holds: "width_height", "height_width", or "original" for the order that
            the published weights were trained with: (height, width) for video files and arrays, (width, height) for
            gifs, folders and lists of pictures.
        window_size: Frames per window; nothing is decoded, and `video_windows` is given in place of pixels.
    """

    dino_size: dict | None
    dino_image_mean: float | list | tuple | None
    dino_image_std: float | list | tuple | None
    fps_rule: str | None
    thin_above: int | None
    video_size_order: str | None
    window_size: int | None


class LongVUVideoProcessor(CallOptions, BaseVideoProcessor):
    """Reads and samples videos, pads frames to squares, resizes and normalises them, once for each tower.

    Files and addresses are always sampled; arrays, tensors and lists of frames count as already sampled unless
    sampling is asked for (`num_frames`, `fps`, `min_frames`, `max_frames`, `do_sample_frames=True`) or their metadata
    gives the frame rate without `frames_indices`. `do_sample_frames=False` keeps every frame of any source.
    Without other wishes there is one frame per second and no limit on their number.

    Output: `pixel_values_videos` (frames of all videos, C, S, S) for SigLIP, `pixel_values_videos_dino` (the same
    frames, C, S', S') for DINOv2, `video_num_frames` (videos,) int64, `video_sizes` (videos, 2) int64, what the model
    reads as (width, height) before padding; `video_metadata` on request. With `window_size` there are no pixels but
    `video_windows`, one iterator per video as `iterate_windows` gives it.

    Source: LongVU demo (sampling), `process_images` (pixels).
    Differs: the releases pass (height, width) of decoded videos where the model reads (width, height), so the columns
        of a landscape video are cut and not its bars. They were trained so; "width_height" is for weights of your own.
    """

    resample = PILImageResampling.BICUBIC
    image_mean = IMAGENET_STANDARD_MEAN
    image_std = IMAGENET_STANDARD_STD
    size = {"height": 384, "width": 384}
    dino_image_mean = IMAGENET_DEFAULT_MEAN
    dino_image_std = IMAGENET_DEFAULT_STD
    dino_size = {"height": 378, "width": 378}
    do_pad = True
    do_resize = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True
    do_sample_frames = None
    fps_rule = "stride"
    thin_above = None
    min_frames = None
    max_frames = None
    video_size_order = "original"
    video_backend = "auto"
    num_threads = 0
    progress = None
    video_options = None
    model_input_names = ["pixel_values_videos", "pixel_values_videos_dino", "video_num_frames", "video_sizes"]
    valid_kwargs = LongVUVideoProcessorKwargs

    def preprocess(self, videos: Any, **kwargs: Any) -> BatchFeature:
        """Turn videos into normalised frames of both towers.

        Args:
            videos: One video or nested lists of them: path, address, folder or list of frame pictures, list of PIL
                pictures, array or tensor (F, H, W, C) or (F, C, H, W).
            **kwargs: Options of the class by name, `video_metadata`, `return_metadata`, `return_tensors`.

        Returns:
            `pixel_values_videos`, `pixel_values_videos_dino`, `video_num_frames`, `video_sizes`.

        Raises:
            FileNotFoundError: No such file.
            ValueError: A video cannot be read, or the options do not fit it.
        """
        window_size = kwargs.pop("window_size", None)
        sources = list_sources(
            videos, metadata=kwargs.pop("video_metadata", None), options=kwargs.pop("video_options", None)
        )
        if window_size is not None:
            windows = [
                self.iterate_windows(source, window_size, video_metadata=known, video_options=[own], **kwargs)
                for source, known, own in sources
            ]
            return self.window_outputs(windows, kwargs)
        towers, facts, sizes = ([], []), [], []
        for source, known, own in sources:
            with ExitStack() as resources:
                frames, metadata = self.open_source(source, known, own, call=kwargs, resources=resources)
                for tower, pixels in zip(
                    towers, self.gather(frames, len(metadata.frames_indices), kwargs), strict=True
                ):
                    tower.append(pixels)
            facts.append(metadata)
            sizes.append(size_pair(source, metadata, self.option("video_size_order", kwargs)))
        outputs = self.tower_outputs(towers, facts, kwargs)
        outputs["video_sizes"] = torch.stack(sizes)
        return outputs.convert_to_tensors(kwargs.get("return_tensors"))

    def iterate_windows(
        self,
        video: Any,
        window_size: int = 16,
        *,
        start: float | None = None,
        end: float | None = None,
        **kwargs: Any,
    ) -> VideoWindows:
        """Read one video window by window, decoded on the way; only one window of pixels is in memory.

        Args:
            video: One video, as for `preprocess`.
            window_size: Frames per window.
            start: Begin of the cut in seconds.
            end: End of the cut in seconds.
            **kwargs: Options of `preprocess`.

        Returns:
            Iterator over dicts with `pixel_values_videos` and `pixel_values_videos_dino` of consecutive frames; its
            attributes `num_frames`, `video_size` and `metadata` are known from the begin.

        Raises:
            FileNotFoundError: No such file.
            ValueError: Not one video, a window without frames, or as for `preprocess`.
        """
        if window_size < 1:
            raise ValueError(f"window_size={window_size}, expected at least 1 frame.")
        reopen = partial(self.iterate_windows, video, window_size, start=start, end=end, **kwargs)
        sources = list_sources(
            video, metadata=kwargs.pop("video_metadata", None), options=kwargs.pop("video_options", None)
        )
        if len(sources) != 1:
            raise ValueError(f"Windows are read of one video at a time, got {len(sources)} videos.")
        source, known, own = sources[0]
        own.update({name: value for name, value in (("start", start), ("end", end)) if value is not None})
        kwargs.pop("return_tensors", None)
        with ExitStack() as resources:
            frames, metadata = self.open_source(source, known, own, call=kwargs, resources=resources)

            def to_pixels(window: list[torch.Tensor]) -> dict[str, torch.Tensor]:
                siglip, dino = self.gather(iter(window), len(window), kwargs)
                outputs = self.tower_outputs(([siglip], [dino]), [metadata], kwargs)
                return {name: outputs[name] for name in ("pixel_values_videos", "pixel_values_videos_dino")}

            return VideoWindows(
                frames,
                to_pixels,
                window_size=window_size,
                metadata=metadata,
                video_size=size_pair(source, metadata, self.option("video_size_order", kwargs)),
                resources=resources.pop_all(),
                reopen=reopen,
            )

    def window_outputs(self, windows: list[VideoWindows], call: Mapping[str, Any]) -> BatchFeature:
        """Say what is known of videos before they are decoded.

        Args:
            windows: One iterator per video.
            call: Options given at call time.

        Returns:
            `video_windows`, `video_num_frames`, `video_sizes`, and `video_metadata` on request.
        """
        outputs = BatchFeature({"video_num_frames": torch.tensor([video.num_frames for video in windows])})
        outputs["video_sizes"] = torch.stack([video.video_size for video in windows])
        outputs = outputs.convert_to_tensors(call.get("return_tensors"))
        outputs["video_windows"] = windows
        if call.get("return_metadata"):
            outputs["video_metadata"] = [video.metadata for video in windows]
        return outputs

    def sampling_rule(self, options: Mapping[str, Any], call: Mapping[str, Any]) -> dict[str, Any]:
        """Join the sampling wishes of a video block, of the call and of the processor; the nearest one wins.

        Args:
            options: Wishes of this video.
            call: Wishes of the call.

        Returns:
            `num_frames` or `fps` or neither, `min_frames`, `max_frames`, `fps_rule`, `thin_above`, and `asked`:
            whether the video or the call had a wish.

        Raises:
            ValueError: `num_frames` and `fps` exclude each other.
        """
        rule = sampling_wishes(options, call, vars(self))
        return {**rule, **{name: self.option(name, call) for name in ("fps_rule", "thin_above")}}

    def sample_frames(
        self,
        metadata: VideoMetadata,
        num_frames: int | None = None,
        fps: float | None = None,
        min_frames: int | None = None,
        max_frames: int | None = None,
        fps_rule: str | None = None,
        thin_above: int | None = None,
        **kwargs: Any,
    ) -> np.ndarray:
        """Choose the frames of a video.

        Args:
            metadata: Needs `total_num_frames`, and `fps` unless `num_frames` is given.
            num_frames: Wanted number of frames, evenly spread.
            fps: Wanted frames per second, 1 when neither is given.
            min_frames: Least number of frames.
            max_frames: Largest number of frames.
            fps_rule: One of `FPS_RULES`.
            thin_above: See `LongVUVideoProcessorKwargs`.

        Returns:
            (F,) int64 zero-based indices.

        Raises:
            ValueError: More frames are asked for than there are, or the frame rate is needed and not known.
        """
        check_available(num_frames, metadata.total_num_frames)
        wishes = {"num_frames": num_frames, "fps": fps, "min_frames": min_frames, "max_frames": max_frames}
        return self.choose_frames(
            metadata, self.sampling_rule(wishes, {"fps_rule": fps_rule, "thin_above": thin_above})
        )

    def choose_frames(self, metadata: VideoMetadata, rule: Mapping[str, Any]) -> np.ndarray:
        """Choose the frames of a video; wishes for more than there are are cut down with a warning.

        Args:
            metadata: As for `sample_frames`.
            rule: Values of `sampling_rule`.

        Returns:
            (F,) int64 zero-based indices.

        Raises:
            ValueError: Unknown rule, contradicting limits, or the frame rate is needed and not known.
        """
        total = metadata.total_num_frames
        if rule["num_frames"] is not None:
            return num_frames_indices(total, rule["num_frames"])
        least, largest = ((self.option(name, rule) or 0) for name in ("min_frames", "max_frames"))
        if rule["min_frames"] is not None and rule["max_frames"] is not None:
            check_limits(least, largest)
        elif rule["min_frames"] is not None and least > largest:
            largest = 0  # a default gives way to a wish
        name, rate, fps = rule["fps_rule"], check_rate(metadata.fps), rule["fps"] or 1.0
        if name not in FPS_RULES:
            raise ValueError(f"Unknown fps_rule {name!r}, expected one of {', '.join(FPS_RULES)}.")
        if name == "even":
            indices = fps_indices(total, rate, fps=fps)
        else:
            indices = stride_indices(total, rate, fps=fps, round_rate=name == "rounded_stride")
        if rule["thin_above"] and len(indices) > rule["thin_above"]:
            indices = indices[:: len(indices) // rule["thin_above"]]
        if len(indices) < least:
            indices = num_frames_indices(total, min(least, total))
        return thin_evenly(indices, largest)

    def open_source(
        self,
        source: Any,
        metadata: VideoMetadata | None,
        options: Mapping[str, Any],
        *,
        call: Mapping[str, Any],
        resources: ExitStack,
    ) -> tuple[Iterator[torch.Tensor], SourceVideoMetadata]:
        """Choose the frames of one video and give them one by one.

        Args:
            source: Path, address, list of picture paths, or (F, ...) array or tensor.
            metadata: What the caller knows about an array, or None.
            options: Wishes of this video.
            call: Wishes of the call.
            resources: Takes the open file.

        Returns:
            Iterator over (C, H, W) frames at the size of the source, and where they come from.
        """
        rule, do_sample = self.sampling_rule(options, call), self.option("do_sample_frames", call)
        if isinstance(source, np.ndarray | torch.Tensor):
            frames_FCHW, facts = read_array(
                source,
                metadata=metadata,
                options=options,
                rule=rule,
                do_sample=do_sample,
                data_format=call.get("input_data_format"),
                choose=lambda known: self.choose_frames(known, rule),
            )
            # The size that counts is that of the frames, whatever the metadata say about their source.
            facts.height, facts.width = frames_FCHW.shape[-2:]
            return iter(frames_FCHW), facts
        keep_all = keeps_every_frame(source, do_sample)
        facts, frames = resources.enter_context(
            opened_video(
                source,
                sample_indices_fn=lambda known: (
                    np.arange(known.total_num_frames) if keep_all else self.choose_frames(known, rule)
                ),
                start=options.get("start"),
                end=options.get("end"),
                backend=self.option("video_backend", call),
                num_threads=self.option("num_threads", call),
                progress=self.option("progress", call),
            )
        )
        # A copy where torch would warn about arrays that must not be written to.
        writable = (np.require(frame, requirements=["C", "W"]) for frame in frames)
        return (torch.from_numpy(frame).permute(2, 0, 1) for frame in writable), facts

    def gather(
        self, frames: Iterator[torch.Tensor], count: int, call: Mapping[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Bring each frame to the size of both towers as soon as it is there, so that no large frame is held.

        Args:
            frames: (C, H, W) frames.
            count: Number of frames.
            call: Options given at call time.

        Returns:
            (F, C, S, S) and (F, C, S', S') frames, not normalised; at the size of the source where the options say
            so.
        """
        settings = tower_settings(lambda name: self.option(name, call))
        resample, do_resize = pil_filter(self.option("resample", call)), self.option("do_resize", call)
        towers: list[torch.Tensor] = []
        for place, frame_CHW in enumerate(frames):
            for index, own in enumerate(settings):
                size = exact_size(own["size"]) if do_resize else None
                pixels = frame_CHW[None]
                # Other numbers of channels are turned into RGB first, for all frames at once.
                if size is not None and len(frame_CHW) == 3:
                    pixels = square_pixels(
                        pixels,
                        image_mean=own["image_mean"],
                        size=size,
                        resample=resample,
                        do_pad=self.option("do_pad", call),
                        is_bytes=bool(self.option("do_rescale", call)),
                    )
                if place == 0:
                    towers.append(pixels.new_empty((count, *pixels.shape[1:])))
                towers[index][place] = pixels[0]
        return towers[0], towers[1]

    def tower_outputs(
        self,
        towers: tuple[list[torch.Tensor], list[torch.Tensor]],
        facts: list[SourceVideoMetadata],
        call: Mapping[str, Any],
    ) -> BatchFeature:
        """Finish the pixels of both towers.

        Args:
            towers: (F, C, H, W) frames of each video for SigLIP and for DINOv2.
            facts: Metadata of each video.
            call: Options given at call time.

        Returns:
            The outputs without `video_sizes`.
        """
        call = {name: value for name, value in call.items() if name not in ("input_data_format", "return_tensors")}
        call.update(do_sample_frames=False, input_data_format=ChannelDimension.FIRST, video_metadata=facts)
        settings = tower_settings(lambda name: self.option(name, call))
        outputs = super().preprocess(towers[0], **{**call, **settings[0]})
        # Cropping and the size that it needs are the usual options, which are SigLIP's.
        own = {**settings[1], "do_center_crop": False, "return_metadata": False}
        outputs["pixel_values_videos_dino"] = super().preprocess(towers[1], **{**call, **own})["pixel_values_videos"]
        return outputs

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
        do_pad: bool | None = None,
        do_convert_rgb: bool | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        processed = []
        for frames_FCHW in videos:
            if do_convert_rgb and frames_FCHW.shape[1] != 3:
                frames_FCHW = self.convert_to_rgb(frames_FCHW)
            frames_FCHW = square_pixels(
                frames_FCHW,
                image_mean=image_mean,
                size=exact_size(size) if do_resize else None,
                resample=pil_filter(resample),
                do_pad=do_pad,
                is_bytes=bool(do_rescale),
            )
            if do_resize and exact_size(size) is None:
                frames_FCHW = self.resize(frames_FCHW, size=size, resample=resample)
            if do_center_crop:
                frames_FCHW = self.center_crop(frames_FCHW, crop_size)
            processed.append(
                self.rescale_and_normalize(
                    frames_FCHW, do_rescale, rescale_factor, do_normalize, image_mean, image_std
                )
            )
        shapes = sorted({tuple(video.shape[1:]) for video in processed})
        if len(shapes) > 1:
            raise ValueError(
                f"The frames of all videos of a batch must have one size, got {shapes}; switch do_resize on."
            )
        counts = torch.tensor([len(video) for video in processed], dtype=torch.int64)
        return BatchFeature({"pixel_values_videos": torch.cat(processed), "video_num_frames": counts})
