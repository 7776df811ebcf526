"""The protocol of the stages as a property: whatever records are lost with a killed worker, doubled
or delayed, and wherever env and rollout workers are killed, every trajectory is trained exactly
once an epoch, from rows that belong together, and the run ends.

The three workers are the real ones, but for what they compute. Every number that they write can be
computed from others: a simulator's state is a hash of what it was given, the policy's actions are a
hash of what they were sampled from. So the learner sees whether a row was overwritten.
"""

import functools
import itertools
import zlib
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from one_process import Pipe, World
from stacked import Stacked

import actor_worker
import env_worker
import envs
import metrics
import models
import rollout_worker
import shard
from channel import Channels, Counters, LaneTable, SlotPool, fence
from config import Config
from envs import EnvSpec, Step
from evaluation import Evaluations
from models.checkpoint import Header
from prepare import common_fields
from scheduler import Admission, DynamicBatcher, Trajectories
from weights import WeightPlane

CHUNK = 2
HORIZON = 5
SEGMENT = 3
ITERATIONS = 4
PATIENCE = 20_000  # steps of the world without progress, after which somebody waits for ever
SEEDS = range(6)
STAGES = {"env": env_worker, "rollout": rollout_worker, "actor": actor_worker}
put_row = rollout_worker.transfers.put


def mix(*numbers: float) -> int:
    """A hash that float32 holds exactly."""
    return zlib.crc32(repr([int(number) for number in numbers]).encode()) % 2**24


# ---------------------------------------------------------------- this file is a simulator


def spec(tasks, image_size) -> EnvSpec:
    return EnvSpec(("one", "two", "three"), ("1", "2", "3"), 1, 1, 3, 2, HORIZON)


def begin(task: int, seed: int) -> int:
    return mix(task, seed)


def move(state: int, action: float) -> tuple[int, Step]:
    """Returns the state that an action leads to, and what the step brought."""
    state = mix(state, action)
    return state, Step(float(state % 5), state % 7 == 0, state % 11 == 0)


class Env(envs.Env):
    world: World  # set by each test
    generations: dict[str, int]  # of env workers, by name

    def __init__(self, tasks, image_size, quality="fast"):
        super().__init__(tasks, image_size, quality)
        self.generation = self.generations[self.world.running.name]
        self.state = self.steps = 0

    def reset(self, task, seed):
        self.state = begin(task, seed)
        self.steps = 0

    def observe(self):
        self.shown = self.state
        state = np.array([self.state, self.steps, self.generation], np.float32)
        return np.zeros((1, 1, 1, 3), np.uint8), state

    def step(self, action):
        self.world.point()
        assert action[0] == self.shown, "these actions answer another observation"
        self.state, step = move(self.state, float(action[1]))
        self.steps += 1
        return step


class Envs(Stacked):
    kind = Env


class Preparation:
    def observe(self, picture, state, prompt):
        return {"image": picture, "state": state}

    def actions(self, actions, state):
        return actions


# ---------------------------------------------------------------- what the other stages compute


UNIT = 1000  # of what is packed into a value: versions and rollout workers' processes are fewer


def sampled(state: float, noise: int, version: int, process: int) -> int:
    return mix(state, noise, version, process)


def valued(state, version: int, process: int):
    """Says who has said it: two processes say different things of one observation, as versions
    do."""
    return (state * UNIT + process) * UNIT + version


class Policy:
    """Its one weight is its version."""

    made = itertools.count()  # by each test anew

    def __init__(self):
        self.process = next(self.made)
        self.weights = {"w": torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))}

    def eval(self):
        return self

    def trainable(self):
        return self.weights

    def observation_fields(self):
        return {"image": None, "state": None}

    def slot_fields(self):
        return {}

    def draw(self, keys, explore):
        return {"noise": torch.tensor([mix(*key) for key in keys])}

    def act(self, observed, noise):
        version = int(self.weights["w"])
        states = observed["state"][:, 0].tolist()
        chosen = [
            sampled(state, number, version, self.process)
            for state, number in zip(states, noise["noise"].tolist(), strict=True)
        ]
        actions = torch.tensor([[[s, a]] * CHUNK for s, a in zip(states, chosen, strict=True)])
        seen = torch.tensor(states, dtype=torch.float64)
        value = valued(seen, version, self.process)
        return {"actions": actions, "logprob": actions[..., 1:].expand_as(actions), "value": value}


