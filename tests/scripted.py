"""A simulator whose outcomes a test decides, and one env worker that steps it while the test plays
rollout worker and actor.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from stacked import Stacked

import envs
import metrics
from channel import ACT, EVAL, VALUE, WAKE, Channels, Counters, Record, SlotPool, Spec
from config import ASSETS, Config
from env_worker import run
from envs import EnvSpec, Step
from models.checkpoint import Header
from prepare import common_fields
from scheduler import Admission, Trajectories
from weights import WeightPlane

CHUNK = 3
HORIZON = 6
SEGMENT = 4
LANES = 2
PROMPTS = {"one": "push the puck", "two": "open the door", "three": "close the box"}

# ---------------------------------------------------------------- the simulator


def spec(tasks, image_size) -> EnvSpec:
    tasks = tuple(tasks) or ("one", "two")
    return EnvSpec(tasks, tuple(PROMPTS[task] for task in tasks), 1, 2, 4, 4, HORIZON)


class Env(envs.Env):
    """Succeeds when action[0] is 1, and takes action[1] seconds. Its picture says which episode
    this is, how far along, and of which task."""

    def reset(self, task, seed):
        self.task = task
        self.seed = seed
        self.steps = 0

    def observe(self):
        image = np.zeros((1, 2, 2, 3), np.uint8)
        image.flat[:3] = self.seed % 251, self.steps, self.task
        return image, np.full(4, 0.1 * self.steps, np.float32)

    def step(self, action):
        self.steps += 1
        time.sleep(float(action[1]))
        success = bool(action[0] == 1.0)
        action[:] = -1.0  # as a simulator may do with what it is given
        return Step(float(success), success)


class Envs(Stacked):
    kind = Env


def seen(pool: SlotPool, slot: int, row: int) -> tuple[int, int, int]:
    """Returns episode (its seed mod 251), step and task of a stored picture."""
    return tuple(pool["image"][slot, row].flatten()[:3].tolist())


def name(env: int, trajectory: int, t: int, generation: int = 0) -> int:
    """Returns what pictures show of the episode that begins there."""
    return Trajectories(1, 1).episode_seed(env, trajectory, t, generation) % 251


def plan(success_at: int | None = None) -> torch.Tensor:
    actions = torch.zeros(CHUNK, 4)
    if success_at is not None:
        actions[success_at, 0] = 1.0
    return actions


def plans(*success_at: int | None) -> torch.Tensor:
    return torch.stack([plan(at) for at in success_at])


# ---------------------------------------------------------------- the worker


def fields() -> Spec:
    return common_fields(SEGMENT, CHUNK, 4) | {
        "image": ((SEGMENT + 1, 1, 2, 2, 3), torch.uint8),
        "tokens": ((SEGMENT + 1, 24), torch.int32),
    }


def make_config(ranks: int, tasks: tuple[str, ...], group: int, settings: dict) -> Config:
    config = Config()
    config.env.envs = config.actor.batch = settings.get("envs", LANES)
    config.env.env_workers = 1
    config.env.eval_every = 0
    config.env.segment = SEGMENT
    config.rollout.rollout_workers = 1
    config.actor.actor_workers = ranks
    config.train.tasks = tasks
    config.train.tokenizer = ASSETS / "tokenizer.model"
    if group:
        config.train.algorithm = "grpo"
        config.algorithm.group_size = group
    for key, value in settings.items():
        setattr(config.algorithm if key == "bootstrap_truncated" else config.env, key, value)
    return config


@contextlib.contextmanager
def worker_starter(monkeypatch) -> Iterator[Callable[..., Channels]]:
    """Gives a function that starts env worker 0 over all lanes."""
    monkeypatch.setitem(envs.SIMULATORS, "metaworld", (__name__, ""))
    processes = []

    def start(
        version: int = 0,
        replaces: Channels | None = None,
        ranks: int = 1,
        tasks: tuple[str, ...] = (),
        group: int = 0,
        films: Path | None = None,
        **settings,
    ) -> Channels:
        """With `replaces`, in place of the last one started, which is killed."""
        config = make_config(ranks, tasks, group, settings)
        channels = replaces
        if replaces is None:
            slots = Admission.of(config).slots + config.env.eval_envs
            plane = WeightPlane({"w": ((1,), torch.float32)}, version=version)
            counters = Counters(1, metrics.columns(config.env.eval_episodes))
            channels = Channels.create(config, SlotPool(fields(), slots), plane, counters)
        else:
            processes[-1].kill()
            processes[-1].join()
            channels.counters.add(0, "restarts", 1)
        state = {"state_low": [0.0] * 4, "state_high": [1.0] * 4}
        header = Header("pi05", {"image_size": 2}, state)
        meter = metrics.Meter("env-0", 0, channels.counters, None)
        arguments = (0, config, header, "cpu", channels, version, films, meter)
        process = get_context("fork").Process(target=run, args=arguments, daemon=True)
        process.start()
        processes.append(process)
        return channels

    yield start
    for process in processes:
        process.kill()
        process.join()


# ---------------------------------------------------------------- what the test says and hears


def asks(slot: int, t: int, kind: int, generation: int = 0) -> Record:
    """Returns the record of a request, or of its answer."""
    return Record(slot, t, kind, 0, generation)


def records(channels: Channels, count: int) -> list[Record]:
    """Returns what the rollout worker receives next, which must be so many records."""
    got = []
    while len(got) < count:
        more = channels.requests[0].get(10.0)
        assert more, f"only {got} came"
        got += more
    got += channels.requests[0].get(0.1)
    assert len(got) == count, got
    return got


def requests(channels: Channels, count: int, since: int = 0) -> list[Record]:
    """Returns the next requests, which must be so many, in the order of their slots. Records that
    only wake are left out, and those of generations before `since`: nobody can say which requests
    a worker still made before it was killed."""
    got = []
    deadline = time.monotonic() + 10.0
    while len(got) < count:
        assert time.monotonic() < deadline, f"only {got} came"
        got += channels.requests[0].get(10.0)
        got = [record for record in got if record.kind != WAKE and record.generation >= since]
    more = channels.requests[0].get(0.1)
    got += [record for record in more if record.kind != WAKE and record.generation >= since]
    assert len(got) == count, got
    return sorted(got)


def answer(channels: Channels, record: Record, actions: torch.Tensor | None = None) -> None:
    """Answers a request. actions: [C, A] of one env, or [N, C, A] of a whole lane."""
    if actions is not None:
        row = 0 if record.kind == EVAL else record.t
        lane = slice(record.slot, record.slot + (len(actions) if actions.dim() == 3 else 1))
        channels.pool["actions"][lane, row] = actions
    channels.replies[0].put([record])


def assert_finished(
    channels: Channels, slot: int, trajectory: int, lengths: list[int], rank: int = 0
) -> None:
    """Waits until an actor is woken for the lane that begins at a slot, and looks at its mark."""
    (wake,) = channels.finished[rank].get(10.0)
    assert (wake.slot, wake.t, wake.kind, wake.sender) == (slot, 0, WAKE, 0)
    assert channels.pool["done"][slot] == trajectory + 1
    assert channels.pool["length"][slot : slot + len(lengths)].tolist() == lengths


def publish(channels: Channels, version: int) -> None:
    channels.plane.publish({"w": torch.zeros(1)}, version)
    channels.replies[0].put([Record(0, 0, WAKE, 0, 0)])


def begin_round(channels: Channels, number: int) -> None:
    channels.counters.set(0, "eval_round", number)
    channels.replies[0].put([Record(0, 0, WAKE, 0, 0)])


def counted(channels: Channels, *columns: str) -> list[float]:
    return [channels.counters.get(0, column) for column in columns]


def drive(channels: Channels, record: Record, begins_next: bool) -> Record | None:
    """Answers one lane's requests to the end of its trajectory, without success.

    begins_next: whether its next trajectory may begin, whose first request comes together with that
    for the last value, and is returned."""
    slot = record.slot
    generation = record.generation
    trajectory = int(channels.pool["trajectory"][slot])
    for t in range(SEGMENT):
        assert record == asks(slot, t, ACT, generation)
        answer(channels, record, plan())
        is_last = t + 1 == SEGMENT
        got = requests(channels, 2 if is_last and begins_next else 1)
        (record,) = (each for each in got if each.slot == slot)
    assert record == asks(slot, SEGMENT, VALUE, generation)
    assert channels.pool["done"][slot] <= trajectory  # the last value is yet to come
    answer(channels, record)
    assert_finished(channels, slot, trajectory, [SEGMENT])
    if not begins_next:
        return None
    (begun,) = (each for each in got if each.slot != slot)
    return begun
