"""Lanes of several envs, as of a vectorised simulator, against a scripted one."""

import pytest
from scripted import (
    SEGMENT,
    answer,
    asks,
    assert_finished,
    counted,
    name,
    plans,
    publish,
    records,
    requests,
    seen,
    worker_starter,
)

from channel import ACT, VALUE, WAKE


@pytest.fixture
def worker(monkeypatch):
    with worker_starter(monkeypatch) as start:
        yield start


def test_a_lane_of_several_envs_asks_and_finishes_as_one(worker):
    channels = worker(envs=6, lanes=2)  # two lanes of three envs
    pool = channels.pool
    zero, one = requests(channels, 2)
    assert (zero, one) == (asks(0, 0, ACT), asks(3, 0, ACT))
    pictures = [seen(pool, slot, 0) for slot in range(6)]
    assert pictures == [(name(slot, 0, 0), 0, slot // 3) for slot in range(6)]  # a task per lane
    assert pool["env"][:6].tolist() == [0, 1, 2, 3, 4, 5]
    assert pool["trajectory"][:6].tolist() == [0] * 6
    assert pool["task"][:6].tolist() == [0, 0, 0, 1, 1, 1]
    assert channels.lanes.trajectory.tolist() == [0, 0]

    # Lane 1 is left waiting. In lane 0 the second env succeeds in the first chunk: it alone begins
    # another episode.
    answer(channels, zero, plans(None, 1, None))
    (zero,) = requests(channels, 1)
    assert zero == asks(0, 1, ACT)
    pictures = [seen(pool, slot, 1) for slot in range(3)]
    assert pictures == [(name(0, 0, 0), 3, 0), (name(1, 0, 1), 0, 0), (name(2, 0, 0), 3, 0)]
    for t in (1, 2, 3):
        answer(channels, zero, plans(None, None, None))
        (zero,) = requests(channels, 1)
        assert zero == asks(0, t + 1, ACT if t < 3 else VALUE)
    assert pool["terminated"][:3].int().tolist() == [[0, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    assert pool["truncated"][:3].int().tolist() == [[0, 1, 0, 1], [0, 0, 1, 0], [0, 1, 0, 1]]
    assert pool["success"][:3].sum() == 1 and pool["reward"][:3].sum() == 1.0
    # The step that the second env took after its success counts for nothing.
    assert counted(channels, "env_steps", "episodes", "successes") == [3 * 12 - 1, 6, 1]
    answer(channels, zero)
    assert_finished(channels, 0, trajectory=0, lengths=[SEGMENT] * 3)
    assert pool["collected"][:6].tolist() == [SEGMENT] * 3 + [0] * 3
    publish(channels, 0)
    (zero,) = requests(channels, 1)
    assert zero == asks(6, 0, ACT)
    assert all(seen(pool, 6 + i, 0) == seen(pool, i, SEGMENT) for i in range(3))


def test_a_lane_of_several_envs_is_marked_by_its_first_slot_alone(worker):
    channels = worker(envs=6, lanes=2, group=3)
    zero, one = requests(channels, 2)
    answer(channels, one, plans(0, 1, 2))
    assert records(channels, 1) == [asks(0, 0, WAKE)]  # a parked lane wakes its rollout worker
    assert_finished(channels, 3, trajectory=0, lengths=[1, 1, 1])
    assert channels.finished[0].get(0.1) == []  # one mark, and one record
    assert channels.pool["done"][:6].tolist() == [0, 0, 0, 1, 0, 0]
    assert channels.lanes.trajectory.tolist() == [0, 1]


def test_an_episode_of_a_group_that_plays_on_with_its_lane_counts_once(worker):
    channels = worker(envs=2, lanes=1, group=2)
    (record,) = requests(channels, 1)
    answer(channels, record, plans(1, None))
    (record,) = requests(channels, 1)
    # The first one has ended, whatever it does now; the other one runs out of time.
    answer(channels, record, plans(0, None))
    assert_finished(channels, 0, trajectory=0, lengths=[1, 2])
    pool = channels.pool
    assert pool["terminated"][:2, :2].int().tolist() == [[1, 0], [0, 0]]
    assert pool["reward"][:2, :2].tolist() == [[1, 0], [0, 0]]
    assert pool["truncated"][:2, :2].int().tolist() == [[0, 0], [0, 1]]
    assert pool["collected"][:2].tolist() == [2, 2]
    assert counted(channels, "env_steps", "episodes", "successes") == [2 + 6, 2, 1]


def test_a_replaced_lane_of_several_envs_plays_again_with_all_of_them(worker):
    channels = worker(envs=4, lanes=2, ranks=2)
    pool = channels.pool
    zero, one = requests(channels, 2)
    answer(channels, zero, plans(None, 0))
    requests(channels, 1)
    pool["done"][2] = 1  # as if lane 1, whose trajectories go to rank 1, had finished
    pool["done"][1] = 1  # only a lane's first slot has a meaning
    worker(replaces=channels, envs=4, lanes=2, ranks=2)
    publish(channels, 0)
    assert requests(channels, 2) == [asks(0, 0, ACT, 1), asks(6, 0, ACT, 1)]
    assert channels.lanes.trajectory.tolist() == [0, 1]
    assert [seen(pool, slot, 0)[1:] for slot in (0, 1)] == [(0, 0), (0, 0)]
    assert [seen(pool, slot, 0)[0] for slot in (0, 1)] == [name(0, 0, 0, 1), name(1, 0, 0, 1)]
