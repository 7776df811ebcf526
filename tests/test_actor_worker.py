"""A streamed gradient is the batch's gradient; ranks add up; checkpoints are whole."""

import json
import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import observations, tiny_pi
from torch import nn

from actor_worker import (
    SUMS,
    ExactProximal,
    advantages_of,
    all_reduce_gradients,
    gather,
    iteration_metrics,
    outcomes,
    outcomes_of_groups,
    save_checkpoint,
    train_micro_batch,
)
from algorithms import AdvantageScale, gae
from channel import SlotPool
from config import Config
from models import checkpoint
from models.formats import source
from streamer import Streamer

BATCH = 8
SEGMENT = 5
FIELDS = ("task", "reward", "value", "terminated", "truncated", "logprob", "version")


class Toy(nn.Module):
    """The smallest policy: log-probs (of 2 actions of 3 numbers) and value are linear in what was
    seen.
    """

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


def filled_pool(model, dtype, fields: dict) -> SlotPool:
    """Eight random trajectories with successes, time limits, stale versions and log-probs near the
    model's own.
    """
    spec = {name: (tuple(x.shape[1:]), x.dtype) for name, x in fields.items()}
    t = (SEGMENT,)
    spec |= {"reward": (t, dtype), "value": ((SEGMENT + 1,), dtype), "version": (t, torch.int32)}
    flat = {name: fields[name][:, :SEGMENT].flatten(0, 1) for name in model.training_fields()}
    with torch.no_grad():
        logprob = model.evaluate(flat)["logprob"].unflatten(0, (BATCH, SEGMENT))  # [B, T, C, A]
    spec |= {"logprob": (tuple(logprob.shape[1:]), dtype)}
    spec |= {"terminated": (t, torch.bool), "truncated": (t, torch.bool), "task": ((), torch.int32)}
    pool = SlotPool(spec, BATCH)
    for name, x in fields.items():
        pool[name].copy_(x)
    pool["task"].copy_(torch.arange(BATCH) % 2)
    end = torch.randint(0, 5, (BATCH, SEGMENT))
    pool["terminated"].copy_(end == 0)
    pool["truncated"].copy_(end == 1)
    pool["reward"].copy_(end == 0)
    pool["value"].copy_(torch.randn(BATCH, SEGMENT + 1))
    pool["version"].copy_(torch.randint(1, 4, (BATCH, SEGMENT)))
    pool["logprob"].copy_(logprob + 0.3 / logprob[0, 0].numel() ** 0.5 * torch.randn_like(logprob))
    return pool


def gradients(
    model,
    pool: SlotPool,
    groups: list[tuple[int, ...]],
    config: Config | None = None,
    proximal=None,
) -> tuple[list[torch.Tensor], dict[str, float]]:
    """Accumulated over one micro-batch per group of slots."""
    model.zero_grad()
    scale = AdvantageScale(0.8, 0.7)
    sums = {}
    config = config or Config()
    size = config.algorithm.group_size
    algorithm = config.train.algorithm
    for slots in groups:
        data = gather(pool, slots, (*FIELDS, *model.training_fields()), "cpu")
        if algorithm == "grpo":
            data |= {
                "outcomes": outcomes_of_groups(pool, slots, size, "cpu"),
                "member": torch.tensor(slots) % size,
            }
        exact = proximal.of(slots, SEGMENT) if proximal else None
        found = train_micro_batch(model, data, 3, BATCH * SEGMENT, config, scale, exact) | outcomes(
            data, algorithm
        )
        assert found.pop("rows").sum() == found["samples"]
        for name, value in found.items():
            keep = max if name in ("ratio_max", "staleness_max") else lambda a, b: a + b
            sums[name] = keep(sums[name], float(value)) if name in sums else float(value)
    return [p.grad.clone() for p in model.parameters() if p.grad is not None], sums


