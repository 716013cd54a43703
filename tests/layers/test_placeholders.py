"""Scattering features over placeholder tokens."""

import pytest
import torch

from longvideo.modeling.layers.placeholders import find_placeholders, scatter_features


def test_features_land_in_order():
    ids = torch.tensor([[1, 9, 9, 2], [9, 3, 4, 9]])
    mask = find_placeholders(9, input_ids=ids)
    features = torch.arange(1.0, 9).view(4, 2)
    out = scatter_features(torch.zeros(2, 4, 2), mask, features, kind="video")
    assert torch.equal(out[mask], features)
    assert not out[~mask].any()


def test_placeholders_are_found_in_embeddings():
    embedding = torch.nn.Embedding(10, 6)
    ids = torch.tensor([[1, 9, 9, 2]])
    found = find_placeholders(9, inputs_embeds=embedding(ids), embedding=embedding)
    assert found.tolist() == [[False, True, True, False]]
    beyond = find_placeholders(10, inputs_embeds=embedding(ids), embedding=embedding)
    assert not beyond.any()


@pytest.mark.parametrize("num_features", [1, 3])
def test_mismatch_names_both_numbers(num_features):
    mask = torch.tensor([[True, True, False]])
    with pytest.raises(ValueError, match=rf"2 image placeholder tokens .* {num_features} features"):
        scatter_features(torch.zeros(1, 3, 4), mask, torch.zeros(num_features, 4), kind="image")
