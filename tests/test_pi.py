"""π0.5 as a stochastic policy: Flow-SDE against the formulas, ratio 1 at staleness 0, noise by name, caching, padding."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, observations, tiny_pi
from torch.distributions import Normal

from config import Config, UserError
from envs import EnvSpec
from models import checkpoint
from models.pi import GemmaLayer, Pi, build, denoise_times, flow_sde_step, normal_logprob, ode_step, rotary, time_embedding

SMALL_PICTURE = {"image_size": 16, "patch": 8, "chunk": 4}
KEYS = [(1, lane, 2, 3) for lane in range(5)]


def to(dtype: torch.dtype, tensors: dict) -> dict:
    return {name: x.to(dtype) if x.is_floating_point() else x for name, x in tensors.items()}


def stored(model: Pi, obs: dict, out: dict) -> dict:
    """What `evaluate` finds in a slot."""
    return {name: (obs | out)[name].clone() for name in model.training_fields()}


# ---------------------------------------------------------------- the transition


@pytest.mark.parametrize("step", range(4))
def test_flow_sde_matches_the_published_formulas(step):
    times, a = [1.0, 0.75, 0.5, 0.25, 0.0], 0.5
    assert denoise_times(4) == times
    t, t_next = times[step], times[step + 1]
    delta, x, v = t - t_next, 0.7, -1.3
    sigma = a * math.sqrt(t / (1 - (t_next if t == 1.0 else t)))
    x0, x1 = x - v * t, x + v * (1 - t)
    mean = x0 * (1 - (t - delta)) + x1 * (t - delta - sigma**2 * delta / (2 * t))
    found = flow_sde_step(*(torch.full((1, 1, 1), z, dtype=torch.float64) for z in (x, v, t, t_next)), a)
    assert found[0].item() == pytest.approx(mean, abs=1e-12)
    assert found[1].item() == pytest.approx(math.sqrt(delta) * sigma, abs=1e-12)


def test_without_noise_flow_sde_is_the_ode_step():
    x, v = torch.randn(2, 3, 5, 4, dtype=torch.float64).unbind()
    t, t_next = (torch.full((3, 1, 1), z, dtype=torch.float64) for z in (0.75, 0.5))
    mean, std = flow_sde_step(x, v, t, t_next, 0.0)
    torch.testing.assert_close(mean, ode_step(x, v, t, t_next))
    assert (std == 0).all()
    data_end, noise_end = x - v * t, x + v * (1 - t)  # VLA_FACTS' ODE step
    torch.testing.assert_close(mean, data_end * (1 - t_next) + noise_end * t_next)


def test_flow_sde_keeps_the_marginal_to_first_order():
    # Data at 0, so x_t = t·ε and v = ε: var(x') must be t'² but for O(δ²).
    for delta in (1e-2, 1e-3):
        t, t_next = (torch.full((1, 1, 1), z, dtype=torch.float64) for z in (0.5, 0.5 - delta))
        one = torch.ones(1, 1, 1, dtype=torch.float64)
        mean, std = flow_sde_step(t * one, one, t, t_next, 0.5)
        assert abs(mean.item() ** 2 + std.item() ** 2 - t_next.item() ** 2) < 2 * delta**2


def test_logprob_is_the_normal_distribution_s():
    x, mean = torch.randn(2, 3, 5, 4, dtype=torch.float64).unbind()
    std = torch.rand(3, 1, 1, dtype=torch.float64) + 0.1
    torch.testing.assert_close(normal_logprob(x, mean, std), Normal(mean, std).log_prob(x).sum((1, 2)))


# ---------------------------------------------------------------- acting and evaluating


@pytest.mark.parametrize("train_vlm", [False, True])
def test_ratio_is_one_at_staleness_zero(train_vlm):
    model = tiny_pi(train_vlm=train_vlm)
    obs, noise = observations(model, 5), model.draw(KEYS, [True] * 5)
    out = model.act(obs, noise)
    again = model.evaluate(stored(model, obs, out))
    torch.testing.assert_close(again["logprob"], out["logprob"], atol=1e-5, rtol=0)
    torch.testing.assert_close(again["value"], out["value"], atol=1e-5, rtol=0)
    assert out["logprob"].abs().min() > 0.1 and out["value"].abs().min() > 1e-4


def test_logprob_and_entropy_are_of_the_one_stochastic_transition():
    model = tiny_pi()
    obs, noise = observations(model, 5), model.draw(KEYS, [True] * 5)
    out = model.act(obs, noise)
    cache, _, real = model.prefix(obs["image"], obs["tokens"])
    x, times, expected, entropy = noise["x1"], [1.0, 0.75, 0.5, 0.25, 0.0], torch.zeros(5), torch.zeros(5)
    for i in range(4):
        v = model.velocity(cache, real, x, torch.full((5,), times[i]))
        after = x + v * (times[i + 1] - times[i])
        for k in range(5):
            if noise["denoise_index"][k] == i:
                t, t_next = torch.tensor(times[i]), torch.tensor(times[i + 1])
                mean, std = flow_sde_step(x[k], v[k], t, t_next, 0.5)
                after[k] = mean + std * noise["epsilon"][k]
                expected[k] = Normal(mean, std).log_prob(after[k]).sum()
                entropy[k] = Normal(mean, std).entropy().mean()
        x = after
    torch.testing.assert_close(out["actions"], x, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out["logprob"], expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(model.evaluate(stored(model, obs, out))["entropy"], entropy.mean())


def test_gradient_of_logprob_matches_finite_differences():
    model = tiny_pi(torch.float64, **SMALL_PICTURE)
    obs, noise = observations(model, 3), to(torch.float64, model.draw(KEYS[:3], [True] * 3))
    batch = to(torch.float64, stored(model, obs, model.act(obs, noise)))
    for name in ("action_out_proj.weight", "expert.0.input_layernorm.dense.weight", "expert.1.q_proj.weight", "time_mlp_in.bias"):
        parameter = dict(model.named_parameters())[name]
        (gradient,) = torch.autograd.grad(model.evaluate(batch)["logprob"].sum(), parameter)
        position = gradient.abs().argmax()
        with torch.no_grad():
            ends = []
            for step in (1e-6, -2e-6, 1e-6):  # up, down, and back where it was
                parameter.view(-1)[position] += step
                ends.append(model.evaluate(batch)["logprob"].sum())
        numeric = (ends[0] - ends[1]) / 2e-6
        torch.testing.assert_close(gradient.view(-1)[position], numeric, rtol=1e-6, atol=1e-8)


def test_noise_does_not_depend_on_who_shares_the_batch():
    model = tiny_pi()
    obs, noise = observations(model, 5), model.draw(KEYS, [True] * 5)
    whole = model.act(obs, noise)
    order = [3, 1]
    part = model.act({n: x[order] for n, x in obs.items()}, model.draw([KEYS[i] for i in order], [True] * 2))
    assert torch.equal(part["denoise_index"], whole["denoise_index"][order])
    for name in ("actions", "logprob", "value", "x_t", "x_next", "prefix_cache", "prefix_feature"):
        torch.testing.assert_close(part[name], whole[name][order], atol=1e-5, rtol=0)
    batch = {n: x[order] for n, x in stored(model, obs, whole).items()}  # trained in another company than it acted in
    torch.testing.assert_close(model.evaluate(batch)["logprob"], whole["logprob"][order], atol=1e-5, rtol=0)


def test_noise_is_named_by_seed_lane_trajectory_and_step():
    model = tiny_pi()
    keys = [(1, 2, 3, 4), (1, 2, 3, 4), (9, 2, 3, 4), (1, 9, 3, 4), (1, 2, 9, 4), (1, 2, 3, 9), (1, 3, 2, 4)]
    noise = model.draw(keys, [True] * 7)
    assert torch.equal(noise["x1"][0], noise["x1"][1]) and torch.equal(noise["epsilon"][0], noise["epsilon"][1])
    assert len(noise["x1"][:, 0, 0].unique()) == 6 and not torch.equal(noise["x1"], noise["epsilon"])
    index = model.draw([(0, 0, 0, t) for t in range(400)], [True] * 400)["denoise_index"]
    assert index.bincount(minlength=4).min() > 60  # uniform over 4 steps: 100 each
    late = tiny_pi(sde_steps=2).draw([(0, 0, 0, t) for t in range(400)], [True] * 400)["denoise_index"]
    assert late.bincount(minlength=4)[:2].sum() == 0 and late.bincount(minlength=4)[2:].min() > 150


def test_without_exploration_acting_is_the_deterministic_ode():
    model = tiny_pi()
    obs, noise = observations(model, 4), model.draw(KEYS[:4], [False] * 4)
    assert noise["denoise_index"].tolist() == [-1] * 4
    out = model.act(obs, noise)
    other = model.act(obs, noise | {"epsilon": torch.randn(4, 10, 4)})
    assert torch.equal(out["actions"], other["actions"]) and (out["logprob"] == 0).all()
    cache, _, real = model.prefix(obs["image"], obs["tokens"])
    x = noise["x1"]
    for t in (1.0, 0.75, 0.5, 0.25):
        x = x - 0.25 * model.velocity(cache, real, x, torch.full((4,), t))
    torch.testing.assert_close(out["actions"], x, atol=1e-5, rtol=1e-5)
    exploring = model.act(obs, model.draw(KEYS[:4], [True] * 4))
    assert not torch.allclose(exploring["actions"], out["actions"], atol=1e-3)


# ---------------------------------------------------------------- the network


def test_a_stored_prefix_equals_a_recomputed_one():
    frozen, trained = tiny_pi(train_vlm=False), tiny_pi(train_vlm=True)  # the same weights
    obs = observations(frozen, 5)
    out = frozen.act(obs, frozen.draw(KEYS, [True] * 5))
    cached, recomputed = frozen.evaluate(stored(frozen, obs, out)), trained.evaluate(stored(trained, obs, out))
    assert "image" not in frozen.training_fields() and "prefix_cache" not in trained.training_fields()
    for name in ("logprob", "value", "entropy"):
        torch.testing.assert_close(cached[name], recomputed[name], atol=1e-5, rtol=0)


def test_padding_changes_nothing_and_words_do():
    model = tiny_pi()
    obs, noise = observations(model, 3), model.draw(KEYS[:3], [True] * 3)
    before = model.act(obs, noise)
    with torch.no_grad():
        model.embed_tokens.weight[0] = 10.0  # the padding token
    after = model.act(obs, noise)
    for name in ("actions", "logprob", "value"):
        torch.testing.assert_close(after[name], before[name], atol=1e-6, rtol=0)
    changed = obs["tokens"].clone()
    changed[:, 0] = changed[:, 0] % 398 + 1
    other = model.act(obs | {"tokens": changed}, noise)
    assert ((other["actions"] - before["actions"]).abs().amax((1, 2)) > 1e-4).all()
    assert ((other["value"] - before["value"]).abs() > 1e-6).all()


def test_one_key_value_head_serves_every_query_head():
    torch.manual_seed(0)
    n, length, past_length, heads, d = 2, 3, 4, 4, 8
    layer = GemmaLayer(16, 32, heads, d).double()
    x, past = torch.randn(n, length, 16, dtype=torch.float64), torch.randn(n, 2, past_length, d, dtype=torch.float64)
    positions = past_length + torch.arange(length).expand(n, length)
    mask = torch.zeros(n, 1, 1, past_length + length, dtype=torch.float64)
    mask[0, 0, 0, 1] = -math.inf
    found, own = layer(x, positions, mask, past)

    h = layer.input_layernorm(x)[0]
    key = rotary(layer.k_proj(h)[:, None], positions)[:, 0]
    keys, values = torch.cat([past[:, 0], key], 1), torch.cat([past[:, 1], layer.v_proj(h)], 1)
    outs = []
    for head in range(heads):
        query = rotary(layer.q_proj(h)[:, None, :, head * d : head * d + d], positions)[:, 0]
        weights = (query @ keys.transpose(1, 2) / math.sqrt(d) + mask[:, 0]).softmax(-1)
        outs.append(weights @ values)
    y = x + layer.o_proj(torch.cat(outs, -1))
    h = layer.post_attention_layernorm(y)[0]
    y = y + layer.mlp.down_proj(F.gelu(layer.mlp.gate_proj(h), approximate="tanh") * layer.mlp.up_proj(h))
    torch.testing.assert_close(found, y)
    torch.testing.assert_close(own, torch.stack([keys, values], 1)[:, :, past_length:])


def test_rotary_depends_on_relative_positions_only():
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64).unbind()
    dot = lambda i, j: (rotary(q, torch.tensor([[i]])) * rotary(k, torch.tensor([[j]]))).sum().item()  # noqa: E731
    assert dot(5, 3) == pytest.approx(dot(12, 10), abs=1e-5) and abs(dot(5, 3) - dot(5, 4)) > 1e-3


def test_time_embedding_has_periods_from_4e_3_to_4():
    t, width = 0.3, 8
    periods = [4e-3 * (4.0 / 4e-3) ** (i / 3) for i in range(4)]
    expected = [f(2 * math.pi * t / p) for f in (math.sin, math.cos) for p in periods]
    assert time_embedding(torch.tensor([t], dtype=torch.float64), width)[0].tolist() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("train_vlm", [False, True])
def test_what_reinforcement_learning_updates(train_vlm):
    model = tiny_pi(train_vlm=train_vlm)
    obs, names = observations(model, 2), set(model.trainable())
    out = model.evaluate(stored(model, obs, model.act(obs, model.draw(KEYS[:2], [True] * 2))))
    (out["logprob"].sum() + out["value"].sum()).backward()
    prefix = {n for n, _ in model.named_parameters() if n.startswith(("vision.", "embed_tokens.", "language.", "language_norm."))}
    moved = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert names == {n for n, _ in model.named_parameters()} if train_vlm else names.isdisjoint(prefix)
    assert names - prefix <= moved and bool(moved & prefix) == train_vlm


def test_the_value_head_does_not_move_what_it_reads():
    model = tiny_pi(train_vlm=True)
    obs, feature = observations(model, 2), model.vision.projector.weight
    batch = stored(model, obs, model.act(obs, model.draw(KEYS[:2], [True] * 2)))
    model.evaluate(batch)["value"].sum().backward()
    assert feature.grad is None and model.value_head[0].weight.grad.abs().max() > 0


def test_imitation_loss_is_flow_matching_s():
    model = tiny_pi(**SMALL_PICTURE)
    obs, actions, noise = observations(model, 3), torch.randn(3, 4, 4), torch.randn(3, 4, 4)
    t = torch.tensor([0.1, 0.5, 0.9])
    cache, _, real = model.prefix(obs["image"], obs["tokens"])
    x_t = t[:, None, None] * noise + (1 - t[:, None, None]) * actions
    error = model.velocity(cache, real, x_t, t) - (noise - actions)
    loss = model.imitation_loss(cache, real, actions, t, noise)
    torch.testing.assert_close(loss, error.square().mean())


# ---------------------------------------------------------------- building it


def spec(**changes) -> EnvSpec:
    return EnvSpec(("t",), ("p",), 1, 64, 4, 4, 100)._replace(**changes)


def test_build_loads_the_checkpoint_and_takes_the_run_s_settings(tiny_checkpoint):
    config = Config()
    config.train.checkpoint, config.rollout.noise_level, config.rollout.denoise_steps = tiny_checkpoint, 0.3, 5
    model, sized = build(config, spec()), build(config, spec(), weights=False)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), tiny_pi().state_dict().values(), strict=True))
    assert (model.config.noise_level, model.config.denoise_steps, model.config.width) == (0.3, 5, TINY["width"])
    assert all(p.is_meta for p in sized.parameters()) and sized.slot_fields() == model.slot_fields()


@pytest.mark.parametrize("change", [{"image_size": 32}, {"views": 2}, {"action_dim": 7}])
def test_build_refuses_another_simulator(tiny_checkpoint, change):
    config = Config()
    config.train.checkpoint = tiny_checkpoint
    with pytest.raises(UserError, match=next(iter(change))):
        build(config, spec(**change))


@pytest.mark.parametrize("steps", [0, 5])
def test_build_refuses_stochastic_steps_that_do_not_exist(tiny_checkpoint, steps):
    config = Config()
    config.train.checkpoint, config.rollout.sde_steps = tiny_checkpoint, steps
    with pytest.raises(UserError, match="--sde-steps"):
        build(config, spec())


def test_build_refuses_another_family(tmp_path):
    config = Config()
    config.train.checkpoint = tmp_path / "other.safetensors"
    checkpoint.save(config.train.checkpoint, checkpoint.Header("emulated", {}, {}), {"action": torch.zeros(1)})
    with pytest.raises(UserError, match="'emulated' model"):
        build(config, spec())
