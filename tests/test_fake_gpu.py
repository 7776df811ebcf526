"""What otherwise only a GPU runs, on GPUs that are not there (benchmarks/fake_gpu).

Every family at its released size goes through serving, gathering, training and publishing on one
that counts: `BOUNDS` says how much of everything each may take. Whole runs: test_fake_gpu_runs.py.
"""

import json
import os
import subprocess
import sys

import pytest

from benchmarks.fake_gpu import library
from config import ROOT


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


COUNTS = """
import torch

from benchmarks.fake_gpu.account import Account

with Account() as account:
    weights = torch.empty(1000, 500, device="cuda:0", dtype=torch.bfloat16, requires_grad=True)
    x = torch.empty(64, 500, device="cuda:0", dtype=torch.bfloat16)
    account.reset()
    (x @ weights.T).sum().backward()
    made = 64 * 1000 * 2  # bytes of the product, and of its gradient
    assert account.operations == {"bfloat16": 2 * 2 * 64 * 500 * 1000}, account.operations
    before = 1_000_448 + 64_000  # bytes, in blocks of 512
    assert account.peak[0] >= before + made and account.allocated[0] == 2 * 1_000_448 + 64_000
    assert account.launches == 4 and not account.waits, account.kernels

    # Everything that makes the host wait
    locked = torch.empty(5, pin_memory=True)
    there = torch.zeros(5, device="cuda:0")
    for wait, number in (
        (lambda: float(there.sum()), 1),
        (lambda: there.tolist(), 1),
        (lambda: there.cpu(), 1),
        (lambda: torch.zeros(5).to("cuda:0", non_blocking=True), 1),
        (lambda: torch.tensor([1.0, 2.0], device="cuda:0"), 1),
        (lambda: there[there > 0], 1),
        (lambda: there.nonzero(), 1),
        (lambda: there.unique(), 1),
        (lambda: torch.cuda.synchronize(), 1),
        (lambda: torch.cuda.current_stream().synchronize(), 1),
        (lambda: there.copy_(locked), 1),
        (lambda: there.copy_(locked, non_blocking=True), 0),
        (lambda: locked.copy_(there, non_blocking=True), 0),
        (lambda: there * 2, 0),
    ):
        account.reset()
        wait()
        assert account.synchronisations == number, account.waits
print("all is well")
"""


def test_what_is_counted(gpus, tmp_path):
    file = tmp_path / "counts.py"
    file.write_text(COUNTS)
    assert python(gpus(1), str(file)).endswith("all is well\n")


def test_gpus_that_one_hides_are_not_seen(gpus):
    ask = "import torch; print(torch.cuda.is_available(), torch.cuda.device_count())"
    seen = [gpus(8) | {"CUDA_VISIBLE_DEVICES": names} for names in ("", "2,5")]
    assert [python(one, "-c", ask) for one in seen] == ["False 0\n", "True 2\n"]


# ---------------------------------------------------------------- what each family may ask of one

# Of an inference of 16 samples, a micro-batch of 96 chunk steps, an optimizer step that is not a
# batch's first of several, and a publication: launches of kernels, waits of the host, and bytes
# that travel through page-locked memory. Through pageable memory nothing may.
BOUNDS = {
    "pi0": {
        "inference": (5196, 1, 5.25e6),
        "micro-batch": (4332, 1, 30.3e6),
        "optimizer step": (31, 1, 0),
        "publication": (348, 2, 0),
    },
    "pi05": {
        "inference": (6904, 1, 4.93e6),
        "micro-batch": (4952, 1, 29.4e6),
        "optimizer step": (33, 1, 0),
        "publication": (420, 2, 0),
    },
    "gr00t": {
        "inference": (2509, 1, 4.98e6),
        "micro-batch": (3291, 1, 29.4e6),
        "optimizer step": (41, 1, 0),
        "publication": (557, 2, 0),
    },
    "oft": {
        "inference": (3685, 1, 2.44e6),
        "micro-batch": (11744, 1, 14.6e6),
        "optimizer step": (87, 1, 0),
        "publication": (1717, 2, 0),
    },
}


@pytest.mark.parametrize("family", BOUNDS)
def test_no_family_asks_for_more_than_it_did(gpus, tmp_path, family):
    """A copy of pageable memory, a wait in a hot loop or a kernel for every parameter shows here.
    So does a tensor on the wrong device, or of another type than its partner's."""
    file = tmp_path / "counts.json"
    module = ("-m", "benchmarks.gpu_accounting", "--case", family, "--json", str(file))
    python(gpus(1), *module, timeout=600.0)
    found = json.loads(file.read_text())["cases"][family]
    for what, (launches, waits, pinned) in BOUNDS[family].items():
        account = found[what]["account"]
        copied = account["copied"]
        assert account["launches"] <= launches, (what, account["launches"])
        assert account["synchronisations"] <= waits, (what, account["waits"])
        assert copied.get("to pinned", 0) + copied.get("from pinned", 0) <= pinned, (what, copied)
    for what, count in found.items():
        copied = count["account"]["copied"]
        assert not any("pageable" in way for way in copied), (what, count["account"]["waits"])
