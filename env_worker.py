"""Steps a share of the simulators. Every lane runs on its own: while one waits for its actions, the
others step.

    observe → write row t → request → (the rollout worker writes actions) → step → row t + 1 …

Read `run` first: it is the whole worker. `Shard` holds what the worker owns, `TrainingLane` is the
life of one lane. What makes a lane one env or many is in envs/lanes.py; evaluation lanes are in
evaluation.py. Pictures are drawn only where the policy will see them, once per chunk.

Left out: moving lanes between workers. Paper: RL-VLA³, Rollout Async.
"""

import math
import time
from collections import deque

import numpy as np
import torch

import envs
import models
from channel import ACT, EVAL, FINAL, VALUE, WAKE, Channels, Record, fence, synchronize
from config import Config
from envs.lanes import Lane, make_lane
from evaluation import EvaluationLanes
from metrics import Meter
from models.checkpoint import Header
from scheduler import Admission, Trajectories

# Where a chunk step usually takes less time than this (seconds), the requests of several lanes are
# sent together.
GATHER_S = 1e-3


def run(
    rank: int,
    config: Config,
    header: Header,
    device: str,
    channels: Channels,
    version: int,
    meter: Meter,
) -> None:
    """Works until the launcher ends it. header: the model's; version: where training starts or
    resumes."""
    shard = Shard(rank, config, header, device, channels, meter)
    begin = version * shard.admission.per_lane
    lanes = {i: TrainingLane(shard, lane, begin) for i, lane in shard.training_lanes().items()}
    evaluation = EvaluationLanes(shard, shard.evaluation_lanes())
    if shard.generation:  # this worker replaces one that died
        for lane in lanes.values():
            lane.skip_finished_trajectories()
    meter.ready()

    while True:
        # Begin whatever the published version admits.
        for lane in shard.take_parked():
            lane.begin_or_park()
        evaluation.begin_round_if_asked()

        # Send what was asked for, then take the next answer.
        shard.send_requests()
        nobody_plays = len(shard.parked) == len(lanes)
        record = shard.next_answer("admission" if nobody_plays else "action")
        if record is None:
            continue
        if record.kind == EVAL:
            evaluation.on_actions(record)
        else:
            lanes[shard.lane_of(record)].on_answer(record)
        meter.alive()


