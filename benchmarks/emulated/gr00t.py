"""`libero.py` with the times of RL-VLA³'s column LIBERO + GR00T N1.5: the same simulator, a
shorter actor.

    python bench.py ladder --setting gr00t

8 GPUs at 1:1, 64 envs (32 lanes here), 245 760 env steps per training step, global batch 1024:

    Disaggregated (sync)   220.81 env steps/s = 1113 s a step
    + Train Async          243.57             = 1009 s: the lockstep rollout, 384 rounds (`ROUND`);
                           so the actor takes 104 s
    Colocated (sync)       371.80             =  661 s: twice the devices halve the actor to 52 s;
                           the rollout takes 609 s

Inference is taken to be the share of a lockstep round that it is for π0.5. With E16 and E32 as
there, two equations are left:

    E16 · MEAN + 9/8 · INFER_ALL       = ROUND               disaggregated
    E32 · MEAN + 9/8 · INFER_ALL / 2   = ROUND · 609 / 1009  colocated

They give TAIL = 0.322 (E16 = 2.952, E32 = 1.873) and MEAN = 0.261 ROUND. So a simulation worker
simulates 527 s, below the 559 s of the paper's own "+ Streamer" row, as it must: that row reaches
94 % of the limit, as π0.5's does 93 % of its own.

Left out: what `libero.py` leaves out.
"""

from benchmarks.emulated import libero
from benchmarks.emulated.libero import (  # noqa: F401  the same here
    CHUNK,
    ENVS,
    EPISODE,
    INFER_FIXED,
    MICRO_BATCH,
    SCALE,
    TRAJECTORIES,
    WEIGHTS,
    WORKERS,
    spec,
)

ROUND = (
    1009 / (8 * 48) * SCALE
)  # seconds: one lockstep round of all lanes, simulation and inference
MEAN = 0.261 * ROUND  # seconds: mean simulation time of one chunk
TAIL = 0.322
INFER_ALL = 0.204 * ROUND  # seconds: one inference for all lanes
TRAIN_ALL = 104 / (8 * 48) * SCALE  # seconds: training one chunk step of every lane
MINIBATCHES = 4  # of an iteration: half as large as those of π0.5


class Env(libero.Env):
    mean_s = MEAN
    tail = TAIL
