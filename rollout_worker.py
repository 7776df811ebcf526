"""Gathers a batch of requests, samples actions, and writes what training needs into the slots.

Observations and results never move: the worker reads rows of the shared slots and writes rows of
the shared slots. New weights are copied by a side thread (weights.py) while the old ones go on
serving, and are taken into use between two batches.

A worker that replaces one that died takes the newest weights, and env workers ask it anew what the
dead one has not answered: rows that it left half written are written again, whole. What was
answered and acted on is never served again.

Read `run` first. Paper: RL-VLA³, Rollout Async (eq. 1); D-VLA, weight plane.
Left out: sharing lanes between rollout workers, tensor parallelism.
"""

import math
import time
from collections.abc import Callable

import numpy as np
import torch

import models
import transfers
from channel import ACT, EVAL, FINAL, VALUE, WAKE, Channels, Record, SlotPool
from config import Config
from metrics import HISTOGRAM, Meter
from models import compiled, contract, layers
from scheduler import (
    FIRST_WAIT_S,
    Admission,
    DynamicBatcher,
    env_numbers,
    first_batch_max,
    most_samples,
)
from weights import WeightFetcher


def run(
    rank: int,
    config: Config,
    spec,
    device: str,
    channels: Channels,
    begun: int,
    meter: Meter,
) -> None:
    """Works until the launcher ends it. spec: the simulator's EnvSpec; begun: the version where
    training starts or resumes, also for a worker that replaces another."""
    requests = channels.requests[rank]
    requests.close_writer()
    channels.plane.use_on(device)
    models.use_tf32(device, config.train.precision)
    model = models.acting(models.build(config, spec, device)).eval()
    transfers.lock(channels.pool, (*model.observation_fields(), *model.slot_fields()), device)
    lanes = LanesServed(rank, config, channels)
    batcher = DynamicBatcher(*first_limits(config, lanes.count))
    padded = compile_where_asked(model, config, lanes, device, meter)
    fetcher = WeightFetcher(channels.plane, model.trainable(), config.train.timeout_s)
    meter.ready()
    take_first_weights(fetcher, meter)
    take_over(rank, channels, meter.restarts())

    while True:
        # Wait for requests, but no longer than the oldest one may wait (eq. 1).
        for record in receive(requests, batcher.remaining(), meter):
            if record.kind == WAKE:
                fetcher.look()
                batcher.keep(lanes.is_of_the_living)
            elif lanes.is_to_be_served(record):
                batcher.add(record, lanes.waits_for(record), lanes.asked.item(record.slot))

        # Go on waiting until a batch is due. Requests of workers that died meanwhile are dropped.
        # Where B_max wait already, it does not matter how many may still ask.
        full = batcher.counted >= batcher.batch_max
        batcher.expect_at_most(math.inf if full else lanes.that_may_ask())
        remaining = batcher.remaining()
        if remaining is None or remaining > 0:
            continue
        batch, waited_s = batcher.take()
        batch = [record for record in batch if lanes.is_of_the_living(record)]
        if not batch:
            continue

        # Infer, with the newest weights that are here.
        take_new_weights(fetcher, lanes.version_needed(batch, fetcher.version), config, meter)
        start = time.monotonic()
        samples = lanes.samples_of(batch)
        with meter.work("infer", batch=len(samples), version=fetcher.version):
            # --extra-staleness: the actor publishes older weights under a version's number.
            acting = max(begun, fetcher.version - config.actor.extra_staleness)
            policy = described(config, acting, begun)
            how = {"padded": padded, "policy": policy, "world": lanes.world}
            serve(model, samples, channels.pool, config.train.seed, acting, device, **how)
            answer(batch, channels)
        infer_s = time.monotonic() - start
        count_inference(meter, len(samples), infer_s, waited_s, device)
        take_tuned_limits(batcher, config, lanes.count, infer_s, meter)


# ---------------------------------------------------------------- lanes and limits


