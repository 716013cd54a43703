"""Conversion of VideoChat-Flash checkpoints on tiny random weights: there, back, and what is refused."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoProcessor, GenerationConfig, PreTrainedTokenizerFast

from longvideo.cli import main
from longvideo.conversion import CONVERSIONS, convert_checkpoint, reverse_checkpoint
from longvideo.conversion.convert_videochat_flash import add_placeholders, rope_parameters, tower_sizes
from longvideo.modeling.videochat_flash.modeling_videochat_flash import VideoChatFlashForConditionalGeneration
from tests.originals import assert_same_bits, original_state, read_weights, snapshot, write_original
from tests.tiny import tiny_tokenizer, tiny_videochat_flash_config, tiny_videochat_flash_model

TOWERS = ("umt_vision_model", "internvideo2_vision_model")
LAYOUTS = {"single": (1, "safetensors"), "sharded": (3, "safetensors"), "bin": (1, "bin"), "sharded_bin": (2, "bin")}


def published_config(tower: str, **text: Any) -> dict[str, Any]:
    """The original config of a published size."""
    return {
        "model_type": "videochat_flash_qwen",
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "mm_vision_tower": tower,
        "mm_vision_select_layer": -2,
        "mm_hidden_size": 1408 if tower == "internvideo2" else 1024,
        "mm_projector_type": "tome16_mlp_hd64",
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
        **text,
    }


QWEN_2B = {
    "vocab_size": 151936,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
}
# Spec of the published files: names and shapes as the original classes create them.
TEXT_SHAPES = {
    "model.embed_tokens.weight": "V,D",
    "model.layers.{28}.self_attn.q_proj.weight": "D,D",
    "model.layers.{28}.self_attn.q_proj.bias": "D",
    "model.layers.{28}.self_attn.k_proj.weight": "K,D",
    "model.layers.{28}.self_attn.k_proj.bias": "K",
    "model.layers.{28}.self_attn.v_proj.weight": "K,D",
    "model.layers.{28}.self_attn.v_proj.bias": "K",
    "model.layers.{28}.self_attn.o_proj.weight": "D,D",
    "model.layers.{28}.mlp.gate_proj.weight": "I,D",
    "model.layers.{28}.mlp.up_proj.weight": "I,D",
    "model.layers.{28}.mlp.down_proj.weight": "D,I",
    "model.layers.{28}.input_layernorm.weight": "D",
    "model.layers.{28}.post_attention_layernorm.weight": "D",
    "model.norm.weight": "D",
    "lm_head.weight": "V,D",
    "model.mm_projector.mlp.0.weight": "D,C",
    "model.mm_projector.mlp.0.bias": "D",
    "model.mm_projector.mlp.2.weight": "D,D",
    "model.mm_projector.mlp.2.bias": "D",
}
UMT = "model.vision_tower.vision_tower.encoder."
UMT_SHAPES = {
    f"{UMT}patch_embed.proj.weight": "1024,3,1,16,16",
    f"{UMT}patch_embed.proj.bias": "1024",
    f"{UMT}blocks.{{23}}.norm1.weight": "1024",
    f"{UMT}blocks.{{23}}.norm1.bias": "1024",
    f"{UMT}blocks.{{23}}.norm2.weight": "1024",
    f"{UMT}blocks.{{23}}.norm2.bias": "1024",
    f"{UMT}blocks.{{23}}.attn.q_bias": "1024",
    f"{UMT}blocks.{{23}}.attn.v_bias": "1024",
    f"{UMT}blocks.{{23}}.attn.qkv.weight": "3072,1024",
    f"{UMT}blocks.{{23}}.attn.proj.weight": "1024,1024",
    f"{UMT}blocks.{{23}}.attn.proj.bias": "1024",
    f"{UMT}blocks.{{23}}.mlp.fc1.weight": "4096,1024",
    f"{UMT}blocks.{{23}}.mlp.fc1.bias": "4096",
    f"{UMT}blocks.{{23}}.mlp.fc2.weight": "1024,4096",
    f"{UMT}blocks.{{23}}.mlp.fc2.bias": "1024",
    f"{UMT}vision_layernorm.weight": "1024",
    f"{UMT}vision_layernorm.bias": "1024",
}
IV2 = "model.vision_tower.vision_tower."
IV2_SHAPES = {
    f"{IV2}cls_token": "1,1,1408",
    f"{IV2}pos_embed": "1,1025,1408",
    f"{IV2}img_pos_embed": "1,257,1408",
    f"{IV2}patch_embed.proj.weight": "1408,3,1,14,14",
    f"{IV2}patch_embed.proj.bias": "1408",
    f"{IV2}blocks.{{39}}.norm1.weight": "1408",
    f"{IV2}blocks.{{39}}.norm2.weight": "1408",
    f"{IV2}blocks.{{39}}.attn.qkv.weight": "4224,1408",
    f"{IV2}blocks.{{39}}.attn.proj.weight": "1408,1408",
    f"{IV2}blocks.{{39}}.attn.proj.bias": "1408",
    f"{IV2}blocks.{{39}}.attn.q_norm.weight": "1408",
    f"{IV2}blocks.{{39}}.attn.k_norm.weight": "1408",
    f"{IV2}blocks.{{39}}.ls1.weight": "1408",
    f"{IV2}blocks.{{39}}.ls2.weight": "1408",
    f"{IV2}blocks.{{39}}.mlp.fc1.weight": "6144,1408",
    f"{IV2}blocks.{{39}}.mlp.fc1.bias": "6144",
    f"{IV2}blocks.{{39}}.mlp.fc2.weight": "1408,6144",
    f"{IV2}blocks.{{39}}.mlp.fc2.bias": "1408",
}


def written_out(table: dict[str, str], letters: dict[str, int]) -> dict[str, tuple[int, ...]]:
    """Fill layer numbers and letters."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, text in table.items():
        shape = tuple(letters.get(part) or int(part) for part in text.split(","))
        count = re.search(r"\{(\d+)\}", name)
        for i in range(int(count[1]) if count else 1):
            shapes[re.sub(r"\{\d+\}", str(i), name)] = shape
    return shapes


