"""What flags become on this machine, before anything starts."""

import json
import math
import shutil
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import LINE
from safetensors.torch import load_file, save_file

import models
import prepare
import start
import train
from benchmarks.emulated import libero
from config import Config, completed, embedded_files, to_json
from envs import EnvSpec
from errors import UserError
from memory import Room, Table
from models import checkpoint
from run_folder import read_metrics
from validation import validate

QUICK = "--model emulated --env emulated --image-size 8 --envs 8 --batch 16 --minibatch 8"


def settings(*flags: str):
    return train.parse([*QUICK.split(), *flags])


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.parametrize(
    "flags",
    ["--ratio auto --env-workers 2", "--env vectorised --env-workers 2", "--segment 4"],
)
def test_the_settings_that_are_given_stay_as_they_are(flags):
    config = settings(*flags.split())
    before = to_json(config)
    complete = prepare.prepare(config).config
    assert to_json(config) == before
    assert complete.env.env_workers > 0 and complete.rollout.rollout_workers > 0
    assert complete.actor.actor_workers > 0 and complete.env.segment > 0


def test_a_completed_copy_shares_nothing():
    config = settings()
    config.train.workers_given = (1, 0, 0)  # no flag, so easily lost
    copied = completed(config, envs=16, seed=5)
    assert (copied.env.envs, copied.train.seed, copied.train.workers_given) == (16, 5, (1, 0, 0))
    copied.actor.batch = 1
    assert (config.env.envs, config.train.seed, config.actor.batch) == (8, 1, 16)


def test_a_checkpoint_is_shipped_for_one_simulator():
    for family in ("pi0", "pi05", "gr00t", "oft"):
        assert embedded_files(family, "metaworld")[0].is_file()
        assert not embedded_files(family, "emulated")[0].exists()
    assert embedded_files("oft", "metaworld")[1] != embedded_files("pi05", "metaworld")[1]


def test_a_new_simulator_starts_from_random_weights(monkeypatch, tmp_path):
    """Even one with Meta-World's four actions that says nothing of its states."""
    monkeypatch.setattr(start, "ROOT", tmp_path)
    like_metaworld = EnvSpec(("reach",), ("reach",), 1, 64, 4, 4, 100)
    monkeypatch.setattr(libero, "spec", lambda tasks, image_size: like_metaworld)
    flags = "--model pi05 --env emulated --envs 8 --batch 16 --minibatch 8"
    setup = prepare.prepare(train.parse(flags.split()))
    assert setup.config.train.checkpoint.parent == tmp_path / "runs"
    assert setup.config.train.checkpoint.name.startswith("untrained_pi05_")
    said = "no checkpoint is given and none shipped for emulated: a small pi05 of random weights"
    assert said in setup.note

    shipped = embedded_files("pi05", "metaworld")[0]
    named = prepare.prepare(train.parse([*flags.split(), "--checkpoint", str(shipped)]))
    assert named.config.train.checkpoint == shipped and "random weights" not in named.note


@pytest.mark.parametrize("where", ["observation_fields", "slot_fields"])
@pytest.mark.parametrize("name", ["task", "version", "env", "final", "actions", "image"])
def test_a_field_may_not_have_the_name_of_another(monkeypatch, where, name):
    family = models.load("emulated")
    fields = getattr(family.Emulated, where)
    if name == "image" and where == "observation_fields":
        name = "reward"
    extra = {name: ((2,), torch.float32)}
    monkeypatch.setattr(family.Emulated, where, lambda model: fields(model) | extra)
    with pytest.raises(UserError, match=f"calls a slot field '{name}', which is taken: rename it"):
        prepare.prepare(settings("--bootstrap-truncated"))  # whose loss has "final"


def test_a_model_trains_on_fields_that_slots_have(monkeypatch):
    family = models.load("emulated")
    monkeypatch.setattr(family.Emulated, "training_fields", lambda model: ("picutre",))
    with pytest.raises(UserError, match="trains on 'picutre', which is no field of a slot"):
        prepare.prepare(settings())


