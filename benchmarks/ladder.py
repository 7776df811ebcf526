"""The five presets, RL-VLA³'s Table 1, as users run them: `train.py --preset …`, one after another
on the same work.

    python bench.py ladder                       all of it: the three columns, then both real
                                                 settings
    python bench.py ladder --setting columns     the paper's three columns at 1:1, 2:1 and 3:1
    python bench.py ladder --setting gr00t --ratio 1:1

emulated    LIBERO + π0.5         all stages sleep for times calibrated on the paper's rows, so that
            cores hardly matter; processes,
gr00t       LIBERO + GR00T N1.5   queues, batcher, streamer and weight plane are those of every run
vectorised  ManiSkill + π0        envs step together, in one lane per GPU where all wait for all,
            which is best there, else in two;
                                  at 1:1 also split into single envs, as in the paper
embedded    Meta-World, small π0.5, everything real
libero      LIBERO, small untrained π0.5, everything real

Where no GPU is, the real ones' stages share the cores, and hiding one behind another gains only
what is idle.

`env_steps_per_s`: what passed the stage that bounds a row, in steady state (`steady`).
`bound_env_steps_per_s`: `emulated_bound`, `real_bound`. `rollout_s`, `actor_s`: the two phases of a
synchronous iteration. `working`: workers that work at the same time, on average; more of them than
cores in a real row means that they fight over cores. Emulated, colocated is the same at every
ratio, so that row is measured once. Left out: several nodes.
"""

import contextlib
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

import metrics
from benchmarks.emulated import gr00t, libero, maniskill
from benchmarks.machinery import cpu_seconds
from benchmarks.plan_against_paper import MAIN
from config import PRESETS, ROOT, Config, UserError, from_json, parse_ratio
from planning.settings import divisor
from run_folder import read_metrics

RATIOS = ("1:1", "2:1", "3:1")
MEANS = (
    *(f"bubble_{stage}" for stage in metrics.STAGES),
    "batch_size_mean",
    "weight_sync_s",
    "weight_stall_s",
)  # in a row
TARGET = 0.97  # share of the bound, at the best ratio


@dataclass(frozen=True)
class Column:
    """A column of RL-VLA³'s Table 1, emulated."""

    title: str
    env: str
    costs: ModuleType
    iterations: int  # that are measured
    paper: dict[str, float]  # env steps/s of its presets on 8 GPUs at 1:1


def paper(column: str) -> dict[str, float]:
    return dict(zip(PRESETS, (row[0] for row in MAIN[column]), strict=True))


SINGLE_ENVS = "rollout-async, single envs"  # the split that costs RL-VLA³ what it costs
COLUMNS = {
    "emulated": Column("LIBERO + π0.5", "emulated", libero, 5, paper("LIBERO π0.5")),
    "gr00t": Column("LIBERO + GR00T N1.5", "emulated_gr00t", gr00t, 6, paper("LIBERO GR00T")),
    "vectorised": Column("ManiSkill + π0", "vectorised", maniskill, 2, paper("ManiSkill π0")),
}
COLUMNS["vectorised"].paper[SINGLE_ENVS] = COLUMNS["vectorised"].paper["rollout-async"]
REAL = {  # title, ratio, iterations that are measured, flags
    "embedded": ("Meta-World, small π0.5", "3:1", 4, ()),
    "libero": (
        "LIBERO, small untrained π0.5",
        "3:1",
        4,
        (
            "--env",
            "libero",
            "--tasks",
            "turn_on_the_stove",
            "put_the_bowl_on_the_plate",
            "open_the_middle_drawer_of_the_cabinet",
            "--envs",
            "6",
            "--segment",
            "4",
            "--batch",
            "12",
            "--minibatch",
            "12",
            "--micro-batch",
            "2",
            "--update-epochs",
            "1",
        ),
    ),
}
SETTINGS = {"all": (*COLUMNS, *REAL), "columns": tuple(COLUMNS)} | {
    name: (name,) for name in (*COLUMNS, *REAL)
}
COMMON = ("--eval-envs", "0", "--eval-every", "0", "--checkpoint-every", "1000000")


# ---------------------------------------------------------------- what is run


def settings_of(preset: str) -> tuple[str, int, bool]:
    """Placement, staleness, and whether all wait for all."""
    placement, staleness, batch_max, *_ = PRESETS[preset.partition(",")[0]]
    return placement, staleness, batch_max == "all"


def warmup(preset: str) -> int:
    """Iterations that are not measured: after so many, as many batches are under way as staleness
    lets there be.
    """
    return settings_of(preset)[1] + 1


def lanes(preset: str, ratio: str) -> int:
    """Of each env worker, in the vectorised setting. A second one has nothing to hide behind while
    all wait for all.
    """
    placement, _, lockstep = settings_of(preset)
    if preset == SINGLE_ENVS:
        workers, envs = libero.sizes(maniskill, ratio, placement)
        return envs // workers
    return 1 if lockstep else 2


