"""`longvideo estimate` for LongVU: bounds, the size of the video, the original layout, and what it cannot count."""

import json

import pytest

from longvideo.cli import main
from longvideo.conversion.base import find_conversion
from longvideo.evaluation.presets import PRESETS
from tests.tiny_longvu import tiny_longvu_config
from tests.tiny_longvu_processor import tiny_longvu_processor
from tests.videos import make_video


def as_json(capsys, *words):
    assert main(["estimate", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_published_size_by_name(capsys):
    counts = as_json(capsys, "--frames", "3600", "--model", "longvu-7b", "--text-tokens", "60")
    assert counts["kept_frames"] == [225, 400] and counts["modes"] == ["stc"] and counts["budget"] == 8116
    assert counts["visual_tokens"] == [29 * 156, 8116] and "at most 400 are kept" in counts["warning"]
    again = as_json(capsys, "--frames", "3600", "--model", "Vision-CAIR/LongVU_Qwen2_7B", "--text-tokens", "60")
    assert {**again, "model": ""} == {**counts, "model": ""}
    image = as_json(capsys, "--frames", "4", "--model", "longvu-3b-img")
    assert image["visual_tokens"] == [4 * 600, 4 * 600] and image["warning"] is None


def test_text_for_people(capsys):
    assert main(["estimate", "--frames", "100", "--model", "longvu-7b"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for words in ("100 of 384x384 pixels, all seen by DINOv2", "kept 100 by", "(mix)", "DINOv2", "SigLIP", "sampler"):
        assert words in text
    assert "warning" not in text


def test_folder_and_video(tmp_path, capsys):
    model, video = tmp_path / "model", str(make_video(tmp_path / "clip.mp4", 160, 8))
    tiny_longvu_config().save_pretrained(model)
    words = [video, "--model", str(model), "--text-tokens", "20", "--new-tokens", "10"]
    counts = as_json(capsys, *words)
    assert counts["num_frames"] == 20 and counts["video"]["frames"] == 160, "one frame per second"
    assert as_json(capsys, *words, "--fps", "0.25")["num_frames"] == 5
    tiny_longvu_processor(max_frames=4).save_pretrained(model)
    assert as_json(capsys, *words)["num_frames"] == 4
    # 64x48 pixels, told as (48, 64): of 3 columns none is cut; told as (64, 48) neither is a row.
    assert as_json(capsys, *words)["visual_tokens"] == [48, 48]


def test_original_layout(tmp_path, capsys):
    config = PRESETS["longvu-3b"].config()
    original = find_conversion({"model_type": "cambrian_llama", "mm_projector_type": "sva"}).original_config(config)
    (tmp_path / "config.json").write_text(json.dumps(original))
    counts = as_json(capsys, "--frames", "8", "--model", str(tmp_path))
    assert counts["parameters"] == as_json(capsys, "--frames", "8", "--model", "longvu-3b")["parameters"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--dropout", "on"], "does not drop visual tokens inside its decoder"),
        (["--text-tokens", "9000"], "leave nothing of the 8192 positions"),
        (["--model", "longvu-9b"], "Unknown model 'longvu-9b'"),
    ],
)
def test_wrong_input(words, message, capsys):
    assert main(["estimate", "--frames", "8", "--model", "longvu-7b", *words]) == 2
    assert message in capsys.readouterr().err
