"""Settings of every test: offline, seeded, one thread, and where the recordings of the original code lie."""

import os
import random
from pathlib import Path

# Set before anything imports huggingface_hub or torch: both read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch

REPOSITORY = Path(__file__).resolve().parent.parent
GOLDEN_ROOT = Path(os.environ.get("LONGVIDEO_GOLDEN", REPOSITORY.parent / "shared" / "golden"))


def pytest_configure(config: pytest.Config) -> None:
    """Keeps worker processes from fighting over the cores."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skips what this machine cannot run, with the reason, also when a marker was asked for by name."""
    no_golden = None if GOLDEN_ROOT.is_dir() else f"no recordings of the original code at {GOLDEN_ROOT}"
    no_gpu = None if torch.cuda.is_available() else "no CUDA device"
    for item in items:
        if no_golden and "golden" in item.keywords:
            item.add_marker(pytest.mark.skip(reason=f"{no_golden} (set LONGVIDEO_GOLDEN)"))
        if no_gpu and "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason=no_gpu))


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same random state, in whatever order and process it runs."""
    random.seed(42)
    np.random.seed(42)
    torch.manual_seed(42)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def golden_root() -> Path:
    """The folder with one sub-folder of recorded cases per architecture; the test is skipped where there is none."""
    if not GOLDEN_ROOT.is_dir():
        pytest.skip(f"no recordings of the original code at {GOLDEN_ROOT} (set LONGVIDEO_GOLDEN)")
    return GOLDEN_ROOT
