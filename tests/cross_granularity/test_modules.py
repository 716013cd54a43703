"""Modules made from models: two architectures, both granularities of CrossVLLM, batches, frames that are seen once."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from longvideo.cross_granularity import modules
from longvideo.cross_granularity.joining import make_controller
from longvideo.cross_granularity.modules import GranularityModule, PipelineModule, granularity_modules
from longvideo.cross_granularity.rules import ControllerRules
from longvideo.cross_granularity.trace import ModuleCall, VideoQuestion
from longvideo.pipelines.video_question_answering import VideoQuestionAnsweringPipeline
from longvideo.processing.crossvllm import source_frames
from longvideo.processing.crossvllm.source_frames import SourceFrames, video_duration
from tests.tiny import tiny_tokenizer, tiny_videochat_flash_model, tiny_videochat_flash_processor
from tests.tiny_crossvllm import tiny_crossvllm_model
from tests.tiny_crossvllm_processor import tiny_crossvllm_processor
from tests.tiny_longvu import tiny_longvu_model
from tests.tiny_longvu_processor import tiny_longvu_processor
from tests.videos import make_video, numbered_frame

ROOM = {"text_kwargs": {"max_position_embeddings": 8192}}


def pipe_of(model: torch.nn.Module, processor: object) -> VideoQuestionAnsweringPipeline:
    return VideoQuestionAnsweringPipeline(model=model, processor=processor, device="cpu")


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> str:
    """Ten seconds at 8 frames per second."""
    return str(make_video(tmp_path_factory.mktemp("clips") / "a.mp4", num_frames=80, fps=8, size=(96, 64)))


@pytest.fixture(scope="module")
def flash() -> VideoQuestionAnsweringPipeline:
    return pipe_of(tiny_videochat_flash_model(**ROOM), tiny_videochat_flash_processor())


@pytest.fixture(scope="module")
def longvu() -> VideoQuestionAnsweringPipeline:
    return pipe_of(tiny_longvu_model(context_length=4096), tiny_longvu_processor())


@pytest.fixture(scope="module")
def cross() -> VideoQuestionAnsweringPipeline:
    pytest.importorskip("peft")
    return pipe_of(tiny_crossvllm_model(text_kwargs={"max_position_embeddings": 4096}), tiny_crossvllm_processor())


def call(clip: str, segment: tuple[float, float] | None = None, prompt: str = "What?", module: str = "coarse"):
    return ModuleCall(module, VideoQuestion(clip, "What?", 10.0), prompt, segment)


def ground(calls: Sequence[ModuleCall]) -> list[str]:
    """An overview module that goes forward by three seconds each time."""
    starts = [3.0 * ask.prompt.count("is not the suitable") for ask in calls]
    return [json.dumps({"t_start": start, "t_end": start + 3, "answer": ""}) for start in starts]


def test_two_architectures_answer_together(flash, longvu, clip) -> None:
    controller = make_controller(
        flash, longvu, coarse_options={"max_new_tokens": 3}, fine_options={"max_new_tokens": 4, "max_frames": 3}
    )
    (answer,) = controller([VideoQuestion(clip, "What happens?", video_duration(clip))])
    first = answer.rounds[0]
    block = {"type": "video", "video": clip}
    for pipe, turn, options in (
        (flash, first.coarse, {"max_new_tokens": 3}),
        (longvu, first.fine, {"max_new_tokens": 4, "max_frames": 3}),
    ):
        chat = [{"role": "user", "content": [block, {"type": "text", "text": turn.prompt}]}]
        assert turn.text == pipe([chat], **options)[0]["answer"]
    assert first.segment == (0.0, 10.0)


def test_the_detail_module_sees_the_segment_only(longvu, clip) -> None:
    module = PipelineModule(longvu, max_new_tokens=4)
    chat = [{"role": "user", "content": [{"type": "video", "video": clip, "video_start": 3.0, "video_end": 6.0}]}]
    chat[0]["content"].append({"type": "text", "text": "What?"})
    assert module([call(clip, (3.0, 6.0), module="fine")]) == [longvu([chat], max_new_tokens=4)[0]["answer"]]
    # The borders of the video cut nothing.
    assert modules.messages_of(call(clip, (0.0, 10.0)), longvu.processor)[0]["content"][0] == {
        "type": "video",
        "video": clip,
    }


@pytest.mark.parametrize("name", ["flash", "longvu"])
def test_a_padded_batch_answers_like_single_calls(name, clip, request) -> None:
    pipe = request.getfixturevalue(name)
    calls = [call(clip), call(clip, (2.0, 5.0), "Why is that so?"), call(clip, (4.0, 4.6), "How many?")]
    single = PipelineModule(pipe, max_new_tokens=5)(calls)
    assert len(set(single)) > 1
    assert PipelineModule(pipe, batch_size=2, max_new_tokens=5)(calls) == single


def test_a_whole_video_is_encoded_once_for_all_rounds(flash, clip, monkeypatch) -> None:
    seen = []
    encode = type(flash.model).encode_video
    monkeypatch.setattr(
        type(flash.model), "encode_video", lambda self, **kwargs: seen.append(1) or encode(self, **kwargs)
    )
    module = PipelineModule(flash, max_new_tokens=3)
    first = module([call(clip), call(clip, prompt="Why?")])
    assert module([call(clip)]) == first[:1] and len(seen) == 1


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_video_that_was_written_again_is_another_one(flash, cross, tmp_path, kind) -> None:
    from PIL import Image

    video, shared = tmp_path / ("a.mp4" if kind == "file" else "a"), []
    frames, whole = granularity_modules(cross)[0].frames, PipelineModule(flash)
    for first in (0, 40):
        pictures = [numbered_frame(first + index, (96, 64)) for index in range(8)]
        if kind == "file":
            make_video(video, num_frames=8, fps=8, size=(96, 64), frames=pictures)
        else:
            video.mkdir(exist_ok=True)
            for index, picture in enumerate(pictures):
                Image.fromarray(picture).save(video / f"{index}.png")
        asked = ModuleCall("coarse", VideoQuestion(str(video), "What?", 1.0), "What?")
        seen = frames.look(asked, {"granularity": "coarse"})
        fresh = granularity_modules(cross)[0].frames.look(asked, {"granularity": "coarse"})
        assert torch.equal(seen, fresh)
        shared.append(whole._share(asked.source))
    assert shared[0] is not shared[1]
    assert whole._share(asked.source) is shared[1]


def test_frames_in_memory_with_another_rate_are_another_video(cross) -> None:
    video, frames = np.zeros((12, 48, 48, 3), dtype=np.uint8), granularity_modules(cross)[0].frames
    for rate in (1.0, 4.0):
        question = VideoQuestion(video, "What?", 12 / rate, metadata={"fps": rate})
        frames.look(ModuleCall("coarse", question, "What?"), {"granularity": "coarse"})
        assert list(frames.sources.values())[-1].duration == 12 / rate


def test_frames_of_the_last_videos_are_kept(cross) -> None:
    coarse, fine = granularity_modules(cross, coarse_options={"max_new_tokens": 1}, fine_options={"max_new_tokens": 1})
    clips = [np.full((2, 48, 48, 3), number, dtype=np.uint8) for number in range(7)]
    asked = [ModuleCall("coarse", VideoQuestion(x, "What?", 2.0, metadata={"fps": 1.0}), "What?") for x in clips]
    for entry in asked:
        coarse([entry])
    assert len(coarse.frames.sources) == modules.KEPT_VIDEOS and coarse.frames.num_decoded == 14
    assert len(coarse.frames.cache) == 2 * modules.KEPT_VIDEOS
    fine([asked[3]])  # the first of the last four
    assert coarse.frames.num_decoded == 14 and len(coarse.frames.sources) == modules.KEPT_VIDEOS
    # Those that are asked about together are all kept, whatever their number.
    coarse(asked)
    before = coarse.frames.num_decoded
    fine(asked)
    assert coarse.frames.num_decoded == before and len(coarse.frames.sources) == 7


def test_fewer_frames_than_asked_for_are_no_warning(flash, cross, clip, recwarn) -> None:
    PipelineModule(flash, max_new_tokens=1, num_frames=64)([call(clip, (2.0, 3.0))])
    granularity_modules(cross, fine_options={"max_new_tokens": 1, "num_frames": 64})[1]([call(clip, (2.0, 3.0))])
    assert [str(entry.message) for entry in recwarn if "more than" in str(entry.message)] == []


def test_both_granularities_answer_like_the_pixels(cross, clip) -> None:
    """What the shared features give is what processor and model give from pixels."""
    processor, model = cross.processor, cross.model
    for module, segment, granularity in zip(
        granularity_modules(cross, coarse_options={"max_new_tokens": 5}, fine_options={"max_new_tokens": 5}),
        (None, (2.0, 6.0)),
        ("coarse", "fine"),
        strict=True,
    ):
        ask = call(clip, segment)
        inputs = processor.apply_chat_template(
            modules.messages_of(ask, processor),
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            processor_kwargs={"return_tensors": "pt", "granularity": granularity},
        )
        names = ("input_ids", "attention_mask", "pixel_values_videos")
        ids = model.generate(
            **{name: inputs[name] for name in names}, granularity=granularity, max_new_tokens=5, do_sample=False
        )
        wanted = processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        assert module([ask]) == [wanted]


def test_the_granularities_differ_and_batches_do_not(cross, clip) -> None:
    options = {"max_new_tokens": 6}
    coarse, fine = granularity_modules(cross, coarse_options=options, fine_options=options)
    calls = [call(clip), call(clip, (2.0, 5.0), "Why is that so?"), call(clip, (9.9, 10.0), "How many?")]
    assert coarse(calls) != fine(calls)
    for module, name in ((coarse, "coarse"), (fine, "fine")):
        single = GranularityModule(cross, name, module.frames, batch_size=1, **options)
        assert module(calls) == single(calls)
    assert cross.model.granularity == "coarse"


def test_no_frame_goes_through_the_tower_twice(cross, clip, monkeypatch) -> None:
    coarse, fine = granularity_modules(cross, coarse_options={"max_new_tokens": 2}, fine_options={"max_new_tokens": 2})
    frames = []
    run = type(cross.model.model)._run_tower
    monkeypatch.setattr(
        type(cross.model.model), "_run_tower", lambda self, x, *a, **k: frames.append(len(x)) or run(self, x, *a, **k)
    )
    coarse([call(clip)])
    assert sum(frames) == 12 == coarse.frames.num_decoded
    coarse([call(clip, prompt="Again?")])
    assert sum(frames) == 12
    fine([call(clip, (0.0, 3.0))])
    source, processor = SourceFrames(clip), cross.processor.video_processor
    taken = {*source.choose(processor, None), *source.choose(processor, (0.0, 3.0), granularity="fine")}
    # Twelve and four frames, of which one is the same.
    assert sum(frames) == len(taken) == 15
    fine([call(clip, (0.0, 3.0))])
    assert sum(frames) == len(taken)
    coarse.frames.forget()
    assert len(coarse.frames.cache) == 0


def test_many_frames_are_read_with_one_opening(cross, clip, monkeypatch) -> None:
    opened, features = [], []
    kind = type(cross.processor.video_processor)
    read = kind.read_file
    monkeypatch.setattr(kind, "read_file", lambda *args, **kwargs: opened.append(1) or read(*args, **kwargs))
    for size in (5, 32):
        monkeypatch.setattr(source_frames, "READ_FRAMES", size)
        frames = granularity_modules(cross)[0].frames
        features.append(frames.look(call(clip), {"granularity": "coarse"}))
    assert len(opened) == 2 and frames.num_decoded == 12
    # 1e-5: the tower sees other batches.
    assert torch.allclose(*features, atol=1e-5)


def test_a_crossvllm_is_both_modules(cross, clip) -> None:
    options = {"max_new_tokens": 4}
    controller = make_controller(
        cross, rules=ControllerRules(max_rounds=1), coarse_options=options, fine_options=options
    )
    answers = controller([VideoQuestion(clip, text, 10.0) for text in ("What happens?", "How many tricks?")])
    assert [len(answer.rounds[0].coarse.text) > 0 for answer in answers] == [True, True]
    assert controller.modules["coarse"].frames is controller.modules["fine"].frames


def test_reflections_of_a_model_reach_the_overview(cross, clip, monkeypatch) -> None:
    """A placeholder in a reflection is left out: it would stand for a video that is not there."""
    fine = granularity_modules(cross, fine_options={"max_new_tokens": 2})[1]
    texts = iter(['{"reflection": "a <|video_pad|> car", "answer": "x"}', '{"reflection": "", "answer": "y"}'])
    asked = []

    def overview(calls: Sequence[ModuleCall]) -> list[str]:
        asked.extend(modules.messages_of(ask, cross.processor)[0]["content"][1]["text"] for ask in calls)
        return ground(calls)

    controller = make_controller(overview, lambda calls: [fine(calls) and next(texts) for _ in calls])
    (answer,) = controller([VideoQuestion(clip, "What?", 10.0)])
    assert (answer.answer, answer.segment) == ("y", (3.0, 6.0))
    assert "because a  car\n" in asked[1] and "<|video_pad|>" not in asked[1]


def test_models_with_other_tokenizers_exchange_texts(cross, clip) -> None:
    """The overview has other ids for every word than the detail module."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["What", "happens"])
    other = pipe_of(
        tiny_videochat_flash_model(text_kwargs={"vocab_size": 270, "max_position_embeddings": 8192}),
        tiny_videochat_flash_processor(),
    )
    other.processor.tokenizer = tokenizer
    controller = make_controller(
        other, cross, coarse_options={"max_new_tokens": 3}, fine_options={"max_new_tokens": 3}
    )
    assert controller([VideoQuestion(clip, "What happens?", 10.0)])[0].answer


