"""Trains on trajectories as they complete.

A micro-batch adds gradients, a minibatch ends with one optimizer step, and a batch ends with new
weights that are published.

Read `run` first. What is computed is in learner.py, who else trains is in ranks.py, and which
trajectories belong together is in streamer.py. The first rank of a node publishes the weights. The
first one of all writes checkpoints and reports.

Paper: RL-VLA³, Train Async and Streamer.
"""

import time
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import models
from channel import WAKE, Channels, Record, SlotPool, fence
from config import Config
from learner import Learner
from metrics import TOTALS, Ledger, Meter
from ranks import Meeting, Ranks
from saving import Saver
from scheduler import Admission
from streamer import MicroBatch, Streamer
from tally import Tally
from transfers import Carrier, gather


def run(
    rank: int,
    config: Config,
    spec,
    device: str,
    channels: Channels,
    run_folder: Path,
    meeting: Meeting,
    resume: dict | None,
    report: Connection | None,
    meter: Meter,
) -> None:
    """Trains until the last version. resume: state.json of the checkpoint to go on from, and its
    "lines" of metrics.jsonl, or None; report: from a node's first rank to its launcher."""
    use_device(device, rank, config, channels)
    ranks = Ranks.of(config, rank, device, meeting, meter)
    learner = Learner(config, spec, device, ranks, resume)
    streamer = Streamer.of(config, rank, learner.version)
    carrier = Carrier(channels.pool, learner.device_fields, config.env.segment, device)
    inbox = Inbox(rank, config, spec, channels, streamer, learner.host_fields, carrier)
    ledger = Ledger(resume["lines"] if resume else [], config.actor.update_epochs)
    publish(learner, channels, meter)
    meter.ready()
    begun = time.monotonic()
    with Saver(run_folder / "checkpoints", config.train, ledger, meter) as saver:
        while learner.version < config.train.iterations:
            stop_where_asked(learner, saver, channels, report)

            # Take in what has arrived; wait for more only when no micro-batch is complete.
            inbox.receive(wait_s=0.0)
            micro = inbox.next()
            if micro is None and not streamer.done:
                with meter.wait("trajectory"):  # if it is long, `processes.Crew` says who is late
                    inbox.receive(wait_s=1.0)
                continue

            # Train it, while the next one travels. A complete minibatch ends with a step.
            if micro is not None:
                numbers = {"slots": micro.slots, "epoch": micro.epoch, "minibatch": micro.minibatch}
                with meter.work("train", **numbers):
                    learner.train(inbox.read(micro), micro)
                if micro.last and not finish_minibatch(learner, streamer, channels, meter):
                    continue

            # Once the batch is complete, publish it, which also frees its slots, and report.
            if inbox.done:
                streamer.finish_batch()
                inbox.settle(learner.tally)
                if ranks.leads:
                    count_totals(learner.tally, channels)
                line = learner.finish_batch()
                publish(learner, channels, meter)
                line["samples_per_s"] = max(1, line["trained_once"]) / (time.monotonic() - begun)
                begun = time.monotonic()
                line["queue_depths"] = {"finished": streamer.waiting}
                if ranks.first:
                    ledger.enter(line, channels.counters)
                if ranks.saves and learner.should_save():
                    save(learner, saver)
                if ranks.leads:
                    report.send(line)

        leave(learner, saver, report, meter)


def use_device(device: str, rank: int, config: Config, channels: Channels) -> None:
    """Prepares this process for its device."""
    if rank == 0:  # who publishes
        channels.plane.use_on(device)
    models.use_tf32(device, config.train.precision)


def stop_where_asked(
    learner: Learner, saver: Saver, channels: Channels, report: Connection | None
) -> None:
    """Saves and waits for the end, once those who save have agreed to stop."""
    ranks = learner.ranks
    if (ranks.saves or ranks.sharded) and (saver.trouble or is_to_stop(channels, learner)):
        ranks.plan(0, stop=True)
    if ranks.stopped:
        save_and_wait_for_the_end(learner, saver, report)


def is_to_stop(channels: Channels, learner: Learner) -> bool:
    """Whether the launcher asks to save. A new ratio (1) can wait until the batch is trained; who
    interrupts the run (2) cannot."""
    stop = channels.counters.get(0, "stop")
    return stop > 1 or stop > 0 and not learner.updates


