"""The thin file: what is written, and loading with it in a process that does not import the package."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForImageTextToText, AutoProcessor

from longvideo.cli import main
from longvideo.cli.export_shim import SHIM_NAME, export_shim
from tests.tiny import tiny_videochat_flash_model, tiny_videochat_flash_processor


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny checkpoint with the thin file."""
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    tiny_videochat_flash_model().save_pretrained(folder)
    tiny_videochat_flash_processor().save_pretrained(folder)
    export_shim(folder)
    return folder


def test_files(folder: Path) -> None:
    auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
    assert auto_map["AutoConfig"] == f"{SHIM_NAME}.VideoChatFlashConfig"
    assert auto_map["AutoModelForImageTextToText"] == f"{SHIM_NAME}.VideoChatFlashForConditionalGeneration"
    assert auto_map["AutoModel"] == f"{SHIM_NAME}.VideoChatFlashModel"
    processor = json.loads((folder / "processor_config.json").read_text())
    assert processor["auto_map"] == {"AutoProcessor": f"{SHIM_NAME}.VideoChatFlashProcessor"}
    video_map = {"AutoVideoProcessor": f"{SHIM_NAME}.VideoChatFlashVideoProcessor"}
    assert processor["video_processor"]["auto_map"] == video_map
    # With such an entry even a process that imported the package would be asked for its trust.
    assert "custom_pipelines" not in json.loads((folder / "config.json").read_text())
    source = (folder / f"{SHIM_NAME}.py").read_text()
    imports = [line for line in source.splitlines() if "import" in line and not line.startswith('"""')]
    assert imports and all(line.startswith("from longvideo.") for line in imports), (
        "only absolute imports of the package"
    )
    assert not list(folder.glob("*.partial"))


@pytest.fixture(scope="module")
def loaded(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What `shim_client.py` saw."""
    client = Path(__file__).with_name("shim_client.py")
    cache = tmp_path_factory.mktemp("cache")
    result = subprocess.run(
        [sys.executable, str(client), str(folder), str(tmp_path_factory.mktemp("again"))],
        env={**os.environ, "PYTHONPATH": str(client.parents[2]), "HF_HOME": str(cache), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


def test_loads_the_classes_of_the_package(loaded: dict) -> None:
    modeling, processing = "longvideo.modeling.videochat_flash", "longvideo.processing.videochat_flash"
    assert loaded["classes"] == {
        "AutoConfig": f"{modeling}.configuration_videochat_flash.VideoChatFlashConfig",
        "AutoModelForImageTextToText": f"{modeling}.modeling_videochat_flash.VideoChatFlashForConditionalGeneration",
        "AutoProcessor": f"{processing}.processing_videochat_flash.VideoChatFlashProcessor",
        "AutoVideoProcessor": f"{processing}.video_processing_videochat_flash.VideoChatFlashVideoProcessor",
    }


def test_saving_copies_no_code(loaded: dict) -> None:
    assert "model.safetensors" in loaded["saved"] and "processor_config.json" in loaded["saved"]
    assert not [name for name in loaded["saved"] if name.endswith(".py")]


def test_without_trust(loaded: dict) -> None:
    assert loaded["no_trust"].startswith("ValueError") and "trust_remote_code=True" in loaded["no_trust"]


def test_package_not_installed(loaded: dict) -> None:
    assert loaded["no_package"].startswith("ImportError") and "pip install longvideo" in loaded["no_package"]


def test_import_still_needs_no_trust(folder: Path) -> None:
    """With the package imported its own classes win, without a question about trust."""
    assert (
        type(AutoModelForImageTextToText.from_pretrained(folder)).__name__ == "VideoChatFlashForConditionalGeneration"
    )
    assert type(AutoProcessor.from_pretrained(folder)).__name__ == "VideoChatFlashProcessor"


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "videochat_flash"}))
    assert main(["export-shim", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines() == [str(tmp_path / f"{SHIM_NAME}.py"), str(tmp_path / "config.json")]


@pytest.mark.parametrize("model_type", ["qwen2", "videochat_flash_qwen", None])
def test_command_with_foreign_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture, model_type: str | None
) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"model_type": model_type}))
    assert main(["export-shim", str(tmp_path)]) == 2
    assert f"{model_type!r} is not one of this package" in capsys.readouterr().err
    assert json.loads(config.read_text()) == {"model_type": model_type}
    assert main(["export-shim", str(tmp_path / "absent")]) == 2
    assert "has no config.json" in capsys.readouterr().err
