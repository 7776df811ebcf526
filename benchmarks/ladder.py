"""Measures the five presets, RL-VLA³'s Table 1, as users run them: `train.py --preset …`, one after
another on the same work; and the headlines of its second version.

    python bench.py ladder                       all of it: the three columns, the headlines, then
                                                 both real settings
    python bench.py ladder --setting columns     the paper's three columns at 1:1, 2:1 and 3:1
    python bench.py ladder --setting headlines   the second version's two
    python bench.py ladder --setting gr00t --ratio 1:1

    emulated    LIBERO + π0.5         the paper's columns: all stages sleep for times calibrated on
    gr00t       LIBERO + GR00T N1.5   the paper's rows, so cores hardly matter; processes, queues,
    vectorised  ManiSkill + π0        batcher, streamer and weight plane are those of every run

    metaworld_colocated  Meta-World + π0.5: sync-colocated and full-colocated, whose stages share a
                         device (`emulated/devices.py`)
    maniskill_hybrid     ManiSkill, hybrid 6:2: simulators and inference on devices apart, training
                         on both; everything synchronous, and everything asynchronous

    embedded    Meta-World, small π0.5, everything real
    libero      LIBERO, small untrained π0.5, everything real

In `vectorised`, envs step together: in one lane per GPU where all wait for all, which is best
there, else in two. At 1:1 they are also split into single envs, as in the paper. Emulated,
colocated is the same at every ratio, so that row is measured once. Where no GPU is, the stages of
the real settings share the cores, and hiding one behind another gains only what is idle.

    env_steps_per_s          what passed the stage that bounds a row, in steady state (`steady`)
    bound_env_steps_per_s    `emulated_bound`, `real_bound`
    rollout_s, actor_s       the two phases of a synchronous iteration
    working                  workers that work at the same time, on average; more of them than cores
                             in a real row means that they fight over cores

Left out: several nodes, which `nodes.py` measures.
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
from benchmarks.emulated import gr00t, libero, maniskill, maniskill_hybrid, metaworld
from benchmarks.machinery import cpu_seconds
from benchmarks.plan_against_paper import HYBRID, MAIN, SECOND, TABLE_1, Gain
from config import PRESETS, ROOT, Config, from_json, parse_ratio
from errors import require
from planning.settings import divisor
from run_folder import read_metrics

RATIOS = ("1:1", "2:1", "3:1")
# Of metrics.jsonl: a row holds their means.
MEANS = (
    *(f"bubble_{stage}" for stage in metrics.STAGES),
    "batch_size_mean",
    "weight_sync_s",
    "weight_stall_s",
)
TARGET = 0.97  # share of the bound, at the best ratio


@dataclass(frozen=True)
class Column:
    """A column of RL-VLA³'s Table 1, emulated."""

    title: str
    env: str
    costs: ModuleType
    iterations: int  # that are measured
    paper: dict[str, float]  # env steps/s of its presets on 8 GPUs at 1:1


@dataclass(frozen=True)
class Headline:
    """A gain of RL-VLA³'s second version, emulated."""

    title: str
    env: str
    costs: ModuleType
    iterations: int  # that are measured
    rows: Gain


@dataclass(frozen=True)
class Real:
    """A setting in which nothing sleeps."""

    title: str
    ratio: str
    iterations: int  # that are measured
    flags: tuple[str, ...]  # of train.py


def paper(column: str) -> dict[str, float]:
    """Reads the paper's env steps/s of all presets at 8 GPUs."""
    return {preset: row[0] for preset, row in zip(TABLE_1, MAIN[column], strict=True)}


