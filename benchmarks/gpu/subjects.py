"""Makes the models and slots that the sections measure: published sizes, random weights.

Weights are drawn where they are used, so no checkpoint is read and the host holds no copy. On a
device that is not there the models are the small embedded ones.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest.mock import patch

import torch
from torch import nn

import models
import prepare
import recipes
import transfers
from benchmarks.gpu import Where
from channel import ACT, VALUE, Channels, Counters, Record, SlotPool, Spec
from config import Config, completed, embedded_files
from envs import EnvSpec
from models import untrained
from models.compiled import random_observations
from rollout_worker import serve

# Whose settings a family is measured with. All play LIBERO's tasks here.
RECIPES = {
    "pi0": "libero_10_ppo_openpi",
    "pi05": "libero_10_ppo_openpi_pi05",
    "gr00t": "libero_10_ppo_gr00t",
    "oft": "maniskill_ppo_openvlaoft",  # the one that trains adapters, and needs no groups
}
TASKS = 10
LIBERO = EnvSpec(
    tuple(f"task {i}" for i in range(TASKS)), ("do it",) * TASKS, 2, 256, 8, 7, 480, robot="libero"
)


@dataclass
class Subject:
    """A family as a run has it, before there are weights."""

    name: str
    config: Config  # complete
    sketch: nn.Module  # on the meta device
    slots: Spec


@contextmanager
def sizes(where: Where, name: str, chunk: int) -> Iterator[None]:
    """Lets the published model of a family be the embedded one where the device is not there."""
    if not where.fake:
        yield
        return
    _, vocabulary = embedded_files("pi05", "metaworld")  # any will do
    small = models.files(name).embedded(name, str(vocabulary)).config
    small = untrained.fitted(small, LIBERO._replace(image_size=small.image_size), chunk, 24)
    with patch.dict(models.load(name).FULL, {name: small}):
        yield


def subject(where: Where, name: str, **changes) -> Subject:
    """Lays out a family. changes: settings, by name."""
    workers = {"env_workers": 1, "rollout_workers": 1, "actor_workers": 1}
    batches = dict.fromkeys(("envs", "batch", "minibatch"), where.slots)
    simulator = {"env": "libero", "tasks": (), "eval_envs": 0, "lanes": 0}
    settings = workers | batches | simulator
    settings |= {"segment": where.segment, "checkpointing": "off", "micro_batch": 32}
    settings |= {"precision": "bfloat16"}
    if where.fake:  # half precision takes processors fifty times as long
        changes = changes | {"precision": "float32", "prefix_dtype": "float32"}
    config = completed(recipes.apply(RECIPES[name]), **settings | changes)
    with sizes(where, name, config.rollout.chunk):
        sketch = models.build(config, LIBERO, weights="none")
    slots = prepare.slot_spec(config, LIBERO.seen_by(sketch.header), sketch)
    return Subject(name, config, sketch, slots)


def with_weights(where: Where, one: Subject, wide: bool = False) -> nn.Module:
    """Makes the model on the device. wide: all weights are in fp32."""
    network = models.load(one.name).NETWORK
    begin = network.begin

    def begin_filled(model: nn.Module, config, stats: dict) -> None:
        """Draws the weights where `models.build` would have read them."""
        draw(model, where.device, wide or where.fake)
        begin(model, config, stats)

    torch.manual_seed(0)
    with (
        sizes(where, one.name, one.config.rollout.chunk),
        patch.object(network, "begin", begin_filled),
    ):
        model = models.build(one.config, LIBERO, where.device, "none")
    return model.eval()


def draw(model: nn.Module, device: str, wide: bool) -> None:
    """Gives a model on the meta device random weights: what passes a layer keeps its size."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            dtype = torch.float32 if wide else parameter.dtype
            weights = torch.empty(parameter.shape, dtype=dtype, device=device)
            several = parameter.dim() > 1
            weights.normal_(0.0, math.prod(parameter.shape[1:]) ** -0.5 if several else 0.02)
            setattr(module, name, nn.Parameter(weights, requires_grad=False))


def filled_slots(where: Where, one: Subject, model: nn.Module) -> Channels:
    """Makes slots of trajectories that the model has played on random pictures."""
    config = one.config
    segment = config.env.segment
    pool = SlotPool(one.slots, where.slots)
    observed = random_observations(model, where.slots * (segment + 1), "cpu")
    for name, rows in observed.items():
        pool[name].copy_(rows.unflatten(0, (where.slots, segment + 1)))
    pool["env"].copy_(torch.arange(where.slots))
    pool["task"].copy_(torch.arange(where.slots) % TASKS)
    pool["length"].fill_(segment)
    pool["reward"].bernoulli_(0.3)
    transfers.lock(pool, (*model.observation_fields(), *model.slot_fields()), where.device)
    for t in range(segment + 1):
        kind = ACT if t < segment else VALUE
        requests = [Record(slot, t, kind, 0, 0) for slot in range(where.slots)]
        serve(model, requests, pool, config.train.seed, 0, where.device)
    return Channels.create(config, pool, None, Counters(1, ("none",)))


def requests_of(where: Where, count: int) -> list[Record]:
    """Lists what so many lanes ask for: a row each of the slots."""
    return [Record(i % where.slots, i // where.slots, ACT, 0, 0) for i in range(count)]


# ---------------------------------------------------------------- memory of the device


class Peak:
    """Measures the most memory that tensors take on the device, beyond what is there already."""

    def __init__(self, where: Where):
        self.fake = where.fake
        if not self.fake:
            torch.cuda.synchronize()
            self.before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()

    def gb(self) -> float | None:
        if self.fake:
            return None
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - self.before) / 1e9


def free_bytes(where: Where) -> float:
    """Returns the bytes of the device that nobody has."""
    return math.inf if where.fake else float(torch.cuda.mem_get_info()[0])


def room_for(where: Where, wanted: int) -> bool:
    """Whether so many bytes fit, with some for fragmentation."""
    if not where.fake:
        torch.cuda.empty_cache()
    return wanted < 0.95 * free_bytes(where)
