"""`VideoSFTTrainer` on a model of two towers that puts any number of visual tokens in place of one placeholder."""

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch

from longvideo.trainers import (
    IGNORE_INDEX,
    VideoSFTCollator,
    VideoSFTConfig,
    VideoSFTTrainer,
    load_recipe,
    part_of,
    set_trainable_parts,
)
from tests.tiny_longvu import tiny_longvu_model
from tests.tiny_longvu_processor import tiny_longvu_processor
from tests.trainers.sft_runs import (
    assert_batch_equals_rows,
    assert_same_gradients,
    changed_names,
    gradients,
    image_row,
    losses,
    short_run,
    snapshot,
)
from tests.trainers.toy_rows import colour_row, toy_rows

VIDEO_ID, IMAGE_ID = 4, 3
LEARNS = ["connector", "language_model"]
IMAGE_ROW = image_row("What?", "Grey.")
TEXT_ROW = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}
MakeTrainer = Callable[..., VideoSFTTrainer]


@pytest.fixture(scope="module")
def processor() -> Any:
    return tiny_longvu_processor()


@pytest.fixture
def make_trainer(tmp_path, processor) -> MakeTrainer:
    def make(rows: list[dict[str, Any]], *, model: Any = None, **args: Any) -> VideoSFTTrainer:
        model = tiny_longvu_model() if model is None else model
        return short_run(tmp_path, model, processor, rows, **{"trainable_parts": LEARNS, **args})

    return make


def mixed_rows() -> list[dict[str, Any]]:
    """An image, text only, and two videos of unequal length with answers of unequal length."""
    videos = [colour_row("red", num_frames=3), colour_row("blue", num_frames=8, answer="It is blue, I think.")]
    return [IMAGE_ROW, TEXT_ROW, *videos]


def test_every_parameter_has_a_part():
    model = tiny_longvu_model()
    parts = {name.split(".")[1]: part_of(name) for name, _ in model.model.named_parameters(prefix="model")}
    assert parts == {
        "vision_tower": "vision_tower",
        "dino_tower": "vision_tower",
        "vision_projectors": "connector",
        "vision_query": "connector",
        "vision_sampler": "connector",
        "multi_modal_projector": "connector",
        "image_newline": "connector",
        "language_model": "language_model",
    }
    set_trainable_parts(model, ["connector"])
    assert {part_of(name) for name, p in model.named_parameters() if p.requires_grad} == {"connector"}
    assert model.model.vision_query.requires_grad and model.model.image_newline.requires_grad


def test_batches_hold_flat_frames_of_both_towers(processor):
    batch = VideoSFTCollator(processor)(mixed_rows())
    assert batch["pixel_values_videos"].shape == batch["pixel_values_videos_dino"].shape == (11, 3, 28, 28)
    assert batch["pixel_values"].shape == batch["pixel_values_dino"].shape == (1, 3, 28, 28)
    assert batch["video_num_frames"].tolist() == [3, 8]
    assert batch["video_sizes"].shape == (2, 2)
    assert batch["image_sizes"].tolist() == [[80, 48]]
    assert "image_grids" not in batch
    assert (batch["input_ids"] == VIDEO_ID).sum(1).tolist() == [0, 0, 1, 1]
    assert (batch["input_ids"] == IMAGE_ID).sum(1).tolist() == [1, 0, 0, 0]


def test_loss_falls_and_frozen_towers_stay(make_trainer):
    model = tiny_longvu_model()
    before = snapshot(model)
    trainer = make_trainer(mixed_rows(), model=model, max_steps=8, learning_rate=5e-3)
    trainer.train()
    curve = losses(trainer)
    assert sum(curve[-2:]) < 0.8 * sum(curve[:2])
    changed = changed_names(model, before)
    assert {part_of(name) for name in changed} == set(LEARNS)
    assert "model.image_newline" in changed and "model.vision_query" in changed


