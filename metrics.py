"""Measures what workers do: counters in shared memory, spans of time, and what follows from them.

    python -m metrics NAME        says what runs/NAME did and draws its pictures again (summary.py)

Every worker writes one row of the shared `Counters` and, with --trace, one file of spans; nobody
locks. Every moment of a worker is work, or a wait with a cause. So a stage's bubble is the sum of
its waits over the time that passed. docs/metrics.md explains every key of metrics.jsonl. Left out:
profiling inside a stage (Perfetto shows the spans; torch.profiler shows kernels).
"""

import json
import math
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

import numpy as np
import psutil
from typing_extensions import TypedDict

from channel import Counters
from run_folder import Span

STAGES = ("env", "rollout", "actor")
# What a worker can wait for. The column "waiting" holds 1 + the place in this list, or 0.
CAUSES = ("action", "admission", "request", "weights", "trajectory", "gradient")
# Of each cause: the span's name, the column of its seconds, and its number in "waiting".
WAITS = {cause: (f"wait: {cause}", f"wait_{cause}_s", i) for i, cause in enumerate(CAUSES, 1)}
# Numbers of inferences with at most 1, 2, 4 … 256 requests; the last one counts larger ones too.
HISTOGRAM = tuple(f"batch_le_{2**i}" for i in range(9))
COLUMNS = (
    # Every worker. "time": its last sign of life, "since": the beginning of its running wait, both
    # in monotonic seconds; "saving": 1 while it writes a checkpoint. The launcher writes "restarts"
    # and, into row 0, "stop", "eval_round", when the run "began", and the newest version whose
    # line is "written".
    *("ready", "time", "waiting", "since", "saving", "restarts", "gpu_memory_gb"),
    *("stop", "eval_round", "began", "written"),
    *("work_s", *(f"wait_{cause}_s" for cause in CAUSES)),
    # Env workers. The chunk columns are sums over lanes' chunks, for the costs in tuning.py.
    *("env_steps", "episodes", "successes", "chunks", "chunk_s", "chunk_s_square"),
    # Rollout workers. The square and the product are for the costs in tuning.py, which writes the
    # "tuned" columns: B_max and T_max, or 0 before it has chosen.
    *("requests", "batches", "batch_wait_s", "infer_s", "batch_square", "batch_infer_s"),
    *("weight_sync_s", "weight_stall_s", "fetches", "tuned_batch_max", "tuned_wait_s"),
    *HISTOGRAM,
)
# Counters that go on over a whole run, also when it is resumed.
TOTALS = ("env_steps", "restarts")
# Figures of every node that a line has beside those of all: they tell a slow node from a fast one.
NODE_FIGURES = ("env_steps_per_s", *(f"bubble_{stage}" for stage in STAGES))
NODE_FIGURES += ("cpu_fraction", "rss_gb", "gpu_memory_gb")
# Why a chunk step is never trained on, and how a summary says so: its worker died before its
# trajectory was complete; its group was filtered (GRPO); it was not drawn; its env's episode had
# ended while others of its lane went on (GRPO, vectorised); the run stopped before it was trained.
REASONS = {
    "restart": "lost with a worker",
    "filtered": "in filtered groups",
    "undrawn": "not drawn (--chunk-share)",
    "after_end": "after an episode's end",
    "resume": "under way when the run stopped",
}
FLUSH = 500  # spans between two writes to a file: opening it takes nearly 0.4 ms
FLUSH_S = 10.0  # seconds between them
LIMIT = 200_000  # spans that one worker records at most


def columns(eval_episodes: int) -> tuple[str, ...]:
    """Returns the names of the counters' columns."""
    return (*COLUMNS, *(f"outcome_{episode}" for episode in range(eval_episodes)))


