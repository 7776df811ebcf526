"""Copies between slots and a device that is not there: what travels, in which pieces, who waits.

A device named "cpu:0" is one to transfers.py, and computes here. The device "meta" has no memory:
there the copies and the waits of whole stages are counted.
"""

import contextlib
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from conftest import tiny_pi
from test_actor_worker import Actor, Toy, settings
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import models
import transfers
from algorithms import by_staleness
from channel import ACT, EVAL, FINAL, VALUE, Record, SlotPool
from config import Config
from envs import EnvSpec
from learner import Learner
from models.compiled import random_observations
from models.gr00t import Gr00t, Gr00tConfig
from models.oft import Oft, OftConfig
from models.pi import Pi, PiConfig
from prepare import common_fields
from ranks import Meeting, Ranks
from rollout_worker import serve
from streamer import MicroBatch
from tally import Tally
from transfers import Carrier, bring_back, gather, lock, read, runs
from weights import WeightPlane

SEGMENT = 3


class Stream:
    """Stands for a stream and for an event of it."""

    waits: list[str] = []  # what made the host wait

    def __init__(self, *_, **__):
        pass

    def record_event(self):
        return Stream()

    def record(self, _):
        pass

    def wait_event(self, _):
        pass  # the device waits, not the host

    def synchronize(self):
        Stream.waits.append("synchronize")


class Watch(TorchDispatchMode):
    """Notes everything that makes the host wait for the device "meta", and every copy between the
    two."""

    ASKS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal", "is_nonzero")
    ASKS += ("masked_scatter_backward",)  # it selects by a mask

    def __init__(self):
        super().__init__()
        self.locked: set[int] = set()  # where page-locked memory begins
        self.kept: list[torch.Tensor] = []  # so that no address comes twice
        self.sent = 0
        self.back = 0

    def page_locked(self, shape, dtype) -> torch.Tensor:
        tensor = torch.zeros(shape, dtype=dtype)
        self.kept.append(tensor)
        self.locked.add(tensor.data_ptr())
        return tensor

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function._schema.name.removeprefix("aten::")
        tensors = [x for x in args if isinstance(x, torch.Tensor)]
        there = any(x.is_meta for x in tensors)
        if there and name in self.ASKS:
            Stream.waits.append(name)
            assert name == "_local_scalar_dense", f"{name} waits for the device"
            return 1.0
        if there and name in ("index", "index_put_"):
            masks = [i for i in args[1] if i is not None and i.dtype is torch.bool]
            assert not masks, "an index of bools waits for the device"
        if name in ("copy_", "_to_copy"):
            into = torch.device(kwargs.get("device") or args[0].device)
            source = args[1] if name == "copy_" else args[0]
            into = args[0].device if name == "copy_" else into
            async_ = kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2])
            if (into.type == "meta") != source.is_meta:
                here = args[0] if source.is_meta else source
                assert async_, f"a copy from {source.device} to {into} waits for the device"
                assert here.data_ptr() in self.locked, "a copy of pageable memory waits"
                if source.is_meta:
                    self.back += 1
                    return args[0]
                self.sent += 1
        return function(*args, **kwargs)


