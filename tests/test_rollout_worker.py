"""What one inference writes where, which requests are never served, and when a batch is due."""

import math
import time
from multiprocessing import get_context

import pytest
import torch
from conftest import observations, tiny_pi
from torch import nn

import metrics
import models
from channel import ACT, EVAL, FINAL, VALUE, WAKE, Channels, Counters, Record, SlotPool
from config import Config
from errors import UserError
from models import compiled
from rollout_worker import (
    LanesServed,
    answer,
    described,
    first_limits,
    run,
    serve,
    take_tuned_limits,
)
from scheduler import DynamicBatcher
from weights import WeightPlane

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
        "env": ((), torch.int32),
        "trajectory": ((), torch.int64),
        "asked": ((), torch.float64),
    }
    spec |= {name: ((t, *shape), dtype) for name, (shape, dtype) in model.slot_fields().items()}
    pool = SlotPool(spec, SLOTS)
    obs = observations(model, SLOTS * (t + 1))
    pool["image"].copy_(obs["image"].unflatten(0, (SLOTS, t + 1)))
    pool["tokens"].copy_(obs["tokens"].unflatten(0, (SLOTS, t + 1)))
    pool["env"].copy_(torch.arange(SLOTS))
    pool["trajectory"].copy_(10 + torch.arange(SLOTS))
    config = Config()
    config.env.env_workers = 2
    config.rollout.rollout_workers = config.actor.actor_workers = 1
    return Channels.create(config, pool, None, Counters(1, ("a",)))


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
    serve(model, records, channels.pool, seed=1, version=5, device="cpu")
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
        Record(2, 1, ACT, 1, 0),
        Record(0, SEGMENT, VALUE, 0, 3),
        Record(3, 2, EVAL, 1, 0),
        Record(1, 0, ACT, 0, 3),
    ]
    wrote = changed(channels, records, model)
    acts = {
        (name, slot, row) for name in WRITTEN if name != "final" for slot, row in ((2, 1), (1, 0))
    }
    assert wrote == acts | {("value", 0, SEGMENT), ("actions", 3, 0)}  # evaluation lives in row 0
    assert channels.pool["version"][2, 1] == 5
    answer(records, channels)
    assert channels.replies[0].get(0) == [records[1], records[3]]
    assert channels.replies[1].get(0) == [records[0], records[2]]


@pytest.mark.parametrize("head, names", [("action_out", "actions.*"), ("value_head", "value")])
@pytest.mark.parametrize("kind", [ACT, EVAL, VALUE, FINAL])
def test_nan_is_refused_before_anybody_takes_it(model, channels, kind, head, names):
    """Whatever is asked for: the sentence names the policy, and slots stay as they were."""
    next(p for name, p in model.named_parameters() if head in name and "bias" in name).data.fill_(
        math.nan
    )
    before = channels.pool["actions"].clone()
    config = Config()
    config.train.checkpoint = "some/model.safetensors"
    for version, words in ((3, "checkpoint some/model"), (4, "version 4 of the policy")):
        with pytest.raises(UserError, match=rf"{words}.* not finite \({names}\)"):
            policy = described(config, version, 3)
            serve(
                model, [Record(2, 1, kind, 1, 0)], channels.pool, 1, version, "cpu", policy=policy
            )
    assert torch.equal(channels.pool["actions"], before)


@pytest.mark.parametrize(
    "kind, row, wrote",
    [
        (VALUE, SEGMENT, {("value", 0, SEGMENT)}),
        (EVAL, 2, {("actions", 0, 0)}),
        (FINAL, 2, {("final", 0, 1)}),
    ],
)
def test_a_batch_of_one_kind_alone(model, channels, kind, row, wrote):
    assert changed(channels, [Record(0, row, kind, 0, 0)], model) == wrote


def test_what_is_written_can_be_trained_at_ratio_one(model, channels):
    pool = channels.pool
    records = [Record(slot, t, ACT, 0, 0) for slot in range(SLOTS) for t in range(SEGMENT)]
    for start in (0, 5, 10):  # batches of 5, 5 and 2
        serve(model, records[start : start + 5], pool, seed=1, version=0, device="cpu")
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
    records = [Record(slot, 1, ACT, 0, 0) for slot in range(SLOTS)]
    serve(model, records, pool, seed=1, version=0, device="cpu")
    together = pool["actions"][:, 1].clone()
    for record in reversed(records):
        serve(model, [record], pool, seed=1, version=0, device="cpu")
    torch.testing.assert_close(pool["actions"][:, 1], together, atol=1e-5, rtol=0)
    serve(model, records, pool, seed=2, version=0, device="cpu")
    assert (
        (pool["actions"][:, 1] - together).abs().amax((1, 2)) > 1e-2
    ).all()  # the seed names the noise


