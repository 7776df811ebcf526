"""Initial states that training and evaluation begin at: what flags say, and what lanes play."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import test_lanes

import envs
import prepare
import start
import train
from config import Config, completed, to_json
from envs import EnvSpec, lanes
from envs.states import read_states, repeats, say_states, split
from errors import UserError
from models import checkpoint
from scheduler import Trajectories

SPEC = EnvSpec(("a", "b"), ("push", "pull"), 1, 2, 4, 4, 5, states=50)


def test_ranges_are_read_and_said():
    for text, states in (
        ("", ()),
        ("7", (7,)),
        ("0-3", (0, 1, 2, 3)),
        ("8,0-2,9,1-3", (0, 1, 2, 3, 8, 9)),
    ):
        assert read_states(text) == states and read_states(say_states(states)) == states
    assert say_states((0, 1, 2, 3, 8, 9, 11)) == "0-3,8-9,11"
    for wrong in ("x", "3-1", "-1", "1-", "0:40", ",", "1,,2", "0-10000000", " "):
        with pytest.raises(UserError, match="names no initial states: give ranges such as 0-39"):
            read_states(wrong)


def test_one_flag_splits():
    """The other side takes the rest; without flags nothing changes, whatever a simulator has."""
    assert split("libero", SPEC, "", "") == ("", "", "")
    halves = "of 50 initial states, training meets 0-39, evaluation 40-49\n"
    assert split("libero", SPEC, "0-39", "") == ("0-39", "40-49", halves)
    assert split("libero", SPEC, "", "40-49") == ("0-39", "40-49", halves)
    assert split("libero", SPEC, "0-9", "5-14,49")[1:] == (
        "5-14,49",
        "of 50 initial states, training meets 0-9, evaluation 5-14,49 (trained on, too: 5-9)\n",
    )
    for train_states, eval_states, words in (
        ("0-50", "", "--train-states 0-50 is out of range: each task has the initial states 0-49"),
        ("", "50", "--eval-states 50 is out of range"),
        ("0-49", "", "--train-states leaves none of the 50 initial states to evaluation"),
    ):
        with pytest.raises(UserError, match=words):
            split("libero", SPEC, train_states, eval_states)
    for flag, given in (("--train-states", ("0-9", "")), ("--eval-states", ("", "1"))):
        with pytest.raises(UserError, match=f"metaworld has no fixed initial states.*out {flag}$"):
            split("metaworld", SPEC._replace(states=0), *given)


@pytest.mark.parametrize("name", ["metaworld", "maniskill", "robocasa", "libero"])
def test_every_simulator_says_how_many_fixed_states_it_has(name):
    try:
        simulator = envs.load(name)
    except UserError as missing:
        pytest.skip(str(missing))
    assert simulator.spec((), 64).states == (50 if name == "libero" else 0)


def test_a_run_s_settings_hold_both_sides(monkeypatch):
    said = "--model emulated --env emulated --envs 8 --batch 16 --minibatch 8"
    flags = said.split()
    with pytest.raises(UserError, match="emulated has no fixed initial states"):
        prepare.prepare(train.parse([*flags, "--train-states", "0-39"]))
    module = envs.load("emulated").module
    plain = module.spec
    monkeypatch.setattr(module, "spec", lambda *given: plain(*given)._replace(states=50))
    setup = prepare.prepare(train.parse([*flags, "--train-states", "0-39"]))
    assert "0-39" in setup.saved and "40-49" in setup.saved
    for config, _ in setup.choices.values():
        assert (config.env.train_states, config.env.eval_states) == ("0-39", "40-49")
    assert "of 50 initial states, training meets 0-39, evaluation 40-49" in setup.note
    env = prepare.prepare(train.parse(flags)).config.env
    assert env.train_states == env.eval_states == ""


def test_what_a_checkpoint_has_met_is_not_held_out(monkeypatch, tiny_checkpoint, tmp_path):
    """Nor what the run met whose checkpoint that one's began from."""
    simulator = envs.load("emulated")
    plain = simulator.module.spec
    monkeypatch.setattr(simulator.module, "spec", lambda *given: plain(*given)._replace(states=50))

    def run(name: str, **settings):
        folder = tmp_path / name / "checkpoints" / "000003"
        folder.mkdir(parents=True)
        (folder / "model.safetensors").symlink_to(tiny_checkpoint)
        config = completed(Config(), env="emulated", **settings)
        (tmp_path / name / "config.json").write_text(to_json(config))
        return tmp_path / name

    first = run("first", train_states="0-39", eval_states="40-49")
    second = run("second", checkpoint=first, train_states="5-44", eval_states="0-4,45-49")
    whole = run("whole")
    removed = tmp_path / "removed"
    gone = run("gone", checkpoint=removed, train_states="45-49")
    ends = {gone: removed, tiny_checkpoint: tiny_checkpoint}
    for begins, train_states, met in (
        (first, "10-49", "0-9"),
        (first, "0-39", ""),
        (second, "20-49", "0-19"),
        (whole, "10-49", "0-9"),
        (gone, "10-49", ""),
        (tiny_checkpoint, "10-49", ""),
    ):
        given = {"checkpoint": begins, "train_states": train_states, "eval_every": 0}
        config = completed(Config(), env="emulated", **given)
        note = prepare.with_states(config, simulator)[1]
        said = f"not held out: checkpoint {begins} has met initial states {met}\n"
        assert note.endswith(said) if met else "not held out" not in note
        unknown = f"what the training of {ends.get(begins)} met is not known here\n"
        assert (unknown in note) == (begins in ends) == ("not known" in note)