class Shard:
    """What all lanes of one worker share: slots, queues, and how observations are prepared."""

    def __init__(
        self,
        rank: int,
        config: Config,
        header: Header,
        device: str,
        channels: Channels,
        meter: Meter,
    ):
        if config.env.lanes and device != "cpu":
            torch.cuda.set_device(device)
        self.rank = rank
        self.config = config
        self.device = device
        self.meter = meter
        self.simulator = envs.load(config.train.env)
        self.spec = self.simulator.spec(config.train.tasks, config.env.image_size)
        self.preparation = models.preparation(config.train.model, header, config.train.tokenizer)
        self.admission = Admission.of(config)
        self.trajectories = Trajectories.of(config)  # segments (PPO) or episodes (GRPO)
        self.segment = config.env.segment  # T, chunk steps

        # Slots. Where a vectorised simulator draws on the GPU, its pictures stay there.
        self.pool = channels.pool
        self.arrays = channels.pool.arrays
        self.fields = {name: self.arrays.get(name, self.pool[name]) for name in self.pool.spec}
        self.pictures_stay = "image" not in self.arrays
        picture = (self.spec.views, self.spec.image_size, self.spec.image_size, 3)
        self.blank = np.broadcast_to(np.uint8(0), picture)  # stands for one that stays on the GPU
        self.observed: tuple[str, ...] = ()  # the fields of an observation

        # Queues. Records carry the generation, so that nobody takes a dead worker's for this one's.
        self.version = channels.plane.watch()
        self.lanes = channels.lanes
        self.requests = channels.requests
        self.finished = channels.finished
        self.replies = channels.replies[rank]
        self.replies.close_writer()
        self.generation = meter.restarts()  # how often this worker was replaced
        self.lanes.generation[rank] = self.generation
        self.awaited: set[Record] = set()  # requests without an answer yet
        self.answers: deque[Record] = deque()  # read, and not yet acted on
        self.outbox: dict[int, list[Record]] = {}  # requests to be sent, by rollout worker
        self.sent = 0.0  # monotonic seconds: when the outbox was last emptied
        self.chunk_s = 1.0  # running mean: seconds of a chunk step
        self.parked: list[TrainingLane] = []  # lanes that wait for a version

    # ---------------------------------------------------------------- lanes

    def training_lanes(self) -> dict[int, Lane]:
        env = self.config.env
        return self.make_lanes(0, env.envs, env.width)

    def evaluation_lanes(self) -> dict[int, Lane]:
        """Makes lanes whose envs are numbered after all training envs."""
        env = self.config.env
        return self.make_lanes(env.envs, env.eval_envs if env.evaluates else 0, env.eval_width)

    def make_lanes(self, first: int, count: int, width: int) -> dict[int, Lane]:
        """Makes every n-th of the lanes that `count` envs from number `first` on are divided
        into."""
        made = {}
        for index in range(self.rank, count // width, self.config.env.env_workers):
            numbers = range(first + index * width, first + (index + 1) * width)
            made[index] = make_lane(
                self.simulator,
                self.spec,
                self.config,
                index,
                numbers,
                self.device,
                self.pictures_stay,
            )
        return made

    def lane_of(self, record: Record) -> int:
        return self.arrays["lane"].item(record.slot) // self.config.env.width

    def take_parked(self) -> "list[TrainingLane]":
        parked = self.parked
        self.parked = []
        return parked

    # ---------------------------------------------------------------- slots

    def observe(self, lane: Lane, slots: slice, row: int) -> None:
        """Draws every env of a lane, and writes what the model needs into a row of its slots."""
        with self.meter.work("render"):
            pictures = lane.observe()
            if self.pictures_stay:
                self.pool["image"][slots, row] = pictures
                synchronize(self.pool.device)  # before anybody is told that they are there
        for i, slot in enumerate(range(slots.start, slots.stop)):
            state = lane.states[i]
            if not all(np.isfinite(state).tolist()):  # a third of the time that its `all()` takes
                raise FloatingPointError(f"a state of {lane.describe()} is not a number: {state}")
            prompt = lane.prompt or self.spec.prompts[lane.tasks[i]]
            picture = self.blank if self.pictures_stay else pictures[i]
            fields = self.preparation.observe(picture, state, prompt)
            for name, value in fields.items():
                if name != "image" or not self.pictures_stay:
                    self.arrays[name][slot, row] = value
        self.observed = tuple(fields)

    def carry_over(self, before: slice, slots: slice) -> None:
        """Copies the observation that ended a trajectory to where the next one begins."""
        for name in self.observed:
            self.fields[name][slots, 0] = self.fields[name][before, self.segment]
        if self.pictures_stay:
            synchronize(self.pool.device)

    def label(self, lane: Lane, slots: slice, trajectories: int | list[int]) -> None:
        """Writes into a lane's slots which env, trajectory and task they hold."""
        self.arrays["lane"][slots] = lane.envs
        self.arrays["trajectory"][slots] = trajectories
        self.arrays["task"][slots] = lane.tasks

    def planned_actions(self, lane: Lane, slots: slice, row: int) -> list[np.ndarray]:
        """Returns what each env of a lane is to execute [C, A]."""
        # A simulator that writes into what it is given must not change what is trained on.
        actions = self.arrays["actions"][slots, row].copy()
        return [
            self.preparation.actions(a, state)
            for a, state in zip(actions, lane.states, strict=True)
        ]

    # ---------------------------------------------------------------- messages

    def request(self, lane: Lane, slots: slice, kind: int, t: int) -> None:
        """Asks the lane's rollout worker about its first slot, which stands for the whole lane."""
        self.arrays["asked"][slots.start] = time.monotonic()
        record = Record(slots.start, t, kind, self.rank, self.generation)
        self.awaited.add(record)
        self.outbox.setdefault(lane.index % len(self.requests), []).append(record)

    def wake_rollout(self, lane: Lane) -> None:
        """Lets the lane's rollout worker see that the lane table has changed."""
        record = Record(0, 0, WAKE, self.rank, self.generation)
        self.outbox.setdefault(lane.index % len(self.requests), []).append(record)

    def send_requests(self) -> None:
        """Empties the outbox, unless more requests will follow within a moment."""
        now = time.monotonic()
        if self.answers and self.chunk_s < GATHER_S and now - self.sent < GATHER_S:
            return
        for worker, records in self.outbox.items():
            self.requests[worker].put(records)
        self.outbox.clear()
        self.sent = now

    def next_answer(self, waiting_for: str) -> Record | None:
        """Waits up to a second. Leaves out what nobody waits for: an answer that comes twice, or
        that was meant for a worker that this one replaces."""
        if not self.answers:
            with self.meter.wait(waiting_for):
                records = self.replies.get(1.0)
            for record in records:
                if record in self.awaited:
                    self.awaited.remove(record)
                    self.answers.append(record)
        return self.answers.popleft() if self.answers else None

    def finish(self, slots: slice, trajectory: int, lengths: int | list[int]) -> None:
        """Says that the trajectories in a lane's slots are complete, of so many chunk steps each.

        The mark in the lane's first slot is what counts; the record only wakes the actor."""
        self.arrays["length"][slots] = lengths
        fence()
        self.arrays["done"][slots.start] = trajectory + 1
        owner = self.admission.owner(slots.start, len(self.finished))
        self.finished[owner].put([Record(slots.start, 0, WAKE, self.rank, self.generation)])


class TrainingLane:
    """One lane, which plays its trajectories one after the other.

    parked ──admitted──► begin ──► ACT ──► advance ──► ACT ──► … ──► VALUE ──► finished"""

    def __init__(self, shard: Shard, lane: Lane, trajectory: int):
        self.shard = shard
        self.lane = lane
        self.slots: slice | None = None  # where it writes; None before the first trajectory
        self.t = 0  # chunk steps into the trajectory
        self.ended: list[int] = []  # envs whose episodes have just ended
        self.lengths = [0] * len(lane.envs)  # chunk steps of each env's episode, 0 while it lasts
        self.move_to(trajectory)
        shard.parked.append(self)

    def move_to(self, trajectory: int) -> None:
        """Makes this the trajectory that the lane plays, or waits to begin; rollout workers read
        it."""
        self.trajectory = trajectory
        self.shard.lanes.trajectory[self.lane.index] = trajectory

    def slots_of(self, trajectory: int) -> slice:
        first = self.shard.admission.slot(self.lane.envs[0], trajectory)
        return slice(first, first + len(self.lane.envs))

    def skip_finished_trajectories(self) -> None:
        """After a restart: what the dead worker has marked as done is not played again."""
        done = self.shard.arrays["done"]
        trajectory = self.trajectory
        while done[self.slots_of(trajectory).start] > trajectory:
            trajectory += 1
        self.move_to(trajectory)
        self.shard.wake_rollout(self.lane)

    def on_answer(self, record: Record) -> None:
        if record.kind == ACT:
            start = time.monotonic()
            self.advance()
            seconds = time.monotonic() - start
            self.shard.chunk_s = 0.9 * self.shard.chunk_s + 0.1 * seconds
            self.shard.meter.count("chunks", 1)
            self.shard.meter.count("chunk_s", seconds)
            self.shard.meter.count("chunk_s_square", seconds**2)
        elif record.kind == FINAL:
            self.go_on()
        elif record.kind == VALUE:  # that of the last row: the trajectory in this slot is complete
            slots = slice(record.slot, record.slot + len(self.lane.envs))
            trajectory = self.shard.arrays["trajectory"].item(record.slot)
            self.shard.finish(slots, trajectory, self.shard.segment)

    # ---------------------------------------------------------------- the life of a trajectory

    def begin_or_park(self) -> bool:
        """Moves into the next slots if admission allows, else waits for the next version. Returns
        whether it has begun."""
        shard = self.shard
        if not shard.admission.admits(self.trajectory, shard.version.version):
            shard.parked.append(self)
            return False
        before = self.slots
        self.slots = self.slots_of(self.trajectory)
        self.t = 0
        fresh = self.rows_that_need_an_episode(before)
        if fresh:
            self.begin_episodes(fresh, self.trajectory, 0)
            shard.observe(self.lane, self.slots, 0)
        else:
            shard.carry_over(before, self.slots)
        shard.label(self.lane, self.slots, self.trajectory)
        shard.request(self.lane, self.slots, ACT, 0)
        return True

    def advance(self) -> None:
        """Steps the simulator through the actions of row t, and writes what happened."""
        shard = self.shard
        lane = self.lane
        t = self.t
        with shard.meter.work("step"):
            plans = shard.planned_actions(lane, self.slots, t)
            outcome = lane.play(plans, shard.spec.horizon)
        shard.meter.count("env_steps", outcome.steps)
        if not all(map(math.isfinite, outcome.reward)):
            raise FloatingPointError(f"a reward of {lane.describe()} is {outcome.reward}")
        arrays = shard.arrays
        arrays["collected"][self.slots] += 1
        arrays["reward"][self.slots, t] = outcome.reward
        arrays["success"][self.slots, t] = outcome.won
        ways = zip(outcome.won, outcome.failed, strict=True)
        arrays["terminated"][self.slots, t] = [won or failed for won, failed in ways]
        arrays["truncated"][self.slots, t] = outcome.late

        self.ended = outcome.ended()
        if self.ended:
            shard.meter.count("episodes", len(self.ended))
            shard.meter.count("successes", sum(outcome.won))
        if shard.trajectories.are_episodes:
            self.end_episodes()
        elif shard.config.algorithm.bootstrap_truncated and any(outcome.late):
            # The value of the last observation is wanted; `go_on` then overwrites its row.
            shard.observe(lane, self.slots, t + 1)
            shard.request(lane, self.slots, FINAL, t + 1)
        else:
            self.go_on()

    def end_episodes(self) -> None:
        """A trajectory is one episode: whoever has ended plays on to no effect until all have."""
        for row in self.ended:
            self.lengths[row] = self.t + 1
        self.ended = []
        if not all(self.lengths):
            self.go_on()
            return
        self.shard.finish(self.slots, self.trajectory, self.lengths)
        self.lengths = [0] * len(self.lengths)
        self.move_to(self.trajectory + 1)
        if not self.begin_or_park():
            self.shard.wake_rollout(self.lane)

    def go_on(self) -> None:
        """Ends the chunk step: begins new episodes where some ended, observes, asks again."""
        shard = self.shard
        after = self.t + 1
        is_last = after == shard.segment
        if self.ended:
            where = (self.trajectory + 1, 0) if is_last else (self.trajectory, after)
            self.begin_episodes(self.ended, *where)
        shard.observe(self.lane, self.slots, after)
        self.t = after
        if not is_last:
            shard.request(self.lane, self.slots, ACT, after)
            return
        # The value of row T completes the trajectory. It rides along with the first request of the
        # next one, so that the lane waits for one inference instead of two.
        complete = self.slots
        self.move_to(self.trajectory + 1)
        self.begin_or_park()
        shard.request(self.lane, complete, VALUE, shard.segment)

    # ---------------------------------------------------------------- episodes

    def rows_that_need_an_episode(self, before: slice | None) -> list[int]:
        """All at the very beginning and where trajectories are episodes; else those whose task
        changes."""
        if before is None or self.shard.trajectories.are_episodes:
            return list(range(len(self.lane.envs)))
        return [
            row
            for row, task in enumerate(self.tasks_of(self.trajectory))
            if task != self.lane.tasks[row]
        ]

    def tasks_of(self, trajectory: int) -> list[int]:
        deal = self.shard.admission.task
        return [deal(env, trajectory, len(self.shard.spec.tasks)) for env in self.lane.envs]

    def begin_episodes(self, rows: list[int], trajectory: int, t: int) -> None:
        """Begins episodes, which are named by where they begin, so a resumed run meets the same."""
        shard = self.shard
        tasks = self.tasks_of(trajectory)
        name = shard.trajectories.episode_seed
        seeds = [name(self.lane.envs[row], trajectory, t, shard.generation) for row in rows]
        with shard.meter.work("reset"):
            self.lane.reset(rows, [tasks[row] for row in rows], seeds)
