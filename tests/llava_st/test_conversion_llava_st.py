"""Conversion of LLaVA-ST checkpoints on tiny random weights: there, back, and what is refused."""

import json
import math
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoProcessor, AutoTokenizer, GenerationConfig

from longvideo.cli import main
from longvideo.conversion import CONVERSIONS, convert_checkpoint, reverse_checkpoint
from longvideo.conversion.architecture import find_conversion
from longvideo.conversion.checkpoint_io import TensorInfo
from longvideo.conversion.joins import cut_shapes
from longvideo.conversion.llava_st_config import EMBEDDING, HEAD, TABLES
from longvideo.modeling.llava_st.modeling_llava_st import LlavaSTForConditionalGeneration
from tests.originals import assert_same_bits, read_weights
from tests.originals_llava_st import (
    LORA_TARGETS,
    NUM_TEMPLATES,
    original_llava_st,
    stage_one,
    write_llava_st_original,
    write_stage,
)
from tests.originals_longvu import write_part
from tests.tiny import tiny_tokenizer
from tests.tiny_llava_st import tiny_llava_st_model
from tests.tiny_llava_st_processor import tiny_llava_st_tokenizer

SCHEMA = Path(__file__).resolve().parents[3] / "shared" / "specs" / "llava_st_state_dict_7b.json"
LAYOUTS = {"single": (1, "safetensors"), "sharded": (3, "safetensors"), "bin": (1, "bin"), "sharded_bin": (2, "bin")}
# The released behaviours, which the tiny model does not have by itself.
RELEASED = {
    "splice_fast_stream": False,
    "inject_width_inputs": False,
    "lape_interpolate_frames": False,
    "sample_loss": "sample_sum",
}
PUBLISHED = {
    "model_type": "llava_qwen",
    "vocab_size": 151660,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "mm_vision_tower": "google/siglip-so400m-patch14-384",
    "mm_projector_type": "mlp2x_gelu",
    "mm_resampler_type": "fast_slow_resampler",
    "mm_perceiver_latents": 81,
    "mm_perceiver_latents_fast": 9,
    "num_spatial_tokens": 100,
    "num_temporal_tokens": 100,
}
# What the tower has and the model does not use.
UNUSED_VALUES = {"weight": 1152, "bias": 1152}


def published_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the published files, but for the tower's last norm."""
    conversion = CONVERSIONS["llava_st"]
    conversion.check_config(PUBLISHED)
    config = conversion.build_config(PUBLISHED)
    assert config.text_config.vocab_size == config.num_logits == 151960
    rename = conversion.key_map(PUBLISHED).inverse().rename
    native = {rename(name): shape for name, shape in conversion.expected_shapes(config).items()}
    return cut_shapes(native, conversion.joins(config))


def test_published_sizes_have_as_many_tensors_and_values_as_the_release() -> None:
    shapes = published_shapes()
    values = sum(math.prod(shape) for shape in shapes.values())
    assert len(shapes) + len(UNUSED_VALUES) == 839
    assert values + sum(UNUSED_VALUES.values()) == 8_095_709_216
    tower = [name for name in shapes if name.startswith("model.vision_tower.")]
    packers = [name for name in shapes if name.startswith("model.vision_resampler.")]
    assert (len(tower) + len(UNUSED_VALUES), len(packers), len(set(TABLES) & set(shapes))) == (421, 69, 6)
    assert shapes[EMBEDDING] == shapes[HEAD] == (151660, 3584)