class Fetcher:
    """Stands for `WeightFetcher`: new weights come at once, or later."""

    def __init__(self, world: World, plane: WeightPlane, parameters, timeout_s: float):
        self.world = world
        self.plane = plane
        self.parameters = parameters
        self.version = -1
        self.took = (0.0, 0.0)

    def look(self) -> None:
        """New weights are looked for without being asked, too."""

    def swap(self, wait_s: float = 0.0) -> bool:
        if wait_s:
            self.world.running.pause()
        elif self.world.random.random() < 0.3:
            return False
        if self.plane.empty or self.plane.version <= self.version:
            return False
        self.version = self.plane.version
        self.parameters["w"].data.fill_(self.version)
        return True


class Ranks:
    """Stands for `ranks.Ranks`: they meet, and exchange nothing."""

    def __init__(self, run: "Run", config, rank: int, *_):
        self.run = run
        self.rank = rank
        self.count = config.actor.actor_workers
        self.first = rank == 0
        self.several = self.count > 1
        self.sharded = False
        self.leads = self.publishes = self.saves = self.first
        self.stopped = False
        self.meetings = 0

    def plan(self, passes, through=False, stop=False) -> None:
        """They share no weights, and nobody stops them."""

    def meet(self):
        self.meetings += 1
        met = self.run.met
        met[self.meetings] += 1
        while met[self.meetings] < self.count:
            yield self.run.world.running.pause()

    def leave(self) -> None:
        """They have met."""


class Learner:
    """Stands for `learner.Learner`: it looks at what it is given, and counts."""

    def __init__(self, run: "Run", config, spec, device, ranks: Ranks, resume):
        self.run = run
        self.ranks = ranks
        self.device = device
        self.version = 0
        self.updates = 0
        self.tally = self
        self.totals = {}
        # Ranks meet, and have no gradients.
        self.gradients = SimpleNamespace(meet=ranks.meet, sum=lambda: (), spans=[])
        self.host_fields = tuple(run.channels.pool.spec)
        self.device_fields = ()
        # A rank may take long to build its model, while others have published already.
        for _ in range(run.world.random.choice((0, 300))):
            run.world.running.pause()

    def train(self, data, micro) -> None:
        for i, slot in enumerate(micro.slots):
            self.run.world.point()
            trajectory = {name: values[i].numpy() for name, values in data.items()}
            self.run.look_at(trajectory, slot, self.version, micro.epoch)

    def step(self) -> None:
        """Its weights are its version."""

    def moved_too_far(self) -> bool:
        return False

    def add(self, reason, steps, how="sum") -> None:
        """It is its own tally."""
        assert steps >= 0, reason
        if how == "sum":  # a total, of the workers so far
            self.totals[reason] = steps
        else:
            self.run.accounts[reason] += steps

    def finish_batch(self) -> dict:
        list(self.ranks.meet())
        self.version += 1
        numbers = dict.fromkeys(("trained", "skipped", "trained_once"), 0) | self.totals
        return numbers | {"version": self.version, "iteration": self.version, "discarded_by": {}}

    def should_save(self) -> bool:
        return False

    def weights_that_act(self):
        return {"w": torch.full((1,), self.version, dtype=torch.float64)}


class Reports:
    def __init__(self):
        self.lines = []

    def send(self, line: dict) -> None:
        self.lines.append(line)


class Meter(metrics.Meter):
    """Every measurement is a place where its worker may die."""

    def __init__(self, world: World, name: str, row: int, counters: Counters):
        super().__init__(name, row, counters, None)
        self.world = world

    def work(self, what, **args):
        self.world.point()
        return super().work(what, **args)

    def count(self, column, amount):
        self.world.point()
        super().count(column, amount)


# ---------------------------------------------------------------- a run


