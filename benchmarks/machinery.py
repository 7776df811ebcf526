"""Measures what our own machinery costs: the whole pipeline, as users run it, with stages that take
no time (`--tasks 0`).

    python bench.py machinery                    ours, at 2 to 256 envs
    python bench.py machinery --against FOLDER   ours in turns with another checkout of this project
    python bench.py machinery --peer PYTHON      ours in turns with TorchRL, under a Python that has
                                                 it (`INSTALL`)

`train.py` runs with two env workers, one rollout and one actor worker, with two views of 8 and of
64 pixels. Simulator and policy return constants. What is left is the way env → rollout → env →
streamer → actor: observations are written into slots and read out of them, records travel, and
batches, results, advantages, losses, gradients and counters are made. An iteration has BATCH
trajectories whatever the number of envs, so rows differ in nothing else. Runs take turns,
`--repeats` of each, and rows hold medians.

    chunk_steps_per_s   of the whole pipeline, over `--seconds` or three iterations, whichever is
                        longer; a chunk step is one round trip env → rollout → env
    env_us, …, cpu_us   processor time per chunk step, of all threads and in the kernel too, by
                        stage and in all; other programs change it less than they change the rate
    cpu_to_8_envs       cpu_us over that at 8 envs; above 1 the cost grows faster than the work
    slot_kb, pool_mb    a slot of 8 chunk steps, and all slots together
    private_mb          memory that the processes share with nobody

With --against, each side runs the `train.py` of its own folder, both under this Python. The other
checkout must take the same flags. `other_…` are its figures, and `…_ratio` are our medians over
its medians: above 1 for `rate_ratio`, and below 1 for `cpu_ratio`, means that ours is better.

With --peer, rows have `round_trips_per_s` and `cpu_us` of both, and how ours relates to each way
that TorchRL has (`benchmarks/peers.py`), by the rates of the same round: the median over rounds and
the least. Ours is the one of OURS with the better median. It includes streamer and actor, and
TorchRL's has no learner, so the comparison leans its way; so does watching, which reads more of
ours.

Left out: what a simulator, a network and a GPU cost; start-up.
"""

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import psutil

import metrics
from channel import layout
from config import ROOT
from errors import UserError, require
from run_folder import read_metrics
from scheduler import Admission

BATCH = 512  # trajectories of an iteration
SEGMENT = 8  # chunk steps of a trajectory
MICRO_BATCH = 16 * SEGMENT  # chunk steps
WATCH_S = 0.05  # between two looks at a run that is being measured, on the same cores
WARMUP = 2  # iterations at least that are not measured; none before B_max and T_max are chosen is
PARTS = ("env", "rollout", "actor", "launcher")
ENVS = (2, 8, 64, 256)
PIXELS = (8, 64)
FLAGS = (
    "--model emulated --env emulated --tasks 0 --env-workers 2 "
    f"--batch {BATCH} --minibatch {BATCH // 2} --micro-batch {MICRO_BATCH} --update-epochs 1 "
    f"--segment {SEGMENT} --eval-envs 0 --eval-every 0 --checkpoint-every 1000000 --no-trace "
    "--iterations 1000000"
).split()
# Our two ways differ in processes, as TorchRL's do.
OURS = {"ours, two env workers": (), "ours, one": ("--env-workers", "1")}
# TorchRL's ways at so many envs. `server` starts a process per env: with 64 envs that takes minutes
# and 10 GB.
WAYS = {
    2: ("server", "driver", "workers"),
    8: ("server", "driver", "workers"),
    64: ("driver", "workers"),
}
INSTALL = "python3 -m venv ~/peers && ~/peers/bin/pip install torch==2.13.0 torchrl==0.14.1"


# ---------------------------------------------------------------- processor time


def part_of(process: str) -> str:
    """Names what the processor time of a process counts as, one of PARTS.

    Workers are named "env-0". The rest is the launcher and its fork server."""
    stage = process.partition("-")[0]
    return stage if stage in metrics.STAGES else "launcher"


