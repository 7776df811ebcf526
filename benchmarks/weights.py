"""A weight sync against a memcpy of the same bytes, and what it costs a rollout worker that serves.

    python bench.py weights

Medians over many versions, except where it says otherwise:

    memcpy_s             numpy copies the same bytes, in the same process as sync_s and right after
                         it
    sync_s               `WeightPlane.fetch` on the side thread of a rollout worker that is idle:
                         the copy that serving hides
    sync_serving_s       the same while that worker serves, so it shares cores with inference
                         (`weight_sync_s` of a run)
    publish_s            the actor's `WeightPlane.publish`
    latency_s            from the start of publish until that worker uses the weights: two copies
                         and two wake-ups
    serving_stall_s      the longest that the serving worker spent switching to new weights between
                         two batches
    batch_s              its batch: one inference of BATCH requests with the default π0.5
    batch_during_sync_s  the same with a fetch going on beside it

Left out: planes on GPUs.
"""

import statistics
import time

import numpy as np
import torch
import torch.multiprocessing as mp

import envs
import models
from benchmarks.measuring import context
from channel import ACT, WAKE, IndexQueue, Record, Spec
from config import Config, embedded_files
from models import checkpoint
from weights import WeightFetcher, WeightPlane

BATCH = 12  # requests of one inference: half the embedded default's lanes, its B_max
PAUSE_S = 0.3  # between two versions, so that batches without a fetch are measured too


def embedded() -> tuple[Config, envs.EnvSpec]:
    """The embedded default: settings to build its model from, and its simulator."""
    config = Config()
    config.train.checkpoint = embedded_files(config.train.model, "metaworld")[0]
    return config, envs.load(config.train.env).spec(
        (), checkpoint.frame_size(config.train.checkpoint)
    )


def reader(spec: Spec, plane: WeightPlane, updates: IndexQueue, results, serve: bool) -> None:
    """A rollout worker's part: a side thread fetches, this one swaps. With `serve` inference
    follows inference meanwhile.

    Sends (seconds of the fetch, of the swap, moment after it, seconds of a memcpy) per version; at
    the end the seconds of batches without and with a fetch beside them."""
    torch.set_num_threads(1)
    config, env_spec = embedded()
    model = models.build(config, env_spec).eval()
    obs = {
        "image": torch.zeros(
            (BATCH, env_spec.views, env_spec.image_size, env_spec.image_size, 3), dtype=torch.uint8
        )
    }
    obs["tokens"] = torch.ones((BATCH, model.config.tokens), dtype=torch.int32)
    fetcher = WeightFetcher(
        plane,
        {name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in spec.items()},
        60.0,
    )
    source, copy = (np.ones(0 if serve else plane.bytes, np.uint8) for _ in range(2))
    alone = []
    beside = []
    reported = 0.0
    pending = True
    for step in range(1_000_000):
        records = updates.get(0.0 if serve or pending else None)
        if any(record.kind != WAKE for record in records):
            break
        if records:
            fetcher.look()
        pending = pending or bool(records)  # a version is being fetched
        if serve:
            start = time.monotonic()
            with torch.inference_mode():
                model.act(
                    obs, model.draw([(1, lane, 0, step) for lane in range(BATCH)], [True] * BATCH)
                )
            (beside if pending else alone).append(time.monotonic() - start)
        start = time.monotonic()
        if fetcher.swap(0.0 if serve else 60.0):
            end = time.monotonic()
            np.copyto(copy, source)
            results.send((fetcher.seconds - reported, end - start, end, time.monotonic() - end))
            reported = fetcher.seconds
            pending = False
    results.send((alone, beside))


def weights_row(name: str, spec: Spec, versions: int) -> dict:
    plane = WeightPlane(spec)
    source = {n: torch.ones(shape, dtype=dtype) for n, (shape, dtype) in spec.items()}
    version = 0
    server = context("benchmarks.weights")
    measured = {}
    plane.publish(source, version)
    for serve in (False, True):
        updates = IndexQueue()
        (receive, send) = mp.Pipe(duplex=False)
        process = server.Process(
            target=reader, args=(spec, plane, updates, send, serve), daemon=True
        )
        process.start()
        send.close()
        try:
            receive.recv()  # it has the first version
            rows = []
            for _ in range(versions):
                time.sleep(PAUSE_S)
                start = time.monotonic()
                plane.publish(source, version := version + 1)
                published = time.monotonic()
                updates.put([Record(0, 0, WAKE, 0, 0)])
                fetch_s, swap_s, held, memcpy_s = receive.recv()
                rows.append((published - start, fetch_s, swap_s, held - start, memcpy_s))
            updates.put([Record(0, 0, ACT, 0, 0)])  # anything but WAKE: the end
            measured[serve] = list(zip(*rows, strict=True))
            (alone, beside) = receive.recv()
        finally:
            process.kill()
            process.join()
    median = statistics.median
    (publish, fetch, _, latency, memcpy) = measured[False]
    (_, beside_fetch, swap, _, _) = measured[True]
    return {
        "name": name,
        "bytes": plane.bytes,
        "memcpy_s": median(memcpy),
        "sync_s": median(fetch),
        "sync_serving_s": median(beside_fetch),
        "publish_s": median(publish),
        "latency_s": median(latency),
        "serving_stall_s": max(swap),
        "batch_s": median(alone),
        "batch_during_sync_s": median(beside),
    }


def measure(repeats: int) -> list[dict]:
    settings, env_spec = embedded()
    trainable = models.build(settings, env_spec, weights="none").trainable()
    small = {name: (tuple(p.shape), p.dtype) for name, p in trainable.items()}
    big = {f"layer_{i}": ((4096, 4096), torch.float32) for i in range(4)}
    return [weights_row("embedded", small, 6 * repeats), weights_row("256MB", big, 3 * repeats)]