def test_padding_a_batch_changes_nothing(model, channels):
    pool = channels.pool
    records = [Record(slot, 1, ACT, 0, 0) for slot in range(3)]
    found = []
    for padded in (int, compiled.bucket):
        for name in WRITTEN:
            pool[name].fill_(-7)
        serve(model, records, pool, seed=1, version=0, device="cpu", padded=padded)
        found.append({name: pool[name].clone() for name in WRITTEN})
    for name in WRITTEN:
        torch.testing.assert_close(found[1][name], found[0][name], atol=1e-5, rtol=0)


def test_evaluation_acts_without_exploring(model, channels):
    pool = channels.pool
    for kind, step in ((EVAL, 0), (EVAL, 0), (ACT, 0)):
        before = pool["actions"][0, 0].clone()
        serve(model, [Record(0, step, kind, 0, 0)], pool, seed=1, version=0, device="cpu")
    obs = {name: pool[name][:1, 0] for name in ("image", "tokens")}
    ode = model.act(obs, model.draw([(1, 0, 10, 0)], [False]))["actions"][0]
    torch.testing.assert_close(before, ode, atol=1e-5, rtol=0)
    assert (pool["actions"][0, 0] - before).abs().max() > 1e-2


# ---------------------------------------------------------------- the worker

LANES = 3


