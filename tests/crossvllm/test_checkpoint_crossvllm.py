"""Checkpoints: whole or as a reference to their base, sharded, with and without adapters, and what is refused."""

import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForImageTextToText, LlavaNextVideoConfig
from transformers import LlavaNextVideoForConditionalGeneration as LlavaNextVideo

from longvideo.modeling.crossvllm.modeling_crossvllm import CrossVLLMForConditionalGeneration, CrossVLLMModel
from tests.crossvllm.prompts_crossvllm import prompt
from tests.tiny_crossvllm import fill_adapters, tiny_crossvllm_config, tiny_crossvllm_model

NAMES = ("coarse", "fine")
ROWS = {name: prompt(3, "video2", 4, granularity=name) for name in NAMES}


@pytest.fixture(scope="module")
def model():
    return tiny_crossvllm_model()


@pytest.fixture
def folder(model, tmp_path):
    model.save_pretrained(tmp_path / "whole")
    return tmp_path / "whole"


@torch.no_grad()
def same(a, b) -> bool:
    return all(
        torch.equal(a(**ROWS[name], granularity=name).logits, b(**ROWS[name], granularity=name).logits)
        for name in NAMES
    )


@pytest.mark.parametrize("shard", ["1GB", "20KB"])
def test_save_load_and_shard_through_the_auto_classes(model, tmp_path, shard):
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / "model.safetensors.index.json").is_file() is (shard == "20KB")
    assert sorted(path.name for path in (tmp_path / "adapters").iterdir()) == ["coarse", "fine"]
    loaded, info = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert type(loaded) is CrossVLLMForConditionalGeneration
    assert (loaded.training, loaded.granularity, loaded.has_adapters) == (False, "coarse", True)
    assert same(loaded, model)
    learns = [name for name, p in loaded.named_parameters() if p.requires_grad]
    assert learns == [name for name, p in model.named_parameters() if p.requires_grad]
    # Saving must leave the model that it was called on as it was.
    assert same(model, loaded)
    assert model.active_adapters() == ["coarse"]


def test_a_second_save_from_another_granularity_is_the_same(model, folder, tmp_path):
    loaded = CrossVLLMForConditionalGeneration.from_pretrained(folder)
    loaded.set_granularity("fine")
    loaded.save_pretrained(tmp_path / "again", state_dict=loaded.state_dict())
    for path in sorted(folder.rglob("*.safetensors")):
        ours, theirs = load_file(path), load_file(tmp_path / "again" / path.relative_to(folder))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@torch.no_grad()
def test_the_base_alone_and_without_adapters(model, folder, tmp_path):
    plain = tiny_crossvllm_model(adapters=False)
    base = AutoModelForImageTextToText.from_pretrained(folder, adapters=False)
    assert not base.has_adapters
    assert same(base, plain)
    base.save_pretrained(tmp_path / "plain")
    assert not (tmp_path / "plain" / "adapters").exists()
    assert same(AutoModelForImageTextToText.from_pretrained(tmp_path / "plain"), plain)
    with pytest.raises(ValueError, match="has no adapters"):
        CrossVLLMForConditionalGeneration.from_pretrained(tmp_path / "plain", adapters=True)


@torch.no_grad()
def test_the_bare_model_has_the_adapters_too(model, folder, tmp_path):
    bare = AutoModel.from_pretrained(folder)
    assert type(bare) is CrossVLLMModel
    bare.save_pretrained(tmp_path / "bare")
    again = CrossVLLMModel.from_pretrained(tmp_path / "bare")
    for name in NAMES:
        expected = model.model(**ROWS[name], granularity=name).last_hidden_state
        for each in (bare, again):
            assert torch.equal(each(**ROWS[name], granularity=name).last_hidden_state, expected)


def test_a_reference_is_never_saved(model, folder, tmp_path):
    loaded = CrossVLLMForConditionalGeneration.from_pretrained(folder)
    loaded.add_reference("coarse")
    loaded.set_granularity("coarse_ref")
    loaded.save_pretrained(tmp_path / "with")
    names = {path.name for path in (tmp_path / "with" / "adapters").iterdir()}
    assert names == {"coarse", "fine"}
    assert not [key for key in load_file(tmp_path / "with" / "model.safetensors") if "ref" in key or "lora" in key]
    assert same(CrossVLLMForConditionalGeneration.from_pretrained(tmp_path / "with"), model)


