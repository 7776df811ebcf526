"""A worker that replaces a dead one: it reads from the marks where to go on, and nothing that was
meant for the dead one reaches it.
"""

import pytest
from scripted import (
    LANES,
    SEGMENT,
    answer,
    asks,
    drive,
    name,
    plan,
    publish,
    records,
    requests,
    seen,
    worker_starter,
)

from channel import ACT, VALUE, WAKE, Record


@pytest.fixture
def worker(monkeypatch):
    with worker_starter(monkeypatch) as start:
        yield start


def test_a_replacement_plays_again_what_is_not_marked_as_done(worker):
    channels = worker()
    pool = channels.pool
    zero, one = requests(channels, 2)
    publish(channels, 0)
    # Lane 0 has finished its first trajectory, and is in the second, of which one row is there.
    zero = drive(channels, zero, begins_next=True)
    answer(channels, zero, plan())
    (stale,) = requests(channels, 1)
    assert stale == asks(2, 1, ACT) and pool["trajectory"][2] == 1
    assert pool["collected"][:4].tolist() == [SEGMENT, 0, 1, 0]
    assert pool["done"][:4].tolist() == [1, 0, 0, 0]
    # An answer that the dead one does not live to read, or to use, or uses and asks once more.
    answer(channels, stale, plan(success_at=0))

    worker(replaces=channels)
    answer(channels, one, plan(success_at=0))  # another one, which was on its way
    one, zero = requests(channels, 2, since=1)
    # Lane 0 goes on at its second trajectory, lane 1 at its first.
    assert (zero, one) == (asks(2, 0, ACT, 1), asks(1, 0, ACT, 1))
    assert [pool["trajectory"][slot].item() for slot in (2, 1)] == [1, 0]
    assert channels.lanes.trajectory.tolist() == [1, 0]
    assert channels.lanes.generation.tolist() == [1]
    # Other episodes than the first time, from their beginning.
    assert seen(pool, 2, 0) == (name(0, 1, 0, 1), 0, 0)
    assert seen(pool, 1, 0) == (name(1, 0, 0, 1), 0, 1)
    assert name(1, 0, 0, 1) != name(1, 0, 0)
    # One chunk step is lost, or two, had the dead one used its last answer.
    lost = int(pool["collected"][2])
    assert pool["collected"][:4].tolist() == [SEGMENT, 0, lost, 0] and lost in (1, 2)

    # It goes on as any other.
    assert drive(channels, one, begins_next=True) == asks(3, 0, ACT, 1)
    drive(channels, zero, begins_next=False)
    assert requests(channels, 0) == []  # trajectory 2 waits for version 1
    # The slot remembers what was lost in it.
    assert pool["collected"][:4].tolist() == [SEGMENT, SEGMENT, lost + SEGMENT, 0]


def test_answers_that_were_meant_for_a_dead_generation_are_dropped(worker):
    channels = worker()
    pool = channels.pool
    zero, one = requests(channels, 2)
    worker(replaces=channels)
    requests(channels, 2)
    for record in (zero, one, asks(0, SEGMENT, VALUE), asks(1, 0, ACT, 2)):
        answer(channels, record)
    assert requests(channels, 0) == []
    assert pool["collected"][:LANES].tolist() == [0, 0] and pool["done"][:LANES].tolist() == [0, 0]
    # Its own are not.
    answer(channels, asks(0, 0, ACT, 1), plan())
    assert requests(channels, 1) == [asks(0, 1, ACT, 1)]

    worker(replaces=channels)
    assert requests(channels, 2) == [asks(0, 0, ACT, 2), asks(1, 0, ACT, 2)]
    assert channels.lanes.generation.tolist() == [2]
    answer(channels, asks(0, 0, ACT, 1), plan())
    assert requests(channels, 0) == [] and pool["collected"][:LANES].tolist() == [1, 0]


