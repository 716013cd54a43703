"""Images of LLaVA-ST: one square picture, stretched."""

import torch
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_utils import (
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
    PILImageResampling,
)

from longvideo.processing.shared.stretched_images import StretchedImages


class LlavaSTImageProcessor(StretchedImages, TorchvisionBackend):
    """Stretches images to the size of the tower and normalises them.

    The aspect ratio is not kept, so fractions of a picture's width and height are the same before and after.

    Output: `pixel_values` (images, C, S, S) and `image_sizes` (images, 2) int64, (width, height) in pixels of the
    sources, which boxes of an answer are mapped back to.

    Source: `SigLipImageProcessor` of appletea233/LLaVA-ST.
    """

    resample = PILImageResampling.BICUBIC
    image_mean = IMAGENET_STANDARD_MEAN
    image_std = IMAGENET_STANDARD_STD
    size = {"height": 384, "width": 384}
    do_resize = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True
    model_input_names = ["pixel_values"]

    def describe_images(self, images: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Note the sizes of the sources.

        Args:
            images: (C, H, W) each, before resizing.

        Returns:
            `image_sizes` (images, 2) int64, (width, height) in pixels.
        """
        return {"image_sizes": torch.tensor([[image.shape[2], image.shape[1]] for image in images])}