@pytest.mark.parametrize(
    ("tower", "text", "num_tensors", "num_values"),
    [
        ("umt-hd-large", {}, 646, 7_922_617_856),
        ("umt-large", {}, 646, 7_922_617_856),
        ("umt-hd-large", QWEN_2B, 646, 2_071_502_336),
        ("internvideo2", {}, 855, 8_620_852_736),
    ],
    ids=["7B_res448", "7B_res224", "2B_res448", "7B_internvideo2"],
)
def test_published_sizes_have_the_tensors_of_the_originals(
    tower: str, text: dict[str, Any], num_tensors: int, num_values: int
) -> None:
    original = published_config(tower, **text)
    conversion = CONVERSIONS["videochat_flash"]
    conversion.check_config(original)
    native = conversion.expected_shapes(conversion.build_config(original))
    rename = conversion.key_map(original).inverse().rename
    shapes = {rename(name): shape for name, shape in native.items()}
    assert len(shapes) == num_tensors
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == num_values
    letters = {"V": original["vocab_size"], "D": original["hidden_size"], "I": original["intermediate_size"]}
    letters |= {"K": 128 * original["num_key_value_heads"], "C": original["mm_hidden_size"]}
    assert shapes == written_out(TEXT_SHAPES | (IV2_SHAPES if tower == "internvideo2" else UMT_SHAPES), letters)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tower", TOWERS)
def test_there_and_back_is_the_same_bit_for_bit(tower: str, layout: str, tmp_path: Path) -> None:
    num_shards, kind = LAYOUTS[layout]
    state, _ = write_original(tmp_path / "original", tower=tower, num_shards=num_shards, kind=kind)
    report = convert_checkpoint(tmp_path / "original", tmp_path / "native", max_shard_bytes=100_000)
    reverse_checkpoint(tmp_path / "native", tmp_path / "back")
    assert len(report.kept) == len(state) and not report.missing and not report.unused
    assert_same_bits(read_weights(tmp_path / "back"), state)
    assert (tmp_path / "back" / "config.json").read_bytes() == (tmp_path / "original" / "config.json").read_bytes()
    assert len(list((tmp_path / "native").glob("model-*.safetensors"))) > 1
    if num_shards > 1:
        assert len(list((tmp_path / "back").glob("model-*.safetensors"))) == num_shards


