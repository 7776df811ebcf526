"""Ways to save memory cost time and change nothing: activation checkpointing, and where what a
frozen VLM made of a frame is kept."""

from collections import Counter

import pytest
import test_gr00t
import test_learner
import test_oft
import torch
from conftest import observations, tiny_pi
from test_learner import BATCH, SEGMENT, close, filled_pool, learner_of, read

from config import Config
from streamer import MicroBatch

KEYS = [(1, i, 0, 0) for i in range(BATCH * SEGMENT)]
MODELS = {
    "pi05": lambda **how: tiny_pi(image_size=16, patch=8, chunk=4, **how),
    "pi0": lambda **how: tiny_pi(image_size=16, patch=8, chunk=4, pi05=False, **how),
    "gr00t": test_gr00t.tiny,
    "oft": lambda **how: test_oft.tiny_oft(),
}


def pool_of(model):
    """Slots that the model itself has filled."""
    n = len(KEYS)
    if isinstance(model, test_gr00t.Gr00t):
        obs = test_gr00t.observations(model.config, n)
    elif isinstance(model, test_oft.Oft):
        obs = test_oft.observations(model, n)
    else:
        obs = observations(model, n)
    out = model.act(obs, model.draw(KEYS, [True] * n))
    fields = {
        name: (obs | out)[name].clone().unflatten(0, (BATCH, SEGMENT))
        for name in model.training_fields()
    }
    return filled_pool(model, torch.float32, fields)


def train(learner, pool, epoch: int = 0) -> list[torch.Tensor]:
    """The gradient of a whole batch, in two micro-batches."""
    learner.model.zero_grad()
    for slots in ((0, 1, 2, 3), (4, 5, 6, 7)):
        learner.train(read(learner, pool, slots), MicroBatch(slots, epoch, 0, True, BATCH))
    return [p.grad.clone() for p in learner.parameters if p.grad is not None]


@pytest.mark.parametrize("how", [{}, {"train_vlm": True}])
@pytest.mark.parametrize("family", MODELS)
def test_checkpointed_blocks_give_the_same_gradient_and_keep_less(family, how):
    model = MODELS[family](**how)
    pool = pool_of(model)
    config = Config()
    config.actor.micro_batch = 7
    kept = Counter()

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[config.actor.checkpointing] += tensor.numel()
        return tensor

    found = {}
    for config.actor.checkpointing in ("off", "on"):
        learner = learner_of(model, config)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            found[config.actor.checkpointing] = train(learner, pool)
    assert all(map(torch.equal, found["on"], found["off"])) and len(found["on"]) > 10
    assert kept["on"] < 0.8 * kept["off"]


@pytest.mark.parametrize("family", ["pi05", "pi0", "gr00t"])
def test_a_prefix_on_the_device_is_computed_once_and_gives_the_gradient_of_a_recomputed_one(family):
    found = {}
    looks = Counter()
    for place in ("off", "gpu"):
        model = MODELS[family](cache_prefix=False)
        pool = pool_of(model)
        config = Config()
        config.actor.micro_batch = 7
        config.actor.cache_prefix = place
        config.actor.update_epochs = 2
        learner = learner_of(model, config)
        tower = model.vision.register_forward_hook(lambda *_, place=place: looks.update([place]))
        found[place] = [train(learner, pool, epoch) for epoch in range(2)]
        tower.remove()
        assert bool(learner.prefixes) == (place == "gpu")
    for once, again in zip(found["gpu"], found["off"], strict=True):
        assert close(once, again, 1e-6)
    assert looks["gpu"] * 2 == looks["off"] > 0
    assert len(learner.prefixes.rows) == BATCH * SEGMENT
    learner.finish_batch()
    assert not learner.prefixes.rows


def test_with_one_epoch_nothing_is_kept_on_the_device():
    config = Config()
    config.actor.cache_prefix = "gpu"
    config.actor.update_epochs = 1
    assert learner_of(test_learner.Toy(), config).prefixes is None
