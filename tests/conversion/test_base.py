"""The conversion machinery: key maps, damaged files, faults while writing, memory."""

import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from longvideo.conversion import CONVERSIONS, KeyMap, architecture, convert_checkpoint, reverse_checkpoint
from longvideo.conversion.architecture import find_conversion, register_conversion
from longvideo.conversion.checkpoint_io import (
    DTYPE_CODES,
    Checkpoint,
    TensorInfo,
    alignment_order,
    split_shards,
    write_safetensors,
)
from tests.originals import assert_same_bits, original_state, read_weights, snapshot, write_original


def test_key_map_renames_both_ways() -> None:
    table = KeyMap({"a.{}.mlp.0.w": "b.{}.one", "a.{}.mlp.2.{}": "b.{}.two.{}", "c": "d", "x.{}.freq": None})
    assert table.rename("a.12.mlp.0.w") == "b.12.one"
    assert table.rename("a.3.mlp.2.4") == "b.3.two.4"
    assert table.rename("c") == "d"
    assert table.rename("x.0.freq") is None
    back = table.inverse()
    assert back.rename("b.12.one") == "a.12.mlp.0.w" and back.rename("d") == "c"
    for unknown in ("a.12.mlp.1.w", "a.x.mlp.0.w", "aa.1.mlp.0.w", "a.1.mlp.0.ww", "cc"):
        with pytest.raises(KeyError):
            table.rename(unknown)
    with pytest.raises(KeyError):
        back.rename("x.0.freq")


def test_key_map_refuses_ambiguity() -> None:
    with pytest.raises(ValueError, match=r"fills \['t'\] twice"):
        KeyMap({"a": "t", "b": "t"})
    with pytest.raises(ValueError, match="equally many"):
        KeyMap({"a.{}": "b"})


def test_architectures_that_share_a_model_type_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other(type(CONVERSIONS["videochat_flash"])):
        name = "other"
        original_model_types = ("llava_qwen_flash",)

        def check_config(self, config: dict[str, Any]) -> None:
            if not config.get("other"):
                raise ValueError("other is not set")

    monkeypatch.setattr(architecture, "CONVERSIONS", dict(CONVERSIONS))
    other = Other()
    register_conversion(other)
    register_conversion(other)
    _, config = original_state()
    assert find_conversion(config) is CONVERSIONS["videochat_flash"]
    assert find_conversion({"model_type": "llava_qwen_flash", "other": True}) is other
    with pytest.raises(ValueError, match=r"(?s)several.*not videochat_flash: .*lacks.*not other: other is not set"):
        find_conversion({"model_type": "llava_qwen_flash"})
    with pytest.raises(ValueError, match="registered already"):
        monkeypatch.setattr(Other, "name", "longvu")
        register_conversion(Other())


def test_a_choice_that_the_architecture_does_not_have_is_refused(tmp_path: Path) -> None:
    write_original(tmp_path / "original")
    with pytest.raises(ValueError, match="--coordinates was given, but videochat_flash has no such choice"):
        convert_checkpoint(tmp_path / "original", tmp_path / "native", options={"coordinates": "split"})


def test_written_files_are_read_by_the_library(tmp_path: Path) -> None:
    state: dict[str, torch.Tensor] = {
        "flags": torch.tensor([True, False, True]),
        "half": torch.randn(3, 5).half(),
        "bytes": torch.arange(7, dtype=torch.uint8),
        "scalar": torch.tensor(2.5),
        "brain": torch.randn(2, 1, 3).bfloat16(),
        "empty": torch.zeros(0, 4),
        "long": torch.tensor([[-1, 2**40]]),
        "wide": torch.randn(3).double(),
    }
    infos = [TensorInfo(name, tuple(t.shape), DTYPE_CODES[t.dtype], "") for name, t in state.items()]
    infos = alignment_order(infos)
    write_safetensors(tmp_path / "model.safetensors", infos, (state[info.name] for info in infos))
    assert_same_bits(load_file(tmp_path / "model.safetensors"), state)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    with Checkpoint(tmp_path) as checkpoint:
        assert_same_bits({name: checkpoint.read(name) for name in checkpoint.infos}, state)