SINGLE_ENVS = "rollout-async, single envs"  # the split that costs RL-VLA³ what it costs
COLUMNS = {
    "emulated": Column("LIBERO + π0.5", "emulated", libero, 5, paper("LIBERO π0.5")),
    "gr00t": Column("LIBERO + GR00T N1.5", "emulated_gr00t", gr00t, 6, paper("LIBERO GR00T")),
    "vectorised": Column("ManiSkill + π0", "vectorised", maniskill, 2, paper("ManiSkill π0")),
}
COLUMNS["vectorised"].paper[SINGLE_ENVS] = COLUMNS["vectorised"].paper["rollout-async"]
HEADLINES = {
    "metaworld_colocated": Headline(
        title="Meta-World + π0.5, colocated",
        env="emulated_metaworld",
        costs=metaworld,
        iterations=5,
        rows=SECOND["metaworld_colocated"],
    ),
    "maniskill_hybrid": Headline(
        title="ManiSkill, hybrid 6:2",
        env="vectorised_hybrid",
        costs=maniskill_hybrid,
        iterations=5,
        rows=SECOND["maniskill_hybrid"],
    ),
}
EMULATED = COLUMNS | HEADLINES
LIBERO_FLAGS = (
    "--env libero "
    "--tasks turn_on_the_stove put_the_bowl_on_the_plate open_the_middle_drawer_of_the_cabinet "
    "--envs 6 --segment 4 --batch 12 --minibatch 12 --micro-batch 8 --update-epochs 1"
)
REAL = {
    "embedded": Real("Meta-World, small π0.5", "3:1", 4, ()),
    "libero": Real("LIBERO, small untrained π0.5", "3:1", 4, tuple(LIBERO_FLAGS.split())),
}
SINGLE = {name: (name,) for name in (*EMULATED, *REAL)}
SEVERAL = {"all": (*EMULATED, *REAL), "columns": tuple(COLUMNS), "headlines": tuple(HEADLINES)}
SETTINGS = SEVERAL | SINGLE
COMMON = ("--eval-envs", "0", "--eval-every", "0", "--checkpoint-every", "1000000")


# ---------------------------------------------------------------- what is run


def settings_of(preset: str) -> tuple[str, int, bool]:
    """Looks up placement, staleness, and whether all wait for all."""
    placement, staleness, batch_max, *_ = PRESETS[preset.partition(",")[0]]
    if preset.endswith(HYBRID):
        placement = "hybrid"
    return placement, staleness, batch_max == "all"


def warmup(preset: str) -> int:
    """Counts the iterations that are not measured.

    After so many, as many batches are under way as staleness lets there be."""
    _, staleness, _ = settings_of(preset)
    return staleness + 1


def lanes(preset: str, ratio: str, costs: ModuleType = maniskill) -> int:
    """Counts the lanes of each env worker in a vectorised setting."""
    placement, _, lockstep = settings_of(preset)
    if preset == SINGLE_ENVS:
        workers, envs = libero.sizes(maniskill, ratio, placement)
        return envs // workers
    return costs.LOCKSTEP_LANES if lockstep else costs.LANES


def is_vectorised(costs: ModuleType) -> bool:
    return "Envs" in vars(costs)


def flags(setting: str, preset: str, ratio: str) -> list[str]:
    """Writes the flags of train.py for one row."""
    args = ["--preset", preset.partition(",")[0], "--ratio", ratio, *COMMON]
    if setting in REAL:
        return [*args, *REAL[setting].flags]
    column = EMULATED[setting]
    costs = column.costs
    placement, _, _ = settings_of(preset)
    args += ["--placement", placement]
    workers, envs = libero.sizes(costs, ratio, placement)
    batch = costs.TRAJECTORIES * envs
    minibatch = batch // costs.MINIBATCHES
    numbers = {
        "--env-workers": workers,
        "--envs": envs,
        "--image-size": 8,
        "--batch": batch,
        "--minibatch": minibatch,
        "--micro-batch": divisor(minibatch, costs.MICRO_BATCH) * costs.EPISODE,
        "--update-epochs": costs.UPDATE_EPOCHS,
        "--segment": costs.EPISODE,
        "--chunk": costs.CHUNK,
    }
    if is_vectorised(costs):
        numbers["--lanes"] = lanes(preset, ratio, costs)
    args += ["--model", "emulated", "--env", column.env]
    for flag, number in numbers.items():
        args += [flag, str(number)]
    return args


