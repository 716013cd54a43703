"""The card of LLaVA-ST: metadata, facts of the folder, what was released differently, and code that runs."""

import json
import re
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from longvideo.evaluation.presets import PRESETS
from longvideo.hub_cards.render import load_source, render_card
from tests.tiny_llava_st import tiny_llava_st_config, tiny_llava_st_model
from tests.tiny_llava_st_processor import tiny_llava_st_processor
from tests.videos import make_video

PUBLISHED = "appletea2333/LLaVA-ST-Qwen2-7B"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A saved tiny checkpoint; not to be changed."""
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny-llava-st"
    tiny_llava_st_model().save_pretrained(folder)
    tiny_llava_st_processor().save_pretrained(folder)
    return folder


def config_folder(path: Path, **kwargs) -> Path:
    tiny_llava_st_config(**kwargs).save_pretrained(path)
    return path


def test_metadata_with_base_model(folder):
    metadata = yaml.safe_load(render_card(folder, base_model=PUBLISHED, repo_id="tester/tiny").split("---\n")[1])
    assert metadata["base_model"] == PUBLISHED and metadata["license"] == "apache-2.0"
    assert metadata["pipeline_tag"] == "video-text-to-text"
    assert {"longvideo", "llava_st", "temporal-grounding"} <= set(metadata["tags"])


def test_facts_are_those_of_the_folder(folder):
    card = render_card(folder)
    tensors = load_file(folder / "model.safetensors")
    num_values = sum(tensor.numel() for tensor in tensors.values())
    assert f"| Weights | {num_values:,} values in {len(tensors)} tensors, F32 |" in card
    assert "`siglip_vision_model`, 2 layers of width 32, frames of 32 x 32 pixels" in card
    assert "three of width 16 with 2 heads, regions of 2 x 2 patches or 3 frames" in card
    assert "6 times, 5 heights, 5 widths; ordinary rows of the embedding" in card
    assert "| A video, whatever its length | 6 fast and 8 slow, 14 in all |" in card and "| An image | 16 |" in card
    assert "No parity figure was measured" in card and "no finer than a 5th of the video" in card
    assert "in an hour 720 seconds" in card and "| Fast stream | read by the language model |" in card
    for word in ("do not reach", "untrained packer", "ablation"):
        assert word not in card


def test_what_was_released_differently_is_said(tmp_path):
    card = render_card(
        config_folder(tmp_path, coordinate_layout="split", splice_fast_stream=False, inject_width_inputs=False)
    )
    assert "in six tables, as released" in card and "| Fast stream | not read, as released |" in card
    assert "Widths in a question do not reach the language model" in card and "The 6 positions of the fast" in card


def test_stage_one_and_ablations(tmp_path):
    first = render_card(config_folder(tmp_path / "first", num_temporal_tokens=0, num_spatial_tokens=0))
    assert "first of three stages" in first and "grounding_task" not in first and "| Coordinates |" not in first
    plain = render_card(config_folder(tmp_path / "plain", use_lape=False, use_packer=False))
    assert "(an ablation)" in plain and "| Packer | none, means of regions |" in plain


def test_origin_comes_from_the_conversion_report(tmp_path):
    folder = config_folder(tmp_path)
    report = {"source": "LLaVA-ST-Qwen2-7B", "num_source_tensors": 3, "num_target_tensors": 2, "missing": []}
    (folder / "conversion_report.json").write_text(json.dumps({**report, "dropped": ["a"]}))
    assert f"base_model: {PUBLISHED}" in render_card(folder)


def test_published_names_are_those_of_the_presets():
    names = [name for key, preset in PRESETS.items() if key.startswith("llava_st-") for name in preset.repositories]
    card, _ = load_source("llava_st")
    assert sorted(card["published"]) == sorted(names)


def test_python_blocks_run(folder, tmp_path, monkeypatch, capsys):
    make_video(tmp_path / "video.mp4")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", render_card(folder, repo_id=str(folder)), re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        exec(compile(block, "card", "exec"), {})
    assert capsys.readouterr().out.count("\n") >= 3
