"""Scattering features over placeholder tokens, and inserting them at single placeholders."""

import pytest
import torch

from longvideo.modeling.layers.placeholders import find_placeholders, insert_features, scatter_features


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


def naive_insert(ids, features, attention, labels, side):
    """Rows as lists of (embedding, label), token by token."""
    remaining, rows = list(features), []
    for row_ids, row_mask, row_labels in zip(ids, attention, labels, strict=True):
        row = []
        for token, real, label in zip(row_ids.tolist(), row_mask.tolist(), row_labels.tolist(), strict=True):
            if token == 9:
                row += [(value, -100) for value in remaining.pop(0)[:, 0].tolist()]
            elif real:
                row.append((float(token), label))
        rows.append(row)
    longest = max(map(len, rows))
    for row in rows:
        pad = [(0.0, -100)] * (longest - len(row))
        row[:] = pad + row if side == "left" else row + pad
    return rows


@pytest.mark.parametrize("side", ["left", "right"])
def test_inserting_equals_a_loop_over_tokens(side):
    ids = torch.tensor([[0, 0, 1, 9, 2, 9], [9, 3, 4, 5, 6, 7], [0, 0, 0, 0, 8, 8], [0, 9, 1, 0, 9, 2]])
    attention = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6, [0, 0, 0, 0, 1, 1], [0, 0, 1, 0, 1, 1]])
    labels = torch.arange(24).view(4, 6)
    features = [torch.full((n, 1), 100.0 + i) for i, n in enumerate((3, 1, 5, 0, 2))]
    out = insert_features(
        ids[..., None].float(), ids == 9, features, attention_mask=attention, labels=labels, padding_side=side
    )
    rows = naive_insert(ids, features, attention, labels, side)
    assert out.inputs_embeds[..., 0].tolist() == [[value for value, _ in row] for row in rows]
    assert out.labels.tolist() == [[label for _, label in row] for row in rows]
    assert out.attention_mask.sum(1).tolist() == [6, 10, 2, 4]
    for mask, positions in zip(out.attention_mask.bool(), out.position_ids, strict=True):
        assert positions[mask].tolist() == list(range(int(mask.sum())))
        assert not positions[~mask].any()
    edge = out.attention_mask[2, 0 if side == "right" else -1]
    assert edge == 1


def test_inserting_without_a_mask_keeps_everything_and_passes_gradients():
    ids = torch.tensor([[1, 9, 2]])
    features = torch.ones(4, 2, requires_grad=True)
    text = torch.zeros(1, 3, 2, requires_grad=True)
    out = insert_features(text, ids == 9, [features])
    assert out.source.tolist() == [[0, -1, -1, -1, -1, 2]]
    assert out.labels is None
    out.inputs_embeds.sum().backward()
    assert features.grad.eq(1).all()
    assert text.grad[0, :, 0].tolist() == [1, 0, 1]


def test_inserting_cuts_from_the_end():
    ids = torch.tensor([[1, 9, 2], [0, 0, 3]])
    mask = torch.tensor([[1, 1, 1], [0, 0, 1]])
    out = insert_features(
        ids[..., None].float(), ids == 9, [torch.full((3, 1), 5.0)], attention_mask=mask, max_length=3
    )
    assert out.inputs_embeds[..., 0].tolist() == [[1, 5, 5], [0, 0, 3]]


@pytest.mark.parametrize("num_entries", [0, 2])
def test_features_left_over_or_missing_are_refused(num_entries):
    ids = torch.tensor([[1, 9, 2]])
    with pytest.raises(ValueError, match=rf"hold 1 visual placeholders .* features of {num_entries} images"):
        insert_features(torch.zeros(1, 3, 2), ids == 9, [torch.zeros(4, 2)] * num_entries)


def test_an_unknown_padding_side_is_refused():
    with pytest.raises(ValueError, match="padding_side is 'both'"):
        insert_features(torch.zeros(1, 1, 2), torch.tensor([[True]]), [torch.zeros(1, 2)], padding_side="both")
