"""`longvideo train`: what it says beforehand, a stage trained on the corpus, adapters, preferences, wrong input."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from longvideo.cli import build_parser, main
from longvideo.cli.train_plan import make_plan, parse_settings
from longvideo.cli.train_run import save
from longvideo.evaluation.corpus import write_corpus
from longvideo.trainers import VideoSFTCollator, load_adapter, part_of, recipe_names
from tests.tiny import tiny_videochat_flash_model, tiny_videochat_flash_processor
from tests.tiny_llava_st import tiny_llava_st_model
from tests.tiny_llava_st_processor import tiny_llava_st_processor

FEW = {
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "save_strategy": "no",
    "disable_tqdm": True,
    "gradient_checkpointing": False,
}


def settings(**changes: object) -> list[str]:
    """--set words for a run of two steps."""
    return [word for key, value in {**FEW, **changes}.items() for word in ("--set", f"{key}={json.dumps(value)}")]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_corpus(tmp_path_factory.mktemp("corpus"), 4, split="train", size=32, form="open"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tiny")
    tiny_videochat_flash_model().save_pretrained(folder)
    tiny_videochat_flash_processor().save_pretrained(folder)
    return str(folder)


def weights(folder: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model.safetensors")


def said(capsys: pytest.CaptureFixture, *words: str) -> str:
    """Run the command; what it prints, blanks made single."""
    assert main(["train", *words]) == 0, capsys.readouterr().err
    return " ".join(capsys.readouterr().out.split())


def test_dry_run_of_a_published_size(capsys):
    text = said(capsys, "videochat_flash/4", "--model", "videochat_flash-7b-448", "--dry-run")
    for words in (
        "learns 307,001,344 of 7,922,617,856 parameters",
        "vision_tower 290,479,104 of 290,479,104, rate 2e-06",
        "language_model 0 of 7,615,616,512, frozen",
        "rows per step 256: 1 x 256 accumulated x 1 processes",
        "tokens per step 8,388,608 at most (32,768 per row: max_length)",
        "gradient_accumulation_steps 8 -> 256: 1 process instead of 32 GPUs",
        "gradients 1.23 GB optimizer 2.46 GB",
        "computing in 16 bit",
    ):
        assert words in text
    text = said(capsys, "longvu", "--stage", "2", "--model", "longvu-7b-img", "--dry-run", "--lora", "--device", "cpu")
    assert "image_token_len 576 -> 144" in text and "vision_tower 0 of" in text and "computing in float32" in text


def test_the_last_stage_sees_larger_frames(capsys, rows, tiny, tmp_path):
    """The recipe's 448 pixels are a field of the tower; processor and model get it together."""
    text = said(capsys, "videochat_flash/4", "--model", "videochat_flash-7b-224", "--dry-run")
    assert "model: vision_config.image_size 224 -> 448" in text
    words = ["videochat_flash/4", "--model", tiny, "--data", rows, "--device", "cpu", "--output", str(tmp_path)]
    few = {"max_steps": 1, "per_device_train_batch_size": 1, "processor_kwargs": {"num_frames": 4}}
    said(capsys, *words, *settings(**few, **{"model.vision_config.image_size": 64}))
    config = AutoModelForImageTextToText.from_pretrained(tmp_path).config
    processor = AutoProcessor.from_pretrained(tmp_path)
    sizes = {dict(part.size)["height"] for part in (processor.video_processor, processor.image_processor)}
    assert config.vision_config.image_size == 64 and sizes == {64}


