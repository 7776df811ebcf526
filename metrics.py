"""What a run says about itself: counters, spans, the run folder, pictures and the progress display.

    runs/NAME/  config.json  metrics.jsonl  trace.json  swimlane.png  curve.png  checkpoints/
    python -m metrics runs/NAME        draws swimlane.png and curve.png again

Every worker owns one row of the shared `Counters` and, with --trace, one file of spans; nobody locks. Every moment of a
worker is either work or a wait with a cause, so a bubble is the sum of waits over the time that passed.
Left out: profiling inside a stage (Perfetto shows spans; for kernels use torch.profiler).
"""

import contextlib
import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from channel import Counters
from config import ROOT, Config, UserError

STAGES = ("env", "rollout", "actor")
CAUSES = ("action", "admission", "request", "weights", "trajectory", "gradient")  # what a worker can wait for
COLUMNS = (
    "ready", "time", "waiting", "work_s", *(f"wait_{c}_s" for c in CAUSES), "env_steps", "episodes", "successes",
    "collected", "delivered", "discarded", "restarts", "requests", "batches", "batch_wait_s", "weight_sync_s", "weight_stall_s",
    "fetches", "stop", "gpu_memory_gb", "eval_round",
    "chunk_s", "chunk_s_square", "infer_s", "batch_square", "batch_infer_s",  # sums of what `tuning.costs_of` takes moments of
    "tuned_batch_max", "tuned_wait_s",  # of a rollout worker: what the launcher has chosen; 0 before it has
)  # fmt: skip
# Of a whole run, also when it is resumed. Chunk steps collected = trained once + discarded + in flight, which is none at the end.
TOTALS = ("env_steps", "collected", "discarded", "restarts")
HISTOGRAM = tuple(f"batch_le_{2**i}" for i in range(9))  # batches of at most 1, 2, 4 … 256 requests
FLUSH, LIMIT = 200, 200_000  # spans between writes to file, and the most that one worker records


def columns(eval_episodes: int) -> tuple[str, ...]:
    return (*COLUMNS, *HISTOGRAM, *(f"outcome_{episode}" for episode in range(eval_episodes)))


class Meter:
    """One worker's hand on its counters and its trace. `nothing` is a span that records nothing."""

    nothing = contextlib.nullcontext()

    def __init__(self, name: str, row: int, counters: Counters, trace: Path | None):
        self.name, self.row, self.counters, self.trace = name, row, counters, trace
        self.spans: list[tuple[str, float, float]] = []
        self.recorded, self.flushed = 0, time.monotonic()

    def count(self, column: str, amount: float) -> None:
        self.counters.add(self.row, column, amount)

    def set(self, column: str, value: float) -> None:
        self.counters.set(self.row, column, value)

    def ready(self) -> None:
        """Start-up is over; from now on silence counts as hanging."""
        self.set("time", time.monotonic()), self.set("ready", 1)

    @contextlib.contextmanager
    def work(self, what: str) -> Iterator[None]:
        start = time.monotonic()
        yield
        self._span(what, "work_s", start)

    @contextlib.contextmanager
    def wait(self, cause: str) -> Iterator[None]:
        """Waiting for `cause`, one of CAUSES, which the launcher can see while it lasts."""
        start = time.monotonic()
        self.set("waiting", 1 + CAUSES.index(cause)), self.set("time", start)
        yield
        self.set("waiting", 0)
        self._span("wait: " + cause, f"wait_{cause}_s", start)

    def _span(self, name: str, column: str, start: float) -> None:
        end = time.monotonic()
        self.count(column, end - start), self.set("time", end)
        if self.trace is not None and self.recorded < LIMIT:
            self.spans.append((name, start, end))
            self.recorded += 1
            if len(self.spans) >= FLUSH or end - self.flushed > 1.0:
                self.flush()

    def flush(self) -> None:
        if self.trace is None or not self.spans:
            return
        with open(self.trace / f"{self.name}.jsonl", "a") as file:
            # The end of a line comes first: a killed worker tears its last line, and its successor goes on in the same file.
            file.writelines(f'\n["{n}",{s:.6f},{e:.6f}]' for n, s, e in self.spans)
        self.spans, self.flushed = [], time.monotonic()


# ---------------------------------------------------------------- run folder


