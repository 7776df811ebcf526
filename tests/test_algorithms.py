"""Every function against numbers worked out by hand or an independent loop in float64, and against
what must always hold.
"""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from algorithms import (
    STALENESS,
    AdvantageScale,
    by_staleness,
    explained_variance,
    gae,
    group_advantages,
    interpolated_proximal,
    units,
    value_loss,
)
from policy_loss import CORRECTIONS, LARGEST, PolicyLoss, SecondMoment

fast = settings(deadline=None, derandomize=True, max_examples=60)
seeds = st.integers(0, 10**6)


def rows(*values):
    return torch.tensor([values], dtype=torch.float64)


# ---------------------------------------------------------------- advantages


def test_gae_by_hand():
    # γ = λ = 1/2, so γλ = 1/4; an episode ends at t = 1 (success, reward 1) and at t = 2 (time
    # limit). δ₃ = 0 + 5/2 − 4 = −1.5                 A₃ = −1.5 δ₂ = 0 + 0   − 3 = −3.0  (episode
    # over) A₂ = −3.0  (nothing carries) δ₁ = 1 + 0   − 2 = −1.0  (episode over) A₁ = −1.0 δ₀ = 0 +
    # 2/2 − 1 =  0.0                 A₀ = 0 + A₁/4 = −0.25
    args = rows(0, 1, 0, 0), rows(1, 2, 3, 4, 5), rows(0, 1, 0, 0), rows(0, 0, 1, 0), 0.5, 0.5
    advantages, returns = gae(*args)
    assert advantages.tolist() == [[-0.25, -1.0, -3.0, -1.5]]
    assert returns.tolist() == [[0.75, 1.0, 0.0, 2.5]]
    # With V = 8 of the last observation before the limit: δ₂ = 0 + 8/2 − 3 = 1; success still ends
    # at 0.
    bootstrapped, _ = gae(*args, final=rows(9, 9, 8, 9))
    assert bootstrapped.tolist() == [[-0.25, -1.0, 1.0, -1.5]]


def per_episode(reward, value, terminated, truncated, final, gamma, lam):
    """GAE as the definition states it: within each episode, a sum of discounted δ."""
    steps = len(reward)
    out = np.zeros(len(reward))
    for t in range(steps):
        for k in range(t, steps):
            if terminated[k]:
                after = 0.0
            elif truncated[k]:
                after = 0.0 if final is None else final[k]
            else:
                after = value[k + 1]
            out[t] += (gamma * lam) ** (k - t) * (reward[k] + gamma * after - value[k])
            if terminated[k] or truncated[k]:
                break
    return out


def episodes(n, steps, seed):
    rng = np.random.default_rng(seed)
    ends = rng.random((2, n, steps)) < 0.2
    return (
        rng.normal(size=(n, steps)),
        rng.normal(size=(n, steps + 1)),
        *ends,
        rng.normal(size=(n, steps)),
    )


@fast
@given(
    st.integers(1, 9),
    st.integers(1, 3),
    st.floats(0.0, 1.0),
    st.floats(0.0, 1.0),
    st.booleans(),
    seeds,
)
def test_gae_matches_the_per_episode_definition(steps, n, gamma, lam, bootstrap, seed):
    reward, value, terminated, truncated, final = episodes(n, steps, seed)
    final = final if bootstrap else None
    tensors = [
        None if x is None else torch.from_numpy(x)
        for x in (reward, value, terminated, truncated, final)
    ]
    advantages, returns = gae(*tensors[:4], gamma, lam, tensors[4])
    expected = [
        per_episode(
            reward[i],
            value[i],
            terminated[i],
            truncated[i],
            None if final is None else final[i],
            gamma,
            lam,
        )
        for i in range(n)
    ]
    np.testing.assert_allclose(advantages.numpy(), np.stack(expected), atol=1e-12)
    np.testing.assert_allclose(returns.numpy(), np.stack(expected) + value[:, :-1], atol=1e-12)


