"""Two processes train both modules as one process with the same rows does, also where one has nothing to compare."""

import json
import os
import socket
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from tests.trainers import cross_granularity_worker as worker

pytest.importorskip("peft")
PATIENCE = 560  # seconds; on a busy machine two processes take half a minute to start
LOGGED = ("loss", "coarse/loss", "coarse/pairs", "fine/loss", "reward/winner_overlap")


def test_two_processes_are_one(tmp_path, request):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_addr", "127.0.0.1"]
    command += ["--master_port", str(port), worker.__file__, str(tmp_path)]
    own = {"PYTHONPATH": str(request.config.rootpath), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env={**os.environ, **own}, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr[-4000:]
    trainer = worker.train(tmp_path / "one")
    two = json.loads((tmp_path / "state.json").read_text(encoding="utf-8"))["log_history"]
    for key in LOGGED:
        expected = [entry[key] for entry in trainer.state.log_history if key in entry]
        # gradients are summed in another order; Adam's first steps follow signs, which 1e-4 leaves room for
        assert [entry[key] for entry in two if key in entry] == pytest.approx(expected, abs=1e-4), key
    # in each coarse step one process compares two pairs and the other none
    assert [entry["coarse/pairs"] for entry in two if "coarse/pairs" in entry] == [1.0, 1.0]
    stored = load_file(tmp_path / "weights.safetensors")
    for name, weight in worker.weights_of(trainer).items():
        torch.testing.assert_close(stored[name], weight, atol=5e-4, rtol=0, msg=name)
