"""The pipeline in virtual time: the real `DynamicBatcher`, `Admission` and `Streamer`, with workers
that are events on a clock.

    world = World()                              nothing sleeps: the clock jumps from event to event
    run = simulate(node, costs, nodes=32, iterations=20, warmup=5)

What decides who waits for whom is imported from `scheduler.py` and `streamer.py` and acts here as
it does in a run: requests queue in the batcher of the lane's rollout worker, trajectories start
when admission lets them, micro-batches come from the streamer of the actor rank that owns the slot.
What only takes time is a number in `Costs`. The workers below follow the loops of `env_worker.run`,
`rollout_worker.run` and `actor_worker.run`, down to the order in which an env worker meets its
replies.

Nodes meet only where gradients are summed. Of many nodes, which are all alike, `simulated` are
followed event by event. What the others would add, the wait for the slowest of all, is drawn: so
many times, how late a followed node has been against their mean at the same gradient of earlier
iterations (a mean field). So 256 GPUs cost as many events as 32.

Left out: evaluation lanes, failures, checkpoints, cores that several workers share, and whatever a
stage does inside its time.
"""

import math
from bisect import insort
from collections import Counter, deque
from collections.abc import Callable
from heapq import heappop, heappush
from statistics import NormalDist

import numpy as np

from planning import STAGES, Costs, Node, Prediction, scaled
from scheduler import Admission, DynamicBatcher
from streamer import Streamer

ACT, VALUE, LAST = range(
    3
)  # what a lane asks for, as in channel.py: an action; the last value, alone or beside an action
HISTORY = 2048  # arrivals at one gradient that the mean field remembers
QUANTILES = 4096  # values that stand for a distribution
BLOCK = 256  # random numbers drawn at a time


class World:
    """Virtual time, called as a clock. Events at the same time happen in the order in which they
    were planned.
    """

    def __init__(self):
        self.now = 0.0
        self.heap = []
        self.planned = 0
        self.running = True

    def __call__(self) -> float:
        return self.now

    def after(self, seconds: float, function: Callable, argument=None) -> None:
        self.planned += 1
        heappush(self.heap, (self.now + seconds, self.planned, function, argument))

    def run(self) -> None:
        """Until somebody sets `running` to False."""
        heap = self.heap
        while self.running:
            if not heap:
                raise RuntimeError("every worker waits for another: nothing can happen any more")
            self.now, _, function, argument = heappop(heap)
            function(argument)


class Device:
    """Work of several workers on one device: one after another, first come first served. `after` is
    used like World's.

    Who queues for a device counts as busy, as a worker does whose kernel waits for another's.
    """

    def __init__(self, world: World):
        self.world = world
        self.queue = deque()
        self.busy = False

    def after(self, seconds: float, function: Callable, argument=None) -> None:
        if self.busy:
            self.queue.append((seconds, function, argument))
        else:
            self.busy = True
            self.world.after(seconds, self.done, (function, argument))

    def done(self, job: tuple) -> None:
        if self.queue:
            seconds, *following = self.queue.popleft()
            self.world.after(seconds, self.done, following)
        else:
            self.busy = False
        job[0](job[1])


class Worker:
    """What all have in common: whether it works, how long it has not, and where (`work` is `after`
    of a device).
    """

    def __init__(self, world: World, device: Device | None):
        self.world = world
        self.busy = False
        self.idle_s = 0.0
        self.idle_since = world.now
        self.work = device.after if device else world.after
        self.waking = False  # a message is on its way to one that waits

    def begin(self) -> None:
        self.busy = True
        self.idle_s += self.world.now - self.idle_since

    def end(self) -> None:
        self.busy = False
        self.idle_since = self.world.now

    def wake(self) -> None:
        """A message has been sent to this worker."""
        if self.busy or self.waking:
            return
        if self.node.costs.message_s:
            self.waking = True
            self.world.after(self.node.costs.message_s, self.woken)
        else:
            self.proceed()

    def woken(self, _) -> None:
        self.waking = False
        if not self.busy:
            self.proceed()

    def waited(self) -> float:
        """Seconds of waiting so far."""
        return self.idle_s if self.busy else self.idle_s + self.world.now - self.idle_since


class Lane:
    __slots__ = ("envs", "rollout", "t", "trajectory", "worker")

    def __init__(self, envs: range, worker: "EnvWorker", rollout: "RolloutWorker"):
        self.envs = envs
        self.worker = worker
        self.rollout = rollout
        self.trajectory = self.t = 0


