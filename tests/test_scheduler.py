"""Eq. 1 with a fake clock, admission under random scheduling, and what a ratio means on every
machine.
"""

import math
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from config import MOST_WORKERS, Config, completed, parse_ratio
from errors import UserError
from scheduler import Admission, DynamicBatcher, divide, nearest, place

fast = settings(deadline=None, derandomize=True, max_examples=60)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_serves_when_b_max_requests_are_queued():
    batcher = DynamicBatcher(3, 10.0, Clock())
    for request in range(3):
        assert batcher.remaining() != 0.0
        batcher.add(request)
    assert batcher.remaining() == 0.0
    assert batcher.take() == ([0, 1, 2], 0.0)
    assert batcher.remaining() is None


def test_serves_when_the_oldest_request_has_waited_t_max():
    batcher = DynamicBatcher(3, 10.0, clock := Clock())
    batcher.add("old")
    clock.now = 4.0
    batcher.add("young")
    assert batcher.remaining() == 6.0
    clock.now = 10.0
    assert batcher.remaining() <= 0.0
    assert batcher.take() == (["old", "young"], 10.0)


def test_clock_starts_at_the_first_queued_request():
    batcher = DynamicBatcher(3, 10.0, clock := Clock())
    clock.now = 1000.0  # an idle time counts for nothing
    assert batcher.remaining() is None
    batcher.add(0)
    assert batcher.remaining() == 10.0
    clock.now = 1010.0
    batcher.take()
    clock.now = 2000.0
    batcher.add(1)
    assert batcher.remaining() == 10.0


def test_a_request_left_behind_keeps_its_own_clock():
    batcher = DynamicBatcher(2, 10.0, clock := Clock())
    for now in (0.0, 1.0, 2.0):
        clock.now = now
        batcher.add(now)
    assert batcher.take() == ([0.0, 1.0], 2.0)
    clock.now = 5.0
    assert batcher.remaining() == 7.0  # queued at 2, due at 12


def test_endless_wait_is_lockstep():
    batcher = DynamicBatcher(4, math.inf, clock := Clock())
    for lane in range(3):
        batcher.add(lane)
    clock.now = 1e9
    assert batcher.remaining() == math.inf
    batcher.add(3)
    assert batcher.remaining() == 0.0


def test_uncounted_requests_ride_along_and_never_fill_a_batch():
    batcher = DynamicBatcher(2, math.inf, Clock())
    for request in ("eval a", "eval b", "eval c"):
        batcher.add(request, counted=False)
    assert batcher.remaining() == math.inf
    batcher.add("lane 0")
    assert batcher.remaining() == math.inf
    batcher.add("lane 1")
    batcher.add("eval d", counted=False)
    batcher.add("lane 2")
    assert batcher.remaining() == 0.0
    assert batcher.take()[0] == ["eval a", "eval b", "eval c", "lane 0", "lane 1", "eval d"]
    assert batcher.remaining() == math.inf and batcher.counted == 1


def test_an_uncounted_request_alone_is_served_after_t_max():
    batcher = DynamicBatcher(2, 10.0, clock := Clock())
    batcher.add("eval", counted=False)
    clock.now = 10.0
    assert batcher.remaining() <= 0.0 and batcher.take()[0] == ["eval"]


def test_a_batch_is_due_once_all_who_may_ask_have_asked():
    """Lanes that wait for weights ask for nothing, and nobody waits for them."""
    batcher = DynamicBatcher(4, math.inf, Clock())
    batcher.add("lane 0")
    batcher.add("lane 1")
    assert batcher.limit == 4 and batcher.remaining() == math.inf
    batcher.expect_at_most(3)
    assert batcher.limit == 3 and batcher.remaining() == math.inf
    batcher.add("a last value", counted=False)
    assert batcher.remaining() == math.inf
    batcher.expect_at_most(2)  # the third lane has finished its trajectory meanwhile
    assert batcher.limit == 2 and batcher.remaining() == 0.0
    assert batcher.take()[0] == ["lane 0", "lane 1", "a last value"]

    batcher.expect_at_most(9)  # weights have come: B_max counts again
    assert batcher.limit == 4
    for lane in range(5):
        batcher.add(lane)
    assert batcher.remaining() == 0.0 and batcher.take()[0] == [0, 1, 2, 3]


def test_riders_alone_are_due_at_once_when_nobody_may_ask():
    batcher = DynamicBatcher(2, math.inf, clock := Clock())
    batcher.expect_at_most(0)
    assert batcher.limit == 0 and batcher.remaining() is None
    batcher.add("a last value", counted=False)
    batcher.add("eval", counted=False)
    clock.now = 3.0
    assert batcher.remaining() == 0.0
    assert batcher.take() == (["a last value", "eval"], 3.0) and batcher.remaining() is None
    # A dead worker's lane may not ask and yet has asked: its request leaves with a batch too.
    batcher.add("dead")
    batcher.add("eval", counted=False)
    assert batcher.remaining() == 0.0 and batcher.take()[0] == ["dead", "eval"]
    assert batcher.counted == 0 and batcher.remaining() is None


