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
from perturbed import Part

STATES = 4
FEW = 2  # of the task c
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
    if "gone" in found:
        raise UserError("unknown task 'gone'")
    prompts = tuple(SAID[name[-1]] for name in found)
    note = "1 of 3 tasks is left out\n" if "base_lan" in tasks else ""
    states = FEW if any("c" in name for name in found) else STATES
    return EnvSpec(found, prompts, 1, image_size, 4, 4, 5, states=states, note=note)


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
        ("base_lan", 8, 0.5, "0-3"),
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


UNKNOWN = ("states 0-3 (taken as trained on)", "none known: --train-states says what training met")


@pytest.mark.parametrize(
    "settings, title, note",
    [
        (None, *UNKNOWN),
        ({"tasks": ("gone",)}, *UNKNOWN),
        ({"tasks": ("base",)}, "trained states 0-3", "none: training met all of 4"),
    ],
)
def test_where_training_met_all_states_none_are_held_out(evaluated, settings, title, note, capsys):
    """As another project's checkpoint may have, and one whose tasks are not installed here."""
    trained, held_out, *_ = evaluated(settings, suite="base", perturbed=True)["rows"]
    assert trained["task"] == f"base, {title}" and trained["episodes"] == 8
    assert held_out == {"task": "base, held-out states", "note": note}
    gone = "which tasks training met is not known here: unknown task 'gone'\n"
    assert (gone in capsys.readouterr().out) == (settings == {"tasks": ("gone",)})
    _, held_out, *_ = evaluated(settings, suite="base", perturbed=True, train_states="0-2")["rows"]
    assert held_out["task"] == "base, held-out states 3" and held_out["success_rate"] == 0.0


def test_what_was_never_trained_on_is_held_out(evaluated, tmp_path):
    """Whatever the run was evaluated on, and met before it began."""
    split = {"train_states": "0-2", "eval_states": "0-1", "tasks": ("base",)}
    _, held_out, *_ = evaluated(split, suite="base", perturbed=True)["rows"]
    assert held_out["task"] == "base, held-out states 3" and held_out["episodes"] == 2
    evaluated(split)
    (tmp_path / "run").rename(tmp_path / "earlier")
    split = {"train_states": "2", "eval_states": "0,1,3", "tasks": ("a",)}
    later = {**split, "checkpoint": tmp_path / "earlier"}
    rows = evaluated(later, suite="base", perturbed=True)["rows"]
    assert [row["task"] for row in rows][:2] == [
        "base, trained states 0-2",
        "base, held-out states 3",
    ]


def test_what_the_weights_met_that_a_run_began_from_may_be_unknown(
    evaluated, tiny_checkpoint, tmp_path, capsys
):
    """No row says more than the runs that are known, and a line names where knowledge ends."""
    split = {"train_states": "0-1", "eval_states": "2-3", "tasks": ("a", "base_lan/b")}
    flags = {"suite": "base", "perturbed": True}
    begun = {**split, "checkpoint": tiny_checkpoint}
    rows = evaluated(begun, **flags)["rows"]
    assert [row["task"] for row in rows][:4] == [
        "base (1 of 2 tasks), trained states 0-1",
        "base (1 of 2 tasks), held-out states 2-3 as far as known",
        "base (1 of 2 tasks), not trained on as far as known",
        "base_lan, 1 of 2 tasks trained on as far as known",
    ]
    line = f"what the training of {tiny_checkpoint} met is not known here\n"
    assert capsys.readouterr().out.count(line) == 1
    evaluated(begun)
    said = capsys.readouterr().out
    assert line in said and "(training met 0-1, as far as known)" in said
    evaluated(begun, train_states="0-1")  # who gives it knows
    assert "(training met 0-1)" in capsys.readouterr().out
    evaluated(begun, suite="other", eval_states="0")
    assert "(not trained on, as far as known)" in capsys.readouterr().out
    evaluated(begun, suite="other")  # of which nothing is said
    assert line not in capsys.readouterr().out

    # An adapter is as unknown, and so is a folder that is gone.
    untrained = tmp_path / "untrained_pi05_0123456789.safetensors"
    for begun, ends in (
        ({"checkpoint": tmp_path / "gone", "adapter": None}, f"{tmp_path}/gone"),
        ({"checkpoint": untrained, "adapter": tmp_path / "peft"}, f"{tmp_path}/peft"),
        ({"checkpoint": tmp_path / "x", "adapter": tmp_path / "y"}, f"{tmp_path}/y and of "),
    ):
        evaluated({**split, **begun}, **flags)
        said = capsys.readouterr().out
        assert f"what the training of {ends}" in said and said.count("as far as known") == 3

    # What was never trained has met nothing.
    rows = evaluated({**split, "checkpoint": untrained}, **flags)["rows"]
    assert rows[2]["task"] == "base (1 of 2 tasks), not trained on"
    untrained.symlink_to(tiny_checkpoint)
    rows = evaluated(None, checkpoint=untrained, **flags)["rows"]
    assert rows[0]["task"] == "base, not trained on"
    assert "known" not in capsys.readouterr().out


