"""Slots, queues and the lane table under fire: killed writers, full pipes, every way to start a
process.
"""

import os
import select
import signal
import time
from multiprocessing import get_context, popen_forkserver, reduction
from multiprocessing.context import set_spawning_popen
from pathlib import Path

import numpy as np
import pytest
import torch

import channel
import transfers
from channel import (
    ACT,
    ALIGN,
    ATOMIC,
    READ,
    RECORD,
    WAKE,
    Arena,
    Channels,
    Counters,
    IndexQueue,
    LaneTable,
    Record,
    SlotPool,
    layout,
)
from config import MOST_WORKERS, Config
from errors import UserError
from weights import WeightPlane

SPEC = {
    "image": ((3, 5), torch.uint8),
    "value": ((4,), torch.float32),
    "env": ((), torch.int32),
    "none": ((0, 7), torch.float32),
}
fork = get_context("fork")


def records(count: int, sender: int = 0) -> list[Record]:
    return [Record(i, i % 65536, ACT, sender, 7) for i in range(count)]


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


# ---------------------------------------------------------------- SlotPool


def touch(pool: SlotPool, counters: Counters, lanes: LaneTable, queue: IndexQueue) -> None:
    assert pool["value"][1].tolist() == [1.0, 2.0, 3.0, 4.0]
    pool["image"][2] = 7
    counters.add(1, "b", 2.5)
    lanes.trajectory[2] = 2**40
    lanes.generation[1] = 5
    lanes.rollout_generation[0] = 6
    queue.put([Record(1, 2, WAKE, 3, 4)])


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_every_process_sees_the_same_slots(method):
    pool = SlotPool(SPEC, 3)
    counters = Counters(2, ("a", "b"))
    lanes = LaneTable(3, 2, 1)
    queue = IndexQueue()
    pool["value"][1] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    process = get_context(method).Process(target=touch, args=(pool, counters, lanes, queue))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert (pool["image"][2] == 7).all() and (pool["image"][:2] == 0).all()
    assert counters.get(1, "b") == 2.5 and counters.get(0, "b") == 0.0
    assert lanes.trajectory.tolist() == [0, 0, 2**40] and lanes.generation.tolist() == [0, 5]
    assert lanes.rollout_generation.tolist() == [6]
    assert queue.get(0) == [Record(1, 2, WAKE, 3, 4)]


def test_slots_are_aligned_apart_and_without_a_name():
    pool = SlotPool(SPEC, 3)
    spans = sorted(
        (t.data_ptr(), t.data_ptr() + t.nbytes) for t in pool.tensors.values() if t.numel()
    )
    assert all(start % ALIGN == 0 for start, _ in spans)
    assert all(end <= start for (_, end), (start, _) in zip(spans, spans[1:], strict=False))
    assert (
        pool["image"].shape == (3, 3, 5)
        and pool["none"].shape == (3, 0, 7)
        and pool["env"].dtype == torch.int32
    )
    assert layout(SPEC, 3)[1] == pool.bytes == 64 + 64 + 64
    maps = [
        line
        for line in Path("/proc/self/maps").read_text().splitlines()
        if int(line.split("-")[0], 16) == spans[0][0]
    ]
    assert len(maps) == 1 and "/memfd:" in maps[0] and "/dev/shm" not in maps[0]


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.bool, torch.int32, torch.float32, torch.bfloat16]
)
def test_rows_are_read_and_written_as_torch_would(dtype):
    pool = SlotPool({"x": ((6, 2, 3), dtype), "scalar": ((6,), dtype)}, 4)
    generator = torch.Generator().manual_seed(0)
    slots = np.array([3, 0, 3])
    rows = np.array([5, 0, 1])
    expected = {name: torch.zeros_like(pool[name]) for name in pool.spec}
    for name, shape in (("x", (3, 2, 3)), ("scalar", (3,))):
        values = torch.randn(shape, generator=generator)  # cast to the field's type
        transfers.put(pool, name, slots, rows, values)
        expected[name][slots, rows] = values.to(dtype)
        assert torch.equal(pool[name], expected[name]) and pool[name].any()
        found = transfers.gather(pool, name, slots, rows)
        assert found.dtype == dtype and torch.equal(found, expected[name][slots, rows])
        assert torch.equal(transfers.gather(pool, name, slots), expected[name][slots])
        found.zero_()
        assert torch.equal(pool[name], expected[name])  # it is a copy


def test_some_fields_on_a_device_and_the_others_in_shared_memory():
    pool = SlotPool(SPEC, 3, "meta", ("image",))  # a device without memory, in place of a GPU
    assert pool["image"].device.type == "meta" and pool["image"].shape == (3, 3, 5)
    assert {pool[name].device.type for name in ("value", "env", "none")} == {
        "cpu"
    } and pool.bytes == 64 + 64
    whole = SlotPool(SPEC, 3, "meta")
    assert {tensor.device.type for tensor in whole.tensors.values()} == {
        "meta"
    } and whole.arena is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_another_process_sees_slots_in_gpu_memory():
    pool = SlotPool(SPEC, 3, "cuda:0", ("image",))
    counters = Counters(2, ("a", "b"))
    lanes = LaneTable(3, 2, 1)
    queue = IndexQueue()
    pool["value"][1] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    process = get_context("forkserver").Process(target=touch, args=(pool, counters, lanes, queue))
    process.start()
    process.join(60)
    assert process.exitcode == 0 and queue.get(0) == [Record(1, 2, WAKE, 3, 4)]
    assert (
        (pool["image"][2] == 7).all()
        and pool["image"].is_cuda
        and transfers.read(pool, ("image",), *np.array([[2], [1]]), "cuda:0")["image"].is_cuda
    )