class LanesServed:
    """What this worker knows of the lanes that ask it: env workers write it into shared memory."""

    def __init__(self, rank: int, config: Config, channels: Channels):
        workers = config.rollout.rollout_workers
        self.rank = rank
        self.admission = Admission.of(config)
        self.plane = channels.plane
        self.iterations = config.train.iterations
        self.width = config.env.width
        self.eval_width = config.env.eval_width
        self.lanes = channels.lanes
        self.trajectory = channels.lanes.trajectory[rank::workers]  # lane l asks worker l % workers
        self.generation = channels.lanes.generation
        self.count = len(self.trajectory)
        self.asked = channels.pool.arrays["asked"]
        self.env_in_slot = channels.pool.arrays["env"]
        self.world = env_numbers(config).item  # an env's number → that among those of all nodes
        self.trajectory_in_slot = channels.pool.arrays["trajectory"]
        self.newest: dict[int, tuple[Record, float]] = {}  # slot → its last request, and of when

    def that_may_ask(self) -> int:
        """Returns how many lanes play a trajectory that the published version admits. The others
        wait for weights and ask for nothing."""
        return int(np.count_nonzero(self.trajectory < self.admission.admitted(self.plane.version)))

    def waits_for(self, record: Record) -> bool:
        """Whether a lane does nothing until this is answered: it has asked for actions, or for a
        last value and may not begin the next trajectory yet."""
        if record.kind == VALUE:
            lane = self.env_in_slot.item(record.slot) // self.width
            return self.lanes.trajectory.item(lane) == self.trajectory_in_slot.item(record.slot)
        return record.kind != EVAL

    def is_of_the_living(self, record: Record) -> bool:
        """Whether neither the env worker that asked this nor this worker's predecessor, whom it may
        have asked, has been replaced since."""
        own = self.lanes.rollout_generation[self.rank]
        return record.generation == self.generation[record.sender] + own

    def is_to_be_served(self, record: Record) -> bool:
        """Whether a living env worker asks this for the first time. A row that newer weights served
        again would hold other actions than those that were executed."""
        # A slot's trajectory tells requests of one row apart. Every round of evaluation plays the
        # same episodes, so there the time of asking does.
        told_by = self.asked if record.kind == EVAL else self.trajectory_in_slot
        request = record, told_by.item(record.slot)
        if not self.is_of_the_living(record) or self.newest.get(record.slot) == request:
            return False
        self.newest[record.slot] = request
        return True

    def version_needed(self, batch: list[Record], version: int) -> int:
        """Returns the oldest version that may serve a batch. version: of the weights in use.

        A trajectory that was admitted on version v must not be played with older weights. Once all
        is trained, only the last evaluation is left, which is of the last weights."""
        newest = self.plane.version
        if newest >= self.iterations:
            return newest
        if version == newest:
            return version
        trajectories = [self.trajectory_in_slot.item(r.slot) for r in batch if r.kind == ACT]
        batches = [self.admission.batch_of(trajectory) for trajectory in trajectories]
        return max(batches, default=0) - self.admission.max_staleness

    def samples_of(self, batch: list[Record]) -> list[Record]:
        """Returns a record for every env of the lanes that ask: their slots lie side by side."""
        if self.width == self.eval_width == 1:
            return batch
        samples = []
        for record in batch:
            width = self.eval_width if record.kind == EVAL else self.width
            samples += [record._replace(slot=record.slot + i) for i in range(width)]
        return samples


def first_limits(config: Config, lanes: int) -> tuple[int, float]:
    """Returns B_max and T_max in seconds to begin with."""
    wait_ms = config.rollout.batch_wait_ms
    wait_s = FIRST_WAIT_S if wait_ms == "auto" else wait_ms / 1e3
    return first_batch_max(config.rollout.batch_max, lanes), wait_s


