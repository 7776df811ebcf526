"""Gradients of several ranks become their sums, in pieces, while the backward pass goes on.

What ranks say to one another besides is in ranks.py. With --shard FSDP2 sums by itself within a
node (sharding.py), and parts are summed here over nodes, after the last pass.
"""

import time
from collections import Counter
from collections.abc import Iterator
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from channel import layout
from ranks import Ranks, come, waiting

# Bytes of gradients that are summed at once: enough for a fast wire (PyTorch's DDP has 25 MiB), and
# few enough that most of a large model's are on their way when the backward pass ends. Of a small
# model's it is an eighth of all.
BUCKET = 2**25
PARTS = 8
Moment = float | torch.cuda.Event  # in monotonic seconds, or of a device's stream


class Gradients:
    """The gradients of weights that learn, as views of one tensor: backward adds to them in place,
    and ranks sum them as they lie.

    Sums go by buckets, neighbours in that tensor. While the last backward pass of a minibatch goes
    on, a bucket's sum begins when backward is through with its weights and all ranks have come to
    their last passes: so nobody waits in a sum, which cannot be left, for longer than one pass. It
    begins after those of all buckets before it, in an order that all ranks share: they match
    whatever order backward has here, and whatever it never comes to. Those left over begin when all
    ranks have met.

    A weight has none until backward first comes to it on some rank, and keeps it from then on. It
    may have none on any rank (the last layer's, with --train-vlm), or on some ranks only, where
    others' groups were all filtered (GRPO): theirs counts as 0. It is in a bucket from the next
    minibatch on."""

    def __init__(self, parameters: list[torch.nn.Parameter], ranks: Ranks):
        """parameters: of one dtype, on one device; ranks: with whom gradients are summed, those of
        the parts that this rank has."""
        self.parameters = parameters
        self.group = ranks.twins
        parts = [ranks.part(parameter.detach()) for parameter in parameters]
        size = parts[0].itemsize
        sizes = {str(i): ((part.numel(),), part.dtype) for i, part in enumerate(parts)}
        starts, end = layout(sizes, 1)  # bytes
        self.starts = [start // size for start in starts.values()]
        self.ends = [at + part.numel() for at, part in zip(self.starts, parts, strict=True)]
        self.flat = parts[0].new_zeros(end // size)
        self.views = []
        # When backward first came to each weight, as 1, 2, 3 …; 0 where it never has. After a sum
        # it is the latest on any rank.
        self.order = [0] * len(parameters)
        self.buckets: list[list[int]] = []  # numbers of weights, in the order of sums
        self.bucket_of: dict[int, int] = {}
        self.meeting: dist.Work | None = None  # of ranks that are in or past their last pass
        self.missing: list[set[int]] = []  # weights of each bucket to which that pass is to come
        self.sums: list[Sum] = []  # of the running minibatch
        self.spans: list[tuple[float, float, int]] = []  # of the last one: start, end and bytes
        self.totals: Counter[str] = Counter()  # since they were last cleared, for metrics.jsonl
        for i, (parameter, part) in enumerate(zip(parameters, parts, strict=True)):
            view = self.flat[self.starts[i] : self.ends[i]].view_as(part)
            self.views.append(ranks.placed(view, parameter))
            parameter.register_post_accumulate_grad_hook(partial(self.take, i))

    def take(self, number: int, parameter: torch.nn.Parameter) -> None:
        """Takes in a weight's gradient, to which backward has just added. Raises RuntimeError if it
        comes too late."""
        if parameter.grad is not self.views[number]:  # the first one
            parameter.grad = self.views[number].copy_(parameter.grad)
            self.order[number] = self.order[number] or 1 + max(self.order)
        if self.meeting and number in self.bucket_of:
            missing = self.missing[self.bucket_of[number]]
            if number not in missing:
                raise RuntimeError("there is a backward pass after the last one of a minibatch")
            missing.remove(number)
            self.begin_complete()

    def expect(self) -> None:
        """Tells the other ranks that the next backward pass is this one's last of the minibatch,
        or that it had its last."""
        self.meeting = come(torch.zeros(1), self.group)
        self.missing = [set(bucket) for bucket in self.buckets]

    def meet(self) -> Iterator[None]:
        """Waits for ranks that have not come to their last pass, and yields meanwhile."""
        if not self.meeting:  # it had no rows
            self.expect()
        yield from waiting(self.meeting)

    def begin_complete(self) -> None:
        """Begins the sums of those buckets that are next in order and complete."""
        for number in range(len(self.sums), len(self.buckets)):
            if self.missing[number] or not self.meeting.is_completed():
                break
            self.begin(self.buckets[number])

    def begin(self, bucket: list[int]) -> None:
        whole = self.flat[self.starts[bucket[0]] : self.ends[bucket[-1]]]
        self.sums.append(Sum(whole, self.group))

    def sum(self) -> Iterator[None]:
        """Sums them over the processes of torch.distributed's group, and yields until that is done.
        The loss is already divided by the global count."""
        since = moment(self.flat.device)
        for bucket in self.buckets[len(self.sums) :]:
            self.begin(bucket)

        # Ask which weights have their first gradient; others' may have come in another order.
        if len(self.bucket_of) < len(self.parameters):
            order = torch.tensor(self.order)
            yield from waiting(come(order, self.group))
            self.order = order.tolist()
            found = [number for number, place in enumerate(self.order) if place]
            new = [number for number in found if number not in self.bucket_of]
            for number in new:
                self.parameters[number].grad = self.views[number]
            for bucket in self.cut(new):
                self.begin(bucket)
            self.buckets = self.cut(found)
            self.bucket_of = {one: i for i, bucket in enumerate(self.buckets) for one in bucket}

        for one in self.sums:
            yield from one.wait()
        self.account(since)
        self.meeting = None
        self.sums = []

    def cut(self, numbers: list[int]) -> list[list[int]]:
        """Divides weights, by ascending number, into buckets, in the order in which backward is
        through with them."""
        most = min(BUCKET, self.flat.nbytes // PARTS) // self.flat.itemsize
        buckets: list[list[int]] = []
        for number in numbers:
            together = buckets and buckets[-1][-1] == number - 1
            if not together or self.ends[number] - self.starts[buckets[-1][0]] > most:
                buckets.append([])
            buckets[-1].append(number)
        return sorted(buckets, key=lambda bucket: max(self.order[number] for number in bucket))

    def account(self, since: Moment) -> None:
        """Says when this minibatch's sums were on the wire, one after the other: each from when it
        began, or the one before ended. since: when training had nothing else to do."""
        moments = [since, *(at for one in self.sums for at in (one.begun, one.ended))]
        since, *times = on_clock(moments, self.flat.device)
        self.spans = []
        before = 0.0
        for one, begun, ended in zip(self.sums, times[::2], times[1::2], strict=True):
            start = max(begun, before)
            before = max(start, ended)
            self.spans.append((start, before, one.bytes))
        self.totals.update(
            reduce_bytes=sum(size for _, _, size in self.spans),
            reduce_s=sum(end - start for start, end, _ in self.spans),
            reduce_wait_s=max(0.0, before - since),
        )


class Sum:
    """A sum over ranks that goes on by itself, and when it began and ended."""

    def __init__(self, tensor: Tensor, group: dist.ProcessGroup | None):
        self.bytes = tensor.nbytes
        self.device = tensor.device
        self.begun = moment(self.device)
        self.ended: Moment | None = None
        self.work = dist.all_reduce(tensor, group=group, async_op=True)
        # On a GPU it is called at once, on a stream that waits for the sum (torch.futures).
        self.work.get_future().add_done_callback(self.end)

    def end(self, _) -> None:
        self.ended = moment(self.device)

    def wait(self) -> Iterator[None]:
        while self.ended is None:
            yield
            time.sleep(0.001)
        yield from waiting(self.work)


def moment(device: torch.device) -> Moment:
    """Returns when the device is through with what it has been given so far."""
    if device.type == "cpu":
        return time.monotonic()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def on_clock(moments: list[Moment], device: torch.device) -> list[float]:
    """Returns moments, which are past, in monotonic seconds."""
    if device.type == "cpu":
        return moments
    now = moment(device)
    now.synchronize()
    here = time.monotonic()
    return [here - at.elapsed_time(now) / 1e3 for at in moments]
