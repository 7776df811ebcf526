"""One env of a vectorised simulator, as if it were not vectorised: for evaluation, and for looking
at it.
"""

import numpy as np
import torch


class Alone:
    """The contract of `Env`, on an `Envs` of one."""

    def __init__(self, module, tasks: tuple[str, ...], image_size: int):
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.envs = module.Envs(tasks, image_size, 1, self.device)

    def reset(self, task: int, seed: int) -> None:
        self.envs.reset([0], task, [seed])

    def observe(self) -> tuple[np.ndarray, np.ndarray]:
        return tuple(x[0].cpu().numpy() for x in self.envs.observe())

    def film(self, size: int = 256) -> np.ndarray:
        return self.envs.film(size)

    def step(self, action: np.ndarray) -> tuple[float, bool]:
        reward, success = self.envs.step(torch.from_numpy(np.float32(action))[None].to(self.device))
        return float(reward[0]), bool(success[0])

    def close(self) -> None:
        self.envs.close()
