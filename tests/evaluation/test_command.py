"""The wrapper of all commands."""

import pytest

from longvideo.evaluation.command import run_command


def test_the_exit_code_of_the_work_is_returned(capsys):
    assert run_command("count", lambda: 1) == 1
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("kind", [ValueError, FileNotFoundError, ModuleNotFoundError])
def test_a_fault_of_the_input_is_one_line(kind, capsys):
    def work() -> int:
        raise kind("--num is 0,\n    expected at least 1")

    assert run_command("count", work) == 2
    assert capsys.readouterr().err == "count: error: --num is 0, expected at least 1\n"


def test_a_fault_of_the_program_is_not_hidden():
    def work() -> int:
        raise KeyError("frames")

    with pytest.raises(KeyError):
        run_command("count", work)
