"""The processor of CrossVLLM: messages with videos and images to model inputs, in either granularity."""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import MultiModalData, ProcessorMixin

from longvideo.processing.crossvllm import register as _register
from longvideo.processing.crossvllm.video_processing_crossvllm import GRANULARITIES
from longvideo.processing.shared.chat_templates import load_chat_template
from longvideo.processing.shared.processor_calls import check_expanded, placeholder_id
from longvideo.processing.shared.visual_processor import VisualProcessor

CHAT_TEMPLATE = "vicuna"
IMAGE_TOKEN = "<image>"
VIDEO_TOKEN = "<video>"


class CrossVLLMProcessor(VisualProcessor, ProcessorMixin):
    """Turns chat messages with videos and images into the inputs of CrossVLLM.

    A frame of H x W pixels becomes H / patch_size / stride times W / patch_size / stride placeholders, where the
    stride is that of the granularity, "coarse" or "fine"; an image is not pooled. Both can be given at call time
    (`granularity=`, `spatial_pool_stride=` in `processor_kwargs` of `apply_chat_template`), as everything that the
    video and the image processor accept; a video block of a message may carry its own `fps`, `nframes`, `min_frames`,
    `max_frames`, `video_start`, `video_end` (seconds), `timestamps` and `duration` (seconds) and `video_metadata`.

    Args:
        image_processor: Transformers' `CLIPImageProcessor`, with the size and the crop of the tower.
        tokenizer: Tokenizer that knows the placeholder tokens.
        video_processor: `CrossVLLMVideoProcessor`; its `granularity` is the default.
        chat_template: Jinja template; the packaged one of Vicuna when None.
        patch_size: Pixels along a side of a patch; the tower's.
        coarse_stride: Patches along a side of a frame that become one token in the coarse granularity.
        fine_stride: The same in the fine granularity.

    Raises:
        ValueError: The tokenizer lacks a placeholder token, or a number is below 1.

    Source: CrossVLLM Sec. 3.1 and Table 5 (strides); prompt of LLaVA-NeXT-Video, visuals before the text (Eq. 3).
    Differs: LLaVA-NeXT-Video of Transformers counts placeholders for the stride 2, whatever the model's is.
    """

    model_name = "CrossVLLM"
    image_entries = "pixel_values"

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        video_processor: Any = None,
        chat_template: str | None = None,
        patch_size: int = 14,
        coarse_stride: int = 6,
        fine_stride: int = 2,
        **kwargs: Any,
    ) -> None:
        for name, value in (
            ("patch_size", patch_size),
            ("coarse_stride", coarse_stride),
            ("fine_stride", fine_stride),
        ):
            if value < 1:
                raise ValueError(f"{name}={value}, expected at least 1.")
        self.patch_size, self.coarse_stride, self.fine_stride = patch_size, coarse_stride, fine_stride
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
            videos: Videos, flat or one list per prompt; see `CrossVLLMVideoProcessor.preprocess`.
            **kwargs: Options of tokenizer, image and video processor, `return_tensors`, `return_metadata`.

        Returns:
            `input_ids`, `attention_mask` and the outputs of the image and the video processor.

        Raises:
            ValueError: Placeholders and items differ in number, truncation cuts a visual span, the prompt is longer
                than the tokenizer's `model_max_length`, or a stride does not divide the patches.
        """
        return super().__call__(images=images, text=text, videos=videos, **kwargs)

    def stride_of(self, call: Mapping[str, Any]) -> int:
        """Say how many patches along a side of a frame become one token.

        Args:
            call: Wishes of the call, among them `granularity` and `spatial_pool_stride`.

        Returns:
            The stride.

        Raises:
            ValueError: Another granularity, or a stride below 1.
        """
        # The text alone may be processed without a video processor.
        options = [call.get(name) for name in ("spatial_pool_stride", "granularity")]
        own = [getattr(self.video_processor, name, None) for name in ("spatial_pool_stride", "granularity")]
        # A granularity of the call also wins over a stride of the processor.
        stride = options[0] if options[0] is not None or options[1] is not None else own[0]
        granularity = options[1] or own[1] or "coarse"
        if granularity not in GRANULARITIES:
            raise ValueError(f"granularity={granularity!r}, expected one of {', '.join(GRANULARITIES)}.")
        stride = getattr(self, f"{granularity}_stride") if stride is None else stride
        if stride < 1:
            raise ValueError(f"spatial_pool_stride={stride}, expected at least 1.")
        return stride

    def replace_image_token(self, image_inputs: Mapping, image_idx: int, **kwargs: Any) -> str:
        """Write what stands in the prompt for one image.

        Args:
            image_inputs: Output of the image processor.
            image_idx: Zero-based index of the image in the call.

        Returns:
            Its placeholders.
        """
        height, width = image_inputs["pixel_values"][image_idx].shape[-2:]
        return self.image_token * self.get_num_frame_tokens(height, width, stride=1)

    def replace_video_token(self, video_inputs: Mapping, video_idx: int, **kwargs: Any) -> str:
        """Write what stands in the prompt for one video.

        Args:
            video_inputs: Output of the video processor with `video_metadata`.
            video_idx: Zero-based index of the video in the call.
            **kwargs: Options of the call.

        Returns:
            Its placeholders.
        """
        pixels, counts = video_inputs["pixel_values_videos"], video_inputs.get("video_num_frames")
        frames = len(pixels[video_idx]) if counts is None else int(counts[video_idx])
        height, width = pixels[0].shape[-2:]
        tokens = self.get_num_frame_tokens(height, width, stride=self.stride_of(kwargs))
        return self.video_token * (frames * tokens)

    def get_num_frame_tokens(self, height: int, width: int, *, stride: int) -> int:
        """Count the visual tokens of a frame.

        Args:
            height: Pixels.
            width: Pixels.
            stride: Patches along a side that become one token.

        Returns:
            Number of placeholder tokens.

        Raises:
            ValueError: The stride leaves patches over, which pooling would drop.
        """
        rows, columns = height // self.patch_size, width // self.patch_size
        if rows % stride or columns % stride or not rows or not columns:
            fits = [number for number in range(1, min(rows, columns) + 1) if not (rows % number or columns % number)]
            raise ValueError(
                f"A frame of {height} x {width} pixels has {rows} x {columns} patches of {self.patch_size} pixels, "
                f"which the stride {stride} does not divide. Strides that do: {fits or 'none'}."
            )
        return (rows // stride) * (columns // stride)

    def get_num_video_tokens(self, num_frames: int, **call: Any) -> int:
        """Count the visual tokens of a video.

        Args:
            num_frames: Number of frames.
            **call: `granularity` or `spatial_pool_stride`.

        Returns:
            Number of placeholder tokens.
        """
        height, width = self._frame_size()
        return num_frames * self.get_num_frame_tokens(height, width, stride=self.stride_of(call))

    def prompt_of(self, messages: Any, num_frames: Sequence[int], **call: Any) -> str:
        """Write a prompt with the placeholders of videos whose features are there already; nothing is decoded.

        Args:
            messages: One conversation with video blocks.
            num_frames: Frames of each video.
            **call: `granularity` or `spatial_pool_stride`.

        Returns:
            The prompt up to the place where the assistant begins, for the tokenizer.

        Raises:
            ValueError: Videos and numbers of frames differ in number, or a question is empty.
        """
        text = self.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        pieces = text.split(self.video_token)
        if len(pieces) != len(num_frames) + 1:
            raise ValueError(
                f"The prompt has {len(pieces) - 1} times {self.video_token}, and {len(num_frames)} numbers of frames "
                f"were given; give one per video. A question must not contain {self.video_token} itself."
            )
        spans = [self.video_token * self.get_num_video_tokens(count, **call) for count in num_frames]
        return "".join(part for pair in zip(pieces, [*spans, ""], strict=True) for part in pair)

    def _frame_size(self) -> tuple[int, int]:
        processor = self.video_processor
        size = processor.crop_size if processor.do_center_crop else processor.size
        return size["height"], size["width"]

    def _get_num_multimodal_tokens(
        self, image_sizes: Sequence | None = None, video_sizes: Sequence | None = None, **kwargs: Any
    ) -> MultiModalData:
        # Sizes are (height, width) and (frames, height, width); all pictures are cropped to one size.
        data: dict[str, list[int]] = {}
        if image_sizes is not None:
            tokens = self.get_num_frame_tokens(*self._frame_size(), stride=1)
            data.update(num_image_tokens=[tokens] * len(image_sizes), num_image_patches=[1] * len(image_sizes))
        if video_sizes is not None:
            data["num_video_tokens"] = [self.get_num_video_tokens(int(size[0]), **kwargs) for size in video_sizes]
        return MultiModalData(**data)

    def _check_special_mm_tokens(self, text: list[str], text_inputs: Mapping, modalities: list[str]) -> None:
        tokens = {
            "image": (self.image_token, self.image_token_id),
            "video": (self.video_token, self.video_token_id),
        }
        check_expanded(text, text_inputs, tokens=tokens, max_tokens=getattr(self.tokenizer, "model_max_length", None))


_register()
