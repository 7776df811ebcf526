"""Measures what making a model's pictures of an observation takes an env worker.

    python -m benchmarks.observations

Milliseconds of the processor for the two pictures of an observation, in one thread as in an env
worker, by the project whose checkpoint is trained and by the size that the simulator draws. The
median of 20. Pictures are random, which changes nothing: no function looks at them. Left out:
prompts, some 0.1 ms.
"""

import statistics
import time

import numpy as np
import torch

from errors import exit_on_user_error
from models.formats import gr00t, oft, pi
from models.gr00t import Gr00tConfig
from models.oft import OftConfig
from models.pi import FULL
from processes import keep_freed_memory

SIZES = ((256, 256), (480, 480), (480, 640))  # pixels, height and width
LAYOUTS = {  # who published the checkpoint: its preparation, its configuration, its layout
    "π0.5, openpi and RLinf": (pi, FULL["pi05"], "openpi"),
    "π0.5, LeRobot": (pi, FULL["pi05"], "lerobot"),
    "GR00T, NVIDIA and RLinf": (gr00t, Gr00tConfig(image_size=224), "nvidia"),
    "GR00T, LeRobot": (gr00t, Gr00tConfig(image_size=224), "lerobot"),
    "OpenVLA-OFT": (oft, OftConfig(image_size=224), "openvla"),
}


def main() -> None:
    torch.set_num_threads(1)
    keep_freed_memory()  # as workers do
    random = np.random.default_rng(0)
    print("ms per observation".ljust(26) + "".join(f"{h} × {w}".rjust(12) for h, w in SIZES))
    for name, (module, config, layout) in LAYOUTS.items():
        preparation = module.Preparation(config, {"layout": layout}, None)
        row = [milliseconds(preparation, random, *size) for size in SIZES]
        print(name.ljust(26) + "".join(f"{ms:12.2f}" for ms in row))


def milliseconds(preparation, random: np.random.Generator, height: int, width: int) -> float:
    """Returns the median processor time of preparing two pictures of this size."""
    pictures = random.integers(0, 256, (2, height, width, 3), np.uint8)
    taken = []
    for _ in range(20):
        start = time.thread_time()
        preparation.resize(pictures)
        taken.append(1e3 * (time.thread_time() - start))
    return statistics.median(taken)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