def draw_config(random, algorithm: str, width: int, ranks: int, staleness: int) -> Config:
    """Returns settings that `train.py` would accept."""
    config = Config()
    config.train.algorithm = algorithm
    config.train.iterations = ITERATIONS
    config.env.env_workers = 2
    config.env.envs = 4 if width == 1 else 12
    config.env.lanes = 0 if width == 1 else 2
    config.env.segment = SEGMENT
    config.env.eval_every = random.choice((0, 2))
    config.env.eval_envs = random.choice((2, 3))
    config.env.eval_episodes = 5
    config.algorithm.group_size = 2 if width == 1 else random.choice((3, 6))
    config.algorithm.bootstrap_truncated = algorithm == "ppo" and random.choice((True, False))
    config.rollout.chunk = CHUNK
    config.rollout.rollout_workers = random.choice((1, 2))
    config.rollout.batch_max, config.rollout.batch_wait_ms = random.choice(
        (("all", float("inf")), ("auto", "auto"), (1, 0.0), (2, 20.0), (3, float("inf")))
    )
    config.actor.actor_workers = ranks
    config.actor.max_staleness = staleness
    config.actor.update_epochs = random.choice((1, 2))
    config.actor.stream = random.choice((True, False))
    config.actor.batch = config.env.envs * random.choice((1, 2))
    unit = ranks * Admission.of(config).whole
    config.actor.minibatch = random.randint(unit, config.actor.batch)
    while config.actor.batch // unit < config.actor.minibatches:
        config.actor.minibatch += 1
    config.actor.micro_batch = random.choice((1, 2, 3, 6, 12))
    return config


def slot_fields() -> dict:
    return common_fields(SEGMENT, CHUNK, 2) | {
        "image": ((SEGMENT + 1, 1, 1, 1, 3), torch.uint8),
        "state": ((SEGMENT + 1, 3), torch.float32),
        "value": ((SEGMENT + 1,), torch.float64),
        "final": ((SEGMENT,), torch.float64),
    }


