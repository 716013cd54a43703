"""Images of VideoChat-Flash: the whole picture as one tile, followed by a grid of tiles at a larger size."""

from typing import Any

import torch
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    PILImageResampling,
    SizeDict,
)
from transformers.processing_utils import ImagesKwargs

from longvideo.processing.shared.image_inputs import ImageInputs
from longvideo.processing.shared.pixels import best_resolution, cut_tiles, pad_to_square, resize_exact

ASPECT_RATIOS = ("anyres_nopad", "pad", "square")
MAX_GRID = 6


class VideoChatFlashImageProcessorKwargs(ImagesKwargs, total=False):
    """Options of the image processor beside the usual ones.

    Attributes:
        image_aspect_ratio: "anyres_nopad" (whole picture and grid of tiles), "pad" (one tile, padded to a square with
            the mean colour) or "square" (one tile, stretched).
        multi_image_aspect_ratio: The same for samples with several images.
        image_grid_pinpoints: Candidate (width, height) pairs in pixels; None for all up to 6 x 6 tiles.
        images_per_sample: Number of images of each sample when the images come as a flat list.
    """

    image_aspect_ratio: str | None
    multi_image_aspect_ratio: str | None
    image_grid_pinpoints: list | None
    images_per_sample: list | None


class VideoChatFlashImageProcessor(ImageInputs, TorchvisionBackend):
    """Turns images into tiles of one size and says how many rows and columns each image has.

    Output: `pixel_values` (tiles of all images, C, S, S) and `image_grids` (images, 2) int64 with (rows, cols) of the
    grid behind the whole-picture tile; an image has 1 + rows * cols tiles, (0, 0) means one tile only.

    Source: VideoChat-Flash `process_images` with `image_aspect_ratio` "anyres_nopad".
    """

    resample = PILImageResampling.BICUBIC
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    size = {"height": 224, "width": 224}
    do_resize = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True
    image_aspect_ratio = "anyres_nopad"
    multi_image_aspect_ratio = "pad"
    image_grid_pinpoints = None
    images_per_sample = None
    model_input_names = ["pixel_values", "image_grids"]
    valid_kwargs = VideoChatFlashImageProcessorKwargs

    def preprocess(self, images: Any, *args: Any, **kwargs: Any) -> BatchFeature:
        """Turn images into tiles.

        Args:
            images: One image, a list, or a list of lists (one per sample): PIL pictures, arrays, tensors, paths, URLs.
            **kwargs: Options of the class by name, `return_tensors`.

        Returns:
            `pixel_values` and `image_grids`.

        Raises:
            ValueError: An option or an image has an unexpected value.
        """
        nested = isinstance(images, list | tuple) and any(isinstance(entry, list | tuple) for entry in images)
        if nested and kwargs.get("images_per_sample") is None:
            kwargs["images_per_sample"] = [len(entry) if isinstance(entry, list | tuple) else 1 for entry in images]
        return super().preprocess(images, *args, **kwargs)

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
        image_aspect_ratio: str | None = None,
        multi_image_aspect_ratio: str | None = None,
        image_grid_pinpoints: list | None = None,
        images_per_sample: list | None = None,
        return_tensors: Any = None,
        **kwargs: Any,
    ) -> BatchFeature:
        samples = images_per_sample or [1] * len(images)
        if sum(samples) != len(images):
            raise ValueError(f"images_per_sample={samples} adds up to {sum(samples)}, but {len(images)} images came.")
        ratios = [
            image_aspect_ratio if count == 1 else multi_image_aspect_ratio for count in samples for _ in range(count)
        ]
        tiles, grids = [], []
        for image_CHW, ratio in zip(images, ratios, strict=True):
            tiles_NCHW, grid = image_CHW[None], (0, 0)
            if do_resize:
                tiles_NCHW, grid = self.tile_image(
                    image_CHW,
                    size=size,
                    ratio=ratio,
                    pinpoints=image_grid_pinpoints,
                    resample=resample,
                    image_mean=image_mean,
                )
            tiles.append(
                self.rescale_and_normalize(tiles_NCHW, do_rescale, rescale_factor, do_normalize, image_mean, image_std)
            )
            grids.append(grid)
        if len({tile.shape[1:] for tile in tiles}) > 1:
            raise ValueError(
                f"Without resizing all images must have one size, got {[tuple(tile.shape[1:]) for tile in tiles]}."
            )
        data = {"pixel_values": torch.cat(tiles), "image_grids": torch.tensor(grids, dtype=torch.int64)}
        return BatchFeature(data=data, tensor_type=return_tensors)

    def tile_image(
        self,
        image_CHW: torch.Tensor,
        *,
        size: Any,
        ratio: str,
        pinpoints: list | None = None,
        resample: Any = None,
        image_mean: Any = None,
    ) -> tuple[torch.Tensor, tuple[int, int]]:
        """Resize one image and cut it into tiles.

        Args:
            image_CHW: (C, H, W) image, uint8 for results equal to the original's.
            size: Size of a tile with `height` and `width` in pixels.
            ratio: One of `ASPECT_RATIOS`.
            pinpoints: Candidate (width, height) pairs in pixels, None for all up to 6 x 6 tiles.
            resample: PIL filter, None for bicubic.
            image_mean: Colour of the bars of "pad", from 0 to 1, one value or one per channel; None for the class's.

        Returns:
            (tiles, C, height, width), the whole picture first, and (rows, cols) of the grid, (0, 0) without one.

        Raises:
            ValueError: Unknown ratio, a size without height and width, or a candidate that is not made of whole tiles.

        Source: VideoChat-Flash `process_anyres_image_nopad`.
        """
        if ratio not in ASPECT_RATIOS:
            raise ValueError(f"Unknown image_aspect_ratio {ratio!r}, expected one of {', '.join(ASPECT_RATIOS)}.")
        height, width = tile_size(size)
        chosen = int(resample) if resample is not None else int(PILImageResampling.BICUBIC)
        if ratio == "pad":
            scale = 255 if image_CHW.dtype == torch.uint8 else 1
            mean = self.image_mean if image_mean is None else image_mean
            channels = [mean] * image_CHW.shape[0] if isinstance(mean, int | float) else mean[: image_CHW.shape[0]]
            color = [int(channel * scale) if scale > 1 else channel for channel in channels]
            image_CHW = pad_to_square(image_CHW, color)
        whole_NCHW = resize_exact(image_CHW[None], height, width, resample=chosen)
        if ratio != "anyres_nopad":
            return whole_NCHW, (0, 0)
        full_width, full_height = best_resolution(
            image_CHW.shape[2], image_CHW.shape[1], pinpoints or default_pinpoints(height, width)
        )
        enlarged_CHW = resize_exact(image_CHW[None], full_height, full_width, resample=chosen)[0]
        grid_NCHW = cut_tiles(enlarged_CHW, height, width)
        return torch.cat([whole_NCHW, grid_NCHW]), (full_height // height, full_width // width)

    def get_number_of_tiles(
        self, height: int, width: int, images_kwargs: dict | None = None, *, num_images: int = 1
    ) -> int:
        """Say how many tiles an image of a given size becomes.

        Args:
            height: Height of the image in pixels.
            width: Width of the image in pixels.
            images_kwargs: Options given at call time.
            num_images: Number of images of its sample; several are tiled by another rule than one alone.

        Returns:
            Number of tiles, the whole-picture tile included.
        """
        options = images_kwargs or {}
        rule = "image_aspect_ratio" if num_images == 1 else "multi_image_aspect_ratio"
        if (options.get(rule) or getattr(self, rule)) != "anyres_nopad":
            return 1
        tile_height, tile_width = tile_size(options.get("size") or self.size)
        pinpoints = options.get("image_grid_pinpoints") or self.image_grid_pinpoints
        full_width, full_height = best_resolution(
            width, height, pinpoints or default_pinpoints(tile_height, tile_width)
        )
        return 1 + (full_height // tile_height) * (full_width // tile_width)


def tile_size(size: Any) -> tuple[int, int]:
    """Read height and width of a tile.

    Args:
        size: Mapping or `SizeDict` with `height` and `width` in pixels.

    Returns:
        (height, width).

    Raises:
        ValueError: One of them is missing.
    """
    height, width = size.get("height"), size.get("width")
    if not height or not width:
        raise ValueError(f"The size of image tiles must have height and width in pixels, got {dict(size)}.")
    return int(height), int(width)


def default_pinpoints(height: int, width: int) -> list[tuple[int, int]]:
    """List all grids of up to 6 x 6 tiles.

    Args:
        height: Height of a tile in pixels.
        width: Width of a tile in pixels.

    Returns:
        (width, height) pairs, the number of columns changing slowest.
    """
    return [(cols * width, rows * height) for cols in range(1, MAX_GRID + 1) for rows in range(1, MAX_GRID + 1)]