def flags(setting: str, preset: str, ratio: str) -> list[str]:
    args = ["--preset", preset.partition(",")[0], "--ratio", ratio, *COMMON]
    if setting in REAL:
        return [*args, *REAL[setting][3]]
    column = COLUMNS[setting]
    costs = COLUMNS[setting].costs
    workers, envs = libero.sizes(costs, ratio, settings_of(preset)[0])
    batch = costs.TRAJECTORIES * envs
    minibatch = costs.TRAJECTORIES * envs // costs.MINIBATCHES
    numbers = {
        "--env-workers": workers,
        "--envs": envs,
        "--image-size": 8,
        "--batch": batch,
        "--minibatch": minibatch,
        "--micro-batch": divisor(minibatch, costs.MICRO_BATCH),
        "--update-epochs": 1,
        "--segment": costs.EPISODE,
        "--chunk": costs.CHUNK,
    }
    if costs is maniskill:
        numbers["--lanes"] = lanes(preset, ratio)
    return [
        *args,
        "--model",
        "emulated",
        "--env",
        column.env,
        *(str(x) for item in numbers.items() for x in item),
    ]


def run_preset(
    setting: str, preset: str, ratio: str, iterations: int, trace: Path | None
) -> tuple[list[dict], dict[int, float], Config]:
    """One run of the real command, ended once it has written `iterations` lines of metrics.jsonl,
    before it begins to drain.

    Returns the lines, the CPU seconds it had used when there were n of them, and its settings.
    trace: where its trace is to go.
    """
    more = (
        settings_of(preset)[1] + 2
    )  # iterations: so many batches are under way, and what comes after the last never starts
    args = [
        *flags(setting, preset, ratio),
        "--iterations",
        str(iterations + more),
        *([] if trace else ["--no-trace"]),
    ]
    without = (
        setting in COLUMNS or sum(parse_ratio(ratio)) > torch.cuda.device_count()
    )  # fewer GPUs than parts: use none
    environment = os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if without else {})
    used = {}
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        run = Path(folder) / "run"
        log = Path(folder) / "log"
        command = [sys.executable, str(ROOT / "train.py"), *args, "--run", str(run)]
        with open(log, "w") as output:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT
            )
        try:
            while process.poll() is None and max(used, default=0) < iterations:
                time.sleep(0.05)
                file = run / "metrics.jsonl"
                count = file.read_bytes().count(b"\n") if file.is_file() else 0
                if count not in used:
                    used[count] = sum(cpu_seconds(process.pid).values())
        finally:
            stop(process, wanted=trace is not None)
        lines = read_metrics(run)[:iterations]
        if len(lines) < iterations:
            raise UserError(f"`train.py {' '.join(args)}` failed: {log.read_text().strip()[-300:]}")
        if (
            trace and (run / "trace.json").is_file()
        ):  # a machine too busy to write it within a minute has shown enough
            shutil.copy(run / "trace.json", trace)
        return lines, used, from_json(run / "config.json")


def stop(process: subprocess.Popen, wanted: bool) -> None:
    """Ends a run, and its workers with it. wanted: its trace is; told twice to end, it writes that
    without finishing its batch.
    """
    for _ in range(2 if wanted else 0):
        process.terminate()
        time.sleep(0.6)  # two words in less than half a second count as one
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(60.0 if wanted else 0.0)
    process.kill()
    process.wait(60.0)


# ---------------------------------------------------------------- what could be


def emulated_bounds(setting: str, ratio: str, preset: str) -> dict[str, float]:
    """Env steps/s that each stage alone allows, from the calibration."""
    placement = settings_of(preset)[0]
    costs = COLUMNS[setting].costs
    (for_rollout, for_actor) = libero.devices(ratio, placement)
    (workers, envs) = libero.sizes(costs, ratio, placement)
    if (
        costs is maniskill
    ):  # seconds of an env worker per chunk of all its lanes, which it steps one after another
        busy = lanes(preset, ratio) * costs.FIXED + envs / workers * costs.EACH
    else:
        busy = math.ceil(envs / workers) * costs.MEAN
    # The largest batch holds every env. A trajectory of EPISODE chunks asks for one value besides.
    infer = (
        costs.INFER_ALL
        * (costs.INFER_FIXED + (1 - costs.INFER_FIXED) * envs / costs.ENVS)
        * (1 + 1 / costs.EPISODE)
    )
    steps = envs * costs.CHUNK  # env steps of one chunk of every env
    train = costs.TRAIN_ALL * envs / costs.ENVS
    return {
        "env": steps / busy,
        "rollout": steps / infer * for_rollout,
        "actor": steps / train * for_actor,
    }


