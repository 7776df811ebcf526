"""The five presets, RL-VLA³'s Table 1, as users run them: `train.py --preset …`, one after another on the same work.

    python bench.py ladder --setting emulated    5 minutes
    python bench.py ladder --setting embedded
    python bench.py ladder --env vectorised      4 minutes

emulated: all stages sleep for times calibrated on the paper's rows (envs/emulated.py), so that cores hardly matter.
vectorised: the same with a simulator whose envs step together (envs/vectorised.py), in one lane per GPU where all wait for all,
which is best there, else in two; and, last, split into single envs as in the paper.
embedded: the default model and simulator. Without GPUs its stages share the cores, where hiding one behind another gains only
what is idle.

`env_steps_per_s`: env steps over time between two lines of metrics.jsonl, after WARMUP iterations. `bound_env_steps_per_s`: see
`emulated_bound`, `embedded_bound`. `rollout_s`, `actor_s`: the two phases of a synchronous iteration.
Left out: several nodes.
"""

import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import psutil
import torch

import metrics
from config import PRESETS, ROOT, UserError, parse_ratio
from envs import emulated, vectorised

WARMUP = 2  # iterations of a run that are not measured
LANES = emulated.WORKERS * emulated.LANES
ENVS = str(vectorised.ENVS)
SETTINGS = {  # ratio, iterations, flags
    "emulated": ("1:1", 8, ["--model", "emulated", "--env", "emulated", "--envs", str(LANES), "--image-size", "8",
                            "--batch", str(2 * LANES), "--minibatch", str(LANES), "--micro-batch", "4", "--update-epochs", "1",
                            "--segment", str(emulated.EPISODE), "--chunk", str(emulated.CHUNK)]),
    "vectorised": ("1:1", 6, ["--model", "emulated", "--env", "vectorised", "--envs", ENVS, "--image-size", "8",
                              "--batch", ENVS, "--minibatch", ENVS, "--micro-batch", "16", "--update-epochs", "1",
                              "--segment", str(vectorised.EPISODE), "--chunk", str(vectorised.CHUNK)]),
    "embedded": ("3:1", 4, []),
}  # fmt: skip
SINGLE_ENVS = "rollout-async, single envs"  # the split that costs RL-VLA³ what it costs
COMMON = ["--eval-envs", "0", "--eval-every", "0", "--checkpoint-every", "1000000"]
# RL-VLA³'s Table 1 on 8 GPUs at 1:1, which the emulated settings are calibrated on: LIBERO + π0.5 and ManiSkill + π0, env steps/s
PAPER = {
    "emulated": {
        "sync-colocated": 289.23, "sync-disaggregated": 162.75, "train-async": 229.68, "rollout-async": 369.56, "full": 383.40,
    },
    "vectorised": {
        "sync-colocated": 132.56, "sync-disaggregated": 60.64, "train-async": 126.65, "rollout-async": 69.07, "full": 71.61,
        SINGLE_ENVS: 69.07,
    },
}  # fmt: skip
PHASES = {"sync-colocated": (630, 220), "sync-disaggregated": (1070, 440)}  # seconds of rollout and actor: envs/emulated.py


def cpu_seconds(pid: int) -> float:
    """CPU time that a process and its descendants have used so far."""
    parent, total = psutil.Process(pid), 0.0
    for process in (parent, *parent.children(recursive=True)):
        try:
            used = process.cpu_times()
            total += used.user + used.system
        except psutil.NoSuchProcess:
            pass
    return total


class Run(NamedTuple):
    """What one run of the real command left behind."""

    lines: list[dict]  # of metrics.jsonl
    used: dict[int, float]  # CPU seconds when there were n lines
    spans: dict[str, list]  # of trace.json, by row; {} where it was not traced


def run_preset(setting: str, preset: str, ratio: str, iterations: int, trace: bool = False) -> Run:
    name = preset.partition(",")[0]
    args = ["--preset", name, "--ratio", ratio, "--iterations", str(iterations), *SETTINGS[setting][2], *COMMON]
    args.append("--trace" if trace else "--no-trace")
    if setting != "embedded":  # its simulators scale with their devices as well
        workers = env_workers(setting, ratio, PRESETS[name][0])
        args += ["--env-workers", str(workers)]
        args += ["--lanes", str(lanes(preset, workers))] if setting == "vectorised" else []
    without = setting != "embedded" or sum(parse_ratio(ratio)) > torch.cuda.device_count()  # fewer GPUs than parts: use none
    environment, used = os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if without else {}), {}
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        run, log = Path(folder) / "run", Path(folder) / "log"
        command = [sys.executable, str(ROOT / "train.py"), *args, "--run", str(run)]
        with open(log, "w") as output:
            process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)
        try:
            while process.poll() is None:
                time.sleep(0.05)
                file = run / "metrics.jsonl"
                count = file.read_bytes().count(b"\n") if file.is_file() else 0
                if count not in used:
                    used[count] = cpu_seconds(process.pid)
        finally:
            process.terminate()  # when we are interrupted: it stops its workers
            process.wait()
        lines = metrics.read_metrics(run)
        if process.returncode != 0 or len(lines) < iterations:
            raise UserError(f"`train.py {' '.join(args)}` failed: {log.read_text().strip()[-300:]}")
        return Run(lines, used, metrics.read_trace(run) if trace else {})


