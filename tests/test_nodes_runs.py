"""Runs of several nodes, by torchrun on this machine: stop, save, resume, faults, bad input.

What a launcher says to another, in one process: test_nodes.py."""

import contextlib
import hashlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path

import psutil
import pytest
from conftest import assert_balanced

from benchmarks.faults import shared_memory
from config import ROOT
from run_folder import read_metrics, read_trace

# The smallest run of every kind of worker.
BRIEF = (
    "--model emulated --env emulated --tasks 0 --image-size 8 --envs 4 --batch 4 --minibatch 4 "
    "--micro-batch 4 --segment 2 --update-epochs 1 --eval-envs 0 --eval-every 0 --ratio 1:1 "
    "--env-workers 2 --seed 3 --timeout-s 8"
)
ENDLESS = f"{BRIEF} --iterations 100000 --checkpoint-every 1000"
# How torchruns find one another: by who comes first, or with numbers, so that node 0 is known.
C10D = "--rdzv-backend c10d --rdzv-endpoint 127.0.0.1:{port}"
STATIC = "--rdzv-backend static --node-rank {node} --master-addr 127.0.0.1 --master-port {port}"
END_S = 40.0  # seconds in which all nodes must have ended: --timeout-s and torchrun's own part
START_S = 120.0  # seconds that a start may take on busy cores


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


class Job:
    """One torchrun for each node. An environment variable marks all of its processes."""

    def __init__(self, logs: Path, flags: list[str], options: str, roots=(ROOT, ROOT), **more):
        """flags: of train.py, for each node; options: of torchrun; roots: the checkout of each."""
        self.mark = uuid.uuid4().hex
        self.port = more.pop("port", 0) or free_port()
        self.roots = roots
        self.logs = [logs / f"{self.mark[:6]}-{node}.log" for node in range(len(flags))]
        self.agents: list[subprocess.Popen] = []
        self.flags = flags
        self.options = options
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

    def wait_for(self, file: Path, lines: int = 1, timeout: float = START_S) -> None:
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


def folders_of_nodes(run: Path) -> list[Path]:
    """What nodes other than the first have kept of a run in runs/."""
    other = hashlib.sha256(str(run.parent).encode()).hexdigest()[:8]
    return list((ROOT / "runs").glob(f".{run.name}-{other}.node-*"))


@pytest.fixture
def nodes(tmp_path):
    """Starts jobs; afterwards none of their processes may be left, nor a file in /dev/shm."""
    started = []
    before = shared_memory()

    def start(flags: str | list[str], options: str = C10D, **more) -> Job:
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
        for left in folders_of_nodes(tmp_path / "one"):  # of launchers that were killed
            shutil.rmtree(left)


def lines_of(run: Path) -> list[dict]:
    """The lines of metrics.jsonl, of which none may be missing or doubled."""
    lines = read_metrics(run)
    assert [line["iteration"] for line in lines] == list(range(1, len(lines) + 1))
    return lines


def checkpoints_of(run: Path) -> list[int]:
    return sorted(int(path.name) for path in run.glob("checkpoints/0*"))


def begun(job: Job, run: Path, more: int = 1) -> Job:
    """Waits until a job has trained so many iterations more than its run has lines."""
    file = run / "metrics.jsonl"
    have = len(file.read_text().splitlines()) if file.is_file() else 0
    job.wait_for(file, have + more)
    return job


def send(job: Job, number: int, what: str, signal_number: int) -> None:
    """Sends a signal to "torchrun", "launcher" or a worker of a node."""
    place = job.node(number)
    if what == "torchrun":
        process = psutil.Process(job.agents[place].pid)
    elif what == "launcher":
        process = job.launcher(place)
    else:
        process = job.worker(place, what)
    process.send_signal(signal_number)


def copied_checkout(folder: Path) -> Path:
    """A checkout of its own, as that of another machine: what is in runs/ is not shared."""
    folder.mkdir()
    for path in ROOT.iterdir():
        if path.suffix == ".py":
            shutil.copy(path, folder)
        elif path.name in ("assets", "envs", "models", "planning", "benchmarks"):
            shutil.copytree(path, folder / path.name)
    return folder


@pytest.fixture
def checkouts(tmp_path):
    return copied_checkout(tmp_path / "a"), copied_checkout(tmp_path / "b")