class Run:
    """One run of all stages in one process, and what its learners have seen."""

    def __init__(self, world: World, config: Config, monkeypatch):
        self.world = world
        self.config = config
        self.admission = Admission.of(config)
        self.names = Trajectories.of(config)
        self.spec = spec((), 1)
        env = config.env
        stages = (env.env_workers, config.rollout.rollout_workers, config.actor.actor_workers)
        counters = Counters(sum(stages), metrics.columns(env.eval_episodes))
        self.channels = Channels(
            SlotPool(slot_fields(), self.admission.slots + env.eval_envs),
            WeightPlane({"w": ((1,), torch.float64)}),
            counters,
            LaneTable(env.envs // env.width, *stages[:2]),
            tuple(Pipe(world, apart=True) for _ in range(stages[1])),
            tuple(Pipe(world, apart=False) for _ in range(stages[0])),
            tuple(Pipe(world, apart=True) for _ in range(stages[2])),
        )
        self.met = Counter()
        self.accounts = Counter()
        self.reports = Reports()
        self.evaluations = Evaluations(config, self.spec.tasks, 0, counters)
        self.rounds = 0  # of evaluation, that were begun
        # What was trained: (env, trajectory, epoch) → how often, and (env, trajectory) → its rows.
        self.trained = Counter()
        self.rows: dict[tuple[int, int], dict[str, np.ndarray]] = {}
        self.put_stand_ins(monkeypatch)

        self.meters = {}
        row = 0
        for stage, count in zip(metrics.STAGES, stages, strict=True):
            for rank in range(count):
                self.meters[f"{stage}-{rank}"] = Meter(world, f"{stage}-{rank}", row, counters)
                row += 1
        for name in self.meters:
            self.start(name)

    def put_stand_ins(self, monkeypatch) -> None:
        """Puts what this file defines in place of what takes time and devices."""
        put = monkeypatch.setattr
        for module in (env_worker, shard, rollout_worker, actor_worker):
            put(module, "time", self.world)
        batcher = functools.partial(DynamicBatcher, clock=self.world.monotonic)
        put(rollout_worker, "DynamicBatcher", batcher)
        put(rollout_worker, "WeightFetcher", functools.partial(Fetcher, self.world))
        put(models, "preparation", lambda *_: Preparation())
        put(Policy, "made", itertools.count())
        put(models, "build", lambda *_: Policy())
        put(models, "acting", lambda model: model)
        put(actor_worker, "Learner", functools.partial(Learner, self))
        put(actor_worker.Saver, "save_last", lambda *_: {})
        put(actor_worker.Ranks, "of", functools.partial(Ranks, self))
        put(rollout_worker.transfers, "put", self.put_row)
        put(shard, "fence", self.fence)
        put(actor_worker, "fence", self.fence)
        monkeypatch.setitem(envs.SIMULATORS, "metaworld", (__name__, ""))
        put(Env, "world", self.world, raising=False)
        put(Env, "generations", Counter(), raising=False)

    def fence(self) -> None:
        """Lies between a trajectory's length and its mark."""
        self.world.point(risk=0.02)
        fence()
        self.world.point(risk=0.02)

    def put_row(self, pool, name: str, slots, rows, values) -> None:
        """Writes row by row, and may be killed in between."""
        for i in range(len(slots)):
            self.world.point()
            put_row(pool, name, slots[i : i + 1], rows[i : i + 1], values[i : i + 1])

    # ---------------------------------------------------------------- workers

    def start(self, name: str) -> None:
        """Starts a worker. Only actors' deaths end a run."""
        stage, rank = name.split("-")
        seen = Header("toy", {}, {}) if stage == "env" else self.spec
        report = self.reports if rank == "0" else None
        more = (0, None) if stage == "env" else (0,)  # an env worker films nothing
        more = (Path("nowhere"), None, None, report) if stage == "actor" else more
        arguments = (int(rank), self.config, seen, "cpu", self.channels, *more, self.meters[name])
        run = functools.partial(STAGES[stage].run, *arguments)
        self.world.start(name, run, mortal=stage != "actor")

    def replace(self, name: str) -> None:
        """What `processes.Crew` does."""
        self.channels.counters.add(self.meters[name].row, "restarts", 1)
        Env.generations[name] += name.startswith("env")
        self.start(name)

    # ---------------------------------------------------------------- from beginning to end

    def go(self) -> None:
        """Runs to the end. Fails when nothing comes any more."""
        before = None
        patience = PATIENCE
        while not self.is_over():
            for name in self.world.step():
                self.replace(name)
            progress = self.progress()
            patience = PATIENCE if progress != before else patience - 1
            before = progress
            assert patience, f"somebody waits for ever: {self.describe()}"

    def progress(self) -> tuple:
        outcome = self.channels.counters.index["outcome_0"]
        evaluated = self.channels.counters.table[:, outcome:].sum()
        return len(self.trained), self.channels.plane.version, evaluated

    def is_over(self) -> bool:
        """Whether all is trained and evaluated."""
        actors = [t for name, t in self.world.threads.items() if name.startswith("actor")]
        if self.config.env.evaluates:
            self.rounds += self.evaluations.begins(self.channels.plane.version)
            evaluating = self.evaluations.running is not None or np.isfinite(self.evaluations.due)
        else:
            evaluating = False
        return all(actor.ended for actor in actors) and not evaluating

    def describe(self) -> str:
        return (
            f"version {self.channels.plane.version}, lanes {self.channels.lanes.trajectory}, "
            f"trained {len(self.trained)}, marks {self.channels.pool['done'].tolist()}, flying "
            f"{[pipe.flying for pipe in self.world.pipes]}"
        )

    # ---------------------------------------------------------------- what is asserted

    def look_at(self, rows: dict[str, np.ndarray], slot: int, version: int, epoch: int) -> None:
        """Checks one trajectory as the learner gets it."""
        env = int(rows["env"])
        trajectory = int(rows["trajectory"])
        assert slot == self.admission.slot(env, trajectory)
        assert self.admission.batch_of(trajectory) == version
        self.trained[env, trajectory, epoch] += 1
        if epoch > 0:
            same = self.rows[env, trajectory]
            for name in rows.keys() - {"asked", "done"}:
                assert np.array_equal(rows[name], same[name]), name
            return
        self.rows[env, trajectory] = rows
        length = int(rows["length"])
        assert (rows["state"][:length, 2] == rows["state"][0, 2]).all(), "two generations"
        if not self.names.are_episodes:
            assert length == SEGMENT
        for t in range(length):
            self.look_at_policy(rows, env, trajectory, t, version)
            self.look_at_simulator(rows, env, trajectory, t)
        if not self.names.are_episodes:
            assert rows["value"][length] // UNIT**2 == rows["state"][length, 0]

    def look_at_policy(self, rows, env: int, trajectory: int, t: int, version: int) -> None:
        """Row t holds what the policy of one version, in one process, said of the row's own
        observation."""
        acted = int(rows["version"][t])
        assert version - self.config.actor.max_staleness <= acted <= version
        state = rows["state"][t, 0]
        process = int(rows["value"][t]) // UNIT % UNIT
        noise = mix(self.config.train.seed, env, trajectory, t)
        action = sampled(state, noise, acted, process)
        assert (rows["actions"][t] == [state, action]).all()
        assert (rows["logprob"][t] == action).all()
        assert rows["value"][t] == valued(int(state), acted, process)

    def look_at_simulator(self, rows, env: int, trajectory: int, t: int) -> None:
        """Row t + 1 follows from row t and its actions."""
        state, steps, generation = map(int, rows["state"][t])
        reward = 0.0
        chunk = rows["actions"][t, :, 1].tolist()
        played = 0
        for action in chunk:
            state, step = move(state, action)
            steps += 1
            played += 1
            reward += step.reward
            if step.success or step.failed or steps == HORIZON:
                break
        won = step.success and not step.failed
        late = steps == HORIZON and not won and not step.failed
        found = [rows[name][t].item() for name in ("reward", "success", "terminated", "truncated")]
        assert found == [reward, won, won or step.failed, late]
        ended = won or step.failed or late
        is_last = t + 1 == int(rows["length"])
        if self.names.are_episodes:
            assert ended == is_last
            if is_last:
                return
        if late and self.config.algorithm.bootstrap_truncated:
            # An env that steps with others takes the rest of its chunk too, before it is seen.
            last = state
            for action in chunk[played:] if self.config.env.width > 1 else ():
                last = move(last, action)[0]
            assert rows["final"][t] // UNIT**2 == last
        if ended:
            where = (trajectory + 1, 0) if is_last else (trajectory, t + 1)
            state = self.first_state(env, *where, generation)
            steps = 0
        assert rows["state"][t + 1].tolist() == [state, steps, generation]

    def first_state(self, env: int, trajectory: int, t: int, generation: int) -> int:
        """Returns how an episode begins there."""
        task = self.admission.task(env, trajectory, len(self.spec.tasks))
        return begin(task, self.names.episode_seed(env, trajectory, t, generation))

    def look_at_beginnings(self) -> None:
        """A trajectory begins with a new episode, or with what ended the one before."""
        for (env, trajectory), rows in self.rows.items():
            first = rows["state"][0].tolist()
            generation = int(first[2])
            fresh = [self.first_state(env, trajectory, 0, generation), 0, generation]
            carried = []
            if trajectory and not self.names.are_episodes:
                carried = self.rows[env, trajectory - 1]["state"][SEGMENT].tolist()
            assert first in (fresh, carried), (env, trajectory)

    def look_at_groups(self) -> None:
        """The learner was told how every member of a group ended."""
        size = self.admission.group
        for (env, trajectory), rows in self.rows.items():
            first = env - env % size
            assert int(rows["member"]) == env - first
            members = [self.rows[first + i, trajectory] for i in range(size)]
            won = [one["success"][: int(one["length"])].any() for one in members]
            assert rows["outcomes"].tolist() == won

    def look_at_counts(self) -> None:
        """Every trajectory of every batch once an epoch, and every chunk step accounted for."""
        epochs = self.config.actor.update_epochs
        trajectories = range(ITERATIONS * self.admission.per_lane)
        everything = {
            (env, trajectory, epoch)
            for env in range(self.config.env.envs)
            for trajectory in trajectories
            for epoch in range(epochs)
        }
        assert self.trained == Counter(dict.fromkeys(everything, 1))
        trained = sum(int(rows["length"]) for rows in self.rows.values())
        collected = int(self.channels.pool["collected"].sum())
        assert collected == trained + self.accounts["restart"] + self.accounts["after_end"]
        if not sum(Env.generations.values()):
            assert self.accounts["restart"] == 0
        if self.config.env.width == 1 or not self.names.are_episodes:
            assert self.accounts["after_end"] == 0
        assert self.reports.lines[-1] == {"done": ITERATIONS}
        if self.config.env.evaluates:
            assert self.evaluations.news["eval_version"] == ITERATIONS and self.rounds > 1


@pytest.mark.parametrize("staleness", [0, 2])
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
@pytest.mark.parametrize("seed", SEEDS)
def test_nothing_is_lost_and_nothing_counts_twice(
    monkeypatch, seed, algorithm, width, ranks, staleness
):
    world = World(
        seed,
        wakes_lost=(0.0, 0.3, 1.0)[seed % 3],
        doubled=(0.0, 0.2)[seed % 2],
        kills=(0, 4, 8, 16)[seed % 4],
    )
    config = draw_config(world.random, algorithm, width, ranks, staleness)
    run = Run(world, config, monkeypatch)
    try:
        run.go()
    finally:
        world.end()
    run.look_at_beginnings()
    if algorithm == "grpo":
        run.look_at_groups()
    run.look_at_counts()