# ---------------------------------------------------------------------- a reference to the base


def test_a_checkpoint_can_refer_to_another_crossvllm(model, folder, tmp_path):
    base = tmp_path / "base"
    tiny_crossvllm_model(adapters=False).save_pretrained(base)
    model.save_pretrained(tmp_path / "small", base_model=str(base))
    assert not list((tmp_path / "small").glob("*.safetensors"))
    assert json.loads((tmp_path / "small" / "config.json").read_text())["base_model_name_or_path"] == str(base)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "small")
    assert loaded.config.base_model_name_or_path is None
    assert same(loaded, model)
    loaded.save_pretrained(tmp_path / "whole again")
    assert same(AutoModelForImageTextToText.from_pretrained(tmp_path / "whole again"), model)
    with pytest.raises(ValueError, match="nothing would be saved"):
        tiny_crossvllm_model(adapters=False).save_pretrained(tmp_path / "none", base_model=str(base))


def test_a_checkpoint_can_refer_to_a_llava_next_video(tmp_path):
    config = tiny_crossvllm_config(rope_factor=1)
    torch.manual_seed(0)
    backbone = LlavaNextVideoConfig(
        vision_config=config.vision_config, text_config=config.text_config, image_token_index=3, video_token_index=4
    )
    LlavaNextVideo(backbone).save_pretrained(tmp_path / "base")
    model = CrossVLLMForConditionalGeneration.from_backbone_pretrained(tmp_path / "base", coarse_stride=6)
    fill_adapters(model)
    with torch.no_grad():
        model.model.projectors["fine"].linear_1.weight.mul_(2)
    model.save_pretrained(tmp_path / "small", base_model=str(tmp_path / "base"))
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "small", dtype=torch.float32)
    assert same(loaded, model)
    model.save_pretrained(tmp_path / "whole")
    assert same(AutoModelForImageTextToText.from_pretrained(tmp_path / "whole"), model)
    with pytest.raises(ValueError, match=r"cannot be loaded with \['device_map'\]"):
        AutoModelForImageTextToText.from_pretrained(tmp_path / "small", device_map="cpu")


# ---------------------------------------------------------------------- what is refused


def test_adapters_that_do_not_fit_are_refused(folder):
    path = folder / "adapters" / "fine" / "adapter_model.safetensors"
    weights = load_file(path)
    lost = next(iter(weights))
    save_file({key: x for key, x in weights.items() if key != lost}, path)
    with pytest.raises(ValueError, match="adapters/fine does not fit this model: 1 weights are missing"):
        CrossVLLMForConditionalGeneration.from_pretrained(folder)
    save_file({**weights, lost: weights[lost][:, 1:].contiguous()}, path)
    with pytest.raises(ValueError, match="of another shape"):
        CrossVLLMForConditionalGeneration.from_pretrained(folder)
    shutil.rmtree(folder / "adapters" / "fine")
    with pytest.raises(OSError, match=r"adapters/fine/adapter_config\.json"):
        CrossVLLMForConditionalGeneration.from_pretrained(folder)


def test_without_peft_the_base_loads_and_adapters_say_what_is_missing(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"need the package peft: pip install"):
        CrossVLLMForConditionalGeneration.from_pretrained(folder)
    assert not CrossVLLMForConditionalGeneration.from_pretrained(folder, adapters=False).has_adapters


def test_one_adapter_can_be_loaded_by_peft_alone(model, folder):
    """What lies in a folder is an ordinary adapter; the projector stays the base's."""
    import peft

    base = CrossVLLMForConditionalGeneration.from_pretrained(folder, adapters=False)
    base.set_granularity("fine")
    wrapped = peft.PeftModel.from_pretrained(base, str(folder / "adapters" / "fine"))
    with torch.no_grad():
        found = wrapped(**ROWS["fine"]).logits
        assert torch.equal(found, model(**ROWS["fine"], granularity="fine").logits)
