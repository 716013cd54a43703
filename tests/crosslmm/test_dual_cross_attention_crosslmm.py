"""Dual cross-attention of CrossLMM against loops written from the equations, and the plan of who sees what."""

import itertools

import pytest
import torch
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from longvideo.modeling.crosslmm.dual_cross_attention import CrossLMMDualCrossAttention
from longvideo.modeling.crosslmm.visibility import VisualInputs, assign_visuals
from longvideo.modeling.crosslmm.visual_cache import append_keys, prepare_visual_memory
from tests.reference.crosslmm_cross_attention import PADDING, TEXT, naive_dual_cross_attention
from tests.tiny_crosslmm import tiny_crosslmm_config

P, T = PADDING, TEXT
# Rows of 13: text before, between and after visuals, one video broken by a text token, padding on both sides.
KINDS = [
    [P, P, T, 0, 0, 0, 0, 0, T, 0, T, 1, 1],
    [T, 0, 0, T, 1, 1, 1, 1, 2, 2, T, T, P],
    [P, T, T, T, T, T, T, T, T, T, T, T, T],
]
FRAMES = [3, 1, 1, 2, 1]
ROW_VISUALS = [[0, 1], [2, 3, 4], []]
ROWS_PER_FRAME, KEYS_PER_FRAME = 2, 2


def make_config(implementation: str = "sdpa", **kwargs):
    config = tiny_crosslmm_config(**kwargs)
    config.text_config._attn_implementation = implementation
    return config


def make_layer(config, seed: int = 0) -> CrossLMMDualCrossAttention:
    torch.manual_seed(seed)
    norm = Qwen2RMSNorm(config.text_config.hidden_size, eps=1e-5)
    layer = CrossLMMDualCrossAttention(config.text_config, config, norm, slot=0).eval()
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.normal_(std=0.3) if "norm" not in name else parameter.uniform_(0.5, 1.5)
            if name.endswith("gate"):
                parameter.fill_(0.8 if name.startswith("v2v") else -0.6)
    return layer


def make_inputs(width: int, kinds=KINDS, seed: int = 1):
    torch.manual_seed(seed)
    hidden = torch.randn(len(kinds), len(kinds[0]), 32, requires_grad=True)
    tokens = torch.randn(sum(FRAMES) * KEYS_PER_FRAME, width, requires_grad=True)
    return hidden, tokens, torch.tensor(kinds) >= 0, torch.tensor(kinds) != P


def run(config, layer, hidden, tokens, visual, real):
    visuals = VisualInputs(tokens, FRAMES, ROW_VISUALS, ROWS_PER_FRAME)
    memory = prepare_visual_memory(
        *hidden.shape[:2], config=config, visuals=visuals, visual_BS=visual, attention_mask=real.long()
    )
    return layer(hidden, memory.tokens, memory.plan)


def run_naive(config, layer, hidden, tokens, kinds=KINDS):
    frames = tokens.view(-1, KEYS_PER_FRAME, tokens.shape[-1])
    each = frames.split(FRAMES)
    return naive_dual_cross_attention(
        dict(layer.named_parameters()),
        hidden,
        kinds,
        [[each[i] for i in row] for row in ROW_VISUALS],
        head_dim=8,
        rows_per_frame=ROWS_PER_FRAME,
        norm_eps=1e-5,
        gate_mode=config.gate_mode,
        v2v_scope=config.v2v_scope,
        share_kv=config.share_kv,
        frame_rope=config.cross_attention_frame_rope,
    )


SWITCHES = [
    {},
    {"gate_mode": "residual"},
    {"kv_source": "encoder"},
    {"kv_source": "encoder", "share_kv": True},
    {"share_kv": True, "gate_mode": "residual"},
    {"share_kv": True, "use_v2v": False},
    {"v2v_scope": "frame"},
    {"cross_attention_frame_rope": True},
    {"cross_attention_frame_rope": True, "v2v_scope": "frame", "share_kv": True},
    {"use_t2v": False},
    {"use_v2v": False},
    {"use_v2v": False, "gate_mode": "residual", "kv_source": "encoder"},
]


