"""`longvideo ask` with a LongVU checkpoint: text, JSON, picture, and what such a model cannot do."""

import json

import pytest
from PIL import Image

from longvideo import cli
from longvideo.evaluation import demo
from tests.tiny_longvu import tiny_longvu_model
from tests.tiny_longvu_processor import tiny_longvu_processor
from tests.videos import make_video


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_longvu_model(context_length=300).save_pretrained(folder)
    tiny_longvu_processor().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return str(make_video(tmp_path_factory.mktemp("video") / "clip.mp4", num_frames=64))


@pytest.fixture
def run(checkpoint, video, capsys):
    def call(*words):
        given = ["--model", checkpoint, "--device", "cpu", "--max-new-tokens", "4", *words]
        return cli.main(["ask", video, "What happens?", *given]), *capsys.readouterr()

    return call


def test_json_counts_frames_and_tokens_at_every_step(run, tmp_path):
    picture = tmp_path / "kept.png"
    code, out, _ = run("--json", "--num-frames", "28", "--show-kept", str(picture))
    report = json.loads(out)
    assert code == 0 and set(report["timings"]) == {"decode", "encode", "generate"}
    counts = report["token_counts"]
    (selection,) = counts["selections"]
    assert (selection["frames"], selection["mode"]) == (28, "mix")
    assert 0 < selection["full_resolution_frames"] < selection["kept_frames"] <= 28
    assert counts["patch_tokens"] == 28 * 49 and counts["visual_tokens"] == selection["visual_tokens"]
    assert Image.open(picture).width > 500 and report["kept_picture"] == str(picture)


def test_text_and_streaming(run):
    code, out, err = run("--stream")
    assert code == 0 and "8 frames: 392 patches -> 8 frames kept, 8 at full resolution (full) -> 96 visual tok" in err
    assert out.strip() == run()[1].strip()


def test_options(run):
    code, out, _ = run("--json", "--options", "red", "blue")
    assert code == 0 and json.loads(out)["answer"] in ("red", "blue")


def test_what_cannot_work_is_one_line(run):
    for words, text in (
        (["--visual-dropout", "on"], "does not drop visual tokens inside its decoder"),
        (["--max-new-tokens", "299"], "leaves nothing of the model's 300 positions"),
    ):
        code, out, err = run(*words)
        assert (code, out) == (2, "") and text in err and "Traceback" not in err


def test_demo_draws_without_dropout(checkpoint, video, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "MAX_NEW_TOKENS", 4)
    assert demo.main(["--model", checkpoint, "--out", str(tmp_path / "out"), "--video", video]) == 0
    out = capsys.readouterr().out
    assert "frames kept" in out and "dropout" not in out
    assert Image.open(tmp_path / "out" / "kept_tokens.png").width > 500
