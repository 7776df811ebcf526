"""A policy that only takes time, for `envs/emulated.py`, `envs/emulated_gr00t.py` and
`envs/vectorised.py`, which derive it: inference and training sleep.

A fifth of the time of inference for all envs is independent of the number of samples. More devices
for a phase, by placement or ratio, divide its times; of `--ratio 1:1`, colocated has twice the
devices in either phase. Several actor workers share theirs. Weights mean nothing and never change,
but have as many bytes as their way through the weight plane is to take time for. Where simulation
takes no time (`--tasks 0`), neither do inference and training.
"""

import time

import torch
from torch import Tensor, nn

from envs import emulated, emulated_gr00t, vectorised
from models.checkpoint import Header

COSTS = {
    "emulated_gr00t": emulated_gr00t,
    "vectorised": vectorised,
}  # of a simulator; emulated.py's for all others


FORMATS = None  # nothing of it lies on disk


def build(config, env_spec, device: str = "cpu", weights: str = "all") -> "Emulated":
    picture = (env_spec.views, env_spec.image_size, env_spec.image_size, 3)
    costs = COSTS.get(config.train.env, emulated)
    for_rollout, for_actor = emulated.devices(config.train.parts, config.train.placement)
    infer = costs.INFER_ALL / for_rollout
    train = costs.TRAIN_ALL / for_actor * max(1, config.actor.actor_workers)
    if config.train.tasks == ("0",):
        infer = train = 0.0
    times = (
        costs.INFER_FIXED * infer,
        (1 - costs.INFER_FIXED) * infer / costs.ENVS,
        train / costs.ENVS,
    )
    return Emulated(picture, config.rollout.chunk, env_spec.action_dim, times, costs.WEIGHTS)


def wait(seconds: float) -> None:
    if seconds:  # `sleep(0)` gives up the core for 50 µs
        time.sleep(seconds)


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
    config = None
    header = Header("emulated", {}, {"state_low": [0.0] * 4, "state_high": [1.0] * 4})

    def __init__(
        self,
        picture: tuple[int, ...],
        chunk: int,
        action_dim: int,
        times: tuple[float, float, float],
        weights: int,
    ):
        """times: seconds of one inference, of each sample besides, and of training one sample (a
        chunk step); weights: bytes.
        """
        super().__init__()
        self.picture = picture
        self.weights = nn.Parameter(
            torch.zeros(weights // 4)
        )  # without a gradient, so no optimizer touches it
        self.action = nn.Parameter(torch.zeros(chunk, action_dim))
        self.infer_base, self.infer_each, self.train_each = times

    def observation_fields(self) -> dict:
        return {"image": (self.picture, torch.uint8)}

    def slot_fields(self) -> dict:
        return {}

    def training_fields(self) -> tuple[str, ...]:
        return ("actions",)

    def draw(self, keys, explore) -> dict[str, Tensor]:
        return {}

    def act(self, obs: dict[str, Tensor], noise: dict[str, Tensor]) -> dict[str, Tensor]:
        n = len(obs["image"])
        wait(self.infer_base + n * self.infer_each)
        zeros = self.action.expand(n, -1, -1)
        return {"actions": zeros, "logprob": zeros, "value": zeros[:, 0, 0]}

    def evaluate(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        n = len(batch["actions"])
        wait(n * self.train_each)
        zero = self.action.sum() * 0.0
        return {"logprob": zero.expand(n, *self.action.shape), "value": zero.expand(n)}

    def trainable(self) -> dict[str, nn.Parameter]:
        return dict(self.named_parameters())

    def critic(self) -> dict[str, nn.Parameter]:
        return {}

    def idle(self) -> tuple[str, ...]:
        return ()