def finish_minibatch(
    learner: Learner, streamer: Streamer, channels: Channels, meter: Meter
) -> bool:
    """Sums the gradients over ranks and steps the optimizer. Returns False where the run is told to
    stop before that: other ranks may take long."""
    # With --shard, pass along until every rank has finished its rows of this minibatch.
    ranks = learner.ranks
    while (passes := ranks.plan(0, through=True)) is not None:
        with meter.work("train", passes=passes):
            learner.train_nothing(passes)
    if ranks.stopped:
        return False

    # Sum the gradients, once all ranks have made their last pass.
    if ranks.several and learner.gradients:
        with meter.wait("gradient"):
            for _ in learner.gradients.meet():
                meter.alive()
                # Who shares weights has agreed to go on.
                if ranks.first and not ranks.sharded and is_to_stop(channels, learner):
                    return False
            for _ in learner.gradients.sum():
                meter.alive()
        for bucket, (start, end, size) in enumerate(learner.gradients.spans):
            meter.record("reduce", start, end, {"bucket": bucket, "bytes": size})

    # Step; with --kl-stop, drop the batch's later epochs if the policy has moved too far.
    with meter.work("optimizer"):
        learner.step()
    if learner.moved_too_far():
        learner.spared += streamer.stop()
    return True


def save(learner: Learner, saver: Saver) -> None:
    saver.finish()  # the one before
    if not any(learner.ranks.agree(bool(saver.trouble))):
        saver.begin(learner)


def count_totals(tally: Tally, channels: Channels) -> None:
    """Counts what a node's workers have done since they started."""
    tally.add("collected", int(channels.pool["collected"].sum()))
    for name in TOTALS:
        tally.add(name, channels.counters.table[:, channels.counters.index[name]].sum())


def publish(learner: Learner, channels: Channels, meter: Meter) -> None:
    """A node's first rank copies the weights into the plane and wakes whoever may wait for a
    version. Ranks that share the weights gather them with it."""
    leads = learner.ranks.leads
    size = channels.plane.bytes if leads else 0
    if learner.device != "cpu":
        meter.set("gpu_memory_gb", torch.cuda.max_memory_allocated() / 1e9)
    with meter.work("publish", version=learner.version, bytes=size):
        weights = learner.weights_that_act() if learner.ranks.publishes else {}
        if not leads:
            for _ in weights.values():
                pass
            return
        channels.plane.publish(weights, learner.version)
        for queue in (*channels.replies, *channels.requests):
            queue.put([Record(0, 0, WAKE, 0, 0)])


def save_and_wait_for_the_end(learner: Learner, saver: Saver, report: Connection | None) -> None:
    """Saves what was published last, without the updates of the batch under way."""
    if learner.ranks.saves:
        news = saver.save_last(learner) | {"saved": str(saver.path)}
        if learner.ranks.first:
            report.send(news | {"dropped": learner.updates} if learner.updates else news)
    wait_to_be_ended(saver.meter)


def leave(learner: Learner, saver: Saver, report: Connection | None, meter: Meter) -> None:
    """Ends the last save, and then tells the launcher, after all ranks have come here."""
    ranks = learner.ranks
    news = saver.save_last(learner) if ranks.saves else {}
    for _ in ranks.meet():
        meter.alive()
    ranks.leave()
    if ranks.leads:
        report.send({"done": learner.version} | news)


def wait_to_be_ended(meter: Meter) -> None:
    """The launcher ends this worker. Leaving first would fail the other ranks before the launcher
    has read that all is saved, which may take the first rank long."""
    while True:
        meter.alive()
        time.sleep(1.0)


