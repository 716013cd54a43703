"""Overview and detail modules made from models: any model of the package by its pipeline, CrossVLLM by granularity."""

import warnings
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from longvideo.cross_granularity.kept_prompts import KeptPrompt, can_keep
from longvideo.cross_granularity.trace import ModuleCall, VideoQuestion
from longvideo.pipelines import accounting, grounding
from longvideo.pipelines.encoding import SharedVideo
from longvideo.processing.crossvllm.source_frames import SourceFrames, cut_of, source_key

BATCH_SIZE = 4
KEPT_VIDEOS = 4


class PipelineModule:
    """Asks any model of the package.

    Whole videos that come again, in a later round or with another question, are encoded once.

    Args:
        pipe: Video question answering pipeline.
        batch_size: Calls that are padded to one batch; with 1 each is worked off by the pipeline itself, which reads
            long videos window by window.
        **options: Arguments of every call: `num_frames`, `max_frames`, `max_new_tokens`, settings of `generate`.

    Raises:
        ValueError: The processor does not belong to the model.
    """

    def __init__(self, pipe: Any, *, batch_size: int = 1, **options: Any) -> None:
        check_batch_size(batch_size)
        check_one_text(options)
        check_pair(pipe)
        self.pipe, self.batch_size, self.options = pipe, batch_size, options
        self.shared: OrderedDict[str, tuple[Any, SharedVideo]] = OrderedDict()

    def __call__(self, calls: Sequence[ModuleCall]) -> list[str]:
        """Ask the model.

        Args:
            calls: What it is asked.

        Returns:
            One text each.
        """
        for call in calls:
            check_placeholders(self.pipe.processor, call.source.question)
        with fewer_frames_allowed():
            if self.batch_size == 1:
                return [self._ask(call) for call in calls]
            return [text for part in parts_of(calls, self.batch_size) for text in self._ask_together(part)]

    def _ask(self, call: ModuleCall) -> str:
        row: dict[str, Any] = {"messages": self._messages(call)}
        if call.segment is None:
            row["shared"] = self._share(call.source)
        return self.pipe(row, **self.options)["answer"]

    def _messages(self, call: ModuleCall) -> list[dict[str, Any]]:
        return messages_of(call, self.pipe.processor)

    def _share(self, source: VideoQuestion) -> SharedVideo:
        key = source_key(source.video, source.metadata)
        # The video is kept with its features: the name of one in memory is its address.
        kept = self.shared.pop(key, None) or (source.video, SharedVideo())
        self.shared[key] = kept
        while len(self.shared) > KEPT_VIDEOS:
            self.shared.popitem(last=False)
        return kept[1]

    def _ask_together(self, calls: Sequence[ModuleCall]) -> list[str]:
        pipe = self.pipe
        preprocess, forward, _ = pipe._sanitize_parameters(**self.options)
        sampling = {key: value for key, value in preprocess.items() if key != "processor_kwargs"}
        encoded = pipe.processor.apply_chat_template(
            [self._messages(call) for call in calls],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            processor_kwargs={
                "return_tensors": "pt",
                "padding": True,
                "padding_side": "left",
                **sampling,
                **(preprocess.get("processor_kwargs") or {}),
            },
        )
        tensors = {key: pipe._cast(key, value) for key, value in encoded.items() if isinstance(value, torch.Tensor)}
        return generate_texts(pipe, tensors, forward.get("generate_kwargs"))


