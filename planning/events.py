"""The pipeline in virtual time: the deciders of a run, with workers that are events on a clock.

    found = simulate(node, costs, nodes=32, iterations=20, warmup=5)

Whatever decides who waits for whom is imported from `scheduler.py` and `streamer.py`. Whatever only
takes time is a number in `Costs`. The workers below follow the loops of a run's workers, down to
the order in which an env worker meets its replies. The clock jumps from event to event.

Nodes meet only where gradients are summed. Many nodes are all alike, so a few of them, `simulated`,
are followed event by event. The others would add a wait for the slowest of all. That wait is drawn:
for each node that is not followed, how late a followed one has been against their mean, at the same
gradient of earlier iterations (a mean field). So 256 GPUs cost as many events as 32.

Left out: evaluation lanes, failures, checkpoints, filtered groups, cores that several workers
share, and whatever a stage does inside its time.
"""

import math
from bisect import insort
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from heapq import heappop, heappush
from statistics import NormalDist

import numpy as np

from planning import STAGES, Costs, Node, Prediction, scaled
from scheduler import FIRST_WAIT_S, Admission, DynamicBatcher, first_batch_max
from streamer import Streamer

ACT, VALUE = range(2)  # what a lane asks for: an action, the value that ends a trajectory
HISTORY = 2048  # arrivals at one gradient that the mean field remembers
QUANTILES = 4096  # values that stand for a distribution
BLOCK = 256  # random numbers drawn at a time
SOON = 1e-9  # seconds that count as now


class World:
    """Virtual time, called as a clock. Events at the same time happen in the order planned."""

    def __init__(self):
        self.now = 0.0  # seconds
        self.heap = []  # (time, place in the order, function, its arguments)
        self.planned = 0
        self.running = True

    def __call__(self) -> float:
        return self.now

    def after(self, seconds: float, function: Callable, *arguments) -> None:
        """Calls the function so many seconds from now."""
        self.at(self.now + seconds, function, *arguments)

    def at(self, time: float, function: Callable, *arguments) -> None:
        self.planned += 1
        heappush(self.heap, (time, self.planned, function, arguments))

    def run(self) -> None:
        """Lets events happen until somebody sets `running` to False."""
        while self.running:
            if not self.heap:
                raise RuntimeError("every worker waits for another: nothing can happen any more")
            self.now, _, function, arguments = heappop(self.heap)
            function(*arguments)


class Device:
    """Does the work of several workers one after another, first come first served, and work that is
    longer than a slice in turns with others'.

    A worker in the queue counts as busy, as one whose kernel waits for another's does."""

    def __init__(self, world: World, slice_s: float = math.inf):
        self.world = world
        self.slice_s = slice_s
        self.free_at = 0.0  # when it has done all work so far

    def after(self, seconds: float, function: Callable, *arguments) -> None:
        """Calls the function once so many seconds of work are done; used like World's."""
        self.free_at = max(self.free_at, self.world.now) + min(seconds, self.slice_s)
        if seconds > self.slice_s:
            arguments = (seconds - self.slice_s, function, *arguments)
            function = self.after
        self.world.at(self.free_at, function, *arguments)


class Worker:
    """What all workers have in common: whether one works, and how long it has not."""

    def __init__(self, state: "NodeState", device: Device | None):
        self.state = state
        self.node = state.node
        self.costs = state.costs
        self.world = state.world
        self.work = (device or self.world).after
        self.busy = False
        self.idle_s = 0.0  # seconds of waiting, until it last began
        self.idle_since = self.world.now
        self.waking = False  # a message is on its way to it, and it waits

    def begin(self) -> None:
        if not self.busy:
            self.busy = True
            self.idle_s += self.world.now - self.idle_since

    def end(self) -> None:
        if self.busy:
            self.busy = False
            self.idle_since = self.world.now

    def wake(self) -> None:
        """Sends this worker a message, which only matters if it waits."""
        if self.busy or self.waking:
            return
        if self.costs.message_s:
            self.waking = True
            self.world.after(self.costs.message_s, self.woken)
        else:
            self.proceed()

    def woken(self) -> None:
        self.waking = False
        if not self.busy:
            self.proceed()

    def waited(self) -> float:
        return self.idle_s if self.busy else self.idle_s + self.world.now - self.idle_since


