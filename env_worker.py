"""Steps a shard of lanes. Each lane runs on its own: while one waits for an action, the others
step.

    observe → write row t of the slots → request → (rollout worker writes actions) → step C times →
    row t + 1 …

A lane is one env or, of a vectorised simulator, N envs that step together; each env has a slot of
its own, and those of a lane lie side by side, so that one record asks for the whole lane. Where the
simulator and the slots are on a GPU, pictures stay there.

A trajectory is a fixed number of chunk steps with auto-reset inside, so that success never changes
when it ends; for GRPO it is one episode, which may end early, because whole groups are trained
whatever their outcomes. Frames are rendered only where the policy will see them, once per chunk.
Evaluation lanes do the same on seeds never trained on, in slots of their own; nobody waits for them
before the run ends.

Left out: moving lanes between workers. Paper: RL-VLA³, Rollout Async.
"""

import math
import time
from collections import deque
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

import envs
import metrics
import models
from channel import (
    ACT,
    DONE,
    EVAL,
    FINAL,
    LAST,
    OBSERVED,
    RESTART,
    VALUE,
    VERSION,
    Channels,
    Record,
    synchronize,
)
from config import Config
from models.checkpoint import Header
from scheduler import Admission

# where lanes are usually stepped more quickly than this, requests of one after the other are sent
# together
GATHER_S = 1e-3
EVAL_SEEDS = (
    500_000  # first of the evaluation seeds; training draws from 2³⁰ up, demonstrations from 10⁷ up
)

Outcome = tuple[
    list[float], list[bool], list[bool]
]  # reward, terminated, truncated, of every env of a lane


class Single:
    """One env as a lane of one."""

    def __init__(self, env):
        self.env = env

    @property
    def prompt(self) -> str | None:
        """Of the running episode, where they differ within a task (RoboCasa)."""
        return getattr(self.env, "prompt", None)

    def reset(self, rows: list[int], task: int, seeds: list[int]) -> None:
        self.env.reset(task, seeds[0])

    def observe(self) -> tuple[np.ndarray, np.ndarray]:
        """Pictures [1, V, H, W, 3] and states [1, S]."""
        picture, state = self.env.observe()
        return picture[None], state[None]

    def play(self, plans: list[np.ndarray], steps: list[int], horizon: int) -> Outcome:
        """Steps through the one plan [C, A] until the episode ends. steps: control steps into the
        episode, counted on.
        """
        reward = 0.0
        taken = steps[0]
        for action in plans[0]:
            r, success = self.env.step(action)
            reward = reward + r
            taken = taken + 1
            if success or taken >= horizon:
                break
        steps[0] = taken
        return [float(reward)], [bool(success)], [taken >= horizon and not success]


class Vectorised:
    """The envs of a vectorised simulator as a lane."""

    prompt = None

    def __init__(self, sims, device: str, keep: bool):
        """keep: whether pictures that are on a GPU stay there; else the model's `preparation` takes
        them from the host.
        """
        self.sims = sims
        self.device = device
        self.keep = keep
        self.reset = sims.reset

    def observe(self) -> tuple[np.ndarray | Tensor, np.ndarray]:
        """Pictures [N, V, H, W, 3], a tensor where they are on a GPU, and states [N, S]."""
        pictures, states = self.sims.observe()
        return pictures if self.keep else pictures.cpu().numpy(), states.cpu().numpy()

    def play(self, plans: list[np.ndarray], steps: list[int], horizon: int) -> Outcome:
        """Steps through N plans [C, A] with all envs; those whose episode has ended, now or before
        (`Lane.steps`), go on with the others, to no effect.
        """
        actions = torch.from_numpy(np.array(plans)).to(self.device)
        taken = torch.tensor(steps, device=self.device)
        reward = torch.zeros(len(plans), device=self.device)
        begun = alive = taken < horizon
        won = torch.zeros_like(alive)
        for c in range(actions.shape[1]):
            r, success = self.sims.step(actions[:, c])
            reward = torch.where(alive, reward + r, reward)
            taken = taken + alive
            won = won | alive & success
            alive = alive & ~success & (taken < horizon)
        steps[:] = taken.tolist()
        return reward.tolist(), won.tolist(), (begun & ~alive & ~won).tolist()