class Inbox:
    """Brings finished trajectories of this rank to the streamer.

    An env worker marks its lane's first slot as done, and then wakes the actor. The mark is what
    counts: a record that is lost with a worker is made up for by the next look, and one that comes
    twice changes nothing."""

    def __init__(
        self,
        rank: int,
        config: Config,
        spec,
        channels: Channels,
        streamer: Streamer,
        host_fields: tuple[str, ...],
        carrier: Carrier,
    ):
        """host_fields: that `Learner.train` needs on the host; carrier: brings the others."""
        self.pool = channels.pool
        self.arrays = channels.pool.arrays
        self.streamer = streamer
        self.host_fields = host_fields
        self.carrier = carrier
        self.coming: MicroBatch | None = None  # asked for, and not read yet
        # What comes after a step is decided by how far that step has moved the policy.
        self.waits_for_steps = config.algorithm.kl_stop > 0
        self.compares = spec.compares
        self.queue = channels.finished[rank]
        self.queue.close_writer()
        admission = Admission.of(config)
        self.group = admission.group
        self.width = admission.width
        first_slots = np.arange(0, admission.slots, admission.width)
        owner = admission.owner(first_slots, config.actor.actor_workers)
        self.slots = first_slots[owner == rank]  # the first ones of this rank's lanes
        # Both begin at 0, as the slots did: env workers may have finished trajectories already
        # when this rank comes to make its inbox.
        self.marks = np.zeros_like(self.slots)  # as of the last look
        # Chunk steps of every slot that are accounted for, of all that were ever stepped in it.
        self.settled = np.zeros_like(self.arrays["collected"])
        self.accounts = {"restart": 0, "after_end": 0}

    def receive(self, wait_s: float) -> None:
        """Takes in what is finished; waits up to `wait_s` seconds to be woken."""
        woken = self.queue.get(wait_s)
        if not woken and wait_s == 0.0:  # who has waited in vain looks anyway: a wake may be lost
            return
        done = self.arrays["done"][self.slots]
        fence()
        lanes = self.slots[done > self.marks][:, None] + np.arange(self.width)
        self.account(lanes)
        for slot in lanes.flatten().tolist():
            self.streamer.add(slot)
        self.marks = done

    def account(self, lanes: np.ndarray) -> None:
        """Says where the chunk steps that were stepped in the slots of lanes [n, width] went: into
        a trajectory, past the end of an episode whose lane played on, or to a worker that has died
        since."""
        stepped = self.arrays["collected"][lanes]
        length = self.arrays["length"][lanes]
        # A lane plays until its last episode has ended.
        together = int(length.max(1).sum()) * self.width
        self.accounts["restart"] += int((stepped - self.settled[lanes]).sum()) - together
        self.accounts["after_end"] += together - int(length.sum())
        self.settled[lanes] = stepped

    def settle(self, tally: Tally) -> None:
        """Counts the chunk steps that were lost before they could be trained, since last time."""
        for reason, steps in self.accounts.items():
            tally.add(reason, steps, "part")
        self.accounts = dict.fromkeys(self.accounts, 0)

    def next(self) -> MicroBatch | None:
        """Returns the next micro-batch, which may be on its way already; None while none is
        complete."""
        if self.coming is None:
            self.coming = self.streamer.next()
        return self.coming

    @property
    def done(self) -> bool:
        """Whether every micro-batch of the batch has been read."""
        return self.streamer.done and self.coming is None

    def read(self, micro: MicroBatch) -> dict[str, Tensor]:
        """Returns the trajectories of a micro-batch [n, rows, …], and how their groups ended. The
        one after it begins to travel, if it is complete."""
        slots = np.array(micro.slots)
        data = {name: gather(self.pool, name, slots) for name in self.host_fields}
        data |= self.carrier.take(micro.slots)
        if self.group > 1:
            data["outcomes"] = group_outcomes(self.pool, slots, self.group, self.compares)
            data["member"] = torch.from_numpy(slots % self.group)
        self.coming = None
        looks_ahead = self.carrier.ahead and not (micro.last and self.waits_for_steps)
        if looks_ahead and (following := self.next()):
            self.carrier.begin(following.slots)
        return data


def group_outcomes(pool: SlotPool, slots: np.ndarray, size: int, compares: str) -> Tensor:
    """Returns how every member of each trajectory's group ended [n, G]: success as 1 or 0, or where
    the simulator says so its summed reward. The members of a group have slots in a row."""
    first = slots - slots % size
    members = (first[:, None] + np.arange(size)).flatten()
    reward = pool.arrays["reward"][members]
    played = np.arange(reward.shape[1]) < pool.arrays["length"][members][:, None]
    if compares == "reward":
        outcomes = (reward * played).sum(1)
    else:
        outcomes = (pool.arrays["success"][members] & played).any(1)
    return torch.from_numpy(outcomes.reshape(len(slots), size)).to(torch.float32)