def test_shards_are_split_by_size() -> None:
    infos = [TensorInfo(f"t{i}", (10,), "F32", "") for i in range(5)] + [TensorInfo("big", (100,), "F32", "")]
    shards = split_shards(infos, 100)
    assert next(iter(shards)) == "model-00001-of-00004.safetensors"
    assert [[info.name for info in part] for part in shards.values()] == [["t0", "t1"], ["t2", "t3"], ["t4"], ["big"]]
    assert list(split_shards(infos, 10**6)) == ["model.safetensors"]


def damage_shard(folder: Path) -> None:
    (folder / "model-00002-of-00003.safetensors").unlink()


def damage_shard_without_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").unlink()
    damage_shard(folder)


def damage_to_text(folder: Path) -> None:
    (folder / "model-00002-of-00003.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
    )


def damage_to_empty(folder: Path) -> None:
    (folder / "model-00002-of-00003.safetensors").write_bytes(b"")


def damage_header(folder: Path) -> None:
    (folder / "model-00002-of-00003.safetensors").write_bytes((16).to_bytes(8, "little") + b"{not json at all" * 4)


def damage_length(folder: Path) -> None:
    path = folder / "model-00002-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def damage_index(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.gone.weight"] = "model-00001-of-00003.safetensors"
    path.write_text(json.dumps(index))


def damage_index_path(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"model.norm.weight": "../elsewhere.safetensors"}}))


def damage_twice(folder: Path) -> None:
    part = load_file(folder / "model-00001-of-00003.safetensors")
    other = folder / "model-00002-of-00003.safetensors"
    name = next(iter(part))
    save_file({**load_file(other), name: part[name]}, other)


def damage_no_weights(folder: Path) -> None:
    for path in folder.glob("model*"):
        path.unlink()


def damage_adapter(folder: Path) -> None:
    damage_no_weights(folder)
    (folder / "adapter_config.json").write_text("{}")


def damage_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def damage_no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (damage_shard, FileNotFoundError, r"1 of 3 weight files are missing: model-00002-of-00003\.safetensors"),
        (damage_shard_without_index, FileNotFoundError, r"1 of 3 weight files are missing: model-00002"),
        (damage_to_text, ValueError, r"model-00002-of-00003\.safetensors is not a safetensors file.*Git LFS"),
        (damage_to_empty, ValueError, r"is not a safetensors file \(0 bytes"),
        (damage_header, ValueError, r"is not a safetensors file: its header is not readable"),
        (damage_length, ValueError, r"is cut short: .* Fetch the file again"),
        (
            damage_index,
            ValueError,
            r"the index names 1 tensors that are not in the files it gives: model\.gone\.weight",
        ),
        (damage_index_path, ValueError, r"the index names '\.\./elsewhere\.safetensors'; expected file names inside"),
        (damage_twice, ValueError, r"is stored in both model-00001-of-00003\.safetensors and model-00002"),
        (damage_no_weights, FileNotFoundError, r"has no weights: expected model\.safetensors, pytorch_model\.bin or"),
        (damage_adapter, FileNotFoundError, r"holds a LoRA adapter.*merge_and_unload"),
        (damage_config, ValueError, r"config\.json is not readable JSON"),
        (damage_no_config, FileNotFoundError, r"has no config\.json; expected a checkpoint folder"),
    ],
    ids=lambda value: value.__name__ if callable(value) and hasattr(value, "__code__") else "",
)
def test_damaged_sources_are_named(damage: Any, error: type[Exception], message: str, tmp_path: Path) -> None:
    write_original(tmp_path / "original", num_shards=3)
    damage(tmp_path / "original")
    with pytest.raises(error, match=message):
        convert_checkpoint(tmp_path / "original", tmp_path / "native")
    assert [path.name for path in tmp_path.iterdir()] == ["original"]


