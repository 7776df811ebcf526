"""Measures a weight sync against a memcpy of the same bytes, and what it costs a rollout worker
that serves.

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
from typing import NamedTuple

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
    """Makes the embedded default: settings to build its model from, and its simulator."""
    config = Config()
    config.train.checkpoint, _ = embedded_files(config.train.model, "metaworld")
    size = checkpoint.frame_size(config.train.checkpoint, 256)
    return config, envs.load(config.train.env).spec((), size)


class Took(NamedTuple):
    """What one version took, in seconds."""

    fetch: float
    swap: float
    held: float  # the moment when the worker had it
    memcpy: float


class Policy:
    """The default π0.5, with a batch of requests for it."""

    def __init__(self):
        config, env_spec = embedded()
        pixels = env_spec.image_size
        picture = (BATCH, env_spec.views, pixels, pixels, 3)
        self.model = models.build(config, env_spec).eval()
        self.obs = {
            "image": torch.zeros(picture, dtype=torch.uint8),
            "tokens": torch.ones((BATCH, self.model.config.tokens), dtype=torch.int32),
        }

    @torch.inference_mode()
    def infer(self, step: int) -> float:
        """Infers once. Returns the seconds."""
        start = time.monotonic()
        keys = [(1, lane, 0, step) for lane in range(BATCH)]
        self.model.act(self.obs, self.model.draw(keys, [True] * BATCH))
        return time.monotonic() - start


def reader(spec: Spec, plane: WeightPlane, updates: IndexQueue, results, serve: bool) -> None:
    """Does a rollout worker's part: a side thread fetches, this one swaps.

    With `serve`, inference follows inference meanwhile. Sends a `Took` per version, and at the end
    the seconds of batches without and with a fetch beside them.
    """
    torch.set_num_threads(1)
    policy = Policy()
    weights = {name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in spec.items()}
    fetcher = WeightFetcher(plane, weights, 60.0)
    size = 0 if serve else plane.bytes  # of the memcpy, which would disturb a worker that serves
    source = np.ones(size, np.uint8)
    copy = np.ones(size, np.uint8)
    alone = []
    beside = []
    is_pending = True  # a version is being fetched
    for step in range(1_000_000):
        records = updates.get(0.0 if serve or is_pending else None)
        if any(record.kind != WAKE for record in records):
            break
        if records:
            fetcher.look()
            is_pending = True
        if serve:
            (beside if is_pending else alone).append(policy.infer(step))
        start = time.monotonic()
        if fetcher.swap(0.0 if serve else 60.0):
            held = time.monotonic()
            np.copyto(copy, source)
            memcpy = time.monotonic() - held
            began, ended = fetcher.took
            results.send(Took(ended - began, held - start, held, memcpy))
            is_pending = False
    results.send((alone, beside))


def weights_row(name: str, spec: Spec, versions: int) -> dict:
    """Measures one set of weights with a worker that is idle, then with one that serves."""
    plane = WeightPlane(spec)
    source = {n: torch.ones(shape, dtype=dtype) for n, (shape, dtype) in spec.items()}
    plane.publish(source, 0)
    idle = publish_to(plane, source, range(1, versions + 1), spec, serve=False)
    serving = publish_to(plane, source, range(versions + 1, 2 * versions + 1), spec, serve=True)
    median = statistics.median
    return {
        "name": name,
        "bytes": plane.bytes,
        "memcpy_s": median(took.memcpy for took in idle.took),
        "sync_s": median(took.fetch for took in idle.took),
        "sync_serving_s": median(took.fetch for took in serving.took),
        "publish_s": median(idle.publish),
        "latency_s": median(idle.latency),
        "serving_stall_s": max(took.swap for took in serving.took),
        "batch_s": median(serving.alone),
        "batch_during_sync_s": median(serving.beside),
    }


class Seen(NamedTuple):
    """What was measured with one reader, in seconds."""

    publish: list[float]  # per version
    latency: list[float]  # per version
    took: list[Took]  # per version
    alone: list[float]  # per batch without a fetch beside it
    beside: list[float]  # per batch with one


def publish_to(plane: WeightPlane, source: dict, versions: range, spec: Spec, serve: bool) -> Seen:
    """Does an actor's part: starts a reader and publishes these versions."""
    updates = IndexQueue()
    receive, send = mp.Pipe(duplex=False)
    process = context("benchmarks.weights").Process(
        target=reader, args=(spec, plane, updates, send, serve), daemon=True
    )
    process.start()
    send.close()
    publish = []
    latency = []
    took = []
    try:
        receive.recv()  # it has the version before these
        for version in versions:
            time.sleep(PAUSE_S)
            start = time.monotonic()
            plane.publish(source, version)
            publish.append(time.monotonic() - start)
            updates.put([Record(0, 0, WAKE, 0, 0)])
            took.append(receive.recv())
            latency.append(took[-1].held - start)
        updates.put([Record(0, 0, ACT, 0, 0)])  # anything but WAKE: the end
        alone, beside = receive.recv()
    finally:
        process.kill()
        process.join()
    return Seen(publish, latency, took, alone, beside)


def measure(repeats: int) -> list[dict]:
    """Measures the embedded default's weights, and 256 MB."""
    settings, env_spec = embedded()
    trainable = models.load("pi05").build(settings, env_spec, weights="none").trainable()
    small = {name: (tuple(p.shape), p.dtype) for name, p in trainable.items()}
    big = {f"layer_{i}": ((4096, 4096), torch.float32) for i in range(4)}
    return [weights_row("embedded", small, 6 * repeats), weights_row("256MB", big, 3 * repeats)]