def test_where_a_run_began_is_found_from_another_folder(monkeypatch, tiny_checkpoint, tmp_path):
    """Whether that was named by its path in a folder, or by a run's name."""
    monkeypatch.setattr(checkpoint, "ROOT", tmp_path)
    for name in ("runs/first", "here/second"):
        folder = tmp_path / name / "checkpoints" / "000003"
        folder.mkdir(parents=True)
        (folder / "model.safetensors").symlink_to(tiny_checkpoint)
        (tmp_path / name / "config.json").write_text(to_json(Config()))
    (tmp_path / "here" / "first").mkdir()  # which is no run
    (tmp_path / "here" / "peft").mkdir()
    metaworld = envs.load("metaworld")
    for name, place in (
        ("first", "runs/first"),
        ("first/checkpoints/000003", "runs/first/checkpoints/000003"),
        ("second", "here/second"),
        ("../here/second/checkpoints/000003", "here/second/checkpoints/000003"),
    ):
        monkeypatch.chdir(tmp_path / "here")
        config = completed(Config(), checkpoint=Path(name), adapter=Path("peft"))
        config, given, _, _ = start.find_start(config, metaworld)
        monkeypatch.chdir(tmp_path)
        assert given.is_absolute() and given.resolve() == tmp_path / place
        assert start.lineage(given, None) == ([Config()], [])
        assert config.train.adapter == tmp_path / "here" / "peft"
    assert start.lineage(Path("gone"), None) == ([], [Path("gone")])


def test_episodes_of_one_beginning_are_counted(monkeypatch):
    words = "100 episodes have 10 beginnings, each up to 10 times: intervals count them as indep"
    assert repeats(100, SPEC, "45-49").startswith(words)
    assert repeats(100, SPEC, "") == repeats(10, SPEC, "45-49") == ""
    assert repeats(10**6, SPEC._replace(states=0), "") == ""
    simulator = envs.load("emulated")
    monkeypatch.setattr(simulator.module, "spec", lambda *given: SPEC)
    config = completed(Config(), env="emulated", eval_states="49", eval_episodes=24)
    assert "24 episodes have 2 beginnings" in prepare.with_states(config, simulator)[1]
    config = completed(config, eval_every=0)
    assert "beginnings" not in prepare.with_states(config, simulator)[1]


def test_lanes_hand_states_to_their_simulators():
    module = SimpleNamespace(Env=test_lanes.Env, Envs=test_lanes.Envs)
    simulator = envs.Simulator("both", module)
    config = Config()
    config.env.image_size = 2
    for count in (0, 1):
        config.env.lanes = count
        given = (simulator, test_lanes.SPEC, config, 0, range(1), "cpu", False)
        assert lanes.make_lane(*given).player.states == ()
        assert lanes.make_lane(*given, (3, 4)).player.states == (3, 4)
    only_many = envs.Simulator("many", SimpleNamespace(Envs=test_lanes.Envs))
    assert only_many.make(test_lanes.SPEC, states=(1,)).many.states == (1,)


@pytest.fixture
def libero():
    try:
        module = envs.load("libero").module
    except UserError as missing:
        pytest.skip(str(missing))
    env = module.Env(("turn_on_the_stove",), 32)
    yield env
    env.close()


def test_libero_begins_at_the_states_that_are_chosen(libero):
    """Training's by chance, a group's all at the same one; evaluation's one after the other. All of
    them without a choice, as ever."""

    def met(seeds) -> list[int]:
        found = []
        for seed in seeds:
            libero.reset(0, seed)
            physics = libero.physics
            found += [i for i, one in libero.scene.settled.items() if one.physics is physics]
        return found

    assert met(range(500_000, 500_003)) == [0, 1, 2] and met([500_050]) == [0]
    libero.states = (40, 7)
    assert met(range(500_000, 500_004)) == [40, 7, 40, 7]
    config = completed(Config(), algorithm="grpo", group_size=2, envs=4, batch=4, segment=2)
    name = Trajectories.of(config).episode_seed
    groups = [[name(env, trajectory, 0) for env in (0, 1)] for trajectory in range(8)]
    states = [met(group) for group in groups]
    assert all(first == second for first, second in states)
    assert {first for first, _ in states} == {40, 7}
    seeds = np.random.default_rng(0).integers(2**30, 2**31, 20).tolist()
    assert set(met(seeds)) == {40, 7}
