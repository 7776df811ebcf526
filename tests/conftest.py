"""What the tests share: a tiny π0.5, the command line in a process of its own, and proof that
nothing outlives it.
"""

import contextlib
import gc
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import psutil
import pytest
import torch

import metrics
from benchmarks.fake_gpu import library
from benchmarks.faults import shared_memory
from channel import Channels, Counters
from config import ROOT
from models import checkpoint
from models.pi import Pi, PiConfig
from run_folder import read_metrics
from weights import WeightPlane

torch.set_num_threads(1)
# What runs in the background may ignore Ctrl-C, and all that it starts would, too.
signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.setdefault("MUJOCO_GL", "egl")
# A forked child never collects what it has inherited: the threads of a renderer (ManiSkill's, by
# Vulkan) are not there, and to end it would wait for them for ever.
os.register_at_fork(after_in_child=gc.freeze)

TINY = {
    "vision_width": 16,
    "vision_depth": 1,
    "vision_heads": 2,
    "vision_mlp": 32,
    "patch": 16,
    "width": 32,
    "mlp": 64,
    "depth": 2,
    "heads": 2,
    "head_dim": 16,
    "expert_width": 32,
    "expert_mlp": 64,
    "value_widths": (16,),
    "denoise_steps": 4,
    "noise_level": 0.5,
    "sde_steps": 4,
}
STATS = {"state_low": [-0.1, 0.4, 0.1, 0.2], "state_high": [0.3, 0.9, 0.5, 1.0]}
# Names of noise (seed, env, trajectory, t): two alike, then each other in a way of its own.
NOISE_KEYS = [
    (1, 2, 3, 4),
    (1, 2, 3, 4),
    (9, 2, 3, 4),
    (1, 9, 3, 4),
    (1, 2, 9, 4),
    (1, 2, 3, 9),
    (1, 3, 2, 4),
]
# The smallest run that still has several lanes, workers and micro-batches.
SMALL = (
    "--envs 4 --batch 4 --minibatch 4 --update-epochs 1 --eval-envs 1 "
    "--eval-episodes 2 --segment 3 "
    "--env-workers 2 --seed 3"
)

# What every line of metrics.jsonl has, of a run that has done nothing.
LINE = {
    "version": 1,
    "iteration": 1,
    "time": 1.0,
    "success_rate": None,
    "env_steps": 0,
    "restarts": 0,
    "collected": 0,
    "trained_once": 0,
    "discarded_by": {"restart": 0},
}


def tiny_pi(dtype: torch.dtype = torch.float32, **changes) -> Pi:
    """A π0.5 (with `pi05=False` a π0) of 50 thousand weights, none of them zero, so that every one
    of them matters."""
    torch.manual_seed(0)
    model = Pi(PiConfig(**TINY | changes)).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def observations(model: Pi, n: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random frames, and prompts of different lengths."""
    c = model.config
    random = torch.Generator().manual_seed(seed)
    image = torch.randint(
        0, 256, (n, c.views, c.image_size, c.image_size, 3), generator=random, dtype=torch.uint8
    )
    tokens = torch.randint(1, c.vocabulary, (n, c.tokens), generator=random, dtype=torch.int32)
    for i in range(n):
        tokens[i, c.tokens - 1 - i % 5 :] = 0  # padding
    obs = {"image": image, "tokens": tokens}
    return obs if c.pi05 else obs | {"state": torch.randn(n, c.state_dim, generator=random)}


def slopes(
    model, batch: dict[str, torch.Tensor], parameter: torch.Tensor, h: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the log-prob in the parameter's element with the largest gradient: autograd's, and by
    finite differences of step h."""
    (gradient,) = torch.autograd.grad(model.evaluate(batch)["logprob"].sum(), parameter)
    position = gradient.abs().argmax()
    with torch.no_grad():
        ends = []
        for step in (h, -2 * h, h):  # up, down, and back where it was
            parameter.view(-1)[position] += step
            ends.append(model.evaluate(batch)["logprob"].sum())
    return gradient.flatten()[position], (ends[0] - ends[1]) / (2 * h)


@pytest.fixture(autouse=True)
def same_random_numbers():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def ordinary_priority():
    """Fails a test that leaves this process a priority which all that it starts would inherit."""
    before = os.sched_getscheduler(0)
    yield
    assert os.sched_getscheduler(0) == before


def spawn(act: Callable[[int, str], None], folder: Path, ranks: int, limit: float = 120.0) -> None:
    """Calls act(rank, folder) in so many processes, and fails after `limit` seconds."""
    context = torch.multiprocessing.spawn(act, (str(folder),), ranks, join=False)
    end = time.monotonic() + limit
    try:
        while not context.join(1.0):
            late = [rank for rank, one in enumerate(context.processes) if one.is_alive()]
            assert time.monotonic() < end, f"ranks {late} have not ended after {limit:.0f} s"
    finally:
        for process in context.processes:
            process.kill()


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory) -> Path:
    model = tiny_pi()
    path = tmp_path_factory.mktemp("tiny") / "tiny.safetensors"
    checkpoint.save(
        path, checkpoint.Header("pi05", asdict(model.config), STATS), model.state_dict()
    )
    return path