def family(pid: int) -> list[psutil.Process]:
    """Lists a process and all that it started."""
    parent = psutil.Process(pid)
    return [parent, *parent.children(recursive=True)]


def cpu_seconds(pid: int) -> dict[str, float]:
    """Adds up the processor seconds that each of PARTS has used so far."""
    used = dict.fromkeys(PARTS, 0.0)
    for process in family(pid):
        with contextlib.suppress(psutil.NoSuchProcess):  # a helper that has just ended
            times = process.cpu_times()
            used[part_of(process.name())] += times.user + times.system
    return used


# ---------------------------------------------------------------- one run


class Look(NamedTuple):
    """What was seen of a run at one moment."""

    line: dict  # the newest of metrics.jsonl
    used: dict[str, float]  # processor seconds of PARTS
    time: float  # seconds, monotonic


def follow(
    command: list[str],
    watch: Callable[[Path, int], dict | None],
    limit_s: float = 300.0,
    checkout: Path = ROOT,
) -> dict:
    """Runs a command until `watch(folder, pid)` returns a result, and returns that.

    FOLDER in the command stands for a new folder, where the command writes. Its output is the
    file "log" there. The command runs in the folder `checkout`. Raises UserError when it ends
    before there is a result, or takes longer than `limit_s`."""
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        deadline = time.monotonic() + limit_s
        command = [part.replace("FOLDER", name) for part in command]
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
        with open(folder / "log", "w") as log:
            process = subprocess.Popen(
                command, cwd=checkout, env=environment, stdout=log, stderr=subprocess.STDOUT
            )
        try:
            while process.poll() is None and time.monotonic() < deadline:
                if result := watch(folder, process.pid):
                    return result
                time.sleep(WATCH_S)
            output = (folder / "log").read_text().strip()[-300:]
            raise UserError(
                f"`{' '.join(command)}` failed or took longer than {limit_s:.0f} s: {output}"
            )
        finally:
            end(process)


def end(process: subprocess.Popen) -> None:
    """Ends a command, and the workers that some libraries leave behind."""
    members = family(process.pid) if process.poll() is None else []
    process.terminate()
    try:
        process.wait(30.0)
    except subprocess.TimeoutExpired:
        process.kill()
    _, alive = psutil.wait_procs(members, timeout=15.0)
    for member in alive:
        member.kill()


class Watch:
    """Follows metrics.jsonl of a run of `train.py` until there is enough for a row."""

    def __init__(self, seconds: float):
        self.seconds = seconds  # to measure, at least
        self.seen = 0  # lines at the last look
        self.least = WARMUP  # lines that the next look needs
        self.first: Look | None = None  # where measuring began

    def __call__(self, folder: Path, pid: int) -> dict | None:
        """Looks once. Returns the row's figures, or None while there are not enough of them."""
        file = folder / "run" / "metrics.jsonl"
        count = file.read_bytes().count(b"\n") if file.is_file() else 0
        if count < self.least or count == self.seen:
            return None

        # Read lines only when there are new ones: reading slows down what is measured.
        self.seen = count
        lines = read_metrics(folder / "run")[:count]
        look = Look(lines[-1], cpu_seconds(pid), time.monotonic())
        if self.first is None:
            if any(line["tuning"] for line in lines):
                self.first = look
                self.least = count + 3
            return None
        if look.line["time"] - self.first.line["time"] < self.seconds:
            return None
        private = sum(process.memory_full_info().uss for process in family(pid))
        return rates(self.first, look) | {"private_mb": private / 1e6}


def run_pipeline(
    envs: int,
    pixels: int,
    seconds: float,
    flags: tuple[str, ...] = (),
    checkout: Path = ROOT,
) -> dict:
    """Runs `train.py` of a checkout once, over `seconds` or three iterations, whichever is longer.

    Returns its row."""
    size = ["--envs", str(envs), "--image-size", str(pixels)]
    command = [sys.executable, "train.py", *FLAGS, *flags, *size, "--run", "FOLDER/run"]
    found = follow(command, Watch(seconds), checkout=checkout)
    return {"envs": envs, "pixels": pixels} | found


