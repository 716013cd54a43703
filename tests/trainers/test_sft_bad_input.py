"""Wrong input in the middle of an epoch: named rows, other rows go on, and checkpoints stay as they are."""

import inspect
import json
from typing import Any

import pytest
import torch

from longvideo.trainers import IGNORE_INDEX, VideoSFTCollator, VideoSFTConfig, find_last_checkpoint
from longvideo.trainers.bad_media import BadMediaError, BadMediaLog
from longvideo.trainers.batch_checks import all_finite, check_batch
from tests.tiny_crosslmm import tiny_crosslmm_model
from tests.tiny_crosslmm_processor import tiny_crosslmm_processor
from tests.trainers.sft_runs import losses, short_run
from tests.trainers.toy_rows import COLOURS, colour_row, toy_rows
from tests.videos import make_video


@pytest.fixture(scope="module")
def processor() -> Any:
    return tiny_crosslmm_processor()


def file_row(path: Any, name: str) -> dict[str, Any]:
    user = [{"type": "video", "path": str(path)}, {"type": "text", "text": "What?"}]
    return {"id": name, "messages": [{"role": "user", "content": user}, {"role": "assistant", "content": "Stripes."}]}


@pytest.fixture
def mixed(tmp_path) -> list[dict[str, Any]]:
    """A good file, a broken one, an absent one, and frames in memory."""
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(make_video(tmp_path / "good.mp4", num_frames=16, fps=4).read_bytes()[:300])
    paths = {"good": tmp_path / "good.mp4", "broken": broken, "absent": tmp_path / "absent.mp4"}
    return [*(file_row(path, name) for name, path in paths.items()), colour_row("red")]


def test_unreadable_video_is_named(processor, mixed):
    with pytest.raises(BadMediaError, match=r"Row 1 of the batch \(id 'broken'\): .*broken\.mp4.* cannot be read"):
        VideoSFTCollator(processor)(mixed)
    with pytest.raises(BadMediaError, match=r"\(id 'absent'\): .*absent\.mp4' cannot be read: FileNotFoundError"):
        VideoSFTCollator(processor)([mixed[0], mixed[2]])
    picture = [{"type": "image", "path": "absent.png"}, {"type": "text", "text": "What?"}]
    row = {"messages": [{"role": "user", "content": picture}, {"role": "assistant", "content": "Grey."}]}
    with pytest.raises(BadMediaError, match=r"Row 0 of the batch \('absent\.png'\): 'absent\.png' cannot be read"):
        VideoSFTCollator(processor)([row])


def test_error_that_is_not_a_video_s_keeps_its_text(processor, mixed):
    row = file_row(mixed[0]["messages"][0]["content"][0]["path"], "typed")
    row["messages"][0]["content"][1]["text"] = f"What is {processor.video_token}?"
    with pytest.raises(ValueError, match=r"\(id 'typed'\): .*2") as error:
        VideoSFTCollator(processor, on_bad_video="skip")([row])
    assert not isinstance(error.value, BadMediaError)


def test_other_rows_go_on(processor, mixed, tmp_path):
    log = BadMediaLog(tmp_path / "run")
    collator = VideoSFTCollator(processor, on_bad_video="skip", bad_videos=log, with_facts=True)
    batch = collator(mixed)
    facts = batch.pop("batch_facts")
    assert facts.num_skipped == log.count == 2
    assert facts.rows == ("Row 0 of the batch (id 'good')", "Row 3 of the batch (id 'red-4')")
    expected = VideoSFTCollator(processor)([mixed[0], mixed[3]])
    assert batch.keys() == expected.keys() and all(torch.equal(batch[key], expected[key]) for key in batch)
    collator(mixed)
    lines = [json.loads(line) for line in (tmp_path / "run" / "bad_videos.jsonl").read_text().splitlines()]
    assert [line["row"].split("'")[1] for line in lines] == ["broken", "absent"] * 2
    assert "FileNotFoundError" in lines[1]["reason"] and "absent.mp4" in lines[1]["source"]


def test_batch_without_a_good_row_takes_another_one(processor, mixed):
    collator = VideoSFTCollator(processor, on_bad_video="skip", with_facts=True, spare_rows=mixed)
    one, same = (collator(mixed[1:3])["batch_facts"] for _ in range(2))
    assert one == same and len(one.rows) == 1 and "in place of rows that cannot be read" in one.rows[0]
    assert one.num_skipped == 2
    with pytest.raises(ValueError, match=r"None of 18 rows one after the other can be read.*no matter of single"):
        VideoSFTCollator(processor, on_bad_video="skip", spare_rows=mixed[1:3])(mixed[1:3])
    with pytest.raises(ValueError, match="None of 1 rows"):
        VideoSFTCollator(processor, on_bad_video="skip")(mixed[1:2])


def test_streams_take_the_last_good_row_again(processor, mixed):
    """A stream cannot be asked for another row; neither can a collator that was given none."""
    for spares in (None, iter(mixed)):
        collator = VideoSFTCollator(processor, on_bad_video="skip", with_facts=True, spare_rows=spares)
        with pytest.raises(ValueError, match="None of 1 rows"):
            collator(mixed[1:2])
        collator([mixed[0]])
        collator([mixed[3]])
        facts = collator(mixed[1:2])["batch_facts"]
        assert "in place of rows that cannot be read" in facts.rows[0] and facts.num_skipped == 1


