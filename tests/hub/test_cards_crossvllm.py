"""The card of CrossVLLM: metadata, facts of the folder, what it says of its origin, and code that runs."""

import re
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from longvideo.hub_cards.render import load_source, render_card
from longvideo.modeling.crossvllm.configuration_crossvllm import CrossVLLMConfig
from tests.hub.saved_tiny import save_tiny
from tests.tiny_crossvllm import tiny_crossvllm_config
from tests.videos import make_video


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A saved tiny checkpoint; not to be changed."""
    return save_tiny("crossvllm", tmp_path_factory.mktemp("checkpoint") / "tiny-crossvllm")


def test_metadata(folder):
    metadata = yaml.safe_load(render_card(folder, license="apache-2.0", repo_id="tester/tiny").split("---\n")[1])
    assert metadata["license"] == "apache-2.0"
    assert {"longvideo", "crossvllm", "long-video", "temporal-grounding"} <= set(metadata["tags"])
    assert "base_model" not in metadata


def test_nothing_is_said_to_be_published_or_checked(folder):
    card, _ = load_source("crossvllm")
    assert card["published"] == []
    text = render_card(folder)
    assert "From the paper, not checked against the authors' code" in text
    assert "There is no original to compare with" in text
    assert "Paper: Cross-granularity video LLM for long video understanding (no public link). No code" in text
    assert "arxiv.org" not in text and "Original code" not in text


def test_facts_are_those_of_the_folder(folder):
    card = render_card(folder)
    tensors = load_file(folder / "model.safetensors")
    num_values = sum(tensor.numel() for tensor in tensors.values())
    assert f"| Weights | {num_values:,} values in {len(tensors)} tensors, F32 |" in card
    assert "`clip_vision_model`, 2 of 3 layers of width 24, frames of 48 x 48 pixels" in card
    assert "| Pooling | 12 x 12 patches to 2 x 2 (coarse) or 6 x 6 (fine), `average` |" in card
    assert "| Adapters | LoRA of rank 8 for each granularity (needs peft) |" in card
    assert "| coarse | 12 | 48 | 6 |\n| fine | 4 | 144 | 2 |\n" in card
    assert not re.search(r"\{[{%#]|[%#]\}|\bNone\b|\n\n\n", card)


def test_the_numbers_of_the_paper_and_other_kinds_of_checkpoints(tmp_path):
    CrossVLLMConfig(adapters=True, base_model_name_or_path="owner/base").save_pretrained(tmp_path / "paper")
    card = render_card(tmp_path / "paper")
    assert "| coarse | 288 | 4,608 | 144 |\n| fine | 32 | 4,608 | 16 |\n" in card
    assert "up to 8,192 positions" in card and "| Base weights | loaded from `owner/base` |" in card
    tiny_crossvllm_config().save_pretrained(tmp_path / "plain")
    plain = render_card(tmp_path / "plain")
    assert "| Adapters | none |" in plain and "no adapters, and they differ" in plain and "Base weights" not in plain
    for text in (card, plain):
        assert not re.search(r"\{[{%#]|[%#]\}|\bNone\b|\n\n\n", text)


def test_python_blocks_run(folder, tmp_path, monkeypatch, capsys):
    make_video(tmp_path / "video.mp4")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", render_card(folder, repo_id=str(folder)), re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        exec(compile(block, "card", "exec"), {})
    assert capsys.readouterr().out.count("\n") >= 2
