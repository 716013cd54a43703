"""`VideoDPOTrainer` on every architecture: scores, towers that run once, sums over batches, references, logs."""

import copy
from typing import Any

import pytest
import torch

from longvideo.trainers import VideoSFTConfig, part_of
from longvideo.trainers.dpo_config import VideoDPOConfig
from longvideo.trainers.dpo_trainer import VideoDPOTrainer
from longvideo.trainers.dpo_visuals import encode_pairs
from tests.trainers.dpo_runs import (
    LN_2,
    adapted,
    counted_frames,
    dpo_run,
    logged,
    model_of,
    pair_of,
    pairs_of,
    randomize,
    single_scores,
    trainer_scores,
)
from tests.trainers.sft_runs import changed_names, image_row, short_run, snapshot
from tests.trainers.toy_rows import colour_row
from tests.trainers.zoo import KINDS

peft = pytest.importorskip("peft")
NAMES = sorted(KINDS)
METRICS = [f"rewards/{name}" for name in ("chosen", "rejected", "accuracies", "margins")]


@pytest.mark.parametrize(
    ("name", "side"),
    [
        ("videochat_flash", "left"),
        ("videochat_flash", "right"),
        ("videochat_flash-dropout", "left"),
        ("videochat_flash-dropout", "right"),
        ("llava_st", "left"),
        ("llava_st", "right"),
        ("llava_st-split", "left"),
        ("crosslmm", "left"),
        ("crosslmm", "right"),
    ],
)
def test_scores_of_a_batch_are_those_of_single_answers(tmp_path, name, side):
    """Unequal answers in one batch, padded on either side, against the loss of supervised finetuning of each alone."""
    rows = pairs_of(name)
    trainer = dpo_run(tmp_path, name, adapted(name, seed=1), rows, padding_side=side)
    found = trainer_scores(trainer, rows)
    # Sums of up to 40 tokens in float32, with other padding.
    torch.testing.assert_close(found, single_scores(name, trainer.model, rows), rtol=1e-4, atol=2e-3)


@pytest.mark.parametrize("side", ["left", "right"])
def test_scores_of_longvu_are_those_of_single_pairs(tmp_path, side):
    rows = pairs_of("longvu")
    trainer = dpo_run(tmp_path, "longvu", adapted("longvu", seed=1), rows, padding_side=side)
    singles = torch.cat([trainer_scores(trainer, [row]) for row in rows])
    # Sums of up to 40 tokens in float32, with other padding.
    torch.testing.assert_close(trainer_scores(trainer, rows), singles, rtol=1e-4, atol=2e-3)


def test_answers_to_one_prompt_see_the_same_of_longvu(tmp_path):
    """Frames raised to the full grid are chosen by the question; the longer answer takes none of them away."""
    model = adapted("longvu")
    long = "It is blue, so I believe."
    rows = [pair_of(colour_row("blue", num_frames=8, answer="Blue."), long)]
    seen = []
    inner = model.get_base_model().model
    inner.register_forward_hook(lambda module, args, output: seen.append(output.video_selections))
    for answer in ("no", long):
        trainer = dpo_run(tmp_path, "longvu", model, rows)
        trainer_scores(trainer, [{**rows[0], "rejected": [{"role": "assistant", "content": answer}]}])
    short, longer = seen
    for pair in seen:
        assert torch.equal(pair[0].token_grid_index, pair[1].token_grid_index)
        assert torch.equal(pair[0].full_resolution, pair[1].full_resolution)
    assert short[0].mode == "mix" and 0 < short[0].full_resolution.sum() < 8
    # What chooses is the prompt: the scores of its frames do not know the answer.
    assert torch.equal(short[0].query_scores, longer[0].query_scores)
    assert len(longer[0].token_frame) < len(short[0].token_frame)
    # Without the prompt marked, an answer of its own choosing: the original's way of training.
    batch = trainer.data_collator(rows)
    with torch.no_grad():
        pixels = {key: value.repeat(2, *[1] * (value.ndim - 1)) for key, value in batch.items() if "video" in key}
        names = ("input_ids", "attention_mask")
        model(**{name: batch[name] for name in names}, **pixels)
    assert not torch.equal(seen[-1][0].query_scores, seen[-1][1].query_scores)


