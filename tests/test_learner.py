"""A streamed gradient is the batch's; a new loss changes nothing else; checkpoints are whole."""

import json
import math
from pathlib import Path
from unittest.mock import Mock, patch

import numpy as np
import pytest
import torch
from conftest import observations, tiny_pi
from torch import nn

import algorithms
import models
import saving
import transfers
from actor_worker import group_outcomes
from algorithms import AdvantageScale, Algorithm, Samples, Targets, gae
from channel import SlotPool
from config import Config
from envs import EnvSpec
from epochs import ExactProximal
from errors import UserError
from learner import Learner, schedule
from metrics import Ledger
from models import checkpoint
from models.formats import source
from policy_loss import CORRECTIONS, LARGEST
from ranks import Meeting, Ranks
from report import flatten
from saving import write
from scheduler import Admission
from streamer import MicroBatch, Streamer
from tally import Tally

BATCH = 8
SEGMENT = 5
SPEC = EnvSpec(("push", "reach"), ("push it", "reach it"), 1, 16, 4, 4, 60)


class Toy(nn.Module):
    """The smallest policy: log-probs (of 2 actions of 3 numbers) and value are linear in what was
    seen."""

    header = checkpoint.Header("toy", {}, {})

    def __init__(self):
        super().__init__()
        self.policy = nn.Linear(6, 6).double()
        self.head = nn.Linear(6, 1).double()

    def training_fields(self):
        return ("seen",)

    def evaluate(self, batch):
        policy = self.policy(batch["seen"]).unflatten(1, (2, 3))
        value = self.head(batch["seen"])[:, 0]
        return {"logprob": policy, "value": value, "entropy": policy.detach().mean()}

    def trainable(self):
        return dict(self.named_parameters())

    def critic(self):
        return {"head.weight": self.head.weight, "head.bias": self.head.bias}

    def idle(self):
        return ()


def filled_pool(model, dtype, fields: dict) -> SlotPool:
    """Eight random trajectories with successes, time limits, stale versions and log-probs near the
    model's own."""
    spec = {name: (tuple(x.shape[1:]), x.dtype) for name, x in fields.items()}
    t = (SEGMENT,)
    spec |= {"reward": (t, dtype), "value": ((SEGMENT + 1,), dtype), "version": (t, torch.int32)}
    flat = {name: fields[name][:, :SEGMENT].flatten(0, 1) for name in model.training_fields()}
    with torch.no_grad():
        logprob = model.evaluate(flat)["logprob"].unflatten(0, (BATCH, SEGMENT))  # [B, T, C, A]
    spec |= {"logprob": (tuple(logprob.shape[1:]), dtype)}
    spec |= {name: (t, torch.bool) for name in ("success", "terminated", "truncated")}
    spec |= {"task": ((), torch.int32), "length": ((), torch.int32)}
    pool = SlotPool(spec, BATCH)
    for name, x in fields.items():
        pool[name].copy_(x)
    pool["task"].copy_(torch.arange(BATCH) % 2)
    pool["length"].fill_(SEGMENT)
    end = torch.randint(0, 5, (BATCH, SEGMENT))
    pool["success"].copy_(end == 0)
    pool["terminated"].copy_(end == 0)
    pool["truncated"].copy_(end == 1)
    pool["reward"].copy_(end == 0)
    pool["value"].copy_(torch.randn(BATCH, SEGMENT + 1))
    pool["version"].copy_(torch.randint(1, 4, (BATCH, SEGMENT)))
    pool["logprob"].copy_(logprob + 0.3 / logprob[0, 0].numel() ** 0.5 * torch.randn_like(logprob))
    return pool


def toy_pool(model) -> SlotPool:
    seen = torch.randn(BATCH, SEGMENT, 6, dtype=torch.float64)
    return filled_pool(model, torch.float64, {"seen": seen})


def make_episodes(pool: SlotPool, won: dict[int, int]) -> None:
    """Makes every trajectory one episode. won: the step at which each of these slots succeeds; all
    others are cut at the end."""
    for name in ("success", "terminated", "truncated"):
        pool[name].zero_()
    pool["truncated"][:, SEGMENT - 1] = True
    pool["length"].fill_(SEGMENT)
    for slot, step in won.items():
        pool["success"][slot, step] = pool["terminated"][slot, step] = True
        pool["truncated"][slot, SEGMENT - 1] &= step != SEGMENT - 1
        pool["length"][slot] = step + 1


def learner_of(
    model, config: Config | None = None, spec=SPEC, resume=None, ranks: Ranks | None = None
) -> Learner:
    """A learner alone, which trains batch 3 with scaled advantages."""
    config = config or Config()
    config.actor.batch = BATCH
    config.env.segment = SEGMENT
    if config.actor.micro_batch == "auto":
        config.actor.micro_batch = BATCH * SEGMENT
    with patch.object(models, "build", return_value=model):
        learner = Learner(config, spec, "cpu", ranks or Ranks(0, 1, "cpu", Meeting(Path())), resume)
    if resume is None:
        learner.version = 3
        learner.algorithm.advantage_scale = AdvantageScale(0.8, 0.7)
    return learner


