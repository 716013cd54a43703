"""LoRA on every architecture: where it sits, what is saved beside it, merging, loading, and what does not belong."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

from longvideo.trainers import VideoSFTCollator, check_adapter, load_adapter, lora_config, part_of
from longvideo.trainers.collators import IGNORE_INDEX
from tests.tiny import tiny_text_config
from tests.tiny_crossvllm import tiny_crossvllm_model
from tests.tiny_llava_st import tiny_llava_st_model
from tests.trainers.sft_runs import assert_same_gradients, changed_names, gradients, losses, short_run, snapshot
from tests.trainers.zoo import KINDS, VARIANTS, make_batch, make_model, rows_of

peft = pytest.importorskip("peft")


def adapted(name: str, **kwargs: Any) -> Any:
    """A model of a variant with a small adapter."""
    model = make_model(name)
    return peft.get_peft_model(model, lora_config(model, **{"r": 2, **kwargs}))


def learn(model: Any, batch: dict[str, torch.Tensor], *, rate: float = 0.05, num_steps: int = 3) -> None:
    """Some steps of Adam, after which every trained matrix has left its start."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=rate)
    for _ in range(num_steps):
        optimizer.zero_grad()
        model(**batch, use_cache=False).loss.backward()
        optimizer.step()


def logits(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    with torch.no_grad():
        return model.eval()(**inputs, use_cache=False).logits


@pytest.mark.parametrize("name", VARIANTS)
def test_adapter_sits_on_the_decoder_alone_and_learns(name):
    model = adapted(name)
    before, batch = snapshot(model), make_batch(name)
    learn(model, batch)
    changed = changed_names(model, before)
    learns = {x for x, p in model.named_parameters() if p.requires_grad}
    assert changed == learns
    assert {part_of(x) for x in changed} == {"language_model"}
    owners = {x.split(".lora_")[0] for x in changed if ".lora_" in x}
    expected = {
        x
        for x, module in model.named_modules()
        if hasattr(module, "in_features") and hasattr(module, "base_layer") and ".language_model.layers." in x
    }
    per_layer = 7 * model.config.text_config.num_hidden_layers
    # Two of four layers have cross-attention, two times four maps each.
    assert owners == expected and len(owners) == per_layer + (16 if name == "crosslmm" else 0)
    assert any("dual_cross_attention" in x and "t2v_gate" in x for x in changed) == (name == "crosslmm-closed")


@pytest.mark.parametrize("connector", [True, "full"])
@pytest.mark.parametrize("name", KINDS)
def test_connector_learns_when_asked(name, connector):
    model = adapted(name, connector=connector)
    before, batch = snapshot(model), make_batch(name)
    learn(model, batch, num_steps=2)
    changed = changed_names(model, before)
    assert {part_of(x) for x in changed} == {"language_model", "connector"}
    whole = {x for x in changed if ".modules_to_save." in x and part_of(x) == "connector"}
    assert bool(whole) == (connector == "full")
    assert all("lora_" in x for x in changed if part_of(x) == "connector" and x not in whole)


@pytest.mark.parametrize("name", VARIANTS)
def test_saved_adapter_is_small_and_loads_on_the_base(name, tmp_path):
    """Through `from_pretrained` and `PeftModel.from_pretrained`, in a folder that holds no base weights."""
    base = make_model(name)
    base.save_pretrained(tmp_path / "base")
    model = peft.get_peft_model(base, lora_config(base, r=2, connector="full"))
    batch = make_batch(name)
    learn(model, batch)
    wanted = logits(model, batch)
    model.save_pretrained(tmp_path / "adapter")
    assert {x.name for x in (tmp_path / "adapter").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "README.md"
    }  # fmt: skip
    for load in (peft.PeftModel.from_pretrained, load_adapter):
        fresh = AutoModelForImageTextToText.from_pretrained(tmp_path / "base")
        # Equal weights at other addresses: some processors sum in an order that goes by alignment; float32.
        found = logits(load(fresh, tmp_path / "adapter"), batch)
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    assert not torch.allclose(logits(make_model(name), batch), wanted)


@pytest.mark.parametrize("name", VARIANTS)
def test_merging_and_unmerging_change_nothing(name, tmp_path):
    model = adapted(name, connector="full", new_tokens=[5, 6]).double()
    batch = make_batch(name)
    batch = {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}
    learn(model, batch)
    base_before = {key: value.clone() for key, value in model.get_base_model().state_dict().items()}
    wanted = logits(model, batch)
    model.merge_adapter()
    # Products with sums in place of sums of products; in double precision so that no choice of tokens flips.
    torch.testing.assert_close(logits(model, batch), wanted, atol=1e-5, rtol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model, batch), wanted, atol=1e-5, rtol=1e-5)
    for key, value in model.get_base_model().state_dict().items():
        torch.testing.assert_close(value, base_before[key], atol=1e-5, rtol=1e-5)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged, batch), wanted, atol=1e-5, rtol=1e-5)
    merged.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float64)
    torch.testing.assert_close(logits(loaded, batch), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("connector", [False, "full"])
def test_new_tokens_learn_and_no_other_row_does(connector, tied, tmp_path):
    """Beside modules that are saved whole, too."""
    base = make_model("videochat_flash", text_kwargs={"tie_word_embeddings": tied}, tie_word_embeddings=tied)
    base.resize_token_embeddings(270, mean_resizing=False)
    new = [266, 269]
    model = peft.get_peft_model(base, lora_config(base, r=2, connector=connector, new_tokens=new))
    batch = make_batch("videochat_flash")
    ids = batch["input_ids"]
    answer = (batch["labels"] != IGNORE_INDEX).nonzero()[:2]
    for (row, column), token in zip(answer.tolist(), new, strict=True):
        ids[row, column] = batch["labels"][row, column] = token
    before = base.get_input_embeddings().weight.detach().clone(), base.get_output_embeddings().weight.detach().clone()
    learn(model, batch)
    wanted = logits(model, batch)
    model.save_pretrained(tmp_path)
    fresh = make_model("videochat_flash", text_kwargs={"tie_word_embeddings": tied}, tie_word_embeddings=tied)
    with pytest.raises((ValueError, IndexError, RuntimeError)):
        load_adapter(make_model("videochat_flash"), tmp_path)
    fresh.resize_token_embeddings(270, mean_resizing=False)
    # The new rows of the base are random: those of the adapter replace them. Old ones come from the base.
    merged = load_adapter(fresh, tmp_path).merge_and_unload()
    for module, old in zip((merged.get_input_embeddings(), merged.get_output_embeddings()), before, strict=True):
        moved = (module.weight.detach()[:264] != old[:264]).any(1)
        assert not moved.any()
        assert (module.weight.detach()[new] != old[new]).any(1).all()
    known = [*range(264), *new]
    # Sums in float32 in another order.
    torch.testing.assert_close(logits(merged, batch)[..., known], wanted[..., known], atol=1e-4, rtol=1e-4)
    if tied:
        assert merged.get_input_embeddings().weight is merged.get_output_embeddings().weight


@pytest.mark.parametrize("name", ["llava_st", "llava_st-split", "llava_st-tied"])
def test_coordinates_learn_with_the_adapter_and_are_saved(name, tmp_path):
    model = adapted(name)
    config = model.config
    start, count = config.coordinate_token_start, config.num_coordinate_tokens
    before = model.get_base_model().model.input_rows().detach().clone()
    learn(model, make_batch(name, num_rows=4))
    model.save_pretrained(tmp_path)
    loaded = load_adapter(make_model(name), tmp_path).merge_and_unload()
    rows = loaded.model.input_rows().detach()
    assert rows.shape[0] == count and (rows != before).any(1).sum() > count // 2
    if name != "llava_st-split":
        assert torch.equal(rows, loaded.get_input_embeddings().weight[start : start + count])
    off = make_model(name)
    names = {x for x, p in peft.get_peft_model(off, lora_config(off, r=2, coordinates=False)).named_parameters()}
    assert not any("trainable_tokens" in x or "modules_to_save" in x for x in names)


@pytest.mark.parametrize("name", ["videochat_flash-dropout", "llava_st-split", "crosslmm-closed"])
def test_gradient_checkpointing_changes_no_gradient(name):
    batch = make_batch(name)
    model = adapted(name, connector="full").train()
    plain = gradients(model, [batch])
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same_gradients(plain, gradients(model, [batch]))


@pytest.mark.parametrize("name", KINDS)
def test_trainer_saves_the_adapter_alone_and_resumes(name, tmp_path):
    processor = VARIANTS[name].processor()
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2}
    settings |= {"per_device_train_batch_size": 1, "seed": 3}

    def trainer() -> Any:
        return short_run(tmp_path, adapted(name), processor, rows_of(name), **settings)

    whole = trainer()
    whole.train()
    half = tmp_path / "run" / "checkpoint-2"
    assert (half / "adapter_model.safetensors").is_file() and not list(half.glob("model*.safetensors"))
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    resumed = trainer()
    resumed.train(resume_from_checkpoint=True)
    # The same numbers: rows, random state, optimizer and adapter go on as they were.
    assert losses(resumed) == pytest.approx(losses(whole), rel=1e-6)
    for (key, value), other in zip(whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True):
        # Adam turns rounding of near-zero gradients into small steps.
        torch.testing.assert_close(other, value, atol=1e-5, rtol=1e-5, msg=key)


