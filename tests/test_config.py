"""Presets, what must hold between settings, and settings that survive a run folder."""

import json
import math
import os
from dataclasses import fields
from pathlib import Path
from typing import Annotated, get_args

import pytest

import evaluate
import pretrain
from checks import Bound, flag_of
from command_line import parse
from config import (
    ROOT,
    STAGE_OF,
    ActorConfig,
    AlgorithmConfig,
    Config,
    Only,
    RunConfig,
    completed,
    expanded,
    from_json,
    from_preset,
    run_path,
    setting,
    to_json,
)
from errors import UserError, exit_on_user_error
from evaluate import EvaluateConfig
from pretrain import PretrainConfig
from validation import validate


def valid(**changes) -> Config:
    """Worker counts and sizes as in the tests below, and changes given as stage__name=value."""
    config = Config()
    config.env.env_workers = 3
    config.rollout.rollout_workers = 1
    config.actor.actor_workers = 1
    config.env.envs = 24
    config.actor.batch = 48
    config.actor.minibatch = 12
    config.actor.micro_batch = 2
    for name, value in changes.items():
        stage, name = name.split("__")
        setattr(getattr(config, stage), name, value)
    return config


def test_another_preset_of_a_resumed_run_is_in_force(tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints" / "000001").mkdir(parents=True)
    saved = completed(from_preset("full"), max_staleness=3, env_workers=5, workers_given=(0, 0, 0))
    (run / "config.json").write_text(to_json(saved))
    for flags, wanted in (
        ("", ("full", 3, True)),
        ("--preset full", ("full", 3, True)),  # as the command that began it had
        ("--preset sync-colocated", ("sync-colocated", 0, False)),
        ("--preset sync-colocated --max-staleness 2", ("sync-colocated", 2, False)),
    ):
        found = parse(["--resume", str(run), *flags.split()])
        stream = found.actor.stream
        assert (found.train.preset, found.actor.max_staleness, stream) == wanted
        assert found.env.env_workers == (5 if "sync" not in flags else 0)


def test_presets_are_the_rows_of_table_1():
    lockstep = ("all", math.inf)
    dynamic = ("auto", "auto")
    rows = {
        "sync-colocated": ("colocated", 0, *lockstep, False),
        "sync-disaggregated": ("disaggregated", 0, *lockstep, False),
        "train-async": ("disaggregated", 1, *lockstep, False),
        "rollout-async": ("disaggregated", 1, *dynamic, False),
        "full": ("disaggregated", 1, *dynamic, True),
        "full-colocated": ("colocated", 1, *dynamic, True),  # of the second version
    }
    for name, row in rows.items():
        config = from_preset(name)
        rollout = config.rollout
        actor = config.actor
        found = (
            config.train.placement,
            actor.max_staleness,
            rollout.batch_max,
            rollout.batch_wait_ms,
            actor.stream,
        )
        assert found == row and config.train.preset == name
    assert to_json(from_preset("full")) == to_json(
        Config()
    )  # the defaults written in the dataclasses


def test_what_is_valid():
    validate(valid())
    for most in ("all", 24, 7, 25, "auto"):  # rollout workers wait for no more than can ask
        validate(valid(rollout__batch_wait_ms=math.inf, rollout__batch_max=most))


@pytest.mark.parametrize(
    "change, words",
    [
        ({"actor__batch": 50}, "--batch 50 is not divisible by --envs"),
        ({"actor__minibatch": 49}, "--minibatch 49 is larger than --batch 48"),
        ({"actor__minibatch": 1, "actor__actor_workers": 2}, "--minibatch 1 cannot give each of 2"),
        ({"actor__actor_workers": 13}, "--minibatch 12 cannot give each of 13 actor workers"),
        ({"actor__train_vlm": True, "actor__cache_prefix": "gpu"}, "leave it out with --train-vlm"),
        ({"train__iterations": 0}, "--iterations 0 must be at least 1"),
        ({"env__envs": 0}, "--envs 0"),
        ({"actor__batch": -48}, "--batch -48"),
        ({"actor__micro_batch": 0}, "--micro-batch 0"),
        ({"actor__update_epochs": 0}, "--update-epochs 0"),
        ({"rollout__chunk": 0}, "--chunk 0"),
        ({"rollout__tokens": 0}, "--tokens 0"),
        ({"actor__lr": -1.0}, "--lr -1.0 must be more than 0"),
        ({"algorithm__gamma": 2.0}, "--gamma 2.0 must be at most 1"),
        ({"rollout__noise_level": 0.0}, "--noise-level 0.0 must be more than 0"),
        (
            {"actor__train_vlm": True, "rollout__prefix_dtype": "bfloat16"},
            "--prefix-dtype bfloat16 is for a frozen VLM",
        ),
        ({"rollout__temperature": 1.6}, "--temperature means something to oft, not to pi05"),
        (
            {"train__model": "oft", "actor__cache_prefix": False},
            "--cache-prefix means something to pi0, pi05, gr00t, not to oft",
        ),
        (
            {"train__model": "gr00t", "rollout__noise": "network"},
            "--noise means something to pi0, pi05, not to gr00t",
        ),
        ({"rollout__denoise_steps": 0}, "--denoise-steps 0"),
        ({"train__checkpoint_every": 0}, "--checkpoint-every 0"),
        ({"train__timeout_s": 0.0}, "--timeout-s 0"),
        ({"train__seed": -1}, "--seed -1"),
        ({"actor__max_staleness": -1}, "--max-staleness -1"),
        ({"actor__extra_staleness": -1}, "--extra-staleness -1"),
        ({"actor__extra_staleness": 1}, "add --eval-every 0"),
        ({"rollout__batch_max": 0}, "--batch-max 0"),
        ({"rollout__batch_wait_ms": -1.0}, "--batch-wait-ms -1"),
        ({"rollout__batch_wait_ms": math.nan}, "--batch-wait-ms nan"),
        ({"env__env_workers": 25}, "25 env workers have only 24 envs"),
        ({"rollout__rollout_workers": 25}, "25 rollout workers have only 24 lanes"),
        ({"env__lanes": -1}, "--lanes -1 must be at least 0"),
        (
            {"env__lanes": 5},
            "--envs 24 cannot be split evenly into 5 lanes of each of 3 env workers",
        ),
        (
            {"env__lanes": 1, "actor__actor_workers": 2},
            "cannot give each of 2 actor workers a lane of 8 trajectories",
        ),  # a lane goes to one rank
        (
            {"train__algorithm": "grpo", "algorithm__bootstrap_truncated": True},
            "--bootstrap-truncated needs a critic",
        ),
        ({"actor__warmup": -1}, "--warmup -1 must be at least 0"),
        ({"algorithm__huber": 0.0}, "--huber 0.0 must be more than 0"),
        ({"algorithm__advantage_memory": 1.0}, "--advantage-memory 1.0 must be less than 1"),
        ({"algorithm__value_clip": -1.0}, "--value-clip -1.0 must be more than 0"),
        ({"algorithm__behaviour_weight_max": 0.0}, "--behaviour-weight-max 0.0"),
        (
            {"algorithm__behaviour_weight": "m2po", "algorithm__behaviour_weight_max": 2.0},
            "--behaviour-weight-max 2.0 means nothing to --behaviour-weight m2po: leave it out",
        ),
        (
            {"algorithm__behaviour_weight_min": 0.5},
            "--behaviour-weight-min 0.5 means nothing to --behaviour-weight mask: leave it out",
        ),
        ({"algorithm__behaviour_trust": 0.5}, "--behaviour-trust 0.5 means nothing"),
        (
            {"algorithm__behaviour_weight_max": 0.9},
            "--behaviour-weight-max 0.9 is below 1, the weight of fresh samples: give 1 or more",
        ),
        (
            {
                "algorithm__behaviour_weight": "icepop",
                "algorithm__behaviour_weight_min": 1.0,
                "algorithm__behaviour_weight_max": 1.0,
            },
            "--behaviour-weight-min 1.0 must be below the largest, 1.0",
        ),
        (
            {"algorithm__behaviour_weight": "icepop", "algorithm__proximal": "behaviour"},
            "no effect with --proximal behaviour, where w is 1: leave one of them out",
        ),
        (
            {"algorithm__behaviour_weight": "gipo", "algorithm__proximal": "exact"},
            "--behaviour-weight gipo has no proximal policy: leave out --proximal exact",
        ),
        (
            {"algorithm__behaviour_weight": "kpop"},
            "compares probabilities of tokens, and this model's actions have densities",
        ),
        (
            {"train__model": "oft", "algorithm__behaviour_weight": "kpop"},
            "and --granularity chunk is of several, .*: give --granularity token",
        ),
        (
            {"algorithm__behaviour_weight": "gipo", "algorithm__dual_clip": 3.0},
            "--behaviour-weight gipo has no clip: leave out --dual-clip 3.0",
        ),
        ({"algorithm__kl_stop": -1.0}, "--kl-stop -1.0"),
        ({"train__timeout_s": math.inf}, "--timeout-s inf must be at most 1000000"),
        ({"train__seed": 2**64}, "--seed 18446744073709551616 must be at most"),
        ({"actor__lr": math.inf}, "--lr inf must be at most"),
        (
            {"train__algorithm": "grpo", "algorithm__huber": 1.0},
            "--huber needs a critic, unlike grpo: leave it out",
        ),
        ({"algorithm__group_size": 4}, "--group-size needs groups of trajectories, unlike ppo"),
        ({"env__segment": -1}, "--segment"),
        ({"env__eval_every": -1}, "--eval-every"),
    ],
)
def test_contradictions_are_named(change, words):
    with pytest.raises(UserError, match=words) as error:
        validate(valid(**change))
    assert "\n" not in str(error.value)


def test_every_number_has_a_range_and_none_takes_nan():
    for name, stage in STAGE_OF.items():
        value = setting(Config(), name)
        kind = type(getattr(Config(), stage)).__dataclass_fields__[name].type
        if isinstance(value, bool | tuple) or not {int, float} & {kind, *parts(kind)}:
            continue
        with pytest.raises(UserError, match=f"{flag_of(name)} nan must be"):
            validate(completed(Config(), **{name: math.nan}))


def parts(kind) -> set:
    """The types that a type is made of."""
    inner = [part for part in get_args(kind) if isinstance(part, type) or get_args(part)]
    return {*inner}.union(*map(parts, inner))


def test_a_fork_says_who_knows_its_flag(monkeypatch):
    config = valid(algorithm__clip_low=0.1)
    field = AlgorithmConfig.__dataclass_fields__["clip_low"]
    monkeypatch.setattr(field, "type", Annotated[Bound, Only(("mine",))])
    with pytest.raises(UserError, match="--clip-low means something to mine, not to pi05 with ppo"):
        validate(config)
    monkeypatch.setattr(field, "type", Annotated[Bound, Only(("ppo",))])
    validate(config)


def test_a_run_s_name_may_end_in_a_slash_or_begin_at_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    assert run_path("small/") == run_path("small") == ROOT / "runs" / "small"
    assert run_path("~/x") == Path("/home/somebody/x")


def test_every_path_of_a_flag_may_begin_at_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    given = EvaluateConfig(checkpoint=Path("~/x"), json=Path("~no_such_user/y"), videos=Path("z/~"))
    found = expanded(given)
    assert found.checkpoint == Path("/home/somebody/x") and given.checkpoint == Path("~/x")
    assert (found.json, found.videos, found.tokenizer) == (given.json, given.videos, None)
    for file in map(ROOT.joinpath, ("evaluate.py", "pretrain.py", "plan.py", "bench.py")):
        assert "main(expanded(tyro.cli(" in file.read_text()


@pytest.mark.parametrize(
    "config",
    [
        PretrainConfig(seed=-1),
        PretrainConfig(action_noise=-1.0),
        PretrainConfig(lr=math.nan),
        PretrainConfig(batch=63),
        PretrainConfig(pace=1.5),
        EvaluateConfig(tokens=-1),
        EvaluateConfig(tokens=10**7),
        EvaluateConfig(image_size=-5),
        EvaluateConfig(episodes=10**13),
        EvaluateConfig(chunk=0),
    ],
    ids=str,
)
def test_every_program_s_flags_have_ranges(config):
    program = pretrain if isinstance(config, PretrainConfig) else evaluate
    with pytest.raises(UserError, match="^--[a-z-]+ .* must be") as error:
        program.main(config)
    assert "\n" not in str(error.value)


def test_a_path_that_cannot_be_used_is_one_line_and_status_2(capsys):
    with pytest.raises(SystemExit) as stop, exit_on_user_error():
        os.stat("x" * 300)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and "File name too long" in said and said.count("\n") == 1
    with pytest.raises(FileNotFoundError), exit_on_user_error():  # a fault of ours
        os.stat("/nowhere/at/all")


def test_saved_settings_come_back(tmp_path):
    config = from_preset("train-async")  # with an infinite wait, paths and a tuple
    config.train.tasks = ("push", "reach")
    config.train.run = "inf"  # a name
    config.actor.grad_clip = config.rollout.temperature = math.inf
    (tmp_path / "config.json").write_text(to_json(config))
    again = from_json(tmp_path / "config.json")
    assert (
        again == config
        and isinstance(again.train.tasks, tuple)
        and again.rollout.batch_wait_ms == math.inf
    )


@pytest.mark.parametrize(
    "text",
    [
        None,
        "{",
        "[]",
        "null",
        "[" * 100_000,
        '{"a":' * 100_000,
        '{"train": {"no_such_setting": 1}}',
        '{"no_such_stage": {}}',
        '{"train": null}',
        '{"env": {"envs": "many"}}',
        '{"env": {"envs": true}}',
        '{"env": {"envs": 0}}',
        '{"env": {"envs": 2.5}}',
        '{"actor": {"lr": NaN}}',
        '{"actor": {"lr": 1e999}}',
        '{"actor": {"lr": 1' + "0" * 400 + "}}",
        '{"actor": {"stream": "yes"}}',
        '{"train": {"preset": "fast"}}',
        '{"train": {"tasks": [1]}}',
        '{"train": {"checkpoint": 3}}',
        '{"rollout": {"batch_max": "some"}}',
    ],
)
def test_unreadable_settings(tmp_path, text):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match="cannot read the settings") as error:
        from_json(tmp_path / "config.json")
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_settings_are_json_objects_by_stage():
    saved = json.loads(to_json(Config()))
    assert list(saved) == ["train", "env", "rollout", "actor", "algorithm"]
    assert set(saved["actor"]) == {field.name for field in fields(ActorConfig)}
    assert set(saved["train"]) == {field.name for field in fields(RunConfig)}


