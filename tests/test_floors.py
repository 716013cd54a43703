"""Who may import whom, read from the syntax trees; nothing of the package is imported here.

Floors: 0 shared functions < 1 encoders < 2 architectures < 3 conversion, trainers, evaluation < 4 face, cards, tests.
Imports go down or stay in the same folder, and no architecture knows another one. No file and no function is long.
"""

import ast
import graphlib
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("modeling", "processing", "conversion", "trainers", "evaluation", "hub_cards", "longvideo", "tests")

# Longest prefix wins. A module that is not covered by a line fails test_every_file_has_a_floor.
FLOORS = {
    "modeling/layers": 0,
    "processing/shared": 0,
    "trainers/dpo_loss.py": 0,
    "evaluation/metrics.py": 0,
    "modeling/encoders": 1,
    "modeling": 2,
    "processing": 2,
    "conversion": 3,
    "trainers": 3,
    "evaluation": 3,
    "longvideo": 4,
    "hub_cards": 4,
    "tests": 4,
}
# Commands that are run with `python -m` and that use the package as its users do: they may use the face.
COMMANDS = (
    "evaluation/answer_grounding.py",
    "evaluation/answer_questions.py",
    "evaluation/bench.py",
    "evaluation/bench_crossvllm.py",
    "evaluation/bench_naive_crossvllm.py",
    "evaluation/bench_training.py",
    "evaluation/demo.py",
    "evaluation/finetune_gain.py",
    "evaluation/granularity_states.py",
    "evaluation/granularity_table.py",
    "evaluation/needle_table.py",
)
SHARED_BELOW_2 = ("layers", "encoders", "shared")

# Tests lie outside both limits.
MOST_LINES_OF_A_FILE = 500
MOST_LINES_OF_A_FUNCTION = 60  # without docstring and blank lines

# What a floor may import from outside at the top of a module. Everything else is imported where it is used.
BASE = {
    "av", "huggingface_hub", "numpy", "packaging", "PIL", "safetensors", "tokenizers", "torch", "torchvision", "tqdm",
    "transformers",
}  # fmt: skip
ALLOWED_AT_TOP = {
    "modeling/layers": {"torch", "numpy"},
    # Encoded videos are files of tensors.
    "modeling/layers/feature_files.py": {"torch", "safetensors"},
    # A base class for the generation of every architecture.
    "modeling/layers/generation_calls.py": {"torch", "transformers"},
    "trainers/dpo_loss.py": {"torch", "numpy"},
    "evaluation/metrics.py": {"numpy", "torch"},
    "processing/shared": {"torch", "numpy", "av", "PIL", "torchvision", "transformers", "tqdm"},
}
ABSENT_ON_SOME_MACHINES = {
    "accelerate", "cv2", "datasets", "decord", "flash_attn", "jinja2", "liger_kernel", "matplotlib", "peft", "psutil",
    "pycocoevalcap", "torchcodec", "trl", "yaml",
}  # fmt: skip


def _files(*folders: str) -> list[Path]:
    found = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    return [path for path in found if "__pycache__" not in path.parts]


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _longest(table: dict[str, object], name: str) -> str | None:
    fits = [key for key in table if name == key or name.startswith(f"{key}/")]
    return max(fits, key=len) if fits else None


def _module_of(name: str) -> str:
    """Dotted module of a file: modeling/layers/x.py -> longvideo.modeling.layers.x; longvideo/x.py -> longvideo.x."""
    parts = name.removesuffix(".py").split("/")
    if parts[-1] == "__init__":
        parts.pop()
    return ".".join(parts if parts[0] in ("longvideo", "tests") else ["longvideo", *parts])


def _imports(path: Path) -> Iterator[tuple[str, int, bool]]:
    """Yields (dotted target, line, whether it stands at the top of the module) for every import of a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    name = _name(path)
    package = _module_of(name).split(".")
    if path.name != "__init__.py":
        package.pop()
    at_top = {id(node) for node in _top_level(tree.body)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno, id(node) in at_top
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                yield f"{stem}.{alias.name}" if stem else alias.name, node.lineno, id(node) in at_top


def _top_level(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements that run on import: the module body and its if/try blocks, except `if TYPE_CHECKING:`."""
    for node in body:
        yield node
        if isinstance(node, ast.If):
            if "TYPE_CHECKING" not in ast.unparse(node.test):
                yield from _top_level(node.body)
            yield from _top_level(node.orelse)
        elif isinstance(node, ast.With | ast.Try):
            yield from _top_level(node.body)
            for handler in getattr(node, "handlers", []):
                yield from _top_level(handler.body)


def _target_file(target: str) -> str | None:
    """The file or folder of ours that a dotted import names, relative to the root; None for other packages."""
    parts = target.split(".")
    if parts[0] == "longvideo":
        parts = parts[1:] if len(parts) > 1 and parts[1] in FOLDERS else parts
    elif parts[0] != "tests":
        return None
    while parts:
        stem = "/".join(parts)
        if (ROOT / f"{stem}.py").is_file():
            return f"{stem}.py"
        if (ROOT / stem).is_dir():
            return stem
        parts.pop()
    return None