def test_dry_run_with_rows(capsys, rows, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = said(capsys, "videochat_flash/1", "--model", tiny, "--data", rows, "--dry-run", *settings(max_steps=-1))
    assert "rows per step 2: 2 x 1 accumulated" in text and "steps 2 (4 rows)" in text
    # Four frames of 4 tokens each; text and answer beside them.
    assert "16 of them visual" in text and "; 4 frames)" in text
    assert list(tmp_path.iterdir()) == []


def test_a_stage_on_the_corpus_and_on_from_there(capsys, rows, tiny, tmp_path):
    output = str(tmp_path / "run")
    words = [
        "videochat_flash/stage1_alignment",
        "--model",
        tiny,
        "--data",
        rows,
        "--output",
        output,
        "--device",
        "cpu",
    ]
    saving = {"save_strategy": "steps", "save_steps": 2, "processor_kwargs": {"num_frames": 4}}
    saving["lr_scheduler_type"] = "constant"  # a cosine over two steps is at zero when it goes on
    said(capsys, *words, *settings(**saving))
    before, after = weights(tiny), weights(output)
    assert {part_of(name) for name in after if not torch.equal(after[name], before[name])} == {"connector"}
    assert AutoModelForImageTextToText.from_pretrained(output).config.model_type == "videochat_flash"
    assert AutoProcessor.from_pretrained(output).video_processor is not None
    assert not (Path(output) / ".saving").exists()
    assert main(["train", *words, *settings(**saving)]) == 2
    assert "holds checkpoint-2 already; go on with --resume" in capsys.readouterr().err
    said(capsys, *words, "--resume", *settings(**{**saving, "max_steps": 3}))
    state = json.loads((Path(output) / "checkpoint-3" / "trainer_state.json").read_text())
    assert state["global_step"] == 3
    assert any(not torch.equal(value, after[name]) for name, value in weights(output).items())


def test_an_adapter_is_saved_alone_or_merged_and_merged_first(capsys, rows, tiny, tmp_path):
    pytest.importorskip("peft")
    words = ["videochat_flash/2", "--model", tiny, "--data", rows, "--device", "cpu", "--lora", "--set", "lora.r=2"]
    few = settings(processor_kwargs={"num_frames": 4}, learning_rate=0.1, label_rule=None)
    alone, whole = str(tmp_path / "alone"), str(tmp_path / "whole")
    said(capsys, *words, "--output", alone, *few)
    names = {file.name for file in Path(alone).iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= names and "model.safetensors" not in names
    assert json.loads((Path(alone) / "adapter_config.json").read_text())["r"] == 2
    said(capsys, *words, "--output", whole, "--merged", *few)
    before, after = weights(tiny), weights(whole)
    assert before.keys() == after.keys()
    changed = {part_of(name) for name in after if not torch.equal(after[name], before[name])}
    assert changed == {"language_model"}
    # The same adapter, merged before a stage whose rate is next to nothing, gives the same weights.
    again = str(tmp_path / "again")
    rest = settings(max_steps=1, learning_rate=1e-20, processor_kwargs={"num_frames": 4})
    said(capsys, "videochat_flash/1", "--model", tiny, "--data", rows, "--device", "cpu", "--merge-adapter", alone,
         "--output", again, *rest)  # fmt: skip
    for name, value in weights(again).items():
        torch.testing.assert_close(value, after[name], rtol=0, atol=1e-6, msg=name)  # one float32 sum in another place


def test_coordinates_come_with_the_second_stage(capsys, rows, tmp_path, monkeypatch):
    """Rows are read for the model that learns from them, and an adapter beside new tokens comes with its base."""
    pytest.importorskip("peft")
    tiny_llava_st_model(num_temporal_tokens=0, num_spatial_tokens=0).save_pretrained(tmp_path / "tiny")
    tiny_llava_st_processor(0, 0).save_pretrained(tmp_path / "tiny")
    video = {"type": "video", "path": str(next(Path(rows).parent.rglob("*.mp4")))}
    answer = "During {<TEMP-OUTPUT0.250><TEMP-OUTPUT0.800>}."
    user = [video, {"type": "text", "text": "When?"}]
    row = {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    collate, seen = VideoSFTCollator.__call__, []

    def watch(self, rows):
        batch = collate(self, rows)
        seen.append(batch["coordinate_values"].max().item() if "coordinate_values" in batch else 0.0)
        return batch

    monkeypatch.setattr(VideoSFTCollator, "__call__", watch)

    def stage(number: int, model: str, *words: str, **changes: object) -> str:
        given = ["--model", str(tmp_path / model), "--data", str(tmp_path / "rows.jsonl"), "--device", "cpu"]
        few = settings(max_steps=1, per_device_train_batch_size=1, logging_steps=1, **changes)
        return said(capsys, f"llava_st/{number}", *given, "--output", str(tmp_path / str(number)), *words, *few)

    stage(1, "tiny")
    assert seen[-1] == 0
    counts = {"model.num_temporal_tokens": 6, "model.num_spatial_tokens": 5, "lora.r": 2}
    added = "6 times and 5 heights and widths added to the vocabulary; coordinates split"
    assert added in stage(2, "1", "--dry-run", **counts) and seen[-1] == pytest.approx(0.8)
    seen.clear()
    assert added in stage(2, "1", **counts) and seen == [pytest.approx(0.8)]
    stored = load_file(tmp_path / "2" / "adapter_model.safetensors")
    table = next(value for name, value in stored.items() if name.endswith("temporal_output.weight"))
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "2")
    own = [(n, p) for n, p in loaded.named_parameters() if n.endswith("temporal_output.weight")]
    assert torch.equal(next(p for n, p in own if "original_module" not in n), table)
    with pytest.raises(ValueError, match="modules or tokens were added"):
        load_adapter(AutoModelForImageTextToText.from_pretrained(tmp_path / "1"), tmp_path / "2")
    seen.clear()
    stage(3, "2/base", "--merge-adapter", str(tmp_path / "2"), "--merged", **counts)
    assert AutoModelForImageTextToText.from_pretrained(tmp_path / "3").config.num_temporal_tokens == 6
    assert seen == [pytest.approx(0.8)]


def test_preferences(capsys, rows, tiny, tmp_path):
    pairs = []
    for row in map(json.loads, Path(rows).read_text().splitlines()):
        prompt, answer = row["messages"]
        prompt["content"][0]["path"] = str(Path(rows).parent / prompt["content"][0]["path"])
        worse = {"role": "assistant", "content": [{"type": "text", "text": "nothing"}]}
        pairs.append({"prompt": [prompt], "chosen": [answer], "rejected": [worse]})
    file, output = tmp_path / "pairs.jsonl", tmp_path / "run"
    file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    words = ["videochat_flash/1", "--model", tiny, "--data", str(file), "--device", "cpu"]
    text = said(capsys, *words, "--dpo", "--output", str(output), *settings(processor_kwargs={"num_frames": 4}))
    assert "learning rates and label rules are for answers" in text and (output / "model.safetensors").is_file()
    assert main(["train", *words, "--output", str(tmp_path / "other"), *settings()]) == 2
    assert "holds rows with prompt, chosen and rejected; add --dpo" in capsys.readouterr().err
    words[words.index(str(file))] = rows
    assert main(["train", *words, "--dpo", *settings()]) == 2
    assert "holds rows with messages; leave --dpo out" in capsys.readouterr().err


def test_values_of_settings():
    words = ["a=1e-4", "b=no", "c={num_frames: 4}", "d=[connector]", "e=None", "f=true", 'g="x"', "h=x=y", "i=1"]
    values = parse_settings(words)
    assert values == {
        "a": 1e-4, "b": "no", "c": {"num_frames": 4}, "d": ["connector"], "e": None, "f": True, "g": "x", "h": "x=y",
        "i": 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("processes", "words", "steps", "rows"),
    [
        (1, [], 32, 512),
        (8, [], 4, 512),
        (4, ["--set", "per_device_train_batch_size=8"], 16, 512),
        (3, [], 11, 528),
        (8, ["--set", "gradient_accumulation_steps=1"], 1, 128),
    ],
)
def test_rows_per_step_stay_those_of_the_recipe(monkeypatch, tmp_path, processes, words, steps, rows):
    parser = build_parser("train")
    args = parser.parse_args(["train", "videochat_flash/1", "--model", "any", "--dry-run", "--output",
                              str(tmp_path), "--device", "cpu", *words])  # fmt: skip
    # The plan asks for the number of processes; the Trainer's own arguments must not try to meet them here.
    monkeypatch.setattr("longvideo.cli.train_plan._num_processes", lambda: processes)
    plan = make_plan(args)
    assert (plan.args.gradient_accumulation_steps, plan.rows_per_step) == (steps, rows)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["videochat_flash/1", "--model", "x"], "Give --data FILE, or --dry-run"),
        (["absent", "--model", "x", "--dry-run"], "No recipe 'absent'"),
        (["longvu", "--model", "x", "--dry-run"], "has several stages: choose one of"),
        (["longvu/3", "--model", "longvu-7b", "--dry-run"], "has no stage '3'"),
        (["longvu/1", "--model", "x/y/z", "--dry-run"], "Unknown model 'x/y/z'"),
        (["longvu/1", "--model", "videochat_flash-7b-448", "--dry-run"], "VideoChatFlashConfig has no field"),
        (["longvu/1", "--model", "longvu-7b", "--dry-run", "--set", "max_step=2"], "Did you mean 'max_steps'?"),
        (["longvu/1", "--model", "longvu-7b", "--dry-run", "--set", "max_steps"], "expected KEY=VALUE"),
        (["longvu/1", "--model", "longvu-7b", "--dry-run", "--set", "a.b=1"], "expected KEY, model.KEY or lora.KEY"),
        (["longvu/1", "--model", "longvu-7b", "--dry-run", "--set", "lora.r=1"], "lora.r needs --lora"),
        (["longvu/1", "--model", "longvu-7b", "--dry-run", "--merged"], "--merged merges an adapter"),
        (["longvu/1", "--model", "longvu-7b", "--dry-run", "--set", "trainable_parts=[towers]"], "must name one or"),
        (["longvu/1", "--model", "longvu-7b", "--dry-run", "--set", "mask={a"], "neither JSON nor yaml"),
        (
            ["longvu/1", "--model", "longvu-7b", "--dry-run", "--lora", "--set", "lora.rank=1"],
            "Settings of the adapter",
        ),
    ],
)
def test_wrong_arguments_are_one_line(capsys, words, told):
    assert main(["train", *words]) == 2
    error = capsys.readouterr().err.strip()
    assert told in error and error.splitlines()[-1].startswith("longvideo train: error:")


