"""`VideoSFTTrainer`: the loss it minimises, what learns how fast, resuming, dropout and what it refuses."""

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from longvideo.trainers import (
    IGNORE_INDEX,
    VideoSFTCollator,
    VideoSFTConfig,
    VideoSFTTrainer,
    find_last_checkpoint,
    load_recipe,
    part_of,
    set_trainable_parts,
)
from tests.tiny import tiny_videochat_flash_model, tiny_videochat_flash_processor
from tests.trainers.sft_runs import assert_same_gradients, losses, short_run
from tests.trainers.toy_rows import COLOURS, colour_row, toy_rows

NO_DROPOUT: dict[str, Any] = {}
DROPOUT = {
    "mm_llm_compress": True,
    "llm_compress_type": "uniform0_attention",
    "llm_compress_layer_list": [1, 3],
    "llm_image_token_ratio_list": [1.0, 0.5, 0.25],
}
PARTS = ("vision_tower", "connector", "language_model")
MakeTrainer = Callable[..., VideoSFTTrainer]


class GradientRecorder(TrainerCallback):
    """Keeps the gradients of the last optimizer step."""

    def __init__(self) -> None:
        self.gradients: dict[str, torch.Tensor | None] = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients = {
            name: None if parameter.grad is None else parameter.grad.clone()
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }


@pytest.fixture
def make_trainer(tmp_path) -> MakeTrainer:
    def make(
        rows: list[dict[str, Any]],
        *,
        model: Any = None,
        model_kwargs: dict | None = None,
        collator: Any = None,
        **args: Any,
    ) -> VideoSFTTrainer:
        model = tiny_videochat_flash_model(**(model_kwargs or {})) if model is None else model
        return short_run(tmp_path, model, tiny_videochat_flash_processor(), rows, collator=collator, **args)

    return make


def gradients_of_one_step(make_trainer: MakeTrainer, **kwargs: Any) -> tuple[dict[str, torch.Tensor], float]:
    """Gradients over four rows of unequal answers and clips, and the logged loss."""
    rows = [colour_row(name, num_frames=4 + 4 * (i % 2), answer=name * (1 + i)) for i, name in enumerate(COLOURS)]
    trainer = make_trainer(rows, max_grad_norm=0.0, **kwargs)
    recorder = GradientRecorder()
    trainer.add_callback(recorder)
    trainer.train()
    return recorder.gradients, losses(trainer)[0]


@pytest.mark.parametrize("model_kwargs", [NO_DROPOUT, DROPOUT], ids=["plain", "dropout"])
def test_batch_of_4_equals_4_accumulated_batches(make_trainer, model_kwargs):
    whole = gradients_of_one_step(make_trainer, model_kwargs=model_kwargs, per_device_train_batch_size=4)
    parts = gradients_of_one_step(
        make_trainer, model_kwargs=model_kwargs, per_device_train_batch_size=1, gradient_accumulation_steps=4
    )
    assert_same_gradients(whole[0], parts[0])
    # The same float32 sum in another order.
    assert whole[1] == pytest.approx(parts[1], rel=1e-5)


def test_loss_is_the_mean_over_all_supervised_tokens(make_trainer):
    """Against the logits of the model, row by row, without the Trainer."""
    rows = toy_rows(4)
    trainer = make_trainer(rows, per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=1e-9)
    trainer.train()
    model, collator = tiny_videochat_flash_model(), VideoSFTCollator(tiny_videochat_flash_processor())
    total, count = 0.0, 0
    for row in rows:
        batch = collator([row])
        labels = batch.pop("labels")[0, 1:]
        with torch.no_grad():
            log_probs = model(**batch, use_cache=False).logits[0, :-1].log_softmax(-1)
        kept = labels != IGNORE_INDEX
        total -= float(log_probs[kept].gather(-1, labels[kept, None]).sum())
        count += int(kept.sum())
    # Padding to a common length changes float32 attention sums a little.
    assert losses(trainer)[0] == pytest.approx(total / count, rel=1e-4)