def test_the_flags_of_a_run_that_starts_again():
    own = ["--run", "x", "--resume=y", "--ratio_from", "1:2"]
    others = ["--ratio", "auto", "--tasks", "a", "b", "--seed=3", "--no-trace"]
    for given in ([*own, *others], [*others, *own]):
        assert train.without(given, "--run", "--resume", "--ratio-from") == others


def test_a_run_that_starts_again_goes_on_from_its_own_checkpoint(monkeypatch):
    given = ["--ratio", "auto", "--checkpoint", "x", "--adapter=y", "--run", "one"]
    started = []
    monkeypatch.setattr(sys, "argv", ["train.py", *given])
    monkeypatch.setattr(train.processes, "keep_interrupts", lambda *_: 0)
    monkeypatch.setattr(train.processes, "replace_this_process", started.append)
    folder = SimpleNamespace(appended=None, write=lambda *_: None)
    nodes = SimpleNamespace(several=False, run="one")
    train.start_again("1:1", folder, nodes, train.tuning.Past(), (), None)
    assert started == [["--ratio", "auto", "--resume", "one", "--ratio-from", "1:1"]]


def test_a_longer_run_says_that_its_learning_rate_rises():
    before = settings("--iterations", "60")
    longer = settings("--iterations", "120")
    jump = train.rate_jump(before, longer, 60)
    assert jump.startswith("learning rates rise from 3% to 100% of --lr") and "\n" not in jump
    assert train.rate_jump(before, before, 40) == "" == train.rate_jump(before, longer, 20)
    assert train.rate_jump(before, settings("--iterations", "61"), 60) == ""
    assert train.rate_jump(before, before, 2) == ""  # it warms up


def test_slots_that_do_not_fit_the_machine_are_refused(monkeypatch):
    flags = ["--envs", "1000000", "--batch", "1000000", "--minibatch", "1000000"]
    monkeypatch.setattr(prepare.machine, "memory", lambda: 8 * 10**9)
    with pytest.raises(UserError, match="host needs .* slots .* and has 8.0 GB"):
        prepare.prepare(settings(*flags))
    prepare.prepare(settings(*flags, "--memory-report"))  # which only says so
    with pytest.raises(UserError, match="host needs .* slots .* lower --envs, --eval-envs"):
        prepare.prepare(settings("--eval-envs", "1000000"))


def test_slots_lie_near_the_gpu_whose_rollout_worker_serves_them(monkeypatch):
    setup = prepare.prepare(settings("--max-staleness", "0", "--eval-envs", "2"))
    two = replace(setup.placement, rollout_devices=("cuda:0", "cuda:1"))
    monkeypatch.setattr(prepare.machine, "near", lambda device: device)
    monkeypatch.setattr(prepare, "SlotPool", lambda *arguments: arguments)
    *_, near = replace(setup, placement=two).pool()
    served = [f"cuda:{slot % 8 % 2}" for slot in range(16)]  # 8 lanes, 2 rounds of them
    assert near[:16] == served and len(near) == 18


def test_env_workers_stay_near_their_gpus_only_where_no_cores_are_left_out(monkeypatch):
    setup = prepare.prepare(settings())
    near = {"cpu": {0, 1, 2, 3}, "cuda:0": {0, 1}, "cuda:1": {2, 3}, "cuda:2": {2, 3}}
    monkeypatch.setattr(prepare.machine, "near", lambda device: frozenset(near[device]))

    def cores(stage: str, *devices: str) -> list[set[int]]:
        placement = replace(setup.placement, **{f"{stage}_devices": devices})
        return [set(found) for found in replace(setup, placement=placement).cores(stage)]

    assert cores("env", "cuda:0", "cuda:1", "cuda:0") == [{0, 1}, {2, 3}, {0, 1}]
    assert cores("env", "cuda:1", "cuda:2") == [{0, 1, 2, 3}] * 2
    assert cores("rollout", "cuda:1", "cuda:2") == [{2, 3}] * 2
    assert cores("env", "cpu", "cpu") == [{0, 1, 2, 3}] * 2


