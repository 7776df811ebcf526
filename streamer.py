"""Finished slots → micro-batches → minibatches, for one actor rank; every trajectory consumed
exactly once per epoch.

Membership is fixed before anything runs: position p of a batch (slot = ring·batch + p, see
`scheduler.Admission`) belongs to minibatch p // minibatch and to rank p // width % ranks, width
being the envs of a lane or a group. Only the order of micro-batches inside a minibatch follows
arrival, and the gradients of a minibatch are summed, so order changes nothing but time (RL-VLA³,
Streamer).

With groups (GRPO) all of that is of whole groups.

Left out: moving trajectories between ranks.
"""

from collections import deque
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class MicroBatch:
    slots: tuple[int, ...]
    epoch: int
    minibatch: int
    last: bool  # the optimizer steps after this one


class Streamer:
    """Feed it finished slots with `add`; `next` gives the next micro-batch, or None while none is
    complete.
    """

    def __init__(
        self,
        batch: int,
        minibatch: int,
        micro_batch: int,
        ring: int,
        epochs: int,
        stream: bool,
        rank: int,
        ranks: int,
        seed: int,
        version: int,
        width: int = 1,
        group: int = 1,
    ):
        self.batch = batch
        self.minibatch = minibatch
        self.micro_batch = micro_batch
        self.ring = ring
        self.epochs = epochs
        self.stream = stream
        self.seed = seed
        self.rank = rank
        self.ranks = ranks
        self.version = version
        self.width = width
        self.group = group
        self.local = batch // ranks  # trajectories of a batch that this rank trains
        self.finished: set[int] = set()  # slots waiting, of this batch and of later ones
        self._begin_batch()

    def _begin_batch(self) -> None:
        self.epoch = self.step = self.dispatched = 0
        self.consumed: set[int] = set()
        first = self.version % self.ring * self.batch
        self.mine = {
            first + p for p in range(self.batch) if p // self.width % self.ranks == self.rank
        }
        self.ready: list[deque[int]] = [deque() for _ in range(self.batch // self.minibatch)]
        self.partial: dict[
            int, list[int]
        ] = {}  # members of a group that came before the others, by the group's first slot
        self.stopping = False
        for slot in sorted(s for s in self.finished if s in self.mine):
            self._arrive(slot)

    def _arrive(self, slot: int) -> None:
        """A group is ready when it is whole: its advantages need every member's outcome."""
        members = self.partial.setdefault(slot - slot % self.group, [])
        members.append(slot)
        if len(members) == self.group:
            self.ready[slot % self.batch // self.minibatch].extend(
                self.partial.pop(slot - slot % self.group)
            )

    def add(self, slot: int) -> None:
        """A trajectory is complete. Raises RuntimeError when it was already given
        (consume-once).
        """
        if slot in self.finished or slot in self.consumed:
            raise RuntimeError(f"slot {slot} was finished twice in batch {self.version}")
        if (owner := slot % self.batch // self.width % self.ranks) != self.rank:
            raise RuntimeError(f"slot {slot} belongs to actor rank {owner}, not {self.rank}")
        self.finished.add(slot)
        if slot in self.mine:
            self._arrive(slot)

    @property
    def waiting(self) -> int:
        """Finished trajectories not yet trained on."""
        return len(self.finished)

    def next(self) -> MicroBatch | None:
        """The next micro-batch of the current minibatch. The caller trains it before asking
        again.
        """
        if self.epoch == self.epochs:
            return None
        complete = len(self.consumed) + sum(map(len, self.ready)) == self.local
        if not self.stream and not complete and self.epoch == 0:
            return None
        queue = self.ready[self.step]
        if len(queue) < self.micro_batch:
            return None
        slots = tuple(
            sorted(queue.popleft() for _ in range(self.micro_batch))
        )  # so that its sums do not depend on arrival
        if self.epoch == 0:
            self.consumed.update(slots)
            self.finished.difference_update(slots)
        self.dispatched += self.micro_batch
        last = self.dispatched == self.minibatch // self.ranks
        micro_batch = MicroBatch(slots, self.epoch, self.step, last)
        if last:
            self.dispatched = 0
            self.step = self.step + 1
            if self.step == len(self.ready):
                self._begin_epoch()
        return micro_batch

    def _begin_epoch(self) -> None:
        """Every minibatch of this epoch is out: the next epoch reshuffles the same trajectories,
        seeded by version.
        """
        self.epoch = self.epochs if self.stopping else self.epoch + 1
        self.step = 0
        if self.epoch < self.epochs:
            order = np.random.default_rng(
                [self.seed, self.version, self.epoch, self.rank]
            ).permutation(sorted(self.consumed))
            self.ready = [deque(map(int, part)) for part in np.split(order, len(self.ready))]

    def stop(self) -> list[int]:
        """No epochs after the first one, which every trajectory gets. Returns the slots that are
        spared, once for each epoch.
        """
        if self.stopping:
            return []
        self.stopping = True
        left = (
            [slot for part in self.ready for slot in part] if self.epoch else []
        )  # of the running epoch
        left += sorted(self.mine) * (self.epochs - 1 - self.epoch)
        if self.epoch:
            self.epoch = self.epochs
        return left

    @property
    def done(self) -> bool:
        """Whether every epoch of the batch has been given out."""
        return self.epoch == self.epochs

    def finish_batch(self) -> int:
        """Checks that every trajectory of the batch was consumed, and moves on to the next. Returns
        its version.
        """
        if self.consumed != self.mine:
            raise RuntimeError(
                f"batch {self.version} consumed {len(self.consumed)} of {self.local} trajectories"
            )
        self.version += 1
        self._begin_batch()
        return self.version
