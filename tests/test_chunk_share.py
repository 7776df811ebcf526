"""--chunk-share: the mean gradient over all draws is that of all chunk steps, a draw depends on
nothing but names, and everything that is left out is accounted for."""

from unittest.mock import Mock, patch

import numpy as np
import pytest
import torch
from test_learner import (
    BATCH,
    SEGMENT,
    Toy,
    close,
    gradients,
    learner_of,
    make_episodes,
    minibatches_of,
    part_of,
    read,
    streamed,
    toy_pool,
)

import memory
import prepare
import rows
from channel import layout
from config import Config, completed
from epochs import ExactProximal
from errors import UserError
from metrics import Ledger
from rows import START, drawn
from scheduler import Admission
from streamer import MicroBatch, Streamer
from validation import validate

ALL = tuple(range(BATCH))


def settings(algorithm: str, share: float, **others) -> Config:
    config = completed(Config(), algorithm=algorithm, chunk_share=share, group_size=4)
    return completed(config, envs=BATCH, batch=BATCH, **others)


def pool_of(algorithm: str):
    """Eight trajectories; of GRPO's episodes some end early, and of either group some succeed."""
    torch.manual_seed(0)
    pool = toy_pool(Toy())
    if algorithm == "grpo":
        make_episodes(pool, {0: 1, 3: 4, 6: 0})
    return pool


def starting_at(*starts: float):
    """Lets draws start there, in turn."""
    return patch.object(
        rows, "generator", Mock(side_effect=[Mock(**{"random": lambda s=s: s}) for s in starts])
    )


# Starts that stand for all: for a share of whole hundredths, those within a hundredth draw alike.
STARTS = (np.arange(100) + 0.5) / 100


@pytest.mark.parametrize("share", [0.01, 0.19, 0.3, 0.5, 0.99])
def test_every_chunk_step_is_drawn_with_the_same_probability(share):
    """Exactly: every draw that there is, by its weight. Trajectories are of any length, and some of
    their chunk steps are not kept."""
    kept = torch.ones(5, 64, dtype=torch.bool)
    kept[1, 7:] = kept[2, 1:] = kept[3] = False
    kept[4, ::3] = False
    total = torch.zeros(5, 64)
    for start in STARTS:
        with starting_at(*[start] * 5):
            found = drawn(kept, [(1, 0, 0, 0)] * 5, share)
        assert not (found & ~kept).any()
        number = kept.sum(1) * share
        assert (found.sum(1) >= number.floor()).all() and (found.sum(1) <= number.ceil()).all()
        total += found
    torch.testing.assert_close(total / 100, share * kept, rtol=0, atol=1e-6)


def test_a_draw_is_named_by_seed_version_and_place():
    kept = torch.ones(40, 64, dtype=torch.bool)
    names = [(1, place, 7, START) for place in range(40)]
    first = drawn(kept, names, 0.19)
    assert torch.equal(first, drawn(kept, names, 0.19))
    assert torch.equal(first[3:5], drawn(kept[3:5], names[3:5], 0.19))  # whoever is drawn beside it
    assert len({tuple(row) for row in first.tolist()}) > 4
    for other in ([(2, *name[1:]) for name in names], [(*name[:2], 8, START) for name in names]):
        assert not torch.equal(first, drawn(kept, other, 0.19))


@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
@pytest.mark.parametrize("share", [0.3, 0.5])
def test_the_mean_gradient_over_all_draws_is_that_of_all_chunk_steps(algorithm, share):
    """Of the critic, too. Exactly: a gradient is a sum over trajectories, so that it suffices to
    take the mean over every start that they share."""
    model = Toy()
    pool = pool_of(algorithm)
    whole, _ = gradients(model, pool, [ALL], settings(algorithm, 1.0))
    config = settings(algorithm, share)
    found = []
    for start in STARTS[5::10]:
        with starting_at(*[start] * BATCH):
            parts, sums = gradients(model, pool, [ALL], config)
        assert 0 < sums["trained"] < BATCH * SEGMENT * 0.7
        found.append(parts)
    mean = [torch.stack(parts).mean(0) for parts in zip(*found, strict=True)]
    assert close(mean, whole, 1e-12)
    assert not close(found[0], whole, 0.1)


