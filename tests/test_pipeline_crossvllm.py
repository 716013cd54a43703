"""The pipeline with a CrossVLLM: both granularities, single looks, many questions, and what cannot work."""

import json
from collections.abc import Sequence

import numpy as np
import pytest

from longvideo.cross_granularity import modules
from longvideo.cross_granularity.trace import ModuleCall
from longvideo.pipelines import granularities
from longvideo.pipelines.video_question_answering import VideoQuestionAnsweringPipeline
from tests.tiny import tiny_videochat_flash_model, tiny_videochat_flash_processor
from tests.tiny_crossvllm import tiny_crossvllm_model
from tests.tiny_crossvllm_processor import tiny_crossvllm_processor
from tests.videos import make_video, numbered_frame

pytest.importorskip("peft")
ASK = modules.GranularityModule.__call__


@pytest.fixture(scope="module")
def pipe() -> VideoQuestionAnsweringPipeline:
    model = tiny_crossvllm_model(text_kwargs={"max_position_embeddings": 4096})
    return VideoQuestionAnsweringPipeline(model=model, processor=tiny_crossvllm_processor(), device="cpu")


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("clips")
    return [str(make_video(folder / f"{n}.mp4", num_frames=n, fps=8, size=(96, 64))) for n in (80, 40)]


@pytest.fixture
def say(monkeypatch):
    """Lets both modules say what is written down, after the model was really asked."""

    def call(coarse: Sequence[str], fine: Sequence[str]) -> list[ModuleCall]:
        lines, asked = {"coarse": list(coarse), "fine": list(fine)}, []

        def speak(self: modules.GranularityModule, calls: Sequence[ModuleCall]) -> list[str]:
            asked.extend(calls)
            assert len(ASK(self, calls)) == len(calls)
            return [lines[self.granularity].pop(0) for _ in calls]

        monkeypatch.setattr(modules.GranularityModule, "__call__", speak)
        return asked

    return call


GROUND = '{"t_start": 2.0, "t_end": 6.0, "answer": ""}'
FITS = '{"reflection": "", "answer": "a hat"}'


def test_an_answer_comes_with_its_rounds(pipe, clips, say) -> None:
    say([GROUND, '{"t_start": 6, "t_end": 8}'], ['{"reflection": "a car", "answer": "?"}', FITS])
    result = pipe(clips[0], "What?", max_new_tokens=2, return_timings=True)
    assert (result["answer"], result["generated_text"], result["segment"]) == ("a hat", "a hat", (6.0, 8.0))
    assert (result["reason"], result["num_calls"], result["duration"]) == ("accepted", 4, 10.0)
    first = result["rounds"][0]
    assert first["fine"]["policy"]["reflection"] == "a car" and first["fine"]["parse_ok"]
    assert first["coarse"]["text"] == GROUND and first["segment"] == (2.0, 6.0)
    assert set(result["timings"]) == {"total"} and json.dumps(result)


def test_rules_and_tasks_reach_the_controller(pipe, clips, say) -> None:
    asked = say([GROUND], ['{"reflection": "a car", "answer": "3.0 to 4.5"}'])
    result = pipe(clips[0], "a dog barks", grounding_task="tvg", max_rounds=0, max_new_tokens=2)
    assert (result["segment"], result["answer"], result["reason"]) == ((3.0, 4.5), "3.0 to 4.5", "limit")
    assert "sampled from 2.0 to 6.0" in asked[1].prompt
    say(["Two."], ["[]"])
    result = pipe(clips[0], "How many?", exhaustive="auto", max_new_tokens=2)
    assert (result["reason"], result["answer"], result["events"]) == ("exhaustive", "Two.", [])


def test_many_questions_go_together(pipe, clips, say) -> None:
    asked = say([GROUND, GROUND, '{"t_start": null, "t_end": null, "answer": "direct"}'], [FITS, FITS])
    results = pipe(clips[0], ["A?", "B?", "C?"], max_new_tokens=2)
    assert [result["reason"] for result in results] == ["accepted", "accepted", "direct"]
    assert [call.module for call in asked] == ["coarse"] * 3 + ["fine"] * 2


def test_rows_lists_and_iterators(pipe, clips, monkeypatch) -> None:
    monkeypatch.setattr(granularities, "GROUP", 2)
    options = {"max_new_tokens": 3, "max_rounds": 0}
    rows = [{"video": clip, "question": text} for clip in clips for text in ("A?", "B?")]
    single = [pipe(row, **options) for row in rows]
    assert pipe(rows, **options) == single
    assert list(pipe((row for row in rows), **options)) == single
    assert pipe(clips, "A?", **options) == single[::2]


def test_frames_in_memory_need_their_rate(pipe) -> None:
    frames = np.stack([numbered_frame(index, (48, 48)) for index in range(12)])
    result = pipe(frames, "What?", video_metadata={"fps": 2}, max_new_tokens=2, max_rounds=0)
    assert result["duration"] == 6.0
    with pytest.raises(ValueError, match="without their rate"):
        pipe(frames, "What?")


