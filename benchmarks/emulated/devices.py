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

import fcntl
import os
import struct
import time
from multiprocessing import util
from pathlib import Path

SLICE = 0.01  # seconds of work after which it is another's turn
FREE_AT = struct.Struct("d")  # seconds of the monotonic clock, which all processes share


class Device:
    """One device of the run that this process belongs to."""

    def __init__(self, number: int):
        self.at = number * FREE_AT.size  # bytes
        self.file = -1  # descriptor, opened when first used, by the process that uses it

    def use(self, seconds: float) -> None:
        """Sleeps until the device has done so many seconds of work for the caller."""
        if self.file < 0:
            path = Path(util.get_temp_dir()) / "emulated-devices"
            self.file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        # A slice that begins where the one before it ended asks for then, not for when it woke up.
        asked_at = time.monotonic()
        while seconds > 0.0:
            asked_at = self.reserve(min(seconds, SLICE), asked_at)
            seconds -= SLICE
            time.sleep(max(0.0, asked_at - time.monotonic()))

    def reserve(self, seconds: float, asked_at: float) -> float:
        """Gives the device so much more to do, not before `asked_at`. Returns when it is done."""
        fcntl.flock(self.file, fcntl.LOCK_EX)
        try:
            found = os.pread(self.file, FREE_AT.size, self.at)
            free_at = FREE_AT.unpack(found)[0] if len(found) == FREE_AT.size else 0.0
            done_at = max(free_at, asked_at) + seconds
            os.pwrite(self.file, FREE_AT.pack(done_at), self.at)
        finally:
            fcntl.flock(self.file, fcntl.LOCK_UN)
        return done_at


def device_of(worker: str, placement: str) -> Device | None:
    """Returns the device of a worker by its name, such as "actor-1"; None where it has its own."""
    stage, _, rank = worker.partition("-")
    if placement == "hybrid":
        numbers = {"env": 0, "rollout": 1, "actor": int(rank or 0) % 2}
    else:
        numbers = {"env": 0, "rollout": 0, "actor": 0 if placement == "colocated" else None}
    number = numbers.get(stage)
    return None if number is None else Device(number)