def test_everybody_s_threads_cores_and_node_are_said(monkeypatch):
    setup = prepare.prepare(settings())
    near = {"cpu": {0, 1, 2, 3}, "cuda:0": {0, 1}, "cuda:1": {2, 3}}
    monkeypatch.setattr(prepare.machine, "near", lambda device: frozenset(near[device]))
    gpus = ("cuda:0", "cuda:1")
    changes = {"env_devices": gpus * 2, "rollout_devices": gpus, "actor_devices": gpus[:1]}
    changes |= {"rollout_threads": 2, "actor_threads": 2, "line": "so"}
    monkeypatch.setattr(train.memory, "table_of", lambda *_: None)
    monkeypatch.setattr(train.memory, "pools", lambda *_: "")
    monkeypatch.setattr(train.machine, "where", lambda cores: f"cores {sorted(cores)}")
    said = train.where(replace(setup, placement=replace(setup.placement, **changes)))
    assert said.splitlines() == [
        "so",
        "actor 0, rollout 0: 2 threads on cores [0, 1]; rollout 1: 2 threads on cores [2, 3]; "
        "env 0, 2: 1 thread on cores [0, 1]; env 1, 3: 1 thread on cores [2, 3]",
    ]


class Simulator:
    """What `find_workers` asks of one."""

    def __init__(self, vectorised: bool):
        self.vectorised = vectorised

    def workers(self, ratio, placement):
        return None


@pytest.mark.parametrize("gpus", range(1, 9))
@pytest.mark.parametrize("placement", ["disaggregated", "hybrid", "colocated"])
@pytest.mark.parametrize("algorithm, vectorised", [("ppo", False), ("grpo", False), ("ppo", True)])
def test_the_default_settings_run_on_any_number_of_gpus(algorithm, vectorised, placement, gpus):
    room = Room(gpus, gpu=80e9, host=1e12, cores=16)
    given = completed(Config(), placement=placement, algorithm=algorithm)
    config, placed, _, note = prepare.find_workers(given, Simulator(vectorised), room)
    validate(config)
    used = {*placed.env_devices, *placed.rollout_devices, *placed.actor_devices}
    idle = {f"cuda:{i}" for i in range(gpus)} - used
    assert not idle or placement == "hybrid" and vectorised
    assert ", ".join(sorted(idle)) in placed.line and "\n" not in placed.line
    assert ("nearest" in placed.line) == (placement != "colocated" and gpus not in (4, 8))
    assert (config.actor.minibatch > given.actor.minibatch) == ("--minibatch 24 is" in note)
    # Its settings are taken as they are when the run goes on.
    assert prepare.find_workers(config, Simulator(vectorised), room)[:2] == (config, placed)


def test_worker_counts_that_are_given_stay_on_gpus():
    room = Room(8, gpu=80e9, host=1e12, cores=16)
    given = completed(Config(), env_workers=5, lanes=2, placement="colocated")
    with pytest.raises(UserError, match="--envs 24 cannot be split evenly"):
        validate(prepare.find_workers(given, Simulator(True), room)[0])
    given = completed(Config(), actor_workers=3, rollout_workers=2, placement="colocated")
    found = prepare.find_workers(given, Simulator(False), room)[0]
    assert (found.actor.actor_workers, found.rollout.rollout_workers) == (3, 2)


def test_copies_of_trained_weights_count_as_memory():
    """12 bytes a weight while a checkpoint is written; as many where a batch has several steps."""
    several = prepare.prepare(settings())
    once = prepare.prepare(settings("--update-epochs", "1", "--minibatch", "16"))
    assert several.config.actor.steps > once.config.actor.steps == 1
    actors = [
        row
        for setup in (several, once)
        for row in Table(setup, setup.room, 0.0).rows.values()
        if row.process == "actor-0"
    ]
    weights = sum(math.prod(shape) for shape, _ in several.weights.values())
    assert actors[0].total - actors[1].total == pytest.approx(12 * weights, rel=0.01)