@pytest.mark.skipif(not SCHEMA.is_file(), reason="the list of the release's tensors is not at hand")
def test_every_tensor_of_the_release_has_its_name_and_shape() -> None:
    schema = json.loads(SCHEMA.read_text())
    listed = {
        pattern.replace("{i}", str(i)): tuple(shape)
        for pattern, shape, count in schema["patterns"]
        for i in range(count if "{i}" in pattern else 1)
    }
    assert len(listed) == schema["n_tensors"]
    assert sum(math.prod(shape) for shape in listed.values()) == schema["n_params"]
    key_map = CONVERSIONS["llava_st"].key_map(PUBLISHED)
    unused = {name for name in listed if key_map.rename(name) is None}
    assert {name.rpartition("vision_model.")[2] for name in unused} == {"post_layernorm.weight", "post_layernorm.bias"}
    assert published_shapes() == {name: shape for name, shape in listed.items() if name not in unused}
    # Sizes are those of the headers, so the published ones must come out of them.
    infos = {name: TensorInfo(name, shape, "F16", "") for name, shape in listed.items()}
    conversion = CONVERSIONS["llava_st"]
    read = conversion.complete_config(PUBLISHED, infos, options=conversion.options)
    assert conversion.build_config(read).to_dict() == conversion.build_config(PUBLISHED).to_dict()