class GranularityModule:
    """Asks a CrossVLLM in one granularity; both of its modules share the tower's features of every frame.

    A call alone that goes on with the question of the last one keeps what the decoder knows of the whole video.

    Args:
        pipe: Video question answering pipeline of a CrossVLLM.
        granularity: "coarse" or "fine".
        frames: Features that both modules share.
        batch_size: Calls that are padded to one batch.
        **options: Arguments of every call: `num_frames`, `max_frames`, `max_new_tokens`, settings of `generate`.

    Raises:
        ValueError: The processor does not belong to the model.

    Source: CrossVLLM Sec. 3.1: one frozen tower, two granularities.
    """

    def __init__(
        self, pipe: Any, granularity: str, frames: "SeenFrames", *, batch_size: int = BATCH_SIZE, **options: Any
    ) -> None:
        check_batch_size(batch_size)
        check_one_text(options)
        check_pair(pipe)
        self.pipe, self.granularity, self.frames, self.batch_size = pipe, granularity, frames, batch_size
        preprocess, forward, _ = pipe._sanitize_parameters(**options)
        wishes = {**preprocess, **(preprocess.pop("processor_kwargs", None) or {})}
        self.wishes = {**wishes, "granularity": granularity}
        self.generate_kwargs = {**(forward.get("generate_kwargs") or {}), "granularity": granularity}
        self.kept = KeptPrompt()

    def __call__(self, calls: Sequence[ModuleCall]) -> list[str]:
        """Ask the model.

        Args:
            calls: What it is asked.

        Returns:
            One text each.
        """
        for call in calls:
            check_placeholders(self.pipe.processor, call.source.question)
        self.frames.make_room([call.source for call in calls])
        with fewer_frames_allowed():
            return [text for part in parts_of(calls, self.batch_size) for text in self._ask_together(part)]

    def _ask_together(self, calls: Sequence[ModuleCall]) -> list[str]:
        processor = self.pipe.processor
        features = [self.frames.look(call, self.wishes) for call in calls]
        stride = {name: self.wishes.get(name) for name in ("granularity", "spatial_pool_stride")}
        prompts = [
            processor.prompt_of(messages_of(call, processor), [len(seen)], **stride)
            for call, seen in zip(calls, features, strict=True)
        ]
        tokens = processor.tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt")
        tensors = {name: tokens[name] for name in ("input_ids", "attention_mask")}
        settings = {**self.generate_kwargs, **self._visual_settings(calls, tensors["input_ids"], features)}
        return generate_texts(self.pipe, tensors, settings)

    def _visual_settings(
        self, calls: Sequence[ModuleCall], ids_BS: torch.Tensor, features: list[torch.Tensor]
    ) -> dict[str, Any]:
        """Gives the features of the videos, or the cache where these are already, for `generate`."""
        model, settings = self.pipe.model, self.pipe._generate_settings(self.generate_kwargs)
        if len(calls) > 1 or not can_keep(calls[0], settings, model):
            self.kept.forget()
            return {"vision_features": features}
        config = model.config
        cache = self.kept.begin(calls[0], ids_BS[0], config.video_token_id, config.text_config)
        has_video = cache.get_seq_length() > 0
        return {"past_key_values": cache, **({} if has_video else {"vision_features": features})}


