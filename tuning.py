"""Chooses what is left to `auto`: `--ratio`, `--batch-max`, `--batch-wait-ms`, from what stages
cost while a run goes on.

    python train.py --ratio auto
    python bench.py tuning          beside the best that an exhaustive search finds

counters → `costs_of` → planning.Costs → `simulate` (the real batcher, admission and streamer in
virtual time) → the best candidate. Everything is decided by the launcher: a rollout worker reads
its B_max and T_max from its counters before the next batch, and another ratio means that all
workers start again from a checkpoint written for the purpose, so that no update is lost.

What cannot be foreseen: how stages that share cores slow each other down (only that an iteration
takes at least its CPU seconds over all cores), and what more torch threads gain (taken to divide
times). So a ratio is judged by what it gives: one that turns out slower than the one before, or at
which workers cannot start, is left again, for good. B_max and T_max change nothing of what is
learnt: noise and episodes are named by trajectory and step. Nor does a ratio as long as the number
of actor workers, which shuffle their shares of a batch for later epochs, and the lanes of a
vectorised simulator stay as they are. Left out: `--placement`, numbers of envs, several machines.
"""

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

import numpy as np

from channel import Counters
from config import WORKERS, Config, UserError, completed, parse_ratio, validate
from metrics import CAUSES, snapshot
from planning import Costs, Node
from planning.events import simulate
from scheduler import Placement, divide

SHARES = (
    1 / 8,
    1 / 4,
    3 / 8,
    1 / 2,
    5 / 8,
    3 / 4,
    1.0,
)  # B_max that are tried, of the lanes served
WAITS = (0.25, 0.5, 1.0, 2.0)  # T_max that are tried, in inferences of that size
PROBES = (1 / 4, 1.0, 1 / 2)  # B_max while the run warms up, so that sizes differ
PROBED = 12  # batches at each of them
# of an env worker, on average, before costs are believed: a wait is counted where it ends, so a
# moment tells nothing
CHUNKS = 8
# of an inference, believed independent of its size as long as sizes hardly differ
# (planning/settings.py)
FIXED = 0.2
MEMORY = 0.6  # what the past weighs against the newest iteration
EQUAL = 0.005  # differences in throughput that random times make
WORTH = 0.02  # gain for which B_max and T_max change; more than EQUAL, or they would wander
RATIO_WORTH = 0.05  # gain for which all workers start again
# seconds that a new ratio must save in the rest of the run, per second until workers that start
# have an iteration
PAYS_BACK = 1.5
SETTLED = 4  # iterations at a ratio before it is judged: the first one warms up
CHANGED = 0.1  # relative change of a cost after which B_max and T_max are looked at again
# seconds between two looks, each of which takes the launcher some 0.5 s of processor time (2 s at
# 256 lanes)
PAUSE = 30.0
# and the least inferences of a rollout worker between two looks: costs from fewer would make them
# wander
RECHECK = 200
SIMULATED = 16_000  # chunk steps of lanes behind one prediction: some 0.1 s
SIMULATE = {"iterations": 8, "warmup": 3}
# seconds that stand for no limit of T_max: a real worker knows when nobody else can ask, a
# simulated one does not
FOREVER = 10.0
LARGEST = 8  # ratios that are simulated, of those with the fastest slowest stage


# ---------------------------------------------------------------- what stages cost


def line_through(n: float, x: float, xx: float, y: float, xy: float) -> tuple[float, float]:
    """Least squares y = a + b·x of n points, from n, Σx, Σx², Σy and Σxy. a, b ≥ 0, as costs
    are.
    """
    if n <= 0 or x <= 0:
        return 0.0, 0.0
    spread = n * xx - x * x
    if spread < 0.01 * x * x:  # standard deviation below a tenth of the mean: no line can be drawn
        return FIXED * y / n, (1 - FIXED) * y / x
    b = (n * xy - x * y) / spread
    if b <= 0:
        return y / n, 0.0
    a = (y - b * x) / n
    return (a, b) if a >= 0 else (0.0, y / x)


