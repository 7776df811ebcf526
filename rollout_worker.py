"""Gathers a batch of requests, samples actions, writes action, log-prob, value and version into the
slots; fetches weights.

Requests arrive as 8-byte records; observations and results never move: the worker reads rows of the
shared slots and writes rows of the shared slots. New weights are copied by a side thread into spare
memory while the old ones go on serving, and take effect between two batches by re-pointing the
parameters (RL-VLA³ Rollout Async; D-VLA weight plane).

Left out: sharing lanes between rollout workers, tensor parallelism.
"""

import contextlib
import threading
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

import metrics
import models
from channel import (
    ACT,
    DONE,
    EVAL,
    FINAL,
    LAST,
    RESTART,
    VALUE,
    VERSION,
    Channels,
    Record,
    WeightPlane,
    synchronize,
)
from config import Config
from models import compiled, contract
from scheduler import Admission, DynamicBatcher


class WeightFetcher:
    """Keeps the newest version in spare memory; `swap` makes it the model's. Two blocks of memory
    alternate.
    """

    def __init__(self, plane: WeightPlane, parameters: dict[str, Tensor], timeout: float):
        self.plane = plane
        self.parameters = parameters
        self.timeout = timeout
        device = next(iter(parameters.values())).device
        self.blocks = [
            torch.zeros(plane.bytes, dtype=torch.uint8, device=device) for _ in range(2)
        ]  # touched, unlike empty
        self.views = [plane.tensors(block) for block in self.blocks]
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        if plane.buffers.device == "cpu" and device.type == "cpu":
            self.blocks = [block.numpy() for block in self.blocks]
        self.spare = 0  # which block is filled next; the other one serves
        self.version = -1  # of the weights in use
        self.staged = -1  # of the weights in spare memory, valid while `full` is set
        self.copied = self.took = (
            0.0,
            0.0,
        )  # when the staged weights, and those in use, were fetched: start and end
        self.seconds = 0.0
        self.fetches = 0
        self.error = None
        self.wake = threading.Event()
        self.full = threading.Event()
        self.empty = threading.Event()
        self.empty.set()
        threading.Thread(target=self._run, daemon=True, name="weight fetcher").start()

    def _run(self) -> None:
        try:
            while True:
                self.wake.wait(0.5)
                self.wake.clear()
                self.empty.wait()
                if self.plane.empty or self.plane.version <= max(self.version, self.staged):
                    continue
                start = time.monotonic()
                with torch.cuda.stream(self.stream) if self.stream else contextlib.nullcontext():
                    self.staged = self.plane.fetch(self.blocks[self.spare], self.timeout)
                self.copied = start, time.monotonic()
                self.seconds = self.seconds + self.copied[1] - start
                self.fetches = self.fetches + 1
                self.empty.clear()
                self.full.set()
        except Exception as error:  # re-raised by `swap` in the worker's own thread
            self.error = error
            self.full.set()

    def swap(self, wait_s: float = 0.0) -> bool:
        """Between two batches: use the staged weights if there are any (waiting up to `wait_s` for
        them).
        """
        if not (self.full.wait(wait_s) if wait_s else self.full.is_set()):
            return False
        if self.error is not None:
            raise self.error
        for name, parameter in self.parameters.items():
            parameter.data = self.views[self.spare][name]
        self.spare = 1 - self.spare
        self.version = self.staged
        self.took = self.copied
        self.full.clear()
        self.empty.set()
        return True


def expand(records: list[Record], width: int, eval_width: int) -> list[Record]:
    """A record for every env of the lanes that ask: their slots lie side by side."""
    if width == eval_width == 1:
        return records
    each = [(record, eval_width if record.kind == EVAL else width) for record in records]
    return [record._replace(slot=record.slot + i) for record, count in each for i in range(count)]


