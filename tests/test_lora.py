"""Low-rank adapters of every family: what learns, what is put on disk, and that adapters of PEFT's
are the same function here.
"""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import test_gr00t_files as gr00t
import test_oft as oft
import test_pi_files as pi
import torch
from conftest import NOISE_KEYS, SMALL, observations, slopes, tiny_pi
from safetensors.torch import load_file, save_file
from test_gr00t import double
from test_gr00t import observations as gr00t_observations
from test_gr00t import tiny as tiny_gr00t

import models
import prepare
import train
from config import Config
from envs import EnvSpec
from errors import UserError
from models import build, checkpoint, compiled, lora
from models.export import ExportConfig
from models.export import main as export
from models.formats import gr00t as gr00t_files
from models.formats import peft, source
from run_folder import read_metrics
from weights import WeightPlane

FAMILIES = ("pi05", "gr00t", "oft")
every = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Makes a folder of another project's, the settings of a run from it, and its simulator."""
    monkeypatch.setitem(gr00t_files.EMBODIMENTS, "agibot_genie1", 2)

    def make(family: str, **flags) -> tuple[Config, EnvSpec]:
        folder = tmp_path / family
        if family == "pi05":
            made = folder if folder.exists() else pi.published("pi05", "openpi", folder)
            config, spec = pi.settings("pi05", made), pi.SPEC
        elif family == "gr00t":
            made = folder if folder.exists() else gr00t.isaac_folder(folder)
            config = gr00t.run_config(made, tokens=30)
            spec = gr00t.spec_of(views=1, image_size=28, state_dim=6, action_dim=5)
        else:
            made = oft.write_folder(folder, torch.float32)
            config, spec = oft.settings(made), oft.spec()
        for name, value in flags.items():
            stage = next(
                s for s in (config.train, config.actor, config.rollout) if hasattr(s, name)
            )
            setattr(stage, name, value)
        return config, spec

    return make


def act(model, n: int = 3) -> tuple[dict, dict]:
    """What a model does with random pictures and prompts, and what a slot then holds."""
    torch.manual_seed(5)
    obs = compiled.random_observations(model, n, "cpu")
    views = model.config.views if "state" in obs else 0  # GR00T's first tokens are pictures
    obs["tokens"][:, views:] %= 40
    out = model.act(obs, model.draw(NOISE_KEYS[:n], [True] * n))
    return out, {name: x.clone() for name, x in (obs | out).items()}


def disturbed(model) -> None:
    """Adapters that do something."""
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_b" in name:
                parameter.add_(0.05 * torch.randn_like(parameter))


def close(a: dict, b: dict, names=("actions", "logprob", "value"), tolerance=1e-4) -> bool:
    return all((a[name] - b[name]).abs().max() < tolerance for name in names)


# ---------------------------------------------------------------- what learns


@every
def test_an_update_moves_adapters_and_heads_alone_and_weights_fetched_by_name_act_alike(
    family, start
):
    config, spec = start(family, lora_rank=3, lora_alpha=6.0)
    model = build(config, spec)
    plain = build(start(family, lora_rank=0)[0], spec)
    assert close(act(model)[0], act(plain)[0], ("actions", "logprob"))  # B begins at zero
    disturbed(model)
    trainable = model.trainable()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trainable)
    _, slot = act(model)
    out = model.evaluate(slot)
    (out["logprob"].sum() + out["value"].sum()).backward()
    torch.optim.AdamW(trainable.values(), lr=1e-3).step()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == set(trainable) and all(".lora_" in n or "value_head" in n for n in moved)
    assert all(p.dtype == torch.float32 for p in trainable.values())
    sized = build(config, spec, weights="none").trainable()
    assert {n: (p.shape, p.dtype) for n, p in sized.items()} == {
        n: (p.shape, p.dtype) for n, p in trainable.items()
    }

    # A rollout worker builds its own model, and takes what is trained by name.
    plane = WeightPlane({n: (tuple(p.shape), p.dtype) for n, p in sized.items()})
    plane.publish(trainable, 0)
    block = torch.zeros(plane.bytes, dtype=torch.uint8)
    plane.fetch(block.numpy())
    other = build(config, spec)
    for name, parameter in other.trainable().items():
        parameter.data = plane.tensors(block)[name]
    acted, slot = act(other)
    ratio = (model.evaluate(slot)["logprob"] - acted["logprob"]).exp()
    assert (ratio - 1).abs().max() < 1e-4