def costs_of(
    total: Callable[..., float],
    fit: Iterable[float],
    seconds: dict[str, float],
    trained: float,
    config: Config,
) -> Costs:
    """Stage costs of a stretch of a run.

    total(stage, *columns): what these counters of a stage's workers gained; fit: n, Σsize, Σsize²,
    Σseconds and Σsize·seconds of inferences; seconds: of a stage's workers together, passed;
    trained: trajectories, 0 if none was yet. What is no waiting is work, so that everything between
    two units of work is in their cost.
    """
    busy = {
        stage: max(0.0, s - total(stage, *(f"wait_{cause}_s" for cause in CAUSES)))
        for stage, s in seconds.items()
    }
    fixed, each = line_through(*fit)
    fixed += max(0.0, busy["rollout"] - total("rollout", "infer_s")) / max(
        1.0, total("rollout", "batches")
    )
    chunks = max(1.0, total("env", "chunks"))
    mean = total("env", "chunk_s") / chunks
    square = total("env", "chunk_s_square") / chunks
    steps = trained * config.env.segment * config.actor.update_epochs  # chunk steps
    return Costs(
        step_s=busy["env"] / chunks,
        step_tail=math.sqrt(math.log(max(1.0, square / mean**2))) if mean else 0.0,
        infer_fixed_s=fixed,
        infer_each_s=each,
        train_each_s=busy["actor"] / steps if steps else 0.0,
        fetch_s=total("rollout", "weight_sync_s") / max(1.0, total("rollout", "fetches")),
    )


def words(costs: Costs, everything: bool = False) -> str:
    def ms(seconds):
        return f"{1e3 * seconds:.3g} ms"

    said = f"an inference takes {ms(costs.infer_fixed_s)} + {ms(costs.infer_each_s)} per sample, "
    said += f"a chunk's simulation {ms(costs.step_s)} (σ {costs.step_tail:.0%})"
    if everything:
        said += (
            f", training {ms(costs.train_each_s)} per chunk step, a weight sync {ms(costs.fetch_s)}"
        )
    return said


# ---------------------------------------------------------------- from settings to what is
# simulated


def node_of(config: Config, placement: Placement) -> Node:
    """What `planning` simulates; a short iteration of as many lanes, so that a prediction takes a
    moment.
    """
    env = config.env
    rollout = config.rollout
    actor = config.actor
    lanes = env.envs // env.width
    rounds = SIMULATED // (lanes * sum(SIMULATE.values()) * (actor.batch // env.envs))
    wait = "auto" if rollout.batch_wait_ms == "auto" else rollout.batch_wait_ms / 1e3
    if wait == math.inf and rollout.batch_max != "all":
        wait = FOREVER
    devices = (
        placement.env_devices if env.lanes else ("cpu",) * len(placement.env_devices)
    )  # these share a GPU with inference
    return Node(
        lanes=lanes,
        lane_envs=env.width,
        env_devices=devices,
        rollout_devices=placement.rollout_devices,
        actor_devices=placement.actor_devices,
        segment=max(1, min(env.segment, max(4, rounds))),
        chunk=rollout.chunk,
        batch=actor.batch,
        minibatch=actor.minibatch,
        micro_batch=actor.micro_batch,
        update_epochs=actor.update_epochs,
        max_staleness=actor.max_staleness,
        batch_max=rollout.batch_max,
        batch_wait_s=wait,
        stream=actor.stream,
    )


def short(costs: Costs, node: Node, segment: int) -> Costs:
    """Costs for `node`, whose iteration is shorter than one of `segment` chunk steps per
    trajectory.
    """
    return replace(costs, fetch_s=costs.fetch_s * node.segment / segment)


def speeds(config: Config, placement: Placement) -> tuple[float, float]:
    """Of one rollout worker and of one actor rank, to be compared with those at another ratio."""
    r, a = parse_ratio(config.train.parts)
    if config.train.model == "emulated":  # its devices are as many as one likes
        whole = config.train.placement == "colocated"
        for_rollout, for_actor = (1.0, 1.0) if whole else (r / (r + a), a / (r + a))
        return for_rollout / len(placement.rollout_devices), for_actor / len(
            placement.actor_devices
        )
    if placement.actor_devices[0] == "cpu":
        return float(placement.rollout_threads), float(placement.actor_threads)
    return 1.0, 1.0  # a GPU each


