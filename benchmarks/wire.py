"""Compares the planner's communication model with reductions over a network of limited speed.

    python -m benchmarks.wire [--json FILE]      minutes; as root, or under `unshare -rn`

Each node is a network namespace with a card of its own on a bridge, and `tc` limits what the card
sends (tbf). The ranks in it sum a tensor by torch.distributed with Gloo, as actor workers without
GPUs do. Rows, with the shortest of REPEATS, because other work on the cores only lengthens them:

    nodes, ranks          namespaces, and processes in each
    mbit_s, mib           what a node may send, and the size of the tensor
    buckets, beside_s     parts that are summed one after another while other work (a sleep) makes
                          them ready at even times; 1 and 0: the whole tensor, after all work
    gb_sent, gb_model     what the first node's card sent for one sum, and `planning.wire.wire_gb`
    seconds, model_s      from the end of that work to the end of the sum, and what `planning.wire`
                          says: nothing is fitted but the seconds of one hop, which are those of
                          one number at full speed
    ratio                 seconds / model_s

    python -m benchmarks.wire --runs [--json FILE]    three minutes

runs `torchrun … train.py` on such nodes instead, with emulated stages and RUN_MB of gradients, in
the synchronous preset, where nothing hides their sum. Beside `reduce_s` of metrics.jsonl and the
seconds of an iteration stands what the planner says (`planning.events`, the first iteration left
out).

A namespace lives as long as the process that holds it, and that one as long as this command, so
nothing is left however it ends. Left out: delays (netem; the smallest is what this machine has) and
GPUs (NCCL).
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import tyro
from rich.console import Console
from rich.table import Table

from benchmarks.measuring import cell, end_on_sigterm
from benchmarks.plan_against_paper import emulated_node
from config import ROOT
from errors import UserError, exit_on_user_error
from planning.events import simulate
from planning.wire import Network, all_reduce_s, exposed_s, wire_gb
from run_folder import read_metrics

REPEATS = 4
WARMUP = 1  # sums that do not count
NODES = ((2, 1), (4, 1), (2, 2))  # and ranks of each
MBIT_S = (100, 200)
MIB = (4, 8)
BUCKETS = 8
RUN_MB = 4  # gradients of a minibatch
RUN = (
    "--preset sync-disaggregated --ratio 1:1 --env emulated --model emulated --image-size 8 "
    "--env-workers 2 --envs 4 --batch 8 --minibatch 4 --micro-batch 16 --update-epochs 1 "
    "--segment 8 --chunk 10 --eval-envs 0 --eval-every 0 --iterations 8 --no-trace"
)
FREE_MBIT_S = 100_000  # no limit
MTU = 9000  # bytes of a packet: large ones cost the cores less
PAYLOAD = (MTU - 52) / (MTU + 14)  # without the heads of Ethernet, IP and TCP


@dataclass(kw_only=True)
class WireConfig:
    """Compares the planner's communication model with reductions over a limited network."""

    runs: bool = False  # compare whole runs instead of sums
    json: Path | None = None  # also write {"what", "machine", "rows"}
    rank: int = -1  # of a process that this command starts; likewise the next two
    ranks: int = 0
    store: str = ""


class Case(NamedTuple):
    """One sum. beside_s: seconds of other work that makes the buckets ready."""

    mbit_s: int
    mib: float
    buckets: int = 1
    beside_s: float = 0.0


# ---------------------------------------------------------------- a rank


def sum_as_told(rank: int, ranks: int, store: str) -> None:
    """Sums what each line of standard input says, and has the first rank print what it took."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    print("ready", flush=True)
    for line in sys.stdin:
        case = Case(*json.loads(line))
        tensor = torch.ones(max(1, int(case.mib * 2**18)))
        seconds = []
        worked = []
        sent = []
        for _ in range(WARMUP + REPEATS):
            tensor.fill_(1.0)
            dist.barrier()
            before = bytes_sent()
            start = time.perf_counter()
            works = []
            for bucket in tensor.chunk(case.buckets):
                time.sleep(case.beside_s / case.buckets)
                works.append(dist.all_reduce(bucket, async_op=True))
            ready = time.perf_counter()
            worked.append(ready - start)
            for work in works:
                work.wait()
            seconds.append(time.perf_counter() - ready)
            dist.barrier()  # by then all that was to be sent has been
            sent.append(bytes_sent() - before)
            assert tensor[0] == tensor[-1] == ranks
        slowest = torch.tensor(seconds)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        if rank == 0:
            best = WARMUP + int(slowest[WARMUP:].argmin())
            print(json.dumps([float(slowest[best]), worked[best], sent[best]]), flush=True)
    dist.destroy_process_group()


def bytes_sent() -> int:
    """Returns what this namespace's card has sent."""
    lines = Path("/proc/self/net/dev").read_text().splitlines()
    return next(int(line.split()[9]) for line in lines if line.split()[0] == "eth0:")


# ---------------------------------------------------------------- the network


