"""New weights on their way: never mixed under fire, and never taken behind a worker's back."""

import contextlib
import threading
import time
import weakref
from multiprocessing import get_context
from types import SimpleNamespace

import pytest
import torch

import weights
from channel import Arena
from weights import WeightFetcher, WeightPlane

fork = get_context("fork")

# ---------------------------------------------------------------- WeightPlane

WEIGHTS = {
    "a": ((40_000,), torch.float32),
    "b": ((3, 50), torch.float32),
    "c": ((20_000,), torch.float64),
}


def filled(value: float) -> dict[str, torch.Tensor]:
    return {name: torch.full(shape, value, dtype=dtype) for name, (shape, dtype) in WEIGHTS.items()}


def room(plane: WeightPlane) -> torch.Tensor:
    """A block for one set of weights, all of them −1."""
    block = torch.zeros(plane.bytes, dtype=torch.uint8)
    for tensor in plane.tensors(block).values():
        tensor.fill_(-1.0)
    return block


def values(plane: WeightPlane, block: torch.Tensor) -> list[float]:
    return sorted(
        {value for tensor in plane.tensors(block).values() for value in tensor.unique().tolist()}
    )


def test_a_reader_gets_the_newest_version():
    plane = WeightPlane(WEIGHTS)
    mine = room(plane)
    for version in range(5):
        plane.publish(filled(version), version)
        assert (
            plane.version == version
            and plane.fetch(mine) == version
            and values(plane, mine) == [version]
        )
    assert (
        plane.bytes == (40_000 + 160) * 4 + 20_000 * 8
    )  # the 600 bytes of b padded to a cache line


@pytest.mark.parametrize("start", [0, 5])
def test_there_is_nothing_to_fetch_before_the_first_publish(start):
    plane = WeightPlane(WEIGHTS, version=start)
    mine = room(plane)
    with pytest.raises(TimeoutError, match="no weights came"):
        plane.fetch(mine, timeout=0.1)
    plane.publish(filled(start), start)
    assert plane.fetch(mine) == start and values(plane, mine) == [start]


class Overtaken(torch.Tensor):
    """A tensor whose first copy takes so long that the writer publishes two versions meanwhile."""

    def copy_(self, source, non_blocking=False):
        super().copy_(source)
        while self.events:
            self.events.pop(0)()
        return self


def test_a_reader_that_is_overtaken_twice_tries_again():
    plane = WeightPlane(WEIGHTS)
    mine = room(plane)
    mine = mine.as_subclass(Overtaken)
    mine.events = [lambda: plane.publish(filled(1.0), 1), lambda: plane.publish(filled(2.0), 2)]
    plane.publish(filled(0.0), 0)
    assert plane.fetch(mine) == 2 and values(plane, mine) == [2.0]


def test_a_reader_that_is_overtaken_once_keeps_what_it_has():
    plane = WeightPlane(WEIGHTS)
    mine = room(plane)
    mine = mine.as_subclass(Overtaken)
    mine.events = [lambda: plane.publish(filled(1.0), 1)]
    plane.publish(filled(0.0), 0)
    assert plane.fetch(mine) == 0 and values(plane, mine) == [0.0]


def test_a_plane_on_the_host_is_page_locked_for_a_gpu(monkeypatch):
    locked = []
    monkeypatch.setattr(Arena, "pin", lambda arena: locked.append(arena))
    plane = WeightPlane(WEIGHTS)
    plane.use_on("cpu")
    assert not locked
    plane.use_on("cuda:1")
    assert locked == [plane.buffers.arena]
    WeightPlane(WEIGHTS, "meta").use_on("cuda:1")  # one that lies on a device has no arena
    assert len(locked) == 1


def test_a_version_waits_for_its_copies_once_on_either_side(monkeypatch):
    waited = []
    monkeypatch.setattr(weights, "synchronize", waited.append)
    plane = WeightPlane(WEIGHTS)
    plane.publish(filled(1.0), 0)
    assert waited == ["cpu"]  # by the device of what is published: its stream copies
    plane.fetch(torch.empty(plane.bytes, dtype=torch.uint8, device="meta"))
    assert waited == ["cpu", "meta"]