@dataclass(eq=False)
class Meter:
    """Writes one worker's row of the counters, and its spans."""

    name: str  # "env-0"
    row: int
    counters: Counters
    trace: Path | None  # the folder for spans
    spans: list[Span] = field(default_factory=list)  # not yet in the file
    recorded: int = 0
    flushed: float = field(default_factory=time.monotonic)

    def count(self, column: str, amount: float) -> None:
        self.counters.add(self.row, column, amount)

    def set(self, column: str, value: float) -> None:
        self.counters.set(self.row, column, value)

    def alive(self) -> None:
        """Gives a sign of life. A ready worker without one for --timeout-s counts as hung."""
        self.counters.set(self.row, "time", time.monotonic())

    def ready(self) -> None:
        """Ends start-up: from now on silence counts as hanging."""
        self.alive()
        self.set("ready", 1)

    def restarts(self) -> int:
        """Returns how often this worker was replaced so far: 0 for the first process."""
        return int(self.counters.get(self.row, "restarts"))

    def work(self, what: str, **args) -> "Stretch":
        """Measures work: `with meter.work("infer", batch=8)`. The trace shows args beside it."""
        return Stretch(self, what, "work_s", 0, args)

    def wait(self, cause: str) -> "Stretch":
        """Measures a wait for one of CAUSES, which the launcher can see while it lasts."""
        return Stretch(self, *WAITS[cause], None)

    def record(self, name: str, start: float, end: float, args: dict | None = None) -> None:
        """Adds a span to the trace alone. The worker's own thread calls it for its side threads."""
        if self.trace is None or self.recorded >= LIMIT:
            return
        self.spans.append((name, start, end, args) if args else (name, start, end))
        self.recorded += 1
        if len(self.spans) >= FLUSH or end - self.flushed > FLUSH_S:
            self.flush()

    def flush(self) -> None:
        """Appends the spans to this worker's file, as one line."""
        if self.trace is None or not self.spans:
            return
        # Take them first: whoever is told to leave while it writes flushes once more.
        spans = self.spans
        self.spans = []
        self.flushed = time.monotonic()
        # A killed worker may tear its last line, and its successor goes on in the same file: so a
        # line begins with its line break. One write of all takes a third of the time of many.
        try:
            with open(self.trace / f"{self.name}.jsonl", "a") as file:
                file.write("\n" + json.dumps(spans))
        except OSError:  # a full disk is no reason to stop working
            self.trace = None


@dataclass(eq=False, slots=True)
class Stretch:
    """Measures a `with` block of a hot loop. contextlib's generators would take twice as long."""

    meter: Meter
    name: str
    column: str  # to which the seconds are added
    waiting: int  # 1 + the cause's place in CAUSES, or 0
    args: dict | None
    start: float = 0.0

    def __enter__(self) -> None:
        self.start = time.monotonic()
        if self.waiting:
            meter = self.meter
            meter.counters.set(meter.row, "since", self.start)
            meter.counters.set(meter.row, "time", self.start)
            meter.counters.set(meter.row, "waiting", self.waiting)

    def __exit__(self, error, *_) -> None:
        if error is not None:  # the worker ends in this block, and its row keeps the wait
            return
        end = time.monotonic()
        meter = self.meter
        if self.waiting:
            meter.counters.set(meter.row, "waiting", 0)
        meter.counters.add(meter.row, self.column, end - self.start)
        meter.counters.set(meter.row, "time", end)
        meter.record(self.name, self.start, end, self.args)


def snapshot(counters: Counters) -> np.ndarray:
    """Returns the table [workers, columns] as it is now, running waits included."""
    table = counters.table.copy()
    now = time.monotonic()
    for row in table:
        count_wait(row, counters.index, now)
    return table


def count_wait(row: np.ndarray, column: dict[str, int], now: float) -> None:
    """Adds the wait that a worker is in, or died in, to its row [columns]."""
    if waiting := int(row[column["waiting"]]):
        row[column[f"wait_{CAUSES[waiting - 1]}_s"]] += max(0.0, now - row[column["since"]])


