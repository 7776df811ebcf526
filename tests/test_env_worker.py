"""A worker's lanes step by step against a scripted simulator, and the property that success never
selects what is trained.
"""

import math

import numpy as np
import pytest
import torch
from scripted import (
    HORIZON,
    LANES,
    SEGMENT,
    answer,
    asks,
    assert_finished,
    counted,
    drive,
    name,
    plan,
    publish,
    records,
    requests,
    seen,
    spec,
    worker_starter,
)

import envs
from channel import ACT, FINAL, VALUE, WAKE
from envs import Step
from envs.lanes import SingleLane
from evaluation import EVAL_SEEDS
from scheduler import Admission, Trajectories


@pytest.fixture
def worker(monkeypatch):
    with worker_starter(monkeypatch) as start:
        yield start


def test_a_trajectory_from_request_to_request(worker):
    channels = worker()
    pool = channels.pool
    zero, one = requests(channels, 2)
    assert (zero, one) == (asks(0, 0, ACT), asks(1, 0, ACT))
    assert seen(pool, 0, 0) == (name(0, 0, 0), 0, 0) and seen(pool, 1, 0) == (name(1, 0, 0), 0, 1)
    assert not torch.equal(pool["tokens"][0, 0], pool["tokens"][1, 0])  # two tasks, two prompts

    # Lane 1 is left waiting for its action all the while: nobody else minds.
    answer(channels, zero, plan())
    (zero,) = requests(channels, 1)
    assert zero == asks(0, 1, ACT) and seen(pool, 0, 1) == (name(0, 0, 0), 3, 0)
    assert not torch.equal(pool["tokens"][0, 0], pool["tokens"][0, 1])  # the state is in the prompt

    # Success in the middle of a chunk: the rest of it is not executed, and what is trained on is
    # what was sampled.
    answer(channels, zero, plan(success_at=1))
    (zero,) = requests(channels, 1)
    assert zero == asks(0, 2, ACT) and seen(pool, 0, 2) == (name(0, 0, 2), 0, 0)
    assert torch.equal(pool["actions"][0, 1], plan(success_at=1))
    for _ in (3, 4):
        answer(channels, zero, plan())
        (zero,) = requests(channels, 1)

    # A new episode after the time limit. The trajectory is complete once its last value has come.
    assert zero == asks(0, 4, VALUE) and seen(pool, 0, 4)[1] == 0
    assert pool["reward"][0].tolist() == [0, 1, 0, 0]
    assert pool["success"][0].tolist() == [False, True, False, False]
    assert pool["terminated"][0].tolist() == [False, True, False, False]
    assert pool["truncated"][0].tolist() == [False, False, False, True]
    assert channels.finished[0].get(0) == [] and pool["done"][0] == 0
    answer(channels, zero)
    assert_finished(channels, 0, trajectory=0, lengths=[SEGMENT])
    assert pool["collected"][:2].tolist() == [SEGMENT, 0] and pool["done"][1] == 0
    assert counted(channels, "env_steps", "episodes", "successes") == [3 + 2 + 3 + 3, 2, 1]