@pytest.mark.parametrize("name", NAMES)
def test_frozen_towers_run_once_for_answers_policy_and_reference(tmp_path, name):
    rows = pairs_of(name)[:2]
    for model, args in (
        (adapted(name, seed=1), {}),
        (model_of(name), {"ref_model": model_of(name), "trainable_parts": ["connector", "language_model"]}),
    ):
        trainer = dpo_run(tmp_path, name, model, rows, **args)
        with counted_frames(model) as counts, counted_frames(args.get("ref_model", torch.nn.Module())) as more:
            trainer.train()
        assert counts | more == dict.fromkeys(counts | more, 12) and counts.keys() & more.keys() == set()
        assert set(counts | more) == {"vision_tower"} | ({"dino_tower"} if name == "longvu" else set())
        assert all("forward" not in vars(module) for module in model.modules())


def test_towers_that_learn_run_once_for_both_answers(tmp_path):
    name = "videochat_flash"
    model, other = model_of(name), model_of(name)
    trainer = dpo_run(tmp_path, name, model, pairs_of(name)[:2], ref_model=other)
    with counted_frames(model) as counts, counted_frames(other) as more:
        trainer.train()
    assert counts == more == {"vision_tower": 12}
    # A reference with other towers looks for itself.
    other = model_of(name, seed=1)
    trainer = dpo_run(tmp_path, name, model, pairs_of(name)[:2], ref_model=other, trainable_parts=["language_model"])
    with counted_frames(model) as counts, counted_frames(other) as more:
        trainer.train()
    assert counts == more == {"vision_tower": 12}


@pytest.mark.parametrize("name", [*NAMES, "videochat_flash-dropout", "llava_st-split"])
def test_the_first_loss_is_ln_2_and_learning_widens_the_margin(tmp_path, name):
    model = adapted(name)
    before = snapshot(model)
    # At a rate that suits the tiny adapter.
    trainer = dpo_run(tmp_path, name, model, pairs_of(name)[:2], max_steps=4, learning_rate=2e-2)
    trainer.train()
    # Policy and reference are the same numbers until the first step, computed in the same way.
    assert logged(trainer)[0] == pytest.approx(LN_2, abs=1e-6)
    assert logged(trainer, "rewards/margins")[0] == pytest.approx(0, abs=1e-5)
    assert logged(trainer)[-1] < 0.8 * LN_2 and logged(trainer, "rewards/margins")[-1] > 0.2
    assert logged(trainer, "rewards/accuracies")[-1] == 1
    changed = changed_names(model, before)
    assert changed and all("lora_" in name for name in changed)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == changed


@pytest.mark.parametrize("name", NAMES)
def test_identical_answers_give_ln_2_whatever_was_learned(tmp_path, name):
    rows = [{**row, "rejected": row["chosen"]} for row in pairs_of(name)]
    trainer = dpo_run(tmp_path, name, adapted(name, seed=3), rows, beta=0.7)
    # Both rows of a pair are computed alike in one batch.
    assert trainer.evaluate()["eval_loss"] == pytest.approx(LN_2, abs=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_accumulated_pairs_equal_a_batch_of_them(tmp_path, name):
    """Also with a last batch that is smaller."""
    rows = pairs_of(name)[:3]
    found = []
    for size, steps in ((3, 1), (2, 2)):
        model = adapted(name, seed=2)
        args = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "learning_rate": 1e-2}
        trainer = dpo_run(tmp_path, name, model, rows, optim="sgd", max_grad_norm=0.0, **args)
        trainer.train()
        weights = {key: p.detach() for key, p in model.named_parameters() if p.requires_grad}
        found.append((logged(trainer)[0], weights))
    for loss, weights in found[1:]:
        # The same float32 sums in another order.
        assert loss == pytest.approx(found[0][0], rel=1e-4)
        for key, value in weights.items():
            torch.testing.assert_close(value, found[0][1][key], rtol=1e-4, atol=1e-5)


