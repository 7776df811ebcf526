"""Writes checkpoints, in a thread of its own while training goes on."""

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
from run_folder import checkpoints


class Snapshot(NamedTuple):
    """What a checkpoint holds, copied where training would change it."""

    header: checkpoint.Header
    weights: dict[str, Tensor]
    optimizer: dict
    state: dict  # state.json


class Saver:
    """Writes one snapshot at a time and keeps the newest checkpoints."""

    def __init__(self, folder: Path, keep: int, patience_s: float = 120.0):
        """folder: RUN/checkpoints; keep: how many checkpoints stay, or 0 for all; patience_s: after
        which a person is told whom all wait for."""
        self.folder = folder
        self.keep = keep
        self.patience_s = patience_s
        self.late = math.inf  # monotonic seconds, when that is to be said
        self.thread = ThreadPoolExecutor(1)
        self.writing: Future | None = None

    def begin(self, snapshot: Snapshot) -> Path:
        """Begins to write. `finish` must have been called since the last one."""
        self.writing = self.thread.submit(self.run, snapshot)
        self.late = time.monotonic() + self.patience_s
        return self.folder / name_of(snapshot)

    def run(self, snapshot: Snapshot) -> None:
        write(snapshot, self.folder)
        if self.keep:
            for old in checkpoints(self.folder.parent)[: -self.keep]:
                shutil.rmtree(old, ignore_errors=True)  # a file that is open may stay on NFS

    def finish(self, meter: Meter) -> None:
        """Waits until all is written, with signs of life, however long a slow disk takes. Raises
        what went wrong."""
        while self.writing and not self.writing.done():
            with meter.work("checkpoint"):
                wait([self.writing], 1.0)
            if time.monotonic() > self.late:
                self.late = math.inf
                slow = f"a checkpoint is still being written after {self.patience_s:.0f} s"
                print(f"{slow}: is {self.folder} on a disk that hangs?", file=sys.stderr)
        if self.writing:
            self.writing.result()


def name_of(snapshot: Snapshot) -> str:
    return f"{snapshot.state['version']:06d}"


def write(snapshot: Snapshot, folder: Path) -> Path:
    """Writes folder/NNNNNN/{model.safetensors, optimizer.pt, state.json}, which appears all at
    once. Returns its path.

    A version is trained once in a run. So a whole checkpoint of it is the same, and stays."""
    path = folder / name_of(snapshot)
    if (path / "model.safetensors").is_file():
        return path
    for left in (*folder.glob(".*"), path):  # of saves that were killed, or without weights
        shutil.rmtree(left, ignore_errors=True)
    partial = folder / f".{path.name}.partial"
    partial.mkdir()
    checkpoint.save(partial / "model.safetensors", snapshot.header, snapshot.weights)
    torch.save(snapshot.optimizer, partial / "optimizer.pt")
    (partial / "state.json").write_text(json.dumps(snapshot.state))
    os.replace(partial, path)
    return path
