"""What the learner asks of a loss: targets, scales and the contract, of PPO and GRPO."""

import json

import pytest
import torch
from test_algorithms import samples

import algorithms
from algorithms import (
    AdvantageScale,
    Algorithm,
    Grpo,
    Ppo,
    Samples,
    interpolated_proximal,
    value_loss,
)
from config import Config
from envs import EnvSpec
from errors import UserError
from policy_loss import PolicyLoss

SPEC = EnvSpec(("push",), ("push the puck",), 1, 16, 4, 4, 60)


def test_the_value_of_an_episode_s_last_observation_counts_where_the_time_limit_cut_it():
    """γ = 0.5, λ = 1. Of three steps the second is the last of its episode: cut in one row,
    successful in the other."""
    config = Config()
    config.algorithm.gamma = 0.5
    config.algorithm.gae_lambda = 1.0
    assert Ppo.slot_fields(config) == {}
    data = {
        "reward": torch.tensor([[0.0, 0, 0], [0, 1, 0]]),
        "value": torch.tensor([[1.0, 2, 3, 4]] * 2),
        "terminated": torch.tensor([[False] * 3, [False, True, False]]),
        "truncated": torch.tensor([[False, True, False], [False] * 3]),
    }
    played = torch.ones(2, 3, dtype=torch.bool)
    ppo = Ppo(config, SPEC)
    advantages, returns, kept = ppo.targets(data, played)
    assert returns.tolist() == [[0, 0, 2], [0.5, 1, 2]]  # the time limit is worth 0
    assert kept.all()
    config.algorithm.bootstrap_truncated = True
    assert Ppo.slot_fields(config) == {"final": ((), torch.float32)}
    data["final"] = torch.full((2, 3), 8.0)
    advantages, returns, _ = ppo.targets(data, played)
    # Worth γ·8 a step before; success is worth its reward and no more.
    assert returns.tolist() == [[2, 4, 2], [0.5, 1, 2]]
    assert advantages.tolist() == [[1, 2, -1], [-0.5, -1, -1]]


def test_grpo_gives_every_played_step_its_member_s_advantage():
    """Groups of two: one with a success, one without, of which nothing is kept."""
    grpo = Grpo(Config(), SPEC)
    data = {
        "outcomes": torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 0.0]]),
        "member": torch.tensor([0, 1, 1]),
    }
    played = torch.tensor([[True, False], [True, True], [True, True]])
    advantages, returns, kept = grpo.targets(data, played)
    assert returns is None and kept.tolist() == [[True, False], [True, True], [False, False]]
    assert advantages.tolist() == [
        pytest.approx([1.0, 1.0], abs=1e-5),
        pytest.approx([-1.0, -1.0], abs=1e-5),
        [0.0, 0.0],
    ]


def test_grpo_compares_summed_rewards_where_the_simulator_says_so():
    """Dense rewards have no natural bounds: whatever their mean, groups are kept that have some
    spread, and those without any are filtered."""
    config = Config()
    dense = Grpo(config, SPEC._replace(compares="reward"))
    data = {
        "outcomes": torch.tensor([[40.0, 42.0], [-3.0, -5.0], [0.95, 0.95], [7.0, 7.0]]),
        "member": torch.tensor([0, 0, 0, 1]),
    }
    played = torch.ones(4, 3, dtype=torch.bool)
    advantages, _, kept = dense.targets(data, played)
    assert kept[:, 0].tolist() == [True, True, False, False]
    assert advantages[:, 0].tolist() == pytest.approx([-1.0, 1.0, 0.0, 0.0], abs=1e-5)
    # Compared by success, means outside [--group-low, --group-high] are filtered.
    _, _, kept = Grpo(config, SPEC).targets(data, played)
    assert not kept.any()


