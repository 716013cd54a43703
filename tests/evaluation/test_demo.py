"""The demonstration: three kinds of questions, the table, the picture, and a video of the user's own."""

import pytest
import torch
from PIL import Image

from longvideo.evaluation import demo
from longvideo.modeling.llava_st.modeling_llava_st import LlavaSTForConditionalGeneration
from tests.tiny import tiny_videochat_flash_model, tiny_videochat_flash_processor
from tests.tiny_llava_st import tiny_llava_st_model
from tests.tiny_llava_st_processor import tiny_llava_st_processor, tiny_llava_st_tokenizer
from tests.videos import make_video


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_videochat_flash_model().save_pretrained(folder)
    tiny_videochat_flash_processor().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def grounding_checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("grounding")
    tiny_llava_st_model().save_pretrained(folder)
    tiny_llava_st_processor().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def say(monkeypatch):
    """Lets a grounding model answer with a given text."""

    def call(text):
        answer = torch.tensor([tiny_llava_st_tokenizer().encode(text, add_special_tokens=False)])
        monkeypatch.setattr(
            LlavaSTForConditionalGeneration,
            "generate",
            lambda self, **kwargs: torch.cat([kwargs["input_ids"], answer], dim=1),
        )

    return call


def test_three_kinds_about_a_rendered_video(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "MAX_NEW_TOKENS", 4)
    assert demo.main(["--model", checkpoint, "--out", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    _, questions = demo.pick_scene(7)
    for question in questions:
        assert f"[{question.kind}]" in out and question.answer in out
    assert out.count("Question ") == 4 and out.count("Truth ") == 4 and "after layer" in out
    picture = out.strip().splitlines()[-1].split(": ")[1]
    assert Image.open(picture).width > 500
    assert len(list((tmp_path / "out").glob("*.mp4"))) == 1


def test_video_and_question_of_the_user(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "MAX_NEW_TOKENS", 4)
    video = make_video(tmp_path / "clip.mp4", num_frames=24)
    words = ["--model", checkpoint, "--out", str(tmp_path / "out"), "--video", str(video)]
    assert demo.main([*words, "--question", "How many?"]) == 0
    out = capsys.readouterr().out
    assert "How many?" in out and "Truth" not in out
    assert demo.main(words) == 0
    assert demo.DEFAULT_QUESTION in capsys.readouterr().out


def test_wrong_input_is_one_line(checkpoint, tmp_path, capsys):
    assert demo.main(["--model", checkpoint, "--out", str(tmp_path), "--video", "missing.mp4"]) == 2
    assert "demo: error: No such video file: 'missing.mp4'" in capsys.readouterr().err
    assert demo.main(["--question", "How many?"]) == 2
    assert "--question needs --video" in capsys.readouterr().err


def test_a_model_of_times_and_boxes_is_asked_for_both(grounding_checkpoint, say, tmp_path, capsys):
    say("{<TEMP-001><TEMP-003>} <TEMP-001>:[<WIDTH-000><HEIGHT-001><WIDTH-002><HEIGHT-004>]")
    words = ["--model", grounding_checkpoint, "--out", str(tmp_path / "out"), "--seed", "3"]
    assert demo.main(words) == 0
    out = capsys.readouterr().out
    scene, event, truth = demo.pick_event(3, 6)
    assert f"Question   When and where: {event}  [stvg]" in out and " moves " in event
    lines = [line.split(maxsplit=1)[1] for line in out.splitlines() if line.startswith(("Found", "Truth"))]
    found, tube, true, boxes = lines
    # A fifth and three fifths of the time of the last frame, an eighth of a second before the end.
    ends = [float(part) for part in found.removeprefix("span ").removesuffix(" s").split(" to ")]
    last = scene.duration - 1 / 8
    assert ends == pytest.approx([last / 5, last * 3 / 5], abs=0.0051)  # printed with two digits
    assert tube.startswith("tube of 1 boxes, (0, 64, 128, 256) at ")
    assert true == f"span {truth.span.start:.2f} to {truth.span.end:.2f} s"
    assert boxes.startswith(f"tube of {len(truth.tube.times)} boxes, ({truth.tube.boxes[0].x1:.0f}, ")
    picture = out.strip().splitlines()[-1].removeprefix("Picture of the times and boxes: ")
    assert Image.open(picture).width == 960
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["grounding.png", f"scene_{scene.seed}.mp4"]


def test_places_in_a_video_of_the_user(grounding_checkpoint, say, tmp_path, capsys):
    video = make_video(tmp_path / "clip.mp4", num_frames=24)
    words = ["--model", grounding_checkpoint, "--out", str(tmp_path / "out"), "--video", str(video)]
    say("{<TEMP-000><TEMP-002>}, a dog runs.")
    assert demo.main(words) == 0
    out = capsys.readouterr().out
    assert "Question   All events.  [dvc]" in out and "grounding.png" in out and "Truth" not in out
    say("I see nothing.")
    assert demo.main([*words, "--question", "the dog"]) == 0
    out = capsys.readouterr().out
    assert "When and where: the dog  [stvg]" in out and "not drawn: The answer holds nothing to draw" in out


def test_a_random_model_of_times_and_boxes_answers_all_the_same(grounding_checkpoint, tmp_path, capsys):
    assert demo.main(["--model", grounding_checkpoint, "--out", str(tmp_path)]) == 0
    assert "Picture of the times and boxes" in capsys.readouterr().out


def test_scenes_offer_three_kinds_and_change_with_the_seed():
    chosen = [[question.kind for question in demo.pick_scene(seed)[1]] for seed in range(40)]
    assert all(len(set(kinds)) == 3 for kinds in chosen)
    assert {kind for kinds in chosen for kind in kinds} == set(demo.KINDS)


@pytest.mark.parametrize(("num_layers", "layers"), [(28, [4, 18]), (8, [1, 5]), (4, [1, 3]), (2, [1])])
def test_dropout_is_spread_over_the_depth(num_layers, layers):
    plan = demo.spread_dropout(num_layers)
    assert plan["layers"] == layers and len(plan["ratios"]) == len(layers) + 1


def test_right_and_wrong_are_told_apart():
    counts = {"patch_tokens": 64, "visual_tokens": 16, "after_stages": [], "frames": 4}
    rows = [
        demo.Asked("q", "Red.", "red", "colour", 1.0, counts),
        demo.Asked("q", "blue", "red", "colour", 1.0, counts),
    ]
    text = demo.format_asked(rows)
    assert text.count("(right)") == 1 and text.count("(wrong)") == 1
    assert max(len(line) for line in text.splitlines()) <= demo.WIDTH
