"""Gradients of three ranks over Gloo, summed in buckets while their last passes go on: whatever
order backward has on each of them, whatever it never comes to, and whoever has no rows at all.
"""

import random
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from conftest import spawn
from torch import Tensor, nn

import gradients
from gradients import Gradients
from ranks import Meeting, Ranks

RANKS = 3
MINIBATCHES = 12
SIZES = (3, 40, 1, 7, 128, 5, 64, 2, 16)  # of weights
NEVER = 4  # the number of the weight that has no gradient on any rank
LATE = 6  # of the one that has its first in the middle, on rank 1 alone


def passes_of(rank: int, minibatch: int) -> list[list[int]]:
    """Returns, of each pass of a rank, in which order backward comes to which weights. Some ranks
    have no pass in some minibatches."""
    chance = random.Random(f"{rank} {minibatch}")
    usual = [n for n in reversed(range(len(SIZES))) if n not in (NEVER, LATE)]
    found = []
    for _ in range(chance.choice([0, 1, 1, 2])):
        order = chance.sample(usual, chance.choice([len(usual), len(usual), 4]))
        found.append(order if chance.random() < 0.5 else sorted(order, reverse=True))
    if rank == 1 and minibatch == MINIBATCHES // 2:
        found.append([LATE, *usual])
    return found


def gradient(rank: int, minibatch: int, number: int, size: int) -> Tensor:
    """Whole numbers, whose sums are exact in any order."""
    return torch.arange(size) + 100.0 * number + 10_000.0 * rank + minibatch


def expected(minibatch: int, number: int) -> Tensor:
    total = torch.zeros(SIZES[number])
    for rank in range(RANKS):
        count = sum(order.count(number) for order in passes_of(rank, minibatch))
        total += count * gradient(rank, minibatch, number, SIZES[number])
    return total


def make(sizes: tuple[int, ...] = SIZES) -> Gradients:
    alone = Ranks(0, 1, "cpu", Meeting(Path()))
    return Gradients([nn.Parameter(torch.ones(size)) for size in sizes], alone)


def backward(held: Gradients, number: int, rank: int, minibatch: int) -> None:
    weight = held.parameters[number]
    (weight * gradient(rank, minibatch, number, len(weight))).sum().backward()


def minibatches(ranks: Ranks) -> dict:
    """Goes through passes of all kinds, at another time on every rank."""
    held = make()
    chance = random.Random(ranks.rank)
    sums = []
    for minibatch in range(MINIBATCHES):
        passes = passes_of(ranks.rank, minibatch)
        for number, order in enumerate(passes):
            if number == len(passes) - 1:
                held.expect()
            for weight in order:
                time.sleep(chance.choice([0.0, 0.0, 0.002]))
                backward(held, weight, ranks.rank, minibatch)
        list(held.meet())
        list(held.sum())
        sums.append([None if p.grad is None else p.grad.clone() for p in held.parameters])
        for view in held.views:
            view.zero_()
    return {"sums": sums, "order": held.order, "buckets": held.buckets, "totals": held.totals}


def in_step(ranks: Ranks) -> dict:
    """Two minibatches of one pass, in the second of which rank 0 is the last to come to it."""
    held = make()
    begun = []
    for minibatch in range(2):
        if minibatch and ranks.rank == 0:
            time.sleep(0.5)
        held.expect()
        for number in reversed(range(len(SIZES))):
            backward(held, number, ranks.rank, minibatch)
        begun.append(len(held.sums))
        if minibatch == 0:  # the others know no buckets either
            list(held.meet())
            list(held.sum())
            continue
        # All have come to it: what backward does from now on, sums follow.
        list(held.meet())
        held.begin_complete()
        begun.append(len(held.sums))
        list(held.sum())
    return {"begun": begun, "spans": held.spans, "bytes": held.flat.nbytes}


def beside(ranks: Ranks) -> dict:
    """A pass in which all have come before backward begins."""
    held = make()
    for minibatch in range(2):
        held.expect()
        list(held.meet())
        for number in (*range(1, len(SIZES)), 0):
            backward(held, number, ranks.rank, minibatch)
        begun = len(held.sums)
        list(held.sum())
    # Nobody is in a sum any more: they have all the gradients.
    grads = [p.grad.clone() for p in held.parameters]
    return {"begun": begun, "buckets": held.buckets, "sums": grads, "totals": held.totals}


def act(rank: int, folder: str) -> None:
    ranks = Ranks(rank, RANKS, "cpu", Meeting(Path(folder, "rendezvous")))
    found = {play.__name__: play(ranks) for play in (minibatches, in_step, beside)}
    for play in found.values():
        if "totals" in play:
            play["totals"] = dict(play["totals"])
    torch.save(found, f"{folder}/{rank}.pt")
    list(ranks.meet())
    ranks.leave()


