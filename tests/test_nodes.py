"""Launchers of several nodes: how they meet, what they must agree on, what they say, how they end.

Nodes here are threads that share a store; whole runs by torchrun are in test_nodes_runs.py."""

import json
import os
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file

import config
import joining
import nodes
from config import Config, completed
from errors import UserError
from models import checkpoint
from nodes import Ended, NodeLost, Nodes


@pytest.fixture
def address():
    """A store as torchrun has one."""
    limit = timedelta(seconds=20)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=limit)
    yield "127.0.0.1", store.port


@pytest.fixture
def several(address):
    """Makes nodes that know one another by their ranks, and ends their threads."""
    made = []

    def make(count: int, limit_s: float = 20.0) -> list[Nodes]:
        made.extend(Nodes(rank, count, address) for rank in range(count))
        for one in made:
            one.limit_s = limit_s
        return made

    yield make
    for one in made:
        one.leaving.set()
        if one.thread.is_alive():
            one.thread.join()


def at_once(function, *arguments: list):
    """Calls a function for every node in a thread of its own. Returns results, or errors."""

    def call(*args):
        try:
            return function(*args)
        except Exception as error:
            return error

    with ThreadPoolExecutor(len(arguments[0])) as pool:
        return list(pool.map(call, *arguments))


def met(made: list[Nodes], saved: list[int]) -> list[list[dict]]:
    def meet(one: Nodes, version: int):
        return joining.meet(one, one.open_store(), {"saved": version, "file": None})

    return at_once(meet, made, saved)


def test_nodes_meet_and_are_numbered_by_who_has_the_run(several):
    made = several(3)
    # Whatever an earlier start of this job has left in the store.
    store = made[0].open_store()
    store.set("vla3/seen", json.dumps([7, [{"id": "a"}, {"id": "b"}, {"id": "c"}]]))
    store.add("vla3/meets", 7)
    hellos = met(made, [-1, 20, 20])
    assert [one.number for one in made] == [1, 0, 2]
    assert {one.meets for one in made} == {8}
    assert hellos[0] == hellos[1] == hellos[2]
    assert made[0].names == made[2].names and made[0].name.startswith("node 1 (")
    assert all(abs(one.clock) < 0.1 for one in made)  # they have one clock
    assert made[1].meeting(Path("x")).name == made[2].meeting(Path("y")).name == "/vla3/8/actors"


def test_jobs_may_have_one_store(address):
    """Of two torchruns with one port and two ids, the second one uses the first one's store."""
    made = [Nodes(rank, 2, address, job) for job in ("a", "b") for rank in range(2)]
    met(made, [-1, -1, 3, 7])
    assert [one.number for one in made] == [0, 1, 1, 0]
    assert [one.meeting(Path("x")).name[:2] for one in made] == ["a/", "a/", "b/", "b/"]


def test_nodes_must_run_the_same_program_and_have_one_time(several):
    made = several(2)
    for one in made:
        one.names = ["node 0 (a)", "node 1 (b)"]
    hellos = [joining.about_this_program() | {"date": 0.0} for _ in made]
    hellos[1]["date"] = 3.0
    assert at_once(joining.check_alike, made, [hellos] * 2) == [None, None]
    hellos[1]["date"] = -75.0
    said = "the clock of node 1 (b) is 75 s ahead of that of node 0 (a): synchronise them (NTP)"
    assert [str(e) for e in at_once(joining.check_alike, made, [hellos] * 2)] == [said, said]
    for what in ("Python", "torch", "numpy", "vla3"):
        other = [hellos[0], hellos[0] | {what: "other"}]
        said = f"node 1 (b) has {what} other, and node 0 (a) {hellos[0][what]}"
        for one in made:
            with pytest.raises(UserError, match=re.escape(f"{said}: install the same on all")):
                joining.check_alike(one, other)


