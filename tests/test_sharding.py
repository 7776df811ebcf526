"""Ranks that share the weights (--shard) come to those of one rank that has them all, and to the
same files, with every family, on one node or several; none of them ever holds them all."""

import gc
import json
import os
import signal
import weakref
from collections.abc import Callable, Mapping
from multiprocessing import Pipe, get_context
from pathlib import Path
from unittest.mock import patch

import pytest
import test_gr00t
import test_oft
import torch
import torch.distributed as dist
from conftest import observations, tiny_pi
from safetensors.torch import load_file
from test_actor_worker import Actor, Toy, settings
from test_learner import BATCH, SEGMENT, filled_pool, learner_of, make_episodes, read
from test_pi import to
from torch import nn

import actor_worker
import metrics
from channel import Counters, SlotPool
from config import Config, completed
from errors import UserError
from learner import Learner
from models import checkpoint
from models.pi import Pi
from ranks import Meeting
from saving import write
from sharding import ShardedRanks
from streamer import MicroBatch
from validation import validate

SMALL = {"image_size": 16, "patch": 8, "chunk": 4}


def pi(**changes) -> Pi:
    return tiny_pi(torch.float64, **SMALL | changes)


def half_pi() -> Pi:
    """Its frozen part is in bf16, what is trained in fp32."""
    model = tiny_pi(**SMALL, prefix_dtype="bfloat16", cache_prefix=False)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(model.dtype_of(name))
    return model


def narrow_pi() -> Pi:
    """Its blocks compute in bf16, over weights in fp32."""
    model = tiny_pi(**SMALL, pi05=False, train_vlm=True)
    model.compute = torch.bfloat16
    return model


def seen_by(model: nn.Module, n: int) -> dict[str, torch.Tensor]:
    if isinstance(model, test_gr00t.Gr00t):
        return test_gr00t.observations(model.config, n)
    return (observations if isinstance(model, Pi) else test_oft.observations)(model, n)


# Name → model, and what is special about how it is trained.
CASES: dict[str, tuple[Callable[[], nn.Module], dict]] = {
    "pi05": (lambda: pi(train_vlm=True), {"checkpointing": "on", "proximal": "exact"}),
    "pi0": (
        lambda: pi(pi05=False, noise="network", cache_prefix=False),
        {"cache_prefix": "gpu", "extra_staleness": 1},
    ),
    "gr00t": (
        lambda: test_gr00t.tiny(torch.float64, train_vlm=True),
        {"checkpointing": "on", "micro_batch": 8},
    ),
    "oft": (lambda: test_oft.tiny_oft(torch.float64, train="full"), {"micro_batch": 4}),
    "half": (half_pi, {}),
    "bfloat16": (narrow_pi, {"precision": "bfloat16"}),
    "lora": (lambda: test_oft.tiny_oft(torch.float64), {"algorithm": "grpo", "group_size": 2}),
}

LIMIT = 250  # seconds for the ranks to train all cases
NODES = ("lora",)  # cases that are also trained on two nodes


def model_of(name: str) -> nn.Module:
    model = CASES[name][0]()
    model.header = checkpoint.Header("toy", {}, {})
    return model


def pool_of(model: nn.Module) -> SlotPool:
    """Eight trajectories. The members of the second of four groups all fail."""
    torch.manual_seed(0)
    n = BATCH * SEGMENT
    dtype = next(iter(model.trainable().values())).dtype
    obs = to(dtype, seen_by(model, n))
    drawn = model.draw([(1, i, 0, 0) for i in range(n)], [True] * n)
    with torch.no_grad():
        out = model.act(obs, to(dtype, drawn))
    fields = {name: (obs | out)[name].clone() for name in model.training_fields()}
    whole = {name: x.unflatten(0, (BATCH, SEGMENT)) for name, x in fields.items()}
    pool = filled_pool(model, dtype, whole)
    make_episodes(pool, {0: 1, 4: 2, 7: 0})
    return pool


def config_of(changes: dict) -> Config:
    config = completed(Config(), minibatch=4, update_epochs=2, lr=1e-3, **changes)
    return completed(config, actor_workers=2, run="")


def five_updates(learner: Learner, pool: SlotPool, shares: list[tuple[int, ...]]) -> None:
    """Trains 2 minibatches of 2 epochs, and the first of the next batch. shares: this rank's slots
    of each minibatch, of which two make a micro-batch."""
    for update in range(5):
        share = shares[update % 2]
        epoch = update // 2 % 2
        for first in range(0, len(share), 2):
            slots = share[first : first + 2]
            micro = MicroBatch(slots, epoch, update % 2, first + 2 >= len(share), 4)
            learner.train(read(learner, pool, slots), micro)
        assert actor_worker.finish_minibatch(learner, None, None, meter(0))
        if update == 3:
            learner.finish_batch()


