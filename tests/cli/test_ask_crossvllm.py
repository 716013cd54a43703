"""`longvideo ask` with a CrossVLLM checkpoint: rounds, JSON, the time line, single looks, and what cannot work."""

import json

import pytest
from PIL import Image

import longvideo
from longvideo import cli
from longvideo.cross_granularity import modules
from tests.tiny import tiny_videochat_flash_model, tiny_videochat_flash_processor
from tests.tiny_crossvllm import tiny_crossvllm_model
from tests.tiny_crossvllm_processor import tiny_crossvllm_processor
from tests.videos import make_video

pytest.importorskip("peft")

POLICIES = ['{"t_start": 1, "t_end": 3}', '{"t_start": 4, "t_end": 5.5}']
VERDICTS = ['{"reflection": "only a car", "answer": "?"}', '{"reflection": "", "answer": "a hat"}']


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_crossvllm_model(text_kwargs={"max_position_embeddings": 4096}).save_pretrained(folder)
    tiny_crossvllm_processor().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return str(make_video(tmp_path_factory.mktemp("video") / "clip.mp4", num_frames=48, fps=8))


@pytest.fixture
def run(checkpoint, video, capsys):
    def call(*words, source=video, model=checkpoint):
        given = ["--model", model] if model else []
        return cli.main(
            ["ask", source, *words, *given, "--device", "cpu", "--max-new-tokens", "4"]
        ), *capsys.readouterr()

    return call


@pytest.fixture
def say(monkeypatch):
    """Lets the modules say what is written down."""
    lines = {"coarse": list(POLICIES), "fine": list(VERDICTS)}
    monkeypatch.setattr(
        modules.GranularityModule, "__call__", lambda self, calls: [lines[self.granularity].pop(0) for _ in calls]
    )


def test_the_trace_prints_the_rounds(run, say) -> None:
    code, out, err = run("What?", "--trace")
    assert (code, out) == (0, "a hat\n")
    assert err.splitlines()[:5] == [
        f"round 0, overview: policy read as json, 1.0 to 3.0 s: {POLICIES[0]}",
        f"round 0, detail of 1.0 to 3.0 s: policy read as json, sent back: {VERDICTS[0]}",
        f"round 1, overview: policy read as json, 4.0 to 5.5 s: {POLICIES[1]}",
        f"round 1, detail of 4.0 to 5.5 s: policy read as json, accepted: {VERDICTS[1]}",
        "end: accepted, 4.0 to 5.5 s, 4 calls",
    ]


def test_without_a_trace_the_end_is_told(run, say) -> None:
    code, out, err = run("What?", "--max-rounds", "0")
    assert (code, out) == (0, "?\n") and err.startswith("end: limit, 1.0 to 3.0 s, 2 calls\n")


def test_json(run, say) -> None:
    code, out, _ = run("What?", "--json", "--trace")
    report = json.loads(out)
    assert code == 0 and (report["answer"], report["segment"], report["reason"]) == ("a hat", [4.0, 5.5], "accepted")
    assert [entry["segment"] for entry in report["rounds"]] == [[1.0, 3.0], [4.0, 5.5]]
    assert report["rounds"][0]["coarse"]["parse_ok"] is True


def test_the_segments_are_drawn_on_a_time_line(run, say, tmp_path, monkeypatch) -> None:
    from longvideo import draw_grounding

    drawn = []
    real = draw_grounding.collect_marks
    monkeypatch.setattr(draw_grounding, "collect_marks", lambda found: drawn.append(real(found)) or drawn[0])
    page = tmp_path / "page.png"
    code, _, err = run("What?", "--draw", str(page))
    assert code == 0 and f"answer drawn in {page}" in err and Image.open(page).width == 960
    assert [(mark.label, mark.span) for mark in drawn[0]] == [
        ("round 0, sent back: only a car", (1.0, 3.0)),
        ("round 1, accepted", (4.0, 5.5)),
        ("answer: a hat", (4.0, 5.5)),
    ]


def test_the_answer_of_random_weights(run) -> None:
    code, out, err = run("What?", "--json", "--trace", "--task", "tvg")
    assert code == 0, err
    assert json.loads(out)["segment"] is not None
    code, out, err = run("How many?", "--exhaustive", "on", "--json")
    assert code == 0 and json.loads(out)["reason"] == "exhaustive", err


def test_a_single_look(run) -> None:
    code, out, _ = run("What?", "--granularity", "fine", "--num-frames", "3", "--json")
    assert code == 0 and json.loads(out)["token_counts"]["visual_tokens"] == 108
    assert run("What?", "--granularity", "coarse", "--options", "a", "b")[0] == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--max-rounds", "-1"), "--max-rounds must be 0 or more"),
        (("--granularity", "fine", "--trace"), "--granularity looks once"),
        (("--trace", "--stream"), "does not go with --stream"),
        (("--stream",), "cannot be streamed"),
        (("--num-frames", "3"), "num_frames belong"),
        (("--show-kept", "x.png"), "CrossVLLM keeps as many"),
        (("--task", "stvg"), "Unknown task 'stvg'"),
    ],
)
def test_wrong_arguments(run, words, message) -> None:
    code, out, err = run("What?", *words)
    assert code != 0 and out == "" and message in err and "Traceback" not in err


def test_models_that_look_once(run, video, tmp_path) -> None:
    tiny_videochat_flash_model().save_pretrained(tmp_path)
    tiny_videochat_flash_processor().save_pretrained(tmp_path)
    code, _, err = run("What?", "--trace", model=str(tmp_path))
    assert code != 0 and "got a videochat_flash model" in err


def test_the_tiny_one_answers_where_rounds_are_asked_for(run, monkeypatch) -> None:
    def lost(name: str) -> str:
        raise ValueError(f"no tiny {name}.")

    monkeypatch.setattr(longvideo, "tiny_checkpoint", lost)
    code, _, err = run("What?", "--trace", model=None)
    assert code != 0 and "no tiny crossvllm. Name a CrossVLLM checkpoint with --model." in err
