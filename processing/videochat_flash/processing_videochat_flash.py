"""The processor of VideoChat-Flash: messages with videos and images to model inputs."""

import math
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

from transformers.feature_extraction_utils import BatchFeature
from transformers.image_utils import make_flat_list_of_images
from transformers.processing_utils import MultiModalData, ProcessorMixin

from longvideo.processing.shared.chat_templates import load_chat_template
from longvideo.processing.shared.processor_calls import (
    IMAGE_TOKEN,
    VIDEO_TOKEN,
    check_expanded,
    count_token,
    placeholder_id,
)
from longvideo.processing.shared.timestamps import TIME_MESSAGE, format_time_message
from longvideo.processing.shared.visual_processor import VisualProcessor
from longvideo.processing.videochat_flash import register as _register

CHAT_TEMPLATE = "qwen_chatml"
# Tokenizers without a limit of their own carry a number of about 1e30.


class VideoChatFlashProcessor(VisualProcessor, ProcessorMixin):
    """Turns chat messages with videos and images into the inputs of VideoChat-Flash.

    A video becomes its visual placeholders, a line break and a sentence about duration and number of frames; an image
    becomes its placeholders and a line break. Everything that the video and the image processor accept can be given
    at call time (`processor_kwargs` of `apply_chat_template`); a video block of a message may carry its own `fps`,
    `nframes`, `min_frames`, `max_frames`, `video_start`, `video_end` (seconds), `timestamps` and `duration` (seconds)
    and `video_metadata`.

    Args:
        image_processor: `VideoChatFlashImageProcessor`.
        tokenizer: Tokenizer that knows the placeholder tokens.
        video_processor: `VideoChatFlashVideoProcessor`.
        chat_template: Jinja template; the packaged ChatML template when None.
        tokens_per_frame: Visual tokens per frame after merging.
        mm_local_num_frames: Frames per clip; the video processor's when None. An image tile takes the tokens of one
            clip.
        time_message: Sentence after a video, with the fields `{duration}` (seconds), `{num_frames}`, `{times}`; empty
            for none.

    Raises:
        ValueError: The tokenizer lacks a placeholder token, or the clip lengths disagree.

    Source: VideoChat-Flash inference code (`chat`), prompt and time message.
    """

    model_name = "VideoChat-Flash"
    image_entries = "image_grids"

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        video_processor: Any = None,
        chat_template: str | None = None,
        tokens_per_frame: int = 16,
        mm_local_num_frames: int | None = None,
        time_message: str = TIME_MESSAGE,
        **kwargs: Any,
    ) -> None:
        self.tokens_per_frame = tokens_per_frame
        self.time_message = time_message
        self.image_token = getattr(tokenizer, "image_token", None) or IMAGE_TOKEN
        self.video_token = getattr(tokenizer, "video_token", None) or VIDEO_TOKEN
        self.image_token_id = placeholder_id(tokenizer, self.image_token)
        self.video_token_id = placeholder_id(tokenizer, self.video_token)
        clip = getattr(video_processor, "mm_local_num_frames", None)
        self.mm_local_num_frames = mm_local_num_frames if mm_local_num_frames is not None else clip or 4
        if clip is not None and clip != self.mm_local_num_frames:
            raise ValueError(
                f"mm_local_num_frames is {self.mm_local_num_frames} in the processor and {clip} in the video "
                "processor; give both the same number of frames per clip."
            )
        if chat_template is None:
            chat_template = load_chat_template(CHAT_TEMPLATE)
        super().__init__(image_processor, tokenizer, video_processor, chat_template=chat_template)

    @property
    def training_chat_template(self) -> str:
        """The packaged template whose generation marks cover what the assistant says, for masks of training."""
        return load_chat_template(f"{CHAT_TEMPLATE}_training")

    @property
    def tokens_per_tile(self) -> int:
        """Visual tokens of a clip and of an image tile."""
        return self.tokens_per_frame * self.mm_local_num_frames

    def __call__(self, images: Any = None, text: Any = None, videos: Any = None, **kwargs: Any) -> BatchFeature:
        """Process prompts that already hold one placeholder per video and image.

        Args:
            images: Images, flat or one list per prompt.
            text: Prompt or list of prompts.
            videos: Videos, flat or one list per prompt; see `VideoChatFlashVideoProcessor.preprocess`.
            **kwargs: Options of tokenizer, image and video processor, `return_tensors`, `return_metadata`.

        Returns:
            `input_ids`, `attention_mask` and the outputs of the image and the video processor.

        Raises:
            ValueError: Placeholders and items differ in number, truncation cuts a visual span, or the prompt is longer
                than the tokenizer's `model_max_length`.
        """
        return super().__call__(images=images, text=text, videos=videos, **kwargs)

    def prepare_inputs_layout(
        self, images: Any = None, text: Any = None, videos: Any = None, audio: Any = None, **kwargs: Any
    ) -> tuple[Any, Any, Any, Any]:
        """Group images by the text they belong to, since samples with several images are tiled differently.

        Args:
            images: Images, flat or nested.
            text: Prompt or prompts.
            videos: Videos, left alone.
            audio: Not supported by the model.

        Returns:
            Images, list of prompts, videos, audio.
        """
        images, text, videos, audio = super().prepare_inputs_layout(
            images=images, text=text, videos=videos, audio=audio, **kwargs
        )
        if images is not None and isinstance(text, list) and all(isinstance(sample, str) for sample in text):
            flat, counts = make_flat_list_of_images(images), [count_token(sample, self.image_token) for sample in text]
            if sum(counts) == len(flat):
                starts = [sum(counts[:index]) for index in range(len(counts))]
                images = [flat[start : start + count] for start, count in zip(starts, counts, strict=True)]
        return images, text, videos, audio

    def replace_image_token(self, image_inputs: Mapping, image_idx: int, **kwargs: Any) -> str:
        """Write what stands in the prompt for one image.

        Args:
            image_inputs: Output of the image processor.
            image_idx: Zero-based index of the image in the call.

        Returns:
            Its placeholders and a line break.

        Raises:
            ValueError: The image has a grid of tiles whose tokens do not form squares.
        """
        rows, cols = (int(value) for value in image_inputs["image_grids"][image_idx])
        if rows * cols and math.isqrt(self.tokens_per_tile) ** 2 != self.tokens_per_tile:
            raise ValueError(
                f"An image became a grid of {rows} x {cols} tiles, but the {self.tokens_per_tile} tokens of a tile "
                f"(tokens_per_frame {self.tokens_per_frame} x mm_local_num_frames {self.mm_local_num_frames}) do not "
                'form a square, which a grid needs. Pass image_aspect_ratio="pad" or "square", or set it in the image '
                "processor: one tile per image."
            )
        return self.image_token * ((1 + rows * cols) * self.tokens_per_tile) + "\n"

    def replace_video_token(self, video_inputs: Mapping, video_idx: int, **kwargs: Any) -> str:
        """Write what stands in the prompt for one video.

        Args:
            video_inputs: Output of the video processor with `video_metadata`.
            video_idx: Zero-based index of the video in the call.

        Returns:
            Its placeholders, a line break, the time message and a blank.

        Raises:
            ValueError: The number of frames is not a multiple of the clip length.
        """
        counts = video_inputs.get("video_num_frames")
        frames = len(video_inputs["pixel_values_videos"][video_idx]) if counts is None else int(counts[video_idx])
        text = self.video_token * self.get_num_video_tokens(frames) + "\n"
        if not self.time_message:
            return text
        facts = video_inputs["video_metadata"][video_idx]
        times = getattr(facts, "frame_times", None)
        return (
            text
            + format_time_message(self.time_message, duration=facts.duration, num_frames=frames, times=times)
            + " "
        )

    def get_num_video_tokens(self, num_frames: int) -> int:
        """Count the visual tokens of a video.

        Args:
            num_frames: Number of frames, a multiple of the clip length.

        Returns:
            Number of placeholder tokens.

        Raises:
            ValueError: The clips are not whole.
        """
        if num_frames % self.mm_local_num_frames:
            raise ValueError(
                f"A video of {num_frames} frames cannot be cut into clips of {self.mm_local_num_frames} frames; give "
                f"a multiple of {self.mm_local_num_frames}."
            )
        return num_frames // self.mm_local_num_frames * self.tokens_per_tile

    def _get_num_multimodal_tokens(
        self, image_sizes: Sequence | None = None, video_sizes: Sequence | None = None, **kwargs: Any
    ) -> MultiModalData:
        # Sizes are (height, width) and (frames, height, width); frames fill up whole clips as in the video processor.
        # Images of one prompt stand in a list of their own or are told by images_per_sample, as in a call; a flat list
        # means one image per prompt, as elsewhere in Transformers.
        data: dict[str, list[int]] = {}
        if image_sizes is not None:
            sizes, counts = sizes_of_samples(image_sizes, kwargs.get("images_per_sample"))
            tiles = [
                self.image_processor.get_number_of_tiles(*size, images_kwargs=kwargs, num_images=count)
                for size, count in zip(sizes, counts, strict=True)
            ]
            data.update(num_image_tokens=[count * self.tokens_per_tile for count in tiles], num_image_patches=tiles)
        if video_sizes is not None:
            data["num_video_tokens"] = [
                -(-size[0] // self.mm_local_num_frames) * self.tokens_per_tile for size in video_sizes
            ]
        return MultiModalData(**data)

    def _check_special_mm_tokens(self, text: list[str], text_inputs: Mapping, modalities: list[str]) -> None:
        tokens = {
            "image": (self.image_token, self.image_token_id),
            "video": (self.video_token, self.video_token_id),
        }
        check_expanded(text, text_inputs, tokens=tokens, max_tokens=getattr(self.tokenizer, "model_max_length", None))


def sizes_of_samples(
    image_sizes: Sequence, images_per_sample: Sequence[int] | None
) -> tuple[list[Sequence[int]], list[int]]:
    """List the sizes of images with the number of images in the prompt of each.

    Args:
        image_sizes: (height, width) pairs in pixels, flat or one list of pairs per prompt.
        images_per_sample: Number of images of each prompt; None for one in each when the sizes are flat.

    Returns:
        The sizes one by one, and for each image how many its prompt has.

    Raises:
        ValueError: The numbers do not add up to the images.
    """
    sizes = list(image_sizes)
    if any(len(entry) == 0 or not isinstance(entry[0], Integral) for entry in sizes):
        samples = [list(entry) for entry in sizes]
        sizes = [size for sample in samples for size in sample]
        images_per_sample = [len(sample) for sample in samples]
    counts = [1] * len(sizes) if images_per_sample is None else list(images_per_sample)
    if sum(counts) != len(sizes):
        raise ValueError(f"images_per_sample={counts} adds up to {sum(counts)}, but {len(sizes)} image sizes came.")
    return sizes, [count for count in counts for _ in range(count)]


_register()
