"""`longvideo estimate` for CrossVLLM: both looks, rounds, segments of short videos."""

import json

import pytest

from longvideo.cli import main
from tests.tiny_crossvllm import tiny_crossvllm_config
from tests.tiny_crossvllm_processor import tiny_crossvllm_processor
from tests.videos import make_video


def as_json(capsys, *words):
    assert main(["estimate", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_papers_size(capsys) -> None:
    counts = as_json(capsys, "--frames", "288", "--model", "crossvllm-7b", "--text-tokens", "300")
    assert {name: look["visual_tokens"] for name, look in counts["looks"].items()} == {"coarse": 4608, "fine": 4608}
    assert counts["parameters"]["adapters"] == 39_976_960 and counts["warning"] is None
    rounds = counts["rounds"]
    assert [rounds[number]["tower_frames"] for number in "013"] == [320, 352, 416]
    assert [rounds[number]["naive_tower_frames"] for number in "013"] == [320, 640, 1280]
    # Tower and prompts of one more round are mostly known.
    assert rounds["0"]["ratio"] == 1 > rounds["1"]["ratio"] > rounds["3"]["ratio"]


def test_text_for_people(capsys) -> None:
    assert main(["estimate", "--frames", "288", "--model", "crossvllm-7b"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for words in ("coarse look 288 frames of 336x336 pixels of the whole video", "4,608, 4x4 a frame, and 64 of text",
                  "fine look 32 frames of 336x336 pixels of a segment", "4,608, 12x12 a frame",
                  "R = 1", "352 frames through the tower; sharing nothing", "weights 14.22 GB"):  # fmt: skip
        assert words in text, words
    assert main(["estimate", "--frames", "1152", "--model", "crossvllm-7b"]) == 0
    assert "take at most 492 frames" in capsys.readouterr().out


def test_video(tmp_path, capsys) -> None:
    model, video = tmp_path / "model", str(make_video(tmp_path / "clip.mp4", 40, 8))
    tiny_crossvllm_config().save_pretrained(model)
    counts = as_json(capsys, video, "--model", str(model))
    assert [look["num_frames"] for look in counts["looks"].values()] == [12, 4] and counts["video"]["frames"] == 40
    assert as_json(capsys, video, "--model", str(model), "--frames", "7")["num_frames"] == 7
    # The processor of the folder decides about the size of frames, the wishes about their number.
    tiny_crossvllm_processor().save_pretrained(model)
    assert as_json(capsys, video, "--model", str(model), "--fps", "1")["looks"]["coarse"]["visual_tokens"] == 5 * 4
    short = str(make_video(tmp_path / "short.mp4", 3, 8))
    looks = as_json(capsys, short, "--model", str(model))["looks"]
    assert [look["num_frames"] for look in looks.values()] == [3, 3]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--dropout", "on"], "does not drop visual tokens inside its decoder"),
        (["--model", "crossvllm-13b"], "Unknown model 'crossvllm-13b'"),
    ],
)
def test_wrong_input(words, message, capsys) -> None:
    assert main(["estimate", "--frames", "8", "--model", "crossvllm-7b", *words]) == 2
    assert message in capsys.readouterr().err
