"""What flow policies (π0, π0.5, GR00T) share beside their networks: their noise, and the density of
a stochastic denoise step.
"""

import math

import numpy as np
import torch
from torch import Tensor

from config import UserError
from models import generator


def check_steps(config) -> None:
    """config: denoise_steps and sde_steps. Raises UserError."""
    if not 1 <= config.sde_steps <= config.denoise_steps:
        raise UserError(
            f"--sde-steps {config.sde_steps} must lie between 1 and --denoise-steps "
            f"{config.denoise_steps}"
        )


def flow_noise(
    keys: list[tuple[int, int, int, int]],
    explore: list[bool],
    shape: tuple[int, ...],
    denoise_steps: int,
    sde_steps: int,
) -> tuple[Tensor, Tensor]:
    """Of a flow policy's inference: noise [n, *shape], and which denoise step is stochastic [n],
    drawn from the last `sde_steps`; −1 where `explore` is False.
    """
    noise = np.empty((len(keys), *shape), np.float32)
    index = np.full(len(keys), -1, np.int64)
    for i, (key, stochastic) in enumerate(zip(keys, explore, strict=True)):
        rng = generator(key)
        noise[i] = rng.standard_normal(shape, np.float32)
        if stochastic:
            index[i] = denoise_steps - 1 - rng.integers(sde_steps)
    return torch.from_numpy(noise), torch.from_numpy(index)


def normal_logprob(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """log N(x; mean, std²) of every number of a chunk: [n, C, A]."""
    z = (x - mean) / std
    return -0.5 * z**2 - std.log() - 0.5 * math.log(2.0 * math.pi)