def test_mixed_dtypes_and_dropped_tensors_come_back(tmp_path: Path) -> None:
    state, _ = original_state()
    state = {name: t.bfloat16() if "vision_tower" in name else t for name, t in state.items()}
    state["lm_head.weight"] = state["lm_head.weight"].half()
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.rand(4)
    state["model.norm.weight"][0] = -0.0
    write_original(tmp_path / "original", state=state)
    report = convert_checkpoint(tmp_path / "original", tmp_path / "native")
    assert [row.source.name for row in report.dropped] == ["model.layers.0.self_attn.rotary_emb.inv_freq"]
    native = read_weights(tmp_path / "native")
    assert native["model.vision_tower.patch_embed.proj.weight"].dtype == torch.bfloat16
    assert not any("inv_freq" in name for name in native)
    reverse_checkpoint(tmp_path / "native", tmp_path / "back")
    assert_same_bits(read_weights(tmp_path / "back"), state)


@pytest.mark.parametrize("model_type", ["llava_qwen_flash", "videochat_flash_qwen", "llava_qwen"])
def test_converted_folder_loads_and_answers_as_the_source_model(model_type: str, tmp_path: Path) -> None:
    source = tiny_videochat_flash_model()
    write_original(tmp_path / "original", config={"model_type": model_type}, tokenizer=True)
    convert_checkpoint(tmp_path / "original", tmp_path / "native")
    model, loading = VideoChatFlashForConditionalGeneration.from_pretrained(
        tmp_path / "native", output_loading_info=True
    )
    assert not loading["missing_keys"] and not loading["unexpected_keys"] and not loading["mismatched_keys"]
    ids = torch.tensor([[5, *[4] * 16, 20, 30]])
    inputs = {"input_ids": ids, "pixel_values_videos": torch.rand(1, 4, 3, 32, 32)}
    with torch.no_grad():
        logits = [m.eval()(**inputs).logits for m in (source, model)]
    assert torch.equal(*logits)
    processor = AutoProcessor.from_pretrained(tmp_path / "native")
    assert type(processor).__name__ == "VideoChatFlashProcessor"
    assert processor.video_processor.size["height"] == 32 and processor.tokens_per_frame == 4
    assert processor.tokenizer.padding_side == "left"
    assert GenerationConfig.from_pretrained(tmp_path / "native").eos_token_id == 2
    assert AutoConfig.from_pretrained(tmp_path / "native").video_token_id == 4


def test_old_generation_settings_and_chat_template(tmp_path: Path) -> None:
    write_original(tmp_path / "original", tokenizer=True)
    path = tmp_path / "original" / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": "of the text model"}))
    (tmp_path / "original" / "modeling_x.py").write_text("")
    settings = {"do_sample": False, "temperature": 0.0, "eos_token_id": 7}
    (tmp_path / "original" / "generation_config.json").write_text(json.dumps(settings))
    report = convert_checkpoint(tmp_path / "original", tmp_path / "native")
    assert any("left out: do_sample, temperature" in note for note in report.notes)
    assert report.files_left == ["modeling_x.py"]
    generation = GenerationConfig.from_pretrained(tmp_path / "native")
    assert generation.eos_token_id == [2, 7] and generation.pad_token_id == 0
    assert "video" in AutoProcessor.from_pretrained(tmp_path / "native").chat_template


def test_cast_is_what_was_asked_for(tmp_path: Path) -> None:
    state, _ = write_original(tmp_path / "original")
    report = convert_checkpoint(tmp_path / "original", tmp_path / "native", dtype="bf16")
    native = read_weights(tmp_path / "native")
    assert {tensor.dtype for tensor in native.values()} == {torch.bfloat16}
    assert torch.equal(native["model.language_model.norm.weight"], state["model.norm.weight"].bfloat16())
    assert json.loads((tmp_path / "native" / "config.json").read_text())["dtype"] == "bfloat16"
    assert any("not the source's values" in note for note in report.notes)
    model = VideoChatFlashForConditionalGeneration.from_pretrained(tmp_path / "native", dtype="auto")
    assert model.dtype == torch.bfloat16


def test_a_fine_tuned_model_without_the_kept_originals_goes_back(tmp_path: Path) -> None:
    model = tiny_videochat_flash_model(tower="internvideo2_vision_model", mm_llm_compress=True)
    model.save_pretrained(tmp_path / "tuned")
    report = reverse_checkpoint(tmp_path / "tuned", tmp_path / "back")
    assert any("no copy of the original config" in note for note in report.notes)
    convert_checkpoint(tmp_path / "back", tmp_path / "again")
    assert_same_bits(read_weights(tmp_path / "again"), read_weights(tmp_path / "tuned"))
    again, tuned = (AutoConfig.from_pretrained(tmp_path / name).to_dict() for name in ("again", "tuned"))
    for name in ("vision_config", "mm_llm_compress", "tokens_per_frame", "llm_compress_layer_list"):
        assert again[name] == tuned[name], name
    assert again["text_config"]["rope_parameters"] == tuned["text_config"]["rope_parameters"]