def test_two_nodes_are_one_run(nodes, tmp_path):
    run = tmp_path / "runs" / "one"
    evaluates = "--eval-envs 2 --eval-every 2 --eval-episodes 4 --iterations 3"
    flags = BRIEF.replace("--eval-envs 0 --eval-every 0", evaluates)
    job = nodes(f"{flags} --run {run}", STATIC)
    assert job.finish(START_S) == [0, 0], job.said()
    # Nodes leave one after the other, and torchrun itself logs it where the one with its store does
    # so first.
    said = re.sub(r"(?m)^[EW]\d{4} .*$", "", job.said())
    assert "Traceback" not in said and "warning:" not in said
    lines = lines_of(run)
    assert [set(line["nodes"]) for line in lines] == [{"0", "1"}] * 3
    assert assert_balanced(run)["trained_once"] == 3 * 2 * 4 * 2  # chunk steps of both
    assert (lines[-1]["eval_version"], lines[-1]["eval_episodes"] % 4) == (3, 0)
    rows = read_trace(run)
    for worker in ("env-0", "env-1", "rollout-0", "actor-0"):
        assert rows.keys() >= {worker, f"node 1 {worker}"}, rows.keys()
    done = f"3 iterations done; checkpoint in {run / 'checkpoints'}"
    assert done in job.said(0) and done in job.said(1)
    assert "2 nodes in all: 8 envs, 4 evaluation envs" in job.said(0)
    assert re.search(r"^node 1 \(.*\) of 2: ", job.said(1), re.MULTILINE)
    assert "metrics, checkpoints and pictures are on node 0" in job.said(1)
    assert checkpoints_of(run) == [3] and os.listdir(run.parent) == ["one"]
    assert not folders_of_nodes(run)


def test_a_node_s_affair_stays_its_own_and_any_node_can_stop_the_run(nodes, tmp_path):
    run = tmp_path / "one"
    job = begun(nodes(f"{ENDLESS} --run {run}", STATIC), run)
    send(job, 1, "env-0", signal.SIGKILL)
    send(job, 1, "rollout-0", signal.SIGKILL)
    late = time.monotonic() + 60.0
    while lines_of(run)[-1]["restarts"] < 2:
        assert time.monotonic() < late, job.said()
        time.sleep(0.2)
    begun(job, run, 3)
    send(job, 1, "launcher", signal.SIGINT)
    assert job.finish() == [1, 1], job.said()
    lines = lines_of(run)
    assert checkpoints_of(run) == [len(lines)]
    for worker in ("env-0", "rollout-0"):
        died = f"worker {worker} died (SIGKILL: out of memory?); starting it again in 1 s"
        assert died in job.said(1) and died not in job.said(0)
    for node in range(2):
        saved = f"interrupted; saved {run / 'checkpoints'}/{len(lines):06d}; continue with: "
        assert saved in job.said(node)


def test_nodes_that_disagree_end_at_once(nodes, tmp_path):
    run = tmp_path / "one"
    job = nodes([f"{BRIEF} --run {run}", f"{BRIEF} --run {run} --lr 0.5"], STATIC)
    assert job.finish(START_S) == [1, 1], job.said()
    other = r"node 1 \(.*\) has --lr 0.5 \(not 0.00015\) unlike node 0"
    for node in range(2):
        assert re.search(other, job.said(node))
    assert not run.exists()


# ---------------------------------------------------------------- longer than a minute

STOPS = [
    (0, "launcher", signal.SIGINT),
    (0, "torchrun", signal.SIGTERM),
    (1, "torchrun", signal.SIGTERM),
    (0, "torchrun", signal.SIGINT),
    (1, "launcher", signal.SIGTERM),
]


@pytest.mark.slow
def test_every_node_and_torchrun_can_stop_a_run(nodes, tmp_path):
    """Each time it goes on where it was saved. Last with one node, and then with two again."""
    run = tmp_path / "one"
    flags = f"{ENDLESS} --run {run}"
    for number, what, word in STOPS:
        job = begun(nodes(flags, STATIC), run)
        send(job, number, what, word)
        job.finish()
        job.assert_nothing_left()
        lines = lines_of(run)
        assert checkpoints_of(run)[-1] == len(lines), (number, what, word, job.said())
        for node in range(2):
            assert "interrupted; saved" in job.said(node), (number, what, word, job.said())
        flags = f"--resume {run}"
    assert len(checkpoints_of(run)) == len(STOPS)  # one each time
    for count in (1, 2):
        job = begun(nodes([flags] * count, STATIC), run)
        send(job, 0, "launcher", signal.SIGINT)
        job.finish()
        changes = f"other settings than this run had so far: nodes {count} (was {3 - count})"
        assert changes in job.said(0)
        assert checkpoints_of(run)[-1] == len(lines_of(run))
    assert "batches of" in job.said(0) or "2 nodes in all: 8 envs" in job.said(0)


