"""A vectorised simulator that only takes time: n envs of a lane step together in FIXED + n · EACH
seconds per chunk.

It measures the pipeline on the case that splits badly: `python bench.py ladder --env vectorised`.
All times follow from RL-VLA³'s column ManiSkill + π0 on 8 GPUs at 1:1, 81 920 env steps (4 rollout
epochs × 256 envs × 80) in 4 × 16 rounds per training step:

    Disaggregated (sync)   60.64 env steps/s = 1351 s a step: rollout and actor one after the other
    + Train Async         126.65             =  647 s: the longer of the two. No two phases fit both
                          rows (half of 1351 s is 676 s);
                                               equal ones come closest, so rollout and actor take
                                               676 s each (`ROUND`, `TRAIN_ALL`)
    + Rollout Async        69.07             = 1186 s: what it loses is the split (`SPLIT`), for the
                           actor is hidden
    Colocated (sync)      132.56             =  618 s, of which the actor on twice the devices needs
                          338 s

Inference is taken to be the share of a lockstep round that it is for LIBERO (libero.py). Of
the split the paper says only that batches become small; that each env is a lane of its own, as in
its LIBERO runs, fits the colocated row best, where halving the envs of a GPU cost nothing at all.
With 64 envs on each of 4 GPUs that leaves two equations:

         FIXED + 64 · EACH + INFER_ALL = ROUND
    64 · FIXED + 64 · EACH             = SPLIT

They give FIXED = 0.16 s and EACH = 0.13 s (before SCALE): the five rows come out as 60.6, 121,
69.1, and 120 env steps/s colocated. A second lane per GPU thus costs 0.16 s of simulation and hides
2.15 s of inference. Where FIXED is the longer (a simulator that is fast, a model that is small),
`--lanes 1` is right.

Other ratios have 64 envs on each GPU that simulates (`libero.sizes`).

Left out: pictures that mean anything, episodes of different lengths; the 64 rounds of a training
step are 16 here.
"""

import time

import torch

import envs
from benchmarks.emulated import libero
from envs import EnvSpec, Step

SCALE = 1 / 40  # seconds here per second there
# GPUs that simulate at 1:1, and envs of them all
WORKERS = 4
ENVS = 256
ROUND = (
    81_920 / 60.64 / 2 / 64 * SCALE
)  # seconds: one lockstep round of all envs, simulation and inference
SPLIT = (
    81_920 / 69.07 / 64 * SCALE
)  # seconds: a GPU's work for a round when each env is stepped by itself
INFER_ALL = 0.204 * ROUND  # seconds: one inference for all envs
INFER_FIXED = libero.INFER_FIXED
FIXED = (SPLIT - ROUND + INFER_ALL) / (ENVS / WORKERS - 1)  # seconds per chunk of a lane
EACH = SPLIT / (ENVS / WORKERS) - FIXED  # seconds per chunk of an env
TRAIN_ALL = ROUND  # seconds: training one chunk step of every env
CHUNK = 5  # control steps of which one is long, for simplicity the first
EPISODE = 16  # chunks
# of each env in an iteration; of an iteration: the paper's 4096 chunk steps are 16 of its rounds
TRAJECTORIES = 1
MINIBATCHES = 1
MICRO_BATCH = 32  # trajectories, at most
WEIGHTS = int(0.8 * EPISODE / 64 * SCALE / 2 * libero.COPIES)  # bytes: libero.py derives them


def spec(tasks: tuple[str, ...], image_size: int) -> EnvSpec:
    return EnvSpec(("vectorised",), ("wait",), 1, image_size, 4, 4, EPISODE * CHUNK)


class Envs(envs.Envs):
    """`count` envs that step together, always in the same second of their chunks."""

    def __init__(self, tasks: tuple[str, ...], image_size: int, count: int, device: str):
        super().__init__(tasks, image_size, count, device)
        self.images = torch.zeros(
            count, 1, image_size, image_size, 3, dtype=torch.uint8, device=device
        )
        self.steps = 0

    def reset(self, rows: list[int], task: int, seeds: list[int]) -> None:
        self.steps = 0

    def step(self, actions: torch.Tensor) -> Step:
        if self.steps % CHUNK == 0:
            time.sleep(FIXED + self.count * EACH)
        self.steps += 1
        rewards = torch.zeros(self.count, device=self.device)
        return Step(rewards, torch.zeros(self.count, dtype=torch.bool, device=self.device))

    def observe(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.images, torch.zeros(self.count, 4, device=self.device)
