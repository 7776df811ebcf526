"""Steps a shard of lanes. Each lane runs on its own: while one waits for an action, the others step.

    observe → write row t of the slot → request → (rollout worker writes actions) → step C times → row t + 1 …

A trajectory is a fixed number of chunk steps with auto-reset inside, so that success never changes when it ends; for GRPO it is one
episode, which may end early, because whole groups are trained whatever their outcomes. Frames are rendered only where the policy
will see them, once per chunk.
Evaluation lanes do the same on seeds never trained on, in slots of their own; nobody waits for them before the run ends.

Left out: GPU-vectorised simulators (one lane = one env). Paper: RL-VLA³, Rollout Async.
"""

import time
from dataclasses import dataclass

import numpy as np

import envs
import metrics
import models
from channel import ACT, DONE, EVAL, LAST, OBSERVED, RESTART, VALUE, VERSION, Channels, Record
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


def episode_seed(seed: int, lane: int, trajectory: int, t: int, generation: int = 0) -> int:
    """Names an episode by where it starts, so a resumed or differently timed run meets the same ones.

    generation: of the worker; a replaced one plays other episodes, or a fault that depends on the seed would come again.
    """
    # Lanes of a group that is to share initial states (GRPO) would give the group's number in place of the lane's.
    where = [seed, lane, trajectory, t] + ([generation] if generation else [])
    return 2**30 + int(np.random.SeedSequence(where).generate_state(1)[0] >> 2)


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


def take_over(rank: int, generation: int, channels: Channels, meter: metrics.Meter) -> set[int]:
    """Tells everyone that this worker replaces a dead one; from then on whatever comes is meant for this one.

    Pipes are first in, first out. A rollout worker drops what the dead one had asked and echoes the word; what it had answered
    lies before that echo, and is thrown away here. An actor echoes once it has taken in all that the dead one had finished, which
    may last (it may be waiting for other ranks that wait for us), so that is not waited for: returns the peers yet to answer.
    """
    peers = (*channels.requests, *channels.finished)
    for peer, queue in enumerate(peers):
        queue.put([Record(peer, generation, RESTART, rank)])
    missing = set(range(len(peers)))
    while min(missing, default=len(peers)) < len(channels.requests):
        with meter.wait("admission"):
            records = channels.replies[rank].get(1.0)
        missing -= {record.slot for record in records if record.kind == RESTART and record.t == generation}
    return missing


