"""What a run records: counters, spans, the run folder and the progress display.

    runs/NAME/  config.json  metrics.jsonl  trace.json  swimlane.png  curve.png  checkpoints/
    python -m metrics NAME        says what runs/NAME did and draws its pictures again (summary.py)

Every worker owns one row of the shared `Counters` and, with --trace, one file of spans; nobody
locks. Every moment of a worker is either work or a wait with a cause, so a bubble is the sum of
waits over the time that passed. Left out: profiling inside a stage (Perfetto shows spans; for
kernels use torch.profiler).
"""

import contextlib
import fcntl
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import psutil

from channel import Counters
from config import ROOT, Config, UserError

STAGES = ("env", "rollout", "actor")
CAUSES = (
    "action",
    "admission",
    "request",
    "weights",
    "trajectory",
    "gradient",
)  # what a worker can wait for
COLUMNS = (
    "ready",
    "time",
    "waiting",
    "since",
    "work_s",
    *(f"wait_{c}_s" for c in CAUSES),
    "env_steps",
    "episodes",
    "successes",
    "restarts",
    "requests",
    "batches",
    "batch_wait_s",
    "weight_sync_s",
    "weight_stall_s",
    "fetches",
    "stop",
    "gpu_memory_gb",
    "eval_round",
    "chunks",
    "chunk_s",
    "chunk_s_square",
    "infer_s",
    "batch_square",
    "batch_infer_s",  # sums for the moments in `tuning.costs_of`
    "tuned_batch_max",
    "tuned_wait_s",  # of a rollout worker: what the launcher has chosen; 0 before it has
)
TOTALS = ("env_steps", "restarts")  # of a whole run, also when it is resumed
# Why a chunk step is not trained on: its worker died before its trajectory was complete; its group
# was filtered (GRPO); its env's episode had ended, the others of the lane went on (GRPO,
# vectorised); the run ended, and was resumed from before it.
REASONS = {
    "restart": "lost with a worker",
    "filtered": "in filtered groups",
    "after_end": "after an episode's end",
    "resume": "under way when the run stopped",
}
HISTOGRAM = tuple(f"batch_le_{2**i}" for i in range(9))  # batches of at most 1, 2, 4 … 256 requests
# spans, and seconds, between writes to file: 30 spans take 0.4 ms, nearly all of it for the opening
FLUSH = 500
FLUSH_S = 10.0
LIMIT = 200_000  # spans that one worker records at most
GROUPS = (
    "env",
    "rollout",
    "weights",
    "actor",
)  # of a trace's rows; "weights" are transfers beside what a worker does
Span = (
    tuple[str, float, float] | tuple[str, float, float, dict]
)  # what, start and end in monotonic seconds, what of


def columns(eval_episodes: int) -> tuple[str, ...]:
    return (*COLUMNS, *HISTOGRAM, *(f"outcome_{episode}" for episode in range(eval_episodes)))


class Meter:
    """One worker's hand on its counters and its trace. `nothing` is a span that records nothing."""

    nothing = contextlib.nullcontext()

    def __init__(self, name: str, row: int, counters: Counters, trace: Path | None):
        self.name = name
        self.row = row
        self.counters = counters
        self.trace = trace
        self.spans: list[Span] = []
        self.recorded = 0
        self.flushed = time.monotonic()

    def count(self, column: str, amount: float) -> None:
        self.counters.add(self.row, column, amount)

    def set(self, column: str, value: float) -> None:
        self.counters.set(self.row, column, value)

    def ready(self) -> None:
        """Start-up is over; from now on silence counts as hanging."""
        self.set("time", time.monotonic())
        self.set("ready", 1)

    def work(self, what: str, **args) -> "Stretch":
        """args: numbers that the trace shows beside the span, such as the batch size."""
        return Stretch(self, what, "work_s", 0, args)

    def wait(self, cause: str) -> "Stretch":
        """Waiting for `cause`, one of CAUSES, which the launcher can see while it lasts."""
        return Stretch(self, "wait: " + cause, f"wait_{cause}_s", 1 + CAUSES.index(cause))

    def record(self, name: str, start: float, end: float, args: dict | None = None) -> None:
        """A span of the trace alone: what a side thread has done. Called by the worker's own
        thread.
        """
        if self.trace is not None and self.recorded < LIMIT:
            self.spans.append((name, start, end, args) if args else (name, start, end))
            self.recorded += 1
            if len(self.spans) >= FLUSH or end - self.flushed > FLUSH_S:
                self.flush()

    def flush(self) -> None:
        if self.trace is None or not self.spans:
            return
        spans = self.spans
        self.spans = []
        self.flushed = time.monotonic()
        with open(self.trace / f"{self.name}.jsonl", "a") as file:
            # The end of a line comes first: a killed worker tears its last line, and its successor
            # goes on in the same file.
            file.write("\n" + json.dumps(spans))  # all in one call takes a third of the time