class Lists(TorchFunctionMode):
    """Refuses numbers that travel to the device as a list: they would from pageable memory."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        makes = function in (torch.tensor, torch.as_tensor, torch.Tensor.new_tensor)
        there = isinstance(made, torch.Tensor) and made.is_meta
        assert not (makes and there), f"{function.__name__} waits for the device"
        if function is torch.Tensor.__getitem__ and there:
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            assert not any(isinstance(i, list) for i in index), "a list waits for the device"
        return made


@pytest.fixture
def watch():
    """Streams that are not there, and page-locked memory that is known."""
    Stream.waits = []
    found = Watch()
    with contextlib.ExitStack() as stack:
        for name in ("Stream", "Event"):
            stack.enter_context(patch.object(torch.cuda, name, Stream))
        stack.enter_context(patch.object(torch.cuda, "current_stream", Stream))
        stack.enter_context(patch.object(torch.cuda, "stream", lambda _: contextlib.nullcontext()))
        stack.enter_context(patch.object(torch.Tensor, "record_stream", lambda *_: None))
        stack.enter_context(patch.object(transfers, "page_locked", found.page_locked))
        yield found


# ---------------------------------------------------------------- pieces


def random_pool(locked: tuple[str, ...] = ()) -> SlotPool:
    spec = {
        "half": ((4, 2), torch.bfloat16),
        "flag": ((4,), torch.bool),
        "x": ((5, 3), torch.int32),
    }
    pool = SlotPool(spec, 6)
    for name in spec:
        pool[name].copy_(torch.randint(0, 2 if name == "flag" else 99, pool[name].shape))
    pool.locked = frozenset(locked)
    return pool


def test_rows_that_lie_side_by_side_are_one_copy():
    assert runs(np.array([7])) == [(slice(0, 1), slice(7, 8))]
    found = runs(np.array([4, 5, 6, 2, 3, 9]))
    assert found == [
        (slice(0, 3), slice(4, 7)),
        (slice(3, 5), slice(2, 4)),
        (slice(5, 6), slice(9, 10)),
    ]


@pytest.mark.parametrize("locked", [(), ("half", "flag", "x")])
def test_what_comes_to_the_device_is_what_the_slots_hold(watch, locked):
    pool = random_pool(locked)
    slots = np.array([5, 0, 1, 1])
    rows = np.array([3, 0, 1, 2])
    found = read(pool, tuple(pool.spec), slots, rows, "cpu:0")
    for name in pool.spec:
        assert found[name].dtype is pool[name].dtype
        assert torch.equal(found[name], pool[name][slots, rows])
        found[name].zero_()
        assert pool[name].any()  # it is a copy
    assert not Stream.waits


@pytest.mark.parametrize("locked", [(), ("half",)])
def test_results_come_back_at_once_or_lie_in_their_slots(watch, locked):
    pool = random_pool(locked)
    before = pool["half"].clone()
    results = {"half": torch.rand(3, 2).bfloat16(), "small": torch.rand(3)}
    slots = np.array([4, 2, 0])
    rows = np.array([1, 0, 3])
    found = bring_back(pool, results, [0, 2], slots, rows, "cpu:0")
    assert Stream.waits == ["synchronize"] and torch.equal(found["small"], results["small"])
    assert ("half" in found) == (not locked)
    for i in (0, 2) if locked else ():
        before[slots[i], rows[i]] = results["half"][i]
    assert torch.equal(pool["half"], before)


def test_large_fields_are_page_locked_by_whole_pages(monkeypatch):
    """Fields side by side are one range: a copy may not reach over the end of one."""
    page = 4096
    spec = {
        "small": ((2, 100), torch.uint8),
        "first": ((2, 70_000), torch.uint8),
        "second": ((2, 20_000), torch.float32),
        "between": ((2, 60_000), torch.uint8),
        "third": ((2, 70_000), torch.uint8),
        "unused": ((2, 70_000), torch.uint8),
    }
    pool = SlotPool(spec, 3)
    ranges = []
    error = [0]

    class Cudart:
        def cudaHostRegister(self, address, size, flags):
            ranges.append((address, size))
            return error[0]

    monkeypatch.setattr(torch.cuda, "cudart", Cudart)
    names = ("small", "first", "second", "between", "third")
    lock(pool, names, "cpu")
    assert not ranges and not pool.locked
    lock(pool, names, "cuda:0")
    assert pool.locked == {"first", "second", "third"}
    assert all(start % page == size % page == 0 for start, size in ranges) and len(ranges) == 2
    for names, (start, size) in zip((("first", "second"), ("third",)), ranges, strict=True):
        for name in names:
            address = pool[name].data_ptr()
            assert start <= address and address + pool[name].nbytes <= start + size
    assert sum(size for _, size in ranges) < 3 * 2 * 220_000 + 4 * page
    error[0] = 2
    with pytest.raises(RuntimeError, match="failed with error 2: raise `ulimit -l`"):
        lock(pool, ("first",), "cuda:0")


def test_a_carrier_gives_the_same_trajectories_ahead_or_at_once(watch):
    pool = random_pool(("half",))
    here = Carrier(pool, ("half", "x"), 4, "cpu")
    there = Carrier(pool, ("half", "x"), 4, "cpu:0")
    assert (here.ahead, there.ahead) == (False, True)
    there.begin((1, 2, 5))
    for slots in ((1, 2, 5), (0, 3)):  # the second ones were not on their way
        found = there.take(slots)
        for name, wanted in here.take(slots).items():
            assert torch.equal(found[name], wanted[:, :4])
            assert torch.equal(wanted, pool[name][list(slots)])
    assert not there.tensors and not Stream.waits


# ---------------------------------------------------------------- numbers


def test_numbers_of_a_device_are_those_of_the_host(watch):
    """They come in the order in which they were added, one micro-batch late."""
    host, device = Tally(), Tally()
    with watch:
        for value in (0.1, 0.7, 0.3):
            for tally, where in ((host, "cpu"), (device, "meta")):
                tally.add("sum", torch.full((), value, device=where))
                tally.add("most", torch.full((), 3, device=where), "max")
                tally.add("plain", value, "part")
                tally.send()
        assert host.values["sum"] == float(torch.tensor(0.1)) + float(torch.tensor(0.7)) + float(
            torch.tensor(0.3)
        )
        assert len(Stream.waits) == 2 and len(device.sent) == 1
        assert device.values["plain"] == host.values["plain"]
        device.resolve()
    assert len(Stream.waits) == 3 and watch.back == 3
    assert list(device.values) == ["plain", "sum", "most"] and not device.sent
    with pytest.raises(ValueError, match="as a max and as a sum"):
        device.add("sum", torch.zeros((), device="meta"), "max")


def test_numbers_of_staleness_buckets_are_of_their_samples():
    new = torch.randn(40, 3)
    old = torch.randn(40, 3)
    staleness = torch.randint(0, 5, (40,)).float()
    found = by_staleness(new, old, staleness)
    for i, name in enumerate(("0", "1", "2", "3_or_more")):
        here = staleness.clamp(max=3) == i
        assert found[f"samples_at_{name}"] == here.sum()
        torch.testing.assert_close(
            found[f"ratio_at_{name}"], (new - old).exp().mean(1)[here].sum(), rtol=1e-6, atol=0
        )


# ---------------------------------------------------------------- whole stages

FAMILIES = {
    "pi0": lambda: Pi(PiConfig(pi05=False)),
    "pi05": lambda: Pi(PiConfig()),
    "pi05 recomputed": lambda: Pi(PiConfig(cache_prefix=False)),
    "pi05 vlm": lambda: Pi(PiConfig(train_vlm=True)),
    "pi05 flow-noise": lambda: Pi(PiConfig(noise="network")),
    "gr00t": lambda: Gr00t(Gr00tConfig()),
    "gr00t vlm": lambda: Gr00t(Gr00tConfig(train_vlm=True)),
    "oft": lambda: Oft(OftConfig(center_crop=True)),
}


def slots_of(model, slots: int) -> SlotPool:
    """Slots as `prepare.slot_spec` lays them out, of which pictures and a prefix are large."""
    spec = common_fields(SEGMENT, *model.config.played) | {"final": ((SEGMENT,), torch.float32)}
    for rows, fields in (
        (SEGMENT + 1, model.observation_fields()),
        (SEGMENT, model.slot_fields()),
    ):
        spec |= {name: ((rows, *shape), dtype) for name, (shape, dtype) in fields.items()}
    pool = SlotPool(spec, slots)
    for name, x in random_observations(model, slots * (SEGMENT + 1), "cpu").items():
        pool[name].copy_(x.unflatten(0, (slots, SEGMENT + 1)))
    pool["length"].fill_(SEGMENT)
    return pool


def without_memory(family: str, watch: Watch):
    """A small model on a device without memory, and slots that are copied straight."""
    with torch.device("meta"):
        model = FAMILIES[family]().to("meta")
    pool = slots_of(model, 8)
    large = {"image", "prefix_cache", "vl_features"} & pool.spec.keys()
    pool.locked = frozenset(large)
    for name in large:
        rows = pool[name].flatten(0, 1)
        watch.locked |= {row.data_ptr() for row in rows}
    return model, pool


@pytest.mark.parametrize("family", FAMILIES)
def test_an_inference_waits_once_and_copies_no_pageable_memory(family, watch):
    model, pool = without_memory(family, watch)
    kinds = (ACT, ACT, VALUE, EVAL, FINAL)
    records = [Record(slot, 1, kind, 0, 0) for slot, kind in enumerate(kinds)]
    with watch, Lists():
        serve(model, records, pool, seed=1, version=2, device="meta")
    assert Stream.waits == ["synchronize"]
    # Every sample's pictures, and one copy of whatever else it sees or draws.
    small = len(model.observation_fields()) - 1 + len(model.draw([(0, 0, 0, 0)], [True]))
    assert watch.sent == len(records) + small
    kept = len(pool.locked) - 1  # what a slot keeps of the frozen VLM, of two samples
    assert watch.back == 2 * kept + len(model.slot_fields()) - kept + 3


@pytest.mark.parametrize("family", FAMILIES)
def test_a_micro_batch_waits_once_and_copies_no_pageable_memory(family, watch):
    model, pool = without_memory(family, watch)
    config = Config()
    config.env.segment = SEGMENT
    config.actor.micro_batch = 4
    config.actor.minibatch = config.actor.batch
    config.actor.update_epochs = 1
    spec = EnvSpec(("push",), ("push it",), 1, 64, 4, 4, 60)
    with patch.object(models, "build", return_value=model):
        learner = Learner(config, spec, "meta", Ranks(0, 1, "meta", Meeting(Path())), None)
    with patch.object(transfers, "lock"):
        carrier = Carrier(pool, learner.device_fields, SEGMENT, "meta")
    pool["length"][3] = 2  # one of them is not trained on whole
    with watch, Lists():
        for i, slots in enumerate(((0, 1, 2), (3, 5))):
            data = {name: gather(pool, name, np.array(slots)) for name in learner.host_fields}
            sent = watch.sent
            carrier.begin(slots)
            large = [name for name in learner.device_fields if name in pool.locked]
            runs_of_slots = 1 + i if "image" not in large else 3 - i
            assert watch.sent - sent == runs_of_slots * len(large) + len(
                learner.device_fields
            ) - len(large)
            Stream.waits = []
            learner.train(data | carrier.take(slots), MicroBatch(slots, 0, 0, i == 1, 5))
            assert Stream.waits == ["synchronize"] * i  # for the numbers of the one before
        Stream.waits = []
        with patch.object(learner.optimizer, "step"):  # fused, which needs a device with memory
            learner.step()
        assert Stream.waits == ["_local_scalar_dense"]  # whether the gradient is finite


def test_serving_through_a_device_gives_the_same_slots(watch):
    """Bit for bit, whether a field goes straight or not."""
    model = tiny_pi(image_size=16, patch=8, chunk=4)
    records = [Record(s, 1, kind, 0, 0) for s, kind in enumerate((ACT, VALUE, EVAL, ACT, FINAL))]
    pools = []
    for device, locked in (("cpu", ()), ("cpu:0", ()), ("cpu:0", ("image", "prefix_cache"))):
        torch.manual_seed(0)
        pool = slots_of(model, 8)
        pool.locked = frozenset(locked)
        serve(model, records, pool, seed=1, version=2, device=device)
        pools.append(pool)
    for name in pools[0].spec:
        for pool in pools[1:]:
            assert torch.equal(pool[name], pools[0][name]), name


@pytest.mark.parametrize("kl_stop", [0.0, 1e-9, 1e9])
@pytest.mark.parametrize("minibatch, micro_batch", [(16, 9), (4, 4), (4, 64)])
def test_training_ahead_is_the_same_training(
    watch, tmp_path, monkeypatch, kl_stop, minibatch, micro_batch
):
    """Micro-batches come in the same order and each as often, also where --kl-stop ends a batch."""
    monkeypatch.setattr(WeightPlane, "use_on", lambda *_: None)
    late = []  # slots that were not on their way when they were to be trained
    take = Carrier.take

    def taken(carrier, slots):
        late.extend([slots] if carrier.ahead and carrier.slots != slots else [])
        return take(carrier, slots)

    monkeypatch.setattr(Carrier, "take", taken)
    found = []
    for device in ("cpu", "cpu:0"):
        config = settings()
        config.actor.micro_batch = micro_batch
        config.actor.minibatch = minibatch
        config.actor.update_epochs = 3
        config.algorithm.kl_stop = kl_stop
        torch.manual_seed(0)
        (folder := tmp_path / device).mkdir()
        actor = Actor(folder, config, Toy())
        actor.device = device
        *lines, end = actor.run()
        found.append((lines, end, actor.published()))
    for line, same in zip(found[0][0], found[1][0], strict=True):
        assert {n for n, x in line.items() if x != same[n]} == {"time", "samples_per_s"}
    assert found[0][1] == found[1][1] and found[0][0][0]["skipped"] == (kl_stop == 1e-9) * 96
    for name, weight in found[0][2].items():
        assert torch.equal(weight, found[1][2][name])
    # The first micro-batch of a batch; where a step may be the last one, of every minibatch.
    minibatches = 2 * 16 // minibatch
    assert len(late) == {0.0: 2, 1e-9: minibatches, 1e9: 3 * minibatches}[kl_stop]
