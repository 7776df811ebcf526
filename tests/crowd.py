"""Starts as many workers as may be asked for, lets each hear of each other's kind, and ends them.

They are trivial; how they are started, and what they meet by, is a run's.
"""

import resource
import sys
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path

import torch

import processes
from channel import WAKE, Channels, Counters, Record, SlotPool
from config import MOST_WORKERS, Config, completed
from metrics import Meter, columns
from processes import Crew, Job
from weights import WeightPlane


def ask(rank, channels, meter) -> None:
    """As an env worker: it asks, and is ready once it has an answer."""
    channels.requests[0].put([Record(0, 0, WAKE, rank, 0)])
    assert channels.replies[rank].get(60.0)[0] == Record(0, 1, WAKE, rank, 0)
    channels.finished[0].put([Record(0, 2, WAKE, rank, 0)])
    meter.ready()
    time.sleep(60)


def hear(queue, count: int) -> set[int]:
    """Takes in so many records. Returns who has sent them."""
    heard = []
    while len(heard) < count:
        heard += queue.get(60.0)
    return {record.sender for record in heard}


def answer(count, channels, meter) -> None:
    """As a rollout worker."""
    for rank in hear(channels.requests[0], count):
        channels.replies[rank].put([Record(0, 1, WAKE, rank, 0)])
    meter.ready()
    time.sleep(60)


def take(count, channels, meter) -> None:
    """As an actor worker, which wakes all others, too."""
    assert hear(channels.finished[0], count) == set(range(count))
    for queue in (*channels.replies, *channels.requests):
        queue.put([Record(0, 3, WAKE, 0, 0)])
    meter.ready()
    time.sleep(60)


def main() -> None:
    resource.setrlimit(
        resource.RLIMIT_NOFILE, (1024, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    )
    interrupts = processes.note_interrupts("train")
    count = MOST_WORKERS - 2
    config = completed(Config(), envs=count, env_workers=count, rollout_workers=1, actor_workers=1)
    counters = Counters(count + 2, columns(0))
    plane = WeightPlane({"w": ((1,), torch.float32)})
    pool = SlotPool({"x": ((1,), torch.float32)}, 1)
    channels = Channels.create(config, pool, plane, counters)
    plans = [("rollout", 0, answer, count), ("actor", 0, take, count)]
    plans += [("env", rank, ask, rank) for rank in range(count)]
    jobs = []
    for row, (stage, rank, target, number) in enumerate(plans):
        meter = Meter(f"{stage}-{rank}", row, counters, None)
        args = (number, channels.of_worker(stage, rank), meter)
        jobs.append(Job(meter.name, target, args, 1, meter, {}))
    crew = Crew(jobs, counters, Path(tempfile.gettempdir()), restarts=0, timeout=60.0)
    news, _ = get_context("forkserver").Pipe(duplex=False)
    ready = counters.table[:, counters.index["ready"]]
    start = time.monotonic()
    try:
        crew.start_all()
        while not ready.all():
            crew.watch(news)
    finally:
        crew.stop(interrupts)
    print(f"{len(jobs)} workers have met in {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    sys.exit(main())
