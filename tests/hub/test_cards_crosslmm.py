"""The card of CrossLMM: metadata, facts of the folder, what it says of its origin, and code that runs."""

import re
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from longvideo.evaluation.presets import PRESETS
from longvideo.hub_cards.render import load_source, render_card
from longvideo.modeling.crosslmm.configuration_crosslmm import CrossLMMConfig
from tests.hub.saved_tiny import save_tiny
from tests.tiny_crosslmm import tiny_crosslmm_config
from tests.videos import make_video


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A saved tiny checkpoint; not to be changed."""
    return save_tiny("crosslmm", tmp_path_factory.mktemp("checkpoint") / "tiny-crosslmm")


def card_of(path: Path, **kwargs) -> str:
    tiny_crosslmm_config(**kwargs).save_pretrained(path)
    return render_card(path)


def test_metadata(folder):
    metadata = yaml.safe_load(render_card(folder, license="apache-2.0", repo_id="tester/tiny").split("---\n")[1])
    assert metadata["license"] == "apache-2.0" and "base_model" not in metadata
    assert metadata["pipeline_tag"] == "video-text-to-text"
    assert {"longvideo", "crosslmm", "long-video", "cross-attention"} <= set(metadata["tags"])
    assert "license" not in yaml.safe_load(render_card(folder).split("---\n")[1])


def test_nothing_is_said_to_be_published_or_checked(folder):
    card, _ = load_source("crosslmm")
    presets = [preset for key, preset in PRESETS.items() if key.startswith("crosslmm-")]
    assert card["published"] == [] and presets and not any(preset.repositories for preset in presets)
    text = render_card(folder)
    assert "From the paper, not checked against the authors' code" in text
    assert "There is no original to compare with" in text and "Original code" not in text
    assert "converted to the layout" not in text


def test_facts_are_those_of_the_folder(folder):
    card = render_card(folder)
    tensors = load_file(folder / "model.safetensors")
    num_values = sum(tensor.numel() for tensor in tensors.values())
    assert f"| Weights | {num_values:,} values in {len(tensors)} tensors, F32 |" in card
    assert "`siglip_vision_model`, 2 of 3 layers of width 24, frames of 32 x 32 pixels" in card
    assert "| Merging | 4 x 4 to 2 x 2 tokens per frame, `average` |" in card
    assert "| Cross-attention | layers 0, 2; gate `attn`; keys and values of `projected` tokens |" in card
    assert "in 2 of its 4 layers" in card and "text those of all that stands before it" in card
    # 64 frames of 16 tokens; two layers keep keys and values of two heads of 8, two bytes each: 128 KiB.
    assert "| 64 | 256 | 1,024 | 0.1 MiB |" in card
    assert "Beyond 512 frames" in card and "kept keys and values grow" in card


def test_the_published_sizes_of_the_paper(tmp_path):
    CrossLMMConfig().save_pretrained(tmp_path)
    card = render_card(tmp_path)
    assert "The 729 tokens" in card and "merged to 9, and in 7 of its 28 layers" in card
    assert "| 256 | 2,304 | 186,624 | 1,275.8 MiB |" in card


def test_stage_one_and_ablations(tmp_path):
    first = card_of(tmp_path / "first", use_t2v=False)
    assert "text does not (stage 1 of training)" in first
    assert "kept keys" not in first and "| 64 | 256 | 1,024 |\n" in first
    assert "visual positions do not (an ablation)" in card_of(tmp_path / "second", use_v2v=False)
    plain = card_of(tmp_path / "plain", cross_attention_interval=None)
    assert "there is no cross-attention (an ablation)" in plain and "| Cross-attention |" not in plain
    assert "| 64 | 256 | 0 |\n" in plain and "kept keys" not in plain
    shared = card_of(tmp_path / "shared", share_kv=True, gate_mode="residual", kv_source="encoder")
    assert "gate `residual`; keys and values of `encoder` tokens, one set for both kinds |" in shared
    wide = card_of(tmp_path / "wide", tokens_per_frame=16, cross_attention_layers=[0])
    assert "kept keys and values grow" not in wide and "16 MiB" not in wide
    for card in (first, plain, shared, wide):
        assert not re.search(r"\{[{%#]|[%#]\}|\bNone\b|\n\n\n", card)


def test_python_blocks_run(folder, tmp_path, monkeypatch, capsys):
    make_video(tmp_path / "video.mp4")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", render_card(folder, repo_id=str(folder)), re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        exec(compile(block, "card", "exec"), {})
    assert capsys.readouterr().out.count("\n") >= 2