def test_a_request_s_wait_begins_when_it_was_sent():
    batcher = DynamicBatcher(2, 10.0, clock := Clock())
    clock.now = 7.0
    batcher.add("sent during an inference", queued=1.0)
    assert batcher.remaining() == 4.0
    clock.now = 11.0
    assert batcher.remaining() == 0.0
    assert batcher.take() == (["sent during an inference"], 10.0)


@fast
@given(
    lanes=st.integers(1, 5),
    batch_max=st.integers(1, 6),
    choices=st.lists(st.integers(0, 11), max_size=80),
)
def test_lanes_that_come_and_go_never_wait_for_each_other_without_end(lanes, batch_max, choices):
    """With an endless T_max nothing is left queued once every lane that may ask has asked, or
    nobody may."""
    batcher = DynamicBatcher(batch_max, math.inf, Clock())
    may_ask = [True] * lanes
    asked = [False] * lanes
    for choice in choices:
        lane = choice % lanes
        if choice >= 6 and not asked[lane]:  # it is parked, or weights for it have come
            may_ask[lane] = not may_ask[lane]
            batcher.add(("rider", lane), counted=False)
        elif may_ask[lane] and not asked[lane]:
            asked[lane] = True
            batcher.add(("lane", lane))
        batcher.expect_at_most(sum(may_ask))
        while (remaining := batcher.remaining()) is not None and remaining <= 0:
            batch, _ = batcher.take()
            of_lanes = [lane for kind, lane in batch if kind == "lane"]
            assert batch and len(of_lanes) <= batch_max
            for lane in of_lanes:
                asked[lane] = False
        if asked == may_ask:
            assert not batcher.queue
        assert sum(asked) == batcher.counted < max(1, batch_max)


def test_the_last_batch_is_the_last():
    admission = Admission(batch=4, envs=2, max_staleness=3, batches=2)
    assert [bool(admission.admits(j, 0)) for j in range(5)] == [True, True, True, True, False]
    assert admission.admits(np.array([0, 3, 4]), 1).tolist() == [True, True, False]


@fast
@given(
    batch_max=st.integers(1, 5),
    wait=st.sampled_from([0.0, 1.0, 3.0]),
    steps=st.lists(
        st.tuples(st.integers(0, 3), st.booleans(), st.sampled_from([0.0, 0.5, 2.0])), max_size=40
    ),
)
def test_no_request_starves_and_order_is_kept(batch_max, wait, steps):
    batcher = DynamicBatcher(batch_max, wait, clock := Clock())
    added = []
    served = []

    def serve() -> None:
        while (remaining := batcher.remaining()) is not None and remaining <= 0:
            batch, waited = batcher.take()
            assert batch and sum(counted for _, counted, _ in batch) <= batch_max
            assert waited == max(clock.now - queued for _, _, queued in batch)
            served.extend(batch)

    for count, counted, passed in steps:
        for _ in range(count):
            added.append((len(added), counted, clock.now))
            batcher.add(added[-1], counted)
        serve()
        assert all(clock.now - queued < max(wait, 1e-9) for _, _, queued in added[len(served) :])
        clock.now += passed
    clock.now += wait
    serve()
    assert served == added


@fast
@given(
    lanes=st.integers(1, 4),
    per_lane=st.integers(1, 3),
    staleness=st.integers(0, 2),
    choices=st.lists(st.integers(0, 5), max_size=150),
)
def test_admission_bounds_staleness_and_never_shares_a_slot(lanes, per_lane, staleness, choices):
    admission = Admission(lanes * per_lane, lanes, staleness)
    version = 0
    started = [0] * lanes
    live = {}
    members = {}
    for choice in choices:  # a lane that wants to start, or the actor that publishes
        complete = all(j >= (version + 1) * per_lane for j in started)
        if choice >= lanes:
            if complete:  # batch `version` is whole: train on it and publish
                ring = version % (staleness + 1) * admission.batch
                batch = {slot: live.pop(slot) for slot in range(ring, ring + admission.batch)}
                members[version] = sorted(batch.values())
                version += 1
        elif admission.admits(started[choice], version):
            slot = admission.slot(choice, started[choice])
            assert 0 <= slot < admission.slots and slot not in live
            live[slot] = (choice, started[choice])
            started[choice] += 1
        else:
            assert started[choice] >= (version + staleness + 1) * per_lane
        assert sum(started) <= (version + staleness + 1) * admission.batch
        # Somebody can always go on: either a lane may start, or the batch in training is complete.
        assert any(admission.admits(j, version) for j in started) or all(
            j >= (version + 1) * per_lane for j in started
        )
    for b, trained in members.items():  # who is in a batch never depends on the order of events
        assert trained == sorted(
            (lane, j) for lane in range(lanes) for j in range(b * per_lane, (b + 1) * per_lane)
        )