def run_preset(
    setting: str,
    preset: str,
    ratio: str,
    iterations: int,
    trace: Path | None,
    more: tuple[str, ...] = (),
) -> tuple[list[dict], dict[int, float], Config]:
    """Runs the real command until it has written `iterations` lines of metrics.jsonl.

    It is ended before it begins to drain. Returns the lines, the CPU seconds it had used when there
    were n of them, and its settings. trace: where its trace is to go. more: flags of train.py
    besides those of the preset."""
    # So many batches are under way, and what comes after the last one never starts.
    _, staleness, _ = settings_of(preset)
    total = iterations + staleness + 2
    args = [*flags(setting, preset, ratio), "--iterations", str(total), *more]
    if trace is None:
        args.append("--no-trace")
    environment = dict(os.environ)
    if setting in EMULATED or sum(parse_ratio(ratio)) > torch.cuda.device_count():
        environment["CUDA_VISIBLE_DEVICES"] = ""  # with fewer GPUs than parts, use none

    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        run = Path(folder) / "run"
        log = Path(folder) / "log"
        command = [sys.executable, str(ROOT / "train.py"), *args, "--run", str(run)]
        with open(log, "w") as output:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT
            )
        try:
            used = watch(process, run, iterations)
        finally:
            stop(process, wanted=trace is not None)
        lines = read_metrics(run)[:iterations]
        require(
            len(lines) == iterations,
            f"`train.py {' '.join(args)}` failed: {log.read_text().strip()[-300:]}",
        )
        # A machine that is too busy to write the trace within a minute has shown enough.
        if trace and (run / "trace.json").is_file():
            shutil.copy(run / "trace.json", trace)
        return lines, used, from_json(run / "config.json")


def watch(process: subprocess.Popen, run: Path, iterations: int) -> dict[int, float]:
    """Waits for so many lines of metrics.jsonl, or the end of the run.

    Returns the CPU seconds that the run had used when there were n lines."""
    used = {}
    while process.poll() is None and max(used, default=0) < iterations:
        time.sleep(0.05)
        file = run / "metrics.jsonl"
        count = file.read_bytes().count(b"\n") if file.is_file() else 0
        if count not in used:
            used[count] = sum(cpu_seconds(process.pid).values())
    return used


def stop(process: subprocess.Popen, wanted: bool) -> None:
    """Ends a run, and its workers with it. wanted: its trace is.

    Told twice to end, it writes the trace without finishing its batch."""
    if wanted:
        for _ in range(2):
            process.terminate()
            time.sleep(0.6)  # two words in less than half a second count as one
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(60.0 if wanted else 0.0)
    process.kill()
    process.wait(60.0)


# ---------------------------------------------------------------- what could be


def emulated_bounds(setting: str, ratio: str, preset: str) -> dict[str, float]:
    """Computes the env steps/s that each stage alone allows, from the calibration; and what drawing
    on inference's device allows."""
    placement, _, _ = settings_of(preset)
    costs = EMULATED[setting].costs
    for_rollout, for_actor = libero.devices(ratio, placement)
    workers, envs = libero.sizes(costs, ratio, placement)
    steps = envs * costs.CHUNK  # env steps of one chunk of every env
    share = envs / costs.ENVS

    # An env worker steps its lanes one after another: seconds per chunk of them all.
    drawing = 0.0
    if is_vectorised(costs):
        busy = lanes(preset, ratio, costs) * costs.FIXED + envs / workers * costs.EACH
    else:
        busy = math.ceil(envs / workers) * costs.MEAN
        drawing = envs * costs.MEAN * vars(costs).get("DRAWN", 0.0)

    # The largest batch holds every env. A trajectory of EPISODE chunks asks for one value besides.
    batch = costs.INFER_ALL * (costs.INFER_FIXED + (1 - costs.INFER_FIXED) * share)
    infer = batch * (1 + 1 / costs.EPISODE)
    train = costs.UPDATE_EPOCHS * costs.TRAIN_ALL * share
    return {
        "env": steps / busy,
        "rollout": steps / infer * for_rollout,
        "actor": steps / train * for_actor,
        "drawing": steps / drawing if drawing else math.inf,
    }


