"""Counts for CrossLMM against the paper's tables, and against what models really do."""

import re

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from longvideo.evaluation import cost, cost_crosslmm, cost_flops_crosslmm
from longvideo.evaluation.presets import PRESETS
from longvideo.modeling.crosslmm.configuration_crosslmm import CrossLMMConfig
from longvideo.modeling.crosslmm.modeling_crosslmm import CrossLMMForConditionalGeneration
from longvideo.modeling.crosslmm.visibility import VisualInputs
from longvideo.modeling.crosslmm.visual_cache import VisualKeysLayer
from tests.tiny_crosslmm import tiny_crosslmm_model

FRAMES = (32, 64, 128, 256)
# Table 6 and Fig. 4b, tera multiply-adds.
PAPER = {"2b": (10.93, 21.77, 43.46, 86.82), "7b": (13.17, 25.92, 51.43, 102.42)}
ACCOUNTINGS = {
    "A": {"kv_source": "encoder", "share_kv": True},
    "B": {"kv_source": "projected", "share_kv": True},
    "C": {"kv_source": "projected", "share_kv": False},
}


def size(name: str, **kwargs) -> CrossLMMConfig:
    """One of the paper's sizes."""
    return PRESETS[f"crosslmm-{name}"].config(**kwargs)


# ---------------------------------------------------------------------- the paper's numbers


@pytest.mark.parametrize(
    ("name", "accounting", "tolerance"),
    # What is left is which tokens the paper projects and makes keys from; the printed digits give 0.05 % at most.
    [("2b", "A", 0.001), ("7b", "A", 0.005), ("2b", "B", 0.005), ("7b", "B", 0.04), ("2b", "C", 0.02),
     ("7b", "C", 0.09)],
)  # fmt: skip
def test_formula_against_the_paper(name, accounting, tolerance):
    config = size(name, **ACCOUNTINGS[accounting])
    for num_frames, printed in zip(FRAMES, PAPER[name], strict=True):
        total = cost_flops_crosslmm.paper_macs(config, num_frames)["total"]
        assert total / 1e12 == pytest.approx(printed, rel=tolerance)


def test_formula_is_linear_in_frames_as_the_paper():
    first, second = (cost_flops_crosslmm.paper_macs(size("2b"), count)["total"] for count in (32, 64))
    assert cost_flops_crosslmm.paper_macs(size("2b"), 256)["total"] == first + 7 * (second - first)


def test_all_tokens_against_the_paper():
    def count(num_frames, **kwargs):
        return cost_flops_crosslmm.all_tokens_macs(size("7b"), num_frames, **kwargs) / 1e12

    for num_frames, printed in zip(FRAMES, (57, 113.56, 226.67), strict=False):
        # 196 tokens per frame are what the method has; 6.85 more are what its prompt seems to say about each.
        assert count(num_frames) == pytest.approx(printed, rel=0.03)
        assert count(num_frames, tokens_per_frame=202.85) == pytest.approx(printed, rel=0.0002)
    # A prompt cut off at 32,768 tokens; whole it would be half as much again.
    assert count(256) == pytest.approx(316.88, rel=0.0005)
    assert count(256, max_length=10**6) > 1.3 * count(256)
    for kwargs, cut, whole in ((ACCOUNTINGS["A"], 0.677, 0.767), (ACCOUNTINGS["C"], 0.651, 0.749)):
        ours = cost_flops_crosslmm.paper_macs(size("7b", **kwargs), 256)["total"] / 1e12
        # "67.7 % less" of the prompt that was cut off; a tenth of a percent is the distance of A from the paper
        assert 1 - ours / count(256) == pytest.approx(cut, abs=0.0015)
        assert 1 - ours / count(256, max_length=10**6) == pytest.approx(whole, abs=0.0015)


def test_terms_of_the_formula():
    macs = cost_flops_crosslmm.paper_macs(size("2b"), 1)
    assert macs["tower"] == 320_900_714_496, "26 layers"
    assert macs["projector"] == 729 * (1152 * 1536 + 1536**2)
    assert macs["language"] == (9 + 63) * 1_310_195_712
    assert macs["query_output"] == 7 * (9 + 63) * 2 * 1536**2
    assert macs["key_value"] == 7 * 729 * 2 * 1536 * 256 * 2
    assert macs["total"] == sum(value for name, value in macs.items() if name != "total")
    assert cost_flops_crosslmm.paper_macs(size("7b"), 1)["language"] == 72 * 6_525_288_448


