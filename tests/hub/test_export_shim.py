"""The thin file: what is written, and loading with it in a process that does not import the package."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from longvideo.cli import main
from longvideo.cli.export_shim import SHIM_NAME, export_shim
from tests.tiny import tiny_videochat_flash_model, tiny_videochat_flash_processor

CLIENT = """
import json, os, sys
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, AutoVideoProcessor
folder, again = sys.argv[1:]
loaded = {
    cls.__name__: cls.from_pretrained(folder, trust_remote_code=True)
    for cls in (AutoConfig, AutoModelForImageTextToText, AutoProcessor, AutoVideoProcessor)
}
loaded["AutoModelForImageTextToText"].save_pretrained(again)
loaded["AutoProcessor"].save_pretrained(again)
modules = {name: f"{type(value).__module__}.{type(value).__name__}" for name, value in loaded.items()}
print(json.dumps({"classes": modules, "saved": sorted(os.listdir(again))}))
"""


def run_python(code: str, *args: object, cache: Path) -> subprocess.CompletedProcess:
    root = Path(__file__).resolve().parents[2]
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, args)],
        env={**os.environ, "PYTHONPATH": str(root), "HF_HOME": str(cache), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


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


def test_loads_with_trust_and_saves_without_code(folder: Path, tmp_path: Path) -> None:
    result = run_python(CLIENT, folder, tmp_path / "again", cache=tmp_path / "cache")
    assert result.returncode == 0, result.stderr[-3000:]
    loaded = json.loads(result.stdout.splitlines()[-1])
    modeling, processing = "longvideo.modeling.videochat_flash", "longvideo.processing.videochat_flash"
    assert loaded["classes"] == {
        "AutoConfig": f"{modeling}.configuration_videochat_flash.VideoChatFlashConfig",
        "AutoModelForImageTextToText": f"{modeling}.modeling_videochat_flash.VideoChatFlashForConditionalGeneration",
        "AutoProcessor": f"{processing}.processing_videochat_flash.VideoChatFlashProcessor",
        "AutoVideoProcessor": f"{processing}.video_processing_videochat_flash.VideoChatFlashVideoProcessor",
    }
    assert not [name for name in loaded["saved"] if name.endswith(".py")], (
        "no source file is copied beside new weights"
    )


def test_without_trust(folder: Path, tmp_path: Path) -> None:
    code = "import sys; from transformers import AutoConfig; "
    code += "AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=False)"
    result = run_python(code, folder, cache=tmp_path)
    assert result.returncode != 0 and "trust_remote_code=True" in result.stderr


def test_package_not_installed(folder: Path, tmp_path: Path) -> None:
    code = "import sys; sys.modules['longvideo'] = None; from transformers import AutoConfig; "
    code += "AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True)"
    result = run_python(code, folder, cache=tmp_path)
    assert result.returncode != 0 and "pip install longvideo" in result.stderr


def test_import_still_needs_no_trust(folder: Path, tmp_path: Path) -> None:
    code = "import sys, longvideo; from transformers import AutoModelForImageTextToText, AutoProcessor\n"
    code += "for auto in (AutoModelForImageTextToText, AutoProcessor): "
    code += "print(type(auto.from_pretrained(sys.argv[1])).__name__)"
    result = run_python(code, folder, cache=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.split() == ["VideoChatFlashForConditionalGeneration", "VideoChatFlashProcessor"]


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