def test_a_video_shorter_than_a_second(pipe, tmp_path) -> None:
    clip = str(make_video(tmp_path / "short.mp4", num_frames=3, fps=8, size=(48, 48)))
    result = pipe(clip, "What?", max_new_tokens=3)
    assert result["segment"] in (None, (0.0, 0.375))


def test_t_start_after_the_end(pipe, clips, say) -> None:
    say(['{"t_start": 11, "t_end": 12, "answer": ""}'], [FITS])
    assert pipe(clips[0], "What?", max_new_tokens=2)["segment"] == (0.0, 10.0)


def test_an_address_is_downloaded_once(pipe, clips, monkeypatch) -> None:
    from contextlib import contextmanager

    fetched = []

    @contextmanager
    def copied(address, **_):
        fetched.append(address)
        yield clips[0]

    monkeypatch.setattr("longvideo.processing.crossvllm.source_frames.downloaded", copied)
    result = pipe("https://example.org/a.mp4", ["A?", "B?"], max_new_tokens=2, max_rounds=0)
    assert len(fetched) == 1 and result[0]["duration"] == 10.0


def test_a_single_look(pipe, clips) -> None:
    coarse = pipe(clips[0], "What?", granularity="coarse", max_new_tokens=4, return_token_counts=True)
    fine = pipe(clips[0], "What?", granularity="fine", max_new_tokens=4, return_token_counts=True)
    assert "rounds" not in coarse and coarse["answer"] != fine["answer"]
    assert (coarse["token_counts"]["frames"], coarse["token_counts"]["visual_tokens"]) == (12, 48)
    assert (fine["token_counts"]["frames"], fine["token_counts"]["visual_tokens"]) == (4, 144)
    assert pipe(clips[0], ["What?", "Why?"], granularity="fine", max_new_tokens=4)[0]["answer"] == fine["answer"]
    pieces = pipe(clips[0], "What?", granularity="fine", stream=True, max_new_tokens=4)
    assert "".join(pieces) == fine["answer"]
    scores = [pipe.score_options(clips[0], "What?", ["a", "b"], granularity=name) for name in ("coarse", "fine")]
    assert scores[0] != scores[1] and pipe.score_options(clips[0], "What?", ["a", "b"]) == scores[0]


def test_chats_and_pictures_are_single_looks(pipe, clips) -> None:
    chat = [{"role": "user", "content": [{"type": "video", "path": clips[0]}, {"type": "text", "text": "What?"}]}]
    expected = pipe(clips[0], "What?", granularity="coarse", max_new_tokens=4)["answer"]
    assert pipe(chat, max_new_tokens=4)["answer"] == expected
    assert pipe([chat], max_new_tokens=4)[0]["answer"] == expected
    from PIL import Image

    picture = pipe(image=Image.fromarray(numbered_frame(3)), question="What?", max_new_tokens=4)
    assert set(picture) == {"answer", "generated_text"}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_frames": 3}, ValueError, "num_frames belong"),
        ({"start": 1.0}, ValueError, "start belong"),
        ({"return_token_counts": True}, ValueError, "a single look"),
        ({"stream": True}, ValueError, "cannot be streamed"),
        ({"granularity": "medium"}, ValueError, "coarse, fine"),
        ({"max_rounds": -1}, ValueError, "max_rounds=-1"),
        ({"grounding_task": "stvg"}, ValueError, "Unknown task 'stvg'"),
        ({"batch_size": 0}, ValueError, "batch_size=0"),
        ({"rounds": 3}, TypeError, "Unknown argument"),
        ({"coarse_options": {"num_frames": 3, "fps": 2}}, ValueError, "exclude each other"),
    ],
)
def test_wrong_arguments(pipe, clips, options, error, message) -> None:
    with pytest.raises(error, match=message):
        pipe(clips[0], "What?", **options)


def test_wrong_rows(pipe, clips, tmp_path) -> None:
    with pytest.raises(ValueError, match="list of questions is empty"):
        pipe(clips[0], [])
    with pytest.raises(ValueError, match="question is empty"):
        pipe(clips[0], " ")
    with pytest.raises(FileNotFoundError, match="No such video"):
        pipe(str(tmp_path / "none.mp4"), "What?")
    with pytest.raises(ValueError, match="needs 'video' and 'question'"):
        pipe([{"video": clips[0], "question": "What?"}, {"image": "x.png", "question": "What?"}])
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video at all")
    with pytest.raises(ValueError, match=r"broken\.mp4"):
        pipe(str(broken), "What?")


def test_models_without_granularities(clips) -> None:
    other = VideoQuestionAnsweringPipeline(
        model=tiny_videochat_flash_model(), processor=tiny_videochat_flash_processor(), device="cpu"
    )
    with pytest.raises(ValueError, match="videochat_flash model has no granularities"):
        other(clips[0], "What?", granularity="fine")
    with pytest.raises(TypeError, match="max_rounds"):
        other(clips[0], "What?", max_rounds=1)
