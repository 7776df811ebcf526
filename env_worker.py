"""Steps a shard of lanes. Each lane runs on its own: while one waits for an action, the others step.

    observe → write row t of the slot → request → (rollout worker writes actions) → step C times → row t + 1 …

A trajectory is a fixed number of chunk steps with auto-reset inside, so that success never changes when it ends. Frames are
rendered only where the policy will see them, once per chunk.
Evaluation lanes do the same on seeds never trained on, in slots of their own; nobody waits for them before the run ends.

Left out: GPU-vectorised simulators (one lane = one env). Paper: RL-VLA³, Rollout Async.
"""

import math
import time
from dataclasses import dataclass

import numpy as np

import envs
import metrics
import models
from channel import ACT, DONE, EVAL, LAST, OBSERVED, VALUE, VERSION, Channels, Record
from config import Config
from models.checkpoint import Header
from scheduler import Admission

EVAL_SEEDS = 500_000  # first of the evaluation seeds; training draws from 2³⁰ up, demonstrations from 10⁷ up


@dataclass
class Lane:
    index: int
    env: object
    slot: int = -1
    state: np.ndarray | None = None  # [S] as last observed
    trajectory: int = 0  # j, or the evaluation episode
    t: int = 0  # chunk steps into the trajectory
    step: int = 0  # control steps into the episode
    task: int = 0


def episode_seed(seed: int, lane: int, trajectory: int, t: int) -> int:
    """Names an episode by where it starts, so a resumed or differently timed run meets the same ones."""
    return 2**30 + int(np.random.SeedSequence([seed, lane, trajectory, t]).generate_state(1)[0] >> 2)


def run_chunk(lane: Lane, actions: np.ndarray, horizon: int) -> tuple[float, bool, bool]:
    """Steps through actions [C, A] until the episode ends. Returns reward, terminated, truncated."""
    reward = 0.0
    for action in actions:
        r, success = lane.env.step(action)
        reward, lane.step = reward + r, lane.step + 1
        if success:
            return reward, True, False
        if lane.step >= horizon:
            return reward, False, True
    return reward, False, False


class Evaluations:
    """When to evaluate, and with what result: kept by env worker 0; the others follow its counter `eval_round`.

    A round begins when all workers have played the one before, so that rounds never mix. Every `eval_every`-th version is
    evaluated, as far as there is time, and always the last one.
    """

    def __init__(self, config: Config, tasks: int, version: int, meter: metrics.Meter):
        self.config, self.tasks, self.meter = config, tasks, meter
        self.names = [f"{what}_{k}" for what in ("episodes", "successes") for k in range(tasks)]
        self.columns = [meter.counters.index[f"eval_{name}"] for name in self.names]
        self.before = np.zeros(len(self.columns))  # counts before the running round
        self.round, self.due, self.running = 0, version, None  # running: the version being evaluated

    def begins(self, version: int) -> bool:
        """Whether a round begins now. Notes the result of the one that has just ended."""
        if self.running is not None:
            gained = self.meter.counters.table[:, self.columns].sum(axis=0) - self.before
            if gained[: self.tasks].sum() < self.config.env.eval_episodes:
                return False
            for name, value in zip(self.names, gained, strict=True):
                self.meter.set(f"result_{name}", value)
            self.meter.set("result_version", self.running)
            self.meter.set("result_round", self.round)  # last, because it says that the rest is there
            self.before, self.running = self.before + gained, None
        if version < self.due:
            return False
        last = self.config.train.iterations
        self.due = min(version + self.config.env.eval_every, last) if version < last else math.inf
        self.running, self.round = version, self.round + 1
        self.meter.set("eval_round", self.round)
        return True