@fast
@given(st.integers(1, 4), st.integers(2, 4), seeds)
def test_gae_of_control_steps_sums_up_to_that_of_chunk_steps(chunks, actions, seed):
    # With γ = λ = 1 and values that agree at the ends of chunks, a chunk's advantage is its first
    # action's.
    rng = np.random.default_rng(seed)
    reward = rng.normal(size=(1, chunks * actions))
    value = rng.normal(size=(1, chunks * actions + 1))
    never = torch.zeros(1, chunks * actions)
    coarse = torch.zeros(1, chunks)
    fine, _ = gae(torch.from_numpy(reward), torch.from_numpy(value), never, never, 1.0, 1.0)
    by_chunk = torch.from_numpy(reward).unflatten(1, (chunks, actions)).sum(2)
    whole, _ = gae(by_chunk, torch.from_numpy(value)[:, ::actions], coarse, coarse, 1.0, 1.0)
    torch.testing.assert_close(whole, fine[:, ::actions])


@fast
@given(st.integers(1, 4), st.integers(1, 4), st.floats(0.0, 1.0), st.floats(0.0, 1.0), seeds)
def test_advantages_of_actions_and_tokens(chunks, actions, gamma, lam, seed):
    """From rewards and values of control steps, which episodes may end at within a chunk, to the
    loss of every action or token."""
    reward, value, terminated, truncated, _ = episodes(2, chunks * actions, seed)
    found, _ = gae(*map(torch.from_numpy, (reward, value, terminated, truncated)), gamma, lam)
    found = found.unflatten(1, (chunks, actions)).flatten(0, 1)  # [samples, C]
    random = torch.Generator().manual_seed(seed)
    old, new = torch.randn(2, 2 * chunks, actions, 3, generator=random, dtype=torch.float64)
    for granularity, advantages in (
        ("action", found),
        ("token", found.repeat_interleave(3, dim=1)),
    ):
        ratio = (units(new, granularity), units(old, granularity))
        loss, _ = PolicyLoss(weight_mode="truncate", weight_max=100.0)(*ratio, ratio[1], advantages)
        total = 0.0
        for i in range(2):
            wanted = per_episode(reward[i], value[i], terminated[i], truncated[i], None, gamma, lam)
            for step, a in enumerate(wanted):
                sample = i * chunks + step // actions
                action = step % actions
                difference = (new - old)[sample, action].tolist()
                for log in [sum(difference)] if granularity == "action" else difference:
                    ratio_of = math.exp(log)
                    total -= min(ratio_of * a, min(max(ratio_of, 0.8), 1.2) * a) / (
                        actions * (1 if granularity == "action" else 3)
                    )
        assert loss.item() == pytest.approx(total, rel=1e-9, abs=1e-9)


@fast
@given(st.integers(1, 8), seeds)
def test_nothing_passes_the_end_of_an_episode(t, seed):
    reward, value, _, _, _ = episodes(1, 9, seed)
    ends = np.zeros((1, 9), bool)
    ends[0, t] = True
    before = gae(*map(torch.from_numpy, (reward, value, ends, np.zeros_like(ends))), 0.9, 0.95)[0]
    # another next episode
    reward[0, t + 1 :] = 7.0
    value[0, t + 1 :] = -7.0
    after = gae(*map(torch.from_numpy, (reward, value, ends, np.zeros_like(ends))), 0.9, 0.95)[0]
    torch.testing.assert_close(before[:, : t + 1], after[:, : t + 1])


def test_group_advantages_by_hand():
    outcome = torch.tensor(
        [[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]], dtype=torch.float64
    )
    advantages, kept = group_advantages(outcome, 0.1, 0.9)
    # mean 1/4, standard deviation √3/4: (3/4)/(√3/4) = √3 and −1/√3
    expected = [3**0.5, -(3**-0.5), -(3**-0.5), -(3**-0.5)]
    assert kept.tolist() == [True, False, False] and advantages[0].tolist() == pytest.approx(
        expected, abs=1e-5
    )
    assert not advantages[1:].any()