def test_resuming_from_an_adapter_of_another_size_is_refused(tmp_path):
    adapted("videochat_flash").save_pretrained(tmp_path / "old")
    deeper = make_model("videochat_flash", num_hidden_layers=5)
    model = peft.get_peft_model(deeper, lora_config(deeper, r=2))
    trainer = short_run(tmp_path, model, VARIANTS["videochat_flash"].processor(), rows_of("videochat_flash"))
    with pytest.raises(ValueError, match=r"has no weights for .*layers\.4\..*shallower model"):
        trainer._load_from_checkpoint(str(tmp_path / "old"))


def test_adapter_of_another_architecture_is_refused(tmp_path):
    adapted("longvu").save_pretrained(tmp_path)
    model = make_model("videochat_flash")
    names = [x for x, _ in model.named_modules()]
    with pytest.raises(
        ValueError, match=r"trained on a LongVUForCond.*but this model is a VideoChatFlashForCond.*Load the model that"
    ):
        load_adapter(model, tmp_path)
    assert [x for x, _ in model.named_modules()] == names
    # Adapters of other tools note no class; names and sizes tell.
    rewrite(tmp_path, auto_mapping=None, task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match=r"has no weights for .*layers\.2\..*shallower model"):
        load_adapter(model, tmp_path)
    adapted("crosslmm").save_pretrained(tmp_path)
    rewrite(tmp_path, auto_mapping=None, base_model_name_or_path="some/base")
    with pytest.raises(ValueError, match=r"weights for .*dual_cross_attention.*another architecture.*\(some/base\)"):
        check_adapter(peft.get_peft_model(model, lora_config(model)), tmp_path)
    text = tiny_text_config(4, hidden_size=64)
    with pytest.raises(ValueError, match=r"a matrix of 32 features for .*which has 64 .*another size"):
        adapted("videochat_flash").save_pretrained(tmp_path)
        check_adapter(make_model("videochat_flash", text_config=text), tmp_path)
    with pytest.raises(FileNotFoundError, match=r"holds no adapter: adapter_config.json is missing"):
        load_adapter(model, tmp_path / "absent")


