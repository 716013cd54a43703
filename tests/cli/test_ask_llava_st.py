"""`longvideo ask` with a LLaVA-ST checkpoint: tasks, JSON with times and boxes, drawings, and what cannot work."""

import json

import av
import pytest
import torch
from PIL import Image

import longvideo
from longvideo import cli
from longvideo.modeling.llava_st.modeling_llava_st import LlavaSTForConditionalGeneration
from tests.tiny import tiny_videochat_flash_model, tiny_videochat_flash_processor
from tests.tiny_llava_st import tiny_llava_st_model
from tests.tiny_llava_st_processor import tiny_llava_st_processor, tiny_llava_st_tokenizer
from tests.videos import make_video

TUBE = "{<TEMP-001><TEMP-003>} <TEMP-001>:[<WIDTH-000><HEIGHT-001><WIDTH-002><HEIGHT-004>]"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_llava_st_model().save_pretrained(folder)
    tiny_llava_st_processor().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return str(make_video(tmp_path_factory.mktemp("video") / "clip.mp4", num_frames=48, fps=8))


@pytest.fixture
def run(checkpoint, video, capsys):
    def call(*words, source=video, model=checkpoint):
        given = ["--model", model] if model else []
        return cli.main(
            ["ask", source, *words, *given, "--device", "cpu", "--max-new-tokens", "4"]
        ), *capsys.readouterr()

    return call


@pytest.fixture
def say(monkeypatch):
    """Lets the model answer with a given text."""

    def call(text):
        answer = torch.tensor([tiny_llava_st_tokenizer().encode(text, add_special_tokens=False)])
        monkeypatch.setattr(
            LlavaSTForConditionalGeneration,
            "generate",
            lambda self, **kwargs: torch.cat([kwargs["input_ids"], answer], dim=1),
        )

    return call


def test_times_and_boxes_in_text_and_json(run, say, video):
    say(TUBE)
    code, out, err = run("the dog", "--task", "stvg")
    assert code == 0 and out.strip() == TUBE
    assert "span 1.18 to 3.52 s" in err and "tube of 1 boxes, (0, 12, 32, 48) at 1.18 s" in err
    code, out, _ = run("the dog", "--task", "stvg", "--json")
    report = json.loads(out)
    # A fifth and three fifths of the time of the last frame, 5.875 s.
    assert report["grounding"]["spans"] == [{"start": pytest.approx(1.175), "end": pytest.approx(3.525)}]
    box = {"x1": 0.0, "y1": pytest.approx(12), "x2": pytest.approx(32), "y2": 48.0}
    assert report["grounding"]["tubes"][0]["boxes"] == [box] and "drawing" not in report
    assert report["token_counts"]["visual_tokens"] == 14


def test_drawings(run, say, tmp_path):
    say(TUBE)
    page, clip = tmp_path / "out.png", tmp_path / "out.mp4"
    code, out, _ = run("the dog", "--task", "stvg", "--draw", str(page), "--json")
    assert code == 0 and json.loads(out)["drawing"] == str(page) and Image.open(page).width == 960
    code, _, err = run("the dog", "--task", "stvg", "--draw", str(clip), "--start", "1", "--end", "4")
    assert code == 0 and f"answer drawn in {clip}" in err
    with av.open(str(clip)) as container:
        assert sum(1 for _ in container.decode(video=0)) == 24, "three of the six seconds"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.mp4", "out.png"]


def test_pictures_and_questions_without_words(run, say, tmp_path):
    say("[<WIDTH-000><HEIGHT-001><WIDTH-002><HEIGHT-004>]")
    picture = tmp_path / "in.png"
    Image.new("RGB", (80, 40), (255, 255, 255)).save(picture)
    code, _, err = run("the cup", "--task", "rec", "--draw", str(tmp_path / "out.png"), source=str(picture))
    assert code == 0 and "box (0, 10, 40, 40) pixels" in err and (tmp_path / "out.png").is_file()
    assert run("--task", "elc", "--span", "1.5", "--box", "0,0,20,30")[0] == 0
    assert run("--task", "reg", "--box", "0,0,20,30", source=str(picture))[0] == 0
    code, _, err = run("it", "--task", "rec", "--draw", str(tmp_path / "out.mp4"), source=str(picture))
    assert code == 2 and "about a picture can be a .png" in err