def test_evaluation_takes_no_row_of_training(tmp_path, processor, mixed):
    trainer = short_run(tmp_path, tiny_crosslmm_model(), processor, [mixed[0]], on_bad_video="skip")
    assert len(trainer.data_collator.spare_rows) == 1
    for loader in (trainer.get_eval_dataloader(mixed[1:2]), trainer.get_test_dataloader(mixed[1:2])):
        with pytest.raises(ValueError, match=r"in evaluation none takes its place.*'broken'"):
            next(iter(loader))
    assert len(trainer.data_collator.spare_rows) == 1


@pytest.mark.parametrize("num_workers", [0, 1])
def test_epoch_with_bad_videos(tmp_path, processor, mixed, num_workers):
    args = {
        "per_device_train_batch_size": 1,
        "max_steps": -1,
        "num_train_epochs": 1,
        "dataloader_num_workers": num_workers,
    }
    trainer = short_run(tmp_path, tiny_crosslmm_model(), processor, mixed, on_bad_video="skip", **args)
    trainer.train()
    assert trainer.state.global_step == 4 and len(losses(trainer)) == 4
    assert max(entry.get("skipped_rows", 0) for entry in trainer.state.log_history) == 2
    assert len((tmp_path / "run" / "bad_videos.jsonl").read_text().splitlines()) >= 2


def test_last_checkpoint_survives_an_unreadable_video(tmp_path, processor, mixed):
    rows = [*toy_rows(4), mixed[2]]
    args = {"max_steps": -1, "num_train_epochs": 1, "save_strategy": "steps", "save_steps": 1, "data_seed": 1}
    trainer = short_run(
        tmp_path, tiny_crosslmm_model(), processor, rows, per_device_train_batch_size=1, **args,
        train_sampling_strategy="sequential",
    )  # fmt: skip
    with pytest.raises(BadMediaError, match="absent"):
        trainer.train()
    checkpoint = find_last_checkpoint(trainer.args.output_dir)
    # The loader reads one batch ahead.
    assert checkpoint is not None and checkpoint.endswith("checkpoint-3")
    again = short_run(
        tmp_path, tiny_crosslmm_model(), processor, rows, per_device_train_batch_size=1, **args,
        train_sampling_strategy="sequential", on_bad_video="skip",
    )  # fmt: skip
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 5 and losses(again)[:3] == losses(trainer)


def test_masked_label_is_named(processor):
    silent = {"id": 7, "messages": [{"role": "user", "content": "Hi"}]}
    with pytest.raises(ValueError, match=r"Row 1 of the batch \(id 7\) has no supervised token.*role 'assistant'"):
        VideoSFTCollator(processor, on_bad_video="skip")([colour_row("red"), silent])
    batch = VideoSFTCollator(processor, with_facts=True)([colour_row("red")])
    batch["labels"] = torch.full_like(batch["labels"], IGNORE_INDEX)
    with pytest.raises(ValueError, match=r"no supervised token.*\(Row 0 of the batch \(id 'red-4'\)\)"):
        check_batch(batch, video_token_id=processor.video_token_id)


def poisoned_run(tmp_path, processor, *, at: str, **args: Any) -> Any:
    """A run of which the third step goes wrong, in the loss or in the gradients alone."""
    model = tiny_crosslmm_model()
    settings = {"max_steps": 5, "save_strategy": "steps", "save_steps": 1, "train_sampling_strategy": "sequential"}
    rows = [colour_row(name) for name in COLOURS] * 3
    trainer = short_run(tmp_path, model, processor, rows, **{**settings, **args})
    forward = model.forward

    def poisoned(*inputs: Any, **kwargs: Any) -> Any:
        output = forward(*inputs, **kwargs)
        if trainer.state.global_step == 2 and at == "loss":
            output.loss = output.loss * float("inf")
        if trainer.state.global_step == 2 and at == "gradient":
            output.loss.register_hook(lambda gradient: gradient * float("nan"))
        return output

    poisoned.__signature__ = inspect.signature(forward)
    model.forward = poisoned
    return trainer


@pytest.mark.parametrize(("at", "text"), [("loss", "The loss of step 3 is inf"), ("gradient", "gradients of step 3")])
def test_no_number_names_step_and_rows_and_reaches_no_checkpoint(tmp_path, processor, at, text):
    trainer = poisoned_run(tmp_path, processor, at=at)
    with pytest.raises(FloatingPointError, match=rf"{text}.*id 'red-4'\); Row 1 of the batch \(id 'green-4'\)"):
        trainer.train()
    checkpoint = find_last_checkpoint(trainer.args.output_dir)
    assert checkpoint.endswith("checkpoint-2")
    saved = type(trainer.model).from_pretrained(checkpoint)
    assert all_finite(list(saved.parameters()))
    assert all_finite(list(trainer.model.parameters()))


def test_gradient_guard_names_all_rows_of_an_accumulated_step(tmp_path, processor):
    args = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "save_strategy": "no"}
    trainer = poisoned_run(tmp_path, processor, at="gradient", **args)
    with pytest.raises(FloatingPointError, match=r"step 3 .*id 'red-4'\); Row 0 of the batch \(id 'green-4'\)"):
        trainer.train()


def test_finite_tensors():
    assert all_finite([torch.zeros(3), torch.ones(2, 2)])
    assert not all_finite([torch.zeros(3), torch.tensor([1.0, float("nan")])])
    assert not all_finite([torch.tensor([float("-inf")])])


def test_unknown_stage_is_named():
    with pytest.raises(ValueError, match="stage9"):
        VideoSFTConfig.from_recipe("crosslmm", "stage9", output_dir="unused")
    with pytest.raises(ValueError, match="9"):
        VideoSFTConfig.from_recipe("crosslmm", 9, output_dir="unused")
