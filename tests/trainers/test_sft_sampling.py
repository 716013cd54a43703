"""Batches of rows of like length, found without decoding a video."""

from typing import Any

import pytest

from longvideo.trainers.sampling import GroupedRows, row_length, row_lengths
from tests.tiny import tiny_videochat_flash_processor
from tests.tiny_crosslmm import tiny_crosslmm_model
from tests.tiny_crosslmm_processor import tiny_crosslmm_processor
from tests.tiny_llava_st_processor import tiny_llava_st_processor
from tests.tiny_longvu_processor import tiny_longvu_processor
from tests.trainers.sft_runs import image_row, losses, short_run
from tests.trainers.toy_rows import colour_row
from tests.videos import make_video

TEXT_ROW = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}


@pytest.fixture(scope="module")
def processor() -> Any:
    return tiny_crosslmm_processor()


def film(path: Any, **options: Any) -> dict[str, Any]:
    user = [{"type": "video", "path": str(path), **options}, {"type": "text", "text": "What?"}]
    return {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": "Stripes."}]}


@pytest.fixture
def films(tmp_path) -> list[dict[str, Any]]:
    return [film(make_video(tmp_path / f"{n}.mp4", num_frames=4 * n, fps=4)) for n in (4, 12)]


def test_lengths_grow_by_the_tokens_of_a_frame(processor, films, monkeypatch):
    monkeypatch.setattr(type(processor.video_processor), "preprocess", None)  # nothing is decoded
    short, long = row_lengths(films, processor)
    assert long - short == processor.get_num_video_tokens(12) - processor.get_num_video_tokens(4)
    assert row_length(films[1], processor, max_frames=4) == short
    assert row_length(films[1], processor, call={"num_frames": 4}) == short
    assert row_length(films[1], processor, max_length=30) == 30
    assert row_length(colour_row("red", num_frames=8), processor) > row_length(colour_row("red"), processor)
    assert row_length(TEXT_ROW, processor) < row_length(image_row("Hi", "Hello."), processor)
    absent = {"messages": [{**films[0]["messages"][0]}, films[0]["messages"][1]]}
    absent["messages"][0]["content"] = [{"type": "video", "path": "absent.mp4"}]
    assert row_length(absent, processor) > 0


@pytest.mark.parametrize(
    "make", [tiny_videochat_flash_processor, tiny_longvu_processor, tiny_llava_st_processor, tiny_crosslmm_processor]
)
def test_lengths_of_every_architecture(make, films):
    short, long = row_lengths(films, make())
    assert long > short or (make is tiny_llava_st_processor and long == short)  # always one number of frames
    assert row_length(colour_row("red", num_frames=5), make()) > row_length(TEXT_ROW, make())


def test_order_follows_seed_and_epoch():
    lengths = [i % 7 for i in range(200)]
    sampler = GroupedRows(2, lengths=lengths, seed=3)
    first = list(sampler)
    assert sorted(first) == list(range(200)) and first == list(GroupedRows(2, lengths=lengths, seed=3))
    sampler.set_epoch(1)
    assert list(sampler) != first
    sampler.set_epoch(0)
    assert list(sampler) == first != list(GroupedRows(2, lengths=lengths, seed=4))
    # 100 rows per chunk of which batches are made: neighbours are alike, but for the ends of the chunks.
    unequal = sum(lengths[a] != lengths[b] for a, b in zip(first[::2], first[1::2], strict=True))
    assert unequal < 20


def test_trainer_groups_rows(tmp_path, processor):
    rows = [colour_row("red", num_frames=n) for n in (2, 12) * 16]
    args = {"train_sampling_strategy": "group_by_length", "max_steps": 2}
    trainer = short_run(tmp_path, tiny_crosslmm_model(), processor, rows, **args)
    order = list(trainer._get_train_sampler())
    # Four groups of eight rows are sorted each: at most one pair of a group and the longest row, moved to the front.
    mixed = sum(a % 2 != b % 2 for a, b in zip(order[::2], order[1::2], strict=True))
    assert mixed <= 5 and sorted(order) == list(range(32))
    trainer.train()
    again = short_run(tmp_path, tiny_crosslmm_model(), processor, rows, **args)
    again.train()
    assert losses(again) == losses(trainer)


def test_column_of_lengths_is_taken(tmp_path, processor):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([{**TEXT_ROW, "length": n} for n in (1, 9, 1, 9)])
    args = {"train_sampling_strategy": "group_by_length"}
    trainer = short_run(tmp_path, tiny_crosslmm_model(), processor, [TEXT_ROW] * 3, **args)
    assert trainer._get_train_sampler(rows).lengths == [1, 9, 1, 9]
    plain = trainer._get_train_sampler(rows.remove_columns("length"))
    assert len(set(plain.lengths)) == 1 and plain.lengths[0] > 1


def test_resume_continues_the_same_order(tmp_path, processor):
    rows = [colour_row(name, num_frames=n) for name in ("red", "blue") for n in (2, 5, 7)]
    args = {
        "train_sampling_strategy": "group_by_length",
        "max_steps": 5,
        "save_strategy": "steps",
        "save_steps": 4,
        "learning_rate": 1e-3,
    }
    whole = short_run(tmp_path, tiny_crosslmm_model(), processor, rows, **args)
    whole.train()
    resumed = short_run(tmp_path, tiny_crosslmm_model(), processor, rows, **args)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert losses(resumed)[4:] == losses(whole)[4:] and len(losses(whole)) == 5