@pytest.fixture(scope="session")
def gpus():
    """Returns the environment of a process that has so many of them."""

    def environment(count: int) -> dict[str, str]:
        try:
            return library.environment(count)
        except library.Unavailable as error:
            pytest.skip(str(error))

    return environment


def channels_of(setup) -> Channels:
    """What `train.main` connects the stages with."""
    config = setup.config
    workers = config.env.env_workers + config.rollout.rollout_workers + config.actor.actor_workers
    counters = Counters(workers, metrics.columns(config.env.eval_episodes))
    return Channels.create(config, setup.pool(), WeightPlane(setup.weights), counters)


def assert_balanced(run: Path) -> dict:
    """Every chunk step of a finished run was trained as often as every other, or discarded for a
    reason. Returns its last line."""
    lines = read_metrics(run)
    config = json.loads((run / "config.json").read_text())
    last = lines[-1]
    epochs = config["actor"]["update_epochs"]
    for line in lines:
        assert (
            line["discarded"] == sum(line["discarded_by"].values())
            and min(line["discarded_by"].values()) >= 0
        )
        assert (
            line["collected"] >= line["trained_once"] + line["discarded"]
        )  # the rest is in flight
    assert last["collected"] == last["trained_once"] + last["discarded"], last
    assert (
        sum(line["trained"] + line["skipped"] for line in lines) == epochs * last["trained_once"]
    ), lines
    assert sum(line["filtered"] for line in lines) == last["discarded_by"]["filtered"]
    return last


# ---------------------------------------------------------------- the command line


class Cli:
    """One `python FILE FLAGS`. An environment variable, which every descendant inherits, marks all
    of its processes."""

    def __init__(self, file: str | Path, flags: str, cwd: Path = ROOT, **environment: str):
        self.mark = uuid.uuid4().hex
        command = [sys.executable, str(file), *flags.split()]
        self.process = subprocess.Popen(
            command,
            cwd=cwd,
            env=os.environ | environment | {"TEST_MARK": self.mark},
            start_new_session=True,
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def finish(self, timeout: float = 90.0) -> tuple[int, str]:
        """Exit status and everything printed."""
        try:
            output = self.process.communicate(timeout=timeout)[0]
        except subprocess.TimeoutExpired:
            self.process.kill()
            pytest.fail(
                f"still running after {timeout} s; it said: {self.process.communicate()[0]}"
            )
        return self.process.returncode, output

    def living(self) -> list[psutil.Process]:
        """The launcher, its fork server and its workers, as far as they live."""
        found = []
        for process in psutil.process_iter():
            try:
                if (
                    process.environ().get("TEST_MARK") == self.mark
                    and process.status() != psutil.STATUS_ZOMBIE
                ):
                    found.append(process)
            except psutil.Error:
                pass
        return found

    def workers(self) -> list[psutil.Process]:
        """In the order they were started: actors, rollout workers, env workers. They are children
        of the fork server."""
        children = [
            worker
            for child in psutil.Process(self.process.pid).children()
            for worker in child.children()
        ]
        return sorted(children, key=lambda worker: (worker.create_time(), worker.pid))

    def has_fork_server(self) -> bool:
        for process in self.living():
            with contextlib.suppress(psutil.Error):
                if "multiprocessing.forkserver" in " ".join(process.cmdline()):
                    return True
        return False

    def wait_for(self, file: Path, lines: int = 1, timeout: float = 60.0) -> None:
        deadline = time.monotonic() + timeout
        while not file.is_file() or len(file.read_text().splitlines()) < lines:
            assert self.process.poll() is None, self.process.communicate()[0]
            assert time.monotonic() < deadline, f"{file} did not come within {timeout} s"
            time.sleep(0.1)

    def interrupt_group(self) -> None:
        """What Ctrl-C in a terminal does: every process of the group gets the signal."""
        os.killpg(self.process.pid, signal.SIGINT)

    def assert_nothing_left(self, timeout: float = 15.0) -> None:
        deadline = time.monotonic() + timeout
        while left := self.living():
            assert time.monotonic() < deadline, f"still alive: {left}"
            time.sleep(0.1)

    def kill(self) -> None:
        for process in self.living():
            process.send_signal(signal.SIGKILL)
        self.process.wait()
        self.process.stdout.close()


@pytest.fixture
def cli():
    """Starts command lines; afterwards none of their processes may be left, nor a file in
    /dev/shm."""
    started = []
    before = shared_memory()

    def start(file: str | Path, flags: str = "", cwd: Path = ROOT, **environment: str) -> Cli:
        started.append(Cli(file, flags, cwd, **environment))
        return started[-1]

    yield start
    try:
        for one in started:
            if one.process.poll() is None:
                one.kill()
            one.assert_nothing_left()
        left = shared_memory() - before
        for _ in range(25):  # one that is being made or removed
            if left:
                time.sleep(0.2)
                left &= shared_memory()
        assert not left, f"left in /dev/shm: {left}"
    finally:
        for one in started:
            one.kill()