@pytest.mark.parametrize("switches", SWITCHES, ids=lambda x: "-".join(map(str, x.values())) or "default")
def test_values_and_gradients_equal_loops(switches):
    config = make_config(**switches)
    layer = make_layer(config)
    width = 24 if config.kv_source == "encoder" else 32
    results = []
    for function in (run, run_naive):
        hidden, tokens, visual, real = make_inputs(width)
        layer.zero_grad()
        more = (visual, real) if function is run else ()
        out = function(config, layer, hidden, tokens, *more)
        torch.manual_seed(2)
        (out * torch.randn(out.shape)).sum().backward()
        grads = {name: p.grad.clone() for name, p in layer.named_parameters()}
        results.append((out.detach(), hidden.grad, tokens.grad, grads))
    (fast, fast_hidden, fast_tokens, fast_grads), (slow, slow_hidden, slow_tokens, slow_grads) = results
    # float32 sums of up to 32 terms in another order; values are of the order of 1, gradients of 10.
    assert torch.allclose(fast, slow, atol=1e-5)
    assert torch.allclose(fast_hidden, slow_hidden, atol=5e-5)
    assert torch.allclose(fast_tokens, slow_tokens, atol=5e-5)
    for name, grad in slow_grads.items():
        assert torch.allclose(fast_grads[name], grad, atol=2e-4), name
    assert (fast - make_inputs(width)[0]).abs().max() > 0.1


@pytest.mark.parametrize("gate_mode", ["attn", "residual"])
def test_implementations_agree(gate_mode):
    outputs = []
    for implementation in ("sdpa", "eager"):
        config = make_config(implementation, gate_mode=gate_mode)
        outputs.append(run(config, make_layer(config), *make_inputs(32)))
    # float32, softmax in one or in several kernels.
    assert torch.allclose(*outputs, atol=1e-5)


@pytest.mark.parametrize("gate_mode", ["attn", "residual"])
def test_rows_without_keys_are_unchanged(gate_mode):
    config = make_config(gate_mode=gate_mode)
    hidden, tokens, visual, real = make_inputs(32)
    out = run(config, make_layer(config), hidden, tokens, visual, real)
    changed = (out != hidden).any(-1)
    expected = torch.tensor([[k >= 0 for k in row] for row in KINDS])
    for b, row in enumerate(KINDS):
        for s, kind in enumerate(row):
            expected[b, s] |= kind == T and any(k >= 0 for k in row[:s])
    assert torch.equal(changed, expected)


@pytest.mark.parametrize("gate_mode", ["attn", "residual"])
def test_new_layer_changes_nothing(gate_mode):
    config = make_config(gate_mode=gate_mode)
    layer = make_layer(config)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name.endswith("gate"):
                parameter.fill_(0 if gate_mode == "attn" else 1)
            elif name.endswith("o_proj.weight") and gate_mode == "residual":
                parameter.zero_()
    hidden, tokens, visual, real = make_inputs(32)
    assert torch.equal(run(config, layer, hidden, tokens, visual, real), hidden)


def test_residual_gate_is_held_between_minus_one_and_one():
    config = make_config(gate_mode="residual")
    outputs = []
    for value in (1.0, 5.0):
        layer = make_layer(config)
        torch.nn.init.constant_(layer.v2v_gate, value)
        torch.nn.init.constant_(layer.t2v_gate, -value)
        outputs.append(run(config, layer, *make_inputs(32)))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("scope", ["video", "frame"])
@pytest.mark.parametrize("chunk", [1, 2, 3, 1000])
def test_chunks_bound_every_call_and_change_nothing(monkeypatch, chunk, scope):
    import longvideo.modeling.crosslmm.dual_cross_attention as module

    calls, original = [], module.eager_cross_attention

    def record(own, query, key, value, attention_mask, **kwargs):
        # Heads that share a key head come as more queries of it.
        queries = query.shape[:3].numel() // config.text_config.num_attention_heads
        calls.append((queries, key.shape[2], attention_mask))
        return original(own, query, key, value, attention_mask, **kwargs)

    monkeypatch.setattr(module, "eager_cross_attention", record)
    config = make_config("eager", cross_attention_chunk_size=10**6, v2v_scope=scope)
    layer = make_layer(config)
    whole = run(config, layer, *make_inputs(32))
    calls.clear()
    layer.chunk_size = chunk
    out = run(config, layer, *make_inputs(32))
    # float32; matrices of another size may go through another kernel.
    assert torch.allclose(out, whole, atol=1e-6)
    assert max(queries for queries, _, _ in calls) <= chunk
    assert all(mask is None for _, _, mask in calls)