def test_loss_is_the_formula_over_single_scores(tmp_path):
    name, beta = "videochat_flash", 0.3
    rows, model = pairs_of(name), adapted(name, seed=4)
    policy = single_scores(name, model, rows)
    with model.disable_adapter():
        reference = single_scores(name, model, rows)
    counts = torch.tensor([[len(text) + 1 for text in pair] for pair in texts_of(rows)])
    for normalized in (False, True):
        divisor = counts if normalized else 1
        ratios = (policy - reference) / divisor
        margins = beta * (ratios[:, 0] - ratios[:, 1])
        args = {"beta": beta, "length_normalized": normalized, "label_smoothing": 0.1}
        metrics = dpo_run(tmp_path, name, model, rows, **args).evaluate()
        losses = 0.9 * (1 + (-margins).exp()).log() + 0.1 * (1 + margins.exp()).log()
        # Sums of up to 20 tokens in float32.
        assert metrics["eval_loss"] == pytest.approx(float(losses.mean()), rel=1e-3)
        assert metrics["eval_rewards/chosen"] == pytest.approx(float(beta * ratios[:, 0].mean()), abs=2e-3)
        assert metrics["eval_rewards/rejected"] == pytest.approx(float(beta * ratios[:, 1].mean()), abs=2e-3)
        assert metrics["eval_rewards/margins"] == pytest.approx(float(margins.mean()), abs=2e-3)
        assert metrics["eval_rewards/accuracies"] == pytest.approx(float((margins > 0).float().mean()))
        logps = (policy / divisor).mean(0)
        assert metrics["eval_logps/chosen"] == pytest.approx(float(logps[0]), rel=1e-3)
        assert metrics["eval_logps/rejected"] == pytest.approx(float(logps[1]), rel=1e-3)


def texts_of(rows: list[dict[str, Any]]) -> list[tuple[str, str]]:
    found = []
    for row in rows:
        contents = [row[side][0]["content"] for side in ("chosen", "rejected")]
        found.append(tuple(text if isinstance(text, str) else text[0]["text"] for text in contents))
    return found


def test_every_reference_says_the_same(tmp_path):
    """Adapter off, a separate model, an adapter of its own, and columns."""
    name = "videochat_flash"
    rows = pairs_of(name)
    metrics = {"off": dpo_run(tmp_path, name, adapted(name, seed=5), rows).evaluate()}
    metrics["model"] = dpo_run(tmp_path, name, adapted(name, seed=5), rows, ref_model=model_of(name)).evaluate()
    two = adapted(name, seed=5)
    two.add_adapter("teacher", copy.deepcopy(two.peft_config["default"]))
    # What a stage froze of the adapter stays frozen when adapters change places.
    next(p for key, p in two.named_parameters() if "lora_A.default" in key).requires_grad_(False)
    learns = {name for name, p in two.named_parameters() if p.requires_grad}
    trainer = dpo_run(tmp_path, name, two, rows, reference_adapter="teacher")
    metrics["adapter"] = trainer.evaluate()
    marked = dpo_run(tmp_path, name, adapted(name, seed=5), rows).compute_reference(rows)
    assert [set(row) - set(rows[0]) for row in marked] == [{"ref_chosen_logps", "ref_rejected_logps"}] * 4
    metrics["columns"] = dpo_run(tmp_path, name, adapted(name, seed=5), marked).evaluate()
    metrics["precomputed"] = dpo_run(tmp_path, name, adapted(name, seed=5), rows, precompute_reference=True).evaluate()
    assert metrics["off"]["eval_loss"] != pytest.approx(LN_2, abs=1e-2)
    for kind, found in metrics.items():
        for key in ("eval_loss", "eval_rewards/chosen", "eval_rewards/rejected"):
            # The same sums in float32.
            assert found[key] == pytest.approx(metrics["off"][key], abs=1e-4), kind
    # A teacher that knows something is another reference, and what learns stays what learned.
    randomize(two, 6, "teacher")
    assert trainer.evaluate()["eval_loss"] != pytest.approx(metrics["off"]["eval_loss"], abs=1e-3)
    assert {name for name, p in two.named_parameters() if p.requires_grad} == learns
    assert two.active_adapters == ["default"]


