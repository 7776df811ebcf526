"""`--ratio auto --batch-max auto --batch-wait-ms auto` beside the best of all settings: emulated
stages, the real command.

    python bench.py tuning          13 minutes

Settings: `emulated` is the ladder's (emulated/libero.py, calibrated on LIBERO + π0.5), where
simulators are the slowest stage; in `quick` the same simulators take QUICK of the time, so that
another ratio and other batches are best.

The search is exhaustive in virtual time: every ratio of RATIOS × B_max × T_max, from the nominal
sleeps. The real command then runs the best of each of the three best ratios and, at the very best
ratio, other B_max, each at its best T_max. auto starts at 3:1 with the first guess for batches,
measures, chooses and starts its workers again. Its figure is over the last iterations of its run,
as many as the others'; `whole_env_steps_per_s` is over everything after the first line, starting
again included.
"""

import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from benchmarks import ladder
from benchmarks.emulated import libero
from benchmarks.plan_against_paper import emulated_node
from config import ROOT, UserError
from planning import Costs, Node
from planning.events import simulate
from run_folder import read_metrics

WARMUP = ladder.warmup("full")  # iterations of a run that are not measured
QUICK = 0.3  # simulators' time in the setting `quick`, against the ladder's
TASKS = {"emulated": [], "quick": ["--tasks", str(QUICK)]}
RATIOS = (
    "1:2",
    "1:1",
    "2:2",
    "2:1",
    "3:1",
)  # those that fit, of the ones auto looks at on 2 to 4 cores
SIZES = (1, 2, 4, 6, 8, 12, 16, 20, 24, 28, 32)
WAITS = (0.1, 0.25, 0.5, 1.0, 2.0, 4.0)  # of an inference of that size
# ratios that really run, and B_max at the best one of them
TRIED = 3
OTHERS = (8, 16, 32)
AUTO = 40  # iterations of the run that tunes itself


def priced(setting: str, ratio: str) -> tuple[Node, Costs]:
    """What is simulated: the envs and batches of 1:1 on other parts, as a user's do not change with
    the ratio either.
    """
    (node, costs) = emulated_node("full", ratio)
    (same, _) = emulated_node("full", "1:1")
    node = replace(same, env_devices=node.env_devices, actor_devices=node.actor_devices)
    return node, replace(costs, step_s=costs.step_s * (QUICK if setting == "quick" else 1.0))


def search(setting: str) -> list[dict]:
    """All settings in virtual time, the best first."""
    rows = []
    for ratio in RATIOS:
        node, costs = priced(setting, ratio)
        for size in SIZES:
            for wait in WAITS:
                limit = wait * (costs.infer_fixed_s + size * costs.infer_each_s)
                found = simulate(
                    replace(node, batch_max=size, batch_wait_s=limit), costs, iterations=12
                )
                row = {
                    "setting": setting,
                    "ratio": ratio,
                    "batch_max": size,
                    "batch_wait_ms": 1e3 * limit,
                }
                rows.append(row | {"predicted_env_steps_per_s": found.env_steps_per_s})
    return sorted(rows, key=lambda row: -row["predicted_env_steps_per_s"])


def worth_running(rows: list[dict]) -> list[dict]:
    """Of all settings, best first: the best of the best ratios, and of other B_max at the very best
    ratio.
    """
    ratios = list(dict.fromkeys(row["ratio"] for row in rows))[:TRIED]
    chosen = [next(row for row in rows if row["ratio"] == ratio) for ratio in ratios]
    for size in OTHERS:
        chosen.append(
            next(row for row in rows if row["ratio"] == ratios[0] and row["batch_max"] == size)
        )
    return [row for i, row in enumerate(chosen) if row not in chosen[:i]]


def run(setting: str, ratio: str, iterations: int, *flags: str) -> list[dict]:
    """Metrics lines of one run of the real command. Raises UserError."""
    given = ladder.flags("emulated", "full", "1:1")
    given = dict(zip(given[::2], given[1::2], strict=True)) | {
        "--ratio": ratio,
        "--iterations": str(iterations),
    }
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
    if done.returncode or len(lines) < iterations:
        raise UserError(f"`train.py {' '.join(args)}` failed: {done.stdout.strip()[-300:]}")
    for line in done.stdout.splitlines():
        if line.startswith(("rollout: ", "ratio ")):
            print(f"    {line}", flush=True)
    return lines


def rate(lines: list[dict], first: int, last: int = -2) -> float:
    """Env steps/s between two lines. The very last one waits for the pipeline to run dry."""
    return (lines[last]["env_steps"] - lines[first]["env_steps"]) / (
        lines[last]["time"] - lines[first]["time"]
    )


def compare(setting: str, iterations: int) -> list[dict]:
    found = search(setting)
    most = found[0]["predicted_env_steps_per_s"]
    print(
        f"{setting}: {len(found)} settings in virtual time, of which the best reaches {most:.0f} "
        "env steps/s",
        flush=True,
    )
    rows = []
    for row in worth_running(found):
        size = str(row["batch_max"])
        wait = f"{row['batch_wait_ms']:.3f}"
        lines = run(
            setting,
            row["ratio"],
            WARMUP + iterations + 1,
            "--batch-max",
            size,
            "--batch-wait-ms",
            wait,
        )
        rows.append(
            row
            | {"env_steps_per_s": rate(lines, WARMUP - 1), "whole_env_steps_per_s": rate(lines, 0)}
        )
        print(
            f"{setting} {row['ratio']} {size} {wait} ms: {rows[-1]['env_steps_per_s']:.0f} env "
            "steps/s",
            flush=True,
        )
    lines = run(setting, "auto", max(AUTO, 3 * iterations), "--ratio-from", "3:1")
    told = {"ratio": "3:1"}
    for line in lines:
        told |= line["tuning"]
    row = {"setting": setting, "ratio": f"auto: {told['ratio']}", "batch_max": told["batch_max"]}
    row |= {"batch_wait_ms": told["batch_wait_ms"], "predicted_env_steps_per_s": None}
    rows.append(
        row
        | {"env_steps_per_s": rate(lines, -2 - iterations), "whole_env_steps_per_s": rate(lines, 0)}
    )
    best = max(row["env_steps_per_s"] for row in rows[:-1])
    for row in rows:
        row["share_of_best"] = row["env_steps_per_s"] / best
    print(
        f"{setting}: auto reaches {rows[-1]['share_of_best']:.1%} of the best setting that was run",
        flush=True,
    )
    return rows


def measure(iterations: int) -> list[dict]:
    """Rows of both settings; 0 iterations mean 10."""
    return [row for setting in TASKS for row in compare(setting, iterations or 10)]
