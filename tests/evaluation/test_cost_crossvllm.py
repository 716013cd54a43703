"""Counts for CrossVLLM in both granularities, against the paper's tables and against what models really do."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from longvideo.evaluation import cost, cost_crossvllm
from longvideo.evaluation.presets import PRESETS
from longvideo.modeling.crossvllm.modeling_crossvllm import CrossVLLMForConditionalGeneration
from tests.tiny_crossvllm import tiny_crossvllm_config, tiny_crossvllm_model

PAPER = PRESETS["crossvllm-7b"]


def counted(function) -> int:
    """FLOPs of a call as torch counts them; fused kernels hide theirs on the CPU."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        function()
    return counter.get_total_flops()


def on_meta(config) -> CrossVLLMForConditionalGeneration:
    """A model of shapes without values."""
    with torch.device("meta"):
        model = CrossVLLMForConditionalGeneration(config).eval()
        if config.adapters:
            pytest.importorskip("peft")
            model.add_adapters()
    # The counter looks for gradients where there is a parameter.
    return model.requires_grad_(False)


# ---------------------------------------------------------------------- the paper's numbers


def test_tokens_of_the_papers_setting() -> None:
    """Table 4: as many visual tokens in both granularities."""
    counts = cost.estimate(PAPER.config(), 288)
    coarse, fine = counts.looks["coarse"], counts.looks["fine"]
    assert (coarse["num_frames"], coarse["stride"], coarse["tokens_per_frame"]) == (288, 6, 16)
    assert (fine["num_frames"], fine["stride"], fine["tokens_per_frame"]) == (32, 2, 144)
    assert coarse["visual_tokens"] == fine["visual_tokens"] == counts.visual_tokens == 4608
    # Keys and values of 32 layers, 4096 wide, two bytes each.
    assert coarse["cache_bytes"] == fine["cache_bytes"] == 2 * 32 * 4096 * 2 * (4608 + 64)
    assert counts.cache_bytes == 2 * coarse["cache_bytes"]
    assert coarse["flops"]["tower"] == 9 * fine["flops"]["tower"]
    assert coarse["flops"]["prefill"] == fine["flops"]["prefill"]


@pytest.mark.parametrize(("stride", "frames", "tokens"), [(3, 72, 64), (12, 1152, 4)])
def test_other_granularities_of_table_5(stride: int, frames: int, tokens: int) -> None:
    look = cost.estimate(PAPER.config(coarse_stride=stride), frames).looks["coarse"]
    assert (look["tokens_per_frame"], look["visual_tokens"]) == (tokens, 4608)


@pytest.mark.parametrize("adapters", [True, False])
def test_weights_of_the_papers_size(adapters: bool) -> None:
    config = PAPER.config(adapters=adapters)
    sizes = [value.numel() for value in on_meta(config).parameters()]
    assert sum(sizes) == cost_crossvllm.count_parameters(config)["total"]
    expected = (PAPER.num_tensors, PAPER.num_values) if adapters else (672, 7_071_808_512)
    assert (len(sizes), sum(sizes)) == expected


@pytest.mark.parametrize("granularity", ["coarse", "fine"])
def test_flops_of_the_papers_size_on_the_meta_device(granularity: str) -> None:
    """Few frames; what they cost is linear in them, and the text is all of what is not."""
    config = PAPER.config(adapters=False)
    core, num_frames = on_meta(config).model, 2
    look = cost.estimate(config, num_frames, causal=False, available_frames=num_frames).looks[granularity]
    assert look["num_frames"] == num_frames
    pixels = torch.zeros(1, num_frames, 3, 336, 336, device="meta")
    encode = counted(lambda: core.get_video_features(pixels, granularity=granularity))
    assert encode == look["flops"]["tower"] + look["flops"]["projector"]


# ---------------------------------------------------------------------- what models really do

SWITCHES = [
    {},
    {"adapters": False},
    {"coarse_stride": 3, "fine_stride": 1},
    {"text_kwargs": {"num_key_value_heads": 4}, "multimodal_projector_bias": False, "lora_r": 4},
    {"vision_feature_layer": -1, "tie_word_embeddings": True},
]


