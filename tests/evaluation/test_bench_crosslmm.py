"""The benchmark of CrossLMM: what is compared, targets, tables, and steps on small inputs."""

import copy
import json

import pytest
import torch

from longvideo.evaluation import bench, bench_crosslmm, cost_crosslmm
from longvideo.evaluation.bench_crosslmm import FRAMES, NUM_TEXT, SIDES, STEPS
from longvideo.evaluation.presets import PRESETS
from tests.tiny_crosslmm import tiny_crosslmm_model

TINY_SIDES = {**SIDES, "all_": {**SIDES["all_"], "tokens_per_frame": 16}}


@pytest.fixture(scope="module")
def models():
    return {side: tiny_crosslmm_model(**settings) for side, settings in TINY_SIDES.items()}


@pytest.mark.parametrize("name", STEPS)
def test_steps_run_on_what_the_model_takes(models, name):
    side, step = bench_crosslmm.split_name(name)
    model, num_frames = models[side], 3
    function, inputs = bench_crosslmm.prepare_step(model, step, num_frames)
    with torch.no_grad():
        output = function()
    num_tokens = num_frames * model.config.tokens_per_frame
    if step == "prefill":
        assert output.past_key_values.get_seq_length() == num_tokens + NUM_TEXT and output.logits.shape[1] == 1
        originals = num_frames * 16 if side == "" else 0
        assert [len(tensor) for tensor in inputs] == [num_tokens] + [originals] * bool(originals)
    elif step == "encode":
        assert [len(x) for x in output.pooler_output] == [num_tokens] and (output.memory is None) == (side != "")
    else:
        assert inputs == []


def test_a_random_cache_is_as_long_as_the_prompt(models):
    cache = bench_crosslmm.random_cache(models["all_"], 50)
    real = models["all_"](input_ids=torch.full((1, 50), 11), use_cache=True).past_key_values
    assert [layer.keys.shape for layer in cache.layers] == [layer.keys.shape for layer in real.layers]


def test_decoding_sees_the_video(models):
    function = bench_crosslmm.prepare_decode(models[""], 2, torch.full((1, 1), 11))
    seen = []
    dual = models[""].model.language_model.layers[0].dual_cross_attention
    hook = dual.t2v.register_forward_hook(lambda module, args, output: seen.append(args[1].shape[2]))
    with torch.no_grad():
        function()
    hook.remove()
    assert seen == [2 * 16] * bench_crosslmm.DECODE_STEPS


def test_the_three_sides_share_all_but_cross_attention():
    ours, everything, plain = (bench_crosslmm.bench_config(side) for side in ("", "all_", "plain_"))
    assert (ours.tokens_per_frame, everything.tokens_per_frame, plain.tokens_per_frame) == (9, 196, 9)
    assert ours.cross_attention_layers == [0, 4]
    assert everything.cross_attention_layers == plain.cross_attention_layers == []
    assert ours.grid_size == 27 and ours.num_vision_layers == 5
    published = PRESETS["crosslmm-2b"].config().text_config
    for name, share in (("hidden_size", 2), ("intermediate_size", 2), ("num_attention_heads", 1),
                        ("num_key_value_heads", 1)):  # fmt: skip
        assert getattr(published, name) == share * getattr(ours.text_config, name)
    weights = [cost_crosslmm.count_parameters(config) for config in (ours, everything, plain)]
    for part in ("vision", "projector", "language"):
        assert len({counts[part] for counts in weights}) == 1
    assert weights[1]["cross_attention"] == weights[2]["cross_attention"] == 0


def test_flops_of_steps():
    ours, everything = (bench_crosslmm.bench_config(side) for side in ("", "all_"))
    counts = cost_crosslmm.estimate(ours, 64, num_text=NUM_TEXT).flops
    encode, prefill, decode = (
        bench_crosslmm.formula_flops(ours, step, 64) for step in ("encode", "prefill", "decode")
    )
    assert encode + prefill == counts["total"] and decode == counts["decode_per_token"]
    assert encode > counts["tower"] and prefill > counts["prefill"]
    assert bench_crosslmm.formula_flops(everything, "prefill", 64) > 4 * prefill


def fake_result() -> dict:
    """Measurements that meet every target."""
    step = {"seconds": 2.0, "cpu_seconds": 1.0, "peak_bytes": 30_000_000, "input_bytes": 20_000_000,
            "visual_tokens": 576, "flops": 10**12}  # fmt: skip
    steps = {f"{name}/{count}": dict(step) for name in STEPS for count in (64, 256)}
    steps["all_prefill/256"].update(peak_bytes=480_000_000, flops=9 * 10**12)
    steps["decode/64"].update(cpu_seconds=1.25, seconds=9.0)
    steps["all_decode/64"].update(cpu_seconds=2.5)
    words = {"architecture": "crosslmm", "processor": "some processor", "device": "cpu", "python": "3.11"}
    versions = {"torch": "2", "transformers": "5", "av": "18", "command": "python -m ..."}
    return {"steps": steps, "machine": {**words, **versions, "cores": 2, "load_average": 0.1}}


def test_targets_are_computed_from_the_measurements():
    result = fake_result()
    targets = bench_crosslmm.judge(result, (64, 256))
    assert [round(entry["measured"], 6) for entry in targets] == [0.1, 0.2, 1.25]
    assert all(entry["met"] for entry in targets)
    assert "0.349 of a prompt cut off" in targets[1]["how"] and "tokens 0.500" in targets[2]["how"]
    worse = copy.deepcopy(result)
    worse["steps"]["prefill/256"].update(input_bytes=33_000_000, flops=3 * 10**12)
    worse["steps"]["decode/64"]["cpu_seconds"] = 1.51
    assert not any(entry["met"] for entry in bench_crosslmm.judge(worse, (64, 256)))
    worse["machine"]["device"], worse["steps"]["decode/64"]["seconds"] = "some GPU", 3.0
    assert bench_crosslmm.judge(worse, (64, 256))[2]["met"], "on a GPU the clock on the wall counts"


def test_tables_show_steps_of_all_sides():
    result = fake_result()
    result["targets"] = bench_crosslmm.judge(result, (64, 256))
    text = bench.format_tables(result, markdown=True)
    for words in ("| prefill | 64 |", "| prefill, all tokens | 256 |", "decode (per token), no cross-attention | 64 |",
                  "<= 0.125 | met", "some processor"):  # fmt: skip
        assert words in text
    json.dumps(result)


def test_a_step_in_its_own_process():
    measured = bench.in_process("crosslmm", ["plain_prefill", 2, 1, "cpu"], threads=1)
    assert measured["visual_tokens"] == 18 and measured["seconds"] > 0 and measured["input_bytes"] == 18 * 768 * 4


def test_arguments(monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(bench, "measure", lambda args: seen.append(args.frames) or 1 / 0)
    for words, frames in ((["crosslmm"], list(FRAMES)), (["crosslmm", "--frames", "3"], [3])):
        with pytest.raises(ZeroDivisionError):
            bench.main(words)
        assert seen.pop() == frames
    with pytest.raises(SystemExit):
        bench.main(["crosslmm", "--frames", "0"])
    assert "at least 1" in capsys.readouterr().err
