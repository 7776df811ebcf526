"""π0 and π0.5 on users' disks: preprocessing as in the originals, loading and saving their layouts,
and clear errors.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from conftest import STATS, TINY
from safetensors.torch import load_file, save_file

import evaluate
import models
from config import ROOT, Config
from envs import EnvSpec
from errors import UserError
from models import build, checkpoint, tokenize
from models.formats import pi as pi_files
from models.formats import pictures, source
from models.formats.pi import SOURCES, Preparation
from models.pi import SMALL, Pi, PiConfig

GOLDEN = ROOT / "tests" / "golden"
FAMILIES = ("pi0", "pi05")
ROBOTS = [
    (family, robot) for family in FAMILIES for robot in ("physical-intelligence/libero", "droid")
]
both = pytest.mark.parametrize("family", FAMILIES)
SPEC = EnvSpec(
    ("t",), ("p",), 2, 42, 8, 5, 100
)  # two of the reference models' three cameras, five of their six dimensions


def cases(family: str, file: str = "preprocessing.json") -> dict:
    return json.loads((GOLDEN / family / file).read_text())


def prepare(family: str, stats: dict, **changes) -> Preparation:
    shape = {
        "pi05": family == "pi05",
        "views": 2,
        "image_size": 14,
        "patch": 14,
        "tokens": 80,
        "state_dim": 32,
    }
    return Preparation(
        PiConfig(**shape | changes), stats, tokenize.load(str(GOLDEN / family / "tokenizer.model"))
    )


# ---------------------------------------------------------------- preprocessing


@pytest.mark.parametrize("family, robot", ROBOTS)
def test_openpi_s_observations_and_actions(family, robot):
    env = robot.rpartition("/")[2]
    stats = pi_files.read_norm_stats(GOLDEN / family, family == "pi05", env)
    preparation = prepare(family, stats)
    for case in cases(family)["robots"][robot]:
        state = np.array(case["state"], np.float32)
        found = preparation.observe(np.zeros((2, 14, 14, 3), np.uint8), state, case["task"])
        assert found["tokens"].tolist() == case["token_ids"] and found["tokens"].dtype == np.int32
        assert (found["tokens"] != 0).tolist() == case["token_mask"]
        assert (
            "".join(
                pi_files.prompt(
                    case["task"],
                    np.array(case["normalised"]) if "State" in case["prompt"] else None,
                )
            )
            == case["prompt"]
        )
        assert (
            pi_files.normalise(state, stats["state"]).tolist() == case["normalised"]
        )  # to the last bit
        if family == "pi0":
            np.testing.assert_array_equal(found["state"], np.array(case["padded"], np.float32))
        actions = preparation.actions(np.array(case["model_actions"], np.float32)[:, :7], state)
        np.testing.assert_allclose(actions, case["actions"], atol=2e-6, rtol=1e-6)
        assert case["image_mask"] == {
            "base_0_rgb": True,
            "left_wrist_0_rgb": True,
            "right_wrist_0_rgb": False,
        }
    assert any(stats["delta"]) == (family == "pi0" and env == "libero")
    assert stats["prompt"] == ("state" if family == "pi05" and env == "droid" else "newline")


@both
def test_pictures_are_resized_as_openpi_and_its_torch_port_do(family):
    for case in cases(family)["images"]:
        image = np.array(case["image"], np.uint8)
        assert np.array_equal(
            pictures.resize_pil(image, case["size"]), np.array(case["resized"], np.uint8)
        )  # to the last bit
        scaled = torch.from_numpy(image)[None].float() / 127.5 - 1.0
        found = pictures.resize_torch(scaled, case["size"], -1.0)[0]
        torch.testing.assert_close(found, torch.tensor(case["resized_torch"]), atol=2e-6, rtol=0)


@both
def test_lerobot_s_observations_and_actions(family):
    stats = pi_files.read_processors(GOLDEN / family / "lerobot")
    found = cases(family, "lerobot/cases.json")
    preparation = prepare(family, stats)
    for case in found["rows"]:
        state = np.array(case["state"], np.float32)
        normal = pi_files.normalise(state, stats["state"])
        np.testing.assert_array_equal(normal, np.array(case["normalised"], np.float32))
        texts = pi_files.prompt(
            case["task"], normal if stats["prompt"] == "state" else None, "lerobot"
        )
        assert "".join(texts) == case["prompt"]
        tokens = preparation.observe(np.zeros((2, 14, 14, 3), np.uint8), state, case["task"])[
            "tokens"
        ]
        assert preparation.tokenizer.decode([i for i in tokens.tolist() if i][1:]) == case["prompt"]
        actions = preparation.actions(np.array(case["model_actions"], np.float32), state)
        np.testing.assert_array_equal(actions, np.array(case["actions"], np.float32))
    for case in found["images"]:
        image = np.array(case["image"], np.uint8)
        pixels = (
            pictures.resize_torch(torch.from_numpy(image)[None].float() / 255.0, case["size"], 0.0)
            * 2.0
            - 1.0
        )
        torch.testing.assert_close(pixels[0], torch.tensor(case["resized"]), atol=2e-6, rtol=0)
        changed = (
            prepare(family, stats, image_size=case["size"], views=1).resize(image[None])[0] / 127.5
            - 1.0
        )
        assert np.abs(changed - np.array(case["resized"])).max() <= 0.5 / 127.5 + 1e-6


def test_other_ways_to_normalise():
    x = np.array([[0.0, 2.0, 5.0]], np.float32)
    low = {"min": [0.0, 1.0, 5.0], "max": [4.0, 3.0, 5.0]}
    high = {"kind": "lerobot_min_max", "eps": 1e-8}
    assert pi_files.normalise(x, low | high).tolist() == [[-1.0, 0.0, -1.0]]
    assert pi_files.normalise(x, {"kind": "lerobot_identity", "eps": 1e-8}).tolist() == x.tolist()


@both
def test_our_own_small_models_see_what_they_were_trained_on(family):
    tokenizer = tokenize.load(str(ROOT / "assets" / "tokenizer.model"))
    preparation = Preparation(SMALL[family], STATS, tokenizer)
    state = np.array([0.1, 0.5, 0.3, 0.6])
    image = np.full((1, 64, 64, 3), 7, np.uint8)
    found = preparation.observe(image, state, "press the button")
    ends = (np.array(STATS["state_low"]), np.array(STATS["state_high"]))
    normal = pi_files.openpi_scaled(state, *ends, "quantiles")
    assert np.array_equal(found["image"], image)
    if family == "pi05":
        text = tokenize.prompt("press the button", normal)
        assert found.keys() == {"image", "tokens"} and np.array_equal(
            found["tokens"], tokenize.encode(tokenizer, 24, text)
        )
    else:
        np.testing.assert_allclose(found["state"], normal, rtol=1e-6)
        assert found["tokens"][-1] == 0 < found["tokens"][1]
    assert {n: (x.shape, str(x.dtype)) for n, x in found.items()} == {
        n: (shape, str(dtype).removeprefix("torch."))
        for n, (shape, dtype) in Pi(SMALL[family]).observation_fields().items()
    }
    actions = np.ones((10, 4), np.float32)
    assert preparation.actions(actions, state) is actions


@pytest.mark.parametrize(
    "change, words",
    [
        ({"state": np.array([0.0] * 7 + [np.nan], np.float32)}, "not a number in dimension 7"),
        ({"state": np.zeros(40, np.float32)}, "40 dimensions"),
        ({"task": "pick up the bowl " * 40}, "the model has room for 80"),
        ({"images": np.zeros((2, 14, 14, 3), np.float32)}, r"\[2, 14, 14, 3\] float32"),
        ({"images": np.zeros((3, 14, 14, 3), np.uint8)}, r"needs \[2, height, width, 3\]"),
        ({"images": np.zeros((2, 3, 14, 14), np.uint8)}, r"\[2, 3, 14, 14\] uint8"),
    ],
)
def test_observations_that_cannot_be(change, words):
    given = {
        "images": np.zeros((2, 14, 14, 3), np.uint8),
        "state": np.zeros(8, np.float32),
        "task": "pick up the bowl",
    }
    preparation = prepare("pi0", pi_files.read_norm_stats(GOLDEN / "pi0", False, "libero"))
    preparation.observe(**given)
    with pytest.raises(UserError, match=words):
        preparation.observe(**given | change)


def test_statistics_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match="norm_stats.json"):
        pi_files.read_norm_stats(tmp_path, True)
    with pytest.raises(
        UserError,
        match="assets/droid/norm_stats.json, assets/physical-intelligence/libero/norm_stats.json",
    ):
        pi_files.read_norm_stats(GOLDEN / "pi05", True)  # of which robot?
    (tmp_path / "norm_stats.json").write_text(
        json.dumps({"norm_stats": {"state": {"mean": [0.0], "std": [1.0]}}})
    )
    with pytest.raises(UserError, match="lacks q01 or q99 of 'state'"):
        pi_files.read_norm_stats(tmp_path, True)
    with pytest.raises(UserError, match="policy_preprocessor.json"):
        pi_files.read_processors(tmp_path)
    shutil.copytree(GOLDEN / "pi05" / "lerobot", tmp_path / "l")
    state = next((tmp_path / "l").glob("policy_preprocessor_*.safetensors"))
    state.write_bytes(state.read_bytes()[:50])
    with pytest.raises(UserError, match="cannot read q01 and q99 of observation.state"):
        pi_files.read_processors(tmp_path / "l")
    file = tmp_path / "l" / "policy_preprocessor.json"
    file.write_text(file.read_text().replace('"STATE": "QUANTILES"', '"STATE": "QUANTILE10"'))
    with pytest.raises(UserError, match="QUANTILE10, which is not supported"):
        pi_files.read_processors(tmp_path / "l")


# ---------------------------------------------------------------- checkpoints


def published(family: str, layout: str, folder: Path) -> Path:
    """A folder as users have it, in one of the layouts."""
    weights = load_file(GOLDEN / family / "weights.safetensors")
    heads = {"rlinf": ("noise_head",), "rlinf_noise": ()}.get(layout, ("value_head", "noise_head"))
    weights = (
        {key: x for key, x in weights.items() if not key.startswith(heads)} if heads else weights
    )
    config = cases(family, "config.json")
    folder.mkdir(parents=True)
    if layout.startswith("lerobot"):
        weights = (
            {f"model.{key}": x for key, x in weights.items()} if layout == "lerobot" else weights
        )
        config = {
            "type": family,
            "chunk_size": config["action_horizon"],
            "tokenizer_max_length": 11,
            "vision": config["vision"],
        }
        shutil.copytree(GOLDEN / family / "lerobot", folder, dirs_exist_ok=True)
    else:
        shutil.copytree(GOLDEN / family / "assets", folder / "assets")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def settings(family: str, folder: Path, **changes) -> Config:
    config = Config()
    config.train.model = family
    config.train.checkpoint = folder
    config.train.env = "libero"
    config.rollout.chunk = 4
    for name, value in changes.items():
        setattr(config.rollout, name, value)
    return config


@pytest.mark.parametrize("layout", SOURCES)
@both
def test_a_published_checkpoint_loads_acts_and_goes_back(family, layout, tmp_path):
    folder = published(family, layout, tmp_path / "published")
    config = settings(family, folder)
    model = build(config, SPEC)
    sized = build(config, SPEC, weights="none")
    c = model.config
    assert (c.views, c.image_size, c.tokens, c.executed_steps, c.executed_dims, c.depth) == (
        2,
        42,
        11,
        4,
        5,
        3,
    )
    assert all(p.is_meta for p in sized.parameters()) and not any(
        p.is_meta for p in model.parameters()
    )
    assert sized.slot_fields() == model.slot_fields() and model.header.family == family
    theirs = load_file(GOLDEN / family / "weights.safetensors")
    assert torch.equal(
        model.embed_tokens.weight, theirs["paligemma_with_expert.paligemma.lm_head.weight"]
    )
    if "rlinf" in layout:
        assert torch.equal(model.value_head[2].weight, theirs["value_head.mlp.2.weight"])
    else:
        assert (model.value_head[-1].weight == 0).all()

    fields = {
        n: torch.zeros(2, *shape, dtype=dtype)
        for n, (shape, dtype) in model.observation_fields().items()
    }
    fields["tokens"][:, :4] = 5
    out = model.act(fields, model.draw([(1, 2, 3, 4), (1, 2, 3, 5)], [True, True]))
    assert out["actions"].shape == (2, 4, 5) and out["actions"].isfinite().all()
    batch = {n: (fields | out)[n].clone() for n in model.training_fields()}
    torch.testing.assert_close(
        model.evaluate(batch)["logprob"].sum((1, 2)), out["logprob"].sum((1, 2)), atol=1e-4, rtol=0
    )

    with torch.no_grad():
        model.expert[1].q_proj.weight += 1.0
    source.save(model, tmp_path / "saved", pi_files.source_of(folder, model.config), folder)
    before = load_file(folder / "model.safetensors")
    after = load_file(tmp_path / "saved" / "model.safetensors")
    prefix = "model." if layout == "lerobot" else ""
    moved = f"{prefix}paligemma_with_expert.gemma_expert.model.layers.1.self_attn.q_proj.weight"
    assert before.keys() == after.keys() and [
        key for key in before if not torch.equal(before[key], after[key])
    ] == [moved]
    torch.testing.assert_close(after[moved], before[moved] + 1.0)

    def files(where):
        return {str(f.relative_to(where)) for f in where.rglob("*") if f.is_file()}

    assert files(tmp_path / "saved") == files(folder)


@pytest.mark.parametrize("layout", ["openpi", "lerobot"])
def test_names_of_older_transformers_are_known(layout, tmp_path):
    folder = published("pi0", layout, tmp_path / "published")
    model = build(settings("pi0", folder), SPEC)
    file = folder / "model.safetensors"
    older = {}
    for key, x in load_file(file).items():
        key = key.replace("paligemma.model.language_model.", "paligemma.language_model.model.")
        key = key.replace("paligemma.lm_head.", "paligemma.language_model.lm_head.")
        older[key.replace("paligemma.model.", "paligemma.")] = x.clone()
    assert not any("paligemma.model." in key for key in older)
    save_file(older, file)
    again = build(settings("pi0", folder), SPEC)
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True)
    )
    source.save(again, tmp_path / "saved", pi_files.source_of(folder, again.config), folder)
    assert (tmp_path / "saved" / "model.safetensors").read_bytes() == file.read_bytes()
    save_file(older | {"normalize_inputs.buffer_observation_state.mean": torch.zeros(8)}, file)
    with pytest.raises(UserError, match="migrate_policy_normalization.py"):
        build(settings("pi0", folder), SPEC)


@both
def test_a_run_s_own_checkpoint_of_a_published_model(family, tmp_path):
    folder = published(family, "openpi", tmp_path / "published")
    model = build(settings(family, folder), SPEC)
    checkpoint.save(tmp_path / "model.safetensors", model.header, model.state_dict())
    again = build(settings(family, tmp_path / "model.safetensors"), SPEC._replace(image_size=256))
    assert again.config == model.config and again.header.stats == json.loads(
        json.dumps(model.header.stats)
    )
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True)
    )


def test_flow_noise_takes_the_checkpoint_s_network(tmp_path):
    folder = published("pi05", "rlinf_noise", tmp_path / "published")
    model = build(settings("pi05", folder, noise="network", prefix_dtype="bfloat16"), SPEC)
    theirs = load_file(folder / "model.safetensors")
    assert torch.equal(
        model.noise_head[0].weight, theirs["noise_head.mlp_logvar.moduleList.0.linear_1.weight"]
    )
    assert (
        model.vision.projector.weight.dtype == torch.bfloat16
        and model.expert[0].q_proj.weight.dtype == torch.float32
    )


def test_lerobot_reads_the_embedding_and_openpi_the_language_head(tmp_path):
    for layout, read, other in (
        ("lerobot", pi_files.EMBEDDING, pi_files.LM_HEAD),
        ("openpi", pi_files.LM_HEAD, pi_files.EMBEDDING),
    ):
        folder = published("pi0", layout, tmp_path / layout)
        file = folder / "model.safetensors"
        prefix = "model." if layout == "lerobot" else ""
        weights = {key: x.clone() for key, x in load_file(file).items()}
        first = weights.pop(prefix + pi_files.LM_HEAD)
        for held in ({read: first}, {other: first}, {read: first.clone(), other: first + 1.0}):
            save_file(weights | {prefix + key: x for key, x in held.items()}, file)
            assert torch.equal(build(settings("pi0", folder), SPEC).embed_tokens.weight, first)


@pytest.mark.parametrize(
    "damage, words",
    [
        (
            "missing",
            "no tensor 'paligemma_with_expert.gemma_expert.model.layers.1.mlp.up_proj.weight'",
        ),
        ("extra", "'paligemma_with_expert.adapter.weight' that the model does not know"),
        ("shape", r"action_out_proj.bias' is \[7\], the model needs \[6\]"),
        ("part", r"k_proj.bias'.*\[36\] \+ \[35\] \+ \[36\], the model needs \[108\]"),
        ("family", "is a 'pi0' model"),
        ("other", "none of its tensors is named paligemma_with_expert"),
        ("truncated", "truncated"),
        ("chunk", "asks for 9 actions per inference"),
        ("dims", "asks for 7 action dimensions"),
        ("views", "asks for 4 cameras"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_by_name(tmp_path, damage, words):
    folder = published("pi0", "openpi", tmp_path / "published")
    file = folder / "model.safetensors"
    config = settings("pi0", folder)
    spec = SPEC
    weights = {key: x.clone() for key, x in load_file(file).items()}  # the file is written anew
    layer = "paligemma_with_expert.gemma_expert.model.layers.1.mlp.up_proj.weight"
    if damage == "missing":
        del weights[layer]
    elif damage == "extra":
        weights["paligemma_with_expert.adapter.weight"] = torch.zeros(1)
    elif damage == "shape":
        weights["action_out_proj.bias"] = torch.zeros(7)
    elif damage == "part":
        weights[
            f"{pi_files.VLM}vision_tower.vision_model.encoder.layers.0.self_attn.k_proj.bias"
        ] = torch.zeros(35)
    elif damage == "other":
        weights = {"backbone.eagle_model.mlp1.0.weight": torch.zeros(2, 2)}
    save_file(weights, file)
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    config.train.model = "pi05" if damage == "family" else "pi0"
    config.rollout.chunk = 9 if damage == "chunk" else 4
    spec = spec._replace(
        action_dim=7 if damage == "dims" else 5, views=4 if damage == "views" else 2
    )
    config.env.cameras = 4 if damage == "views" else 0
    with pytest.raises(UserError, match=words) as error:
        build(config, spec)
    assert "\n" not in str(error.value)


def test_flow_settings_are_the_checkpoint_s_unless_the_user_says_otherwise(tmp_path):
    folder = published("pi0", "openpi", tmp_path / "published")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_steps": 7, "noise_level": 0.3}))
    c = build(settings("pi0", folder), SPEC, weights="none").config
    assert (c.denoise_steps, c.noise_level, c.sde_steps) == (7, 0.3, 7)
    c = build(
        settings("pi0", folder, denoise_steps=3, sde_steps=2, tokens=13), SPEC, weights="none"
    ).config
    assert (c.denoise_steps, c.noise_level, c.sde_steps, c.tokens) == (3, 0.3, 2, 13)
    with pytest.raises(UserError, match="--sde-steps 7 must lie between 1 and --denoise-steps 3"):
        build(settings("pi0", folder, denoise_steps=3, sde_steps=7), SPEC, weights="none")


@pytest.mark.parametrize(
    "env, said, prompt",
    [
        ("libero", None, "newline"),
        ("metaworld", None, "newline"),
        ("robot", None, "state"),
        ("metaworld", True, "state"),
    ],
)
def test_the_state_stands_in_the_prompt_of_real_robots_or_where_config_says_so(
    tmp_path, env, said, prompt
):
    stats = {"q01": [0.0, 0.0], "q99": [1.0, 1.0], "mean": [0.0, 0.0], "std": [1.0, 1.0]}
    (tmp_path / "norm_stats.json").write_text(
        json.dumps({"norm_stats": {"state": stats, "actions": stats}})
    )
    assert pi_files.read_norm_stats(tmp_path, True, env, "", said)["prompt"] == prompt
    assert (
        pi_files.read_norm_stats(tmp_path, False, env, "", None)["prompt"] == "newline"
    )  # π0 has a state token


@pytest.mark.parametrize(
    "family, env, horizon", [("pi05", "libero", 10), ("pi0", "libero", 50), ("pi0", "metaworld", 5)]
)
def test_what_a_folder_does_not_say_is_assumed_and_said(family, env, horizon, tmp_path):
    folder = published(family, "openpi", tmp_path / "published")
    config = settings(family, folder)
    config.train.env = env
    for file in folder.rglob("norm_stats.json"):
        if "libero" not in str(file):
            file.unlink()
    state = {"state": "not in the prompt"} if family == "pi05" else {}
    assert ("state = not in the prompt" in models.assumptions(config, SPEC)) == bool(state)
    (folder / "config.json").unlink()
    line = models.assumptions(config, SPEC)
    whose = "RLinf's in metaworld" if env == "metaworld" else "as published"
    assert line.count("\n") == 1 and f"horizon = {horizon} ({whose})" in line
    assert {"tokens", "denoise_steps", "noise_level", *state} <= set(line.split())
    heads = {"vision_width": 36, "vision_heads": 3}  # which no published model has
    assert build_sized(config, heads).chunk == horizon
    config.rollout.horizon = 4
    assert (
        "horizon" not in models.assumptions(config, SPEC) and build_sized(config, heads).chunk == 4
    )
    config.rollout.horizon, config.rollout.chunk = None, horizon + 1
    with pytest.raises(UserError, match="as is assumed: say with --horizon"):
        models.assumptions(config, SPEC)


def build_sized(config: Config, changes: dict) -> PiConfig:
    with patch.dict(pi_files.FULL, {f: replace(c, **changes) for f, c in pi_files.FULL.items()}):
        return build(config, SPEC, weights="none").config


def test_a_horizon_that_the_checkpoint_denies_is_refused(tmp_path, tiny_checkpoint):
    folder = published("pi05", "openpi", tmp_path / "published")
    with pytest.raises(UserError, match="has horizon = 6 and the run asks for 5"):
        build(settings("pi05", folder, horizon=5), SPEC)
    build(settings("pi05", folder, horizon=6), SPEC, weights="none")


def test_as_many_steps_are_stochastic_as_there_are_where_all_were(tmp_path):
    folder = published("pi05", "openpi", tmp_path / "published")
    file = folder / "config.json"
    says = {name: x for name, x in json.loads(file.read_text()).items() if name != "num_steps"}
    for said in (file.read_text(), json.dumps(says)):  # RLinf's folders say nothing of steps
        file.write_text(said)
        for steps in (3, 10):
            config = settings("pi05", folder, denoise_steps=steps)
            found = build(config, SPEC, weights="none").config
            assert found.sde_steps == found.denoise_steps == steps
    # evaluate.py draws no noise, so of a run of ours it takes fewer steps, too.
    model = build(settings("pi05", folder, denoise_steps=5), SPEC)
    own = tmp_path / "own.safetensors"
    checkpoint.save(own, model.header, model.state_dict())
    asked = evaluate.EvaluateConfig(checkpoint=own, env="libero", denoise_steps=2)
    found = build(evaluate.settings_of(asked), SPEC, weights="none").config
    assert (found.denoise_steps, found.sde_steps) == (2, 2)


def test_whether_actions_are_relative_is_said_and_can_be_changed(tmp_path):
    folder = published("pi0", "openpi", tmp_path / "published")
    config = settings("pi0", folder)
    config.train.env = "libero"
    assert "extra_delta_transform = true (openpi's" in models.assumptions(config, SPEC)
    file = folder / "config.json"
    says = json.loads(file.read_text())
    for given in (False, True):
        file.write_text(json.dumps(says | {"extra_delta_transform": given}))
        assert "extra_delta" not in models.assumptions(config, SPEC)
        assert models.published(config, SPEC).stats["delta"] == [given] * 6 + [False]


def test_lerobot_s_processors_may_leave_the_state_out_of_the_prompt(tmp_path):
    folder = published("pi05", "lerobot", tmp_path / "published")
    file = folder / "policy_preprocessor.json"
    said = json.loads(file.read_text())
    assert "state = in the prompt" in models.assumptions(settings("pi05", folder), SPEC)
    said["steps"][-1]["config"] = {"include_state_in_prompt": False}
    file.write_text(json.dumps(said))
    assert "state" not in models.assumptions(settings("pi05", folder), SPEC)
    stats = pi_files.read_processors(folder)
    found = prepare("pi05", stats).words(np.zeros(8, np.float32), " pick_up\n")["tokens"]
    words = prepare("pi05", stats).tokenizer.decode([i for i in found.tolist() if i][1:])
    assert words == "Task: pick up;\nAction: "
    build(settings("pi05", folder), SPEC, weights="none")  # such statistics may stand in a header
    said["steps"][-1]["config"] = {"use_episode_metadata": True}
    file.write_text(json.dumps(said))
    with pytest.raises(UserError, match="speed and quality, which is not supported"):
        pi_files.read_processors(folder)


def test_statistics_of_another_robot_are_refused(tmp_path):
    for layout in ("openpi", "lerobot"):
        folder = published("pi05", layout, tmp_path / layout)
        with pytest.raises(UserError, match="dimensions of state, the simulator has 9"):
            build(settings("pi05", folder), SPEC._replace(state_dim=9))


@pytest.mark.parametrize(
    "file, contents",
    [
        ("config.json", "[]"),
        ("config.json", '{"action_horizon": "ten"}'),
        ("config.json", "{"),
        ("norm_stats.json", "[]"),
        ("norm_stats.json", '{"norm_stats": []}'),
        (
            "norm_stats.json",
            '{"norm_stats": {"state": {"q01": "a", "q99": [1]}, "actions": {"q01": [0], "q99": '
            "[1]}}}",
        ),
        ("policy_preprocessor.json", "[]"),
        ("policy_preprocessor.json", '{"steps": [3]}'),
    ],
)
def test_files_that_say_something_else_are_named(tmp_path, file, contents):
    folder = published("pi05", "lerobot" if "policy" in file else "openpi", tmp_path / "published")
    for found in [path for path in folder.rglob("*.json") if path.name == file]:
        found.write_text(contents)
    with pytest.raises(UserError, match=file) as error:
        build(settings("pi05", folder), SPEC)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize(
    "file, contents, key",
    [
        ("config.json", '{"noise_level": #}', "noise_level is"),
        ("config.json", '{"vision": {"num_attention_heads": [1, #]}}', "num_attention_heads.1 is"),
        (
            "norm_stats.json",
            '{"norm_stats": {"state": {"q01": [0, #]}}}',
            "norm_stats.state.q01.1 is",
        ),
    ],
)
def test_a_number_that_is_none_is_named_by_file_and_key(tmp_path, file, contents, key, number):
    folder = published("pi05", "openpi", tmp_path / "published")
    for found in folder.rglob(file):
        found.write_text(contents.replace("#", number))
    with pytest.raises(UserError, match=f"cannot read .*{file}: .*{key} -?(nan|inf)") as error:
        build(settings("pi05", folder), SPEC)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


def test_statistics_that_are_no_numbers_are_named_by_file_and_key(tmp_path):
    folder = published("pi05", "lerobot", tmp_path / "published")
    file = next(folder.glob("policy_preprocessor_*.safetensors"))
    tensors = {key: x.clone() for key, x in load_file(file).items()}
    tensors["observation.state.q99"][1] = float("nan")
    save_file(tensors, file)
    with pytest.raises(UserError, match=f"{file.name}: 'observation.state.q99' holds NaN") as error:
        build(settings("pi05", folder), SPEC)
    assert str(folder) in str(error.value)


@pytest.mark.parametrize("says", [{"num_steps": -3}, {"num_steps": 10**9}, {"noise_level": "loud"}])
def test_sizes_that_no_network_has_are_the_checkpoint_s_fault(tmp_path, says):
    folder = published("pi05", "openpi", tmp_path / "published")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | says))
    with pytest.raises(UserError, match="cannot read the configuration of checkpoint") as error:
        build(settings("pi05", folder), SPEC)
    assert "\n" not in str(error.value)


def test_every_parameter_has_its_key():
    for family, layout in ((f, name) for f in FAMILIES for name in SOURCES):
        shape = PiConfig(**TINY | {"pi05": family == "pi05", "noise": "network"})
        with torch.device("meta"):
            ours = set(Pi(shape).state_dict())
        table = SOURCES[layout].keys(ours)
        heads = {"rlinf": ("noise_head",), "rlinf_noise": ()}.get(
            layout, ("value_head", "noise_head")
        )
        assert (
            set(table) == {name for name in ours if not name.startswith(heads)}
            if heads
            else set(table) == ours
        )
        keys = [
            key
            for value in table.values()
            for key in ((value,) if isinstance(value, str) else value)
        ]
        assert len(keys) == len(set(keys))


@pytest.mark.parametrize(
    "says, cameras, views, assumed",
    [
        ({}, 0, 2, True),  # all, as openpi's own robots
        ({}, 1, 1, False),
        ({"num_images": 1}, 0, 1, False),
        ({"num_images": 3}, 0, 2, False),  # the third is masked
    ],
)
def test_the_policy_sees_the_cameras_that_it_was_trained_with(
    says, cameras, views, assumed, tmp_path
):
    folder = published("pi05", "openpi", tmp_path / "published")
    config = cases("pi05", "config.json")
    del config["num_images"]
    (folder / "config.json").write_text(json.dumps(config | says))
    run = settings("pi05", folder)
    run.env.cameras = cameras
    model = build(run, SPEC, weights="none")
    assert model.config.views == SPEC.seen_by(model.header).views == views
    assert ("cameras = 2 (all" in models.assumptions(run, SPEC)) == assumed


def test_pictures_that_lerobot_calls_empty_are_no_cameras():
    names = ("images.image", "images.image2", "images.empty_camera_0")
    features = {f"observation.{name}": {"type": "VISUAL"} for name in names}
    features["observation.state"] = {"type": "STATE"}
    assert pi_files.cameras_of({"input_features": features}) == 2


@both
def test_the_gripper_of_widowx_is_open_or_closed(family, tmp_path):
    folder = published(family, "openpi", tmp_path / "published")
    model = build(settings(family, folder), SPEC._replace(robot="widowx"), weights="none")
    stats = model.header.stats
    assert (stats["gripper"], stats["fit"]) == ("widowx", "letterbox")
    asked = np.random.default_rng(0).normal(size=(20, 5)).astype(np.float32)
    raw = prepare(family, stats | {"gripper": ""}).actions(asked, np.zeros(8, np.float32))
    told = prepare(family, stats).actions(asked, np.zeros(8, np.float32))
    assert np.array_equal(told[:, :4], raw[:, :4])
    assert np.array_equal(told[:, 4], np.where(raw[:, 4] > 0.5, 1.0, -1.0))