def test_a_processor_of_another_model_is_refused(cross) -> None:
    processor = tiny_videochat_flash_processor()
    processor.tokenizer.add_tokens([f"w{number}" for number in range(20)])
    with pytest.raises(ValueError, match=r"ids up to \d+, the crossvllm model embeds 264"):
        PipelineModule(pipe_of(cross.model, processor))
    processor.video_token_id = 7
    with pytest.raises(ValueError, match="video_token_id 4, its processor's tokenizer 7"):
        PipelineModule(pipe_of(cross.model, processor))


def test_wrong_input(flash, cross, clip, tmp_path) -> None:
    with pytest.raises(ValueError, match="has no granularities"):
        make_controller(flash)
    with pytest.raises(ValueError, match="came without its processor"):
        make_controller(cross.model)
    for make in (PipelineModule, lambda pipe, **options: granularity_modules(pipe, coarse_options=options)):
        for options in ({"num_return_sequences": 2}, {"generate_kwargs": {"num_return_sequences": 2}}):
            with pytest.raises(ValueError, match="num_return_sequences=2, but overview and detail"):
                make(cross, **options)
    with pytest.raises(ValueError, match="callable of yours"):
        make_controller(ground, ground, coarse_options={"num_frames": 3})
    with pytest.raises(ValueError, match="at least 1"):
        PipelineModule(flash, batch_size=0)
    with pytest.raises(TypeError, match="Unknown argument"):
        granularity_modules(cross, fine_options={"shots": 3})[1]([call(clip)])
    for module in (PipelineModule(flash), granularity_modules(cross)[0]):
        with pytest.raises(ValueError, match=r"question contains <\|video_pad\|>"):
            module([ModuleCall("coarse", VideoQuestion(clip, "A <|video_pad|>?", 10.0), "x")])
    with pytest.raises(ValueError, match="model takes at most"):
        granularity_modules(cross, coarse_options={"num_frames": 80})[0]([call(clip, prompt="long " * 1600)])
    with pytest.raises(FileNotFoundError, match="No such video"):
        video_duration(str(tmp_path / "none.mp4"))
    with pytest.raises(ValueError, match="without their rate"):
        video_duration(np.zeros((4, 48, 48, 3), dtype=np.uint8))


