"""Measures round trips of observations and actions between N env processes and one server, by
several means of transport.

    python bench.py transport

In a round trip an env hands over an observation of 301 KB. The server, in the rollout worker's
place, stacks what has come to one batch, reads a byte of every image row and answers each env with
10 × 7 actions. The means:

    slots        `SlotPool` + `IndexQueue`: written once in place, 8-byte records travel, the server
                 copies rows into its batch
    torch_queue  torch.multiprocessing.Queue: every image and action is a fresh tensor in shared
                 memory of its own
    mp_queue     multiprocessing.Queue: numpy arrays, pickled through a pipe
    ray          an actor call per request, where Ray is installed; so each batch holds one
                 observation

Repetitions of all of them alternate; rows hold medians. `memcpy_mb_per_s`: numpy copies the same
bytes within one process. Before a run, slots need memory: `take_mb_per_s` is `channel.take_memory`,
`touch_mb_per_s` writes a byte to each page instead. Then worker processes map it: `map_mb_per_s`
and `map_touched_mb_per_s` are of one process that writes to each page of either. Left out: Ray's
ways to batch calls, transports between GPUs.
"""

import importlib.util
import math
import mmap
import multiprocessing
import os
import queue
import statistics
import time

import numpy as np
import torch
import torch.multiprocessing as mp

from benchmarks.measuring import context
from channel import ACT, Counters, IndexQueue, Record, SlotPool, take_memory
from machine import near

IMAGE = (2, 224, 224, 3)  # uint8
STATE = (8,)  # float32
ACTION = (10, 7)  # float32
FIELDS = {
    "image": (IMAGE, torch.uint8),
    "state": (STATE, torch.float32),
    "action": (ACTION, torch.float32),
}
SENDER_IS_GONE = (OSError, EOFError)  # of a tensor on its way, when a repetition ends
BYTES = math.prod(IMAGE) + 4 * math.prod(STATE)
POOL = 2**30  # bytes


