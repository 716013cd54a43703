"""The same package three ways: from a checkout with nothing installed, from an editable install, and from a wheel.

The builds run offline on a copy of the tree, without build isolation and without dependencies, into environments that
see the packages of the running one through a .pth file (plain path lines: its own editable installs stay invisible).
"""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("longvideo", "modeling", "processing", "conversion", "trainers", "evaluation", "hub_cards")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PACKAGES = set(PROJECT["tool"]["setuptools"]["packages"])
pytestmark = pytest.mark.xdist_group("packaging")  # the wheel is built once, by one process

# Run in another process, in a folder that is not the checkout; prints one line of JSON.
PROBE = """
import json, sys
from importlib import resources
import longvideo
import longvideo.evaluation, longvideo.hub_cards, longvideo.modeling, longvideo.processing
found = {
    "file": longvideo.__file__,
    "modeling": longvideo.modeling.__file__,
    "version": longvideo.__version__,
    "cards": (resources.files("longvideo.hub_cards") / "_template.md").is_file(),
    "typed": (resources.files("longvideo") / "py.typed").is_file(),
}
if "classes" in sys.argv:
    import pickle
    import longvideo.conversion, longvideo.trainers
    from longvideo.modeling.videochat_flash.configuration_videochat_flash import VideoChatFlashConfig
    from longvideo.modeling.videochat_flash.modeling_videochat_flash import VideoChatFlashForConditionalGeneration
    from transformers import AutoConfig
    config = AutoConfig.for_model("videochat_flash")
    found["same_class"] = type(config) is VideoChatFlashConfig
    found["pickles"] = type(pickle.loads(pickle.dumps(config))) is VideoChatFlashConfig
    found["module"] = VideoChatFlashForConditionalGeneration.__module__
folders = {"modeling", "processing", "conversion", "trainers", "evaluation", "hub_cards"}
print(json.dumps({**found, "bare": sorted(folders & set(sys.modules))}))
"""

IMPORT_EVERYTHING = """
import importlib, importlib.abc, importlib.util, json, pkgutil, sys
BLOCKED = {"peft", "datasets", "accelerate", "torchcodec", "flash_attn", "liger_kernel", "matplotlib", "psutil", "trl"}
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
find_spec = importlib.util.find_spec  # transformers asks with it what is installed
importlib.util.find_spec = lambda name, *more: None if name.split(".")[0] in BLOCKED else find_spec(name, *more)
names = []
for package in json.loads(sys.argv[1]):
    module = importlib.import_module(package)
    # The face's second path is the checkout, whose folders are packages of the list themselves.
    for found in pkgutil.iter_modules(module.__path__[:1], package + "."):
        if not found.ispkg and not found.name.endswith("__main__"):
            importlib.import_module(found.name)
            names.append(found.name)
print(json.dumps(names))
"""


def _run(command: list[str], *, cwd: Path, pythonpath: Path | None = None) -> str:
    """Runs a command with a clean PYTHONPATH; returns stdout, fails with stderr."""
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    environment |= {"HF_HUB_OFFLINE": "1", "PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    if pythonpath is not None:
        environment["PYTHONPATH"] = str(pythonpath)
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{' '.join(command[:6])} failed:\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def source_copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is packaged: building in the checkout itself would leave build folders in it."""
    target = tmp_path_factory.mktemp("source")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, target / name)
    return target


def _environment(folder: Path) -> Path:
    """Makes an environment without pip that also sees the packages of the running interpreter; returns its python."""
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    inner = _run([str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], cwd=folder).strip()
    outer = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    Path(inner, "outer.pth").write_text("\n".join(sorted(outer)) + "\n", encoding="utf-8")
    return python


@pytest.fixture(scope="module")
def wheel(source_copy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built offline."""
    target = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(target)]
    _run([*pip, str(source_copy)], cwd=target)
    (found,) = target.glob("longvideo-*.whl")
    return found


def _check(probe: str, inside: Path) -> None:
    found = json.loads(probe.strip().splitlines()[-1])
    assert Path(found["file"]).resolve().is_relative_to(inside), found["file"]
    assert Path(found["modeling"]).resolve().is_relative_to(inside), found["modeling"]
    assert found["version"] == PROJECT["project"]["version"]
    assert found["bare"] == [], "the folders were imported by their bare names: every class exists twice then"
    assert found["cards"] and found["typed"]
    if "module" in found:
        assert found["same_class"] and found["pickles"]
        assert found["module"] == "longvideo.modeling.videochat_flash.modeling_videochat_flash"