def meter(rank: int) -> metrics.Meter:
    return metrics.Meter(f"actor-{rank}", rank, Counters(2, metrics.columns(0)), None)


# Slots of two minibatches that each rank trains. Of two nodes, the second one has a group that is
# filtered in the first minibatch, and the first one has more passes in the second.
TWO = [[(0, 1, 2), (4, 5, 6)], [(3,), (7,)]]
TWO_GROUPS = [[(0, 1), (4, 5)], [(2, 3), (6, 7)]]  # the second rank has nothing to train at first
FOUR = [[(0,), (4, 5, 6)], [(1,), ()], [(2,), (7,)], [(3,), ()]]


def sharing(number: int, folder: Path, cases: tuple[str, ...], nodes: int) -> None:
    """One of two ranks of a node, which trains cases."""
    torch.set_num_threads(1)
    node, rank = divmod(number, 2)
    place = rank, 2, "cpu", Meeting(folder / "rendezvous-0"), node, nodes
    ranks = ShardedRanks(meter(rank), *place)
    assert dist.get_process_group_ranks(ranks.mesh.get_group()) == list(ranks.of_node)
    for name in cases:
        changes = CASES[name][1]
        model = model_of(name)
        pool = pool_of(model)
        whole = sum(p.numel() for p in model.parameters())
        learner = learner_of(model, config_of(changes), ranks=ranks)
        groups = learner.algorithm.groups
        shares = FOUR if nodes > 1 else TWO_GROUPS if groups else TWO
        sent = {dist.ReduceOp.SUM: 0, dist.ReduceOp.MAX: 0}
        with patch.object(dist, "all_reduce", counting(dist.all_reduce, ranks, sent)):
            five_updates(learner, pool, shares[number])
        acting = one_after_the_other(learner.weights_that_act())
        snapshot = learner.snapshot([]) if ranks.saves else None
        assert (snapshot is None) == (number > 0)
        mine = sum(ranks.part(p).numel() for p in learner.model.parameters())
        found = {"acting": acting, "whole": whole, "mine": mine, "sent": list(sent.values())}
        parts = [ranks.part(p.grad).nbytes for p in learner.parameters if p.grad is not None]
        found["gradients"] = sum(parts)
        if ranks.first:
            write(snapshot, folder / name)
        list(ranks.meet())
        found["resumed"] = resumed(model_of(name), learner, folder / name)
        if ranks.saves:  # what this rank knew before the updates of the running batch
            found["kept"] = learner.before_updates[1]["state"]
        torch.save(found, folder / f"{name}-{number}.pt")
    list(ranks.meet())
    ranks.leave()