def test_batch_of_4_equals_4_accumulated_rows(make_trainer, processor):
    """Text, image and videos in one batch, padded on the right, give the gradients that they give alone."""
    assert_batch_equals_rows(tiny_longvu_model(), processor, mixed_rows(), LEARNS)
    runs = [
        make_trainer(mixed_rows(), per_device_train_batch_size=size, gradient_accumulation_steps=4 // size)
        for size in (4, 1)
    ]
    for trainer in runs:
        trainer.train()
    # The same float32 sum in another order.
    assert losses(runs[0])[0] == pytest.approx(losses(runs[1])[0], rel=1e-5)


def test_gradient_checkpointing_changes_no_gradient(processor):
    batch = VideoSFTCollator(processor)(mixed_rows())
    model = tiny_longvu_model().train()
    plain = gradients(model, [batch])
    model.gradient_checkpointing_enable({"use_reentrant": False})
    # Recomputed by the same operations.
    assert_same_gradients(plain, gradients(model, [batch]), tolerance=1e-5)


def test_resume_continues_the_same_loss_curve(make_trainer, tmp_path):
    settings = {"max_steps": 3, "learning_rate": 5e-3, "save_strategy": "steps", "save_steps": 2}
    whole = make_trainer(mixed_rows(), **settings)
    whole.train()
    shutil.rmtree(tmp_path / "run" / "checkpoint-3", ignore_errors=True)
    resumed = make_trainer(mixed_rows(), **settings)
    resumed.train(resume_from_checkpoint=True)
    # Bit for bit: the same operations on the same numbers.
    assert losses(resumed)[2:] == losses(whole)[2:] and len(losses(whole)) == 3


def test_predictions_are_as_long_as_the_sequence_that_was_run(make_trainer, processor):
    """One batch inserts visual tokens, the other is text alone and returns the labels that it got."""
    trainer = make_trainer(mixed_rows(), per_device_eval_batch_size=2)
    rows = [*mixed_rows()[2:], TEXT_ROW, TEXT_ROW]
    output = trainer.predict(rows)
    assert output.predictions.shape[:2] == output.label_ids.shape
    assert output.label_ids.shape[1] > VideoSFTCollator(processor)(rows)["labels"].shape[1]
    text = [processor.tokenizer.decode(row[row != IGNORE_INDEX].tolist()) for row in output.label_ids]
    answers = [row["messages"][1]["content"] for row in rows]
    answers = [answer if isinstance(answer, str) else answer[0]["text"] for answer in answers]
    assert text == [f"{answer}<|im_end|>" for answer in answers]
    assert output.metrics["test_loss"] > 0


def test_throughput_counts_the_visual_tokens_that_were_inserted(make_trainer, processor, monkeypatch):
    rows = [colour_row("red", num_frames=3), IMAGE_ROW]
    model = tiny_longvu_model()
    with torch.no_grad():
        out = model(**VideoSFTCollator(processor)(rows))
    num_visual = sum(len(selection.token_frame) for selection in out.video_selections)
    assert num_visual > 10
    trainer = make_trainer(rows, model=model)
    clock = iter(range(0, 1000, 3))
    monkeypatch.setattr("longvideo.trainers.sft_trainer.time.perf_counter", lambda: next(clock))
    trainer.train()
    entry = next(entry for entry in trainer.state.log_history if "loss" in entry)
    # The patched clock advances 3 s from one reading to the next; rounded to one and three decimals.
    assert entry["visual_tokens_per_second"] == pytest.approx(num_visual / 3, abs=0.1)
    assert entry["frames_per_second"] == pytest.approx(1, abs=1e-3)


def test_label_rule_of_the_original(processor):
    """With a ChatML tokenizer the same labels as VideoChat-Flash's rule, whose code LongVU shares."""
    rows = toy_rows(2)
    ours = VideoSFTCollator(processor, label_rule="longvu")(rows)["labels"]
    assert torch.equal(ours, VideoSFTCollator(processor, label_rule="videochat_flash")(rows)["labels"])
    assert not torch.equal(ours, VideoSFTCollator(processor)(rows)["labels"])


def test_label_rule_of_a_llama_tokenizer(processor, monkeypatch):
    ids = {"<|begin_of_text|>": 90, "<|start_header_id|>": 91, "<|end_header_id|>": 92, "<|eot_id|>": 93, "\n\n": 94}
    monkeypatch.setattr(
        type(processor.tokenizer), "encode", lambda self, text, **kwargs: [ids[text]] if text in ids else [7, 8]
    )
    assert VideoSFTCollator(processor, label_rule="longvu")._always_supervised == [90, 91, 92, 93, 94]
    with pytest.raises(ValueError, match=r"label_rule='videochat_flash' needs '\\n' .* 2 of it. Use a ChatML"):
        VideoSFTCollator(processor, label_rule="videochat_flash")
    del ids["<|eot_id|>"]
    with pytest.raises(ValueError, match=r"Use a ChatML tokenizer \(Qwen2\) or Llama 3 tokenizer"):
        VideoSFTCollator(processor, label_rule="longvu")


@pytest.mark.parametrize(("position", "place"), [(5, 5), (91, None)])
def test_text_rows_may_see_a_black_image(make_trainer, processor, position, place):
    plain = VideoSFTCollator(processor)([TEXT_ROW])
    rows = [TEXT_ROW, colour_row("red")]
    batch = VideoSFTCollator(processor, blank_image_position=position)(rows)
    place = plain["input_ids"].shape[1] if place is None else place
    assert (batch["input_ids"] == IMAGE_ID).nonzero().tolist() == [[0, place]]
    kept = [i for i in range(plain["input_ids"].shape[1] + 1) if i != place]
    for key in ("input_ids", "labels", "attention_mask"):
        assert torch.equal(batch[key][0, kept], plain[key][0]), key
    assert batch["labels"][0, place] == IGNORE_INDEX
    black = (0 - torch.tensor([0.5, 0.5, 0.5])) / 0.5
    assert torch.equal(batch["pixel_values"], black[None, :, None, None].expand(1, 3, 28, 28))
    assert tiny_longvu_model()(**batch).loss.isfinite()
    assert make_trainer(rows, blank_image_position=position).data_collator.blank_image_position == position
    with pytest.raises(ValueError, match="blank_image_position=-1 must be a token index"):
        VideoSFTCollator(processor, blank_image_position=-1)


@pytest.mark.parametrize(("stage", "rate", "batch", "tokens"), [(1, 1e-5, 128, 576), (2, 1e-5, 64, 144)])
def test_recipe_of_the_paper(tmp_path, stage, rate, batch, tokens):
    args = VideoSFTConfig.from_recipe("longvu", stage, output_dir=str(tmp_path), bf16=False)
    assert (args.trainable_parts, args.learning_rate, args.max_length) == (LEARNS, rate, 8192)
    entry = list(load_recipe("longvu")["stages"].values())[stage - 1]
    per_gpu = args.per_device_train_batch_size * args.gradient_accumulation_steps
    assert entry["gpus"] * per_gpu == entry["global_batch_size"] == batch
    assert entry["model"]["image_token_len"] == tokens
    assert args.get_warmup_steps(1000) == 30 and args.label_rule is None
    from longvideo.modeling.longvu.configuration_longvu import LongVUConfig

    assert LongVUConfig(**entry["model"]).grid_size ** 2 == tokens