def run(rank: int, config: Config, header: Header, channels: Channels, version: int, meter: metrics.Meter) -> None:
    """The worker. `header` is the model's; `version` is the one training starts or resumes from.

    One that replaces a dead worker plays each of its lanes on from the start of the first trajectory that no actor has received.
    """
    pool, replies, plane = channels.pool, channels.replies[rank], channels.plane
    replies.close_writer()
    spec = envs.load(config.train.env).spec(config.train.tasks, config.env.image_size)
    admission, generation = Admission.of(config), int(meter.counters.get(meter.row, "restarts"))
    grouped = config.train.algorithm == "grpo"  # then a trajectory is one episode
    segment = pool["actions"].shape[1]  # T
    preparation = models.files(config.train.model).preparation(header, str(config.train.tokenizer or ""))
    actions, seen = pool["actions"].numpy(), {name: pool[name].numpy() for name in pool.spec if name in OBSERVED}
    reward, terminated, truncated = (pool[n].numpy() for n in ("reward", "terminated", "truncated"))
    outbox: dict[int, list[Record]] = {}  # per rollout worker; sent together once per turn

    def observe(lane: Lane, row: int) -> None:
        with meter.work("render"):
            picture, lane.state = lane.env.observe()
        if not np.isfinite(lane.state).all():
            raise FloatingPointError(f"the state of task {spec.tasks[lane.task]!r} is not a number: {lane.state}")
        for name, value in preparation.observe(picture, lane.state, spec.prompts[lane.task]).items():
            seen[name][lane.slot, row] = value

    def request(lane: Lane, slot: int, kind: int, row: int) -> None:
        pool["asked"][slot] = time.monotonic()
        outbox.setdefault(lane.index % len(channels.requests), []).append(Record(slot, row, kind, rank))

    def label(lane: Lane) -> None:
        """Writes into the lane's slot whose it is."""
        for name, value in (("lane", lane.index), ("trajectory", lane.trajectory), ("task", lane.task)):
            pool[name][lane.slot] = value

    def task_of(lane: int, trajectory: int) -> int:
        return admission.task(lane, trajectory, len(spec.tasks))

    def reset(lane: Lane, task: int, seed: int) -> None:
        with meter.work("reset"):
            lane.env.reset(task, seed)
        lane.task, lane.step = task, 0

    def begin_episode(lane: Lane, trajectory: int, t: int) -> None:
        """The episode that begins in row t of a trajectory, which names it as a resumed run would."""
        # The lanes of a group meet the same initial state, also when one of them is played again by a worker's successor.
        first = lane.index - lane.index % admission.group
        seed = episode_seed(config.train.seed, first, trajectory, t, 0 if grouped else generation)
        reset(lane, task_of(lane.index, trajectory), seed)

    def owner(slot: int) -> int:
        """The actor rank that a trajectory goes to."""
        return admission.rank(slot, len(channels.finished))

    def finish(slot: int, steps: int) -> None:
        """A trajectory of so many chunk steps is complete."""
        channels.finished[owner(slot)].put([Record(slot, 0, DONE, rank)])
        meter.count("delivered", steps)

    def find(lane: Lane) -> bool:
        """Moves a lane of a dead worker on to its first trajectory that no actor has received, once that is known.

        An actor that is yet to answer may wait, in the sum over ranks, for the very trajectory that this lane owes another one;
        then it has received all earlier ones of the lane, and the marks tell so.
        """
        while pool["received"][admission.slot(lane.index, lane.trajectory)] > lane.trajectory:
            lane.trajectory += 1
        known = len(channels.requests) + owner(admission.slot(lane.index, lane.trajectory)) not in missing
        return known or admission.batch_of(lane.trajectory) >= admission.batches

    def begin_trajectory(lane: Lane) -> bool:
        """Moves a lane into its next slot when admission allows; the observation that ended the last one begins it, unless the
        task is another."""
        if not admission.admits(lane.trajectory, plane.version):
            return False
        last, lane.slot, lane.t = lane.slot, admission.slot(lane.index, lane.trajectory), 0
        if last < 0 or grouped or lane.task != task_of(lane.index, lane.trajectory):
            begin_episode(lane, lane.trajectory, 0)
            observe(lane, 0)
        else:
            for field in seen.values():
                field[lane.slot, 0] = field[last, segment]
        label(lane)
        request(lane, lane.slot, ACT, 0)
        return True

    def advance(lane: Lane) -> None:
        """Actions for row t have come: step, write what happened, observe, ask again."""
        t, slot = lane.t, lane.slot
        with meter.work("step"):
            before, plan = lane.step, preparation.actions(actions[slot, t], lane.state)
            reward[slot, t], terminated[slot, t], truncated[slot, t] = run_chunk(lane, plan, spec.horizon)
        meter.count("env_steps", lane.step - before), meter.count("collected", 1)
        if not np.isfinite(reward[slot, t]):
            raise FloatingPointError(f"the reward of task {spec.tasks[lane.task]!r} is {reward[slot, t]}")
        if terminated[slot, t] or truncated[slot, t]:
            meter.count("episodes", 1), meter.count("successes", int(terminated[slot, t]))
            if grouped:
                finish(slot, t + 1)
                lane.trajectory += 1
                if not begin_trajectory(lane):
                    parked.append(lane)
                return
            begin_episode(lane, *((lane.trajectory, t + 1) if t + 1 < segment else (lane.trajectory + 1, 0)))
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
        """Plays the lane's next episode of this round, if one is left: a dead worker may have played some of them."""
        while (episode := lane.trajectory) < config.env.eval_episodes:
            if meter.counters.get(meter.row, f"outcome_{episode}") < 2 * eval_round:
                reset(lane, episode % len(spec.tasks), EVAL_SEEDS + episode)
                lane.t = 0
                label(lane)
                observe(lane, 0)
                request(lane, lane.slot, EVAL, 0)
                return
            lane.trajectory += config.env.eval_envs

    def advance_evaluation(lane: Lane) -> None:
        with meter.work("step"):
            plan = preparation.actions(actions[lane.slot, 0], lane.state)
            _, success, timeout = run_chunk(lane, plan, spec.horizon)
        if success or timeout:
            meter.set(f"outcome_{lane.trajectory}", 2 * eval_round + int(success))
            begin_evaluation(lane)
        else:
            lane.t += 1
            observe(lane, 0)
            request(lane, lane.slot, EVAL, lane.t)

    make = envs.maker(config.train.env, config.env.render_quality)
    workers, lanes, evaluators = config.env.env_workers, {}, {}
    for index in range(rank, config.env.envs, workers):
        lanes[index] = Lane(index, make(spec.tasks, config.env.image_size), trajectory=version * admission.per_lane)
    for i in range(rank, config.env.eval_envs if config.env.evaluates else 0, workers):
        slot = admission.slots + i
        evaluators[slot] = Lane(config.env.envs + i, make(spec.tasks, config.env.image_size), slot=slot)
    eval_round, asked_round = 0, meter.counters.table[:1, meter.counters.index["eval_round"]]
    ready: list[Record] = []
    lost = list(lanes.values()) if generation else []  # lanes of which it is not known yet where they go on
    parked = [] if generation else list(lanes.values())
    before, kept = meter.counters.get(meter.row, "collected"), 0  # chunk steps of earlier generations, and those that are received
    meter.ready()
    missing = take_over(rank, generation, channels, meter) if generation else set()
    while True:
        for lane in [lane for lane in lost if find(lane)]:
            lost.remove(lane), parked.append(lane)
            kept += (lane.trajectory - version * admission.per_lane) * segment
            if not lost:
                meter.set("discarded", before - (meter.counters.get(meter.row, "delivered") if grouped else kept))
        # Whatever the version allows to start, starts now.
        parked = [lane for lane in parked if not begin_trajectory(lane)]
        if eval_round < asked_round[0]:
            eval_round = int(asked_round[0])
            for slot, lane in evaluators.items():
                lane.trajectory = slot - admission.slots
                begin_evaluation(lane)
        for worker, records in outbox.items():
            channels.requests[worker].put(records)
        outbox.clear()

        cause = "admission" if len(parked) + len(lost) == len(lanes) else "action"
        with meter.wait(cause) if not ready else meter.nothing:
            ready += replies.get(0.0 if ready else 1.0)
        if not ready:
            continue
        record = ready.pop(0)
        if record.kind == VERSION:
            continue
        if record.kind == RESTART:
            missing -= {record.slot} if record.t == generation else set()
            continue
        if record.kind == EVAL:
            advance_evaluation(evaluators[record.slot])
            continue
        lane = lanes[int(pool["lane"][record.slot])]
        if record.kind == ACT:
            advance(lane)
        else:  # the value of row T has come: the trajectory is complete
            finish(record.slot, segment)
            if record.kind == VALUE:
                parked.append(lane)
        meter.set("time", time.monotonic())
