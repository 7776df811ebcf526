"""Writes checkpoints, in a thread of its own while training goes on."""

import contextlib
import json
import math
import shutil
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from config import RunConfig
from errors import require
from files import whole
from metrics import Ledger, Meter
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

    def __init__(self, folder: Path, train: RunConfig, ledger: Ledger, meter: Meter):
        """folder: RUN/checkpoints; ledger: its newest lines are saved, too."""
        self.folder = folder
        self.keep = train.keep
        self.patience_s = train.timeout_s  # after which a person is told whom all wait for
        self.ledger = ledger
        self.meter = meter
        self.thread = threading.Thread()
        self.path: Path | None = None  # of the newest snapshot
        self.trouble = ""  # why it could not be written

    def __exit__(self, kind, error, trace) -> None:
        while error and self.thread.is_alive():
            with contextlib.suppress(SystemExit):  # told to leave meanwhile
                self.finish()
        if error and self.trouble not in ("", str(error)):
            print(self.trouble, file=sys.stderr)

    def begin(self, learner) -> None:
        """Begins to write what a learner has published last. `finish` must have been called."""
        with self.meter.work("checkpoint"):
            snapshot = learner.snapshot(self.ledger.lines)
        self.path = self.path_of(learner)
        self.trouble = ""
        if snapshot is None:  # the first rank has it
            return
        self.meter.set("saving", 1)
        self.thread = threading.Thread(target=self.run, args=(snapshot,), daemon=True)
        self.thread.start()

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
        late = time.monotonic() + self.patience_s
        while self.thread.is_alive():
            with self.meter.work("checkpoint"):
                self.thread.join(1.0)
            if time.monotonic() > late:
                late = math.inf
                slow = f"a checkpoint is still being written after {self.patience_s:.0f} s"
                print(f"{slow}: is {self.folder} on a disk that hangs?", file=sys.stderr)

    def save_last(self, learner) -> dict[str, str]:
        """Ends the save under way, and saves a learner's version unless that is done. Returns the
        "trouble" that a disk made before. Raises UserError if it still does."""
        self.finish()
        news = {"trouble": self.trouble} if self.trouble else {}
        due = self.trouble or self.path != self.path_of(learner)
        if any(learner.ranks.agree(bool(due))):
            self.begin(learner)
            self.finish()
            require(not self.trouble, self.trouble)
        return news

    def path_of(self, learner) -> Path:
        return self.folder / f"{learner.version:06d}"


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
    with whole(path) as unfinished:
        unfinished.mkdir()
        checkpoint.save(unfinished / "model.safetensors", snapshot.header, snapshot.weights)
        torch.save(snapshot.optimizer, unfinished / "optimizer.pt")
        (unfinished / "state.json").write_text(json.dumps(snapshot.state))
        shutil.rmtree(path, ignore_errors=True)  # it has no weights
    for old in folder.glob(".*.old"):  # saves once moved a version away to write it again
        shutil.rmtree(old, ignore_errors=True)
    return path