class Nodes:
    """So many namespaces on a bridge. Leaving the context ends them."""

    def __init__(self, count: int):
        self.count = count
        self.stack = ExitStack()
        self.holders: list[subprocess.Popen] = []  # of the bridge, then of each node

    def __enter__(self) -> "Nodes":
        with ExitStack() as stack:
            self.stack = stack
            for _ in range(1 + self.count):
                self.holders.append(self.held())
            self.join()
            self.stack = stack.pop_all()
        return self

    def __exit__(self, *_) -> None:
        self.stack.close()

    def held(self) -> subprocess.Popen:
        """Starts a namespace: a process that ends with its standard input, thus with this one."""
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        script = "ip link set lo up && echo up && exec cat"
        holder = subprocess.Popen(["unshare", "--net", "sh", "-c", script], text=True, **pipes)
        self.stack.callback(end, holder)
        if holder.stdout.readline() != "up\n":
            sys.exit(f"error: {REFUSED}")
        return holder

    def join(self) -> None:
        """Gives each node a card, whose other end is on the bridge."""
        hub, *nodes = self.holders
        inside(hub, "ip link add bridge type bridge")
        inside(hub, "ip link set bridge up")
        for number, node in enumerate(nodes):
            peer = f"peer name node{number} netns {hub.pid}"
            inside(node, f"ip link add eth0 type veth {peer}")
            inside(node, f"ip address add {address(number)}/24 dev eth0")
            inside(node, f"ip link set eth0 mtu {MTU} up")
            inside(hub, f"ip link set node{number} mtu {MTU} master bridge up")
        self.limit(FREE_MBIT_S)

    def limit(self, mbit_s: float) -> None:
        """Limits what every node sends. A burst is as short as the kernel's clock allows."""
        burst = max(16, round(mbit_s / 8))  # kB: what a millisecond sends
        rule = f"tbf rate {mbit_s}mbit burst {burst}kb latency 500ms"
        for node in self.holders[1:]:
            inside(node, f"tc qdisc replace dev eth0 root {rule}")

    def command(self, number: int) -> list[str]:
        """Returns what goes before a command that a node is to run."""
        return ["nsenter", f"--net=/proc/{self.holders[1 + number].pid}/ns/net"]


REFUSED = (
    "this system allows no network namespaces or no tc here, so nothing was compared: run it as "
    "root, or as `unshare -rn python -m benchmarks.wire`, where iproute2 is installed"
)


def address(node: int) -> str:
    return f"10.77.0.{node + 1}"


def inside(holder: subprocess.Popen, command: str) -> None:
    """Runs a command in a namespace, or ends this one."""
    enter = ["nsenter", f"--net=/proc/{holder.pid}/ns/net", *command.split()]
    done = subprocess.run(enter, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"error: {REFUSED} ({command}: {done.stderr.strip()})")


def end(process: subprocess.Popen) -> None:
    process.kill()
    process.wait()


# ---------------------------------------------------------------- whole runs


def run_on(nodes: int) -> dict:
    """Runs train.py on so many nodes. Returns what it took beside what the planner says."""
    variables = {"GLOO_SOCKET_IFNAME": "eth0", "CUDA_VISIBLE_DEVICES": ""}
    variables = os.environ | variables | {"EMULATED_GRADIENT_MB": str(RUN_MB)}
    with Nodes(nodes) as network, tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        network.limit(MBIT_S[0])
        launchers = []
        for number in range(nodes):
            flags = f"--nnodes {nodes} --nproc-per-node 1 --rdzv-backend c10d --rdzv-id wire "
            flags += f"--rdzv-endpoint {address(0)}:29400 --local-addr {address(number)} "
            flags += f"--rdzv-conf is_host={number == 0} -- train.py --run {folder}/run {RUN}"
            command = [*network.command(number), sys.executable, "-m", "torch.distributed.run"]
            log = stack.enter_context(open(f"{folder}/log-{number}", "w"))
            pipes = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
            command += flags.split()
            launchers.append(subprocess.Popen(command, env=variables, cwd=ROOT, **pipes))
            stack.callback(stop, launchers[-1])
        if any([launcher.wait() for launcher in launchers]):
            raise UserError(f"a node failed: {Path(f'{folder}/log-0').read_text()[-1000:]}")
        lines = read_metrics(Path(folder, "run"))

    # Find the same node in virtual time.
    node, costs = emulated_node("sync-disaggregated", "1:1")
    ours = {"lanes": 4, "env_devices": ("cpu",) * 2, "batch": 8, "minibatch": 4, "micro_batch": 2}
    node = replace(node, **ours)
    steps = node.optimizer_steps
    gb = lines[-1]["reduce_bytes"] / 1e9 / steps
    card = Network(gb_s=MBIT_S[0] / 8e3 * PAYLOAD)
    costs = replace(costs, gradient_s=all_reduce_s(gb, nodes, 1, card))
    row = {"nodes": nodes, "mbit_s": MBIT_S[0], "reduce_mb": lines[-1]["reduce_bytes"] / 1e6}
    row["reduce_s"] = statistics.mean(line["reduce_s"] for line in lines[1:])
    row["model_reduce_s"] = steps * costs.gradient_s
    row["iteration_s"] = (lines[-1]["time"] - lines[0]["time"]) / (len(lines) - 1)
    row["model_iteration_s"] = simulate(node, costs, nodes, nodes, 40).step_s
    row["ratio"] = row["reduce_s"] / row["model_reduce_s"]
    row["iteration_ratio"] = row["iteration_s"] / row["model_iteration_s"]
    return row


