"""What our own machinery costs: the whole pipeline, as users run it, with stages that take no time
(`--tasks 0`).

    python bench.py machinery                    ours, at 2 to 256 envs
    python bench.py machinery --peer PYTHON      ours beside TorchRL, under a Python that has it
                                                 (`INSTALL`)

`train.py` runs with two env workers, one rollout and one actor worker, with two views of 8 and of
64 pixels. Simulator and policy return constants, so what is left is env → rollout → env → streamer
→ actor: observations written into slots and read out of them, records, batching, results,
advantages, losses, gradients, counters. An iteration has BATCH trajectories whatever the number of
envs, so that rows differ in nothing else. Runs take turns, `--repeats` of each; rows hold medians.

`chunk_steps_per_s`: of the whole pipeline, in `--seconds` or three iterations; a chunk step is a
round trip env → rollout → env. `…_us`: processor time per chunk step, of all threads and in the
kernel too. Other programs change it less than the rate. `cpu_to_8_envs`: their sum over that at 8
envs. Above 1, cost would grow faster than work. `slot_kb`, `pool_mb`: a slot of 8 chunk steps, and
all slots. `private_mb`: what the processes share with nobody.

With --peer: `round_trips_per_s` and `cpu_us` of both, and ours in relation to each way that TorchRL
has (`benchmarks/peers.py`), by the rates of the same round: the median over rounds and the least.
Ours is the one of OURS with the better median. It includes streamer and actor and TorchRL's no
learner, so the comparison leans its way; so does watching, which reads more of ours.

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

import psutil

import metrics
from channel import layout
from config import ROOT, UserError
from run_folder import read_metrics
from scheduler import Admission

# trajectories, chunk steps of each, trajectories of a micro-batch
BATCH = 512
SEGMENT = 8
MICRO_BATCH = 16
WATCH_S = 0.05  # between two looks at a run that is being measured, on the same cores
WARMUP = (
    2  # iterations at least that are not measured; nor is any before B_max and T_max are chosen
)
PARTS = ("env", "rollout", "actor", "launcher")
FLAGS = [
    "--model",
    "emulated",
    "--env",
    "emulated",
    "--tasks",
    "0",
    "--env-workers",
    "2",
    "--batch",
    str(BATCH),
    "--minibatch",
    str(BATCH // 2),
    "--micro-batch",
    str(MICRO_BATCH),
    "--update-epochs",
    "1",
    "--segment",
    str(SEGMENT),
    "--eval-envs",
    "0",
    "--eval-every",
    "0",
    "--checkpoint-every",
    "1000000",
    "--no-trace",
    "--iterations",
    "1000000",
]
OURS = {
    "ours, two env workers": (),
    "ours, one": ("--env-workers", "1"),
}  # as TorchRL's ways differ in processes
# TorchRL's ways at so many envs: `server` starts a process per env, which takes minutes and 10 GB
# for 64
WAYS = {
    2: ("server", "driver", "workers"),
    8: ("server", "driver", "workers"),
    64: ("driver", "workers"),
}
INSTALL = "python3 -m venv ~/peers && ~/peers/bin/pip install torch==2.13.0 torchrl==0.14.1"


def part_of(process: str) -> str:
    """What the processor time of a process counts as. Workers are named "env-0"; the rest is the
    launcher and its fork server.
    """
    stage = process.partition("-")[0]
    return stage if stage in metrics.STAGES else "launcher"


def family(pid: int) -> list[psutil.Process]:
    parent = psutil.Process(pid)
    return [parent, *parent.children(recursive=True)]


def cpu_seconds(pid: int) -> dict[str, float]:
    """Processor seconds that each of PARTS has used so far."""
    used = dict.fromkeys(PARTS, 0.0)
    for process in family(pid):
        with contextlib.suppress(psutil.NoSuchProcess):  # a helper that has just ended
            times = process.cpu_times()
            used[part_of(process.name())] += times.user + times.system
    return used


def follow(
    command: list[str], watch: Callable[[Path, int], dict | None], limit_s: float = 300.0
) -> dict:
    """Runs a command that writes to FOLDER, which stands for a new folder, until `watch(folder,
    pid)` returns a result.

    Its output is the folder's file "log". Raises UserError when it ends before or takes longer than
    `limit_s`.
    """
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        deadline = time.monotonic() + limit_s
        command = [part.replace("FOLDER", name) for part in command]
        with open(folder / "log", "w") as log:
            environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT
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
            members = family(process.pid) if process.poll() is None else []
            process.terminate()
            try:
                process.wait(30.0)
            except subprocess.TimeoutExpired:
                process.kill()
            for member in psutil.wait_procs(members, timeout=15.0)[
                1
            ]:  # of a library that leaves its workers behind
                member.kill()


def run_pipeline(envs: int, pixels: int, seconds: float, flags: tuple[str, ...] = ()) -> dict:
    """One run of the real command: its row, over `seconds` or three iterations, whichever is
    longer.
    """
    # lines at the last look; how many it takes for the next; the look that it counts from
    seen = 0
    least = WARMUP
    first = None

    def watch(folder: Path, pid: int) -> dict | None:
        nonlocal seen, least, first
        file = folder / "run" / "metrics.jsonl"
        count = file.read_bytes().count(b"\n") if file.is_file() else 0
        if count < least or count == seen:
            return None
        seen = count  # to read them all again at every look would slow down what is measured
        lines = read_metrics(folder / "run")[:count]
        look = lines[-1], cpu_seconds(pid), time.monotonic()
        if first is None:
            if any(line["tuning"] for line in lines):
                first = look
                least = count + 3
            return None
        if look[0]["time"] - first[0]["time"] < seconds:
            return None
        row = {"envs": envs, "pixels": pixels} | rates(first, look)
        return row | {
            "private_mb": sum(process.memory_full_info().uss for process in family(pid)) / 1e6
        }

    flags = [*FLAGS, *flags, "--envs", str(envs), "--image-size", str(pixels)]
    command = [sys.executable, "train.py", *flags, "--run", "FOLDER/run"]
    return follow(command, watch)


def rates(first: tuple[dict, dict, float], last: tuple[dict, dict, float]) -> dict:
    """Rate and processor time per chunk step between two looks: a metrics line, then the processor
    seconds of PARTS and when.
    """
    rate = (last[0]["collected"] - first[0]["collected"]) / (last[0]["time"] - first[0]["time"])
    row = {"chunk_steps_per_s": rate}
    row |= {
        f"{part}_us": 1e6 * (last[1][part] - first[1][part]) / (last[2] - first[2]) / rate
        for part in PARTS
    }
    return row | {"cpu_us": sum(row[f"{part}_us"] for part in PARTS)}


def run_peer(python: str, way: str, envs: int, pixels: int, seconds: float) -> dict:
    """One run of `peers.py`: round trips/s, and processor microseconds of all its processes per
    round trip.
    """
    used = []

    def watch(folder: Path, pid: int) -> dict | None:
        events = [
            json.loads(line)
            for line in (folder / "log").read_text().splitlines(True)
            if line.startswith('{"event"')
        ]
        if len(events) > len(used):
            used.append((sum(cpu_seconds(pid).values()), time.monotonic()))
        if len(used) < 2:
            return None
        rate = events[1]["round_trips"] / events[1]["seconds"]
        return {
            "round_trips_per_s": rate,
            "cpu_us": 1e6 * (used[1][0] - used[0][0]) / (used[1][1] - used[0][1]) / rate,
        }

    flags = ["--way", way, "--envs", str(envs), "--pixels", str(pixels), "--seconds", str(seconds)]
    return follow([python, str(ROOT / "benchmarks" / "peers.py"), *flags], watch)


def sizes(envs: int, pixels: int) -> dict:
    """Memory of the slots, from the schema that `train.py` makes for these flags."""
    import train

    setup = train.prepare(train.parse([*FLAGS, "--envs", str(envs), "--image-size", str(pixels)]))
    slots = Admission.of(setup.config).slots
    one = layout(setup.slots, 1)[1]
    return {"slot_kb": one / 1e3, "pool_mb": slots * one / 1e6}


def medians(runs: list[dict]) -> dict:
    return {key: statistics.median(run[key] for run in runs) for key in runs[0]}


def measure(
    repeats: int,
    seconds: float,
    envs: tuple[int, ...] = (2, 8, 64, 256),
    pixels: tuple[int, ...] = (8, 64),
) -> list[dict]:
    """A row per number of envs and size of pictures."""
    kinds = [(n, size) for size in pixels for n in envs]
    runs = {}
    for _ in range(repeats):
        for kind in kinds:
            runs.setdefault(kind, []).append(run_pipeline(*kind, seconds))
            print(
                f"{kind[0]} envs, {kind[1]} pixels: {runs[kind][-1]['chunk_steps_per_s']:.0f} "
                "chunk steps/s",
                flush=True,
            )
    rows = {kind: medians(runs[kind]) | sizes(*kind) for kind in kinds}
    for (_, size), row in rows.items():
        base = rows.get((8, size))
        row["cpu_to_8_envs"] = base and row["cpu_us"] / base["cpu_us"]
    print(f"beside TorchRL: --peer PYTHON, a Python that has it ({INSTALL})")
    return list(rows.values())


def compare(
    python: str, repeats: int, seconds: float, envs: tuple[int, ...] = tuple(WAYS), pixels: int = 64
) -> list[dict]:
    """A row for each of OURS and of TorchRL's ways, per number of envs. Raises UserError where
    `python` has no TorchRL.
    """
    try:
        found = (
            subprocess.run(
                [python, "-c", "import torchrl"], capture_output=True, timeout=300
            ).returncode
            == 0
        )
    except OSError:
        found = False
    if not found:
        raise UserError(
            f"{python} has no TorchRL: make one with `{INSTALL}` and give --peer ~/peers/bin/python"
        )
    rows = []
    for n in envs:
        runs: dict[str, list[dict]] = {}
        for _ in range(repeats):
            for name in (*OURS, *WAYS[n]):
                if name in OURS:
                    row = run_pipeline(n, pixels, seconds, OURS[name])
                    run = {"round_trips_per_s": row["chunk_steps_per_s"], "cpu_us": row["cpu_us"]}
                else:
                    run = run_peer(python, name, n, pixels, seconds)
                runs.setdefault(name, []).append(run)
                print(
                    f"{n} envs, {name}: {run['round_trips_per_s']:.0f} round trips/s, "
                    f"{run['cpu_us']:.0f} µs",
                    flush=True,
                )
        ours = max(
            (runs[name] for name in OURS), key=lambda found: medians(found)["round_trips_per_s"]
        )
        rows += [
            {"name": name, "envs": n, "pixels": pixels} | relate(ours, found)
            for name, found in runs.items()
        ]
    return rows


def relate(ours: list[dict], other: list[dict]) -> dict:
    """Medians of the rounds of `other`, and its relation to the same rounds of ours."""
    times = [
        mine["round_trips_per_s"] / run["round_trips_per_s"]
        for mine, run in zip(ours, other, strict=True)
    ]
    cpu = [run["cpu_us"] / mine["cpu_us"] for mine, run in zip(ours, other, strict=True)]
    relation = {"ours_times_rate": statistics.median(times), "ours_times_rate_least": min(times)}
    return medians(other) | relation | {"its_cpu_to_ours": statistics.median(cpu)}