def take_tuned_limits(
    batcher: DynamicBatcher, config: Config, lanes: int, infer_s: float, meter: Meter
) -> None:
    """Follows what the launcher has tuned (tuning.py), where B_max and T_max are auto."""
    if config.rollout.batch_max == "auto":
        tuned = int(meter.counters.get(meter.row, "tuned_batch_max"))
        if tuned:
            batcher.batch_max = min(tuned, lanes)
    if config.rollout.batch_wait_ms == "auto":
        tuned_s = meter.counters.get(meter.row, "tuned_wait_s")
        if tuned_s:
            batcher.wait_s = tuned_s
        else:
            batcher.follow(infer_s)  # until the launcher knows better


# ---------------------------------------------------------------- requests and weights


def receive(requests, remaining: float | None, meter: Meter) -> list[Record]:
    """Returns what has come; waits up to `remaining` seconds (None: a second) for something."""
    if remaining is not None and remaining <= 0:
        return requests.get(0)  # what came during the last inference joins this batch
    with meter.wait("request"):
        return requests.get(1.0 if remaining is None else min(remaining, 1.0))


def answer(batch: list[Record], channels: Channels) -> None:
    """Sends every request back to the env worker that asked."""
    answers: dict[int, list[Record]] = {}
    for record in batch:
        answers.setdefault(record.sender, []).append(record)
    for worker, records in answers.items():
        channels.replies[worker].put(records)


def take_over(rank: int, channels: Channels, generation: int) -> None:
    """Says that a worker serves from now on, and lets env workers see it. generation: how often it
    was replaced."""
    channels.lanes.rollout_generation[rank] = generation
    for queue in channels.replies if generation else ():
        queue.put([Record(0, 0, WAKE, 0, 0)])


def take_first_weights(fetcher: WeightFetcher, meter: Meter) -> None:
    """Waits however long the actor takes to start: the launcher watches it."""
    with meter.wait("weights"):
        while not swap(fetcher, 1.0, meter):
            meter.alive()


def take_new_weights(fetcher: WeightFetcher, needed: int, config: Config, meter: Meter) -> None:
    """Takes the newest weights that are here. Waits for them only if those in use are older than
    `needed`, because the version that admitted a trajectory is still being copied."""
    start = time.monotonic()
    swap(fetcher, 0.0, meter)
    while fetcher.version < needed:
        fetcher.look()
        # In short waits: a run that was suspended during one of them has the others left.
        limit_s = config.train.timeout_s
        with meter.wait("weights"):
            if not any(swap(fetcher, limit_s / 20, meter) for _ in range(20)):
                raise TimeoutError(
                    f"version {needed} never came from the actor within {limit_s:.0f} s"
                )
    meter.count("weight_stall_s", time.monotonic() - start)


def swap(fetcher: WeightFetcher, wait_s: float, meter: Meter) -> bool:
    """`WeightFetcher.swap`, with the fetch in the trace."""
    swapped = fetcher.swap(wait_s)
    if swapped:
        numbers = {"version": fetcher.version, "bytes": fetcher.plane.bytes}
        start, end = fetcher.took
        meter.record("fetch", start, end, numbers)
        meter.count("weight_sync_s", end - start)
        meter.count("fetches", 1)
    return swapped


# ---------------------------------------------------------------- inference


def described(config: Config, version: int, begun: int) -> tuple[str, str]:
    """Says whose the policy is, and what helps if it gives NaN. begun: the checkpoint's version."""
    if version > begun:
        lower = "training has diverged, so resume an older checkpoint with a lower --lr"
        return f"version {version} of the policy", lower
    return f"the policy of checkpoint {config.train.checkpoint}", "give another --checkpoint"