def test_weights_are_published_in_the_plane_s_type():
    plane = WeightPlane({"a": ((3,), torch.bfloat16)})
    weights = torch.tensor([1.0, 1.001, 3.14159])
    plane.publish({"a": weights}, 0)
    mine = room(plane)
    assert plane.fetch(mine) == 0
    assert torch.equal(plane.tensors(mine)["a"], weights.to(torch.bfloat16))


def test_the_thread_that_fetches_opens_no_other_gpu(monkeypatch):
    used = []
    monkeypatch.setattr(torch.cuda, "set_device", used.append)
    fetcher = WeightFetcher.__new__(WeightFetcher)
    fetcher.stream = SimpleNamespace(device="cuda:3")
    fetcher.full = threading.Event()
    fetcher._run()  # which ends at once, for it has nothing to wait for
    assert used == ["cuda:3"] and isinstance(fetcher.error, AttributeError)


def test_weights_of_a_writer_that_died_while_writing_are_never_fetched():
    plane = WeightPlane(WEIGHTS)
    mine = room(plane)
    plane.publish(filled(0.0), 0)
    with pytest.raises(KeyError):  # version 1 fails half way, in the other buffer
        plane.publish({"a": torch.ones(40_000), "unknown": torch.ones(1)}, 1)
    assert plane.fetch(mine) == 0 and values(plane, mine) == [0.0]


def publish_for(seconds: float, plane: WeightPlane) -> None:
    torch.set_num_threads(1)
    weights = filled(0.0)
    end = time.monotonic() + seconds
    version = 0
    while time.monotonic() < end:
        for tensor in weights.values():
            tensor.fill_(version)
        plane.publish(weights, version)
        version += 1


def fetch_for(seconds: float, plane: WeightPlane, answer) -> None:
    torch.set_num_threads(1)
    mine = room(plane)
    end = time.monotonic() + seconds
    versions = []
    mixed = 0
    while time.monotonic() < end:
        version = plane.fetch(mine, timeout=30.0)
        versions.append(version)
        mixed += values(plane, mine) != [version]
    answer.send((mixed, len(versions), versions == sorted(versions), versions[-1] > versions[0]))


def test_hammered_weights_are_never_mixed():
    plane = WeightPlane(WEIGHTS)
    pipes = [fork.Pipe(duplex=False) for _ in range(3)]
    processes = [fork.Process(target=fetch_for, args=(2.0, plane, send)) for _, send in pipes]
    processes.append(fork.Process(target=publish_for, args=(2.5, plane)))
    for process in processes:
        process.start()
    for receive, _ in pipes:
        assert receive.poll(60)
        mixed, fetches, monotone, moved = receive.recv()
        assert mixed == 0 and fetches > 10 and monotone and moved
    for process in processes:
        process.join(30)
        assert process.exitcode == 0


# ---------------------------------------------------------------- WeightFetcher


def values_of(parameters) -> set[float]:
    return {value for p in parameters.values() for value in p.detach().unique().tolist()}


@pytest.fixture
def plane():
    return WeightPlane(WEIGHTS)


@pytest.fixture
def parameters():
    return {name: torch.nn.Parameter(tensor) for name, tensor in filled(-1.0).items()}


def test_weights_change_only_when_they_are_swapped_in(plane, parameters):
    fetcher = WeightFetcher(plane, parameters, timeout_s=10.0)
    assert not fetcher.swap() and fetcher.version == -1
    began = time.monotonic()
    plane.publish(filled(0.0), 0)
    fetcher.look()
    assert fetcher.full.wait(10) and values_of(parameters) == {
        -1.0
    }  # staged beside the weights in use
    assert fetcher.swap() and fetcher.version == 0 and values_of(parameters) == {0.0}
    assert not fetcher.swap() and not fetcher.full.is_set()
    start, end = fetcher.took  # when they were copied, for the trace
    assert began <= start < end <= time.monotonic()


