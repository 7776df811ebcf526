"""N nodes with E envs each play and train what one node with N·E envs and N times the actor ranks
does: the same episodes under the same names, in the same minibatches."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import envs
import metrics
import recipes
from channel import ACT, EVAL, Counters, LaneTable, Record, SlotPool
from config import Config, completed
from env_worker import TrainingLane
from envs.lanes import Outcome
from errors import UserError
from evaluation import EVAL_SEEDS, EvaluationLanes, Evaluations
from prepare import common_fields, share_of, with_segment
from report import batch_line
from rollout_worker import LanesServed, serve
from scheduler import Admission, Trajectories, env_numbers
from streamer import Streamer
from validation import check_shares

fast = settings(deadline=None, derandomize=True, max_examples=40)
SEGMENT = 3
BATCHES = 3


@st.composite
def settings_of_a_node(draw) -> dict:
    """Lanes of 1 to 3 envs, groups that a lane has several of or the other way round, and batches
    of which every actor rank has a share."""
    width = draw(st.integers(1, 3))
    group = draw(st.sampled_from([1, width, 2 * width])) if width > 1 else draw(st.integers(1, 3))
    whole = max(width, group)
    env_count = whole * draw(st.integers(1, 4))
    batch = env_count * draw(st.integers(1, 3))
    ranks = draw(st.integers(1, min(3, batch // whole)))
    minibatches = draw(st.integers(1, batch // whole // ranks))
    chosen = {"envs": env_count, "env_workers": env_count // width, "lanes": 1, "batch": batch}
    chosen |= {"eval_envs": env_count // width * draw(st.integers(1, 2)), "segment": SEGMENT}
    chosen |= {"actor_workers": ranks, "minibatch": -(-batch // minibatches), "micro_batch": 5}
    chosen |= {"eval_episodes": draw(st.integers(1, 30)), "rollout_workers": 1}
    if group > 1:
        chosen |= {"algorithm": "grpo", "group_size": group}
    return chosen


def nodes_and_one(chosen: dict, count: int) -> tuple[list[Config], Config]:
    """Returns the settings of each node, and of one node that has everything."""
    node = completed(Config(), **chosen)
    check_shares(completed(node, nodes=count))
    sums = ("envs", "env_workers", "batch", "eval_envs", "actor_workers", "minibatch")
    one = completed(node, **{name: count * chosen[name] for name in sums})
    return [completed(node, node=n, nodes=count) for n in range(count)], one


def names(config: Config, tasks: int) -> dict[tuple[int, int], tuple]:
    """Returns what a node plays: of every (slot, batch), env and trajectory among those of all
    nodes, task, seeds of episodes and names of noise."""
    admission = Admission.of(config)
    shard = SimpleNamespace(
        admission=admission,
        trajectories=Trajectories.of(config),
        spec=SimpleNamespace(tasks=range(tasks)),
        generation=0,
    )
    number = env_numbers(config)
    found = {}
    for env in range(config.env.envs):
        lane = SimpleNamespace(shard=shard, lane=SimpleNamespace(envs=[env]))
        for trajectory in range(BATCHES * admission.per_lane):
            (task,) = TrainingLane.tasks_of(lane, trajectory)
            seeds = [TrainingLane.seeds_of(lane, [0], trajectory, t)[0] for t in (0, 1)]
            key = (config.train.seed, int(number[env]), trajectory)
            where = admission.slot(env, trajectory), admission.batch_of(trajectory)
            found[where] = (int(number[env]), trajectory, task, *seeds, key)
    return found


def trained(config: Config, rank: int, played: dict) -> list[tuple]:
    """Returns every micro-batch of an actor rank: which trajectories it has, and where it lies."""
    streamer = Streamer.of(config, rank, 0)
    found = []
    for batch in range(BATCHES):
        for slot in sorted(streamer.mine):
            streamer.add(slot)
        while not streamer.done:
            micro = streamer.next()
            whose = [played[slot, batch] for slot in micro.slots]
            found.append(
                (whose, batch, micro.epoch, micro.minibatch, micro.last, micro.minibatch_size)
            )
        streamer.finish_batch()
    return found


# 8 lanes of 2 envs on both nodes, which 3 minibatches and one rank a node cannot share evenly.
UNEVEN = {"envs": 8, "env_workers": 4, "lanes": 1, "batch": 8, "eval_envs": 4, "segment": SEGMENT}
UNEVEN |= {"actor_workers": 1, "minibatch": 3, "micro_batch": 5, "rollout_workers": 1}


@fast
@example(chosen=UNEVEN, count=2, tasks=3)
@given(chosen=settings_of_a_node(), count=st.integers(2, 4), tasks=st.integers(1, 7))
def test_nodes_together_play_and_train_what_one_node_with_all_lanes_does(chosen, count, tasks):
    nodes, one = nodes_and_one(chosen, count)
    whole = names(one, tasks)
    played = [names(config, tasks) for config in nodes]
    together = [data for node in played for data in node.values()]
    assert sorted(together) == sorted(whole.values())
    assert len({(data[0], data[1]) for data in together}) == len(together)

    # No two nodes share an env, an episode or noise. A group's envs share their episodes.
    for what in (0, 3, 5):
        of_nodes = [{data[what] for data in node.values()} for node in played]
        assert sum(map(len, of_nodes)) == len(set.union(*of_nodes))

    # Tasks are balanced over all nodes, in every batch.
    unit = Admission.of(one).whole if chosen.get("group_size") else 1
    for batch in range(BATCHES):
        dealt = [d[2] for node in played for (_, b), d in node.items() if b == batch]
        counts = np.bincount(dealt, minlength=tasks)
        assert counts.max() - counts.min() <= unit

    # Rank by rank, also the order of later epochs.
    for n, config in enumerate(nodes):
        for rank in range(config.actor.actor_workers):
            mine = trained(config, rank, played[n])
            assert mine == trained(one, rank * count + n, whole)


def test_with_one_actor_worker_a_node_s_rank_is_its_number():
    """The world's rank is the one that one node with as many ranks gives these lanes."""
    chosen = {"envs": 12, "env_workers": 12, "lanes": 1, "batch": 24, "eval_envs": 0}
    chosen |= {"actor_workers": 1, "minibatch": 12, "micro_batch": 3, "segment": SEGMENT}
    nodes, one = nodes_and_one(chosen, 2)
    for n, config in enumerate(nodes):
        mine = set(env_numbers(config).tolist())
        assert mine == {env for env in range(24) if Admission.of(one).owner(env, 2) == n}


