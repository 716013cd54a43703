"""The small checkpoints in the package: their size, their files, and that they answer far better than by chance."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, pipeline

import longvideo
from longvideo.evaluation import answer_grounding, answer_questions
from longvideo.tiny_training.crossvllm_checks import check_modules
from longvideo.tiny_training.decoder import TINY_FOLDER

SHIPPED = sorted(path.parent.name for path in Path(TINY_FOLDER).glob("*/config.json"))
# Kinds that every one of them answers nearly always; the others take a table of their own, in README.md.
SURE_KINDS = ("colour", "shape", "needle")
MOST_BYTES = {"crossvllm": 8_000_000}
MOST_BYTES_OF_OTHERS = 6_000_000
# Grounding and rounds are asked for in their own way.
ASKED_OTHERWISE = {"llava_st", "crossvllm"}


@pytest.mark.parametrize("name", SHIPPED)
def test_it_is_small_and_whole(name: str) -> None:
    folder = Path(longvideo.tiny_checkpoint(name))
    files = {path.name for path in folder.iterdir()}
    assert files >= {"README.md", "config.json", "model.safetensors", "processor_config.json", "training_log.jsonl"}
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= MOST_BYTES.get(
        name, MOST_BYTES_OF_OTHERS
    )
    assert AutoConfig.from_pretrained(folder).model_type == name
    log = [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]
    # Checks between stages have no step.
    trained = [line for line in log if "step" in line]
    assert trained[-1]["stage"] and trained[-1]["step"] > 0


@pytest.mark.parametrize("name", sorted(set(SHIPPED) - ASKED_OTHERWISE))
def test_it_answers_questions(name: str, tmp_path, capsys) -> None:
    path = tmp_path / "answers.json"
    arguments = ["--model", name, "--num", "24", "--kinds", *SURE_KINDS, "--json", str(path)]
    assert answer_questions.main(arguments) == 0
    summary = json.loads(path.read_text())["summary"]
    assert summary["all"]["num"] == 24
    # By chance six of 24 are right; sixteen or more would happen once in 50,000 times.
    assert summary["all"]["num_correct"] >= 16, capsys.readouterr().out


@pytest.mark.parametrize("name", sorted(set(SHIPPED) - ASKED_OTHERWISE))
def test_it_takes_one_image(name: str) -> None:
    folder = longvideo.tiny_checkpoint(name)
    picture = Image.new("RGB", (80, 50), (200, 40, 40))
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "Which colour does the ring have ?"}]
    processor = AutoProcessor.from_pretrained(folder)
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        processor_kwargs={"return_tensors": "pt"},
    )
    model = AutoModelForImageTextToText.from_pretrained(folder)
    answer = model.generate(**inputs, max_new_tokens=3)[0, inputs["input_ids"].shape[1] :]
    assert 1 <= len(answer) <= 3


def test_the_image_pipeline_takes_the_default_checkpoint() -> None:
    pipe = pipeline("image-text-to-text", model=longvideo.tiny_checkpoint("videochat_flash"), device="cpu")
    content = [{"type": "image", "image": Image.new("RGB", (80, 50))}, {"type": "text", "text": "What is it ?"}]
    [answer] = pipe(text=[{"role": "user", "content": content}], max_new_tokens=3)
    assert answer["generated_text"][-1]["role"] == "assistant"


def test_it_finds_times_and_places(tmp_path, capsys) -> None:
    path = tmp_path / "groundings.json"
    assert answer_grounding.main(["--tasks", "rec", "tvg", "--num", "32", "--json", str(path)]) == 0
    summary = json.loads(path.read_text())["summary"]
    # One fixed box or span overlaps by less than 0.2 on average.
    assert summary["rec"]["mIoU"]["value"] >= 0.4, capsys.readouterr().out
    assert summary["tvg"]["mIoU"]["value"] >= 0.4, capsys.readouterr().out


def test_its_modules_look_and_judge() -> None:
    folder = longvideo.tiny_checkpoint("crossvllm")
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    found = check_modules(model, processor, 32)
    # A segment of 10 to 20 seconds at random in two to five minutes touches the right one in a seventh of all cases;
    # one answer at random is right in less than a fifth, and one judgement in half.
    assert found["parsed"] >= 0.9 and found["overlaps"] >= 0.4
    assert found["right_true"] >= 0.85 and min(found["accepts_true"], found["rejects_wrong"]) >= 0.8