class RunsCode:
    """Something whose unpickling would run a command."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_pickled_code_is_refused_and_not_run(tmp_path: Path) -> None:
    write_original(tmp_path / "original", kind="bin")
    path = tmp_path / "original" / "pytorch_model.bin"
    torch.save({**torch.load(path), "x": RunsCode(tmp_path / "ran")}, path)
    with pytest.raises(ValueError, match=r"pytorch_model\.bin holds more than tensors .* was not loaded"):
        convert_checkpoint(tmp_path / "original", tmp_path / "native")
    path.write_bytes(pickle.dumps(RunsCode(tmp_path / "ran")))
    with pytest.raises(ValueError, match=r"pytorch_model\.bin"):
        convert_checkpoint(tmp_path / "original", tmp_path / "native")
    assert [path.name for path in tmp_path.iterdir()] == ["original"]


def test_bin_files_that_are_no_state_dict(tmp_path: Path) -> None:
    write_original(tmp_path / "original", kind="bin")
    path = tmp_path / "original" / "pytorch_model.bin"
    state = torch.load(path)
    torch.save({"model": state, "step": 3}, path)
    with pytest.raises(ValueError, match="is not a state dict"):
        convert_checkpoint(tmp_path / "original", tmp_path / "native")
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin (is not a readable torch file|holds more than tensors)"):
        convert_checkpoint(tmp_path / "original", tmp_path / "native")
    torch.save(state, path, _use_new_zipfile_serialization=False)  # the format before torch 1.6 cannot be mapped
    convert_checkpoint(tmp_path / "original", tmp_path / "native")
    reverse_checkpoint(tmp_path / "native", tmp_path / "back")
    assert_same_bits(read_weights(tmp_path / "back"), state)


def test_folders_are_checked_first(tmp_path: Path) -> None:
    original = tmp_path / "original"
    write_original(original)
    cases: list[tuple[Path, Path, type[Exception], str]] = [
        (tmp_path / "none", tmp_path / "x", FileNotFoundError, r"none does not exist.*hf download"),
        (original / "config.json", tmp_path / "x", ValueError, "is a file; give the folder"),
        (original, original, ValueError, "inside the source"),
        (original, original / "deep" / "er", ValueError, "inside the source"),
        (original, tmp_path, ValueError, "contains the source"),
        (original, tmp_path / "no" / "x", FileNotFoundError, "in which to create x, does not exist"),
    ]
    for source, destination, error, message in cases:
        with pytest.raises(error, match=message):
            convert_checkpoint(source, destination, overwrite=True)
    (tmp_path / "taken").write_text("")
    with pytest.raises(FileExistsError, match="is a file; give a folder"):
        convert_checkpoint(original, tmp_path / "taken")
    with pytest.raises(ValueError, match="dtype 'int8' is unknown; expected keep, bf16, fp16, fp32"):
        convert_checkpoint(original, tmp_path / "x", dtype="int8")
    with pytest.raises(ValueError, match=r"--reverse needs a folder in the Transformers layout"):
        reverse_checkpoint(original, tmp_path / "x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["original", "taken"]


def test_a_link_into_the_source_is_seen(tmp_path: Path) -> None:
    write_original(tmp_path / "original")
    (tmp_path / "original" / "sub").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "original" / "sub", target_is_directory=True)
    with pytest.raises(ValueError, match="inside the source"):
        convert_checkpoint(tmp_path / "original", tmp_path / "link" / "native")


def test_existing_destination(tmp_path: Path) -> None:
    write_original(tmp_path / "original")
    native = tmp_path / "native"
    native.mkdir()
    convert_checkpoint(tmp_path / "original", native)  # an empty folder is fine
    before = snapshot(native)
    with pytest.raises(FileExistsError, match=r"not empty; choose another folder, or pass --overwrite"):
        convert_checkpoint(tmp_path / "original", native)
    assert snapshot(native) == before
    (native / "old.txt").write_text("from before")
    convert_checkpoint(tmp_path / "original", native, overwrite=True)
    assert snapshot(native).keys() == before.keys()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["native", "original"]


def run_python(code: str, *args: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter that imports this checkout."""
    root = Path(__file__).resolve().parents[2]
    env = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *args], capture_output=True, text=True, env=env, timeout=300
    )


