"""Writes checkpoints, in a thread of its own while training goes on."""

import contextlib
import json
import math
import os
import shutil
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from metrics import Meter
from models import checkpoint
from output import disk_trouble
from run_folder import checkpoints


class Snapshot(NamedTuple):
    """What a checkpoint holds, copied where training would change it."""

    header: checkpoint.Header
    weights: dict[str, Tensor]
    optimizer: dict
    state: dict  # state.json


class Saver(contextlib.AbstractContextManager):
    """Writes one snapshot at a time and keeps the newest checkpoints. Whatever a `with` block of it
    ends with, what is being written is written to its end."""

    def __init__(self, folder: Path, keep: int, patience_s: float, meter: Meter):
        """folder: RUN/checkpoints; keep: how many checkpoints stay, or 0 for all; patience_s: after
        which a person is told whom all wait for."""
        self.folder = folder
        self.keep = keep
        self.patience_s = patience_s
        self.meter = meter
        self.late = math.inf  # monotonic seconds, when that is to be said
        self.thread = ThreadPoolExecutor(1)
        self.writing: Future | None = None
        self.version = -1  # of the newest snapshot
        self.trouble = ""  # why it could not be written

    def __exit__(self, kind, error, trace) -> None:
        while error and self.writing and not self.writing.done():
            with contextlib.suppress(SystemExit):  # told to leave meanwhile
                self.finish()
        if error and self.trouble not in ("", str(error)):
            print(self.trouble, file=sys.stderr)

    def begin(self, snapshot: Snapshot) -> None:
        """Begins to write. `finish` must have been called since the last one."""
        self.version = snapshot.state["version"]
        self.trouble = ""
        self.meter.set("saving", 1)
        self.writing = self.thread.submit(self.run, snapshot)
        self.late = time.monotonic() + self.patience_s

    def run(self, snapshot: Snapshot) -> None:
        try:
            write(snapshot, self.folder)
            for old in checkpoints(self.folder.parent)[: -self.keep] if self.keep else ():
                shutil.rmtree(old, ignore_errors=True)  # a file that is open may stay on NFS
        except Exception as error:  # libraries have several for a disk that is full
            self.trouble = disk_trouble(error, self.path)
        finally:
            self.meter.set("saving", 0)

    def finish(self) -> None:
        """Waits until all is written, or `trouble` says why not, with signs of life, however long a
        slow disk takes."""
        while self.writing and not self.writing.done():
            with self.meter.work("checkpoint"):
                wait([self.writing], 1.0)
            if time.monotonic() > self.late:
                self.late = math.inf
                slow = f"a checkpoint is still being written after {self.patience_s:.0f} s"
                print(f"{slow}: is {self.folder} on a disk that hangs?", file=sys.stderr)

    @property
    def path(self) -> Path:
        """Where the newest snapshot is written."""
        return self.folder / f"{self.version:06d}"


def write(snapshot: Snapshot, folder: Path) -> Path:
    """Writes folder/NNNNNN/{model.safetensors, optimizer.pt, state.json}, which appears all at
    once. Returns its path.

    A version is trained once in a run. So a whole checkpoint of it is the same, and stays. Nothing
    that may be whole is removed before."""
    path = folder / f"{snapshot.state['version']:06d}"
    if (path / "model.safetensors").is_file():
        return path
    for left in folder.glob(".*.partial"):  # of saves that were killed
        shutil.rmtree(left, ignore_errors=True)
    partial = folder / f".{path.name}.partial"
    partial.mkdir()
    checkpoint.save(partial / "model.safetensors", snapshot.header, snapshot.weights)
    torch.save(snapshot.optimizer, partial / "optimizer.pt")
    (partial / "state.json").write_text(json.dumps(snapshot.state))
    shutil.rmtree(path, ignore_errors=True)  # it has no weights
    os.replace(partial, path)
    for old in folder.glob(".*.old"):  # saves once moved a version away to write it again
        shutil.rmtree(old, ignore_errors=True)
    return path