class Counting(nn.Module):
    """A policy whose actions say how many samples it was given, which weights it had, and what it
    saw."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.full((1,), -1.0))

    def trainable(self):
        return {"weight": self.weight}

    def acts_in(self, name):
        return None

    def observation_fields(self):
        return {"seen": ((), torch.float32)}

    def slot_fields(self):
        return {}

    def draw(self, keys, explore):
        return {}

    def act(self, obs, noise):
        seen = obs["seen"]
        numbers = torch.stack([torch.full_like(seen, len(seen)), self.weight.expand_as(seen), seen])
        actions = numbers.T[:, None]
        return {"actions": actions, "logprob": actions, "value": seen + 0.5}


@pytest.fixture
def worker(monkeypatch):
    """Starts rollout worker 0, which serves three lanes of two env workers; the test plays those
    and the actor. `start.again` kills it and starts another in its place, as the launcher does."""
    monkeypatch.setattr(models, "build", lambda config, spec, device: Counting())
    processes = []

    def begin(config: Config, channels: Channels) -> None:
        meter = metrics.Meter("rollout-0", 0, channels.counters, None)
        args = (0, config, None, "cpu", channels, 0, meter)
        process = get_context("fork").Process(target=run, args=args, daemon=True)
        process.start()
        processes.append((process, config))

    def again(channels: Channels) -> None:
        process, config = processes.pop()
        process.kill()
        process.join()
        channels.counters.add(0, "restarts", 1)
        begin(config, channels)

    def start(width: int = 1, extra_staleness: int = 0, **rollout) -> Channels:
        config = Config()
        config.actor.extra_staleness = extra_staleness
        config.env.envs = config.actor.batch = LANES * width
        config.env.env_workers = 1 if width > 1 else 2
        config.env.lanes = LANES if width > 1 else 0
        config.rollout.rollout_workers = config.actor.actor_workers = 1
        config.rollout.batch_max = "all"
        config.rollout.batch_wait_ms = math.inf
        config.train.iterations = 3
        for name, value in rollout.items():
            setattr(config.rollout, name, value)
        fields = {
            "seen": ((SEGMENT + 1,), torch.float32),
            "actions": ((SEGMENT, 1, 3), torch.float32),
            "logprob": ((SEGMENT, 1, 3), torch.float32),
            "value": ((SEGMENT + 1,), torch.float32),
            "version": ((SEGMENT,), torch.int32),
            "env": ((), torch.int32),
            "trajectory": ((), torch.int64),
            "asked": ((), torch.float64),
        }
        pool = SlotPool(fields, 2 * LANES * width + 1)
        pool["seen"].copy_(torch.arange(pool["seen"].numel()).view_as(pool["seen"]))
        plane = WeightPlane({"weight": ((1,), torch.float32)})
        channels = Channels.create(config, pool, plane, Counters(1, metrics.columns(1)))
        begin(config, channels)
        publish(channels, 0)
        return channels

    start.again = again
    yield start
    for process, _ in processes:
        assert process.is_alive()
        process.kill()
        process.join()


def publish(channels: Channels, version: int) -> None:
    channels.plane.publish({"weight": torch.full((1,), float(version))}, version)
    channels.requests[0].put([Record(0, 0, WAKE, 0, 0)])


def ask(channels: Channels, slot: int, t: int, kind: int, generation: int = 0) -> Record:
    """As the env worker does whose lane writes into this slot."""
    record = Record(slot, t, kind, slot % len(channels.replies), generation)
    channels.pool["asked"][slot] = time.monotonic()
    channels.requests[0].put([record])
    return record


def answers(channels: Channels, worker: int, count: int) -> list[Record]:
    """The next answers to an env worker, which must be so many."""
    got = []
    while len(got) < count:
        more = channels.replies[worker].get(10.0)
        assert more, f"only {got} came"
        got += more
    assert len(got) == count
    return got


def wait_for_count(channels: Channels, column: str, count: int) -> None:
    """Waits until a counter comes to a number: a worker counts after it has answered."""
    deadline = time.monotonic() + 10.0
    while channels.counters.get(0, column) != count:
        assert time.monotonic() < deadline, f"{column}: {channels.counters.get(0, column)}"
        time.sleep(0.01)


def nothing_comes(channels: Channels) -> bool:
    return not any(queue.get(0.3) for queue in channels.replies)


def test_a_request_of_a_dead_generation_is_never_served(worker):
    """It was queued before the worker was replaced, and its successor has asked anew."""
    channels = worker()
    actions = channels.pool["actions"]
    ask(channels, 0, 2, ACT)
    assert nothing_comes(channels)  # it waits for the other two lanes
    channels.lanes.generation[0] = 1
    new = ask(channels, 0, 0, ACT, generation=1)
    other = ask(channels, 1, 0, ACT)
    # Three lanes have asked, one of them the dead worker's: the batch is of the living alone.
    assert answers(channels, 0, 1) == [new] and answers(channels, 1, 1) == [other]
    assert actions[0, 0, 0, 0] == actions[1, 0, 0, 0] == 2.0
    assert not actions[0, 2].any() and channels.pool["version"][0, 2] == 0
    # What comes late is not served either, nor does it fill a batch.
    for slot in (0, 2):
        ask(channels, slot, 1, ACT, generation=0)
    ask(channels, 0, SEGMENT, VALUE, generation=0)
    assert channels.lanes.generation.tolist() == [1, 0]
    last = ask(channels, 1, 1, ACT)  # of the other worker, whose generation is still 0
    assert nothing_comes(channels)
    for slot in (0, 2):
        ask(channels, slot, 2, ACT, generation=1)
    assert len(answers(channels, 0, 2)) == 2 and answers(channels, 1, 1) == [last]
    assert actions[1, 1, 0, 0] == 3.0 and actions[2, 2].any()
    assert not actions[[0, 2], 1].any() and channels.pool["value"][0, SEGMENT] == 0.0


def test_a_batch_does_not_wait_for_lanes_that_wait_for_weights(worker):
    channels = worker()
    actions = channels.pool["actions"]
    channels.lanes.trajectory[2] = 2  # of batch 2, which version 0 does not admit
    asked = [ask(channels, slot, 0, ACT) for slot in (0, 1)]
    assert answers(channels, 0, 1) + answers(channels, 1, 1) == asked
    assert actions[0, 0, 0, 0] == 2.0
    # New weights admit it, so a batch has three again.
    publish(channels, 1)
    ask(channels, 0, 1, ACT)
    ask(channels, 1, 1, ACT)
    assert nothing_comes(channels)
    channels.pool["trajectory"][2] = 2
    ask(channels, 2, 0, ACT)
    assert len(answers(channels, 0, 2)) == 2 and len(answers(channels, 1, 1)) == 1
    assert actions[2, 0, 0].tolist()[:2] == [3.0, 1.0]  # of the weights that have admitted it


def test_riders_alone_are_served_at_once_when_nobody_may_ask(worker):
    """The last values of a batch complete it, and nothing else comes before new weights do."""
    channels = worker()
    value = ask(channels, 0, SEGMENT, VALUE)
    evaluation = ask(channels, 2 * LANES, 5, EVAL)
    assert nothing_comes(channels)  # others may still ask, and T_max is endless
    channels.lanes.trajectory[:] = 2
    channels.requests[0].put([Record(0, 0, WAKE, 0, 0)])  # a parked lane's env worker wakes it
    assert answers(channels, 0, 2) == [value, evaluation]
    pool = channels.pool
    assert pool["value"][0, SEGMENT] == pool["seen"][0, SEGMENT] + 0.5
    assert pool["actions"][2 * LANES, 0, 0, 0] == 2.0  # the two were one batch


def test_a_wake_that_is_lost_is_made_up_for_within_a_second(worker):
    channels = worker()
    value = ask(channels, 0, SEGMENT, VALUE)
    assert nothing_comes(channels)
    channels.lanes.trajectory[:] = 2  # the env worker died before it could say so
    assert answers(channels, 0, 1) == [value]


def test_the_same_episode_is_evaluated_again_in_the_next_round(worker):
    """One that lasts a single chunk step asks with the same record in every round."""
    channels = worker(batch_wait_ms=1.0)
    for _ in range(3):
        evaluation = ask(channels, 2 * LANES, 0, EVAL)
        assert answers(channels, 0, 1) == [evaluation]


def test_one_record_stands_for_every_env_of_its_lane(worker):
    channels = worker(width=2)
    asked = [ask(channels, 2 * lane, 1, ACT) for lane in range(LANES)]
    assert answers(channels, 0, 3) == asked
    actions = channels.pool["actions"][: 2 * LANES, 1, 0]
    assert actions[:, 0].tolist() == [6.0] * 6
    assert actions[:, 2].tolist() == channels.pool["seen"][: 2 * LANES, 1].tolist()


def test_a_trajectory_is_never_played_with_weights_older_than_those_that_admitted_it(worker):
    channels = worker(batch_max=1)
    for version in range(1, 4):
        channels.plane.publish({"weight": torch.full((1,), float(version))}, version)
        channels.pool["trajectory"][0] = 1 + version  # admitted on this version, K = 1
        ask(channels, 0, 0, ACT)  # nobody has told the worker of the version
        answers(channels, 0, 1)
        assert channels.pool["actions"][0, 0, 0, 1] == version
        assert channels.pool["version"][0, 0] == version


def test_one_that_replaces_another_serves_what_it_is_asked_anew_and_nothing_else(worker):
    channels = worker(batch_max=1)
    actions = channels.pool["actions"]
    done = ask(channels, 0, 0, ACT)
    assert answers(channels, 0, 1) == [done]
    wait_for_count(channels, "requests", 1)
    publish(channels, 1)
    worker.again(channels)
    # It wakes every env worker once it serves: they see by the table that it is another.
    assert [queue.get(10.0) for queue in channels.replies] == [[Record(0, 0, WAKE, 0, 0)]] * 2
    assert channels.lanes.rollout_generation.tolist() == [1]

    # What the dead one was asked, read or not, answered or not, is not served.
    actions[0, 0] = -7
    channels.requests[0].put([done])
    ask(channels, 1, 0, ACT)
    assert nothing_comes(channels) and (actions[0, 0] == -7).all()
    # What it is asked anew is, with the newest weights, as is what comes next.
    again = ask(channels, 1, 0, ACT, generation=1)
    assert answers(channels, 1, 1) == [again]
    assert actions[1, 0, 0, 1] == channels.pool["version"][1, 0] == 1
    # Both generations count: of who asks, and of who is asked.
    channels.lanes.generation[1] = 1
    ask(channels, 1, 1, ACT, generation=1)
    assert nothing_comes(channels)
    both = ask(channels, 1, 1, ACT, generation=2)
    assert answers(channels, 1, 1) == [both]
    # Sums go on.
    wait_for_count(channels, "requests", 3)
    wait_for_count(channels, "fetches", 2)


def test_one_that_replaces_another_names_versions_as_that_one_did(worker):
    """With --extra-staleness 1 the newest weights are those of the version before."""
    channels = worker(batch_max=1, extra_staleness=1)
    for version in (1, 2):
        publish(channels, version)
    worker.again(channels)
    for queue in channels.replies:
        assert queue.get(10.0)
    answered = ask(channels, 0, 0, ACT, generation=1)
    assert answers(channels, 0, 1) == [answered] and channels.pool["version"][0, 0] == 1


# ---------------------------------------------------------------- lanes and limits


def lanes_served(rank: int) -> tuple[LanesServed, Channels]:
    """Of rollout worker `rank` of two: eight lanes, K = 1, two trajectories of each a batch."""
    config = Config()
    config.env.envs = 8
    config.env.env_workers = 2
    config.actor.batch = 16
    config.rollout.rollout_workers = 2
    config.actor.actor_workers = 1
    config.train.iterations = 4
    fields = {"asked": ((), torch.float64), "trajectory": ((), torch.int64)}
    fields["env"] = ((), torch.int32)
    plane = WeightPlane({"weight": ((1,), torch.float32)})
    channels = Channels.create(config, SlotPool(fields, 33), plane, Counters(1, ("a",)))
    return LanesServed(rank, config, channels), channels


def test_lanes_that_may_ask_are_those_that_the_published_version_admits():
    served, channels = lanes_served(1)
    assert served.count == 4  # lanes 1, 3, 5 and 7
    channels.plane.publish({"weight": torch.zeros(1)}, 0)
    channels.lanes.trajectory[:] = torch.tensor([9, 3, 9, 4, 9, 0, 9, 3])
    assert served.that_may_ask() == 3  # batches 0 and 1 are trajectories 0 to 3
    channels.plane.publish({"weight": torch.zeros(1)}, 1)
    assert served.that_may_ask() == 4
    channels.lanes.trajectory[1::2] = 8  # what would come after the last batch never starts
    channels.plane.publish({"weight": torch.zeros(1)}, 4)
    assert served.that_may_ask() == 0


def test_a_last_value_counts_only_where_its_lane_waits_for_it_alone():
    """In lockstep a batch then holds all lanes, whether they act or end a batch of training."""
    served, channels = lanes_served(1)
    channels.pool["env"][3] = 3
    channels.pool["trajectory"][3] = 1
    value = Record(3, 9, VALUE, 0, 0)
    channels.lanes.trajectory[3] = 1
    assert served.waits_for(value)
    channels.lanes.trajectory[3] = 2  # the lane has begun the next one, and asks for its actions
    assert not served.waits_for(value)
    assert served.waits_for(value._replace(kind=ACT)) and served.waits_for(
        value._replace(kind=FINAL)
    )
    assert not served.waits_for(value._replace(kind=EVAL))


def test_the_version_needed_that_may_serve_is_that_of_the_newest_trajectory():
    served, channels = lanes_served(0)
    channels.plane.publish({"weight": torch.zeros(1)}, 2)
    channels.pool["trajectory"][:3] = torch.tensor([2, 6, 0])
    batch = [Record(slot, 0, ACT, 0, 0) for slot in range(3)]
    assert served.version_needed(batch, 1) == 2  # trajectory 6 is of batch 3
    assert served.version_needed(batch[:1], 1) == 0
    riders = [record._replace(kind=VALUE) for record in batch]
    assert served.version_needed(riders, 1) <= 0
    assert served.version_needed(riders, 2) == 2
    # Once all is trained only the last evaluation is left, which is of the last weights.
    channels.plane.publish({"weight": torch.zeros(1)}, 4)
    assert served.version_needed(riders, 2) == 4


@pytest.mark.parametrize(
    "batch_max, wait_ms, limits",
    [("all", math.inf, (9, math.inf)), ("auto", "auto", (4, 0.01)), (5, 20.0, (5, 0.02))],
)
def test_limits_to_begin_with_and_those_that_are_tuned(batch_max, wait_ms, limits):
    config = Config()
    config.rollout.batch_max = batch_max
    config.rollout.batch_wait_ms = wait_ms
    assert first_limits(config, 9) == limits
    batcher = DynamicBatcher(*limits)
    meter = metrics.Meter("rollout-0", 0, Counters(1, metrics.columns(1)), None)
    take_tuned_limits(batcher, config, 9, 0.1, meter)
    auto = batch_max == "auto"
    # Until the launcher knows better, T_max follows half an inference.
    began = (limits[0], pytest.approx(0.8 * 0.01 + 0.2 * 0.05) if auto else limits[1])
    assert (batcher.batch_max, batcher.wait_s) == began
    meter.set("tuned_batch_max", 12)
    meter.set("tuned_wait_s", 0.5)
    take_tuned_limits(batcher, config, 9, 0.1, meter)
    assert (batcher.batch_max, batcher.wait_s) == ((9, 0.5) if auto else limits)
