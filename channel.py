"""The data plane: everything that processes share, but for the weights (weights.py).

`SlotPool` holds the trajectories, `IndexQueue` wakes whoever waits, `LaneTable` says where every
lane is, `Counters` are numbers for the launcher. `Channels` is all of it together.

Facts live in shared memory, and a record only says "look there". One that is lost with a killed
worker, or comes twice, therefore changes nothing: a request is lost only with who asks or answers.
Tensors are written once, in place, into preallocated slots; only records of 10 bytes travel. The
launcher makes all of it and hands it to workers as arguments of `Process`: file descriptors and
CUDA IPC handles are opened once.

Shared memory is anonymous (`memfd_create`): it has no name to unlink, so nothing is left behind
even after SIGKILL, and it is not limited by the size of /dev/shm (CUDA IPC keeps small files of its
own there).

Left out: crossing machines (only gradients do, through torch.distributed).

    python bench.py transport
"""

import math
import mmap
import os
import select
import struct
import threading
import time
from itertools import groupby
from multiprocessing.reduction import DupFd
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

import machine
from config import Config
from errors import UserError

if TYPE_CHECKING:
    from weights import WeightPlane

Spec = dict[str, tuple[tuple[int, ...], torch.dtype]]
ALIGN = 64  # bytes; a cache line, so that no two tensors share one
Part = tuple[int, int, frozenset[int]]  # first byte, bytes, cores of the NUMA node to have it on
PIECE = 2**28  # bytes that are taken at a time, in 0.1 s
SILENT_S = 2.0  # taking memory for longer than this says how far it is


def take_memory(file: int, size: int, parts: list[Part]) -> None:
    """Gives a file of shared memory its pages, in a third of the time that writing to each takes.

    A page comes from the node of the core that asks for it. Raises UserError where memory ends."""
    taken = 0
    said = time.monotonic()
    before = os.sched_getaffinity(0)
    try:
        os.ftruncate(file, size)
        for first, length, cores in sorted(parts, key=lambda part: min(part[2])):
            os.sched_setaffinity(0, cores)
            for start in range(first, first + length, PIECE):
                piece = min(PIECE, first + length - start)
                os.posix_fallocate(file, start, piece)
                taken += piece
                if time.monotonic() > said + SILENT_S:
                    said = time.monotonic()
                    print(f"{taken / 1e9:.1f} of {size / 1e9:.1f} GB of memory ready", flush=True)
    except OSError as error:
        got = f"only {taken / 1e9:.1f} of {size / 1e9:.1f} GB of shared memory could be had"
        less = "lower --envs, --eval-envs, --batch or --segment"
        raise UserError(f"{got} ({error.strerror}): {less}") from None
    finally:
        os.sched_setaffinity(0, before)