@dataclass(eq=False, slots=True)
class Lane:
    """What asks for actions: one env, or several that step together."""

    envs: range
    worker: "EnvWorker"
    rollout: "RolloutWorker"
    trajectory: int = 0  # the one that it plays, or waits to begin
    t: int = 0  # chunk steps into it


Request = tuple[Lane, int, int]  # lane, kind, trajectory


class EnvWorker(Worker):
    """Meets its replies one by one; steps a lane for each that brings actions."""

    def __init__(self, state: "NodeState", device: Device | None):
        super().__init__(state, device)
        node = self.node
        chunks = node.batch // node.lane_envs * node.segment // len(node.env_devices)
        strata = max(1, chunks) if node.coarse > 1 else 1  # chunks of this worker in an iteration
        self.chunk_times = draws(state.chunk_times, strata, state.rng)
        self.replies: deque[Request] = deque()
        self.parked: list[Lane] = []  # lanes that may not start a trajectory yet

    def proceed(self) -> None:
        """Passes through the worker's loop once."""
        for lane in [lane for lane in self.parked if lane.trajectory < self.state.admitted]:
            self.parked.remove(lane)
            lane.rollout.request((lane, ACT, lane.trajectory))
        while self.replies:
            lane, kind, trajectory = self.replies.popleft()
            if kind == ACT:
                self.begin()
                seconds = next(self.chunk_times)
                drawing = seconds * self.costs.draw_share
                self.work(seconds - drawing, self.simulated, lane, drawing)
                return
            self.state.finish(lane, trajectory)
        self.end()

    def simulated(self, lane: Lane, drawing: float) -> None:
        if drawing:
            lane.rollout.work(drawing, self.stepped, lane)
        else:
            self.stepped(lane)

    def stepped(self, lane: Lane) -> None:
        lane.t += 1
        if lane.t < self.node.segment:
            lane.rollout.request((lane, ACT, lane.trajectory))
        else:
            self.end_trajectory(lane)
        self.proceed()

    def end_trajectory(self, lane: Lane) -> None:
        """PPO asks for the last value, beside the next first action if that may be asked for."""
        ended = lane.trajectory
        lane.trajectory += 1
        lane.t = 0
        lane.rollout.count_lanes()
        requests = []
        if lane.trajectory < self.state.admitted:
            requests.append((lane, ACT, lane.trajectory))
        else:
            self.parked.append(lane)
        if self.node.group == 1:
            requests.append((lane, VALUE, ended))
        else:
            self.state.finish(lane, ended)
        lane.rollout.request(*requests)  # even of nothing: a batch may be due without this lane