def ended_rows(won: list[bool], late: list[bool]) -> list[int]:
    """The envs of a lane whose episodes have just ended."""
    return [row for row in range(len(won)) if won[row] or late[row]]


@dataclass
class Lane:
    index: int
    sim: Single | Vectorised
    envs: range  # their numbers; of evaluation those after all others
    slots: slice | None = None  # where they write; None before the first trajectory
    trajectory: int = 0  # j
    t: int = 0  # chunk steps into the trajectory
    states: np.ndarray | None = None  # [N, S] as last observed
    ended: list[int] = field(
        default_factory=list
    )  # rows whose episodes have just ended, while their last observations are valued
    steps: list[int] = field(
        init=False
    )  # [N] control steps into the episodes; the time limit where one is over
    tasks: list[int] = field(init=False)  # [N]
    episodes: list[int] = field(init=False)  # [N] of the running round of evaluation

    def __post_init__(self):
        self.steps = [0] * len(self.envs)
        self.tasks = [-1] * len(self.envs)
        self.episodes = [0] * len(self.envs)

    def moved_to(self, slot: int) -> slice | None:
        """Puts the lane into the slots from this one on. Returns those it was in."""
        before = self.slots
        self.slots = slice(slot, slot + len(self.envs))
        return before


def episode_seed(seed: int, env: int, trajectory: int, t: int, generation: int = 0) -> int:
    """Names an episode by where it starts, so a resumed or differently timed run meets the same
    ones.

    generation: of the worker; a replaced one plays other episodes, or a fault that depends on the
    seed would come again.
    """
    # The envs of a group, which share their initial states (GRPO), give the first one's number in
    # place of their own.
    where = [seed, env, trajectory, t] + ([generation] if generation else [])
    return 2**30 + int(np.random.SeedSequence(where).generate_state(1)[0] >> 2)


def take_over(rank: int, generation: int, channels: Channels, meter: metrics.Meter) -> set[int]:
    """Tells everyone that this worker replaces a dead one; from then on whatever comes is meant for
    this one.

    Pipes are first in, first out. A rollout worker drops what the dead one had asked and echoes the
    word; what it had answered lies before that echo, and is thrown away here. An actor echoes once
    it has taken in all that the dead one had finished, which may last (it may be waiting for other
    ranks that wait for us), so that is not waited for: returns the peers yet to answer.
    """
    peers = (*channels.requests, *channels.finished)
    for peer, queue in enumerate(peers):
        queue.put([Record(peer, generation, RESTART, rank)])
    missing = set(range(len(peers)))
    while min(missing, default=len(peers)) < len(channels.requests):
        with meter.wait("admission"):
            records = channels.replies[rank].get(1.0)
        missing -= {
            record.slot for record in records if record.kind == RESTART and record.t == generation
        }
    return missing