def test_from_a_checkout_without_an_install(tmp_path: Path) -> None:
    python = _environment(tmp_path / "venv")
    _check(_run([str(python), "-c", PROBE], cwd=tmp_path, pythonpath=ROOT), ROOT)


def test_from_the_root_of_a_checkout_next_to_an_installed_copy(tmp_path: Path, wheel: Path) -> None:
    """The working directory wins as a whole: face and folders come from the checkout, never one from each."""
    python = _environment(tmp_path / "venv")
    _install(python, [str(wheel)], tmp_path)
    _check(_run([str(python), "-c", PROBE], cwd=ROOT), ROOT)


def _install(python: Path, what: list[str], cwd: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps"]
    _run([*pip, "--no-build-isolation", "--no-warn-script-location", *what], cwd=cwd)


def test_from_an_editable_install(tmp_path: Path, source_copy: Path) -> None:
    python = _environment(tmp_path / "venv")
    _install(python, ["-e", str(source_copy)], tmp_path)
    _check(_run([str(python), "-c", PROBE, "classes"], cwd=tmp_path), source_copy.resolve())
    assert "doctor" in _run([str(python.parent / "longvideo"), "--help"], cwd=tmp_path)


def test_from_a_wheel(tmp_path: Path, wheel: Path) -> None:
    python = _environment(tmp_path / "venv")
    _install(python, [str(wheel)], tmp_path)
    _check(_run([str(python), "-c", PROBE, "classes"], cwd=tmp_path), (tmp_path / "venv").resolve())
    assert "doctor" in _run([str(python.parent / "longvideo"), "--help"], cwd=tmp_path)


def test_every_data_file_is_in_the_wheel(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        inside = set(archive.namelist())
    expected = set()
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and path.suffix not in (".pyc",):
                name = path.relative_to(ROOT).as_posix()
                expected.add(name if folder == "longvideo" else f"longvideo/{name}")
    assert any(name.endswith(".jinja") for name in expected)
    assert any(name.endswith(".safetensors") for name in expected)
    assert expected - inside == set(), "in the tree, not in the wheel: add a line to package-data in pyproject.toml"
    strays = {name for name in inside if not name.startswith(("longvideo/", "longvideo-"))}
    assert strays == set(), "the wheel would install top-level packages"


def test_the_list_of_packages_is_the_tree() -> None:
    found = set()
    for folder in FOLDERS:
        for init in (ROOT / folder).rglob("__init__.py"):
            name = init.parent.relative_to(ROOT).as_posix().replace("/", ".")
            found.add(name if folder == "longvideo" else f"longvideo.{name}")
    assert found - PACKAGES == set(), "folders that pyproject.toml does not list: they would be missing in a wheel"
    assert PACKAGES - found == set(), "pyproject.toml lists folders that are not there"
    code = {path.parent for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")}
    without = sorted(str(path.relative_to(ROOT)) for path in code if not (path / "__init__.py").is_file())
    assert without == [], "folders with code need an __init__.py"


def test_every_module_imports_without_the_optional_packages(tmp_path: Path) -> None:
    command = [sys.executable, "-c", IMPORT_EVERYTHING, json.dumps(sorted(PACKAGES))]
    names = json.loads(_run(command, cwd=tmp_path, pythonpath=ROOT).strip().splitlines()[-1])
    assert len(names) > 20, names


def test_constraints_fit_the_declared_ranges() -> None:
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    pinned = {canonicalize_name(name): version for name, version in pinned.items()}
    project = PROJECT["project"]
    extras = project["optional-dependencies"]
    for line in [*project["dependencies"], *extras["train"], *extras["dev"]]:
        wanted = Requirement(line)
        if wanted.name == "longvideo":
            continue
        name = canonicalize_name(wanted.name)
        assert name in pinned, f"{name} is installed by make and not pinned in constraints.txt"
        assert wanted.specifier.contains(pinned[name]), f"{name}=={pinned[name]} is outside {wanted.specifier}"


def test_every_dependency_has_its_reason() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    lists = text[text.index("dependencies = [") : text.index("[project.scripts]")]
    lines = [line for line in lists.splitlines() if re.match(r'\s*(\w+ = \[)?"[a-zA-Z]', line.strip())]
    assert len(lines) > 12
    assert [line for line in lines if "#" not in line] == []
    assert len(PROJECT["project"]["dependencies"]) <= 7
