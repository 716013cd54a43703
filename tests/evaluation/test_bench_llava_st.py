"""The benchmark of LLaVA-ST: a naive packer that gives what ours gives, targets, tables, and steps on small inputs."""

import copy
import json

import pytest
import torch

from longvideo.evaluation import bench, bench_llava_st
from longvideo.evaluation.bench_llava_st import PACKERS, STEPS
from tests.tiny_llava_st import tiny_llava_st_model


@pytest.fixture(scope="module")
def model():
    # 9 x 9 patches in squares of 3 x 3, and groups of 5 frames: the released factors.
    vision = {"model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
              "num_attention_heads": 2, "image_size": 72, "patch_size": 8}  # fmt: skip
    return tiny_llava_st_model(vision_config=vision, spatial_factor=3, temporal_factor=5, num_frames=10)


@pytest.mark.parametrize("packer", PACKERS)
def test_the_naive_packer_gives_what_ours_gives(model, packer):
    results = []
    for naive in (False, True):
        torch.manual_seed(3)
        function, num_tokens = bench_llava_st.prepare_step(model, packer, naive=naive)
        with torch.no_grad():
            results.append((function(), num_tokens))
    (fast, num_fast), (slow, num_slow) = results
    assert fast.shape == slow.shape and num_fast == num_slow == fast.shape[0] * fast.shape[1]
    # fp32 sums in another order; values up to about 10
    assert torch.allclose(fast, slow, atol=1e-4)


@pytest.mark.parametrize("step", [step for step in STEPS if step not in PACKERS])
def test_other_steps_run_on_what_the_model_takes(model, step):
    function, num_visual = bench_llava_st.prepare_step(model, step)
    with torch.no_grad():
        function()
    assert num_visual == (0 if step in ("tower", "projector", "lape") else 10 * 1 + 2 * 9)


def test_the_configuration_has_the_released_sizes():
    config = bench_llava_st.bench_config(100)
    assert (config.num_fast_positions, config.num_slow_positions, config.grid_size) == (900, 1620, 27)
    assert (config.packer_hidden_size, config.packer_num_heads) == (1024, 8)
    assert (config.text_config.hidden_size, config.text_config.num_hidden_layers) == (512, 8)
    assert (config.vision_config.hidden_size, config.vision_config.num_hidden_layers) == (384, 6)
    ids = [getattr(config, name) for name in vars(config) if name.endswith("_token_id") and name[0] != "p"]
    ids = [token for token in ids if isinstance(token, int) and token > 1000]
    assert len(set(ids)) == 14 and max(ids) == config.coordinate_token_start - 1


def fake_result() -> dict:
    """Measurements that meet every target."""
    step = {"seconds": 2.0, "cpu_seconds": 1.0, "peak_bytes": 50_000_000, "visual_tokens": 0}
    steps = {f"{name}/100": dict(step) for name in (*STEPS, *(f"naive_{packer}" for packer in PACKERS))}
    for packer in PACKERS:
        steps[f"naive_{packer}/100"].update(cpu_seconds=4.0, seconds=9.0, peak_bytes=200_000_000)
    words = {"architecture": "llava_st", "processor": "some processor", "device": "cpu", "python": "3.11"}
    versions = {"torch": "2", "transformers": "5", "av": "18", "command": "python -m ..."}
    return {"steps": steps, "machine": {**words, **versions, "cores": 2, "load_average": 0.1}}


def test_targets_are_computed_from_the_measurements():
    result = fake_result()
    targets = bench_llava_st.judge(result, (100,))
    assert [round(entry["measured"], 6) for entry in targets] == [0.25, 0.25]
    assert all(entry["met"] for entry in targets)
    worse = copy.deepcopy(result)
    worse["steps"]["fast/100"].update(cpu_seconds=4.1, peak_bytes=200_000_001)
    assert not any(entry["met"] for entry in bench_llava_st.judge(worse, (100,)))
    worse["machine"]["device"] = "some GPU"
    assert bench_llava_st.judge(worse, (100,))[0]["met"], "on a GPU the clock on the wall counts"


def test_tables_show_steps_and_the_naive_packers():
    result = fake_result()
    result["targets"] = bench_llava_st.judge(result, (100,))
    text = bench.format_tables(result, markdown=True)
    for words in ("| spatial packer | 100 |", "fast packer, unfold and nn.MultiheadAttention", "decode (per token)",
                  "<= 0.5 | met", "some processor"):  # fmt: skip
        assert words in text
    json.dumps(result)


def test_a_step_in_its_own_process():
    measured = bench.in_process("llava_st", ["lape", 5, 1, "cpu"], threads=1)
    assert measured["visual_tokens"] == 0 and measured["seconds"] > 0


def test_frames_are_those_of_the_architecture(monkeypatch):
    seen = []
    monkeypatch.setattr(bench, "measure", lambda args: seen.append(args.frames) or 1 / 0)
    for words, frames in ((["llava_st"], [100]), (["longvu"], [64, 256]), (["llava_st", "--frames", "20"], [20])):
        with pytest.raises(ZeroDivisionError):
            bench.main(words)
        assert seen.pop() == frames


def test_wrong_arguments(capsys):
    for frames in ("0", "12"):
        with pytest.raises(SystemExit):
            bench.main(["llava_st", "--frames", frames])
        assert "multiples of 5" in capsys.readouterr().err