def test_wrong_rows_and_folders(capsys, rows, tiny, tmp_path):
    words = ["videochat_flash/1", "--model", tiny, "--device", "cpu", "--output", str(tmp_path / "run")]
    assert main(["train", *words, "--data", str(tmp_path / "absent.jsonl")]) == 2
    assert "absent.jsonl" in capsys.readouterr().err
    bad = tmp_path / "bad.jsonl"
    bad.write_text(Path(rows).read_text().splitlines()[0].replace("videos/", "gone/") + "\n")
    assert main(["train", *words, "--data", str(bad)]) == 2
    assert "gone/" in capsys.readouterr().err
    assert main(["train", *words, "--data", rows, "--resume"]) == 2
    assert "holds no complete checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_folders_of_an_earlier_result_are_replaced_whole(tmp_path):
    """As those of CrossVLLM's adapters are."""

    def save_model(folder: str) -> None:
        (Path(folder) / "adapters").mkdir(parents=True)
        (Path(folder) / "adapters" / "new").touch()
        (Path(folder) / "config.json").touch()

    accelerator = SimpleNamespace(wait_for_everyone=lambda: None)
    trainer = SimpleNamespace(args=SimpleNamespace(should_save=True), save_model=save_model, accelerator=accelerator)
    (tmp_path / "adapters").mkdir()
    (tmp_path / "adapters" / "old").touch()
    save(trainer, str(tmp_path))
    assert sorted(str(x.relative_to(tmp_path)) for x in tmp_path.rglob("*")) == [
        "adapters", "adapters/new", "config.json"
    ]  # fmt: skip