@pytest.mark.parametrize("near", [None, [frozenset({0})] * 8])
def test_memory_is_there_before_it_is_used(near):
    pool = SlotPool({"big": ((1 << 20,), torch.uint8)}, 8, near=near)
    assert os.fstat(pool.arena.fd).st_blocks * 512 == pool.bytes == 8 << 20


def test_each_slot_is_taken_from_the_node_that_serves_it(monkeypatch):
    """The core that asks for a page decides which node it comes from."""
    ours = os.sched_getaffinity(0)
    on = [ours]
    taken = {}
    monkeypatch.setattr(channel, "PIECE", 1000)
    monkeypatch.setattr(os, "sched_setaffinity", lambda _, cores: on.append(cores))
    monkeypatch.setattr(
        os,
        "posix_fallocate",
        lambda fd, first, n: taken.update(dict.fromkeys(range(first, first + n), on[-1])),
    )
    left, right = frozenset({0, 1}), frozenset({2, 3})
    near = [left, left, right, left, right]
    pool = SlotPool({"a": ((700,), torch.float32), "b": ((3, 5), torch.uint8)}, 5, near=near)
    assert on[-1] == ours and len(on) == 2 + 2 * 4  # runs of slots, in both fields
    for name, size in (("a", 2800), ("b", 15)):
        for slot, cores in enumerate(near):
            first = pool.offsets[name] + slot * size
            assert {taken[byte] for byte in range(first, first + size)} == {cores}


def test_memory_that_ends_or_takes_long_says_so(monkeypatch, capsys):
    monkeypatch.setattr(channel, "PIECE", 10**9)
    monkeypatch.setattr(channel, "SILENT_S", -1.0)
    monkeypatch.setattr(os, "ftruncate", lambda *_: None)

    def take(file: int, first: int, length: int) -> None:
        if first + length > 3 * 10**9:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", take)
    ours = os.sched_getaffinity(0)
    with pytest.raises(UserError, match=r"only 3.0 of 64.0 GB .* \(No space left .*: lower --envs"):
        Arena(64 * 10**9)
    said = capsys.readouterr().out.splitlines()
    assert said == [f"{n}.0 of 64.0 GB of memory ready" for n in (1, 2, 3)]
    assert os.sched_getaffinity(0) == ours


def test_nothing_stays_open():
    def use() -> None:
        pool = SlotPool(SPEC, 3)
        plane = WeightPlane(SPEC)
        counters = Counters(2, ("a",))
        lanes = LaneTable(3, 2, 1)
        queue = IndexQueue()
        queue.put(records(3))
        queue.get(0)
        plane.publish({"value": torch.zeros(4)}, 0)
        counters.add(0, "a", 1.0)
        pool["value"].zero_()
        lanes.trajectory[:] = 1
        queue.close_writer()
        queue.close_writer()

    use()
    before = open_files()
    for _ in range(5):
        use()
    assert open_files() == before


# ---------------------------------------------------------------- IndexQueue


def test_records_keep_every_field_and_their_order():
    queue = IndexQueue()
    largest = Record(2**32 - 1, 65535, 255, 255, 65535)
    sent = [largest, Record(0, 0, ACT, 0, 0), Record(7, 8, 1, 9, 10)]
    assert RECORD.size == 10
    queue.put(sent[:1])
    queue.put(sent[1:])
    assert queue.get(0) == sent and queue.get(0) == []


def test_thousands_of_records_in_one_call():
    queue = IndexQueue()
    queue.put(sent := records(5000))
    got = []
    while more := queue.get(0):
        got += more
    assert got == sent


def test_an_empty_queue_waits_as_long_as_it_is_told():
    queue = IndexQueue()
    start = time.monotonic()
    assert queue.get(0.2) == [] and time.monotonic() - start >= 0.19
    assert queue.get(0) == []


def fill(queue: IndexQueue, at_once: int) -> list[Record]:
    """Writes until the pipe takes no more of so many records. Returns what it took."""
    taken = []
    with pytest.raises(TimeoutError, match="reader is stuck"):
        while True:
            some = [Record(len(taken) + i, 1, ACT, 2, 3) for i in range(at_once)]
            queue.put(some, timeout=0.1)
            taken += some
    return taken


