"""`train.py` on a simulator with a fault: the emulated one, without its sleeps, until FAULT strikes
in one of its processes.

FAULT is a key of FAULTS, or the name of an error, which `step` raises. It strikes once, in the
process that makes the file MARK, or without MARK again and again. AFTER: control steps of a process
before it may. WINS: half of all episodes succeed, at any step. Workers import this file too, and
register its simulator in place of the emulated one, and `faulty_lanes.py` in place of the
vectorised one.
"""

import builtins
import multiprocessing
import os
import signal
import sys
import time

import numpy as np

import envs
from benchmarks.emulated import libero
from envs import Step
from evaluation import EVAL_SEEDS

envs.SIMULATORS |= {"emulated": ("faulty", ""), "vectorised": ("faulty_lanes", "")}
spec = libero.spec
FAULTS = {
    "none": "",
    "start": "",
    "raise": "step",
    "segfault": "observe",
    "exit": "observe",
    "hang": "reset",
    "nan": "observe",
    "reward": "step",
    "evaluation": "reset",
    "kill": "observe",
}
SIGNALS = {"segfault": signal.SIGSEGV, "kill": signal.SIGKILL}
# control steps of this process, and its envs
taken = 0
made = 0


def strikes(where: str) -> bool:
    """Whether the fault happens here and now."""
    if FAULTS.get(os.environ["FAULT"], "step") != where or taken < int(os.environ["AFTER"]):
        return False
    try:
        return "MARK" not in os.environ or bool(os.open(os.environ["MARK"], os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False


class Env(libero.Env):
    def __init__(self, tasks, image_size, quality="fast"):
        global made
        super().__init__(tasks, image_size)
        self.number = made
        made = made + 1
        if os.environ["FAULT"] == "start":
            raise RuntimeError("there is no simulator")

    def reset(self, task, seed):
        if (os.environ["FAULT"] != "evaluation" or EVAL_SEEDS < seed < 10**7) and strikes("reset"):
            time.sleep(1e6)
        super().reset(task, seed)
        self.win = None  # the step that ends the episode with success
        if "WINS" in os.environ:  # also within a group, whose members begin with one seed
            rng = np.random.default_rng(
                [seed, self.number, *multiprocessing.current_process().name.encode()]
            )
            self.win = int(rng.integers(1, 2 * libero.EPISODE * libero.CHUNK))

    def step(self, action):
        global taken
        taken += 1
        self.steps += 1
        if strikes("step"):
            if os.environ["FAULT"] == "reward":
                return Step(float("inf"), False)
            raise getattr(builtins, os.environ["FAULT"], RuntimeError)("the simulator broke")
        return Step(float(self.steps == self.win), self.steps == self.win)

    def observe(self):
        image, state = super().observe()
        if strikes("observe"):
            if os.environ["FAULT"] in SIGNALS:
                os.kill(os.getpid(), SIGNALS[os.environ["FAULT"]])
            if os.environ["FAULT"] == "exit":
                os._exit(0)
            state = np.full(4, np.nan, np.float32)
        return image, state


if __name__ == "__main__":
    import train
    from errors import exit_on_user_error

    with exit_on_user_error():
        sys.exit(train.main(train.parse(sys.argv[1:])))
