"""`longvideo estimate` for CrossLMM: the paper's counts, the visual cache, any number of frames."""

import json

import pytest

from longvideo.cli import main
from tests.tiny_crosslmm import tiny_crosslmm_config
from tests.videos import make_video


def as_json(capsys, *words):
    assert main(["estimate", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("num_frames", [1, 33, 256, 1000])
def test_papers_size_at_any_number_of_frames(num_frames, capsys):
    counts = as_json(capsys, "--frames", str(num_frames), "--model", "crosslmm-2b", "--text-tokens", "63")
    assert (counts["num_frames"], counts["visual_tokens"]) == (num_frames, 9 * num_frames)
    assert counts["visual_cache_bytes"] == 7 * num_frames * 729 * 2 * 256 * 2
    # 88.16 tera multiply-adds at 256 frames, of which 0.09 are the text
    assert counts["paper_macs"]["total"] / 1e12 == pytest.approx(0.09 + num_frames * 88.07 / 256, abs=0.1)


def test_text_for_people(capsys):
    assert main(["estimate", "--frames", "256", "--model", "crosslmm-7b", "--text-tokens", "63"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for words in ("256 of 384x384 pixels", "186,624, read by cross-attention in 7 of 28", "visual cache 2.68 GB",
                  "110.78 tera multiply-adds"):  # fmt: skip
        assert words in text
    assert main(["estimate", "--frames", "10000", "--model", "crosslmm-7b"]) == 0
    assert "take at most 3,605 frames" in capsys.readouterr().out


def test_folder_with_other_settings(tmp_path, capsys):
    model = tmp_path / "model"
    tiny_crosslmm_config(use_t2v=False, tokens_per_frame=1).save_pretrained(model)
    counts = as_json(capsys, "--frames", "6", "--model", str(model))
    assert (counts["visual_tokens"], counts["visual_cache_bytes"], counts["patch_tokens"]) == (6, 0, 96)


def test_video(tmp_path, capsys):
    model, video = tmp_path / "model", str(make_video(tmp_path / "clip.mp4", 40, 8))
    tiny_crosslmm_config().save_pretrained(model)
    counts = as_json(capsys, video, "--model", str(model), "--frames", "7")
    assert (counts["num_frames"], counts["visual_tokens"], counts["video"]["frames"]) == (7, 28, 40)
    assert as_json(capsys, video, "--model", str(model), "--fps", "1")["num_frames"] == 5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--dropout", "on"], "does not drop visual tokens inside its decoder"),
        (["--model", "crosslmm-9b"], "Unknown model 'crosslmm-9b'"),
    ],
)
def test_wrong_input(words, message, capsys):
    assert main(["estimate", "--frames", "8", "--model", "crosslmm-7b", *words]) == 2
    assert message in capsys.readouterr().err
