"""Published settings by one word, and those of a family without."""

import re

import pytest
import torch
from test_pi_files import GOLDEN, SPEC, published

import machine
import prepare
import recipes
import start
import train
from benchmarks import recipes_table
from config import WORKERS, Config, completed, embedded_files, setting, to_json
from envs import metaworld
from errors import UserError
from models import untrained
from policy_loss import check_correction, given_bounds
from recipes import RECIPES
from scheduler import place
from validation import validate

SHIPPED = str(embedded_files("pi05", "metaworld")[0])
CONTROL_STEPS = {"libero": 480, "metaworld": 150, "maniskill": 80, "robocasa": 300}


def parsed(name: str, *flags: str) -> Config:
    return train.parse(["--recipe", name, "--checkpoint", SHIPPED, *flags])


def test_a_recipe_s_bounds_are_of_its_own_correction_alone():
    name = "libero_goal_async_ppo_gr00t"
    for flags, bounds, dual_clip in (
        ((), {"weight_max": 2.0}, 3.0),
        (("--behaviour-weight", "mask"), {"weight_max": 2.0}, 3.0),
        (("--behaviour-weight", "geometric"), {}, 3.0),
        (("--behaviour-weight=icepop", "--behaviour-weight-max", "4"), {"weight_max": 4.0}, 3.0),
        (("--behaviour-weight", "m2po"), {}, 3.0),
        (("--behaviour_weight", "gipo"), {}, 0.0),
    ):
        config = parsed(name, *flags)
        assert given_bounds(config.algorithm) == bounds and config.algorithm.dual_clip == dual_clip
        check_correction(config.algorithm, densities=True)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_says_what_it_lists_and_is_valid_on_eight_gpus(name):
    ratio = "3:1" if name.endswith("3to1") else "1:1"
    config = parsed(name, "--ratio", ratio)
    recipes.check(config)
    assert config.train.recipe == name
    assert to_json(config) == to_json(
        completed(recipes.apply(name), checkpoint=SHIPPED, ratio=ratio)
    )
    for key, value in RECIPES[name].settings().items():
        assert setting(config, key) == value, key
    few = (
        config.train.algorithm == "grpo" and config.train.env != "maniskill"
    )  # groups, for 8 ranks
    for placement in ("disaggregated", "colocated")[: 1 if few or ratio == "3:1" else 2]:
        workers = place(ratio, placement, 8, 64, 0, 0, 0).workers()
        lanes = config.env.lanes or (2 if config.train.env == "maniskill" else 0)
        segment = -(-CONTROL_STEPS[config.train.env] // config.rollout.chunk)
        segment = config.env.segment or segment
        validate(completed(config, placement=placement, lanes=lanes, segment=segment, **workers))


@pytest.mark.parametrize("name", RECIPES)
def test_a_batch_has_the_optimizer_steps_of_its_source(name):
    recipe = RECIPES[name]
    steps = -(-recipe.steps // recipe.chunk) * recipe.batch / recipe.global_batch
    ours = recipes.apply(name).actor.minibatches
    assert abs(ours - steps) <= (1 if name == "rl_vla3_d_3to1" else 0.5), (ours, steps)


def test_published_values():
    """A few, written down again from their sources."""
    pi05 = recipes.apply("libero_10_ppo_openpi_pi05")
    assert (pi05.actor.lr, pi05.actor.value_lr, pi05.algorithm.gamma) == (5e-6, 1e-4, 0.99)
    assert (pi05.actor.warmup, pi05.actor.anneal, pi05.train.iterations) == (0, False, 1000)
    assert (pi05.env.envs, pi05.actor.batch, pi05.actor.minibatch) == (64, 512, 43)
    assert (pi05.rollout.denoise_steps, pi05.rollout.sde_steps, pi05.rollout.chunk) == (5, 5, 10)
    oft = recipes.apply("libero_10_grpo_openvlaoft")
    assert (oft.actor.lr, oft.algorithm.clip_high, oft.rollout.temperature) == (2e-5, 0.28, 1.6)
    assert (oft.actor.batch, oft.actor.minibatch, oft.actor.lora_rank) == (1024, 256, 0)
    setup = recipes.apply("rl_vla3_c_3to1")
    assert (setup.env.envs, setup.actor.batch, setup.actor.update_epochs) == (192, 1536, 1)
    assert setup.rollout.denoise_steps == setup.rollout.sde_steps == 4
    plate = RECIPES["maniskill_ppo_openvlaoft"].settings()
    for name, per_action in (("gamma", 0.99), ("gae_lambda", 0.95)):
        assert plate[name] == pytest.approx(per_action**8, abs=5e-4)


def test_the_page_has_every_value():
    page = recipes_table.PAGE.read_text()
    _, found, after = recipes_table.between(page)
    assert found == recipes_table.tables().strip("\n"), "python -m benchmarks.recipes_table --write"
    used = {letter for recipe in RECIPES.values() for letter in recipe.notes}
    assert used == set(re.findall(r"^\| ([a-z]) \|", page, re.M))


def test_flags_and_presets_lie_over_and_beside():
    config = parsed("libero_10_ppo_openpi_pi05", "--lr", "1e-5", "--preset", "sync-colocated")
    assert (config.actor.lr, config.actor.value_lr) == (1e-5, 1e-4)
    assert (config.train.placement, config.actor.max_staleness) == ("colocated", 0)
    fewer = parsed("libero_10_grpo_openvlaoft", "--oft-train", "lora").actor
    assert (fewer.oft_train, fewer.lora_rank) == ("lora", None)
    other = parsed("libero_10_ppo_openpi_pi05", "--suite", "libero_goal")
    assert (other.train.tasks, other.train.suite) == ((), "libero_goal")


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--recipe none", "there is no recipe 'none': choose one of libero_spatial_ppo_openpi, "),
        (
            f"--recipe libero_10_ppo_openpi_pi05 --checkpoint {SHIPPED} --model oft",
            "--recipe libero_10_ppo_openpi_pi05 is for --model pi05, not oft: leave out --model",
        ),
        (
            f"--recipe libero_10_ppo_openpi_pi05 --checkpoint {SHIPPED} --algorithm grpo",
            "--recipe libero_10_ppo_openpi_pi05 is for --algorithm ppo, not grpo: leave out",
        ),
        (
            "--recipe libero_10_ppo_openpi_pi05",
            "begins with https://huggingface.co/RLinf/RLinf-Pi05-LIBERO-SFT: download it",
        ),
        (
            "--recipe maniskill_ppo_openvlaoft",
            "as --checkpoint, and that of RLinf/RLinf-OpenVLAOFT-ManiSkill-Base-Lora as --adapter",
        ),
        (
            f"--recipe metaworld_50_ppo_openpi --checkpoint {SHIPPED}",
            "is a 'pi05' model: give --model pi05, a --recipe of it, or another checkpoint",
        ),
    ],
)
def test_a_recipe_for_something_else_is_refused(flags, words):
    with pytest.raises(UserError) as refused:
        prepare.prepare(train.parse(flags.split()))
    assert words in str(refused.value) and "\n" not in str(refused.value)


