"""A worker's lanes step by step against a scripted simulator, and the property that success never
selects what is trained.
"""

import math
import time
from multiprocessing import get_context

import numpy as np
import pytest
import torch
from stacked import Stacked

import envs
import metrics
from channel import (
    ACT,
    DONE,
    EVAL,
    FINAL,
    LAST,
    RESTART,
    VALUE,
    VERSION,
    Channels,
    Counters,
    IndexQueue,
    Record,
    SlotPool,
    WeightPlane,
)
from config import ASSETS, Config
from env_worker import EVAL_SEEDS, episode_seed, run
from envs import EnvSpec, Step
from envs.lanes import SingleLane
from models.checkpoint import Header
from scheduler import Admission

CHUNK = 3
HORIZON = 6
SEGMENT = 4
LANES = 2

# ---------------------------------------------------------------- this file is a simulator: the
# test decides who succeeds


def spec(tasks, image_size) -> EnvSpec:
    prompts = {"one": "push the puck", "two": "open the door", "three": "close the box"}
    tasks = tuple(tasks) or ("one", "two")
    return EnvSpec(tasks, tuple(prompts[task] for task in tasks), 1, 2, 4, 4, HORIZON)


class Env(envs.Env):
    """Succeeds when action[0] is 1, and takes action[1] seconds. Its picture says which episode
    this is, how far along, and of which task.
    """

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
    """Episode (its seed mod 251), step and task of a stored picture."""
    return tuple(pool["image"][slot, row].flatten()[:3].tolist())


def plan(success_at: int | None = None) -> torch.Tensor:
    actions = torch.zeros(CHUNK, 4)
    if success_at is not None:
        actions[success_at, 0] = 1.0
    return actions


# ---------------------------------------------------------------- the worker


@pytest.fixture
def worker(monkeypatch):
    """Starts env worker 0 over both lanes; the test plays rollout worker and actor."""
    monkeypatch.setitem(envs.SIMULATORS, "metaworld", (__name__, ""))
    processes = []

    def start(
        version: int = 0,
        replaces: Channels | None = None,
        ranks: int = 1,
        tasks=(),
        group: int = 0,
        **settings,
    ) -> Channels:
        """With `replaces`, in place of the last one started, which is killed."""
        config = Config()
        config.env.envs = config.actor.batch = settings.get("envs", LANES)
        config.env.env_workers = 1
        config.env.eval_every = 0
        config.train.tasks = tasks
        config.train.tokenizer = ASSETS / "tokenizer.model"
        if group:
            config.train.algorithm = "grpo"
            config.algorithm.group_size = group
        for name, value in settings.items():
            setattr(config.algorithm if name == "bootstrap_truncated" else config.env, name, value)
        f = torch.float32
        fields = {
            "image": ((SEGMENT + 1, 1, 2, 2, 3), torch.uint8),
            "tokens": ((SEGMENT + 1, 24), torch.int32),
            "actions": ((SEGMENT, CHUNK, 4), f),
            "reward": ((SEGMENT,), f),
            "terminated": ((SEGMENT,), torch.bool),
            "truncated": ((SEGMENT,), torch.bool),
            "lane": ((), torch.int32),
            "asked": ((), torch.float64),
            "trajectory": ((), torch.int32),
            "received": ((), torch.int32),
            "task": ((), torch.int32),
            "collected": ((), torch.int64),
        }
        slots = Admission.of(config).slots + config.env.eval_envs
        channels = replaces or Channels(
            SlotPool(fields, slots),
            WeightPlane({"w": ((1,), f)}, version=version),
            Counters(1, metrics.columns(config.env.eval_episodes)),
            (IndexQueue(),),
            (IndexQueue(),),
            tuple(IndexQueue() for _ in range(ranks)),
        )
        if replaces:
            processes[-1].kill()
            processes[-1].join()
            channels.counters.add(0, "restarts", 1)
        header = Header(
            "pi05", {"image_size": 2}, {"state_low": [0.0] * 4, "state_high": [1.0] * 4}
        )
        meter = metrics.Meter("env-0", 0, channels.counters, None)
        process = get_context("fork").Process(
            target=run, args=(0, config, header, "cpu", channels, version, meter), daemon=True
        )
        process.start()
        processes.append(process)
        return channels

    yield start
    for process in processes:
        process.kill()
        process.join()


