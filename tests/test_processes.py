"""However a run ends, nothing of it is left; and whoever ended it is named. (`cli` checks for processes and /dev/shm.)"""

import json
import re
import signal
import time
from multiprocessing import get_context
from pathlib import Path

import pytest
from conftest import SMALL
from test_channel import SPEC, open_files

from channel import Counters, IndexQueue, SlotPool
from train import run_path

ENDLESS = f"{SMALL} --ratio 2:1 --iterations 100000 --checkpoint-every 100000"


@pytest.fixture
def endless(cli, tiny_checkpoint, tmp_path):
    """A run that trains for ever, on two env workers; returns it once it has trained an iteration."""

    def start(flags: str = "", wait: bool = True):
        process = cli("train.py", f"{ENDLESS} --checkpoint {tiny_checkpoint} --run {tmp_path / 'x'} {flags}")
        if wait:
            process.wait_for(tmp_path / "x" / "metrics.jsonl")
        return process

    return start


def assert_clean_end(run: Path, output: str) -> None:
    assert "Traceback" not in output, output
    assert not (run / ".spans").exists() and json.loads((run / "trace.json").read_text())["traceEvents"]


def test_ctrl_c_saves_and_says_where(endless, tmp_path):
    process = endless("--actor-workers 2")
    process.process.send_signal(signal.SIGINT)
    status, output = process.finish(timeout=30)
    process.assert_nothing_left()
    assert status == 130, output
    saved, resume = re.search(r"interrupted; saved (\S+); continue with: python train.py --resume (\S+)", output).groups()
    saved = Path(saved)
    assert run_path(resume) == tmp_path / "x"  # the advice works
    assert saved.parent == tmp_path / "x" / "checkpoints"
    assert {file.name for file in saved.iterdir()} == {"model.safetensors", "optimizer.pt", "state.json"}
    assert json.loads((saved / "state.json").read_text())["version"] == int(saved.name) >= 1
    assert_clean_end(tmp_path / "x", output)


def test_ctrl_c_of_a_terminal_while_workers_start(endless, tmp_path):
    process = endless(wait=False)
    while not process.has_fork_server():
        assert process.process.poll() is None
        time.sleep(0.02)
    time.sleep(0.3)  # the fork server is importing
    process.interrupt_group()
    status, output = process.finish(timeout=30)
    process.assert_nothing_left()
    assert status == 130 and "interrupted before anything was trained" in output and "Traceback" not in output, output


def test_a_killed_launcher_takes_everything_along(endless):
    process = endless()
    alive = process.living()
    assert len(process.workers()) == 4 and len(alive) >= 6  # launcher, fork server, 4 workers
    process.process.kill()
    process.process.wait()
    process.assert_nothing_left()


def test_a_worker_that_dies_ends_the_run_by_name(endless, tmp_path):
    process = endless()
    process.workers()[2].kill()  # env-0, after actor-0 and rollout-0
    status, output = process.finish(timeout=30)
    process.assert_nothing_left()
    assert status == 1 and "worker env-0 died" in output, output
    assert_clean_end(tmp_path / "x", output)


def test_a_worker_that_hangs_ends_the_run_by_name(endless, tmp_path):
    process = endless("--timeout-s 12")
    process.workers()[3].suspend()  # env-1
    status, output = process.finish(timeout=60)
    process.assert_nothing_left()
    assert status == 1 and "env-1" in output.splitlines()[-1], output
    assert_clean_end(tmp_path / "x", output)


def test_an_error_in_a_worker_ends_the_run_by_name(endless, tmp_path):
    process = endless("--lr 1e30 --warmup 0 --minibatch 2", wait=False)
    status, output = process.finish(timeout=60)
    process.assert_nothing_left()
    assert status == 1 and "worker actor-0 failed: FloatingPointError: the gradient of version" in output, output
    assert "Traceback" in (tmp_path / "x" / "error.txt").read_text() and "error.txt" in output
    assert_clean_end(tmp_path / "x", output)


def poke(pool, counters, queues) -> None:
    counters.add(0, "a", len(queues))


def test_pools_and_queues_sent_to_processes_leave_no_file_open():
    def once() -> None:
        pool, counters, queues = SlotPool(SPEC, 2), Counters(1, ("a",)), tuple(IndexQueue() for _ in range(3))
        process = get_context("forkserver").Process(target=poke, args=(pool, counters, queues))
        process.start()
        process.join(60)
        assert process.exitcode == 0
        process.close()

    once()
    before = open_files()
    once()
    assert open_files() == before
