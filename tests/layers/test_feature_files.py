"""Hashes of weights: every one counts, wherever and in whatever type it is stored."""

import importlib

import pytest
import torch
from torch import nn

from longvideo.modeling.layers.feature_files import PIECE, fingerprint, hash_weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_any_single_value_changes_the_fingerprint(dtype):
    values = torch.randn(7).to(dtype)
    prints = {tuple(fingerprint(values))}
    for i in range(7):
        other = values.clone()
        other[i] = ~other[i] if dtype == torch.bool else other[i] + 1
        prints.add(tuple(fingerprint(other)))
    assert len(prints) == 8


def test_fingerprint_is_that_of_the_equation():
    words = torch.randint(-(2**31), 2**31, (PIECE + 3,), dtype=torch.int32)

    def factor(place: int) -> int:
        product = place * -7046029254386353131
        signed = (product + 2**63) % 2**64 - 2**63
        return ((signed ^ (signed >> 29)) * -4658895280553007687) | 1

    for start, found in zip((0, PIECE), fingerprint(words), strict=True):
        piece = words[start : start + PIECE].tolist()
        wanted = sum(word * factor(place) for place, word in enumerate(piece, 1))
        assert (wanted - found) % 2**64 == 0


def test_values_that_change_places_change_the_fingerprint():
    values = torch.randn(3, 5)
    assert fingerprint(values) != fingerprint(values.flip(0))
    assert fingerprint(values) == fingerprint(values.t().contiguous().t())
    assert fingerprint(torch.arange(9)[1:]) == fingerprint(torch.arange(1, 9))  # not aligned in memory


def test_buffers_settings_adapters_and_order_count():
    class Layer(nn.Linear):
        disable_adapters, active_adapters, scaling = False, ("default",), {"default": 2.0}

    first, second = nn.Linear(3, 3), nn.BatchNorm1d(3)
    base = hash_weights("a", first, second, None)
    assert base == hash_weights("a", first, second)
    keys = {base, hash_weights("b", first, second), hash_weights("a", second, first)}
    second.running_mean[1] = 1.0
    keys.add(hash_weights("a", first, second))
    keys.add(hash_weights("a", *first.parameters(), second.running_mean))
    assert len(keys) == 5
    layer = Layer(3, 3)
    key = hash_weights("a", layer)
    layer.scaling = {"default": 4.0}
    scaled = hash_weights("a", layer)
    layer.disable_adapters = True
    assert len({key, scaled, hash_weights("a", layer)}) == 3


def test_offloaded_weights_count_by_their_shape():
    layer = nn.Linear(3, 3)
    here = hash_weights("", layer)
    layer.weight = nn.Parameter(layer.weight.detach().to("meta"))
    away = hash_weights("", layer)
    assert away == hash_weights("", layer) and away != here


def test_lora_counts_when_it_is_on():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = peft.get_peft_model(nn.Sequential(nn.Linear(4, 4)), peft.LoraConfig(target_modules=["0"]))
    before = hash_weights("", model)
    with torch.no_grad():
        model.base_model.model[0].lora_B["default"].weight += 1.0
    after = hash_weights("", model)
    with model.disable_adapter():
        off = hash_weights("", model)
    assert len({before, after, off}) == 3


@torch.no_grad()
@pytest.mark.parametrize("name", ["videochat_flash", "longvu", "llava_st", "crosslmm", "crossvllm"])
def test_weights_deep_in_a_tower_are_in_the_encoding_key(name):
    maker = importlib.import_module("tests.tiny" if name == "videochat_flash" else f"tests.tiny_{name}")
    model = getattr(maker, f"tiny_{name}_model")()
    keys = {model.encoding_key()}
    weights = [x for part, x in model.named_parameters() if "tower" in part][::-6]
    for weight in weights:
        weight.view(-1)[-1] += 1e-2
        keys.add(model.encoding_key())
    assert len(keys) == len(weights) + 1
    model.lm_head.weight[10, 0] += 1.0
    assert model.encoding_key() in keys