def run(
    rank: int,
    config: Config,
    header: Header,
    device: str,
    channels: Channels,
    version: int,
    meter: metrics.Meter,
) -> None:
    """The worker. `header` is the model's; `version` is the one training starts or resumes from.

    One that replaces a dead worker plays each of its lanes on from the start of the first
    trajectory that no actor has received.
    """
    pool = channels.pool
    replies = channels.replies[rank]
    plane = channels.plane
    replies.close_writer()
    module = envs.load(config.train.env)
    spec = module.spec(config.train.tasks, config.env.image_size)
    admission = Admission.of(config)
    generation = int(meter.counters.get(meter.row, "restarts"))
    grouped = config.train.algorithm == "grpo"  # then a trajectory is one episode
    segment = pool["actions"].shape[1]  # T
    preparation = models.preparation(config.train.model, header, str(config.train.tokenizer or ""))
    actions, reward, terminated, truncated, collected = (
        pool.arrays[n] for n in ("actions", "reward", "terminated", "truncated", "collected")
    )
    seen = {name: pool.arrays.get(name, pool[name]) for name in pool.spec if name in OBSERVED}
    labels = {name: pool.arrays[name] for name in ("lane", "trajectory", "task", "asked")}
    on_gpu = (
        pool["image"].is_cuda
    )  # then they are of the size and kind that the model wants: `train.prepare` has seen to that
    blank = np.broadcast_to(
        np.uint8(0), (spec.views, spec.image_size, spec.image_size, 3)
    )  # for a picture that is not here
    outbox: dict[int, list[Record]] = {}  # per rollout worker

    def observe(lane: Lane, row: int) -> None:
        with meter.work("render"):
            pictures, lane.states = lane.sim.observe()
            if on_gpu:
                pool["image"][lane.slots, row] = pictures
                synchronize(pool.device)  # before anybody is told that they are there
        for i, slot in enumerate(range(lane.slots.start, lane.slots.stop)):
            task = lane.tasks[i]
            state = lane.states[i]
            if not all(np.isfinite(state).tolist()):  # a third of the time that its `all()` takes
                raise FloatingPointError(
                    f"the state of task {spec.tasks[task]!r} is not a number: {state}"
                )
            prompt = lane.sim.prompt or spec.prompts[task]
            for name, value in preparation.observe(
                blank if on_gpu else pictures[i], state, prompt
            ).items():
                if not (on_gpu and name == "image"):
                    seen[name][slot, row] = value

    def request(lane: Lane, slot: int, kind: int, row: int) -> None:
        """Asks for the whole lane, by its first slot; with DONE for nothing: whoever waits for
        every lane is not to wait for it.
        """
        labels["asked"][slot] = time.monotonic()
        outbox.setdefault(lane.index % len(channels.requests), []).append(
            Record(slot, row, kind, rank)
        )

    def label(lane: Lane, trajectories: int | list[int]) -> None:
        """Writes into the lane's slots whose they are."""
        labels["lane"][lane.slots] = lane.envs
        labels["trajectory"][lane.slots] = trajectories
        labels["task"][lane.slots] = lane.tasks

    def reset(lane: Lane, rows: list[int], tasks: list[int], seeds: list[int]) -> None:
        """Begins an episode in some envs of a lane; those of one task together."""
        for task in dict.fromkeys(tasks):
            chosen = [i for i, other in enumerate(tasks) if other == task]
            with meter.work("reset"):
                lane.sim.reset([rows[i] for i in chosen], task, [seeds[i] for i in chosen])
        for row, task in zip(rows, tasks, strict=True):
            lane.tasks[row] = task
            lane.steps[row] = 0

    def tasks_of(lane: Lane, trajectory: int) -> list[int]:
        return [admission.task(env, trajectory, len(spec.tasks)) for env in lane.envs]

    def begin_episodes(lane: Lane, rows: list[int], trajectory: int, t: int) -> None:
        """Those that begin in row t of a trajectory, which names them as a resumed run would."""
        tasks = tasks_of(lane, trajectory)
        # The envs of a group meet the same initial state, also when one of them is played again by
        # a worker's successor.
        names = [env - env % admission.group for env in (lane.envs[row] for row in rows)]
        seeds = [
            episode_seed(config.train.seed, name, trajectory, t, 0 if grouped else generation)
            for name in names
        ]
        reset(lane, rows, [tasks[row] for row in rows], seeds)

    def finish(slot: int, steps: int) -> None:
        """The trajectories of a lane, of so many chunk steps each, are complete."""
        channels.finished[admission.owner(slot, len(channels.finished))].put(
            [Record(slot, steps, DONE, rank)]
        )

    def park(lane: Lane) -> None:
        """The lane waits for its version. A rollout worker that waits for every lane is not to wait
        for this one: PPO's last VALUE has told it that the trajectory is over, GRPO says so here
        (once more, where a dead worker may not have come to it).
        """
        parked.append(lane)
        last = admission.slot(lane.envs[0], lane.trajectory - 1)
        if grouped and lane.trajectory > begin and pool["trajectory"][last] == lane.trajectory - 1:
            request(lane, last, DONE, 0)

    def find(lane: Lane) -> bool:
        """Moves a lane of a dead worker on to its first trajectory that no actor has received, once
        that is known.

        An actor that is yet to answer may wait, in the sum over ranks, for the very trajectory that
        this lane owes another one; then it has received all earlier ones of the lane, and the marks
        tell so.
        """
        while (
            pool["received"][slot := admission.slot(lane.envs[0], lane.trajectory)]
            > lane.trajectory
        ):
            lane.trajectory += 1
        known = (
            len(channels.requests) + admission.owner(slot, len(channels.finished)) not in missing
        )
        return known or admission.batch_of(lane.trajectory) >= admission.batches

    def begin_trajectory(lane: Lane) -> bool:
        """Moves a lane into its next slots when admission allows. The observation that ended the
        last trajectory begins this one, unless the task is another.
        """
        if not admission.admits(lane.trajectory, plane.version):
            return False
        last = lane.moved_to(admission.slot(lane.envs[0], lane.trajectory))
        lane.t = 0
        new = [
            row
            for row, task in enumerate(tasks_of(lane, lane.trajectory))
            if last is None or grouped or task != lane.tasks[row]
        ]
        if new:
            begin_episodes(lane, new, lane.trajectory, 0)
            observe(lane, 0)
        else:
            for values in seen.values():
                values[lane.slots, 0] = values[last, segment]
            if on_gpu:
                synchronize(pool.device)  # before anybody is told that they are there
        label(lane, lane.trajectory)
        request(lane, lane.slots.start, ACT, 0)
        return True

    def plans(lane: Lane, row: int) -> list[np.ndarray]:
        """What each simulator is to execute [C, A]."""
        asked = actions[
            lane.slots, row
        ].copy()  # a simulator that writes into what it is given must not change what is trained on
        return [preparation.actions(a, s) for a, s in zip(asked, lane.states, strict=True)]

    def advance(lane: Lane) -> None:
        """Actions for row t have come: step, write what happened."""
        t = lane.t
        slots = lane.slots
        with meter.work("step"):
            before = sum(lane.steps)
            rewards, won, late = lane.sim.play(plans(lane, t), lane.steps, spec.horizon)
        meter.count("env_steps", sum(lane.steps) - before)
        collected[slots] += 1
        for row, value in enumerate(rewards):
            if not math.isfinite(value):
                raise FloatingPointError(
                    f"the reward of task {spec.tasks[lane.tasks[row]]!r} is {value}"
                )
        reward[slots, t] = rewards
        terminated[slots, t] = won
        truncated[slots, t] = late
        ended = ended_rows(won, late)
        if ended:
            meter.count("episodes", len(ended))
            meter.count("successes", sum(won))
        for (
            row
        ) in ended:  # until another begins: those of a group play on, to no effect, with their lane
            lane.steps[row] = spec.horizon
        if grouped and (terminated[slots, : t + 1] | truncated[slots, : t + 1]).any(1).all():
            finish(slots.start, t + 1)
            lane.trajectory += 1
            if not begin_trajectory(lane):
                park(lane)
            return
        lane.ended = [] if grouped else ended
        if config.algorithm.bootstrap_truncated and any(late):
            observe(lane, t + 1)  # for its value alone: `go_on` overwrites the row
            request(lane, slots.start, FINAL, t + 1)
        else:
            go_on(lane)

    def go_on(lane: Lane) -> None:
        """The step is complete: begin new episodes where they ended, observe, ask again."""
        slots = lane.slots
        after = lane.t + 1
        if lane.ended:
            begin_episodes(
                lane,
                lane.ended,
                *((lane.trajectory, after) if after < segment else (lane.trajectory + 1, 0)),
            )
        lane.t = after
        observe(lane, lane.t)
        if lane.t < segment:
            request(lane, slots.start, ACT, lane.t)
            return
        # The trajectory ends with the value of row T. If the next may start, its first request
        # takes that one along: the lane waits for one inference, not two.
        lane.trajectory += 1
        if begin_trajectory(lane):
            request(lane, slots.start, LAST, segment)
        else:
            request(lane, slots.start, VALUE, segment)

    # ---- evaluation: episode e runs on evaluation env e % eval_envs, in that env's own slot,
    # always in row 0
    def go_on_evaluating(lane: Lane, rows: list[int]) -> None:
        """Begins what is left of this round in envs that have nothing to play (a dead worker may
        have played some), and asks.
        """
        for row in rows:
            while lane.episodes[row] < config.env.eval_episodes and (
                meter.counters.get(meter.row, f"outcome_{lane.episodes[row]}") >= 2 * eval_round
            ):
                lane.episodes[row] += config.env.eval_envs
        new = [row for row in rows if lane.episodes[row] < config.env.eval_episodes]
        lane.t = 0 if len(new) == len(lane.envs) else lane.t + 1
        episodes = [lane.episodes[row] for row in new]
        reset(
            lane,
            new,
            [episode % len(spec.tasks) for episode in episodes],
            [EVAL_SEEDS + episode for episode in episodes],
        )
        if min(lane.episodes) < config.env.eval_episodes:
            label(lane, lane.episodes)
            observe(lane, 0)
            request(lane, lane.slots.start, EVAL, lane.t)

    def advance_evaluation(lane: Lane) -> None:
        with meter.work("step"):
            _, won, late = lane.sim.play(plans(lane, 0), lane.steps, spec.horizon)
        ended = [
            row for row in ended_rows(won, late) if lane.episodes[row] < config.env.eval_episodes
        ]
        for row in ended:
            meter.set(f"outcome_{lane.episodes[row]}", 2 * eval_round + int(won[row]))
        go_on_evaluating(lane, ended)

    if config.env.lanes and device != "cpu":
        torch.cuda.set_device(device)

    def make(count: int) -> Single | Vectorised:
        if config.env.lanes:
            return Vectorised(
                module.Envs(spec.tasks, config.env.image_size, count, device), device, on_gpu
            )
        return Single(
            envs.maker(config.train.env, config.env.render_quality)(
                spec.tasks, config.env.image_size
            )
        )

    width = config.env.width
    eval_width = config.env.eval_width
    begin = version * admission.per_lane
    lanes = {}
    evaluators = {}
    for index in range(rank, config.env.envs // width, config.env.env_workers):
        lanes[index] = Lane(
            index, make(width), range(index * width, (index + 1) * width), trajectory=begin
        )
    for index in range(
        rank,
        config.env.eval_envs // eval_width if config.env.evaluates else 0,
        config.env.env_workers,
    ):
        first = config.env.envs + index * eval_width
        evaluators[index] = Lane(index, make(eval_width), range(first, first + eval_width))
        evaluators[index].moved_to(admission.slots + index * eval_width)
    eval_round = 0
    asked_round = meter.counters.table[:1, meter.counters.index["eval_round"]]
    # records to be looked at; when the outbox was last emptied; seconds of a chunk of late
    ready = deque()
    sent = 0.0
    usual = 1.0
    lost = (
        list(lanes.values()) if generation else []
    )  # lanes of which it is not known yet where they go on
    parked = [] if generation else list(lanes.values())
    meter.ready()
    missing = take_over(rank, generation, channels, meter) if generation else set()
    while True:
        for lane in [lane for lane in lost if find(lane)]:
            lost.remove(lane)
            park(lane)
        # Whatever the version allows to start, starts now.
        parked = [lane for lane in parked if not begin_trajectory(lane)]
        if eval_round < asked_round[0]:
            eval_round = int(asked_round[0])
            for lane in evaluators.values():
                lane.episodes = [env - config.env.envs for env in lane.envs]
                go_on_evaluating(lane, list(range(eval_width)))
        if not ready or usual > GATHER_S or time.monotonic() - sent > GATHER_S:
            for worker, records in outbox.items():
                channels.requests[worker].put(records)
            outbox.clear()
            sent = time.monotonic()

        if not ready:
            with meter.wait("admission" if len(parked) + len(lost) == len(lanes) else "action"):
                ready.extend(replies.get(1.0))
        if not ready:
            continue
        record = ready.popleft()
        if record.kind == VERSION:
            continue
        if record.kind == RESTART:
            missing -= {record.slot} if record.t == generation else set()
            continue
        if record.kind == EVAL:
            advance_evaluation(evaluators[(record.slot - admission.slots) // eval_width])
            continue
        lane = lanes[int(labels["lane"][record.slot]) // width]
        if record.kind == ACT:
            start = time.monotonic()
            advance(lane)
            seconds = time.monotonic() - start
            usual = 0.9 * usual + 0.1 * seconds
            meter.count("chunks", 1)
            meter.count("chunk_s", seconds)
            meter.count("chunk_s_square", seconds**2)
        elif record.kind == FINAL:
            go_on(lane)
        else:  # the value of row T has come: the trajectories are complete
            finish(record.slot, segment)
            if record.kind == VALUE:
                parked.append(lane)
        meter.set("time", time.monotonic())