def test_few_episodes_begin_everywhere(evaluated):
    flags = {"suite": "base", "perturbed": True, "episodes": 4}
    rows = evaluated({"tasks": ("base",)}, **flags)["rows"]
    assert rows[0]["states"] == "0-2"
    assert Env.met[1:5] == [("a", 0), ("b", 2), ("a", 2), ("b", 1)]
    rows = evaluated({"tasks": ("base",)}, seed=1, **flags)["rows"]
    assert rows[0]["states"] == "0-1,3"
    assert Env.met[1:5] == [("a", 1), ("b", 3), ("a", 3), ("b", 0)]
    evaluated({"tasks": ("base",)}, train_states="1", **flags | {"episodes": 1})
    assert Env.met[:4] == [("a", 1), ("a", 1), ("a", 0), ("a", 0)]  # the first is to warm up


def test_evaluation_states_that_are_given_are_those_that_are_played(evaluated, monkeypatch):
    monkeypatch.setitem(SUITES, "base_torn", ("base_torn/c",))
    split = {"train_states": "0-1", "eval_states": "2-3", "tasks": ("base",)}
    flags = {"suite": "base", "perturbed": True}
    rows = evaluated(split, eval_states="0,3", **flags)["rows"]
    assert [(row["task"], row.get("states"), row.get("note")) for row in rows] == [
        ("base, trained states 0-1", "0-1", None),
        ("base, held-out states 3", "3", None),
        ("base_lan", "0,3", None),
        ("base_torn", None, "its assets are not here"),
    ]
    rows = evaluated(split, eval_states="3", **flags)["rows"]
    assert rows[2]["states"] == "3"
    assert rows[3]["note"] == "none: its initial states are 0-1, and --eval-states 3"
    monkeypatch.setattr(models, "build", None)  # what is wrong is found before
    for settings, states, words in (
        (split, "0-1", "0-1 has no initial state that was held out, for training met 0-1: give"),
        ({"tasks": ("base",)}, "2", "2 has no .* held out, for training met 0-3: give others, or"),
        (None, "2", "2 has no .* held out, for nobody knows what training met: give --train-st"),
    ):
        with pytest.raises(UserError, match=f"^--eval-states {words}"):
            evaluated(settings, eval_states=states, **flags)


def test_a_run_s_split_that_does_not_fit_the_tasks_is_no_flag_s_fault(evaluated):
    split = {"train_states": "0-1", "eval_states": "2-3", "tasks": ("base",)}
    words = "^the run was evaluated on initial states 2-3, and these tasks have 0-1 alone: give --"
    with pytest.raises(UserError, match=words):
        evaluated(split, tasks=("a", "c"))
    evaluated({**split, "train_states": "0,3", "eval_states": "1-2"}, tasks=("a", "c"))
    assert {state for _, state in Env.met} == {1}


