"""`CrossGranularityTrainer`: alternation, both references, the printed loss, odd policies, checkpoints, evaluation."""

import itertools
import math
from collections import Counter

import pytest
import torch
from transformers import AutoModelForImageTextToText

from longvideo.processing.crossvllm.policies import policy_text
from longvideo.trainers import (
    CrossGranularityConfig,
    CrossGranularityTrainer,
    VideoSFTConfig,
    VideoSFTTrainer,
    coarse_grounding_row,
    fine_answer_row,
)
from longvideo.trainers.cross_granularity_modules import answering, generate
from longvideo.trainers.cross_granularity_rows import as_question
from tests.reference.crossvllm_losses import algorithm_1_choice, equation_9, equation_10, sequence_log_probability
from tests.trainers.cross_granularity_runs import losses_of, model_and_processor, question_row, scripted, short_run

pytest.importorskip("peft")
LN_2 = math.log(2)
SEGMENTS = [(2.0, 8.0), (14.0, 20.0), (0.0, 4.0)]
GOOD = [policy_text(*segment) for segment in SEGMENTS]


def play_good(num_samples, prompt):
    return GOOD[:1] if num_samples is None else GOOD


def snapshot(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def changed(model, before):
    return {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}


def names_of(model, granularity):
    return {f"model.{name}" for name, _ in model.granularity_parameters(granularity)}


def naive_logits(model, ids, features, granularity):
    with answering(model):
        outputs = model(input_ids=torch.tensor([ids]), vision_features=[features], granularity=granularity)
    return outputs.logits[0].double().tolist()


def test_steps_alternate_and_each_module_has_its_rate(tmp_path):
    model, processor = model_and_processor()
    trainer = short_run(
        tmp_path, model, processor, max_steps=4, gradient_accumulation_steps=1, coarse_learning_rate=1e-3,
        fine_learning_rate=2e-3,
    )  # fmt: skip
    moved, rows = [], []
    begin_step, compute_loss = trainer.begin_step, trainer.compute_loss

    def watch(step):
        moved.append(snapshot(model))
        begin_step(step)

    def note(wrapped, inputs, *args, **kwargs):
        rows.append((trainer.phase, [question.name for question in inputs["questions"]]))
        learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert learning == names_of(model, trainer.phase)
        return compute_loss(wrapped, inputs, *args, **kwargs)

    trainer.begin_step, trainer.compute_loss = watch, note
    with scripted(play_good, processor.tokenizer) as calls:
        trainer.train()
    moved.append(snapshot(model))
    for step, (before, after) in enumerate(itertools.pairwise(moved)):
        names = {name for name in before if not torch.equal(before[name], after[name])}
        own = names_of(model, ("coarse", "fine")[step % 2])
        assert names and names <= own, step
    assert [phase for phase, _ in rows] == ["coarse", "fine"] * 2
    assert rows[0][1] == rows[1][1] != rows[2][1] == rows[3][1]
    # three samples in a coarse step, the most likely policy in a fine one
    assert [count for count, *_ in calls] == [3, None] * 2
    groups = {group["part"]: group["lr"] for group in trainer.optimizer.param_groups}
    assert groups == {"coarse": 1e-3, "fine": 2e-3}
    assert losses_of(trainer, "learning_rate_fine")[0] == pytest.approx(2e-3)
    # frozen reference: the first loss is ln 2, later ones are not
    first, second = losses_of(trainer, "coarse/loss")
    assert first == pytest.approx(LN_2, abs=1e-6) and abs(second - LN_2) > 1e-4
    assert all(
        parameter.requires_grad for name in ("coarse", "fine") for _, parameter in model.granularity_parameters(name)
    )


def test_the_printed_algorithm_stays_at_ln_2_and_learns(tmp_path):
    model, processor = model_and_processor()
    trainer = short_run(tmp_path, model, processor, max_steps=4, gradient_accumulation_steps=1, ref_sync_steps=1)
    before = snapshot(model)
    with scripted(play_good, processor.tokenizer):
        trainer.train()
    # exactly: policy and reference are the same numbers; float32 of ln 2
    assert losses_of(trainer, "coarse/loss") == [pytest.approx(LN_2, abs=1e-7)] * 2
    assert changed(model, before) & names_of(model, "coarse")


def test_losses_are_the_equations(tmp_path):
    model, processor = model_and_processor()
    trainer = short_run(tmp_path, model, processor, disable_dropout=True)
    question = as_question({**question_row(0), "answer": ["red", "a red one"]})
    with torch.no_grad():  # a policy that has left its reference
        for _, parameter in model.granularity_parameters("coarse"):
            parameter.add_(torch.randn_like(parameter) * 0.02)
    with scripted(play_good, processor.tokenizer), answering(model):
        played = trainer._play(question)
        found = trainer._coarse_losses(model, [question])
        trainer.phase = "fine"
        fine = trainer._fine_losses(model, [question])
    scores = []
    for segment in SEGMENTS:
        features = trainer.seen.look(model, question, "fine", segment)
        prompt = trainer.texts.prompt(question, "fine", len(features), 24.0)
        answers = [trainer.texts.answered(question, prompt, text) for text in question.answers]
        scores.append(
            min(equation_9(naive_logits(model, ids, features, "fine"), ids, begin) for ids, begin in answers)
        )
    winner, losers = algorithm_1_choice(scores, SEGMENTS, [True] * 3)
    assert (played.choice.winner, list(played.choice.losers)) == (winner, losers)
    likelihoods = {}
    for name in ("coarse", "coarse_ref"):
        likelihoods[name] = []
        for policy in played.policies:
            ids, begin = [*played.prompt_ids, *policy.ids], len(played.prompt_ids)
            logits = naive_logits(model, ids, played.features, name)
            likelihoods[name].append(sequence_log_probability(logits, ids, begin))
    expected = equation_10(likelihoods["coarse"], likelihoods["coarse_ref"], winner, losers, 0.1)
    # float32 sums over some fifty tokens
    assert float(found[0]) == pytest.approx(expected, abs=1e-4) and abs(expected - LN_2) > 1e-3
    assert float(fine[0]) == pytest.approx(scores[0], abs=1e-4)


def test_answers_are_tokens_behind_the_prompt_with_their_end(tmp_path):
    model, processor = model_and_processor()
    trainer = short_run(tmp_path, model, processor)
    question = as_question(question_row(0))
    prompt = trainer.texts.prompt(question, "fine", 2, 24.0)
    ids, begin = trainer.texts.answered(question, prompt, "red")
    assert ids[:begin] == trainer.texts.prompt_ids(prompt) and prompt.endswith("Which colour? ASSISTANT:")
    assert processor.tokenizer.decode(ids[begin:]) == f" red{processor.tokenizer.eos_token}"
    assert ids.count(model.config.video_token_id) == 2 * 36
    coarse = trainer.texts.prompt(question, "coarse", 6, 24.0)
    assert trainer.texts.prompt_ids(coarse).count(model.config.video_token_id) == 6 * 4
    assert "The length of the original video is 24.0 seconds." in coarse and "Direct output" not in coarse


@pytest.mark.parametrize(
    ("texts", "well_formed", "pairs"),
    [
        (["What a video.", "no idea", '{"t_start": null, "t_end": null, "answer": "red"}'], 0.0, 0),
        ([GOOD[0]] * 3, 1.0, 0),
        (["nonsense", GOOD[1], GOOD[1]], 2 / 3, 1),
        (['{"t_start": 90, "t_end": 95, "answer": ""}', GOOD[1], GOOD[2]], 2 / 3, 2),
    ],
    ids=["unreadable", "identical", "one unreadable", "behind the end"],
)
def test_odd_policies(tmp_path, texts, well_formed, pairs):
    model, processor = model_and_processor()
    trainer = short_run(tmp_path, model, processor, rows=[question_row(0)], gradient_accumulation_steps=1)
    before = snapshot(model)
    with scripted(lambda count, prompt: texts[:1] if count is None else texts, processor.tokenizer):
        trainer.train()
    assert losses_of(trainer, "coarse/pairs") == [pairs]
    assert losses_of(trainer, "coarse/well_formed") == [pytest.approx(well_formed)]
    names = changed(model, before)
    assert bool(names & names_of(model, "coarse")) == bool(pairs)
    assert names & names_of(model, "fine")  # the sample stays for the fine module
    losses = losses_of(trainer, "coarse/loss")
    assert losses == ([pytest.approx(LN_2, abs=1e-6)] if pairs else []) and losses_of(trainer, "loss")[0] >= 0
    if not well_formed:
        assert losses_of(trainer, "reward/winner_overlap") == [0.0] == losses_of(trainer, "loss")[:1]


def test_placeholders_in_policies_do_not_end_the_run(tmp_path):
    model, processor = model_and_processor()
    trainer = short_run(tmp_path, model, processor, rows=[question_row(0)], gradient_accumulation_steps=1)
    token = processor.video_token
    texts = [GOOD[0], GOOD[1].replace("14", f"1{token}4"), f"{token}{processor.image_token}"]
    assert processor.tokenizer(texts[2])["input_ids"] == [processor.video_token_id, processor.image_token_id]
    with scripted(lambda count, prompt: texts[1:2] if count is None else texts, processor.tokenizer):
        trainer.train()
    # left out of a policy; what holds nothing else cannot be read
    assert losses_of(trainer, "coarse/well_formed") == [pytest.approx(2 / 3)]
    assert losses_of(trainer, "coarse/pairs") == [2.0] and math.isfinite(losses_of(trainer, "loss")[1])


@pytest.mark.parametrize("num_samples", [None, 4], ids=["most likely", "samples"])
def test_placeholders_are_not_written(tmp_path, num_samples):
    model, processor = model_and_processor()
    trainer = short_run(tmp_path, model, processor)
    config, asked = model.config, []
    head = model.lm_head.register_forward_hook(
        lambda module, args, logits: logits.index_fill(
            -1, torch.tensor([config.image_token_id, config.video_token_id]), 50.0
        )
    )
    prompt_ids, features = trainer._coarse_view(as_question(question_row(0)))
    settings = {"granularity": "coarse", "max_new_tokens": 5, "eos_token_id": [260], "pad_token_id": 0}
    for own in (None, [77]):
        model.generation_config.suppress_tokens = own
        written = generate(model, prompt_ids, features, num_samples=num_samples, **settings)
        asked.extend(token for ids in written for token in ids)
    head.remove()
    assert asked and not {config.image_token_id, config.video_token_id} & set(asked)


def test_samples_share_prompt_and_video(tmp_path):
    model, processor = model_and_processor()
    trainer = short_run(tmp_path, model, processor)
    question = as_question(question_row(0))
    prompt_ids, features = trainer._coarse_view(question)
    read = trainer.seen.num_read
    assert read == 6
    shapes = Counter()
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.update([tuple(kwargs["inputs_embeds"].shape[:2])]), with_kwargs=True
    )
    settings = {"granularity": "coarse", "max_new_tokens": 5, "eos_token_id": [260], "pad_token_id": 0}
    cold = generate(model, prompt_ids, features, num_samples=3, temperature=1e-4, **settings)
    hook.remove()
    # the prompt once, without its last token; then three rows, token by token
    assert shapes[1, len(prompt_ids) - 1] == 1 and set(shapes) == {(1, len(prompt_ids) - 1), (3, 1)}
    # hardly any temperature: every sample is the most likely text
    assert cold == generate(model, prompt_ids, features, **settings) * 3
    torch.manual_seed(0)
    warm = generate(model, prompt_ids, features, num_samples=3, temperature=1.0, **settings)
    assert len({tuple(ids) for ids in warm}) > 1
    trainer.seen.look(model, question, "coarse")
    trainer.seen.look(model, question, "fine", (0.0, 24.0))
    assert trainer.seen.num_read - read <= 2  # frames that both granularities see are read once


