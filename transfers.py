"""Between the slots and the device that computes: every copy, and who waits for it.

On a CPU numpy gathers rows of slots, and nothing else is copied. A GPU copies by itself, while the
host goes on, from and to page-locked memory alone. That is of two kinds here:

    large rows (STRAIGHT)  the slots themselves: one copy for each run of rows that lie side by side
    everything else        blocks that torch keeps, and gives out again once the copies from them
                           are done (its CachingHostAllocator): a ring that needs no upkeep

cudaHostRegister page-locks memory for the calling process alone: what another process has locked is
pageable here, although it is the same memory (CUDA driver API, cuMemHostRegister: what is
"portable" is so among the contexts of a process). So each process locks what it copies, once, and
no more of it than the fields that go straight.

Left out: memory that all processes of a node lock together. CUDA can share such memory
(cuMemCreate, CU_MEM_LOCATION_TYPE_HOST_NUMA), but only with processes that have a context, which
simulators should not need.
"""

import math
import mmap
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from channel import SlotPool, bits, synchronize

# Bytes of a row from which on a copy of its own pays: to queue one takes the host about 5 µs, in
# which it would gather 64 KiB by itself.
STRAIGHT = 2**16


# ---------------------------------------------------------------- slots on the host


def gather(pool: SlotPool, name: str, slots: np.ndarray, rows: np.ndarray | None = None) -> Tensor:
    """Copies whole slots [n, rows, …], or one row of each [n, …], of a field on the host."""
    found = torch.from_numpy(pool.arrays[name][slots if rows is None else (slots, rows)])
    return found.view(pool.spec[name][1])  # bf16, which numpy takes for int16


def put(pool: SlotPool, name: str, slots: np.ndarray, rows: np.ndarray, values: Tensor) -> None:
    """Writes values [n, …], which are on the host, into a row of each slot [n]."""
    pool.arrays[name][slots, rows] = bits(values.to(pool.spec[name][1]))


# ---------------------------------------------------------------- page-locked memory