@pytest.mark.parametrize("granularity", ["coarse", "fine"])
@pytest.mark.parametrize("switches", SWITCHES, ids=str)
def test_counts_of_tiny_models(switches: dict, granularity: str) -> None:
    pytest.importorskip("peft")
    model, num_text = tiny_crossvllm_model(**switches).requires_grad_(False), 5
    config = model.config
    counts = cost.estimate(config, 3, num_text=num_text, dtype="fp32", causal=False)
    assert counts.parameters["total"] == sum(value.numel() for value in model.parameters())
    assert counts.parameters["vision"] == sum(value.numel() for value in model.model.vision_tower.parameters())
    assert counts.parameters["projector"] == sum(value.numel() for value in model.model.projectors.parameters())

    look, seen = counts.looks[granularity], {}
    pixels = torch.randn(1, look["num_frames"], 3, 48, 48)
    encode = counted(lambda: seen.update(video=model.get_video_features(pixels, granularity=granularity)))
    assert encode == look["flops"]["tower"] + look["flops"]["projector"]
    assert len(seen["video"].pooler_output[0]) == look["visual_tokens"]

    ids = torch.full((1, look["visual_tokens"] + num_text), 11)
    ids[:, : look["visual_tokens"]] = config.video_token_id
    given = {"mm_encoder_outputs": {"video": seen["video"]}, "granularity": granularity}
    prefill = counted(lambda: seen.update(out=model(input_ids=ids, use_cache=True, logits_to_keep=1, **given)))
    cache = seen["out"].past_key_values
    stored = sum(x.numel() * x.element_size() for layer in cache.layers for x in (layer.keys, layer.values))
    assert stored == look["cache_bytes"]
    step = counted(lambda: model(input_ids=ids[:, -1:], past_key_values=cache, granularity=granularity))
    rotary = model.model.language_model.rotary_emb
    for flops, length, expected in (
        (prefill, ids.shape[1], look["flops"]["prefill"]),
        (step, 1, look["flops"]["decode_per_token"]),
    ):
        # A matrix product in some versions of transformers, left out of the formulas.
        positions = counted(lambda length=length: rotary(torch.zeros(1), torch.arange(length)[None]))
        assert flops - positions == expected


# ---------------------------------------------------------------------- rounds


def test_rounds_share_frames_and_prompts() -> None:
    config, looks = PAPER.config(), {"coarse_frames": 288, "fine_frames": 32}
    for number in (0, 1, 3):
        ours = cost_crossvllm.course_flops(config, number, **looks)
        naive = cost_crossvllm.course_flops(config, number, naive=True, **looks)
        assert ours["tower_frames"] == 288 + 32 * (number + 1)
        assert naive["tower_frames"] == (288 + 32) * (number + 1)
        assert naive["answers"] == ours["answers"]
        assert (naive["total"] > ours["total"]) == (number > 0)
    single = cost_crossvllm.course_flops(config, 0, num_text=64, **looks)
    flops = cost.estimate(config, 288).flops
    assert single["tower"] + single["projector"] + single["prefill"] == flops["total"]


def test_a_later_round_reads_what_is_new() -> None:
    """Two prompts, the second one from the cache: the same values of queries times keys as in one go."""
    config = tiny_crossvllm_config()
    whole = cost_crossvllm.decoder_flops(config, 100)
    head = 2 * config.text_config.hidden_size * config.text_config.vocab_size
    parts = cost_crossvllm.decoder_flops(config, 60) + cost_crossvllm.decoder_flops(config, 40, 60)
    assert parts - head == whole


# ---------------------------------------------------------------------- estimates


def test_memory() -> None:
    config = PAPER.config()
    counts = cost.estimate(config, 288)
    memory = counts.activation_bytes
    # 12 x 12 patches of 320 frames, 1024 wide, are kept for both granularities.
    assert memory["features"] == 320 * 144 * 1024 * 2
    assert memory["pixels"] == 4 * 32 * 3 * 336 * 336
    assert memory["peak"] > memory["features"] + memory["prefill"]
    assert counts.weight_bytes == 2 * PAPER.num_values
    double = cost.estimate(config, 288, dtype="fp32")
    assert (double.cache_bytes, double.weight_bytes) == (2 * counts.cache_bytes, 2 * counts.weight_bytes)
    assert counts.to_dict()["looks"]["fine"]["visual_tokens"] == 4608


def test_more_frames_than_the_decoder_has_positions() -> None:
    config = PAPER.config()
    assert cost_crossvllm.warn(config, cost.estimate(config, 288), 256) is None
    # (8192 - 64 - 256) / 16
    sentence = cost_crossvllm.warn(config, cost.estimate(config, 1152), 256)
    assert sentence.startswith("coarse look: ") and "at most 492 frames" in sentence
    wide = PAPER.config(fine_num_frames=64)
    assert cost_crossvllm.warn(wide, cost.estimate(wide, 288), 256).startswith("fine look: ")


def test_wrong_input() -> None:
    for kwargs, message in (
        ({"num_frames": 0}, "at least 1 frame, got 0"),
        ({"num_frames": 8, "dtype": "int3"}, "int3"),
        ({"num_frames": 8, "visual_dropout": True}, "does not drop"),
    ):
        with pytest.raises(ValueError, match=message):
            cost.estimate(PAPER.config(), **kwargs)
