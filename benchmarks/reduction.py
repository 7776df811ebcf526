"""Measures what summing gradients costs a training step: all at once after the backward pass, or in
buckets while it goes on.

    python -m benchmarks.reduction                       two processes, over loopback
    python -m benchmarks.reduction --mbit 100            over a wire of 100 Mbit/s (needs root)

Two processes, of one thread and one core each, train the small model of a family on micro-batches
of SAMPLES chunk steps, each of which is a minibatch. The wire joins two network namespaces
(benchmarks/wire.py), and `tc` limits what each sends. Both ways take turns in the same
processes. Figures are of the first process, in the fastest of STEPS, which other programs disturbed
least:

    step_ms        from when both ranks begin a pass until gradients are summed
    pass_ms        of that, forward and backward pass
    reduce_ms      sums, one after the other (`reduce_s` of metrics.jsonl)
    wait_ms        of that, what came after the backward pass (`reduce_wait_s`)

Left out: the optimizer, and ranks that come at different times.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.measuring import random_model
from benchmarks.wire import Nodes
from config import ROOT
from errors import exit_on_user_error
from gradients import Gradients
from models.compiled import random_noise, random_observations
from ranks import Meeting, Ranks

SAMPLES = 64
STEPS = 40
WARMUP = 3
PAUSE_S = 0.3  # before each step: who has waited much gets more of a busy core afterwards
WAYS = ("after", "beside")


class Trained:
    """A model whose gradients are summed in one of the two ways."""

    def __init__(self, name: str, way: str, ranks: Ranks):
        self.way = way
        self.model = random_model(name, "small", "cpu", torch.float32)
        trainable = self.model.trainable()
        for key, parameter in self.model.named_parameters():
            parameter.requires_grad_(key in trainable)
        obs = random_observations(self.model, SAMPLES, "cpu")
        acted = self.model.act(obs, random_noise(self.model, SAMPLES, "cpu"))
        self.stored = obs | {key: x.clone() for key, x in acted.items()}
        self.gradients = Gradients(list(trainable.values()), ranks)

    def step(self, ranks: Ranks) -> dict[str, float]:
        """Makes one step. Returns its seconds."""
        held = self.gradients
        if self.way == "after" and held.buckets:
            held.buckets = [sorted(held.bucket_of)]
        time.sleep(PAUSE_S)
        list(ranks.meet())
        start = time.monotonic()
        if self.way == "beside":
            held.expect()
        out = self.model.evaluate(self.stored)
        (out["logprob"].mean() + out["value"].mean()).backward()
        passed = time.monotonic()
        list(held.meet())
        held.totals.clear()
        list(held.sum())
        end = time.monotonic()
        held.flat.zero_()
        return {
            "step_ms": end - start,
            "pass_ms": passed - start,
            "reduce_ms": held.totals["reduce_s"],
            "wait_ms": held.totals["reduce_wait_s"],
        }


def act(rank: int, name: str, folder: Path) -> list[dict]:
    """Is one of the two processes. Returns a row for each way."""
    torch.set_num_threads(1)
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    ranks = Ranks(rank, 2, "cpu", Meeting(folder / "rendezvous"))
    both = [Trained(name, way, ranks) for way in WAYS]
    took = {way: [] for way in WAYS}
    for _ in range(WARMUP + STEPS):
        for one in both:
            took[one.way].append(one.step(ranks))
    list(ranks.meet())
    ranks.leave()
    rows = []
    for one in both:
        fastest = min(took[one.way][WARMUP:], key=lambda seconds: seconds["step_ms"])
        row = {"way": one.way, "buckets": len(one.gradients.buckets)}
        row["megabytes"] = one.gradients.flat.nbytes / 1e6
        rows.append(row | {key: 1e3 * seconds for key, seconds in fastest.items()})
    return rows


@contextlib.contextmanager
def ends_of_wire(mbit: float) -> Iterator[list[list[str]]]:
    """Makes two ends of a wire. Yields what a command must begin with to run at each."""
    if not mbit:
        yield [[], []]
        return
    with Nodes(2) as ends:
        ends.limit(mbit)
        yield [ends.command(rank) for rank in range(2)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--model", default="pi05")
    parser.add_argument("--mbit", type=float, default=0.0, help="of the wire; 0 is loopback")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.rank is not None:
        rows = act(flags.rank, flags.model, flags.folder)
        (flags.folder / f"{flags.rank}.json").write_text(json.dumps(rows))
        return

    # Start both, and print what the first one measured.
    again = [sys.executable, "-m", "benchmarks.reduction", "--model", flags.model]
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "eth0" if flags.mbit else "lo"}
    with tempfile.TemporaryDirectory() as folder, ends_of_wire(flags.mbit) as ends:
        started = []
        for rank, begin in enumerate(ends):
            command = [*begin, *again, "--rank", str(rank), "--folder", folder]
            started.append(subprocess.Popen(command, cwd=ROOT, env=environment))
        if any([process.wait() for process in started]):
            sys.exit(1)
        for row in json.loads(Path(folder, "0.json").read_text()):
            numbers = {k: round(v, 1) if isinstance(v, float) else v for k, v in row.items()}
            print(json.dumps(numbers))


if __name__ == "__main__":
    with exit_on_user_error():
        main()
