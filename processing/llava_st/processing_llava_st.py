"""The processor of LLaVA-ST: messages with videos, images and coordinates to model inputs, and answers back."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import MultiModalData, ProcessorMixin

from longvideo.processing.llava_st import register as _register
from longvideo.processing.llava_st.answer_sources_llava_st import (
    answer_sources,
    answer_texts,
    marks_of,
    seen_period,
)
from longvideo.processing.llava_st.coordinate_text_llava_st import (
    COORDINATE,
    align_values,
    read_coordinate,
    values_of_text,
    variables_of_prompts,
)
from longvideo.processing.llava_st.grounding_llava_st import GroundingResult, parse_grounding
from longvideo.processing.llava_st.inputs_llava_st import LlavaSTInputs
from longvideo.processing.llava_st.messages_llava_st import prepare_messages, write_placeholders
from longvideo.processing.llava_st.tasks_llava_st import task_messages
from longvideo.processing.llava_st.tokenizer_llava_st import TEMPLATE_TOKENS, VISUAL_TOKENS, coordinate_token_fields
from longvideo.processing.llava_st.visual_blocks_llava_st import (
    grid_of_size,
    num_fast_positions,
    num_image_positions,
    num_slow_positions,
    write_block,
)
from longvideo.processing.shared.chat_templates import load_chat_template
from longvideo.processing.shared.processor_calls import UNMARKED, check_expanded
from longvideo.processing.shared.visual_processor import VisualProcessor

CHAT_TEMPLATE = "llava_st"


class LlavaSTProcessor(VisualProcessor, ProcessorMixin):
    """Turns chat messages with videos, images and coordinates into the inputs of LLaVA-ST.

    A video becomes its fast and its slow block of positions, an image its block; in messages a visual stands in front
    of the question, with a line break behind. In prompts `<vid_patch>` (or `<video>`) and `<im_patch>` (or `<image>`)
    stand for one visual each.

    Coordinates are written `<t0.3>`, `<w0.5>`, `<h1.0>`, or with their template token, `<TEMP-INPUT0.300>`. The short
    forms are OUTPUT in what an assistant says and INPUT everywhere else; `<h1>` to `<h6>` are headings of HTML and
    stay (but `[<w0.5>,<h1>]`). Template tokens without a number take theirs from `variables` (as in the release's
    data: a mapping with lists such as `temporal_input_locations`, one mapping per prompt). `apply_task` turns seconds
    and pixels into coordinates.

    Everything that the video and the image processor accept can be given at call time (`processor_kwargs` of
    `apply_chat_template`); a video block of a message may carry its own `split` (frames), `video_start`, `video_end`
    (seconds), `nframes`, `fps`, `timestamps` and `duration` (seconds) and `video_metadata`.

    Args:
        image_processor: `LlavaSTImageProcessor`.
        tokenizer: Tokenizer with the tokens of `add_coordinate_tokens`.
        video_processor: `LlavaSTVideoProcessor`.
        chat_template: Jinja template; the packaged one when None.
        patch_size: Side of a patch of the tower in pixels.
        spatial_factor: Side of the square of patches that becomes one token.
        temporal_factor: Frames that become one; the video processor's when None.
        use_downsample_image: Whether the model makes images smaller too.
        num_temporal_tokens: Times of the model's tables; as many as the tokenizer has when None, 0 for a model
            without coordinates (stage 1).
        num_spatial_tokens: Heights, and widths, of the model's tables; as many as the tokenizer has when None.
        clip_coordinates: Whether values outside of 0 to 1 are clipped and not an error.

    Raises:
        ValueError: The tokenizer lacks tokens or has other coordinates than the tables, or the numbers of frames that
            become one disagree.

    Source: `preprocess_multimodal`, `preprocess_qwen` and the demo of appletea233/LLaVA-ST.
    """

    model_name = "LLaVA-ST"

    # Every video has the model's number of frames: batches for training stack videos, (videos, F, ...).
    has_fixed_num_frames = True

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        video_processor: Any = None,
        chat_template: str | None = None,
        patch_size: int = 14,
        spatial_factor: int = 3,
        temporal_factor: int | None = None,
        use_downsample_image: bool = False,
        num_temporal_tokens: int | None = None,
        num_spatial_tokens: int | None = None,
        clip_coordinates: bool = False,
        **kwargs: Any,
    ) -> None:
        fields = coordinate_token_fields(tokenizer, num_temporal_tokens, num_spatial_tokens)
        self.num_temporal_tokens = fields["num_temporal_tokens"]
        self.num_spatial_tokens = fields["num_spatial_tokens"]
        self.patch_size, self.spatial_factor = patch_size, spatial_factor
        self.use_downsample_image = use_downsample_image
        self.clip_coordinates = clip_coordinates
        self.image_token, self.video_token = VISUAL_TOKENS["image_token_id"], VISUAL_TOKENS["video_token_id"]
        self.image_token_id, self.video_token_id = fields["image_token_id"], fields["video_token_id"]
        factor = getattr(video_processor, "temporal_factor", None)
        self.temporal_factor = temporal_factor if temporal_factor is not None else factor or 5
        if factor is not None and factor != self.temporal_factor:
            raise ValueError(
                f"temporal_factor is {self.temporal_factor} in the processor and {factor} in the video processor; "
                "give both the same number of frames that become one."
            )
        if chat_template is None:
            chat_template = load_chat_template(CHAT_TEMPLATE)
        super().__init__(image_processor, tokenizer, video_processor, chat_template=chat_template)

    @property
    def training_chat_template(self) -> str:
        """The packaged template whose generation marks cover what the assistant says, for masks of training."""
        return load_chat_template(f"{CHAT_TEMPLATE}_training")

    @property
    def model_input_names(self) -> list[str]:
        """Names of what a call returns."""
        return [*super().model_input_names, "coordinate_values"]

    @property
    def image_token_ids(self) -> list[int]:
        """Ids of an image's block: start, end and patches."""
        return self.visual_ids("image")

    @property
    def video_token_ids(self) -> list[int]:
        """Ids of a video's two blocks: start, end and patches of each."""
        return self.visual_ids("video")

    def visual_ids(self, kind: str) -> list[int]:
        """List the ids of a kind of visual.

        Args:
            kind: "image" or "video".

        Returns:
            Its ids.
        """
        tokens = [token for name, token in VISUAL_TOKENS.items() if kind in name]
        return self.tokenizer.convert_tokens_to_ids(tokens)

    def __call__(self, images: Any = None, text: Any = None, videos: Any = None, **kwargs: Any) -> BatchFeature:
        """Process prompts that already hold one placeholder per video and image.

        Args:
            images: Images, flat or one list per prompt.
            text: Prompt or list of prompts.
            videos: Videos, flat or one list per prompt; see `LlavaSTVideoProcessor.preprocess`.
            **kwargs: Options of tokenizer, image and video processor, `variables` (values of template tokens without
                one), `clip_coordinates`, `return_tensors`, `return_metadata`.

        Returns:
            `input_ids`, `attention_mask`, `coordinate_values` (the value at every template token, 0 elsewhere; `to`
            leaves them float32), `pixel_values_videos`, `pixel_values`; with `return_metadata` also `video_metadata`
            and `image_sizes`, a list of (width, height) in pixels.

        Raises:
            ValueError: Placeholders and items differ in number, a coordinate has no value or one outside of 0 to 1, a
                question has a reversed span or a box without area, truncation cuts a visual block, or the prompt is
                longer than the tokenizer's `model_max_length`.
        """
        variables, clip = kwargs.pop("variables", None), kwargs.pop("clip_coordinates", None)
        values = self.read_values(text, variables, self.clip_coordinates if clip is None else clip)
        outputs = super().__call__(images=images, text=text, videos=videos, **kwargs)
        sizes = outputs.pop("image_sizes", None)
        if sizes is not None and kwargs.get("return_metadata"):
            # No tensor, as the metadata of videos: the model takes neither.
            outputs["image_sizes"] = [(int(width), int(height)) for width, height in sizes]
        if "input_ids" in outputs and values is not None:
            outputs["coordinate_values"] = self.place_values(outputs["input_ids"], values)
        return LlavaSTInputs(outputs.data, skip_tensor_conversion=outputs.skip_tensor_conversion)

    def read_values(self, text: Any, variables: Any, clip: bool) -> list[list[float]] | None:
        """List the values of the coordinates of prompts.

        Args:
            text: Prompt, prompts, or anything that is refused later.
            variables: Value lists of the prompts, or None.
            clip: Whether values outside of 0 to 1 are clipped.

        Returns:
            The values of each prompt in order; None without prompts.

        Raises:
            ValueError: As `__call__` says, or the tokenizer has no coordinates.
        """
        prompts = [text] if isinstance(text, str) else text
        if not isinstance(prompts, list | tuple) or not all(isinstance(prompt, str) for prompt in prompts):
            return None
        lists = variables_of_prompts(variables, len(prompts))
        values = [values_of_text(prompt, own, clip=clip) for prompt, own in zip(prompts, lists, strict=True)]
        if not self.num_temporal_tokens and any(values):
            raise ValueError(
                "The text has coordinates, but the tokenizer has no coordinate tokens. Use a checkpoint of stage 2 or "
                "later, or add the tokens with add_coordinate_tokens and train them."
            )
        return values

    def place_values(self, input_ids: Any, values: Sequence[Sequence[float]]) -> Any:
        """Put values beside the template tokens that they belong to.

        Args:
            input_ids: (B, S) tensor or array, or lists of ids.
            values: Values of each prompt in order.

        Returns:
            float32 of the same form.
        """
        rows = input_ids.tolist() if hasattr(input_ids, "tolist") else input_ids
        template_ids = set()
        if self.num_temporal_tokens:
            template_ids = set(self.tokenizer.convert_tokens_to_ids(list(TEMPLATE_TOKENS.values())))
        from_left = getattr(self.tokenizer, "truncation_side", "right") == "left"
        aligned = align_values(rows, values, template_ids, from_left=from_left)
        if isinstance(input_ids, torch.Tensor):
            return torch.tensor(aligned, dtype=torch.float32)
        return np.array(aligned, dtype=np.float32) if isinstance(input_ids, np.ndarray) else aligned

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
            The text, with coordinates as template tokens with values, or model inputs.

        Raises:
            ValueError: A block names no video or several, a question is empty, or as `__call__` says.
        """
        with_aliases = not kwargs.get("sanitize_control_tokens")
        conversation, splits = prepare_messages(conversation, with_aliases=with_aliases)
        if kwargs.get("tokenize") and any(split is not None for split in splits):
            kwargs["processor_kwargs"] = {**(kwargs.get("processor_kwargs") or {}), "split": splits}
        return super().apply_chat_template(conversation, chat_template, **kwargs)

    def apply_task(self, task: str, *, video: Any = None, image: Any = None, **kwargs: Any) -> list[dict[str, Any]]:
        """Write the messages of a task, with seconds and pixels turned into coordinates.

        Args:
            task: "tvg", "tr", "rec", "reg", "dgc", "stvg", "svg", "elc" or "dvc"; see `tasks_llava_st.TASKS`.
            video: Path, array, or a whole video block of a message, for tasks about videos.
            image: The same for tasks about images.
            **kwargs: What the task needs: `query`, `span_seconds`, `box`, `duration`, `size`, `start`, or `metadata`
                in place of the last three, `pattern`; see `tasks_llava_st.task_question`.

        Returns:
            Messages for `apply_chat_template`.

        Raises:
            ValueError: Unknown task, something that it needs is missing, a reversed span, a box without area, or
                coordinates outside of the video or the frame.
        """
        return task_messages(task, video=video, image=image, **kwargs)

    def prepare_inputs_layout(
        self, images: Any = None, text: Any = None, videos: Any = None, audio: Any = None, **kwargs: Any
    ) -> tuple[Any, Any, Any, Any]:
        """List prompts, with our placeholders where they have those of the release.

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
        if isinstance(text, list) and not kwargs.get("sanitize_control_tokens"):
            text = [write_placeholders(sample) if isinstance(sample, str) else sample for sample in text]
        return images, text, videos, audio

    def get_text_with_replacements(
        self,
        text: list[str],
        images_replacements: Sequence[str] = (),
        videos_replacements: Sequence[str] = (),
        audio_replacements: Sequence[str] = (),
    ) -> tuple[list[str], list[list[dict[str, Any]]]]:
        """Write blocks for placeholders and template tokens for coordinates.

        Args:
            text: Prompts.
            images_replacements: Block of each image.
            videos_replacements: Blocks of each video.
            audio_replacements: Not supported by the model.

        Returns:
            The texts, and for each the replacements with `type`, `span` and `new_span` (characters before and after),
            `text` and `replacement`.
        """
        blocks = {"image": iter(images_replacements), "video": iter(videos_replacements)}
        given = {"image": images_replacements, "video": videos_replacements}
        tokens = {"image": self.image_token, "video": self.video_token}
        groups = [f"(?P<{kind}>{UNMARKED}{re.escape(tokens[kind])})" for kind in tokens if len(given[kind])]
        pattern = re.compile("|".join([*groups, f"(?P<coordinate>{COORDINATE.pattern})"]))
        expanded, replaced = [], []
        for sample in text:
            pieces, entries, last, length = [], [], 0, 0
            for match in pattern.finditer(sample):
                kind = next(name for name in ("image", "video", "coordinate") if match.groupdict().get(name))
                # Whether values are right was checked with the text as it came.
                new = read_coordinate(match, clip=True).token if kind == "coordinate" else next(blocks[kind])
                length += match.start() - last
                span = (length, length + len(new))
                pieces += [sample[last : match.start()], new]
                entries.append(
                    {"type": kind, "span": match.span(), "new_span": span, "text": match[0], "replacement": new}
                )
                length, last = span[1], match.end()
            expanded.append("".join([*pieces, sample[last:]]))
            replaced.append(entries)
        return expanded, replaced

    def _process_videos(self, videos: Any, **kwargs: Any) -> tuple[BatchFeature, list[str]]:
        processed = self.video_processor(videos, **kwargs)
        count = len(processed["pixel_values_videos"])
        return processed, [self.replace_video_token(processed, video_idx=index, **kwargs) for index in range(count)]

    def replace_image_token(self, image_inputs: Mapping, image_idx: int, **kwargs: Any) -> str:
        """Write what stands in the prompt for one image.

        Args:
            image_inputs: Output of the image processor.
            image_idx: Zero-based index of the image in the call.

        Returns:
            Its block.
        """
        height, width = image_inputs["pixel_values"][image_idx].shape[-2:]
        return write_block(self.get_num_image_tokens({"height": height, "width": width}), "image")

    def replace_video_token(self, video_inputs: Mapping, video_idx: int, **kwargs: Any) -> str:
        """Write what stands in the prompt for one video.

        Args:
            video_inputs: Output of the video processor.
            video_idx: Zero-based index of the video in the call.

        Returns:
            Its fast and its slow block.

        Raises:
            ValueError: Number or size of the frames cannot be divided as the packers do.
        """
        frames, _, height, width = video_inputs["pixel_values_videos"][video_idx].shape
        fast, slow = self.video_positions(frames, {"height": height, "width": width})
        return write_block(fast, "video") + write_block(slow, "slow_video")

    def get_num_image_tokens(self, size: Mapping[str, int] | None = None) -> int:
        """Count the positions of an image.

        Args:
            size: Height and width after resizing in pixels, the image processor's when None.

        Returns:
            Number of positions.
        """
        grid = grid_of_size(self.image_processor.size if size is None else size, self.patch_size)
        return num_image_positions(
            grid, spatial_factor=self.spatial_factor, use_downsample_image=self.use_downsample_image
        )

    def get_num_video_tokens(self, num_frames: int | None = None, size: Mapping[str, int] | None = None) -> int:
        """Count the positions of a video.

        Args:
            num_frames: Number of frames, the video processor's when None.
            size: Height and width after resizing in pixels, the video processor's when None.

        Returns:
            Number of positions of both blocks.

        Raises:
            ValueError: Number or size of the frames cannot be divided as the packers do.
        """
        return sum(self.video_positions(num_frames or self.video_processor.num_frames, size))

    def video_positions(self, num_frames: int, size: Mapping[str, int] | None = None) -> tuple[int, int]:
        """Count the positions of a video's two blocks.

        Args:
            num_frames: Number of frames.
            size: Height and width after resizing in pixels, the video processor's when None.

        Returns:
            Positions of the fast and of the slow block.
        """
        grid = grid_of_size(self.video_processor.size if size is None else size, self.patch_size)
        fast = num_fast_positions(num_frames, grid, spatial_factor=self.spatial_factor)
        factors = {"spatial_factor": self.spatial_factor, "temporal_factor": self.temporal_factor}
        return fast, num_slow_positions(num_frames, grid, **factors)

    def _get_num_multimodal_tokens(
        self, image_sizes: Sequence | None = None, video_sizes: Sequence | None = None, **kwargs: Any
    ) -> MultiModalData:
        # Sizes are (height, width) and (frames, height, width); all are stretched to the tower's size.
        data: dict[str, list[int]] = {}
        if image_sizes is not None:
            count = len(image_sizes)
            data.update(num_image_tokens=[self.get_num_image_tokens()] * count, num_image_patches=[1] * count)
        if video_sizes is not None:
            data["num_video_tokens"] = [self.get_num_video_tokens(size[0]) for size in video_sizes]
        return MultiModalData(**data)

    def _check_special_mm_tokens(self, text: list[str], text_inputs: Mapping, modalities: list[str]) -> None:
        ids = self.tokenizer.convert_tokens_to_ids
        tokens = {
            f"{'image' if 'image' in name else 'video'} ({token})": (token, ids(token))
            for name, token in VISUAL_TOKENS.items()
        }
        check_expanded(text, text_inputs, tokens=tokens, max_tokens=getattr(self.tokenizer, "model_max_length", None))

    def seen_period(self, metadata: Any) -> tuple[float, float | None]:
        """Tell which seconds of the source the times of questions and answers are fractions of.

        Args:
            metadata: An entry of `video_metadata`, or what `describe_video` says of a file.

        Returns:
            Second of the first frame, and the seconds from there to the last one (None where nothing is known of
            them): `start` and `duration` of `apply_task` and of `post_process_grounding`.
        """
        return seen_period(metadata)

    def post_process_image_text_to_text(
        self, generated_outputs: Any, skip_special_tokens: bool = True, **kwargs: Any
    ) -> str | list[str]:
        """Decode as upstream does, with coordinates, which are special tokens too; arguments as upstream."""
        if not skip_special_tokens:
            return super().post_process_image_text_to_text(generated_outputs, skip_special_tokens=False, **kwargs)
        # Callers tell the answer from the prompt by the length of its text.
        kwargs.update(hidden=marks_of(self.tokenizer), keep_blanks=True)
        texts, is_single = answer_texts(self.tokenizer, generated_outputs, **kwargs)
        return texts[0] if is_single else texts

    def post_process_grounding(
        self,
        outputs: Any,
        sizes: Any = None,
        durations: Any = None,
        *,
        starts: Any = None,
        metadata: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Read times and boxes out of answers.

        Args:
            outputs: An answer or several: text, token ids without the prompt's, or a (B, S) tensor of them.
            sizes: (width, height) of the source in pixels, one pair for all or one per answer.
            durations: Seconds from the first to the last frame of what the model saw, one number for all or one per
                answer; see `seen_period`.
            starts: Second of the source at which the first frame lies, likewise; 0 when None.
            metadata: `video_metadata` of the call, one entry per answer, in place of the three above.
            **kwargs: `task` and what else `parse_grounding` takes, the same for all answers.

        Returns:
            `GroundingResult`, or a list of them when there are several answers. What cannot be read stands in
            `malformed` with the reason. Without coordinate tokens (stage 1) there is nothing to read but the text.

        Raises:
            ValueError: Sizes or durations differ in number from the answers, or cannot be.
        """
        texts, is_single = answer_texts(self.tokenizer, outputs)
        if not self.num_temporal_tokens:
            return GroundingResult(texts[0]) if is_single else [GroundingResult(text) for text in texts]
        sources = answer_sources(len(texts), sizes=sizes, durations=durations, starts=starts, metadata=metadata)
        counts = {"num_temporal": self.num_temporal_tokens, "num_spatial": self.num_spatial_tokens}
        results = [
            parse_grounding(text, **source, **counts, **kwargs) for text, source in zip(texts, sources, strict=True)
        ]
        return results[0] if is_single else results


_register()