def emulated_bound(setting: str, ratio: str, preset: str) -> float:
    """Computes env steps/s if the slowest stage never waited.

    Stages with devices of their own overlap, so the smallest counts. On a device that they share
    they take turns, and their times per env step add up. Hybrid, training shares those of both the
    other stages. Synchronous colocated stages take turns even with simulators, which have none."""
    bounds = emulated_bounds(setting, ratio, preset)
    placement, staleness, _ = settings_of(preset)
    if placement == "hybrid" or placement == "colocated" and staleness == 0:
        return 1.0 / (1.0 / min(bounds["env"], bounds["rollout"]) + 1.0 / bounds["actor"])
    if placement == "colocated":
        shared = (bounds[stage] for stage in ("rollout", "actor", "drawing"))
        return min(bounds["env"], 1.0 / sum(1.0 / bound for bound in shared))
    return min(bounds.values())


def real_bound(env_steps: float, cpu_s: float) -> float:
    """Computes env steps/s if this run kept every core busy: cores / (CPU seconds per env step).

    Without GPUs all stages draw on the same cores, so their sum limits a pipeline that never waits,
    however it is cut. `cpu_s` is the run's own CPU time over the measured iterations. Other
    programs on the machine lower the rate and not the bound."""
    return len(os.sched_getaffinity(0)) * env_steps / cpu_s


# ---------------------------------------------------------------- what was


def steady(setting: str, ratio: str, preset: str, lines: list[dict]) -> float:
    """Counts env steps after the warm-up, at the stage that bounds the pipeline.

    Where the actor does, or shares a device, steps count when they are trained: trajectories pile
    up before it until admission stops the simulators, and steps that are collected meanwhile would
    let a row exceed its bound. Elsewhere steps count when they are collected: lanes drift apart by
    as much as staleness allows, and a batch is trained only when the slowest of them is there."""
    before = warmup(preset)
    if setting in EMULATED:
        bounds = emulated_bounds(setting, ratio, preset)
        if setting in HEADLINES or min(bounds, key=bounds.get) == "actor":
            costs = EMULATED[setting].costs
            placement, _, _ = settings_of(preset)
            _, envs = libero.sizes(costs, ratio, placement)
            batch = envs * costs.TRAJECTORIES * costs.EPISODE * costs.CHUNK
            return (len(lines) - before) * batch
    return lines[-1]["env_steps"] - lines[before - 1]["env_steps"]


def measure_preset(
    setting: str, preset: str, ratio: str, iterations: int, trace: Path | None
) -> dict:
    """Runs one preset. Returns its row."""
    before = warmup(preset)
    lines, used, config = run_preset(setting, preset, ratio, before + iterations, trace)
    window = lines[before:]
    env_steps = steady(setting, ratio, preset, lines)
    seconds = window[-1]["time"] - lines[before - 1]["time"]
    rate = env_steps / seconds
    names = [name for name in window[0] if name in MEANS]
    mean = {name: statistics.mean(line[name] for line in window) for name in names}
    if setting in EMULATED:
        bound = emulated_bound(setting, ratio, preset)
    else:
        bound = real_bound(env_steps, used[len(lines)] - used[before])
    row = {"setting": setting, "ratio": ratio, "preset": preset, "env_steps_per_s": rate}
    row |= {"bound_env_steps_per_s": bound, "share_of_bound": rate / bound} | mean
    row["working"] = working(config, mean) if setting in REAL else None
    # While the actor waits, the rollout phase of a synchronous iteration runs.
    _, staleness, _ = settings_of(preset)
    waits = mean["bubble_actor"]
    row["rollout_s"] = waits * seconds / iterations if staleness == 0 else None
    row["actor_s"] = (1.0 - waits) * seconds / iterations if staleness == 0 else None
    print(f"{setting} {ratio} {preset}: {rate:.0f} env steps/s", flush=True)
    return row


def working(config: Config, mean: dict[str, float]) -> float:
    """Adds up how many workers work at the same time, on average."""
    counts = {
        "env": config.env.env_workers,
        "rollout": config.rollout.rollout_workers,
        "actor": config.actor.actor_workers,
    }
    return sum(n * (1.0 - mean[f"bubble_{stage}"]) for stage, n in counts.items())