def rewrite(folder: Path, **changes: Any) -> None:
    """Changes entries of a saved adapter's configuration."""
    path = folder / "adapter_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**settings, **changes}), encoding="utf-8")


def test_a_crossvllm_with_its_own_adapters_takes_no_other_one():
    """Its LoRA are the adapters of its granularities, which stages train; it cannot have both kinds."""
    own = tiny_crossvllm_model()
    with pytest.raises(ValueError, match=r"has adapters of its own, for coarse and fine\. Train these .*begin_coarse"):
        lora_config(own)
    shared = adapted("crossvllm")
    batch = make_batch("crossvllm")
    before = {name: logits(shared.get_base_model(), batch_of(name)) for name in ("coarse", "fine")}
    learn(shared, batch)
    for name, value in before.items():
        # One adapter for both granularities: what was learned in one changes the other too.
        assert not torch.allclose(logits(shared.get_base_model(), batch_of(name)), value)


def batch_of(granularity: str) -> dict[str, Any]:
    """A batch of CrossVLLM in a granularity."""
    collator = VideoSFTCollator(VARIANTS["crossvllm"].processor(), processor_kwargs={"granularity": granularity})
    return {**collator(rows_of("crossvllm")[:2]), "granularity": granularity}


def test_settings_that_do_not_fit():
    model = make_model("videochat_flash")
    with pytest.raises(ValueError, match=r"r=0 must be at least 1"):
        lora_config(model, r=0)
    with pytest.raises(ValueError, match=r"connector='projector' must be one of \(False, True, 'lora', 'full'\)"):
        lora_config(model, connector="projector")
    with pytest.raises(ValueError, match=r"new_tokens has 264, but the embedding has 264 rows.*resize_token_embed"):
        lora_config(model, new_tokens=[5, 264])
    with pytest.raises(ValueError, match=r"has adapters already.*merge first"):
        lora_config(peft.get_peft_model(model, lora_config(model)))
    with pytest.raises(ValueError, match=r"has no linear layers in"):
        lora_config(make_model("videochat_flash").model.vision_tower)


