"""What recording spans costs: the same run with --trace and with --no-trace, and one span by
itself.

    python bench.py tracing --setting emulated
    python bench.py tracing --setting embedded

Preset full; runs with and without take turns, `--repeats` of each, and ratios are of the medians,
traced to untraced, after WARMUP iterations:

    rate_ratio            env steps/s
    cpu_ratio             CPU seconds per env step
    us_per_span           what a span costs more where it is recorded, writing it to file included
    meter_us              what work and waits cost anyhow, for bubbles are always counted
    spans_per_s           of all workers; spans_per_s_busiest: of the one that records most
    cost_fraction         us_per_span × spans_per_s_busiest: the share of its time that this worker
                          spends on it
    cost_fraction_of_cpu  us_per_span × spans_per_s of the CPU time that the run uses

On a machine that other programs use as well, ratios between runs scatter by more than tracing
costs; the last two do not. They hold for spans in a row, whose code and counters lie in caches;
after a unit of work that has used the caches up a span takes longer. Left out: writing trace.json
and drawing swimlane.png, which come after a run.
"""

import statistics
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import metrics
from benchmarks import ladder
from channel import Counters
from run_folder import read_trace

WARMUP = ladder.warmup("full")
SPANS = 20_000  # of one repetition, at intervals as short as they can be
ARGS = {"batch": 12, "version": 34}  # as an inference's


def span_us(repeats: int) -> tuple[float, float]:
    """Microseconds of a span that is not recorded, and how many more it takes where it is. Medians
    over repetitions.
    """
    counters = Counters(1, metrics.columns(0))
    taken = {False: [], True: []}
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        for _ in range(repeats):
            for trace in (False, True):  # in turns, so that what disturbs one disturbs both
                meter = metrics.Meter("env-0", 0, counters, Path(folder) if trace else None)
                start = time.process_time()
                for _ in range(SPANS):
                    with meter.work("infer", **ARGS):
                        pass
                meter.flush()
                taken[trace].append((time.process_time() - start) / SPANS * 1e6)
    plain, traced = (statistics.median(taken[trace]) for trace in (False, True))
    return plain, traced - plain


class Run(NamedTuple):
    """What one run of the ladder's preset `full` left behind."""

    lines: list[dict]  # of metrics.jsonl
    used: dict[int, float]  # CPU seconds when there were n lines
    spans: dict[str, list]  # of trace.json, by row; {} where it was not traced


def run_once(setting: str, ratio: str, iterations: int, trace: bool) -> Run:
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        file = Path(folder) / "trace.json" if trace else None
        lines, used, _ = ladder.run_preset(setting, "full", ratio, WARMUP + iterations, file)
        return Run(lines, used, read_trace(Path(folder)) if trace else {})


def rates(run: Run) -> tuple[float, float, float]:
    """Env steps/s, CPU seconds per env step and CPU seconds per second of the iterations after the
    warm-up.
    """
    first = run.lines[WARMUP - 1]
    last = run.lines[-1]
    env_steps = last["env_steps"] - first["env_steps"]
    seconds = last["time"] - first["time"]
    cpu_s = run.used[len(run.lines)] - run.used[WARMUP]
    return env_steps / seconds, cpu_s / env_steps, cpu_s / seconds


def spans_per_s(run: Run) -> tuple[float, float]:
    """Of all workers, and of the one that records most. A fetch is recorded by the worker that it
    was for, but is rare.
    """
    counts = [len(rows) for rows in run.spans.values()]
    seconds = max(rows[-1][2] for rows in run.spans.values()) - min(
        rows[0][1] for rows in run.spans.values()
    )
    return sum(counts) / seconds, max(counts) / seconds


def row(setting: str, traced: list[Run], untraced: list[Run], us: float, meter_us: float) -> dict:
    """us, meter_us: of `span_us`."""

    def middle(runs, figure):
        return statistics.median(rates(run)[figure] for run in runs)

    every, busiest = (
        statistics.median(spans_per_s(run)[figure] for run in traced) for figure in (0, 1)
    )
    return {
        "setting": setting,
        "env_steps_per_s": middle(traced, 0),
        "env_steps_per_s_untraced": middle(untraced, 0),
        "rate_ratio": middle(traced, 0) / middle(untraced, 0),
        "cpu_ms_per_env_step": 1e3 * middle(traced, 1),
        "cpu_ms_per_env_step_untraced": 1e3 * middle(untraced, 1),
        "cpu_ratio": middle(traced, 1) / middle(untraced, 1),
        "us_per_span": us,
        "meter_us": meter_us,
        "spans_per_s": every,
        "spans_per_s_busiest": busiest,
        "cost_fraction": us * 1e-6 * busiest,
        "cost_fraction_of_cpu": us * 1e-6 * every / middle(traced, 2),
    }


def measure(setting: str, ratio: str, iterations: int, repeats: int) -> list[dict]:
    """One row per setting; an empty ratio and 0 iterations mean the setting's own, as on the
    ladder.
    """
    meter_us, us = span_us(4 * repeats)
    print(f"a span takes {meter_us:.2f} us, recorded {us:.2f} us more", flush=True)
    rows = []
    for name in ("emulated", "embedded") if setting == "all" else ladder.SETTINGS[setting]:
        real = ladder.REAL.get(name)
        runs: dict[bool, list[Run]] = {True: [], False: []}
        for turn in range(2 * repeats):
            trace = turn % 4 in (
                0,
                3,
            )  # with, without, without, with, …: neither is always the first of a pair
            count = iterations or (real[2] if real else ladder.COLUMNS[name].iterations)
            runs[trace].append(run_once(name, ratio or (real[1] if real else "1:1"), count, trace))
            speed, cpu, _ = rates(runs[trace][-1])
            how = "with" if trace else "without"
            print(
                f"{name}, {how} trace: {speed:.0f} env steps/s, {1e3 * cpu:.3g} CPU ms per env "
                "step",
                flush=True,
            )
        rows.append(row(name, runs[True], runs[False], us, meter_us))
    return rows