@pytest.mark.parametrize("coordinates", ["folded", "split"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_there_and_back_is_the_same_bit_for_bit(layout: str, coordinates: str, tmp_path: Path) -> None:
    num_shards, kind = LAYOUTS[layout]
    state = write_llava_st_original(tmp_path / "original", num_shards=num_shards, kind=kind)
    options = {"coordinates": coordinates}
    report = convert_checkpoint(tmp_path / "original", tmp_path / "native", options=options, max_shard_bytes=30_000)
    assert report.num_stored == (len(state), len(state) - 2 - (6 if coordinates == "folded" else 0))
    assert not report.missing and not report.unused and not report.files_left
    assert len(list((tmp_path / "native").glob("model-*.safetensors"))) > 1
    reverse_checkpoint(tmp_path / "native", tmp_path / "back")
    assert_same_bits(read_weights(tmp_path / "back"), state)
    assert (tmp_path / "back" / "config.json").read_bytes() == (tmp_path / "original" / "config.json").read_bytes()
    if num_shards > 1:
        assert len(list((tmp_path / "back").glob("model-*.safetensors"))) == num_shards


@pytest.mark.parametrize("coordinates", ["folded", "split"])
@torch.no_grad()
def test_either_layout_answers_as_its_source(coordinates: str, tmp_path: Path) -> None:
    source = tiny_llava_st_model(coordinate_layout="split", **RELEASED)
    write_llava_st_original(tmp_path / "original", tokenizer=(6, 5))
    convert_checkpoint(tmp_path / "original", tmp_path / "native", options={"coordinates": coordinates})
    model, loading = LlavaSTForConditionalGeneration.from_pretrained(tmp_path / "native", output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"] and not loading["mismatched_keys"]
    assert model.config.coordinate_layout == coordinates
    same = [name for name in RELEASED if getattr(model.config, name) == RELEASED[name]]
    assert same == list(RELEASED)
    assert model.config.num_frames == 6 and model.config.packer_query == "center"
    config = model.config
    ids = [config.video_start_token_id, *[config.video_token_id] * (config.num_fast_positions - 2)]
    ids += [config.video_end_token_id, config.slow_video_start_token_id]
    ids += [*[config.video_token_id] * (config.num_slow_positions - 2), config.slow_video_end_token_id]
    ids += [config.temporal_input_token_id, config.coordinate_token_start + 3, 9]
    values = torch.zeros(1, len(ids))
    values[0, -3] = 0.37
    pixels = torch.rand(1, 6, 3, 32, 32)
    inputs = {"input_ids": torch.tensor([ids]), "pixel_values_videos": pixels, "coordinate_values": values}
    logits = [m.eval()(**inputs).logits for m in (source, model)]
    # One matrix product in place of two may add up in another order.
    torch.testing.assert_close(*logits, rtol=0, atol=1e-5)


def test_a_newline_row_of_the_base_model_is_tolerated_and_given_back(tmp_path: Path) -> None:
    state, _ = original_llava_st()
    state["model.image_newline"] = torch.randn(32)
    state["model.vision_tower.vision_tower.vision_model.embeddings.position_ids"] = torch.arange(16)[None]
    write_llava_st_original(tmp_path / "original", state=state)
    report = convert_checkpoint(tmp_path / "original", tmp_path / "native")
    assert {row.source.name for row in report.dropped} >= {"model.image_newline"}
    reverse_checkpoint(tmp_path / "native", tmp_path / "back")
    assert_same_bits(read_weights(tmp_path / "back"), state)


def test_processor_generation_settings_and_report(tmp_path: Path) -> None:
    write_llava_st_original(tmp_path / "original", tokenizer=(6, 5))
    (tmp_path / "original" / "generation_config.json").write_text(json.dumps({"eos_token_id": 7, "temperature": 0.2}))
    words = ["convert", str(tmp_path / "original"), str(tmp_path / "native"), "--no-card", "--quiet", "--sha256"]
    assert main(words) == 0
    processor = AutoProcessor.from_pretrained(tmp_path / "native")
    assert type(processor).__name__ == "LlavaSTProcessor" and processor.chat_template
    assert (processor.patch_size, processor.spatial_factor, processor.temporal_factor) == (8, 2, 3)
    assert processor.video_processor.num_frames == 6 and processor.tokenizer.padding_side == "left"
    assert processor.video_processor.size["height"] == processor.image_processor.size["height"] == 32
    config = AutoConfig.from_pretrained(tmp_path / "native")
    for name, token in (("video", "<vid_patch>"), ("width_output", "<WIDTH-OUTPUT>")):
        assert getattr(config, f"{name}_token_id") == processor.tokenizer.convert_tokens_to_ids(token)
    assert config.coordinate_token_start == processor.tokenizer.convert_tokens_to_ids("<TEMP-000>")
    generation = GenerationConfig.from_pretrained(tmp_path / "native")
    assert generation.eos_token_id == [processor.tokenizer.convert_tokens_to_ids("<|im_end|>"), 7]
    report = json.loads((tmp_path / "native" / "conversion_report.json").read_text())
    assert report["architecture"] == "llava_st" and report["complete"] and report["source_sha256"]
    assert report["num_source_tensors"] - report["num_target_tensors"] == 8
    assert [len(pieces) for pieces in report["joined"].values()] == [4, 4]
    assert any("splice_fast_stream" in note for note in report["notes"])


def test_without_a_tokenizer_ids_are_the_last_before_the_coordinates(tmp_path: Path) -> None:
    write_llava_st_original(tmp_path / "original")
    report = convert_checkpoint(tmp_path / "original", tmp_path / "native")
    assert any("no tokenizer" in note for note in report.notes)
    config, source = AutoConfig.from_pretrained(tmp_path / "native"), tiny_llava_st_model().config
    for name in ("image_start", "video", "slow_video_end", "temporal_input", "width_output"):
        assert getattr(config, f"{name}_token_id") == getattr(source, f"{name}_token_id")
    assert not (tmp_path / "native" / "processor_config.json").exists()


@pytest.mark.parametrize("kwargs", [{}, {"coordinate_layout": "split"}, {"tie_word_embeddings": True}], ids=str)
def test_a_model_trained_here_goes_back_to_the_original_layout(kwargs: dict[str, Any], tmp_path: Path) -> None:
    source = tiny_llava_st_model(**kwargs)
    source.save_pretrained(tmp_path / "native")
    report = reverse_checkpoint(tmp_path / "native", tmp_path / "original")
    assert any("no copy of the original config" in note for note in report.notes)
    back = read_weights(tmp_path / "original")
    assert set(TABLES) <= set(back) and len(back[EMBEDDING]) == len(back[HEAD]) == source.config.coordinate_token_start
    convert_checkpoint(tmp_path / "original", tmp_path / "again")
    again = LlavaSTForConditionalGeneration.from_pretrained(tmp_path / "again")
    if source.config.coordinate_layout == "split":
        again.unfold_coordinates()
    state = again.state_dict()
    for name, tensor in source.state_dict().items():
        assert torch.equal(tensor, state[name]), name


def test_architectures_of_one_model_type_are_told_apart() -> None:
    assert find_conversion(PUBLISHED) is CONVERSIONS["llava_st"]
    base = {**PUBLISHED, "mm_resampler_type": None, "mm_patch_merge_type": "spatial_unpad"}
    with pytest.raises(ValueError, match=r"(?s)several architectures.*not llava_st: .*LLaVA-OneVision.*neither"):
        find_conversion(base)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mm_resampler_type": "spatial_pool"}, r"mm_resampler_type 'spatial_pool'.*another model"),
        ({"mm_vision_tower": "openai/clip-vit-large-patch14-336"}, "SigLIP tower"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"quantization_config": {}}, "quantised"),
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"mm_perceiver_latents": 9}, "mm_perceiver_latents 9, but the packers make 4 tokens"),
        ({"vision_tower_overrides": None}, r"tower .* 32 wide.*\"vision_tower_overrides\""),
        ({"packer_overrides": None}, r"packers .* 16 wide.*\"packer_overrides\""),
        ({"packer_overrides": {"depth": 2}}, "packer_overrides has depth"),
        ({"num_hidden_layers": 3}, r"not filled by any tensor(?s:.)*layers\.2\."),
        ({"vocab_size": 300}, "of the wrong shape"),
        ({"rope_theta": "x"}, "rope_theta|could not convert"),
    ],
    ids=str,
)
def test_configs_that_do_not_fit_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_llava_st_original(tmp_path / "original", config=change)
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(tmp_path / "original", tmp_path / "native", model_type="llava_st")
    assert not (tmp_path / "native").exists()