def page_locked(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Returns memory that a GPU copies from or to by itself, out of the blocks that torch keeps."""
    return torch.empty(shape, dtype=dtype, pin_memory=True)


def lock(pool: SlotPool, names: tuple[str, ...], device: str) -> None:
    """Page-locks those of these fields that go straight, for this process. Raises RuntimeError
    where the system does not allow it."""
    if device == "cpu":
        return
    sizes = {name: math.prod(pool.spec[name][0][1:]) * pool[name].itemsize for name in names}
    large = [name for name in names if name in pool.arrays and sizes[name] >= STRAIGHT]

    # Whole pages, and fields side by side as one range: no copy may reach over its end.
    ranges: list[list[int]] = []
    for name in sorted(large, key=pool.offsets.__getitem__):
        first = pool.offsets[name] // mmap.PAGESIZE * mmap.PAGESIZE
        end = -(-(pool.offsets[name] + pool[name].nbytes) // mmap.PAGESIZE) * mmap.PAGESIZE
        if ranges and first <= ranges[-1][1]:
            ranges[-1][1] = end
        else:
            ranges.append([first, end])
    for first, end in ranges:
        pool.arena.pin(first, end)
    pool.locked = frozenset(large)


def goes_straight(pool: SlotPool, name: str) -> bool:
    """Whether a field is copied between its slots and a device without a stop on the host."""
    return name in pool.locked or name in pool.gpu


# ---------------------------------------------------------------- to the device and back


def send(tensor: Tensor, device: str) -> Tensor:
    """Returns a small tensor on the device, where it may be already. The host does not wait."""
    if device == "cpu" or not tensor.is_cpu:
        return tensor
    stop = page_locked(tensor.shape, tensor.dtype).copy_(tensor)
    return torch.empty_like(stop, device=device).copy_(stop, non_blocking=True)


def runs(rows: np.ndarray) -> list[tuple[slice, slice]]:
    """Returns every run of successive numbers in `rows` [m]: where it stands in it, and which
    numbers they are."""
    edges = [0, *(np.flatnonzero(np.diff(rows) != 1) + 1).tolist(), len(rows)]
    return [(slice(i, j), slice(rows[i], rows[i] + j - i)) for i, j in pairwise(edges)]


def read(
    pool: SlotPool, names: tuple[str, ...], slots: np.ndarray, rows: np.ndarray, device: str
) -> dict[str, Tensor]:
    """Returns one row of each slot [m, …], on the device. The host does not wait."""
    found = {}
    for name in names:
        if not goes_straight(pool, name):
            found[name] = send(gather(pool, name, slots, rows), device)
            continue
        source = pool[name].flatten(0, 1)
        found[name] = source.new_empty((len(slots), *source.shape[1:]), device=device)
        for there, here in runs(slots * pool.spec[name][0][0] + rows):
            found[name][there].copy_(source[here], non_blocking=True)
    return found


def bring_back(
    pool: SlotPool,
    results: dict[str, Tensor],
    chosen: list[int],
    slots: np.ndarray,
    rows: np.ndarray,
    device: str,
) -> dict[str, Tensor]:
    """Returns results [n, …] on the host, which waits here until all are there.

    Those that go straight are written into one row of each of the chosen ones' slots instead, and
    are left out."""
    if device == "cpu":
        return results
    straight = {name for name in results if goes_straight(pool, name)}
    for name in straight:
        for i in chosen:
            pool[name][slots[i], rows[i]].copy_(results[name][i], non_blocking=True)
    return copy_to_host({name: x for name, x in results.items() if name not in straight}, device)


def copy_to_host(tensors: dict[Any, Tensor], device: str) -> dict[Any, Tensor]:
    """Returns copies on the host, which waits here until all that was queued is done."""
    if device == "cpu":
        return {name: tensor.clone() for name, tensor in tensors.items()}
    copies = {
        name: page_locked(tensor.shape, tensor.dtype).copy_(tensor, non_blocking=True)
        for name, tensor in tensors.items()
    }
    synchronize(device)
    return copies


class Numbers:
    """Numbers [] of any types on their way from a device to the host, as one tensor."""

    def __init__(self, numbers: Sequence[Tensor]):
        together = torch.stack([number.detach().double() for number in numbers])
        self.here = page_locked(together.shape, together.dtype).copy_(together, non_blocking=True)
        # Whoever waits for this sleeps: simulators need the core.
        self.arrived = torch.cuda.Event(blocking=True)
        self.arrived.record(torch.cuda.current_stream(together.device))

    def read(self) -> list[float]:
        """Waits for them."""
        self.arrived.synchronize()
        return self.here.tolist()


# ---------------------------------------------------------------- trajectories that are trained


class Carrier:
    """Brings trajectories to the device that trains them: the next ones travel on a side stream
    while the present ones are trained. On a CPU nothing travels ahead.

    The slots must keep what they hold until the trajectories have been trained: whoever trains has
    waited for the copies by then."""

    def __init__(self, pool: SlotPool, names: tuple[str, ...], segment: int, device: str):
        """names: of the fields that travel; segment: T, chunk steps of a trajectory."""
        self.pool = pool
        self.names = names
        self.segment = segment
        self.device = device
        self.ahead = device != "cpu"  # whether `begin` pays
        self.stream = torch.cuda.Stream(device) if self.ahead else None
        self.slots: tuple[int, ...] = ()  # whose trajectories are on their way
        self.tensors: dict[str, Tensor] = {}
        self.arrived: torch.cuda.Event | None = None
        lock(pool, names, device)

    def begin(self, slots: tuple[int, ...]) -> None:
        """Lets the trajectories in these slots travel."""
        count = len(slots)
        steps = np.tile(np.arange(self.segment), count)
        places = np.repeat(np.array(slots), self.segment)
        with torch.cuda.stream(self.stream):
            flat = read(self.pool, self.names, places, steps, self.device)
            self.arrived = self.stream.record_event()
        self.tensors = {name: x.unflatten(0, (count, self.segment)) for name, x in flat.items()}
        self.slots = slots

    def take(self, slots: tuple[int, ...]) -> dict[str, Tensor]:
        """Returns the trajectories in these slots [n, T or T + 1, …], which may be on their way.
        What is computed with them from now on waits for them; the host does not."""
        if not self.ahead:
            return {name: gather(self.pool, name, np.array(slots)) for name in self.names}
        if self.slots != slots:
            self.begin(slots)
        computing = torch.cuda.current_stream(self.device)
        computing.wait_event(self.arrived)
        for tensor in self.tensors.values():
            tensor.record_stream(computing)  # its memory is not given out again before that is done
        self.slots = ()
        taken = self.tensors
        self.tensors = {}
        return taken
