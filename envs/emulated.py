"""A simulator that only takes time: sleeps, drawn from a long-tailed distribution calibrated on RL-VLA³'s LIBERO rows.

It measures the pipeline apart from this machine's cores: `python bench.py ladder`. Calibration (LIBERO + π0.5, 8 GPUs, 1:1,
245 760 env steps per training step): "Disaggregated" runs at 162.75 env steps/s, which is 1510 s a step, and "+ Train Async",
which only hides the actor, at 229.68, which is 1070 s: so the lockstep rollout takes 1070 s and the actor the other 440 s.
Over 8 rollout epochs of 48 chunk steps a lockstep round takes 2.79 s, here `ROUND`, scaled by `SCALE`. Two lanes share an env
worker, as several simulators share a CPU core; `TAIL` is the σ of the log-normal time of a chunk, chosen such that waiting for the
slowest of 16 workers, plus inference, makes a round 1.8 times as long as a worker's own simulation. The paper's "+ Streamer" row
shows 1070 s / 641 s = 1.67 of it recovered.

Left out: images that mean anything.
"""

import time

import numpy as np

from envs import EnvSpec

SCALE = 1 / 10  # seconds here per second there
ROUND = 2.79 * SCALE  # seconds: one lockstep round of all lanes, simulation and inference
WORKERS, LANES = 16, 2  # env workers, and lanes of each
MEAN = ROUND / 1.8 / LANES  # seconds: mean simulation time of one chunk
TAIL = 0.62
CHUNK = 10  # control steps of which one is long, for simplicity the first


def spec(tasks: tuple[str, ...], image_size: int) -> EnvSpec:
    return EnvSpec(("emulated",), ("wait",), 1, image_size, 4, 4, 8 * CHUNK)


class Env:
    def __init__(self, tasks: tuple[str, ...], image_size: int):
        self.image = np.zeros((1, image_size, image_size, 3), np.uint8)

    def reset(self, task: int, seed: int) -> None:
        self.rng, self.steps = np.random.default_rng(seed), 0

    def step(self, action: np.ndarray) -> tuple[float, bool]:
        if self.steps % CHUNK == 0:
            time.sleep(MEAN * float(self.rng.lognormal(-0.5 * TAIL**2, TAIL)))  # mean MEAN
        self.steps += 1
        return 0.0, False

    def observe(self) -> tuple[np.ndarray, np.ndarray]:
        return self.image, np.zeros(4, np.float32)

    def close(self) -> None:
        pass