@pytest.mark.parametrize("model_kwargs", [NO_DROPOUT, DROPOUT], ids=["plain", "dropout"])
def test_gradient_checkpointing_changes_no_gradient(make_trainer, model_kwargs):
    plain = gradients_of_one_step(make_trainer, model_kwargs=model_kwargs, per_device_train_batch_size=4)
    model = tiny_videochat_flash_model(**model_kwargs)
    checkpointed = gradients_of_one_step(
        make_trainer, model=model, per_device_train_batch_size=4, gradient_checkpointing=True
    )
    assert_same_gradients(plain[0], checkpointed[0])
    active = {part_of(name) for name, module in model.named_modules() if getattr(module, "gradient_checkpointing", 0)}
    assert active == {"vision_tower", "language_model"}


@pytest.mark.parametrize("kind", ["uniform", "attention", "uniform0_attention", "uniform1_attention"])
def test_dropout_gives_finite_gradients_to_every_parameter(make_trainer, kind):
    gradients, loss = gradients_of_one_step(make_trainer, model_kwargs={**DROPOUT, "llm_compress_type": kind})
    assert loss == loss
    assert {part_of(name) for name in gradients} == set(PARTS)
    missing = [name for name, gradient in gradients.items() if gradient is None]
    assert not missing, missing
    infinite = [name for name, gradient in gradients.items() if not gradient.isfinite().all()]
    assert not infinite, infinite


def test_dropout_shortens_the_sequence_and_keeps_every_answer_token(make_trainer):
    trainer = make_trainer(toy_rows(8), model_kwargs=DROPOUT, supervised_logits_only=False)
    batch = trainer.data_collator(toy_rows(8)[3:6])
    _, outputs = trainer.compute_loss(trainer.model.train(), batch, return_outputs=True)
    assert outputs.logits.shape[1] < batch["input_ids"].shape[1]
    for row in range(3):
        expected = batch["labels"][row][batch["labels"][row] != IGNORE_INDEX]
        assert torch.equal(outputs.labels[row][outputs.labels[row] != IGNORE_INDEX], expected)


@pytest.mark.parametrize("parts", [["connector"], ["vision_tower", "connector"], ["language_model"], list(PARTS)])
def test_only_trainable_parts_change(make_trainer, parts):
    model = tiny_videochat_flash_model()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    make_trainer(toy_rows(4), model=model, trainable_parts=parts, learning_rate=1e-2, max_steps=2).train()
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    frozen = {name for name in before if part_of(name) not in parts}
    assert not changed & frozen
    assert {part_of(name) for name in changed} == set(parts)
    # lm_head and the embeddings belong to the language model; of the rows of the table only used ones must move.
    assert ("lm_head.weight" in changed) == ("language_model" in parts)


def test_learning_rates_and_decay_by_part(make_trainer):
    trainer = make_trainer(
        toy_rows(4),
        learning_rate=1e-3,
        connector_learning_rate=5e-3,
        vision_tower_learning_rate=2e-4,
        weight_decay=0.1,
        max_steps=4,
        lr_scheduler_type="linear",
    )
    optimizer = trainer.create_optimizer()
    names = {parameter: name for name, parameter in trainer.model.named_parameters()}
    expected = {"language_model": 1e-3, "connector": 5e-3, "vision_tower": 2e-4}
    seen = set()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names[parameter]
            seen.add(name)
            assert group["lr"] == expected[part_of(name)], name
            is_norm_or_bias = "norm" in name or name.endswith("bias")
            assert group["weight_decay"] == (0.0 if is_norm_or_bias else 0.1), name
    assert seen == set(names.values())
    assert optimizer.param_groups[0]["part"] == "language_model"
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    # The schedule multiplies all rates alike.
    for entry in logged:
        assert entry["learning_rate_connector"] == pytest.approx(5 * entry["learning_rate"])
        assert entry["learning_rate_vision_tower"] == pytest.approx(0.2 * entry["learning_rate"])
    assert logged[-1]["learning_rate"] < logged[0]["learning_rate"]


