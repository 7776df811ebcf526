"""Sleeps as long as RL-VLA³'s simulators may have taken for Meta-World with π0.5, colocated: `--env
emulated_metaworld`.

    python bench.py ladder --setting metaworld_colocated

The second version's headline is there, 85.2 % over its synchronous baseline. Its figures give that
ratio and no seconds. Its released configuration (github.com/Haoran0301/RL-VLA3, metaworld_col_*)
gives the rest: all stages on all 8 GPUs, 512 envs, 4 rollout epochs of 100 steps in chunks of 5, 2
update epochs. A training step is 4 × 20 rounds. Seconds of one round on 8 GPUs:

- training, 2.30 s: 512 chunk steps, twice, at the first version's pace (`PASS_S`: 442 s for 4
  passes over 24 576 chunk steps on 4 GPUs). Its tables take π0 and π0.5 to train as fast.
- inference, 1.93 s: 64 samples of each GPU, at the pace of `libero.py`, where 16 take 0.57 s and a
  fifth of that does not depend on their number; 21/20 of it, for a trajectory of 20 chunks also
  asks for its last value.
- drawing, 0.32 s: 64 envs of each GPU, 5 pictures of 480 × 480, 1 ms each. That is an assumption:
  RLinf draws at every control step. It happens on the GPU, everything else of a simulator beside
  it. The gain could be what it is with up to 15 ms a picture (see below).
- simulation: nothing says. It follows from the gain (`GAIN`). A GPU that never rests takes 4.65 s a
  round. The paper's asynchronous rows reach 93 to 94 % of what their bottleneck allows (LIBERO,
  `gr00t.py`); if this one does, too, never resting is 1.852 / 0.935 = 1.98 times as fast as its
  synchronous baseline, whose round takes 9.2 s. Training and inference take 4.3 s of it, and the
  slowest of the simulators the other 4.9 s. As for LIBERO, 16 workers with 2 lanes each have a
  tail of σ = 0.27, where the slowest takes 2.775 times the mean of one lane (`E16`).

What the gain allows for drawing: simulators that take as long as the GPU are best hidden, and give
1.39 + 4.33 / (4.33 + drawing) times. So drawing is 5.0 s at most, 15 ms a picture.

So a simulator takes 3.5 s of its worker, 0.75 of what the GPU needs. Its being longer than the GPU
would explain the same gain (5.9 s). The released code waits for rollout and training at every
step, so what it reached is rather less of its bound than assumed, and the bound rather higher.

Left out: what `libero.py` leaves out. 80 rounds of a training step are 20 here; one lane stands for
16 of the paper's envs.
"""

import time

from benchmarks.emulated import libero
from benchmarks.emulated.devices import Device
from benchmarks.emulated.libero import TAIL, WEIGHTS  # noqa: F401  the same here
from envs import EnvSpec

SCALE = 1 / 15  # seconds here per second there
PAPERS = 512  # envs, of which one lane stands for several
WORKERS = 8  # env workers on 4 GPUs; colocated they are twice as many, with 2 lanes each
ENVS = 32
CHUNK = 5  # control steps, of which one is long: for simplicity the first
EPISODE = 20  # chunks
TRAJECTORIES = 1  # of each lane in an iteration
UPDATE_EPOCHS = 2
MINIBATCHES = 4  # of an iteration: the paper's 2048 chunk steps are a 20th of its own
MICRO_BATCH = 2  # trajectories, at most

# Seconds on 4 GPUs, as `libero.py` has them; colocated stages have 8.
PASS_S = 442.2 / 4 / 24_576  # of training one chunk step once
TRAIN_ALL = PAPERS * PASS_S * SCALE  # of one pass over a chunk step of every env
FIXED = libero.INFER_FIXED * libero.INFER_ALL / libero.SCALE  # of one inference there, 16 samples
EACH = (1 - libero.INFER_FIXED) * libero.INFER_ALL / libero.SCALE / 16  # of each sample of a GPU
INFERENCE = FIXED + EACH * PAPERS / 8  # of 64 samples of a GPU
INFER_ALL = 2 * INFERENCE * SCALE  # of one inference for all lanes
INFER_FIXED = FIXED / INFERENCE  # share of it that does not depend on the number of lanes
PICTURE = 1e-3  # of drawing one picture of 480 × 480 on a GPU
DRAW = PAPERS / 8 * CHUNK * PICTURE / ENVS * SCALE  # of the GPU, for one chunk of one lane

GAIN = 1.852  # of the paper's asynchronous row over its synchronous one
REACHED = 0.935  # of its bound, as the paper's rows reach elsewhere
E16 = 2.775  # of the mean of one lane that the slowest of 16 workers takes for its 2 lanes
BUSY = (
    EPISODE + 1
) / EPISODE * INFER_ALL / 2 + UPDATE_EPOCHS * TRAIN_ALL / 2  # of the GPU, a round
SLOWEST = GAIN / REACHED * (BUSY + ENVS * DRAW) - BUSY  # seconds of a round's simulators
MEAN = SLOWEST / E16  # seconds, mean time of one chunk of a lane, drawing included
DRAWN = DRAW / MEAN  # share of it that draws


def spec(tasks: tuple[str, ...], image_size: int) -> EnvSpec:
    return libero.spec(tasks, image_size)._replace(horizon=EPISODE * CHUNK)


class Env(libero.Env):
    """One lane. It simulates beside the GPU and draws on it."""

    mean_s = MEAN
    chunk = CHUNK

    def __init__(self, tasks: tuple[str, ...], image_size: int, quality: str = "fast"):
        super().__init__(tasks, image_size, quality)
        self.device = Device(0)

    def simulate(self, seconds: float) -> None:
        time.sleep(seconds * (1 - DRAWN))
        self.device.use(seconds * DRAWN)