def stop(launcher: subprocess.Popen) -> None:
    """Ends a node and waits for it, unless it has ended."""
    launcher.terminate()
    try:
        launcher.wait(timeout=30)
    except subprocess.TimeoutExpired:
        end(launcher)


# ---------------------------------------------------------------- the comparison


def measured(nodes: int, ranks: int) -> list[dict]:
    """Compares all cases on so many nodes of so many ranks."""
    with Nodes(nodes) as network, tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        # Start the ranks, in the order of nodes.
        processes = []
        for rank in range(nodes * ranks):
            flags = ["--rank", rank, "--ranks", nodes * ranks, "--store", f"{folder}/store"]
            command = [sys.executable, "-m", "benchmarks.wire", *map(str, flags)]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": ROOT}
            variables = os.environ | {"GLOO_SOCKET_IFNAME": "eth0"}
            command = network.command(rank // ranks) + command
            processes.append(subprocess.Popen(command, env=variables, **pipes))
            stack.callback(end, processes[-1])
        if any(process.stdout.readline() != "ready\n" for process in processes):
            raise UserError("a rank ended before it was ready: see above")

        # What one hop takes is the one thing that is fitted.
        def run(case: Case) -> tuple[float, float, float]:
            network.limit(case.mbit_s)
            for process in processes:
                process.stdin.write(json.dumps(case) + "\n")
                process.stdin.flush()
            line = processes[0].stdout.readline()
            if not line:
                raise UserError("a rank ended while it summed: see above")
            return tuple(json.loads(line))

        seconds, *_ = run(Case(FREE_MBIT_S, 0))
        hop_s = seconds / (2 * (nodes * ranks - 1))
        rows = []
        for mbit_s in MBIT_S:
            plain = [Case(mbit_s, mib) for mib in MIB]
            whole_s = modelled(plain[-1], nodes, ranks, hop_s)
            # Work that hides half of the sum, and work that hides all but its last bucket.
            hidden = [Case(mbit_s, MIB[-1], BUCKETS, share * whole_s) for share in (0.5, 1.5)]
            for case in plain + hidden * (mbit_s == MBIT_S[0]):
                seconds, worked, sent = run(case)
                if case.beside_s:
                    case = case._replace(beside_s=worked)  # a sleep is never shorter than asked
                row = {"nodes": nodes, "ranks": ranks} | case._asdict()
                model_s = modelled(case, nodes, ranks, hop_s)
                gb = case.mib * 2**20 / 1e9
                row |= {"gb_sent": sent / 1e9, "gb_model": wire_gb(gb, nodes * ranks)}
                row |= {"seconds": seconds, "model_s": model_s, "ratio": seconds / model_s}
                rows.append(row)
                print(", ".join(f"{name} {cell(value)}" for name, value in row.items()), flush=True)
        # Let the ranks end by themselves.
        for process in processes:
            process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            for process in processes:
                process.wait(timeout=20)
    return rows


def modelled(case: Case, nodes: int, ranks: int, hop_s: float) -> float:
    """Returns the planner's seconds. Within a node there is no limit."""
    network = Network(gb_s=case.mbit_s / 8e3 * PAYLOAD, hop_s=hop_s, inside_hop_s=hop_s)
    gb = case.mib * 2**20 / 1e9 / case.buckets
    return exposed_s(all_reduce_s(gb, nodes, ranks, network), case.buckets, case.beside_s)


def show(rows: list[dict]) -> None:
    table = Table()
    for name in rows[0]:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*map(cell, row.values()))
    Console(width=160).print(table)
    errors = [abs(row["ratio"] - 1) for row in rows]
    print(f"mean size of the error {sum(errors) / len(errors):.1%}, at worst {max(errors):.1%}")


def main(config: WireConfig) -> None:
    if config.rank >= 0:
        sum_as_told(config.rank, config.ranks, config.store)
        return
    if not all(map(shutil.which, ("unshare", "nsenter", "ip", "tc"))):
        sys.exit(f"error: {REFUSED}")
    end_on_sigterm()
    rows = []
    if config.runs:
        rows = [run_on(nodes) for nodes in (2, 4)]
    else:
        for nodes, ranks in NODES:
            rows += measured(nodes, ranks)
    show(rows)
    if config.json:
        machine = f"{os.cpu_count()} cores, Linux {os.uname().release}"
        found = {"what": "wire, runs" if config.runs else "wire", "machine": machine, "rows": rows}
        config.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    with exit_on_user_error():
        main(tyro.cli(WireConfig))