def test_a_checkout_that_nobody_may_write_needs_a_run_elsewhere(monkeypatch):
    monkeypatch.setattr(start.os, "access", lambda *_: False)
    config = train.parse(["--env", "libero", "--envs", "8", "--batch", "16", "--minibatch", "8"])
    with pytest.raises(UserError, match="cannot write .*: give --run PATH, where you may write"):
        start.find_start(config, prepare.envs.load("emulated"))


def test_statistics_are_for_another_project_s_checkpoint():
    flags = "--envs 8 --batch 16 --minibatch 8 --statistics nonsense"
    with pytest.raises(UserError, match="--statistics nonsense is for another project's"):
        prepare.prepare(train.parse(flags.split()))


GOOD = {"version": 3, "seed": 1, "settings": {}, "scale": {}}


@pytest.mark.parametrize(
    "state",
    [
        "",
        "[]",
        "[" * 100_000,
        GOOD | {"version": -1},
        GOOD | {"version": 4},
        GOOD | {"version": "3"},
        GOOD | {"version": 3.0},
        GOOD | {"scale": [1]},
        GOOD | {"scale": {"x": float("nan")}},
        GOOD | {"settings": {"nonsense": 1}},
        GOOD | {"settings": None},
        GOOD | {"more": 1},
        GOOD | {"lines": {}},
        GOOD | {"lines": [None]},
        GOOD | {"lines": [{"version": "3"}]},
        {},
    ],
    ids=lambda state: str(state)[:40],
)
def test_a_state_that_no_run_wrote_is_refused(tmp_path, state):
    folder = tmp_path / "run/checkpoints/000003"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").touch()
    text = state if isinstance(state, str) else json.dumps(state)
    (folder / "state.json").write_text(text)
    config = completed(Config(), resume=str(tmp_path / "run"))
    with pytest.raises(
        UserError, match=r"state.json \(remove .*000003 to use an older one\): "
    ) as error:
        start.resume_from(config)
    assert "\n" not in str(error.value)
    (folder / "state.json").write_text(json.dumps(GOOD))
    assert start.resume_from(config) == (folder, GOOD | {"lines": []})
    largest = GOOD | {"seed": 2**63 - 1}  # that --seed takes
    (folder / "state.json").write_text(json.dumps(largest))
    assert start.resume_from(config)[1]["seed"] == largest["seed"]


def test_what_is_met_and_held_out_stays_so_on_resuming(tmp_path):
    folder = tmp_path / "run/checkpoints/000003"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").touch()
    split = {"train_states": "0-39", "eval_states": "40-49"}
    config = completed(Config(), resume=str(tmp_path / "run"), **split)
    other = completed(config, train_states="30-49")
    split |= {"env": "metaworld", "tasks": []}
    for before, flag, was, refused in (
        (split, "train-states", "0-39", other),
        (split, "eval-states", "40-49", completed(config, eval_states="0-29")),
        (split | {"train_states": ""}, "train-states", "not given", config),
        (split, "env", "metaworld", completed(config, env="libero")),
        (split, "tasks", "not given", completed(config, tasks=("MT10",))),
        (split | {"tasks": ["a", "b"]}, "tasks", "a b", completed(config, tasks=("b", "a"))),
    ):
        (folder / "state.json").write_text(json.dumps(GOOD | {"settings": before}))
        with pytest.raises(UserError, match=f"--{flag} was {was} when run .* cannot change"):
            start.resume_from(refused)
    (folder / "state.json").write_text(json.dumps(GOOD | {"settings": split}))
    assert start.resume_from(config)[0] == folder
    (folder / "state.json").write_text(json.dumps(GOOD))  # as of before there were splits
    assert start.resume_from(other)[0] == folder


def lack(weights, meta):
    del weights["action_out_proj.bias"]


def spoil(weights, meta):
    weights["action_out_proj.bias"][0] = float("nan")