def test_equal_rows_share_a_call():
    """A batch of equal forms takes as many calls as one row."""
    config = make_config(cross_attention_chunk_size=1000)
    visual = torch.tensor([[False] * 2 + [True] * 4 + [False] * 3] * 3)
    visuals = VisualInputs(torch.randn(3 * 2 * 5, 32), [2, 2, 2], [[0], [1], [2]], 2)
    plan = prepare_visual_memory(3, 9, config=config, visuals=visuals, visual_BS=visual).plan
    assert (len(plan.v2v), len(plan.t2v)) == (1, 1)
    assert plan.v2v[0].rows.shape == (3, 4) and plan.t2v[0].rows.shape == (3, 3)


def test_every_row_of_a_plan_is_its_own():
    """No place is written twice, whatever the scope."""
    for scope, kinds in itertools.product(("video", "frame"), (KINDS, KINDS[::-1])):
        config = make_config(v2v_scope=scope)
        visual = torch.tensor(kinds) >= 0
        rows = ROW_VISUALS if kinds is KINDS else ROW_VISUALS[::-1]
        visuals = VisualInputs(torch.randn(sum(FRAMES) * 3, 32), FRAMES, rows, 2)
        plan = prepare_visual_memory(3, 13, config=config, visuals=visuals, visual_BS=visual).plan
        places = torch.cat([group.rows.flatten() for group in plan.v2v + plan.t2v])
        assert len(places.unique()) == len(places)
        visual_places = torch.cat([group.rows.flatten() for group in plan.v2v]).sort().values
        assert torch.equal(visual_places, visual.flatten().nonzero()[:, 0])


@pytest.mark.parametrize(
    ("counts", "segments"),
    [
        ([0, 0], [[(0, 4)], [(4, 4)]]),
        ([2, 2], [[(0, 4)], [(4, 4)]]),
        ([0, 0], [[(4, 4)], [(0, 4)]]),
        ([1, 3], [[(0, 2), (6, 2)], []]),
        ([0, 2], [[(0, 8)], [(0, 8)]]),
        ([2, 0], [[], []]),
    ],
)
def test_keys_are_appended_row_by_row(counts, segments):
    packed = torch.arange(8 * 2 * 3).view(8, 2, 3).float()
    old = torch.randn(2, 2, max(counts), 3)
    new = append_keys(old if max(counts) else None, counts, packed, segments)
    for b, row in enumerate(segments):
        own = [old[b, :, : counts[b]]] + [packed[s : s + n].transpose(0, 1) for s, n in row]
        own = torch.cat(own, dim=1)
        assert torch.equal(new[b, :, : own.shape[1]], own)
        assert not new[b, :, own.shape[1] :].any()


def test_visuals_are_assigned_in_prompt_order():
    video = torch.tensor([[0, 1, 1, 0, 0, 0, 1, 1], [0, 0, 0, 0, 1, 1, 1, 1]]).bool()
    image = torch.tensor([[0, 0, 0, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0, 0]]).bool()
    rows = assign_visuals({"video": video, "image": image}, {"video": [2, 2, 4], "image": [2, 2]})
    assert rows == [[("video", 0), ("image", 0), ("video", 1)], [("image", 1), ("video", 2)]]


def test_placeholders_that_do_not_fit_are_refused():
    video = torch.tensor([[0, 1, 1, 0], [0, 0, 1, 1]]).bool()
    with pytest.raises(ValueError, match="4 video placeholder tokens but the video inputs give 6"):
        assign_visuals({"video": video}, {"video": [2, 4]})
    with pytest.raises(ValueError, match="video 0 lie in 2 rows"):
        assign_visuals({"video": video}, {"video": [4]})
    config, tokens = make_config(), torch.randn(6, 32)
    common = {"config": config, "visual_BS": video}
    with pytest.raises(ValueError, match="2 visual placeholders, but its visuals have 1"):
        visuals = VisualInputs(tokens, [1, 1], [[0], [1]], 1)
        prepare_visual_memory(2, 4, visuals=visuals, **common)
    with pytest.raises(ValueError, match="2 placeholders of the visual inputs are missing"):
        prepare_visual_memory(2, 4, visuals=VisualInputs(tokens, [1, 1], [[0], [1]], 3), **common)
    with pytest.raises(ValueError, match="for 1 rows, but the batch has 2"):
        prepare_visual_memory(2, 4, visuals=VisualInputs(tokens, [1, 1], [[0, 1]], 1), **common)
    with pytest.raises(ValueError, match="6 original tokens do not divide"):
        VisualInputs(tokens, [2, 2], [[0], [1]], 1)
    with pytest.raises(ValueError, match=r"row_visuals names the visuals \[2\]"):
        VisualInputs(tokens, [1, 1], [[0], [2]], 1)
