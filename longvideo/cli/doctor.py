"""`longvideo doctor`: what is installed, what is missing, which decoder and which attention will be used.

Every check really does the thing once: versions are compared with the ranges that the package declares, torchvision
runs one operator, PyAV writes and reads back a clip in memory. Nothing is downloaded and no model is loaded.
"""

import argparse
import importlib
import importlib.metadata
import importlib.util
import io
import json
import os
import platform
import sys
import tomllib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

HELP = "say what is installed, what is missing, which decoder and which attention will be used"

PACKAGE = "longvideo"
PURPOSE = {
    "torch": "tensors and modules",
    "torchvision": "video processors",
    "transformers": "base classes, generation, pipelines",
    "safetensors": "weights",
    "huggingface_hub": "downloads and model cards",
    "numpy": "frames and times",
    "av": "decoding",
    "peft": "LoRA fine-tuning",
    "datasets": "training rows",
    "accelerate": "transformers.Trainer",
    "liger_kernel": "fused training kernels on CUDA",
    "flash_attn": 'attn_implementation="flash_attention_2"',
    "torchcodec": "another decoder",
    "pycocoevalcap": "BLEU, METEOR, ROUGE-L and CIDEr of captions",
}
OPTIONAL_EXTRAS = ("train", "liger", "flash", "captions")


@dataclass(frozen=True)
class Check:
    """One line of the report; `status` is "ok", "missing" (not installed) or "broken" (there, but unusable)."""

    name: str
    status: str
    detail: str
    needed: bool = True
    fix: str | None = None


@dataclass(frozen=True)
class Requirements:
    """The ranges the package declares: for Python, for what it needs, and for each extra."""

    python: str
    needed: tuple[str, ...]
    extras: dict[str, tuple[str, ...]]
    installed: bool


def read_requirements() -> Requirements:
    """Reads the declared ranges from the checkout's pyproject.toml, or from the metadata of an installed package.

    Returns:
        The requirement strings as they are written there; `installed` says whether pip knows the package.

    Raises:
        FileNotFoundError: There is neither, so nothing can be compared.
    """
    try:
        metadata = importlib.metadata.metadata(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        metadata = None
    pyproject = Path(__file__).resolve().parents[2] / "pyproject.toml"
    if pyproject.is_file():
        project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
        extras = {name: tuple(project["optional-dependencies"][name]) for name in OPTIONAL_EXTRAS}
        return Requirements(project["requires-python"], tuple(project["dependencies"]), extras, metadata is not None)
    if metadata is None:
        raise FileNotFoundError(
            f"neither {pyproject} nor metadata of an installed {PACKAGE} was found, so the supported versions are "
            "unknown; install the package with pip or run from a checkout"
        )
    return _from_metadata(metadata["Requires-Python"], metadata.get_all("Requires-Dist") or [])


def _from_metadata(python: str, lines: list[str]) -> Requirements:
    from packaging.requirements import Requirement

    needed: list[str] = []
    extras: dict[str, list[str]] = {name: [] for name in OPTIONAL_EXTRAS}
    for line in lines:
        requirement = Requirement(line)
        marker, requirement.marker = requirement.marker, None
        if marker is None or marker.evaluate({"extra": ""}):
            needed.append(str(requirement))
            continue
        for name in OPTIONAL_EXTRAS:
            if marker.evaluate({"extra": name}):
                extras[name].append(str(requirement))
    return Requirements(python, tuple(needed), {name: tuple(found) for name, found in extras.items()}, True)


def check_python(wanted: str) -> Check:
    """Compares the running interpreter with the declared range, for example ">=3.11,<3.14"."""
    from packaging.specifiers import SpecifierSet

    version = platform.python_version()
    if SpecifierSet(wanted).contains(version, prereleases=True):
        return Check("python", "ok", f"{version} ({wanted})")
    return Check("python", "broken", f"{version}, supported is {wanted}", fix="make an environment with Python 3.12")


def check_package(requirement: str, *, needed: bool, fix: str, load: bool) -> Check:
    """Checks one requirement: installed, in range and, with `load`, importable.

    Args:
        requirement: As in pyproject.toml, for example "torch>=2.6".
        needed: Whether longvideo cannot work without it.
        fix: The command to show when something is wrong.
        load: Import it too. Slow packages that are only used for training are not imported.
    """
    from packaging.requirements import Requirement

    wanted = Requirement(requirement)
    name, bounds = wanted.name, str(wanted.specifier)
    # Builders write "-" or "_" into an installed package's metadata as they like; modules only have "_".
    module = name.replace("-", "_")
    purpose = PURPOSE.get(module, "")
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Check(name, "missing", f"not installed; for {purpose}", needed, fix)
    if not wanted.specifier.contains(version, prereleases=True):
        return Check(name, "broken", f"{version}, supported is {bounds}", needed, fix)
    if load:
        try:
            importlib.import_module(module)
        except Exception as error:  # a broken binary package raises whatever it likes
            detail = f"{version} is installed but does not import: {_first_line(error)}"
            return Check(name, "broken", detail, needed, fix)
    return Check(name, "ok", f"{version} ({bounds})", needed)


def check_working(name: str, action: Callable[[], str], *, fix: str, needed: bool = True) -> Check:
    """Runs `action` and reports what it returns, or why it failed."""
    try:
        return Check(name, "ok", action(), needed)
    except Exception as error:  # anything that goes wrong here is the finding
        return Check(name, "broken", _first_line(error), needed, fix)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def run_nms() -> str:
    """Runs one compiled operator of torchvision: it is absent when torch and torchvision do not belong together."""
    import torch
    from torchvision.ops import nms

    kept = nms(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.tensor([1.0]), 0.5)
    return f"torchvision runs with this torch (nms kept {kept.numel()} of 1 box)"


def run_decoding() -> str:
    """Writes four frames as MPEG-4 into memory and reads them back."""
    import av
    import numpy as np

    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=4)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for index in range(4):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 60 * index, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    buffer.seek(0)
    with av.open(buffer) as container:
        count = sum(1 for _ in container.decode(video=0))
    if count != 4:
        raise ValueError(f"4 frames were written and {count} were read back")
    return "PyAV wrote and read back 4 frames"


