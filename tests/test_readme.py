"""Every code block of README.md is extracted and run: offline, in order, in one scratch folder, on the tiny checkpoint.

A python block runs as a program of its own. A `# prints: ...` comment in it is compared with what was really printed.
A bash block runs line by line through `HANDLERS`; a line that no handler knows fails the test.
"""

import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

import longvideo

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# Named in the conversion section as a folder that the reader has; here it is the tiny checkpoint in the original layout.
ORIGINAL = "VideoChat-Flash-Qwen2-7B_res448"
NOT_CODE = {"bibtex"}


def _blocks() -> list[tuple[int, str, str]]:
    """(line, language, text) of every fenced block."""
    return [(README[: found.start()].count("\n") + 1, found[1], found[2]) for found in BLOCK.finditer(README)]


def _execute(arguments: list[str], folder: Path) -> str:
    """Runs a program of the running interpreter in `folder` with the checkout importable, and returns what it prints."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=400
    )
    shown = " ".join(arguments)[:300]
    assert done.returncode == 0, f"{shown}\nexit code {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def run_pip(words: list[str], folder: Path) -> None:
    """`pip install .[extra]`: tests/test_packaging.py installs the package; here the extras must exist."""
    assert words[:2] == ["pip", "install"]
    (target,) = words[2:]
    found = re.fullmatch(r"\.(?:\[([\w,]+)\])?", target)
    assert found, f"{target} is not the checkout"
    for extra in (found[1] or "").split(","):
        assert extra == "" or PROJECT["optional-dependencies"][extra]


def run_longvideo(words: list[str], folder: Path) -> None:
    """The command itself; its entry point must be the one that pyproject.toml declares."""
    assert PROJECT["scripts"]["longvideo"] == "longvideo.cli:main"
    assert _execute(["-m", "longvideo", *words[1:]], folder).strip()


def run_python(words: list[str], folder: Path) -> None:
    """`python -m longvideo...`."""
    assert words[1] == "-m" and words[2].startswith("longvideo")
    _execute(words[1:], folder)


HANDLERS: dict[str, Callable[[list[str], Path], None]] = {
    "pip": run_pip,
    "longvideo": run_longvideo,
    "python": run_python,
}


def _run_bash(text: str, folder: Path) -> None:
    for line in text.splitlines():
        words = shlex.split(line, comments=True)
        if words:
            assert words[0] in HANDLERS, f"no handler runs `{line}`"
            HANDLERS[words[0]](words, folder)


def _run_python(text: str, folder: Path) -> None:
    printed = _execute(["-c", text], folder).strip().splitlines()
    promised = re.findall(r"^# prints: (.*)$", text, re.MULTILINE)
    if promised:
        assert printed[-len(promised) :] == promised, "the comment in the README is not what is printed"


@pytest.fixture(scope="module")
def reader_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a reader has: the clip that `make demo` renders, and an original checkpoint."""
    folder = tmp_path_factory.mktemp("reader")
    recipe = subprocess.run(["make", "-n", "demo", "SYSTEM=1"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "-m longvideo.evaluation.demo" in recipe.stdout
    _execute(["-m", "longvideo.evaluation.demo"], folder)
    tiny = longvideo.tiny_checkpoint("videochat_flash")
    _execute(["-m", "longvideo", "convert", tiny, ORIGINAL, "--reverse"], folder)
    return folder


def test_every_code_block_runs(reader_folder: Path) -> None:
    """One test, because later blocks use what earlier ones wrote."""
    languages = []
    for line, language, text in _blocks():
        languages.append(language)
        try:
            if language == "python":
                _run_python(text, reader_folder)
            elif language == "bash":
                _run_bash(text, reader_folder)
            else:
                assert language in NOT_CODE, f"a block in `{language}` is not run by anything"
        except AssertionError as error:
            raise AssertionError(f"README.md, block at line {line}: {error}") from error
    assert languages.count("python") >= 3 and languages.count("bash") >= 3


def test_first_screen_keeps_its_promises() -> None:
    """Install by line 20, code by line 30, asking in at most 12 lines, the table of models by line 60."""
    lines = README.splitlines()
    blocks = _blocks()
    assert blocks[0][1] == "bash" and "pip install" in blocks[0][2] and blocks[0][0] <= 20
    first_python = next(block for block in blocks if block[1] == "python")
    assert first_python[0] <= 30
    for _, _, text in [block for block in blocks if block[1] == "python"][:2]:
        assert len([line for line in text.splitlines() if line.strip()]) <= 14
    assert len([line for line in first_python[2].splitlines() if line and not line.startswith("#")]) <= 12
    assert next(number for number, line in enumerate(lines, 1) if line.startswith("| architecture |")) <= 60


def test_the_line_of_versions_is_that_of_pyproject() -> None:
    assert f"Version {longvideo.__version__} |" in README
    assert PROJECT["requires-python"] == ">=3.11,<3.14" and "Python 3.11 to 3.13" in README
    assert "transformers>=5.17,<6" in PROJECT["dependencies"] and "transformers 5.17 and later 5.x" in README


def test_the_table_of_models_follows_the_registry() -> None:
    from longvideo._registration import ARCHITECTURES

    table = README[README.index("| architecture |") :].split("\n\n")[0].splitlines()[2:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    assert len(rows) == 5
    for cells in rows:
        name = cells[0].lower().replace("-", "_")
        there = name in ARCHITECTURES
        assert (cells[-1] != "not yet") == there, f"{cells[0]}: the last column and the registry disagree"
        assert ("not yet" not in " ".join(cells)) == there
        if there:
            assert f"(modeling/{name})" in cells[-1]


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "modeling/README.md", "conversion/README.md"])
def test_links_inside_the_repository_lead_somewhere(name: str) -> None:
    path = ROOT / name
    text = path.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    assert links or name == "conversion/README.md"
    for link in links:
        file, _, anchor = link.partition("#")
        target = path.parent / file if file else path
        assert target.exists(), f"{name}: {link}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in anchors, f"{name}: {link} names no heading"


def test_every_make_target_that_is_named_exists() -> None:
    for name in ("README.md", "CONTRIBUTING.md"):
        for target in re.findall(r"`make ([a-z-]+)", (ROOT / name).read_text(encoding="utf-8")):
            done = subprocess.run(["make", "-n", target, "SYSTEM=1"], cwd=ROOT, capture_output=True, text=True)
            assert done.returncode == 0, f"{name}: make {target}: {done.stderr}"


def test_the_cache_column_is_the_arithmetic_of_the_published_model() -> None:
    """28 layers, 4 key-value heads of 128, 2 bytes; dropout leaves 3/4 after 4 and 1/4 after 18 layers."""
    table = README[README.index("<!-- memory:begin -->") : README.index("<!-- memory:end -->")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if "GB" in line]
    assert len(rows) >= 4
    per_layer = 2 * 4 * 128 * 2  # bytes of keys and values of one token
    for frames, visual, kept, cache, dropped, _ in rows:
        tokens = int(frames.replace(",", "")) * 16
        first, second = int(tokens * 0.75), int(tokens * 0.25)
        assert visual == f"{tokens:,}"
        assert kept == f"{first:,} / {second:,}"
        # Two decimals of a GB are printed; half a unit of the last one is 0.005.
        assert float(cache.removesuffix(" GB")) == pytest.approx(tokens * 28 * per_layer / 1e9, abs=0.0051)
        expected = (tokens * 4 + first * 14 + second * 10) * per_layer / 1e9
        assert float(dropped.removesuffix(" GB")) == pytest.approx(expected, abs=0.0051)
