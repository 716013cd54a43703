"""How many positions images and videos of LLaVA-ST take in a prompt, and what stands there."""

from collections.abc import Mapping

from longvideo.processing.llava_st.tokenizer_llava_st import VISUAL_TOKENS


def num_image_positions(grid_size: int, *, spatial_factor: int = 3, use_downsample_image: bool = False) -> int:
    """Count the positions of an image.

    Args:
        grid_size: Patches along a side of the tower's picture.
        spatial_factor: Side of the square of patches that becomes one token.
        use_downsample_image: Whether images pass the packers too.

    Returns:
        Number of positions, first and last token included.
    """
    return (grid_size // spatial_factor if use_downsample_image else grid_size) ** 2


def num_fast_positions(num_frames: int, grid_size: int, *, spatial_factor: int = 3) -> int:
    """Count the positions of a video's fast block.

    Args:
        num_frames: Frames of the video.
        grid_size: Patches along a side of the tower's picture.
        spatial_factor: Side of the square that becomes one token, twice over.

    Returns:
        Number of positions, first and last token included.

    Raises:
        ValueError: The grid cannot be divided twice.
    """
    if grid_size < 1 or grid_size % spatial_factor**2:
        raise ValueError(
            f"A grid of {grid_size} x {grid_size} patches cannot be divided twice by spatial_factor {spatial_factor}. "
            "Use the size (height, width) and patch_size that the model was made with."
        )
    return num_frames * (grid_size // spatial_factor**2) ** 2


def num_slow_positions(num_frames: int, grid_size: int, *, spatial_factor: int = 3, temporal_factor: int = 5) -> int:
    """Count the positions of a video's slow block.

    Args:
        num_frames: Frames of the video.
        grid_size: Patches along a side of the tower's picture.
        spatial_factor: Side of the square of patches that becomes one token.
        temporal_factor: Frames that become one.

    Returns:
        Number of positions, first and last token included.

    Raises:
        ValueError: The frames are not a multiple of `temporal_factor`.
    """
    check_frame_count(num_frames, temporal_factor)
    return num_frames // temporal_factor * (grid_size // spatial_factor) ** 2


def check_frame_count(num_frames: int, temporal_factor: int) -> None:
    """Check that frames can be brought together evenly.

    Args:
        num_frames: Frames of a video.
        temporal_factor: Frames that become one.

    Raises:
        ValueError: There are none, or not a multiple.
    """
    if num_frames < 1 or num_frames % temporal_factor:
        raise ValueError(
            f"A video has {num_frames} frames, but {temporal_factor} frames become one (temporal_factor); give a "
            f"multiple of {temporal_factor}, best the number that the model was trained with (num_frames)."
        )


def write_block(num_positions: int, kind: str) -> str:
    """Write the tokens of a block.

    Args:
        num_positions: Positions in all.
        kind: "image", "video" (fast) or "slow_video".

    Returns:
        Start, patches, end.

    Raises:
        ValueError: There is no room for start and end.
    """
    if num_positions < 2:
        raise ValueError(
            f"The {kind} block has {num_positions} positions, but start and end take two; use a larger size or more "
            "frames."
        )
    patch = VISUAL_TOKENS["image_token_id" if kind == "image" else "video_token_id"]
    start, end = VISUAL_TOKENS[f"{kind}_start_token_id"], VISUAL_TOKENS[f"{kind}_end_token_id"]
    return start + patch * (num_positions - 2) + end


def grid_of_size(size: Mapping[str, int], patch_size: int) -> int:
    """Count the patches along a side.

    Args:
        size: `height` and `width` in pixels.
        patch_size: Side of a patch in pixels.

    Returns:
        Patches along a side; pixels that fill no patch are left out, as the tower does.

    Raises:
        ValueError: Height and width are missing or differ.
    """
    height, width = size.get("height"), size.get("width")
    if not height or height != width:
        raise ValueError(f"The tower sees squares, so size needs equal height and width in pixels, got {dict(size)}.")
    return int(height) // patch_size