@pytest.mark.parametrize("train_vlm", [False, True])
@pytest.mark.parametrize("make", [tiny_pi, tiny_gr00t])
def test_adapters_of_the_vlm_make_it_learn_and_nothing_of_it_is_kept(make, train_vlm):
    model = make(lora_rank=2, train_vlm=train_vlm, prefix_dtype="bfloat16")
    actor = Config().actor
    model.config = model.asked(model.config, actor)
    model.begin(None, {})
    names = {name.partition(".")[0] for name in model.trainable()}
    assert ({"vision", "language"} <= names) == train_vlm == model.config.train_vlm
    assert model.cached != train_vlm and bool(model.idle()) != train_vlm
    kinds = {(p.dtype, n in model.trainable()) for n, p in model.named_parameters()}
    assert kinds == {(torch.float32, True), (torch.bfloat16, False), (torch.float32, False)}
    # Explicit targets say whether the VLM learns, whatever --train-vlm says.
    actor.lora_targets = ("vision",)
    assert model.asked(model.config, actor).train_vlm
    actor.lora_targets = ("action_in_proj",) if make is tiny_pi else ("dit.0",)
    assert not model.asked(model.config, actor).train_vlm


@pytest.mark.parametrize("make", [tiny_pi, tiny_gr00t])
def test_gradients_of_adapters_match_finite_differences(make):
    model = make(torch.float64, lora_rank=2, lora_alpha=5.0, lora_targets=("*",), train_vlm=True)
    layers = lora.layers(model)
    assert all(layer.lora_a is not None for layer in layers.values())
    obs = observations(model, 2) if make is tiny_pi else gr00t_observations(model.config, 2)
    obs = double(obs)
    drawn = double(model.draw(NOISE_KEYS[1:3], [True] * 2))
    slot = {n: x.clone() for n, x in double(obs | model.act(obs, drawn)).items()}
    names = ["vision.layers.0.qkv", "language.0.gate_up", "dit.0.kv", "dit.1.ada", "vl_blocks.0.kv"]
    names += ["language.0.k_proj", "expert.1.mlp.down_proj", "expert.0.input_layernorm.dense"]
    trainable = model.trainable()
    for name in layers.keys() & set(names):
        for leaf in ("lora_a", "lora_b"):
            gradient, numeric = slopes(model, slot, trainable[f"{name}.{leaf}"], 1e-5)
            torch.testing.assert_close(gradient, numeric, rtol=1e-4, atol=1e-7)


def test_a_target_that_matches_nothing_is_refused(start):
    for targets, words in (
        (
            ("expert", "q_prj"),
            "--lora-targets q_prj matches no layer of the model, which has .*exp",
        ),
        (("q_projector",), "--lora-targets q_projector matches no layer"),
    ):
        config, spec = start("pi05", lora_rank=2, lora_targets=targets)
        with pytest.raises(UserError, match=words) as error:
            build(config, spec, weights="none")
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="describe adapters: give --lora-rank too"):
        build(*start("pi05", lora_rank=None, lora_targets=("expert",)), weights="none")
    config, spec = start("oft", lora_rank=2, oft_train="full")
    with pytest.raises(UserError, match="--oft-train full and --lora-rank 2 contradict"):
        build(config, spec, weights="none")


def test_what_a_vlm_with_adapters_made_is_kept_nowhere(tiny_checkpoint):
    flags = f"--checkpoint {tiny_checkpoint} --lora-rank 2 --lora-targets language --envs 4"
    flags += " --batch 4 --minibatch 4 --segment 3 --cache-prefix gpu"
    with pytest.raises(UserError, match="--cache-prefix keeps what a frozen VLM made: leave it"):
        prepare.prepare(train.parse(flags.split()))
    model = tiny_pi(lora_rank=2, train_vlm=True)
    with pytest.raises(AssertionError, match="sees something else after every step"):
        model.look_once(act(model)[1])


def test_targets_are_parts_of_names_or_patterns():
    model = tiny_pi()
    names = lora.matching(model, ("q_proj", "expert.1.mlp", "language.*.up_proj"))
    assert names == [
        *(f"language.{i}.{leaf}" for i in (0, 1) for leaf in ("q_proj", "mlp.up_proj")),
        "expert.0.q_proj",
        "expert.1.q_proj",
        *(f"expert.1.mlp.{leaf}_proj" for leaf in ("gate", "up", "down")),
    ]


# ---------------------------------------------------------------- our own checkpoints


