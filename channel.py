"""The data plane and the weight plane: `SlotPool`, `IndexQueue`, `WeightPlane`, and the small
`Counters` table.

Tensors are written once, in place, into preallocated shared memory; only 8-byte records travel
between processes. All of it is made by the launcher and handed to workers as arguments of
`Process`: file descriptors and CUDA IPC handles are opened once, at start-up.

Shared memory is anonymous (`memfd_create`): it has no name to unlink, so nothing is left behind
even after SIGKILL, and it is not limited by the size of /dev/shm (CUDA IPC keeps small files of its
own there). Left out: crossing machines (only gradients do, through torch.distributed).

    python bench.py transport weights
"""

import copy
import math
import mmap
import os
import select
import struct
import threading
import time
from multiprocessing.reduction import DupFd
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

Spec = dict[str, tuple[tuple[int, ...], torch.dtype]]
OBSERVED = (
    "image",
    "tokens",
    "state",
)  # fields that may be part of an observation; a model uses some of them
ALIGN = 64  # bytes; a cache line, so that no two tensors share one


class Arena:
    """One anonymous shared mapping that survives pickling to a child process."""

    def __init__(self, size: int):
        self.size = max(size, mmap.PAGESIZE)
        self.fd = os.memfd_create("vla3")
        os.ftruncate(self.fd, self.size)
        self._map()
        # First touch: fresh shared memory fills at 0.5 GB/s, afterwards it is written at memory
        # speed.
        np.frombuffer(self.memory, np.uint8)[:: mmap.PAGESIZE] = 0

    def _map(self) -> None:
        self.memory = mmap.mmap(self.fd, self.size)

    def tensor(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        count = int(np.prod(shape, dtype=np.int64))
        if count == 0:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(self.memory, dtype=dtype, count=count, offset=offset).view(shape)

    def pin(self) -> None:
        """Page-locks the mapping for fast copies to and from the GPU. Called by processes that own
        a CUDA context.
        """
        address = np.frombuffer(self.memory, np.uint8).ctypes.data
        error = torch.cuda.cudart().cudaHostRegister(address, self.size, 0)
        if int(error) != 0:
            raise RuntimeError(
                f"cudaHostRegister of {self.size} bytes failed with error {error}: raise `ulimit "
                "-l`"
            )

    def __getstate__(self):
        return {"size": self.size, "dup": DupFd(self.fd)}

    def __setstate__(self, state):
        self.size = state["size"]
        self.fd = state["dup"].detach()
        self._map()

    def __del__(self):
        if getattr(self, "fd", -1) >= 0:
            os.close(self.fd)  # the mapping lives as long as the tensors on it
            self.fd = -1


def bits(tensor: Tensor) -> np.ndarray:
    """A tensor on the CPU as numpy sees it; bf16, unknown there, as int16."""
    return (tensor.view(torch.int16) if tensor.dtype is torch.bfloat16 else tensor).numpy()


def layout(spec: Spec, slots: int) -> tuple[dict[str, int], int]:
    """Byte offset of every field's [slots, *shape] block, and the size of them all."""
    offsets = {}
    size = 0
    for name, (shape, dtype) in spec.items():
        offsets[name] = size
        count = slots * int(np.prod(shape, dtype=np.int64))
        size += -(-count * dtype.itemsize // ALIGN) * ALIGN
    return offsets, size


class SlotPool:
    """`pool["image"]` is one tensor [slots, *shape] that every process sees at the same place.

    spec: name → (shape, dtype). device "cpu": anonymous shared memory, page-locked where a GPU is
    used (`pin`). "cuda:k": the fields `on_device` (none given: all) are one allocation each, shared
    by CUDA IPC when the pool is passed to a process; the others, which processes read and write
    element by element, stay in shared memory.
    """

    def __init__(
        self, spec: Spec, slots: int, device: str = "cpu", on_device: tuple[str, ...] = ()
    ):
        self.spec = spec
        self.slots = slots
        self.device = device
        there = () if device == "cpu" else on_device or tuple(spec)
        self.gpu = {
            n: torch.zeros((slots, *spec[n][0]), dtype=spec[n][1], device=device) for n in there
        }
        self.offsets, self.bytes = layout(
            {name: kind for name, kind in spec.items() if name not in there}, slots
        )
        self.arena = Arena(self.bytes) if self.offsets else None
        self.pinned = False
        self._view()

    def _view(self) -> None:
        at = {
            name: (self.offsets[name], (self.slots, *self.spec[name][0]), self.spec[name][1])
            for name in self.offsets
        }
        self.tensors = self.gpu | {name: self.arena.tensor(*where) for name, where in at.items()}
        self.arrays = {
            name: bits(self.tensors[name]) for name in at
        }  # copies a few small rows in half of torch's time

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def gather(self, name: str, slots: np.ndarray, rows: np.ndarray | None = None) -> Tensor:
        """A copy of whole slots [n, rows, …], or of one row of each [n, …]: page-locked where the
        pool is.
        """
        if name in self.arrays and not self.pinned:
            found = torch.from_numpy(self.arrays[name][slots if rows is None else (slots, rows)])
            return found if found.dtype is self.spec[name][1] else found.view(self.spec[name][1])
        tensor = self[name]
        if rows is not None:
            tensor, slots = tensor.flatten(0, 1), slots * tensor.shape[1] + rows
        out = torch.empty(
            (len(slots), *tensor.shape[1:]),
            dtype=tensor.dtype,
            device=tensor.device,
            pin_memory=not tensor.is_cuda,
        )
        return torch.index_select(tensor, 0, torch.from_numpy(slots).to(tensor.device), out=out)

    def put(self, name: str, slots: np.ndarray, rows: np.ndarray, values: Tensor) -> None:
        """Writes values [n, …], from whatever device, into a row of each slot [n]."""
        tensor = self[name]
        values = values.to(tensor.device, tensor.dtype)
        if name in self.arrays:
            self.arrays[name][slots, rows] = bits(values)
        else:
            tensor[torch.from_numpy(slots), torch.from_numpy(rows)] = values

    def pin(self) -> None:
        if self.arena is not None:
            self.arena.pin()
            self.pinned = True

    def __getstate__(self):
        return {
            name: value
            for name, value in self.__dict__.items()
            if name not in ("tensors", "arrays")
        }

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._view()


class Record(NamedTuple):
    """What travels: which slot, which row of it, what for, and who asks. It speaks for a whole
    lane, whose first slot it names.
    """

    slot: int
    t: int
    kind: int
    sender: int


RECORD = struct.Struct("<IHBB")  # 8 bytes
# Kinds. LAST is a VALUE that the lane does not wait for, FINAL asks for the value of an episode's
# last observation; DONE says that a trajectory is over; RESTART says that `sender` replaces a dead
# worker, and is echoed.
ACT, VALUE, EVAL, DONE, VERSION, LAST, RESTART, FINAL = range(8)
ATOMIC = 4096 // RECORD.size  # records in one write that the kernel keeps together (PIPE_BUF)


class IndexQueue:
    """Many writers, one reader, 8-byte records through a pipe.

    Writes of at most 4096 bytes are atomic, so a writer killed at any moment can neither hold a
    lock nor tear a record. The reader sees the end of the file once the last writer is gone
    (`Closed`).
    """

    class Closed(Exception):
        """Every writer of this queue is gone."""

    def __init__(self):
        self.reader, self.writer = os.pipe()
        os.set_blocking(self.reader, False)
        os.set_blocking(self.writer, False)

    def fileno(self) -> int:
        return self.reader

    def put(self, records: list[Record], timeout: float = 60.0) -> None:
        """Writes records; those of one call of at most 512 stay together. Raises TimeoutError when
        the reader is stuck.
        """
        deadline = time.monotonic() + timeout
        for start in range(0, len(records), ATOMIC):
            data = b"".join(RECORD.pack(*record) for record in records[start : start + ATOMIC])
            while True:
                try:
                    os.write(
                        self.writer, data
                    )  # whole or, when the pipe is too full for it, not at all
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise TimeoutError(
                            f"a queue of requests stayed full for {timeout:.0f} s: its reader is "
                            "stuck"
                        ) from None
                    select.select(
                        [], [self.writer], [], 0.1
                    )  # says that there is room, which another writer may take first

    def get(self, timeout: float | None) -> list[Record]:
        """Every queued record; waits up to `timeout` seconds for the first and returns [] when none
        came.
        """
        try:
            data = os.read(self.reader, 65536)
        except BlockingIOError:
            if (
                timeout is not None
                and timeout <= 0
                or not select.select([self.reader], [], [], timeout)[0]
            ):
                return []
            return self.get(0.0)
        if not data:
            raise IndexQueue.Closed
        return [Record(*fields) for fields in RECORD.iter_unpack(data)]

    def close_writer(self) -> None:
        """The reader's process calls this, so that it does not keep its own queue open."""
        if self.writer >= 0:
            os.close(self.writer)
        self.writer = -1

    def close_reader(self) -> None:
        if self.reader >= 0:
            os.close(self.reader)
        self.reader = -1

    def __getstate__(self):
        return {"reader": DupFd(self.reader), "writer": DupFd(self.writer)}

    def __setstate__(self, state):
        self.reader = state["reader"].detach()
        self.writer = state["writer"].detach()

    def __del__(self):
        for fd in (getattr(self, "reader", -1), getattr(self, "writer", -1)):
            if fd >= 0:
                os.close(fd)


class WeightPlane:
    """Two buffers and a version. One writer publishes into the older buffer; any number of readers
    copy the newer one.

    A reader that is overtaken twice while it copies would see mixed weights; the stamps of a
    buffer, checked before and after the copy, tell it so and it tries again. Neither side ever
    waits for the other.

    A set of weights is one block of bytes with the tensors as views on it, so that fetching is a
    single copy at memcpy's speed: tensor by tensor it takes 1.7 times as long.

    spec: name → (shape, dtype) of the trainable weights. Version 0 is what the checkpoint holds.
    """

    def __init__(self, spec: Spec, device: str = "cpu", version: int = 0):
        self.spec = spec
        self.offsets, self.bytes = layout(spec, 1)  # of one set of weights
        self.buffers = SlotPool({"set": ((self.bytes,), torch.uint8)}, 2, device)
        self.header = Arena(4 * 8)
        self._view()
        self.stamps[:] = -1  # of no version: neither buffer can be fetched yet
        self.published[0] = version - 1

    def _view(self) -> None:
        header = self.header.tensor(0, (4,), torch.int64).numpy()
        self.published = header[:1]
        self.stamps = header[1:3]
        if self.buffers is None:
            return
        self.blocks = list(self.buffers["set"])
        self.sides = [self.tensors(block) for block in self.blocks]
        if self.buffers.device == "cpu":
            self.blocks = [block.numpy() for block in self.blocks]

    def tensors(self, block: Tensor) -> dict[str, Tensor]:
        """The weights that lie in a block [bytes] of uint8, by name."""
        sizes = {
            name: math.prod(shape) * dtype.itemsize for name, (shape, dtype) in self.spec.items()
        }
        return {
            name: block[self.offsets[name] : self.offsets[name] + sizes[name]]
            .view(dtype)
            .view(shape)
            for name, (shape, dtype) in self.spec.items()
        }

    def watch(self) -> "WeightPlane":
        """The version without the weights, for processes that only wait for it: opens no GPU."""
        other = copy.copy(self)
        other.buffers = None
        other.blocks = []
        other.sides = []
        return other

    @property
    def version(self) -> int:
        """The newest published version; before the first, the one before it."""
        return int(self.published[0])

    @property
    def empty(self) -> bool:
        """Whether nothing was ever published, so that there is nothing to fetch."""
        return bool((self.stamps < 0).all())

    def publish(self, weights: dict[str, Tensor], version: int) -> None:
        """Copies `weights` into the older buffer and makes it the newest. Only one process may call
        this.
        """
        side = version % 2
        self.stamps[
            side
        ] = -1  # invalidate → copy → stamp → publish; x86 and ARM's aligned 8-byte stores are whole
        fence()
        for name, tensor in weights.items():
            self.sides[side][name].copy_(tensor.detach(), non_blocking=True)
        synchronize(self.buffers.device)
        self.stamps[side] = version
        fence()
        self.published[0] = version

    def fetch(self, into: np.ndarray | Tensor, timeout: float = 60.0) -> int:
        """Copies the newest weights into the block `into` [bytes] and returns their version, never
        a mixture of two.

        into: a numpy array where it and the plane are on the CPU, which is a plain memcpy; else a
        tensor.
        """
        deadline = time.monotonic() + timeout
        while True:
            version = self.version
            side = version % 2
            if version >= 0 and self.stamps[side] == version:
                if isinstance(into, np.ndarray):
                    np.copyto(into, self.blocks[side])
                else:
                    into.copy_(self.buffers["set"][side], non_blocking=True)
                    synchronize(str(into.device))
                fence()
                if self.stamps[side] == version:
                    return version
            if time.monotonic() > deadline:
                raise TimeoutError(f"no weights came from the actor within {timeout:.0f} s")
            time.sleep(0)

    def __getstate__(self):
        return {
            "spec": self.spec,
            "offsets": self.offsets,
            "bytes": self.bytes,
            "buffers": self.buffers,
            "header": self.header,
        }

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._view()


_LOCK = threading.Lock()


def fence() -> None:
    """A full memory barrier: taking and releasing any lock is one, on every architecture CPython
    runs on.
    """
    with _LOCK:
        pass


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.current_stream(device).synchronize()


class Counters:
    """A table of float64 in shared memory, one row per worker, each row written by its worker alone
    and read by anyone.
    """

    def __init__(self, rows: int, columns: tuple[str, ...]):
        self.columns = columns
        self.rows = rows
        self.arena = Arena(rows * len(columns) * 8)
        self._view()

    def _view(self) -> None:
        self.table = self.arena.tensor(0, (self.rows, len(self.columns)), torch.float64).numpy()
        self.index = {name: i for i, name in enumerate(self.columns)}
        self.cells = memoryview(self.arena.memory).cast(
            "d"
        )  # the same; one number takes a fourth of the time it takes numpy

    def add(self, row: int, column: str, amount: float) -> None:
        self.cells[row * len(self.columns) + self.index[column]] += amount

    def set(self, row: int, column: str, value: float) -> None:
        self.cells[row * len(self.columns) + self.index[column]] = value

    def get(self, row: int, column: str) -> float:
        return self.cells[row * len(self.columns) + self.index[column]]

    def __getstate__(self):
        return {"columns": self.columns, "rows": self.rows, "arena": self.arena}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._view()


class Channels(NamedTuple):
    """Everything that connects the stages; the launcher makes one and passes it to every worker."""

    pool: SlotPool
    plane: WeightPlane
    counters: Counters
    requests: tuple[IndexQueue, ...]  # to each rollout worker
    replies: tuple[IndexQueue, ...]  # to each env worker
    finished: tuple[IndexQueue, ...]  # to each actor rank
