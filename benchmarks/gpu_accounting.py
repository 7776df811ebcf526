"""Counts what one inference, one micro-batch, one optimizer step and one publication ask of a GPU,
for every family at its released size, and estimates how long an H100 takes. No GPU is needed.

    python -m benchmarks.gpu_accounting                             published settings
    python -m benchmarks.gpu_accounting --case pi05 --flags --cache-prefix slots
    python -m benchmarks.gpu_accounting --json FILE

The functions are the real ones: `rollout_worker.serve`, `Inbox.read`, `Learner.train`,
`Learner.step`, `WeightPlane.publish`. What counts them is benchmarks/fake_gpu. An inference is of
16 samples, of every kind of request; a micro-batch of 96 chunk steps, of two trajectories.

    bound       its matrix products alone, in bfloat16 at an H100's peak, or reading the weights
    products    each at `PRODUCTS` or at the speed of its memory, whichever is slower
    memory      all other kernels, at the speed of memory
    launches    of kernels, by the host; they overlap with the two above where these take longer
    copies      between host and device, page-locked or pageable
    host        the host's own gathering from slots, and copying to page-locked memory
    waits       of the host for the device, `WAIT` each
    at most     the sum, where nothing overlaps

Left out: what torch.compile fuses and CUDA graphs spare of launches, contention, the memory of the
allocator. A size of a batch that is padded is counted as it is.
"""

import contextlib
import copy
import json
import os
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from unittest.mock import patch

import torch
import tyro

import actor_worker
import envs
import memory
import models
import prepare
import train
import transfers
from actor_worker import Inbox
from benchmarks.fake_gpu import library
from benchmarks.fake_gpu.account import Account
from channel import ACT, EVAL, FINAL, VALUE, Channels, Record, SlotPool
from config import completed, group_of
from errors import exit_on_user_error
from learner import Learner
from ranks import Meeting, Ranks
from rollout_worker import serve
from scheduler import Admission
from streamer import MicroBatch, Streamer
from transfers import Carrier
from weights import WeightPlane

DEVICE = "cuda:0"
SAMPLES = 16
CHUNK_STEPS = 96
TRAJECTORIES = 2
# The recipe of every family, and what differs: adapters where the whole model takes several GPUs.
CASES = {
    "pi0": "libero_10_ppo_openpi --cache-prefix off",
    "pi05": "libero_10_ppo_openpi_pi05 --cache-prefix off",
    "pi05_kept": "libero_10_ppo_openpi_pi05 --cache-prefix gpu",
    "gr00t": "libero_10_ppo_gr00t --cache-prefix off",
    "oft": "libero_10_grpo_openvlaoft --oft-train lora --lora-rank 32",
}
SIZES = f"--micro-batch {CHUNK_STEPS} --checkpointing off"

# An H100 (SXM): NVIDIA's data sheet for the peak and memory, and what large products reach of it.
PEAK = 990e12  # floating-point operations per second, bfloat16
PRODUCTS = {"bfloat16": 500e12, "float16": 500e12, "tf32": 250e12, "float32": 50e12}
MEMORY = 3.35e12  # bytes per second
LAUNCH = 5e-6  # seconds
WAIT = 20e-6  # seconds
PINNED = 25e9  # bytes per second, PCIe 5
PAGEABLE = 4e9  # bytes per second: one core copies
GATHER = 3e9  # bytes per second: one core copies rows, and to memory that it has just got


@dataclass
class Count:
    """What something asks of a GPU, and how long that takes, in seconds."""

    account: dict  # of account.Account
    gathered: int  # bytes that the host took out of slots for itself
    bound: float
    seconds: dict[str, float]

    @property
    def at_most(self) -> float:
        device = self.seconds["products"] + self.seconds["memory"]
        others = ("copies", "host", "waits")
        return max(device, self.seconds["launches"]) + sum(self.seconds[name] for name in others)