class RolloutWorker(Worker):
    """Serves what its batcher lets through; fetches weights on the side."""

    def __init__(self, state: "NodeState", device: Device | None, lanes: int):
        super().__init__(state, device)
        node = self.node
        size = first_batch_max(node.batch_max, lanes)
        self.auto = node.batch_wait_s == "auto"
        wait_s = FIRST_WAIT_S if self.auto else node.batch_wait_s
        self.batcher = DynamicBatcher(size, wait_s, self.world)
        self.lanes: list[Lane] = []  # that ask this worker
        self.version = 0  # of the weights in use
        self.fetching = False  # one fetch at a time
        self.stalled: list[Request] = []  # a batch that waits for newer weights
        self.alarm = math.inf  # when it is to look at its queue again
        self.batches = 0
        self.samples = 0

    def request(self, *requests: Request) -> None:
        """Queues what a lane asks. Last values ride along and never count, as in a run."""
        for request in requests:
            self.batcher.add(request, request[1] == ACT)
        if self.costs.message_s:  # the last message of a batch completes it
            self.world.after(self.costs.message_s, self.proceed)
        else:
            self.proceed()

    def count_lanes(self) -> None:
        """Tells the batcher how many lanes may ask: the others wait for a newer version."""
        admitted = self.state.admitted
        self.batcher.expect_at_most(sum(lane.trajectory < admitted for lane in self.lanes))

    def proceed(self) -> None:
        """Serves now, or plans to look again when the oldest request has waited long enough."""
        if self.busy or self.stalled:
            return
        remaining = self.batcher.remaining()
        if remaining is None or remaining == math.inf:
            return
        if remaining <= SOON:
            batch, _ = self.batcher.take()
            self.serve(batch)
            return
        due = self.world.now + remaining
        if not self.world.now < self.alarm <= due:  # the alarm may be for a request served by then
            self.alarm = due
            self.world.after(remaining, self.proceed)

    def serve(self, batch: list[Request]) -> None:
        """Infers, once the weights in use are new enough for every trajectory of a batch."""
        admitted = self.state.admission.admitted(self.version)
        if any(kind == ACT and trajectory >= admitted for _, kind, trajectory in batch):
            self.stalled = batch
            return
        self.begin()
        node = self.node
        self.batches += 1
        self.samples += len(batch) * node.lane_envs
        acts = [kind for _, kind, _ in batch].count(ACT)
        # A coarse action stands for many inferences, a last value never does.
        samples = (acts + (len(batch) - acts) / node.coarse) * node.lane_envs
        fixed = self.costs.infer_fixed_s / (1.0 if acts else node.coarse)
        seconds = fixed + samples * self.costs.infer_each_s
        if self.auto:
            self.batcher.follow(seconds)
        self.work(seconds, self.served, batch)

    def served(self, batch: list[Request]) -> None:
        self.end()
        for request in batch:
            request[0].worker.replies.append(request)
        for lane, _, _ in batch:
            lane.worker.wake()
        self.proceed()

    def fetch(self) -> None:
        if not self.fetching:
            self.fetching = True
            self.world.after(self.costs.fetch_s, self.fetched, self.state.version)

    def fetched(self, version: int) -> None:
        self.version = version
        self.fetching = False
        if self.state.version > version:
            self.fetch()
        if self.stalled:
            batch = self.stalled
            self.stalled = []
            self.serve(batch)


class ActorRank(Worker):
    """Trains what its streamer gives out."""

    def __init__(self, state: "NodeState", device: Device | None, rank: int):
        super().__init__(state, device)
        node = self.node
        self.streamer = Streamer(
            state.admission,
            minibatches=node.minibatches,
            together=node.micro_batch,
            epochs=node.update_epochs,
            stream=node.stream,
            rank=rank,
            ranks=len(node.actor_devices),
            seed=0,
            version=0,
        )
        steps = node.micro_batch * node.segment  # chunk steps of a micro-batch
        self.seconds = self.costs.train_fixed_s + steps * self.costs.train_each_s

    def proceed(self) -> None:
        """Passes through the worker's loop once."""
        if self in self.state.barrier.present:
            return
        micro_batch = self.streamer.next()
        if micro_batch is None:
            self.end()
        else:
            self.begin()
            self.work(self.seconds, self.trained, micro_batch)

    def trained(self, micro_batch) -> None:
        if micro_batch.last:
            self.end()
            self.state.barrier.arrive(self)
        else:
            self.proceed()