@torch.inference_mode()
def serve(
    model,
    records: list[Record],
    channels: Channels,
    seed: int,
    version: int,
    device: str,
    width: int = 1,
    eval_width: int = 1,
    size: Callable[[int], int] = int,
) -> None:
    """One inference: reads observations of `records`, writes what each kind of request asked for,
    answers the env workers.

    width, eval_width: envs of a lane and of an evaluation lane; size: how many samples the model is
    given for so many.
    """
    pool = channels.pool
    samples = expand(records, width, eval_width)
    slots = np.array([r.slot for r in samples])
    rows = np.array([0 if r.kind == EVAL else r.t for r in samples])
    lanes, trajectories = (pool.arrays[name][slots].tolist() for name in ("lane", "trajectory"))
    keys = [
        (seed, lane, trajectory, r.t)
        for r, lane, trajectory in zip(samples, lanes, trajectories, strict=True)
    ]
    noise = model.draw(keys, [r.kind != EVAL for r in samples])
    obs = {name: pool.gather(name, slots, rows) for name in model.observation_fields()}
    n = len(samples)
    if size(n) > n:
        obs = compiled.pad(obs, size(n))
        noise = compiled.pad(noise, size(n))

    def to(tensors):
        return {name: x.to(device, non_blocking=True) for name, x in tensors.items()}

    out = model.act(to(obs), to(noise))
    contract.check_acted(model, out, size(n))

    def of(*kinds):
        return [i for i, r in enumerate(samples) if r.kind in kinds]

    acting = of(ACT)
    finals = of(FINAL)
    pool.arrays["version"][slots[acting], rows[acting]] = version
    for names, chosen in (
        (("value",), of(ACT, VALUE, LAST)),
        (("actions",), of(ACT, EVAL)),
        (("logprob", *model.slot_fields()), acting),
    ):
        every = len(chosen) == size(n)  # then nothing need be copied out of the results
        where = (slots, rows) if every else (slots[chosen], rows[chosen])
        for name in names if chosen else ():
            pool.put(name, *where, out[name] if every else out[name][chosen])
    if finals:  # of the observation that follows step t = row − 1
        pool.put("final", slots[finals], rows[finals] - 1, out["value"][finals])
    synchronize(pool.device)  # what is written into GPU memory is there before anybody is told

    answers: dict[int, list[Record]] = {}
    for record in records:
        answers.setdefault(record.sender, []).append(record)
    for worker, answer in answers.items():
        channels.replies[worker].put(answer)


