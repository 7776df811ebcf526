"""Decides when to infer, what may start, and where to run: `DynamicBatcher` (eq. 1), `Admission`
and `Trajectories`, `Placement`.

Pure decisions: no process, tensor or device is touched here, so all of it is tested with a fake
clock. Left out: moving work between rollout workers (each lane always asks the same one).
"""

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from checks import flag_of
from config import MOST_WORKERS, WORKERS, Config, group_of, parse_ratio, setting
from errors import require

FIRST_WAIT_S = 0.01  # T_max where it is auto, until an inference was measured


def first_batch_max(chosen: int | str, lanes: int) -> int:
    """Returns B_max to begin with: the number chosen, "all" lanes, or with "auto" half of them."""
    return {"all": lanes, "auto": max(1, lanes // 2)}.get(chosen, chosen)


def most_samples(config: Config, lanes: int) -> int:
    """Returns the most samples of one inference of a rollout worker that so many lanes ask.
    Evaluation and last values ride along, on top of those that act."""
    chosen = config.rollout.batch_max
    acting = lanes if chosen in ("auto", "all") else min(chosen, lanes)
    return (acting + lanes) * config.env.width + config.env.eval_envs


class DynamicBatcher:
    """Lets requests wait here until  n ≥ B_max  or  w ≥ T_max  (RL-VLA³ eq. 1).

    n counts the queued requests whose lanes do nothing until they are answered. w is how long the
    oldest request has waited, from when it was sent. A request added with `counted=False`
    (evaluation, or the last value of a lane that has already gone on) rides along: it is served
    with the next batch and its wait counts, but it does not help to fill one. So with B_max = all
    lanes, lanes run in lockstep.

    Lanes that wait for new weights ask for nothing, so a batch is due at once when nobody else may
    ask: see `expect_at_most`."""

    def __init__(self, batch_max: int, wait_s: float, clock: Callable[[], float] = time.monotonic):
        self.batch_max = batch_max  # B_max, requests
        self.wait_s = wait_s  # T_max, seconds
        self.clock = clock
        self.queue: deque = deque()  # (request, counted, time queued)
        self.counted = 0
        self.most = math.inf  # lanes that may ask at present

    def follow(self, infer_s: float) -> None:
        """Moves T_max, where it is auto, towards half an inference of so many seconds: what comes
        during one joins the next batch anyway."""
        self.wait_s = 0.8 * self.wait_s + 0.2 * 0.5 * infer_s

    def keep(self, wanted: Callable[[object], bool]) -> None:
        """Forgets the requests that `wanted` is not true of: who asked is gone."""
        self.queue = deque(entry for entry in self.queue if wanted(entry[0]))
        self.counted = sum(counted for _, counted, _ in self.queue)

    def expect_at_most(self, lanes: float) -> None:
        """Says how many lanes may ask at present, queued requests included."""
        self.most = lanes

    @property
    def limit(self) -> float:
        """How many counted requests make a batch now: B_max, or all that can still come. 0 where
        nobody may ask: what rides along then has nothing to wait for."""
        return min(self.batch_max, self.most)

    def add(self, request, counted: bool = True, queued: float | None = None) -> None:
        """Queues a request.

        queued: when it was sent, where that is known; a request may have waited unread during an
        inference."""
        self.queue.append((request, counted, self.clock() if queued is None else queued))
        self.counted += counted

    def remaining(self) -> float | None:
        """Returns the seconds until the queue must be served: at most 0 when a batch is due now,
        and None when the queue is empty, so that there is nothing to wait for."""
        if not self.queue:
            return None
        if self.counted >= self.limit:
            return 0.0
        return self.wait_s - (self.clock() - self.queue[0][2])

    def take(self) -> tuple[list, float]:
        """Returns the oldest requests, at most `limit` of them counted (but at least one), and how
        many seconds the oldest has waited."""
        waited = self.clock() - self.queue[0][2]
        batch = []
        room = max(1, self.limit)
        while self.queue and (room or not self.queue[0][1]):
            request, counted, _ = self.queue.popleft()
            batch.append(request)
            room -= counted
            self.counted -= counted
        return batch, waited


def interleaved(number, whole: int, node: int, nodes: int):
    """Turns a number on one node into the number among all nodes.

    Nodes take turns by blocks of `whole` numbers, so that a lane or a group stays together. With
    whole = 2 and two nodes, numbers 0 1 2 3 of node 0 become 0 1 4 5, and those of node 1 become
    2 3 6 7. So actor ranks get the same lanes as if one node had all of them (`Admission.owner`).
    number: an int or an array; returns the same kind."""
    return (number // whole * nodes + node) * whole + number % whole


def env_numbers(config: Config) -> np.ndarray:
    """Returns the numbers that a node's envs have among those of all nodes [envs + eval_envs].

    Evaluation envs come after all training envs, here as there."""
    env, train = config.env, config.train
    playing = Admission.of(config).world(np.arange(env.envs))
    place = (env.eval_width, train.node, train.nodes)
    evaluating = env.envs * train.nodes + interleaved(np.arange(env.eval_envs), *place)
    return np.concatenate([playing, evaluating])


@dataclass(frozen=True)
class Admission:
    """Decides which batch and slot a trajectory has, and when it may start: staleness as
    back-pressure, without messages. Trajectories, batches and slots are numbered on each node;
    episodes, tasks and noise are named by the env's number among all nodes (`world`).

    An env's j-th trajectory belongs to batch b = j // k, where k = batch / envs trajectories of
    every env make a batch. So membership never depends on outcome or speed. The trajectory may
    start once version b − K is published (K = max staleness), hence started ≤ (published + K + 1) ·
    batch always holds. Its slot is a function of (b, env, j) alone: batches b and b + K + 1 share
    slots, and the later one may start only when the earlier one has been trained on. What would
    come after the last batch never starts. The envs of a lane, `width` of them, have slots side by
    side."""

    batch: int  # trajectories of a batch
    envs: int  # that play them
    max_staleness: int  # K, versions
    batches: float = math.inf  # of the whole run
    width: int = 1  # envs of a lane
    group: int = 1  # G of GRPO: so many envs in a row begin each trajectory in the same state
    node: int = 0  # number of this node
    nodes: int = 1  # how many there are

    @classmethod
    def of(cls, config: Config) -> "Admission":
        return cls(
            config.actor.batch,
            config.env.envs,
            config.actor.max_staleness,
            config.train.iterations,
            config.env.width,
            group_of(config),
            config.train.node,
            config.train.nodes,
        )

    @property
    def whole(self) -> int:
        """Envs whose trajectories go to one actor rank: those of a lane, which finish together, and
        those of a group."""
        return max(self.width, self.group)

    @property
    def per_lane(self) -> int:
        """k: trajectories of each env, and so of each lane, in a batch."""
        return self.batch // self.envs

    @property
    def slots(self) -> int:
        return (self.max_staleness + 1) * self.batch

    def batch_of(self, trajectory: int) -> int:
        return trajectory // self.per_lane

    def admitted(self, version: int) -> float:
        """Returns how many trajectories of every env may have started once `version` is out."""
        return min(version + self.max_staleness + 1, self.batches) * self.per_lane

    def admits(self, trajectory: int, version: int) -> bool:
        """Whether it may start. For an array of trajectories, an array."""
        return trajectory < self.admitted(version)

    def slots_of(self, batch: int) -> range:
        """Returns the slots of a batch's trajectories."""
        first = batch % (self.max_staleness + 1) * self.batch
        return range(first, first + self.batch)

    def slot(self, env: int, trajectory: int) -> int:
        position = trajectory % self.per_lane * self.envs + env
        return self.slots_of(self.batch_of(trajectory))[position]

    def owner(self, slot: int, ranks: int) -> int:
        """The actor rank that trains it: lanes (or groups) in turn, so that each goes to one rank.
        For an array of slots, an array."""
        return slot % self.batch // self.whole % ranks

    def world(self, number):
        """Returns the number that an env of this node, or a position of its batch, has among those
        of all nodes. For an array, an array."""
        return interleaved(number, self.whole, self.node, self.nodes)

    def minibatch_of(self, minibatches: int, ranks: int) -> np.ndarray:
        """Returns the minibatch of every position of the batch of all nodes [batch · nodes]. They
        are as even in size as whole groups, and with several ranks whole lanes, allow.

        ranks: of a node."""
        total = self.batch * self.nodes
        whole = self.whole if ranks * self.nodes > 1 else self.group
        return np.arange(total) // whole * minibatches // (total // whole)

    def task(self, env: int, trajectory: int, tasks: int) -> int:
        """Returns the task that it plays: tasks are dealt in turn to the positions of a batch, and
        on from batch to batch.

        So every batch, and the run as a whole, holds each task equally often, ± 1, however fast its
        simulators are. Where `tasks` divides the lanes of all nodes, a whole lane plays one task
        and keeps it, which saves it from building another scene. So does a group."""
        envs = self.envs * self.nodes
        lanes = envs // self.width
        unit = self.whole if self.group > 1 or lanes % tasks == 0 else 1
        return (trajectory * envs + self.world(env)) // unit % tasks


@dataclass(frozen=True)
class Trajectories:
    """Says what a trajectory is made of, and names its episodes.

    PPO: T chunk steps, with new episodes inside, so that success never changes when it ends. GRPO:
    one episode, which may end early, because whole groups are trained whatever their outcomes."""

    seed: int  # of the run
    group: int  # G of GRPO, else 1

    @classmethod
    def of(cls, config: Config) -> "Trajectories":
        return cls(config.train.seed, group_of(config))

    @property
    def are_episodes(self) -> bool:
        return self.group > 1

    def episode_seed(self, env: int, trajectory: int, t: int, generation: int = 0) -> int:
        """Names an episode by where it starts, so that a resumed or differently timed run meets the
        same ones: a number in [2³⁰, 2³¹), which neither evaluation nor demonstrations draw.

        generation: of the worker. A replaced one plays other episodes, or a fault that depends on
        the seed would come again. The envs of a group share their episodes, so there it is left out
        and the group's first env stands for all. env: its number among those of all nodes."""
        if self.are_episodes:
            env -= env % self.group
            generation = 0
        where = [self.seed, env, trajectory, t]
        if generation:
            where.append(generation)
        return 2**30 + int(np.random.SeedSequence(where).generate_state(1)[0] >> 2)


@dataclass(frozen=True)
class Placement:
    """Where every worker runs: a device for each, "cpu" or "cuda:k". Threads are torch's, each."""

    env_devices: tuple[str, ...]
    rollout_devices: tuple[str, ...]
    actor_devices: tuple[str, ...]
    rollout_threads: int
    actor_threads: int
    line: str  # the decision in words

    def workers(self) -> dict[str, int]:
        """Returns how many workers there are of each kind, by the names of the settings."""
        devices = (self.env_devices, self.rollout_devices, self.actor_devices)
        return dict(zip(WORKERS, map(len, devices), strict=True))


def divide(config: Config, simulator, gpus: int, cores: int) -> Placement:
    """Places the workers of `config` on GPUs, or without them on cores. Raises UserError.

    --env-workers counts, else what an emulated simulator says. A simulator that steps on cores has
    R env workers without GPUs. Beside GPUs it has one for each core but two per GPU, and at least
    one for each GPU that it draws on. A vectorised one has as many as --ratio gives."""
    ratio = config.train.parts
    placement = config.train.placement
    env_workers, *others = (setting(config, name) for name in WORKERS)
    most = simulator.workers(ratio, placement)
    placement, ratio, instead = nearest(placement, ratio, gpus)
    if most is None and not gpus and not simulator.vectorised:
        most = parse_ratio(ratio)[0]  # each has an env at least
    if most is None and gpus and not simulator.vectorised:
        drawing = share_gpus(ratio, placement, gpus)[0]
        most = max(len(drawing), min(cores, MOST_WORKERS) - 2 * gpus)
    if most is not None and not env_workers:
        env_workers = min(most, config.env.envs)
    placed = place(ratio, placement, gpus, cores, env_workers, *others)
    return replace(placed, line=placed.line + instead)


def nearest(placement: str, ratio: str, gpus: int) -> tuple[str, str, str]:
    """Returns the placement and the ratio that use all GPUs and come nearest to these, and what to
    say of it. Of two that are equally near, it is the one with more actors.

    One GPU is shared by all stages, and of two none is for env workers alone."""
    r, a = parse_ratio(ratio)
    if gpus == 0 or placement == "colocated" or placement == "hybrid" and r < 2:
        return placement, ratio, ""
    instead = f"; nearest to {placement} {ratio}"
    if gpus == 1:
        return "colocated", ratio, instead
    if gpus % (r + a) == 0:
        return placement, ratio, ""
    if gpus == 2:
        placement = "disaggregated"
    most = gpus - (2 if placement == "hybrid" else 1)
    actors = min(range(most, 0, -1), key=lambda count: abs(count * (r + a) - gpus * a))
    common = 1 if placement == "hybrid" else math.gcd(gpus, actors)
    return placement, f"{(gpus - actors) // common}:{actors // common}", instead


def place(ratio: str, placement: str, gpus: int, cores: int, *workers: int) -> Placement:
    """Turns R:A into devices, processes and threads. workers: as in WORKERS, 0 where derived.

    With GPUs the machine is cut into R + A parts of equal size: R for env and rollout workers, A
    for actor workers. Hybrid gives half of the R parts, rounded down, to env workers alone.
    Colocated puts everything everywhere. Without GPUs there are R env workers, one rollout worker
    and A actor workers, and torch threads are divided as R:A. Raises UserError on a contradiction.
    """
    parse_ratio(ratio)
    derive = "must be at least 1, or 0 to derive it from --ratio"
    for name, count in zip(WORKERS, workers, strict=True):
        require(count >= 0, f"{flag_of(name)} {count} {derive}")
    if gpus == 0:
        return place_on_cpu(ratio, placement, cores, *workers)

    env_workers, rollout_workers, actor_workers = workers
    env_gpus, rollout_gpus, actor_gpus = share_gpus(ratio, placement, gpus)
    given = f"--ratio {ratio}, which gives {len(actor_gpus)} GPUs to actors"
    # Where all share all GPUs, fewer actor workers leave none of them idle.
    fewer = placement == "colocated" and actor_workers < len(actor_gpus)
    agrees = fewer or actor_workers in (0, len(actor_gpus))
    require(agrees, f"--actor-workers {actor_workers} contradicts {given}")
    env = spread(env_gpus, env_workers)
    rollout = spread(rollout_gpus, rollout_workers)
    actor = spread(actor_gpus, actor_workers)
    threads = max(1, (cores - len(env)) // (len(rollout) + len(actor)))  # an env worker has one
    line = (
        f"{gpus} GPU{'s' * (gpus > 1)}: {placement} {ratio} means {len(env)} env "
        f"worker{'s' * (len(env) > 1)} on "
        f"{', '.join(dict.fromkeys(env))}; rollout on {', '.join(rollout)}; actor on "
        f"{', '.join(actor)}"
    )
    every = (f"cuda:{i}" for i in range(gpus))
    idle = [gpu for gpu in every if gpu not in (*env, *rollout, *actor)]
    line += f"; {len(idle)} idle: {', '.join(idle)}" if idle else ""
    return Placement(env, rollout, actor, threads, threads, line)


def place_on_cpu(
    ratio: str, placement: str, cores: int, env_workers: int, rollout_workers: int, actors: int
) -> Placement:
    """Turns R:A into processes and torch threads where there is no GPU. 0 workers: derived."""
    r, a = parse_ratio(ratio)
    env = env_workers or r
    rollout = rollout_workers or 1
    actor = actors or a
    colocated = placement == "colocated"
    rollout_cores = cores if colocated else cores * r / (r + a)
    actor_cores = cores if colocated else cores * a / (r + a)
    rollout_threads = max(1, int(rollout_cores / rollout))
    actor_threads = max(1, int(actor_cores / actor))
    line = (
        f"no GPU: {placement} {ratio} on {cores} cores means {env} env, {rollout} rollout and "
        f"{actor} actor workers, torch threads {rollout_threads} and {actor_threads} each"
    )
    cpu = ("cpu",)
    return Placement(cpu * env, cpu * rollout, cpu * actor, rollout_threads, actor_threads, line)


def share_gpus(ratio: str, placement: str, gpus: int) -> tuple[tuple[str, ...], ...]:
    """Returns the GPUs of the env, the rollout and the actor workers."""
    everything = tuple(f"cuda:{i}" for i in range(gpus))
    if placement == "colocated":
        return everything, everything, everything
    r, a = parse_ratio(ratio)
    few = f"--ratio {ratio} needs {r + a} GPUs and this machine has {gpus}"
    require(r + a <= gpus, f"{few}: choose fewer parts, or --placement colocated")
    unit = gpus // (r + a)
    acting = everything[: r * unit]
    actor = everything[r * unit : (r + a) * unit]
    if placement != "hybrid":
        return acting, acting, actor
    parts = "--placement hybrid needs at least 2 parts for env and rollout"
    require(r >= 2, f"{parts}, --ratio {ratio} gives {r}")
    for_envs = r // 2 * unit
    return acting[:for_envs], acting[for_envs:], actor


def spread(devices: tuple[str, ...], workers: int) -> tuple[str, ...]:
    """Deals devices to workers in turn; 0 workers means one on each."""
    return tuple(devices[i % len(devices)] for i in range(workers or len(devices)))
