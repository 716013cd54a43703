"""The tiny CrossLMM: its stages, its size, the decoder it begins with, and the ablation as one command."""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from longvideo.evaluation.answer_questions import write_json
from longvideo.modeling.crosslmm.decoder_patch import patched_layers
from longvideo.modeling.videochat_flash.modeling_videochat_flash import VideoChatFlashForConditionalGeneration
from longvideo.tiny_training import ablate_crosslmm, build_crosslmm, train
from longvideo.tiny_training.ablate_crosslmm import (
    BASE,
    TABLES,
    VARIANTS,
    ablate,
    describe_variant,
    format_tables,
    interval_over,
    main,
    read_answers,
    summarize,
)
from longvideo.tiny_training.build_parts import train_tokenizer
from longvideo.tiny_training.connector import CrossLMMConnector
from longvideo.tiny_training.decoder import TINY_FOLDER, take_decoder
from longvideo.tiny_training.models import TINY_MODELS
from longvideo.tiny_training.stages import BATCH_SIZE, CROSSLMM_STAGES
from longvideo.trainers import part_of, set_trainable_parts
from longvideo.trainers.sft_config import sub_part_of
from tests.tiny_crosslmm import tiny_crosslmm_model

SPEC = TINY_MODELS["crosslmm"]
TEXT = "What colour is the circle ?"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer()


@pytest.fixture(autouse=True)
def one_tokenizer(monkeypatch, tokenizer) -> None:
    """Trained once: it takes longer than all else that a model is made of."""
    monkeypatch.setattr(build_crosslmm, "train_tokenizer", lambda: copy.deepcopy(tokenizer))


def test_stages_are_those_of_the_paper() -> None:
    assert train.stages_of(SPEC) == CROSSLMM_STAGES
    first, *later = CROSSLMM_STAGES
    assert first.trainable_parts == ("connector", "v2v") and first.prepare_model is None
    # Descriptions first, and no answers; what changes behind the first stage is what is asked.
    assert first.captions + first.events > 0.5
    assert {(stage.prepare_model, frozenset(stage.trainable_parts)) for stage in later} == {
        ("add_t2v", frozenset({"connector", "language_model", "vision_tower"}))
    }
    # What the lessons taught of places outlasts them: tower and connector learn far more slowly than the decoder.
    assert all(max(stage.tower_rate, stage.connector_rate) <= 0.05 for stage in later)
    assert sum(stage.num_videos for stage in CROSSLMM_STAGES) // BATCH_SIZE == 6400


def test_it_fits_in_six_megabytes_and_enters_stage_2() -> None:
    model, processor = SPEC.build()
    assert not model.config.use_t2v and model.config.cross_attention_layers == [0, 2]
    assert model.config.tokens_per_frame == processor.tokens_per_frame == 9
    set_trainable_parts(model, list(CROSSLMM_STAGES[0].trainable_parts))
    learns = {sub_part_of(name) or part_of(name) for name, p in model.named_parameters() if p.requires_grad}
    assert learns == {"connector", "v2v"}
    model.add_t2v()
    # Two bytes each; tokenizer, log and configuration take another 0.1 MB.
    assert 2 * sum(p.numel() for p in model.parameters()) < 5.9e6


@pytest.mark.parametrize("num_layers", [4, 8])
def test_it_begins_with_a_trained_decoder(num_layers: int) -> None:
    model, processor = SPEC.build(num_layers=num_layers)
    tokenizer = processor.tokenizer
    source = TINY_FOLDER / SPEC.decoder
    take_decoder(model, tokenizer, source)
    theirs = VideoChatFlashForConditionalGeneration.from_pretrained(source, dtype=torch.float32)
    words = AutoTokenizer.from_pretrained(source)
    with torch.no_grad():
        expected, logits = (
            m(input_ids=torch.tensor([words(TEXT)["input_ids"]])).logits[0, -1] for m in (theirs, model)
        )
    shared = [word for word in words.get_vocab() if word in tokenizer.get_vocab()]
    ours, known = tokenizer.convert_tokens_to_ids(shared), words.convert_tokens_to_ids(shared)
    # The same numbers in the same order; further layers add zeros.
    torch.testing.assert_close(logits[ours], expected[known], atol=1e-5, rtol=0)
    for layer in patched_layers(model):
        norm = layer.post_attention_layernorm.weight
        assert torch.equal(layer.dual_cross_attention.query_norm.weight, norm) and (norm != 1).any()


