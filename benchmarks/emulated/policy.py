"""Sleeps as long as inference and training took: `--model emulated`, for the simulators beside it.

The files of the simulators derive for how long. A part of the time of inference for all envs does
not depend on the number of samples. More devices for a phase, by placement or ratio, divide its
times; against `--ratio 1:1`, colocated has twice the devices in either phase, and stages take turns
on them (`devices.py`). Several actor workers share theirs. Weights mean nothing and never change,
but there are as many bytes of them as their way through the weight plane is to take time for. They
have no gradient either, unless EMULATED_GRADIENT_MB says how many megabytes ranks are to sum. Where
simulation takes no time (`--tasks 0`), inference and training take none either.

With EMULATED_HELP=1 in the environment, disaggregated actors infer while they wait (`helping.py`).
"""

import contextlib
import os
import time
from multiprocessing import current_process
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.emulated import gr00t, libero, maniskill, maniskill_hybrid, metaworld
from benchmarks.emulated.devices import Device, device_of
from benchmarks.emulated.helping import Help
from models.checkpoint import Header

# Of a simulator; libero.py's for all others.
COSTS = {
    "emulated_gr00t": gr00t,
    "vectorised": maniskill,
    "emulated_metaworld": metaworld,
    "vectorised_hybrid": maniskill_hybrid,
}


class Times(NamedTuple):
    """Seconds."""

    infer_base: float  # of one inference
    infer_each: float  # of each sample besides
    train_each: float  # of training one sample, a chunk step


LAYERS = 8  # that weights with a gradient are divided into
FORMATS = None  # nothing of it lies on disk


def build(config, env_spec, device: str = "cpu", weights: str = "all") -> "Emulated":
    costs = COSTS.get(config.train.env, libero)
    placement = config.train.placement
    for_rollout, for_actor = libero.devices(config.train.parts, placement)
    infer = costs.INFER_ALL / for_rollout
    train = costs.TRAIN_ALL / for_actor * shares(placement, config.actor.actor_workers)
    if config.train.tasks == ("0",):
        infer = 0.0
        train = 0.0
    times = Times(
        costs.INFER_FIXED * infer,
        (1 - costs.INFER_FIXED) * infer / costs.ENVS,
        train / costs.ENVS,
    )
    picture = (env_spec.views, env_spec.image_size, env_spec.image_size, 3)
    gpu = device_of(current_process().name, placement)
    sizes = (config.rollout.chunk, env_spec.action_dim)
    model = Emulated(picture, *sizes, times, costs.WEIGHTS, gpu)
    if os.environ.get("EMULATED_HELP") == "1" and placement == "disaggregated":
        model.help = Help(for_rollout / (for_rollout + for_actor))
    number = int(1e6 * float(os.environ.get("EMULATED_GRADIENT_MB", 0)) / 4 / LAYERS)
    model.learnt.extend(nn.Parameter(torch.zeros(number)) for _ in range(LAYERS * (number > 0)))
    return model.to(device)


def shares(placement: str, actors: int) -> int:
    """Counts the devices that actor workers share out among themselves, by `devices.device_of`.

    Disaggregated, each has its own share of theirs."""
    most = {"colocated": 1, "hybrid": 2}.get(placement, actors)
    return max(1, min(actors, most))


def preparation(header: Header, tokenizer: str) -> "Preparation":
    return Preparation()


class Preparation:
    """What the simulator shows and executes is what the model sees and returns."""

    def observe(self, images, state, task: str) -> dict:
        return {"image": images}

    def actions(self, actions, state):
        return actions


class Emulated(nn.Module):
    """A policy that returns zeros, after a while."""

    config = None
    header = Header("emulated", {}, {"state_low": [0.0] * 4, "state_high": [1.0] * 4})

    def __init__(
        self,
        picture: tuple[int, ...],
        chunk: int,
        action_dim: int,
        times: Times,
        weights: int,
        gpu: Device | None = None,
    ):
        """picture: shape of an observation; weights: bytes; gpu: the emulated device that takes the
        time, if other stages have it, too."""
        super().__init__()
        self.gpu = gpu
        self.help: Help | None = None  # where actors infer while they wait
        self.picture = picture
        self.times = times
        # They have no gradient, so no optimizer touches them.
        self.weights = nn.Parameter(torch.zeros(weights // 4))
        self.learnt = nn.ParameterList()  # the gradients of these are 0
        self.action = nn.Parameter(torch.zeros(chunk, action_dim))

    def acts_in(self, name: str) -> None:
        """Its weights are used as they are."""

    def wait(self, seconds: float) -> None:
        """Takes so long, on the device."""
        if not seconds:  # `sleep(0)` gives up the core for 50 µs
            return
        if self.gpu:
            self.gpu.use(seconds)
        else:
            time.sleep(seconds)

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
        parts = self.times.infer_base, n * self.times.infer_each
        self.wait(self.help.inference(*parts) if self.help else sum(parts))
        zeros = self.action.expand(n, -1, -1)
        return {"actions": zeros, "logprob": zeros, "value": zeros[:, 0, 0]}

    def evaluate(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        n = len(batch["actions"])
        with self.help.training() if self.help else contextlib.nullcontext():
            self.wait(n * self.times.train_each)
        zero = sum(weight.sum() for weight in (self.action, *self.learnt)) * 0.0
        return {"logprob": zero.expand(n, *self.action.shape), "value": zero.expand(n)}

    def trainable(self) -> dict[str, nn.Parameter]:
        return dict(self.named_parameters())

    def critic(self) -> dict[str, nn.Parameter]:
        """It has none: its values are always 0."""
        return {}

    def idle(self) -> tuple[str, ...]:
        return ()