def test_a_user_s_mistake_is_one_line_and_status_2(capsys):
    with pytest.raises(SystemExit) as stop, exit_on_user_error():
        raise UserError("that cannot be: do this")
    assert stop.value.code == 2 and capsys.readouterr() == ("", "error: that cannot be: do this\n")


@pytest.mark.parametrize(
    "staleness, extra, exact",
    [(0, 0, False), (2, 0, False), (1, 1, False), (3, 0, True), (1, 2, True)],
)
def test_old_samples_get_the_exact_proximal_policy_unless_another_is_asked_for(
    staleness, extra, exact
):
    config = Config()
    config.actor.max_staleness = staleness
    config.actor.extra_staleness = extra
    assert config.exact_proximal == exact
    for proximal in ("interpolated", "exact", "behaviour"):
        config.algorithm.proximal = proximal
        assert config.exact_proximal == (proximal == "exact")


@pytest.mark.parametrize("ranks, envs, minibatch", [(16, 24, 1), (13, 24, 12), (5, 48, 2)])
def test_the_minibatch_that_is_advised_is_accepted(ranks, envs, minibatch):
    config = Config()
    config.env.env_workers = config.rollout.rollout_workers = 1
    config.env.envs = envs
    config.actor.actor_workers = ranks
    config.actor.minibatch = minibatch
    with pytest.raises(UserError, match="--minibatch") as error:
        validate(config)
    config.actor.minibatch = int(str(error.value).rpartition(" ")[2])
    validate(config)


