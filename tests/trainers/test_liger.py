"""Speed parts: liger-kernel (a stand-in records what it was asked for), attention per part, bf16, checkpointing."""

import logging
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.utils import logging as transformers_logging

from longvideo.trainers import apply_liger, liger, lora_config
from tests.trainers.sft_runs import assert_same_gradients, gradients, losses, short_run
from tests.trainers.zoo import KINDS, VARIANTS, make_batch, make_model, rows_of

WITHOUT_FUSED_LOSS = ("llava_st", "llava_st-split", "llava_st-tied")


class Stub:
    """Stands in for liger-kernel: the calls that it got, and its fused loss in plain torch."""

    def __init__(self) -> None:
        self.patched: list[tuple[Any, dict[str, bool]]] = []
        self.lengths: list[int] = []

    def apply(self, model: Any, **kernels: bool) -> None:
        self.patched.append((model, kernels))

    def loss(
        self,
        hidden_states: torch.Tensor,
        lm_head_weight: torch.Tensor,
        labels: torch.Tensor,
        hidden_size: int,
        num_items_in_batch: Any = None,
        shift_labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        assert shift_labels is None and lm_head_weight.shape[1] == hidden_size == hidden_states.shape[-1]
        self.lengths.append(hidden_states.shape[1])
        logits = F.linear(hidden_states, lm_head_weight)[:, :-1].flatten(0, 1)
        total = F.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")
        return total / ((labels[:, 1:] != -100).sum() if num_items_in_batch is None else num_items_in_batch)


@pytest.fixture
def stub(monkeypatch) -> Stub:
    """Makes `liger_kernel` importable."""
    found = Stub()
    modules = {
        "liger_kernel": {},
        "liger_kernel.transformers": {"_apply_liger_kernel_to_instance": found.apply},
        "liger_kernel.transformers.monkey_patch": {"MODEL_TYPE_TO_APPLY_LIGER_FN": {"qwen2": None, "llama": None}},
        "liger_kernel.transformers.model": {},
        "liger_kernel.transformers.model.loss_utils": {"LigerForCausalLMLoss": found.loss},
    }
    for name, members in modules.items():
        module = ModuleType(name)
        module.__dict__.update(members)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(liger, "is_liger_kernel_available", lambda: True)
    return found


@pytest.fixture
def warned(caplog) -> Any:
    """The library's warnings, each of which is said once; told again in every test."""
    liger.logger.warning_once.__func__.cache_clear() if hasattr(liger.logger.warning_once, "__func__") else None
    transformers_logging.enable_propagation()
    caplog.set_level(logging.WARNING)
    yield lambda: [record.getMessage() for record in caplog.records if "liger" in record.getMessage()]
    transformers_logging.disable_propagation()


@pytest.mark.parametrize("name", VARIANTS)
def test_fused_loss_equals_the_plain_one(name, stub):
    """The same loss and gradients, also where the model shortened or lengthened the sequence, and no logits."""
    batch = make_batch(name, num_rows=3)
    plain = gradients(make_model(name).train(), [batch])
    model = make_model(name).train()
    assert apply_liger(model, device="cuda")
    assert stub.patched == [
        (model.model.language_model, {"fused_linear_cross_entropy": False, "cross_entropy": False})
    ]
    assert_same_gradients(plain, gradients(model, [batch]))
    outputs = model(**batch, use_cache=False)
    expected = make_model(name).train()(**batch, use_cache=False)
    # The same sums in float32 in another order.
    torch.testing.assert_close(outputs.loss, expected.loss, rtol=1e-5, atol=1e-6)
    if name in WITHOUT_FUSED_LOSS:
        assert not stub.lengths and outputs.logits is not None
    else:
        assert outputs.logits is None and "logits" not in outputs
        assert set(stub.lengths) == {expected.logits.shape[1]}
        changes = {"videochat_flash-dropout": "shorter", "longvu": "longer"}.get(name)
        length = batch["input_ids"].shape[1]
        assert changes == ("shorter" if stub.lengths[0] < length else "longer" if stub.lengths[0] > length else None)
    # Evaluation and answers need logits.
    evaluated = model.eval()(**batch, use_cache=False)
    assert evaluated.logits is not None
    torch.testing.assert_close(evaluated.loss, make_model(name)(**batch, use_cache=False).loss)


def test_kernels_can_be_chosen(stub):
    model = make_model("longvu").train()
    assert apply_liger(model, device="cuda", rope=False, fused_linear_cross_entropy=False)
    assert stub.patched[0][1] == {"rope": False, "fused_linear_cross_entropy": False, "cross_entropy": False}
    assert model(**make_batch("longvu"), use_cache=False).logits is not None and not stub.lengths
    for _ in range(2):
        assert apply_liger(model, device="cuda")
    assert model(**make_batch("longvu"), use_cache=False).logits is None and len(stub.lengths) == 1


def test_adapters(stub):
    peft = pytest.importorskip("peft")
    model = make_model("videochat_flash")
    batch = make_batch("videochat_flash")
    adapted = peft.get_peft_model(model, lora_config(model, r=2)).train()
    plain = gradients(adapted, [batch])
    assert apply_liger(adapted, device="cuda") and stub.patched[0][0] is model.model.language_model
    assert_same_gradients(plain, gradients(adapted, [batch]))
    assert stub.lengths
    # Rows of the head that an adapter trains are not in its weight: the plain loss counts them.
    stub.lengths.clear()
    model = make_model("videochat_flash")
    adapted = peft.get_peft_model(model, lora_config(model, r=2, new_tokens=[7])).train()
    assert apply_liger(adapted, device="cuda")
    adapted(**batch, use_cache=False).loss.backward()
    assert not stub.lengths
    trained = {x for x, p in adapted.named_parameters() if p.grad is not None and "token" in x}
    assert any("lm_head" in x for x in trained) and any("embed_tokens" in x for x in trained)


@pytest.mark.parametrize("name", ["videochat_flash-dropout", "crosslmm"])
def test_trainer_uses_it_when_asked(name, stub, monkeypatch, tmp_path):
    monkeypatch.setattr(liger, "_why_not", lambda *args: None)
    settings = {"max_steps": 2, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 1}
    settings |= {"learning_rate": 1e-3}

    def run(**more: Any) -> Any:
        trainer = short_run(tmp_path, make_model(name), VARIANTS[name].processor(), rows_of(name), **settings, **more)
        trainer.train()
        return trainer

    plain = run()
    fused = run(use_liger_kernel=True, liger_kernel_config={"rms_norm": False})
    # Two sums of float32 and two steps of Adam.
    assert losses(fused) == pytest.approx(losses(plain), rel=1e-4)
    assert len(stub.lengths) == 4 and stub.patched[0][1]["rms_norm"] is False
    assert fused.args.use_liger_kernel
    assert fused.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-3)