@every
def test_a_checkpoint_of_ours_says_which_adapters_it_has(family, start, tmp_path):
    config, spec = start(family, lora_rank=3, lora_alpha=6.0)
    model = build(config, spec)
    disturbed(model)
    wanted = act(model)[0]
    path = tmp_path / "model.safetensors"
    checkpoint.save(path, model.header, model.state_dict())
    shape = checkpoint.read_header(path).shape
    assert (shape["lora_rank"], shape["lora_alpha"]) == (3, 6.0) and shape["lora_targets"]
    for flags, rank, targets in (
        ({}, 3, model.config.lora_targets),
        ({"lora_rank": 3}, 3, model.config.lora_targets),
        ({"lora_rank": 2}, 2, model.config.lora_targets),  # its own are added into the weights
        ({"lora_targets": ("*.0",)}, 3, None),
        ({"lora_rank": 0}, 0, None),
    ):
        again = start(family, checkpoint=path, **({"lora_rank": None, "lora_alpha": None} | flags))
        found = build(*again)
        assert found.config.rank == rank and targets in (None, found.config.lora_targets)
        assert close(act(found)[0], wanted)
        adapted = {n.rpartition(".")[0] for n in found.trainable() if ".lora_" in n}
        assert adapted == set(lora.matching(found, found.config.lora_targets) if rank else ())


def test_a_header_from_before_adapters_is_read():
    model = tiny_pi()
    old = {k: v for k, v in asdict(model.config).items() if not k.startswith("lora_")}
    assert models.load("pi05").CONFIG(**old) == model.config
    assert checkpoint.checked_shape("pi05", old, "it") == old


# ---------------------------------------------------------------- PEFT's folders


@every
def test_merged_weights_and_the_adapter_alone_act_alike(family, start, tmp_path):
    config, spec = start(family, lora_rank=3, lora_alpha=5.0)
    base = config.train.checkpoint
    model = build(config, spec)
    disturbed(model)
    wanted = act(model)[0]
    path = tmp_path / "model.safetensors"
    checkpoint.save(path, model.header, model.state_dict())
    given = {"checkpoint": path, "like": base}
    export(ExportConfig(out=tmp_path / "merged", **given))
    export(ExportConfig(out=tmp_path / "adapter", adapter_only=True, **given))
    other = tmp_path / "other"
    shutil.copytree(base, other)
    for file in source.weight_files(other):
        save_file({k: x[..., :1].clone() for k, x in load_file(file).items()}, file)
    for only in (True, False):
        with pytest.raises(UserError, match="the model needs"):
            out = tmp_path / "none"
            export(ExportConfig(out=out, adapter_only=only, checkpoint=path, like=other))
        assert not out.exists()

    # The original's tools see the same files, and what PEFT would make of the adapter.
    folder = tmp_path / "adapter"
    says = json.loads((folder / "adapter_config.json").read_text())
    assert (says["r"], says["lora_alpha"], says["peft_type"]) == (3, 5.0, "LORA")
    pairs = load_file(folder / "adapter_model.safetensors")
    before, after = (
        {k: x for file in source.weight_files(f) for k, x in load_file(file).items()}
        for f in (base, tmp_path / "merged")
    )
    assert before.keys() == after.keys()
    for module in says["target_modules"]:
        a, b = (pairs.pop(f"base_model.model.{module}.lora_{end}.weight") for end in "AB")
        update = (5.0 / 3) * (b.flatten(1) @ a.flatten(1))
        key = f"{module}.weight"
        summed = before.pop(key).float() + update.view(after[key].shape)
        torch.testing.assert_close(after[key].float(), summed, rtol=8e-3, atol=1e-6)
    assert not pairs and all(torch.equal(x, after[k]) for k, x in before.items())

    # Both act as the trained policy: merged, on its base, and put on our own copy of the base.
    plain = build(start(family, lora_rank=0)[0], spec)
    own = tmp_path / "own.safetensors"
    checkpoint.save(own, plain.header, plain.state_dict())
    assert not close(act(plain)[0], wanted)
    names = ("actions", "logprob")  # a new value head of OFT and GR00T is another
    for flags in (
        {"checkpoint": tmp_path / "merged", "lora_rank": 0},
        {"checkpoint": base, "adapter": folder, "lora_rank": None},
        {"checkpoint": own, "adapter": folder, "lora_rank": None},
        {"checkpoint": base, "adapter": folder, "lora_rank": 0},
    ):
        config, spec = start(family, lora_alpha=None, **{"adapter": None} | flags)
        found = build(config, spec)
        assert close(act(found)[0], wanted, names), flags
        assert found.config.rank == (3 if flags["lora_rank"] is None else 0)
        sized = build(config, spec, weights="none").trainable()
        assert all(p.is_meta for p in sized.values())
        assert {n: p.shape for n, p in sized.items()} == {
            n: p.shape for n, p in found.trainable().items()
        }


