"""Processes on one GPU, on GPUs that are not there: what the launcher gives to each."""

import json
import os
import subprocess
import sys

import pytest

from benchmarks.fake_gpu import library
from config import ROOT

LAUNCHER = """
import json, sys
from types import SimpleNamespace
import train
from prepare import prepare
setup = prepare(train.parse(sys.argv[1:]))
channels = train.connect(setup)
listed = train.jobs(setup, channels, SimpleNamespace(path=None, spans=None), None, None)
print(train.where(setup))
parts = {job.name: job.part for job in listed}
print(json.dumps({"plane": channels.plane.buffers.device, "parts": parts}))
"""
FLAGS = (
    "--model emulated --env emulated --tasks 0 --envs 4 --env-workers 2 --batch 4 --minibatch 4 "
    "--segment 2 --eval-envs 0 --iterations 1 --placement"
)


def launched(gpus: int, flags: str, mps: str) -> tuple[str, dict]:
    """Returns the line that says how GPUs are shared, and what the launcher made."""
    try:
        fake = library.environment(gpus)
    except library.Unavailable as reason:
        pytest.skip(str(reason))
    words = [sys.executable, "-c", LAUNCHER, *f"{FLAGS} {flags}".split()]
    environment = os.environ | fake | {"CUDA_MPS_PIPE_DIRECTORY": mps}
    done = subprocess.run(words, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *lines, made = done.stdout.splitlines()
    return lines[-1], json.loads(made)


@pytest.mark.parametrize(
    "gpus, flags, plane, workers",
    [
        (1, "colocated", "cuda:0", ["cuda:0"]),
        (2, "colocated", "cpu", ["cuda:0", "cuda:1"]),
        (4, "hybrid --ratio 3:1", "cpu", []),
    ],
)
def test_the_launcher_gives_every_worker_its_part(tmp_path, gpus, flags, plane, workers):
    line, made = launched(gpus, flags, str(tmp_path))
    assert made["plane"] == plane
    parts = made["parts"]
    assert all((part is None) == name.startswith("env") for name, part in parts.items())
    for device in workers:
        shares = [part[1] for part in parts.values() if part and part[0] == device]
        assert len(shares) == 2 and 0.8 < sum(shares) < 0.95  # of 80 GB, beside contexts
    if workers:
        assert line.startswith(f"GPU memory, GB: {', '.join(workers)}: rollout ")
        assert line.endswith(
            "; without MPS processes take turns on a GPU: start nvidia-cuda-mps-control -d"
        )
    else:  # nobody shares one
        assert all(part[1] == 1.0 for part in parts.values() if part)
        assert "GPU memory" not in line
