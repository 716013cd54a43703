"""The card of LongVU: metadata, facts of the folder, bounds on tokens, and code that runs."""

import json
import re
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from longvideo.hub_cards.render import load_source, render_card
from tests.tiny_longvu import tiny_longvu_config, tiny_longvu_model
from tests.tiny_longvu_processor import tiny_longvu_processor
from tests.videos import make_video

PUBLISHED = "Vision-CAIR/LongVU_Llama3_2_3B"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A saved tiny checkpoint; not to be changed."""
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny-longvu"
    tiny_longvu_model(context_length=400).save_pretrained(folder)
    tiny_longvu_processor().save_pretrained(folder)
    return folder


def config_folder(path: Path, **kwargs) -> Path:
    tiny_longvu_config(**kwargs).save_pretrained(path)
    return path


def test_metadata_with_base_model(folder):
    metadata = yaml.safe_load(render_card(folder, base_model=PUBLISHED, repo_id="tester/tiny").split("---\n")[1])
    assert metadata["base_model"] == PUBLISHED and metadata["license"] == "apache-2.0"
    assert metadata["pipeline_tag"] == "video-text-to-text"
    assert {"longvideo", "longvu", "long-video"} <= set(metadata["tags"])


def test_facts_are_those_of_the_folder(folder):
    card = render_card(folder)
    # Some tensors of DINOv2 are stored joined and used apart: the file counts.
    tensors = load_file(folder / "model.safetensors")
    num_values = sum(tensor.numel() for tensor in tiny_longvu_model().state_dict().values())
    assert f"| Weights | {num_values:,} values in {len(tensors)} tensors, F32 |" in card
    assert "`siglip_vision_model`, 2 layers of width 32, frames of 28 x 28 pixels" in card
    assert "`dinov2`, 2 layers" in card and "3 x 3 queries" in card and "400 positions" in card
    # 400 less 64 of text and 8 of answer: 328 positions, 12 or 6 tokens per frame. Of 55 or 56 equal frames, too many
    # for the low grid, 7 anchors of 6 tokens stay.
    assert "| 16 | 16 | 192 |" in card and "| 64 | 4 to 64 | 42 to 328 |" in card
    assert "No parity figure was measured" in card and "not measured" in card


def test_image_checkpoints_and_original_behaviour(tmp_path):
    video = render_card(config_folder(tmp_path / "video"))
    image = render_card(config_folder(tmp_path / "image", highres=False, image_token_len=36, original_behaviour=True))
    assert "checkpoint for images" not in video and "low resolution of 2 x 2" in video
    assert "checkpoint for images (36 tokens each)" in image and "low resolution" not in image
    assert "on, every detail" in image and "first sample decides" in image and "first sample decides" not in video


def test_origin_comes_from_the_conversion_report(tmp_path):
    folder = config_folder(tmp_path)
    report = {"source": "LongVU_Qwen2_7B_img", "num_source_tensors": 3, "num_target_tensors": 2, "missing": []}
    (folder / "conversion_report.json").write_text(json.dumps({**report, "dropped": ["a"]}))
    assert "base_model: Vision-CAIR/LongVU_Qwen2_7B_img" in render_card(folder)


def test_published_names_are_those_of_the_presets():
    from longvideo.evaluation.presets import PRESETS

    names = [name for key, preset in PRESETS.items() if key.startswith("longvu-") for name in preset.repositories]
    card, _ = load_source("longvu")
    assert sorted(card["published"]) == sorted(names)


def test_python_blocks_run(folder, tmp_path, monkeypatch, capsys):
    make_video(tmp_path / "video.mp4")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", render_card(folder, repo_id=str(folder)), re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        exec(compile(block, "card", "exec"), {})
    assert capsys.readouterr().out.count("\n") >= 2
