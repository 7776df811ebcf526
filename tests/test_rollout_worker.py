"""Weights that arrive behind the back of a serving worker, and what one inference writes where."""

import time

import pytest
import torch
from conftest import observations, tiny_pi

from channel import (
    ACT,
    EVAL,
    FINAL,
    VALUE,
    Channels,
    Counters,
    IndexQueue,
    Record,
    SlotPool,
    WeightPlane,
)
from models import compiled
from rollout_worker import WeightFetcher, serve

SLOTS = 4
SEGMENT = 3


@pytest.fixture
def model():
    return tiny_pi(image_size=16, patch=8, chunk=4)


@pytest.fixture
def channels(model):
    c = model.config
    t = SEGMENT
    spec = {
        "image": ((t + 1, 1, 16, 16, 3), torch.uint8),
        "tokens": ((t + 1, c.tokens), torch.int32),
        "actions": ((t, 4, 4), torch.float32),
        "logprob": ((t, 4, 4), torch.float32),
        "value": ((t + 1,), torch.float32),
        "final": ((t,), torch.float32),
        "version": ((t,), torch.int32),
        "lane": ((), torch.int32),
        "trajectory": ((), torch.int32),
    }
    spec |= {name: ((t, *shape), dtype) for name, (shape, dtype) in model.slot_fields().items()}
    pool = SlotPool(spec, SLOTS)
    obs = observations(model, SLOTS * (t + 1))
    pool["image"].copy_(obs["image"].unflatten(0, (SLOTS, t + 1)))
    pool["tokens"].copy_(obs["tokens"].unflatten(0, (SLOTS, t + 1)))
    pool["lane"].copy_(torch.arange(SLOTS))
    pool["trajectory"].copy_(10 + torch.arange(SLOTS))
    return Channels(pool, None, Counters(1, ("a",)), (), (IndexQueue(), IndexQueue()), ())


WRITTEN = (
    "actions",
    "logprob",
    "value",
    "final",
    "version",
    "x_t",
    "x_next",
    "denoise_index",
    "prefix_cache",
    "prefix_feature",
)


def changed(channels, records, model) -> set[tuple[str, int, int]]:
    """Serves, and returns which (field, slot, row) of the pool it wrote."""
    before = {}
    for name, tensor in channels.pool.tensors.items():
        if name in WRITTEN:
            tensor.fill_(-7)
        before[name] = tensor.clone()
    serve(model, records, channels, seed=1, version=5, device="cpu")
    out = set()
    for name, tensor in channels.pool.tensors.items():
        assert name in WRITTEN or torch.equal(tensor, before[name])
        if name in WRITTEN:
            out |= {
                (name, s, t)
                for s in range(SLOTS)
                for t in range(tensor.shape[1])
                if (tensor[s, t] != -7).any()
            }
    return out


def test_each_kind_of_request_writes_its_own_rows_and_no_others(model, channels):
    records = [
        Record(2, 1, ACT, 1),
        Record(0, SEGMENT, VALUE, 0),
        Record(3, 2, EVAL, 1),
        Record(1, 0, ACT, 0),
    ]
    wrote = changed(channels, records, model)
    acts = {
        (name, slot, row) for name in WRITTEN if name != "final" for slot, row in ((2, 1), (1, 0))
    }
    assert wrote == acts | {("value", 0, SEGMENT), ("actions", 3, 0)}  # evaluation lives in row 0
    assert channels.pool["version"][2, 1] == 5
    assert channels.replies[0].get(0) == [records[1], records[3]]
    assert channels.replies[1].get(0) == [records[0], records[2]]


@pytest.mark.parametrize(
    "kind, row, wrote",
    [
        (VALUE, SEGMENT, {("value", 0, SEGMENT)}),
        (EVAL, 2, {("actions", 0, 0)}),
        (FINAL, 2, {("final", 0, 1)}),
    ],
)
def test_a_batch_of_one_kind_alone(model, channels, kind, row, wrote):
    assert changed(channels, [Record(0, row, kind, 0)], model) == wrote


def test_what_is_written_can_be_trained_at_ratio_one(model, channels):
    pool = channels.pool
    records = [Record(slot, t, ACT, 0) for slot in range(SLOTS) for t in range(SEGMENT)]
    for start in (0, 5, 10):  # batches of 5, 5 and 2
        serve(model, records[start : start + 5], channels, seed=1, version=0, device="cpu")
    batch = {name: pool[name][:, :SEGMENT].flatten(0, 1) for name in model.training_fields()}
    with torch.no_grad():
        out = model.evaluate(batch)
    torch.testing.assert_close(
        out["logprob"].sum((1, 2)), pool["logprob"].flatten(0, 1).sum((1, 2)), atol=1e-5, rtol=0
    )
    torch.testing.assert_close(
        out["value"], pool["value"][:, :SEGMENT].flatten(), atol=1e-5, rtol=0
    )


def test_actions_do_not_depend_on_how_requests_are_batched(model, channels):
    pool = channels.pool
    records = [Record(slot, 1, ACT, 0) for slot in range(SLOTS)]
    serve(model, records, channels, seed=1, version=0, device="cpu")
    together = pool["actions"][:, 1].clone()
    for record in reversed(records):
        serve(model, [record], channels, seed=1, version=0, device="cpu")
    torch.testing.assert_close(pool["actions"][:, 1], together, atol=1e-5, rtol=0)
    serve(model, records, channels, seed=2, version=0, device="cpu")
    assert (
        (pool["actions"][:, 1] - together).abs().amax((1, 2)) > 1e-2
    ).all()  # the seed names the noise


def test_padding_a_batch_changes_nothing(model, channels):
    pool = channels.pool
    records = [Record(slot, 1, ACT, 0) for slot in range(3)]
    found = []
    for size in (int, compiled.bucket):
        for name in WRITTEN:
            pool[name].fill_(-7)
        serve(model, records, channels, seed=1, version=0, device="cpu", size=size)
        found.append({name: pool[name].clone() for name in WRITTEN})
    for name in WRITTEN:
        torch.testing.assert_close(found[1][name], found[0][name], atol=1e-5, rtol=0)


def test_evaluation_acts_without_exploring(model, channels):
    pool = channels.pool
    for kind, step in ((EVAL, 0), (EVAL, 0), (ACT, 0)):
        before = pool["actions"][0, 0].clone()
        serve(model, [Record(0, step, kind, 0)], channels, seed=1, version=0, device="cpu")
    obs = {name: pool[name][:1, 0] for name in ("image", "tokens")}
    ode = model.act(obs, model.draw([(1, 0, 10, 0)], [False]))["actions"][0]
    torch.testing.assert_close(before, ode, atol=1e-5, rtol=0)
    assert (pool["actions"][0, 0] - before).abs().max() > 1e-2
