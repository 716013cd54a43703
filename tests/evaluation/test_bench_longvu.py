"""The benchmark of LongVU: loops that give what the stages give, targets, tables, and steps on small inputs."""

import copy
import json

import pytest
import torch

from longvideo.evaluation import bench, bench_longvu
from longvideo.evaluation.bench_longvu import STAGES, STEPS
from tests.tiny_longvu import tiny_longvu_model


@pytest.fixture(scope="module")
def model():
    return tiny_longvu_model(lowres_token=2, context_length=200, drop_threshold=0.95)


@pytest.mark.parametrize("stage", STAGES)
def test_loops_give_what_the_stages_give(model, stage):
    results = []
    for naive in (False, True):
        torch.manual_seed(3)
        function, num_visual = bench_longvu.prepare_step(model, stage, 40, naive=naive)
        with torch.no_grad():
            results.append((function(), num_visual))
    (fast, fast_visual), (slow, slow_visual) = results
    assert fast_visual == slow_visual
    if stage == "reduction":
        # Every second frame, and the middle frame of each window: numbers 8, 24 and, of the last 8, 36.
        assert fast == slow == sorted([*range(1, 40, 2), 8, 24, 36])
    else:
        # fp32 sums in another order; values up to about 10
        assert fast.shape == slow.shape and torch.allclose(fast, slow, atol=1e-4)
    if stage == "selection":
        assert len(fast) == fast_visual == 20 * 6 + 5 * 6
    if stage == "compression":
        assert 3 * 12 < len(fast) < 20 * 12, "some tokens are dropped, the anchors' are not"


def fake_result() -> dict:
    """Measurements that meet every target."""
    step = {"seconds": 2.0, "cpu_seconds": 1.0, "peak_bytes": 50_000_000, "visual_tokens": 0}
    names = [*STEPS, *(f"naive_{stage}" for stage in STAGES)]
    steps = {f"{name}/{frames}": dict(step) for frames in (64, 256) for name in names}
    for stage in STAGES:
        for frames in (64, 256):
            steps[f"naive_{stage}/{frames}"].update(cpu_seconds=4.0, seconds=9.0)
    run = {"kept_frames": 400, "visual_tokens": 8000, "logits_positions": 1, "prompt_positions": 8064}
    sizes = {"256": 40, "1024": 100, "3600": 120}
    memory = {
        frames: {**run, "encoding_bytes": 10**6 * size, "peak_bytes": 10**7 * size} for frames, size in sizes.items()
    }
    words = {"architecture": "longvu", "processor": "some processor", "device": "cpu", "python": "3.11"}
    versions = {"torch": "2", "transformers": "5", "av": "18", "command": "python -m ..."}
    return {"steps": steps, "memory": memory, "machine": {**words, **versions, "cores": 2, "load_average": 0.1}}


def test_targets_are_computed_from_the_measurements():
    result = fake_result()
    targets = bench_longvu.judge(result, (64, 256))
    assert [round(entry["measured"], 6) for entry in targets] == [0.25, 0.25, 1.2, 1.2, 1]
    assert all(entry["met"] for entry in targets)
    worse = copy.deepcopy(result)
    worse["steps"]["sampler/64"]["cpu_seconds"] = worse["steps"]["insertion/256"]["cpu_seconds"] = 4.0
    worse["memory"]["3600"].update(encoding_bytes=140_000_000, peak_bytes=1_400_000_000)
    worse["memory"]["256"]["logits_positions"] = 300
    assert not any(entry["met"] for entry in bench_longvu.judge(worse, (64, 256)))


def test_tables_show_stages_loops_and_memory():
    result = fake_result()
    result["targets"] = bench_longvu.judge(result, (64, 256))
    text = bench.format_tables(result, markdown=True)
    for words in ("sampler, plain loop", "decode (per token)", "| 3600 | 400 |", "met", "some processor"):
        assert words in text
    json.dumps(result)


def test_memory_of_a_short_video():
    measured = bench_longvu.run_memory(20, "cpu")
    assert measured["kept_frames"] == 20 and measured["logits_positions"] == 1
    assert (
        measured["prompt_positions"] == measured["visual_tokens"] + 63
        and measured["peak_bytes"] >= measured["encoding_bytes"] > 0
    )
    windows = bench_longvu.MadeUpWindows(20, 8, "cpu")
    assert [len(window["pixel_values_videos"]) for window in windows] == [16, 4]
    first, second = (next(iter(x))["pixel_values_videos"] for x in (windows, windows.again()))
    assert torch.equal(first, second)


def test_a_step_in_its_own_process():
    measured = bench.in_process("longvu", ["insertion", 4, 1, "cpu"], threads=1)
    assert measured["visual_tokens"] == 2 * 156 and measured["seconds"] > 0


@pytest.mark.parametrize("words", [["--frames", "2"], ["--memory-frames", "0"]])
def test_wrong_arguments(words, capsys):
    with pytest.raises(SystemExit):
        bench.main(["longvu", *words])
    assert "must be at least" in capsys.readouterr().err