def adapter_of(folder: Path, modules: dict[str, tuple[int, int]], rank: int = 2, **says) -> Path:
    """An adapter folder as PEFT writes it. modules: {name: (outputs, inputs)}."""
    folder.mkdir(exist_ok=True)
    tensors = {}
    for module, (out, inner) in modules.items():
        key = f"base_model.model.{module}"
        tensors[f"{key}.lora_A.weight"] = torch.randn(rank, inner)
        tensors[f"{key}.lora_B.weight"] = torch.randn(out, rank)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    text = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "bias": "none"} | says
    (folder / "adapter_config.json").write_text(json.dumps(text))
    return folder


def test_parts_of_a_layer_that_an_adapter_leaves_out_stay_out(start, tmp_path):
    """Isaac-GR00T's first adapters were of queries and values alone; ours holds keys with them."""
    config, spec = start("gr00t")
    width = build(config, spec).config.dit_width
    inner = build(config, spec).config.features
    block = "action_head.model.transformer_blocks.0.attn1"
    modules = {f"{block}.to_q": (width, width), f"{block}.to_v": (width, inner)}
    config.train.adapter = adapter_of(tmp_path / "adapter", modules, use_rslora=True)
    model = build(config, spec)
    assert model.config.lora_alpha == pytest.approx(8 * 2**0.5)
    assert model.config.lora_targets == ("dit.0.q", "dit.0.kv")
    trainable = model.trainable()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trainable)
    model.evaluate(act(model)[1])["logprob"].sum().backward()
    torch.optim.AdamW(trainable.values(), lr=1e-2).step()
    kv = model.dit[0].kv
    (a_k, b_k), (a_v, b_v) = kv.pairs(kv.lora_a, kv.lora_b)
    assert not a_k.any() and not b_k.any() and a_v.all() and b_v.all()
    names = gr00t_files.source_of(config.train.checkpoint, model.config)
    peft.save(model, tmp_path / "saved", names, config.train.checkpoint)
    assert set(
        json.loads((tmp_path / "saved" / "adapter_config.json").read_text())["target_modules"]
    ) == set(modules)


def test_names_may_have_more_or_less_before_them(start, tmp_path):
    """LeRobot's modules stand in `model`, RLinf adapts `paligemma_with_expert.paligemma` alone."""
    config, spec = start("pi05")
    c = build(config, spec).config
    expert = "model.paligemma_with_expert.gemma_expert.model.layers.0.self_attn.q_proj"
    vlm = "model.language_model.layers.1.mlp.up_proj"
    heads = {"lm_head": (7, 7), "model.paligemma_with_expert.gemma_expert.lm_head": (7, 7)}
    modules = heads | {  # of words, which a policy says none
        expert: (c.heads * c.head_dim, c.expert_width),
        vlm: (c.mlp, c.width),
        "model.action_in_proj": (c.expert_width, c.action_dim),
    }
    config.train.adapter = adapter_of(tmp_path / "adapter", modules)
    model = build(config, spec)
    wanted = {"language.1.mlp.up_proj", "action_in_proj", "expert.0.q_proj"}
    assert set(model.config.lora_targets) == wanted and model.config.train_vlm
    assert not model.cached


