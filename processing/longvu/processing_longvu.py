"""The processor of LongVU: messages with videos and images to model inputs."""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import MultiModalData, ProcessorMixin

from longvideo.processing.longvu import register as _register
from longvideo.processing.longvu.video_windows import VideoWindows
from longvideo.processing.shared.chat_templates import load_chat_template
from longvideo.processing.shared.processor_calls import (
    IMAGE_TOKEN,
    VIDEO_TOKEN,
    count_kept,
    knows_token,
    placeholder_id,
)
from longvideo.processing.shared.timestamps import format_time_message
from longvideo.processing.shared.visual_processor import VisualProcessor


class LongVUProcessor(VisualProcessor, ProcessorMixin):
    """Turns chat messages with videos and images into the inputs of LongVU.

    A video or an image becomes one placeholder and a line break, whatever its length: how many visual tokens there are
    depends on what is to be seen, and the model inserts them. Everything that the video and the image processor accept
    can be given at call time (`processor_kwargs` of `apply_chat_template`); a video block of a message may carry its
    own `fps`, `nframes`, `min_frames`, `max_frames`, `video_start`, `video_end` (seconds), `timestamps` and `duration`
    (seconds) and `video_metadata`.

    Args:
        image_processor: `LongVUImageProcessor`.
        tokenizer: Tokenizer that knows the placeholder tokens.
        video_processor: `LongVUVideoProcessor`.
        chat_template: Jinja template; when None the packaged Llama 3 template for a tokenizer with its tokens,
            otherwise the ChatML template.
        time_message: Sentence after a video, with the fields `{duration}` (seconds), `{num_frames}`, `{times}`; empty
            for none, as in the releases, which are not told how long a video is.

    Raises:
        ValueError: The tokenizer lacks a placeholder token.

    Source: LongVU `conversation.py` (templates "qwen" and "llama3"), `tokenizer_image_token`.
    """

    model_name = "LongVU"

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        video_processor: Any = None,
        chat_template: str | None = None,
        time_message: str = "",
        **kwargs: Any,
    ) -> None:
        self.time_message = time_message
        self.image_token = getattr(tokenizer, "image_token", None) or IMAGE_TOKEN
        self.video_token = getattr(tokenizer, "video_token", None) or VIDEO_TOKEN
        self.image_token_id = placeholder_id(tokenizer, self.image_token)
        self.video_token_id = placeholder_id(tokenizer, self.video_token)
        if chat_template is None:
            chat_template = load_chat_template(template_name(tokenizer))
        super().__init__(image_processor, tokenizer, video_processor, chat_template=chat_template)

    @property
    def training_chat_template(self) -> str:
        """The packaged template whose generation marks cover what the assistant says, for masks of training."""
        return load_chat_template(f"{template_name(self.tokenizer)}_training")

    def __call__(self, images: Any = None, text: Any = None, videos: Any = None, **kwargs: Any) -> BatchFeature:
        """Process prompts that already hold one placeholder per video and image.

        Args:
            images: Images, flat or one list per prompt.
            text: Prompt or list of prompts.
            videos: Videos, flat or one list per prompt; see `LongVUVideoProcessor.preprocess`.
            **kwargs: Options of tokenizer, image and video processor, `return_tensors`, `return_metadata`.

        Returns:
            `input_ids`, `attention_mask` and the outputs of the image and the video processor.

        Raises:
            ValueError: Placeholders and items differ in number, or truncation cuts a placeholder off.
        """
        return super().__call__(images=images, text=text, videos=videos, **kwargs)

    def iterate_windows(self, video: Any, window_size: int = 16, **kwargs: Any) -> VideoWindows:
        """Read one video window by window; see `LongVUVideoProcessor.iterate_windows`.

        Args:
            video: One video.
            window_size: Frames per window.
            **kwargs: As for the video processor.

        Returns:
            What `encode_video(windows=...)` of the model takes.
        """
        return self.video_processor.iterate_windows(video, window_size, **kwargs)

    def _process_videos(self, videos: Any, **kwargs: Any) -> tuple[BatchFeature, list[str]]:
        processed = self.video_processor(videos, **{**kwargs, "return_metadata": True})
        count = len(processed["video_sizes"])
        texts = [self.replace_video_token(processed, video_idx=index, **kwargs) for index in range(count)]
        if not kwargs.get("return_metadata"):
            processed.pop("video_metadata", None)
        return processed, texts

    def replace_image_token(self, image_inputs: Mapping, image_idx: int, **kwargs: Any) -> str:
        """Write what stands in the prompt for one image.

        Args:
            image_inputs: Output of the image processor.
            image_idx: Zero-based index of the image in the call.

        Returns:
            Its placeholder and a line break.
        """
        return self.image_token + "\n"

    def replace_video_token(self, video_inputs: Mapping, video_idx: int, **kwargs: Any) -> str:
        """Write what stands in the prompt for one video.

        Args:
            video_inputs: Output of the video processor.
            video_idx: Zero-based index of the video in the call.

        Returns:
            Its placeholder, a line break and, where the processor has one, the sentence about time.
        """
        text = self.video_token + "\n"
        if not self.time_message:
            return text
        facts = video_inputs["video_metadata"][video_idx]
        message = format_time_message(
            self.time_message,
            duration=facts.duration,
            num_frames=int(video_inputs["video_num_frames"][video_idx]),
            times=getattr(facts, "frame_times", None),
        )
        return f"{text}{message} "

    def _get_num_multimodal_tokens(
        self, image_sizes: Sequence | None = None, video_sizes: Sequence | None = None, **kwargs: Any
    ) -> MultiModalData:
        # Placeholders in the prompt; what the model inserts for each depends on its content and on the other text.
        data: dict[str, list[int]] = {}
        if image_sizes is not None:
            data.update(num_image_tokens=[1] * len(image_sizes), num_image_patches=[1] * len(image_sizes))
        if video_sizes is not None:
            data["num_video_tokens"] = [1] * len(video_sizes)
        return MultiModalData(**data)

    def _check_special_mm_tokens(self, text: list[str], text_inputs: Mapping, modalities: list[str]) -> None:
        rows = text_inputs["input_ids"]
        rows = rows.tolist() if hasattr(rows, "tolist") else [list(row) for row in rows]
        tokens = {
            "image": (self.image_token, self.image_token_id),
            "video": (self.video_token, self.video_token_id),
        }
        count_kept(text, rows, tokens=tokens)


def template_name(tokenizer: Any) -> str:
    """Choose the packaged chat template for a tokenizer.

    Args:
        tokenizer: The tokenizer.

    Returns:
        "llama3" when it has the role marks of Llama 3, otherwise "qwen_chatml".
    """
    return "llama3" if knows_token(tokenizer, "<|start_header_id|>") else "qwen_chatml"


_register()