@pytest.mark.parametrize(
    "damage, words",
    [
        (lack, "has no tensor 'action_out_proj.bias'"),
        (spoil, "tensor 'action_out_proj.bias' holds NaN"),
        (lambda weights, meta: meta.update(shape="null"), "cannot read the header"),
        (lambda weights, meta: meta.update(family="nobody"), "its family 'nobody' is none of"),
        (lambda weights, meta: meta.clear(), "was not written by this project"),
        (None, "has no model.safetensors"),
    ],
)
def test_a_resumed_checkpoint_that_cannot_be_read_leads_to_the_older_one(
    tmp_path, tiny_checkpoint, damage, words
):
    for version in ("000002", "000003"):
        folder = tmp_path / "run/checkpoints" / version
        folder.mkdir(parents=True)
        (folder / "state.json").write_text(json.dumps(GOOD))
        shutil.copy(tiny_checkpoint, folder / "model.safetensors")
    file = folder / "model.safetensors"
    if damage:
        weights = load_file(file)
        meta = checkpoint.header(file)[1]
        damage(weights, meta)
        save_file(weights, file, meta)
    else:
        file.unlink()
    flags = ["--envs", "8", "--batch", "16", "--minibatch", "8", "--checkpoint", tiny_checkpoint]
    config = completed(train.parse([*map(str, flags)]), resume=str(tmp_path / "run"))
    with pytest.raises(UserError, match=f"({words}).*; remove {folder} to use an older") as error:
        prepare.prepare(config)
    assert "\n" not in str(error.value)


def with_line(**changes) -> bytes:
    return json.dumps(LINE | changes).encode() + b"\n"


@pytest.mark.parametrize(
    "line",
    [
        b"\n",
        b"null\n",
        b"\xff\xfe\n",
        b"{\n",
        b"[" * 100_000 + b"\n",
        b"{}\n",
        b'{"version": 1}\n',
        with_line(version="three"),
        with_line(version=math.nan),
        with_line(version=2.0),
        with_line(time=None),
        with_line(collected="x"),
        with_line(restarts=-1),
        with_line(discarded_by=3),
        with_line(discarded_by={"restart": "x"}),
        with_line(success_rate="high"),
        with_line(eval_version=None),
        with_line(grad_norm="x"),
        with_line(approx_kl={"a": 1}),
        with_line(trajectories_per_task={"push": "x"}),
    ],
    ids=lambda line: line[:60].decode(errors="replace"),
)
def test_a_line_of_metrics_that_no_run_wrote_is_named(tmp_path, line):
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(with_line() + line + with_line(version=2) + b'{"vers')
    with pytest.raises(UserError, match="line 2 of .*metrics.jsonl") as error:
        read_metrics(tmp_path)
    assert "\n" not in str(error.value)
    more = {"version": 2, "ratio_max": math.inf, "tuning": {"batch_wait_ms": "inf"}, "lr": None}
    file.write_bytes(with_line() + with_line(**more) + b'{"vers')
    assert read_metrics(tmp_path) == [LINE, LINE | more]


def test_lines_are_looked_at_before_a_run_is_touched(tmp_path):
    folder = tmp_path / "run/checkpoints/000003"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").touch()
    (folder / "state.json").write_text(json.dumps(GOOD))
    (tmp_path / "run/metrics.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match="line 1 of .*metrics.jsonl"):
        start.resume_from(completed(Config(), resume=str(tmp_path / "run")))


@pytest.mark.parametrize(
    "scale",
    [
        {},
        {"decay": 0.8, "square": "x"},
        {"decay": 0.8, "square": None},
        {"decay": 0.8, "square": []},
        {"decay": 0.8, "square": -1.0},
        {"decay": 0.8, "square": 1e40},
        {"decay": 1.0, "square": 1.0},
        {"decay": "x", "square": 1.0},
        {"decay": 0.8, "square": 1.0, "more": 1},
    ],
    ids=str,
)
def test_what_no_loss_remembers_is_refused(tmp_path, scale):
    config = completed(Config(), checkpoint=tmp_path / "000003")
    with pytest.raises(UserError, match="cannot read .*remembers") as error:
        start.check_memory_of(config, None, None, {"scale": scale})
    assert "\n" not in str(error.value)


def test_default_names_of_runs_that_start_at_once_differ(monkeypatch, tmp_path):
    monkeypatch.setattr("config.ROOT", tmp_path)
    names = {train.unused_path() for _ in range(3)}
    assert len(names) == 3 and all(name.is_dir() for name in names)
