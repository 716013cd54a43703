"""Counts and bounds for LongVU against what tiny models really do, and against published counts."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from longvideo.evaluation import cost, cost_longvu
from longvideo.evaluation.cost_bounds_longvu import kept_bounds, measure_room, token_bounds
from longvideo.evaluation.presets import PRESETS, find_preset
from longvideo.modeling.longvu.configuration_longvu import LongVUConfig
from longvideo.modeling.longvu.modeling_longvu import LongVUForConditionalGeneration
from longvideo.modeling.longvu.temporal_reduction import TemporalReducer
from longvideo.modeling.longvu.vision_longvu import LongVUVisionOutput, LongVUVisual, VisualInputs
from tests.tiny_longvu import tiny_longvu_model

SIZES = {name: preset for name, preset in PRESETS.items() if preset.config_class is LongVUConfig}


def counted(function):
    """FLOPs of a call as torch counts them; fused kernels hide theirs on the CPU."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        function()
    return counter.get_total_flops()


@pytest.mark.parametrize("kwargs", [{}, {"text": "llama", "tie_word_embeddings": True}, {"image_token_len": 36},
                                    {"image_newline": False}])  # fmt: skip
def test_weights_of_tiny_models(kwargs):
    model = tiny_longvu_model(**kwargs)
    counts = cost_longvu.count_parameters(model.config)

    def size(module):
        return sum(value.numel() for value in module.parameters())

    assert counts["vision"] == size(model.model.vision_tower) + size(model.model.dino_tower)
    assert counts["total"] == size(model)


@pytest.mark.parametrize("name", SIZES)
def test_weights_of_published_sizes(name):
    preset = SIZES[name]
    config = preset.config()
    counts = cost_longvu.count_parameters(config)
    text = config.text_config
    # The files hold no towers, and the output head also where it is the token table.
    head = text.vocab_size * text.hidden_size if config.tie_word_embeddings else 0
    assert counts["total"] - counts["vision"] + head == preset.num_values
    with torch.device("meta"):
        model = LongVUForConditionalGeneration(config)
    state = {key: value for key, value in model.state_dict().items() if "_tower." not in key}
    assert (len(state), sum(value.numel() for value in state.values())) == (preset.num_tensors, preset.num_values)
    # 428,225,600 of SigLIP without its head and last norm, 1,136,480,768 of DINOv2-giant without its mask token.
    assert counts["vision"] == 428_225_600 - 15_238_352 - 2 * 1152 + 1_136_480_768 - 1536
    assert find_preset(preset.repositories[0]) is preset


@pytest.mark.parametrize("kwargs", [{}, {"image_token_len": 36, "highres": False}])
def test_flops_equal_the_counter(kwargs):
    # The counter looks for gradients where there is a parameter.
    model = tiny_longvu_model(context_length=2000, **kwargs).requires_grad_(False)
    model.set_attn_implementation("eager")
    config, frames = model.config, torch.randn(5, 3, 28, 28)
    expected = cost_longvu.dino_flops(config, 5) + cost_longvu.siglip_flops(config, 5)
    expected += cost_longvu.sampler_flops(config, 5) + cost_longvu.projector_flops(config, 5, 0)
    with torch.no_grad():
        output = model.get_video_features(frames, frames, torch.tensor([5]))
    assert counted(lambda: model.get_video_features(frames, frames, torch.tensor([5]))) == expected
    prompt = torch.randn(1, 20 + len(output.pooler_output[0]), 32)
    flops = counted(lambda: model(inputs_embeds=prompt, logits_to_keep=1))
    rotary = model.model.language_model.rotary_emb
    # A matrix product in some versions of transformers, left out of the formulas.
    flops -= counted(lambda: rotary(torch.zeros(1), torch.arange(prompt.shape[1])[None]))
    assert flops == cost_longvu.prefill_flops(config, prompt.shape[1] - 20, 20, causal=False)


