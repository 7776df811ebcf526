"""Ranks that share the weights (--shard) come to those of one rank that has them all, and to the
same files, with every family; none of them ever holds them all."""

import json
import weakref
from collections.abc import Callable, Mapping
from multiprocessing import Pipe, get_context
from pathlib import Path
from unittest.mock import patch

import pytest
import test_gr00t
import test_oft
import torch
from conftest import observations, tiny_pi
from safetensors.torch import load_file
from test_actor_worker import Actor, Toy, settings
from test_learner import BATCH, SEGMENT, filled_pool, learner_of, make_episodes, read
from test_pi import to
from torch import nn

import actor_worker
import metrics
from channel import Counters, SlotPool
from config import Config, completed, validate
from errors import UserError
from learner import Learner
from models import checkpoint
from models.pi import Pi
from ranks import Meeting
from saving import write
from sharding import ShardedRanks
from streamer import MicroBatch

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
        while (passes := learner.ranks.plan(0, through=True)) is not None:
            learner.train_nothing(passes)
        learner.step()
        if update == 3:
            learner.finish_batch()


def meter(rank: int) -> metrics.Meter:
    return metrics.Meter(f"actor-{rank}", rank, Counters(2, metrics.columns(0)), None)


def sharing(rank: int, folder: Path) -> None:
    """One of two ranks, which trains every case."""
    torch.set_num_threads(1)
    ranks = ShardedRanks(meter(rank), rank, 2, "cpu", Meeting(folder / "rendezvous-0"))
    for name, (_, changes) in CASES.items():
        model = model_of(name)
        pool = pool_of(model)
        whole = sum(p.numel() for p in model.parameters())
        learner = learner_of(model, config_of(changes), ranks=ranks)
        groups = learner.algorithm.groups
        # The second rank has fewer trajectories, or nothing to train in the first minibatch.
        shares = [[(0, 1, 2), (4, 5, 6)], [(3,), (7,)]][rank]
        if groups:
            shares = [[(0, 1), (4, 5)], [(2, 3), (6, 7)]][rank]
        five_updates(learner, pool, shares)
        acting = one_after_the_other(learner.weights_that_act())
        snapshot = learner.snapshot([])
        assert (snapshot is None) == (rank == 1)
        mine = sum(ranks.part(p).numel() for p in learner.model.parameters())
        found = {"acting": acting, "whole": whole, "mine": mine}
        if rank == 0:
            write(snapshot, folder / name)
        list(ranks.meet())
        found["again"] = again(model_of(name), learner, folder / name)
        torch.save(found, folder / f"{name}-{rank}.pt")
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


def again(model: nn.Module, learner: Learner, saved: Path) -> bool:
    """Whether a learner of this rank that is resumed knows of the optimizer what was saved: what
    this one knew before the updates of the running batch."""
    config = completed(learner.config, checkpoint=saved / f"{learner.version:06d}")
    resume = json.loads((config.train.checkpoint / "state.json").read_text())
    other = learner_of(model, config, resume=resume, ranks=learner.ranks)
    ours = learner.kept[1]["state"]
    theirs = other.on_host()[1]["state"]
    same = [torch.equal(ours[n][key], theirs[n][key]) for n in ours for key in ours[n]]
    return all(same) and ours.keys() == theirs.keys() and len(same) > 0


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sharing")
    for name in CASES:
        (folder / name).mkdir()
    in_two_processes(sharing, folder)
    return folder


def in_two_processes(target: Callable, *arguments) -> None:
    processes = [
        get_context("fork").Process(target=target, args=(rank, *arguments)) for rank in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(250)
        process.kill()  # which does nothing where it has ended
        assert process.exitcode == 0


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_that_share_the_weights_come_to_those_of_one(shared, name):
    """After five updates, in fp64 (fp32 and bf16 to what they can say); also what acts, what is
    saved and what the optimizer knows."""
    near = {"rtol": 1e-3, "atol": 1e-4} if name == "half" else {"rtol": 1e-9, "atol": 1e-9}
    if name == "bfloat16":  # Adam makes a step of lr of any gradient, also of one that is rounding
        near = {"rtol": 0.0, "atol": 5e-3}
    model = model_of(name)
    begun = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    learner = learner_of(model, config_of(CASES[name][1]))
    five_updates(learner, pool_of(model_of(name)), [(0, 1, 2, 3), (4, 5, 6, 7)])
    snapshot = learner.snapshot([])
    found = [torch.load(shared / f"{name}-{rank}.pt", weights_only=True) for rank in range(2)]
    assert sum(one["mine"] for one in found) == found[0]["whole"]
    assert max(one["mine"] for one in found) < 0.6 * found[0]["whole"]
    for one in found:
        assert one["again"]
        assert one["acting"].keys() == learner.trainable.keys()
        for key, tensor in learner.weights_that_act().items():
            torch.testing.assert_close(one["acting"][key], tensor, **near)
    saved = load_file(shared / name / "000004" / "model.safetensors")
    assert saved.keys() == snapshot.weights.keys()
    for key, tensor in snapshot.weights.items():
        torch.testing.assert_close(saved[key], tensor, **near)
    assert any((saved[key] - begun[key]).abs().max() > 1e-3 for key in learner.trainable)

    # One rank alone goes on from those files, too.
    if name == "bfloat16":  # what Adam remembers are gradients
        near = {"rtol": 0.1, "atol": 0.02}
    config = completed(learner.config, checkpoint=shared / name / "000004")
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


def test_one_rank_alone_cannot_share():
    config = completed(Config(), actor_workers=1, env_workers=1, rollout_workers=1, shard=True)
    with pytest.raises(UserError, match="--shard divides the weights among .* there is one"):
        validate(config)
    validate(completed(config, actor_workers=2))
