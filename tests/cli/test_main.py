"""The program `longvideo`: command list, lazy import, exit codes and one-line errors."""

import subprocess
import sys
import types
from pathlib import Path

import pytest

from longvideo import cli

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def fake_command(monkeypatch):
    """Put a command `ask` in place whose `run` raises what the test asks for."""
    module = types.ModuleType("longvideo.cli.ask")
    module.HELP = "fake"
    module.configure = lambda parser: parser.add_argument("--number", type=int)
    module.error = None

    def run(args):
        if module.error is not None:
            raise module.error
        return args.number

    module.run = run
    monkeypatch.setitem(sys.modules, "longvideo.cli.ask", module)
    return module


def test_help_lists_every_command_and_imports_none(capsys):
    before = {name for name in sys.modules if name.startswith("longvideo.cli.")}
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in ("ask", "convert", "estimate", "doctor", "card", "export-shim"))
    assert {name for name in sys.modules if name.startswith("longvideo.cli.")} == before


def test_every_command_has_help():
    for name in cli.COMMANDS:
        with pytest.raises(SystemExit) as stop:
            cli.build_parser(name).parse_args([name, "--help"])
        assert stop.value.code == 0, name


def test_no_command_prints_help_and_fails(capsys):
    assert cli.main([]) == 2
    assert "commands" in capsys.readouterr().err


def test_unknown_command_and_argument(capsys, fake_command):
    assert cli.main(["aks"]) == 2
    assert "invalid choice" in capsys.readouterr().err
    assert cli.main(["ask", "--number", "many"]) == 2
    assert "invalid int value" in capsys.readouterr().err


def test_exit_code_of_the_command(fake_command):
    assert cli.main(["ask", "--number", "0"]) == 0
    assert cli.main(["ask", "--number", "1"]) == 1
    assert cli.main(["ask"]) == 0, "run may return None"


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (ValueError("64 frames were\n given, 8 fit"), 2, "longvideo ask: error: 64 frames were given, 8 fit\n"),
        (FileNotFoundError("No such video file: 'a.mp4'"), 2, "longvideo ask: error: No such video file: 'a.mp4'\n"),
        (OSError(28, "No space left on device", "out"), 2, "longvideo ask: error: No space left on device: 'out'\n"),
        (ImportError("install peft"), 2, "longvideo ask: error: install peft\n"),
        (ValueError(), 2, "longvideo ask: error: ValueError\n"),
        (KeyboardInterrupt(), 130, "longvideo ask: interrupted\n"),
    ],
)
def test_errors_are_one_line(fake_command, capsys, error, code, text):
    fake_command.error = error
    assert cli.main(["ask"]) == code
    assert capsys.readouterr().err == text


def test_fault_of_the_package_is_told_apart_and_points_to_debug(fake_command, capsys):
    fake_command.error = KeyError("x")
    assert cli.main(["ask"]) == 1
    text = capsys.readouterr().err
    assert "unexpected KeyError" in text and "--debug" in text and "Traceback" not in text


def test_out_of_memory_names_a_remedy(fake_command, capsys):
    class OutOfMemoryError(RuntimeError):
        pass

    fake_command.error = OutOfMemoryError("CUDA out of memory")
    assert cli.main(["ask"]) == 2
    assert "fewer frames" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["ask", "--debug"], ["--debug", "ask"]])
def test_debug_shows_the_traceback(fake_command, capsys, argv):
    fake_command.error = ValueError("bad")
    assert cli.main(argv) == 2
    text = capsys.readouterr().err
    assert "Traceback" in text and text.endswith("longvideo ask: error: bad\n")


def test_version_and_module_run():
    done = subprocess.run(
        [sys.executable, "-m", "longvideo", "--version"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("longvideo 0.") and "transformers 5." in done.stdout
