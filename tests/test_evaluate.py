"""Success rates with their intervals, on episodes that are the same every time."""

import itertools
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import STATS
from safetensors.torch import load_file
from test_pi_files import published

import envs
import evaluate
from config import Config, completed, to_json
from envs import EnvSpec, Step
from errors import UserError
from evaluate import Episode, EvaluateConfig, wilson
from models import checkpoint
from start import lineage


def test_wilson_s_interval():
    assert wilson(50, 100) == pytest.approx((0.40383, 0.59617), abs=1e-5)
    assert wilson(0, 10) == pytest.approx((0.0, 0.27754), abs=1e-5)
    assert wilson(10, 10) == pytest.approx((0.72246, 1.0), abs=1e-5)


def test_a_checkpoint_is_evaluated_the_same_every_time(tiny_checkpoint, tmp_path, capsys):
    tasks = ("faucet-open", "handle-press")
    config = EvaluateConfig(
        checkpoint=tiny_checkpoint,
        tasks=tasks,
        episodes=3,
        videos=tmp_path / "a",
        json=tmp_path / "a.json",
    )
    result = evaluate.main(config)
    assert result == json.loads((tmp_path / "a.json").read_text()) and result["checkpoint"] == str(
        tiny_checkpoint
    )
    assert [(row["task"], row["episodes"]) for row in result["rows"]] == [
        ("faucet-open", 2),
        ("handle-press", 1),
        ("all", 3),
    ]
    for row in result["rows"]:
        assert (row["low"], row["high"]) == wilson(
            round(row["success_rate"] * row["episodes"]), row["episodes"]
        )
    films = [(tmp_path / "a" / f"{task}.mp4").read_bytes() for task in tasks]
    assert all(b"ftyp" in film[:32] and len(film) > 2000 for film in films) and films[0] != films[1]
    assert "95 % [" in capsys.readouterr().out
    again = evaluate.main(
        EvaluateConfig(checkpoint=tiny_checkpoint, tasks=tasks, episodes=3, videos=tmp_path / "b")
    )
    assert again["rows"] == result["rows"]
    assert [
        (tmp_path / "b" / f"{task}.mp4").read_bytes() for task in tasks
    ] == films  # to the last pixel


def test_the_command_line_reads_a_run_s_newest_checkpoint(cli, tiny_checkpoint, tmp_path):
    folder = tmp_path / "run" / "checkpoints" / "000003"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").symlink_to(tiny_checkpoint)
    status, output = cli(
        "evaluate.py", f"--checkpoint {tmp_path / 'run'} --tasks handle-press --episodes 1"
    ).finish()
    assert (
        status == 0
        and "handle-press" in output
        and (tmp_path / "run/videos/000003/handle-press.mp4").is_file()
    ), output
    status, output = cli("evaluate.py", f"--checkpoint {tmp_path / 'none'}").finish(timeout=10)
    assert status == 2 and output.startswith("error: no checkpoint at") and output.count("\n") == 1


def test_a_policy_that_gives_nan_is_named_and_nothing_is_counted(tiny_checkpoint, tmp_path, capsys):
    header = checkpoint.read_header(tiny_checkpoint)
    tensors = load_file(tiny_checkpoint)
    tensors["action_out_proj.weight"][:] = 3e38  # finite itself, which loading checks
    broken = tmp_path / "broken.safetensors"
    checkpoint.save(broken, header, tensors)
    with pytest.raises(
        UserError, match=f"checkpoint {broken} gives numbers .* not finite .actions"
    ):
        evaluate.main(EvaluateConfig(checkpoint=broken, episodes=1, videos=tmp_path))
    assert "0/1" not in capsys.readouterr().out


def test_every_task_has_its_own_time_limit():
    class Still:
        def step(self, action):
            return Step(0.0, False)

        def film(self):
            return None

    player = SimpleNamespace(spec=EnvSpec(("a", "b"), ("a", "b"), 1, 8, 4, 4, 5, limits=(3, 5)))
    for task, limit in ((0, 3), (1, 5)):
        episode = Episode(task, task, Still())
        evaluate.Player.execute(player, episode, np.zeros((10, 4)))
        assert episode.success is False and episode.steps == limit


