"""Honest evaluation: one table of trained states, held-out states and perturbations."""

import json

import imageio.v2 as imageio
import numpy as np
import pytest

import envs
import evaluate
import models
from config import Config, completed, to_json
from envs import EnvSpec, Step
from errors import UserError
from evaluate import EvaluateConfig, wilson

STATES = 4
SUITES = {
    "base": ("a", "b"),
    "base_lan": ("base_lan/a", "base_lan/b"),
    "base_torn": ("base_torn/a",),
    "other": ("c",),
}
SAID = {"a": "push", "b": "pull", "c": "turn"}


def spec(tasks, image_size):
    names = [SUITES.get(task, (task,)) for task in tasks or ("base",)]
    found = tuple(name for group in names for name in group)
    prompts = tuple(SAID[name[-1]] for name in found)
    note = "1 of 3 tasks is left out\n" if "base_lan" in tasks else ""
    return EnvSpec(found, prompts, 1, image_size, 4, 4, 5, states=STATES, note=note)


def perturbed(suite):
    found = {"base_lan": "", "base_torn": "", "base_env": "has no task files"}
    return found if suite == "base" else {}


class Env(envs.Env):
    """Its episodes succeed at states 0 and 1; the torn suite cannot be built."""

    met = []

    def reset(self, task, seed):
        chosen = self.states or range(STATES)
        self.state = chosen[seed // len(self.tasks) % len(chosen)]
        self.met.append((self.tasks[task], self.state))
        if self.tasks[task].startswith("base_torn"):
            raise UserError("its assets are not here")

    def observe(self):
        return np.zeros((1, self.size, self.size, 3), np.uint8), np.full(4, 0.5, np.float32)

    def step(self, action):
        return Step(0.0, self.state < 2)


@pytest.fixture
def evaluated(monkeypatch, tiny_checkpoint, tmp_path):
    """Returns a function that evaluates, and Env.met. A run folder is made of its settings."""
    monkeypatch.setitem(envs.SIMULATORS, "fixed", (__name__, ""))
    monkeypatch.setattr(Env, "met", [])

    def evaluate_run(settings: dict | None, **flags) -> dict:
        run = tmp_path / "run"
        folder = run / "checkpoints" / "000003"
        folder.mkdir(parents=True, exist_ok=True)
        weights = folder / "model.safetensors"
        if not weights.exists():
            weights.symlink_to(tiny_checkpoint)
        (run / "config.json").unlink(missing_ok=True)
        if settings is not None:
            config = completed(Config(), env="fixed", image_size=64, **settings)
            (run / "config.json").write_text(to_json(config))
        given = {"checkpoint": run, "env": "fixed", "episodes": 16, "videos": tmp_path / "films"}
        Env.met.clear()
        return evaluate.main(EvaluateConfig(**given | flags))

    return evaluate_run


def test_one_table_one_picture_one_file(evaluated, monkeypatch, tmp_path, capsys):
    built = []
    build = models.build
    monkeypatch.setattr(models, "build", lambda *given: built.append(1) or build(*given))
    split = {"train_states": "0-1", "eval_states": "2-3", "tasks": ("base",)}
    result = evaluated(split, suite="base", perturbed=True, json=tmp_path / "result.json")
    assert len(built) == 1 and result == json.loads((tmp_path / "result.json").read_text())

    # Two states of two tasks are four episodes, though sixteen were asked for.
    rows = {row["task"]: row for row in result["rows"]}
    for title, n, rate, states in (
        ("base, trained states 0-1", 4, 1.0, "0-1"),
        ("base, held-out states 2-3", 4, 0.0, "2-3"),
        ("base_lan", 8, 0.5, ""),
    ):
        row = rows.pop(title)
        low, high = wilson(round(n * rate), n)
        numbers = {"episodes": n, "success_rate": rate, "low": low, "high": high}
        assert row.items() >= {**numbers, "states": states}.items(), title
        assert [one["episodes"] for one in row["tasks"]] == [n // 2, n // 2]
    assert rows == {"base_torn": {"task": "base_torn", "note": "its assets are not here"}}
    assert result["missing"] == {"base_env": "has no task files"}

    said = capsys.readouterr().out
    assert "base, held-out states 2-3    0/4      0.0%   95 % [0.0%, 49.0%]" in said
    assert "base_torn                 its assets are not here" in said
    assert said.count("\n1 of 3 tasks is left out\n") == 1
    assert "not here, for each has no task files: base_env" in said
    films = tmp_path / "films"
    assert imageio.imread(films / "perturbed.png").std() > 10
    assert (films / "base_lan" / "base_lan_a.mp4").is_file()
    assert (films / "base-held-out-states-2-3" / "a.mp4").is_file()


@pytest.mark.parametrize("settings", [None, {"tasks": ("base",)}])
def test_where_training_met_all_states_none_are_held_out(evaluated, settings):
    """As another project's checkpoint may have."""
    trained, held_out, *_ = evaluated(settings, suite="base", perturbed=True)["rows"]
    assert trained["task"] == "base, trained states 0-3" and trained["episodes"] == 8
    none = {"task": "base, held-out states", "note": "none: training met all of 4"}
    assert held_out == none
    _, held_out, *_ = evaluated(settings, suite="base", perturbed=True, train_states="0-2")["rows"]
    assert held_out["task"] == "base, held-out states 3" and held_out["success_rate"] == 0.0


def test_a_table_that_could_not_be_drawn_is_not_begun(evaluated, tmp_path):
    (tmp_path / "films" / "perturbed.png").mkdir(parents=True)
    with pytest.raises(UserError, match="cannot write the picture to .*perturbed.png"):
        evaluated(None, suite="base", perturbed=True)
    assert Env.met == []


def test_other_tasks_are_neither_trained_nor_held_out(evaluated):
    split = {"train_states": "0-1", "eval_states": "2-3"}
    rows = evaluated({"tasks": ("other",), **split}, suite="base", perturbed=True)["rows"]
    assert [row["task"] for row in rows] == ["base, not trained on", "base_lan", "base_torn"]
    assert rows[0]["episodes"] == 8
    rows = evaluated({"tasks": ("base_lan",), **split}, suite="base", perturbed=True)["rows"]
    assert [row["task"] for row in rows][:2] == ["base, not trained on", "base_lan, trained on"]


def test_a_run_is_evaluated_on_its_held_out_states(evaluated, capsys):
    split = {"train_states": "0-1", "eval_states": "2-3", "tasks": ("base",)}
    assert evaluated(split)["rows"][-1]["success_rate"] == 0.0
    assert {state for _, state in Env.met} == {2, 3}
    assert "initial states 2-3 (training met 0-1)" in capsys.readouterr().out
    assert evaluated(split, eval_states="0-1")["rows"][-1]["success_rate"] == 1.0
    evaluated(split, suite="other")  # of which training met nothing
    assert {state for _, state in Env.met} == {0, 1, 2, 3}
    evaluated({"tasks": ("base",)}, eval_states="3")
    assert {state for _, state in Env.met} == {3}
    assert "initial states 3 (training met 0-3)" in capsys.readouterr().out
    evaluated({"tasks": ("base",)})  # the published protocol
    assert {state for _, state in Env.met} == {0, 1, 2, 3}


@pytest.mark.parametrize(
    "flags, words",
    [
        ({"suite": "other", "perturbed": True}, "for a suite with perturbations.*other has none"),
        ({"suite": "base", "tasks": ("c",), "perturbed": True}, "is for one suite"),
        ({"eval_states": "9"}, "--eval-states 9 is out of range: each task has .* 0-3"),
        ({"eval_states": "x"}, "'x' names no initial states"),
        ({"env": "metaworld", "train_states": "0-1"}, "metaworld has no fixed initial states"),
        ({"env": "metaworld", "suite": "reach", "perturbed": True}, "reach has none here"),
    ],
)
def test_mistakes(evaluated, flags, words):
    with pytest.raises(UserError, match=words):
        evaluated(None, **flags)
    assert Env.met == []
