"""Images of LongVU: one square picture for each of the two towers."""

from typing import Any

import torch
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
    PILImageResampling,
    SizeDict,
)
from transformers.processing_utils import ImagesKwargs

from longvideo.processing.longvu.tower_pixels import exact_size, square_pixels, tower_settings
from longvideo.processing.shared.image_inputs import ImageInputs
from longvideo.processing.shared.video_options import pil_filter


class LongVUImageProcessorKwargs(ImagesKwargs, total=False):
    """Options of the image processor beside the usual ones, which are those of SigLIP.

    Attributes:
        dino_size: Height and width of DINOv2's pictures in pixels.
        dino_image_mean: Mean of DINOv2's pixels, also the colour of its bars.
        dino_image_std: Standard deviation of DINOv2's pixels.
    """

    dino_size: dict | None
    dino_image_mean: float | list | tuple | None
    dino_image_std: float | list | tuple | None


class LongVUImageProcessor(ImageInputs, TorchvisionBackend):
    """Pads images to squares, resizes and normalises them, once for each tower.

    Output: `pixel_values` (images, C, S, S) for SigLIP, `pixel_values_dino` (images, C, S', S') for DINOv2, and
    `image_sizes` (images, 2) int64, (width, height) in pixels of the images before padding.

    Source: LongVU `process_images` with `image_aspect_ratio` "pad".
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
    model_input_names = ["pixel_values", "pixel_values_dino", "image_sizes"]
    valid_kwargs = LongVUImageProcessorKwargs

    def preprocess(self, images: Any, *args: Any, **kwargs: Any) -> BatchFeature:
        """Turn images into pixels of both towers.

        Args:
            images: One image, a list, or a list of lists: PIL pictures, arrays, tensors, paths, URLs.
            **kwargs: Options of the class by name, `return_tensors`.

        Returns:
            `pixel_values`, `pixel_values_dino` and `image_sizes`.

        Raises:
            ValueError: An option or an image has an unexpected value.
        """
        images = self.fetch_images(images)
        settings = tower_settings(lambda name: kwargs[name] if kwargs.get(name) is not None else getattr(self, name))
        siglip, dino = (
            super(LongVUImageProcessor, self).preprocess(images, *args, **{**kwargs, **own}) for own in settings
        )
        siglip["pixel_values_dino"] = dino["pixel_values"]
        return siglip

    def _preprocess(
        self,
        images: list[torch.Tensor],
        *,
        do_resize: bool,
        size: SizeDict,
        resample: Any = None,
        do_pad: bool | None = None,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: Any,
        image_std: Any,
        return_tensors: Any = None,
        **kwargs: Any,
    ) -> BatchFeature:
        target = exact_size(size) if do_resize else None
        if do_resize and target is None:
            raise ValueError(f"The size of an image must have height and width in pixels, got {dict(size)}.")
        pixels = []
        for image_CHW in images:
            square_1CSS = square_pixels(
                image_CHW[None],
                image_mean=image_mean,
                size=target,
                resample=pil_filter(resample),
                do_pad=do_pad,
                is_bytes=bool(do_rescale),
            )
            pixels.append(
                self.rescale_and_normalize(
                    square_1CSS, do_rescale, rescale_factor, do_normalize, image_mean, image_std
                )
            )
        shapes = sorted({tuple(picture.shape[1:]) for picture in pixels})
        if len(shapes) > 1:
            raise ValueError(f"Without resizing all images must have one size, got {shapes}; switch do_resize on.")
        sizes = torch.tensor([[image.shape[2], image.shape[1]] for image in images], dtype=torch.int64)
        return BatchFeature({"pixel_values": torch.cat(pixels), "image_sizes": sizes}, tensor_type=return_tensors)
