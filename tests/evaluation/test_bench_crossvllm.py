"""The benchmark of CrossVLLM: a naive run that writes the same, targets, tables, and courses on small inputs."""

import copy
import json
from pathlib import Path

import pytest

from longvideo.evaluation import bench, bench_crossvllm
from longvideo.evaluation.bench_crossvllm import FRAMES, NEW_TOKENS, STEPS, Course, bench_config, make_pipe
from longvideo.evaluation.presets import PRESETS
from longvideo.processing.crossvllm.policies import coarse_prompt
from tests.tiny_crossvllm import tiny_crossvllm_config
from tests.videos import make_video

TINY = {"image_token_id": 2, "video_token_id": 3}


@pytest.fixture(scope="module")
def pipe():
    text = {"vocab_size": 1024, "max_position_embeddings": 4096, "eos_token_id": 1, "bos_token_id": None}
    config = tiny_crossvllm_config(text_kwargs=text, **TINY)
    for part in (config, config.text_config, config.vision_config):
        part.initializer_range = 0.2
    return make_pipe(config, "cpu")


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> str:
    """Twelve seconds at 8 frames per second."""
    return str(make_video(tmp_path_factory.mktemp("clips") / "a.mp4", num_frames=96, fps=8, size=(96, 64)))


def test_both_sides_write_the_same_and_share_more_with_every_round(pipe, clip) -> None:
    for num_rounds in (0, 1, 3):
        courses = {naive: Course(pipe, clip, num_rounds, naive=naive) for naive in (False, True)}
        answers = {naive: course() for naive, course in courses.items()}
        assert courses[False].texts == courses[True].texts and len(courses[True].texts) == 2 * (num_rounds + 1)
        assert len({answer.segment for answer in answers.values()}) == 1
        ours, naive = courses[False], courses[True]
        assert naive.tower_frames == (12 + 4) * (num_rounds + 1)
        # Segments of 1.5 seconds have 12 frames, of which the coarse look has one or two.
        assert 12 + 2 * (num_rounds + 1) <= ours.tower_frames <= 12 + 4 * (num_rounds + 1)
        saved = naive.positions - ours.positions
        # At least the 48 visual tokens of each later look at the whole video, and the role before the feedback.
        assert saved == 0 if num_rounds == 0 else saved > 100 * num_rounds
        assert len({entry.segment for entry in answers[False].rounds}) == num_rounds + 1
    # Every run begins from nothing.
    before = ours.tower_frames
    ours()
    assert ours.tower_frames == 2 * before and ours.num_runs == 2


def test_a_course_that_ends_early_is_an_error(pipe, tmp_path) -> None:
    video = str(make_video(tmp_path / "short.mp4", num_frames=8, fps=8, size=(96, 64)))
    with pytest.raises(RuntimeError, match="clip of more than 10 seconds"):
        Course(pipe, video, 1)()


def test_prompts_have_about_as_many_tokens_as_published_ones() -> None:
    tokens = len(bench_crossvllm.make_tokenizer()(coarse_prompt(bench_crossvllm.QUESTION, 600.0)).input_ids)
    # Vicuna's tokenizer makes about 330.
    assert 200 < tokens < 450


def test_the_middle_size_has_the_papers_granularities() -> None:
    ours, paper = bench_config(288), PRESETS["crossvllm-7b"].config()
    for name in ("coarse_stride", "fine_stride", "coarse_num_frames", "fine_num_frames", "grid_size"):
        assert getattr(ours, name) == getattr(paper, name)
    assert bench_config(3).fine_num_frames == 1 and ours.num_vision_layers == 5


def fake_result() -> dict:
    """Measurements that meet the target."""
    step = {"seconds": 4.0, "cpu_seconds": 3.0, "peak_bytes": 30_000_000, "tower_frames": 352, "positions": 15_000}
    steps = {f"{name}/288": dict(step) for name in STEPS}
    steps["naive_r1/288"].update(cpu_seconds=6.0, seconds=20.0, tower_frames=640, positions=20_000)
    words = {"architecture": "crossvllm", "processor": "some processor", "device": "cpu", "python": "3.11"}
    versions = {"torch": "2", "transformers": "5", "av": "18", "command": "python -m ..."}
    return {"steps": steps, "machine": {**words, **versions, "cores": 2, "load_average": 0.1}}


def test_the_target_is_computed_from_the_measurements() -> None:
    result = fake_result()
    (target,) = bench_crossvllm.judge(result, (288,))
    assert (target["measured"], target["limit"], target["met"]) == (0.5, 0.6, True)
    for words in ("processor time, 3.0 of 6.0 s", "wall clock 0.200", "352 of 640", "15,000 of 20,000", "7B 0."):
        assert words in target["how"]
    worse = copy.deepcopy(result)
    worse["steps"]["r1/288"]["cpu_seconds"] = 3.7
    assert not bench_crossvllm.judge(worse, (288,))[0]["met"]
    worse["machine"]["device"] = "some GPU"
    assert bench_crossvllm.judge(worse, (288,))[0]["met"], "on a GPU the clock on the wall counts"


def test_tables_show_both_sides() -> None:
    result = fake_result()
    result["targets"] = bench_crossvllm.judge(result, (288,))
    text = bench.format_tables(result, markdown=True)
    for words in ("| R = 1, shared | 288 | 352 | 45.0 % | 15,000 |", "| R = 3, sharing nothing | 288 |",
                  "<= 0.6 | met", "some processor"):  # fmt: skip
        assert words in text
    json.dumps(result)


def test_a_step_in_its_own_process(clip) -> None:
    measured = bench.in_process("crossvllm", ["r0", 2, 1, "cpu", clip], threads=1)
    assert measured["tower_frames"] in (2, 3) and measured["seconds"] > 0
    # Two prompts with 2 x 16 and 1 x 144 visual tokens, and what was written.
    assert measured["positions"] > 176 + 2 * NEW_TOKENS


def test_arguments(monkeypatch, capsys) -> None:
    seen = []
    monkeypatch.setattr(bench, "measure", lambda args: seen.append(args.frames) or 1 / 0)
    for words, frames in ((["crossvllm"], list(FRAMES)), (["crossvllm", "--frames", "3"], [3])):
        with pytest.raises(ZeroDivisionError):
            bench.main(words)
        assert seen.pop() == frames
    for words in (["--frames", "0"], ["--minutes", "0.1"]):
        with pytest.raises(SystemExit):
            bench.main(["crossvllm", *words])
        assert "at least" in capsys.readouterr().err


def test_every_step_gets_the_same_clip(tmp_path) -> None:
    args = bench.build_parser().parse_args(["crossvllm", "--frames", "2", "3", "--rounds", "1", "--minutes", "0.01"])
    asked, told = [], []

    def in_process(words: list) -> dict:
        assert Path(words[4]).is_file()
        asked.append(words)
        return {"seconds": 1.0, "cpu_seconds": 1.0, "peak_bytes": 0, "tower_frames": 3, "positions": 9}

    result = bench_crossvllm.measure(args, in_process, told.append)
    assert [words[:4] for words in asked] == [[name, count, 1, "cpu"] for count in (2, 3) for name in STEPS]
    assert len({words[4] for words in asked}) == 1 and not Path(asked[0][4]).exists()
    assert list(result["steps"]) == [f"{name}/{count}" for count in (2, 3) for name in STEPS]
    assert len(bench_crossvllm.judge({**result, "machine": {"device": "cpu"}}, (2, 3))) == 2
    args.clip = str(tmp_path / "own.mp4")
    Path(args.clip).touch()
    bench_crossvllm.measure(args, in_process, told.append)
    assert asked[-1][4] == args.clip
