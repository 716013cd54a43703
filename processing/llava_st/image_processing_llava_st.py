"""Images of LLaVA-ST: one square picture, stretched."""

from typing import Any

import torch
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_utils import (
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
    PILImageResampling,
    SizeDict,
)

from longvideo.processing.shared.image_inputs import ImageInputs
from longvideo.processing.shared.pixels import resize_exact
from longvideo.processing.shared.video_options import pil_filter


class LlavaSTImageProcessor(ImageInputs, TorchvisionBackend):
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
        sizes = torch.tensor([[image.shape[2], image.shape[1]] for image in images], dtype=torch.int64)
        return BatchFeature({"pixel_values": torch.cat(pixels), "image_sizes": sizes}, tensor_type=return_tensors)
