"""The thin file of a LLaVA-ST checkpoint: all classes it names, loaded where nothing imports the package."""

import json
import os
import subprocess
import sys
from pathlib import Path

from longvideo.cli.export_shim import SHIM_NAME, export_shim
from tests.tiny_llava_st import tiny_llava_st_model
from tests.tiny_llava_st_processor import tiny_llava_st_processor


def test_every_class_is_named_and_loaded(tmp_path: Path) -> None:
    folder, client = tmp_path / "tiny", Path(__file__).with_name("shim_client.py")
    tiny_llava_st_model().save_pretrained(folder)
    tiny_llava_st_processor().save_pretrained(folder)
    export_shim(folder)
    auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
    assert auto_map["AutoModelForImageTextToText"] == f"{SHIM_NAME}.LlavaSTForConditionalGeneration"
    assert auto_map["AutoImageProcessor"] == f"{SHIM_NAME}.LlavaSTImageProcessor"
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
    modeling, processing = "longvideo.modeling.llava_st", "longvideo.processing.llava_st"
    assert loaded["classes"] == {
        "AutoConfig": f"{modeling}.configuration_llava_st.LlavaSTConfig",
        "AutoModelForImageTextToText": f"{modeling}.modeling_llava_st.LlavaSTForConditionalGeneration",
        "AutoProcessor": f"{processing}.processing_llava_st.LlavaSTProcessor",
        "AutoVideoProcessor": f"{processing}.video_processing_llava_st.LlavaSTVideoProcessor",
    }
    assert not [name for name in loaded["saved"] if name.endswith(".py")]
