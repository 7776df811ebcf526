"""What `bench.py` measures, one file each, and what several of them need."""

import os
import signal
import statistics
import sys
import time
import weakref
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import models
from config import ROOT, UserError, embedded_files

MATMUL = {"cpu": 1024, "cuda": 8192}  # side of the square matrices that `matmul` multiplies


def context(module: str):
    """Where processes come from: a server that has imported `module` already, so that one starts in
    milliseconds.
    """
    # That server looks for the module here alone, and says nothing when it fails: each process
    # would import torch itself.
    os.environ["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])
    )
    server = mp.get_context("forkserver")
    server.set_forkserver_preload([module])
    return server


def end_on_sigterm() -> None:
    """As on Ctrl-C: what was started ends too."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


def where(size: str) -> tuple[str, str]:
    """Device and size to measure; "auto" is full where there is a GPU. Raises UserError for full on
    a CPU.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if size == "full" and device == "cpu":
        raise UserError("--size full needs a GPU and none was found: use --size small")
    return device, size if size != "auto" else "full" if device == "cuda" else "small"


def random_model(name: str, size: str, device: str, dtype: torch.dtype, **changes) -> nn.Module:
    """A family's small or full model with random weights, made on `device` in `dtype`; `changes`
    are fields of its configuration.

    The same weights for the same shape.
    """
    small = models.files(name).embedded(
        name, str(embedded_files("pi05")[1])
    )  # any vocabulary will do
    shape = small.config
    if size == "full":
        shape = models.load(name).FULL[name]
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # a full model in fp32 first would take twice the memory
    try:
        with torch.device(device):
            return type(small)(replace(shape, **changes)).to(device)
    finally:
        torch.set_default_dtype(before)


def seconds_of(functions: list[Callable], device: str, seconds: float) -> list[float]:
    """Median time of one call of each, after one that warms up. They take turns, so that what
    disturbs one disturbs all.

    At least 3 calls each and `seconds` for each. Waits for the GPU after every call.
    """
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    for function in functions:
        function()
        wait()
    times = [[] for _ in functions]
    end = time.perf_counter() + seconds * len(functions)
    while len(times[0]) < 3 or time.perf_counter() < end:
        for taken, function in zip(times, functions, strict=True):
            start = time.perf_counter()
            function()
            wait()
            taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in times]


def matmul(device: str, dtype: torch.dtype) -> tuple[Callable, float]:
    """A large matrix product, whose rate is taken for the most that this machine reaches in this
    type, and its FLOPs.
    """
    a, b = (torch.randn(MATMUL[device], MATMUL[device], device=device).to(dtype) for _ in range(2))
    return lambda: a @ b, 2.0 * MATMUL[device] ** 3


def flops_of(function: Callable) -> int:
    """FLOPs of all matrix products in one call: a multiplication and an addition are two."""
    # Attention as plain products: the counter does not know the fused kernel for CPUs.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        function()
    return counter.get_total_flops()


class PeakBytes(TorchDispatchMode):
    """`peak`: the most bytes that tensors made under it held at one time. What one operation
    allocates inside does not count.
    """

    def __init__(self):
        super().__init__()
        self.now = 0
        self.peak = 0
        self.seen = weakref.WeakValueDictionary()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {
            id(x.untyped_storage()) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)
        }
        out = function(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            storage = x.untyped_storage() if isinstance(x, Tensor) else None
            if storage is None or id(storage) in given or id(storage) in self.seen:
                continue
            self.seen[id(storage)] = storage
            weakref.finalize(storage, self.free, storage.nbytes())
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
        return out

    def free(self, size: int) -> None:
        self.now -= size


def peak_bytes_of(function: Callable, device: str) -> int:
    """Memory that one call takes at most, beyond what was taken before it."""
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with PeakBytes() as mode:
        function()
    return mode.peak
