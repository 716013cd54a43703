"""Patching decoders with CrossLMM's cross-attention: nothing else changes, and everything around a layer goes on."""

import copy
import pickle

import pytest
import torch
from transformers import AutoModelForCausalLM, GraniteConfig, Phi3Config
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from longvideo.modeling.crosslmm.decoder_patch import (
    add_t2v,
    init_cross_attention,
    patch_decoder,
    patched_layer_class,
    patched_layers,
    unpatch_decoder,
)
from longvideo.modeling.crosslmm.visibility import VisualInputs
from longvideo.modeling.crosslmm.visual_cache import prepare_visual_memory
from tests.tiny_crosslmm import open_gates, tiny_crosslmm_config

DECODERS = ("qwen2", "qwen3", "llama", "mistral")
IDS = torch.tensor([[0, 0, 7, 4, 4, 4, 4, 9, 8, 11], [5, 4, 4, 6, 4, 4, 12, 13, 14, 15]])


def make(text: str = "qwen2", seed: int = 0, **kwargs):
    """A tiny decoder with head, not patched, and the configuration to patch it by."""
    config = tiny_crosslmm_config(text=text, **kwargs)
    config.initializer_range = config.text_config.initializer_range = 0.2
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config.text_config).eval(), config


def memory(config, tokens: torch.Tensor | None = None):
    """Two videos of two and of one frame, two placeholders and three keys a frame, and an image."""
    torch.manual_seed(3)
    tokens = torch.randn(4 * 3, 32) if tokens is None else tokens
    visuals = VisualInputs(tokens, [2, 1, 1], [[0], [1, 2]], 2)
    return prepare_visual_memory(*IDS.shape, config=config, visuals=visuals, visual_BS=IDS == 4)


def run(model, config, tokens=None, **kwargs):
    return model(IDS, visual_memory=memory(config, tokens), use_cache=False, **kwargs)


@pytest.mark.parametrize("gate_mode", ["attn", "residual"])
@pytest.mark.parametrize("text", DECODERS)
def test_fresh_patch_leaves_logits_equal_bit_for_bit(text, gate_mode):
    model, config = make(text, gate_mode=gate_mode)
    with torch.no_grad():
        before, keys = model(IDS).logits, set(model.state_dict())
        patch_decoder(model.model, config)
        assert torch.equal(run(model, config).logits, before)
        assert torch.equal(model(IDS).logits, before)
        assert {key for key in model.state_dict() if "dual_cross_attention" not in key} == keys
        open_gates(model)
        assert (run(model, config).logits - before).abs().max() > 0.1
        assert torch.equal(model(IDS).logits, before), "without memory cross-attention must not run"
        unpatch_decoder(model)
        assert torch.equal(model(IDS).logits, before)
    assert set(model.state_dict()) == keys
    assert not patched_layers(model)


def test_patched_layers_are_those_of_the_configuration():
    model, config = make(cross_attention_interval=None, cross_attention_layers=[1, 3])
    patch_decoder(model.model, config)
    patched = patched_layers(model)
    assert patched == [model.model.layers[1], model.model.layers[3]]
    for layer in patched:
        dual = layer.dual_cross_attention
        assert torch.equal(dual.query_norm.weight, layer.post_attention_layernorm.weight)
        assert dual.query_norm.weight is not layer.post_attention_layernorm.weight
        assert dual.v2v.k_proj.weight.shape == (16, 32) and dual.v2v.o_proj.bias is None


def test_recorders_and_names_find_patched_layers():
    model, config = make("llama")
    patch_decoder(model.model, config)
    assert all(isinstance(layer, LlamaDecoderLayer) for layer in model.model.layers)
    assert type(model.model.layers[0]) is patched_layer_class(LlamaDecoderLayer)
    assert model.model._no_split_modules == {"LlamaDecoderLayer", "CrossLMMLlamaDecoderLayer"}
    model.set_attn_implementation("eager")
    out = run(model, config, output_hidden_states=True, output_attentions=True)
    assert len(out.hidden_states) == 5 and len(out.attentions) == 4
    unpatch_decoder(model.model)
    assert model.model._no_split_modules == {"LlamaDecoderLayer"}
    # With every layer patched no layer bears the original class's name.
    model, config = make("llama", cross_attention_interval=1)
    patch_decoder(model.model, config)
    assert "CrossLMMLlamaDecoderLayer" in model.model._no_split_modules