def test_a_micro_batch_of_an_older_run_was_of_trajectories(tmp_path):
    stages = json.loads(to_json(valid()))
    file = tmp_path / "config.json"
    file.write_text(json.dumps(stages))
    assert from_json(file).actor.micro_batch == 2
    del stages["actor"]["checkpointing"]
    stages["actor"]["cache_prefix"] = False
    file.write_text(json.dumps(stages))
    older = from_json(file)
    assert older.actor.micro_batch == "auto" and older.actor.cache_prefix == "off"


@pytest.mark.parametrize("most, read", [(5.0, None), (2.0, 2.0)])
def test_a_largest_weight_that_an_older_run_had_by_default_is_nobody_s_wish(tmp_path, most, read):
    """So the run goes on with a correction that has no such bound."""
    stages = json.loads(to_json(valid(algorithm__behaviour_weight_max=most)))
    file = tmp_path / "config.json"
    file.write_text(json.dumps(stages))
    assert from_json(file).algorithm.behaviour_weight_max == most  # it was given
    for newer in ("behaviour_weight", "behaviour_weight_min", "behaviour_trust"):
        del stages["algorithm"][newer]
    file.write_text(json.dumps(stages))
    older = from_json(file)
    assert older.algorithm.behaviour_weight_max == read
    if read is None:
        older.algorithm.behaviour_weight = "m2po"
    validate(older)
