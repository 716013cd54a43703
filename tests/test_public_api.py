"""What users may rely on: public names, commands and tasks are pinned; a change here is a change for them."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import longvideo

ROOT = Path(__file__).resolve().parent.parent

PUBLIC = {
    "__version__",
    "tiny_checkpoint",
    "UMTVisionConfig",
    "UMTVisionModel",
    "InternVideo2VisionConfig",
    "InternVideo2VisionModel",
    "VideoChatFlashConfig",
    "VideoChatFlashModel",
    "VideoChatFlashForConditionalGeneration",
    "EncodedVideo",
    "VideoChatFlashProcessor",
    "VideoChatFlashVideoProcessor",
    "VideoChatFlashImageProcessor",
    "CrossLMMConfig",
    "CrossLMMEncodedVideo",
    "CrossLMMForConditionalGeneration",
    "CrossLMMImageProcessor",
    "CrossLMMModel",
    "CrossLMMProcessor",
    "CrossLMMVideoProcessor",
    "CrossVLLMConfig",
    "CrossVLLMEncodedVideo",
    "CrossVLLMForConditionalGeneration",
    "CrossVLLMModel",
    "CrossVLLMProcessor",
    "CrossVLLMVideoProcessor",
    "FrameFeatureCache",
    "LlavaSTConfig",
    "LlavaSTEncodedVideo",
    "LlavaSTForConditionalGeneration",
    "LlavaSTImageProcessor",
    "LlavaSTModel",
    "LlavaSTProcessor",
    "LlavaSTVideoProcessor",
    "LongVUConfig",
    "LongVUModel",
    "LongVUForConditionalGeneration",
    "LongVUEncodedVideo",
    "LongVUProcessor",
    "LongVUVideoProcessor",
    "LongVUImageProcessor",
    "VideoQuestionAnsweringPipeline",
    "CrossGranularityConfig",
    "CrossGranularityTrainer",
    "VideoDPOConfig",
    "VideoDPOTrainer",
    "VideoSFTCollator",
    "VideoSFTConfig",
    "VideoSFTTrainer",
    "load_video_rows",
}
COMMANDS = {"ask", "convert", "data", "train", "estimate", "doctor", "card", "export-shim"}
TASKS = {"video-question-answering", "video-text-to-text"}
MODEL_TYPES = {
    "videochat_flash",
    "longvu",
    "llava_st",
    "crosslmm",
    "crossvllm",
    "umt_vision_model",
    "internvideo2_vision_model",
}


def _python(code: str) -> str:
    """Runs code in a fresh interpreter in the checkout and returns what it prints."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_public_names_are_pinned() -> None:
    assert set(longvideo.__all__) == PUBLIC
    assert len(longvideo.__all__) == len(PUBLIC), "a name stands twice in __all__"
    assert set(dir(longvideo)) >= PUBLIC


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_every_public_name_is_there_and_says_what_it_is(name: str) -> None:
    value = getattr(longvideo, name)
    if name == "__version__":
        assert value.count(".") == 2
        return
    assert value.__module__.startswith("longvideo")
    assert value.__name__ == name
    assert value.__doc__, f"{name} has no docstring"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'VideoChatFlush'"):
        _ = longvideo.VideoChatFlush


def test_importing_the_package_loads_neither_torch_nor_transformers() -> None:
    """Doctor, help texts and whatever only asks for the version start at once."""
    heavy = ("torch", "transformers", "numpy", "av", "peft", "datasets", "matplotlib")
    code = f"import longvideo, sys; print([name for name in {heavy!r} if name in sys.modules])"
    assert _python(code).strip() == "[]"


@pytest.mark.parametrize("order", ["import longvideo, transformers", "import transformers, longvideo"])
def test_registration_works_in_both_orders_of_import(order: str) -> None:
    code = f"{order}\nprint(type(transformers.AutoConfig.for_model('videochat_flash')).__module__)"
    assert _python(code).strip() == "longvideo.modeling.videochat_flash.configuration_videochat_flash"


def test_auto_modules_are_loaded_once() -> None:
    """A file of transformers may load an Auto module on its way; registering right there would need the whole file."""
    code = "import longvideo, transformers; transformers.Qwen2Config, transformers.Qwen2Model\n"
    code += "from transformers.models.auto import modeling_auto as auto\n"
    code += "known = [config.model_type for config in auto.MODEL_MAPPING._extra_content]\n"
    code += "print(transformers.AutoModel is auto.AutoModel, 'videochat_flash' in known)"
    assert _python(code).strip() == "True True"


FIRST_IMPORTS = """
import os, sys, torch, torchvision, longvideo
failed = []
for name in sys.argv[1:]:
    child = os.fork()  # a fresh interpreter each time would spend most of its time on torch
    if child == 0:
        try:
            getattr(longvideo, name)
        except BaseException as error:
            print(f"{name}: {error!r}", flush=True)
            os._exit(1)
        os._exit(0)
    os.waitpid(child, 0)
"""


def test_any_public_name_may_be_the_first_to_be_imported() -> None:
    """Registration waits for the Auto modules, so a class could be asked for while its file is half imported."""
    names = ["UMTVisionModel", "VideoChatFlashConfig", "VideoChatFlashProcessor", "VideoQuestionAnsweringPipeline"]
    command = [sys.executable, "-c", FIRST_IMPORTS, *names]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr[-2000:]


def test_commands_are_pinned() -> None:
    from longvideo import cli

    assert set(cli.COMMANDS) == COMMANDS
    for name, (module, _) in cli.COMMANDS.items():
        assert (ROOT / "longvideo" / "cli" / f"{module}.py").is_file(), f"command {name} has no module"


def test_tasks_are_pinned() -> None:
    from transformers.pipelines import PIPELINE_REGISTRY

    ours = {
        task
        for task in PIPELINE_REGISTRY.get_supported_tasks()
        if PIPELINE_REGISTRY.check_task(task)[1]["impl"] is longvideo.VideoQuestionAnsweringPipeline
    }
    assert ours == TASKS


def _declared_model_types() -> set[str]:
    """`model_type = "..."` of every configuration file, read without importing it."""
    found = set()
    for path in (ROOT / "modeling").rglob("configuration_*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Assign | ast.AnnAssign) or not isinstance(node.value, ast.Constant):
                continue
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(isinstance(target, ast.Name) and target.id == "model_type" for target in targets):
                found.add(node.value.value)
    return found


def test_no_model_type_is_taken_by_transformers() -> None:
    assert _declared_model_types() == MODEL_TYPES
    code = (
        "import json, sys\n"
        "from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES\n"
        "assert 'longvideo' not in sys.modules\n"
        "print(json.dumps(sorted(CONFIG_MAPPING_NAMES)))"
    )
    upstream = set(json.loads(_python(code)))
    assert "qwen2" in upstream
    assert MODEL_TYPES & upstream == set(), "transformers has this model_type now; ours must change or go"
