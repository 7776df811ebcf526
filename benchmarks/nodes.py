"""Measures what a node is worth among others: the ladder's LIBERO column, by torchrun with 1, 2, 4
and 8 emulated nodes on this machine.

    python -m benchmarks.nodes --json benchmarks/results/nodes.json      about 12 minutes
    python -m benchmarks.nodes --counts 1 8 --slower 8 --iterations 4

Each node is `torchrun … train.py --preset full` as a user starts it, with 16 env workers, a rollout
and an actor worker that sleep for the times of `emulated/libero.py`. All else is real, also what
nodes say to one another. Eight nodes are 168 processes, so all sleep SLOWER times as long as in the
ladder: the cores must not be the limit (`cores`).

    env_steps_per_s  of all nodes: trained batches over the time they took, after the warm-up
    efficiency       that over N times one node's
    collected        the same of steps as they were collected: higher while lanes of N nodes drift
                     apart, and equal in the long run
    predicted        `efficiency` in virtual time, by plan.py
    spread           of nodes, slowest over fastest by collected steps
    admission        share of the env workers' time for which they waited for a version, that is for
                     the slowest lane of any node
    action           and for an action
    gradient         share of the actors' time for which they waited for others' gradients; where
                     simulators are the limit, it is time that they would have waited for data
    reduce_ms        of an optimizer step: the sum itself, of few bytes here
    cores            share of this machine that the run used, of its launchers alone, and that was
                     busy for whatever reason

Left out: a network, and bytes of real gradients (`benchmarks/wire.py` has both); nodes that differ.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import tyro

from benchmarks import ladder
from benchmarks.emulated import libero
from benchmarks.machinery import cpu_seconds
from benchmarks.measuring import end_on_sigterm
from benchmarks.plan_against_paper import emulated_node
from config import ROOT
from errors import exit_on_user_error, require
from planning.events import simulate
from run_folder import read_metrics

PORT = 29650
LIMIT_S = 600.0  # for one number of nodes
BATCH = libero.ENVS * libero.TRAJECTORIES * libero.EPISODE * libero.CHUNK  # env steps, at 1:1
HEAD = ("nodes", "env steps/s", "efficiency", "collected", "predicted", "spread")
HEAD += ("admission", "action", "gradient", "reduce_ms", "cores: run · launchers · busy")


@dataclass(kw_only=True)
class NodesConfig:
    """Runs emulated nodes by torchrun on this machine."""

    counts: tuple[int, ...] = (1, 2, 4, 8)
    """numbers of nodes; the first one is what the others are compared with"""
    preset: str = "full"
    """of the ladder"""
    slower: float = 4.0
    """how many times as long everything takes as in the ladder"""
    iterations: int = 6
    """that are measured, after the warm-up"""
    json: Path | None = None
    """also write the rows to this file"""


class Job:
    """Several torchruns, all of whose processes end with it."""

    def __init__(self, nodes: int, flags: list[str], folder: Path, slower: float):
        self.logs = [folder / f"{node}.log" for node in range(nodes)]
        options = f"--nnodes {nodes} --nproc-per-node 1 --rdzv-backend c10d --rdzv-id {nodes} "
        options += f"--rdzv-endpoint 127.0.0.1:{PORT}"
        command = [sys.executable, "-m", "torch.distributed.run", *options.split(), "--"]
        environment = os.environ | {"SLOWER": str(slower), "CUDA_VISIBLE_DEVICES": ""}
        self.agents = []
        for log in self.logs:
            with open(log, "w") as output:
                agent = subprocess.Popen(
                    [*command, "train.py", *flags],
                    cwd=ROOT,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                )
            self.agents.append(agent)

    def said(self) -> str:
        return "".join(log.read_text()[-300:] for log in self.logs)

    def used(self) -> dict[str, float]:
        """Returns the processor seconds of all nodes so far, by kind of process."""
        each = [cpu_seconds(agent.pid) for agent in self.agents]
        return {part: sum(one[part] for one in each) for part in each[0]}

    def stop(self) -> None:
        """Ends all processes. Launchers are told twice, so that nothing is saved."""
        family = [p for agent in self.agents for p in descendants(agent.pid)]
        launchers = [p for agent in self.agents for p in children(agent.pid)]
        for _ in range(2):
            for launcher in launchers:
                if launcher.is_running():
                    launcher.terminate()
            time.sleep(0.6)  # two words in less than half a second count as one
        _, left = psutil.wait_procs(family, timeout=40.0)
        for process in left:
            process.kill()
        for agent in self.agents:
            agent.wait(20.0)


def children(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children()
    except psutil.NoSuchProcess:
        return []


def descendants(pid: int) -> list[psutil.Process]:
    try:
        agent = psutil.Process(pid)
        return [agent, *agent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def run(nodes: int, config: NodesConfig) -> tuple[list[dict], dict[str, float]]:
    """Returns the lines of metrics.jsonl, and what share of this machine's cores the processes of
    the run used while the measured ones came, by kind of process."""
    before = ladder.warmup(config.preset)
    wanted = before + config.iterations
    # What comes after the last batch never starts, so some more are asked for than are waited for.
    flags = ladder.flags("emulated", config.preset, "1:1")
    flags += ["--iterations", str(wanted + before + 1), "--no-trace"]
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        job = Job(nodes, [*flags, "--run", str(folder / "run")], folder, config.slower)
        late = time.monotonic() + LIMIT_S
        marks = []  # when the first measured iteration began, and the last one ended
        try:
            while len(marks) < 2:
                failed = any(agent.poll() is not None for agent in job.agents)
                require(not failed and time.monotonic() < late, f"it failed: {job.said()}")
                time.sleep(0.1)
                lines = read_metrics(folder / "run") if (folder / "run").is_dir() else []
                if len(lines) >= (before, wanted)[len(marks)]:
                    marks.append((time.monotonic(), job.used()))
        finally:
            job.stop()
    (began, first), (ended, last) = marks
    seconds = (ended - began) * len(os.sched_getaffinity(0))
    return lines[:wanted], {part: (last[part] - first[part]) / seconds for part in last}


def measure(nodes: int, config: NodesConfig) -> dict:
    """Returns the row of a number of nodes, but for what compares it with others."""
    lines, cores = run(nodes, config)
    before = ladder.warmup(config.preset)
    window = lines[before:]
    seconds = window[-1]["time"] - lines[before - 1]["time"]
    collected = window[-1]["env_steps"] - lines[before - 1]["env_steps"]
    waits = [line["waits"] for line in window]
    each = [statistics.fmean(speeds) for speeds in zip(*map(speeds_of, window), strict=True)]
    steps = len(window) * libero.MINIBATCHES
    predicted = simulate(*emulated_node(config.preset, "1:1"), nodes, nodes, 30)
    row = {
        "nodes": nodes,
        "preset": config.preset,
        "slower": config.slower,
        "iterations": len(window),
        "env_steps_per_s": len(window) * BATCH * nodes / seconds,
        "collected_per_s": collected / seconds,
        "predicted_per_s": predicted.env_steps_per_s / config.slower,
        "spread": min(each) / max(each),
    }
    for cause in ("env:admission", "env:action", "rollout:request", "actor:gradient"):
        row[f"wait_{cause}"] = statistics.fmean(wait.get(cause, 0.0) for wait in waits)
    for name in ("reduce_s", "reduce_wait_s"):
        total = sum(line.get(name, 0.0) for line in window)
        row[f"{name.removesuffix('_s')}_ms"] = 1e3 * total / steps
    row["cores_used"] = sum(cores.values())
    row["cores_of"] = cores
    row["cores_busy"] = statistics.fmean(line["cpu_fraction"] for line in window)
    print(f"{nodes} nodes: {row['env_steps_per_s']:.0f} env steps/s", flush=True)
    return row


def speeds_of(line: dict) -> list[float]:
    """Returns the env steps/s of each node in an iteration."""
    if "nodes" not in line:
        return [line["env_steps_per_s"]]
    return [node["env_steps_per_s"] for node in line["nodes"].values()]


def compare(rows: list[dict]) -> None:
    """Adds what each node is worth, beside one of the first row."""
    base = rows[0]
    names = {"efficiency": "env_steps_per_s", "collected_efficiency": "collected_per_s"}
    names["predicted_efficiency"] = "predicted_per_s"
    for row in rows:
        for name, rate in names.items():
            row[name] = row[rate] / row["nodes"] / (base[rate] / base["nodes"])


def table(rows: list[dict]) -> str:
    """Writes the rows as docs/performance.md has them."""
    body = []
    for row in rows:
        shares = ("efficiency", "collected_efficiency", "predicted_efficiency", "spread")
        waits = ("wait_env:admission", "wait_env:action", "wait_actor:gradient")
        cores = (row["cores_used"], row["cores_of"]["launcher"], row["cores_busy"])
        cells = [str(row["nodes"]), f"{row['env_steps_per_s']:.0f}"]
        cells += [f"{row[name]:.1%}" for name in (*shares, *waits)]
        cells += [f"{row['reduce_ms']:.1f}", " · ".join(f"{share:.0%}" for share in cores)]
        body.append(cells)
    return ladder.markdown(list(HEAD), body)


def main() -> None:
    config = tyro.cli(NodesConfig)
    end_on_sigterm()
    rows = []
    for nodes in config.counts:
        rows.append(measure(nodes, config))
        compare(rows)
        if config.json:
            result = {"what": "nodes", "cores": len(os.sched_getaffinity(0)), "rows": rows}
            config.json.write_text(json.dumps(result, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    with exit_on_user_error():
        main()