def test_settings_without_words_in_the_original_come_back(tmp_path: Path) -> None:
    config = tiny_videochat_flash_config(vision_chunk_size=3, projector_hidden_act="relu")
    config.vision_config.position_grid_size = 6
    torch.manual_seed(0)
    model = VideoChatFlashForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path / "tuned")
    report = reverse_checkpoint(tmp_path / "tuned", tmp_path / "back")
    [note] = [note for note in report.notes if "has no words for" in note]
    for setting in ("vision_config.position_grid_size=6", "projector_hidden_act='relu'", "vision_chunk_size=3"):
        assert setting in note
    convert_checkpoint(tmp_path / "back", tmp_path / "again")
    again = VideoChatFlashForConditionalGeneration.from_pretrained(tmp_path / "again")
    assert again.config.vision_chunk_size == 3 and again.config.vision_config.position_grid_size == 6
    pixels = torch.randn(1, 4, 3, 32, 32)
    with torch.no_grad():
        found, expected = (x.get_video_features(pixels).pooler_output[0] for x in (again, model))
    assert torch.equal(found, expected)


def test_settings_changed_beside_the_kept_config_are_named(tmp_path: Path) -> None:
    write_original(tmp_path / "original")
    convert_checkpoint(tmp_path / "original", tmp_path / "native")
    report = reverse_checkpoint(tmp_path / "native", tmp_path / "back")
    assert not any("as it was kept" in note or "has no words for" in note for note in report.notes), report.notes
    path = tmp_path / "native" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "mm_llm_compress": True}))
    report = reverse_checkpoint(tmp_path / "native", tmp_path / "again")
    [note] = [note for note in report.notes if "as it was kept" in note]
    assert "mm_llm_compress=True" in note


def test_a_wrong_entry_of_native_settings_is_refused(tmp_path: Path) -> None:
    write_original(tmp_path / "original")
    path = tmp_path / "original" / "config.json"
    given = json.loads(path.read_text())
    for value, message in ((3, "expected an object"), ({"tokens_per_frame": "many"}, "do not fit videochat_flash")):
        path.write_text(json.dumps({**given, "longvideo_settings": value}))
        with pytest.raises(ValueError, match=f"longvideo_settings.*{message}"):
            convert_checkpoint(tmp_path / "original", tmp_path / "native")


def test_kept_original_config_of_another_size_is_refused(tmp_path: Path) -> None:
    write_original(tmp_path / "original")
    convert_checkpoint(tmp_path / "original", tmp_path / "native")
    kept = tmp_path / "native" / "original" / "config.json"
    kept.write_text(json.dumps({**json.loads(kept.read_text()), "vocab_size": 100}))
    with pytest.raises(ValueError, match=r"other sizes .* Remove the folder original"):
        reverse_checkpoint(tmp_path / "native", tmp_path / "back")


def test_tied_embeddings(tmp_path: Path) -> None:
    state, _ = original_state()
    without = {name: tensor for name, tensor in state.items() if name != "lm_head.weight"}
    write_original(tmp_path / "tied", state=without, config={"tie_word_embeddings": True})
    report = convert_checkpoint(tmp_path / "tied", tmp_path / "native")
    assert any("lm_head.weight is not stored" in note for note in report.notes)
    model = VideoChatFlashForConditionalGeneration.from_pretrained(tmp_path / "native")
    assert model.lm_head.weight is model.get_input_embeddings().weight
    reverse_checkpoint(tmp_path / "native", tmp_path / "back")
    assert_same_bits(read_weights(tmp_path / "back"), without)

    write_original(tmp_path / "two", state=state, config={"tie_word_embeddings": True})
    report = convert_checkpoint(tmp_path / "two", tmp_path / "untied")
    assert any("two different matrices" in note for note in report.notes)
    model = VideoChatFlashForConditionalGeneration.from_pretrained(tmp_path / "untied")
    assert torch.equal(model.lm_head.weight, state["lm_head.weight"])
    assert torch.equal(model.get_input_embeddings().weight, state["model.embed_tokens.weight"])
    reverse_checkpoint(tmp_path / "untied", tmp_path / "two_back")
    assert_same_bits(read_weights(tmp_path / "two_back"), state)