class NodeState:
    """One node's workers, and what they share."""

    def __init__(self, world: World, node: Node, costs: Costs, barrier: "Barrier", rng):
        self.world = world
        self.node = node
        self.costs = costs
        self.barrier = barrier
        self.rng = rng
        self.chunk_times = quantiles_of(costs)
        self.admission = Admission(
            node.batch, node.envs, node.max_staleness, width=node.lane_envs, group=node.group
        )
        self.version = 0  # the newest one published
        self.admitted = self.admission.admitted(0)  # trajectories of an env that may have started
        devices = {*node.env_devices, *node.rollout_devices, *node.actor_devices} - {"cpu"}
        shared = {name: Device(world, costs.slice_s) for name in devices}
        rollouts = len(node.rollout_devices)
        self.envs = [EnvWorker(self, shared.get(name)) for name in node.env_devices]
        self.rollouts = [
            RolloutWorker(self, shared.get(name), len(range(rank, node.lanes, rollouts)))
            for rank, name in enumerate(node.rollout_devices)
        ]
        self.actors = [
            ActorRank(self, shared.get(name), rank) for rank, name in enumerate(node.actor_devices)
        ]
        self.workers = dict(zip(STAGES, (self.envs, self.rollouts, self.actors), strict=True))
        for i in range(node.lanes):
            worker = self.envs[i % len(self.envs)]
            rollout = self.rollouts[i % rollouts]
            envs = range(i * node.lane_envs, (i + 1) * node.lane_envs)
            lane = Lane(envs, worker, rollout)
            worker.parked.append(lane)
            rollout.lanes.append(lane)

    def finish(self, lane: Lane, trajectory: int) -> None:
        """Hands the slots of a lane's complete trajectories to the rank that owns them all."""
        slots = [self.admission.slot(env, trajectory) for env in lane.envs]
        owner = self.actors[self.admission.owner(slots[0], len(self.actors))]
        for slot in slots:
            owner.streamer.add(slot)
        owner.wake()

    def publish(self, version: int) -> None:
        self.version = version
        self.admitted = self.admission.admitted(version)
        for rollout in self.rollouts:
            rollout.count_lanes()
            rollout.fetch()
        for worker in self.envs:
            worker.wake()


class Barrier:
    """Sums gradients once the ranks of all nodes are there, and ends iterations."""

    def __init__(self, world: World, nodes: int, rng: np.random.Generator, looks_at: tuple):
        self.world = world
        self.nodes = nodes
        self.rng = rng
        self.looks_at = looks_at  # the versions at which to look; the last one ends it all
        # Seconds, batches, samples, and mean seconds that a worker of each stage has waited.
        self.looks: list[np.ndarray] = []
        self.states: list[NodeState] = []  # of the nodes that are followed
        self.present: dict[ActorRank, float] = {}  # when each rank came
        # By minibatch of the iteration: how late one node was against their mean, sorted.
        self.lateness: dict[int, list[float]] = {}
        self.index = 0  # minibatches of this iteration that are over
        self.version = 0

    def arrive(self, rank: ActorRank) -> None:
        self.present[rank] = self.world.now
        if len(self.present) < sum(len(state.actors) for state in self.states):
            return
        arrivals = [max(self.present[rank] for rank in state.actors) for state in self.states]
        slowest = max(max(arrivals), self.drawn(arrivals))
        wait_s = slowest - self.world.now + self.states[0].costs.gradient_s
        self.world.after(wait_s, self.reduced)

    def drawn(self, arrivals: list[float]) -> float:
        """Returns when the slowest of the nodes that are not followed arrives."""
        others = self.nodes - len(arrivals)
        typical = arrivals[1:]  # the first node is the slowest of all, where they differ
        if not others or len(typical) < 2:
            return 0.0
        mean = sum(typical) / len(typical)
        late = self.lateness.setdefault(self.index, [])
        found = 0.0
        if late:  # the largest of so many draws
            found = mean + late[int(self.rng.random() ** (1.0 / others) * len(late))]
        # Before that version, pipelines are still filling.
        if self.version > self.states[0].node.max_staleness + 1:
            wider = math.sqrt(len(typical) / (len(typical) - 1))  # their own mean is taken off
            for arrival in typical:
                insort(late, (arrival - mean) * wider)
        while len(late) > HISTORY:
            del late[self.rng.integers(len(late))]
        return found

    def reduced(self) -> None:
        """All ranks take their optimizer step, and publish after the last one of a batch."""
        costs = self.states[0].costs
        for rank in self.present:
            rank.begin()
        self.index += 1
        done = next(iter(self.present)).streamer.done
        self.world.after(costs.optimizer_s + costs.publish_s * done, self.stepped, done)

    def stepped(self, done: bool) -> None:
        ranks = list(self.present)
        self.present = {}
        if done:
            self.version = [rank.streamer.finish_batch() for rank in ranks][-1]
            self.index = 0
            for state in self.states:
                state.publish(self.version)
            self.look()
        for rank in ranks:
            rank.proceed()

    def look(self) -> None:
        """Takes stock of all nodes that are followed, at the versions in `looks_at`."""
        if self.version not in self.looks_at:
            return
        rollouts = [rollout for state in self.states for rollout in state.rollouts]
        batches = sum(rollout.batches for rollout in rollouts)
        samples = sum(rollout.samples for rollout in rollouts)
        waited = []
        for stage in STAGES:
            found = [worker.waited() for state in self.states for worker in state.workers[stage]]
            waited.append(sum(found) / len(found))
        self.looks.append(np.array([self.world.now, batches, samples, *waited]))
        self.world.running = self.version < self.looks_at[-1]