@fast
@given(
    lanes=st.integers(1, 12),
    width=st.integers(1, 4),
    per_lane=st.integers(1, 3),
    tasks=st.integers(1, 15),
)
def test_every_batch_holds_each_task_equally_often(lanes, width, per_lane, tasks):
    envs = lanes * width
    admission = Admission(envs * per_lane, envs, 1, width=width)
    total = np.zeros(tasks, int)
    for batch in range(4):
        members = [
            (env, j) for env in range(envs) for j in range(batch * per_lane, (batch + 1) * per_lane)
        ]
        dealt = np.bincount([admission.task(env, j, tasks) for env, j in members], minlength=tasks)
        total += dealt
        assert dealt.max() - dealt.min() <= 1 and total.max() - total.min() <= 1
    if lanes % tasks == 0:
        assert all(
            admission.task(env, j, tasks) == env // width % tasks
            for env in range(envs)
            for j in range(10)
        )


@pytest.mark.parametrize(
    "ratio, env, rollout, actor, threads",
    [
        ("3:1", 3, 1, 1, (6, 2)),
        ("2:1", 2, 1, 1, (5, 2)),
        ("1:1", 1, 1, 1, (4, 4)),
        ("6:2", 6, 1, 2, (6, 1)),
        ("1:3", 1, 1, 3, (2, 2)),
    ],
)
def test_ratio_on_eight_cores_without_gpus(ratio, env, rollout, actor, threads):
    found = place(ratio, "disaggregated", 0, 8, 0, 0, 0)
    assert (len(found.env_devices), len(found.rollout_devices), len(found.actor_devices)) == (
        env,
        rollout,
        actor,
    )
    assert (found.rollout_threads, found.actor_threads) == threads
    assert {*found.env_devices, *found.rollout_devices, *found.actor_devices} == {
        "cpu"
    } and "no GPU" in found.line


def test_given_worker_counts_replace_derived_ones_and_colocated_shares_all_cores():
    found = place("3:1", "colocated", 0, 8, 2, 2, 4)
    assert (len(found.env_devices), len(found.rollout_devices), len(found.actor_devices)) == (
        2,
        2,
        4,
    )
    assert (found.rollout_threads, found.actor_threads) == (4, 2)
    assert place("3:1", "disaggregated", 0, 1, 0, 0, 0).actor_threads == 1  # never 0


def cuda(*indices: int) -> tuple[str, ...]:
    return tuple(f"cuda:{i}" for i in indices)


@pytest.mark.parametrize(
    "ratio, placement, env, rollout, actor",
    [
        ("3:1", "disaggregated", cuda(*range(6)), cuda(*range(6)), cuda(6, 7)),
        ("2:1", "disaggregated", cuda(*range(4)), cuda(*range(4)), cuda(4, 5)),
        ("1:1", "disaggregated", cuda(*range(4)), cuda(*range(4)), cuda(*range(4, 8))),
        ("6:2", "disaggregated", cuda(*range(6)), cuda(*range(6)), cuda(6, 7)),
        ("1:3", "disaggregated", cuda(0, 1), cuda(0, 1), cuda(*range(2, 8))),
        ("3:1", "colocated", cuda(*range(8)), cuda(*range(8)), cuda(*range(8))),
        ("3:1", "hybrid", cuda(0, 1), cuda(2, 3, 4, 5), cuda(6, 7)),
        ("6:2", "hybrid", cuda(0, 1, 2), cuda(3, 4, 5), cuda(6, 7)),
    ],
)
def test_ratio_on_eight_gpus(ratio, placement, env, rollout, actor):
    found = place(ratio, placement, 8, 16, 0, 0, 0)
    assert (found.env_devices, found.rollout_devices, found.actor_devices) == (env, rollout, actor)
    assert ("2 idle" in found.line) == (ratio == "2:1")


def test_more_workers_than_gpus_share_them_in_turn():
    found = place("1:1", "disaggregated", 2, 16, 4, 2, 0)
    assert (
        found.env_devices == cuda(0, 0, 0, 0)
        and found.rollout_devices == cuda(0, 0)
        and found.actor_devices == cuda(1)
    )


def simulator(vectorised: bool = False, workers: int | None = None):
    return SimpleNamespace(vectorised=vectorised, workers=lambda ratio, placement: workers)


