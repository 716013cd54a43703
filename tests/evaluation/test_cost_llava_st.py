"""Counts for LLaVA-ST against what tiny models really do, and against published counts."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from longvideo.evaluation import cost, cost_llava_st
from longvideo.evaluation.presets import PRESETS, find_preset
from longvideo.modeling.llava_st.modeling_llava_st import LlavaSTForConditionalGeneration
from tests.tiny_llava_st import tiny_llava_st_config, tiny_llava_st_model

NAME = "llava_st-7b"


def counted(function):
    """FLOPs of a call as torch counts them; fused kernels hide theirs on the CPU."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        function()
    return counter.get_total_flops()


@pytest.mark.parametrize("kwargs", [{}, {"coordinate_layout": "split"}, {"tie_word_embeddings": True},
                                    {"coordinate_layout": "split", "tie_word_embeddings": True},
                                    {"use_packer": False}])  # fmt: skip
def test_weights_of_tiny_models(kwargs):
    model = tiny_llava_st_model(**kwargs)
    counts = cost_llava_st.count_parameters(model.config)

    def size(module):
        return sum(value.numel() for value in module.parameters())

    assert counts["vision"] == size(model.model.vision_tower)
    assert counts["projector"] == size(model.model.multi_modal_projector)
    assert counts["total"] == size(model)


def test_weights_of_the_published_size():
    preset = PRESETS[NAME]
    config = preset.config()
    # The release stores the tower's last norm, which nothing uses: two tensors.
    norm = 2 * config.vision_config.hidden_size
    assert cost_llava_st.count_parameters(config)["total"] == preset.num_values - norm
    assert cost_llava_st.count_packer_parameters(config) == 22_036_480, "22.04 M each"
    with torch.device("meta"):
        state = LlavaSTForConditionalGeneration(config).state_dict()
    sizes = [value.numel() for value in state.values()]
    assert (len(sizes), sum(sizes)) == (preset.num_tensors - 2, preset.num_values - norm)
    assert find_preset(preset.repositories[0]) is preset


@pytest.mark.parametrize("splice", [True, False])
def test_flops_equal_the_counter(splice):
    # The counter looks for gradients where there is a parameter.
    model = tiny_llava_st_model(splice_fast_stream=splice).requires_grad_(False)
    model.set_attn_implementation("eager")
    config, num_frames = model.config, model.config.num_frames
    packers = cost_llava_st.all_packer_flops(config, num_frames)
    features = torch.randn(num_frames, 16, config.text_config.hidden_size)
    assert counted(lambda: model.model.packer(features, with_fast=splice)) == sum(packers.values())
    assert (packers["fast"] > 0) == splice
    pixels = torch.randn(1, num_frames, 3, 32, 32)
    expected = cost_llava_st.tower_flops(config, num_frames) + cost_llava_st.projector_flops(config, num_frames)
    expected += sum(packers.values())
    assert counted(lambda: model.get_video_features(pixels)) == expected
    prompt = torch.randn(1, 20, config.text_config.hidden_size)
    flops = counted(lambda: model(inputs_embeds=prompt, logits_to_keep=1))
    rotary = model.model.language_model.rotary_emb
    # A matrix product in some versions of transformers, left out of the formulas.
    flops -= counted(lambda: rotary(torch.zeros(1), torch.arange(20)[None]))
    assert flops == cost_llava_st.prefill_flops(config, 20, causal=False)


def test_visual_tokens_are_what_the_model_gives():
    config = tiny_llava_st_config()
    counts = cost.estimate(config, 6, num_text=10)
    fast, slow = 6 * 1, 2 * 4
    assert (counts.fast_tokens, counts.slow_tokens, counts.visual_tokens) == (fast, slow, fast + slow)
    assert counts.patch_tokens == 6 * 16


def test_estimate_of_the_published_setting():
    config = PRESETS[NAME].config()
    counts = cost.estimate(config, 100, num_text=60, new_tokens=128)
    assert (counts.fast_tokens, counts.slow_tokens, counts.visual_tokens) == (900, 1620, 2520)
    assert counts.cache_bytes == 56 * 1024 * 2580, "28 layers, keys and values of 4 heads of 128 in two bytes"
    assert counts.flops["fast"] == 0, "the released model never reads the fast stream"
    spliced = cost.estimate(PRESETS[NAME].config(splice_fast_stream=True), 100, num_text=60)
    assert spliced.flops["fast"] > 0 and spliced.visual_tokens == 2520
    half = cost.estimate(PRESETS[NAME].config(vision_chunk_size=16), 100)
    assert half.activation_bytes["tower"] * 2 == counts.activation_bytes["tower"]
    assert counts.to_dict()["parameters"]["total"] == counts.parameters["total"]
    assert cost_llava_st.warn(config, counts, 128) is None
    assert "32,768" in cost_llava_st.warn(config, counts, 40_000)
    folded = PRESETS[NAME].config()
    folded.coordinate_layout, folded.text_config.vocab_size = "folded", 151960
    assert cost.estimate(folded, 100).parameters == counts.parameters, "the same rows at other places"
    assert cost.estimate(folded, 100).flops["decode_per_token"] == cost.estimate(config, 100).flops["decode_per_token"]


def test_wrong_input():
    config = PRESETS[NAME].config()
    for kwargs, message in (
        ({"num_frames": 8}, "sees 100 frames of every video, got 8"),
        ({"num_frames": 100, "dtype": "int3"}, "int3"),
        ({"num_frames": 100, "visual_dropout": True}, "does not drop"),
    ):
        with pytest.raises(ValueError, match=message):
            cost.estimate(config, **kwargs)
    with pytest.warns(UserWarning, match="--frames 8: this model sees 100 frames of every video"):
        assert cost_llava_st.usable_frames(config, 8) == 100
