"""Sleeps as long as RL-VLA³'s simulators may have taken for ManiSkill on GPUs of their own: `--env
vectorised_hybrid --placement hybrid`.

    python bench.py ladder --setting maniskill_hybrid

The second version's hybrid 6:2, 78.6 % over its synchronous baseline. Its released configuration
(github.com/Haoran0301/RL-VLA3, maniskill_hyb62_*) says what that means: 3264 envs simulate on GPUs
0 to 5, inference has GPUs 6 and 7, and training all 8, in turns with either; episodes of 16 chunks
of 5 steps, 2 update epochs. (`train.py --placement hybrid` cuts 8 GPUs at 6:2 into 3, 3 and 2, and
nobody shares them.)

At the first version's pace (`maniskill.py`) a round would take 71 s of simulation, 44 s of
inference and 34 s of training. Training would then be so long that GPUs which never rest gain 42 %
at most, so the second version's 78.6 % was not reached at that pace. What it tells of its own: 6:2
is a fair cut if either side takes as long, so inference takes what simulation takes. Training then
follows from the gain (`GAIN`), by the same rule as in `metaworld.py`: where GPUs never rest, a
round is 1.786 / 0.935 = 1.91 times as fast as where all wait for all. With inference and simulation
of 1, that is (2 + training) / (1 + training), so training takes 0.099. `docs/performance.md` has
the gain for other shares of training.

One second there is one second of simulation at the first version's pace. A lane's n envs take FIXED
+ n · EACH; with 544 envs on a GPU FIXED hardly counts, so a GPU's envs are 4 lanes where they need
not wait for each other.

Left out: what `maniskill.py` leaves out. One env worker stands for all six GPUs, which do the same;
one env for 51 of the paper's. Its baseline has two halves of the envs take turns, which hides more
than where all wait for all, and moves weights off the GPU and back at every step; neither is here.
"""

from benchmarks.emulated import maniskill
from benchmarks.emulated.devices import Device
from benchmarks.emulated.maniskill import (  # noqa: F401  the same here
    CHUNK,
    EPISODE,
    WEIGHTS,
    spec,
)

SCALE = 1 / 400  # seconds here per second there
PAPERS = 544  # envs of a GPU
WORKERS = 1
ENVS = 64
LANES = 4  # of the env worker, where all do not wait for all
LOCKSTEP_LANES = 2  # where they do: one for either rank of training, which begin together
TRAJECTORIES = 2  # of each env in an iteration
UPDATE_EPOCHS = 1  # the paper's two are in `TRAIN_ALL`
MINIBATCHES = 1
MICRO_BATCH = 16  # trajectories, at most
FIXED = maniskill.FIXED / maniskill.SCALE * SCALE  # seconds per chunk of a lane
EACH = maniskill.EACH / maniskill.SCALE * PAPERS / ENVS * SCALE  # seconds per chunk of an env
SIMULATION = FIXED + ENVS * EACH  # seconds of a round, on 6 GPUs

GAIN = 1.786  # of the paper's asynchronous row over its synchronous one
REACHED = 0.935  # of its bound, as the paper's rows reach elsewhere
TRAINING = (2 - GAIN / REACHED) / (GAIN / REACHED - 1)  # of a round's simulation
# Seconds on 4 GPUs, as `libero.py` has them: inference has 2 here, and a trajectory of 16 chunks
# also asks for its last value; training has 8.
INFER_ALL = SIMULATION * EPISODE / (EPISODE + 1) / 2
INFER_FIXED = 0.01  # share of it that does not depend on the number of envs: 0.43 s of 44 s
TRAIN_ALL = TRAINING * SIMULATION * 2


class Envs(maniskill.Envs):
    """`count` envs that step together, on device 0."""

    def __init__(self, tasks: tuple[str, ...], image_size: int, count: int, device: str):
        super().__init__(tasks, image_size, count, device)
        self.gpu = Device(0)

    def simulate(self) -> None:
        self.gpu.use(FIXED + self.count * EACH)
