"""Measures what --chunk-share saves an actor: seconds of a whole batch, by shares that take turns.

    python -m benchmarks.chunk_share

GRPO with half of the embedded default's sizes (24 trajectories of 9 chunk steps, 2 epochs, 4
optimizer steps), with the shipped weights of OpenVLA-OFT and of π0.5 whose VLM is trained too.
Pictures are random, half of the trajectories succeed. A batch is what the actor does of it by
itself: reading slots, advantages, forward and backward passes, optimizer steps. Seconds are those
of a processor, on one thread, which others that use the machine do not add to: medians of ROUNDS.

What it does to learning: `python -m benchmarks.equivalence run --study chunks_oft` and
`chunks_vlm`. Left out: simulators and inference, which take part of the cores in a run; GPUs.
"""

import statistics
import time
from pathlib import Path

import numpy as np
import torch

import command_line
import prepare
from actor_worker import group_outcomes
from channel import ACT, Record, SlotPool
from errors import exit_on_user_error
from learner import Learner
from models.compiled import random_observations
from ranks import Meeting, Ranks
from rollout_worker import serve
from streamer import Streamer
from transfers import gather

MODELS = {"OpenVLA-OFT, all weights": "--model oft", "π0.5, --train-vlm": "--train-vlm"}
FLAGS = "--algorithm grpo --max-staleness 0 --ratio 1:1 --eval-envs 0 --lr 1e-9 "
FLAGS += "--batch 24 --minibatch 12"
SHARES = (1.0, 0.5, 0.2)
ROUNDS = 3  # after one that warms up


class Batches:
    """A learner, and a batch of trajectories that it trains again and again."""

    def __init__(self, flags: str):
        setup = prepare.prepare(command_line.parse([*flags.split(), *FLAGS.split()]))
        self.config = config = setup.config
        ranks = Ranks(0, 1, "cpu", Meeting(Path()))
        self.learner = Learner(config, setup.spec, "cpu", ranks, None)
        self.compares = setup.spec.compares
        self.streamer = Streamer.of(config, 0, 0)
        self.pool = SlotPool(setup.slots, config.actor.batch)
        model = self.learner.model
        segment = config.env.segment
        observed = random_observations(model, config.actor.batch * (segment + 1), "cpu")
        for name, rows in observed.items():
            self.pool[name].copy_(rows.unflatten(0, (config.actor.batch, segment + 1)))
        self.pool["length"].fill_(segment)
        self.pool["success"][::2, -1] = True
        for t in range(segment):
            asked = [Record(slot, t, ACT, 0, 0) for slot in range(config.actor.batch)]
            serve(model, asked, self.pool, config.train.seed, 0, "cpu")

    def seconds(self, share: float) -> float:
        """Trains the batch, as `actor_worker.run` does. Returns what it took of a processor."""
        began = time.process_time()
        learner = self.learner
        learner.config.actor.chunk_share = share
        self.pool["version"].fill_(learner.version)
        for slot in range(self.config.actor.batch):
            self.streamer.add(slot)
        while micro := self.streamer.next():
            slots = np.array(micro.slots)
            data = {name: gather(self.pool, name, slots) for name in learner.fields}
            group = self.config.algorithm.group_size
            data["outcomes"] = group_outcomes(self.pool, slots, group, self.compares)
            data["member"] = torch.from_numpy(slots % group)
            learner.train(data, micro)
            if micro.last:
                learner.step()
        self.streamer.finish_batch()
        learner.finish_batch()
        return time.process_time() - began


def main() -> None:
    torch.set_num_threads(1)  # as an actor worker has it at 1:1 on two cores
    print("| model | share | seconds of a batch | to all |")
    print("|---|---|---|---|")
    for name, flags in MODELS.items():
        batches = Batches(flags)
        rounds = [[batches.seconds(share) for share in SHARES] for _ in range(1 + ROUNDS)]
        found = [statistics.median(mine) for mine in zip(*rounds[1:], strict=True)]
        for share, seconds in zip(SHARES, found, strict=True):
            print(f"| {name} | {share} | {seconds:.2f} | {found[0] / seconds:.2f} × |", flush=True)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
