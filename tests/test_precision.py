"""bf16 compute over fp32 weights: what is computed in which type, in rollout and actor alike."""

import copy
import json
from functools import partial
from pathlib import Path
from unittest.mock import Mock, patch

import pytest
import test_gr00t
import test_oft
import torch
from conftest import observations, tiny_pi
from test_learner import BATCH, Toy, learner_of, read, toy_pool
from torch import nn

import models
import prepare
import train
from config import Config, completed, from_json, to_json
from errors import UserError
from gradients import Gradients
from memory import Room, Table
from models import layers, lora
from models.gr00t import CategoryLinear, Gr00t
from models.pi import Pi
from ranks import Meeting, Ranks
from streamer import MicroBatch

N = 5
KEYS = [(1, i, 0, 0) for i in range(N)]
CASES = {
    "pi05": lambda: tiny_pi(prefix_dtype="bfloat16"),
    "pi05 trained whole": lambda: tiny_pi(train_vlm=True),
    "pi05 with adapters": lambda: tiny_pi(train_vlm=True, lora_rank=2, prefix_dtype="bfloat16"),
    "pi0": lambda: tiny_pi(pi05=False, prefix_dtype="bfloat16"),
    "pi0 trained whole, Flow-Noise": lambda: tiny_pi(pi05=False, train_vlm=True, noise="network"),
    "gr00t": lambda: test_gr00t.tiny(prefix_dtype="bfloat16"),
    "gr00t trained whole": lambda: test_gr00t.tiny(train_vlm=True),
    "oft": test_oft.tiny_oft,
    "oft trained whole": lambda: test_oft.tiny_oft(train="full"),
}


def in_bf16(case: str) -> nn.Module:
    """A model as `models.build` leaves it with --precision bfloat16, none of its weights of which
    bf16 could say without rounding."""
    model = CASES[case]()
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(model.dtype_of(name) or parameter.dtype)
    model.compute = torch.bfloat16
    return model


def seen_by(model: nn.Module) -> dict[str, torch.Tensor]:
    if isinstance(model, Gr00t):
        return test_gr00t.observations(model.config, N)
    return (observations if isinstance(model, Pi) else test_oft.observations)(model, N)


def acted(model: nn.Module) -> tuple[dict, dict]:
    """What it does, and what `evaluate` finds in a slot."""
    obs = seen_by(model)
    out = model.act(obs, model.draw(KEYS, [True] * N))
    return out, {name: (obs | out)[name].clone() for name in model.training_fields()}


def gradient(model: nn.Module, stored: dict) -> torch.Tensor:
    """Of the log-prob and the value, of all that is trained, as one vector."""
    out = model.evaluate(stored)
    (out["logprob"].sum() + out["value"].sum()).backward()
    found = {n: p.grad for n, p in model.trainable().items() if p.grad is not None}
    assert {g.dtype for g in found.values()} == {torch.float32}
    return torch.cat([g.flatten() for g in found.values()])


def note(took: dict, name: str, _, given: tuple) -> None:
    took[name] = given[0].dtype


@pytest.mark.parametrize("case", CASES)
def test_activations_are_in_bf16_weights_and_gradients_in_fp32(case):
    model = in_bf16(case)
    kinds = (lora.Lora, layers.LayerNorm, layers.RMSNorm, CategoryLinear, nn.Linear)
    took: dict[str, torch.dtype] = {}
    for name, part in model.named_modules():
        if isinstance(part, kinds):
            part.register_forward_pre_hook(partial(note, took, name))
    frozen = {n: p.dtype for n, p in model.named_parameters() if n not in model.trainable()}
    _, stored = acted(model)
    gradient(model, stored)
    wide = {name for name, dtype in took.items() if dtype is not torch.bfloat16}
    exact = (*model.HEADS, *model.WIDE)
    assert {name for name in took if f"{name}.".startswith(exact)} == wide
    assert len(took) > 2 * len(wide)
    assert {p.dtype for p in model.trainable().values()} == {torch.float32}
    assert {n: p.dtype for n, p in model.named_parameters() if n in frozen} == frozen