def climb(
    setting: str, ratio: str, iterations: int, colocated: dict | None, traces: Path | None
) -> list[dict]:
    """Measures every preset of one setting. Returns a row for each.

    colocated: that row, where it is known from another ratio."""
    presets = list(TABLE_1)
    if setting == "vectorised" and ratio == "1:1":
        presets.append(SINGLE_ENVS)
    rows = {}
    for preset in presets:
        placement, _, _ = settings_of(preset)
        if placement == "colocated" and colocated:
            rows[preset] = colocated | {"ratio": ratio}
            continue
        trace = None
        if traces and setting in REAL:
            trace = traces.with_name(f"{traces.stem}_{setting}_{preset}_trace.json")
        rows[preset] = measure_preset(setting, preset, ratio, iterations, trace)

    known = COLUMNS[setting].paper if setting in COLUMNS and ratio == "1:1" else None
    for preset, row in rows.items():
        row["gain"] = row["paper_gain"] = None
        for base in ("sync-colocated", "sync-disaggregated"):
            relation = row["env_steps_per_s"] / rows[base]["env_steps_per_s"]
            row[f"ratio_to_{base.replace('-', '_')}"] = relation
        of_paper = known[preset] / known["sync-disaggregated"] if known else None
        row["paper_ratio_to_sync_disaggregated"] = of_paper
    return list(rows.values())


def measure_headline(setting: str, iterations: int) -> list[dict]:
    """Measures a headline's two rows."""
    headline = HEADLINES[setting]
    compared = headline.rows
    rows = [
        measure_preset(setting, preset, compared.ratio, iterations or headline.iterations, None)
        for preset in (compared.synchronous, compared.asynchronous)
    ]
    for row in rows:
        row |= dict.fromkeys(("ratio_to_sync_colocated", "ratio_to_sync_disaggregated"))
        row["paper_ratio_to_sync_disaggregated"] = None
        row["gain"] = row["env_steps_per_s"] / rows[0]["env_steps_per_s"] - 1.0
        row["paper_gain"] = compared.paper - 1.0 if row is rows[1] else 0.0
    return rows


def measure(setting: str, ratio: str, iterations: int, traces: Path | None = None) -> list[dict]:
    """Measures a key of SETTINGS. An empty ratio and 0 iterations mean the setting's own.

    traces: a file beside which those of the real settings go. Raises UserError."""
    own = setting in SEVERAL and setting != "columns" or setting in HEADLINES
    require(not ratio or not own, f"--setting {setting} has ratios of its own: leave out --ratio")
    rows = []
    for name in SETTINGS[setting]:
        if name in HEADLINES:
            rows += measure_headline(name, iterations)
            continue
        kind = COLUMNS.get(name) or REAL[name]
        ratios = RATIOS if name in COLUMNS else (kind.ratio,)
        colocated = None
        for each in (ratio,) if ratio else ratios:
            found = climb(name, each, iterations or kind.iterations, colocated, traces)
            colocated = found[0] if name in COLUMNS else None
            rows += found
    return rows


# ---------------------------------------------------------------- what to tell


def report(rows: list[dict]) -> str:
    """Writes a table and the verdict of every setting, as docs/performance.md has them."""
    parts = []
    for setting in dict.fromkeys(row["setting"] for row in rows):
        mine = [row for row in rows if row["setting"] == setting]
        kind = EMULATED.get(setting) or REAL[setting]
        if setting in HEADLINES:
            parts += [f"{setting}: {kind.title}", gains(mine)]
            continue
        told = verdict(mine) if setting in COLUMNS else contention(mine)
        parts += [f"{setting}: {kind.title}", table(mine), "\n".join(told)]
    return "\n\n".join(parts)


def gains(rows: list[dict]) -> str:
    """Writes a headline's rows as a table in Markdown, and whether the paper's gain is reached."""
    head = [
        "preset",
        "env steps/s",
        "gain",
        "the paper's",
        "of the bound",
        "waits: env / rollout / actor",
    ]
    body = [
        [
            row["preset"],
            f"{row['env_steps_per_s']:.0f}",
            f"{row['gain']:+.1%}",
            f"{row['paper_gain']:+.1%}",
            f"{row['share_of_bound']:.1%} of {row['bound_env_steps_per_s']:.0f}",
            waits(row),
        ]
        for row in rows
    ]
    last = rows[-1]
    words = f"{last['preset']} gains {last['gain']:.1%}, the paper's {last['paper_gain']:.1%}"
    return f"{markdown(head, body)}\n\n{mark(last['gain'] >= last['paper_gain'])}{words}"


