"""Measures what recording spans costs: the same run with --trace and with --no-trace, and one span
by itself.

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
costs; the last two figures do not. They hold for spans in a row, whose code and counters lie in
caches; after a unit of work that has used the caches up, a span takes longer. Left out: writing
trace.json and drawing swimlane.png, which come after a run.
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
    """Measures the microseconds of a span that is not recorded, and how many more it takes where it
    is. Medians over repetitions."""
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
    plain = statistics.median(taken[False])
    return plain, statistics.median(taken[True]) - plain


class Run(NamedTuple):
    """What one run of the ladder's preset `full` left behind."""

    lines: list[dict]  # of metrics.jsonl
    used: dict[int, float]  # CPU seconds when there were n lines
    spans: dict[str, list]  # of trace.json, by row; {} where it was not traced


def run_once(setting: str, ratio: str, iterations: int, trace: bool) -> Run:
    """Runs the preset once, with or without a trace."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        file = Path(folder) / "trace.json" if trace else None
        lines, used, _ = ladder.run_preset(setting, "full", ratio, WARMUP + iterations, file)
        return Run(lines, used, read_trace(Path(folder)) if trace else {})


def rates(run: Run) -> tuple[float, float, float]:
    """Computes env steps/s, CPU seconds per env step and per second, after the warm-up."""
    first = run.lines[WARMUP - 1]
    last = run.lines[-1]
    env_steps = last["env_steps"] - first["env_steps"]
    seconds = last["time"] - first["time"]
    cpu_s = run.used[len(run.lines)] - run.used[WARMUP]
    return env_steps / seconds, cpu_s / env_steps, cpu_s / seconds


def spans_per_s(run: Run) -> tuple[float, float]:
    """Counts spans of all workers, and of the one that records most.

    A worker's fetches of weights have a row of their own in the trace; they are rare."""
    counts = [len(rows) for rows in run.spans.values()]
    begin = min(rows[0][1] for rows in run.spans.values())
    end = max(rows[-1][2] for rows in run.spans.values())
    seconds = end - begin
    return sum(counts) / seconds, max(counts) / seconds


def medians(tuples: list[tuple[float, ...]]) -> list[float]:
    """Takes the median of each place."""
    return [statistics.median(place) for place in zip(*tuples, strict=True)]


def row(setting: str, traced: list[Run], untraced: list[Run], us: float, meter_us: float) -> dict:
    """Makes the row of one setting. us, meter_us: of `span_us`."""
    speed, cpu, load = medians([rates(run) for run in traced])
    speed_without, cpu_without, _ = medians([rates(run) for run in untraced])
    every, busiest = medians([spans_per_s(run) for run in traced])
    return {
        "setting": setting,
        "env_steps_per_s": speed,
        "env_steps_per_s_untraced": speed_without,
        "rate_ratio": speed / speed_without,
        "cpu_ms_per_env_step": 1e3 * cpu,
        "cpu_ms_per_env_step_untraced": 1e3 * cpu_without,
        "cpu_ratio": cpu / cpu_without,
        "us_per_span": us,
        "meter_us": meter_us,
        "spans_per_s": every,
        "spans_per_s_busiest": busiest,
        "cost_fraction": us * 1e-6 * busiest,
        "cost_fraction_of_cpu": us * 1e-6 * every / load,
    }


def measure(setting: str, ratio: str, iterations: int, repeats: int) -> list[dict]:
    """Measures every setting. Returns a row for each.

    An empty ratio and 0 iterations mean the setting's own, as on the ladder."""
    meter_us, us = span_us(4 * repeats)
    print(f"a span takes {meter_us:.2f} us, recorded {us:.2f} us more", flush=True)
    rows = []
    for name in ("emulated", "embedded") if setting == "all" else ladder.SETTINGS[setting]:
        kind = ladder.EMULATED.get(name) or ladder.REAL[name]
        own = kind.ratio if name in ladder.REAL else "1:1"
        runs: dict[bool, list[Run]] = {True: [], False: []}
        for turn in range(2 * repeats):
            # With, without, without, with, …: neither is always the first of a pair.
            trace = turn % 4 in (0, 3)
            run = run_once(name, ratio or own, iterations or kind.iterations, trace)
            runs[trace].append(run)
            speed, cpu, _ = rates(run)
            how = f"{name}, {'with' if trace else 'without'} trace"
            told = f"{speed:.0f} env steps/s, {1e3 * cpu:.3g} CPU ms per env step"
            print(f"{how}: {told}", flush=True)
        rows.append(row(name, runs[True], runs[False], us, meter_us))
    return rows