def test_adapters_that_are_another_function_are_refused(start, tmp_path):
    config, spec = start("pi05")
    c = build(config, spec).config
    module = "paligemma_with_expert.gemma_expert.model.layers.0.self_attn.q_proj"
    good = {module: (c.heads * c.head_dim, c.expert_width)}
    config.train.adapter = folder = tmp_path / "adapter"
    for modules, says, words in (
        (good, {"peft_type": "IA3"}, "adapter_config.json: peft_type 'IA3' must be 'LORA'"),
        (good, {"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
        (good, {"alpha_pattern": {"q_proj": 4}}, "alpha_pattern"),
        (good, {"init_lora_weights": "pissa"}, "init_lora_weights"),
        (good, {"r": 3}, r"lora_A of expert.0.q_proj is \[2, 24\], the model needs \[3, 24\]"),
        ({f"{module}s": (3, 3)}, {}, f"'base_model.model.{module}s.lora_A.weight', which is of no"),
        ({module: (7, 3)}, {}, "lora_A of expert.0.q_proj"),
    ):
        adapter_of(folder, modules, **says)
        with pytest.raises(UserError, match=words) as error:
            build(config, spec, weights="none")
        assert "\n" not in str(error.value)
    adapter_of(folder, good)
    weights = load_file(folder / "adapter_model.safetensors")
    key = f"base_model.model.{module}.lora_magnitude_vector"
    save_file(weights | {key: torch.ones(3)}, folder / "adapter_model.safetensors")
    with pytest.raises(UserError, match="lora_magnitude_vector.*of no layer"):
        build(config, spec, weights="none")
    alone = {key: x for key, x in weights.items() if "lora_A" in key}
    save_file(alone, folder / "adapter_model.safetensors")
    with pytest.raises(UserError, match="q_proj.lora_A.weight' without its other half"):
        build(config, spec, weights="none")
    adapter_of(folder, good)
    (folder / "norm_stats.json").write_text("{}")
    with pytest.raises(UserError, match="a norm_stats.json of its own, by which its actions"):
        build(config, spec, weights="none")
    (folder / "norm_stats.json").unlink()
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match="has no adapter_model.safetensors"):
        build(config, spec, weights="none")
    config.train.adapter = tmp_path / "nowhere"
    with pytest.raises(UserError, match="nowhere/adapter_config.json: No such file"):
        build(config, spec, weights="none")


def test_an_adapter_s_folder_finds_its_base(start, tmp_path):
    config, _ = start("pi05")
    base = config.train.checkpoint
    folder = adapter_of(tmp_path / "adapter", {}, base_model_name_or_path="somebody/pi05")
    assert peft.find_base(base, None) == (base, None) and peft.find_base(None, None)[0] is None
    assert peft.find_base(base, folder) == (base, folder)
    assert peft.find_base(folder, None) == (base, folder)  # beside it
    for name in (str(base), "../pi05"):
        adapter_of(folder, {}, base_model_name_or_path=name)
        found, adapter = peft.find_base(folder, None)
        assert found.resolve() == base.resolve() and adapter == folder
    adapter_of(folder, {}, base_model_name_or_path="somebody/else")
    with pytest.raises(UserError, match="PEFT adapter of somebody/else, which is not here: give"):
        peft.find_base(folder, None)
    shutil.copy(base / "model.safetensors", folder)  # its weights lie with it
    assert peft.find_base(folder, None) == (folder, folder)


def test_what_is_exported_merged_brings_no_adapter_along(start, tmp_path):
    config, spec = start("pi05", lora_rank=2)
    model = build(config, spec)
    base = adapter_of(config.train.checkpoint, {})
    source.save(model, tmp_path / "merged", pi.SOURCES["openpi"], base)
    assert not list((tmp_path / "merged").glob("adapter*"))


# ---------------------------------------------------------------- a run


def test_a_run_trains_an_adapter_and_resumes(cli, tiny_checkpoint, tmp_path):
    model = tiny_pi(lora_rank=2, lora_alpha=4.0)
    folder = tmp_path / "adapter"
    peft.save(model, folder, pi.SOURCES["openpi"], tiny_checkpoint)
    run = tmp_path / "run"
    flags = f"{SMALL} --checkpoint {tiny_checkpoint} --adapter {folder} --iterations 1 --run {run}"
    status, output = cli("train.py", flags).finish()
    assert status == 0 and "Traceback" not in output, output
    assert f"adapter {folder} is put on checkpoint {tiny_checkpoint}\n" in output
    shutil.rmtree(folder)
    status, output = cli("train.py", f"--resume {run} --iterations 2 --lora-rank 3").finish()
    assert status != 0 and "--lora-rank was None when run" in output, output
    status, output = cli("train.py", f"--resume {run} --iterations 2").finish()
    assert status == 0 and "Traceback" not in output and "put on" not in output, output
    last = read_metrics(run)[-1]
    assert last["staleness_max"] == 0 and last["ratio_max"] == pytest.approx(1.0, abs=1e-4)
    header = checkpoint.read_header(run / "checkpoints/000002/model.safetensors")
    assert (header.shape["lora_rank"], header.shape["lora_alpha"]) == (2, 4.0)
    base = load_file(tiny_checkpoint)
    after = load_file(run / "checkpoints/000002/model.safetensors")
    adapters = after.keys() - base.keys()
    assert adapters and all(".lora_" in name for name in adapters)
    for name, tensor in after.items():
        began = dict(model.named_parameters())[name] if name in adapters else base[name]
        moves = name in adapters or name.startswith("value_head")
        assert torch.equal(tensor, began) != moves, name
