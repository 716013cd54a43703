"""`longvideo ask`: what it prints, the JSON, the picture, options, and arguments that cannot work."""

import json

import pytest
from PIL import Image

import longvideo
from longvideo import cli
from longvideo.cli import ask
from tests.tiny import tiny_videochat_flash_model, tiny_videochat_flash_processor
from tests.videos import make_video

QUESTION = "What happens?"
DROPOUT = "uniform0_attention:1,3:1,0.75,0.25"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_videochat_flash_model().save_pretrained(folder)
    tiny_videochat_flash_processor().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return str(make_video(tmp_path_factory.mktemp("video") / "clip.mp4", num_frames=48))


@pytest.fixture
def run(checkpoint, video, capsys):
    def call(*words, model=True):
        chosen = ["--model", checkpoint, "--device", "cpu"] if model else ["--device", "cpu"]
        code = cli.main(["ask", video, QUESTION, *chosen, "--max-new-tokens", "5", *words])
        return code, *capsys.readouterr()

    return call


def test_answer_on_stdout_and_the_rest_on_stderr(run):
    code, out, err = run()
    assert code == 0
    assert out.strip() and out.count("\n") >= 1
    assert "visual tokens" in err and "decode" in err
    assert "visual tokens" not in out


def test_json_with_dropout(run, checkpoint, video):
    code, out, _ = run("--json", "--visual-dropout", DROPOUT, "--num-frames", "8")
    report = json.loads(out)
    assert code == 0
    assert report["video"] == video and report["question"] == QUESTION and report["model"] == checkpoint
    assert set(report) == {"video", "question", "model", "answer", "timings", "token_counts"}
    counts = report["token_counts"]
    assert counts["frames"] == 8 and counts["visual_tokens"] == 32 and counts["generated_tokens"] <= 5
    assert [stage["visual_tokens"] for stage in counts["after_stages"]] == [24, 8]


def test_cut_and_frame_counts(run):
    code, out, _ = run("--json", "--start", "1", "--end", "3", "--min-frames", "4", "--max-frames", "4")
    assert code == 0 and json.loads(out)["token_counts"]["frames"] == 4


def test_stream_prints_the_same_answer(run):
    code, out, err = run("--stream")
    assert code == 0 and "frames:" in err
    assert out.strip() == run()[1].strip()


def test_options_are_compared(run):
    code, out, _ = run("--json", "--options", "red", "blue", "green")
    report = json.loads(out)
    assert code == 0 and report["answer"] in ("red", "blue", "green")
    best = max(report["options"], key=lambda option: option["score"])
    assert best["text"] == report["answer"] and all(option["score"] < 0 for option in report["options"])
    code, out, _ = run("--options", "red", "blue", "green")
    shares = [float(line.split("%")[0]) for line in out.splitlines()]
    # Rounded to tenths of a percent each.
    assert len(shares) == 3 and sum(shares) == pytest.approx(100, abs=0.2)
    assert shares == sorted(shares, reverse=True) and out.splitlines()[0].endswith(report["answer"])


def test_show_kept_draws_a_picture(run, tmp_path):
    target = tmp_path / "kept.png"
    code, _, err = run("--show-kept", str(target), "--visual-dropout", DROPOUT)
    assert code == 0 and str(target) in err
    plain = tmp_path / "plain.png"
    assert run("--show-kept", str(plain))[0] == 0
    # Two stages more make a longer page.
    assert Image.open(target).height > Image.open(plain).height
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept.png", "plain.png"]


def test_without_model_the_embedded_one_answers_and_is_named(run, checkpoint, monkeypatch):
    monkeypatch.setattr(longvideo, "tiny_checkpoint", lambda name: checkpoint if name == "videochat_flash" else None)
    code, out, err = run(model=False)
    assert code == 0 and out.strip()
    assert "tiny embedded VideoChat-Flash" in err and "coloured shapes" in err


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--num-frames", "0"], "--num-frames must be greater than 0, got 0."),
        (["--fps", "-1"], "--fps must be greater than 0"),
        (["--fps", "nan"], "--fps must be greater than 0"),
        (["--num-frames", "8", "--fps", "1"], "exclude each other"),
        (["--min-frames", "9", "--max-frames", "8"], "--min-frames 9 is more than --max-frames 8"),
        (["--start", "3", "--end", "2"], "--start 3 s must come before --end 2 s"),
        (["--stream", "--json"], "exclude each other"),
        (["--options", "red", "blue", "--stream"], "does not go with"),
        (["--options", "red"], "at least two"),
        (["--visual-dropout", "often"], "on, off or TYPE:LAYERS:RATIOS"),
        (["--visual-dropout", "uniform:1,2:1,0.5"], "one ratio more than layers"),
        (["--visual-dropout", "uniform:9:1,0.5"], "decoder of 4 layers"),
        (["--show-kept", "kept.xyz"], ".png"),
        (["--show-kept", "no/such/folder/kept.png"], "does not exist"),
        (["--dtype", "int7"], "Unknown arithmetic type 'int7'"),
        (["--device", "cuda:99"], "'cuda:99' cannot be used here"),
    ],
)
def test_arguments_that_cannot_work(run, words, text):
    code, out, err = run(*words)
    assert code == 2 and out == ""
    lines = [line for line in err.splitlines() if line.startswith("longvideo ask: error: ")]
    assert len(lines) == 1 and text in lines[0]
    assert "Traceback" not in err


def test_dropout_forms():
    assert ask.parse_visual_dropout(None) is None
    assert ask.parse_visual_dropout("on") is True and ask.parse_visual_dropout("off") is False
    wanted = {"type": "uniform0_attention", "layers": [1, 3], "ratios": [1.0, 0.75, 0.25]}
    assert ask.parse_visual_dropout(DROPOUT) == wanted