def one_after_the_other(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies weights that are gathered, of which no more than two are whole at once: the next one
    is, before the one before it is forgotten."""
    copied = {}
    whole = weakref.WeakSet()
    for key, tensor in weights.items():
        whole.add(tensor)
        assert len(whole) <= 2
        copied[key] = tensor.clone()
    return copied


def counting(all_reduce: Callable, ranks: ShardedRanks, sent: dict) -> Callable:
    """An all_reduce that counts the bytes that go from node to node, by operation."""

    def counted(tensor, op=dist.ReduceOp.SUM, group=None, async_op=False):
        if dist.get_process_group_ranks(group) != list(ranks.of_node):
            sent[op] += tensor.nbytes
        return all_reduce(tensor, op, group, async_op)

    return counted


def resumed(model: nn.Module, learner: Learner, saved: Path) -> dict:
    """What a learner of this rank that is resumed knows of the optimizer."""
    config = completed(learner.config, checkpoint=saved / f"{learner.version:06d}")
    resume = json.loads((config.train.checkpoint / "state.json").read_text())
    return learner_of(model, config, resume=resume, ranks=learner.ranks).on_host()[1]["state"]


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Path:
    return folder_of(tmp_path_factory.mktemp("sharing"), tuple(CASES), 1)


@pytest.fixture(scope="module")
def nodes(tmp_path_factory) -> Path:
    return folder_of(tmp_path_factory.mktemp("nodes"), NODES, 2)


def folder_of(folder: Path, cases: tuple[str, ...], nodes: int) -> Path:
    for name in cases:
        (folder / name).mkdir()
    in_processes(2 * nodes, sharing, folder, cases, nodes)
    return folder


def in_processes(count: int, target: Callable, *arguments) -> None:
    processes = [
        get_context("fork").Process(target=target, args=(number, *arguments))
        for number in range(count)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(LIMIT)
    for process in processes:
        if process.is_alive():
            os.kill(process.pid, signal.SIGABRT)  # by which pytest's processes say where they are
            process.join(5)
        process.kill()  # which does nothing where it has ended
    assert [process.exitcode for process in processes] == [0] * count


def collecting(number: int, folder: Path) -> None:
    gc.collect()


def test_a_rank_leaves_alone_what_it_has_inherited(tmp_path):
    """As a renderer of another test, whose threads did not come along."""

    class Renderer:
        def __del__(self):
            (tmp_path / "ended").touch()

    gc.disable()
    try:
        renderer = Renderer()
        renderer.itself = renderer
        del renderer
        in_processes(1, collecting, tmp_path)
        assert not (tmp_path / "ended").exists()
        gc.collect()
        assert (tmp_path / "ended").exists()
    finally:
        gc.enable()


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_that_share_the_weights_come_to_those_of_one(shared, name):
    """After five updates, in fp64 (fp32 and bf16 to what they can say); also what acts, what is
    saved and what the optimizer knows."""
    found = [torch.load(shared / f"{name}-{rank}.pt", weights_only=True) for rank in range(2)]
    compare_with_one(shared, name, found)


@pytest.mark.parametrize("name", NODES)
def test_two_nodes_of_two_ranks_that_share_the_weights_come_to_those_of_one_rank(nodes, name):
    """Their gradients cross the wire once for every step, and nodes hold the same bits."""
    found = [torch.load(nodes / f"{name}-{number}.pt", weights_only=True) for number in range(4)]
    for node in (found[:2], found[2:]):
        compare_with_one(nodes, name, node)
    for one, twin in zip(found[:2], found[2:], strict=True):
        for key, tensor in one["acting"].items():
            assert torch.equal(tensor, twin["acting"][key])
        assert same(one["resumed"], twin["resumed"])
    for one in found:
        sums, words = one["sent"]
        assert 0 <= sums - 5 * one["gradients"] < 5 * 64 * len(one["acting"])  # they are aligned
        # Whether one stops, who has come, and which weights have their first gradient.
        assert words <= 5 * (8 + 4 + 8 * len(one["acting"]))


def same(known: dict, other: dict) -> bool:
    """Whether two optimizers know the same."""
    equal = [torch.equal(known[n][key], other[n][key]) for n in known for key in known[n]]
    return all(equal) and known.keys() == other.keys() and len(equal) > 0


def compare_with_one(folder: Path, name: str, found: list[dict]) -> None:
    """Compares what the ranks of a node have with one rank alone."""
    near = {"rtol": 1e-3, "atol": 1e-4} if name == "half" else {"rtol": 1e-9, "atol": 1e-9}
    if name == "bfloat16":  # Adam makes a step of lr of any gradient, also of one that is rounding
        near = {"rtol": 0.0, "atol": 5e-3}
    model = model_of(name)
    begun = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    learner = learner_of(model, config_of(CASES[name][1]))
    five_updates(learner, pool_of(model_of(name)), [(0, 1, 2, 3), (4, 5, 6, 7)])
    snapshot = learner.snapshot([])
    assert sum(one["mine"] for one in found) == found[0]["whole"]
    assert max(one["mine"] for one in found) < 0.6 * found[0]["whole"]
    for one in found:
        assert same(one.get("kept", one["resumed"]), one["resumed"])
        assert one["acting"].keys() == learner.trainable.keys()
        for key, tensor in learner.weights_that_act().items():
            torch.testing.assert_close(one["acting"][key], tensor, **near)
    saved = load_file(folder / name / "000004" / "model.safetensors")
    assert saved.keys() == snapshot.weights.keys()
    for key, tensor in snapshot.weights.items():
        torch.testing.assert_close(saved[key], tensor, **near)
    assert any((saved[key] - begun[key]).abs().max() > 1e-3 for key in learner.trainable)

    # One rank alone goes on from those files, too.
    if name == "bfloat16":  # what Adam remembers are gradients
        near = {"rtol": 0.1, "atol": 0.02}
    config = completed(learner.config, checkpoint=folder / name / "000004")
    resume = json.loads((config.train.checkpoint / "state.json").read_text())
    known = learner_of(model_of(name), config, resume=resume).optimizer.state_dict()["state"]
    assert known.keys() == snapshot.optimizer["state"].keys()
    for number, state in snapshot.optimizer["state"].items():
        for key, tensor in state.items():
            torch.testing.assert_close(known[number][key], tensor, **near)


def test_an_interrupt_in_the_midst_of_a_batch_saves_what_was_published(tmp_path):
    """All ranks keep their parts of it, and agree when to stop."""
    folders = [tmp_path / name for name in ("one", "shared")]
    for folder in folders:
        (folder / ".spans").mkdir(parents=True)
    torch.manual_seed(0)
    alone = Actor(folders[0], completed(settings(), iterations=1), Toy())
    torch.manual_seed(0)
    actor = Actor(folders[1], completed(settings(ranks=2), shard=True), Toy())
    alone.run()

    class Stopping(Learner):
        def step(self):
            super().step()
            if (self.version, self.updates) == (1, 1):
                actor.channels.counters.set(0, "stop", 2)

    reports, report = Pipe(duplex=False)
    with patch.object(actor_worker, "Learner", Stopping):
        processes = [
            get_context("fork").Process(target=actor.run_rank, args=(rank, report))
            for rank in range(2)
        ]
        for process in processes:
            process.start()
    try:
        assert reports.poll(60.0) and reports.recv()["version"] == 1
        saved = folders[1] / "checkpoints" / "000001"
        assert reports.poll(60.0)
        assert reports.recv() == {"saved": str(saved), "dropped": 1}
    finally:
        for process in processes:
            process.kill()
            process.join()
    wanted = folders[0] / "checkpoints" / "000001"
    weights = load_file(wanted / "model.safetensors")
    for name, tensor in load_file(saved / "model.safetensors").items():
        torch.testing.assert_close(tensor, weights[name], rtol=1e-9, atol=1e-12)
    kept = torch.load(saved / "optimizer.pt", weights_only=True)["state"]
    known = torch.load(wanted / "optimizer.pt", weights_only=True)["state"]
    assert kept.keys() == known.keys() and len(kept) == 4
    for number, state in known.items():
        for name, tensor in state.items():
            torch.testing.assert_close(kept[number][name], tensor, rtol=1e-9, atol=1e-12)


def test_an_interrupt_on_one_node_stops_all_and_the_first_one_saves(tmp_path):
    """The other one learns of it where nodes meet, at the end of its minibatch."""
    actors = []
    for node in range(2):
        (tmp_path / f"{node}" / ".spans").mkdir(parents=True)
        config = completed(settings(ranks=2), shard=True, node=node, nodes=2)
        torch.manual_seed(0)  # of the weights
        model = Toy()
        torch.manual_seed(node)  # of the data
        actors.append(Actor(tmp_path / f"{node}", config, model))
    actors[1].meeting = actors[0].meeting

    class Stopping(Learner):
        def step(self):
            super().step()
            if (self.version, self.updates) == (1, 1):
                actors[1].channels.counters.set(0, "stop", 2)

    pipes = [Pipe(duplex=False) for _ in actors]
    with patch.object(actor_worker, "Learner", Stopping):
        processes = [
            get_context("fork").Process(target=actor.run_rank, args=(rank, pipe[1]))
            for actor, pipe in zip(actors, pipes, strict=True)
            for rank in range(2)
        ]
        for process in processes:
            process.start()
    try:
        for reports, _ in pipes:
            assert reports.poll(60.0)
            line = reports.recv()
            assert line["version"] == 1 and line["reduce_bytes"] > 0
        saved = tmp_path / "0" / "checkpoints" / "000001"
        assert pipes[0][0].poll(60.0)
        assert pipes[0][0].recv() == {"saved": str(saved), "dropped": 1}
        assert not list((tmp_path / "1" / "checkpoints").iterdir())

        # They wait to be ended, with signs of life.
        signs = [actor.channels.counters.get(r, "time") for actor in actors for r in range(2)]
        assert not pipes[1][0].poll(1.5)
        later = [actor.channels.counters.get(r, "time") for actor in actors for r in range(2)]
        assert all(a < b for a, b in zip(signs, later, strict=True))
    finally:
        for process in processes:
            process.kill()
            process.join()
    weights = load_file(saved / "model.safetensors")
    for plane in (actor.channels.plane for actor in actors):
        block = torch.zeros(plane.bytes, dtype=torch.uint8)
        assert plane.version == plane.fetch(block) == 1
        for name, tensor in plane.tensors(block).items():
            assert torch.equal(tensor, weights[name])


def test_one_rank_alone_cannot_share():
    config = completed(Config(), actor_workers=1, env_workers=1, rollout_workers=1, shard=True)
    with pytest.raises(UserError, match="--shard divides the weights among .* there is one"):
        validate(config)
    validate(completed(config, actor_workers=2))