def options(
    config: Config, counts: tuple[int, int, int], simulator, gpus: int, cores: int
) -> dict[str, tuple[Config, Placement]]:
    """Ratios that can run here, with what they make of the settings. counts: of workers, as far as
    flags say; else 0.

    On GPUs those that use them all; without, all of few parts and those with as many parts as
    cores.
    """
    if gpus:
        pairs = (
            [(r, gpus - r) for r in range(1, gpus)] if config.train.placement != "colocated" else []
        )
        names = [f"{r // math.gcd(r, a)}:{a // math.gcd(r, a)}" for r, a in pairs]
    else:
        names = [
            f"{r}:{total - r}"
            for total in sorted({2, 3, 4, max(4, cores)})
            for r in range(1, total)
        ]
    found = {}
    for ratio in dict.fromkeys([config.train.parts, *names]):
        given = dict(zip(WORKERS, counts, strict=True))
        changed = completed(config, ratio_from=ratio, **given)
        try:
            placement = divide(changed, simulator, gpus, cores)
            changed = completed(changed, **placement.workers())
            validate(changed)
        except UserError:
            continue
        found[ratio] = changed, placement
    return found


# ---------------------------------------------------------------- decisions


def best_batches(node: Node, costs: Costs) -> tuple[int | str, float | str, float]:
    """B_max and T_max in seconds with the highest throughput in env steps/s, which is returned too;
    of equal ones those whose batches are largest, which leave the device most time for others. What
    `node` fixes stays.
    """
    most = math.ceil(node.lanes / len(node.rollout_devices))
    sizes = (
        sorted({max(1, round(share * most)) for share in SHARES})
        if node.batch_max == "auto"
        else [node.batch_max]
    )
    found: dict[tuple, tuple[float, float]] = {}
    for size in sizes:
        lanes = min(most, size) if isinstance(size, int) else most
        inference = costs.infer_fixed_s + lanes * node.lane_envs * costs.infer_each_s
        for wait in (
            [share * inference for share in WAITS]
            if node.batch_wait_s == "auto"
            else [node.batch_wait_s]
        ):
            result = simulate(replace(node, batch_max=size, batch_wait_s=wait), costs, **SIMULATE)
            found[size, wait] = result.env_steps_per_s, result.batch_size_mean
    fastest = max(rate for rate, _ in found.values())
    equal = {key: mean for key, (rate, mean) in found.items() if rate >= (1 - EQUAL) * fastest}
    chosen = max(equal, key=equal.get)
    return *chosen, found[chosen][0]


def seconds_at(
    choices: dict[str, tuple[Config, Placement]], now: str, costs: Costs, cpu_s: float, cores: int
) -> dict[str, float]:
    """Predicted seconds of an iteration at each ratio worth a look, from costs measured at `now`.

    cpu_s: CPU seconds of an iteration, which all cores together cannot go below.
    """
    rollout_now, actor_now = speeds(*choices[now])
    rough = {}
    nodes = {}
    for ratio, (config, placement) in choices.items():
        rollout, actor = speeds(config, placement)
        slower = rollout_now / rollout
        node = node_of(config, placement)
        priced = replace(
            costs,
            infer_fixed_s=costs.infer_fixed_s * slower,
            infer_each_s=costs.infer_each_s * slower,
            train_each_s=costs.train_each_s * actor_now / actor,
        )
        samples = config.actor.batch * config.env.segment  # chunk steps of envs in an iteration
        most = (
            math.ceil(node.lanes / len(node.rollout_devices)) * node.lane_envs
        )  # samples of a full batch
        rough[ratio] = max(
            samples / node.lane_envs * costs.step_s / min(node.lanes, len(node.env_devices)),
            samples
            / len(node.rollout_devices)
            * (priced.infer_fixed_s / most + priced.infer_each_s),
            samples * node.update_epochs * priced.train_each_s / len(node.actor_devices),
        )
        nodes[ratio] = (
            node,
            short(priced, node, config.env.segment),
            config.env.segment / node.segment,
        )
    looked = dict.fromkeys([now, *sorted(rough, key=rough.get)[:LARGEST]])
    found = {
        ratio: nodes[ratio][2] * simulate(*nodes[ratio][:2], **SIMULATE).step_s for ratio in looked
    }
    return {ratio: max(seconds, cpu_s / cores) for ratio, seconds in found.items()}