class Measured(TypedDict):
    """What one node's launcher measures between two lines of metrics.jsonl, in sums, so that those
    of all nodes can be added. It travels as JSON."""

    elapsed: float  # seconds
    workers: dict[str, int]  # of each stage
    gained: dict[str, dict[str, float]]  # stage → column of the counters → gain
    gpu_memory_gb: float
    cpu_fraction: float
    rss_gb: float
    cpu_s: float  # seconds of processors that this node's processes have used so far


class Interval:
    """Tells what the counters gained since it was last asked, which is once an iteration."""

    def __init__(self, counters: Counters, rows: dict[str, list[int]]):
        self.counters = counters
        self.rows = rows  # of each stage's workers
        self.last = snapshot(counters)
        self.last_time = time.monotonic()
        cpu_fraction()

    def measure(self, rss_gb: float, cpu_s: float) -> Measured:
        """Ends the interval and returns what this node's launcher measured in it. rss_gb, cpu_s:
        what its processes hold, and have used so far."""
        now = time.monotonic()
        table = snapshot(self.counters)
        # A wait that ended while it was read may have lost a little.
        gained = np.maximum(table - self.last, 0.0)
        elapsed = max(now - self.last_time, 1e-9)
        self.last = table
        self.last_time = now
        column = self.counters.index
        return {
            "elapsed": elapsed,
            "workers": {stage: len(rows) for stage, rows in self.rows.items()},
            "gained": {
                stage: {name: float(gained[rows, column[name]].sum()) for name in COLUMNS}
                for stage, rows in self.rows.items()
            },
            "gpu_memory_gb": float(table[:, column["gpu_memory_gb"]].sum()),
            "cpu_fraction": cpu_fraction(),
            "rss_gb": rss_gb,
            "cpu_s": cpu_s,
        }


def gain(measured: list[Measured], stage: str, name: str) -> float:
    """Returns what a column gained, summed over a stage's workers on these nodes."""
    return sum(one["gained"][stage][name] for one in measured)


def figures(by_node: dict[int, Measured]) -> dict:
    """Returns the launchers' part of a line of metrics.jsonl (docs/metrics.md).

    With several nodes the line also has some figures of each, in "nodes"."""
    measured = [by_node[node] for node in sorted(by_node)]
    batches = max(gain(measured, "rollout", "batches"), 1.0)
    fetches = max(gain(measured, "rollout", "fetches"), 1.0)
    hist = {name.removeprefix("batch_le_"): gain(measured, "rollout", name) for name in HISTOGRAM}
    out = {
        "env_steps_per_s": sum(
            gain([one], "env", "env_steps") / one["elapsed"] for one in measured
        ),
        "batch_size_mean": gain(measured, "rollout", "requests") / batches,
        "batch_size_hist": {size: int(count) for size, count in hist.items() if count},
        "batch_wait_ms": 1e3 * gain(measured, "rollout", "batch_wait_s") / batches,
        "weight_sync_s": gain(measured, "rollout", "weight_sync_s") / fetches,
        "weight_stall_s": gain(measured, "rollout", "weight_stall_s"),
        "gpu_memory_gb": sum(one["gpu_memory_gb"] for one in measured),
        "cpu_fraction": fmean(one["cpu_fraction"] for one in measured),
        "rss_gb": sum(one["rss_gb"] for one in measured),
        "waits": {},
    }
    for stage in STAGES:
        time_of_all = sum(one["elapsed"] * one["workers"][stage] for one in measured)
        waits = {cause: gain(measured, stage, f"wait_{cause}_s") / time_of_all for cause in CAUSES}
        out[f"bubble_{stage}"] = min(1.0, sum(waits.values()))
        for cause, share in waits.items():
            if share > 0:
                out["waits"][f"{stage}:{cause}"] = round(share, 4)
    if len(measured) > 1:
        out["nodes"] = {str(node): of_node(by_node[node]) for node in sorted(by_node)}
    return out