@fast
@given(st.integers(1, 5), st.integers(2, 9), st.floats(0.0, 0.5), seeds)
def test_group_advantages_are_centred_scaled_and_filtered(groups, size, low, seed):
    outcome = torch.from_numpy(
        np.random.default_rng(seed).integers(0, 2, (groups, size)).astype(np.float64)
    )
    advantages, kept = group_advantages(outcome, low, 1.0 - low)
    for i, group in enumerate(outcome.tolist()):
        mean = sum(group) / size
        deviation = math.sqrt(sum((x - mean) ** 2 for x in group) / size)
        assert kept[i] == (low <= mean <= 1.0 - low)
        wanted = [(x - mean) / (deviation + 1e-6) if kept[i] else 0.0 for x in group]
        assert advantages[i].tolist() == pytest.approx(wanted)
        assert advantages[i].sum().item() == pytest.approx(0.0, abs=1e-6)
        order = np.random.default_rng(seed).permutation(
            size
        )  # who stands where in the group does not matter
        torch.testing.assert_close(
            group_advantages(outcome[i : i + 1, order], low, 1.0 - low)[0][0], advantages[i, order]
        )


def test_advantages_are_scaled_by_earlier_batches_only():
    scale = AdvantageScale(0.75)
    batches = [torch.tensor([3.0, 4.0]), torch.tensor([6.0, 8.0])]
    torch.testing.assert_close(scale(batches[0]), batches[0])  # nothing came before the first batch
    scale.update(
        8.0, 2, first=True
    )  # Σ A² = 8 of 2: root mean square 2, which replaces the starting value
    torch.testing.assert_close(scale(batches[1]), batches[1] / 2.0)
    torch.testing.assert_close(
        scale(batches[1][:1]), batches[1][:1] / 2.0
    )  # a part of a batch is scaled like the whole
    scale.update(200.0, 2, first=False)
    torch.testing.assert_close(scale(batches[0]), batches[0] / math.sqrt(0.75 * 4.0 + 0.25 * 100.0))


def test_zero_advantages_do_not_divide_by_zero():
    scale = AdvantageScale(0.9)
    scale.update(0.0, 2, first=True)
    assert scale(torch.zeros(3)).tolist() == [0.0, 0.0, 0.0]


# ---------------------------------------------------------------- policy


def test_units_of_a_chunk():
    x = torch.arange(12.0).view(1, 2, 3, 2)[0]  # two chunks of three actions of two numbers
    assert units(x, "chunk").tolist() == [[15.0], [51.0]]
    assert units(x, "action").tolist() == [[1.0, 5.0, 9.0], [13.0, 17.0, 21.0]]
    assert units(x, "token").tolist() == x.flatten(1).tolist()


def samples(n=64, u=3, spread=0.4, seed=0):
    random = torch.Generator().manual_seed(seed)
    old = torch.randn(n, u, generator=random, dtype=torch.float64)
    new = (old + spread * torch.randn(n, u, generator=random, dtype=torch.float64)).requires_grad_()
    return (
        new,
        old,
        torch.randn(n, generator=random, dtype=torch.float64),
        torch.randint(0, 4, (n,), generator=random),
    )


def by_loop(new, old, prox, advantages, low, high, dual, most, mode) -> float:
    """The objective as its definition states it, one unit after the other."""
    total = 0.0
    for i in range(new.shape[0]):
        for u in range(new.shape[1]):
            weight = math.exp(prox[i, u] - old[i, u])
            ratio = math.exp(new[i, u] - prox[i, u])
            if weight > most:
                if mode == "mask":
                    continue
                weight = most
            a = float(advantages[i] if advantages.dim() == 1 else advantages[i, u])
            value = min(ratio * a, min(max(ratio, 1.0 - low), 1.0 + high) * a)
            if dual and a < 0:
                value = max(value, dual * a)
            total -= weight * value / new.shape[1]
    return total


