"""Conversion of LongVU checkpoints on tiny random weights: there, back, and what is refused."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoProcessor, GenerationConfig

from longvideo.cli import main
from longvideo.conversion import CONVERSIONS, convert_checkpoint, reverse_checkpoint
from longvideo.conversion.longvu_config import native_fields
from longvideo.modeling.longvu.modeling_longvu import LongVUForConditionalGeneration
from tests.originals import assert_same_bits, read_weights, snapshot
from tests.originals_longvu import (
    DINO,
    SIGLIP,
    original_longvu,
    text_half,
    with_towers_inside,
    write_longvu_original,
    write_part,
)
from tests.tiny import tiny_tokenizer
from tests.tiny_longvu import tiny_longvu_model

LAYOUTS = {"single": (1, "safetensors"), "sharded": (3, "safetensors"), "bin": (1, "bin"), "sharded_bin": (2, "bin")}
KINDS: dict[str, dict[str, Any]] = {
    "qwen_video": {},
    "llama_video": {"text": "llama", "tie_word_embeddings": True},
    "qwen_image": {"image_token_len": 36, "highres": False},
    "llama_image": {"text": "llama", "image_token_len": 36, "highres": False},
}
QWEN_7B = {
    "model_type": "cambrian_qwen",
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "mm_projector_type": "sva",
    "mm_vision_tower_aux_list": ["siglip/CLIP-ViT-SO400M-14-384", "facebook/dinov2-giant-res378"],
    "mm_vision_tower_aux_token_len_list": [576, 576],
    "vision_hidden_size": 1024,
    "num_query_group": 1,
    "connector_depth": 3,
    "image_token_len": 144,
    "query_num_list": [144],
    "highres": True,
    "drop_threshold": 0.8,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LLAMA_3B = {
    **QWEN_7B,
    "model_type": "cambrian_llama",
    "vocab_size": 128256,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rope_theta": 500000.0,
    "rope_scaling": LLAMA3_ROPE,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
LLAMA_1B = {
    **LLAMA_3B,
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "head_dim": 64,
}
IMAGE = {"image_token_len": 576, "query_num_list": [576], "highres": False}
SAMPLER = "model.vision_sampler_0.layers.{3}."
# The published files' names and shapes, as the original classes create them ({n} for n numbers).
CONNECTOR_SHAPES = {
    "model.vision_query": "1,1024",
    "model.image_newline": "D",
    "model.mm_projector.0.weight": "D,1024",
    "model.mm_projector.0.bias": "D",
    "model.mm_projector.2.weight": "D,D",
    "model.mm_projector.2.bias": "D",
    "model.mm_projector_aux_0.0.weight": "1024,1152",
    "model.mm_projector_aux_1.0.weight": "1024,1536",
    "model.mm_projector_aux_{2}.0.bias": "1024",
    "model.mm_projector_aux_{2}.2.weight": "1024,1024",
    "model.mm_projector_aux_{2}.2.bias": "1024",
    "model.mm_projector_aux_{2}.3.weight": "1024",
    "model.mm_projector_aux_{2}.3.bias": "1024",
    f"{SAMPLER}pos_embed_{{2}}": "4,1024",
    f"{SAMPLER}proj_context.weight": "1024,1024",
    f"{SAMPLER}proj_in.weight": "1024,2048",
    f"{SAMPLER}proj_out.linear_1.weight": "1024,1024",
    f"{SAMPLER}proj_out.linear_2.weight": "1024,1024",
    f"{SAMPLER}norm.weight": "1024",
    f"{SAMPLER}norm.bias": "1024",
    f"{SAMPLER}cross_attn.o_proj.weight": "1024,1024",
    f"{SAMPLER}cross_attn.q_proj.0.weight": "1024",
    f"{SAMPLER}cross_attn.q_proj.0.bias": "1024",
    f"{SAMPLER}cross_attn.q_proj.1.weight": "1024,1024",
    f"{SAMPLER}cross_attn.k_proj_{{2}}.0.weight": "1024",
    f"{SAMPLER}cross_attn.k_proj_{{2}}.0.bias": "1024",
    f"{SAMPLER}cross_attn.k_proj_{{2}}.1.weight": "1024,1024",
    f"{SAMPLER}cross_attn.v_proj_{{2}}.0.weight": "1024",
    f"{SAMPLER}cross_attn.v_proj_{{2}}.0.bias": "1024",
    f"{SAMPLER}cross_attn.v_proj_{{2}}.1.weight": "1024,1024",
}


def numbered(name: str) -> list[str]:
    """Fill `{n}` with the numbers from 0."""
    found = re.search(r"\{(\d+)\}", name)
    if not found:
        return [name]
    return [full for i in range(int(found[1])) for full in numbered(name.replace(found[0], str(i), 1))]


@pytest.mark.parametrize(
    ("original", "num_tensors", "num_values"),
    [
        (QWEN_7B, 429, 7_671_665_664),
        ({**QWEN_7B, **IMAGE}, 423, 7_671_641_088),
        (LLAMA_3B, 345, 3_658_867_712),
        (LLAMA_1B, 237, 1_544_303_616),
    ],
    ids=["qwen2_7b", "qwen2_7b_img", "llama_3b", "llama_1b"],
)
def test_published_sizes_have_the_tensors_of_the_originals(
    original: dict[str, Any], num_tensors: int, num_values: int
) -> None:
    conversion = CONVERSIONS["longvu"]
    conversion.check_config(original)
    native = conversion.expected_shapes(conversion.build_config(original))
    rename = conversion.key_map(original).inverse().rename
    shapes = {rename(name): shape for name, shape in native.items()}
    towers = {name: shape for name, shape in shapes.items() if name.startswith("towers/")}
    own = {name: shape for name, shape in shapes.items() if name not in towers}
    assert (len(own), sum(torch.Size(shape).numel() for shape in own.values())) == (num_tensors, num_values)
    table = {
        full: tuple(original["hidden_size"] if part == "D" else int(part) for part in shape.split(","))
        for name, shape in CONNECTOR_SHAPES.items()
        for full in numbered(name)
    }
    if not original["highres"]:
        table = {name: shape for name, shape in table.items() if "pos_embed" not in name}
    connector = {
        name: shape for name, shape in own.items() if re.match(r"model\.(vision_|image_newline|mm_projector)", name)
    }
    assert connector == table
    # The public towers, less what is not used: SigLIP's head and last norm, DINOv2's mask token.
    assert towers["towers/siglip/vision_model.embeddings.position_embedding.weight"] == (729, 1152)
    assert towers["towers/dinov2/embeddings.position_embeddings"] == (1, 1370, 1536)
    assert towers["towers/dinov2/encoder.layer.39.mlp.weights_in.weight"] == (8192, 1536)
    assert sum(name.startswith("towers/siglip/vision_model.encoder.layers.") for name in towers) == 16 * 27
    assert sum(name.startswith("towers/dinov2/encoder.layer.") for name in towers) == 18 * 40


@pytest.mark.parametrize("layout", LAYOUTS)
def test_there_and_back_is_the_same_bit_for_bit(layout: str, tmp_path: Path) -> None:
    num_shards, kind = LAYOUTS[layout]
    states = write_longvu_original(tmp_path / "original", num_shards=num_shards, kind=kind)
    report = convert_checkpoint(tmp_path / "original", tmp_path / "native", max_shard_bytes=100_000)
    assert len(report.rows) == sum(len(state) for state in states.values())
    assert not report.missing and not report.unused and not report.files_left
    assert len(list((tmp_path / "native").glob("model-*.safetensors"))) > 1
    reverse_checkpoint(tmp_path / "native", tmp_path / "back")
    for part, state in states.items():
        back, original = tmp_path / "back" / part, tmp_path / "original" / part
        assert_same_bits(read_weights(back), state)
        assert (back / "config.json").read_bytes() == (original / "config.json").read_bytes()
        if num_shards > 1:
            assert len(list(back.glob("model-*.safetensors"))) == num_shards


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_checkpoint_loads_and_answers_as_its_source(kind: str, tmp_path: Path) -> None:
    source = tiny_longvu_model(**KINDS[kind])
    states = write_longvu_original(tmp_path / "original", tokenizer=True, **KINDS[kind])
    assert ("lm_head.weight" in states[""]) == (not source.config.tie_word_embeddings)
    convert_checkpoint(tmp_path / "original", tmp_path / "native")
    model, loading = LongVUForConditionalGeneration.from_pretrained(tmp_path / "native", output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"] and not loading["mismatched_keys"]
    assert (
        model.config.original_behaviour and model.config.text_config.model_type == source.config.text_config.model_type
    )
    source.config.original_behaviour = True
    ids = torch.tensor([[5, 4, 20, 30]])
    pixels = {"pixel_values_videos": torch.rand(3, 3, 28, 28), "pixel_values_videos_dino": torch.rand(3, 3, 28, 28)}
    counts = {"video_num_frames": torch.tensor([3]), "video_sizes": torch.tensor([[48, 32]])}
    with torch.no_grad():
        logits = [m.eval()(input_ids=ids, **pixels, **counts).logits for m in (source, model)]
    assert torch.equal(*logits)
    reverse_checkpoint(tmp_path / "native", tmp_path / "back")
    for part, state in states.items():
        assert_same_bits(read_weights(tmp_path / "back" / part), state)


def test_processor_and_generation_settings(tmp_path: Path) -> None:
    states, configs = original_longvu()
    write_longvu_original(tmp_path / "original", states=states, configs=configs, tokenizer=True)
    own = {"image_mean": [0.4, 0.4, 0.4], "size": {"shortest_edge": 256}}
    (tmp_path / "original" / DINO / "preprocessor_config.json").write_text(json.dumps(own))
    (tmp_path / "original" / "generation_config.json").write_text(json.dumps({"eos_token_id": 7, "temperature": 0.2}))
    report = convert_checkpoint(tmp_path / "original", tmp_path / "native")
    processor = AutoProcessor.from_pretrained(tmp_path / "native")
    assert type(processor).__name__ == "LongVUProcessor" and processor.chat_template
    for part in (processor.image_processor, processor.video_processor):
        assert part.size["height"] == part.dino_size["height"] == 28
        assert list(part.image_mean) == [0.5, 0.5, 0.5] and list(part.dino_image_mean) == [0.4, 0.4, 0.4]
    assert processor.tokenizer.padding_side == "left"
    generation = GenerationConfig.from_pretrained(tmp_path / "native")
    assert generation.eos_token_id == [2, 7] and generation.pad_token_id == 0
    config = AutoConfig.from_pretrained(tmp_path / "native")
    assert (config.image_token_id, config.video_token_id) == (3, 4)
    assert "preprocessor_config.json" not in " ".join(report.files_left)


def test_placeholders_beyond_the_table_and_llama_padding(tmp_path: Path) -> None:
    data = json.loads(tiny_tokenizer().backend_tokenizer.to_str())
    vocab = [token for token in data["model"]["vocab"] if "_pad|" not in token]
    vocab += ["<|eot_id|>", "<|reserved_special_token_0|>", "<|start_header_id|>", "<|end_header_id|>"]
    data["model"]["vocab"] = {token: i for i, token in enumerate(vocab)}
    data["added_tokens"] = [token for token in data["added_tokens"] if token["content"] == "<|im_start|>"]
    text = {"vocab_size": len(vocab)}
    write_longvu_original(tmp_path / "original", text="llama", text_kwargs=text)
    (tmp_path / "original" / "tokenizer.json").write_text(json.dumps(data))
    assert Tokenizer.from_file(str(tmp_path / "original" / "tokenizer.json")).get_vocab_size() == len(vocab)
    report = convert_checkpoint(tmp_path / "original", tmp_path / "native")
    config = AutoConfig.from_pretrained(tmp_path / "native")
    assert (config.image_token_id, config.video_token_id) == (len(vocab), len(vocab) + 1)
    assert any("none is spare" in note for note in report.notes)
    processor = AutoProcessor.from_pretrained(tmp_path / "native")
    assert processor.tokenizer.pad_token == "<|reserved_special_token_0|>"
    assert "<|start_header_id|>" in processor.chat_template
    assert vocab.index("<|eot_id|>") in GenerationConfig.from_pretrained(tmp_path / "native").eos_token_id


def test_without_a_tokenizer_there_is_no_processor(tmp_path: Path) -> None:
    write_longvu_original(tmp_path / "original")
    report = convert_checkpoint(tmp_path / "original", tmp_path / "native")
    config = AutoConfig.from_pretrained(tmp_path / "native")
    assert (config.image_token_id, config.video_token_id) == (264, 265)
    assert any("no tokenizer" in note for note in report.notes)
    assert not (tmp_path / "native" / "processor_config.json").exists()


def test_towers_given_by_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    states, configs = original_longvu()
    write_longvu_original(tmp_path / "original", states=states, configs=configs, towers=False)
    full = {"model_type": "siglip", "vision_config": configs[SIGLIP], "text_config": {"hidden_size": 8}}
    states[SIGLIP] |= text_half()
    write_part(tmp_path / "so400m", states[SIGLIP], full, num_shards=2)
    write_part(tmp_path / "giant", states[DINO], configs[DINO], kind="bin")
    (tmp_path / "so400m" / "readme.gif").write_bytes(b"GIF")
    words = ["convert", str(tmp_path / "original"), str(tmp_path / "native"), "--sha256", "--no-card"]
    towers = ["--vision-tower", str(tmp_path / "so400m"), "--dino-tower", str(tmp_path / "giant")]
    assert main([*words, *towers]) == 0
    printed = capsys.readouterr().out
    assert "towers/siglip/text_model.head.weight -> (dropped)" in printed and "readme.gif" in printed
    assert re.search(r"2 x towers/dinov2/encoder\.layer\.\{\}\.norm1\.weight -> model\.dino_tower\.", printed)
    report = json.loads((tmp_path / "native" / "conversion_report.json").read_text())
    assert {"towers/siglip/logit_scale", "towers/dinov2/embeddings.mask_token"} <= set(report["dropped"])
    assert set(report["source_sha256"]) == {
        "model.safetensors",
        "towers/siglip/model-00001-of-00002.safetensors",
        "towers/siglip/model-00002-of-00002.safetensors",
        "towers/dinov2/pytorch_model.bin",
    }
    assert main(["convert", "--reverse", "--quiet", str(tmp_path / "native"), str(tmp_path / "back")]) == 0
    for part, folder in (("", "original"), (SIGLIP, "so400m"), (DINO, "giant")):
        assert_same_bits(read_weights(tmp_path / "back" / part), states[part])
        config = (tmp_path / "back" / part / "config.json").read_bytes()
        assert config == (tmp_path / folder / "config.json").read_bytes()


def test_given_towers_come_before_those_beside_the_checkpoint(tmp_path: Path) -> None:
    states, configs = original_longvu()
    write_longvu_original(tmp_path / "original", states=states, configs=configs)
    other, _ = original_longvu(seed=1)
    write_part(tmp_path / "other", other[DINO], configs[DINO])
    convert_checkpoint(tmp_path / "original", tmp_path / "native", parts={"dino_tower": tmp_path / "other"})
    native = read_weights(tmp_path / "native")
    assert torch.equal(native["model.dino_tower.layernorm.weight"], other[DINO]["layernorm.weight"])
    cls = "embeddings.cls_token"
    assert torch.equal(native[f"model.dino_tower.{cls}"], other[DINO][cls])
    assert not torch.equal(other[DINO][cls], states[DINO][cls])


def test_a_tower_saved_by_transformers_5_has_no_prefix(tmp_path: Path) -> None:
    states, configs = original_longvu()
    states[SIGLIP] = {name.removeprefix("vision_model."): t for name, t in states[SIGLIP].items()}
    write_longvu_original(tmp_path / "original", states=states, configs=configs)
    convert_checkpoint(tmp_path / "original", tmp_path / "native")
    reverse_checkpoint(tmp_path / "native", tmp_path / "back")
    assert_same_bits(read_weights(tmp_path / "back" / SIGLIP), states[SIGLIP])


@pytest.mark.parametrize("folders", [True, False])
def test_towers_inside_the_checkpoint(folders: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    states, configs = original_longvu()
    inside = with_towers_inside(states)
    public, _ = original_longvu(seed=1)
    if not folders:  # Without a folder the towers have the published sizes, which are too large for a test.
        from longvideo.modeling.longvu import configuration_longvu as module

        monkeypatch.setattr(module, "SIGLIP_DEFAULTS", configs[SIGLIP])
        monkeypatch.setattr(module, "DINO_DEFAULTS", configs[DINO])
    write_longvu_original(tmp_path / "original", states={**public, "": inside}, configs=configs, towers=folders)
    report = convert_checkpoint(tmp_path / "original", tmp_path / "native")
    assert sum("in the checkpoint itself" in note for note in report.notes) == 2
    native = read_weights(tmp_path / "native")
    assert torch.equal(native["model.dino_tower.embeddings.cls_token"], states[DINO]["embeddings.cls_token"])
    reverse_checkpoint(tmp_path / "native", tmp_path / "back")
    assert_same_bits(read_weights(tmp_path / "back"), inside)
    assert not list((tmp_path / "back").glob("towers/*/*.safetensors"))


def test_unused_samplers_and_stored_frequencies_are_dropped_by_name(tmp_path: Path) -> None:
    states, configs = original_longvu()
    extra = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.rand(4),
        "model.vision_sampler_layers.1.layers.0.cross_attn.k_proj_1.0.bias": torch.rand(32),
    }
    states[""] |= extra
    states[""]["model.norm.weight"][0] = -0.0
    states[DINO] = {name: t.bfloat16() for name, t in states[DINO].items()}
    write_longvu_original(tmp_path / "original", states=states, configs=configs)
    report = convert_checkpoint(tmp_path / "original", tmp_path / "native")
    dropped = {row.source.name for row in report.dropped}
    assert set(extra) <= dropped
    reverse_checkpoint(tmp_path / "native", tmp_path / "back")
    for part, state in states.items():
        assert_same_bits(read_weights(tmp_path / "back" / part), state)


def test_tied_embeddings_with_and_without_a_head(tmp_path: Path) -> None:
    states, configs = original_longvu(**KINDS["llama_video"])
    write_longvu_original(tmp_path / "tied", states=states, configs=configs)
    report = convert_checkpoint(tmp_path / "tied", tmp_path / "native")
    assert any("lm_head.weight is not stored" in note for note in report.notes)
    model = LongVUForConditionalGeneration.from_pretrained(tmp_path / "native")
    assert model.lm_head.weight is model.get_input_embeddings().weight

    states[""]["lm_head.weight"] = states[""]["model.embed_tokens.weight"].clone()
    write_longvu_original(tmp_path / "same", states=states, configs=configs)
    convert_checkpoint(tmp_path / "same", tmp_path / "same_native")
    assert AutoConfig.from_pretrained(tmp_path / "same_native").tie_word_embeddings
    reverse_checkpoint(tmp_path / "same_native", tmp_path / "same_back")
    assert_same_bits(read_weights(tmp_path / "same_back"), states[""])

    states[""]["lm_head.weight"] += 1
    write_longvu_original(tmp_path / "two", states=states, configs=configs)
    report = convert_checkpoint(tmp_path / "two", tmp_path / "untied")
    assert any("two different matrices" in note for note in report.notes)
    model = LongVUForConditionalGeneration.from_pretrained(tmp_path / "untied")
    assert torch.equal(model.lm_head.weight, states[""]["lm_head.weight"])
    assert torch.equal(model.get_input_embeddings().weight, states[""]["model.embed_tokens.weight"])


def test_a_fine_tuned_model_without_the_kept_originals_goes_back(tmp_path: Path) -> None:
    write_longvu_original(tmp_path / "original")
    convert_checkpoint(tmp_path / "original", tmp_path / "native")
    model = LongVUForConditionalGeneration.from_pretrained(tmp_path / "native")
    with torch.no_grad():
        model.model.vision_query.add_(1)
    model.save_pretrained(tmp_path / "tuned")
    assert read_weights(tmp_path / "tuned").keys() == read_weights(tmp_path / "native").keys()
    report = reverse_checkpoint(tmp_path / "tuned", tmp_path / "back")
    assert any("no copy of the original config" in note for note in report.notes)
    convert_checkpoint(tmp_path / "back", tmp_path / "again")
    assert_same_bits(read_weights(tmp_path / "again"), read_weights(tmp_path / "tuned"))
    again, tuned = (AutoConfig.from_pretrained(tmp_path / name).to_dict() for name in ("again", "tuned"))
    for config in (again, tuned):
        for name in ("text_config", "vision_config", "dino_config"):
            # Not the architecture: where it was loaded from and in which dtype.
            config[name].pop("_name_or_path", None)
            config[name].pop("dtype", None)
    for name in (
        "vision_config",
        "dino_config",
        "image_token_len",
        "connector_num_heads",
        "drop_threshold",
        "highres",
    ):
        assert again[name] == tuned[name], name
    assert again["text_config"]["rope_parameters"] == tuned["text_config"]["rope_parameters"]


def test_rules_without_words_in_the_original_come_back(tmp_path: Path) -> None:
    rules = {
        "temporal_reduction": "paper",
        "stc_anchor": "middle",
        "dino_position_interpolation": "size",
        "forced_removal": True,
        "max_kept_frames": 7,
    }
    tiny_longvu_model(**rules).save_pretrained(tmp_path / "tuned")
    report = reverse_checkpoint(tmp_path / "tuned", tmp_path / "back")
    [note] = [note for note in report.notes if "has no words for" in note]
    assert "temporal_reduction='paper'" in note and "original_behaviour=False" in note
    convert_checkpoint(tmp_path / "back", tmp_path / "again")
    again = AutoConfig.from_pretrained(tmp_path / "again")
    assert {name: getattr(again, name) for name in rules} == rules
    assert again.original_behaviour is False


def test_missing_fields_have_the_fallbacks_of_the_original_code(tmp_path: Path) -> None:
    names = ("dino_threshold", "drop_threshold", "lowres_token", "inference_max_length", "frame_pos", "highres")
    bare = {name: value for name, value in QWEN_7B.items() if name not in {*names, "query_num_list"}}
    fields = native_fields(bare, None, None)
    assert [fields[name] for name in names] == [0.83, 0.7, 8, 16, False, False]
    assert (fields["context_length"], fields["image_token_len"], fields["vision_grid_size"]) == (8192, 144, 24)
    del bare["mm_vision_tower_aux_token_len_list"], bare["rope_theta"]
    assert (
        native_fields({**bare, "query_num_list": [144], "image_token_len": None}, None, None)["image_token_len"] == 144
    )
    given = {**bare, "tokenizer_model_max_length": 4096, "frame_pos": True, "drop_threshold": 0.65}
    config = CONVERSIONS["longvu"].build_config(given)
    assert (config.context_length, config.frame_pos, config.drop_threshold) == (4096, True, 0.65)
    assert config.original_behaviour and all(config.behaves(name) for name in ("forced_removal", "count_to_pad_id"))


def test_rope_of_both_decoders() -> None:
    conversion = CONVERSIONS["longvu"]
    llama = conversion.build_config(LLAMA_3B).text_config
    assert llama.rope_parameters == {**LLAMA3_ROPE, "rope_theta": 500000.0}
    assert llama.tie_word_embeddings and llama.head_dim == 128
    # The original's Qwen2 class sets the field to None.
    qwen = conversion.build_config({**QWEN_7B, "rope_scaling": {"type": "yarn", "factor": 4.0}}).text_config
    assert qwen.rope_parameters == {"rope_type": "default", "rope_theta": 1000000.0}


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_longvu_original(tmp_path / "original", tokenizer=True)
    assert main(["convert", str(tmp_path / "original"), str(tmp_path / "native"), "--no-card"]) == 0
    assert main(["convert", "--reverse", "--quiet", str(tmp_path / "native"), str(tmp_path / "back")]) == 0
    given, back = snapshot(tmp_path / "original"), snapshot(tmp_path / "back")
    assert back.keys() - given.keys() == {"conversion_report.json"} and given.keys() <= back.keys()
    assert all(back[name] == data for name, data in given.items() if not name.endswith(".safetensors"))
    capsys.readouterr()
    words = ["convert", "--reverse", str(tmp_path / "native"), str(tmp_path / "x"), "--dino-tower", "y"]
    assert main(words) == 2
    assert "no meaning with --reverse" in capsys.readouterr().err


def test_bf16_towers_and_a_cast(tmp_path: Path) -> None:
    states = write_longvu_original(tmp_path / "original")
    convert_checkpoint(tmp_path / "original", tmp_path / "native", dtype="bf16")
    native = read_weights(tmp_path / "native")
    assert {tensor.dtype for tensor in native.values()} == {torch.bfloat16}
    norm = "layernorm.weight"
    assert torch.equal(native[f"model.dino_tower.{norm}"], states[DINO][norm].bfloat16())
    model = LongVUForConditionalGeneration.from_pretrained(tmp_path / "native", dtype="auto")
    assert model.dtype == model.model.dino_tower.dtype == torch.bfloat16
