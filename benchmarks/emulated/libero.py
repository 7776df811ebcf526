"""Sleeps as long as RL-VLA³'s simulators took for LIBERO with π0.5: `--env emulated`.

It measures the pipeline apart from this machine's cores: `python bench.py ladder`. A chunk's time
is drawn from a log-normal distribution, which has a long tail. All times follow from RL-VLA³'s
figures, main comparison, LIBERO on 8 GPUs at 1:1. A training step there is 245 760 env steps: 8
rollout epochs × 64 envs × 480.

    Disaggregated (sync)  162.75 env steps/s = 1510 s a step
    + Train Async         229.68             = 1070 s
    Colocated (sync)      289.23             =  850 s

- Train Async hides the actor alone. So lockstep rollout takes 1070 s, and the actor the other
  440 s. `ROUND` is one of the rollout's 8 × 48 rounds.
- Colocated, twice the devices halve the actor to 220 s. The rollout takes the other 630 s.
- GR00T from "+ Train Async" to "+ Streamer" is 1009 s → 559 s: lockstep rollout takes 1.80 times
  (`LOCKSTEP`) what the simulators need when nobody waits. GR00T's actor (104 s) is too short to
  matter there.

So of 1070 s a simulation worker simulates 1070 / 1.80 = 594 s. Waiting for the slowest worker and
for inference is the rest. Two things are still free: how long the tail is (`TAIL`, σ of the
log-normal time of a chunk) and how long inference takes (`INFER_ALL`). Two equations fix them. E16
and E32 are the expected maxima over 16 workers with 2 lanes each and over 32 with one; 9/8 is the
number of full inferences per round, because a trajectory of 8 chunks also asks for its last value.

    E16 · MEAN + 9/8 · INFER_ALL       = ROUND               disaggregated
    E32 · MEAN + 9/8 · INFER_ALL / 2   = ROUND · 630 / 1070  colocated: twice the workers, inference
                                                             twice as fast

They give TAIL = 0.27 (E16 = 2.775, E32 = 1.702) and INFER_ALL = 0.204 ROUND. The limit of 594 s
lies below the 641 s of the paper's own π0.5 row "+ Streamer", as it must. Two lanes share a worker
as several simulators share a CPU core. One lane stands for two of the paper's envs.

Other ratios cut the same devices otherwise (`devices`). They have envs in proportion to the devices
that simulate (`sizes`), as the paper's 128 envs at 1:1 are 192 at 3:1.

Weights: what a synchronous step takes beyond its rollout and actor is 0.8 s on 8 GPUs at 1:1 (π0).
All of it is taken for the way of the weights, half of it to the weight plane and half from there.
Nothing sleeps for it: the model has as many bytes (`WEIGHTS`) as the real plane copies in that
time.

Many nodes on one machine need slower stages, or its cores would be the limit: SLOWER in the
environment, which all processes of a run inherit, multiplies all times (`benchmarks/nodes.py`).

`--tasks 0` is a pipeline of stages that take no time at all. What is left is the cost of the
machinery: `python bench.py machinery`.

Left out: images that mean anything. A training step's 384 rounds are 16 here, so lanes drift
further apart, relative to it. The optimizer step has no time of its own; it is part of the actor's.
"""

import os
import time

import numpy as np

import envs
from config import parse_ratio
from envs import EnvSpec, Step
from errors import require

