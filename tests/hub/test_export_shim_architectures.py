"""The thin file of the other architectures: every class it names, loaded where nothing imports the package."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import longvideo
from longvideo.cli.export_shim import SHIM_NAME, export_shim
from tests.hub.saved_tiny import TINY, save_tiny


@pytest.mark.parametrize("model_type", TINY)
def test_every_class_is_named_and_loaded(model_type: str, tmp_path: Path) -> None:
    client, prefix = Path(__file__).with_name("shim_client.py"), TINY[model_type].prefix
    folder = save_tiny(model_type, tmp_path / "tiny")
    export_shim(folder)
    auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
    assert auto_map["AutoModelForImageTextToText"] == f"{SHIM_NAME}.{prefix}ForConditionalGeneration"
    # CrossVLLM takes an image processor of transformers, which needs no entry.
    own = f"{prefix}ImageProcessor" in longvideo.__all__
    assert auto_map.get("AutoImageProcessor") == (f"{SHIM_NAME}.{prefix}ImageProcessor" if own else None)
    result = subprocess.run(
        [sys.executable, str(client), str(folder), str(tmp_path / "again")],
        env={
            **os.environ,
            "PYTHONPATH": str(client.parents[2]),
            "HF_HOME": str(tmp_path / "cache"),
            "HF_HUB_OFFLINE": "1",
        },
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    loaded = json.loads(result.stdout.splitlines()[-1])
    modeling, processing = (f"longvideo.{part}.{model_type}" for part in ("modeling", "processing"))
    assert loaded["classes"] == {
        "AutoConfig": f"{modeling}.configuration_{model_type}.{prefix}Config",
        "AutoModelForImageTextToText": f"{modeling}.modeling_{model_type}.{prefix}ForConditionalGeneration",
        "AutoProcessor": f"{processing}.processing_{model_type}.{prefix}Processor",
        "AutoVideoProcessor": f"{processing}.video_processing_{model_type}.{prefix}VideoProcessor",
    }
    assert not [name for name in loaded["saved"] if name.endswith(".py")]
