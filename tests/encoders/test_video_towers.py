"""The two video towers: position tables, input checks, loading, attention implementations, recorded states."""

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModel

from longvideo.modeling.encoders.internvideo2.configuration_internvideo2 import InternVideo2VisionConfig
from longvideo.modeling.encoders.internvideo2.modeling_internvideo2 import (
    InternVideo2VisionModel,
    internvideo2_position_table,
)
from longvideo.modeling.encoders.umt.configuration_umt import UMTVisionConfig
from longvideo.modeling.encoders.umt.modeling_umt import UMTVisionModel, umt_position_table

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
TOWERS = [(UMTVisionModel, UMTVisionConfig), (InternVideo2VisionModel, InternVideo2VisionConfig)]


def build(model_class, config_class, **kwargs):
    return model_class(config_class(**{**SIZES, "image_size": 32, "patch_size": 8, **kwargs})).eval()


@pytest.mark.parametrize("image_size", [224, 112])
def test_umt_table_of_the_base_grid_is_the_formula(image_size):
    config = UMTVisionConfig(hidden_size=8, num_attention_heads=2, image_size=image_size, patch_size=image_size // 14)
    table = umt_position_table(config, 4)
    assert table.shape == (784, 8)
    for position in (0, 1, 195, 196, 783):
        for channel in range(8):
            angle = position / 10000 ** (2 * (channel // 2) / 8)
            expected = np.sin(angle) if channel % 2 == 0 else np.cos(angle)
            # The table is float64 rounded once to float32.
            assert abs(table[position, channel].item() - expected) < 1e-6
    assert torch.equal(umt_position_table(config, 1), table[:196])


def test_umt_table_of_other_grids_and_lengths():
    config = UMTVisionConfig(hidden_size=8, num_attention_heads=2, image_size=448)
    enlarged = umt_position_table(config, 4)
    base = umt_position_table(UMTVisionConfig(hidden_size=8, num_attention_heads=2), 4)
    assert enlarged.shape == (4 * 784, 8)
    plane = base.view(4, 14, 14, 8)[2].permute(2, 0, 1)[None]
    expected = torch.nn.functional.interpolate(plane, size=(28, 28), mode="bicubic", align_corners=False)
    torch.testing.assert_close(enlarged.view(4, 28, 28, 8)[2], expected[0].permute(1, 2, 0), atol=1e-6, rtol=0)
    longer = umt_position_table(UMTVisionConfig(hidden_size=8, num_attention_heads=2, num_frames=8), 8)
    halves = longer.view(8, 196, 8)
    # Doubling by linear interpolation puts frames at -0.25, 0.25, 0.75, ... of the old ones, clamped at the ends.
    old = base.view(4, 196, 8)
    torch.testing.assert_close(halves[1], 0.75 * old[0] + 0.25 * old[1], atol=1e-6, rtol=0)
    torch.testing.assert_close(halves[0], old[0], atol=1e-6, rtol=0)


def test_internvideo2_table_gives_a_quarter_to_time():
    table = internvideo2_position_table(48, 3, 2)[0]
    assert table.shape == (1 + 18, 48)
    assert not table[0].any()
    patches = table[1:].view(2, 3, 3, 48)
    assert torch.equal(patches[:, 0, 0, :12], patches[:, 2, 1, :12])  # time channels do not see the place
    assert torch.equal(patches[0, :, 1, 12:30], patches[1, [0, 0, 0], 1, 12:30])  # column channels see only the column
    assert torch.equal(patches[0, 1, :, 30:], patches[1, 1, [2, 2, 2], 30:])  # row channels see only the row
    assert not torch.equal(patches[0, 0, 1], patches[0, 1, 0])


@pytest.mark.parametrize(("model_class", "config_class"), TOWERS)
def test_shapes_of_clips_and_images(model_class, config_class):
    model = build(model_class, config_class)
    assert model(torch.randn(3, 4, 3, 32, 32)).last_hidden_state.shape == (3, 64, 32)
    assert model(torch.randn(2, 1, 3, 32, 32)).last_hidden_state.shape == (2, 16, 32)


@pytest.mark.parametrize(("model_class", "config_class"), TOWERS)
def test_frames_of_a_clip_see_each_other_and_clips_do_not(model_class, config_class):
    model = (
        build(model_class, config_class, layer_scale_init_value=1.0)
        if model_class is not UMTVisionModel
        else build(model_class, config_class)
    )
    clips = torch.randn(2, 4, 3, 32, 32)
    before = model(clips).last_hidden_state
    clips[0, 3] += 1
    after = model(clips).last_hidden_state
    assert not torch.allclose(before[0, :16], after[0, :16])
    assert torch.equal(before[1], after[1])


@pytest.mark.parametrize(("model_class", "config_class"), TOWERS)
def test_wrong_clips_are_refused(model_class, config_class):
    model = build(model_class, config_class)
    with pytest.raises(ValueError, match=r"clips of 3 frames and takes clips of 4 frames"):
        model(torch.randn(1, 3, 3, 32, 32))
    with pytest.raises(ValueError, match=r"\(1, 4, 3, 40, 32\) and expects \(clips, frames, 3, 32, 32\)"):
        model(torch.randn(1, 4, 3, 40, 32))


@pytest.mark.parametrize(("model_class", "config_class"), TOWERS)
def test_loading_restores_everything_and_auto_classes_know_the_tower(model_class, config_class, tmp_path):
    model = build(model_class, config_class)
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert type(loaded) is model_class
    assert type(AutoConfig.from_pretrained(tmp_path)) is config_class
    clips = torch.randn(1, 4, 3, 32, 32)
    assert torch.equal(model(clips).last_hidden_state, loaded(clips).last_hidden_state)
    images = torch.randn(1, 1, 3, 32, 32)
    assert torch.equal(model(images).last_hidden_state, loaded(images).last_hidden_state)


@pytest.mark.parametrize(("model_class", "config_class"), TOWERS)
def test_eager_equals_sdpa_and_states_are_recorded(model_class, config_class):
    model = build(model_class, config_class)
    clips = torch.randn(1, 4, 3, 32, 32)
    sdpa = model(clips).last_hidden_state
    model.set_attn_implementation("eager")
    eager = model(clips, output_hidden_states=True, output_attentions=True)
    # Two orders of summation in fp32.
    torch.testing.assert_close(sdpa, eager.last_hidden_state, atol=1e-5, rtol=1e-5)
    assert len(eager.hidden_states) == 3
    assert len(eager.attentions) == 2
    torch.testing.assert_close(eager.attentions[0].sum(-1), torch.ones(1, 2, eager.attentions[0].shape[-1]))


def test_sizes_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="image_size 225 is not a multiple of patch_size 16"):
        UMTVisionConfig(image_size=225)
    with pytest.raises(ValueError, match="hidden_size 1024 is not a multiple of num_attention_heads 3"):
        InternVideo2VisionConfig(hidden_size=1024, num_attention_heads=3)
