"""Emulated devices that stages share: nobody has one while another has it, whoever dies."""

import multiprocessing as mp
import os
import signal
import time

import numpy as np
import pytest

from benchmarks.emulated import devices, maniskill_hybrid, metaworld
from benchmarks.emulated.devices import SLICE, Device, device_of

FORK = mp.get_context("fork")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(devices.util, "get_temp_dir", lambda: str(tmp_path))


def reserve(times: int, seconds: float, queue) -> None:
    """Asks device 0 again and again; returns what it was given, as (start, end)."""
    device = Device(0)
    device.use(0.0)  # opens the file
    for _ in range(times):
        end = device.reserve(seconds, time.monotonic())
        queue.put((end - seconds, end))
        time.sleep(max(0.0, end - time.monotonic()))


def test_work_of_several_processes_never_overlaps():
    queue = FORK.SimpleQueue()
    workers = [FORK.Process(target=reserve, args=(10, 0.01 * i, queue)) for i in (1, 2, 3)]
    for worker in workers:
        worker.start()
    given = sorted(queue.get() for _ in range(30))
    for worker in workers:
        worker.join(10.0)
    gaps = [start - end for (_, end), (start, _) in zip(given, given[1:], strict=False)]
    assert min(gaps) > -1e-6


def test_a_device_goes_from_one_to_the_next_without_a_pause():
    first = Device(0)
    second = Device(0)
    for device in (first, second):
        device.use(0.0)
    now = time.monotonic() + 1.0
    assert first.reserve(0.5, now) == now + 0.5
    assert second.reserve(0.25, now + 0.1) == now + 0.75
    assert first.reserve(0.5, now + 2.0) == now + 2.5  # nobody had asked before


def test_short_work_has_its_turn_between_slices_of_long_work():
    long = FORK.Process(target=Device(0).use, args=(1.0,))
    long.start()
    time.sleep(0.2)
    begun = time.monotonic()
    Device(0).use(0.001)
    assert time.monotonic() - begun < 0.3 and long.is_alive()
    Device(1).use(0.001)  # another one
    long.join(10.0)
    begun = time.monotonic()
    Device(0).use(3 * SLICE)
    assert time.monotonic() - begun >= 3 * SLICE


def test_a_killed_worker_blocks_nobody():
    doomed = FORK.Process(target=Device(0).use, args=(60.0,))
    doomed.start()
    time.sleep(0.2)
    os.kill(doomed.pid, signal.SIGKILL)
    doomed.join(10.0)
    begun = time.monotonic()
    Device(0).use(0.01)
    assert time.monotonic() - begun < 1.0


@pytest.mark.parametrize(
    "placement, numbers",
    [
        ("colocated", {"env-3": 0, "rollout-0": 0, "actor-0": 0, "actor-1": 0}),
        ("hybrid", {"env-0": 0, "rollout-0": 1, "actor-0": 0, "actor-1": 1}),
        ("disaggregated", {"env-0": 0, "rollout-0": 0, "actor-0": None, "MainProcess": None}),
    ],
)
def test_who_shares_a_device(placement, numbers):
    found = {name: device_of(name, placement) for name in numbers}
    at = {name: device and device.number for name, device in found.items()}
    assert at == numbers


def test_a_simulator_draws_on_the_device_and_simulates_beside_it(monkeypatch):
    slept = []
    used = []
    monkeypatch.setattr(metaworld.time, "sleep", slept.append)
    monkeypatch.setattr(Device, "use", lambda self, seconds: used.append((self.number, seconds)))
    env = metaworld.Env(("emulated",), 8)
    chunks = 0
    for seed in range(20):
        env.reset(0, seed)
        for _ in range(metaworld.EPISODE * metaworld.CHUNK):
            env.step(np.zeros(4))
        chunks += metaworld.EPISODE
    assert len(slept) == len(used) == chunks and {at for at, _ in used} == {0}
    drawn = sum(seconds for _, seconds in used)
    assert drawn / chunks == pytest.approx(metaworld.DRAW, rel=0.1)
    assert (sum(slept) + drawn) / chunks == pytest.approx(metaworld.MEAN, rel=0.1)

    used.clear()
    many = maniskill_hybrid.Envs(("vectorised",), 8, 64, "cpu")
    many.reset(list(range(64)), 0, [0] * 64)
    for _ in range(2 * maniskill_hybrid.CHUNK):
        many.step(np.zeros((64, 4)))
    assert used == [(0, pytest.approx(maniskill_hybrid.SIMULATION))] * 2