def test_norms_of_any_tower_have_no_decay(make_trainer):
    trainer = make_trainer(toy_rows(4), model_kwargs={"tower": "internvideo2_vision_model"})
    decayed = trainer.get_decay_parameter_names(trainer.model)
    assert "model.vision_tower.blocks.0.attn.qkv.weight" in decayed
    assert not [name for name in decayed if "norm" in name or name.endswith("bias")]


@pytest.mark.parametrize("stop", [3, 5], ids=["first epoch", "second epoch"])
def test_resume_continues_the_same_loss_curve(make_trainer, tmp_path, stop):
    """Attention dropout draws random numbers, so the random state must come back too; an epoch has four steps."""
    settings = {
        "model_kwargs": {**DROPOUT, "text_kwargs": {"attention_dropout": 0.2}},
        "max_steps": 7,
        "learning_rate": 5e-3,
        "vision_tower_learning_rate": 1e-3,
        "save_strategy": "steps",
        "save_steps": stop,
    }
    whole = make_trainer(toy_rows(8), **settings)
    whole.train()
    for folder in (tmp_path / "run").glob("checkpoint-*"):
        if folder.name != f"checkpoint-{stop}":
            shutil.rmtree(folder)
    (tmp_path / "run" / "checkpoint-6").mkdir()  # an interrupted one, to be passed over
    resumed = make_trainer(toy_rows(8), **settings)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 7
    # Bit for bit: the same operations on the same numbers.
    assert losses(resumed)[stop:] == losses(whole)[stop:]
    assert len(set(losses(whole))) == 7
    for (name, one), (_, other) in zip(whole.model.named_parameters(), resumed.model.named_parameters(), strict=True):
        assert torch.equal(one, other), name


def test_resume_without_checkpoint(make_trainer):
    with pytest.raises(FileNotFoundError, match=r"No complete checkpoint in .*run"):
        make_trainer(toy_rows(4)).train(resume_from_checkpoint=True)


def test_find_last_checkpoint_skips_unfinished_ones(tmp_path):
    assert find_last_checkpoint(str(tmp_path / "absent")) is None
    for step, state in ((9, "{}"), (10, "{}"), (11, '{"cut'), (12, None)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if state is not None:
            (folder / "trainer_state.json").write_text(state, encoding="utf-8")
    (tmp_path / "checkpoint-best").mkdir()
    assert find_last_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-10")


def test_evaluation_loss_and_predictions_with_dropout(make_trainer):
    trainer = make_trainer(toy_rows(4), model_kwargs=DROPOUT, per_device_eval_batch_size=2)
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] > 0
    output = trainer.predict(toy_rows(3))
    assert output.predictions.shape[:2] == output.label_ids.shape
    supervised = [row[row != IGNORE_INDEX].tolist() for row in output.label_ids]
    text = [trainer.processing_class.tokenizer.decode(row) for row in supervised]
    assert text == [f"{name}<|im_end|>" for name in list(COLOURS)[:3]]


def test_saved_model_answers_like_the_trained_one(make_trainer, tmp_path):
    trainer = make_trainer(toy_rows(4), learning_rate=1e-2)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    loaded = type(trainer.model).from_pretrained(tmp_path / "saved").eval()
    batch = trainer.data_collator(toy_rows(2))
    batch.pop("labels")
    outputs = loaded(**batch)
    assert torch.equal(outputs.logits, trainer.model.eval()(**batch).logits)
    assert outputs.past_key_values is not None
    assert (tmp_path / "saved" / "chat_template.jinja").is_file()


def test_throughput_counts_frames_and_visual_tokens_since_the_last_log(make_trainer, monkeypatch):
    rows = [colour_row("red", num_frames=4), colour_row("blue", num_frames=8)]
    trainer = make_trainer(rows, max_steps=2, per_device_train_batch_size=1)
    clock = iter(range(0, 1000, 3))
    monkeypatch.setattr("longvideo.trainers.sft_trainer.time.perf_counter", lambda: next(clock))
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    # The patched clock advances 3 s from one reading to the next; a frame has 4 tokens. Rounded to three decimals.
    assert sorted(entry["frames_per_second"] for entry in logged) == pytest.approx([4 / 3, 8 / 3], abs=1e-3)
    assert sorted(entry["visual_tokens_per_second"] for entry in logged) == pytest.approx([16 / 3, 32 / 3], abs=0.1)


