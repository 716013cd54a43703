"""The recipes: one file per stage, a source beside every value, found by name, number and path."""

import re
from pathlib import Path

import pytest
import yaml

from longvideo.trainers import CrossGranularityConfig, VideoSFTConfig, find_stage, load_recipe, recipe_names
from longvideo.trainers.recipe import RECIPES_DIR

STAGES = {"crosslmm": 2, "crossvllm": 4, "llava_st": 3, "longvu": 2, "videochat_flash": 4}
FILES = sorted(RECIPES_DIR.glob("*/*.yaml"))
# Table 4 of CrossVLLM; all others train for one epoch.
EPOCHS = {"crossvllm/stage2_coarse_grounding": 3, "crossvllm/stage3_fine_answers": 10}
EPOCHS |= {"crossvllm/stage4_cross_granularity": 2}
KEYS = {"data", "model", "lora", "trainer", "gpus", "global_batch_size", "args"}
SOURCES = re.compile(r"  # (paper|script|ours)\b")


def name_of(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


def test_every_stage_of_every_paper_is_there():
    names = recipe_names()
    assert {name: len(stages) for name, stages in names.items()} == STAGES
    for stages in names.values():
        assert [int(stage.removeprefix("stage").split("_")[0]) for stage in stages] == list(range(1, len(stages) + 1))


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_source_stands_beside_every_value(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    head = [line for line in lines if line.startswith("# ")]
    assert any("arXiv" in line for line in head) and all(len(line) < 120 for line in lines)
    valued = [line for line in lines if line.strip() and not line.lstrip().startswith("#") and not line.endswith(":")]
    without = [line for line in valued if not SOURCES.search(line)]
    assert valued and not without, f"no source beside {without}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_batches_and_fields(path, tmp_path):
    name, entry = find_stage(name_of(path))
    assert name == path.stem and set(entry) <= KEYS
    config = CrossGranularityConfig if entry.get("trainer") == "cross_granularity" else VideoSFTConfig
    args = config.from_recipe(path.parent.name, name, output_dir=str(tmp_path), bf16=False)
    rows = entry["gpus"] * args.per_device_train_batch_size * args.gradient_accumulation_steps
    assert rows == entry["global_batch_size"]
    assert args.num_train_epochs == EPOCHS.get(name_of(path), 1)
    assert args.lr_scheduler_type == "cosine" and args.gradient_checkpointing


def test_a_stage_has_several_names(tmp_path):
    by_name = find_stage("longvu/stage2_video")
    assert by_name == find_stage("longvu", 2) == find_stage("longvu/2") == find_stage("longvu", "2")
    assert by_name == find_stage("longvu", "stage2_video")
    assert by_name == find_stage(str(RECIPES_DIR / "longvu" / "stage2_video.yaml"))
    assert by_name == find_stage(str(RECIPES_DIR / "longvu"), 2)
    together = tmp_path / "both.yaml"
    together.write_text(yaml.safe_dump(load_recipe("longvu"), sort_keys=False), encoding="utf-8")
    assert by_name == find_stage(str(together), 2)


@pytest.mark.parametrize(
    ("recipe", "stage", "error", "text"),
    [
        ("absent", 1, FileNotFoundError, r"No recipe 'absent': absent does not exist. Known: \['crosslmm'"),
        ("absent/1", None, FileNotFoundError, "No recipe 'absent'"),
        ("", 1, FileNotFoundError, "No recipe '': recipes holds no .yaml file"),
        ("no/such.yaml", 1, FileNotFoundError, r"such.yaml does not exist"),
        ("longvu", None, ValueError, r"has several stages: choose one of \['stage1_image', 'stage2_video'\]"),
        ("longvu", 3, ValueError, "has no stage 3; it has .*or numbers 1 to 2"),
        ("longvu", "0", ValueError, "has no stage '0'"),
        ("longvu/stage1_image", 2, ValueError, "names a stage already; leave stage 2 out, or give 'longvu'"),
    ],
)
def test_what_cannot_be_found_is_named(recipe, stage, error, text):
    with pytest.raises(error, match=text):
        find_stage(recipe, stage)


def test_names_of_the_package_come_before_folders(tmp_path, monkeypatch):
    (tmp_path / "longvu").mkdir()
    monkeypatch.chdir(tmp_path)
    assert list(load_recipe("longvu")["stages"]) == ["stage1_image", "stage2_video"]
    (tmp_path / "mine").mkdir()
    with pytest.raises(FileNotFoundError, match=r"mine holds no \.yaml file"):
        load_recipe("mine")


@pytest.mark.parametrize(("text", "told"), [("a: [", "bad.yaml is not yaml"), ("- 1", "expected a mapping with")])
def test_a_file_that_is_no_recipe(tmp_path, text, told):
    path = tmp_path / "bad.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=told):
        load_recipe(str(path))