def compile_where_asked(
    model, config: Config, lanes: LanesServed, device: str, meter: Meter
) -> Callable[[int], int]:
    """Compiles inference (--compile). Returns what n samples are padded to; n without a GPU."""
    wanted = config.rollout.compile
    if not ((device != "cpu" if wanted is None else wanted) and layers.blocks(model)):
        return int  # the identity: n samples stay n
    most = most_samples(config, lanes.count)
    compiled.compile_for(model, most, device, meter.alive)
    if device == "cpu":
        return int
    model.act = compiled.Graphs(model.act, compiled.bucket(most))
    return compiled.bucket


@torch.inference_mode()
def serve(
    model,
    samples: list[Record],
    pool: SlotPool,
    seed: int,
    version: int,
    device: str,
    padded: Callable[[int], int] = int,
    policy: tuple[str, str] = ("the policy", "give another --checkpoint"),
    world: Callable[[int], int] = int,
) -> None:
    """Runs one inference: reads the observations of `samples` from the slots, and writes what each
    kind of request asked for.

    version: what is noted beside the actions. padded: the number of samples that the model is given
    in place of n. policy: of `described`. world: turns an env's number into that among all nodes'.
    Raises UserError where the policy gives NaN."""
    slots = np.array([r.slot for r in samples])
    rows = np.array([0 if r.kind == EVAL else r.t for r in samples])
    n = len(samples)

    # Noise is named by (seed, env, trajectory, step), so it does not depend on who shares a batch.
    envs = pool.arrays["env"][slots].tolist()
    trajectories = pool.arrays["trajectory"][slots].tolist()
    keys = [(seed, world(envs[i]), trajectories[i], samples[i].t) for i in range(n)]
    drawn = model.draw(keys, [r.kind != EVAL for r in samples])
    noise = {name: transfers.send(x, device) for name, x in drawn.items()}
    observed = transfers.read(pool, tuple(model.observation_fields()), slots, rows, device)
    if padded(n) > n:
        observed = compiled.pad(observed, padded(n))
        noise = compiled.pad(noise, padded(n))
    out = model.act(observed, noise)
    contract.check_acted(model, out, padded(n), pool.spec["actions"][0][1:])

    # All results come to the host at once, but for large ones, which go straight into their slots.
    kinds = [r.kind for r in samples]
    acting = [i for i, kind in enumerate(kinds) if kind == ACT]
    out = transfers.bring_back(pool, out, acting, slots, rows, device)
    contract.check_finite(out, *policy)

    # Every kind of request wants its own results in its row. The version stands beside log-probs.
    pool.arrays["version"][slots[acting], rows[acting]] = version
    for names, wanted in (
        (("actions",), (ACT, EVAL)),
        (("value",), (ACT, VALUE)),
        (("logprob", *model.slot_fields()), (ACT,)),
    ):
        chosen = [i for i, kind in enumerate(kinds) if kind in wanted]
        everybody = len(chosen) == padded(n)  # then nothing need be copied out of the results
        at = (slots, rows) if everybody else (slots[chosen], rows[chosen])
        for name in names if chosen else ():
            if name in out:
                transfers.put(pool, name, *at, out[name] if everybody else out[name][chosen])

    # FINAL names the row that holds the last observation for a moment: the one after its step's.
    finals = [i for i, kind in enumerate(kinds) if kind == FINAL]
    if finals:
        transfers.put(pool, "final", slots[finals], rows[finals] - 1, out["value"][finals])


def count_inference(
    meter: Meter, samples: int, infer_s: float, waited_s: float, device: str
) -> None:
    """Adds one inference to the counters; tuning.py fits a line through its sums."""
    meter.count("requests", samples)
    meter.count("batches", 1)
    meter.count("batch_wait_s", waited_s)
    meter.count("infer_s", infer_s)
    meter.count("batch_square", samples**2)
    meter.count("batch_infer_s", samples * infer_s)
    meter.count(HISTOGRAM[min((samples - 1).bit_length(), len(HISTOGRAM) - 1)], 1)
    if device != "cpu":
        meter.set("gpu_memory_gb", torch.cuda.max_memory_allocated() / 1e9)