@fast
@given(
    st.floats(0.05, 0.4),
    st.floats(0.05, 0.4),
    st.sampled_from([0.0, 1.2, 3.0]),
    st.floats(1.0, 1.5),
    st.sampled_from(["mask", "truncate"]),
    st.integers(1, 4),
    st.booleans(),
    seeds,
)
def test_the_objective_matches_its_definition(low, high, dual, most, mode, u, of_units, seed):
    new, old, advantages, staleness = samples(20, u, seed=seed)
    if of_units:
        advantages = torch.randn(
            20, u, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
        )
    prox = interpolated_proximal(new, old, staleness.double())
    loss = PolicyLoss(
        clip_low=low, clip_high=high, dual_clip=dual, weight_max=most, weight_mode=mode
    )
    found, stats = loss(new, old, prox, advantages)
    wanted = by_loop(new.detach(), old, prox, advantages, low, high, dual, most, mode)
    assert found.item() == pytest.approx(wanted, abs=1e-9)
    above = ((prox - old).exp() > most).sum().item() / u
    assert stats["masked_fraction"].item() == pytest.approx(above if mode == "mask" else 0.0)
    (gradient,) = torch.autograd.grad(found, new)
    # away from the kinks, autograd's gradient is the definition's, with prox and w held fixed
    h = 1e-6
    for i in range(3):
        ends = []
        for step in (h, -h):
            moved = new.detach().clone()
            moved[i, 0] += step
            ends.append(by_loop(moved, old, prox, advantages, low, high, dual, most, mode))
        slope = (ends[0] - ends[1]) / (2 * h)
        ratio = math.exp(new[i, 0].item() - prox[i, 0].item())
        kinks = (1.0 - low, 1.0 + high, *([dual] if dual else []))
        if min(abs(ratio - kink) for kink in kinks) > 1e-4:
            assert gradient[i, 0].item() == pytest.approx(slope, abs=1e-6)


def test_staleness_zero_is_ppo():
    new, old, advantages, _ = samples(u=1)
    loss, stats = PolicyLoss()(
        new, old, interpolated_proximal(new, old, torch.zeros(64)), advantages
    )
    (gradient,) = torch.autograd.grad(loss, new)
    again = new.detach().clone().requires_grad_()
    ratio = (again - old).exp()
    a = advantages[:, None]
    plain = torch.max(-a * ratio, -a * torch.clamp(ratio, 0.8, 1.2)).sum()  # CleanRL's form
    (expected,) = torch.autograd.grad(plain, again)
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(gradient, expected)
    assert stats["masked_fraction"] == 0
    assert stats["clip_fraction"] == ((ratio < 0.8) | (ratio > 1.2)).sum() > 0
    distance = by_staleness(new, old, torch.zeros(64))
    assert distance["ratio_max"] == ratio.max()
    torch.testing.assert_close(distance["approx_kl"], (ratio - 1 - ratio.log()).sum().detach())


def test_inside_the_clip_the_action_is_corrected_in_full():
    """Whatever the proximal policy, interpolated at any staleness or another: the gradient is r·A
    per sample, r = new / old."""
    generator = torch.Generator().manual_seed(0)
    old = torch.randn(12, 1, dtype=torch.float64, generator=generator)
    a = torch.randn(12, dtype=torch.float64, generator=generator)
    for staleness in (0.0, 1.0, 3.0, 8.0, None):
        new = (
            old + torch.empty_like(old).uniform_(-0.15, 0.15, generator=generator)
        ).requires_grad_()
        prox = (
            old + 0.05
            if staleness is None
            else interpolated_proximal(new, old, torch.full_like(a, staleness))
        )
        loss, _ = PolicyLoss(clip_low=0.2, clip_high=0.25)(new, old, prox, a)
        (gradient,) = torch.autograd.grad(loss, new)
        torch.testing.assert_close(
            gradient[:, 0], -(new - old).exp()[:, 0].detach() * a, rtol=1e-12, atol=0
        )
        log_weight = (
            prox - old
        )  # and beyond the clip, where it would raise the objective further, there is none
        further = (old + log_weight + 0.3).detach().requires_grad_()
        loss, _ = PolicyLoss(clip_low=0.2, clip_high=0.25)(further, old, old + log_weight, a.abs())
        assert not torch.autograd.grad(loss, further)[0].any()