def test_a_node_that_does_not_come_is_named(several):
    made = several(3, limit_s=1.0)[:2]
    first, second = met(made, [-1, -1])
    assert str(first).startswith("of 3 nodes these have not come within 1 s: 2; does torchrun run")
    assert "another of 3, has not come within 1 s" in str(second)
    assert {type(first), type(second)} == {UserError}


def test_words_go_to_the_first_node_and_from_it_to_all(several):
    made = several(3)
    met(made, [-1, -1, -1])
    for one in made:
        one.thread.start()
    for n in range(4):
        made[0].tell({"kind": "version", "version": n})
    made[1].tell({"kind": "measured", "of": 1})
    made[2].tell({"kind": "measured", "of": 2})
    found = made[0].wait_for("measured")
    assert {node: word["of"] for node, word in found.items()} == {1: 1, 2: 2}
    for one in made[1:]:
        assert one.wait_for("version")[0]["version"] == 0
        late = time.monotonic() + 20.0
        versions = []
        while len(versions) < 3 and time.monotonic() < late:
            versions += [word["version"] for _, word in one.news()]
        assert versions == [1, 2, 3]
    with pytest.raises(NodeLost, match=r"node 1 \(.*\), node 2 \(.*\) did not come to say 'more'"):
        made[0].wait_for("more", 0.2)
    made[0].end("3 iterations done", 0, "1:1")
    with pytest.raises(Ended, match="3 iterations done") as ended:
        made[2].wait_for("more")
    assert (ended.value.status, ended.value.ratio) == (0, "1:1")


def test_a_silent_node_is_lost_and_named_by_all(several, monkeypatch):
    monkeypatch.setattr(nodes, "BEAT_S", 0.25)
    made = several(3, limit_s=2.5)
    met(made, [-1, -1, -1])
    for one in made:
        one.thread.start()
    time.sleep(0.5)
    assert made[0].silent() == "" and list(made[0].news()) == []
    made[1].leaving.set()  # as if its machine were gone
    with pytest.raises(NodeLost, match=r"^node 1 \(.*\) is silent for 2 s: is it gone\?$"):
        made[0].wait_for("anything")
    assert made[0].silent().startswith("node 1 (")
    made[0].leaving.set()
    with pytest.raises(NodeLost, match=r"^node 0 \(.*\) is silent for 2 s: is it gone\?$"):
        made[2].wait_for("anything")


def test_work_of_any_node_is_seen_by_all(several, monkeypatch):
    """A node that waits long for the gradients of a slower one is not to give up."""
    monkeypatch.setattr(nodes, "BEAT_S", 0.05)
    made = several(3)
    met(made, [-1, -1, -1])
    for one in made:
        one.thread.start()

    def seen(*work: float) -> bool:
        late = time.monotonic() + 20.0
        while time.monotonic() < late:
            if tuple(one.work_elsewhere for one in made) == work:
                return True
            time.sleep(0.05)
        return False

    made[2].work = 3.0
    assert seen(3.0, 3.0, 3.0)
    made[0].work = 1.0
    assert seen(3.0, 4.0, 4.0)
    time.sleep(0.3)  # it does not grow by itself
    assert seen(3.0, 4.0, 4.0)


def test_a_store_that_is_gone_is_named():
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    made = [Nodes(rank, 2, ("127.0.0.1", store.port)) for rank in range(2)]
    met(made, [-1, -1])
    made[1].thread.start()
    time.sleep(0.3)
    del store
    with pytest.raises(NodeLost, match="torchrun's store on 127.0.0.1, port [0-9]+, is gone"):
        made[1].wait_for("anything")
    made[1].close()  # nobody is waited for


