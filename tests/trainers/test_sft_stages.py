"""Stages of training: what is frozen and unfrozen by part and by name, and that all of it moves and nothing else."""

from typing import Any

import pytest

from longvideo.trainers import VideoSFTConfig, load_recipe, part_of, set_trainable_parts
from longvideo.trainers.freezing import set_trainable
from tests.tiny import tiny_videochat_flash_model, tiny_videochat_flash_processor
from tests.tiny_crosslmm import tiny_crosslmm_model
from tests.tiny_crosslmm_processor import tiny_crosslmm_processor
from tests.tiny_crossvllm import tiny_crossvllm_model
from tests.tiny_crossvllm_processor import tiny_crossvllm_processor
from tests.tiny_llava_st import tiny_llava_st_model
from tests.tiny_llava_st_processor import tiny_llava_st_processor
from tests.tiny_longvu import tiny_longvu_model
from tests.tiny_longvu_processor import tiny_longvu_processor
from tests.trainers.sft_runs import changed_names, image_row, short_run, snapshot
from tests.trainers.toy_rows import colour_row

ARCHITECTURES: dict[str, tuple[Any, Any]] = {
    "videochat_flash": (tiny_videochat_flash_model, tiny_videochat_flash_processor),
    "longvu": (tiny_longvu_model, tiny_longvu_processor),
    "llava_st": (tiny_llava_st_model, tiny_llava_st_processor),
    "crosslmm": (tiny_crosslmm_model, tiny_crosslmm_processor),
    "crossvllm": (tiny_crossvllm_model, tiny_crossvllm_processor),
}
# Of CrossVLLM's four stages the last one has a trainer of its own, whose tests say what moves in each of its steps.
STAGES = [
    (name, stage)
    for name, count in (("videochat_flash", 4), ("longvu", 2), ("llava_st", 3), ("crosslmm", 2), ("crossvllm", 3))
    for stage in range(1, count + 1)
]
# The settings of a stage that decide what learns, and how fast beside the rest.
KEPT = ("prepare_model", "trainable_parts", "trainable_names", "frozen_names")
# Granularity of a stage: that of the module that learns.
SHOWN = {"crossvllm": ("processor_kwargs",)}
MODEL_SETTINGS = {"crosslmm": ("use_v2v", "use_t2v"), "llava_st": ("coordinate_layout",)}


def learning(model: Any) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def stage_model(name: str, stage: int) -> Any:
    """The model that a stage begins with."""
    entry = list(load_recipe(name)["stages"].values())[stage - 1]
    settings = {key: value for key, value in entry.get("model", {}).items() if key in MODEL_SETTINGS.get(name, ())}
    if name == "crosslmm":
        settings |= {"use_t2v": False}  # stage 2 begins with the checkpoint of stage 1
    if name == "crossvllm":
        settings |= {"adapters": stage > 2}  # stage 2 adds them
    model = ARCHITECTURES[name][0](**settings)
    if "lora" not in entry:
        return model
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(**{**entry["lora"], "r": 2, "lora_dropout": 0.0}))


def expected_names(name: str, stage: int, model: Any) -> set[str]:
    """What the paper's table says of a stage, by the names of modules."""
    wanted: dict[tuple[str, int], tuple[str, ...]] = {
        ("videochat_flash", 1): ("multi_modal_projector",),
        ("videochat_flash", 4): ("vision_tower", "multi_modal_projector"),
        ("llava_st", 1): ("packer", "embed_tokens", "coordinates"),
        ("crossvllm", 1): ("coarse",),
        ("crosslmm", 1): ("multi_modal_projector", "v2v", "v2v_gate", "query_norm"),
    }
    names = [key for key, _ in model.named_parameters()]
    if name == "llava_st" and stage > 1:
        return {key for key in names if "lora_" in key or "modules_to_save" in key}
    if name == "crossvllm" and stage > 1:
        module = {2: "coarse", 3: "fine"}[stage]
        return {key for key in names if module in key.split(".") and ("projectors" in key or "lora_" in key)}
    if name == "longvu":
        return {key for key in names if "vision_tower" not in key and "dino_tower" not in key}
    modules = wanted.get((name, stage))
    return set(names) if modules is None else {key for key in names if not set(modules).isdisjoint(key.split("."))}


