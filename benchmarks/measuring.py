"""What several measurements need: times, FLOPs, bytes, processes, models with random weights."""

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
from config import ROOT, embedded_files
from errors import require

MATMUL = {"cpu": 1024, "cuda": 8192}  # side of the square matrices that `matmul` multiplies


def context(module: str):
    """Makes a fork server that has imported `module`, so that a process starts in milliseconds."""
    # The server looks for the module in PYTHONPATH alone. It says nothing when it does not find it,
    # and each process would import torch itself.
    paths = filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    server = mp.get_context("forkserver")
    server.set_forkserver_preload([module])
    return server


def end_on_sigterm() -> None:
    """Makes SIGTERM do what Ctrl-C does: what was started ends, too."""
    signal.signal(signal.SIGTERM, leave)


def leave(*_) -> None:
    sys.exit(143)  # 128 + SIGTERM, as shells have it


def where(size: str) -> tuple[str, str]:
    """Chooses device and size; "auto" is full where there is a GPU, else small.

    Raises UserError for full on a CPU."""
    has_gpu = torch.cuda.is_available()
    require(
        has_gpu or size != "full", "--size full needs a GPU and none was found: use --size small"
    )
    if size == "auto":
        size = "full" if has_gpu else "small"
    return "cuda" if has_gpu else "cpu", size


def random_model(name: str, size: str, device: str, dtype: torch.dtype, **changes) -> nn.Module:
    """Makes a family's small or full model with random weights on `device`, in `dtype`.

    `changes` are fields of its configuration. Models of the same shape get the same weights."""
    _, vocabulary = embedded_files("pi05", "metaworld")  # any will do
    small = models.files(name).embedded(name, str(vocabulary))
    shape = small.config
    if size == "full":
        full = models.load(name).FULL
        shape = full[name] if isinstance(full, dict) else full
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    # Made in `dtype` at once: a full model in fp32 first would take twice the memory.
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return type(small)(replace(shape, **changes)).to(device)
    finally:
        torch.set_default_dtype(before)


def seconds_of(
    functions: list[Callable], device: str, seconds: float, least: int = 3
) -> list[float]:
    """Measures the median time of one call of each function, after one call that warms up.

    They take turns, so that what disturbs one disturbs all. Each is called `least` times or more,
    for `seconds`. A call lasts until the GPU is done. least: 1 where calls are long and have warmed
    up, which is then left out."""
    for function in functions if least > 1 else ():
        time_of(function, device)
    times = [[] for _ in functions]
    end = time.perf_counter() + seconds * len(functions)
    while len(times[0]) < least or time.perf_counter() < end:
        for taken, function in zip(times, functions, strict=True):
            taken.append(time_of(function, device))
    return [statistics.median(taken) for taken in times]


def time_of(function: Callable, device: str) -> float:
    """Measures the seconds of one call."""
    start = time.perf_counter()
    function()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def matmul(device: str, dtype: torch.dtype, side: int = 0) -> tuple[Callable, float]:
    """Makes a large matrix product, and counts its FLOPs.

    Its rate is taken for the most that this machine reaches in this type. side: of the matrices; 0
    means `MATMUL`'s."""
    side = side or MATMUL[torch.device(device).type]
    a = torch.randn(side, side, device=device).to(dtype)
    b = torch.randn(side, side, device=device).to(dtype)

    def product() -> Tensor:
        return a @ b

    return product, 2.0 * side**3


def flops_of(function: Callable) -> int:
    """Counts the FLOPs of all matrix products in one call: multiplications and additions.

    Attention runs as plain products: the counter does not know the fused kernel for CPUs."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        function()
    return counter.get_total_flops()


class PeakBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that are made under it.

    What one operation allocates inside does not count."""

    def __init__(self):
        super().__init__()
        self.now = 0  # bytes that tensors hold
        self.peak = 0  # the most that they held at one time
        self.seen = weakref.WeakValueDictionary()  # storages by id, each counted once

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {id(storage) for storage in storages((args, kwargs))}
        out = function(*args, **(kwargs or {}))
        for storage in storages(out):
            if id(storage) in given or id(storage) in self.seen:
                continue
            self.seen[id(storage)] = storage
            weakref.finalize(storage, self.free, storage.nbytes())
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
        return out

    def free(self, size: int) -> None:
        self.now -= size


def storages(tree) -> list:
    """Lists the memory behind all tensors in a nest of lists and dicts."""
    return [x.untyped_storage() for x in tree_leaves(tree) if isinstance(x, Tensor)]


def peak_bytes_of(function: Callable, device: str) -> int:
    """Measures the memory that one call takes at most, beyond what was taken before it."""
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with PeakBytes() as mode:
        function()
    return mode.peak


def cell(value) -> str:
    """Writes one cell of a table."""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return "" if value is None else str(value)
