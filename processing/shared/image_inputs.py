"""Images in any form, brought to tensors."""

from os import PathLike, fspath
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.image_utils import ChannelDimension, infer_channel_dimension_format, is_valid_image, load_image


def load_images(images: Any) -> Any:
    """Load paths and addresses with PIL, whose JPEG decoder the originals used; leave loaded images alone.

    Args:
        images: Image, path, address, or nested lists of them.

    Returns:
        The same structure with loaded images.

    Raises:
        TypeError: Something that is not an image.
    """
    if isinstance(images, list | tuple):
        return [load_images(entry) for entry in images]
    if isinstance(images, str | PathLike):
        return load_image(fspath(images))
    if is_valid_image(images):
        return images
    raise TypeError(f"Expected an image, a path, an address, or lists of them, got {type(images).__name__}.")


def image_to_tensor(
    image: Any,
    *,
    do_convert_rgb: bool | None = None,
    data_format: str | ChannelDimension | None = None,
    device: "torch.device | str | None" = None,
) -> torch.Tensor:
    """Bring one image into the form (C, H, W), three channels with `do_convert_rgb`.

    Args:
        image: PIL picture, array or tensor.
        do_convert_rgb: Whether to turn other modes (grey, palette, alpha) into RGB.
        data_format: "channels_first" or "channels_last" for arrays; guessed when None.
        device: Where the result lies.

    Returns:
        (C, H, W) tensor with the values of the image.
    """
    if isinstance(image, Image.Image):
        pixels = torch.from_numpy(np.array(image.convert("RGB") if do_convert_rgb else image))
        data_format = ChannelDimension.LAST
    else:
        # A copy where torch would warn about arrays that must not be written to.
        pixels = torch.as_tensor(np.require(image, requirements="W") if isinstance(image, np.ndarray) else image)
    if pixels.ndim == 2:
        pixels, data_format = pixels[None], ChannelDimension.FIRST
    if data_format is None:
        data_format = infer_channel_dimension_format(pixels, num_channels=(1, 3, 4))
    if ChannelDimension(data_format) == ChannelDimension.LAST:
        pixels = pixels.permute(2, 0, 1)
    if do_convert_rgb and pixels.shape[0] != 3:
        pixels = pixels[:1].expand(3, -1, -1) if pixels.shape[0] < 3 else pixels[:3]
    return pixels.contiguous().to(device) if device is not None else pixels.contiguous()


class ImageInputs:
    """How image processors read images of any form; to be named before the base class of transformers."""

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Load paths and addresses with PIL, whose JPEG decoder the originals used; leave loaded images alone.

        Args:
            image_url_or_urls: Image, path, address, or nested lists of them.

        Returns:
            The same structure with loaded images.
        """
        return load_images(image_url_or_urls)

    def process_image(
        self,
        image: Any,
        do_convert_rgb: bool | None = None,
        input_data_format: str | ChannelDimension | None = None,
        device: "torch.device | None" = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Bring one image into the form (C, H, W), three channels with `do_convert_rgb`.

        Args:
            image: PIL picture, array or tensor.
            do_convert_rgb: Whether to turn other modes (grey, palette, alpha) into RGB.
            input_data_format: "channels_first" or "channels_last" for arrays; guessed when None.
            device: Where the result lies.

        Returns:
            (C, H, W) tensor with the values of the image.
        """
        return image_to_tensor(image, do_convert_rgb=do_convert_rgb, data_format=input_data_format, device=device)
