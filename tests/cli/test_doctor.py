"""`longvideo doctor`: real findings on this machine, and made-up faults that it must see."""

import argparse
import importlib.metadata
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from longvideo.cli import doctor

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def report() -> dict:
    """The report of this machine."""
    return doctor.examine()


def _status(report: dict) -> dict[str, str]:
    return {check["name"]: check["status"] for check in report["checks"]}


def test_this_machine_is_ready(report: dict) -> None:
    wrong = [check for check in report["checks"] if check["needed"] and check["status"] != "ok"]
    assert wrong == []
    assert report["ok"] is True
    needed = {check["name"] for check in report["checks"] if check["needed"]}
    assert {"python", "torch", "transformers", "av", "numpy", "decoding", "torch/torchvision pair"} <= needed


def test_it_names_what_will_be_used(report: dict) -> None:
    assert report["decoder"]["used"] in ("pyav", "torchcodec")
    assert (report["decoder"]["used"] == "torchcodec") == (_status(report)["torchcodec"] == "ok")
    assert report["attention"]["used"] == "sdpa"
    assert report["device"]["used"] in ("cpu", "cuda")


def test_versions_come_from_the_declared_ranges() -> None:
    wanted = doctor.read_requirements()
    assert "transformers>=5.17,<6" in wanted.needed
    assert wanted.python == ">=3.11,<3.14"
    assert set(wanted.extras) == {"train", "liger", "flash", "captions"}


def test_installed_metadata_gives_the_same_ranges_as_the_checkout() -> None:
    lines = ["torch>=2.6", "transformers<6,>=5.17", 'peft>=0.19; extra == "train"', 'ruff>=0.9; extra == "dev"']
    found = doctor._from_metadata(">=3.11,<3.14", lines)
    assert found.needed == ("torch>=2.6", "transformers<6,>=5.17")
    assert found.extras == {"train": ("peft>=0.19",), "liger": (), "flash": (), "captions": ()}


@pytest.mark.parametrize("line", ["huggingface-hub>=1.0", "huggingface_hub>=1.0"])
def test_a_package_is_imported_however_the_builder_wrote_its_name(line: str) -> None:
    (requirement,) = doctor._from_metadata(">=3.11", [line]).needed
    check = doctor.check_package(requirement, needed=True, fix="x", load=True)
    assert check.status == "ok", check.detail


def test_a_missing_package_says_what_it_is_for_however_its_name_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(doctor.PURPOSE, "no_such_package_here", "nothing at all")
    for name in ("no-such-package-here", "no_such_package_here"):
        check = doctor.check_package(f"{name}>=1", needed=False, fix="x", load=False)
        assert check.detail == "not installed; for nothing at all"


def test_a_missing_package_names_the_command_that_brings_it() -> None:
    check = doctor.check_package("no-such-package-here>=1", needed=False, fix='pip install ".[train]"', load=False)
    assert (check.status, check.fix) == ("missing", 'pip install ".[train]"')


def test_a_version_out_of_range_is_broken() -> None:
    check = doctor.check_package("numpy>=1000", needed=True, fix="x", load=False)
    assert check.status == "broken"
    assert importlib.metadata.version("numpy") in check.detail and ">=1000" in check.detail


def test_python_out_of_range_is_broken() -> None:
    assert doctor.check_python(">=3.90").status == "broken"
    assert doctor.check_python(">=3.11").status == "ok"


def test_a_package_that_does_not_import_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise OSError("libsomething.so.3: cannot open shared object file\nsecond line")

    monkeypatch.setattr(doctor.importlib, "import_module", fail)
    check = doctor.check_package("numpy>=1", needed=True, fix="x", load=True)
    assert check.status == "broken"
    assert "libsomething.so.3" in check.detail and "second line" not in check.detail


@pytest.fixture
def mismatched_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a torch and a torchvision of different releases do on the first compiled operator."""

    def fail() -> str:
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(doctor, "run_nms", fail)


@pytest.mark.usefixtures("mismatched_pair")
def test_a_mismatched_pair_makes_the_exit_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.run(argparse.Namespace(json=False)) == 1
    printed = capsys.readouterr().out
    assert "nms does not exist" in printed and "constraints.txt" in printed
    assert printed.rstrip().endswith("not ready: torch/torchvision pair")


def _raise(error: Exception) -> Callable[[], str]:
    def action() -> str:
        raise error

    return action


def test_something_optional_that_is_broken_keeps_the_exit_code_0(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "run_tiny_checkpoint", _raise(FileNotFoundError("no weights")))
    assert doctor.run(argparse.Namespace(json=True)) == 0
    assert _status(json.loads(capsys.readouterr().out))["tiny checkpoint"] == "broken"


def test_the_text_has_a_line_for_every_check(report: dict) -> None:
    text = doctor.render(report)
    for check in report["checks"]:
        assert check["name"] in text
    assert text.splitlines()[-1] == "ready"


def test_the_command_line_prints_json() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "longvideo", "doctor", "--json"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout)["ok"] is True