class Plays(envs.Env):
    """Stands for a simulator; keeps the seeds of its episodes."""

    seeds = []

    def reset(self, task, seed):
        self.seeds.append((task, seed))

    def observe(self):
        return np.zeros((1, self.size, self.size, 3), np.uint8), np.full(4, 0.5, np.float32)

    def step(self, action):
        return Step(0.0, True)


def spec(tasks, image_size):
    return EnvSpec(tasks or ("a", "b"), ("push", "pull"), 1, image_size, 4, 4, 5)


Env = Plays


@pytest.fixture
def plays(monkeypatch):
    """Registers this file as a simulator."""
    monkeypatch.setitem(envs.SIMULATORS, "plays", (__name__, ""))
    monkeypatch.setattr(Plays, "seeds", [])
    return Plays


def test_episodes_of_the_next_seed_follow_on(plays, tiny_checkpoint, tmp_path):
    """LIBERO begins episodes at state seed // tasks % 50, of which a thousand is a multiple."""
    met = []
    for seed in (0, 1, 2):
        plays.seeds.clear()
        given = {"checkpoint": tiny_checkpoint, "env": "plays", "videos": tmp_path, "seed": seed}
        evaluate.main(EvaluateConfig(**given, episodes=5))
        met += [(task, number // 2 % 50) for task, number in plays.seeds[1:]]
    assert len(set(met)) == len(met) == 15
    for seed, words in ((-1, "must be at least 0"), (10**8, "is out of range")):
        with pytest.raises(UserError, match=f"--seed {seed} {words}"):
            evaluate.main(EvaluateConfig(**given | {"seed": seed}, episodes=5))


def test_a_run_hands_on_what_it_was_trained_with(plays, tiny_checkpoint, tmp_path):
    run = tmp_path / "run"
    folder = run / "checkpoints" / "000003"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").symlink_to(tiny_checkpoint)
    trained = {"env": "plays", "tasks": ("b", "a"), "image_size": 32, "render_quality": "full"}
    trained["cameras"] = 1
    (run / "config.json").write_text(to_json(completed(Config(), **trained)))

    def as_in_training(given: EvaluateConfig) -> EvaluateConfig:
        return evaluate.as_in_training(given, lineage(given.checkpoint, None).runs)

    found = as_in_training(EvaluateConfig(checkpoint=run))
    assert {name: getattr(found, name) for name in trained} == trained
    assert found.videos == run / "videos" / "000003"  # beside the films of other versions
    given = {"env": "libero", "suite": "libero_10", "image_size": 48, "render_quality": "fast"}
    given["cameras"] = 2
    found = as_in_training(EvaluateConfig(checkpoint=run, **given))
    assert (found.env, found.tasks, found.image_size) == ("libero", ("libero_10",), 48)
    assert (found.render_quality, found.cameras) == ("fast", 2)
    assert as_in_training(EvaluateConfig(checkpoint=run, env="metaworld")).tasks == ()
    found = as_in_training(EvaluateConfig(checkpoint=tiny_checkpoint))
    assert (found.env, found.image_size, found.render_quality) == ("metaworld", 0, "fast")


def test_what_cannot_be_written_is_found_before_the_first_episode(plays, tiny_checkpoint, tmp_path):
    file = tmp_path / "file"
    file.write_text("{}")
    given = {"checkpoint": tiny_checkpoint, "env": "plays", "episodes": 2}
    for videos, result, words in (
        (file, None, "cannot write videos to .*file.* give another --videos FOLDER"),
        (tmp_path / "v", tmp_path, "cannot write the result to .* give another --json FILE"),
        (tmp_path / "v", file / "x.json", "cannot write the result to .*file"),
    ):
        with pytest.raises(UserError, match=words):
            evaluate.main(EvaluateConfig(**given, videos=videos, json=result))
    assert plays.seeds == [] and file.read_text() == "{}" and not (tmp_path / "v").exists()


def test_a_prompt_that_is_too_long_is_found_before_the_first_episode(
    plays, monkeypatch, tiny_checkpoint, tmp_path
):
    """Its task would come last."""
    long = spec(("a", "b"), 64)._replace(prompts=("push", "push the button " * 40))
    monkeypatch.setattr(sys.modules[__name__], "spec", lambda *_: long)
    given = {"checkpoint": tiny_checkpoint, "env": "plays", "videos": tmp_path}
    with pytest.raises(UserError, match="the model has room for"):
        evaluate.main(EvaluateConfig(**given, episodes=2))
    assert plays.seeds == []


def test_what_ended_before_a_simulator_failed_is_kept(
    plays, monkeypatch, tiny_checkpoint, tmp_path, capsys
):
    def breaks(self, action):
        return Step(0.0, True) if len(self.seeds) <= 4 else 1 / 0

    monkeypatch.setattr(Plays, "step", breaks)
    monkeypatch.setattr(evaluate, "ABREAST", 1)
    given = {"checkpoint": tiny_checkpoint, "env": "plays", "videos": tmp_path, "episodes": 9}
    with pytest.raises(ZeroDivisionError):
        evaluate.main(EvaluateConfig(**given, json=tmp_path / "result.json"))
    rows = json.loads((tmp_path / "result.json").read_text())["rows"]
    assert [(row["task"], row["episodes"]) for row in rows] == [("a", 2), ("b", 1), ("all", 3)]
    assert "all                             3/3" in capsys.readouterr().out


@pytest.mark.parametrize("where", ["step", "reset"])
@pytest.mark.parametrize("kind", [FloatingPointError, np.linalg.LinAlgError])
def test_an_episode_whose_simulation_breaks_counts_as_failed_and_the_others_go_on(
    plays, monkeypatch, tiny_checkpoint, tmp_path, capsys, where, kind
):
    reset = Plays.reset

    def breaks(self, *given):
        if where == "reset":
            reset(self, *given)
        if len(self.seeds) == 3:
            self.broken = True
            raise kind("the simulation became unstable (mjWARN_BADQACC) at 1.00 s")
        assert not hasattr(self, "broken"), "what is left of it plays on"
        return Step(0.0, True)

    monkeypatch.setattr(Plays, "step", lambda self, action: Step(0.0, True))
    monkeypatch.setattr(Plays, where, breaks)
    monkeypatch.setattr(evaluate, "ABREAST", 1)
    given = {"checkpoint": tiny_checkpoint, "env": "plays", "videos": tmp_path, "episodes": 4}
    rows = evaluate.main(EvaluateConfig(**given))["rows"]
    rates = {row["task"]: (row["episodes"], row["success_rate"]) for row in rows}
    assert rates == {"a": (2, 1.0), "b": (2, 0.5), "all": (4, 0.75)}
    said = capsys.readouterr().err
    assert said == (
        "warning: the simulation became unstable (mjWARN_BADQACC) at 1.00 s: episode 1 counts as "
        "failed\n"
    )


def test_a_long_evaluation_gives_signs_of_life(
    plays, monkeypatch, tiny_checkpoint, tmp_path, capsys
):
    now = itertools.count(0.0, 6.0)
    monkeypatch.setattr(evaluate.time, "monotonic", lambda: next(now))
    monkeypatch.setattr(evaluate, "ABREAST", 1)
    given = {"checkpoint": tiny_checkpoint, "env": "plays", "videos": tmp_path, "episodes": 5}
    evaluate.main(EvaluateConfig(**given))
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("played")]
    assert said == [
        "played 2 of 5 episodes, 2 succeeded",
        "played 4 of 5 episodes, 4 succeeded",
    ]


def test_a_first_beginning_that_is_unstable_costs_its_own_episode_alone(
    plays, monkeypatch, tiny_checkpoint, tmp_path, capsys
):
    """The simulator is tried by what the first episode begins with, whichever that is."""
    reset = Plays.reset
    begun = []

    def breaks(self, task, seed):
        reset(self, task, seed)
        begun.append((task, seed))
        if begun[0] == (task, seed):
            raise FloatingPointError("unstable")

    monkeypatch.setattr(Plays, "reset", breaks)
    monkeypatch.setattr(Plays, "step", lambda self, action: Step(0.0, True))
    chosen = [(1, 3), (0, 0), (1, 0)]
    config = EvaluateConfig(checkpoint=tiny_checkpoint, env="plays", videos=tmp_path)
    player = evaluate.Player(config, evaluate.settings_of(config), ())
    part = evaluate.Part("", player.spec)
    ended = [episode for batch in player.play(part, chosen, 100) for episode in batch]
    assert begun[:2] == [(1, 107), (1, 107)]
    assert [episode.success for episode in ended] == [False, True, True]


def test_trouble_with_videos_is_a_warning(plays, tiny_checkpoint, tmp_path, capsys):
    (tmp_path / "a.mp4").mkdir()
    given = {"checkpoint": tiny_checkpoint, "env": "plays", "episodes": 2, "videos": tmp_path}
    evaluate.main(EvaluateConfig(**given, json=tmp_path / "result.json"))
    said = capsys.readouterr()
    warned = f"warning: cannot write the film {tmp_path / 'a.mp4'}"
    assert "2/2" in said.out and said.err.startswith(warned) and said.err.count("\n") == 1
    assert "2" in (tmp_path / "result.json").read_text() and (tmp_path / "b.mp4").is_file()


def test_films_are_written_as_episodes_end(plays, monkeypatch, tiny_checkpoint, tmp_path):
    """Frames of all tasks of a large suite would fill memory."""
    monkeypatch.setattr(evaluate, "ABREAST", 1)
    counted = []

    def rows_of(part, episodes):
        """The film of an episode is written before the next one has ended."""
        counted.append(len(episodes))
        assert not any(episode.frames for episode in episodes[:-1])
        assert len(list(tmp_path.glob("[ab].mp4"))) == len(episodes) - 1
        return []

    monkeypatch.setattr(evaluate, "rows_of", rows_of)
    given = {"checkpoint": tiny_checkpoint, "env": "plays", "episodes": 2, "videos": tmp_path}
    evaluate.main(EvaluateConfig(**given))
    assert counted == [1, 2] and len(list(tmp_path.glob("[ab].mp4"))) == 2


@pytest.mark.parametrize(
    "change, words",
    [
        ({"episodes": 0}, "at least 1"),
        ({"chunk": 7}, "has chunk = 10 and the run asks for 7"),
        ({"statistics": "nonsense"}, "--statistics nonsense is for another project's"),
        ({"tasks": ("juggle",)}, "juggle"),
        ({"family": "emulated"}, "emulated"),
    ],
)
def test_mistakes(tiny_checkpoint, tmp_path, change, words):
    config = EvaluateConfig(checkpoint=tiny_checkpoint, episodes=1, videos=tmp_path)
    if "family" in change:  # what a run with --model emulated saves
        config.checkpoint = tmp_path / "emulated.safetensors"
        checkpoint.save(
            config.checkpoint,
            checkpoint.Header("emulated", {}, STATS),
            {"action": torch.zeros(10, 4)},
        )
    else:
        for name, value in change.items():
            setattr(config, name, value)
    with pytest.raises(UserError, match=words):
        evaluate.main(config)


def test_another_project_s_checkpoint_needs_its_family_and_a_robot_it_knows(tmp_path):
    folder = published("pi05", "openpi", tmp_path / "published")
    with pytest.raises(UserError, match="say with --model of which family"):
        evaluate.main(EvaluateConfig(checkpoint=folder))
    with pytest.raises(UserError, match="is a 'pi05' model"):
        evaluate.main(EvaluateConfig(checkpoint=folder, model="pi0", chunk=4))
    with pytest.raises(UserError, match="8 dimensions of state, the simulator has 4"):
        evaluate.main(EvaluateConfig(checkpoint=folder, model="pi05", chunk=4, statistics="droid"))