@pytest.mark.parametrize("u", [1, 5])
def test_gradient_at_ratio_one_is_the_policy_gradient(u):
    _, old, advantages, _ = samples(u=u)
    new = old.clone().requires_grad_()
    PolicyLoss()(new, old, old, advantages)[0].backward()
    torch.testing.assert_close(new.grad, -advantages[:, None].expand(-1, u) / u)


def test_decoupled_objective_by_hand():
    # Staleness 1: prox = old + (new − old)/2, so w = ratio = √(π/π_old). With π/π_old = 1.44, w =
    # ratio = 1.2 > 1 + ε = 1.1.
    new = torch.tensor([[math.log(1.44)]] * 2, dtype=torch.float64, requires_grad=True)
    prox = interpolated_proximal(new, torch.zeros(2, 1), torch.ones(2))
    loss, stats = PolicyLoss(clip_low=0.1, clip_high=0.1)(
        new, torch.zeros(2, 1), prox, torch.tensor([2.0, -2.0])
    )
    assert loss.item() == pytest.approx(
        -1.2 * 1.1 * 2.0 + 1.2 * 1.2 * 2.0
    )  # A > 0 is clipped at 1.1, A < 0 is not
    loss.backward()
    assert new.grad.flatten().tolist() == pytest.approx(
        [0.0, 1.2 * 1.2 * 2.0]
    )  # w and prox carry no gradient
    distance = by_staleness(new, torch.zeros(2, 1), torch.ones(2))
    assert distance["ratio_max"].item() == pytest.approx(1.44) and stats["clip_fraction"] == 2


def test_dual_clip_bounds_what_a_bad_action_costs():
    new = torch.tensor([[math.log(10.0)]], requires_grad=True)
    plain = PolicyLoss()(new, torch.zeros(1, 1), torch.zeros(1, 1), torch.tensor([-1.0]))[0]
    bounded = PolicyLoss(dual_clip=3.0)(
        new, torch.zeros(1, 1), torch.zeros(1, 1), torch.tensor([-1.0])
    )[0]
    assert plain.item() == pytest.approx(10.0) and bounded.item() == pytest.approx(3.0)
    assert torch.autograd.grad(bounded, new)[0].item() == 0.0


@fast
@given(seeds)
def test_proximal_policy_lies_between_the_old_and_the_new(seed):
    new, old, _, staleness = samples(16, 2, seed=seed)
    prox = interpolated_proximal(new, old, staleness.double())
    assert not prox.requires_grad and torch.equal(prox[staleness == 0], old[staleness == 0])
    assert ((prox - old) * (new - prox) >= -1e-12).all()
    further = [
        (interpolated_proximal(new, old, torch.full((16,), float(d))) - old).abs() for d in range(4)
    ]
    assert all(
        (b >= a - 1e-12).all() for a, b in pairwise(further)
    )  # the staler, the nearer to the new
    assert interpolated_proximal(
        torch.full((3, 1), 3.0), torch.ones(3, 1), torch.tensor([0.0, 1.0, 3.0])
    ).flatten().tolist() == [1.0, 2.0, 2.5]


def test_a_masked_sample_cannot_poison_the_batch():
    new = torch.tensor([[400.0], [0.1]], requires_grad=True)  # ratio = e²⁰⁰ is infinite in fp32
    prox = interpolated_proximal(new, torch.zeros(2, 1), torch.ones(2))
    loss, stats = PolicyLoss()(new, torch.zeros(2, 1), prox, torch.tensor([-1.0, -1.0]))
    alone = PolicyLoss()(new[1:], torch.zeros(1, 1), prox[1:], torch.tensor([-1.0]))[0]
    loss.backward()
    assert stats["masked_fraction"] == 1 and loss.item() == pytest.approx(alone.item())
    assert new.grad[0] == 0.0 and new.grad[1] != 0.0 and math.isfinite(new.grad[1])