def of_node(measured: Measured) -> dict[str, float]:
    """Returns what tells a slow node from a fast one: few numbers, short, for there may be many."""
    alone = figures({0: measured})
    gradient = alone["waits"].get("actor:gradient", 0.0)
    restarts = sum(gain([measured], stage, "restarts") for stage in STAGES)
    own = {name: round(alone[name], 4) for name in NODE_FIGURES}
    return own | {"wait_gradient": gradient, "restarts": int(restarts)}


def cpu_fraction() -> float:
    """Returns the share of time since the last call that this process's cores were busy."""
    cores = psutil.cpu_percent(percpu=True)
    mine = [cores[core] for core in os.sched_getaffinity(0) if core < len(cores)]
    return sum(mine) / max(len(mine), 1) / 100


def wilson(successes: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Computes the 95 % score interval of a proportion (Wilson 1927)."""
    p = successes / n
    scale = 1.0 + z**2 / n
    middle = (p + z**2 / (2 * n)) / scale
    half = z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2)) / scale
    return max(0.0, middle - half), min(1.0, middle + half)


class Ledger:
    """Accounts for every chunk step of a run, also when it is resumed. Two identities hold.
    The first actor rank keeps it, because a checkpoint holds its newest lines.

    1. In every line of metrics.jsonl, in chunk steps of the whole run so far:
           collected = trained_once + discarded + in flight        discarded = Σ discarded_by
       In flight is what env workers and the actor hold. It is 0 in the last line.
    2. In every line, and so over all of them: a batch's chunk steps, times its update epochs, were
       trained, or skipped by --kl-stop:
           trained + skipped = update epochs · (gain of trained_once)

    `add` raises RuntimeError where one of them does not hold."""

    def __init__(self, lines: list[dict], epochs: int):
        """lines: of the run that is resumed, or []. epochs: --update-epochs."""
        self.lines = lines  # those that the launcher may not have written yet, and the newest one
        self.earlier = earlier = lines[-1] if lines else {}
        self.epochs = epochs
        self.collected = earlier.get("collected", 0)
        self.trained_once = earlier.get("trained_once", 0)
        self.discarded_by = dict.fromkeys(REASONS, 0) | earlier.get("discarded_by", {})
        # What was in flight will never be trained.
        in_flight = self.collected - self.trained_once - sum(self.discarded_by.values())
        self.discarded_by["resume"] += in_flight

    def add(self, line: dict) -> dict:
        """Returns the totals after one more batch. line: the actors', of this batch, where totals
        are since the workers started."""
        self.trained_once += line["trained_once"]
        for reason, steps in line["discarded_by"].items():
            self.discarded_by[reason] += steps
        out = {
            "collected": self.collected + int(line["collected"]),
            "trained_once": self.trained_once,
            "discarded": sum(self.discarded_by.values()),
            "discarded_by": dict(self.discarded_by),
        }
        of = f"the ledger does not balance: of iteration {line['iteration']},"
        if out["collected"] < out["trained_once"] + out["discarded"]:
            raise RuntimeError(
                f"{of} {out['collected']} chunk steps were collected in all, but "
                f"{out['trained_once']} trained and {out['discarded']} discarded"
            )
        due = self.epochs * line["trained_once"]
        if line["trained"] + line["skipped"] != due:
            raise RuntimeError(
                f"{of} {line['trained']} samples were trained and {line['skipped']} skipped, but "
                f"{self.epochs} epochs of {line['trained_once']} chunk steps are {due}"
            )
        return out

    def enter(self, line: dict, counters: Counters) -> None:
        """Completes the actors' line of one batch by the totals of the run, and keeps it until the
        launcher has written it."""
        line |= self.add(line)
        line["time"] = time.monotonic() - counters.get(0, "began")
        for name in TOTALS:
            line[name] = self.earlier.get(name, 0) + int(line[name])
        written = counters.get(0, "written")
        self.lines = [one for one in self.lines if one["version"] > written] + [line]


if __name__ == "__main__":
    import html_report  # it shows what is recorded here

    html_report.main()