def test_advantages_are_scaled_and_the_scale_outlives_a_checkpoint():
    config = Config()
    config.actor.batch = 2
    config.env.segment = 5
    ppo = Ppo(config, SPEC)
    assert ppo.scale(torch.tensor([3.0])).tolist() == pytest.approx([3.0], rel=1e-5)
    ppo.finish_batch(
        {"advantage_square": 40.0, "trained_once": 10.0}, first=True
    )  # of 10 chunk steps
    assert ppo.scale(torch.tensor([3.0])).tolist() == pytest.approx([1.5], rel=1e-5)
    ppo.finish_batch({"advantage_square": 90.0, "trained_once": 10.0}, first=False)
    again = Ppo(config, SPEC)
    again.load(json.loads(json.dumps(ppo.state())))
    assert again.advantage_scale == AdvantageScale(0.8, 0.8 * 4.0 + 0.2 * 9.0)
    grpo = Grpo(config, SPEC)  # it scales within its groups
    grpo.finish_batch({"advantage_square": 40.0}, first=True)
    assert grpo.scale(torch.tensor([3.0])).tolist() == pytest.approx([3.0], rel=1e-5)


@pytest.mark.parametrize("loss", [Ppo, Grpo])
def test_m2po_masks_by_the_batch_before_and_the_cut_outlives_a_checkpoint(loss):
    config = Config()
    config.algorithm.behaviour_weight = "m2po"
    config.algorithm.behaviour_trust = 0.01
    mine = loss(config, SPEC)
    assert mine.policy_loss.trust == 0.01 and mine.policy_loss.cut == 1e38  # nothing is known yet
    old = torch.zeros(10, 1)
    prox = torch.linspace(0.0, 0.45, 10)[:, None]
    numbers = mine.policy_loss(prox, old, prox, torch.ones(10))[1]
    assert numbers["masked_fraction"] == 0
    totals = {"advantage_square": 1.0, "trained_once": 10.0}
    for name in ("units_below", "squares_below"):
        totals |= {f"{name}_{i}": x for i, x in enumerate(numbers[name].tolist())}
    mine.finish_batch(totals, first=True)
    cut = mine.policy_loss.cut  # 0.15² = 0.0225 is kept, and 0.3² is not
    assert 0.0225 <= cut < 0.09
    again = loss(config, SPEC)
    again.load(json.loads(json.dumps(mine.state())))
    assert again.policy_loss == mine.policy_loss
    masked = again.policy_loss(prox, old, prox, torch.ones(10))[1]["masked_fraction"].item()
    assert masked == (prox.square() > cut).sum().item() > 0
    again.load({"decay": 0.8, "square": 1.0})  # of a checkpoint without a cut
    assert again.policy_loss.cut == 1e38
    with pytest.raises(UserError, match="what the loss remembers"):
        again.load({"decay": 0.8, "square": 1.0, "cut": -1.0})


def test_ppo_adds_the_weighted_value_loss_to_the_policy_s():
    new, old, advantages, staleness = samples(u=1)
    prox = interpolated_proximal(new, old, staleness.double())
    value, returns, before = torch.randn(3, 64, dtype=torch.float64)
    config = Config()
    config.algorithm.value_weight = 0.25
    mine = Samples(new, old, prox, advantages, value, returns, {"value": before})
    loss, numbers = Ppo(config, SPEC).loss(mine)
    of_policy, _ = PolicyLoss()(new, old, prox, advantages)
    of_values = value_loss(value, before, returns, config.algorithm.value_clip, 10.0)
    torch.testing.assert_close(loss, of_policy + 0.25 * of_values)
    torch.testing.assert_close(numbers["loss_policy"], of_policy.detach())
    torch.testing.assert_close(numbers["loss_value"], of_values)
    alone, numbers = Grpo(config, SPEC).loss(mine._replace(returns=None))
    torch.testing.assert_close(alone, of_policy)
    assert "loss_value" not in numbers and not any(x.requires_grad for x in numbers.values())


def test_a_loss_that_does_not_keep_the_contract_is_named_with_what_it_lacks(monkeypatch):
    class Half(Algorithm):
        groups = False

    monkeypatch.setitem(algorithms.ALGORITHMS, "half", Half)
    config = Config()
    config.train.algorithm = "half"
    with pytest.raises(UserError, match="Half in algorithms.py. lacks critic, targets"):
        algorithms.load(config, SPEC)
    for name, kind in (("ppo", Ppo), ("grpo", Grpo)):
        config.train.algorithm = name
        assert type(algorithms.load(config, SPEC)) is kind