class Drawn(Exception):
    """Carries the names of noise that an inference asks for."""


class Model:
    def draw(self, keys, explores):
        raise Drawn(keys)


@pytest.mark.parametrize("node", [0, 1])
def test_noise_is_named_by_numbers_of_all_nodes(node):
    config = completed(Config(), envs=3, env_workers=1, rollout_workers=1, batch=3, eval_envs=2)
    config = completed(config, node=node, nodes=2)
    pool = SlotPool(common_fields(SEGMENT, 2, 4), 5)
    pool["env"][:] = pool["env"].new_tensor(range(5))  # local, as env workers label slots
    channels = SimpleNamespace(plane=None, lanes=LaneTable(3, 1, 1), pool=pool)
    world = LanesServed(0, config, channels).world
    records = [Record(slot, 1, EVAL if slot > 2 else ACT, 0, 0) for slot in range(5)]
    with pytest.raises(Drawn) as drawn:
        serve(Model(), records, pool, 1, 0, "cpu", world=world)
    numbers = [[0, 2, 4, 6, 8], [1, 3, 5, 7, 9]][node]
    assert drawn.value.args[0] == [(1, number, 0, 1) for number in numbers]


# ---------------------------------------------------------------- evaluation


class Lane:
    """A lane of evaluation envs: episode e ends after e % 3 + 1 chunks, every fourth one won."""

    def __init__(self, index: int, numbers: range):
        self.index = index
        self.envs = numbers
        self.left: dict[int, int] = {}  # chunks of the running episode of a row
        self.begun: dict[int, int] = {}  # its seed
        self.resets = []
        self.cameras = {}  # none: nothing is filmed

    def reset(self, rows, tasks, seeds):
        for row, task, seed in zip(rows, tasks, seeds, strict=True):
            self.resets.append((task, seed))
            self.begun[row] = seed - EVAL_SEEDS
            self.left[row] = self.begun[row] % 3 + 1

    def play(self, plans):
        rows = range(len(self.envs))
        self.left = {row: left - 1 for row, left in self.left.items()}
        ends = [self.left.get(row) == 0 for row in rows]
        won = [ends[row] and self.begun[row] % 4 == 0 for row in rows]
        failed = [ends[row] and not won[row] for row in rows]
        return Outcome([0.0] * len(rows), won, failed, [False] * len(rows), 1)


