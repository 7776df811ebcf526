"""Finished slots → micro-batches → minibatches, for one actor rank; every trajectory is consumed
exactly once per epoch.

Membership is fixed before anything runs: position p of batch b (its p-th slot, see
`scheduler.Admission`) belongs to minibatch p // minibatch and to rank p // whole % ranks, where
whole is the envs of a lane or a group. Only the order of micro-batches inside a minibatch follows
arrival, and the gradients of a minibatch are summed, so order changes nothing but time (RL-VLA³,
Streamer). With groups (GRPO) all of that is of whole groups.

Left out: moving trajectories between ranks.
"""

from collections import deque
from dataclasses import dataclass

import numpy as np

from config import Config
from scheduler import Admission


@dataclass(frozen=True)
class MicroBatch:
    """One forward and backward pass."""

    slots: tuple[int, ...]
    epoch: int
    minibatch: int
    last: bool  # the optimizer steps after this one


@dataclass(eq=False)
class Streamer:
    """Feed it finished slots with `add`; `next` gives the next micro-batch, or None while none is
    complete."""

    admission: Admission  # says which slots a batch has, and whose they are
    minibatch: int  # trajectories, over all ranks
    micro_batch: int  # trajectories
    epochs: int
    stream: bool
    rank: int
    ranks: int
    seed: int
    version: int  # the batch to begin with, then the running one

    def __post_init__(self):
        self.local = self.admission.batch // self.ranks  # trajectories that this rank trains
        self.finished: set[int] = set()  # slots waiting, of this batch and of later ones
        self._begin_batch()

    @classmethod
    def of(cls, config: Config, rank: int, version: int) -> "Streamer":
        """Makes the streamer of an actor rank. version: the batch to begin with."""
        actor = config.actor
        return cls(
            Admission.of(config),
            actor.minibatch,
            actor.micro_batch,
            actor.update_epochs,
            actor.stream,
            rank,
            actor.actor_workers,
            config.train.seed,
            version,
        )

    def add(self, slot: int) -> None:
        """Takes in a complete trajectory. Raises RuntimeError when it was already given, or is
        another rank's."""
        if slot in self.finished or slot in self.consumed:
            raise RuntimeError(f"slot {slot} was finished twice in batch {self.version}")
        owner = self.admission.owner(slot, self.ranks)
        if owner != self.rank:
            raise RuntimeError(f"slot {slot} belongs to actor rank {owner}, not {self.rank}")
        self.finished.add(slot)
        if slot in self.mine:
            self._arrive(slot)

    def _arrive(self, slot: int) -> None:
        """A group is ready when it is whole: its advantages need every member's outcome."""
        group = self.admission.group
        first = slot - slot % group
        members = self.partial.setdefault(first, [])
        members.append(slot)
        if len(members) == group:
            minibatch = slot % self.admission.batch // self.minibatch
            self.ready[minibatch].extend(self.partial.pop(first))

    @property
    def waiting(self) -> int:
        """Finished trajectories not yet trained on."""
        return len(self.finished)

    def next(self) -> MicroBatch | None:
        """Returns the next micro-batch of the current minibatch. The caller trains it before it
        asks again."""
        if self.done:
            return None
        # Without streaming nothing is trained before the whole batch is there.
        complete = len(self.consumed) + sum(map(len, self.ready)) == self.local
        if not self.stream and not complete and self.epoch == 0:
            return None
        queue = self.ready[self.step]
        if len(queue) < self.micro_batch:
            return None

        # Slots are sorted, so that a micro-batch's sums do not depend on arrival.
        slots = tuple(sorted(queue.popleft() for _ in range(self.micro_batch)))
        if self.epoch == 0:
            self.consumed.update(slots)
            self.finished.difference_update(slots)
        self.dispatched += self.micro_batch
        last = self.dispatched == self.minibatch // self.ranks
        micro_batch = MicroBatch(slots, self.epoch, self.step, last)
        if last:
            self.dispatched = 0
            self.step += 1
            if self.step == len(self.ready):
                self._begin_epoch()
        return micro_batch

    def stop(self) -> list[int]:
        """Leaves out all epochs after the first one, which every trajectory gets. Returns the slots
        that are spared, once for each epoch."""
        if self.stopping:
            return []
        self.stopping = True
        left = sorted(self.mine) * (self.epochs - 1 - self.epoch)
        if self.epoch:  # the running epoch ends too
            left += [slot for part in self.ready for slot in part]
            self.epoch = self.epochs
        return left

    @property
    def done(self) -> bool:
        """Whether every epoch of the batch has been given out."""
        return self.epoch == self.epochs

    def _begin_batch(self) -> None:
        self.epoch = 0
        self.step = 0  # minibatches of the epoch that are given out
        self.dispatched = 0  # trajectories of the minibatch that are given out
        self.stopping = False
        self.consumed: set[int] = set()
        admission = self.admission
        slots = admission.slots_of(self.version)
        self.mine = {slot for slot in slots if admission.owner(slot, self.ranks) == self.rank}
        self.ready: list[deque[int]] = [deque() for _ in range(admission.batch // self.minibatch)]
        # Members of a group that came before the others, by the group's first slot.
        self.partial: dict[int, list[int]] = {}
        for slot in sorted(self.finished & self.mine):
            self._arrive(slot)

    def _begin_epoch(self) -> None:
        """Shuffles the same trajectories again, once every minibatch of the epoch is out. The
        shuffle is named by seed, version, epoch and rank."""
        self.step = 0
        self.epoch = self.epochs if self.stopping else self.epoch + 1
        if not self.done:
            random = np.random.default_rng([self.seed, self.version, self.epoch, self.rank])
            order = random.permutation(sorted(self.consumed))
            self.ready = [deque(map(int, part)) for part in np.split(order, len(self.ready))]

    def finish_batch(self) -> int:
        """Moves on to the next batch, and returns its version. Raises RuntimeError unless every
        trajectory of the batch was consumed."""
        if self.consumed != self.mine:
            raise RuntimeError(
                f"batch {self.version} consumed {len(self.consumed)} of {self.local} trajectories"
            )
        self.version += 1
        self._begin_batch()
        return self.version
