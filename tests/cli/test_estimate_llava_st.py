"""`longvideo estimate` for LLaVA-ST: the same for every video, and what it cannot count."""

import json

import pytest

from longvideo.cli import main
from tests.tiny_llava_st import tiny_llava_st_config
from tests.videos import make_video


def as_json(capsys, *words):
    assert main(["estimate", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_published_size_by_name(capsys):
    counts = as_json(capsys, "--frames", "100", "--model", "llava_st-7b")
    assert (counts["fast_tokens"], counts["slow_tokens"], counts["visual_tokens"]) == (900, 1620, 2520)
    again = as_json(capsys, "--frames", "100", "--model", "appletea2333/LLaVA-ST-Qwen2-7B")
    assert {**again, "model": ""} == {**counts, "model": ""} and counts["warning"] is None


def test_text_for_people(capsys):
    with pytest.warns(UserWarning, match="sees 100 frames of every video"):
        assert main(["estimate", "--frames", "8", "--model", "llava_st-7b", "--new-tokens", "40000"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for words in ("100 of 384x384 pixels", "fast stream 900 (token embeddings only", "packers", "warning: prompt and"):
        assert words in text


def test_folder_and_video(tmp_path, capsys):
    model, video = tmp_path / "model", str(make_video(tmp_path / "clip.mp4", 40, 8))
    tiny_llava_st_config().save_pretrained(model)
    counts = as_json(capsys, video, "--model", str(model), "--start", "1")
    assert (counts["num_frames"], counts["visual_tokens"], counts["video"]["frames"]) == (6, 14, 32)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--dropout", "on"], "does not drop visual tokens inside its decoder"),
        (["--model", "llava_st-9b"], "Unknown model 'llava_st-9b'"),
    ],
)
def test_wrong_input(words, message, capsys):
    assert main(["estimate", "--frames", "100", "--model", "llava_st-7b", *words]) == 2
    assert message in capsys.readouterr().err


def test_other_numbers_of_frames_of_a_video(tmp_path, capsys):
    model, video = tmp_path / "model", str(make_video(tmp_path / "clip.mp4", 40, 8))
    tiny_llava_st_config().save_pretrained(model)
    for words in (["--fps", "1"], ["--max-frames", "5"]):
        assert main(["estimate", video, "--model", str(model), *words]) == 2
        assert "frames" in capsys.readouterr().err