def test_precomputed_columns_of_a_table_need_no_reference_model(tmp_path):
    datasets = pytest.importorskip("datasets")
    name, rows = "videochat_flash", pairs_of("videochat_flash")
    texts = [{"prompt": "Which?", "chosen": a, "rejected": b} for a, b in texts_of(rows)]
    table = datasets.Dataset.from_list(texts)
    model = model_of(name)
    args = {"trainable_parts": ["language_model"], "max_steps": 3, "learning_rate": 1e-3}
    trainer = dpo_run(tmp_path, name, model, table, precompute_reference=True, **args)
    marked = trainer.train_dataset
    assert marked.column_names[-2:] == ["ref_chosen_logps", "ref_rejected_logps"]
    trainer.train()
    # The model was its own reference before it learned.
    assert logged(trainer)[0] == pytest.approx(LN_2, abs=1e-5) and logged(trainer)[2] < LN_2 - 1e-3
    again = dpo_run(tmp_path, name, model_of(name), marked)
    assert again.evaluate()["eval_loss"] == pytest.approx(LN_2, abs=1e-5)
    with pytest.raises(ValueError, match="IterableDataset cannot be computed before training: it has no length"):
        trainer.compute_reference(table.to_iterable_dataset())


def test_logs_and_evaluations_carry_rewards(tmp_path):
    name = "crosslmm"
    args = {"max_steps": 2, "eval_strategy": "steps", "eval_steps": 1, "logging_steps": 2}
    trainer = dpo_run(tmp_path, name, adapted(name, seed=1), pairs_of(name), **args)
    trainer.train()
    train = next(entry for entry in trainer.state.log_history if "loss" in entry)
    evaluations = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert {*METRICS, "logps/chosen", "logps/rejected", "frames_per_second"} <= set(train) and len(evaluations) == 2
    assert {f"eval_{name}" for name in METRICS} <= set(evaluations[0])
    assert train["rewards/margins"] == pytest.approx(train["rewards/chosen"] - train["rewards/rejected"], abs=1e-4)
    # Predictions are the rewards of every pair.
    output = trainer.predict(pairs_of(name)[:3])
    assert output.predictions.shape == (3, 2) and output.label_ids.tolist() == [0, 0, 0]
    margins = output.predictions[:, 0] - output.predictions[:, 1]
    assert output.metrics["test_rewards/margins"] == pytest.approx(float(margins.mean()), abs=1e-4)


def test_images_and_text_alone_are_compared_too(tmp_path):
    text = {"prompt": "Hello", "chosen": "Hi", "rejected": "Go away"}
    rows = [pair_of(image_row("What?", "Grey."), "Pink it is."), text, pairs_of("longvu")[1]]
    for name in ("videochat_flash", "longvu"):
        trainer = dpo_run(tmp_path, name, adapted(name, seed=1), rows)
        found = trainer_scores(trainer, rows)
        singles = torch.cat([trainer_scores(trainer, [row]) for row in rows])
        # Sums of up to 20 tokens in float32, with other padding.
        torch.testing.assert_close(found, singles, rtol=1e-4, atol=2e-3)


def test_encoded_features_of_rows_are_shared_by_both_answers(tmp_path):
    name = "videochat_flash"
    rows, model = pairs_of(name), adapted(name, seed=1)
    plain = dpo_run(tmp_path, name, model, rows).evaluate()
    trainer = dpo_run(tmp_path, name, model, rows, encoded_features_dir=str(tmp_path / "features"))
    with counted_frames(model) as counts:
        found = [trainer.evaluate() for _ in range(2)]
    # Every frame once, in the first pass.
    assert counts == {"vision_tower": 24}
    for metrics in found:
        # The same features, written and read.
        assert metrics["eval_loss"] == pytest.approx(plain["eval_loss"], abs=1e-5)


def test_gradient_checkpointing_and_grouped_rows(tmp_path):
    name = "videochat_flash"
    found = []
    for args in ({}, {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}):
        model = adapted(name, seed=1)
        trainer = dpo_run(tmp_path, name, model, pairs_of(name), learning_rate=1e-2, max_steps=2, **args)
        trainer.train()
        found.append(logged(trainer))
    # Recomputed by the same operations.
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    grouped = dpo_run(tmp_path, name, adapted(name), pairs_of(name), train_sampling_strategy="group_by_length")
    assert sorted(grouped._get_train_sampler()) == [0, 1, 2, 3]
    grouped.train()