def test_settings_pass_through():
    config = lora_config(make_model("longvu"), r=8, dropout=0.1, use_rslora=True, target_modules=["q_proj"])
    assert (config.lora_alpha, config.lora_dropout, config.use_rslora) == (16, 0.1, True)
    assert config.target_modules == {"q_proj"}
    assert lora_config(make_model("longvu"), r=8, alpha=4).lora_alpha == 4
    whole = lora_config(make_model("crosslmm"), modules_to_save=["dual_cross_attention"])
    assert whole.modules_to_save == ["dual_cross_attention"] and "cross_attention" not in whole.target_modules


def test_what_is_stored_beside_the_matrices_must_fit_too(tmp_path):
    """`PeftModel.from_pretrained` leaves tables and rows of tokens out where the model has no place for them."""
    tables, rows = tmp_path / "tables", tmp_path / "rows"
    model = tiny_llava_st_model(coordinate_layout="split")
    peft.get_peft_model(model, lora_config(model, r=2)).save_pretrained(tables)
    load_adapter(tiny_llava_st_model(coordinate_layout="split"), tables)
    with pytest.raises(ValueError, match=r"has weights for 'model\.coordinates\..*modules or tokens were added"):
        load_adapter(tiny_llava_st_model(num_temporal_tokens=0, num_spatial_tokens=0), tables)
    with pytest.raises(ValueError, match=r"a tensor of the shape \[6, 32\] .* which has \[9, 32\]"):
        load_adapter(tiny_llava_st_model(coordinate_layout="split", num_temporal_tokens=9), tables)
    model, plain = make_model("videochat_flash"), make_model("videochat_flash")
    size = model.get_input_embeddings().weight.shape[0]
    model.resize_token_embeddings(size + 2, mean_resizing=False)
    peft.get_peft_model(model, lora_config(model, r=2, new_tokens=[size, size + 1])).save_pretrained(rows)
    with pytest.raises(ValueError, match=r"rows of the shape \[2, 32\] .*another vocabulary"):
        load_adapter(plain, rows)
    plain.resize_token_embeddings(size + 2, mean_resizing=False)
    load_adapter(plain, rows)