@pytest.mark.parametrize("at_once", [1, 7, 100, ATOMIC - 1, ATOMIC])
def test_a_full_queue_names_its_stuck_reader_and_nothing_in_it_is_torn(at_once):
    """The reader takes as many bytes as a full pipe may hold: they must end between two records."""
    left = 65536 - READ
    assert READ % RECORD.size == 0 and 0 <= left < RECORD.size
    queue = IndexQueue()
    for _ in range(2):  # the second time pages are in use that the first reading has left behind
        taken = fill(queue, at_once)
        assert len(taken) > 1000
        got = []
        while more := queue.get(0):
            got += more
        assert got == taken


def test_a_queue_read_while_it_is_full_keeps_records_whole():
    """The writer fills up again as soon as there is room, and the reader never sees it empty."""
    queue = IndexQueue()
    writer = fork.Process(target=write_for_ever, args=(queue, 3), daemon=True)
    writer.start()
    count = 0
    while count < 200_000:
        for record in queue.get(20.0):
            assert record == (count // ATOMIC, count % ATOMIC, ACT, 3, 9)
            count += 1
    writer.kill()
    writer.join()


def test_the_reader_learns_that_the_last_writer_is_gone():
    queue = IndexQueue()
    writers = [fork.Process(target=queue.put, args=(records(2, sender),)) for sender in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(30)
    assert len(queue.get(5.0)) == 4 and queue.get(0) == []  # this process could still write
    queue.close_writer()
    with pytest.raises(IndexQueue.Closed):
        queue.get(5.0)


def write_for_ever(queue: IndexQueue, sender: int) -> None:
    block = 0
    while True:
        queue.put([Record(block, i, ACT, sender, 9) for i in range(ATOMIC)])
        block += 1


def test_writers_killed_while_writing_neither_tear_nor_block():
    assert ATOMIC * RECORD.size <= select.PIPE_BUF  # what the kernel keeps in one piece
    queue = IndexQueue()
    count = 6
    writers = [
        fork.Process(target=write_for_ever, args=(queue, sender), daemon=True)
        for sender in range(count)
    ]
    for writer in writers:
        writer.start()
    queue.close_writer()
    blocks = [0] * count
    position = 0
    begun = time.monotonic()
    killed = 0
    with pytest.raises(IndexQueue.Closed):
        while True:
            got = queue.get(20.0)
            assert got, "the queue blocked"
            for record in got:
                if position == 0:  # a new block of 409: whole, in one piece and the writer's next
                    sender = record.sender
                    block = record.slot
                    assert block == blocks[sender]
                    blocks[sender] += 1
                assert record == (block, position, ACT, sender, 9)
                position = (position + 1) % ATOMIC
            if killed < count and time.monotonic() - begun > 0.3 + 0.07 * killed:
                os.kill(writers[killed].pid, signal.SIGKILL)
                killed += 1
    assert killed == count and position == 0 and sum(blocks) > count
    for writer in writers:
        writer.join()
        assert writer.exitcode == -signal.SIGKILL


# ---------------------------------------------------------------- Counters


def test_counters():
    counters = Counters(2, ("a", "b"))
    counters.add(0, "a", 1.5)
    counters.add(0, "a", 1.0)
    counters.set(1, "b", -3.0)
    assert (counters.get(0, "a"), counters.get(0, "b"), counters.get(1, "b")) == (2.5, 0.0, -3.0)
    np.testing.assert_array_equal(counters.table, [[2.5, 0.0], [0.0, -3.0]])


# ---------------------------------------------------------------- what connects the stages


@pytest.mark.parametrize("lanes, count", [(0, 12), (2, 6)])
def test_there_is_a_queue_for_every_worker_and_a_row_for_every_lane(lanes, count):
    config = Config()
    config.env.envs = 12
    config.env.env_workers = 3
    config.env.lanes = lanes  # of every env worker, where the simulator is vectorised
    config.rollout.rollout_workers = 2
    config.actor.actor_workers = 4
    channels = Channels.create(config, None, None, Counters(9, ("a",)))
    assert (len(channels.requests), len(channels.replies), len(channels.finished)) == (2, 3, 4)
    assert channels.lanes.trajectory.tolist() == [0] * count
    assert channels.lanes.generation.tolist() == [0] * 3
    assert channels.lanes.rollout_generation.tolist() == [0] * 2


@pytest.mark.parametrize("stage", ["env", "rollout", "actor"])
def test_no_worker_gets_more_descriptors_than_one_message_carries(stage):
    """253 are the most (SCM_MAX_FD of Linux). A worker also gets two pipes to the launcher."""
    config = Config()
    config.env.envs = config.env.env_workers = MOST_WORKERS
    config.rollout.rollout_workers = config.actor.actor_workers = 8
    plane = WeightPlane({"w": ((1,), torch.float32)})
    pool = SlotPool({"x": ((1,), torch.float32)}, 1)
    channels = Channels.create(config, pool, plane, Counters(9, ("a",)))
    start = popen_forkserver.Popen.__new__(popen_forkserver.Popen)
    start._fds = []
    set_spawning_popen(start)
    try:
        reduction.ForkingPickler.dumps(channels.of_worker(stage, 0))
    finally:
        set_spawning_popen(None)
    of_the_server = 4  # its own four: popen_forkserver.py, forkserver.connect_to_new_process
    assert len(start._fds) + 2 + of_the_server <= 253
