"""`pipeline("video-question-answering")`: a video and a question in, an answer out.

It follows the calls and outputs of the in-tree `image-text-to-text` pipeline and of the former visual question
answering one; samples are worked off one at a time, because videos of different lengths do not stack.
"""

import inspect
import time
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from transformers import GenerationConfig, Pipeline
from transformers.utils.chat_template_utils import Chat

from longvideo.pipelines import accounting, encoding, granularities, grounding, inputs
from longvideo.pipelines.streaming import AnswerStream

DEFAULT_MAX_NEW_TOKENS = 256
SAMPLING_KEYS = ("num_frames", "fps", "min_frames", "max_frames")
GENERATION_KEYS = frozenset(key for key in vars(GenerationConfig()) if not key.startswith("_"))
PREPROCESS_KEYS = (
    *SAMPLING_KEYS,
    *grounding.TASK_KEYS,
    "start",
    "end",
    "granularity",
    "processor_kwargs",
    "continue_final_message",
    "video_metadata",
)
POSTPROCESS_KEYS = (
    "return_full_text",
    "return_timings",
    "return_token_counts",
    "return_video_metadata",
    "return_kept_tokens",
)


class VideoQuestionAnsweringPipeline(Pipeline):
    """Answer questions about videos and pictures.

    Example: `pipe(video="clip.mp4", question="What happens?")` returns `{"answer": ..., "generated_text": ...}`.
    Greedy decoding and at most 256 new tokens, unless the call or the checkpoint's generation config says otherwise.
    """

    _load_processor = True
    _load_tokenizer = False
    _load_image_processor = False
    _load_feature_extractor = False
    _load_video_processor = False
    _pipeline_calls_generate = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # The library treats generation settings given here differently from version to version; keep them ourselves.
        own = {key: kwargs.pop(key) for key in list(kwargs) if key in GENERATION_KEYS or key == "generation_config"}
        self._init_generate_kwargs = own
        super().__init__(*args, **kwargs)
        if not hasattr(self.processor, "apply_chat_template"):
            raise ValueError(
                f"This pipeline needs the model's processor, got {type(self.processor).__name__}. "
                "Pass processor=AutoProcessor.from_pretrained(...), after `import longvideo`."
            )

    def _sanitize_parameters(self, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        given = {key: value for key, value in kwargs.items() if value is not None}
        generate_kwargs = dict(given.pop("generate_kwargs", {}))
        for key in [key for key in given if key in GENERATION_KEYS or key in ("generation_config", "streamer")]:
            if key in generate_kwargs:
                raise ValueError(f"'{key}' is given twice, in generate_kwargs and as an argument; keep one.")
            generate_kwargs[key] = given.pop(key)
        preprocess = {key: given.pop(key) for key in PREPROCESS_KEYS if key in given}
        postprocess = {key: given.pop(key) for key in POSTPROCESS_KEYS if key in given}
        forward: dict[str, Any] = {"generate_kwargs": generate_kwargs} if generate_kwargs else {}
        if "granularity" in preprocess:
            forward["granularity"] = preprocess["granularity"]
        if "visual_dropout" in given:
            self._check_dropout(given["visual_dropout"])
            forward["visual_dropout"] = given.pop("visual_dropout")
        if postprocess.get("return_kept_tokens"):
            forward["return_kept_tokens"] = True
        if given:
            known = sorted({*PREPROCESS_KEYS, *POSTPROCESS_KEYS, "visual_dropout", "generate_kwargs", "stream"})
            raise TypeError(
                f"Unknown argument(s) {sorted(given)} for video question answering. Known are {known} "
                "and the settings of generate()."
            )
        return preprocess, forward, postprocess

    def supports_dropout(self) -> bool:
        """Tell whether the model can drop visual tokens inside its decoder (`visual_dropout`)."""
        return "visual_dropout" in inspect.signature(type(self.model).forward).parameters

    def _check_dropout(self, visual_dropout: bool | dict[str, Any] | None) -> None:
        if visual_dropout not in (None, False) and not self.supports_dropout():
            raise ValueError(
                f"A {self.model.config.model_type} model does not drop visual tokens inside its decoder; leave "
                "visual_dropout out."
            )

    def __call__(
        self,
        video: Any = None,
        question: str | list[str] | None = None,
        *,
        image: Any = None,
        video_metadata: dict[str, Any] | None = None,
        stream: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Answer one or many questions.

        Args:
            video: path, URL, array (F, H, W, C), list of frames, list of videos; a dict with `video` (or `image`) and
                `question`, or with `messages`; a list of such dicts; a generator or dataset of them; one chat (list
                of role dicts) or a list of chats.
            question: one question, one per video, or several about one video, which is then encoded once.
            image: a picture in place of a video.
            video_metadata: `fps` and `total_num_frames` of a video given as an array.
            stream: return an iterator over pieces of text (its `.result` is the dict); one sample only.
            **kwargs: `max_new_tokens`, `generate_kwargs` and single settings of `generate`, `streamer`;
                `num_frames`, `fps` (frames per second), `min_frames`, `max_frames`; `start`, `end` (seconds);
                for models that answer with times and places `grounding_task` ("tvg", "stvg", ...: the question is
                what is looked for), `span` ((start, end) or a start, seconds of the source), `box` (left, top, right,
                bottom, pixels of the source), `pattern` (wording), each also as a key of a row;
                `visual_dropout` (False, True or a dict); `processor_kwargs`; `return_timings`, `return_token_counts`,
                `return_video_metadata`, `return_kept_tokens`, `return_full_text` (chat only);
                for models with two granularities the fields of `ControllerRules` (`max_rounds`, `exhaustive` ...),
                `coarse_options` and `fine_options` (`num_frames`, `max_new_tokens` ...), `grounding_task` "tvg",
                `batch_size`, or `granularity` ("coarse" or "fine") for a single look.

        Returns:
            A dict with `answer` and `generated_text` (for a chat the messages with the new turn), with `grounding`
            (spans in seconds, boxes in pixels of the first video or picture) where the processor reads it, and on
            request `timings` (seconds), `token_counts`, `video_metadata` (source fps, duration and the sampled frames'
            indices and times), `kept_tokens`; a list of dicts for a list, an iterator for a generator or dataset.
            A model with two granularities also gives `segment` ((start, end) in seconds or None), `reason`, `rounds`,
            `num_calls` and `duration` (seconds) of a question about a video; see `CrossGranularityAnswer`.

        Raises:
            ValueError: the question is empty, the prompt does not fit the model, or arguments contradict each other.
            OSError: the video file cannot be opened.
        """
        gathered = inputs.gather_inputs(video, question, image, video_metadata)
        if granularities.applies(self, gathered, stream=stream, granularity=kwargs.get("granularity")):
            return granularities.answer_rows(self, gathered, kwargs)
        if kwargs.pop("batch_size", 1) not in (None, 1):
            warnings.warn("Videos of different lengths do not stack: batch_size is taken as 1.", stacklevel=2)
        if stream:
            return self._stream(gathered, kwargs)
        return super().__call__(gathered, batch_size=1, **kwargs)

    def _stream(self, row: Any, kwargs: dict[str, Any]) -> AnswerStream:
        chat = isinstance(row, list) and row and inputs.is_message(row[0])
        if not chat and not isinstance(row, Mapping):
            raise ValueError("stream=True answers one question about one video; call once per sample.")
        preprocess, forward, postprocess = self._sanitize_parameters(**kwargs)
        # Decoded here, so that a wrong path is raised by the call and not by the first piece.
        model_inputs = self.preprocess(Chat(row) if chat else row, **{**self._preprocess_params, **preprocess})

        def run(streamer: Any) -> dict[str, Any]:
            params = {**self._forward_params, **forward}
            params["generate_kwargs"] = {**params.get("generate_kwargs", {}), "streamer": streamer}
            outputs = self.forward(model_inputs, **params)
            return self.postprocess(outputs, **{**self._postprocess_params, **postprocess})

        return AnswerStream(run, self.processor.tokenizer, self._hidden_ids())

    def preprocess(
        self,
        row: Any,
        *,
        start: float | None = None,
        end: float | None = None,
        processor_kwargs: dict[str, Any] | None = None,
        continue_final_message: bool | None = None,
        video_metadata: Any = None,
        granularity: str | None = None,
        **sampling: Any,
    ) -> dict[str, Any]:
        """Decode, sample, resize and tokenize one sample."""
        begin = time.perf_counter()
        if not isinstance(row, (Mapping, Chat)):
            raise ValueError(f"A {type(row).__name__} came without a question: pass question=..., or dicts with both.")
        is_chat = isinstance(row, Chat) or "messages" in row
        task = {name: sampling.pop(name, None) for name in grounding.TASK_KEYS}
        messages, source = self._messages(row, task, start=start, end=end)
        if not messages:
            raise ValueError("An empty list of chat messages was given.")
        inputs.check_messages(messages)
        if continue_final_message is None:
            continue_final_message = messages[-1]["role"] == "assistant"
        options = {"return_tensors": "pt", **granularities.of_one_look(self, granularity), **sampling}
        options.update(processor_kwargs or {})
        options.update(encoding.window_options(self.processor, messages))
        if inputs.has_video(messages) or grounding.answers_with_places(self.processor):
            options["return_metadata"] = True
        if not isinstance(row, Chat) and row.get("video_metadata") is not None:
            video_metadata = row["video_metadata"]
        if video_metadata is not None:
            options["video_metadata"] = video_metadata if isinstance(video_metadata, list) else [video_metadata]
        encoded = self.processor.apply_chat_template(
            messages,
            add_generation_prompt=not continue_final_message,
            continue_final_message=continue_final_message,
            tokenize=True,
            return_dict=True,
            processor_kwargs=options,
        )
        if grounding.answers_with_places(self.processor):
            source = grounding.describe_source(self.processor, encoded, *source)
            encoded.pop("image_sizes", None)
        tensors = {key: self._cast(key, value) for key, value in encoded.items() if isinstance(value, torch.Tensor)}
        about = {
            "decode": time.perf_counter() - begin,
            "messages": messages if is_chat else None,
            "videos": [inputs.describe_video(facts) for facts in encoded.get("video_metadata") or ()],
            "windows": next(iter(encoded.get("video_windows") or ()), None),
            "shared": None if isinstance(row, Chat) else row.get("shared"),
            "source": source,
        }
        return {"tensors": tensors, "about": about}

    def _messages(
        self, row: Any, task: dict[str, Any], *, start: float | None, end: float | None
    ) -> tuple[list[dict[str, Any]], tuple[str | None, float | None]]:
        """Return a sample as messages; with them its task and the second at which the event asked for begins."""
        own = {} if isinstance(row, Chat) else {name: row[name] for name in task if row.get(name) is not None}
        task = {**task, **own}
        grounding.check_task(self.processor, task)
        name = task["grounding_task"]
        if name is None:
            messages = row.messages if isinstance(row, Chat) else inputs.row_to_messages(row, start=start, end=end)
            return messages, (None, None)
        if isinstance(row, Chat) or "messages" in row:
            raise ValueError("grounding_task= writes the question itself; give video= or image= in place of a chat.")
        kind, block = inputs.row_to_block(row, start=start, end=end)
        given = {**task, "video_metadata": row.get("video_metadata")}
        messages, begin = grounding.task_messages(self.processor, kind, block, row.get("question"), given)
        return messages, (name, begin)

    def _hidden_ids(self) -> frozenset[int] | None:
        return grounding.hidden_ids(self.processor, self.model.generation_config)

    def _cast(self, name: str, value: torch.Tensor) -> torch.Tensor:
        # Pixels only: coordinates in a question are numbers that half precision would move.
        return value.to(self.dtype) if name.startswith("pixel_values") and self.dtype is not None else value

    def _ensure_tensor_on_device(self, inputs: Any, device: torch.device) -> Any:
        # Pixels of a long video stay where they are for a model that moves them a chunk at a time.
        if not isinstance(inputs, dict) or not getattr(self.model, "moves_pixels", False):
            return super()._ensure_tensor_on_device(inputs, device)
        return {
            name: value if name.startswith("pixel_values") else self._ensure_tensor_on_device(value, device)
            for name, value in inputs.items()
        }

    def _generate_settings(self, generate_kwargs: dict[str, Any] | None) -> dict[str, Any]:
        """Merge settings: this call, the pipeline's own, the checkpoint's, then greedy and 256 tokens."""
        settings = {**self._init_generate_kwargs, **(generate_kwargs or {})}
        if settings.get("generation_config") is not None:
            return settings
        saved = self.model.generation_config.to_diff_dict()
        if not any(key in source for key in ("max_new_tokens", "max_length") for source in (settings, saved)):
            settings["max_new_tokens"] = DEFAULT_MAX_NEW_TOKENS
        settings.setdefault("do_sample", False)
        if not settings["do_sample"]:
            # Sampling settings saved with a checkpoint would only cause warnings in a greedy call.
            settings.update(
                {key: None for key in ("temperature", "top_p", "top_k") if key in saved and key not in settings}
            )
        return settings

    def _max_new_tokens(self, settings: dict[str, Any], prompt_tokens: int) -> int:
        config = settings.get("generation_config") or self.model.generation_config
        new = settings.get("max_new_tokens") or config.max_new_tokens
        if new is not None:
            return new
        length = settings.get("max_length") or config.max_length or prompt_tokens
        return max(length - prompt_tokens, 0)

    def _forward(
        self,
        model_inputs: dict[str, Any],
        generate_kwargs: dict[str, Any] | None = None,
        visual_dropout: bool | dict[str, Any] | None = None,
        return_kept_tokens: bool = False,
        granularity: str | None = None,
    ) -> dict[str, Any]:
        settings, about = self._generate_settings(generate_kwargs), model_inputs["about"]
        tensors, config = model_inputs["tensors"], self.model.config
        prompt = tensors["input_ids"].shape[1]
        if visual_dropout is not None and self.supports_dropout():
            settings["visual_dropout"] = visual_dropout
        settings.update(granularities.of_one_look(self, granularity), return_dict_in_generate=False)
        with encoding.closing_windows(about), accounting.trace_call(self.model) as trace:
            accounting.check_budget(tensors, config, self._max_new_tokens(settings, prompt))
            generate_inputs, video, waits = self._encode_once(tensors, about, with_thumbs=return_kept_tokens)
            ids = self.model.generate(**generate_inputs, **settings)
        answer_ids = ids[0, prompt:] if ids.shape[1] >= prompt else ids[0]
        outputs: dict[str, Any] = {
            "answer_ids": answer_ids,
            "about": about,
            "timings": trace.timings(about["decode"], waits),
            "token_counts": accounting.count_tokens(tensors, config, trace, answer_ids.numel()),
        }
        if return_kept_tokens:
            outputs["kept_tokens"] = self._kept_tokens(tensors, about, video, trace)
        return outputs

    def _encode_once(
        self,
        tensors: dict[str, torch.Tensor],
        about: dict[str, Any],
        *,
        with_thumbs: bool = False,
        force: bool = False,
    ) -> tuple[dict[str, Any], encoding.SharedVideo, list[float]]:
        """Encode the videos of a sample where that pays; `generate` encodes the others itself.

        Args:
            tensors: processor output.
            about: what `preprocess` noted about the sample.
            with_thumbs: whether small frames are kept for a picture.
            force: whether the sample is asked several times.

        Returns:
            The inputs of `generate`, with features in place of pixels; the features, if any; seconds of decoding
            before each window.
        """
        windows, video = about["windows"], about["shared"] or encoding.SharedVideo()
        if windows is None and not (with_thumbs or force or about["shared"]):
            return tensors, video, []
        # Counts come only with videos of several lengths, so processors do not list them.
        names, waits = [*self.processor.video_processor.model_input_names, "video_num_frames"], []
        if video.encoded is None:
            timed = (
                None if windows is None else encoding.TimedWindows(windows, self._to_uint8 if with_thumbs else None)
            )
            video.encoded = encoding.encode_sample(self.model, tensors, timed, names=names)
            if timed is not None:
                video.thumbs, waits = timed.thumbs(), timed.waits
        if video.encoded is None:
            return tensors, video, waits
        rest = {name: value for name, value in tensors.items() if name not in names}
        return {**rest, "encoded_video": video.encoded}, video, waits

    def _kept_tokens(
        self,
        tensors: dict[str, torch.Tensor],
        about: dict[str, Any],
        video: encoding.SharedVideo,
        trace: accounting.CallTrace,
    ) -> dict[str, Any]:
        """Collect what a picture of the kept tokens needs, for the first video of the sample."""
        encoded, config = video.encoded, self.model.config
        if encoded is None:
            raise ValueError("return_kept_tokens needs a video in the prompt; this sample has none.")
        if not trace.selections and not hasattr(encoded, "merge_groups"):
            raise ValueError(
                f"A {config.model_type} model keeps as many tokens of every video, at the same places; there are no "
                "kept tokens to return."
            )
        frames = video.thumbs
        if frames is None:
            pixels = tensors["pixel_values_videos"]
            frames_FCHW = pixels.flatten(0, 1) if pixels.ndim == 5 else pixels
            frames = self._to_uint8(frames_FCHW[: encoded.num_frames[0]])
        ids = tensors["input_ids"][0]
        first_video = int((ids == config.video_token_id).nonzero()[0])
        # Pictures in front of the video come first in the sample's visual tokens.
        num_before = int((ids[:first_video] == config.image_token_id).sum())
        kept = {"frames": frames, "times": about["videos"][0]["frame_times"] if about["videos"] else None}
        if trace.selections:
            sides = (config.grid_size, config.lowres_token)
            return {**kept, "selection": trace.selections[num_before], "grid_sides": sides}
        return {
            **kept,
            "merge_groups": encoded.merge_groups[0],
            "first_token": num_before,
            "stages": list(trace.stages),
        }

    def _to_uint8(self, pixels_FCHW: torch.Tensor) -> torch.Tensor:
        """Undo the normalization, so that patches lie where the model saw them."""
        processor = self.processor.video_processor
        mean = torch.tensor(processor.image_mean, device=pixels_FCHW.device).view(1, -1, 1, 1)
        std = torch.tensor(processor.image_std, device=pixels_FCHW.device).view(1, -1, 1, 1)
        pixels_FCHW = (pixels_FCHW.float() * std + mean).mul(255).round().clamp(0, 255)
        return pixels_FCHW.to(torch.uint8).permute(0, 2, 3, 1)  # (F, H, W, C)

    def postprocess(
        self,
        outputs: dict[str, Any],
        *,
        return_full_text: bool = True,
        return_timings: bool = False,
        return_token_counts: bool = False,
        return_video_metadata: bool = False,
        return_kept_tokens: bool = False,
    ) -> dict[str, Any]:
        """Decode the answer and keep what was asked for."""
        answer = grounding.decode_answer(self.processor, outputs["answer_ids"], self._hidden_ids())
        result: dict[str, Any] = {"answer": answer, "generated_text": answer}
        if grounding.answers_with_places(self.processor):
            result["grounding"] = grounding.read_answer(self.processor, answer, outputs["about"]["source"])
        messages = outputs["about"]["messages"]
        if messages is not None and return_full_text:
            result["generated_text"] = _append_turn(messages, answer)
        if return_timings:
            result["timings"] = outputs["timings"]
        if return_token_counts:
            result["token_counts"] = outputs["token_counts"]
        if return_video_metadata:
            result["video_metadata"] = outputs["about"]["videos"]
        if return_kept_tokens:
            result["kept_tokens"] = outputs["kept_tokens"]
        return result

    def score_options(
        self, video: Any, question: str, options: list[str], *, visual_dropout: Any = None, **kwargs: Any
    ) -> list[float]:
        """Score given answers by their likelihood after the question.

        Args:
            video: one video, as in the call.
            question: the question.
            options: texts to compare, at least two.
            visual_dropout: as in the call.
            **kwargs: frame sampling and cutting, as in the call.

        Returns:
            One mean log-probability per token (natural logarithm, end of turn not counted) for each option.

        Raises:
            ValueError: fewer than two options, or an empty one.
        """
        if len(options) < 2 or not all(option.strip() for option in options):
            raise ValueError(f"Give at least two non-empty options to compare, got {options!r}.")
        self._check_dropout(visual_dropout)
        row = inputs.gather_inputs(video, question, None, kwargs.pop("video_metadata", None))
        params = {**self._preprocess_params, **self._sanitize_parameters(**kwargs)[0]}
        model_inputs = self._ensure_tensor_on_device(self.preprocess(row, **params), self.device)
        tensors = model_inputs["tensors"]
        tokenized = [self.processor.tokenizer.encode(option, add_special_tokens=False) for option in options]
        longest = max(len(ids) for ids in tokenized)
        extra = {"visual_dropout": visual_dropout} if visual_dropout is not None and self.supports_dropout() else {}
        extra.update(granularities.of_one_look(self, params.get("granularity")))
        with encoding.closing_windows(model_inputs["about"]), self.device_placement(), torch.no_grad():
            accounting.check_budget(tensors, self.model.config, longest)
            given, *_ = self._encode_once(tensors, model_inputs["about"], force=True)
            return [
                accounting.forced_log_likelihood(self.model, given, ids, extra, max_new_tokens=longest)
                for ids in tokenized
            ]

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Save model and processor; no code is written beside them.

        Args:
            save_directory: folder, made when missing.
            **kwargs: passed to both `save_pretrained`.
        """
        self.model.save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory, **kwargs)


def _append_turn(messages: list[dict[str, Any]], answer: str) -> list[dict[str, Any]]:
    last = messages[-1]
    if last["role"] != "assistant":
        return [*messages, {"role": "assistant", "content": answer}]
    content = last["content"]
    if isinstance(content, str):
        return [*messages[:-1], {**last, "content": content + answer}]
    blocks = [*content[:-1], {**content[-1], "text": content[-1].get("text", "") + answer}]
    return [*messages[:-1], {**last, "content": blocks}]