@pytest.mark.parametrize("algorithm, group", [("ppo", 1), ("grpo", 4)])
def test_a_draw_depends_neither_on_cuts_nor_on_order_nor_on_nodes(algorithm, group):
    model = Toy()
    pool = pool_of(algorithm)
    config = settings(algorithm, 0.5)
    whole, sums = gradients(model, pool, [ALL], config)
    assert 0 < sums["trained"] < BATCH * SEGMENT
    order = streamed(np.random.default_rng(0).permutation(BATCH), group=group)
    for most in (1, 3, 7, 40):
        parts, found = gradients(model, pool, order, completed(config, micro_batch=most))
        assert close(parts, whole, 1e-12) and found == pytest.approx(sums, rel=1e-6)

    # Two nodes that have half of the lanes each.
    half = BATCH // 2
    total = []
    trained = 0
    for node in range(2):
        share = Admission(half, half, 0, group=group, node=node, nodes=2)
        mine = part_of(pool, share.world(np.arange(half)))
        settled = completed(config, nodes=2, node=node)
        model.zero_grad()
        learner = learner_of(model, settled)
        learner.config = completed(learner.config, batch=half, envs=half)
        streamer = Streamer(share, 1, 2, 1, True, 0, 1, seed=1, version=0)
        for micro in minibatches_of(streamer)[0]:
            assert micro.minibatch_size == BATCH
            learner.train(read(learner, mine, micro.slots), micro)
        total.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        trained += learner.tally.get("trained")
    assert close([a + b for a, b in zip(*total, strict=True)], whole, 1e-12)
    assert trained == sums["trained"]


@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
def test_all_epochs_train_the_same_and_the_ledger_balances(algorithm):
    """So the exact proximal policy, which the first epoch computes, is known in the later ones."""
    config = settings(algorithm, 0.5, proximal="exact", update_epochs=3, minibatch=BATCH)
    pool = pool_of(algorithm)
    if algorithm == "grpo":
        make_episodes(pool, {0: 1, 3: 4})  # the second group fails as one, and is filtered
    learner = learner_of(Toy(), config)
    full = learner_of(Toy(), settings(algorithm, 1.0, update_epochs=3, minibatch=BATCH))
    places = []

    def watched(stored, now, asked):
        places.append(set(asked))
        return ExactProximal.of(learner.proximal, stored, now, asked)

    with patch.object(learner.proximal, "of", watched):
        for epoch in range(2):
            micro = MicroBatch(ALL, epoch, 0, True, BATCH)
            learner.train(read(learner, pool, ALL), micro)
            learner.step()
            full.train(read(full, pool, ALL), micro)
    learner.spared = list(ALL)  # --kl-stop ended the third epoch
    full.spared = list(ALL)
    assert places[0] == places[1] and len(places) == 2
    once = len(places[0])
    line = learner.finish_batch()
    every = full.finish_batch()
    total = Ledger([], epochs=3).add(line | {"collected": BATCH * SEGMENT})
    assert (line["trained"], line["skipped"], line["trained_once"]) == (2 * once, once, once)
    by = line["discarded_by"]
    assert once + by["undrawn"] == every["trained_once"] and every["discarded_by"]["undrawn"] == 0
    assert by["undrawn"] > 0 and by["filtered"] == every["discarded_by"]["filtered"]
    assert total["discarded"] == sum(by.values())
    same = ("reward", "filtered", "filtered_fraction", "episodes", "success_rate", "reuse")
    assert all(line[name] == every[name] for name in same)
    # Advantages are known of all, and scale the next ones alike.
    assert learner.algorithm.state() == pytest.approx(full.algorithm.state(), rel=1e-12)


def test_another_version_draws_others():
    config = settings("ppo", 0.5)
    learner = learner_of(Toy(), config)
    kept = torch.ones(BATCH, SEGMENT, dtype=torch.bool)
    first = learner.chosen(kept, ALL)
    assert torch.equal(first, learner_of(Toy(), config).chosen(kept, ALL))  # after a restart
    found = []
    for version in range(4, 10):
        learner.version = version
        found.append(learner.chosen(kept, ALL))
    assert any(not torch.equal(one, first) for one in found)
    assert learner_of(Toy(), settings("ppo", 1.0)).chosen(kept, ALL) is kept  # nothing is drawn


def test_what_is_not_drawn_takes_no_memory_and_fills_no_micro_batch():
    config = settings("ppo", 0.3, minibatch=4, actor_workers=1, segment=10)
    assert config.most_drawn == 3 and prepare.share_of(config)[0] == 4 * 3
    with pytest.raises(UserError, match="--micro-batch 13 is larger than the 12 chunk steps"):
        prepare.share_of(completed(config, micro_batch=13))
    fields = {"prefix": ((7,), torch.float32)}
    table = Mock(config=config, model=Mock(cache_fields=lambda: fields))
    assert memory.Table.prefixes(table) == layout(fields, BATCH * 3)[1]


@pytest.mark.parametrize("share", [0.0, 1.01, float("nan")])
def test_a_share_is_more_than_0_and_at_most_1(share):
    with pytest.raises(UserError, match="--chunk-share .* must be"):
        validate(settings("ppo", share))