def test_a_run_continues_where_it_stopped_and_both_adapters_are_saved(tmp_path):
    settings = {"max_steps": 4, "gradient_accumulation_steps": 1, "save_strategy": "steps", "save_steps": 2}
    finals = []
    for resume in (None, "checkpoint-2"):
        model, processor = model_and_processor()
        trainer = short_run(tmp_path / "one", model, processor, **settings)
        folder = tmp_path / "one" / "run"
        with scripted(play_good, processor.tokenizer):
            trainer.train(resume_from_checkpoint=None if resume is None else str(folder / resume))
        finals.append((snapshot(model), losses_of(trainer, "coarse/loss")))
        assert trainer.state.global_step == 4
    (whole, losses), (again, resumed) = finals
    assert resumed == losses and abs(losses[1] - LN_2) > 1e-5  # against the reference of the first step
    for name, value in whole.items():
        assert torch.equal(value, again[name]), name
    loaded = AutoModelForImageTextToText.from_pretrained(folder / "checkpoint-4")
    for granularity in ("coarse", "fine"):
        stored = dict(loaded.granularity_parameters(granularity))
        for name, parameter in stored.items():
            assert torch.equal(parameter, whole[f"model.{name}"]), name
    assert "coarse_ref" not in loaded.granularities

    state = folder / "checkpoint-2" / "trainer_state.json"
    state.write_text(state.read_text(encoding="utf-8").replace('"global_step": 2', '"global_step": 1'))
    with pytest.raises(ValueError, match="between a coarse step and the fine step"):
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    (folder / "checkpoint-4" / "granularities.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="no checkpoint of cross-granularity training"):
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-4"))


def test_evaluation_grounds_and_answers(tmp_path):
    model, processor = model_and_processor()
    trainer = short_run(tmp_path, model, processor)
    with scripted(play_good, processor.tokenizer):
        metrics = trainer.evaluate()
    # the first clip's segment exactly, 2 to 8 s; the second's is 8 to 14 s
    assert metrics["eval_segment_iou"] == pytest.approx(0.5)
    assert metrics["eval_answer_accuracy"] == 0.0 and metrics["eval_loss"] == pytest.approx(
        metrics["eval_fine/loss"], rel=1e-5
    )


def test_evaluation_keeps_the_frames_of_a_batch_only(tmp_path):
    model, processor = model_and_processor()
    trainer = short_run(tmp_path, model, processor, per_device_eval_batch_size=1)
    trainer.eval_dataset, kept = [question_row(i) for i in range(4)], []
    step = trainer.prediction_step

    def note(*args, **kwargs):
        result = step(*args, **kwargs)
        kept.append(len(trainer.seen.sources))
        return result

    trainer.prediction_step = note
    with scripted(play_good, processor.tokenizer):
        trainer.evaluate()
    assert kept == [1] * 4
    assert (len(trainer.seen.cache), len(trainer.seen.sources)) == (0, 0)


@pytest.mark.parametrize("epochs", [0.5, 1.5])
def test_a_part_of_an_epoch_ends_behind_a_pair_of_steps(tmp_path, epochs):
    model, processor = model_and_processor()
    trainer = short_run(
        tmp_path, model, processor, rows=[question_row(i) for i in range(3)], max_steps=-1, num_train_epochs=epochs,
        gradient_accumulation_steps=1,
    )  # fmt: skip
    with scripted(play_good, processor.tokenizer):
        trainer.train()
    # three pairs are an epoch
    assert trainer.state.global_step == trainer.state.max_steps == {0.5: 4, 1.5: 10}[epochs]


@pytest.mark.parametrize(("stage", "granularity"), [(2, "coarse"), (3, "fine")])
def test_supervised_stages_train_one_module(tmp_path, stage, granularity):
    model, processor = model_and_processor(adapters=stage == 3)
    args = VideoSFTConfig.from_recipe(
        "crossvllm", stage, output_dir=str(tmp_path), max_steps=1, gradient_accumulation_steps=1, bf16=False,
        use_cpu=True, report_to=[], save_strategy="no", learning_rate=1e-2, warmup_steps=0, disable_tqdm=True,
    )  # fmt: skip
    build = coarse_grounding_row if granularity == "coarse" else fine_answer_row
    trainer = VideoSFTTrainer(model, args, train_dataset=[build(question_row(0))], processing_class=processor)
    before = snapshot(model)
    assert model.has_adapters and model.granularity == granularity
    trainer.train()
    names = changed(model, before)
    assert names and names <= names_of(model, granularity)
    batch = trainer.data_collator([build(question_row(0))])
    tokens = int((batch["input_ids"] == model.config.video_token_id).sum())
    assert tokens == {"coarse": 6 * 4, "fine": 2 * 36}[granularity]


def test_wrong_models_and_videos(tmp_path):
    model, processor = model_and_processor(adapters=False)
    with pytest.raises(ValueError, match="no two adapters to train in turn"):
        short_run(tmp_path, model, processor)
    args = CrossGranularityConfig(output_dir=str(tmp_path), use_cpu=True)
    with pytest.raises(ValueError, match="must be a CrossGranularityConfig"):
        CrossGranularityTrainer(model, VideoSFTConfig(output_dir=str(tmp_path), use_cpu=True))
    model.add_adapters()
    with pytest.raises(ValueError, match="Give processing_class"):
        CrossGranularityTrainer(model, args)
    trainer = short_run(tmp_path, model, processor)
    remote = as_question({**question_row(0), "video": "https://example.org/a.mp4"}, name="Row 5")
    with pytest.raises(ValueError, match=r"Row 5 has its video at https://example.org/a.mp4"):
        trainer._coarse_view(remote)
    with pytest.raises(ValueError, match="Row 6: 24 frames came without their rate"):
        trainer._coarse_view(as_question({**question_row(0), "video_metadata": None}, name="Row 6"))
    placeholder = as_question({**question_row(0), "question": f"{processor.video_token}?"}, name="Row 7")
    with pytest.raises(ValueError, match="Row 7: The prompt has 2 times"):
        trainer._coarse_view(placeholder)