def without(names: tuple[str, ...], prefix: str = " ") -> dict[str, torch.Tensor]:
    """The tiny weights without some tensors."""
    return {k: v for k, v in original_llava_st()[0].items() if k not in names and not k.startswith(prefix)}


def test_weights_without_coordinates_are_refused(tmp_path: Path) -> None:
    write_llava_st_original(tmp_path / "stage1", state=without(TABLES))
    with pytest.raises(ValueError, match=r"no coordinate tables.*after stage 1.*--lora-stages"):
        convert_checkpoint(tmp_path / "stage1", tmp_path / "native")
    write_llava_st_original(tmp_path / "base", state=without(TABLES, "model.vision_resampler"))
    with pytest.raises(ValueError, match=r"no coordinate tables.*This is no LLaVA-ST"):
        convert_checkpoint(tmp_path / "base", tmp_path / "native")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({TABLES[1]: 0}, r"damaged: model\.temporal_output_embeddings\.weight \[0, 32\].*ZeRO"),
        ({TABLES[2]: None}, r"spatial_height_input_embeddings\.weight missing"),
        ({TABLES[0]: 4}, "different numbers of rows.*temporal_input_embeddings.weight 4"),
        ({TABLES[4]: 4, TABLES[5]: 4}, "as many heights as widths"),
    ],
    ids=["empty", "missing", "sides", "axes"],
)
def test_damaged_tables_are_refused(rows: dict[str, int | None], message: str, tmp_path: Path) -> None:
    state, _ = original_llava_st()
    for name, count in rows.items():
        table = state.pop(name)
        if count is not None:
            state[name] = table[:count].clone()
    write_llava_st_original(tmp_path / "original", state=state)
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(tmp_path / "original", tmp_path / "native")


def test_tables_of_another_type_are_kept_apart_or_refused(tmp_path: Path) -> None:
    state, _ = original_llava_st()
    state[TABLES[0]] = state[TABLES[0]].half()
    write_llava_st_original(tmp_path / "original", state=state)
    with pytest.raises(ValueError, match=r"F32 and model\.temporal_input\S+ F16.*--coordinates split"):
        convert_checkpoint(tmp_path / "original", tmp_path / "native")
    convert_checkpoint(tmp_path / "original", tmp_path / "native", options={"coordinates": "split"})
    reverse_checkpoint(tmp_path / "native", tmp_path / "back")
    assert_same_bits(read_weights(tmp_path / "back"), state)