def rates(first: Look, last: Look) -> dict:
    """Computes rate and processor time per chunk step between two looks."""
    steps = last.line["collected"] - first.line["collected"]
    rate = steps / (last.line["time"] - first.line["time"])
    row = {"chunk_steps_per_s": rate}
    for part in PARTS:
        share = (last.used[part] - first.used[part]) / (last.time - first.time)
        row[f"{part}_us"] = 1e6 * share / rate
    return row | {"cpu_us": sum(row[f"{part}_us"] for part in PARTS)}


def sizes(envs: int, pixels: int) -> dict:
    """Computes the memory of the slots from the schema that `train.py` makes for these flags."""
    import train

    setup = train.prepare(train.parse([*FLAGS, "--envs", str(envs), "--image-size", str(pixels)]))
    slots = Admission.of(setup.config).slots
    _, one = layout(setup.slots, 1)
    return {"slot_kb": one / 1e3, "pool_mb": slots * one / 1e6}


# ---------------------------------------------------------------- comparisons


def medians(runs: list[dict]) -> dict:
    return {key: statistics.median(run[key] for run in runs) for key in runs[0]}


def measure(
    repeats: int,
    seconds: float,
    envs: tuple[int, ...] = ENVS,
    pixels: tuple[int, ...] = PIXELS,
) -> list[dict]:
    """Measures ours. Returns a row per number of envs and size of pictures."""
    kinds = [(n, size) for size in pixels for n in envs]
    runs = {kind: [] for kind in kinds}
    for _ in range(repeats):
        for n, size in kinds:
            row = run_pipeline(n, size, seconds)
            runs[n, size].append(row)
            rate = row["chunk_steps_per_s"]
            print(f"{n} envs, {size} pixels: {rate:.0f} chunk steps/s", flush=True)
    rows = {kind: medians(runs[kind]) | sizes(*kind) for kind in kinds}
    for (_, size), row in rows.items():
        base = rows.get((8, size))
        row["cpu_to_8_envs"] = base and row["cpu_us"] / base["cpu_us"]
    print(f"beside TorchRL: --peer PYTHON, a Python that has it ({INSTALL})")
    return list(rows.values())


def measure_against(
    other: Path,
    repeats: int,
    seconds: float,
    envs: tuple[int, ...] = ENVS,
    pixels: tuple[int, ...] = PIXELS,
) -> list[dict]:
    """Measures ours and another checkout in turns. Returns a row per number of envs and size.

    Who begins alternates from round to round. Raises UserError where `other` is no checkout."""
    other = other.absolute()
    require(
        (other / "train.py").is_file(),
        f"{other} has no train.py: give --against the folder of another checkout of this project",
    )
    kinds = [(n, size) for size in pixels for n in envs]
    runs = {kind: {ROOT: [], other: []} for kind in kinds}
    for turn in range(repeats):
        for n, size in kinds:
            for checkout in (ROOT, other) if turn % 2 == 0 else (other, ROOT):
                row = run_pipeline(n, size, seconds, checkout=checkout)
                runs[n, size][checkout].append(row)
                rate = row["chunk_steps_per_s"]
                print(f"{n} envs, {size} pixels, {checkout}: {rate:.0f} chunk steps/s", flush=True)
    return [relate_checkouts(found[ROOT], found[other]) for found in runs.values()]


def relate_checkouts(ours: list[dict], other: list[dict]) -> dict:
    """Makes one row of the runs of two checkouts; see the top of this file."""
    mine = medians(ours)
    its = medians(other)
    rate_ratio = mine["chunk_steps_per_s"] / its["chunk_steps_per_s"]
    return {
        "envs": ours[0]["envs"],
        "pixels": ours[0]["pixels"],
        "rounds": len(ours),
        "chunk_steps_per_s": mine["chunk_steps_per_s"],
        "other_chunk_steps_per_s": its["chunk_steps_per_s"],
        "rate_ratio": rate_ratio,
        "cpu_us": mine["cpu_us"],
        "other_cpu_us": its["cpu_us"],
        "cpu_ratio": mine["cpu_us"] / its["cpu_us"],
        "private_mb": mine["private_mb"],
        "other_private_mb": its["private_mb"],
    }