def test_trainer_guards_batches_of_foreign_collators(make_trainer):
    def blind(rows: list[Any]) -> dict[str, torch.Tensor]:
        batch = VideoSFTCollator(tiny_videochat_flash_processor())(rows)
        return {key: value for key, value in batch.items() if "pixel" not in key}

    with pytest.raises(ValueError, match=r"video placeholder tokens .* no `pixel_values_videos`"):
        make_trainer(toy_rows(2), collator=blind).train()


def test_max_length_reaches_the_collator(make_trainer):
    trainer = make_trainer(
        toy_rows(2), max_length=50, label_rule="videochat_flash", processor_kwargs={"max_frames": 8}
    )
    collator = trainer.data_collator
    assert (collator.max_length, collator.label_rule) == (50, "videochat_flash")
    assert collator.processor_kwargs == {"max_frames": 8}
    with pytest.raises(ValueError, match=r"together over max_length=50\. Text is never cut"):
        trainer.train()


def test_settings_that_cannot_work(make_trainer, tmp_path):
    rows, out = toy_rows(2), str(tmp_path)
    with pytest.raises(ValueError, match="remove_unused_columns=True would drop the `messages`"):
        VideoSFTConfig(output_dir=out, remove_unused_columns=True)
    with pytest.raises(ValueError, match=r"label_smoothing_factor=0.1 needs logits as long as the labels"):
        VideoSFTConfig(output_dir=out, label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match=r"trainable_parts=\['projector'\] must name one or more of"):
        VideoSFTConfig(output_dir=out, trainable_parts=["projector"])
    with pytest.raises(ValueError, match="vision_tower_learning_rate=0 must be positive"):
        VideoSFTConfig(output_dir=out, vision_tower_learning_rate=0)
    with pytest.raises(ValueError, match="dispatch_batches=True slices batches along their first axis"):
        VideoSFTConfig(output_dir=out, accelerator_config={"dispatch_batches": True})
    assert VideoSFTConfig(output_dir=out).accelerator_config.dispatch_batches is False
    model = tiny_videochat_flash_model()
    with pytest.raises(ValueError, match="args must be a VideoSFTConfig, got NoneType"):
        VideoSFTTrainer(model, train_dataset=rows)
    config = VideoSFTConfig(output_dir=out, use_cpu=True, report_to=[])
    with pytest.raises(ValueError, match="Give processing_class=<processor>"):
        VideoSFTTrainer(model, config, train_dataset=rows)
    with pytest.raises(ValueError, match="compute_loss_func gets logits"):
        VideoSFTTrainer(model, config, data_collator=lambda rows: {}, compute_loss_func=lambda *a, **k: None)
    config._n_gpu = 2
    with pytest.raises(ValueError, match=r"2 GPUs in one process would be fed by nn.DataParallel"):
        VideoSFTTrainer(model, config, data_collator=lambda rows: {})
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ValueError, match="No parameter requires a gradient"):
        make_trainer(rows, model=model).train()


def test_model_without_loss_kwargs_is_refused(make_trainer):
    model = tiny_videochat_flash_model()
    model.accepts_loss_kwargs = False
    with pytest.raises(ValueError, match=r"VideoChatFlashForConditionalGeneration.forward takes no \*\*kwargs"):
        make_trainer(toy_rows(2), model=model)


def test_parameters_outside_of_all_parts(make_trainer):
    model = tiny_videochat_flash_model()
    model.extra_gain = torch.nn.Parameter(torch.ones(()))
    with pytest.raises(ValueError, match="cannot say whether 'extra_gain' learns"):
        set_trainable_parts(model, ["connector"])
    trainer = make_trainer(toy_rows(2), model=model, learning_rate=1e-3, connector_learning_rate=1e-2)
    groups = trainer.create_optimizer().param_groups
    assert [g["lr"] for g in groups if any(p is model.extra_gain for p in g["params"])] == [1e-3]
    with pytest.raises(ValueError, match=r"ModuleDict has no parameters in \['connector'\]; .*\['language_model'\]"):
        set_trainable_parts(torch.nn.ModuleDict({"lm_head": torch.nn.Linear(2, 2)}), ["connector"])


