"""`VideoSFTTrainer` on CrossLMM: what learns in its two stages, and how one checkpoint enters the next."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from longvideo.modeling.crosslmm.configuration_crosslmm import CrossLMMConfig
from longvideo.modeling.crosslmm.modeling_crosslmm import CrossLMMForConditionalGeneration
from longvideo.trainers import (
    VideoSFTCollator,
    VideoSFTConfig,
    VideoSFTTrainer,
    load_recipe,
    part_of,
    set_trainable_parts,
)
from longvideo.trainers.sft_config import sub_part_of
from tests.tiny_crosslmm import tiny_crosslmm_model
from tests.tiny_crosslmm_processor import tiny_crosslmm_processor
from tests.trainers.sft_runs import assert_batch_equals_rows, changed_names, image_row, short_run, snapshot

STAGE_1 = ["connector", "v2v"]
STAGE_2 = ["vision_tower", "connector", "language_model"]
# LayerNorm, 24 -> 32, 32 -> 32 with biases.
NUM_PROJECTOR = 2 * 24 + 24 * 32 + 32 + 32 * 32 + 32
# Four query and two key heads of 8: q, k, v with biases, o without; gate and norm of the queries.
NUM_V2V = (32 * 32 + 32) + 2 * (32 * 16 + 16) + 32 * 32 + 1 + 32
MakeTrainer = Callable[..., VideoSFTTrainer]


@pytest.fixture(scope="module")
def processor() -> Any:
    return tiny_crosslmm_processor()


@pytest.fixture
def make_trainer(tmp_path, processor) -> MakeTrainer:
    def make(model: Any, **args: Any) -> VideoSFTTrainer:
        return short_run(tmp_path, model, processor, mixed_rows(), **{"max_steps": 2, **args})

    return make


def video_row(question: str = "What moves?", answer: str = "A red ring.", *, shade: int = 0) -> dict[str, Any]:
    frames = np.random.default_rng(shade).integers(0, 255, (4, 32, 32, 3), dtype=np.uint8)
    block = {"type": "video", "video": frames, "timestamps": [float(i) for i in range(4)]}
    user = [block, {"type": "text", "text": question}]
    return {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]}


def mixed_rows() -> list[dict[str, Any]]:
    """Two videos, an image, and text alone."""
    text = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello there."}]
    return [video_row(), video_row("Colour?", "Blue.", shade=1), image_row("What?", "Grey."), {"messages": text}]


def learning_names(model: Any) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def count_learning(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def test_every_parameter_has_a_part():
    named = [name for name, _ in tiny_crosslmm_model().named_parameters()]
    parts = {name.split(".")[1]: part_of(name) for name in named if name.startswith("model.")}
    assert parts == {
        "vision_tower": "vision_tower",
        "multi_modal_projector": "connector",
        "language_model": "language_model",
    }
    cross = {name for name in named if "dual_cross_attention" in name}
    assert {sub_part_of(name) for name in cross} == {"v2v", "t2v"}
    assert {sub_part_of(name) for name in set(named) - cross} == {None, "embeddings"}
    # The norm in front of both belongs to what is there in both stages.
    assert {sub_part_of(name) for name in named if "query_norm" in name} == {"v2v"}


def test_stage_1_teaches_projector_and_v2v_alone(make_trainer):
    model = tiny_crosslmm_model(gates=None, use_t2v=False)
    before = snapshot(model)
    args = VideoSFTConfig.from_recipe("crosslmm", 1, output_dir="unused", bf16=False)
    trainer = make_trainer(model, trainable_parts=args.trainable_parts, learning_rate=1e-2)
    assert count_learning(model) == NUM_PROJECTOR + 2 * NUM_V2V
    learns = learning_names(model)
    assert learns == {name for name in before if part_of(name) == "connector" or "dual_cross_attention" in name}
    trainer.train()
    # Behind a closed gate nothing but the gate learns at first; in the second step all do.
    assert changed_names(model, before) == learns


def test_gradients_of_stage_1_reach_nothing_else(processor):
    model = tiny_crosslmm_model(use_t2v=False)
    set_trainable_parts(model, STAGE_1)
    model(**VideoSFTCollator(processor)(mixed_rows()), use_cache=False).loss.backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()} == learning_names(
        model
    )


@pytest.mark.parametrize("share_kv", [False, True])
def test_parts_of_both_attentions_are_named_apart(share_kv):
    model = tiny_crosslmm_model(share_kv=share_kv)
    set_trainable_parts(model, ["v2v"])
    assert count_learning(model) == 2 * NUM_V2V
    set_trainable_parts(model, ["t2v"])
    keys = 2 * (32 * 16 + 16)
    assert count_learning(model) == 2 * (NUM_V2V - 32 - (keys if share_kv else 0))


def test_stage_1_of_the_2b_model_has_43_million_parameters():
    with torch.device("meta"):
        model = CrossLMMForConditionalGeneration(CrossLMMConfig(use_t2v=False))
    set_trainable_parts(model, STAGE_1)
    norms_and_gates = 2 * 1152 + 7 * (1536 + 1)
    assert count_learning(model) == 42_681_344 + norms_and_gates


def test_a_checkpoint_of_stage_1_enters_stage_2(make_trainer, processor, tmp_path):
    first = tiny_crosslmm_model(use_t2v=False)
    first.save_pretrained(tmp_path / "stage1")
    batch = VideoSFTCollator(processor)(mixed_rows())
    model = CrossLMMForConditionalGeneration.from_pretrained(tmp_path / "stage1").eval()
    expected = first(**batch, use_cache=False).logits
    before = snapshot(model)
    args = VideoSFTConfig.from_recipe("crosslmm", 2, output_dir="unused", bf16=False)
    trainer = make_trainer(
        model,
        prepare_model=args.prepare_model,
        trainable_parts=args.trainable_parts,
        learning_rate=1e-2,
        save_strategy="steps",
        save_steps=1,
    )
    assert model.config.use_t2v
    # Closed gates change nothing. Weights lie at other addresses, and some processors sum in an order that goes by
    # alignment; float32.
    torch.testing.assert_close(model(**batch, use_cache=False).logits, expected, atol=1e-5, rtol=0)
    gates = [parameter for name, parameter in model.named_parameters() if name.endswith("t2v_gate")]
    assert gates and not any(gate.any() for gate in gates)
    added = learning_names(model) - set(before)
    before = snapshot(model)
    assert added and {sub_part_of(name) for name in added} == {"t2v"}
    trainer.train()
    # T2V among it: its gates with the first step, the rest with the second.
    changed = changed_names(model, before)
    assert {part_of(name) for name in changed} == set(STAGE_2) and added <= changed
    # A run that was stopped goes on from its checkpoint, which has T2V already.
    again = CrossLMMForConditionalGeneration.from_pretrained(tmp_path / "stage1")
    resumed = make_trainer(
        again, prepare_model="add_t2v", trainable_parts=STAGE_2, learning_rate=1e-2, save_strategy="no"
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    for name, parameter in model.named_parameters():
        # The same rows and states; sums in the same order.
        torch.testing.assert_close(dict(again.named_parameters())[name], parameter, atol=1e-6, rtol=0)
    loaded = CrossLMMForConditionalGeneration.from_pretrained(tmp_path / "run" / "checkpoint-2")
    make_trainer(loaded, prepare_model="add_t2v", trainable_parts=STAGE_2)
    assert all(torch.equal(p, dict(loaded.named_parameters())[name]) for name, p in model.named_parameters())


def test_t2v_may_begin_as_a_copy(make_trainer):
    model = tiny_crosslmm_model(use_t2v=False, init_t2v_from_v2v=True)
    make_trainer(model, prepare_model="add_t2v")
    dual = model.model.language_model.layers[0].dual_cross_attention
    assert torch.equal(dual.t2v.q_proj.weight, dual.v2v.q_proj.weight) and not dual.t2v_gate.any()


def test_a_model_without_any_cross_attention_gets_t2v(make_trainer):
    model = tiny_crosslmm_model(use_v2v=False, use_t2v=False)
    assert model.config.cross_attention_layers == []
    make_trainer(model, prepare_model="add_t2v", trainable_parts=["t2v"])
    assert model.config.cross_attention_layers == [0, 2]
    assert {sub_part_of(name) for name in learning_names(model)} == {"t2v"}


@pytest.mark.parametrize("method", ["add_sound", "_init_weights", "config"])
def test_preparation_that_the_model_lacks(make_trainer, method):
    with pytest.raises(
        ValueError, match=rf"prepare_model='{method}' is no method of CrossLMMForConditionalGeneration"
    ):
        make_trainer(tiny_crosslmm_model(), prepare_model=method)


def test_a_model_that_is_built_later_is_prepared_too(make_trainer, processor, tmp_path):
    args = VideoSFTConfig(
        output_dir=str(tmp_path), prepare_model="add_t2v", trainable_parts=["t2v"], use_cpu=True, report_to=[]
    )
    trainer = VideoSFTTrainer(
        args=args,
        model_init=lambda: tiny_crosslmm_model(use_t2v=False),
        train_dataset=mixed_rows(),
        processing_class=processor,
    )
    assert trainer.model.config.use_t2v
    assert {sub_part_of(name) for name in learning_names(trainer.model)} == {"t2v"}


def test_batch_of_4_equals_4_rows_alone(processor):
    assert_batch_equals_rows(tiny_crosslmm_model(), processor, mixed_rows(), STAGE_2)


def test_rates_of_the_recipe(make_trainer):
    args = VideoSFTConfig.from_recipe("crosslmm", 2, output_dir="unused", bf16=False)
    rates = {"learning_rate": args.learning_rate, "vision_tower_learning_rate": args.vision_tower_learning_rate}
    model = tiny_crosslmm_model()
    trainer = make_trainer(model, trainable_parts=args.trainable_parts, **rates)
    names = {parameter: name for name, parameter in model.named_parameters()}
    found: dict[str, set[float]] = {}
    for group in trainer.create_optimizer().param_groups:
        for parameter in group["params"]:
            found.setdefault(part_of(names[parameter]), set()).add(group["lr"])
    assert found == {"language_model": {1e-5}, "connector": {1e-5}, "vision_tower": {2e-6}}


@pytest.mark.parametrize(("stage", "parts", "rate", "batch"), [(1, STAGE_1, 1e-4, 512), (2, STAGE_2, 1e-5, 128)])
def test_recipe_of_the_paper(tmp_path, stage, parts, rate, batch):
    args = VideoSFTConfig.from_recipe("crosslmm", stage, output_dir=str(tmp_path), bf16=False)
    assert (args.trainable_parts, args.learning_rate) == (parts, rate)
    assert (args.lr_scheduler_type, args.warmup_steps, args.num_train_epochs) == ("cosine", 0.03, 1)
    assert args.optim.startswith("adamw")
    entry = list(load_recipe("crosslmm")["stages"].values())[stage - 1]
    per_gpu = args.per_device_train_batch_size * args.gradient_accumulation_steps
    assert entry["gpus"] * per_gpu == entry["global_batch_size"] == batch
    assert CrossLMMConfig(**entry["model"]).use_t2v == (stage == 2)
    # 32 frames in the first stage, up to 512 in the second, of 9 tokens each, fit with room for text.
    frames = args.processor_kwargs.get("num_frames") or args.processor_kwargs["max_frames"]
    assert 9 * frames < args.max_length / 4
