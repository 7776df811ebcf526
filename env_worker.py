"""Steps a share of the simulators. Every lane runs on its own: while one waits for its actions, the
others step.

    observe → write row t → request → (the rollout worker writes actions) → step → row t + 1 …

Read `run` first: it is the whole worker. `TrainingLane` is the life of one lane. What they share is
in shard.py; what makes a lane one env or many is in envs/lanes.py; evaluation lanes are in
evaluation.py. Pictures are drawn only where the policy will see them, once per chunk.

Left out: moving lanes between workers. Paper: RL-VLA³, Rollout Async.
"""

import math
import time
from pathlib import Path

import numpy as np

import envs
from channel import ACT, EVAL, FINAL, VALUE, Channels, Record
from config import Config
from envs.lanes import Lane, Outcome
from evaluation import EvaluationLanes
from metrics import Meter
from models.checkpoint import Header
from shard import Shard


def run(
    rank: int,
    config: Config,
    header: Header,
    device: str,
    channels: Channels,
    version: int,
    films: Path | None,
    meter: Meter,
) -> None:
    """Works until the launcher ends it. header: the model's; version: where training starts or
    resumes, also for a worker that replaces another; films: the folder for those of evaluation, if
    it is filmed."""
    shard = Shard(rank, config, header, device, channels, meter)
    begin = version * shard.admission.per_lane
    with envs.starting(config.train.env):
        lanes = {i: TrainingLane(shard, lane, begin) for i, lane in shard.training_lanes().items()}
        evaluation = EvaluationLanes(shard, shard.evaluation_lanes(), films)
        first = next(iter(lanes.values()))
        first.draw_once()
    if rank == 0 and not shard.generation:
        shard.name_renderer(first.lane)
    if shard.generation:  # this worker replaces one that died
        for lane in lanes.values():
            lane.skip_finished_trajectories()
    meter.ready()

    while True:
        # Begin whatever a new version admits.
        for lane in shard.parked_before_this_version():
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


class TrainingLane:
    """One lane, which plays its trajectories one after the other.

    parked ──admitted──► begin ──► ACT ──► advance ──► ACT ──► … row T ──► the next one begins
                                                                  └─ VALUE ──► finished"""

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

    def draw_once(self) -> None:
        """Begins the first episodes for a picture that nobody keeps: a worker that cannot draw is
        never ready, and so ends the run at once."""
        lane = self.lane
        rows = list(range(len(lane.envs)))
        lane.reset(rows, self.tasks_of(self.trajectory), self.seeds_of(rows, self.trajectory, 0))
        lane.observe()
        lane.stop(rows)

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
        elif record.kind == VALUE:  # of row T; the lane may have moved on to the next trajectory
            slots = slice(record.slot, record.slot + len(self.lane.envs))
            trajectory = self.shard.arrays["trajectory"].item(record.slot)
            self.shard.finish(slots, trajectory, self.shard.segment)
            if trajectory == self.trajectory:  # the lane has waited for this value alone
                self.move_to(trajectory + 1)
                self.begin_or_park()

    def begin_or_park(self) -> bool:
        """Moves into the next slots if admission allows, else waits for the next version. Returns
        whether it has begun."""
        shard = self.shard
        if not shard.admission.admits(self.trajectory, shard.plane.version):
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
        for name in ("success", "terminated", "truncated"):
            shard.arrays[name][self.slots] = False
        shard.label(self.lane, self.slots, self.trajectory)
        shard.request(self.lane, self.slots, ACT, 0)
        return True

    def advance(self) -> None:
        """Steps the simulator through the actions of row t, and writes what happened."""
        shard = self.shard
        lane = self.lane
        t = self.t
        slots = self.slots
        with shard.meter.work("step"):
            plans = shard.planned_actions(lane, slots, t)
            outcome = lane.play(plans)
        shard.meter.count("env_steps", outcome.steps)
        if not all(map(math.isfinite, outcome.reward)):
            raise FloatingPointError(f"a reward of {lane.describe()} is {outcome.reward}")
        # One number takes numpy a third of the time of a slice, and most lanes are one env.
        for slot, reward in enumerate(outcome.reward, slots.start):
            shard.arrays["collected"][slot] += 1
            shard.arrays["reward"][slot, t] = reward
        self.ended = outcome.ended()
        if self.ended:
            self.write_ends(outcome)
        if shard.plays_episodes:
            self.end_episodes()
        elif shard.config.algorithm.bootstrap_truncated and any(outcome.late):
            # The value of the last observation is wanted; `go_on` then overwrites its row.
            shard.observe(lane, slots, t + 1)
            shard.request(lane, slots, FINAL, t + 1)
        else:
            self.go_on()

    def write_ends(self, outcome: Outcome) -> None:
        """Writes how episodes ended. All other rows say that none did, since `begin_or_park`."""
        arrays = self.shard.arrays
        arrays["success"][self.slots, self.t] = outcome.won
        arrays["terminated"][self.slots, self.t] = np.logical_or(outcome.won, outcome.failed)
        arrays["truncated"][self.slots, self.t] = outcome.late
        self.shard.meter.count("episodes", len(self.ended))
        self.shard.meter.count("successes", sum(outcome.won))

    def end_episodes(self) -> None:
        """Ends the chunk step of a lane whose trajectories are one episode each.

        An env whose episode has ended goes on stepping, to no effect, until all of the lane's have
        ended: they step together. Then the trajectories are complete."""
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
        if shard.admission.admits(self.trajectory + 1, shard.plane.version):
            self.move_to(self.trajectory + 1)
            self.begin_or_park()
        shard.request(self.lane, complete, VALUE, shard.segment)

    def rows_that_need_an_episode(self, before: slice | None) -> list[int]:
        """All at the very beginning and where trajectories are episodes; else those whose task
        changes."""
        if before is None or self.shard.plays_episodes:
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
        """Begins episodes. A seed is made of where its episode begins, so a run that is resumed or
        timed differently meets the same ones (PPO: unless this worker replaces another)."""
        tasks = self.tasks_of(trajectory)
        seeds = self.seeds_of(rows, trajectory, t)
        with self.shard.meter.work("reset"):
            self.lane.reset(rows, [tasks[row] for row in rows], seeds)

    def seeds_of(self, rows: list[int], trajectory: int, t: int) -> list[int]:
        name = self.shard.trajectories.episode_seed
        world = self.shard.admission.world
        generation = self.shard.generation
        return [name(world(self.lane.envs[row]), trajectory, t, generation) for row in rows]
