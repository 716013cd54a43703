"""The benchmark's own arithmetic, and its steps on small inputs."""

import copy
import json
from pathlib import Path

import pytest

from longvideo.evaluation import bench, bench_steps, bench_videochat_flash
from tests.videos import make_video


def fake_result() -> dict:
    """Measurements that meet every target, as round numbers."""
    steps = {}
    for num_frames in (64, 256):
        for step in bench_videochat_flash.STEPS:
            steps[f"{step}/{num_frames}"] = {
                "seconds": 2.0,
                "cpu_seconds": 1.0,
                "peak_bytes": 50_000_000,
                "flops_counted": None,
                "flops_formula": 1_000_000_000,
                "visual_tokens": 16 * num_frames,
            }
        steps[f"tower/{num_frames}"].update(cpu_seconds=10.2, seconds=20.4)
        steps[f"merge/{num_frames}"]["cpu_seconds"] = 0.2
        steps[f"prefill_dropout/{num_frames}"]["cpu_seconds"] = 0.6
    decoding = {
        "bare": [{"seconds": 10.0, "cpu_seconds": 12.0, "frames": 15000}] * 2,
        "read": [{"seconds": 12.0, "cpu_seconds": 13.0, "peak_bytes": 90_000_000, "kept": 600}] * 2,
    }
    words = {"architecture": "videochat_flash", "processor": "some processor", "device": "cpu", "python": "3.11"}
    versions = {"torch": "2", "transformers": "5", "av": "18", "command": "python -m ..."}
    machine = {**words, **versions, "cores": 2, "load_average": 0.1}
    imports = [{"transformers": 2.0, "longvideo": 0.1}, {"transformers": 1.9, "longvideo": 0.2}]
    return {"machine": machine, "steps": steps, "decoding": decoding, "imports": imports}


def test_targets_are_computed_from_the_measurements() -> None:
    result = fake_result()
    targets = bench_videochat_flash.judge(result, (64, 256))
    assert [round(entry["measured"], 6) for entry in targets] == [1.0, 0.02, 0.6, 1.2, 90.0, 0.1]
    assert all(entry["met"] for entry in targets)
    worse = copy.deepcopy(result)
    worse["steps"]["tower/256"]["peak_bytes"] *= 4
    worse["steps"]["merge/256"]["cpu_seconds"] = 0.6
    worse["steps"]["prefill_dropout/256"]["cpu_seconds"] = 0.7
    worse["decoding"]["read"] = [
        {**run, "seconds": 14.0, "peak_bytes": 400_000_000} for run in result["decoding"]["read"]
    ]
    worse["imports"] = [{"transformers": 2.0, "longvideo": 0.5}]
    assert not any(entry["met"] for entry in bench_videochat_flash.judge(worse, (64, 256)))


@pytest.mark.parametrize("markdown", [False, True])
def test_tables_show_steps_targets_machine_and_command(markdown: bool) -> None:
    result = fake_result()
    result["targets"] = bench_videochat_flash.judge(result, (64, 256))
    text = bench.format_tables(result, markdown=markdown)
    for words in ("prefill_dropout", "decode (per token)", "4,096", "met", "some processor", "python -m ..."):
        assert words in text
    assert text.startswith("| step |") is markdown
    json.dumps(result)


@pytest.mark.parametrize("step", ["merge", "tower", "prefill_dropout", "decode"])
def test_counted_flops_equal_the_formula(step: str) -> None:
    from longvideo.modeling.videochat_flash.modeling_videochat_flash import VideoChatFlashForConditionalGeneration

    config = bench_videochat_flash.bench_config()
    model = VideoChatFlashForConditionalGeneration(config).eval()
    dropout = bench_videochat_flash.bench_dropout(config) if step.endswith("dropout") else False
    assert dropout is False or dropout["layers"] == [1, 5]
    _, formula = bench_videochat_flash.prepare_step(model, step, 4, dropout)
    # Some versions of transformers compute the position tables as a matrix product, which the formulas leave out.
    assert bench_videochat_flash.count_flops(step, 4) == pytest.approx(formula, rel=1e-4)


def test_a_step_in_its_own_process() -> None:
    measured = bench.in_process("videochat_flash", ["merge", 4, 1, "cpu"], threads=1)
    assert measured["visual_tokens"] == 64 and measured["seconds"] > 0 and measured["peak_bytes"] >= 0
    with pytest.raises(RuntimeError, match="do not fill clips"):
        bench.in_process("videochat_flash", ["merge", 3, 1, "cpu"], threads=1)


def test_decoding_steps(tmp_path: Path) -> None:
    clip = make_video(tmp_path / "clip.mp4", 100, 25, codec="libx264")
    assert bench_videochat_flash.run_step(["bare", str(clip)])["frames"] == 100
    read = bench_videochat_flash.run_step(["read", str(clip), "4"])
    assert read["kept"] == 4 and read["backend"] == "pyav" and read["seconds"] > 0
    bench_steps.make_clip(tmp_path / "made.mp4", 0.02)
    assert bench_videochat_flash.run_step(["bare", str(tmp_path / "made.mp4")])["frames"] == 30


def test_wrong_arguments(capsys: pytest.CaptureFixture) -> None:
    for words, message in (([], "name an architecture"), (["videochat_flash", "--frames", "10"], "multiples of 4")):
        with pytest.raises(SystemExit) as stop:
            bench.main(words)
        assert stop.value.code == 2 and message in capsys.readouterr().err
