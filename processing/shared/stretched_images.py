"""Image processors that stretch every image to one size."""

from typing import Any

import torch
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_utils import SizeDict

from longvideo.processing.shared.image_inputs import ImageInputs
from longvideo.processing.shared.pixels import resize_exact
from longvideo.processing.shared.video_options import pil_filter


class StretchedImages(ImageInputs):
    """Stretches images to the size of the tower and normalises them; to be named before `TorchvisionBackend`."""

    def _preprocess(
        self,
        images: list[torch.Tensor],
        *,
        do_resize: bool,
        size: SizeDict,
        resample: Any = None,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: Any,
        image_std: Any,
        return_tensors: Any = None,
        **kwargs: Any,
    ) -> BatchFeature:
        if do_resize and not (size.height and size.width):
            raise ValueError(f"The size of an image must have height and width in pixels, got {dict(size)}.")
        pixels = []
        for image_CHW in images:
            frames_1CHW = image_CHW[None]
            if do_resize:
                frames_1CHW = resize_exact(frames_1CHW, size.height, size.width, resample=pil_filter(resample))
            pixels.append(
                self.rescale_and_normalize(
                    frames_1CHW, do_rescale, rescale_factor, do_normalize, image_mean, image_std
                )
            )
        shapes = sorted({tuple(picture.shape[1:]) for picture in pixels})
        if len(shapes) > 1:
            raise ValueError(f"Without resizing all images must have one size, got {shapes}; switch do_resize on.")
        data = {"pixel_values": torch.cat(pixels), **self.describe_images(images)}
        return BatchFeature(data, tensor_type=return_tensors)

    def describe_images(self, images: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Note what is to be known of the sources beside their pixels.

        Args:
            images: (C, H, W) each, before resizing.

        Returns:
            Further outputs by name.
        """
        return {}