def test_a_decoder_that_cannot_grow_evenly_is_refused() -> None:
    model, processor = SPEC.build(num_layers=6)
    with pytest.raises(RuntimeError, match="does not fit"):
        take_decoder(model, processor.tokenizer, TINY_FOLDER / SPEC.decoder)


def test_grown_layers_can_learn() -> None:
    model, processor = SPEC.build(num_layers=8)
    take_decoder(model, processor.tokenizer, TINY_FOLDER / SPEC.decoder)
    ids = torch.tensor([processor.tokenizer(TEXT)["input_ids"]])
    model(input_ids=ids, labels=ids).loss.backward()
    new = model.model.language_model.layers[1]
    assert not new.mlp.down_proj.weight.any() and new.mlp.down_proj.weight.grad.any()
    assert not new.self_attn.o_proj.weight.any() and new.self_attn.o_proj.weight.grad.any()


def test_connector_lessons_train_the_projector_alone_on_merged_tokens() -> None:
    model = tiny_crosslmm_model()
    connector = CrossLMMConnector(model)
    clips = torch.randn(2, 3, 3, 32, 32)
    features = connector.encode(clips)
    assert features.shape == (2, 3 * 4, 32) and connector.config.image_size // connector.config.patch_size == 2
    expected = model.model.get_video_features(clips, return_dict=True).pooler_output
    # One call in place of several; float32.
    torch.testing.assert_close(features, torch.stack(expected), atol=1e-5, rtol=1e-5)
    assert torch.equal(connector.encode(clips[0]), connector.encode(clips[:1]))
    features.sum().backward()
    touched = {part_of(name) for name, p in model.named_parameters() if p.grad is not None}
    assert touched == {"connector"}


@pytest.mark.parametrize(
    ("name", "layers", "modules", "learns", "enters"),
    [
        ("none", [], set(), (), None),
        ("v2v", [0, 4], {"v2v"}, ("v2v",), None),
        ("t2v", [], set(), (), "add_t2v"),
        (BASE, [0, 4], {"v2v"}, ("v2v",), "add_t2v"),
        ("t2v_in_both_stages", [0, 4], {"v2v", "t2v"}, ("v2v", "t2v"), None),
        ("every_layer", [0, 1, 2, 3, 4, 5, 6, 7], {"v2v"}, ("v2v",), "add_t2v"),
        ("every_2_layers", [0, 2, 4, 6], {"v2v"}, ("v2v",), "add_t2v"),
        ("every_8_layers", [0], {"v2v"}, ("v2v",), "add_t2v"),
    ],
)
def test_variants_have_what_their_name_says(name, layers, modules, learns, enters) -> None:
    spec = describe_variant(VARIANTS[name])
    model, processor = spec.build()
    assert model.config.tokens_per_frame == processor.tokens_per_frame == 1
    assert model.config.cross_attention_layers == layers
    found = {sub_part_of(key) for key, _ in model.named_parameters() if "dual_cross_attention" in key}
    # The norm of the queries counts as V2V's, also where T2V stands alone.
    assert found == modules
    first, second = spec.stages
    assert first.trainable_parts == ("connector", *learns) and first.prepare_model is None
    assert second.prepare_model == enters and set(second.trainable_parts) > {"language_model", "vision_tower"}
    set_trainable_parts(model, list(first.trainable_parts))
    if enters:
        getattr(model, enters)()
        has = {sub_part_of(key) for key, _ in model.named_parameters() if "dual_cross_attention.t2v" in key}
        assert has == {"t2v"} and model.config.use_t2v


def test_tables_name_every_variant() -> None:
    rows = [name for table in TABLES.values() for name in table.values()]
    assert set(rows) == set(VARIANTS)
    # One row of each table is the whole model or, where T2V is left out, V2V alone.
    assert all(BASE in table.values() for table in TABLES.values())


def small_spec():
    """Lessons of two steps and stages of a batch."""
    lessons = tuple(
        replace(item, phases=tuple(replace(phase, batch_size=2, num_steps=2) for phase in item.phases))
        for item in SPEC.lessons
    )
    return replace(SPEC, lessons=lessons)


