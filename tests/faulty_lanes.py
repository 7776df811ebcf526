"""The simulator of `faulty.py` as a vectorised one."""

import faulty
import numpy as np
import torch
from faulty import spec

__all__ = ["Envs", "spec"]


class Envs:
    def __init__(self, tasks, image_size, count, device):
        self.envs = [faulty.Env(tasks, image_size) for _ in range(count)]

    def reset(self, rows, task, seeds):
        for row, seed in zip(rows, seeds, strict=True):
            self.envs[row].reset(task, seed)

    def observe(self):
        pictures, states = zip(*(env.observe() for env in self.envs), strict=True)
        return torch.from_numpy(np.stack(pictures)), torch.from_numpy(np.stack(states))

    def step(self, actions):
        rewards, successes = zip(*(env.step(action) for env, action in zip(self.envs, actions, strict=True)), strict=True)
        return torch.tensor(rewards), torch.tensor(successes)