def test_patched_models_are_copied_and_pickled():
    model, config = make()
    patch_decoder(model.model, config)
    open_gates(model)
    with torch.no_grad():
        expected = run(model, config).logits
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(run(twin, config).logits, expected)
            assert type(twin.model.layers[0]) is type(model.model.layers[0])
            open_gates(twin, 0.1)
            assert torch.equal(run(model, config).logits, expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(use_reentrant):
    results = []
    for checkpointing in (False, True):
        model, config = make()
        patch_decoder(model.model, config)
        open_gates(model)
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        torch.manual_seed(4)
        source = torch.randn(4 * 3, 32, requires_grad=True)
        projector = torch.nn.Linear(32, 32)
        # Two patched layers go back through one projector, whose graph must be freed once only.
        run(model, config, projector(source)).logits.float().pow(2).mean().backward()
        named = {name: p.grad for name, p in model.named_parameters()}
        results.append((source.grad, projector.weight.grad, named))
    for plain, checkpointed in zip(results[0][:2], results[1][:2], strict=True):
        # The same float32 operations, summed into a gradient in another order.
        assert torch.allclose(plain, checkpointed, atol=1e-6) and plain.abs().max() > 1e-4
    for name, grad in results[0][2].items():
        assert torch.allclose(grad, results[1][2][name], atol=1e-6), name


@pytest.mark.parametrize("gate_mode", ["attn", "residual"])
def test_first_step_reaches_what_it_should(gate_mode):
    """From the start, gates learn first in one mode and output projections in the other."""
    model, config = make(gate_mode=gate_mode)
    patch_decoder(model.model, config)
    run(model, config).logits.float().pow(2).mean().backward()
    dual = patched_layers(model)[0].dual_cross_attention
    assert dual.t2v_gate.grad.abs() > 0 and dual.v2v_gate.grad.abs() > 0
    assert bool(dual.v2v.o_proj.weight.grad.any()) == (gate_mode == "residual")
    assert not dual.v2v.q_proj.weight.grad.any()


@pytest.mark.parametrize("kwargs", [{}, {"init_t2v_from_v2v": True}, {"share_kv": True}])
def test_second_stage_adds_t2v_and_changes_nothing(kwargs):
    model, config = make(use_t2v=False, **kwargs)
    patch_decoder(model.model, config)
    open_gates(model)
    assert not any("t2v" in name for name in model.state_dict())
    with torch.no_grad():
        before = run(model, config).logits
        assert add_t2v(model.model, config) is model.model
        assert config.use_t2v
        assert torch.equal(run(model, config).logits, before)
    dual = patched_layers(model)[0].dual_cross_attention
    assert dual.t2v_gate.item() == 0 and dual.v2v_gate.item() == pytest.approx(0.7)
    assert torch.equal(dual.t2v.q_proj.weight, dual.v2v.q_proj.weight) == bool(kwargs.get("init_t2v_from_v2v"))
    assert hasattr(dual.t2v, "k_proj") != config.share_kv
    with torch.no_grad():
        open_gates(model)
        assert (run(model, config).logits - before).abs().max() > 0.01
    with pytest.raises(ValueError, match="has T2V already"):
        add_t2v(model, config)


def test_start_from_self_attention():
    model, config = make("qwen3", init_from_self_attn=True)
    patch_decoder(model.model, config)
    for layer in patched_layers(model):
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            own = getattr(layer.dual_cross_attention.v2v, name)
            assert torch.equal(own.weight, getattr(layer.self_attn, name).weight)
            assert own.bias is None or not own.bias.any()


def test_loaded_weights_are_not_initialised_again():
    model, config = make()
    patch_decoder(model.model, config)
    open_gates(model)
    dual = patched_layers(model)[0].dual_cross_attention
    dual.v2v_gate._is_hf_initialized = True
    kept = dual.t2v.q_proj.weight.clone()
    init_cross_attention(model, config)
    assert dual.v2v_gate.item() == pytest.approx(0.7)
    assert dual.t2v_gate.item() == 0 and not torch.equal(dual.t2v.q_proj.weight, kept)


def test_adapters_reach_cross_attention():
    peft = pytest.importorskip("peft")
    model, config = make()
    patch_decoder(model.model, config)
    open_gates(model)
    with torch.no_grad():
        before = run(model, config).logits
        lora = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
        assert torch.equal(run(lora, config).logits, before)
    assert any("dual_cross_attention.t2v.q_proj.lora_A" in name for name, _ in lora.named_parameters())


def test_what_cannot_be_patched_is_refused():
    model, config = make()
    with pytest.raises(ValueError, match="Qwen2ForCausalLM has no `layers`"):
        patch_decoder(model, config)
    patch_decoder(model.model, config)
    with pytest.raises(ValueError, match="Layer 0 is patched already"):
        patch_decoder(model.model, config)
    _, deep = make(num_hidden_layers=8)
    unpatch_decoder(model)
    with pytest.raises(ValueError, match=r"cross_attention_layers is \[0, 2, 4, 6\], but Qwen2Model has 4 layers"):
        patch_decoder(model.model, deep)
    with pytest.raises(ValueError, match="has no patched layers"):
        add_t2v(model, config)


@pytest.mark.parametrize(
    ("family", "part"), [(Phi3Config, "resid_attn_dropout"), (GraniteConfig, "residual_multiplier")]
)
def test_layers_of_other_parts_are_refused(family, part):
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    other = AutoModelForCausalLM.from_config(family(vocab_size=64, pad_token_id=0, num_key_value_heads=2, **small))
    _, config = make()
    with pytest.raises(ValueError, match=f"{family.__name__[:-6]}DecoderLayer with the parts .*{part}"):
        patch_decoder(other.model, config)
    assert not patched_layers(other)


def test_half_precision_keeps_its_type():
    model, config = make()
    patch_decoder(model.to(torch.bfloat16).model, config)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    open_gates(model)
    assert run(model, config).logits.dtype == torch.bfloat16
