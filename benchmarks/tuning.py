"""Measures what `--ratio auto --batch-max auto --batch-wait-ms auto` chooses, beside the best of
all settings: emulated stages, the real command.

    python bench.py tuning          13 minutes

The setting `emulated` is the ladder's (emulated/libero.py, calibrated on LIBERO + π0.5), where
simulators are the slowest stage. In `quick` the same simulators take QUICK of the time, so that
another ratio and other batches are best.

The search is exhaustive in virtual time: every ratio of RATIOS × B_max × T_max, from the nominal
sleeps. The real command then runs the best of each of the three best ratios and, at the very best
ratio, other B_max, each at its best T_max. auto starts at 3:1 with the first guess for batches,
measures, chooses and starts its workers again. Its figure is over the last iterations of its run,
as many as the others'; `whole_env_steps_per_s` is over everything after the first line, starting
again included.
"""

import itertools
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from benchmarks import ladder
from benchmarks.emulated import libero
from benchmarks.plan_against_paper import emulated_node
from config import ROOT
from errors import require
from planning import Costs, Node
from planning.events import simulate
from run_folder import read_metrics

WARMUP = ladder.warmup("full")  # iterations of a run that are not measured
QUICK = 0.3  # simulators' time in the setting `quick`, against the ladder's
TASKS = {"emulated": [], "quick": ["--tasks", str(QUICK)]}
# Those that fit, of the ones that auto looks at on 2 to 4 cores.
RATIOS = ("1:2", "1:1", "2:2", "2:1", "3:1")
SIZES = (1, 2, 4, 6, 8, 12, 16, 20, 24, 28, 32)
WAITS = (0.1, 0.25, 0.5, 1.0, 2.0, 4.0)  # of an inference of that size
TRIED = 3  # ratios that really run
OTHERS = (8, 16, 32)  # B_max that really run at the best of these ratios
AUTO = 40  # iterations of the run that tunes itself


def priced(setting: str, ratio: str) -> tuple[Node, Costs]:
    """Makes what is simulated: the envs and batches of 1:1, on the devices of another ratio.

    A user's envs and batches do not change with the ratio either."""
    node, costs = emulated_node("full", ratio)
    same, _ = emulated_node("full", "1:1")
    node = replace(same, env_devices=node.env_devices, actor_devices=node.actor_devices)
    return node, replace(costs, step_s=costs.step_s * (QUICK if setting == "quick" else 1.0))


def search(setting: str) -> list[dict]:
    """Simulates all settings in virtual time. Returns a row for each, the best first."""
    rows = []
    for ratio, size, wait in itertools.product(RATIOS, SIZES, WAITS):
        node, costs = priced(setting, ratio)
        limit = wait * (costs.infer_fixed_s + size * costs.infer_each_s)
        node = replace(node, batch_max=size, batch_wait_s=limit)
        found = simulate(node, costs, iterations=12)
        rows.append(
            {
                "setting": setting,
                "ratio": ratio,
                "batch_max": size,
                "batch_wait_ms": 1e3 * limit,
                "predicted_env_steps_per_s": found.env_steps_per_s,
            }
        )
    return sorted(rows, key=predicted, reverse=True)


def predicted(row: dict) -> float:
    return row["predicted_env_steps_per_s"]


def worth_running(rows: list[dict]) -> list[dict]:
    """Chooses what really runs. rows: all settings, the best first.

    That is the best row of each of the best ratios, and of other B_max at the very best ratio."""
    ratios = list(dict.fromkeys(row["ratio"] for row in rows))[:TRIED]
    chosen = [next(row for row in rows if row["ratio"] == ratio) for ratio in ratios]
    at_best = [row for row in rows if row["ratio"] == ratios[0]]
    for size in OTHERS:
        other = next(row for row in at_best if row["batch_max"] == size)
        if other not in chosen:
            chosen.append(other)
    return chosen


def run(setting: str, ratio: str, iterations: int, *flags: str) -> list[dict]:
    """Runs the real command once. Returns its metrics lines. Raises UserError where it fails."""
    given = ladder.flags("emulated", "full", "1:1")
    given = dict(zip(given[::2], given[1::2], strict=True))
    given["--ratio"] = ratio
    given["--iterations"] = str(iterations)
    given["--env-workers"] = "0" if ratio == "auto" else str(libero.workers(ratio, "disaggregated"))
    args = [part for item in given.items() for part in item] + [*TASKS[setting], "--no-trace"]
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        path = Path(folder) / "run"
        command = [sys.executable, str(ROOT / "train.py"), *args, *flags, "--run", str(path)]
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=1800,
        )
        lines = read_metrics(path)
    require(
        done.returncode == 0 and len(lines) >= iterations,
        f"`train.py {' '.join(args)}` failed: {done.stdout.strip()[-300:]}",
    )
    for line in done.stdout.splitlines():
        if line.startswith(("rollout: ", "ratio ")):
            print(f"    {line}", flush=True)
    return lines


def rate(lines: list[dict], first: int, last: int = -2) -> float:
    """Computes env steps/s between two lines. The very last one waits until the pipeline is dry."""
    env_steps = lines[last]["env_steps"] - lines[first]["env_steps"]
    return env_steps / (lines[last]["time"] - lines[first]["time"])


def rates(lines: list[dict], first: int) -> dict:
    """Computes a row's two rates: from line `first` on, and from the very first line on."""
    return {"env_steps_per_s": rate(lines, first), "whole_env_steps_per_s": rate(lines, 0)}


def compare(setting: str, iterations: int) -> list[dict]:
    """Searches one setting in virtual time, runs the best, and runs auto. Returns their rows."""
    found = search(setting)
    words = f"{setting}: {len(found)} settings in virtual time, of which the best reaches"
    print(f"{words} {predicted(found[0]):.0f} env steps/s", flush=True)

    # Run what is worth it.
    rows = []
    for row in worth_running(found):
        size = str(row["batch_max"])
        wait = f"{row['batch_wait_ms']:.3f}"
        batches = ("--batch-max", size, "--batch-wait-ms", wait)
        lines = run(setting, row["ratio"], WARMUP + iterations + 1, *batches)
        rows.append(row | rates(lines, WARMUP - 1))
        told = f"{rows[-1]['env_steps_per_s']:.0f} env steps/s"
        print(f"{setting} {row['ratio']} {size} {wait} ms: {told}", flush=True)

    # Run auto; its lines tell what it chose.
    lines = run(setting, "auto", max(AUTO, 3 * iterations), "--ratio-from", "3:1")
    chosen = {"ratio": "3:1"}
    for line in lines:
        chosen |= line["tuning"]
    auto = {
        "setting": setting,
        "ratio": f"auto: {chosen['ratio']}",
        "batch_max": chosen["batch_max"],
        "batch_wait_ms": chosen["batch_wait_ms"],
        "predicted_env_steps_per_s": None,
    }
    best = max(row["env_steps_per_s"] for row in rows)
    rows.append(auto | rates(lines, -2 - iterations))
    for row in rows:
        row["share_of_best"] = row["env_steps_per_s"] / best
    share = f"{rows[-1]['share_of_best']:.1%}"
    print(f"{setting}: auto reaches {share} of the best setting that was run", flush=True)
    return rows


def measure(iterations: int) -> list[dict]:
    """Measures both settings. 0 iterations mean 10."""
    return [row for setting in TASKS for row in compare(setting, iterations or 10)]
