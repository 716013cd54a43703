"""The granularity table: its numbers from given answers, its rows and its command line; a whole run is in the tests of
the tiny CrossVLLM."""

import pytest

from longvideo.evaluation.granularity_states import (
    STAGE_FOLDERS,
    check_same_base,
    checkpoint_of,
    module_weights,
    other_overview,
    trade_offs,
    use_states,
)
from longvideo.evaluation.granularity_table import JUDGED, ROWS, Asked, compare, format_table, main, summarize
from tests.tiny_crossvllm import tiny_crossvllm_model
from tests.tiny_crossvllm_processor import tiny_crossvllm_processor


def asked(row: str, scene: int, answer: str, iou: float, *, seed: int = 0, kind: str = "colour") -> Asked:
    found = None if iou == 0 else (10.0, 20.0)
    return Asked("run", seed, row, scene, kind, "?", "red", answer, (10.0, 20.0), found, iou, 1)


RESULTS = [
    asked("both", 0, "red", 0.5),
    asked("both", 1, "blue", 0.0),
    asked("both", 2, "blue", 0.25, seed=1, kind="shape"),
    asked("both", 3, "Red .", 0.25, seed=1),
    asked("all", 0, "red", 1.0),
    asked("all", 1, "red", 0.5),
    asked("all", 2, "blue", 0.0, seed=1, kind="shape"),
    asked("all", 3, "red", 0.25, seed=1),
]


def test_rows_are_those_of_the_paper() -> None:
    names = ["no tuning", "coarse only", "fine only", "both", "both + RL", "both + reflection", "all"]
    assert list(ROWS) == names and set(JUDGED) <= set(ROWS)
    assert [row[2] for row in ROWS.values()] == [False, False, False, False, False, True, True]


def test_means_intervals_and_seeds() -> None:
    summary = summarize(RESULTS)
    both = summary["both"]
    assert (both["num"], both["accuracy"], both["miou"], both["overlap"]) == (4, 0.5, 0.25, 0.75)
    low, high = both["accuracy_interval_95"]
    # Wilson for 2 of 4.
    assert (round(low, 3), round(high, 3)) == (0.15, 0.85)
    assert both["miou_interval_95"][0] < 0.25 < both["miou_interval_95"][1]
    assert both["by_seed"] == {"run 0": {"miou": 0.25, "accuracy": 0.5}, "run 1": {"miou": 0.25, "accuracy": 0.5}}
    assert both["by_kind"]["shape"] == {"miou": 0.25, "accuracy": 0.0}
    text = format_table(summary, "row")
    assert len(text.splitlines()) == 3 and "50.0 (15.0 -  85.0)" in text


def test_differences_are_paired() -> None:
    difference = compare(RESULTS, "all", "both")
    assert difference["num"] == 4 and difference["accuracy"] == 0.25
    assert difference["miou"] == pytest.approx(0.1875)
    assert difference["accuracy_interval_95"][0] >= 0
    assert compare(RESULTS, "all", "no tuning") is None


def test_states_change_modules_and_nothing_else() -> None:
    model, base = tiny_crossvllm_model(), tiny_crossvllm_model(adapters=False)
    states = {"final": module_weights(model)}
    states["base"] = module_weights(base, like=states["final"])
    before = {name: x.clone() for name, x in model.state_dict().items()}
    use_states(model, states, "base", "final")
    changed = {name for name, x in model.state_dict().items() if not x.equal(before[name])}
    assert changed and all(".coarse." in name for name in changed)
    # Without adapters of its own a state has such as change nothing.
    assert all(not x.any() for name, x in model.granularity_parameters("coarse") if ".lora_B." in name)
    use_states(model, states, "final", "final")
    assert all(x.equal(before[name]) for name, x in model.state_dict().items())


def test_stages_of_two_trainings_are_refused() -> None:
    check_same_base(tiny_crossvllm_model(), tiny_crossvllm_model(adapters=False), "here")
    with pytest.raises(ValueError, match="elsewhere belongs to another training"):
        check_same_base(tiny_crossvllm_model(), tiny_crossvllm_model(seed=1), "elsewhere")


def test_trade_offs_have_about_equal_numbers_of_tokens() -> None:
    model, processor = tiny_crossvllm_model(adapters=False), tiny_crossvllm_processor()
    # 12 coarse frames of 2 x 2 tokens on 12 x 12 patches.
    assert trade_offs(model) == [(12, 48), (6, 12), (4, 5), (3, 3)]
    with other_overview(model, processor, 12):
        assert model.config.tokens_per_frame("coarse") == 1 and processor.coarse_stride == 12
    assert model.config.coarse_stride == processor.coarse_stride == 6


def test_errors_are_one_line(tmp_path, capsys) -> None:
    assert main(["--num", "1"]) == 2
    assert "give either --run, or all of --base" in capsys.readouterr().err
    assert main(["--run", str(tmp_path)]) == 2
    assert "holds no finished stage" in capsys.readouterr().err
    stage = tmp_path / STAGE_FOLDERS["base"]
    (stage / "checkpoint-1").mkdir(parents=True)
    (stage / "checkpoint-1" / "trainer_state.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="no finished stage"):
        checkpoint_of(tmp_path, "base")
    (stage / "done").touch()
    assert checkpoint_of(tmp_path, "base").endswith("checkpoint-1")
