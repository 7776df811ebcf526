"""Scripted envs that step together, as a vectorised simulator's."""

import numpy as np
import torch

import envs
from envs import Step


class Stacked(envs.Envs):
    kind: type  # of its envs: a class with reset, observe and step

    def __init__(self, tasks, image_size, count, device):
        self.envs = [self.kind(tasks, image_size) for _ in range(count)]

    def reset(self, rows, task, seeds):
        for row, seed in zip(rows, seeds, strict=True):
            self.envs[row].reset(task, seed)

    def observe(self):
        pictures, states = zip(*(env.observe() for env in self.envs), strict=True)
        return torch.from_numpy(np.stack(pictures)), torch.from_numpy(np.stack(states))

    def step(self, actions):
        steps = [env.step(action) for env, action in zip(self.envs, actions, strict=True)]
        return Step(*(torch.tensor(values) for values in zip(*steps, strict=True)))
