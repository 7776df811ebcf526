"""The five presets, RL-VLA³'s Table 1, as users run them: `train.py --preset …`, one after another on the same work.

    python bench.py ladder --setting emulated    5 minutes
    python bench.py ladder --setting embedded

emulated: all stages sleep for times calibrated on the paper's rows (envs/emulated.py), so that cores hardly matter.
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

import psutil
import torch

import metrics
from config import PRESETS, ROOT, UserError, parse_ratio
from envs import emulated

WARMUP = 2  # iterations of a run that are not measured
LANES = emulated.WORKERS * emulated.LANES
SETTINGS = {  # ratio, iterations, flags
    "emulated": ("1:1", 8, ["--model", "emulated", "--env", "emulated", "--envs", str(LANES), "--image-size", "8",
                            "--batch", str(2 * LANES), "--minibatch", str(LANES), "--micro-batch", "4", "--update-epochs", "1",
                            "--segment", str(emulated.EPISODE), "--chunk", str(emulated.CHUNK)]),
    "embedded": ("3:1", 4, []),
}  # fmt: skip
COMMON = ["--eval-envs", "0", "--eval-every", "0", "--checkpoint-every", "1000000", "--no-trace"]
# RL-VLA³'s Table 1, LIBERO + π0.5 on 8 GPUs, which the emulated setting is calibrated on: env steps/s
PAPER = {"sync-colocated": 289.23, "sync-disaggregated": 162.75, "train-async": 229.68, "rollout-async": 369.56, "full": 383.40}
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


def run_preset(setting: str, preset: str, ratio: str, iterations: int) -> tuple[list[dict], dict[int, float]]:
    """One run of the real command. Returns its metrics lines, and the CPU seconds it had used when there were n of them."""
    args = ["--preset", preset, "--ratio", ratio, "--iterations", str(iterations), *SETTINGS[setting][2], *COMMON]
    if setting == "emulated":  # its simulators scale with their devices as well
        workers = emulated.WORKERS * emulated.devices(ratio, PRESETS[preset][0])[0]
        args += ["--env-workers", str(round(workers))]
    without = setting == "emulated" or sum(parse_ratio(ratio)) > torch.cuda.device_count()  # fewer GPUs than parts: use none
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
    return lines, used


def emulated_bound(ratio: str, placement: str) -> float:
    """Env steps/s that the slowest stage alone allows, from the calibration.

    Stages with devices of their own overlap, so the smallest counts. Colocated ones take turns: their times per env step add up.
    """
    for_rollout, for_actor = emulated.devices(ratio, placement)
    steps = LANES * emulated.CHUNK  # env steps of one chunk of every lane
    most = math.ceil(LANES / round(emulated.WORKERS * for_rollout))  # lanes of the busiest env worker, stepped one after another
    simulate = steps / (most * emulated.MEAN)
    # The largest batch holds every lane. A trajectory of EPISODE chunks asks for one value besides.
    infer = steps / (emulated.INFER_ALL * (1 + 1 / emulated.EPISODE)) * for_rollout
    train = steps / emulated.TRAIN_ALL * for_actor
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
    for preset, (placement, staleness, *_) in PRESETS.items():
        # One iteration more than is measured: the workers, whose CPU time is asked for, end with the last.
        lines, used = run_preset(setting, preset, ratio, WARMUP + iterations + 1)
        first, last, window = lines[WARMUP - 1], lines[-2], lines[WARMUP:-1]
        env_steps, seconds = last["env_steps"] - first["env_steps"], last["time"] - first["time"]
        row = {"setting": setting, "ratio": ratio, "preset": preset, "env_steps_per_s": env_steps / seconds}
        if setting == "emulated":
            row["bound_env_steps_per_s"] = emulated_bound(ratio, placement)
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
        paper = PAPER[preset] / PAPER["sync-disaggregated"] if setting == "emulated" and ratio == "1:1" else None
        row["paper_ratio_to_sync_disaggregated"] = paper
    return list(rows.values())


def measure(setting: str, ratio: str, iterations: int) -> list[dict]:
    """Rows of one setting or of `both`; an empty ratio and 0 iterations mean the setting's own."""
    rows = []
    for name in SETTINGS if setting == "both" else [setting]:
        rows += climb(name, ratio or SETTINGS[name][0], iterations or SETTINGS[name][1])
    return rows