def read(learner: Learner, pool: SlotPool, slots: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """The trajectories of a micro-batch, as `actor_worker.Inbox` reads them."""
    slots = np.array(slots)
    data = {name: transfers.gather(pool, name, slots) for name in learner.fields}
    if learner.algorithm.groups:
        size = learner.config.algorithm.group_size
        data["outcomes"] = group_outcomes(pool, slots, size, learner.spec.compares)
        data["member"] = torch.from_numpy(slots % size)
    return data


def gradients(
    model, pool: SlotPool, groups: list[tuple[int, ...]], config: Config | None = None
) -> tuple[list[torch.Tensor], dict[str, float]]:
    """Accumulated over one micro-batch per group of slots; and what was tallied of them."""
    config = config or Config()
    config.actor.minibatch = BATCH
    model.zero_grad()
    learner = learner_of(model, config)
    for slots in groups:
        micro = MicroBatch(slots, 0, 0, slots is groups[-1], config.actor.minibatch)
        learner.train(read(learner, pool, slots), micro)
    assert sum(learner.steps.values()) == learner.tally.get("trained")
    return [p.grad.clone() for p in model.parameters() if p.grad is not None], learner.tally.values


def streamed(order: np.ndarray, stream: bool = True, group: int = 1) -> list[tuple[int, ...]]:
    """The micro-batches of two trajectories that a streamer makes when they arrive in this
    order."""
    admission = Admission(BATCH, BATCH, 0, group=group)
    streamer = Streamer(admission, 1, 2, 1, stream, 0, 1, seed=1, version=0)
    groups = []
    for slot in order:
        streamer.add(int(slot))
        while (micro := streamer.next()) is not None:
            groups.append(micro.slots)
    assert len(groups) == 4
    return groups


def close(a: list[torch.Tensor], b: list[torch.Tensor], relative: float) -> bool:
    a, b = (torch.cat([x.flatten() for x in one]) for one in (a, b))
    return bool((a - b).norm() <= relative * b.norm()) and b.norm() > 0


@pytest.mark.parametrize("seed", range(5))
def test_streamed_gradient_is_the_full_batch_gradient_in_fp64(seed):
    torch.manual_seed(seed)
    model = Toy()
    pool = toy_pool(model)
    whole, stats = gradients(model, pool, [tuple(range(BATCH))])
    order = np.random.default_rng(seed).permutation(BATCH)
    parts, sums = gradients(model, pool, streamed(order, stream=seed % 2 == 0))
    assert close(parts, whole, 1e-6)  # measured: 1e-16
    assert sums == pytest.approx(stats, rel=1e-9) and sums["trained"] == BATCH * SEGMENT
    assert sums["trained_once"] == sums["trained"]
    assert sums["masked_fraction"] == sums["filtered"] == 0 and sums["staleness_max"] == 2
    assert sums["successes_0"] + sums["successes_1"] == pool["reward"].sum()
    less, _ = gradients(model, pool, streamed(order)[1:])
    assert not close(less, whole, 1e-2)  # the comparison can fail

    # Trajectories of five chunk steps are cut into passes of one, three and seven.
    for most in (1, 3, 7):
        config = Config()
        config.actor.micro_batch = most
        with patch.object(Toy, "evaluate", side_effect=model.evaluate) as evaluate:
            parts, sums = gradients(model, pool, streamed(order), config)
        sizes = [len(call.args[0]["seen"]) for call in evaluate.call_args_list]
        assert sizes == [most] * (BATCH * SEGMENT // most) + [BATCH * SEGMENT % most] * (most > 1)
        assert close(parts, whole, 1e-12) and sums == pytest.approx(stats, rel=1e-9)


@pytest.mark.parametrize("granularity", ["chunk", "token"])
def test_streamed_gradient_of_groups_is_the_full_batch_gradient(granularity):
    config = Config()
    config.train.algorithm = "grpo"
    config.algorithm.group_size = 4
    config.algorithm.granularity = granularity
    model = Toy()
    pool = toy_pool(model)
    make_episodes(pool, {0: 1, 3: 4, 6: 0})  # 2 of the first group succeed, 1 of the second
    whole, stats = gradients(model, pool, [tuple(range(BATCH))], config)
    groups = streamed(np.random.default_rng(0).permutation(BATCH), group=4)
    assert all(
        len({slot // 4 for slot in slots}) == 1 for slots in groups
    )  # whole groups, one after the other
    parts, sums = gradients(model, pool, groups, config)
    assert close(parts[:2], whole[:2], 1e-6) and sums == pytest.approx(stats, rel=1e-6)
    assert sums["trained"] == 6 * SEGMENT + 2 + 1  # rows after an episode's end are not trained
    assert (
        sums["episodes_0"] + sums["episodes_1"] == BATCH
        and sums["successes_0"] + sums["successes_1"] == 3
    )
    assert not parts[2:] or not any(p.any() for p in parts[2:])  # no critic

    make_episodes(pool, {0: 1, 3: 4})  # the second group fails as one
    less, sums = gradients(model, pool, groups, config)
    alone, _ = gradients(model, pool, [(0, 1, 2, 3)], config)
    assert close(less[:2], alone[:2], 1e-9) and sums["filtered"] == 4 * SEGMENT


def updates(
    pool: SlotPool, order: list[int], micro_batch: int, epochs: int, config: Config
) -> list[torch.Tensor]:
    """The gradient of every optimizer step over a batch of two minibatches whose trajectories
    arrive in this order."""
    torch.manual_seed(1)
    model = Toy()
    config.actor.minibatch = BATCH // 2
    config.actor.update_epochs = epochs
    learner = learner_of(model, config)
    group = config.algorithm.group_size if learner.algorithm.groups else 1
    found = []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    admission = Admission(BATCH, BATCH, 0, group=group)
    streamer = Streamer(admission, 2, micro_batch, epochs, True, 0, 1, seed=1, version=0)
    for slot in order:
        streamer.add(slot)
        while (micro := streamer.next()) is not None:
            learner.train(read(learner, pool, micro.slots), micro)
            if micro.last:
                grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
                found.append(torch.cat(grads).clone())
                optimizer.step()
                optimizer.zero_grad()
    learner.finish_batch()  # it counts: every chunk step once an epoch
    return found


def test_other_ranks_hear_of_the_last_pass_of_a_minibatch_before_it_begins(monkeypatch):
    model = Toy()
    learner = learner_of(model, Config())
    learner.config.actor.micro_batch = SEGMENT
    learner.ranks.several = True
    told = []
    monkeypatch.setattr(learner, "train_rows", lambda *_: told.append("pass"))
    monkeypatch.setattr(learner.gradients, "expect", lambda: told.append("expect"))
    data = toy_pool(model)
    for last in (False, True):
        micro = MicroBatch((0, 1, 2), 0, 0, last, learner.config.actor.minibatch)
        learner.train(read(learner, data, micro.slots), micro)
    assert told == ["pass"] * 5 + ["expect", "pass"]


def part_of(pool: SlotPool, slots: np.ndarray) -> SlotPool:
    """Returns the slots of a node that has these lanes of all."""
    part = SlotPool(pool.spec, len(slots))
    for name in pool.spec:
        part[name].copy_(pool[name][torch.from_numpy(slots)])
    return part


def minibatches_of(streamer: Streamer) -> list[list[MicroBatch]]:
    """Lists the micro-batches of each optimizer step of a batch."""
    found = [[]]
    for slot in sorted(streamer.mine):
        streamer.add(slot)
    while (micro := streamer.next()) is not None:
        found[-1].append(micro)
        if micro.last:
            found.append([])
    return found[:-1]


@pytest.mark.parametrize(
    "algorithm, group, minibatches, correction",
    [
        ("ppo", 1, 1, "mask"),
        ("ppo", 1, 2, "mask"),
        ("ppo", 1, 3, "m2po"),
        ("grpo", 2, 1, "mask"),
        ("grpo", 2, 2, "m2po"),
    ],
)
def test_the_gradients_of_two_nodes_sum_to_those_of_one(algorithm, group, minibatches, correction):
    """Of every minibatch, also of later epochs and once weights have moved; and the numbers that
    all nodes tally make the line that one node writes, and scale the next advantages alike."""
    epochs = 2
    torch.manual_seed(1)
    pool = toy_pool(Toy())
    if algorithm == "grpo":
        make_episodes(pool, {0: 1, 3: 4, 5: 0})

    def learner(batch: int, nodes: int) -> Learner:
        torch.manual_seed(2)
        config = Config()
        config.train.algorithm = algorithm
        config.algorithm.group_size = 2
        config.algorithm.behaviour_weight = correction
        config.actor.update_epochs = epochs
        found = learner_of(Toy(), config)
        config.actor.batch = batch
        config.train.nodes = nodes
        return found

    # One node whose two ranks are trained one after the other, and two nodes of one rank each.
    half = BATCH // 2
    one = learner(BATCH, 1)
    both = [learner(half, 2) for _ in range(2)]
    whole = Admission(BATCH, BATCH, 0, group=group)
    parts = [Admission(half, half, 0, group=group, node=n, nodes=2) for n in range(2)]
    pools = [part_of(pool, part.world(np.arange(half))) for part in parts]
    how = {"minibatches": minibatches, "together": 2, "epochs": epochs, "stream": True}
    how |= {"seed": 1, "version": 0}
    of_one = [minibatches_of(Streamer(whole, rank=r, ranks=2, **how)) for r in range(2)]
    of_nodes = [minibatches_of(Streamer(part, rank=0, ranks=1, **how)) for part in parts]
    assert len(of_one[0]) == len(of_nodes[0]) == minibatches * epochs
    for step in range(minibatches * epochs):
        for ranks_share in of_one:
            for micro in ranks_share[step]:
                one.train(read(one, pool, micro.slots), micro)
        for node in range(2):
            for micro in of_nodes[node][step]:
                both[node].train(read(both[node], pools[node], micro.slots), micro)
        for parameter, *theirs in zip(one.parameters, *(x.parameters for x in both), strict=True):
            if parameter.grad is None:
                continue
            gradient = parameter.grad.clone()
            total = sum(p.grad for p in theirs if p.grad is not None)
            torch.testing.assert_close(total, gradient, rtol=1e-12, atol=1e-15)
            with torch.no_grad():
                for p in (parameter, *theirs):
                    p -= 0.1 * gradient
                    if p.grad is not None:
                        p.grad.zero_()

    tally = Tally()
    for node in both:
        tally.merge(node.tally)
    expected = one.finish_batch()
    for node in both:
        with patch.object(node.ranks, "combine", return_value=tally):
            line = node.finish_batch()
        assert flatten(line) == pytest.approx(flatten(expected), rel=1e-9)
        assert node.algorithm.state() == pytest.approx(one.algorithm.state(), rel=1e-12)
        assert (node.algorithm.policy_loss.cut < LARGEST) == (correction == "m2po")
    played = torch.arange(SEGMENT) < pool["length"][:, None]
    assert expected["reward"] == float((pool["reward"] * played).sum()) / BATCH


@pytest.mark.parametrize("algorithm, epochs", [("ppo", 1), ("ppo", 4), ("grpo", 1), ("grpo", 4)])
def test_every_update_of_every_epoch_is_the_one_of_whole_minibatches(algorithm, epochs):
    """Also once weights have moved: minibatches of later epochs hold the same trajectories in
    whatever order the first came."""
    config = Config()
    config.train.algorithm = algorithm
    config.algorithm.group_size = 4
    pool = toy_pool(Toy())
    if algorithm == "grpo":  # of either group some succeed
        make_episodes(pool, {0: 1, 3: 4, 6: 0})
    order = np.random.default_rng(0).permutation(BATCH).tolist()
    whole = updates(pool, list(range(BATCH)), BATCH // 2, epochs, config)
    config.actor.micro_batch = 3  # chunk steps
    parts = updates(pool, order, 2, epochs, config)
    assert len(whole) == len(parts) == 2 * epochs
    assert all(close([a], [b], 1e-6) for a, b in zip(parts, whole, strict=True))  # measured: 1e-15
    assert not close([whole[0]], [whole[-1]], 1e-2)


@pytest.mark.parametrize("granularity", ["chunk", "action", "token"])
@pytest.mark.parametrize("proximal", ["interpolated", "exact"])
def test_no_correction_depends_on_how_a_minibatch_is_cut(proximal, granularity):
    """Two batches, for a cut that the first one finds is of use in the second."""
    pool = toy_pool(Toy())
    order = np.random.default_rng(0).permutation(BATCH).tolist()
    for method in CORRECTIONS:
        if method == "gipo" and proximal == "exact":
            continue
        config = Config()
        config.algorithm.behaviour_weight = method
        config.algorithm.granularity = granularity
        config.algorithm.proximal = "auto" if method == "gipo" else proximal
        if method == "m2po":
            config.algorithm.behaviour_trust = 0.002
        if method == "geometric":
            config.algorithm.behaviour_weight_min = 0.95
            config.algorithm.behaviour_weight_max = 1.05
        found = []
        for groups, micro_batch in (([tuple(range(BATCH))], 1000), (pairs(order), 3)):
            torch.manual_seed(1)
            model = Toy()
            config.actor.micro_batch = micro_batch
            config.actor.minibatch = BATCH
            learner = learner_of(model, config)
            for _ in range(2):
                model.zero_grad()
                for slots in groups:
                    micro = MicroBatch(slots, 0, 0, slots is groups[-1], BATCH)
                    learner.train(read(learner, pool, slots), micro)
                line = learner.finish_batch()
            grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
            found.append((grads, line["masked_fraction"], learner.algorithm.state()))
        (whole, masked, kept), (parts, *same) = found
        assert close(parts, whole, 1e-6) and any(g.abs().sum() > 0 for g in whole)
        assert same == [pytest.approx(masked), pytest.approx(kept)]
        assert masked < 1 and (masked > 0) >= (method in ("m2po", "geometric"))


def pairs(order: list[int]) -> list[tuple[int, ...]]:
    return [tuple(order[i : i + 2]) for i in range(0, len(order), 2)]


@pytest.mark.parametrize("most", [5.0, 1.02])
def test_stale_samples_are_trained_by_the_decoupled_objective(most):
    """The whole way from slots to gradient: staleness from versions, α = d / (d + 1), w, clipping
    around π_prox, masking."""
    config = Config()
    model = Toy()
    config.algorithm.behaviour_weight_max = most
    config.algorithm.value_weight = 0.0
    pool = toy_pool(model)
    whole, stats = gradients(model, pool, [tuple(range(BATCH))], config)

    model.zero_grad()
    ends = pool["terminated"], pool["truncated"]
    advantages, _ = gae(
        pool["reward"], pool["value"], *ends, config.algorithm.gamma, config.algorithm.gae_lambda
    )
    advantages = advantages / (0.7**0.5 + 1e-6)
    stale = 0
    masked = 0
    for slot in range(BATCH):
        for t in range(SEGMENT):
            new = model.policy(pool["seen"][slot, t]).sum()
            old = pool["logprob"][slot, t].sum()
            d = 3 - int(pool["version"][slot, t])
            a = advantages[slot, t]
            moved = (new - old).item()
            w = math.exp(moved * d / (d + 1))
            prox = float(old) + moved * d / (d + 1)
            ratio = (new - prox).exp()
            if w > most:
                masked += 1
                continue
            stale += d > 0
            clipped = ratio.clamp(1.0 - config.algorithm.clip_low, 1.0 + config.algorithm.clip_high)
            (-w * torch.minimum(ratio * a, clipped * a) / (BATCH * SEGMENT)).backward()
    assert stats["masked_fraction"] == masked and (masked > 0) == (most < 5.0) and stale > 0
    assert close(whole[:2], [p.grad for p in model.policy.parameters()], 1e-9)
    config.algorithm.proximal = "behaviour"
    plain, _ = gradients(model, pool, [tuple(range(BATCH))], config)
    assert not close(plain[:2], whole[:2], 1e-2)  # plain PPO is something else


class Watched(ExactProximal):
    """Keeps what it was asked for and what it found."""

    seen = ()

    def of(self, stored, now, places):
        found = super().of(stored, now, places)
        self.seen = (*self.seen, (places, found))
        return found


def test_the_exact_proximal_policy_is_that_of_before_the_first_update():
    config = Config()
    config.algorithm.proximal = "exact"
    model = Toy()
    pool = toy_pool(model)
    pool["version"].fill_(2)  # staleness 1
    flat = {"seen": pool["seen"][:, :SEGMENT].flatten(0, 1)}
    before = model.evaluate(flat)["logprob"].detach()
    learner = learner_of(model, config)
    assert type(learner.proximal) is ExactProximal
    exact = learner.proximal = Watched(model, learner.parameters)

    def train(*groups: tuple[int, ...]) -> None:
        for slots in groups:
            learner.train(
                read(learner, pool, slots),
                MicroBatch(slots, 0, 0, True, learner.config.actor.minibatch),
            )

    with torch.no_grad():
        exact.keep_weights()
        for parameter in model.parameters():
            parameter.add_(0.1)  # the first update
    for _ in range(2):  # two epochs, between which weights move on
        train((3, 1), (0, 2))
        with torch.no_grad():
            exact.keep_weights()
            for parameter in model.parameters():
                parameter.mul_(1.1)
    assert len(exact.seen) == 4
    for places, found in exact.seen:
        rows = [slot * SEGMENT + step for slot, step in places]
        assert len(rows) == 2 * SEGMENT
        torch.testing.assert_close(found, before[rows])
    exact.begin_batch()
    train((0, 1))  # of the next batch: nothing was updated yet
    now = model.evaluate(flat)["logprob"].detach()
    torch.testing.assert_close(exact.seen[-1][1], now[: 2 * SEGMENT])


def test_the_first_step_of_a_batch_keeps_the_weights_that_exact_proximal_needs():
    config = Config()
    config.algorithm.proximal = "exact"
    config.actor.update_epochs = 1
    config.actor.minibatch = BATCH // 2
    model = Toy()
    pool = toy_pool(model)
    learner = learner_of(model, config)
    before = [p.detach().clone() for p in learner.parameters]
    for minibatch, slots in enumerate([(0, 1, 2, 3), (4, 5, 6, 7)]):
        learner.train(
            read(learner, pool, slots),
            MicroBatch(slots, 0, minibatch, True, learner.config.actor.minibatch),
        )
        learner.step()
    assert all(map(torch.equal, learner.proximal.before, before))
    assert not any(map(torch.equal, learner.parameters, before))
    learner.finish_batch()
    assert learner.proximal.before is None and learner.proximal.kept.rows == {}


@pytest.mark.parametrize("train_vlm", [False, True])
def test_streamed_gradient_of_the_real_model_in_fp32(train_vlm):
    model = tiny_pi(image_size=16, patch=8, chunk=4, train_vlm=train_vlm)
    obs = observations(model, BATCH * SEGMENT)
    out = model.act(
        obs, model.draw([(1, i, 0, 0) for i in range(BATCH * SEGMENT)], [True] * BATCH * SEGMENT)
    )
    fields = {
        name: (obs | out)[name].clone().unflatten(0, (BATCH, SEGMENT))
        for name in model.training_fields()
    }
    pool = filled_pool(model, torch.float32, fields)
    whole, stats = gradients(model, pool, [tuple(range(BATCH))])
    parts, sums = gradients(model, pool, streamed(np.random.default_rng(0).permutation(BATCH)))
    assert close(parts, whole, 1e-5)  # fp32: measured 1e-7
    assert sums == pytest.approx(stats, rel=1e-4)


# ---------------------------------------------------------------- what is counted


def test_metrics_of_a_micro_batch_by_hand():
    model = Toy()
    pool = toy_pool(model)
    make_episodes(pool, {})
    pool["truncated"].zero_()
    pool["reward"].zero_()
    pool["terminated"][0, 1] = pool["success"][0, 1] = True
    pool["truncated"][0, 3] = pool["truncated"][1, 0] = True
    pool["reward"][0, 1] = 1.0
    pool["version"].fill_(2)
    pool["version"][0, 0] = 3
    _, stats = gradients(model, pool, [(0, 1)])
    assert (stats["trajectories_0"], stats["episodes_0"], stats["successes_0"]) == (1.0, 2.0, 1.0)
    assert (stats["trajectories_1"], stats["episodes_1"], stats["successes_1"]) == (1.0, 1.0, 0.0)
    assert stats["reward_sum"] == 1.0
    assert (stats["trained"], stats["staleness_mean"], stats["staleness_max"]) == (10.0, 9.0, 1.0)
    assert (stats["samples_at_0"], stats["samples_at_1"]) == (1.0, 9.0)


def test_an_episode_that_failed_has_ended_and_is_no_success():
    """The simulator ended it (a dropped object): it counts like one that the time limit cut."""
    config = Config()
    config.algorithm.gamma = 0.5
    model = Toy()
    pool = toy_pool(model)
    make_episodes(pool, {})
    pool["truncated"].zero_()
    pool["terminated"][0, 1] = True  # failed
    pool["terminated"][2, 3] = pool["success"][2, 3] = True
    _, stats = gradients(model, pool, [(0, 2)], config)
    assert (stats["episodes_0"], stats["successes_0"]) == (2.0, 1.0)
    learner = learner_of(model, config)
    line = learner.tally.line(4, config, SPEC.tasks)
    assert line["episodes"] == 0 and line["success_rate"] is None
    for slots in ((0, 2), (4, 6)):  # nothing has ended in the other two
        learner.train(
            read(learner, pool, slots),
            MicroBatch(slots, 0, 0, True, learner.config.actor.minibatch),
        )
    line = learner.tally.line(4, config, SPEC.tasks)
    assert line["episodes"] == 2 and line["success_rate"] == line["success_push"] == 0.5
    # Its end is worth nothing, as a success' end is, and unlike a step in the middle.
    pool["reward"].zero_()
    data = read(learner, pool, (0, 2))
    _, returns, _ = learner.algorithm.targets(data, torch.ones(2, SEGMENT, dtype=torch.bool))
    assert returns[0, 1] == returns[1, 3] == 0.0 and returns[0, 2] != 0.0


def test_later_epochs_train_again_and_count_no_fact_twice():
    config = Config()
    config.actor.update_epochs = 3
    model = Toy()
    pool = toy_pool(model)
    learner = learner_of(model, config)
    slots = tuple(range(BATCH))
    for epoch in range(3):
        learner.train(
            read(learner, pool, slots),
            MicroBatch(slots, epoch, 0, True, learner.config.actor.minibatch),
        )
        learner.step()
        if epoch == 0:
            first = dict(learner.tally.values)
    values = learner.tally.values
    assert values["trained"] == 3 * first["trained"]
    for name in ("trained_once", "reward_sum", "returns_square", "episodes_0", "advantage_square"):
        assert values[name] == first[name] != 0.0
    line = learner.finish_batch()
    assert (line["version"], line["iteration"], learner.version) == (4, 4, 4)
    assert line["reuse"] == 3.0 and line["trained"] == 3 * line["trained_once"]
    assert line["lr"] == config.actor.lr * schedule(3, config)
    assert learner.tally.values == {} and not learner.updates


@pytest.mark.parametrize("trained, spared, balances", [(2, 0, True), (1, 1, True)])
@pytest.mark.parametrize("wrong", [0, 1, -1])
def test_a_batch_must_be_trained_once_an_epoch_or_spared(trained, spared, balances, wrong):
    """Two epochs are due. One micro-batch of them comes once too often, or is left out."""
    config = Config()
    config.actor.update_epochs = 2
    model = Toy()
    pool = toy_pool(model)
    learner = learner_of(model, config)
    passes = [((0, 1, 2, 3), 0), ((4, 5, 6, 7), 0)]
    passes += [((0, 1, 2, 3), 1), ((4, 5, 6, 7), 1)] if trained == 2 else []
    passes += {0: [], 1: [((0, 1, 2, 3), 1)], -1: []}[wrong]
    for slots, epoch in passes[: len(passes) - (wrong == -1 and trained == 2)]:
        learner.train(
            read(learner, pool, slots),
            MicroBatch(slots, epoch, 0, True, learner.config.actor.minibatch),
        )
    learner.spared = list(range(BATCH - (wrong == -1))) * spared
    if wrong:
        with pytest.raises(RuntimeError, match="of iteration 4, .* samples were trained and"):
            Ledger([], epochs=2).add(learner.finish_batch() | {"collected": 10**6})
        return
    line = learner.finish_batch()
    Ledger([], epochs=2).add(line | {"collected": 10**6})
    assert line["skipped"] == spared * BATCH * SEGMENT
    assert line["trained"] == trained * BATCH * SEGMENT


def test_accounts_of_lost_chunk_steps_are_in_the_line():
    config = Config()
    config.actor.update_epochs = 1
    model = Toy()
    learner = learner_of(model, config)
    slots = tuple(range(BATCH))
    learner.train(
        read(learner, toy_pool(model), slots),
        MicroBatch(slots, 0, 0, True, learner.config.actor.minibatch),
    )
    learner.tally.add("restart", 3, "part")
    learner.tally.add("after_end", 2, "part")
    line = learner.finish_batch()
    assert line["discarded_by"] == {"restart": 3, "filtered": 0, "undrawn": 0, "after_end": 2}
    assert "restart" not in line and "after_end" not in line


# ---------------------------------------------------------------- optimizer steps


def test_the_critic_s_learning_rate_reaches_exactly_the_model_s_critic():
    """Which weights those are only the model knows: no name tells."""

    class Odd(Toy):
        def critic(self):
            return {"policy.bias": self.policy.bias, "head.weight": self.head.weight}

    for lr, value_lr in ((0.0, 0.1), (0.1, 0.0)):
        config = Config()
        config.actor.lr = lr
        config.actor.value_lr = value_lr
        model = Odd()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        learner = learner_of(model, config)
        slots = tuple(range(BATCH))
        learner.train(
            read(learner, toy_pool(model), slots),
            MicroBatch(slots, 0, 0, True, learner.config.actor.minibatch),
        )
        learner.step()
        moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
        assert moved == (set(model.critic()) if value_lr else {"policy.weight", "head.bias"})
        factor = schedule(3, config)
        rates = [group["lr"] for group in learner.optimizer.param_groups]
        assert rates == [lr * factor, value_lr * factor] and 0.0 < factor < 1.0


def test_while_the_critic_warms_up_the_policy_stays():
    config = Config()
    config.algorithm.critic_warmup = 4  # versions 0 to 3
    config.actor.update_epochs = 1
    model = Toy()
    pool = toy_pool(model)
    learner = learner_of(model, config)
    slots = tuple(range(BATCH))
    moved = []
    for _ in range(2):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        learner.train(
            read(learner, pool, slots),
            MicroBatch(slots, 0, 0, True, learner.config.actor.minibatch),
        )
        learner.step()
        moved.append({n for n, p in model.named_parameters() if not torch.equal(p, before[n])})
        line = learner.finish_batch()
        assert line["grad_norm_value"] > 0 and (line["grad_norm_policy"] > 0) == (len(moved) == 2)
    assert moved == [set(model.critic()), set(model.trainable())]


def test_a_minibatch_whose_groups_are_all_filtered_teaches_nothing():
    """Not even by weight decay."""
    config = Config()
    config.train.algorithm = "grpo"
    config.algorithm.group_size = 4
    config.actor.update_epochs = 1
    model = Toy()
    pool = toy_pool(model)
    make_episodes(pool, {})
    before = [p.detach().clone() for p in model.parameters()]
    learner = learner_of(model, config)
    slots = tuple(range(BATCH))
    learner.train(
        read(learner, pool, slots), MicroBatch(slots, 0, 0, True, learner.config.actor.minibatch)
    )
    learner.step()
    assert not learner.updates and all(map(torch.equal, model.parameters(), before))
    line = learner.finish_batch()
    assert (line["trained"], line["filtered"]) == (0, BATCH * SEGMENT)
    assert line["filtered_fraction"] == pytest.approx(1.0, abs=0.05) and line["success_rate"] == 0.0
    assert line["discarded_by"]["filtered"] == BATCH * SEGMENT and line["grad_norm"] == 0.0


def test_dense_rewards_are_compared_instead_of_success():
    """Every episode fails alike, yet whose summed reward is larger did better. The second group
    has no spread."""
    config = Config()
    config.train.algorithm = "grpo"
    config.algorithm.group_size = 4
    model = Toy()
    pool = toy_pool(model)
    make_episodes(pool, {})
    pool["reward"].zero_()
    pool["reward"][1, 2] = 40.0
    pool["reward"][4:] = 7.0
    spec = SPEC._replace(compares="reward")
    slots = tuple(range(BATCH))
    learner = learner_of(model, config, spec)
    learner.train(
        read(learner, pool, slots), MicroBatch(slots, 0, 0, True, learner.config.actor.minibatch)
    )
    assert learner.steps == {slot: SEGMENT * (slot < 4) for slot in slots}
    assert learner.tally.get("filtered") == 4 * SEGMENT
    blind = learner_of(model, config)  # by success there is nothing to compare
    blind.train(
        read(blind, pool, slots), MicroBatch(slots, 0, 0, True, blind.config.actor.minibatch)
    )
    assert blind.tally.get("filtered") == BATCH * SEGMENT


def test_a_gradient_that_is_not_finite_ends_the_run():
    model = Toy()
    learner = learner_of(model)
    slots = tuple(range(BATCH))
    pool = toy_pool(model)
    pool["reward"][0, 0] = math.inf
    learner.train(
        read(learner, pool, slots), MicroBatch(slots, 0, 0, True, learner.config.actor.minibatch)
    )
    with pytest.raises(FloatingPointError, match="of version 3 is inf: lower --lr"):
        learner.step()


def test_learning_rates_rise_stay_and_fall_in_the_second_half():
    config = Config()
    config.actor.warmup = 3
    config.train.iterations = 20
    factors = [schedule(version, config) for version in range(20)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0] and set(factors[3:11]) == {1.0}
    assert factors[10:] == pytest.approx([1.0 - k / 10 for k in range(10)])
    config.actor.anneal = False
    assert [schedule(version, config) for version in range(20)] == factors[:4] + [1.0] * 16


def test_weights_that_act_are_held_back_on_purpose():
    config = Config()
    config.actor.extra_staleness = 2
    model = Toy()
    learner = learner_of(model, config)
    acting = []
    for version in range(5):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(version)
        acting.append(learner.weights_that_act()["head.bias"].item())
    assert acting == [0.0, 0.0, 0.0, 1.0, 2.0]
    assert learner_of(model).weights_that_act()["head.bias"] is model.head.bias


# ---------------------------------------------------------------- a loss that nobody knows


class Imitating(Algorithm):
    """Raises the log-probs of good steps. Needs how good each was, says so in the metrics, and
    remembers something."""

    groups = False
    critic = False
    batches = 0

    @classmethod
    def slot_fields(cls, config):
        return {"goodness": ((), torch.float64)}

    def targets(self, data, played):
        return Targets(data["goodness"], None, played & (data["goodness"] > 0))

    def scale(self, advantages):
        return advantages

    def loss(self, samples: Samples):
        goodness = samples.stored["goodness"]
        assert torch.equal(samples.advantages, goodness)
        return -(goodness * samples.new.sum(1)).sum(), {"goodness": goodness.sum()}

    def finish_batch(self, totals, first):
        assert totals["goodness"] > 0 and first == (self.batches == 0)
        self.batches += 1

    def state(self):
        return {"batches": self.batches}

    def load(self, state):
        self.batches = state["batches"]


@pytest.fixture
def imitating(monkeypatch) -> Config:
    monkeypatch.setitem(algorithms.ALGORITHMS, "imitating", Imitating)
    config = Config()
    config.train.algorithm = "imitating"
    config.actor.update_epochs = 2
    return config


def pool_with_goodness(model) -> SlotPool:
    """The first half of every trajectory is worth nothing."""
    pool = toy_pool(model)
    goodness = torch.arange(BATCH * SEGMENT, dtype=torch.float64).view(BATCH, SEGMENT)
    goodness[:, : SEGMENT // 2] = 0.0
    spec = pool.spec | {"goodness": ((SEGMENT,), torch.float64)}
    larger = SlotPool(spec, BATCH)
    for name in pool.spec:
        larger[name].copy_(pool[name])
    larger["goodness"].copy_(goodness)
    return larger


def test_a_new_loss_has_a_slot_field_a_number_in_the_metrics_and_a_memory(imitating, tmp_path):
    model = Toy()
    pool = pool_with_goodness(model)
    learner = learner_of(model, imitating)
    learner.version = 0
    slots = tuple(range(BATCH))
    for epoch in range(2):
        learner.train(
            read(learner, pool, slots),
            MicroBatch(slots, epoch, 0, True, learner.config.actor.minibatch),
        )
        if epoch == 0:
            kept = pool["goodness"].flatten() > 0
            flat = {"seen": pool["seen"].flatten(0, 1)[kept]}
            total = (
                pool["goodness"].flatten()[kept, None] * model.evaluate(flat)["logprob"].sum(2)
            ).sum()
            (gradient,) = torch.autograd.grad(
                -total / (imitating.actor.minibatch * SEGMENT), model.policy.weight
            )
            torch.testing.assert_close(model.policy.weight.grad, gradient)
            assert model.head.weight.grad is None
        learner.step()
    line = learner.finish_batch()
    good = pool["goodness"][pool["goodness"] > 0]
    assert line["goodness"] == pytest.approx(good.mean().item())
    assert line["trained_once"] == len(good) and line["trained"] == 2 * len(good)
    assert line["filtered"] == BATCH * SEGMENT - len(good)
    assert line["loss_policy"] == line["loss_value"] == 0.0  # it names none of these
    assert line["approx_kl"] > 0 and "explained_variance" not in line

    imitating.train.checkpoint = write(learner.snapshot([]), tmp_path)
    resume = json.loads((tmp_path / "000001" / "state.json").read_text())
    again = learner_of(Toy(), imitating, resume=resume)
    assert again.version == 1 and again.algorithm.batches == 1
    again.train(
        read(again, pool, slots), MicroBatch(slots, 0, 0, True, again.config.actor.minibatch)
    )
    again.train(
        read(again, pool, slots), MicroBatch(slots, 1, 0, True, again.config.actor.minibatch)
    )
    again.finish_batch()
    assert again.algorithm.batches == 2


def test_kl_stop_needs_nothing_of_the_loss(imitating):
    model = Toy()
    pool = pool_with_goodness(model)
    learner = learner_of(model, imitating)
    slots = tuple(range(BATCH))
    learner.train(
        read(learner, pool, slots), MicroBatch(slots, 0, 0, True, learner.config.actor.minibatch)
    )
    kl = learner.tally.get("approx_kl") / learner.tally.get("trained")
    assert kl > 0 and not learner.moved_too_far()  # --kl-stop 0 is never
    for limit, stops in ((0.99 * kl, True), (1.01 * kl, False)):
        imitating.algorithm.kl_stop = limit
        learner.train(
            read(learner, pool, slots),
            MicroBatch(slots, 0, 0, True, learner.config.actor.minibatch),
        )
        assert learner.moved_too_far() == stops
        assert not learner.moved_too_far()  # every minibatch is judged alone


# ---------------------------------------------------------------- checkpoints


def trained(model, config: Config) -> Learner:
    """A learner whose optimizer has something to remember."""
    learner = learner_of(model, config)
    slots = tuple(range(BATCH))
    learner.train(
        read(learner, toy_pool(model), slots),
        MicroBatch(slots, 0, 0, True, learner.config.actor.minibatch),
    )
    learner.step()
    return learner


def test_a_checkpoint_holds_all_a_run_needs(tmp_path):
    model = tiny_pi(train_vlm=True)
    model.header = checkpoint.Header("pi05", {"width": 32}, {})
    config = Config()
    config.actor.update_epochs = 1
    learner = learner_of(model, config)
    cache, _, real = model.prefix(*observations(model, 2).values())
    model.velocity(cache, real, torch.randn(2, 10, 4), torch.rand(2)).sum().backward()
    learner.step()
    learner.algorithm.advantage_scale = AdvantageScale(0.8, 0.25)
    for _ in range(2):  # saved again at the same version, as when a run is interrupted
        path = write(learner.snapshot([]), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["000003"] and path == tmp_path / "000003"
    assert {p.name for p in path.iterdir()} == {"model.safetensors", "optimizer.pt", "state.json"}
    state = json.loads((path / "state.json").read_text())
    assert (state["version"], state["seed"]) == (3, config.train.seed)
    assert state["scale"] == {"decay": 0.8, "square": 0.25, "cut": LARGEST}
    other = tiny_pi()
    source.load(other, path, checkpoint.own(path, other), "cpu", None)
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True)
    )
    saved = torch.load(path / "optimizer.pt", weights_only=True)
    assert len(saved["state"]) > 0
    rates = [group["lr"] for group in saved["param_groups"]]
    factor = schedule(3, config)
    assert rates == [config.actor.lr * factor, config.actor.value_lr * factor]


def test_training_goes_on_from_a_checkpoint_as_if_it_had_never_stopped(tmp_path):
    config = Config()
    config.actor.update_epochs = 1
    config.train.checkpoint_every = 3
    model = Toy()
    learner = trained(model, config)
    assert learner.should_save()
    config.train.checkpoint = write(learner.snapshot([]), tmp_path)
    resume = json.loads((config.train.checkpoint / "state.json").read_text())
    twin = Toy()
    twin.load_state_dict(model.state_dict())
    config.actor.weight_decay = 0.5  # a flag given on resuming counts
    again = learner_of(twin, config, resume=resume)
    assert again.version == 3 and again.algorithm.advantage_scale == AdvantageScale(0.8, 0.7)
    assert {group["weight_decay"] for group in again.optimizer.param_groups} == {0.5}
    for group in learner.optimizer.param_groups:
        group["weight_decay"] = 0.5
    pool = toy_pool(model)
    slots = tuple(range(BATCH))
    for one in (learner, again):
        one.train(read(one, pool, slots), MicroBatch(slots, 0, 0, True, one.config.actor.minibatch))
        one.step()
    assert all(map(torch.equal, model.parameters(), twin.parameters()))


def test_settings_are_the_flags_whatever_optimizer_pt_says_of_them(tmp_path):
    config = Config()
    learner = trained(Toy(), config)
    config.train.checkpoint = write(learner.snapshot([]), tmp_path)
    resume = json.loads((config.train.checkpoint / "state.json").read_text())
    file = config.train.checkpoint / "optimizer.pt"
    saved = torch.load(file, weights_only=True)
    for group in saved["param_groups"]:
        group |= {"eps": math.nan, "maximize": True, "betas": None, "lr": "x"}
    torch.save(saved, file)
    config.algorithm.advantage_memory = 0.5
    again = learner_of(Toy(), config, resume=resume)
    for group in again.optimizer.param_groups:
        known = (group["eps"], group["maximize"], group["betas"])
        assert known == (1e-8, False, (0.9, 0.95))
    assert again.algorithm.advantage_scale == AdvantageScale(0.5, 0.7)


def test_an_optimizer_that_cannot_be_read_is_named(tmp_path):
    config = Config()
    config.train.checkpoint = write(trained(Toy(), config).snapshot([]), tmp_path)
    resume = json.loads((config.train.checkpoint / "state.json").read_text())
    whole = (config.train.checkpoint / "optimizer.pt").read_bytes()
    for broken in (b"", b"torn", whole[: len(whole) // 2], whole[:-30]):
        (config.train.checkpoint / "optimizer.pt").write_bytes(broken)
        with pytest.raises(UserError, match="cannot read .*optimizer.pt .* remove .*000003 to con"):
            learner_of(Toy(), config, resume=resume)


def test_weights_that_are_not_finite_are_neither_published_nor_saved_nor_taken_up(tmp_path):
    config = Config()
    config.actor.update_epochs = 1
    learner = trained(Toy(), config)
    config.train.checkpoint = write(learner.snapshot([]), tmp_path)
    resume = json.loads((config.train.checkpoint / "state.json").read_text())
    name, weight = next(iter(learner.trainable.items()))
    with torch.no_grad():
        weight.view(-1)[0] = math.nan
    said = f"weights of version 3 are not finite: tensor '{name}' holds NaN or infinity"
    for act in (learner.weights_that_act, lambda: write(learner.snapshot([]), tmp_path / "other")):
        with pytest.raises(FloatingPointError, match=said):
            act()
    assert not (tmp_path / "other").exists()
    file = config.train.checkpoint / "optimizer.pt"
    state = torch.load(file, weights_only=True)
    state["state"][0]["exp_avg"].view(-1)[0] = math.inf
    torch.save(state, file)
    with pytest.raises(UserError, match="its tensor 0 exp_avg holds NaN or infinity"):
        learner_of(Toy(), config, resume=resume)


def test_what_a_killed_save_left_does_not_hinder_the_next(tmp_path):
    learner = trained(Toy(), Config())
    for left in (".000003.old", ".000002.partial", ".000003.partial"):
        (tmp_path / left / "deep").mkdir(parents=True)
        (tmp_path / left / "model.safetensors").touch()
    (tmp_path / "000003").mkdir()  # whose weights somebody has moved away
    times = []
    for _ in range(2):
        path = write(learner.snapshot([]), tmp_path)
        assert path.name == "000003" and list(tmp_path.iterdir()) == [path]
        times.append((path / "model.safetensors").stat().st_mtime_ns)
    assert times[0] == times[1]  # a good one is never away, not even for a moment


def test_the_only_copy_is_there_until_another_is_whole(monkeypatch, tmp_path):
    """Saves once moved a version away before they wrote it again."""
    (tmp_path / ".000003.old").mkdir()
    monkeypatch.setattr(saving.torch, "save", Mock(side_effect=OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write(trained(Toy(), Config()).snapshot([]), tmp_path)
    assert (tmp_path / ".000003.old").is_dir() and not (tmp_path / "000003").exists()