@pytest.mark.parametrize("case", CASES)
def test_weights_that_act_have_the_type_they_are_used_in_and_act_alike(case):
    model = in_bf16(case)
    acting = models.acting(copy.deepcopy(model))
    (out, stored), (again, _) = acted(model), acted(acting)
    for name, x in out.items():
        assert torch.equal(x, again[name]), name
    assert {out[name].dtype for name in ("logprob", "actions", "value")} == {torch.float32}
    for name, parameter in acting.named_parameters():
        exact = name.startswith((*model.HEADS, *model.WIDE))
        frozen = name not in model.trainable() and name.startswith(getattr(model, "FROZEN", ("-",)))
        assert frozen or (parameter.dtype == torch.float32) == exact, name
    # On a CPU, whose kernels take every row alike, training says the same.
    torch.testing.assert_close(model.evaluate(stored)["logprob"], out["logprob"], atol=1e-3, rtol=0)


@pytest.mark.parametrize("case", CASES)
def test_a_gradient_in_bf16_points_the_same_way(case):
    model = in_bf16(case)
    wide = CASES[case]()
    _, stored = acted(wide)
    exact = gradient(wide, stored)
    found = gradient(model, {n: x.to(acted(model)[1][n].dtype) for n, x in stored.items()})
    assert torch.cosine_similarity(exact, found, dim=0) > 0.98


def test_what_later_epochs_compute_anew_is_not_computed_for_what_is_kept():
    model = test_gr00t.tiny()
    obs = seen_by(model)
    wanted = model.look(obs)["vl_features"]
    with patch.object(Gr00t, "context", side_effect=AssertionError):
        assert torch.equal(model.look_once(obs)["vl_features"], wanted)


# ---------------------------------------------------------------- settings


def laid_out(room: Room, *flags: str):
    return prepare.demand_of(train.parse(list(flags)), room)[0]


def test_auto_is_bf16_on_gpus_and_the_weight_plane_holds_what_is_used():
    gpus = Room(2, 1e12, 1e12, 2)
    found = {}
    for precision in ("auto", "float32"):
        demand = laid_out(gpus, "--ratio", "1:1", "--precision", precision)
        found[demand.config.train.precision] = Table(demand, gpus).rows
        narrow = demand.config.train.precision == "bfloat16"
        assert demand.slots["prefix_cache"][1] == (torch.bfloat16 if narrow else torch.float32)
        weights = demand.model.trainable()
        assert {p.dtype for p in weights.values()} == {torch.float32}
        for name, (_, dtype) in demand.weights.items():
            exact = name.startswith((*demand.model.HEADS, *demand.model.WIDE))
            assert dtype is (torch.bfloat16 if narrow and not exact else torch.float32)
    narrow, wide = found["bfloat16"], found["float32"]
    actor = ("actor-0", "cuda:1")
    planes = [
        sum(row.weight_plane for (process, _), row in rows.items() if process == "shared")
        for rows in (narrow, wide)
    ]
    assert 0 < planes[0] < 0.6 * planes[1]
    assert narrow["rollout-0", "cuda:0"].weights < 0.55 * wide["rollout-0", "cuda:0"].weights
    assert narrow[actor].gradients == wide[actor].gradients  # fp32 in either
    assert narrow[actor].activations < wide[actor].activations

    cpu = laid_out(Room(0, 0.0, 24e9, 2)).config
    assert cpu.train.precision == "float32" and cpu.rollout.prefix_dtype is None
    assert laid_out(Room(0, 0.0, 24e9, 2), "--precision", "bfloat16").model.compute is not None


def test_a_run_of_before_precision_was_a_setting_goes_on_in_fp32(tmp_path):
    file = tmp_path / "config.json"
    stages = json.loads(to_json(completed(Config(), model="oft")))
    del stages["train"]["precision"]
    stages["rollout"]["prefix_dtype"] = "float32"  # which every family had
    file.write_text(json.dumps(stages))
    config = from_json(file)
    assert (config.train.precision, config.rollout.prefix_dtype) == ("float32", None)
    file.write_text(to_json(completed(Config(), precision="bfloat16")))
    assert from_json(file).train.precision == "bfloat16"