class EnvWorker(Worker):
    """Meets its replies one by one; steps a lane for those that bring actions."""

    def __init__(self, world: World, device: Device | None, node: "NodeState"):
        super().__init__(world, device)
        self.node = node
        self.step_time = node.step_time()
        self.ready: deque = deque()  # replies: (lane, kind, trajectory)
        self.parked: list[Lane] = []  # lanes that may not start a trajectory yet

    def proceed(self) -> None:
        """The top of the worker's loop."""
        if self.parked:
            self.parked = [lane for lane in self.parked if not self.begin_trajectory(lane)]
        while self.ready:
            lane, kind, trajectory = self.ready.popleft()
            if kind == ACT:
                if not self.busy:
                    self.begin()
                self.work(self.step_time(), self.stepped, lane)
                return
            self.node.finish(lane, trajectory)
            if kind == VALUE and not self.begin_trajectory(lane):
                self.parked.append(lane)
        if self.busy:
            self.end()

    def begin_trajectory(self, lane: Lane) -> bool:
        if not self.node.admission.admits(lane.trajectory, self.node.version):
            return False
        lane.t = 0
        lane.rollout.request((lane, ACT, lane.trajectory))
        return True

    def stepped(self, lane: Lane) -> None:
        node = self.node
        lane.t += 1
        if lane.t < node.node.segment:
            lane.rollout.request((lane, ACT, lane.trajectory))
        else:
            ended = lane.trajectory
            lane.trajectory = lane.trajectory + 1
            kind = LAST if self.begin_trajectory(lane) else VALUE
            lane.rollout.request((lane, kind, ended))
        self.proceed()


