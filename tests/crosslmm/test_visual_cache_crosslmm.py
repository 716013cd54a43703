"""Visual keys in the decoder's cache: decoding, chunks of a prefill, beams, cropping, later turns."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from longvideo.modeling.crosslmm.decoder_patch import patch_decoder
from longvideo.modeling.crosslmm.visibility import VisualInputs
from longvideo.modeling.crosslmm.visual_cache import (
    VisualLedgerLayer,
    find_ledger,
    keys_layers,
    knows_visuals,
    prepare_visual_memory,
)
from tests.tiny_crosslmm import open_gates, tiny_crosslmm_config

# Two rows, left-padded; a video broken by a text token, two visuals in one row, a row with text before its video.
IDS = torch.tensor([[0, 0, 7, 4, 4, 4, 4, 9, 4, 4, 12, 10, 11, 5], [5, 4, 4, 6, 4, 4, 12, 13, 14, 15, 16, 17, 18, 19]])
MASK = (IDS != 0).long()
FRAMES, ROWS = [3, 1, 1], [[0], [1, 2]]


def make_patched(**kwargs):
    """A tiny decoder with head, patched, its gates open."""
    config = tiny_crosslmm_config(**kwargs)
    config.initializer_range = config.text_config.initializer_range = 0.2
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config.text_config).eval()
    patch_decoder(model.model, config)
    open_gates(model)
    return model, config


def visual_inputs(frames=FRAMES, rows=ROWS, seed=3) -> VisualInputs:
    torch.manual_seed(seed)
    return VisualInputs(torch.randn(sum(frames) * 3, 32), frames, rows, 2)


@torch.no_grad()
def step(model, config, cache, ids, visuals=None, mask=None):
    """One forward pass; placeholders are marked only where visuals may be."""
    visual = ids == 4
    memory = prepare_visual_memory(
        *ids.shape,
        config=config,
        visuals=visuals,
        visual_BS=visual if visuals is not None or visual.any() else None,
        attention_mask=mask,
        cache=cache,
    )
    out = model(ids, attention_mask=mask, past_key_values=cache, visual_memory=memory, use_cache=cache is not None)
    return out.logits


def run_chunks(model, config, sizes, *, ids=IDS, visuals=None, again=True, cache=None):
    visuals = visuals or visual_inputs()
    cache = DynamicCache(config=model.config) if cache is None else cache
    outputs, start = [], 0
    for i, size in enumerate(sizes):
        part = ids[:, start : start + size]
        given = visuals if i == 0 or (again and (part == 4).any()) else None
        outputs.append(step(model, config, cache, part, given, MASK[:, : start + size]))
        start += size
    return torch.cat(outputs, dim=1), cache


def whole(model, config, ids=IDS, visuals=None, mask=MASK):
    return step(model, config, None, ids, visuals or visual_inputs(), mask)


SWITCHES = [
    {},
    {"share_kv": True},
    {"v2v_scope": "frame"},
    {"use_t2v": False},
    {"use_v2v": False},
    {"gate_mode": "residual", "cross_attention_frame_rope": True, "v2v_scope": "frame"},
]


@pytest.mark.parametrize("switches", SWITCHES, ids=lambda x: "-".join(map(str, x)) or "default")
@pytest.mark.parametrize("sizes", [[14], [10, 1, 1, 1, 1], [2, 3, 1, 3, 1, 4], [4] + [1] * 10])
def test_chunks_equal_the_whole(sizes, switches):
    model, config = make_patched(**switches)
    expected = whole(model, config)
    out, cache = run_chunks(model, config, sizes)
    # float32, logits of the order of 5; other shapes, other kernels.
    assert torch.allclose(out[MASK.bool()], expected[MASK.bool()], atol=3e-5)
    assert cache.get_seq_length() == 14
    ledger = find_ledger(cache)
    assert all(visual.seen == visual.num_rows for row in ledger.rows for visual in row)
    t2v, v2v = keys_layers(cache, 1)
    assert not v2v.is_initialized, "keys of finished videos are not needed any more"
    if config.use_t2v:
        assert t2v.keys.shape == (2, 2, 9, 8)


def test_memory_given_once_lasts_for_all_chunks():
    model, config = make_patched()
    out, _ = run_chunks(model, config, [3, 2, 4, 5], again=False)
    # float32, as above.
    assert torch.allclose(out[MASK.bool()], whole(model, config)[MASK.bool()], atol=3e-5)


@pytest.mark.parametrize("gate_mode", ["attn", "residual"])
def test_every_row_equals_its_own_run(gate_mode):
    """Rows of unequal numbers of keys and of none, decoded step by step."""
    model, config = make_patched(gate_mode=gate_mode)
    ids = torch.cat([IDS, torch.tensor([[0] * 6 + [5, 6, 7, 8, 9, 10, 11, 12]])])
    mask = (ids != 0).long()
    joint = visual_inputs(rows=[*ROWS, []])
    cache = DynamicCache(config=model.config)
    batch = [step(model, config, cache, ids[:, :10], joint, mask[:, :10])[:, -1:]]
    batch += [step(model, config, cache, ids[:, i : i + 1], None, mask[:, : i + 1]) for i in range(10, 14)]
    for b, (row, start) in enumerate(((ROWS[0], 2), (ROWS[1], 0), ([], 6))):
        alone = VisualInputs(joint.tokens, FRAMES, [row], 2)
        memory = alone if row else None
        out = step(model, config, None, ids[b : b + 1, start:], memory)
        # float32, as above.
        assert torch.allclose(torch.cat(batch, 1)[b], out[0, 9 - start :], atol=3e-5)


def test_several_new_tokens_at_once_in_unequal_rows():
    model, config = make_patched()
    out, _ = run_chunks(model, config, [10, 4])
    # float32, as above.
    assert torch.allclose(out[:, 10:], whole(model, config)[:, 10:], atol=3e-5)


def test_crop_takes_text_only():
    model, config = make_patched()
    expected, cache = run_chunks(model, config, [10, 1, 1, 1, 1])
    cache.crop(-3)
    assert cache.get_seq_length() == 11
    again = step(model, config, cache, IDS[:, 11:], None, MASK)
    # float32, as above.
    assert torch.allclose(again, expected[:, 11:], atol=3e-5)
    with pytest.raises(ValueError, match="Cropping 5 positions would cut into a video: only 4"):
        cache.crop(-5)


def test_rows_follow_beams():
    model, config = make_patched()
    expected, _ = run_chunks(model, config, [13, 1])
    _, short = run_chunks(model, config, [13])
    before = keys_layers(short, 0)[0].keys
    short.batch_repeat_interleave(2)
    repeated = keys_layers(short, 0)[0].keys
    assert repeated.shape[0] == 4 and torch.equal(repeated[1], before[0])
    # Among beams of one prompt nothing moves, and nothing is copied.
    short.reorder_cache(torch.tensor([1, 1, 3, 2]))
    assert keys_layers(short, 0)[0].keys is repeated
    short.reorder_cache(torch.tensor([2, 3, 0, 1]))
    assert torch.equal(keys_layers(short, 0)[0].keys[0], before[1])
    short.batch_select_indices(torch.tensor([2, 0]))
    out = step(model, config, short, IDS[:, 13:], None, MASK)
    # float32, as above.
    assert torch.allclose(out, expected[:, 13:], atol=3e-5)
    short.batch_select_indices(torch.tensor([False, True]))
    assert len(find_ledger(short).rows) == 1 and keys_layers(short, 0)[0].keys.shape[0] == 1
    with pytest.raises(ValueError, match="visuals of 1 rows, but the batch has 2"):
        prepare_visual_memory(2, 1, config=config, cache=short)


def test_beams_may_share_their_visuals():
    """Rows that name the same visual get its keys without a second projection of it."""
    model, config = make_patched()
    ids, mask = IDS[:1].repeat(3, 1), MASK[:1].repeat(3, 1)
    shared = visual_inputs(rows=[[0], [0], [0]])
    alone = visual_inputs(rows=[[0]])
    out = step(model, config, DynamicCache(config=model.config), ids, shared, mask)[:, 2:]
    expected = whole(model, config, IDS[:1], alone, MASK[:1])[:, 2:]
    # float32, as above.
    assert torch.allclose(out, expected.expand_as(out), atol=3e-5)


def test_reset_and_copy():
    model, config = make_patched()
    expected, cache = run_chunks(model, config, [10, 4])
    twin = copy.deepcopy(cache)
    assert find_ledger(twin) is not find_ledger(cache) and keys_layers(twin, 0)[0].ledger is find_ledger(twin)
    cache.reset()
    assert not find_ledger(cache).rows and not keys_layers(cache, 0)[0].is_initialized
    assert prepare_visual_memory(2, 1, config=config, cache=cache) is None
    if cache.get_seq_length():
        # Old releases set the decoder's own keys to zero and keep their number.
        cache = DynamicCache(config=model.config)
    again, _ = run_chunks(model, config, [10, 4], cache=cache)
    assert torch.equal(again, expected)
    assert torch.equal(keys_layers(twin, 0)[0].keys, keys_layers(cache, 0)[0].keys)


def test_a_later_turn_brings_another_video():
    model, config = make_patched()
    turn = torch.tensor([[21, 4, 4, 22, 23], [24, 25, 26, 27, 28]])
    first, second = visual_inputs(), visual_inputs([1], [[0], []], seed=9)
    cache = DynamicCache(config=model.config)
    step(model, config, cache, IDS, first, MASK)
    step(model, config, cache, IDS[:, :1] * 0 + 20, None, torch.cat([MASK, MASK[:, -1:]], 1))
    assert knows_visuals(cache, first) and not knows_visuals(cache, second)
    mask = torch.cat([MASK, torch.ones(2, 6).long()], 1)
    out = [step(model, config, cache, turn[:, :2], second, mask[:, :-3])]
    out.append(step(model, config, cache, turn[:, 2:4], second, mask[:, :-1]))
    out.append(step(model, config, cache, turn[:, 4:], None, mask))
    ids = torch.cat([IDS, IDS[:, :1] * 0 + 20, turn], 1)
    joint = VisualInputs(torch.cat([first.tokens, second.tokens]), [*FRAMES, 1], [[0, 3], [1, 2]], 2)
    expected = whole(model, config, ids, joint, mask)[:, -5:]
    # float32, as above.
    assert torch.allclose(torch.cat(out, 1), expected, atol=3e-5)


def test_first_turn_may_be_text():
    model, config = make_patched()
    cache = DynamicCache(config=model.config)
    text = torch.tensor([[30, 31], [32, 33]])
    step(model, config, cache, text)
    assert find_ledger(cache) is None
    mask = torch.cat([torch.ones_like(text), MASK], 1)
    out = step(model, config, cache, IDS, visual_inputs(), mask)
    expected = whole(model, config, torch.cat([text, IDS], 1), None, mask)[:, 2:]
    # float32, as above.
    assert torch.allclose(out[MASK.bool()], expected[MASK.bool()], atol=3e-5)


def test_lazy_cache_is_filled_up_first():
    """A cache without a configuration grows layer by layer; visual layers come behind all of them."""
    model, config = make_patched()
    cache = DynamicCache()
    out, _ = run_chunks(model, config, [10, 4], cache=cache)
    assert isinstance(cache.layers[4], VisualLedgerLayer) and len(cache.layers) == 4 + 1 + 2 * 2
    assert torch.allclose(out, run_chunks(model, config, [10, 4])[0], atol=1e-6)  # float32, the same kernels


def test_offloaded_layers_come_back():
    model, config = make_patched()
    expected, _ = run_chunks(model, config, [10, 1, 3])
    _, cache = run_chunks(model, config, [10, 1])
    for layer in cache.layers[4:]:
        layer.offload()
    find_ledger(cache).prefetch()
    assert torch.equal(step(model, config, cache, IDS[:, 11:], None, MASK), expected[:, 11:])


def _flash(q, k, v, softmax_scale=None, causal=False):
    """Flash attention's contract on a CPU: (B, S, heads, C), a causal mask that ends at the last key."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    rows, keys = q.shape[2], k.shape[2]
    mask = torch.arange(keys) <= torch.arange(rows)[:, None] + keys - rows if causal else None
    scale = softmax_scale
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
    return out.transpose(1, 2)