def emulated_bound(setting: str, ratio: str, preset: str) -> float:
    """Env steps/s if the slowest stage never waited.

    Stages with devices of their own overlap, so the smallest counts. Colocated ones take turns:
    their times per env step add up.
    """
    bounds = emulated_bounds(setting, ratio, preset)
    if settings_of(preset)[0] == "colocated":
        return 1.0 / (1.0 / min(bounds["env"], bounds["rollout"]) + 1.0 / bounds["actor"])
    return min(bounds.values())


def real_bound(env_steps: float, cpu_s: float) -> float:
    """Env steps/s if this run kept every core busy: cores / (CPU seconds per env step).

    Without GPUs all stages draw on the same cores, so their sum limits a pipeline that never waits,
    however it is cut. It is the run's own CPU time over the measured iterations. Other programs on
    the machine lower the rate and not the bound.
    """
    return len(os.sched_getaffinity(0)) * env_steps / cpu_s


# ---------------------------------------------------------------- what was


def steady(setting: str, ratio: str, preset: str, lines: list[dict]) -> float:
    """Env steps between the last line of the warm-up and the last of all, counted at the stage that
    bounds the pipeline.

    Where the actor does, trajectories pile up before it until admission stops the simulators, and
    steps that are collected meanwhile would let a row exceed its bound; so steps count when they
    are trained. Elsewhere they count when they are collected: lanes drift apart by as much as
    staleness allows, and a batch is trained only when the slowest of them is there.
    """
    if (
        setting in COLUMNS
        and min(bounds := emulated_bounds(setting, ratio, preset), key=bounds.get) == "actor"
    ):
        costs = COLUMNS[setting].costs
        batch = libero.sizes(costs, ratio, settings_of(preset)[0])[1] * costs.TRAJECTORIES
        return (len(lines) - warmup(preset)) * batch * costs.EPISODE * costs.CHUNK
    return lines[-1]["env_steps"] - lines[warmup(preset) - 1]["env_steps"]


def measure_preset(
    setting: str, preset: str, ratio: str, iterations: int, trace: Path | None
) -> dict:
    lines, used, config = run_preset(setting, preset, ratio, warmup(preset) + iterations, trace)
    window = lines[warmup(preset) :]
    env_steps = steady(setting, ratio, preset, lines)
    seconds = window[-1]["time"] - lines[warmup(preset) - 1]["time"]
    mean = {
        name: statistics.mean(line[name] for line in window) for name in window[0] if name in MEANS
    }
    row = {
        "setting": setting,
        "ratio": ratio,
        "preset": preset,
        "env_steps_per_s": env_steps / seconds,
    }
    if setting in COLUMNS:
        row["bound_env_steps_per_s"] = emulated_bound(setting, ratio, preset)
        working = None
    else:
        row["bound_env_steps_per_s"] = real_bound(
            env_steps, used[len(lines)] - used[warmup(preset)]
        )
        workers = config.env.env_workers, config.rollout.rollout_workers, config.actor.actor_workers
        working = sum(
            n * (1.0 - mean[f"bubble_{stage}"])
            for n, stage in zip(workers, metrics.STAGES, strict=True)
        )
    row |= {"share_of_bound": row["env_steps_per_s"] / row["bound_env_steps_per_s"]} | mean
    row |= {"working": working, "rollout_s": None, "actor_s": None}
    if settings_of(preset)[1] == 0:  # while the actor waits, the rollout phase runs
        row["rollout_s"] = row["bubble_actor"] * seconds / iterations
        row["actor_s"] = (1.0 - row["bubble_actor"]) * seconds / iterations
    print(f"{setting} {ratio} {preset}: {row['env_steps_per_s']:.0f} env steps/s", flush=True)
    return row


def climb(
    setting: str, ratio: str, iterations: int, colocated: dict | None, traces: Path | None
) -> list[dict]:
    """One row per preset of one setting. colocated: that row, where it is known from another
    ratio.
    """
    presets = [*PRESETS, *([SINGLE_ENVS] if setting == "vectorised" and ratio == "1:1" else [])]
    rows = {}
    for preset in presets:
        if settings_of(preset)[0] == "colocated" and colocated:
            rows[preset] = colocated | {"ratio": ratio}
            continue
        trace = (
            traces.with_name(f"{traces.stem}_{setting}_{preset}_trace.json")
            if traces and setting in REAL
            else None
        )
        rows[preset] = measure_preset(setting, preset, ratio, iterations, trace)
    known = COLUMNS[setting].paper if setting in COLUMNS and ratio == "1:1" else None
    for preset, row in rows.items():
        for base in ("sync-colocated", "sync-disaggregated"):
            row[f"ratio_to_{base.replace('-', '_')}"] = (
                row["env_steps_per_s"] / rows[base]["env_steps_per_s"]
            )
        row["paper_ratio_to_sync_disaggregated"] = (
            known and known[preset] / known["sync-disaggregated"]
        )
    return list(rows.values())