class RolloutWorker(Worker):
    """Serves what its batcher lets through; fetches weights on the side."""

    def __init__(self, world: World, device: Device | None, node: "NodeState", served: int):
        super().__init__(world, device)
        settings = node.node
        batch_max = {"all": served, "auto": max(1, served // 2)}.get(
            settings.batch_max, settings.batch_max
        )
        self.node = node
        self.auto = settings.batch_wait_s == "auto"
        self.batcher = DynamicBatcher(
            min(batch_max, served), 0.01 if self.auto else settings.batch_wait_s, world
        )
        self.version = self.published = 0  # of the weights in use, and the newest there are
        self.fetching = False
        self.stalled = None
        self.alarm = math.inf
        self.batches = self.samples = 0

    def request(self, record: tuple) -> None:
        self.batcher.add(record, record[1] != LAST)
        if (
            self.node.costs.message_s
        ):  # each message arrives for itself: the last one of a batch matters
            self.world.after(self.node.costs.message_s, self.proceed)
        elif not self.busy:
            self.proceed()

    def proceed(self, _=None) -> None:
        """Serve now, or be called again when the oldest request will have waited long enough."""
        if self.busy or self.stalled is not None:
            return
        remaining = self.batcher.remaining()
        if remaining is None or remaining == math.inf:
            return
        if remaining > 1e-9:  # an alarm for a request served since only looks again
            due = self.world.now + remaining
            if not self.world.now < self.alarm <= due:
                self.alarm = due
                self.world.after(remaining, self.proceed)
            return
        batch, _ = self.batcher.take()
        if self.version < self.node.version:
            admission = self.node.admission
            newest = max((admission.batch_of(j) for _, kind, j in batch if kind == ACT), default=0)
            if (
                newest - admission.max_staleness > self.version
            ):  # admitted on a version that is still being copied
                self.stalled = batch
                return
        self.serve(batch)

    def serve(self, batch: list) -> None:
        self.begin()
        costs = self.node.costs
        node = self.node.node
        self.batches = self.batches + 1
        self.samples = self.samples + len(batch) * node.lane_envs
        acts = [kind for _, kind, _ in batch].count(ACT)
        samples = (acts + (len(batch) - acts) / node.coarse) * node.lane_envs
        seconds = (
            costs.infer_fixed_s / (1.0 if acts else node.coarse) + samples * costs.infer_each_s
        )
        if self.auto:
            self.batcher.wait_s = 0.8 * self.batcher.wait_s + 0.2 * 0.5 * seconds
        self.work(seconds, self.served, batch)

    def served(self, batch: list) -> None:
        self.end()
        for record in batch:
            record[0].worker.ready.append(record)
        for lane, _, _ in batch:
            if not lane.worker.busy:
                lane.worker.wake()
        self.proceed()

    def publish(self, version: int) -> None:
        self.published = version
        if not self.fetching:
            self.fetching = True
            self.world.after(self.node.costs.fetch_s, self.fetched, version)

    def fetched(self, version: int) -> None:
        self.version = version
        self.fetching = False
        if self.published > version:
            self.publish(self.published)
        if self.stalled is not None:
            batch = self.stalled
            self.stalled = None
            self.serve(batch)


class ActorRank(Worker):
    """Trains what its streamer gives out."""

    def __init__(self, world: World, device: Device | None, node: "NodeState", rank: int):
        super().__init__(world, device)
        n = node.node
        # arrived: waits for the gradients of others
        self.node = node
        self.arrived = False
        self.streamer = Streamer(
            batch=n.batch,
            minibatch=n.minibatch,
            micro_batch=n.micro_batch,
            ring=n.max_staleness + 1,
            epochs=n.update_epochs,
            stream=n.stream,
            rank=rank,
            ranks=len(n.actor_devices),
            seed=0,
            version=0,
        )
        costs = node.costs
        self.seconds = costs.train_fixed_s + n.micro_batch * n.segment * costs.train_each_s

    def proceed(self) -> None:
        """The top of the worker's loop."""
        if self.arrived:
            return
        micro = self.streamer.next()
        if micro is None:
            if self.busy:
                self.end()
            return
        if not self.busy:
            self.begin()
        self.work(self.seconds, self.trained, micro)

    def trained(self, micro) -> None:
        if micro.last:
            self.end()
            self.arrived = True
            self.node.barrier.arrive(self)
        else:
            self.proceed()


class NodeState:
    """One node's workers, and what they share."""

    def __init__(
        self, world: World, node: Node, costs: Costs, barrier: "Barrier", rng: np.random.Generator
    ):
        self.node = node
        self.costs = costs
        self.barrier = barrier
        chunks = (
            node.batch // node.lane_envs * node.segment // len(node.env_devices)
        )  # of an env worker in an iteration
        times = quantiles_of(costs)
        self.step_time = lambda: draws(times, max(1, chunks) if node.coarse > 1 else 1, rng)
        self.admission = Admission(node.batch, node.lanes * node.lane_envs, node.max_staleness)
        self.version = 0
        users = Counter((*node.env_devices, *node.rollout_devices, *node.actor_devices))
        devices = {
            name: Device(world) for name, count in users.items() if count > 1 and name != "cpu"
        }
        on = devices.get
        shares = [
            range(rank, node.lanes, len(node.rollout_devices))
            for rank in range(len(node.rollout_devices))
        ]
        self.envs = [EnvWorker(world, on(name), self) for name in node.env_devices]
        self.rollouts = [
            RolloutWorker(world, on(d), self, len(mine))
            for d, mine in zip(node.rollout_devices, shares, strict=True)
        ]
        self.actors = [
            ActorRank(world, on(name), self, rank) for rank, name in enumerate(node.actor_devices)
        ]
        for i in range(node.lanes):
            worker = self.envs[i % len(self.envs)]
            envs = range(i * node.lane_envs, (i + 1) * node.lane_envs)
            worker.parked.append(Lane(envs, worker, self.rollouts[i % len(self.rollouts)]))

    def workers(self, stage: str) -> list[Worker]:
        return {"env": self.envs, "rollout": self.rollouts, "actor": self.actors}[stage]

    def finish(self, lane: Lane, trajectory: int) -> None:
        """The trajectories of a lane are complete: their slots go to the ranks that own them."""
        owners = {}
        for env in lane.envs:
            slot = self.admission.slot(env, trajectory)
            owner = self.actors[slot % self.node.batch % len(self.actors)]
            owner.streamer.add(slot)
            owners[owner] = True
        for owner in owners:
            owner.wake()

    def publish(self, version: int) -> None:
        self.version = version
        for rollout in self.rollouts:
            rollout.publish(version)
        for worker in self.envs:
            worker.wake()


class Barrier:
    """Where gradients are summed: ranks of all nodes wait for the last one. Ends an iteration after
    its last minibatch.
    """

    def __init__(
        self, world: World, nodes: int, rng: np.random.Generator, finished: Callable[[], None]
    ):
        self.world = world
        self.nodes = nodes
        self.rng = rng
        self.finished = finished
        self.states: list[NodeState] = []  # those that are followed
        self.present: dict[ActorRank, float] = {}
        self.lateness: dict[
            int, list[float]
        ] = {}  # by minibatch of the iteration: of one node against their mean, sorted
        self.index = self.version = 0

    def arrive(self, rank: ActorRank) -> None:
        self.present[rank] = self.world.now
        if len(self.present) < sum(len(state.actors) for state in self.states):
            return
        arrivals = [max(self.present[rank] for rank in state.actors) for state in self.states]
        slowest = max(arrivals)
        others = self.nodes - len(arrivals)
        typical = arrivals[1:]  # the first node is the slowest of all, where they differ
        if others and len(typical) > 1:
            mean = sum(typical) / len(typical)
            late = self.lateness.setdefault(self.index, [])
            if late:  # the largest of so many draws
                slowest = max(
                    slowest, mean + late[int(self.rng.random() ** (1.0 / others) * len(late))]
                )
            if (
                self.version > self.states[0].node.max_staleness + 1
            ):  # before that, pipelines are still filling
                for arrival in typical:  # made wider, because their own mean is taken off
                    insort(late, (arrival - mean) * math.sqrt(len(typical) / (len(typical) - 1)))
            while len(late) > HISTORY:
                del late[self.rng.integers(len(late))]
        costs = self.states[0].costs
        self.world.after(slowest - self.world.now + costs.gradient_s, self.reduced)

    def reduced(self, _) -> None:
        costs = self.states[0].costs
        for rank in self.present:
            rank.begin()
        self.index += 1
        done = next(iter(self.present)).streamer.done
        self.world.after(costs.optimizer_s + costs.publish_s * done, self.stepped, done)

    def stepped(self, done: bool) -> None:
        ranks = list(self.present)
        self.present = {}
        for rank in ranks:
            rank.arrived = False
        if done:
            for rank in ranks:
                self.version = rank.streamer.finish_batch()
            self.index = 0
            for state in self.states:
                state.publish(self.version)
            self.finished()
        for rank in ranks:
            rank.proceed()


def quantiles_of(costs: Costs) -> np.ndarray:
    """Times of a chunk, sorted, all equally likely."""
    if costs.step_samples:
        return np.sort(costs.step_samples)
    normal = NormalDist()
    times = np.exp(
        [costs.step_tail * normal.inv_cdf((i + 0.5) / QUANTILES) for i in range(QUANTILES)]
    )
    return times * (costs.step_s / times.mean())


def draws(times: np.ndarray, strata: int, rng: np.random.Generator) -> Callable[[], float]:
    """Draws one of `times` after another; of every `strata` draws each falls into another part of
    the distribution.

    A coarse chunk stands for many, whose mean scatters less than one of them, yet the slowest of a
    round must be as slow as ever: stratified draws have the distribution of single ones, and sums
    over an iteration that hardly scatter.
    """
    block: list[float] = []

    def draw() -> float:
        if not block:
            parts = rng.permuted(
                np.tile(np.arange(strata), (max(1, BLOCK // strata), 1)), axis=1
            ).ravel()
            block.extend(
                times[
                    ((parts + rng.random(len(parts))) * (len(times) / strata)).astype(int)
                ].tolist()
            )
        return block.pop()

    return draw


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
    """Runs `iterations` after `warmup` and takes means over them. spread: σ of the log-normal
    slowness of whole nodes.
    """
    world = World()
    rng = np.random.default_rng(seed)
    followed = min(nodes, simulated)
    # The slowest node is always followed; the others stand for the rest at evenly spaced quantiles.
    quantiles = [
        1 - 0.5 / nodes,
        *((i + 0.5) / (followed - 1) * (1 - 1 / nodes) for i in range(followed - 1)),
    ]
    slowness = [
        math.exp(spread * NormalDist().inv_cdf(q)) if spread and nodes > 1 else 1.0
        for q in quantiles
    ]
    snapshots: list[tuple] = []

    def snapshot() -> None:
        if barrier.version not in (warmup, warmup + iterations):
            return
        world.running = barrier.version < warmup + iterations
        waits = {
            stage: [w.waited() for state in barrier.states for w in state.workers(stage)]
            for stage in STAGES
        }
        rollouts = [r for state in barrier.states for r in state.rollouts]
        means = {stage: sum(w) / len(w) for stage, w in waits.items()}
        snapshots.append(
            (world.now, sum(r.batches for r in rollouts), sum(r.samples for r in rollouts), means)
        )

    barrier = Barrier(world, nodes, rng, snapshot)
    for slow in slowness:
        barrier.states.append(NodeState(world, node, scaled(costs, slow), barrier, rng))
    if warmup == 0:
        snapshot()
    for state in barrier.states:
        for worker in state.envs:
            worker.proceed()
    world.run()
    (t0, batches0, samples0, waits0), (t1, batches1, samples1, waits1) = snapshots
    seconds = t1 - t0
    bubbles = {f"bubble_{stage}": (waits1[stage] - waits0[stage]) / seconds for stage in STAGES}
    return Prediction(
        step_s=seconds / iterations,
        env_steps_per_s=nodes
        * node.batch
        * node.segment
        * node.chunk
        * iterations
        / seconds,  # RL-VLA³ eq. 2
        batch_size_mean=(samples1 - samples0) / max(1, batches1 - batches0),
        events=world.planned,
        **bubbles,
    )
