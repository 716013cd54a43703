"""CrossLMM's vision half: configuration, feature layer, token merge, projector, chunks, padding."""

import pytest
import torch
from torch import nn
from transformers import SiglipVisionConfig, SiglipVisionModel

from longvideo.modeling.crosslmm.configuration_crosslmm import CrossLMMConfig
from longvideo.modeling.crosslmm.encoded_video_crosslmm import CrossLMMEncodedVideo
from longvideo.modeling.crosslmm.vision_crosslmm import (
    CrossLMMProjector,
    CrossLMMVisionMixin,
    build_tower,
    merge_grid,
    trim_tower,
)
from tests.tiny_crosslmm import tiny_crosslmm_config

# Two sums of the same float32 numbers in another order.
SAME = {"rtol": 1e-5, "atol": 1e-5}


class VisionHalf(CrossLMMVisionMixin, nn.Module):
    """Tower and projector alone, as the model has them."""

    def __init__(self, seed: int = 0, **kwargs):
        super().__init__()
        torch.manual_seed(seed)
        self.config = tiny_crosslmm_config(**kwargs)
        self.vision_tower = build_tower(self.config)
        self.multi_modal_projector = CrossLMMProjector(self.config)
        self.eval()


def loop_merge(tokens_FNE: torch.Tensor, side: int) -> torch.Tensor:
    """Means of regions, cell by cell; region i of G goes from floor(i G / side) to ceil((i + 1) G / side)."""
    grid = int(tokens_FNE.shape[1] ** 0.5)
    cells = []
    for row in range(side):
        for column in range(side):
            rows = range(row * grid // side, -(-(row + 1) * grid // side))
            columns = range(column * grid // side, -(-(column + 1) * grid // side))
            picked = [tokens_FNE[:, y * grid + x] for y in rows for x in columns]
            cells.append(torch.stack(picked).mean(0))
    return torch.stack(cells, dim=1)


# ---------------------------------------------------------------------- configuration


def test_defaults_are_the_2b_model():
    config = CrossLMMConfig()
    assert config.cross_attention_layers == [0, 4, 8, 12, 16, 20, 24]
    assert (config.grid_size, config.merged_grid_size, config.num_vision_layers) == (27, 3, 26)
    assert config.tie_word_embeddings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokens_per_frame": 5}, "tokens_per_frame is 5; it must be the square of a side from 1 to 4"),
        ({"tokens_per_frame": 25}, "the tower gives 4 x 4 tokens per frame"),
        ({"tokens_per_frame": 0}, "tokens_per_frame must be at least 1, got 0"),
        ({"cross_attention_interval": 5}, "cross_attention_interval is 5, but the decoder has 4 layers"),
        ({"cross_attention_layers": [0, 4]}, "list layers from 0 to 3"),
        ({"cross_attention_layers": [2, 0]}, "rising order"),
        ({"use_v2v": False, "use_t2v": False, "cross_attention_layers": [0]}, "both False"),
        ({"vision_feature_layer": 0}, "no output of a tower with 3 layers"),
        ({"vision_feature_layer": -4}, "choose 1 to 3, or -3 to -1"),
        ({"gate_mode": "tanh"}, "gate_mode is 'tanh'; choose one of"),
        ({"init_from_self_attn": True, "kv_source": "encoder"}, 'needs kv_source="projected"'),
        ({"vision_config": {"model_type": "siglip2_vision_model"}}, "takes 'siglip_vision_model'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        tiny_crosslmm_config(**settings)


def test_layers_follow_from_the_interval_and_can_be_overridden_on_loading(tmp_path):
    assert tiny_crosslmm_config(cross_attention_interval=None).cross_attention_layers == []
    assert tiny_crosslmm_config(use_v2v=False, use_t2v=False).cross_attention_layers == []
    tiny_crosslmm_config().save_pretrained(tmp_path / "derived")
    assert CrossLMMConfig.from_pretrained(tmp_path / "derived").cross_attention_layers == [0, 2]
    loaded = CrossLMMConfig.from_pretrained(tmp_path / "derived", cross_attention_interval=1)
    assert loaded.cross_attention_layers == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="cross_attention_interval is 5"):
        CrossLMMConfig.from_pretrained(tmp_path / "derived", cross_attention_interval=5)
    tiny_crosslmm_config(cross_attention_layers=[1, 3]).save_pretrained(tmp_path / "listed")
    assert CrossLMMConfig.from_pretrained(tmp_path / "listed").cross_attention_layers == [1, 3]


# ---------------------------------------------------------------------- tower


@pytest.mark.parametrize("layer", [-1, -2, 1])
def test_features_are_the_hidden_states_of_the_feature_layer(layer):
    half = VisionHalf(vision_feature_layer=layer)
    whole = SiglipVisionModel(SiglipVisionConfig(**half.config.vision_config.to_dict())).eval()
    frames = torch.rand(2, 3, 32, 32)
    hidden_states = whole(frames, output_hidden_states=True).hidden_states
    tower = trim_tower(whole, half.config)
    half.vision_tower = tower
    features = half.get_image_features(frames, output_tower_features=True).last_hidden_state
    torch.testing.assert_close(features, hidden_states[layer], **SAME)
    assert len(tower.encoder.layers) == half.config.num_vision_layers


def test_unused_weights_of_the_tower_are_not_built():
    names = [name for name, _ in VisionHalf().vision_tower.named_parameters()]
    assert not [name for name in names if "post_layernorm" in name or "head" in name or "layers.2" in name]


# ---------------------------------------------------------------------- merging


@pytest.mark.parametrize(("grid", "side"), [(27, 3), (27, 1), (24, 4), (27, 4), (5, 5), (7, 3), (1, 1)])
def test_average_equals_a_loop_over_regions(grid, side):
    tokens = torch.randn(2, grid * grid, 3, dtype=torch.double, requires_grad=True)
    merged, expected = merge_grid(tokens, side), loop_merge(tokens, side)
    torch.testing.assert_close(merged, expected)
    weights = torch.randn_like(expected)
    fast, slow = (torch.autograd.grad((x * weights).sum(), tokens)[0] for x in (merged, expected))
    torch.testing.assert_close(fast, slow)


@pytest.mark.parametrize("side", [1, 3])
def test_plain_bilinear_takes_the_middle_of_each_region(side):
    tokens = torch.randn(1, 27 * 27, 4)
    places = torch.arange(side) * (27 // side) + 27 // side // 2
    picked = tokens.view(1, 27, 27, 4)[:, places][:, :, places].flatten(1, 2)
    assert torch.equal(merge_grid(tokens, side, "bilinear"), picked)


def test_antialias_weighs_the_whole_region():
    tokens = torch.zeros(1, 27 * 27, 1, requires_grad=True)
    for mode, most in (("bilinear", 1), ("bilinear_antialias", 27 * 27)):
        gradient = torch.autograd.grad(merge_grid(tokens, 3, mode)[0, 4].sum(), tokens)[0]
        assert 1 <= int((gradient != 0).sum()) <= most
    assert int((gradient != 0).sum()) > 81


@pytest.mark.parametrize("mode", ["average", "bilinear", "bilinear_antialias"])
def test_modes_keep_the_type(mode):
    assert merge_grid(torch.randn(1, 36, 2).bfloat16(), 3, mode).dtype == torch.bfloat16


# ---------------------------------------------------------------------- projector


def test_projector_is_norm_linear_gelu_linear():
    projector = CrossLMMProjector(tiny_crosslmm_config())
    tokens = torch.randn(5, 24)
    centred = tokens - tokens.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    inner = nn.functional.gelu(normed @ projector.linear_1.weight.T + projector.linear_1.bias)
    expected = inner @ projector.linear_2.weight.T + projector.linear_2.bias
    torch.testing.assert_close(projector(tokens), expected, **SAME)
    without = CrossLMMProjector(tiny_crosslmm_config(projector_norm="none"))
    assert [name for name, _ in without.named_parameters() if "norm" in name] == []


def test_projector_of_the_2b_model_has_the_papers_size():
    with torch.device("meta"):
        projector = CrossLMMProjector(CrossLMMConfig(projector_norm="none"))
        with_norm = CrossLMMProjector(CrossLMMConfig())
    assert sum(x.numel() for x in projector.parameters()) == 4_131_840
    assert sum(x.numel() for x in with_norm.parameters()) == 4_131_840 + 2304


# ---------------------------------------------------------------------- videos and images


def test_merging_comes_before_projection_and_memory_is_every_token():
    half = VisionHalf()
    frames = torch.rand(3, 3, 32, 32)
    output = half.get_video_features(frames[None], output_tower_features=True)
    projector = half.multi_modal_projector
    expected = projector(loop_merge(output.last_hidden_state, 2)).flatten(0, 1)
    torch.testing.assert_close(output.pooler_output[0], expected, **SAME)
    torch.testing.assert_close(output.memory[0], projector(output.last_hidden_state).flatten(0, 1), **SAME)
    assert output.pooler_output[0].shape == (3 * 4, 32)
    assert output.memory[0].shape == (3 * 16, 32)


def test_memory_of_the_encoder_is_not_projected():
    half = VisionHalf(kv_source="encoder")
    output = half.get_image_features(torch.rand(2, 3, 32, 32), output_tower_features=True)
    torch.testing.assert_close(torch.stack(output.memory), output.last_hidden_state, **SAME)
    assert output.num_frames == [1, 1]


def test_no_memory_without_cross_attention():
    output = VisionHalf(cross_attention_interval=None).get_image_features(torch.rand(1, 3, 32, 32))
    assert output.memory is None


@pytest.mark.parametrize("chunk", [1, 2, 5, 99])
def test_chunks_change_nothing(chunk):
    frames = torch.rand(5, 3, 32, 32)
    one = VisionHalf(vision_chunk_size=5).get_video_features(frames, torch.tensor([2, 3]))
    many = VisionHalf(vision_chunk_size=chunk).get_video_features(frames, torch.tensor([2, 3]))
    for a, b in zip(one.pooler_output + one.memory, many.pooler_output + many.memory, strict=True):
        torch.testing.assert_close(a, b, **SAME)


def test_padded_frames_are_left_out_and_flat_frames_are_the_same():
    half = VisionHalf()
    padded = torch.rand(2, 4, 3, 32, 32)
    counts = torch.tensor([2, 4])
    flat = torch.cat([padded[0, :2], padded[1]])
    a, b = half.get_video_features(padded, counts), half.get_video_features(flat, counts)
    assert a.num_frames == b.num_frames == [2, 4]
    for x, y in zip(a.pooler_output + a.memory, b.pooler_output + b.memory, strict=True):
        assert torch.equal(x, y)


def test_an_image_is_a_video_of_one_frame():
    half = VisionHalf()
    frame = torch.rand(1, 3, 32, 32)
    image, video = half.get_image_features(frame), half.get_video_features(frame[None])
    assert torch.equal(image.pooler_output[0], video.pooler_output[0])
    assert torch.equal(image.memory[0], video.memory[0])


@pytest.mark.parametrize(
    ("pixels", "counts", "message"),
    [
        ((2, 3, 32, 32), None, "needs video_num_frames"),
        ((2, 3, 32, 32), [1, 2], "add up to 3 frames, but pixel_values_videos has 2"),
        ((1, 2, 3, 32, 32), [3], "each at most 2"),
        ((2, 2, 3, 32, 32), [2], "one number per video, 2"),
        ((1, 2, 3, 32, 32), [0], "at least one frame"),
        ((1, 2, 3, 32, 16), None, "the tower takes"),
    ],
)
def test_frames_and_counts_that_do_not_agree_are_refused(pixels, counts, message):
    with pytest.raises(ValueError, match=message):
        VisionHalf().get_video_features(torch.rand(pixels), None if counts is None else torch.tensor(counts))


# ---------------------------------------------------------------------- encoded videos


@pytest.mark.parametrize("with_memory", [True, False])
def test_encoded_videos_survive_the_disk(tmp_path, with_memory):
    memory = [torch.randn(16, 3), torch.randn(32, 3)] if with_memory else None
    video = CrossLMMEncodedVideo([torch.randn(4, 3), torch.randn(8, 3)], memory, [1, 2], {"model": "a"})
    video.save(tmp_path)
    loaded = CrossLMMEncodedVideo.load(tmp_path, {"model": "a"})
    assert (loaded.num_frames, loaded.key, len(loaded)) == ([1, 2], {"model": "a"}, 2)
    assert all(torch.equal(a, b) for a, b in zip(loaded.features, video.features, strict=True))
    assert (loaded.memory is None) is not with_memory
    if with_memory:
        assert all(torch.equal(a, b) for a, b in zip(loaded.memory, memory, strict=True))
    with pytest.raises(ValueError, match="belongs to another model"):
        CrossLMMEncodedVideo.load(tmp_path, {"model": "b"})
