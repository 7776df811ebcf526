"""π0 and π0.5 as stochastic policies: transitions against the formulas, ratio 1 at staleness 0,
noise by name, caching, padding.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import NOISE_KEYS, TINY, observations, slopes, tiny_pi
from torch.distributions import Normal

from config import Config
from envs import EnvSpec
from errors import UserError
from models import build, checkpoint
from models.flow import flow_sde_step, normal_logprob, ode_step
from models.layers import frequencies, rotary, rotate
from models.pi import FULL, SMALL, GemmaLayer, Pi, bounded, time_embedding

SMALL_PICTURE = {"image_size": 16, "patch": 8, "chunk": 4}
KEYS = [(1, lane, 2, 3) for lane in range(5)]
KINDS = {
    "pi05": {},
    "pi0": {"pi05": False},
    "pi05 network": {"noise": "network"},
    "pi0 network": {"pi05": False, "noise": "network"},
}
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def to(dtype: torch.dtype, tensors: dict) -> dict:
    return {name: x.to(dtype) if x.is_floating_point() else x for name, x in tensors.items()}


def stored(model: Pi, obs: dict, out: dict) -> dict:
    """What `evaluate` finds in a slot."""
    return {name: (obs | out)[name].clone() for name in model.training_fields()}


# ---------------------------------------------------------------- the transition


@pytest.mark.parametrize("step", range(4))
def test_flow_sde_matches_the_published_formulas(step):
    times = [1.0, 0.75, 0.5, 0.25, 0.0]
    a = 0.5
    assert Pi(SMALL["pi0"]).times() == times
    t = times[step]
    t_next = times[step + 1]
    delta = t - t_next
    x = 0.7
    v = -1.3
    sigma = a * math.sqrt(t / (1 - (t_next if t == 1.0 else t)))
    x0 = x - v * t
    x1 = x + v * (1 - t)
    mean = x0 * (1 - (t - delta)) + x1 * (t - delta - sigma**2 * delta / (2 * t))
    found = flow_sde_step(
        *(torch.full((1, 1, 1), z, dtype=torch.float64) for z in (x, v, t, t_next)), a
    )
    assert found[0].item() == pytest.approx(mean, abs=1e-12)
    assert found[1].item() == pytest.approx(math.sqrt(delta) * sigma, abs=1e-12)


def test_without_noise_flow_sde_is_the_ode_step():
    x, v = torch.randn(2, 3, 5, 4, dtype=torch.float64).unbind()
    t, t_next = (torch.full((3, 1, 1), z, dtype=torch.float64) for z in (0.75, 0.5))
    mean, std = flow_sde_step(x, v, t, t_next, 0.0)
    torch.testing.assert_close(mean, ode_step(x, v, t, t_next))
    assert (std == 0).all()
    # the published ODE step
    data_end = x - v * t
    noise_end = x + v * (1 - t)
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
    torch.testing.assert_close(normal_logprob(x, mean, std), Normal(mean, std).log_prob(x))


# ---------------------------------------------------------------- acting and evaluating


@every_kind
@pytest.mark.parametrize(
    "how",
    [{}, {"train_vlm": True}, {"cache_prefix": False}, {"executed_steps": 6, "executed_dims": 3}],
)
def test_ratio_is_one_at_staleness_zero(kind, how):
    model = tiny_pi(**kind | how)
    obs = observations(model, 5)
    noise = model.draw(KEYS, [True] * 5)
    out = model.act(obs, noise)
    again = model.evaluate(stored(model, obs, out))
    torch.testing.assert_close(
        again["logprob"].sum((1, 2)), out["logprob"].sum((1, 2)), atol=1e-5, rtol=0
    )
    torch.testing.assert_close(again["value"], out["value"], atol=1e-5, rtol=0)
    assert out["logprob"].sum((1, 2)).abs().min() > 0.1 and out["value"].abs().min() > 1e-4


def test_logprob_is_of_the_one_stochastic_transition():
    model = tiny_pi()
    obs = observations(model, 5)
    noise = model.draw(KEYS, [True] * 5)
    out = model.act(obs, noise)
    cache, _, real = model.prefix(obs["image"], obs["tokens"])
    x = noise["noise"]
    times = [1.0, 0.75, 0.5, 0.25, 0.0]
    expected = torch.zeros(5)
    for i in range(4):
        v = model.velocity(cache, real, x, torch.full((5,), times[i]))
        after = x + v * (times[i + 1] - times[i])
        for k in range(5):
            if noise["denoise_index"][k] == i:
                t = torch.tensor(times[i])
                t_next = torch.tensor(times[i + 1])
                mean, std = flow_sde_step(x[k], v[k], t, t_next, 0.5)
                after[k] = mean + std * noise["epsilon"][k]
                expected[k] = Normal(mean, std).log_prob(after[k]).sum()
        x = after
    torch.testing.assert_close(out["actions"], x, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out["logprob"].sum((1, 2)), expected, atol=1e-4, rtol=0)
    # Its deviation is a constant of time: there is no entropy to watch.
    assert "entropy" not in model.evaluate(stored(model, obs, out))


def test_the_entropy_is_of_the_learned_deviation():
    model = tiny_pi(noise="network")
    obs = observations(model, 5)
    out = model.act(obs, model.draw(KEYS, [True] * 5))
    batch = stored(model, obs, out)
    cache, _, real = model.prefix(obs["image"], obs["tokens"])
    times = torch.tensor([1.0, 0.75, 0.5, 0.25])[batch["denoise_index"].long()]
    h = model.suffix(cache, real, batch["x_t"], times)
    std = bounded(model.noise_head(h), model.config.noise_range)
    entropy = Normal(torch.zeros_like(std), std).entropy().mean()
    torch.testing.assert_close(model.evaluate(batch)["entropy"], entropy)


@every_kind
def test_gradient_of_logprob_matches_finite_differences(kind):
    model = tiny_pi(torch.float64, **SMALL_PICTURE | kind)
    obs = to(torch.float64, observations(model, 3))
    noise = to(torch.float64, model.draw(KEYS[:3], [True] * 3))
    batch = to(torch.float64, stored(model, obs, model.act(obs, noise)))
    names = ["action_out_proj.weight", "expert.1.q_proj.weight"] + (
        ["noise_head.0.weight"] if "noise" in kind else []
    )
    names += ["state_proj.weight", "action_time_mlp_in.weight", "expert.0.input_layernorm.weight"]
    names += ["time_mlp_in.bias", "expert.0.input_layernorm.dense.weight"]
    for name in (name for name in names if name in dict(model.named_parameters())):
        gradient, numeric = slopes(model, batch, dict(model.named_parameters())[name], 1e-6)
        torch.testing.assert_close(gradient, numeric, rtol=1e-6, atol=1e-8)


def test_noise_does_not_depend_on_who_shares_the_batch():
    model = tiny_pi()
    obs = observations(model, 5)
    noise = model.draw(KEYS, [True] * 5)
    whole = model.act(obs, noise)
    order = [3, 1]
    part = model.act(
        {n: x[order] for n, x in obs.items()}, model.draw([KEYS[i] for i in order], [True] * 2)
    )
    assert torch.equal(part["denoise_index"], whole["denoise_index"][order])
    for name in ("actions", "logprob", "value", "x_t", "x_next", "prefix_cache", "prefix_feature"):
        torch.testing.assert_close(part[name], whole[name][order], atol=1e-5, rtol=0)
    batch = {
        n: x[order] for n, x in stored(model, obs, whole).items()
    }  # trained in another company than it acted in
    torch.testing.assert_close(
        model.evaluate(batch)["logprob"].sum((1, 2)),
        whole["logprob"][order].sum((1, 2)),
        atol=1e-5,
        rtol=0,
    )


def test_noise_is_named_by_seed_lane_trajectory_and_step():
    model = tiny_pi()
    noise = model.draw(NOISE_KEYS, [True] * 7)
    assert torch.equal(noise["noise"][0], noise["noise"][1]) and torch.equal(
        noise["epsilon"][0], noise["epsilon"][1]
    )
    assert len(noise["noise"][:, 0, 0].unique()) == 6 and not torch.equal(
        noise["noise"], noise["epsilon"]
    )
    index = model.draw([(0, 0, 0, t) for t in range(400)], [True] * 400)["denoise_index"]
    assert index.bincount(minlength=4).min() > 60  # uniform over 4 steps: 100 each
    late = tiny_pi(sde_steps=2).draw([(0, 0, 0, t) for t in range(400)], [True] * 400)[
        "denoise_index"
    ]
    assert late.bincount(minlength=4)[:2].sum() == 0 and late.bincount(minlength=4)[2:].min() > 150


def test_without_exploration_acting_is_the_deterministic_ode():
    model = tiny_pi()
    obs = observations(model, 4)
    noise = model.draw(KEYS[:4], [False] * 4)
    assert noise["denoise_index"].tolist() == [-1] * 4
    out = model.act(obs, noise)
    other = model.act(obs, noise | {"epsilon": torch.randn(4, 10, 4)})
    assert torch.equal(out["actions"], other["actions"]) and (out["logprob"] == 0).all()
    cache, _, real = model.prefix(obs["image"], obs["tokens"])
    x = noise["noise"]
    for t in (1.0, 0.75, 0.5, 0.25):
        x = x - 0.25 * model.velocity(cache, real, x, torch.full((4,), t))
    torch.testing.assert_close(out["actions"], x, atol=1e-5, rtol=1e-5)
    exploring = model.act(obs, model.draw(KEYS[:4], [True] * 4))
    assert not torch.allclose(exploring["actions"], out["actions"], atol=1e-3)


# ---------------------------------------------------------------- the network


@every_kind
def test_a_stored_prefix_gives_the_losses_and_gradients_of_a_recomputed_one(kind):
    models = (
        tiny_pi(**kind),
        tiny_pi(cache_prefix=False, **kind),
        tiny_pi(train_vlm=True, **kind),
    )  # the same weights
    cached, recomputed, trained = models
    obs = observations(cached, 5)
    out = cached.act(obs, cached.draw(KEYS, [True] * 5))
    assert (
        "image" not in cached.training_fields()
        and "prefix_cache" not in recomputed.training_fields() + trained.training_fields()
    )
    results = []
    gradients = []
    for model in models:
        result = model.evaluate(stored(model, obs, out))
        weight = torch.linspace(
            -1, 1, 5
        )  # a loss as PPO's: a weighted sum of log-probs and errors of values
        (
            (result["logprob"].sum((1, 2)) * weight).mean()
            + (result["value"] - weight).square().mean()
            + 0.1 * result.get("entropy", 0.0)
        ).backward()
        results.append(result)
        gradients.append(
            {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        )
    for result, gradient in zip(results[1:], gradients[1:], strict=True):
        assert ("entropy" in result) == ("noise" in kind)
        for name in result:
            torch.testing.assert_close(results[0][name], result[name], atol=1e-5, rtol=0)
        for name in gradients[0]:
            torch.testing.assert_close(gradients[0][name], gradient[name], atol=1e-5, rtol=1e-5)
    assert (
        gradients[0].keys() == gradients[1].keys() == cached.trainable().keys()
    )  # and none for the frozen part
    assert gradients[2]["vision.projector.weight"].abs().max() > 0


def test_padding_changes_nothing_and_words_do():
    model = tiny_pi()
    obs = observations(model, 3)
    noise = model.draw(KEYS[:3], [True] * 3)
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


def test_pi0_s_state_token_is_seen_by_the_actions_and_sees_none():
    model = tiny_pi(pi05=False, heads=4, kv_heads=2)
    obs = observations(model, 3)
    cache, _, real = model.prefix(obs["image"], obs["tokens"])
    x = torch.randn(3, 10, 4)
    t = torch.tensor([1.0, 0.5, 0.2])
    v = model.velocity(cache, real, x, t, obs["state"])
    assert (
        (model.velocity(cache, real, x, t, obs["state"] + 0.5) - v).abs().amax((1, 2)) > 1e-4
    ).all()
    inputs = []
    seen = []

    def record(_, given, out) -> None:
        inputs.append(given[0])
        seen.append(out[0][:, 0])

    for layer in model.expert:
        layer.register_forward_hook(record)
    model.velocity(cache, real, x, t, obs["state"])
    model.velocity(cache, real, torch.randn_like(x), t * 0.5, obs["state"])
    assert inputs[0].shape[1] == 11  # the state, then 10 actions
    for one, other in zip(
        seen[:2], seen[2:], strict=True
    ):  # the state token, whatever the actions and the time
        torch.testing.assert_close(one, other)
    assert not torch.allclose(inputs[0][:, 1:], inputs[2][:, 1:])


@every_kind
def test_a_missing_camera_is_masked_which_equals_leaving_it_out(kind):
    two = tiny_pi(views=2, **kind)
    one = tiny_pi(**kind)
    one.load_state_dict(two.state_dict())
    obs = observations(two, 3)
    real = two.real(obs["tokens"])
    real[:, 16:32] = False  # the second camera's tokens
    x = torch.randn(3, 10, 4)
    t = torch.tensor([1.0, 0.5, 0.2])
    state = obs.get("state")
    cache, feature, real = two.prefix(obs["image"], obs["tokens"], real)
    masked = two.velocity(cache, real, x, t, state)
    alone, without, real = one.prefix(obs["image"][:, :1], obs["tokens"])
    torch.testing.assert_close(one.velocity(alone, real, x, t, state), masked, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(feature, without, atol=1e-5, rtol=1e-5)
    zeroed = obs["image"].clone()
    zeroed[:, 1] = 0
    filled, _, real = two.prefix(zeroed, obs["tokens"])
    assert not torch.allclose(two.velocity(filled, real, x, t, state), masked, atol=1e-3)


def test_flow_noise_stays_within_its_bounds():
    x = torch.tensor([-50.0, 0.0, 50.0], dtype=torch.float64)
    torch.testing.assert_close(
        bounded(x, (0.08, 0.16)),
        torch.tensor([0.08, math.sqrt(0.08 * 0.16), 0.16], dtype=torch.float64),
    )
    model = tiny_pi(noise="network")
    h = torch.randn(4, 10, 32)
    _, mean, std = model.transition(
        torch.randn(4, 10, 4), h, torch.full((4, 1, 1), 0.5), torch.full((4, 1, 1), 0.25)
    )
    assert std.shape == mean.shape and std.min() >= 0.08 and std.max() <= 0.16 and std.std() > 0


def test_padding_of_actions_counts_in_no_logprob():
    model = tiny_pi(executed_steps=6, executed_dims=3, noise="network")
    obs = observations(model, 3)
    noise = model.draw(KEYS[:3], [True] * 3)
    noise["denoise_index"][:] = 3  # the last: nothing comes after it
    out = model.act(obs, noise)
    assert out["actions"].shape == (3, 6, 3) and out["x_next"].shape == (3, 10, 4)
    batch = stored(model, obs, out)
    batch["x_next"][:, 6:] += 5.0
    batch["x_next"][:, :, 3:] -= 5.0
    torch.testing.assert_close(
        model.evaluate(batch)["logprob"].sum((1, 2)), out["logprob"].sum((1, 2)), atol=1e-5, rtol=0
    )
    batch["x_next"][:, 5, 2] += 0.1
    assert (model.evaluate(batch)["logprob"] - out["logprob"]).sum((1, 2)).abs().min() > 1e-3


@pytest.mark.parametrize("family", ["pi0", "pi05"])
def test_a_frozen_vlm_in_half_precision(family):
    # Ratio 1 holds as tightly as in fp32, for what is stored is what was used; log-probs move with
    # the rounding of the weights.
    changes = {"pi05": family == "pi05", "noise_level": 0.5}
    full = tiny_pi(**changes)
    half = tiny_pi(prefix_dtype="bfloat16", **changes)
    for name, parameter in half.named_parameters():
        if name not in half.trainable():
            parameter.data = parameter.data.bfloat16()
    obs = observations(half, 5)
    noise = half.draw(KEYS, [True] * 5)
    out = half.act(obs, noise)
    assert half.slot_fields()["prefix_cache"][1] == out["prefix_cache"].dtype == torch.bfloat16
    again = half.evaluate(stored(half, obs, out))
    torch.testing.assert_close(
        again["logprob"].sum((1, 2)), out["logprob"].sum((1, 2)), atol=1e-4, rtol=0
    )
    torch.testing.assert_close(again["value"], out["value"], atol=1e-5, rtol=0)
    same = {name: out[name].clone() for name in ("x_t", "x_next", "denoise_index")}
    exact = full.evaluate(stored(full, obs, full.act(obs, noise)) | same)
    assert (
        0 < (exact["logprob"].sum((1, 2)) - out["logprob"].sum((1, 2))).abs().max() < 0.2
    )  # measured: 0.04 of some 40


@pytest.mark.parametrize("family, published", [("pi0", 3.24e9), ("pi05", 3.35e9)])
def test_published_parameter_counts(family, published):
    with torch.device("meta"):
        model = Pi(FULL[family])
    released = sum(
        p.numel() for name, p in model.named_parameters() if not name.startswith("value_head")
    )
    assert abs(released / published - 1) < 0.005
    assert model.prefix_length == 3 * 256 + (48 if family == "pi0" else 200)
    assert 1e6 < sum(p.numel() for p in Pi(SMALL[family]).parameters()) < 4e6


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x[:, :, :32],
        lambda x: x.transpose(2, 4),
        lambda x: x.int(),
        lambda x: x.repeat(1, 2, 1, 1, 1),
    ],
)
def test_a_picture_of_another_shape_or_dtype_is_refused(change):
    model = tiny_pi()
    obs = observations(model, 2)
    with pytest.raises(UserError, match=r"the model needs \[1, 64, 64, 3\] torch.uint8"):
        model.act(obs | {"image": change(obs["image"])}, model.draw(KEYS[:2], [True] * 2))


def test_one_key_value_head_serves_every_query_head():
    torch.manual_seed(0)
    n = 2
    length = 3
    past_length = 4
    heads = 4
    d = 8
    layer = GemmaLayer(16, 32, heads, d).double()
    x = torch.randn(n, length, 16, dtype=torch.float64)
    past = torch.randn(n, 2, past_length, d, dtype=torch.float64)
    waves = rotary(
        past_length + torch.arange(length).expand(n, length), frequencies(d, "cpu"), torch.float64
    )
    mask = torch.zeros(n, 1, 1, past_length + length, dtype=torch.float64)
    mask[0, 0, 0, 1] = -math.inf
    found, own = layer(x, *waves, mask, past)

    h = layer.input_layernorm(x)[0]
    key = rotate(layer.k_proj(h)[:, None], *waves)[:, 0]
    keys = torch.cat([past[:, 0], key], 1)
    values = torch.cat([past[:, 1], layer.v_proj(h)], 1)
    outs = []
    for head in range(heads):
        query = rotate(layer.q_proj(h)[:, None, :, head * d : head * d + d], *waves)[:, 0]
        weights = (query @ keys.transpose(1, 2) / math.sqrt(d) + mask[:, 0]).softmax(-1)
        outs.append(weights @ values)
    y = x + layer.o_proj(torch.cat(outs, -1))
    h = layer.post_attention_layernorm(y)[0]
    y = y + layer.mlp.down_proj(
        F.gelu(layer.mlp.gate_proj(h), approximate="tanh") * layer.mlp.up_proj(h)
    )
    torch.testing.assert_close(found, y)
    torch.testing.assert_close(own, torch.stack([keys, values], 1)[:, :, past_length:])


def test_rotary_depends_on_relative_positions_only():
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64).unbind()

    def at(x, i):
        return rotate(x, *rotary(torch.tensor([[i]]), frequencies(8, "cpu"), x.dtype))

    def dot(i, j):
        return (at(q, i) * at(k, j)).sum().item()

    assert dot(5, 3) == pytest.approx(dot(12, 10), abs=1e-5) and abs(dot(5, 3) - dot(5, 4)) > 1e-3


def test_time_embedding_has_periods_from_4e_3_to_4():
    t = 0.3
    width = 8
    periods = [4e-3 * (4.0 / 4e-3) ** (i / 3) for i in range(4)]
    expected = [f(2 * math.pi * t / p) for f in (math.sin, math.cos) for p in periods]
    assert time_embedding(torch.tensor([t], dtype=torch.float64), width)[
        0
    ].tolist() == pytest.approx(expected, abs=1e-9)


@every_kind
@pytest.mark.parametrize("train_vlm", [False, True])
def test_what_reinforcement_learning_updates(train_vlm, kind):
    model = tiny_pi(train_vlm=train_vlm, **kind)
    obs = observations(model, 2)
    names = set(model.trainable())
    out = model.evaluate(stored(model, obs, model.act(obs, model.draw(KEYS[:2], [True] * 2))))
    (out["logprob"].sum() + out["value"].sum()).backward()
    prefix = {
        n
        for n, _ in model.named_parameters()
        if n.startswith(("vision.", "embed_tokens.", "language.", "language_norm."))
    }
    moved = {
        n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0
    }
    assert (
        names == {n for n, _ in model.named_parameters()} if train_vlm else names.isdisjoint(prefix)
    )
    assert names - prefix <= moved and bool(moved & prefix) == train_vlm


def test_the_value_head_does_not_move_what_it_reads():
    model = tiny_pi(train_vlm=True)
    obs = observations(model, 2)
    feature = model.vision.projector.weight
    batch = stored(model, obs, model.act(obs, model.draw(KEYS[:2], [True] * 2)))
    model.evaluate(batch)["value"].sum().backward()
    assert feature.grad is None and model.value_head[0].weight.grad.abs().max() > 0


def test_imitation_loss_is_flow_matching_s():
    model = tiny_pi(**SMALL_PICTURE)
    obs = observations(model, 3)
    actions = torch.randn(3, 4, 4)
    noise = torch.randn(3, 4, 4)
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
    config.train.checkpoint = tiny_checkpoint
    config.rollout.noise_level = 0.3
    config.rollout.denoise_steps = 5
    model = build(config, spec())
    sized = build(config, spec(), weights="none")
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.state_dict().values(), tiny_pi().state_dict().values(), strict=True)
    )
    assert (model.config.noise_level, model.config.denoise_steps, model.config.width) == (
        0.3,
        5,
        TINY["width"],
    )
    assert all(p.is_meta for p in sized.parameters()) and sized.slot_fields() == model.slot_fields()


@pytest.mark.parametrize("change", [{"image_size": 32}, {"views": 2}, {"action_dim": 7}])
def test_build_refuses_another_simulator(tiny_checkpoint, change):
    config = Config()
    config.env.cameras = change.get("views", 0)  # of two cameras the policy would see the first
    config.train.checkpoint = tiny_checkpoint
    with pytest.raises(UserError, match=next(iter(change))):
        build(config, spec(**change))


def test_flow_noise_starts_from_a_checkpoint_without_its_network(tiny_checkpoint):
    config = Config()
    config.train.checkpoint = tiny_checkpoint
    config.rollout.noise = "network"
    config.rollout.prefix_dtype = "bfloat16"
    model = build(config, spec())
    sized = build(config, spec(), weights="none")
    assert (
        "noise_head.0.weight" in model.trainable()
        and model.language[0].q_proj.weight.dtype == torch.bfloat16
    )
    assert {n: p.dtype for n, p in model.named_parameters()} == {
        n: p.dtype for n, p in sized.named_parameters()
    }
    std = bounded(model.noise_head(torch.randn(2, 10, 32)), model.config.noise_range)
    torch.testing.assert_close(std, torch.full_like(std, math.sqrt(0.08 * 0.16)))


def test_build_refuses_another_family(tmp_path):
    config = Config()
    config.train.checkpoint = tmp_path / "other.safetensors"
    checkpoint.save(
        config.train.checkpoint, checkpoint.Header("emulated", {}, {}), {"action": torch.zeros(1)}
    )
    with pytest.raises(UserError, match="'emulated' model"):
        build(config, spec())
