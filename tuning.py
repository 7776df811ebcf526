"""Chooses what is left to `auto`: `--ratio`, `--batch-max`, `--batch-wait-ms`, from what stages
cost while a run goes on.

    python train.py --ratio auto
    python bench.py tuning          beside the best that an exhaustive search finds

    counters → Measurement → planning.Costs → simulate → the best candidate

The launcher calls `Tuner`, which decides everything. A rollout worker reads its B_max and T_max
from its counters before the next batch. For another ratio the run starts again from a checkpoint;
`Past` is what the tuner remembers across that. docs/tuning.md says what this changes of learning.

What cannot be foreseen: how stages that share cores slow each other down (only that an iteration
takes at least its CPU seconds over all cores), what more torch threads gain (taken to divide
times), and how much faster a narrower vectorised lane steps (taken for no faster). So a ratio is
judged by what it gives: one that turns out slower than the one before, or at which workers cannot
start, is left for good.

Left out: `--placement`, numbers of envs, several machines.
"""

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

import numpy as np

from channel import Counters
from config import WORKERS, Config, completed, parse_ratio
from errors import UserError
from metrics import CAUSES, snapshot
from planning import Costs, Node, scaled
from planning.costs import all_words, shares_of, words
from planning.events import simulate
from planning.settings import node_of
from scheduler import Placement, divide, nearest
from validation import validate

Choices = dict[str, tuple[Config, Placement]]  # by ratio
Rows = dict[str, list[int]]  # of the counters, by stage

# What is measured.
PROBES = (1 / 4, 1.0, 1 / 2)  # B_max while a run warms up, of the lanes served: sizes must differ
PROBED = 12  # batches at each of them
CHUNKS = 8  # of an env worker before costs are believed: a wait is counted where it ends
FIXED = 0.2  # share of an inference independent of its size, where sizes hardly differ
MEMORY = 0.6  # what the past weighs against the newest iteration

# What is predicted.
SHARES = (1 / 8, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4, 1.0)  # B_max tried, of the lanes served
WAITS = (0.25, 0.5, 1.0, 2.0)  # T_max tried, in inferences of that size
SIMULATED = 16_000  # chunk steps of lanes behind one prediction: some 0.1 s
SIMULATE = {"iterations": 8, "warmup": 3}

# What is decided.
EQUAL = 0.005  # differences in throughput that random times make
WORTH = 0.02  # gain for which B_max and T_max change; above EQUAL, or they would wander
CHANGED = 0.1  # relative change of a cost after which B_max and T_max are looked at again
PAUSE = 30.0  # seconds between two looks, which take 0.5 s of processor time (2 s at 256 lanes)
RECHECK = 200  # inferences of a rollout worker between two looks; after fewer, costs would wander
RATIO_WORTH = 0.05  # gain for which all workers start again
PAYS_BACK = 1.5  # seconds that a new ratio must save, per second that a start takes
SETTLED = 4  # iterations at a ratio before it is judged: the first one warms up


def line_through(n: float, x: float, xx: float, y: float, xy: float) -> tuple[float, float]:
    """Returns a and b, both ≥ 0 as costs are, of the least squares y = a + b·x of n points.

    The points are given as n, Σx, Σx², Σy and Σxy."""
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
    gained: dict, fit: Iterable[float], seconds: dict[str, float], trained: float, config: Config
) -> Costs:
    """Returns stage costs of a stretch of a run. What is no waiting is work.

    gained: by stage and column, what the counters of its workers gained together; fit: n, Σsize,
    Σsize², Σseconds and Σsize·seconds of inferences; seconds: that passed, times a stage's workers;
    trained: trajectories, 0 if none was yet."""
    busy = {
        stage: max(0.0, total - sum(gained[stage, f"wait_{cause}_s"] for cause in CAUSES))
        for stage, total in seconds.items()
    }
    fixed, each = line_through(*fit)
    between = max(0.0, busy["rollout"] - gained["rollout", "infer_s"])
    chunks = max(1.0, gained["env", "chunks"])
    mean = gained["env", "chunk_s"] / chunks
    square = gained["env", "chunk_s_square"] / chunks
    steps = trained * config.env.segment * config.actor.update_epochs  # chunk steps
    fetches = max(1.0, gained["rollout", "fetches"])
    return Costs(
        step_s=busy["env"] / chunks,
        step_tail=math.sqrt(math.log(max(1.0, square / mean**2))) if mean else 0.0,
        infer_fixed_s=fixed + between / max(1.0, gained["rollout", "batches"]),
        infer_each_s=each,
        train_each_s=busy["actor"] / steps if steps else 0.0,
        fetch_s=gained["rollout", "weight_sync_s"] / fetches,
    )