class SeenFrames:
    """The tower's features of frames, for both granularities and all rounds.

    Those of all videos that are asked about together are kept, and beside them those of the last ones before, up to
    `KEPT_VIDEOS` videos in all.

    Args:
        pipe: Video question answering pipeline of a CrossVLLM.
        cache: Features by source and frame index; the model's kind.

    Attributes:
        num_decoded: Frames that went through decoder and tower so far.
    """

    def __init__(self, pipe: Any, cache: Any) -> None:
        self.pipe, self.cache = pipe, cache
        self.sources: dict[str, SourceFrames] = {}
        self.num_decoded = 0

    @torch.no_grad()
    def look(self, call: ModuleCall, wishes: Mapping[str, Any]) -> torch.Tensor:
        """Give the features of what a call is about; only frames that nobody has seen are read.

        Args:
            call: Its source and segment.
            wishes: Options of the video processor.

        Returns:
            (F, P, E) patch features.
        """
        processor, key = self.pipe.processor.video_processor, source_key(call.source.video, call.source.metadata)
        # The last one stands last.
        source = self.sources.pop(key, None) or SourceFrames(call.source.video, call.source.metadata)
        self.sources[key] = source
        indices = source.choose(processor, call.segment, **wishes)
        new = self.cache.missing(key, indices)
        for pixels in source.read_parts(processor, new):
            part, new = new[: len(pixels)], new[len(pixels) :]
            pixels = self.pipe._cast("pixel_values_videos", pixels).to(self.pipe.device)
            self.pipe.model.get_vision_features(pixels[None], cache=self.cache, sources=[key], frame_indices=[part])
            self.num_decoded += len(part)
        return self.cache.gather(key, indices)

    def make_room(self, questions: Sequence[VideoQuestion]) -> None:
        """Drop what is known of videos that were asked about longest ago.

        Args:
            questions: Those that are asked next; what is known of their videos is kept.
        """
        self.forget(questions, others=KEPT_VIDEOS)

    def forget(self, questions: Sequence[VideoQuestion] = (), *, others: int = 0) -> None:
        """Drop features and facts before other videos are asked about.

        Args:
            questions: Those that are asked next; what is known of their videos is kept.
            others: Videos of which the last ones are kept beside, less those of the questions.
        """
        named = {source_key(question.video, question.metadata) for question in questions}
        old = [key for key in self.sources if key not in named]
        for key in old[: max(len(old) - max(others - len(named), 0), 0)]:
            del self.sources[key]
            self.cache.clear(key)


def granularity_modules(
    pipe: Any, *, coarse_options: Mapping[str, Any] | None = None, fine_options: Mapping[str, Any] | None = None
) -> tuple[GranularityModule, GranularityModule]:
    """Make both modules of a CrossVLLM.

    Args:
        pipe: Its video question answering pipeline.
        coarse_options: Arguments of the overview module, see `GranularityModule`.
        fine_options: Arguments of the detail module.

    Returns:
        Overview and detail module, which share the features of frames.
    """
    from longvideo.modeling.crossvllm.frame_cache_crossvllm import FrameFeatureCache

    frames = SeenFrames(pipe, FrameFeatureCache())
    options = {"coarse": coarse_options or {}, "fine": fine_options or {}}
    return tuple(GranularityModule(pipe, name, frames, **options[name]) for name in ("coarse", "fine"))


def has_granularities(pipe: Any) -> bool:
    """Say whether a pipeline's model sees videos in two granularities.

    Args:
        pipe: A pipeline.

    Returns:
        True where model and processor can switch.
    """
    return hasattr(getattr(pipe, "model", None), "use_granularity") and hasattr(pipe.processor, "prompt_of")


def messages_of(call: ModuleCall, processor: Any) -> list[dict[str, Any]]:
    """Write a call as a chat.

    Args:
        call: What is asked.
        processor: Whose placeholders must not stand in the text.

    Returns:
        One message: the video, then the text.
    """
    start, end = cut_of(call.segment, call.source.duration)
    options = {"video_start": start, "video_end": end, "video_metadata": call.source.metadata}
    block = {"type": "video", "video": call.source.video}
    block.update({name: value for name, value in options.items() if value is not None})
    text = call.prompt
    for token in placeholders_of(processor):
        # A module may have written one into its reflection.
        text = text.replace(token, "")
    return [{"role": "user", "content": [block, {"type": "text", "text": text}]}]


def placeholders_of(processor: Any) -> list[str]:
    """List the placeholders of a processor.

    Args:
        processor: The processor.

    Returns:
        Its video and image token.
    """
    return [token for token in (getattr(processor, f"{kind}_token", None) for kind in ("video", "image")) if token]


def check_placeholders(processor: Any, question: str) -> None:
    """Check that a question holds no placeholder.

    Args:
        processor: The processor.
        question: The question.

    Raises:
        ValueError: It does.
    """
    for token in placeholders_of(processor):
        if token in question:
            raise ValueError(f"The question contains {token}, which stands for a video or an image; leave it out.")