@pytest.mark.parametrize(("name", "stage"), STAGES)
def test_every_parameter_of_a_stage_moves_and_no_other(tmp_path, name, stage):
    args = VideoSFTConfig.from_recipe(name, stage, output_dir="unused", bf16=False)
    model = stage_model(name, stage)
    rows = [colour_row("red", num_frames=6), colour_row("blue", answer="During {<t0.25><t0.8>}.")]
    rows = [*(rows if name == "llava_st" else rows[:1]), image_row("What?", "Grey.")]
    settings = {
        key: getattr(args, key) for key in (*KEPT, *SHOWN.get(name, ())) if getattr(args, key, None) is not None
    }
    trainer = short_run(
        tmp_path, model, ARCHITECTURES[name][1](), rows, max_steps=4, learning_rate=1e-2, lr_scheduler_type="constant",
        per_device_train_batch_size=len(rows), **settings,
    )  # fmt: skip
    before = snapshot(model)
    learns = learning(model)
    assert learns == expected_names(name, stage, model)
    trainer.train()
    assert changed_names(model, before) == learns


def test_names_add_to_parts_and_take_from_them():
    model = tiny_crosslmm_model()
    set_trainable(model, parts=["connector"], names=[r"language_model\.layers\.1\.", "lm_head"])
    expected = {
        key
        for key, _ in model.named_parameters()
        if part_of(key) == "connector" or "language_model.layers.1." in key or "lm_head" in key
    }
    assert learning(model) == expected
    set_trainable(model, parts=["language_model"], frozen=["embed_tokens", r"layers\.0\."])
    assert not any("embed_tokens" in key or "layers.0." in key for key in learning(model))
    assert {part_of(key) for key in learning(model)} == {"language_model"}
    set_trainable(model, names=["multi_modal_projector"])
    assert {part_of(key) for key in learning(model)} == {"connector"}
    set_trainable_parts(model, ["connector", "language_model"])
    set_trainable(model, frozen=["lm_head"])
    assert "lm_head.weight" not in learning(model) and len({part_of(key) for key in learning(model)}) == 2


def test_names_of_the_configuration_reach_the_model(tmp_path):
    model = tiny_crosslmm_model()
    args = {"trainable_parts": ["connector"], "trainable_names": ["lm_head"], "frozen_names": [r"projector.*bias"]}
    before = snapshot(model)
    short_run(tmp_path, model, tiny_crosslmm_processor(), [colour_row("red")] * 2, learning_rate=1e-2, **args).train()
    changed = changed_names(model, before)
    assert "lm_head.weight" in changed and not any(key.endswith("bias") for key in changed)
    assert {part_of(key) for key in changed} == {"connector", "language_model"}


def test_adapter_keeps_its_choice_inside_of_names():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=r".*language_model\.layers\..*(q|v)_proj")
    model = peft.get_peft_model(tiny_crosslmm_model(), config)
    set_trainable(model, names=[r"layers\.1\."])
    assert learning(model) and all("lora_" in key and "layers.1." in key for key in learning(model))


def test_what_cannot_be_named(tmp_path):
    model = tiny_crosslmm_model()
    with pytest.raises(ValueError, match=r"pattern 'mm_projector' finds none of the \d+ parameters of CrossLMM"):
        set_trainable(model, names=["mm_projector"])
    with pytest.raises(ValueError, match="pattern 'visual' finds none"):
        set_trainable(model, parts=["connector"], frozen=["visual"])
    with pytest.raises(ValueError, match="Nothing learns with"):
        set_trainable(model, parts=["connector"], frozen=["projector"])
    with pytest.raises(ValueError, match=r"pattern '\(' is no regular expression"):
        VideoSFTConfig(output_dir=str(tmp_path), trainable_names=["("])
    with pytest.raises(ValueError, match="must be a list of regular expressions, or None, got 'lm_head'"):
        VideoSFTConfig(output_dir=str(tmp_path), frozen_names="lm_head")
    with pytest.raises(ValueError, match=r"trainable_parts=\['tower'\] must name one or more"):
        VideoSFTConfig(output_dir=str(tmp_path), trainable_parts=["tower"])