class RunFolder:
    """runs/NAME. Creating one that exists is an error unless the run is resumed."""

    def __init__(self, path: Path, resume: bool):
        self.path, self.spans = path, path / ".spans"
        self.name = path.name if path.parent == ROOT / "runs" else str(path)  # what --resume takes
        self.appended: float | None = None  # monotonic seconds: when the newest line was, if it is this launcher's
        if path.exists() and not resume:
            raise UserError(f"the run folder {path} exists: continue it with --resume {self.name} or choose another --run")
        try:
            (path / "checkpoints").mkdir(parents=True, exist_ok=True)
            self.spans.mkdir(exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write the run folder {path}: {error.strerror}; choose another --run") from None
        for old in self.spans.iterdir():
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
        (self.path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))

    def finish(self, draw: bool = True) -> None:
        """trace.json and the pictures, from what the workers have written."""
        spans = {}
        for file in sorted(self.spans.glob("*.jsonl")):
            rows = file.read_text().splitlines()
            spans[file.stem] = [json.loads(row) for row in rows if row.endswith("]")]
            file.unlink()
        shutil.rmtree(self.spans)  # also what actor workers met through
        if spans:
            write_trace(self.path / "trace.json", spans)
        if draw:
            draw_all(self.path)


def read_metrics(path: Path) -> list[dict]:
    file = path / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def write_trace(path: Path, spans: dict[str, list]) -> None:
    """Chrome trace format, microseconds: one row per worker, one complete event ("X") per span."""
    begin = min((rows[0][1] for rows in spans.values() if rows), default=0.0)
    order = sorted(spans, key=lambda name: (STAGES.index(name.split("-")[0]), name))
    with open(path, "w") as file:
        file.write('{"displayTimeUnit": "ms", "traceEvents": [\n')
        for tid, name in enumerate(order):
            file.write(json.dumps({"ph": "M", "name": "thread_name", "pid": 0, "tid": tid, "args": {"name": name}}))
            for what, start, end in spans[name]:
                event = {"ph": "X", "name": what, "pid": 0, "tid": tid, "ts": round((start - begin) * 1e6, 1)}
                file.write(",\n" + json.dumps(event | {"dur": round((end - start) * 1e6, 1)}))
            file.write("\n" if tid == len(order) - 1 else ",\n")
        file.write("]}\n")


# ---------------------------------------------------------------- pictures


COLOURS = {
    "step": "#4c9f70", "render": "#8fc1a3", "reset": "#c5e0cf", "infer": "#3b7dd8", "train": "#d9822b", "publish": "#8e5bb5",
    "optimizer": "#f0b775", "swap": "#8e5bb5", "checkpoint": "#777777",
}  # fmt: skip


def draw_swimlane(run: Path, seconds: float = 6.0) -> None:
    """One row per worker over a window of `seconds` in the middle of the run; waiting is white."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    events = json.loads((run / "trace.json").read_text())["traceEvents"]
    names = {e["tid"]: e["args"]["name"] for e in events if e["ph"] == "M"}
    spans = [e for e in events if e["ph"] == "X"]
    if not spans:
        return
    end = max(e["ts"] + e["dur"] for e in spans) / 1e6
    first = max(0.0, min(0.6 * end, end - seconds))
    figure, axes = plt.subplots(figsize=(12, 0.45 * len(names) + 1.3), layout="constrained")
    seen = {}
    for tid in names:
        for what in COLOURS:
            mine = [e for e in spans if e["tid"] == tid and e["name"] == what]
            bars = [(e["ts"] / 1e6, e["dur"] / 1e6) for e in mine if first <= e["ts"] / 1e6 <= first + seconds]
            if bars:
                seen[what] = axes.broken_barh(bars, (len(names) - 1 - tid - 0.4, 0.8), color=COLOURS[what], linewidth=0)
    axes.set_yticks(range(len(names)), [names[t] for t in sorted(names, reverse=True)])
    axes.set_xlim(first, first + seconds), axes.set_xlabel("seconds; white is waiting")
    if seen:
        axes.legend(seen.values(), seen.keys(), loc="upper center", bbox_to_anchor=(0.5, 1.0 + 0.9 / len(names)), ncol=9)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(run / "swimlane.png", dpi=110)
    plt.close(figure)


def draw_curve(run: Path) -> None:
    """Success of training episodes and of evaluations against minutes, and env steps per second."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    lines = read_metrics(run)
    if not lines:
        return
    minutes = np.array([line["time"] for line in lines]) / 60
    success = np.array([np.nan if line["success_rate"] is None else line["success_rate"] for line in lines])
    evaluated = [(line["time"] / 60, line["eval_success_rate"]) for line in lines if line.get("eval_success_rate") is not None]
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    window = min(10, len(lines))
    sums = np.convolve(np.nan_to_num(success), np.ones(window), "valid")
    counts = np.convolve(~np.isnan(success), np.ones(window), "valid")
    axes.plot(minutes, success, color="#3b7dd8", alpha=0.25, linewidth=1)
    axes.plot(minutes[window - 1 :], sums / np.maximum(counts, 1), color="#3b7dd8", label=f"training, mean of {window} iterations")
    if evaluated:
        axes.plot(*zip(*evaluated, strict=True), "o-", color="#d9822b", label="evaluation, held-out seeds")
    axes.set_ylim(0, 1), axes.set_xlabel("minutes"), axes.set_ylabel("success rate"), axes.grid(alpha=0.3)
    axes.legend(loc="lower right", frameon=False)
    figure.savefig(run / "curve.png", dpi=110)
    plt.close(figure)