def test_43_million_weights_of_stage_1():
    """Table 3: projector and V2V."""
    config = size("2b", use_t2v=False, projector_norm="none")
    layer = cost_crosslmm.count_cross_attention_parameters(config)
    without = cost_crosslmm.count_projector_parameters(config) + 7 * (layer["queries"] + layer["keys"])
    assert without == 42_681_344
    assert (layer["norms"], layer["gates"]) == (1536, 1)
    assert cost_crosslmm.count_projector_parameters(size("2b")) == 4_131_840 + 2304
    encoder = size("2b", use_t2v=False, projector_norm="none", kv_source="encoder")
    layer = cost_crosslmm.count_cross_attention_parameters(encoder)
    assert cost_crosslmm.count_projector_parameters(encoder) + 7 * (layer["queries"] + layer["keys"]) == 41_305_088


@pytest.mark.parametrize(
    ("name", "num_frames", "mebibytes"),
    [("2b", 32, 159.5), ("2b", 256, 1275.75), ("7b", 32, 318.9), ("7b", 256, 2551.5), ("7b", 1024, 10206)],
)
def test_visual_cache(name, num_frames, mebibytes):
    counts = cost.estimate(size(name), num_frames)
    # rounded to a tenth
    assert counts.visual_cache_bytes / 2**20 == pytest.approx(mebibytes, abs=0.06)
    assert cost.estimate(size(name, use_t2v=False), num_frames).visual_cache_bytes == 0
    assert cost.estimate(size(name), num_frames, dtype="fp32").visual_cache_bytes == 2 * counts.visual_cache_bytes


