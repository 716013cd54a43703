"""Calls of a processor: options, placeholders of prompts, and chat templates on every supported Transformers."""

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from transformers import processing_utils
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_utils import make_flat_list_of_images
from transformers.processing_utils import ImagesKwargs, ProcessorMixin, TextKwargs, VideosKwargs
from transformers.utils.chat_template_utils import render_jinja_template

from longvideo.processing.shared.messages import check_question, prepare_conversation
from longvideo.processing.shared.placeholders import (
    check_not_truncated,
    check_placeholder_count,
    check_token_budget,
    mask_of_spans,
    shift_spans,
)
from longvideo.processing.shared.video_inputs import flatten_videos

IMAGE_TOKEN = "<|image_pad|>"
VIDEO_TOKEN = "<|video_pad|>"
# Tokenizers without a limit give a huge number instead.
UNLIMITED = 10**9
# What a user typed may be marked as plain text by newer versions of Transformers; it then stands for no item.
UNMARKED = getattr(processing_utils, "_UNMARKED", "")
MARK = getattr(processing_utils, "_CONTROL_TOKEN_START", None)


def apply_template(
    processor: ProcessorMixin,
    parent: Callable[..., Any],
    conversation: Any,
    chat_template: str | None,
    kwargs: Mapping[str, Any],
) -> str | list[str] | BatchFeature:
    """Render messages with the method of Transformers, after their videos' own wishes were taken out.

    Args:
        processor: The processor.
        parent: `apply_chat_template` of Transformers, bound to the processor.
        conversation: Messages, or a list of conversations.
        chat_template: Template text; the processor's when None.
        kwargs: As in Transformers.

    Returns:
        The text, or model inputs.

    Raises:
        ValueError: A block names no video or several, a question is empty, or as the processors say.
    """
    kwargs = dict(kwargs)
    conversation, options = prepare_conversation(conversation)
    if kwargs.get("add_generation_prompt"):
        check_question(conversation)
    processor_kwargs = dict(kwargs.pop("processor_kwargs", None) or {})
    # The oldest supported Transformers forgets processor_kwargs when some of them stand beside it.
    for name in sorted(call_option_names(processor) & set(kwargs) - set(base_parameters())):
        processor_kwargs[name] = kwargs.pop(name)
    if kwargs.get("tokenize"):
        if any(options):
            processor_kwargs["video_options"] = options
        if kwargs.get("return_assistant_tokens_mask") and not hasattr(
            ProcessorMixin, "_adjust_assistant_masks_indices"
        ):
            return with_assistant_masks(processor, parent, conversation, chat_template, processor_kwargs, kwargs)
    return parent(conversation, chat_template=chat_template, processor_kwargs=processor_kwargs, **kwargs)