def divergence(p: float, q: float) -> float:
    """D(p‖q) of two probabilities, as its definition states it."""
    return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))


def kept_by_definition(mode: str, i: int, u: int, old, prox, bounds: dict[str, float]) -> bool:
    """Whether unit u of sample i is trained, by the table in PolicyLoss's docstring."""
    w = [math.exp(float(p - o)) for p, o in zip(prox[i], old[i], strict=True)]
    if mode == "truncate":
        return True
    if mode == "kpop":
        p = math.exp(prox[i, u])
        q = math.exp(old[i, u])
        return max(divergence(p, q), divergence(q, p)) <= bounds["trust"]
    if mode == "m2po":
        return math.log(w[u]) ** 2 <= bounds["cut"]
    ratio = {"sequence": math.prod(w), "geometric": math.prod(w) ** (1 / len(w))}.get(mode, w[u])
    return bounds.get("weight_min", 0.0) <= ratio <= bounds["weight_max"]


def corrected_by_loop(mode, new, old, prox, advantages, bounds) -> tuple[float, torch.Tensor, int]:
    """The loss, its gradient by `new`, and how many units are masked: plain numbers, one unit after
    the other."""
    total = 0.0
    slope = torch.zeros_like(new)
    masked = 0
    for i in range(len(new)):
        for u in range(new.shape[1]):
            a = float(advantages[i])
            if mode == "gipo":
                x = float(new[i, u] - old[i, u])
                value = math.exp(-0.5 * (x / bounds["trust"]) ** 2) * math.exp(x) * a
                total -= value / new.shape[1]
                slope[i, u] = -value / new.shape[1]
                continue
            if not kept_by_definition(mode, i, u, old, prox, bounds):
                masked += 1
                continue
            w = math.exp(prox[i, u] - old[i, u])
            w = min(w, bounds["weight_max"]) if mode == "truncate" else w
            ratio = math.exp(new[i, u] - prox[i, u])
            clipped = min(max(ratio, 0.8), 1.2)
            total -= w * min(ratio * a, clipped * a) / new.shape[1]
            if ratio * a <= clipped * a:
                slope[i, u] = -w * ratio * a / new.shape[1]
    return total, slope, masked


@settings(deadline=None, derandomize=True, max_examples=40)
@pytest.mark.parametrize("mode", CORRECTIONS)
@given(u=st.integers(1, 4), spread=st.sampled_from([0.0, 0.05, 0.4, 2.0]), seed=seeds)
def test_every_correction_is_its_equation(mode, u, spread, seed):
    """Loss, gradient and masked share; only `new` has a gradient, also where `prox` would."""
    random = torch.Generator().manual_seed(seed)
    old = -0.01 - 3.0 * torch.rand(20, u, generator=random, dtype=torch.float64)  # log-probs
    prox = (old + spread * torch.randn(20, u, generator=random, dtype=torch.float64)).clamp(
        max=-1e-3
    )
    new = prox + 0.2 * torch.randn(20, u, generator=random, dtype=torch.float64)
    advantages = torch.randn(20, generator=random, dtype=torch.float64)
    bounds = CORRECTIONS[mode] | ({"cut": 0.1} if mode == "m2po" else {})
    wanted, slope, masked = corrected_by_loop(mode, new, old, prox, advantages, bounds)
    new.requires_grad_()
    loss, numbers = PolicyLoss(weight_mode=mode, **bounds)(new, old, prox, advantages)
    loss.backward()
    assert loss.item() == pytest.approx(wanted, rel=1e-9, abs=1e-9)
    torch.testing.assert_close(new.grad, slope)
    assert numbers["masked_fraction"].item() == pytest.approx(masked / u)