def run(rank: int, config: Config, header: Header, channels: Channels, version: int, meter: metrics.Meter) -> None:
    """The worker. `header` is the model's; `version` is the one training starts or resumes from."""
    pool, replies, plane = channels.pool, channels.replies[rank], channels.plane
    replies.close_writer()
    spec = envs.load(config.train.env).spec(config.train.tasks, config.env.image_size)
    admission = Admission(config.actor.batch, config.env.envs, config.actor.max_staleness)
    segment = pool["actions"].shape[1]  # T
    preparation = models.files(config.train.model).preparation(header, str(config.train.tokenizer or ""))
    actions, seen = pool["actions"].numpy(), {name: pool[name].numpy() for name in pool.spec if name in OBSERVED}
    reward, terminated, truncated = (pool[n].numpy() for n in ("reward", "terminated", "truncated"))
    outbox: dict[int, list[Record]] = {}  # per rollout worker; sent together once per turn

    def observe(lane: Lane, row: int) -> None:
        with meter.work("render"):
            picture, lane.state = lane.env.observe()
        for name, value in preparation.observe(picture, lane.state, spec.prompts[lane.task]).items():
            seen[name][lane.slot, row] = value

    def request(lane: Lane, slot: int, kind: int, row: int) -> None:
        pool["asked"][slot] = time.monotonic()
        outbox.setdefault(lane.index % len(channels.requests), []).append(Record(slot, row, kind, rank))

    def label(lane: Lane) -> None:
        """Writes into the lane's slot whose it is."""
        for name, value in (("lane", lane.index), ("trajectory", lane.trajectory), ("task", lane.task)):
            pool[name][lane.slot] = value

    def begin_episode(lane: Lane, task: int, seed: int) -> None:
        with meter.work("reset"):
            lane.env.reset(task, seed)
        lane.task, lane.step = task, 0

    def begin_trajectory(lane: Lane) -> bool:
        """Moves a lane into its next slot when admission allows; the observation that ended the last one begins it."""
        if not admission.admits(lane.trajectory, plane.version) or plane.version >= config.train.iterations:
            return False
        last, lane.slot, lane.t = lane.slot, admission.slot(lane.index, lane.trajectory), 0
        label(lane)
        if last < 0:
            begin_episode(lane, lane.task, episode_seed(config.train.seed, lane.index, lane.trajectory, 0))
            observe(lane, 0)
        else:
            for field in seen.values():
                field[lane.slot, 0] = field[last, segment]
        request(lane, lane.slot, ACT, 0)
        return True

    def advance(lane: Lane) -> None:
        """Actions for row t have come: step, write what happened, observe, ask again."""
        t, slot = lane.t, lane.slot
        with meter.work("step"):
            before, plan = lane.step, preparation.actions(actions[slot, t], lane.state)
            reward[slot, t], terminated[slot, t], truncated[slot, t] = run_chunk(lane, plan, spec.horizon)
        meter.count("env_steps", lane.step - before)
        if terminated[slot, t] or truncated[slot, t]:
            meter.count("episodes", 1), meter.count("successes", int(terminated[slot, t]))
            begins = (lane.trajectory, t + 1) if t + 1 < segment else (lane.trajectory + 1, 0)  # as a resumed run would call it
            begin_episode(lane, lane.task, episode_seed(config.train.seed, lane.index, *begins))
        lane.t += 1
        observe(lane, lane.t)
        if lane.t < segment:
            request(lane, slot, ACT, lane.t)
            return
        # The trajectory ends with the value of row T. If the next may start, its first request takes that one along: the lane
        # waits for one inference, not two.
        lane.trajectory += 1
        if begin_trajectory(lane):
            request(lane, slot, LAST, segment)
        else:
            request(lane, slot, VALUE, segment)

    # ---- evaluation: episode i runs on lane i % eval_envs, in that lane's own slot, always in row 0
    def begin_evaluation(lane: Lane) -> None:
        begin_episode(lane, lane.trajectory % len(spec.tasks), EVAL_SEEDS + lane.trajectory)
        lane.t = 0
        label(lane)
        observe(lane, 0)
        request(lane, lane.slot, EVAL, 0)

    def advance_evaluation(lane: Lane) -> None:
        with meter.work("step"):
            plan = preparation.actions(actions[lane.slot, 0], lane.state)
            _, success, timeout = run_chunk(lane, plan, spec.horizon)
        if success or timeout:
            meter.count(f"eval_episodes_{lane.task}", 1), meter.count(f"eval_successes_{lane.task}", int(success))
            lane.trajectory += config.env.eval_envs
            if lane.trajectory < config.env.eval_episodes:
                begin_evaluation(lane)
        else:
            lane.t += 1
            observe(lane, 0)
            request(lane, lane.slot, EVAL, lane.t)

    make = envs.maker(config.train.env, config.env.render_quality)
    workers, lanes, evaluators = config.env.env_workers, {}, {}
    for index in range(rank, config.env.envs, workers):
        lane = Lane(index, make(spec.tasks, config.env.image_size), trajectory=version * admission.per_lane)
        lane.task = index % len(spec.tasks)
        lanes[index] = lane
    for i in range(rank, config.env.eval_envs if config.env.evaluates else 0, workers):
        slot = admission.slots + i
        evaluators[slot] = Lane(config.env.envs + i, make(spec.tasks, config.env.image_size), slot=slot)
    parked, rounds = list(lanes.values()), 0
    evaluations = Evaluations(config, len(spec.tasks), version, meter)
    eval_round = meter.counters.table[:, meter.counters.index["eval_round"]]
    ready: list[Record] = []
    meter.ready()
    while True:
        # Whatever the version allows to start, starts now.
        parked = [lane for lane in parked if not begin_trajectory(lane)]
        if evaluators and (evaluations.begins(plane.version) if rank == 0 else eval_round.max() > rounds):
            rounds += 1
            for slot, lane in evaluators.items():
                lane.trajectory = slot - admission.slots
                if lane.trajectory < config.env.eval_episodes:
                    begin_evaluation(lane)
        for worker, records in outbox.items():
            channels.requests[worker].put(records)
        outbox.clear()

        cause = "admission" if len(parked) == len(lanes) else "action"
        with meter.wait(cause) if not ready else meter.nothing:
            ready += replies.get(0.0 if ready else 1.0)
        if not ready:
            continue
        record = ready.pop(0)
        if record.kind == VERSION:
            continue
        if record.kind == EVAL:
            advance_evaluation(evaluators[record.slot])
            continue
        lane = lanes[int(pool["lane"][record.slot])]
        if record.kind == ACT:
            advance(lane)
        else:  # the value of row T has come: the trajectory is complete
            owner = record.slot % config.actor.batch % len(channels.finished)
            channels.finished[owner].put([Record(record.slot, 0, DONE, rank)])
            if record.kind == VALUE:
                parked.append(lane)
        meter.set("time", time.monotonic())