def env_workers(setting: str, ratio: str, placement: str) -> int:
    return round((vectorised if setting == "vectorised" else emulated).WORKERS * emulated.devices(ratio, placement)[0])


def lanes(preset: str, workers: int) -> int:
    """Of each env worker, in the vectorised setting. A second one has nothing to hide behind while all wait for all."""
    if preset == SINGLE_ENVS:
        return vectorised.ENVS // workers
    return 1 if PRESETS[preset][2] == "all" else 2


def emulated_bound(setting: str, ratio: str, preset: str) -> float:
    """Env steps/s that the slowest stage alone allows, from the calibration.

    Stages with devices of their own overlap, so the smallest counts. Colocated ones take turns: their times per env step add up.
    """
    placement = PRESETS[preset.partition(",")[0]][0]
    (for_rollout, for_actor), workers = emulated.devices(ratio, placement), env_workers(setting, ratio, placement)
    if setting == "vectorised":
        costs, envs = vectorised, vectorised.ENVS
        busy = (
            lanes(preset, workers) * costs.FIXED + envs / workers * costs.EACH
        )  # seconds of an env worker per chunk of all its lanes
    else:
        costs, envs = emulated, LANES
        busy = math.ceil(LANES / workers) * costs.MEAN  # of the busiest one, which steps its lanes one after another
    steps = envs * costs.CHUNK  # env steps of one chunk of every env
    simulate = steps / busy
    # The largest batch holds every env. A trajectory of EPISODE chunks asks for one value besides.
    infer = steps / (costs.INFER_ALL * (1 + 1 / costs.EPISODE)) * for_rollout
    train = steps / costs.TRAIN_ALL * for_actor
    if placement == "colocated":
        return 1.0 / (1.0 / min(simulate, infer) + 1.0 / train)
    return min(simulate, infer, train)


def embedded_bound(env_steps: float, cpu_s: float) -> float:
    """Env steps/s if this run kept every core busy: cores / (CPU seconds per env step).

    Without GPUs all stages draw on the same cores, so their sum limits a pipeline that never waits, however it is cut. It is the
    run's own CPU time over the measured iterations. Other programs on the machine lower the rate and not the bound.
    """
    return len(os.sched_getaffinity(0)) * env_steps / cpu_s


def climb(setting: str, ratio: str, iterations: int) -> list[dict]:
    """One row per preset of one setting."""
    rows = {}
    for preset in [*PRESETS, *([SINGLE_ENVS] if setting == "vectorised" else [])]:
        staleness = PRESETS[preset.partition(",")[0]][1]
        # One iteration more than is measured: the workers, whose CPU time is asked for, end with the last.
        lines, used, _ = run_preset(setting, preset, ratio, WARMUP + iterations + 1)
        first, last, window = lines[WARMUP - 1], lines[-2], lines[WARMUP:-1]
        env_steps, seconds = last["env_steps"] - first["env_steps"], last["time"] - first["time"]
        row = {"setting": setting, "ratio": ratio, "preset": preset, "env_steps_per_s": env_steps / seconds}
        if setting != "embedded":
            row["bound_env_steps_per_s"] = emulated_bound(setting, ratio, preset)
        else:
            row["bound_env_steps_per_s"] = embedded_bound(env_steps, used[len(lines) - 1] - used[WARMUP])
        row |= {f"bubble_{stage}": statistics.mean(line[f"bubble_{stage}"] for line in window) for stage in metrics.STAGES}
        row |= {"rollout_s": None, "actor_s": None}
        if staleness == 0:  # while the actor waits, the rollout phase runs
            row["rollout_s"] = row["bubble_actor"] * seconds / iterations
            row["actor_s"] = (1.0 - row["bubble_actor"]) * seconds / iterations
        rows[preset] = row
        print(f"{setting} {ratio} {preset}: {row['env_steps_per_s']:.0f} env steps/s", flush=True)
        if setting == "emulated" and ratio == "1:1" and staleness == 0:
            rounds = 2 * emulated.EPISODE / (8 * 48) * emulated.SCALE  # seconds here per second of the paper's training step
            rollout, actor = (x * rounds for x in PHASES[preset])
            print(f"    rollout {row['rollout_s']:.2f} s (the paper's: {rollout:.2f}), actor {row['actor_s']:.2f} s ({actor:.2f})")
    for preset, row in rows.items():
        for base in ("sync-colocated", "sync-disaggregated"):
            row[f"ratio_to_{base.replace('-', '_')}"] = row["env_steps_per_s"] / rows[base]["env_steps_per_s"]
        paper = PAPER.get(setting) if ratio == "1:1" else None
        row["paper_ratio_to_sync_disaggregated"] = paper and paper[preset] / paper["sync-disaggregated"]
    return list(rows.values())


def measure(setting: str, ratio: str, iterations: int) -> list[dict]:
    """Rows of one setting or of `both`; an empty ratio and 0 iterations mean the setting's own."""
    rows = []
    for name in ("emulated", "embedded") if setting == "both" else [setting]:
        rows += climb(name, ratio or SETTINGS[name][0], iterations or SETTINGS[name][1])
    return rows