# Who is killed or stopped, on which node, and what is said of it: by both nodes of an actor worker,
# by the other one of a launcher. The store is gone with the torchrun that has it.
GONE = "torchrun's store on 127.0.0.1, port [0-9]+, is gone"
ENDS = {
    "actor workers": [
        ("actor-0", 0, signal.SIGKILL, r"node 0 \(.*\): worker actor-0 died \(SIGKILL"),
        ("actor-0", 1, signal.SIGKILL, r"node 1 \(.*\): worker actor-0 died \(SIGKILL"),
        ("actor-0", 1, signal.SIGSTOP, r"node 1 \(.*\): worker actor-0 hangs: no sign of life"),
    ],
    "launchers": [
        ("launcher", 1, signal.SIGSTOP, r"error: node 1 \(.*\) is silent for 8 s: is it gone\?"),
        ("launcher", 1, signal.SIGKILL, r"node 1 \(.*\) (is silent|gave no sign of life)"),
        ("launcher", 0, signal.SIGKILL, rf"node 0 \(.*\) (is silent|gave no sign of life)|{GONE}"),
    ],
    "torchruns": [
        ("torchrun", 1, signal.SIGKILL, "interrupted; saved"),  # its launcher is told to stop
        ("torchrun", 0, signal.SIGKILL, GONE),
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("ends", ENDS.values(), ids=ENDS)
def test_whatever_dies_or_hangs_ends_all_nodes_and_the_run_goes_on(nodes, tmp_path, ends):
    run = tmp_path / "one"
    flags = f"{ENDLESS} --run {run} --checkpoint-every 3"
    for what, number, word, said in ends:
        case = (what, number, word)
        job = begun(nodes(flags, STATIC), run, 4)
        send(job, number, what, word)
        victim = job.agents[job.node(number)]
        late = time.monotonic() + END_S
        while any(agent.poll() is None for agent in job.agents if agent is not victim):
            assert time.monotonic() < late, (case, job.said())
            time.sleep(0.1)
        if word == signal.SIGSTOP and what == "launcher":  # what torchrun waits for
            send(job, number, what, signal.SIGKILL)
        statuses = job.finish()
        assert 0 not in statuses, (case, statuses)
        job.assert_nothing_left()
        for node in range(2):
            if what == "actor-0" or node != number:
                assert re.search(said, job.said(job.node(node))), (case, node, job.said())
        flags = f"--resume {run}"
        lines_of(run)


@pytest.mark.slow
@pytest.mark.parametrize("number, what", [(1, "actor-0"), (0, "launcher")])
def test_torchrun_s_restart_goes_on_from_the_newest_checkpoint(nodes, checkouts, number, what):
    """Without a flag, and where nodes share no disk."""
    options = f"--max-restarts 1 {C10D}"
    flags = f"{BRIEF} --iterations 60 --checkpoint-every 10"
    job = nodes(flags, options, roots=checkouts)
    late = time.monotonic() + START_S
    while not (found := [one for path in checkouts for one in path.glob("runs/*/checkpoints/0*")]):
        assert time.monotonic() < late, job.said()
        time.sleep(0.05)
    send(job, number, what, signal.SIGKILL)
    assert job.finish(200.0) == [0, 0], job.said()
    run = found[0].parents[1]
    assert len(lines_of(run)) == 60 and assert_balanced(run)["discarded_by"]["resume"] >= 0
    if what == "actor-0":
        assert re.search(r"node 1 \(.*\): worker actor-0 died", job.said(job.node(0)))
    assert "continues from" in job.said(job.node(0))
    left = [path for checkout in checkouts for path in (checkout / "runs").iterdir()]
    assert [path for path in left if path.name != run.name and path.is_dir()] == []


@pytest.mark.slow
def test_a_run_goes_on_from_the_one_disk_that_has_it(nodes, checkouts):
    """Whichever node that is. The others leave nothing on theirs."""
    run = checkouts[0] / "runs" / "x"
    flags = f"{ENDLESS} --run x"
    for roots in (checkouts, checkouts[::-1]):
        job = begun(nodes(flags, STATIC, roots=roots), run)
        send(job, 1, "launcher", signal.SIGTERM)
        job.finish()
        assert checkpoints_of(run)[-1] == len(lines_of(run))
        assert not list((checkouts[1] / "runs").glob("*x*"))
        flags = "--resume-or-start x --iterations 100000"
    assert len(checkpoints_of(run)) == 2


# What one of two nodes gets wrong, and what both say of it.
MISTAKES = [
    ("--nonsense 1", "Unrecognized options: --nonsense|has ended: what it prints says why"),
    ("--env nonsense", "unknown --env 'nonsense'"),
    ("--checkpoint /nowhere/x.safetensors --model pi05", "no checkpoint at /nowhere/x.safetensors"),
    ("--seed 4", r"node 1 \(.*\) has --seed 4 \(not 3\) unlike node 0 \(.*\): give all"),
]


@pytest.mark.slow
@pytest.mark.parametrize("wrong, said", MISTAKES)
@pytest.mark.parametrize("node", range(2))
def test_a_mistake_on_one_node_ends_all(nodes, tmp_path, node, wrong, said):
    run = tmp_path / "one"
    flags = [f"{BRIEF} --run {run}"] * 2
    flags[node] += f" {wrong}"
    job = nodes(flags, STATIC)
    assert job.finish(START_S) == [1, 1], job.said()
    if wrong.startswith("--seed") and node == 0:
        said = r"node 1 \(.*\) has --seed 3 \(not 4\) unlike node 0 \(.*\): give all"
    for place in range(2):
        assert re.search(said, job.said(place)), job.said()
    assert not run.exists()


@pytest.mark.slow
def test_torchrun_must_start_one_launcher(nodes, tmp_path):
    job = nodes(f"{BRIEF} --run {tmp_path / 'one'}", f"--nproc-per-node 2 {C10D}")
    assert job.finish(START_S) == [1, 1], job.said()
    for node in range(2):
        assert "--nproc-per-node 2 starts 2 launchers on a machine: give 1" in job.said(node)


@pytest.mark.slow
def test_a_run_that_another_job_trains_is_left_alone(nodes, tmp_path):
    run = tmp_path / "one"
    job = begun(nodes(f"{ENDLESS} --run {run}", STATIC), run)
    second = nodes(f"{ENDLESS} --resume-or-start {run}", STATIC)
    assert second.finish(START_S) == [1, 1], second.said()
    for node in range(2):
        assert f"run {run} is being trained by another process" in second.said(node)
    begun(job, run, 3)
    send(job, 0, "launcher", signal.SIGTERM)
    job.finish()
    assert checkpoints_of(run) == [len(lines_of(run))]


RATIO = """
import importlib.util
import sys
from errors import exit_on_user_error
import tuning

spec = importlib.util.spec_from_file_location("train", "ROOT/train.py")
train = importlib.util.module_from_spec(spec)
sys.modules["train"] = train
spec.loader.exec_module(train)
iteration = tuning.Tuner.iteration

def decides(self, version, cpu_s):
    iteration(self, version, cpu_s)
    if version >= 3 and self.ratio == "3:1" and self.config.train.node == 0:
        self.past.left = self.ratio
        self.past.measured["3:1"] = 1.0
        self.past.rejected.add("2:2")
        self.ratio = self.past.news["ratio"] = "1:1"

tuning.Tuner.iteration = decides
if __name__ == "__main__":
    with exit_on_user_error():
        sys.exit(train.begin(sys.argv[1:]))
"""


@pytest.mark.slow
def test_the_first_node_decides_the_ratio_and_all_start_again(nodes, tmp_path):
    run = tmp_path / "one"
    (tmp_path / "train.py").write_text(RATIO.replace("ROOT", str(ROOT)))
    flags = BRIEF.replace("--ratio 1:1", "--ratio auto").replace("--timeout-s 8", "--timeout-s 30")
    roots = (tmp_path, tmp_path)
    job = nodes(f"{flags} --iterations 9 --run {run}", STATIC, roots=roots, PYTHONPATH=str(ROOT))
    assert job.finish(200.0) == [0, 0], job.said()
    lines = lines_of(run)
    assert len(lines) == 9
    assert [line["tuning"]["ratio"] for line in lines if "ratio" in line["tuning"]] == ["1:1"]
    assert not re.search("^ratio", job.said(1), re.MULTILINE)
    assert assert_balanced(run)["version"] == 9
    assert len([row for row in read_trace(run) if row.startswith("node 1 ")]) > 4


@pytest.mark.slow
def test_weights_are_shared_within_a_node_and_alike_on_all(nodes, tmp_path, tiny_checkpoint):
    run = tmp_path / "one"
    flags = BRIEF.replace("--model emulated", f"--model pi05 --checkpoint {tiny_checkpoint}")
    flags = flags.replace("--timeout-s 8", "--timeout-s 60").replace("--image-size 8 ", "")
    job = nodes(f"{flags} --shard --actor-workers 2 --iterations 3 --run {run}", STATIC)
    assert job.finish(240.0) == [0, 0], job.said()
    assert assert_balanced(run)["version"] == 3 and len(lines_of(run)) == 3