class Stretch:
    """Of a worker's time: `with meter.work(…)` or `with meter.wait(…)`. contextlib's generators
    take twice as long.
    """

    __slots__ = ("meter", "name", "column", "waiting", "args", "start")

    def __init__(
        self, meter: Meter, name: str, column: str, waiting: int, args: dict | None = None
    ):
        self.meter = meter
        self.name = name
        self.column = column
        self.waiting = waiting
        self.args = args

    def __enter__(self) -> None:
        self.start = time.monotonic()
        if self.waiting:
            self.meter.set("since", self.start)
            self.meter.set("time", self.start)
            self.meter.set("waiting", self.waiting)

    def __exit__(self, error, *_) -> None:
        if error is not None:  # the worker ends in it
            return
        meter = self.meter
        end = time.monotonic()
        if self.waiting:
            meter.set("waiting", 0)
        meter.count(self.column, end - self.start)
        meter.set("time", end)
        meter.record(self.name, self.start, end, self.args)


# ---------------------------------------------------------------- run folder


class RunFolder:
    """runs/NAME. Creating one that exists is an error unless the run is resumed."""

    def __init__(self, path: Path, resume: bool, keep_spans: bool = False):
        """keep_spans: the run has just started again at another ratio, and its trace goes on."""
        self.path = path
        self.spans = path / ".spans"
        self.name = (
            path.name if path.parent == ROOT / "runs" else str(path.absolute())
        )  # what --resume takes
        self.appended: float | None = (
            None  # monotonic seconds: when the newest line was, if it is this launcher's
        )
        if path.exists() and not resume:
            how = (
                f"continue it with --resume {self.name} or"
                if any(path.glob("checkpoints/[0-9]*"))
                else "it has no checkpoint yet:"
            )
            raise UserError(f"the run folder {path} exists: {how} choose another --run")
        try:
            (path / "checkpoints").mkdir(parents=True, exist_ok=True)
            self.spans.mkdir(exist_ok=True)
        except OSError as error:
            raise UserError(
                f"cannot write the run folder {path}: {error.strerror}; choose another --run"
            ) from None
        self.lock = os.open(path, os.O_RDONLY)  # as long as this process lives
        with contextlib.suppress(OSError):  # a file system without locks
            try:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    f"run {self.name} is being trained by another process: end that one first, or "
                    "wait"
                ) from None
        for old in self.spans.iterdir():
            if not (keep_spans and old.suffix == ".jsonl"):  # actor workers must meet anew
                old.unlink()

    def append(self, line: dict) -> None:
        with open(self.path / "metrics.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
        self.appended = time.monotonic()

    def lines(self) -> list[dict]:
        return read_metrics(self.path)

    def truncate(self, version: int) -> None:
        """Drops lines after a checkpoint's version, so that a resumed run's lines follow on."""
        kept = [line for line in self.lines() if line["version"] <= version]
        self.write("metrics.jsonl", "".join(json.dumps(line) + "\n" for line in kept))

    def write(self, name: str, text: str) -> None:
        """Makes `text` a file's whole contents; whoever is killed in between leaves the old
        ones.
        """
        (self.path / f".{name}.partial").write_text(text)
        os.replace(self.path / f".{name}.partial", self.path / name)

    def finish(self) -> None:
        """trace.json, from what the workers have written."""
        spans = {}
        for file in sorted(self.spans.glob("*.jsonl")):
            spans[file.stem] = []
            for row in file.read_text().splitlines():
                with contextlib.suppress(ValueError):  # empty, or torn
                    spans[file.stem] += json.loads(row)
            file.unlink()
        shutil.rmtree(self.spans)  # also what actor workers met through
        if spans:
            write_trace(self.path / "trace.json", spans)


def read_metrics(path: Path) -> list[dict]:
    """Its whole lines: a reader may come while the newest is being written, or its writer may have
    been killed.
    """
    file = path / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def write_trace(path: Path, spans: dict[str, list[Span]]) -> None:
    """Chrome trace format, microseconds: a process per stage, a thread per worker, one complete
    event ("X") per span.

    Fetches of weights, which a side thread does while its worker infers, have rows of their own:
    "weights to rollout-0".
    """
    rows: dict[tuple[int, int, str], list[Span]] = {}  # by group, number and name
    for worker, all_of_it in spans.items():
        stage, _, rank = worker.partition("-")
        mine = rows.setdefault((GROUPS.index(stage), int(rank), worker), [])
        for span in all_of_it:
            beside = (GROUPS.index("weights"), int(rank), f"weights to {worker}")
            (rows.setdefault(beside, []) if span[0] == "fetch" else mine).append(span)
    begin = min((span[1] for row in rows.values() for span in row), default=0.0)

    def events() -> Iterator[dict]:
        for group in sorted({group for group, _, _ in rows}):
            about = {
                "ph": "M",
                "pid": group + 1,
            }  # Perfetto takes process 0 and thread 0 for the kernel's
            yield about | {"name": "process_name", "args": {"name": GROUPS[group]}}
            yield about | {"name": "process_sort_index", "args": {"sort_index": group}}
        for tid, (group, rank, name) in enumerate(sorted(rows), 1):
            where = {"pid": group + 1, "tid": tid}
            yield {"ph": "M", "name": "thread_name"} | where | {"args": {"name": name}}
            for what, start, end, *args in rows[group, rank, name]:
                times = {
                    "ts": round((start - begin) * 1e6, 1),
                    "dur": round((end - start) * 1e6, 1),
                }
                yield (
                    {"ph": "X", "name": what} | where | times | ({"args": args[0]} if args else {})
                )

    with open(path, "w") as file:
        file.write('{"displayTimeUnit": "ms", "traceEvents": [')
        file.writelines(
            f"{',' if i else ''}\n{json.dumps(event)}" for i, event in enumerate(events())
        )
        file.write("\n]}\n")


def read_trace(run: Path) -> dict[str, list[tuple[str, float, float, dict]]]:
    """The rows of a run's trace.json by name: spans (what, start, end, args) in order, in seconds;
    those without spans left out.
    """
    events = json.loads((run / "trace.json").read_text())["traceEvents"]
    names = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    spans: dict[str, list] = {name: [] for name in names.values()}
    for e in events:
        if e["ph"] == "X":
            spans[names[e["tid"]]].append(
                (e["name"], e["ts"] / 1e6, (e["ts"] + e["dur"]) / 1e6, e.get("args", {}))
            )
    return {name: sorted(rows, key=lambda row: row[1]) for name, rows in spans.items() if rows}


# ---------------------------------------------------------------- from counters to a line of
# metrics.jsonl


def snapshot(counters: Counters) -> np.ndarray:
    """The table [workers, columns] as it is now, with the part of every running wait that has
    passed.
    """
    table = counters.table.copy()
    now = time.monotonic()
    for row in table:
        count_wait(row, counters.index, now)
    return table


def count_wait(row: np.ndarray, column: dict[str, int], now: float) -> None:
    """Adds the wait that a worker is in to its row [columns]; also of one that died in it, which
    will not.
    """
    if waiting := int(row[column["waiting"]]):
        row[column[f"wait_{CAUSES[waiting - 1]}_s"]] += max(0.0, now - row[column["since"]])


class Interval:
    """What the counters gained since the last call: rates, bubbles and waits of each stage, of one
    iteration.
    """

    def __init__(self, counters: Counters, rows: dict[str, list[int]]):
        self.counters = counters
        self.rows = rows
        self.last = snapshot(counters)
        self.last_time = time.monotonic()
        cpu_fraction()

    def totals(self) -> dict:
        return {
            name: int(self.counters.table[:, self.counters.index[name]].sum()) for name in TOTALS
        }

    def measure(self) -> dict:
        now = time.monotonic()
        table = snapshot(self.counters)
        # less: read while a wait ended
        gained = np.maximum(table - self.last, 0.0)
        elapsed = max(now - self.last_time, 1e-9)
        self.last = table
        self.last_time = now
        column = self.counters.index

        def total(stage: str, name: str) -> float:
            return float(gained[self.rows[stage], column[name]].sum())

        batches = max(total("rollout", "batches"), 1.0)
        fetches = max(total("rollout", "fetches"), 1.0)
        histogram = {
            name.removeprefix("batch_le_"): int(total("rollout", name)) for name in HISTOGRAM
        }
        out = {
            "env_steps_per_s": total("env", "env_steps") / elapsed,
            "batch_size_mean": total("rollout", "requests") / batches,
            "batch_size_hist": {k: v for k, v in histogram.items() if v},
            "batch_wait_ms": 1e3 * total("rollout", "batch_wait_s") / batches,
            "weight_sync_s": total("rollout", "weight_sync_s") / fetches,
            "weight_stall_s": total("rollout", "weight_stall_s"),
            "gpu_memory_gb": float(table[:, column["gpu_memory_gb"]].sum()),
            "cpu_fraction": cpu_fraction(),
            "waits": {},
        }
        for stage in STAGES:
            waits = {
                c: total(stage, f"wait_{c}_s") / (elapsed * len(self.rows[stage])) for c in CAUSES
            }
            out[f"bubble_{stage}"] = min(1.0, sum(waits.values()))
            out["waits"] |= {f"{stage}:{c}": round(w, 4) for c, w in waits.items() if w > 0}
        return out


class Ledger:
    """Where every chunk step of a run went, also when it is resumed. In every line of metrics.jsonl

        collected = trained_once + discarded + in flight        discarded = Σ discarded_by

    in chunk steps of the whole run so far; in flight is what env workers and the actor hold, and is
    0 in the last line. And over all lines, which count chunk steps times epochs of their own batch,
    Σ trained + Σ skipped = update epochs · trained_once.
    """

    def __init__(self, earlier: dict):
        """earlier: the last line of the run that is resumed, or {}. What was in flight then is not
        trained any more.
        """
        self.collected = earlier.get("collected", 0)
        self.trained_once = earlier.get("trained_once", 0)
        self.discarded_by = dict.fromkeys(REASONS, 0) | earlier.get("discarded_by", {})
        self.discarded_by["resume"] += (
            self.collected - self.trained_once - sum(self.discarded_by.values())
        )

    def of(self, line: dict, collected: int) -> dict:
        """The totals. line: `trained_once` and `discarded_by` of its own batch, from the actor;
        collected: since this start.
        """
        self.trained_once += line["trained_once"]
        for reason, steps in line["discarded_by"].items():
            self.discarded_by[reason] += steps
        return {
            "collected": self.collected + collected,
            "trained_once": self.trained_once,
            "discarded": sum(self.discarded_by.values()),
            "discarded_by": dict(self.discarded_by),
        }


def cpu_fraction() -> float:
    """Share of time, since the last call, in which the cores that this process may use were busy,
    with whatever program.
    """
    cores = psutil.cpu_percent(percpu=True)
    mine = [cores[core] for core in os.sched_getaffinity(0) if core < len(cores)]
    return sum(mine) / max(len(mine), 1) / 100


class Evaluations:
    """When to evaluate, and with what result. Kept by the launcher, which no fault of a simulator
    touches.

    A round begins when all of the one before has been played, so that rounds never mix: every
    `eval_every`-th version, as far as there is time, and always the last one. Env workers follow
    the counter `eval_round`, and write the outcome of episode e into their `outcome_e` as 2 · round
    + success, in one store: a replaced worker sees what is left to play, and nothing counts twice.
    """

    def __init__(
        self,
        config: Config,
        tasks: tuple[str, ...],
        version: int,
        counters: Counters,
        lines: Iterable[dict] = (),
    ):
        """lines: of other workers, whose schedule goes on; a round that they only began is played
        again.
        """
        self.config = config
        self.tasks = tasks
        self.counters = counters
        # running: version evaluated
        self.round = 0
        self.running = None
        due = max(
            (
                line["eval_version"] + config.env.eval_every
                for line in lines
                if "eval_version" in line
            ),
            default=version,
        )
        self.due = min(due, config.train.iterations) if config.env.evaluates else math.inf
        self.news: dict = {}  # the newest finished round

    def begins(self, version: int) -> bool:
        """Whether a round begins now. Notes the result of the one that has just ended."""
        if self.running is not None:
            first = self.counters.index["outcome_0"]
            episodes = self.config.env.eval_episodes
            outcomes = (
                self.counters.table[:, first : first + episodes].max(axis=0) - 2 * self.round
            )  # of one worker, others are 0
            if (outcomes < 0).any():
                return False
            self.news = {
                "eval_success_rate": float(outcomes.mean()),
                "eval_episodes": episodes,
                "eval_version": self.running,
            }
            per_task = {
                task: outcomes[k :: len(self.tasks)] for k, task in enumerate(self.tasks[:episodes])
            }
            self.news["eval_per_task"] = {
                task: round(float(won.mean()), 4) for task, won in per_task.items()
            }
            self.running = None
        if version < self.due:
            return False
        last = self.config.train.iterations
        self.due = min(version + self.config.env.eval_every, last) if version < last else math.inf
        self.running = version
        self.round = self.round + 1
        self.counters.set(0, "eval_round", self.round)
        return True

    def report(self) -> dict:
        """The newest finished round, once."""
        news = self.news
        self.news = {}
        return news


# ---------------------------------------------------------------- progress display


def progress(
    iterations: int, interactive: bool
) -> tuple[Callable[[dict], None], contextlib.AbstractContextManager]:
    """A function that shows one metrics line, and the context it works in: a live panel, or plain
    lines off a terminal.
    """
    history: list[dict] = []

    def recent() -> tuple[float | None, str]:
        """Success of the last iterations, and of the last evaluation with its version."""
        rates = [line["success_rate"] for line in history[-10:] if line["success_rate"] is not None]
        held_out = [
            f"{line['eval_success_rate']:.1%} at {line['eval_version']}"
            for line in history
            if "eval_success_rate" in line
        ]
        return (sum(rates) / len(rates) if rates else None), (held_out[-1] if held_out else "–")

    if not interactive:

        def show(line: dict) -> None:
            history.append(line)

            def percent(x):
                return "  –  " if x is None else f"{x:5.1%}"

            bubbles = " ".join(f"{s} {1 - line[f'bubble_{s}']:4.0%}" for s in STAGES)
            print(
                f"iteration {line['iteration']:4d}/{iterations}  {line['env_steps_per_s']:6.0f} "
                "env steps/s  "
                f"success {percent(line['success_rate'])} (held-out {recent()[1]})  "
                f"staleness {line['staleness_mean']:.2f}  busy: {bubbles}",
                flush=True,
            )

        return show, contextlib.nullcontext()

    from rich.console import Group
    from rich.live import Live
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    live = Live(Text("starting workers …"), refresh_per_second=4)

    def show(line: dict) -> None:
        history.append(line)
        success, held_out = recent()

        def percent(x):
            return "–" if x is None else f"{x:.1%}"

        head = Table.grid(padding=(0, 3))
        head.add_row(
            f"iteration [b]{line['iteration']}[/]/{iterations}",
            f"[b]{line['env_steps_per_s']:,.0f}[/] env steps/s",
            f"success [b]{percent(success)}[/]",
            f"held-out [b]{held_out}[/]",
            f"staleness [b]{line['staleness_mean']:.2f}[/] (max {line['staleness_max']})",
            f"{line['time'] / 60:.1f} min",
        )
        bars = Table.grid(padding=(0, 2))
        for stage in STAGES:
            waits = {
                k.split(":")[1]: v
                for k, v in line["waits"].items()
                if k.startswith(stage + ":") and v >= 0.01
            }
            why = ", ".join(
                f"{cause} {share:.0%}"
                for cause, share in sorted(waits.items(), key=lambda x: -x[1])
            )
            busy = 1.0 - line[f"bubble_{stage}"]
            bars.add_row(
                f"{stage:7s}",
                ProgressBar(1.0, busy, width=40),
                f"busy {busy:4.0%}",
                f"waits for {why}" if why else "",
            )
        live.update(Group(head, bars, ProgressBar(iterations, line["iteration"], width=60)))

    return show, live


if __name__ == "__main__":
    import summary  # which reads what is recorded here

    summary.main()