def test_frames_in_memory_and_in_files_are_the_same_segment(cross, tmp_path) -> None:
    from PIL import Image

    frames = np.stack([numbered_frame(index, (48, 48)) for index in range(20)])
    for index, frame in enumerate(frames):
        Image.fromarray(frame).save(tmp_path / f"{index:03}.png")
    processor, seen = cross.processor.video_processor, []
    for video, facts in ((frames, {"fps": 1}), (str(tmp_path), None), (sorted(map(str, tmp_path.iterdir())), None)):
        source = SourceFrames(video, facts)
        assert source.duration == video_duration(video, facts) == 20.0
        indices = source.choose(processor, (4.0, 12.0), granularity="fine")
        assert indices == [4, 6, 8, 10]
        seen.append(source.read(processor, indices))
    assert seen[0].shape == (4, 3, 48, 48) and all(torch.equal(pixels, seen[0]) for pixels in seen)


def test_named_models_are_loaded_once(cross, clip, tmp_path: Path, monkeypatch) -> None:
    cross.model.save_pretrained(tmp_path)
    cross.processor.save_pretrained(tmp_path)
    controller = make_controller(str(tmp_path), device="cpu", fine_options={"max_new_tokens": 2})
    twice = make_controller(str(tmp_path), str(tmp_path), device="cpu")
    for made in (controller, twice):
        assert made.modules["coarse"].pipe is made.modules["fine"].pipe
        assert made.modules["coarse"].frames is made.modules["fine"].frames
    ask = call(clip, (2.0, 6.0))
    expected = granularity_modules(cross, fine_options={"max_new_tokens": 2})[1]([ask])
    assert controller.modules["fine"]([ask]) == expected