@pytest.mark.parametrize(
    "gpus, cores, envs, counted",
    [
        (8, 112, 64, 64),  # one each
        (8, 112, 128, 96),  # cores − 2 × GPUs
        (8, 384, 512, MOST_WORKERS - 16),  # as many as can be started
        (1, 16, 64, 14),
        (4, 4, 64, 4),  # one for each GPU
        (0, 112, 64, 3),  # without GPUs by the ratio,
        (0, 112, 2, 2),  # but no more than there are envs
    ],
)
def test_simulators_that_step_on_cores_get_processes_by_cores(gpus, cores, envs, counted):
    ratio = "3:1" if gpus == 0 else "1:1"
    config = completed(Config(), envs=envs, batch=envs, ratio=ratio, placement="colocated")
    placed = divide(config, simulator(), gpus, cores)
    assert len(placed.env_devices) == counted
    if gpus:
        dealt = [placed.env_devices.count(f"cuda:{i}") for i in range(gpus)]
        assert max(dealt) - min(dealt) <= 1 and f"{counted} env workers" in placed.line
        # Others say how many they want, or have one to a GPU, and a flag is obeyed.
        assert len(divide(config, simulator(True), gpus, cores).env_devices) == gpus
        assert len(divide(config, simulator(workers=5), gpus, cores).env_devices) == 5
        given = completed(config, env_workers=7)
        assert len(divide(given, simulator(), gpus, cores).env_devices) == 7


def test_threads_of_inference_and_training_leave_a_core_to_each_env_worker():
    assert place("1:1", "colocated", 8, 112, 64, 0, 0).rollout_threads == 3
    assert place("1:1", "colocated", 8, 112, 96, 0, 0).actor_threads == 1


@pytest.mark.parametrize(
    "ratio, placement, gpus, counts, words",
    [
        ("6:3", "disaggregated", 8, (0, 0, 0), "9 GPUs"),
        ("3:1", "disaggregated", 2, (0, 0, 0), "4 GPUs"),
        ("3:1", "disaggregated", 8, (0, 0, 3), "--actor-workers 3 contradicts"),
        ("1:1", "hybrid", 8, (0, 0, 0), "at least 2 parts"),
        ("3:1", "disaggregated", 0, (-1, 0, 0), "-1"),
        ("3:1", "disaggregated", 0, (0, -1, 0), "-1"),
        ("3:1", "disaggregated", 0, (0, 0, -1), "-1"),
        ("3:1", "disaggregated", 8, (0, -2, 0), "-2"),
    ],
)
def test_contradictions(ratio, placement, gpus, counts, words):
    with pytest.raises(UserError, match=words):
        place(ratio, placement, gpus, 16, *counts)


@pytest.mark.parametrize(
    "placement, wanted, found",
    [
        ("disaggregated", "3:1", ["1:1", "2:1", "3:1", "4:1", "2:1", "5:2", "3:1"]),
        ("disaggregated", "2:1", ["1:1", "2:1", "3:1", "3:2", "2:1", "5:2", "5:3"]),
        ("disaggregated", "1:9", ["1:1", "1:2", "1:3", "1:4", "1:5", "1:6", "1:7"]),
        ("hybrid", "3:1", ["1:1", "2:1", "3:1", "4:1", "4:2", "5:2", "3:1"]),
        ("hybrid", "2:6", ["1:1", "2:1", "2:2", "2:3", "2:4", "2:5", "2:6"]),
    ],
)
def test_the_nearest_ratio_uses_all_gpus(placement, wanted, found):
    for gpus, ratio in enumerate(found, start=2):
        where = "disaggregated" if gpus == 2 else placement
        assert nearest(placement, wanted, gpus)[:2] == (where, ratio)
        placed = place(ratio, where, gpus, 16, 0, 0, 0)
        assert "idle" not in placed.line and nearest(where, ratio, gpus)[2] == ""
    instead = f"; nearest to {placement} {wanted}"
    assert nearest(placement, wanted, 1) == ("colocated", wanted, instead)
    assert nearest("colocated", wanted, 7) == ("colocated", wanted, "")
    assert nearest(placement, wanted, 0) == (placement, wanted, "")


def test_gpus_that_nobody_uses_are_named():
    assert place("3:1", "colocated", 3, 16, 1, 2, 1).line.endswith("; 1 idle: cuda:2")
    found = place("3:1", "colocated", 3, 16, 0, 0, 2)
    assert found.actor_devices == cuda(0, 1) and "idle" not in found.line


def test_ratios():
    assert parse_ratio("3:1") == (3, 1) and parse_ratio("16:16") == (16, 16)
    for bad in ("0:1", "1:0", "3", "a:b", "3:", ":1", "3:1:1", "-3:1", "1.5:1", "", "³:1"):
        with pytest.raises(UserError, match="R:A"):
            parse_ratio(bad)