def test_trained_adapters_are_saved_and_resumed(tmp_path):
    name = "videochat_flash"
    args = {"max_steps": 3, "learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 2}
    whole = dpo_run(tmp_path, name, adapted(name), pairs_of(name), **args)
    whole.train()
    (tmp_path / "run" / "checkpoint-3").rename(tmp_path / "done")
    resumed = dpo_run(tmp_path, name, adapted(name), pairs_of(name), **args)
    resumed.train(resume_from_checkpoint=True)
    # The same operations on the same numbers.
    assert logged(resumed)[2:] == logged(whole)[2:]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": 0.0}, "beta=0.0 must be positive"),
        ({"label_smoothing": 0.5}, "label_smoothing=0.5 must be at least 0 and below 0.5"),
        ({"loss_type": "hinge"}, "loss_type='hinge' is unknown"),
        ({"loss_type": "ipo", "label_smoothing": 0.1}, "label_smoothing has no meaning for loss_type='ipo'"),
        ({"padding_side": "top"}, "padding_side='top' is unknown"),
        ({"label_rule": "longvu"}, "label_rule='longvu' is a setting of supervised finetuning"),
        ({"mask": "all"}, "mask='all' is a setting of supervised finetuning"),
        ({"blank_image_position": 91}, "blank_image_position=91 is a setting of supervised finetuning"),
    ],
)
def test_settings_out_of_range(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        VideoDPOConfig(str(tmp_path), **settings)


def test_recipes_lend_their_settings(tmp_path):
    args = VideoDPOConfig.from_recipe("llava_st", 3, output_dir=str(tmp_path), bf16=False, beta=0.2)
    assert (args.label_rule, args.mask, args.beta, args.max_length) == (None, "assistant", 0.2, 32768)


def test_runs_without_a_reference_do_not_start(tmp_path):
    name, rows = "videochat_flash", pairs_of("videochat_flash")
    with pytest.raises(ValueError, match="There is no reference: the model has no adapter to switch off"):
        dpo_run(tmp_path, name, model_of(name), rows)
    model = model_of(name)
    with pytest.raises(ValueError, match="ref_model is the model that learns itself"):
        dpo_run(tmp_path, name, model, rows, ref_model=model)
    with pytest.raises(ValueError, match="ref_model is a 'longvu' model, the model that learns a 'videochat_flash'"):
        dpo_run(tmp_path, name, model, rows, ref_model=model_of("longvu"))
    with pytest.raises(ValueError, match=r"reference_adapter='teacher' must be .* it has \['default'\], of which"):
        dpo_run(tmp_path, name, adapted(name), rows, reference_adapter="teacher")
    with pytest.raises(ValueError, match=r"reference_adapter='default' must be an adapter .* beside the one that"):
        dpo_run(tmp_path, name, adapted(name), rows, reference_adapter="default")
    with pytest.raises(ValueError, match=r"it has \[\], of which"):
        dpo_run(tmp_path, name, model_of(name), rows, reference_adapter="default")
    with pytest.raises(ValueError, match="Both ref_model and reference_adapter were given"):
        dpo_run(tmp_path, name, adapted(name), rows, reference_adapter="x", ref_model=model_of(name))
    half = adapted(name)
    half.get_base_model().model.multi_modal_projector.requires_grad_(True)
    with pytest.raises(ValueError, match=r"4 parameters outside of the adapter learn.*without its adapter is no ref"):
        dpo_run(tmp_path, name, half, rows)
    with pytest.raises(ValueError, match="args must be a VideoDPOConfig, got VideoSFTConfig"):
        VideoDPOTrainer(model, VideoSFTConfig(str(tmp_path), use_cpu=True))


def test_a_stream_without_reference_stops_at_its_first_row(tmp_path):
    datasets = pytest.importorskip("datasets")
    stream = datasets.Dataset.from_list([{"prompt": "Which?", "chosen": "a", "rejected": "b"}]).to_iterable_dataset()
    trainer = dpo_run(tmp_path, "videochat_flash", model_of("videochat_flash"), stream)
    with pytest.raises(ValueError, match="There is no reference"):
        trainer.train()


def test_a_loss_that_is_no_number_names_its_rows(tmp_path):
    name, model = "videochat_flash", adapted("videochat_flash")
    trainer = dpo_run(tmp_path, name, model, pairs_of(name))
    with torch.no_grad():
        next(p for key, p in model.named_parameters() if "lora_B" in key).fill_(float("nan"))
    with pytest.raises(FloatingPointError, match=r"loss of step 1 is nan .*id 'red-4'.*id 'blue-8'"):
        trainer.train()


def test_a_model_is_as_it_was_after_a_pass(tmp_path):
    model = model_of("longvu")
    batch = dpo_run(tmp_path, "longvu", model, pairs_of("longvu"), ref_model=model_of("longvu")).data_collator(
        pairs_of("longvu")
    )
    with encode_pairs(model, batch):
        assert len(model.model._forward_pre_hooks) == 1
    assert not model.model._forward_pre_hooks and part_of("model.vision_tower.x") == "vision_tower"


def test_the_reference_stays_while_adapter_rows_and_tables_learn(tmp_path):
    """With the adapter of `lora_config`: embedding rows and coordinate tables learn, the reference does not see it."""
    from longvideo.trainers import lora_config

    name = "llava_st-split"
    rows = pairs_of(name)[:2]
    base = model_of(name)
    model = peft.get_peft_model(base, lora_config(base, r=4))
    trainer = dpo_run(tmp_path, name, model, rows, max_steps=2, learning_rate=1e-2)
    columns = ("ref_chosen_logps", "ref_rejected_logps")
    before = [[row[key] for key in columns] for row in trainer.compute_reference(rows)]
    trainer.train()
    after = [[row[key] for key in columns] for row in trainer.compute_reference(rows)]
    # The same operations on the same numbers.
    torch.testing.assert_close(torch.tensor(after), torch.tensor(before), rtol=0, atol=1e-5)
    assert logged(trainer)[0] == pytest.approx(LN_2, abs=1e-6)
    assert (trainer_scores(trainer, rows) - torch.tensor(before)).abs().min() > 1e-3


def test_longvu_may_leave_labelled_answers_out_of_its_query():
    """An option of supervised finetuning; the releases let the answer choose frames as well."""
    from longvideo.trainers import VideoSFTCollator

    model = model_of("longvu")
    row = {"messages": colour_row("blue", num_frames=8, answer="It is blue, I say.")["messages"]}
    batch = VideoSFTCollator(KINDS["longvu"].processor())([row])
    answer = batch["labels"][0] != -100
    other = {**batch, "input_ids": batch["input_ids"].clone()}
    other["input_ids"][0][answer] = batch["input_ids"][0][answer].flip(0)
    other["input_ids"][0][answer.nonzero()[:9]] = 77
    other["labels"] = other["input_ids"].masked_fill(~answer, -100)
    for option in (False, True):
        model.config.query_without_answer = option
        with torch.no_grad():
            seen = [model(**x).video_selections[0] for x in (batch, other)]
        assert seen[0].mode == "mix"
        assert torch.equal(seen[0].query_scores, seen[1].query_scores) == option


@pytest.mark.parametrize("name", NAMES)
def test_a_step_costs_little_more_than_finetuning_on_both_answers(tmp_path, name):
    """Operations of forward and backward, counted: at most 1.6 times those of both answers as rows of their own."""
    from torch.utils.flop_counter import FlopCounterMode

    rows = pairs_of(name)
    both = [{"messages": [*row["prompt"], *row[side]]} for row in rows for side in ("chosen", "rejected")]
    plain = short_run(tmp_path, adapted(name), KINDS[name].processor(), both)
    costs = []
    for trainer, batch in ((plain, both), (dpo_run(tmp_path, name, adapted(name), rows), rows)):
        inputs = trainer.data_collator(batch)
        trainer.model.train()
        with FlopCounterMode(display=False) as counter:
            trainer.compute_loss(trainer.model, inputs).backward()
        costs.append(counter.get_total_flops())
    assert 0.5 * costs[0] < costs[1] <= 1.6 * costs[0]