def test_values_that_are_not_finite_are_named(tmp_path: Path) -> None:
    state, _ = original_llava_st()
    state[TABLES[3]][1, 2] = torch.inf
    write_llava_st_original(tmp_path / "original", state=state)
    with pytest.raises(ValueError, match=rf"{TABLES[3]} in \S+ holds 1 values .* flat index 34 of 160"):
        convert_checkpoint(tmp_path / "original", tmp_path / "native")


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((6, 4), r"does not fit the coordinate tables: .*6 times and 4 heights.*6 and 5"),
        ((7, 5), "7 times"),
        (None, r"does not know <im_start>, .*<WIDTH-OUTPUT>"),
    ],
    ids=str,
)
def test_tokenizers_that_do_not_fit_the_tables_are_refused(
    sizes: tuple[int, int] | None, message: str, tmp_path: Path
) -> None:
    write_llava_st_original(tmp_path / "original", tokenizer=sizes)
    if sizes is None:
        tiny_tokenizer().save_pretrained(tmp_path / "original")
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(tmp_path / "original", tmp_path / "native")


def test_a_tokenizer_whose_ids_are_elsewhere_is_refused(tmp_path: Path) -> None:
    write_llava_st_original(tmp_path / "original", first_id=300, tokenizer=(6, 5))
    with pytest.raises(ValueError, match=r"<TEMP-000> has the id \d+ in the tokenizer, but .* 314 rows"):
        convert_checkpoint(tmp_path / "original", tmp_path / "native")


def test_rows_behind_the_coordinates_cannot_go_back(tmp_path: Path) -> None:
    model = tiny_llava_st_model()
    model.resize_token_embeddings(model.config.text_config.vocab_size + 3)
    model.save_pretrained(tmp_path / "native")
    with pytest.raises(ValueError, match=r"has no place for others\. Resize the embeddings to \d+ rows"):
        reverse_checkpoint(tmp_path / "native", tmp_path / "back")


def test_choices_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_llava_st_original(tmp_path / "original", tokenizer=(6, 5))
    words = ["convert", str(tmp_path / "original"), str(tmp_path / "native")]
    assert main([*words, "--coordinates", "split", "--no-card"]) == 0
    assert not (tmp_path / "native" / "README.md").exists()
    printed = capsys.readouterr().out
    assert re.search(
        r"model\.temporal_input_embeddings\.weight -> model\.coordinates\.temporal_input\.weight", printed
    )
    assert AutoConfig.from_pretrained(tmp_path / "native").coordinate_layout == "split"
    assert main([*words, "--overwrite"]) == 0
    assert re.search(r"lm_head\.weight = rows of lm_head\.weight, model\.temporal_output", capsys.readouterr().out)
    assert "LLaVA-ST" in (tmp_path / "native" / "README.md").read_text()
    back = ["convert", "--reverse", str(tmp_path / "native"), str(tmp_path / "back")]
    assert main([*back, "--coordinates", "split"]) == 2
    assert "no meaning with --reverse" in capsys.readouterr().err
    assert main(back) == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "back").get_vocab()["<TEMP-000>"]
    with pytest.raises(ValueError, match="expected one of folded, split, none"):
        convert_checkpoint(tmp_path / "original", tmp_path / "other", options={"coordinates": "joined"})


@pytest.fixture
def stages(tmp_path: Path) -> tuple[dict[str, torch.Tensor], Path]:
    """The weights of a stage-1 model, whose folder is written with its tokenizer."""
    state, config = original_llava_st()
    first, first_config = stage_one(state, config)
    (tmp_path / "stage1").mkdir()
    write_part(tmp_path / "stage1", first, first_config)
    tiny_llava_st_tokenizer(0, 0).save_pretrained(tmp_path / "stage1")
    return state, tmp_path