def requests(channels: Channels, count: int | None) -> list[Record]:
    """The next requests, which must be so many (None: one or two), in the order of their slots."""
    got = []
    while len(got) < (count or 1) and count != 0:
        more = channels.requests[0].get(10.0)
        assert more, f"only {got} came"
        got += more
    got += channels.requests[0].get(0.1)
    assert len(got) == count if count is not None else len(got) in (1, 2)
    return sorted(got)


def answer(channels: Channels, record: Record, actions: torch.Tensor | None = None) -> None:
    if actions is not None:
        channels.pool["actions"][record.slot, 0 if record.kind == EVAL else record.t] = actions
    channels.replies[0].put([record])


def publish(channels: Channels, version: int) -> None:
    channels.plane.publish({"w": torch.zeros(1)}, version)
    channels.replies[0].put([Record(0, 0, VERSION, 0)])


def name(*where: int) -> int:
    return episode_seed(1, *where) % 251


def test_a_trajectory_from_request_to_request(worker):
    channels = worker()
    pool = channels.pool
    zero, one = requests(channels, 2)
    assert (zero, one) == (Record(0, 0, ACT, 0), Record(1, 0, ACT, 0))
    assert seen(pool, 0, 0) == (name(0, 0, 0), 0, 0) and seen(pool, 1, 0) == (name(1, 0, 0), 0, 1)
    assert not torch.equal(pool["tokens"][0, 0], pool["tokens"][1, 0])  # two tasks, two prompts

    # Lane 1 is left waiting for its action all the while: nobody else minds.
    answer(channels, zero, plan())
    (zero,) = requests(channels, 1)
    assert zero == Record(0, 1, ACT, 0) and seen(pool, 0, 1) == (name(0, 0, 0), 3, 0)
    assert not torch.equal(pool["tokens"][0, 0], pool["tokens"][0, 1])  # the state is in the prompt
    answer(
        channels, zero, plan(success_at=1)
    )  # in the middle of a chunk: the rest of it is not executed
    (zero,) = requests(channels, 1)
    assert zero == Record(0, 2, ACT, 0) and seen(pool, 0, 2) == (name(0, 0, 2), 0, 0)
    assert torch.equal(
        pool["actions"][0, 1], plan(success_at=1)
    )  # what is trained on is what was sampled
    for _ in (3, 4):
        answer(channels, zero, plan())
        (zero,) = requests(channels, 1)
    assert (
        zero == Record(0, 4, VALUE, 0) and seen(pool, 0, 4)[1] == 0
    )  # a new episode after the time limit
    assert pool["reward"][0].tolist() == [0, 1, 0, 0]
    assert pool["terminated"][0].tolist() == [False, True, False, False]
    assert pool["truncated"][0].tolist() == [False, False, False, True]
    assert channels.finished[0].get(0) == []
    answer(channels, zero)  # the value of the last observation has come
    assert channels.finished[0].get(10.0) == [Record(0, SEGMENT, DONE, 0)] and pool["collected"][
        :2
    ].tolist() == [SEGMENT, 0]
    counted = [
        channels.counters.get(0, column) for column in ("env_steps", "episodes", "successes")
    ]
    assert counted == [3 + 2 + 3 + 3, 2, 1]