def test_without_package_or_gpu_it_says_so_once_and_trains(monkeypatch, tmp_path, warned):
    def run() -> list[float]:
        trainer = short_run(
            tmp_path,
            make_model("videochat_flash"),
            VARIANTS["videochat_flash"].processor(),
            rows_of("videochat_flash"),
            use_liger_kernel=True,
        )
        trainer.train()
        return losses(trainer)

    monkeypatch.setattr(liger, "is_liger_kernel_available", lambda: False)
    first = run()
    assert first == run()
    assert len(warned()) == 1
    assert "not used: the package is missing (pip install 'longvideo[liger]'). Training goes on" in warned()[0]
    monkeypatch.setattr(liger, "is_liger_kernel_available", lambda: True)
    assert run() == first
    assert "its kernels need a GPU, and the model trains on 'cpu'" in warned()[1]


def test_unknown_text_model(stub, warned, monkeypatch):
    sys.modules["liger_kernel.transformers.monkey_patch"].MODEL_TYPE_TO_APPLY_LIGER_FN.clear()
    assert not apply_liger(make_model("longvu"), device="cuda")
    assert "no kernels for the text model of LongVUForConditionalGeneration, of type 'qwen2'" in warned()[0]


# ------------------------------------------------------------------ attention, number type, checkpointing


@pytest.mark.parametrize("name", KINDS)
def test_attention_of_the_text_model_alone(name):
    """What `attn_implementation={"text_config": "flash_attention_2"}` does, shown with one of our own."""
    callers: set[str] = set()

    def recorder(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        callers.add(names[module])
        return sdpa_attention_forward(module, *args, **kwargs)

    AttentionInterface.register("recorder", recorder)
    try:
        model = make_model(name)
        names = {module: x for x, module in model.named_modules()}
        batch = make_batch(name)
        with torch.no_grad():
            before = model(**batch, use_cache=False).logits
            model.set_attn_implementation({"text_config": "recorder"})
            assert model.config._attn_implementation == model.config.vision_config._attn_implementation == "sdpa"
            # No mask function is known for it, so that masks are those of eager attention: rows of padding differ.
            after = model(**batch, use_cache=False).logits
        assert callers and all(".language_model.layers." in x for x in callers)
        assert any("dual_cross_attention" in x for x in callers) == (name == "crosslmm")
        assert before.shape == after.shape
        model.set_attn_implementation("recorder")
        with torch.no_grad():
            model(**batch, use_cache=False)
        assert any("vision_tower" in x for x in callers)
    finally:
        AttentionInterface._global_mapping.pop("recorder", None)


def saved_bytes(model: Any, batch: dict[str, torch.Tensor]) -> int:
    """Bytes that a forward pass keeps for the backward pass, weights not counted and every storage once."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        model(**batch, use_cache=False).loss.backward()
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("name", [*KINDS, "videochat_flash-dropout"])
def test_checkpointing_and_bf16_keep_fewer_bytes(name):
    batch = make_batch(name, num_rows=2)
    model = make_model(name).train()
    plain = saved_bytes(model, batch)
    half = {key: value.bfloat16() if value.is_floating_point() else value for key, value in batch.items()}
    assert saved_bytes(make_model(name).bfloat16().train(), half) < 0.75 * plain
    model.gradient_checkpointing_enable({"use_reentrant": False})
    few = saved_bytes(model, batch)
    # What is left: inputs of layers, connector, head. The tiny vocabulary is as wide as eight hidden states.
    assert few < 0.6 * plain, (few, plain)
