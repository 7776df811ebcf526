"""The actor workers together: each rank trains its share of every minibatch, and all hold the same
weights, because gradients are summed before every step (gradients.py). Those of all nodes are one
group.

With --shard each rank holds a part of the weights, and overrides what is said here: sharding.py.
"""

import time
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from config import Config
from errors import require
from metrics import Meter
from models import checkpoint
from tally import Tally

# The launcher sees who hangs. Torch's own clock goes on while a run is suspended.
LIMIT = timedelta(days=7)


class Meeting(NamedTuple):
    """Where actor workers meet: in a file of their machine, or in torchrun's store. Each start of
    the workers has a meeting of its own."""

    file: Path  # where one machine has all
    address: tuple[str, int] | None = None  # of the store, where several have them
    name: str = ""  # of the meeting, there

    def store(self, ranks: int) -> dist.Store:
        if self.address is None:
            return dist.FileStore(str(self.file), ranks)
        store = dist.TCPStore(*self.address, is_master=False, wait_for_workers=False)
        return dist.PrefixStore(self.name, store)


class Ranks:
    """This actor's place among the others. With one rank alone, everything here does nothing."""

    sharded = False  # whether each rank holds a part of the weights (--shard)
    twins: dist.ProcessGroup | None = None  # who sums gradients with this rank, if not all

    def __init__(
        self, rank: int, count: int, device: str, meeting: Meeting, node: int = 0, nodes: int = 1
    ):
        """rank: on this node, of `count`."""
        self.rank = node * count + rank  # of all
        self.count = nodes * count
        self.of_node = range(node * count, (node + 1) * count)  # ranks of this node
        self.device = device
        self.first = self.rank == 0  # writes checkpoints, reports
        self.leads = rank == 0  # on its node: fills the weight plane
        self.several = self.count > 1
        self.saves = self.first  # takes part in saving
        self.publishes = self.leads  # takes part in publishing
        self.stopped = False  # whether those who save have agreed to stop
        if self.several:
            store = meeting.store(self.count)
            # What ranks say to one another stays on the host: no GPU is waited for.
            backend = "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"
            group = {"store": store, "rank": self.rank, "world_size": self.count, "timeout": LIMIT}
            dist.init_process_group(backend, **group)

    @staticmethod
    def of(config: Config, rank: int, device: str, meeting: Meeting, meter: Meter) -> "Ranks":
        train = config.train
        place = (rank, config.actor.actor_workers, device, meeting, train.node, train.nodes)
        if not config.actor.shard:
            return Ranks(*place)
        from sharding import ShardedRanks  # here, for it takes a second to import

        return ShardedRanks(meter, *place)

    def meet(
        self, words: Tensor | None = None, group: dist.ProcessGroup | None = None
    ) -> Iterator[None]:
        """Waits until all ranks have come here, and yields again and again meanwhile. The others'
        calls wait silently; whoever has met has little to wait for.

        words: numbers of this rank, on the host, which become the highest of any rank; group: who
        meets, if not all."""
        if self.several:
            yield from waiting(come(torch.zeros(1) if words is None else words, group))

    def agree(self, *mine: float) -> list[float]:
        """Returns the highest of each number, of any rank that shares the weights with this one."""
        return list(mine)

    def plan(self, passes: int, through: bool = False, stop: bool = False) -> int | None:
        """Agrees on the next passes: ranks that share weights make as many as the one with the most
        rows has. Returns None where there are none: all are through with the minibatch, or one is
        to stop, and so all are (`stopped`)."""
        if self.stopped:
            return None
        most, more, stop = self.agree(passes, not through, stop)
        if more and not stop:
            return int(most)
        self.stopped = self.join_nodes(bool(stop))
        return None

    def join_nodes(self, stop: bool) -> bool:
        """Waits for other nodes, where weights are shared within a node. Returns whether one is to
        stop."""
        return stop

    def check_alike(self, model: torch.nn.Module) -> None:
        """Raises UserError, on all, where nodes have begun with other weights. Bits are compared:
        what is summed up of them, with every tensor's place."""
        if len(self.of_node) == self.count:
            return
        total = 0
        for place, tensor in enumerate(model.state_dict().values(), 1):
            if not tensor.is_meta:
                bits = tensor.flatten().view(torch.uint8)
                whole = bits[: len(bits) // 4 * 4].view(torch.int32).sum(dtype=torch.int64)
                total += place * (int(whole) + int(bits[len(bits) // 4 * 4 :].sum()))
        totals: list[int] = [0] * self.count
        dist.all_gather_object(totals, total)
        for rank, other in enumerate(totals):
            found = f"the weights of node {rank // len(self.of_node)} are not those of node 0"
            require(other == totals[0], f"{found}: give all nodes the same --checkpoint")

    def spread(self, model: torch.nn.Module, methods: tuple[str, ...]) -> None:
        """Leaves a rank that shares the weights its part of them. methods: those that are called
        to compute."""

    def part(self, tensor: Tensor) -> Tensor:
        """Returns what this rank holds of a tensor: all of it, unless the ranks share it."""
        return tensor

    def placed(self, part: Tensor, like: Tensor) -> Tensor:
        """Returns the tensor of which every rank has such a part, of the size of `like`."""
        return part

    def whole(self, tensor: Tensor) -> Tensor:
        """Returns all of a tensor, also of one that the ranks share. All ask for it at once."""
        return tensor

    def gathered(self, weights: dict[str, Tensor]) -> Mapping[str, Tensor]:
        """Returns the same weights, whole."""
        return weights

    def on_first(self, parts: dict, like: dict) -> dict:
        """Returns whole tensors, by name, on the first rank's host, where everybody has such parts
        of them; `like` is of their sizes."""
        return parts

    def read_optimizer(self, path: Path, parameters: list[Tensor]) -> dict[int, dict]:
        """Returns what optimizer.pt remembers of these parameters, on this rank's device."""
        sizes = [parameter.shape for parameter in parameters]
        return checkpoint.read_optimizer(path, sizes, self.device)

    def sum(self, numbers: list[float]) -> list[float]:
        """Returns the sums over ranks."""
        if not self.several:
            return numbers
        total = torch.tensor(numbers)
        dist.all_reduce(total)
        return total.tolist()

    def combine(self, tally: Tally) -> Tally:
        """Returns the tally of all ranks; a rank may lack names that others have."""
        if not self.several:
            return tally
        everybody: list[Tally | None] = [None] * self.count
        dist.all_gather_object(everybody, tally)
        combined = Tally()
        for one in everybody:
            combined.merge(one)
        return combined

    def leave(self) -> None:
        """Ends what they meet by. No rank may need it any more: they `meet` before."""
        if self.several:
            dist.destroy_process_group()


def come(words: Tensor, group: dist.ProcessGroup | None = None) -> dist.Work:
    """Tells the other ranks, of a group or all, that this one has come. Does not wait for them."""
    return dist.all_reduce(words, dist.ReduceOp.MAX, group, async_op=True)


def waiting(work: dist.Work) -> Iterator[None]:
    """Yields again and again until it is done. Raises what went wrong."""
    while not work.is_completed():
        yield
        time.sleep(0.001)
    work.wait()
