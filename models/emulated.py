"""A policy that only takes time, for `envs/emulated.py`: inference and training sleep; weights are a few numbers.

Inference of n samples takes INFER_BASE + n·INFER_EACH seconds: a quarter of a worker's simulation round for all 32 lanes.
Training one sample takes TRAIN_EACH: the 440 s that LIBERO + π0.5's actor phase takes against 1070 s of lockstep rollout.
"""

import time

import torch
from torch import Tensor, nn

from envs.emulated import LANES, ROUND, WORKERS
from models.checkpoint import Header

INFER_ALL = 0.25 * ROUND / 1.8  # seconds for all lanes at once
INFER_BASE = 0.2 * INFER_ALL
INFER_EACH = 0.8 * INFER_ALL / (WORKERS * LANES)
TRAIN_EACH = ROUND * 440 / 1070 / (WORKERS * LANES)  # per chunk step


def build(config, env_spec, weights: bool = True) -> "Emulated":
    return Emulated(config.rollout.chunk, env_spec.action_dim)


class Emulated(nn.Module):
    header = Header("emulated", {}, {"state_low": [0.0] * 4, "state_high": [1.0] * 4})

    def __init__(self, chunk: int, action_dim: int):
        super().__init__()
        self.action = nn.Parameter(torch.zeros(chunk, action_dim))

    def slot_fields(self) -> dict:
        return {}

    def training_fields(self) -> tuple[str, ...]:
        return ("actions",)

    def draw(self, keys, explore) -> dict[str, Tensor]:
        return {}

    @torch.inference_mode()
    def act(self, obs: dict[str, Tensor], noise: dict[str, Tensor]) -> dict[str, Tensor]:
        n = len(obs["image"])
        time.sleep(INFER_BASE + n * INFER_EACH)
        return {"actions": self.action.expand(n, -1, -1), "logprob": torch.zeros(n), "value": torch.zeros(n)}

    def evaluate(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        n = len(batch["actions"])
        time.sleep(n * TRAIN_EACH)
        zero = self.action.sum() * 0.0
        return {"logprob": zero.expand(n), "value": zero.expand(n), "entropy": zero}

    def trainable(self) -> dict[str, nn.Parameter]:
        return dict(self.named_parameters())