@pytest.mark.parametrize("width", [1, 2])
def test_the_time_limit_can_ask_for_the_value_of_the_last_observation(worker, width):
    """Before the episodes that it cut are replaced by new ones; success, which ends them too, asks
    for nothing.
    """
    channels = worker(bootstrap_truncated=True, lanes=width - 1)
    pool = channels.pool
    record = requests(channels, LANES // width)[0]
    for t in range(SEGMENT):
        assert record == Record(0, t, ACT, 0)
        pool["actions"][:LANES, t] = plan(
            success_at=1 if t == 2 else None
        )  # too late after t = 1; success; not over
        answer(channels, record)
        (record,) = requests(channels, 1)
        if t == 1:
            assert record == Record(0, 2, FINAL, 0) and seen(pool, 0, 2) == (
                name(0, 0, 0),
                HORIZON,
                0,
            )
            answer(channels, record)
            (record,) = requests(channels, 1)
            assert seen(pool, 0, 2) == (
                name(0, 0, 2),
                0,
                0,
            )  # of which the next action is asked for
    assert record == Record(0, SEGMENT, VALUE, 0)
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
    assert [
        [channels.pool[n][slot].item() for n in ("lane", "trajectory", "task")] for slot in (0, 1)
    ] == [[0, 0, 0], [1, 0, 1]]


def drive(channels: Channels, record: Record) -> Record | None:
    """Answers one lane's requests to the end of its trajectory, without success. Returns the next
    one's first request, if any.
    """
    slot = record.slot
    begun = None
    for t in range(SEGMENT):
        assert record == Record(slot, t, ACT, 0)
        answer(channels, record, plan())
        record, *more = sorted(
            requests(channels, 1 if t + 1 < SEGMENT else None), key=lambda r: r.slot != slot
        )
        begun = more[0] if more else None
    # The value of the last observation: waited for, unless the next trajectory has begun and its
    # first request takes it along.
    assert record == Record(slot, SEGMENT, VALUE if begun is None else LAST, 0)
    answer(channels, record)
    assert channels.finished[0].get(10.0)[0].slot == slot
    return begun


def test_a_trajectory_starts_when_its_version_allows_and_goes_on_where_the_last_ended(worker):
    channels = worker()
    pool = channels.pool
    zero, one = requests(channels, 2)
    assert drive(channels, zero) is None
    assert requests(channels, 0) == []  # before version 0, only batch 0 may start (K = 1)
    publish(channels, 0)
    (zero,) = requests(channels, 1)
    assert zero == Record(2, 0, ACT, 0) and pool["trajectory"][2] == 1  # the other half of the ring
    assert seen(pool, 2, 0) == seen(pool, 0, SEGMENT) and torch.equal(
        pool["tokens"][2, 0], pool["tokens"][0, SEGMENT]
    )
    assert drive(channels, zero) is None
    assert requests(channels, 0) == []  # lane 1's first trajectory still waits: version 1 cannot be
    assert drive(channels, one) == Record(3, 0, ACT, 0)  # admitted at once
    publish(channels, 1)
    (zero,) = requests(channels, 1)
    assert zero == Record(0, 0, ACT, 0) and pool["trajectory"][0] == 2


def test_tasks_that_do_not_divide_the_lanes_take_turns(worker):
    channels = worker(tasks=("one", "two", "three"))
    pool = channels.pool
    zero, one = requests(channels, 2)
    publish(channels, 0)
    for lane, first, second in ((0, zero, 2), (1, one, 0)):
        after = drive(channels, first)
        assert after.slot == 2 + lane and seen(pool, after.slot, 0) == (name(lane, 1, 0), 0, second)
        assert [pool["task"][slot].item() for slot in (lane, 2 + lane)] == [lane, second]
    assert channels.counters.get(0, "episodes") == 4


def test_the_lanes_of_a_group_meet_one_state_and_their_trajectories_end_with_their_episodes(worker):
    channels = worker(group=2, tasks=("one", "two"))
    pool = channels.pool
    zero, one = requests(channels, 2)
    assert seen(pool, zero.slot, 0) == seen(pool, one.slot, 0) == (name(0, 0, 0), 0, 0)
    publish(channels, 0)
    answer(channels, zero, plan(success_at=1))
    (third,) = requests(
        channels, 1
    )  # the next trajectory, at once: nobody asks for the value of an end
    assert channels.finished[0].get(5.0) == [Record(zero.slot, 1, DONE, 0)]  # of one chunk step
    assert third.kind == ACT and third.t == 0 and seen(pool, third.slot, 0) == (name(0, 1, 0), 0, 1)
    answer(channels, one, plan())  # the other one goes on until its time limit, two chunks
    (one,) = requests(channels, 1)
    assert one.t == 1 and channels.finished[0].get(0.0) == []
    answer(channels, one, plan())
    (one,) = requests(channels, 1)
    assert channels.finished[0].get(5.0) == [Record(1, 2, DONE, 0)] and pool["collected"][
        :4
    ].tolist() == [1, 2, 0, 0]
    assert one.t == 0 and seen(pool, one.slot, 0) == seen(
        pool, third.slot, 0
    )  # the same state again


def test_a_resumed_run_meets_the_same_episodes(worker):
    whole = worker()
    resumed = worker(version=1)
    zero, _ = requests(whole, 2)
    drive(whole, zero)
    # 4 chunks of 3 steps: two episodes end by the time limit, the next begins with the next
    # trajectory
    publish(whole, 0)
    (again,) = requests(whole, 1)
    first, _ = requests(resumed, 2)
    assert resumed.pool["trajectory"][first.slot] == whole.pool["trajectory"][again.slot] == 1
    assert seen(resumed.pool, first.slot, 0) == seen(whole.pool, again.slot, 0)


def begin_round(channels: Channels, number: int) -> None:
    channels.counters.set(0, "eval_round", number)
    channels.replies[0].put([Record(0, 0, VERSION, 0)])


def test_evaluation_has_its_own_slots_seeds_and_pace(worker):
    channels = worker(eval_envs=1, eval_episodes=3, eval_every=2)
    slot = 2 * LANES
    requests(channels, 2)  # the training lanes' are never answered
    publish(channels, 0)
    assert requests(channels, 0) == []  # rounds are the launcher's to begin
    for number, successes in enumerate(([True, False, True], [False, False, True]), 1):
        begin_round(channels, number)
        for episode, success in enumerate(successes):
            (record,) = requests(channels, 1)
            assert (
                record == Record(slot, 0, EVAL, 0) and channels.pool["trajectory"][slot] == episode
            )
            assert seen(channels.pool, slot, 0) == ((EVAL_SEEDS + episode) % 251, 0, episode % 2)
            answer(channels, record, plan())
            (record,) = requests(channels, 1)
            assert record == Record(slot, 1, EVAL, 0) and seen(channels.pool, slot, 0)[1] == 3
            answer(channels, record, plan(success_at=2 if success else None))
        assert requests(channels, 0) == []
        assert [
            channels.counters.get(0, f"outcome_{e}") - 2 * number for e in range(3)
        ] == successes
    assert channels.counters.get(0, "env_steps") == 0


# ---------------------------------------------------------------- vectorised lanes


def plans(*success_at: int | None) -> torch.Tensor:
    return torch.stack([plan(at) for at in success_at])


def answer_lane(channels: Channels, record: Record, actions: torch.Tensor) -> None:
    row = 0 if record.kind == EVAL else record.t
    channels.pool["actions"][record.slot : record.slot + len(actions), row] = actions
    channels.replies[0].put([record])


def test_a_lane_of_several_envs_asks_and_finishes_as_one(worker):
    channels = worker(envs=6, lanes=2)  # two lanes of three envs
    pool = channels.pool
    zero, one = requests(channels, 2)
    assert (zero, one) == (Record(0, 0, ACT, 0), Record(3, 0, ACT, 0))
    assert [seen(pool, slot, 0) for slot in range(6)] == [
        (name(slot, 0, 0), 0, slot // 3) for slot in range(6)
    ]  # a task per lane
    assert [pool[n][:6].tolist() for n in ("lane", "trajectory", "task")] == [
        [0, 1, 2, 3, 4, 5],
        [0] * 6,
        [0, 0, 0, 1, 1, 1],
    ]

    # Lane 1 is left waiting. In lane 0 the second env succeeds in the first chunk: it alone begins
    # another episode.
    answer_lane(channels, zero, plans(None, 1, None))
    (zero,) = requests(channels, 1)
    assert zero == Record(0, 1, ACT, 0)
    assert [seen(pool, slot, 1) for slot in range(3)] == [
        (name(0, 0, 0), 3, 0),
        (name(1, 0, 1), 0, 0),
        (name(2, 0, 0), 3, 0),
    ]
    for t in (1, 2, 3):
        answer_lane(channels, zero, plans(None, None, None))
        (zero,) = requests(channels, 1)
        assert zero == Record(0, t + 1, ACT if t < 3 else VALUE, 0)
    assert pool["terminated"][:3].int().tolist() == [[0, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    assert pool["truncated"][:3].int().tolist() == [[0, 1, 0, 1], [0, 0, 1, 0], [0, 1, 0, 1]]
    assert pool["reward"][:3].sum().item() == 1.0
    counted = [
        channels.counters.get(0, column) for column in ("env_steps", "episodes", "successes")
    ]
    assert counted == [
        3 * 12 - 1,
        6,
        1,
    ]  # the step that the second env took after its success counts for nothing
    answer(channels, zero)
    assert channels.finished[0].get(10.0) == [Record(0, SEGMENT, DONE, 0)]
    assert pool["collected"][:6].tolist() == [SEGMENT] * 3 + [0] * 3
    publish(channels, 0)
    (zero,) = requests(channels, 1)
    assert zero == Record(6, 0, ACT, 0) and all(
        seen(pool, 6 + i, 0) == seen(pool, i, SEGMENT) for i in range(3)
    )


def test_an_episode_of_a_group_that_plays_on_with_its_lane_counts_once(worker):
    channels = worker(envs=2, lanes=1, group=2)
    (record,) = requests(channels, 1)
    answer_lane(channels, record, plans(1, None))
    (record,) = requests(channels, 1)
    answer_lane(
        channels, record, plans(0, None)
    )  # the first one has ended, whatever it does now; the other one runs out of time
    assert channels.finished[0].get(5.0) == [Record(0, 2, DONE, 0)]
    pool = channels.pool
    assert pool["terminated"][:2, :2].int().tolist() == [[1, 0], [0, 0]] and pool["reward"][
        :2, :2
    ].tolist() == [[1, 0], [0, 0]]
    assert pool["truncated"][:2, :2].int().tolist() == [[0, 0], [0, 1]]
    counted = [
        channels.counters.get(0, column) for column in ("env_steps", "episodes", "successes")
    ]
    assert counted == [2 + 6, 2, 1]


def test_a_replaced_lane_of_several_envs_plays_again_with_all_of_them(worker):
    channels = worker(envs=4, lanes=2, ranks=2)
    zero, one = requests(channels, 2)
    answer_lane(channels, zero, plans(None, 0))
    requests(channels, 1)
    channels.pool["received"][2:4] = (
        1  # as if lane 1, whose trajectories both go to rank 1, had finished
    )
    worker(replaces=channels, envs=4, lanes=2, ranks=2)
    restarted(channels, 1, 2, echo=[0, 1, 2])
    publish(channels, 0)
    assert requests(channels, 2) == [Record(0, 0, ACT, 0), Record(6, 0, ACT, 0)]
    assert [seen(channels.pool, slot, 0)[1:] for slot in (0, 1)] == [(0, 0), (0, 0)]


def test_evaluation_of_several_envs_in_one_lane(worker):
    channels = worker(envs=2, lanes=1, eval_envs=2, eval_episodes=5, eval_every=1)
    pool = channels.pool
    slot = 4
    requests(channels, 1)
    begin_round(channels, 1)
    (record,) = requests(channels, 1)
    assert record == Record(slot, 0, EVAL, 0) and pool["trajectory"][slot : slot + 2].tolist() == [
        0,
        1,
    ]
    # Episode 0 succeeds at once and 1 never does; then 2 and so on: each env plays at its own pace.
    for outcome, playing in (
        ((0, None), [2, 1]),
        ((None, None), [2, 3]),
        ((0, None), [4, 3]),
        ((0, None), [6, 5]),
    ):
        answer_lane(channels, record, plans(*outcome))
        more = requests(channels, 0 if min(playing) >= 5 else 1)
        if more:
            (record,) = more
            assert pool["trajectory"][slot : slot + 2].tolist() == playing and record.kind == EVAL
    assert [channels.counters.get(0, f"outcome_{e}") for e in range(5)] == [3, 2, 3, 2, 3]


# ---------------------------------------------------------------- a worker that replaces a dead one


def restarted(channels: Channels, generation: int, ranks: int, echo: list[int]) -> list[Record]:
    """What a replacement writes first: RESTART to everyone. `echo`: who answers, 0 for the rollout
    worker, 1 … for actors.
    """
    words = []
    for queue in (*channels.requests, *channels.finished):
        records = queue.get(10.0)
        while records[-1].kind != RESTART:  # what the dead one wrote lies before it
            records = queue.get(10.0)
        words.append(records[-1])
    assert words == [Record(i, generation, RESTART, 0) for i in range(1 + ranks)]
    for i in echo:
        channels.replies[0].put([words[i]])
    return words


def test_a_replacement_plays_again_what_nobody_has_received(worker):
    channels = worker()
    pool = channels.pool
    received = channels.pool["received"]
    zero, one = requests(channels, 2)
    publish(channels, 0)
    zero = drive(
        channels, zero
    )  # lane 0 has finished its first trajectory, and is in the second of which one row is there
    answer(channels, zero, plan())
    (stale,) = requests(channels, 1)
    assert stale == Record(2, 1, ACT, 0) and pool["trajectory"][2] == 1
    assert pool["collected"][:4].tolist() == [SEGMENT, 0, 1, 0]
    answer(
        channels, stale, plan(success_at=0)
    )  # an answer that the dead one does not live to read, or does not live to use

    worker(replaces=channels)
    words = restarted(channels, 1, 1, echo=[])
    assert requests(channels, 0) == []  # it waits: answers to the dead one may still come
    answer(channels, one, plan(success_at=0))  # such as this one
    channels.replies[0].put(
        [Record(0, 0, RESTART, 0), Record(1, 0, RESTART, 0)]
    )  # an echo that an earlier generation asked for
    assert requests(channels, 0) == []
    received[0] = 1  # the actor takes in slot 0 before it echoes
    channels.replies[0].put([words[0]])
    assert requests(channels, 0) == []  # what the actor has received is not known yet
    channels.replies[0].put([words[1]])
    zero, one = sorted(requests(channels, 2), key=lambda record: -record.slot)
    assert (zero, one) == (
        Record(2, 0, ACT, 0),
        Record(1, 0, ACT, 0),
    )  # lane 0 goes on at its second, lane 1 at its first
    assert [pool["trajectory"][slot].item() for slot in (2, 1)] == [1, 0]
    # Other episodes than the first time, from their beginning.
    names = [episode_seed(1, *where, 1) % 251 for where in ((0, 1, 0), (1, 0, 0))]
    assert (
        seen(pool, 2, 0) == (names[0], 0, 0)
        and seen(pool, 1, 0) == (names[1], 0, 1)
        and names[1] != name(1, 0, 0)
    )
    # One whole trajectory was received: one chunk step is lost, or two, had the dead one used its
    # last answer.
    lost = int(pool["collected"][2])
    assert pool["collected"][:4].tolist() == [SEGMENT, 0, lost, 0] and lost in (1, 2)

    # It goes on as any other: received at the end, and then the next.
    assert drive(channels, one) == Record(3, 0, ACT, 0)
    assert (
        drive(channels, zero) is None and requests(channels, 0) == []
    )  # trajectory 2 waits for version 1
    assert pool["collected"][:4].tolist() == [
        SEGMENT,
        SEGMENT,
        lost + SEGMENT,
        0,
    ]  # the slot remembers what was lost in it


def test_a_replacement_does_not_wait_for_an_actor_that_may_be_waiting_for_it(worker):
    """Rank 0 has had its share, marked as received, and waits for rank 1, which waits for lane
    1.
    """
    channels = worker(ranks=2)
    zero, one = requests(channels, 2)
    assert drive(channels, zero) is None
    channels.pool["received"][0] = 1
    publish(channels, 0)
    requests(channels, 1)
    worker(replaces=channels, ranks=2)
    words = restarted(channels, 1, 2, echo=[0, 2])
    assert requests(channels, 1) == [Record(1, 0, ACT, 0)]
    channels.replies[0].put([words[1]])
    assert requests(channels, 1) == [Record(2, 0, ACT, 0)] and channels.pool["trajectory"][2] == 1


def test_a_round_of_evaluation_outlives_its_worker(worker):
    channels = worker(eval_envs=2, eval_episodes=6, eval_every=2)
    slot = 2 * LANES  # of the first evaluator; the second plays episodes 1, 3 and 5
    requests(channels, 2)  # of lanes: their answers do not come
    begin_round(channels, 1)
    records = requests(channels, 2)
    answer(channels, records[0], plan(success_at=0))  # episode 0 is won, episode 2 begins
    assert (
        requests(channels, 1) == [Record(slot, 0, EVAL, 0)]
        and channels.pool["trajectory"][slot] == 2
    )
    worker(replaces=channels, eval_envs=2, eval_episodes=6, eval_every=2)
    restarted(channels, 1, 1, echo=[0, 1])
    *_, record, other = requests(channels, 4)  # two lanes and two evaluators
    waiting = [record, other]
    played = []
    while waiting:
        record = waiting.pop()
        played.append(int(channels.pool["trajectory"][record.slot]))
        answer(channels, record, plan(success_at=0))
        waiting += requests(channels, 1 if played[-1] < 4 else 0)
    assert sorted(played) == [1, 2, 3, 4, 5]
    assert [channels.counters.get(0, f"outcome_{episode}") for episode in range(6)] == [3.0] * 6


# ---------------------------------------------------------------- its parts


def test_episodes_have_names_of_their_own():
    seeds = [
        episode_seed(s, lane, j, t)
        for s in (0, 1)
        for lane in range(6)
        for j in range(20)
        for t in range(5)
    ]
    assert len(set(seeds)) == len(seeds)
    assert seeds == [
        episode_seed(s, lane, j, t)
        for s in (0, 1)
        for lane in range(6)
        for j in range(20)
        for t in range(5)
    ]
    assert all(
        2**30 <= seed < 2**31 for seed in seeds
    )  # never an evaluation's (5·10⁵) nor a demonstration's (10⁷)
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
    coins = [SingleLane(i, range(i, i + 1), spec((), 2), coin) for i, coin in enumerate(tosses)]
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
        outcome = coins[lane].play(chunk[None], horizon)
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