def test_the_model_s_own_weights_serve_beside_one_spare_block(plane, parameters):
    """Before the first swap and after each, no third copy is in memory."""
    begun = [weakref.ref(p.data.untyped_storage()) for p in parameters.values()]
    fetcher = WeightFetcher(plane, parameters, timeout_s=10.0)
    assert values_of(parameters) == {-1.0} and not any(storage() for storage in begun)
    blocks = {block.ctypes.data for block in fetcher.blocks}
    for version in range(3):
        start = {p.untyped_storage().data_ptr() for p in parameters.values()}
        assert len(start) == 1 and start < blocks and len(blocks) == 2
        plane.publish(filled(version), version)
        fetcher.look()
        assert fetcher.swap(10.0) and values_of(parameters) == {version}


def test_versions_only_rise_and_the_newest_comes(plane, parameters):
    fetcher = WeightFetcher(plane, parameters, timeout_s=10.0)
    seen = []
    for version in range(30):
        plane.publish(filled(version), version)
        fetcher.look()
        if fetcher.swap(0.0 if version % 3 else 10.0):
            assert values_of(parameters) == {fetcher.version}
            seen.append(fetcher.version)
    while fetcher.version < 29:
        assert fetcher.swap(10.0) and values_of(parameters) == {fetcher.version}
        seen.append(fetcher.version)
    assert seen == sorted(set(seen)) and len(seen) > 3


@pytest.mark.parametrize("version", [0, 5])
def test_an_actor_may_take_long_to_start(parameters, version):
    """A timeout judges who has started and falls silent; a resumed run begins at a later
    version."""
    plane = WeightPlane(WEIGHTS, version=version)
    fetcher = WeightFetcher(plane, parameters, timeout_s=0.1)
    assert not fetcher.swap(1.2) and fetcher.version == -1 and values_of(parameters) == {-1.0}
    plane.publish(filled(version), version)
    assert fetcher.swap(10.0) and fetcher.version == version and values_of(parameters) == {version}


def test_a_transfer_that_takes_long_does_not_hold_up_the_next_batch(plane, parameters):
    plane.publish(filled(0.0), 0)
    fetcher = WeightFetcher(plane, parameters, timeout_s=30.0)
    assert fetcher.swap(10.0)
    # version 1 is announced, and its copy never ends
    plane.stamps[1] = -1
    plane.published[0] = 1
    fetcher.look()
    time.sleep(0.1)
    for _ in range(100):
        assert not fetcher.swap()
    assert fetcher.version == 0 and values_of(parameters) == {0.0}
    plane.publish(filled(1.0), 1)
    assert fetcher.swap(10.0) and values_of(parameters) == {1.0}


def test_an_error_of_the_side_thread_reaches_the_worker(plane, parameters):
    plane.publish(filled(0.0), 0)
    plane.published[0] = 1  # announced, never written
    fetcher = WeightFetcher(plane, parameters, timeout_s=0.1)
    fetcher.look()
    with pytest.raises(TimeoutError, match="no weights came"):
        fetcher.swap(10.0)


class Stream:
    """Stands for a CUDA stream, and counts what it waits for."""

    waits = 0

    def wait_stream(self, other):
        self.waits += 1


def test_weights_on_a_gpu_stay_at_their_addresses(monkeypatch):
    """CUDA graphs know them. The next fetch waits for the copy, which is on the serving stream."""
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    plane = WeightPlane(WEIGHTS)
    model = {name: torch.nn.Parameter(x) for name, x in filled(-1.0).items()}
    fetcher = WeightFetcher(plane, model, 5.0)
    # As it is on a GPU: blocks are tensors, and there is a stream.
    fetcher.blocks = [torch.from_numpy(block) for block in fetcher.blocks]
    fetcher.stream = Stream()
    addresses = [p.data_ptr() for p in model.values()]
    for version in range(3):
        plane.publish(filled(version), version)
        fetcher.look()
        assert fetcher.swap(5.0) and fetcher.version == version
        assert fetcher.stream.waits == version + 1
        assert all((p == version).all() for p in model.values())
        assert [p.data_ptr() for p in model.values()] == addresses