def measure(setting: str, ratio: str, iterations: int, traces: Path | None = None) -> list[dict]:
    """Rows of a key of SETTINGS; an empty ratio and 0 iterations mean the setting's own. traces:
    beside this file, of real ones.
    """
    rows = []
    for name in SETTINGS[setting]:
        ratios = RATIOS if name in COLUMNS else (REAL[name][1],)
        count = iterations or (COLUMNS[name].iterations if name in COLUMNS else REAL[name][2])
        colocated = None
        for each in (ratio,) if ratio else ratios:
            found = climb(name, each, count, colocated, traces)
            colocated = found[0] if name in COLUMNS else None
            rows += found
    return rows


# ---------------------------------------------------------------- what to tell


def report(rows: list[dict]) -> str:
    """A table and the verdict of every setting, as docs/performance.md has them."""
    parts = []
    for setting in dict.fromkeys(row["setting"] for row in rows):
        mine = [row for row in rows if row["setting"] == setting]
        title = COLUMNS[setting].title if setting in COLUMNS else REAL[setting][0]
        parts += [
            f"{setting}: {title}",
            table(mine),
            "\n".join(verdict(mine) if setting in COLUMNS else contention(mine)),
        ]
    return "\n\n".join(parts)


def table(rows: list[dict]) -> str:
    """Of one setting, in Markdown."""
    head = [
        "preset",
        "ratio",
        "env steps/s",
        "to sync-disaggregated",
        "the paper's",
        "of the bound",
        "waits: env / rollout / actor",
    ]
    out = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        of_paper = row["paper_ratio_to_sync_disaggregated"]
        waits = " / ".join(f"{row[f'bubble_{stage}']:.0%}" for stage in metrics.STAGES)
        colocated = settings_of(row["preset"])[0] == "colocated" and row["setting"] in COLUMNS
        if colocated and row is not rows[0]:
            continue  # the same again
        cells = [
            row["preset"],
            "all" if colocated else row["ratio"],
            f"{row['env_steps_per_s']:.0f}",
            f"{row['ratio_to_sync_disaggregated']:.2f}",
            f"{of_paper:.2f}" if of_paper else "",
            f"{row['share_of_bound']:.1%}",
            waits,
        ]
        out.append("| " + " | ".join(cells) + " |")
    return "\n".join(out)


def verdict(rows: list[dict]) -> list[str]:
    """Which targets a column meets, and where its `full` is behind."""
    full = {row["ratio"]: row for row in rows if row["preset"] == "full"}
    sync = [row for row in rows if settings_of(row["preset"])[1] == 0]
    best = max(full.values(), key=speed)
    rival = max(sync, key=speed)

    def mark(met):
        return "met:     " if met else "not met: "

    out = [
        mark(speed(best) > speed(rival))
        + f"full ({best['ratio']}, {speed(best):.0f}) against the best synchronous row "
        f"({rival['preset']}, {speed(rival):.0f} env steps/s)"
    ]
    for row in (row for row in full.values() if row["paper_ratio_to_sync_disaggregated"]):
        ours = row["ratio_to_sync_disaggregated"]
        papers = row["paper_ratio_to_sync_disaggregated"]
        out.append(
            mark(ours >= papers)
            + f"full / sync-disaggregated {ours:.2f} at {row['ratio']}, the paper's {papers:.2f}"
        )
    out.append(
        mark(best["share_of_bound"] >= TARGET) + f"{best['share_of_bound']:.1%} of the bound "
        f"({best['bound_env_steps_per_s']:.0f}) at the best ratio, {best['ratio']}; to reach: "
        f"{TARGET:.0%}"
    )
    for row in sync:
        ahead = full[row["ratio"]]
        if speed(row) >= speed(ahead):
            behind = (
                f"at {row['ratio']} full ({speed(ahead):.0f}) is behind {row['preset']} "
                f"({speed(row):.0f})"
            )
            out.append(f"         {behind}; its bound is {ahead['bound_env_steps_per_s']:.0f}")
    over = [f"{row['ratio']} {row['preset']}" for row in rows if row["share_of_bound"] > 1.0]
    return out + ([f"         above the bound: {', '.join(over)}"] if over else [])


def speed(row: dict) -> float:
    return row["env_steps_per_s"]


def contention(rows: list[dict]) -> list[str]:
    """Of a real setting: whether workers fight over cores."""
    out = []
    cores = len(os.sched_getaffinity(0))
    for row in rows:
        busy = f"{cores} cores, which this run keeps {row['share_of_bound']:.0%} busy"
        out.append(
            f"{row['preset']}: {row['working']:.1f} workers work at the same time, on {busy}"
        )
    return out