def rejecting(module: GranularityModule, seen: list[str]):
    """A detail module that looks and sends every segment back."""

    def look(calls: Sequence[ModuleCall]) -> list[str]:
        seen.extend(module(calls))
        return [json.dumps({"reflection": f"Nothing at {ask.segment[0]}.", "answer": "x"}) for ask in calls]

    return look


def overview_of(module: GranularityModule, seen: list[str]):
    """An overview module that looks and then grounds as `ground` does."""

    def look(calls: Sequence[ModuleCall]) -> list[str]:
        seen.extend(module(calls))
        return ground(calls)

    return look


@pytest.mark.parametrize("settings", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
def test_later_rounds_go_on_from_the_prompt_of_the_first(cross, clip, monkeypatch, settings) -> None:
    lengths, texts = [], {}
    decoder = cross.model.model.language_model
    hook = decoder.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    for keeps in (True, False):
        if not keeps:
            monkeypatch.setattr(modules, "can_keep", lambda *args: False)
        coarse, fine = (
            granularity_modules(cross, coarse_options={"max_new_tokens": 6, **settings},
                                fine_options={"max_new_tokens": 2})
        )  # fmt: skip
        lengths.clear()
        seen: list[str] = []
        controller = make_controller(overview_of(coarse, seen), rejecting(fine, seen), ControllerRules(max_rounds=2))
        # Two questions, one after the other: nothing of the first is in the prompt of the second.
        for question in ("What happens?", "How many?"):
            controller([VideoQuestion(clip, question, 10.0)])
        texts[keeps] = seen, coarse.kept.num_reused, [length for length in lengths if length > 100]
    hook.remove()
    assert texts[True][0] == texts[False][0] and len(set(texts[True][0])) > 3
    assert texts[False][1] == 0 and len(texts[False][2]) == 12
    whole, kept = texts[False][2], texts[True][2]
    saved = [a - b for a, b in zip(whole, kept, strict=True)]
    if settings:
        assert texts[True][1] == 0 and not any(saved)
    else:
        # Overview and detail in turn, three rounds each; 12 frames of 4 tokens stand before the text.
        assert sum(saved) == texts[True][1] and min(saved[2], saved[4], saved[8], saved[10]) > 48
        assert sum(x > 0 for x in saved) == 4


def test_the_same_question_is_not_answered_from_before(cross, clip) -> None:
    """The model may have learned in between, and other frames may be asked for."""
    coarse = granularity_modules(cross, coarse_options={"max_new_tokens": 2})[0]
    ask = call(clip)
    coarse([ask])
    coarse([ask])
    coarse([call(clip, prompt="What? Now again.")])
    assert coarse.kept.num_reused == 0


def test_two_whole_models_serve_as_coarse_and_fine(cross, clip) -> None:
    """The alternative to two adapters: each model works in its own granularity and keeps its own frames."""
    other = pipe_of(
        tiny_crossvllm_model(seed=1, adapters=False, text_kwargs={"max_position_embeddings": 4096}),
        tiny_crossvllm_processor(),
    )
    options = {"max_new_tokens": 4}
    controller = make_controller(cross, other, coarse_options=options, fine_options=options)
    coarse, fine = controller.modules["coarse"], controller.modules["fine"]
    assert (coarse.granularity, fine.granularity) == ("coarse", "fine") and coarse.frames is not fine.frames
    (answer,) = controller([VideoQuestion(clip, "What happens?", 10.0)])
    (first,) = answer.rounds
    asked = ModuleCall("fine", VideoQuestion(clip, "What happens?", 10.0), first.fine.prompt, first.segment)
    assert granularity_modules(other, fine_options=options)[1]([asked]) == [first.fine.text]
    assert granularity_modules(cross, fine_options=options)[1]([asked]) != [first.fine.text]
