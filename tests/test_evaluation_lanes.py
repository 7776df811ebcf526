"""Evaluation lanes of an env worker step by step, against a scripted simulator."""

import time

import pytest
from scripted import (
    LANES,
    answer,
    asks,
    begin_round,
    counted,
    plan,
    plans,
    publish,
    requests,
    seen,
    worker_starter,
)

from channel import ACT, EVAL
from evaluation import EVAL_SEEDS


@pytest.fixture
def worker(monkeypatch):
    with worker_starter(monkeypatch) as start:
        yield start


def test_evaluation_has_its_own_slots_seeds_and_pace(worker):
    channels = worker(eval_envs=1, eval_episodes=3, eval_every=2)
    pool = channels.pool
    slot = 2 * LANES
    requests(channels, 2)  # the training lanes' are never answered
    publish(channels, 0)
    assert requests(channels, 0) == []  # rounds are the launcher's to begin
    for number, successes in enumerate(([True, False, True], [False, False, True]), 1):
        begin_round(channels, number)
        for episode, success in enumerate(successes):
            (record,) = requests(channels, 1)
            assert record == asks(slot, 0, EVAL) and pool["trajectory"][slot] == episode
            assert seen(pool, slot, 0) == ((EVAL_SEEDS + episode) % 251, 0, episode % 2)
            answer(channels, record, plan())
            (record,) = requests(channels, 1)
            assert record == asks(slot, 1, EVAL) and seen(pool, slot, 0)[1] == 3
            answer(channels, record, plan(success_at=2 if success else None))
        assert requests(channels, 0) == []
        outcomes = counted(channels, *(f"outcome_{episode}" for episode in range(3)))
        assert [outcome - 2 * number for outcome in outcomes] == successes
    assert counted(channels, "env_steps") == [0]
    assert pool["collected"].sum() == 0 and channels.finished[0].get(0) == []


def test_an_answer_that_comes_twice_steps_an_evaluation_once(worker):
    channels = worker(eval_envs=1, eval_episodes=2, eval_every=2)
    slot = 2 * LANES
    requests(channels, 2)
    begin_round(channels, 1)
    (record,) = requests(channels, 1)
    channels.pool["actions"][slot, 0] = plan(success_at=0)
    channels.replies[0].put([record, record])
    # Episode 0 is won, and nothing is yet known of episode 1.
    assert requests(channels, 1) == [asks(slot, 0, EVAL)]
    assert counted(channels, "outcome_0", "outcome_1") == [3, 0]
    assert seen(channels.pool, slot, 0)[1] == 0


def test_evaluation_of_several_envs_in_one_lane(worker):
    channels = worker(envs=2, lanes=1, eval_envs=2, eval_episodes=5, eval_every=1)
    pool = channels.pool
    slot = 4
    requests(channels, 1)
    begin_round(channels, 1)
    (record,) = requests(channels, 1)
    assert record == asks(slot, 0, EVAL) and pool["trajectory"][slot : slot + 2].tolist() == [0, 1]
    # Episode 0 succeeds at once and 1 never does; then 2 and so on: each env plays at its own pace.
    for outcome, playing in (
        ((0, None), [2, 1]),
        ((None, None), [2, 3]),
        ((0, None), [4, 3]),
        ((0, None), [6, 5]),
    ):
        answer(channels, record, plans(*outcome))
        more = requests(channels, 0 if min(playing) >= 5 else 1)
        if more:
            (record,) = more
            assert pool["trajectory"][slot : slot + 2].tolist() == playing and record.kind == EVAL
    outcomes = [f"outcome_{episode}" for episode in range(5)]
    deadline = time.monotonic() + 10.0
    while 0 in counted(channels, *outcomes) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert counted(channels, *outcomes) == [3, 2, 3, 2, 3]


def test_a_round_of_evaluation_outlives_its_worker(worker):
    settings = {"eval_envs": 2, "eval_episodes": 6, "eval_every": 2}
    channels = worker(**settings)
    pool = channels.pool
    slot = 2 * LANES  # of the first evaluator; the second plays episodes 1, 3 and 5
    requests(channels, 2)  # of lanes: their answers do not come
    begin_round(channels, 1)
    first, second = requests(channels, 2)
    answer(channels, first, plan(success_at=0))  # episode 0 is won, episode 2 begins
    assert requests(channels, 1) == [asks(slot, 0, EVAL)] and pool["trajectory"][slot] == 2

    worker(replaces=channels, **settings)
    answer(channels, second, plan(success_at=0))  # meant for the dead one, and dropped
    *lanes, record, other = requests(channels, 4)
    assert [lane.kind for lane in lanes] == [ACT, ACT]
    assert (record, other) == (asks(slot, 0, EVAL, 1), asks(slot + 1, 0, EVAL, 1))
    waiting = [record, other]
    played = []
    while waiting:
        record = waiting.pop()
        played.append(int(pool["trajectory"][record.slot]))
        answer(channels, record, plan(success_at=0))
        waiting += requests(channels, 1 if played[-1] < 4 else 0)
    assert sorted(played) == [1, 2, 3, 4, 5]
    assert counted(channels, *(f"outcome_{episode}" for episode in range(6))) == [3.0] * 6
