"""What both modules of cross-granularity training see and write: features, prompts, sampled policies, likelihoods.

Shape legend: B answers, n samples, S positions of a sequence, T frames, P patches of a frame, E vision width.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from longvideo.modeling.crossvllm.frame_cache_crossvllm import FrameFeatureCache
from longvideo.processing.crossvllm.policies import coarse_prompt, parse_coarse, plain_prompt
from longvideo.processing.crossvllm.segment_times import normalize_segment
from longvideo.processing.crossvllm.source_frames import SourceFrames, source_key
from longvideo.processing.shared.video_sources import is_remote
from longvideo.trainers.cross_granularity_rows import Segment, VideoQuestion
from longvideo.trainers.dpo_loss import IGNORE_INDEX

READ_FRAMES = 32


class Policy(NamedTuple):
    """What the coarse module wrote: token ids with the end token, text, the segment it means, and its state.

    The segment of a policy that cannot be read is the whole video.
    """

    ids: list[int]
    text: str
    segment: Segment
    is_well_formed: bool


class Target(NamedTuple):
    """A prompt with an answer: all token ids, where the answer begins in them, and features (T, P, E)."""

    ids: list[int]
    begin: int
    features: torch.Tensor


class SeenVideos:
    """The tower's features of frames, each read and encoded once for both modules and all policies.

    Args:
        processor: Processor of the model.
        wishes: Options of the processor by granularity.
        keep_frames: Frames that may be kept when a new pair of steps begins; more are forgotten, all together.

    Attributes:
        num_read: Frames that were read and encoded so far.
    """

    def __init__(self, processor: Any, wishes: Mapping[str, Mapping[str, Any]], *, keep_frames: int = 0) -> None:
        self.processor, self.wishes, self.keep_frames = processor, wishes, keep_frames
        self.cache = FrameFeatureCache()
        self.sources: dict[str, SourceFrames] = {}
        self.num_read = 0

    def begin_pair(self) -> None:
        """Forget what earlier steps have seen, where it is too much."""
        if len(self.cache) > self.keep_frames or not self.keep_frames:
            self.cache.clear()
            self.sources.clear()

    def source(self, question: VideoQuestion) -> SourceFrames:
        """Describe a video once.

        Args:
            question: Whose video.

        Returns:
            The source, which knows its duration.

        Raises:
            ValueError: The video cannot be read, or stands under an address.
        """
        key = source_key(question.video, question.metadata)
        if key not in self.sources:
            if is_remote(question.video):
                raise ValueError(
                    f"{question.name} has its video at {question.video}; segments are read again and again. Download "
                    "it and name the file."
                )
            try:
                self.sources[key] = SourceFrames(question.video, question.metadata)
            except ValueError as error:
                raise ValueError(f"{question.name}: {error}") from error
        return self.sources[key]

    @torch.no_grad()
    def look(
        self, model: nn.Module, question: VideoQuestion, granularity: str, segment: Segment | None = None
    ) -> torch.Tensor:
        """Give the features of a video or of a segment.

        Args:
            model: The model, without wrappers.
            question: Whose video.
            granularity: "coarse" or "fine", which says how many frames.
            segment: (start, end) in seconds; None for the whole video.

        Returns:
            (T, P, E).
        """
        source, video_processor = self.source(question), self.processor.video_processor
        indices = source.choose(video_processor, segment, **self.wishes[granularity])
        missing = self.cache.missing(source.key, indices)
        for begin in range(0, len(missing), READ_FRAMES):
            part = missing[begin : begin + READ_FRAMES]
            pixels = source.read(video_processor, part).to(model.device, model.dtype)
            model.get_vision_features(pixels[None], cache=self.cache, sources=[source.key], frame_indices=[part])
            self.num_read += len(part)
        return self.cache.gather(source.key, indices)


class ModuleTexts:
    """Prompts and answers of both modules as token ids.

    Args:
        processor: Processor of the model.
        wishes: Options of the processor by granularity.
    """

    def __init__(self, processor: Any, wishes: Mapping[str, Mapping[str, Any]]) -> None:
        self.processor, self.tokenizer = processor, processor.tokenizer
        names = ("granularity", "spatial_pool_stride")
        self.strides = {name: {key: call[key] for key in names if key in call} for name, call in wishes.items()}
        self.placeholders = frozenset({processor.image_token_id, processor.video_token_id} - {None})

    def prompt(self, question: VideoQuestion, granularity: str, num_frames: int, duration: float) -> str:
        """Write the prompt of a module with its placeholders.

        Args:
            question: What is asked.
            granularity: "coarse" for the prompt P_c of training, "fine" for the plain question.
            num_frames: Frames that the module sees.
            duration: Seconds of the whole video.

        Returns:
            The prompt up to the place where the answer begins.

        Raises:
            ValueError: The question holds a placeholder.

        Source: CrossVLLM Sec. 4: only P_c is used in training; Eq. 6.
        """
        try:
            return self.processor.prompt_of(
                self._messages(question, granularity, duration), [num_frames], **self.strides[granularity]
            )
        except ValueError as error:
            raise ValueError(f"{question.name}: {error}") from error

    def prompt_ids(self, prompt: str) -> list[int]:
        """Returns the token ids of a prompt."""
        return self.tokenizer(prompt)["input_ids"]

    def answered(self, question: VideoQuestion, prompt: str, answer: str) -> tuple[list[int], int]:
        """Write an answer behind the prompt of the fine module, with its end token.

        Args:
            question: What was asked.
            prompt: What `prompt` gave.
            answer: The answer.

        Returns:
            Token ids of both, and where those of the answer begin.
        """
        asked = self._messages(question, "fine", 0.0)
        told = [*asked, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
        render = self.processor.apply_chat_template
        before = render(asked, add_generation_prompt=True, tokenize=False)
        suffix = render(told, tokenize=False)[len(before) :].rstrip()
        tokens = self.tokenizer(prompt + suffix, return_offsets_mapping=True)
        # Tokens are told by their place in the text: what stands at the border may be joined to one.
        begin = next(i for i, (_, end) in enumerate(tokens["offset_mapping"]) if end > len(prompt))
        return tokens["input_ids"], begin

    def _messages(self, question: VideoQuestion, granularity: str, duration: float) -> list[dict[str, Any]]:
        if granularity == "coarse":
            text = coarse_prompt(question.question, duration, grounding_only=True)
        else:
            text = plain_prompt(question.question)
        content = [{"type": "video", "video": "-"}, {"type": "text", "text": text}]
        return [{"role": "user", "content": content}]

    def end_ids(self, model: nn.Module) -> list[int]:
        """Returns the ids at which a text ends."""
        own = model.generation_config.eos_token_id
        ids = {*(own if isinstance(own, list) else [own]), self.tokenizer.eos_token_id} - {None}
        return sorted(ids)

    def policy(self, ids: Sequence[int], end_ids: Sequence[int], duration: float, min_segment: float) -> Policy:
        """Read what the coarse module wrote.

        Args:
            ids: New tokens, padded behind the end token.
            end_ids: Ids at which a text ends.
            duration: Seconds of the whole video.
            min_segment: Shortest segment in seconds.

        Returns:
            The policy.

        Source: CrossVLLM Sec. 3. Differs: A policy that cannot be read stands for the whole video.
        """
        end = next((i + 1 for i, x in enumerate(ids) if x in end_ids), len(ids))
        # A placeholder would stand for a video that is not there when the policy goes through the model again.
        kept = [token for token in ids[:end] if token not in self.placeholders]
        text = self.tokenizer.decode(kept, skip_special_tokens=True).strip()
        parsed = parse_coarse(text)
        segment = normalize_segment(parsed.t_start, parsed.t_end, duration, min_segment=min_segment)
        well_formed = parsed.parse_ok and segment is not None
        return Policy(kept, text, segment if well_formed else (0.0, duration), well_formed)


@contextmanager
def answering(model: nn.Module) -> Iterator[None]:
    """Lets a model answer, without gradients and dropout, and brings it back to where it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Switches dropout off, which layers that are computed again for their gradients keep to as well."""
    rates = [(module, module.p) for module in model.modules() if isinstance(module, nn.Dropout)]
    for module, _ in rates:
        module.p = 0.0
    try:
        yield
    finally:
        for module, rate in rates:
            module.p = rate


def generate(
    model: nn.Module,
    prompt_ids: Sequence[int],
    features: torch.Tensor,
    *,
    granularity: str,
    num_samples: int | None = None,
    **settings: Any,
) -> list[list[int]]:
    """Let a module write anything but placeholders of images and videos.

    Args:
        model: The model, without wrappers.
        prompt_ids: Token ids of the prompt.
        features: (T, P, E) what the module sees.
        granularity: "coarse" or "fine".
        num_samples: Samples n, which share the prompt and the video before them; None for the most likely text.
        **settings: Of `generate`.

    Returns:
        New token ids of each text, padded behind their end.
    """
    ids_1S = torch.tensor([prompt_ids], device=model.device)
    usual = {"num_beams": 1, "repetition_penalty": 1.0, "return_dict_in_generate": False}
    settings = {**usual, "suppress_tokens": suppressed_ids(model), **settings}
    with answering(model), model.use_granularity(granularity):
        if num_samples is None:
            settings.update(do_sample=False, vision_features=[features])
            ids_nS = model.generate(input_ids=ids_1S, attention_mask=torch.ones_like(ids_1S), **settings)
        else:
            before = model(input_ids=ids_1S[:, :-1], vision_features=[features], use_cache=True, logits_to_keep=1)
            before.past_key_values.batch_repeat_interleave(num_samples)
            # The model's own settings of sampling would bend the distribution.
            settings.update(do_sample=True, top_k=0, top_p=1.0, past_key_values=before.past_key_values)
            ids_nS = ids_1S.repeat(num_samples, 1)
            ids_nS = model.generate(input_ids=ids_nS, attention_mask=torch.ones_like(ids_nS), **settings)
    return ids_nS[:, ids_1S.shape[1] :].tolist()


def suppressed_ids(model: nn.Module) -> list[int]:
    """Returns the ids that a model shall not write: the placeholders, and those that its settings name."""
    config = model.config
    own = model.generation_config.suppress_tokens or ()
    return sorted({*own, config.image_token_id, config.video_token_id} - {None})


def answer_logits(
    model: nn.Module, targets: Sequence[Target], *, granularity: str, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run a module over answers.

    Args:
        model: The model, with or without wrappers.
        targets: Prompts with answers.
        granularity: "coarse", "fine" or the name of a reference.
        device: Where the model is.

    Returns:
        Logits (B, S', V) of the last S' positions, from the first answer on, and labels (B, S') that fit them.
    """
    length, first = max(len(target.ids) for target in targets), min(target.begin for target in targets) - 1
    ids_BS = torch.zeros(len(targets), length, dtype=torch.int64)
    mask_BS, labels_BS = torch.zeros_like(ids_BS), torch.full_like(ids_BS, IGNORE_INDEX)
    for row, target in enumerate(targets):
        ids = torch.tensor(target.ids)
        ids_BS[row, : len(ids)] = ids
        mask_BS[row, : len(ids)] = 1
        labels_BS[row, target.begin : len(ids)] = ids[target.begin :]
    outputs = model(
        input_ids=ids_BS.to(device),
        attention_mask=mask_BS.to(device),
        vision_features=[target.features for target in targets],
        granularity=granularity,
        logits_to_keep=torch.arange(first, length, device=device),
        use_cache=False,
    )
    return outputs.logits, labels_BS[:, first:].to(device)