def draw_all(run: Path) -> None:
    if (run / "trace.json").is_file():
        draw_swimlane(run)
    draw_curve(run)


# ---------------------------------------------------------------- from counters to a line of metrics.jsonl


class Interval:
    """What the counters gained since the last call: rates, bubbles and waits of each stage, of one iteration."""

    def __init__(self, counters: Counters, rows: dict[str, list[int]]):
        self.counters, self.rows = counters, rows
        self.last, self.last_time = counters.table.copy(), time.monotonic()

    def totals(self) -> dict:
        return {name: int(self.counters.table[:, self.counters.index[name]].sum()) for name in TOTALS}

    def measure(self) -> dict:
        now, table = time.monotonic(), self.counters.table.copy()
        gained, elapsed = table - self.last, max(now - self.last_time, 1e-9)
        self.last, self.last_time = table, now
        column = self.counters.index

        def total(stage: str, name: str) -> float:
            return float(gained[self.rows[stage], column[name]].sum())

        batches, fetches = max(total("rollout", "batches"), 1.0), max(total("rollout", "fetches"), 1.0)
        histogram = {name.removeprefix("batch_le_"): int(total("rollout", name)) for name in HISTOGRAM}
        out = {
            "env_steps_per_s": total("env", "env_steps") / elapsed,
            "batch_size_mean": total("rollout", "requests") / batches,
            "batch_size_hist": {k: v for k, v in histogram.items() if v},
            "batch_wait_ms": 1e3 * total("rollout", "batch_wait_s") / batches,
            "weight_sync_s": total("rollout", "weight_sync_s") / fetches,
            "weight_stall_s": total("rollout", "weight_stall_s"),
            "gpu_memory_gb": float(table[:, column["gpu_memory_gb"]].sum()),
            "waits": {},
        }
        for stage in STAGES:
            waits = {c: total(stage, f"wait_{c}_s") / (elapsed * len(self.rows[stage])) for c in CAUSES}
            out[f"bubble_{stage}"] = min(1.0, sum(waits.values()))
            out["waits"] |= {f"{stage}:{c}": round(w, 4) for c, w in waits.items() if w > 0}
        return out


class Evaluations:
    """When to evaluate, and with what result. Kept by the launcher, which no fault of a simulator touches.

    A round begins when all of the one before has been played, so that rounds never mix: every `eval_every`-th version, as far as
    there is time, and always the last one. Env workers follow the counter `eval_round`, and write the outcome of episode e into
    their `outcome_e` as 2 · round + success, in one store: a replaced worker sees what is left to play, and nothing counts twice.
    """

    def __init__(self, config: Config, tasks: tuple[str, ...], version: int, counters: Counters):
        self.config, self.tasks, self.counters = config, tasks, counters
        self.round, self.due, self.running = 0, version if config.env.evaluates else math.inf, None  # running: version evaluated
        self.news: dict = {}  # the newest finished round

    def begins(self, version: int) -> bool:
        """Whether a round begins now. Notes the result of the one that has just ended."""
        if self.running is not None:
            first, episodes = self.counters.index["outcome_0"], self.config.env.eval_episodes
            outcomes = self.counters.table[:, first : first + episodes].max(axis=0) - 2 * self.round  # of one worker, others are 0
            if (outcomes < 0).any():
                return False
            self.news = {"eval_success_rate": float(outcomes.mean()), "eval_episodes": episodes, "eval_version": self.running}
            per_task = {task: outcomes[k :: len(self.tasks)] for k, task in enumerate(self.tasks[:episodes])}
            self.news["eval_per_task"] = {task: round(float(won.mean()), 4) for task, won in per_task.items()}
            self.running = None
        if version < self.due:
            return False
        last = self.config.train.iterations
        self.due = min(version + self.config.env.eval_every, last) if version < last else math.inf
        self.running, self.round = version, self.round + 1
        self.counters.set(0, "eval_round", self.round)
        return True

    def report(self) -> dict:
        """The newest finished round, once."""
        news, self.news = self.news, {}
        return news


