"""The processor of VideoChat-Flash: messages with videos and images to model inputs."""

import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import processing_utils
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_utils import make_flat_list_of_images
from transformers.processing_utils import ImagesKwargs, MultiModalData, ProcessorMixin, TextKwargs, VideosKwargs
from transformers.utils.chat_template_utils import render_jinja_template

from longvideo.processing.shared.chat_templates import load_chat_template
from longvideo.processing.shared.messages import check_question, prepare_conversation
from longvideo.processing.shared.placeholders import (
    check_not_truncated,
    check_placeholder_count,
    check_token_budget,
    mask_of_spans,
    shift_spans,
)
from longvideo.processing.shared.timestamps import TIME_MESSAGE, format_time_message
from longvideo.processing.shared.video_inputs import flatten_videos
from longvideo.processing.videochat_flash import register as _register

IMAGE_TOKEN = "<|image_pad|>"
VIDEO_TOKEN = "<|video_pad|>"
CHAT_TEMPLATE = "qwen_chatml"
# What a user typed may be marked as plain text by newer versions of Transformers; it then stands for no item.
UNMARKED = getattr(processing_utils, "_UNMARKED", "")
# Tokenizers without a limit of their own carry a number of about 1e30.
UNLIMITED = 10**9


class VideoChatFlashProcessor(ProcessorMixin):
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
            ValueError: A block names no video or several, a question is empty, or as the processors say.
        """
        conversation, options = prepare_conversation(conversation)
        if kwargs.get("add_generation_prompt"):
            check_question(conversation)
        processor_kwargs = dict(kwargs.pop("processor_kwargs", None) or {})
        # The oldest supported Transformers forgets processor_kwargs when some of them stand beside it.
        for name in sorted(call_option_names(self) & set(kwargs) - set(base_parameters())):
            processor_kwargs[name] = kwargs.pop(name)
        if kwargs.get("tokenize"):
            if any(options):
                processor_kwargs["video_options"] = options
            if kwargs.get("return_assistant_tokens_mask") and not hasattr(
                ProcessorMixin, "_adjust_assistant_masks_indices"
            ):
                return self._with_assistant_masks(conversation, chat_template, processor_kwargs, kwargs)
        return super().apply_chat_template(
            conversation, chat_template=chat_template, processor_kwargs=processor_kwargs, **kwargs
        )

    def _with_assistant_masks(
        self, conversation: Any, chat_template: str | None, processor_kwargs: dict, kwargs: dict
    ) -> BatchFeature:
        # Before 5.2x the library looks for the spans in the text before placeholders were expanded.
        kwargs = {**kwargs, "return_assistant_tokens_mask": False}
        return_tensors = kwargs.pop("return_tensors", None)
        processor_kwargs.update(return_offsets_mapping=True, return_text_replacement_offsets=True)
        inputs = super().apply_chat_template(
            conversation, chat_template=chat_template, processor_kwargs=processor_kwargs, **kwargs
        )
        batch = conversation if isinstance(conversation[0], list | tuple) else [conversation]
        template_kwargs = {key: value for key, value in kwargs.items() if key not in base_parameters()}
        _, spans = render_jinja_template(
            conversations=batch,
            chat_template=chat_template or self.chat_template,
            return_assistant_tokens_mask=True,
            **{**self.tokenizer.special_tokens_map, **template_kwargs},
        )
        offsets = inputs.pop("offset_mapping")
        replaced = inputs.pop("text_replacement_offsets") or [[]] * len(batch)
        inputs["assistant_masks"] = [
            mask_of_spans(
                shift_spans(row_spans, [(entry["span"], entry["new_span"]) for entry in row_replaced]), row_offsets
            )
            for row_spans, row_replaced, row_offsets in zip(spans, replaced, offsets, strict=True)
        ]
        return inputs.convert_to_tensors(tensor_type=return_tensors)

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

    def validate_inputs(
        self, images: Any = None, text: Any = None, videos: Any = None, audio: Any = None, **kwargs: Any
    ) -> None:
        """Check that prompts and visual items fit before anything is decoded.

        Args:
            images: Images or None.
            text: List of prompts or None.
            videos: Videos or None.
            audio: Not supported by the model.

        Raises:
            ValueError: Nothing was given, sound was given, or placeholders and items differ in number.
        """
        if audio is not None or kwargs.get("audios") is not None:
            raise ValueError("VideoChat-Flash takes no sound; leave `audio` out and pass the video only.")
        if text is None and images is None and videos is None:
            raise ValueError("Nothing was given; expected text, images or videos.")
        if text is None:
            return
        if not isinstance(text, list) or not all(isinstance(sample, str) for sample in text):
            raise ValueError(f"text must be a prompt or a list of prompts, got {text!r}.")
        num_images = len(make_flat_list_of_images(images)) if images is not None else 0
        num_videos = len(flatten_videos(videos)) if videos is not None else 0
        for kind, token, count in (("image", self.image_token, num_images), ("video", self.video_token, num_videos)):
            found = sum(count_token(sample, token) for sample in text)
            check_placeholder_count(kind=kind, token=token, num_placeholders=found, num_items=count)

    def _process_images(self, images: Any, **kwargs: Any) -> tuple[BatchFeature, list[str]]:
        processed = self.image_processor(images, **kwargs)
        count = len(processed["image_grids"])
        return processed, [self.replace_image_token(processed, image_idx=index, **kwargs) for index in range(count)]

    def _process_videos(self, videos: Any, **kwargs: Any) -> tuple[BatchFeature, list[str]]:
        # The sentence about the duration needs the metadata, whether or not the caller wants them.
        processed = self.video_processor(videos, **{**kwargs, "return_metadata": True})
        count = len(processed["video_metadata"])
        return processed, [self.replace_video_token(processed, video_idx=index, **kwargs) for index in range(count)]

    def replace_image_token(self, image_inputs: Mapping, image_idx: int, **kwargs: Any) -> str:
        """Write what stands in the prompt for one image.

        Args:
            image_inputs: Output of the image processor.
            image_idx: Zero-based index of the image in the call.

        Returns:
            Its placeholders and a line break.
        """
        rows, cols = (int(value) for value in image_inputs["image_grids"][image_idx])
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
        data: dict[str, list[int]] = {}
        if image_sizes is not None:
            tiles = [self.image_processor.get_number_of_tiles(*size, images_kwargs=kwargs) for size in image_sizes]
            data.update(num_image_tokens=[count * self.tokens_per_tile for count in tiles], num_image_patches=tiles)
        if video_sizes is not None:
            data["num_video_tokens"] = [
                -(-size[0] // self.mm_local_num_frames) * self.tokens_per_tile for size in video_sizes
            ]
        return MultiModalData(**data)

    def _check_special_mm_tokens(self, text: list[str], text_inputs: Mapping, modalities: list[str]) -> None:
        rows = text_inputs["input_ids"]
        rows = rows.tolist() if hasattr(rows, "tolist") else [list(row) for row in rows]
        visual = [0] * len(rows)
        for kind, token, token_id in (
            ("image", self.image_token, self.image_token_id),
            ("video", self.video_token, self.video_token_id),
        ):
            kept = [row.count(token_id) for row in rows]
            expected = [count_token(sample, token) for sample in text]
            check_not_truncated(kind=kind, expected=expected, kept=kept, max_length=max(map(len, rows)))
            visual = [before + now for before, now in zip(visual, kept, strict=True)]
        limit = getattr(self.tokenizer, "model_max_length", None)
        masks = text_inputs.get("attention_mask")
        for index, row in enumerate(rows):
            used = int(sum(masks[index])) if masks is not None else len(row)
            if visual[index] and limit is not None and limit < UNLIMITED:
                check_token_budget(num_tokens=used, num_visual_tokens=visual[index], max_tokens=limit)


def count_token(text: str, token: str) -> int:
    """Count the placeholders of a prompt.

    Args:
        text: Prompt.
        token: Placeholder token.

    Returns:
        How often it occurs, places marked as plain text left out.
    """
    return len(re.findall(UNMARKED + re.escape(token), text))


def placeholder_id(tokenizer: Any, token: str) -> int:
    """Look up the id of a placeholder token.

    Args:
        tokenizer: The tokenizer.
        token: The token.

    Returns:
        Its id.

    Raises:
        ValueError: The tokenizer does not know the token as one piece.
    """
    token_id = tokenizer.convert_tokens_to_ids(token)
    if token_id is None or tokenizer.convert_ids_to_tokens(token_id) != token:
        raise ValueError(
            f"The tokenizer does not know the placeholder {token!r}. Add it: "
            f"tokenizer.add_special_tokens({{'additional_special_tokens': [{token!r}]}}), and resize the embeddings."
        )
    return token_id


def call_option_names(processor: ProcessorMixin) -> set[str]:
    """List the options that may be given to a processor at call time.

    Args:
        processor: Processor with image and video processor.

    Returns:
        Names of tokenizer, image and video options.
    """
    kinds = [TextKwargs, ImagesKwargs, VideosKwargs]
    kinds += [part.valid_kwargs for part in (processor.image_processor, processor.video_processor) if part is not None]
    return {name for kind in kinds for name in kind.__annotations__}


def base_parameters() -> list[str]:
    """List the parameters that `apply_chat_template` of Transformers has by itself.

    Returns:
        Their names.
    """
    return list(inspect.signature(ProcessorMixin.apply_chat_template).parameters)


_register()