@dataclass(eq=False)
class Measurement:
    """What the workers' counters gained since measuring began, the newest weighing most."""

    counters: Counters
    rows: Rows
    config: Config
    clock: Callable[[], float]  # seconds
    last: np.ndarray | None = None  # the table when it was last taken in
    taken: float = 0.0  # when that was
    gained: np.ndarray | None = None  # by every counter, since measuring began
    # Of inferences: n, Σsize, Σsize², Σseconds, Σsize·seconds.
    fit: np.ndarray = field(default_factory=partial(np.zeros, 5))
    seconds: float = 0.0  # that `gained` is of
    trained: float = 0.0  # trajectories
    cpu_s: float = 0.0  # of all workers
    batches_before: float = 0.0  # when measuring began; likewise chunks
    chunks_before: float = 0.0

    def batches(self) -> float:
        """Returns the inferences so far of the rollout worker that had the fewest."""
        return float(self.column("rollout", "batches").min())

    def chunks(self) -> float:
        """Returns the chunks so far of an env worker, on average."""
        return float(self.column("env", "chunks").mean())

    def column(self, stage: str, name: str) -> np.ndarray:
        """Returns one counter of each worker of a stage, as it is now."""
        return self.counters.table[self.rows[stage], self.counters.index[name]]

    def is_enough(self) -> bool:
        """Says whether costs can be believed."""
        served = self.batches() >= self.batches_before + PROBED
        return served and self.chunks() >= self.chunks_before + CHUNKS

    def begin(self) -> None:
        """Measures costs from here on, but for inferences, whose times are their own."""
        self.last = snapshot(self.counters)
        self.taken = self.clock()
        self.batches_before = self.batches()
        self.chunks_before = self.chunks()
        self.gained = np.zeros_like(self.last)
        self.seconds = 0.0

    def take(self, memory: float, trained: float = 0.0, cpu_s: float = 0.0) -> None:
        """Takes in what the counters gained since the last time; the past weighs `memory`."""
        now = self.clock()
        table = snapshot(self.counters)
        column = self.counters.index
        new = np.maximum(table - self.last, 0.0)  # less: read while a wait ended
        names = ("batches", "requests", "batch_square", "infer_s", "batch_infer_s")
        sums = [new[self.rows["rollout"], column[name]].sum() for name in names]
        self.fit = MEMORY * self.fit + np.array(sums)
        self.gained = memory * self.gained + new
        self.seconds = memory * self.seconds + now - self.taken
        self.trained = memory * self.trained + trained
        self.cpu_s = memory * self.cpu_s + cpu_s
        self.last = table
        self.taken = now

    def costs(self) -> Costs:
        gained = {
            (stage, name): float(self.gained[rows, column].sum())
            for stage, rows in self.rows.items()
            for name, column in self.counters.index.items()
        }
        seconds = {stage: self.seconds * len(rows) for stage, rows in self.rows.items()}
        return costs_of(gained, self.fit, seconds, self.trained, self.config)