def test_an_answer_token():
    """4.0 and 9.4 giga multiply-adds of cross-attention at 256 frames."""
    for name, giga in (("2b", 4.01), ("7b", 9.36)):
        config = size(name)
        plain = size(name, cross_attention_interval=None)
        more, less = (cost.estimate(one, 256).flops["decode_per_token"] for one in (config, plain))
        queries = 7 * 2 * config.text_config.hidden_size**2
        assert ((more - less) // 2 - queries) / 1e9 == pytest.approx(giga, abs=0.01)


# ---------------------------------------------------------------------- what models really do

SWITCHES = [{}, {"share_kv": True}, {"kv_source": "encoder"}, {"kv_source": "encoder", "share_kv": True},
            {"v2v_scope": "frame"}, {"use_t2v": False}, {"use_v2v": False}, {"cross_attention_interval": None},
            {"text": "qwen3", "tie_word_embeddings": True, "projector_norm": "none"}]  # fmt: skip


def counted(function) -> FlopCounterMode:
    """FLOPs of a call as torch counts them; fused kernels hide theirs on the CPU."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        function()
    return counter


def on_meta(config: CrossLMMConfig) -> CrossLMMForConditionalGeneration:
    """A model of shapes without values."""
    with torch.device("meta"):
        # The counter looks for gradients where there is a parameter.
        return CrossLMMForConditionalGeneration(config).eval().requires_grad_(False)


@pytest.mark.parametrize(("name", "accounting"), [("2b", "A"), ("2b", "B"), ("2b", "C"), ("7b", "C")])
def test_counted_terms_equal_the_formula(name, accounting):
    config, num_frames, num_text = size(name, **ACCOUNTINGS[accounting]), 2, 63
    core, width = on_meta(config).model, config.text_config.hidden_size
    num_keys, num_visual = num_frames * 729, num_frames * 9
    length = num_visual + num_text
    macs = cost_flops_crosslmm.paper_macs(config, num_frames, num_text=num_text)

    def run() -> None:
        core.vision_tower(torch.zeros(num_frames, 3, 384, 384, device="meta"))
        core.multi_modal_projector(torch.zeros(num_keys, 1152, device="meta"))
        key_width = cost_flops_crosslmm.memory_width(config)
        visuals = VisualInputs(torch.zeros(num_keys, key_width, device="meta"), [num_frames], [[0]], rows_per_frame=9)
        core(
            inputs_embeds=torch.zeros(1, length, width, device="meta"),
            # Which rows are visual is a value, not a shape.
            visual_mask=torch.arange(length)[None] < num_visual,
            visual_inputs=visuals,
            attention_mask=torch.zeros(1, 1, length, length, device="meta"),
            use_cache=False,
        )

    counts = {part: sum(flops.values()) // 2 for part, flops in counted(run).get_flop_counts().items()}

    def parts(pattern: str) -> int:
        return sum(value for part, value in counts.items() if re.search(pattern, part))

    assert counts["SiglipVisionModel"] == macs["tower"]
    assert counts["CrossLMMProjector"] == macs["projector"]
    assert parts(r"(self_attn|mlp)\.[a-z]+_proj$") - parts(r"^Siglip.*_proj$") == macs["language"]
    assert parts(r"\.dual_cross_attention\.\w+\.[qo]_proj$") == macs["query_output"]
    assert parts(r"\.dual_cross_attention\.\w+\.[kv]_proj$") == macs["key_value"]
    cores = 7 * cost_flops_crosslmm.attention_flops(config, num_frames, num_text) // 2
    assert parts(r"\.dual_cross_attention$") == cores + macs["query_output"] + macs["key_value"]


def test_weights_of_stage_1_on_the_meta_device():
    model = on_meta(size("2b", use_t2v=False))
    sizes = {name: value.numel() for name, value in model.named_parameters()}
    trained = {name: count for name, count in sizes.items() if re.search("projector|dual_cross_attention", name)}
    small = {name: count for name, count in trained.items() if re.search("norm|gate", name)}
    assert sum(trained.values()) - sum(small.values()) == 42_681_344
    assert sum(small.values()) == 2304 + 7 * (1536 + 1)


@pytest.mark.parametrize("name", ["2b", "7b", "7b-16"])
def test_weights_of_the_papers_sizes(name):
    preset = PRESETS[f"crosslmm-{name}"]
    sizes = [value.numel() for value in on_meta(preset.config()).parameters()]
    assert sum(sizes) == cost_crosslmm.count_parameters(preset.config())["total"]
    assert (len(sizes), sum(sizes)) == (preset.num_tensors, preset.num_values)


@pytest.mark.parametrize("switches", SWITCHES, ids=str)
def test_counts_of_tiny_models(switches):
    num_frames, num_text = 3, 5
    model = tiny_crosslmm_model(**switches).requires_grad_(False)
    config = model.config
    counts = cost.estimate(config, num_frames, num_text=num_text, dtype="fp32", causal=False)
    assert counts.parameters["total"] == sum(value.numel() for value in model.parameters())
    assert counts.parameters["vision"] == sum(value.numel() for value in model.model.vision_tower.parameters())

    pixels, seen = torch.randn(1, num_frames, 3, 32, 32), {}
    encode = counted(lambda: seen.update(video=model.get_video_features(pixels)))
    assert encode.get_total_flops() == counts.flops["tower"] + counts.flops["projector"]

    ids = torch.full((1, counts.visual_tokens + num_text), 11)
    ids[:, : counts.visual_tokens] = config.video_token_id
    prefill = counted(lambda: seen.update(out=model(input_ids=ids, mm_encoder_outputs={"video": seen["video"]},
                                                    use_cache=True, logits_to_keep=1)))  # fmt: skip
    rotary = model.model.language_model.rotary_emb

    def behind(counter: FlopCounterMode, length: int) -> int:
        # A matrix product in some versions of transformers, left out of the formulas.
        positions = counted(lambda: rotary(torch.zeros(1), torch.arange(length)[None]))
        return counter.get_total_flops() - positions.get_total_flops()

    flops = behind(prefill, ids.shape[1])
    assert flops == counts.flops["total"] - counts.flops["tower"] - counts.flops["projector"]
    cache = seen["out"].past_key_values
    layers = [layer for layer in cache.layers if isinstance(layer, VisualKeysLayer) and layer.is_initialized]
    stored = sum(2 * layer.keys.numel() * layer.keys.element_size() for layer in layers)
    assert stored == counts.visual_cache_bytes
    step = counted(lambda: model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True))
    assert behind(step, 1) == counts.flops["decode_per_token"]


# ---------------------------------------------------------------------- estimates


def test_estimate_of_the_papers_setting():
    counts = cost.estimate(size("2b"), 256, num_text=63)
    assert (counts.patch_tokens, counts.visual_tokens) == (256 * 729, 2304)
    assert counts.cache_bytes == 28 * 1024 * (2304 + 63)
    assert counts.paper_macs["total"] == cost_flops_crosslmm.paper_macs(size("2b"), 256)["total"]
    assert counts.activation_bytes["memory"] / 2**20 == pytest.approx(546.75, abs=0.01)
    assert counts.flops["total"] // 2 > counts.paper_macs["total"], "attention comes on top"
    single = cost.estimate(size("2b", v2v_scope="frame"), 256, num_text=63)
    assert single.flops["cross_attention"] < 0.04 * counts.flops["cross_attention"]
    assert counts.to_dict()["parameters"]["total"] == counts.parameters["total"]
    plain = cost.estimate(size("2b", cross_attention_interval=None), 256)
    assert plain.activation_bytes["memory"] == plain.visual_cache_bytes == plain.flops["cross_attention"] == 0
    assert plain.parameters["cross_attention"] == 0


def test_more_frames_than_the_decoder_has_positions():
    config = size("7b")
    assert cost_crosslmm.warn(config, cost.estimate(config, 1024), 256) is None
    assert "at most 3,605 frames" in cost_crosslmm.warn(config, cost.estimate(config, 4000), 256)


def test_wrong_input():
    for kwargs, message in (
        ({"num_frames": 0}, "at least 1 frame, got 0"),
        ({"num_frames": 8, "dtype": "int3"}, "int3"),
        ({"num_frames": 8, "visual_dropout": True}, "does not drop"),
    ):
        with pytest.raises(ValueError, match=message):
            cost.estimate(size("2b"), **kwargs)
