"""The thin file of a LongVU checkpoint: every class it names, loaded in a process that does not import the package."""

import json
import os
import subprocess
import sys
from pathlib import Path

from longvideo.cli.export_shim import SHIM_NAME, export_shim
from tests.tiny_longvu import tiny_longvu_model
from tests.tiny_longvu_processor import tiny_longvu_processor


def test_every_class_is_named_and_loaded(tmp_path: Path) -> None:
    folder, client = tmp_path / "tiny", Path(__file__).with_name("shim_client.py")
    tiny_longvu_model().save_pretrained(folder)
    tiny_longvu_processor().save_pretrained(folder)
    export_shim(folder)
    auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
    assert auto_map["AutoModelForImageTextToText"] == f"{SHIM_NAME}.LongVUForConditionalGeneration"
    assert auto_map["AutoImageProcessor"] == f"{SHIM_NAME}.LongVUImageProcessor"
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
    modeling, processing = "longvideo.modeling.longvu", "longvideo.processing.longvu"
    assert loaded["classes"] == {
        "AutoConfig": f"{modeling}.configuration_longvu.LongVUConfig",
        "AutoModelForImageTextToText": f"{modeling}.modeling_longvu.LongVUForConditionalGeneration",
        "AutoProcessor": f"{processing}.processing_longvu.LongVUProcessor",
        "AutoVideoProcessor": f"{processing}.video_processing_longvu.LongVUVideoProcessor",
    }
    assert not [name for name in loaded["saved"] if name.endswith(".py")]
