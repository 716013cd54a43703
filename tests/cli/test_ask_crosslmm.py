"""`longvideo ask` with a CrossLMM checkpoint: text, JSON, options, and what such a model cannot do."""

import json

import pytest
from PIL import Image

from longvideo import cli
from tests.hub.saved_tiny import save_tiny
from tests.videos import make_video


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return str(save_tiny("crosslmm", tmp_path_factory.mktemp("checkpoint")))


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return str(make_video(tmp_path_factory.mktemp("video") / "clip.mp4", num_frames=56))


@pytest.fixture
def run(checkpoint, video, capsys):
    def call(*words, source=video):
        given = ["--model", checkpoint, "--device", "cpu", "--max-new-tokens", "4", *words]
        return cli.main(["ask", source, "What happens?", *given]), *capsys.readouterr()

    return call


def test_text_and_streaming(run):
    code, out, err = run("--stream")
    assert code == 0 and "7 frames: 112 patches -> 28 visual tokens" in err
    assert out.strip() == run()[1].strip() and out.strip()


def test_json_and_wishes(run):
    code, out, _ = run("--json", "--start", "1", "--end", "5", "--num-frames", "3")
    report = json.loads(out)
    assert code == 0 and set(report["timings"]) == {"decode", "encode", "generate"}
    counts = report["token_counts"]
    assert (counts["frames"], counts["patch_tokens"], counts["visual_tokens"]) == (3, 48, 12)
    assert "grounding" not in report and "kept_picture" not in report


def test_a_picture(run, tmp_path):
    path = tmp_path / "picture.png"
    Image.new("RGB", (50, 30), "red").save(path)
    code, out, _ = run("--json", source=str(path))
    assert code == 0 and json.loads(out)["token_counts"]["visual_tokens"] == 4


def test_options(run):
    code, out, _ = run("--json", "--options", "red", "blue")
    assert code == 0 and json.loads(out)["answer"] in ("red", "blue")


def test_what_cannot_work_is_one_line(run, tmp_path):
    for words, text in (
        (["--visual-dropout", "on"], "does not drop visual tokens inside its decoder"),
        (["--show-kept", str(tmp_path / "kept.png")], "there are no kept tokens"),
        (["--task", "tvg"], "no tasks for times and places"),
        (["--draw", str(tmp_path / "out.mp4")], "is a crosslmm model"),
        (["--max-new-tokens", "2047"], "at most 2048"),
    ):
        code, out, err = run(*words)
        assert (code, out) == (2, "") and text in err and "Traceback" not in err, words
        assert len([line for line in err.splitlines() if line.startswith("longvideo ask: error: ")]) == 1
