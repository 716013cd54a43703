"""The switch between granularities: adapter, projector and stride at once, in use, learning and for references."""

import copy

import pytest
import torch

from tests.crossvllm.prompts_crossvllm import prompt
from tests.tiny_crossvllm import fill_adapters, tiny_crossvllm_model

NAMES = ("coarse", "fine")
ROWS = {name: prompt(3, "video2", 4, granularity=name) for name in NAMES}


@pytest.fixture
def model():
    return tiny_crossvllm_model()


def loss_of(model, name, **kwargs):
    row = ROWS[name]
    return model(**row, labels=row["input_ids"], **kwargs).loss


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@torch.no_grad()
def test_fresh_adapters_leave_logits_bit_identical_and_filled_ones_do_not():
    model = tiny_crossvllm_model(adapters=False)
    before = {name: model(**ROWS[name], granularity=name).logits for name in NAMES}
    model.add_adapters()
    for name in NAMES:
        assert torch.equal(model(**ROWS[name], granularity=name).logits, before[name])
    fill_adapters(model)
    for name in NAMES:
        assert not torch.allclose(model(**ROWS[name], granularity=name).logits, before[name], atol=1e-2)
    model.disable_adapters()
    for name in NAMES:
        assert torch.equal(model(**ROWS[name], granularity=name).logits, before[name])
    model.enable_adapters()
    with pytest.raises(ValueError, match="has adapters already"):
        model.add_adapters()


@torch.no_grad()
@pytest.mark.parametrize("adapters", [True, False])
def test_every_way_to_switch_gives_the_same(adapters):
    model = tiny_crossvllm_model(adapters=adapters)
    by_call = {name: model(**ROWS[name], granularity=name).logits for name in NAMES}
    assert model.granularity == model.model.granularity == "coarse"
    for name in (*NAMES, *NAMES):
        model.set_granularity(name)
        assert torch.equal(model(**ROWS[name]).logits, by_call[name])
    model.model.set_granularity("coarse")
    with model.use_granularity("fine"):
        assert model.granularity == "fine"
        assert torch.equal(model(**ROWS["fine"]).logits, by_call["fine"])
    assert torch.equal(model(**ROWS["coarse"]).logits, by_call["coarse"])


@torch.no_grad()
def test_each_granularity_has_its_own_adapter_and_projector(model):
    """Text alone shows the adapter, features alone the projector."""
    text = torch.tensor([[9, 8, 7]])
    assert not torch.allclose(model(text).logits, model(text, granularity="fine").logits, atol=1e-2)
    image = torch.randn(1, 3, 48, 48)
    features = [model.get_image_features(image, granularity=name).pooler_output[0] for name in NAMES]
    assert not torch.allclose(*features, atol=1e-2)
    fine = model(**ROWS["fine"], granularity="fine").logits
    coarse = model(**ROWS["coarse"]).logits
    for part in ("lora_B.coarse", "projectors.coarse"):
        changed = copy.deepcopy(model)
        for name, parameter in changed.named_parameters():
            if part in name:
                parameter.mul_(1.5)
        assert torch.equal(changed(**ROWS["fine"], granularity="fine").logits, fine)
        assert not torch.allclose(changed(**ROWS["coarse"]).logits, coarse, atol=1e-3)


def test_a_switch_survives_an_error_and_an_unknown_name_is_refused(model):
    with pytest.raises(ValueError, match="exactly one"), model.use_granularity("fine"):
        model()
    with pytest.raises(ValueError, match="placeholder"):
        model(**ROWS["coarse"], granularity="fine")
    assert model.granularity == "coarse"
    assert model.active_adapters() == ["coarse"]
    for call in (model.set_granularity, lambda name: model(**ROWS["coarse"], granularity=name), model.set_trainable):
        with pytest.raises(ValueError, match="granularity is 'middle'; choose one of"):
            call("middle")