class Shard:
    """What evaluation lanes need of an env worker that has all of them."""

    def __init__(self, config: Config, tasks: int):
        self.config = config
        self.admission = Admission.of(config)
        self.spec = SimpleNamespace(tasks=range(tasks))
        counters = Counters(2, metrics.columns(config.env.eval_episodes))
        self.meter = metrics.Meter("env-0", 1, counters, None)
        self.number = env_numbers(config)
        self.asked = []
        self.keys = set()

    def planned_actions(self, lane, slots, row):
        return []

    def label(self, lane, slots, episodes):
        self.episodes = list(episodes)

    def observe(self, lane, slots, row):
        pass

    def request(self, lane, slots, kind, t):
        self.asked.append(Record(slots.start, t, kind, 0, 0))
        count = self.config.env.eval_episodes
        whose = zip(lane.envs, self.episodes, strict=True)
        self.keys |= {(int(self.number[env]), e, t) for env, e in whose if e < count}

    def play(self) -> tuple[set, set]:
        """Plays the running round. Returns names of noise, and what episodes began with."""
        env = self.config.env
        lanes = {}
        for index in range(env.eval_envs // env.eval_width):
            first = env.envs + index * env.eval_width
            lanes[index] = Lane(index, range(first, first + env.eval_width))
        evaluation = EvaluationLanes(self, lanes)
        evaluation.begin_round_if_asked()
        while self.asked:
            evaluation.on_actions(self.asked.pop(0))
        return self.keys, {reset for lane in lanes.values() for reset in lane.resets}


@fast
@given(chosen=settings_of_a_node(), count=st.integers(2, 4), tasks=st.integers(1, 4))
def test_evaluation_episodes_are_shared_out_to_all_nodes(chosen, count, tasks):
    nodes, one = nodes_and_one(chosen, count)
    words = tuple(f"task {k}" for k in range(tasks))
    whole = Shard(one, tasks)
    alone = Evaluations(one, words, 0, whole.meter.counters)
    assert alone.begins(0)
    keys, begun = whole.play()
    assert not alone.begins(0) and alone.news["eval_version"] == 0

    shards = [Shard(config, tasks) for config in nodes]
    each = [Evaluations(s.config, words, 0, s.meter.counters) for s in shards]
    for n, evaluations in enumerate(each):
        if n:
            assert not evaluations.begins(0)  # until it is told
            evaluations.due = 0
        assert evaluations.begins(0) and not evaluations.begins(1)
    handed: dict[int, int] = {}
    of_nodes = []
    for shard, evaluations in zip(shards, each, strict=True):
        if evaluations.episodes:
            assert evaluations.outcomes() is None and not each[0].begins(0)
        of_nodes.append(shard.play())
        outcomes = evaluations.outcomes() if evaluations is each[0] else evaluations.hand_over()
        each[0].hear(json.loads(json.dumps(outcomes)))
        assert not handed.keys() & outcomes.keys()
        handed |= outcomes
    assert (
        set.union(*(k for k, _ in of_nodes)) == keys
        and set.union(*(b for _, b in of_nodes)) == begun
    )
    assert sum(len(k) for k, _ in of_nodes) == len(keys)
    assert not each[0].begins(0) and each[0].news == alone.news
    assert sorted(handed) == list(range(chosen["eval_episodes"]))


def test_a_node_hands_over_its_share_of_a_round_once():
    """And begins a round only with weights as new as those of the first node."""
    config = completed(Config(), eval_envs=1, eval_episodes=4, eval_every=1, nodes=2, node=1)
    counters = Counters(2, metrics.columns(4))
    other = Evaluations(config, ("push",), 0, counters)
    other.due = 3
    assert other.hand_over() is None and not other.begins(2) and other.begins(4)
    assert counters.get(0, "eval_round") == 1 and other.hand_over() is None
    counters.set(1, "outcome_1", 3)
    assert other.hand_over() is None and not other.begins(100)
    counters.set(1, "outcome_3", 2)
    assert other.hand_over() == {1: 1, 3: 0} and other.hand_over() is None
    assert not other.begins(100)  # it is told, and does not count itself
    other.due = 100
    assert other.begins(100) and counters.get(0, "eval_round") == 2 and other.hand_over() is None
    assert other.news == {}


def test_a_node_without_an_episode_has_nothing_to_wait_for():
    config = completed(Config(), eval_envs=2, eval_episodes=3, nodes=2, node=1)
    other = Evaluations(config, ("push",), 0, Counters(1, metrics.columns(3)))
    assert other.episodes == [1]
    config = completed(config, eval_episodes=1)
    other = Evaluations(config, ("push",), 0, Counters(1, metrics.columns(1)))
    other.due = 0
    assert other.begins(0) and other.hand_over() == {} and other.hand_over() is None


# ---------------------------------------------------------------- what is said and checked


def test_start_up_says_what_all_nodes_have():
    config = completed(Config(), nodes=4)
    assert batch_line(config, 9) == (
        "4 nodes in all: 96 envs, 16 evaluation envs, minibatches of 96; "
        "192 trajectories = 1728 chunk steps, 4 optimizer steps per batch"
    )


def test_a_recipe_is_put_beside_the_paper_s_table_for_as_many_gpus():
    """The paper's setup C has 64 envs a node, 192 at 3:1, and a global batch of 2048 a node."""
    config = completed(recipes.apply("rl_vla3_c_3to1"), segment=48)
    said = "RL-VLA³ has for setup C on {} GPUs {} envs and a global batch of {} chunk steps; "
    assert recipes.beside(config) == said.format(8, 192, 2048) + "this run has 192 envs and 2064\n"
    config = completed(config, nodes=32, envs=64, batch=512)
    found = recipes.beside(config)
    assert found == said.format(256, 6144, 65536) + "this run has 2048 envs and 66048\n"
    for name in ("", "libero_10_ppo_openpi_pi05", "rl_vla3_v2_libero_gr00t"):
        assert recipes.beside(completed(config, recipe=name)) == ""


def test_an_actor_worker_of_each_of_several_nodes_trains_whole_lanes():
    """As one of several on a node does; one that is alone may share out a lane's envs."""
    config = completed(Config(), envs=4, batch=4, minibatch=1, lanes=1, env_workers=2)
    config = completed(config, rollout_workers=1, actor_workers=1)
    check_shares(config)
    with pytest.raises(UserError, match="--minibatch 1 cannot .* give --minibatch at least 2"):
        check_shares(completed(config, nodes=2))
    check_shares(completed(config, nodes=2, minibatch=2))


def test_sizes_are_those_of_all_nodes():
    """6 lanes make two minibatches of 3; 3 would make one of 2 and one of 1."""
    config = completed(Config(), envs=3, batch=3, minibatch=2, segment=SEGMENT, env_workers=1)
    config = completed(config, rollout_workers=1, actor_workers=1)
    said = "a batch of {} trajectories makes 2 minibatches of {} trajectories, in place of {}\n"
    assert share_of(config) == (2 * SEGMENT, said.format(3, "1 or 2", 2))
    assert share_of(completed(config, nodes=2)) == (2 * SEGMENT, said.format(6, "3", 4))


def test_envs_of_all_nodes_take_turns_at_tasks():
    spec = envs.EnvSpec(tuple("abcd"), tuple("abcd"), 1, 2, 4, 4, 60)
    config = completed(Config(), envs=6, batch=6, segment=2)
    assert "6 envs take turns at 4 tasks" in with_segment(config, spec)[1]
    assert with_segment(completed(config, nodes=2), spec)[1] == ""
    said = with_segment(completed(config, nodes=2, envs=5), spec)[1]
    assert "10 envs take turns at 4 tasks" in said and "a multiple of 2 as --envs" in said
