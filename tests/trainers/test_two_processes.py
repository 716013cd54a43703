"""Two processes on a CPU: the losses of one process with the same global batch, replicated or in shards."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForImageTextToText

from longvideo.trainers import accelerate_config, check_adapter, consolidate_checkpoint, lora_config
from longvideo.trainers.scale import CONFIGS_DIR, check_parallelism
from tests.trainers import scale_worker
from tests.trainers.sft_runs import losses
from tests.trainers.zoo import KINDS, make_batch, make_model

ENGINES = ("ddp", "fsdp2", "single_gpu", "zero2", "zero3")
PATIENCE = 560  # seconds; on a busy machine two processes take half a minute to start
MARGINS = "rewards/margins"
QUICK = ["videochat_flash", "videochat_flash-lora", "videochat_flash-dpo", "videochat_flash-lora-dpo"]
EVERY = [*KINDS, "videochat_flash-dropout", "llava_st-split-lora", "crosslmm-closed-lora"]
EVERY += [f"{kind}-lora-dpo" for kind in KINDS if kind != "videochat_flash"]
SHARDED = ["videochat_flash", "llava_st-split", "crosslmm", "longvu-save", "longvu-resume"]
SHARDED += ["videochat_flash-lora-save", "videochat_flash-lora-resume"]


def engine_environment(name: str) -> dict[str, str]:
    """What `accelerate launch --config_file` tells the processes that it starts.

    Args:
        name: Name of shipped settings.

    Returns:
        Variables of the environment that differ from this process's.
    """
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    command = ["--config_file", accelerate_config(name), "--num_processes", "2", "--mixed_precision", "no"]
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args([*command, "script.py"]))
    found = prepare_multi_gpu_env(args)
    return {key: value for key, value in found.items() if os.environ.get(key) != value}


def launch(folder: Path, words: list[str], repository: Path, environment: dict[str, str]) -> Path:
    """Runs `scale_worker.py` in two processes; returns the folder with what they wrote."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_addr", "127.0.0.1"]
    command += ["--master_port", str(port), scale_worker.__file__, str(folder), *words]
    own = {"PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, env={**os.environ, **environment, **own}, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def one_process(tmp_path_factory) -> Any:
    """Losses of one process, the model that it trained, and its margins, made once for each word."""
    known: dict[str, tuple[list[float], Any, list[float]]] = {}

    def run(word: str) -> tuple[list[float], Any, list[float]]:
        name = word.removesuffix("-save").removesuffix("-resume")
        if name not in known:
            trainer = scale_worker.make_trainer(tmp_path_factory.mktemp(name), name)
            trainer.train()
            margins = [entry[MARGINS] for entry in trainer.state.log_history if MARGINS in entry]
            known[name] = losses(trainer), trainer.model.eval(), margins
        return known[name]

    return run


def read_logs(folder: Path, column: int = 1) -> list[float]:
    """What a run wrote after every step: 1 for its losses, 3 for its margins."""
    return [json.loads(line)[column] for line in (folder / "losses.jsonl").read_text(encoding="utf-8").splitlines()]


def assert_same_curves(folder: Path, words: list[str], one_process: Any) -> None:
    """The losses of every word are those of one process."""
    for word in words:
        expected, _, margins = one_process(word)
        expected = expected[2:] if word.endswith("-resume") else expected
        is_dpo = word.endswith("-dpo")
        # Two halves of a sum in float32 in place of one, over four steps; preferences are differences of such sums.
        assert read_logs(folder / word) == pytest.approx(expected, rel=1e-4 if is_dpo else 1e-5), word
        if is_dpo:
            assert read_logs(folder / word, 3) == pytest.approx(margins, abs=1e-3), word
            assert margins[0] == pytest.approx(0, abs=1e-3) and margins[-1] > 0.01


def loss_of(model: Any, kind: str) -> float:
    with torch.no_grad():
        return float(model.eval()(**make_batch(kind), use_cache=False).loss)


def test_losses_of_two_processes_are_those_of_one(one_process, tmp_path, repository):
    folder = launch(tmp_path, QUICK, repository, {})
    assert_same_curves(folder, QUICK, one_process)
    for word in QUICK:
        assert json.loads((folder / word / "facts.json").read_text()) == {
            "type": "MULTI_CPU", "processes": 2, "share": 1.0
        }  # fmt: skip
    trained = AutoModelForImageTextToText.from_pretrained(folder / "videochat_flash" / "final")
    # Adam turns rounding of near-zero gradients into steps of full size.
    wanted = loss_of(one_process("videochat_flash")[1], "videochat_flash")
    assert loss_of(trained, "videochat_flash") == pytest.approx(wanted, rel=1e-3)
    assert not list((folder / "videochat_flash-lora" / "final").glob("model*.safetensors"))
    check_adapter(make_model("videochat_flash"), folder / "videochat_flash-lora" / "final")


@pytest.mark.slow
def test_every_architecture_in_two_processes(one_process, tmp_path, repository):
    assert_same_curves(launch(tmp_path, EVERY, repository, {}), EVERY, one_process)


@pytest.mark.slow
def test_shards_train_resume_and_load_anywhere(one_process, tmp_path, repository):
    """FSDP2 with the shipped settings: the same losses from weights in two pieces, and from a checkpoint of pieces."""
    environment = {**engine_environment("fsdp2"), "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}
    folder = launch(tmp_path, SHARDED, repository, environment)
    assert_same_curves(folder, SHARDED, one_process)
    for word in SHARDED:
        found = json.loads((folder / word / "facts.json").read_text())
        assert (found["type"], found["processes"]) == ("FSDP", 2) and 0.4 < found["share"] < 0.6, (word, found)
    checkpoint = folder / "longvu-save" / "checkpoint-4"
    assert not list(checkpoint.glob("*.safetensors"))
    made = consolidate_checkpoint(checkpoint, tmp_path / "whole", model=make_model("longvu", seed=5))
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "whole")
    assert loss_of(loaded, "longvu") == loss_of(made, "longvu")
    # Adam turns rounding of near-zero gradients into steps of full size.
    assert loss_of(loaded, "longvu") == pytest.approx(loss_of(one_process("longvu")[1], "longvu"), rel=1e-3)
    with pytest.raises(ValueError, match="was saved from another model"):
        consolidate_checkpoint(checkpoint, tmp_path / "wrong", model=make_model("crosslmm"))
    assert not (tmp_path / "wrong").exists()
    peft = pytest.importorskip("peft")
    base = make_model("videochat_flash")
    adapted = peft.get_peft_model(base, lora_config(base, r=2))
    consolidate_checkpoint(folder / "videochat_flash-lora-save" / "checkpoint-4", tmp_path / "adapter", model=adapted)
    loaded = peft.PeftModel.from_pretrained(make_model("videochat_flash"), tmp_path / "adapter")
    wanted = loss_of(one_process("videochat_flash-lora")[1], "videochat_flash")
    assert loss_of(loaded, "videochat_flash") == pytest.approx(wanted, rel=1e-4)


# ------------------------------------------------------------------ settings that are shipped, and what is refused


def test_shipped_settings_are_understood():
    """By accelerate's own reader, and with no entry that it would pass over."""
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    assert tuple(sorted(path.stem for path in CONFIGS_DIR.glob("*.yaml"))) == ENGINES
    known = set(vars(launch_command_parser().parse_args(["script.py"])))
    for name in ENGINES:
        config = load_config_from_file(accelerate_config(name))
        assert config.mixed_precision == "bf16"
        contents = yaml.safe_load(Path(accelerate_config(name)).read_text(encoding="utf-8"))
        for entries in (contents.get("fsdp_config", {}), contents.get("deepspeed_config", {})):
            assert set(entries) <= known, name
    assert engine_environment("ddp").get("ACCELERATE_USE_FSDP") is None
    found = engine_environment("fsdp2")
    assert (found["ACCELERATE_USE_FSDP"], found["FSDP_VERSION"]) == ("true", "2")
    # Towers run as often as a process has chunks of frames: a wrapped one would wait for the others forever.
    wrapped = found["FSDP_TRANSFORMER_CLS_TO_WRAP"].split(",")
    for kind in KINDS.keys() - {"crossvllm"}:
        model = make_model(kind)
        assert {type(x).__name__ for x in model.modules()} & set(wrapped)
        inside = [x for x, module in model.named_modules() if type(module).__name__ in wrapped]
        assert all(".language_model.layers." in x for x in inside)
    # Another decoder, whose layer has to be named in the file.
    assert "LlamaDecoderLayer" in {type(x).__name__ for x in make_model("crossvllm").modules()}
    with pytest.raises(FileNotFoundError, match=r"No accelerate settings 'fsdp'; there are \['ddp', 'fsdp2'"):
        accelerate_config("fsdp")


@pytest.mark.parametrize("kind", ["cp", "sp"])
def test_split_sequences_are_refused(kind):
    sizes = {"cp_size": 1, "sp_size": 1, f"{kind}_size": 2}
    with pytest.raises(ValueError, match=r"(context|sequence) parallelism over 2 processes cuts token ids"):
        check_parallelism(SimpleNamespace(parallelism_config=SimpleNamespace(**sizes)))
    check_parallelism(SimpleNamespace(parallelism_config=None))
    check_parallelism(SimpleNamespace())


def test_folded_coordinates_are_refused_in_shards():
    sharding = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=SimpleNamespace()))
    model = make_model("llava_st")
    with pytest.raises(ValueError, match=r"FSDP keeps the head in pieces .*model.unfold_coordinates\(\)"):
        check_parallelism(sharding, model.config)
    check_parallelism(sharding, model.unfold_coordinates().config)
    check_parallelism(sharding, make_model("longvu").config)
    check_parallelism(SimpleNamespace(state=SimpleNamespace()), make_model("llava_st").config)


def test_folders_without_shards_are_refused(tmp_path):
    model = make_model("longvu")
    model.save_pretrained(tmp_path / "full")
    with pytest.raises(FileNotFoundError, match=r"holds no sharded weights .*load with from_pretrained"):
        consolidate_checkpoint(tmp_path / "full", tmp_path / "out", model=model)


def test_shards_of_one_process_load(tmp_path):
    """What two processes write is read in the same way: by names, whatever the number of pieces."""
    from torch.distributed.checkpoint import FileSystemWriter, save

    model = make_model("longvu", seed=1)
    shards = tmp_path / "checkpoint-3" / "pytorch_model_fsdp_0"
    save({"model": model.state_dict()}, storage_writer=FileSystemWriter(str(shards)), no_dist=True)
    (tmp_path / "checkpoint-3" / "trainer_state.json").write_text("{}")
    consolidate_checkpoint(tmp_path / "checkpoint-3", tmp_path / "whole", model=make_model("longvu", seed=2))
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "whole")
    for (name, value), other in zip(model.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert torch.equal(value, other), name
    assert not (tmp_path / "whole" / "trainer_state.json").exists()
    shutil.rmtree(shards)