# ---------------------------------------------------------------------- every stage of every recipe

# The recipes' sizes are those of the published models.
TINY_FIELDS = {
    "longvu": {"image_token_len": 9, "lowres_token": 2},
    "videochat_flash": {"vision_config.image_size": 32},
    "llava_st": {"num_temporal_tokens": 6, "num_spatial_tokens": 5},
}


def save_tiny(name: str, folder: Path) -> None:
    from tests.tiny_crosslmm import tiny_crosslmm_model
    from tests.tiny_crosslmm_processor import tiny_crosslmm_processor
    from tests.tiny_crossvllm import tiny_crossvllm_model
    from tests.tiny_crossvllm_processor import tiny_crossvllm_processor
    from tests.tiny_longvu import tiny_longvu_model
    from tests.tiny_longvu_processor import tiny_longvu_processor

    model, processor = {
        "videochat_flash": (tiny_videochat_flash_model, tiny_videochat_flash_processor),
        "longvu": (tiny_longvu_model, tiny_longvu_processor),
        "llava_st": (tiny_llava_st_model, tiny_llava_st_processor),
        "crosslmm": (tiny_crosslmm_model, tiny_crosslmm_processor),
        "crossvllm": (tiny_crossvllm_model, tiny_crossvllm_processor),
    }[name]
    # Prompts of the coarse module are long in a tokenizer of bytes.
    room = {"text_kwargs": {"max_position_embeddings": 2048}} if name == "crossvllm" else {}
    model(**room).save_pretrained(folder)
    processor().save_pretrained(folder)


