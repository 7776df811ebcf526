"""Sleeps as long as RL-VLA³'s simulators took for ManiSkill with π0: `--env vectorised`.

The envs of a lane step together: n of them take FIXED + n · EACH seconds per chunk. It measures the
pipeline on the case that splits badly: `python bench.py ladder --env vectorised`. All times follow
from RL-VLA³'s column ManiSkill + π0 on 8 GPUs at 1:1. A training step there is 81 920 env steps (4
rollout epochs × 256 envs × 80) in 4 × 16 rounds.

    Disaggregated (sync)   60.64 env steps/s = 1351 s a step
    + Train Async         126.65             =  647 s
    + Rollout Async        69.07             = 1186 s
    Colocated (sync)      132.56             =  618 s

- Disaggregated, rollout and actor take turns; with Train Async the longer of the two counts. No
  two phases fit both rows, for half of 1351 s is 676 s. Equal ones come closest, so rollout and
  actor take 676 s each (`ROUND`, `TRAIN_ALL`).
- What Rollout Async loses is the split (`SPLIT`), for the actor is hidden.
- Colocated, the actor needs 338 s of the 618 s, on twice the devices.

Inference is taken to be the share of a lockstep round that it is for LIBERO (`libero.py`). Of the
split the paper says only that batches become small. That each env is a lane of its own, as in its
LIBERO runs, fits the colocated row best, where halving the envs of a GPU cost nothing at all. With
64 envs on each of 4 GPUs two equations are left:

         FIXED + 64 · EACH + INFER_ALL = ROUND
    64 · FIXED + 64 · EACH             = SPLIT

They give FIXED = 0.16 s and EACH = 0.13 s (before SCALE). The rows come out as 60.6, 121, 69.1, and
120 env steps/s colocated. So a second lane per GPU costs 0.16 s of simulation and hides 2.15 s of
inference. Where FIXED is the longer (a simulator that is fast, a model that is small), `--lanes 1`
is right.

Other ratios have 64 envs on each GPU that simulates (`libero.sizes`).

Left out: pictures that mean anything, and episodes of different lengths. The 64 rounds of a
training step are 16 here.
"""

import time

import torch

import envs
from benchmarks.emulated import libero
from envs import EnvSpec, Step

SCALE = 1 / 40  # seconds here per second there
WORKERS = 4  # GPUs that simulate, at 1:1
ENVS = 256  # of them all
LANES = 2  # of each env worker, where all do not wait for all
LOCKSTEP_LANES = 1  # where they do, and a second lane has nothing to hide behind
ROUND = 81_920 / 60.64 / 2 / 64 * SCALE  # seconds of one lockstep round, inference included
SPLIT = 81_920 / 69.07 / 64 * SCALE  # seconds of a GPU for a round where each env steps by itself
INFER_ALL = 0.204 * ROUND  # seconds of one inference for all envs
INFER_FIXED = libero.INFER_FIXED
FIXED = (SPLIT - ROUND + INFER_ALL) / (ENVS / WORKERS - 1)  # seconds per chunk of a lane
EACH = SPLIT / (ENVS / WORKERS) - FIXED  # seconds per chunk of an env
TRAIN_ALL = ROUND  # seconds of training one chunk step of every env
CHUNK = 5  # control steps, of which one is long: for simplicity the first
EPISODE = 16  # chunks
TRAJECTORIES = 1  # of each env in an iteration
UPDATE_EPOCHS = 1  # the paper's four are in `TRAIN_ALL`
MINIBATCHES = 1  # of an iteration: the paper's 4096 chunk steps are 16 of its rounds
MICRO_BATCH = 32  # trajectories, at most
WEIGHTS = int(0.8 * EPISODE / 64 * SCALE / 2 * libero.COPIES)  # bytes, derived as in libero.py


def spec(tasks: tuple[str, ...], image_size: int) -> EnvSpec:
    return EnvSpec(("vectorised",), ("wait",), 1, image_size, 4, 4, EPISODE * CHUNK)


class Envs(envs.Envs):
    """`count` envs that step together, always in the same second of their chunks."""

    def __init__(self, tasks: tuple[str, ...], image_size: int, count: int, device: str):
        super().__init__(tasks, image_size, count, device)
        shape = (count, 1, image_size, image_size, 3)
        self.images = torch.zeros(shape, dtype=torch.uint8, device=device)
        self.steps = 0

    def reset(self, rows: list[int], task: int, seeds: list[int]) -> None:
        self.steps = 0

    def step(self, actions: torch.Tensor) -> Step:
        if self.steps % CHUNK == 0:
            self.simulate()
        self.steps += 1
        reward = torch.zeros(self.count, device=self.device)
        return Step(reward, reward.bool())

    def simulate(self) -> None:
        """Takes as long as a chunk of all."""
        time.sleep(FIXED + self.count * EACH)

    def observe(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.images, torch.zeros(self.count, 4, device=self.device)