@pytest.mark.parametrize("count, episodes", [(350, 100), (350, 35), (90, 20)])
def test_fewer_episodes_than_tasks_are_of_tasks_from_everywhere(count, episodes):
    """LIBERO-plus lists all variants of one task, then those of the next."""
    tasks = tuple(map(str, range(count)))
    suite = EnvSpec(tasks, tasks, 1, 64, 4, 4, 5, states=50)
    every = set()
    for seed in range(count // episodes):
        part, chosen = Part("", suite).chosen(episodes, seed)
        begun = {(task, part.states[index]) for task, index in chosen}
        of_each = np.bincount([task * 10 // count for task, _ in begun])  # of ten base tasks
        assert of_each.min() >= episodes // 10 - 2 and of_each.max() <= episodes // 10 + 2
        of_states = np.bincount([state for _, state in begun], minlength=50)
        assert of_states.max() <= -(-episodes // 50)
        assert len({task for task, _ in begun}) == episodes
        every |= {task for task, _ in begun}
    assert len(every) == count // episodes * episodes
    part, chosen = Part("", suite).chosen(10**6, 3)
    assert len(set(chosen)) == len(chosen) == count * 50 and part.states == tuple(range(50))


def test_tasks_that_were_not_trained_on_have_a_row_of_their_own(evaluated, capsys):
    split = {"train_states": "0-1", "eval_states": "2-3", "tasks": ("a", "base_lan/b")}
    rows = evaluated(split, suite="base", perturbed=True)["rows"]
    assert [(row["task"], row.get("episodes")) for row in rows] == [
        ("base (1 of 2 tasks), trained states 0-1", 2),
        ("base (1 of 2 tasks), held-out states 2-3", 2),
        ("base (1 of 2 tasks), not trained on", 4),
        ("base_lan, 1 of 2 tasks trained on", 8),
        ("base_torn", None),
    ]
    assert [one["task"] for row in rows[:3] for one in row["tasks"]] == ["a", "a", "b"]
    capsys.readouterr()
    evaluated(split, suite="base")
    assert "initial states 2-3 (training met 0-1 of 1 of 2 tasks)" in capsys.readouterr().out


def test_what_was_played_is_kept_whatever_fails(evaluated, monkeypatch, tmp_path):
    """A part in which the simulator breaks has a row that says after what; the others go on."""
    file = tmp_path / "result.json"
    written = []
    step, reset = Env.step, Env.reset

    def breaks(self, action):
        if self.tasks[0].startswith("base_lan") and self.state == 3:
            raise RuntimeError("no contact")
        return step(self, action)

    def begins(self, task, seed):
        if self.tasks[0].startswith("base_torn"):
            written.append(json.loads(file.read_text()))
        reset(self, task, seed)

    monkeypatch.setattr(Env, "step", breaks)
    monkeypatch.setattr(Env, "reset", begins)
    monkeypatch.setattr(evaluate, "ABREAST", 2)
    flags = {"suite": "base", "perturbed": True, "json": file}
    rows = evaluated({"tasks": ("base",)}, train_states="0-1", **flags)["rows"]
    assert [row["task"] for row in rows] == [
        "base, trained states 0-1",
        "base, held-out states 2-3",
        "base_lan",
        "base_torn",
    ]
    note = rows[2]["note"]
    assert note.startswith("RuntimeError('no contact') at ")
    assert note.endswith(" (after 2 successes in 4 of 8 episodes)")
    assert [one["episodes"] for one in rows[2]["tasks"]] == [2, 2]
    assert written[0]["rows"] == rows[:3]
    assert sorted(film.name for film in (tmp_path / "films" / "base_lan").iterdir()) == [
        "base_lan_a.mp4",
        "base_lan_b.mp4",
    ]
    assert (tmp_path / "films" / "perturbed.png").is_file()

    # What breaks the first part would break them all.
    monkeypatch.setattr(Env, "step", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluated({"tasks": ("base",)}, **flags)


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
    said = capsys.readouterr().out
    assert "initial states 3 (training met 0-3)" in said
    assert "16 episodes have 2 beginnings, each up to 8 times" in said
    evaluated(None, eval_states="3")
    assert "initial states 3 (nobody knows which were trained on)" in capsys.readouterr().out
    evaluated(None, eval_states="3", train_states="0-1")
    assert "initial states 3 (training met 0-1)" in capsys.readouterr().out
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
def test_mistakes(evaluated, flags, words, monkeypatch):
    """They are found before the policy is built."""
    monkeypatch.setattr(models, "build", None)
    with pytest.raises(UserError, match=words):
        evaluated(None, **flags)
    assert Env.met == []