def _flash_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None, causal=False):
    parts = []
    for i in range(len(cu_seqlens_q) - 1):
        rows, keys = slice(*cu_seqlens_q[i : i + 2].tolist()), slice(*cu_seqlens_k[i : i + 2].tolist())
        parts.append(_flash(q[None, rows], k[None, keys], v[None, keys], softmax_scale, causal)[0])
    return torch.cat(parts)


def test_flash_attention_path_gives_the_same(monkeypatch):
    """All of transformers' flash path but the kernel: other layers bear the memory, masks have the right form."""
    from transformers import modeling_flash_attention_utils as flash

    for name in dir(flash):
        if name.startswith("_") and name.endswith(("_fn", "_loaded_implementation")):
            monkeypatch.setattr(flash, name, None)
    parts = (_flash, _flash_varlen, None, flash._pad_input, flash._unpad_input)
    monkeypatch.setattr(flash, "_lazy_imports", lambda *args, **kwargs: parts)
    model, config = make_patched()
    expected, _ = run_chunks(model, config, [9, 1, 1, 3])
    model.config._attn_implementation = "flash_attention_2"
    out, _ = run_chunks(model, config, [9, 1, 1, 3])
    # float32, as above.
    assert torch.allclose(out[MASK.bool()], expected[MASK.bool()], atol=3e-5)


