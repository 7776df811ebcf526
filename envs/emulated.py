"""A simulator that only takes time: sleeps, drawn from a long-tailed distribution calibrated on
RL-VLA³'s LIBERO rows.

It measures the pipeline apart from this machine's cores: `python bench.py ladder`. All times follow
from RL-VLA³'s figures, main comparison, LIBERO on 8 GPUs at 1:1, 245 760 env steps (8 rollout
epochs × 64 envs × 480) per training step:

    π0.5   Disaggregated (sync)  162.75 env steps/s = 1510 s a step
           + Train Async         229.68             = 1070 s: it hides the actor alone, so lockstep
                                 rollout takes 1070 s
                                                      (`ROUND` is one of its 8 × 48 rounds) and the
                                                      actor the other 440 s
           Colocated (sync)      289.23             =  850 s: twice the devices halve the actor to
                                 220 s; the rollout takes 630 s
    GR00T  + Train Async → + Streamer               = 1009 s → 559 s: the lockstep rollout takes
           1.80 times (`LOCKSTEP`) what the
                                                      simulators need when nobody waits; its actor
                                                      (104 s) is too short to matter

So of 1070 s a simulation worker simulates 1070 / 1.80 = 594 s; waiting for the slowest and for
inference is the rest. What is left free, how long the tail is (`TAIL`, σ of the log-normal time of
a chunk) and how long inference takes (`INFER_ALL`), two equations fix. E16 and E32 are the expected
maxima over 16 workers with 2 lanes each and over 32 with one; 9/8 is the number of full inferences
per round, because a trajectory of 8 chunks also asks for its last value:

    E16 · MEAN + 9/8 · INFER_ALL       = ROUND               disaggregated
    E32 · MEAN + 9/8 · INFER_ALL / 2   = ROUND · 630 / 1070  colocated: twice the workers, inference
                                       twice as fast

They give TAIL = 0.27 (E16 = 2.775, E32 = 1.702) and INFER_ALL = 0.204 ROUND. The limit of 594 s
lies below the 641 s of the paper's own π0.5 "+ Streamer" row, as it must. Two lanes share a worker
as several simulators share a CPU core; one lane stands for two of the paper's envs.

Other ratios cut the same devices otherwise (`devices`) and have envs in proportion to those that
simulate (`sizes`), as the paper's 128 envs at 1:1 are 192 at 3:1.

Weights: what a synchronous step takes beyond its rollout and actor is 0.8 s on 8 GPUs at 1:1 (π0).
All of it is taken for the weights' way, half to the weight plane and half from there. Nothing
sleeps for it: the model has as many bytes (`WEIGHTS`) as the real plane copies in that time.

`--tasks 0` is a pipeline of stages that take no time at all, which leaves the cost of the
machinery: `python bench.py machinery`.

Left out: images that mean anything; the 384 rounds of a training step are 16 here, so lanes drift
further apart, relative to it; an optimizer step of its own, which is part of the actor's time.
"""

import time

import numpy as np

import envs
from config import UserError, parse_ratio
from envs import EnvSpec, Step

SCALE = 1 / 10  # seconds here per second there
ROUND = (
    1070 / (8 * 48) * SCALE
)  # seconds: one lockstep round of all lanes, simulation and inference
LOCKSTEP = 1.80  # seconds of lockstep rollout per second that a worker simulates
# at 1:1: env workers, and lanes of each
WORKERS = 16
LANES = 2
ENVS = WORKERS * LANES
MEAN = ROUND / LOCKSTEP / LANES  # seconds: mean simulation time of one chunk
TAIL = 0.27
INFER_ALL = 0.204 * ROUND  # seconds: one inference for all lanes
INFER_FIXED = 0.2  # share of it that is independent of the number of lanes
TRAIN_ALL = 440 / (8 * 48) * SCALE  # seconds: training one chunk step of every lane
CHUNK = 10  # control steps of which one is long, for simplicity the first
EPISODE = 8  # chunks
TRAJECTORIES = 2  # of each lane in an iteration
MINIBATCHES = (
    2  # of an iteration: the paper's 2048 chunk steps are 32 of its rounds, as 8 rounds are here
)
MICRO_BATCH = 4  # trajectories, at most
SYNC = (
    0.8 * TRAJECTORIES * EPISODE / (8 * 48) * SCALE
)  # seconds: an iteration's weights, to the plane and from there
COPIES = 5e9  # bytes/s of one such copy, through memory
WEIGHTS = int(SYNC / 2 * COPIES)  # bytes
VIEWS = 2
NOTHING = Step(0.0, False)  # made once: it is measured what the machinery costs


def devices(ratio: str, placement: str) -> tuple[float, float]:
    """Devices for env + rollout and for actors, relative to the disaggregated 1:1 rows that the
    times above are for.
    """
    r, a = parse_ratio(ratio)
    return (2.0, 2.0) if placement == "colocated" else (2.0 * r / (r + a), 2.0 * a / (r + a))


def workers(ratio: str, placement: str) -> int:
    """Env workers on so many devices."""
    return round(WORKERS * devices(ratio, placement)[0])


def sizes(costs, ratio: str, placement: str) -> tuple[int, int]:
    """Env workers and envs. costs: this module or another with the same constants.

    Colocated shares the envs of 1:1 out among twice the workers.
    """
    workers = round(costs.WORKERS * devices(ratio, placement)[0])
    return (
        workers,
        costs.ENVS if placement == "colocated" else costs.ENVS // costs.WORKERS * workers,
    )


def spec(tasks: tuple[str, ...], image_size: int) -> EnvSpec:
    """A task may be a number: its chunks take that many times as long."""
    tasks = tuple(tasks) or ("emulated",)
    for task in tasks:
        if task != "emulated" and not task.replace(".", "", 1).isdecimal():
            raise UserError(
                f"unknown emulated task {task!r}: give numbers, by which the time of a chunk is "
                "multiplied, such as 0.5 2"
            )
    return EnvSpec(tasks, ("wait",) * len(tasks), VIEWS, image_size, 4, 4, EPISODE * CHUNK)


class Env(envs.Env):
    mean_s = MEAN
    tail = TAIL

    def __init__(self, tasks: tuple[str, ...], image_size: int, quality: str = "fast"):
        super().__init__(tasks, image_size, quality)
        self.image = np.zeros((VIEWS, image_size, image_size, 3), np.uint8)
        self.means = [self.mean_s * (1.0 if task == "emulated" else float(task)) for task in tasks]

    def reset(self, task: int, seed: int) -> None:
        self.seed = seed
        self.mean = self.means[task]
        self.steps = 0

    def step(self, action: np.ndarray) -> Step:
        if self.mean and self.steps % CHUNK == 0:
            if self.steps == 0:
                self.rng = np.random.default_rng(self.seed)
            time.sleep(
                self.mean * float(self.rng.lognormal(-0.5 * self.tail**2, self.tail))
            )  # whose mean is 1
        self.steps += 1
        return NOTHING

    def observe(self) -> tuple[np.ndarray, np.ndarray]:
        return self.image, np.zeros(4, np.float32)