# Learns from rewards, with a trainer of its own.
CROSS_GRANULARITY = "crossvllm/stage4_cross_granularity"
SHORT_POLICIES = {"num_policies": 2, "max_policy_tokens": 4, "min_segment": 0.5}
STAGES = [f"{name}/{stage}" for name, stages in recipe_names().items() for stage in stages]


@pytest.mark.slow
@pytest.mark.parametrize("name", STAGES)
def test_every_stage_runs_on_the_corpus(capsys, rows, tmp_path, name):
    architecture = name.split("/")[0]
    save_tiny(architecture, tmp_path / "tiny")
    changes = {f"model.{key}": value for key, value in TINY_FIELDS.get(architecture, {}).items()}
    changes |= {"lora.r": 2} if architecture == "llava_st" and not name.endswith("stage1_alignment") else {}
    changes |= SHORT_POLICIES if name == CROSS_GRANULARITY else {}
    output = tmp_path / "run"
    words = [name, "--model", str(tmp_path / "tiny"), "--data", rows, "--device", "cpu", "--output", str(output)]
    said(capsys, *words, *settings(**{**changes, "gradient_checkpointing": True, "logging_steps": 1}))
    assert any((output / file).is_file() for file in ("model.safetensors", "adapter_model.safetensors"))


def question_rows(folder: Path, rows: str) -> Path:
    """The questions of the corpus as rows of cross-granularity training, with a segment, and one without its video."""
    questions = []
    for row in map(json.loads, Path(rows).read_text().splitlines()):
        prompt, answer = row["messages"]
        video = str(Path(rows).parent / prompt["content"][0]["path"])
        text = next(block["text"] for block in prompt["content"] if block["type"] == "text")
        questions.append({"video": video, "question": text, "answer": text_of(answer), "segment": [0.0, 1.0]})
    questions.append({**questions[0], "video": "gone.mp4"})
    file = folder / "questions.jsonl"
    file.write_text("".join(json.dumps(question) + "\n" for question in questions))
    return file


def text_of(message: dict) -> str:
    content = message["content"]
    return content if isinstance(content, str) else content[0]["text"]


def test_dry_run_of_both_modules_in_turn(capsys, rows, tmp_path):
    pytest.importorskip("peft")
    save_tiny("crossvllm", tmp_path / "tiny")
    words = [CROSS_GRANULARITY, "--model", str(tmp_path / "tiny"), "--dry-run", "--device", "cpu"]
    given = settings(**SHORT_POLICIES, max_steps=-1, coarse_learning_rate=1e-3, **{"model.coarse_training_frames": 6})
    data = ["--data", str(question_rows(tmp_path, rows)), "--on-error", "skip"]
    text = said(capsys, *words, *data, *given)
    # Rank 8 on seven linear layers of two layers, and two maps of a projector with biases.
    projector = 24 * 32 + 32 + 32 * 32 + 32
    lora = 2 * 8 * ((32 + 32) * 2 + (32 + 16) * 2 + (32 + 48) * 3)
    assert f"coarse {projector + lora:,} of {projector + lora:,}, rate 0.001" in text
    assert f"fine {projector + lora:,} of {projector + lora:,}, rate 2e-05" in text and "base 0 of" in text
    # Six frames of four tokens and a policy of four tokens, for each of two policies of each of two rows.
    assert "coarse 112 at most (2 policies of 28 per row, 6 frames; prompts not counted)" in text
    # Two epochs of two pairs of steps.
    assert "steps 8, of the coarse and of the fine module in turn (4 rows)" in text
    assert "5 rows in, 4 rows out, 1 with problems" in text and "no such video: " in text
    text = said(capsys, *words, *settings())
    assert "steps 2, of the coarse and of the fine module in turn" in text
    for word in ("--dpo", "--lora"):
        assert main(["train", *words, word]) == 2
        assert f"{word} does not fit this stage" in capsys.readouterr().err
    words[words.index("--model") + 1] = "longvu-7b"
    assert main(["train", *words]) == 2
    assert "LongVUConfig has no field 'coarse_stride'" in capsys.readouterr().err