SCALE = float(os.environ.get("SLOWER", "1")) / 10  # seconds here per second there
ROUND = 1070 / (8 * 48) * SCALE  # seconds of one lockstep round of all lanes, inference included
LOCKSTEP = 1.80  # seconds of lockstep rollout per second that a worker simulates
WORKERS = 16  # env workers, at 1:1
LANES = 2  # of each env worker
ENVS = WORKERS * LANES
MEAN = ROUND / LOCKSTEP / LANES  # seconds, mean simulation time of one chunk
TAIL = 0.27  # σ of the log-normal time of a chunk
INFER_ALL = 0.204 * ROUND  # seconds of one inference for all lanes
INFER_FIXED = 0.2  # share of it that does not depend on the number of lanes
TRAIN_ALL = 440 / (8 * 48) * SCALE  # seconds of training one chunk step of every lane
CHUNK = 10  # control steps, of which one is long: for simplicity the first
EPISODE = 8  # chunks
TRAJECTORIES = 2  # of each lane in an iteration
UPDATE_EPOCHS = 1
MINIBATCHES = 2  # of an iteration: the paper's 2048 chunk steps are 32 rounds there, 8 rounds here
MICRO_BATCH = 4  # trajectories, at most
SYNC = (
    0.8 * TRAJECTORIES * EPISODE / (8 * 48) * SCALE
)  # seconds of an iteration's weights, both ways
COPIES = 5e9  # bytes/s of one such copy, through memory
WEIGHTS = int(SYNC / 2 * COPIES)  # bytes
VIEWS = 2


def devices(ratio: str, placement: str) -> tuple[float, float]:
    """Counts devices for rollouts and for actors.

    In units of the disaggregated 1:1 rows that the times above are for: 4 GPUs. Hybrid is that of
    RL-VLA³'s second version, where R parts simulate, A parts infer and all train."""
    rollouts, actors = parse_ratio(ratio)
    part = 2.0 / (rollouts + actors)
    shared = {"colocated": (2.0, 2.0), "hybrid": (part * actors, 2.0)}
    return shared.get(placement, (part * rollouts, part * actors))


def workers(ratio: str, placement: str) -> int:
    """Counts the env workers on so many devices."""
    for_rollout, _ = devices(ratio, placement)
    return round(WORKERS * for_rollout)


def sizes(costs, ratio: str, placement: str) -> tuple[int, int]:
    """Counts env workers and envs. costs: this module or another one with the same constants.

    Colocated, the envs of 1:1 are shared out among twice the workers. Hybrid, one worker stands for
    all devices that simulate, since envs that step together all take as long."""
    if placement == "hybrid":
        return 1, costs.ENVS
    for_rollout, _ = devices(ratio, placement)
    count = round(costs.WORKERS * for_rollout)
    if placement == "colocated":
        return count, costs.ENVS
    return count, costs.ENVS // costs.WORKERS * count


def spec(tasks: tuple[str, ...], image_size: int) -> EnvSpec:
    """Describes the simulator. A task may be a number: its chunks take that many times as long."""
    tasks = tuple(tasks) or ("emulated",)
    for task in tasks:
        require(
            task == "emulated" or task.replace(".", "", 1).isdecimal(),
            f"unknown emulated task {task!r}: give numbers, by which the time of a chunk is "
            "multiplied, such as 0.5 2",
        )
    return EnvSpec(tasks, ("wait",) * len(tasks), VIEWS, image_size, 4, 4, EPISODE * CHUNK)


NOTHING = Step(0.0, False)  # what every control step brings


class Env(envs.Env):
    """One env: every `chunk` steps it sleeps for a random time whose mean is the task's."""

    mean_s = MEAN
    tail = TAIL
    chunk = CHUNK

    def __init__(self, tasks: tuple[str, ...], image_size: int, quality: str = "fast"):
        super().__init__(tasks, image_size, quality)
        self.image = np.zeros((VIEWS, image_size, image_size, 3), np.uint8)
        self.means = [self.mean_s * (1.0 if task == "emulated" else float(task)) for task in tasks]

    def reset(self, task: int, seed: int) -> None:
        self.seed = seed
        self.mean = self.means[task]
        self.steps = 0

    def step(self, action: np.ndarray) -> Step:
        if self.mean and self.steps % self.chunk == 0:
            if self.steps == 0:
                self.random = np.random.default_rng(self.seed)
            factor = float(self.random.lognormal(-0.5 * self.tail**2, self.tail))  # of mean 1
            self.simulate(self.mean * factor)
        self.steps += 1
        return NOTHING

    def simulate(self, seconds: float) -> None:
        """Takes so long for a chunk."""
        time.sleep(seconds)

    def observe(self) -> tuple[np.ndarray, np.ndarray]:
        return self.image, np.zeros(4, np.float32)
