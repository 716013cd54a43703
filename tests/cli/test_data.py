"""`longvideo data check` and `longvideo data convert`: what is printed, exit codes, and files."""

import json
from pathlib import Path

import pytest
from PIL import Image

from longvideo import cli
from longvideo.cli import data
from longvideo.trainers.data import FORMATS
from tests.trainers.data_rows import SPOKEN, TURNS
from tests.videos import make_video

GOOD = {"id": "1", "video": "a.mp4", "conversations": SPOKEN}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a film of two seconds, one that is cut short, and a picture."""
    make_video(tmp_path / "a.mp4", num_frames=16, fps=8)
    (tmp_path / "broken.mp4").write_bytes((tmp_path / "a.mp4").read_bytes()[:300])
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    return tmp_path


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]", encoding="utf-8")
    return str(path)


def test_the_formats_of_the_command_are_those_of_the_package() -> None:
    assert tuple(FORMATS) == data.FORMATS


def test_a_clean_file(folder: Path, capsys: pytest.CaptureFixture) -> None:
    path = write(folder / "rows.json", [GOOD, {**GOOD, "video": "https://example.org/a.mp4"}])
    assert cli.main(["data", "check", path, "--media", "decodes"]) == 0
    shown = capsys.readouterr().out
    assert shown.splitlines() == [
        f"{path}: llava",
        "  2 rows with one answer",
        "  2 videos",
        "  1 media on the network, not checked",
        "2 rows in, 2 rows out, 0 with problems",
    ]


@pytest.mark.parametrize(("media", "lines"), [("none", [7]), ("exists", [3, 7]), ("decodes", [3, 4, 5, 6, 7])])
def test_problems_are_named_and_the_exit_code_is_1(
    folder: Path, capsys: pytest.CaptureFixture, media: str, lines: list[int]
) -> None:
    spoken = {"conversations": SPOKEN}
    picture = {"image": "broken.mp4", "conversations": [{"from": "human", "value": "<image>\nWhat?"}, SPOKEN[1]]}
    rows = [GOOD, {**GOOD, "video": "none.mp4"}, {**GOOD, "video": "broken.mp4"}, {**GOOD, "start": 5, "end": 6}]
    path = write(folder / "rows.json", [*rows, picture, spoken])
    assert cli.main(["data", "check", path, "--media", media]) == 1
    shown = capsys.readouterr().out
    named = [line for line in shown.splitlines() if line.startswith(f"  {path}:")]
    assert [int(line.removeprefix(f"  {path}:").split(":")[0]) for line in named] == lines
    assert f"6 rows in, {6 - len(lines)} rows out, {len(lines)} with problems" in shown
    assert cli.main(["data", "check", path, "--media", media, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert [problem["line"] for problem in found["problems"]] == lines
    assert (found["rows_in"], found["rows_out"]) == (6, 6 - len(lines))


def test_only_so_many_problems_are_named(folder: Path, capsys: pytest.CaptureFixture) -> None:
    path = write(folder / "rows.json", [GOOD] + [{**GOOD, "video": "none.mp4"}] * 9)
    assert cli.main(["data", "check", path, "--most", "4"]) == 1
    shown = capsys.readouterr().out
    assert shown.count("none.mp4") == 4 and shown.endswith("  and 5 more\n")


def test_convert_reports_counts_and_what_is_left_out(folder: Path, capsys: pytest.CaptureFixture) -> None:
    path = write(folder / "rows.json", [GOOD, {**GOOD, "start": 1, "end": 2}, {**GOOD, "source": "web"}])
    target = folder / "rows.jsonl"
    assert cli.main(["data", "convert", path, str(target), "--to", "ms_swift"]) == 1
    shown = capsys.readouterr().out.splitlines()
    assert shown[:2] == [f"{target}: ms_swift, from llava", "3 rows in, 2 rows out, 1 with problems"]
    assert "ms-swift has no place for the cut {'start': 1.0, 'end': 2.0}" in shown[2]
    assert shown[3] == "  left out: column 'source' (1 rows)"
    written = [json.loads(line) for line in target.read_text(encoding="utf-8").splitlines()]
    assert written[0] == {"id": "1", "messages": TURNS, "videos": ["a.mp4"]}
    assert cli.main(["data", "convert", str(target), str(folder / "back.json"), "--to", "llava"]) == 0
    assert json.loads((folder / "back.json").read_text(encoding="utf-8"))[0] == GOOD


def test_the_format_to_write_is_that_of_what_is_there(folder: Path, capsys: pytest.CaptureFixture) -> None:
    path = write(folder / "rows.json", [GOOD])
    target = folder / "b.jsonl"
    assert cli.main(["data", "convert", path, str(target)]) == 2
    assert "it does not exist yet); name it with --to" in capsys.readouterr().err and not target.exists()
    pair = {"messages": TURNS, "videos": ["a.mp4"], "rejected_response": "No."}
    for rows, told in (([{"messages": TURNS}], "ms_swift, trl"), ([{"a": 1}], "rows of none")):
        target.write_text(json.dumps(rows[0]) + "\n")
        assert cli.main(["data", "convert", path, str(target)]) == 2
        assert told in capsys.readouterr().err
    target.write_text(json.dumps(pair) + "\n")
    assert cli.main(["data", "convert", path, str(target)]) == 0
    assert f"{target}: ms_swift, from llava" in capsys.readouterr().out


def test_what_stops_the_command(folder: Path, capsys: pytest.CaptureFixture) -> None:
    path = write(folder / "rows.json", [GOOD, {**GOOD, "start": 1}])
    target = str(folder / "b.jsonl")
    for words, reason in (
        (["check", str(folder / "none.json")], "No such data file"),
        (["check", write(folder / "odd.json", [{"a": 1}])], "is of no known format"),
        (["convert", path, target, "--to", "sharegpt", "--on-error", "raise"], "rows.json:3: it cannot be written"),
        (["convert", path, str(folder / "no" / "b.json"), "--to", "trl"], "No such folder"),
    ):
        assert cli.main(["data", *words]) == 2
        assert reason in capsys.readouterr().err
    assert not Path(target).exists()
    assert cli.main(["data", "convert", path, target, "--to", "alpaca"]) == 2