def test_every_mask_masks_and_the_sequence_s_are_another_mask_than_the_unit_s():
    """Three units that move by +, − and nothing: each leaves its bounds, and the product is 1."""
    old = torch.full((1, 3), -1.0)
    prox = old + torch.tensor([[0.8, -0.8, 0.0]])
    advantages = torch.ones(1)
    share = {
        mode: PolicyLoss(weight_mode=mode, **bounds | ({"cut": 0.1} if mode == "m2po" else {}))(
            prox, old, prox, advantages
        )[1]["masked_fraction"].item()
        for mode, bounds in CORRECTIONS.items()
    }
    third = pytest.approx(1 / 3)
    assert share["mask"] == share["truncate"] == share["gipo"] == 0.0
    assert share["sequence"] == share["geometric"] == 0.0
    assert share["icepop"] == third  # e^−0.8 is below a half
    assert share["m2po"] == share["kpop"] == pytest.approx(2 / 3)
    moved = old + torch.tensor([[0.8, 0.8, 0.0]])
    for mode, most in (("sequence", 4.0), ("geometric", 1.5)):
        loss = PolicyLoss(weight_mode=mode, weight_min=0.5, weight_max=most)
        assert loss(moved, old, moved, advantages)[1]["masked_fraction"].item() == 1.0  # as a whole


@pytest.mark.parametrize("mode", CORRECTIONS)
@pytest.mark.parametrize("size", [30.0, 400.0, 1e20, 1e30])
def test_no_correction_makes_a_nan_of_what_is_huge(mode, size):
    """Also in float32, and beside a unit that is as it was, which is trained as if it were
    alone."""
    loss = PolicyLoss(weight_mode=mode, **CORRECTIONS[mode])
    for far in (-size, size):
        old = torch.tensor([[0.0, -1.0], [-1.0, -1.0]])
        prox = torch.tensor([[far, -far], [-1.0, -1.0]])
        if mode == "kpop":
            old = old.clamp(max=0.0)
            prox = prox.clamp(max=0.0)
        new = prox.clone().requires_grad_()
        value, numbers = loss(new, old, prox, torch.ones(2))
        value.backward()
        assert math.isfinite(value.item()) and new.grad.isfinite().all()
        assert 0.0 <= numbers["masked_fraction"] <= 1.0
        assert new.grad[1].tolist() == pytest.approx([-0.5, -0.5])


def test_the_second_moment_s_cut_keeps_the_mean_of_what_is_below_it():
    """Against sorting a whole batch, in whatever passes it was tallied."""
    random = torch.Generator().manual_seed(0)
    for spread in (0.0, 0.01, 0.3, 1.0, 30.0):
        log_weight = spread * torch.randn(500, 2, generator=random, dtype=torch.float64)
        moment = SecondMoment(0.04)
        totals = {}
        for part in log_weight.split((1, 99, 400)):
            for name, found in moment.measure(part).items():
                for i, x in enumerate(found.tolist()):
                    totals[f"{name}_{i}"] = totals.get(f"{name}_{i}", 0.0) + x
        cut = moment.cut(totals, before=1.0)
        squares = sorted(log_weight.square().flatten().tolist())
        means = np.cumsum(squares) / np.arange(1, len(squares) + 1)
        exact = means.searchsorted(0.04, side="right")  # how many AReaL keeps
        if exact == len(squares):
            assert cut == LARGEST
            continue
        kept = np.searchsorted(squares, cut, side="right")
        wider = np.searchsorted(squares, cut * 2**0.5, side="right")
        assert cut >= 0.04 and kept <= exact < wider
    assert moment.cut({}, before=1.0) == 1.0  # every group was filtered
    assert (
        moment.cut(
            {f"{n}_{i}": 0.0 for n in ("units_below", "squares_below") for i in range(22)}, 2.0
        )
        == 2.0
    )