def test_lora_adapters_train_and_parts_do_not_thaw_the_base(make_trainer):
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(
        r=2, target_modules=r".*language_model.*(q_proj|v_proj)", modules_to_save=["multi_modal_projector"]
    )
    model = peft.get_peft_model(tiny_videochat_flash_model(), settings)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer = make_trainer(
        toy_rows(4), model=model, trainable_parts=["language_model"], learning_rate=1e-2, max_steps=2
    )
    trainer.train()
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed and all("lora_" in name for name in changed)


@pytest.mark.parametrize(
    ("stage", "parts", "rate", "batch", "length"),
    [
        (1, ["connector"], 1e-3, 512, 8192),
        (2, list(PARTS), 1e-5, 256, 32768),
        (3, list(PARTS), 1e-5, 256, 32768),
        (4, ["vision_tower", "connector"], 1e-5, 256, 32768),
    ],
)
def test_recipe_of_the_paper(tmp_path, stage, parts, rate, batch, length):
    args = VideoSFTConfig.from_recipe("videochat_flash", stage, output_dir=str(tmp_path), bf16=False)
    assert (args.trainable_parts, args.learning_rate, args.max_length) == (parts, rate, length)
    assert args.part_learning_rates["vision_tower"] == (rate if stage == 1 else 2e-6)
    entry = list(load_recipe("videochat_flash")["stages"].values())[stage - 1]
    per_gpu = args.per_device_train_batch_size * args.gradient_accumulation_steps
    assert entry["gpus"] * per_gpu == entry["global_batch_size"] == batch
    assert args.get_warmup_steps(1000) == 30


def test_unknown_recipes(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"No recipe 'absent'.*\['crosslmm', .*'videochat_flash'\]"):
        load_recipe("absent")
    with pytest.raises(ValueError, match=r"has no stage 5; it has \['stage1_alignment'"):
        VideoSFTConfig.from_recipe("videochat_flash", 5, output_dir=str(tmp_path))
    path = Path(tmp_path) / "empty.yaml"
    path.write_text("a: 1", encoding="utf-8")
    with pytest.raises(ValueError, match=r"empty.yaml is no recipe: expected a mapping with `stages`"):
        load_recipe(str(path))


def test_rates_that_fall_on_a_plateau_are_logged(tmp_path):
    """The scheduler of that name notes no first rates in the optimizer."""
    args = {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 1}
    trainer = short_run(
        tmp_path,
        tiny_videochat_flash_model(),
        tiny_videochat_flash_processor(),
        toy_rows(3),
        metric_for_best_model="eval_loss",
        learning_rate=1e-3,
        connector_learning_rate=1e-4,
        **args,
    )
    trainer.train()
    entry = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert (entry["learning_rate_language_model"], entry["learning_rate_connector"]) == (1e-3, 1e-4)


def test_deepspeed_rounds_no_coordinates(tmp_path, monkeypatch):
    trainer = short_run(tmp_path, tiny_videochat_flash_model(), tiny_videochat_flash_processor(), toy_rows(1))
    config = SimpleNamespace(dtype=lambda: torch.bfloat16)
    plugin = SimpleNamespace(hf_ds_config=config)
    monkeypatch.setattr(trainer, "is_deepspeed_enabled", True)
    state = SimpleNamespace(deepspeed_plugin=plugin)
    monkeypatch.setattr(trainer, "accelerator", SimpleNamespace(state=state))
    batch = {"coordinate_values": torch.tensor([[0.333]]), "pixel_values": torch.tensor([[0.333]])}
    ready = trainer._prepare_input(batch)
    assert ready["pixel_values"].dtype == torch.bfloat16 and torch.equal(
        ready["coordinate_values"], torch.tensor([[0.333]])
    )
