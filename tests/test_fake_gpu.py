"""What otherwise only a GPU runs, on GPUs that are not there (benchmarks/fake_gpu).

Every family at its released size goes through serving, gathering, training and publishing on one
that counts: `BOUNDS` says how much of everything each may take. Whole runs are on up to eight that
compute.
"""

import os
import subprocess
import sys

import pytest

from benchmarks.fake_gpu import library
from config import ROOT


@pytest.fixture(scope="session")
def gpus():
    """Returns the environment of a process that has so many of them."""

    def environment(count: int) -> dict[str, str]:
        try:
            return library.environment(count)
        except library.Unavailable as error:
            pytest.skip(str(error))

    return environment


def python(environment: dict[str, str], *arguments: str, timeout: float = 300.0) -> str:
    """Returns what a Python process printed."""
    command = [sys.executable, *arguments]
    both = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, timeout=timeout, **both)
    assert done.returncode == 0, done.stdout
    return done.stdout


# ---------------------------------------------------------------- the devices

DEVICES = """
import threading

import pytest
import torch
import torch.multiprocessing as mp

import conftest


def add_one(weights):
    weights["b"].add_(1)


if __name__ == "__main__":
    assert torch.cuda.is_available() and torch.cuda.device_count() == 2

    # Tensors know their device, and do not mix.
    x = torch.arange(6.0, device="cuda:1", requires_grad=True)
    for stranger in (torch.ones(6), torch.ones(6, device="cuda:0")):
        with pytest.raises(RuntimeError, match="same device"):
            x + stranger
    threading.Thread(target=(x * 2).sum().backward).start()
    assert (x + 1).cpu().tolist() == [1, 2, 3, 4, 5, 6]

    # Page-locked memory is told from other memory.
    locked = torch.empty(4, pin_memory=True)
    assert locked.is_pinned() and locked[1:].is_pinned() and not torch.empty(4).is_pinned()

    # Another process sees the same memory, views of it included.
    whole = torch.zeros(4, device="cuda:1")
    process = mp.get_context("forkserver").Process(
        target=add_one, args=({"a": whole, "b": whole[2:]},)
    )
    process.start()
    process.join()
    assert whole.tolist() == [0, 0, 1, 1]

    # A model computes what it does on the CPU.
    model = conftest.tiny_pi()
    found = {}
    for device in ("cpu", "cuda:1"):
        model = model.to(device)
        observed = {name: x.to(device) for name, x in conftest.observations(model, 3).items()}
        noise = model.draw([(0, 0, 0, i) for i in range(3)], [True] * 3)
        noise = {name: x.to(device) for name, x in noise.items()}
        stored = observed | model.act(observed, noise)
        stored = {name: x.clone() for name, x in stored.items()}
        out = model.evaluate(stored)
        (out["logprob"].sum() + out["value"].sum()).backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found[device] = {name: x.cpu() for name, x in (stored | gradients).items()}
        assert {str(x.device) for x in gradients.values()} == {device}
        model.zero_grad(set_to_none=True)
    for name, x in found["cpu"].items():
        torch.testing.assert_close(found["cuda:1"][name], x, atol=1e-5, rtol=1e-4)
    print("all is well")
"""


def test_devices_are_told_apart_and_compute_what_the_cpu_does(gpus, tmp_path):
    file = tmp_path / "devices.py"
    file.write_text(DEVICES)
    environment = gpus(2)
    environment["PYTHONPATH"] += os.pathsep + str(ROOT / "tests")
    assert python(environment, str(file)).endswith("all is well\n")


def test_where_they_cannot_be_a_sentence_says_why(monkeypatch, tmp_path):
    monkeypatch.setattr(library, "CACHE", tmp_path / "empty")
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(library.Unavailable, match="g\\+\\+ is needed"):
        library.environment(1)
