"""One env and many behave alike as a lane: what a chunk brings, and when an episode ends."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from stacked import Stacked

import envs
from config import Config
from envs import EnvSpec, Simulator, Step
from envs.lanes import OneOfMany, SingleLane, VectorisedLane, make_lane

CHUNK = 3
HORIZON = 6
SPEC = EnvSpec(("one", "two"), ("push", "pull"), 1, 2, 4, 4, HORIZON)
NOTHING = ([0.0], [False], [False], [False], 0)


class Env(envs.Env):
    """Succeeds where action[0] is 1 and fails where action[1] is. Counts its steps."""

    steps = 0

    def reset(self, task, seed):
        self.begun = (task, seed)
        self.steps = 0
        self.prompt = f"episode {seed}"

    def observe(self):
        return np.full((1, 2, 2, 3), self.steps, np.uint8), np.full(4, self.steps, np.float32)

    def step(self, action):
        self.steps += 1
        return Step(float(action[0]), bool(action[0] == 1.0), bool(action[1] == 1.0))


class Envs(Stacked):
    kind = Env


class Plain(Envs):
    """Knows no failure."""

    def step(self, actions):
        step = super().step(actions)
        return Step(step.reward, step.success)


def single() -> SingleLane:
    return SingleLane(0, range(1), SPEC, Env(SPEC.tasks, 2))


def many(count: int, kind=Envs, keep_on_gpu: bool = False) -> VectorisedLane:
    sims = kind(SPEC.tasks, 2, count, "cpu")
    return VectorisedLane(1, range(4, 4 + count), SPEC, sims, "cpu", keep_on_gpu)


def plan(success_at: int | None = None, failure_at: int | None = None) -> np.ndarray:
    actions = np.zeros((CHUNK, 4), np.float32)
    if success_at is not None:
        actions[success_at, 0] = 1.0
    if failure_at is not None:
        actions[failure_at, 1] = 1.0
    return actions


def outcome_of(row: int, outcome) -> tuple:
    return tuple(values[row] for values in outcome[:4])


WON = (1.0, True, False, False)
FAILED = (0.0, False, True, False)
LATE = (0.0, False, False, True)


@pytest.mark.parametrize(
    "begun, script, expected, steps",
    [
        (0, plan(), (0.0, False, False, False), 3),
        (0, plan(0), WON, 1),
        (0, plan(2), WON, 3),
        (0, plan(None, 0), FAILED, 1),
        (0, plan(2, 1), FAILED, 2),  # what comes after a failure does not count
        (0, plan(1, 2), WON, 2),
        (0, plan(1, 1), (1.0, False, True, False), 2),  # one that failed has not succeeded
        (3, plan(), LATE, 3),
        (4, plan(), LATE, 2),  # the limit comes in the middle of a chunk
        (4, plan(1), WON, 2),  # success in the last step is success
        (4, plan(None, 1), FAILED, 2),
        (4, plan(2), LATE, 2),  # and one step later is too late
    ],
)
def test_a_chunk_ends_with_its_episode(begun, script, expected, steps):
    lane = single()
    lane.reset([0], [0], [0])
    lane.taken = [begun]
    outcome = lane.play([script])
    assert outcome_of(0, outcome) == expected and outcome.steps == steps
    assert outcome.ended() == ([0] if any(expected[1:]) else [])
    assert lane.player.steps == steps and lane.taken == [begun + steps]

    lane = many(4)
    lane.reset([0, 1, 2, 3], [0] * 4, [0] * 4)
    lane.taken = [0, begun, 3, 0]
    outcome = lane.play([plan(1), script, plan(), plan(None, 0)])
    rows = [outcome_of(row, outcome) for row in range(4)]
    assert rows == [WON, expected, LATE, FAILED]
    assert lane.taken == [2, begun + steps, 6, 1] and outcome.steps == 2 + steps + 3 + 1


def test_every_task_has_its_own_time_limit():
    spec = SPEC._replace(limits=(2, HORIZON))
    lane = many(3)
    lane.spec = spec
    lane.reset([0, 1, 2], [1, 0, 1], [0] * 3)
    assert lane.play([plan()] * 3).late == [False, True, False]
    assert lane.play([plan()] * 3).late == [True, False, True] and lane.taken == [6, 2, 6]
    one = single()
    one.spec = spec
    for task, late in ((0, [True]), (1, [False])):
        one.reset([0], [task], [0])
        assert one.play([plan()]).late == late


def test_an_episode_that_has_ended_plays_on_to_no_effect():
    lane = many(3)
    assert lane.play([plan(0)] * 3).steps == 0  # none has begun
    lane.reset([0, 1, 2], [0, 1, 0], [5, 6, 7])
    assert lane.play([plan(0), plan(), plan()]).ended() == [0]
    lane.stop([1])
    outcome = lane.play([plan(0), plan(0), plan(0)])
    assert outcome.reward == [0.0, 0.0, 1.0] and outcome.ended() == [2] and outcome.steps == 1
    lane.reset([0], [1], [8])
    assert lane.play([plan(1)] * 3).ended() == [0]

    lane = single()
    assert lane.play([plan(0)]) == NOTHING
    lane.reset([0], [1], [5])
    lane.stop([0])
    assert lane.play([plan(0)]) == NOTHING and lane.player.steps == 0


def test_a_simulator_that_knows_no_failure_leaves_it_out():
    lane = many(2, Plain)
    lane.reset([0, 1], [0, 0], [1, 2])
    outcome = lane.play([plan(1, 0), plan()])
    assert outcome.won == [True, False] and outcome.failed == [False, False]


def test_episodes_of_one_task_begin_together():
    lane = many(3)
    begun = []
    lane.player.reset = lambda rows, task, seeds: begun.append((rows, task, seeds))
    lane.reset([2, 0, 1], [1, 0, 1], [7, 8, 9])
    assert begun == [([2, 1], 1, [7, 9]), ([0], 0, [8])] and lane.tasks == [0, 1, 1]


def test_what_a_lane_shows_and_says():
    lane = single()
    assert lane.prompt is None and "none yet" in lane.describe()
    lane.reset([0], [1], [3])
    assert lane.prompt == "episode 3"
    assert lane.observe().shape == (1, 1, 2, 2, 3) and lane.states.shape == (1, 4)
    assert lane.describe() == "task 'two' (lane 0, envs 0 to 0)"

    lane = many(2)
    lane.reset([0, 1], [1, 0], [3, 4])
    pictures = lane.observe()
    assert isinstance(pictures, np.ndarray) and pictures.shape == (2, 1, 2, 2, 3)
    assert lane.states.shape == (2, 4) and lane.prompt is None
    assert lane.describe() == "task 'two', 'one' (lane 1, envs 4 to 5)"
    assert isinstance(many(2, keep_on_gpu=True).player, Envs)
    kept = many(1, keep_on_gpu=True)
    kept.reset([0], [0], [0])
    assert isinstance(kept.observe(), torch.Tensor)


def test_one_env_of_a_vectorised_simulator_is_an_env():
    simulator = Simulator("stacked", SimpleNamespace(Envs=Envs))
    one = simulator.make(SPEC, "full")
    assert simulator.vectorised and isinstance(one, OneOfMany)
    one.reset(1, 7)
    one.device = "cpu"
    assert one.many.envs[0].begun == (1, 7)
    assert one.step(plan(0)[0]) == Step(1.0, True, False)
    assert one.step(plan(None, 0)[0]) == Step(0.0, False, True)
    picture, state = one.observe()
    assert picture.shape == (1, 2, 2, 3) and state.tolist() == [2.0] * 4
    assert one.film(4).shape == (4, 4, 3)  # of the first env
    one.close()


def test_lanes_are_made_as_the_run_says():
    config = Config()
    config.env.image_size = 2
    simulator = Simulator("both", SimpleNamespace(Env=Env, Envs=Envs))
    lane = make_lane(simulator, SPEC, config, 3, range(3, 4), "cpu", False)
    assert isinstance(lane, SingleLane) and lane.player.quality == "fast" and lane.index == 3
    config.env.lanes = 1
    lane = make_lane(simulator, SPEC, config, 0, range(0, 3), "cpu", False)
    assert isinstance(lane, VectorisedLane) and len(lane.player.envs) == 3
    lane.close()
