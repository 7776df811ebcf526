"""The actor workers together: each rank trains its share of every minibatch, and all hold the same
weights, because gradients are summed before every step.

Left out: several machines, FSDP2 (the trainable weights are replicated).
"""

import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from config import Config
from tally import Tally


class Ranks:
    """This actor's place among the others. With one rank alone, everything here does nothing."""

    def __init__(self, rank: int, count: int, device: str, folder: Path, version: int):
        """folder: where the ranks meet; version: of this start of the workers. One file serves one
        meeting."""
        self.rank = rank
        self.count = count
        self.device = device
        self.first = rank == 0  # publishes, writes checkpoints, reports
        self.several = count > 1
        if self.several:
            store = dist.FileStore(str(folder / f"rendezvous-{version}"), count)
            backend = "gloo" if device == "cpu" else "nccl"
            # The launcher sees who hangs. Torch's own clock goes on while a run is suspended.
            limit = timedelta(days=7)
            group = {"store": store, "rank": rank, "world_size": count, "timeout": limit}
            dist.init_process_group(backend, **group)

    @classmethod
    def of(
        cls, config: Config, rank: int, device: str, run_folder: Path, resume: dict | None
    ) -> "Ranks":
        version = resume["version"] if resume else 0
        return cls(rank, config.actor.actor_workers, device, run_folder / ".spans", version)

    def meet(self) -> Iterator[None]:
        """Waits until all ranks have come here, and yields again and again meanwhile. The others'
        calls wait silently; whoever has met has little to wait for."""
        if self.several:
            meeting = dist.all_reduce(torch.zeros(1, device=self.device), async_op=True)
            while not meeting.is_completed():
                yield
                time.sleep(0.001)
            meeting.wait()  # raises what went wrong

    def sum(self, numbers: list[float]) -> list[float]:
        """Returns the sums over ranks."""
        if not self.several:
            return numbers
        total = torch.tensor(numbers, device=self.device)
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


def sum_gradients(parameters: list[Tensor]) -> None:
    """Sums gradients over the processes of torch.distributed's group, as one flat tensor.
    The loss is already divided by the global count.

    A weight may have no gradient on any rank (the last layer's, with --train-vlm), and then keeps
    none. It may have one on some ranks only, where others' groups were all filtered (GRPO): theirs
    counts as 0."""
    has = parameters[0].new_tensor([p.grad is not None for p in parameters])
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([has, *(gradient.flatten() for gradient in gradients)])
    dist.all_reduce(flat)
    has, *parts = flat.split([len(parameters), *(p.numel() for p in parameters)])
    for parameter, part, somewhere in zip(parameters, parts, has.tolist(), strict=True):
        if somewhere:
            parameter.grad = part.view_as(parameter).clone()
