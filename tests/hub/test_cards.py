"""Model cards: valid metadata, facts of the folder, code that runs, and the command that writes them."""

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from longvideo.cli import main
from longvideo.hub_cards.render import MARKER, available_architectures, load_source, render_card
from tests.tiny import tiny_videochat_flash_model, tiny_videochat_flash_processor
from tests.videos import make_video

PUBLISHED = "OpenGVLab/VideoChat-Flash-Qwen2-7B_res448"
COMMITTED = sorted(Path(__file__).resolve().parents[2].glob("longvideo/tiny/*/README.md"))
MEASURED = {
    "parity": [{"quantity": "logits", "max_abs_error": 2.4e-6, "tolerance": 5e-4}],
    "results": [{"dataset": "Shapes held-out", "metric": "accuracy", "value": 81.5, "note": "500 questions"}],
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny checkpoint; not to be changed."""
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny-flash"
    tiny_videochat_flash_model().save_pretrained(folder)
    tiny_videochat_flash_processor().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return shutil.copytree(checkpoint, tmp_path / checkpoint.name)


def metadata_of(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


def write_report(folder: Path, source: str) -> None:
    report = {"source": source, "num_source_tensors": 60, "num_target_tensors": 58, "missing": []}
    (folder / "conversion_report.json").write_text(json.dumps({**report, "dropped": ["a", "b"]}))


def test_metadata_with_base_model(checkpoint: Path) -> None:
    card = render_card(checkpoint, base_model=PUBLISHED, repo_id="tester/tiny")
    metadata = metadata_of(card)
    assert metadata["pipeline_tag"] == "video-text-to-text"
    assert metadata["library_name"] == "transformers"
    assert metadata["base_model"] == PUBLISHED
    assert metadata["license"] == "apache-2.0"
    assert {"longvideo", "videochat_flash", "long-video"} <= set(metadata["tags"])
    assert ModelCard(card).data.to_dict() == metadata, "the Hub's own reader sees the same metadata"


def test_base_model_and_counts_come_from_the_conversion_report(folder: Path) -> None:
    write_report(folder, PUBLISHED.split("/")[1])
    card = render_card(folder)
    assert metadata_of(card)["base_model"] == PUBLISHED
    assert metadata_of(card)["license"] == "apache-2.0"
    assert "60 tensors read, 58 written, 2 dropped by name, 0 missing" in card


def test_unknown_origin_gets_neither_base_model_nor_licence(folder: Path) -> None:
    write_report(folder, "my-finetune")
    card = render_card(folder)
    assert not {"base_model", "license"} & metadata_of(card).keys()
    assert "licence of these weights was not stated" in card


def test_facts_are_those_of_the_folder(checkpoint: Path) -> None:
    model = tiny_videochat_flash_model()
    card = render_card(checkpoint)
    num_values = sum(tensor.numel() for tensor in model.state_dict().values())
    assert f"| Weights | {num_values:,} values in {len(model.state_dict())} tensors, F32 |" in card
    assert f"| 64 | {64 * model.config.tokens_per_frame:,} |" in card
    assert "No parity figure was measured" in card


def test_dropout_is_described_where_its_layers_exist(folder: Path) -> None:
    assert "visual_dropout=True" not in render_card(folder), "the tiny decoder has no layer 8"
    config = json.loads((folder / "config.json").read_text())
    config |= {"llm_compress_layer_list": [1, 3], "llm_image_token_ratio_list": [1.0, 0.75, 0.25]}
    (folder / "config.json").write_text(json.dumps(config))
    card = render_card(folder)
    assert "after layers 1, 3 are\n0.75, 0.25 of these (`attention`)" in card


def test_measured_figures(folder: Path) -> None:
    (folder / "measured.json").write_text(json.dumps(MEASURED))
    card = render_card(folder)
    assert "| logits | 2.4e-06 | 5e-04 |" in card
    assert "| Shapes held-out | accuracy | 81.5 | 500 questions |" in card
    assert "No parity figure was measured" not in card
    (result,) = metadata_of(card)["model-index"][0]["results"]
    assert result["task"]["type"] == "video-text-to-text"
    assert result["dataset"] == {"name": "Shapes held-out", "type": "shapes-held-out"}
    assert result["metrics"][0]["value"] == 81.5
    assert render_card(folder, measured=MEASURED) == card


def test_python_blocks_run(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    make_video(tmp_path / "video.mp4")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", render_card(checkpoint, repo_id=str(checkpoint)), re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        assert block.startswith("import longvideo")
        exec(compile(block, "card", "exec"), {})
    assert len(capsys.readouterr().out.splitlines()) >= len(blocks), "each block prints an answer"


def test_card_has_no_leftovers_of_the_template(checkpoint: Path) -> None:
    for card in (render_card(checkpoint), render_card(checkpoint, base_model=PUBLISHED, measured=MEASURED)):
        assert not re.search(r"\{[{%#]|[%#]\}|\bNone\b|\n\n\n", card)


@pytest.mark.parametrize("model_type", available_architectures())
def test_every_source_states_its_origin(model_type: str) -> None:
    source, _ = load_source(model_type)
    assert {"title", "license", "language", "tags", "paper", "arxiv", "repository", "published"} <= source.keys()


@pytest.mark.skipif(not COMMITTED, reason="no checkpoint with a card lies in the package")
@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.parent.name)
def test_committed_card_is_the_rendered_one(path: Path) -> None:
    renew = f"renew it: longvideo card {path.parent} --license apache-2.0"
    assert path.read_text(encoding="utf-8") == render_card(path.parent, license="apache-2.0"), renew


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base_model": "not a name"}, "expected owner/name"),
        ({"license": "Apache License 2.0"}, "expected one such as apache-2.0"),
        ({"measured": {"parity": [{"quantity": "logits"}]}}, "lacks max_abs_error, tolerance"),
        ({"measured": {"speed": []}}, "expected parity, results"),
    ],
)
def test_malformed_options(checkpoint: Path, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        render_card(checkpoint, **options)


def test_folder_without_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        render_card(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "videochat_flash_qwen"}')
    with pytest.raises(
        ValueError, match=r"'videochat_flash_qwen'; cards exist for .*videochat_flash.*longvideo convert"
    ):
        render_card(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="expected a JSON object"):
        render_card(tmp_path)


def test_command_writes_and_renews_the_card(folder: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["card", str(folder)]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{folder / 'README.md'}\n"
    assert "--base-model" in captured.err and "--license" in captured.err
    assert main(["card", str(folder), "--base-model", PUBLISHED]) == 0
    assert capsys.readouterr().err == ""
    assert (folder / "README.md").read_text() == render_card(folder, base_model=PUBLISHED)
    assert main(["card", str(folder), "--out", "-", "--base-model", PUBLISHED]) == 0
    assert capsys.readouterr().out == render_card(folder, base_model=PUBLISHED)


def test_command_keeps_a_card_written_by_hand(folder: Path, capsys: pytest.CaptureFixture) -> None:
    card = folder / "README.md"
    card.write_text("# Mine\n")
    assert main(["card", str(folder)]) == 2
    assert "pass --force" in capsys.readouterr().err
    assert card.read_text() == "# Mine\n"
    assert main(["card", str(folder), "--force"]) == 0
    assert MARKER in card.read_text()


def test_command_with_missing_measured_file(folder: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["card", str(folder), "--measured", "absent.json"]) == 2
    assert "absent.json: no such file" in capsys.readouterr().err
    assert not (folder / "README.md").exists()
