"""A training that is killed goes on along the same loss curve; nothing is lost but the steps since its checkpoint."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from longvideo.trainers import find_last_checkpoint
from tests.trainers import scale_worker
from tests.trainers.sft_runs import losses

NUM_STEPS = 10
PATIENCE = 240  # seconds; a start alone takes ten on a busy machine


def kill_at_random(folder: Path, repository: Path, seed: int) -> int:
    """Starts a training of ten steps in another process and kills it after some of them.

    Args:
        folder: Where it writes.
        repository: Root of the checkout.
        seed: Decides when.

    Returns:
        Number of steps that it logged.
    """
    chance = random.Random(seed)
    wanted, delay = chance.randint(2, NUM_STEPS - 3), chance.uniform(0, 0.2)
    environment = {**os.environ, "PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    log = folder / "long" / "losses.jsonl"
    process = subprocess.Popen(
        [sys.executable, scale_worker.__file__, str(folder), "long"],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    try:
        start = time.monotonic()
        while process.poll() is None and time.monotonic() - start < PATIENCE:
            if log.is_file() and len(log.read_text(encoding="utf-8").splitlines()) >= wanted:
                time.sleep(delay)
                break
            time.sleep(0.002)
    finally:
        process.send_signal(signal.SIGKILL)
        _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors.decode()[-2000:]
    return len(log.read_text(encoding="utf-8").splitlines())


@pytest.fixture(scope="module")
def whole_curve(tmp_path_factory) -> list[float]:
    """The losses of a run that nobody disturbed."""
    trainer = scale_worker.make_long_trainer(tmp_path_factory.mktemp("whole"))
    trainer.train()
    return losses(trainer)


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_killed_run_goes_on_along_the_same_curve(seed, whole_curve, tmp_path, repository):
    logged = kill_at_random(tmp_path, repository, seed)
    assert logged < NUM_STEPS
    written = [json.loads(x)[1] for x in (tmp_path / "long" / "losses.jsonl").read_text(encoding="utf-8").splitlines()]
    # The same numbers in another process.
    assert written == pytest.approx(whole_curve[:logged], rel=1e-5)
    checkpoint = find_last_checkpoint(str(tmp_path / "long"))
    # A step is logged before it is saved: the newest checkpoint is of this step or of the one before.
    assert int(checkpoint.rpartition("-")[2]) in (logged - 1, logged)
    resumed = scale_worker.make_long_trainer(tmp_path / "long")
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == NUM_STEPS and len(losses(resumed)) == NUM_STEPS
    assert losses(resumed) == pytest.approx(whole_curve, rel=1e-5)
