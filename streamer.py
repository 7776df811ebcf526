"""Finished slots → micro-batches → minibatches, for one actor rank; every trajectory is consumed
exactly once per epoch.

Membership is fixed before anything runs: which minibatch and which rank a position of a batch (its
p-th slot) belongs to, `scheduler.Admission` says. Only the order of micro-batches inside a
minibatch follows arrival, and the gradients of a minibatch are summed, so order changes nothing but
time (RL-VLA³, Streamer). With groups (GRPO) all of that is of whole groups.

Trajectories are given out whole, because advantages need all of one. The learner cuts their chunk
steps into passes of at most --micro-batch.

Left out: moving trajectories between ranks.
"""

from collections import deque
from dataclasses import dataclass

import numpy as np

from config import Config
from scheduler import Admission


@dataclass(frozen=True)
class MicroBatch:
    """Whole trajectories that are trained on together."""

    slots: tuple[int, ...]
    epoch: int
    minibatch: int
    last: bool  # the optimizer steps after this one
    minibatch_size: int  # trajectories, over the ranks of all nodes


@dataclass(eq=False)
class Streamer:
    """Feed it finished slots with `add`; `next` gives the next micro-batch, or None while none is
    complete."""

    admission: Admission  # says which slots a batch has, and whose they are
    minibatches: int  # of a batch
    together: int  # trajectories of a micro-batch; the last one of a minibatch may have fewer
    epochs: int
    stream: bool
    rank: int  # this actor's rank on its node
    ranks: int  # actor ranks of a node
    seed: int
    version: int  # the batch to begin with, then the running one

    def __post_init__(self):
        admission = self.admission
        positions = np.arange(admission.batch)  # of this node's batch
        everywhere = admission.minibatch_of(self.minibatches, self.ranks)
        minibatch_of = everywhere[admission.world(positions)]
        owner = admission.owner(positions, self.ranks)
        self.minibatch_of = minibatch_of.tolist()
        # Trajectories of each minibatch: over the ranks of all nodes, and of this one.
        self.sizes = np.bincount(everywhere).tolist()
        self.shares = np.bincount(minibatch_of[owner == self.rank]).tolist()
        self.finished: set[int] = set()  # slots waiting, of this batch and of later ones
        self._begin_batch()

    @classmethod
    def of(cls, config: Config, rank: int, version: int) -> "Streamer":
        """Makes the streamer of a node's actor rank. version: the batch to begin with."""
        actor = config.actor
        return cls(
            Admission.of(config),
            actor.minibatches,
            max(1, actor.micro_batch // config.env.segment),
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
            minibatch = self.minibatch_of[slot % self.admission.batch]
            self.ready[minibatch].extend(self.partial.pop(first))

    @property
    def waiting(self) -> int:
        """Finished trajectories not yet trained on."""
        return len(self.finished)

    def next(self) -> MicroBatch | None:
        """Returns the next micro-batch of the current minibatch. The caller trains them in
        this order. It may ask for one before it has trained the last, but across an optimizer step
        only if nothing can `stop` there."""
        if self.done:
            return None
        # Without streaming nothing is trained before the whole batch is there.
        complete = len(self.consumed) + sum(map(len, self.ready)) == len(self.mine)
        if not self.stream and not complete and self.epoch == 0:
            return None
        queue = self.ready[self.step]
        left = self.shares[self.step] - self.dispatched
        count = min(self.together, left)
        if len(queue) < count:
            return None

        # Slots are sorted, so that a micro-batch's sums do not depend on arrival.
        slots = tuple(sorted(queue.popleft() for _ in range(count)))
        if self.epoch == 0:
            self.consumed.update(slots)
            self.finished.difference_update(slots)
        self.dispatched += count
        last = count == left
        micro_batch = MicroBatch(slots, self.epoch, self.step, last, self.sizes[self.step])
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
        self.ready: list[deque[int]] = [deque() for _ in self.shares]
        # Members of a group that came before the others, by the group's first slot.
        self.partial: dict[int, list[int]] = {}
        for slot in sorted(self.finished & self.mine):
            self._arrive(slot)

    def _begin_epoch(self) -> None:
        """Shuffles the same trajectories for the next epoch, once every minibatch is given out.

        The shuffle is named by seed, version, epoch and a rank among all nodes: the rank that would
        have the same trajectories if one node had all lanes."""
        self.step = 0
        self.epoch = self.epochs if self.stopping else self.epoch + 1
        if not self.done:
            rank = self.rank * self.admission.nodes + self.admission.node
            random = np.random.default_rng([self.seed, self.version, self.epoch, rank])
            order = random.permutation(sorted(self.consumed))
            parts = np.split(order, np.cumsum(self.shares)[:-1])
            self.ready = [deque(map(int, part)) for part in parts]

    def finish_batch(self) -> int:
        """Moves on to the next batch, and returns its version. Raises RuntimeError unless every
        trajectory of the batch was consumed."""
        if self.consumed != self.mine:
            raise RuntimeError(
                f"batch {self.version} consumed {len(self.consumed)} of {len(self.mine)} "
                "trajectories"
            )
        self.version += 1
        self._begin_batch()
        return self.version
