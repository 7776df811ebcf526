"""Model families, one file each. A new family is one file and one line in `MODELS`.

A model file offers `build(config, env_spec, weights=True) -> module`, and the module offers

    .header                                     models.checkpoint.Header, for the checkpoints of a run
    .slot_fields() -> {name: (shape, dtype)}    what one chunk step stores beyond the common fields, per chunk step
    .draw(keys, explore) -> {name: tensor}      all randomness of one inference, counter-based: see `generator`
    .act(obs, noise) -> {name: tensor}          "actions" [n, C, A], "logprob" [n], "value" [n] and the slot fields
    .training_fields() -> (name, …)             the slot fields that `evaluate` reads
    .evaluate(batch) -> {"logprob" [n], "value" [n], "entropy" []}   differentiable, from stored slot fields
    .trainable() -> {name: parameter}           what reinforcement learning updates and the weight plane carries

so that no stage knows which family it serves.
"""

import importlib

import numpy as np

from config import UserError

MODELS = {"pi05": "models.pi", "emulated": "models.emulated"}


def load(name: str):
    """The module of a model family. Raises UserError when it is unknown."""
    if name not in MODELS:
        raise UserError(f"unknown --model {name!r}: choose one of {', '.join(MODELS)}")
    return importlib.import_module(MODELS[name])


def generator(key: tuple[int, int, int, int]) -> np.random.Generator:
    """Random numbers named by (seed, lane, trajectory, chunk step) and by nothing else.

    Which requests share a batch is a matter of timing; the noise each one gets must not be.
    """
    seed, lane, trajectory, t = key
    return np.random.Generator(np.random.Philox(key=[seed, lane << 32 | trajectory], counter=[0, 0, 0, t]))