def compare(
    python: str,
    repeats: int,
    seconds: float,
    envs: tuple[int, ...] = tuple(WAYS),
    pixels: int = 64,
) -> list[dict]:
    """Measures ours and TorchRL in turns. Returns a row for each of OURS and of TorchRL's ways.

    Raises UserError where `python` has no TorchRL."""
    require(
        has_torchrl(python),
        f"{python} has no TorchRL: make one with `{INSTALL}` and give --peer ~/peers/bin/python",
    )
    rows = []
    for n in envs:
        runs = {name: [] for name in (*OURS, *WAYS[n])}
        for _ in range(repeats):
            for name, found in runs.items():
                run = run_either(python, name, n, pixels, seconds)
                found.append(run)
                rate = f"{run['round_trips_per_s']:.0f} round trips/s"
                print(f"{n} envs, {name}: {rate}, {run['cpu_us']:.0f} µs", flush=True)
        ours = max((runs[name] for name in OURS), key=median_rate)
        for name, found in runs.items():
            rows.append({"name": name, "envs": n, "pixels": pixels} | relate(ours, found))
    return rows


def has_torchrl(python: str) -> bool:
    try:
        found = subprocess.run([python, "-c", "import torchrl"], capture_output=True, timeout=300)
    except OSError:
        return False
    return found.returncode == 0


def median_rate(runs: list[dict]) -> float:
    return medians(runs)["round_trips_per_s"]


def run_either(python: str, name: str, envs: int, pixels: int, seconds: float) -> dict:
    """Runs one of OURS or one of TorchRL's ways once: round trips/s and processor microseconds."""
    if name not in OURS:
        return run_peer(python, name, envs, pixels, seconds)
    row = run_pipeline(envs, pixels, seconds, OURS[name])
    return {"round_trips_per_s": row["chunk_steps_per_s"], "cpu_us": row["cpu_us"]}


class PeerWatch:
    """Follows the two events that `peers.py` prints: where measuring begins, and where it ends."""

    def __init__(self):
        self.used = []  # processor seconds and the moment, at each event

    def __call__(self, folder: Path, pid: int) -> dict | None:
        lines = (folder / "log").read_text().splitlines(keepends=True)
        events = [json.loads(line) for line in lines if line.startswith('{"event"')]
        if len(events) > len(self.used):
            self.used.append((sum(cpu_seconds(pid).values()), time.monotonic()))
        if len(self.used) < 2:
            return None
        rate = events[1]["round_trips"] / events[1]["seconds"]
        (cpu_before, before), (cpu_after, after) = self.used
        share = (cpu_after - cpu_before) / (after - before)
        return {"round_trips_per_s": rate, "cpu_us": 1e6 * share / rate}


def run_peer(python: str, way: str, envs: int, pixels: int, seconds: float) -> dict:
    """Runs `peers.py` once: round trips/s, and processor microseconds of all its processes each."""
    flags = ["--way", way, "--envs", str(envs), "--pixels", str(pixels), "--seconds", str(seconds)]
    return follow([python, str(ROOT / "benchmarks" / "peers.py"), *flags], PeerWatch())


def relate(ours: list[dict], other: list[dict]) -> dict:
    """Relates the rounds of `other` to the same rounds of ours, and adds its medians."""
    times = []
    cpu = []
    for mine, run in zip(ours, other, strict=True):
        times.append(mine["round_trips_per_s"] / run["round_trips_per_s"])
        cpu.append(run["cpu_us"] / mine["cpu_us"])
    return medians(other) | {
        "ours_times_rate": statistics.median(times),
        "ours_times_rate_least": min(times),
        "its_cpu_to_ours": statistics.median(cpu),
    }