# ---------------------------------------------------------------- what a collapse announces itself by

# key of a metrics line, when it is unhealthy, and what to say; rules of thumb, each from the source named
SIGNS = (
    (
        "approx_kl",
        lambda x: x > 0.1,
        "the policy moves far in one batch (KL {:.2g}, healthy below 0.1): lower --lr or --update-epochs",
    ),
    ("clip_fraction", lambda x: x > 0.4, "{:.0%} of samples are clipped and teach nothing (healthy below 40 %): lower --lr"),
    ("masked_fraction", lambda x: x > 0.05, "{:.0%} of samples are too stale to be used: lower --max-staleness or --lr"),
    ("kl_at_3_or_more", lambda x: x > 0.2, "samples 3 and more versions old differ by KL {:.2g}: lower --max-staleness"),
    ("explained_variance", lambda x: x < -0.5, "the critic is worse than a constant (explained variance {:.2f}): raise --value-lr"),
    (
        "grad_norm",
        lambda x: x > 50.0,
        "the gradient's norm is {:.0f} before clipping: lower --lr, and look at the episodes' rewards",
    ),
    ("filtered_fraction", lambda x: x > 0.8, "{:.0%} of steps are in groups that all succeed or all fail: choose other --tasks"),
)
PATIENCE = 3  # iterations in a row before anything is said, and ten times as many before it is said again


class Warnings:
    """Says in plain words when a diagnostic has left its healthy range for PATIENCE iterations, and what to change."""

    def __init__(self):
        self.ill: dict[str, int] = {}

    def of(self, line: dict) -> list[str]:
        found = []
        for key, unhealthy, words in SIGNS:
            value = line.get(key)
            self.ill[key] = self.ill.get(key, 0) + 1 if value is not None and unhealthy(value) else 0
            if self.ill[key] % (10 * PATIENCE) == PATIENCE:
                found.append(f"warning: {words.format(value)}")
        return found


# ---------------------------------------------------------------- progress display


def progress(iterations: int, interactive: bool) -> tuple[Callable[[dict], None], contextlib.AbstractContextManager]:
    """A function that shows one metrics line, and the context it works in: a live panel, or plain lines off a terminal."""
    history: list[dict] = []

    def recent() -> tuple[float | None, float | None]:
        rates = [line["success_rate"] for line in history[-10:] if line["success_rate"] is not None]
        evaluated = [line["eval_success_rate"] for line in history if line.get("eval_success_rate") is not None]
        return (sum(rates) / len(rates) if rates else None), (evaluated[-1] if evaluated else None)

    if not interactive:

        def show(line: dict) -> None:
            history.append(line)
            percent = lambda x: "  –  " if x is None else f"{x:5.1%}"  # noqa: E731
            bubbles = " ".join(f"{s} {1 - line[f'bubble_{s}']:4.0%}" for s in STAGES)
            print(
                f"iteration {line['iteration']:4d}/{iterations}  {line['env_steps_per_s']:6.0f} env steps/s  "
                f"success {percent(line['success_rate'])} (held-out {percent(recent()[1])})  "
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
        percent = lambda x: "–" if x is None else f"{x:.1%}"  # noqa: E731
        head = Table.grid(padding=(0, 3))
        head.add_row(
            f"iteration [b]{line['iteration']}[/]/{iterations}", f"[b]{line['env_steps_per_s']:,.0f}[/] env steps/s",
            f"success [b]{percent(success)}[/]", f"held-out [b]{percent(held_out)}[/]",
            f"staleness [b]{line['staleness_mean']:.2f}[/] (max {line['staleness_max']})", f"{line['time'] / 60:.1f} min",
        )  # fmt: skip
        bars = Table.grid(padding=(0, 2))
        for stage in STAGES:
            waits = {k.split(":")[1]: v for k, v in line["waits"].items() if k.startswith(stage + ":") and v >= 0.01}
            why = ", ".join(f"{cause} {share:.0%}" for cause, share in sorted(waits.items(), key=lambda x: -x[1]))
            busy = 1.0 - line[f"bubble_{stage}"]
            bars.add_row(f"{stage:7s}", ProgressBar(1.0, busy, width=40), f"busy {busy:4.0%}", f"waits for {why}" if why else "")
        live.update(Group(head, bars, ProgressBar(iterations, line["iteration"], width=60)))

    return show, live


if __name__ == "__main__":
    if len(sys.argv) != 2 or not (Path(sys.argv[1]) / "metrics.jsonl").is_file():
        sys.exit("usage: python -m metrics runs/NAME   (a folder that holds metrics.jsonl)")
    draw_all(Path(sys.argv[1]))
