"""A policy that only takes time, for `envs/emulated.py`, which derives the times: inference and training sleep.

Inference of n samples takes INFER_BASE + n·INFER_EACH seconds, a fifth of a full batch's time being independent of n; training one
sample takes TRAIN_EACH. More devices for a phase, by placement or ratio, divide its times; of `--ratio 1:1`, colocated has twice
the devices in either phase. Weights are a few numbers.
"""

import time

import torch
from torch import Tensor, nn

from envs.emulated import INFER_ALL, LANES, TRAIN_ALL, WORKERS, devices
from models.checkpoint import Header

INFER_BASE = 0.2 * INFER_ALL  # seconds, at 1:1
INFER_EACH = 0.8 * INFER_ALL / (WORKERS * LANES)
TRAIN_EACH = TRAIN_ALL / (WORKERS * LANES)  # per chunk step


def build(config, env_spec, device: str = "cpu", weights: str = "all") -> "Emulated":
    picture = (env_spec.views, env_spec.image_size, env_spec.image_size, 3)
    return Emulated(picture, config.rollout.chunk, env_spec.action_dim, devices(config.train.ratio, config.train.placement))


def preparation(header: Header, tokenizer: str) -> "Preparation":
    return Preparation()


class Preparation:
    """What the simulator shows and executes is what the model sees and returns."""

    def observe(self, images, state, task: str) -> dict:
        return {"image": images}

    def actions(self, actions, state):
        return actions


class Emulated(nn.Module):
    COMPILED = ()
    header = Header("emulated", {}, {"state_low": [0.0] * 4, "state_high": [1.0] * 4})

    def __init__(self, picture: tuple[int, ...], chunk: int, action_dim: int, speed: tuple[float, float]):
        super().__init__()
        self.picture = picture
        self.action = nn.Parameter(torch.zeros(chunk, action_dim))
        self.infer_speed, self.train_speed = speed

    def observation_fields(self) -> dict:
        return {"image": (self.picture, torch.uint8)}

    def slot_fields(self) -> dict:
        return {}

    def training_fields(self) -> tuple[str, ...]:
        return ("actions",)

    def draw(self, keys, explore) -> dict[str, Tensor]:
        return {}

    @torch.inference_mode()
    def act(self, obs: dict[str, Tensor], noise: dict[str, Tensor]) -> dict[str, Tensor]:
        n = len(obs["image"])
        time.sleep((INFER_BASE + n * INFER_EACH) / self.infer_speed)
        return {"actions": self.action.expand(n, -1, -1), "logprob": torch.zeros(n, *self.action.shape), "value": torch.zeros(n)}

    def evaluate(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        n = len(batch["actions"])
        time.sleep(n * TRAIN_EACH / self.train_speed)
        zero = self.action.sum() * 0.0
        return {"logprob": zero.expand(n, *self.action.shape), "value": zero.expand(n), "entropy": zero}

    def trainable(self) -> dict[str, nn.Parameter]:
        return dict(self.named_parameters())

    def idle(self) -> tuple[str, ...]:
        return ()
