"""Sleeps as long as RL-VLA³'s simulators took for LIBERO with GR00T N1.5: `--env emulated_gr00t`.

    python bench.py ladder --setting gr00t

The simulator is that of `libero.py`; the actor is shorter. 8 GPUs at 1:1, 64 envs (32 lanes here),
245 760 env steps per training step, global batch 1024:

    Disaggregated (sync)   220.81 env steps/s = 1113 s a step
    + Train Async          243.57             = 1009 s
    Colocated (sync)       371.80             =  661 s

- Train Async hides the actor alone. So lockstep rollout takes 1009 s, which is 384 rounds
  (`ROUND`), and the actor the other 104 s.
- Colocated, twice the devices halve the actor to 52 s. The rollout takes the other 609 s.

Inference is taken to be the share of a lockstep round that it is for π0.5. With E16 and E32 as
there, two equations are left:

    E16 · MEAN + 9/8 · INFER_ALL       = ROUND               disaggregated
    E32 · MEAN + 9/8 · INFER_ALL / 2   = ROUND · 609 / 1009  colocated

They give TAIL = 0.322 (E16 = 2.952, E32 = 1.873) and MEAN = 0.261 ROUND. So a simulation worker
simulates 527 s. That lies below the 559 s of the paper's own row "+ Streamer", as it must: that row
reaches 94 % of the limit, as π0.5's reaches 93 % of its own.

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
    UPDATE_EPOCHS,
    WEIGHTS,
    WORKERS,
    spec,
)

ROUND = 1009 / (8 * 48) * SCALE  # seconds of one lockstep round of all lanes, inference included
MEAN = 0.261 * ROUND  # seconds, mean simulation time of one chunk
TAIL = 0.322  # σ of the log-normal time of a chunk
INFER_ALL = 0.204 * ROUND  # seconds of one inference for all lanes
TRAIN_ALL = 104 / (8 * 48) * SCALE  # seconds of training one chunk step of every lane
MINIBATCHES = 4  # of an iteration: half as large as those of π0.5


class Env(libero.Env):
    mean_s = MEAN
    tail = TAIL