@pytest.mark.parametrize(
    ("name", "kind", "side", "depth"),
    [
        ("umt-large", "umt_vision_model", 224, 23),
        ("umt-hd-large", "umt_vision_model", 448, 23),
        ("internvideo2", "internvideo2_vision_model", 224, 39),
        ("OpenGVLab/internvideo2-umt", "internvideo2_vision_model", 224, 39),
    ],
)
def test_tower_is_chosen_by_substring_in_the_originals_order(name: str, kind: str, side: int, depth: int) -> None:
    sizes = tower_sizes({"mm_vision_tower": name, "mm_hidden_size": 1408 if "intern" in kind else 1024})
    assert (sizes["model_type"], sizes["image_size"], sizes["num_hidden_layers"]) == (kind, side, depth)
    assert sizes["intermediate_size"] == (6144 if "intern" in kind else 4096)


def test_yarn_passes_through() -> None:
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    config = CONVERSIONS["videochat_flash"].build_config(published_config("umt-large", rope_scaling=scaling))
    assert config.text_config.rope_parameters == {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32768,
        "rope_theta": 1000000.0,
    }
    assert rope_parameters({"rope_theta": 5e5}) == {"rope_theta": 5e5, "rope_type": "default"}


def test_placeholders_are_added_and_a_full_table_is_said() -> None:
    tokenizer = tiny_tokenizer()
    config = tiny_videochat_flash_config()
    assert add_placeholders(tokenizer, config) == []
    data = json.loads(tokenizer.backend_tokenizer.to_str())
    data["added_tokens"] = [token for token in data["added_tokens"] if "_pad|" not in token["content"]]
    data["model"]["vocab"] = {k: v for k, v in data["model"]["vocab"].items() if "_pad|" not in k}
    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(data)))
    config.text_config.vocab_size = len(bare) + 1
    notes = add_placeholders(bare, config)
    assert {config.image_token_id, config.video_token_id} == {len(bare) - 2, len(bare) - 1}
    assert len(notes) == 2 and "none is spare" in notes[1]


