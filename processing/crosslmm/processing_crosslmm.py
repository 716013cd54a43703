"""The processor of CrossLMM: messages with videos and images to model inputs."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import MultiModalData, ProcessorMixin

from longvideo.processing.crosslmm import register as _register
from longvideo.processing.shared.chat_templates import load_chat_template
from longvideo.processing.shared.processor_calls import (
    IMAGE_TOKEN,
    VIDEO_TOKEN,
    check_expanded,
    placeholder_id,
)
from longvideo.processing.shared.timestamps import format_time_message
from longvideo.processing.shared.visual_processor import VisualProcessor

CHAT_TEMPLATE = "qwen_chatml"


class CrossLMMProcessor(VisualProcessor, ProcessorMixin):
    """Turns chat messages with videos and images into the inputs of CrossLMM.

    A video becomes `tokens_per_frame` placeholders for each of its frames, an image as many as one frame; nothing
    stands between frames or behind a visual. Everything that the video and the image processor accept can be given
    at call time (`processor_kwargs` of `apply_chat_template`); a video block of a message may carry its own `fps`,
    `nframes`, `min_frames`, `max_frames`, `video_start`, `video_end` (seconds), `timestamps` and `duration` (seconds)
    and `video_metadata`.

    Args:
        image_processor: `CrossLMMImageProcessor`.
        tokenizer: Tokenizer that knows the placeholder tokens.
        video_processor: `CrossLMMVideoProcessor`.
        chat_template: Jinja template; the packaged ChatML template when None.
        tokens_per_frame: Visual tokens per frame after merging, a square number; the model's.
        time_message: Sentence after a video, with the fields `{duration}` (seconds), `{num_frames}`, `{times}`; empty
            for none.

    Raises:
        ValueError: The tokenizer lacks a placeholder token, or the tokens of a frame make no square.

    Source: CrossLMM Sec. 3.1 (tokens of a frame).
    Differs: The paper says nothing of prompts. ChatML is that of its language model; line breaks and times are off.
    """

    model_name = "CrossLMM"
    image_entries = "pixel_values"

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        video_processor: Any = None,
        chat_template: str | None = None,
        tokens_per_frame: int = 9,
        time_message: str = "",
        **kwargs: Any,
    ) -> None:
        if tokens_per_frame < 1 or math.isqrt(tokens_per_frame) ** 2 != tokens_per_frame:
            raise ValueError(
                f"tokens_per_frame={tokens_per_frame}, expected a square number such as 1, 9 or 16: the tokens of a "
                "frame are the cells of a square grid."
            )
        self.tokens_per_frame = tokens_per_frame
        self.time_message = time_message
        self.image_token = getattr(tokenizer, "image_token", None) or IMAGE_TOKEN
        self.video_token = getattr(tokenizer, "video_token", None) or VIDEO_TOKEN
        self.image_token_id = placeholder_id(tokenizer, self.image_token)
        self.video_token_id = placeholder_id(tokenizer, self.video_token)
        if chat_template is None:
            chat_template = load_chat_template(CHAT_TEMPLATE)
        super().__init__(image_processor, tokenizer, video_processor, chat_template=chat_template)

    @property
    def training_chat_template(self) -> str:
        """The packaged template whose generation marks cover what the assistant says, for masks of training."""
        return load_chat_template(f"{CHAT_TEMPLATE}_training")

    def __call__(self, images: Any = None, text: Any = None, videos: Any = None, **kwargs: Any) -> BatchFeature:
        """Process prompts that already hold one placeholder per video and image.

        Args:
            images: Images, flat or one list per prompt.
            text: Prompt or list of prompts.
            videos: Videos, flat or one list per prompt; see `CrossLMMVideoProcessor.preprocess`.
            **kwargs: Options of tokenizer, image and video processor, `return_tensors`, `return_metadata`.

        Returns:
            `input_ids`, `attention_mask` and the outputs of the image and the video processor.

        Raises:
            ValueError: Placeholders and items differ in number, truncation cuts a visual span, or the prompt is longer
                than the tokenizer's `model_max_length`.
        """
        return super().__call__(images=images, text=text, videos=videos, **kwargs)

    def replace_image_token(self, image_inputs: Mapping, image_idx: int, **kwargs: Any) -> str:
        """Write what stands in the prompt for one image.

        Args:
            image_inputs: Output of the image processor.
            image_idx: Zero-based index of the image in the call.

        Returns:
            Its placeholders.
        """
        return self.image_token * self.tokens_per_frame

    def replace_video_token(self, video_inputs: Mapping, video_idx: int, **kwargs: Any) -> str:
        """Write what stands in the prompt for one video.

        Args:
            video_inputs: Output of the video processor with `video_metadata`.
            video_idx: Zero-based index of the video in the call.

        Returns:
            Its placeholders; with a `time_message` a line break, the message and a blank behind them.
        """
        counts = video_inputs.get("video_num_frames")
        frames = len(video_inputs["pixel_values_videos"][video_idx]) if counts is None else int(counts[video_idx])
        text = self.video_token * self.get_num_video_tokens(frames)
        if not self.time_message:
            return text
        facts = video_inputs["video_metadata"][video_idx]
        times = getattr(facts, "frame_times", None)
        message = format_time_message(self.time_message, duration=facts.duration, num_frames=frames, times=times)
        return f"{text}\n{message} "

    def get_num_video_tokens(self, num_frames: int) -> int:
        """Count the visual tokens of a video.

        Args:
            num_frames: Number of frames.

        Returns:
            Number of placeholder tokens.
        """
        return num_frames * self.tokens_per_frame

    def _get_num_multimodal_tokens(
        self, image_sizes: Sequence | None = None, video_sizes: Sequence | None = None, **kwargs: Any
    ) -> MultiModalData:
        # Sizes are (height, width) and (frames, height, width); all pictures are stretched to one size.
        data: dict[str, list[int]] = {}
        if image_sizes is not None:
            count = len(image_sizes)
            data.update(num_image_tokens=[self.tokens_per_frame] * count, num_image_patches=[1] * count)
        if video_sizes is not None:
            data["num_video_tokens"] = [self.get_num_video_tokens(int(size[0])) for size in video_sizes]
        return MultiModalData(**data)

    def _check_special_mm_tokens(self, text: list[str], text_inputs: Mapping, modalities: list[str]) -> None:
        tokens = {
            "image": (self.image_token, self.image_token_id),
            "video": (self.video_token, self.video_token_id),
        }
        check_expanded(text, text_inputs, tokens=tokens, max_tokens=getattr(self.tokenizer, "model_max_length", None))


_register()
