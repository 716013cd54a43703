"""What the processors of all architectures do alike."""

from typing import Any

from transformers.feature_extraction_utils import BatchFeature

from longvideo.processing.shared.processor_calls import apply_template, check_items


class VisualProcessor:
    """Renders messages and checks that prompts fit their videos and images.

    To be named before `ProcessorMixin` among the base classes. A processor sets `model_name` and `image_entries` (the
    output of its image processor that has one entry per image), and its constructor `image_token` and `video_token`.
    """

    model_name = ""
    image_entries = "image_sizes"

    def apply_chat_template(
        self, conversation: Any, chat_template: str | None = None, **kwargs: Any
    ) -> str | list[str] | BatchFeature:
        """Render messages and, with `tokenize=True, return_dict=True`, read their videos and images.

        Args:
            conversation: Messages, or a list of conversations.
            chat_template: Template text; the processor's when None.
            **kwargs: As in Transformers: `tokenize`, `return_dict`, `return_tensors`, `add_generation_prompt`,
                `return_assistant_tokens_mask`, `processor_kwargs` (options of the processors), template variables.

        Returns:
            The text, or model inputs.

        Raises:
            ValueError: A block names no video or several, a question is empty, or as `__call__` says.
        """
        return apply_template(self, super().apply_chat_template, conversation, chat_template, kwargs)

    def validate_inputs(
        self, images: Any = None, text: Any = None, videos: Any = None, audio: Any = None, **kwargs: Any
    ) -> None:
        """Check that prompts and visual items fit before anything is decoded.

        Args:
            images: Images or None.
            text: List of prompts or None.
            videos: Videos or None.
            audio: Not supported by the models.

        Raises:
            ValueError: Nothing was given, sound was given, or placeholders and items differ in number.
        """
        sound = audio if audio is not None else kwargs.get("audios")
        tokens = {"image": self.image_token, "video": self.video_token}
        check_items(text, images=images, videos=videos, audio=sound, tokens=tokens, model_name=self.model_name)

    def _process_images(self, images: Any, **kwargs: Any) -> tuple[BatchFeature, list[str]]:
        processed = self.image_processor(images, **kwargs)
        count = len(processed[self.image_entries])
        return processed, [self.replace_image_token(processed, image_idx=index, **kwargs) for index in range(count)]

    def _process_videos(self, videos: Any, **kwargs: Any) -> tuple[BatchFeature, list[str]]:
        # A sentence about the time needs the metadata, whether or not the caller wants them.
        processed = self.video_processor(videos, **{**kwargs, "return_metadata": True})
        count = len(processed["video_metadata"])
        return processed, [self.replace_video_token(processed, video_idx=index, **kwargs) for index in range(count)]

    def replace_image_token(self, image_inputs: Any, image_idx: int, **kwargs: Any) -> str:
        """Write what stands in the prompt for one image; every processor overrides it.

        Args:
            image_inputs: Output of the image processor.
            image_idx: Zero-based index of the image in the call.
            **kwargs: Options of the call.

        Returns:
            Its placeholders.
        """
        raise NotImplementedError

    def replace_video_token(self, video_inputs: Any, video_idx: int, **kwargs: Any) -> str:
        """Write what stands in the prompt for one video; every processor overrides it.

        Args:
            video_inputs: Output of the video processor.
            video_idx: Zero-based index of the video in the call.
            **kwargs: Options of the call.

        Returns:
            Its placeholders.
        """
        raise NotImplementedError