def test_without_a_tokenizer_placeholders_lie_beyond_the_table(tmp_path: Path) -> None:
    write_original(tmp_path / "original")
    report = convert_checkpoint(tmp_path / "original", tmp_path / "native")
    config = AutoConfig.from_pretrained(tmp_path / "native")
    assert (config.image_token_id, config.video_token_id) == (264, 265)
    assert any("no tokenizer" in note for note in report.notes)
    assert not (tmp_path / "native" / "processor_config.json").exists()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "llava_next"}, r"model_type 'llava_next'; originals that can be converted: .*--model-type"),
        ({"model_type": "videochat_flash"}, r"in the Transformers layout already .* --reverse"),
        ({"mm_projector_type": "mlp2x_gelu"}, r"mm_projector_type 'mlp2x_gelu'.*another architecture"),
        ({"mm_vision_tower": "google/siglip-so400m"}, r"mm_vision_tower 'google/siglip-so400m', an image tower"),
        ({"mm_vision_tower": "dinov2"}, r"mm_vision_tower 'dinov2'; expected a name with internvideo2, umt-hd, umt"),
        ({"mm_vision_select_layer": 3}, r"mm_vision_select_layer 3; expected a number from -3 to -1"),
        ({"mm_hidden_size": 99}, r"mm_hidden_size 99, but the tower .* is 32 wide"),
        ({"hidden_size": "wide"}, r"(?s)value of the wrong type: .*hidden_size"),
        ({"hidden_size": None}, r"lacks hidden_size; expected the config of a VideoChat-Flash checkpoint"),
        ({"mm_newline_position": "grid"}, r"mm_newline_position 'grid', which needs parts"),
        ({"quantization_config": {"load_in_4bit": True}}, r"quantised weights"),
        ({"llm_compress_type": "random"}, r"llm_compress_type is 'random'; choose one of"),
        ({"vision_tower_overrides": {"depth": 3}}, r"vision_tower_overrides has depth; expected"),
        ({"num_attention_heads": 5}, r"does not describe|not fit|divisible|shape|multiple"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_configs_that_are_refused(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_original(tmp_path / "original", config=config)
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(tmp_path / "original", tmp_path / "native")
    assert [path.name for path in tmp_path.iterdir()] == ["original"]


def test_model_type_can_be_insisted_on(tmp_path: Path) -> None:
    write_original(tmp_path / "original", config={"model_type": "qwen2"})
    with pytest.raises(ValueError, match="--model-type"):
        convert_checkpoint(tmp_path / "original", tmp_path / "native")
    convert_checkpoint(tmp_path / "original", tmp_path / "native", model_type="videochat_flash")
    with pytest.raises(ValueError, match=r"'nothing' is unknown; expected auto or one of \[.*'videochat_flash'.*\]"):
        convert_checkpoint(tmp_path / "original", tmp_path / "other", model_type="nothing")


def test_every_hole_is_listed(tmp_path: Path) -> None:
    state, _ = original_state()
    del state["model.norm.weight"]
    state["model.layers.1.mlp.up_proj.weight"] = state["model.layers.1.mlp.up_proj.weight"].T
    state["model.extra.weight"] = torch.zeros(2)
    state["model.layers.7.mlp.up_proj.weight"] = torch.zeros(48, 32)
    write_original(tmp_path / "original", state=state)
    with pytest.raises(ValueError) as caught:
        convert_checkpoint(tmp_path / "original", tmp_path / "native")
    text = str(caught.value)
    assert "model.language_model.norm.weight [32]" in text
    assert "model.layers.1.mlp.up_proj.weight: the file has [32, 48], config.json asks for [48, 32]" in text
    assert "model.extra.weight [2]" in text
    assert "the config has no model.language_model.layers.7.mlp.up_proj.weight" in text
    assert not (tmp_path / "native").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_named(value: float, tmp_path: Path) -> None:
    state, _ = original_state()
    state["model.layers.2.mlp.down_proj.weight"][1, 3] = value
    write_original(tmp_path / "original", state=state, num_shards=2)
    with pytest.raises(ValueError, match=r"model\.layers\.2\.mlp\.down_proj\.weight in .*1 values .*index 51 of 1536"):
        convert_checkpoint(tmp_path / "original", tmp_path / "native")
    assert [path.name for path in tmp_path.iterdir()] == ["original"]


def test_overflow_of_a_cast_is_named(tmp_path: Path) -> None:
    state, _ = original_state()
    state["model.norm.weight"][5] = 1e6
    write_original(tmp_path / "original", state=state)
    with pytest.raises(ValueError, match=r"model\.norm\.weight, after the cast from F32 to F16.*use bf16 or fp32"):
        convert_checkpoint(tmp_path / "original", tmp_path / "native", dtype="fp16")


def test_command_prints_the_report_and_its_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state, _ = write_original(tmp_path / "original", tokenizer=True)
    assert main(["convert", str(tmp_path / "original"), str(tmp_path / "native"), "--sha256"]) == 0
    printed = capsys.readouterr().out
    assert f"{len(state)} source tensors: {len(state)} used, 0 dropped by name" in printed
    assert re.search(r"4 x model\.layers\.\{\}\.self_attn\.q_proj\.weight -> .*\[32, 32\] F32", printed)
    assert "model.mm_projector.mlp.2.bias -> model.multi_modal_projector.linear_2.bias" in printed
    report = json.loads((tmp_path / "native" / "conversion_report.json").read_text())
    assert report["complete"] and report["num_values"] == sum(tensor.numel() for tensor in state.values())
    assert {row["source"] for row in report["tensors"]} == set(state)
    assert list(report["source_sha256"]) == ["model.safetensors"]
    assert (tmp_path / "native" / "README.md").read_text().startswith("---")

    assert main(["convert", "--reverse", "--quiet", str(tmp_path / "native"), str(tmp_path / "back")]) == 0
    assert_same_bits(read_weights(tmp_path / "back"), state)
    given, back = snapshot(tmp_path / "original"), snapshot(tmp_path / "back")
    assert {name: data for name, data in back.items() if name in given and not name.startswith("model")} == {
        name: data for name, data in given.items() if not name.startswith("model")
    }
    capsys.readouterr()
    assert main(["convert", str(tmp_path / "original"), str(tmp_path / "native")]) == 2
    assert re.search(r"longvideo convert: error: .*exists and is not empty.*--overwrite", capsys.readouterr().err)