def table(rows: list[dict]) -> str:
    """Writes the rows of one setting as a table in Markdown."""
    head = [
        "preset",
        "ratio",
        "env steps/s",
        "to sync-disaggregated",
        "the paper's",
        "of the bound",
        "waits: env / rollout / actor",
    ]
    body = []
    for row in rows:
        placement, _, _ = settings_of(row["preset"])
        is_same = placement == "colocated" and row["setting"] in COLUMNS  # at every ratio
        if is_same and row is not rows[0]:
            continue
        of_paper = row["paper_ratio_to_sync_disaggregated"]
        cells = [
            row["preset"],
            "all" if is_same else row["ratio"],
            f"{row['env_steps_per_s']:.0f}",
            f"{row['ratio_to_sync_disaggregated']:.2f}",
            f"{of_paper:.2f}" if of_paper else "",
            f"{row['share_of_bound']:.1%}",
            waits(row),
        ]
        body.append(cells)
    return markdown(head, body)


def waits(row: dict) -> str:
    """Writes the bubble of every stage."""
    return " / ".join(f"{row[f'bubble_{stage}']:.0%}" for stage in metrics.STAGES)


def markdown(head: list[str], body: list[list[str]]) -> str:
    """Writes a table in Markdown."""
    lines = [f"| {' | '.join(cells)} |" for cells in (head, *body)]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])


def verdict(rows: list[dict]) -> list[str]:
    """Tells which targets a column meets, and where its `full` is behind."""
    full = {row["ratio"]: row for row in rows if row["preset"] == "full"}
    sync = [row for row in rows if settings_of(row["preset"])[1] == 0]
    best = max(full.values(), key=speed)
    rival = max(sync, key=speed)

    # The targets: faster than any synchronous row, the paper's ratio, and close to the bound.
    out = [
        mark(speed(best) > speed(rival))
        + f"full ({best['ratio']}, {speed(best):.0f}) against the best synchronous row "
        f"({rival['preset']}, {speed(rival):.0f} env steps/s)"
    ]
    for row in full.values():
        ours = row["ratio_to_sync_disaggregated"]
        papers = row["paper_ratio_to_sync_disaggregated"]
        if papers:
            words = f"full / sync-disaggregated {ours:.2f} at {row['ratio']}, the paper's"
            out.append(f"{mark(ours >= papers)}{words} {papers:.2f}")
    share = best["share_of_bound"]
    out.append(
        mark(share >= TARGET) + f"{share:.1%} of the bound ({best['bound_env_steps_per_s']:.0f}) "
        f"at the best ratio, {best['ratio']}; to reach: {TARGET:.0%}"
    )

    # What does not fit.
    for row in sync:
        ahead = full[row["ratio"]]
        if speed(row) >= speed(ahead):
            out.append(
                f"         at {row['ratio']} full ({speed(ahead):.0f}) is behind {row['preset']} "
                f"({speed(row):.0f}); its bound is {ahead['bound_env_steps_per_s']:.0f}"
            )
    over = [f"{row['ratio']} {row['preset']}" for row in rows if row["share_of_bound"] > 1.0]
    if over:
        out.append(f"         above the bound: {', '.join(over)}")
    return out


def mark(is_met: bool) -> str:
    return "met:     " if is_met else "not met: "


def speed(row: dict) -> float:
    return row["env_steps_per_s"]


def contention(rows: list[dict]) -> list[str]:
    """Tells of a real setting whether workers fight over cores."""
    cores = len(os.sched_getaffinity(0))
    out = []
    for row in rows:
        busy = f"{cores} cores, which this run keeps {row['share_of_bound']:.0%} busy"
        words = f"{row['working']:.1f} workers work at the same time"
        out.append(f"{row['preset']}: {words}, on {busy}")
    return out
