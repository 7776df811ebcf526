"""Every trajectory once per epoch, in a minibatch that arrival cannot change."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler import Admission
from streamer import MicroBatch, Streamer

fast = settings(deadline=None, derandomize=True, max_examples=60)


def make(
    batch=8,
    minibatch=4,
    micro_batch=2,
    ring=2,
    epochs=1,
    stream=True,
    rank=0,
    ranks=1,
    version=0,
    width=1,
) -> Streamer:
    admission = Admission(batch, batch, ring - 1, width=width)
    minibatches = max(1, round(batch / minibatch))
    return Streamer(
        admission, minibatches, micro_batch, epochs, stream, rank, ranks, seed=1, version=version
    )


def drive(streamer: Streamer, order: list[int]) -> list[MicroBatch]:
    """Slots arrive in `order`; every micro-batch is trained as soon as there is one."""
    out = []
    for slot in order:
        streamer.add(slot)
        while (micro := streamer.next()) is not None:
            out.append(micro)
    return out


def by_minibatch(micros: list[MicroBatch]) -> dict[tuple[int, int], set[int]]:
    found: dict[tuple[int, int], set[int]] = {}
    for micro in micros:
        found.setdefault((micro.epoch, micro.minibatch), set()).update(micro.slots)
    return found


@st.composite
def cases(draw):
    micro, ranks, width, minibatches = (draw(st.integers(1, n)) for n in (4, 3, 3, 3))
    batch = width * draw(st.integers(ranks * minibatches, 4 * ranks * minibatches))
    sizes = dict(
        batch=batch,
        minibatch=batch / minibatches,
        micro_batch=micro,
        width=width,
        epochs=draw(st.integers(1, 3)),
        stream=draw(st.booleans()),
    )
    return sizes, ranks, draw(st.permutations(range(batch)))


@fast
@given(cases())
def test_each_trajectory_once_per_epoch_whatever_the_order(case):
    sizes, ranks, order = case
    everything: list[MicroBatch] = []
    for rank in range(ranks):
        mine = [slot for slot in order if slot // sizes["width"] % ranks == rank]
        micros = drive(streamer := make(**sizes, rank=rank, ranks=ranks), mine)
        assert streamer.done and streamer.waiting == 0
        for epoch in range(sizes["epochs"]):
            consumed = [slot for micro in micros if micro.epoch == epoch for slot in micro.slots]
            assert sorted(consumed) == sorted(mine)
        last = [m.last for m in micros]
        assert last.count(True) == sizes["epochs"] * round(sizes["batch"] / sizes["minibatch"])
        assert all(
            len(m.slots) == sizes["micro_batch"] or m.last and len(m.slots) < sizes["micro_batch"]
            for m in micros
        )
        assert [(m.epoch, m.minibatch) for m in micros] == sorted(
            (m.epoch, m.minibatch) for m in micros
        )
        in_order = drive(make(**sizes, rank=rank, ranks=ranks), sorted(mine))
        assert by_minibatch(micros) == by_minibatch(in_order)
        assert streamer.finish_batch() == 1
        everything += micros

    # Ranks partition the batch; minibatches cut it in order, into parts as even as can be.
    parts = by_minibatch(everything)
    first = [sorted(parts[0, k]) for k in range(len(streamer.sizes))]
    assert sum(first, []) == list(range(sizes["batch"]))
    assert max(map(len, first)) - min(map(len, first)) <= sizes["width"]
    assert all(len(parts[m.epoch, m.minibatch]) == m.minibatch_size for m in everything)


def test_streaming_trains_before_the_batch_is_whole_and_waiting_does_not():
    streamed = make(stream=True)
    waiting = make(stream=False)
    for slot in range(7):
        streamed.add(slot)
        waiting.add(slot)
        assert waiting.next() is None
    assert streamed.next().slots == (0, 1)
    waiting.add(7)
    assert waiting.next().slots == (0, 1)


def test_a_later_minibatch_waits_for_the_earlier_one():
    streamer = make()
    for slot in (4, 5, 6, 7, 0):
        streamer.add(slot)
    assert streamer.next() is None
    streamer.add(3)
    assert streamer.next() == MicroBatch((0, 3), 0, 0, False, 4)
    assert streamer.next() is None and streamer.waiting == 4


def test_later_epochs_reshuffle_and_the_shuffle_is_named_by_seed_and_version():
    micros = drive(make(batch=32, minibatch=8, epochs=3), list(range(32)))
    epochs = [[slot for m in micros if m.epoch == e for slot in m.slots] for e in range(3)]
    assert epochs[0] != epochs[1] != epochs[2]
    again = drive(make(batch=32, minibatch=8, epochs=3), list(reversed(range(32))))
    assert by_minibatch(again) == by_minibatch(micros)
    later = drive(make(batch=32, minibatch=8, epochs=3, ring=1, version=1), list(range(32)))
    assert by_minibatch(later) != by_minibatch(micros)


def test_trajectories_of_the_next_batch_are_held():
    streamer = make(ring=2)
    for slot in (8, 9, 10, 11):
        streamer.add(slot)
    assert streamer.next() is None and streamer.waiting == 4
    assert {slot for m in drive(streamer, list(range(8))) for slot in m.slots} == set(range(8))
    assert streamer.finish_batch() == 1 and not streamer.done
    assert streamer.next().slots == (8, 9)  # they were kept, and are ready at once
    assert streamer.next() == MicroBatch((10, 11), 0, 0, True, 4)


def test_the_ring_of_slots_comes_round_again():
    streamer = make(ring=2)
    for version in range(4):
        first = version % 2 * 8
        micros = drive(streamer, list(range(first, first + 8)))
        assert {slot for m in micros for slot in m.slots} == set(range(first, first + 8))
        assert streamer.finish_batch() == version + 1


def test_a_trajectory_cannot_be_given_twice():
    streamer = make()
    streamer.add(0)
    with pytest.raises(RuntimeError, match="twice"):
        streamer.add(0)
    streamer.add(1)
    assert streamer.next().slots == (0, 1)
    with pytest.raises(RuntimeError, match="twice"):
        streamer.add(1)  # already trained on


def test_a_trajectory_of_another_rank_is_refused():
    with pytest.raises(RuntimeError, match="rank 1"):
        make(rank=0, ranks=2).add(3)


def test_a_batch_cannot_be_finished_with_trajectories_missing():
    streamer = make()
    drive(streamer, [0, 1, 2])
    with pytest.raises(RuntimeError, match="2 of 8"):
        streamer.finish_batch()


@given(st.integers(0, 10**6), st.sampled_from([1, 2]), st.sampled_from([1, 2, 4, 8]), st.booleans())
@settings(deadline=None, derandomize=True, max_examples=40)
def test_groups_are_trained_whole_by_one_rank_and_only_once_complete(
    seed, ranks, micro_batch, stream
):
    batch = 32
    minibatch = 16
    group = 4
    epochs = 2
    order = np.random.default_rng(seed).permutation(batch)
    trained = {}
    for rank in range(ranks):
        admission = Admission(batch, batch, 1, group=group)
        streamer = Streamer(admission, minibatch, micro_batch, epochs, stream, rank, ranks, seed, 0)
        arrived: set[int] = set()
        for slot in order:
            if slot // group % ranks != rank:
                continue
            streamer.add(int(slot))
            arrived.add(int(slot))
            while (micro := streamer.next()) is not None:
                for s in micro.slots:
                    start = s - s % group
                    assert (
                        set(range(start, start + group)) <= arrived
                    )  # nobody's outcome is missing
                    trained.setdefault(micro.epoch, []).append(s)
        assert streamer.done
        streamer.finish_batch()
    assert (
        all(sorted(slots) == list(range(batch)) for slots in trained.values())
        and len(trained) == epochs
    )


@pytest.mark.parametrize("after", [0, 1, 5, 7, 8])
def test_stopping_spares_epochs_but_never_a_trajectory(after):
    """Four micro-batches an epoch, three epochs; stopped after so many of them."""
    streamer = make(epochs=3, ring=1)
    for slot in range(8):
        streamer.add(slot)
    trained = []
    spared = []
    while not streamer.done:
        if len(trained) == 2 * after:
            spared = streamer.stop()
            assert streamer.stop() == []  # once is enough
            if streamer.done:
                break
        trained += streamer.next().slots
    assert set(trained[:8]) == set(range(8)) and len(trained) == max(8, 2 * after)
    assert sorted(trained + spared) == sorted(
        3 * list(range(8))
    )  # trained and spared are three epochs of every trajectory
    streamer.finish_batch()