def merge_by_hand(state: dict[str, torch.Tensor], trained: list, scaling: list[float]) -> dict[str, torch.Tensor]:
    """The stages merged into a stage-1 model, one after the other."""
    first, _ = stage_one(state, {"vocab_size": len(state[HEAD])})
    mean = first[HEAD].mean(dim=0, keepdim=True)
    merged = {**first, HEAD: torch.cat([first[HEAD]] + [mean] * NUM_TEMPLATES)}
    for (adapter, own), factor in zip(trained, scaling, strict=True):
        merged |= own
        for name in {name.rpartition(".lora_")[0] for name in adapter}:
            delta = adapter[f"{name}.lora_B"] @ adapter[f"{name}.lora_A"]
            merged[f"{name}.weight"] = merged[f"{name}.weight"] + factor * delta
    return merged


def test_stages_are_merged_in_their_order(stages: tuple, capsys: pytest.CaptureFixture[str]) -> None:
    state, folder = stages
    trained = [write_stage(folder / "stage2", state, seed=1), write_stage(folder / "checkpoint-30", state, seed=2)]
    words = ["convert", str(folder / "stage1"), str(folder / "native"), "--no-card", "--sha256", "--lora-stages"]
    assert main([*words, str(folder / "stage2"), str(folder / "checkpoint-30")]) == 0
    printed = capsys.readouterr().out
    assert "lora_stages/1 (stage2) was merged: an adapter of rank 2 and alpha 6 into 2 matrices" in printed
    report = json.loads((folder / "native" / "conversion_report.json").read_text())
    assert set(report["source_sha256"]) == {
        "model.safetensors",
        "lora_stages/1/adapter_model.safetensors",
        "lora_stages/1/non_lora_trainables.bin",
        "lora_stages/2/global_step30/mp_rank_00_model_states.pt",
    }
    processor = AutoProcessor.from_pretrained(folder / "native")
    config = AutoConfig.from_pretrained(folder / "native")
    assert processor.tokenizer.convert_tokens_to_ids("<TEMP-000>") == config.coordinate_token_start
    assert len(processor.tokenizer) == config.text_config.vocab_size
    reverse_checkpoint(folder / "native", folder / "back")
    expected, back = merge_by_hand(state, trained, [3.0, 3.0]), read_weights(folder / "back")
    assert set(back) == set(expected)
    # The mean of rows and products of matrices, in another order of summation.
    torch.testing.assert_close(back, expected, rtol=0, atol=1e-5)
    # What goes back is a merged model that converts by itself, tokenizer included.
    convert_checkpoint(folder / "back", folder / "again")
    assert_same_bits(read_weights(folder / "again"), read_weights(folder / "native"))


def test_scaling_by_pattern_and_rank_stabilised(stages: tuple) -> None:
    state, folder = stages
    change = {"alpha_pattern": {"q_proj": 8}, "use_rslora": True}
    adapter, _ = write_stage(folder / "stage2", state, seed=1, rank=4, alpha=6, change=change)
    convert_checkpoint(folder / "stage1", folder / "native", options={"lora_stages": (folder / "stage2",)})
    reverse_checkpoint(folder / "native", folder / "back")
    back = read_weights(folder / "back")
    for number, alpha in ((0, 8), (1, 6)):
        name = LORA_TARGETS[number]
        delta = alpha / 2 * adapter[f"{name}.lora_B"] @ adapter[f"{name}.lora_A"]
        expected = state[f"{name}.weight"] + delta
        torch.testing.assert_close(back[f"{name}.weight"], expected, rtol=0, atol=1e-5)