def test_caches_that_do_not_fit_are_refused():
    model, config = make_patched()
    static = StaticCache(config=model.config, max_cache_len=32)
    with pytest.raises(ValueError, match="cannot keep visual keys in a StaticCache"):
        step(model, config, static, IDS, visual_inputs(), MASK)
    memory = prepare_visual_memory(2, 14, config=config, visuals=visual_inputs(), visual_BS=IDS == 4)
    with pytest.raises(ValueError, match="not the one that prepare_visual_memory was given"):
        model(IDS, visual_memory=memory, use_cache=True)
    _, cache = run_chunks(model, config, [13])
    memory = prepare_visual_memory(2, 1, config=config, cache=cache)
    with pytest.raises(ValueError, match="Visual keys lie in a cache that the decoder was not given"):
        model(IDS[:, 13:], visual_memory=memory, use_cache=False)
    with pytest.raises(ValueError, match="written by cross-attention layers only"):
        cache.layers[4].update(None, None)


def test_text_needs_no_memory():
    _, config = make_patched()
    cache = DynamicCache(config=config.text_config)
    assert prepare_visual_memory(2, 5, config=config, cache=cache) is None
    assert len(cache.layers) == 4
    config.cross_attention_layers = []
    assert prepare_visual_memory(2, 14, config=config, visuals=visual_inputs(), visual_BS=IDS == 4) is None
