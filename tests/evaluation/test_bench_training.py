"""The benchmark of training: rows of each kind, targets, tables, and a step of every kind on small inputs."""

import copy
import json
from pathlib import Path

import pytest

from longvideo.evaluation import bench, bench_training
from longvideo.evaluation.bench_training import ANSWERS, STEPS
from tests.tiny import tiny_videochat_flash_config
from tests.videos import make_video


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_video(tmp_path_factory.mktemp("clip") / "clip.mp4", 16, 8))


def small_config():
    """A tiny model with room for the words of the small checkpoint."""
    return tiny_videochat_flash_config(text_kwargs={"vocab_size": 700})


def fake_result() -> dict:
    """Measurements that meet every target."""
    steps = {f"{name}/64": {"seconds": 4.0, "cpu_seconds": 2.0, "peak_bytes": 10**9, "rows": 2} for name in STEPS}
    steps["sft+stored/64"].update(cpu_seconds=0.5, seconds=1.0)
    steps["sft+lora/64"].update(cpu_seconds=9.0)  # of no target
    for name in ("dpo+lora", "dpo+lora+checkpointing", "dpo+lora+stored"):
        steps[f"{name}/64"].update(cpu_seconds=3.0, seconds=5.0, rows=1)
    for name in ("sft+checkpointing", "sft+lora+checkpointing", "dpo+lora+checkpointing"):
        steps[f"{name}/64"]["peak_bytes"] = 6 * 10**8
    words = {"architecture": "training", "processor": "some processor", "device": "cpu", "python": "3.11"}
    versions = {"torch": "2", "transformers": "5", "av": "18", "command": "python -m ..."}
    return {"steps": steps, "machine": {**words, **versions, "cores": 2, "load_average": 0.1}}


def test_targets_are_computed_from_the_measurements():
    result = fake_result()
    targets = bench_training.judge(result, (64,))
    assert [round(entry["measured"], 6) for entry in targets] == [1.5, 0.25, 0.6, 0.6]
    assert all(entry["met"] for entry in targets)
    worse = copy.deepcopy(result)
    worse["steps"]["dpo+lora/64"]["cpu_seconds"] = 3.3
    worse["steps"]["sft+stored/64"]["cpu_seconds"] = 1.1
    for name in ("sft+checkpointing", "dpo+lora+checkpointing"):
        worse["steps"][f"{name}/64"]["peak_bytes"] = 10**9
    assert not any(entry["met"] for entry in bench_training.judge(worse, (64,)))


def test_tables_show_every_step():
    result = fake_result()
    result["targets"] = bench_training.judge(result, (64,))
    text = bench.format_tables(result, markdown=True)
    for words in ("| sft, lora, checkpointing | 64 | 2 rows | 0.500 |", "| dpo, lora | 64 | 1 pair | 0.200 |", "met"):
        assert words in text
    json.dumps(result)


def test_rows_of_each_kind():
    sft, both, pair = (bench_training.make_rows(kind, ["a", "b"]) for kind in ("sft", "both answers", "dpo"))
    paths = [[row["messages"][0]["content"][0]["path"] for row in rows] for rows in (sft, both)]
    assert paths == [["a", "b"], ["a", "a"]]
    texts = [row["messages"][1]["content"][0]["text"] for row in both]
    assert texts == [pair[0][side][0]["content"][0]["text"] for side in ("chosen", "rejected")] == list(ANSWERS)
    assert pair[0]["prompt"] == both[0]["messages"][:1]


@pytest.mark.parametrize("step", ["sft+checkpointing", "sft+stored", "dpo+lora"])
def test_a_small_step_of_each_kind(step, clip):
    if "lora" in step:
        pytest.importorskip("peft")
    measured = bench_training.run_training_step(step, 4, 1, "cpu", clip, config=small_config())
    assert measured["seconds"] > 0 and measured["cpu_seconds"] > 0 and measured["peak_bytes"] >= 0
    assert measured["rows"] == (1 if step.startswith("dpo") else 2)


def test_stored_features_are_encoded_once(clip, tmp_path):
    trainer = bench_training.make_trainer("sft+stored", 4, 2, "cpu", folder=tmp_path, clip=clip, config=small_config())
    calls = []
    tower = trainer.model.model.vision_tower
    tower.register_forward_hook(lambda *_: calls.append(1))
    assert len(bench_training.time_steps(trainer, "cpu")) == 2
    first = len(calls)
    assert first >= 1 and trainer.state.global_step == 3
    trainer.train()
    assert len(calls) == first, "the second run reads what the first one stored"


@pytest.mark.parametrize(
    ("words", "told"), [(["--frames", "2"], "--frames must be at least 4"), (["--rounds", "0"], "--rounds must be")]
)
def test_wrong_arguments(words, told, capsys):
    with pytest.raises(SystemExit):
        bench.main(["training", *words])
    assert told in capsys.readouterr().err


def test_unknown_options(tmp_path: Path, clip):
    with pytest.raises(ValueError, match=r"unknown options in 'sft\+fast': use checkpointing, lora, stored"):
        bench_training.make_trainer("sft+fast", 4, 1, "cpu", folder=tmp_path, clip=clip)