def with_assistant_masks(
    processor: ProcessorMixin,
    parent: Callable[..., Any],
    conversation: Any,
    chat_template: str | None,
    processor_kwargs: Mapping[str, Any],
    kwargs: Mapping[str, Any],
) -> BatchFeature:
    """Mark what the assistant says where Transformers looks for it in the text before placeholders were expanded.

    Args:
        processor: The processor.
        parent: `apply_chat_template` of Transformers, bound to the processor.
        conversation: Prepared messages, or a list of conversations.
        chat_template: Template text with generation marks; the processor's when None.
        processor_kwargs: Options of the processors.
        kwargs: The other arguments.

    Returns:
        Model inputs with `assistant_masks`.
    """
    kwargs = {**kwargs, "return_assistant_tokens_mask": False}
    return_tensors = kwargs.pop("return_tensors", None)
    offsets_wish = {"return_offsets_mapping": True, "return_text_replacement_offsets": True}
    inputs = parent(
        conversation, chat_template=chat_template, processor_kwargs={**processor_kwargs, **offsets_wish}, **kwargs
    )
    batch = conversation if isinstance(conversation[0], list | tuple) else [conversation]
    template_kwargs = {key: value for key, value in kwargs.items() if key not in base_parameters()}
    _, spans = render_jinja_template(
        conversations=batch,
        chat_template=chat_template or processor.chat_template,
        return_assistant_tokens_mask=True,
        **{**processor.tokenizer.special_tokens_map, **template_kwargs},
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


def check_items(
    text: Any, *, images: Any, videos: Any, audio: Any, tokens: Mapping[str, str], model_name: str
) -> None:
    """Check that prompts and visual items fit before anything is decoded.

    Args:
        text: List of prompts or None.
        images: Images or None.
        videos: Videos or None.
        audio: Sound or None; no model of this package hears.
        tokens: Placeholder token of "image" and of "video".
        model_name: Name for the message about sound.

    Raises:
        ValueError: Nothing was given, sound was given, or placeholders and items differ in number.
    """
    if audio is not None:
        raise ValueError(f"{model_name} takes no sound; leave `audio` out and pass the video only.")
    if text is None and images is None and videos is None:
        raise ValueError("Nothing was given; expected text, images or videos.")
    if text is None:
        return
    if not isinstance(text, list) or not all(isinstance(sample, str) for sample in text):
        raise ValueError(f"text must be a prompt or a list of prompts, got {text!r}.")
    counts = {
        "image": len(make_flat_list_of_images(images)) if images is not None else 0,
        "video": len(flatten_videos(videos)) if videos is not None else 0,
    }
    for kind, token in tokens.items():
        found = sum(count_token(sample, token) for sample in text)
        check_placeholder_count(kind=kind, token=token, num_placeholders=found, num_items=counts[kind])


def count_kept(
    text: Sequence[str], rows: Sequence[Sequence[int]], *, tokens: Mapping[str, tuple[str, int]]
) -> list[int]:
    """Count the visual placeholders of every row after checking that tokenizing lost none.

    Args:
        text: Expanded prompts.
        rows: Their token ids.
        tokens: Placeholder token and its id of "image" and of "video".

    Returns:
        Visual placeholders per row.

    Raises:
        ValueError: A row lost visual tokens.
    """
    visual = [0] * len(rows)
    for kind, (token, token_id) in tokens.items():
        kept = [list(row).count(token_id) for row in rows]
        expected = [count_token(sample, token) for sample in text]
        check_not_truncated(kind=kind, expected=expected, kept=kept, max_length=max(map(len, rows)))
        visual = [before + now for before, now in zip(visual, kept, strict=True)]
    return visual


def check_expanded(
    text: list[str],
    text_inputs: Mapping[str, Any],
    *,
    tokens: Mapping[str, tuple[str, int]],
    max_tokens: int | None,
) -> None:
    """Check that tokenizing lost no placeholder and that prompts with visual items fit the context.

    Args:
        text: Prompts with all placeholders.
        text_inputs: `input_ids` and, where there is padding, `attention_mask`; lists or tensors (B, S).
        tokens: As for `count_kept`.
        max_tokens: Length of the context in tokens; None, or a number as huge as tokenizers give, for no limit.

    Raises:
        ValueError: Placeholders were cut off, or a prompt is longer than the context.
    """
    rows, masks = (
        value.tolist() if hasattr(value, "tolist") else value
        for value in (text_inputs["input_ids"], text_inputs.get("attention_mask"))
    )
    visual = count_kept(text, rows, tokens=tokens)
    if max_tokens is None or max_tokens >= UNLIMITED:
        return
    # Sums of plain lists: walking over a tensor of thousands of tokens takes longer than tokenizing.
    lengths = map(len, rows) if masks is None else map(sum, masks)
    for num_tokens, num_visual_tokens in zip(lengths, visual, strict=True):
        if num_visual_tokens:
            check_token_budget(num_tokens=num_tokens, num_visual_tokens=num_visual_tokens, max_tokens=max_tokens)


def count_token(text: str, token: str) -> int:
    """Count the placeholders of a prompt.

    Args:
        text: Prompt.
        token: Placeholder token.

    Returns:
        How often it occurs, places marked as plain text left out.
    """
    if not UNMARKED or (MARK is not None and MARK not in text):
        return text.count(token)
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
    if not knows_token(tokenizer, token):
        raise ValueError(
            f"The tokenizer does not know the placeholder {token!r}. Add it: "
            f"tokenizer.add_special_tokens({{'additional_special_tokens': [{token!r}]}}), and resize the embeddings."
        )
    return tokenizer.convert_tokens_to_ids(token)


def knows_token(tokenizer: Any, token: str) -> bool:
    """Say whether a tokenizer has a token.

    Args:
        tokenizer: The tokenizer.
        token: The token.

    Returns:
        True when it has the token as one piece.
    """
    token_id = tokenizer.convert_tokens_to_ids(token)
    return token_id is not None and tokenizer.convert_ids_to_tokens(token_id) == token


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