def run_registration() -> str:
    """Looks the architectures up where `from_pretrained` does."""
    from transformers import CONFIG_MAPPING

    from longvideo._registration import ARCHITECTURES

    return f"transformers knows {', '.join(CONFIG_MAPPING[name].model_type for name in ARCHITECTURES)}"


def run_tiny_checkpoint() -> str:
    """Finds the checkpoints that lie in the package; the first one is what `longvideo ask` uses by itself."""
    import longvideo
    from longvideo.cli.ask import TINY

    first = Path(longvideo.tiny_checkpoint(TINY))
    found = []
    for folder in (first, *sorted(folder for folder in first.parent.iterdir() if folder != first)):
        if not list(folder.glob("*.safetensors")):
            raise FileNotFoundError(f"no weights in {folder}")
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        found.append(f"{folder.name}, {size / 1e6:.1f} MB")
    return "; ".join(found)


def find_torchcodec() -> Check:
    """torchcodec counts only when it imports: its wheel needs FFmpeg libraries of the system."""
    if importlib.util.find_spec("torchcodec") is None:
        return Check("torchcodec", "missing", "not installed; PyAV is enough", False, "pip install torchcodec")
    from longvideo.processing.shared.video_decoding import torchcodec_decoders

    loaded = torchcodec_decoders()
    if isinstance(loaded, str):
        reason = loaded.removesuffix(" Likely causes:")[:100]
        detail = f"installed but does not import ({reason}); PyAV is used"
        fix = "install FFmpeg's shared libraries, or pip uninstall torchcodec"
        return Check("torchcodec", "broken", detail, False, fix)
    return Check("torchcodec", "ok", importlib.metadata.version("torchcodec"), False)