def quantiles_of(costs: Costs) -> np.ndarray:
    """Returns the times of a chunk in seconds, sorted, all equally likely."""
    if costs.step_samples:
        return np.sort(costs.step_samples)
    normal = NormalDist().inv_cdf
    times = np.exp([costs.step_tail * normal((i + 0.5) / QUANTILES) for i in range(QUANTILES)])
    return times * (costs.step_s / times.mean())


def draws(times: np.ndarray, strata: int, rng: np.random.Generator) -> Iterator[float]:
    """Draws one of `times` after another; of every `strata` draws, each falls into another part of
    the distribution.

    A coarse chunk stands for many, and their mean scatters less than one of them. Yet the slowest
    of a round must be as slow as ever. Stratified draws have the distribution of single ones, and
    their sum over an iteration hardly scatters."""
    rounds = np.tile(np.arange(strata), (max(1, BLOCK // strata), 1))
    while True:
        parts = rng.permuted(rounds, axis=1).ravel() + rng.random(rounds.size)
        chosen = (parts * (len(times) / strata)).astype(int)
        yield from reversed(times[chosen].tolist())


def slowness_of(nodes: int, followed: int, spread: float) -> list[float]:
    """Returns how many times slower than the median each node that is followed is.

    The slowest of all is always followed. The others stand for the rest, at evenly spaced
    quantiles of a log-normal distribution of this σ."""
    rest = [(i + 0.5) / (followed - 1) * (1 - 1 / nodes) for i in range(followed - 1)]
    quantiles = [1 - 0.5 / nodes, *rest]
    return [math.exp(spread * NormalDist().inv_cdf(quantile)) for quantile in quantiles]


def simulate(
    node: Node,
    costs: Costs,
    nodes: int = 1,
    simulated: int = 3,
    iterations: int = 20,
    warmup: int = 4,
    seed: int = 0,
    spread: float = 0.0,
) -> Prediction:
    """Runs `iterations` after `warmup` in virtual time and returns means over them.

    simulated: nodes that are followed. spread: σ of the log-normal slowness of whole nodes. Raises
    RuntimeError when every worker waits for another."""
    # Build the nodes.
    world = World()
    rng = np.random.default_rng(seed)
    barrier = Barrier(world, nodes, rng, (warmup, warmup + iterations))
    for slow in slowness_of(nodes, min(nodes, simulated), spread):
        slower = replace(scaled(costs, slow, slow, slow), optimizer_s=costs.optimizer_s * slow)
        barrier.states.append(NodeState(world, node, slower, barrier, rng))

    # Start all lanes and let time pass.
    barrier.look()
    for state in barrier.states:
        for rollout in state.rollouts:
            rollout.count_lanes()
        for worker in state.envs:
            worker.proceed()
    world.run()

    # Take means between the two looks.
    first, last = barrier.looks
    seconds, batches, samples, *waited = (last - first).tolist()
    env_steps = nodes * node.batch * node.segment * node.chunk * iterations
    return Prediction(
        seconds / iterations,
        env_steps / seconds,
        *(wait / seconds for wait in waited),
        samples / max(1.0, batches),
        world.planned,
    )