def miniature(config: Config, placement: Placement, costs: Costs) -> tuple[Node, Costs]:
    """Returns what is simulated: as many lanes, but short iterations, so that it takes a moment."""
    node = node_of(config, placement)
    iterations = sum(SIMULATE.values())
    rounds = SIMULATED // (node.lanes * iterations * (node.batch // node.envs))
    segment = max(1, min(node.segment, max(4, rounds)))
    fetch_s = costs.fetch_s * segment / node.segment
    return replace(node, segment=segment), replace(costs, fetch_s=fetch_s)


def speeds(config: Config, placement: Placement) -> tuple[float, float]:
    """Returns how fast one rollout worker and one actor rank are, compared with another ratio."""
    if config.train.model == "emulated":  # its devices are as many as one likes
        rollout, actor = shares_of(config)
        return rollout / len(placement.rollout_devices), actor / len(placement.actor_devices)
    if placement.actor_devices[0] == "cpu":
        return float(placement.rollout_threads), float(placement.actor_threads)
    return 1.0, 1.0  # a GPU each


def options(
    config: Config, counts: tuple[int, int, int], simulator, gpus: int, cores: int
) -> Choices:
    """Returns the ratios that can run here and what each makes of the settings, the present first.

    On GPUs those that use them all; without, all of few parts and those with as many parts as
    cores. counts: of env, rollout and actor workers as far as flags say, else 0."""
    totals = [gpus] if gpus else sorted({2, 3, 4, max(4, cores)})
    pairs = [(r, total - r) for total in totals for r in range(1, total)]
    if gpus:
        pairs = [(r // math.gcd(r, a), a // math.gcd(r, a)) for r, a in pairs]
    if gpus and config.train.placement == "colocated":
        pairs = []
    found = {}
    given = dict(zip(WORKERS, counts, strict=True))
    for ratio in dict.fromkeys([config.train.parts, *(f"{r}:{a}" for r, a in pairs)]):
        try:
            _, ratio, _ = nearest(config.train.placement, ratio, gpus)
            changed = completed(config, ratio_from=ratio, **given)
            placement = divide(changed, simulator, gpus, cores)
            changed = completed(changed, **placement.workers())
            validate(changed)
        except UserError:
            continue
        found[ratio] = changed, placement
    return found


class Batching(NamedTuple):
    """How rollout workers batch, and what that is predicted to give."""

    batch_max: int | str
    wait_s: float | str
    env_steps_per_s: float
    size_mean: float


def predicted(node: Node, costs: Costs, batch_max: int | str, wait_s: float) -> Batching:
    result = simulate(replace(node, batch_max=batch_max, batch_wait_s=wait_s), costs, **SIMULATE)
    return Batching(batch_max, wait_s, result.env_steps_per_s, result.batch_size_mean)


def best_batches(node: Node, costs: Costs) -> Batching:
    """Returns the B_max and T_max with the highest throughput. What `node` fixes stays.

    Of equal ones, those whose batches are largest: they leave the device most time for others."""
    sizes = [node.batch_max]
    if node.batch_max == "auto":
        sizes = sorted({max(1, round(share * node.served)) for share in SHARES})
    found = []
    for size in sizes:
        lanes = min(node.served, size) if isinstance(size, int) else node.served
        inference = costs.infer_fixed_s + lanes * node.lane_envs * costs.infer_each_s
        waits = [node.batch_wait_s]
        if node.batch_wait_s == "auto":
            waits = [share * inference for share in WAITS]
        found += [predicted(node, costs, size, wait) for wait in waits]
    fastest = max(batching.env_steps_per_s for batching in found)
    equal = [each for each in found if each.env_steps_per_s >= (1 - EQUAL) * fastest]
    return max(equal, key=lambda each: each.size_mean)


def better_batches(node: Node, costs: Costs, present: Batching | None) -> Batching | None:
    """Returns the best batching, or None if at these costs it is not worth leaving the present."""
    best = best_batches(node, costs)
    if present:
        present = predicted(node, costs, present.batch_max, present.wait_s)
        if best.env_steps_per_s < (1 + WORTH) * present.env_steps_per_s:
            return None
    return best


def seconds_at(
    choices: Choices, now: str, costs: Costs, cpu_s: float, cores: int
) -> dict[str, float]:
    """Predicts the seconds of an iteration at each ratio, from costs measured at `now`. All cores
    together cannot go below its CPU seconds `cpu_s`."""
    rollout_now, actor_now = speeds(*choices[now])
    found = {}
    for ratio, (config, placement) in choices.items():
        rollout, actor = speeds(config, placement)
        priced = scaled(costs, rollout=rollout_now / rollout, actor=actor_now / actor)
        node, priced = miniature(config, placement, priced)
        longer = config.env.segment / node.segment
        found[ratio] = max(longer * simulate(node, priced, **SIMULATE).step_s, cpu_s / cores)
    return found


def fewest_workers(seconds: dict[str, float]) -> str:
    """Returns the fastest ratio, of equal ones that with the fewest workers; "" of none."""
    fast_enough = (1 + EQUAL) * min(seconds.values(), default=0.0)
    equal = [ratio for ratio, each in seconds.items() if each <= fast_enough]
    return min(equal, key=lambda ratio: (sum(parse_ratio(ratio)), seconds[ratio]), default="")


@dataclass
class Past:
    """What is remembered when a run starts again at another ratio."""

    left: str = ""  # the ratio before, until the present one is judged
    # Seconds of an iteration at each ratio that ran, when last judged.
    measured: dict[str, float] = field(default_factory=dict)
    # Ratios that were slower than the one before, or at which workers could not start.
    rejected: set[str] = field(default_factory=set)
    news: dict = field(default_factory=dict)  # decided since the last report, for metrics.jsonl

    def go_back(self, rejected: str) -> str:
        """Leaves a ratio for good. Returns the one before."""
        before = self.left
        self.rejected.add(rejected)
        self.news["ratio"] = before
        self.left = ""
        return before


def prices(costs: Costs) -> tuple[float, ...]:
    # Of an inference's two parts the sum: where a line starts wavers.
    return costs.step_s, costs.train_each_s, costs.infer_fixed_s + costs.infer_each_s


@dataclass(eq=False)
class Batches:
    """Chooses B_max and T_max: tries several sizes first, and looks again when costs change."""

    config: Config
    placement: Placement
    measured: Measurement
    past: Past
    probed: float = 0.0  # batches when the newest probe began
    chosen: Batching | None = None
    chosen_at: Costs | None = None  # the costs that they were last looked at for
    looked: tuple[float, float] = (0.0, 0.0)  # batches when they were, and the time

    def __post_init__(self):
        env = self.config.env
        rollout = self.config.rollout
        self.tunes = "auto" in (rollout.batch_max, rollout.batch_wait_ms)
        # Lanes that ask one rollout worker, on average.
        self.served = env.envs // env.width / len(self.measured.rows["rollout"])
        # B_max still to be tried while the run warms up, of the lanes served; 0: as it is.
        self.probes = list(PROBES) if rollout.batch_max == "auto" else [0.0] * self.tunes

    def warm_up(self) -> bool:
        """Lets batches of several sizes be served. Returns whether it is time to choose."""
        measured = self.measured
        if measured.batches() < self.probed + PROBED:
            return False
        ready = False
        if measured.last is None:  # the first batches are slow
            measured.begin()
        elif len(self.probes) > 1 or measured.is_enough():
            self.probes.pop(0)
            ready = not self.probes
        if ready:
            measured.take(1.0)
        elif self.probes and self.probes[0]:
            self.tell(max(1, round(self.probes[0] * self.served)), 0.0)
        self.probed = measured.batches()
        return ready

    def need_a_look(self) -> bool:
        """Says whether costs are others than those last looked at, and enough was measured."""
        if self.chosen_at is None:
            return True
        batches, time_s = self.looked
        measured = self.measured
        if measured.batches() < batches + RECHECK or measured.clock() < time_s + PAUSE:
            return False
        pairs = zip(prices(self.chosen_at), prices(measured.costs()), strict=True)
        return any(abs(new - old) > CHANGED * max(old, 1e-9) for old, new in pairs)

    def look(self) -> partial:
        """Returns the prediction that `choose` decides on."""
        self.chosen_at = self.measured.costs()
        self.looked = (self.measured.batches(), self.measured.clock())
        small = miniature(self.config, self.placement, self.chosen_at)
        return partial(better_batches, *small, self.chosen)

    def choose(self, best: Batching | None) -> str:
        """Takes another batching, if there is a better one. Returns what to tell."""
        if best is None:
            return ""
        self.chosen = best
        most = math.ceil(self.served)
        size = min(most, best.batch_max) if isinstance(best.batch_max, int) else most
        self.tell(size, best.wait_s)
        wait_ms = 1e3 * best.wait_s
        self.past.news["batch_max"] = size
        self.past.news["batch_wait_ms"] = wait_ms if math.isfinite(wait_ms) else "inf"
        return (
            f"rollout: batches of at most {size} of {most} lanes, waiting at most {wait_ms:.3g} "
            f"ms: {words(self.chosen_at)}"
        )

    def tell(self, batch_max: int, wait_s: float) -> None:
        """Writes what the rollout workers read before their next batch; 0 s: as it is."""
        for row in self.measured.rows["rollout"]:
            self.measured.counters.set(row, "tuned_batch_max", batch_max)
            self.measured.counters.set(row, "tuned_wait_s", wait_s)


def beside(function: Callable) -> Future:
    """Runs it in a thread that nobody waits for, not even the end of the process."""
    future = Future()
    threading.Thread(target=settle, args=(future, function), daemon=True, name="tuner").start()
    return future


def settle(future: Future, function: Callable) -> None:
    try:
        future.set_result(function())
    except Exception as error:  # raised where the result is asked for
        future.set_exception(error)


@dataclass(eq=False)
class Tuner:
    """Follows a run from the first batches on.

    The launcher calls `watch` often and `iteration` after every iteration. Once `ratio` is another
    one than that in use, the run is to start again with it."""

    choices: Choices  # of `options`, the first one being in use
    counters: Counters
    rows: Rows
    past: Past
    cores: int
    iterations: int  # of the whole run
    clock: Callable[[], float] = time.monotonic
    beside: Callable[[Callable], Future] = beside
    start_s: float = 0.0  # seconds that the workers took to their first iteration
    lines: int = 0  # iterations since the workers started
    cpu_s: float = 0.0  # that the workers had used by the last one

    def __post_init__(self):
        self.config, self.placement = next(iter(self.choices.values()))
        self.measured = Measurement(self.counters, self.rows, self.config, self.clock)
        self.batches = Batches(self.config, self.placement, self.measured, self.past)
        self.now = self.config.train.parts  # the ratio in use
        self.ratio = self.now  # the one to go on at
        self.began = self.clock()
        # Predictions under way, and what decides on them.
        self.thoughts: deque[tuple[Future, Callable[..., str]]] = deque()

    def watch(self) -> str:
        """Decides as soon as what a decision needs has been predicted. Returns what to tell."""
        if self.thoughts and self.thoughts[0][0].done():
            found, decide = self.thoughts.popleft()
            try:
                return decide(found.result())
            except RuntimeError as error:  # no reason to end a run
                return f"warning: nothing is tuned now, for in virtual time {error}"
        warming_up = self.batches.probes or self.measured.last is None
        if warming_up and self.batches.warm_up():
            self.think(self.batches.look(), self.batches.choose)
        return ""

    def iteration(self, version: int, cpu_s: float) -> None:
        """Takes in an iteration. cpu_s: that all workers have used so far."""
        self.lines += 1
        used = cpu_s - self.cpu_s
        self.cpu_s = cpu_s
        if self.ratio != self.now:  # the workers are about to leave
            return
        if self.lines == 1:  # it began before the workers were warm
            self.start_s = self.clock() - self.began
            if self.measured.last is not None:
                self.measured.take(0.0)
            self.measured.begin()
            return
        self.measured.take(MEMORY, self.config.actor.batch, used)
        train = self.config.train
        again = self.lines > SETTLED and version % train.checkpoint_every == 0
        decides = train.ratio == "auto" and train.node == 0  # for all nodes
        if decides and (self.lines == SETTLED or again):
            self.think_of_ratio(self.iterations - version)
        idle = not self.batches.probes and not self.thoughts
        if self.batches.tunes and idle and self.batches.need_a_look():
            self.think(self.batches.look(), self.batches.choose)

    def think(self, predict: Callable, decide: Callable[..., str]) -> None:
        """Has something predicted, and then decided by `watch`."""
        self.thoughts.append((self.beside(predict), decide))

    def think_of_ratio(self, left: int) -> None:
        costs = self.measured.costs()
        done = self.measured.trained / self.config.actor.batch  # iterations, as remembered
        seconds = self.measured.seconds / done
        cpu_s = self.measured.cpu_s / done
        predict = partial(seconds_at, self.choices, self.now, costs, cpu_s, self.cores)
        first = self.lines == SETTLED
        choose = partial(self.choose_ratio, seconds=seconds, left=left, costs=costs, first=first)
        self.think(predict, choose)

    def choose_ratio(
        self, found: dict[str, float], seconds: float, left: int, costs: Costs, first: bool
    ) -> str:
        """Sets `ratio`, if another one is so much better that starting again pays. Returns what to
        tell.

        found: predicted seconds of an iteration at each ratio; seconds: measured ones at the
        present; left: iterations of the run; first: whether it is judged for the first time."""
        # Go back where the present ratio turns out slower than the one before.
        now = self.now
        past = self.past
        past.measured[now] = seconds
        before = past.measured.get(past.left, seconds)
        pays = (seconds - before) * left > PAYS_BACK * self.start_s
        if seconds > (1 + WORTH) * before and pays:
            self.ratio = past.go_back(now)
            return (
                f"ratio {self.ratio} again: an iteration takes {seconds:.3g} s at {now}, and took "
                f"{before:.3g} s at {self.ratio}"
            )
        past.left = ""

        # Find the best other one. What ran is known, and no prediction is to contradict it: two
        # ratios would take turns.
        others = {
            ratio: past.measured.get(ratio, seconds * predicted / found[now])
            for ratio, predicted in found.items()
            if ratio != now and ratio not in past.rejected
        }
        best = fewest_workers(others)
        gain = 1 - others[best] / seconds if best else 0.0
        saves = seconds * gain * left  # seconds, in the rest of the run
        if gain > RATIO_WORTH and saves > PAYS_BACK * self.start_s:
            past.left = now
            past.news["ratio"] = best
            self.ratio = best
            return (
                f"ratio {best} instead of {now}: an iteration is to take {others[best]:.3g} s "
                f"instead of {seconds:.3g} s, since {all_words(costs)}; the workers start again, "
                f"in some {self.start_s:.0f} s"
            )
        if not first:
            return ""
        why = "no other is faster"
        if not others:
            why = "no other is possible"
        elif best in past.measured:
            why = f"it took {others[best]:.3g} s at the best other, {best}"
        elif saves > 0:
            why = (
                f"the best other, {best}, would save {saves:.0f} s in the rest of the run and cost "
                f"{self.start_s:.0f} s"
            )
        return f"ratio {now} stays, an iteration takes {seconds:.3g} s: {why}; {all_words(costs)}"

    def report(self) -> dict:
        """Returns what was decided since the last call."""
        news = self.past.news
        self.past.news = {}
        return news