def test_switching_leaves_what_learns_and_set_adapter_decides_it(model):
    learns = {name for name, p in model.named_parameters() if p.requires_grad}
    kinds = {next(part for part in ("lora_", "projectors") if part in name) for name in learns}
    assert kinds == {"lora_", "projectors"}
    model.set_granularity("fine")
    assert {name for name, p in model.named_parameters() if p.requires_grad} == learns
    model.set_trainable("fine")
    fine = {name for name, p in model.named_parameters() if p.requires_grad}
    assert fine == {f"model.{name}" for name, _ in model.granularity_parameters("fine")}
    assert fine == {name for name in learns if "fine" in name.split(".")}
    model.set_adapter("coarse")
    assert model.granularity == "coarse"
    assert torch.equal(model(**ROWS["coarse"]).logits, model(**ROWS["coarse"], granularity="coarse").logits)


@pytest.mark.parametrize("name", NAMES)
def test_only_the_active_granularity_gets_gradients(model, name):
    model.train()
    loss_of(model, name, granularity=name).backward()
    found = set(gradients(model))
    assert found == {f"model.{parameter}" for parameter, _ in model.granularity_parameters(name)}
    assert all(torch.isfinite(grad).all() and grad.any() for grad in gradients(model).values())


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_gradient_checkpointing_runs_layers_again_in_their_own_granularity(reentrant):
    """Both losses are backpropagated after the model is back in another granularity."""
    torch.manual_seed(0)
    expected, found = {}, {}
    for checkpointing, target in ((False, expected), (True, found)):
        model = tiny_crossvllm_model(lora_dropout=0.0).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        (loss_of(model, "fine", granularity="fine") + 2 * loss_of(model, "coarse")).backward()
        assert model.granularity == "coarse"
        target.update(gradients(model))
    assert set(expected) <= set(found)
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-5, atol=1e-6)  # the same sums, run twice
    copied = copy.deepcopy(model)
    copied.set_granularity("fine")
    assert model.granularity == "coarse"


def test_the_tower_is_frozen_and_can_be_thawed():
    model = tiny_crossvllm_model(adapters=False).train()
    tower = model.model.vision_tower
    assert not any(p.requires_grad for p in tower.parameters())
    loss_of(model, "coarse").backward()
    assert all(p.grad is None for p in tower.parameters())
    tower.requires_grad_(True)
    loss_of(model, "coarse").backward()
    assert all(p.grad is not None for p in tower.parameters())


@torch.no_grad()
def test_a_reference_keeps_what_its_source_was(model):
    before = model(**ROWS["coarse"]).logits
    learns = {name for name, p in model.named_parameters() if p.requires_grad}
    assert model.add_reference("coarse") == "coarse_ref"
    assert model.granularity == "coarse"
    assert {name for name, p in model.named_parameters() if p.requires_grad} == learns
    assert torch.equal(model(**ROWS["coarse"], granularity="coarse_ref").logits, before)
    for _, parameter in model.granularity_parameters("coarse"):
        parameter.add_(0.05)
    assert not torch.allclose(model(**ROWS["coarse"]).logits, before, atol=1e-3)
    assert torch.equal(model(**ROWS["coarse"], granularity="coarse_ref").logits, before)
    model.sync_reference("coarse_ref")
    assert torch.equal(model(**ROWS["coarse"], granularity="coarse_ref").logits, model(**ROWS["coarse"]).logits)
    with pytest.raises(ValueError, match="there already"):
        model.add_reference("coarse")
    with pytest.raises(ValueError, match="no reference 'fine_ref'"):
        model.sync_reference("fine_ref")
    with pytest.raises(ValueError, match="Call add_adapters first"):
        tiny_crossvllm_model(adapters=False).add_reference("coarse")


@torch.no_grad()
def test_a_projector_can_start_from_the_other(model):
    model.copy_projector("coarse", "fine")
    image = torch.randn(1, 3, 48, 48)
    features = [model.get_image_features(image, granularity=name).pooler_output[0] for name in NAMES]
    assert torch.equal(*features)
