"""Devices that emulated stages share: each does one stage's work after another's, first come first
served, whatever process asks; long work in slices, between which others have their turn.

    Device(0).use(0.05)     sleeps until device 0, when it had done all that it was given before,
                            has worked for 0.05 s for us

Without it a stage that sleeps for its GPU's time would let another one sleep for the same GPU's at
the same time: asynchronous colocated stages would have the GPU twice. A device is a number in a
file, the time at which all that it was given will be done. A lock on the file is held while a
worker adds its work there (microseconds), so no two stages' work ever overlaps, nobody is passed
by, and the device goes from one to the next without a pause, as a GPU does with queued kernels. A
worker that is killed leaves no lock behind: the device does what it was given, then goes on.

Processes that share a GPU have it in turns of a few milliseconds; were each to keep it for a whole
micro-batch, a picture would wait for that to be drawn. `SLICE` is longer than such turns are, 0.1
to 4 s in the papers' time, because a shorter one is no sleep that a busy machine can keep to.

A device here stands for all GPUs that do the same at the same time. Colocated that is one. Where
simulators have GPUs apart (hybrid), device 0 is theirs and device 1 is inference's, and the ranks
of training are on both, as in RL-VLA³'s second version. Disaggregated, actors have theirs alone,
which no other stage asks for.

The file lies in the folder that `multiprocessing` makes for a launcher and its workers, and removes
when the launcher ends.

Left out: what changing from one stage to another costs, and stages that run beside each other at
less than full speed, as small kernels do.
"""

import contextlib
import fcntl
import os
import struct
import time
from collections.abc import Iterator
from multiprocessing import util
from pathlib import Path

SLICE = 0.01  # seconds of work after which it is another's turn
NUMBER = struct.Struct("d")


class Shared:
    """Numbers that all workers of a run read and change, in a file of the launcher's."""

    def __init__(self, name: str, count: int = 1, at: int = 0):
        """name: of the file; count: of numbers, 0 at first; at: of the first one in the file."""
        self.name = name
        self.numbers = struct.Struct(f"{count}d")
        self.at = at * NUMBER.size  # bytes
        self.file = -1  # descriptor, opened when first used, by the process that uses it

    @contextlib.contextmanager
    def locked(self) -> Iterator[list[float]]:
        """Gives the numbers, which may be changed, and keeps others from them meanwhile."""
        if self.file < 0:
            path = Path(util.get_temp_dir()) / self.name
            self.file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(self.file, fcntl.LOCK_EX)
        try:
            found = os.pread(self.file, self.numbers.size, self.at)
            numbers = list(self.numbers.unpack(found.ljust(self.numbers.size, b"\0")))
            yield numbers
            os.pwrite(self.file, self.numbers.pack(*numbers), self.at)
        finally:
            fcntl.flock(self.file, fcntl.LOCK_UN)


class Device:
    """One device of the run that this process belongs to."""

    def __init__(self, number: int):
        self.number = number
        # At which second of the monotonic clock, which all processes share, it will be done.
        self.free_at = Shared("emulated-devices", at=number)

    def use(self, seconds: float) -> None:
        """Sleeps until the device has done so many seconds of work for the caller."""
        # A slice that begins where the one before it ended asks for then, not for when it woke up.
        asked_at = time.monotonic()
        while seconds > 0.0:
            asked_at = self.reserve(min(seconds, SLICE), asked_at)
            seconds -= SLICE
            time.sleep(max(0.0, asked_at - time.monotonic()))

    def reserve(self, seconds: float, asked_at: float) -> float:
        """Gives the device so much more to do, not before `asked_at`. Returns when it is done."""
        with self.free_at.locked() as free_at:
            free_at[0] = max(free_at[0], asked_at) + seconds
            return free_at[0]


def device_of(worker: str, placement: str) -> Device | None:
    """Returns the device of a worker by its name, such as "actor-1"; None where it has its own."""
    stage, _, rank = worker.partition("-")
    if placement == "hybrid":
        numbers = {"env": 0, "rollout": 1, "actor": int(rank or 0) % 2}
    else:
        numbers = {"env": 0, "rollout": 0, "actor": 0 if placement == "colocated" else None}
    number = numbers.get(stage)
    return None if number is None else Device(number)