def _floor(name: str) -> int:
    if name in COMMANDS:
        return FLOORS["longvideo"]
    key = _longest(FLOORS, name)
    assert key is not None, f"{name} lies on no floor"
    return FLOORS[key]


def _architecture(name: str) -> str | None:
    parts = name.split("/")
    if parts[0] in ("modeling", "processing") and len(parts) > 2 and parts[1] not in SHARED_BELOW_2:
        return parts[1]
    if parts[0] in ("modeling", "processing") and len(parts) == 2 and (ROOT / name).is_dir():
        return None if parts[1] in SHARED_BELOW_2 else parts[1]
    return None


def violations_of(name: str, imports: list[tuple[str, int, bool]]) -> list[str]:
    """Every broken rule of one file, as lines to read."""
    found = []
    for target, line, at_top in imports:
        where, root = f"{name}:{line}", target.split(".")[0]
        if root in FOLDERS and root not in ("longvideo", "tests"):
            found.append(f"{where} imports `{root}` by its bare name; write longvideo.{root}")
        if at_top and root in ABSENT_ON_SOME_MACHINES and not name.startswith("tests/"):
            found.append(f"{where} imports the optional package {root} at the top; import it where it is used")
        file = _target_file(target)
        if file is None:
            allowed = _longest(ALLOWED_AT_TOP, name)
            known = ALLOWED_AT_TOP[allowed] if allowed else BASE
            if at_top and root not in known | set(sys.stdlib_module_names) and not name.startswith("tests/"):
                found.append(f"{where} imports {root}, which this floor does without")
            continue
        mine, theirs = _floor(name), _floor(file)
        # The loaded package knows its version, which reports and logs of floor 3 record.
        asks_version = target == "longvideo.__version__" and mine == 3 and not at_top
        if theirs > mine and not asks_version:
            found.append(f"{where} imports upwards: floor {mine} -> {file} on floor {theirs}")
        if mine == 0 and theirs == 0 and _longest(FLOORS, file) != _longest(FLOORS, name):
            found.append(f"{where} imports {file}: floor 0 folders do not know each other")
        a, b = _architecture(name), _architecture(file)
        if a and b and a != b:
            found.append(f"{where}: architecture {a} imports architecture {b}")
        if a and b and name.split("/")[0] != file.split("/")[0]:
            found.append(f"{where}: {name.split('/')[0]}/{a} imports {file}; only the registration knows both sides")
    return found


@pytest.mark.parametrize("folder", FOLDERS)
def test_imports_go_down_only(folder: str) -> None:
    found = [line for path in _files(folder) for line in violations_of(_name(path), list(_imports(path)))]
    assert not found, "\n".join(found)


def test_every_file_has_a_floor() -> None:
    files = _files(*FOLDERS)
    assert len(files) > 20, "the walk found too little: is ROOT right?"
    assert [_name(path) for path in files if _longest(FLOORS, _name(path)) is None] == []
    strays = [path.name for path in ROOT.glob("*.py")]
    assert strays == [], f"python files at the root would be top-level modules: {strays}"


@pytest.mark.parametrize(
    ("name", "target", "expected"),
    [
        ("modeling/layers/x.py", "longvideo.modeling.encoders", "upwards"),
        ("modeling/layers/x.py", "transformers", "does without"),
        ("modeling/layers/x.py", "longvideo.processing.shared", "do not know each other"),
        ("modeling/encoders/umt/x.py", "longvideo.modeling.videochat_flash", "upwards"),
        ("modeling/longvu/x.py", "longvideo.modeling.videochat_flash", "architecture longvu imports"),
        ("processing/videochat_flash/x.py", "longvideo.modeling.videochat_flash", "only the registration"),
        ("processing/videochat_flash/x.py", "longvideo.conversion", "upwards"),
        ("conversion/x.py", "longvideo.cli", "upwards"),
        ("trainers/x.py", "peft", "optional package peft"),
        ("longvideo/x.py", "modeling.layers", "bare name"),
        ("modeling/layers/x.py", "longvideo.modeling.layers.token_merging", None),
        ("modeling/videochat_flash/x.py", "longvideo.modeling.encoders.umt", None),
        ("trainers/x.py", "longvideo.modeling.videochat_flash", None),
    ],
)
def test_the_rules_see_what_they_should(name: str, target: str, expected: str | None) -> None:
    found = violations_of(name, [(target, 1, True)])
    assert (found == []) if expected is None else any(expected in line for line in found), found


def test_relative_imports_are_resolved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "modeling" / "longvu" / "modeling_longvu.py"
    file.parent.mkdir(parents=True)
    file.write_text("from . import a\nfrom .b import c\nfrom ..videochat_flash.d import e\n", encoding="utf-8")
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    targets = [target for target, _, _ in _imports(file)]
    stem = "longvideo.modeling"
    assert targets == [f"{stem}.longvu.a", f"{stem}.longvu.b.c", f"{stem}.videochat_flash.d.e"]