def check_pair(pipe: Any) -> None:
    """Check that a processor writes the placeholders that its model looks for.

    Args:
        pipe: Pipeline.

    Raises:
        ValueError: The processor's tokenizer is another model's.
    """
    config, processor = pipe.model.config, pipe.processor
    rows = pipe.model.get_input_embeddings().weight.shape[0]
    for name in ("video_token_id", "image_token_id"):
        wanted, found = getattr(config, name, None), getattr(processor, name, None)
        if wanted is not None and found is not None and wanted != found:
            raise ValueError(
                f"The {config.model_type} model has {name} {wanted}, its processor's tokenizer {found}: the processor "
                "is another model's. Load model and processor from the same checkpoint; the two modules may have "
                "different tokenizers, they exchange texts."
            )
    words = set(processor.tokenizer.get_vocab().values()) - {getattr(processor, "video_token_id", None)}
    highest = max(words - {getattr(processor, "image_token_id", None)})
    if highest >= rows:
        raise ValueError(
            f"The processor's tokenizer has ids up to {highest}, the {config.model_type} model embeds {rows}: the "
            "processor is another model's. Load model and processor from the same checkpoint."
        )


def check_batch_size(batch_size: int) -> None:
    """Check a batch size.

    Args:
        batch_size: Calls per batch.

    Raises:
        ValueError: It is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}, expected at least 1.")


def check_one_text(options: Mapping[str, Any]) -> None:
    """Check that a module is to write one text for each call.

    Args:
        options: Arguments of every call.

    Raises:
        ValueError: Several are asked for.
    """
    wanted = {**(options.get("generate_kwargs") or {}), **options}.get("num_return_sequences")
    if wanted not in (None, 1):
        raise ValueError(
            f"num_return_sequences={wanted!r}, but overview and detail module hand each other one text. Leave it out; "
            "a single look (granularity='coarse' or 'fine') may give several."
        )


def generate_texts(
    pipe: Any, tensors: dict[str, torch.Tensor], generate_kwargs: Mapping[str, Any] | None
) -> list[str]:
    """Let a model answer a padded batch.

    Args:
        pipe: Pipeline with model, processor and settings.
        tensors: Inputs of `generate`, padded on the left.
        generate_kwargs: Settings of `generate`.

    Returns:
        One text per row.

    Raises:
        ValueError: A prompt does not fit the model, or its weights give no finite numbers.
    """
    settings = {**pipe._generate_settings(dict(generate_kwargs or {})), "return_dict_in_generate": False}
    length = tensors["input_ids"].shape[1]
    for ids_S, mask_S in zip(tensors["input_ids"], tensors["attention_mask"], strict=True):
        row = {"input_ids": ids_S[mask_S.bool()][None]}
        accounting.check_budget(row, pipe.model.config, pipe._max_new_tokens(settings, row["input_ids"].shape[1]))
    with pipe.device_placement(), torch.no_grad(), accounting.trace_call(pipe.model):
        on_device = {name: value.to(pipe.device) for name, value in tensors.items()}
        ids_BS = pipe.model.generate(**on_device, **settings)
    if ids_BS.shape[1] >= length:
        ids_BS = ids_BS[:, length:]
    hidden = grounding.hidden_ids(pipe.processor, pipe.model.generation_config)
    return [grounding.decode_answer(pipe.processor, ids_S, hidden) for ids_S in ids_BS]


def parts_of(values: Sequence[Any], size: int) -> Iterable[Sequence[Any]]:
    """Cut a sequence into parts.

    Args:
        values: The sequence.
        size: Values per part.

    Returns:
        The parts in order.
    """
    return (values[begin : begin + size] for begin in range(0, len(values), size))


@contextmanager
def fewer_frames_allowed() -> Any:
    """Hush the warning that a segment has fewer frames than asked for: the paper takes the lesser of both."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"num_frames=\d+ is more than the \d+ frames")
        yield
