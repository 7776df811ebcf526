"""GAE against numbers worked out by hand and a per-episode reference; the losses against PPO written out again."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from algorithms import AdvantageScale, gae, policy_loss, proximal_logprob, value_loss

fast = settings(deadline=None, derandomize=True, max_examples=60)


def rows(*values):
    return torch.tensor([values], dtype=torch.float64)


def test_gae_by_hand():
    # γ = λ = 1/2, so γλ = 1/4; an episode ends at t = 1 (success, reward 1) and at t = 2 (time limit).
    # δ₃ = 0 + 5/2 − 4 = −1.5                 A₃ = −1.5
    # δ₂ = 0 + 0   − 3 = −3.0  (episode over) A₂ = −3.0  (nothing carries)
    # δ₁ = 1 + 0   − 2 = −1.0  (episode over) A₁ = −1.0
    # δ₀ = 0 + 2/2 − 1 =  0.0                 A₀ = 0 + A₁/4 = −0.25
    advantages, returns = gae(rows(0, 1, 0, 0), rows(1, 2, 3, 4, 5), rows(0, 1, 1, 0), 0.5, 0.5)
    assert advantages.tolist() == [[-0.25, -1.0, -3.0, -1.5]]
    assert returns.tolist() == [[0.75, 1.0, 0.0, 2.5]]


def per_episode(reward, value, done, gamma, lam):
    """GAE as the definition states it: within each episode, a sum of discounted δ."""
    steps, out = len(reward), np.zeros(len(reward))
    for t in range(steps):
        for k in range(t, steps):
            after = 0.0 if done[k] else value[k + 1]
            out[t] += (gamma * lam) ** (k - t) * (reward[k] + gamma * after - value[k])
            if done[k]:
                break
    return out


@fast
@given(st.integers(1, 9), st.integers(1, 3), st.floats(0.0, 1.0), st.floats(0.0, 1.0), st.integers(0, 10**6))
def test_gae_matches_the_per_episode_definition(steps, n, gamma, lam, seed):
    rng = np.random.default_rng(seed)
    args = rng.normal(size=(n, steps)), rng.normal(size=(n, steps + 1)), rng.random((n, steps)) < 0.3
    advantages, returns = gae(*map(torch.from_numpy, args), gamma, lam)
    expected = np.stack([per_episode(*row, gamma, lam) for row in zip(*args, strict=True)])
    np.testing.assert_allclose(advantages.numpy(), expected, atol=1e-12)
    np.testing.assert_allclose(returns.numpy(), expected + args[1][:, :-1], atol=1e-12)


def samples(n=64, spread=0.4):
    random = torch.Generator().manual_seed(0)
    old = torch.randn(n, generator=random, dtype=torch.float64)
    new = (old + spread * torch.randn(n, generator=random, dtype=torch.float64)).requires_grad_()
    return new, old, torch.randn(n, generator=random, dtype=torch.float64)


def test_staleness_zero_is_ppo():
    new, old, advantages = samples()
    loss, stats = policy_loss(new, old, advantages, torch.zeros(64), 0.2, 5.0)
    (gradient,) = torch.autograd.grad(loss, new)

    again = new.detach().clone().requires_grad_()
    ratio = (again - old).exp()
    plain = torch.max(-advantages * ratio, -advantages * torch.clamp(ratio, 0.8, 1.2)).sum()  # CleanRL's form
    (expected,) = torch.autograd.grad(plain, again)
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(gradient, expected)
    assert stats["masked"] == 0 and stats["ratio_max"] == ratio.max()
    assert stats["clip_fraction"] == ((ratio < 0.8) | (ratio > 1.2)).sum() > 0
    torch.testing.assert_close(stats["approx_kl"], (ratio - 1 - ratio.log()).sum().detach())


def test_gradient_at_ratio_one_is_the_policy_gradient():
    _, old, advantages = samples()
    new = old.clone().requires_grad_()
    policy_loss(new, old, advantages, torch.zeros(64), 0.2, 5.0)[0].backward()
    torch.testing.assert_close(new.grad, -advantages)


def test_decoupled_objective_by_hand():
    # Staleness 1: prox = old + (new − old)/2, so w = ratio = √(π/π_old). With π/π_old = 1.44, w = ratio = 1.2 > 1 + ε = 1.1.
    new = torch.tensor([math.log(1.44)] * 2, dtype=torch.float64, requires_grad=True)
    loss, stats = policy_loss(new, torch.zeros(2), torch.tensor([2.0, -2.0]), torch.ones(2), 0.1, 5.0)
    assert loss.item() == pytest.approx(-1.2 * 1.1 * 2.0 + 1.2 * 1.2 * 2.0)  # A > 0 is clipped at 1.1, A < 0 is not
    loss.backward()
    assert new.grad.tolist() == pytest.approx([0.0, 1.2 * 1.2 * 2.0])  # w and prox carry no gradient
    assert stats["ratio_max"].item() == pytest.approx(1.44) and stats["clip_fraction"] == 2


def test_proximal_policy_is_interpolated_and_constant():
    new = torch.tensor([3.0, 3.0, 3.0], requires_grad=True)
    prox = proximal_logprob(new, torch.tensor([1.0, 1.0, 1.0]), torch.tensor([0.0, 1.0, 3.0]))
    assert prox.tolist() == [1.0, 2.0, 2.5] and not prox.requires_grad


def test_samples_above_the_behaviour_cap_are_masked_and_counted():
    new = torch.tensor([math.log(100.0), 0.1], requires_grad=True)  # w = √100 = 10 > 5
    loss, stats = policy_loss(new, torch.zeros(2), torch.tensor([-1.0, -1.0]), torch.ones(2), 0.2, 5.0)
    alone, _ = policy_loss(new[1:], torch.zeros(1), torch.tensor([-1.0]), torch.ones(1), 0.2, 5.0)
    loss.backward()
    assert stats["masked"] == 1 and loss.item() == pytest.approx(alone.item())
    assert new.grad[0] == 0.0 and new.grad[1] != 0.0


def test_a_masked_sample_cannot_poison_the_batch():
    new = torch.tensor([400.0, 0.1], requires_grad=True)  # ratio = e²⁰⁰ is infinite in fp32
    loss, stats = policy_loss(new, torch.zeros(2), torch.tensor([-1.0, -1.0]), torch.ones(2), 0.2, 5.0)
    loss.backward()
    assert stats["masked"] == 1 and math.isfinite(loss.item())
    assert new.grad[0] == 0.0 and math.isfinite(new.grad[1])


def test_losses_are_sums_so_micro_batches_add_up():
    new, old, advantages = samples()
    staleness = torch.arange(64) % 3
    whole = policy_loss(new, old, advantages, staleness, 0.2, 5.0)[0]
    quarters = zip(*(x.split(16) for x in (new, old, advantages, staleness)), strict=True)
    parts = [policy_loss(*quarter, 0.2, 5.0)[0] for quarter in quarters]
    torch.testing.assert_close(whole, sum(parts))


def test_value_loss():
    def huber(x, delta=2.0):
        return 0.5 * x**2 if abs(x) <= delta else delta * (abs(x) - 0.5 * delta)

    new, old, returns = [0.1, 1.0, 1.0, -5.0], [0.0, 0.0, 0.0, 0.0], [1.0, 1.0, -1.0, 5.0]
    expected = sum(max(huber(v - r), huber(o + min(max(v - o, -0.2), 0.2) - r)) for v, o, r in zip(new, old, returns, strict=True))
    found = value_loss(*(torch.tensor(x, dtype=torch.float64) for x in (new, old, returns)), 0.2, 2.0)
    assert found.item() == pytest.approx(expected)


def test_value_loss_stops_at_the_clip():
    new = torch.tensor([0.5, -0.5], requires_grad=True)  # moved by 0.5 > 0.2: towards the return, and away from it
    value_loss(new, torch.zeros(2), torch.tensor([2.0, 2.0]), 0.2, 10.0).backward()
    assert new.grad[0] == 0.0 and new.grad[1] != 0.0


def test_advantages_are_scaled_by_earlier_batches_only():
    scale, batches = AdvantageScale(0.75), [torch.tensor([3.0, 4.0]), torch.tensor([6.0, 8.0])]
    torch.testing.assert_close(scale(batches[0]), batches[0])  # nothing came before the first batch
    scale.update(8.0, 2, first=True)  # Σ A² = 8 of 2: root mean square 2, which replaces the starting value
    torch.testing.assert_close(scale(batches[1]), batches[1] / 2.0)
    torch.testing.assert_close(scale(batches[1][:1]), batches[1][:1] / 2.0)  # a part of a batch is scaled like the whole
    scale.update(200.0, 2, first=False)
    torch.testing.assert_close(scale(batches[0]), batches[0] / math.sqrt(0.75 * 4.0 + 0.25 * 100.0))


def test_zero_advantages_do_not_divide_by_zero():
    scale = AdvantageScale(0.9)
    scale.update(0.0, 2, first=True)
    assert scale(torch.zeros(3)).tolist() == [0.0, 0.0, 0.0]
