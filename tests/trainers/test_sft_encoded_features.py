"""Encoded videos on disk: the same losses as from pixels, nothing decoded again, and never those of another state."""

import json
import os
import shutil
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from longvideo.trainers import VideoSFTCollator, VideoSFTTrainer
from longvideo.trainers.encoded_features import FeatureStore, encoder_parameters, source_stamp, video_name
from tests.tiny import tiny_videochat_flash_model, tiny_videochat_flash_processor
from tests.tiny_crosslmm import tiny_crosslmm_model
from tests.tiny_crosslmm_processor import tiny_crosslmm_processor
from tests.tiny_crossvllm import tiny_crossvllm_model
from tests.tiny_crossvllm_processor import tiny_crossvllm_processor
from tests.tiny_llava_st import tiny_llava_st_model
from tests.tiny_llava_st_processor import tiny_llava_st_processor
from tests.tiny_longvu import tiny_longvu_model
from tests.tiny_longvu_processor import tiny_longvu_processor
from tests.trainers.sft_runs import image_row, losses, short_run
from tests.trainers.toy_rows import colour_row
from tests.videos import make_video

ARCHITECTURES = {
    "videochat_flash": (tiny_videochat_flash_model, tiny_videochat_flash_processor),
    "longvu": (tiny_longvu_model, tiny_longvu_processor),
    "llava_st": (tiny_llava_st_model, tiny_llava_st_processor),
    "crosslmm": (tiny_crosslmm_model, tiny_crosslmm_processor),
    "crossvllm": (partial(tiny_crossvllm_model, adapters=False), tiny_crossvllm_processor),
}
# What learns beside a frozen encoder: LLaVA-ST's encoder reads rows of its tables.
LEARNS = {"trainable_parts": ["language_model"]}
LAYERS = {"trainable_names": [r"language_model\.layers\."]}
# What CrossVLLM keeps is what its tower, which is always frozen, saw: both of its projectors may learn.
BEHIND_TOWER = {"trainable_parts": ["connector", "language_model"]}


def settings_of(name: str) -> dict[str, Any]:
    return {"llava_st": LAYERS, "crossvllm": BEHIND_TOWER}.get(name, LEARNS)


@pytest.fixture
def rows(tmp_path) -> list[dict[str, Any]]:
    """Two files, frames in memory, two videos in one row, and a row with an image."""
    paths = [make_video(tmp_path / f"{number}.mp4", num_frames=24 + 8 * number, fps=4) for number in range(2)]
    files = [
        {
            "messages": [
                {"role": "user", "content": [{"type": "video", "path": str(path)}, {"type": "text", "text": "What?"}]},
                {"role": "assistant", "content": "Stripes."},
            ]
        }
        for path in paths
    ]
    both = {"messages": [dict(message) for message in files[0]["messages"]]}
    both["messages"][0]["content"] = [files[1]["messages"][0]["content"][0], *both["messages"][0]["content"]]
    return [*files, colour_row("red"), both, image_row("What?", "Grey.")]


def run(folder, name: str, rows: list[dict[str, Any]], **args: Any) -> VideoSFTTrainer:
    make_model, make_processor = ARCHITECTURES[name]
    settings = {"max_steps": 6, "learning_rate": 1e-3, "per_device_train_batch_size": 2, **settings_of(name), **args}
    return short_run(folder, make_model(), make_processor(), rows, **settings)