def describe_decoder() -> dict[str, str]:
    """Which reader `video_backend="auto"` takes first on this machine, and which can be asked for by name."""
    if find_torchcodec().status == "ok":
        return {"used": "torchcodec", "available": "torchcodec, pyav"}
    return {"used": "pyav", "available": "pyav"}


def describe_attention() -> dict[str, str]:
    """Which attention a model gets when nothing is asked for, and what else can be asked for."""
    from transformers.utils import is_flash_attn_2_available, is_torch_flex_attn_available

    available = ["sdpa", "eager"]
    if is_flash_attn_2_available():
        available.append("flash_attention_2")
    if is_torch_flex_attn_available():
        available.append("flex_attention")
    return {"used": "sdpa", "available": ", ".join(available)}


def describe_device() -> dict[str, str]:
    """The device that is used when none is named."""
    import torch

    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        return {"used": "cuda", "name": f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"}
    return {"used": "cpu", "name": f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"}


def _describe(action: Callable[[], dict[str, str]]) -> dict[str, str]:
    try:
        return action()
    except Exception as error:  # a missing package has its own line among the checks
        return {"used": "unknown", "error": _first_line(error)}


def examine() -> dict[str, Any]:
    """Runs every check.

    Returns:
        A dict of plain values: `checks` (a list of dicts, see `Check`), `decoder`, `attention`, `device`, and `ok`,
        which is False when something that is needed is missing or broken.
    """
    import longvideo

    requirements = read_requirements()
    target = PACKAGE if requirements.installed else "."

    def install(extra: str = "") -> str:
        flag = "" if requirements.installed else "-e "
        return f'pip install {flag}"{target}{extra}"'

    checks = [check_python(requirements.python)]
    checks += [check_package(line, needed=True, fix=install(), load=True) for line in requirements.needed]
    pair_fix = "install a torch and a torchvision of the same release, see constraints.txt"
    checks.append(check_working("torch/torchvision pair", run_nms, fix=pair_fix))
    checks.append(check_working("decoding", run_decoding, fix='pip install --force-reinstall "av>=12"'))
    checks.append(check_working("registration", run_registration, fix="import longvideo before from_pretrained"))
    checks.append(check_working("tiny checkpoint", run_tiny_checkpoint, fix=install(), needed=False))
    for extra, lines in requirements.extras.items():
        checks += [check_package(line, needed=False, fix=install(f"[{extra}]"), load=False) for line in lines]
    checks.append(find_torchcodec())
    return {
        "longvideo": longvideo.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "checks": [asdict(check) for check in checks],
        "decoder": _describe(describe_decoder),
        "attention": _describe(describe_attention),
        "device": _describe(describe_device),
        "ok": all(check.status == "ok" for check in checks if check.needed),
    }


def render(report: dict[str, Any]) -> str:
    """The report as text: needed things first, then optional ones, then what will be used."""
    lines = [f"longvideo {report['longvideo']}, Python {report['python']}, {report['platform']}"]
    for title, needed in (("needed", True), ("optional", False)):
        lines.append(f"\n{title}")
        for check in report["checks"]:
            if check["needed"] is needed:
                lines.append(f"  {check['status']:<8} {check['name']:<24} {check['detail']}")
                if check["status"] != "ok" and check["fix"]:
                    lines.append(f"  {'':<8} {'':<24} -> {check['fix']}")
    lines.append("\nwill be used")
    for part in ("decoder", "attention", "device"):
        found = dict(report[part])
        used = found.pop("used")
        rest = "; ".join(f"{key}: {value}" if key != "name" else value for key, value in found.items())
        lines.append(f"  {part:<10} {used}" + (f" ({rest})" if rest else ""))
    broken = [check["name"] for check in report["checks"] if check["needed"] and check["status"] != "ok"]
    lines.append("\nready" if report["ok"] else f"\nnot ready: {', '.join(broken)}")
    return "\n".join(lines)


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(args: argparse.Namespace) -> int:
    """Prints the report; the exit code is 1 when something that is needed is missing or broken."""
    report = examine()
    sys.stdout.write((json.dumps(report, indent=2) if args.json else render(report)) + "\n")
    return 0 if report["ok"] else 1