@fast
@given(st.integers(1, 3), seeds)
def test_losses_are_sums_so_micro_batches_add_up(u, seed):
    new, old, advantages, staleness = samples(u=u, seed=seed)
    prox = interpolated_proximal(new, old, staleness.double())
    whole, stats = PolicyLoss()(new, old, prox, advantages)
    quarters = [
        PolicyLoss()(*part)
        for part in zip(*(x.split(16) for x in (new, old, prox, advantages)), strict=True)
    ]
    torch.testing.assert_close(whole, sum(loss for loss, _ in quarters))
    for name in ("clip_fraction", "masked_fraction"):
        torch.testing.assert_close(stats[name], sum(part[name] for _, part in quarters))
    distance = by_staleness(new, old, staleness)
    split = [x.split(16) for x in (new, old, staleness)]
    parts = [by_staleness(*part) for part in zip(*split, strict=True)]
    assert distance.pop("ratio_max") == max(part["ratio_max"] for part in parts)
    for name, whole_sum in distance.items():
        torch.testing.assert_close(whole_sum, sum(part[name] for part in parts))
    # Units that are all alike weigh as one.
    torch.testing.assert_close(
        PolicyLoss()(*(x.repeat(1, 4) for x in (new, old, prox)), advantages)[0], whole
    )


def test_diagnostics_by_staleness():
    new, old, _, staleness = samples(200, 2)
    staleness[:5] = 7
    found = by_staleness(new, old, staleness)
    log_ratio = (new - old).detach()
    for i, name in enumerate(STALENESS):
        here = staleness >= 3 if i == 3 else staleness == i
        assert found[f"samples_at_{name}"] == here.sum() > 0
        torch.testing.assert_close(found[f"ratio_at_{name}"], log_ratio[here].exp().mean(1).sum())
        torch.testing.assert_close(
            found[f"kl_at_{name}"], (log_ratio[here].exp() - 1 - log_ratio[here]).mean(1).sum()
        )
    assert sum(found[f"samples_at_{name}"] for name in STALENESS) == 200


# ---------------------------------------------------------------- value


def test_value_loss():
    def huber(x, delta=2.0):
        return 0.5 * x**2 if abs(x) <= delta else delta * (abs(x) - 0.5 * delta)

    new = [0.1, 1.0, 1.0, -5.0]
    old = [0.0, 0.0, 0.0, 0.0]
    returns = [1.0, 1.0, -1.0, 5.0]
    expected = sum(
        max(huber(v - r), huber(o + min(max(v - o, -0.2), 0.2) - r))
        for v, o, r in zip(new, old, returns, strict=True)
    )
    found = value_loss(
        *(torch.tensor(x, dtype=torch.float64) for x in (new, old, returns)), 0.2, 2.0
    )
    assert found.item() == pytest.approx(expected)


def test_value_loss_stops_at_the_clip():
    new = torch.tensor(
        [0.5, -0.5], requires_grad=True
    )  # moved by 0.5 > 0.2: towards the return, and away from it
    value_loss(new, torch.zeros(2), torch.tensor([2.0, 2.0]), 0.2, 10.0).backward()
    assert new.grad[0] == 0.0 and new.grad[1] != 0.0


@fast
@given(st.integers(2, 40), seeds)
def test_explained_variance(n, seed):
    rng = np.random.default_rng(seed)
    returns = rng.normal(size=n)
    values = rng.normal(size=n)
    error = returns - values
    found = explained_variance(returns.sum(), (returns**2).sum(), error.sum(), (error**2).sum(), n)
    assert found == pytest.approx(1.0 - error.var() / returns.var(), rel=1e-6)
    assert explained_variance(returns.sum(), (returns**2).sum(), 0.0, 0.0, n) == pytest.approx(1.0)
    assert (
        explained_variance(2.0 * n, 4.0 * n, 1.0, 1.0, n) == 0.0
    )  # returns that are all alike leave nothing to explain