@pytest.mark.parametrize("width", [1, 2])
def test_the_time_limit_can_ask_for_the_value_of_the_last_observation(worker, width):
    """Before the episodes that it cut are replaced by new ones; success, which ends them too, asks
    for nothing."""
    channels = worker(bootstrap_truncated=True, lanes=width - 1)
    pool = channels.pool
    record = requests(channels, LANES // width)[0]
    for t in range(SEGMENT):
        assert record == asks(0, t, ACT)
        # Episodes are cut after t = 1, succeed at t = 2, and are not over at t = 3.
        pool["actions"][:LANES, t] = plan(success_at=1 if t == 2 else None)
        answer(channels, record)
        (record,) = requests(channels, 1)
        if t == 1:
            assert record == asks(0, 2, FINAL)
            assert seen(pool, 0, 2) == (name(0, 0, 0), HORIZON, 0)
            answer(channels, record)
            (record,) = requests(channels, 1)
            # The next action is asked for of the new episode.
            assert seen(pool, 0, 2) == (name(0, 0, 2), 0, 0)
    assert record == asks(0, SEGMENT, VALUE)
    assert pool["truncated"][0].tolist() == [False, True, False, False]
    assert pool["terminated"][0].tolist() == [False, False, True, False]


def test_no_request_waits_for_another_lane_s_step(worker):
    channels = worker(envs=4)
    lanes = requests(channels, 4)
    for record in lanes:
        channels.pool["actions"][record.slot, 0] = plan()
    channels.pool["actions"][lanes[2].slot, 0, :, 1] = 1.0  # seconds of a control step
    channels.replies[0].put(lanes)
    quick = []
    while len(quick) < 2:
        quick += channels.requests[0].get(2.0)
    assert [record.slot for record in quick] == [lanes[0].slot, lanes[1].slot]


def test_a_slot_says_whose_it_is(worker):
    channels = worker()
    requests(channels, 2)
    for slot, labels in ((0, [0, 0, 0]), (1, [1, 0, 1])):
        found = [channels.pool[field][slot].item() for field in ("env", "trajectory", "task")]
        assert found == labels


def test_a_trajectory_starts_when_its_version_allows_and_goes_on_where_the_last_ended(worker):
    channels = worker()
    pool = channels.pool
    table = channels.lanes.trajectory
    zero, one = requests(channels, 2)
    assert table.tolist() == [0, 0] and channels.lanes.generation.tolist() == [0]
    assert drive(channels, zero, begins_next=False) is None
    assert requests(channels, 0) == []  # before version 0, only batch 0 may start (K = 1)
    assert table.tolist() == [1, 0]  # which lane 0 waits to leave
    publish(channels, 0)
    (zero,) = requests(channels, 1)
    # It begins in the other half of the ring, with the observation that ended the last trajectory.
    assert zero == asks(2, 0, ACT) and pool["trajectory"][2] == 1
    assert seen(pool, 2, 0) == seen(pool, 0, SEGMENT)
    assert torch.equal(pool["tokens"][2, 0], pool["tokens"][0, SEGMENT])
    drive(channels, zero, begins_next=False)
    assert requests(channels, 0) == []  # lane 1's first trajectory still waits: version 1 cannot be
    assert table.tolist() == [2, 0]
    assert drive(channels, one, begins_next=True) == asks(3, 0, ACT)  # admitted at once
    assert table.tolist() == [2, 1]
    publish(channels, 1)
    (zero,) = requests(channels, 1)
    assert zero == asks(0, 0, ACT) and pool["trajectory"][0] == 2


def test_the_value_of_a_trajectory_is_asked_for_beside_the_next_one_s_first_actions(worker):
    """The two are sent together, so that the lane waits for one inference instead of two."""
    channels = worker()
    publish(channels, 0)
    zero, _ = requests(channels, 2)
    for _ in range(SEGMENT - 1):
        answer(channels, zero, plan())
        (zero,) = requests(channels, 1)
    answer(channels, zero, plan())
    assert channels.requests[0].get(10.0) == [asks(2, 0, ACT), asks(0, SEGMENT, VALUE)]

    # Whichever is answered first, the other is still waited for.
    answer(channels, asks(2, 0, ACT), plan())
    assert requests(channels, 1) == [asks(2, 1, ACT)] and channels.pool["done"][0] == 0
    answer(channels, asks(0, SEGMENT, VALUE))
    assert_finished(channels, 0, trajectory=0, lengths=[SEGMENT])


def test_an_answer_that_comes_twice_steps_once(worker):
    channels = worker()
    pool = channels.pool
    zero, one = requests(channels, 2)
    pool["actions"][0, 0] = plan()
    channels.replies[0].put([zero, zero])
    (zero,) = requests(channels, 1)
    assert zero == asks(0, 1, ACT) and seen(pool, 0, 1)[1] == 3
    assert pool["collected"][:2].tolist() == [1, 0]
    channels.replies[0].put([asks(0, 0, ACT), asks(0, 2, ACT), asks(1, 1, ACT)])
    assert requests(channels, 0) == []  # nobody waits for any of these
    assert pool["collected"][:2].tolist() == [1, 0]
    drive(channels, one, begins_next=False)
    answer(channels, asks(1, SEGMENT, VALUE))
    assert channels.finished[0].get(0.5) == []  # and nothing is finished twice


def test_tasks_that_do_not_divide_the_lanes_take_turns(worker):
    channels = worker(tasks=("one", "two", "three"))
    pool = channels.pool
    zero, one = requests(channels, 2)
    publish(channels, 0)
    for lane, first, second in ((0, zero, 2), (1, one, 0)):
        after = drive(channels, first, begins_next=True)
        assert after.slot == 2 + lane and seen(pool, after.slot, 0) == (name(lane, 1, 0), 0, second)
        assert [pool["task"][slot].item() for slot in (lane, 2 + lane)] == [lane, second]
    assert counted(channels, "episodes") == [4]


def test_the_lanes_of_a_group_meet_one_state_and_their_trajectories_end_with_their_episodes(worker):
    channels = worker(group=2, tasks=("one", "two"))
    pool = channels.pool
    zero, one = requests(channels, 2)
    assert seen(pool, zero.slot, 0) == seen(pool, one.slot, 0) == (name(0, 0, 0), 0, 0)
    publish(channels, 0)
    answer(channels, zero, plan(success_at=1))
    # The next trajectory begins at once: nobody asks for the value of an end.
    (third,) = requests(channels, 1)
    assert_finished(channels, zero.slot, trajectory=0, lengths=[1])
    assert third.kind == ACT and third.t == 0 and seen(pool, third.slot, 0) == (name(0, 1, 0), 0, 1)

    # The other one goes on until its time limit, two chunks.
    answer(channels, one, plan())
    (one,) = requests(channels, 1)
    assert one.t == 1 and channels.finished[0].get(0.0) == []
    answer(channels, one, plan())
    (one,) = requests(channels, 1)
    assert_finished(channels, 1, trajectory=0, lengths=[2])
    assert pool["collected"][:4].tolist() == [1, 2, 0, 0]
    # The same state again.
    assert one.t == 0 and seen(pool, one.slot, 0) == seen(pool, third.slot, 0)


def test_a_lane_of_a_group_that_must_wait_wakes_its_rollout_worker(worker):
    """Its trajectory has ended without a request, so nothing else says that it will not ask."""
    channels = worker(group=2)
    zero, one = requests(channels, 2)
    answer(channels, zero, plan(success_at=0))
    assert records(channels, 1) == [asks(0, 0, WAKE)]
    assert channels.lanes.trajectory.tolist() == [1, 0]
    assert not Admission(LANES, LANES, 1, group=2).admits(1, channels.plane.version)
    assert_finished(channels, 0, trajectory=0, lengths=[1])

    # One that may go on asks at once, which wakes as well.
    publish(channels, 0)
    assert records(channels, 1) == [asks(2, 0, ACT)]
    answer(channels, one, plan(success_at=0))
    assert records(channels, 1) == [asks(3, 0, ACT)]
    assert channels.lanes.trajectory.tolist() == [1, 1]


def test_a_resumed_run_meets_the_same_episodes(worker):
    whole = worker()
    resumed = worker(version=1)
    zero, _ = requests(whole, 2)
    drive(whole, zero, begins_next=False)
    # 4 chunks of 3 steps: two episodes end by the time limit, the next begins with the next
    # trajectory.
    publish(whole, 0)
    (again,) = requests(whole, 1)
    first, _ = requests(resumed, 2)
    assert resumed.lanes.trajectory.tolist() == [1, 1]
    assert resumed.pool["trajectory"][first.slot] == whole.pool["trajectory"][again.slot] == 1
    assert seen(resumed.pool, first.slot, 0) == seen(whole.pool, again.slot, 0)


# ---------------------------------------------------------------- its parts


def test_episodes_have_names_of_their_own():
    def names() -> list[int]:
        return [
            Trajectories(seed, 1).episode_seed(env, trajectory, t)
            for seed in (0, 1)
            for env in range(6)
            for trajectory in range(20)
            for t in range(5)
        ]

    seeds = names()
    assert len(set(seeds)) == len(seeds)
    assert seeds == names()
    # Never an evaluation's (5·10⁵) nor a demonstration's (10⁷).
    assert all(2**30 <= seed < 2**31 for seed in seeds)
    assert EVAL_SEEDS + 100_000 < 10_000_000 < 2**30


class Coin(envs.Env):
    """Succeeds with probability `rate`, after `length` control steps."""

    def __init__(self, rng, rate: float, length: int):
        self.rng = rng
        self.rate = rate
        self.length = length

    def observe(self):
        """Nobody looks."""

    def reset(self, task, seed):
        self.steps = 0
        self.wins = self.rng.random() < self.rate

    def step(self, action):
        self.steps += 1
        success = bool(self.wins and self.steps == self.length)
        return Step(float(success), success)


def test_success_does_not_select_what_is_trained_on():
    rate = 0.3
    horizon = 40
    chunk = np.zeros((5, 4))
    segment = 8
    lanes = 8
    rng = np.random.default_rng(0)
    admission = Admission(lanes, lanes, 1)
    speed = np.linspace(1.0, 6.0, lanes)  # fast and slow simulators, which succeed early or late
    tosses = [Coin(rng, rate, (5, 35)[i % 2]) for i in range(lanes)]
    known = spec((), 2)._replace(horizon=horizon)
    coins = [SingleLane(i, range(i, i + 1), known, coin) for i, coin in enumerate(tosses)]
    # at: trajectory and row of each lane
    at = np.zeros((lanes, 2), int)
    slots = {}
    version = 0
    trained = []
    for coin in coins:
        coin.reset([0], [0], [0])
    while version < 120:
        lane = rng.choice(lanes, p=speed / speed.sum())
        if at[lane, 1] == segment:
            at[lane] = at[lane, 0] + 1, 0
        slot = admission.slot(int(lane), int(at[lane, 0]))
        if at[lane, 1] == 0:
            if not admission.admits(at[lane, 0], version):
                continue
            slots[slot] = []
        outcome = coins[lane].play(chunk[None])
        (terminated,), (truncated,) = outcome.won, outcome.late
        if terminated or truncated:
            slots[slot].append(terminated)
            coins[lane].reset([0], [0], [0])
        at[lane, 1] += 1
        if (at @ [segment, 1] >= (version + 1) * segment).all():
            ring = version % 2 * lanes
            trained += [won for slot in range(ring, ring + lanes) for won in slots.pop(slot)]
            version += 1
    deviation = math.sqrt(rate * (1 - rate) / len(trained))
    assert len(trained) > 800 and abs(np.mean(trained) - rate) < 3 * deviation

    # These lanes could have shown it: had every batch taken the first half to finish, success would
    # look likelier than it is.
    wins = rng.random((1000, lanes)) < rate
    finished = np.where(wins, np.tile((5, 35), lanes // 2), horizon) / speed
    first_half = np.take_along_axis(wins, finished.argsort(axis=1)[:, : lanes // 2], axis=1)
    assert first_half.mean() > rate + 0.05
