"""A simulator may end an episode as failed: from its step to slots, counters and evaluation."""

import numpy as np
import pytest
import torch

import envs
import metrics
from channel import ACT, EVAL, Counters, LaneTable, Record, SlotPool
from config import Config
from env_worker import TrainingLane
from envs import EnvSpec, Step
from envs.lanes import SingleLane
from evaluation import EvaluationLanes
from scheduler import Admission, Trajectories

SEGMENT = 3
CHUNK = 2
SPEC = EnvSpec(("push",), ("push it",), 1, 2, 4, 4, 2 * SEGMENT)
FAILS, WINS, BOTH, GOES_ON = range(4)


class Env(envs.Env):
    """Action[0] says what its step brings."""

    episodes = 0

    def reset(self, task, seed):
        self.episodes += 1

    def observe(self):
        return np.zeros((1, 2, 2, 3), np.uint8), np.zeros(4, np.float32)

    def step(self, action):
        what = int(action[0])
        return Step(0.25, what in (WINS, BOTH), what in (FAILS, BOTH))


class Published:
    version = 0


class Shard:
    """What lanes need of an env worker; requests and finished trajectories are only noted."""

    def __init__(self, algorithm: str):
        self.config = Config()
        self.config.env.envs = self.config.actor.batch = self.config.env.eval_episodes = 1
        self.config.env.eval_envs = 1
        self.config.env.segment = self.segment = SEGMENT
        self.config.algorithm.group_size = 2
        self.config.train.algorithm = algorithm
        self.spec = SPEC
        self.admission = Admission.of(self.config)
        self.trajectories = Trajectories.of(self.config)
        self.plays_episodes = self.trajectories.are_episodes
        numbers = ("success", "terminated", "truncated")
        fields = {name: ((SEGMENT,), torch.bool) for name in numbers}
        fields |= {"reward": ((SEGMENT,), torch.float32), "collected": ((), torch.int64)}
        self.arrays = SlotPool(fields, 3).arrays
        self.meter = metrics.Meter("env-0", 0, Counters(1, metrics.columns(1)), None)
        self.lanes = LaneTable(1, 1, 1)
        self.generation = 0
        self.chunk_s = 1.0
        self.parked = []
        self.requests = []
        self.finished = []
        self.plan = []
        self.plane = Published()

    def nothing(self, *_) -> None:
        pass

    observe = label = carry_over = wake_rollout = nothing

    def planned_actions(self, lane, slots, row):
        return [np.array([[what, 0, 0, 0] for what in self.plan], np.float32)]

    def request(self, lane, slots, kind, t):
        self.requests.append((kind, t))

    def finish(self, slots, trajectory, lengths):
        self.finished.append((slots, trajectory, list(lengths)))


def begun(algorithm: str) -> tuple[Shard, TrainingLane, Env]:
    shard = Shard(algorithm)
    env = Env(SPEC.tasks, 2)
    lane = TrainingLane(shard, SingleLane(0, range(1), SPEC, env), 0)
    assert shard.parked == [lane] and lane.begin_or_park()
    return shard, lane, env


def play(shard: Shard, lane: TrainingLane, *plan: int) -> None:
    shard.plan = plan
    lane.on_answer(Record(0, lane.t, ACT, 0, 0))


def what_happened(shard: Shard, t: int) -> list[bool]:
    names = ("success", "terminated", "truncated")
    return [bool(shard.arrays[name][0, t]) for name in names]


def counted(shard: Shard) -> list[float]:
    names = ("episodes", "successes", "env_steps")
    return [shard.meter.counters.get(0, name) for name in names]


@pytest.mark.parametrize("how", [FAILS, BOTH])
def test_a_failed_episode_is_terminated_without_success_and_a_new_one_begins(how):
    shard, lane, env = begun("ppo")
    play(shard, lane, GOES_ON, GOES_ON)
    assert what_happened(shard, 0) == [False, False, False] and env.episodes == 1
    play(shard, lane, how, WINS)  # the rest of the chunk is not executed
    assert what_happened(shard, 1) == [False, True, False]
    assert counted(shard) == [1.0, 0.0, 3.0] and env.episodes == 2
    assert shard.arrays["reward"][0].tolist() == [0.5, 0.25, 0.0]
    play(shard, lane, WINS, GOES_ON)  # a success, to compare
    assert what_happened(shard, 2) == [True, True, False]
    assert counted(shard) == [2.0, 1.0, 4.0] and env.episodes == 3


def test_a_failed_episode_ends_a_trajectory_that_is_one():
    shard, lane, env = begun("grpo")
    play(shard, lane, GOES_ON, GOES_ON)
    assert shard.finished == []
    play(shard, lane, FAILS, WINS)
    assert shard.finished == [(slice(0, 1), 0, [2])]
    assert what_happened(shard, 1) == [False, True, False]
    assert counted(shard) == [1.0, 0.0, 3.0]
    assert lane.trajectory == 1 and env.episodes == 2


@pytest.mark.parametrize("how, outcome", [(FAILS, 2), (BOTH, 2), (WINS, 3)])
def test_a_failed_evaluation_is_over_and_no_success(how, outcome):
    shard = Shard("ppo")
    lane = SingleLane(0, range(1, 2), SPEC, Env(SPEC.tasks, 2))
    lanes = EvaluationLanes(shard, {0: lane})
    shard.meter.set("eval_round", 1)
    lanes.begin_round_if_asked()
    for plan, written in (((GOES_ON, GOES_ON), 0), ((how, GOES_ON), outcome)):
        shard.plan = plan
        lanes.on_actions(Record(shard.admission.slots, 0, EVAL, 0, 0))
        assert shard.meter.counters.get(0, "outcome_0") == written
    assert shard.requests == [(EVAL, 0), (EVAL, 1)]  # nothing is asked after its end
