"""What joins towers and decoder before training: features as long as words, lessons that leave the towers alone."""

import pytest
import torch
from torch import nn

from longvideo.tiny_training.connector import LongVUConnector, calibrate, dino_pixels
from tests.tiny_longvu import tiny_longvu_model


def test_calibrated_features_vary_around_zero_in_all_directions_by_the_asked_length() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(8, 6)
    layer.bias.data.add_(3.0)
    inputs = 20 * torch.randn(4, 50, 8)
    # One direction varies a hundred times as much as the others.
    layer.weight.data[0] *= 100
    before = layer(inputs).flatten(0, 1)
    calibrate(layer, lambda: layer(inputs), length=0.8)
    after = layer(inputs).flatten(0, 1)
    # Float32 sums over 200 rows.
    assert after.mean(0).abs().max() < 1e-4
    assert after.norm(dim=1).pow(2).mean().sqrt().item() == pytest.approx(0.8, rel=1e-4)

    def spread(features: torch.Tensor) -> float:
        variances = torch.linalg.eigvalsh(torch.cov(features.T))
        return (variances.max() / variances.median()).item()

    assert spread(before) > 1000 and spread(after) < spread(before) / 30
    # Nothing is lost: the old features are a linear function of the new ones.
    design = torch.cat([after, torch.ones(len(after), 1)], 1).double()
    fit = design @ torch.linalg.lstsq(design, before.double()).solution
    torch.testing.assert_close(fit, before.double(), atol=1e-3, rtol=1e-3)
    # The hook is gone.
    assert not layer._forward_hooks


def test_connector_lessons_train_the_models_own_parts_and_no_tower() -> None:
    model = tiny_longvu_model()
    connector = LongVUConnector(model)
    size, config = connector.config.image_size, connector.config
    clips = torch.randn(2, 3, 3, size, size)
    features = connector.encode(clips)
    cells = (config.image_size // config.patch_size) ** 2
    assert features.shape == (2, 3 * cells, model.config.text_config.hidden_size)
    features.sum().backward()
    inner = model.model
    assert inner.vision_query.grad is not None and inner.multi_modal_projector.linear_2.weight.grad is not None
    towers = [*inner.vision_tower.parameters(), *inner.dino_tower.parameters()]
    assert all(parameter.grad is None for parameter in towers)
    own = {id(parameter) for parameter in connector.parameters()}
    assert id(inner.vision_query) in own and own.isdisjoint(id(parameter) for parameter in towers)


def test_pixels_are_normalised_for_the_second_tower() -> None:
    grey = torch.full((1, 3, 2, 2), 0.4)
    expected = (grey - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(
        3, 1, 1
    )
    # Two roundings of float32.
    torch.testing.assert_close(dino_pixels((grey - 0.5) / 0.5), expected, atol=1e-6, rtol=1e-6)