class Arena:
    """One anonymous shared mapping that survives pickling to a child process."""

    def __init__(self, size: int, parts: list[Part] | None = None):
        self.size = max(size, mmap.PAGESIZE)
        self.fd = os.memfd_create("vla3")
        take_memory(self.fd, self.size, parts or [(0, self.size, machine.near("cpu"))])
        self._map()

    def _map(self) -> None:
        self.memory = mmap.mmap(self.fd, self.size)

    def tensor(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        count = int(np.prod(shape, dtype=np.int64))
        if count == 0:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(self.memory, dtype=dtype, count=count, offset=offset).view(shape)

    def pin(self, first: int = 0, end: int | None = None) -> None:
        """Page-locks bytes of the mapping, whole pages, for copies by a GPU: in the process that
        calls this alone, which owns a CUDA context. Takes tenths of a second per GB."""
        address = np.frombuffer(self.memory, np.uint8).ctypes.data
        size = (end or self.size) - first
        error = torch.cuda.cudart().cudaHostRegister(address + first, size, 0)
        if int(error) != 0:
            failed = f"cudaHostRegister of {size} bytes failed with error {error}"
            raise RuntimeError(f"{failed}: raise `ulimit -l`")

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


_LOCK = threading.Lock()


def fence() -> None:
    """A full memory barrier: taking and releasing any lock is one, on every architecture CPython
    runs on."""
    with _LOCK:
        pass


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.current_stream(device).synchronize()


class Shared:
    """What the launcher makes and passes to processes: `KEPT` travels, and each process makes views
    of its own on it."""

    KEPT: tuple[str, ...]

    def __getstate__(self):
        return {name: getattr(self, name) for name in self.KEPT}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._view()


class SlotPool(Shared):
    """`pool["image"]` is one tensor [slots, *shape] that every process sees at the same place.

    spec: name → (shape, dtype). device "cpu": anonymous shared memory. "cuda:k": the fields
    `on_device` (none given: all) are one allocation each, shared by CUDA IPC when the pool is
    passed to a process; the others, which processes read and write element by element, stay in
    shared memory. near: of every slot, cores of the NUMA node that is to have it. What is copied to
    a device and back: transfers.py."""

    KEPT = ("spec", "slots", "device", "gpu", "offsets", "bytes", "arena")

    def __init__(
        self,
        spec: Spec,
        slots: int,
        device: str = "cpu",
        on_device: tuple[str, ...] = (),
        near: list[frozenset[int]] | None = None,
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
        self.arena = Arena(self.bytes, self.parts(near or [])) if self.offsets else None
        self._view()

    def parts(self, near: list[frozenset[int]]) -> list[Part]:
        """Lists the runs of slots, in every field, that belong to one NUMA node."""
        found = []
        for name, first in self.offsets.items():
            shape, dtype = self.spec[name]
            for cores, run in groupby(near):
                length = len(list(run)) * math.prod(shape) * dtype.itemsize
                found.append((first, length, cores))
                first += length
        return found

    def _view(self) -> None:
        at = {
            name: (self.offsets[name], (self.slots, *self.spec[name][0]), self.spec[name][1])
            for name in self.offsets
        }
        self.tensors = self.gpu | {name: self.arena.tensor(*where) for name, where in at.items()}
        # numpy copies a few small rows in half of torch's time.
        self.arrays = {name: bits(self.tensors[name]) for name in at}
        self.locked: frozenset[str] = frozenset()  # fields that this process has page-locked

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]


class Record(NamedTuple):
    """Says where to look: it speaks for a whole lane, whose first slot it names."""

    slot: int
    t: int  # chunk step of the trajectory (of evaluation: of the episode)
    kind: int  # one of those below
    sender: int  # rank of the env worker that asks
    generation: int  # how often it and the rollout worker, together, had been replaced by then


RECORD = struct.Struct("<IHBBH")  # 10 bytes
ATOMIC = 4096 // RECORD.size  # records in one write that the kernel keeps together (PIPE_BUF)
READ = 65536 // RECORD.size * RECORD.size  # bytes of one read: whole records, a pipe's fill of them
# What a request asks for; its answer is the same record, sent back.
ACT = 0  # actions for row t
VALUE = 1  # the value of row T, which completes a trajectory
FINAL = 2  # the value of an episode's last observation, which the next row holds for a moment
EVAL = 3  # actions without exploration, in row 0 of an evaluation slot
WAKE = 4  # nothing: the reader looks at what it waits for


class IndexQueue:
    """Carries records through a pipe from many writers to one reader.

    Writes of at most 4096 bytes are atomic, so a writer killed at any moment can neither hold a
    lock nor tear a record. The reader sees the end of the file once the last writer is gone
    (`Closed`)."""

    class Closed(Exception):
        """Every writer of this queue is gone."""

    def __init__(self):
        self.reader, self.writer = os.pipe()
        os.set_blocking(self.reader, False)
        os.set_blocking(self.writer, False)

    def fileno(self) -> int:
        return self.reader

    def put(self, records: list[Record], timeout: float = 60.0) -> None:
        """Writes records; those of one call of at most 409 stay together. Raises TimeoutError when
        the reader is stuck."""
        waited = 0.0  # seconds, without those in which this process was suspended
        for start in range(0, len(records), ATOMIC):
            data = b"".join(RECORD.pack(*record) for record in records[start : start + ATOMIC])
            while not self.write(data):
                if waited > timeout:
                    raise TimeoutError(
                        f"a queue of requests stayed full for {timeout:.0f} s: its reader is stuck"
                    )
                # Waits for room, which another writer may take first.
                began = time.monotonic()
                select.select([], [self.writer], [], 0.1)
                waited += min(0.1, time.monotonic() - began)

    def write(self, data: bytes) -> bool:
        """Writes all of it, or where the pipe is too full for that nothing. Returns whether it
        did."""
        try:
            os.write(self.writer, data)
        except BlockingIOError:
            return False
        return True

    def get(self, timeout: float | None) -> list[Record]:
        """Every queued record; waits up to `timeout` seconds for the first and returns [] when none
        came."""
        try:
            data = os.read(self.reader, READ)
        except BlockingIOError:
            at_once = timeout is not None and timeout <= 0
            if at_once or not select.select([self.reader], [], [], timeout)[0]:
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

    def __getstate__(self):
        return {"reader": DupFd(self.reader), "writer": DupFd(self.writer)}

    def __setstate__(self, state):
        self.reader = state["reader"].detach()
        self.writer = state["writer"].detach()

    def __del__(self):
        for fd in (getattr(self, "reader", -1), getattr(self, "writer", -1)):
            if fd >= 0:
                os.close(fd)


class Writer:
    """A queue on its way to a process that only writes to it: it gets half of the descriptors, of
    which 253 at most can be sent to a process (SCM_MAX_FD of Linux)."""

    def __init__(self, queue: IndexQueue):
        self.queue = queue

    def __reduce__(self):
        return queue_to_write, (DupFd(self.queue.writer),)


def queue_to_write(writer) -> IndexQueue:
    queue = IndexQueue.__new__(IndexQueue)
    queue.reader = -1
    queue.writer = writer.detach()
    return queue


class Counters(Shared):
    """A table of float64 in shared memory, one row per worker. A worker writes its row; the
    launcher writes what it decides for a worker, into columns of its own."""

    KEPT = ("columns", "rows", "arena")

    def __init__(self, rows: int, columns: tuple[str, ...]):
        self.columns = columns
        self.rows = rows
        self.arena = Arena(rows * len(columns) * 8)
        self._view()

    def _view(self) -> None:
        self.table = self.arena.tensor(0, (self.rows, len(self.columns)), torch.float64).numpy()
        self.index = {name: i for i, name in enumerate(self.columns)}
        # The same; one number takes a fourth of the time it takes numpy.
        self.cells = memoryview(self.arena.memory).cast("d")

    def add(self, row: int, column: str, amount: float) -> None:
        self.cells[row * len(self.columns) + self.index[column]] += amount

    def set(self, row: int, column: str, value: float) -> None:
        self.cells[row * len(self.columns) + self.index[column]] = value

    def get(self, row: int, column: str) -> float:
        return self.cells[row * len(self.columns) + self.index[column]]


class LaneTable(Shared):
    """Where every lane is, and who serves it. Each number is written by one worker, and read by
    those of the other stage."""

    KEPT = ("sizes", "arena")

    def __init__(self, lanes: int, env_workers: int, rollout_workers: int):
        self.sizes = lanes, env_workers, rollout_workers
        self.arena = Arena(8 * sum(self.sizes))
        self._view()

    def _view(self) -> None:
        lanes, env_workers, _ = self.sizes
        # The one that the lane plays, or waits to begin.
        self.trajectory = self.arena.tensor(0, (lanes,), torch.int64).numpy()
        # How often each worker was replaced. It is read one by one.
        numbers = memoryview(self.arena.memory).cast("q")[lanes : sum(self.sizes)]
        self.generation = numbers[:env_workers]
        self.rollout_generation = numbers[env_workers:]


class Channels(NamedTuple):
    """Everything that connects the stages; the launcher makes one and passes it to every worker."""

    pool: SlotPool
    plane: "WeightPlane"
    counters: Counters
    lanes: LaneTable
    requests: tuple[IndexQueue, ...]  # to each rollout worker
    replies: tuple[IndexQueue, ...]  # to each env worker
    finished: tuple[IndexQueue, ...]  # to each actor rank

    @classmethod
    def create(cls, config: Config, pool: SlotPool, plane, counters: Counters) -> "Channels":
        """Makes the queues and the lane table that a completed config asks for."""
        env = config.env
        return cls(
            pool,
            plane,
            counters,
            LaneTable(env.envs // env.width, env.env_workers, config.rollout.rollout_workers),
            tuple(IndexQueue() for _ in range(config.rollout.rollout_workers)),
            tuple(IndexQueue() for _ in range(env.env_workers)),
            tuple(IndexQueue() for _ in range(config.actor.actor_workers)),
        )

    def of_worker(self, stage: str, rank: int) -> "Channels":
        """Returns what a worker uses of it: the queue that it reads, and the writing ends of
        others', which leaves room for those of some hundred env workers."""
        requests, replies, finished = (
            tuple(map(Writer, queues)) for queues in (self.requests, self.replies, self.finished)
        )
        plane = self.plane
        if stage == "env":
            replies = {rank: self.replies[rank]}
            plane = plane.watch()  # it waits for a version, and does not fetch it
        elif stage == "rollout":
            requests = {rank: self.requests[rank]}
            finished = ()
        else:
            finished = {rank: self.finished[rank]}
        return self._replace(requests=requests, replies=replies, finished=finished, plane=plane)