def test_a_resumed_run_keeps_its_recipe(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(to_json(parsed("libero_10_ppo_openpi_pi05", "--lr", "1e-5")))
    for flags in ([], ["--recipe", "libero_10_ppo_openpi_pi05"]):
        config = train.parse(["--resume", str(run), *flags])
        assert (config.train.recipe, config.actor.lr) == ("libero_10_ppo_openpi_pi05", 1e-5)
    with pytest.raises(UserError, match="is not what run .* began with: leave it out"):
        train.parse(["--resume", str(run), "--recipe", "rl_vla3_c"])


@pytest.mark.parametrize(
    "name",
    [
        "metaworld_50_ppo_openpi_pi05",
        "metaworld_50_ppo_openpi",
        "libero_10_ppo_gr00t",
        "libero_10_grpo_openpi",
        "libero_10_grpo_openvlaoft",
        "rl_vla3_c",
    ],
)
def test_a_recipe_prepares_with_a_small_checkpoint(name, monkeypatch, tmp_path):
    recipe = RECIPES[name]
    simulator = pytest.importorskip(f"envs.{recipe.env}")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(machine, "memory", lambda: 10**13)
    spec = simulator.spec(recipe.tasks, 64)
    made, words = untrained.start(tmp_path, recipe.model, spec, spec.state_range, recipe.chunk, 0)
    flags = f"--recipe {name} --checkpoint {made} --tokenizer {words}"
    setup = prepare.prepare(train.parse(flags.split()))
    length = min(recipe.steps, max(spec.limits))
    assert setup.config.env.segment == -(-length // recipe.chunk)
    assert "no --recipe" not in setup.note
    assert f'"recipe": "{name}"' in setup.saved


def test_a_published_checkpoint_is_trained_as_its_family_is(monkeypatch, tmp_path):
    folder = published("pi05", "openpi", tmp_path / "published")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(metaworld, "spec", lambda tasks, image_size: SPEC)
    words = GOLDEN / "pi05" / "tokenizer.model"
    flags = f"--checkpoint {folder} --tokenizer {words} --chunk 4 --value-lr 0.002"
    config = train.parse(flags.split())
    for name, value in recipes.of_family(config).items():
        assert setting(config, name) == (0.002 if name == "value_lr" else value), name
    assert (config.actor.lr, config.actor.warmup, config.actor.anneal) == (5e-6, 0, False)
    assert (config.actor.batch, config.rollout.noise_level, config.train.recipe) == (48, None, "")
    grpo = train.parse(["--checkpoint", str(folder), "--algorithm", "grpo"])
    assert grpo.algorithm.gamma == 0.99 and grpo.actor.value_lr == Config().actor.value_lr
    line = recipes.note(config)
    assert line.count("\n") == 1 and line.startswith("no --recipe is given, so settings of RLinf's")
    assert "--lr 5e-06" in line and "--gamma 0.99" in line and "--value-lr" not in line
    assert line.endswith("--envs 24 --batch 48 are not among them\n")
    assert start.find_start(config, metaworld)[3] == line


def test_the_embedded_default_stays_as_it_is():
    assert to_json(train.parse([])) == to_json(Config())
    named = train.parse(["--checkpoint", SHIPPED])
    assert to_json(named) == to_json(completed(Config(), checkpoint=SHIPPED))
    assert all(setting(Config(), name) is not None for name in WORKERS)