@pytest.fixture(scope="module")
def everybody(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ranks")
    spawn(act, folder, RANKS)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]


def test_sums_are_right_whatever_backward_comes_to_in_whatever_order(everybody):
    kinds = [len(passes_of(rank, m)) for rank in range(RANKS) for m in range(MINIBATCHES)]
    assert {0, 1, 2} <= set(kinds)  # ranks without rows, too
    for found in everybody:
        for minibatch, sums in enumerate(found["minibatches"]["sums"]):
            for number, total in enumerate(sums):
                if number == NEVER or number == LATE and minibatch < MINIBATCHES // 2:
                    assert total is None
                elif total is not None:
                    assert torch.equal(total, expected(minibatch, number))
                else:
                    assert not expected(minibatch, number).any()


def test_all_ranks_have_the_same_buckets_of_neighbours(everybody):
    for name in ("order", "buckets"):
        assert len({str(found["minibatches"][name]) for found in everybody}) == 1
    buckets = everybody[0]["minibatches"]["buckets"]
    assert sorted(sum(buckets, [])) == [n for n in range(len(SIZES)) if n != NEVER]
    for bucket in buckets:
        assert bucket == list(range(bucket[0], bucket[-1] + 1))


def test_no_sum_begins_before_all_ranks_have_come_to_their_last_pass(everybody):
    for rank, found in enumerate(everybody):
        first, alone, together = found["in_step"]["begun"]
        # Nothing is known of the first one. In the second, rank 0 comes half a second later.
        assert first == 0 and (rank == 0 or alone == 0)
        assert together == len(found["in_step"]["spans"]) > 1


def test_sums_begin_as_soon_as_backward_is_through_with_their_weights(everybody):
    for found in everybody:
        beside = found["beside"]
        assert beside["begun"] == len(beside["buckets"]) > 1
        assert 0 in beside["buckets"][-1]  # to which backward came last
        for number, total in enumerate(beside["sums"]):
            parts = [
                gradient(rank, m, number, SIZES[number]) for rank in range(RANKS) for m in (0, 1)
            ]
            # The first minibatch was not cleared: every rank added to the sum that it had.
            assert torch.equal(total, RANKS * sum(parts[::2]) + sum(parts[1::2]))


def test_bytes_and_seconds_are_of_sums_one_after_the_other(everybody):
    for found in everybody:
        spans = found["in_step"]["spans"]
        assert sum(size for _, _, size in spans) <= found["in_step"]["bytes"]
        for (start, end, _), (after, _, _) in zip(spans, spans[1:], strict=False):
            assert start <= end <= after
        for play in ("minibatches", "beside"):
            totals = found[play]["totals"]
            assert totals["reduce_wait_s"] > 0 and 0 < totals["reduce_s"] < 60
            assert totals["reduce_bytes"] >= 4 * sum(SIZES[:NEVER])
        # Little is left to wait for, of sums that began beside backward.
    assert len({found["beside"]["totals"]["reduce_bytes"] for found in everybody}) == 1


def test_a_pass_after_the_last_one_of_a_minibatch_is_refused(monkeypatch):
    """By a fork, whose gradients would come too late to be summed."""
    monkeypatch.setattr(gradients, "come", lambda *_: Mock(is_completed=lambda: False))
    held = make((3,))
    backward(held, 0, 0, 0)
    held.buckets = [[0]]
    held.bucket_of = {0: 0}
    backward(held, 0, 0, 0)
    held.expect()
    backward(held, 0, 0, 0)
    with pytest.raises(RuntimeError, match="a backward pass after the last one of a minibatch"):
        backward(held, 0, 0, 0)


def test_a_bucket_has_at_most_its_bytes_or_one_weight(monkeypatch):
    held = make((10, 10, 10, 100, 10, 1))
    held.order = [6, 5, 4, 3, 2, 1]
    monkeypatch.setattr(gradients, "PARTS", 1)
    monkeypatch.setattr(gradients, "BUCKET", 4 * 48)
    # Each weight begins at a multiple of 64 bytes, 16 elements.
    assert held.cut([0, 1, 2, 3, 4, 5]) == [[4, 5], [3], [0, 1, 2]]
    assert held.cut([0, 2, 4, 5]) == [[4, 5], [2], [0]]
    monkeypatch.setattr(gradients, "BUCKET", 2**25)
    assert held.cut([0, 1, 2, 3, 4, 5]) == [[0, 1, 2, 3, 4, 5]]
