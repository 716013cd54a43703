"""Video processors that stretch every frame to one size: reading of files and pixels."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_utils import PILImageResampling, SizeDict
from transformers.video_utils import VideoMetadata

from longvideo.processing.shared.frame_sampling import clip_range
from longvideo.processing.shared.pixels import resize_exact
from longvideo.processing.shared.video_io import SourceVideoMetadata, read_video
from longvideo.processing.shared.video_options import pil_filter


class CallOptions:
    """Options of a processor that a call may replace."""

    def option(self, name: str, call: Mapping[str, Any]) -> Any:
        """Look up an option, first among those given at call time.

        Args:
            name: Name of the option.
            call: Options given at call time.

        Returns:
            Its value, or None.
        """
        return call[name] if call.get(name) is not None else getattr(self, name, None)


class StretchedVideos(CallOptions):
    """Reads files at the size of the tower and normalises frames; to be named before `BaseVideoProcessor`.

    A video processor has its options as attributes and says with `join_videos` how a batch is laid out, and with
    `cut_range` which frames lie between two times.
    """

    cut_range = staticmethod(clip_range)

    def join_videos(self, videos: list[torch.Tensor]) -> dict[str, Any]:
        """Lay out the videos of a batch.

        Args:
            videos: (F, C, S, S) pixels of each.

        Returns:
            Outputs by name.
        """
        raise NotImplementedError

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
            (F, C, H, W) uint8 frames and where they come from; frames that are only stretched have their final size.

        Raises:
            FileNotFoundError: No such file.
            ValueError: A video cannot be read.
        """
        size, resample = self.option("size", call), self.option("resample", call)
        height, width = (
            (size.get("height"), size.get("width")) if isinstance(size, Mapping | SizeDict) else (None, None)
        )
        is_exact = self.option("do_resize", call) and height and width and resample == PILImageResampling.BICUBIC
        frames, facts = read_video(
            source,
            sample_indices_fn=choose,
            size=(height, width) if is_exact else None,
            start=options.get("start"),
            end=options.get("end"),
            backend=self.option("video_backend", call),
            num_threads=self.option("num_threads", call),
            progress=self.option("progress", call),
            cut_range=self.cut_range,
        )
        return torch.from_numpy(frames).permute(0, 3, 1, 2), facts

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
        return BatchFeature(self.join_videos(processed), tensor_type=return_tensors)
