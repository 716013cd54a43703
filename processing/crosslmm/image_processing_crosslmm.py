"""Images of CrossLMM: one square picture each, stretched, which counts as a video of one frame."""

from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_utils import IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD, PILImageResampling

from longvideo.processing.shared.stretched_images import StretchedImages


class CrossLMMImageProcessor(StretchedImages, TorchvisionBackend):
    """Stretches images to the size of the tower and normalises them; there are no tiles.

    Output: `pixel_values` (images, C, S, S).

    Source: CrossLMM Table 3 (384 pixels); stretching as the SigLIP2 tower was trained.
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