@dataclass
class Past:
    """What is remembered when workers start again at another ratio."""

    left: str = ""  # the ratio before, until the present one is judged
    measured: dict[str, float] = field(
        default_factory=dict
    )  # seconds of an iteration at each ratio that ran, when last judged
    rejected: set[str] = field(
        default_factory=set
    )  # tried, and slower than the one before or not to be started
    news: dict = field(default_factory=dict)  # decided since it was last read, for metrics.jsonl

    def go_back(self, rejected: str) -> str:
        """Leaves a ratio for good. Returns the one before."""
        self.rejected.add(rejected)
        self.news["ratio"] = self.left
        self.left = ""
        return self.news["ratio"]


def beside(function: Callable) -> Future:
    """Runs it in a thread that nobody waits for, not even the end of the process."""
    future = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except Exception as error:  # raised where the result is asked for
            future.set_exception(error)

    threading.Thread(target=run, daemon=True, name="tuner").start()
    return future


class Tuner:
    """Follows a run from the first batches on. The launcher calls `watch` often and `iteration`
    after every iteration.

    `ratio`: what to start again with, once it is another one.
    """

    def __init__(
        self,
        choices: dict[str, tuple[Config, Placement]],
        counters: Counters,
        rows: dict[str, list[int]],
        past: Past,
        cores: int,
        iterations: int,
        clock: Callable[[], float] = time.monotonic,
        beside: Callable[[Callable], Future] = beside,
    ):
        """choices: of `options`, the first one being in use. rows: of the counters, of each stage.
        iterations: of the whole run.
        """
        self.choices = choices
        self.counters = counters
        self.rows = rows
        self.past = past
        self.beside = beside
        self.cores = cores
        self.iterations = iterations
        self.clock = clock
        self.began = clock()
        self.ratio, (self.config, self.placement) = next(iter(choices.items()))
        self.tunes = "auto" in (self.config.rollout.batch_max, self.config.rollout.batch_wait_ms)
        self.probes = (
            list(PROBES) if self.config.rollout.batch_max == "auto" else [0.0] if self.tunes else []
        )
        self.last: np.ndarray | None = None  # counters when they were last taken in
        self.gained = np.zeros_like(counters.table)
        self.fit = np.zeros(5)
        self.seconds = self.trained = self.cpu_s = self.cpu_last = self.probed = self.looked = (
            self.looked_at
        ) = 0.0
        self.since = 0.0, 0.0  # batches and chunks when measuring began
        self.thoughts: deque[tuple[Future, Callable[..., str]]] = (
            deque()
        )  # predictions under way, and what decides on them
        self.chosen: tuple | None = None  # B_max and T_max
        self.chosen_at: Costs | None = None  # the costs that they were last looked at for
        self.lines = 0
        self.first_s = 0.0

    # ---- what is measured
    def total(self, stage: str, *names: str) -> float:
        return float(
            sum(self.gained[self.rows[stage], self.counters.index[name]].sum() for name in names)
        )

    def batches(self) -> float:
        """Inferences so far, of the rollout worker that had the fewest."""
        return float(
            self.counters.table[self.rows["rollout"], self.counters.index["batches"]].min()
        )

    def chunks(self) -> float:
        """Chunks so far of an env worker, on average."""
        return float(self.counters.table[self.rows["env"], self.counters.index["chunks"]].mean())

    def begin(self) -> None:
        """What stages cost is measured from here on; inferences, whose times are their own, may
        have been before.
        """
        self.last = snapshot(self.counters)
        self.taken = self.clock()
        self.since = (self.batches(), self.chunks())
        self.gained = np.zeros_like(self.gained)
        self.seconds = 0.0

    def take(self, memory: float, trained: float = 0.0, cpu_s: float = 0.0) -> None:
        """Takes in what the counters gained since the last time; what they had gained before counts
        `memory` as much.
        """
        now = self.clock()
        table = snapshot(self.counters)
        column = self.counters.index
        new = np.maximum(table - self.last, 0.0)  # less: read while a wait ended
        names = ("batches", "requests", "batch_square", "infer_s", "batch_infer_s")
        self.fit = MEMORY * self.fit + np.array(
            [new[self.rows["rollout"], column[name]].sum() for name in names]
        )
        self.gained = memory * self.gained + new
        self.seconds = memory * self.seconds + now - self.taken
        self.trained = memory * self.trained + trained
        self.cpu_s = memory * self.cpu_s + cpu_s
        self.last = table
        self.taken = now

    def costs(self) -> Costs:
        seconds = {stage: self.seconds * len(rows) for stage, rows in self.rows.items()}
        return costs_of(self.total, self.fit, seconds, self.trained, self.config)

    # ---- what the launcher calls
    def watch(self) -> str:
        """Returns what to tell, mostly nothing: decisions, as soon as what they need has been
        predicted.
        """
        if self.thoughts and self.thoughts[0][0].done():
            found, decide = self.thoughts.popleft()
            try:
                return decide(found.result())
            except RuntimeError as error:  # no reason to end a run
                return f"warning: nothing is tuned now, for in virtual time {error}"
        if self.probes or self.last is None:
            self.warm_up()
        return ""

    def warm_up(self) -> None:
        """Lets batches of several sizes be served, then has B_max and T_max chosen."""
        if self.batches() < self.probed + PROBED:
            return
        if self.last is None:  # the first batches are slow
            self.begin()
        elif (
            len(self.probes) > 1
            or self.batches() >= self.since[0] + PROBED
            and self.chunks() >= self.since[1] + CHUNKS
        ):
            self.probes.pop(0)
            if not self.probes:
                self.take(1.0)
                self.think_of_batches()
        if self.probes and self.probes[0]:
            lanes = self.config.env.envs // self.config.env.width
            self.tell(max(1, round(self.probes[0] * lanes / len(self.rows["rollout"]))), 0.0)
        self.probed = self.batches()

    def iteration(self, version: int, cpu_s: float) -> None:
        """After every iteration. cpu_s: that all workers have used so far."""
        self.lines += 1
        used = cpu_s - self.cpu_last
        self.cpu_last = cpu_s
        if self.ratio != self.config.train.parts:  # the workers are about to leave
            return
        if self.lines == 1:  # it began before the workers were warm
            self.first_s = self.clock() - self.began
            if self.last is not None:
                self.take(0.0)
            self.begin()
            return
        self.take(MEMORY, self.config.actor.batch, used)
        every = self.config.train.checkpoint_every
        if self.config.train.ratio == "auto" and (
            self.lines == SETTLED or self.lines > SETTLED and version % every == 0
        ):
            self.think_of_ratio(version)
        if self.tunes and not self.probes and not self.thoughts and self.differ():
            self.think_of_batches()

    def report(self) -> dict:
        """What was decided since the last call."""
        news = self.past.news
        self.past.news = {}
        return news

    def tell(self, batch_max: int, wait_s: float) -> None:
        """The rollout workers read it before their next batch."""
        for row in self.rows["rollout"]:
            self.counters.set(row, "tuned_batch_max", batch_max)
            self.counters.set(row, "tuned_wait_s", wait_s)

    # ---- B_max and T_max
    def differ(self) -> bool:
        """Whether costs are others than those that B_max and T_max were chosen for, and enough was
        measured to tell.
        """
        if self.chosen_at is None:
            return True
        if self.batches() < self.looked + RECHECK or self.clock() < self.looked_at + PAUSE:
            return False
        names = ("step_s", "train_each_s", "infer_fixed_s", "infer_each_s")
        pairs = [(getattr(self.chosen_at, name), getattr(self.costs(), name)) for name in names]
        pairs[2:] = [
            tuple(map(sum, zip(*pairs[2:], strict=True)))
        ]  # of an inference's two parts the sum: a line wavers
        return any(abs(new - old) > CHANGED * max(old, 1e-9) for old, new in pairs)

    def think_of_batches(self) -> None:
        costs = self.costs()
        chosen = self.chosen
        node = node_of(self.config, self.placement)
        prices = short(costs, node, self.config.env.segment)
        self.chosen_at = costs
        self.looked = self.batches()
        self.looked_at = self.clock()

        def predict() -> tuple:
            """The best B_max and T_max, their throughput, and that of the present ones."""
            present = 0.0
            if chosen:
                present = simulate(
                    replace(node, batch_max=chosen[0], batch_wait_s=chosen[1]), prices, **SIMULATE
                ).env_steps_per_s
            return *best_batches(node, prices), present

        self.thoughts.append((self.beside(predict), self.choose_batches))

    def choose_batches(self, found: tuple) -> str:
        batch_max, wait_s, rate, present = found
        if rate < (1 + WORTH) * present:
            return ""
        self.chosen = batch_max, wait_s
        most = math.ceil(self.config.env.envs / self.config.env.width / len(self.rows["rollout"]))
        at_most = min(most, batch_max) if isinstance(batch_max, int) else most
        self.tell(at_most, wait_s)
        given = self.config.rollout.batch_wait_ms
        wait_ms = 1e3 * wait_s if given == "auto" else given
        self.past.news |= {
            "batch_max": at_most,
            "batch_wait_ms": wait_ms if math.isfinite(wait_ms) else "inf",
        }
        return (
            f"rollout: batches of at most {at_most} of {most} lanes, waiting at most {wait_ms:.3g} "
            f"ms: {words(self.chosen_at)}"
        )

    # ---- the ratio
    def think_of_ratio(self, version: int) -> None:
        # iterations, as far as remembered
        done = self.trained / self.config.actor.batch
        costs = self.costs()
        seconds = self.seconds / done
        cpu_s = self.cpu_s / done
        left = self.iterations - version

        def predict():
            return seconds_at(self.choices, self.ratio, costs, cpu_s, self.cores)

        self.thoughts.append(
            (self.beside(predict), lambda found: self.choose_ratio(found, seconds, left, costs))
        )

    def choose_ratio(self, found: dict[str, float], seconds: float, left: int, costs: Costs) -> str:
        """Sets `ratio`, if another one is so much better that starting again pays.

        found: predicted seconds of an iteration at each; seconds: measured ones at the present;
        left: iterations of the run.
        """
        now = self.ratio
        past = self.past
        past.measured[now] = seconds
        before = past.measured.get(past.left, seconds)
        if seconds > (1 + WORTH) * before and (seconds - before) * left > PAYS_BACK * self.first_s:
            self.ratio = past.go_back(now)
            return (
                f"ratio {self.ratio} again: an iteration takes {seconds:.3g} s at {now}, and took "
                f"{before:.3g} s at {self.ratio}"
            )
        past.left = ""
        # What ran is known, and no prediction is to contradict it: two ratios would take turns.
        known = {
            ratio: past.measured.get(ratio, seconds * s / found[now]) for ratio, s in found.items()
        }
        others = {
            ratio: s for ratio, s in known.items() if ratio != now and ratio not in past.rejected
        }
        equal = [ratio for ratio, s in others.items() if s <= (1 + EQUAL) * min(others.values())]
        best = min(
            equal, key=lambda ratio: sum(parse_ratio(ratio)), default=now
        )  # with the fewest workers
        gain = 1 - known[best] / seconds
        saves = seconds * gain * left  # in the rest of the run
        if gain > RATIO_WORTH and saves > PAYS_BACK * self.first_s:
            past.left = now
            self.ratio = past.news["ratio"] = best
            return (
                f"ratio {best} instead of {now}: an iteration is to take {known[best]:.3g} s "
                f"instead of {seconds:.3g} s, "
                f"since {words(costs, True)}; the workers start again, in some {self.first_s:.0f} s"
            )
        if self.lines > SETTLED:
            return ""
        why = "no other is faster" if others else "no other is possible"
        if best in past.measured and best != now:
            why = f"it took {known[best]:.3g} s at the best other, {best}"
        elif best != now and saves > 0:
            why = (
                f"the best other, {best}, would save {saves:.0f} s in the rest of the run and cost "
                f"{self.first_s:.0f} s"
            )
        return f"ratio {now} stays, an iteration takes {seconds:.3g} s: {why}; {words(costs, True)}"