def reply_to(images: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """Does every server's work on a batch [n, …].

    It reads a byte of each image row and returns actions [n, 10, 7].
    """
    seen = images[:, :, :, 0, 0].sum(dim=(1, 2), dtype=torch.float32) + states.sum(dim=1)
    return seen[:, None, None].expand(-1, *ACTION)


def slots_server(
    pool: SlotPool, requests: IndexQueue, replies: list[IndexQueue], table: Counters
) -> None:
    torch.set_num_threads(1)
    while not table.get(0, "stop"):
        records = requests.get(0.2)
        if not records:
            continue
        slots = torch.tensor([record.slot for record in records])
        images = pool["image"].index_select(0, slots)
        states = pool["state"].index_select(0, slots)
        pool["action"][slots] = reply_to(images, states)
        for record in records:
            replies[record.sender].put([record])


def slots_env(
    rank: int, pool: SlotPool, requests: IndexQueue, replies: list[IndexQueue], table: Counters
) -> None:
    frame = np.full(IMAGE, rank, np.uint8)
    vector = np.ones(STATE, np.float32)
    image, state, action = (pool[name].numpy() for name in FIELDS)
    while not table.get(0, "stop"):
        image[rank] = frame
        state[rank] = vector
        requests.put([Record(rank, 0, ACT, rank, 0)])
        while not replies[rank].get(0.2) and not table.get(0, "stop"):
            pass
        action[rank].sum()
        table.add(rank, "round_trips", 1)


def queue_server(tensors: bool, requests, replies: list, table: Counters) -> None:
    """Serves through queues.

    With `tensors`, images and actions are torch tensors, each in fresh shared memory; else they are
    numpy arrays, which travel pickled.
    """
    torch.set_num_threads(1)
    while not table.get(0, "stop"):
        try:
            batch = [requests.get(timeout=0.2)]
            while not requests.empty():
                batch.append(requests.get())
        except (queue.Empty, *SENDER_IS_GONE):
            continue
        ranks, images, states = zip(*batch, strict=True)
        images = torch.stack(images) if tensors else torch.from_numpy(np.stack(images))
        actions = reply_to(images, torch.from_numpy(np.stack(states)))
        for rank, action in zip(ranks, actions, strict=True):
            replies[rank].put(action.clone() if tensors else action.numpy().copy())
    for reply in replies:
        reply.cancel_join_thread()


def queue_env(rank: int, tensors: bool, requests, replies: list, table: Counters) -> None:
    frame = np.full(IMAGE, rank, np.uint8)
    vector = np.ones(STATE, np.float32)
    while not table.get(0, "stop"):
        requests.put((rank, torch.from_numpy(frame) if tensors else frame, vector))
        try:
            replies[rank].get(timeout=5.0).sum()
        except (queue.Empty, *SENDER_IS_GONE):
            continue
        table.add(rank, "round_trips", 1)
    requests.cancel_join_thread()


def jobs_of(name: str, n: int, table: Counters) -> list[tuple]:
    """Connects server and envs. Returns a function and its arguments for each of them."""
    if name == "slots":
        replies = [IndexQueue() for _ in range(n)]
        links = (SlotPool(FIELDS, n), IndexQueue(), replies, table)
        return [(slots_server, links), *((slots_env, (rank, *links)) for rank in range(n))]
    module = mp if name == "torch_queue" else multiprocessing
    make = module.get_context("forkserver").Queue
    links = (name == "torch_queue", make(), [make() for _ in range(n)], table)
    return [(queue_server, links), *((queue_env, (rank, *links)) for rank in range(n))]


def round_trips(name: str, n: int, seconds: float) -> float:
    """Measures round trips/s once: starts server and envs, counts for `seconds`, stops them.

    Counting begins when every env is going.
    """
    if name == "ray":
        return ray_round_trips(n, seconds)
    server = context("benchmarks.transport")
    table = Counters(n, ("round_trips", "stop"))
    jobs = jobs_of(name, n, table)
    processes = [server.Process(target=target, args=args, daemon=True) for target, args in jobs]
    for process in processes:
        process.start()
    counts = table.table[:, 0]
    try:
        deadline = time.monotonic() + 60.0
        while counts.min() < 3:
            if time.monotonic() > deadline or not all(process.is_alive() for process in processes):
                raise RuntimeError(f"{name} with {n} envs did not start")
            time.sleep(0.05)
        before = counts.sum()
        start = time.monotonic()
        time.sleep(seconds)
        return (counts.sum() - before) / (time.monotonic() - start)
    finally:
        table.set(0, "stop", 1.0)
        for process in processes:
            process.join(6.0)
            process.kill()


def ray_round_trips(n: int, seconds: float) -> float:
    """Measures the same through Ray: the server is an actor and a request is a call."""
    import ray

    ray.init(
        num_cpus=n + 1,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        ignore_reinit_error=True,
    )

    @ray.remote(num_cpus=1)
    class Server:
        def act(self, image, state):
            images = torch.from_numpy(np.stack([image]))
            states = torch.from_numpy(np.stack([state]))
            return reply_to(images, states)[0].numpy().copy()

    @ray.remote(num_cpus=1)
    def env(server, rank: int) -> float:
        frame = np.full(IMAGE, rank, np.uint8)
        vector = np.ones(STATE, np.float32)
        count = 0
        ray.get(server.act.remote(frame, vector)).sum()
        start = time.monotonic()
        while time.monotonic() < start + seconds:
            ray.get(server.act.remote(frame, vector)).sum()
            count += 1
        return count / (time.monotonic() - start)

    server = Server.remote()
    rate = sum(ray.get([env.remote(server, rank) for rank in range(n)]))
    ray.kill(server)
    return rate


def memcpy_rate(n: int) -> float:
    """Measures the bytes/s of numpy copying n observations in turn."""
    source = np.ones((n, BYTES), np.uint8)
    target = np.ones((n, BYTES), np.uint8)
    start = time.perf_counter()
    count = 0
    while time.perf_counter() < start + 0.2:
        np.copyto(target[count % n], source[count % n])
        count += 1
    return count * BYTES / (time.perf_counter() - start)


def touch(file: int) -> None:
    """Writes a byte to each page of a file."""
    with mmap.mmap(file, 0) as memory:
        np.frombuffer(memory, np.uint8)[:: mmap.PAGESIZE] = 1


def memory_rates() -> dict[str, float]:
    """Measures the bytes/s at which POOL bytes of shared memory are had, and mapped afterwards, in
    both ways."""
    rates = {}
    for name in ("take", "touch"):
        file = os.memfd_create(name)
        start = time.perf_counter()
        if name == "take":
            take_memory(file, POOL, [(0, POOL, near("cpu"))])
        else:
            os.ftruncate(file, POOL)
            touch(file)
        rates[f"{name}_mb_per_s"] = POOL / 1e6 / (time.perf_counter() - start)
        worker = multiprocessing.get_context("fork").Process(target=touch, args=(file,))
        start = time.perf_counter()
        worker.start()
        worker.join()
        mapped = "map_mb_per_s" if name == "take" else "map_touched_mb_per_s"
        rates[mapped] = POOL / 1e6 / (time.perf_counter() - start)
        os.close(file)
    return rates


def measure(repeats: int, seconds: float) -> list[dict]:
    """Measures every means, with 2 and with 8 envs."""
    names = ["slots", "torch_queue", "mp_queue"]
    if importlib.util.find_spec("ray"):
        names.append("ray")
    rows = []
    for n in (2, 8):
        measured = {name: [] for name in names}
        machine = []
        for _ in range(repeats):
            machine.append({"memcpy_mb_per_s": memcpy_rate(n) / 1e6} | memory_rates())
            for name, rates in measured.items():
                rates.append(round_trips(name, n, seconds))
        for name, rates in measured.items():
            rate = statistics.median(rates)
            rows.append(
                {
                    "name": name,
                    "envs": n,
                    "round_trips_per_s": rate,
                    "mb_per_s": rate * BYTES / 1e6,
                }
                | {key: statistics.median(rates[key] for rates in machine) for key in machine[0]}
            )
    return rows
