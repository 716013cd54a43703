"""Counting by formula against what tiny models really do, and against published counts."""

from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from longvideo.evaluation import cost_videochat_flash as cost
from longvideo.evaluation.presets import PRESETS, find_preset
from longvideo.modeling.videochat_flash.configuration_videochat_flash import VideoChatFlashConfig
from longvideo.modeling.videochat_flash.modeling_videochat_flash import VideoChatFlashForConditionalGeneration
from tests.tiny import tiny_videochat_flash_model

DROPOUT = {"type": "uniform0_attention", "layers": [1, 3], "ratios": [1.0, 0.75, 0.25]}
TOWERS = ["umt_vision_model", "internvideo2_vision_model", "siglip_vision_model"]


def counted(function: object) -> int:
    """FLOPs of a call as torch counts them."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        function()
    return counter.get_total_flops()


def prompt(config: object, num_visual: int, num_text: int) -> torch.Tensor:
    """One row of ids: text, placeholders, text."""
    ids = torch.arange(10, 10 + num_text)
    visual = torch.full((num_visual,), config.video_token_id)
    return torch.cat([ids[:3], visual, ids[3:]])[None]


def rotary_flops(model: object, *lengths: int) -> int:
    """FLOPs of position tables: a matrix product in some versions of transformers, left out of the formulas."""
    rotary = model.model.language_model.rotary_emb
    return sum(counted(partial(rotary, torch.zeros(1), torch.arange(length)[None])) for length in lengths)


@pytest.mark.parametrize("tower", TOWERS)
def test_vision_counts_equal_the_counter(tower: str) -> None:
    model = tiny_videochat_flash_model(tower=tower)
    model.set_attn_implementation("eager")
    frames = torch.randn(1, 12, 3, 32, 32)
    clips = cost.count_clips(model.config, 12)
    expected = cost.tower_flops(model.config, 12) + cost.merge_flops(model.config, clips)
    expected += cost.projector_flops(model.config, clips * model.config.tokens_per_clip)
    assert counted(lambda: model.get_video_features(frames)) == expected


@pytest.mark.parametrize("dropout", [False, DROPOUT, {**DROPOUT, "type": "uniform"}, {**DROPOUT, "type": "attention"}])
def test_decoder_counts_equal_the_counter(dropout: bool | dict) -> None:
    model = tiny_videochat_flash_model()
    model.set_attn_implementation("eager")
    config, num_text = model.config, 9
    features = model.get_video_features(torch.randn(1, 12, 3, 32, 32))
    num_visual = features.pooler_output[0].shape[0]
    ids = prompt(config, num_visual, num_text)
    output = {}

    def prefill() -> None:
        output.update(
            model(input_ids=ids, mm_encoder_outputs={"video": features}, visual_dropout=dropout, logits_to_keep=1)
        )

    flops = counted(prefill)
    lengths = cost.layer_lengths(config, num_visual, num_text, dropout)
    stages = cost.stage_tokens(config, num_visual, dropout)
    after = [num_text + stage.visual_tokens for stage in stages]
    flops -= rotary_flops(model, num_visual + num_text, *after)
    assert flops == cost.prefill_flops(config, num_visual, num_text, dropout, causal=False)

    cache = output["past_key_values"]
    assert [cache.get_seq_length(index) for index in range(len(lengths))] == lengths
    stored = [2 * layer.keys.numel() * layer.keys.element_size() for layer in cache.layers]
    assert stored == cost.cache_bytes_per_layer(config, lengths, bytes_per_value=4)
    if dropout:
        kept = [len(stage.kept_visual_indices[0]) for stage in output["visual_dropout"]]
        assert kept == [stage.visual_tokens for stage in stages] == [36, 12]

    step = counted(lambda: model(input_ids=torch.tensor([[11]]), past_key_values=cache, use_cache=True))
    step -= rotary_flops(model, 1, *(1 for _ in stages))
    assert step == cost.decode_flops(config, lengths)


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("tied", [False, True])
def test_weights_of_tiny_models(tower: str, tied: bool) -> None:
    model = tiny_videochat_flash_model(tower=tower, tie_word_embeddings=tied)
    counts = cost.count_parameters(model.config)

    def size(module: torch.nn.Module) -> int:
        return sum(value.numel() for value in module.parameters())

    assert counts["vision"] == size(model.model.vision_tower)
    assert counts["projector"] == size(model.model.multi_modal_projector)
    assert counts["total"] == size(model)


@pytest.mark.parametrize("name", [x for x, preset in PRESETS.items() if preset.config_class is VideoChatFlashConfig])
def test_weights_of_published_sizes(name: str) -> None:
    preset = PRESETS[name]
    config = preset.config()
    assert cost.count_parameters(config)["total"] == preset.num_values
    with torch.device("meta"):
        model = VideoChatFlashForConditionalGeneration(config)
    assert sum(value.numel() for value in model.state_dict().values()) == preset.num_values
    assert len(model.state_dict()) == preset.num_tensors
    assert find_preset(preset.repositories[0]) is preset


@pytest.mark.parametrize(
    ("tokens", "tera_flops", "giga_bytes"),
    [(4096, 57, 0.23), (16000, 259, 0.92), (57600, 1415, 3.3), (160000, 7218, 9.2)],
)
def test_prefill_follows_the_rule_of_thumb(tokens: int, tera_flops: float, giga_bytes: float) -> None:
    """2 * 6.5e9 * T + 2 * 28 * T^2 * 3584 FLOPs and 56 KiB of cache per token for Qwen2-7B."""
    config = PRESETS["videochat_flash-7b-224"].config()
    # The rule rounds the matrix weights to 6.5e9 (they are 6.525e9): half a percent.
    assert cost.prefill_flops(config, tokens, 0) / 1e12 == pytest.approx(tera_flops, rel=0.01)
    lengths = cost.layer_lengths(config, tokens, 0)
    # The figures are printed with two digits.
    assert sum(cost.cache_bytes_per_layer(config, lengths)) / 1e9 == pytest.approx(giga_bytes, rel=0.03)


def test_tower_follows_the_paper() -> None:
    config = PRESETS["videochat_flash-7b-224"].config()
    # Paper, table 5: 596 GFLOPs per clip of UMT-L at 224 pixels. 24 nominal layers and whatever else they count make
    # it a sixth more than the products of the 23 layers that are built.
    assert cost.tower_flops(config, 4) / 1e9 == pytest.approx(596, rel=0.15)


def test_estimate_of_a_published_setting() -> None:
    config = PRESETS["videochat_flash-7b-448"].config()
    dropout = {"type": "uniform0_attention", "layers": [4, 18], "ratios": [1, 0.75, 0.25]}
    full = cost.estimate(config, 512, num_text=60)
    short = cost.estimate(config, 512, num_text=60, visual_dropout=dropout)
    assert full.visual_tokens == 8192 and full.num_clips == 128 and full.patch_tokens == 512 * 784
    assert full.weight_bytes == 2 * 7_922_617_856 and full.stages == []
    assert [stage.visual_tokens for stage in short.stages] == [6144, 2048]
    assert short.layer_lengths == [8252] * 4 + [6204] * 14 + [2108] * 10
    assert short.cache_bytes == 2 * 512 * 2 * sum(short.layer_lengths)
    assert short.flops["prefill"] < 0.65 * full.flops["prefill"]
    assert short.flops["tower"] == full.flops["tower"]
    # Chunked encoding: what the tower needs does not grow with the video, nor do pixels on the model's device.
    for name in ("tower", "pixels"):
        assert cost.estimate(config, 1024).activation_bytes[name] == full.activation_bytes[name]
    assert full.activation_bytes["pixels"] == 4 * config.vision_chunk_size * 4 * 3 * 448**2
    assert full.to_dict()["stages"] == [] and short.to_dict()["stages"][0]["visual_tokens"] == 6144


def test_wrong_input() -> None:
    config = PRESETS["videochat_flash-7b-448"].config()
    with pytest.raises(ValueError, match="multiple of 4"):
        cost.estimate(config, 10)
    with pytest.raises(ValueError, match="int3"):
        cost.estimate(config, 8, dtype="int3")
    with pytest.raises(ValueError, match="does not fit a decoder of 28"):
        cost.estimate(config, 8, visual_dropout={"type": "uniform", "layers": [99], "ratios": [1, 0.5]})