def test_an_answer_with_nothing_to_draw_is_shown_all_the_same(run, say, tmp_path):
    say("I see a dog {<TEMP-004><TEMP-001>}")
    code, out, err = run("the dog", "--task", "tvg", "--draw", str(tmp_path / "out.png"))
    assert code == 2 and "I see a dog" in out and "not read: '{<TEMP-004><TEMP-001>}'" in err
    assert "nothing to draw" in err and "answer drawn" not in err and not list(tmp_path.iterdir())
    code, out, _ = run("the dog", "--task", "tvg", "--draw", str(tmp_path / "out.png"), "--json")
    assert code == 2 and json.loads(out)["drawing"] is None


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["the dog", "--task", "stgv"], "no task 'stgv'; expected one of tvg"),
        (["the dog", "--task", "svg"], "needs span_seconds"),
        (["the dog", "--task", "svg", "--span", "3,1"], "reversed or empty"),
        (["the dog", "--task", "svg", "--span", "1,2,3"], "--span takes 1 or 2 numbers"),
        (["the dog", "--task", "svg", "--span", "1,nan"], "--span takes 1 or 2 numbers"),
        (["--task", "elc", "--span", "1", "--box", "a,b,c,d"], "--box takes 4 numbers"),
        (["--task", "elc", "--span", "1", "--box", "0,0,99,9"], "leaves the frame of 64 x 48 pixels"),
        (["the dog", "--box", "0,0,9,9"], "give a --task too"),
        (["--draw", "out.png"], "no question was given"),
        (["the dog", "--task", "tvg", "--draw", "out.gif"], "can be a .mp4, .png"),
        (["the dog", "--task", "tvg", "--draw", "no/such/out.png"], "does not exist"),
        (["the dog", "--task", "tvg", "--options", "a", "b", "--draw", "out.png"], "does not go with"),
        (["the dog", "--show-kept", "kept.png"], "no kept tokens"),
    ],
)
def test_what_cannot_work_is_one_line(run, words, text):
    code, out, err = run(*words)
    assert (code, out) == (2, "") and text in err and "Traceback" not in err


def test_models_without_places(run, tmp_path):
    tiny_videochat_flash_model().save_pretrained(tmp_path)
    tiny_videochat_flash_processor().save_pretrained(tmp_path)
    code, _, err = run("the dog", "--draw", "out.png", model=str(tmp_path))
    assert code == 2 and "is a videochat_flash model" in err
    code, _, err = run("the dog", "--task", "tvg", model=str(tmp_path))
    assert code == 2 and "has no tasks for times and places" in err


def test_a_model_without_coordinates_answers_in_words(run, tmp_path):
    tiny_llava_st_model(num_temporal_tokens=0, num_spatial_tokens=0).save_pretrained(tmp_path)
    tiny_llava_st_processor(0, 0).save_pretrained(tmp_path)
    code, out, err = run("What is this?", "--json", model=str(tmp_path))
    assert code == 0, err
    report = json.loads(out)
    assert "answer" in report and "grounding" not in report
    code, _, err = run("the dog", "--draw", "out.png", model=str(tmp_path))
    assert code == 2 and "needs a model that answers with times and boxes" in err


def test_the_embedded_model_for_tasks(run, checkpoint, say, monkeypatch):
    say(TUBE)
    monkeypatch.setattr(longvideo, "tiny_checkpoint", lambda name: checkpoint if name == "llava_st" else None)
    code, _, err = run("the dog", "--task", "tvg", model=None)
    assert code == 0 and "tiny embedded LLaVA-ST" in err

    def missing(name):
        raise ValueError(f"No tiny checkpoint for {name!r}.")

    monkeypatch.setattr(longvideo, "tiny_checkpoint", missing)
    code, _, err = run("the dog", "--task", "tvg", model=None)
    assert code == 2 and "No tiny checkpoint for 'llava_st'. Name a LLaVA-ST checkpoint with --model." in err
