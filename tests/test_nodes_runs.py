"""Runs of several nodes, by torchrun on this machine: stop, save, resume, faults, bad input.

What a launcher says to another, in one process: test_nodes.py."""

import contextlib
import os
import re
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path

import psutil
import pytest

from benchmarks.faults import shared_memory
from config import ROOT

# The smallest run of every kind of worker.
BRIEF = (
    "--model emulated --env emulated --tasks 0 --image-size 8 --envs 4 --batch 4 --minibatch 4 "
    "--micro-batch 4 --segment 2 --update-epochs 1 --eval-envs 0 --eval-every 0 --ratio 1:1 "
    "--env-workers 2 --seed 3 --timeout-s 8"
)
ENDLESS = f"{BRIEF} --iterations 100000 --checkpoint-every 1000"
END_S = 40.0  # seconds in which all nodes must have ended: --timeout-s and torchrun's own part


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


class Job:
    """One torchrun for each node. An environment variable marks all of its processes."""

    def __init__(self, logs: Path, flags: list[str], options: str = "", roots=(ROOT, ROOT), **more):
        """flags: of train.py, for each node; options: of torchrun; roots: the checkout of each."""
        self.mark = uuid.uuid4().hex
        self.port = more.pop("port", 0) or free_port()
        self.roots = roots
        self.logs = [logs / f"{self.mark[:6]}-{node}.log" for node in range(len(flags))]
        self.agents: list[subprocess.Popen] = []
        self.flags = flags
        self.options = options or "--rdzv-backend c10d --rdzv-endpoint 127.0.0.1:{port}"
        self.environment = os.environ | {"TEST_MARK": self.mark} | more
        for node in range(len(flags)):
            self.start(node)

    def start(self, node: int) -> None:
        options = self.options.format(port=self.port, node=node)
        if "--nnodes" not in options:
            options = f"--nnodes {len(self.flags)} {options}"
        if "--nproc-per-node" not in options:
            options = f"--nproc-per-node 1 {options}"
        command = [sys.executable, "-m", "torch.distributed.run", *options.split()]
        command += ["--rdzv-id", self.mark[:6], "--", "train.py", *self.flags[node].split()]
        with open(self.logs[node], "a") as log:
            self.agents.append(
                subprocess.Popen(
                    command,
                    cwd=self.roots[node],
                    env=self.environment,
                    start_new_session=True,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            )

    def said(self, node: int | None = None) -> str:
        """What a node, or all of them, printed until now."""
        if node is not None:
            return self.logs[node].read_text()
        return "".join(f"---- {n}\n{log.read_text()}" for n, log in enumerate(self.logs))

    def living(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                mine = process.environ().get("TEST_MARK") == self.mark
                if mine and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def node(self, number: int) -> int:
        """Which torchrun has the node of this number: the other nodes say theirs."""
        for place in range(len(self.logs)):
            if re.search(rf"^node {number} \(.*\) of ", self.said(place), re.MULTILINE):
                return place
            if number == 0 and "run folder" in self.said(place):
                return place
        raise AssertionError(f"no node {number}: {self.said()}")

    def launcher(self, place: int) -> psutil.Process:
        for child in psutil.Process(self.agents[place].pid).children():
            if "train.py" in " ".join(child.cmdline()):
                return child
        raise AssertionError(f"no launcher: {self.said(place)}")

    def worker(self, place: int, name: str) -> psutil.Process:
        """The process of "env-0" of a torchrun."""
        for server in self.launcher(place).children():
            for child in server.children():
                with contextlib.suppress(OSError):
                    if Path(f"/proc/{child.pid}/comm").read_text().strip() == name:
                        return child
        raise AssertionError(f"no {name}: {self.said(place)}")

    def wait_for(self, file: Path, lines: int = 1, timeout: float = 120.0) -> None:
        """Waits until a file has so many lines."""
        late = time.monotonic() + timeout
        while not file.is_file() or len(file.read_text().splitlines()) < lines:
            assert any(agent.poll() is None for agent in self.agents), self.said()
            assert time.monotonic() < late, f"{file} did not come: {self.said()}"
            time.sleep(0.1)

    def finish(self, timeout: float = END_S) -> list[int]:
        """Waits until all torchruns have ended, and returns their exit statuses."""
        late = time.monotonic() + timeout
        while any(agent.poll() is None for agent in self.agents):
            assert time.monotonic() < late, f"still running after {timeout} s: {self.said()}"
            time.sleep(0.05)
        return [agent.returncode for agent in self.agents]

    def assert_nothing_left(self, timeout: float = 15.0) -> None:
        late = time.monotonic() + timeout
        while left := self.living():
            assert time.monotonic() < late, f"still alive: {left}; {self.said()}"
            time.sleep(0.1)

    def kill(self) -> None:
        for process in self.living():
            with contextlib.suppress(psutil.Error):
                process.kill()
        for agent in self.agents:
            agent.wait()


@pytest.fixture
def nodes(tmp_path):
    """Starts jobs; afterwards none of their processes may be left, nor a file in /dev/shm."""
    started = []
    before = shared_memory()

    def start(flags: str | list[str], options: str = "", **more) -> Job:
        flags = [flags] * 2 if isinstance(flags, str) else flags
        started.append(Job(tmp_path, flags, options, **more))
        return started[-1]

    yield start
    try:
        for job in started:
            if any(agent.poll() is None for agent in job.agents):
                job.kill()
            job.assert_nothing_left()
        late = time.monotonic() + 5.0
        while left := shared_memory() - before:
            assert time.monotonic() < late, f"left in /dev/shm: {left}"
            time.sleep(0.2)
    finally:
        for job in started:
            job.kill()