def test_all_names_of_a_file_are_stamped(tmp_path, monkeypatch):
    """A changed file must be noticed however the row names it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tmp_path / "a film.mp4"
    file.write_bytes(b"one")
    names = [str(file), "~/a film.mp4", f"file://{tmp_path}/a%20film.mp4", f"FILE://{tmp_path}/a%20film.mp4"]
    stamps = {source_stamp(name) for name in names}
    assert len(stamps) == 1 and "" not in stamps
    processor = tiny_videochat_flash_processor().video_processor
    assert len({video_name(name, None, {}, {}, processor) for name in names}) == 1
    file.write_bytes(b"another")
    assert not stamps & {source_stamp(name) for name in names}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_same_losses_with_and_without_features(tmp_path, rows, name, monkeypatch):
    plain = run(tmp_path, name, rows)
    plain.train()
    store = str(tmp_path / "features")
    first = run(tmp_path, name, rows, encoded_features_dir=store)
    first.train()
    second = run(tmp_path, name, rows, encoded_features_dir=store)
    # Nothing is decoded or encoded again.
    monkeypatch.setattr(type(second.processing_class.video_processor), "preprocess", None)
    monkeypatch.setattr(type(second.model), "encode_video", None)
    second.train()
    # Features of single videos and of whole batches differ by the order of float32 sums.
    assert losses(first) == pytest.approx(losses(plain), rel=1e-5) and len(losses(plain)) == 6
    assert losses(second) == pytest.approx(losses(plain), rel=1e-5)
    folders = list(os.scandir(first._store.folder))
    assert len(folders) == 3 and not any(entry.name.startswith(".") for entry in folders)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_table_of_encoder_parameters_is_what_features_depend_on(name):
    make_model, make_processor = ARCHITECTURES[name]
    model = make_model()
    batch = VideoSFTCollator(make_processor())([colour_row("red")])
    model.requires_grad_(True)
    names = ("pixel_values_videos", "pixel_values_videos_dino", "video_num_frames", "video_sizes")
    pixels = {key: value for key, value in batch.items() if key in names}
    encode = type(model).encode_video.__wrapped__  # without no_grad
    with torch.enable_grad():
        encoded = encode(model, **pixels)
    total = sum(x.float().square().sum() for x in [*encoded.features, *(getattr(encoded, "memory", None) or [])])
    total.backward()
    reached = {key for key, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    listed = set(encoder_parameters(model))
    assert reached and reached <= listed
    rest = {key for key in listed if key.split(".")[1] not in {name.split(".")[1] for name in reached}}
    assert all("embed_tokens" in key or "lm_head" in key for key in rest)


def test_throughput_counts_frames_and_tokens_of_stored_videos(tmp_path, rows, monkeypatch):
    clock = iter(range(0, 100000, 2))
    monkeypatch.setattr("longvideo.trainers.sft_trainer.time.perf_counter", lambda: next(clock))
    for name in ("crosslmm", "longvu"):
        logged = []
        store = {"encoded_features_dir": str(tmp_path / name)}
        for args in ({}, store, store):
            trainer = run(tmp_path, name, rows[:2], max_steps=1, **args)
            trainer.train()
            entry = next(entry for entry in trainer.state.log_history if "loss" in entry)
            logged.append((entry["frames_per_second"], entry["visual_tokens_per_second"]))
        assert logged[0] == logged[1] == logged[2] and logged[0][0] > 0 and logged[0][1] > 0, name


def test_videos_can_be_encoded_ahead_and_are_used_in_evaluation(tmp_path, rows, monkeypatch):
    trainer = run(tmp_path, "crosslmm", rows, encoded_features_dir=str(tmp_path / "features"))
    expected = run(tmp_path, "crosslmm", rows).evaluate()["eval_loss"]
    assert trainer.encode_videos() == 3 and trainer.encode_videos() == 0
    monkeypatch.setattr(type(trainer.processing_class.video_processor), "preprocess", None)
    # The same sums in float32, one video at a time.
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_budget_of_frames_holds_for_stored_videos(tmp_path, rows):
    for _ in range(2):
        args = {"encoded_features_dir": str(tmp_path / "features"), "max_frames_per_row": 4}
        trainer = run(tmp_path, "crosslmm", rows, **args)
        frames = [entry.num_frames for entry in trainer.data_collator(rows)["encoded_videos"]]
        assert frames == [4, 4, 4, 2, 1]
        trainer.encode_videos()


def test_changed_files_settings_and_weights_are_encoded_again(tmp_path, rows, caplog):
    store = str(tmp_path / "features")
    assert run(tmp_path, "crosslmm", rows, encoded_features_dir=store).encode_videos() == 3
    wider = run(tmp_path, "crosslmm", rows, encoded_features_dir=store, processor_kwargs={"max_frames": 5})
    assert wider.encode_videos() == 3
    path = rows[0]["messages"][0]["content"][0]["path"]
    make_video(path, num_frames=40, fps=4)
    changed = run(tmp_path, "crosslmm", rows, encoded_features_dir=store)
    # The file stands in two rows, and is stored again with the first of them.
    assert changed.encode_videos() == 1
    model = tiny_crosslmm_model()
    with torch.no_grad():
        list(model.model.vision_tower.parameters())[-1].add_(1)
    other = short_run(tmp_path, model, tiny_crosslmm_processor(), rows, encoded_features_dir=store, **LEARNS)
    assert other.encode_videos() == 3
    assert len(os.listdir(store)) == 2


def test_damaged_entries(tmp_path, rows):
    trainer = run(tmp_path, "crosslmm", rows, encoded_features_dir=str(tmp_path / "features"))
    trainer.encode_videos()
    entry = trainer.data_collator([rows[0]])["encoded_videos"][0]
    folder = trainer._store.folder / entry.name
    (folder / "sample.json").write_text("{", encoding="utf-8")
    assert trainer.encode_videos(rows[:1]) == 1
    features = folder / "features.safetensors"
    whole = features.read_bytes()
    features.write_bytes(whole[:-8])
    assert trainer.encode_videos(rows[:1]) == 1
    features.write_bytes(whole[:-8] + b"otherwise"[:8])
    with pytest.raises(ValueError, match=r"cannot be read.*Encode the video again"):
        trainer.data_collator([rows[0]])
    shutil.rmtree(folder)
    assert trainer.encode_videos(rows[:1]) == 1
    assert json.loads((folder / "sample.json").read_text())["num_frames"] == entry.num_frames


def test_two_processes_may_write_one_entry(tmp_path, rows):
    trainer = run(tmp_path, "crosslmm", rows, encoded_features_dir=str(tmp_path / "features"))
    store: FeatureStore = trainer._store
    entry = trainer.data_collator([rows[0]])["encoded_videos"][0]
    encoded = trainer.model.encode_video(**entry.pixels)
    for _ in range(2):
        store.save(entry.name, encoded, entry.sample)
    assert torch.equal(store.load(entry.name).features[0], encoded.features[0])
    assert os.listdir(store.folder) == [entry.name]


def test_learning_encoder_is_refused(tmp_path, rows):
    store = {"encoded_features_dir": str(tmp_path / "features")}
    for name, parts in (("crosslmm", ["connector"]), ("longvu", ["connector"]), ("llava_st", ["language_model"])):
        with pytest.raises(ValueError, match=r"encoded_features_dir keeps .* parameters on the way learn, first '"):
            run(tmp_path, name, rows, trainable_names=None, trainable_parts=parts, **store)
    # LongVU's last projector works on what is stored.
    run(tmp_path, "longvu", rows, trainable_parts=None, trainable_names=["multi_modal_projector"], **store)
    with pytest.raises(ValueError, match="needs a collator that reads encoded videos, and function does not"):
        parts = (tiny_crosslmm_model(), tiny_crosslmm_processor())
        short_run(tmp_path, *parts, rows, collator=lambda rows: {}, **store, **LEARNS)
    with pytest.raises(ValueError, match="Set encoded_features_dir=<folder>"):
        run(tmp_path, "crosslmm", rows).encode_videos()


def test_adapter_learns_beside_stored_features(tmp_path, rows):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=r".*language_model\.layers\..*q_proj")
    model = peft.get_peft_model(tiny_crosslmm_model(), config)
    store = str(tmp_path / "features")
    trainer = short_run(tmp_path, model, tiny_crosslmm_processor(), rows, encoded_features_dir=store, max_steps=2)
    trainer.train()
    assert all(np.isfinite(losses(trainer))) and len(losses(trainer)) == 2