def choose(model, num_frames, kept, seed):
    """What the model chooses for a video of random frames, or of equal ones for seed 0; 20 ids of text."""
    torch.manual_seed(seed)
    features = torch.randn(len(kept) if seed else 1, model.config.image_token_len, 32).expand(len(kept), -1, -1)
    visual = LongVUVisual(features, kept, torch.zeros(num_frames), num_frames, (1, 1), True)
    ids = torch.arange(10, 31)[None].clone()
    ids[0, 3] = model.config.video_token_id
    inputs = VisualInputs(mm_encoder_outputs={"video": LongVUVisionOutput.of([visual])})
    with torch.no_grad():
        _, (selection,) = model.model.insert_visuals(ids, None, inputs, num_new_tokens=10)
    return selection


@pytest.mark.parametrize("original", [False, True])
@pytest.mark.parametrize("num_kept", [1, 2, 7, 8, 11, 14, 15, 16, 30, 90])
def test_tokens_lie_within_the_bounds(num_kept, original):
    model = tiny_longvu_model(original_behaviour=original, max_kept_frames=100)
    room = measure_room(model.config, 20, 10)
    (least, most), num_full, mode = token_bounds(model.config, num_kept, room)
    for seed in range(4):
        selection = choose(model, num_kept, torch.arange(num_kept), seed)
        assert selection.mode == mode and int(selection.full_resolution.sum()) == num_full
        assert least <= len(selection.token_frame) <= most
        if seed == 0 and not original:
            # Equal frames: of each window only the anchor's tokens stay, nothing more can be dropped.
            assert len(selection.token_frame) == least


@pytest.mark.parametrize("rule", ["original", "paper"])
@pytest.mark.parametrize("num_frames", [1, 7, 15, 16, 17, 40, 300])
def test_kept_frames_lie_within_the_bounds(num_frames, rule):
    config = tiny_longvu_model(temporal_reduction=rule, max_kept_frames=50).config
    room = measure_room(config, 20, 10)
    bounds = kept_bounds(config, num_frames, room)
    limit = tiny_limit(config, room) if rule == "original" else None
    found = []
    for threshold in (-2.0, 0.0, 2.0):
        reducer = TemporalReducer(num_frames, threshold=threshold, max_frames=50, rule=rule, limit=limit)
        reducer.add(torch.randn(num_frames, 8))
        reducer.finish()
        found.append(len(reducer.kept()))
    assert (min(found), max(found)) == bounds


def tiny_limit(config, room):
    """From the arithmetic: 90 positions hold 15 frames of 6 tokens, 16 frames are too many."""
    assert (room.budget, config.behaves("budget_without_newlines")) == (90, False)
    return 16


def test_estimate_of_a_published_setting():
    config = PRESETS["longvu-7b"].config()
    short, hour = (cost.estimate(config, frames, num_text=60, new_tokens=128) for frames in (40, 3600))
    # 144 + 12 tokens per square frame.
    assert short.kept_frames == (40, 40) and short.visual_tokens == (40 * 156, 40 * 156) and short.modes == ["full"]
    assert hour.kept_frames == (225, 400) and hour.budget == 8192 - 60 - 16, "the original reserves 16 positions"
    assert hour.modes == ["stc"] and hour.visual_tokens == (29 * 156, 8116)
    assert hour.cache_bytes == tuple(56 * 1024 * (60 + tokens) for tokens in hour.visual_tokens)
    assert hour.flops["dino"] == (90 * short.flops["dino"][0],) * 2
    assert hour.flops["siglip"][0] < hour.flops["siglip"][1] and hour.to_dict()["kept_frames"] == (225, 400)
    # Towers see chunks: what they need does not grow with the video.
    assert hour.activation_bytes["tower"] > short.activation_bytes["tower"]
    assert hour.activation_bytes["tower"] == cost.estimate(config, 600).activation_bytes["tower"]
    wide = cost.estimate(config, 40, size=(9, 16))
    assert wide.visual_tokens == (40 * 84, 40 * 84), "12 rows of 6 and a newline, or 6 rows of 13"


def test_wrong_input():
    config = PRESETS["longvu-7b"].config()
    for kwargs, message in (
        ({"num_frames": 0}, "at least 1"),
        ({"num_frames": 8, "dtype": "int3"}, "int3"),
        ({"num_frames": 8, "visual_dropout": True}, "does not drop"),
        ({"num_frames": 8, "num_text": 8180}, "leave nothing of the 8192 positions"),
    ):
        with pytest.raises(ValueError, match=message):
            cost.estimate(config, **kwargs)
