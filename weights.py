"""The weight plane: how new weights get from the actor to the rollout workers.

`WeightPlane` is two buffers and a version in shared memory. `WeightFetcher` is a rollout worker's
side of it: a thread copies new weights into spare memory while the old ones go on serving, and
`swap` makes them the model's between two batches.

Paper: D-VLA, weight plane. Left out: crossing machines (every node has an actor of its own).

    python bench.py weights
"""

import contextlib
import copy
import math
import threading
import time
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from channel import Arena, Shared, SlotPool, Spec, fence, layout, synchronize


class WeightPlane(Shared):
    """Two buffers and a version. One writer publishes into the older buffer; any number of readers
    copy the newer one.

    A reader that is overtaken twice while it copies would see mixed weights; the stamps of a
    buffer, checked before and after the copy, tell it so and it tries again. Neither side ever
    waits for the other.

    A set of weights is one block of bytes with the tensors as views on it, so that fetching is a
    single copy at memcpy's speed: tensor by tensor it takes 1.7 times as long.

    It lies on a GPU where all who use it are there, else on the host, page-locked by those with a
    GPU (`use_on`): who opens another one's memory has a context there, too.

    spec: name → (shape, dtype) of the trainable weights. Version 0 is what the checkpoint holds;
    until it is published the version is −1, so K batches may start before there are weights."""

    KEPT = ("spec", "offsets", "bytes", "buffers", "header")

    def __init__(self, spec: Spec, device: str = "cpu", version: int = 0):
        self.spec = spec
        self.offsets, self.bytes = layout(spec, 1)  # of one set of weights
        self.buffers = SlotPool({"set": ((self.bytes,), torch.uint8)}, 2, device)
        self.header = Arena(4 * 8)
        self._view()
        self.stamps[:] = -1  # of no version: neither buffer can be fetched yet
        self.published[0] = version - 1

    def _view(self) -> None:
        # `published` is read all the time: a memoryview takes a sixth of the time of numpy.
        self.published = memoryview(self.header.memory).cast("q")[:1]
        self.stamps = self.header.tensor(8, (2,), torch.int64).numpy()
        if self.buffers is None:
            return
        self.blocks = list(self.buffers["set"])
        self.sides = [self.tensors(block) for block in self.blocks]
        if self.buffers.device == "cpu":
            self.blocks = [block.numpy() for block in self.blocks]

    def tensors(self, block: Tensor) -> dict[str, Tensor]:
        """The weights that lie in a block [bytes] of uint8, by name."""
        found = {}
        for name, (shape, dtype) in self.spec.items():
            start = self.offsets[name]
            end = start + math.prod(shape) * dtype.itemsize
            found[name] = block[start:end].view(dtype).view(shape)
        return found

    def use_on(self, device: str) -> None:
        """Page-locks a plane on the host in a process that copies between it and a GPU: then the
        GPU's copy engines read and write it while others go on computing."""
        if device != "cpu" and self.buffers.arena is not None:
            self.buffers.arena.pin()

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
        return self.published[0]

    @property
    def empty(self) -> bool:
        """Whether nothing was ever published, so that there is nothing to fetch."""
        return bool((self.stamps < 0).all())

    def publish(self, weights: Mapping[str, Tensor], version: int) -> None:
        """Copies `weights`, one after the other, into the older buffer and makes it the newest.
        Only one process may call this."""
        side = version % 2
        # Invalidate → copy → stamp → publish. Aligned stores of 8 bytes are whole on x86 and ARM.
        self.stamps[side] = -1
        fence()
        for name, tensor in weights.items():
            # On a GPU, which converts it there, too (torch's Copy.cu: conversion_device).
            self.sides[side][name].copy_(tensor.detach(), non_blocking=True)
        synchronize(str(tensor.device))  # whose stream copies, also to a plane on the host
        self.stamps[side] = version
        fence()
        self.published[0] = version

    def fetch(self, into: np.ndarray | Tensor, timeout: float = 60.0) -> int:
        """Copies the newest weights into the block `into` [bytes] and returns their version, never
        a mixture of two.

        into: a numpy array where it and the plane are on the CPU, which is a plain memcpy; else a
        tensor."""
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


class WeightFetcher:
    """Keeps the newest version in spare memory; `swap` makes it the model's.

    Of two blocks of memory one serves while a thread of its own fills the other. On a CPU they take
    turns; on a GPU what was fetched is copied into the one that serves, a gigabyte in less than a
    millisecond."""

    def __init__(self, plane: WeightPlane, parameters: dict[str, Tensor], timeout_s: float):
        """timeout_s: for one copy; waiting for the first version has no limit of its own."""
        self.plane = plane
        self.parameters = parameters
        self.timeout_s = timeout_s
        device = next(iter(parameters.values())).device
        # The model's own weights move into the block that serves, and leave the memory where they
        # were, before there is a spare one. `zeros` touches the memory now, unlike `empty`, so that
        # the first copy is not a slow one.
        serving = torch.zeros(plane.bytes, dtype=torch.uint8, device=device)
        for name, view in plane.tensors(serving).items():
            parameters[name].data = view.copy_(parameters[name].data)
        self.blocks = [torch.zeros_like(serving), serving]
        self.views = [plane.tensors(block) for block in self.blocks]
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        if plane.buffers.device == "cpu" and device.type == "cpu":
            self.blocks = [block.numpy() for block in self.blocks]

        self.spare = 0  # which block is filled next; the other one serves
        self.version = -1  # of the weights in use
        self.staged = -1  # of the weights in spare memory, valid while `full` is set
        self.copied = (0.0, 0.0)  # monotonic seconds: when the staged weights were fetched
        self.took = (0.0, 0.0)  # and when those in use were
        self.error: Exception | None = None
        self.wake = threading.Event()
        self.full = threading.Event()
        self.spare_is_free = threading.Event()
        self.spare_is_free.set()
        threading.Thread(target=self._run, daemon=True, name="weight fetcher").start()

    def _run(self) -> None:
        try:
            if self.stream:  # a thread begins on GPU 0, and leaving the stream would open that
                torch.cuda.set_device(self.stream.device)
            while True:
                self.wake.wait(0.5)
                self.wake.clear()
                self.spare_is_free.wait()
                if self.plane.empty or self.plane.version <= max(self.version, self.staged):
                    continue
                start = time.monotonic()
                with torch.cuda.stream(self.stream) if self.stream else contextlib.nullcontext():
                    self.staged = self.plane.fetch(self.blocks[self.spare], self.timeout_s)
                self.copied = start, time.monotonic()
                self.spare_is_free.clear()
                self.full.set()
        except Exception as error:  # `swap` raises it again, in the worker's own thread
            self.error = error
            self.full.set()

    def look(self) -> None:
        """Lets the thread see whether there is a new version."""
        self.wake.set()

    def swap(self, wait_s: float = 0.0) -> bool:
        """Uses the staged weights, if there are any within `wait_s` seconds; called between two
        batches. Returns whether there were."""
        if not (self.full.wait(wait_s) if wait_s else self.full.is_set()):
            return False
        if self.error is not None:
            raise self.error
        if self.stream is None:
            for name, parameter in self.parameters.items():
                parameter.data = self.views[self.spare][name]
            self.spare = 1 - self.spare
        else:  # weights stay where CUDA graphs know them; the next fetch waits for the copy
            self.blocks[1 - self.spare].copy_(self.blocks[self.spare])
            self.stream.wait_stream(torch.cuda.current_stream())
        self.version = self.staged
        self.took = self.copied
        self.full.clear()
        self.spare_is_free.set()
        return True