# Forks one child per fault, because starting an interpreter with torch takes seconds.
FAULTS = """
    import json, os, resource, signal, sys
    import longvideo.modeling.videochat_flash.modeling_videochat_flash
    from longvideo.cli import main
    from longvideo.conversion import base

    def die_while_writing():
        checked, count = base.checked_tensor, 0
        def dying(*args):
            nonlocal count
            count += 1
            if count == 40:
                os.kill(os.getpid(), signal.SIGKILL)
            return checked(*args)
        base.checked_tensor = dying

    def limit_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    statuses = {}
    for name, fault in (("fresh", die_while_writing), ("killed", die_while_writing), ("full", limit_files)):
        child = os.fork()
        if child == 0:
            fault()
            folder = f"{sys.argv[1]}/{name}"
            words = ["convert", f"{folder}/original", f"{folder}/native", "--overwrite", "--max-shard-gb", "0.0002"]
            os._exit(main([*words, "--quiet", "--no-card"]))
        statuses[name] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(json.dumps(statuses))
"""


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, int], str]:
    """Conversions that die or cannot write: the folder with a folder for each, exit codes, stderr."""
    pytest.importorskip("resource", reason="limits on file sizes and fork need a Unix system")
    root = tmp_path_factory.mktemp("faults")
    for name in ("fresh", "killed", "full"):
        write_original(root / name / "original")
        if name != "fresh":
            (root / name / "native").mkdir()
            (root / name / "native" / "precious.txt").write_text("kept")
    result = run_python(FAULTS, str(root))
    assert result.returncode == 0, result.stderr
    return root, json.loads(result.stdout.splitlines()[-1]), result.stderr


@pytest.mark.parametrize("name", ["fresh", "killed"])
def test_kill_while_writing_leaves_the_destination_untouched(
    name: str, faults: tuple[Path, dict[str, int], str]
) -> None:
    root, statuses, stderr = faults
    folder, native = root / name, root / name / "native"
    assert statuses[name] == -signal.SIGKILL, stderr
    left = list(folder.glob(".native.partial-*"))
    assert len(left) == 1 and list(left[0].glob("model-*.safetensors"))
    if name == "fresh":
        assert not native.exists()
    else:
        assert snapshot(native) == {"precious.txt": b"kept"}
    convert_checkpoint(folder / "original", native, overwrite=True)  # the next attempt also removes what is left
    assert sorted(path.name for path in folder.iterdir()) == ["native", "original"]


def test_a_write_that_fails_leaves_the_destination_untouched(faults: tuple[Path, dict[str, int], str]) -> None:
    root, statuses, stderr = faults
    assert statuses["full"] == 2
    assert re.search(r"longvideo convert: error: .*no space left while writing beside .*untouched", stderr)
    assert snapshot(root / "full" / "native") == {"precious.txt": b"kept"}
    assert sorted(path.name for path in (root / "full").iterdir()) == ["native", "original"]


def test_space_is_checked_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_original(tmp_path / "original")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(OSError, match=r"the output needs 0\.00 GB and .* has 0\.00 GB free; free some space"):
        convert_checkpoint(tmp_path / "original", tmp_path / "native")
    assert [path.name for path in tmp_path.iterdir()] == ["original"]


MEMORY = """
    import sys
    from pathlib import Path
    from longvideo.conversion import convert_checkpoint

    def status(field):
        return int(Path("/proc/self/status").read_text().split(field + ":")[1].split()[0]) / 1024

    root = Path(sys.argv[1])
    convert_checkpoint(root / "small", root / "warm")
    for name, dtype in (("sharded", "keep"), ("single", "bf16")):
        before = status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        convert_checkpoint(root / name, root / f"{name}_native", dtype=dtype, max_shard_bytes=50_000_000)
        print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak is read from Linux's /proc")
def test_peak_memory_is_a_few_tensors(tmp_path: Path) -> None:
    text = {"hidden_size": 512, "intermediate_size": 4096, "vocab_size": 16384}
    state, config = original_state(text_kwargs=text, num_hidden_layers=8)
    size = sum(tensor.nbytes for tensor in state.values()) / 2**20
    assert size > 280
    write_original(tmp_path / "small")
    write_original(tmp_path / "sharded", state=state, config=config, num_shards=6)
    write_original(tmp_path / "single", state=state, config=config)
    result = run_python(MEMORY, str(tmp_path))
    assert result.returncode == 0, result.stderr
    peaks = [float(line) for line in result.stdout.split()]
    # An output shard is at most 48 MB and the largest tensor 32 MB; 48 to 60 MB were seen.
    assert len(peaks) == 2 and max(peaks) < 80, f"peaks of {peaks} MB over the baseline for {size:.0f} MB of weights"
    shutil.rmtree(tmp_path)  # pytest would keep the large files