def test_what_ends_one_node_ends_all(several, capsys):
    made = several(2)
    met(made, [-1, -1])
    for one in made:
        one.thread.start()

    def second() -> None:
        with made[1].together():
            raise UserError("cannot read x: give another --checkpoint")

    def first() -> None:
        with made[0].together():
            made[0].wait_for("settings")

    found = at_once(lambda act: caught(act), [first, second])
    assert isinstance(found[1], UserError)
    assert isinstance(found[0], SystemExit) and found[0].code == 2
    said = f"error: {made[1].name}: cannot read x: give another --checkpoint\n"
    assert capsys.readouterr().err == said
    assert not any(one.thread.is_alive() for one in made)


def caught(act) -> BaseException | None:
    try:
        act()
    except BaseException as error:
        return error
    return None


def test_nodes_must_mean_the_same(several, tmp_path, monkeypatch):
    made = several(2)
    met(made, [-1, -1])
    for one in made:
        one.thread.start()
    files = [tmp_path / name for name in ("one", "same", "other")]
    for file in files:
        file.write_bytes(bytes(16_000_000))
    config = completed(Config(), checkpoint=files[0])
    same = completed(config, checkpoint=files[1], env_workers=7, node=1)
    made[0].name_run(str(tmp_path))
    assert at_once(joining.agree, made, [config, same]) == [None, None]
    assert made[1].run == str(tmp_path)
    made[1].tell({"kind": "settings", "settings": joining.meant(completed(config, lr=0.5))})
    with pytest.raises(UserError, match=r"node 1 \(.*\) has --lr 0.5 \(not .*\) unlike node 0 \("):
        joining.agree(made[0], config)
    # A run may be named: of runs/NAME the newest checkpoint counts, whatever older ones are there.
    newest = tmp_path / "runs/begun/checkpoints/000004/model.safetensors"
    newest.parent.mkdir(parents=True)
    save_file({"x": torch.zeros(3)}, newest)
    (newest.parent.parent / "000002").mkdir()
    save_file({"x": torch.ones(3)}, newest.parent.parent / "000002/model.safetensors")
    monkeypatch.setattr(checkpoint, "ROOT", tmp_path)
    assert joining.contents(Path("begun")) == joining.contents(newest)
    # The same flags, and files that differ in one place, which no actor may look at.
    with open(files[2], "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"x")
    made[1].tell({"kind": "settings", "settings": {"checkpoint": joining.contents(files[2])}})
    with pytest.raises(UserError, match=r"node 1 \(.*\) has --checkpoint contents .*: give all"):
        joining.agree(made[0], config)
    # Lanes of several envs must be the same on all nodes: which env has which number is theirs.
    made[1].tell({"kind": "settings", "settings": {"env_workers": "7"}})
    with pytest.raises(UserError, match=r"has --env-workers 7 \(not .*\) unlike node 0 "):
        joining.agree(made[0], completed(config, lanes=2))


@pytest.mark.parametrize(
    "told, said",
    [
        ({"WORLD_SIZE": "4"}, "WORLD_SIZE is 4, and no torchrun has started this process"),
        (
            {"TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "8"},
            "--nproc-per-node 8 starts 8 launchers on a machine: give 1",
        ),
    ],
)
def test_what_torchrun_must_be_told(monkeypatch, told, said):
    for name in ("WORLD_SIZE", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    assert not Nodes.here().several
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=re.escape(said)):
        Nodes.here()


def launcher(rank: int, port: int, folder: Path, answers) -> None:
    """One of two launchers in a process of its own, whose clocks are apart; the second one has the
    run on its disk."""
    nodes.ROOT = config.ROOT = folder / str(rank)  # they share no disk
    if rank == 1:
        began = time.monotonic
        joining.time = SimpleNamespace(
            monotonic=lambda: began() + 1000.0, time=lambda: time.time() + 5.0, sleep=time.sleep
        )
    one = Nodes(rank, 2, ("127.0.0.1", port))
    flags = ["--resume", "trained", "--lr", "0.1", "--timeout-s", "50"]
    flags += ["--checkpoint", "x"] if rank == 0 else []  # what the run began from
    flags = joining.meet_the_others(one, flags)
    resumed = SimpleNamespace(train=SimpleNamespace(resume="trained"))
    flags = joining.bring_run(one, flags, resumed if one.first else None)
    one.close()
    answers.put((rank, one.number, one.clock, flags))


def test_a_resumed_run_is_copied_from_the_node_that_has_it(tmp_path, address):
    run = tmp_path / "1" / "runs" / "trained"
    files = {
        "config.json": b"{}",
        "metrics.jsonl": b"line",
        "tokenizer.model": b"words",
        "trace.json": b"not this",
        "checkpoints/000002/model.safetensors": b"not this",
        "checkpoints/000004/model.safetensors": bytes(range(256)) * 300_000,  # two pieces
        "checkpoints/000004/state.json": b"",
    }
    for name, data in files.items():
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_bytes(data)
    context = torch.multiprocessing.get_context("spawn")
    answers = context.Queue()
    started = [
        context.Process(target=launcher, args=(rank, address[1], tmp_path, answers), daemon=True)
        for rank in range(2)
    ]
    for process in started:
        process.start()
    found = sorted(answers.get(timeout=100) for _ in started)
    for process in started:
        process.join(30)

    (_, number, clock, flags), (_, first, none, same) = found
    assert (number, first) == (1, 0) and none == 0.0
    assert clock == pytest.approx(1000.0, abs=0.2)
    copied = tmp_path / "0" / "runs" / ".trained.node-1"
    assert flags == ["--lr", "0.1", "--timeout-s", "50", "--resume", str(copied)]
    assert same == ["--resume", "trained", "--lr", "0.1", "--timeout-s", "50"]
    there = {
        str(path.relative_to(copied)): path.read_bytes()
        for path in copied.rglob("*")
        if path.is_file()
    }
    assert there == {name: data for name, data in files.items() if data != b"not this"}


def test_a_store_that_nobody_has_is_named(capsys):
    one = Nodes(1, 2, ("127.0.0.1", 1))
    with pytest.raises(SystemExit) as left, one.together():
        joining.meet_the_others(one, ["--timeout-s", "1"])
    assert left.value.code == 1
    said = "error: torchrun's store on 127.0.0.1, port 1, is gone: has torchrun ended there? ("
    assert capsys.readouterr().err.startswith(said)


def test_a_store_that_does_not_answer_is_named(several, monkeypatch):
    """As that of a machine without power: torch waits for it without end."""
    made = several(2, limit_s=2.0)
    met(made, [-1, -1])
    stuck = threading.Event()
    monkeypatch.setattr(made[1], "hear", lambda *_: stuck.wait(60.0))
    made[1].thread.start()
    try:
        with pytest.raises(NodeLost, match="^torchrun's store on 127.0.0.1 does not answer$"):
            made[1].wait_for("anything")
        began = time.monotonic()
        made[1].gather_spans(Path("nowhere"))
        made[1].close()
        assert time.monotonic() - began < 1.0
    finally:
        stuck.set()


def test_another_run_of_the_same_name_is_not_gone_on_with(tmp_path, monkeypatch):
    """Its folder lies on the disk of a node, and torchrun has started a job again that has a run of
    that name."""
    monkeypatch.setattr(config, "ROOT", tmp_path)
    for version in (7, 12):
        folder = tmp_path / "runs" / "x" / "checkpoints" / f"{version:06d}"
        folder.mkdir(parents=True)
        (folder / "state.json").touch()
    mine = {"run": "x", "folder": joining.inode(tmp_path / "runs" / "x")}
    nothing = {"saved": -1, "file": None}
    assert joining.has_run("x", {})["saved"] == joining.has_run("x", mine)["saved"] == 12
    assert joining.has_run("x", mine | {"folder": mine["folder"] + 1}) == nothing
    assert joining.has_run("y", {}) == joining.has_run(None, mine) == nothing
