"""Every code block of README.md is extracted and run: offline, in order, in one scratch folder, on tiny weights.

A python block runs as a program of its own. A `# prints: ...` comment in it is compared with what was really printed.
A bash block runs line by line through `HANDLERS`; a line that no handler knows fails the test.
"""

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import longvideo

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# Named in the conversion section as a folder that the reader has; here the tiny checkpoint in the original layout.
ORIGINAL = "VideoChat-Flash-Qwen2-7B_res448"
NOT_CODE = {"bibtex"}


def _blocks() -> list[tuple[int, str, str]]:
    """(line, language, text) of every fenced block."""
    return [(README[: found.start()].count("\n") + 1, found[1], found[2]) for found in BLOCK.finditer(README)]


# Loads the libraries once and forks for every program, which then starts without the seconds that their import takes.
# longvideo itself is imported by the programs. One job a line: [arguments of python, folder, file for the output].
STARTER = """
import json, os, runpy, sys, traceback
import av, torch, torchvision, transformers.pipelines, transformers.trainer
def program(arguments, folder, printed):
    handle = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle if arguments[0] == "-m" else os.open(printed + ".err", os.O_WRONLY | os.O_CREAT), 2)
    os.chdir(folder)
    kind, what, *rest = arguments
    sys.argv = [what, *rest]
    if kind == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        exec(compile(what, "README.md", "exec"), {"__name__": "__main__"})
for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            program(*job)
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Reader:
    """Types what the README says, in a folder of its own; see `STARTER`."""

    def __init__(self, folder: Path) -> None:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, "-c", STARTER], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def python(self, *arguments: str) -> str:
        """Runs `python` with -c or -m and more arguments; returns what it prints, fails when it fails."""
        printed = self.folder / ".printed"
        printed.with_name(".printed.err").unlink(missing_ok=True)
        self.process.stdin.write(json.dumps([arguments, str(self.folder), str(printed)]) + "\n")
        self.process.stdin.flush()
        code = self.process.stdout.readline().strip()
        errors = printed.with_name(".printed.err")
        shown = printed.read_text(encoding="utf-8")
        faults = errors.read_text(encoding="utf-8")[-3000:] if errors.is_file() else ""
        assert code == "0", f"{' '.join(arguments)[:300]}\nexit code {code}\n{shown[-2000:]}\n{faults}"
        return shown


def run_pip(words: list[str], reader: Reader) -> None:
    """`pip install .[extra]`: tests/test_packaging.py installs the package; here the extras must exist."""
    assert words[:2] == ["pip", "install"]
    (target,) = words[2:]
    found = re.fullmatch(r"\.(?:\[([\w,]+)\])?", target)
    assert found, f"{target} is not the checkout"
    for extra in (found[1] or "").split(","):
        assert extra == "" or PROJECT["optional-dependencies"][extra]


def run_longvideo(words: list[str], reader: Reader) -> None:
    """The command itself; its entry point must be the one that pyproject.toml declares."""
    assert PROJECT["scripts"]["longvideo"] == "longvideo.cli:main"
    assert reader.python("-m", "longvideo", *words[1:]).strip()


def run_python(words: list[str], reader: Reader) -> None:
    """`python -m longvideo...`."""
    assert words[1] == "-m" and words[2].startswith("longvideo")
    reader.python(*words[1:])


HANDLERS: dict[str, Callable[[list[str], Reader], None]] = {
    "pip": run_pip,
    "longvideo": run_longvideo,
    "python": run_python,
}


def _run_bash(text: str, reader: Reader) -> None:
    for line in text.splitlines():
        words = shlex.split(line, comments=True)
        if words:
            assert words[0] in HANDLERS, f"no handler runs `{line}`"
            HANDLERS[words[0]](words, reader)


def _run_python(text: str, reader: Reader) -> None:
    printed = reader.python("-c", text).strip().splitlines()
    promised = re.findall(r"^# prints: (.*)$", text, re.MULTILINE)
    if promised:
        assert printed[-len(promised) :] == promised, "the comment in the README is not what is printed"


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[Reader]:
    """Somebody who has run `make demo`, which renders a clip, and who has an original checkpoint."""
    recipe = subprocess.run(["make", "-n", "demo", "SYSTEM=1"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "-m longvideo.evaluation.demo" in recipe.stdout
    reader = Reader(tmp_path)
    try:
        reader.python("-m", "longvideo.evaluation.demo")
        tiny = longvideo.tiny_checkpoint("videochat_flash")
        reader.python("-m", "longvideo", "convert", tiny, ORIGINAL, "--reverse")
        yield reader
    finally:
        reader.process.kill()
        reader.process.wait()


def test_every_code_block_runs(reader: Reader) -> None:
    """One test, because later blocks use what earlier ones wrote."""
    languages = []
    for line, language, text in _blocks():
        languages.append(language)
        try:
            if language == "python":
                _run_python(text, reader)
            elif language == "bash":
                _run_bash(text, reader)
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


DROPOUT = {"type": "uniform0_attention", "layers": [4, 18], "ratios": [1.0, 0.75, 0.25]}


def memory_table() -> str:
    """The rows of the README's memory table but their last, measured cell, as `longvideo estimate` counts them."""
    from longvideo.cli.estimate import load_config
    from longvideo.evaluation.cost import estimate

    config, _ = load_config("videochat_flash-7b-448")
    rows = []
    for frames in (64, 256, 512, 1024, 10000):
        plain, dropped = (
            estimate(config, frames, num_text=64, visual_dropout=setting, dtype="bf16").to_dict()
            for setting in (False, DROPOUT)
        )
        cache, peak = [], []
        for counts in (plain, dropped):
            cache.append(f"{counts['cache_bytes'] / 1e9:.2f}")
            total = counts["weight_bytes"] + counts["cache_bytes"] + counts["activation_bytes"]["peak"]
            peak.append(f"{total / 1e9:.1f}")
        kept = " / ".join(f"{stage['visual_tokens']:,}" for stage in dropped["stages"])
        cells = [f"{frames:,}", f"{plain['visual_tokens']:,}", kept, " / ".join(cache), " / ".join(peak)]
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def test_the_memory_table_is_what_estimate_counts() -> None:
    table = README[README.index("<!-- memory:begin -->") : README.index("<!-- memory:end -->")]
    rows = [line.rsplit("|", 2)[0] + "|" for line in table.strip().splitlines()[3:]]
    assert "\n".join(rows) == memory_table(), f"renew the rows:\n{memory_table()}"


def test_the_estimate_agrees_with_arithmetic_by_hand() -> None:
    """512 frames: 8192 visual and 64 text tokens, 28 layers, 4 key-value heads of 128, keys and values of 2 bytes."""
    assert f"| {(8192 + 64) * 28 * 2 * 4 * 128 * 2 / 1e9:.2f} / " in memory_table().splitlines()[2]