def test_a_rollout_worker_that_replaces_another_is_asked_anew_what_was_not_answered(worker):
    channels = worker()
    pool = channels.pool
    publish(channels, 0)
    zero, one = requests(channels, 2)
    answer(channels, one, plan())
    (one,) = requests(channels, 1)
    assert one == asks(1, 1, ACT)
    # It dies with both unanswered, and its successor says that it serves.
    channels.lanes.rollout_generation[0] = 1
    channels.replies[0].put([Record(0, 0, WAKE, 0, 0)])
    assert requests(channels, 2) == [asks(0, 0, ACT, 1), asks(1, 1, ACT, 1)]

    # An answer that comes after all may be of a row that is being written again.
    answer(channels, zero, plan())
    answer(channels, one, plan())
    assert requests(channels, 0) == [] and pool["collected"][:LANES].tolist() == [0, 1]
    answer(channels, asks(1, 1, ACT, 1), plan())
    assert requests(channels, 1) == [asks(1, 2, ACT, 1)]
    # Nothing is lost or played twice, and nobody asks again what was answered.
    drive(channels, asks(0, 0, ACT, 1), begins_next=True)
    assert pool["collected"][:LANES].tolist() == [SEGMENT, 2]

    # Whoever replaces the env worker knows both generations.
    worker(replaces=channels)
    assert requests(channels, 2, since=2) == [asks(1, 0, ACT, 2), asks(2, 0, ACT, 2)]


def test_an_answer_that_was_read_before_the_successor_is_seen_counts(worker):
    """Its row is complete, and is not asked for again."""
    channels = worker()
    zero, one = requests(channels, 2)
    answer(channels, zero, plan())
    answer(channels, one, plan())
    assert requests(channels, 2) == [asks(0, 1, ACT), asks(1, 1, ACT)]
    channels.lanes.rollout_generation[0] = 1  # nobody has woken the env worker
    assert requests(channels, 2) == [asks(0, 1, ACT, 1), asks(1, 1, ACT, 1)]
    assert channels.pool["collected"][:LANES].tolist() == [1, 1]


def test_only_the_mark_decides_whether_a_trajectory_is_complete(worker):
    """A worker may die after it has written the length and before the mark, or after the mark and
    before it has woken the actor."""
    channels = worker()
    pool = channels.pool
    requests(channels, 2)
    pool["length"][:LANES] = SEGMENT
    pool["done"][1] = 1
    worker(replaces=channels)
    # Lane 0 plays its trajectory again. Lane 1 waits to begin the next one, and says so.
    assert records(channels, 3) == [asks(0, 0, WAKE, 1), asks(0, 0, WAKE, 1), asks(0, 0, ACT, 1)]
    assert channels.lanes.trajectory.tolist() == [0, 1]
    publish(channels, 0)
    assert requests(channels, 1) == [asks(3, 0, ACT, 1)] and pool["trajectory"][3] == 1


def test_a_mark_of_an_earlier_round_of_the_ring_is_not_taken_for_a_later_trajectory(worker):
    channels = worker(version=2)
    pool = channels.pool
    pool["done"][:4] = 1  # trajectory 0, in whose slots trajectory 2 is played
    zero, one = requests(channels, 2)
    assert (zero, one) == (asks(0, 0, ACT), asks(1, 0, ACT))
    assert channels.lanes.trajectory.tolist() == [2, 2]
    worker(replaces=channels, version=2)
    assert requests(channels, 2) == [asks(0, 0, ACT, 1), asks(1, 0, ACT, 1)]
    assert channels.lanes.trajectory.tolist() == [2, 2]
    pool["done"][0] = 3
    worker(replaces=channels, version=2)
    assert requests(channels, 1) == [asks(1, 0, ACT, 2)]
    assert channels.lanes.trajectory.tolist() == [3, 2]


def test_a_replacement_waits_for_nobody(worker):
    """Rank 0 has had its share, and waits for rank 1, which waits for lane 1. The replacement asks
    neither of them where to go on."""
    channels = worker(ranks=2)
    zero, one = requests(channels, 2)
    drive(channels, zero, begins_next=False)
    publish(channels, 0)
    requests(channels, 1)
    worker(replaces=channels, ranks=2)
    assert requests(channels, 2) == [asks(1, 0, ACT, 1), asks(2, 0, ACT, 1)]
    assert channels.pool["trajectory"][2] == 1
    assert all(queue.get(0) == [] for queue in channels.finished)
