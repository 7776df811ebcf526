"""`train.py` with a simulator and a policy whose every number is computed by itself, so that
nothing but timing can differ.

What a matrix product gives one sample depends, in the last bit, on how many others share its batch.
Here all is elementwise, in fixed order: two runs that differ in a single bit have differed in what
they played, drew or trained, not in rounding. The simulator takes randomly long. Workers import
this file too, and register it in place of the emulated family and simulator.
"""

import sys
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

import envs
import models
from envs import EnvSpec, Step
from models.checkpoint import Header
from models.noise import generator

envs.SIMULATORS["emulated"] = ("exact", "")
models.MODELS["emulated"] = "exact"
FORMATS = None
# of an action; control steps of an episode
DEVIATION = 0.5
HORIZON = 60
slow = np.random.default_rng()  # its own in every process and run


def spec(tasks: tuple[str, ...], image_size: int) -> EnvSpec:
    return EnvSpec(("reach",), ("reach",), 1, image_size, 4, 4, HORIZON)


class Env(envs.Env):
    """A point that actions push; it succeeds where its first coordinate passes 0.1."""

    def __init__(self, tasks, image_size, quality):
        self.image = np.zeros((1, image_size, image_size, 3), np.uint8)

    def reset(self, task, seed):
        self.state = np.random.default_rng(seed).uniform(-0.1, 0.1, 4).astype(np.float32)

    def step(self, action):
        self.state = np.float32(0.95) * self.state + np.float32(0.05) * np.clip(
            action, -1, 1
        ).astype(np.float32)
        return Step(float(self.state[0] > 0.1), bool(self.state[0] > 0.1))

    def observe(self):
        time.sleep(0.004 * slow.random())
        return self.image, self.state


class Preparation:
    def observe(self, images, state, task):
        return {"image": images, "state": state}

    def actions(self, actions, state):
        return actions


def preparation(header, tokenizer):
    return Preparation()


def build(config, env_spec, device="cpu", weights="all"):
    model = Exact(config.rollout.chunk, env_spec.image_size)
    if config.train.resume and weights != "none":
        model.load_state_dict(load_file(Path(config.train.checkpoint) / "model.safetensors"))
    return model


class Exact(nn.Module):
    config = None
    header = Header("emulated", {}, {"state_low": [0.0] * 4, "state_high": [1.0] * 4})

    def __init__(self, chunk: int, image_size: int):
        super().__init__()
        self.chunk = chunk
        self.image_size = image_size
        self.gain, self.bias, self.value_head = (
            nn.Parameter(torch.zeros(size)) for size in ((4,), (chunk, 4), (4,))
        )

    def acts_in(self, name):
        return None

    def observation_fields(self):
        return {
            "image": ((1, self.image_size, self.image_size, 3), torch.uint8),
            "state": ((4,), torch.float32),
        }

    def slot_fields(self):
        return {}

    def training_fields(self):
        return ("actions", "state")

    def draw(self, keys, explore):
        noise = np.stack(
            [generator(key).standard_normal((self.chunk, 4), np.float32) for key in keys]
        )
        return {"epsilon": torch.from_numpy(noise) * torch.tensor(explore)[:, None, None]}

    def found(self, state, actions):
        """Log-prob [n, C, 4] and value [n]."""
        mean = self.gain * state[:, None] + self.bias
        value = sum(self.value_head[i] * state[:, i] for i in range(4))
        return {"logprob": -0.5 * ((actions - mean) / DEVIATION) ** 2, "value": value}

    @torch.inference_mode()
    def act(self, obs, noise):
        actions = self.gain * obs["state"][:, None] + self.bias + DEVIATION * noise["epsilon"]
        return {"actions": actions} | self.found(obs["state"], actions)

    def evaluate(self, batch):
        return self.found(batch["state"], batch["actions"])

    def trainable(self):
        return dict(self.named_parameters())

    def critic(self):
        return {"value_head": self.value_head}

    def idle(self):
        return ()


if __name__ == "__main__":
    import train
    from errors import exit_on_user_error

    with exit_on_user_error():
        sys.exit(train.begin(sys.argv[1:]))