def _needed_files(path: Path) -> set[str]:
    """Files of ours that a file imports, also within functions; what only type checkers read is left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        inner.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for statement in node.body
        for inner in ast.walk(statement)
        if isinstance(inner, ast.Import | ast.ImportFrom)
    }
    found = {_target_file(target) for target, line, _ in _imports(path) if line not in typing_only}
    # The face loads everything, and everything may ask it for what it offers.
    files = {name if name.endswith(".py") else f"{name}/__init__.py" for name in found - {None, "longvideo"}}
    return files - {"longvideo/__init__.py", _name(path)}


def circle_of(needed: dict[str, set[str]]) -> str:
    """A circle among files as a line to read; empty where there is none."""
    try:
        graphlib.TopologicalSorter(needed).prepare()
    except graphlib.CycleError as error:
        return " -> ".join(reversed(error.args[1]))
    return ""


def test_no_files_need_one_another() -> None:
    needed = {_name(path): _needed_files(path) for path in _files(*FOLDERS)}
    assert needed["longvideo/pipelines/granularities.py"] >= {"longvideo/cross_granularity/modules.py"}
    assert circle_of(needed) == ""


def test_a_circle_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = {
        "a.py": "from longvideo.trainers import b\n",
        "b.py": "def f():\n    from longvideo.trainers.a import g\n",
        "c.py": "if TYPE_CHECKING:\n    from longvideo.trainers.d import h\n",
        "d.py": "from longvideo.trainers.c import i\n",
    }
    for name, text in texts.items():
        (tmp_path / "trainers" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "trainers" / name).write_text(text, encoding="utf-8")
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    needed = {f"trainers/{name}": _needed_files(tmp_path / "trainers" / name) for name in texts}
    assert circle_of(needed).split(" -> ")[1:] in (
        ["trainers/b.py", "trainers/a.py"],
        ["trainers/a.py", "trainers/b.py"],
    )
    assert circle_of({name: needed[name] for name in ("trainers/c.py", "trainers/d.py")}) == ""


def lengthy_parts(name: str, text: str) -> list[str]:
    """What is too long in a file, as lines to read; a function counts from its `def`, functions within included."""
    lines, found = text.splitlines(), []
    if len(lines) > MOST_LINES_OF_A_FILE:
        found.append(f"{name} has {len(lines)} lines, {MOST_LINES_OF_A_FILE} are allowed")
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        docstring = range(0)
        if ast.get_docstring(node, clean=False) is not None:
            docstring = range(node.body[0].lineno, node.body[0].end_lineno + 1)
        numbers = range(node.lineno, node.end_lineno + 1)
        count = sum(bool(lines[i - 1].strip()) and i not in docstring for i in numbers)
        if count > MOST_LINES_OF_A_FUNCTION:
            found.append(f"{name}:{node.lineno} {node.name} has {count} lines, {MOST_LINES_OF_A_FUNCTION} are allowed")
    return found


def test_no_file_and_no_function_is_long() -> None:
    files = _files(*(folder for folder in FOLDERS if folder != "tests"))
    assert len(files) > 20, "the walk found too little: is ROOT right?"
    found = [line for path in files for line in lengthy_parts(_name(path), path.read_text(encoding="utf-8"))]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(("num_code", "num_file", "expected"), [(60, 500, []), (61, 500, ["f"]), (60, 501, ["x.py"])])
def test_lengths_leave_out_docstring_and_blank_lines(num_code: int, num_file: int, expected: list[str]) -> None:
    function = ["def f():", '    """One sentence.', "", "    Returns:", "        Nothing.", '    """', ""]
    function += ["    pass", ""] * (num_code - 1)
    text = "\n".join(function + [""] * (num_file - len(function))) + "\n"
    found = lengthy_parts("x.py", text)
    assert [line.split(" has ")[0].split(" ")[-1] for line in found] == expected


def _text_files() -> list[Path]:
    suffixes = {".py", ".md", ".toml", ".txt", ".yaml", ".yml", ".jinja", ".cfg", ".svg", ".sh"}
    inside = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in suffixes]
    top = [path for path in ROOT.iterdir() if path.suffix in suffixes or path.name in ("Makefile", "run")]
    files = [*inside, *top, ROOT / ".ci" / "run"]
    return [path for path in files if path.is_file() and "__pycache__" not in path.parts]


def test_no_package_registry_and_no_machine_is_named() -> None:
    """A checkout installs from whatever index the user's pip has; paths of one machine help nobody else."""
    banned = [".".join(parts) for parts in (("pypi", "org"), ("pythonhosted", "org"), ("npmjs", "org"))]
    banned += ["--extra-index-url", "/".join(("", "work", "")), "/".join(("", "opt", "lv"))]
    found = [
        f"{_name(path)}: {word}"
        for path in _text_files()
        if path != Path(__file__).resolve()
        for word in banned
        if word in path.read_text(encoding="utf-8")
    ]
    assert not found, "\n".join(found)


def test_ruff_bans_the_same_bare_names() -> None:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    banned = set(config["tool"]["ruff"]["lint"]["flake8-tidy-imports"]["banned-api"])
    assert banned == set(FOLDERS) - {"longvideo", "tests"}