def streamed(order: np.ndarray, stream: bool = True, group: int = 1) -> list[tuple[int, ...]]:
    """The micro-batches of two trajectories that a streamer makes when they arrive in this
    order.
    """
    streamer = Streamer(BATCH, BATCH, 2, 1, 1, stream, 0, 1, seed=1, version=0, group=group)
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
    pool = filled_pool(
        model, torch.float64, {"seen": torch.randn(BATCH, SEGMENT, 6, dtype=torch.float64)}
    )
    whole, stats = gradients(model, pool, [tuple(range(BATCH))])
    order = np.random.default_rng(seed).permutation(BATCH)
    parts, sums = gradients(model, pool, streamed(order, stream=seed % 2 == 0))
    assert close(parts, whole, 1e-6)  # measured: 1e-16
    assert sums == pytest.approx(stats, rel=1e-9) and sums["samples"] == BATCH * SEGMENT
    assert sums["masked"] == sums["filtered"] == 0 and sums["staleness_max"] == 2
    assert sums["successes_0"] + sums["successes_1"] == pool["reward"].sum()
    less, _ = gradients(model, pool, streamed(order)[1:])
    assert not close(less, whole, 1e-2)  # the comparison can fail


@pytest.mark.parametrize("granularity", ["chunk", "token"])
def test_streamed_gradient_of_groups_is_the_full_batch_gradient(granularity):
    config = Config()
    config.train.algorithm = "grpo"
    config.algorithm.group_size = 4
    config.algorithm.granularity = granularity
    model = Toy()
    pool = filled_pool(
        model, torch.float64, {"seen": torch.randn(BATCH, SEGMENT, 6, dtype=torch.float64)}
    )
    pool["terminated"].zero_()
    pool["truncated"].zero_()
    pool["terminated"][[0, 3, 6], [1, 4, 0]] = True  # 2 of the first group succeed, 1 of the second
    pool["truncated"][:, SEGMENT - 1] = ~pool["terminated"][:, SEGMENT - 1]
    whole, stats = gradients(model, pool, [tuple(range(BATCH))], config)
    groups = streamed(np.random.default_rng(0).permutation(BATCH), group=4)
    assert all(
        len({slot // 4 for slot in slots}) == 1 for slots in groups
    )  # whole groups, one after the other
    parts, sums = gradients(model, pool, groups, config)
    assert close(parts[:2], whole[:2], 1e-6) and sums == pytest.approx(stats, rel=1e-6)
    assert sums["samples"] == 6 * SEGMENT + 2 + 1  # rows after an episode's end are not trained
    assert (
        sums["episodes_0"] + sums["episodes_1"] == BATCH
        and sums["successes_0"] + sums["successes_1"] == 3
    )
    assert not parts[2:] or not any(p.any() for p in parts[2:])  # no critic

    pool["terminated"][4:].zero_()
    pool["truncated"][4:, SEGMENT - 1] = True  # the second group fails as one
    less, sums = gradients(model, pool, groups, config)
    alone, _ = gradients(model, pool, [(0, 1, 2, 3)], config)
    assert close(less[:2], alone[:2], 1e-9) and sums["filtered"] == 4 * SEGMENT


def updates(
    pool: SlotPool, order: list[int], micro_batch: int, epochs: int, config: Config
) -> list[torch.Tensor]:
    """The gradient of every optimizer step over a batch of two minibatches whose trajectories
    arrive in this order.
    """
    torch.manual_seed(1)
    model = Toy()
    group = config.algorithm.group_size if config.train.algorithm == "grpo" else 1
    found = []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    streamer = Streamer(
        BATCH, BATCH // 2, micro_batch, 1, epochs, True, 0, 1, seed=1, version=0, group=group
    )
    groups = []
    for slot in order:
        streamer.add(slot)
        while (micro := streamer.next()) is not None:
            groups.append(micro.slots)
            if micro.last:
                gradients(model, pool, groups, config)
                found.append(
                    torch.cat(
                        [p.grad.flatten() for p in model.parameters() if p.grad is not None]
                    ).clone()
                )
                optimizer.step()
                groups = []
    return found


@pytest.mark.parametrize("algorithm, epochs", [("ppo", 1), ("ppo", 4), ("grpo", 1), ("grpo", 4)])
def test_every_update_of_every_epoch_is_the_one_of_whole_minibatches(algorithm, epochs):
    """Also once weights have moved: minibatches of later epochs hold the same trajectories in
    whatever order the first came.
    """
    config = Config()
    config.train.algorithm = algorithm
    config.algorithm.group_size = 4
    pool = filled_pool(
        Toy(), torch.float64, {"seen": torch.randn(BATCH, SEGMENT, 6, dtype=torch.float64)}
    )
    if algorithm == "grpo":  # of either group some succeed
        pool["terminated"].zero_()
        pool["truncated"].zero_()
        pool["terminated"][[0, 3, 6], [1, 4, 0]] = True
        pool["truncated"][:, SEGMENT - 1] = ~pool["terminated"][:, SEGMENT - 1]
    order = np.random.default_rng(0).permutation(BATCH).tolist()
    whole = updates(pool, list(range(BATCH)), BATCH // 2, epochs, config)
    parts = updates(pool, order, 2, epochs, config)
    assert len(whole) == len(parts) == 2 * epochs
    assert all(close([a], [b], 1e-6) for a, b in zip(parts, whole, strict=True))  # measured: 1e-15
    assert not close([whole[0]], [whole[-1]], 1e-2)


@pytest.mark.parametrize("most", [5.0, 1.02])
def test_stale_samples_are_trained_by_the_decoupled_objective(most):
    """The whole way from slots to gradient: staleness from versions, α = d / (d + 1), w, clipping
    around π_prox, masking.
    """
    config = Config()
    model = Toy()
    config.algorithm.behaviour_weight_max = most
    config.algorithm.value_weight = 0.0
    pool = filled_pool(
        model, torch.float64, {"seen": torch.randn(BATCH, SEGMENT, 6, dtype=torch.float64)}
    )
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
    assert stats["masked"] == masked and (masked > 0) == (most < 5.0) and stale > 0
    assert close(whole[:2], [p.grad for p in model.policy.parameters()], 1e-9)
    config.algorithm.proximal = "behaviour"
    plain, _ = gradients(model, pool, [tuple(range(BATCH))], config)
    assert not close(plain[:2], whole[:2], 1e-2)  # plain PPO is something else


def test_the_exact_proximal_policy_is_that_of_before_the_first_update():
    config = Config()
    model = Toy()
    pool = filled_pool(
        model, torch.float64, {"seen": torch.randn(BATCH, SEGMENT, 6, dtype=torch.float64)}
    )
    pool["version"].fill_(2)  # staleness 1
    flat = {"seen": pool["seen"][:, :SEGMENT].flatten(0, 1)}
    before = model.evaluate(flat)["logprob"].detach()
    exact = ExactProximal(model, list(model.parameters()))
    seen = []

    def watched(slots):
        return lambda *args: seen.append((slots, exact.of(slots, SEGMENT)(*args))) or seen[-1][1]

    with torch.no_grad():
        exact.keep_weights()
        for parameter in model.parameters():
            parameter.add_(0.1)  # the first update
    stand_in = type("Watched", (), {"of": lambda self, slots, segment: watched(slots)})()
    for _ in range(2):  # two epochs, between which weights move on
        gradients(model, pool, [(3, 1), (0, 2)], config, stand_in)
        with torch.no_grad():
            exact.keep_weights()
            for parameter in model.parameters():
                parameter.mul_(1.1)
    assert len(seen) == 4
    for slots, found in seen:
        rows = torch.cat([torch.arange(slot * SEGMENT, (slot + 1) * SEGMENT) for slot in slots])
        torch.testing.assert_close(found, before[rows])
    exact.begin_batch()
    gradients(model, pool, [(0, 1)], config, stand_in)  # of the next batch: nothing was updated yet
    torch.testing.assert_close(seen[-1][1], model.evaluate(flat)["logprob"].detach()[: 2 * SEGMENT])


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


def test_the_value_of_an_episode_s_last_observation_counts_where_the_time_limit_cut_it():
    """γ = 0.5, λ = 1. Of three steps the second is the last of its episode: cut in one row,
    successful in the other.
    """
    config = Config()
    config.algorithm.gamma = 0.5
    config.algorithm.gae_lambda = 1.0
    data = {
        "reward": torch.tensor([[0.0, 0, 0], [0, 1, 0]]),
        "value": torch.tensor([[1.0, 2, 3, 4]] * 2),
    }
    data |= {"terminated": torch.tensor([[False] * 3, [False, True, False]])}
    data |= {"truncated": torch.tensor([[False, True, False], [False] * 3])}
    rows = torch.ones(2, 3, dtype=torch.bool)
    advantages, returns, _ = advantages_of(data, rows, config)
    assert returns.tolist() == [[0, 0, 2], [0.5, 1, 2]]  # the time limit is worth 0
    data["final"] = torch.full((2, 3), 8.0)
    advantages, returns, _ = advantages_of(data, rows, config)
    assert returns.tolist() == [
        [2, 4, 2],
        [0.5, 1, 2],
    ]  # worth γ·8 a step before; success is worth its reward and no more
    assert advantages.tolist() == [[1, 2, -1], [-0.5, -1, -1]]


def test_metrics_of_a_micro_batch_by_hand():
    model = Toy()
    pool = filled_pool(
        model, torch.float64, {"seen": torch.randn(BATCH, SEGMENT, 6, dtype=torch.float64)}
    )
    pool["terminated"].zero_()
    pool["truncated"].zero_()
    pool["reward"].zero_()
    pool["terminated"][0, 1] = pool["truncated"][0, 3] = pool["truncated"][1, 0] = True
    pool["reward"][0, 1] = 1.0
    pool["version"].fill_(2)
    pool["version"][0, 0] = 3
    _, stats = gradients(model, pool, [(0, 1)])
    assert (
        stats["episodes_0"],
        stats["successes_0"],
        stats["episodes_1"],
        stats["successes_1"],
    ) == (2.0, 1.0, 1.0, 0.0)
    assert stats["reward"] == 1.0
    assert (stats["samples"], stats["staleness"], stats["staleness_max"]) == (10.0, 9.0, 1.0)


def test_iteration_metrics_are_per_chunk_step():
    config = Config()
    config.actor.batch = BATCH
    config.actor.update_epochs = 2
    names = (
        "loss_policy",
        "loss_value",
        "entropy_or_noise",
        "approx_kl",
        "clip_fraction",
        "masked",
        "staleness",
    )
    samples = 2.0 * BATCH * SEGMENT  # both epochs
    sums = (
        dict.fromkeys(SUMS, 0.0) | {n: samples for n in names} | {"samples": samples, "reward": 4.0}
    )
    sums |= {"trained_once": samples / 2, "restart": 3.0, "after_end": 2.0}
    sums |= {"samples_at_1": samples, "kl_at_1": 0.5 * samples, "ratio_at_1": 2.0 * samples}
    sums |= {
        "returns_square": samples,
        "error_square": 0.5 * samples,
    }  # of the first epoch: half of the variance is left
    sums |= {
        "episodes_0": 6.0,
        "successes_0": 6.0,
        "episodes_1": 2.0,
        "successes_1": 0.0,
        "episodes_2": 0.0,
        "successes_2": 0.0,
    }
    sums |= {"trajectories_0": 5.0, "trajectories_1": 3.0, "trajectories_2": 0.0}
    tasks = ("push", "reach", "dunk")
    out = iteration_metrics(
        sums, {"ratio_max": 1.5, "staleness_max": 2.0}, 7, 10.0, config, [0.5, 0.4, 0.3], 3, tasks
    )
    assert (
        all(out[n] == 1.0 for n in names if n not in ("masked", "staleness"))
        and out["staleness_mean"] == 1.0
    )
    assert (out["success_push"], out["success_reach"], "success_dunk" in out) == (
        1.0,
        0.0,
        False,
    ) and out["masked_fraction"] == 1.0
    assert (out["kl_at_1"], out["ratio_at_1"], "kl_at_0" in out) == (0.5, 2.0, False)
    assert out["staleness_hist"] == {"1": samples}
    assert out["explained_variance"] == 0.5 and (
        out["grad_norm"],
        out["grad_norm_policy"],
        out["grad_norm_value"],
    ) == (0.5, 0.4, 0.3)
    assert (out["success_rate"], out["reward"], out["episodes"]) == (
        0.5,
        0.5,
        8,
    )  # the mean over tasks, whatever their number
    assert out["trajectories_per_task"] == {"push": 5, "reach": 3, "dunk": 0}
    assert (out["iteration"], out["version"], out["staleness_max"], out["reuse"]) == (7, 7, 2, 2.0)
    assert (
        out["samples_per_s"] == BATCH * SEGMENT / 10.0
    )  # chunk steps trained, however often each was used
    assert (out["trained"], out["trained_once"]) == (2 * BATCH * SEGMENT, BATCH * SEGMENT)
    assert out["discarded_by"] == {"restart": 3, "filtered": 0, "after_end": 2}
    sums |= {"episodes_0": 0.0, "episodes_1": 0.0}
    nothing = iteration_metrics(
        sums, {"ratio_max": 1.0, "staleness_max": 0.0}, 7, 10.0, config, [0.5, 0.4, 0.3], 3, tasks
    )
    assert nothing["success_rate"] is None


def summed(rank: int, folder: str) -> None:
    """One of two ranks, whose gradients are 1, 2, 3 times its number plus one; and 1, 2, 3 on rank
    1 alone.
    """
    dist.init_process_group(
        "gloo", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2
    )
    # as the last layer's with --train-vlm
    used = nn.Parameter(torch.ones(3))
    unused = nn.Parameter(torch.ones(2))
    once = nn.Parameter(torch.ones(3))  # as of ranks whose groups are all filtered
    ((rank + 1) * used * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    if rank == 1:
        (once * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    all_reduce_gradients([unused, used, once], ranks=2)
    torch.save((used.grad, unused.grad, once.grad), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_gradients_are_summed_over_ranks_and_untouched_weights_do_not_matter(tmp_path):
    torch.multiprocessing.spawn(summed, (str(tmp_path),), 2)
    for rank in range(2):
        used, unused, once = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert (
            used.tolist() == [3.0, 6.0, 9.0] and once.tolist() == [1.0, 2.0, 3.0] and unused is None
        )


def test_a_checkpoint_holds_all_a_run_needs(tmp_path):
    model = tiny_pi()
    model.header = checkpoint.Header("pi05", {"width": 32}, {})
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    cache, _, real = model.prefix(*observations(model, 2).values())
    model.velocity(cache, real, torch.randn(2, 10, 4), torch.rand(2)).sum().backward()
    optimizer.step()
    for scale in (0.5, 0.25):  # saved again at the same version: the newer one replaces it
        path = save_checkpoint(
            tmp_path, model, {}, optimizer, AdvantageScale(0.8, scale), {"version": 3, "seed": 1}
        )
    assert [p.name for p in tmp_path.iterdir()] == ["000003"] and path == tmp_path / "000003"
    assert {p.name for p in path.iterdir()} == {"model.safetensors", "optimizer.pt", "state.json"}
    state = json.loads((path / "state.json").read_text())
    assert state["version"] == 3 and AdvantageScale(**state["scale"]) == AdvantageScale(0.8, 0.25)
    other = tiny_pi()
    source.load(other, path, checkpoint.own(path, other), "cpu", None)
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True)
    )
    saved = torch.load(path / "optimizer.pt", weights_only=True)
    assert len(saved["state"]) > 0 and math.isclose(saved["param_groups"][0]["lr"], 0.1)