def test_stages_in_half_precision_keep_the_type_of_the_model(stages: tuple) -> None:
    state, folder = stages
    first, config = stage_one(state, original_llava_st()[1])
    write_part(folder / "half", {name: tensor.half() for name, tensor in first.items()}, config)
    write_stage(folder / "stage2", state, seed=1)
    convert_checkpoint(folder / "half", folder / "native", options={"lora_stages": (folder / "stage2",)})
    assert {tensor.dtype for tensor in read_weights(folder / "native").values()} == {torch.float16}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "use_dora True"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"peft_type": "IA3"}, "peft_type 'IA3'"),
        ({"r": 3}, r"has .*'A': \[2, \d+\].* rank 3"),
    ],
    ids=str,
)
def test_adapters_of_another_kind_are_refused(change: dict[str, Any], message: str, stages: tuple) -> None:
    state, folder = stages
    write_stage(folder / "stage2", state, seed=1, change=change)
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(folder / "stage1", folder / "native", options={"lora_stages": (folder / "stage2",)})
    assert not (folder / "native").exists()


def test_stages_that_do_not_fit_the_model_are_refused(stages: tuple) -> None:
    state, folder = stages
    other = original_llava_st(text_kwargs={"hidden_size": 48})[0]
    write_stage(folder / "wider", other, seed=1)
    deeper = original_llava_st(num_hidden_layers=3)[0]
    write_stage(folder / "deeper", {**deeper, "model.layers.1.mlp.down_proj.weight": torch.ones(3, 4)}, seed=1)
    for name, message in (("wider", r"is \[16, 48\], but \[16, 32\] before"), ("deeper", "changes a matrix of")):
        with pytest.raises(ValueError, match=message):
            convert_checkpoint(folder / "stage1", folder / name[0], options={"lora_stages": (folder / name,)})
    write_stage(folder / "stage2", state, seed=1)
    extra = torch.load(folder / "stage2" / "non_lora_trainables.bin", weights_only=True)
    torch.save(
        {**extra, "base_model.model.model.foreign": torch.ones(1)}, folder / "stage2" / "non_lora_trainables.bin"
    )
    with pytest.raises(ValueError, match=r"1 tensors that .* does not have: model\.foreign"):
        convert_checkpoint(folder / "stage1", folder / "n", options={"lora_stages": (folder / "stage2",)})


def test_incomplete_or_hostile_stage_folders_are_refused(stages: tuple) -> None:
    state, folder = stages
    write_stage(folder / "stage2", state, seed=1)
    options = {"lora_stages": (folder / "stage2",)}
    file = folder / "stage2" / "non_lora_trainables.bin"
    file.write_bytes(pickle.dumps(Path("x"), protocol=2))
    with pytest.raises(ValueError, match="holds more than tensors"):
        convert_checkpoint(folder / "stage1", folder / "native", options=options)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"has no non_lora_trainables\.bin"):
        convert_checkpoint(folder / "stage1", folder / "native", options=options)
    (folder / "stage2" / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter_model\.safetensors or adapter_model\.bin"):
        convert_checkpoint(folder / "stage1", folder / "native", options=options)
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        convert_checkpoint(folder / "stage1", folder / "native", options={"lora_stages": (folder / "absent",)})
    assert not (folder / "native").exists()


def test_a_stage_1_model_by_itself_has_no_coordinates(stages: tuple) -> None:
    state, folder = stages
    convert_checkpoint(folder / "stage1", folder / "native", options={"coordinates": "none"})
    config = AutoConfig.from_pretrained(folder / "native")
    assert config.num_coordinate_tokens == 0 and config.num_frames == 6
    assert config.num_logits == len(state[HEAD]) - NUM_TEMPLATES
    LlavaSTForConditionalGeneration.from_pretrained(folder / "native")
    reverse_checkpoint(folder / "native", folder / "back")
    assert_same_bits(read_weights(folder / "back"), stage_one(state, {"vocab_size": len(state[HEAD])})[0])
    with pytest.raises(ValueError, match="these files hold coordinate tables"):
        write_llava_st_original(folder / "full")
        convert_checkpoint(folder / "full", folder / "other", options={"coordinates": "none"})