def test_what_a_frozen_vlm_may_be_is_still_refused_where_it_learns():
    with pytest.raises(UserError, match="--prefix-dtype bfloat16 is for a frozen VLM"):
        laid_out(Room(2, 1e12, 1e12, 2), "--train-vlm", "--prefix-dtype", "bfloat16")
    demand = laid_out(Room(2, 1e12, 1e12, 2), "--train-vlm", "--ratio", "1:1")
    vlm = demand.model.language[0].q_proj.weight
    assert vlm.dtype == torch.float32 and demand.model.vlm_compute == torch.bfloat16


def test_float32_is_rounded_to_tf32_only_beside_bf16_and_never_on_a_cpu(monkeypatch):
    say = Mock()
    monkeypatch.setattr(torch, "set_float32_matmul_precision", say)
    before = torch.backends.cudnn.allow_tf32
    try:
        models.use_tf32("cpu", "bfloat16")
        assert not say.called and torch.backends.cudnn.allow_tf32 == before
        for precision, word in (("bfloat16", "high"), ("float32", "highest")):
            models.use_tf32("cuda:0", precision)
            assert say.call_args.args == (word,)
            assert torch.backends.cudnn.allow_tf32 == (precision == "bfloat16")
    finally:
        torch.backends.cudnn.allow_tf32 = before


# ---------------------------------------------------------------- training


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_until_an_update_rounding_alone_makes_no_ratio(precision):
    """Inference said 0.03 more of every number than training does."""
    learner = learner_of(Toy(), completed(Config(), precision=precision))
    new = torch.randn(4, 1, requires_grad=True)
    old = new.detach() + 0.03
    staleness = torch.tensor([0.0, 0.0, 1.0, 2.0])
    for updates in (0, 1):
        learner.updates = updates
        found = learner.proximal_logprob({}, new, new, old, staleness, [])
        assert not found.requires_grad
        rounded = precision == "bfloat16" and updates == 0
        torch.testing.assert_close(found[:2], (new.detach() if rounded else old)[:2])
        assert (found[2:] < old[2:]).all() and (found[2:] > new[2:]).all()


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_the_exact_proximal_policy_takes_rounding_out_of_later_ratios_too(precision):
    learner = learner_of(Toy(), completed(Config(), precision=precision, proximal="exact"))
    new = torch.randn(2, 1, 1)
    exact = new - 0.2  # what training said under the batch's first weights
    old = exact + 0.03  # what inference did
    learner.updates = 1
    learner.proximal.kept.rows = {(0, t): {"logprob": exact[t]} for t in range(2)}
    staleness = torch.tensor([0.0, 1.0])
    flat = [x.flatten(1) for x in (new, old, exact)]
    found = learner.proximal_logprob({}, new, *flat[:2], staleness, [(0, 0), (0, 1)])
    assert torch.equal(found[0], flat[2 if precision == "bfloat16" else 1][0])
    assert torch.equal(found[1], flat[2][1])


def test_gradients_lie_side_by_side_and_a_weight_without_one_keeps_none():
    used, rests, unused = (nn.Parameter(torch.ones(size)) for size in (3, 5, 2))
    gradients = Gradients([used, rests, unused], Ranks(0, 1, "cpu", Meeting(Path())))
    assert used.grad is None
    for passes in (1.0, 2.0):
        (used.sum() + 2 * rests.sum()).backward()
        assert used.grad.tolist() == 3 * [passes] and rests.grad.tolist() == 5 * [2 * passes]
    assert unused.grad is None
    inside = gradients.flat.untyped_storage().data_ptr()
    for parameter in (used, rests):
        assert parameter.grad.untyped_storage().data_ptr() == inside
    assert gradients.flat.sum() == 3 * 2 + 5 * 4


def test_what_rests_keeps_its_place_among_the_gradients():
    config = completed(Config(), critic_warmup=4)
    model = Toy()
    learner = learner_of(model, config)
    slots = tuple(range(BATCH))
    micro = MicroBatch(slots, 0, 0, True, learner.config.actor.minibatch)
    views = None
    for version in (3, 4):  # it rests in the first
        learner.version = version
        before = model.policy.weight.detach().clone()
        learner.train(read(learner, toy_pool(model), slots), micro)
        now = [p.grad.data_ptr() for p in learner.parameters]
        assert views in (None, now)
        views = now
        learner.step()
        assert torch.equal(model.policy.weight, before) == (version == 3)
        assert learner.gradients.flat.abs().sum() == 0