def run(
    rank: int, config: Config, spec, device: str, channels: Channels, meter: metrics.Meter
) -> None:
    """The worker. spec: the simulator's EnvSpec."""
    queue = channels.requests[rank]
    plane = channels.plane
    pool = channels.pool
    queue.close_writer()
    if device != "cpu":
        torch.cuda.set_device(device)
        pool.pin()
    model = models.build(config, spec, device).eval()
    fetcher = WeightFetcher(plane, model.trainable(), config.train.timeout_s)
    compiles = model.COMPILED and (
        device != "cpu" if config.rollout.compile is None else config.rollout.compile
    )
    admission = Admission.of(config)
    workers = config.rollout.rollout_workers
    width = config.env.width
    served = len(range(rank, config.env.envs // width, workers))  # lanes that ask this worker
    lane_of, trajectory_of, asked = (
        pool.arrays[name] for name in ("lane", "trajectory", "asked")
    )  # as read one by one
    batch_max = {"all": served, "auto": max(1, served // 2)}.get(
        config.rollout.batch_max, config.rollout.batch_max
    )
    auto_max = config.rollout.batch_max == "auto"
    auto_wait = config.rollout.batch_wait_ms == "auto"
    batcher = DynamicBatcher(batch_max, 0.01 if auto_wait else config.rollout.batch_wait_ms / 1e3)
    if compiles:  # riders (evaluation, last values) come on top of the lanes served
        most = (
            (served if auto_max else min(batch_max, served)) + served
        ) * width + config.env.eval_envs
        compiled.compile_for(model, most, device, lambda: meter.set("time", time.monotonic()))
    meter.ready()

    def swap(wait_s: float = 0.0) -> bool:
        swapped = fetcher.swap(wait_s)
        if swapped:
            meter.record("fetch", *fetcher.took, {"version": fetcher.version, "bytes": plane.bytes})
        return swapped

    with meter.wait("weights"):
        while not swap(1.0):  # however long the actor takes to start: the launcher watches it
            meter.set("time", time.monotonic())
    begun = fetcher.version
    trajectories = np.full(
        served, begun * admission.per_lane
    )  # of each lane: the one it is in, or starts next
    going_on = (
        -1,
        0,
    )  # a version, and how many lanes may go on with it; -1 where that is to be counted anew

    def note(record: Record, over: bool) -> None:
        """The lane that asks is in the trajectory of its slot, or that one is over and it is in, or
        waits for, the next.
        """
        nonlocal going_on
        lane = lane_of.item(record.slot) // width // workers
        trajectory = trajectory_of.item(record.slot) + over
        if trajectories.item(lane) != trajectory:
            trajectories[lane] = trajectory
            going_on = (-1, 0)

    def due() -> float | None:
        """Seconds until the queue must be served. Only lanes that may go on can ask: to wait for
        more would be in vain, with T_max = ∞ for ever.
        """
        nonlocal going_on
        if going_on[0] != (version := plane.version):
            going_on = version, int(admission.admits(trajectories, version).sum())
        batcher.batch_max = max(1, min(batch_max, going_on[1]))
        return batcher.remaining()

    while True:
        remaining = due()
        if remaining is None or remaining > 0:
            timeout = 1.0 if remaining is None else min(remaining, 1.0)
            with meter.wait("request"):
                records = queue.get(timeout)
        else:
            records = queue.get(
                0
            )  # what came during the last inference joins its queue before the batch is taken
        for record in records:
            if record.kind == VERSION:
                fetcher.wake.set()
                continue
            if record.kind == RESTART:
                # nobody waits for what the dead worker had asked; what was answered lies before
                # this
                # echo
                batcher.drop(lambda request, sender=record.sender: request.sender == sender)
                channels.replies[record.sender].put([record])
                continue
            if record.kind in (ACT, DONE):
                note(record, record.kind == DONE)
            if record.kind == DONE:
                continue
            batcher.add(record, record.kind not in (EVAL, LAST), float(asked[record.slot]))
        if (
            plane.version >= config.train.iterations
        ):  # training is over: the last evaluation has nothing to be in step with
            batcher.wait_s = min(batcher.wait_s, 0.01)
        remaining = due()
        if remaining is None or remaining > 0:
            continue

        batch, waited = batcher.take()
        for record in batch:
            if record.kind == VALUE:  # the lane's next one may have to wait for its version
                note(record, True)
        swap_start = time.monotonic()
        swap()
        meter.count("weight_stall_s", time.monotonic() - swap_start)
        needed = 0  # the newest batch that is played
        if plane.version >= config.train.iterations:  # the last evaluation is of the last weights
            needed = plane.version + admission.max_staleness
        elif fetcher.version < plane.version:
            needed = max(
                (admission.batch_of(trajectory_of.item(r.slot)) for r in batch if r.kind == ACT),
                default=0,
            )
        while (
            fetcher.version < needed - admission.max_staleness
        ):  # admitted on a version that is still being copied
            fetcher.wake.set()
            start = time.monotonic()
            with meter.wait("weights"):
                if not swap(config.train.timeout_s):
                    raise TimeoutError(
                        f"version {needed} never came from the actor within "
                        f"{config.train.timeout_s:.0f} s"
                    )
            meter.count("weight_stall_s", time.monotonic() - start)
        start = time.monotonic()
        size = sum(
            config.env.eval_width if record.kind == EVAL else width for record in batch
        )  # envs
        with meter.work("infer", batch=size, version=fetcher.version):
            widths = width, config.env.eval_width
            sizes = compiled.bucket if compiles else int
            acting = max(
                begun, fetcher.version - config.actor.extra_staleness
            )  # what the actor has published under that version
            serve(model, batch, channels, config.train.seed, acting, device, *widths, sizes)
        seconds = time.monotonic() - start
        if auto_max and (tuned := int(meter.counters.get(meter.row, "tuned_batch_max"))):
            batch_max = min(tuned, served)
        # half an inference until the launcher knows better: what comes during one joins the next
        # anyway
        if auto_wait:
            tuned = meter.counters.get(meter.row, "tuned_wait_s")
            batcher.wait_s = tuned or 0.8 * batcher.wait_s + 0.2 * 0.5 * seconds
        meter.count("requests", size)
        meter.count("batches", 1)
        meter.count("batch_wait_s", waited)
        meter.count("infer_s", seconds)
        meter.count("batch_square", size**2)
        meter.count("batch_infer_s", size * seconds)
        meter.count(metrics.HISTOGRAM[min((size - 1).bit_length(), len(metrics.HISTOGRAM) - 1)], 1)
        meter.set("weight_sync_s", fetcher.seconds)
        meter.set("fetches", fetcher.fetches)
        if device != "cpu":
            meter.set("gpu_memory_gb", torch.cuda.max_memory_allocated() / 1e9)
