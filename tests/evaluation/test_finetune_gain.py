"""The gain of fine-tuning: new kinds that no curriculum asks, evenly spread answers, the command itself."""

import json
import random
from collections import Counter

import pytest

from longvideo.evaluation import finetune_gain
from longvideo.evaluation.corpus import KINDS, make_scene, read_rows
from longvideo.evaluation.finetune_gain import NEW_KINDS, choose_items, main, write_rows
from tests.tiny import tiny_videochat_flash_model, tiny_videochat_flash_processor


@pytest.mark.parametrize("kind", NEW_KINDS)
def test_new_kinds_are_new_and_favour_no_answer(kind):
    assert kind not in KINDS
    items = choose_items(kind, 3 * len(NEW_KINDS[kind][1]), split="held_out")
    questions = [item.questions[0] for item in items]
    assert set(Counter(question.answer for question in questions).values()) == {3}
    assert all(len(set(question.options)) == 4 for question in questions)
    assert all(question.options[question.answer_index] == question.answer for question in questions)
    places = Counter(question.answer_index for question in questions)
    assert max(places.values()) - min(places.values()) <= 1
    assert items == choose_items(kind, len(items), split="held_out")
    trained = {item.scene.fingerprint() for item in choose_items(kind, 20, split="train")}
    assert trained.isdisjoint(item.scene.fingerprint() for item in items)


def test_answers_are_true_of_the_scenes():
    found = Counter()
    for seed in range(60):
        scene = make_scene(seed, "held_out")
        shapes = {actor.shape for actor in scene.actors}
        for kind, (make, answers) in NEW_KINDS.items():
            for question in make(scene, random.Random(seed)):
                found[kind] += 1
                assert question.answer in answers and set(question.options) <= set(answers)
                if kind == "others":
                    assert question.answer == str(len(scene.actors) - 1)
                    assert any(shape in question.question for shape in shapes)
                elif kind == "absent":
                    assert question.answer not in shapes and shapes >= set(question.options) - {question.answer}
                else:
                    (actor,) = [one for one in scene.actors if f" {one.shape} " in question.question]
                    assert ("left" in question.answer) == (actor.x < 0.4)
                    assert ("top" in question.answer) == (actor.y < 0.4)
    assert all(found[kind] >= 5 for kind in NEW_KINDS)


def test_rows_name_their_videos(tmp_path):
    items = choose_items("absent", 2, split="train")
    rows = list(read_rows(write_rows(items, tmp_path / "corpus")))
    assert [row["kind"] for row in rows] == ["absent"] * 2
    for row, item in zip(rows, items, strict=True):
        video = row["messages"][0]["content"][0]["path"]
        assert video.endswith(f"train_{item.scene.seed:06d}.mp4") and (tmp_path / "corpus" / "videos").is_dir()
        assert row["messages"][1]["content"][0]["text"] == item.questions[0].answer


@pytest.fixture
def few(tmp_path):
    """Arguments for a few questions to a random tiny model."""
    folder = tmp_path / "tiny"
    tiny_videochat_flash_model().save_pretrained(folder)
    tiny_videochat_flash_processor().save_pretrained(folder)
    return ["--model", str(folder), "--num", "8", "--known", "0", "--num-train", "4", "--batch-size", "2"]


@pytest.mark.parametrize("words", [[], ["--lora"]])
def test_the_command_from_end_to_end(few, tmp_path, capsys, words):
    if words:
        pytest.importorskip("peft")
    file, kept = tmp_path / "gain.json", tmp_path / "kept"
    code = main([*few, "--steps", "2", "--json", str(file), "--output", str(kept), *words])
    result = json.loads(file.read_text())
    assert code == (0 if result["gained"] else 1)
    assert result["before"]["num"] == result["after"]["num"] == 8 and result["known_before"] is None
    assert result["settings"]["kind"] == "others" and (kept / "model.safetensors").is_file()
    assert "| others (new) | after |" in capsys.readouterr().out


@pytest.mark.parametrize(("after", "gained"), [(16, True), (9, False)])
def test_a_gain_is_one_whose_intervals_lie_apart(monkeypatch, few, capsys, after, gained):
    """Of 20 questions 5 before; 16 after lie clearly above them, 9 do not."""
    scores = iter([5, after])

    def answer(model, processor, items):
        correct = next(scores)
        return [finetune_gain.Answered("v", "k", "q", tuple("abcd"), 0, int(i >= correct), (0.0,)) for i in range(20)]

    monkeypatch.setattr(finetune_gain, "answer_items", answer)
    monkeypatch.setattr(finetune_gain, "finetune", lambda model, processor, rows, args: model)
    monkeypatch.setattr(finetune_gain, "write_rows", lambda items, folder: folder)
    assert main([*few, "--steps", "1"]) == (0 if gained else 1)
    assert f"| others (new) | after | {after} of 20 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--steps", "0"], "--steps is 0, expected at least 1"),
        (["--model", "no/such/model"], "finetune_gain: error:"),
    ],
)
def test_wrong_arguments(words, told, capsys):
    assert main(words) == 2
    assert told in capsys.readouterr().err


def test_unknown_kinds():
    with pytest.raises(ValueError, match="unknown new kind 'colour': use others or place or absent"):
        choose_items("colour", 4, split="train")
    with pytest.raises(ValueError, match="the number of questions is 0"):
        choose_items("place", 0, split="train")