def test_the_ablation_runs_and_goes_on(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(train, "NUM_CALIBRATION_ROWS", BATCH_SIZE)
    asked = []
    real = ablate_crosslmm.evaluate
    monkeypatch.setattr(
        ablate_crosslmm, "evaluate", lambda model, processor, num: asked.append(num) or real(model, processor, num)
    )
    run = {"names": ["none", BASE], "scale": 1e-6, "num": 1, "spec": small_spec()}
    assert not ablate(tmp_path, seeds=[0], minutes=0, **run)
    assert ablate(tmp_path, seeds=[0], minutes=60, **run) and asked == [1, 1]
    # All models have the tower of the first; nothing but answers, log and model is left of each.
    assert (tmp_path / "0-tower" / "siglip.safetensors").exists()
    assert {path.name for path in (tmp_path / BASE / "seed0").iterdir()} == {"answers.json", "log.jsonl", "model"}
    told = json.loads((tmp_path / "ablation.json").read_text(encoding="utf-8"))
    assert set(told["summary"]) == {"none", BASE} and told["summary"]["none"]["seeds"] == [0]
    assert "| V2V and T2V | 1 |" in (tmp_path / "ablation.md").read_text(encoding="utf-8")
    assert ablate(tmp_path, seeds=[0], minutes=60, **run) and asked == [1, 1]
    with pytest.raises(ValueError, match=r"was begun with .*'num': 1"):
        ablate(tmp_path, seeds=[0], minutes=60, **{**run, "num": 2})


def test_training_in_bfloat16_keeps_weights_in_float32(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(train, "NUM_CALIBRATION_ROWS", BATCH_SIZE)
    computed, kept, attention = set(), set(), set()

    def look(module, inputs, output) -> None:
        if module.training:
            computed.add(output.dtype)
            kept.add(module.down_proj.weight.dtype)
            attention.add(torch.backends.cuda.flash_sdp_enabled())

    def build():
        model, processor = SPEC.build()
        model.model.language_model.layers[0].mlp.register_forward_hook(look)
        return model, processor

    spec = replace(small_spec(), build=build, stages=CROSSLMM_STAGES[:1])
    for bf16 in (True, False):
        out = tmp_path / str(bf16)
        assert train.train_model(spec, out, minutes=60, seed=0, scale=1e-6, bf16=bf16) == out / "model"
        assert computed == {torch.bfloat16 if bf16 else torch.float32} and kept == {torch.float32}
        # The fused kernel is the slower one in bfloat16 on a processor; afterwards everything is as before.
        assert attention == {not bf16} or torch.cuda.is_available()
        assert torch.backends.cuda.flash_sdp_enabled()
        assert not torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
        for seen in (computed, kept, attention):
            seen.clear()


def test_models_of_two_precisions_are_not_compared(tmp_path) -> None:
    write_json(tmp_path / "settings.json", {"num": 500, "scale": 1.0, "bf16": True})
    with pytest.raises(ValueError, match=r"'bf16': True.* not with .*'bf16': False"):
        ablate(tmp_path, seeds=[0], names=[BASE], minutes=0, scale=1.0, num=500)


def test_answers_become_tables(tmp_path) -> None:
    rng = np.random.default_rng(0)
    right = {name: rng.random((3, 60)) < share for name, share in (("none", 0.3), ("v2v", 0.6), (BASE, 0.8))}
    for name, rows in right.items():
        for seed, row in enumerate(rows):
            write_json(tmp_path / name / f"seed{seed}" / "answers.json", {"num": 60, "correct": row.tolist()})
    found = read_answers(tmp_path, 60)
    summary = summarize(found)
    assert set(summary) == set(right) and summary[BASE]["seeds"] == [0, 1, 2] and "difference" not in summary[BASE]
    gap = summary["none"]["difference"]
    assert gap == pytest.approx(right["none"].mean() - right[BASE].mean())
    low, high = summary["none"]["difference_95"]
    assert low < gap < high < 0
    table = format_tables(summary)
    assert table.count("Table 2") == 3 and "| 8 |" not in table and f"| {100 * gap:+.1f} |" in table
    with pytest.raises(ValueError, match="60 questions, but --num is 50"):
        read_answers(tmp_path, 50)


def test_intervals_hold_models_and_questions() -> None:
    same = np.array([[1.0, 0.0] * 50] * 4)
    apart = np.repeat([[0.9], [0.1], [0.9], [0.1]], 100, axis=1)
    low, high = interval_over(same)
    # The root of p (1 - p) / n is 0.05; 2000 draws.
    assert low == pytest.approx(0.4, abs=0.02) and high == pytest.approx(0.6, abs=0.02)
    low, high = interval_over(apart)
    # All four models alike happens in more than 2.5 % of the draws at either end.
    assert (low, high) == pytest.approx((0.1, 0.9))


def test_errors_are_one_line(tmp_path, capsys) -> None:
    write_json(tmp_path / "settings.json", {"num": 3, "scale": 1.0})
    assert main(["--out", str(tmp_path), "--num", "4"]) == 2
    assert "was begun with" in capsys.readouterr().err
