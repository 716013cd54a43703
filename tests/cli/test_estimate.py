"""`longvideo estimate` on names, folders and videos, without weights."""

import json
from pathlib import Path

import pytest

from longvideo.cli import main
from tests.tiny import tiny_videochat_flash_config, tiny_videochat_flash_processor
from tests.videos import make_video


def as_json(capsys: pytest.CaptureFixture, *words: str) -> dict:
    """Run the command with --json and read what it prints."""
    assert main(["estimate", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_published_size_by_name(capsys: pytest.CaptureFixture) -> None:
    dropout = "uniform0_attention:4,18:1,0.75,0.25"
    counts = as_json(capsys, "--frames", "512", "--model", "videochat_flash-7b-448", "--dropout", dropout)
    assert counts["parameters"]["total"] == 7_922_617_856
    assert counts["visual_tokens"] == 8192 and counts["num_clips"] == 128
    assert [stage["visual_tokens"] for stage in counts["stages"]] == [6144, 2048]
    assert counts["weight_bytes"] == 2 * 7_922_617_856 and counts["warning"] is None
    plain = as_json(capsys, "--frames", "512", "--model", "OpenGVLab/VideoChat-Flash-Qwen2-7B_res448")
    assert plain["stages"] == [] and plain["flops"]["prefill"] > 1.5 * counts["flops"]["prefill"]
    assert plain["cache_bytes"] == 56 * 1024 * (8192 + 64)


def test_text_for_people(capsys: pytest.CaptureFixture) -> None:
    assert main(["estimate", "--frames", "64", "--dropout", "uniform:8:1,0.5", "--dtype", "fp32"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for words in (
        "1,024 after merging",
        "after layer 8 512 (uniform)",
        "weights 31.69 GB",
        "per token",
        "fp32",
    ):
        assert words in text
    assert main(["estimate", "--frames", "10000"]) == 0
    # 32768 positions less 64 of text and 256 of answer hold 507 clips.
    assert "take at most 2,028 frames" in capsys.readouterr().out


def test_folder_and_video(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model, video = tmp_path / "model", make_video(tmp_path / "clip.mp4", 160, 8)
    tiny_videochat_flash_config(mm_llm_compress=True, llm_compress_layer_list=[2],
                                llm_image_token_ratio_list=[1.0, 0.5]).save_pretrained(model)  # fmt: skip
    counts = as_json(capsys, str(video), "--model", str(model))
    assert counts["num_frames"] == 64, "without processor settings the published least number of frames"
    assert counts["video"]["duration"] == 20.0 and counts["video"]["frames"] == 160
    assert counts["stages"] == [{"layer": 2, "kind": "attention", "visual_tokens": 128}]
    assert as_json(capsys, str(video), "--model", str(model), "--fps", "1")["num_frames"] == 20
    assert as_json(capsys, str(video), "--model", str(model), "--frames", "12", "--end", "10")["num_frames"] == 12
    tiny_videochat_flash_processor().save_pretrained(model)
    assert as_json(capsys, str(video), "--model", str(model), "--dropout", "off")["num_frames"] == 16


def test_original_layout(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    from longvideo.conversion.base import find_conversion
    from longvideo.evaluation.presets import PRESETS

    conversion = find_conversion({"model_type": "videochat_flash_qwen"})
    original = conversion.original_config(PRESETS["videochat_flash-2b-448"].config())
    (tmp_path / "config.json").write_text(json.dumps(original))
    assert as_json(capsys, "--frames", "8", "--model", str(tmp_path))["parameters"]["total"] == 2_071_502_336


def test_frames_are_cut_to_whole_clips(capsys: pytest.CaptureFixture) -> None:
    with pytest.warns(UserWarning, match="--frames=10 is not a multiple of the 4"):
        assert as_json(capsys, "--frames", "10")["num_frames"] == 8


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "Give a VIDEO or --frames N"),
        (["--frames", "0"], "expected at least 1"),
        (["--frames", "8", "--fps", "1"], "--fps needs a VIDEO"),
        (["--frames", "8", "--model", "videochat_flash-9b"], "Unknown model 'videochat_flash-9b'"),
        (["--frames", "8", "--model", "{tmp}"], "holds no config.json"),
        (["--frames", "8", "--model", "{tmp}/other"], "model_type 'bert'"),
        (["--frames", "8", "--model", "{tmp}/broken"], "is not JSON"),
        (["--frames", "8", "--dropout", "uniform:4"], "TYPE:LAYERS:RATIOS"),
        (["--frames", "8", "--dropout", "uniform:40:1,0.5"], "does not fit a decoder of 28 layers"),
        (["{tmp}/absent.mp4"], "No such video file"),
        (["{tmp}/video.mp4", "--start", "9"], "beyond the end of the video"),
        (["{tmp}/video.mp4", "--frames", "8", "--fps", "1"], "exclude each other"),
    ],
)
def test_wrong_input(tmp_path: Path, capsys: pytest.CaptureFixture, words: list[str], message: str) -> None:
    make_video(tmp_path / "video.mp4", 8)
    for name, content in (("other", '{"model_type": "bert"}'), ("broken", "{")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(content)
    assert main(["estimate", *(word.replace("{tmp}", str(tmp_path)) for word in words)]) == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.startswith("longvideo estimate: error:") and not printed.out