class Case:
    """One family at its released size, with its model on a device that is not there."""

    def __init__(self, name: str, flags: list[str]):
        words = [*CASES[name].split(), *SIZES.split(), *flags]
        config = train.parse(["--recipe", *words])
        simulator = envs.load(config.train.env, installed=False)
        room = memory.Room(8, 80 * memory.GB, 1000 * memory.GB, 128)
        config, placement, _, _ = prepare.find_workers(config, simulator, room)
        config, _, lay_out, _ = prepare.with_sizes(config, simulator, placement)
        demand = lay_out(config)
        self.model = demand.model
        self.spec = lay_out.spec.seen_by(self.model.header)
        lanes = max(TRAJECTORIES, group_of(demand.config))
        sizes = {"envs": lanes, "batch": lanes, "minibatch": lanes, "max_staleness": 0}
        workers = {"env_workers": 1, "rollout_workers": 1, "actor_workers": 1}
        self.steps = CHUNK_STEPS // TRAJECTORIES
        self.config = completed(demand.config, segment=self.steps, **sizes, **workers)
        self.weights = demand.weights
        self.slots = Admission.of(self.config).slots

    def counts(self) -> dict[str, Count]:
        """Counts one of everything, by name."""
        found = {}
        with Account() as account, patch.object(models, "build", self.build):
            self.pool = SlotPool(prepare.slot_spec(self.config, self.spec, self.model), self.slots)
            models.use_tf32(DEVICE, self.config.train.precision)
            self.pool.arrays["length"][:] = self.steps
            self.pool.arrays["success"][0, -1] = True
            plane = WeightPlane(self.weights, DEVICE)
            self.channels = Channels.create(self.config, self.pool, plane, None)
            self.account = account
            self.count_inference(found)
            self.count_training(found)
        return found

    def build(self, config, spec, device="cpu", weights="all") -> torch.nn.Module:
        """Stands for models.build: the published model, whose weights have shapes alone."""
        model = copy.deepcopy(self.model)
        if weights == "idle":
            return model
        idle = model.idle() if weights == "training" else ()
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            owner, _, own_name = name.rpartition(".")
            if idle and name.startswith(idle):
                continue
            there = torch.empty_like(tensor, device=device)
            if isinstance(tensor, torch.nn.Parameter):
                there = torch.nn.Parameter(there, requires_grad=tensor.requires_grad)
            setattr(model.get_submodule(owner), own_name, there)
        return model

    def count_inference(self, found: dict[str, Count]) -> None:
        """Serves every kind of request at once."""
        model = models.acting(self.build(self.config, self.spec, DEVICE)).eval()
        fields = (*model.observation_fields(), *model.slot_fields())
        transfers.lock(self.pool, fields, DEVICE)
        rare = [EVAL, VALUE] + [FINAL] * ("final" in self.pool.spec)
        kinds = [ACT] * (SAMPLES - len(rare)) + rare
        samples = [self.request(kind, i) for i, kind in enumerate(kinds)]
        with self.counting(found, "inference"):
            serve(model, samples, self.pool, 1, 0, DEVICE)

    def request(self, kind: int, i: int) -> Record:
        t = self.steps if kind == VALUE else i // TRAJECTORIES
        return Record(i % TRAJECTORIES, t, kind, 0, 0)

    def count_training(self, found: dict[str, Count]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            ranks = Ranks.of(self.config, 0, DEVICE, Meeting(Path(folder)), None)
        learner = Learner(self.config, self.spec, DEVICE, ranks, None)
        streamer = Streamer.of(self.config, 0, 0)
        carrier = Carrier(self.pool, learner.device_fields, self.steps, DEVICE)
        facts = learner.host_fields
        inbox = Inbox(0, self.config, self.spec, self.channels, streamer, facts, carrier)
        slots = tuple(range(TRAJECTORIES))
        micro = MicroBatch(slots, epoch=0, minibatch=0, last=True, minibatch_size=TRAJECTORIES)
        with self.counting(found, "micro-batch"):
            learner.train(inbox.read(micro), micro)
        if learner.prefixes:
            with self.counting(found, "micro-batch of a later epoch"):
                later = replace(micro, epoch=1)
                learner.train(inbox.read(later), later)
        # The first of several steps of a batch keeps a copy for checkpoints, the very first one
        # makes the optimizer's moments.
        several = self.config.actor.steps > 1
        with self.counting(found, "first step of a batch" if several else "first step"):
            learner.step()
        with self.counting(found, "optimizer step"):
            learner.step()
        with self.counting(found, "publication"):
            self.channels.plane.publish(learner.weights_that_act(), 1)

    @contextlib.contextmanager
    def counting(self, found: dict[str, Count], name: str):
        gathered = []

        def gather(*arguments):
            made = transfers.gather(*arguments)
            gathered.append(made.nbytes)
            return made

        self.account.reset()
        with patch.object(actor_worker, "gather", gather):
            yield
        found[name] = estimated(self.account, sum(gathered))


def estimated(account: Account, gathered: int) -> Count:
    """Estimates the seconds of what was counted."""
    products = account.products
    operations = sum(work for _, work, _ in products)
    seconds = {
        "products": sum(max(work / PRODUCTS[kind], size / MEMORY) for kind, work, size in products),
        "memory": sum(account.moved.values()) / MEMORY,
        "launches": account.launches * LAUNCH,
        "copies": sum(
            size / (PINNED if "pinned" in way else PAGEABLE) for way, size in account.copied.items()
        ),
        "host": (gathered + 2 * account.hosted) / GATHER,  # what is copied was gathered before
        "waits": account.synchronisations * WAIT,
    }
    return Count(account.to_json(), gathered, max(operations / PEAK, 0.0), seconds)


def show(counts: dict[str, dict[str, Count]]) -> None:
    """Prints a table in Markdown, milliseconds."""
    parts = ("products", "memory", "launches", "copies", "host", "waits")
    counted = ("launches", "waits", "pinned, MB", "pageable, MB")
    print("| | " + " | ".join(("bound", *parts, "at most", *counted)) + " |")
    print("|---|" + "---:|" * (len(parts) + 6))
    for case, found in counts.items():
        for name, count in found.items():
            account = count.account
            copied = account["copied"]
            times = [count.bound, *(count.seconds[part] for part in parts), count.at_most]
            sizes = [
                sum(size for way, size in copied.items() if kind in way) / 1e6
                for kind in ("pinned", "pageable")
            ]
            cells = [f"{1e3 * time:.3g}" for time in times]
            cells += [str(account["launches"]), str(account["synchronisations"])]
            cells += [f"{size:.3g}" for size in sizes]
            print(f"| {case} {name} | " + " | ".join(cells) + " |")


@dataclass(kw_only=True)
class AccountingConfig:
    case: tuple[str, ...] = tuple(CASES)
    """which of `CASES`"""
    flags: str = ""
    """of train.py, on top of a family's recipe"""
    waits: bool = False
    """also say where the host waits"""
    json: Path | None = None
    """also write the counts to this file"""


def main(config: AccountingConfig) -> None:
    counts = {name: Case(name, config.flags.split()).counts() for name in config.case}
    show(counts)
    if config.waits:
        for case, found in counts.items():
            for name, count in found.items():
                print(f"\n{case} {name} waits", json.dumps(count.account["waits"], indent=1) + "\n")
    if config.json:
        rows = {case: {n: asdict(c) for n, c in found.items()} for case, found in counts.items()}
        config.json.write_text(
            json.dumps({"what": "gpu_accounting", "cases": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    if "FAKE_GPUS" not in os.environ:  # they must be there before torch is
        os.execve(
            sys.executable,
            [sys.executable, *sys.orig_argv[1:]],
            os.environ | library.environment(1),
        )
    with exit_on_user_error():
        main(tyro.cli(AccountingConfig))
